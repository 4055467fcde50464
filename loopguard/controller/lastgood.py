"""The state that a freeze goes back to: in memory at once, on disk beside the next cycle.

At a boundary (attach, and every promotion) the whole state is copied in place into a slot of memory. The pointer flips
to that slot when the promotion has been applied, and a thread writes the slot to disk: `snapshot.written` in the log,
then `snapshots/promoted.json`, whose replacement is what a start goes by. A process that dies before that goes on from
the promotion before; `directory` settles it.

Also here: the tape of the batches since the boundary, from which a capsule can be replayed.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loopguard.errors import LoopGuardError
from loopguard.snapshots import Promoted, Ring, SnapshotStore, Tape, Writer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from loopguard.audit.log import AuditLog
    from loopguard.snapshots import Slot, Written


class LastGood:
    """The last-good state of one run. Lives as long as its guard; `close` waits until all of it is on disk."""

    def __init__(self, run_dir: Path, log: AuditLog, *, keep: int, tape_bytes: int) -> None:
        self.store = SnapshotStore(run_dir / "snapshots")
        self.promoted: Promoted | None = self.store.promoted()
        self.tape = Tape(limit_bytes=tape_bytes)
        self._before: tuple[Slot | None, Tape] | None = None
        """The tape of what led to the boundary, and what it started from."""
        self.anchor: Slot | None = None
        """What the tape starts from: the boundary, or a state in the middle of a cycle."""
        self._log = log
        self._keep = keep
        self._ring = Ring()
        self._writer = Writer(self.store)
        self._under_way: Written | None = None
        self._lost: Exception | None = None
        self._digest: str | None = self.promoted.snapshot if self.promoted else None
        self._beneath: str | None = None
        """The boundary that a rollback goes back to, where people have accepted another state since."""

    def share(self, store: SnapshotStore, promoted: Promoted | None) -> None:
        """From now on the ranks write each snapshot together, and rank 0 has said what is promoted."""
        self._writer.close()
        self.store, self._writer = store, Writer(store)
        self.promoted = promoted
        self._digest = promoted.snapshot if promoted else None

    @property
    def held(self) -> bool:
        """Whether there is a boundary to go back to."""
        return self._ring.approved is not None

    def begin(self, state: Any, facts: Mapping[str, Any]) -> None:
        """Start from a state that nobody promoted: that of a run's beginning."""
        self._flip(self.take(state, facts))
        self._under_way = self._writer.submit(self._approved(), facts, self._written)

    def go_on(self) -> Any:
        """The promoted state, from disk. Raises SnapshotError where it is missing or damaged."""
        assert self.promoted is not None
        return self.store.read(self.promoted.snapshot)

    def adopt(self, state: Any, facts: Mapping[str, Any], *, name: str | None = None) -> None:
        """Hold the promoted state that was just restored; with the name of its snapshot, one that people accepted."""
        if name is not None and self._beneath is None:
            self._beneath = self.digest()
        self._flip(self.take(state, facts))
        self._digest = name or self._digest
        self._prune()

    @property
    def accepted(self) -> bool:
        """Whether the boundary is a state that people accepted and nobody promoted."""
        return self._beneath is not None

    def beneath(self) -> Any:
        """The boundary before it, which is so again from now on, from disk. Raises SnapshotError where it is gone."""
        assert self._beneath is not None
        state = self.store.read(self._beneath)
        self._digest, self._beneath = self._beneath, None
        return state

    def take(self, state: Any, facts: Mapping[str, Any]) -> Slot:
        """Copy a state into memory: a candidate, until `promote`.

        Raises DiskError where the one before did not reach the disk.
        """
        self.wait()
        return self._ring.take(state, facts)

    def promote(self, slot: Slot, *, cycle: int, update: int, panel: dict[str, float]) -> None:
        """From now on a freeze goes back to this slot."""
        self._before = self.anchor, self.tape
        self.tape = Tape(limit_bytes=self.tape.limit_bytes)
        self._flip(slot)
        self.promoted = Promoted(snapshot="", cycle=cycle, update=update, panel=panel)

        def written(digest: str) -> None:
            self._log.append("snapshot.written", {"snapshot": digest, "update": update, "promoted": True}, cycle=cycle)
            promoted = Promoted(snapshot=digest, cycle=cycle, update=update, panel=panel)
            self.store.promote(promoted)
            self.promoted = promoted
            self._digest = digest
            self._prune()

        self._digest = self._beneath = None
        self._under_way = self._writer.submit(slot, slot.facts, written)

    def roll_back(self, snapshot: str) -> None:
        """Point at an earlier promotion. Raises SnapshotError where it is not one of them, DiskError."""
        self.promoted = self.store.roll_back(snapshot)
        self._digest = snapshot

    def state(self) -> Any:
        """The boundary's state. Its tensors are the slot's own: copy them."""
        return self._approved().state()

    def digest(self) -> str | None:
        """The name of the boundary's snapshot; waits until it is on disk. None where it cannot get there."""
        with suppress(LoopGuardError):  # `check` says so at the next gate; a freeze does not wait for a mended disk
            self.wait()
        return self._digest

    def replayable(self) -> tuple[Slot | None, Tape]:
        """Where a replay starts, and what it goes through.

        That is what happened since the boundary; where nothing has, as in a freeze over data, it is what led to the
        boundary, and so to the actor that the freeze is about.
        """
        return self._before if self.tape.empty and self._before is not None else (self.anchor, self.tape)

    def shorten(self, state: Any, facts: Mapping[str, Any]) -> None:
        """Start the tape anew from a state in the middle of the cycle, since it has grown past its bound."""
        self.anchor = self._ring.take_midway(state, facts)
        # The batch at hand comes after it: where the device decides, the forward pass is a step ahead.
        self.tape.restart(carry=True)

    def rewind(self) -> None:
        """The boundary has been restored: what is on the tape did not happen."""
        self.anchor = self._ring.approved
        self.tape.restart()

    def check(self) -> None:
        """Raise DiskError (or AuditWriteError) where a snapshot or its record did not reach the disk."""
        if (lost := self.lost()) is not None:
            raise lost

    def lost(self) -> Exception | None:
        """Why a snapshot did not reach the disk, or None. Once so, for good: a start goes back to what is there."""
        self._lost = self._lost or self._writer.trouble
        return self._lost

    def wait(self) -> None:
        """Until everything is on disk. Raises DiskError."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.wait()

    def close(self) -> None:
        """Finish writing and end the thread. What does not reach the disk is settled by the next start."""
        self._writer.close()

    def _written(self, digest: str) -> None:
        self._digest = digest
        self._prune()

    def _prune(self) -> None:
        kept = {name for name in (self._digest, self._beneath) if name}
        self.store.prune(keep=kept | {one.snapshot for one in self.store.history()[: self._keep]})

    def _flip(self, slot: Slot) -> None:
        self._ring.approve(slot)
        self.rewind()

    def _approved(self) -> Slot:
        approved = self._ring.approved
        assert approved is not None
        return approved
