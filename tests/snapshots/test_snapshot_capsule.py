"""The capsule: enough to replay a freeze from, whole or refused, and never at the cost of the freeze."""

import json

import pytest
import torch
from snapshot_kit import DATA, Run, same

from loopguard.errors import DiskError, SnapshotError
from loopguard.snapshots import Ring, SnapshotStore, Tape, read_capsule, write_capsule

DECISION = {"gate": "update", "reason": "loss is nan", "readings": {"loss": float("nan")}, "odd": {1}}
FACTS = {"policy": "ab" * 32, "versions": {"torch": "2.13.0"}}


def tape_of(*numbers):
    tape = Tape(limit_bytes=1 << 20)
    for number in numbers:
        tape.keep({"x": torch.tensor([float(number)])}, {"torch": torch.get_rng_state()})
        tape.settle(number, {"loss": number / 7}, clip_norm=None, decision="allow")
    return tape


def sealed(folder, **changed):
    given = {
        "limit_bytes": 1 << 20,
        "decision": DECISION,
        "anchor": Ring().take({"w": torch.zeros(4)}, {"update": 0}),
        "tape": tape_of(1, 2),
        "suspect_state": {"w": torch.ones(4)},
        "facts": FACTS,
    }
    return write_capsule(folder, **{**given, **changed})


def test_everything_in_it_comes_back(tmp_path):
    written = sealed(tmp_path / "freezes" / "f1")
    found = read_capsule(tmp_path / "freezes" / "f1", written.digest)
    assert same(found.start_state(), {"w": torch.zeros(4)})
    assert same(found.suspect_state(), {"w": torch.ones(4)})
    assert [update.readings["loss"] for update in found.updates()] == [1 / 7, 2 / 7]
    assert same(found.decision, {**DECISION, "odd": [1]})
    assert found.facts == FACTS
    assert found.left_out == written.left_out == {}
    assert SnapshotStore(found.folder / "start").facts(found.start) == {"update": 0}


def test_a_person_can_read_the_decision_without_us(tmp_path):
    sealed(tmp_path)
    body = json.loads((tmp_path / "capsule.json").read_text())
    assert body["decision"]["reason"] == "loss is nan"
    assert body["decision"]["readings"]["loss"] == {"$float": "nan"}


def test_the_start_may_be_a_snapshot_that_is_on_disk_already_and_outlives_it_there(tmp_path):
    store = SnapshotStore(tmp_path / "snapshots")
    digest = store.write({"w": torch.zeros(4)}, {"update": 0})
    sealed(tmp_path / "f1", anchor=digest, store=store)
    linked = tmp_path / "f1" / "start" / digest / "state.safetensors"
    assert linked.samefile(store.root / digest / "state.safetensors")
    store.prune(keep=set())
    assert same(read_capsule(tmp_path / "f1").start_state(), {"w": torch.zeros(4)})


class TestBound:
    def test_past_the_bound_the_suspect_state_is_left_out_and_the_rest_is_there(self, tmp_path):
        big = {"w": torch.zeros(300_000)}
        capsule = sealed(tmp_path, anchor=Ring().take(big, {}), suspect_state=big, limit_bytes=2_000_000)
        assert capsule.suspect is None
        assert "it has 1.1 MiB" in capsule.left_out["suspect"]
        assert "the bound is 1.9 MiB" in capsule.left_out["suspect"]
        found = read_capsule(tmp_path)
        assert same(found.start_state(), big)
        assert len(found.updates()) == 2
        with pytest.raises(SnapshotError, match="lacks its suspect: it has 1.1 MiB"):
            found.suspect_state()

    def test_the_start_is_never_left_out_however_small_the_bound(self, tmp_path):
        sealed(tmp_path, limit_bytes=0)
        assert same(read_capsule(tmp_path).start_state(), {"w": torch.zeros(4)})

    def test_within_the_bound_it_is(self, tmp_path):
        sealed(tmp_path)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1 << 20


class TestLeftOut:
    def test_without_a_model_there_is_no_state(self, tmp_path):
        capsule = sealed(tmp_path, anchor=None, suspect_state=None, tape=tape_of())
        assert capsule.left_out == {"start": "no model was attached", "suspect": "no model was attached"}
        assert read_capsule(tmp_path).updates() == []
        with pytest.raises(SnapshotError, match="lacks its start: no model was attached"):
            capsule.start_state()

    def test_what_cannot_be_written_down_does_not_cost_the_rest(self, tmp_path):
        tape = tape_of(1)
        tape.keep({"x": 1}, {"generator": object()})
        tape.settle(2, {}, clip_norm=None, decision="freeze")
        capsule = sealed(tmp_path, tape=tape, suspect_state={"w": {1}})
        assert capsule.left_out["tape"].startswith("tape[1].batches[0].rng.generator is a object")
        assert capsule.left_out["suspect"].startswith("state.w is a set")
        with pytest.raises(SnapshotError, match="lacks its tape"):
            read_capsule(tmp_path).updates()

    def test_a_start_that_is_gone_is_told_and_the_rest_is_kept(self, tmp_path):
        ring = Ring()
        stale = ring.take({"w": torch.zeros(4)}, {"update": 5})
        ring.take({"w": torch.ones(4)}, {})
        capsule = sealed(tmp_path, anchor=stale)
        assert "filled again" in capsule.left_out["start"]
        assert len(read_capsule(tmp_path).updates()) == 2


class TestDamage:
    @pytest.mark.parametrize("part", ["capsule.json", "tape.json", "tape.safetensors", "start", "suspect"])
    def test_one_changed_byte_anywhere_is_found(self, tmp_path, part):
        digest = sealed(tmp_path).digest
        path = tmp_path / part
        path = path if path.is_file() else next(path.rglob("state.safetensors"))
        data = bytearray(path.read_bytes())
        data[-4] ^= 1
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match=path.name):
            read_capsule(tmp_path, digest)

    def test_a_folder_without_one_says_so(self, tmp_path):
        with pytest.raises(SnapshotError, match="holds no capsule"):
            read_capsule(tmp_path)


class TestFullDisk:
    def test_no_room_for_the_suspect_state_is_told_in_the_capsule(self, small_disk):
        capsule = sealed(small_disk / "f1", suspect_state={"w": torch.zeros(100_000)})
        assert "No space left" in capsule.left_out["suspect"]
        assert same(read_capsule(small_disk / "f1").start_state(), {"w": torch.zeros(4)})

    def test_no_room_for_the_tape_gives_back_what_the_rest_took(self, small_disk):
        """The log is on the same disk and has to record the freeze."""
        tape = Tape(limit_bytes=1 << 30)
        tape.keep(torch.zeros(100_000), None)
        tape.settle(1, {}, clip_norm=None, decision="allow")
        anchor = Ring().take({"w": torch.zeros(40_000)}, {})
        with pytest.raises(DiskError, match="No space left"):
            sealed(small_disk / "f1", tape=tape, anchor=anchor)
        assert [path for path in small_disk.rglob("*") if path.is_file()] == []


def test_a_run_is_replayed_from_a_capsule_to_the_bit(tmp_path):
    """The state, the batches and the generators of a capsule are all that a replay takes."""
    run, tape = Run(), Tape(limit_bytes=1 << 30)
    run.train(3)
    anchor = Ring().take(run.state(), {"update": 3})
    for update in range(4, 10):
        taped(run, tape, update)
    sealed(tmp_path, anchor=anchor, tape=tape, suspect_state=run.state(), limit_bytes=1 << 30)

    capsule, again = read_capsule(tmp_path), Run()
    again.restore(capsule.start_state())
    for told in capsule.updates():
        torch.set_rng_state(told.batches[0].rng["torch"])
        assert step(again, told.batches[0].batch).hex() == told.readings["loss"].hex()
    assert same(again.state()["model"], capsule.suspect_state()["model"])
    assert same(again.state()["optimizer"], capsule.suspect_state()["optimizer"])


def taped(run, tape, update):
    batch = DATA[torch.randperm(64)[:8]]
    tape.keep(batch, {"torch": torch.get_rng_state()})
    tape.settle(update, {"loss": step(run, batch)}, clip_norm=None, decision="allow")


def step(run, batch):
    loss = (run.model(batch) - batch).square().mean()
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.scheduler.step()
    return loss.item()
