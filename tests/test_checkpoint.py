"""Weights that are whole load; any that are not are refused with a message that names the place and the next step."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from golden import E2E, E2E_CARD, GOLDENS
from parts import dit_of, text_encoder_of, vae_of

from dailies.model import checkpoint, keys, weights
from dailies.model.catalog import DEMO, LINUM_V2_720P
from dailies.model.checkpoint import CheckpointError
from dailies.model.linum import keys as linum_keys
from dailies.model.linum.transformer import LinumDiT
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.vae import WanVAE
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.run.run import prepare
from dailies.pipeline.store import open_store

DIT = "dit/360p.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the published layout, to be damaged."""
    return shutil.copytree(E2E, tmp_path / "weights")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def edit(path, change):
    """Rewrite a file with its tensors changed."""
    tensors, metadata = checkpoint.unpack(path.read_bytes())
    change(tensors)
    checkpoint.save(path, tensors, metadata)


def header(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + size]), data[8 + size:]


def write(path, said, data=b""):
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(act):
    with pytest.raises(CheckpointError) as caught:
        act()
    return str(caught.value)


def test_every_tensor_arrives_where_its_name_says():
    stored, _ = checkpoint.unpack((E2E / DIT).read_bytes())
    dit = dit_of(E2E_CARD, E2E, "cpu")
    assert torch.equal(dit.blocks[1].norm_ffn.weight, stored["model.blocks.1.norm2.weight"])
    assert torch.equal(dit.latent_scale, stored["video_data_scale"])
    assert len(dit.state_dict()) == len(stored)
    assert not dit.training and not any(p.requires_grad for p in dit.parameters())


def test_loaded_weights_live_on_when_the_file_is_overwritten(folder):
    dit = dit_of(E2E_CARD, folder, "cpu")
    before = dit.time_in.weight.clone()
    with (folder / DIT).open("r+b") as file:
        file.write(b"\0" * (folder / DIT).stat().st_size)
    assert torch.equal(dit.time_in.weight, before)


def test_a_model_saved_under_its_released_names_loads_again(tmp_path):
    torch.manual_seed(1)
    dit, vae = LinumDiT(DEMO.dit_config), WanVAE(DEMO.vae_config)
    checkpoint.save(tmp_path / DEMO.dit_file, checkpoint.released_state(dit, linum_keys.LINUM))
    checkpoint.save(tmp_path / DEMO.vae_file, checkpoint.released_state(vae, wan_keys.WAN_VAE), {"made_by": "test"})
    for model, again in ((dit, dit_of(DEMO, tmp_path, "cpu")), (vae, vae_of(DEMO, tmp_path, "cpu"))):
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert checkpoint.read_header(tmp_path / DEMO.vae_file)[1] == {"made_by": "test"}


def test_statistics_of_images_are_known_and_dropped(folder):
    edit(folder / DIT, lambda t: t.update(image_data_scale=torch.ones(16), image_data_bias=torch.zeros(16)))
    dit_of(E2E_CARD, folder, "cpu")


@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop("model.blocks.0.self_attn.q.weight"),
     "1 tensor missing: model.blocks.0.self_attn.q.weight. "),
    (lambda t: t.update(extra=torch.ones(2)), "1 tensor unexpected: extra. "),
    (lambda t: t.update({"model.blocks.2.norm1.weight": torch.ones(48)}),
     "1 tensor unexpected: model.blocks.2.norm1.weight. "),
    (lambda t: t.update({"model.head.head.weight": torch.ones(64, 47)}),
     "1 tensor of another shape: model.head.head.weight must be [64, 48], got [64, 47]"),
    (lambda t: t.update({"model.head.head.bias": torch.ones(64, dtype=torch.int32)}),
     "1 tensor that must be floating point: model.head.head.bias (torch.int32)"),
    (lambda t: [t.update({"x." + name: t.pop(name)}) for name in list(t)], "tensors missing: "),
])
def test_names_shapes_and_kinds_are_strict_in_both_directions(folder, change, said):
    edit(folder / DIT, change)
    message = refusal(lambda: dit_of(E2E_CARD, folder, "cpu"))
    assert message.startswith(f"linum-v2-360p: {folder / DIT}: ") and said in message
    assert "another model's file?" in message or "floating point" in message


def test_weights_of_another_size_are_refused_from_the_header_alone(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "views", lambda stored: pytest.fail("weights were read"))
    wider = dataclasses.replace(E2E_CARD, vae_fields=dict(width=4))
    assert "of another shape: " in refusal(lambda: vae_of(wider, folder, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, checkpoint.FP8])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_found_wherever_it_stands(value, dtype):
    for at in (0, 500, 999):
        tensor = torch.linspace(-400, 400, 1000).to(dtype)
        assert checkpoint.is_finite(tensor)
        tensor[at] = value                              # FP8 has no infinity: NaN, or its largest number
        assert checkpoint.is_finite(tensor) == (dtype == checkpoint.FP8 and not tensor.float().isnan().any())
    assert checkpoint.is_finite(torch.empty(0)) and checkpoint.is_finite(torch.arange(3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value, folder):
    tensors, metadata = checkpoint.unpack((folder / DIT).read_bytes())
    name = sorted(tensors)[7]
    tensors[name].view(-1)[-1] = value
    checkpoint.save(folder / DIT, tensors, metadata)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} holds NaN or infinity.*Fetch it again"):
        dit_of(E2E_CARD, folder)


@pytest.mark.parametrize("part", ["dit/360p.safetensors", "vae/vae.safetensors"])
def test_a_truncated_file_is_refused_wherever_it_ends(folder, part):
    whole = (folder / part).read_bytes()
    draw = random.Random(7)
    for size in [0, 1, 7, 8, 9, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(40))]:
        (folder / part).write_bytes(whole[:size])
        assert "is not a whole safetensors file" in refusal(lambda: checkpoint.stored_tensors(folder / part))
    (folder / part).write_bytes(whole + b"\0")
    assert "take" in refusal(lambda: checkpoint.stored_tensors(folder / part))


def test_a_file_with_flipped_bits_in_its_header_is_refused_or_loads_but_never_crashes(folder):
    path = folder / "vae/vae.safetensors"
    whole, draw, refused = path.read_bytes(), random.Random(11), 0
    size = int.from_bytes(whole[:8], "little")
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(8 + size)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            vae_of(E2E_CARD, folder, "cpu")
        except CheckpointError:
            refused += 1
    assert refused > 80                                 # a blank may become another blank


@pytest.mark.parametrize("said, why", [
    (b"{", "its header is not JSON"),
    (b"[" * 100_000, "its header is not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "its header is not JSON"),
    (b'{"a": {}, "a": {}}', "its header is not JSON with one entry per name"),
    (b"\xff\xfe\x00", "its header is not JSON"),
    (b"[]", "its header is not a table"),
    ({"__metadata__": {"a": 1}}, "its metadata is not text"),
    ({"a": {"dtype": "F32"}}, "entry for 'a' is not understood"),
    ({"a": 3}, "entry for 'a' is not understood"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "entry for 'a' is not understood"),
    ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "entry for 'a' is not understood"),
    ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "entry for 'a' is not understood"),
    ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, "entry for 'a' is not understood"),
    ({"a": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}}, "entry for 'a' is not understood"),
    ({"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}, "a has dtype 'F7'; known are F64"),
    ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "a has dtype"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "a has 4 bytes, not those of its shape"),
    ({"a": {"dtype": "F32", "shape": [2 ** 40], "data_offsets": [0, 2 ** 42]}}, "its tensors take"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "its tensors overlap or leave gaps"),
    ({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, "its tensors overlap"),
])
def test_a_header_that_lies_is_refused(tmp_path, said, why):
    assert why in refusal(lambda: checkpoint.read_header(write(tmp_path / "a.safetensors", said, b"\0" * 4)))


def test_a_header_larger_than_the_file_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2 ** 63) + b"{}")
    assert "10 bytes cannot hold the header" in refusal(lambda: checkpoint.read_header(tmp_path / "a.safetensors"))


def test_a_pickle_is_never_opened_and_conversion_is_named(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return print, ("a pickle was executed",)

    state = tmp_path / "720p.pth"
    torch.save({"state_dict": Trap()}, state)
    assert "Convert once: dailies convert" in refusal(lambda: checkpoint.stored_tensors(state))
    renamed = shutil.copy(state, tmp_path / "renamed.safetensors")
    assert "is a pickle" in refusal(lambda: checkpoint.stored_tensors(renamed))
    assert f"{state} is a pickle" in refusal(lambda: weights.locate(state, E2E_CARD))
    (folder / DIT).rename(folder / "dit/360p.pth")
    message = refusal(lambda: weights.locate(folder, E2E_CARD))
    assert "has dit/360p.pth" in message and f"dailies convert {folder} --model linum-v2-360p --to" in message


def shard(folder, parts=3):
    tensors, _ = checkpoint.unpack((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    index = {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        some = {name: tensors[name] for name in sorted(tensors)[i::parts]}
        checkpoint.save(folder / file, some)
        index |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_shards_load_as_one(folder):
    whole = text_encoder_of(E2E_CARD, E2E, "cpu")
    shard(folder / E2E_CARD.text_encoder_folder)
    assert weights.missing_files(E2E_CARD, folder) == []
    assert torch.equal(text_encoder_of(E2E_CARD, folder, "cpu")("a red fox"), whole("a red fox"))


@pytest.mark.parametrize("damage, why", [
    (lambda index: index.popitem(), "are the shards of two downloads mixed?"),
    (lambda index: index.update(ghost="model-00001-of-00003.safetensors"),
     "1 tensor missing that model.safetensors.index.json"),
    (lambda index: index.update(ghost="../model.safetensors"), "is not a checkpoint index"),
    (lambda index: index.update(ghost=3), "is not a checkpoint index"),
    (lambda index: index.update(ghost="gone.safetensors"), "gone.safetensors is missing"),
])
def test_an_index_and_its_shards_must_agree(folder, damage, why):
    encoder = folder / E2E_CARD.text_encoder_folder
    index = shard(encoder)
    damage(index)
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert why in refusal(lambda: checkpoint.stored_tensors(encoder))


def test_a_folder_with_one_file_is_that_file(folder):
    assert len(checkpoint.stored_tensors(folder / "dit")) == len(checkpoint.stored_tensors(folder / DIT))
    shutil.copy(folder / DIT, folder / "dit/other.safetensors")
    assert "it has 2 and no index" in refusal(lambda: checkpoint.stored_tensors(folder / "dit"))


@pytest.mark.parametrize("lost", ["dit/360p.safetensors", "vae/vae.safetensors", "t5/text_encoder/config.json",
                                  "t5/text_encoder/model.safetensors"])
def test_a_missing_file_is_named(folder, lost):
    (folder / lost).unlink()
    assert weights.missing_files(E2E_CARD, folder) == [lost]
    assert refusal(lambda: weights.locate(folder, E2E_CARD)) == f"linum-v2-360p: {folder} lacks {lost}"


def test_a_tokenizer_or_a_shard_that_is_missing_is_named(folder):
    shutil.rmtree(folder / "t5/tokenizer")
    files = set(shard(folder / "t5/text_encoder").values())
    (folder / "t5/text_encoder" / max(files)).unlink()
    assert weights.missing_files(E2E_CARD, folder) == [f"t5/text_encoder/{max(files)}", "t5/tokenizer/tokenizer.json"]


def test_weights_that_are_no_folder_are_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in refusal(lambda: weights.locate(tmp_path / "file", E2E_CARD))
    assert "is not there" in refusal(lambda: weights.locate(str(tmp_path / "nowhere"), E2E_CARD))


def test_weights_in_a_store_are_fetched_into_the_cache(folder, cache):
    def fetch(uri, to):
        assert uri == "s3://models/linum" and to == cache / "dailies/weights"
        return folder
    assert weights.locate("s3://models/linum", E2E_CARD, fetch) == folder
    assert "Copy them" in refusal(lambda: weights.locate("s3://models/linum", E2E_CARD))


OFFLINE = """
import sys
from dailies.model.catalog import CATALOG
from dailies.model.files import CheckpointError
from dailies.model.weights import locate
try:
    print(locate(None, CATALOG[sys.argv[1]]))
except CheckpointError as error:
    print("refused:", error)
"""


def offline(tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "", "HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", OFFLINE, "linum-v2-360p"], env=env, capture_output=True, text=True,
                         timeout=60, check=True)
    assert out.stderr == ""
    return out.stdout.strip()


def test_weights_on_the_hub_are_taken_from_its_cache_and_offline_what_was_looked_for_is_named(tmp_path):
    said = offline(tmp_path)
    assert said.startswith("refused: linum-v2-360p: the weights (dit/360p.safetensors, vae/vae.safetensors, t5/text_")
    assert f"Hugging Face cache {tmp_path / 'hub'}" in said and "Linum-AI/linum-v2-360p" in said and "--weights" in said
    repo = tmp_path / "hub/models--Linum-AI--linum-v2-360p"
    shutil.copytree(E2E, repo / "snapshots/0123abc")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123abc")
    assert offline(tmp_path) == str(repo / "snapshots/0123abc")


def test_the_fingerprint_is_of_names_and_contents_and_contents_are_read_once(folder, cache, monkeypatch):
    files = weights.weights_files(E2E_CARD, folder)
    assert list(files) == ["dit/360p.safetensors", "t5/text_encoder/config.json", "t5/text_encoder/model.safetensors",
                           "t5/tokenizer/spiece.model", "t5/tokenizer/tokenizer.json",
                           "t5/tokenizer/tokenizer_config.json", "vae/vae.safetensors"]
    first = weights.fingerprint(files)
    assert len(first) == 64 and first == weights.fingerprint(weights.weights_files(E2E_CARD, E2E))
    with monkeypatch.context() as patch:
        patch.setattr(weights.hashlib, "file_digest", lambda *_: pytest.fail("a file was read again"))
        assert weights.fingerprint(files) == first
    edit(folder / DIT, lambda t: t["video_data_scale"].add_(1))
    changed = weights.fingerprint(files)
    assert changed != first
    renamed = {name.replace("360p", "720p"): path for name, path in files.items()}
    assert weights.fingerprint(renamed) not in (first, changed)


@pytest.mark.parametrize("name, num_bytes, said", [
    ("vae/vae.safetensors", 2**40, "a .safetensors file of a model has at most 200,000,000,000"),
    ("vae/vae.safetensors", 10**11, "is not a whole safetensors file"),
    ("t5/tokenizer/tokenizer.json", 10**9, "a .json file of a model has at most 64,000,000")])
def test_a_file_of_holes_is_not_read_to_its_end(name, num_bytes, said, folder, monkeypatch):
    with (folder / name).open("wb") as file:
        file.truncate(num_bytes)
    monkeypatch.setattr(weights.hashlib, "file_digest", lambda *_: pytest.fail("it was read"))
    assert said in refusal(lambda: weights.fingerprint({name: folder / name}))


def holes_in_a_decoder(folder):
    """Tensors that are not loaded, and a header that fits the file."""
    path = folder / "t5/text_encoder/model.safetensors"
    said, data = header(path)
    write(path, said | {"decoder.holes": {"dtype": "U8", "shape": [190 * 10**9],
                                          "data_offsets": [len(data), len(data) + 190 * 10**9]}}, data)
    os.truncate(path, path.stat().st_size + 190 * 10**9)


def holes_in_a_shape(folder):
    path, num = folder / DIT, 190 * 10**9 // 4
    write(path, {"model.x": {"dtype": "F32", "shape": [num], "data_offsets": [0, 4 * num]}})
    os.truncate(path, path.stat().st_size + 4 * num)


def holes_in_texts(folder):
    for number in range(40):
        with (folder / f"t5/text_encoder/{number}.json").open("wb") as file:
            file.truncate(60 * 10**6)


@pytest.mark.parametrize("spoil, said", [
    (holes_in_a_decoder, "twice what the model's tensors take; they have 190,"), (holes_in_a_shape, "missing"),
    (holes_in_texts, "twice what the model's tensors take; they have 2,4")])
def test_large_files_of_no_such_model_are_refused_before_any_is_hashed(spoil, said, folder, tmp_path, monkeypatch):
    spoil(folder)
    manifest = Manifest.read(prompts=["a fox"])
    monkeypatch.setattr(weights.hashlib, "file_digest", lambda *_: pytest.fail("it was read"))
    assert said in refusal(lambda: prepare(manifest, open_store(tmp_path / "out"), E2E_CARD, weights=folder))


def test_files_of_which_few_bytes_are_new_are_hashed_without_a_further_look(folder, monkeypatch):
    files = weights.weights_files(E2E_CARD, folder)
    weights.fingerprint(files, check=lambda: pytest.fail("it was looked at"))
    monkeypatch.setattr(weights, "UNCHECKED_BYTES", 0)
    weights.fingerprint(files, check=lambda: pytest.fail("all of it is known"))


def test_a_fingerprint_that_somebody_else_may_have_planted_is_not_believed(folder, cache):
    files = {DIT: folder / DIT}
    want = weights.fingerprint(files)
    known = cache / "dailies/sha256.json"
    known.write_text(json.dumps(dict.fromkeys(json.loads(known.read_text()), "0" * 64)))
    assert weights.fingerprint(files) != want           # the user's own is believed, or nothing would be saved
    (cache / "dailies").chmod(0o777)
    assert weights.fingerprint(files) == want


@pytest.mark.parametrize("cached", ["", "[]", "[1]", '{"a"', "null"])
def test_a_spoilt_fingerprint_cache_costs_time_only(cached, cache):
    files = {"a": GOLDENS / "README.md"}
    first = weights.fingerprint(files)
    (cache / "dailies/sha256.json").write_text(cached)
    assert weights.fingerprint(files) == first


def test_packed_tensors_come_back_as_they_were():
    tensors = {"prompt.0": torch.randn(3, 5).bfloat16(), "empty": torch.zeros(0, 4), "one": torch.tensor(2.5),
               "turned": torch.arange(6).reshape(2, 3).T, "yes": torch.tensor([True, False, True])}
    said = {"prompt": "ein Fuchs 🦊 \"im\" Schnee\n", **{str(i): str(i) for i in range(9)}}
    data = checkpoint.pack(tensors, said)
    again, metadata = checkpoint.unpack(data)
    assert metadata == said and again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype
    assert checkpoint.pack(dict(reversed(tensors.items())), dict(reversed(said.items()))) == data
    assert checkpoint.unpack(checkpoint.pack({}))[0] == {}


@pytest.mark.parametrize("data", [b"", b"12345678", b"\2\0\0\0\0\0\0\0{}x", b"\2\0\0\0\0\0\0\0[]", b"\xff" * 20])
def test_bytes_that_are_not_packed_tensors_are_refused(data):
    assert "are not packed tensors" in refusal(lambda: checkpoint.unpack(data))


def published(table):
    """Released names that the table is for."""
    if table is linum_keys.LINUM:
        with torch.device("meta"):
            dit = LinumDiT(LINUM_V2_720P.dit_config)
        return {linum_keys.LINUM.released(name) for name in dit.state_dict()}
    file = {"WAN_VAE": "wan_vae_a/weights", "WAN_VAE_DIFFUSERS": "wan_vae_b_diffusers/weights_diffusers",
            "T5": "t5_encoder_a/weights"}
    names = set(checkpoint.stored_tensors(GOLDENS / f"{file[table.name]}.safetensors"))
    return names | {"encoder.embed_tokens.weight"} if table is keys.T5 else names


@pytest.mark.parametrize("table", [linum_keys.LINUM, wan_keys.WAN_VAE, wan_keys.WAN_VAE_DIFFUSERS, keys.T5],
                         ids=lambda t: t.name)
def test_every_rule_of_a_key_table_is_used_and_leads_back(table):
    names = published(table)
    assert table.unknown(names) == []
    assert table is keys.T5 or all(table.released(table.ours(name)) == name for name in names)
    for rule in table.rules:
        less = keys.KeyTable(name="less", rules={old: new for old, new in table.rules.items() if old != rule})
        assert any(less.ours(name) != table.ours(name) for name in names), rule


def test_the_vae_has_the_194_published_tensors():
    with torch.device("meta"):
        vae = WanVAE(LINUM_V2_720P.vae_config)
    for table in (wan_keys.WAN_VAE, wan_keys.WAN_VAE_DIFFUSERS):
        assert {table.released(name) for name in vae.state_dict()} == set(published(table))
    assert len(vae.state_dict()) == 194 and sum(p.numel() for p in vae.parameters()) == 126_892_531
