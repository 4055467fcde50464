"""What becomes of a log that somebody touched: every attack, by what the reader has to hold against it.

A reader has nothing, the vkey, a checkpoint that was kept elsewhere, or both. The log has 500 records and a second
stream. An attacker may write to the run directory, and hashes as well as we do; one of them has stolen the log key.
"""

from __future__ import annotations

import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from audit_stories import forget_checkpoints, open_log, plain_log

from loopguard.audit import notes, read
from loopguard.audit.anchors import Anchor
from loopguard.audit.events import encode, fields_of
from loopguard.audit.keys import SigningKey, VerifierKey, keygen
from loopguard.audit.tree import Tree
from loopguard.audit.verify import verify
from loopguard.errors import UsageError

EVERY = 100
SAMPLE = 12
"""Places that each attack is tried at; the seed is fixed."""


@dataclass
class Story:
    """A run, and what a reader may have of it."""

    run_dir: Path
    home: Path
    key: SigningKey
    vkey: VerifierKey

    @property
    def anchors(self) -> list[Path]:
        return [self.home / "anchors.jsonl"]

    def copy(self, to: Path) -> Path:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.run_dir, to)
        return to

    def judged(self, run_dir: Path) -> dict[str, str]:
        """The status for each of the four readers."""
        return {
            "nothing": verify(run_dir).status,
            "key": verify(run_dir, keys=[str(self.vkey)]).status,
            "anchor": verify(run_dir, anchors=self.anchors).status,
            "both": verify(run_dir, keys=[str(self.vkey)], anchors=self.anchors).status,
        }


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """500 records of the controller, signed and kept every 100, and the stream of a rank."""
    home = tmp_path_factory.mktemp("attacks")
    path, vkey = keygen("gpu7", folder=home / "keys")
    told = Story(home / "run", home, SigningKey.parse(path.read_text(), place="here"), vkey)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOPGUARD_LOG_KEY", str(path))
        patch.setattr(read, "_WRITER_GRACE_S", 0)
        with open_log(told.run_dir, stream="rank-1", checkpoint_every=EVERY) as rank:
            for number in range(120):
                rank.append("note.added", {"rank": number}, sync=False)
            write(told.run_dir, 500, told.anchors)
            for number in range(30):
                rank.append("note.added", {"rank": number}, sync=False)
        write(told.run_dir, 3, told.anchors)
        yield told


def write(run_dir: Path, count: int, anchors: list[Path], text: str = "note") -> None:
    kept = [Anchor(kind="file", place=str(place)) for place in anchors]
    with open_log(run_dir, checkpoint_every=EVERY, anchors=kept) as log:
        for number in range(count):
            log.append("note.added", {"by": "dana", "text": f"{text} {number}"}, sync=False)


def lines_of(run_dir: Path, stream: str = "controller") -> list[bytes]:
    return read.segments(run_dir, stream)[0].read_bytes().splitlines(keepends=True)


def put(run_dir: Path, lines: list[bytes], stream: str = "controller") -> Path:
    read.segments(run_dir, stream)[0].write_bytes(b"".join(lines))
    return run_dir


def forge(run_dir: Path, at: int, *, key: SigningKey | None = None, stream: str = "controller") -> Path:
    """Edit a record and hash everything after it anew; take the checkpoints away, or sign others with a stolen key."""
    prev, lines, tree = "0" * 64, [], Tree()
    folder = read.stream_dir(run_dir, stream)
    sizes = [size for size, _ in notes.stored(folder)]
    forget_checkpoints(run_dir, stream)
    for entry in read.entries(run_dir, stream):
        fields = fields_of(entry) | {"prev": prev} | ({"body": {"text": "never happened"}} if entry.seq == at else {})
        line, prev = encode(fields)
        lines.append(line)
        tree = tree.grown(bytes.fromhex(prev))
        if key and entry.seq in sizes:
            point = notes.Checkpoint(entry.log, tree.size, tree.root())
            notes.store(folder, point.note(key), size=point.size)
    return put(run_dir, lines, stream)


def all_the_same(status: str) -> dict[str, str]:
    return dict.fromkeys(("nothing", "key", "anchor", "both"), status)


def places(length: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(length), SAMPLE)


class TestUntouched:
    def test_it_has_five_hundred_records_and_a_second_stream(self, story):
        result = verify(story.run_dir)
        assert result.records > 500
        assert [(one.name, one.records) for one in result.streams] == [("controller", result.records), ("rank-1", 151)]

    def test_ok_takes_an_anchor(self, story):
        unproven = "unanchored"
        assert story.judged(story.run_dir) == {"nothing": unproven, "key": unproven, "anchor": "ok", "both": "ok"}

    def test_without_a_key_authorship_is_unproven_whatever_else_is_there(self, story):
        for anchors in ([], story.anchors):
            assert verify(story.run_dir, anchors=anchors).authorship == (
                "no key was given: consistent, authorship unproven"
            )

    def test_what_was_trusted_is_said(self, story):
        result = verify(story.run_dir, keys=[str(story.vkey)], anchors=story.anchors)
        assert result.keys == [str(story.vkey)]
        (anchor,) = result.anchors
        assert anchor.startswith("controller up to record ")
        assert anchor.endswith(str(story.anchors[0]))
        last = max(size for size, _ in notes.stored(read.stream_dir(story.run_dir)))
        assert result.authorship == f"records 1-{last} are signed by gpu7"

    def test_without_a_key_the_one_to_look_for_is_named(self, story):
        assert f"the log says that {story.vkey} signs it" in verify(story.run_dir).notes[-1]

    def test_records_that_only_say_where_a_checkpoint_was_kept_may_be_cut_off(self, story, tmp_path):
        """Nobody gains by that; a cut of one record more is seen."""
        run_dir = story.copy(tmp_path / "run")
        lines = lines_of(run_dir)
        assert b'"anchor.kept"' in lines[-1]
        put(run_dir, lines[:-1])
        assert story.judged(run_dir)["both"] == "ok"
        put(run_dir, lines[:-2])
        assert story.judged(run_dir)["both"] == "truncated"


class TestEdits:
    """Where one record no longer follows another, no key and no anchor is needed to see it."""

    def test_a_flipped_byte(self, story, tmp_path):
        """Two in each of the sampled records, and each byte of one of them."""
        run_dir = story.copy(tmp_path / "run")
        lines = lines_of(run_dir)
        rng = random.Random(1)
        spots = [(record, rng.randrange(len(lines[record]))) for record in range(0, len(lines), 7)]
        spots += [(250, at) for at in range(len(lines[250]))]
        for record, at in spots:
            line = bytearray(lines[record])
            line[at] ^= 1 << rng.randrange(8)
            put(run_dir, [*lines[:record], bytes(line), *lines[record + 1 :]])
            assert verify(run_dir, stream="controller").status == "tamper", (record, at)
        assert story.judged(run_dir) == all_the_same("tamper")

    @pytest.mark.parametrize("seed", range(4))
    def test_swapped_dropped_and_repeated_records(self, story, tmp_path, seed):
        run_dir = story.copy(tmp_path / "run")
        lines = lines_of(run_dir)
        a, b, *_ = places(len(lines) - 1, seed)
        swapped = list(lines)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        for changed in (swapped, lines[:a] + lines[a + 1 :], [*lines[: a + 1], lines[a], *lines[a + 1 :]]):
            assert story.judged(put(run_dir, changed)) == all_the_same("tamper")

    @pytest.mark.parametrize("at", places(500, 2))
    def test_an_inserted_record_makes_two_of_one_number(self, story, tmp_path, at):
        """It follows the one before it, as only somebody could make it who hashes; the one after it gives it away."""
        run_dir = story.copy(tmp_path / "run")
        lines = lines_of(run_dir)
        before = list(read.entries(run_dir))[at]
        made, _ = encode(fields_of(before) | {"seq": at + 2, "prev": before.hash, "body": {}})
        put(run_dir, [*lines[: at + 1], made, *lines[at + 1 :]])
        assert story.judged(run_dir) == all_the_same("fork")

    def test_a_segment_of_another_run(self, story, tmp_path):
        """In the place of ours, behind it, or one record of it in the middle."""
        run_dir = story.copy(tmp_path / "run")
        plain_log(tmp_path / "other", notes=len(lines_of(run_dir)) + 5, run_id="run-b")
        ours, theirs = lines_of(run_dir), lines_of(tmp_path / "other")
        for changed in (theirs, ours + theirs[len(ours) :], [*ours[:250], theirs[250], *ours[251:]]):
            assert story.judged(put(run_dir, changed)) == all_the_same("splice")

    def test_a_segment_of_the_same_run_before_it_wrote_on_elsewhere(self, story, tmp_path):
        """Two writers had a copy each, and the second half of one was put behind the first half of the other."""
        run_dir, other = story.copy(tmp_path / "run"), story.copy(tmp_path / "other")
        put(other, lines_of(other)[:300])
        forget_checkpoints(other)
        write(other, 200, [])
        put(run_dir, [*lines_of(run_dir)[:400], *lines_of(other)[400:]])
        assert story.judged(run_dir) == all_the_same("tamper")


class TestCuts:
    @pytest.mark.parametrize("keep", [1, 2, *sorted(place + 3 for place in places(480, 3)), 500])
    def test_a_cut_tail_is_never_ok(self, story, tmp_path, keep):
        """Also where the attacker thinks of the checkpoints; the anchor knows that there was more."""
        run_dir = story.copy(tmp_path / "run")
        put(run_dir, lines_of(run_dir)[:keep])
        assert story.judged(run_dir) == all_the_same("truncated"), "the checkpoints beside it say so"
        forget_checkpoints(run_dir)
        unproven = "unanchored"
        expected = {"nothing": unproven, "key": unproven, "anchor": "truncated", "both": "truncated"}
        assert story.judged(run_dir) == expected

    @pytest.mark.parametrize("cut", [1, 50, 300])
    def test_a_cut_inside_a_record(self, story, tmp_path, cut):
        """It looks like a crash, and is recovered as one; an anchor tells it from one."""
        run_dir = story.copy(tmp_path / "run")
        lines = lines_of(run_dir)
        put(run_dir, [*lines[:350], lines[350][:cut]])
        for size, path in notes.stored(read.stream_dir(run_dir)):
            if size > 350:
                path.unlink()
        assert story.judged(run_dir)["both"] == "truncated"
        assert "the last line is cut" in verify(run_dir).findings[0]
        assert verify(run_dir).status == "unanchored"


class TestRewrites:
    """Logs in which every hash is right."""

    @pytest.mark.parametrize("at", [1, 2, *places(480, 4)[:6], 499])
    def test_a_record_is_edited_and_all_after_it_hashed_anew(self, story, tmp_path, at):
        run_dir = forge(story.copy(tmp_path / "run"), at)
        unproven = "unanchored"
        assert story.judged(run_dir) == {"nothing": unproven, "key": unproven, "anchor": "replaced", "both": "replaced"}
        assert verify(run_dir).authorship == "no key was given: consistent, authorship unproven"
        told = verify(run_dir, keys=[str(story.vkey)])
        assert told.authorship == "unproven: no checkpoint of this log is signed by gpu7"

    @pytest.mark.parametrize("at", [2, 250, 499])
    def test_checkpoints_that_were_left_beside_it_give_it_away(self, story, tmp_path, at):
        run_dir = story.copy(tmp_path / "run")
        shutil.copytree(run_dir / "audit/controller/checkpoints", tmp_path / "kept")
        forge(run_dir, at)
        shutil.copytree(tmp_path / "kept", run_dir / "audit/controller/checkpoints")
        assert story.judged(run_dir) == all_the_same("replaced")

    @pytest.mark.parametrize("at", [2, 250, 499])
    def test_with_the_log_key_it_takes_an_anchor_to_see_it(self, story, tmp_path, at):
        """Then there are two histories that one key signed; to whoever has no key it is another log than was kept."""
        run_dir = forge(story.copy(tmp_path / "run"), at, key=story.key)
        unproven = "unanchored"
        assert verify(run_dir, keys=[str(story.vkey)]).authorship.endswith("are signed by gpu7")
        assert story.judged(run_dir) == {"nothing": unproven, "key": unproven, "anchor": "replaced", "both": "fork"}

    def test_another_key_signs_it_all_anew(self, story, tmp_path):
        """The forger's log even names his key; to whoever trusts ours nothing is signed."""
        thief = SigningKey("gpu7", bytes(range(32)))
        run_dir = forge(story.copy(tmp_path / "run"), 250, key=thief)
        told = verify(run_dir, keys=[str(story.vkey)])
        assert (told.status, told.authorship) == ("unanchored", "unproven: no checkpoint of this log is signed by gpu7")
        assert verify(run_dir, keys=[str(story.vkey)], anchors=story.anchors).status == "replaced"

    def test_a_note_that_claims_our_key_is_tamper(self, story, tmp_path):
        run_dir = story.copy(tmp_path / "run")
        path = notes.stored(read.stream_dir(run_dir))[0][1]
        text = path.read_text()
        path.write_text(text.replace(text[-10:-4], "AAAAAA"))
        told = verify(run_dir, keys=[str(story.vkey)])
        assert told.status == "tamper"
        assert "has a signature of gpu7 that the key did not make" in told.findings[0]

    def test_a_restored_snapshot_that_wrote_on(self, story, tmp_path, monkeypatch):
        """The run goes on from a backup of record 300, honestly signed; the anchor of before remembers more."""
        run_dir = story.copy(tmp_path / "run")
        put(run_dir, lines_of(run_dir)[:300])
        for size, path in notes.stored(read.stream_dir(run_dir)):
            if size > 300:
                path.unlink()
        monkeypatch.setenv("LOOPGUARD_LOG_KEY", str(story.home / "keys" / "log.key"))
        write(run_dir, 400, [], text="another history")
        unproven = "unanchored"
        assert story.judged(run_dir) == {"nothing": unproven, "key": unproven, "anchor": "replaced", "both": "fork"}


class TestKeysInForce:
    """A key counts for the records during which the log names it."""

    def run(self, tmp_path, monkeypatch, *, second: bool):
        run_dir, vkeys = tmp_path / "run", []
        for name in ("old", "new")[: 1 + second]:
            path, vkey = keygen(name, folder=tmp_path / name)
            monkeypatch.setenv("LOOPGUARD_LOG_KEY", str(path))
            plain_log(run_dir, notes=5)
            vkeys.append(str(vkey))
        return run_dir, vkeys, SigningKey.parse((tmp_path / "old" / "log.key").read_text(), place="here")

    def test_after_a_change_both_keys_are_needed_for_all_of_it(self, tmp_path, monkeypatch):
        run_dir, (old, new), _ = self.run(tmp_path, monkeypatch, second=True)
        assert verify(run_dir, keys=[old]).authorship == "records 1-6 are signed by old; what follows is not"
        assert verify(run_dir, keys=[new]).authorship == "records 1-12 are signed by new"
        assert verify(run_dir, keys=[old, new]).authorship == "records 1-12 are signed by old, new"

    def test_a_key_that_was_given_up_signs_nothing_that_came_later(self, tmp_path, monkeypatch):
        run_dir, (old, _), key = self.run(tmp_path, monkeypatch, second=True)
        forge(run_dir, 9, key=key)
        told = verify(run_dir, keys=[old])
        assert told.authorship == "records 1-6 are signed by old; what follows is not"
        assert any("which was not the key of the log then: it proves nothing" in text for text in told.notes)

    def test_a_signature_up_to_the_middle_is_not_enough_for_ok(self, tmp_path, monkeypatch):
        """The head is anchored, and who wrote the end is not known."""
        run_dir, vkeys, _ = self.run(tmp_path, monkeypatch, second=False)
        monkeypatch.setenv("LOOPGUARD_LOG_KEY", "")
        plain_log(run_dir, notes=5)
        head = str(verify(run_dir).head)
        assert verify(run_dir, expect_head=head).status == "ok"
        assert verify(run_dir, expect_head=head, keys=vkeys).status == "unanchored"


class TestAnchorsOfOthers:
    def test_of_another_run_alone_they_are_refused(self, story, tmp_path):
        """Whoever names the wrong file is told, instead of being shown a log that nothing was held against."""
        plain_log(tmp_path / "other", run_id="run-b")
        with pytest.raises(UsageError, match="holds nothing of run-b/controller, only of run-a/controller"):
            verify(tmp_path / "other", anchors=story.anchors)

    def test_with_a_key_an_unsigned_one_proves_nothing(self, story, tmp_path):
        _, path = notes.stored(read.stream_dir(story.run_dir))[-1]
        kept = tmp_path / "kept.note"
        kept.write_text(notes.Note.parse(path.read_text()).checkpoint.text())
        assert verify(story.run_dir, anchors=[kept]).status == "ok"
        told = verify(story.run_dir, keys=[str(story.vkey)], anchors=[kept])
        assert told.status == "unanchored"
        assert told.anchors == []
        assert f"{kept} is not signed by a key that is trusted: it proves nothing" in told.notes

    def test_with_a_key_one_with_a_forged_signature_is_refused(self, story, tmp_path):
        text = notes.stored(read.stream_dir(story.run_dir))[-1][1].read_text()
        kept = tmp_path / "kept.note"
        kept.write_text(text.replace(text[-10:-4], "AAAAAA"))
        with pytest.raises(UsageError, match="it is forged or damaged"):
            verify(story.run_dir, keys=[str(story.vkey)], anchors=[kept])

    def test_a_hash_that_is_nowhere_is_seen_beside_an_anchor_that_is_right(self, story):
        told = verify(story.run_dir, expect_head="f" * 64, anchors=story.anchors)
        assert told.status == "truncated"


class TestOtherStreams:
    """One verified stream proves all of them, up to where it last said that they stood."""

    def test_a_stream_that_was_taken_away(self, story, tmp_path):
        run_dir = story.copy(tmp_path / "run")
        shutil.rmtree(run_dir / "audit" / "rank-1")
        assert story.judged(run_dir) == all_the_same("missing")
        assert "stream rank-1 had 121 records, and is not there" in verify(run_dir).findings[0]

    def test_a_stream_that_was_cut(self, story, tmp_path):
        run_dir = story.copy(tmp_path / "run")
        put(run_dir, lines_of(run_dir, "rank-1")[:110], "rank-1")
        forget_checkpoints(run_dir, "rank-1")
        assert story.judged(run_dir) == all_the_same("truncated")

    def test_a_stream_that_was_written_anew(self, story, tmp_path):
        run_dir = forge(story.copy(tmp_path / "run"), 50, key=story.key, stream="rank-1")
        assert story.judged(run_dir) == all_the_same("replaced")

    def test_a_stream_that_was_edited(self, story, tmp_path):
        run_dir = story.copy(tmp_path / "run")
        lines = lines_of(run_dir, "rank-1")
        put(run_dir, [*lines[:50], lines[50].replace(b"rank", b"rink"), *lines[51:]], "rank-1")
        assert story.judged(run_dir) == all_the_same("tamper")

    def test_a_stream_of_another_rank_in_its_place(self, story, tmp_path):
        run_dir = story.copy(tmp_path / "run")
        (run_dir / "audit/rank-1").rename(run_dir / "audit/rank-2")
        assert story.judged(run_dir)["nothing"] in {"splice", "missing"}

    def test_records_behind_the_last_word_are_unproven(self, story, tmp_path):
        """The rank ended last: its tail could be cut, and the result says from where."""
        run_dir = story.copy(tmp_path / "run")
        plain_log(run_dir, notes=4, stream="rank-1")
        assert story.judged(run_dir)["both"] == "unanchored"
        told = verify(run_dir, anchors=story.anchors)
        assert told.notes[0] == "stream rank-1: records 1-151 are anchored; what follows is not proven against a cut"

    def test_a_stream_that_nothing_commits_to_is_named(self, story, tmp_path):
        run_dir = story.copy(tmp_path / "run")
        plain_log(run_dir, stream="rank-7")
        told = verify(run_dir, anchors=story.anchors)
        assert told.status == "unanchored"
        assert "stream rank-7: nothing commits to it, so that it could be cut or replaced unseen" in told.notes

    def test_a_stream_that_went_back_is_a_fork(self, tmp_path):
        """A copy of the rank's stream of before was put in its place and written to."""
        run_dir = tmp_path / "run"
        plain_log(run_dir, notes=10, stream="rank-1")
        open_log(run_dir).close()
        put(run_dir, lines_of(run_dir, "rank-1")[:5], "rank-1")
        forget_checkpoints(run_dir, "rank-1")
        open_log(run_dir).close()
        plain_log(run_dir, notes=10, stream="rank-1")
        assert verify(run_dir).status in {"fork", "replaced"}

    @pytest.mark.parametrize(
        "streams",
        [
            {"../../etc": {"seq": 1, "hash": "0" * 64}},
            {"rank-1": {"seq": 0, "hash": "0" * 64}},
            {"rank-1": {"seq": 1}},
            {"rank-1": "x"},
            {"controller": {"seq": 1, "hash": "0" * 64}},
        ],
    )
    def test_a_commitment_that_is_none_is_a_finding(self, tmp_path, streams):
        """And never leads anywhere but to a stream of this run."""
        with open_log(tmp_path / "run") as log:
            log.append("streams.committed", {"streams": streams})
        told = verify(tmp_path / "run")
        assert told.status == "protocol"
        assert "is no head" in told.findings[0]

    def test_streams_that_are_being_written_verify(self, tmp_path):
        """Beside living writers nothing is taken for an attack, in whatever order files are read."""
        small = {"segment_bytes": 4000, "checkpoint_every": 5}
        with open_log(tmp_path / "run", stream="rank-1", **small) as rank, open_log(tmp_path / "run", **small) as log:
            stop = threading.Event()

            def work(one):
                while not stop.is_set():
                    one.append("note.added", {"text": "x"}, sync=False)

            threads = [threading.Thread(target=work, args=(one,)) for one in (rank, log)]
            for thread in threads:
                thread.start()
            try:
                found = [verify(tmp_path / "run").findings for _ in range(12)]
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            assert found == [[]] * 12


def test_verifying_reads_each_stream_once(story, monkeypatch):
    """However many checkpoints and commitments there are."""
    seen = []
    real = read.raw_lines
    monkeypatch.setattr(read, "raw_lines", lambda path: (seen.append(path), real(path))[1])
    verify(story.run_dir, keys=[str(story.vkey)], anchors=story.anchors)
    assert sorted(seen) == sorted([*read.segments(story.run_dir), *read.segments(story.run_dir, "rank-1")])
