"""Compress the closed segments of a log, beside the writer and never in its way.

A segment is read, compressed into a partial file, synced, unpacked once more and compared; only then does the file get
its name and the raw one go. So a crash at any moment leaves the raw segment, the compressed one, or both. A disk that
fails here costs nothing: the raw segment stays, the reason is kept for the log, and the loop goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import zlib
from collections import deque
from typing import TYPE_CHECKING

from loopguard.audit import segments
from loopguard.audit.segments import DamagedSegmentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

CLOSE_S = 10.0
"""How long the end of a log waits for segments that are not compressed yet. The next start goes on with them."""

_BLOCK_BYTES = 256 * 1024
_LEVEL = 6
_MOST_TOLD = 1000
"""Names of segments in one record; more would not fit into it."""


class Compressor:
    """Compresses the closed segments of one stream, one after the other, in a thread of its own.

    One lives as long as the log is open, and no longer: two of them at one segment could lose it. The thread is there
    only while there is something to do; where the process ends without closing the log, the next one begins the segment
    anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Path] = deque()
        self._thread: threading.Thread | None = None
        self._until: float | None = None
        """By when it has to be done, once the log is being closed."""
        self._left: list[str] = []
        self._reason = ""

    def take(self, paths: list[Path]) -> None:
        """Compress these closed segments, when their turn comes. Returns at once."""
        with self._lock:
            self._waiting.extend(paths)
            if self._waiting and self._thread is None and self._until is None:
                thread = threading.Thread(target=self._work, name="loopguard-compress", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # at the limit of threads, or while the interpreter ends
                    self._leave(self._waiting, str(error))
                    self._waiting.clear()
                else:
                    self._thread = thread

    def wait(self) -> None:
        """Return once nothing is left to do."""
        thread = self._thread
        while thread is not None:
            thread.join()
            thread, ended = self._thread, thread
            if thread is ended:
                return  # something that nobody foresaw ended it, and was printed

    def left_raw(self) -> tuple[list[str], str]:
        """Segments that could not be compressed and that nobody was told of yet, and why one of them could not."""
        with self._lock:
            told, self._left = self._left[:_MOST_TOLD], self._left[_MOST_TOLD:]
            reason, self._reason = self._reason, self._reason if self._left else ""
            return told, reason

    def close(self, *, within_s: float) -> None:
        """Wait for what is left to do, for some seconds; then stop, and leave the rest as it is."""
        self._until = time.monotonic() + within_s
        try:
            self.wait()
        except BaseException:  # a Ctrl-C: whoever is in a hurry does not wait, and what runs still has to end
            self._until = time.monotonic()
            self.wait()
            raise

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._late():
                    self._thread = None
                    return
                path = self._waiting.popleft()
            try:
                compress(path, stop=self._late)
            except (OSError, DamagedSegmentError) as error:
                with self._lock:
                    self._leave([path], str(getattr(error, "strerror", None) or error))

    def _leave(self, paths: Iterable[Path], reason: str) -> None:
        self._left += [path.name for path in paths]
        self._reason = self._reason or reason

    def _late(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until


def compress(path: Path, *, stop: Callable[[], bool] = lambda: False) -> bool:
    """Put the compressed form of a closed segment in its place; says whether it did.

    It does not where it was stopped, where the segment is too large, or where that is done already. The same segment
    gives the same bytes (with the same zlib). Raises OSError and DamagedSegmentError, which leave the raw one in place.
    """
    if not path.exists():
        return False
    packed = segments.packed(path)
    partial = path.with_name(f".{packed.name}")
    try:
        digest = _pack(path, partial, stop)
        if digest is None:
            return False
        if _digest(partial) != digest:
            raise DamagedSegmentError(partial, "does not hold what was put in")
        partial.replace(packed)
    finally:
        # Half of one is of no use to anybody. Where it cannot be removed, the next start does it.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    path.unlink()
    sync_folder(path.parent)
    return True


def clear(folder: Path) -> None:
    """Remove what a crash left of a segment that was being compressed. Raises OSError."""
    for partial in folder.glob(f".seg-*{segments.PACKED}"):
        partial.unlink(missing_ok=True)


def _pack(path: Path, partial: Path, stop: Callable[[], bool]) -> bytes | None:
    """Write the compressed form, on disk after this; the digest of what was read, None where it was stopped."""
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, segments.GZIP_WBITS)  # says neither a name nor a time
    digest = hashlib.sha256()
    # A descriptor and no buffered file: a fork must not write, at its end, what this thread had not written yet.
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > segments.MAX_PACKED_CONTENT_BYTES:
                return None
            while block := file.read(_BLOCK_BYTES):
                if stop():
                    return None
                digest.update(block)
                _write(fd, deflate.compress(block))
        _write(fd, deflate.flush())
        os.fsync(fd)
    finally:
        os.close(fd)
    return digest.digest()


def _digest(packed: Path) -> bytes:
    digest = hashlib.sha256()
    with segments.opened(packed) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_folder(folder: Path) -> None:
    """Make names in a folder last. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
