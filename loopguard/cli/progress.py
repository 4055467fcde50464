"""What a running loop shows: a bar on a terminal, plain lines elsewhere. All of it on standard error."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Shown(Protocol):
    """A progress that can be stopped, and a stream whose lines do not tear it."""

    stream: TextIO

    def phase(self, name: str, *, total: int | None = None) -> None:
        """Another piece of work begins."""
        ...

    def advance(self, steps: int = 1) -> None:
        """The piece of work came further."""
        ...

    def say(self, line: str) -> None:
        """One line for people."""
        ...

    def stop(self) -> None:
        """Nothing more will be shown; may be called twice."""
        ...


class Lines:
    """Plain lines: what is said, and nothing that moves."""

    def __init__(self) -> None:
        self.stream: TextIO = sys.stderr
        self._started = time.monotonic()

    def phase(self, name: str, *, total: int | None = None) -> None:
        """Phases are many and short; a log file does not want them."""

    def advance(self, steps: int = 1) -> None:
        """Nothing moves."""

    def say(self, line: str) -> None:
        """The line, with the seconds since the start."""
        print(f"[{time.monotonic() - self._started:6.1f} s] {line}", file=self.stream, flush=True)

    def stop(self) -> None:
        """Nothing to take down."""


class Bar:
    """A bar for the phase at hand; what is said scrolls above it."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
        )
        self._progress.start()
        # While the bar is up, rich replaces standard error by one that prints above it.
        self.stream = cast(TextIO, sys.stderr)
        self._task: TaskID | None = None

    def phase(self, name: str, *, total: int | None = None) -> None:
        """The bar starts again under another name."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total)

    def advance(self, steps: int = 1) -> None:
        """The bar grows."""
        if self._task is not None:
            self._progress.advance(self._task, steps)

    def say(self, line: str) -> None:
        """The line, above the bar. Square brackets are text and not markup."""
        self._progress.console.print(line, markup=False)

    def stop(self) -> None:
        """The bar goes."""
        self._progress.stop()
