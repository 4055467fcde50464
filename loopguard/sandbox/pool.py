"""A few cells, kept clean and warm, and a fair queue in front of them.

The pool knows nothing of containers: it is given a way to make a cell. A caller gets a clean cell, waits for the
outcome and goes; cleaning and replacing happen behind its back. A cell that leaves a doubt is destroyed, not reused.

It sizes itself: cells are made when callers wait, up to a limit, and taken down when they have been idle for long. The
queue is served first come, first served, and has an end: who comes later is told so at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from loopguard.errors import SandboxBusyError, SandboxError, SandboxUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.types import Outcome, ToolCall

BASE = 2
"""Cells that are kept warm also while nobody calls, where the limit allows so many: one rests while the other works."""

_RETRY_S = 5.0
"""How long a pool that still has some cells leaves an engine alone that could not make one."""

_KEEP_S = 60.0
"""How long a cell beyond the base may be idle."""

_LOOK_S = 5.0
"""How often idle cells are looked at."""


class Cell(Protocol):
    """One container with its supervisor, as the pool sees it."""

    calls: int

    def resting(self) -> bool:
        """Whether it is silent, as a cell has to be that is being cleaned or waits: a look without a round trip."""
        ...

    def settle(self) -> str:
        """Wait until it is clean; the reason where it cannot be used again, else the empty string."""
        ...

    def call(self, call: ToolCall) -> Outcome:
        """Run a call. Raises SandboxError where the cell can do no more."""
        ...

    def spent(self) -> str:
        """Why it is not to be used again, as far as that is known before it has been cleaned; else empty."""
        ...

    def kill(self, why: str, call_id: str | None = None) -> bool:
        """End what runs in it, or this call alone, from any thread and without waiting; whether there was one.

        Its `call` raises SandboxUnavailableError(why).
        """
        ...

    def destroy(self, reason: str) -> None:
        """Take it down for good, once; later calls do nothing."""
        ...


class _Waiter:
    def __init__(self, call_id: str) -> None:
        self.call_id = call_id
        self.ready = threading.Event()
        self.cell: Cell | None = None
        self.error: SandboxError | None = None

    def fail(self, error: SandboxError) -> None:
        self.error = error
        self.ready.set()


class Pool:
    """Hands out clean cells first come, first served. Thread-safe; lives until `close`.

    A cell is in one place at a time: idle (clean, or about to be), taken (a caller has it), or in the broom's hands.
    `_coming` counts those that are being made.
    """

    def __init__(self, make: Callable[[], Cell], *, size: int, queue: int, wait_s: float) -> None:
        self._make = make
        self._size = size
        self._queue = queue
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._idle: deque[tuple[Cell, float]] = deque()
        self._taken: dict[Cell, str] = {}
        self._swept: set[Cell] = set()
        self._waiting: deque[_Waiter] = deque()
        self._coming = 0
        self._turns = 0
        self._retry_at = 0.0
        self._closed = threading.Event()
        self._broom = ThreadPoolExecutor(max_workers=2 * size, thread_name_prefix="loopguard-broom")
        self._keeper = threading.Thread(target=self._keep, name="loopguard-keeper", daemon=True)

    def start(self) -> None:
        """Make the first cells and wait for them. Raises what the first of them failed with."""
        base = min(BASE, self._size)
        with self._lock:
            self._coming += base
        for future in [self._broom.submit(self._replace) for _ in range(base)]:
            if (error := future.result()) is not None:
                raise error
        self._keeper.start()

    def run(self, call: ToolCall) -> Outcome:
        """Run a call in the next clean cell. Raises SandboxUnavailableError, SandboxBusyError."""
        cell = self.take(call.id)
        try:
            outcome = cell.call(call)
        except BaseException as error:
            # Anything but a SandboxError, such as Ctrl-C: nobody knows what the cell is doing.
            self.discard(cell, "lost" if isinstance(error, SandboxError) else "abandoned")
            raise
        if reason := cell.spent():
            self.discard(cell, reason)
        else:
            # It is being cleaned now, and says when it is: whoever takes it next will hear that.
            self._give(cell)
        return outcome

    def take(self, call_id: str) -> Cell:
        """A clean cell for a caller, who gives it back with `discard`. Raises as `run` does."""
        while True:
            cell = self._next(call_id)
            try:
                doubt = cell.settle()
            except BaseException:
                self.discard(cell, "abandoned")
                raise
            if not doubt:
                return cell
            self.discard(cell, doubt)

    def discard(self, cell: Cell, reason: str) -> None:
        """Take down a cell that a caller had, behind its back, and replace it where others need one."""
        with self._lock:
            self._taken.pop(cell, None)
            self._swept.add(cell)
        self._later(self._destroy, cell, reason)

    def kill(self, call_id: str, why: str) -> bool:
        """End one call, whether it runs or waits; whether it did."""
        with self._lock:
            running = [cell for cell, its in self._taken.items() if its == call_id]
            waiting = [waiter for waiter in self._waiting if waiter.call_id == call_id]
            for waiter in waiting:
                self._waiting.remove(waiter)
        for waiter in waiting:
            waiter.fail(SandboxUnavailableError(why))
        # By its id: meanwhile the cell may have ended that call and begun another one.
        ended = [cell.kill(why, call_id) for cell in running]
        return any(ended) or bool(waiting)

    def kill_running(self, why: str = "the call was killed by a freeze") -> int:
        """Kill every call that runs or waits for a cell now; gives how many there were."""
        with self._lock:
            running = list(self._taken)
            waiting, self._waiting = self._waiting, deque()
        for waiter in waiting:
            waiter.fail(SandboxUnavailableError(why))
        for cell in running:
            cell.kill(why)
        return len(running) + len(waiting)

    def close(self) -> None:
        """Refuse new calls, destroy every cell, wait for the broom."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            idle, self._idle = self._idle, deque()
        self.kill_running("the sandbox was closed")
        for cell, _ in idle:
            self._later(cell.destroy, "closed")
        if self._keeper.ident is not None:
            self._keeper.join()
        self._broom.shutdown(wait=True)
        with self._lock:
            late = [*(cell for cell, _ in self._idle), *self._taken, *self._swept]
        for cell in late:
            cell.destroy("closed")

    def _next(self, call_id: str) -> Cell:
        """The next cell for this caller, clean or about to be."""
        waiter = _Waiter(call_id)
        try:
            with self._lock:
                if self._closed.is_set():
                    raise SandboxUnavailableError("the sandbox is closed")
                if len(self._waiting) >= self._queue and not self._idle:
                    raise SandboxBusyError(f"all cells are taken and {self._queue} callers wait: try again later")
                self._waiting.append(waiter)
                self._hand_out()
                missing = self._missing()
                self._coming += missing
            for _ in range(missing):
                self._later(self._replace)
            self._wait(waiter)
        except BaseException:
            self._withdraw(waiter)
            raise
        if waiter.error is not None:
            raise waiter.error
        assert waiter.cell is not None
        return waiter.cell

    def _wait(self, waiter: _Waiter) -> None:
        """Until the waiter has what it waits for. A queue that moves is waited in for as long as it takes."""
        turns = -1
        while not waiter.ready.wait(self._wait_s):
            with self._lock:
                stuck, turns = self._turns == turns, self._turns
            if stuck:
                raise SandboxUnavailableError(
                    f"no cell became free within {self._wait_s:.0f} s: does the Docker engine still make progress?"
                )

    def _withdraw(self, waiter: _Waiter) -> None:
        """Forget a caller that waits no longer, and let the next one have its cell."""
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        if waiter.cell is not None:
            self._give(waiter.cell)

    def _hand_out(self) -> None:
        """Give idle cells to those who wait longest, under the lock. The cell that has rested longest goes first."""
        while self._waiting and self._idle:
            cell, _ = self._idle.popleft()
            waiter = self._waiting.popleft()
            waiter.cell = cell
            self._taken[cell] = waiter.call_id
            self._turns += 1
            waiter.ready.set()

    def _missing(self) -> int:
        """How many cells to make, under the lock: one for each caller that waits, and never fewer than the base.

        An engine that could not make one is tried again when a caller comes.
        """
        there = self._coming + len(self._idle) + len(self._taken) + len(self._swept)
        if self._closed.is_set() or (there and time.monotonic() < self._retry_at):
            return 0
        wanted = max(len(self._waiting) - self._coming - len(self._swept), min(BASE, self._size) - there)
        return max(min(wanted, self._size - there), 0)

    def _give(self, cell: Cell) -> None:
        """Put a cell where the next caller finds it."""
        with self._lock:
            self._taken.pop(cell, None)
            self._swept.discard(cell)
            closed = self._closed.is_set()
            if not closed:
                self._idle.append((cell, time.monotonic()))
            self._hand_out()
        if closed:
            cell.destroy("closed")

    def _destroy(self, cell: Cell, reason: str) -> None:
        with self._lock:
            self._swept.discard(cell)
            missing = self._missing()
            self._coming += missing
        # First the new one: somebody may be waiting for it, and nobody waits for the old one to be gone.
        for _ in range(missing):
            self._later(self._replace)
        cell.destroy(reason)

    def _replace(self) -> Exception | None:
        """Make a cell and hand it out; where that fails and none is left, whoever waits learns why."""
        if self._closed.is_set():
            with self._lock:
                self._coming -= 1
            return None
        try:
            cell = self._make()
        except Exception as error:  # noqa: BLE001 - the count must be right, whatever the maker met
            self._not_made(error)
            return error
        with self._lock:
            self._coming -= 1
            self._swept.add(cell)
        self._give(cell)
        return None

    def _not_made(self, error: Exception) -> None:
        failure = error if isinstance(error, SandboxError) else SandboxUnavailableError(f"no cell was made: {error}")
        with self._lock:
            self._coming -= 1
            self._retry_at = time.monotonic() + _RETRY_S
            failed: list[_Waiter] = []
            if not (self._coming or self._idle or self._taken or self._swept):
                failed, self._waiting = list(self._waiting), deque()
        for waiter in failed:
            waiter.fail(failure)

    def _keep(self) -> None:
        """Look after idle cells: replace those that ended or are in doubt, take down those that nobody needs."""
        while not self._closed.wait(_LOOK_S):
            unneeded, heard = self._look()
            for cell in unneeded:
                self.discard(cell, "idle")
            for cell in heard:
                if doubt := cell.settle():
                    self.discard(cell, doubt)
                else:
                    self._give(cell)
            with self._lock:
                missing = self._missing()
                self._coming += missing
            for _ in range(missing):
                self._later(self._replace)

    def _look(self) -> tuple[list[Cell], list[Cell]]:
        """Idle cells that nobody needs, and those that have something to say; nobody can take them meanwhile."""
        now = time.monotonic()
        unneeded: list[Cell] = []
        heard: list[Cell] = []
        kept: deque[tuple[Cell, float]] = deque()
        with self._lock:
            spare = len(self._idle) + len(self._taken) + self._coming - min(BASE, self._size)
            # The one that has rested longest first.
            for cell, since in self._idle:
                if spare > 0 and now - since > _KEEP_S:
                    unneeded.append(cell)
                    spare -= 1
                elif cell.resting():
                    kept.append((cell, since))
                else:
                    heard.append(cell)
            self._idle = kept
            self._swept.update(unneeded, heard)
        return unneeded, heard

    def _later(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            self._broom.submit(action, *arguments)
        except RuntimeError:
            action(*arguments)  # the pool is being closed, or the interpreter is on its way out
