"""Short versions of the chaos nights (tests/chaos; the long ones: make chaos), and full disks without Ray."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny  # noqa: F401  adds the model to the catalogue
from chaos.full_disk import FillingStore, NoDisk, small_disk, spoilt
from one_process import main

from dailies.jobs import render
from dailies.pipeline.run import lease, ledger
from dailies.pipeline.store import open_store

ROOT = Path(__file__).resolve().parent.parent


def chaos(*arguments: object) -> dict:
    """The figures of one scenario."""
    done = subprocess.run([sys.executable, "-m", "tests.chaos", *map(str, arguments), "--json"], cwd=ROOT, text=True,
                          capture_output=True, timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode in (0, 3), done.stdout + done.stderr[-5000:]
    found, = json.loads(done.stdout).values()
    assert not found["wrong"], found
    return found


def test_a_night_of_kills_loses_and_repeats_nothing():
    found = chaos("folder", "--clips", 60, "--kills", 5)
    assert found["kills"] == 5 and found["objects"] == found["rows_written"] == 60


@pytest.mark.slow
def test_a_night_of_kills_on_a_bad_store_loses_and_repeats_nothing(s3_server):
    """s3_server: only so that it skips with a reason where there is none; the night starts one of its own."""
    found = chaos("s3", "--clips", 60, "--kills", 5)
    assert found["kills"] == 5 and found["objects"] == found["rows_written"] == 60
    assert sum(found["faults"].values()) > 0


@pytest.fixture
def disk(tmp_path):
    """A small file system, and nothing else on it."""
    try:
        with small_disk(tmp_path / "disk") as folder:
            yield folder
    except NoDisk as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("folder", ["clips", "ledger", "latents"])
def test_a_full_disk_ends_the_run_with_5_and_spoils_nothing(folder, disk, tmp_path, capsys, monkeypatch):
    manifest, out, ballast = tmp_path / "night.jsonl", disk / "out", disk / "ballast"
    manifest.write_text("".join(json.dumps({"prompt": f"a fox {number}", "frames": 5}) + "\n" for number in range(8)))
    command = ["render", str(manifest), "--out", str(out), "--model", "tiny", "--device", "cpu", "--json"]
    with monkeypatch.context() as full:
        full.setattr(render, "open_store", partial(FillingStore, folder=folder, ballast=str(ballast)))
        assert main(command) == 5
    said = json.loads(capsys.readouterr().out)
    assert "No space left on device. Free some space" in said["error"]
    assert len(list(out.glob("clips/*/*.mp4"))) == (8 if folder == "ledger" else 4) and spoilt(str(out)) == []
    ballast.unlink()
    monkeypatch.setattr(lease, "is_alive", lambda *_: False)        # as if that driver had had a process of its own
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["done"] == 8 and said["rendered"] + said["adopted"] == 8 and spoilt(str(out)) == []
    assert ledger.read(open_store(out)).num_rows == len(list(out.glob("clips/*/*.mp4"))) == 8
