"""What is fetched from a bucket lies where nobody else on the machine can write, plant a link or be believed."""

import os

import pytest

from dailies.model.private import NotAFile, NotPrivate, cache_folder, lock_folder, open_regular, private_folder
from dailies.pipeline.store import NotFound, StoreError, open_store
from dailies.pipeline.store.fetch import bring


@pytest.fixture
def bucket(s3_bucket):
    return open_store(s3_bucket)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dailies"


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_bring_downloads_what_has_changed_and_nothing_else(bucket, s3_bucket, tmp_path):
    for key in ("weights/dit/a.safetensors", "weights/dit/b.safetensors", "weights-old/c"):
        bucket.put(key, key.encode())
    folder = bring(f"{s3_bucket}/weights/", tmp_path)
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["dit/a.safetensors", "dit/b.safetensors"]
    assert (folder / "dit/a.safetensors").read_bytes() == b"weights/dit/a.safetensors"

    bucket.delete("weights/dit/a.safetensors")
    bucket.put("weights/dit/b.safetensors", b"another size")
    assert bring(f"{s3_bucket}/weights", tmp_path) == folder
    assert (folder / "dit/b.safetensors").read_bytes() == b"another size"
    assert not (folder / "dit/a.safetensors").exists()
    before = (folder / "dit/b.safetensors").stat().st_ino
    bring(f"{s3_bucket}/weights", tmp_path)
    assert (folder / "dit/b.safetensors").stat().st_ino == before


def test_bring_takes_one_object_or_a_local_path(bucket, s3_bucket, tmp_path):
    bucket.put("in/prompts.parquet", b"rows")
    bucket.put("in/prompts.parquet.bak", b"old")
    path = bring(f"{s3_bucket}/in/prompts.parquet", tmp_path)
    assert path.name == "prompts.parquet" and path.read_bytes() == b"rows"
    assert bring(tmp_path / "local", tmp_path) == tmp_path / "local"
    with pytest.raises(NotFound, match="no such object, and nothing below it"):
        bring(f"{s3_bucket}/in/prompts", tmp_path)


def test_content_of_the_same_size_and_time_is_told_by_its_etag(bucket, s3_bucket, tmp_path):
    bucket.put("weights/a.safetensors", b"before")
    path = bring(f"{s3_bucket}/weights", tmp_path) / "a.safetensors"
    when = path.stat().st_mtime_ns
    bucket.put("weights/a.safetensors", b"after.")
    os.utime(path, ns=(when, when))
    assert (bring(f"{s3_bucket}/weights", tmp_path) / "a.safetensors").read_bytes() == b"after."


def test_a_file_that_this_program_did_not_download_is_neither_believed_nor_removed(bucket, s3_bucket, tmp_path):
    bucket.put("weights/a.safetensors", b"true")
    folder = bring(f"{s3_bucket}/weights", tmp_path)
    when = (folder / "a.safetensors").stat()
    (folder / "a.safetensors").write_bytes(b"fake")                  # the same size, and then the same time
    os.utime(folder / "a.safetensors", ns=(when.st_atime_ns, when.st_mtime_ns))
    (folder / "thesis.txt").write_text("mine")
    bring(f"{s3_bucket}/weights", tmp_path)
    assert (folder / "a.safetensors").read_bytes() == b"true" and (folder / "thesis.txt").read_text() == "mine"
    (folder / "a.safetensors").write_bytes(b"mine too")
    bucket.delete("weights/a.safetensors")
    bucket.put("weights/b.safetensors", b"new")
    bring(f"{s3_bucket}/weights", tmp_path)
    assert files_of(folder) == ["a.safetensors", "b.safetensors", "thesis.txt"]


@pytest.mark.parametrize("where", [".", "weights", "weights/dit", ".weights.lock"])
def test_no_link_in_the_cache_is_followed(where, bucket, s3_bucket, tmp_path):
    """Planted before the first download, or between two; at the folder's place, above it, below it, as its lock."""
    bucket.put("weights/dit/a.safetensors", b"ours")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "bashrc").write_text("theirs")
    folder = bring(f"{s3_bucket}/weights", tmp_path / "there")
    place = folder.parent / where
    place.rename(tmp_path / "away")
    place.symlink_to(victim / "bashrc" if where == ".weights.lock" else victim)
    bucket.put("weights/dit/a.safetensors", b"changed")
    with pytest.raises(StoreError, match="cannot be kept in the cache"):
        bring(f"{s3_bucket}/weights", tmp_path / "there")
    assert files_of(victim) == ["bashrc"] and (victim / "bashrc").read_text() == "theirs"


def test_a_key_that_is_no_path_is_refused(bucket, s3_bucket, tmp_path):
    bucket.client.put_object(Bucket=bucket.bucket, Key=f"{bucket.base}weights/a//b", Body=b"x")
    with pytest.raises(StoreError, match="'a//b' is not a key that can become a file's path"):
        bring(f"{s3_bucket}/weights", tmp_path)


def test_folders_are_made_for_this_user_alone_whatever_the_umask(tmp_path, cache):
    before = os.umask(0)
    try:
        private_folder(cache / "weights/host", below=cache)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (cache, cache / "weights", cache / "weights/host")] == [0o700] * 3
    cache.chmod(0o755)                                  # as earlier versions made it
    private_folder(cache)
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("plant, said", [
    (lambda path, other: path.symlink_to(other), "it is a link"),
    (lambda path, other: path.write_text(""), "it is a file"),
    (lambda path, other: os.mkfifo(path), "it is a pipe"),
    (lambda path, other: (path.mkdir(), path.chmod(0o777)), "everybody may write to it"),
    (lambda path, other: (path.mkdir(), os.chown(path, 65534, 65534)), "user 65534 has made it"),
])
def test_what_somebody_else_may_have_planted_is_not_taken(plant, said, tmp_path):
    (tmp_path / "other").mkdir()
    try:
        plant(tmp_path / "name", tmp_path / "other")
    except PermissionError:
        pytest.skip("only root can give a folder to another user")
    with pytest.raises(NotPrivate, match=said):
        private_folder(tmp_path / "name")


def test_a_user_without_a_home_has_a_cache_of_his_own(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"dailies-{os.geteuid()}" and private_folder(cache_folder())


def test_locks_lie_in_the_cache_where_somebody_has_taken_the_name_in_the_temporary_folder(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"dailies-{os.geteuid()}").symlink_to(tmp_path)
    assert lock_folder().parent == cache and lock_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("make, said", [
    (os.mkfifo, "it is a pipe"), (os.mkdir, "it is a folder"), (lambda path: path.symlink_to("/dev/zero"), "a device"),
    (lambda path: path.symlink_to(path), "Too many levels"), (lambda path: None, "No such file")])
def test_only_regular_files_are_opened_and_nothing_is_waited_for(make, said, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(OSError, match=said):
        open_regular(tmp_path / "x")
    with pytest.raises(NotAFile):
        open_regular(tmp_path / "a\0b")
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"1"
