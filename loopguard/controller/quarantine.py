"""Where records go that are held back: to a file of the run directory, and into the log."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from loopguard.snapshots import sync_directory, writing
from loopguard.snapshots.files import make_directory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loopguard.controller.guard import LoopGuard
    from loopguard.types import Record


def hold_back(guard: LoopGuard, quarantined: Sequence[tuple[Record, str]], *, cycle: int | None) -> None:
    """Write records and their reasons down, durably. Raises DiskError, AuditWriteError.

    `cycle` is None for records that came outside of a cycle.
    """
    if not quarantined:
        return
    folder = guard.run_dir / "quarantine"
    here = guard._consensus.place
    name = "no-cycle" if cycle is None else f"cycle-{cycle:04d}"
    path = folder / f"{name}{'' if here.leads else f'.{here.stream}'}.jsonl"
    by_reason: dict[str, list[str]] = defaultdict(list)
    with writing(path):
        make_directory(folder)
        cut = _cut(path)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" if cut else "")  # what a crash left of a line must not swallow the next one
            for record, reason in quarantined:
                by_reason[reason].append(record.id)
                file.write(json.dumps(_row(record, reason), sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_directory(folder)
    for reason, ids in by_reason.items():
        body = {"reason": reason, "count": len(ids), "records": ids[:100]}
        guard._log.append("data.quarantined", body, cycle=cycle, sync=False)


def _cut(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _row(record: Record, reason: str) -> dict[str, Any]:
    origin = record.provenance.origin if record.provenance else None
    return {
        "id": record.id,
        "reason": reason,
        "origin": origin,
        "prompt": record.prompt,
        "completion": record.completion,
    }
