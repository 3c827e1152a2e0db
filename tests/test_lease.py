"""One driver per run folder: taken, kept, refused to others, taken over from the dead and the silent, in any store."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from dailies.pipeline.run import lease
from dailies.pipeline.run.layout import LEASE
from dailies.pipeline.run.lease import Holder, Lease, LeaseError
from dailies.pipeline.store import StoreError, open_store


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    for name, seconds in (("LEASE_S", 0.6), ("RENEW_S", 0.1), ("POLL_S", 0.05), ("SETTLE_S", 0.3)):
        monkeypatch.setattr(Lease, name, seconds)


@pytest.fixture
def store(store_uri):
    return open_store(store_uri)


def said(store):
    return json.loads(store.get(LEASE))


def leave(store, **changes):
    """A lease that a driver on another machine has left behind, renewed a moment ago."""
    now = datetime.now(UTC)
    known = {"id": "other", "host": "gpu-7\x1b[31m", "pid": 4711, "machine": "elsewhere", "process_start": "1",
             "renewed_at": now.isoformat(), "expires_at": (now + timedelta(hours=1)).isoformat(), "released": False}
    store.put(LEASE, json.dumps(known | changes).encode())


def test_a_lease_is_renewed_while_it_is_held_and_given_back_at_the_end(store):
    with Lease.take(store) as held:
        first = said(store)
        assert first["pid"] == os.getpid() and not first["released"] and len(first["id"]) == 16
        wait_until(lambda: said(store)["renewals"] >= 2)
        held.check()
        assert said(store)["expires_at"] > first["expires_at"] and said(store)["id"] == first["id"]
    assert said(store)["released"]
    with Lease.take(store):
        assert said(store)["id"] != first["id"]


def test_a_run_folder_that_was_given_back_is_taken_without_a_word(store, monkeypatch):
    with Lease.take(store):
        pass
    monkeypatch.setattr(lease, "is_alive", lambda pid, started: False)      # the driver of yesterday, on this machine
    notes = []
    with Lease.take(store, tell=notes.append):
        pass
    assert notes == []
    leave(store, machine=lease.this_machine(), released=False)
    with Lease.take(store, tell=notes.append):
        pass
    assert len(notes) == 1 and "this one goes on in its place" in notes[0]


def test_a_second_driver_is_refused_and_told_who_works_there(store):
    with Lease.take(store) as first:
        for wait in (False, True):
            with pytest.raises(LeaseError, match=f"another driver works on this run: pid {os.getpid()} .*--take-over"):
                Lease.take(store, wait=wait)
        first.check()


def test_of_eight_that_begin_at_once_exactly_one_works(store, monkeypatch):
    monkeypatch.setattr(Lease, "LEASE_S", 3600.0)
    barrier = threading.Barrier(8)

    def begin(_):
        barrier.wait(30)
        try:
            return Lease.take(store)
        except LeaseError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sum(held is not None for held in pool.map(begin, range(8))) == 1


def test_a_driver_that_was_killed_on_this_machine_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Lease, "LEASE_S", 3600.0)
    store = open_store(tmp_path)
    script = ("import os, signal; from dailies.pipeline.run.lease import Lease; from dailies.pipeline.store import "
              "open_store\n"
              "Lease.LEASE_S = 3600.0\n"
              f"Lease.take(open_store({str(tmp_path)!r})).__enter__(); print('took', flush=True); input()")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True) as driver:
        assert driver.stdout.readline() == "took\n"
        with pytest.raises(LeaseError, match=f"pid {driver.pid}"):
            Lease.take(store)
        driver.kill()
        wait_until(lambda: not lease.is_alive(driver.pid, said(store)["process_start"]))     # a zombie has ended too
        told = []
        with Lease.take(store, tell=told.append):
            assert f"pid {driver.pid} on " in told[0] and "has ended" in told[0]


def test_a_process_that_got_the_dead_drivers_pid_is_not_taken_for_it(tmp_path):
    store = open_store(tmp_path)
    leave(store, machine=lease.this_machine(), pid=os.getpid(), process_start="12")
    with Lease.take(store):
        pass


def test_a_driver_on_another_machine_is_followed_when_it_has_been_silent(store):
    leave(store)
    with pytest.raises(LeaseError, match=r"pid 4711 on 'gpu-7\\x1b\[31m', last heard of at .*--take-over"):
        Lease.take(store)
    told, began = [], time.monotonic()
    with Lease.take(store, wait=True, tell=told.append):
        assert time.monotonic() - began >= Lease.LEASE_S and "watching it" in told[0] and "\x1b" not in told[0]


@pytest.mark.parametrize("changes", [{"expires_at": "2020-01-01T00:00:00+00:00"}, {"expires_at": "never"},
                                     {"expires_at": "2020-01-01T00:00:00"}, {"pid": "x"}])
def test_a_lease_that_has_expired_or_says_nothing_is_watched_before_it_is_taken(changes, tmp_path):
    store = open_store(tmp_path)
    leave(store, **changes)
    began = time.monotonic()
    with Lease.take(store):
        assert time.monotonic() - began >= Lease.LEASE_S


def test_one_that_is_renewed_while_it_is_watched_stays_its_drivers(tmp_path):
    store = open_store(tmp_path)
    with Lease.take(store) as first:
        pass
    first.over.clear()                                  # its clock is an hour late, and it works on
    late = datetime.now(UTC) - timedelta(hours=1)
    leave(store, id=first.id, expires_at=late.isoformat())
    threading.Timer(0.3, first.renew).start()
    with pytest.raises(LeaseError, match="another driver works on this run"):
        Lease.take(store)


def test_a_driver_that_lost_its_lease_learns_it_and_leaves_the_others_alone(store):
    lost = threading.Event()
    with pytest.raises(LeaseError, match=r"no longer this driver's: it belongs to pid 4711 on 'gpu-7"):
        with Lease.take(store) as held:
            held.on_lost = lost.set
            leave(store)
            assert lost.wait(30)
            held.check()
    assert said(store)["id"] == "other" and not said(store)["released"]


def test_after_a_long_sleep_the_lease_is_looked_at_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Lease, "RENEW_S", 3600.0)
    store = open_store(tmp_path)
    with Lease.take(store) as held:
        leave(store)
        held.renewed -= 2 * Lease.LEASE_S
        with pytest.raises(LeaseError):
            held.check()


def test_a_store_that_is_away_for_a_while_costs_no_lease(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    with Lease.take(store) as held:
        with monkeypatch.context() as away:
            def fail(*_, **__):
                raise StoreError("away")
            away.setattr(type(store), "get", fail)
            time.sleep(0.3)
        wait_until(lambda: said(store)["renewals"] >= 2)
        held.check()


def test_without_compare_and_swap_it_is_weaker_and_says_so(s3_bucket, s3_server):
    store, told = open_store(s3_bucket), []
    s3_server.fault(method="PUT", match="", header="If-Match", status=501, times=1000)
    with Lease.take(store, tell=told.append) as held:
        assert "no compare-and-swap" in told[0] and not held.atomic
        with pytest.raises(LeaseError):
            Lease.take(store)
        # somebody took over; more than once, since a renewal that has just looked writes over the first
        wait_until(lambda: leave(store) or held.lost)
    assert said(store)["id"] == "other"


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"id": 1}'])
def test_a_damaged_lease_is_nobodys(data):
    holder = Holder.read(data)
    assert holder.is_silent and not holder.is_dead and not holder.released and "nobody knows" in str(holder)


def wait_until(condition, timeout_s=30):
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)
