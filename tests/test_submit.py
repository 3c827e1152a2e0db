"""`dailies submit` against a real Ray head on loopback, with token authentication on."""

import asyncio
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from image_files import png
from wan_tiny import WAN_TINY_I2V, write_weights

from dailies.actors.clip_file import read_clip
from dailies.jobs import parcel
from dailies.jobs import submit as job
from dailies.jobs.cli import main
from dailies.pipeline.scheduler import cluster

TOKEN = "0123456789abcdef0123456789abcdef"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Head:
    address: str
    port: int


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head of our own; everything it starts shares its session, which is what is stopped in the end."""
    port, dashboard, client = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": folder,
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            env.pop(name, None)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port),
                   "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--num-cpus", "2",
                   "--dashboard-agent-listen-port", "0", "--ray-client-server-port", str(client),
                   "--object-store-memory", "100000000", "--temp-dir", folder, "--disable-usage-stats"]
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       start_new_session=True)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_until_ready(process, address, Path(folder, "log"))
            yield Head(address=address, port=port)
        finally:
            stop_session(process)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The head's token and nothing else of this machine's Ray settings."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the Ray head did not start:\n{log.read_text()}")


def stop_session(process: subprocess.Popen) -> None:
    members = [each for each in psutil.process_iter() if session_of(each.pid) == process.pid]
    for each in members:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(members, timeout=10)
    process.wait(timeout=10)


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def test_a_head_that_lets_everybody_in_gets_no_job(monkeypatch, tmp_path: Path, capsys):
    """A server that answers all requests, as a dashboard without tokens does; seen as if from another machine."""
    asked = []

    class Open(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    (tmp_path / "m.csv").write_text("prompt\na\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Open) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert not cluster.answers_anyone(address)      # on loopback nobody else reaches it
        monkeypatch.setattr(cluster, "is_loopback", lambda host: False)
        assert dailies_submit(tmp_path / "m.csv", address) == 5
        server.shutdown()
    assert "asks for no token, so whoever reaches it runs programs there" in capsys.readouterr().err
    assert asked == [("/api/jobs/", None)]


def test_a_head_that_asks_for_a_token_is_not_open(head: Head, monkeypatch):
    monkeypatch.setattr(cluster, "is_loopback", lambda host: False)
    assert not cluster.answers_anyone(head.address)


def run_job(address: str, script: str) -> tuple[tuple[str, int, str], str]:
    """Start a small script the way submit starts a render; what follow() returns, and the log."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(script)
        client = job.connect_to_head(address)
        job_id = job.start_job(client, address, "python script.py", folder)
    log = io.StringIO()
    return asyncio.run(asyncio.wait_for(job.follow_job(client, job_id, log), 120)), log.getvalue()


def dailies_submit(manifest: Path, address: str, *flags: str, out: str = "s3://bucket/run") -> int:
    return main(["submit", str(manifest), "--out", out, "--address", address, *flags])


def test_a_job_ends_with_its_own_exit_code_and_its_log_is_copied(head: Head):
    result, log = run_job(head.address, "import sys; print('line one'); print('line two'); sys.exit(3)")
    assert result == ("FAILED", 3, "")
    assert log.count("line one\nline two\n") == 1


def test_a_render_runs_on_the_cluster_and_its_job_tells_no_secret(head: Head, tmp_path: Path, capsys, monkeypatch):
    manifest, out = tmp_path / "two.csv", tmp_path / "out"
    manifest.write_text("id,prompt,frames,steps\none,a red circle moves left,5,1\ntwo,a blue square,5,1\n")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stays-at-home")
    assert dailies_submit(manifest, head.address, "--wait", "--json", out=str(out)) == 0
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert (answer["status"], answer["exit_code"]) == ("SUCCEEDED", 0)
    assert "2 rows done" in said.err
    assert len(list(out.glob("clips/*/*.mp4"))) == 2 and (out / "_SUCCESS.json").is_file()
    told = job.connect_to_head(head.address).get_job_info(answer["job_id"]).model_dump_json()
    assert "two.csv" in told and TOKEN not in told and "stays-at-home" not in told


def test_images_are_rendered_on_the_cluster_from_where_the_job_has_them(head: Head, tmp_path: Path,
                                                                        monkeypatch, capsys):
    """The program of the tests travels too: it is what has a model of images that is small enough."""
    pack, weights, out = parcel.pack_parcel, tmp_path / "weights", tmp_path / "out"

    def with_tests(folder: Path, *arguments):
        named = pack(folder, *arguments)
        for name in ("wan_tiny.py", "tiny_program.py"):
            shutil.copyfile(ROOT / "tests" / name, folder / name)
        return named

    start = job.start_job
    monkeypatch.setattr(job, "pack_parcel", with_tests)
    monkeypatch.setattr(job, "start_job", lambda client, address, entrypoint, folder: start(
        client, address, entrypoint.replace("python -m dailies", "python wan_tiny.py"), folder))
    write_weights(weights, WAN_TINY_I2V)
    night = tmp_path / "night"
    (night / "deep").mkdir(parents=True)
    (night / "deep/a.png").write_bytes(png())
    (night / "one.csv").write_text("prompt,frames,steps,image\nit moves,5,1,deep/a.png\n")
    (night / "bad.csv").write_text("prompt,frames,steps,image\nit moves,5,1,gone.png\n")
    flags = ["--model", "wan-tiny-i2v", "--weights", str(weights), "--device", "cpu", "--wait"]
    assert dailies_submit(night / "bad.csv", head.address, *flags, out=str(out)) == 2
    assert "'gone.png': no such file" in capsys.readouterr().out
    assert dailies_submit(night / "one.csv", head.address, *flags, out=str(out)) == 0, capsys.readouterr().out
    [clip] = out.glob("clips/*/*.mp4")
    assert read_clip(clip.read_bytes()).metadata["image_sha256"] == hashlib.sha256(png()).hexdigest()


def test_what_the_render_refuses_there_is_refused_here(head: Head, tmp_path: Path, capsys):
    manifest = tmp_path / "bad.csv"
    manifest.write_text("id,prompt\nsame,a red circle\nsame,a blue square\n")
    assert dailies_submit(manifest, head.address, "--wait", out=str(tmp_path / "out")) == 2
    assert "same" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_killed_driver_reads_as_in_a_shell(head: Head):
    (status, code, message), _ = run_job(head.address, "import os; os.kill(os.getpid(), 9)")
    assert (status, code) == ("FAILED", 137)
    assert "the same command continues" in message


def test_a_cut_connection_neither_loses_nor_repeats_a_line(head: Head):
    script = "import time\nfor n in range(8): print('line', n, flush=True); time.sleep(1)"
    with CuttingProxy(int(head.address.rsplit(":", 1)[1]), cut_after_s=3.0) as proxy:
        result, log = run_job(f"http://127.0.0.1:{proxy.port}", script)
    assert result == ("SUCCEEDED", 0, "")
    assert proxy.num_cut > 0
    assert [line for line in log.splitlines() if line.startswith("line")] == [f"line {n}" for n in range(8)]


class CuttingProxy:
    """Passes bytes to a port of this machine and, every `cut_after_s`, breaks the connections that are open."""

    def __init__(self, target: int, cut_after_s: float):
        self.target, self.cut_after_s, self.num_cut = target, cut_after_s, 0
        self.open: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.done = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        threading.Thread(target=self.cut, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.listener.close()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self.open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self.copy, args=(source, sink), daemon=True).start()

    def copy(self, source: socket.socket, sink: socket.socket):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            if each in self.open:
                self.open.remove(each)
            each.close()

    def cut(self):
        while not self.done.wait(self.cut_after_s):
            for each in list(self.open):
                self.num_cut += 1
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("token, says", [("f" * 32, "refused the token"), ("", "no token was found")])
def test_a_head_lets_nobody_in_without_its_token(head: Head, manifest: Path, token, says, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    assert dailies_submit(manifest, head.address, "--wait") == 5
    assert says in capsys.readouterr().err
    with pytest.raises(urllib.error.HTTPError, match="40[13]"):
        urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/jobs/",
                                                      headers={"Authorization": f"Bearer {token}"}))


def test_the_token_is_also_found_in_a_file(head: Head, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    Path(tmp_path, ".ray").mkdir()
    Path(tmp_path, ".ray", "auth_token").write_text(TOKEN + "\n")
    job.connect_to_head(head.address)
    Path(tmp_path, "elsewhere").write_text(TOKEN)
    Path(tmp_path, ".ray", "auth_token").write_text("f" * 32)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    job.connect_to_head(head.address)


def test_a_named_token_file_that_is_missing_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    with pytest.raises(job.HeadError, match="nothing gives none: No such file"):
        job.find_token()


def test_the_address_given_wins_over_the_environment(head: Head, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    job.connect_to_head(head.address)
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_waiting_is_told_that_the_job_goes_on(number, manifest: Path, monkeypatch, capsys):
    async def follow(*_: object) -> None:
        os.kill(os.getpid(), number)
        await asyncio.sleep(60)

    monkeypatch.setattr(job, "connect_to_head", lambda address: None)
    monkeypatch.setattr(job, "start_job", lambda *_: "job-1")
    monkeypatch.setattr(job, "follow_job", follow)
    code = main(["submit", str(manifest), "--out", "s3://bucket/run", "--address", "http://127.0.0.1:9", "--wait"])
    assert code == 130 and "the job goes on. Stop it with: ray job stop job-1" in capsys.readouterr().err


def test_a_head_that_does_not_answer_is_exit_5_with_a_next_step(manifest: Path, capsys):
    [port] = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    assert dailies_submit(manifest, address, "--wait", "--json") == 5
    said = capsys.readouterr()
    assert "port-forward" in said.err
    assert json.loads(said.out)["exit_code"] == 5


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", ""])
def test_an_address_that_is_none_is_bad_usage(manifest: Path, address, capsys):
    assert dailies_submit(manifest, address) == 2
    assert "http://HEAD:8265" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["s3://key:secret@bucket/run", "s3://bucket/run?X-Amz-Signature=abc"])
def test_keys_in_a_uri_are_refused_before_anything_is_sent(manifest: Path, out, capsys):
    assert dailies_submit(manifest, "http://127.0.0.1:9", out=out) == 2
    said = capsys.readouterr().err
    assert "must not carry keys" in said and "secret" not in said and "abc" not in said


def test_a_relative_output_folder_is_refused(manifest: Path, capsys):
    assert dailies_submit(manifest, "http://127.0.0.1:9", out="out/") == 2
    assert "absolute path" in capsys.readouterr().err


def test_a_missing_manifest_is_bad_usage(tmp_path: Path, capsys):
    assert dailies_submit(tmp_path / "none.parquet", "http://127.0.0.1:9") == 2
    assert "no such manifest" in capsys.readouterr().err


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text("id,prompt\none,a red circle moves left on a gray background\n")
    return path


def test_the_shipped_folder_runs_by_itself(manifest: Path, tmp_path: Path):
    folder = tmp_path / "shipped"
    assert parcel.pack_parcel(folder, str(manifest), []) == ["manifest/prompts.csv"]
    assert (folder / "manifest/prompts.csv").read_bytes() == manifest.read_bytes()
    done = subprocess.run([sys.executable, "-c", "import dailies.jobs.submit; print(dailies.jobs.submit.__file__)"],
                          cwd=folder,
                          capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(folder)
    assert not [path for path in folder.rglob("*") if path.name in ("__pycache__", "tests", "out", ".git", ".venv")]


def shipped_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder / "manifest")) for path in folder.joinpath("manifest").rglob("*")
                  if path.is_file())


def test_folders_and_globs_keep_their_files_in_order(tmp_path: Path):
    for name in ("night/a.csv", "night/b.csv", "night/sub/b.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("prompt\n" + name)
    for number, (given, named, held) in enumerate([
            ("night", "manifest/night", ["night/a.csv", "night/b.csv"]),
            ("night/**/*.csv", "manifest/**/*.csv", ["a.csv", "b.csv", "sub/b.csv"])]):
        folder = tmp_path / f"shipped{number}"
        assert parcel.pack_parcel(folder, str(tmp_path / given), []) == [named]
        assert set(held) <= set(shipped_files(folder))


def test_only_what_the_manifest_is_made_of_is_sent_and_it_is_listed(tmp_path: Path, capsys):
    """Not its neighbours, nothing hidden, nothing behind a link that leads out of the folder, no file that is no
    image."""
    night, home = tmp_path / "night", tmp_path / "home"
    for path in (home / ".aws", night / "deep", night / ".aws"):
        path.mkdir(parents=True)
    (home / ".aws/credentials").write_text("k=FAKE")
    rows = "".join(f"a,{image}\n"
                   for image in (".env", ".aws/credentials", "id_rsa", "link.png", "open/credentials", "a.png"))
    (night / "a.csv").write_text("prompt,image\n" + rows)
    for name in ("credentials.json", "id_rsa", "deep/aws-keys.pem", ".env", ".aws/credentials", ".hidden.csv",
                 "_old.csv"):
        (night / name).write_text("K=FAKE")
    (night / "a.png").write_bytes(png())
    (night / "link.png").symlink_to(home / ".aws/credentials")
    (night / "open").symlink_to(home / ".aws")
    for number, given in enumerate((night / "a.csv", night / "*.csv")):
        folder = tmp_path / f"shipped{number}"
        parcel.pack_parcel(folder, str(given), [])
        assert shipped_files(folder) == ["a.csv", "a.png"]
        assert not [path for path in folder.rglob("*") if path.is_file() and b"FAKE" in path.read_bytes()
                    and path.suffix != ".py"]
        said = capsys.readouterr().err
        assert "manifest and images (2 files, 0.0 MB):\n  a.csv\n  a.png\n" in said
        assert "not sent, because they are no images: manifest/id_rsa" in said and "FAKE" not in said
    (night / "z.csv").symlink_to(home / ".aws/credentials")
    folder = tmp_path / "shipped-folder"
    with suppress(job.UsageError):                      # a reader may pass over it, or the link is refused by name
        parcel.pack_parcel(folder, str(night / "*.csv"), [])
        assert shipped_files(folder) == ["a.csv", "a.png"]


def test_our_packages_travel_without_what_lies_beside_them(tmp_path: Path, monkeypatch):
    home = tmp_path / "home"
    for package in parcel.PACKAGES_SHIPPED:
        (home / package).mkdir(parents=True)
        (home / package / "a.py").write_text("")
    (tmp_path / "id_rsa").write_text("FAKE")
    for name in ("jobs/.env", "jobs/id_rsa", "model/notes.txt"):
        (home / name).write_text("FAKE")
    (home / "jobs/link.py").symlink_to(tmp_path / "id_rsa")
    monkeypatch.setattr(parcel, "homes",
                        lambda: {f"dailies/{package}": home / package for package in parcel.PACKAGES_SHIPPED})
    parcel.pack_parcel(tmp_path / "shipped", "s3://bucket/m.parquet", [])
    assert sorted(str(path.relative_to(tmp_path / "shipped")) for path in (tmp_path / "shipped").rglob("*")
                  if path.is_file()) == sorted(f"dailies/{package}/a.py" for package in parcel.PACKAGES_SHIPPED)


def shipped_images(manifest: Path, folder: Path) -> list[str]:
    parcel.pack_parcel(folder, str(manifest), [])
    return [name for name in shipped_files(folder) if name.endswith(".png")]


def test_the_images_that_rows_name_travel_with_their_manifest(tmp_path: Path):
    night = tmp_path / "night"
    (night / "deep").mkdir(parents=True)
    for path in (night / "a.png", night / ".b.png", night / "other.png", tmp_path / "outside.png",
                 night / "deep/c.png"):
        path.write_bytes(png())
    (night / "out").symlink_to(tmp_path)
    (night / "link.png").symlink_to("deep/c.png")
    (night / "link-out.png").symlink_to(tmp_path / "outside.png")
    names = ["a.png", "a.png", "", "./deep/../.b.png", "./deep/../other.png", "link.png", "gone.png", "deep",
             "s3://bucket/a.png", "../outside.png", "out/outside.png", "out/night/../../night/a.png", "link-out.png",
             "file:///etc/passwd"]
    for name in ("one.csv", "two.csv"):
        (night / name).write_text("prompt,image\n" + "".join(f"a fox,{image}\n" for image in names))
    assert shipped_images(night / "one.csv", tmp_path / "1") == ["a.png", "link.png", "other.png"]
    assert shipped_images(night / "*.csv", tmp_path / "2") == ["a.png", "link.png", "other.png"]
    assert shipped_images(tmp_path / "*/one.csv", tmp_path / "3") == ["night/a.png", "night/link.png",
                                                                      "night/other.png"]
    (tmp_path / "link").symlink_to(night)
    assert "other.png" in shipped_images(tmp_path / "link/one.csv", tmp_path / "4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "4", "link", "night", "outside.png"]


@pytest.mark.parametrize("swapped", ["night.csv", "a.png", "deep/b.png"])
@pytest.mark.parametrize("into", ["link", "bytes"])
def test_what_a_neighbour_puts_in_a_files_place_after_the_check_is_not_sent(swapped, into, tmp_path: Path, monkeypatch):
    night, secret = tmp_path / "night", tmp_path / "id_rsa"
    (night / "deep").mkdir(parents=True)
    secret.write_text("FAKE KEY")
    (night / "night.csv").write_text("prompt,image\na fox,a.png\na hen,deep/b.png\n")
    for name in ("a.png", "deep/b.png"):
        (night / name).write_bytes(png())
    before = {name: (night / name).read_bytes() for name in ("night.csv", "a.png", "deep/b.png")}

    def swap(*_) -> None:                               # everything has been checked, nothing is written yet
        (night / swapped).unlink()
        (night / swapped).symlink_to(secret) if into == "link" else (night / swapped).write_text("FAKE KEY")
    monkeypatch.setattr(parcel, "tell_shipped", swap)
    for number, given in enumerate(("night.csv", "*.csv", "")):
        (night / swapped).unlink()
        (night / swapped).write_bytes(before[swapped])
        parcel.pack_parcel(tmp_path / f"{number}", str(night / given), [])
        inner = tmp_path / f"{number}/manifest" / ("" if given else "night")
        assert {name: (inner / name).read_bytes() for name in before} == before


def test_a_manifest_that_becomes_a_link_before_it_is_read_is_not_followed(tmp_path: Path, monkeypatch):
    (tmp_path / "night").mkdir()
    (tmp_path / "night/a.csv").write_text("prompt\na fox\n")
    (tmp_path / "home.csv").write_text("prompt\nFAKE KEY\n")
    found = parcel.local_manifest

    def swapped(source: Path):
        answer = found(source)
        (tmp_path / "night").rename(tmp_path / "moved")
        (tmp_path / "night").mkdir()
        (tmp_path / "night/a.csv").symlink_to(tmp_path / "home.csv")
        return answer
    monkeypatch.setattr(parcel, "local_manifest", swapped)
    with pytest.raises(job.UsageError, match="a link that leads out of|is a link"):
        parcel.pack_parcel(tmp_path / "shipped", str(tmp_path / "night"), [])
    assert not (tmp_path / "shipped").exists()


def test_no_file_that_is_called_like_a_key_is_sent_beside_the_one_that_was_named(tmp_path: Path, capsys):
    night = tmp_path / "night"
    night.mkdir()
    for name in ("credentials.json", "my_accessKeys.csv", "prod-service-account.json"):
        (night / name).write_text('[{"prompt": "FAKE"}]')
    for name in ("id_rsa", "server.pem", "secret.png", "deep.pem.png"):
        (night / name).write_bytes(png())
    (night / "a.csv").write_text("prompt,image\na fox,id_rsa\na hen,server.pem\na cat,secret.png\n")
    for number, given in enumerate(("", "*", "*.*", "a.csv")):
        parcel.pack_parcel(tmp_path / f"{number}", str(night / given), [])
        assert [Path(name).name for name in shipped_files(tmp_path / f"{number}")] == ["a.csv", "secret.png"]
        assert "called like keys or credentials: " in capsys.readouterr().err
    (tmp_path / "credentials.json").write_text('[{"prompt": "a fox"}]')
    parcel.pack_parcel(tmp_path / "named", str(tmp_path / "credentials.json"), [])
    assert shipped_files(tmp_path / "named") == ["credentials.json"]


def test_an_image_by_its_absolute_path_is_refused_with_what_to_do(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "one.csv").write_text(f"prompt,image\na fox,{tmp_path}/a.png\n")
    with pytest.raises(job.UsageError, match="absolute path, and on the cluster .* under the manifest's folder"):
        parcel.pack_parcel(tmp_path / "shipped", str(tmp_path / "one.csv"), [])


def test_more_images_than_the_head_takes_are_refused_with_a_way_out(tmp_path: Path):
    for number in range(3):
        with open(tmp_path / f"{number}.png", "wb") as file:
            file.truncate(40_000_000)
    (tmp_path / "one.csv").write_text("prompt,image\n" + "".join(f"a fox,{number}.png\n" for number in range(3)))
    with pytest.raises(job.UsageError, match="files, .* manifest/0.png .40 MB.*images that it names, into the bucket"):
        parcel.pack_parcel(tmp_path / "shipped", str(tmp_path / "one.csv"), [])
    assert not (tmp_path / "shipped").exists()


def test_a_manifest_that_cannot_be_read_is_not_sent(tmp_path: Path, capsys):
    (tmp_path / "one.csv").write_text("text\na fox\n")
    assert dailies_submit(tmp_path / "one.csv", "http://127.0.0.1:9") == 2
    assert "a column named exactly 'prompt'" in capsys.readouterr().err


def test_a_manifest_in_the_bucket_stays_there(tmp_path: Path):
    assert parcel.pack_parcel(tmp_path, "s3://bucket/prompts/*.parquet", []) == ["s3://bucket/prompts/*.parquet"]
    assert not (tmp_path / "manifest").exists()


def test_the_settings_of_a_config_file_travel_and_the_file_does_not(manifest: Path, tmp_path: Path, monkeypatch):
    config, sent = tmp_path / "night.toml", []
    config.write_text('# password = "hunter2"\nmodel = "demo"\nsteps = 9\nstrict = true\nuntil = "2099-01-01T07:00"\n'
                      'allow_images = ["s3://bbb/in", "S3://ccc"]\nray = "local"\ncompile = true\n')
    monkeypatch.setattr(job, "connect_to_head", lambda address: None)
    monkeypatch.setattr(job, "start_job", lambda client, address, entrypoint, folder: sent.append(
        (entrypoint, [path.name for path in Path(folder).rglob("*.toml")])) or "job-1")
    assert dailies_submit(manifest, "http://127.0.0.1:9", "--config", str(config), "--steps", "4", "--no-compile") == 0
    [(entrypoint, files)] = sent
    assert files == [] and "hunter2" not in entrypoint and "--config" not in entrypoint
    for part in ("--model demo", "--steps 4", "--strict", "--no-compile", "--until 2099-01-01T07:00:00",
                 "--allow-images s3://bbb/in --allow-images s3://ccc", "--ray auto"):
        assert part in entrypoint
    assert "--steps 9" not in entrypoint and "--ray local" not in entrypoint


KEY_ID = "AKIA" + "ABCDEFGHIJKLMNOP"
SECRETS_IN_SETTINGS = {"weights": "s3://key:hunter2@bucket/w", "out": "s3://bucket/run?X-Amz-Signature=hunter2",
                       "manifest": f"s3://bucket/{KEY_ID}.csv", "model": "password=hunter2",
                       "allow_images": ["s3://bucket/the-value-of-a-variable"]}


@pytest.mark.parametrize("name", SECRETS_IN_SETTINGS)
@pytest.mark.parametrize("place", ["file", "flag"])
def test_a_secret_in_any_setting_is_refused_wherever_it_comes_from(name, place, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("MY_API_TOKEN", "the-value-of-a-variable")
    value = SECRETS_IN_SETTINGS[name]
    settings = {"manifest": "s3://bucket/m.csv", "out": "s3://bucket/run"}
    command = ["submit", "--address", "http://127.0.0.1:9"]
    if place == "file":
        settings |= {name: value}
    else:
        settings.pop(name, None)
        given = value[0] if isinstance(value, list) else value
        command = [*command, given] if name == "manifest" else [*command, f"--{name.replace('_', '-')}", given]
    (tmp_path / "night.toml").write_text("".join(f"{key} = {json.dumps(said)}\n" for key, said in settings.items()))
    assert main([*command, "--config", str(tmp_path / "night.toml")]) == 2
    said = capsys.readouterr()
    for secret in ("hunter2", KEY_ID, "the-value-of-a-variable"):
        assert secret not in said.err + said.out


@pytest.mark.parametrize("key",
                         ["github_pat_" + "a1" * 20, "AIza" + "b2" * 17 + "c", "npm_" + "d3" * 18, "ya29." + "e4" * 20,
                                 "AccountKey=" + "f5" * 20])
def test_a_key_that_its_form_gives_away_is_not_sent(key):
    with pytest.raises(job.UsageError, match="must not carry keys") as caught:
        job.refuse_secrets(["--map", f"{key}=prompt"])
    assert key[-20:] not in str(caught.value)


def test_a_glob_with_a_question_mark_is_no_query():
    job.refuse_secrets(["s3://bucket/night?.parquet", "s3://bucket/night[12].csv", "--model", "demo", "a=b"])


def test_weights_of_this_machine_are_refused(manifest: Path, capsys):
    assert dailies_submit(manifest, "http://127.0.0.1:9", "--weights", "weights/mine") == 2
    assert "--weights must be" in capsys.readouterr().err


def test_more_than_the_head_takes_is_refused_with_a_way_out(tmp_path: Path):
    big = tmp_path / "prompts.parquet"
    with open(big, "wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(job.UsageError, match="manifest/prompts.parquet .200 MB.*s3://"):
        parcel.pack_parcel(tmp_path / "shipped", str(big), [])
    assert not (tmp_path / "shipped").exists()
