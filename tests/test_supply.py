"""What is installed, and under which name."""

import re
import tomllib
from pathlib import Path

from test_house import canonical, required, tracked

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_nobody_is_told_to_install_the_other_program_that_is_called_dailies():
    """The name belongs to another project on PyPI; the command and the import keep it."""
    assert PROJECT["project"]["name"] == "dailies-render" and PROJECT["project"]["scripts"] == {"dailies": "jobs.cli:program"}
    told = re.compile(r"pip3? install[^\n#]*['\" ]dailies(?![\w-])")
    assert told.search("pip install 'dailies[dev]'") and not told.search("pip install dailies-render")
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".yaml", "") and path != Path(__file__).resolve():
            assert not told.search(path.read_text(encoding="utf-8")), path


def test_what_builds_the_distribution_is_pinned():
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", each) for each in PROJECT["build-system"]["requires"])


def test_the_lock_has_hashes_for_all_that_is_required_at_the_tested_versions():
    text = (ROOT / "constraints.lock").read_text().replace("\\\n", " ")
    pins = {line.split("==")[0]: line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    locked = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split()
            assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), line
            assert pins[pin.split("==")[0]] == pin
            locked[canonical(pin.split("==")[0])] = hashes
    assert not required() - locked.keys() and "setuptools" in locked
    assert len(locked["torch"]) >= 2                    # the index's own, and a CPU build


def test_what_is_locked_is_installed_by_hash():
    for name in ("Makefile", "infra/Dockerfile"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        assert re.search(r"pip install [^&;]*--require-hashes\s+--no-deps [^&;]*--requirement constraints.lock", text), name
