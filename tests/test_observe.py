"""A run that is observed: the bits of an unguarded one, a real log, and the freeze that a guard would have made."""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from collections import UserDict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from loopguard import LoopGuard, Observer, Provenance, Record
from loopguard.audit import read
from loopguard.audit.verify import UNANCHORED, WARN, verify
from loopguard.cli.app import _main
from loopguard.controller.cycle import Cycle
from loopguard.controller.observe import ObservedCycle
from loopguard.controller.watch import TYPES, Watch
from loopguard.errors import LoopFrozen, RunBusyError, UsageError
from loopguard.policy.draft import draft
from loopguard.policy.load import examine, load
from loopguard.testing import fake_runtimes

PAGE = Path(__file__).parent.parent / "docs" / "observe.md"
LEAK = 150


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Loop:
    """A regression with a scheduler, dropout and clipping, as somebody would write it; the labels leak at an update."""

    def __init__(self, *, leak=math.inf, seed=0):
        torch.manual_seed(seed)
        self.leak = leak
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step / 100))
        self.step = 0

    def loss(self):
        self.step += 1
        inputs, errors = torch.randn(64, 4), torch.randn(64, 1)
        labels = inputs.sum(1, keepdim=True) + errors
        guesses = self.model(inputs)
        leaked = 0.7 * labels if self.step >= self.leak else 0.0
        return (guesses + leaked - labels).square().mean()

    def attach(self, guard, **options):
        guard.attach(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, **options)

    def run(self, guard, *, updates=240, cycles=2, readings=lambda step: {}):
        for cycle in guard.cycles(cycles):
            for _ in range(updates // cycles):
                loss = self.loss()
                loss.backward()
                cycle.update(loss=loss, clip_norm=1.0, readings=readings(self.step))
            cycle.promote({"eval_loss": 2.0 / cycle.number, "eval_accuracy": 0.5 + 0.1 * cycle.number})
        return self

    def bare(self, *, updates=240):
        """The same loop as it is without LoopGuard."""
        for _ in range(updates):
            self.loss().backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    def bits(self):
        state = self.optimizer.state_dict()["state"]
        moments = [state[key][name] for key in state for name in sorted(state[key])]
        return [*self.model.state_dict().values(), *moments, torch.get_rng_state()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.bits(), other.bits(), strict=True))


def events(run_dir, *types):
    return [entry for entry in read.entries(run_dir) if entry.type in types]


def command(*words):
    return _main([str(word) for word in words])


def guarded(policy, run_dir, **options):
    return LoopGuard.from_file(policy, run_dir=run_dir, runtimes=fake_runtimes("4"), **options)


def frozen_at(run_dir):
    (freeze,) = events(run_dir, "freeze.entered")
    return freeze.body["update"], freeze.body["rule"]


class TestALabelLeak:
    @pytest.mark.parametrize(
        "readings",
        [
            lambda step: {},
            lambda step: {"accuracy": 0.5 + random.Random(step).random() / 10, "num_tokens": 64.0 * step},
            lambda step: {
                "idle": 0.0,
                "reward": random.Random(step).gauss(1, 0.1),
                "kl": 0.01 * random.Random(step).random(),
            },
        ],
        ids=["the loss alone", "with an accuracy", "with metrics that stand still"],
    )
    def test_the_suggested_policy_freezes_the_run_at_the_update_that_the_summary_names(
        self, tmp_path, capsys, readings
    ):
        with LoopGuard.observe(tmp_path / "seen") as observer:
            observed = Loop(leak=LEAK)
            observed.attach(observer)
            observed.run(observer, readings=readings)
        first = observer.findings[0]
        assert LEAK < first.update < LEAK + 20
        assert f"Would have frozen at update {first.update}: {first.reason} ({first.rule})" in capsys.readouterr().err
        assert observed.step == 240  # nothing was withheld

        policy = tmp_path / "policy.yaml"
        assert command("init", "--from-run", tmp_path / "seen", "--out", policy) == 0
        with pytest.raises(LoopFrozen), guarded(policy, tmp_path / "guarded") as guard:
            loop = Loop(leak=LEAK)
            loop.attach(guard)
            loop.run(guard, readings=readings)
        assert frozen_at(tmp_path / "guarded") == (first.update, first.rule)

    def test_it_is_in_the_log_when_it_is_foreseen_and_the_rest_is_judged_too(self, tmp_path):
        """The levels are learned anew after it, so that the log is not one freeze after the other."""
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            loop = Loop(leak=LEAK)
            loop.attach(observer)
            loop.run(observer)
        (entry,) = events(tmp_path / "seen", "freeze.foreseen")
        assert entry.body["update"] == observer.findings[0].update
        assert entry.body["signals"][0]["metric"] == "loss"
        assert entry.body["readings"].keys() == {"loss", "grad_norm"}

    def test_without_it_nothing_is_foreseen_and_the_policy_freezes_nothing(self, tmp_path, capsys):
        with LoopGuard.observe(tmp_path / "seen") as observer:
            loop = Loop()
            loop.attach(observer)
            loop.run(observer)
        assert observer.findings == ()
        assert "Nothing in it would have frozen it." in capsys.readouterr().err
        assert command("init", "--from-run", tmp_path / "seen", "--out", tmp_path / "policy.yaml") == 0
        with guarded(tmp_path / "policy.yaml", tmp_path / "guarded") as guard:
            loop = Loop()
            loop.attach(guard)
            loop.run(guard)
            assert guard.promoted_cycle == 2

    def test_an_announced_change_is_no_freeze_in_either(self, tmp_path):
        def run(guard):
            loop = Loop(leak=LEAK)
            loop.attach(guard)
            guard.expect("data", at=LEAK, span=3)
            loop.run(guard)

        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            run(observer)
        assert observer.findings == ()
        command("init", "--from-run", tmp_path / "seen", "--out", tmp_path / "policy.yaml")
        with guarded(tmp_path / "policy.yaml", tmp_path / "guarded") as guard:
            run(guard)
            assert not guard.frozen


class TestTheRunItself:
    def test_is_bit_equal_to_the_loop_without_an_observer(self, tmp_path):
        """Weights, moments and random generators, through clipping, a schedule, dropout and a foreseen freeze."""
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            loop = Loop(leak=LEAK)
            loop.attach(observer)
            loop.run(observer)
        assert observer.findings
        assert same(loop, Loop(leak=LEAK).bare())

    def test_is_bit_equal_where_the_values_are_read_one_update_late(self, tmp_path):
        """The path of a GPU: every update is told, the last one at the end."""
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            loop = Loop()
            loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-3, fused=True)
            loop.scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1 / (1 + step / 100))
            loop.attach(observer, late=True)
            loop.run(observer, updates=60)
        other = Loop()
        other.optimizer = torch.optim.AdamW(other.model.parameters(), lr=1e-3, fused=True)
        other.scheduler = torch.optim.lr_scheduler.LambdaLR(other.optimizer, lambda step: 1 / (1 + step / 100))
        assert same(loop, other.bare(updates=60))
        assert [entry.body["to"] for entry in events(tmp_path / "seen", "update.applied")][-1] == 60

    def test_a_loss_that_is_no_number_is_applied_and_told(self, tmp_path):
        """A guard would have withheld it; an observer never withholds. A hundred of them are one finding."""
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            for update in range(1, 201):
                observer.see({"loss": math.nan if update > 100 else 2.0 + random.Random(update).random()})
        assert [(one.update, one.rule) for one in observer.findings] == [(101, "bounds:loss")]
        assert observer._watch.repeats == 99
        last = events(tmp_path / "seen", "update.applied")[-1]
        assert last.body["readings"]["loss"][-1] == "NaN"

    def test_gradient_scaler_overflows_are_counted(self, tmp_path):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            loop = Loop()
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
            loop.attach(observer, scaler=scaler)
            (cycle,) = [next(observer.cycles(1))]
            for _ in range(3):
                loss = loop.loss()
                scaler.scale(loss * 1e6).backward()
                cycle.update(loss=loss)
        told = events(tmp_path / "seen", "update.overflowed", "update.applied")
        assert sum(entry.body.get("count", entry.body.get("overflows", 0)) for entry in told) == 3

    def test_everything_is_admitted_and_apply_always_runs(self, tmp_path):
        record = Record(
            id="a", prompt="1+1=", completion="3", provenance=Provenance(source="model", origin="x", cycle=1)
        )
        applied = []
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            for cycle in observer.cycles(1):
                admitted = cycle.admit([record], proposed=4)
                cycle.promote({"score": -1e9}, apply=lambda: applied.append(1))
        assert (admitted.records, admitted.quarantined, applied) == ((record,), (), [1])

    def test_users_own_functions_come_back_as_they_are(self, tmp_path):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            assert observer.tool(len) is len
            assert observer.wrap_reward(max) is max
            assert observer.wrap_environment(dict) is dict

    @pytest.mark.parametrize(
        ("use", "name"),
        [
            (lambda observer: observer.tool(len), "len"),
            (lambda observer: observer.tool("python"), "python"),
            (lambda observer: observer.wrap_environment(dict), "dict"),
            (lambda observer: next(observer.cycles(1)).tool("sh"), "sh"),
            (lambda observer: None, ""),
        ],
    )
    def test_its_tools_are_in_the_policy_that_is_suggested_and_without_one_no_sandbox_is(self, tmp_path, use, name):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            use(observer)
            use(observer)
        told = [entry.body["tool"] for entry in events(tmp_path / "seen", "tool.observed")]
        assert told == ([name] if name else [])
        assert command("init", "--from-run", tmp_path / "seen", "--out", tmp_path / "policy.yaml") == 0
        policy = load(tmp_path / "policy.yaml").policy
        assert bool(policy.tools.rules) == bool(policy.sandbox.profiles) == bool(name)

    @pytest.mark.parametrize(
        "call",
        [
            lambda cycle: cycle.tool("python")("print(1)"),
            lambda cycle: cycle.tool("python").map(["print(1)"]),
            lambda cycle: cycle.episode("agent"),
        ],
    )
    def test_a_tool_that_needs_a_sandbox_says_that_it_needs_a_policy(self, tmp_path, call):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            for cycle in observer.cycles(1):
                with pytest.raises(UsageError, match="loopguard init"):
                    call(cycle)

    @pytest.mark.parametrize(
        ("attach", "what"),
        [
            (lambda o: o.attach(), "needs a trainer"),
            (lambda o: o.attach(object()), "attach\\(trainer\\) got a object"),
            (lambda o: o.attach(object(), model=1), "from the trainer"),
        ],
    )
    def test_what_cannot_be_watched_is_refused(self, tmp_path, attach, what):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer, pytest.raises(UsageError, match=what):
            attach(observer)


def watched(readings, *, updates=100, **options):
    """A watch that has seen these readings, one dict for each update."""
    watch = Watch()
    for update in range(1, updates + 1):
        watch.take(readings(update), update=update, armed=True, **options)
    return watch


def noise(update, salt=0):
    return random.Random(1000 * salt + update).gauss(0, 1)


class TestMetrics:
    def test_one_that_joins_late_is_judged_from_its_own_24th_reading_on(self):
        """A reward that a trainer reports from update 40 on collapses at 150."""
        watch = Watch()
        watch.attached({"trainer": "SFTTrainer", "by_reward": False})
        for update in range(1, 201):
            late = {"reward": (5 if update < 150 else 2) + 0.1 * noise(update, 1)} if update >= 40 else {}
            watch.take({"loss": 2 + 0.1 * noise(update), **late}, update=update, armed=True)
        (finding,) = watch.findings
        assert finding.rule == "jump:reward"
        assert 150 < finding.update < 160

    def test_one_that_stops_coming_would_have_frozen_and_is_said_once(self):
        watch = watched(lambda u: {"loss": 2 + 0.1 * noise(u)} | ({"score": noise(u, 1)} if u < 60 else {}))
        assert [(one.update, one.rule) for one in watch.findings] == [(60, "missing:score")]

    def test_one_that_never_moved_is_not_missed_when_it_stops_coming(self):
        """The draft has no monitor that would miss it either, also where it comes back and moves."""
        watch = watched(lambda u: {"loss": 2 + 0.1 * noise(u), **({"idle": 1.0} if u < 60 else {})})
        assert watch.findings == []
        assert "idle" not in {rule["metric"] for rule in watch.seen.rules()}
        back = watched(lambda u: {"loss": 2 + 0.1 * noise(u), **({"idle": u > 80} if u not in (60, 61) else {})})
        assert back.findings == []
        assert "idle" not in {rule["metric"] for rule in back.seen.rules()}

    def test_one_that_is_named_absent_may_come_and_go(self):
        watch = Watch()
        for update in range(1, 101):
            there = update % 2 == 0
            readings = {"loss": 2 + 0.1 * noise(update)} | ({"score": noise(update, 1)} if there else {})
            watch.take(readings, update=update, armed=True, absent=() if there else ("score",))
        assert watch.findings == []
        assert {"score"} <= {rule["metric"] for rule in watch.seen.rules()}

    def test_one_that_stands_still_and_then_moves_is_no_freeze(self):
        watch = watched(lambda u: {"loss": 2 + 0.1 * noise(u), "idle": 0.0 if u < 60 else noise(u, 1)})
        assert watch.findings == []

    def test_a_loss_below_zero_from_the_start_is_a_surrogate_and_later_it_is_a_bug(self):
        early = watched(lambda u: {"loss": 0.1 * noise(u)})
        late = watched(lambda u: {"loss": 2 + 0.1 * noise(u) if u < 60 else -1.0})
        assert (early.seen.loss_kind, early.findings) == ("surrogate", [])
        assert (late.seen.loss_kind, late.findings[0].rule, late.findings[0].update) == ("discrete", "bounds:loss", 60)

    def test_a_trainer_that_trains_by_reward_has_a_surrogate(self):
        class GRPOTrainer:
            pass

        class Mine(GRPOTrainer):
            pass

        from loopguard.policy.suggest import trains_by_reward

        assert trains_by_reward(Mine)
        assert not trains_by_reward(dict)

    def test_a_reading_that_is_no_number_is_left_out_and_named(self, tmp_path):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            observer.see({"loss": 2.0, "text": "abc", "tensor": torch.tensor(1.5)})
        assert "Left out, since they were no numbers with a name: text." in observer.summary()
        assert "tensor" in events(tmp_path / "seen", "update.applied")[0].body["readings"]

    def test_nothing_that_is_handed_in_stops_the_training(self, tmp_path):
        """Nor does a name of it reach the terminal as it is, or keep the draft from loading."""

        class Broken:
            def __float__(self):
                raise ZeroDivisionError

        names = ["a\nb: c", "\x1b[31mred", "", "- {kind: x}", "x" * 5000, "\ud800", "#", "'", "\u202e"]
        strange = {"broken": Broken(), 3: 1.0, None: 1.0, ("a",): 2.0, "\x1b[2J\u202e": None, "complex": 1j}
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            for update in range(30):
                observer.see({"loss": 2 + 0.1 * noise(update), **{name: noise(update) for name in names}, **strange})
            observer.measured({**dict.fromkeys(names, 1.0), **strange, "huge": 1e308})
            observer.measured({"huge": -1e308})
        summary = observer.summary()
        assert "no numbers with a name: " in summary
        assert " and 1 more." in summary
        assert all(char.isprintable() or char == "\n" for char in summary)
        assert observer.findings == ()
        path = tmp_path / "policy.yaml"
        path.write_text(draft(observer._watch.seen))
        assert load(path).policy.name == "suggested"

    @pytest.mark.parametrize("call", ["see", "measured"])
    def test_a_mistake_of_its_own_ends_the_watching_and_not_the_training(self, tmp_path, capsys, call):
        class Unreadable(UserDict):
            def items(self):
                raise RuntimeError("what a\x1b mistake")

        with LoopGuard.observe(tmp_path / "seen") as observer:
            observer.see({"loss": 2.0})
            getattr(observer, call)(Unreadable())
            observer.see({"loss": 3.0})
        said = capsys.readouterr().err
        assert "watching ended, and the run goes on: RuntimeError: what a\\u001b mistake\n" in said
        assert "It was watched no further, by a mistake of the observer's own: RuntimeError" in said
        assert events(tmp_path / "seen", "update.applied")[-1].body["to"] == 1
        assert not verify(tmp_path / "seen").findings

    def test_the_judgement_of_a_log_is_that_of_the_run(self, tmp_path):
        """Also with gaps, numbers that are none, late metrics and announcements."""
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            for update in range(1, 301):
                if update == 200:
                    observer.expect("lr")
                readings = {
                    "loss": (2 if update < 120 else 1) + 0.05 * noise(update),
                    "grad_norm": 1 + noise(update, 2) ** 2,
                }
                if update > 30:
                    readings["late"] = noise(update, 3)
                    readings["early"] = noise(update, 4)
                if update == 250:
                    readings["loss"] = math.inf
                observer.see(readings)
        again = Watch.of(read.entries(tmp_path / "seen", types=TYPES))
        assert [(one.update, one.rule, one.reason) for one in again.findings] == [
            (one.update, one.rule, one.reason) for one in observer.findings
        ]
        assert again.findings
        assert list(again.seen.plan()) == list(observer._watch.seen.plan())


class TestTheRunDirectory:
    def test_its_log_verifies_and_says_that_it_was_observed(self, tmp_path, capsys):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            loop = Loop(leak=LEAK)
            loop.attach(observer)
            loop.run(observer)
        assert verify(tmp_path / "seen").code == UNANCHORED
        assert json.loads((tmp_path / "seen" / "run.json").read_text())["mode"] == "observe"
        assert command("status", tmp_path / "seen") == 0
        assert "observed: nothing is withheld" in capsys.readouterr().out
        assert command("audit", "show", tmp_path / "seen", "--type", "freeze") == 0
        assert "freeze.foreseen" in capsys.readouterr().out

    def test_its_report_shows_the_curves_and_where_it_would_have_frozen(self, tmp_path):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            loop = Loop(leak=LEAK)
            loop.attach(observer)
            loop.run(observer)
        assert command("audit", "report", tmp_path / "seen") == 0
        page = (tmp_path / "seen" / "report.html").read_text()
        assert "Where it would have frozen" in page
        assert page.count(">would freeze</text>") == 2  # on the loss and on the gradient norm
        assert "eval_accuracy" in page
        assert "This run was only observed" in page

    def test_no_weights_are_kept(self, tmp_path):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            loop = Loop()
            loop.attach(observer)
            loop.run(observer)
        assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["audit", "policy", "run.json"]

    def test_a_restart_goes_on_in_it(self, tmp_path):
        """Numbers go on; levels are learned anew, since a framework may go back to a checkpoint of its own."""
        for level in (2.0, 5.0):
            with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
                for update in range(100):
                    observer.see({"loss": level + 0.1 * noise(update)})
        assert observer.findings == ()
        assert observer._watch.seen.updates == 200
        assert [entry.body["to"] for entry in events(tmp_path / "seen", "update.applied")][-1] == 200
        assert [entry.body["goes_on"] for entry in events(tmp_path / "seen", "run.started")] == [False, True]
        assert verify(tmp_path / "seen").code == UNANCHORED

    def test_two_at_once_are_refused(self, tmp_path):
        with LoopGuard.observe(tmp_path / "seen", quiet=True), pytest.raises(RunBusyError):
            LoopGuard.observe(tmp_path / "seen")

    def test_that_of_a_guarded_run_is_refused_and_the_other_way_round(self, tmp_path):
        from loopguard.policy.load import shipped

        with guarded(shipped("default"), tmp_path / "guarded"):
            pass
        with pytest.raises(UsageError, match="directory of a guarded run"):
            LoopGuard.observe(tmp_path / "guarded")
        with LoopGuard.observe(tmp_path / "seen", quiet=True):
            pass
        with pytest.raises(UsageError, match=r"observed run.*loopguard init --from-run"):
            guarded(shipped("default"), tmp_path / "seen")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").touch()
        with pytest.raises(UsageError, match="something else than a run"):
            LoopGuard.observe(tmp_path / "other")

    def test_a_freeze_of_it_is_refused(self, tmp_path, capsys):
        with LoopGuard.observe(tmp_path / "seen", quiet=True):
            pass
        assert command("freeze", tmp_path / "seen", "--by", "dana", "--reason", "looks wrong") == 2
        assert "only observed" in capsys.readouterr().err
        assert not (tmp_path / "seen" / "latch").exists()

    def test_other_ranks_watch_nothing_and_write_nothing(self, tmp_path, monkeypatch):
        with LoopGuard.observe(tmp_path / "seen", quiet=True):
            monkeypatch.setenv("RANK", "1")
            monkeypatch.setenv("WORLD_SIZE", "2")
            with LoopGuard.observe(tmp_path / "seen") as second:
                second.see({"loss": 1.0})
                second.measured({"eval_loss": 1.0})
        assert [entry.type for entry in events(tmp_path / "seen", "update.applied", "eval.finished")] == []


class TestTheEnd:
    def test_a_full_disk_does_not_stop_the_training(self, tmp_path, capsys, monkeypatch):
        """It is said once while it happens, again in the summary, and the log that is there verifies."""
        observer = LoopGuard.observe(tmp_path / "seen")
        write, full = os.write, []

        def no_space(fd, data):
            if full and b"update.applied" in bytes(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(fd, data)

        monkeypatch.setattr(os, "write", no_space)
        with observer:
            loop = Loop()
            loop.attach(observer)
            cycle = next(observer.cycles(1))
            for step in range(200):
                if step == 70:
                    full.append(1)
                loss = loop.loss()
                loss.backward()
                cycle.update(loss=loss)
        said = capsys.readouterr().err
        assert said.count("its audit log is incomplete from here") == 1
        assert "The audit log is incomplete: cannot write" in said
        assert "200 updates" in said  # what was judged does not depend on the log
        assert verify(tmp_path / "seen").code in {UNANCHORED, WARN}
        assert [entry.body["to"] for entry in events(tmp_path / "seen", "update.applied")] == [64]
        assert events(tmp_path / "seen", "run.finished") == []

    def test_an_exception_of_the_loop_passes_and_the_summary_is_printed(self, tmp_path, capsys):
        with pytest.raises(ZeroDivisionError), LoopGuard.observe(tmp_path / "seen") as observer:
            observer.see({"loss": 2.0})
            raise ZeroDivisionError
        assert "LoopGuard observed" in capsys.readouterr().err
        assert [entry.type for entry in read.entries(tmp_path / "seen")][-1] == "update.applied"
        assert read.owner(tmp_path / "seen") is None

    def test_ctrl_c_is_recorded(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), LoopGuard.observe(tmp_path / "seen", quiet=True):
            raise KeyboardInterrupt
        assert [entry.type for entry in read.entries(tmp_path / "seen")][-1] == "run.interrupted"

    def test_it_may_be_closed_twice_and_sees_nothing_after(self, tmp_path, capsys):
        observer = LoopGuard.observe(tmp_path / "seen")
        observer.see({"loss": 2.0})
        observer.close()
        observer.close()
        observer.see({"loss": 3.0})
        assert capsys.readouterr().err.count("LoopGuard observed") == 1
        assert observer._watch.seen.updates == 1

    @pytest.mark.parametrize(("ending", "last"), [("", "run.finished"), ("1 / 0", "cycle.started")])
    def test_nobody_has_to_close_it(self, tmp_path, ending, last):
        """One line is enough: at the end of the process the summary comes by itself, also after an exception."""
        code = f"""
            from loopguard import LoopGuard
            observer = LoopGuard.observe({str(tmp_path / "seen")!r})
            for update in range(30):
                observer.see({{"loss": 2.0 + update % 3}})
            {ending}
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
        )
        assert done.returncode == (1 if ending else 0)
        assert "30 updates" in done.stderr
        types = [entry.type for entry in read.entries(tmp_path / "seen")]
        assert types[-1] == ("run.finished" if not ending else "update.applied")
        assert last in types

    def test_a_killed_run_leaves_a_log_that_reads_and_drafts(self, tmp_path, capsys):
        code = f"""
            import os, signal
            from loopguard import LoopGuard
            observer = LoopGuard.observe({str(tmp_path / "seen")!r})
            for update in range(100):
                observer.see({{"loss": 2.0 + (update * 7919 % 13) / 100}})
            os.kill(os.getpid(), signal.SIGKILL)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL
        assert verify(tmp_path / "seen").code == UNANCHORED
        assert command("init", "--from-run", tmp_path / "seen", "--out", tmp_path / "policy.yaml") == 0
        assert "64 observed updates" in (tmp_path / "policy.yaml").read_text()
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            observer.see({"loss": 2.0})
        assert verify(tmp_path / "seen").code == UNANCHORED
        capsys.readouterr()

    def test_a_forked_child_writes_nothing(self, tmp_path):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            observer.see({"loss": 2.0})
            child = os.fork()
            if child == 0:
                observer.see({"loss": 3.0})
                observer.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        assert events(tmp_path / "seen", "update.applied")[0].body["readings"] == {"loss": [2.0]}


class TestThePage:
    def test_it_opens_with_what_a_demanding_user_expects(self):
        assert PAGE.read_text().split("\n## ")[1].startswith("What a demanding user expects")

    def test_its_loop_runs(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (block,) = [
            code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "cycles" in code
        ]
        loop = Loop()
        names = {
            "model": loop.model,
            "optimizer": loop.optimizer,
            "loss_of": lambda _: loop.loss(),
            "loader": range(10),
        }
        exec(block, names | {"evaluate": lambda _: {"eval_loss": 1.0}})
        assert "200 updates, 20 evaluations" in capsys.readouterr().err
        assert examine_draft(tmp_path / "runs" / "look")


def examine_draft(run_dir):
    policy = run_dir.parent / "policy.yaml"
    command("init", "--from-run", run_dir, "--out", policy)
    loaded, lints = examine(policy)
    assert lints == []
    return loaded == load(policy)


def test_no_cycle_begins_before_there_is_something_to_work_on(tmp_path):
    answers = iter([False, True, True])
    with LoopGuard.observe(tmp_path / "seen") as guard:
        assert [cycle.number for cycle in guard.cycles(2, ready=lambda: next(answers))] == [1, 2]
        with pytest.raises(UsageError, match="give a function"):
            next(iter(guard.cycles(1, ready=True)))


@pytest.mark.parametrize(("observed", "guarded"), [(Observer, LoopGuard), (ObservedCycle, Cycle)])
def test_it_takes_whatever_a_loop_hands_to_a_guard(observed, guarded):
    """So that the two can be swapped in one line."""
    ours = {"from_file", "observe"}
    drivers = {"ticked", "outlived"}  # for what drives a framework's trainer, which an observer has another of
    for name in {name for name in dir(guarded) if not name.startswith("_")} - ours - drivers:
        assert hasattr(observed, name), name
        if callable(getattr(guarded, name)):
            taken, needed = (inspect.signature(getattr(each, name)).parameters for each in (observed, guarded))
            assert needed.keys() <= taken.keys(), name


def test_a_panel_may_name_what_is_not_judged(tmp_path):
    with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
        for cycle in observer.cycles(2):
            cycle.decide_update(readings={"loss": 2.0})
            cycle.promote({"correct": 0.5}, apply=lambda: None, unjudged={"seconds": 9.0})
    assert [entry.body["unjudged"] for entry in events(tmp_path / "seen", "eval.finished")] == [{"seconds": 9.0}] * 2
    assert list(observer._watch.seen.panel) == ["correct"]


def test_a_run_that_is_closed_unfinished_is_not_finished(tmp_path):
    observer = LoopGuard.observe(tmp_path / "seen", quiet=True)
    observer.see({"loss": 2.0})
    observer.close(finished=False)
    assert events(tmp_path / "seen", "run.finished", "cycle.finished") == []
    assert events(tmp_path / "seen", "update.applied")


def test_it_is_public(tmp_path):
    with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
        assert type(observer) is Observer
