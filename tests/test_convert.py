"""`dailies convert`: pickles read without running anything, everything checked, and what comes out can be rendered."""

import json
import os
import pickle
import shutil
import site
import zipfile

import pytest
import torch
from golden import E2E, E2E_CARD, Golden, error
from parts import dit_from, dit_of, image_encoder_of, text_encoder_of
from wan_tiny import WAN_TINY, WAN_TINY_A14B, WAN_TINY_I2V, write_weights

from dailies.jobs import convert as converting
from dailies.jobs.cli import main
from dailies.model import checkpoint
from dailies.model.catalog import CATALOG
from dailies.model.family import family_of
from dailies.model.files import CheckpointError
from dailies.model.weights import locate


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    for card in (WAN_TINY, WAN_TINY_A14B, WAN_TINY_I2V):
        monkeypatch.setitem(CATALOG, card.name, card)


def published(folder, card):
    """A repository in the original layout: pickles but for the transformer."""
    write_weights(folder, card, "original")
    for part in card.layouts[1].parts:
        if "diffusion" in part:
            continue
        tensors, _ = checkpoint.unpack((folder / part).read_bytes())
        if "clip" in part:
            tensors = open_clip(tensors)
        (folder / part).unlink()
        torch.save(tensors, (folder / part).with_suffix(".pth"))
    return folder


def open_clip(tensors):
    """Transformers' names to the original ones, with the text tower and the last block that Wan does not use."""
    found = {"visual.cls_embedding": tensors["vision_model.embeddings.class_embedding"].view(1, 1, -1),
             "visual.pos_embedding": tensors["vision_model.embeddings.position_embedding.weight"][None],
             "visual.patch_embedding.weight": tensors["vision_model.embeddings.patch_embedding.weight"],
             "textual.token_embedding.weight": torch.ones(3, 4), "log_scale": torch.ones(())}
    for part in ("weight", "bias"):
        found[f"visual.pre_norm.{part}"] = tensors[f"vision_model.pre_layrnorm.{part}"]
        for i in range(2):
            layer = f"vision_model.encoder.layers.{i}."
            found[f"visual.transformer.{i}.attn.to_qkv.{part}"] = torch.cat(
                [tensors[f"{layer}self_attn.{of}_proj.{part}"] for of in "qkv"])
            for old, new in {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2",
                             "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}.items():
                found[f"visual.transformer.{i}.{old}.{part}"] = tensors[f"{layer}{new}.{part}"]
        found[f"visual.transformer.2.norm1.{part}"] = torch.ones(24)
    return found


@pytest.mark.parametrize("card", [WAN_TINY, WAN_TINY_A14B, WAN_TINY_I2V], ids=lambda card: card.name)
def test_a_published_folder_becomes_weights_that_load(card, tmp_path, capsys):
    write_weights(tmp_path / "wanted", card, "original")
    source = published(tmp_path / "src", card)
    assert main(["convert", str(source), "--model", card.name, "--to", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    folder = locate(tmp_path / "out", card)
    for part in card.layouts[1].parts:
        got, _ = checkpoint.unpack((folder / part).read_bytes())
        want, _ = checkpoint.unpack((tmp_path / "wanted" / part).read_bytes())
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want), part
    assert {file["file"] for file in said["files"]} == {p.relative_to(folder).as_posix()
                                                        for p in folder.rglob("*") if p.is_file()}
    assert [part.load(folder, card.runtime()) for part in family_of(card).parts(card)]


def test_a_folder_can_be_converted_in_place(tmp_path, capsys):
    source = published(tmp_path, WAN_TINY)
    assert main(["convert", str(source), "--model", "wan-tiny", "--to", str(source)]) == 0
    assert locate(source, WAN_TINY) == source
    assert not list(source.glob(".dailies*"))


def test_a_pickle_in_shards_is_one_part(tmp_path):
    """As transformers saves a text encoder; every shard is read, and its index decides what is taken of it."""
    write_weights(tmp_path / "src", WAN_TINY)
    folder = tmp_path / "src/text_encoder"
    tensors, _ = checkpoint.unpack((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(tmp_path / "whole")
    index = {}
    for at in range(2):
        some = {name: tensors[name] for name in sorted(tensors)[at::2]}
        torch.save(some, folder / f"pytorch_model-{at}.bin")
        index |= dict.fromkeys(some, f"pytorch_model-{at}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for part in ("transformer", "vae"):
        shutil.rmtree(tmp_path / "src" / part)
    assert main(["convert", str(tmp_path / "src"), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 0
    got, _ = checkpoint.unpack((tmp_path / "out/text_encoder/model.safetensors").read_bytes())
    assert got.keys() == tensors.keys() and all(torch.equal(got[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("damage, said", [
    (lambda tokenizer: os.mkfifo(tokenizer / "config.json"), "it is a pipe"),
    (lambda tokenizer: (tokenizer / "config.json").symlink_to("/dev/zero"), "it is a device"),
    (lambda tokenizer: (tokenizer / "config.json").symlink_to("/proc/self/environ"), "leads out of"),
    (lambda tokenizer: (tokenizer / "config.json").symlink_to(mine(tokenizer)), "leads out of"),
    (lambda tokenizer: behind(tokenizer, tokenizer), "leads out of"),
    (lambda tokenizer: behind(tokenizer, tokenizer.parents[1] / "diffusion_pytorch_model.safetensors"), "leads out of"),
    (lambda tokenizer: (tokenizer / "config.json").write_text("[default]"), "is not JSON"),
    (lambda tokenizer: (tokenizer / "config.json").write_text('["a"]'), "must be a JSON table"),
    (lambda tokenizer: (tokenizer / "spiece.model").write_text("[default]"), "must be a SentencePiece model"),
    (lambda tokenizer: (tokenizer / "tokenizer_config.json").write_text('{"auto_map": {}}'), "has auto_map")])
def test_a_tokenizer_folder_that_is_a_trap_is_refused_before_anything_is_published(damage, said, tmp_path, capsys):
    write_weights(tmp_path / "src", WAN_TINY, "original")
    damage(tmp_path / "src/google/umt5-xxl")
    assert main(["convert", str(tmp_path / "src"), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def mine(tokenizer):
    """A file of the user's, beside the weights."""
    file = tokenizer.parents[2] / "mine.json"
    file.write_text('{"secret": 1}')
    return file


def behind(tokenizer, path):
    """What is at `path` moved out of the weights, and a link to it left there."""
    away = tokenizer.parents[2] / f"away-{path.name}"
    path.rename(away)
    path.symlink_to(away)


def test_files_of_other_names_than_models_have_are_not_published_and_every_other_is_listed(tmp_path, capsys):
    write_weights(tmp_path / "src", WAN_TINY, "original")
    tokenizer = tmp_path / "src/google/umt5-xxl"
    (tokenizer / "env\x1b[2J.json").symlink_to("/proc/self/environ")
    (tokenizer / "special_tokens_map.json").write_text("{}")
    assert main(["convert", str(tmp_path / "src"), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "no model has files of these names: env\\x1b[2J.json" in err and "\x1b" not in err
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert all(f"out/{name}  " in out for name in found) and len(out.splitlines()) == len(found)
    assert "umt5-xxl/special_tokens_map.json  2 bytes  from" in out


def test_a_snapshot_of_the_hubs_cache_may_be_links_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    write_weights(snapshot, WAN_TINY, "original")
    blobs.mkdir()
    for at, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        file.rename(blobs / f"{at:040x}")
        file.symlink_to(os.path.relpath(blobs / f"{at:040x}", file.parent))
    assert main(["convert", str(snapshot), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 0
    assert locate(tmp_path / "out", WAN_TINY) and not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


def test_shards_that_are_links_out_of_the_folder_are_not_published(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(converting, "SHARD_BYTES", 20_000)
    assert main(["convert", str(published(tmp_path / "src", WAN_TINY)), "--model", "wan-tiny", "--to",
                 str(tmp_path / "w")]) == 0
    shard = sorted((tmp_path / "w").glob("diffusion_pytorch_model-*-of-*.safetensors"))[1]
    shard.rename(tmp_path / "away")
    shard.symlink_to(tmp_path / "away")
    for source in (tmp_path / "w", tmp_path / "w/diffusion_pytorch_model.safetensors.index.json"):
        assert main(["convert", str(source), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 2
        assert "leads out of" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, kind", [("Wan2.1_VAE.pth", "vae"), ("anything.pth", "vae"),
                                        ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")])
def test_a_single_file_is_known_by_its_name_or_its_tensors(name, kind, tmp_path):
    source = published(tmp_path / "src", WAN_TINY)
    file = "Wan2.1_VAE.pth" if kind == "vae" else name
    shutil.copy(source / file, tmp_path / name)
    assert main(["convert", str(tmp_path / name), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").glob("*.*") if p.is_file()] == [file.replace(".pth", ".safetensors")]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net."])
def test_a_single_transformer_is_known_whatever_prefix_a_tool_has_put_before_its_names(prefix, tmp_path):
    write_weights(tmp_path / "src", WAN_TINY, "original")
    tensors, _ = checkpoint.unpack((tmp_path / "src/diffusion_pytorch_model.safetensors").read_bytes())
    checkpoint.save(tmp_path / "wan_fp16.safetensors", {prefix + name: tensor for name, tensor in tensors.items()})
    assert main(["convert", str(tmp_path / "wan_fp16.safetensors"), "--model", "wan-tiny", "--to",
                 str(tmp_path / "out")]) == 0
    assert dit_from(WAN_TINY, tmp_path / "out/diffusion_pytorch_model.safetensors", "cpu", "fp32")


def test_large_parts_become_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "SHARD_BYTES", 20_000)
    source = published(tmp_path / "src", WAN_TINY)
    assert main(["convert", str(source), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
    folder = locate(tmp_path / "out", WAN_TINY)
    dit, text = dit_of(WAN_TINY, folder, "cpu"), text_encoder_of(WAN_TINY, folder, "cpu")
    whole, _ = checkpoint.unpack((source / "diffusion_pytorch_model.safetensors").read_bytes())
    assert torch.equal(dit.blocks[1].attn.q.weight, whole["blocks.1.self_attn.q.weight"])
    assert text("a red fox").shape[1] == 32


def test_a_golden_passes_through_the_conversion_of_its_pickle(tmp_path, monkeypatch):
    """The VAE's, under a name of its own and inside a state_dict, as some tools save it."""
    from dataclasses import replace
    golden = Golden("wan_vae_a")
    monkeypatch.setitem(CATALOG, "wan-tiny", replace(WAN_TINY, vae_fields=dict(width=golden.config["dim"])))
    tensors, _ = checkpoint.unpack((golden.folder / "weights.safetensors").read_bytes())
    torch.save({"state_dict": tensors}, tmp_path / "vae.ckpt")
    assert main(["convert", str(tmp_path / "vae.ckpt"), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 0
    card = CATALOG["wan-tiny"]
    vae = family_of(card).load_vae(card, tmp_path / "out", card.runtime())
    mean, std = (torch.tensor(golden.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    assert error(vae.decode(golden.inputs["z.5"] * std + mean), golden.outputs["decoded.5"]) < golden.tolerance["value"]


def test_linum_pickles_are_converted_too(tmp_path, monkeypatch):
    monkeypatch.setitem(CATALOG, E2E_CARD.name, E2E_CARD)
    shutil.copytree(E2E, tmp_path / "src")
    for part in (E2E_CARD.dit_file, E2E_CARD.vae_file, "t5/text_encoder/model.safetensors"):
        tensors, _ = checkpoint.unpack((tmp_path / "src" / part).read_bytes())
        (tmp_path / "src" / part).unlink()
        target = (tmp_path / "src" / part).with_suffix(".pth")
        torch.save(tensors, target.with_name("pytorch_model.bin") if "t5" in part else target)
    assert main(["convert", str(tmp_path / "src"), "--model", E2E_CARD.name, "--to", str(tmp_path / "out")]) == 0
    for part in family_of(E2E_CARD).parts(E2E_CARD):
        part.load(locate(tmp_path / "out", E2E_CARD), E2E_CARD.runtime())


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def broken(change):
    def write(folder):
        path = folder / "Wan2.1_VAE.pth"
        tensors = torch.load(path, weights_only=True)
        torch.save(change(tensors), path)
    return write


@pytest.mark.parametrize("damage, said", [
    (lambda folder: (folder / "Wan2.1_VAE.pth").write_bytes(pickle.dumps({"a": Bomb()})), "could run code"),
    (broken(lambda tensors: tensors | {"extra": Bomb()}), "could run code"),
    (lambda folder: (folder / "Wan2.1_VAE.pth").write_bytes((folder / "Wan2.1_VAE.pth").read_bytes()[:900]),
     "cannot be read as tensors"),
    (lambda folder: (folder / "Wan2.1_VAE.pth").write_text("<html>"), "cannot be read as tensors"),
    (broken(lambda tensors: [1, 2]), "must hold a table of tensors; it holds list"),
    (broken(lambda tensors: tensors | {"epoch": 3}), "must hold tensors alone; these are none: epoch"),
    (broken(lambda tensors: {n: t for n, t in tensors.items() if n != "conv1.bias"}),
     "1 tensor missing: conv1.bias"),
    (broken(lambda tensors: tensors | {"another.weight": torch.ones(1)}), "1 tensor unexpected: another.weight"),
    (broken(lambda tensors: tensors | {"conv1.bias": torch.ones(3)}), "conv1.bias must be \\[32\\], got \\[3\\]"),
    (broken(lambda tensors: tensors | {"conv1.bias": torch.ones(32, dtype=torch.int64)}), "must be floating point"),
    (broken(lambda tensors: tensors | {"conv1.bias": torch.full((32,), torch.nan)}), "NaN or infinity in conv1.bias"),
])
def test_a_broken_pickle_is_refused_runs_nothing_and_leaves_nothing(damage, said, tmp_path, capsys):
    import re
    source = published(tmp_path / "src", WAN_TINY)
    (source / "diffusion_pytorch_model.safetensors").unlink()
    (source / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    damage(source)
    assert main(["convert", str(source), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert re.search(said, err) and "boom" not in out + err
    assert not list(tmp_path.glob("out/**/*.safetensors"))


@pytest.mark.parametrize("source, said", [("nowhere", "is not there"), ("empty", "has no weights of wan-tiny"),
                                          ("other.pth", "is none of the parts of wan-tiny")])
def test_a_source_without_weights_is_refused(source, said, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    assert main(["convert", str(tmp_path / source), "--model", "wan-tiny", "--to", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_one_expert_of_two_needs_its_folder(tmp_path, capsys):
    source = published(tmp_path / "src", WAN_TINY_A14B)
    file = source / "low_noise_model/diffusion_pytorch_model.safetensors"
    assert main(["convert", str(file), "--model", "wan-tiny-a14b", "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/low_noise_model/diffusion_pytorch_model.safetensors").read_bytes() == file.read_bytes()
    for noise in ("high", "low"):
        named = shutil.copy(file, tmp_path / f"wan2.2_t2v_{noise}_noise_14B_fp16.safetensors")
        assert main(["convert", str(named), "--model", "wan-tiny-a14b", "--to", str(tmp_path / noise)]) == 0
        assert (tmp_path / noise / f"{noise}_noise_model/diffusion_pytorch_model.safetensors").is_file()
    shutil.copy(file, tmp_path / "some.safetensors")
    assert main(["convert", str(tmp_path / "some.safetensors"), "--model", "wan-tiny-a14b",
                 "--to", str(tmp_path / "out2")]) == 2
    assert "is one of several of the parts" in capsys.readouterr().err


def test_the_clip_golden_passes_through_the_conversion(tmp_path, monkeypatch):
    from dataclasses import replace
    golden = Golden("wan_clip_vision_a")
    said = golden.config
    card = replace(WAN_TINY_I2V, clip_fields=dict(picture=said["image_size"],
                                                  patch=said["patch_size"], width=said["dim"],
                                                  heads=said["num_heads"], blocks=said["num_layers"] - 1,
                                                  mlp=4 * said["dim"]))
    monkeypatch.setitem(CATALOG, card.name, card)
    tensors, _ = checkpoint.unpack((golden.folder / "weights.safetensors").read_bytes())
    file = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
    torch.save(tensors, tmp_path / f"{file}.pth")
    assert main(["convert", str(tmp_path / f"{file}.pth"), "--model", card.name, "--to", str(tmp_path / "out")]) == 0
    tower = image_encoder_of(card, tmp_path / "out", "cpu")
    assert error(tower(golden.inputs["image"].transpose(0, 1)), golden.outputs["features"]) < golden.tolerance["value"]


def stand_in(home, program):
    """Puts a program in the place of the one that reads a pickle."""
    (home / "dailies/jobs").mkdir(parents=True)
    for package in ("dailies", "dailies/jobs"):
        (home / package / "__init__.py").touch()
    (home / "dailies/jobs/unpickle.py").write_text(program)


def test_a_pickle_is_opened_where_there_are_no_credentials(tmp_path, monkeypatch):
    """The process that reads it is replaced by one that tells what it has."""
    stand_in(tmp_path, 
        "import json, os, sys\n"
        "print(json.dumps([dict(os.environ), os.getcwd(), sys.stdin.read()]), file=sys.stderr); sys.exit(2)")
    monkeypatch.setattr(converting, "HOME", tmp_path)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN", "ANYTHING"):
        monkeypatch.setenv(name, "stays-at-home")
    target = tmp_path / "room" / "model.safetensors"
    target.parent.mkdir()
    with pytest.raises(CheckpointError) as told:
        converting.unpickle(tmp_path / "a.pth", target)
    environment, folder, stdin = json.loads(str(told.value))
    assert "stays-at-home" not in environment.values() and "AWS_SECRET_ACCESS_KEY" not in environment
    assert environment["HOME"] == folder == str(target.parent) and stdin == ""


def test_the_reader_of_a_pickle_finds_libraries_where_this_process_does(tmp_path, monkeypatch):
    """Installed with pip --user, or in a folder that PYTHONPATH names, as modules of clusters are."""
    stand_in(tmp_path, "import sys, only_there\nprint(only_there.SAID, file=sys.stderr); sys.exit(2)")
    libraries = tmp_path / "elsewhere" / "site-packages"
    libraries.mkdir(parents=True)
    (libraries / "only_there.py").write_text("SAID = 'found'")
    monkeypatch.setattr(converting, "HOME", tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("/secrets", str(libraries))))
    with pytest.raises(CheckpointError, match="^found$"):
        converting.unpickle(tmp_path / "a.pth", tmp_path / "model.safetensors")
    assert "/secrets" not in converting.child_environment(tmp_path)["PYTHONPATH"]
    monkeypatch.setattr(site, "ENABLE_USER_SITE", True)
    assert converting.child_environment(tmp_path)["PYTHONUSERBASE"] == site.getuserbase()


def test_a_pickle_of_few_bytes_gets_little_memory(tmp_path):
    """bytearray(3,000,000,000), which weights_only lets through."""
    called = b"cbuiltins\nbytearray\n"
    program = b"\x80\x02}X\x01\0\0\0a" + called + b"\x8a\x08" + (3 * 10**9).to_bytes(8, "little") + b"\x85Rs."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        for name, content in (("data.pkl", program), ("version", "3\n"), ("byteorder", "little")):
            file.writestr(f"archive/{name}", content)
    with pytest.raises(CheckpointError, match="MemoryError"):
        converting.unpickle(tmp_path / "a.pt", tmp_path / "model.safetensors")


def test_a_reader_that_is_killed_is_said(tmp_path, monkeypatch):
    stand_in(tmp_path, "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(converting, "HOME", tmp_path)
    with pytest.raises(CheckpointError, match="ended with -9. Is there enough memory"):
        converting.unpickle(tmp_path / "a.pth", tmp_path / "model.safetensors")
