"""Who a container belongs to, written so that another process can tell whether the owner still lives."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

_UNKNOWN = "alive"
"""For a process that is there but whose start time cannot be seen."""


def me() -> str:
    """The process that asks: machine, boot, pid namespace, pid, start time."""
    return f"{_place()}:{os.getpid()}:{_started(os.getpid())}"


def is_dead(owner: str) -> bool:
    """Whether that owner is surely gone. Of another machine or pid namespace nobody here can say so."""
    place, _, rest = owner.partition(":")
    pid, _, started = rest.partition(":")
    if place != _place() or not (pid.isascii() and pid.isdigit()) or not started:
        return False
    return _started(int(pid)) not in {started, _UNKNOWN}


def _place() -> str:
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _started(pid: int) -> str:
    """When a process was started, in the kernel's own ticks; empty where there is no such process."""
    try:
        # The name in the second field may hold blanks and brackets; the start time is the 22nd field.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass  # no /proc here, or one that hides the processes of others
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except OSError:
        pass  # it is there, and not ours
    return _UNKNOWN
