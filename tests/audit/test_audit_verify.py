"""What verification says of a log that somebody touched, and of one that nobody did."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from audit_stories import (
    POLICY,
    Loop,
    digest,
    finished,
    forget_checkpoints,
    frozen_twice,
    lay_out,
    open_log,
    plain_log,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopguard.audit import read
from loopguard.audit.anchors import Anchor
from loopguard.audit.events import encode, fields_of
from loopguard.audit.verify import STATUS, verify
from loopguard.errors import UsageError
from loopguard.testing import FrozenClock

FILES = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run of some hundred records, with a freeze, a resume and another freeze."""
    run_dir = tmp_path_factory.mktemp("story") / "run"
    frozen_twice(run_dir, updates=48, calls=12)
    return run_dir


@pytest.fixture(autouse=True, scope="module")
def _no_writer():
    """Nobody writes here, so that there is nobody to wait for at a cut line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "_WRITER_GRACE_S", 0)
        yield


@pytest.fixture(scope="module")
def copy(story, tmp_path_factory):
    """Writes other lines into a copy of the story and verifies it."""
    run_dir = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(story, run_dir)
    forget_checkpoints(run_dir)
    path = read.segments(run_dir)[0]

    def check(data: bytes, **options):
        path.write_bytes(data)
        return verify(run_dir, **options)

    return check


@pytest.fixture(scope="module")
def whole(story):
    """The bytes of the story's only segment."""
    return read.segments(story)[0].read_bytes()


def rewrite(run_dir: Path, change) -> None:
    """Forge a log: change records and hash everything anew, as somebody who may write to the folder could."""
    forget_checkpoints(run_dir)
    path = read.segments(run_dir)[0]
    prev, lines = "0" * 64, []
    for entry in read.entries(run_dir):
        changed = change(fields_of(entry))
        if changed is not None:
            line, prev = encode({**changed, "seq": len(lines) + 1, "prev": prev})
            lines.append(line)
    path.write_bytes(b"".join(lines))


def drop(kind: str, number: int = 0):
    """A change that leaves out one record of a type."""
    seen = -1

    def change(fields):
        nonlocal seen
        seen += fields["type"] == kind
        return None if fields["type"] == kind and seen == number else fields

    return change


class TestUntouched:
    def test_a_clean_log_without_an_anchor_is_unanchored(self, story):
        """Nobody can say that the tail was not cut, and the result says just that."""
        result = verify(story)
        assert (result.code, result.status, result.findings) == (20, "unanchored", [])
        assert result.summary.startswith("the chain is whole; its tail is not proven")
        assert result.records == result.head.seq > 250

    @pytest.mark.parametrize("form", ["{seq}:{hash}", "{hash}", "  {seq}:{hash}\n"])
    def test_a_clean_log_with_its_head_is_ok(self, story, form):
        head = verify(story).head
        result = verify(story, expect_head=form.format(seq=head.seq, hash=head.hash))
        assert (result.code, result.status) == (0, "ok")

    def test_an_anchor_in_the_middle_proves_what_stands_before_it(self, story):
        """What follows could still have lost its tail, so this is not ok."""
        middle = read.at(story, "controller", 100)
        result = verify(story, expect_head=f"100:{middle.hash}")
        assert result.code == 20
        assert result.notes == ["records 1-100 are anchored; what follows is not proven against a cut"]

    @pytest.mark.parametrize("text", ["latest", "12:34", "x:" + "0" * 64, "0" * 63, ""])
    def test_an_anchor_that_is_none_is_a_usage_error(self, story, text):
        with pytest.raises(UsageError, match="is not SEQ:HASH or HASH"):
            verify(story, expect_head=text)

    def test_verifying_writes_nothing(self, story):
        """A copied folder on a read-only medium verifies as well, without the lock."""
        before = {path: path.read_bytes() for path in story.rglob("*") if path.is_file()}
        verify(story)
        assert {path: path.read_bytes() for path in story.rglob("*") if path.is_file()} == before

    def test_a_log_that_is_being_written_verifies(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("note.added")
            assert verify(tmp_path / "run").code == 20

    def test_every_status_has_its_code(self):
        """The codes of the command line, each with one name."""
        assert STATUS == {
            0: "ok",
            10: "warn",
            20: "unanchored",
            30: "tamper",
            31: "truncated",
            32: "replaced",
            33: "splice",
            34: "fork",
            40: "protocol",
            41: "approval",
            42: "missing",
            50: "unreadable",
        }


class TestEveryEdit:
    """Each way to touch a log of some hundred records gets its class; none of them passes."""

    @FILES
    @given(data=st.data())
    def test_a_flipped_byte_is_tamper(self, copy, whole, data):
        at = data.draw(st.integers(0, len(whole) - 1))
        flip = data.draw(st.integers(1, 255))
        assert copy(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]).status == "tamper"

    @FILES
    @given(data=st.data())
    def test_swapped_lines_are_tamper(self, copy, whole, data):
        lines = whole.splitlines(keepends=True)
        a = data.draw(st.integers(0, len(lines) - 2))
        b = data.draw(st.integers(a + 1, len(lines) - 1))
        lines[a], lines[b] = lines[b], lines[a]
        assert copy(b"".join(lines)).status == "tamper"

    @FILES
    @given(data=st.data())
    def test_dropped_lines_are_tamper_unless_they_were_the_tail(self, copy, whole, data):
        lines = whole.splitlines(keepends=True)
        first = data.draw(st.integers(0, len(lines) - 2))
        last = data.draw(st.integers(first, min(first + 5, len(lines) - 2)))
        del lines[first : last + 1]
        result = copy(b"".join(lines))
        assert result.status == "tamper"
        assert "gone" in result.findings[0]

    @FILES
    @given(data=st.data())
    def test_a_repeated_line_is_tamper(self, copy, whole, data):
        lines = whole.splitlines(keepends=True)
        line = data.draw(st.integers(0, len(lines) - 1))
        place = data.draw(st.integers(0, len(lines)))
        lines.insert(place, lines[line])
        assert copy(b"".join(lines)).status == "tamper"

    @FILES
    @given(data=st.data())
    def test_a_cut_tail_is_never_ok(self, copy, whole, data):
        """Without an anchor the tail is unproven; with one the cut is named."""
        keep = data.draw(st.integers(0, len(whole) - 1))
        first_line = whole.index(b"\n") + 1
        head = verify_head(whole)
        assert copy(whole[:keep]).status == ("unanchored" if keep >= first_line else "missing")
        assert copy(whole[:keep], expect_head=head).status == "truncated"
        assert copy(whole[:keep], expect_head=head.partition(":")[2]).status == "truncated"

    def test_every_single_byte_of_a_short_log(self, tmp_path):
        """Not a sample: each byte of it, also the newline at the very end."""
        plain_log(tmp_path / "run", notes=2)
        path = read.segments(tmp_path / "run")[0]
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert verify(tmp_path / "run").code == 30, at

    def test_one_edit_gives_one_finding_with_its_place(self, copy, whole):
        """The records around an edited one are still told from it."""
        lines = whole.splitlines(keepends=True)
        lines[99] = lines[99].replace(b'"cycle":', b'"cyclE":')
        result = copy(b"".join(lines))
        assert len(result.findings) == 1
        assert "jsonl:100: record 100 was altered" in result.findings[0]
        assert result.records == len(lines) - 1

    def test_findings_are_counted_beyond_fifty(self, copy, whole):
        result = copy(whole.replace(b'"boot":"', b'"boot":"x'))
        assert len(result.findings) == 51
        assert result.findings[-1].startswith("and ")

    def test_a_line_longer_than_any_record_does_not_fill_memory(self, copy, whole):
        assert copy(whole + b"x" * 2_000_000).status == "tamper"


def verify_head(whole: bytes) -> str:
    record = json.loads(whole.splitlines()[-1])
    return f"{record['seq']}:{record['hash']}"


class TestForgery:
    """Logs whose every hash is right, since whoever may write to the folder can hash as well."""

    def test_two_writers_make_a_fork(self, tmp_path):
        """A copy of the folder was written to as well, and its records brought back."""
        plain_log(tmp_path / "a", notes=4)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        for name in ("a", "b"):
            with open_log(tmp_path / name) as log:
                log.append("note.added", {"text": name})
        path = read.segments(tmp_path / "a")[0]
        theirs = read.segments(tmp_path / "b")[0].read_bytes().splitlines(keepends=True)
        path.write_bytes(path.read_bytes() + b"".join(theirs[5:]))
        result = verify(tmp_path / "a")
        assert result.status == "fork"
        assert "two different records 6" in result.findings[0]

    def test_an_epoch_that_goes_back_is_a_fork(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.epoch = 3
            log.append("note.added")
            log.append("note.added")
        rewrite(tmp_path / "run", lambda fields: fields | ({"epoch": 1} if fields["seq"] == 3 else {}))
        assert verify(tmp_path / "run").status == "fork"

    def test_a_record_of_another_run_is_a_splice(self, tmp_path):
        plain_log(tmp_path / "a")
        plain_log(tmp_path / "b", run_id="run-b")
        path = read.segments(tmp_path / "a")[0]
        lines = path.read_bytes().splitlines(keepends=True)
        lines[5] = read.segments(tmp_path / "b")[0].read_bytes().splitlines(keepends=True)[5]
        path.write_bytes(b"".join(lines))
        result = verify(tmp_path / "a")
        assert result.status == "splice"
        assert "record 6 belongs to run-b/controller, not to run-a/controller" in result.findings[0]

    def test_the_whole_log_of_another_run_is_a_splice(self, tmp_path):
        """`run.json` says whose log belongs here."""
        plain_log(tmp_path / "a", run_id="run-b")
        lay_out(tmp_path / "a", run_id="run-a")
        assert verify(tmp_path / "a").status == "splice"

    def test_a_log_written_anew_is_replaced_if_an_anchor_has_its_number(self, tmp_path):
        """SEQ:HASH shows the replacement; the hash alone makes it look like a cut; without either it cannot show."""
        plain_log(tmp_path / "a")
        head = verify(tmp_path / "a").head
        rewrite(tmp_path / "a", lambda fields: fields | {"body": {"text": "never happened"}})
        assert verify(tmp_path / "a", expect_head=str(head)).status == "replaced"
        assert verify(tmp_path / "a", expect_head=head.hash).status == "truncated"
        assert verify(tmp_path / "a").status == "unanchored"

    def test_the_cache_beside_the_log_shows_careless_changes(self, tmp_path):
        """`state.json` is no anchor, but one that contradicts the log is a finding."""
        plain_log(tmp_path / "a")
        head = verify(tmp_path / "a").head
        cache = {"stream": "controller", "seq": head.seq, "hash": head.hash}
        (tmp_path / "a" / "state.json").write_text(json.dumps(cache))
        assert verify(tmp_path / "a").status == "unanchored"
        forget_checkpoints(tmp_path / "a")
        path = read.segments(tmp_path / "a")[0]
        whole = path.read_bytes()
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
        assert verify(tmp_path / "a").status == "truncated"
        path.write_bytes(whole)
        rewrite(tmp_path / "a", lambda fields: fields | {"body": {}})
        assert verify(tmp_path / "a").status == "replaced"

    def test_a_segment_under_another_name_is_tamper(self, tmp_path):
        plain_log(tmp_path / "a")
        path = read.segments(tmp_path / "a")[0]
        path.rename(path.with_name(read.segment_name(7)))
        assert verify(tmp_path / "a").status == "tamper"

    def test_a_missing_segment_is_tamper(self, tmp_path):
        plain_log(tmp_path / "a", notes=60, segment_bytes=5000)
        read.segments(tmp_path / "a")[1].unlink()
        result = verify(tmp_path / "a")
        assert result.status == "tamper"
        assert "are gone" in result.findings[0]

    def test_a_cut_line_that_is_not_the_last_is_tamper(self, tmp_path):
        plain_log(tmp_path / "a", notes=60, segment_bytes=5000)
        path = read.segments(tmp_path / "a")[0]
        path.write_bytes(path.read_bytes()[:-20])
        assert verify(tmp_path / "a").status == "tamper"

    def test_set_aside_bytes_must_be_the_ones_that_were_named(self, tmp_path):
        plain_log(tmp_path / "a")
        with read.segments(tmp_path / "a")[0].open("ab") as file:
            file.write(b'{"actor":{"id":')
        open_log(tmp_path / "a").close()
        torn = next((tmp_path / "a/audit/controller").glob("torn-*.bin"))
        torn.write_bytes(b"{}")
        assert verify(tmp_path / "a").status == "tamper"
        torn.unlink()
        assert verify(tmp_path / "a").notes[0].endswith("not kept here")

    def test_a_later_format_is_unreadable_rather_than_tampered(self, tmp_path):
        plain_log(tmp_path / "a")
        path = read.segments(tmp_path / "a")[0]
        lines = path.read_bytes().splitlines(keepends=True)
        lines[3] = later_format(lines[3])
        path.write_bytes(b"".join(lines))
        result = verify(tmp_path / "a")
        assert result.status == "unreadable"
        assert "is of format 2; this LoopGuard reads format 1" in result.findings[0]

    @pytest.mark.parametrize("change", [lambda value: value | {"more": 1}, lambda value: value | {"seq": "4"}])
    def test_fields_that_do_not_belong_are_tamper(self, tmp_path, change):
        """Also where the hash over them is right."""
        plain_log(tmp_path / "a")
        path = read.segments(tmp_path / "a")[0]
        lines = path.read_bytes().splitlines(keepends=True)
        lines[3] = hashed(change(json.loads(lines[3])))
        path.write_bytes(b"".join(lines))
        assert verify(tmp_path / "a").status == "tamper"


def later_format(line: bytes) -> bytes:
    return hashed(json.loads(line) | {"v": 2})


def hashed(value: dict) -> bytes:
    """A line as the format document says it is made, without any code of ours."""
    unhashed = json.dumps({k: v for k, v in value.items() if k != "hash"}, sort_keys=True, separators=(",", ":"))
    value["hash"] = hashlib.sha256(b"loopguard-record-v1\n" + unhashed.encode()).hexdigest()
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_the_format_document_is_enough_to_make_a_line(tmp_path):
    """Canonical JSON and one hash: a stranger's line is byte for byte ours."""
    finished(tmp_path / "run", cycles=1)
    for line in read.lines(tmp_path / "run"):
        assert hashed(json.loads(line.data)) == line.data + b"\n"


class TestProtocol:
    """Things that no record allowed are findings even where every hash is right."""

    @pytest.fixture
    def forged(self, tmp_path):
        run_dir = tmp_path / "run"
        frozen_twice(run_dir, updates=16, calls=4)
        return run_dir

    @pytest.mark.parametrize(
        ("kind", "finding"),
        [
            ("tool.decided", "call 'c0-0' ran without a decision that allows it"),
            ("promotion.decided", "a promotion was applied without a decision that allows it"),
            ("update.leased", "updates 1-16 were applied outside a lease (there is no lease)"),
            ("resume.applied", "data was admitted while frozen (f1)"),
            ("resume.applied", "updates were applied while frozen (f1)"),
            ("resume.applied", "a promotion was applied while frozen (f1)"),
            ("freeze.entered", "a resume where nothing was frozen"),
        ],
        ids=["tool", "promotion", "lease", "admitted", "applied", "promoted", "resume"],
    )
    def test_a_record_that_was_forged_away_leaves_a_hole(self, forged, kind, finding):
        rewrite(forged, drop(kind))
        result = verify(forged)
        assert result.status == "protocol"
        assert any(finding in text for text in result.findings), result.findings

    def test_the_story_itself_has_no_finding(self, forged):
        rewrite(forged, lambda fields: fields)
        assert verify(forged).findings == []

    @pytest.mark.parametrize("result", ["deny", "freeze"])
    def test_a_denial_allows_nothing(self, tmp_path, result):
        with open_log(tmp_path / "run") as log:
            log.append("tool.decided", {"call": "c1", "result": result})
            log.append("tool.finished", {"call": "c1", "status": "ok"})
            log.append("promotion.decided", {"result": result, "weights": digest("s")})
            log.append("promotion.applied", {"actor": digest("s")})
        assert len(verify(tmp_path / "run").findings) == 2

    def test_a_call_ends_once(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("tool.decided", {"call": "c1", "result": "allow"})
            log.append("tool.finished", {"call": "c1", "status": "ok"})
            log.append("tool.finished", {"call": "c1", "status": "ok"})
        assert verify(tmp_path / "run").status == "protocol"

    def test_a_call_that_died_with_its_process_is_only_a_note(self, tmp_path):
        """And the next process may still say that it was lost."""
        with open_log(tmp_path / "run") as log:
            log.append("tool.decided", {"call": "c1", "result": "allow"})
            log.append("tool.decided", {"call": "c2", "result": "allow"})
        with open_log(tmp_path / "run") as log:
            log.append("tool.lost", {"call": "c2", "reason": "the process died"})
        result = verify(tmp_path / "run")
        assert result.code == 20
        assert "2 allowed tool calls ended with their process" in result.notes[0]

    def test_a_promotion_of_other_weights_than_allowed_is_a_finding(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("promotion.decided", {"result": "allow", "weights": digest("a")})
            log.append("promotion.applied", {"actor": digest("b")})
        assert "were promoted where" in verify(tmp_path / "run").findings[0]

    def test_leases_that_touch_are_one(self, tmp_path):
        """A batch of results may span two leases of the same epoch."""
        with open_log(tmp_path / "run") as log:
            log.append("update.leased", {"from": 1, "to": 64})
            log.append("update.leased", {"from": 65, "to": 128})
            log.append("update.applied", {"from": 60, "to": 70, "readings": {}})
        assert verify(tmp_path / "run").findings == []

    @pytest.mark.parametrize("between", ["freeze", "restart", "settled"])
    def test_a_lease_ends_with_its_epoch_and_its_process(self, tmp_path, between):
        with open_log(tmp_path / "run") as log:
            log.append("update.leased", {"from": 1, "to": 64})
            if between == "freeze":
                log.append("freeze.entered", {"freeze": "f1"})
                log.append("resume.applied", {"freeze": "f1", "by": "dana", "reason": "fine"})
            if between == "settled":
                log.append("update.settled", {"from": 1, "to": 64})
            if between != "restart":
                log.append("update.applied", {"from": 1, "to": 2, "readings": {}})
        with open_log(tmp_path / "run") as log:
            log.append("update.applied", {"from": 1, "to": 2, "readings": {}})
        assert "outside a lease (there is no lease)" in verify(tmp_path / "run").findings[0]

    @pytest.mark.parametrize("body", [{}, {"from": 3, "to": 2}, {"from": "1", "to": 2}])
    def test_updates_without_a_range_are_a_finding(self, tmp_path, body):
        with open_log(tmp_path / "run") as log:
            log.append("update.leased", {"from": 1, "to": 64})
            log.append("update.applied", body)
        assert verify(tmp_path / "run").status == "protocol"

    @pytest.mark.parametrize("body", [{"freeze": "f2"}, {"freeze": "f1", "by": ""}, {"freeze": "f1", "reason": ""}])
    def test_a_resume_must_name_the_freeze_a_person_and_a_reason(self, tmp_path, body):
        with open_log(tmp_path / "run") as log:
            log.append("freeze.entered", {"freeze": "f1"})
            log.append("resume.applied", {"by": "dana", "reason": "fine", **body})
        assert verify(tmp_path / "run").status == "protocol"


class TestSurroundings:
    def test_no_log_is_missing(self, tmp_path):
        result = verify(tmp_path)
        assert (result.status, result.records) == ("missing", 0)
        assert verify(tmp_path, expect_head="0" * 64).status == "missing"

    def test_a_guard_policy_that_is_gone_is_missing(self, tmp_path):
        """The digest in the records must lead to a file."""
        plain_log(tmp_path / "run")
        (tmp_path / "run" / "policy" / f"{POLICY}.yaml").unlink()
        result = verify(tmp_path / "run")
        assert result.status == "missing"
        assert f"{POLICY}.yaml: the guard policy that record 1 was decided under is not there" in result.findings[0]

    def test_a_policy_digest_is_never_a_path(self, tmp_path):
        """A forged digest cannot make the verifier look elsewhere."""
        plain_log(tmp_path / "run")
        rewrite(tmp_path / "run", lambda fields: fields | {"policy": "../../../etc/passwd"})
        assert "is not a digest" in verify(tmp_path / "run").findings[0]

    def test_a_file_that_cannot_be_read_is_unreadable(self, tmp_path):
        (tmp_path / "run/audit/controller" / read.segment_name(1)).mkdir(parents=True)
        assert verify(tmp_path / "run").status == "unreadable"

    @pytest.mark.parametrize(
        ("name", "status"),
        [
            *((name, "unreadable") for name in ("run.json", "state.json", "audit", "audit/controller")),
            *((f"audit/controller/{name}", "unreadable") for name in ("pruned.json", "seg-000000000001.jsonl")),
            ("audit/rank-1", "unanchored"),
        ],
    )
    def test_a_link_that_leads_to_itself_is_not_a_file_that_is_missing(self, tmp_path, name, status):
        """Also where the compressed form of a segment lies beside it: the raw one counts. No stream is a link."""
        plain_log(tmp_path / "run")
        path = tmp_path / "run" / name
        if path.suffix == ".jsonl":
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        if os.path.lexists(path):
            path.rename(tmp_path / "away")
        path.symlink_to(path)
        assert verify(tmp_path / "run").status == status

    def test_bytes_that_were_set_aside_have_a_number_of_ascii_digits(self, tmp_path):
        """No writer ever set any aside under another name."""
        name = f"torn-{chr(0x660) * 12}.bin"
        with open_log(tmp_path / "run") as log:
            log.append("log.recovered", {"torn_bytes": 1, "digest": "0" * 64, "file": name})
        (tmp_path / "run" / "audit" / "controller" / name).write_bytes(b"x")
        assert verify(tmp_path / "run").status == "unanchored"

    def test_a_clock_that_ran_backward_is_a_warning(self, tmp_path):
        """Times are the machine's own word; the order of records comes from the chain."""
        clock = FrozenClock()
        with open_log(tmp_path / "run", clock=clock) as log:
            clock.advance(seconds=-60)
            log.append("note.added")
        result = verify(tmp_path / "run")
        assert result.code == 20
        assert "clock_back" in result.findings[0]
        assert verify(tmp_path / "run", expect_head=str(result.head)).status == "warn"

    def test_a_break_outranks_what_follows_from_it(self, tmp_path):
        """A dropped decision is tamper, though the call it allowed is then a protocol finding too."""
        loop = Loop(tmp_path / "run", updates=16, calls=4)
        loop.honest(0)
        loop.finish()
        path = read.segments(tmp_path / "run")[0]
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(line for line in lines if b"tool.decided" not in line))
        assert verify(tmp_path / "run").status == "tamper"


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", '{"id": 7}'])
@pytest.mark.parametrize("name", ["run.json", "state.json"])
def test_no_file_beside_the_log_is_an_exception(tmp_path, name, content):
    """They are caches and labels: what they say may contradict the log, and no more."""
    plain_log(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert verify(tmp_path / "run").status == "unanchored"


def test_a_segment_that_cannot_be_read_is_no_exception_beside_a_repeated_record(tmp_path):
    """The second look at the log, for another record of that number, meets it first."""
    plain_log(tmp_path / "run")
    path = read.segments(tmp_path / "run")[0]
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])
    path.with_name(read.segment_name(99)).mkdir()
    assert verify(tmp_path / "run").status == "unreadable"


def test_the_log_of_one_stream_under_the_name_of_another_takes_no_anchor_away(tmp_path):
    """Without a run.json the first record says whose log it is, and only of its own stream."""
    place = tmp_path / "anchors.jsonl"
    with open_log(tmp_path / "run", anchors=[Anchor(kind="file", place=str(place))]) as log:
        log.append("note.added")
    (tmp_path / "run" / "run.json").unlink(missing_ok=True)
    shutil.copytree(tmp_path / "run/audit/controller", tmp_path / "run/audit/copy")
    result = verify(tmp_path / "run", anchors=[place])
    assert (result.status, result.streams[0].proven) == ("splice", result.streams[0].head.seq - 1)


def test_a_folder_where_a_file_belongs_is_unreadable(tmp_path):
    plain_log(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink(missing_ok=True)
    (tmp_path / "run" / "run.json").mkdir()
    assert verify(tmp_path / "run").status == "unreadable"


def test_a_record_that_is_nested_without_end_is_tamper(tmp_path):
    """Its hash is right, and no reader of JSON reads it."""
    plain_log(tmp_path / "run")
    path = read.segments(tmp_path / "run")[0]
    line = path.read_bytes().splitlines()[0]
    at = line.index(b',"boot"')
    forged = line[:at] + b',"bodz":' + b"[" * 100_000 + line[at:]
    at = forged.rindex(b',"hash":"')
    digest = hashlib.sha256(b"loopguard-record-v1\n" + forged[:at] + forged[at + 74 :]).hexdigest().encode()
    path.write_bytes(forged[: at + 9] + digest + forged[at + 73 :] + b"\n")
    assert "is not JSON" in verify(tmp_path / "run").findings[0]
