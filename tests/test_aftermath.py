"""What was decided about a freeze stays that, whatever happens around it: a start, a rollback, a death in between."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import typer
from lab import Lab
from test_dispositions import RESUME, STEADY, asks, jumped, loopguard, once_frozen, resume, under

from loopguard.approvals import book
from loopguard.audit import query, read
from loopguard.audit.verify import verify
from loopguard.cli.approve import _tell
from loopguard.cli.freeze import ingest
from loopguard.controller.driver import Standing
from loopguard.errors import DiskError, LoopFrozen, UsageError
from loopguard.state import run_facts, standing, submit
from loopguard.types import WayOn

torch = pytest.importorskip("torch", reason="attach needs torch")
torch.set_num_threads(1)

PROBATION = "when_frozen: raise, probation: {cycles: 2, tighten: 0.5}"


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def killed(*_, **__):
    raise KeyboardInterrupt


def undone_promotion(lab):
    """The weights act, and a process that dies before the pointer moves leaves what it leaves here."""

    def gone(_):
        raise DiskError("the disk is gone")

    with pytest.raises(DiskError), lab.build(lab.open()) as guard:
        guard._good.store.promote = gone
        cycle = next(iter(guard.cycles(9)))
        lab.update(cycle)
        assert lab.promote(cycle).allowed


class TestAFreezeByHand:
    def test_in_a_cycle_is_of_that_cycle_so_that_discard_passes_it_over(self, lab):
        under(lab, "when_frozen: wait")
        numbers = []
        with once_frozen(lab, asks(lab, disposition="discard")), lab.build(lab.open()) as guard:
            for cycle in guard.cycles(3):
                numbers.append(cycle.number)
                lab.update(cycle)
                if numbers == [1, 2]:
                    submit(lab.run_dir, "freeze", by="dana", reason="a look")
                lab.update(cycle)
                lab.promote(cycle)
        assert numbers == [1, 2, 3]

    def test_the_same_where_nobody_is_there(self, lab):
        with lab.build(lab.open()) as guard:
            lab.run(guard, 1)
            cycle = next(iter(guard.cycles(3)))
            lab.update(cycle)
        assert loopguard("freeze", lab.run_dir, "--by", "dana", "--reason", "odd") == 0
        resume(lab, "--disposition", "discard")
        with lab.build(lab.open()) as guard:
            assert next(iter(guard.cycles(5))).number == 3

    def test_between_two_cycles_passes_nothing_over(self, lab):
        with lab.build(lab.open()) as guard:
            lab.run(guard, 1)
        assert loopguard("freeze", lab.run_dir, "--by", "dana", "--reason", "odd") == 0
        resume(lab, "--disposition", "discard")
        with lab.build(lab.open()) as guard:
            assert next(iter(guard.cycles(5))).number == 2

    def test_before_the_first_cycle_passes_no_warm_up_over(self, lab):
        with lab.build(lab.open()):
            pass
        assert loopguard("freeze", lab.run_dir, "--by", "dana", "--reason", "odd") == 0
        resume(lab, "--disposition", "discard")
        with lab.build(lab.open()) as guard:
            assert next(iter(guard.cycles(5, warmup=True))).number == 0


class TestAnAcceptedState:
    def test_is_not_brought_back_once_something_was_promoted(self, lab):
        """The same guard may take a second learner, as with a trainer that trains twice."""
        jumped(lab)
        resume(lab, "--disposition", "accept")
        with lab.build(lab.open()) as guard:
            cycle = next(iter(guard.cycles(5)))
            for _ in range(STEADY):
                lab.update(cycle, factor=3.0)
            assert lab.promote(cycle).allowed
            promoted = guard.state_digest()
            guard._good.wait()
            guard._release()
            lab.build(guard)
            assert guard.state_digest() == promoted

    def test_is_gone_back_to_where_the_promotion_after_it_never_came_to_disk(self, lab):
        jumped(lab)
        resume(lab, "--disposition", "accept")
        with lab.build(lab.open()) as guard:
            accepted = guard.state_digest()
        undone_promotion(lab)
        for _ in range(2):
            with lab.build(lab.open()) as guard:
                assert guard.promoted_cycle == 1
                assert guard.state_digest() == accepted

    def test_that_was_damaged_after_the_resume_says_what_to_do(self, lab):
        jumped(lab)
        resume(lab, "--disposition", "accept")
        shutil.rmtree(lab.run_dir / "freezes" / "f1" / "suspect")
        with lab.open() as guard, pytest.raises(UsageError, match="freeze the run .*, and resume it in another way"):
            lab.build(guard)
        assert loopguard("freeze", lab.run_dir, "--by", "dana", "--reason", "damaged") == 0
        resume(lab)
        with lab.build(lab.open()) as guard:
            assert next(iter(guard.cycles(5))).number == 2

    def test_whose_capsule_is_damaged_lets_nothing_go_on(self, lab):
        jumped(lab)
        request = submit(lab.run_dir, "resume", by="dana", reason="ok", freeze="f1", way=WayOn(disposition="accept"))
        shutil.rmtree(lab.run_dir / "freezes" / "f1" / "suspect")
        assert ingest(lab.run_dir) is None
        assert standing(lab.run_dir).frozen
        assert request.id in {entry.body.get("request") for entry in lab.events("resume.requested")}
        assert "stays frozen" in lab.events("note.added")[-1].body["text"]
        assert verify(lab.run_dir).findings == []


class TestARollbackToAnEarlierPromotion:
    def test_ends_a_waiver(self, lab):
        jumped(lab, promote=3)
        resume(lab, "--waive", "2")
        assert loopguard("rollback", lab.run_dir, "--to", "1", "--by", "dana", "--reason", "no") == 0
        with lab.build(lab.open()) as guard:
            assert next(iter(guard.cycles(9))).number == 2
            assert guard._after.strictness[1] == ""

    def test_before_a_resume_makes_its_waiver_no_longer(self, lab):
        jumped(lab, promote=3)
        assert loopguard("rollback", lab.run_dir, "--to", "1", "--by", "dana", "--reason", "no") == 0
        resume(lab, "--waive", "2")
        with lab.build(lab.open()) as guard:
            waived = [(cycle, guard._begin(cycle), guard._after.strictness[1])[::2] for cycle in (2, 3, 4)]
        assert waived == [(2, "jump:loss"), (3, "jump:loss"), (4, "")]


class TestProbation:
    def test_a_promotion_that_is_undone_counts_for_nothing(self, lab):
        under(lab, PROBATION.replace("cycles: 2", "cycles: 1"))
        jumped(lab)
        resume(lab)
        undone_promotion(lab)
        with lab.build(lab.open()) as guard:
            assert guard.promoted_cycle == 1
            cycle = next(iter(guard.cycles(9)))
            assert guard._after.strictness[0] == 0.5
            lab.update(cycle)
            lab.promote(cycle)
        types = [entry.type for entry in lab.events("probation.began", "probation.ended")]
        assert types == ["probation.began", "probation.ended"] * 2

    def test_status_tells_of_it_from_the_start_to_the_next_freeze(self, lab):
        under(lab, PROBATION)
        jumped(lab)
        resume(lab)
        with lab.build(lab.open()) as guard:
            assert standing(lab.run_dir, glance=True).probation == 2
            with pytest.raises(LoopFrozen):
                lab.update(next(iter(guard.cycles(9))), factor=float("nan"))
            assert standing(lab.run_dir).probation == 0

    def test_an_end_that_a_death_kept_from_the_log_is_told_by_the_next_start(self, lab):
        under(lab, PROBATION.replace("cycles: 2", "cycles: 1"))
        jumped(lab)
        resume(lab)
        with lab.build(lab.open()) as guard:
            guard._count_promoted = lambda: None
            cycle = next(iter(guard.cycles(9)))
            lab.update(cycle)
            lab.promote(cycle)
        with lab.build(lab.open()) as guard:
            assert guard._after.probation == 0
        assert [entry.type for entry in lab.events("probation.ended")] == ["probation.ended"]


class TestTheBudgetOfFreezes:
    def test_is_used_up_also_where_the_process_dies_before_it_says_so(self, lab):
        under(lab, "halt_above: {freezes: 1, cycles: 10}")
        jumped(lab)
        resume(lab)
        with pytest.raises(KeyboardInterrupt), lab.build(lab.open()) as guard:
            guard._state.halt = killed
            lab.update(next(iter(guard.cycles(9))), factor=float("nan"))
        assert not standing(lab.run_dir).halted
        with lab.open():
            pass
        assert standing(lab.run_dir).halted

    def test_is_not_used_up_by_a_freeze_by_hand(self, lab):
        under(lab, "halt_above: {freezes: 1, cycles: 10}")
        jumped(lab)
        resume(lab)
        with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen):
            guard._after._freezes.append(2)
            cycle = next(iter(guard.cycles(9)))
            submit(lab.run_dir, "freeze", by="dana", reason="a look")
            lab.update(cycle)
        assert not standing(lab.run_dir).halted


def test_what_let_a_run_go_on_before_lifts_no_later_freeze(lab):
    """Of several ranks, rank 0 keeps a resume until the others have heard of it; they may never have to."""
    with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen):
        guard._resumed = ("dana", "before", WayOn(), None)
        lab.update(next(iter(guard.cycles(1))), factor=float("nan"))
    assert guard._resumed is None


def test_a_halted_run_stays_frozen_whatever_comes_after_it_in_the_log(lab):
    jumped(lab)
    resume(lab, "--disposition", "halt")
    with lab.open() as guard:
        body = {"freeze": "f1", "by": "eve", "reason": "hm", **WayOn().facts(), "approval": "none"}
        guard._log.append("resume.applied", body)
    (lab.run_dir / "latch").unlink()
    assert standing(lab.run_dir).frozen
    with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen, match="halted for good"):
        next(iter(guard.cycles(5)))


def test_a_freeze_of_a_start_is_not_taken_for_the_one_before_it(lab):
    """Discarding it passes no cycle over, in a loop that waits as after a start."""
    jumped(lab, promote=3)
    resume(lab)
    assert loopguard("rollback", lab.run_dir, "--to", "1", "--by", "dana", "--reason", "no") == 0
    with lab.build(lab.open()):
        pass
    (lab.run_dir / "snapshots" / "promoted.json").unlink()
    with lab.open() as guard:
        assert guard._state.frozen
        guard._after.resumed(WayOn(disposition="discard"))
        assert guard._after.over == -1
        assert guard._after.owed[0] == guard._state.freeze_id


class TestAWaiver:
    def test_of_a_single_absurd_value_is_refused_since_nothing_would_come_of_it(self, lab, capsys):
        with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
            cycle = next(iter(guard.cycles(2)))
            for _ in range(STEADY):
                lab.update(cycle)
            lab.update(cycle, factor=1e6)
        assert lab.events("freeze.entered")[0].body["rule"] == "jump:loss"
        resume(lab, "--waive", "2", code=2)
        assert "a single value" in capsys.readouterr().err


def test_whoever_comes_second_is_told_that_it_is_not_his_word_that_counts(lab, capsys):
    jumped(lab)
    submit(lab.run_dir, "resume", by="eli", reason="\x1b[2Jfine", freeze="f1", way=WayOn())
    resume(lab, "--disposition", "halt", code=1)
    assert r"not by this request: eli ended f1 before: \u001b[2Jfine (rollback)" in capsys.readouterr().err
    assert not standing(lab.run_dir).halted


def test_a_refusal_is_safe_to_print(lab, capsys):
    """It may quote a file that a stranger has left."""
    under(lab, more=RESUME)
    jumped(lab)
    resume(lab, code=4)
    asked = book(lab.run_dir).pending
    with lab.open() as guard:
        body = {"request": asked.request, "approval": "a1", "code": "unreadable", "reason": "\x1b[2Jno"}
        guard._log.append("approval.refused", {**body, "person": None, "key": None})
    capsys.readouterr()
    with pytest.raises(typer.Exit):
        _tell(lab.run_dir, "a1", asked.statement, wait_s=0)
    assert capsys.readouterr().err == "not counted: \\u001b[2Jno (unreadable)\n"


def test_a_trainer_knows_promoted_weights_by_their_promotion_alone():
    """The decision before it may have been pruned."""
    told = [("promotion.applied", {"actor": "v"}), ("snapshot.written", {"snapshot": "s", "promoted": True})]
    standing = Standing.of(SimpleNamespace(type=kind, body=body) for kind, body in told)
    assert (standing.known, standing.promoted) == ({"v"}, "v")


def test_a_trainer_looks_for_what_was_accepted_in_no_snapshot():
    """It lies in a capsule; what a checkpoint is put back to is the snapshot of before."""
    told = [("model.attached", {"weights": "w"}), ("snapshot.restored", {"snapshot": "s", "because": "freeze f1"})]
    told += [("snapshot.restored", {"snapshot": "c", "because": "accepted", "weights": "v"})]
    assert Standing.of(SimpleNamespace(type=kind, body=body) for kind, body in told).restored == "s"


class TestHold:
    def test_ready_has_to_be_a_function(self, lab):
        with lab.build(lab.open()) as guard, pytest.raises(UsageError, match="give a function"):
            guard.cycles(1, ready=True)

    def test_whatever_ready_raises_ends_it(self, lab):
        def ready():
            if lab.events("hold.entered"):
                raise KeyError("no stream")
            return False

        with pytest.raises(KeyError), lab.build(lab.open()) as guard:
            next(iter(guard.cycles(1, ready=ready)))
        assert [entry.type for entry in lab.events("hold.entered", "hold.ended")] == ["hold.entered", "hold.ended"]
        assert standing(lab.run_dir).hold == ""

    def test_of_a_process_that_was_killed_is_not_told_of(self, lab):
        with lab.build(lab.open()) as guard:
            guard._state.hold = "nothing there"
            guard._state.remember(cycle=None)
            guard._state.remember = lambda **_: None
        assert standing(lab.run_dir, glance=True).hold == standing(lab.run_dir).hold == ""
        with lab.open():
            assert standing(lab.run_dir, glance=True).hold == standing(lab.run_dir).hold == ""


class TestASignal:
    def test_while_the_run_is_closed_kills_nothing(self, lab):
        guard = lab.build(lab.open())
        close, handlers = guard._cells.close, []

        def closing():
            handlers.append(signal.getsignal(signal.SIGUSR2))
            if handlers[0] is not signal.SIG_DFL:  # which would be the end of the tests as well
                os.kill(os.getpid(), signal.SIGUSR2)
            close()

        guard._cells.close = closing
        guard.close()
        assert read.latched(lab.run_dir)
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL

    def test_freezes_every_run_of_the_process(self, tmp_path):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        labs = [Lab(tmp_path / name) for name in ("one", "two")]
        with labs[0].open(), labs[1].open():
            os.kill(os.getpid(), signal.SIGUSR2)
        assert all(read.latched(one.run_dir) for one in labs)


class TestTheSecondPlaceOfALatch:
    @pytest.fixture
    def second(self, lab, tmp_path):
        under(lab, f"when_frozen: raise, second_latch: '{tmp_path}/a'")
        with lab.build(lab.open()) as guard:
            lab.run(guard, 1)
        path = tmp_path / "a" / f"{run_facts(lab.run_dir)['id']}.latch"
        path.write_text(json.dumps({"freeze": "f7", "reason": "the disk was full", "ts": "2026-01-01T00:00:00Z"}))
        return path

    @pytest.mark.parametrize("other", ["", "second_latch: '{}/b'"])
    def test_may_change_and_what_lies_in_the_old_one_counts(self, lab, tmp_path, second, other):
        from loopguard.policy.load import load

        under(lab, ", ".join(filter(None, ["when_frozen: raise", other.format(tmp_path)])))
        digest = load(lab.policy).digest
        with lab.open(adopt_policy=digest, by="dana", reason="moved") as guard:
            assert guard.frozen
        assert not second.exists()
        assert "the disk was full" in lab.events("freeze.entered")[0].body["reason"]
        resume(lab)
        with lab.open() as guard:
            assert not guard.frozen

    def test_is_looked_at_by_whoever_asks_why(self, lab, second):
        assert standing(lab.run_dir).frozen
        with pytest.raises(UsageError, match="is latched, and no process has recorded the freeze yet"):
            query.why(lab.run_dir)

    def test_that_is_gone_keeps_a_run_from_going_on(self, lab, second):
        second.unlink()
        second.parent.rmdir()
        with pytest.raises(UsageError, match="is gone"):
            lab.open()
        assert loopguard("status", lab.run_dir) == 0
        second.parent.mkdir()
        with lab.open() as guard:
            assert not guard.frozen
