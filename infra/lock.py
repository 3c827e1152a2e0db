"""Hashes for what is installed: constraints.lock from constraints.txt.  python infra/lock.py make | fits

make  asks the index that pip is set to for the wheels of what dailies needs, for the Pythons below on Linux x86_64, and
      writes their SHA-256. Of torch also a CPU build's, where pip finds one. NVIDIA's libraries, which torch's own wheel
      asks for, are not in it: constraints.txt does not pin them. Run by `make lock`; minutes, and gigabytes where the
      index tells no metadata.
fits  exit 0 where the lock has files for this Python and machine.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12")
MANYLINUX = ("_2_28", "_2_27", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")
HEAD = f"""# SHA-256 of the wheels of what dailies needs, at the versions of constraints.txt, for Python {" and ".join(PYTHONS)} on
# Linux x86_64; of torch a CPU build's, too. Installed with --require-hashes --no-deps before dailies. Made by: make lock
"""


def main(what: list[str]) -> int:
    if what == ["fits"]:
        return 0 if fits() else 1
    if what != ["make"]:
        print(__doc__, file=sys.stderr)
        return 2
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    needed = closure("dailies-render")
    wanted = {name: version for name, version in pins.items() if canonical(name) in needed}
    hashes: dict[str, set[str]] = defaultdict(set)
    for python in PYTHONS:
        rest = [f"{name}=={version}" for name, version in wanted.items() if name != "torch"]
        # === is a version without its local part; == would take a CPU build for it
        for requirements in (rest, [f"torch==={wanted['torch']}"], [f"torch==={wanted['torch']}+cpu"]):
            for name, sha256 in ask(requirements, python):
                hashes[canonical(name)].add(sha256)
    (ROOT / "constraints.lock").write_text(text(wanted, hashes))
    missing = [name for name in wanted if not hashes[canonical(name)]]
    if missing:
        print(f"pip found no wheel of: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def fits() -> bool:
    return (platform.python_implementation() == "CPython" and "%d.%d" % sys.version_info[:2] in PYTHONS
            and sys.platform == "linux" and platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc")


def ask(requirements: list[str], python: str) -> list[tuple[str, str]]:
    """Name and hash of the wheel that pip would take of each; nothing, and pip's words, where it does not find them."""
    tag = python.replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet",
                   "--disable-pip-version-check", "--only-binary", ":all:", "--report", f"{folder}/report.json",
                   "--target", f"{folder}/none", "--python-version", python, "--implementation", "cp"]
        command += [part for abi in (f"cp{tag}", "abi3", "none") for part in ("--abi", abi)]
        command += [part for each in MANYLINUX for part in ("--platform", f"manylinux{each}_x86_64")]
        done = subprocess.run([*command, *requirements], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"Python {python}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return []
        report = json.loads(Path(folder, "report.json").read_text())
    return [(each["metadata"]["name"], each["download_info"]["archive_info"]["hashes"]["sha256"])
            for each in report["install"]]


def closure(distribution: str) -> set[str]:
    """Canonical names of all that this installed distribution needs, on any system, and what builds it."""
    done: set[tuple[str, str]] = set()
    waiting = [(distribution, "")]
    while waiting:
        name, extra = waiting.pop()
        if (canonical(name), extra) in done:
            continue
        done.add((canonical(name), extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:           # of another system
            continue
        for line in lines:
            needs, extras = re.match(r"([\w.-]+)\s*(?:\[([^]]*)])?", line).groups()
            only_for = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
            if only_for is None or canonical(only_for[1]) == canonical(extra):
                waiting += [(needs, each.strip()) for each in ("", *(extras or "").split(","))]
    return {name for name, _ in done} | {"setuptools"}


def text(wanted: dict[str, str], hashes: dict[str, set[str]]) -> str:
    lines = [" \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{each}" for each in sorted(hashes[canonical(name)]))])
             for name, version in sorted(wanted.items(), key=lambda pin: pin[0].lower()) if hashes[canonical(name)]]
    return HEAD + "\n".join(lines) + "\n"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
