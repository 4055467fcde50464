"""The log that is written: one writer, one chain, nothing lost that was promised."""

from __future__ import annotations

import doctest
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid

import pytest
from audit_stories import POLICY, forget_checkpoints, open_log, plain_log

from loopguard.audit import log as log_module
from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.audit.verify import verify
from loopguard.errors import AuditError, AuditTamperedError, AuditWriteError, RunBusyError


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "a"


def segment(run_dir):
    return read.segments(run_dir)[-1]


def script(text: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own, for what would harm this one."""
    code = textwrap.dedent(text)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestChain:
    def test_records_follow_one_another(self, run_dir):
        """Each record carries the hash of the one before it, and numbers have no gaps."""
        with open_log(run_dir) as log:
            written = [log.append("note.added", {"text": str(number)}) for number in range(3)]
        records = list(read.entries(run_dir))
        assert [record.seq for record in records] == [1, 2, 3, 4]
        assert [record.prev for record in records[1:]] == [record.hash for record in records[:-1]]
        assert records[1:] == written

    def test_goes_on_where_it_ended(self, run_dir):
        """A second process continues numbers, chain and epoch."""
        with open_log(run_dir) as log:
            log.epoch = 4
            log.append("note.added", {})
            head = log.head
        with open_log(run_dir) as log:
            opened = read.last(run_dir)
            assert (opened.seq, opened.prev, opened.type) == (head.seq + 1, head.hash, "log.opened")
            assert log.epoch == 4
        assert verify(run_dir).status == "unanchored"

    def test_epoch_never_goes_back(self, run_dir):
        with open_log(run_dir) as log:
            log.epoch = 2
            with pytest.raises(AuditError, match="the epoch is 2 and cannot go back to 1"):
                log.epoch = 1

    def test_segments_rotate_and_still_chain(self, run_dir):
        """A full segment is followed by one named after its first record."""
        with open_log(run_dir, segment_bytes=4000) as log:
            for number in range(40):
                log.append("note.added", {"text": str(number)}, sync=False)
        paths = read.segments(run_dir)
        assert len(paths) > 5
        assert [read.first_seq(path) for path in paths] == [
            json.loads(path.read_text().splitlines()[0])["seq"] for path in paths
        ]
        assert verify(run_dir).records == 41
        assert read.at(run_dir, "controller", 17).body == {"text": "15"}
        with open_log(run_dir, segment_bytes=4000) as log:
            assert log.head.seq == 42

    def test_another_run_is_refused(self, run_dir):
        """A log that was copied here from another run is not continued."""
        plain_log(run_dir)
        with pytest.raises(AuditTamperedError, match=r"belongs to run-a/controller, not to run-b/controller"):
            open_log(run_dir, run_id="run-b")

    def test_an_edited_record_is_refused_with_its_place(self, run_dir):
        plain_log(run_dir)
        path = segment(run_dir)
        path.write_bytes(path.read_bytes().replace(b"note 5", b"note X"))
        with pytest.raises(AuditTamperedError, match=r"seg-000000000001\.jsonl:7: record 7 was altered"):
            open_log(run_dir)

    def test_an_edited_end_without_a_newline_does_not_swallow_the_next_record(self, run_dir):
        """Whatever stands behind the last newline is set aside where the log is opened all the same."""
        plain_log(run_dir)
        forget_checkpoints(run_dir)
        path = segment(run_dir)
        path.write_bytes(path.read_bytes()[:-1] + b"xyz")
        with open_log(run_dir, verify=False) as log:
            log.append("freeze.entered", {"freeze": "f1"})
        assert verify(run_dir).code == 20
        assert [entry.type for entry in read.entries(run_dir)][-3:] == [
            *("log.recovered", "log.opened", "freeze.entered"),
        ]

    def test_an_edited_log_can_still_record_a_freeze_when_asked_to(self, run_dir):
        """`verify=False` goes on behind what is there, and the edit stays visible."""
        plain_log(run_dir)
        path = segment(run_dir)
        path.write_bytes(path.read_bytes().replace(b"note 5", b"note X"))
        with open_log(run_dir, verify=False) as log:
            log.append("freeze.entered", {"freeze": "f1"})
        assert verify(run_dir).status == "tamper"
        assert "record 7 was altered" in verify(run_dir).findings[0]
        assert len(verify(run_dir).findings) == 1

    def test_the_example_in_the_docstring_works(self):
        assert doctest.testmod(log_module) == (0, 4)


class TestEnvelope:
    def test_has_every_field(self, run_dir):
        """The whole envelope is there from the first version on."""
        with open_log(run_dir) as log:
            log.append("note.added", {"text": "x"}, cycle=3, cause=["an-id"], actor={"kind": "person", "id": "dana"})
        record = json.loads(segment(run_dir).read_bytes().splitlines()[-1])
        assert record.keys() == {
            *("v", "log", "seq", "epoch", "ts", "mono_ns", "boot", "id", "type", "cycle", "actor", "policy"),
            *("cause", "body", "redacted", "prev", "hash"),
        }
        assert record["log"] == "run-a/controller"
        assert record["ts"] == "2030-01-01T00:00:00.000000Z"
        assert record["policy"] == POLICY
        assert (record["cycle"], record["cause"], record["actor"]) == (3, ["an-id"], {"kind": "person", "id": "dana"})

    def test_ids_are_uuids_of_version_7_that_carry_the_time(self, run_dir):
        with open_log(run_dir) as log:
            made = uuid.UUID(log.append("note.added").id)
        assert (made.version, made.variant) == (7, uuid.RFC_4122)
        assert made.int >> 80 == 1893456000000  # 2030-01-01 in milliseconds

    def test_numbers_that_json_cannot_hold_become_text(self, run_dir):
        """NaN, infinities and large integers survive as strings, in every reader alike."""
        body = {
            "a": math.nan,
            "b": math.inf,
            "c": -math.inf,
            "d": 2**53,
            "e": 2**53 - 1,
            "f": 0.1,
            "g": (1, True, None),
        }
        with open_log(run_dir) as log:
            entry = log.append("sandbox.created", {"counters": body})
        assert entry.body["counters"] == {
            "a": "NaN",
            "b": "Infinity",
            "c": "-Infinity",
            "d": "9007199254740992",
            "e": 2**53 - 1,
            "f": 0.1,
            "g": [1, True, None],
        }

    def test_lone_surrogates_do_not_reach_the_file(self, run_dir):
        with open_log(run_dir) as log:
            entry = log.append("note.added", {"text": "a\ud800b\U0001f600"})
        assert entry.body["text"] == "a\ufffdb\U0001f600"

    @pytest.mark.parametrize(
        ("type_", "body", "message"),
        [
            ("freeze.enterd", {}, "record type 'freeze.enterd' is unknown.*Did you mean 'freeze.entered'"),
            ("note.added", {"x": [{"y": object()}]}, r"body\.x\[0\]\.y is a object, which a record cannot hold"),
            ("note.added", {"x": {1: 2}}, r"body\.x has the key 1, which is not a string"),
            (
                "note.added",
                {"text": "y" * 300_000},
                "has 300,011 bytes, its line 300,[0-9]+; at most 256 KiB of body fit",
            ),
        ],
    )
    def test_refuses_what_is_no_record(self, run_dir, type_, body, message):
        """The error names the place; nothing is written, and the log stays usable."""
        with open_log(run_dir) as log:
            before = log.head
            with pytest.raises(AuditError, match=message):
                log.append(type_, body)
            assert log.head == before
            log.append("note.added")
        assert verify(run_dir).records == 2

    def test_mirror_sees_each_record_after_it_is_durable(self, run_dir):
        seen = []
        with open_log(run_dir, mirror=seen.append) as log:
            log.append("note.added", {"text": "x"})
        assert [entry.type for entry in seen] == ["log.opened", "note.added"]


class TestOneWriter:
    def test_a_second_writer_is_told_who_the_first_is(self, run_dir):
        """The message names the process, since when, and the way out."""
        with open_log(run_dir):
            with pytest.raises(RunBusyError) as caught:
                open_log(run_dir)
            assert str(caught.value) == (
                f"{run_dir} is in use by process {os.getpid()} (since 2030-01-01T00:00:00Z): "
                "wait for it, or use another --run-dir"
            )
            assert read.owner(run_dir) == os.getpid()
        assert read.owner(run_dir) is None
        open_log(run_dir).close()

    def test_streams_have_locks_of_their_own(self, run_dir):
        """Several streams of one run directory are written side by side."""
        with open_log(run_dir) as log, open_log(run_dir, stream="serve") as other:
            assert (log.log, other.log) == ("run-a/controller", "run-a/serve")
        assert verify(run_dir, stream="serve").status == "unanchored"

    def test_append_after_close_raises(self, run_dir):
        log = open_log(run_dir)
        log.close()
        log.close()
        with pytest.raises(AuditWriteError, match="closed"):
            log.append("note.added")

    def test_a_forked_child_cannot_write_and_the_parent_goes_on(self, run_dir):
        """The child closes its copies; an append there raises and leaves no bytes."""
        code = """
        import os, sys
        from pathlib import Path
        from loopguard.audit.log import AuditLog
        from loopguard.errors import AuditWriteError
        log = AuditLog.open(Path(sys.argv[1]), run_id="a", policy="", reserve_mib=1)
        child = os.fork()
        if child == 0:
            try:
                log.append("note.added", {"text": "from the child"})
            except AuditWriteError as error:
                os._exit(7 if "fork" in str(error) else 8)
            os._exit(9)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        log.append("note.added", {"text": "from the parent"})
        log.close()
        """
        process = script(code, run_dir)
        assert process.communicate() == ("7\n", "")
        assert [entry.type for entry in read.entries(run_dir)] == ["log.opened", "note.added"]

    def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(self, run_dir):
        """Data loader workers may live on; the next start must not wait for them."""
        code = """
        import os, sys, time
        from pathlib import Path
        from loopguard.audit.log import AuditLog
        log = AuditLog.open(Path(sys.argv[1]), run_id="run-a", policy="", reserve_mib=1)
        child = os.fork()
        if child == 0:
            os.close(1), os.close(2)
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        os.kill(os.getpid(), 9)
        """
        process = script(code, run_dir)
        out, _ = process.communicate()
        child = int(out)
        try:
            os.kill(child, 0)
            with open_log(run_dir) as log:
                assert log.head.seq == 2
        finally:
            os.kill(child, signal.SIGKILL)


class TestThreads:
    def test_many_threads_share_one_chain_and_its_syncs(self, run_dir, monkeypatch):
        """Appends that wait at the same time are made durable by the same sync."""
        syncs = []

        def slow(fd):
            syncs.append(fd)
            time.sleep(0.003)
            os.fdatasync(fd)

        with open_log(run_dir) as log:
            monkeypatch.setattr(log_module, "_flush", slow)
            barrier = threading.Barrier(8)

            def work(worker):
                barrier.wait()
                for number in range(25):
                    entry = log.append("note.added", {"worker": worker, "number": number})
                    assert log.durable_head.seq >= entry.seq

            threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert verify(run_dir).records == 201
        assert len(syncs) < 100

    def test_rotation_under_threads_loses_nothing(self, run_dir):
        with open_log(run_dir, segment_bytes=3000) as log:

            def work(worker):
                for number in range(50):
                    log.append("note.added", {"worker": worker, "number": number}, sync=number % 3 == 0)

            threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        result = verify(run_dir)
        assert (result.records, result.status) == (301, "unanchored")
        assert result.segments > 20


class TestCrash:
    @pytest.mark.parametrize("cut", [1, 2, 40, 200, -1])
    def test_a_cut_last_line_is_set_aside_and_named(self, run_dir, cut):
        """However much of the last record a crash left, the rest goes on and the bytes are kept."""
        plain_log(run_dir)
        forget_checkpoints(run_dir)
        path = segment(run_dir)
        whole = path.read_bytes()
        last = whole.splitlines(keepends=True)[-1]
        kept = last[:cut]
        path.write_bytes(whole[: -len(last)] + kept)
        with open_log(run_dir):
            pass
        *_, recovered, opened = read.entries(run_dir)
        assert (recovered.type, opened.type) == ("log.recovered", "log.opened")
        assert recovered.body["torn_bytes"] == len(kept)
        assert (path.parent / "torn-000000000011.bin").read_bytes() == kept
        result = verify(run_dir)
        assert (result.code, result.records) == (20, 12)
        assert verify(run_dir, expect_head=str(result.head)).status == "warn"

    def test_a_tail_of_zeros_is_a_cut_line(self, run_dir):
        """Some file systems grow a file before its content arrives."""
        plain_log(run_dir)
        with segment(run_dir).open("ab") as file:
            file.write(b"\0" * 700)
        with open_log(run_dir) as log:
            assert log.head.seq == 13

    def test_a_start_that_died_before_it_could_name_the_bytes_is_made_good(self, run_dir):
        """Bytes that were set aside by a start that then crashed are named by the next one."""
        plain_log(run_dir)
        kept = b'{"actor":{"id":'
        (segment(run_dir).parent / "torn-000000000012.bin").write_bytes(kept)
        with open_log(run_dir):
            pass
        recovered = next(read.entries(run_dir, types=["log.recovered"]))
        assert recovered.body["torn_bytes"] == len(kept)
        with open_log(run_dir):
            pass
        assert len(list(read.entries(run_dir, types=["log.recovered"]))) == 1

    def test_damage_elsewhere_is_not_taken_for_a_crash(self, run_dir):
        """A whole record with something behind it was edited; no write of ours ends like that."""
        plain_log(run_dir)
        path = segment(run_dir)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(AuditTamperedError, match="seg-000000000001.jsonl:11"):
            open_log(run_dir)

    def test_a_log_survives_kill_9_again_and_again(self, run_dir):
        """Whenever the writer is killed, the next start goes on and the chain is whole."""
        code = """
        import sys
        from pathlib import Path
        from loopguard.audit.log import AuditLog
        log = AuditLog.open(Path(sys.argv[1]), run_id="run-a", policy="", reserve_mib=1, segment_bytes=20000)
        print("open", flush=True)
        while True:
            log.append("note.added", {"text": "x" * 500}, sync=False)
        """
        for _ in range(4):
            process = script(code, run_dir)
            assert process.stdout.readline() == "open\n"
            time.sleep(0.02)
            process.kill()
            process.communicate()
        open_log(run_dir).close()
        result = verify(run_dir)
        assert result.code == 20
        assert result.records > 10

    def test_ctrl_c_inside_an_append_does_not_break_the_chain(self, run_dir, monkeypatch):
        """Interrupted before, within or after the write: the next record follows all the same."""
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
        result = verify(run_dir)
        assert (result.status, result.records) == ("unanchored", 5)


class TestBadDisk:
    def test_short_writes_are_completed(self, run_dir, monkeypatch):
        real = os.write
        with open_log(run_dir) as log:
            monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
            log.append("note.added", {"text": "written in bits"})
        assert verify(run_dir).records == 2

    def test_a_full_disk_stops_everything_but_one_last_record(self, run_dir, monkeypatch):
        """After ENOSPC in the middle of a line nothing goes on; the last record fits, and the log stays readable."""
        log = open_log(run_dir)
        log.append("note.added", {"text": "fine"}, sync=False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_after(100))
            with pytest.raises(AuditWriteError, match="No space left on device"):
                log.append("note.added", {"text": "does not fit"})
        assert log.degraded
        for attempt in (lambda: log.append("note.added"), log.sync):
            with pytest.raises(AuditWriteError):
                attempt()
        assert (segment(run_dir).parent / "reserve.bin").stat().st_size == 1024 * 1024
        last = log.append_last("freeze.entered", {"freeze": "f1", "gate": "audit"})
        assert not (segment(run_dir).parent / "reserve.bin").exists()
        with pytest.raises(AuditWriteError, match="used up"):
            log.append_last("freeze.entered", {"freeze": "f2"})
        log.close()
        assert read.last(run_dir) == last
        assert verify(run_dir).status == "unanchored"
        with open_log(run_dir):
            pass
        assert [entry.type for entry in read.entries(run_dir)][-3:] == ["freeze.entered", "log.recovered", "log.opened"]

    def test_a_failed_sync_is_never_tried_again(self, run_dir, monkeypatch):
        """A second sync may report success for data that is gone; what was not durable is kept beside the log."""
        log = open_log(run_dir)
        durable = log.durable_head
        bad = log._segment.fd
        tried = []

        def failing(fd):
            tried.append(fd)
            if fd == bad:
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(log_module, "_flush", failing)
        with pytest.raises(AuditWriteError, match="cannot sync .*Input/output error"):
            log.append("tool.decided", {"call": "c1", "result": "allow"})
        with pytest.raises(AuditWriteError):
            log.append("note.added")
        last = log.append_last("freeze.entered", {"freeze": "f1"})
        assert tried.count(bad) == 1
        assert (last.seq, last.prev) == (durable.seq + 1, durable.hash)
        log.close()
        monkeypatch.undo()
        assert b"tool.decided" in (segment(run_dir).parent / f"torn-{last.seq:012d}.bin").read_bytes()
        assert verify(run_dir).status == "unanchored"

    def test_other_threads_learn_of_the_failure(self, run_dir, monkeypatch):
        """Whoever waits for the sync that fails gets the error too, and nobody a false success."""
        log = open_log(run_dir)

        def failing(_):
            time.sleep(0.01)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(log_module, "_flush", failing)
        failures = []

        def work():
            try:
                log.append("note.added")
            except AuditWriteError as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log.close()
        assert len(failures) == 5

    def test_a_segment_that_a_failed_rotation_began_gets_no_record_of_another_number(self, run_dir, monkeypatch):
        """A disk that fails there is no tampering: the last record takes back what was not synced."""
        log = open_log(run_dir, segment_bytes=4000)
        for number in range(7):
            log.append("note.added", {"text": str(number)}, sync=False)

        def failing(folder):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(log_module, "_sync_folder", failing)
            with pytest.raises(AuditWriteError, match="cannot rotate"):
                log.append("note.added", {"text": "7"})
        log.append_last("freeze.entered", {"freeze": "f1"})
        log.close()
        assert read.segments(run_dir)[-1].stat().st_size == 0
        with open_log(run_dir, segment_bytes=4000):
            pass
        assert verify(run_dir).code == 20

    def test_append_last_is_an_ordinary_append_while_the_disk_is_well(self, run_dir):
        with open_log(run_dir) as log:
            log.append_last("freeze.entered", {"freeze": "f1"})
            log.append_last("freeze.entered", {"freeze": "f2"})
        assert len(read.segments(run_dir)) == 1

    def test_a_write_limit_of_the_operating_system_is_survived(self, run_dir):
        """No doubles here: the kernel cuts the write short and then refuses."""
        code = """
        import resource, sys
        from pathlib import Path
        from loopguard.audit.log import AuditLog
        from loopguard.errors import AuditWriteError
        log = AuditLog.open(Path(sys.argv[1]), run_id="run-a", policy="", reserve_mib=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            while True:
                log.append("note.added", {"text": "x" * 300})
        except AuditWriteError as error:
            print(error)
        log.append_last("freeze.entered", {"freeze": "f1"})
        log.close()
        """
        process = script(code, run_dir)
        out, err = process.communicate()
        assert "File too large" in out
        assert err == ""
        assert len(read.segments(run_dir)) == 2
        assert verify(run_dir).status == "unanchored"
        open_log(run_dir).close()

    @pytest.fixture
    def small_disk(self, tmp_path):
        """A file system of 1.5 MiB, where this user may mount one."""
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(place)]
        try:
            mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            pytest.skip("a small file system can only be mounted by root")
        yield place
        subprocess.run(["umount", str(place)], check=True)

    def test_the_reserve_makes_room_on_a_disk_that_is_really_full(self, small_disk):
        """The freeze is recorded although nothing else fits any more."""
        run_dir = small_disk / "run"
        log = open_log(run_dir)
        with pytest.raises(AuditWriteError, match="No space left"):
            while True:
                log.append("note.added", {"text": "x" * 5000}, sync=False)
        log.append_last("freeze.entered", {"freeze": "f1"})
        log.close()
        assert read.last(run_dir).type == "freeze.entered"
        assert verify(run_dir).code == 20
        with pytest.raises(AuditWriteError, match=r"cannot write the audit log .* No space left on device"):
            open_log(run_dir, reserve_mib=2)
        assert verify(run_dir).code == 20


def full_after(count: int):
    """An `os.write` for a disk that takes so many more bytes."""
    real = os.write
    left = count

    def write(fd, data):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(fd, data[:left])
        left -= done
        return done

    return write


class TestReading:
    def test_last_reads_the_end_alone(self, run_dir, monkeypatch):
        """Also where the last record is larger than a block, and where a crash cut the line behind it."""
        with open_log(run_dir) as log:
            big = log.append("note.added", {"text": "y" * 200_000})
        assert read.last(run_dir) == big
        with segment(run_dir).open("ab") as file:
            file.write(b'{"actor":{"id"')
        monkeypatch.setattr(read, "raw_lines", None)
        assert read.last(run_dir) == big

    def test_last_of_nothing_is_none(self, run_dir):
        assert read.last(run_dir) is None
        open_log(run_dir).close()
        segment(run_dir).write_bytes(b"")
        assert read.last(run_dir) is None

    def test_last_finds_the_segment_before_an_empty_one(self, run_dir):
        """A crash right after a rotation leaves a segment without a record."""
        plain_log(run_dir)
        (segment(run_dir).parent / read.segment_name(12)).touch()
        assert read.last(run_dir).seq == 11
        assert verify(run_dir).code == 20
        open_log(run_dir).close()
        assert read.last(run_dir).seq == 12

    def test_records_can_be_picked_by_type(self, run_dir):
        plain_log(run_dir, notes=3)
        assert [entry.seq for entry in read.entries(run_dir, types=["log.opened"])] == [1]
        assert [entry.seq for entry in read.entries(run_dir, types={"note.added"})] == [2, 3, 4]

    def test_a_reader_of_an_altered_record_is_told(self, run_dir):
        plain_log(run_dir)
        path = segment(run_dir)
        path.write_bytes(path.read_bytes().replace(b"note 9", b"note X"))
        with pytest.raises(AuditTamperedError, match=r"\(last line\): the record was altered"):
            read.last(run_dir)
        with pytest.raises(AuditTamperedError, match=r"jsonl:11: the record was altered"):
            list(read.entries(run_dir))

    def test_a_file_that_cannot_be_read_is_an_error_with_its_name(self, run_dir):
        """One sentence for each reader and for the writer, and no traceback of the file system."""
        (read.stream_dir(run_dir) / read.segment_name(1)).mkdir(parents=True)
        for reader in (lambda: list(read.entries(run_dir)), lambda: read.last(run_dir), lambda: open_log(run_dir)):
            with pytest.raises(AuditError, match=r"read.*seg-000000000001|seg-000000000001.* cannot be read"):
                reader()

    def test_what_a_log_needs_is_in_the_standard_library(self):
        """Status and freeze commands must start at once, so nothing heavy may come along."""
        code = """
        import sys
        import loopguard.audit.log, loopguard.audit.query, loopguard.audit.read, loopguard.audit.verify
        heavy = {"structlog", "jinja2", "pydantic", "typer", "cryptography"}
        print(sorted({name.partition(".")[0] for name in sys.modules} & heavy))
        """
        assert script(code).communicate()[0] == "[]\n"

    def test_a_clock_can_be_handed_in(self, run_dir):
        """Times in the log come from that clock alone."""
        with open_log(run_dir) as log:
            assert re.fullmatch(r"2030-01-01T00:00:00\.000000Z", log.append("note.added").ts)
        assert AuditLog.open.__kwdefaults__["clock"] is log_module.system_clock
