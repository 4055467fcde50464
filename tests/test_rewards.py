"""Rewards are read before they count: sound numbers pass, others stop the run, and some rows are held back."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math

import pytest
from lab import Lab, torch

from loopguard.audit.verify import verify
from loopguard.errors import LoopFrozen, UsageError

SECRET = "the quick brown fox jumps over the lazy dog and then runs home again tonight"
NAN = float("nan")


def length(completions, **kwargs):
    """A grader."""
    return [float(len(completion)) for completion in completions]


async def length_async(completions, **kwargs):
    return length(completions)


def giving(answers):
    def graded(completions, **kwargs):
        return answers

    return graded


@pytest.fixture
def lab(tmp_path):
    torch.set_num_threads(1)
    return Lab(tmp_path)


def quarantine(lab):
    return [
        json.loads(line)
        for path in sorted((lab.run_dir / "quarantine").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


class TestItLooksAsItDid:
    def test_name_and_kind_stay(self, lab):
        """Frameworks name a column of their metrics after it, and await it or not."""
        with lab.open() as guard:
            for reward in (length, length_async):
                wrapped = guard.wrap_reward(reward)
                assert (wrapped.__name__, wrapped.__doc__) == (reward.__name__, reward.__doc__)
                assert inspect.iscoroutinefunction(wrapped) == inspect.iscoroutinefunction(reward)

    def test_sound_answers_pass_as_they_are(self, lab):
        """The very objects, so that a run in which nothing is held back keeps its bits."""
        answers = [1, 0.5, None, True, torch.tensor(2.0)]
        with lab.open() as guard:
            scored = guard.wrap_reward(giving(answers))(completions=["a", "b", "c", "d", "e"])
            assert all(mine is theirs for mine, theirs in zip(scored, answers, strict=True))
            assert guard.wrap_reward(giving(torch.tensor([1.0, 2.0])))(completions=["a", "b"]) == [1.0, 2.0]
            assert guard.wrap_reward(length)(["a", "bb"]) == [1.0, 2.0]
            assert asyncio.run(guard.wrap_reward(length_async)(completions=["a"], prompts=["p"])) == [1.0]
            assert not guard.frozen

    @pytest.mark.parametrize("what", [functools.partial(length), torch.nn.Linear(1, 1), "org/reward-model", object()])
    def test_what_is_no_function_is_refused(self, lab, what):
        with lab.open() as guard, pytest.raises(UsageError, match="not a function: write a def around it"):
            guard.wrap_reward(what)

    def test_a_policy_that_trains_on_no_model_is_said_at_once(self, lab):
        text = lab.policy.read_text().replace("sources: [human, model]", "sources: [human]")
        lab.policy.write_text(text)
        with lab.open() as guard, pytest.raises(UsageError, match="every completion is a model's"):
            guard.wrap_reward(length)

    def test_it_has_to_be_called_as_trainers_do(self, lab):
        with lab.open() as guard:
            with pytest.raises(UsageError, match="without completions"):
                guard.wrap_reward(lambda **kwargs: [1.0])(texts=["a"])
            with pytest.raises(UsageError, match="1 prompts and 2 completions"):
                guard.wrap_reward(length)(completions=["a", "b"], prompts=["p"])


class TestAnswersThatAreNone:
    @pytest.mark.parametrize(
        ("answers", "left", "said"),
        [
            ([1.0, NAN], [1.0, None], "graded gave 1 of 2 answers that are no finite number: nan for row 1"),
            ([math.inf, 1.0], [None, 1.0], "inf for row 0"),
            ([1.0, "2"], [1.0, None], "'2' for row 1"),
            ([1.0, [2.0]], [1.0, None], "for row 1"),
            ([torch.tensor([1.0, 2.0]), 1.0], [None, 1.0], "for row 0"),
            ([1.0], [None, None], "graded gave 1 answers for 2 completions"),
            ([1.0] * 3, [None, None], "gave 3 answers for 2 completions"),
            (1.0, [None, None], "gave a float, not one number for each completion"),
            (None, [None, None], "gave a NoneType"),
            ("12", [None, None], "gave a str"),
            ({1.0, 2.0}, [None, None], "gave a set"),
            (torch.tensor(1.0), [None, None], "gave a Tensor, not one number for each completion"),
            ([10**400, 1.0], [None, 1.0], "for row 0"),
            ([1j, 1.0], [None, 1.0], "1j for row 0"),
        ],
    )
    def test_they_count_for_nothing_and_stop_the_next_update(self, lab, answers, left, said):
        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            lab.update(cycle)
            assert guard.wrap_reward(giving(answers))(completions=["a", "b"]) == left
            with pytest.raises(LoopFrozen, match=said.replace("[", r"\[")):
                lab.update(cycle)
        (freeze,) = lab.events("freeze.entered")
        assert (freeze.body["gate"], freeze.body["rule"]) == ("data", "reward")
        assert freeze.cycle == 1

    def test_awaited_ones_as_well(self, lab):
        async def graded(completions):
            return [NAN]

        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            assert asyncio.run(guard.wrap_reward(graded)(completions=["a"])) == [None]
            with pytest.raises(LoopFrozen):
                lab.update(cycle)

    def test_what_a_reward_raises_is_raised(self, lab):
        """A framework ends there by itself, so there is nothing to stop."""

        def graded(completions):
            raise KeyError("column")

        with lab.open() as guard, pytest.raises(KeyError, match="column"):
            guard.wrap_reward(graded)(completions=["a"])


CHAT = [
    [{"role": "assistant", "content": "fine"}],
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": SECRET}}}]},
        {"role": "tool", "name": "f", "content": "no"},
    ],
    [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": SECRET}]}],
    [{"role": "assistant", "content": "fine", "reasoning_content": SECRET}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {SECRET.replace(" ", "\n"): [1]}}}]}],
]


class TestRowsThatAreHeldBack:
    def test_text_that_is_forbidden_in_a_prompt_costs_the_row_its_reward(self, lab):
        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            scored = guard.wrap_reward(length)(prompts=["2+2", "<<2+2>>"], completions=["four", "five"])
            assert scored == [4.0, None]
            lab.update(cycle)
        (held,) = lab.events("data.quarantined")
        assert (held.body["reason"], held.body["count"], held.cycle) == ("forbidden_in_prompt", 1, 1)
        (row,) = quarantine(lab)
        assert (row["prompt"], row["completion"], row["origin"]) == ("<<2+2>>", "five", "reward length")
        assert held.body["records"] == [row["id"]]
        assert not verify(lab.run_dir).findings

    def test_overlap_is_found_in_texts_messages_and_arguments_of_calls(self, lab):
        with lab.open() as guard:
            guard.protect([SECRET])
            prompts = [[{"role": "user", "content": "q"}]] * 5
            assert guard.wrap_reward(giving([1.0] * 5))(prompts=prompts, completions=CHAT) == [1.0, *[None] * 4]
            for completion in (f"a {SECRET} b", SECRET):
                assert guard.wrap_reward(giving([1.0]))(prompts=["q"], completions=[completion]) == [None]
        assert {row["reason"] for row in quarantine(lab)} == {"overlap"}

    def test_several_rewards_hold_a_row_back_once(self, lab):
        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            for reward in (length, giving([1.0, 1.0])):
                assert guard.wrap_reward(reward)(prompts=["<<", "<<"], completions=["a", "b"]) == [None, None]
            lab.update(cycle)
        assert [entry.body["count"] for entry in lab.events("data.quarantined")] == [2]
        assert len(quarantine(lab)) == 2

    def test_nothing_is_counted_as_admitted(self, lab):
        """Duplicates and shares are questions of a batch of records, and rollouts repeat."""
        with lab.open() as guard:
            wrapped = guard.wrap_reward(length)
            before = guard._data.state_dict()
            assert [wrapped(prompts=["p"], completions=["same"]) for _ in range(3)] == [[4.0]] * 3
            assert guard._data.state_dict() == before
        assert lab.events("data.quarantined") == []
