"""Snapshots on disk: whole or not at all, and never something else under their name."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from snapshot_kit import same

from loopguard.errors import DiskError, SnapshotError
from loopguard.snapshots import Promoted, Ring, SnapshotStore, replace_durably

FACTS = {"update": 120, "cycle": 3, "policy": "ab" * 32, "versions": {"torch": "2.13.0"}}


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


def promotion(snapshot, cycle):
    return Promoted(snapshot=snapshot, cycle=cycle, update=cycle * 10, panel={"correct": 0.5})


def folders(store):
    return sorted(path.name for path in store.root.iterdir() if path.is_dir())


class TestSnapshots:
    def test_what_is_read_is_what_was_written_to_the_bit_and_the_type(self, store):
        assert same(store.read(store.write(state())), state())

    def test_a_slot_is_written_as_the_state_that_it_was_taken_from(self, store):
        slot = Ring().take(state(), FACTS)
        assert store.write(slot) == store.write(state(), FACTS)
        assert same(store.read(store.write(slot)), state())

    def test_equal_states_have_equal_names_and_different_ones_do_not(self, store):
        changed = state()
        changed["model"]["a.weight"] = changed["model"]["a.weight"] + 1
        assert store.write(state()) == store.write(state()) != store.write(changed)
        assert len(folders(store)) == 2

    def test_the_order_of_keys_is_not_part_of_a_name(self, store):
        """An optimizer that was loaded lists its state in another order than one that has stepped."""
        one, other = torch.zeros(1), torch.ones(1)
        assert store.write({"a": one, "b": {0: other, 1: one}}) == store.write({"b": {1: one, 0: other}, "a": one})

    def test_the_name_is_the_hash_of_the_manifest_and_that_holds_the_hash_of_the_tensors(self, store):
        digest = store.write(state(), FACTS)
        manifest = (store.root / digest / "manifest.json").read_bytes()
        tensors = (store.root / digest / "state.safetensors").read_bytes()
        assert hashlib.sha256(manifest).hexdigest() == digest
        assert json.loads(manifest)["tensors"] == hashlib.sha256(tensors).hexdigest()
        assert json.loads(manifest)["facts"] == FACTS

    def test_facts_are_told_without_reading_a_tensor(self, store):
        digest = store.write(state(), FACTS)
        (store.root / digest / "state.safetensors").unlink()
        assert store.facts(digest) == FACTS

    def test_a_snapshot_does_not_follow_the_tensor_it_was_taken_from(self, store):
        live = torch.zeros(3)
        digest = store.write({"w": live})
        live += 1
        assert torch.equal(store.read(digest)["w"], torch.zeros(3))

    def test_a_value_that_is_neither_tensor_nor_json_is_refused_before_anything_is_written(self, store):
        with pytest.raises(TypeError, match=r"state\.model is a set"):
            store.write({"model": {1, 2}})
        assert not store.root.exists()

    def test_two_stores_in_one_folder_do_not_disturb_each_other(self, store):
        """The same snapshot from two writers at once is there once, and whole."""
        big = {"w": torch.randn(200_000)}
        digests = []
        threads = [
            threading.Thread(target=lambda: digests.append(SnapshotStore(store.root).write(big))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(digests) == 4
        assert len(set(digests)) == 1
        assert folders(store) == [digests[0]]
        assert same(store.read(digests[0]), big)


class TestDamage:
    @pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
    def test_one_changed_byte_is_found(self, store, name):
        digest = store.write(state())
        path = store.root / digest / name
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        for act in (store.read, store.verify):
            with pytest.raises(SnapshotError, match="is not what (the manifest|its name) says"):
                act(digest)

    @pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
    def test_a_missing_file_is_named(self, store, name):
        digest = store.write(state())
        (store.root / digest / name).unlink()
        with pytest.raises(SnapshotError, match="cannot be read: No such file"):
            store.read(digest)

    def test_a_missing_snapshot_is_named(self, store):
        with pytest.raises(SnapshotError, match="0000"):
            store.read("0" * 64)

    def test_a_whole_snapshot_under_another_name_is_refused(self, store):
        digest = store.write(state())
        (store.root / digest).rename(store.root / ("0" * 64))
        with pytest.raises(SnapshotError, match=f"its manifest has digest {digest}"):
            store.read("0" * 64)

    def test_a_damaged_snapshot_is_mended_by_writing_it_again(self, store):
        digest = store.write(state())
        (store.root / digest / "state.safetensors").write_bytes(b"")
        assert store.write(state()) == digest
        assert same(store.read(digest), state())
        assert folders(store) == [digest]

    def test_an_earlier_format_is_called_that(self, store):
        folder = store.root / ("1" * 64)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(b'{"format":1,"tree":null}')
        with pytest.raises(SnapshotError, match="format 1, of an earlier version"):
            store.read(folder.name)


class TestPointer:
    def test_it_survives_and_remembers_what_it_pointed_at_before_newest_first(self, store):
        assert store.promoted() is None
        assert store.history() == ()
        store.root.mkdir()
        promotions = [promotion(f"{cycle}" * 64, cycle) for cycle in range(1, 5)]
        for one in promotions:
            store.promote(one)
        again = SnapshotStore(store.root)
        assert again.promoted() == promotions[-1]
        assert again.history() == tuple(reversed(promotions[:-1]))

    def test_promoting_the_same_again_is_no_promotion(self, store):
        store.root.mkdir()
        for _ in range(2):
            store.promote(promotion("a" * 64, 1))
        assert store.history() == ()

    def test_rolling_back_points_at_an_earlier_one_and_forgets_those_after_it(self, store):
        digests = [store.write({"w": torch.tensor(cycle)}) for cycle in range(4)]
        for cycle, digest in enumerate(digests):
            store.promote(promotion(digest, cycle))
        assert store.roll_back(digests[1]) == promotion(digests[1], 1)
        assert store.promoted() == promotion(digests[1], 1)
        assert store.history() == (promotion(digests[0], 0),)

    def test_rolling_back_to_what_is_damaged_or_was_never_promoted_changes_nothing(self, store):
        digests = [store.write({"w": torch.tensor(cycle)}) for cycle in range(3)]
        for cycle, digest in enumerate(digests[:2]):
            store.promote(promotion(digest, cycle))
        (store.root / digests[0] / "state.safetensors").write_bytes(b"")
        for digest, message in ((digests[2], "names no earlier promotion"), (digests[0], "is not what")):
            with pytest.raises(SnapshotError, match=message):
                store.roll_back(digest)
        assert store.promoted() == promotion(digests[1], 1)

    def test_a_pointer_without_history_is_one_of_the_version_before(self, store):
        store.write({"w": torch.zeros(1)})
        body = {"snapshot": "a" * 64, "cycle": 1, "update": 2, "panel": {"correct": 1.0}}
        replace_durably(store.root / "promoted.json", json.dumps(body).encode())
        assert store.promoted().cycle == 1
        assert store.history() == ()

    @pytest.mark.parametrize("body", ['{"snapshot": 1}', "[]", "", '{"history": 3'])
    def test_one_that_cannot_be_read_is_an_error_and_not_a_new_beginning(self, store, body):
        digest = store.write({"w": torch.zeros(1)})
        replace_durably(store.root / "promoted.json", body.encode())
        for act in (store.promoted, store.history, lambda: store.prune(keep=set())):
            with pytest.raises(SnapshotError, match="pointer"):
                act()
        assert folders(store) == [digest]

    def test_a_panel_may_hold_what_is_not_finite(self, store):
        store.root.mkdir()
        store.promote(Promoted(snapshot="a" * 64, cycle=1, update=1, panel={"ppl": float("inf")}))
        assert store.promoted().panel == {"ppl": float("inf")}


class TestPrune:
    def test_it_keeps_what_it_is_told_and_what_is_promoted(self, store):
        first, second, third = (store.write({"w": torch.tensor(i)}) for i in range(3))
        store.promote(promotion(second, 1))
        store.prune(keep={third})
        assert folders(store) == sorted([second, third])
        with pytest.raises(SnapshotError):
            store.read(first)

    def test_what_a_killed_writer_left_is_swept_and_never_read(self, store):
        digest = store.write({"w": torch.zeros(1)})
        partial = store.root / f".partial-{'0' * 32}"
        partial.mkdir()
        store.prune(keep={digest})
        assert folders(store) == [digest]

    def test_what_is_being_written_is_left_alone(self, store, monkeypatch):
        """A prune in the middle of a write, as from another thread, does not take its folder away."""
        kept = store.write({"w": torch.zeros(1)})
        real, partials = os.fsync, []

        def fsync(descriptor):
            real(descriptor)
            if partial := [name for name in folders(store) if name.startswith(".")]:
                store.prune(keep={kept})
                partials.append(partial)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            digest = store.write({"w": torch.ones(1)})
        assert len(partials) == 3  # at both files and at the folder
        assert folders(store) == sorted([kept, digest])


class TestLink:
    def test_a_linked_snapshot_is_whole_after_the_first_is_gone(self, store, tmp_path):
        digest = store.write(state())
        store.link(digest, tmp_path / "capsule" / "start")
        linked = tmp_path / "capsule" / "start" / digest / "state.safetensors"
        assert linked.samefile(store.root / digest / "state.safetensors")
        store.prune(keep=set())
        assert folders(store) == []
        assert same(store.read(digest, of=tmp_path / "capsule" / "start"), state())

    def test_where_links_are_not_possible_it_is_a_copy(self, store, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
        digest = store.write(state())
        store.link(digest, tmp_path / "start")
        assert not (tmp_path / "start" / digest / "manifest.json").samefile(store.root / digest / "manifest.json")
        assert same(store.read(digest, of=tmp_path / "start"), state())

    def test_a_snapshot_that_is_missing_or_lacks_a_file_is_not_linked(self, store, tmp_path):
        digest = store.write(state())
        (store.root / digest / "state.safetensors").unlink()
        for name, message in (("0" * 64, "No such file"), (digest, "lacks state.safetensors")):
            with pytest.raises(SnapshotError, match=message):
                store.link(name, tmp_path / "start")
        assert not (tmp_path / "start").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only /proc tells which file a sync is for")
class TestOrder:
    def test_content_is_durable_before_a_name_and_a_name_before_the_pointer(self, store, monkeypatch):
        """A power cut between any two of these leaves what was promoted before."""
        seen = []
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(os, name, _noting(getattr(os, name), name, seen))
        store.root.mkdir()
        digest = store.write(state())
        store.promote(promotion(digest, 1))
        assert seen == [
            "fsync state.safetensors",
            "fsync manifest.json",
            "fsync .partial",
            f"rename {digest[:8]}",
            "fsync snapshots",
            "fsync .promoted.json.partial",
            "replace promoted.json",
            "fsync snapshots",
        ]

    def test_a_folder_that_is_new_has_a_durable_name_too(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(os, "fsync", _noting(os.fsync, "fsync", seen))
        SnapshotStore(tmp_path / "a" / "b").write({}, into=tmp_path / "a" / "b")
        assert seen[:2] == [f"fsync {tmp_path.name}", "fsync a"]


def _noting(real, name, seen):
    def act(*args, **options):
        if name == "fsync":
            target = Path(f"/proc/self/fd/{args[0]}").readlink().name
            target = ".partial" if target.startswith(".partial-") else target
        else:
            target = Path(args[1]).name
            target = target[:8] if len(target) == 64 else target
        seen.append(f"{name} {target}")
        return real(*args, **options)

    return act


class TestFullDisk:
    def test_a_full_disk_is_a_disk_error_and_leaves_nothing_behind(self, small_disk):
        store = SnapshotStore(small_disk / "snapshots")
        before = store.write({"w": torch.zeros(10)})
        store.promote(promotion(before, 1))
        with pytest.raises(DiskError, match="No space left"):
            store.write({"w": torch.zeros(1_000_000)})
        assert folders(store) == [before]
        assert store.promoted() == promotion(before, 1)
        assert store.write({"w": torch.ones(10)}) in folders(store)
