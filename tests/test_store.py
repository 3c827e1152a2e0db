"""Stores keep their promises: in a folder, and in a bucket of a real S3 server that fails on demand."""

import errno
import fcntl
import hashlib
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dailies.jobs.settings import RenderJob
from dailies.pipeline.store import NotFound, S3Store, StoreError, folder, open_store
from dailies.pipeline.store.base import Patience

KEY = "clips/ab/abcd.mp4"


@pytest.fixture
def store(store_uri):
    return open_store(store_uri)


@pytest.fixture
def bucket(s3_bucket):
    return open_store(s3_bucket)


def keys(store, prefix=""):
    return [info.key for info in store.list(prefix)]


def test_an_object_is_created_once_and_then_left_alone(store):
    assert store.create(KEY, b"mine")
    assert not store.create(KEY, b"theirs")
    assert not store.create(KEY, b"mine")               # another call, even with the same content
    assert store.get(KEY) == b"mine"


def test_of_eight_racing_writers_exactly_one_wins(store):
    copies = [pickle.loads(pickle.dumps(store)) for _ in range(8)]
    barrier = threading.Barrier(8)

    def write(writer, round_):
        barrier.wait(30)
        return copies[writer].create(f"race/{round_}", b"%d" % writer * 1000)

    with ThreadPoolExecutor(8) as pool:
        for round_ in range(5):
            won = list(pool.map(write, range(8), [round_] * 8))
            assert sum(won) == 1
            assert store.get(f"race/{round_}") == b"%d" % won.index(True) * 1000


def test_of_eight_racing_swaps_exactly_one_wins(store):
    assert store.can_swap() and keys(store) == []
    copies = [pickle.loads(pickle.dumps(store)) for _ in range(8)]
    barrier = threading.Barrier(8)
    store.create("lease.json", b"0")

    def swap(writer, round_):
        old = store.get("lease.json")
        barrier.wait(30)
        return copies[writer].swap("lease.json", old, b"%d by %d" % (round_, writer))

    with ThreadPoolExecutor(8) as pool:
        for round_ in range(5):
            won = list(pool.map(swap, range(8), [round_] * 8))
            assert sum(won) == 1
            assert store.get("lease.json") == b"%d by %d" % (round_, won.index(True))
    assert not store.swap("lease.json", b"0", b"late") and not store.swap("nothing", b"0", b"late")
    assert keys(store) == ["lease.json"]


def test_a_swap_that_is_stored_and_then_answered_with_an_error_is_ours(bucket, s3_server):
    bucket.create("lease.json", b"0")
    s3_server.fault(method="PUT", match="lease.json", status=500, after=True)
    assert bucket.swap("lease.json", b"0", b"1") and bucket.get("lease.json") == b"1"


def test_a_bucket_without_compare_and_swap_is_found_out(bucket, s3_server):
    s3_server.fault(method="PUT", match="probe-", header="If-Match", status=501)
    assert not bucket.can_swap() and keys(bucket) == []
    s3_server.fault(method="PUT", match="probe-", header="If-Match", strip="If-Match")
    assert not bucket.can_swap() and keys(bucket) == []
    bucket.create("lease.json", b"0")
    assert bucket.swap("lease.json", b"0", b"1", atomic=False)


def test_where_nothing_can_be_swapped_atomically_it_is_replaced_all_the_same(bucket, s3_server, tmp_path, monkeypatch):
    s3_server.fault(method="PUT", match="probe-", header="If-Match", status=400, code="InvalidArgument")
    bucket.create(KEY, b"old")
    assert bucket.replace(KEY, b"old", b"new") and bucket.get(KEY) == b"new" and keys(bucket) == [KEY]

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = open_store(tmp_path / "out")
    folder.create(KEY, b"old")
    assert folder.replace(KEY, b"old", b"new") and folder.get(KEY) == b"new"
    assert not folder.replace(KEY, b"old", b"newer") and folder.get(KEY) == b"new"


def test_put_replaces_get_reads_and_delete_forgets(store):
    store.put("run.json", b"old")
    store.put("run.json", b"new")
    assert store.get("run.json") == b"new"
    store.delete("run.json")
    store.delete("run.json")
    assert store.head("run.json") is None
    with pytest.raises(NotFound, match="run.json: no such object"):
        store.get("run.json")


def test_a_file_is_streamed_in_and_out(store, tmp_path):
    data = os.urandom(9_000_000)
    (tmp_path / "source").write_bytes(data)
    assert store.create("a", tmp_path / "source")
    store.put("b", tmp_path / "source")
    for key in "ab":
        store.download(key, tmp_path / "deep" / "copy")
        assert (tmp_path / "deep" / "copy").read_bytes() == data
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]
    with pytest.raises(NotFound):
        store.download("c", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_head_knows_size_and_hash(store):
    store.create(KEY, b"12345", metadata={"clip-id": "abcd"})
    info = store.head(KEY)
    assert (info.key, info.num_bytes, info.sha256) == (KEY, 5, hashlib.sha256(b"12345").hexdigest())
    assert abs(info.modified_s - time.time()) < 60


def test_a_list_is_sorted_and_complete_and_shows_nothing_else(store):
    names = ["a-b", "a.b", "a/b", "a/c/d", "a0", "b/c"]
    for name in reversed(names):
        store.put(name, b"x")
    want = sorted(names)
    assert keys(store) == want
    assert keys(store, "a/") == ["a/b", "a/c/d"]
    assert keys(store, "a/c") == ["a/c/d"]
    assert keys(store, "nothing/here/") == []
    assert [info.num_bytes for info in store.list()] == [1] * len(want)


def test_uri_of_a_key_opens_that_object(store, store_uri):
    store.put("ledger/1", b"x")
    assert store.uri_of("ledger/1") == f"{store_uri}/ledger/1"
    assert keys(open_store(store.uri_of("ledger"))) == ["1"]


@pytest.mark.parametrize("key", ["../a", "a/../b", "/a", "a//b", "", "a/./b", "a\0b", "a\\..\\b", "a/"])
def test_no_key_leaves_the_store(store, key, tmp_path):
    with pytest.raises(ValueError, match="relative path"):
        store.create(key, b"x")
    with pytest.raises(ValueError, match="relative path"):
        store.put(key, b"x")


def test_the_probe_leaves_nothing_behind(store):
    store.probe()
    assert keys(store) == []


def test_a_store_travels_without_credentials(bucket):
    bucket.put("a", b"x")
    pickled = pickle.dumps(bucket)
    assert b"testing" not in pickled and b"tester" not in pickled
    assert pickle.loads(pickled).get("a") == b"x"


def test_a_travelled_store_goes_to_the_same_server_and_uses_the_credentials_it_finds(bucket, monkeypatch):
    bucket.put("a", b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert pickle.loads(pickle.dumps(bucket)).get("a") == b"x"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    with pytest.raises(StoreError, match="refuses the credentials"):
        pickle.loads(pickle.dumps(bucket)).get("a")


def test_a_write_that_was_stored_and_then_answered_with_an_error_is_ours(bucket, s3_server):
    s3_server.fault(method="PUT", match="clips/", status=500, after=True)
    assert bucket.create(KEY, b"mine")                  # its own retry met 412
    s3_server.fault(method="PUT", match="clips/", drop=True, after=True)
    assert bucket.create(KEY + "2", b"mine")
    assert [fault["times"] for fault in s3_server.faults()] == [0, 0]
    assert bucket.get(KEY) == bucket.get(KEY + "2") == b"mine"


def test_an_error_after_somebody_elses_write_does_not_make_it_ours(bucket, s3_server):
    assert bucket.create(KEY, b"theirs")
    s3_server.fault(method="PUT", match="clips/", status=500, after=True)
    assert not bucket.create(KEY, b"theirs")
    assert bucket.get(KEY) == b"theirs"


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 500}, {"drop": True}, {"status": 409}], ids=str)
def test_a_busy_or_broken_store_is_waited_for(bucket, s3_server, monkeypatch, fault, caplog):
    bucket.put("before", b"x")                          # a store that has answered once is known to be there
    monkeypatch.setattr(S3Store, "ATTEMPTS", 1)
    monkeypatch.setattr(S3Store, "WAIT_S", 0.05)
    bucket = pickle.loads(pickle.dumps(bucket))
    for method in ("PUT", "GET", "HEAD", "DELETE"):
        s3_server.fault(method=method, times=4, **fault)
    assert bucket.create(KEY, b"mine")
    assert bucket.get(KEY) == b"mine"
    assert bucket.head(KEY).num_bytes == 4
    bucket.delete(KEY)
    assert [fault["times"] for fault in s3_server.faults()] == [0] * 4
    assert keys(bucket) == ["before"]
    assert "trying again" in caplog.text                # never in silence


@pytest.mark.parametrize("cut", [0, 100])
def test_a_read_that_breaks_off_is_made_again(bucket, s3_server, monkeypatch, tmp_path, cut):
    content = bytes(range(256)) * 8
    bucket.put("a", content)
    monkeypatch.setattr(S3Store, "WAIT_S", 0.05)

    def downloaded() -> bytes:
        bucket.download("a", tmp_path / "a")
        return (tmp_path / "a").read_bytes()

    for read, want in ((lambda: bucket.get("a"), content), (downloaded, content), (lambda: keys(bucket), ["a"])):
        s3_server.fault(method="GET", cut=cut, times=5, kind=f"cut {cut}")
        assert read() == want
        assert s3_server.counts()["struck"][f"cut {cut}"] % 5 == 0
        s3_server.heal()


def test_expired_credentials_are_told_and_nothing_is_stored(bucket, s3_server):
    s3_server.fault(method="*", status=403, code="ExpiredToken", times=2)
    with pytest.raises(StoreError, match="credentials have expired.*the same command continues"):
        bucket.put("a", b"x")
    with pytest.raises(StoreError, match="credentials have expired"):
        bucket.get("a")
    assert keys(bucket) == []


def test_botocore_itself_retries_a_burst(bucket, s3_server, caplog):
    s3_server.fault(method="PUT", status=503, times=2)
    assert bucket.create(KEY, b"mine")
    assert s3_server.faults()[0]["times"] == 0 and not caplog.records


def test_what_one_thread_waits_for_the_store_is_not_ended_by_anothers_success():
    patience, mine = Patience(), threading.get_ident()
    patience.begin()
    with ThreadPoolExecutor(1) as other:
        other.submit(patience.end).result()             # of a call that went through at once
        other.submit(patience.begin).result()
        theirs = other.submit(threading.get_ident).result()
        time.sleep(0.05)
        other.submit(patience.end).result()
    waited_s = patience.seconds(mine)
    assert waited_s >= 0.05 and 0.05 <= patience.seconds(theirs) <= waited_s
    patience.end()
    assert patience.seconds(mine) == patience.seconds(mine) >= waited_s
    assert patience.in_all_s() == pytest.approx(patience.seconds(mine) + patience.seconds(theirs))


def test_patience_ends(bucket, s3_server, monkeypatch):
    monkeypatch.setattr(S3Store, "ATTEMPTS", 1)
    monkeypatch.setattr(S3Store, "PATIENCE_S", 0)
    s3_server.fault(method="PUT", status=503, times=1)
    with pytest.raises(StoreError, match="cannot write: 503 SlowDown"):
        bucket.create(KEY, b"x")


def test_a_server_that_comes_back_is_used_again(bucket, s3_server, monkeypatch):
    bucket.put("a", b"before")
    monkeypatch.setattr(S3Store, "WAIT_S", 0.2)
    s3_server.stop()
    restart = threading.Timer(1.0, s3_server.start)
    restart.start()
    bucket.put("a", b"after")
    restart.join()
    assert bucket.get("a") == b"after"


def test_a_store_that_ignores_the_condition_is_refused(bucket, s3_server):
    s3_server.fault(method="PUT", match="probe", times=2, strip="If-None-Match")
    with pytest.raises(StoreError, match="ignores If-None-Match.*Use a store with conditional writes"):
        bucket.probe()
    assert keys(bucket) == []


@pytest.mark.parametrize("status, code",
                         [(409, "ObjectAlreadyExists"), (403, "FileAlreadyExists"), (400, "InvalidRequest"),
                                          (304, "NotModified")])
def test_a_store_that_says_exists_in_other_words_is_told_from_a_busy_one(
        bucket, s3_server, monkeypatch, status, code):
    """The probe knows what it has just written. A conflict may be one for a moment, and nothing waits a quarter
    hour."""
    monkeypatch.setattr(S3Store, "WAIT_S", 0.05)
    monkeypatch.setattr(S3Store, "SETTLE_S", 0.2)
    s3_server.fault(method="PUT", match="probe", times=1000, status=status, code=code, after=True, on=412)
    with pytest.raises(StoreError,
                       match=f"answers {status} {code if status != 304 else ''}.*If-None-Match: . answered with 412"):
        bucket.probe()
    assert keys(bucket) == [] and not bucket.can_swap() and keys(bucket) == []


def test_a_refusal_in_the_body_of_a_success_and_a_conflict_of_a_moment_are_understood(bucket, s3_server, monkeypatch):
    monkeypatch.setattr(S3Store, "WAIT_S", 0.05)
    monkeypatch.setattr(S3Store, "ATTEMPTS", 1)
    s3_server.fault(method="PUT", match="probe", times=1000, status=200, code="PreconditionFailed", after=True, on=412)
    bucket.probe()
    s3_server.heal()
    s3_server.fault(method="PUT", match="probe", times=2, status=409, after=True, on=412)
    bucket.probe()
    assert bucket.can_swap()


def test_a_store_without_conditional_writes_is_refused(bucket, s3_server):
    s3_server.fault(method="PUT", match="probe", status=501, code="NotImplemented")
    with pytest.raises(StoreError, match="does not know conditional writes"):
        bucket.probe()


@contextmanager
def only_virtual_hosts(monkeypatch, tmp_path, config, **environment):
    """A store that knows http://BUCKET.oss.test alone, behind a proxy on loopback; what hosts it was asked for."""
    hosts = []

    class Store(BaseHTTPRequestHandler):
        def do_GET(self):
            hosts.append(self.headers["Host"])
            there = self.headers["Host"].startswith("night.")
            body = b"<Error><Code>NoSuchKey</Code></Error>" if there else \
                b"<Error><Code>SecondLevelDomainForbidden</Code>" \
                b"<Message>Please use virtual hosted style.</Message></Error>"
            self.send_response(404 if there else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    (tmp_path / "config").write_text(config)
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                            "AWS_ENDPOINT_URL": "http://oss.test", "AWS_ACCESS_KEY_ID": "k", "AWS_REGION": "us-east-1",
                            "AWS_SECRET_ACCESS_KEY": "s", "HTTP_PROXY": f"http://127.0.0.1:{server.server_port}",
                            **environment}.items():
            monkeypatch.setenv(name, value)
        yield hosts
        server.shutdown()


VIRTUAL = "region = us-east-1\ns3 =\n    addressing_style = virtual\n"


@pytest.mark.parametrize("config, environment", [
    (f"[default]\n{VIRTUAL}", {}), (f"[default]\n[profile oss]\n{VIRTUAL}", {"AWS_PROFILE": "oss"}),
    (f"[default]\n{VIRTUAL}services = ours\n[services ours]\ns3 =\n    endpoint_url = http://oss.test\n",
     {"AWS_ENDPOINT_URL": "", "AWS_ENDPOINT_URL_S3": ""})], ids=["default", "profile", "services"])
def test_the_users_aws_configuration_says_how_a_bucket_is_addressed(tmp_path, monkeypatch, config, environment):
    with only_virtual_hosts(monkeypatch, tmp_path, config, **environment) as hosts:
        for name in environment:
            monkeypatch.delenv(name) if not environment[name] else None
        store = open_store("s3://night/run")
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)       # a worker elsewhere has no such file
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        for each in (store, pickle.loads(pickle.dumps(store))):
            with pytest.raises(NotFound):
                each.get("run.json")
    assert set(hosts) == {"night.oss.test"}


def test_a_store_that_wants_the_bucket_in_the_hosts_name_is_explained(tmp_path, monkeypatch):
    with only_virtual_hosts(monkeypatch, tmp_path, "") as hosts:
        with pytest.raises(StoreError,
                           match="bucket in the host's name .SecondLevelDomainForbidden.*addressing_style = virt"):
            open_store("s3://night/run").get("run.json")
    assert hosts == ["oss.test"]


@pytest.mark.parametrize("code", ["SecondLevelDomainForbidden", "PathStyleDomainForbidden", "InvalidPathAccess"])
def test_what_stores_say_of_a_path_style_is_known(code):
    assert "addressing_style = virtual" in S3Store("night", "", None, None).advice("read", 403, code)


def test_attempts_checksums_and_endpoints_are_the_users_where_they_say_so(tmp_path, monkeypatch):
    config = f"[default]\n{VIRTUAL}    payload_signing_enabled = false\nmax_attempts = 7\nretry_mode = adaptive\n" \
             "response_checksum_validation = when_supported\n"
    with only_virtual_hosts(monkeypatch, tmp_path, config, AWS_MAX_ATTEMPTS="9"):
        found = open_store("s3://night/run").client.meta.config
        assert found.retries["total_max_attempts"] == 9 and found.retries["mode"] == "adaptive"
        assert found.request_checksum_calculation == "when_required"
        assert found.response_checksum_validation == "when_supported"
        assert found.s3["payload_signing_enabled"] is False and found.s3["addressing_style"] == "virtual"
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://bucket.vpce-1a2b.s3.us-east-1.vpce.amazonaws.com")
        store = open_store("s3://night/run")
        assert "vpce-1a2b" in store.endpoint_url and store.is_amazon
        for url, kept in (("https://s3.eu-west-1.amazonaws.com", False), ("https://s3.us-west-2.amazonaws.com", False),
                          ("https://s3.dualstack.us-west-2.amazonaws.com", True)):
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            assert open_store("s3://night/run").endpoint_url == (url if kept else None)
        (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = sideways\n")
        with pytest.raises(StoreError,
                           match="AWS settings of this machine are not usable: .*style sideways is invalid"):
            open_store("s3://night/run")


@pytest.mark.parametrize("scheme", ["S3", "s3a", "S3A", "s3n"])
def test_every_spelling_of_s3_is_one_store(scheme, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert open_store(f"{scheme}://night/run").uri == "s3://night/run"
    job = RenderJob(manifest=f"{scheme}://b/m.parquet", out=f"{scheme}://night/run", weights=f"{scheme}://b/w")
    assert (job.manifest, job.out, job.weights) == ("s3://b/m.parquet", "s3://night/run", "s3://b/w")


@pytest.mark.parametrize("setting, message", [
    ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "refuses the credentials .* Check AWS_ACCESS_KEY_ID"),
    ({"AWS_ACCESS_KEY_ID": "nobody:nobody"}, "refuses the credentials .* Check AWS_ACCESS_KEY_ID"),
    ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no S3 credentials were found. Set AWS_ACCESS_KEY_ID"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "127.0.0.1:1 does not answer .* Check the network and AWS_ENDPOINT"),
    ({"AWS_ENDPOINT_URL": "http://me:hunter2@127.0.0.1:1"}, "AWS_ENDPOINT_URL holds a user name or password"),
    ({"AWS_ENDPOINT_URL": "http://me:hunter2@bad host"},
     "settings of this machine are not usable|AWS_ENDPOINT_URL holds"),
    ({"AWS_PROFILE": "nightly"}, "settings of this machine are not usable: .*nightly"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_wrong_settings_are_explained(s3_bucket, monkeypatch, setting, message):
    for name, value in setting.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    for use in (lambda store: store.probe(), lambda store: store.get("a"), lambda store: list(store.list())):
        with pytest.raises(StoreError, match=message) as caught:
            use(open_store(s3_bucket))
        for secret in ("wrong-secret", "testing", "hunter2"):
            assert secret not in str(caught.value)


def test_a_missing_bucket_is_explained(s3_bucket):
    missing = open_store("s3://no-such-bucket-here/night")
    for use in (missing.probe, lambda: list(missing.list()), lambda: missing.create("a", b"x")):
        with pytest.raises(StoreError, match="has no bucket no-such-bucket-here. Create it first"):
            use()


def test_a_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/dailies"):
        with pytest.raises(StoreError, match="cannot write: .* Check that it is a folder that you may use"):
            open_store(place).probe()


def test_a_read_only_folder_is_explained(tmp_path):
    tmp_path.chmod(0o500)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)                       # root may write everywhere
        with pytest.raises(StoreError, match="Permission denied"):
            open_store(tmp_path).probe()
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_explained(error, tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreError, match="has no hard links.* choose a folder on another"):
        open_store(tmp_path / "out").probe()
    assert list((tmp_path / "out/.tmp").iterdir()) == []


def test_a_folder_that_another_driver_tidies_meanwhile_is_usable(tmp_path, monkeypatch):
    store = open_store(tmp_path / "out")
    store.create("clips/x", b"")
    store.delete("clips/x")
    real = folder.below

    def tidied(top, names, **more):
        if names in (["clips"], [".tmp"]) and not more:
            os.rmdir(names[0], dir_fd=top)
        return real(top, names, **more)

    monkeypatch.setattr(folder, "below", tidied)
    store.probe()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_explained(tmp_path):
    (tmp_path / ".tmp").mkdir()
    store = open_store(tmp_path)
    with pytest.raises(StoreError, match="No space left on device. Free some space"), store.explained("write"):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3:/bucket", "s3://", "", "http://host/x",
                                 "s3://key:hunter2@bucket/x"])
def test_other_places_are_refused(uri):
    with pytest.raises(StoreError, match="expected a local folder or s3://bucket/prefix") as caught:
        open_store(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://bucket/../x", "s3://bucket/a/../../x", "s3://bucket/a//b", "s3://bucket//a"])
def test_a_prefix_that_would_lead_elsewhere_is_refused(uri):
    with pytest.raises(StoreError, match="must not have empty parts"):
        open_store(uri)


def test_opening_a_folder_makes_nothing_and_a_relative_one_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("out")
    assert not os.path.exists("out") and keys(store) == []
    monkeypatch.chdir("/")
    store.put("a", b"x")
    assert (tmp_path / "out" / "a").read_bytes() == b"x"


def test_a_killed_writer_leaves_no_half_object_and_its_rest_is_swept_later(tmp_path):
    store = open_store(tmp_path)
    store.put("a", b"x")
    old, young, of_a_person = (tmp_path / ".tmp" / name for name in ("0" * 32, "1" * 32, "thesis.txt"))
    for path in (old, young, of_a_person):
        path.write_bytes(b"half")
    for path in (old, of_a_person):
        os.utime(path, (0, 0))
    assert keys(store) == ["a"]
    store.probe()
    assert young.exists() and not old.exists() and of_a_person.exists()


def test_listing_a_large_bucket_takes_every_page(bucket, monkeypatch):
    for number in range(7):
        bucket.put(f"clips/{number}", b"x")
    list_page = bucket.client.list_objects_v2
    monkeypatch.setattr(bucket.client, "list_objects_v2", lambda **page: list_page(MaxKeys=3, **page))
    assert keys(bucket, "clips/") == [f"clips/{number}" for number in range(7)]
