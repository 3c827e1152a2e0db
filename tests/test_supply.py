"""What is installed, and under which name."""

import re
import tomllib
from pathlib import Path

from test_house import tracked

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
