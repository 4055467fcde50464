"""A signal that freezes: `kill -USR2 PID` stops a run from any terminal, also one without LoopGuard."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from loopguard.state import signalled

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType
    from typing import Any

_runs: dict[int, WeakKeyDictionary[Any, Path]] = {}
"""The run directories of this process that a signal freezes, each as long as its guard lives."""


def freeze_on(name: str, guard: Any, run_dir: Path) -> None:
    """From now on the signal latches this run; the next gate acts on it.

    Does nothing outside of the main thread, where Python takes no handlers, and nothing where the program or its
    surroundings handle the signal themselves: what somebody else put there stays.
    """
    if name == "none" or threading.current_thread() is not threading.main_thread():
        return
    number = signal.Signals[f"SIG{name}"]
    if signal.getsignal(number) is signal.SIG_DFL:
        signal.signal(number, _latch)
        _runs[number] = WeakKeyDictionary()
    if signal.getsignal(number) is _latch:
        _runs[number][guard] = run_dir


def stop_listening(guard: Any) -> None:
    """A run is closed. With the last one the signal does again what it did before."""
    for number, runs in _runs.items():
        runs.pop(guard, None)
        main = threading.current_thread() is threading.main_thread()
        if not runs and main and signal.getsignal(number) is _latch:
            signal.signal(number, signal.SIG_DFL)


def _latch(number: int, _frame: FrameType | None) -> None:
    """Only what is safe at any point of the program: a latch takes no lock of ours."""
    for guard, run_dir in list(_runs[number].items()):
        # A worker that was forked owns no run. Where a latch cannot be written, the DiskError stops the program.
        if guard._pid == os.getpid():
            signalled(run_dir, signal.Signals(number).name)
