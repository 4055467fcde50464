"""A process that is killed while it writes costs nothing that was promoted."""

import json
import subprocess
import sys
from pathlib import Path


def test_killed_at_any_file_operation_a_promotion_is_whole_and_the_next_one_works(tmp_path):
    """SIGKILL right before each write, sync, rename and removal of a promotion, one process for each."""
    script = Path(__file__).with_name("killed_writer.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "snapshots")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *killed, finished = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(one["killed"] and one["whole"] and one["goes_on"] for one in killed)
    assert not finished["killed"]
    cycles = [one["cycle"] for one in killed]
    # The first stays until the pointer is replaced, and from there on it is the second: there is one edge.
    assert cycles == sorted(cycles)
    assert set(cycles) == {1, 2}
    assert len(killed) > 25
    assert sum(one["leftovers"] for one in killed) > 10
