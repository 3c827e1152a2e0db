"""LTX-2 on a GPU that is smaller than it is: which layers stay there; those that come in turn change no bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import Golden
from ltx2_tiny import LTX_TINY, LTX_TINY_TWO_STAGE, write_weights
from one_process import main
from test_ltx2_transformer import GOLDENS, config_of, streams_of
from test_render_ltx2 import command, embedded, manifest

from dailies.actors.denoiser import Denoiser
from dailies.actors.text_encoder import TextEncoder
from dailies.model import turbo
from dailies.model.card import Sparsity
from dailies.model.catalog import CATALOG
from dailies.model.files import CheckpointError
from dailies.model.ltx2.card import DEMO_AV
from dailies.model.ltx2.codec_config import VIDEO_VAE_2_3
from dailies.model.ltx2.keys import transformer_table
from dailies.model.ltx2.load import LtxFamily
from dailies.model.ltx2.room import BLOCKS, Placed, placed_on
from dailies.model.ltx2.transformer import LtxTransformer
from dailies.model.ltx2.vae_tiles import release_tile, tile_within
from dailies.model.ltx2.video_vae import VideoVAE
from dailies.model.shapes import VideoShape
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.plan import Plan
from dailies.pipeline.run.run import prepare
from dailies.pipeline.scheduler.placement import Node, scale_up
from dailies.pipeline.store import open_store
from dailies.pipeline.text_to_video import text_to_video

torch.set_num_threads(1)


@pytest.mark.cpu
@pytest.mark.parametrize("name, precision", [(GOLDENS[0], "fp32"), *((GOLDENS[1], precision) for precision in (
    "fp32", "bf16", "int8", "fp8"))])
def test_a_transformer_whose_blocks_come_in_turn_makes_the_same_bits_in_every_precision(name, precision):
    golden = Golden(name)
    config, (video, audio) = config_of(golden, golden.config["transformer"]), streams_of(golden)

    def velocities(resident):
        dit = turbo.build(lambda: LtxTransformer(config), golden.folder / "weights.safetensors", transformer_table(),
                          name="golden", device="cpu", precision=precision, attention="dense",
                          sparsity=Sparsity(keep_ratio=1.0, block_q=16, block_k=16), resident=resident)
        assert (dit.in_turn is None) is (resident is None)
        read = (replace(video, context=dit.read(video.context)),
                replace(audio, context=dit.read(audio.context, audio=True)))
        with torch.inference_mode():
            return dit(*read, skip_video=golden.config["stg_blocks"])
    want = velocities(None)
    assert all(map(torch.equal, velocities(0), want))


def test_clips_of_a_small_gpus_plan_are_those_of_a_large_one(tmp_path, monkeypatch):
    """Text, image, both streams, and a LoRA that is in the weights of one stage alone."""
    card = LTX_TINY_TWO_STAGE
    write_weights(folder := tmp_path / "weights", card)
    rows = [{"prompt": "a red fox", "frames": 9, "image": "a.png"}, {"prompt": "snow", "frames": 9}]
    clips = embedded(card, tmp_path, rows, folder)
    want = Denoiser(card, folder)(clips)
    monkeypatch.setattr(LtxFamily, "placed", lambda *_: Placed(blocks=1, gemma=0))
    encoder, denoiser = TextEncoder(card, folder), Denoiser(card, folder)
    assert denoiser.sampler.dit.in_turn is not None
    read, = encoder([clips[1].request])
    assert all(torch.equal(read.prompt[stream], rows) for stream, rows in clips[1].prompt.items())
    for _ in range(2):                                  # the second time the LoRA has been in them
        for got, one in zip(denoiser(clips), want, strict=True):
            assert all(torch.equal(got.streams[stream], x) for stream, x in one.streams.items())


def stays(placed, part):
    layers = getattr(placed, part)
    return "all" if layers is None else str(layers)


def test_what_stays_on_a_gpu_is_reckoned_from_its_memory_and_said_in_docs_as_it_is_reckoned():
    said = (Path(__file__).parents[1] / "docs/ltx2.md").read_text()
    with torch.device("meta"):
        vae = VideoVAE(VIDEO_VAE_2_3).bfloat16()
    for gpu_gb in (24, 48, 80, 141):
        cells = [stays(placed_on(CATALOG[name], precision, gpu_gb), part)
                 for name, part, precisions in (("ltx-2.3", "blocks", ("bf16", "fp8", "int8")),
                                                ("ltx-2.3-two-stage", "blocks", ("bf16", "fp8")),
                                                ("ltx-2.3", "gemma", ("bf16", "int8")))
                 for precision in precisions]
        assert f"| {gpu_gb} GB | {' | '.join(cells)} |" in said
        for height, width in ((16, 24), (32, 48)):      # 768x512, 1536x1024; of a quarter of the memory
            assert tile_within(int(0.25e9 * gpu_gb), vae, height, width, 16) == release_tile(height, width, 16)
    distilled = CATALOG["ltx-2.3-distilled"]
    for precision, blocks in (("bf16", 18), ("fp8", 32), ("int8", 37)):
        assert placed_on(distilled, precision, 24).blocks == blocks
    assert placed_on(distilled, "bf16", 80) == Placed()
    assert placed_on(distilled.without_sound(), "bf16", 48).blocks is None
    note, other, advice = placed_on(distilled, "bf16", 32).notes
    assert note.startswith("26 of the 48 layers of the transformer stay on the GPU, which has 32 GB; ")
    assert "of the text encoder stay" in other and advice.startswith("--precision int8 or fp8 has room for all")


@pytest.mark.parametrize(("gpu_gb", "host_gb", "said"), [
    (8, 1000, "its text encoder takes about 11 GB with all layers but two in host memory, and the GPU has 8"),
    (24, 16, "keeps 23 GB of weights in host memory, since the GPU has 24 GB, and this machine has 16")])
def test_a_machine_that_is_too_small_is_told_of_before_anything_is_loaded(gpu_gb, host_gb, said):
    with pytest.raises(CheckpointError, match=said):
        placed_on(CATALOG["ltx-2.3-distilled"], "bf16", gpu_gb, host_gb)


@pytest.mark.parametrize("precision", DEMO_AV.precisions)
def test_the_small_model_that_comes_along_stays_on_any_gpu_whole(precision):
    """It is of no release's size, which the plan of memory goes by."""
    assert LtxFamily().placed(DEMO_AV, DEMO_AV.runtime("cuda", precision)) == Placed()
    assert DEMO_AV.encoder_share + 0.75 <= 1                # sampler and encoder beside each other


def test_the_text_encoder_has_the_gpu_before_the_sampler_comes(tmp_path):
    """Each may fill three quarters of it; a decoder is beside either."""
    card = CATALOG["ltx-2.3"]
    stages = text_to_video(card, None, open_store(str(tmp_path)), card.runtime("cuda"))
    gpu, left = [Node(id="gpu", cpus=16, gpus=1)], {"encode": 9, "sample": 9, "publish": 9}
    first = scale_up(stages, gpu, [], limits=left, seconds={})
    assert sorted(placement.stage for placement in first) == ["encode", "publish"]
    later = [placement for placement in first if placement.stage != "encode"]
    assert [placement.stage for placement in scale_up(stages, gpu, later, limits=left | {"encode": 0}, seconds={})] == [
        "sample"]


def test_plan_says_what_stays_which_is_no_fallback_and_refuses_what_takes_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CATALOG, LTX_TINY.name, LTX_TINY)
    write_weights(tmp_path / "weights")
    placed = placed_on(CATALOG["ltx-2.3"], "bf16", 24)
    monkeypatch.setattr(LtxFamily, "placed", lambda self, card, on: Placed() if on.device == "meta" else placed)
    path = manifest(tmp_path, [{"prompt": "a red fox", "frames": 9}])
    plan = ["plan", *command(path, tmp_path / "out", LTX_TINY.name, tmp_path / "weights", "--strict")[1:]]
    assert main(plan) == 0
    said = capsys.readouterr().out
    assert "18 of the 48 layers of the transformer stay on the GPU, which has 24 GB" in said.replace("\n", " ")
    assert "15 of the 48 layers of the text encoder stay" in said.replace("\n", " ")
    assert main([*plan, "--compile"]) == 2
    assert "--compile takes a GPU with room for all layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_stays_goes_by_the_largest_clip_of_the_manifest_and_by_whether_any_wants_sound(tmp_path, monkeypatch):
    card = CATALOG["ltx-2.3-distilled"]
    long = VideoShape(frames=481, height=1088, width=1920)
    assert placed_on(card, "bf16", 80) == placed_on(card, "bf16", 80, largest=card.shape_for()[0]) == Placed()
    assert placed_on(card, "bf16", 80, largest=long).blocks < BLOCKS
    with pytest.raises(CheckpointError, match="for a clip of 1920x1088x481, and the GPU has 24.*or shorter clips"):
        placed_on(card, "bf16", 24, largest=long)

    seen = []

    class Family(LtxFamily):
        def placed(self, card, on):
            seen.append((on.largest, card.sound))
            return Placed()

    rows = [{"prompt": "a", "resolution": "768x512", "frames": 9, "audio": False},
            {"prompt": "b", "resolution": "512x512", "frames": 121, "audio": False}]
    path = manifest(tmp_path, rows)
    plan = Plan.make(Manifest.read(str(path)), card, weights_fingerprint="", precision="bf16")
    assert plan.largest == VideoShape(frames=121, height=512, width=512)
    monkeypatch.setattr("dailies.pipeline.run.run.family_of", lambda card: Family())
    prepare(Manifest.read(str(path)), open_store(str(tmp_path / "out")), card, weights=None)
    assert seen == [(card.smallest, True), (plan.largest, False)]
