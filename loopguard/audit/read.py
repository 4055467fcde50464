"""Read an audit log: its segments, its lines, its records, its end.

Reading takes no lock and writes nothing, so it works beside a living writer and on a copied folder. It checks each
record's own hash where it hands one out; whether the records follow one another is the business of `verify`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from loopguard.audit import pruned
from loopguard.audit import segments as files
from loopguard.audit.events import FORMAT, LINE_START, MAX_LINE_BYTES, BadLineError, Head, decode
from loopguard.audit.events import Entry as Entry
from loopguard.errors import AuditError, AuditTamperedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

CONTROLLER = "controller"

segment_name, first_seq = files.name, files.first_seq

_TAIL_BLOCK_BYTES = 64 * 1024
_WRITER_GRACE_S = 0.02


class Line(NamedTuple):
    """One line of a segment, without its newline. Only the last line of a segment can be incomplete."""

    data: bytes
    complete: bool
    path: Path
    number: int
    offset: int

    @property
    def place(self) -> str:
        """Where a person finds it."""
        return f"{self.path}:{self.number}"


def stream_dir(run_dir: Path, stream: str = CONTROLLER) -> Path:
    """The folder of one stream of a run directory."""
    return Path(run_dir) / "audit" / stream


def streams(run_dir: Path) -> list[str]:
    """The names of all streams of a run directory that hold a segment, in order."""
    home = Path(run_dir) / "audit"
    if not home.is_dir():
        return []
    return sorted(path.name for path in home.iterdir() if path.is_dir() and segments(run_dir, path.name))


def no_file(run_dir: Path) -> Path | None:
    """What lies where a reader opens files and is neither one nor a folder; None where all is in order.

    A pipe, such as a stranger may have packed, would keep whoever opens it waiting for ever.
    """
    for pattern in ("*.json", "policy/*", "audit/*/*", "audit/*/checkpoints/*"):
        for path in Path(run_dir).glob(pattern):
            if path.exists() and not path.is_file() and not path.is_dir():
                return path
    return None


def segments(run_dir: Path, stream: str = CONTROLLER) -> list[Path]:
    """The segment files, oldest first; empty where there is no log.

    What was pruned is not among them, also where a crash left its files. A segment may be compressed by the time that
    somebody opens it: read it with `raw_lines`, which takes it in either form.
    """
    folder = stream_dir(run_dir, stream)
    return files.found(folder, behind=pruned.through(folder))


def pruned_front(run_dir: Path, stream: str = CONTROLLER) -> pruned.Pruned | None:
    """What stands beside the log for the records that were pruned; None where none were.

    Whether the log agrees is for `verify` to say. Raises AuditTamperedError where it cannot be read.
    """
    folder = stream_dir(run_dir, stream)
    try:
        with _readable(folder / pruned.FILE):
            return pruned.read(folder)
    except pruned.BadPrunedError as error:
        raise AuditTamperedError(f"{folder / pruned.FILE} {error}. `loopguard audit verify` says more") from error


def raw_lines(path: Path) -> Iterator[Line]:
    """Every line of one segment. A line beyond the size of any record ends the reading, as incomplete.

    Raises OSError, and DamagedSegmentError behind the lines before the damage.
    """
    with files.opened(path) as file:
        number = offset = 0
        while data := _whole_line(file):
            number += 1
            complete = data.endswith(b"\n")
            yield Line(data[:-1] if complete else data, complete, path, number, offset)
            offset += len(data)
            if not complete:
                return


def _whole_line(file: IO[bytes]) -> bytes:
    data = file.readline(MAX_LINE_BYTES)
    # A living writer may be between two pages of a write: look once more before calling a line cut.
    while data and not data.endswith(b"\n") and len(data) < MAX_LINE_BYTES:
        time.sleep(_WRITER_GRACE_S)
        more = file.readline(MAX_LINE_BYTES - len(data))
        if not more:
            break
        data += more
    return data


def looks_torn(data: bytes) -> bool:
    """Whether bytes without a newline can be what a crash left of one record, rather than an edited one."""
    kept = data.rstrip(b"\0")  # some file systems grow a file before its content arrives
    if not kept.startswith(LINE_START[: len(kept)]):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(kept.decode("latin-1"))
    except (ValueError, RecursionError):
        return True  # cut inside; a whole one that is nested so deeply was never written
    if end != len(kept):
        return False  # a whole record and then something that is not a newline
    return _is_record(kept)


def _is_record(data: bytes) -> bool:
    try:
        decode(data)
    except BadLineError:
        return False
    return True


def lines(run_dir: Path, stream: str = CONTROLLER) -> Iterator[Line]:
    """Every line of a log, across its segments; `UsageError` where there is no log."""
    paths = segments(run_dir, stream)
    if not paths:
        raise UsageError(f"{run_dir} holds no audit log ({stream_dir(run_dir, stream)} has no seg-*.jsonl)")
    for path in paths:
        with _readable(path):
            yield from raw_lines(path)


def entries(run_dir: Path, stream: str = CONTROLLER, *, types: Collection[str] | None = None) -> Iterator[Entry]:
    """Every record, or those of some types, oldest first.

    A last line that is still being written, or that a crash cut, is not a record. Raises UsageError where there is no
    log and AuditTamperedError at a record that was altered.
    """
    ends = None if types is None else _ends(types)
    for line in lines(run_dir, stream):
        if line.complete and (ends is None or line.data.endswith(ends)):
            yield _entry(line.data, line.place)


def _ends(types: Collection[str]) -> tuple[bytes, ...]:
    """How lines of these types end: keys are sorted, so that most lines need no parsing."""
    return tuple(f',"type":"{name}","v":{FORMAT}}}'.encode("ascii") for name in types)


def since(run_dir: Path, stream: str, head: Head, *, types: Collection[str]) -> list[Entry] | None:
    """The records of some types behind an earlier head, oldest first; None where the log does not have that head.

    Looks from the end, so that it costs as much as was written since, and not as much as the log holds.
    """
    behind: list[bytes] = []
    for path in reversed(segments(run_dir, stream)):
        with _readable(path):
            found, lines = _packed_since(path, head, types) if files.is_packed(path) else _since(path, head, types)
        behind = lines + behind
        if found:
            return [_entry(line, f"{path} (behind record {head.seq})") for line in behind]
    return None


def _since(path: Path, head: Head, types: Collection[str]) -> tuple[bool, list[bytes]]:
    """Whether a segment has this head, and its lines of some types, behind that one where it is there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return _packed_since(files.packed(path), head, types)  # it was compressed a moment ago
    with file:
        if os.fstat(file.fileno()).st_size == 0:
            return False, []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = _behind(data, head)
            whole = data.rfind(b"\n") + 1
            lines = data[start or 0 : whole].split(b"\n")
    return start is not None, [line for line in lines if line.endswith(_ends(types))]


def _packed_since(path: Path, head: Head, types: Collection[str]) -> tuple[bool, list[bytes]]:
    """The same of a compressed segment, which has to be read from its beginning."""
    found, ends = False, _ends(types)
    behind: list[bytes] = []
    member, stated = f',"seq":{head.seq},"ts":'.encode("ascii"), f',"hash":"{head.hash}",'.encode("ascii")
    with files.opened(path) as file:
        while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
            if member in line and stated in line and _is_head(line[:-1], head):
                found, behind = True, []
            elif line.endswith(ends, 0, -1):
                behind.append(line[:-1])
    return found, behind


def _is_head(line: bytes, head: Head) -> bool:
    try:
        entry = decode(line)
    except BadLineError:
        return False
    return Head(entry.seq, entry.hash) == head


def _behind(data: mmap.mmap, head: Head) -> int | None:
    """Where the lines behind a record begin; None where it is not here, or is another one."""
    member = f',"seq":{head.seq},"ts":'.encode("ascii")
    at = data.rfind(member)
    while at >= 0:
        start, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
        with contextlib.suppress(BadLineError):
            entry = decode(data[start:end])
            if entry.seq == head.seq:
                return end + 1 if entry.hash == head.hash else None
        at = data.rfind(member, 0, at)
    return None


def at(run_dir: Path, stream: str, seq: int) -> Entry | None:
    """The record with this number; None where the log has none."""
    path = next((path for path in reversed(segments(run_dir, stream)) if first_seq(path) <= seq), None)
    member = f',"seq":{seq},"ts":'.encode("ascii")
    if path is None:
        return None
    with _readable(path):
        for line in raw_lines(path):
            if line.complete and member in line.data and (entry := _entry(line.data, line.place)).seq == seq:
                return entry
    return None


def latches(run_dir: Path) -> list[Path]:
    """Where the latch of a run may lie: in its directory, and where the guard policy names a second place, there."""
    try:
        second = json.loads((run_dir / "run.json").read_bytes()).get("second_latch")
    except (OSError, ValueError, AttributeError, RecursionError):
        second = None  # whoever opens the run says what is wrong with it
    return [run_dir / "latch", *([Path(second)] if isinstance(second, str) else [])]


def latched(run_dir: Path) -> bool:
    """Whether a latch is set, in either place."""
    return any(latch.exists() for latch in latches(run_dir))


def owner(run_dir: Path, stream: str = CONTROLLER) -> int | None:
    """The living process that has the log open for writing; None where there is none."""
    try:
        descriptor = os.open(stream_dir(run_dir, stream) / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder(descriptor).pid
    finally:
        os.close(descriptor)
    return None


@dataclass(frozen=True, slots=True)
class Holder:
    """Who says that it holds a lock. Only the lock itself says whether that is still so."""

    pid: int
    since: str


def holder(descriptor: int) -> Holder:
    """What the owner wrote into its lock file."""
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(int(facts["pid"]), str(facts["since"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Holder(0, "a moment ago")  # it took the lock and has not written yet


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one sentence which file the file system refuses."""
    try:
        yield
    except OSError as error:
        raise AuditError(f"{path} cannot be read: {error.strerror or error}") from error


def _entry(data: bytes, place: str) -> Entry:
    try:
        return decode(data)
    except BadLineError as error:
        raise AuditTamperedError(f"{place}: the record {error}. `loopguard audit verify` says more") from error


def last(run_dir: Path, stream: str = CONTROLLER) -> Entry | None:
    """The newest record, read from the end of the newest segment; None where nothing was recorded yet."""
    for path in reversed(segments(run_dir, stream)):
        with _readable(path):
            data = _last_line(path)
        if data is not None:
            return _entry(data, f"{path} (last line)")
    return None


def _last_line(path: Path) -> bytes | None:
    if files.is_packed(path):
        return _last_packed_line(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return _last_packed_line(files.packed(path))  # it was compressed a moment ago
    with file:
        position = file.seek(0, 2)
        tail = b""
        while position > 0 and len(tail) <= 2 * MAX_LINE_BYTES:
            step = min(_TAIL_BLOCK_BYTES, position)
            position = file.seek(position - step)
            tail = file.read(step) + tail
            end = tail.rfind(b"\n")
            start = tail.rfind(b"\n", 0, end) if end > 0 else -1
            if start >= 0 or (end > 0 and position == 0):
                return tail[start + 1 : end]
    return None


def _last_packed_line(path: Path) -> bytes | None:
    last = None
    for line in raw_lines(path):
        last = line.data if line.complete else last
    return last
