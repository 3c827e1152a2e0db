"""The lowest versions: read from pyproject.toml alone. `make lowest` installs and tries them (tests/lowest.py)."""

import pytest

from dailies.infra.lowest import ROOT, lowest
from dailies.pipeline.scheduler.ray_private import KNOWN


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def test_every_requirement_says_its_lowest_version_and_none_is_above_what_is_tested_with():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))
    bounds = lowest((ROOT / "pyproject.toml").read_text())
    assert len(bounds) > 10
    for name, version in bounds.items():
        assert number(version) <= number(tested[name.lower()]), name
    assert bounds["ray"] == KNOWN[0] and tested["ray"].startswith(KNOWN[-1])


def test_a_requirement_without_a_lowest_version_is_refused():
    with pytest.raises(ValueError, match="'numpy' does not say its lowest version as NAME>=VERSION"):
        lowest('[project]\ndependencies = ["ray[default]>=2.59", "numpy"]\n')
