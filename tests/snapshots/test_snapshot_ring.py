"""The ring: copies in place, a pointer to the approved one, and no state under another's name."""

import threading

import pytest
import torch
from snapshot_kit import Run, same

from loopguard.errors import SnapshotError
from loopguard.snapshots import Ring, Tape


def addresses(slot):
    return [tensor.data_ptr() for tensor in slot.encoded().tensors]


def value(slot):
    return slot.state()["w"].item()


def state(number):
    return {"w": torch.tensor([float(number)]), "text": f"{number}"}


def test_a_slot_does_not_follow_the_live_state():
    run, ring = Run(), Ring()
    run.train(3)
    slot = ring.take(run.state(), {"update": 3})
    before = run.state()["model"]["0.weight"].clone()
    run.train(3)
    assert same(slot.state()["model"]["0.weight"], before)
    assert not same(run.state()["model"]["0.weight"], before)


def test_slots_take_turns_at_the_same_addresses():
    """Two allocations for a whole run; the states in between are exact."""
    run, ring = Run(), Ring()
    run.train(1)
    seen = []
    for _ in range(6):
        run.train(1)
        slot = ring.take(run.state(), {})
        assert same(slot.state(), run.state())
        ring.approve(slot)
        seen.append(addresses(slot))
    assert seen[0] == seen[2] == seen[4]
    assert seen[1] == seen[3] == seen[5]
    assert not set(seen[0]) & set(seen[1])


def test_a_state_that_grows_keeps_the_memory_that_still_fits():
    """An optimizer has no moments before its first update; the weights stay where they were."""
    run, ring = Run(), Ring()
    before = set(addresses(ring.take(run.state(), {})))
    run.train(1)
    after = set(addresses(ring.take(run.state(), {})))
    assert before <= after
    assert len(after) > len(before)


def test_the_approved_slot_is_never_written_over():
    ring = Ring()
    ring.approve(ring.take(state(1), {}))
    for number in range(2, 6):
        ring.take(state(number), {})
        ring.take_midway(state(-number), {})
        assert value(ring.approved) == 1


def test_nothing_is_approved_before_somebody_says_so():
    ring = Ring()
    slot = ring.take(state(1), {"update": 7})
    assert ring.approved is None
    ring.approve(slot)
    assert ring.approved is slot
    assert ring.approved.facts == {"update": 7}


def test_the_slot_of_before_stays_whole_until_the_next_candidate():
    ring = Ring()
    first, second = ring.take(state(1), {}), None
    ring.approve(first)
    second = ring.take(state(2), {})
    ring.approve(second)
    assert (value(first), value(second)) == (1, 2)
    ring.take(state(3), {})
    assert first.stale
    assert value(ring.approved) == 2


def test_a_stale_slot_gives_nothing_instead_of_a_later_state():
    ring = Ring()
    old = ring.take(state(1), {"update": 1})
    ring.take(state(2), {})
    for act in (old.state, old.hold, lambda: ring.approve(old)):
        with pytest.raises(SnapshotError, match="'update': 1"):
            act()


def test_a_slot_of_elsewhere_is_not_approved():
    ring = Ring()
    for stranger in (Ring().take(state(1), {}), ring.take_midway(state(2), {})):
        with pytest.raises(SnapshotError, match="not one of this ring"):
            ring.approve(stranger)


def test_a_state_that_cannot_be_held_leaves_the_ring_as_it_was():
    ring = Ring()
    slot = ring.take(state(1), {})
    with pytest.raises(TypeError, match=r"state\.w is a set"):
        ring.take({"w": {1}}, {})
    assert value(slot) == 1


def test_a_held_slot_is_waited_for():
    """While a slot is written to disk its memory is not taken."""
    ring = Ring()
    slot = ring.take(state(1), {})
    slot.hold()
    taken = threading.Event()
    thread = threading.Thread(target=lambda: (ring.take(state(2), {}), taken.set()))
    thread.start()
    assert not taken.wait(0.1)
    assert value(slot) == 1
    slot.release()
    assert taken.wait(10)
    thread.join()
    assert slot.stale


def test_tensors_of_many_kinds_are_copied_bit_for_bit():
    mixed = {
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False]),
        "keys": torch.arange(4).to(torch.uint32),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "none": torch.empty(0),
        "one": torch.tensor(5),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    assert same(Ring().take(mixed, {}).state(), mixed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
class TestOnAGpu:
    def test_a_state_is_copied_to_pinned_memory_without_waiting_for_the_device(self):
        ring, live = Ring(), {"w": torch.zeros(1 << 20, device="cuda"), "step": torch.tensor(3.0)}
        first = ring.take(live, {})
        assert [tensor.is_pinned() for tensor in first.encoded().tensors] == [False, True]  # step comes before w
        torch.cuda.set_sync_debug_mode("error")
        try:
            slot = ring.take(live, {})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same(slot.state(), {"w": torch.zeros(1 << 20), "step": torch.tensor(3.0)})

    def test_an_update_that_is_queued_behind_the_copy_does_not_reach_the_slot(self):
        """The device is kept busy, so that the copy is still on its way when the update is asked for."""
        ring, busy = Ring(), torch.randn(2048, 2048, device="cuda")
        live = torch.zeros(1 << 22, device="cuda")
        ring.take({"w": live}, {})
        for _ in range(20):
            busy = busy @ busy / 2048
        slot = ring.take({"w": live}, {})
        live.add_(1)
        assert slot.state()["w"].eq(0).all()
        assert live.eq(1).all()

    def test_slots_keep_their_addresses(self):
        ring, seen = Ring(), []
        for number in range(4):
            slot = ring.take({"w": torch.full((100,), float(number), device="cuda")}, {})
            ring.approve(slot)
            assert slot.state()["w"].eq(number).all()
            seen.append(addresses(slot))
        assert seen[0] == seen[2]
        assert seen[1] == seen[3]

    def test_a_batch_on_the_tape_is_what_it_was(self):
        tape, buffer = Tape(limit_bytes=1 << 20), torch.zeros(1000, device="cuda")
        for number in range(3):
            buffer.fill_(number)
            tape.keep(buffer, None)
            tape.settle(number, {}, clip_norm=None, decision="allow")
        torch.cuda.synchronize()
        assert [update.batches[0].batch[0].item() for update in tape.updates()] == [0, 1, 2]
