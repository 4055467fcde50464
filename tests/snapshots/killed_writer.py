"""Promote a second snapshot over a first one and be killed at each file operation in turn.

    python killed_writer.py FOLDER

Each time a forked child does the work; it is killed (SIGKILL) right before its n-th operation, and what it left is
judged here. One JSON line for each n says which promotion acts, whether it can be read, and whether the next one works.
"""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from loopguard.snapshots import Promoted, Ring, SnapshotStore, Writer, tensors

torch.set_num_threads(1)
tensors._PIECE = 64  # many small writes, so that a file can be torn in the middle


def state(number):
    return {"w": torch.full((64,), float(number)), "b": torch.arange(32) + number, "text": str(number)}


def promote(store, ring, number):
    def done(digest):
        store.promote(Promoted(snapshot=digest, cycle=number, update=number, panel={}))
        store.prune(keep=set())

    slot = ring.take(state(number), {"update": number})
    ring.approve(slot)
    with Writer(store) as writer:
        return writer.submit(slot, slot.facts, done).wait()


def count_down(operations):
    """From now on the n-th file operation of this process is its last moment."""
    left = [operations]

    def counted(real):
        def act(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return act

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    io.open = counted(io.open)
    tensors._Hashing.write = _in_pieces(counted)


def _in_pieces(counted):
    def write(self, data):
        view = memoryview(data)
        put = counted(self._raw.write)
        while view:
            count = put(view[: tensors._PIECE])
            self._hash.update(view[:count])
            view = view[count:]

    return write


def killed_at(folder, operations):
    shutil.rmtree(folder, ignore_errors=True)
    store, ring = SnapshotStore(folder), Ring()
    promote(store, ring, 1)
    child = os.fork()
    if child == 0:
        count_down(operations)
        promote(store, ring, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    after = SnapshotStore(folder)
    promoted = after.promoted()
    found = after.read(promoted.snapshot)
    whole = all(torch.equal(found[key], state(promoted.cycle)[key]) for key in ("w", "b"))
    leftovers = len([path for path in folder.iterdir() if path.name.startswith(".partial-")])
    promote(after, Ring(), 3)
    clean = sorted(path.name for path in folder.iterdir()) == sorted([after.promoted().snapshot, "promoted.json"])
    line = {"killed": os.WIFSIGNALED(status), "cycle": promoted.cycle, "whole": whole}
    line |= {"leftovers": leftovers, "goes_on": clean and after.promoted().cycle == 3}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()  # before the next fork, which would print it again
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    operations = 0
    while killed_at(Path(sys.argv[1]), operations):
        operations += 1
