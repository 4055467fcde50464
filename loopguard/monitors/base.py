"""The contract that every monitor keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from loopguard.types import Reading, Signal


class Monitor(Protocol):
    """Watches one metric of one run.

    A monitor is a function of the readings it was shown, in order: two monitors with equal settings that saw equal
    readings give equal signals, and `load_state_dict(other.state_dict())` makes one continue where the other stopped.
    """

    metric: str
    immediate: bool
    """True where a trip needs no further evidence, so that the very update can still be withheld in time."""

    def read(self, reading: Reading, *, armed: bool) -> Signal:
        """Take a reading and judge it. While not `armed` a monitor only learns, unless it is `immediate`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` restores the monitor."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` gave."""
        ...
