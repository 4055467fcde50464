"""Disks that really fail under a guarded run: full, read-only, and one whose sync fails. No doubles but the sandbox.

The log alone on bad disks is tested in test_audit_log.py. Here a whole run stands on one: after the first record that
does not reach it no update is applied, no tool starts and nothing is promoted.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from lab import POLICY, Lab, bits

from loopguard.audit import read
from loopguard.audit.verify import verify
from loopguard.cli.app import _main
from loopguard.errors import AuditWriteError, DiskError, LoopFrozen, UsageError
from loopguard.state import standing, submit

torch.set_num_threads(1)

MANY = 5000
"""More updates than any of these disks has room to record."""


def done(*words: object) -> str:
    """What a system command prints. Skips the test where this user or this machine does not allow it."""
    try:
        told = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip(f"a disk that fails for real takes {words[0]}, which is not here")
    if told.returncode:
        pytest.skip(f"a disk that fails for real cannot be had here: {words[0]}: {told.stderr.strip()}")
    return told.stdout.strip()


def fill(place: Path) -> None:
    """Take every byte of a file system."""
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return


class Disk:
    """A small file system for one run. `spoil` breaks it for real, `mend` makes it well again."""

    says: str
    """What the operating system says of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.place = tmp_path / "disk"
        self.beneath = tmp_path / "beneath"
        self.image = tmp_path / "image"
        self.mounted: list[Path] = []

    def set_up(self) -> None:
        raise NotImplementedError

    def mount(self, *words: object, at: Path) -> None:
        at.mkdir(exist_ok=True)
        done("mount", *words, at)
        self.mounted.append(at)

    def spoil(self) -> None:
        raise NotImplementedError

    def mend(self) -> None:
        raise NotImplementedError

    def take_down(self) -> None:
        for place in reversed(self.mounted):
            subprocess.run(["umount", "-l", str(place)], check=True)


class Full(Disk):
    """A tmpfs without a free byte."""

    says = "No space left on device"

    def set_up(self) -> None:
        self.mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", at=self.place)

    def spoil(self) -> None:
        fill(self.place)

    def mend(self) -> None:
        (self.place / "filler").unlink(missing_ok=True)


class SyncFails(Disk):
    """A file system that takes every write, and whose sync fails: the disk beneath it has no room.

    It is mended before the run ends, so that a second sync would succeed; what the first one lost stays lost.
    """

    says = "cannot sync"

    def set_up(self) -> None:
        self.mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", at=self.beneath)
        image = self.beneath / "image"
        done("truncate", "-s", "64M", image)  # a sparse file: there is less beneath than it says
        done("mkfs.ext4", "-q", "-O", "^has_journal", image)
        self.mount("-o", "loop,errors=continue", image, at=self.place)

    def spoil(self) -> None:
        fill(self.beneath)

    def mend(self) -> None:
        (self.beneath / "filler").unlink(missing_ok=True)


class ReadOnly(Disk):
    """A file system that its kernel made read-only under open files, as it does after an error.

    `mount -o remount,ro` cannot do that to a run that is alive: the kernel refuses while a file is open for writing.
    """

    says = "Read-only file system"

    def set_up(self) -> None:
        done("truncate", "-s", "24M", self.image)
        done("mkfs.ext4", "-q", self.image)
        self.mount("-o", "loop,errors=remount-ro", self.image, at=self.place)

    def spoil(self) -> None:
        device = Path(done("findmnt", "-n", "-o", "SOURCE", self.place)).name
        try:
            Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test", encoding="ascii")
        except OSError as error:
            pytest.skip(f"this kernel lets nobody trigger an error of ext4: {error}")

    def mend(self) -> None:
        subprocess.run(["umount", str(self.place)], check=True)
        self.mounted.remove(self.place)
        # 1: errors were corrected, which is what it is for.
        checked = subprocess.run(["e2fsck", "-fy", str(self.image)], capture_output=True, check=False)
        assert checked.returncode in (0, 1), checked.stderr
        self.mount("-o", "loop", self.image, at=self.place)


class Run(Lab):
    """A run on such a disk, one promotion old, in the middle of its second cycle."""

    def __init__(self, disk: Disk, *, freeze: str = "when_frozen: raise") -> None:
        super().__init__(disk.place)
        self.disk = disk
        self.policy.write_text(f"{POLICY}audit: {{reserve: 1MiB}}\n".replace("when_frozen: raise", freeze))
        self.started: list[object] = []
        self.respond = lambda call: self.started.append(call) or "4"
        self.guard = self.build(self.open())
        self.run(self.guard, cycles=1, updates=2)
        self.guard._good.wait()
        self.cycle = next(iter(self.guard.cycles(2)))
        self.update(self.cycle)
        assert self.cycle.tool("python")("print(4)").text == "4"

    def until_it_fails(self) -> str:
        """Train on a spoilt disk until a record does not reach it; gives what was said, and leaves the last weights."""
        self.disk.spoil()
        self.started.clear()
        for _ in range(MANY):
            self.before = bits(self.model, self.actor)
            digest = self.guard.state_digest()
            try:
                self.update(self.cycle)
            except AuditWriteError as error:
                self.digest = digest
                return str(error)
        pytest.fail(f"{MANY} updates were recorded on a disk that takes nothing")

    def unmoved(self) -> bool:
        now = bits(self.model, self.actor)
        return self.guard.state_digest() == self.digest and all(map(torch.equal, now, self.before))


@pytest.fixture(params=[Full, SyncFails, ReadOnly], ids=["full", "sync-fails", "read-only"])
def disk(request, tmp_path):
    made = request.param(tmp_path)
    try:
        made.set_up()
        yield made
    finally:
        made.take_down()


def end(run: Run) -> None:
    """What the end of such a run can still record is a claim of its own, below."""
    with suppress(AuditWriteError, DiskError):
        run.guard.close(finished=False)


def only(*kinds):
    """For claims that not every such disk can show."""
    return pytest.mark.parametrize("disk", kinds, indirect=True, ids=[kind.__name__ for kind in kinds])


def test_nothing_acts_after_the_first_record_that_does_not_reach_the_disk(disk):
    """That very update is not applied, nor is any after it; no tool starts; the actor and the weights stay as they are,
    to the bit, however often the loop asks."""
    run = Run(disk)
    assert disk.says in run.until_it_fails()
    assert run.unmoved()
    for _ in range(3):
        for ask in (
            lambda: run.update(run.cycle),
            lambda: run.cycle.tool("python")("print(4)"),
            lambda: run.cycle.admit([]),
            lambda: run.promote(run.cycle),
        ):
            with pytest.raises(AuditWriteError):
                ask()
    assert run.started == []
    assert run.unmoved()
    end(run)


def test_a_tool_does_not_start_where_its_own_record_is_the_first_to_fail(disk):
    """No update comes before: the call itself is what cannot be recorded."""
    run = Run(disk)
    disk.spoil()
    run.started.clear()
    tool = run.cycle.tool("python")
    with pytest.raises(AuditWriteError, match=disk.says):
        for _ in range(MANY):
            before = len(run.started)
            tool("print(4)")
    assert len(run.started) == before
    end(run)


@only(Full, SyncFails)
def test_the_freeze_lies_in_a_segment_of_its_own_out_of_the_reserve(disk):
    """The full disk stays full, and the one whose sync failed is asked through another file."""
    run = Run(disk)
    run.until_it_fails()
    folder = read.stream_dir(run.run_dir)
    failed, durable = read.segments(run.run_dir)[-1], run.guard._log.durable_head
    assert (folder / "reserve.bin").stat().st_size == 1 << 20
    if isinstance(disk, SyncFails):
        disk.mend()
    run.guard.close(finished=False)
    assert not (folder / "reserve.bin").exists()
    assert [path.name for path in read.segments(run.run_dir)] == [failed.name, read.segment_name(durable.seq + 1)]
    (line,) = read.segments(run.run_dir)[-1].read_bytes().splitlines()
    assert b'"type":"freeze.entered"' in line
    last = read.last(run.run_dir)
    assert (last.body["gate"], last.body["rule"]) == ("audit", "unwritable")
    assert (last.seq, last.prev) == (durable.seq + 1, durable.hash)
    assert standing(run.run_dir).frozen
    assert verify(run.run_dir).code == 20


@only(Full)
def test_a_disk_that_fills_up_unnoticed_freezes_when_the_guard_is_closed(disk):
    """The first record that does not fit is one of the end: what was applied last."""
    run = Run(disk)
    (segment,) = read.segments(run.run_dir)
    log = run.guard._log
    before = segment.stat().st_size
    log.append("note.added", {"by": "x", "text": ""})
    log.append("note.added", {"by": "x", "text": "-" * ((4090 - 2 * segment.stat().st_size + before) % 4096)})
    disk.spoil()
    assert not log.degraded
    with pytest.raises(AuditWriteError, match=disk.says):
        run.guard.close(finished=False)
    assert read.last(run.run_dir).type == "freeze.entered"
    assert standing(run.run_dir).frozen
    assert verify(run.run_dir).code == 20


@only(Full, SyncFails)
def test_the_next_start_is_frozen_names_what_was_lost_and_waits_for_a_person(disk):
    """Records that did not reach the disk are kept beside the log and allowed nothing."""
    run = Run(disk)
    promoted = run.guard.actor_digest
    run.until_it_fails()
    if isinstance(disk, SyncFails):
        disk.mend()
    run.guard.close(finished=False)
    disk.mend()
    (torn,) = read.stream_dir(run.run_dir).glob("torn-*.bin")
    with run.open() as guard:
        assert guard.frozen
        assert [entry.body["file"] for entry in run.events("log.recovered")] == [torn.name]
        run.build(guard)
        assert guard.actor_digest == promoted
        with pytest.raises(LoopFrozen):
            next(iter(guard.cycles(2)))
        submit(run.run_dir, "resume", by="dana", reason="the disk is mended")
        run.run(guard, cycles=2)
    assert run.events("run.finished")
    assert verify(run.run_dir).code == 20


@only(ReadOnly)
def test_a_disk_that_takes_nothing_at_all_holds_no_freeze_and_its_run_goes_on_from_the_promotion(disk):
    """Neither the record nor the latch can be written, and closing says so. Nothing acted meanwhile, so the next start
    settles the lease: it goes back to what was promoted, in the weights as in the log."""
    run = Run(disk)
    promoted = run.guard.actor_digest
    run.until_it_fails()
    with pytest.raises((AuditWriteError, DiskError), match="Read-only file system"):
        run.guard.close(finished=False)
    disk.mend()
    assert not (run.run_dir / "latch").exists()
    with run.open() as guard:
        assert not guard.frozen
        assert any("permitted and not recorded" in sentence for sentence in guard.found)
        run.build(guard)
        assert guard.actor_digest == promoted
        run.run(guard, cycles=2)
    assert verify(run.run_dir).code == 20


@only(ReadOnly)
def test_with_a_second_place_for_the_latch_its_freeze_is_not_lost(disk, tmp_path):
    """The record cannot be written; the latch lies elsewhere, and the next start comes up frozen."""
    second = tmp_path / "other volume"
    run = Run(disk, freeze=f"when_frozen: raise, second_latch: '{second}'")
    promoted = run.guard.actor_digest
    run.until_it_fails()
    with pytest.raises((AuditWriteError, DiskError), match="Read-only file system"):
        run.guard.close(finished=False)
    assert [path.name for path in second.iterdir()] == [f"{run.guard.run_id}.latch"]
    assert standing(run.run_dir).frozen
    disk.mend()
    with run.open() as guard:
        assert guard.frozen
        run.build(guard)
        assert guard.actor_digest == promoted
    assert _main(["resume", str(run.run_dir), "--by", "dana", "--reason", "the disk is mended"]) == 0
    assert list(second.iterdir()) == []
    with run.open() as guard:
        run.build(guard)
        run.run(guard, cycles=2)
    assert verify(run.run_dir).code == 20


def test_a_second_place_in_the_run_itself_or_one_that_takes_no_file_is_refused(tmp_path):
    lab = Lab(tmp_path)
    for place, said in ((lab.run_dir / "x", "in the run directory"), ("/proc/nothing", "takes no file")):
        lab.policy.write_text(POLICY.replace("when_frozen: raise", f"second_latch: '{place}'"))
        with pytest.raises(UsageError, match=said):
            lab.open()


def test_a_run_on_a_disk_that_was_remounted_read_only_does_not_start(tmp_path, capsys):
    """It says which file, starts no cell, and can still be looked at."""
    disk = Full(tmp_path)
    try:
        disk.set_up()
        run = Run(disk)
        run.guard.close(finished=False)
        done("mount", "-o", "remount,ro", disk.place)
        run.started.clear()
        before = {path: path.stat().st_mtime_ns for path in run.run_dir.rglob("*")}
        with pytest.raises((AuditWriteError, DiskError), match="Read-only file system") as told:
            run.open()
        assert told.value.exit_code == 6
        assert str(run.run_dir) in str(told.value)
        assert _main(["status", str(run.run_dir)]) == 0
        assert _main(["freeze", str(run.run_dir), "--by", "dana", "--reason", "look"]) == 6
        assert "Read-only file system" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in run.run_dir.rglob("*")} == before
        assert run.started == []
    finally:
        disk.take_down()
