"""Whose an error is: a row's, or the machine's on which it was raised. A machine's is never charged to a row.

A row is a prompt, numbers and perhaps an image: it opens no file, starts no thread and loads no library. So what the
operating system refuses is the machine's, and so are a library that is not there and a GPU that is gone. A GPU without
room for one clip, or whose context is lost (`lost_context`), may be the clip's doing.
"""

import errno
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dailies.model.memory import machine_memory
from dailies.pipeline.store import StoreError

DISK = "Free some of that disk, or set TMPDIR to a folder on another one"
MEMORY = "Free memory there, or let fewer processes share it (--samplers)"
HANDLES = "Raise the limit of open files there (ulimit -n)"
PROCESSES = "Raise the limit of processes and threads there (ulimit -u, or the container's pids limit)"
MOUNT = "Its file system does not answer as it should: see to the disk or mount it again (`dmesg` says more)"
LIBRARY = "Install it there, in the version that constraints.txt names"
CODEC = "PyAV needs FFmpeg with libx264 and aac: install PyAV's own wheel there (pip install --force-reinstall av)"
GPU = "See to its GPU and driver (nvidia-smi, dmesg)"
TEMPORARY = "Make that folder again, writable for this user, or set TMPDIR to one that is"
OTHERWISE = "See to that file, device or connection there"

ADVICE = {
    errno.ENOSPC: DISK, errno.EDQUOT: "Free some of your quota there, or set TMPDIR to a folder on another disk",
    errno.EMFILE: HANDLES, errno.ENFILE: "Raise the system's limit of open files there (sysctl fs.file-max)",
    errno.ENOMEM: MEMORY, errno.EAGAIN: PROCESSES,
    errno.EROFS: "That file system is read-only: mount it writable, or set TMPDIR to a folder on another one",
    errno.EFBIG: "Raise the limit of a file's size there (ulimit -f)",
    errno.EACCES: "Give this user the right to it, or set TMPDIR to a folder that is this user's",
    errno.EPERM: "Give this user the right to it, or set TMPDIR to a folder that is this user's",
} | dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.EUCLEAN,
                   errno.EBADMSG, errno.ENOMEDIUM, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.ENOLCK), MOUNT)

MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM}
ANYBODYS = MISSING | {errno.EFBIG, errno.EAGAIN}        # may be said of a file that a row names, or by a codec
PERHAPS = {errno.ENOMEM}                                # of one value that is very large

# Told by words alone, by libraries that pass no number on. Only what libraries raise is read: other errors may quote a
# row's text.
_PATTERNS = {
    MEMORY: "cannot allocate memory|can't allocate memory|not enough memory: you tried|bad_alloc",
    DISK: "no space left on device|disk quota exceeded",
    HANDLES: "too many open files",
    PROCESSES: "can't start new thread|thread creation failed|resource temporarily unavailable",
    MOUNT: "read-only file system|input/output error|stale (?:nfs )?file handle|transport endpoint is not connected"
           "|structure needs cleaning",
    LIBRARY: "cannot open shared object file|undefined symbol|invalid elf header|failed to find c compiler"
             r"|failed to open libnv|libcuda\.so cannot found|version `[\w.]+' not found",
    GPU: r"fallen off the bus|gpu is lost|\bxid\b|uncorrectable (?:ecc|nvlink)|driver version is insufficient"
         "|driver on your system is too old|driver/library version mismatch|unsupported display driver"
         "|forward compatibility was|no kernel image is available|no cuda-capable device|no cuda gpus are available"
         "|no nvidia driver|not compiled with cuda|cuda unknown error|busy or unavailable|system not yet initialized"
         "|driver is a stub|unsupported ptx|device handle for gpu"
         "|(?:cudaError|cuda_error_)(?:insufficient_?driver|no_?device|devices?_?unavailable|system_?driver_?mismatch"
         "|system_?not_?ready|ecc_?uncorrectable|no_?kernel_?image_?for_?device|no_?binary_?for_?gpu|stub_?library)",
}
_WORDS = {advice: re.compile(words, re.I) for advice, words in _PATTERNS.items()}
NUMBER = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+),")              # as Rust words it
ASKED = re.compile(r"(?:tried to allocate|unable to allocate) (\d+(?:\.\d+)?) ?([KMGTPE]i?B|bytes)?", re.I)
LASTING = {LIBRARY, CODEC, GPU}                         # nothing that a new process on the same machine would mend
BY_LIBRARIES = (RuntimeError, SystemError, OSError)


OUT_OF_MEMORY = f"the system ended a process there for want of memory. {MEMORY}"


class WorkerUnfit(RuntimeError):
    """What a worker stands on is gone: no disk, memory, processes, library or GPU. No value is to blame.

    sure: not even a value of an extraordinary size.  lasting: no other process on this machine would fare better.
    """

    def __init__(self, reason: str, sure: bool = True, lasting: bool = False):
        super().__init__(reason, sure, lasting)         # all of it, so that it survives pickling
        self.sure, self.lasting = sure, lasting

    def __str__(self) -> str:
        return self.args[0]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from. Not what was merely being handled: that may be over."""
    while error is not None:
        yield error
        error = error.__cause__


def store_trouble(error: BaseException) -> StoreError | None:
    """The store's own error, in whatever it has been wrapped."""
    return next((link for link in causes(error) if isinstance(link, StoreError)), None)


def machine_fault(error: BaseException) -> WorkerUnfit | None:
    """What is wrong with this machine and what to do, if that is what the error says; None: it is not the machine's."""
    for link in causes(error):
        if isinstance(link, WorkerUnfit):
            return link
        if isinstance(link, StoreError):                # whatever it was raised from
            return None
        if type(link).__name__ == "OutOfMemoryError":   # a GPU's: a smaller clip would have had room
            return None
        if found := by_kind(link, outermost=link is error) or by_words(link):
            advice, sure = found
            if advice is MEMORY and more_than_there_is(str(link)):
                return None
            said = f"{type(link).__name__}: {' '.join(str(link).split())[:300]}".rstrip(".: ")
            return WorkerUnfit(f"{said}. {advice}", sure, advice in LASTING)
    return None


def by_kind(error: BaseException, outermost: bool) -> tuple[str, bool] | None:
    """What to do, and whether it is certain; by the kind of error and the system's number."""
    if isinstance(error, MemoryError):
        return MEMORY, False
    if isinstance(error, ImportError):
        return LIBRARY, True
    if type(error).__name__ in ("UnknownCodecError", "EncoderNotFoundError", "MuxerNotFoundError"):
        return CODEC, True
    if isinstance(error, subprocess.CalledProcessError):        # a compiler that Triton or torch has started
        return LIBRARY, False
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in MISSING and is_temporary(error):
        return TEMPORARY, True
    if error.errno in ANYBODYS or error.errno not in ADVICE:
        # a file that a row names is read by who wraps this (pipeline/manifest/images.py)
        return (ADVICE.get(error.errno, OTHERWISE), False) if outermost else None
    return ADVICE[error.errno], error.errno not in PERHAPS


def by_words(error: BaseException) -> tuple[str, bool] | None:
    if not isinstance(error, BY_LIBRARIES) and type(error).__name__ != "SafetensorError":
        return None
    if found := NUMBER.search(str(error)):
        number = int(found[1] or found[2])
        return (ADVICE[number], number not in PERHAPS) if number in ADVICE else None
    return next(((advice, False) for advice, words in _WORDS.items() if words.search(str(error))), None)


def is_temporary(error: OSError) -> bool:
    """Whether it is about the folder for temporary files, or a file there."""
    if "temporary directory" in str(error):             # there is none at all
        return True
    if not isinstance(error.filename, (str, bytes)):
        return False
    folder = os.path.abspath(tempfile.tempdir or os.environ.get("TMPDIR") or "/tmp")
    return os.path.commonpath([folder, os.path.abspath(os.fsdecode(error.filename))]) == folder


def more_than_there_is(said: str) -> bool:
    """Whether that much memory was asked for at once that this machine could never give it: then it is the row's."""
    found = ASKED.search(said)
    if not found:
        return False
    power = "bkmgtpe".index((found[2] or "bytes")[0].lower())
    return float(found[1]) * 1024 ** power > machine_memory()


def killed_for_memory(root: Path = Path("/")) -> int:
    """Processes that the system has killed here for want of memory: in this container, or on this machine."""
    # of the container alone, where it says so (control groups, version 2 and 1)
    for name in ("sys/fs/cgroup/memory.events", "sys/fs/cgroup/memory/memory.oom_control", "proc/vmstat"):
        with suppress(OSError, ValueError):
            for line in (root / name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


# Who words it: torch, the driver through torch, Triton, cuDNN, cuBLAS and its siblings, NCCL, the kernel's log, NVML;
# then CUDA's own words, which any library may pass on, and the names of its errors.
LOST = re.compile(r"""
    CUDA[ ]error | CUDA[ ]driver[ ]error | Triton[ ]Error[ ]\[CUDA] | cuDNN[ ]error | CUDNN_STATUS_ | cuBLAS
    | (?:cuFFT|cuSOLVER|cuRAND|cuSPARSE)[ ]error | NCCL[ ]error | unhandled[ ]cuda[ ]error | nccl\w+Error
    | \bXid\b | fallen[ ]off[ ]the[ ]bus | GPU[ ]is[ ]lost
    | illegal[ ](?:memory[ ]access|instruction) | misaligned[ ]address | device-side[ ]assert
    | unspecified[ ]launch[ ]failure | launch[ ]timed[ ]out | hardware[ ]stack[ ]error | invalid[ ]program[ ]counter
    | uncorrectable[ ](?:ECC|NVLink)[ ]error | driver[ ]shutting[ ]down | context[ ]is[ ]destroyed
    | cudaError\w+ | CUDA_ERROR_\w+""", re.I | re.X)

# The same libraries in an error after which the device goes on: no memory, no room for one kernel, arguments that are
# refused before anything runs.
_GOES_ON = re.compile(r"""
    out[ ]of[ ]memory | out[ ]of[ ]resource | too[ ]many[ ]resources | _STATUS_(?:ALLOC_FAILED|NOT_SUPPORTED|BAD_PARAM)
    | _STATUS_INVALID_VALUE | invalid[ ](?:configuration[ ])?argument | OUT_OF_(?:MEMORY|RESOURCES) | MemoryAllocation
    | LaunchOutOfResources""", re.I | re.X)


def lost_context(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, says that the process can no longer use its GPU.

    Only RuntimeErrors do, which is what the libraries raise: other errors may quote a row's text.
    """
    for link in causes(error):
        said = str(link)
        if isinstance(link, RuntimeError) and not _GOES_ON.search(said) and (
                type(link).__name__ == "AcceleratorError" or LOST.search(said)):
            return True
    return False
