"""Every call by which a process changes a run directory, counted; at one of them the process ends by SIGKILL.

An edge is one call: open to create, write, sync, rename, link, unlink, mkdir, rmdir, truncate, flock. Its kind says
what is done to which file, with numbers taken out, such as `fdatasync run/audit/controller/seg-#.jsonl`.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import re
import signal
import stat
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

from killed_disk import Disk

KILLS = ("before", "after", "torn", "cut", "cut by chance")
"""Before or after the call; in the middle, which leaves the beginning of what was written; and what a power cut leaves
of everything that was not synced, right before or after it."""


@dataclass(frozen=True)
class Fate:
    """Where a life ends: at the `nth` edge of a kind, or of all where `kind` is None."""

    kind: str | None
    nth: int
    how: str
    chance: int


class Edges:
    """Patches this process. Lives until the process does."""

    def __init__(self, root, *, fate, ended, keep):
        self.root = str(root)
        self.met = []
        self._fate, self._ended = fate, ended
        self._chance = Random(fate.chance) if fate else None
        self._times = Counter()
        self._lock = threading.RLock()
        self.disk = Disk(root, keep)

    def watch(self):
        """From now on."""
        for name in ("mkdir", "rmdir", "unlink"):
            self._patch(os, name, lambda path, *_, dir_fd=None, **__: self._path(path, dir_fd))
        for name in ("rename", "replace", "link"):
            self._patch(os, name, lambda _, target, **__: self._path(target))
        for name in ("write", "pwrite", "ftruncate", "fsync", "fdatasync"):
            self._patch(os, name, lambda fd, *_: self._of(fd))
        self._patch(fcntl, "flock", lambda fd, *_: self._of(fd))
        self._patch(os, "open", lambda path, flags, *_, **__: self._path(path) if flags & os.O_CREAT else None)
        self._patch(io, "open", lambda path, mode="r", *_, **__: self._path(path) if set(mode) & set("wxa+") else None)
        builtins.open = io.open

    def _patch(self, module, name, where):
        real = getattr(module, name)

        def act(*args, **options):
            path = where(*args, **options)
            if path is None or not f"{path}/".startswith(f"{self.root}/"):
                return real(*args, **options)
            with self._lock:
                return self._edge(f"{name} {kind(path[len(self.root) + 1 :]) or '.'}", real, args, options)

        setattr(module, name, act)

    def _edge(self, name, real, args, options):
        sync = real.__name__ in ("fsync", "fdatasync")
        self._times[name] += 1
        self.met.append(name)
        due = self._due(name)
        if due and self._first():
            self._die(name)
        if due and self._fate.how == "torn" and (real.__name__ == "write" or sync):
            self._tear(real, args)
            self._die(name)
        try:
            # What is killed leaves all that it wrote to the kernel: to wait for a disk would show nothing.
            done = self._synced(args[0]) if sync else real(*args, **options)
        finally:
            if due:
                self._die(name)
        return done

    def _due(self, name):
        fate = self._fate
        if fate is None:
            return False
        return self._times[name] == fate.nth if fate.kind == name else fate.kind is None and len(self.met) == fate.nth

    def _first(self):
        """Whether the end comes before the call."""
        how = self._fate.how
        return how == "before" or (how.startswith("cut") and self._chance.random() < 0.5)

    def _synced(self, fd):
        os.fstat(fd)  # raises for one that is closed, as a sync does
        self.disk.sync(fd)

    def _tear(self, real, args):
        fd = args[0]
        if real.__name__ == "write":
            data = bytes(args[1])
            real(fd, data[: self._chance.randint(1, max(1, len(data) - 1))])
            return
        found = os.fstat(fd)
        synced = self.disk._sizes.get(found.st_ino, 0)
        if found.st_size > synced and stat.S_ISREG(found.st_mode):
            os.truncate(f"/proc/self/fd/{fd}", self._chance.randint(synced, found.st_size))

    def _die(self, name):
        if self._fate.how.startswith("cut"):
            by_chance = self._chance if self._fate.how == "cut by chance" else None
            self.disk.lose(f"{self.root}.after", chance=by_chance)
        self._ended(name)
        os.kill(os.getpid(), signal.SIGKILL)

    def _path(self, path, dir_fd=None):
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        return f"{self._of(dir_fd)}/{text}" if dir_fd is not None else str(Path(text).absolute())

    def _of(self, fd):
        return str(Path(f"/proc/self/fd/{fd}").readlink()).removesuffix(" (deleted)")


def kind(path):
    """A path with its numbers and digests taken out."""
    return re.sub(r"[0-9a-f]{8,}(-[0-9a-f]+)*|\d+", "#", path)
