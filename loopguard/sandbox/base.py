"""The contract that every runtime keeps, and the values it is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from loopguard.types import Limits, Outcome, ToolCall

EventSink = Callable[[str, dict[str, Any]], None]
"""Takes an event's name and its JSON body, from any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSpec:
    """What a cell must be. A cell that cannot be exactly this is refused."""

    image: str
    mode: Literal["fresh", "pooled"]
    """`fresh`: a container for each call, warmed beforehand. `pooled`: many calls in one, proven clean in between."""
    runtime: Literal["runc", "runsc"]
    cells: int
    preload: tuple[str, ...]
    """Modules that are imported before a call, so that the call need not wait for them."""
    limits: Limits
    calls_per_cell: int


class Runtime(Protocol):
    """Runs tool calls away from the host.

    A call that fails, crashes or reaches a limit is an Outcome. SandboxUnavailableError means that the sandbox could
    not do its work; whether the call ran is then unknown, and nobody but the caller may try it again.
    """

    def start(self) -> None:
        """Be ready to run. Raises SandboxUnavailableError, with what to do, where that is impossible."""
        ...

    def run(self, call: ToolCall) -> Outcome:
        """Run one call and wait for it; safe to use from many threads."""
        ...

    def kill_running(self) -> int:
        """End every call that runs now; each raises SandboxUnavailableError. Gives how many there were."""
        ...

    def close(self) -> None:
        """Take everything down; may be called twice."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was really applied, for the audit log: JSON values."""
        ...


def shipped(name: str) -> Path:
    """A file of `sandbox_images/`: from the repository, or from inside an installed package."""
    package = Path(__file__).parent.parent
    for home in (package.parent / "sandbox_images", package / "_shipped" / "sandbox_images"):
        if (home / name).exists():
            return home / name
    raise FileNotFoundError(f"{name} is neither beside the package nor in it: reinstall loopguard")


def setup_script() -> Path:
    """The script that makes engine and image ready."""
    return shipped("setup.sh")
