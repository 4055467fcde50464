"""Closed segments in compressed form: the same records, nothing lost, nothing waited for, and damage that shows."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import zlib

import pytest
from audit_stories import finished, frozen_twice, open_log, plain_log

from loopguard.audit import compress as packing
from loopguard.audit import log as log_module
from loopguard.audit import query, read, segments
from loopguard.audit.events import Head
from loopguard.audit.export import export
from loopguard.audit.tail import Tail
from loopguard.audit.verify import verify
from loopguard.errors import AuditTamperedError
from loopguard.state import _contradiction

SMALL = {"segment_bytes": 4000, "reserve_mib": 1}


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def names(run_dir):
    return sorted(path.name for path in read.stream_dir(run_dir).iterdir() if "seg-" in path.name)


def packed_log(run_dir, *, notes=60, **options):
    """A log of small segments, all but the last compressed."""
    plain_log(run_dir, notes=notes, **SMALL, **options)
    for path in read.segments(run_dir)[:-1]:
        assert packing.compress(path)
    return read.segments(run_dir)


class TestWriting:
    def test_what_is_closed_is_compressed_and_what_is_written_is_not(self, run_dir):
        with open_log(run_dir, compress=True, **SMALL) as log:
            for number in range(60):
                log.append("note.added", {"text": str(number)}, sync=False)
            log._compressor.wait()
            *closed, last = read.segments(run_dir)
            assert len(closed) > 5
            assert [path.suffix for path in (*closed, last)] == [".gz"] * len(closed) + [".jsonl"]
        assert [entry.seq for entry in read.entries(run_dir)] == list(range(1, 62))
        assert verify(run_dir).code == 20
        assert verify(run_dir).records == 61

    def test_the_compressed_bytes_are_the_raw_ones(self, run_dir):
        """Any gzip can read them, and the same segment gives the same file."""
        plain_log(run_dir, notes=60, **SMALL)
        path = read.segments(run_dir)[0]
        raw = path.read_bytes()
        assert packing.compress(path)
        first = segments.packed(path).read_bytes()
        assert gzip.decompress(first) == raw
        assert first[3:8] == b"\0" * 5  # no flags, no name, no time
        path.write_bytes(raw)
        assert packing.compress(path)
        assert segments.packed(path).read_bytes() == first

    def test_a_log_goes_on_behind_compressed_segments(self, run_dir):
        packed_log(run_dir)
        head = read.last(run_dir)
        with open_log(run_dir, **SMALL) as log:
            assert log.head.seq == head.seq + 1
        assert verify(run_dir).code == 20

    def test_what_an_earlier_process_left_raw_is_compressed_by_the_next(self, run_dir):
        plain_log(run_dir, notes=60, **SMALL)
        assert not any(segments.is_packed(path) for path in read.segments(run_dir))
        with open_log(run_dir, compress=True, **SMALL) as log:
            log._compressor.wait()
            assert all(segments.is_packed(path) for path in read.segments(run_dir)[:-1])

    def test_nothing_is_compressed_where_nobody_asked(self, run_dir):
        plain_log(run_dir, notes=60, **SMALL)
        with open_log(run_dir, **SMALL):
            pass
        assert not any(name.endswith(".gz") for name in names(run_dir))

    def test_an_append_never_waits_for_it(self, run_dir, monkeypatch):
        """Records go on being written while a segment is stuck on its way."""
        stuck, go_on = threading.Event(), threading.Event()
        real = packing._pack

        def slow(*words):
            stuck.set()
            assert go_on.wait(60)
            return real(*words)

        monkeypatch.setattr(packing, "_pack", slow)
        with open_log(run_dir, compress=True, **SMALL) as log:
            for number in range(60):
                log.append("note.added", {"text": str(number)})
            assert stuck.is_set()
            assert log.durable_head.seq == 61
            go_on.set()
        assert verify(run_dir).records == 61

    def test_closing_waits_for_what_is_under_way_and_leaves_no_thread(self, run_dir):
        with open_log(run_dir, compress=True, **SMALL) as log:
            for number in range(60):
                log.append("note.added", {"text": str(number)}, sync=False)
        assert [path.suffix for path in read.segments(run_dir)][:-1] == [".gz"] * (len(read.segments(run_dir)) - 1)
        assert not any(thread.name == "loopguard-compress" for thread in threading.enumerate())

    def test_closing_does_not_wait_for_ever(self, run_dir, monkeypatch):
        """What is not done in time stays raw, and the next start does it."""
        plain_log(run_dir, notes=60, **SMALL)
        monkeypatch.setattr(packing, "CLOSE_S", -1.0)
        real, held = packing._pack, threading.Event()

        def slow(path, partial, stop):
            held.wait(60)
            return real(path, partial, stop)

        monkeypatch.setattr(packing, "_pack", slow)
        log = open_log(run_dir, compress=True, **SMALL)
        closing = threading.Thread(target=log.close)
        closing.start()
        held.set()
        closing.join(60)
        assert not closing.is_alive()
        assert not any(name.endswith(".gz") for name in names(run_dir))
        assert verify(run_dir).code == 20

    @pytest.mark.parametrize("interrupted", ["sync", "wait"])
    def test_no_thread_outlives_the_lock(self, run_dir, monkeypatch, interrupted):
        """Whoever opens the log next begins with the same segment, and two at one segment could lose it."""
        under_way = until_stopped(monkeypatch)
        monkeypatch.setattr(packing, "CLOSE_S", 600.0 if interrupted == "wait" else 0.0)
        log = open_log(run_dir, compress=True, **SMALL)
        for number in range(30):
            log.append("note.added", {"text": str(number)}, sync=False)
        assert under_way.wait(60)
        home, name = {"sync": (log, "sync"), "wait": (log._compressor, "wait")}[interrupted]
        real = getattr(home, name)

        def ctrl_c():
            monkeypatch.setattr(home, name, real)
            raise KeyboardInterrupt

        monkeypatch.setattr(home, name, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            log.close()
        assert read.owner(run_dir) is None
        assert not any(thread.name == "loopguard-compress" for thread in threading.enumerate())

    def test_where_no_thread_can_be_begun_segments_stay_raw_and_the_log_goes_on(self, run_dir, monkeypatch):
        """At the limit of threads, and in Python 3.12 while the interpreter ends."""
        real = threading.Thread.start

        def refused(thread):
            if thread.name == "loopguard-compress":
                raise RuntimeError("can't start new thread")
            real(thread)

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refused)
            with open_log(run_dir, compress=True, **SMALL) as log:
                for number in range(30):
                    log.append("note.added", {"text": str(number)}, sync=False)
        (left,) = [entry for entry in read.entries(run_dir) if entry.type == "log.left_raw"]
        assert left.body["reason"] == "can't start new thread"
        assert left.body["segments"] == [path.name for path in read.segments(run_dir)][:-1]
        assert verify(run_dir).code == 20
        with open_log(run_dir, compress=True, **SMALL) as log:
            log._compressor.wait()
            assert segments.is_packed(read.segments(run_dir)[0])


def until_stopped(monkeypatch):
    """A segment that takes until somebody stops it; gives what is set once it is under way."""
    under_way = threading.Event()

    def endless(path, partial, stop):
        under_way.set()
        while not stop():
            time.sleep(0.001)

    monkeypatch.setattr(packing, "_pack", endless)
    return under_way


class TestDisksThatFail:
    def test_the_space_kept_for_a_last_record_is_not_taken_for_a_compressed_segment(self, run_dir, monkeypatch):
        under_way = until_stopped(monkeypatch)
        threads = []
        real = log_module.AuditLog._write_last

        def watched(log, fields):
            threads.extend(thread.name for thread in threading.enumerate())
            return real(log, fields)

        monkeypatch.setattr(log_module.AuditLog, "_write_last", watched)
        log = open_log(run_dir, compress=True, **SMALL)
        for number in range(30):
            log.append("note.added", {"text": str(number)}, sync=False)
        assert under_way.wait(60)
        log._failed("write", OSError(errno.ENOSPC, "No space left on device"))
        log.append_last("freeze.entered", {"freeze": "f1"})
        assert threads
        assert "loopguard-compress" not in threads
        log.close()
        assert read.last(run_dir).type == "freeze.entered"

    def test_more_segments_than_fit_into_one_record_are_told_in_several(self, run_dir, monkeypatch):
        """Of a log that an earlier version left raw, on a disk that takes none of it."""
        monkeypatch.setattr(packing, "_MOST_TOLD", 3)
        monkeypatch.setattr(packing, "_pack", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted")))
        plain_log(run_dir, notes=40, **SMALL)
        raw = [path.name for path in read.segments(run_dir)][:-1]
        with open_log(run_dir, compress=True, **SMALL) as log:
            log._compressor.wait()
            for _ in raw:
                log.append("note.added", {"text": "later"}, sync=False)
                log.checkpoint()
        told = [entry.body for entry in read.entries(run_dir) if entry.type == "log.left_raw"]
        assert {body["reason"] for body in told} == {"not permitted"}
        assert max(len(body["segments"]) for body in told) == 3
        assert [name for body in told for name in body["segments"]][: len(raw)] == raw

    @pytest.mark.parametrize("fails", ["_write", "_pack", "sync_folder"])
    def test_a_disk_that_fails_stops_nothing_and_is_told_once(self, run_dir, monkeypatch, fails):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(packing, fails, full)
        with open_log(run_dir, compress=True, **SMALL) as log:
            for number in range(40):
                log.append("note.added", {"text": str(number)}, sync=False)
            assert not log.degraded
        (left,) = [entry for entry in read.entries(run_dir) if entry.type == "log.left_raw"]
        assert left.body["reason"] == "No space left on device"
        raw = [path.name for path in read.segments(run_dir)]
        assert left.body["segments"] == raw[: len(left.body["segments"])]
        assert not any(name.endswith(".gz") for name in raw)
        assert verify(run_dir).code == 20

    def test_what_was_written_is_compared_before_the_raw_segment_goes(self, run_dir, monkeypatch):
        plain_log(run_dir, notes=60, **SMALL)
        path = read.segments(run_dir)[0]
        monkeypatch.setattr(packing, "_digest", lambda _: b"other")
        with pytest.raises(AuditTamperedError, match="does not hold what was put in"):
            packing.compress(path)
        assert path.exists()
        assert names(run_dir) == [path.name for path in read.segments(run_dir)]


class TestCrashes:
    @pytest.mark.parametrize("step", range(12))
    def test_kill_9_at_each_step_loses_nothing(self, run_dir, step):
        """The process dies before its n-th call into the system; the next start compresses what is left."""
        plain_log(run_dir, notes=30, **SMALL)
        before = [entry.hash for entry in read.entries(run_dir)]
        code = """
            import os, pathlib, sys
            from loopguard.audit import compress
            left = [int(sys.argv[2])]
            def dying(real):
                def call(*words, **options):
                    if left[0] == 0:
                        os.kill(os.getpid(), 9)
                    left[0] -= 1
                    return real(*words, **options)
                return call
            for home, name in ((os, "open"), (os, "write"), (os, "fsync"), (os, "close"), (pathlib.Path, "replace"),
                               (pathlib.Path, "unlink")):
                setattr(home, name, dying(getattr(home, name)))
            compress.compress(pathlib.Path(sys.argv[1]))
            """
        first = read.segments(run_dir)[0]
        command = [sys.executable, "-c", textwrap.dedent(code), str(first), str(step)]
        done = subprocess.run(command, check=False, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL)
        assert [entry.hash for entry in read.entries(run_dir)] == before
        assert verify(run_dir).code == 20
        with open_log(run_dir, compress=True, **SMALL) as log:
            log._compressor.wait()
        assert [entry.hash for entry in read.entries(run_dir)][: len(before)] == before
        assert not any(name.startswith(".") for name in names(run_dir))
        assert len({segments.first_seq(path) for path in segments.every(first.parent)}) == len(
            segments.every(first.parent)
        )

    def test_the_raw_one_counts_where_both_are_there(self, run_dir):
        plain_log(run_dir, notes=60, **SMALL)
        path = read.segments(run_dir)[0]
        segments.packed(path).write_bytes(b"half of one")
        assert read.segments(run_dir)[0] == path
        assert verify(run_dir).code == 20
        with open_log(run_dir, compress=True, **SMALL) as log:
            log._compressor.wait()
        assert gzip.decompress(segments.packed(path).read_bytes()).count(b"\n") > 1
        assert verify(run_dir).code == 20

    def test_a_fork_leaves_the_thread_of_its_parent_alone(self, run_dir, monkeypatch):
        """The child has no such thread; it neither waits for it nor writes."""
        stuck, go_on = threading.Event(), threading.Event()
        real = packing._pack

        def slow(*words):
            stuck.set()
            assert go_on.wait(60)
            return real(*words)

        monkeypatch.setattr(packing, "_pack", slow)
        with open_log(run_dir, compress=True, **SMALL) as log:
            for number in range(30):
                log.append("note.added", {"text": str(number)}, sync=False)
            assert stuck.wait(60)
            child = os.fork()
            if child == 0:
                log.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            go_on.set()
            log.append("note.added", {"text": "the parent goes on"})
        assert verify(run_dir).records == 32
        assert segments.is_packed(read.segments(run_dir)[0])

    def test_a_writer_that_is_killed_again_and_again_loses_nothing(self, run_dir):
        code = """
            import sys
            from pathlib import Path
            from loopguard.audit.log import AuditLog
            log = AuditLog.open(Path(sys.argv[1]), run_id="run-a", policy="", reserve_mib=1, segment_bytes=20_000,
                                compress=True)
            number = 0
            while True:
                print(log.append("note.added", {"text": str(number)}).hash, flush=True)
                number += 1
            """
        promised = []
        for turn in range(4):
            command = [sys.executable, "-c", textwrap.dedent(code), str(run_dir)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                promised += [process.stdout.readline().strip() for _ in range(120 + 7 * turn)]
                process.kill()
        there = {entry.hash for entry in read.entries(run_dir)}
        assert set(promised) <= there
        assert verify(run_dir).code in (10, 20)


def truncated(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def other_sum(data):
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


DAMAGES = {
    "empty": lambda data: b"",
    "no gzip": lambda data: b"{}\n" * 10,
    "truncated": truncated,
    "without its end": lambda data: data[:-1],
    "flipped": flipped,
    "another sum": other_sum,
    "something behind it": lambda data: data + b"x",
    "zeros behind it": lambda data: data + b"\0" * 512,
    "two members": lambda data: data + gzip.compress(b""),
    "split in two": lambda data: (
        gzip.compress(gzip.decompress(data)[:700], mtime=0) + gzip.compress(gzip.decompress(data)[700:], mtime=0)
    ),
    "an edited record": lambda data: gzip.compress(gzip.decompress(data).replace(b"dana", b"eve!"), mtime=0),
    "an unended line": lambda data: gzip.compress(gzip.decompress(data)[:-1]),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
    @pytest.mark.parametrize("which", [0, 1, -1], ids=["first", "middle", "last"])
    def test_a_damaged_segment_is_tampered_with_and_no_traceback(self, run_dir, damage, which):
        paths = packed_log(run_dir)
        if which == -1:
            packing.compress(paths[-1])
        path = read.segments(run_dir)[which]
        path.write_bytes(damage(path.read_bytes()))
        found = verify(run_dir)
        assert (found.code, found.status) == (30, "tamper")
        assert any(path.name in finding for finding in found.findings)
        with pytest.raises(AuditTamperedError):
            open_log(run_dir, **SMALL)

    @pytest.mark.parametrize(("which", "code"), [(0, 30), (-1, 31)])
    def test_a_record_less_is_what_it_is_in_a_raw_segment(self, run_dir, which, code):
        """Cut off at the end of the log, the checkpoint beside it tells; before that, the next segment does."""
        packing.compress(packed_log(run_dir)[-1])
        path = read.segments(run_dir)[which]
        lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        path.write_bytes(gzip.compress(b"".join(lines[:-1])))
        assert verify(run_dir).code == code

    @pytest.mark.parametrize("name", ["empty", "truncated", "flipped", "something behind it", "two members"])
    def test_readers_say_where(self, run_dir, name):
        path = packed_log(run_dir)[1]
        path.write_bytes(DAMAGES[name](path.read_bytes()))
        with pytest.raises(AuditTamperedError, match=path.name):
            list(read.entries(run_dir))
        with pytest.raises(AuditTamperedError):
            query.story(run_dir)
        with pytest.raises(AuditTamperedError):
            Tail(run_dir).newest(500)

    def test_a_damaged_log_can_still_record_a_freeze_when_asked_to(self, run_dir):
        path = packed_log(run_dir)[0]
        path.write_bytes(truncated(path.read_bytes()))
        with open_log(run_dir, verify=False, **SMALL) as log:
            log.append("freeze.entered", {"freeze": "f1"})
        assert read.last(run_dir).type == "freeze.entered"
        assert verify(run_dir).code == 30

    def test_a_bomb_costs_no_memory(self, run_dir):
        """A small file that unpacks to very much: a line that is too long ends the reading."""
        path = packed_log(run_dir)[0]
        deflate = zlib.compressobj(9, zlib.DEFLATED, segments.GZIP_WBITS)
        block = b"x" * (1024 * 1024)
        path.write_bytes(b"".join(deflate.compress(block) for _ in range(300)) + deflate.flush())
        tracemalloc.start()
        try:
            assert verify(run_dir).code == 30
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 16 * 1024 * 1024
        assert any("longer than any record" in finding for finding in verify(run_dir).findings)

    def test_no_more_is_unpacked_than_any_segment_holds(self, run_dir, monkeypatch):
        packed_log(run_dir)
        monkeypatch.setattr(segments, "MAX_PACKED_CONTENT_BYTES", 1000)
        assert any("holds more than any segment" in finding for finding in verify(run_dir).findings)

    def test_a_segment_too_large_stays_raw(self, run_dir, monkeypatch):
        plain_log(run_dir, notes=60, **SMALL)
        monkeypatch.setattr(segments, "MAX_PACKED_CONTENT_BYTES", 1000)
        assert not packing.compress(read.segments(run_dir)[0])
        assert verify(run_dir).code == 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same run raw and compressed."""
    home = tmp_path_factory.mktemp("pair")
    frozen_twice(home / "raw", updates=40, calls=20)
    with open_log(home / "other", segment_bytes=20_000) as log:
        for entry in read.entries(home / "raw"):
            log.append(entry.type, entry.body, cycle=entry.cycle, sync=False)
    shutil.copytree(home / "other", home / "packed")
    for path in read.segments(home / "packed"):
        packing.compress(path)
    return home / "other", home / "packed"


class TestReading:
    def test_every_reader_gives_the_same(self, pair, tmp_path):
        raw, packed = pair
        assert all(segments.is_packed(path) for path in read.segments(packed))
        assert list(read.entries(raw)) == list(read.entries(packed))
        assert list(read.entries(raw, types=("tool.decided",))) == list(read.entries(packed, types=("tool.decided",)))
        assert read.last(raw) == read.last(packed)
        assert [read.at(raw, "controller", seq) for seq in (1, 77, 300)] == [
            read.at(packed, "controller", seq) for seq in (1, 77, 300)
        ]
        assert Tail(raw).newest(40) == Tail(packed).newest(40)
        assert query.why(raw).replace(str(raw), "") == query.why(packed).replace(str(packed), "")
        assert export(raw, to="jsonl", out=tmp_path / "raw.jsonl") == export(
            packed, to="jsonl", out=tmp_path / "p.jsonl"
        )
        assert (tmp_path / "raw.jsonl").read_bytes() == (tmp_path / "p.jsonl").read_bytes()

    @pytest.mark.parametrize("seq", [1, 50, 333])
    def test_what_came_since_a_head_is_the_same(self, pair, seq):
        raw, packed = pair
        head = Head(seq, read.at(raw, "controller", seq).hash)
        types = ("freeze.entered", "resume.applied")
        assert read.since(raw, "controller", head, types=types) == read.since(packed, "controller", head, types=types)
        assert read.since(packed, "controller", Head(seq, "0" * 64), types=types) is None

    def test_both_forms_verify_alike(self, pair):
        raw, packed = pair
        assert (verify(raw).code, verify(raw).head) == (verify(packed).code, verify(packed).head)

    def test_the_cache_is_held_against_a_compressed_record(self, pair):
        assert _contradiction(pair[1]) == ""

    def test_somebody_who_follows_sees_each_record_once(self, run_dir):
        """Also where the segment at hand is compressed between two looks."""
        plain_log(run_dir, notes=3, **SMALL)
        watched = Tail(run_dir)
        seen = [entry.seq for entry in watched.newest(100)]
        with open_log(run_dir, compress=True, **SMALL) as log:
            for number in range(40):
                log.append("note.added", {"text": str(number)}, sync=False)
            log._compressor.wait()
        looks = iter(range(3))

        def look(_):
            if next(looks, None) is None:
                raise StopIteration

        with pytest.raises(RuntimeError):
            for entry in watched.follow(sleep=look):
                seen.append(entry.seq)
        assert seen == list(range(1, read.last(run_dir).seq + 1))

    def test_a_segment_may_be_compressed_after_it_was_listed(self, run_dir):
        plain_log(run_dir, notes=60, **SMALL)
        listed = read.segments(run_dir)
        lines = [line.data for path in listed for line in read.raw_lines(path)]
        for path in listed:
            packing.compress(path)
        assert [line.data for path in listed for line in read.raw_lines(path)] == lines


def test_a_finished_run_compresses_well(tmp_path):
    """Records are alike: less than a fifth is left of them."""
    finished(tmp_path / "run", cycles=2)
    (path,) = read.segments(tmp_path / "run")
    size = path.stat().st_size
    assert packing.compress(path)
    assert segments.packed(path).stat().st_size * 4 < size
