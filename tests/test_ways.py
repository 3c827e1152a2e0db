"""What `auto` chooses: by measurement where there is one, by architecture where not, and never what loses."""

import json
import re
from pathlib import Path

import pytest

from dailies.jobs.gpu.ways import entries_of
from dailies.model import ways
from dailies.model.catalog import CATALOG
from dailies.model.ways import Gpu, fastest

H200, L40 = Gpu(name="NVIDIA H200", capability=(9, 0)), Gpu(name="L40", capability=(8, 9))
WAN, WAN_14B, TURBO = (CATALOG[name] for name in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "turbo-wan2.1-t2v-1.3b-480p"))


@pytest.fixture
def measured(monkeypatch):
    """A table of one GPU; milliseconds of its ways are given per test."""
    def set_to(width=1536, tuned=False, **ms):
        entry = dict(gpu="NVIDIA H200", on="2026-01-02", versions="", model="some-model", width=width, tokens=32760,
                     tuned=tuned, ms={way.replace("_", " "): taken for way, taken in ms.items()})
        monkeypatch.setattr(ways, "table", lambda: [entry])
    return set_to


def test_the_fastest_measured_way_is_chosen_and_said(measured):
    measured(bf16_dense=500.0, int8_dense=400.0, int8_sage=450.0)
    way = fastest(WAN, H200)
    assert (way.precision, way.attention) == ("int8", "dense")
    assert way.because == ("the fastest of 3 ways measured on NVIDIA H200 on 2026-01-02 with some-model: 400 ms a "
                           "forward, 500 in bf16 and dense")
    assert fastest(WAN, Gpu(name="H200", capability=(9, 0))) == way         # as Ray names it


def test_what_wins_by_next_to_nothing_or_loses_is_never_chosen(measured):
    measured(bf16_dense=500.0, int8_dense=495.0, int8_sage=600.0)
    assert (fastest(WAN, H200).precision, fastest(WAN, H200).attention) == ("bf16", "dense")


def test_what_a_person_says_stands(measured):
    measured(bf16_dense=500.0, int8_dense=400.0, int8_sage=450.0, bf16_sage=550.0)
    assert fastest(WAN, H200, precision="bf16").attention == "dense"
    assert fastest(WAN, H200, attention="sage").precision == "int8"


def test_sparse_attention_is_chosen_only_for_models_that_were_tuned_for_it(measured):
    measured(bf16_dense=500.0, bf16_sparse=100.0)
    assert fastest(WAN, H200).attention == "dense"
    measured(tuned=True, bf16_sparse=200.0, int8_sparse=150.0, int8_sage=180.0)
    assert (fastest(TURBO, H200).precision, fastest(TURBO, H200).attention) == ("int8", "sparse")


def test_where_nobody_measured_the_architecture_decides(measured):
    measured(bf16_dense=500.0, int8_dense=400.0)
    assert "nobody has measured" in fastest(WAN_14B, H200).because          # another width
    for card, gpu, wanted in ((WAN_14B, H200, ("int8", "dense")), (WAN, L40, ("int8", "sage")),
                              (WAN, Gpu(name="H100", capability=(9, 0)), ("int8", "dense")),
                              (WAN_14B, Gpu(name="B200", capability=(10, 0)), ("bf16", "dense")),
                              (WAN, Gpu(name="some card", capability=None), ("bf16", "dense")),
                              (TURBO, L40, ("int8", "sage")),
                              (TURBO, Gpu(name="A100", capability=(8, 0)), ("int8", "sparse"))):
        way = fastest(card, gpu)
        assert (way.precision, way.attention) == wanted, (card.name, gpu.name)


def test_on_a_cpu_auto_is_the_models_own():
    way = fastest(WAN, None)
    assert (way.precision, way.attention) == ("fp32", "dense")
    assert "CPU" in way.because


def test_the_table_that_is_shipped_is_of_known_models_and_ways():
    for entry in ways.table():
        assert set(entry) == {"gpu", "on", "versions", "model", "width", "tokens", "tuned", "ms"}
        card = CATALOG[entry["model"]]
        assert (entry["width"], entry["tuned"]) == (card.dit_config.width, card.tuned_for_sparse)
        for way in entry["ms"]:
            precision, attention = way.split()
            assert precision in card.precisions and attention in card.attentions


def test_the_kits_results_become_entries_of_the_table():
    def forward(precision, attention, ms, **more):
        return dict(what="a forward", eager_ms=ms, model=WAN.name, precision=precision, attention=attention, width=1536,
                    tokens=32760, tuned=False, **more)
    known = dict(about=dict(on="2026-01-02"), parts=[
        dict(part="machine", rows=[dict(what="versions", torch="2.11.0", triton="3.6.0"),
                                   dict(what="NVIDIA H200", capability="9.0")]),
        dict(part="clip", rows=[forward("bf16", "dense", 500.123), forward("int8", "dense", 400.0),
                                dict(what="another", failed="no room")])])
    entry, = entries_of(known)
    assert entry["ms"] == {"bf16 dense": 500.12, "int8 dense": 400.0}
    assert (entry["gpu"], entry["on"], entry["model"]) == ("NVIDIA H200", "2026-01-02", WAN.name)


@pytest.mark.parametrize("own, precision, attention, wanted", [
    ("int8", "auto", "auto", "int8"), ("int8", None, "auto", "int8"), ("int8", "bf16", "auto", "bf16"),
    ("bf16", None, "auto", "bf16"), ("bf16", "auto", "dense", "int8")])
def test_auto_of_one_setting_leaves_the_other_as_it_is_said(own, precision, attention, wanted, monkeypatch, tmp_path):
    from dailies.pipeline.run.run import way_of
    monkeypatch.setattr("dailies.pipeline.run.run.precision_in", lambda card, weights, device: own)
    said = dict(precision=precision, attention=attention)
    assert way_of(WAN_14B, tmp_path, "cuda", None, **said, gpus=lambda: (H200,)).precision == wanted
    # of a cluster that grows a GPU when it is asked to
    assert "CPU" not in way_of(WAN_14B, tmp_path, "cuda", None, **said, gpus=lambda: ()).because


def test_auto_is_a_setting_and_plan_run_and_ledger_say_what_was_chosen_and_why(tmp_path, capsys):
    from dailies.jobs.cli import main
    from dailies.pipeline.run import ledger
    from dailies.pipeline.store import open_store
    manifest, out = tmp_path / "one.csv", str(tmp_path / "out")
    manifest.write_text("prompt,seed\na red circle moves left,1\n")
    command = [str(manifest), "--out", out, "--model", "demo-turbo", "--precision", "auto", "--attention", "auto",
               "--steps", "1", "--duration", "1"]
    assert main(["plan", *command]) == 0
    said = capsys.readouterr().out
    assert re.search(r"fp32 with dense attention: the model's own: on a CPU nothing was measured", said), said
    assert main(["render", *command]) == 0
    row, = ledger.read(open_store(out), ["precision", "attention", "chosen_because"]).to_pylist()
    assert row == {"precision": "fp32", "attention": "dense",
                   "chosen_because": "the model's own: on a CPU nothing was measured"}
    assert json.loads(Path(out, "run.json").read_text())["chosen_because"] == row["chosen_because"]
    assert main(["render", *command]) == 0                                  # and goes on as it began
