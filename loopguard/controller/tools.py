"""A tool as the loop sees it: decided, recorded, run in a cell, recorded again."""

from __future__ import annotations

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from loopguard.errors import SandboxUnavailableError
from loopguard.gates.tools import REFUSAL
from loopguard.types import Decision, Outcome, ToolCall

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loopguard.controller.cycle import Cycle
    from loopguard.controller.guard import LoopGuard

_CHUNK = 64
"""Tool calls that are decided and made durable together. A freeze takes effect between two chunks."""


class Tool:
    """A tool as the loop sees it. Each call is decided, recorded, run in a cell, and recorded again.

    A refusal, a crash and a time-out are Outcomes. So is a freeze (status `denied`): frameworks swallow what a tool
    raises, and the loop learns of the freeze at its next update, admission or promotion. Only a sandbox that died
    raises (SandboxUnavailableError).
    """

    def __init__(self, guard: LoopGuard, cycle: Cycle, name: str) -> None:
        self.name = name
        self._guard = guard
        self._cycle = cycle

    def __call__(self, code: str, *, stdin: bytes = b"") -> Outcome:
        """Run one call."""
        return self._run_chunk([self._call(code, stdin)])[0]

    def map(self, codes: Iterable[str]) -> list[Outcome]:
        """Run many calls, on all cells at once; outcomes come in the order of the codes."""
        calls = [self._call(code, b"") for code in codes]
        outcomes: list[Outcome] = []
        for start in range(0, len(calls), _CHUNK):
            outcomes += self._run_chunk(calls[start : start + _CHUNK])
        return outcomes

    def _call(self, code: str, stdin: bytes) -> ToolCall:
        return ToolCall(id=uuid.uuid4().hex, tool=self.name, code=code, stdin=stdin)

    def _run_chunk(self, calls: Sequence[ToolCall]) -> list[Outcome]:
        guard = self._guard
        guard._listen()
        if guard._state.frozen or self._cycle.discarded:
            return [_refused(call) for call in calls]
        decisions = [guard._tools.decide(call) for call in calls]
        for call, decision in zip(calls, decisions, strict=True):
            self._record_decision(call, decision)
        # Record first: a call nobody recorded must not have happened.
        guard._log.sync()
        if (trip := guard._tools.trip()) is not None:
            guard._freeze(trip, cycle=self._cycle.number, roll_back=self._cycle.updates > 0)
            return [_refused(call) for call in calls]
        outcomes = self._run(calls, decisions)
        guard._log.sync()
        if (trip := guard._tools.trip()) is not None:
            guard._freeze(trip, cycle=self._cycle.number, roll_back=self._cycle.updates > 0)
        return outcomes

    def _run(self, calls: Sequence[ToolCall], decisions: Sequence[Decision]) -> list[Outcome]:
        cells = self._guard._cells
        if len(calls) == 1:
            return [self._run_one(calls[0], decisions[0])]
        with ThreadPoolExecutor(max_workers=cells.width) as pool:
            try:
                return list(pool.map(self._run_one, calls, decisions))
            except BaseException:
                # A dead sandbox or Ctrl-C: what still waits must not start.
                pool.shutdown(wait=False, cancel_futures=True)
                cells.kill_running()
                raise

    def _run_one(self, call: ToolCall, decision: Decision) -> Outcome:
        guard = self._guard
        if not decision.allowed:
            return _refused(call)
        try:
            outcome = guard._cells.of(decision.facts["sandbox"]).run(call)
        except SandboxUnavailableError as error:
            guard._log.append("tool.lost", {"call": call.id, "reason": str(error)}, cycle=self._cycle.number)
            raise
        guard._tools.finished(outcome)
        body = {
            "call": call.id,
            "status": outcome.status,
            "exit_code": outcome.exit_code,
            "stdout_sha256": hashlib.sha256(outcome.stdout).hexdigest(),
            "stdout_bytes": outcome.stdout_bytes,
            "stderr_bytes": outcome.stderr_bytes,
            "wall_ms": round(outcome.wall_ms, 2),
            "leftovers": outcome.leftovers,
        }
        guard._log.append("tool.finished", body, cycle=self._cycle.number, sync=False)
        return outcome

    def _record_decision(self, call: ToolCall, decision: Decision) -> None:
        code = call.code.encode("utf-8", errors="surrogatepass")
        body = {
            "call": call.id,
            "tool": call.tool,
            "code_sha256": hashlib.sha256(code).hexdigest(),
            "code_head": call.code[:200].encode("utf-8", errors="backslashreplace").decode(),
            "result": decision.result,
            "rule": decision.rule,
            "reason": decision.reason,
        }
        self._guard._log.append("tool.decided", body, cycle=self._cycle.number, sync=False)


def _refused(call: ToolCall) -> Outcome:
    return Outcome(call_id=call.id, status="denied", refusal=REFUSAL)
