"""Chromium for the tests of the morning report's page: Debian's package, where this user may install one.

    python -m tests.install_chromium
"""

import os
import shutil
import subprocess
import sys

from dailies.jobs.bench.chromium import NoBrowser, chromium


def main() -> None:
    try:
        chromium()
        return
    except NoBrowser as error:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            print(f"The page's tests are skipped: {error}", file=sys.stderr)
            return
    print("Installing Debian's chromium, for the tests of the report's page: some 100 MB", file=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"],
                    ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"The page's tests are skipped: {' '.join(command)}: {done.stderr.strip()[-300:]}", file=sys.stderr)
            return


if __name__ == "__main__":
    main()
