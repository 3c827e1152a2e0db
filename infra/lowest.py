"""The lowest versions that pyproject.toml allows, as constraints for pip: python infra/lowest.py [NAME=VERSION ...]

NAME=VERSION is said instead of pyproject's bound, where an index does not have that release or has no build of it that
runs here. Used by `make lowest`, which installs these and runs tests/lowest.py.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOUND = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+])?>=(?P<version>[\w.]+)")


def lowest(project: str) -> dict[str, str]:
    """Name -> lowest version of each requirement.  project: the text of a pyproject.toml.  Raises ValueError for one
    that does not say NAME>=VERSION."""
    found = {}
    for line in tomllib.loads(project)["project"]["dependencies"]:
        bound = BOUND.fullmatch(line)
        if bound is None:
            raise ValueError(f"pyproject.toml: {line!r} does not say its lowest version as NAME>=VERSION")
        found[bound["name"]] = bound["version"]
    return found


if __name__ == "__main__":
    bounds = lowest((ROOT / "pyproject.toml").read_text())
    bounds |= dict(each.split("=", 1) for each in sys.argv[1:])
    print("\n".join(f"{name}=={version}" for name, version in bounds.items()))
