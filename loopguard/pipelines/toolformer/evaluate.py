"""What a candidate can do: the panel of capability metrics, on text that no cycle trains on.

| metric | what it is |
| --- | --- |
| correct | share of held-out places whose call printed the human's number |
| implicit | the same, of places whose expression is not spelled out in the line |
| malformed | share of places where no number came back |
| mental | share of places where the model writes the right number by itself, without a call |
| heldout_loss | nats per token of held-out lines |
| refused | share of all calls of this cycle that were refused |
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loopguard.pipelines.toolformer.calls import agrees, code_of, number_in, printed
from loopguard.pipelines.toolformer.model import generate, score
from loopguard.pipelines.toolformer.propose import Draft, propose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from loopguard.pipelines.toolformer.codec import Codec
    from loopguard.pipelines.toolformer.examples import Examples
    from loopguard.pipelines.toolformer.text import Place
    from loopguard.types import Outcome

_NUMBER_LENGTH = 8
_LEADING_NUMBER = re.compile(r"\s*(-?(?:\d+(?:\.\d+)?|\.\d+))", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What became of one held-out place."""

    origin: str
    expected: str
    implicit: bool
    expression: str | None
    printed: float | None
    correct: bool
    mental: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Text that is only ever evaluated on."""

    places: tuple[Place, ...]
    lines: tuple[str, ...]


def evaluate(
    model: torch.nn.Module,
    held_out: HeldOut,
    *,
    codec: Codec,
    examples: Examples,
    call_length: int,
    run: Callable[[Sequence[str]], list[Outcome]],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, float], list[Item]]:
    """The panel but for `refused`, and the items that it sums up. `run` sends programs through the guard."""
    drafts = propose(model, held_out.places, codec=codec, examples=examples, length=call_length, advance=advance)
    items = _items(drafts, run, _numbers(model, held_out.places, codec=codec, examples=examples))
    losses = score(model, [examples.line(line) for line in held_out.lines], pad=codec.pad)
    scored, weights = (math.fsum(column) for column in zip(*losses, strict=True))
    panel = {
        "correct": _share([item.correct for item in items]),
        "implicit": _share([item.correct for item in items if item.implicit]),
        "malformed": _share([item.printed is None for item in items]),
        "mental": _share([item.mental for item in items]),
        "heldout_loss": scored / weights,
    }
    return panel, items


def rows(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as JSON values."""
    return [asdict(item) for item in items]


def _items(
    drafts: Sequence[Draft], run: Callable[[Sequence[str]], list[Outcome]], by_itself: Sequence[float | None]
) -> list[Item]:
    called = [draft.expression for draft in drafts if draft.expression is not None]
    outcomes = iter(run([code_of(expression) for expression in called]))
    values = [None if draft.expression is None else printed(next(outcomes)) for draft in drafts]
    return [
        Item(
            origin=draft.place.origin,
            expected=draft.place.number,
            implicit=is_implicit(draft.place),
            expression=draft.expression,
            printed=value,
            correct=agrees(value, draft.place.number),
            mental=agrees(own, draft.place.number),
        )
        for draft, value, own in zip(drafts, values, by_itself, strict=True)
    ]


def is_implicit(place: Place) -> bool:
    """Whether a person made a call here that the line does not spell out."""
    return place.call is not None and not place.spelled_out


def _numbers(
    model: torch.nn.Module, places: Sequence[Place], *, codec: Codec, examples: Examples
) -> list[float | None]:
    """The number that the model writes at each place when it may not call."""
    rows = generate(
        model,
        [examples.prompt(place.before) for place in places],
        pad=codec.pad,
        length=_NUMBER_LENGTH,
        stop=codec.ends_number,
        forbid=[codec.open],
    )
    found = [_LEADING_NUMBER.match(codec.decode(row)) for row in rows]
    return [None if match is None else number_in(match[1]) for match in found]


def _share(marks: Sequence[bool]) -> float:
    return sum(marks) / max(len(marks), 1)
