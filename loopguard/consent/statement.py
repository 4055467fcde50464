"""The rule that says who may let a run go on, the statement that they sign, and why an approval may not count."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, Self, get_args

from loopguard.types import NOTHING, Disposition, WayOn

PolicyChange = Literal["none", "tightened", "loosened"]

Code = Literal[
    "no_statement", "malformed", "other_freeze", "head", "policy", "target", "replayed", "expired", "clock", "new_trip",
    "superseded", "interrupted", "halted",
    "nothing_pending", "unreadable", "namespace", "algorithm", "unknown_key", "key_expired", "wrong_bytes", "requester",
    "same_person",
]  # fmt: skip
"""Those of the first two lines can end a request; the others, and some of them, refuse one approval."""

SENTENCES: dict[Code, str] = {
    "no_statement": "the guard policy asks for approvals, and this request has no statement that people could sign",
    "malformed": "the statement is not one of this run, or gives itself more than the guard policy does",
    "other_freeze": "the statement is about a freeze that is not in force",
    "head": "the statement was made from a log that is not this one",
    "policy": "the guard policy is not the one that the statement names",
    "target": "the run would go back to another snapshot than the statement names",
    "replayed": "the nonce of the statement was used before",
    "expired": "the time for approvals is over",
    "clock": "the clock ran backward while the request waited",
    "new_trip": "something asked for a freeze, or froze the run, after the request",
    "superseded": "another request took its place",
    "interrupted": "the process that counted the approvals died before it could act on them",
    "halted": "the run was halted, and nothing lets it go on: begin a new one",
    "nothing_pending": "no request waits for an approval",
    "unreadable": "this is no SSH signature",
    "namespace": "the signature is for another purpose than loopguard-approve@v1",
    "algorithm": "the signature is of a kind that is not taken",
    "unknown_key": "the key belongs to nobody whom the guard policy names",
    "key_expired": "the key does not count at this time",
    "wrong_bytes": "the signature is not over the statement that waits",
    "requester": "whoever asks may not approve",
    "same_person": "this person has approved already, and counts once",
}

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MOST_S = 1e8
MOST_APPROVALS = 64
"""Of one resume. A guard policy asks for far fewer; a record that names thousands is not to keep a reader busy."""
_NONCE = re.compile(r"[0-9a-f]{32}")


class RefusedError(ValueError):
    """An approval, or a request, that does not count. Carries its code; the message is the sentence."""

    def __init__(self, code: Code, *, person: str | None = None, key: str | None = None, more: str = "") -> None:
        self.code = code
        self.person = person
        self.key = key
        super().__init__(SENTENCES[code] + (f": {more}" if more else ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Who has to agree, as a guard policy says it and as `policy.loaded` records it."""

    approvals: int
    """How many people."""
    people: Mapping[str, tuple[str, ...]]
    """The lines of each person's keys."""
    requester_may_approve: bool
    within_s: float
    """How long a request waits."""
    execute_within_s: float
    """How long a run that was let go on may wait for its start."""

    @classmethod
    def read(cls, value: Any) -> Self:
        """The rule in a record. Raises ValueError where it is none."""
        try:
            people = {str(name): _key_lines(keys) for name, keys in value["people"].items()}
            rule = cls(
                approvals=value["approvals"],
                people=people,
                requester_may_approve=value["requester_may_approve"],
                within_s=value["within_s"],
                execute_within_s=value["execute_within_s"],
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no rule about resumes: {error}") from error
        if not all(type(s) in (int, float) and 0 < s <= _MOST_S for s in (rule.within_s, rule.execute_within_s)):
            raise ValueError(f"no rule about resumes: it lasts {rule.within_s!r} and {rule.execute_within_s!r} seconds")
        if type(rule.approvals) is not int or not 1 <= rule.approvals <= MOST_APPROVALS:
            raise ValueError(f"no rule about resumes: {rule.approvals!r} approvals")
        if type(rule.requester_may_approve) is not bool:
            raise ValueError(f"no rule about resumes: requester_may_approve is {rule.requester_may_approve!r}")
        return rule

    def facts(self) -> dict[str, Any]:
        """What `policy.loaded` holds of it."""
        return asdict(self) | {"people": {name: list(keys) for name, keys in self.people.items()}}

    def weaker_than(self, other: Rule) -> bool:
        """Whether somebody could resume under this rule who could not under the other."""
        keys = {(name, line) for name, lines in self.people.items() for line in lines}
        known = {(name, line) for name, lines in other.people.items() for line in lines}
        return (
            self.approvals < other.approvals
            or self.requester_may_approve > other.requester_may_approve
            or self.within_s > other.within_s
            or self.execute_within_s > other.execute_within_s
            or not keys <= known
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a person signs: this run, this freeze, this state of the log, this way on, and nothing else.

    Any change of a member is another statement, and no signature over this one counts for it.
    """

    run: str
    freeze: str
    entered: str
    """Hash of the record that entered the freeze."""
    head_seq: int
    head_hash: str
    """Of the log's last record when it was asked."""
    disposition: Disposition
    """What becomes of the frozen cycle."""
    target: str
    """The snapshot that the run goes on from, "nothing" where that is its beginning; with `accept` the digest of
    the capsule that holds the state to go on from."""
    waives: str
    """As in `WayOn`."""
    waives_cycles: int
    policy: str
    """Digest of the guard policy in force."""
    policy_change: PolicyChange
    next_policy: str
    """Digest of the guard policy that the run goes on under; the same one unless something changes."""
    reason: str
    requester: str
    not_before: str
    expires: str
    nonce: str

    @classmethod
    def read(cls, value: Any) -> Self:
        """The statement in a request or a record. Raises ValueError naming the member that is wrong."""
        if not isinstance(value, dict) or type(value.get("v")) is not int or value["v"] != 1:
            raise ValueError("it is not a statement of version 1")
        fields: dict[str, Any] = {name: value.get(name) for name in cls.__slots__}
        if value.keys() != {*fields, "v"}:
            raise ValueError("it does not have the members of a statement")
        for name, given in fields.items():
            if not _fits(name, given):
                raise ValueError(f"{name} is {given!r}"[:120])
        WayOn.read(fields)
        return cls(**fields)

    @property
    def way(self) -> WayOn:
        """How the run goes on."""
        return WayOn(disposition=self.disposition, waives=self.waives, waives_cycles=self.waives_cycles)

    def facts(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"v": 1}

    def signed_bytes(self) -> bytes:
        """What is signed, byte for byte: canonical JSON (sorted keys, no spaces, ASCII) and one newline."""
        text = json.dumps(self.facts(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return text.encode("ascii") + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 of what is signed."""
        return hashlib.sha256(self.signed_bytes()).hexdigest()


def read_time(value: Any) -> str:
    """A time as records have it. Raises ValueError where it is none."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError(f"{value!r} is no time of a record"[:120])
    datetime.fromisoformat(value)  # which a 30 February is spelled like
    return value


def _key_lines(value: Any) -> tuple[str, ...]:
    """The lines of a person's keys. Raises TypeError where they are none."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(line, str) for line in value):
        raise TypeError("the keys of a person are not lines of text")
    return tuple(value)


def _fits(name: str, value: Any) -> bool:
    if name in ("head_seq", "waives_cycles"):
        return type(value) is int and (name == "head_seq") <= value < 2**53
    if type(value) is not str or not value:
        return False
    match name:
        case "not_before" | "expires":
            return _TIME.fullmatch(value) is not None
        case "entered" | "head_hash" | "policy" | "next_policy":
            return _HEX64.fullmatch(value) is not None
        case "target":
            return value == NOTHING or _HEX64.fullmatch(value) is not None
        case "nonce":
            return _NONCE.fullmatch(value) is not None
        case "disposition":
            return value in get_args(Disposition)
        case "policy_change":
            return value in get_args(PolicyChange)
        case _:
            return len(value) <= 8192
