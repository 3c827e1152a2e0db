"""The kit for a GPU's first minutes: here on a CPU, in sizes of a dry run, without what a bare GPU machine lacks."""

import json
import textwrap

import pytest
from bare import ABSENT, ROOT, run_bare

from dailies.jobs.gpu import checks, timings
from dailies.jobs.gpu.kit import PARTS, Kit, Part, groups


def test_the_whole_kit_runs_in_a_dry_run_without_what_a_bare_gpu_machine_lacks(tmp_path):
    # the tests that need a device would all be skipped here
    names = ",".join(part.name for part in PARTS if part.name != "tests")
    done = run_bare(["-m", "dailies.jobs.gpu", "--tiny", "--out", str(tmp_path / "out"), "--only", names], tmp_path,
                    absent=(*ABSENT, "botocore", "diffusers"))
    report = (tmp_path / "out" / "report.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + report
    known = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(part["part"] for part in known["parts"] if part["status"] == "done") == sorted(names.split(","))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "report.md", "results.json"]
    told = {part["part"]: {row["what"] for row in part["rows"]} for part in known["parts"]}
    assert all(told[name] for name in told if name != "big"), told


def test_the_readmes_table_is_made_of_the_committed_results():
    from dailies.jobs.gpu.report import put_into, table
    results, readme = ROOT / "docs" / "measurements" / "2026-11-29-h200.json", (ROOT / "README.md").read_text()
    assert put_into(readme, table(json.loads(results.read_text()))) == readme
    with pytest.raises(ValueError, match="a line <!-- figures of a GPU"):
        put_into("no marks", "")


def test_every_part_has_its_function_and_what_is_timed_runs_alone():
    assert {part.name for part in PARTS} == set(checks.PARTS) | set(timings.PARTS)
    assert {part.name for part in PARTS if part.times} == set(timings.PARTS)
    assert all(len(group) == 1 for group in groups(PARTS) if group[0].times)


@pytest.mark.parametrize("what, status", [
    ("raise RuntimeError('lost')", "failed, exit 1"), ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
                                                      "ended by signal 11"),
                                                      ("import time; time.sleep(600)", "out of time")])
def test_a_part_that_crashes_or_hangs_costs_only_itself(what, status, tmp_path, monkeypatch):
    """A stand-in for the parts' process: dailies.jobs.gpu.part of another folder."""
    fake = tmp_path / "dailies" / "jobs" / "gpu"
    fake.mkdir(parents=True)
    for folder in (fake.parents[1], fake.parent, fake):
        (folder / "__init__.py").touch()
    (fake / "part.py").write_text(textwrap.dedent(f"""
        import argparse, json
        parser = argparse.ArgumentParser()
        parser.add_argument("part"), parser.add_argument("--found")
        args = parser.parse_args()
        open(args.found, "w").write(json.dumps(dict(what="a figure", ms=1.5)) + chr(10) + '{{"cut off')
        if args.part == "bad":
            {what}
    """))
    monkeypatch.setattr("dailies.jobs.gpu.kit.ROOT", tmp_path)
    parts = [Part(name=name, box_s=3.0 if name == 'bad' else 60.0, times=True) for name in ("good", "bad", "good")]
    assert Kit(out=tmp_path / "out", budget_s=180.0).run(parts) == 3
    known = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [part["status"] for part in known["parts"]] == ["done", status, "done"]
    assert all(part["rows"] == [{"what": "a figure", "ms": 1.5}] for part in known["parts"])
    assert "a figure: ms 1.5" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("arguments, message", [
    (["gpu"], "a folder for what is found is needed: dailies bench gpu --out DIR"),
    (["gpu", "--out", "o", "--only", "clip,clop"], "the kit has no part clop. There are: machine, "),
    (["gpu", "--out", "o", "--budget", "-1"], "--budget is the seconds for all parts together; got -1"),
    (["kernels", "--out", "o"], "--out, --budget, --only and --tiny are of: dailies bench gpu")])
def test_bad_usage_is_one_message_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    from dailies.jobs.cli import main
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_as_json_it_prints_what_was_found_and_nothing_else(tmp_path, capsys):
    from dailies.jobs.cli import main
    assert main(["bench", "gpu", "--out", str(tmp_path), "--tiny", "--only", "machine", "--json"]) == 0
    part, = json.loads(capsys.readouterr().out)["parts"]
    assert part["rows"][0]["what"] == "versions"


def test_parts_for_which_no_time_is_left_say_so(tmp_path):
    assert Kit(out=tmp_path, budget_s=1.0).run(PARTS) == 3
    known = json.loads((tmp_path / "results.json").read_text())
    assert {part["status"] for part in known["parts"]} == {"not begun: no time left"}
