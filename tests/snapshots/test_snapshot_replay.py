"""What follows a snapshot follows it again, bit for bit: dropout, moments, schedule and shuffling included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from snapshot_kit import DATA, Run, same

from loopguard.snapshots import Ring, SnapshotStore, Writer

BEFORE, AFTER = 5, 15  # the sampler shuffles again at 8 and 16


@pytest.mark.parametrize("fused", [True, False])
def test_warm(fused):
    run, ring = Run(fused=fused), Ring()
    run.train(BEFORE)
    ring.approve(ring.take(run.state(), {}))
    losses, state = run.train(AFTER), None
    state = Ring().take(run.state(), {}).state()
    for _ in range(2):  # the slot is as good the second time
        run.restore(ring.approved.state())
        assert run.train(AFTER) == losses
        assert same(run.state(), state)


def test_cold(tmp_path):
    """In a new process, from the disk."""
    run, store = Run(), SnapshotStore(tmp_path / "snapshots")
    run.train(BEFORE)
    with Writer(store) as writer:
        digest = writer.submit(Ring().take(run.state(), {"update": BEFORE}), {"update": BEFORE}).wait()
    losses = run.train(AFTER)
    script = Path(__file__).with_name("replayed.py")
    command = [sys.executable, str(script), str(store.root), digest, str(AFTER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"losses": [loss.hex() for loss in losses], "digest": store.write(run.state())}


def test_generators_that_come_back_before_the_loader_is_opened_are_wrong():
    """The reason that they come last: opening a loader draws from them."""

    def loader():
        return iter(torch.utils.data.DataLoader(DATA, batch_size=8, shuffle=True))

    torch.manual_seed(7)
    rng = torch.get_rng_state()

    def dropped(*, last):
        if not last:
            torch.set_rng_state(rng)
        loader()
        if last:
            torch.set_rng_state(rng)
        return torch.dropout(torch.ones(32), 0.5, True)

    torch.set_rng_state(rng)
    expected = torch.dropout(torch.ones(32), 0.5, True)
    assert same(dropped(last=True), expected)
    assert not same(dropped(last=False), expected)
