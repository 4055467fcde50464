"""Several ranks freeze on the same update: claims about two ranks over gloo, each a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="ranks need torch")

from loopguard.audit import read
from loopguard.audit.verify import OK, UNANCHORED, verify
from loopguard.cli.app import _main, main
from loopguard.snapshots import SnapshotStore, read_capsule
from loopguard.state import standing, submit
from loopguard.types import WayOn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch has no distributed package with gloo",
    ),
]

SCRIPT = Path(__file__).parent / "ranks_scripts" / "rank_loop.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
TORCHRUN += ["--monitor-interval=0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
HEALTHY = {
    "ddp": {},
    "ddp-forward": {"forward": True},
    "ddp-accumulated": {"optimizer": "sgd", "micro": 2, "clip": 0.1},
    "ddp-late": {"optimizer": "fused", "late": True},
    "fsdp": {"spread": "fsdp", "clip": 0.1},
    "fsdp-sgd": {"spread": "fsdp", "optimizer": "plain", "forward": True},
    "fsdp-late": {"spread": "fsdp", "optimizer": "fused", "late": True, "micro": 2},
}
SPIKES = {"nan": "nan", "finite": 1e6}
SPIKED = {
    f"{kind}-{spike}": {**HEALTHY[kind], "factor": {"1/6": SPIKES[spike]}} for kind in HEALTHY for spike in SPIKES
}
GOING_ON = {
    f"{kind}-{part}": {**HEALTHY[kind], "cycles": cycles, "goes_on": f"{kind}-first"}
    for kind in ("ddp", "ddp-accumulated", "fsdp", "fsdp-late")
    for part, cycles in (("first", 1), ("rest", 2))
}
OTHERS = {
    "skip": {
        "freeze": "on_trip: skip, skip_at_most: {updates: 1, per: 100}",
        "factor": {"0/2": 1e6, "1/4": 1e6},
    },
    "norm": {"forward": True, "factor": {"0/6": 100, "1/6": 100}, "max_norm": 5},
    "panel": {"panel": {"1/2": 0.9}},
    "latch": {"say": {"1/6": "latch"}},
    "disk": {"say": {"1/4": "full disk"}},
    "admission": {"say": {"1/6": "admit rubbish"}},
    "mismatch": {"say": {"1/6": "forget an update"}},
    "policies": {"policy_tail": {"1": "description: another\n"}},
}


def environment(**more):
    threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    # Else the ranks of a restart find the addresses of the dead ones in the store of their agent.
    return {**os.environ, **threads, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **more}


def start(folder, plans):
    """Two ranks that carry the plans out, one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    named = json.dumps([{"name": name, **plan} for name, plan in plans.items()])
    processes = []
    for rank in range(2):
        there = environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, "-W", "error", str(SCRIPT), str(folder), named]
        with (folder / f"said-by-{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=there, stdout=log, stderr=log))
    return processes


def end(processes):
    for process in processes:
        process.kill()
        process.wait()


def finish(folder, processes, timeout_s=120):
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        end(processes)
    assert codes == [0, 0], "".join(path.read_text()[-3000:] for path in sorted(folder.glob("said-by-*.txt")))


def told(folder, name, start=0):
    """What each rank came to."""
    return [json.loads((folder / name / f"{rank}-{start}.json").read_text()) for rank in range(2)]


def entries(folder, name, stream="controller", *types):
    return list(read.entries(folder / name / "run", stream, types=types or None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of every plan above, and each healthy one without a guard."""
    folder = tmp_path_factory.mktemp("ranks")
    bare = {f"{name}-bare": {**plan, "guard": False} for name, plan in HEALTHY.items()}
    finish(folder, start(folder, {**HEALTHY, **bare, **SPIKED, **GOING_ON, **OTHERS}))
    return folder


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_of_two_ranks_is_bit_equal_to_one_without_the_guard(folder, name):
    for guarded, alone in zip(told(folder, name), told(folder, f"{name}-bare"), strict=True):
        assert guarded["error"] == ""
        assert guarded["losses"] == alone["losses"]
        assert guarded["digests"] == alone["digests"]
        assert len(alone["digests"]) == 8


@pytest.mark.parametrize("name", SPIKED)
def test_a_spike_on_rank_1_alone_is_withheld_on_both_in_the_same_update(folder, name):
    """Weights and optimizer state are, to the bit, those after update 5."""
    kind = name.rpartition("-")[0]
    for rank, (one, healthy) in enumerate(zip(told(folder, name), told(folder, kind), strict=True)):
        assert one["frozen"]
        assert one["finite"]
        assert one["at_the_end"] == healthy["digests"][4]
        assert ("rank 1 tripped bounds:loss: loss is" in one["error"]) == (rank == 0)
        assert "loss is" in one["error"]
    withheld = [entries(folder, name, stream, "update.withheld") for stream in ("controller", "rank-1")]
    assert [[entry.body["update"] for entry in one] for one in withheld] == [[6], [6]]


def test_ranks_of_ddp_have_the_same_bits_and_those_of_fsdp_have_their_own(folder):
    """What the claims above compare is the whole state under DDP, and a rank's shards under FSDP2."""
    first, second = told(folder, "ddp-nan")
    assert first["at_the_end"] == second["at_the_end"]
    first, second = told(folder, "fsdp-nan")
    assert first["at_the_end"] != second["at_the_end"]


def test_status_says_frozen_and_both_streams_verify(folder, capsys):
    run_dir = folder / "ddp-nan" / "run"
    with pytest.raises(SystemExit, match="4"):
        main(["status", str(run_dir)])
    assert "rank 1 tripped bounds:loss" in capsys.readouterr().out
    both = verify(run_dir)
    assert (both.code, both.findings, [one.name for one in both.streams]) == (UNANCHORED, [], ["controller", "rank-1"])
    assert both.streams[1].proven > 1, "rank 0 says where rank 1 stood at the freeze"
    for stream in ("controller", "rank-1"):
        assert verify(run_dir, stream=stream).code in (OK, UNANCHORED)
        (freeze,) = entries(folder, "ddp-nan", stream, "freeze.entered")
        assert (freeze.body["freeze"], freeze.body["rule"]) == ("f1", "bounds:loss")


def test_every_rank_leaves_a_capsule_of_its_own(folder):
    freezes = folder / "ddp-nan" / "run" / "freezes"
    assert sorted(path.name for path in freezes.iterdir()) == ["f1", "f1.rank-1"]
    readings = [read_capsule(freezes / name).decision["readings"]["loss"] for name in ("f1", "f1.rank-1")]
    assert readings[0] == pytest.approx(0.2, abs=0.5)
    assert readings[1] != readings[1]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_ranks_write_one_snapshot_for_each_promotion(folder, name):
    store = SnapshotStore(folder / name / "run" / "snapshots")
    promoted = store.promoted()
    assert (promoted.cycle, promoted.update) == (2, 8)
    store.verify(promoted.snapshot)
    assert len(list((store.root / promoted.snapshot).glob("rank-*.json"))) == 2
    for stream in ("controller", "rank-1"):
        last = [entry.body["snapshot"] for entry in entries(folder, name, stream, "snapshot.written")][-1]
        assert last == promoted.snapshot


@pytest.mark.parametrize("kind", ["ddp", "ddp-accumulated", "fsdp", "fsdp-late"])
def test_a_run_goes_on_from_the_snapshot_of_all_ranks_bit_for_bit(folder, kind):
    """Each rank with its own generators, and under FSDP2 with its own shards."""
    for first, rest, healthy in zip(
        told(folder, f"{kind}-first"), told(folder, f"{kind}-rest"), told(folder, kind), strict=True
    ):
        assert rest["error"] == ""
        assert rest["cycle"] == 1
        assert rest["restored"] == first["at_the_end"]
        assert first["digests"] + rest["digests"] == healthy["digests"]
        assert first["losses"] + rest["losses"] == healthy["losses"]


def test_a_batch_that_one_rank_drops_is_dropped_by_all_and_counts_for_all(folder):
    """One skip is allowed: rank 0 uses it in update 2, so that a trip of rank 1 in update 4 freezes."""
    for one in told(folder, "skip"):
        assert one["results"] == ["allow", "skip", "allow"]
        assert "loss is" in one["error"]


def test_a_gradient_norm_is_judged_after_the_verdict_of_forward(folder):
    first, second = told(folder, "norm")
    assert "grad_norm is" in first["error"]
    assert first["error"] == second["error"]
    assert first["applied"] == second["applied"] == 5


def test_a_promotion_is_withheld_on_all_where_one_panel_trips(folder):
    healthy = told(folder, "ddp")[0]
    for one in told(folder, "panel"):
        assert one["results"][-1] == "allow"
        assert "correct gained 0.4" in one["error"]
        assert one["at_the_end"] == healthy["digests"][3]  # back to the promotion of cycle 1
    for stream in ("controller", "rank-1"):
        decided = entries(folder, "panel", stream, "promotion.decided")
        assert [entry.body["result"] for entry in decided] == ["allow", "freeze"]
        assert len(entries(folder, "panel", stream, "promotion.applied")) == 1


@pytest.mark.parametrize(
    ("name", "applied", "why"),
    [
        ("latch", 5, "the latch was set from outside"),
        ("disk", 3, "the disk is full"),
        ("admission", 5, "3 of 4 records were quarantined"),
        ("mismatch", 5, "one is at update 6, another at update 7"),
    ],
)
def test_what_one_rank_notices_freezes_all_at_the_next_update(folder, name, applied, why):
    """A latch, a log that takes no records, a refused admission, ranks that are not at the same update."""
    for one in told(folder, name):
        assert why in one["error"]
        assert one["applied"] == applied
    assert standing(folder / name / "run").frozen


def test_a_refused_admission_still_hands_out_what_keeps_the_ranks_in_step(folder):
    """Three of four drafts are quarantined; the fourth keeps this rank's forward and backward going."""
    assert [one.get("admitted") for one in told(folder, "admission")] == [None, 1]


def test_what_one_rank_wants_undone_is_undone_on_all(folder):
    """Rank 1 refuses data after an update of its cycle was applied, so both go back to the promotion before."""
    for one, healthy in zip(told(folder, "admission"), told(folder, "ddp"), strict=True):
        assert one["at_the_end"] == healthy["digests"][3]


def test_ranks_under_other_policies_refuse_to_start_together(folder):
    for one in told(folder, "policies"):
        assert one["error"].startswith("UsageError: rank 1 has the guard policy")


def test_ranks_that_wait_resume_together_and_end_as_if_nothing_had_been(tmp_path):
    """The frozen cycle is run again on both; the streams of both say who let them."""
    plan = {"freeze": "when_frozen: wait"}
    processes = start(tmp_path, {"sound": plan, "waiting": {**plan, "factor": {"1/6": "nan"}}})
    run_dir = tmp_path / "waiting" / "run"
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline and all(process.poll() is None for process in processes):
            if any(run_dir.glob("audit/controller/seg-*")) and (now := standing(run_dir)).frozen and now.acknowledged:
                submit(run_dir, "resume", by="dana", reason="a bad shard, removed", freeze=now.freeze)
                break
            time.sleep(0.2)
    except BaseException:
        end(processes)
        raise
    finish(tmp_path, processes, timeout_s=60)
    for one, sound in zip(told(tmp_path, "waiting"), told(tmp_path, "sound"), strict=True):
        assert one["error"] == ""
        assert one["at_the_end"] == sound["at_the_end"]
        assert one["digests"][-4:] == sound["digests"][-4:]
    resumes = [entries(tmp_path, "waiting", stream, "resume.applied") for stream in ("controller", "rank-1")]
    assert resumes[0][0].body == resumes[1][0].body
    assert resumes[1][0].actor == {"kind": "person", "id": "dana"}
    for stream in ("controller", "rank-1"):
        assert verify(run_dir, stream=stream).code in (OK, UNANCHORED)


def answered(tmp_path, plan, **way):
    """Two ranks that wait, of which one loss is no number, and somebody who says how to go on. Gives what they told."""
    plan = {"freeze": "when_frozen: wait", "factor": {"1/6": "nan"}, **plan}
    processes = start(tmp_path, {"waiting": plan})
    run_dir = tmp_path / "waiting" / "run"
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline and all(process.poll() is None for process in processes):
            if any(run_dir.glob("audit/controller/seg-*")) and (now := standing(run_dir)).frozen and now.acknowledged:
                submit(run_dir, "resume", by="dana", reason="bad data", freeze=now.freeze, way=WayOn(**way))
                break
            time.sleep(0.2)
    except BaseException:
        end(processes)
        raise
    finish(tmp_path, processes, timeout_s=60)
    for stream in ("controller", "rank-1"):
        assert verify(run_dir, stream=stream).code in (OK, UNANCHORED)
    return told(tmp_path, "waiting")


def test_ranks_pass_a_discarded_cycle_over_together(tmp_path):
    """Each rank has its own data, and goes on having them: the two are not given the same seed."""
    first, second = answered(tmp_path, {"cycles": 3}, disposition="discard")
    for one in (first, second):
        assert one["error"] == ""
        assert one["results"].count("promote allow") == 2
    assert first["losses"][-1] != second["losses"][-1]
    for stream in ("controller", "rank-1"):
        begun = [entry.cycle for entry in entries(tmp_path, "waiting", stream, "cycle.started")]
        assert begun == [1, 2, 3]


def test_ranks_that_are_halted_end_together(tmp_path):
    assert [one["frozen"] for one in answered(tmp_path, {}, disposition="halt")] == [True, True]
    for stream in ("controller", "rank-1"):
        (halted,) = entries(tmp_path, "waiting", stream, "run.halted")
        assert (halted.body["by"], halted.body["because"]) == ("dana", "decision")


def test_the_state_of_several_ranks_cannot_be_accepted_and_they_stay_frozen(tmp_path, capsys):
    plan = {"factor": {"1/6": "nan"}}
    finish(tmp_path, start(tmp_path, {"waiting": plan}))
    run_dir = str(tmp_path / "waiting" / "run")
    words = ["resume", run_dir, "--by", "dana", "--reason", "fine", "--disposition", "accept"]
    assert _main(words) == 2
    assert "of several ranks cannot be accepted" in capsys.readouterr().err
    assert standing(tmp_path / "waiting" / "run").frozen


def torchrun(folder, plan):
    """Under torchrun, which starts all ranks anew where one dies."""
    done = subprocess.run(
        [*TORCHRUN, str(SCRIPT), str(folder), json.dumps([plan])],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return told(folder, "run", start=1)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ({"say": {"1/6": "latch and die"}}, "this rank tripped and died"),
        ({"say_late": {"1/6": "die"}}, "the ranks could not agree at update 6"),
    ],
    ids=["a rank latches and dies", "a rank dies before it agrees"],
)
def test_killed_ranks_come_up_frozen_with_no_update_applied(tmp_path, plan, why):
    """One latch is enough for all; where a rank is gone when they agree, the other one sets it."""
    for one in torchrun(tmp_path, plan):
        assert one["came_up_frozen"]
        assert one["applied"] == 0
        assert why in one["error"]
    assert why in standing(tmp_path / "run" / "run").reason


def test_a_rank_that_dies_without_a_latch_is_settled_and_the_run_goes_on(tmp_path, folder):
    """The updates that nobody can vouch for are undone on both ranks, and the run ends as one that never died."""
    both = torchrun(tmp_path, {"say": {"1/6": "die"}, "spread": "fsdp", "clip": 0.1})
    for one, healthy in zip(both, told(folder, "fsdp"), strict=True):
        assert one["error"] == ""
        assert one["cycle"] in (None, 1)  # whether the first promotion was on disk by then
        assert one["at_the_end"] == healthy["at_the_end"]
    for stream in ("controller", "rank-1"):
        assert entries(tmp_path, "run", stream, "update.settled")
        assert verify(tmp_path / "run" / "run", stream=stream).code in (OK, UNANCHORED)
