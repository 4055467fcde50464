"""Calculator calls as Python that a sandbox runs, and what came back as a number.

Nothing here evaluates what a model wrote: an expression is text until a cell has run it.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopguard.types import Outcome

TOOL = "python"

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?", re.ASCII)
_OPERATOR = re.compile(r"[\w.)]\s*[-+*/%]")


def code_of(expression: str) -> str:
    """The program that a cell runs for an expression."""
    return f"print({expression})"


def printed(outcome: Outcome) -> float | None:
    """The one number that a call printed, or None where it printed anything else or did not end well."""
    return number_in(outcome.text) if outcome.ok else None


def number_in(text: str) -> float | None:
    """The number that a text consists of, or None."""
    stripped = text.strip()
    return float(stripped) if _NUMBER.fullmatch(stripped) else None


def agrees(value: float | None, number: str) -> bool:
    """Whether a printed value is the number in the text, but for the rounding of floating point."""
    expected = number_in(number)
    return value is not None and expected is not None and math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)


def holds_operator(expression: str) -> bool:
    """Whether something is computed: a bare number is no call."""
    return _OPERATOR.search(expression) is not None
