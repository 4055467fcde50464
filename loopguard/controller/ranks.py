"""Several ranks of one run come to one decision, so that all of them freeze on the same update.

Each rank judges what it sees by itself. Before anything is done about it the verdicts of all ranks are reduced, and the
gravest is what every rank acts on. The reduction runs at the same places on every rank, also while all is quiet: only
verdicts may differ, never the sequence of collectives. So what a rank notices in between (a latch, a request, a full
disk) waits for the next of these places.

Here is what needs no torch; how ranks talk is the business of an integration, which gives the `Peers`.
"""

from __future__ import annotations

import math
import os
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from loopguard.audit import read
from loopguard.errors import DiskError, UsageError
from loopguard.snapshots import Promoted, Slot, SnapshotStore
from loopguard.state import CONTROLLER
from loopguard.types import Decision

if TYPE_CHECKING:
    from pathlib import Path

    from loopguard.policy.schema import GuardPolicy

At = Literal["update", "overflow", "promote", "apply", "cycle"]
"""Where the ranks agree. An update whose gradients do not fit is a place of its own: all overflow, or none."""

QUIET = Decision(result="allow", gate="update", rule="default", reason="this rank has nothing to say")
_PLACES = get_args(At)
_FIXED = ("other", "device", "latch", "request", "tool", "data", "operator", "audit", "unwritable", "monitor_error")
_CODE_BITS, _RANK_BITS = 16, 24
_LEVELS = ("allow", "deny", "skip", "freeze", "freeze and undo")
_FREEZE, _UNDO = 3, 4
_LAYOUT_S = 60.0
"""How long a rank waits for rank 0 to lay out the run directory."""

_LAYOUT_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many ranks a process is."""

    rank: int
    count: int

    @property
    def leads(self) -> bool:
        """Whether this is the rank that owns the run directory and its `controller` stream."""
        return self.rank == 0

    @property
    def stream(self) -> str:
        """The stream of the audit log that this rank writes."""
        return CONTROLLER if self.leads else f"rank-{self.rank}"


class Peers(Protocol):
    """How the ranks of a run talk. Every method is a collective: all ranks call it, in the same order.

    What keeps the ranks from talking (a dead one, a time-out) is raised as ConnectionError, once and ever after.
    """

    @property
    def place(self) -> Place:
        """Which of how many."""
        ...

    def start(self, numbers: list[int]) -> Any:
        """Begin to take the greatest of each number over all ranks, without waiting."""
        ...

    def finish(self, started: Any) -> list[int]:
        """Wait for what was begun and give the numbers."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, in their order."""
        ...

    def save(self, root: Path, slot: Slot, facts: Mapping[str, Any]) -> str:
        """Write one snapshot of all ranks and give its digest. No other collective waits for this one.

        Raises DiskError, on all ranks.
        """
        ...

    def load(self, root: Path, digest: str, live: Callable[[], Any]) -> Any:
        """Read such a snapshot; sharded tensors are loaded into those of the live state.

        Raises SnapshotError, on all ranks.
        """
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that was put to all ranks, and what this one says to it."""

    own: Decision
    at: At
    number: int
    started: Any


class Consensus:
    """What the ranks of a run come to together; with one rank, whatever that one says.

    Lives as long as its guard. `join` gives it the other ranks.
    """

    def __init__(self, place: Place, policy: GuardPolicy) -> None:
        self.place = place
        self.stopped = False
        """Whether all ranks know that the run is frozen."""
        self.lost = ""
        """Why the ranks cannot agree any more; else empty."""
        self._rules = _rules(policy)
        self._peers: Peers | None = None
        self._said: Decision | None = None
        self._norm = 0

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.place.count > 1

    @property
    def binds(self) -> bool:
        """Whether this rank may not freeze by itself. Rank 0 may, as long as the others have not come."""
        return self.several and (self._peers is not None or not self.place.leads)

    @property
    def said(self) -> Decision | None:
        """A freeze that this rank knows of and has not told the others yet."""
        return self._said

    @property
    def peers(self) -> Peers:
        """The ranks. Raises UsageError before `join`."""
        if self._peers is None:
            raise UsageError(
                f"this is rank {self.place.rank} of {self.place.count}: call guard.attach(...) on every rank first"
            )
        return self._peers

    def join(self, peers: Peers | None) -> None:
        """Take the other ranks in. Raises UsageError where they are not those that this process was started with."""
        if peers is None and self.several:
            raise UsageError(
                f"this is rank {self.place.rank} of {self.place.count}, and torch.distributed has no process group: "
                "call init_process_group before guard.attach(...)"
            )
        if peers is not None and peers.place != self.place:
            raise UsageError(
                f"this guard was opened as rank {self.place.rank} of {self.place.count} and is attached as rank "
                f"{peers.place.rank} of {peers.place.count}: start the ranks with torchrun, or call "
                "init_process_group before LoopGuard.from_file"
            )
        self._peers = peers

    def say(self, decision: Decision, *, roll_back: bool) -> None:
        """Keep a freeze until the ranks agree next. The first one gives the reason, any of them the rollback."""
        said = self._said or decision
        undo = roll_back or (self._said is not None and not self._said.facts["withheld_in_time"])
        self._said = replace(said, facts={**said.facts, "withheld_in_time": not undo})

    def resumed(self) -> None:
        """The freeze is over, and what was said of it."""
        self.stopped, self._said = False, None

    def same_norm(self, norm: float) -> None:
        """Keep a gradient norm that was judged without the others; they compare it when they talk next."""
        (self._norm,) = struct.unpack("<q", struct.pack("<d", abs(norm) if not math.isnan(norm) else math.nan))

    def ask(self, own: Decision, *, at: At, number: int) -> Asked:
        """Put a decision of this rank to all of them, and do not wait for theirs.

        `number` is what has to be the same everywhere: that of the update or cycle.
        """
        own = self._gravest(own)
        if not self.several:
            return Asked(own, at, number, None)
        where = number * len(_PLACES) + _PLACES.index(at)
        norm, self._norm = self._norm, 0
        # Of equal verdicts that of the lowest rank counts.
        verdict = (_level(own) << _CODE_BITS | self._code(own)) << _RANK_BITS | self.place.count - 1 - self.place.rank
        try:
            started = self.peers.start([verdict, where, -where, norm, -norm])
        except ConnectionError as error:
            self.lost = self.lost or str(error)
            started = None
        return Asked(own, at, number, started)

    def answer(self, asked: Asked) -> Decision:
        """What all ranks do about it. A freeze says in `facts` whether the update was `withheld_in_time`."""
        if not self.several:
            return asked.own
        if asked.started is None:
            return self._alone(asked)
        try:
            verdict, last, first, most, least = self.peers.finish(asked.started)
        except ConnectionError as error:
            self.lost = self.lost or str(error)
            return self._alone(asked)
        if last != -first:
            return self._apart(_places_apart(-first, last), undo=False)
        if most != -least:
            return self._apart(
                "the last gradient norm differs between ranks, so their weights have come apart", undo=True
            )
        level, code, back = _taken_apart(verdict)
        rank = self.place.count - 1 - back
        if not level:
            return asked.own
        told = self._told(asked.own)
        if rank == self.place.rank:
            return asked.own
        return _named(told[rank] if told is not None else _decision(level, self._rules[code]), rank)

    def _gravest(self, own: Decision) -> Decision:
        return self._said if self._said is not None and _level(self._said) >= _level(own) else own

    def _told(self, own: Decision) -> list[Decision] | None:
        """Everybody's own decision; None where a rank went away in the meantime."""
        try:
            return self.peers.gather(own)
        except ConnectionError as error:
            self.lost = self.lost or str(error)
            return None

    def _alone(self, asked: Asked) -> Decision:
        """The ranks cannot agree: nothing may move."""
        if _level(asked.own) >= _FREEZE:
            return asked.own
        why = f"the ranks could not agree at {asked.at} {asked.number}: {self.lost}"
        return _freeze("consensus", why, undo=False)

    def _apart(self, why: str, *, undo: bool) -> Decision:
        # Everybody sees the same two numbers, so everybody gets here.
        return _freeze("mismatch", why, undo=undo)

    def _code(self, decision: Decision) -> int:
        for name in (decision.rule, decision.gate):
            if name in self._rules:
                return self._rules.index(name)
        return 0


class SharedStore(SnapshotStore):
    """The snapshots that the ranks of a run have in common: all write each of them, rank 0 points and prunes."""

    def __init__(self, root: Path, peers: Peers, live: Callable[[], Any]) -> None:
        super().__init__(root)
        self._peers = peers
        self._live = live

    def write(self, state: Any, facts: Mapping[str, Any] | None = None, *, into: Path | None = None) -> str:
        """Write a slot on every rank, under one name. A collective. Raises DiskError on all of them."""
        assert isinstance(state, Slot)
        assert into is None
        try:
            return self._peers.save(self.root, state, state.facts if facts is None else facts)
        except ConnectionError as error:
            raise DiskError(f"{self.root}: the ranks could not write a snapshot together: {error}") from error

    def read(self, digest: str, *, of: Path | None = None) -> Any:
        """The state of this rank. A collective. Raises SnapshotError on all of them."""
        return self._peers.load(of or self.root, digest, self._live)

    def promote(self, promoted: Promoted) -> None:
        """Point at another snapshot, on rank 0."""
        if self._peers.place.leads:
            super().promote(promoted)

    def prune(self, *, keep: set[str]) -> None:
        """Remove every other snapshot, on rank 0."""
        if self._peers.place.leads:
            super().prune(keep=keep)


def place() -> Place:
    """Which rank this process is: as torch.distributed has it, or else as torchrun says in the environment.

    Raises UsageError where the environment says something impossible.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return Place(distributed.get_rank(), distributed.get_world_size())
    said = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if said[0] is None or said[1] is None:
        return Place(0, 1)  # torchrun sets both; one of them may be anybody's
    try:
        rank, count = int(said[0]), int(said[1])
    except ValueError:
        rank, count = -1, 0
    if not 0 <= rank < count:
        raise UsageError(f"RANK={said[0]} and WORLD_SIZE={said[1]} in the environment do not say which rank this is")
    return Place(rank, count)


def await_layout(run_dir: Path) -> None:
    """Wait until rank 0 has laid out the run directory and begun its log, which every rank reads.

    Raises UsageError where that does not come.
    """
    deadline = time.monotonic() + _LAYOUT_S
    while not (there := (run_dir / "run.json").exists()) or not read.segments(run_dir):
        if time.monotonic() > deadline:
            what = "audit log" if there else "run.json"
            raise UsageError(
                f"{run_dir} has no {what} after {_LAYOUT_S:g} s: rank 0 did not open it, or has another disk"
            )
        time.sleep(_LAYOUT_POLL_S)


def compare(standings: list[dict[str, Any]]) -> None:
    """Raise UsageError where the ranks do not guard the same run in the same way."""
    first = standings[0]
    for rank, other in enumerate(standings):
        for name, what in _SAME.items():
            if other[name] != first[name]:
                raise UsageError(f"rank {rank} has {what} {other[name]} and rank 0 has {first[name]}")


_SAME = {
    "run": "a run directory with id",
    "policy": "the guard policy",
    "late": "updates decided late:",
}


def _rules(policy: GuardPolicy) -> list[str]:
    """The rules that a freeze may name. All ranks have the same policy, so a place in the list says the same to all."""
    watched = [f"{rule.kind}:{rule.metric}" for rule in policy.updates.monitors]
    missing = [f"missing:{rule.metric}" for rule in policy.updates.monitors]
    panel = [f"{kind}:{one.metric}" for one in policy.promotion.panel for kind in ("domain", "change", "eprocess")]
    return [*_FIXED, *sorted({*missing, *watched, *panel})]


def _level(decision: Decision) -> int:
    if decision.result == "freeze":
        return _FREEZE if decision.facts.get("withheld_in_time") else _UNDO
    return _LEVELS.index(decision.result) if decision.result in _LEVELS else _FREEZE


def _taken_apart(verdict: int) -> tuple[int, int, int]:
    back = verdict & ((1 << _RANK_BITS) - 1)
    code = verdict >> _RANK_BITS & ((1 << _CODE_BITS) - 1)
    return verdict >> (_RANK_BITS + _CODE_BITS), code, back


def _decision(level: int, rule: str) -> Decision:
    """As much of a decision as the verdict alone tells."""
    if level >= _FREEZE:
        return _freeze(rule, "it went away before it could say more", undo=level == _UNDO)
    reason = "it went away before it could say more"
    return Decision(result="skip" if level > 1 else "deny", gate="update", rule=rule, reason=reason)


def _named(decision: Decision, rank: int) -> Decision:
    return replace(decision, reason=f"rank {rank} tripped {decision.rule}: {decision.reason}")


def _freeze(rule: str, reason: str, *, undo: bool) -> Decision:
    facts = {"withheld_in_time": not undo}
    return Decision(result="freeze", gate="update", rule=rule, reason=reason, facts=facts)


def _places_apart(first: int, last: int) -> str:
    one, other = (f"{_PLACES[where % len(_PLACES)]} {where // len(_PLACES)}" for where in (first, last))
    return f"the ranks are not at the same place: one is at {one}, another at {other}"
