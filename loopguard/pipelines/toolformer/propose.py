"""Proposing calls at places, and Toolformer's criterion for which of them help.

Sources: Schick et al. 2023 (Toolformer) for the criterion, Anthony et al. 2017 (expert iteration) for the loop around
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loopguard.pipelines.toolformer.model import generate, score

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from loopguard.pipelines.toolformer.codec import Codec
    from loopguard.pipelines.toolformer.examples import Examples
    from loopguard.pipelines.toolformer.text import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A call that a model wrote at a place."""

    place: Place
    prompt: str
    """What the model was shown of the place."""
    expression: str | None
    """None where the model did not finish the call."""


def propose(
    model: torch.nn.Module,
    places: Sequence[Place],
    *,
    codec: Codec,
    examples: Examples,
    length: int,
    temperature: float = 0.0,
    prompt: Callable[[Place], str] = lambda place: place.before,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Draft]:
    """One draft for each of these places, in their order."""
    prompts = [prompt(place) for place in places]
    rows = generate(
        model,
        [(*examples.prompt(text), codec.open) for text in prompts],
        pad=codec.pad,
        length=length,
        stop=codec.ends_call,
        temperature=temperature,
        advance=advance,
    )
    return [
        Draft(place=place, prompt=text, expression=_expression(codec.decode(row)))
        for place, text, row in zip(places, prompts, rows, strict=True)
    ]


def _expression(written: str) -> str | None:
    expression, equals, _ = written.partition("=")
    return expression.strip() if equals and expression.strip() else None


def gains(model: torch.nn.Module, drafts: Sequence[Draft], *, codec: Codec, examples: Examples) -> list[float]:
    """How much having the result lowers the loss of what follows, in nats per token, for each of these drafts.

    The result competes with the better of two alternatives: no call at all, and the same call without a result.
    """
    variants = [
        [examples.following(draft.prompt, draft.expression, draft.place.number, draft.place.after) for draft in drafts],
        [examples.following(draft.prompt, draft.expression, "", draft.place.after) for draft in drafts],
        [examples.following(draft.prompt, None, "", draft.place.after) for draft in drafts],
    ]
    with_result, without_result, without_call = (
        [total / weight for total, weight in score(model, variant, pad=codec.pad)] for variant in variants
    )
    return [
        min(alternatives) - helped
        for helped, *alternatives in zip(with_result, without_result, without_call, strict=True)
    ]
