"""The state that a run goes back to: in memory at once, on disk beside the training, and never lost to either."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from lab import Lab

from loopguard.audit.verify import verify
from loopguard.controller.rollback import roll_back
from loopguard.errors import DiskError, LoopFrozen, RunBusyError, SnapshotError, UsageError
from loopguard.snapshots import SnapshotStore
from loopguard.snapshots.store import SnapshotStore as Store
from loopguard.state import standing


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def pointer(lab):
    return json.loads((lab.run_dir / "snapshots" / "promoted.json").read_text())


class Gate:
    """Holds the writer's thread until it is opened."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.waiting = threading.Event()
        write = Store.write

        def held(store, state, facts=None, **where):
            self.waiting.set()
            assert self.open.wait(20)
            return write(store, state, facts, **where)

        monkeypatch.setattr(Store, "write", held)


class TestBesideTheTraining:
    def test_training_goes_on_while_a_promotion_is_written(self, lab, monkeypatch):
        with lab.open() as guard:
            lab.build(guard)
            guard._good.wait()
            gate = Gate(monkeypatch)
            cycles = guard.cycles(2)
            cycle = next(cycles)
            lab.update(cycle)
            assert lab.promote(cycle).allowed
            assert gate.waiting.wait(20)
            lab.update(next(cycles))
            assert not lab.events("snapshot.written")
            gate.open.set()
            guard._good.wait()
            assert lab.events("snapshot.written")[0].body["snapshot"] == pointer(lab)["snapshot"]

    def test_a_freeze_goes_back_to_a_promotion_that_is_not_on_disk_yet(self, lab, monkeypatch):
        with lab.open() as guard:
            lab.build(guard)
            guard._good.wait()
            gate = Gate(monkeypatch)
            cycles = guard.cycles(3)
            cycle = next(cycles)
            lab.update(cycle)
            lab.promote(cycle, correct=0.5)
            promoted = guard.state_digest()
            cycle = next(cycles)
            lab.update(cycle)
            gate.open.set()
            with pytest.raises(LoopFrozen):
                lab.promote(cycle, correct=0.9)
            assert guard.state_digest() == promoted

    def test_what_was_promoted_and_not_written_is_undone_by_the_next_start(self, lab, monkeypatch):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1)
            first = guard.state_digest()
        guard = lab.build(lab.open())
        with monkeypatch.context() as patched:
            gate = Gate(patched)
            cycles = guard.cycles(3)
            cycle = next(cycles)
            lab.update(cycle)
            lab.promote(cycle)
            assert lab.events("promotion.applied")[-1].cycle == 2
            guard._log.close()  # a kill, with the snapshot on its way
            gate.open.set()
        with lab.open() as again:
            assert "the promotion of cycle 2 was cut short and is undone" in again.found
            assert standing(lab.run_dir).cycle == 1
            assert not again.frozen
            lab.build(again)
            assert again.state_digest() == first
            assert next(iter(again.cycles(3))).number == 2
        assert verify(lab.run_dir).code == 20

    def test_killed_there_twice_a_run_goes_on_from_the_promotion_before(self, lab, monkeypatch):
        """The log tells of two promotions behind the one that the pointer names, and accuses nobody of an edit."""
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1)
        kept = (lab.run_dir / "snapshots" / "promoted.json").read_bytes()
        for _ in range(2):
            with monkeypatch.context() as patched:
                patched.setattr(Store, "promote", lambda *_: None)  # recorded, and not yet pointed at
                guard = lab.build(lab.open())
                cycle = next(iter(guard.cycles(2)))
                lab.update(cycle)
                lab.promote(cycle)
                guard._good.wait()
                guard._log.close()
        assert (lab.run_dir / "snapshots" / "promoted.json").read_bytes() == kept
        with lab.open() as again:
            assert not again.frozen
            assert again.promoted_cycle == standing(lab.run_dir).cycle == 1

    def test_a_disk_that_does_not_take_it_is_told_at_the_next_gate(self, lab, monkeypatch):
        with pytest.raises(DiskError, match="No space left"), lab.open() as guard:
            lab.build(guard)
            guard._good.wait()

            def full(*_, **__):
                raise DiskError("snapshots could not be written: No space left on device")

            cycles = guard.cycles(2)
            cycle = next(cycles)
            lab.update(cycle)
            monkeypatch.setattr(Store, "write", full)
            lab.promote(cycle)
            cycle = next(cycles)
            with pytest.raises(DiskError, match="No space left"):
                for _ in range(100):
                    lab.update(cycle)
            # And at every gate after it: whoever catches it does not go on without a state to go back to.
            before = guard.state_digest()
            for _ in range(2):
                with pytest.raises(DiskError, match="No space left"):
                    lab.update(cycle)
            assert guard.state_digest() == before

    def test_the_last_good_state_is_left_alone_while_the_run_is_frozen(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1)
        before = pointer(lab)
        files = sorted((lab.run_dir / "snapshots").rglob("*"))
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(2)))
            with pytest.raises(LoopFrozen):
                lab.update(cycle, factor=float("nan"))
            with pytest.raises(LoopFrozen):
                lab.promote(cycle)
        assert pointer(lab) == before
        assert sorted((lab.run_dir / "snapshots").rglob("*")) == files

    def test_the_manifest_says_what_it_is(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2)
            guard._good.wait()
            facts = SnapshotStore(lab.run_dir / "snapshots").facts(pointer(lab)["snapshot"])
            assert (facts["cycle"], facts["update"], facts["policy"]) == (2, 12, guard.policy_digest)
            assert facts["versions"]["torch"] == torch.__version__


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from lab import Lab
from loopguard.snapshots import store, files

lab = Lab(Path({folder!r}))
edge, at = sys.argv[1], int(sys.argv[2])
real, calls = getattr(os, edge), [0]

def cut(*given, **named):
    # The third promotion is the one that is cut; what stood before it is what has to be there afterwards.
    import threading
    if threading.current_thread().name.startswith("loopguard-snapshots") and promoted >= 2:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)

setattr(os, edge, cut)
promoted = 0
with lab.open() as guard:
    lab.build(guard)
    for cycle in guard.cycles(3):
        for _ in range(4):
            lab.update(cycle)
        promoted = cycle.number - 1
        if cycle.number == 3:
            guard._good.wait()
        lab.promote(cycle)
        guard._good.wait()
print("not killed")
"""


@pytest.mark.parametrize(("edge", "at"), [("fsync", n) for n in range(1, 7)] + [("rename", 1), ("replace", 1)])
def test_a_process_killed_at_any_edge_of_writing_leaves_the_promotion_before_or_the_new_one(lab, tmp_path, edge, at):
    """And the run goes on from it, with the log in one piece."""
    tests = str(Path(__file__).parent)
    code = KILLED.format(tests=tests, folder=str(tmp_path))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, edge, str(at)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    now = pointer(lab)
    assert now["cycle"] in (2, 3)
    store = SnapshotStore(lab.run_dir / "snapshots")
    store.verify(now["snapshot"])
    with lab.open() as guard:
        assert not guard.frozen
        lab.build(guard)
        assert next(iter(guard.cycles(4))).number == now["cycle"] + 1
    assert verify(lab.run_dir).code in (10, 20)


class TestGoingBack:
    def test_goes_on_from_the_promotion_before_the_last(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            digests = {}
            for cycle in guard.cycles(3):
                lab.update(cycle)
                lab.promote(cycle)
                digests[cycle.number] = guard.state_digest()
        assert roll_back(lab.run_dir, to=None, by="dana", reason="scored wrongly").cycle == 2
        with lab.open() as guard:
            lab.build(guard)
            assert guard.state_digest() == digests[2]
            assert next(iter(guard.cycles(5))).number == 3
        told = lab.events("promotion.rolled_back")[0]
        assert (told.body["cycle"], told.body["by"], told.body["reason"]) == (2, "dana", "scored wrongly")
        assert verify(lab.run_dir).code == 20

    def test_only_so_far_as_snapshots_are_kept(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 4, updates=1)
        with pytest.raises(UsageError, match="there is one of cycle 3, 2"):
            roll_back(lab.run_dir, to=1, by="dana", reason="further back")
        assert roll_back(lab.run_dir, to=2, by="dana", reason="as far as it goes").cycle == 2

    def test_a_run_without_an_earlier_promotion_says_so(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1, updates=1)
        with pytest.raises(UsageError, match="cycle 1 is the oldest promotion that is kept"):
            roll_back(lab.run_dir, to=None, by="dana", reason="why not")

    def test_not_while_somebody_is_at_work(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2, updates=1)
            with pytest.raises(RunBusyError):
                roll_back(lab.run_dir, to=None, by="dana", reason="now")

    def test_a_frozen_run_stays_frozen(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2, updates=1)
            with pytest.raises(LoopFrozen):
                lab.update(next(iter(guard.cycles(3))), factor=float("inf"))
        roll_back(lab.run_dir, to=None, by="dana", reason="both")
        with lab.open() as guard:
            assert guard.frozen
            assert guard.promoted_cycle == 1

    def test_a_damaged_snapshot_is_not_gone_back_to(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2, updates=1)
        blob = lab.run_dir / "snapshots" / pointer(lab)["history"][0]["snapshot"] / "state.safetensors"
        blob.write_bytes(blob.read_bytes()[:-1] + b"\x55")
        before = pointer(lab)
        with pytest.raises(SnapshotError):
            roll_back(lab.run_dir, to=None, by="dana", reason="try")
        assert pointer(lab) == before
        assert not lab.events("promotion.rolled_back")

    def test_one_that_was_recorded_and_not_done_is_done_by_the_next_start(self, lab, monkeypatch):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2, updates=1)

        class Killed(BaseException):
            pass

        def killed(*_):
            raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(Store, "roll_back", killed)
            with pytest.raises(Killed):
                roll_back(lab.run_dir, to=1, by="dana", reason="cut short")
        assert pointer(lab)["cycle"] == 2
        with lab.open() as guard:
            assert guard.promoted_cycle == 1
            assert "as somebody asked for" in guard.found[0]
        assert pointer(lab)["cycle"] == 1

    def test_from_the_command_line(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2, updates=1)
        words = [sys.executable, "-m", "loopguard.cli", "rollback", str(lab.run_dir), "--by", "dana"]
        done = subprocess.run([*words, "--reason", "x"], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "goes on from cycle 1" in done.stdout
        done = subprocess.run([*words, "--reason", " "], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        done = subprocess.run([*words, "--reason", "x"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "nothing to go back to" in done.stderr
