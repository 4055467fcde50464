"""What a record of the audit log is: its types, its fields, its bytes and its hash.

Lives here: the one way to turn a record into a line and back. Not here: files (`log`, `read`), the chain (`verify`).
The promise: a line is canonical JSON, and its hash covers every byte of it except the hash itself.
`docs/audit-format.md` says the same for people who write their own verifier.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from loopguard.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
GENESIS = "0" * 64
"""`prev` of the first record."""

MAX_BODY_KIB = 256
MAX_DEPTH = 64
"""So many objects and lists lie within one another at most, the record itself counted: readers have to bear that."""

MAX_LINE_BYTES = 512 * 1024
"""No line of ours is longer; a reader that meets a longer one stops instead of filling memory."""

LINE_START = b'{"actor":{'
"""How every line begins, keys being sorted."""

TYPES: dict[str, str] = {
    "log.opened": "a process took the log",
    "log.recovered": "a last line that a crash had cut was set aside",
    "log.left_raw": "closed segments could not be compressed",
    "log.pruned": "the front of the log was removed",
    "streams.committed": "where the other streams of the run stood, before a checkpoint of this one",
    "anchor.kept": "a checkpoint of the log was kept elsewhere",
    "anchor.failed": "a checkpoint of the log could not be kept elsewhere",
    "run.started": "the loop began, or went on",
    "run.finished": "all cycles are done",
    "run.interrupted": "a person stopped the process; the run can go on",
    "policy.loaded": "the guard policy in force",
    "policy.adopted": "another guard policy was taken on purpose",
    "model.attached": "a model in training came under guard",
    "cycle.started": "a cycle began",
    "cycle.finished": "a cycle ended",
    "tool.decided": "the tool gate said yes or no to a call",
    "tool.finished": "an allowed call came back",
    "tool.lost": "an allowed call will never come back",
    "tool.observed": "a run that is only observed has a tool of its own",
    "tool.egress": "a call reached, or tried to reach, a place outside",
    "data.admitted": "records became training data",
    "data.refused": "a whole batch was kept out by a freeze",
    "data.quarantined": "records were held back",
    "update.leased": "these updates may be applied",
    "update.applied": "these updates were applied, with their readings",
    "update.withheld": "an update was stopped before it moved the weights",
    "update.skipped": "a batch was dropped, as the policy allows",
    "update.overflowed": "a gradient scaler took no step, so many times in a row",
    "update.expected": "the loop announced a change",
    "update.settled": "leased updates without a record were undone",
    "eval.finished": "the candidate was measured",
    "promotion.decided": "the promotion gate said yes or no",
    "promotion.applied": "the candidate became the actor",
    "promotion.settled": "a promotion that a crash had cut was completed or undone",
    "promotion.rolled_back": "a named person went back to an earlier promotion",
    "actor.synced": "weights of a cycle under way went to the rollout engine, or were kept from it",
    "checkpoint.saved": "the framework wrote a checkpoint of its own",
    "checkpoint.loaded": "training went on from such a checkpoint",
    "snapshot.written": "a promoted state is on disk",
    "snapshot.restored": "weights went back to a snapshot",
    "freeze.requested": "a person asked for a freeze",
    "freeze.foreseen": "a run that is only observed would have frozen here",
    "freeze.entered": "updates, admission and promotion stopped",
    "resume.requested": "a person asked for a resume",
    "approval.given": "a person signed what a resume would do",
    "approval.refused": "an approval, or a request to resume, did not count",
    "resume.applied": "a named person let the loop go on",
    "notify.sent": "an endpoint was told of a freeze, a resume or the end",
    "notify.failed": "an endpoint could not be told of one",
    "note.requested": "a person handed in a note",
    "note.added": "a person wrote something down",
    "sandbox.created": "a cell was started",
    "sandbox.removed": "a cell was taken away",
    "sandbox.reaped": "cells of a dead owner were taken away",
}

ABOUT_ANCHORS = frozenset({"anchor.kept", "anchor.failed"})
"""Records that follow a checkpoint and only say where it was kept: nobody gains by cutting them off, unless they say
that a required place failed."""

_HASH_PREFIX = b"loopguard-record-v1\n"
_HASH_MEMBER = b',"hash":"'
_HEX64 = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
_SAFE_INT = 2**53
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")

_OTHERS = ("actor", "body", "cause", "cycle", "redacted")
_STRINGS = ("boot", "id", "log", "policy", "prev", "ts", "type", "hash")
_COUNTS = ("epoch", "mono_ns", "seq", "v")
_FIELDS = frozenset((*_STRINGS, *_COUNTS, *_OTHERS))
_BUT_HASH = sorted(_FIELDS - {"hash"})
_strings, _counts, _objects, _lists = (
    itemgetter(*names) for names in (_STRINGS, _COUNTS, ("actor", "body"), ("cause", "redacted"))
)


class BadLineError(ValueError):
    """A line that is no record. The message is the reason, without the place."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last record of a log. Its text, `SEQ:HASH`, is what a person notes down as an anchor."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One record as read from or written to the log."""

    seq: int
    id: str
    type: str
    ts: str
    epoch: int
    cycle: int | None
    actor: Mapping[str, str]
    policy: str
    cause: tuple[str, ...]
    body: Mapping[str, Any]
    prev: str
    hash: str
    log: str
    mono_ns: int
    boot: str
    redacted: tuple[str, ...] = field(default=())


def encode(fields: Mapping[str, Any]) -> tuple[bytes, str]:
    """The line (with its newline) and the hash of a record given by all fields but `hash`."""
    envelope = {key: fields[key] for key in _BUT_HASH}
    envelope["hash"] = ""
    line = canonical(envelope).encode("ascii")
    # As in `decode`: the last match is the real one.
    at = line.rfind(_HASH_MEMBER)
    front, back = line[:at], line[at + len(_HASH_MEMBER) + 1 :]
    digest = hashlib.sha256(_HASH_PREFIX + front + back).hexdigest()
    return b'%b,"hash":"%b"%b\n' % (front, digest.encode("ascii"), back), digest


def decode(line: bytes) -> Entry:
    """The record in a line without its newline. Raises BadLineError when a byte of it is not what was hashed."""
    # Strings of a line hold no bare quote, and no field after `hash` is an object: the last match is the real one.
    at = line.rfind(_HASH_MEMBER)
    start, end = at + len(_HASH_MEMBER), at + len(_HASH_MEMBER) + 64
    if at < 0 or line[end : end + 2] != b'",':
        raise BadLineError("is not a record (no hash where one belongs)")
    stated = line[start:end]
    if hashlib.sha256(_HASH_PREFIX + line[:at] + line[end + 1 :]).hexdigest().encode("ascii") != stated:
        raise BadLineError("was altered (its hash does not match its content)")
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"is not JSON ({error})") from error
    return _entry(value)


def _entry(value: Any) -> Entry:
    if not isinstance(value, dict) or "v" not in value:
        raise BadLineError("is not a record (no version)")
    if value["v"] != FORMAT:
        raise UnknownFormatError(f"is of format {printable(str(value['v']))}; this LoopGuard reads format {FORMAT}")
    if value.keys() != _FIELDS:
        raise BadLineError(f"does not have the fields of a record ({_field_trouble(value)})")
    if not _well_typed(value):
        raise BadLineError("has a field of the wrong type")
    if not is_time(value["ts"]):
        raise BadLineError(f"has a `ts` that is no time ({printable(value['ts'][:40])})")
    del value["v"]
    value["cause"], value["redacted"] = tuple(value["cause"]), tuple(value["redacted"])
    return Entry(**value)


def is_time(text: str) -> bool:
    """Whether this is a time as records have it: RFC 3339 in UTC with six decimals, and one that there is."""
    try:
        return _TIME.fullmatch(text) is not None and datetime.fromisoformat(text) is not None
    except ValueError:
        return False


class UnknownFormatError(BadLineError):
    """A record that hashes right and is of a format that this version does not read."""


def _field_trouble(value: dict[str, Any]) -> str:
    missing, extra = sorted(_FIELDS - value.keys()), sorted(value.keys() - _FIELDS)
    return printable(f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}")


def _well_typed(value: dict[str, Any]) -> bool:
    return (
        set(map(type, _strings(value))) == {str}
        and set(map(type, _counts(value))) == {int}
        and (value["cycle"] is None or type(value["cycle"]) is int)
        and set(map(type, _objects(value))) == {dict}
        and set(map(type, _lists(value))) == {list}
    )


def fields_of(entry: Entry) -> dict[str, Any]:
    """Every field as the log holds it, in the log's order."""
    names = sorted(_FIELDS)
    return {name: FORMAT if name == "v" else getattr(entry, name) for name in names}


def canonical(value: Any) -> str:
    """JSON text with sorted keys, no spaces, and ASCII only."""
    return _CANONICAL.encode(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def plain(value: Any, *, place: str = "body") -> Any:
    """A copy that JSON holds without loss; what JSON has no number for becomes a string.

    Integers of 2^53 and more become their decimal text, NaN and infinities "NaN", "Infinity" and "-Infinity", lone
    surrogates U+FFFD. Anything that is not a JSON value is an AuditError naming its place.
    """
    try:
        try:
            return _copied(value)
        except _OddError:
            return _plain(value, place)
    except RecursionError:
        raise AuditError(f"{place} is nested without end; a record holds {MAX_DEPTH} levels") from None


def depth(value: Any) -> int:
    """How many objects and lists of a JSON value lie within one another."""
    levels, layer = 0, [value]
    while layer := [item for item in layer if isinstance(item, (dict, list))]:
        layer = [part for item in layer for part in (item.values() if isinstance(item, dict) else item)]
        levels += 1
    return levels


class _OddError(Exception):
    """Something is not as nearly everything is: look at it closely."""


def _copied(value: Any) -> Any:
    """A copy of a value in which nothing has to change. Raises _OddError where that is not plain at a glance."""
    kind = type(value)
    if kind is str and value.isascii():
        return value
    if kind is dict:
        return {_copied_key(key): _copied(item) for key, item in value.items()}
    if kind is int and -_SAFE_INT < value < _SAFE_INT:
        return value
    if kind is float and math.isfinite(value):
        return value
    if kind is list or kind is tuple:
        return [_copied(item) for item in value]
    if value is None or kind is bool:
        return value
    raise _OddError


def _copied_key(key: Any) -> str:
    if type(key) is str and key.isascii():
        return key
    raise _OddError


def _plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # str() also strips subclasses, whose encoding would be their own affair.
        return _whole_text(str(value))
    if isinstance(value, int):
        return int(value) if -_SAFE_INT < value < _SAFE_INT else str(int(value))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _not_finite(value)
    if isinstance(value, dict):
        return _plain_mapping(value, place)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise AuditError(f"{place} is a {type(value).__name__}, which a record cannot hold; pass JSON values only")


def _plain_mapping(value: dict[Any, Any], place: str) -> dict[str, Any]:
    if wrong := [key for key in value if not isinstance(key, str)]:
        raise AuditError(f"{place} has the key {wrong[0]!r}, which is not a string; a record's keys are strings")
    return {_whole_text(key): _plain(item, f"{place}.{key}") for key, item in value.items()}


def _whole_text(text: str) -> str:
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def number(value: Any) -> float | None:
    """A recorded number, also one that JSON had to hold as text; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else None


def check_type(name: str) -> None:
    """Refuse a record type that no reader knows."""
    if name in TYPES:
        return
    near = difflib.get_close_matches(name, TYPES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AuditError(f"record type {name!r} is unknown; the types are listed in loopguard/audit/events.py.{hint}")


def is_digest(text: str) -> bool:
    """Whether this is a SHA-256 in lower-case hex."""
    return _HEX64.fullmatch(text) is not None


def printable(text: str) -> str:
    """Text of strangers made safe to show: control, bidirectional and invisible characters become visible escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char)
    if short is not None:
        return short
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
