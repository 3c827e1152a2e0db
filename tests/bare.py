"""A program on a machine with little installed: libraries that cannot be imported, and no other program to be found."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("ray", "av", "pydantic", "boto3", "ftfy", "typer")
HIDE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {absent!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def run_bare(arguments: list[str], folder: Path, absent: tuple[str, ...] = ABSENT, **env: str):
    """Python with these arguments, in the checkout.  folder: gets what hides the libraries, and is the home."""
    (folder / "sitecustomize.py").write_text(HIDE.format(absent=absent))
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TRITON_INTERPRET") if name in os.environ}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
        env=kept | {"HOME": str(folder), "TMPDIR": str(folder), "PATH": str(folder), "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "PYTHONDONTWRITEBYTECODE": "1"} | env)
