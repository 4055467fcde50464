"""A few cells, kept clean and warm, and a fair queue in front of them.

The pool knows nothing of containers: it is given a way to make a cell. A caller gets a clean cell, waits for the
outcome and goes; cleaning and replacing happen behind its back. A cell that leaves a doubt is destroyed, not reused.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from loopguard.errors import SandboxError, SandboxUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.types import Outcome, ToolCall

_RETRY_S = 5.0
"""How long a pool that still has some cells leaves an engine alone that could not make one."""


class Cell(Protocol):
    """One container with its supervisor, as the pool sees it."""

    calls: int

    def alive(self) -> bool:
        """Whether it still waits for a call: a look without a round trip."""
        ...

    def call(self, call: ToolCall) -> Outcome:
        """Run a call. Raises SandboxError where the cell can do no more."""
        ...

    def settle(self) -> str:
        """Wait until the cell is clean; the reason where it cannot be used again, else the empty string."""
        ...

    def kill(self, why: str) -> None:
        """End what runs in it, from any thread; its `call` raises SandboxUnavailableError(why)."""
        ...

    def destroy(self, reason: str) -> None:
        """Take it down for good, once; later calls do nothing."""
        ...


class _Waiter:
    def __init__(self) -> None:
        self.ready = threading.Event()
        self.cell: Cell | None = None
        self.error: SandboxError | None = None

    def fail(self, error: SandboxError) -> None:
        self.error = error
        self.ready.set()


class Pool:
    """Hands out clean cells first come, first served. Thread-safe; lives until `close`.

    A cell is in one place at a time: idle, running (a call is in it), or in the broom's hands. `_coming` counts those
    that are being made.
    """

    def __init__(self, make: Callable[[], Cell], *, size: int, calls_per_cell: int, wait_s: float) -> None:
        self._make = make
        self._size = size
        self._calls_per_cell = calls_per_cell
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._idle: deque[Cell] = deque()
        self._running: set[Cell] = set()
        self._swept: set[Cell] = set()
        self._waiting: deque[_Waiter] = deque()
        self._coming = 0
        self._turns = 0
        self._retry_at = 0.0
        self._closed = False
        self._broom = ThreadPoolExecutor(max_workers=2 * size, thread_name_prefix="loopguard-broom")

    def start(self) -> None:
        """Make all cells and wait for them. Raises what the first of them failed with."""
        with self._lock:
            self._coming += self._size
        for future in [self._broom.submit(self._replace) for _ in range(self._size)]:
            if (error := future.result()) is not None:
                raise error

    def run(self, call: ToolCall) -> Outcome:
        """Run a call in the next clean cell. Raises SandboxUnavailableError."""
        cell = self._take()
        try:
            outcome = cell.call(call)
        except BaseException as error:
            # Anything but a SandboxError, such as Ctrl-C: nobody knows what the cell is doing.
            self._sweep(cell, self._discard, "lost" if isinstance(error, SandboxError) else "abandoned")
            raise
        self._sweep(cell, self._settle)
        return outcome

    def kill_running(self, why: str = "the call was killed by a freeze") -> int:
        """Kill every call that runs or waits for a cell now; gives how many there were."""
        with self._lock:
            running = list(self._running)
            waiting, self._waiting = self._waiting, deque()
        for waiter in waiting:
            waiter.fail(SandboxUnavailableError(why))
        for cell in running:
            cell.kill(why)
        return len(running) + len(waiting)

    def close(self) -> None:
        """Refuse new calls, destroy every cell, wait for the broom."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle, self._idle = self._idle, deque()
        self.kill_running("the sandbox was closed")
        for cell in idle:
            self._later(cell.destroy, "closed")
        self._broom.shutdown(wait=True)
        with self._lock:
            late = [*self._idle, *self._running, *self._swept]
        for cell in late:
            cell.destroy("closed")

    def _take(self) -> Cell:
        waiter = _Waiter()
        with self._lock:
            if self._closed:
                raise SandboxUnavailableError("the sandbox is closed")
            self._waiting.append(waiter)
            dead = self._hand_out()
            missing = self._missing()
            self._coming += missing
        for _ in range(missing):
            self._later(self._replace)
        for cell in dead:
            self._later(cell.destroy, "lost")
        try:
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

    def _hand_out(self) -> list[Cell]:
        """Give idle cells to those who wait longest, under the lock; those that ended meanwhile are what it returns."""
        dead = []
        while self._waiting and self._idle:
            cell = self._idle.popleft()
            if not cell.alive():
                dead.append(cell)
                continue
            waiter = self._waiting.popleft()
            waiter.cell = cell
            self._running.add(cell)
            self._turns += 1
            waiter.ready.set()
        return dead

    def _missing(self) -> int:
        """How many cells to make, under the lock: an engine that was away is tried again when a caller comes."""
        there = self._coming + len(self._idle) + len(self._running) + len(self._swept)
        if there and time.monotonic() < self._retry_at:
            return 0
        return max(self._size - there, 0)

    def _give(self, cell: Cell) -> None:
        """Put a clean cell where the next caller finds it."""
        with self._lock:
            self._running.discard(cell)
            self._swept.discard(cell)
            closed = self._closed
            if not closed:
                self._idle.append(cell)
            dead = self._hand_out()
            missing = len(dead) and self._missing()
            self._coming += missing
        for _ in range(missing):
            self._later(self._replace)
        for gone in dead:
            self._later(gone.destroy, "lost")
        if closed:
            cell.destroy("closed")

    def _sweep(self, cell: Cell, action: Callable[..., None], *arguments: str) -> None:
        with self._lock:
            self._running.discard(cell)
            self._swept.add(cell)
        self._later(action, cell, *arguments)

    def _settle(self, cell: Cell) -> None:
        try:
            doubt = "recycled" if cell.calls >= self._calls_per_cell else cell.settle()
        except Exception as error:  # noqa: BLE001 - whatever went wrong, this cell is not proven clean
            doubt = f"not clean: {error}"
        if doubt:
            self._discard(cell, doubt)
        else:
            self._give(cell)

    def _discard(self, cell: Cell, reason: str) -> None:
        with self._lock:
            self._swept.discard(cell)
            again = not self._closed
            self._coming += again
        if again:
            # First the new one: somebody may be waiting for it, and nobody waits for the old one to be gone.
            self._later(self._replace)
        cell.destroy(reason)

    def _replace(self) -> Exception | None:
        """Make a cell and hand it out; where that fails and none is left, whoever waits learns why."""
        with self._lock:
            if self._closed:
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
            if not (self._coming or self._idle or self._running or self._swept):
                failed, self._waiting = list(self._waiting), deque()
        for waiter in failed:
            waiter.fail(failure)

    def _later(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            self._broom.submit(action, *arguments)
        except RuntimeError:
            action(*arguments)  # the pool is being closed, or the interpreter is on its way out
