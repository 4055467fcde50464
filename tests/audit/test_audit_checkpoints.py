"""Checkpoints: when a log is summed up, what they hold, where they are kept, and what a failure does."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from audit_stories import forget_checkpoints, open_log, plain_log

from loopguard.audit import anchors, notes, read
from loopguard.audit import log as log_module
from loopguard.audit.anchors import Anchor, NotKeptError
from loopguard.audit.keys import VerifierKey, keygen
from loopguard.audit.tree import Tree
from loopguard.audit.verify import verify
from loopguard.errors import AuditTamperedError, AuditWriteError, DiskError, UsageError


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "a"


@pytest.fixture
def vkey(tmp_path, monkeypatch) -> VerifierKey:
    """A log key, in use."""
    path, public = keygen("gpu7", folder=tmp_path / "keys")
    monkeypatch.setenv("LOOPGUARD_LOG_KEY", str(path))
    return public


@pytest.fixture
def repository(tmp_path):
    place = tmp_path / "evidence"
    subprocess.run(["git", "init", "-q", str(place)], check=True)
    return place


def sizes(run_dir, stream="controller") -> list[int]:
    return [size for size, _ in notes.stored(read.stream_dir(run_dir, stream))]


def note(run_dir, size, stream="controller") -> notes.Note:
    return notes.Note.parse(notes.read(read.stream_dir(run_dir, stream) / f"checkpoints/{size}.note"))


def root(run_dir, size, stream="controller") -> bytes:
    """Of the first records, without the writer's bookkeeping."""
    tree = Tree()
    for entry in read.entries(run_dir, stream):
        if entry.seq <= size:
            tree = tree.grown(bytes.fromhex(entry.hash))
    return tree.root()


def types(run_dir, stream="controller") -> list[str]:
    return [entry.type for entry in read.entries(run_dir, stream)]


class TestWhen:
    def test_every_so_many_records_and_at_the_end(self, run_dir):
        with open_log(run_dir, checkpoint_every=10) as log:
            for _ in range(24):
                log.append("note.added", sync=False)
            assert sizes(run_dir) == [10, 20]
        assert sizes(run_dir) == [10, 20, 25]

    def test_of_a_long_log_each_stands_for_its_records(self, run_dir):
        """Writer and verifier hash leaves many at a time, and not at the same records."""
        with open_log(run_dir, checkpoint_every=700) as log:
            for number in range(1500):
                log.append("note.added", sync=number % 400 == 0)
            log.checkpoint()
            for _ in range(900):
                log.append("note.added", sync=False)
        assert sizes(run_dir) == [700, 1400, 1501, 2201, 2401]
        for size in sizes(run_dir):
            assert note(run_dir, size).checkpoint.root == root(run_dir, size)
        assert verify(run_dir).findings == []

    @pytest.mark.parametrize("group", [1, 1100])
    @pytest.mark.parametrize("segment_bytes", [50_000, 10_000_000])
    def test_one_that_comes_late_stands_for_all_records(self, run_dir, group, segment_bytes):
        """Meanwhile their hashes went into the tree at syncs and at the ends of segments."""
        with open_log(run_dir, checkpoint_every=1_000_000, segment_bytes=segment_bytes) as log:
            for number in range(2500):
                log.append("note.added", sync=number % group == 0)
        assert sizes(run_dir) == [2501]
        assert note(run_dir, 2501).checkpoint.root == root(run_dir, 2501)

    @pytest.mark.parametrize("kind", ["freeze.entered", "run.finished"])
    def test_at_once_where_a_run_stops(self, run_dir, kind):
        with open_log(run_dir) as log:
            log.append(kind, {"freeze": "f1"})
            assert sizes(run_dir) == [2]
        assert sizes(run_dir) == [2], "closing adds nothing that the last one does not stand for"

    def test_a_stretch_is_counted_across_processes(self, run_dir):
        """A loop that dies again and again before its stretch is full still gets its checkpoint."""
        for _ in range(5):
            log = open_log(run_dir, checkpoint_every=6)
            log.append("note.added")
            os.close(log._lock_fd)  # as a killed process leaves it
            log_module._open_logs.discard(log)
        assert sizes(run_dir) == [6]

    def test_whenever_it_is_asked_for(self, run_dir):
        with open_log(run_dir) as log:
            log.checkpoint()
            assert sizes(run_dir) == [1]

    def test_under_many_threads_each_stands_for_what_was_there(self, run_dir):
        with open_log(run_dir, checkpoint_every=20, segment_bytes=8000) as log:

            def work():
                for number in range(60):
                    log.append("note.added", {"number": number}, sync=number % 4 == 0)

            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(sizes(run_dir)) > 5
        for size in sizes(run_dir):
            assert note(run_dir, size).checkpoint.root == root(run_dir, size)

    def test_a_log_behind_a_break_gets_none(self, run_dir):
        """No checkpoint could stand for records of which one was edited."""
        plain_log(run_dir)
        forget_checkpoints(run_dir)
        path = read.segments(run_dir)[0]
        path.write_bytes(path.read_bytes().replace(b"note 5", b"note X"))
        with open_log(run_dir, verify=False) as log:
            log.append("freeze.entered", {"freeze": "f1"})
            log.checkpoint()
        assert sizes(run_dir) == []


class TestContent:
    def test_it_is_of_this_log_and_of_these_records(self, run_dir):
        plain_log(run_dir)
        (size,) = sizes(run_dir)
        assert note(run_dir, size).checkpoint == notes.Checkpoint("run-a/controller", 11, root(run_dir, 11))

    def test_without_a_key_nobody_signs(self, run_dir):
        plain_log(run_dir)
        assert note(run_dir, 11).signatures == ()
        assert "key" not in next(read.entries(run_dir)).body

    def test_with_a_key_it_is_signed_and_the_log_says_by_whom(self, run_dir, vkey):
        plain_log(run_dir)
        assert note(run_dir, 11).signer([vkey]) == vkey
        assert next(read.entries(run_dir)).body["key"] == str(vkey)

    def test_a_bad_key_is_an_error_before_anything_is_written(self, run_dir, vkey, monkeypatch):
        monkeypatch.setenv("LOOPGUARD_LOG_KEY", str(run_dir / "none.key"))
        with pytest.raises(UsageError, match="which is not there"):
            open_log(run_dir)
        assert not (run_dir / "audit").exists()

    def test_a_record_that_was_interrupted_is_not_in_the_tree(self, run_dir, monkeypatch):
        real = os.write
        with open_log(run_dir) as log:
            for wrote in (0, 30, None):

                def interrupted(fd, data, wrote=wrote):
                    if wrote != 0:
                        real(fd, data[:wrote])
                    raise KeyboardInterrupt

                with monkeypatch.context() as patch:
                    patch.setattr(os, "write", interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        log.append("note.added", {"wrote": wrote})
                log.append("note.added", {"after": wrote})
        assert note(run_dir, 5).checkpoint.root == root(run_dir, 5)

    def test_records_that_a_failed_sync_took_back_are_not_in_the_tree(self, run_dir, monkeypatch):
        log = open_log(run_dir)
        bad = log._segment.fd

        def failing(fd):
            if fd == bad:
                raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(log_module, "_flush", failing)
            with pytest.raises(AuditWriteError):
                log.append("note.added")
            log.append_last("freeze.entered", {"freeze": "f1"})
        log.close()
        open_log(run_dir).close()
        (size,) = sizes(run_dir)
        assert note(run_dir, size).checkpoint.root == root(run_dir, size)


class TestOtherStreams:
    def test_the_controller_says_first_where_the_others_stand(self, run_dir):
        with open_log(run_dir, stream="rank-1") as rank, open_log(run_dir, stream="serve") as serve:
            rank.append("note.added", sync=False)
            with open_log(run_dir) as log:
                log.append("freeze.entered", {"freeze": "f1"})
            told = next(read.entries(run_dir, types=["streams.committed"]))
            assert told.seq == 3 == sizes(run_dir)[0]
            assert told.body == {
                "streams": {
                    "rank-1": {"seq": 2, "hash": rank.head.hash},
                    "serve": {"seq": 1, "hash": serve.head.hash},
                }
            }

    def test_what_is_committed_to_is_on_disk_first(self, run_dir, monkeypatch):
        """A power cut must not take back a record that another stream vouches for."""
        flushed = []
        real = log_module._flush
        with open_log(run_dir, stream="rank-1") as rank:
            rank.append("note.added", sync=False)
            with open_log(run_dir) as log:
                monkeypatch.setattr(log_module, "_flush", lambda fd: (flushed.append(os.fstat(fd).st_ino), real(fd)))
                log.checkpoint()
                monkeypatch.undo()
        other = read.segments(run_dir, "rank-1")[0].stat().st_ino
        assert flushed == [other, read.segments(run_dir)[0].stat().st_ino]

    def test_other_streams_commit_to_nothing(self, run_dir):
        with open_log(run_dir), open_log(run_dir, stream="rank-1") as rank:
            rank.checkpoint()
        assert types(run_dir, "rank-1") == ["log.opened"]

    def test_alone_there_is_nothing_to_say(self, run_dir):
        plain_log(run_dir)
        assert "streams.committed" not in types(run_dir)

    def test_one_that_cannot_be_read_does_not_stop_the_run(self, run_dir):
        plain_log(run_dir, stream="rank-1")
        path = read.segments(run_dir, "rank-1")[0]
        path.write_bytes(path.read_bytes().replace(b"note 9", b"note X"))
        open_log(run_dir).close()
        assert next(read.entries(run_dir, types=["streams.committed"])).body == {
            "streams": {},
            "unreadable": ["rank-1"],
        }
        assert verify(run_dir).status == "tamper"


class TestAnchors:
    def kept(self, place, run_dir):
        return [one.note.checkpoint.size for one in anchors.read(place, run_dir=run_dir)]

    def test_a_file_gets_a_line_for_each_checkpoint(self, run_dir, tmp_path):
        place = tmp_path / "anchors.jsonl"
        with open_log(run_dir, checkpoint_every=10, anchors=[Anchor(kind="file", place=str(place))]) as log:
            for _ in range(24):
                log.append("note.added", sync=False)
        assert len(place.read_text().splitlines()) == 3
        assert self.kept(place, run_dir) == sizes(run_dir)
        told = list(read.entries(run_dir, types=["anchor.kept"]))
        assert [entry.body["size"] for entry in told] == sizes(run_dir)
        assert told[0].body["where"] == str(place)

    def test_a_line_that_a_crash_cut_does_not_swallow_the_next(self, run_dir, tmp_path):
        place = tmp_path / "anchors.jsonl"
        place.write_text('an old line\n{"chec')
        with open_log(run_dir, anchors=[Anchor(kind="file", place=str(place))]):
            pass
        assert self.kept(place, run_dir) == [1]

    @pytest.mark.parametrize("bare", [False, True])
    def test_a_repository_gets_a_commit_and_keeps_its_own_files(self, run_dir, repository, tmp_path, bare):
        (repository / "mine.txt").write_text("mine")
        subprocess.run(["git", "-C", str(repository), "add", "mine.txt"], check=True)
        place = repository
        if bare:
            place = tmp_path / "bare.git"
            subprocess.run(
                ["git", "clone", "-q", "--bare", str(repository), str(place)], check=True, capture_output=True
            )
        for _ in range(2):
            with open_log(run_dir, anchors=[Anchor(kind="git", place=str(place))]) as log:
                log.append("note.added")
        assert self.kept(place, run_dir) == [5, 2]
        status = subprocess.run(
            ["git", "-C", str(repository), "status", "--porcelain"], check=True, capture_output=True, text=True
        )
        assert status.stdout == "A  mine.txt\n"
        commits = [entry.body["where"].split()[-1] for entry in read.entries(run_dir, types=["anchor.kept"])]
        for commit in commits:
            subprocess.run(["git", "-C", str(place), "cat-file", "-e", commit], check=True)

    def test_two_runs_share_a_repository_at_the_same_time(self, tmp_path, repository):
        place = Anchor(kind="git", place=str(repository))
        threads = [
            threading.Thread(target=anchors.keep, args=(place, f"r{n}/controller\n1\n{'A' * 43}=\n")) for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        origins = {one.note.checkpoint.origin for one in anchors.read(repository, run_dir=tmp_path / "run")}
        assert origins == {"r0/controller", "r1/controller", "r2/controller"}

    def test_git_of_the_surroundings_leads_nowhere_else(self, run_dir, repository, monkeypatch, tmp_path):
        """As in a hook, where git tells its children which repository they are in."""
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
        with open_log(run_dir, anchors=[Anchor(kind="git", place=str(repository))]):
            pass
        monkeypatch.delenv("GIT_DIR")
        assert self.kept(repository, run_dir) == [1]

    def test_a_printed_line_is_found_in_the_output_of_a_job(self, run_dir, tmp_path, capsys):
        with open_log(run_dir, anchors=[Anchor(kind="print")]):
            pass
        out, err = capsys.readouterr()
        assert out == ""
        job = tmp_path / "job.txt"
        job.write_text(f"2030-01-01T00:00:00Z step 3\n2030-01-01T00:00:01Z {err}done\n")
        assert self.kept(job, run_dir) == [1]

    def test_notes_in_a_folder_are_read_as_well(self, run_dir, tmp_path):
        plain_log(run_dir)
        shutil.copytree(run_dir / "audit/controller/checkpoints", tmp_path / "kept")
        assert self.kept(tmp_path / "kept", run_dir) == self.kept(tmp_path / "kept/11.note", run_dir) == [11]

    def test_one_that_fails_is_recorded_and_the_run_goes_on(self, run_dir, tmp_path):
        broken = Anchor(kind="file", place=str(tmp_path / "missing" / "anchors.jsonl"))
        with open_log(run_dir, anchors=[broken]) as log:
            log.append("run.finished")
            log.append("note.added")
        failed = next(read.entries(run_dir, types=["anchor.failed"]))
        assert failed.body == {
            "kind": "file",
            "place": broken.place,
            "size": 2,
            "reason": "No such file or directory",
            "required": False,
        }

    @pytest.mark.parametrize("place", ["missing", "no-repository"])
    def test_why_git_failed_is_said(self, tmp_path, place):
        (tmp_path / "no-repository").mkdir()
        with pytest.raises(NotKeptError, match="git mktree failed: fatal: "):
            anchors.keep(Anchor(kind="git", place=str(tmp_path / place)), "a\n1\n\n")

    def test_a_required_one_that_fails_stops_the_run(self, run_dir, tmp_path):
        """By what the run gave for that; where it gave nothing, by the log itself."""
        broken = Anchor(kind="file", place=str(tmp_path / "missing" / "x"), required=True)
        said = []
        with open_log(run_dir, anchors=[broken], on_lost_anchor=said.append) as log:
            log.append("run.finished")
            log.append("note.added")
        assert (
            said[0]
            == f"the anchor file {broken.place}, which the guard policy requires, failed: No such file or directory"
        )
        log = open_log(run_dir, anchors=[broken])
        log.append("run.finished")
        with pytest.raises(AuditWriteError, match="which the guard policy requires, failed"):
            log.append("note.added")
        log.close()

    def test_a_run_that_cannot_be_stopped_for_one_records_nothing_more(self, run_dir, tmp_path):
        """Where not even a latch fits on the disk."""

        def full(_):
            raise DiskError("latch could not be written: No space left on device")

        broken = Anchor(kind="file", place=str(tmp_path / "missing" / "x"), required=True)
        log = open_log(run_dir, anchors=[broken], on_lost_anchor=full)
        log.append("run.finished")
        with pytest.raises(AuditWriteError, match="the run could not be stopped for it: latch could not be written"):
            log.append("note.added")
        log.close()

    def test_that_a_required_one_failed_cannot_be_cut_off_unseen(self, run_dir, tmp_path):
        """Beside another place that did keep the checkpoint."""
        works = Anchor(kind="file", place=str(tmp_path / "works.jsonl"))
        broken = Anchor(kind="file", place=str(tmp_path / "missing" / "x"), required=True)
        open_log(run_dir, anchors=[works, broken], on_lost_anchor=lambda _: None).close()
        assert types(run_dir)[-1] == "anchor.failed"
        assert verify(run_dir, anchors=[tmp_path / "works.jsonl"]).status == "unanchored"

    @pytest.mark.parametrize(
        ("place", "why"), [("/dev/full", "No space left on device"), ("{tmp_path}", "Is a directory")]
    )
    def test_why_a_file_took_nothing_is_said(self, tmp_path, place, why):
        with pytest.raises(NotKeptError, match=why):
            anchors.keep(Anchor(kind="file", place=place.format(tmp_path=tmp_path)), "a\n1\n\n")

    def test_a_machine_without_git_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(NotKeptError, match="git is not installed"):
            anchors.keep(Anchor(kind="git", place=str(tmp_path)), "a\n1\n\n")

    def test_a_standard_error_that_was_closed_keeps_nothing(self, tmp_path, monkeypatch):
        closed = (tmp_path / "stderr").open("w")
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
        with pytest.raises(NotKeptError, match="closed file"):
            anchors.keep(Anchor(kind="print"), "a\n1\n\n")

    def test_one_in_the_run_directory_is_refused(self, run_dir, tmp_path):
        """Also by way of a link, and also when it is read."""
        (tmp_path / "link").symlink_to(run_dir)
        for place in (run_dir / "anchors.jsonl", tmp_path / "link" / "anchors.jsonl"):
            with pytest.raises(UsageError, match="lies in the run directory"):
                open_log(run_dir, anchors=[Anchor(kind="file", place=str(place))])
        plain_log(run_dir)
        with pytest.raises(UsageError, match="what lies beside the log proves nothing"):
            anchors.read(run_dir / "audit/controller/checkpoints", run_dir=run_dir)

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            ("", "holds no log checkpoint"),
            ("nothing of ours\n", "holds no log checkpoint"),
            ('{"checkpoint":"run-a', "holds no log checkpoint .*anchors:1: .* is cut there"),
            ('{"checkpoint":"run-a\\x"}', "is damaged"),
            (json.dumps({"checkpoint": "run-a\n7\n"}, separators=(",", ":")), "three lines"),
        ],
    )
    def test_a_place_that_proves_nothing_is_an_error(self, tmp_path, content, why):
        """Never silence: whoever names anchors expects them to count."""
        (tmp_path / "anchors").write_text(content)
        with pytest.raises(UsageError, match=why):
            anchors.read(tmp_path / "anchors", run_dir=tmp_path / "run")

    def test_a_place_that_is_not_there_is_an_error(self, tmp_path, repository):
        with pytest.raises(UsageError, match="cannot be read: No such file"):
            anchors.read(tmp_path / "nothing", run_dir=tmp_path / "run")
        with pytest.raises(UsageError, match="has no branch loopguard-anchors"):
            anchors.read(repository, run_dir=tmp_path / "run")


class TestBadDisk:
    def test_a_checkpoint_that_cannot_be_written_stops_what_comes_next(self, run_dir, monkeypatch):
        """The record before it is on disk and allows what it allows; nothing after it does."""

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        log = open_log(run_dir)
        monkeypatch.setattr(notes, "store", full)
        entry = log.append("freeze.entered", {"freeze": "f1"})
        assert log.durable_head.seq == entry.seq
        assert log.degraded
        with pytest.raises(AuditWriteError, match="cannot write a checkpoint of .*No space left"):
            log.append("note.added")
        log.close()
        monkeypatch.undo()
        open_log(run_dir).close()
        assert types(run_dir) == ["log.opened", "freeze.entered", "log.opened"]

    def test_closing_says_so_too(self, run_dir, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        log = open_log(run_dir)
        monkeypatch.setattr(notes, "store", full)
        with pytest.raises(AuditWriteError, match="No space left"):
            log.close()
        assert read.owner(run_dir) is None

    def test_half_a_note_is_no_note(self, run_dir):
        """A crash while one is written leaves a file that no reader takes for a checkpoint."""
        plain_log(run_dir)
        (run_dir / "audit/controller/checkpoints/.12.note").write_text("run-a/contr")
        with open_log(run_dir) as log:
            assert log.head.seq == 12
        assert sizes(run_dir) == [11, 12]


class TestOpening:
    """What a checkpoint beside the log says against it, a start refuses; it does not take `verify` to notice."""

    def test_a_log_that_ends_before_its_checkpoint_is_refused(self, run_dir):
        plain_log(run_dir)
        path = read.segments(run_dir)[0]
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))
        with pytest.raises(
            AuditTamperedError, match=r"11\.note was written when there were 11 records; the log ends at"
        ):
            open_log(run_dir)

    def test_a_log_with_other_records_is_refused(self, run_dir, tmp_path):
        """Every hash of it is right."""
        plain_log(run_dir)
        plain_log(tmp_path / "other", notes=12)
        forget_checkpoints(tmp_path / "other")
        shutil.copytree(run_dir / "audit/controller/checkpoints", tmp_path / "other/audit/controller/checkpoints")
        with pytest.raises(AuditTamperedError, match="does not stand for the records before 12"):
            open_log(tmp_path / "other")

    def test_a_damaged_checkpoint_is_refused(self, run_dir):
        plain_log(run_dir)
        (run_dir / "audit/controller/checkpoints/11.note").write_text("run-a/controller\n11\n")
        with pytest.raises(AuditTamperedError, match="is not a checkpoint"):
            open_log(run_dir)

    @pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff", b"x" * 70_000])
    def test_and_its_way_out_is_said_and_leads_out(self, run_dir, tmp_path, content):
        """What a broken disk left of a note must not keep a healthy run shut."""
        plain_log(run_dir)
        damaged = run_dir / "audit/controller/checkpoints/11.note"
        damaged.write_bytes(content)
        with pytest.raises(AuditTamperedError, match="Where a disk damaged it, move it to a folder of its own"):
            open_log(run_dir)
        assert verify(run_dir).status == "tamper"
        damaged.rename(tmp_path / "11.note")
        open_log(run_dir).close()
        assert verify(run_dir).status == "unanchored"
