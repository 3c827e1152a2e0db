"""Hashes for what is installed, at the versions of constraints.txt.  python infra/lock.py make | fits [gpu]

make      asks the index that pip is set to for wheels, for the Pythons below on Linux x86_64, and writes their SHA-256:
          constraints.lock, what dailies needs, of torch also a CPU build, where pip finds one; constraints-gpu.lock,
          Triton and NVIDIA's libraries, which torch's own build asks for; constraints-dev.lock, the test tools. Run by
          `make lock`; minutes, and gigabytes where the index tells no metadata.
fits      exit 0 where these have files for this Python and machine.
fits gpu  the same, and the torch that is installed asks for Triton.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata
from itertools import product
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12")
# of a C library so new, and all before: of one version a project may have a wheel for each, and pip takes the newest
NEWEST = (41, 28)
OLDER = ("2014", "_2_12", "2010", "_2_5", "1")
FILES = {"base": "constraints.lock", "gpu": "constraints-gpu.lock", "dev": "constraints-dev.lock"}
_HEAD = f"""# SHA-256 of the wheels of {{what}}; at the versions of constraints.txt,
# for Python {" and ".join(PYTHONS)} on Linux x86_64. Installed with --require-hashes --no-deps. Made by: make lock
"""
HOLDS = {"base": "what dailies needs, of torch also a CPU build",
         "gpu": "Triton and of the NVIDIA libraries that torch asks for", "dev": "the test tools"}


def main(what: list[str]) -> int:
    if what in (["fits"], ["fits", "gpu"]):
        return 0 if fits() and (what == ["fits"] or asks_for_triton()) else 1
    if what != ["make"]:
        print(__doc__, file=sys.stderr)
        return 2
    missing = []
    for kind, wanted in wanted_by_kind().items():
        hashes = hashes_of(wanted)
        (_ROOT / FILES[kind]).write_text(_HEAD.format(what=HOLDS[kind]) + _text(wanted, hashes))
        missing += [name for name in wanted if not hashes[canonical(name)]]
    if missing:
        print(f"pip found no wheel of: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def wanted_by_kind() -> dict[str, dict[str, str]]:
    """Name -> version of what belongs into each file; into one file alone."""
    lines = (line.strip() for line in (_ROOT / "constraints.txt").read_text().splitlines())
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    extras = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = closure("dailies-render") - {"triton"}
    base = {name: version for name, version in pins.items() if canonical(name) in needed}
    found, taken = {"base": base}, {canonical(name) for name in base}
    for kind, asked in (("gpu", [f"torch==={pins['torch']}", *extras["gpu"]]), ("dev", extras["dev"])):
        answers = ask(asked, f"{sys.version_info.major}.{sys.version_info.minor}", NEWEST[0], deps=True)
        found[kind] = {name: version for name, version, _ in answers if canonical(name) not in taken}
        taken |= {canonical(name) for name in found[kind]}
    return found


def hashes_of(wanted: Mapping[str, str]) -> dict[str, set[str]]:
    """SHA-256 by canonical name, of every Python and C library."""
    hashes: dict[str, set[str]] = defaultdict(set)
    rest = [f"{name}=={version}" for name, version in wanted.items() if name != "torch"]
    # === is a version without its local part; == would take a CPU build for it
    builds = [[f"torch==={wanted['torch']}"], [f"torch==={wanted['torch']}+cpu"]] if "torch" in wanted else []
    for python, newest in product(PYTHONS, NEWEST):
        for requirements in (rest, *builds):
            for name, _, sha256 in ask(requirements, python, newest):
                hashes[canonical(name)].add(sha256)
    return hashes


def asks_for_triton() -> bool:
    return any(re.match(r"triton\b", line) for line in metadata.requires("torch") or [])


def fits() -> bool:
    return (platform.python_implementation() == "CPython"
            and f"{sys.version_info.major}.{sys.version_info.minor}" in PYTHONS
            and sys.platform == "linux" and platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc")


def ask(requirements: list[str], python: str, newest: int, *, deps: bool = False) -> list[tuple[str, str, str]]:
    """Name, version and hash of the wheel that pip would take of each; nothing, and pip's words, where it finds none.

    newest: glibc 2.x of the machine.  deps: also of what they need, at the versions of constraints.txt.
    """
    tag = python.replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
                   "--disable-pip-version-check", "--only-binary", ":all:", "--report", f"{folder}/report.json",
                   "--target", f"{folder}/none", "--python-version", python, "--implementation", "cp"]
        command += ["--constraint", str(_ROOT / "constraints.txt")] if deps else ["--no-deps"]
        command += [part for abi in (f"cp{tag}", "abi3", "none") for part in ("--abi", abi)]
        command += [part for each in (*(f"_2_{minor}" for minor in range(newest, 16, -1)), *OLDER)
                    for part in ("--platform", f"manylinux{each}_x86_64")]
        done = subprocess.run([*command, *requirements], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"Python {python}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return []
        report = json.loads(Path(folder, "report.json").read_text())
    return [(each["metadata"]["name"], each["metadata"]["version"].partition("+")[0],
             each["download_info"]["archive_info"]["hashes"]["sha256"]) for each in report["install"]]


def closure(distribution: str) -> set[str]:
    """Canonical names of all that this installed distribution needs and that is there, and what builds it."""
    done: set[tuple[str, str]] = set()
    absent: set[str] = set()
    waiting = [(distribution, "")]
    while waiting:
        name, extra = waiting.pop()
        if (canonical(name), extra) in done or canonical(name) in absent:
            continue
        done.add((canonical(name), extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:           # of another system, or another Python
            done.remove((canonical(name), extra))
            absent.add(canonical(name))
            continue
        for line in lines:
            needs, extras = re.match(r"([\w.-]+)\s*(?:\[([^]]*)])?", line).groups()
            only_for = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
            if only_for is None or canonical(only_for[1]) == canonical(extra):
                waiting += [(needs, each.strip()) for each in ("", *(extras or "").split(","))]
    return {name for name, _ in done} | {"setuptools"}


def _text(wanted: dict[str, str], hashes: dict[str, set[str]]) -> str:
    lines = [" \\\n    ".join([f"{name}=={version}",
                               *(f"--hash=sha256:{each}" for each in sorted(hashes[canonical(name)]))])
             for name, version in sorted(wanted.items(), key=lambda pin: pin[0].lower()) if hashes[canonical(name)]]
    return "\n".join(lines) + "\n"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
