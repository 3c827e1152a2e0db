"""A run folder into which somebody else has put links, pipes, devices and folders."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dailies.pipeline.store import StoreError, open_store

CLIP = f"clips/ab/ab{'0' * 62}.mp4"
PLACES = ["clips", "clips/ab", CLIP]


def uses(store, key):
    """Everything that a store does with a key, by name."""
    return {"create": lambda: store.create(key, b"ours"), "put": lambda: store.put(key, b"ours"),
            "swap": lambda: store.swap(key, b"theirs", b"ours"), "get": lambda: store.get(key),
            "head": lambda: store.head(key), "list": lambda: list(store.list("clips/")),
            "download": lambda: store.download(key, store.root.parent / "copy"), "delete": lambda: store.delete(key)}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    for name in (CLIP, "ab/" + CLIP.rpartition("/")[2], CLIP.rpartition("/")[2], "0" * 32, "file"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"theirs")
        os.utime(folder / name, (0, 0))
    return folder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_at_any_level_below_the_run_folder_is_neither_followed_nor_written_through(
        tmp_path, victim, place, absolute):
    store, before = open_store(tmp_path / "out"), tree(victim)
    target = victim / "file" if place == CLIP else victim
    link = tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(target if absolute else os.path.relpath(target, link.parent))
    for name, use in uses(store, CLIP).items():
        if place == CLIP and name in ("create", "put", "delete"):
            continue
        with pytest.raises(StoreError, match=f"{place} is a link.*Move it away"):
            use()
    # a name in a folder of ours: there is something, and it is replaced
    if place == CLIP:
        assert not store.create(CLIP, b"ours")
        store.put(CLIP, b"ours")
        assert store.get(CLIP) == b"ours" and not link.is_symlink()
        store.delete(CLIP)
    else:
        with pytest.raises(StoreError, match="is a link"):
            store.probe()
    assert tree(victim) == before


def test_names_of_temporary_files_behind_a_link_are_not_swept(tmp_path, victim):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.tmp").symlink_to(victim)
    for use in (open_store(tmp_path / "out").probe, lambda: open_store(tmp_path / "out").put("a", b"x")):
        with pytest.raises(StoreError, match=".tmp is a link"):
            use()
    assert (victim / ("0" * 32)).exists()


@pytest.mark.parametrize("planted", ["run.json", "lease.json", "ledger", "ledger/x.parquet", "embeddings", "latents/ab",
                                     "steps/zz", "clips/ab", "posters", "_SUCCESS.json"])
def test_a_run_does_not_begin_where_a_link_lies_in_its_way(tmp_path, victim, planted):
    link = tmp_path / "out" / planted
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    with pytest.raises(StoreError, match=f"{planted} is a link"):
        open_store(tmp_path / "out").probe()


def test_the_run_folder_itself_may_be_a_link_and_what_is_not_a_runs_is_left_alone(tmp_path, victim):
    (tmp_path / "disk/night").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/night")
    (tmp_path / "disk/night/notes").symlink_to(victim)
    store = open_store(tmp_path / "out")
    store.probe()
    assert store.create(CLIP, b"ours") and store.get(CLIP) == b"ours"
    assert (tmp_path / "disk/night" / CLIP).read_bytes() == b"ours"
    assert [info.key for info in store.list("clips")] == [CLIP]


def plant(kind, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    else:
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))     # /dev/zero, which never ends
        except PermissionError:
            pytest.skip("only root makes devices")


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a socket", "a device"])
def test_what_is_no_regular_file_is_told_and_not_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)                         # the address of a socket is short
    plant(kind, tmp_path / "out" / CLIP)
    store = open_store(tmp_path / "out")
    for name, use in uses(store, CLIP).items():
        if name in ("create", "put", "delete") or (name, kind) == ("list", "a folder"):
            continue
        with pytest.raises(StoreError, match=f"{CLIP} is {kind}"):
            use()
    assert not store.create(CLIP, b"ours")


@pytest.mark.parametrize("planted", ["run.json", "lease.json", "ledger/000001-000000.parquet", "ledger"])
def test_a_command_ends_where_a_pipe_lies_among_the_files_of_a_run(tmp_path, planted):
    """In a process of its own: what waits in open() would not be ended by Ctrl-C either."""
    (tmp_path / "out/ledger").mkdir(parents=True)
    (tmp_path / "out/run.json").write_text('{"identity": {}, "planned_rows": 1, "invalid_rows": 0, "clips": 1}')
    path = tmp_path / "out" / planted
    path.unlink() if path.is_file() else path.rmdir() if path.is_dir() else None
    os.mkfifo(path)
    code = "import sys; from dailies.pipeline.run import ledger, lease, run_json as runfile\n" \
           "from dailies.pipeline.store import open_store; s = open_store(sys.argv[1])\n" \
           "runfile.read_run(s); ledger.read(s); lease.Lease.take(s)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True,
                          timeout=60,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert done.returncode == 1 and f"StoreError: {tmp_path}/out: cannot" in done.stderr and "is a pipe" in done.stderr


def test_folders_that_lie_deeper_than_any_run_makes_them_are_not_walked(tmp_path):
    (tmp_path / "out/clips" / "/".join("d" * 1 for _ in range(60))).mkdir(parents=True)
    with pytest.raises(StoreError, match="folders lie 32 deep"):
        list(open_store(tmp_path / "out").list("clips/"))
