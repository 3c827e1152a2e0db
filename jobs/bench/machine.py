"""Where and of what something is measured: device, versions and commit, which stand above every table of figures."""

import platform
import subprocess
from pathlib import Path

from dailies import HOME
from dailies.actors.cores import usable_cores


def machine() -> dict[str, str]:
    import torch
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))     # torch knows an affinity, and no quota
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{usable_cores()} CPU cores"
    return {"device": f"{device} ({platform.machine()})", "torch": torch.__version__,
            "python": platform.python_version(), "commit": commit()}


def commit() -> str:
    """As git describes it; where git is not installed, as the checkout's own files say."""
    try:
        done = subprocess.run(["git", "-C", str(HOME), "describe", "--always", "--dirty"], capture_output=True,
                              text=True)
        return done.stdout.strip() or "unknown"
    except OSError:
        return f"{noted[:7]} or later" if (noted := commit_in(HOME / ".git")) else "unknown"


def commit_in(git: Path) -> str | None:
    """The hash that HEAD names in the folder that git keeps, or in the one that a worktree's file points at."""
    try:
        if git.is_file():
            git = git.parent / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        shared = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        branch = head.removeprefix("ref: ")
        if (shared / branch).exists():
            return (shared / branch).read_text().strip()
        packed = (line.split() for line in (shared / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [branch]), None)
    except OSError:
        return None
