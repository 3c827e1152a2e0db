"""What lies in the run folder is believed by nobody: damage and forgery are found, made again, and end no row.

The runs are of a tiny model, in this process.
"""

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_folders import ask, said, write

from dailies.actors import clip_file
from dailies.actors.messages import Embedding
from dailies.jobs import verify
from dailies.model.shapes import VideoShape
from dailies.pipeline.run import adoption, intermediates, large_objects, ledger
from dailies.pipeline.run.intermediates import Seal, sealed, unsealed
from dailies.pipeline.run.layout import LATENTS, SEAL_KEY, clip_key
from dailies.pipeline.run.seal import VARIABLE, seal_of
from dailies.pipeline.store import FolderStore, StoreError, open_store

ROWS = [{"id": "fox", "prompt": "a red fox", "frames": 5},
        {"id": "cats", "prompt": "two cats", "frames": 5, "samples": 2}]
NUM_CLIPS = 3


def render(folder, *options, out="out"):
    return ask("render", folder / "night.jsonl", "--out", folder / out, "--model", "tiny", "--device", "cpu", *options)


def begin(folder):
    folder.mkdir(exist_ok=True)
    write(folder / "night.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run whose latents were kept; not to be changed."""
    folder = begin(tmp_path_factory.mktemp("whole"))
    code, answer, _ = render(folder, "--keep-latents")
    assert code == 0 and answer["rendered"] == NUM_CLIPS and answer["notes"] == []
    return folder


@pytest.fixture
def night(whole, tmp_path):
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "night")
    return tmp_path / "night"


def clips(folder):
    return {path.stem: path.read_bytes() for path in sorted((folder / "out/clips").rglob("*.mp4"))}


def rows(folder):
    return {(row["id"], row["seed"]): row for row in ledger.read(open_store(folder / "out")).to_pylist()}


def path_of(folder, clip_id):
    return folder / "out" / clip_key(clip_id)


def assert_right(folder, whole):
    """The clips are those of the whole run, and the ledger says so."""
    assert clips(folder) == clips(whole)
    for row in rows(folder).values():
        assert row["status"] == "done" and row["sha256"] == hashlib.sha256(clips(whole)[row["clip_id"]]).hexdigest()
    assert len(rows(folder)) == NUM_CLIPS and (folder / "out/_SUCCESS.json").exists()
    assert ask("verify", folder / "out")[0] == 0


# Clips.

@pytest.fixture
def unread(monkeypatch):
    """What is opened by FFmpeg, and the most bytes that a store was asked for."""
    opened, asked = [], []
    get = FolderStore.get
    monkeypatch.setattr(clip_file.av, "open", lambda *_, **__: opened.append(1) or pytest.fail("FFmpeg was asked"))
    monkeypatch.setattr(FolderStore, "get", lambda store, key, *, at_most=None: asked.append(at_most)
                        or get(store, key, at_most=at_most))
    return asked


@pytest.mark.parametrize("forged, said", [
    ({"frames": 10**9}, "no model makes"), ({"width": 10**6, "height": 10**6}, "no model makes"),
    ({"width": -64, "height": -64}, "no model makes"), ({"frames": 0}, "no model makes"),
    ({"bytes": 2**31}, "no clip of its shape has 2,147,483,648 bytes"), ({"bytes": -1}, "no clip of its shape"),
    ({"bytes": None}, "does not say bytes"), ({"bytes": 100}, "where the ledger says 100 bytes"),
    ({"sha256": "0" * 64}, "is not the ledger's")])
def test_a_forged_row_or_another_size_is_wrong_before_anything_is_decoded(forged, said, whole, unread):
    row = next(iter(rows(whole).values()))
    unread.clear()
    store = open_store(whole / "out")
    assert said in verify.problem_of(store, row | forged)
    assert all(at_most <= row["bytes"] for at_most in unread)


def test_a_forged_rate_that_is_no_number_is_wrong(whole):
    row = next(iter(rows(whole).values()))
    store = open_store(whole / "out")
    assert verify.problem_of(store, row) is None
    assert "at nan fps are wanted" in verify.problem_of(store, row | {"fps": float("nan")})


def test_a_file_larger_than_any_clip_of_the_request_is_not_read(whole, tmp_path, monkeypatch):
    shape = VideoShape(frames=5, height=64, width=64)
    asked = SimpleNamespace(clip_id="ab" * 32, shape=shape, fps=24.0)
    path = tmp_path / clip_key(asked.clip_id)
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(2**31)
    assert "no clip of its shape is that large" in adoption.published(open_store(tmp_path), asked).why


def test_of_large_files_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(large_objects, "_SMALL_BYTES", 10)
    store, held, most = open_store(tmp_path), [], []
    for number in range(8):
        store.put(clip_key(f"{number:064}"), b"x" * 1000)

    def read(number):
        with (adoption.clip_bytes(store, f"{number:064}", 2000) if number % 2 else
              intermediates.read_object(store, clip_key(f"{number:064}"), None, intermediates.anything)) as data:
            held.append(len(data))
            most.append(sum(held))
            time.sleep(0.01)
            held.remove(len(data))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert most == [1000] * 8


def test_the_ledger_has_the_clips_path_below_the_folder_and_the_samples_number(whole):
    found = sorted((row["id"], row["sample"], row["path"]) for row in rows(whole).values())
    assert [name for name, _, _ in found] == ["cats", "cats", "fox"] and [number for _, number, _ in found] == [0, 1, 0]
    assert all((whole / "out" / path).is_file() for _, _, path in found)
    seeds = sorted(seed for name, seed in rows(whole) if name == "cats")
    assert [rows(whole)["cats", seed]["sample"] for seed in seeds] == [0, 1]


def test_no_empty_folder_is_left(tmp_path):
    folder = begin(tmp_path / "night")
    assert render(folder)[0] == 0
    left = {path.relative_to(folder / "out").parts[0] for path in (folder / "out").rglob("*")}
    assert left == {"run.json", "lease.json", "_SUCCESS.json", "clips", "posters", "ledger", "manifests"}
    assert all(any(path.iterdir()) for path in (folder / "out").rglob("*") if path.is_dir())


DAMAGE = {
    "deleted": lambda path, data: path.unlink(),
    "two bytes changed": lambda path, data: path.write_bytes(data[:900] + bytes([data[900] ^ 1]) + data[901:-300]
                                                             + bytes([data[-300] ^ 1]) + data[-299:]),
    "cut short": lambda path, data: path.write_bytes(data[:-100]),
    "longer": lambda path, data: path.write_bytes(data + b"\0"),
    "html": lambda path, data: path.write_bytes(b"<html>"),
    "empty": lambda path, data: path.write_bytes(b""),
    "an SDP text": lambda path, data: path.write_bytes(b"v=0\r\nc=IN IP4 127.0.0.1\r\nm=video 5555 RTP/AVP 96\r\n"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_verify_finds_wrong_is_repaired_by_verify_repair_and_render(what, night, whole):
    damaged, *_ = clips(night)
    DAMAGE[what](path_of(night, damaged), clips(night)[damaged])
    code, found, _ = ask("verify", night / "out")
    assert code == 3 and [wrong["clip_id"] for wrong in found["wrong"]] == [damaged]
    parts = {path: path.read_bytes() for path in (night / "out/ledger").iterdir()}
    code, found, _ = ask("verify", night / "out", "--repair")
    assert code == 3 and found["pending_again"] == 1
    assert all(path.read_bytes() == data for path, data in parts.items())      # nothing that was written is rewritten
    assert ask("status", night / "out")[1]["pending"] == 1 and not (night / "out/_SUCCESS.json").exists()
    assert path_of(night, damaged).exists() == (what != "deleted")             # until the clip is there again
    plan = ask("plan", night / "night.jsonl", "--out", night / "out", "--model", "tiny", "--device", "cpu")[1]
    assert (plan["to_make"], plan["found_published"]) == (1, 0)
    code, answer, _ = render(night, "--keep-latents")
    assert code == 0 and (answer["rendered"], answer["adopted"], answer["done"]) == (1, 0, NUM_CLIPS)
    assert_right(night, whole)
    row, = [row for row in rows(night).values() if row["clip_id"] == damaged]
    assert any("replaced" in note or "made again: its file was missing" in note for note in row["notes"])
    assert ask("verify", night / "out", "--repair")[1]["pending_again"] == 0


def test_a_copy_of_a_clip_in_another_folder_does_not_hide_the_clip(night):
    first, *_ = clips(night)
    shutil.copytree(path_of(night, first).parent, night / "out/clips/favourites")
    code, answer, _ = render(night)
    assert code == 0 and (answer["rendered"], answer["notes"]) == (0, [])


@pytest.mark.parametrize("what", ["deleted", "cut short", "longer", "html", "empty"])
def test_render_alone_makes_again_what_its_listing_shows_to_be_gone_or_of_another_size(what, night, whole):
    damaged, *_ = clips(night)
    DAMAGE[what](path_of(night, damaged), clips(night)[damaged])
    code, answer, _ = render(night, "--keep-latents")
    assert code == 0 and answer["rendered"] == 1 and len(answer["notes"]) == 1
    assert_right(night, whole)
    assert render(night)[1]["rendered"] == 0


@pytest.mark.parametrize("what", [what for what in DAMAGE if what != "deleted"])
def test_without_a_ledger_only_whole_clips_are_adopted(what, night, whole):
    damaged, *_ = clips(night)
    DAMAGE[what](path_of(night, damaged), clips(night)[damaged])
    shutil.rmtree(night / "out/ledger")
    code, answer, _ = render(night, "--keep-latents")
    assert code == 0 and (answer["rendered"], answer["adopted"]) == (1, NUM_CLIPS - 1)
    assert_right(night, whole)


def test_a_clip_of_another_row_under_a_clips_name_is_replaced_and_what_was_changed_after_its_row_is_too(night, whole):
    first, second, third = clips(night)
    path_of(night, first).write_bytes(clips(night)[second])
    shutil.rmtree(night / "out/ledger")
    assert render(night, "--keep-latents")[1]["rendered"] == 1
    assert_right(night, whole)
    # as an older version made them, without a digest at their end: only the ledger knows
    old = clips(night)[third].replace(b"description", b"descriptive")[:-56]
    path_of(night, third).write_bytes(old)
    ask("verify", night / "out", "--repair")
    assert render(night, "--keep-latents")[1]["rendered"] == 1
    assert_right(night, whole)


def test_clips_of_an_older_version_are_adopted(night):
    for clip_id, data in clips(night).items():
        path_of(night, clip_id).write_bytes(data.replace(b"description", b"descriptive")[:-56])
    shutil.rmtree(night / "out/ledger")
    assert render(night)[1]["adopted"] == NUM_CLIPS and ask("verify", night / "out")[0] == 0


def test_a_buckets_own_hash_is_not_believed(whole, s3_bucket, tmp_path):
    folder, out = begin(tmp_path), f"{s3_bucket}/night"
    command = ["render", folder / "night.jsonl", "--out", out, "--model", "tiny", "--device", "cpu"]
    assert ask(*command)[0] == 0
    store, (clip_id, data) = open_store(out), next(iter(clips(whole).items()))
    honest = {"sha256": hashlib.sha256(data).hexdigest(), "clip-id": clip_id}
    for forged in (b"junk junk", data[:-300] + bytes([data[-300] ^ 1]) + data[-299:]):
        for info in [*store.list("ledger/")]:
            store.delete(info.key)
        store.client.put_object(Bucket=store.bucket, Key=store.base + clip_key(clip_id), Body=forged, Metadata=honest)
        code, answer, _ = ask(*command)
        assert code == 0 and (answer["rendered"], answer["adopted"]) == (1, NUM_CLIPS - 1)
        assert store.get(clip_key(clip_id)) == data and ask("verify", out)[0] == 0


def test_two_whose_ledger_rows_are_put_back_share_the_clip_that_is_made_again(tmp_path):
    twins = [{"id": name, "prompt": "a twin", "seed": 7, "frames": 5} for name in ("a", "b")]
    folder = begin(tmp_path)
    write(folder / "night.jsonl", twins)
    assert render(folder)[1]["rendered"] == 1
    (clip_id, data), = clips(folder).items()
    path_of(folder, clip_id).unlink()
    assert ask("verify", folder / "out", "--repair")[1]["pending_again"] == 2
    assert render(folder)[1]["rendered"] == 1 and clips(folder) == {clip_id: data}
    assert ask("status", folder / "out")[1]["done"] == 2


def test_verify_repair_waits_for_no_driver_that_is_at_work(night):
    from dailies.pipeline.run.lease import Lease
    first, *_ = clips(night)
    path_of(night, first).unlink()
    before = sorted((night / "out/ledger").iterdir())
    with Lease.take(open_store(night / "out")):
        code, answer, _ = ask("verify", night / "out", "--repair")
    assert code == 5 and "another driver works on this run" in answer["error"]
    assert sorted((night / "out/ledger").iterdir()) == before


def test_rows_of_others_in_the_ledger_do_not_make_a_run_finished(night):
    forged = pa.table({"id": ["x", "y", "z"], "seed": [1, 2, 3], "status": ["done"] * 3})
    shutil.rmtree(night / "out/ledger")
    (night / "out/ledger").mkdir()
    pq.write_table(forged, night / "out/ledger/000001-000000.parquet")
    (night / "out/_SUCCESS.json").unlink()
    for clip_id in clips(night):
        path_of(night, clip_id).unlink()
    code, answer, _ = render(night, "--limit", 1)
    assert (answer["done"], answer["pending"]) == (1, 2) and not (night / "out/_SUCCESS.json").exists()


# Latents.

@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_the_key_of_the_seal_is_for_its_owner_alone_whatever_the_umask(umask, tmp_path):
    (tmp_path / SEAL_KEY).write_text("older")
    before = os.umask(umask)
    try:
        seal_of(store := open_store(tmp_path), fresh=True)
        store.put("open", b"")
    finally:
        os.umask(before)
    assert (tmp_path / SEAL_KEY).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user for a moment")
def test_another_users_key_is_replaced_when_he_continues_the_run():
    with TemporaryDirectory() as folder:                # pytest's own is closed to others
        os.chmod(folder, 0o777)
        store = open_store(folder)
        first = seal_of(store, fresh=True).key
        os.chmod(f"{folder}/.tmp", 0o777)
        os.seteuid(65534)
        try:
            assert seal_of(store, fresh=False).key != first
            assert os.stat(f"{folder}/{SEAL_KEY}").st_uid == 65534
        finally:
            os.seteuid(0)


def forge(night, how, seal):
    """A latent of the first clip as `how` makes it of its tensors and metadata, and no clip."""
    first, *_ = clips(night)
    store, key = open_store(night / "out"), f"{LATENTS}/{first[:2]}/{first}.safetensors"
    tensors, metadata = unsealed(store.get(key), key, seal_of(store, fresh=False))
    store.put(key, how(tensors, metadata, seal))
    path_of(night, first).unlink()
    return first, key


FORGED = {
    "other pixels": lambda t, m, seal: sealed({k: torch.flip(v, [-1]) * 0.9 for k, v in t.items()}, m, seal),
    "no list of texts": lambda t, m, seal: sealed(t, {**m, "fallbacks": "x"}, seal),
    "deep texts": lambda t, m, seal: sealed(t, {**m, "fallbacks": "[" * 100_000}, seal),
    "another kind": lambda t, m, seal: sealed(t, {**m, "kind": "Embedding"}, seal),
    "no kind": lambda t, m, seal: sealed(t, {name: said for name, said in m.items() if name != "kind"}, seal),
    "nothing": lambda t, m, seal: sealed({}, m, seal),
    "another shape": lambda t, m, seal: sealed({k: torch.zeros(1, 1, 1, 1) for k in t}, m, seal),
    "more tensors": lambda t, m, seal: sealed(t | {"image.0": torch.zeros(1)}, m, seal),
    "whole numbers": lambda t, m, seal: sealed({k: v.to(torch.int8) for k, v in t.items()}, m, seal),
    "NaN": lambda t, m, seal: sealed({k: v * float("nan") for k, v in t.items()}, m, seal),
    "noise": lambda t, m, seal: os.urandom(999),
    "a long header": lambda t, m, seal: (2**63).to_bytes(8, "little") + b'{"seal":"' + b"0" * 64 + b'"}',
}


@pytest.mark.parametrize("how", FORGED)
def test_a_latent_that_this_run_did_not_seal_is_made_again(how, night, whole):
    first, _ = forge(night, FORGED[how], Seal(b"guessed"))
    code, answer, printed = render(night, "--keep-latents")
    assert code == 0 and answer["rendered"] == 1
    assert_right(night, whole)
    row, = [row for row in rows(night).values() if row["clip_id"] == first]
    assert any("made again, not taken from the run folder" in note for note in row["notes"])


@pytest.mark.parametrize("how", [how for how in FORGED if how not in ("other pixels", "noise", "a long header")])
def test_a_sealed_latent_that_is_not_what_was_asked_for_fails_no_row(how, night, whole):
    forge(night, FORGED[how], seal_of(open_store(night / "out"), fresh=False))
    assert render(night, "--keep-latents")[1]["rendered"] == 1
    assert_right(night, whole)


def test_a_latent_that_was_found_is_used_and_the_ledger_says_so(night, whole):
    first, *_ = clips(night)
    path_of(night, first).unlink()
    assert render(night, "--keep-latents")[1]["rendered"] == 1
    assert_right(night, whole)
    row, = [row for row in rows(night).values() if row["clip_id"] == first]
    assert "its latent was found in the run folder" in row["notes"] and row["fallbacks"] == []


def test_latents_of_a_version_that_did_not_seal_are_made_again(night, whole):
    def unsealed_file(tensors, metadata, seal):
        return intermediates.pack(tensors, metadata | {"sha256": "0" * 64})

    forge(night, unsealed_file, Seal())
    assert render(night, "--keep-latents")[1]["rendered"] == 1
    assert_right(night, whole)


def test_with_a_key_of_the_drivers_own_nobody_who_can_write_the_folder_can_seal(tmp_path, whole, monkeypatch):
    monkeypatch.setenv(VARIABLE, "a key that lies with the driver")
    folder = begin(tmp_path)
    assert render(folder, "--keep-latents")[0] == 0 and not (folder / "out" / SEAL_KEY).exists()
    assert clips(folder) == clips(whole)
    (folder / "out" / SEAL_KEY).write_text("ab" * 32)
    monkeypatch.delenv(VARIABLE)                        # as somebody else has it: the key that lies in the folder
    theirs = seal_of(open_store(folder / "out"), fresh=False)
    monkeypatch.setenv(VARIABLE, "a key that lies with the driver")
    forge(folder, FORGED["other pixels"], theirs)
    assert render(folder, "--keep-latents")[0] == 0 and clips(folder) == clips(whole)
    monkeypatch.setenv(VARIABLE, "short")
    code, answer, _ = render(folder)
    assert code == 2 and "at least 16 characters" in answer["error"]


def test_what_lies_in_a_folder_before_its_run_begins_is_nobodys_key(whole, tmp_path):
    folder = begin(tmp_path)
    (folder / "out").mkdir()
    (folder / "out" / SEAL_KEY).write_text("ab" * 32)
    first, *_ = clips(whole)
    key = f"{LATENTS}/{first[:2]}/{first}.safetensors"
    store = open_store(whole / "out")
    tensors, metadata = unsealed(store.get(key), key, seal_of(store, fresh=False))
    open_store(folder / "out").put(key, FORGED["other pixels"](tensors, metadata, Seal(b"ab" * 32)))
    assert render(folder)[0] == 0 and clips(folder) == clips(whole)
    assert not (folder / "out" / SEAL_KEY).exists()          # nothing is left that it seals


def test_a_seal_does_not_show_its_key():
    assert "guess" not in repr(Seal(b"guess")) and "guess" not in f"{Seal(b'guess')}"


@pytest.mark.parametrize("how", ["whole numbers", "another width", "two streams", "NaN"])
def test_a_sealed_embedding_that_does_not_fit_is_made_again(how, tmp_path, whole, monkeypatch):
    """As a run leaves it that is stopped between encoding and sampling."""
    bent = {"whole numbers": lambda rows: {"video": rows.to(torch.int32)},
            "another width": lambda rows: {"video": rows[:, :5]}, "NaN": lambda rows: {"video": rows * float("nan")},
            "two streams": lambda rows: {"video": rows, "audio": rows}}[how]
    kept = intermediates.packed

    def forged(value, key, seal):
        bend = isinstance(value, Embedding)
        return kept(replace(value, prompt=bent(value.prompt["video"])) if bend else value, key, seal)

    folder = begin(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(intermediates, "packed", forged)
        patch.setattr("dailies.pipeline.run.intermediates.Restore.__call__",
                      lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _ = said("render", folder / "night.jsonl", "--out", folder / "out", "--model", "tiny", "--device", "cpu")
        assert code == 130 and list((folder / "out/embeddings").rglob("*.safetensors"))
    assert render(folder)[0] == 0 and clips(folder) == clips(whole)


# The other files.

RUN_FILES = {
    "nothing": b"", "no JSON": b"{", "deep": b"[" * 100_000, "a list": b"[]", "another's": b'{"mine": 1}',
    "only an identity": b'{"identity":{}}', "no identity": b'{"planned_rows":1}', "too large": b" " * (2**22 + 1),
    "no UTF-8": b'{"identity":{"model":"\xff"}}',
}
FIELDS = {
    "planned_rows": [None, "1", -1, 1.5, True, 10**30, [], float("nan")], "invalid_rows": [None, {}], "clips": ["x"],
    "buckets": [None, {}, [[]], [{}], [{"width": "\x1b[2J"}], [0] * 20_000], "more_buckets": [-1],
    "identity": [{"model": []}, {"model": {"a": 1}}, []], "chosen_because": [5, ["x"]],
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_json_that_is_none_is_one_sentence_with_its_name(name, night):
    (night / "out/run.json").write_bytes(RUN_FILES[name])
    for command in (["status", night / "out"], ["verify", night / "out"], ["verify", night / "out", "--repair"],
                    ["retry", night / "out"]):
        code, printed = said(*command)
        assert code == 5 and "run.json" in printed and len(printed.splitlines()) == 1, printed
    code, answer, _ = render(night)
    assert code in (2, 5) and "run.json" in answer["error"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_run_json_that_cannot_be_is_named(name, night):
    run = json.loads((night / "out/run.json").read_text())
    for value in FIELDS[name]:
        (night / "out/run.json").write_text(json.dumps(run | {name: value}))
        code, printed = said("status", night / "out")
        assert code == 5 and "run.json" in printed and len(printed) < 1000, (value, printed)


def part(**columns):
    sizes = {len(values) for values in columns.values()}
    rows = {"id": ["fox"], "seed": [1], "status": ["done"], "clip_id": ["ab" * 32], "sha256": ["cd" * 32], "bytes": [1],
            "width": [40], "height": [24], "frames": [5], "fps": [24.0]}
    count = sizes.pop() if sizes else 1
    return pa.table({**{name: values * count for name, values in rows.items()}, **columns})


PARTS = {
    "status of another type": part(status=[1]), "a status of no run": part(status=["\x1b[2J"]),
    "id of another type": part(id=[5]), "no id": part(id=pa.array([None], pa.string())), "an empty id": part(id=[""]),
    "a seed that is text": part(seed=["1"]), "a seed below 0": part(seed=[-1]),
    "clip_id of another type": part(clip_id=[b"\xff" * 32]), "bytes below 0": part(bytes=[-5]),
    "a size that is text": part(width=["40"]), "NaN frames per second": part(fps=[float("nan")]),
    "endless seconds": part(sample_s=[float("inf")]), "a time of no year": part(
        finished_at=pa.array([2**62], pa.timestamp("us", tz="UTC"))),
    "nested": part(worker=[{"a": 1}]), "fallbacks that are text": part(fallbacks=["x"]),
    "a column twice": pa.Table.from_arrays([pa.array(["fox"]), pa.array([1]), pa.array(["done"]), pa.array(["done"])],
                                           names=["id", "seed", "status", "status"]),
    "no status": part().drop_columns(["status"]),
    "text that is no UTF-8": part(prompt=pa.StringArray.from_buffers(1, *pa.array([b"\xff\xfe"]).buffers()[1:])),
    "many": part(prompt=pa.DictionaryArray.from_arrays(pa.array([0] * 300_000, pa.int32()), pa.array(["x" * 9_000]))),
}


OF_ANOTHER_TYPE = ["status of another type", "id of another type", "a seed that is text", "clip_id of another type",
                   "a size that is text", "nested", "fallbacks that are text", "a column twice", "no status",
                   "a status of no run", "no id", "an empty id", "a seed below 0"]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_ledger_that_cannot_be_is_named_by_whoever_reads_it(name, night):
    pq.write_table(PARTS[name], night / "out/ledger/000009-000000.parquet")
    for command in (["status", night / "out"], ["verify", night / "out"], ["retry", night / "out"]):
        code, printed = said(*command)
        assert code == 5 or name not in OF_ANOTHER_TYPE, printed
        assert code != 5 or "000009-000000.parquet cannot be read" in printed and len(printed) < 2000, printed
    with pytest.raises(StoreError, match="000009-000000.parquet cannot be read"):
        ledger.read(open_store(night / "out"))
    code, answer, _ = render(night)
    assert code == 5 and "000009-000000.parquet" in answer["error"] or name not in OF_ANOTHER_TYPE


def test_a_page_that_only_status_reads_is_checked_by_render_and_verify_too(night):
    """Else render ends well in a folder whose status cannot be told any more."""
    part, = (night / "out/ledger").iterdir()
    group = pq.read_metadata(part).row_group(0)
    chunk, = (group.column(at) for at in range(group.num_columns) if group.column(at).path_in_schema == "worker")
    data = bytearray(part.read_bytes())
    data[chunk.data_page_offset:chunk.data_page_offset + 8] = b"\xff" * 8
    part.write_bytes(data)
    for command in ("status", "verify"):
        assert ask(command, night / "out")[0] == 5
    code, answer, _ = render(night)
    assert code == 5 and part.name in answer["error"]


@pytest.mark.parametrize("clip_id", ["\x1b]0;pwn\x07\x1b[2J", "../../x", "", "x" * 64, "AB" * 32, None, "a/b", "\0"])
def test_a_clip_id_that_is_none_is_wrong_and_made_again(clip_id, night, whole):
    table = ledger.read(open_store(night / "out"))
    forged = table.set_column(table.schema.get_field_index("clip_id"), "clip_id",
                              pa.array([clip_id, *table["clip_id"].to_pylist()[1:]], pa.string()))
    pq.write_table(forged, night / "out/ledger/000009-000000.parquet")
    code, printed = said("verify", night / "out")
    assert code == 3 and "no clip has this name" in printed
    assert ask("status", night / "out")[0] == 0
    code, answer, _ = render(night, "--keep-latents")
    assert code == 0 and answer["adopted"] == 1
    assert_right(night, whole)


LEASES = [b"", b"{", b"[" * 100_000, b'{"id":"x"}', b"\xff" * 100, b"null", b" " * 2**17,
          json.dumps({"id": "\x1b[2J", "host": "\x1b[2J" * 9, "pid": 10**30, "machine": "", "process_start": "",
                      "released": True, "renewed_at": "2026-01-01T00:00:00",
                      "expires_at": "9999-12-31T23:59:59"}).encode()]


@pytest.mark.parametrize("number", range(len(LEASES)))
def test_a_lease_that_is_none_ends_in_no_traceback(number, night, monkeypatch):
    monkeypatch.setattr("dailies.pipeline.run.lease.Lease.LEASE_S", 0.0)
    monkeypatch.setattr("dailies.pipeline.run.lease.Lease.POLL_S", 0.0)
    (night / "out/lease.json").write_bytes(LEASES[number])
    code, printed = said("retry", night / "out")
    assert code == (5 if len(LEASES[number]) > 2**16 and LEASES[number][:1] != b"[" else code) and code in (0, 5)
    assert code == 0 or "lease.json" in printed


def test_a_success_file_is_never_read(night):
    path = night / "out/_SUCCESS.json"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)                            # a terabyte of nothing
    assert ask("status", night / "out")[1]["finished"] and render(night)[0] == 0


def test_names_of_parts_that_are_no_numbers_are_passed_over(night):
    for name in ("x", "9" * 5000 + "-0", "٣-000000", "-1"):
        if len(name) < 200:
            (night / f"out/ledger/{name}.txt").write_bytes(b"")
    store = open_store(night / "out")
    assert ledger.next_epoch(store) == 2
