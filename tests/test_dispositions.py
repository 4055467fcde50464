"""What a resume does with the frozen cycle: it begins again, is passed over, is gone on with, or was the last one."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
from lab import POLICY, Lab, bits
from people import DANA, ELI, FAY

from loopguard.audit import query, read
from loopguard.audit.verify import verify
from loopguard.cli.app import _main
from loopguard.controller.signals import freeze_on
from loopguard.errors import LoopFrozen, UsageError
from loopguard.state import standing, submit
from loopguard.types import WayOn

torch = pytest.importorskip("torch", reason="attach needs torch")
torch.set_num_threads(1)

PEOPLE = f"{{dana: ['{DANA.line}'], eli: ['{ELI.line}'], fay: ['{FAY.line}']}}"
RESUME = f"resume: {{approvals: 2, people: {PEOPLE}}}\n"
STEADY = 40
"""Updates of a cycle, enough for a jump monitor to know the level."""


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def under(lab, freeze="when_frozen: raise", more=""):
    lab.policy.write_text(POLICY.replace("freeze: {when_frozen: raise}", f"freeze: {{{freeze}}}") + more)
    return lab


def loopguard(*words):
    return _main([str(word) for word in words])


def resume(lab, *more, code=0):
    assert loopguard("resume", lab.run_dir, "--by", "dana", "--reason", "looked at it", *more) == code


def jumps(lab, guard, cycle, *, to=3.0, updates=12):
    """A loss that goes to another level and stays: the monitor needs a few readings, so some updates are undone."""
    for _ in range(updates):
        lab.update(cycle, factor=to)


def jumped(lab, *, promote=1):
    """A run that promoted a cycle, whose loss then jumped; its process is gone. Gives the weights at the freeze."""
    with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
        for cycle in guard.cycles(5):
            for _ in range(STEADY):
                lab.update(cycle)
            if cycle.number > promote:
                jumps(lab, guard, cycle)
            lab.promote(cycle)


def capsule_weights(lab, freeze="f1"):
    from loopguard.snapshots import read_capsule

    state = read_capsule(lab.run_dir / "freezes" / freeze).suspect_state()
    return state["learner"]["model"]


@contextmanager
def once_frozen(lab, *acts):
    """Somebody who waits until the run has frozen and then does these things, one after the other."""

    def act():
        while not ((lab.run_dir / "latch").exists() and lab.events("freeze.entered")):
            time.sleep(0.02)
        for one in acts:
            one()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def asks(lab, **way):
    return lambda: submit(lab.run_dir, "resume", by="dana", reason="looked at it", freeze="f1", way=WayOn(**way))


class TestRollback:
    def test_the_cycle_begins_again_from_the_promoted_state(self, lab):
        jumped(lab)
        resume(lab)
        with lab.build(lab.open()) as guard:
            assert next(iter(guard.cycles(5))).number == 2
        (resumed,) = lab.events("resume.applied")
        assert resumed.body["disposition"] == "rollback"
        assert (resumed.body["waives"], resumed.body["waives_cycles"]) == ("nothing", 0)


class TestDiscard:
    def test_the_cycle_is_passed_over_by_the_next_start(self, lab):
        jumped(lab)
        resume(lab, "--disposition", "discard")
        with lab.build(lab.open()) as guard:
            numbers = [cycle.number for cycle in guard.cycles(4)]
        assert numbers == [3, 4]
        assert verify(lab.run_dir).findings == []

    def test_it_stays_passed_over_however_often_the_run_is_started(self, lab):
        jumped(lab)
        resume(lab, "--disposition", "discard")
        for _ in range(2):
            with lab.build(lab.open()) as guard:
                assert next(iter(guard.cycles(4))).number == 3

    def test_weights_are_those_that_were_promoted_and_the_generators_draw_something_else(self, lab):
        jumped(lab)
        with lab.build(lab.open()) as guard:
            frozen_at = guard.state_digest()
            before = torch.rand(3)
        resume(lab, "--disposition", "discard")
        drawn = []
        for _ in range(2):
            with lab.build(lab.open()) as guard:
                assert guard.state_digest() == frozen_at
                drawn.append(torch.rand(3))
        assert not torch.equal(drawn[0], before)
        assert torch.equal(drawn[0], drawn[1])

    def test_a_loop_that_waits_goes_on_with_the_next_cycle(self, lab):
        under(lab, "when_frozen: wait")
        numbers = []
        with once_frozen(lab, asks(lab, disposition="discard")), lab.build(lab.open()) as guard:
            for cycle in guard.cycles(4):
                numbers.append(cycle.number)
                for _ in range(3):
                    lab.update(cycle)
                if numbers == [1, 2]:
                    lab.update(cycle, factor=float("nan"))
                lab.promote(cycle)
        assert numbers == [1, 2, 3, 4]
        assert guard.promoted_cycle == 4


class TestAccept:
    def test_the_run_goes_on_from_the_state_at_the_freeze(self, lab):
        jumped(lab)
        suspect = capsule_weights(lab)
        resume(lab, "--disposition", "accept")
        with lab.build(lab.open()) as guard:
            now = lab.model.state_dict()
            assert all(torch.equal(now[name], suspect[name]) for name in now)
            cycle = next(iter(guard.cycles(5)))
            assert cycle.number == 2
            for _ in range(STEADY):
                lab.update(cycle, factor=3.0)  # the level that was accepted
            assert lab.promote(cycle).allowed
        assert verify(lab.run_dir).findings == []

    def test_the_actor_stays_until_a_promotion(self, lab):
        jumped(lab)
        with lab.build(lab.open()):
            actor = bits(lab.actor)
        resume(lab, "--disposition", "accept")
        with lab.build(lab.open()):
            assert all(map(torch.equal, bits(lab.actor), actor))
            assert not all(map(torch.equal, bits(lab.model), actor))

    def test_a_model_that_is_its_own_actor_goes_on_with_it(self, lab):
        with pytest.raises(LoopFrozen), lab.build(lab.open(), actor=False) as guard:
            for cycle in guard.cycles(2):
                for _ in range(STEADY):
                    lab.update(cycle)
                if cycle.number == 2:
                    jumps(lab, guard, cycle)
                cycle.promote({"correct": 0.5})
        suspect = capsule_weights(lab)
        resume(lab, "--disposition", "accept")
        with lab.build(lab.open(), actor=False):
            now = lab.model.state_dict()
            assert all(torch.equal(now[name], suspect[name]) for name in now)

    def test_a_later_freeze_goes_back_to_what_was_accepted(self, lab):
        jumped(lab)
        resume(lab, "--disposition", "accept")
        with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
            accepted = guard.state_digest()
            for cycle in guard.cycles(5):
                for _ in range(STEADY):
                    lab.update(cycle, factor=3.0)
                jumps(lab, guard, cycle, to=9.0)
        assert guard.state_digest() == accepted
        resume(lab)
        with lab.build(lab.open()) as guard:
            # A rollback goes to the last promoted state: what was accepted before is not that.
            assert guard.state_digest() != accepted

    @pytest.mark.parametrize("promote", [0, 1])
    def test_a_rollback_after_it_means_what_was_promoted_in_a_loop_that_waits_as_well(self, lab, promote):
        under(lab, "when_frozen: wait, waive_at_most: 5")
        seen = []

        def until(freeze):
            while not (standing(lab.run_dir).freeze == freeze and standing(lab.run_dir).acknowledged):
                time.sleep(0.02)

        def rolls_back():
            until("f2")
            submit(lab.run_dir, "resume", by="dana", reason="no", freeze="f2", way=WayOn())

        with once_frozen(lab, asks(lab, disposition="accept"), rolls_back), lab.build(lab.open()) as guard:
            for cycle in guard.cycles(promote + 1):
                seen.append((cycle.number, guard.state_digest()))
                for number in range(4):
                    trips = number == 3 and cycle.number == promote + 1 and len(seen) < promote + 3
                    if lab.update(cycle, factor=float("nan") if trips else 1.0).result != "allow":
                        break
                if not cycle.discarded:
                    lab.promote(cycle)
        at_first, accepted, after_rollback = seen[-3:]
        assert accepted[1] != at_first[1]
        assert after_rollback == at_first
        assert verify(lab.run_dir).findings == []

    def test_a_start_before_the_next_promotion_goes_back_to_it_again(self, lab):
        jumped(lab)
        resume(lab, "--disposition", "accept")
        digests = []
        for _ in range(2):
            with lab.build(lab.open()) as guard:
                digests.append(guard.state_digest())
                cycle = next(iter(guard.cycles(5)))
                lab.update(cycle, factor=3.0)
        assert digests[0] == digests[1]

    def test_a_promotion_that_froze_may_pass_with_a_waiver_and_nothing_else_does(self, lab):
        with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
            for cycle in guard.cycles(2):
                for _ in range(6):
                    lab.update(cycle)
                lab.promote(cycle, correct=0.4 + 0.5 * (cycle.number == 2))
        resume(lab, "--disposition", "accept", "--waive", "1")
        with pytest.raises(LoopFrozen, match="correct lost"), lab.build(lab.open()) as guard:
            for cycle in guard.cycles(3):
                lab.update(cycle)
                decision = lab.promote(cycle, correct=0.9 if cycle.number == 2 else 0.4)
                assert decision.reason.startswith("waived: correct gained 0.5")
        assert guard.promoted_cycle == 2

    def test_it_needs_a_capsule_that_holds_the_state(self, lab, capsys):
        under(lab, "capsule: 1MiB")
        jumped(lab)
        (lab.run_dir / "freezes" / "f1" / "capsule.json").unlink()
        resume(lab, "--disposition", "accept", code=2)
        assert "the state at f1 cannot be accepted" in capsys.readouterr().err
        assert standing(lab.run_dir).frozen

    def test_a_freeze_by_hand_left_nothing_to_accept(self, lab, capsys):
        with lab.build(lab.open()) as guard:
            lab.run(guard, 1)
        assert loopguard("freeze", lab.run_dir, "--by", "dana", "--reason", "odd") == 0
        resume(lab, "--disposition", "accept", code=2)
        assert "left no capsule" in capsys.readouterr().err

    def test_a_waiting_loop_whose_capsule_went_bad_stays_frozen_and_says_why(self, lab):
        under(lab, "when_frozen: wait")
        capsule = lab.run_dir / "freezes" / "f1" / "capsule.json"

        def until_noted():
            while not lab.events("note.added"):
                time.sleep(0.02)

        acts = [lambda: capsule.write_text("{}"), asks(lab, disposition="accept"), until_noted]
        with (
            once_frozen(lab, *acts, asks(lab, disposition="halt")),
            lab.build(lab.open()) as guard,
            pytest.raises(LoopFrozen),
        ):
            lab.update(next(iter(guard.cycles(2))), factor=float("nan"))
        (note,) = lab.events("note.added")
        assert note.body["text"].startswith("the run stays frozen: the state at f1 cannot be accepted")


class TestWaivers:
    def test_a_rule_of_what_is_impossible_is_not_waived(self, lab, capsys):
        with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
            lab.update(next(iter(guard.cycles(1))), factor=float("nan"))
        resume(lab, "--waive", "2", code=2)
        assert "bounds:loss of the update gate cannot be waived" in capsys.readouterr().err

    def test_nor_for_longer_than_the_policy_allows(self, lab, capsys):
        under(lab, "waive_at_most: 2")
        jumped(lab)
        resume(lab, "--waive", "3", code=2)
        assert "allows 1 to 2 cycles" in capsys.readouterr().err
        resume(lab, "--waive", "2")

    def test_the_same_jump_passes_for_as_long_as_was_said_and_freezes_after_it(self, lab):
        jumped(lab)
        resume(lab, "--waive", "1")
        with pytest.raises(LoopFrozen, match="went up"), lab.build(lab.open()) as guard:
            for cycle in guard.cycles(5):
                for _ in range(STEADY):
                    lab.update(cycle)
                jumps(lab, guard, cycle, to=3.0 if cycle.number == 2 else 9.0)
                lab.promote(cycle)
        assert guard.promoted_cycle == 2
        notes = [note for entry in lab.events("update.applied") for note in entry.body["notes"]]
        assert any(note["reason"].startswith("waived: loss went up") for note in notes)

    def test_a_request_that_waives_another_rule_than_the_one_that_tripped_lifts_nothing(self, lab):
        jumped(lab)
        way = WayOn(waives="drift:loss", waives_cycles=1)
        submit(lab.run_dir, "resume", by="eve", reason="hm", freeze="f1", way=way)
        with lab.open() as guard:
            guard._listen()
            assert guard.frozen

    @pytest.mark.parametrize(
        "way",
        [
            {"disposition": "ignore"},
            {"waives": "jump:loss"},
            {"waives_cycles": 3},
            {"waives_cycles": True},
            {"waives": 1},
        ],
    )
    def test_a_way_that_is_none_is_set_aside(self, lab, way):
        jumped(lab)
        path = lab.run_dir / "requests" / "1.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"kind": "resume", "by": "eve", "reason": "x", "freeze": "f1", **way}))
        with lab.open() as guard:
            guard._listen()
            assert guard.frozen
        assert "is not a request" in lab.events("note.added")[0].body["text"]


class TestHalt:
    def test_nothing_lifts_it(self, lab, capsys):
        jumped(lab)
        resume(lab, "--disposition", "halt")
        assert "goes on no more" in capsys.readouterr().out
        assert loopguard("status", lab.run_dir) == 4
        assert "HALTED" in capsys.readouterr().out
        resume(lab, code=1)
        assert "was halted, and nothing lets it go on" in capsys.readouterr().err
        with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen, match="halted for good: looked at it"):
            next(iter(guard.cycles(5)))
        with lab.open() as guard, pytest.raises(UsageError, match="was halted"):
            guard._state.resume(by="dana", reason="please")
        assert verify(lab.run_dir).findings == []

    def test_not_even_without_its_latch(self, lab):
        jumped(lab)
        resume(lab, "--disposition", "halt")
        (lab.run_dir / "latch").unlink()
        (lab.run_dir / "state.json").unlink()
        assert standing(lab.run_dir).halted
        with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen):
            next(iter(guard.cycles(5)))

    def test_a_loop_that_waits_ends(self, lab):
        under(lab, "when_frozen: wait")
        with (
            once_frozen(lab, asks(lab, disposition="halt")),
            lab.build(lab.open()) as guard,
            pytest.raises(LoopFrozen, match="halted for good"),
        ):
            lab.update(next(iter(guard.cycles(1))), factor=float("nan"))

    def test_a_resume_after_it_is_a_breach_of_the_protocol(self, lab):
        jumped(lab)
        resume(lab, "--disposition", "halt")
        with lab.open() as guard:
            body = {"freeze": "f1", "by": "eve", "reason": "hm", **WayOn().facts(), "approval": "none"}
            guard._log.append("resume.applied", body)
            guard._log.append("update.leased", {"from": 41, "to": 48})
            guard._log.append("update.applied", {"from": 41, "to": 41, "readings": {}, "notes": [], "overflows": 0})
        result = verify(lab.run_dir)
        assert result.code == 40
        assert any("a resume of a run that was halted" in finding for finding in result.findings)
        assert any("applied while frozen" in finding for finding in result.findings)

    def test_why_and_the_report_say_who_ended_it(self, lab):
        from loopguard.audit.report import write_report

        jumped(lab)
        resume(lab, "--disposition", "halt")
        assert "halted    for good by dana after" in query.why(lab.run_dir)
        assert "resume" not in query.why(lab.run_dir)
        text = write_report(lab.run_dir).read_text()
        assert "for good by dana" in text

    def test_where_people_sign_it_takes_as_many_as_a_resume(self, lab, tmp_path, capsys):
        under(lab, more=RESUME)
        jumped(lab)
        resume(lab, "--disposition", "halt", code=4)
        statement = capsys.readouterr().out.encode()
        assert json.loads(statement)["disposition"] == "halt"
        for person, code in ((ELI, 4), (FAY, 0)):
            path = tmp_path / f"{person.name}.sig"
            path.write_text(person.sign(statement))
            assert loopguard("approve", lab.run_dir, "--signature", path) == code
        assert standing(lab.run_dir).halted
        assert verify(lab.run_dir).findings == []


class TestWhatPeopleSign:
    @pytest.fixture
    def asked(self, lab, capsys):
        under(lab, more=RESUME)
        jumped(lab)
        resume(lab, "--disposition", "accept", "--waive", "2", code=4)
        return lab, capsys.readouterr().out.encode()

    def sign(self, lab, statement, tmp_path):
        codes = []
        for person in (ELI, FAY):
            path = tmp_path / f"{person.name}.sig"
            path.write_text(person.sign(statement))
            codes.append(loopguard("approve", lab.run_dir, "--signature", path))
        return codes

    def test_is_the_capsule_and_the_waiver(self, asked, tmp_path):
        lab, statement = asked
        told = json.loads(statement)
        (entered,) = lab.events("freeze.entered")
        assert told["target"] == entered.body["capsule_digest"]
        assert (told["waives"], told["waives_cycles"]) == ("jump:loss", 2)
        assert self.sign(lab, statement, tmp_path) == [4, 0]
        (resumed,) = lab.events("resume.applied")
        assert {name: resumed.body[name] for name in ("disposition", "waives", "waives_cycles")} == {
            "disposition": "accept",
            "waives": "jump:loss",
            "waives_cycles": 2,
        }
        assert verify(lab.run_dir).findings == []

    def test_another_capsule_is_not_what_they_signed(self, asked, tmp_path):
        lab, statement = asked
        path = lab.run_dir / "freezes" / "f1" / "capsule.json"
        path.write_bytes(path.read_bytes() + b"\n")
        assert self.sign(lab, statement, tmp_path) == [1, 1]
        assert lab.events("approval.refused")[0].body["code"] == "target"
        assert standing(lab.run_dir).frozen

    def test_who_signs_is_shown_both(self, asked, capsys):
        lab, _ = asked
        loopguard("approve", lab.run_dir, "--signature", "nowhere.sig")
        shown = capsys.readouterr().err
        assert "accept: on from the state at the freeze" in shown
        assert "jump:loss trips nothing for 2 cycles" in shown


class TestProbation:
    PROBATION = "when_frozen: raise, probation: {cycles: 2, tighten: 0.5}"

    def test_half_a_change_freezes_until_so_many_cycles_were_promoted(self, lab):
        under(lab, self.PROBATION)
        jumped(lab)
        resume(lab)
        with (
            pytest.raises(LoopFrozen, match=r"gained 0\.15 .* allows 0\.1 in probation"),
            lab.build(lab.open()) as guard,
        ):
            for cycle in guard.cycles(3):
                lab.update(cycle)
                lab.promote(cycle, correct=0.5 + 0.15 * (cycle.number == 2))
        resume(lab)
        with lab.build(lab.open()) as guard:
            for cycle in guard.cycles(5):
                lab.update(cycle)
                assert lab.promote(cycle, correct=0.65 if cycle.number >= 4 else 0.5).allowed
        types = [entry.type for entry in lab.events("probation.began", "probation.ended")]
        assert types == ["probation.began", "probation.began", "probation.ended"]

    def test_a_start_does_not_shorten_it(self, lab, capsys):
        under(lab, self.PROBATION)
        jumped(lab)
        resume(lab)
        for cycle_number, left in ((2, 1), (3, 0)):
            with lab.build(lab.open()) as guard:
                cycle = next(iter(guard.cycles(9)))
                assert cycle.number == cycle_number
                lab.update(cycle)
                lab.promote(cycle)
            assert loopguard("status", lab.run_dir) == 0
            assert (f"probation {left} more" in capsys.readouterr().out) == (left > 0)
        assert len(lab.events("probation.began")) == len(lab.events("probation.ended")) == 1

    def test_a_monitor_trips_on_less(self, tmp_path):
        """Of a jump that takes four readings to believe, two are enough."""
        undone = {}
        for name, freeze in (("usual", "when_frozen: raise"), ("probation", self.PROBATION)):
            (tmp_path / name).mkdir()
            one = under(Lab(tmp_path / name), freeze)
            jumped(one)
            resume(one)
            with pytest.raises(LoopFrozen), one.build(one.open()) as guard:
                cycle = next(iter(guard.cycles(5)))
                for _ in range(STEADY):
                    one.update(cycle)
                jumps(one, guard, cycle)
            undone[name] = one.events("freeze.entered")[-1].body["update"]
        assert undone["probation"] < undone["usual"]


class TestTheBudgetOfFreezes:
    def test_one_more_than_the_policy_allows_is_the_end(self, lab):
        under(lab, "halt_above: {freezes: 2, cycles: 10}")
        for _ in range(2):
            with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
                lab.update(next(iter(guard.cycles(3))), factor=float("nan"))
            resume(lab)
        with pytest.raises(LoopFrozen, match="froze 3 times within 10 cycles"), lab.build(lab.open()) as guard:
            lab.update(next(iter(guard.cycles(3))), factor=float("nan"))
        (halted,) = lab.events("run.halted")
        assert halted.body["because"] == "budget"
        resume(lab, code=1)
        assert verify(lab.run_dir).findings == []

    def test_it_needs_nobody_to_sign(self, lab):
        under(lab, "halt_above: {freezes: 1, cycles: 10}", more=RESUME)
        jumped(lab)
        with lab.open() as guard:
            guard._after.froze("f0", gate="update", cycle=2)
            guard._state.halt(by="loopguard", reason=guard._after.spent, because="budget")
        assert verify(lab.run_dir).findings == []

    def test_freezes_of_people_use_none_of_it(self, lab):
        under(lab, "halt_above: {freezes: 1, cycles: 10}")
        with lab.build(lab.open()) as guard:
            lab.run(guard, 1)
        for _ in range(3):
            assert loopguard("freeze", lab.run_dir, "--by", "dana", "--reason", "a look") == 0
            resume(lab)
        assert not standing(lab.run_dir).halted

    def test_and_those_of_long_ago_do_not_count(self, lab):
        under(lab, "halt_above: {freezes: 1, cycles: 2}")
        with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
            lab.update(next(iter(guard.cycles(3))), factor=float("nan"))
        resume(lab)
        with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
            for cycle in guard.cycles(9):
                lab.update(cycle, factor=1.0 if cycle.number < 4 else float("nan"))
                lab.promote(cycle)
        assert not standing(lab.run_dir).halted


class TestHold:
    def test_no_cycle_begins_before_there_is_something_to_work_on(self, lab):
        answers = iter([False, False, True, True, True, True])
        with lab.build(lab.open()) as guard:
            for cycle in guard.cycles(2, ready=lambda: next(answers)):
                lab.update(cycle)
                lab.promote(cycle)
        kinds = [entry.type for entry in lab.events("hold.entered", "hold.ended", "cycle.started")]
        assert kinds == ["hold.entered", "hold.ended", "cycle.started", "cycle.started"]
        assert verify(lab.run_dir).findings == []

    def test_status_says_so_meanwhile(self, lab, capsys):
        said = []

        def ready():
            if lab.events("hold.entered"):
                assert loopguard("status", lab.run_dir) == 0
                said.append(capsys.readouterr().out)
            return bool(said)

        with lab.build(lab.open()) as guard:
            next(iter(guard.cycles(1, ready=ready)))
        assert "hold      the loop has nothing to work on yet" in said[0]

    def test_one_that_lasts_too_long_freezes(self, lab):
        under(lab, more="hold: {at_most: 1s}\n")
        with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen, match="on hold for longer than"):
            next(iter(guard.cycles(1, ready=lambda: False)))
        assert lab.events("hold.ended")[0].body["frozen"] is True

    def test_a_freeze_from_outside_is_heard(self, lab):
        def ready():
            submit(lab.run_dir, "freeze", by="dana", reason="stop")
            return False

        with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen, match="dana asked for it"):
            next(iter(guard.cycles(1, ready=ready)))

    def test_a_disk_that_fills_up_holds_the_run(self, lab):
        under(lab, more="hold: {at_most: 1s, free: 1024GiB}\n")
        with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen, match="less than 1048576 MiB are free"):
            next(iter(guard.cycles(1)))


class TestASignal:
    @pytest.fixture(autouse=True)
    def _as_in_a_new_process(self):
        """Whatever guards other tests have left open."""
        before = signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGUSR2, before)

    def test_freezes_at_the_next_gate(self, lab):
        with (
            lab.build(lab.open()) as guard,
            pytest.raises(LoopFrozen, match="somebody sent the process signal SIGUSR2"),
        ):
            cycle = next(iter(guard.cycles(1)))
            os.kill(os.getpid(), signal.SIGUSR2)
            lab.update(cycle)

    def test_one_that_comes_right_behind_the_look_for_requests_is_recorded_too(self, lab, monkeypatch):
        """The gate has listened, and finds the latch a moment later: the freeze has its number and its reason."""
        with lab.build(lab.open()) as guard:
            cycle = next(iter(guard.cycles(1)))
            listen = guard._listen
            monkeypatch.setattr(guard, "_listen", lambda: (listen(), os.kill(os.getpid(), signal.SIGUSR2)))
            with pytest.raises(LoopFrozen, match=r"frozen \(f1\): somebody sent the process signal SIGUSR2"):
                lab.update(cycle)
        assert [entry.body["freeze"] for entry in lab.events("freeze.entered")] == ["f1"]

    def test_does_again_what_it_did_once_the_run_is_closed(self, lab):
        before = signal.getsignal(signal.SIGUSR2)
        with lab.build(lab.open()):
            assert signal.getsignal(signal.SIGUSR2) is not before
        assert signal.getsignal(signal.SIGUSR2) is before

    def test_a_handler_of_the_program_stays(self, lab):
        heard = []
        signal.signal(signal.SIGUSR2, lambda *_: heard.append(1))
        try:
            with lab.build(lab.open()) as guard:
                os.kill(os.getpid(), signal.SIGUSR2)
                lab.run(guard, 1)
            assert heard
        finally:
            signal.signal(signal.SIGUSR2, signal.SIG_DFL)

    def test_none_leaves_it_alone(self, lab):
        under(lab, "signal: none")
        with lab.build(lab.open()):
            assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL

    def test_a_guard_that_was_opened_in_a_thread_hears_none(self, lab):
        with lab.open() as guard:
            pass
        thread = threading.Thread(target=freeze_on, args=("USR1", guard, lab.run_dir))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_the_words_are_those_of_the_log(lab):
    """What `audit show` prints of a resume can be asked for again."""
    jumped(lab)
    resume(lab, "--disposition", "discard", "--waive", "2")
    (resumed,) = read.entries(lab.run_dir, types=("resume.applied",))
    assert WayOn.read(resumed.body) == WayOn(disposition="discard", waives="jump:loss", waives_cycles=2)
