"""What the kit of tiny trainers promises: seeded runs are equal to the bit, and a spoiled update shows."""

import math

import pytest

pytest.importorskip("trl", reason="these are trainers of transformers and TRL")
import trainer_kit as kit

pytestmark = [pytest.mark.filterwarnings(w) for w in kit.WARNINGS]

MAKE = {
    "trainer": lambda path, **plan: kit.make_trainer(path, kit.batches(4), **plan),
    "sft": lambda path, **plan: kit.make_sft(path, 4, **plan),
    "dpo": lambda path, **plan: kit.make_dpo(path, 4, **plan),
    "grpo": lambda path, **plan: kit.make_grpo(path, 4, **plan),
}
each_trainer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def run(trainer):
    trainer.train()
    return kit.state_of(trainer)


@each_trainer
def test_seeded_runs_are_equal_to_the_bit(make, tmp_path):
    assert kit.same(run(make(tmp_path)), run(make(tmp_path)))


@each_trainer
def test_every_update_moves_weights(make, tmp_path):
    diary = kit.Diary()
    run(make(tmp_path, callbacks=[diary]))
    assert len(diary.before) == len(diary.after) == 4
    assert not any(kit.same(before[0], after[0]) for before, after in zip(diary.before, diary.after, strict=True))


@each_trainer
@pytest.mark.parametrize("factor", [50.0, math.nan])
def test_a_spoiled_update_changes_what_comes_of_it_and_nothing_before(make, factor, tmp_path):
    clean, spoiled = kit.Diary(), kit.Diary()
    run(make(tmp_path, callbacks=[clean]))
    run(make(tmp_path, callbacks=[spoiled], spoil={3: factor}))
    assert [kit.same(a, b) for a, b in zip(clean.after, spoiled.after, strict=True)] == [True, True, True, False]


def test_a_model_that_an_update_made_nan_cannot_generate(tmp_path):
    """So a run of GRPO that was spoiled by nan ends by itself, unless the update is withheld."""
    with pytest.raises(RuntimeError, match="nan"):
        kit.make_grpo(tmp_path, 4, spoil={2: math.nan}).train()


@each_trainer
def test_an_unstepped_update_leaves_the_whole_state_as_it_was(make, tmp_path):
    diary = kit.Diary()
    run(make(tmp_path, callbacks=[diary], unstepped={2}))
    pairs = zip(diary.before, diary.after, strict=True)
    assert [kit.same(before, after) for before, after in pairs] == [False, False, True, False]


@each_trainer
def test_what_becomes_of_an_unstepped_update_does_not_show_later(make, tmp_path):
    """So a run with update 2 left out is the reference for one in which a guard withheld it, whatever spoiled it."""
    spoiled = run(make(tmp_path, unstepped={2}, spoil={2: math.nan}))
    assert kit.same(run(make(tmp_path, unstepped={2})), spoiled)


@pytest.mark.parametrize("name", ["trainer", "sft", "dpo"])
def test_a_run_without_a_batch_is_the_run_that_does_not_step_on_it(name, tmp_path):
    if name == "trainer":
        shorter = kit.make_trainer(tmp_path, kit.batches(4, without={2}))
    else:
        shorter = {"sft": kit.make_sft, "dpo": kit.make_dpo}[name](tmp_path, 4, without={2})
    assert kit.same(run(shorter), run(MAKE[name](tmp_path, unstepped={2})))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
def test_the_trainer_takes_the_optimizer_by_name(optim, tmp_path):
    assert kit.same(*(run(kit.make_trainer(tmp_path, kit.batches(2), optim=optim)) for _ in range(2)))


def test_accumulation_scales_the_weight_of_a_batch_and_nothing_else(tmp_path):
    """Two batches in one update are the mean of the two, and the weight of one of them counts for it alone."""

    def loss(bad):
        trainer = kit.make_trainer(tmp_path, kit.batches(2, bad), gradient_accumulation_steps=2, learning_rate=0.0)
        return trainer.train().training_loss

    assert loss({0: 2.0}) + loss({1: 2.0}) == pytest.approx(3 * loss({}), rel=1e-6)


def test_a_trainer_can_be_evaluated(tmp_path):
    trainer = kit.make_trainer(tmp_path, kit.batches(2), eval_rows=kit.batches(1), eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert [math.isfinite(line["eval_loss"]) for line in trainer.state.log_history if "eval_loss" in line] == [True] * 2


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


def test_a_forced_call_reaches_the_tool_and_its_answer_the_completion(tmp_path):
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return kit.checksum(completions)

    call = {"name": "add", "arguments": {"a": 20, "b": 22}}
    kit.make_grpo(tmp_path, 2, tools=[add], force_calls=[call, None], reward=reward).train()
    answers = [[message["content"] for message in one if message["role"] == "tool"] for one in seen]
    assert answers == [["42"], [], ["42"], []] * 2


class Counter:
    """An environment with one tool."""

    def reset(self, **_):
        self.count = 0

    def more(self, by: int) -> str:
        """Count on.

        Args:
            by: how far
        """
        self.count += by
        return f"count {self.count}"


def test_a_forced_call_reaches_the_environment(tmp_path):
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return kit.checksum(completions)

    call = {"name": "more", "arguments": {"by": 3}}
    kit.make_grpo(tmp_path, 2, environment_factory=Counter, force_calls=[call], reward=reward).train()
    assert [message["content"] for one in seen for message in one if message["role"] == "tool"] == ["count 3"] * 8
