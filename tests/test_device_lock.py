"""Turns on a device: of threads in one process, and of processes on one GPU."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dailies.actors.device_lock import DeviceLock, Halted

ROOT = Path(__file__).resolve().parent.parent


def other_process(device: str, *lines: str) -> subprocess.Popen:
    script = "\n".join(["import sys, time", "from dailies.actors.device_lock import DeviceLock",
                        f"lock = DeviceLock({device!r})", *lines])
    return subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.fixture(autouse=True)
def private_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def in_thread(work) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def waiting(lock: DeviceLock, count: int) -> None:
    while len(lock.queue) < count:
        time.sleep(0.001)


def test_threads_have_it_one_after_the_other_in_the_order_in_which_they_came():
    lock, inside, order, most = DeviceLock(), [], [], []

    def work(number: int) -> None:
        with lock:
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            order.append(number)
            inside.remove(number)

    with lock:
        threads = []
        for number in range(4):
            threads.append(in_thread(lambda number=number: work(number)))
            waiting(lock, 2 + number)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3] and max(most) == 1 and not lock.queue


def test_what_a_thread_waited_and_what_it_had_are_counted_apart():
    lock, told = DeviceLock(), []

    def work() -> None:
        with lock:
            pass
        told.append((lock.waited_s, lock.held_s))

    with lock:
        thread = in_thread(work)
        waiting(lock, 2)
        time.sleep(0.2)
    thread.join()
    (waited_s, held_s), = told
    assert waited_s > 0.2 > held_s and lock.held_s > 0.2 > lock.waited_s


def test_one_who_waits_can_be_called_off_and_those_behind_are_served():
    stop, lock, ends = threading.Event(), None, []
    lock = DeviceLock(halted=lambda: stop.is_set() and threading.current_thread().name == "called off")

    def work() -> None:
        try:
            with lock:
                ends.append("served")
        except Halted:
            ends.append("halted")

    with lock:
        threads = [threading.Thread(target=work, name=name) for name in ("called off", "behind")]
        for place, thread in enumerate(threads):
            thread.start()
            waiting(lock, 2 + place)
        stop.set()
        threads[0].join()
        assert ends == ["halted"]
    threads[1].join()
    assert ends == ["halted", "served"] and not lock.queue


def test_an_error_inside_gives_it_back():
    lock = DeviceLock("gpu")
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    with lock:
        pass


def test_another_process_waits_until_it_is_given_way_and_gives_it_back():
    lock = DeviceLock("gpu")
    with lock:
        assert not lock.is_wanted()
        other = other_process("gpu", "print('wants', flush=True)", "with lock:", "    print('has', flush=True)",
                              "    sys.stdin.readline()", "    print('gives', flush=True)")
        assert other.stdout.readline() == "wants\n"
        while not lock.is_wanted():
            time.sleep(0.01)
        threading.Timer(0.3, lambda: other.communicate("go\n")).start()
        lock.give_way()                                 # the turnstile: it is not had back before the other had it
        assert lock.kept_waiting_s() >= 0.25 and lock.waited_s >= 0.25
    assert lock.held_s < 30 and other.wait(30) == 0


def test_who_waits_can_say_for_whom_and_since_when():
    other = other_process("gpu", "with lock:", "    print('has', flush=True)", "    sys.stdin.readline()")
    assert other.stdout.readline() == "has\n"
    lock = DeviceLock("gpu")
    assert lock.waits_for() is None
    thread = in_thread(lambda: lock.__enter__() and lock.__exit__())
    while (found := lock.waits_for()) is None or found[1] < 0.05:
        time.sleep(0.01)
    assert found[0].startswith(f"process {other.pid} (python") and found[1] < 60
    other.communicate("go\n")
    thread.join()
    assert lock.waits_for() is None


def test_a_process_that_is_killed_holds_nothing():
    other = other_process("gpu", "with lock:", "    print('has', flush=True)", "    time.sleep(600)")
    assert other.stdout.readline() == "has\n"
    lock = DeviceLock("gpu")
    threading.Timer(0.2, other.kill).start()
    with lock:
        assert other.wait(30) == -9 and lock.kept_waiting_s() > 0.1


def test_gpus_do_not_wait_for_each_other():
    with DeviceLock("GPU-1"), DeviceLock("GPU-2"):
        pass


def test_a_folder_that_others_can_write_to_is_not_used_and_that_is_said(tmp_path, caplog, monkeypatch):
    folder = tmp_path / f"dailies-{os.getuid()}"
    with DeviceLock("gpu"):
        assert folder.stat().st_mode & 0o777 == 0o700 and len(list(folder.iterdir())) == 2
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with DeviceLock("gpu"):                             # they take turns by a folder in the cache
        assert len(list((tmp_path / "cache").rglob("device-gpu"))) == 1 and not caplog.text
    (tmp_path / "cache/dailies").chmod(0o777)
    lock = DeviceLock("gpu")
    with lock:
        assert lock.turnstile is None and not lock.is_wanted()
    assert "do not take turns" in caplog.text and "of this user's alone" in caplog.text


def test_a_turn_that_cannot_begin_is_over_at_once():
    def no_room():
        raise OSError("no locks available")

    lock = DeviceLock(entered=no_room)
    with pytest.raises(OSError, match="no locks"), lock:
        raise AssertionError("it has begun")
    lock.entered = lambda: None
    with lock:                                          # nobody waits for the one that never was
        assert len(lock.queue) == 1
