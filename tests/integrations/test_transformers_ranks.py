"""A Trainer on two ranks: what one of them trips on stops the update on both, and their weights stay the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("accelerate", reason="a Trainer needs accelerate")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.train,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch has no distributed package with gloo",
    ),
]

SCRIPT = Path(__file__).parent.parent / "ranks_scripts" / "trainer_rank.py"


MODES = ("quiet", "bare", "skip", "never", "freeze")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks came to, by mode."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("wb") as log:
            there = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(SCRIPT), str(folder), *MODES]
            processes.append(subprocess.Popen(command, env=there, stdout=log, stderr=log))
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, (folder / f"{rank}.log").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {mode: [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in range(2)] for mode in MODES}


def test_a_quiet_guard_changes_no_bit(ranks):
    assert ranks["quiet"] == ranks["bare"]


def test_a_batch_that_one_rank_cannot_take_is_dropped_on_both(ranks):
    """And both are to the bit where a run is that never had the update."""
    first, second = ranks["skip"]
    never, _ = ranks["never"]
    assert first["state"] == second["state"] == never["state"]
    assert first["schedule"] == second["schedule"] == never["schedule"]


def test_a_freeze_of_one_rank_freezes_both_at_the_same_update(ranks):
    first, second = ranks["freeze"]
    assert first["steps"] == second["steps"] == 3
    assert first["state"] == second["state"]
    assert "rank 1" in first["error"]
    assert "loss" in second["error"]
