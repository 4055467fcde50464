"""Methods that are replaced on one instance, and can be put back."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Patches:
    """Replaces methods of objects until `undo`. The classes stay as they are."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, bool, Any]] = []

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """From now on `owner.name(...)` is `around(inner, ...)`, `inner` being what was there before."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs)

        self._done.append((owner, name, name in vars(owner), inner))
        setattr(owner, name, wrapper)

    def undo(self) -> None:
        """Put everything back, the last one first."""
        while self._done:
            owner, name, own, inner = self._done.pop()
            if own:
                setattr(owner, name, inner)
            else:
                delattr(owner, name)
