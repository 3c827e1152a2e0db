"""A headless Chromium, told what to do through two pipes: what a page made of what it was given.

It listens on nothing, fetches nothing, and has a profile of its own that goes with it.
"""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
           "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe")
STARTS_S = 60


class Page:
    def __init__(self, pipes: tuple[int, int], process: subprocess.Popen):
        self.into, self.out = pipes
        self.process, self.number, self.session, self.rest = process, 0, None, b""

    def call(self, method: str, **params):
        self.number += 1
        said = {"id": self.number, "method": method, "params": params}
        if self.session:
            said["sessionId"] = self.session
        os.write(self.into, json.dumps(said).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                if not (read := os.read(self.out, 1 << 16)):
                    raise RuntimeError("Chromium ended")
                self.rest += read
            message, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def run(self, script: str):
        """The value of an expression in the page, awaited where it is a promise.  Raises RuntimeError as it throws."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")


@contextmanager
def opened(file: Path | None = None):
    """A Page that shows a file, or nothing. Skips the test where no Chromium is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    to_it, into = os.pipe()
    out, from_it = os.pipe()
    with tempfile.TemporaryDirectory(prefix="dailies-chromium-", ignore_cleanup_errors=True) as profile:
        def three_and_four() -> None:                   # it reads from the one and writes to the other
            for pipe, number in [(fcntl.fcntl(pipe, fcntl.F_DUPFD, 100), number) for pipe, number in
                                 ((to_it, 3), (from_it, 4))]:
                os.dup2(pipe, number)

        process = subprocess.Popen([program, *OPTIONS, f"--user-data-dir={profile}"], close_fds=False,
                                   preexec_fn=three_and_four, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_it)
        os.close(from_it)
        page = Page((into, out), process)
        try:
            target = page.call("Target.createTarget", url=file.as_uri() if file else "about:blank")["targetId"]
            page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            yield page
            page.session = None
            with suppress(RuntimeError, OSError):
                page.call("Browser.close")
        finally:
            os.close(into)
            os.close(out)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
