"""A tool as the loop sees it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from loopguard.types import Outcome, ToolCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopguard.controller.calls import EpisodeCalls
    from loopguard.controller.cycle import Cycle
    from loopguard.controller.guard import LoopGuard

_CHUNK = 64
"""Tool calls that are decided and made durable together. A freeze takes effect between two chunks."""


class Tool:
    """A tool as the loop sees it. Each call is decided, recorded, run in a cell, and recorded again. Thread-safe.

    A refusal, a crash and a time-out are Outcomes. So is a freeze (status `denied`): frameworks swallow what a tool
    raises, and the loop learns of the freeze at its next update, admission or promotion. What raises is a sandbox that
    died (SandboxUnavailableError) or is full (SandboxBusyError), and a call that no cell takes (CallError).
    """

    def __init__(
        self, guard: LoopGuard, cycle: Cycle, name: str, *, episode: EpisodeCalls | None = None, spends: bool = True
    ) -> None:
        self.name = name
        self._spends = spends
        self._guard = guard
        self._cycle = cycle
        self._episode = episode

    def __call__(
        self,
        code: str,
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
        wall_s: float | None = None,
    ) -> Outcome:
        """Run one call. `files` go in by name, `fetch` names what comes back; `wall_s` shortens the policy's limit."""
        return self._run(self._call(code, stdin=stdin, files=files or {}, fetch=tuple(fetch), wall_s=wall_s))

    async def acall(
        self,
        code: str,
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
        wall_s: float | None = None,
    ) -> Outcome:
        """The same, awaited. Cancelling it ends the call in its cell."""
        call = self._call(code, stdin=stdin, files=files or {}, fetch=tuple(fetch), wall_s=wall_s)
        return await self._guard._calls.arun(call, self._run)

    def map(self, codes: Iterable[str]) -> list[Outcome]:
        """Run many calls, on all cells at once (one after the other in an episode); outcomes come in their order."""
        if self._episode is not None:
            return [self(code) for code in codes]
        calls = [self._call(code) for code in codes]
        outcomes: list[Outcome] = []
        for start in range(0, len(calls), _CHUNK):
            outcomes += self._run_all(calls[start : start + _CHUNK])
        return outcomes

    def _call(
        self,
        code: str,
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        fetch: tuple[str, ...] = (),
        wall_s: float | None = None,
    ) -> ToolCall:
        return ToolCall(
            id=uuid.uuid4().hex, tool=self.name, code=code, stdin=stdin, files=files or {}, fetch=fetch, wall_s=wall_s
        )

    def _run(self, call: ToolCall) -> Outcome:
        return self._run_all([call])[0]

    def _run_all(self, calls: Sequence[ToolCall]) -> list[Outcome]:
        cycle = self._cycle
        return self._guard._calls.run(
            calls,
            cycle=cycle.number,
            closed=lambda: cycle.discarded,
            roll_back=cycle.updates > 0,
            episode=self._episode,
            spends=self._spends,
        )


class Episode:
    """One cell for one rollout, as the loop sees it: files that a call writes are there for the next.

        with cycle.episode("agent") as episode:
            shell, python = episode.tool("sh"), episode.tool("python")

    Not for two threads at once.
    """

    def __init__(self, guard: LoopGuard, cycle: Cycle, calls: EpisodeCalls) -> None:
        self._guard = guard
        self._cycle = cycle
        self._calls = calls

    def __enter__(self) -> Episode:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tool(self, name: str) -> Tool:
        """A tool that runs in this episode's cell."""
        return Tool(self._guard, self._cycle, name, episode=self._calls)

    def close(self) -> None:
        """Take the cell down; may be called twice."""
        self._calls.close()
