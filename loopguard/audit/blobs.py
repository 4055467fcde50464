"""Payloads that lie apart from the log, and that can be erased without a break in it.

A record holds a commitment to a payload, and its size; the payload itself is a file beside the log, a **blob**. The
commitment is the SHA-256 of that file: a line that says what it is, 32 random bytes, the payload. So whoever has the
file can check it, and once it is gone nobody can find out by guessing what was in it.

Order: a blob is on disk before the record that names it, and `blob.erased` before a blob is deleted. What a crash
leaves in between is set right when the log is opened the next time, by whoever holds its lock.

Covered: content that was changed, and a blob that is gone although nobody says that it was erased. Not covered: copies
of a blob in a bundle, a backup or a snapshot of the file system, and what a disk keeps of a deleted file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.audit import read
from loopguard.audit.events import printable
from loopguard.errors import AuditTamperedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from loopguard.audit.events import Entry

FOLDER = "blobs"
MAGIC = b"loopguard-blob-v1\n"
SALT_BYTES = 32
MEMBERS = {"tool.decided": ("code", "stdin"), "tool.finished": ("stdout", "stderr")}
"""Which members of which records stand for a payload."""
AT_ONCE = 1000
"""How many commitments a record names at most."""

_COMMITMENT = re.compile(r"[0-9a-f]{64}")
_GONE = (FileNotFoundError, NotADirectoryError)
"""What the system says of a blob that is not there, also where something else stands in the place of its folder."""
_SIZES = range(2**53)
_HEAD_BYTES = len(MAGIC) + SALT_BYTES


@dataclass(frozen=True, slots=True)
class Named:
    """A payload as a record names it."""

    member: str
    commitment: str
    size: int


def named(entry: Entry) -> Iterator[Named]:
    """The payloads that a record names. What is written there and is no commitment is passed over."""
    for member in MEMBERS.get(entry.type, ()):
        told = entry.body.get(member)
        if told is not None and (found := _named(member, told)) is not None:
            yield found


def _named(member: str, told: Any) -> Named | None:
    if not isinstance(told, dict) or told.keys() != {"commitment", "bytes"}:
        return None
    commitment, size = told["commitment"], told["bytes"]
    if not isinstance(commitment, str) or not _COMMITMENT.fullmatch(commitment):
        return None
    if type(size) is not int or size not in _SIZES:
        return None
    return Named(member, commitment, size)


def is_commitment(text: str) -> bool:
    """Whether this is a commitment as records write it."""
    return _COMMITMENT.fullmatch(text) is not None


def path_of(stream_dir: Path, commitment: str) -> Path:
    """Where the blob of a commitment lies, or lay."""
    return stream_dir / FOLDER / commitment[:2] / commitment


def _opened(path: Path) -> BufferedReader | None:
    """A blob to read; None where something else than a file lies there. Raises OSError, also where nothing does."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return None  # a link could lead anywhere, and a pipe would never end
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    return BufferedReader(FileIO(descriptor))


class Reader:
    """What the payloads of one stream say, for people. Each is checked before it is shown."""

    def __init__(self, run_dir: Path, stream: str = read.CONTROLLER, *, handed_on: bool = False) -> None:
        """For text that is `handed_on`, a payload that is erased and still there is read no more.

        Who looks at a run is spared that: it takes a look at the whole log.
        """
        self._run_dir, self._stream, self._handed_on = run_dir, stream, handed_on
        self._dir = read.stream_dir(run_dir, stream)
        self._erased: set[str] | None = None

    def text(self, commitment: str, *, most: int) -> str:
        """So many characters of a payload, or in brackets why there are none. Not safe to print: strangers wrote it."""
        if self._handed_on and commitment in self._erasures():
            return "(erased)"
        try:
            file = _opened(path_of(self._dir, commitment))
        except _GONE:
            return "(erased)" if commitment in self._erasures() else "(gone, and not erased by any record)"
        except OSError as error:
            return f"(cannot be read: {error.strerror})"
        if file is None:
            return "(not a file)"
        with file:
            if hashlib.file_digest(file, "sha256").hexdigest() != commitment:
                return "(not what was recorded)"
            file.seek(_HEAD_BYTES)
            # A character has four bytes at most; one that is cut ends as an escape, which the cut below takes off.
            text = file.read(4 * most + 4).decode("utf-8", errors="backslashreplace")
        return text if len(text) <= most else f"{text[:most]}..."

    def _erasures(self) -> set[str]:
        if self._erased is None:
            self._erased = erasures(self._run_dir, self._stream)
        return self._erased


def erasures(run_dir: Path, stream: str) -> set[str]:
    """The payloads that a stream says are erased, as far as it was not altered."""
    erased: set[str] = set()
    with contextlib.suppress(AuditTamperedError):
        for entry in read.entries(run_dir, stream, types=("blob.erased",)):
            erased.update(erased_by(entry.body))
    return erased


@dataclass(frozen=True, slots=True)
class Chosen:
    """Payloads that somebody wants to have erased, by the stream whose records name them."""

    here: dict[str, list[str]]
    """Those that no record says are erased."""
    erased: list[str]
    """Those that are erased already."""

    @property
    def count(self) -> int:
        """How many there are, or were."""
        return len(self.erased) + sum(map(len, self.here.values()))


def choose(
    run_dir: Path, *, commitments: Sequence[str] = (), calls: Sequence[str] = (), cycle: int | None = None
) -> Chosen:
    """The payloads that are named themselves, by their calls, or by the cycle of these.

    Raises UsageError for a commitment that no record of the run names and for a call without payloads,
    AuditTamperedError at a record that was altered.
    """
    chosen, erased = Chosen({}, []), set[str]()
    by_name, by_call = set(commitments), set(calls)
    wanted, of_calls = set(by_name), set(by_call)
    for stream in read.streams(run_dir):
        found: list[str] = []
        for entry in read.entries(run_dir, stream, types=(*MEMBERS, "blob.erased")):
            if entry.type == "blob.erased":
                erased |= set(erased_by(entry.body))
                continue
            call = entry.body.get("call")
            for one in named(entry):
                if one.commitment in by_name or call in by_call or (cycle is not None and entry.cycle == cycle):
                    found.append(one.commitment)
                    wanted.discard(one.commitment)
                    of_calls.discard(str(call))
        if fresh := [one for one in found if one not in erased]:
            chosen.here[stream] = fresh
        chosen.erased.extend(one for one in found if one in erased)
    if wanted:
        raise UsageError(
            f"{run_dir}: no record names the payload {printable(min(wanted))}; `loopguard audit show` does"
        )
    if of_calls:
        raise UsageError(f"{run_dir}: no payload of a call {printable(min(of_calls))} lies apart from the log")
    return chosen


# -- writing -----------------------------------------------------------------------------------------------------------


def keep(stream_dir: Path, payloads: Sequence[bytes]) -> list[dict[str, Any]]:
    """Write payloads apart; gives what their records hold of them. They are on disk when it returns. Raises OSError."""
    made: list[Path] = []
    told: list[dict[str, Any]] = []
    try:
        for data in payloads:
            salt = secrets.token_bytes(SALT_BYTES)
            digest = hashlib.sha256(MAGIC + salt)
            digest.update(data)
            path = path_of(stream_dir, digest.hexdigest())
            _make_folders(stream_dir, path.parent)
            made.append(path)
            _write(path, (MAGIC, salt, data))
            told.append({"commitment": digest.hexdigest(), "bytes": len(data)})
        for folder in {path.parent for path in made}:
            _sync(folder)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return told


def _make_folders(stream_dir: Path, folder: Path) -> None:
    for path in (folder.parent, folder):
        if not path.is_dir():
            path.mkdir(exist_ok=True)
            _sync(path.parent if path != folder.parent else stream_dir)


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    # A name is the digest of its content, and no record names it yet: half a file is dropped at the next start.
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def delete(stream_dir: Path, commitments: Iterable[str]) -> None:
    """Delete blobs, and return when that is on disk. Those that are gone are fine.

    Raises OSError, once every other one is gone.
    """
    paths = [path_of(stream_dir, commitment) for commitment in commitments]
    trouble: OSError | None = None
    for path in paths:
        try:
            path.unlink()
        except _GONE:
            continue
        except OSError as error:
            trouble = trouble or error
    for folder in sorted({path.parent for path in paths}):
        if folder.is_dir():
            _sync(folder)
    if trouble is not None:
        raise trouble


class Shelf:
    """The blobs of one stream while its log is read at a start: which of them no record names, or should be gone.

    Memory grows with the blobs that are there and with those that were erased, not with the log. For the holder of the
    lock alone: beside a living writer a blob may be there before its record.
    """

    def __init__(self, stream_dir: Path) -> None:
        """Raises OSError."""
        self._dir = stream_dir
        self.unnamed = set(_there(stream_dir))
        """What is there and named by no record."""
        self.erased: set[str] = set()
        """What some record says is erased."""
        self.leftover: list[str] = []
        """What is there although some record says that it is erased: a process died, or the disk refused."""

    def feed(self, entry: Entry) -> None:
        """Take in the next record."""
        if entry.type in MEMBERS:
            for one in named(entry):
                self.unnamed.discard(one.commitment)
        elif entry.type == "blob.erased":
            commitments = set(erased_by(entry.body))
            self.erased |= commitments
            # Erasing and dropping is the same to whoever deletes; but this one is recorded already.
            self.leftover += [one for one in commitments if os.path.lexists(path_of(self._dir, one))]
            self.unnamed -= commitments


def erased_by(body: Mapping[str, Any]) -> list[str]:
    """The commitments in a `blob.erased` record."""
    told = body.get("commitments")
    return [one for one in told if isinstance(one, str) and is_commitment(one)] if isinstance(told, list) else []


def _there(stream_dir: Path) -> Iterator[str]:
    """The commitments of all blobs of a stream; what has another name is no blob."""
    home = stream_dir / FOLDER
    if not home.is_dir():
        return
    for folder in sorted(home.iterdir()):
        if folder.is_dir():
            names = (path.name for path in folder.iterdir() if path.is_symlink() or not path.is_dir())
            yield from (name for name in names if is_commitment(name) and name[:2] == folder.name)


def paths(stream_dir: Path) -> list[Path]:
    """The files of all blobs of a stream, in order of their names. Raises OSError."""
    return [path_of(stream_dir, name) for name in sorted(_there(stream_dir))]


# -- checking ----------------------------------------------------------------------------------------------------------

TAMPER, PROTOCOL, MISSING, WARN = 30, 40, 42, 10
"""As in `verify`, which this is a part of."""


class Check:
    """Whether every payload that a stream names is there, unchanged, or was erased by a record that says so.

    Fed record by record. Memory grows with the payloads that are gone, and no further.
    """

    def __init__(self, stream_dir: Path, *, left_out: bool = False) -> None:
        """With `left_out` the reader knows that the payloads did not come along; only erasures are counted then."""
        self._dir = stream_dir
        self._left_out = left_out
        self._gone: dict[str, str] = {}
        """Commitments without a blob, each with the record that names it, until a record says that it was erased."""
        self._named = 0
        self._erased = 0

    def feed(self, entry: Entry, place: str) -> Iterator[tuple[int, str]]:
        """What is wrong with the payloads of the next record: a code and a sentence. Raises OSError."""
        if entry.type == "blob.erased":
            yield from self._erase(entry, place)
        elif entry.type in MEMBERS:
            for member in MEMBERS[entry.type]:
                told = entry.body.get(member)
                if told is None:
                    continue
                one = _named(member, told)
                if one is None:
                    yield PROTOCOL, f"{place}: record {entry.seq}: what stands for its {member} is no commitment"
                else:
                    yield from self._look(one, entry, place)

    def _look(self, one: Named, entry: Entry, place: str) -> Iterator[tuple[int, str]]:
        self._named += 1
        if self._left_out:
            return
        path = path_of(self._dir, one.commitment)
        try:
            file = _opened(path)
        except _GONE:
            self._gone[one.commitment] = f"{place}: record {entry.seq}: what it names as {one.member}"
            return
        if file is None:
            yield TAMPER, f"{path}: is no file, and record {entry.seq} names it as {one.member}"
            return
        with file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size - _HEAD_BYTES
            file.seek(0)
            magic = file.read(len(MAGIC))
        if digest != one.commitment:
            yield TAMPER, f"{path}: is not what record {entry.seq} stands for as {one.member}"
        elif magic != MAGIC or size != one.size:
            yield (
                PROTOCOL,
                f"{path}: record {entry.seq} says that it is {one.size} bytes of {one.member}, and it is not",
            )

    def _erase(self, entry: Entry, place: str) -> Iterator[tuple[int, str]]:
        if not entry.body.get("by") or not entry.body.get("reason"):
            yield PROTOCOL, f"{place}: record {entry.seq}: payloads were erased without a name or a reason"
        for commitment in erased_by(entry.body):
            self._erased += 1
            self._gone.pop(commitment, None)
            path = path_of(self._dir, commitment)
            if os.path.lexists(path):
                yield (
                    WARN,
                    f"{path}: is there, and record {entry.seq} says that it was erased; the next start deletes it",
                )

    def finish(self) -> Iterator[tuple[int, str]]:
        """What is missing, once every record was read."""
        for commitment, where in self._gone.items():
            yield MISSING, f"{where} ({commitment}) is gone, and no record says that it was erased"

    def notes(self) -> list[str]:
        """What is worth knowing of the payloads."""
        told = []
        if self._erased:
            told.append(
                f"{self._erased:,} payloads were erased; what they were is gone, and that they were is recorded"
            )
        if self._left_out and self._named:
            told.append(f"{self._named:,} payloads were left out on purpose: nothing of them was checked")
        return told
