"""Code that got out of a pickle would run in a process that can read nothing, write nothing and talk to nobody."""

import ctypes
import json
import os
import socket
import subprocess

import pytest

from dailies.jobs import convert as converting
from dailies.jobs import sandbox
from dailies.model.files import CheckpointError

ESCAPES = '''
import ctypes, json, os, resource, socket, subprocess, sys, threading
outside, port, source, target = {outside!r}, {port}, sys.argv[1], int(sys.argv[2])

def thread():
    worker = threading.Thread(target=lambda: None)
    worker.start()
    worker.join()

acts = dict(
    parents_environment=lambda: open(f"/proc/{{os.getppid()}}/environ", "rb").read(),
    first_environment=lambda: open("/proc/1/environ", "rb").read(),
    credentials=lambda: open(outside + "/credentials").read(),
    folder=lambda: os.listdir(outside),
    write=lambda: open(outside + "/new", "w"),
    overwrite=lambda: open(outside + "/credentials", "r+"),
    write_beside=lambda: open("new", "w"),
    remove=lambda: os.unlink(outside + "/credentials"),
    rename=lambda: os.rename(outside + "/credentials", outside + "/b"),
    link=lambda: os.symlink(outside, outside + "/b"),
    mode=lambda: os.chmod(outside + "/credentials", 0o777),
    times=lambda: os.utime(outside + "/credentials"),
    tcp=lambda: socket.create_connection(("127.0.0.1", port), 5),
    udp=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port)),
    unix=lambda: socket.socket(socket.AF_UNIX),
    pair=lambda: socket.socketpair(),
    program=lambda: subprocess.run(["/bin/true"]),
    become=lambda: os.execv("/bin/true", ["true"]),
    fork=lambda: os.fork() or os._exit(0),
    signal=lambda: os.kill(os.getppid(), 0),
    limits=lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1)),
    slower=lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19),
    scheduled=lambda: os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0)),
    shared_memory=lambda: ctypes.CDLL(None).shmat({segment}, None, 0) not in (-1, 2**64 - 1) or fail(),
    messages=lambda: ctypes.CDLL(None).msgget(1, 0o1600) != -1 or fail(),
    memory=lambda: bytearray(2**45),
    file=lambda: os.pwrite(target, b"x", 2**40),
    mount=lambda: ctypes.CDLL(None, use_errno=True).mount(b"none", b"/", b"tmpfs", 0, None) == 0 or fail(),
    traced=lambda: ctypes.CDLL(None, use_errno=True).ptrace(16, os.getppid(), None, None) == 0 or fail(),
    # and what a reader needs
    source=lambda: open(source, "rb").read(),
    target=lambda: os.write(target, b"x"),
    thread=thread,
)

def fail():
    raise PermissionError("refused")

found = {{}}
for name, act in acts.items():
    try:
        act()
        found[name] = "done"
    except BaseException as error:
        found[name] = type(error).__name__
print(json.dumps(found), file=sys.stderr)
sys.exit(2)
'''


@pytest.fixture
def replaced(tmp_path, monkeypatch):
    """Runs a program in the place of the one that reads a pickle; what it said on standard error."""
    def run(program):
        (tmp_path / "home/dailies/jobs").mkdir(parents=True)
        for package in ("dailies", "dailies/jobs"):
            (tmp_path / "home" / package / "__init__.py").touch()
        (tmp_path / "home/dailies/jobs/unpickle.py").write_text(program)
        monkeypatch.setattr(converting, "HOME", tmp_path / "home")
        (tmp_path / "a.pth").write_bytes(b"weights")
        (tmp_path / "room").mkdir()
        with pytest.raises(CheckpointError) as told:
            converting.unpickle(tmp_path / "a.pth", tmp_path / "room/model.safetensors")
        return str(told.value)
    return run


def test_code_out_of_a_pickle_reads_writes_and_reaches_nothing(tmp_path, replaced, monkeypatch, capfd):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "credentials").write_text("secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stays-at-home")
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(0, 4096, 0o1600)              # known by its number alone, which can be guessed
    assert segment != -1, os.strerror(ctypes.get_errno())
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            found = json.loads(replaced(ESCAPES.format(outside=str(outside), port=server.getsockname()[1],
                                                       segment=segment)))
    finally:
        libc.shmctl(segment, 0, None)                   # removes it
    notes = capfd.readouterr().err
    if "note:" in notes:
        pytest.skip(notes.strip())
    works = {"source", "target", "thread"}
    assert {name for name, how in found.items() if how == "done"} == works, found
    assert [path.name for path in outside.iterdir()] == ["credentials"]


def test_a_library_is_looked_for_without_programs_and_files(replaced):
    """As torch for CUDA does when it is imported; what the answer would take is shut."""
    program = "import ctypes.util, sys; print(ctypes.util.find_library('dl'), file=sys.stderr); sys.exit(2)"
    assert replaced(program).endswith("None")


def test_what_the_kernel_cannot_shut_is_said_once(replaced, capfd):
    converting.warn_once.cache_clear()
    replaced(f"import sys; print({sandbox.NO_LANDLOCK!r}); print({sandbox.NO_LANDLOCK!r}); sys.exit(2)")
    assert capfd.readouterr().err.count("not shut in as it should be: this kernel has no Landlock") == 1


def test_a_kernel_without_landlock_or_an_unknown_processor_is_told(monkeypatch):
    """Of what is asked of the kernel nothing is done here: this process is to stay open."""
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    class Kernel:
        prctl = syscall = staticmethod(lambda *_: 0)

    monkeypatch.setattr(sandbox, "set_limits", lambda _: None)
    monkeypatch.setattr(sandbox, "drop_capabilities", lambda _: None)
    monkeypatch.setattr(sandbox.ctypes, "CDLL", lambda *_, **__: Kernel)
    monkeypatch.setattr(sandbox, "landlock", refuse)
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    if os.uname().sysname == "Linux":
        said = sandbox.enter_sandbox(sandbox.Path("a.pth"), [])
        assert [sentence[:30] for sentence in said] == ["this kernel has no Landlock (L",
                                                        "this kernel or processor has n"]
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert sandbox.enter_sandbox(sandbox.Path("a.pth"), []) == [sandbox.NO_LANDLOCK, sandbox.NO_SECCOMP]


def test_what_a_reader_says_is_shown_short_and_printable(replaced):
    said = replaced("import sys; print('\\x1b[31m' + 'x' * 10**6, file=sys.stderr); sys.exit(2)")
    assert said.startswith("?[31mxxx") and len(said) <= 8000


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_a_pickle_that_is_no_file_is_not_waited_for(make, tmp_path):
    make(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="is no regular file"):
        converting.unpickle(tmp_path / "a.pth", tmp_path / "model.safetensors")


def test_the_environment_of_who_starts_it_is_closed_meanwhile():
    """As another process of the same user sees it; root sees all."""
    if os.geteuid() == 0:
        look = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        if subprocess.run([*look, "true"], capture_output=True).returncode:
            pytest.skip("needs setpriv, to look as another user")
    else:
        look = []
    with sandbox.undumpable():
        looked = subprocess.run([*look, "cat", f"/proc/{os.getpid()}/environ"], capture_output=True)
    assert looked.returncode != 0 and not looked.stdout
