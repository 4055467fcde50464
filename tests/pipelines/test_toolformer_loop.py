"""The loop under a real guard, with a calculator in place of the sandbox."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the reference loops train")
pytest.importorskip("transformers", reason="the reference loops train")

from conftest import POLICY

from loopguard.audit import read
from loopguard.controller import Cycle, LoopGuard
from loopguard.errors import LoopFrozen, UsageError
from loopguard.pipelines.toolformer import parse_plant, run
from loopguard.pipelines.toolformer.faults import HIDDEN_ATTEMPTS, PLAIN_ATTEMPTS
from loopguard.policy.load import load
from loopguard.testing import fake_runtimes

pytestmark = pytest.mark.train


def ended(guard):
    """Everything that has to be equal where two runs are: weights, optimizer, actor."""
    return guard.state_digest(), guard.actor_digest


def of_type(run_dir, kind):
    return [entry.body for entry in read.entries(run_dir) if entry.type == kind]


class TestHonest:
    def test_every_cycle_is_promoted_and_has_a_row(self, learned):
        _, result, _ = learned
        assert [row["cycle"] for row in result.rows] == [0, 1]
        assert [row["proposed"] is None for row in result.rows] == [True, False]
        assert 0 < result.rows[1]["kept"] <= result.rows[1]["proposed"]

    def test_the_model_learns_to_call(self, learned):
        _, result, _ = learned
        assert result.rows[1]["panel"]["correct"] > 0.5

    def test_every_call_in_the_table_is_in_the_log(self, learned):
        run_dir, result, _ = learned
        calls = sum(row["calls"] for row in result.rows)
        rechecked = sum(body["recheck"]["checked"] for body in of_type(run_dir, "data.admitted"))
        assert len(of_type(run_dir, "tool.finished")) == calls + rechecked

    def test_every_evaluation_keeps_its_items(self, learned):
        run_dir, result, _ = learned
        for row in result.rows:
            body = json.loads((run_dir / "eval" / f"cycle-{row['cycle']}.json").read_text())
            assert body["panel"] == row["panel"]
            correct = [item["correct"] for item in body["items"]]
            assert sum(correct) / len(correct) == row["panel"]["correct"]

    def test_the_items_stand_for_the_same_places_in_every_cycle(self, learned):
        run_dir, _, _ = learned
        first, last = (json.loads((run_dir / "eval" / f"cycle-{n}.json").read_text())["items"] for n in (0, 1))
        assert [(item["origin"], item["expected"]) for item in first] == [
            (item["origin"], item["expected"]) for item in last
        ]

    def test_what_the_model_learned_from_it_has_been_computed(self, learned):
        run_dir, _, programs = learned
        pointer = json.loads((run_dir / "snapshots" / "promoted.json").read_text())
        manifest = run_dir / "snapshots" / pointer["snapshot"] / "manifest.json"
        memory = json.loads(manifest.read_text())["tree"]["loop"]
        assert len(memory["calls"]) > memory["people"]
        for _, completion in memory["calls"]:
            expression = completion.removeprefix("<<").partition(">>")[0].rpartition("=")[0]
            assert programs[f"print({expression})"]


class TestGoingOn:
    def test_a_killed_run_ends_as_one_that_was_never_killed(self, open_guard, small, monkeypatch):
        options, task = small()
        with open_guard("whole") as guard:
            whole = run(guard, options, task=task)
            end = ended(guard)

        class Killed(BaseException):
            pass

        sound = Cycle.update

        def update(cycle, **given):
            if (cycle.number, cycle.updates) == (2, 20):
                raise Killed
            return sound(cycle, **given)

        with monkeypatch.context() as patched:
            patched.setattr(Cycle, "update", update)
            with pytest.raises(Killed), open_guard("killed") as guard:
                run(guard, options, task=task)
        with open_guard("killed") as guard:
            torch.rand(7)
            assert run(guard, options, task=task) == whole
            assert ended(guard) == end

    def test_a_longer_run_goes_on_where_the_shorter_one_ended(self, open_guard, small):
        options, task = small(cycles=2)
        with open_guard("long") as guard:
            whole = run(guard, options, task=task)
        with open_guard("short") as guard:
            run(guard, replace(options, cycles=1), task=task)
        with open_guard("short") as guard:
            assert run(guard, options, task=task) == whole

    def test_a_finished_run_is_not_run_again(self, open_guard, small, calculator):
        options, task = small(cycles=1)
        with open_guard() as guard:
            whole = run(guard, options, task=task)
        calculator.programs.clear()
        with open_guard() as guard:
            assert run(guard, options, task=task) == whole
        assert not calculator.programs

    def test_a_run_directory_of_other_options_is_refused(self, open_guard, small):
        options, task = small(cycles=1)
        with open_guard() as guard:
            run(guard, options, task=task)
        options, task = small(cycles=1, seed=5)
        with pytest.raises(UsageError, match=r"another --seed \(0, now 5\)"), open_guard() as guard:
            run(guard, options, task=task)


@pytest.mark.slow
def test_a_control_keeps_and_admits_as_the_loop_does_and_trains_on_none_of_it(learned, learnable, open_guard):
    """Both are the same up to the first update that a record of the model could take part in."""
    _, loop, _ = learned
    options, task = learnable(cycles=1, control=True)
    with open_guard() as guard:
        control = run(guard, options, task=task)
    assert control.rows[0] == loop.rows[0]
    for name in ("proposed", "kept", "admitted", "mean_gain"):
        assert control.rows[1][name] == loop.rows[1][name]
    assert control.rows[1]["panel"] != loop.rows[1]["panel"]


class TestPlanted:
    """Each fault is caught at its own gate, and no faulty weight reaches the actor."""

    @pytest.fixture
    def frozen(self, learned, learnable, tmp_path, open_guard):
        """Goes on with a copy of the honest run, with this fault in cycle 2."""
        promoted, _, _ = learned
        shutil.copytree(promoted, tmp_path / "run")

        def go_on(fault):
            options, task = learnable(plant=parse_plant(f"{fault}@2"))
            with open_guard() as guard:
                with pytest.raises(LoopFrozen) as caught:
                    run(guard, options, task=task)
                assert guard.promoted_cycle == 1
                [freeze] = of_type(guard.run_dir, "freeze.entered")
                assert guard.actor_digest == of_type(guard.run_dir, "promotion.applied")[-1]["actor"]
            return freeze, caught.value, guard.run_dir

        return go_on

    @pytest.mark.parametrize("fault", ["nan", "negative-loss"])
    def test_an_impossible_loss_is_withheld(self, frozen, fault):
        freeze, _, _ = frozen(fault)
        assert (freeze["gate"], freeze["rule"]) == ("update", "bounds:loss")
        assert freeze["restored"] is None

    def test_a_loss_that_falls_because_the_labels_are_visible_is_rolled_back(self, frozen):
        freeze, _, run_dir = frozen("label-leak")
        assert (freeze["gate"], freeze["rule"]) == ("update", "jump:loss")
        assert freeze["signals"][0]["direction"] == "down"
        assert freeze["restored"] == of_type(run_dir, "snapshot.written")[-1]["snapshot"]

    def test_an_answer_in_the_prompt_is_quarantined(self, frozen):
        freeze, _, run_dir = frozen("answer-leak")
        assert freeze["gate"] == "data"
        reasons = {body["reason"] for body in of_type(run_dir, "data.quarantined")}
        assert "forbidden_in_prompt" in reasons

    def test_a_verifier_that_accepts_everything_is_found_out(self, frozen):
        freeze, told, _ = frozen("verifier-bug")
        assert freeze["gate"] == "data"
        assert "do not hold when run again" in told.reason

    def test_escapes_are_refused_or_reach_the_cell_and_freeze_the_loop(self, frozen, calculator):
        freeze, _, _ = frozen("tool-escape")
        assert (freeze["gate"], freeze["rule"]) == ("tool", "rate:refused")
        assert not any(calculator.programs[attempt] for attempt in PLAIN_ATTEMPTS)


class TestReproduced:
    """In a new process every loss that led to the freeze comes out the same to the bit, and so do the weights."""

    @pytest.fixture
    def replayed(self, learned, learnable, tmp_path, calculator):
        """Plants a fault in a copy of the honest run, and replays what its freeze left behind."""
        promoted, _, _ = learned
        shutil.copytree(promoted, tmp_path / "run")
        # One honest candidate more than this many is a gain here; in the honest run it is not judged.
        policy = tmp_path / "policy.yaml"
        policy.write_text(
            POLICY.replace(
                "correct, good: up, min: 0, max: 1, max_gain: 1", "correct, good: up, min: 0, max: 1, max_gain: 0.1"
            )
        )

        def replay(fault, *, cycle):
            options, task = learnable(cycles=cycle, plant=parse_plant(f"{fault}@{cycle}"))
            guard = LoopGuard.from_file(
                policy,
                run_dir=tmp_path / "run",
                runtimes=fake_runtimes(calculator),
                adopt_policy=load(policy).digest,
            )
            with guard, pytest.raises(LoopFrozen):
                run(guard, options, task=task)
            [freeze] = of_type(tmp_path / "run", "freeze.entered")
            module = "loopguard.pipelines.toolformer.replay"
            words = ["reproduce", str(tmp_path / "run" / freeze["capsule"]), "-m", module, "--json"]
            done = subprocess.run(
                [sys.executable, "-m", "loopguard.cli", *words],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stderr + done.stdout
            return freeze, json.loads(done.stdout)

        return replay

    @pytest.mark.parametrize(
        ("fault", "updates"), [("nan", 11), ("negative-loss", 11), ("label-leak", None), ("gain", 160)]
    )
    def test_a_freeze_over_updates(self, replayed, fault, updates):
        """From the promotion to the update that froze the run, or to the candidate that did."""
        freeze, told = replayed(fault, cycle=2)
        assert freeze["gate"] == ("promotion" if fault == "gain" else "update")
        assert told["same"]
        assert told["state"] == "same"
        if updates is not None:
            assert len(told["updates"]) == updates
        if freeze["update"] is not None:
            assert told["updates"][-1]["update"] == freeze["update"]

    @pytest.mark.parametrize("fault", ["answer-leak", "verifier-bug", "tool-escape"])
    def test_a_freeze_over_data_or_tools_replays_what_led_to_its_actor(self, replayed, fault):
        freeze, told = replayed(fault, cycle=3)
        assert freeze["gate"] in ("data", "tool")
        assert told["same"]
        assert told["state"] == "same"
        assert len(told["updates"]) == 40
        assert "what led to it" in told["notes"][-1]


def test_hidden_attempts_hold_nothing_that_a_pattern_over_their_text_would_find():
    """They are there to be held by the cell, so they have to get as far as the cell."""
    for attempt in HIDDEN_ATTEMPTS:
        assert not any(word in attempt for word in ("__", "import", "open", "exec", "eval", "socket", "os."))
        compile(attempt, "attempt", "exec")
    for attempt in PLAIN_ATTEMPTS:
        compile(attempt, "attempt", "exec")
        assert len(attempt) <= 400
