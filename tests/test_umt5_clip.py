"""Wan's encoders of text and picture against the release, and the texts as they are cleaned first."""

import json
import sys

import pytest
import torch
from golden import E2E, Golden, error
from hypothesis import given, strategies

from dailies.kernels import processor
from dailies.model import checkpoint, keys
from dailies.model.files import CheckpointError
from dailies.model.text import UMT5TextEncoder, cleaned, new_encoder
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.image_encoder import ClipVision, ClipVisionConfig, from_open_clip


def umt5_fields(said):
    return {"model_type": "umt5", "vocab_size": said["vocab_size"], "d_model": said["dim"], "d_ff": said["dim_ffn"],
            "d_kv": said["dim_attn"] // said["num_heads"], "num_heads": said["num_heads"],
            "num_layers": said["num_layers"],
            "relative_attention_num_buckets": said["num_buckets"], "relative_attention_max_distance": said["max_dist"]}


def umt5(golden, layout, folder, precision="fp32"):
    """The original file beside a config that the card brings, or a folder as transformers saves it."""
    if layout == "original":
        encoder, config = golden.folder / "weights.safetensors", umt5_fields(golden.config)
    else:
        encoder, config = folder, None
        (folder / "config.json").write_text(json.dumps(umt5_fields(golden.config)))
        (folder / "model.safetensors").write_bytes((golden.folder / "weights_transformers.safetensors").read_bytes())
    return UMT5TextEncoder(encoder, E2E / "t5/tokenizer", "cpu", name="golden", precision=precision, max_tokens=48,
                           width=40, config=config)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_rows_equal_the_release_from_either_layout(tmp_path, layout):
    golden = Golden("umt5_a")
    encoder = umt5(golden, layout, tmp_path)
    for i in range(2):
        ids = golden.inputs["ids"][i][golden.inputs["mask"][i].bool()].tolist()      # unpadded, which changes nothing
        assert error(encoder.rows(ids), golden.outputs[f"context.{i}"]) < golden.tolerance["value"]


def test_bf16_is_bf16_throughout_and_near_fp32(tmp_path):
    golden = Golden("umt5_a")
    encoder = umt5(golden, "original", tmp_path, "bf16")
    assert {p.dtype for p in encoder.model.parameters()} == {processor.dtype_of("bf16", "cpu")}
    rows, want = encoder.rows(golden.inputs["ids"][0].tolist()), golden.outputs["context.0"]
    assert rows.dtype == processor.dtype_of("bf16", "cpu")
    assert ((rows.float() - want).norm() / want.norm()).item() < 0.05


@pytest.mark.parametrize("text, said", [
    ("  a   red\tfox\n\nruns ", "a red fox runs"),
    ("fish &amp;amp; chips", "fish & chips"),
    ("&lt;b&gt;", "<b>"),
    ("caf\u00c3\u00a9", "café"),                        # UTF-8 that was read as Latin-1
    ("“quoted”", '"quoted"'),
    ("色调艳丽\u3000静态", "色调艳丽 静态"),
    ("", ""),
])
def test_texts_are_cleaned_as_the_release_cleans_them(tmp_path, text, said):
    pytest.importorskip("ftfy", reason="needs ftfy: pip install ftfy")
    assert cleaned(text) == said


@given(strategies.text(strategies.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&")))
def test_printable_ascii_without_entities_needs_no_mending(text):
    ftfy = pytest.importorskip("ftfy", reason="needs ftfy, to compare with: pip install ftfy")
    assert ftfy.fix_text(text) == text


def test_only_a_text_beyond_it_needs_ftfy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)      # as if it were not installed
    assert cleaned("a  red fox ") == "a red fox"
    for text in ("caf\u00e9", "&lt;", "a\tb"):
        with pytest.raises(ImportError, match="not installed: pip install ftfy"):
            cleaned(text)


def test_what_is_encoded_is_the_cleaned_text(tmp_path):
    encoder = umt5(Golden("umt5_a"), "original", tmp_path)
    assert encoder.tokens(" a red\n fox ") == encoder.tokens("a red fox") != encoder.tokens("a red fax")
    assert encoder.tokens("") == [1]
    assert len(encoder.tokens("a red fox " * 100)) == 48 and encoder.tokens("a red fox " * 100)[-1] == 1


def test_the_full_encoder_has_the_published_tensors_in_both_layouts():
    from dailies.model.wan.card import UMT5_XXL
    with torch.device("meta"):
        model = new_encoder("umT5", UMT5_XXL)
    names = [name for name, _ in model.named_parameters()]
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336 and len(names) == 242
    assert keys.UMT5.unknown(names) == []
    parts = ["norm1.weight", "norm2.weight", *(f"attn.{part}.weight" for part in "qkvo"),
             "pos_embedding.embedding.weight", "ffn.gate.0.weight", "ffn.fc1.weight", "ffn.fc2.weight"]
    published = {"token_embedding.weight", "norm.weight", *(f"blocks.{i}.{part}" for i in range(24) for part in parts)}
    assert {keys.UMT5_WAN.ours(name) for name in published} == set(names) and len(published) == 242


def test_a_t5_encoder_is_not_taken_for_a_umt5(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(umt5_fields(Golden("umt5_a").config) | {"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="not the config of a umT5 encoder .*model_type is 't5'"):
        UMT5TextEncoder(tmp_path, E2E / "t5/tokenizer", "cpu", name="golden", precision="fp32", max_tokens=48, width=40)


def clip_config(said):
    return ClipVisionConfig(picture=said["image_size"], patch=said["patch_size"], width=said["dim"],
                            heads=said["num_heads"], blocks=said["num_layers"] - 1, mlp=said["dim"] * said["mlp_ratio"])


def clip(golden, folder, precision="fp32"):
    """From the original file as `dailies convert` leaves it."""
    config = clip_config(golden.config)
    stored, _ = checkpoint.unpack((golden.folder / "weights.safetensors").read_bytes())
    tensors = {wan_keys.CLIP_VISION.released(name): tensor
               for name, tensor in from_open_clip(stored, config.blocks).items()}
    checkpoint.save(folder / "clip.safetensors", tensors)
    return checkpoint.build(lambda: ClipVision(config), folder / "clip.safetensors", wan_keys.CLIP_VISION,
                            name="golden",
                            device="cpu", precision=precision)


def test_rows_of_a_picture_equal_the_release(tmp_path):
    golden = Golden("wan_clip_vision_a")
    tower, picture = clip(golden, tmp_path), golden.inputs["image"].transpose(0, 1)
    assert error(tower.prepare(picture), golden.outputs["pixel_values"]) < golden.tolerance["value"]
    assert error(tower(picture), golden.outputs["features"]) < golden.tolerance["value"]


def test_bf16_rows_of_a_picture_stay_near(tmp_path):
    golden = Golden("wan_clip_vision_a")
    got, want = clip(golden, tmp_path, "bf16")(golden.inputs["image"].transpose(0, 1)), golden.outputs["features"]
    assert got.dtype == torch.float32 and ((got - want).norm() / want.norm()).item() < 0.03


def test_the_full_tower_has_the_tensors_of_transformers():
    with torch.device("meta"):
        tower = ClipVision(ClipVisionConfig())
    names = {wan_keys.CLIP_VISION.released(name) for name in tower.state_dict()}
    block = [f"{layer}.{part}" for layer in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(
        f"self_attn.{of}_proj" for of in ("q", "k", "v", "out"))) for part in ("weight", "bias")]
    rest = {f"vision_model.{name}" for name in ("embeddings.class_embedding", "embeddings.patch_embedding.weight",
                                                "embeddings.position_embedding.weight", "pre_layrnorm.weight",
                                                "pre_layrnorm.bias")}
    published = rest | {f"vision_model.encoder.layers.{i}.{part}" for i in range(32) for part in block}
    published |= {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}
    assert names == {name for name in published if not wan_keys.CLIP_VISION.drops(name)} and len(names) == 5 + 31 * 16
    assert tower.positions.shape == (257, 1280) and tower.patch_embed.weight.shape == (1280, 3, 14, 14)
