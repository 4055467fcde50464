"""What once went wrong, each with the claim that it broke."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import pytest
from sandbox_kit import Bench, until

from loopguard.errors import SandboxUnavailableError
from loopguard.sandbox import docker as cells
from loopguard.sandbox.base import shipped


@pytest.mark.parametrize(("files", "free", "full"), [(0, 0, False), (100, 0, True), (100, 1, False)])
def test_no_inodes_at_all_is_not_a_full_disk(monkeypatch, files, free, full):
    """gVisor counts none; every failing call was told as `disk_limit` there."""
    spec = importlib.util.spec_from_file_location("supervisor", shipped("python/supervisor.py"))
    supervisor = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(supervisor)
    stat = SimpleNamespace(f_bavail=7, f_files=files, f_favail=free)
    monkeypatch.setattr(os, "statvfs", lambda _: stat)
    assert supervisor.disk_is_full() is full


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("recycled", "recycled"),
        ("used once", "recycled"),
        ("closed", "closed"),
        ("lost", "lost"),
        ("abandoned", "lost"),
        ("not clean: a file was left", "dirty"),
        ("anything else", "lost"),
    ],
)
def test_a_removal_is_told_in_one_of_four_words(reason, word):
    """The operator's mirror of the log shows `dirty` and `lost`, and knew none of the others."""
    assert cells._told(reason)["reason"] == word


def test_user_ids_of_cells_never_overlap():
    """By chance alone two cells could have the same ids."""
    taken = [cells._take_users(502, (10_000, 65_000)) for _ in range(40)]
    try:
        every = [uid for users in taken for uid in users]
        assert len(every) == len(set(every))
        with pytest.raises(SandboxUnavailableError, match="lower calls_per_cell"):
            cells._take_users(40_000, (10_000, 65_000))
    finally:
        for users in taken:
            cells._give_users_back(users)


@pytest.mark.docker
def test_a_dirty_cell_is_told_as_dirty(bench_events):
    """With the doubt as its detail."""
    bench = bench_events
    assert bench.run("a = []\nwhile True: a.append(bytearray(8 << 20))").status == "oom"
    assert until(lambda: bench.reasons() == ["dirty"])
    assert [body["detail"] for name, body in bench.events if name == "sandbox.removed"] == [
        "the memory limit was reached"
    ]


@pytest.mark.docker
def test_facts_hold_what_the_engine_applied(bench_events):
    """The audit log can say under which settings a call ran."""
    settings = bench_events.runtime.facts()["settings"]["engine"]
    assert (settings["NetworkMode"], settings["CapDrop"], settings["ReadonlyRootfs"]) == ("none", ["ALL"], True)


@pytest.mark.docker
def test_what_was_printed_comes_back_although_the_stream_was_replaced(bench_events):
    """A line that was not ended stayed in the buffer of the first stream."""
    assert bench_events.run("import io, sys; print('x', end=''); sys.stdout = io.StringIO()").stdout == b"x"


@pytest.mark.docker
def test_sets_have_one_order_in_every_cell():
    """Otherwise the same call prints something else in another cell, and no run can be repeated."""
    with Bench(mode="fresh", cells=2) as bench:
        assert len({bench.text("print({str(n) for n in range(9)})") for _ in range(4)}) == 1


@pytest.mark.docker
def test_the_most_output_that_a_policy_lets_be_kept_comes_back():
    """64 MiB of each stream were too much for a frame, and the cell was lost."""
    with Bench(output_kib=64 << 10, flood_mib=200, memory_mib=1024) as bench:
        write = "import os\nfor stream in (1, 2):\n    left = 64 << 20\n    while left:\n"
        write += "        left -= os.write(stream, b'x' * min(left, 1 << 20))"
        outcome = bench.run(write)
        assert (outcome.status, len(outcome.stdout), len(outcome.stderr)) == ("ok", 64 << 20, 64 << 20)


@pytest.fixture
def bench_events():
    with Bench() as bench:
        yield bench
