"""The T5 encoder against transformers' own output, its tokens, and its loading."""

import json
import shutil
import socket

import pytest
from golden import E2E, E2E_CARD, Golden, error
from parts import text_encoder_of

from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.files import CheckpointError
from dailies.model.text import T5TextEncoder


@pytest.fixture(scope="module")
def encoder():
    return text_encoder_of(E2E_CARD, E2E, "cpu")


EMBEDDING = ["shared.weight", "encoder.embed_tokens.weight"]


def published(golden, folder, *, embedding=("shared.weight",)):
    """A folder as transformers saves it, from a golden's weights."""
    tensors, _ = checkpoint.unpack((golden.folder / "weights.safetensors").read_bytes())
    shared = tensors.pop("shared.weight")
    tensors |= {name: shared.clone() for name in embedding}
    checkpoint.save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(golden.config | {"model_type": "t5"}))
    return folder


def load(folder, width=32, precision="fp32"):
    return T5TextEncoder(folder, E2E / "t5/tokenizer", "cpu", name="golden", precision=precision, max_tokens=200,
                         width=width)


@pytest.mark.parametrize("embedding", [EMBEDDING[:1], EMBEDDING[1:], EMBEDDING], ids=["shared", "embed_tokens", "both"])
def test_rows_equal_the_release_under_either_name_of_the_embedding(tmp_path, embedding):
    golden = Golden("t5_encoder_a")
    encoder = load(published(golden, tmp_path, embedding=embedding))
    for i in range(3):
        rows = encoder.rows(golden.inputs[f"input_ids.{i}"][0].tolist())
        assert error(rows, golden.outputs[f"hidden.{i}"][0]) < golden.tolerance["value"]


@pytest.mark.cpu
def test_bf16_is_bf16_throughout_and_near_fp32(tmp_path):
    golden = Golden("t5_encoder_a")
    encoder = load(published(golden, tmp_path), precision="bf16")
    assert {p.dtype for p in encoder.model.parameters()} == {processor.dtype_of("bf16", "cpu")}
    rows, want = encoder.rows(golden.inputs["input_ids.1"][0].tolist()), golden.outputs["hidden.1"][0]
    assert rows.dtype == processor.dtype_of("bf16", "cpu")
    assert ((rows.float() - want).norm() / want.norm()).item() < 0.03


def test_tokens_and_rows_equal_the_release_from_the_published_folders(encoder):
    golden = Golden("linum_e2e_a")
    for text, kind in ((golden.config["prompt"], ""), (golden.config["n_prompt"], "_negative")):
        assert encoder.tokens(text) == golden.inputs[f"input_ids{kind}"][0].tolist()
        assert error(encoder(text), golden.outputs[f"embedding{kind}"]) < golden.tolerance["embedding"]


def test_an_empty_text_is_the_end_mark_alone(encoder):
    assert encoder.tokens("") == [1]
    assert encoder("").shape == (1, 32)


def test_a_long_text_is_cut_to_the_limit_and_keeps_its_end_mark(encoder):
    whole, cut = encoder.tokens("a red fox"), encoder.tokens("a red fox " * 100)
    assert len(cut) == 26 and cut[-1] == 1 and cut[:len(whole) - 1] == whole[:-1]


def test_text_is_taken_as_it_is(encoder):
    assert encoder.tokens("A RED FOX") != encoder.tokens("a red fox")


def test_loading_is_quiet_and_needs_no_network(capfd, monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text_encoder_of(E2E_CARD, E2E, "cpu")("a red fox " * 100)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage, said", [
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is not the config of a T5 encoder"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "model_type is 'bert'"),
    (lambda folder: (folder / "config.json").unlink(), "config.json is not the config of a T5 encoder"),
    (lambda folder: (folder / "model.safetensors").unlink(), "must hold one .safetensors file"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "dailies convert"),
])
def test_a_broken_encoder_folder_is_named(tmp_path, damage, said):
    folder = published(Golden("t5_encoder_a"), tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_an_encoder_of_another_width_is_refused_before_its_weights_are_read(tmp_path):
    with pytest.raises(CheckpointError, match="gives rows of 32 numbers; the model takes 48"):
        load(published(Golden("t5_encoder_a"), tmp_path), width=48)


def test_a_broken_tokenizer_is_named(tmp_path):
    shutil.copytree(E2E, tmp_path / "weights")
    for file in ("tokenizer.json", "spiece.model"):
        (tmp_path / "weights/t5/tokenizer" / file).write_text("no tokenizer")
    with pytest.raises(CheckpointError, match="does not hold a tokenizer"):
        text_encoder_of(E2E_CARD, tmp_path / "weights", "cpu")
