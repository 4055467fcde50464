"""Snapshots: whole or not at all, and never something else under their name."""

import json

import pytest

from loopguard.errors import SnapshotError
from loopguard.snapshots import Promoted, SnapshotStore, replace_durably

torch = pytest.importorskip("torch", reason="snapshots hold tensors")
pytest.importorskip("safetensors", reason="snapshots are safetensors files")


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "snapshots")


def state():
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    return {
        "model": {"a.weight": weight, "tied.weight": weight, "steps": torch.tensor(3)},
        "optimizer": {"state": {0: {"exp_avg": weight * 2}, 1: {}}, "betas": (0.9, 0.98), "lr": 0.1, "foreach": None},
        "rng": (3, (1, 2**31, 3), None),
        "raw": b"\x00\xff",
        "$odd": [1, "two", True, float("inf")],
    }


def same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_what_is_read_is_what_was_written_to_the_bit_and_the_type(store):
    assert same(store.read(store.write(state())), state())


def test_equal_states_have_equal_names_and_different_ones_do_not(store):
    changed = state()
    changed["model"]["a.weight"] = changed["model"]["a.weight"] + 1
    assert store.write(state()) == store.write(state()) != store.write(changed)


def test_the_order_of_keys_is_not_part_of_a_name(store):
    """An optimizer that was loaded lists its state in another order than one that has stepped."""
    one, other = torch.zeros(1), torch.ones(1)
    assert store.write({"a": one, "b": {0: other, 1: one}}) == store.write({"b": {1: one, 0: other}, "a": one})


def test_a_snapshot_does_not_follow_the_tensor_it_was_taken_from(store):
    live = torch.zeros(3)
    digest = store.write({"w": live})
    live += 1
    assert torch.equal(store.read(digest)["w"], torch.zeros(3))


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_one_changed_byte_is_noticed(store, name):
    digest = store.write(state())
    path = store.root / digest / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match="not what"):
        store.read(digest)


def test_a_missing_snapshot_is_named(store):
    with pytest.raises(SnapshotError, match="0000"):
        store.read("0" * 64)


def test_a_value_that_is_neither_tensor_nor_json_is_refused_before_anything_is_written(store):
    with pytest.raises(TypeError, match=r"state.model is a set"):
        store.write({"model": {1, 2}})
    assert not store.root.exists()


def test_the_pointer_survives_and_prune_keeps_what_it_is_told(store):
    first, second = store.write({"w": torch.zeros(1)}), store.write({"w": torch.ones(1)})
    assert store.promoted() is None
    promoted = Promoted(snapshot=second, cycle=3, update=120, panel={"correct": 0.5})
    store.promote(promoted)
    assert SnapshotStore(store.root).promoted() == promoted
    store.prune(keep={second})
    assert sorted(path.name for path in store.root.iterdir() if path.is_dir()) == [second]
    with pytest.raises(SnapshotError):
        store.read(first)


def test_what_a_killed_writer_left_is_swept_and_never_read(store):
    digest = store.write({"w": torch.zeros(1)})
    partial = store.root / f".partial-{'0' * 64}"
    partial.mkdir()
    store.prune(keep={digest})
    assert not partial.exists()


def test_a_pointer_that_cannot_be_read_is_an_error_and_not_a_new_beginning(store):
    store.write({"w": torch.zeros(1)})
    replace_durably(store.root / "promoted.json", json.dumps({"snapshot": 1}).encode())
    with pytest.raises(SnapshotError, match="pointer"):
        store.promoted()
