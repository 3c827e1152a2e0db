"""What is installed, and under which name."""

import re
import tomllib
from pathlib import Path

from test_house import canonical, required, tracked

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_nobody_is_told_to_install_the_other_program_that_is_called_dailies():
    """The name belongs to another project on PyPI; the command and the import keep it."""
    assert PROJECT["project"]["name"] == "dailies-render"
    assert PROJECT["project"]["scripts"] == {"dailies": "dailies.__main__:command"}
    told = re.compile(r"pip3? install[^\n#]*['\" ]dailies(?![\w-])")
    assert told.search("pip install 'dailies[dev]'") and not told.search("pip install dailies-render")
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".yaml", "") and path != Path(__file__).resolve():
            assert not told.search(path.read_text(encoding="utf-8")), path


def test_what_builds_the_distribution_is_pinned():
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", each) for each in PROJECT["build-system"]["requires"])


def locked(name):
    """Canonical name -> hashes, of one file; every pin of constraints.txt is the same there."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    pins = {canonical(line.split("==")[0]): line.split("==")[1]
            for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split()
            assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), line
            package, version = pin.split("==")
            assert pins.get(canonical(package), version) == version, pin
            found[canonical(package)] = hashes
    return found


def test_the_locks_have_hashes_for_all_that_is_required_at_the_tested_versions():
    base, gpu, dev = (locked(f"constraints{kind}.lock") for kind in ("", "-gpu", "-dev"))
    assert not required() - base.keys() and "setuptools" in base
    assert len(base["torch"]) >= 2                      # the index's own, and a CPU build
    assert not required("gpu") - base.keys() - gpu.keys() and any(name.startswith("nvidia-") for name in gpu)
    assert not required("dev") - base.keys() - gpu.keys() - dev.keys()
    assert not base.keys() & gpu.keys() and not (base.keys() | gpu.keys()) & dev.keys()


def test_what_is_locked_is_installed_by_hash():
    by_hash = r"--require-hashes\s+--no-deps --only-binary :all:\s+--requirement"
    image = (ROOT / "infra/Dockerfile").read_text().replace("\\\n", " ")
    assert re.search(rf"pip install [^&;]*{by_hash} constraints.lock\s+--requirement constraints-gpu.lock", image)
    make = (ROOT / "Makefile").read_text()
    assert re.search(rf"^HASHED .*{by_hash}$", make, re.M)
    assert all(f"$(HASHED) constraints{kind}.lock" in make for kind in ("", "-gpu", "-dev"))
    # what builds the distribution comes from the lock too, not from the index a second time
    assert image.count("--no-build-isolation") == image.count("pip install") - 1
    assert "$(PINNED) --no-build-isolation" in make
