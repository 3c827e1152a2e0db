"""Manifests rendered by tiny turbo models from what is published, and by the demo model accelerated."""

import json

import pytest
import torch
from one_process import main
from parts import dit_of, vae_of
from turbo_tiny import TURBO_TINY, TURBO_TINY_I2V, publish
from wan_tiny import WAN_TINY, write_weights

from dailies.actors.decoder import Decoder
from dailies.kernels import processor
from dailies.model import checkpoint, refitted
from dailies.model.catalog import CATALOG, DEMO
from dailies.model.family import precision_in
from dailies.model.weights import fingerprint, locate, weights_files
from dailies.pipeline.run import ledger
from dailies.pipeline.store import open_store

INT8_ON_CPU = ("INT8 weights with scales per block are scaled per row: a CPU has no fast product of blocks"
               if processor.has_int8_products()
               else "INT8 weights are computed with in fp32: this CPU has no INT8 products")


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    for card in (TURBO_TINY, TURBO_TINY_I2V, WAN_TINY):
        monkeypatch.setitem(CATALOG, card.name, card)


def manifest(folder, *rows):
    path = folder / "night.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments] + ["--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def render(capsys, path, out, name, *options):
    return run(capsys, "render", path, "--out", out, "--model", name, "--device", "cpu", *options)


def rows_of(out):
    return {row["id"]: row for row in ledger.read(open_store(str(out))).to_pylist()}


def converted(tmp_path, capsys, card, quant=False):
    """The folder of weights that the advice of `dailies models` leads to."""
    source = publish(tmp_path / "published", card, quant)
    for src in (source / "turbo", source / "wan"):
        code, said, _ = run(capsys, "convert", src, "--model", card.name, "--to", tmp_path / "weights")
        assert code == 0 and said["files"]
    return tmp_path / "weights"


@pytest.mark.parametrize("quant", [False, True], ids=["plain", "quant"])
def test_a_published_turbo_model_renders_in_four_steps(quant, tmp_path, capsys):
    weights = converted(tmp_path, capsys, TURBO_TINY, quant)
    path = manifest(tmp_path, {"id": "a", "prompt": "a red fox", "frames": 9},
                    {"id": "b", "prompt": "a red fox", "frames": 9, "steps": 2},
                    {"id": "c", "prompt": "snow", "frames": 9, "negative_prompt": "ugly"})
    code, said, _ = render(capsys, path, tmp_path / "out", TURBO_TINY.name, "--weights", weights)
    assert code == 0 and said["rendered"] == 3, [failure["error"] for failure in said["failures"]]
    rows = rows_of(tmp_path / "out")
    for row in rows.values():
        assert (row["attention"], row["precision"], row["guidance"]) == ("sparse", "int8" if quant else "fp32", 0.0)
        assert row["fallbacks"][:1] == ([INT8_ON_CPU] if quant else row["fallbacks"][:1])
    assert rows["c"]["fallbacks"][-1] == TURBO_TINY.negative_unused
    assert "1 row: " + TURBO_TINY.negative_unused in said["notes"]
    assert len({row["sha256"] for row in rows.values()}) == 3
    code, again, _ = render(capsys, path, tmp_path / "again", TURBO_TINY.name, "--weights", weights)
    same = rows_of(tmp_path / "again")
    assert code == 0 and {row["sha256"] for row in same.values()} == {row["sha256"] for row in rows.values()}


def test_rows_that_a_turbo_model_cannot_make_are_complained_about(tmp_path, capsys):
    weights = converted(tmp_path, capsys, TURBO_TINY)
    path = manifest(tmp_path, {"id": "a", "prompt": "a", "steps": 5}, {"id": "b", "prompt": "b", "guidance": 5.0})
    code, said, _ = render(capsys, path, tmp_path / "out", TURBO_TINY.name, "--weights", weights)
    assert code == 2
    assert [(one["column"], one["allowed"]) for one in said["complaints"]["first"]] == [
        ("steps", "at most 4 for turbo-tiny"), ("guidance", "at most 0 for turbo-tiny")]
    code, said, _ = render(capsys, path, tmp_path / "out", TURBO_TINY.name, "--weights", weights, "--attention",
                           "dense")
    assert code == 2 and "--attention must be sparse or sage for turbo-tiny; got dense" in said["error"]


@pytest.mark.parametrize("quant", [False, True], ids=["plain", "quant"])
def test_two_experts_take_turns_over_an_image(quant, tmp_path, capsys):
    from PIL import Image
    Image.new("RGB", (48, 32), (200, 40, 40)).save(tmp_path / "first.png")
    weights = converted(tmp_path, capsys, TURBO_TINY_I2V, quant)
    row = {"prompt": "it moves", "frames": 9, "image": "first.png"}
    path = manifest(tmp_path, row | {"id": "2", "steps": 2}, row | {"id": "4", "steps": 4})
    code, said, _ = render(capsys, path, tmp_path / "out", TURBO_TINY_I2V.name, "--weights", weights, "--attention",
                           "sage")
    assert code == 0 and said["rendered"] == 2, [failure["error"] for failure in said["failures"]]
    assert {row["attention"] for row in rows_of(tmp_path / "out").values()} == {"sage"}


def test_the_vae_of_a_turbo_model_is_bf16_as_it_is_released(tmp_path, capsys):
    weights = converted(tmp_path, capsys, TURBO_TINY)
    for precision in ("fp32", "bf16", "int8"):
        assert vae_of(TURBO_TINY, weights, "cpu", precision).from_latent.weight.dtype == processor.dtype_of(precision,
                                                                                                            "cpu")
    write_weights(tmp_path / "wan")
    assert vae_of(WAN_TINY, tmp_path / "wan", "cpu", "bf16").from_latent.weight.dtype == torch.float32
    decoder = Decoder(WAN_TINY, tmp_path / "wan", WAN_TINY.runtime(decode_precision="bf16"))
    assert decoder.streams.vae.from_latent.weight.dtype == processor.dtype_of("bf16", "cpu")


def test_one_quant_file_of_a_folder_with_both_can_be_named(tmp_path, capsys):
    source = publish(tmp_path / "published", TURBO_TINY, quant=True) / "turbo"
    file = source / "TurboTiny-quant.pth"
    code, said, _ = run(capsys, "convert", file, "--model", "turbo-tiny", "--to", tmp_path / "w")
    assert code == 0 and [file["file"] for file in said["files"]] == ["TurboTiny-quant.safetensors"]
    stored = checkpoint.stored_tensors(tmp_path / "w/TurboTiny-quant.safetensors")
    published = torch.load(file, weights_only=True)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in published.items()}


def test_models_says_which_files_come_from_where(capsys):
    assert main(["models", "turbo-wan2.1-t2v-14b-720p"]) == 0
    out = capsys.readouterr().out
    for part in ("TurboDiffusion/TurboWan2.1-T2V-14B-720P", "TurboWan2.1-T2V-14B-720P.pth or -quant.pth",
                 "Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/",
                 "dailies convert SRC --model turbo-wan2.1-t2v-14b-720p --to WEIGHTS"):
        assert part in out, part


@pytest.mark.parametrize("options, precision, attention", [
    pytest.param(("--precision", "int8"), "int8", "dense", marks=pytest.mark.cpu),
    pytest.param(("--precision", "bf16"), "bf16", "dense", marks=pytest.mark.cpu),
    (("--attention", "sparse"), "fp32", "sparse"),
    (("--precision", "int8", "--attention", "sage"), "int8", "sage")])
def test_the_demo_model_renders_accelerated(options, precision, attention, tmp_path, capsys):
    path = manifest(tmp_path, {"id": "a", "prompt": "a red circle moves left", "frames": 9, "steps": 2})
    instead = refitted.fallbacks(DEMO, DEMO.folder, DEMO.runtime("cpu", precision))["sample"]
    code, said, err = render(capsys, path, tmp_path / "out", "demo", *options, *([] if instead else ["--strict"]))
    assert code == 0 and said["rendered"] == 1, err
    row = rows_of(tmp_path / "out")["a"]
    assert (row["precision"], row["attention"], row["fallbacks"]) == (precision, attention, list(instead))
    assert set(instead) <= set(said["notes"])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["fallbacks"] == list(instead)
    assert processor.described() in row["determinism"] and "1 thread, torch" in row["determinism"]
    assert any("demo was not tuned for sparse attention" in note for note in said["notes"]) == (attention == "sparse")
    code, said, _ = render(capsys, path, tmp_path / "out", "demo")      # a run keeps what it was begun with
    assert code == 0 and said["rendered"] == 0


def test_strict_refuses_a_fallback_before_anything_starts_or_before_the_next_stage(tmp_path, capsys, monkeypatch):
    path = manifest(tmp_path, {"id": "a", "prompt": "a red circle moves left", "frames": 9, "steps": 2},
                    {"id": "b", "prompt": "a red circle " * 40, "frames": 9, "steps": 2})
    monkeypatch.setattr(processor, "has_int8_products", lambda: False)
    code, said, _ = render(capsys, path, tmp_path / "out", "demo", "--precision", "int8", "--strict")
    assert code == 2
    assert "--strict, and not every row can be rendered as asked: INT8 weights are computed with in" in said["error"]
    assert not (tmp_path / "out").exists()
    code, said, _ = render(capsys, path, tmp_path / "out", "demo", "--strict")
    assert code == 3 and said["done"] == 1
    row = rows_of(tmp_path / "out")["b"]
    assert row["error_type"] == "NotAsAsked" and "--strict, and prompt cut to 40 tokens" in row["error"]


def test_int8_weights_of_the_demo_model_are_small_load_strictly_and_have_their_own_fingerprint(tmp_path, capsys):
    int8 = ("--model", "demo", "--precision", "int8")
    code, said, _ = run(capsys, "convert", DEMO.folder, "--to", tmp_path / "w", *int8)
    assert code == 0
    before, after = (DEMO.folder / DEMO.dit_file).stat().st_size, (tmp_path / "w" / DEMO.dit_file).stat().st_size
    assert after < 0.6 * before
    folder = locate(tmp_path / "w", DEMO)
    assert fingerprint(weights_files(DEMO, folder)) != fingerprint(weights_files(DEMO, DEMO.folder))
    assert precision_in(DEMO, folder, "cpu") == "int8" and precision_in(DEMO, DEMO.folder, "cpu") == "fp32"
    torch.manual_seed(0)
    latent, time, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), [torch.randn(7, 128)]
    dits = [dit_of(DEMO, where, "cpu", "int8") for where in (DEMO.folder, folder)]
    ours, stored = (dit(latent, time, dit.embed_text(text)) for dit in dits)
    assert torch.equal(ours, stored)                    # quantised when loaded or when converted: the same layers
    path = manifest(tmp_path, {"id": "a", "prompt": "a red circle moves left", "frames": 9, "steps": 2})
    code, said, err = render(capsys, path, tmp_path / "out", "demo", "--weights", folder)
    assert code == 0 and rows_of(tmp_path / "out")["a"]["precision"] == "int8", err
    code, said, _ = render(capsys, path, tmp_path / "out2", "demo", "--weights", folder, "--precision", "bf16")
    assert code == 2 and "Say --precision int8" in said["error"]
    code, said, _ = run(capsys, "convert", folder, "--model", "demo", "--to", tmp_path / "w2", "--precision", "int8")
    assert code == 2 and "are they INT8 already?" in said["error"]
