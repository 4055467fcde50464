"""The tape: what went into each update, as it was, and nothing that did not happen."""

import json
import math
import random
import struct

import numpy as np
import pytest
import torch
from snapshot_kit import same

from loopguard.errors import DiskError, SnapshotError
from loopguard.snapshots import Tape


def rng():
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": (kind, keys.tolist(), *rest)}


def batch(number):
    return {"ids": torch.full((2, 3), number), "text": ["a", f"{number}"], "weight": number / 3}


def settled(tape, update, number_of_batches=1, **readings):
    for i in range(number_of_batches):
        tape.keep(batch(10 * update + i), rng())
    tape.settle(update, readings or {"loss": 0.1}, clip_norm=1.0, decision="allow", cycle=2, update_in_cycle=update)


def test_what_is_read_is_what_happened(tmp_path):
    tape = Tape(limit_bytes=1 << 20)
    before = rng()
    tape.keep(batch(1), before)
    tape.settle(7, {"loss": 0.1 + 0.2}, clip_norm=None, decision="skip", cycle=1, update_in_cycle=3)
    (found,) = Tape.read(tmp_path, tape.write(tmp_path))
    assert (found.update, found.cycle, found.update_in_cycle, found.clip_norm, found.decision) == (
        7,
        1,
        3,
        None,
        "skip",
    )
    assert found.readings == {"loss": 0.1 + 0.2}
    assert same(found.batches[0].batch, batch(1))
    assert same(found.batches[0].rng, before)


def test_several_batches_of_one_update_and_none_of_another(tmp_path):
    tape = Tape(limit_bytes=1 << 20)
    settled(tape, 1, 3)
    settled(tape, 2, 0)
    settled(tape, 3, 1)
    found = Tape.read(tmp_path, tape.write(tmp_path))
    assert [len(update.batches) for update in found] == [3, 0, 1]
    assert [kept.batch["weight"] for kept in found[0].batches] == [10 / 3, 11 / 3, 4.0]


@pytest.mark.parametrize("bits", ["7ff8000000000000", "fff8000000000007", "fff0000000000000", "8000000000000000"])
def test_readings_keep_their_bits(tmp_path, bits):
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    tape = Tape(limit_bytes=1 << 20)
    settled(tape, 1, loss=value, grad_norm=math.pi)
    readings = Tape.read(tmp_path, tape.write(tmp_path))[0].readings
    assert struct.pack(">d", readings["loss"]).hex() == bits
    assert readings["grad_norm"] == math.pi


def test_a_batch_is_kept_as_it_was_when_it_was_handed_in(tmp_path):
    """A loop that fills one buffer again and again does not change what is on the tape."""
    tape, buffer = Tape(limit_bytes=1 << 20), torch.zeros(4)
    for number in range(3):
        buffer.fill_(number)
        tape.keep({"x": buffer}, None)
        tape.settle(number, {}, clip_norm=None, decision="allow")
    found = Tape.read(tmp_path, tape.write(tmp_path))
    assert [update.batches[0].batch["x"][0].item() for update in found] == [0, 1, 2]


def test_readings_that_the_device_tells_late_are_the_ones_that_are_written():
    tape, late = Tape(limit_bytes=1 << 20), {}
    tape.settle(1, late, clip_norm=None, decision="staged")
    late["loss"] = 2.5
    assert tape.updates()[0].readings == {"loss": 2.5}


def test_it_is_full_past_its_bound_and_empty_after_a_restart():
    tape = Tape(limit_bytes=100_000)
    count = 0
    while not tape.full:
        settled(tape, count := count + 1)
    # Each batch has about 40 KB: most of it are the states of two Mersenne Twisters.
    assert 2 <= count <= 4
    tape.restart()
    assert (tape.full, tape.bytes, tape.updates()) == (False, 0, [])


def test_its_size_is_about_what_it_takes_on_disk(tmp_path):
    tape = Tape(limit_bytes=1 << 30)
    for update in range(20):
        tape.keep({"x": torch.zeros(5000)}, {"torch": torch.get_rng_state()})
        tape.settle(update, {"loss": 1.0}, clip_norm=None, decision="allow")
    tape.write(tmp_path)
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0.9 < tape.bytes / on_disk < 1.1


def test_a_restart_drops_the_batches_that_were_not_settled_unless_they_come_after_the_anchor():
    tape = Tape(limit_bytes=1 << 20)
    settled(tape, 1)
    tape.keep(batch(2), None)
    tape.restart(carry=True)
    assert tape.bytes > 0
    tape.settle(2, {}, clip_norm=None, decision="allow")
    assert [len(update.batches) for update in tape.updates()] == [1]
    tape.keep(batch(3), None)
    tape.restart()
    tape.settle(3, {}, clip_norm=None, decision="allow")
    assert [len(update.batches) for update in tape.updates()] == [0]


def test_a_batch_that_cannot_be_written_down_is_refused_when_it_is_handed_in():
    with pytest.raises(TypeError, match=r"batch\.images\[0\] is a object"):
        Tape(limit_bytes=1).keep({"images": [object()]}, None)


@pytest.mark.parametrize("name", ["tape.json", "tape.safetensors"])
def test_damage_is_found(tmp_path, name):
    tape = Tape(limit_bytes=1 << 20)
    settled(tape, 1)
    sha256 = tape.write(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-3] ^= 1
    (tmp_path / name).write_bytes(data)
    for act in (Tape.read, Tape.verify):
        with pytest.raises(SnapshotError, match=name):
            act(tmp_path, sha256)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"format": 99}', b"\xff"])
def test_a_tape_that_is_none_says_so(tmp_path, body):
    (tmp_path / "tape.json").write_bytes(body)
    with pytest.raises(SnapshotError, match=r"tape\.json (is damaged|has format 99)"):
        Tape.read(tmp_path)


def test_it_can_be_written_again(tmp_path):
    tape = Tape(limit_bytes=1 << 20)
    settled(tape, 1)
    first = tape.write(tmp_path)
    settled(tape, 2)
    second = tape.write(tmp_path)
    assert first != second
    assert len(Tape.read(tmp_path, second)) == 2


def test_a_full_disk_is_a_disk_error(small_disk):
    tape = Tape(limit_bytes=1 << 30)
    tape.keep(torch.zeros(1_000_000), None)
    tape.settle(1, {}, clip_norm=None, decision="allow")
    with pytest.raises(DiskError, match="No space left"):
        tape.write(small_disk)


def test_the_json_is_strict(tmp_path):
    tape = Tape(limit_bytes=1 << 20)
    settled(tape, 1, loss=float("nan"))
    tape.write(tmp_path)

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / "tape.json").read_text(), parse_constant=refuse)
