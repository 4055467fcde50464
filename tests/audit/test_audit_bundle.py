"""The bundle: everything that an auditor needs, nothing else, and the same bytes for the same run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
from audit_stories import frozen_twice, open_log, plain_log
from typer.testing import CliRunner

from loopguard.audit import blobs, keys, read
from loopguard.audit.anchors import Anchor
from loopguard.audit.bundle import STANDALONE, bundle
from loopguard.audit.verify import verify
from loopguard.cli.audit import app
from loopguard.errors import UsageError

TOP = "loopguard-bundle"


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("bundle") / "calc"
    frozen_twice(run_dir, updates=16, calls=6)
    return run_dir


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """A run whose checkpoints are signed and kept elsewhere: (run directory, vkey file, anchors file)."""
    path, _ = keys.keygen("gpu7", folder=tmp_path / "keys")
    monkeypatch.setenv(keys.VARIABLE, str(path))
    kept = Anchor(kind="file", place=str(tmp_path / "anchors.jsonl"))
    plain_log(tmp_path / "run", notes=20, anchors=[kept])
    plain_log(tmp_path / "other", notes=3, run_id="run-b", anchors=[kept])
    return tmp_path / "run", tmp_path / "keys" / keys.VKEY_FILE, tmp_path / "anchors.jsonl"


def unpacked(file, folder):
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    return folder / TOP


class TestWhatIsInIt:
    def test_the_evidence_is_there_byte_for_byte(self, story, tmp_path):
        """Log, checkpoints and guard policies; no lock, no reserve, nothing but what can be checked."""
        bundle(story, out=tmp_path / "out.tar.gz")
        run = unpacked(tmp_path / "out.tar.gz", tmp_path) / "run"
        names = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
        assert all((run / name).read_bytes() == (story / name).read_bytes() for name in names)
        left = {path.relative_to(story) for path in story.rglob("*") if path.is_file()} - names
        assert {path.name for path in left} <= {"lock", "reserve.bin", "report.html"}
        assert verify(run).code == verify(story).code == 20

    def test_data_and_weights_stay_where_they_are(self, story, tmp_path):
        run_dir = tmp_path / "run"
        shutil.copytree(story, run_dir)
        for folder in ("quarantine", "snapshots", "freezes/f1", "requests"):
            (run_dir / folder).mkdir(parents=True)
            (run_dir / folder / "secret.json").write_text("secret")
        packed = bundle(run_dir, out=tmp_path / "out.tar.gz")
        assert not [name for name in packed.names if "secret" in name]

    def test_every_stream_is_there(self, tmp_path):
        with open_log(tmp_path / "run") as log, open_log(tmp_path / "run", stream="rank-1") as other:
            other.append("note.added", {"by": "dana", "text": "x"})
            log.append("note.added", {"by": "dana", "text": "y"})
        packed = bundle(tmp_path / "run", out=tmp_path / "out.tar.gz")
        assert "run/audit/rank-1/seg-000000000001.jsonl" in packed.names
        run = unpacked(tmp_path / "out.tar.gz", tmp_path) / "run"
        assert verify(run).code == verify(tmp_path / "run").code

    def test_keys_and_anchors_are_packed_and_prove_the_same(self, signed, tmp_path):
        """With what lies in the bundle it verifies as it did at home. Of other runs it says nothing."""
        run_dir, vkey, anchors = signed
        packed = bundle(run_dir, out=tmp_path / "out.tar.gz", keys=[str(vkey)], anchors=[anchors])
        assert packed.verification.code == 0
        home = unpacked(tmp_path / "out.tar.gz", tmp_path / "at the auditor's")
        again = verify(home / "run", keys=[str(home / "keys" / "1.vkey")], anchors=[home / "anchors"])
        assert (again.code, again.authorship) == (0, packed.verification.authorship)
        assert "run-b" not in (home / "anchors" / "1.jsonl").read_text()

    def test_the_readme_says_how_to_check_it_and_what_was_found(self, signed, tmp_path):
        run_dir, vkey, anchors = signed
        bundle(run_dir, out=tmp_path / "bare.tar.gz")
        bundle(run_dir, out=tmp_path / "full.tar.gz", keys=[str(vkey)], anchors=[anchors])
        bare = (unpacked(tmp_path / "bare.tar.gz", tmp_path / "bare") / "README.txt").read_text()
        full = (unpacked(tmp_path / "full.tar.gz", tmp_path / "full") / "README.txt").read_text()
        assert "LoopGuard found unanchored (20)" in bare
        assert "run --key keys/1.vkey --anchors anchors\n" in full
        assert "LoopGuard found ok (0)" in full

    def test_an_altered_log_is_packed_as_it_is_and_called_altered(self, story, tmp_path):
        """Evidence of tampering is evidence, too."""
        run_dir = tmp_path / "run"
        shutil.copytree(story, run_dir)
        path = read.segments(run_dir)[0]
        path.write_bytes(path.read_bytes().replace(b"label", b"lebal", 1))
        packed = bundle(run_dir, out=tmp_path / "out.tar.gz")
        home = unpacked(tmp_path / "out.tar.gz", tmp_path)
        facts = json.loads((home / "verification.json").read_text())
        assert (packed.verification.code, facts["code"], facts["status"]) == (30, 30, "tamper")
        assert facts["findings"][0].startswith("audit/controller/seg-000000000001.jsonl:")
        assert (home / "run" / path.relative_to(run_dir)).read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("line", [0, -1])
    def test_a_log_whose_ends_are_altered_is_packed_too(self, story, tmp_path, line):
        run_dir = tmp_path / "run"
        shutil.copytree(story, run_dir)
        (run_dir / "run.json").unlink()
        path = read.segments(run_dir)[0]
        lines = path.read_bytes().splitlines(keepends=True)
        lines[line] = b"{}\n"
        path.write_bytes(b"".join(lines))
        assert bundle(run_dir, out=tmp_path / "out.tar.gz").verification.code == verify(run_dir).code >= 30

    def test_the_standalone_verifier_in_it_agrees(self, signed, tmp_path):
        """As the README says it, in a process that knows no LoopGuard."""
        if not STANDALONE.exists():
            pytest.skip(f"there is no {STANDALONE.name} to pack yet")
        run_dir, vkey, anchors = signed
        bundle(run_dir, out=tmp_path / "out.tar.gz", keys=[str(vkey)], anchors=[anchors])
        home = unpacked(tmp_path / "out.tar.gz", tmp_path / "at the auditor's")
        (command,) = [
            line.split() for line in (home / "README.txt").read_text().splitlines() if line.startswith("    python3 ")
        ]
        # Without the package on its path: -P leaves the folder of the script out, -I everything of the environment.
        done = subprocess.run(
            [sys.executable, "-I", *command[1:]], cwd=home, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "loopguard.audit" not in STANDALONE.read_text().replace("`loopguard audit", "")

    def test_the_standalone_verifier_is_told_that_payloads_were_left_out(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            (told,) = blobs.keep(read.stream_dir(tmp_path / "run"), [b"print(1)"])
            log.append("tool.decided", {"call": "c1", "result": "deny", "code": told})
        bundle(tmp_path / "run", out=tmp_path / "out.tar.gz", without_payloads=True)
        home = unpacked(tmp_path / "out.tar.gz", tmp_path / "at the auditor's")
        (command,) = [
            line.split() for line in (home / "README.txt").read_text().splitlines() if line.startswith("    python3 ")
        ]
        codes = [
            subprocess.run([sys.executable, "-I", *words], cwd=home, capture_output=True, check=False).returncode
            for words in (command[1:], command[1:-1])
        ]
        assert (command[-1], codes) == ("--without-payloads", [20, 42])


class TestBytes:
    def test_the_same_run_gives_the_same_bytes_wherever_and_whenever(self, story, tmp_path):
        first = tmp_path / "first.tar.gz"
        bundle(story, out=first)
        shutil.copytree(story, tmp_path / "elsewhere" / "copy")
        later = time.time() + 100_000
        for path in (tmp_path / "elsewhere").rglob("*"):
            os.utime(path, (later, later))
            path.chmod(0o700)
        second = tmp_path / "elsewhere" / "second.tar.gz"
        bundle(tmp_path / "elsewhere" / "copy", out=second)
        assert first.read_bytes() == second.read_bytes()

    def test_members_say_nothing_of_who_packed_them(self, story, tmp_path):
        bundle(story, out=tmp_path / "out.tar.gz")
        with tarfile.open(tmp_path / "out.tar.gz") as tar:
            members = tar.getmembers()
        assert {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in members} == {
            (0, 0, 0, "", "", 0o644)
        }
        assert all(one.isfile() and one.name.startswith(f"{TOP}/") and ".." not in one.name for one in members)


class TestRefusals:
    def test_nothing_is_written_into_the_run(self, story):
        with pytest.raises(UsageError, match="lies in the run directory"):
            bundle(story, out=story / "out.tar.gz")

    def test_a_folder_without_a_log_is_a_usage_error(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match="holds no audit log"):
            bundle(tmp_path / "empty", out=tmp_path / "out.tar.gz")

    @pytest.mark.parametrize("where", ["policy/x.yaml", "audit/controller/checkpoints/9.note", "state.json"])
    def test_a_link_brings_nothing_in(self, story, tmp_path, where):
        """Whoever can write to a run directory must not get files of whoever packs it into the bundle."""
        run_dir = tmp_path / "run"
        shutil.copytree(story, run_dir)
        (tmp_path / "secret").write_text("secret")
        (run_dir / where).symlink_to(tmp_path / "secret")
        with pytest.raises(UsageError, match="is a link"):
            bundle(run_dir, out=tmp_path / "out.tar.gz")
        assert not (tmp_path / "out.tar.gz").exists()


def test_of_a_living_run_it_holds_whole_lines(tmp_path):
    """What is being written while it is packed is left out, so that nobody is accused of a cut line."""
    with open_log(tmp_path / "run") as log:
        log.append("note.added", {"by": "dana", "text": "x"})
        path = read.segments(tmp_path / "run")[0]
        with path.open("ab") as file:
            file.write(b'{"actor":{"id":"loop')  # the writer is between two pages
        result = CliRunner().invoke(
            app, ["bundle", str(tmp_path / "run"), "--out", str(tmp_path / "out.tar.gz")], catch_exceptions=False
        )
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    assert result.exit_code == 0
    assert "is being written: the bundle holds it up to now" in result.stderr
    run = unpacked(tmp_path / "out.tar.gz", tmp_path) / "run"
    assert read.segments(run)[0].read_bytes().endswith(b"\n")
    assert verify(run).code == 20


def test_the_command_prints_what_the_check_found(story, tmp_path):
    out = tmp_path / "out.tar.gz"
    result = CliRunner().invoke(app, ["bundle", str(story), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{out}: ")
    assert "unanchored (20)" in result.stdout
