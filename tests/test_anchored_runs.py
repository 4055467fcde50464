"""A guarded run keeps checkpoints of its log where its policy says, and freezes where it must and cannot."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="attach needs torch")

from lab import POLICY, Lab

from loopguard.audit import anchors, notes, read
from loopguard.audit.keys import keygen
from loopguard.audit.verify import verify
from loopguard.errors import LoopFrozen, UsageError
from loopguard.state import standing


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def under(lab, audit: str) -> None:
    """Give the lab's policy an `audit` section."""
    lab.policy.write_text(f"{POLICY}audit: {audit}\n")


def test_a_finished_run_verifies_against_what_it_kept_and_signed(lab, tmp_path, monkeypatch):
    """The policy file and one key are all that it takes for `ok`."""
    path, vkey = keygen("gpu7", folder=tmp_path / "keys")
    monkeypatch.setenv("LOOPGUARD_LOG_KEY", str(path))
    kept = tmp_path / "anchors.jsonl"
    under(lab, f"{{checkpoint_every: 5, anchors: [{{kind: file, path: {kept}, required: true}}]}}")
    with lab.build(lab.open()) as guard:
        lab.run(guard, cycles=2)
    told = verify(lab.run_dir, keys=[str(vkey)], anchors=[kept])
    assert (told.status, told.findings) == ("ok", [])
    assert told.authorship.endswith("are signed by gpu7")
    sizes = [size for size, _ in notes.stored(read.stream_dir(lab.run_dir))]
    assert [one.note.checkpoint.size for one in anchors.read(kept, run_dir=lab.run_dir)] == sizes
    assert len(sizes) > 3


def test_a_freeze_is_kept_before_the_loop_hears_of_it(lab, tmp_path):
    """Whoever stops a loop for what it froze on finds the freeze elsewhere."""
    kept = tmp_path / "anchors.jsonl"
    under(lab, f"{{anchors: [{{kind: file, path: {kept}}}]}}")
    guard = lab.build(lab.open())
    with pytest.raises(LoopFrozen):
        for cycle in guard.cycles(1):
            lab.update(cycle, factor=float("nan"))
    (last, *_) = lab.events("freeze.entered")
    assert anchors.read(kept, run_dir=lab.run_dir)[-1].note.checkpoint.size >= last.seq
    guard.close(finished=False)


def test_an_anchor_that_fails_is_recorded_and_the_run_goes_on(lab, tmp_path):
    under(lab, f"{{checkpoint_every: 5, anchors: [{{kind: file, path: {tmp_path}/missing/x}}]}}")
    with lab.build(lab.open()) as guard:
        lab.run(guard, cycles=1)
    assert lab.events("anchor.failed")
    assert lab.events("run.finished")
    assert not standing(lab.run_dir).frozen


def test_a_required_anchor_that_fails_freezes_at_the_next_gate(lab, tmp_path):
    """The reason says which one and why, in the exception and in the log; a restart does not thaw it."""
    place = tmp_path / "missing" / "anchors.jsonl"
    under(lab, f"{{checkpoint_every: 5, anchors: [{{kind: file, path: {place}, required: true}}]}}")
    why = f"the anchor file {place}, which the guard policy requires, failed: No such file or directory"
    guard = lab.build(lab.open())
    with pytest.raises(LoopFrozen, match=why):
        lab.run(guard, cycles=1)
    guard.close(finished=False)
    assert [entry.body["reason"] for entry in lab.events("freeze.entered")] == [why]
    assert standing(lab.run_dir).frozen
    with pytest.raises(LoopFrozen):
        lab.run(lab.build(lab.open()), cycles=1)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("{kind: file, path: /dev/full, required: true}", "No space left on device"),
        ("{kind: file, path: FOLDER, required: true}", "Is a directory"),
        ("{kind: git, repository: FOLDER, required: true}", "not a git repository"),
    ],
)
def test_whatever_is_wrong_with_a_required_place_freezes(lab, tmp_path, place, why):
    (tmp_path / "folder").mkdir()
    under(lab, f"{{checkpoint_every: 5, anchors: [{place.replace('FOLDER', str(tmp_path / 'folder'))}]}}")
    guard = lab.build(lab.open())
    with pytest.raises(LoopFrozen, match=why):
        lab.run(guard, cycles=1)
    guard.close(finished=False)
    assert standing(lab.run_dir).frozen


def test_a_log_key_that_cannot_be_used_leaves_no_run_behind(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPGUARD_LOG_KEY", str(tmp_path / "none.key"))
    with pytest.raises(UsageError, match="which is not there"):
        lab.open()
    assert not lab.run_dir.exists()


def test_one_that_fails_at_the_end_keeps_the_next_start_frozen(lab, tmp_path):
    """There was no gate left to freeze at."""
    place = tmp_path / "missing" / "anchors.jsonl"
    under(lab, f"{{anchors: [{{kind: file, path: {place}, required: true}}]}}")
    with lab.build(lab.open()) as guard:
        lab.run(guard, cycles=1)
    stands = standing(lab.run_dir)
    assert stands.frozen
    assert "which the guard policy requires, failed" in stands.reason


def test_an_anchor_in_the_run_directory_is_refused_before_anything_runs(lab):
    under(lab, f"{{anchors: [{{kind: file, path: {lab.run_dir}/anchors.jsonl}}]}}")
    with pytest.raises(UsageError, match="lies in the run directory"):
        lab.open()
    assert not lab.run_dir.exists()
