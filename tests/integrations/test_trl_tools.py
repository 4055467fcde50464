"""Tools, environments and rewards of a real GRPOTrainer under a guard: what the model reads, where the run stops."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
trl = pytest.importorskip("trl", reason="these are trainers of TRL")

from trainer_kit import WARNINGS, Diary, checksum, make_grpo, same, state_of
from trainer_lab import BOUNDS, TrainerLab

from loopguard.controller import LoopGuard
from loopguard.errors import LoopFrozen, SandboxUnavailableError
from loopguard.gates.tools import REFUSAL
from loopguard.testing import raised, returned

pytestmark = [pytest.mark.train, *(pytest.mark.filterwarnings(one) for one in WARNINGS)]

REWARD = "{metric: reward, good: up, min: 0, max: 1, max_gain: 1, max_loss: 1}"
RULES = """    - {id: add, tool: add, then: run, sandbox: offline}
    - {id: later, tool: later, then: run, sandbox: offline}
    - {id: wiped, tool: wipe, then: deny}
    - {id: counter, tool: Counter, then: run, sandbox: rollout}
"""
PROFILE = """    rollout: {image: "loopguard/python:1", mode: episode, cells: 4}
data:"""


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b if a < 100 else a // 0


async def later(a: int) -> int:
    """Give a number back.

    Args:
        a: The number.
    """
    return a


def wipe(path: str) -> str:
    """Delete everything.

    Args:
        path: Where.
    """
    raise AssertionError(f"this ran on the host: {path}")


class Counter:
    """Counts in steps."""

    def reset(self, **row) -> str:
        self.at = 10
        return " (counting)"

    def up(self, by: int) -> int:
        """Count up.

        Args:
            by: How far.
        """
        self.at += by
        return self.at

    def get_reward(self) -> float:
        return self.at / 100


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


@pytest.fixture
def lab(tmp_path):
    lab = TrainerLab(tmp_path)
    lab.write(panel=REWARD, monitors=BOUNDS % "1000")
    text = lab.policy.read_text().replace("  rules:\n", f"  rules:\n{RULES}").replace("data:", PROFILE, 1)
    lab.policy.write_text(text)
    return lab


class Read:
    """A reward that keeps what the model read of its tools."""

    def __init__(self):
        self.answers = []

    def reward(self, completions, **columns):
        for messages in completions:
            self.answers += [turn["content"] for turn in messages if turn["role"] == "tool"]
        return checksum(completions)


def trained(guard, lab, *, tools, calls):
    """Train once over forced calls; what the model read, and the share of failures that the trainer counted."""
    read = Read()
    trainer = make_grpo(lab.tmp_path, 1, tools=tools, force_calls=calls, reward=read.reward, logging_steps=1)
    if guard is not None:
        guard.attach(trainer)
    trainer.train()
    return read.answers, trainer.state.log_history[0]["tools/failure_frequency"]


class TestWhatTheModelReads:
    def test_of_a_denied_tool_it_reads_the_refusal(self, lab):
        """As an answer and not as a failure, with no rule and no path in it; nothing ran anywhere."""
        with lab.open() as guard:
            answers, failures = trained(guard, lab, tools=[guard.tool(wipe)], calls=[call("wipe", path="/")])
        assert answers == [REFUSAL] * 4
        assert failures == 0
        assert {entry.body["rule"] for entry in lab.events("tool.decided")} == {"wiped"}

    def test_of_a_failure_it_reads_what_it_would_read_without_a_guard(self, lab):
        """The same words, counted alike by the trainer."""
        calls = [call("add", a=1, b=2), call("add", a=100, b=1)]
        with lab.open() as guard:
            lab.respond = lambda made: (
                raised(made, ZeroDivisionError("integer division or modulo by zero"))
                if json.loads(made.code)["a"] == 100
                else returned(made, 3)
            )
            guarded = trained(guard, lab, tools=[guard.tool(add)], calls=calls)
        assert guarded == trained(None, lab, tools=[add], calls=calls)
        assert guarded[1] == 0.5

    def test_an_async_tool_reads_the_same(self, lab):
        lab.respond = lambda made: returned(made, json.loads(made.code)["a"])
        with lab.open() as guard:
            answers, failures = trained(guard, lab, tools=[guard.tool(later)], calls=[call("later", a=7)])
        assert (answers, failures) == (["7"] * 4, 0)


class TestWhereTheRunStops:
    def test_a_dead_sandbox_stops_the_update_after_it(self, lab):
        """TRL shows the model an error and goes on; the weights do not."""
        lab.respond = lambda made: SandboxUnavailableError("the engine is gone")
        with lab.open() as guard, pytest.raises(LoopFrozen, match="the engine is gone"):
            trained(guard, lab, tools=[guard.tool(add)], calls=[call("add", a=1, b=2)])
        assert lab.events("update.applied") == []
        assert lab.events("freeze.entered")[0].body["rule"] == "sandbox"

    def test_a_freeze_during_an_async_call_stops_the_update_after_it(self, lab):
        """The call ends as refused, which TRL takes for an answer; what was generated is not trained on."""

        def freezing(made):
            (lab.run_dir / "latch").write_text("{}")
            return returned(made, json.loads(made.code)["a"])

        lab.respond = freezing
        diary = Diary()
        with lab.open() as guard:
            tools = [guard.tool(later)]
            trainer = make_grpo(lab.tmp_path, 2, tools=tools, force_calls=[call("later", a=7)], callbacks=[diary])
            guard.attach(trainer)
            with pytest.raises(LoopFrozen):
                trainer.train()
        assert same(state_of(trainer), diary.before[0])
        assert lab.events("promotion.decided", "update.applied") == []

    def test_a_reward_that_is_not_a_number_stops_the_update_after_it(self, lab):
        def broken(completions, **columns):
            return [float("nan"), *checksum(completions)[1:]]

        with lab.open() as guard, pytest.raises(LoopFrozen, match="reward broken gave 1 of 4 answers"):
            trainer = make_grpo(lab.tmp_path, 1, reward=guard.wrap_reward(broken))
            guard.attach(trainer)
            trainer.train()
        assert lab.events("update.applied") == []


class TestRewards:
    def test_a_sound_reward_changes_no_bit(self, lab):
        with lab.open() as guard:
            guarded = make_grpo(lab.tmp_path, 2, reward=guard.wrap_reward(checksum))
            guard.attach(guarded)
            guarded.train()
        bare = make_grpo(lab.tmp_path, 2, reward=checksum)
        bare.train()
        assert same(state_of(guarded), state_of(bare))

    def test_held_back_rows_are_scored_by_nobody(self, lab):
        """A whole group here, so no gradient comes of it; the run goes on with the next."""
        text = lab.policy.read_text()
        lab.policy.write_text(text.replace("[human, model]", "[human, model]\n  forbidden_in_prompt: [0+0]"))
        with lab.open() as guard:
            trainer = make_grpo(lab.tmp_path, 2, reward=guard.wrap_reward(checksum), beta=0.0, logging_steps=1)
            trainer.train()
        assert [row["reward"] for row in trainer.state.log_history[:2]] == [None, pytest.approx(0.5, abs=0.5)]
        (held,) = lab.events("data.quarantined")
        assert (held.body["reason"], held.body["count"]) == ("forbidden_in_prompt", 4)


@pytest.mark.docker
class TestATool:
    def test_its_calls_run_in_containers_and_the_log_has_each_of_them(self, lab):
        """The same answers and weights as without a guard."""
        calls = [call("add", a=1, b=2), call("add", a=100, b=1), None]
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            read = Read()
            guarded = make_grpo(
                lab.tmp_path, 2, tools=[guard.tool(add)], force_calls=calls, reward=guard.wrap_reward(read.reward)
            )
            guard.attach(guarded)
            guarded.train()
        bare = make_grpo(lab.tmp_path, 2, tools=[add], force_calls=calls, reward=Read().reward)
        bare.train()
        assert same(state_of(guarded), state_of(bare))
        assert set(read.answers) == {"3"}  # the error is longer than what this trainer lets into a completion
        finished = [entry.body for entry in lab.events("tool.finished")]
        assert len(finished) == len(lab.events("tool.decided")) == 6
        assert len(lab.events("sandbox.created")) >= 1


@pytest.mark.docker
class TestAnEnvironment:
    def test_its_rollouts_live_in_cells_and_it_scores_them(self, lab):
        """As without a guard: the same answers, the same weights."""
        calls = [call("up", by=1), call("up", by=5), call("up", by="x"), None]
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            guarded = make_grpo(lab.tmp_path, 2, environment_factory=guard.wrap_environment(Counter), force_calls=calls)
            guarded.train()
        bare = make_grpo(lab.tmp_path, 2, environment_factory=Counter, force_calls=calls)
        bare.train()
        assert same(state_of(guarded), state_of(bare))
        decided = [entry.body for entry in lab.events("tool.decided")]
        assert {body["tool"] for body in decided} == {"Counter"}
        assert len(decided) == 2 * (4 + 3 + 4)  # each batch: reset, three calls, reward
