"""How a reference loop tells whoever watches where it is.

The command line draws a bar or prints plain lines; a test keeps the lines; `Silent` shows nothing. A loop reports and
never asks: nothing that it does depends on who watches.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Somebody who watches a loop."""

    def phase(self, name: str, *, total: int | None = None) -> None:
        """Another piece of work begins; `total` is how many steps it has, where that is known."""
        ...

    def advance(self, steps: int = 1) -> None:
        """The current phase came so many steps further."""
        ...

    def say(self, line: str) -> None:
        """One line for people."""
        ...


class Silent:
    """Nobody watches."""

    def phase(self, name: str, *, total: int | None = None) -> None:
        """Show nothing."""

    def advance(self, steps: int = 1) -> None:
        """Show nothing."""

    def say(self, line: str) -> None:
        """Show nothing."""
