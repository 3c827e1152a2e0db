"""A run folder of which anything may have been changed: no traceback, no hang, no wrong "done", nothing outside of
it."""

import hashlib
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import within
from run_folders import ask, said
from test_run_folder import NUM_CLIPS, begin, clips, path_of, render, rows

from dailies.actors.clip_file import DIGEST_HEAD
from dailies.pipeline.run import saved_steps as steps
from dailies.pipeline.run.intermediates import sealed, unsealed
from dailies.pipeline.run.layout import SEAL_KEY
from dailies.pipeline.run.run import Run
from dailies.pipeline.run.saved_steps import PersistSampled
from dailies.pipeline.run.seal import seal_of
from dailies.pipeline.store import open_store

HANG_S = 60
STRANGE = [None, True, -1, 0, 2**63, 10**30, 0.5, float("nan"), "", "\x1b[2J", "x" * 10**5, "../../x", [], {}, [[]],
           "\ud800",
           "9999-12-31T23:59:59+00:00", {"a": {"b": []}}]
TARGETS = ["run.json", "manifests", "picks", "lease.json", "_SUCCESS.json", SEAL_KEY, "ledger", "clip",
           "clip without a ledger", "latent", "steps", "embedding"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of which everything was kept that lies in the folder on the way."""
    folder = begin(tmp_path_factory.mktemp("base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "SAVE_AFTER_S", 0.0)
        patch.setattr(PersistSampled, "forget", lambda *_: None)
        patch.setattr(Run, "clear", lambda *_: None)
        assert render(folder, "--keep-latents")[0] == 0
    row = next(iter(rows(folder).values()))
    pick = {name: row[name] for name in ("id", "seed", "clip_id")} | {"decision": "pick", "decided_at":
                                                                     "2026-11-30T08:15:00Z"}
    (folder / "picks.json").write_text(json.dumps({"format": 1, "picks": [pick]}))
    assert ask("pick", folder / "out", "--from", folder / "picks.json")[0] == 0
    kinds = {path.relative_to(folder / "out").parts[0] for path in (folder / "out").rglob("*") if path.is_file()}
    assert kinds == {"run.json", "lease.json", "_SUCCESS.json", SEAL_KEY, "manifests", "picks", "ledger", "clips",
                     "posters", "latents", "steps", "embeddings"}
    return folder


def bent(data, how):
    """Bytes changed, cut off, added, repeated, or others instead."""
    data = bytearray(data)
    kind = how.choice(["flip", "flip", "flip", "cut", "add", "zeros", "twice", "noise", "empty"])
    if kind == "flip":
        for _ in range(how.randint(1, 4)):
            data[how.randrange(len(data))] ^= how.randint(1, 255)
    elif kind == "cut":
        del data[how.randrange(len(data)):]
    elif kind == "add":
        at = how.randrange(len(data))
        data[at:at] = how.randbytes(how.randint(1, 99))
    elif kind == "zeros":
        at = how.randrange(len(data))
        data[at:at + 50] = bytes(len(data[at:at + 50]))
    elif kind == "twice":
        data += bytes(data)
    else:
        data = bytearray(how.randbytes(how.randint(1, 999)) if kind == "noise" else b"")
    return bytes(data)


def bent_json(data, how):
    """A value of it, at any depth, is another or gone."""
    whole = json.loads(data)
    here = whole
    while True:
        name = how.choice(list(here)) if isinstance(here, dict) else how.randrange(len(here))
        if isinstance(here[name], (dict, list)) and here[name] and how.random() < 0.7:
            here = here[name]
        elif how.random() < 0.2 and isinstance(here, dict):
            del here[name]
            break
        else:
            here[name] = how.choice(STRANGE)
            break
    return json.dumps(whole).encode("utf-8", "surrogatepass")


def bent_part(path, how):
    """A part with a column that is gone, of another type or with another value, or with rows twice."""
    table = pq.read_table(path)
    kind = how.choice(["value", "value", "value", "type", "drop", "twice", "name"])
    place = how.randrange(table.num_columns)
    if kind == "twice":
        table = pa.concat_tables([table, table])
    elif kind == "drop":
        table = table.remove_column(place)
    elif kind == "name":
        table = table.rename_columns([*table.column_names[:place], how.choice(table.column_names + ["\x1b[2J"]),
                                      *table.column_names[place + 1:]])
    else:
        value, field = how.choice(STRANGE), table.schema.field(place)
        values = table[place].to_pylist()
        values[how.randrange(len(values))] = value
        try:
            column = pa.array(values if kind == "value" else [value] * len(values), field.type if kind == "value"
                              else None)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeError):
            column = pa.nulls(len(values))
        table = table.set_column(place, field.name, column)
    pq.write_table(table, path)


def bent_tensors(path, store, how):
    """Sealed again with the run's key, so that it gets past the seal: other texts, other shapes, other types."""
    key = path.relative_to(store.root).as_posix()
    seal = seal_of(store, fresh=False)
    tensors, metadata = unsealed(path.read_bytes(), key, seal)
    name = how.choice(list(tensors))
    kind = how.choice(["text", "text", "shape", "type", "nan", "drop", "more"])
    if kind == "text":
        metadata[how.choice([*metadata, "new"])] = how.choice(["", "x", "[" * 9999, "-1", "1e9", "[1]", "\x1b[2J", "7"])
    elif kind == "shape":
        tensors[name] = how.choice([torch.zeros(1), torch.zeros(0, 3), torch.zeros(()), tensors[name].flatten(),
                                    tensors[name][None]])
    elif kind == "type":
        tensors[name] = tensors[name].to(how.choice([torch.int8, torch.bool, torch.int64]))
    elif kind == "nan":
        tensors[name] = tensors[name] * float("nan")
    elif kind == "drop":
        del tensors[name]
    else:
        tensors[how.choice(["0", "9", "stream.7", "x", name + "."])] = torch.zeros(2)
    path.write_bytes(sealed(tensors, metadata, seal))


def spoil(folder, target, how):
    """Change one object of the run folder, after removing what would keep it from being looked at."""
    out, (clip_id, *_) = folder / "out", clips(folder)
    if target in ("latent", "steps", "embedding"):
        path_of(folder, clip_id).unlink()
        gone = {"latent": [], "steps": ["latents"], "embedding": ["latents", "steps"]}[target]
        for name in gone:
            for path in (out / name).rglob("*.safetensors"):
                if path.stem == clip_id:
                    path.unlink()
        at = {"latent": "latents", "steps": "steps", "embedding": "embeddings"}[target]
        path = how.choice([path for path in sorted((out / at).rglob("*.safetensors"))
                           if target == "embedding" or path.stem == clip_id])
        if how.random() < 0.6:
            return bent_tensors(path, open_store(out), how)
    elif target in ("ledger", "picks"):
        path, = (out / target).iterdir()
        if how.random() < 0.6:
            return bent_part(path, how)
    elif target.startswith("clip"):
        path = path_of(folder, clip_id)
        if target != "clip":
            shutil.rmtree(out / "ledger")
        elif how.random() < 0.3:                        # with a digest that is right: only the ledger knows better
            data = bent(path.read_bytes()[:-56], how)
            path.write_bytes(data + DIGEST_HEAD + hashlib.sha256(data).digest())
            return None
    else:
        path = out / target
        if target == "manifests":
            path, = path.iterdir()
        if path.suffix == ".json" and how.random() < 0.6:
            path.write_bytes(bent_json(path.read_bytes(), how))
            return None
    path.write_bytes(bent(path.read_bytes(), how))
    return None


def outside(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")
            if "out" not in path.relative_to(folder).parts}


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_whatever_lies_in_the_run_folder_there_is_a_sentence_or_the_right_clips(count, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dailies.pipeline.run.lease.Lease.LEASE_S", 0.0)        # what is no lease is waited for
    monkeypatch.setattr("dailies.pipeline.run.lease.Lease.POLL_S", 0.0)
    codes = {}

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(TARGETS), st.integers(0, 2**32))
    def check(target, number):
        folder = tmp_path / "night"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        spoil(folder, target, random.Random(number))
        before = outside(tmp_path)
        with within(HANG_S):
            assert said("status", folder / "out")[0] in (0, 5)
            seen, printed = said("verify", folder / "out")
            assert seen in (0, 3, 5) and len(printed) < 20_000
            code, answer, _ = render(folder, "--keep-latents")
            assert code in (0, 2, 3, 5), answer
            codes[code] = codes.get(code, 0) + 1
            # equal in size, or in the ledger's own words
            if code == 0 and said("verify", folder / "out")[0] == 3:
                assert target in ("ledger", "clip")
                said("verify", folder / "out", "--repair")
                assert render(folder, "--keep-latents")[0] == 0
            if code == 0:
                assert said("verify", folder / "out")[0] == 0 and clips(folder) == clips(base)
                assert ask("status", folder / "out")[1]["done"] == NUM_CLIPS
            assert target != "picks" or said("redo", folder / "out", "--picks")[0] in (0, 5)
            assert code in (0, 3) or target in ("run.json", "manifests", "lease.json", "ledger"), (target, answer)
            assert code != 3 or target == "ledger", (target, answer)         # only there it may say that a row failed
        assert outside(tmp_path) == before

    check()
    assert codes[0] > count / 2, codes
