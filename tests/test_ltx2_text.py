"""LTX-2's text: connectors and Gemma 3 against the release's own output, and their loading."""

import json
import shutil

import pytest
import torch
from gemma_tiny import gemma_folder
from golden import Golden, error

from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.eight_bits import NarrowLinear
from dailies.model.files import CheckpointError
from dailies.model.ltx2.config import PER_TOKEN, connectors_config
from dailies.model.ltx2.connectors import TextConnectors
from dailies.model.ltx2.gemma import gemma_config
from dailies.model.ltx2.keys import connectors_table
from dailies.model.ltx2.text import LtxTextEncoder

LENGTH = 128                                            # of the goldens; 1,024 in a release
E2E = ["ltx2_e2e_a", "ltx2_e2e_b"]


def connectors_of(path, fields, hidden):
    shapes = {name: tensor.shape for name, tensor in checkpoint.stored_tensors(path).items()}
    config = connectors_config(fields, shapes, hidden, "golden")
    return checkpoint.build(lambda: TextConnectors(config), path, connectors_table(), name="golden", device="cpu",
                            precision="fp32")


@pytest.mark.parametrize("name", ["ltx2_connectors_a_v1", "ltx2_connectors_b_v2"])
def test_contexts_equal_the_release_without_what_is_padding(name):
    golden = Golden(name)
    connectors = connectors_of(golden.folder / "weights.safetensors", golden.config["transformer"],
                               golden.config["gemma_hidden"])
    stack = torch.stack([golden.inputs[f"hidden_states.{i}"] for i in range(golden.config["gemma_layers"])], dim=-1)
    for sample, mask in enumerate(golden.inputs["attention_mask"].bool()):
        features = connectors.features(stack[sample, mask])
        contexts = connectors(stack[sample, mask], len(mask))
        for stream, feature, context in zip(("video", "audio"), features, contexts, strict=True):
            assert error(feature, golden.outputs[f"{stream}_features"][sample, mask]) < golden.tolerance["value"]
            assert error(context, golden.outputs[f"{stream}_encoding"][sample]) < golden.tolerance["value"]


@pytest.mark.parametrize("name, change, why", [
    *(("ltx2_connectors_b_v2", change, f"{next(iter(change))} in its header must be {wanted}") for change, wanted in (
        (dict(connector_num_layers=9), "2, as its tensors are"),
        (dict(caption_channels=3840), ".*, the width of the text encoder"),
        (dict(connector_attention_head_dim=3), ".*, as its tensors are"),
        (dict(audio_connector_attention_head_dim=3), ".*, as its tensors are"),
        (dict(connector_apply_gated_attention=False), "True, as its tensors are"),
        (dict(connector_norm_output=False), "true, as in every release"),
        (dict(text_encoder_norm_type="per_layer"), "per_token_rms, as its tensors are"))),
    ("ltx2_connectors_a_v1", dict(text_encoder_norm_type="per_token_rms"), "must be another than per_token_rms"),
    ("ltx2_connectors_a_v1", PER_TOKEN, "must be left out: its tensors have one text projection"),
    *((name, dict(caption_proj_before_connector=True, caption_proj_input_norm=True), "must have all, or none")
      for name in ("ltx2_connectors_a_v1", "ltx2_connectors_b_v2"))])
def test_a_header_of_other_connectors_than_its_tensors_is_refused(name, change, why):
    golden = Golden(name)
    with pytest.raises(CheckpointError, match=why):
        connectors_of(golden.folder / "weights.safetensors", golden.config["transformer"] | change,
                      golden.config["gemma_hidden"])


def encoder_of(golden, folder, *, precision="fp32", audio=True, **changes):
    return LtxTextEncoder(gemma_folder(golden, folder, **changes), golden.folder / "weights.safetensors", "cpu",
                          name="golden", precision=precision, audio=audio, length=LENGTH)


def tokens_of(golden, kind):
    return golden.inputs[f"input_ids.{kind}"][0][golden.inputs[f"attention_mask.{kind}"][0].bool()].tolist()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
@pytest.mark.parametrize("name", E2E)
def test_hidden_states_and_contexts_equal_the_release_under_every_style_of_names(name, prefix, tmp_path):
    golden = Golden(name)
    encoder = encoder_of(golden, tmp_path, prefix=prefix)
    for kind in ("positive", "negative"):
        ids, mask = tokens_of(golden, kind), golden.inputs[f"attention_mask.{kind}"][0].bool()
        assert error(encoder.gemma(ids, LENGTH), golden.inputs[f"hidden_states.{kind}"][0][mask]) < 1e-5
        for stream, rows in encoder.contexts(ids).items():
            assert error(rows, golden.outputs[f"{stream}_context.{kind}"][0]) < 1e-4


def test_a_text_has_its_start_mark_and_is_cut_to_what_fits(tmp_path):
    encoder = encoder_of(Golden("ltx2_e2e_b"), tmp_path)
    whole = encoder.tokenizer.ids("  a red fox ")
    assert whole[0] == 2 and whole == encoder.tokenizer.ids("a red fox") and encoder.tokenizer.ids("") == [2]
    assert encoder.cut("a red fox") == 0 and encoder.cut("a red fox " * 100) > 0
    assert encoder.tokenizer.ids("a red fox " * 100, 5) == encoder.tokenizer.ids("a red fox " * 100)[:5]
    rows = encoder.encode("a red fox " * 100)
    assert [(stream, *each.shape) for stream, each in rows.items()] == [("video", LENGTH, 20), ("audio", LENGTH, 12)]
    assert torch.equal(encoder.encode("a red fox")["video"], encoder.encode("a red fox")["video"])


def test_without_sound_nothing_is_made_for_it_and_the_picture_hears_the_same(tmp_path):
    golden = Golden("ltx2_e2e_b")
    whole, silent = (encoder_of(golden, tmp_path, audio=audio) for audio in (True, False))
    assert not any("audio" in name for name, _ in silent.connectors.named_parameters())
    assert list(silent.encode("a red fox")) == ["video"]
    assert torch.equal(silent.encode("a red fox")["video"], whole.encode("a red fox")["video"])


@pytest.mark.cpu
def test_gemma_in_eight_bits_is_near_and_half_as_large(tmp_path):
    golden = Golden("ltx2_e2e_b")
    exact, narrow = (encoder_of(golden, tmp_path, precision=precision) for precision in ("fp32", "int8"))
    layers = [module for module in narrow.gemma.modules() if isinstance(module, NarrowLinear)]
    assert len(layers) == 7 * 2 and {layer.takes for layer in layers} == {processor.dtype_of("int8", "cpu")}
    for stream, rows in narrow.encode("a red fox").items():
        want = exact.encode("a red fox")[stream]
        assert ((rows.float() - want).norm() / want.norm()).item() < 0.05


@pytest.mark.parametrize("change, said", [
    (dict(hidden_size=24), "must be 24, the width of the text encoder that is there; got '16'"),
    (dict(model_type="gemma4_text", num_hidden_layers=0), "num_hidden_layers must be a whole number"),
    (dict(rope_parameters=dict(sliding_attention=dict(rope_type="yarn", rope_theta=1e4), full_attention={})), "'yarn'"),
    (dict(vocab_size=20), "tokenizer has a piece 39, and its text encoder 20 rows"),
])
def test_another_gemma_is_refused_by_name(change, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        encoder_of(Golden("ltx2_e2e_b"), tmp_path, **change)


def test_a_missing_folder_and_the_wrong_size_are_named(tmp_path):
    golden = Golden("ltx2_e2e_b")
    release = golden.folder / "weights.safetensors"
    with pytest.raises(CheckpointError, match="must be a folder with Gemma 3 12B"):
        LtxTextEncoder(tmp_path / "none", release, "cpu", name="golden", precision="fp32")
    folder = gemma_folder(golden, tmp_path, hidden_size=20)
    with pytest.raises(CheckpointError, match="takes 48 numbers of a token, which are not the hidden states of a text "
                                              "encoder of width 20"):
        LtxTextEncoder(folder, release, "cpu", name="golden", precision="fp32")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model_type="t5")))
    with pytest.raises(CheckpointError, match="model_type is 't5', and gemma3 is needed"):
        LtxTextEncoder(folder, release, "cpu", name="golden", precision="fp32")


def test_the_published_config_of_12b_says_what_it_leaves_out():
    """As google/gemma-3-12b-it has it."""
    said = dict(model_type="gemma3", text_config=dict(
        hidden_size=3840, intermediate_size=15360, model_type="gemma3_text", num_attention_heads=16,
        num_hidden_layers=48, num_key_value_heads=8, rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024))
    config = gemma_config(said, "gemma")
    assert (config.head_dim, config.vocabulary, config.query_scale) == (256, 262_208, 1 / 16)
    assert config.thetas == (1e4, 1e6) and config.stretch == (1.0, 8.0)
    assert [place for place, everywhere in enumerate(config.everywhere) if everywhere] == list(range(5, 48, 6))
