"""Write the audit log: one writer, one lock, one chain; a record is on disk before the action that it allows.

Covered: crashes (a cut last line is set aside and named, never silently dropped), forks, threads (many callers share
one sync), short writes, and a disk that is full or fails: the first error ends this log for good, because a second sync
after a failed one may report success for data that is gone. One more record then fits into space kept free for it.

Not covered: a machine that lies about syncing, and whoever may write to the folder. `verify` and an anchor kept
elsewhere are for that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import random
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import loopguard
from loopguard.audit import anchors as places
from loopguard.audit import blobs, keys, notes, prune, pruned, read, verify
from loopguard.audit import compress as packing
from loopguard.audit.events import (
    ABOUT_ANCHORS,
    FORMAT,
    GENESIS,
    LOOP,
    MAX_BODY_KIB,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    Entry,
    Head,
    canonical,
    check_type,
    depth,
    encode,
    plain,
)
from loopguard.audit.fields import recorded, shown_actor
from loopguard.audit.segments import DamagedSegmentError, is_packed
from loopguard.errors import AuditError, AuditTamperedError, AuditWriteError, LoopGuardError, RunBusyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from loopguard.audit.tree import Tree

SEGMENT_BYTES = 64 * 1024 * 1024
RESERVE = "reserve.bin"
CHECKPOINT_EVERY = 1000
"""Records between two checkpoints, where nothing else asks for one."""

_MOST_LEAVES = 1000
"""Hashes that are kept for the tree, where no checkpoint needs it before."""
_LOCK_TRIES = 10
_LOCK_PAUSE_S = 0.03
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BITS_48 = 2**48 - 1
_in_order = itemgetter(*Entry._fields)
_AT_ONCE = frozenset({"freeze.entered", "run.finished"})
"""Records that are summed up in a checkpoint right away."""
_SUMMING = ABOUT_ANCHORS | {"streams.committed"}
"""Records that belong to a checkpoint, and that alone are no reason for another one."""


class Clock(Protocol):
    """Where a log takes its times from."""

    def now(self) -> datetime:
        """The time of day, with its zone."""
        ...

    def monotonic_ns(self) -> int:
        """A count of nanoseconds that never runs backward."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        """The time of day in UTC."""
        return datetime.now(UTC)

    def monotonic_ns(self) -> int:
        """Nanoseconds since some point before the process began."""
        return time.monotonic_ns()


system_clock = SystemClock()


@dataclass(slots=True)
class _Segment:
    """The file that is written to, and how much of it holds whole records."""

    path: Path
    fd: int
    size: int


@dataclass(frozen=True, slots=True)
class _Durable:
    """The last state of which a sync said that it is on disk."""

    head: Head
    size: int


class AuditLog:
    """The open log of one stream of a run directory. Lives as long as the process that owns the run.

    Thread-safe. `append` returns once the record is durable (`sync=False`: once it is written; a later `sync` covers
    it). After the first write or sync error every call raises AuditWriteError, except one `append_last`.

    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> with AuditLog.open(Path(mkdtemp()) / "runs" / "a", run_id="a", policy="") as log:
    ...     entry = log.append("note.added", {"by": "dana", "text": "first look"})
    >>> entry.seq, log.head.seq
    (2, 2)
    """

    @classmethod
    def open(
        cls,
        run_dir: Path,
        *,
        stream: str = read.CONTROLLER,
        run_id: str,
        policy: str,
        clock: Clock = system_clock,
        mirror: Callable[[Entry], None] | None = None,
        reserve_mib: int = 4,
        verify: bool = True,
        segment_bytes: int = SEGMENT_BYTES,
        compress: bool = False,
        checkpoint_every: int = CHECKPOINT_EVERY,
        anchors: Sequence[places.Anchor] = (),
        on_lost_anchor: Callable[[str], None] | None = None,
    ) -> AuditLog:
        """Take the lock, check what is there, set a cut last line aside, and record `log.opened`.

        Raises RunBusyError where another process has the log, AuditTamperedError where it does not verify (with
        `verify=False` it goes on behind the last whole record, so that a freeze can still be written), AuditWriteError
        where the disk does not take it, UsageError for a log key that cannot be used and for an anchor in the run
        directory. `mirror` sees each record after it was written; it must not raise.

        A checkpoint is written every so many records, at a freeze, at the end of the run and when the log is closed,
        signed with the log key of this user where there is one, and kept at each of the `anchors`. Where a required one
        fails, `on_lost_anchor` gets the reason and has to stop the run; without it the log takes no more records.

        With `compress`, closed segments are compressed in a thread beside, and `close` waits some seconds for it.
        """
        places.refuse_inside(run_dir, anchors)
        key = keys.log_key(run_dir)
        with _disk(f"open the audit log of {run_dir}"):
            folder = _make_folder(read.stream_dir(run_dir, stream))
            lock = _take_lock(folder / "lock", run_dir, clock)
        try:
            return cls(
                folder,
                run_dir=Path(run_dir),
                lock=lock,
                log=f"{run_id}/{stream}",
                policy=policy,
                clock=clock,
                mirror=mirror,
                reserve_mib=reserve_mib,
                strict=verify,
                segment_bytes=segment_bytes,
                compress=compress,
                key=key,
                checkpoint_every=checkpoint_every,
                anchors=anchors,
                on_lost_anchor=on_lost_anchor,
            )
        except BaseException:
            os.close(lock)
            raise

    def __init__(
        self,
        folder: Path,
        *,
        run_dir: Path,
        lock: int,
        log: str,
        policy: str,
        clock: Clock,
        mirror: Callable[[Entry], None] | None,
        reserve_mib: int,
        strict: bool,
        segment_bytes: int,
        compress: bool,
        key: keys.SigningKey | None,
        checkpoint_every: int,
        anchors: Sequence[places.Anchor],
        on_lost_anchor: Callable[[str], None] | None,
    ) -> None:
        self.log = log
        self.policy = policy
        """Digest of the guard policy in force; stands in every record."""
        self._folder = folder
        self._run_dir = run_dir
        self._clock = clock
        self._mirror = mirror
        self._segment_bytes = segment_bytes
        self._lock_fd = lock
        self._boot = _boot()
        self._write_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._trouble: str | None = None
        self._last_used = False
        self._pending: tuple[Head, int] | None = None
        self._key = key
        self._every = checkpoint_every
        self._anchors = tuple(anchors)
        self._on_lost_anchor = on_lost_anchor
        self._checkpoint_lock = threading.Lock()
        self._compressor = packing.Compressor() if compress else None
        with _disk(f"read the audit log of {run_dir}"):
            found = _scan(run_dir, folder.name, log, strict=strict)
        self._head = found.head
        self._tree: tuple[Tree, list[str]] | None = (found.tree, []) if found.tree is not None else None
        """Over the first records, and the hashes of those behind it, since many at once cost less. None behind a break
        in the chain: no checkpoint could stand for what is there."""
        self._epoch = found.epoch
        self._summed = found.summed
        """How many records the last checkpoint stands for."""
        self._told = 0
        """The last record that is not about a checkpoint."""
        self._erased = found.erased
        """Payloads that some record says are erased."""
        with _disk(f"write the audit log of {run_dir}"):
            _set_aside(folder, found)
            if strict:
                prune.finish(folder, found.front)
            packing.clear(folder)
            _make_reserve(folder / RESERVE, reserve_mib)
            self._segment = _open_segment(_go_on_in(folder, found))
        self._durable = _Durable(self._head, self._segment.size)
        self._chance = random.Random()
        """Of this log alone: nobody's seed decides what it gives, and it changes nobody's random numbers."""
        self._second = (0, "1970-01-01T00:00:00")
        """The second of the last record, as a number and as text."""
        try:
            for name, data in _unrecorded(folder, found.recovered):
                body = {"torn_bytes": len(data), "digest": hashlib.sha256(data).hexdigest(), "file": name}
                self.append("log.recovered", body)
            self._drop_unnamed(found.unnamed)
            opened = {"pid": os.getpid(), "versions": _versions()}
            self.append("log.opened", opened | ({"key": str(key.public)} if key else {}))
            self._delete_erased(found.leftover)
        except BaseException:
            os.close(self._segment.fd)
            raise
        _open_logs.add(self)
        if self._compressor is not None:
            closed = [path for path in read.segments(run_dir, folder.name) if path != self._segment.path]
            self._compressor.take([path for path in closed if not is_packed(path)])

    @property
    def head(self) -> Head:
        """The last record written."""
        return self._head

    @property
    def durable_head(self) -> Head:
        """The last record that is known to be on disk."""
        return self._durable.head

    @property
    def epoch(self) -> int:
        """The fencing number in every record; goes up only, and survives restarts."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        if value < self._epoch:
            raise AuditError(f"the epoch is {self._epoch} and cannot go back to {value}")
        self._epoch = value

    @property
    def degraded(self) -> bool:
        """Whether a write or a sync failed; only `append_last` writes from then on."""
        return self._trouble is not None

    def now(self) -> datetime:
        """The time of day by the clock of this log's records."""
        return self._clock.now()

    def require(self) -> None:
        """Raise AuditWriteError where nothing can be recorded any more, so that nothing goes on without its record."""
        self._refuse_if_unusable()

    def append(
        self,
        type: str,  # noqa: A002 - the word of the record's field
        body: Mapping[str, Any] | None = None,
        *,
        cycle: int | None = None,
        cause: Sequence[str] = (),
        actor: Mapping[str, str] | None = None,
        sync: bool = True,
    ) -> Entry:
        """Write one record, and with `sync` wait until it is on disk.

        `cause` names the ids of records that led to this one. Raises AuditError for a record that cannot be one
        (unknown type, not JSON, too large) and AuditWriteError where it could not be made durable.
        """
        entry = self._put(_fields(type, body, cycle=cycle, cause=cause, actor=actor), sync=sync)
        if entry.type in _AT_ONCE or entry.seq - self._summed >= self._every:
            # The record is there and allows what it allows. A checkpoint that fails stops whatever comes next.
            with contextlib.suppress(AuditWriteError):
                self._sum_up(wait=entry.type in _AT_ONCE)
        return entry

    def checkpoint(self) -> None:
        """Write a checkpoint over everything appended so far, and keep it at the anchors. Raises AuditWriteError."""
        self._refuse_if_unusable()
        self._sum_up(wait=True)

    def append_last(
        self,
        type: str,  # noqa: A002 - as above
        body: Mapping[str, Any] | None = None,
        *,
        cycle: int | None = None,
        cause: Sequence[str] = (),
    ) -> Entry:
        """Write a record that must not be lost, also on a full disk; for freezes.

        Tries the ordinary way where nothing failed yet. Else it gives back the space kept free and writes the record to
        a segment of its own. That works once; then AuditWriteError.
        """
        if not self.degraded:
            with contextlib.suppress(AuditWriteError):
                return self.append(type, body, cycle=cycle, cause=cause)
        fields = _fields(type, body, cycle=cycle, cause=cause)
        if self._lock_fd < 0:
            # Before the locks: in a forked child a thread that does not exist there may hold them.
            raise AuditWriteError(self._trouble)
        with self._sync_lock, self._write_lock:
            if self._last_used:
                raise AuditWriteError(f"{self._trouble}; the space kept free for a last record is used up")
            self._last_used = True
            if self._compressor is not None:
                self._compressor.close(within_s=0)  # it would take the space that is kept free for this record
            with _disk("write a last record"):
                entry = self._write_last(fields)
        if self._mirror is not None:
            self._mirror(entry)
        return entry

    def keep(self, payloads: Sequence[bytes]) -> list[dict[str, Any]]:
        """Put payloads beside the log, durably; gives what stands for each of them in the record that names it.

        Write that record next: a payload that none names is dropped at the next start. Raises AuditWriteError, and then
        takes no more records, as after any other write that failed.
        """
        self._refuse_if_unusable()
        try:
            return blobs.keep(self._folder, payloads)
        except OSError as error:
            raise self._failed("keep a payload beside", error) from error

    def erase(self, commitments: Sequence[str], *, by: str, reason: str) -> list[str]:
        """Record that a person has payloads erased, then delete them; gives those that were not erased before.

        One that cannot be deleted is named in a note, and the next start deletes it. Raises AuditWriteError where it
        cannot be recorded; then nothing is deleted.
        """
        fresh = [one for one in dict.fromkeys(commitments) if blobs.is_commitment(one) and one not in self._erased]
        for start in range(0, len(fresh), blobs.AT_ONCE):
            part = fresh[start : start + blobs.AT_ONCE]
            body = {"by": by, "reason": reason, "commitments": part}
            self.append("blob.erased", body, actor={"kind": "person", "id": by})
            self._erased.update(part)
            self._delete_erased(part)
        return fresh

    def _delete_erased(self, commitments: Sequence[str]) -> None:
        """Delete payloads that a record says are erased, or say why that has to wait: it stops nothing."""
        try:
            blobs.delete(self._folder, commitments)
        except OSError as error:
            text = f"payloads that were erased cannot be deleted yet: {error.strerror} ({error.filename})"
            self.append("note.added", {"by": "loopguard", "text": text})

    def sync(self) -> None:
        """Return once everything appended so far is on disk. Callers at the same time share one sync."""
        self._refuse_if_unusable()
        self._sync_up_to(self._head.seq)

    def close(self) -> None:
        """Sync what was written and give the lock back. Closing twice is fine."""
        if self._lock_fd < 0:
            return
        try:
            try:
                if not self.degraded:
                    self.sync()
            finally:
                if self._compressor is not None:  # before the lock is given back, whatever comes in between
                    self._compressor.close(within_s=packing.CLOSE_S)
            if not self.degraded:
                self._say_left_raw()
                if self._told > self._summed:
                    self._sum_up(wait=True)
        finally:
            self._drop("the log is closed")

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_unnamed(self, names: Sequence[str]) -> None:
        """Delete payloads that no record came to name before a process died; what they would have allowed never was."""
        for start in range(0, len(names), blobs.AT_ONCE):
            part = names[start : start + blobs.AT_ONCE]
            self.append("blob.dropped", {"count": len(part), "commitments": part})
            with _disk("delete payloads that no record names"):
                blobs.delete(self._folder, part)

    def _put(self, fields: Mapping[str, Any], *, sync: bool) -> Entry:
        self._refuse_if_unusable()
        if self._segment.size >= self._segment_bytes:
            self._rotate()
        with self._write_lock:
            self._refuse_if_unusable()
            entry = self._write(fields)
        if sync:
            self._sync_up_to(entry.seq)
        if self._mirror is not None:
            self._mirror(entry)
        return entry

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _sum_up(self, *, wait: bool) -> None:
        """Write a checkpoint. Without `wait`, nothing where another thread is at it."""
        if self._tree is None or not self._checkpoint_lock.acquire(blocking=wait):
            return
        try:
            self._say_left_raw()
            self._commit_to_others()
            self._sync_up_to(self._head.seq)
            with self._write_lock:
                tree = self._grown(self._tree)
            summed = notes.Checkpoint(self.log, tree.size, tree.root())
            note = summed.note(self._key)
            try:
                notes.store(self._folder, note, size=summed.size)
            except OSError as error:
                raise self._failed("write a checkpoint of", error) from error
            self._summed = summed.size
            self._keep(note, size=summed.size)
        finally:
            self._checkpoint_lock.release()

    def _commit_to_others(self) -> None:
        """Record where the other streams stand, so that whoever trusts this one knows what those must hold."""
        if self._folder.name != read.CONTROLLER:
            return
        heads: dict[str, dict[str, Any]] = {}
        unreadable = []
        for stream in read.streams(self._run_dir):
            if stream != self._folder.name:
                try:
                    heads |= _durable_head(self._run_dir, stream)
                except (AuditError, OSError):
                    unreadable.append(stream)  # `verify` says why; this stream goes on all the same
        if heads or unreadable:
            body = {"streams": heads} | ({"unreadable": unreadable} if unreadable else {})
            self._put(_fields("streams.committed", body, cycle=None, cause=()), sync=False)

    def _say_left_raw(self) -> None:
        """Record which closed segments could not be compressed. Nothing is lost by it, and nothing stops for it."""
        left, reason = self._compressor.left_raw() if self._compressor is not None else ([], "")
        if left:
            body = {"segments": left, "reason": reason}
            self._put(_fields("log.left_raw", body, cycle=None, cause=()), sync=False)

    def _keep(self, note: str, *, size: int) -> None:
        lost = []
        for anchor in self._anchors:
            body: dict[str, Any] = {"kind": anchor.kind, "place": anchor.place, "size": size}
            try:
                name, body["where"] = "anchor.kept", places.keep(anchor, note)
            except places.NotKeptError as error:
                name, body["reason"], body["required"] = "anchor.failed", str(error), anchor.required
                if anchor.required:
                    lost.append(f"the anchor {anchor}, which the guard policy requires, failed: {error}")
            self._put(_fields(name, body, cycle=None, cause=()), sync=False)
        if self._anchors:
            self._sync_up_to(self._head.seq)
        if lost:
            self._lose("; ".join(lost))

    def _lose(self, reason: str) -> None:
        """Have the run stopped; where that fails or nobody can, the log stops it."""
        if self._on_lost_anchor is None:
            self._trouble = reason
            return
        try:
            self._on_lost_anchor(reason)
        except LoopGuardError as error:
            self._trouble = f"{reason}, and the run could not be stopped for it: {error}"

    # -- writing; the write lock is held ---------------------------------------------------------------------------

    def _write(self, fields: Mapping[str, Any]) -> Entry:
        if self._pending is not None:
            self._settle()
        line, entry = self._line(fields)
        # Noted before the write: a Ctrl-C between it and the lines below must not make two records of one number.
        self._pending = (Head(entry.seq, entry.hash), self._segment.size + len(line))
        try:
            _write_all(self._segment.fd, line)
        except OSError as error:
            raise self._failed("write", error) from error
        self._take_pending()
        if entry.type not in _SUMMING:
            self._told = entry.seq
        return entry

    def _take_pending(self) -> None:
        # Anything in here may happen twice, if a Ctrl-C comes in between.
        assert self._pending is not None
        self._head, self._segment.size = self._pending
        if self._tree is not None:
            tree, leaves = self._tree
            leaves[self._head.seq - 1 - tree.size :] = (self._head.hash,)
        self._pending = None

    def _settle(self) -> None:
        """Find out what became of a write that an exception interrupted."""
        assert self._pending is not None
        size = os.fstat(self._segment.fd).st_size
        if size == self._pending[1]:
            self._take_pending()
            return
        os.ftruncate(self._segment.fd, self._segment.size)
        self._pending = None

    def _grown(self, behind: tuple[Tree, list[str]]) -> Tree:
        """Bring the tree up to the last record that is on disk, which is never taken back; gives the tree."""
        tree, leaves = behind
        ready = self._durable.head.seq - tree.size
        tree = tree.grown(*map(bytes.fromhex, leaves[:ready]))
        self._tree = tree, leaves[ready:]
        return tree

    def _line(self, fields: Mapping[str, Any]) -> tuple[bytes, Entry]:
        now = self._clock.now()
        since = now - _EPOCH
        second, micros = since.days * 86400 + since.seconds, since.microseconds
        if second != self._second[0]:
            self._second = (second, now.astimezone(UTC).isoformat()[:19])
        envelope = {
            "v": FORMAT,
            "log": self.log,
            "seq": self._head.seq + 1,
            "epoch": self._epoch,
            "ts": f"{self._second[1]}.{micros:06d}Z",
            "mono_ns": self._clock.monotonic_ns(),
            "boot": self._boot,
            "id": _uuid7(second * 1000 + micros // 1000, micros % 1000, self._chance.getrandbits(62)),
            "policy": self.policy,
            "prev": self._head.hash,
            **fields,
        }
        line, digest = encode(envelope)
        _refuse_if_too_large(line, fields)
        return line, _entry(envelope, digest)

    def _failed(self, verb: str, error: OSError) -> AuditWriteError:
        self._trouble = f"cannot {verb} {self._segment.path}: {error.strerror or error}"
        return AuditWriteError(f"{self._trouble}. Nothing goes on without its record: free the disk, then start again")

    def _refuse_if_unusable(self) -> None:
        if self._trouble is not None:
            raise AuditWriteError(self._trouble)

    def _rotate(self) -> None:
        with self._sync_lock, self._write_lock:
            self._refuse_if_unusable()
            if self._segment.size < self._segment_bytes:
                return  # another thread was faster
            old = self._segment
            try:
                _flush(old.fd)
                fresh = _open_segment(self._folder / read.segment_name(self._head.seq + 1))
            except OSError as error:
                raise self._failed("rotate", error) from error
            # In this order, so that a fork at any moment finds descriptors that are ours.
            self._segment = fresh
            self._durable = _Durable(self._head, fresh.size)
            os.close(old.fd)
            if self._compressor is not None:
                self._compressor.take([old.path])
            if self._tree is not None:
                self._grown(self._tree)

    def _sync_up_to(self, seq: int) -> None:
        # Whoever gets here first syncs for all who wrote before that; the others wait, find it done, and return.
        with self._sync_lock:
            if self._durable.head.seq >= seq:
                return
            self._refuse_if_unusable()
            with self._write_lock:
                target = _Durable(self._head, self._segment.size)
            try:
                _flush(self._segment.fd)
            except OSError as error:
                raise self._failed("sync", error) from error
            self._durable = target
            if self._tree is not None and len(self._tree[1]) >= _MOST_LEAVES:
                with self._write_lock:
                    self._grown(self._tree)

    # -- the last record; both locks are held ----------------------------------------------------------------------

    def _write_last(self, fields: Mapping[str, Any]) -> Entry:
        (self._folder / RESERVE).unlink(missing_ok=True)
        _sync_folder(self._folder)
        self._cut_back()
        line, entry = self._line(fields)
        fresh = _open_segment(self._folder / read.segment_name(entry.seq))
        os.close(self._segment.fd)
        self._segment = fresh
        _write_all(fresh.fd, line)
        _flush(fresh.fd)
        self._pending = (Head(entry.seq, entry.hash), len(line))
        self._take_pending()
        self._durable = _Durable(self._head, len(line))
        return entry

    def _cut_back(self) -> None:
        """End the failed segment at the last record known to be on disk; keep what stood behind it beside the log.

        Nothing that those records would have allowed has happened, or they were of the kind that may be lost. The next
        start finds the bytes and records their digest.
        """
        path, size = self._segment.path, self._durable.size
        with path.open("rb") as file:
            file.seek(size)
            rest = file.read()
        if rest:
            # Nobody was promised these bytes. If they fit nowhere, the last record still must.
            with contextlib.suppress(OSError):
                _write_torn(self._folder, self._durable.head.seq + 1, rest)
        if size == 0:
            path.unlink()
            _sync_folder(self._folder)
        else:
            # A descriptor of its own: the one that failed is not asked again.
            _cut(path, size)
        self._head, self._pending = self._durable.head, None
        if self._tree is not None:
            tree, leaves = self._tree
            del leaves[self._head.seq - tree.size :]

    def _drop(self, why: str) -> None:
        self._trouble = why
        for fd in (self._segment.fd, self._lock_fd):
            os.close(fd)
        self._lock_fd = -1
        _open_logs.discard(self)

    def _forked(self) -> None:
        # Closing is enough and unlocking would be wrong: the parent shares this lock and goes on.
        if self._lock_fd >= 0:
            self._drop(f"this process is a fork of the one that owns {self.log}; only that one writes the audit log")


# -- forks -------------------------------------------------------------------------------------------------------------

_open_logs: weakref.WeakSet[AuditLog] = weakref.WeakSet()


def _close_in_child() -> None:
    for log in list(_open_logs):
        log._forked()


os.register_at_fork(after_in_child=_close_in_child)


# -- what is there already ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Found:
    """What a scan of the segments found."""

    head: Head
    tree: Tree | None = None
    summed: int = 0
    """How many records the last checkpoint beside the log stands for."""
    epoch: int = 0
    path: Path | None = None
    """The segment to go on with; None where there is none yet."""
    torn_at: int | None = None
    torn: bytes = b""
    recovered: frozenset[str] = frozenset()
    """Files of set-aside bytes that a record names already."""
    front: pruned.Front = field(default_factory=pruned.Front)
    erased: set[str] = field(default_factory=set)
    """Payloads that a record says are erased."""
    unnamed: list[str] = field(default_factory=list)
    """Payloads beside the log that no record names."""
    leftover: list[str] = field(default_factory=list)
    """Payloads beside the log that a record says are erased."""


def _scan(run_dir: Path, stream: str, log: str, *, strict: bool) -> _Found:
    chain = verify.Chain(stream, verify.twins(run_dir, stream), log=log)
    found = _Found(Head(0, GENESIS))
    recovered: set[str] = set()
    found.front.read(read.stream_dir(run_dir, stream))
    if found.front.pruned is not None:
        found.epoch = found.front.pruned.epoch
        chain.begin(found.front.pruned)
    shelf = blobs.Shelf(read.stream_dir(run_dir, stream))
    paths = read.segments(run_dir, stream)
    summed = dict(notes.stored(read.stream_dir(run_dir, stream)))
    for path in paths:
        found.path = None if is_packed(path) else path  # what comes next goes to a new one then
        for line in _lines(path, strict=strict):
            if not line.complete and path == paths[-1] and found.path and (not strict or read.looks_torn(line.data)):
                found.torn_at, found.torn = line.offset, line.data
                break
            entry, finding = chain.feed(line)
            if strict:
                _refuse(line, finding, chain.head.seq)
            if entry:
                if strict and entry.seq in summed:
                    _refuse_other_checkpoint(summed[entry.seq], chain)
                found.epoch = max(found.epoch, entry.epoch)
                if entry.type == "log.recovered":
                    recovered.add(str(entry.body.get("file")))
                if entry.type == pruned.RECORD:
                    found.front.take(entry)
                shelf.feed(entry)
    found.head, found.tree = chain.head, chain.tree
    found.recovered = frozenset(recovered)
    found.erased = shelf.erased
    found.summed = max((size for size in summed if size <= chain.head.seq), default=0)
    if strict and (trouble := found.front.judge()):
        raise AuditTamperedError(f"{trouble}. `loopguard audit verify` says more")
    if strict and summed and max(summed) > chain.head.seq:
        tail = f"the log ends at record {chain.head.seq}: the tail was cut. `loopguard audit verify` says more"
        raise AuditTamperedError(f"{summed[max(summed)]} was written when there were {max(summed)} records; {tail}")
    if strict:  # of an altered log nobody knows what its lost records named
        found.unnamed, found.leftover = sorted(shelf.unnamed), shelf.leftover
    return found


def _lines(path: Path, *, strict: bool) -> Iterator[read.Line]:
    try:
        yield from read.raw_lines(path)
    except DamagedSegmentError:
        if strict:
            raise


def _refuse_other_checkpoint(path: Path, chain: verify.Chain) -> None:
    """Raise AuditTamperedError where a checkpoint beside the log stands for other records than are there."""
    try:
        found = notes.Note.parse(notes.read(path)).checkpoint
    except notes.BadNoteError as error:
        way_out = "Where a disk damaged it, move it to a folder of its own: the log goes on, and says less of its past"
        raise AuditTamperedError(f"{path} {error}. `loopguard audit verify` says more. {way_out}") from error
    if chain.tree is None or found != notes.Checkpoint(str(chain.log), chain.tree.size, chain.tree.root()):
        tail = "they were changed and hashed anew, or it was. `loopguard audit verify` says more"
        raise AuditTamperedError(f"{path} does not stand for the records before {chain.head.seq + 1}: {tail}")


def _refuse(line: read.Line, finding: verify.Finding | None, last: int) -> None:
    if finding is None and line.complete:
        return
    text = finding.text if finding else f"{line.place}: the record does not end its line"
    raise AuditTamperedError(f"{text}. What stands before it verifies; `loopguard audit verify` says more")


def _durable_head(run_dir: Path, stream: str) -> dict[str, dict[str, Any]]:
    """The last record of a stream that another process writes, as a commitment. Raises AuditError, OSError."""
    last = read.last(run_dir, stream)
    if last is None:
        return {}
    # Read first, then sync: a commitment must not name a record that a power cut could take back. The last record may
    # stand in the segment before an empty one.
    for path in read.segments(run_dir, stream)[-2:]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # compressed a moment ago, which is not done before all of it is on disk
        try:
            _flush(fd)
        finally:
            os.close(fd)
    return {stream: {"seq": last.seq, "hash": last.hash}}


def _set_aside(folder: Path, found: _Found) -> None:
    """Move a cut last line out of the log: first its bytes to a file of their own, then the cut."""
    if found.torn_at is None:
        return
    assert found.path is not None
    _write_torn(folder, found.head.seq + 1, found.torn)
    _cut(found.path, found.torn_at)


def _go_on_in(folder: Path, found: _Found) -> Path:
    """The segment that the next record goes to."""
    fresh = folder / read.segment_name(found.head.seq + 1)
    if found.path is None or found.path.name == fresh.name or found.path.stat().st_size:
        return found.path or fresh
    # Begun by a rotation that failed, and then records before it were taken back: its name promises another record.
    found.path.unlink()
    return fresh


def _write_torn(folder: Path, seq: int, data: bytes) -> None:
    taken = {path.name for path in folder.glob("torn-*.bin")}
    names = (f"torn-{seq:012d}{suffix}.bin" for suffix in ("", *(f"-{count}" for count in range(2, 1000))))
    name = next(name for name in names if name not in taken or (folder / name).read_bytes() == data)
    partial = folder / f".{name}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        _write_all(fd, data)
        _flush(fd)
    except BaseException:
        partial.unlink()
        raise
    finally:
        os.close(fd)
    partial.replace(folder / name)
    _sync_folder(folder)


def _unrecorded(folder: Path, recovered: frozenset[str]) -> list[tuple[str, bytes]]:
    """Set-aside bytes that no record names yet: of just now, or of a start that died before it could say so."""
    return [(path.name, path.read_bytes()) for path in sorted(folder.glob("torn-*.bin")) if path.name not in recovered]


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(doing: str) -> Iterator[None]:
    """Turn what the file system says into one sentence."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise AuditWriteError(f"cannot {doing}: {error.strerror or error}{where}") from error


def _make_folder(folder: Path) -> Path:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        _sync_folder(path.parent)
    return folder


def _take_lock(path: Path, run_dir: Path, clock: Clock) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # A few tries: `read.owner` holds the lock for an instant when somebody asks who has it.
        for attempt in range(_LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _LOCK_TRIES - 1:
                    raise _busy(fd, run_dir) from None
                time.sleep(_LOCK_PAUSE_S)
        os.ftruncate(fd, 0)
        since = clock.now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        os.pwrite(fd, f"{json.dumps({'pid': os.getpid(), 'since': since})}\n".encode("ascii"), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _busy(fd: int, run_dir: Path) -> RunBusyError:
    owner = read.holder(fd)
    who = f"process {owner.pid}" if owner.pid else "another process"
    return RunBusyError(f"{run_dir} is in use by {who} (since {owner.since}): wait for it, or use another --run-dir")


def _open_segment(path: Path) -> _Segment:
    fresh = not path.exists()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        if fresh:
            os.fsync(fd)
            _sync_folder(path.parent)
        return _Segment(path, fd, os.fstat(fd).st_size)
    except BaseException:
        os.close(fd)
        raise


def _write_all(fd: int, data: bytes) -> None:
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


if sys.platform == "darwin":

    def _flush(fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync alone leaves the data in the drive's cache there

else:

    def _flush(fd: int) -> None:
        os.fdatasync(fd)


def _cut(path: Path, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_reserve(path: Path, mib: int) -> None:
    """Space that a last record can be written to when the disk is full. Real bytes: holes and zeros may take none."""
    if path.exists() and path.stat().st_size == mib * 1024 * 1024:
        return
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        for _ in range(mib):
            _write_all(fd, os.urandom(1024 * 1024))
        os.fsync(fd)
    except BaseException:
        # Half a reserve is worse than none: it takes space and promises what it cannot hold.
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    _sync_folder(path.parent)


# -- small facts -------------------------------------------------------------------------------------------------------


def _fields(
    name: str,
    body: Mapping[str, Any] | None,
    *,
    cycle: int | None,
    cause: Sequence[str],
    actor: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a caller says of a record, as JSON values, and without what a record may not hold."""
    check_type(name)
    told, redacted = recorded(name, body or {})
    by = LOOP
    if actor:
        by, more = shown_actor(plain(dict(actor), place="actor"))
        redacted += more
    return {
        "type": name,
        "body": told,
        "cycle": cycle,
        "cause": tuple(plain(list(cause), place="cause")) if cause else (),
        "actor": by,
        "redacted": tuple(redacted),
    }


def _refuse_if_too_large(line: bytes, fields: Mapping[str, Any]) -> None:
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and (levels := depth(dict(fields))) > MAX_DEPTH:
        raise AuditError(
            f"a {fields['type']} record is nested {levels} levels deep, and readers bear {MAX_DEPTH}; flatten its body"
        )
    if len(line) <= MAX_BODY_KIB * 1024:
        return  # then the body within it is small enough too
    size = len(canonical(fields["body"]))
    if size > MAX_BODY_KIB * 1024 or len(line) > MAX_LINE_BYTES:
        raise AuditError(
            f"the body of a {fields['type']} record has {size:,} bytes, its line {len(line):,}; at most {MAX_BODY_KIB} "
            "KiB of body fit. Record a digest and keep the rest in a file"
        )


def _entry(envelope: dict[str, Any], digest: str) -> Entry:
    envelope["hash"] = digest
    return Entry._make(_in_order(envelope))


def _versions() -> dict[str, str]:
    return {"loopguard": loopguard.__version__, "python": platform.python_version()}


def _boot() -> str:
    """What tells one start of the machine from the next, since the monotonic clock begins anew with each."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        # No such file on macOS: the minute of the start, which both clocks together give away.
        return f"started-{int((time.time() - time.monotonic()) // 60)}"


def _uuid7(millis: int, micros: int, chance: int) -> str:
    """A UUID of version 7: milliseconds, then a fraction of one, then chance (62 bits). Sorts by time."""
    parts = (
        millis >> 16 & 0xFFFFFFFF,
        millis & 0xFFFF,
        micros * 4096 // 1000,
        0b10 << 14 | chance >> 48,
        chance & _BITS_48,
    )
    return "%08x-%04x-7%03x-%04x-%012x" % parts  # noqa: UP031 - a third faster, and every record has one
