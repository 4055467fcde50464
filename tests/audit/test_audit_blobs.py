"""Payloads that lie apart: on disk before their record, checked, erased, and set right after a crash."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from audit_stories import open_log

from loopguard.audit import blobs, prune, read
from loopguard.audit import log as logs
from loopguard.audit.verify import verify
from loopguard.errors import AuditWriteError, UsageError

CODE = b"print('the address is 12 Elm Street')"


def folder(run_dir):
    return read.stream_dir(run_dir)


def there(run_dir):
    """The commitments of all blobs."""
    return sorted(path.name for path in blobs.paths(folder(run_dir)))


def call(log, name="c1", *, code=CODE, cycle=1):
    """A call whose code lies apart; gives its commitment."""
    (kept,) = log.keep([code])
    body = {"call": name, "tool": "python", "code": kept, "result": "deny", "rule": "r", "reason": "no"}
    log.append("tool.decided", body, cycle=cycle)
    return kept["commitment"]


@pytest.fixture
def run(tmp_path):
    """A run with two calls of cycle 1 and one of cycle 2, and their commitments."""
    with open_log(tmp_path / "run") as log:
        commitments = [call(log, "c1"), call(log, "c2", code=b""), call(log, "c3", code=b"\xff\0" * 50, cycle=2)]
    return tmp_path / "run", commitments


def find(run_dir, **options):
    found = verify(run_dir, **options)
    return found.code, "\n".join(found.findings)


class TestABlob:
    def test_is_what_the_page_says(self, run):
        """18 bytes, 32 random ones, the payload; named by the SHA-256 of all that, under its beginning."""
        run_dir, commitments = run
        path = folder(run_dir) / "blobs" / commitments[0][:2] / commitments[0]
        data = path.read_bytes()
        assert (data[:18], data[50:]) == (b"loopguard-blob-v1\n", CODE)
        assert hashlib.sha256(data).hexdigest() == commitments[0]
        (decided, *_) = read.entries(run_dir, types=("tool.decided",))
        assert decided.body["code"] == {"bytes": len(CODE), "commitment": commitments[0]}

    def test_the_same_payload_has_another_commitment_each_time(self, tmp_path):
        """Else two calls with the same code could be told to be that, and a short one be guessed."""
        with open_log(tmp_path / "run") as log:
            assert len({one["commitment"] for one in log.keep([CODE, CODE, CODE])}) == 3

    def test_it_is_on_disk_before_its_record(self, tmp_path, monkeypatch):
        """File and folder are synced before the log writes a byte of the record."""
        steps = []
        fsync, write_all = os.fsync, logs._write_all
        monkeypatch.setattr(
            os, "fsync", lambda fd: (steps.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))
        )
        monkeypatch.setattr(logs, "_write_all", lambda fd, data: (steps.append("record"), write_all(fd, data)))
        with open_log(tmp_path / "run") as log:
            steps.clear()
            commitment = call(log)
        path = blobs.path_of(folder(tmp_path / "run"), commitment)
        before = steps[: steps.index("record")]
        home = path.parent.parent
        assert [step for step in before if step in map(str, (path, path.parent, home, home.parent))] == list(
            map(str, (home.parent, home, path, path.parent))
        )

    @pytest.mark.parametrize("at", ["open", "write", "sync"])
    def test_a_full_disk_leaves_no_blob_no_record_and_a_log_that_takes_no_more(self, tmp_path, monkeypatch, at):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        log = open_log(tmp_path / "run")
        with monkeypatch.context() as patch:
            if at == "sync":
                patch.setattr(blobs.os, "fsync", full)
            else:
                patch.setattr(blobs, "_write" if at == "write" else "_make_folders", full)
            with pytest.raises(AuditWriteError, match="cannot keep a payload beside .*: No space left"):
                log.keep([b"one", b"two"])
        assert there(tmp_path / "run") == []
        with pytest.raises(AuditWriteError):
            log.append("note.added", {"text": "x"})
        log.append_last("freeze.entered", {"freeze": "f1", "reason": "full"})
        log.close()
        assert find(tmp_path / "run")[0] == 20


class TestCheck:
    def test_untouched_payloads_are_no_finding(self, run):
        assert find(run[0]) == (20, "")

    @pytest.mark.parametrize("edit", [lambda data: data + b"x", lambda data: data[:-1], lambda data: b"", bytes.upper])
    def test_one_that_was_changed_is_tampering(self, run, edit):
        run_dir, commitments = run
        path = blobs.path_of(folder(run_dir), commitments[0])
        path.write_bytes(edit(path.read_bytes()))
        code, said = find(run_dir)
        assert code == 30
        assert f"{path}: is not what record 2 stands for as code" in said

    def test_another_one_in_its_place_is_tampering(self, run):
        """A blob is good under its own name alone."""
        run_dir, (first, _, third) = run
        shutil.copy(blobs.path_of(folder(run_dir), third), blobs.path_of(folder(run_dir), first))
        assert find(run_dir)[0] == 30

    @pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
    def test_what_is_no_file_is_tampering_and_is_not_opened(self, run, tmp_path, kind):
        """A link to the very same bytes is none either: they would lie where erasing does not reach."""
        run_dir, commitments = run
        path = blobs.path_of(folder(run_dir), commitments[0])
        path.rename(tmp_path / "elsewhere")
        match kind:
            case "link":
                path.symlink_to(tmp_path / "elsewhere")
            case "pipe":
                os.mkfifo(path)
            case _:
                path.mkdir()
        code, said = find(run_dir)
        assert code == 30
        assert "is no file, and record 2 names it as code" in said
        assert blobs.Reader(run_dir).text(commitments[0], most=50) == "(not a file)"

    def test_one_that_is_gone_is_missing(self, run):
        run_dir, commitments = run
        blobs.path_of(folder(run_dir), commitments[1]).unlink()
        code, said = find(run_dir)
        assert code == 42
        assert f"record 3: what it names as code ({commitments[1]}) is gone" in said

    def test_all_of_them_gone_are_missing(self, run):
        shutil.rmtree(folder(run[0]) / "blobs")
        found = verify(run[0])
        assert (found.code, len(found.findings)) == (42, 3)

    def test_something_else_in_the_place_of_their_folder_makes_them_missing_too(self, run):
        """The verifier goes on behind the first: what cannot be read is less than what is gone."""
        run_dir, commitments = run
        shutil.rmtree(folder(run_dir) / "blobs")
        (folder(run_dir) / "blobs").touch()
        found = verify(run_dir)
        assert (found.code, len(found.findings)) == (42, 3)
        assert blobs.Reader(run_dir).text(commitments[0], most=5) == "(gone, and not erased by any record)"
        with open_log(run_dir) as log:
            log.erase(commitments, by="dana", reason="moved by hand")
        assert find(run_dir) == (20, "")
        assert list(read.entries(run_dir, types=("note.added",))) == []

    def test_a_reader_who_knows_that_they_were_left_out_does_not_miss_them(self, run):
        shutil.rmtree(folder(run[0]) / "blobs")
        found = verify(run[0], without_payloads=True)
        assert (found.code, found.findings) == (20, [])
        assert "3 payloads were left out on purpose: nothing of them was checked" in found.notes

    @pytest.mark.parametrize(
        "body",
        [
            {"commitment": "0" * 63, "bytes": 1},
            {"commitment": "0" * 64, "bytes": -1},
            {"commitment": "0" * 64, "bytes": "1"},
            {"commitment": "../../../../etc/passwd", "bytes": 1},
            {"commitment": "0" * 64},
            "x",
        ],
    )
    def test_what_is_no_commitment_is_a_protocol_finding(self, tmp_path, monkeypatch, body):
        """Only who writes a log of his own gets that far; nothing outside of the folder is looked at."""
        monkeypatch.setattr(logs, "recorded", lambda _, told: (told, []))
        with open_log(tmp_path / "run") as log:
            log.append("tool.decided", {"call": "c", "result": "deny", "code": body})
        assert find(tmp_path / "run")[0] == 40

    def test_a_size_that_is_not_that_of_the_payload_is_one_too(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            (kept,) = log.keep([CODE])
            log.append("tool.decided", {"call": "c", "result": "deny", "code": kept | {"bytes": 1}})
        assert find(tmp_path / "run")[0] == 40

    def test_what_the_disk_refuses_is_unreadable(self, run, monkeypatch):
        def refuse(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(blobs, "_opened", refuse)
        code, said = find(run[0])
        assert code == 50
        assert "Permission denied" in said


class TestErase:
    def test_the_payload_goes_and_the_chain_stays(self, run):
        run_dir, (first, second, third) = run
        before = list(read.entries(run_dir))
        with open_log(run_dir) as log:
            assert log.erase([first, third], by="dana", reason="holds an address") == [first, third]
        assert there(run_dir) == [second]
        assert list(read.entries(run_dir))[: len(before)] == before
        found = verify(run_dir)
        assert (found.code, found.findings) == (20, [])
        assert any(note.startswith("2 payloads were erased") for note in found.notes)
        (erased,) = read.entries(run_dir, types=("blob.erased",))
        assert erased.body == {"by": "dana", "reason": "holds an address", "commitments": [first, third]}
        assert erased.actor == {"kind": "person", "id": "dana"}

    def test_the_record_is_on_disk_before_the_first_payload_goes(self, run, monkeypatch):
        run_dir, commitments = run
        states = []

        def delete(stream_dir, wanted):
            entry = read.last(run_dir)
            states.append((entry.type, log.durable_head.seq == entry.seq, there(run_dir) == sorted(commitments)))

        with open_log(run_dir) as log:
            monkeypatch.setattr(blobs, "delete", delete)
            log.erase(commitments, by="dana", reason="r")
        assert states == [("blob.erased", True, True)]

    def test_one_that_cannot_be_recorded_deletes_nothing(self, run, monkeypatch):
        run_dir, commitments = run

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        log = open_log(run_dir)
        with monkeypatch.context() as patch:
            patch.setattr(logs, "_write_all", full)
            with pytest.raises(AuditWriteError):
                log.erase(commitments, by="dana", reason="r")
        log.close()
        assert there(run_dir) == sorted(commitments)
        assert find(run_dir)[0] == 20

    def test_what_a_crash_left_is_deleted_at_the_next_start(self, run, monkeypatch):
        """The record says that it is erased. Until then that is a warning."""
        run_dir, commitments = run
        with open_log(run_dir) as log, monkeypatch.context() as patch:
            patch.setattr(blobs, "delete", lambda *_: None)
            log.erase(commitments[:2], by="dana", reason="r")
        code, said = find(run_dir, expect_head=str(verify(run_dir).head))
        assert code == 10
        assert "is there, and record 6 says that it was erased; the next start deletes it" in said
        with open_log(run_dir):
            pass
        assert there(run_dir) == commitments[2:]
        assert find(run_dir) == (20, "")

    def test_one_that_the_disk_does_not_delete_is_noted_and_tried_again(self, run, monkeypatch):
        run_dir, commitments = run

        def refuse(*_):
            raise PermissionError(errno.EACCES, "Permission denied", "x")

        with open_log(run_dir) as log, monkeypatch.context() as patch:
            patch.setattr(blobs, "delete", refuse)
            log.erase(commitments[:1], by="dana", reason="r")
        (note,) = read.entries(run_dir, types=("note.added",))
        assert note.body["text"] == "payloads that were erased cannot be deleted yet: Permission denied (x)"
        with open_log(run_dir):
            pass
        assert commitments[0] not in there(run_dir)

    def test_one_that_can_never_be_deleted_keeps_no_other_and_no_start(self, run):
        """A folder in its place, say: the rest has to go all the same, and the run to go on."""
        run_dir, commitments = run
        path = blobs.path_of(folder(run_dir), commitments[0])
        path.unlink()
        path.mkdir()
        with open_log(run_dir) as log:
            log.erase(commitments, by="dana", reason="r")
        assert there(run_dir) == []
        for starts in (2, 3):
            with open_log(run_dir):
                pass
            notes = [entry.body["text"] for entry in read.entries(run_dir, types=("note.added",))]
            assert notes == [f"payloads that were erased cannot be deleted yet: Is a directory ({path})"] * starts
        path.rmdir()
        with open_log(run_dir):
            pass
        assert len(list(read.entries(run_dir, types=("note.added",)))) == 3

    def test_twice_is_once(self, run):
        """Also by another process, which knows it from the log."""
        run_dir, commitments = run
        for expected in (commitments[:1], []):
            with open_log(run_dir) as log:
                assert log.erase(commitments[:1] * 2, by="dana", reason="r") == expected
                assert log.erase(commitments[:1], by="dana", reason="r") == []
        assert len(list(read.entries(run_dir, types=("blob.erased",)))) == 1

    def test_a_copy_that_was_put_back_is_a_warning_and_goes_at_the_next_start(self, run, tmp_path):
        run_dir, commitments = run
        path = blobs.path_of(folder(run_dir), commitments[0])
        shutil.copy(path, tmp_path / "backup")
        with open_log(run_dir) as log:
            log.erase(commitments[:1], by="dana", reason="r")
        shutil.copy(tmp_path / "backup", path)
        assert find(run_dir, expect_head=str(verify(run_dir).head))[0] == 10
        with open_log(run_dir):
            pass
        assert not path.exists()

    def test_a_payload_that_was_deleted_by_hand_can_be_accounted_for(self, run):
        run_dir, commitments = run
        blobs.path_of(folder(run_dir), commitments[0]).unlink()
        assert find(run_dir)[0] == 42
        with open_log(run_dir) as log:
            log.erase(commitments[:1], by="dana", reason="deleted by hand on Monday")
        assert find(run_dir) == (20, "")

    def test_many_are_several_records(self, run, monkeypatch):
        """No record is too large for its line."""
        monkeypatch.setattr(blobs, "AT_ONCE", 2)
        run_dir, commitments = run
        with open_log(run_dir) as log:
            log.erase(commitments, by="dana", reason="r")
        assert [len(entry.body["commitments"]) for entry in read.entries(run_dir, types=("blob.erased",))] == [2, 1]
        assert there(run_dir) == []

    @pytest.mark.parametrize(("by", "reason"), [("", "r"), ("dana", "")])
    def test_one_without_a_name_or_a_reason_is_a_protocol_finding(self, run, by, reason):
        run_dir, commitments = run
        with open_log(run_dir) as log:
            log.erase(commitments[:1], by=by, reason=reason)
        assert find(run_dir)[0] == 40


class TestAfterACrash:
    def test_a_blob_that_no_record_names_is_dropped_and_said_to_be(self, run):
        run_dir, commitments = run
        with open_log(run_dir) as log:
            (orphan,) = log.keep([b"a call that was never recorded"])
        assert find(run_dir) == (20, "")
        with open_log(run_dir):
            pass
        (dropped,) = read.entries(run_dir, types=("blob.dropped",))
        assert dropped.body == {"count": 1, "commitments": [orphan["commitment"]]}
        assert there(run_dir) == sorted(commitments)
        assert find(run_dir) == (20, "")

    def test_half_a_blob_is_dropped(self, run):
        run_dir, commitments = run
        half = folder(run_dir) / "blobs" / "ab" / ("ab" * 32)
        half.parent.mkdir(exist_ok=True)
        half.write_bytes(b"loopguard-bl")
        with open_log(run_dir):
            pass
        assert there(run_dir) == sorted(commitments)

    def test_the_blob_of_a_torn_record_goes_with_it(self, tmp_path):
        """What a cut record would have allowed did not happen."""
        with open_log(tmp_path / "run") as log:
            kept = call(log, "c1")
        path = read.segments(tmp_path / "run")[-1]
        shutil.rmtree(folder(tmp_path / "run") / "checkpoints")
        path.write_bytes(path.read_bytes()[:-30])
        with open_log(tmp_path / "run"):
            pass
        assert there(tmp_path / "run") == []
        (dropped,) = read.entries(tmp_path / "run", types=("blob.dropped",))
        assert dropped.body["commitments"] == [kept]

    def test_files_of_other_names_are_nobodys_and_stay(self, run):
        run_dir, _ = run
        for name in ("README", "ab/README", "ab/" + "cd" * 32):
            path = folder(run_dir) / "blobs" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        with open_log(run_dir):
            pass
        assert sum(1 for path in (folder(run_dir) / "blobs").rglob("*") if path.is_file()) == 6

    def test_a_folder_is_nobodys_either(self, run):
        run_dir, commitments = run
        (folder(run_dir) / "blobs" / "00" / ("0" * 64)).mkdir(parents=True)
        with open_log(run_dir):
            pass
        assert there(run_dir) == sorted(commitments)
        assert list(read.entries(run_dir, types=("blob.dropped",))) == []

    def test_nothing_is_dropped_beside_a_log_that_does_not_verify(self, run):
        """What its lost records named, nobody knows."""
        run_dir, commitments = run
        path = read.segments(run_dir)[0]
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
        shutil.rmtree(folder(run_dir) / "checkpoints")
        with open_log(run_dir, verify=False):
            pass
        assert there(run_dir) == sorted(commitments)

    @pytest.mark.parametrize("stop", range(9))
    def test_a_process_that_is_killed_anywhere_leaves_what_the_next_start_sets_right(self, tmp_path, stop):
        """Killed before the so-many-th sync or deletion of a call that is recorded and erased."""
        script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from audit_stories import open_log
from loopguard.audit import blobs, log as logs
left = {stop}
def counted(act):
    def wrapped(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*args, **options)
    return wrapped
log = open_log(Path({str(tmp_path / "run")!r}))
blobs._write, blobs._sync = counted(blobs._write), counted(blobs._sync)
logs._write_all, logs._flush, blobs.delete = map(counted, (logs._write_all, logs._flush, blobs.delete))
(kept,) = log.keep([b"code"])
log.append("tool.decided", {{"call": "c", "result": "deny", "code": kept}})
log.erase([kept["commitment"]], by="dana", reason="r")
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == -9, done.stderr
        with open_log(tmp_path / "run"):
            pass
        assert find(tmp_path / "run")[0] in {10, 20}
        named = {one.commitment for entry in read.entries(tmp_path / "run") for one in blobs.named(entry)}
        erased = [
            one
            for entry in read.entries(tmp_path / "run", types=("blob.erased",))
            for one in blobs.erased_by(entry.body)
        ]
        assert set(there(tmp_path / "run")) == named - set(erased)


def test_the_payloads_of_a_pruned_front_go_at_the_next_start_and_no_others(tmp_path):
    """What no record names any more cannot be erased by anybody, so that it must not stay."""
    run_dir = tmp_path / "run"
    with open_log(run_dir) as log:
        old = call(log, "c1")
    with open_log(run_dir, segment_bytes=10) as log:
        log.append("note.added", {"text": "the first record of a segment of its own"})
        young = call(log, "c2")
    plan = prune.plan(run_dir, "controller", before="2031-01-01T00:00:00.000000Z", stays=lambda _: "")
    with open_log(run_dir) as log:
        entry = prune.record(log, plan, by="dana", reason="r")
        log.checkpoint()
        prune.carry_out(folder(run_dir), entry)
    assert [one.commitment for each in read.entries(run_dir) for one in blobs.named(each)] == [young]
    assert verify(run_dir).code == 20
    with open_log(run_dir):
        pass
    assert there(run_dir) == [young]
    (dropped,) = read.entries(run_dir, types=("blob.dropped",))
    assert dropped.body["commitments"] == [old]


class TestChoose:
    def test_by_commitment_by_call_and_by_cycle(self, run):
        run_dir, (first, second, third) = run
        assert blobs.choose(run_dir, commitments=[third]).here == {"controller": [third]}
        assert blobs.choose(run_dir, calls=["c2"]).here == {"controller": [second]}
        assert blobs.choose(run_dir, cycle=1, calls=["c3"]).here == {"controller": [first, second, third]}
        assert blobs.choose(run_dir, cycle=7).count == 0

    def test_what_is_erased_already_is_told_apart(self, run):
        run_dir, (first, second, _) = run
        with open_log(run_dir) as log:
            log.erase([first], by="dana", reason="r")
        chosen = blobs.choose(run_dir, cycle=1)
        assert (chosen.here, chosen.erased) == ({"controller": [second]}, [first])

    def test_what_no_record_names_is_a_usage_error(self, run):
        with pytest.raises(UsageError, match="no record names the payload 0000"):
            blobs.choose(run[0], commitments=["0" * 64])
        with pytest.raises(UsageError, match="no payload of a call c9 lies apart"):
            blobs.choose(run[0], calls=["c9"])


class TestReader:
    def test_says_what_is_there_and_why_it_is_not(self, run):
        run_dir, (first, second, third) = run
        reader = blobs.Reader(run_dir)
        assert reader.text(first, most=500) == CODE.decode()
        assert reader.text(first, most=5) == "print..."
        assert reader.text(second, most=5) == ""
        assert reader.text(third, most=8) == "\\xff\0\\xf..."
        with open_log(run_dir) as log:
            log.erase([first], by="dana", reason="r")
        blobs.path_of(folder(run_dir), second).unlink()
        blobs.path_of(folder(run_dir), third).write_bytes(b"x")
        reader = blobs.Reader(run_dir)
        assert reader.text(first, most=5) == "(erased)"
        assert reader.text(second, most=5) == "(gone, and not erased by any record)"
        assert reader.text(third, most=5) == "(not what was recorded)"

    def test_of_an_altered_log_it_still_says_what_it_can(self, run):
        """A report is written of such a log too."""
        run_dir, (first, second, third) = run
        with open_log(run_dir) as log:
            log.erase([first], by="dana", reason="r")
            log.erase([second], by="eli", reason="r")
        path = read.segments(run_dir)[0]
        path.write_bytes(path.read_bytes().replace(b'"by":"eli"', b'"by":"fay"'))
        reader = blobs.Reader(run_dir, handed_on=True)
        assert [reader.text(one, most=5) for one in (first, second, third)] == [
            "(erased)",
            "(gone, and not erased by any record)",
            "\\xff\0...",
        ]
