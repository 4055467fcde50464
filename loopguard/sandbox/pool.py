"""A few cells, kept clean and warm, and a fair queue in front of them.

The pool knows nothing of containers: it is given a way to make a cell. A caller gets a clean cell, waits for the
outcome and goes; cleaning and replacing happen behind its back. A cell that leaves a doubt is destroyed, not reused.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from loopguard.errors import SandboxError, SandboxUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.types import Outcome, ToolCall


class Cell(Protocol):
    """One container with its supervisor, as the pool sees it."""

    calls: int

    def call(self, call: ToolCall) -> Outcome:
        """Run a call. Raises SandboxError where the cell can do no more."""
        ...

    def settle(self) -> str:
        """Wait until the cell is clean; the reason where it cannot be used again, else the empty string."""
        ...

    def kill(self) -> None:
        """End what runs in it, from any thread."""
        ...

    def destroy(self, reason: str) -> None:
        """Take it down for good."""
        ...


class _Waiter:
    def __init__(self) -> None:
        self.ready = threading.Event()
        self.cell: Cell | None = None
        self.error: SandboxError | None = None


class Pool:
    """Hands out clean cells first come, first served. Thread-safe; lives until `close`."""

    def __init__(self, make: Callable[[], Cell], *, size: int, calls_per_cell: int, wait_s: float) -> None:
        self._make = make
        self._size = size
        self._calls_per_cell = calls_per_cell
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._idle: deque[Cell] = deque()
        self._busy: set[Cell] = set()
        self._waiting: deque[_Waiter] = deque()
        self._coming = 0
        self._closed = False
        self._broom = ThreadPoolExecutor(max_workers=size + 1, thread_name_prefix="loopguard-broom")

    def start(self) -> None:
        """Make all cells and wait for them. Raises what the first of them failed with."""
        with self._lock:
            self._coming += self._size
        for future in [self._broom.submit(self._replace) for _ in range(self._size)]:
            if (error := future.result()) is not None:
                raise error

    def run(self, call: ToolCall) -> Outcome:
        """Run a call in the next clean cell."""
        cell = self._take()
        try:
            outcome = cell.call(call)
        except SandboxError:
            self._later(self._discard, cell, "lost")
            raise
        except BaseException:
            # Ctrl-C in the middle of a call: nobody knows what the cell is doing.
            self._later(self._discard, cell, "abandoned")
            raise
        self._later(self._settle, cell)
        return outcome

    def kill_running(self) -> int:
        """Kill every cell in which a call runs now."""
        with self._lock:
            busy = list(self._busy)
        for cell in busy:
            cell.kill()
        return len(busy)

    def close(self) -> None:
        """Refuse new calls, destroy every cell, wait for the broom."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            idle, self._idle = self._idle, deque()
        for waiter in waiting:
            waiter.error = SandboxUnavailableError("the sandbox was closed")
            waiter.ready.set()
        self.kill_running()
        list(self._broom.map(lambda cell: cell.destroy("closed"), idle))
        self._broom.shutdown(wait=True)
        with self._lock:
            late = [*self._idle, *self._busy]
        for cell in late:
            cell.destroy("closed")

    def _take(self) -> Cell:
        waiter = _Waiter()
        with self._lock:
            if self._closed:
                raise SandboxUnavailableError("the sandbox is closed")
            if self._idle:
                cell = self._idle.popleft()
                self._busy.add(cell)
                return cell
            self._waiting.append(waiter)
            # After an engine was away nothing may be on its way any more; a new caller is a reason to try again.
            missing = self._size - self._coming - len(self._busy)
            self._coming += max(missing, 0)
        for _ in range(missing):
            self._broom.submit(self._replace)
        if not waiter.ready.wait(self._wait_s):
            with self._lock:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
            if waiter.cell is None and waiter.error is None:
                raise SandboxUnavailableError(
                    f"no cell became free within {self._wait_s:.0f} s: give the profile more cells or send fewer calls"
                )
        if waiter.error is not None:
            raise waiter.error
        assert waiter.cell is not None
        return waiter.cell

    def _give(self, cell: Cell) -> bool:
        """Hand a clean cell to whoever waits longest; False where the pool is closed."""
        with self._lock:
            self._busy.discard(cell)
            if self._closed:
                return False
            if self._waiting:
                waiter = self._waiting.popleft()
                waiter.cell = cell
                self._busy.add(cell)
                waiter.ready.set()
            else:
                self._idle.append(cell)
            return True

    def _settle(self, cell: Cell) -> None:
        doubt = "recycled" if cell.calls >= self._calls_per_cell else cell.settle()
        if doubt:
            self._discard(cell, doubt)
        elif not self._give(cell):
            cell.destroy("closed")

    def _discard(self, cell: Cell, reason: str) -> None:
        with self._lock:
            self._busy.discard(cell)
            again = not self._closed
            self._coming += again
        cell.destroy(reason)
        if again:
            self._replace()

    def _replace(self) -> SandboxError | None:
        """Make a cell and hand it out; where that fails, whoever waits learns why."""
        try:
            cell = self._make()
        except SandboxError as error:
            with self._lock:
                self._coming -= 1
                waiting = self._waiting if not self._coming and not self._busy and not self._idle else deque()
                failed = list(waiting)
                waiting.clear()
            for waiter in failed:
                waiter.error = error
                waiter.ready.set()
            return error
        with self._lock:
            self._coming -= 1
        if not self._give(cell):
            cell.destroy("closed")
        return None

    def _later(self, action: Callable[..., None], *arguments: object) -> None:
        try:
            self._broom.submit(action, *arguments)
        except RuntimeError:
            action(*arguments)  # the pool is being closed
