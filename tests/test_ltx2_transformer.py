"""LTX-2's transformer against the release's own output and against diffusers; its configuration, keys and sizes."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, error

from dailies.kernels import processor
from dailies.model import checkpoint, turbo
from dailies.model.card import Sparsity
from dailies.model.checkpoint import StoredTensor
from dailies.model.eight_bits import FP8, FP8_SCALES, Fp8Linear, fp8_of, scale_name
from dailies.model.files import CheckpointError
from dailies.model.fused import Int8Linear
from dailies.model.ltx2.adaln import levels_of
from dailies.model.ltx2.config import DIT_PREFIX, ConnectorsConfig, LtxConfig, ltx_version, transformer_config
from dailies.model.ltx2.connectors import TextConnectors
from dailies.model.ltx2.header import LtxHeader
from dailies.model.ltx2.keys import connectors_table, transformer_table
from dailies.model.ltx2.lora import read_lora
from dailies.model.ltx2.refine import SecondStage
from dailies.model.ltx2.rope import audio_positions, video_positions
from dailies.model.ltx2.transformer import LtxTransformer, Modality, TextKeys
from dailies.model.packed import PackedInt8Linear

GOLDENS = ["ltx2_transformer_a", "ltx2_transformer_b_gated"]          # in the layout of 2.0, and of 2.3
NEWER = LtxConfig(gated=True, modulated_text=True, caption_width=None)
NEWER_TEXT = ConnectorsConfig(layers=8, heads=32, width=4096, audio_heads=32, audio_width=2048, per_token=True,
                              gated=True)


def config_of(golden, fields):
    stored = checkpoint.stored_tensors(golden.folder / "weights.safetensors")
    shapes = {name.removeprefix(DIT_PREFIX): tensor.shape for name, tensor in stored.items()}
    return transformer_config(fields, shapes, "golden")


def transformer_of(golden, *, audio=True, precision="fp32"):
    config = replace(config_of(golden, golden.config["transformer"]), audio=audio)
    return checkpoint.build(lambda: LtxTransformer(config), golden.folder / "weights.safetensors",
                            transformer_table(audio=audio), name="golden", device="cpu", precision=precision)


def streams_of(golden):
    given = golden.inputs
    return (Modality(*(given[name] for name in ("video_latent", "video_timesteps", "sigma_video", "video_positions",
                                                "video_context"))),
            Modality(*(given[name] for name in ("audio_latent", "audio_timesteps", "sigma_audio", "audio_positions",
                                                "audio_context"))))


@pytest.mark.parametrize("name", GOLDENS)
def test_velocities_equal_the_release_plain_with_skipped_attention_and_with_streams_apart(name):
    golden = Golden(name)
    dit, (video, audio) = transformer_of(golden), streams_of(golden)
    skipped = golden.config["stg_blocks"]
    for run, how in (("plain", {}), ("stg", dict(skip_video=skipped, skip_audio=skipped)),
                     ("modality", dict(isolated=True))):
        picture, sound = dit(video, audio, **how)
        assert error(picture, golden.outputs[f"video.{run}"]) < golden.tolerance["value"]
        assert error(sound, golden.outputs[f"audio.{run}"]) < golden.tolerance["value"]


@pytest.mark.parametrize("name", GOLDENS)
def test_rotary_tables_and_positions_are_those_of_the_release_to_the_last_bit(name):
    golden = Golden(name)
    video, audio = streams_of(golden)
    fps = Fraction(golden.config["fps"])
    assert torch.equal(video_positions(tuple(golden.config["video_grid"]), fps), video.positions)
    assert torch.equal(audio_positions(golden.config["audio_frames"]), audio.positions)
    picture, sound = transformer_of(golden).ropes(video.positions, audio.positions)
    for place, table in (("video", picture.own), ("cross_video", picture.cross), ("audio", sound.own)):
        assert torch.equal(table.cos.transpose(1, 2), golden.outputs[f"rope_{place}_cos"])
        assert torch.equal(table.sin.transpose(1, 2), golden.outputs[f"rope_{place}_sin"])


RELEASES = {
    "2.0": (LtxConfig(), ConnectorsConfig(), 3510, 18_876_174_592, 59, 1_431_475_200),
    "2.3": (NEWER, NEWER_TEXT, 4186, 18_988_838_144, 262, 3_172_227_584),
    "2.5": (replace(NEWER, ff_bias=False, keyframes=True), NEWER_TEXT, 4091, 18_987_859_200, 262, 3_172_227_584),
}


def described(model, config, **how):
    with torch.device("meta"):
        return dict(model(config, **how).named_parameters())


@pytest.mark.parametrize("release, kind, blocks", [
    ("2.0", "fp8", range(2, 45)), ("2.3", "fp8", range(2, 45)), ("2.3", "distilled fp8", range(2, 46)),
    ("2.5", "bf16", ())], ids=str)
def test_a_published_file_of_full_size_has_what_we_load_and_says_what_it_is(release, kind, blocks):
    """Its keys, shapes and parameters; the layers in FP8 have their scales. Nothing is missing or left over, also where
    sound is not asked for; and what the tensors say of it is the release's configuration."""
    config, texts, keys, parameters, text_keys, text_parameters = RELEASES[release]
    both, text = described(LtxTransformer, config), described(TextConnectors, texts)
    silent = described(LtxTransformer, replace(config, audio=False))
    assert (len(both), sum(p.numel() for p in both.values())) == (keys, parameters)
    assert (len(text), sum(p.numel() for p in text.values())) == (text_keys, text_parameters)
    sound = parameters - sum(p.numel() for p in silent.values())
    # "14 B and 5 B" are this split; 0.12 B of sound's part modulate the picture for what it hears
    assert 5.8e9 < sound < 5.9e9 and 13.0e9 < parameters - sound < 13.2e9
    wanted = {DIT_PREFIX + name: tensor for name, tensor in both.items()} | {
        (name if name.startswith("text_") else DIT_PREFIX + name): tensor for name, tensor in text.items()}
    stored = {name: StoredTensor(file=Path("release"), name=name, dtype=torch.bfloat16, shape=tuple(tensor.shape))
              for name, tensor in {**wanted, "vae.encoder.conv_in.conv.weight": torch.ones(1)}.items()}
    narrow = tuple(f"{DIT_PREFIX}transformer_blocks.{block}." for block in blocks)
    for name in [name for name in wanted if name.startswith(narrow) and name.endswith(".weight")
                 and "norm" not in name]:
        stored[name] = replace(stored[name], dtype=FP8)
        for scale in (scale_name(name), scale_name(name, "input_scale")):
            stored[scale] = StoredTensor(file=Path("release"), name=scale, dtype=torch.float32, shape=())
    extra = {"2.3 fp8": 2924, "2.3 distilled fp8": 2992}.get(f"{release} {kind}", 2 * 28 * len(blocks))
    assert len(stored) == len(wanted) + 1 + extra
    header = LtxHeader(where="release", config={}, version=(), gemma=None, stored=stored)
    assert header.transformer() == config and header.connectors(3840) == texts
    for ours, table in ((both, transformer_table()), (silent, transformer_table(audio=False)),
                        (text, connectors_table()),
                        (described(TextConnectors, texts, audio=False), connectors_table(audio=False))):
        checkpoint.match(stored, ours, table, "release")


def test_without_sound_its_modules_are_neither_made_nor_read_and_the_picture_is_that_of_no_sound():
    golden = Golden(GOLDENS[1])
    whole, silent, (video, _) = transformer_of(golden), transformer_of(golden, audio=False), streams_of(golden)
    assert not any("audio" in name or "a2v" in name for name, _ in silent.named_parameters())
    picture, sound = silent(video)
    assert sound is None and torch.equal(picture, whole(video)[0])
    assert error(picture, golden.outputs["video.modality"]) < golden.tolerance["value"]         # as with streams apart
    with pytest.raises(ValueError, match="was made without sound"):
        silent(*streams_of(golden))


def test_tokens_of_one_time_are_told_it_once_and_to_the_same_effect():
    golden = Golden(GOLDENS[1])
    dit, (video, audio) = transformer_of(golden), streams_of(golden)
    levels = levels_of(video.timesteps)
    assert levels.times.shape == (1, 2) and levels.index.shape == video.timesteps.shape
    given = replace(video, timesteps=levels)
    assert torch.equal(dit(given, audio)[0], dit(video, audio)[0])
    even = replace(video, timesteps=video.sigma[:, None].expand_as(video.timesteps))
    assert levels_of(even.timesteps).index is None
    assert torch.equal(dit(even, audio)[0], dit(replace(even, timesteps=video.sigma[:, None]), audio)[0])


def test_the_three_rules_of_cross_modal_time_agree_where_all_tokens_have_one():
    golden = Golden(GOLDENS[1])
    dit, (video, audio) = transformer_of(golden), streams_of(golden)
    results = {}
    for rule in ("vendor", "own", "other"):
        dit.config = replace(dit.config, cross_time=rule)
        even = [replace(stream, timesteps=stream.sigma[:, None]) for stream in (video, audio)]
        results[rule] = dit(*even)[0], dit(video, audio)[0]
    assert torch.equal(results["own"][0], results["vendor"][0]) and torch.equal(results["other"][0], results["own"][0])
    assert error(results["own"][1], results["vendor"][1]) > 1e-3 < error(results["other"][1], results["vendor"][1])


@pytest.mark.parametrize("change, said", [
    (dict(attention_bias=False), "attention_bias in its header must be True"),
    (dict(num_layers=3), "num_layers in its header must be 2, as its tensors are"),
    (dict(apply_gated_attention=False), "apply_gated_attention in its header must be True"),
    (dict(audio_out_channels=64), "audio_out_channels in its header must be 10, as its tensors are"),
    (dict(frequencies_precision=64), "frequencies_precision in its header must be text"),
    (dict(rope_type="spiral"), "rope_type in its header must be split or interleaved"),
    (dict(positional_embedding_max_pos=[20, "x", 2048]), "embedding_max_pos in its header must be 3 numbers"),
    (dict(num_attention_heads=10**9), "num_attention_heads in its header must be a whole number from 1"),
    (dict(num_attention_heads=3), "32 and 16 channels must be of equally many heads; got 3 and 2"),
])
def test_a_header_that_says_another_model_than_its_tensors_is_refused(change, said):
    golden = Golden(GOLDENS[1])
    with pytest.raises(CheckpointError, match=said):
        config_of(golden, golden.config["transformer"] | change)


def test_a_lost_header_is_made_up_for_by_the_tensors():
    """Of 2.0 they do not tell the heads; those are the release's (see the files of full size)."""
    golden = Golden(GOLDENS[1])
    assert config_of(golden, {}) == config_of(golden, golden.config["transformer"])


@pytest.mark.parametrize("text, version", [
    ("2.3.0", (2, 3, 0)), ("2.3.rc1", (2, 3)), ("2.4-rc2", (2, 4)), ('"2.5.0"', (2, 5, 0)), (None, ()), ("new", ())])
def test_versions_compare_by_their_numbers(text, version):
    assert ltx_version(text) == version


def fp8_file(golden, folder):
    """The golden with the linear layers of its block 1 in FP8, as published, and what they are without."""
    tensors, _ = checkpoint.unpack((golden.folder / "weights.safetensors").read_bytes())
    exact = dict(tensors)
    for name in list(tensors):
        if "transformer_blocks.1." in name and name.endswith(".weight") and "norm" not in name:
            tensors[name], scale = fp8_of(tensors[name])
            tensors[scale_name(name)], tensors[scale_name(name, "input_scale")] = scale, torch.tensor(0.01)
            exact[name] = tensors[name].float() * scale
    checkpoint.save(folder / "fp8.safetensors", tensors)
    checkpoint.save(folder / "exact.safetensors", exact)
    return folder / "fp8.safetensors", folder / "exact.safetensors"


def test_a_file_in_fp8_is_widened_as_it_is_read_or_as_it_is_computed_with_to_the_same_result(tmp_path):
    golden = Golden(GOLDENS[1])
    streams, config = streams_of(golden), config_of(golden, golden.config["transformer"])
    narrow, exact = fp8_file(golden, tmp_path)
    card = dict(name="golden", device="cpu", attention="dense", sparsity=Sparsity(keep_ratio=0.5))
    read, widened, kept = (
        turbo.build(lambda: LtxTransformer(config), path, transformer_table(), precision=precision, **card)
        for path, precision in ((exact, "fp32"), (narrow, "fp32"), (narrow, "fp8")))
    assert all(map(torch.equal, read.state_dict().values(), widened.state_dict().values()))
    layers = [name for name, module in kept.named_modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 34 and all(name.startswith("transformer_blocks.1.") for name in layers)
    layer, same = kept.get_submodule(layers[0]), read.get_submodule(layers[0])
    x = torch.randn(5, layer.in_features)
    layer.takes = torch.float32
    assert torch.equal(layer(x), F.linear(x, same.weight, layer.bias.float()))
    assert [error(a, b) < 0.03 for a, b in zip(kept(*streams), read(*streams), strict=True)] == [True, True]


@pytest.mark.parametrize("change, said", [
    (lambda tensors, name: tensors.pop(scale_name(name)), "to_q.weight_scale is missing"),
    (lambda tensors, name: [tensors.pop(key) for key in list(tensors) if key.endswith("weight_scale")],
     "holds fp8 weights"),
    (lambda tensors, name: tensors.update({scale_name(name): torch.ones(3)}), "must be one number in fp32"),
    *((lambda tensors, name, kind=kind, value=value: tensors.update({scale_name(name, kind): torch.tensor(value)}),
       f"{kind} must be a number above 0, got") for kind in FP8_SCALES for value in (0.0, -1.0, math.nan, math.inf)),
    (lambda tensors, name: tensors[name].view(torch.uint8)[3].fill_(0xFF), "to_q.weight holds NaN or infinity"),
])
def test_fp8_of_another_kind_is_refused(change, said, tmp_path):
    golden = Golden(GOLDENS[1])
    path, _ = fp8_file(golden, tmp_path)
    tensors, _ = checkpoint.unpack(path.read_bytes())
    change(tensors, DIT_PREFIX + "transformer_blocks.1.attn1.to_q.weight")
    checkpoint.save(path, tensors)
    config = config_of(golden, golden.config["transformer"])
    with pytest.raises(CheckpointError, match=said):
        checkpoint.build(lambda: LtxTransformer(config), path, transformer_table(), name="golden", device="cpu",
                         precision="fp32")
    with pytest.raises(CheckpointError, match=said):
        turbo.build(lambda: LtxTransformer(config), path, transformer_table(), name="golden", device="cpu",
                    precision="fp8", attention="dense", sparsity=Sparsity(keep_ratio=0.5))


PLACES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_ff.net.0.proj")


def lora_file(folder, dit, places=PLACES, rank=2):
    torch.manual_seed(3)
    tensors = {}
    for place in places:
        layer = dit.get_submodule(place)
        tensors[f"diffusion_model.{place}.lora_A.weight"] = torch.randn(rank, layer.in_features)
        tensors[f"diffusion_model.{place}.lora_B.weight"] = torch.randn(layer.out_features, rank)
    checkpoint.save(folder / "lora.safetensors", tensors)
    return folder / "lora.safetensors"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_lora_is_added_in_the_weights_own_numbers_and_a_layer_in_fp8_gets_a_new_scale(precision, tmp_path):
    golden = Golden(GOLDENS[1])
    path, _ = fp8_file(golden, tmp_path)
    config = config_of(golden, golden.config["transformer"])
    dit = turbo.build(lambda: LtxTransformer(config), path, transformer_table(), name="golden", device="cpu",
                      precision=precision, attention="dense", sparsity=Sparsity(keep_ratio=0.5))
    lora = read_lora(lora_file(tmp_path, dit), 0.5, "golden")
    before = {place: weight_of(dit.get_submodule(place)).clone() for place in PLACES}
    with SecondStage(dit, lora, "cpu")():
        for place in PLACES:
            layer, (a, b) = dit.get_submodule(place), lora.pairs[place]
            added, dtype = weight_of(layer) - before[place], layer.weight.dtype
            assert error(added, 0.5 * b @ a) < {torch.float32: 1e-6, FP8: 0.1}.get(dtype, 0.02)
            if dtype == FP8:
                assert layer.weight.float().abs().max() == 448
    assert all(torch.equal(weight_of(dit.get_submodule(place)), before[place]) for place in PLACES)


def weight_of(layer):
    return layer.widened() if isinstance(layer, Fp8Linear) else layer.weight.float()


def test_a_lora_of_another_model_is_refused_before_anything_is_changed(tmp_path):
    golden = Golden(GOLDENS[1])
    dit = transformer_of(golden)
    before = dit.state_dict()["transformer_blocks.0.attn1.to_q.weight"].clone()
    other = transformer_of(Golden(GOLDENS[0]))
    other.transformer_blocks[0].attn1.to_q = torch.nn.Linear(48, 48)
    with pytest.raises(CheckpointError, match=r"1 of its 2 layers are not .*attn1.to_q \(48 x 48, 32 x 32"):
        SecondStage(dit, read_lora(lora_file(tmp_path, other), 1.0, "golden"), "cpu")
    assert torch.equal(before, dit.state_dict()["transformer_blocks.0.attn1.to_q.weight"])
    checkpoint.save(tmp_path / "not.safetensors", {"lora_unet_attn.lora_down.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="must hold nothing but diffusion_model.LAYER.lora_A.weight"):
        read_lora(tmp_path / "not.safetensors", 1.0, "golden")


def refitted(golden, precision, attention="dense"):
    config = config_of(golden, golden.config["transformer"])
    return turbo.build(lambda: LtxTransformer(config), golden.folder / "weights.safetensors", transformer_table(),
                       name="golden", device="cpu", precision=precision, attention=attention,
                       sparsity=Sparsity(keep_ratio=1.0, block_q=16, block_k=16))


@pytest.mark.cpu
@pytest.mark.parametrize("precision, attention, bound", [
    ("fp32", "dense", 1e-4), ("bf16", "dense", 0.05), ("int8", "dense", 0.1), ("fp32", "sparse", 1e-4),
    ("int8", "sage", 0.1)])
@pytest.mark.parametrize("name", GOLDENS)
def test_a_model_refitted_for_speed_is_near_the_release(name, precision, attention, bound):
    """With tokens of two times, which kernels do not take, and with tokens of one."""
    golden = Golden(name)
    plain, fast, (video, audio) = transformer_of(golden), refitted(golden, precision, attention), streams_of(golden)
    assert fast.blocks[0].ops is not plain.blocks[0].ops
    layers = [module for module in fast.modules() if isinstance(module, (Int8Linear, PackedInt8Linear))]
    assert bool(layers) == (precision == "int8" and processor.has_int8_products())
    even = [replace(stream, timesteps=stream.sigma[:, None]) for stream in (video, audio)]
    for streams in ((video, audio), even):
        for got, want in zip(fast(*streams), plain(*streams), strict=True):
            assert ((got - want).norm() / want.norm()).item() < bound


@pytest.mark.parametrize("name", GOLDENS)
def test_a_text_that_is_read_once_a_clip_changes_nothing(name):
    golden = Golden(name)
    dit, (video, audio) = transformer_of(golden), streams_of(golden)
    contexts = dit.read(video.context), dit.read(audio.context, audio=True)
    assert isinstance(contexts[0], TextKeys) is not dit.config.modulated_text
    kept = replace(video, context=contexts[0]), replace(audio, context=contexts[1])
    assert all(map(torch.equal, dit(*kept, ropes=dit.ropes(video.positions, audio.positions)), dit(video, audio)))


@pytest.mark.cpu
@pytest.mark.parametrize("name", GOLDENS)
def test_a_block_of_both_streams_is_one_graph_to_a_compiler(name, monkeypatch):
    monkeypatch.setattr(processor, "has_faster_fp32_products", lambda: False)       # nor has what is compiled
    golden = Golden(name)
    dit, streams = refitted(golden, "fp32"), streams_of(golden)
    want = dit(*streams)
    turbo.compile_blocks(dit, backend="eager")
    try:
        assert all(map(torch.equal, dit(*streams), want))
    finally:
        torch._dynamo.reset()
