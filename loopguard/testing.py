"""Doubles that ship: what a test of a loop needs instead of Docker and of the clock.

from loopguard.testing import FakeRuntime, fake_runtimes

guard = LoopGuard.from_file("policies/default.yaml", run_dir=tmp_path / "run", runtimes=fake_runtimes("42"))
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from loopguard.errors import SandboxUnavailableError
from loopguard.types import Outcome, OutcomeStatus, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.sandbox.base import CellSpec, EventSink

    Answer = str | OutcomeStatus | Outcome | Exception
    Respond = Callable[[ToolCall], "str | Outcome | Exception"]


class FakeRuntime:
    """A runtime that runs nothing: `respond` says what each call comes back with.

    `respond` gives text (standard output of a call that went well), an Outcome, or an exception to raise. `calls` keeps
    every call that reached the runtime.
    """

    def __init__(self, respond: Respond) -> None:
        self.calls: list[ToolCall] = []
        self.started = False
        self.closed = False
        self.killed = 0
        self._respond = respond
        self._lock = threading.Lock()

    def start(self) -> None:
        """Be ready."""
        self.started = True

    def run(self, call: ToolCall) -> Outcome:
        """Give the answer to one call. Raises SandboxUnavailableError before `start` and after `close`."""
        if not self.started or self.closed:
            raise SandboxUnavailableError("the fake runtime is not running")
        with self._lock:
            self.calls.append(call)
        answer = self._respond(call)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Outcome) else printed(call, answer)

    def episode(self) -> FakeEpisode:
        """A cell that is none; its calls are kept and answered like all others."""
        return FakeEpisode(self)

    def kill(self, call_id: str, why: str) -> bool:
        """Nothing runs here that could be ended."""
        return False

    def kill_running(self) -> int:
        """Count how often a freeze asked for this; nothing runs here."""
        self.killed += 1
        return 0

    def close(self) -> None:
        """Be gone."""
        self.closed = True

    def facts(self) -> dict[str, Any]:
        """What a real runtime reads back from its engine."""
        return {"runtime": "fake"}


class FakeEpisode:
    """An episode of a FakeRuntime."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.closed = False
        self._runtime = runtime

    def run(self, call: ToolCall) -> Outcome:
        """Give the answer to one call. Raises SandboxUnavailableError after `close`."""
        if self.closed:
            raise SandboxUnavailableError("the episode is over: it was closed")
        return self._runtime.run(call)

    def kill(self, why: str) -> None:
        """Be over."""
        self.closed = True

    def close(self) -> None:
        """Be over."""
        self.closed = True


def fake_runtimes(respond: Respond | str) -> Callable[[CellSpec, str, EventSink], FakeRuntime]:
    """For `LoopGuard.from_file(runtimes=...)`: fake runtimes that all answer alike."""
    answer: Respond = (lambda _: respond) if isinstance(respond, str) else respond
    return lambda _spec, _run_id, _on_event: FakeRuntime(answer)


def printed(call: ToolCall, text: str) -> Outcome:
    """The outcome of a call that printed `text` and exited with 0."""
    out = text.encode()
    return Outcome(call_id=call.id, status="ok", exit_code=0, stdout=out, stdout_bytes=len(out), wall_ms=1.0)


def returned(call: ToolCall, value: Any) -> Outcome:
    """The outcome of a call of a guarded function, or of a method of a guarded environment, that gave `value` back."""
    return _answered(call, {"result": value, "state": "0" * 64}, exit_code=0)


def raised(call: ToolCall, error: Exception) -> Outcome:
    """The outcome of one that raised `error`."""
    return _answered(call, {"error": str(error), "kind": type(error).__name__, "state": "0" * 64}, exit_code=1)


def _answered(call: ToolCall, told: dict[str, Any], *, exit_code: int) -> Outcome:
    from loopguard.controller.functions import seal

    files = {name: seal(call, told) for name in call.fetch}
    status: OutcomeStatus = "ok" if exit_code == 0 else "nonzero_exit"
    return Outcome(call_id=call.id, status=status, exit_code=exit_code, files=files, wall_ms=1.0)


class FrozenClock:
    """A clock that stands still until told to go on. For `AuditLog.open(clock=...)`."""

    def __init__(self, start: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        self._now = start
        self._monotonic_ns = 0

    def now(self) -> datetime:
        """The time of day, UTC."""
        return self._now

    def monotonic_ns(self) -> int:
        """Nanoseconds that never go back."""
        return self._monotonic_ns

    def advance(self, *, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)
        self._monotonic_ns += int(seconds * 1e9)
