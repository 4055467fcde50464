"""The contract that every monitor keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from loopguard.types import Expectation, Signal

if TYPE_CHECKING:
    from collections.abc import Iterable


class Monitor(Protocol):
    """Watches one metric of one run.

    A monitor is a function of the values it was shown, in order: two monitors with equal settings that saw equal values
    give equal signals, and `load_state_dict(other.state_dict())` makes one continue where the other stopped.
    """

    metric: str
    immediate: bool
    """True where it judges each value by itself; such monitors are asked first, and what they trip on no other sees."""

    def read(self, value: float, *, at: int, armed: bool = True) -> Signal | None:
        """Take a value and judge it. None is ok: a healthy run makes no signals, and pays for none.

        While not `armed` a monitor only learns, unless it is `immediate`.
        """
        ...

    def limits(self) -> tuple[float | None, float | None]:
        """The range outside of which the next value alone is a trip (`at_once`); None where that side is open.

        It holds for the next value only, and can be evaluated where the value is, without bringing it to the host.
        """
        ...

    def expect(self, expected: Expectation) -> None:
        """Take in that a change was announced."""
        ...

    def tighten(self, share: float) -> None:
        """From the next value on take this share of the usual reach, 0 < share <= 1; no state, and no part of one.

        What needs no history has no reach: an impossible value is no more so at another time.
        """
        ...

    def rebase(self) -> None:
        """Forget the level: what comes next is the new normal."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` restores the monitor."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` gave."""
        ...


def unusable(monitor: str, metric: str, value: float, *, at: int, because: str) -> Signal:
    """What a monitor says of a value that it cannot compute with: a warning that holds, and never a silent pass."""
    reason = f"{metric} is {value}, which {because}; watch it with bounds"
    return Signal(level="warn", monitor=monitor, metric=metric, value=value, at=at, since=at, holds=True, reason=reason)


def saved(expected: Iterable[Expectation]) -> list[list[Any]]:
    """Announcements as a monitor's state holds them."""
    return [[each.kind, each.at, each.span] for each in expected]


def loaded(state: Iterable[Any]) -> list[Expectation]:
    """Announcements out of such a state."""
    return [Expectation(kind=kind, at=at, span=span) for kind, at, span in state]
