"""Slots to disk, off the thread that trains."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loopguard.snapshots.ring import Slot
    from loopguard.snapshots.store import SnapshotStore


_NICER = 10
"""How much nicer than the training the writer is. On a busy machine that takes half of what writing costs an update."""


class Written:
    """A snapshot on its way to disk."""

    def __init__(self, future: Future[str]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        """Whether it has come to its end, a good one or a bad one."""
        return self._future.done()

    def wait(self) -> str:
        """Wait for it and give the digest. Raises what writing raised, DiskError above all, or what `done` raised."""
        return self._future.result()


class Writer:
    """One thread that writes slots to a store, in the order they were handed over.

    A writer lives as long as its run. A process that ends in an orderly way waits for what was submitted; one that is
    killed leaves the previous snapshots and the pointer as they were.

        written = writer.submit(slot, {"update": 120}, lambda digest: store.promote(...))
        ...                 # training goes on; the slot keeps its memory meanwhile
        written.wait()
    """

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "loopguard-snapshots", _stand_back)
        self._trouble: Exception | None = None

    def submit(self, slot: Slot, facts: Mapping[str, Any], done: Callable[[str], object] | None = None) -> Written:
        """Write a slot. `done` gets the digest, in the writer's thread, once the snapshot is durable.

        Raises SnapshotError for a stale slot, RuntimeError after `close`.
        """
        slot.hold()
        try:
            return Written(self._thread.submit(self._write, slot, dict(facts), done))
        except RuntimeError:
            slot.release()
            raise

    @property
    def trouble(self) -> Exception | None:
        """What went wrong in the thread, the first of it, once: asking takes it away. Usually a DiskError."""
        trouble, self._trouble = self._trouble, None
        return trouble

    def close(self) -> None:
        """Wait for everything that was submitted and end the thread. May be called twice."""
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, slot: Slot, facts: dict[str, Any], done: Callable[[str], object] | None) -> str:
        try:
            try:
                digest = self._store.write(slot, facts)
            finally:
                slot.release()
            if done is not None:
                done(digest)
        except Exception as error:
            self._trouble = self._trouble or error
            raise
        return digest


def _stand_back() -> None:
    """Let the thread that trains go first, where a thread has a priority of its own."""
    if sys.platform == "linux":
        own = threading.get_native_id()
        with suppress(OSError):  # a jail may forbid it; then the writer is as quick as everyone else
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _NICER)
