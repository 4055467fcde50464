"""LoopGuard's own last-good state: what a frozen loop goes back to, and what a killed one goes on from.

    store   snapshots on disk, named by what is in them

Importing this needs no torch, so that `status`, `freeze` and `resume` answer at once.
"""

from loopguard.snapshots.store import Promoted, SnapshotStore, replace_durably, sync_directory, writing

__all__ = ["Promoted", "SnapshotStore", "replace_durably", "sync_directory", "writing"]
