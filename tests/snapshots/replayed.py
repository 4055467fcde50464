"""Go on from a snapshot in a new process: python replayed.py FOLDER DIGEST UPDATES. Prints what it came to as JSON."""

import json
import sys
from pathlib import Path

import torch
from snapshot_kit import Run

from loopguard.snapshots import SnapshotStore

torch.set_num_threads(1)
store = SnapshotStore(Path(sys.argv[1]))
run = Run()
run.train(2)  # whatever happened here before must not matter
run.restore(store.read(sys.argv[2]))
losses = run.train(int(sys.argv[3]))
json.dump({"losses": [loss.hex() for loss in losses], "digest": store.write(run.state())}, sys.stdout)
