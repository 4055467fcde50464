"""What stands for the front of a log that was removed: the record that says so, and its copy beside the log.

`log.pruned` is a record like any other, so that the chain, a checkpoint and an anchor cover it. It comes long after
what it speaks of. `pruned.json` holds its very line, for readers who begin at the first record that is left: with it
they know which hash comes before, what the tree was, and what was under way. A copy that no record in the chain agrees
with proves nothing and excuses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.audit.events import MAX_LINE_BYTES, BadLineError, Entry, Head, decode, is_digest, printable
from loopguard.audit.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FILE = "pruned.json"
RECORD = "log.pruned"

_NUMBERS = range(2**53)


class BadPrunedError(ValueError):
    """A record or a file that does not say what was pruned. The message is the reason."""


@dataclass(frozen=True, slots=True)
class State:
    """What was under way behind the last record that was pruned, so that what follows can be judged."""

    calls: tuple[str, ...] = ()
    """Calls that were allowed and had not ended."""
    orphans: tuple[str, ...] = ()
    """The same, of a process that had ended."""
    lease: tuple[int, int] | None = None
    promotion: str | None = None
    """The weights that a promotion decision allowed, and that were not promoted yet."""
    policy: Mapping[str, Any] | None = None
    """The body of the last `policy.loaded`."""
    key: str = ""
    """The vkey of the key that signed."""
    freezes: int = 0
    """How many freezes there had been."""

    def facts(self) -> dict[str, Any]:
        """What the record holds of it."""
        lease = {"from": self.lease[0], "to": self.lease[1]} if self.lease else None
        facts: dict[str, Any] = {"calls": list(self.calls), "orphans": list(self.orphans), "lease": lease}
        policy = dict(self.policy) if self.policy is not None else None
        return facts | {"promotion": self.promotion, "policy": policy, "key": self.key, "freezes": self.freezes}

    @classmethod
    def read(cls, facts: Any) -> State:
        """The state that a record holds. Raises BadPrunedError."""
        if not isinstance(facts, dict):
            raise BadPrunedError("has no state")
        lease, policy = facts.get("lease"), facts.get("policy")
        promotion = facts.get("promotion")
        if not (promotion is None or isinstance(promotion, str)) or not (policy is None or isinstance(policy, dict)):
            raise BadPrunedError("has a state with a member of the wrong type")
        return cls(
            calls=_strings(facts.get("calls")),
            orphans=_strings(facts.get("orphans")),
            lease=(_count(lease, "from"), _count(lease, "to")) if lease is not None else None,
            promotion=promotion,
            policy=policy,
            key=_text(facts, "key"),
            freezes=_count(facts, "freezes"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a `log.pruned` record says."""

    entry: Entry
    """The record itself."""
    first: int
    """The first record that this pruning took away; those before it were gone already."""
    last: Head
    """The last record that is gone."""
    epoch: int
    tree: Tree
    """Over all records up to the last one that is gone."""
    since: str
    until: str
    segments: tuple[str, ...]
    torn: tuple[str, ...]
    state: State
    by: str
    reason: str

    @property
    def record(self) -> tuple[int, str]:
        """Number and hash of the record."""
        return self.entry.seq, self.entry.hash

    @classmethod
    def of(cls, entry: Entry) -> Pruned:
        """What a record says. Raises BadPrunedError."""
        if entry.type != RECORD:
            raise BadPrunedError(f"is a {entry.type} record")
        body = entry.body
        last = Head(_count(body, "through"), _text(body, "hash"))
        first = _count(body, "from")
        if not 0 < first <= last.seq < entry.seq or not is_digest(last.hash):
            raise BadPrunedError("does not say which records went")
        if not is_digest(_text(body, "digest")) or not _count(body, "bytes") or not _text(body, "before"):
            raise BadPrunedError("does not say what they held")
        return cls(
            entry=entry,
            first=first,
            last=last,
            epoch=_count(body, "epoch"),
            tree=_tree(body.get("edge"), last.seq),
            since=_text(body, "since"),
            until=_text(body, "until"),
            segments=_strings(body.get("segments")),
            torn=_strings(body.get("torn")),
            state=State.read(body.get("state")),
            by=_text(body, "by"),
            reason=_text(body, "reason"),
        )

    def told(self) -> str:
        """One sentence for people."""
        when = f"{self.until[:19]}Z" if self.until else "an unknown time"
        return printable(
            f"records 1-{self.last.seq} (up to {when}) were pruned by {self.by} at {self.entry.ts[:19]}Z: {self.reason}"
        )


def read(folder: Path) -> Pruned | None:
    """What the copy beside a log says; None where there is none. Raises BadPrunedError, OSError."""
    try:
        with (folder / FILE).open("rb") as file:
            line = file.read(MAX_LINE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not line.endswith(b"\n") or len(line) > MAX_LINE_BYTES:
        raise BadPrunedError("is not one line")
    try:
        entry = decode(line[:-1])
    except BadLineError as error:
        raise BadPrunedError(str(error)) from error
    return Pruned.of(entry)


def through(folder: Path) -> int:
    """The last record that is gone, by the copy beside a log; 0 where there is none, or where it cannot be read.

    Raises OSError.
    """
    try:
        found = read(folder)
    except BadPrunedError:
        return 0  # whoever verifies says so; to others the front is there, or missing without an excuse
    return found.last.seq if found is not None else 0


class Front:
    """The front of one log under verification: where the records that are left begin, and whether the chain says so."""

    def __init__(self) -> None:
        self.pruned: Pruned | None = None
        self._trouble = ""
        self._file = Path(FILE)
        self._agreed = False
        self._newest: Pruned | None = None
        """What the last such record in the chain says."""

    def read(self, folder: Path) -> None:
        """Take in what lies beside the log. Raises OSError."""
        self._file = folder / FILE
        try:
            self.pruned = read(folder)
        except BadPrunedError as error:
            self._trouble = f"{self._file}: {error}"

    @property
    def gone(self) -> int:
        """The last record that is gone."""
        return self.pruned.last.seq if self.pruned is not None else 0

    def take(self, entry: Entry) -> str:
        """Take in a `log.pruned` record of the chain; what is wrong with it, or the empty string."""
        if self.pruned is not None and (entry.seq, entry.hash) == self.pruned.record:
            self._agreed = True
        try:
            self._newest = Pruned.of(entry)
        except BadPrunedError as error:
            return f"what it says of pruned records {error}"
        return ""

    def judge(self) -> str:
        """At the end of the chain: what is wrong, or the empty string."""
        if not self._trouble and self.pruned is not None and not self._agreed:
            told = f"{self._file}: says that records 1-{self.gone} were pruned, and no record of the log agrees"
            self._trouble = f"{told}: the front was removed"
        return self._trouble

    @property
    def unfinished(self) -> Pruned | None:
        """A pruning that the chain tells of and that was not carried out, since a crash came in between."""
        newest = self._newest
        return newest if newest is not None and newest.last.seq > self.gone else None


def _tree(edge: Any, size: int) -> Tree:
    nodes = _strings(edge)
    if len(nodes) != size.bit_count() or not all(is_digest(node) for node in nodes):
        raise BadPrunedError(f"does not have the edge of a tree of {size} records")
    return Tree(size, tuple(bytes.fromhex(node) for node in nodes))


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not _all_text(value):
        raise BadPrunedError("has a list of the wrong type")
    return tuple(value)


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise BadPrunedError(f"has no {name}")
    return value


def _count(body: Any, name: str) -> int:
    value = body.get(name) if isinstance(body, dict) else None
    if type(value) is not int or value not in _NUMBERS:
        raise BadPrunedError(f"has no {name}")
    return value
