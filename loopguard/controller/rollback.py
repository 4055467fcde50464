"""Going back to an earlier promotion, on a person's word and with nobody at work on the run."""

from __future__ import annotations

from pathlib import Path

from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.controller.directory import Trail
from loopguard.errors import SnapshotError, UsageError
from loopguard.snapshots import Promoted, SnapshotStore
from loopguard.state import CONTROLLER, FreezeState, run_facts


def targets(run_dir: Path) -> tuple[Promoted | None, tuple[Promoted, ...]]:
    """The promotion that acts, and those that one can still go back to, newest first.

    Raises UsageError where this is no run directory, SnapshotError where its pointer cannot be read.
    """
    run_facts(run_dir)
    store = SnapshotStore(run_dir / "snapshots")
    kept = tuple(one for one in store.history() if (store.root / one.snapshot).is_dir())
    return store.promoted(), kept


def roll_back(run_dir: Path, *, to: int | None, by: str, reason: str) -> Promoted:
    """Let the next start go on from the promotion of cycle `to`, or from the one before the last.

    A frozen run stays frozen. Weights that act somewhere now stay there until that start. Raises RunBusyError while a
    process owns the run, UsageError where there is nothing to go back to, SnapshotError for a snapshot that is damaged
    or that no promotion in the log names, AuditTamperedError, AuditWriteError, DiskError.
    """
    facts = run_facts(run_dir)
    log = AuditLog.open(run_dir, stream=CONTROLLER, run_id=facts["id"], policy=facts["policy"])
    try:
        now, kept = targets(run_dir)
        target = _chosen(run_dir, now, kept, to)
        store = SnapshotStore(run_dir / "snapshots")
        if target.snapshot not in Trail(read.entries(run_dir, CONTROLLER)).snapshots:
            raise SnapshotError(
                f"snapshot {target.snapshot[:12]} of cycle {target.cycle}: no promotion in the log names it"
            )
        store.verify(target.snapshot)
        state = FreezeState(run_dir, log)
        log.epoch += 1  # update numbers start again from there; the epoch tells the old ones from the new
        body = {"from": now.snapshot if now else None, "to": target.snapshot, "cycle": target.cycle}
        log.append("promotion.rolled_back", {**body, "by": by, "reason": reason}, actor={"kind": "person", "id": by})
        store.roll_back(target.snapshot)
        state.remember(cycle=target.cycle)
        return target
    finally:
        log.close()


def _chosen(run_dir: Path, now: Promoted | None, kept: tuple[Promoted, ...], to: int | None) -> Promoted:
    if not kept:
        last = "nothing was promoted yet" if now is None else f"cycle {now.cycle} is the oldest promotion that is kept"
        raise UsageError(f"{run_dir}: nothing to go back to: {last} (promotion.keep_snapshots says how many are)")
    if to is None:
        return kept[0]
    chosen = next((one for one in kept if one.cycle == to), None)
    if chosen is None:
        cycles = ", ".join(str(one.cycle) for one in kept)
        raise UsageError(f"--to {to}: no snapshot of that cycle is kept; there is one of cycle {cycles}")
    return chosen
