"""Tools without a loop: gate, sandbox and log, for a service or a framework that has a loop of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from loopguard.controller.guard import LoopGuard
from loopguard.errors import UsageError
from loopguard.policy.load import load

if TYPE_CHECKING:
    from types import TracebackType

    from loopguard.audit.events import Entry
    from loopguard.controller.calls import EpisodeCalls
    from loopguard.policy.schema import GuardPolicy
    from loopguard.sandbox.base import CellSpec, EventSink, Runtime
    from loopguard.types import Outcome, ToolCall


class ToolStation:
    """Decides, records and runs tool calls under a guard policy. Thread-safe; owns its run directory until `close`.

    The directory is that of any run: `status`, `freeze`, `resume` and `audit` work on it. While it is frozen, every
    call is refused.
    """

    def __init__(self, guard: LoopGuard) -> None:
        self._guard = guard
        self.policy: GuardPolicy = guard.policy
        self.run_id = guard.run_id
        self.run_dir: Path = guard.run_dir

    @classmethod
    def open(
        cls,
        policy: str | os.PathLike[str],
        *,
        run_dir: str | os.PathLike[str],
        command: Sequence[str] = (),
        runtimes: Callable[[CellSpec, str, EventSink], Runtime] | None = None,
        mirror: Callable[[Entry], None] | None = None,
    ) -> Self:
        """Open a run directory under a guard policy, or go on with the one that is there.

        Raises PolicyError, PolicyMismatchError, UsageError (also for a policy that lets no tool run),
        SandboxUnavailableError, RunBusyError, AuditTamperedError, AuditWriteError.
        """
        if not load(Path(policy)).policy.tools.rules:
            raise UsageError(f"{policy} lets no tool run, so every call would be refused: add tools and sandbox to it")
        return cls(LoopGuard.from_file(policy, run_dir=run_dir, command=command, runtimes=runtimes, mirror=mirror))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.__exit__(kind, error, trace)

    @property
    def frozen(self) -> bool:
        """Whether every call is refused right now. Takes in what was asked from outside."""
        self._guard._listen()
        return self._guard.frozen

    @property
    def failing(self) -> bool:
        """Whether the audit log can no longer be written. Every call raises AuditWriteError from then on."""
        return self._guard._log.degraded

    def run(self, call: ToolCall) -> Outcome:
        """Run one call; a refusal is an Outcome too.

        Raises SandboxBusyError, SandboxUnavailableError, CallError, AuditWriteError.
        """
        if not self.frozen:
            # A run that was frozen when it was opened has no cells yet.
            self._guard._cells.start()
        return self._guard._calls.run([call], cycle=None)[0]

    async def arun(self, call: ToolCall) -> Outcome:
        """The same, awaited. Cancelling it ends the call in its cell."""
        return await self._guard._calls.arun(call, self.run)

    def episode(self, profile: str) -> EpisodeCalls:
        """A cell of this sandbox profile until it is closed. Raises UsageError where no rule names that profile."""
        return self._guard._episode(profile, cycle=None)

    def close(self) -> None:
        """Finish the record and take the sandboxes down; may be called twice."""
        self._guard.close()
