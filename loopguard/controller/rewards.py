"""Rewards for frameworks that call a function of the user's: read before they count.

The function is the user's own grader and runs on the host as it would without a guard. What it answers is checked, and
the rows it answered about are shown to the data gate: a row that must not become training data gets no reward, which
frameworks take for a row that nobody could score.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import math
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from loopguard.controller.functions import freeze
from loopguard.controller.quarantine import hold_back
from loopguard.errors import UsageError
from loopguard.types import Decision, Provenance, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from loopguard.controller.guard import LoopGuard

_told: WeakKeyDictionary[LoopGuard, set[tuple[int | None, str]]] = WeakKeyDictionary()
"""The rows that were held back and written down, by cycle: several rewards judge the same row, and it is one row."""
_telling = threading.Lock()


def guarded(guard: LoopGuard, reward: Any) -> Any:
    """A reward function that looks like `reward`, and whose answers are read before they count.

    It is called by keyword, with `completions` and, where there are any, `prompts`: texts, or lists of messages. What
    comes back has one answer for each completion, a finite number or None. An answer that is no such number, or one
    too many or too few, freezes the run and counts for nothing: the rows concerned get None, and the next update is
    withheld. Rows with text that the guard policy forbids in a prompt, and rows that overlap with a protected
    evaluation text, get None and are quarantined; nothing freezes for them.

    Wrap every reward of a trainer: a row that one of them scores is scored. Raises UsageError for what is not a
    function, and where the guard policy lets nothing of a model's become training data.
    """
    name = _checked(reward)
    if "model" not in guard.policy.data.sources:
        raise UsageError(
            f"guard.wrap_reward({name}): data.sources does not list model, and every completion is a model's: "
            f"write [human, model]"
        )

    def read(answers: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        rows = _rows(reward, name, args, kwargs)
        sound = _sound(guard, name, answers, len(rows))
        held = _held_back(guard, name, rows)
        return [None if i in held else answer for i, answer in enumerate(sound)]

    if inspect.iscoroutinefunction(reward):

        @functools.wraps(reward)
        async def scored_async(*args: Any, **kwargs: Any) -> list[Any]:
            answers = await reward(*args, **kwargs)
            # Elsewhere, since it may freeze the run, and that writes to a disk.
            return await asyncio.to_thread(read, answers, args, kwargs)

        return scored_async

    @functools.wraps(reward)
    def scored(*args: Any, **kwargs: Any) -> list[Any]:
        return read(reward(*args, **kwargs), args, kwargs)

    return scored


def _checked(reward: Any) -> str:
    """The name of a reward function. Raises UsageError, with the way out, for what is none."""
    if not inspect.isroutine(reward):
        kind = type(reward).__name__
        raise UsageError(
            f"guard.wrap_reward got a {kind}, not a function: write a def around it; a reward model, or its name, goes "
            f"to the trainer as it is"
        )
    return str(reward.__name__)


def _rows(
    reward: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Prompt and completion of each row, as text."""
    given = dict(kwargs) if not args else inspect.signature(reward).bind(*args, **kwargs).arguments
    completions = given.get("completions")
    if completions is None:
        raise UsageError(f"reward {name} was called without completions: call it as trainers do, completions=[...]")
    prompts = given.get("prompts")
    prompts = [""] * len(completions) if prompts is None else prompts
    if len(prompts) != len(completions):
        raise UsageError(f"reward {name} was called with {len(prompts)} prompts and {len(completions)} completions")
    return [(_text(prompt), _text(completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def _text(turns: Any) -> str:
    """A prompt or completion as one text; of messages, what each of them says and calls."""
    if isinstance(turns, str):
        return turns
    return "\n".join(_said(turn) for turn in turns)


def _said(turn: Any) -> str:
    if not isinstance(turn, dict):
        return str(turn)
    # Nothing that a model wrote may hide in an argument of a call, or in what it thought before it spoke.
    return "\n".join(text for key, value in turn.items() if key != "role" for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    """All the text in a value, as it is: written as JSON, words would stick to the escapes between them."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield str(key)
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)
    elif value is not None:
        yield str(value)


def _sound(guard: LoopGuard, name: str, answers: Any, expected: int) -> list[Any]:
    """The answers, None in the place of each that is no finite number; those freeze the run."""
    try:
        several = None if isinstance(answers, (str, bytes, dict, set, frozenset)) else list(answers)
    except TypeError:
        several = None  # a number, alone or in a tensor
    if several is None:
        _stop(guard, f"reward {name} gave a {type(answers).__name__}, not one number for each completion")
        return [None] * expected
    answers = several
    if len(answers) != expected:
        _stop(guard, f"reward {name} gave {len(answers)} answers for {expected} completions")
        return [None] * expected
    wrong = [i for i, answer in enumerate(answers) if answer is not None and not _is_number(answer)]
    if wrong:
        what = f"{answers[wrong[0]]!r:.60} for row {wrong[0]}"
        _stop(guard, f"reward {name} gave {len(wrong)} of {expected} answers that are no finite number: {what}")
    return [None if i in wrong else answer for i, answer in enumerate(answers)]


def _is_number(answer: Any) -> bool:
    if isinstance(answer, (str, bytes)):
        return False
    try:
        return math.isfinite(float(answer))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False  # RuntimeError: a tensor of several numbers


def _stop(guard: LoopGuard, reason: str) -> None:
    freeze(guard, Decision(result="freeze", gate="data", rule="reward", reason=reason))


def _held_back(guard: LoopGuard, name: str, rows: Sequence[tuple[str, str]]) -> set[int]:
    """The rows that must not become training data, after they were written down."""
    cycle = guard._cycle.number if guard._cycle is not None else None
    held: dict[int, tuple[Record, str]] = {}
    for i, (prompt, completion) in enumerate(rows):
        record = Record(
            id=hashlib.sha256(f"{prompt}\x00{completion}".encode("utf-8", "surrogatepass")).hexdigest()[:24],
            prompt=prompt,
            completion=completion,
            provenance=Provenance(source="model", origin=f"reward {name}", cycle=cycle or 0),
        )
        if reason := guard._data.fault(record):
            held[i] = record, reason
    with _telling:
        told = _told.setdefault(guard, set())
        new = {record.id: (record, reason) for record, reason in held.values() if (cycle, record.id) not in told}
        hold_back(guard, list(new.values()), cycle=cycle)
        # Of earlier cycles nobody asks any more.
        _told[guard] = {(number, seen) for number, seen in told if number == cycle} | {(cycle, seen) for seen in new}
    return set(held)
