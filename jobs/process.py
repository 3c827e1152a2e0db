"""How the program begins and ends as a process: words that nobody reads do no harm, and its exit code is the command's.

Python ends by stopping the threads of C libraries where they ask for the interpreter. Arrow's cannot be stopped so, and
now and then the process aborted (134) after all was done. So everything is cleared up and said, and the process left.
"""

import atexit
import errno
import io
import os
import sys
from typing import Any, NoReturn

NOBODY_READS = {errno.EPIPE, errno.EIO}                 # `| head` has ended; the terminal is gone


class Speaker(io.FileIO):
    """A stream that goes on into nothing when nobody is there to read it: a night does not end with its terminal, nor
    with the disk of its log."""

    lost: OSError | None = None                         # what could not be written although somebody may want to read

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in NOBODY_READS:
                self.lost = error                       # the next line is tried: there may be room again
                return len(data)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return len(data)


def speak_safely() -> None:
    """Standard output and error, so that neither a closed pipe nor a character without a place in the terminal's
    encoding ends the command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                              # `2>&-`: print would take standard output for it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
            continue
        raw = Speaker(stream.fileno(), "w", closefd=False)
        buffer = io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(buffer, encoding=stream.encoding, errors="backslashreplace",
                                            line_buffering=stream.line_buffering or name == "stderr"))


def leave(code: int) -> NoReturn:
    """End this process with this code, after what was registered for its end, and when all that was said is written."""
    try:
        atexit._run_exitfuncs()                         # temporary folders, Ray, logging; what raises there is printed
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
                    if isinstance(raw := getattr(getattr(stream, "buffer", None), "raw", None), Speaker) and raw.lost:
                        raise raw.lost
            except OSError as error:                    # a log on a full disk: what is missing there is not passed over
                code = code or 1
                os.write(2, f"what this command said could not be written: {error.strerror}\n".encode())
        os._exit(code)
