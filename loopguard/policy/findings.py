"""What is said about a guard policy: one finding for each problem, with its place in the file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Where = tuple[str | int, ...]
"""A place inside a policy, as keys and list positions: ("tools", "rules", 2, "then")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One sentence about one place. `str` of it is the line that a person reads.

    >>> print(Finding(path="p.yaml", line=3, column=9, message="name is empty"))
    p.yaml:3:9: name is empty
    """

    path: str
    message: str
    line: int | None = None
    """From 1; None where the file as a whole is meant."""
    column: int | None = None
    level: Literal["error", "lint"] = "error"
    """An `error` keeps the policy from loading. A `lint` loads, and is most likely not what its writer meant."""

    def __str__(self) -> str:
        place = self.path if self.line is None else f"{self.path}:{self.line}:{self.column}"
        return f"{place}: {'lint: ' if self.level == 'lint' else ''}{self.message}"


class PlacedProblemsError(ValueError):
    """Several problems inside one section of a policy, each with its place relative to that section."""

    def __init__(self, problems: list[tuple[Where, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{dotted(where)} {tail}".lstrip() for where, tail in problems))


def dotted(where: Where) -> str:
    """A place as people write it.

    >>> dotted(("tools", "rules", 2, "then"))
    'tools.rules[2].then'
    """
    text = ""
    for step in where:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[\w-]+", step):
            text += f".{step}" if text else step
        else:
            text += f"[{shown(step)}]"
    return text


def shown(value: object) -> str:
    """A value as a message quotes it: one line, printable, not longer than a line can bear."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-1]} ({len(str(value))} characters)"


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that a word is most likely a slip of; None where none is near."""
    same_case = {option.lower(): option for option in options}
    near = get_close_matches(word.lower(), same_case, n=1)
    return same_case[near[0]] if near else None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`. Did you mean 'deny'?`, or nothing where no option is near."""
    near = nearest(word, options)
    return f". Did you mean {near!r}?" if near else ""
