"""What one machine of several loses while the others have it: room for temporary files, memory, the store's trust.

A machine is told by the file NAME-WHAT in a folder that all processes see; its name is in their environment.
"""

import os
import resource
from pathlib import Path

from dailies.pipeline.store import FolderStore, StoreError

MACHINE = "CHAOS_MACHINE"
KINDS = ("disk", "memory", "credentials")


def lose(folder: str, machine: str, what: str) -> None:
    (Path(folder) / f"{machine}-{what}").touch()


def meets(folder: str | None, what: str) -> bool:
    """Whether this process is on the machine that has lost it; it is counted."""
    if folder is None or not (Path(folder) / f"{os.environ.get(MACHINE)}-{what}").exists():
        return False
    with open(Path(folder) / f"met-{what}", "ab") as file:
        file.write(b".")
    return True


def met(folder: str) -> dict[str, int]:
    """How often each was missed at work."""
    return {path.name.removeprefix("met-"): path.stat().st_size for path in Path(folder).glob("met-*")}


def find_no_memory(num_bytes: int = 2**28) -> None:
    """As on a machine that has none left: the system refuses.  Raises MemoryError."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held, before[1]))
    try:
        bytearray(num_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class GuardedStore(FolderStore):
    """A folder that turns away who is on the machine that has lost its credentials."""

    def __init__(self, uri: str, *, lost: str):
        super().__init__(Path(uri))
        self.lost = lost

    def explained(self, action: str, key: str | None = None):
        if meets(self.lost, "credentials"):
            raise StoreError(f"{self.uri}: not allowed to {action} (AccessDenied)")
        return super().explained(action, key)
