"""The writer: the disk off the thread that trains, in order, and no trouble lost."""

import os
import sys
import threading

import pytest
import torch
from snapshot_kit import same

from loopguard.errors import AuditWriteError, DiskError, SnapshotError
from loopguard.snapshots import Ring, SnapshotStore, Writer


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "snapshots")


def state(number):
    return {"w": torch.full((4,), float(number))}


def test_a_slot_gets_to_disk_and_done_is_told_when_it_is_there(store):
    seen = []
    with Writer(store) as writer:
        written = writer.submit(
            Ring().take(state(1), {"update": 1}),
            {"update": 1, "policy": "p"},
            lambda digest: seen.append((same(store.read(digest), state(1)), threading.current_thread().name)),
        )
        digest = written.wait()
    assert written.done
    assert store.facts(digest) == {"update": 1, "policy": "p"}
    assert seen == [(True, "loopguard-snapshots_0")]


def test_the_slot_keeps_its_memory_until_it_is_written(store):
    """A candidate that comes while the last one is on its way waits for it, and neither is torn."""
    ring, go = Ring(), threading.Event()
    slow = _Slow(store, go)
    with Writer(slow) as writer:
        written = writer.submit(ring.take(state(1), {}), {})
        taking = threading.Thread(target=lambda: ring.take(state(2), {}))
        taking.start()
        taking.join(0.1)
        assert taking.is_alive()
        assert not written.done
        go.set()
        taking.join(10)
        assert not taking.is_alive()
        assert same(store.read(written.wait()), state(1))


def test_the_other_slot_is_free_meanwhile(store):
    ring, go = Ring(), threading.Event()
    with Writer(_Slow(store, go)) as writer:
        first = ring.take(state(1), {})
        ring.approve(first)
        written = writer.submit(first, {})
        second = ring.take(state(2), {})
        assert not written.done
        go.set()
        assert same(store.read(written.wait()), state(1))
        assert same(second.state(), state(2))


def test_slots_are_written_in_the_order_they_came(store):
    ring, order = Ring(), []
    with Writer(store) as writer:
        for number in range(4):
            writer.submit(ring.take(state(number), {}), {"update": number}, lambda digest: order.append(digest))
    assert [store.facts(digest)["update"] for digest in order] == [0, 1, 2, 3]


def test_closing_waits_for_what_was_submitted(store):
    writer, order = Writer(store), []
    writer.submit(Ring().take(state(1), {}), {}, order.append)
    writer.close()
    writer.close()
    assert len(order) == 1
    slot = Ring().take(state(1), {})
    with pytest.raises(RuntimeError):
        writer.submit(slot, {})
    slot.retire()  # nobody holds it


def test_a_full_disk_is_told_twice_to_who_waits_and_to_who_asks(small_disk):
    store = SnapshotStore(small_disk / "snapshots")
    ring = Ring()
    with Writer(store) as writer:
        before = writer.submit(ring.take(state(1), {}), {}).wait()
        called = []
        written = writer.submit(ring.take({"w": torch.zeros(1_000_000)}, {}), {}, called.append)
        with pytest.raises(DiskError, match="No space left"):
            written.wait()
        assert called == []
        assert isinstance(writer.trouble, DiskError)
        assert writer.trouble is None
        # The writer goes on, and what was there is as it was.
        after = writer.submit(ring.take(state(2), {}), {}).wait()
        assert same([store.read(before), store.read(after)], [state(1), state(2)])


def test_what_done_raises_is_not_lost(store):
    def refuse(_):
        raise AuditWriteError("no record, no promotion")

    with Writer(store) as writer:
        written = writer.submit(Ring().take(state(1), {}), {}, refuse)
        with pytest.raises(AuditWriteError):
            written.wait()
        assert isinstance(writer.trouble, AuditWriteError)


def test_a_stale_slot_is_refused_at_once(store):
    ring = Ring()
    old = ring.take(state(1), {})
    ring.take(state(2), {})
    with Writer(store) as writer, pytest.raises(SnapshotError, match="filled again"):
        writer.submit(old, {})


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a thread a priority of its own")
def test_the_thread_that_trains_goes_first(store):
    def priority(*_):
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, seen = priority(), []
    with Writer(store) as writer:
        writer.submit(Ring().take(state(1), {}), {}, lambda _: seen.append(priority())).wait()
    assert seen == [min(before + 10, 19)]
    assert priority() == before


class _Slow(SnapshotStore):
    """Waits at the door until it is told to go."""

    def __init__(self, store, go):
        super().__init__(store.root)
        self._go = go

    def write(self, state, facts=None, *, into=None):
        assert self._go.wait(10)
        return super().write(state, facts, into=into)
