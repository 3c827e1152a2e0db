"""A store of another kind is one file of its own and one line that names its scheme: added here, in a package that is
not ours, and a run lives in it as in a folder."""

import hashlib
import sys
from dataclasses import dataclass
from importlib import import_module

import pytest

from dailies.actors.messages import Clip
from dailies.model.catalog import CATALOG
from dailies.pipeline import store as stores
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.plan import Plan
from dailies.pipeline.run import layout, ledger
from dailies.pipeline.run.run import Run
from dailies.pipeline.stages import Stage, Step, run_local
from dailies.pipeline.store import Store, StoreError, open_store, register_store

MEMORY = '''
import threading
import time
from pathlib import Path

from dailies.pipeline.store.base import NotFound, ObjectInfo, Store, refuse_too_large, checked_key, sha256_of

OBJECTS, LOCK = {}, threading.Lock()


class MemoryStore(Store):
    """For as long as the process lives."""

    def __init__(self, uri):
        self.uri = uri

    def at(self, key):
        return f"{self.uri}/{checked_key(key)}"

    def create(self, key, data, *, metadata=None):
        with LOCK:
            known = len(OBJECTS)
            OBJECTS.setdefault(self.at(key), (self.read(data), time.time()))
            return len(OBJECTS) > known

    def put(self, key, data, *, metadata=None, private=False):
        OBJECTS[self.at(key)] = self.read(data), time.time()

    def swap(self, key, old, new, *, atomic=True, metadata=None):
        with LOCK:
            if OBJECTS.get(self.at(key), (None,))[0] != old:
                return False
            OBJECTS[self.at(key)] = new, time.time()
            return True

    def can_swap(self):
        return True

    def get(self, key, *, at_most=None):
        if self.at(key) not in OBJECTS:
            raise NotFound(f"{self.at(key)}: no such object")
        data, _ = OBJECTS[self.at(key)]
        refuse_too_large(len(data), at_most)
        return data

    def download(self, key, path):
        path.write_bytes(self.get(key))

    def head(self, key):
        return next((info for info in self.list(key) if info.key == key), None)

    def list(self, prefix=""):
        for name, (data, at) in sorted(OBJECTS.items()):
            if (key := name.removeprefix(f"{self.uri}/")).startswith(prefix) and key != name:
                yield ObjectInfo(key=key, num_bytes=len(data), modified_s=at, sha256=sha256_of(data))

    def delete(self, key):
        OBJECTS.pop(self.at(key), None)

    @staticmethod
    def read(data):
        return data.read_bytes() if isinstance(data, Path) else data
'''


@dataclass
class Pretend:
    """Publishes the clip_id as the clip's file."""

    store: Store

    def __call__(self, batch):
        return [self.publish(request) for request in batch]

    def publish(self, request):
        key, data = layout.clip_key(request.clip_id), request.clip_id.encode()
        assert self.store.create(key, data)
        return Clip(request=request, uri=self.store.uri_of(key), sha256=hashlib.sha256(data).hexdigest(),
                    num_bytes=len(data), duration_s=1.0)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "OPENERS", dict(stores.OPENERS))
    (tmp_path / "of_somebody").mkdir()
    (tmp_path / "of_somebody/__init__.py").write_text("")
    (tmp_path / "of_somebody/memory.py").write_text(MEMORY)
    monkeypatch.syspath_prepend(tmp_path)
    register_store("memory", import_module("of_somebody.memory").MemoryStore)
    yield open_store("memory://a/night")
    for name in ("of_somebody", "of_somebody.memory"):
        sys.modules.pop(name)


def test_a_run_lives_in_a_store_of_another_kind(memory):
    def made():
        run = Run.of(memory, plan)
        run.begin()
        with run.open() as bookkeeper:
            for requests, _ in bookkeeper.rounds():
                for outcome in run_local([Stage(name="publish", steps=(Step(actor=Pretend, args={"store": memory}),))],
                                         requests):
                    bookkeeper.record(outcome)
        return bookkeeper

    plan = Plan.make(Manifest.read((), prompts=("a red circle", "a blue square")), CATALOG["demo"],
                     weights_fingerprint="of a test", precision="fp32", attention="dense")
    first = made()
    assert (first.num_rendered, first.counts()) == (2, {"rows": 2, "done": 2, "failed": 0, "pending": 0})
    table = ledger.read(memory)
    assert sorted(table["clip_id"].to_pylist()) == sorted(request.clip_id for request in plan.requests())
    assert all(memory.get(path).decode() in path for path in table["path"].to_pylist())
    assert memory.head(layout.SUCCESS) is not None
    assert {info.key.split("/")[0] for info in memory.list()} <= layout.TOP
    before = {info.key: info.sha256 for info in memory.list() if info.key != layout.LEASE}
    assert made().num_rendered == 0                     # all is there: the same command, and nothing is made twice
    assert {info.key: info.sha256 for info in memory.list() if info.key != layout.LEASE} == before


def test_a_scheme_that_is_taken_or_could_be_a_path_is_refused(memory):
    for scheme in ("memory", "s3", "file", "a/b", "GS", ""):
        with pytest.raises(ValueError, match="a store's scheme must be small letters and digits"):
            register_store(scheme, type(memory))
    with pytest.raises(StoreError, match="expected a local folder or s3://bucket/prefix"):
        open_store("nowhere://x")
