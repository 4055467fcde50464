"""LoopGuard's own last-good state: what a frozen loop goes back to, and what a killed one goes on from.

    ring      the last states in memory: the approved one, and the candidate
    store     snapshots on disk, named by what is in them
    writer    the thread that brings the one to the other
    sharded   the same for a state that is spread over ranks
    tape      the batches since the last of them
    capsule   what a freeze leaves for reproduction
    tree      a state as JSON and a list of tensors
    tensors   a list of tensors as a file
    files     whole or not at all, and durable

Importing this needs no torch, so that `status`, `freeze` and `resume` answer at once.
"""

from loopguard.snapshots.capsule import Capsule, capsule_digest, read_capsule, write_capsule
from loopguard.snapshots.files import replace_durably, sync_directory, writing
from loopguard.snapshots.ring import Ring, Slot
from loopguard.snapshots.sharded import load_sharded, save_sharded
from loopguard.snapshots.store import Promoted, SnapshotStore
from loopguard.snapshots.tape import Kept, Tape, TapedUpdate
from loopguard.snapshots.writer import Writer, Written

__all__ = [
    "Capsule",
    "Kept",
    "Promoted",
    "Ring",
    "Slot",
    "SnapshotStore",
    "Tape",
    "TapedUpdate",
    "Writer",
    "Written",
    "capsule_digest",
    "load_sharded",
    "read_capsule",
    "replace_durably",
    "save_sharded",
    "sync_directory",
    "write_capsule",
    "writing",
]
