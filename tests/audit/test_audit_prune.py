"""A log whose front is gone: what is left verifies, and only where the log itself says who removed it and why."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import UTC, datetime

import pytest
from audit_stories import POLICY, Loop, clock_at, finished, forget_checkpoints, open_log

from loopguard.approvals import book
from loopguard.audit import compress as packing
from loopguard.audit import prune as fronts
from loopguard.audit import query, read, segments
from loopguard.audit.anchors import Anchor
from loopguard.audit.bundle import bundle
from loopguard.audit.events import Head, decode, encode, fields_of
from loopguard.audit.keys import keygen
from loopguard.audit.proof import check, prove
from loopguard.audit.pruned import FILE, Pruned, through
from loopguard.audit.report import render
from loopguard.audit.stats import stats
from loopguard.audit.verify import verify
from loopguard.cli.app import _main
from loopguard.errors import AuditTamperedError, UsageError
from loopguard.state import FreezeState

SMALL = {"segment_bytes": 6000}
LATE = datetime(2031, 6, 1, tzinfo=UTC)
FAR = "2031-01-01T00:00:00.000000Z"


def folder(run_dir, stream="controller"):
    return read.stream_dir(run_dir, stream)


def planned(run_dir, *, before=FAR, stays=lambda _: "", stream="controller"):
    return fronts.plan(run_dir, stream, before=before, stays=stays)


def prune(run_dir, *, carried_out=True, stream="controller", stays=lambda _: "", **options):
    """Prune all that may go; gives what the record says."""
    plan = planned(run_dir, stays=stays, stream=stream)
    assert plan.body is not None, plan.held
    with open_log(run_dir, stream=stream, clock=clock_at(LATE), **SMALL, **options) as log:
        entry = fronts.record(log, plan, by="dana", reason="retention schedule 7")
        log.checkpoint()
        if carried_out:
            fronts.carry_out(folder(run_dir, stream), entry)
    return Pruned.of(entry)


AGAIN = datetime(2030, 3, 1, tzinfo=UTC)


def old_log(run_dir, *, cycles=3):
    """Good cycles in small segments, and another start of the process behind them, which is old by now as well."""
    finished(run_dir, cycles=cycles, updates=32, calls=12)
    start_again(run_dir)
    split(run_dir, 7)
    return run_dir


def start_again(run_dir):
    """What the next process writes: the run goes on from here, and rests on nothing of before."""
    loop = Loop(run_dir, updates=16, calls=4, clock=clock_at(AGAIN))
    loop.log.append("model.attached", {"weights": "w", "config": "c", "late": False})
    for cycle in (7, 8):
        loop.honest(cycle)
    loop.finish()


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return old_log(tmp_path_factory.mktemp("old") / "run")


@pytest.fixture
def run_dir(old, tmp_path):
    shutil.copytree(old, tmp_path / "run")
    return tmp_path / "run"


def rewrite(run_dir, change):
    """Change what stands beside the log, and hash it anew."""
    path = folder(run_dir) / FILE
    fields = fields_of(decode(path.read_bytes()[:-1]))
    change(fields)
    path.write_bytes(encode(fields)[0])


class TestPruning:
    def test_whole_old_segments_go_and_the_rest_verifies(self, run_dir):
        before = {entry.seq: entry for entry in read.entries(run_dir)}
        gone = prune(run_dir)
        left = list(read.entries(run_dir))
        assert left[0].seq == gone.last.seq + 1 > 8
        assert left[0].prev == gone.last.hash == before[gone.last.seq].hash
        found = verify(run_dir, expect_head=str(read_head(run_dir)))
        assert (found.code, found.status) == (10, "warn")
        assert found.findings == [gone.told()]
        assert "pruned by dana at 2031-06-01T00:00:00Z: retention schedule 7" in gone.told()
        assert found.streams[0].pruned == gone.last.seq
        assert found.records == len(left)

    def test_the_record_says_what_went(self, run_dir):
        raw = b"".join(path.read_bytes() for path in read.segments(run_dir))
        names = [path.name for path in read.segments(run_dir)]
        body = prune(run_dir).entry.body
        went = b"".join(raw.splitlines(keepends=True)[: body["through"]])
        assert body["digest"] == hashlib.sha256(went).hexdigest()
        assert body["bytes"] == len(went)
        assert body["segments"] == names[: len(body["segments"])]
        assert not any(name in body["segments"] for name in (path.name for path in folder(run_dir).iterdir()))

    def test_what_stands_beside_the_log_is_the_line_of_the_record(self, run_dir):
        gone = prune(run_dir)
        line = next(line for line in read.lines(run_dir) if decode(line.data).seq == gone.entry.seq)
        assert (folder(run_dir) / FILE).read_bytes() == line.data + b"\n"

    def test_nothing_goes_that_is_too_young(self, run_dir):
        assert planned(run_dir, before="2030-01-01T00:00:00.000000Z").body is None

    def test_the_last_segment_stays_whatever_its_age(self, run_dir):
        plan = planned(run_dir)
        assert plan.body["through"] < read.first_seq(read.segments(run_dir)[-1])
        assert plan.kept > 0

    def test_a_segment_with_one_young_record_stays(self, run_dir):
        entries = list(read.entries(run_dir))
        plan = planned(run_dir, before=entries[40].ts)
        assert plan.body["until"] < entries[40].ts
        assert plan.body["through"] in {35, 28}

    def test_records_that_the_run_rests_on_stay_and_are_named(self, run_dir):
        """The last guard policy, start, model, cycle, lease and promotion, and what somebody vouches for."""
        plan = planned(run_dir)
        first = plan.body["through"] + 1
        kinds = {entry.type for entry in read.entries(run_dir) if entry.seq >= first}
        assert {"policy.loaded", "run.started", "cycle.started", "update.leased", "promotion.applied"} <= kinds
        held = planned(run_dir, stays=lambda entry: "it is dear" if entry.seq == 12 else "")
        assert held.body["through"] == 7
        assert "record 12 stays: it is dear" in held.held

    def test_compressed_segments_go_as_raw_ones(self, run_dir, tmp_path):
        shutil.copytree(run_dir, tmp_path / "packed")
        for path in read.segments(tmp_path / "packed")[:-1]:
            packing.compress(path)
        assert prune(tmp_path / "packed").entry.body["digest"] == prune(run_dir).entry.body["digest"]
        assert [path.name.removesuffix(".gz") for path in read.segments(tmp_path / "packed")] == [
            path.name for path in read.segments(run_dir)
        ]
        assert verify(tmp_path / "packed").code == 20

    def test_pruning_twice(self, run_dir):
        """The second record stands for all that went before it as well."""
        one = planned(run_dir, stays=lambda entry: "not yet" if entry.seq == 30 else "")
        first = prune(run_dir, stays=lambda entry: "not yet" if entry.seq == 30 else "")
        assert first.last.seq == one.body["through"]
        second = prune(run_dir)
        assert (second.first, through(folder(run_dir))) == (first.last.seq + 1, second.last.seq)
        assert verify(run_dir, expect_head=str(read_head(run_dir))).findings == [second.told()]

    def test_a_log_goes_on_behind_its_pruned_front(self, run_dir):
        """Number, chain, epoch and tree go on."""
        untouched = run_dir.with_name("whole")
        shutil.copytree(run_dir, untouched)
        prune(run_dir)
        with open_log(run_dir, clock=clock_at(LATE), **SMALL) as log:
            log.append("note.added", {"text": "later"})
            size = log.head.seq
            log.checkpoint()
        assert verify(run_dir).code == 20
        assert (folder(run_dir) / "checkpoints" / f"{size}.note").exists()

    @pytest.fixture
    def once_frozen(self, tmp_path):
        """A run that froze and was resumed, before its front was pruned."""
        loop = Loop(tmp_path / "run", updates=16, calls=4)
        loop.honest(0)
        loop.label_leak(1)
        loop.resume("f1")
        loop.honest(1)
        loop.finish()
        start_again(tmp_path / "run")
        split(tmp_path / "run", 6)
        gone = prune(tmp_path / "run")
        assert gone.state.freezes == 1
        assert "freeze.entered" not in {entry.type for entry in read.entries(tmp_path / "run")}
        (tmp_path / "run" / "latch").unlink(missing_ok=True)
        return tmp_path / "run"

    def test_freezes_that_went_are_still_counted(self, once_frozen):
        """No two freezes of a run have one name."""
        with open_log(once_frozen, clock=clock_at(LATE)) as log:
            assert FreezeState(once_frozen, log).count == 1

    def test_nobody_says_that_a_run_never_froze_whose_freezes_went(self, once_frozen, capsys):
        said = "froze once in records that were pruned, and not since"
        with pytest.raises(UsageError, match=said):
            query.why(once_frozen)
        assert f"This run {said}." in render(once_frozen)
        assert "pruned freezes" in render(once_frozen)
        assert _main(["audit", "freezes", str(once_frozen)]) == 0
        assert f"{once_frozen} {said}" in capsys.readouterr().err
        assert _main(["audit", "approvals", str(once_frozen)]) == 0
        assert "was never asked to resume since" in capsys.readouterr().err

    def test_a_cut_line_of_those_days_goes_as_well(self, run_dir):
        """Its bytes are part of what was pruned, and the next start does not record them anew."""
        home = folder(run_dir)
        (home / "torn-000000000003.bin").write_bytes(b'{"actor":{')
        first = read.segments(run_dir)[0]
        # A log that had recovered a line: made by hand, since the real one is long over.
        forget_checkpoints(run_dir)
        rehash(run_dir, first, 3, "log.recovered", {"file": "torn-000000000003.bin", "torn_bytes": 10, "digest": ""})
        gone = prune(run_dir)
        assert gone.torn == ("torn-000000000003.bin",)
        assert not (home / "torn-000000000003.bin").exists()
        with open_log(run_dir):
            pass
        assert "log.recovered" not in {entry.type for entry in read.entries(run_dir)}


def read_head(run_dir):
    last = read.last(run_dir)
    return Head(last.seq, last.hash)


def split(run_dir, most):
    """Cut the segments of a log into small ones."""
    lines = [line.data + b"\n" for line in read.lines(run_dir)]
    for path in read.segments(run_dir):
        path.unlink()
    for start in range(0, len(lines), most):
        (folder(run_dir) / segments.name(start + 1)).write_bytes(b"".join(lines[start : start + most]))


def rehash(run_dir, path, seq, kind, body):
    """Put another record in a place, and hash everything behind it anew."""
    prev = None
    for home in read.segments(run_dir):
        made = []
        for line in home.read_bytes().splitlines():
            fields = fields_of(decode(line))
            if fields["seq"] == seq:
                fields |= {"type": kind, "body": body}
            if prev is not None and fields["seq"] > seq:
                fields["prev"] = prev
            data, prev = encode(fields)
            made.append(data)
        home.write_bytes(b"".join(made))


class TestJudgement:
    """What rests on records that are gone gives no false finding, and what rests on nothing is found."""

    def test_every_place_to_cut_leaves_a_log_without_findings(self, run_dir):
        """In the middle of a lease, between a call and its end, between a decision and its promotion."""
        ends = [read.first_seq(path) - 1 for path in read.segments(run_dir)[1:]]
        tried = 0
        for end in ends:
            copy = run_dir.with_name(f"cut-{end}")
            shutil.copytree(run_dir, copy)
            if planned(copy, stays=lambda entry, end=end: "no" if entry.seq == end + 1 else "").body is None:
                continue
            gone = prune(copy, stays=lambda entry, end=end: "no" if entry.seq == end + 1 else "")
            found = verify(copy, expect_head=str(read_head(copy)))
            assert (found.code, found.findings) == (10, [gone.told()]), end
            tried += 1
        assert tried > 10

    def test_a_segment_that_ends_in_a_freeze_is_no_end(self, tmp_path):
        loop = Loop(tmp_path / "run", updates=16, calls=4)
        loop.honest(0)
        loop.label_leak(1)
        loop.log.append("note.added", {"text": "looking at it"})
        loop.resume("f1")
        loop.finish()
        start_again(tmp_path / "run")
        split(tmp_path / "run", 1)
        kinds = {entry.seq: entry.type for entry in read.entries(tmp_path / "run")}
        frozen = next(seq for seq, kind in kinds.items() if kind == "freeze.entered")
        plan = planned(tmp_path / "run", stays=lambda entry: "no" if entry.type == "resume.applied" else "")
        assert plan.body["through"] == frozen - 1

    def test_a_call_without_its_decision_is_still_found(self, run_dir):
        prune(run_dir)
        with open_log(run_dir, clock=clock_at(LATE)) as log:
            log.append("tool.finished", {"call": "made-up", "status": "ok"})
        assert verify(run_dir).code == 40

    def test_updates_outside_of_a_lease_are_still_found(self, run_dir):
        prune(run_dir)
        with open_log(run_dir, clock=clock_at(LATE)) as log:
            log.append("update.applied", {"from": 9000, "to": 9001, "readings": {}})
        assert verify(run_dir).code == 40


class TestAgainstKeptHeads:
    def test_a_head_of_before_the_cut_is_a_note(self, run_dir):
        early = Head(3, read.at(run_dir, "controller", 3).hash)
        prune(run_dir)
        found = verify(run_dir, expect_head=str(early))
        assert found.code == 20
        assert any("record 3, which was pruned" in note for note in found.notes)

    def test_a_hash_that_may_be_of_a_pruned_record_is_a_note(self, run_dir):
        digest = read.at(run_dir, "controller", 3).hash
        prune(run_dir)
        found = verify(run_dir, expect_head=digest)
        assert found.code == 20
        assert any("may be of one that was pruned" in note for note in found.notes)

    def test_the_head_at_the_cut_is_compared(self, run_dir):
        gone = prune(run_dir)
        assert verify(run_dir, expect_head=str(gone.last)).code == 20
        assert verify(run_dir, expect_head=f"{gone.last.seq}:{'0' * 64}").code == 32

    def test_checkpoints_above_the_cut_are_checked_by_the_edge(self, tmp_path):
        """An anchor of the whole log still proves what is left."""
        kept = [Anchor(kind="file", place=str(tmp_path / "anchors.jsonl"))]
        with open_log(
            tmp_path / "run",
            clock=clock_at(datetime(2030, 1, 1, 10, tzinfo=UTC)),
            anchors=kept,
            checkpoint_every=20,
            **SMALL,
        ) as log:
            for number in range(100):
                log.append("note.added", {"text": str(number)}, sync=False)
        gone = prune(tmp_path / "run", anchors=kept)
        found = verify(tmp_path / "run", anchors=[tmp_path / "anchors.jsonl"])
        assert (found.code, found.findings) == (10, [gone.told()])
        assert any("of record 20, which was pruned" in note for note in found.notes)

    def test_another_edge_is_found_by_the_first_checkpoint_behind_it(self, run_dir):
        prune(run_dir)

        def lie(fields):
            fields["body"]["edge"][0] = "0" * 64

        rewrite(run_dir, lie)
        assert verify(run_dir).code >= 30
        with pytest.raises(AuditTamperedError):
            open_log(run_dir)

    def test_a_key_of_before_the_cut_still_signs_what_follows(self, tmp_path, monkeypatch):
        path, vkey = keygen("gpu7", folder=tmp_path / "keys")
        monkeypatch.setenv("LOOPGUARD_LOG_KEY", str(path))
        kept = [Anchor(kind="file", place=str(tmp_path / "anchors.jsonl"))]
        with open_log(
            tmp_path / "run",
            clock=clock_at(datetime(2030, 1, 1, 10, tzinfo=UTC)),
            anchors=kept,
            checkpoint_every=25,
            **SMALL,
        ) as log:
            for number in range(100):
                log.append("note.added", {"text": str(number)}, sync=False)
        gone = prune(tmp_path / "run", anchors=kept)
        assert gone.state.key == str(vkey)
        found = verify(tmp_path / "run", keys=[str(vkey)], anchors=[tmp_path / "anchors.jsonl"])
        assert found.code == 10
        assert not any("was not the key" in note for note in found.notes)


class TestThieves:
    """Somebody removes the front of a log and hides behind a pruning."""

    @pytest.fixture
    def anchored(self, tmp_path, monkeypatch):
        path, vkey = keygen("gpu7", folder=tmp_path / "keys")
        monkeypatch.setenv("LOOPGUARD_LOG_KEY", str(path))
        kept = [Anchor(kind="file", place=str(tmp_path / "anchors.jsonl"))]
        with open_log(
            tmp_path / "run", clock=clock_at(datetime(2030, 1, 1, 10, tzinfo=UTC)), anchors=kept, **SMALL
        ) as log:
            for number in range(100):
                log.append("note.added", {"text": str(number)}, sync=False)
        monkeypatch.setenv("LOOPGUARD_LOG_KEY", "")
        trusted = {"keys": [str(vkey)], "anchors": [tmp_path / "anchors.jsonl"]}
        assert verify(tmp_path / "run", **trusted).code == 0
        return tmp_path / "run", trusted

    def test_a_front_that_is_simply_gone(self, run_dir):
        for path in read.segments(run_dir)[:3]:
            path.unlink()
        assert verify(run_dir).code == 30
        with pytest.raises(AuditTamperedError):
            open_log(run_dir)

    def test_a_file_that_no_record_agrees_with(self, anchored):
        """All in it is true but that the log says so."""
        run_dir, trusted = anchored
        plan = planned(run_dir)
        fields = fields_of(read.last(run_dir))
        fields |= {"type": "log.pruned", "body": {**plan.body, "by": "eve", "reason": "space"}}
        fields["seq"] += 1
        (folder(run_dir) / FILE).write_bytes(encode(fields)[0])
        for kept in ({}, trusted):
            found = verify(run_dir, **kept)
            assert found.code == 30
            assert any("no record of the log agrees" in finding for finding in found.findings)
        with pytest.raises(AuditTamperedError, match="no record of the log agrees"):
            open_log(run_dir)

    def test_a_record_that_the_thief_appended_proves_nothing(self, anchored):
        """The chain is public: anybody can write on. What is kept elsewhere and what is signed do not cover it."""
        run_dir, trusted = anchored
        prune(run_dir)
        assert verify(run_dir, **trusted).code == 20
        assert verify(run_dir, keys=trusted["keys"]).code == 20
        assert verify(run_dir, anchors=trusted["anchors"]).code == 20
        assert verify(run_dir).code == 20

    @pytest.mark.parametrize("content", [b"", b"{}", b"{}\n", b"x" * 600_000, b'{"a":' * 50_000 + b"\n"])
    def test_rubbish_beside_the_log_is_tampering(self, run_dir, content):
        (folder(run_dir) / FILE).write_bytes(content)
        assert verify(run_dir).code == 30
        with pytest.raises(AuditTamperedError):
            open_log(run_dir)

    @pytest.mark.parametrize(
        "lie",
        [
            lambda fields: fields["body"].update(through=fields["body"]["through"] + 8),
            lambda fields: fields["body"].update(through=10**15),
            lambda fields: fields["body"].update(hash="0" * 64),
            lambda fields: fields["body"].update(epoch=-1),
            lambda fields: fields["body"].update(edge=[]),
            lambda fields: fields["body"].update(state=None),
            lambda fields: fields["body"]["state"].update(calls=[1]),
            lambda fields: fields["body"]["state"].update(lease={"from": "a"}),
            lambda fields: fields["body"]["state"].update(key=7),
            lambda fields: fields["body"].update(by="nobody"),
            lambda fields: fields.update(type="note.added"),
            lambda fields: fields.update(seq=1),
        ],
    )
    def test_a_changed_copy_is_tampering(self, run_dir, lie):
        prune(run_dir)
        rewrite(run_dir, lie)
        assert verify(run_dir).code in {30, 31, 32}
        with pytest.raises(AuditTamperedError):
            open_log(run_dir)

    def test_a_copy_that_is_gone_is_tampering(self, run_dir):
        prune(run_dir)
        (folder(run_dir) / FILE).unlink()
        assert verify(run_dir).code == 30

    def test_a_cut_behind_a_pruning_is_still_a_cut(self, run_dir):
        gone = prune(run_dir)
        last = read.segments(run_dir)[-1]
        lines = last.read_bytes().splitlines(keepends=True)
        last.write_bytes(b"".join(lines[:-2]))
        assert verify(run_dir).code in {30, 31}
        assert verify(run_dir, expect_head=str(Head(gone.entry.seq, gone.entry.hash))).code in {30, 31}

    def test_a_record_that_says_nothing_of_use_is_against_the_protocol(self, run_dir):
        with open_log(run_dir) as log:
            log.append("log.pruned", {"through": "all"})
        assert verify(run_dir).code == 40

    def test_a_record_about_no_segment_removes_nothing(self, run_dir):
        """A start finishes what a crash left, and not what somebody made up."""
        plan = planned(run_dir)
        with open_log(run_dir) as log:
            body = {**plan.body, "through": plan.body["through"] - 1, "by": "eve", "reason": "space"}
            body["edge"] = ["0" * 64] * body["through"].bit_count()
            log.append("log.pruned", body)
        with pytest.raises(AuditTamperedError, match="no segment begins behind them: nothing was removed"):
            open_log(run_dir)
        assert read.segments(run_dir)[0].name == segments.name(1)


class TestCrashes:
    def test_a_crash_after_the_record_is_finished_by_the_next_start(self, run_dir):
        gone = prune(run_dir, carried_out=False)
        found = verify(run_dir)
        assert (found.code, found.findings) == (20, [])
        assert any("the next start removes them" in note for note in found.notes)
        with open_log(run_dir, clock=clock_at(LATE)):
            pass
        assert read.first_seq(read.segments(run_dir)[0]) == gone.last.seq + 1
        assert verify(run_dir).findings == [gone.told()]

    @pytest.mark.parametrize("removed", [0, 1, 3])
    def test_a_crash_between_the_files_is_finished_by_the_next_start(self, run_dir, tmp_path, removed):
        shutil.copytree(run_dir, tmp_path / "whole")
        gone = prune(run_dir)
        home = folder(run_dir)
        for path in read.segments(tmp_path / "whole")[removed:]:
            if read.first_seq(path) <= gone.last.seq:
                shutil.copy(path, home)
        assert verify(run_dir).findings == [gone.told()]
        assert next(iter(read.entries(run_dir))).seq == gone.last.seq + 1
        with open_log(run_dir):
            pass
        assert read.first_seq(segments.every(home)[0]) == gone.last.seq + 1

    def test_a_log_that_does_not_verify_removes_nothing(self, run_dir):
        prune(run_dir, carried_out=False)
        with open_log(run_dir, verify=False):
            pass
        assert read.first_seq(read.segments(run_dir)[0]) == 1


class TestReaders:
    def test_a_proof_of_what_is_left_holds(self, run_dir):
        before = prove(run_dir, 120)
        gone = prune(run_dir)
        assert gone.last.seq < 120
        for seq in range(gone.last.seq + 1, gone.entry.seq + 1):
            proven = check(prove(run_dir, seq))
            assert proven.entry.seq == seq
        assert check(before).entry == check(prove(run_dir, 120)).entry

    def test_a_proof_of_what_is_gone_is_refused_with_the_reason(self, run_dir):
        gone = prune(run_dir)
        with pytest.raises(UsageError, match=f"record {gone.last.seq} is not there any more: .*pruned by dana"):
            prove(run_dir, gone.last.seq)

    def test_every_command_works_on_what_is_left(self, run_dir, tmp_path):
        gone = prune(run_dir)
        assert stats(run_dir).types.total() == read.last(run_dir).seq - gone.last.seq
        assert query.cycles(run_dir)
        assert query.freezes(run_dir) == []
        assert "pruned by dana" in render(run_dir)
        packed = bundle(run_dir, out=tmp_path / "b.tar.gz")
        assert f"run/audit/controller/{FILE}" in packed.names
        assert book(run_dir).policy == POLICY

    def test_a_copy_verifies_as_the_original(self, run_dir, tmp_path):
        prune(run_dir)
        shutil.copytree(run_dir, tmp_path / "copy")
        assert verify(tmp_path / "copy").head == verify(run_dir).head
        assert verify(tmp_path / "copy").code == 20


class TestStreams:
    def test_each_stream_has_a_front_of_its_own(self, tmp_path):
        """What the controller's stream says of records that another one pruned cannot be compared, and is no fork."""
        run_dir = tmp_path / "run"
        with (
            open_log(run_dir, stream="rank-1", clock=clock_at(datetime(2030, 1, 1, 10, tzinfo=UTC)), **SMALL) as rank,
            open_log(
                run_dir, clock=clock_at(datetime(2030, 1, 1, 10, tzinfo=UTC)), checkpoint_every=10, **SMALL
            ) as log,
        ):
            for number in range(60):
                rank.append("note.added", {"text": str(number)})
                log.append("note.added", {"text": str(number)})
        assert verify(run_dir).findings == []
        gone = prune(run_dir, stream="rank-1")
        with open_log(run_dir, clock=clock_at(LATE)):
            pass
        found = verify(run_dir)
        assert (found.code, found.findings) == (20, [gone.told()])
        assert [one.pruned for one in found.streams] == [0, gone.last.seq]
        head = str(found.head)
        assert verify(run_dir, expect_head=head).code == 10


def test_the_body_is_json_that_the_reader_takes_back(run_dir):
    gone = prune(run_dir)
    assert Pruned.of(decode((folder(run_dir) / FILE).read_bytes()[:-1])) == gone
    assert json.loads((folder(run_dir) / FILE).read_bytes())["type"] == "log.pruned"
