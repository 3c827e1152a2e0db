"""Installs the S3 test server (OpenStack Swift) into a virtual environment of its own: python -m tests.s3.install"""

import fcntl
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = REPOSITORY / ".cache" / "s3"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
TIMEOUT_S = 600


class CannotInstall(RuntimeError):
    """The test server cannot be had on this machine; the message says why."""


def install() -> Path:
    """The Python that runs the server; builds its environment first where requirements.txt or this Python changed.

    Raises CannotInstall when pip cannot get it.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    python, stamp = HOME / "venv" / "bin" / "python", HOME / "venv" / "installed"
    want = hashlib.sha256(sys.version.encode() + REQUIREMENTS.read_bytes()).hexdigest()
    with open(HOME / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                # two test runs may start at the same time
        if stamp.exists() and stamp.read_text() == want:
            return python
        try:
            venv.create(HOME / "venv", clear=True, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                            "--only-binary", ":all:", "--requirement", REQUIREMENTS],
                           check=True, timeout=TIMEOUT_S, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise CannotInstall(f"The S3 test server could not be installed: {last_line(error.stderr)}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotInstall(f"The S3 test server could not be installed: {error}") from error
        stamp.write_text(want)
    return python


def last_line(output: str | None) -> str:
    lines = [line for line in (output or "").splitlines() if line.startswith("ERROR")] or (output or "").splitlines()
    return lines[-1] if lines else "pip said nothing"


if __name__ == "__main__":
    try:
        install()
    except CannotInstall as error:
        print(f"{error}\nThe tests that need it will be skipped.", file=sys.stderr)
