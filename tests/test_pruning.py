"""`loopguard audit prune`: old records of a run at rest, by a named person, and never what the run still needs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from lab import POLICY, Lab

from loopguard.audit import read, segments
from loopguard.audit.log import AuditLog
from loopguard.audit.verify import verify
from loopguard.cli.app import _main
from loopguard.controller import prune as pruning
from loopguard.controller.observe import Observer
from loopguard.errors import (
    AuditTamperedError,
    AuditWriteError,
    LoopFrozen,
    PolicyMismatchError,
    RunBusyError,
    UsageError,
)
from loopguard.policy.load import load
from loopguard.state import run_facts, set_latch, standing, submit

torch.set_num_threads(1)

NOW = datetime.now(UTC)
LATER = NOW + timedelta(days=800)
"""When somebody prunes what these tests have written."""
CUT = NOW + timedelta(days=1)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of several starts, in segments of a few records."""
    return trained(Lab(tmp_path_factory.mktemp("done"))).run_dir


@pytest.fixture
def lab(done, tmp_path):
    lab = Lab(tmp_path)
    shutil.copytree(done, lab.run_dir)
    return lab


def trained(lab):
    for cycles in (2, 4, 6):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, cycles)
    split(lab.run_dir)
    return lab


def split(run_dir, most=6, *, stream="controller"):
    paths = read.segments(run_dir, stream)
    lines = [line.data + b"\n" for line in read.lines(run_dir, stream)]
    for path in paths:
        path.unlink()
    for start in range(0, len(lines), most):
        path = read.stream_dir(run_dir, stream) / segments.name(start + 1)
        path.write_bytes(b"".join(lines[start : start + most]))


def prune(run_dir, *, before=CUT, now=LATER):
    plans = pruning.plan(run_dir, before=before, now=now)
    pruning.prune(run_dir, plans, by="dana", reason="retention schedule 7")
    return plans


def test_a_run_goes_on_behind_its_pruned_front(lab):
    """The next start finds its snapshot, its leases, its number of cycles, and has nothing to settle."""
    (plan,) = prune(lab.run_dir)
    assert plan.records > 6
    assert verify(lab.run_dir).code == 20
    assert not standing(lab.run_dir).frozen
    with lab.open() as guard:
        lab.build(guard)
        assert guard.promoted_cycle == 6
        assert guard.found == []
        lab.run(guard, 8)
        assert not guard.frozen
    found = verify(lab.run_dir, expect_head=str(verify(lab.run_dir).head))
    assert found.code == 10
    assert len(found.findings) == 1


def test_the_guard_policy_says_how_large_a_segment_gets_and_whether_it_is_compressed(tmp_path):
    for name, written, forms in (
        ("a", "{segment: 1MiB}", {".gz", ".jsonl"}),
        ("b", "{segment: 1MiB, compress: false}", {".jsonl"}),
        ("c", "{}", {".jsonl"}),
    ):
        (tmp_path / name).mkdir()
        lab = Lab(tmp_path / name)
        lab.policy.write_text(f"{POLICY}audit: {written}\n")
        with lab.open() as guard:
            for _ in range(12):
                guard._log.append("note.added", {"by": "dana", "text": "x" * 200_000}, sync=False)
        assert {path.suffix for path in read.segments(lab.run_dir)} == forms
        assert len(read.segments(lab.run_dir)) == (1 if name == "c" else 3)
        assert verify(lab.run_dir).code == 20


def test_what_a_kept_snapshot_is_vouched_for_by_stays(lab):
    """Whoever rolls back later finds the promotion in the log."""
    (plan,) = prune(lab.run_dir)
    there = {path.name for path in (lab.run_dir / "snapshots").iterdir() if path.is_dir()}
    told = {entry.body["snapshot"] for entry in read.entries(lab.run_dir, types=("snapshot.written",))}
    assert len(there & told) == len([name for name in there if len(name) == 64]) > 1
    assert "stays" in plan.held
    assert _main(["rollback", str(lab.run_dir), "--by", "dana", "--reason", "try the one before"]) == 0


def test_a_freeze_that_may_yet_halt_the_run_stays(tmp_path):
    """Whoever prunes does not give the run its budget of freezes back."""
    lab = Lab(tmp_path)
    lab.policy.write_text(
        POLICY.replace("when_frozen: raise", "when_frozen: raise, halt_above: {freezes: 1, cycles: 7}")
    )
    with lab.build(lab.open()) as guard, pytest.raises(LoopFrozen):
        lab.update(next(iter(guard.cycles(9))), factor=float("nan"))
    assert (
        _main(["resume", str(lab.run_dir), "--by", "dana", "--reason", "bad shard", "--disposition", "rollback"]) == 0
    )
    (frozen,) = (entry.seq for entry in lab.events("freeze.entered"))
    for cycles, kept in ((6, True), (9, False)):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, cycles)
        plan = without_snapshots(lab.run_dir, tmp_path / f"at-{cycles}")
        assert (plan.records < frozen) == kept
        assert ("f1 still counts for freeze.halt_above" in plan.held) == kept


def without_snapshots(run_dir, copy):
    """What may go where no snapshot keeps what stands before it."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "snapshots")
    split(copy, 3)
    (plan,) = pruning.plan(copy, before=CUT, now=LATER)
    return plan


def saved(lab, checkpoint):
    """Where a framework's checkpoint is recorded, in front of two more starts, and what may go behind them."""
    facts = run_facts(lab.run_dir)
    with AuditLog.open(lab.run_dir, run_id=facts["id"], policy=facts["policy"]) as log:
        log.append("checkpoint.saved", {"checkpoint": checkpoint, "update": 1, "weights": "0" * 64, "state": "0" * 64})
        seq = log.head.seq
    for cycles in (9, 10):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, cycles)
    return seq, without_snapshots(lab.run_dir, lab.run_dir.with_name("copy"))


@pytest.mark.parametrize(
    "checkpoint", ["out/checkpoint-2", f"/ghp_{'a' * 36}/checkpoint-2"], ids=["relative", "secret"]
)
def test_a_checkpoint_that_cannot_be_looked_for_counts_as_there(lab, checkpoint):
    """By its name alone, from another folder than that of the loop, or with a secret in it, nobody finds it."""
    seq, plan = saved(lab, checkpoint)
    assert plan.body["through"] < seq
    assert f"record {seq} stays: the checkpoint" in plan.held


def test_a_checkpoint_that_is_gone_keeps_nothing(lab, tmp_path):
    seq, plan = saved(lab, str(tmp_path / "checkpoint-2"))
    assert plan.body["through"] >= seq


def test_a_run_that_is_frozen_keeps_its_front(lab):
    assert _main(["freeze", str(lab.run_dir), "--by", "dana", "--reason", "odd"]) == 0
    with pytest.raises(LoopFrozen, match="not pruned before somebody resumed"):
        prune(lab.run_dir)
    assert read.first_seq(read.segments(lab.run_dir)[0]) == 1


def test_a_latch_alone_is_enough(lab):
    set_latch(lab.run_dir, freeze="requested", reason="odd")
    with pytest.raises(LoopFrozen):
        prune(lab.run_dir)


def test_a_freeze_between_the_plan_and_the_lock_keeps_the_front(lab):
    plans = pruning.plan(lab.run_dir, before=CUT, now=LATER)
    set_latch(lab.run_dir, freeze="requested", reason="odd")
    with pytest.raises(LoopFrozen):
        pruning.prune(lab.run_dir, plans, by="dana", reason="r")
    assert read.first_seq(read.segments(lab.run_dir)[0]) == 1


def test_a_request_that_waits_keeps_the_front(lab):
    submit(lab.run_dir, "note", by="dana", reason="look at this")
    with pytest.raises(UsageError, match="requests holds what nobody has taken in yet"):
        prune(lab.run_dir)


def test_a_run_that_somebody_owns_is_busy(lab, capsys):
    with lab.open(), pytest.raises(RunBusyError, match="in use by process"):
        prune(lab.run_dir)
    plans = pruning.plan(lab.run_dir, before=CUT, now=LATER)
    with lab.open(), pytest.raises(RunBusyError):
        pruning.prune(lab.run_dir, plans, by="dana", reason="r")
    with lab.open():
        assert _main(["audit", "prune", str(lab.run_dir), "--keep-days", "400", "--by", "d", "--reason", "r"]) == 7


def test_other_streams_lose_what_is_old_as_well(lab):
    """The controller's checkpoint commits to the record by which another stream says so."""
    facts = run_facts(lab.run_dir)
    for number in range(2):
        with AuditLog.open(lab.run_dir, stream="rank-1", run_id=facts["id"], policy=facts["policy"]) as log:
            for kind in ("run.started", *["note.added"] * 20):
                log.append(kind, {"text": str(number)}, sync=False)
    split(lab.run_dir, stream="rank-1")
    with lab.open() as guard:
        lab.build(guard)
    plans = prune(lab.run_dir)
    assert [(plan.stream, plan.records > 0) for plan in plans] == [("controller", True), ("rank-1", True)]
    found = verify(lab.run_dir, expect_head=str(verify(lab.run_dir).head))
    assert (found.code, len(found.findings)) == (10, 2)
    rank = found.streams[1]
    assert rank.proven >= rank.pruned > 0
    assert read.at(lab.run_dir, "rank-1", rank.proven).type == "log.pruned"


def test_two_people_with_one_plan_prune_once(lab):
    """Whoever comes second would tell of records that were gone already."""
    plans = pruning.plan(lab.run_dir, before=CUT, now=LATER)
    pruning.prune(lab.run_dir, plans, by="dana", reason="r")
    with pytest.raises(RunBusyError, match="somebody else pruned stream controller just now"):
        pruning.prune(lab.run_dir, plans, by="eli", reason="r")
    assert [entry.body["by"] for entry in read.entries(lab.run_dir, types=("log.pruned",))] == ["dana"]


def test_the_guard_policy_says_what_is_too_young(lab):
    with pytest.raises(UsageError, match=r"keeps records for 365 days \(audit.retain_days\)"):
        pruning.plan(lab.run_dir, before=NOW - timedelta(days=364), now=NOW)
    assert pruning.plan(lab.run_dir, before=NOW - timedelta(days=365), now=NOW)[0].body is None


def test_an_edited_guard_policy_prunes_nothing(lab):
    (path,) = (lab.run_dir / "policy").iterdir()
    path.write_text(POLICY + "audit: {retain_days: 1}\n")
    assert _main(["audit", "prune", str(lab.run_dir), "--keep-days", "400", "--by", "d", "--reason", "r"]) == 3


def test_a_guard_policy_that_the_log_does_not_name_says_nothing_of_what_is_kept(lab):
    """It lies in the run directory, and `run.json` names it: somebody put both there."""
    other = lab.run_dir / "policy" / "other.yaml"
    other.write_text(POLICY + "audit: {retain_days: 1}\n")
    digest = load(other).digest
    other.rename(other.with_name(f"{digest}.yaml"))
    facts = run_facts(lab.run_dir)
    (lab.run_dir / "run.json").write_text(json.dumps(facts | {"policy": digest}))
    with pytest.raises(PolicyMismatchError, match="somebody edited it"):
        prune(lab.run_dir)


@pytest.mark.parametrize("policy", [{}, {"policy": None}])
def test_a_run_that_names_no_guard_policy_is_none(lab, policy, capsys):
    facts = {"id": run_facts(lab.run_dir)["id"]}
    (lab.run_dir / "run.json").write_text(json.dumps(facts | policy))
    assert _main(["audit", "prune", str(lab.run_dir), "--keep-days", "400", "--by", "d", "--reason", "r"]) == 2
    assert "is not the description of a run; it has no policy" in capsys.readouterr().err


def test_a_log_with_findings_is_evidence_and_stays(lab):
    path = read.segments(lab.run_dir)[1]
    path.write_bytes(path.read_bytes().replace(b"loopguard", b"loopguarD"))
    with pytest.raises(AuditTamperedError, match="can be looked at by nobody"):
        prune(lab.run_dir)
    assert path.exists()


def test_a_required_anchor_that_fails_keeps_the_front(tmp_path):
    lab = Lab(tmp_path)
    kept = tmp_path / "elsewhere" / "anchors.jsonl"
    kept.parent.mkdir()
    lab.policy.write_text(f"{POLICY}audit: {{anchors: [{{kind: file, path: {kept}, required: true}}]}}\n")
    trained(lab)
    kept.rename(kept.with_name("away"))
    kept.parent.rename(tmp_path / "unplugged")
    with pytest.raises(AuditWriteError, match="the anchor"):
        prune(lab.run_dir)
    assert read.first_seq(read.segments(lab.run_dir)[0]) == 1
    assert "log.pruned" not in {entry.type for entry in read.entries(lab.run_dir)}
    (tmp_path / "unplugged").rename(kept.parent)
    kept.with_name("away").rename(kept)
    prune(lab.run_dir)
    assert verify(lab.run_dir, anchors=[kept]).code == 10


def test_with_an_anchor_the_rest_is_proven_to_its_end(tmp_path):
    """The command keeps its checkpoint there before anything goes."""
    lab = Lab(tmp_path)
    kept = tmp_path / "anchors.jsonl"
    lab.policy.write_text(f"{POLICY}audit: {{anchors: [{{kind: file, path: {kept}}}]}}\n")
    trained(lab)
    prune(lab.run_dir)
    found = verify(lab.run_dir, anchors=[kept])
    assert (found.code, len(found.findings)) == (10, 1)


@pytest.mark.parametrize("step", range(0, 26, 2))
def test_kill_9_at_any_step_leaves_a_log_that_goes_on(lab, step):
    """Before its n-th change of a file the command dies; the next start finishes it or finds that nothing was begun."""
    code = """
        import os, pathlib, sys
        from datetime import datetime
        from loopguard.controller import prune as pruning
        folder, left = pathlib.Path(sys.argv[1]), [int(sys.argv[2])]
        before, now = (datetime.fromisoformat(word) for word in sys.argv[3:])
        plans = pruning.plan(folder, before=before, now=now)
        def dying(real):
            def call(*words, **options):
                if left[0] == 0:
                    os.kill(os.getpid(), 9)
                left[0] -= 1
                return real(*words, **options)
            return call
        for home, name in ((os, "fsync"), (os, "fdatasync"), (pathlib.Path, "replace"), (pathlib.Path, "unlink")):
            setattr(home, name, dying(getattr(home, name)))
        pruning.prune(folder, plans, by="dana", reason="r")
        """
    words = [lab.run_dir, step, CUT.isoformat(), LATER.isoformat()]
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    done = subprocess.run(command, check=False, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL)
    assert verify(lab.run_dir).code in (10, 20)
    assert not standing(lab.run_dir).frozen
    with lab.open() as guard:
        lab.build(guard)
        assert guard.promoted_cycle == 6
        assert not guard.frozen
    recorded = [entry for entry in read.entries(lab.run_dir) if entry.type == "log.pruned"]
    first = read.first_seq(segments.every(read.stream_dir(lab.run_dir))[0])
    assert first == (recorded[0].body["through"] + 1 if recorded else 1)
    assert verify(lab.run_dir, expect_head=str(verify(lab.run_dir).head)).code in (0, 10)


def test_an_observed_run_can_be_pruned(tmp_path):
    for _ in range(2):
        with Observer.open(tmp_path / "run", quiet=True):
            pass
    split(tmp_path / "run", 2)
    (plan,) = prune(tmp_path / "run")
    assert plan.records > 0
    assert not (tmp_path / "run" / "state.json").exists()
    with Observer.open(tmp_path / "run", quiet=True):
        pass
    assert verify(tmp_path / "run").code == 20


class TestCommand:
    def ask(self, lab, *words):
        return _main(["audit", "prune", str(lab.run_dir), "--by", "dana", "--reason", "schedule 7", *map(str, words)])

    @pytest.fixture
    def long_ago(self, lab, monkeypatch):
        """The same, when the records are two years old."""

        class Then(datetime):
            @classmethod
            def now(cls, tz=None):
                return LATER.astimezone(tz)

        monkeypatch.setattr("datetime.datetime", Then)
        return lab

    def test_it_says_what_went_and_every_reader_says_so_too(self, long_ago, capsys):
        assert self.ask(long_ago, "--keep-days", 400) == 0
        told = capsys.readouterr().out
        assert told.startswith("controller: records 1-")
        assert "are pruned" in told
        for words in (
            ["show"],
            ["stats"],
            ["freezes"],
            ["cycle"],
            ["report"],
            ["approvals"],
            ["export", "--to", "jsonl"],
        ):
            assert _main(["audit", words[0], str(long_ago.run_dir), *words[1:]]) == 0
            assert "were pruned by dana" in capsys.readouterr().err
        assert _main(["audit", "verify", str(long_ago.run_dir)]) == 20
        assert "finding: records 1-" in capsys.readouterr().out

    def test_an_altered_log_can_still_be_looked_at(self, long_ago, capsys):
        (read.stream_dir(long_ago.run_dir) / "pruned.json").write_bytes(b"rubbish\n")
        assert _main(["audit", "report", str(long_ago.run_dir)]) == 0
        assert "pruned.json is not a record" in capsys.readouterr().err
        assert _main(["audit", "verify", str(long_ago.run_dir)]) == 30

    def test_a_dry_run_writes_nothing(self, long_ago, capsys):
        before = {path: path.read_bytes() for path in long_ago.run_dir.rglob("*") if path.is_file()}
        assert self.ask(long_ago, "--keep-days", 400, "--dry-run", "--json") == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert told["pruned"] == told["record"]["through"] > 0
        assert {path: path.read_bytes() for path in long_ago.run_dir.rglob("*") if path.is_file()} == before

    def test_nothing_to_prune_is_1_and_writes_nothing(self, long_ago, capsys):
        head = read.last(long_ago.run_dir).seq
        assert self.ask(long_ago, "--before", "2001-01-01") == 1
        assert "nothing goes: no closed segment is that old" in capsys.readouterr().out
        assert read.last(long_ago.run_dir).seq == head

    @pytest.mark.parametrize(
        "words", [("--before", "0026-01-31"), ("--before", "0999-12-31"), ("--keep-days", 739_000)]
    )
    def test_a_year_of_few_digits_is_long_ago_and_not_behind_this_century(self, long_ago, words):
        assert self.ask(long_ago, *words, "--dry-run") == 1

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([], "either --keep-days N or --before DATE"),
            (["--keep-days", 400, "--before", "2020-01-01"], "either --keep-days N or --before DATE"),
            (["--before", "soon"], "--before 'soon' is no date"),
            (["--before", "0001-01-01T00:00+14:00"], "is no date"),
            (["--keep-days", 30], "audit.retain_days"),
            (["--keep-days", 10**9], "beginning of all times"),
        ],
    )
    def test_wrong_words_are_2(self, lab, capsys, words, said):
        assert self.ask(lab, *words) == 2
        assert said in capsys.readouterr().err

    def test_an_empty_name_is_refused(self, lab, capsys):
        words = ["audit", "prune", str(lab.run_dir), "--keep-days", "400", "--by", " ", "--reason", "r"]
        assert _main(words) == 2
        assert "--by is empty" in capsys.readouterr().err
