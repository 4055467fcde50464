"""What a record of the audit log is: its types, its fields, its bytes and its hash.

Lives here: the one way to turn a record into a line and back. Not here: files (`log`, `read`), the chain (`verify`).
The promise: a line is canonical JSON, and its hash covers every byte of it except the hash itself.
`docs/audit-format.md` says the same for people who write their own verifier.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import re
from datetime import datetime
from json.encoder import encode_basestring_ascii as _quoted
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import loopguard
from loopguard.errors import AuditError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

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
    "run.halted": "the run is at its end for good",
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
    "probation.began": "the next cycles are under tightened thresholds",
    "probation.ended": "they were promoted, and the thresholds are as before",
    "hold.entered": "no cycle begins for now",
    "hold.ended": "cycles begin again",
    "note.requested": "a person handed in a note",
    "note.added": "a person wrote something down",
    "blob.dropped": "payloads that no record names were deleted, as a crash had left them",
    "blob.erased": "a person had payloads erased",
    "sandbox.created": "a cell was started",
    "sandbox.removed": "a cell was taken away",
    "sandbox.reaped": "cells of a dead owner were taken away",
}

ABOUT_ANCHORS = frozenset({"anchor.kept", "anchor.failed"})
"""Records that follow a checkpoint and only say where it was kept: nobody gains by cutting them off, unless they say
that a required place failed."""

LOOP = {"kind": "loop", "id": f"loopguard/{loopguard.__version__}"}
"""The `actor` of what no person caused."""

_HASH_START = "loopguard-record-v1\n"
_HASH_PREFIX = _HASH_START.encode("ascii")
_HASH_MEMBER = b',"hash":"'
_HEX64 = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
_SAFE_INT = 2**53
_UNSEEN = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Fillers, joiners and variation selectors: nobody sees them, and Python calls them printable."""
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class BadLineError(ValueError):
    """A line that is no record. The message is the reason, without the place."""


# Records and heads are tuples, and not dataclasses: a log makes one for each of its lines, and these cost a quarter.
class Head(NamedTuple):
    """The last record of a log. Its text, `SEQ:HASH`, is what a person notes down as an anchor."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


class Entry(NamedTuple):
    """One record as read from or written to the log. A value: `_replace` gives another one."""

    seq: int
    id: str
    type: str
    ts: str
    epoch: int
    cycle: int | None
    actor: Mapping[str, str]
    policy: str
    body: Mapping[str, Any]
    prev: str
    hash: str
    log: str
    mono_ns: int
    boot: str
    cause: tuple[str, ...]
    redacted: tuple[str, ...] = ()


_FIELDS = frozenset((*Entry._fields, "v"))
_read_off = itemgetter(*Entry._fields, "v")
_KINDS = {
    "seq": int,
    "epoch": int,
    "mono_ns": int,
    "v": int,
    "actor": dict,
    "body": dict,
    "cause": list,
    "redacted": list,
}
_SHAPES = frozenset(
    tuple(cycle if name == "cycle" else _KINDS.get(name, str) for name in (*Entry._fields, "v"))
    for cycle in (int, type(None))
)
"""The types that the fields of a record have, in the order in which they are read off."""


def encode(fields: Mapping[str, Any]) -> tuple[bytes, str]:
    """The line (with its newline) and the hash of a record given by all fields but `hash`, each of its own type."""
    actor, cause, cycle, redacted = fields["actor"], fields["cause"], fields["cycle"], fields["redacted"]
    # By hand, in the order of the keys, and with the encoder only where something has a depth: a third of the time.
    front = (
        f'{{"actor":{_LOOP_TEXT if actor is LOOP else canonical(actor)},"body":{canonical(fields["body"])},'
        f'"boot":{_quoted(fields["boot"])},"cause":{canonical(cause) if cause else "[]"},'
        f'"cycle":{"null" if cycle is None else cycle},"epoch":{fields["epoch"]}'
    )
    back = (
        f',"id":{_quoted(fields["id"])},"log":{_quoted(fields["log"])},"mono_ns":{fields["mono_ns"]},'
        f'"policy":{_quoted(fields["policy"])},"prev":{_quoted(fields["prev"])},'
        f'"redacted":{canonical(redacted) if redacted else "[]"},"seq":{fields["seq"]},"ts":{_quoted(fields["ts"])},'
        f'"type":{_quoted(fields["type"])},"v":{fields["v"]}}}'
    )
    digest = hashlib.sha256(f"{_HASH_START}{front}{back}".encode("ascii")).hexdigest()
    return f'{front},"hash":"{digest}"{back}\n'.encode("ascii"), digest


def decode(line: bytes) -> Entry:
    """The record in a line without its newline. Raises BadLineError when a byte of it is not what was hashed."""
    # Strings of a line hold no bare quote, and no field after `hash` is an object: the last match is the real one.
    at = line.rfind(_HASH_MEMBER)
    start, end = at + len(_HASH_MEMBER), at + len(_HASH_MEMBER) + 64
    if at < 0 or line[end : end + 2] != b'",':
        raise BadLineError("is not a record (no hash where one belongs)")
    digest = hashlib.sha256(_HASH_PREFIX + line[:at] + line[end + 1 :]).hexdigest()
    if line[start:end] != digest.encode("ascii"):
        raise BadLineError("was altered (its hash does not match its content)")
    try:
        value = _parsed(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"is not JSON ({error})") from error
    entry = _entry(value)
    if entry.hash != digest:
        raise BadLineError("has another hash behind its own")  # to whoever parses it, the last one counts
    return entry


_DECODER = json.JSONDecoder()


def _parsed(text: str) -> Any:
    """What `json.loads` gives, and raises. It looks for space around the value first, of which our lines have none."""
    if text.startswith("{"):
        value, end = _DECODER.raw_decode(text)
        if end == len(text):
            return value
    return json.loads(text)


def _entry(value: Any) -> Entry:
    if type(value) is not dict or value.keys() != _FIELDS:
        raise _no_record(value)
    read = _read_off(value)
    if read[-1] != FORMAT or tuple(map(type, read)) not in _SHAPES:
        raise _no_record(value)
    if not is_time(value["ts"]):
        raise BadLineError(f"has a `ts` that is no time ({printable(value['ts'][:40])})")
    *fields, cause, redacted, _ = read
    return Entry._make((*fields, tuple(cause), tuple(redacted)))


def _no_record(value: Any) -> BadLineError:
    """Why a JSON value is no record of this format."""
    if not isinstance(value, dict) or "v" not in value:
        return BadLineError("is not a record (no version)")
    if value["v"] != FORMAT:
        return UnknownFormatError(f"is of format {printable(str(value['v']))}; this LoopGuard reads format {FORMAT}")
    if value.keys() != _FIELDS:
        return BadLineError(f"does not have the fields of a record ({_field_trouble(value)})")
    return BadLineError("has a field of the wrong type")


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


def fields_of(entry: Entry) -> dict[str, Any]:
    """Every field as the log holds it, in the log's order."""
    names = sorted(_FIELDS)
    return {name: FORMAT if name == "v" else getattr(entry, name) for name in names}


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical(value: Any) -> str:
    """JSON text with sorted keys, no spaces, and ASCII only. Raises ValueError and TypeError for what is not JSON."""
    return "".join(_chunks(value, 0))


def _encoder() -> Callable[[Any, int], Iterable[str]]:
    """What `_CANONICAL.encode` makes anew for each value: a quarter of its time."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is not None:
        with contextlib.suppress(TypeError):  # another Python may want other arguments
            encoder: Callable[[Any, int], Iterable[str]] = make(
                None, _CANONICAL.default, _quoted, None, ":", ",", True, False, False
            )
            return encoder
    return lambda value, _: (_CANONICAL.encode(value),)


_chunks = _encoder()
_LOOP_TEXT = canonical(LOOP)


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
    if kind is dict:
        copy = {}
        for key, item in value.items():
            if type(key) is not str or not key.isascii():
                raise _OddError
            kind = type(item)
            # Most items of most bodies are one of these two: no call for them.
            if (kind is str and item.isascii()) or (kind is int and -_SAFE_INT < item < _SAFE_INT):
                copy[key] = item
            else:
                copy[key] = _copied(item)
        return copy
    if kind is float and math.isfinite(value):
        return value
    if kind is str and value.isascii():
        return value
    if kind is list or kind is tuple:
        return [_copied(item) for item in value]
    if value is None or kind is bool or (kind is int and -_SAFE_INT < value < _SAFE_INT):
        return value
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
    if text.isascii() and text.isprintable():
        return text
    text = _UNSEEN.sub(lambda match: _escaped(match.group()), text)
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char)
    if short is not None:
        return short
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
