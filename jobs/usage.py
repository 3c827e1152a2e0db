"""What is wrong with a command as it was given, and the model that it names; needs no library beside torch."""

import difflib
import glob
import os
import re
import sys

from dailies.model.card import ModelCard
from dailies.model.catalog import CATALOG
from dailies.model.errors import DailiesError

# what a GPU's driver makes, NVIDIA's, AMD's or that of Windows' Linux: asked before torch, which takes long to import
GPU_FILES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
MOST_NAME_BYTES, MOST_PATH_BYTES, MOST_KEY_BYTES = 255, 3800, 900       # room is left for what a run folder holds
NO_GPU = ("--device cuda: there is no GPU here that can be used (none in this machine, or its driver does not answer). "
          "Leave --device out to render on the CPU, or say with --ray where the GPUs are")


class UsageError(DailiesError):
    """The command cannot work as it was given; nothing was started or written."""

    def __str__(self) -> str:
        """Each of several problems, which are given one by one, on a line of its own."""
        return "\n".join(map(str, self.args))


def checked_place(name: str, value: str) -> str:
    """A path or URI as it was given.  Raises UsageError for one that can name nothing here, or cannot be written down.

    name: what to call it, as --out.
    """
    scheme, colon, rest = value.partition("://")
    if colon and scheme.lower() != "file":
        if scheme.lower() == "s3" and len(rest.partition("/")[2].encode(errors="replace")) > MOST_KEY_BYTES:
            raise UsageError(f"{name}: {shortened(value)} is longer than the {MOST_KEY_BYTES} bytes that a bucket has "
                             "room for")
        return value
    path = os.path.abspath(os.path.expanduser(rest if colon else value))
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name}: {path!r} has bytes that are no text, and a run is written down as text. Rename the "
                         "folder, or link to it by another name") from None
    longest = max((len(part.encode()) for part in path.split("/")), default=0)
    if longest > MOST_NAME_BYTES or len(path.encode()) > MOST_PATH_BYTES:
        raise UsageError(f"{name}: {shortened(value)} is too long for a file system, which has room for "
                         f"{MOST_NAME_BYTES} bytes between two slashes and {MOST_PATH_BYTES:,} in all")
    return value


def seconds_meant(name: str, said: str) -> float:
    """45s, 5m, 12h or 2d, in seconds.  name: what to call it, as --presign.  Raises UsageError."""
    found = re.fullmatch(r"(\d{1,6})\s*([smhd])", said.strip(), re.ASCII)
    if not found or not int(found[1]):
        raise UsageError(f"{name} must be a time such as 5m, 12h or 2d; got {shortened(said)}")
    return int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[found[2]]


def shortened(value: str) -> str:
    return repr(value if len(value) <= 60 else f"{value[:40]}...{value[-17:]}")


def refuse_absent_gpu(device: str | None, ray: str) -> None:
    """Raises UsageError for a GPU that this machine cannot have."""
    if device == "cuda" and ray == "local" and sys.platform == "linux" and not any(map(glob.glob, GPU_FILES)):
        raise UsageError(NO_GPU)


def absent_package(error: ModuleNotFoundError) -> str | None:
    """What to say of a library that is not installed; None where a module of ours is missing, which is our mistake."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "dailies"):
        return None
    return (f"the Python package {name} is not installed in {sys.executable}. dailies needs what its pyproject.toml "
            "names: pip install it there. On a cluster that is every machine: `dailies submit` brings the program, not "
            "its libraries")


def suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def card_named(name: str) -> ModelCard:
    """The catalogue's card of this name.  Raises UsageError."""
    if name not in CATALOG:
        raise UsageError(f"no model is called {name!r}.{suggestion(name, list(CATALOG))} "
                         f"There are: {', '.join(CATALOG)}")
    return CATALOG[name]
