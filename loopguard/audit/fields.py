"""What the body of each record may hold in the clear: an allow-list of members, each with its kind.

A member that is not in `BODIES`, or whose value has a shape that its kind has not, is never written as it is: the
record holds its SHA-256 and its size instead. Text is searched for secrets (`redact`). What was replaced is listed in
`redacted` of the record, as JSON Pointers.

Lives here: the table, and what becomes of a body by it. It works on the copy that the log makes of a body before
anything is hashed; what a caller passed in never changes. `docs/audit-format.md` lists the same members.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, Any

from loopguard.audit import redact
from loopguard.audit.events import canonical, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Path = tuple[str | int, ...]

_PLAIN = (int, float, bool, type(None))
_NUMBERS = frozenset(_PLAIN)
_SAFE_INT = 2**53
_COMMITMENT = re.compile(r"[0-9a-f]{64}")
_NUMBER_TEXT = re.compile(r"-?[0-9]{1,400}|NaN|-?Infinity")
# Too short for any token, or too plain: ids, what rules and tools are mostly called.
_PLAIN_WORD = re.compile(r"[\w.: -]{0,15}|[0-9a-f-]{0,64}", re.ASCII)
_CLEAN: set[str] = set()
"""Short ASCII texts in which there was nothing to find: reasons and names come again with every record."""
_MOST_CLEAN = 4096
_SHORT = 64


class Kind:
    """What a member may be: `fits` is asked first, costs next to nothing, and is nearly always the end of it."""

    def __init__(self, fits: Callable[[Any], bool]) -> None:
        self.fits = fits

    def shown(self, value: Any, path: Path, found: list[Path]) -> Any:
        """What is written instead of a value that does not fit. Paths of what was replaced go to `found`.

        A text is searched, whatever should stand there; a shape that does not belong there is withheld.
        """
        if isinstance(value, _PLAIN):
            return value
        if not isinstance(value, str):
            return withheld(value, path, found)
        clean = redact.clean(value)
        if clean != value:
            found.append(path)
        return clean


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS or (type(value) is str and _NUMBER_TEXT.fullmatch(value) is not None)


def _is_digest(value: Any) -> bool:
    # A quick look, which a text in the place of a digest could pass; ours are made by hashlib.
    return value is None or (type(value) is str and len(value) == 64 and value.isalnum())


def _is_word(value: Any) -> bool:
    if type(value) is str:
        return _PLAIN_WORD.fullmatch(value) is not None or _clean(value)
    return type(value) in _NUMBERS


def _is_clean_text(value: Any) -> bool:
    return _clean(value) if type(value) is str else type(value) in _NUMBERS


def _is_clean_head(value: Any) -> bool:
    return type(value) is str and len(value) <= redact.HEAD_CHARS and not redact.suspicious(value)


def _is_text(value: Any) -> bool:
    return value is None or type(value) is str


def _is_payload(value: Any) -> bool:
    return (
        type(value) is dict
        and value.keys() == {"commitment", "bytes"}
        and type(value["bytes"]) is int
        and type(value["commitment"]) is str
        and _COMMITMENT.fullmatch(value["commitment"]) is not None
    )


def _clean(text: str) -> bool:
    """Whether there is nothing to find in a text, at a glance."""
    if redact.suspicious(text):
        return False
    if len(text) <= _SHORT and len(_CLEAN) < _MOST_CLEAN and text.isascii():
        _CLEAN.add(text)
    return True


class Head(Kind):
    """The beginning of a payload: searched for secrets, then cut to its first 200 characters."""

    def __init__(self) -> None:
        super().__init__(_is_clean_head)

    def shown(self, value: Any, path: Path, found: list[Path]) -> Any:
        """Looks further than it shows, so that no secret is cut to something that nobody knows any more."""
        if not isinstance(value, str):
            return super().shown(value, path, found)
        head, had_secrets = redact.head(value)
        if had_secrets:
            found.append(path)
        return head


class ListOf(Kind):
    """A list of one kind."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(lambda value: type(value) is list and all(map(kind.fits, value)))
        self._kind = kind

    def shown(self, value: Any, path: Path, found: list[Path]) -> Any:
        """Item by item."""
        if not isinstance(value, list):
            return super().shown(value, path, found)
        return [_of_kind(self._kind, item, (*path, index), found) for index, item in enumerate(value)]


class Numbers(ListOf):
    """A number, or a list of them; long ones are recorded with every batch of updates."""

    def __init__(self) -> None:
        super().__init__(NUMBER)
        self.fits = lambda value: _is_number(value) or (type(value) is list and set(map(type, value)) <= _NUMBERS)


class Words(ListOf):
    """The words of a command line: the one behind a `--password` is a secret, whatever it looks like."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def shown(self, value: Any, path: Path, found: list[Path]) -> Any:
        """Word by word, with the one before in mind."""
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            return super().shown(value, path, found)
        cleaned = redact.words(value)
        found += [(*path, index) for index, (old, new) in enumerate(zip(value, cleaned, strict=True)) if old != new]
        return cleaned


class MapOf(Kind):
    """Values of one kind by names that others chose. A map with a secret among its names is withheld as a whole."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(self._fits)
        self._kind = kind

    def _fits(self, value: Any) -> bool:
        if type(value) is not dict:
            return value is None
        return not any(map(redact.suspicious, value)) and all(map(self._kind.fits, value.values()))

    def shown(self, value: Any, path: Path, found: list[Path]) -> Any:
        """Value by value; that of a `password` is a secret, whatever it looks like."""
        if not isinstance(value, dict):
            return super().shown(value, path, found)
        if any(redact.secrets(name) for name in value):
            return withheld(value, path, found)
        return {name: self._value(name, item, (*path, name), found) for name, item in value.items()}

    def _value(self, name: str, value: Any, path: Path, found: list[Path]) -> Any:
        if isinstance(value, str) and redact.named(name, value):
            found.append(path)
            return redact.BY_NAME
        return _of_kind(self._kind, value, path, found)


class Members(Kind):
    """An object with these members and no others; null where there is none."""

    def __init__(self, **kinds: Kind) -> None:
        super().__init__(lambda value: (type(value) is dict and _fits(kinds, value)) or value is None)
        self._kinds: Mapping[str, Kind] = kinds

    def shown(self, value: Any, path: Path, found: list[Path]) -> Any:
        """Member by member."""
        if not isinstance(value, dict):
            return super().shown(value, path, found)
        return _shown(self._kinds, value, path, found)


class Anything(Kind):
    """Text, numbers, lists and objects of them to any depth, all of it searched."""

    def __init__(self) -> None:
        super().__init__(_is_clean_text)

    def shown(self, value: Any, path: Path, found: list[Path]) -> Any:
        """By whatever it is."""
        if isinstance(value, list):
            return ListOf(self).shown(value, path, found)
        return MapOf(self).shown(value, path, found) if isinstance(value, dict) else super().shown(value, path, found)


def withheld(value: Any, path: Path, found: list[Path]) -> dict[str, Any]:
    """What stands for something that no record may hold: the SHA-256 and the size of its canonical JSON."""
    found.append(path)
    data = canonical(value).encode("ascii")
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _fits(kinds: Mapping[str, Kind], body: Mapping[str, Any]) -> bool:
    for name, value in body.items():
        kind = kinds.get(name)
        if kind is None:
            return False
        # Numbers, and texts without a secret, are fine as members of every kind: what that saves is most of the cost.
        if type(value) is str:
            if value not in _CLEAN and not kind.fits(value):
                return False
        elif type(value) not in _NUMBERS and not kind.fits(value):
            return False
    return True


def _shown(kinds: Mapping[str, Kind], body: Mapping[str, Any], path: Path, found: list[Path]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in body.items():
        kind = kinds.get(name)
        if kind is not None:
            shown[name] = _of_kind(kind, value, (*path, name), found)
        elif redact.secrets(name):
            # Nor its name. Two of them must not become one.
            place = f"withheld {len(shown)}"
            shown[place] = withheld({name: value}, (*path, place), found)
        else:
            shown[name] = withheld(value, (*path, name), found)
    return shown


def _of_kind(kind: Kind, value: Any, path: Path, found: list[Path]) -> Any:
    return value if kind.fits(value) else kind.shown(value, path, found)


def recorded(name: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy of a body as JSON values, as the record may hold it, and pointers to what in it was replaced.

    Raises AuditError, as `events.plain` does, for what is no JSON value.
    """
    # What `plain` and `shown` do, in one go for the members that nearly all records consist of.
    kinds, told = BODIES[name], {}
    for member, value in body.items():
        kind, of = kinds.get(member), type(value)
        if kind is None:
            break
        if of is str:
            fine = value in _CLEAN or (value.isascii() and kind.fits(value))
        elif of is int:
            fine = -_SAFE_INT < value < _SAFE_INT
        elif of is float:
            fine = math.isfinite(value)
        elif value is None or of is bool:
            fine = True
        else:
            value = plain(value, place=f"body.{member}")
            fine = kind.fits(value)
        if not fine:
            break
        told[member] = value
    else:
        return told, []
    return shown(name, plain(dict(body)))


def shown(name: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The body of a record as it may be written, and pointers to what in it was replaced.

    `body` holds JSON values and nothing else, as `events.plain` leaves them, and is not changed.
    """
    kinds = BODIES[name]
    if _fits(kinds, body):
        return body, []
    found: list[Path] = []
    return _shown(kinds, body, ("body",), found), [_pointer(path) for path in found]


def shown_actor(actor: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same for who caused a record: a name that somebody typed."""
    if _fits(_ACTOR, actor):
        return actor, []
    found: list[Path] = []
    return _shown(_ACTOR, actor, ("actor",), found), [_pointer(path) for path in found]


def _pointer(path: Path) -> str:
    """A JSON Pointer (RFC 6901), from the record."""
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in path)


NUMBER = Kind(_is_number)
"""A number, true, false or null; also a number that JSON has to hold as text."""
DIGEST = Kind(_is_digest)
"""A SHA-256 in lower-case hex, or none."""
WORD = Kind(_is_word)
"""A name, an id, or one of a few words; searched for secrets where it is long enough to hold one."""
TEXT = Kind(_is_clean_text)
"""Text of anybody, searched for secrets."""
HEAD = Head()
OPAQUE = Kind(_is_text)
"""A public key or a signature: what a signature is checked with must not change by a character."""
PAYLOAD = Kind(_is_payload)
"""What stands for a payload that lies apart: its salted commitment and its size."""

_ACTOR: dict[str, Kind] = {"kind": WORD, "id": TEXT}
_FILES = ListOf(Members(name=TEXT, sha256=DIGEST, bytes=NUMBER))
_SIGNALS = ListOf(
    Members(
        level=WORD, metric=WORD, value=NUMBER, low=NUMBER, high=NUMBER, score=NUMBER, since=NUMBER, direction=WORD,
        monitor=WORD, reason=TEXT, once_in=NUMBER, at_once=NUMBER, holds=NUMBER,
    )
)  # fmt: skip
_METRICS = MapOf(NUMBER)
_READINGS = MapOf(Numbers())
_SPAN: dict[str, Kind] = {"from": NUMBER, "to": NUMBER}
_VERSIONS = MapOf(TEXT)
_STATEMENT = Anything()
"""What people sign is asked for without secrets (`approvals.ask`). One that holds some all the same is written without
them, so that no signature fits it: it counts for nothing, which is better than to keep it."""

_DATA: dict[str, Kind] = {
    "kept": NUMBER,
    "proposed": NUMBER,
    "admitted": NUMBER,
    "quarantined": NUMBER,
    "own_share": NUMBER,
    "mean_gain": NUMBER,
    "kept_share": NUMBER,
    "recheck": Members(checked=NUMBER, wrong=NUMBER),
    "digest": DIGEST,
    "reason": TEXT,
}
_STOPPED: dict[str, Kind] = {"update": NUMBER, "readings": _READINGS, "signals": _SIGNALS, "reason": TEXT}
_ASKED: dict[str, Kind] = {
    "by": TEXT,
    "reason": TEXT,
    "request": WORD,
    "freeze": WORD,
    "statement": _STATEMENT,
}
_TOLD: dict[str, Kind] = {
    "event": WORD,
    "type": WORD,
    "endpoint": WORD,
    "kind": WORD,
    "to": TEXT,
    "tries": NUMBER,
    "status": NUMBER,
    "exit_code": NUMBER,
    "output_sha256": DIGEST,
    "output_bytes": NUMBER,
    "reason": TEXT,
    "again": NUMBER,
}
_ANCHOR: dict[str, Kind] = {
    "kind": WORD,
    "place": TEXT,
    "size": NUMBER,
    "where": TEXT,
    "reason": TEXT,
    "required": NUMBER,
}

_POLICY: dict[str, Kind] = {
    "name": WORD,
    "digest": DIGEST,
    "resume": Members(
        approvals=NUMBER,
        people=MapOf(ListOf(OPAQUE)),
        requester_may_approve=NUMBER,
        within_s=NUMBER,
        execute_within_s=NUMBER,
    ),
    "notify": ListOf(Members(endpoint=WORD, kind=WORD, to=TEXT)),
}

_WAY: dict[str, Kind] = {"disposition": WORD, "waives": WORD, "waives_cycles": NUMBER}
_ENDED: dict[str, Kind] = {
    "freeze": WORD,
    "by": TEXT,
    "reason": TEXT,
    **_WAY,
    "approval": WORD,
    "statement": _STATEMENT,
    "statement_sha256": DIGEST,
    "approvals": ListOf(Members(person=TEXT, key=OPAQUE, signature=OPAQUE)),
    "judged": WORD,
    "execute_before": WORD,
}

BODIES: dict[str, dict[str, Kind]] = {
    "log.opened": {"pid": NUMBER, "versions": _VERSIONS, "key": OPAQUE},
    "log.recovered": {"torn_bytes": NUMBER, "digest": DIGEST, "file": WORD},
    "log.left_raw": {"segments": ListOf(WORD), "reason": TEXT},
    "log.pruned": {
        "from": NUMBER,
        "through": NUMBER,
        "hash": DIGEST,
        "epoch": NUMBER,
        "edge": ListOf(DIGEST),
        "digest": DIGEST,
        "bytes": NUMBER,
        "segments": ListOf(WORD),
        "torn": ListOf(WORD),
        "since": WORD,
        "until": WORD,
        "before": WORD,
        "by": TEXT,
        "reason": TEXT,
        "state": Members(
            calls=ListOf(WORD),
            orphans=ListOf(WORD),
            lease=Members(**_SPAN),
            promotion=DIGEST,
            policy=Members(**_POLICY),
            key=OPAQUE,
            freezes=NUMBER,
        ),
    },
    "streams.committed": {"streams": MapOf(Members(seq=NUMBER, hash=DIGEST)), "unreadable": ListOf(WORD)},
    "anchor.kept": {name: _ANCHOR[name] for name in ("kind", "place", "size", "where")},
    "anchor.failed": {name: _ANCHOR[name] for name in ("kind", "place", "size", "reason", "required")},
    "run.started": {
        "command": Words(),
        "seed": NUMBER,
        "versions": _VERSIONS,
        "goes_on": NUMBER,
        "mode": WORD,
        "rank": NUMBER,
        "ranks": NUMBER,
    },
    "run.finished": {"cycles": NUMBER},
    "run.interrupted": {"cycles": NUMBER},
    "run.halted": {**_ENDED, "because": WORD},
    "probation.began": {"cycles": NUMBER, "tighten": NUMBER},
    "probation.ended": {},
    "hold.entered": {"reason": TEXT},
    "hold.ended": {"held_s": NUMBER, "frozen": NUMBER},
    "policy.loaded": _POLICY,
    "policy.adopted": {
        "from": DIGEST,
        "to": DIGEST,
        "change": WORD,
        "by": TEXT,
        "reason": TEXT,
        "approved": DIGEST,
    },
    "model.attached": {
        "weights": DIGEST,
        "config": DIGEST,
        "late": NUMBER,
        "trainer": WORD,
        "by_reward": NUMBER,
        "torch": TEXT,
        "parameters": ListOf(TEXT),
        "threads": NUMBER,
        "cpu": TEXT,
        "matmul": WORD,
        "deterministic": NUMBER,
        "cuda": TEXT,
        "devices": ListOf(TEXT),
        "cudnn_benchmark": NUMBER,
        "cudnn_deterministic": NUMBER,
    },
    "cycle.started": {"result": WORD, "weights": DIGEST},
    "cycle.finished": {"result": WORD, "weights": DIGEST},
    "tool.decided": {
        "call": WORD,
        "tool": WORD,
        "code_sha256": DIGEST,
        "code_head": HEAD,
        "code": PAYLOAD,
        "result": WORD,
        "rule": WORD,
        "reason": TEXT,
        "language": WORD,
        "program_sha256": DIGEST,
        "stdin_sha256": DIGEST,
        "stdin_bytes": NUMBER,
        "stdin": PAYLOAD,
        "files": _FILES,
    },
    "tool.finished": {
        "call": WORD,
        "status": WORD,
        "exit_code": NUMBER,
        "stdout_sha256": DIGEST,
        "stdout": PAYLOAD,
        "stderr": PAYLOAD,
        "stdout_bytes": NUMBER,
        "stderr_bytes": NUMBER,
        "wall_ms": NUMBER,
        "leftovers": NUMBER,
        "files": _FILES,
        "not_fetched": NUMBER,
    },
    "tool.lost": {"call": WORD, "reason": TEXT},
    "tool.observed": {"tool": WORD},
    "tool.egress": {
        "call": WORD,
        "cell": WORD,
        "host": TEXT,
        "port": NUMBER,
        "result": WORD,
        "reason": TEXT,
        "address": TEXT,
        "sent_bytes": NUMBER,
        "received_bytes": NUMBER,
    },
    "data.admitted": {**_DATA, "waived": ListOf(TEXT)},
    "data.refused": {**_DATA, "waived": ListOf(TEXT)},
    "data.quarantined": {"reason": TEXT, "count": NUMBER, "records": ListOf(WORD)},
    "update.leased": _SPAN,
    "update.applied": {
        **_SPAN,
        "readings": _READINGS,
        "notes": _SIGNALS,
        "notes_left_out": NUMBER,
        "overflows": NUMBER,
        "absent": ListOf(WORD),
    },
    "update.withheld": _STOPPED,
    "update.skipped": _STOPPED,
    "update.overflowed": {"count": NUMBER},
    "update.expected": {"kind": WORD, "at": NUMBER, "span": NUMBER},
    "update.settled": {**_SPAN, "restored": DIGEST},
    "eval.finished": {"panel": _METRICS, "unjudged": _METRICS},
    "promotion.decided": {
        "result": WORD,
        "rule": WORD,
        "reason": TEXT,
        "panel": _METRICS,
        "previous": _METRICS,
        "weights": DIGEST,
    },
    "promotion.applied": {"actor": DIGEST},
    "promotion.settled": {"snapshot": DIGEST, "applied": NUMBER},
    "promotion.rolled_back": {"from": DIGEST, "to": DIGEST, "cycle": NUMBER, "by": TEXT, "reason": TEXT},
    "actor.synced": {"update": NUMBER, "purpose": WORD, "result": WORD, "reason": TEXT},
    "checkpoint.saved": {"checkpoint": TEXT, "update": NUMBER, "weights": DIGEST, "state": DIGEST},
    "checkpoint.loaded": {"checkpoint": TEXT, "update": NUMBER, "weights": DIGEST},
    "snapshot.written": {"snapshot": DIGEST, "update": NUMBER, "promoted": NUMBER},
    "snapshot.restored": {"snapshot": DIGEST, "because": TEXT, "weights": DIGEST},
    "freeze.requested": _ASKED,
    "freeze.foreseen": {**_STOPPED, "rule": WORD},
    "freeze.entered": {
        "freeze": WORD,
        "gate": WORD,
        "rule": WORD,
        "reason": TEXT,
        "signals": _SIGNALS,
        "update": NUMBER,
        "epoch": NUMBER,
        "restored": DIGEST,
        "capsule": WORD,
        "capsule_digest": DIGEST,
        "capsule_lacks": MapOf(TEXT),
        "capsule_trouble": TEXT,
        "next": ListOf(TEXT),
    },
    "resume.requested": {**_ASKED, **_WAY},
    "approval.given": {
        "request": WORD,
        "approval": WORD,
        "person": TEXT,
        "key": OPAQUE,
        "signature": OPAQUE,
        "statement_sha256": DIGEST,
        "of": NUMBER,
    },
    "approval.refused": {
        "request": WORD,
        "approval": WORD,
        "code": WORD,
        "reason": TEXT,
        "person": TEXT,
        "key": OPAQUE,
    },
    "resume.applied": _ENDED,
    "notify.sent": {name: kind for name, kind in _TOLD.items() if name not in {"reason", "again"}},
    "notify.failed": {
        name: _TOLD[name] for name in ("event", "type", "endpoint", "kind", "to", "reason", "again", "tries")
    },
    "note.requested": _ASKED,
    "note.added": {"by": TEXT, "text": TEXT},
    "blob.dropped": {"count": NUMBER, "commitments": ListOf(DIGEST)},
    "blob.erased": {"by": TEXT, "reason": TEXT, "commitments": ListOf(DIGEST)},
    "sandbox.created": {
        "cell": WORD,
        "image": TEXT,
        "image_id": WORD,
        "runtime": WORD,
        "python": TEXT,
        "languages": ListOf(WORD),
        "counters": Anything(),
        "attested": NUMBER,
    },
    "sandbox.removed": {"cell": WORD, "reason": WORD, "detail": TEXT, "calls": NUMBER},
    "sandbox.reaped": {"cell": WORD},
}
