"""The newest records of a log, and those that come after them.

Reads beside a living writer, takes no lock, and checks of each record only its own hash: whether the log can be
believed is for `verify` to say.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from loopguard.audit import read
from loopguard.audit import segments as files
from loopguard.audit.events import MAX_LINE_BYTES, BadLineError, Entry, decode
from loopguard.errors import AuditError, AuditTamperedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POLL_S = 0.5


class Tail:
    """Where a reader stands in the log of a run. Lives as long as somebody watches.

    `newest` gives the last records, `follow` those that are written afterwards, none of them twice.
    """

    def __init__(self, run_dir: Path) -> None:
        """Raises UsageError where there is no log."""
        if not read.segments(run_dir):
            raise UsageError(f"{run_dir} holds no audit log ({read.stream_dir(run_dir)} has no seg-*.jsonl)")
        self._dir = run_dir
        self._path = read.segments(run_dir)[0]
        self._offset = 0

    def newest(self, count: int) -> list[Entry]:
        """The last so many records, oldest first. Reads no more segments than it takes.

        Raises AuditTamperedError at a record that was altered.
        """
        paths = read.segments(self._dir)
        found: deque[Entry] = deque(maxlen=count)
        for path in paths[self._start(paths, count) :]:
            found.extend(self._behind(path, 0))
        return list(found)

    def _start(self, paths: list[Path], count: int) -> int:
        """The segment that the last so many records begin in: its name says the number of its first one."""
        newest = read.last(self._dir)
        first = (newest.seq if newest else 0) - count + 1
        return max((at for at, path in enumerate(paths) if read.first_seq(path) <= first), default=0)

    def follow(self, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[Entry]:
        """Every record that is written from now on, for as long as somebody asks.

        Raises AuditTamperedError at a record that was altered.
        """
        while True:
            for path in read.segments(self._dir):
                # By number, since the segment at hand may have been compressed meanwhile.
                ahead = read.first_seq(path) - read.first_seq(self._path)
                if ahead >= 0:
                    yield from self._behind(path, 0 if ahead else self._offset)
            sleep(POLL_S)

    def _behind(self, path: Path, offset: int) -> Iterator[Entry]:
        """The records of a segment from a byte on. A line that is still being written is left for the next look."""
        self._path, self._offset = path, offset
        try:
            with files.opened(path, offset=offset) as file:
                while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                    entry = _record(line[:-1], f"{path} at byte {self._offset}")
                    self._offset += len(line)
                    yield entry
        except OSError as error:
            raise AuditError(f"{path} cannot be read: {error.strerror or error}") from error
        if len(line) == MAX_LINE_BYTES:
            raise AuditTamperedError(f"{path} at byte {self._offset}: the line is longer than any record")


def _record(line: bytes, place: str) -> Entry:
    try:
        return decode(line)
    except BadLineError as error:
        raise AuditTamperedError(f"{place}: the record {error}. `loopguard audit verify` says more") from error
