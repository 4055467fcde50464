"""The path of every tool call: listen for a freeze, decide, record, run in a cell, record again.

Loops and services take the same path. Many threads may be on it at once; they share one sync of the log before their
calls run. What a call came back with is recorded and becomes durable with the next sync.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loopguard.audit.redact import WINDOW_CHARS
from loopguard.errors import SandboxBusyError, SandboxError, SandboxUnavailableError, UsageError
from loopguard.gates.tools import REFUSAL, Rollout
from loopguard.types import Decision, Outcome, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loopguard.controller.guard import LoopGuard
    from loopguard.sandbox.base import Episode as Cell

    Run = Callable[[ToolCall], Outcome]

GONE = "the caller went away"
FROZEN = "the call was killed by a freeze"
_KILL_AGAIN_S = 0.02
_ENDERS = 8
"""How many calls can be ended at once; each takes a few milliseconds."""

_SPARE_THREADS = 4
"""Beside one for each cell: they decide and record while the others wait for theirs."""


class Calls:
    """The tool calls of one guard. Thread-safe; `cycle` is None where there is no loop.

    A refusal, a crash and a time-out are Outcomes. So is a freeze (status `denied`): frameworks swallow what a tool
    raises, and the loop learns of the freeze at its next update, admission or promotion.
    """

    def __init__(self, guard: LoopGuard) -> None:
        self._guard = guard
        self._lines: dict[str, _Line] = {}
        self._running: dict[str, str] = {}
        """The tool of each call that runs, or waits for a cell."""
        freeze = guard.policy.freeze.running_calls
        rules = [rule for rule in guard.policy.tools.rules if rule.then == "run"]
        self._drains = {rule.tool for rule in rules if (rule.on_freeze or freeze) == "drain"}
        self._kills = {rule.tool for rule in rules} - self._drains
        self._enders = ThreadPoolExecutor(_ENDERS, thread_name_prefix="loopguard-end")
        self._lock = threading.Lock()
        self._closed = False

    def run(
        self,
        calls: Sequence[ToolCall],
        *,
        cycle: int | None,
        closed: Callable[[], bool] = lambda: False,
        roll_back: bool = False,
        episode: EpisodeCalls | None = None,
        spends: bool = True,
    ) -> list[Outcome]:
        """Run calls together, on all cells at once; outcomes come in the order of the calls.

        With `closed`, a caller whose time is over has its calls refused; `roll_back` is what a freeze by the tool gate
        does with the weights. Without `spends` they are the loop's own and take nothing from the budget. Raises
        SandboxUnavailableError, SandboxBusyError, CallError, AuditWriteError.
        """
        guard = self._guard
        if self._closed:
            raise SandboxUnavailableError("the sandbox is closed")
        guard._listen()
        if guard._state.frozen or closed():
            return [_refused(call) for call in calls]
        rollout = episode.rollout if episode is not None else None
        decisions = [guard._tools.decide(call, cycle=cycle, rollout=rollout, spends=spends) for call in calls]
        if episode is not None:
            for decision in decisions:
                episode.admit(decision)
        kept = self._keep_given(calls)
        for call, decision, apart in zip(calls, decisions, kept, strict=True):
            self._record_decision(call, decision, apart, cycle=cycle)
        # Record first: a call nobody recorded must not have happened.
        guard._log.sync()
        if self._trips(cycle=cycle, roll_back=roll_back):
            return [self._not_run(call, decision, cycle=cycle) for call, decision in zip(calls, decisions, strict=True)]

        def one(call: ToolCall, decision: Decision) -> Outcome:
            # Again: the loop may have frozen while the record became durable, or while others ran.
            if guard._state.frozen:
                return self._not_run(call, decision, cycle=cycle)
            return self._run_one(call, decision, cycle=cycle, run=episode.cell.run if episode else None)

        outcomes = self._together(one, calls, decisions)
        self._trips(cycle=cycle, roll_back=roll_back)
        return outcomes

    async def arun(self, call: ToolCall, run: Run, *, kill: Callable[[], None] | None = None) -> Outcome:
        """Await `run(call)` in a thread. Cancelling it ends the call, in its cell or in the queue, and waits."""
        with self._lock:
            if self._closed:
                raise SandboxUnavailableError("the sandbox is closed")
            profile = self._guard._cells.profile_of(call.tool)
            if profile not in self._lines:
                self._lines[profile] = _Line(*self._guard._cells.room(profile))
            line = self._lines[profile]
            if line.under_way >= line.most:
                raise SandboxBusyError("all cells are taken and as many callers wait as may: try again later")
            job = line.threads.submit(run, call)
            line.under_way += 1
        outcome = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            # It was told to end, and nobody else asks what became of it.
            outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
            # In a thread, where no end of the event loop can cut it short.
            ending = asyncio.wrap_future(self._enders.submit(_end, job, kill or self._killer(call)))
            while not ending.done():
                # Some say it more than once; it is being done, and the caller goes when it is.
                with suppress(asyncio.CancelledError):
                    await asyncio.shield(ending)
            raise
        finally:
            with self._lock:
                line.under_way -= 1

    def end_running(self) -> None:
        """The run froze: end the calls under way, but those that the guard policy lets come to their own end."""
        if not self._drains:
            self._guard._cells.kill_running()
            return
        for call, tool in list(self._running.items()):
            if tool in self._kills:
                self._guard._cells.kill(call, FROZEN)

    def refuse(self) -> None:
        """From now on every call raises SandboxUnavailableError, also those that wait for a thread."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Wait for the threads. The cells are gone by now, so no call keeps one."""
        self.refuse()
        for line in self._lines.values():
            line.threads.shutdown(wait=True)
        self._enders.shutdown(wait=True)

    def _killer(self, call: ToolCall) -> Callable[[], None]:
        return lambda: self._guard._cells.kill(call.id, GONE)

    def _together(
        self,
        one: Callable[[ToolCall, Decision], Outcome],
        calls: Sequence[ToolCall],
        decisions: Sequence[Decision],
    ) -> list[Outcome]:
        if len(calls) == 1:
            return [one(calls[0], decisions[0])]
        cells = self._guard._cells
        with ThreadPoolExecutor(max_workers=cells.width) as threads:
            try:
                return list(threads.map(one, calls, decisions))
            except BaseException:
                # A dead sandbox or Ctrl-C: what still waits must not start.
                threads.shutdown(wait=False, cancel_futures=True)
                cells.kill_running()
                raise

    def _run_one(self, call: ToolCall, decision: Decision, *, cycle: int | None, run: Run | None) -> Outcome:
        guard = self._guard
        if not decision.allowed:
            return _refused(call)
        self._running[call.id] = call.tool
        try:
            outcome = (run or guard._cells.of(decision.facts["sandbox"]).run)(call)
        except SandboxError as error:
            guard._log.append("tool.lost", {"call": call.id, "reason": str(error)}, cycle=cycle)
            raise
        finally:
            self._running.pop(call.id, None)
        guard._tools.finished(outcome)
        body: dict[str, Any] = {
            "call": call.id,
            "status": outcome.status,
            "exit_code": outcome.exit_code,
            **self._output(outcome),
            "stdout_bytes": outcome.stdout_bytes,
            "stderr_bytes": outcome.stderr_bytes,
            "wall_ms": round(outcome.wall_ms, 2),
            "leftovers": outcome.leftovers,
        }
        if outcome.files or outcome.not_fetched:
            body["files"] = _digests(outcome.files)
            body["not_fetched"] = len(outcome.not_fetched)
        guard._log.append("tool.finished", body, cycle=cycle, sync=False)
        return outcome

    def _not_run(self, call: ToolCall, decision: Decision, *, cycle: int | None) -> Outcome:
        if decision.allowed:
            self._guard._log.append(
                "tool.lost", {"call": call.id, "reason": "the loop froze before it ran"}, cycle=cycle
            )
        return _refused(call)

    def _keep_given(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        """What records hold of code and input that lie apart, for each call; nothing where none are kept.

        Such a record has no plain digest beside it, from which a short text could be found by trying.
        """
        if self._guard.policy.audit.payloads.code != "keep":
            return [{} for _ in calls]
        given = [[("code", _bytes(call.code)), *([("stdin", call.stdin)] if call.stdin else [])] for call in calls]
        apart = iter(self._guard._log.keep([data for parts in given for _, data in parts]))
        return [{name: next(apart) for name, _ in parts} for parts in given]

    def _output(self, outcome: Outcome) -> dict[str, Any]:
        """What a record holds of the output: its digest, or what stands for it where it lies apart."""
        if self._guard.policy.audit.payloads.printed != "keep":
            return {"stdout_sha256": hashlib.sha256(outcome.stdout).hexdigest()}
        streams = {name: data for name, data in (("stdout", outcome.stdout), ("stderr", outcome.stderr)) if data}
        return dict(zip(streams, self._guard._log.keep(list(streams.values())), strict=True))

    def _record_decision(self, call: ToolCall, decision: Decision, apart: dict[str, Any], *, cycle: int | None) -> None:
        body: dict[str, Any] = {"call": call.id, "tool": call.tool, **apart}
        if "code" not in apart:
            body["code_sha256"] = hashlib.sha256(_bytes(call.code)).hexdigest()
            if self._guard.policy.audit.payloads.code == "head":
                # More than the head: the log looks for secrets before it cuts.
                head = call.code[:WINDOW_CHARS].encode("utf-8", errors="backslashreplace").decode()
                body["code_head"] = head
        body |= {"result": decision.result, "rule": decision.rule, "reason": decision.reason}
        if call.language:
            body["language"] = call.language
        if call.program:
            body["program_sha256"] = hashlib.sha256(_bytes(call.program)).hexdigest()
        if call.stdin and "stdin" not in apart:
            body |= {"stdin_sha256": hashlib.sha256(call.stdin).hexdigest(), "stdin_bytes": len(call.stdin)}
        if call.files:
            body["files"] = _digests(call.files)
        self._guard._log.append("tool.decided", body, cycle=cycle, sync=False)

    def _trips(self, *, cycle: int | None, roll_back: bool) -> bool:
        """Whether the tool gate froze the loop just now, or another call made it do so."""
        guard = self._guard
        if (trip := guard._tools.trip()) is None:
            return False
        with guard._turn:
            if not guard._state.freeze_id:
                guard._freeze(trip, cycle=cycle, roll_back=roll_back)
        return True


class _Line:
    """Those who await a call in cells of one profile: a thread for each cell, and a bound."""

    def __init__(self, cells: int, queue: int) -> None:
        self.most = cells + queue
        self.under_way = 0
        self.threads = ThreadPoolExecutor(cells + _SPARE_THREADS, thread_name_prefix="loopguard-call")


def _end(job: Future[Outcome], kill: Callable[[], None]) -> None:
    # Not the wrapped future: that one can be cancelled while its thread runs on.
    while not job.cancel() and not job.done():
        # Again and again: it may be on its way to a cell, where nothing can be ended yet.
        kill()
        wait([job], timeout=_KILL_AGAIN_S)


class EpisodeCalls:
    """One cell for one rollout: what a call writes is there for the next. Each call is decided and recorded as any.

    Not for two threads at once. Use it as a context manager, or `close` it.
    """

    def __init__(
        self,
        calls: Calls,
        profile: str,
        cell: Cell,
        *,
        cycle: int | None,
        closed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.profile = profile
        self.cell = cell
        self.rollout = Rollout()
        self._calls = calls
        self._cycle = cycle
        self._closed = closed

    def __enter__(self) -> EpisodeCalls:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, call: ToolCall, *, spends: bool = True, roll_back: bool = False) -> Outcome:
        """Run one call. Raises as `Calls.run` does, and UsageError for a tool that runs in another kind of cell."""
        run = self._calls.run
        return run([call], cycle=self._cycle, closed=self._closed, episode=self, spends=spends, roll_back=roll_back)[0]

    async def arun(self, call: ToolCall) -> Outcome:
        """The same, awaited; cancelling it ends the call and the episode."""
        return await self._calls.arun(call, self.run, kill=lambda: self.cell.kill(GONE))

    def close(self) -> None:
        """Take the cell down; may be called twice."""
        self.cell.close()

    def admit(self, decision: Decision) -> None:
        """Raises UsageError where the guard policy lets this call run in another kind of cell only."""
        if decision.allowed and decision.facts["sandbox"] != self.profile:
            raise UsageError(
                f"rule {decision.rule} sends its tool to the sandbox profile {decision.facts['sandbox']!r}, "
                f"and this episode has a cell of {self.profile!r}: use the tool outside it, or change the rule"
            )


class NoCell:
    """What an episode has instead of a cell where it began while the run was frozen: its calls are refused before."""

    def run(self, call: ToolCall) -> Outcome:
        """Raises SandboxUnavailableError: somebody has resumed the run meanwhile."""
        raise SandboxUnavailableError("this episode began while the run was frozen: begin another")

    def kill(self, why: str) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """There is nothing to take down."""


def _bytes(text: str) -> bytes:
    """As it goes to the cell, whatever a model put into it."""
    return text.encode("utf-8", errors="surrogatepass")


def _digests(files: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
    ]


def _refused(call: ToolCall) -> Outcome:
    return Outcome(call_id=call.id, status="denied", refusal=REFUSAL)
