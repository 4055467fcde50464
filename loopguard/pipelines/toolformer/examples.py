"""Records as training examples: which tokens the model sees, and which of them it learns from.

A record is the only way into the weights, and it goes in as text: what the data gate has read is what is trained on.

    prompt       Natalia sold 48/2=
    completion   <<48/2=24>>24 clips in May.
                 ~~~~~~~  ~~~~~~~~~~~~~~~~~~ the call, and what follows it, count fully; the result comes from the tool
                                             and does not count
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loopguard.pipelines.toolformer.model import Example
from loopguard.pipelines.toolformer.text import CLOSE, OPEN

if TYPE_CHECKING:
    from loopguard.pipelines.toolformer.codec import Codec
    from loopguard.pipelines.toolformer.settings import Settings

_COMPLETION = re.compile(r"<<(.*)=([^=<>]*)>>(.*)", re.DOTALL)


def completion_of(expression: str, result: str, after: str) -> str:
    """A call with its result, and what follows it."""
    return f"{OPEN}{expression}={result}{CLOSE}{after}"


class Examples:
    """Makes training examples of texts, with one codec and one set of lengths and weights."""

    def __init__(self, codec: Codec, settings: Settings) -> None:
        self._codec = codec
        self._settings = settings

    def prompt(self, text: str) -> tuple[int, ...]:
        """The end of the text before a call."""
        return (self._codec.begin, *self._codec.encode(text)[-self._settings.before_length :])

    def call(self, prompt: str, completion: str) -> Example:
        """A record with a call. Raises ValueError where the completion holds none."""
        match = _COMPLETION.fullmatch(completion)
        if match is None:
            raise ValueError(f"a completion without a call: {completion[:80]!r}")
        expression, result, after = match.groups()
        before = self.prompt(prompt)
        written, given, rest = self._called(expression), self._codec.encode(result), self._after(after)
        parts = [
            (before, self._settings.text_weight),
            (written, 1.0),
            (given, 0.0),
            ((self._codec.close, *rest), 1.0),
        ]
        return _joined(parts)

    def line(self, text: str) -> Example:
        """A plain line."""
        length = self._settings.before_length + self._settings.after_length
        tokens = (self._codec.begin, *self._codec.encode(text)[:length], self._codec.end)
        return _joined([(tokens, self._settings.text_weight)])

    def following(self, prompt: str, expression: str | None, result: str, after: str) -> Example:
        """What follows a call, for scoring: after no call (`expression` None), or after one with this result."""
        before = self.prompt(prompt)
        called: tuple[int, ...] = ()
        if expression is not None:
            called = (*self._called(expression), *self._codec.encode(result), self._codec.close)
        return _joined([(before + called, 0.0), (self._after(after), 1.0)])

    def _called(self, expression: str) -> tuple[int, ...]:
        return (self._codec.open, *self._codec.encode(f"{expression}="))

    def _after(self, text: str) -> tuple[int, ...]:
        return self._codec.encode(text)[: self._settings.after_length]


def _joined(parts: list[tuple[tuple[int, ...], float]]) -> Example:
    return Example(
        tokens=tuple(token for tokens, _ in parts for token in tokens),
        weights=tuple(weight for tokens, weight in parts for _ in tokens),
    )
