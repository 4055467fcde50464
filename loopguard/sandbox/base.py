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
class EgressRule:
    """One place that calls may reach through our proxy."""

    host: str
    """By its exact name, in small letters. Addresses are not names."""
    port: int
    secret_headers: tuple[tuple[str, str], ...] = ()
    """(header, environment variable of the controller): added by the proxy to what it sends there over TLS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSpec:
    """What a cell must be. A cell that cannot be exactly this is refused."""

    image: str
    mode: Literal["fresh", "pooled", "episode"]
    """`fresh`: a container for each call, warmed beforehand. `pooled`: many calls in one, proven clean in between.
    `episode`: a container for each rollout, whose files stay from call to call."""
    runtime: Literal["runc", "runsc"]
    privileges: Literal["multi", "strict"] = "multi"
    """`multi`: PID 1 is root with SETUID and SETGID, and each call has a user of its own. `strict`: no root and no
    capability in the cell at all; runc only."""
    cells: int
    """How many there are at most. They are made when callers wait and taken down when nobody needs them."""
    queue: int = 1000
    """How many callers may wait for one."""
    background: bool = False
    """Whether what a call leaves running lives on until the episode ends."""
    egress: tuple[EgressRule, ...] = ()
    """Places outside that calls may reach; by default none."""
    preload: tuple[str, ...]
    """Modules that are imported before a call, so that the call need not wait for them."""
    limits: Limits
    calls_per_cell: int


class Episode(Protocol):
    """One cell for one rollout: what a call writes is there for the next. Not for two threads at once."""

    def run(self, call: ToolCall) -> Outcome:
        """Run one call. Raises as `Runtime.run` does; after SandboxUnavailableError the episode is over."""
        ...

    def kill(self, why: str) -> None:
        """End the call that runs, and with it the episode; from any thread."""
        ...

    def close(self) -> None:
        """Take the cell down; may be called twice."""
        ...


class Runtime(Protocol):
    """Runs tool calls away from the host.

    A call that fails, crashes or reaches a limit is an Outcome. SandboxUnavailableError means that the sandbox could
    not do its work; whether the call ran is then unknown, and nobody but the caller may try it again.
    """

    def start(self) -> None:
        """Be ready to run. Raises SandboxUnavailableError, with what to do, where that is impossible."""
        ...

    def run(self, call: ToolCall) -> Outcome:
        """Run one call and wait for it; safe to use from many threads.

        Raises SandboxBusyError where too many wait already, CallError for a call that no cell takes.
        """
        ...

    def episode(self) -> Episode:
        """Lend a clean cell until it is closed. Raises SandboxUnavailableError."""
        ...

    def kill(self, call_id: str, why: str) -> bool:
        """End one call, whether it runs or waits; it raises SandboxUnavailableError(why). Whether there was one."""
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
