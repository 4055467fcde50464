"""`loopguard run toolformer` as a person meets it: wrong words, a killed process, a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopguard.audit import read
from loopguard.audit.verify import verify
from loopguard.cli.app import _main
from loopguard.state import standing

pytestmark = pytest.mark.train

SHIPPED = Path(__file__).parent.parent.parent / "policies" / "toolformer.yaml"
LINE = json.dumps({"question": "q", "answer": "He has 2+3=<<2+3=5>>5 apples.\n#### 5"}) + "\n"


def command(*words):
    return [sys.executable, "-m", "loopguard.cli", *map(str, words)]


def run(*words, timeout_s=300):
    return subprocess.run(
        command("run", "toolformer", *words),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def one_line(text):
    """What was said, where it was one line and no traceback."""
    (line,) = text.strip().splitlines()
    return line


class TestWrongWords:
    """One clear line, the exit code of the table, and nothing half-written."""

    @pytest.fixture
    def run_here(self, tmp_path, capsys):
        """The same command in this process, which has loaded torch already: code and what was said."""

        def run_here(*words):
            code = _main(["run", "toolformer", "--run-dir", str(tmp_path / "run"), *map(str, words)])
            assert not (tmp_path / "run").exists()
            return code, capsys.readouterr().err

        return run_here

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--plant", "nna@2"], "Did you mean 'nan@2'?"),
            (["--plant", "nan"], "expected FAULT@CYCLE"),
            (["--plant", "nan@9", "--cycles", "2"], "--plant nan@9"),
            (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ],
    )
    def test_options(self, run_here, words, said):
        code, err = run_here(*words)
        assert code == 2
        assert said in one_line(err)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "data.jsonl"),
            (LINE + "{nope\n", "data.jsonl:2"),
            (LINE + '{"question": "q"}\n', "data.jsonl:2"),
        ],
    )
    def test_data_files_name_the_line(self, run_here, tmp_path, text, said):
        (tmp_path / "data.jsonl").write_text(text)
        (tmp_path / "test.jsonl").write_text(LINE * 50)
        code, err = run_here("--data", tmp_path / "data.jsonl")
        assert code == 2
        assert said in one_line(err)

    def test_a_policy_that_allows_nothing(self, run_here, tmp_path):
        policy = tmp_path / "policy.yaml"
        policy.write_text(SHIPPED.read_text().replace("then: run", "then: deny"))
        code, err = run_here("--policy", policy)
        assert code == 3
        assert f"{policy}:" in err

    def test_no_docker_engine(self, run_here, monkeypatch):
        monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
        code, err = run_here()
        assert code == 5
        assert "no Docker engine answers at unix:///nowhere/docker.sock" in one_line(err)

    @pytest.mark.docker
    def test_a_missing_image(self, run_here, tmp_path):
        policy = tmp_path / "policy.yaml"
        policy.write_text(SHIPPED.read_text().replace("loopguard/python:1", "loopguard/missing:7"))
        code, err = run_here("--policy", policy)
        assert code == 5
        assert "loopguard/missing:7" in one_line(err)


def start(run_dir, *words):
    return subprocess.Popen(
        command("run", "toolformer", "--run-dir", run_dir, "--cycles", "1", *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Under a script that runs in the background an interrupt is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def count(run_dir, kind):
    if not any((run_dir / "audit" / "controller").glob("seg-*")):
        return 0
    return sum(1 for _ in read.entries(run_dir, types=[kind]))


def wait_for(process, run_dir, kind, *, more=1, timeout_s=200):
    """Until the log has so many more records of a type than now."""
    enough = count(run_dir, kind) + more
    deadline = time.monotonic() + timeout_s
    while count(run_dir, kind) < enough:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no {kind} within {timeout_s} s"
        time.sleep(0.05)


def pointer(run_dir):
    return json.loads((run_dir / "snapshots" / "promoted.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = run("--run-dir", run_dir, "--cycles", "1")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.docker
class TestARunningLoop:
    def test_killed_again_and_again_it_comes_out_the_same_to_the_bit(self, whole, tmp_path):
        """kill -9 in the warm-up, right after a promotion, among tool calls, and among the updates of a cycle."""
        run_dir = tmp_path / "run"
        for kind, more in (
            ("update.leased", 1),
            ("promotion.applied", 1),
            ("tool.finished", 200),
            ("update.leased", 1),
        ):
            process = start(run_dir)
            wait_for(process, run_dir, kind, more=more)
            process.kill()
            process.communicate()
        done = run("--run-dir", run_dir, "--cycles", "1")
        assert done.returncode == 0, done.stderr
        assert "was not finished" in done.stderr
        assert pointer(run_dir)["snapshot"] == pointer(whole)["snapshot"]
        assert verify(run_dir).code in {10, 20}

    def test_a_finished_run_is_left_as_it_is(self, whole):
        before = pointer(whole)
        done = run("--run-dir", whole, "--cycles", "1")
        assert done.returncode == 0
        assert "report:" in done.stdout
        assert pointer(whole) == before

    def test_two_at_once(self, tmp_path):
        process = start(tmp_path / "run")
        try:
            wait_for(process, tmp_path / "run", "cycle.started")
            done = run("--run-dir", tmp_path / "run", "--cycles", "1")
            assert done.returncode == 7
            assert f"in use by process {process.pid}" in one_line(done.stderr)
        finally:
            process.kill()
            process.communicate()

    def test_ctrl_c_ends_with_130_and_leaves_a_resumable_run(self, tmp_path):
        process = start(tmp_path / "run")
        wait_for(process, tmp_path / "run", "tool.finished")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "Traceback" not in said
        assert [e.type for e in read.entries(tmp_path / "run")][-1] in {"run.interrupted", "sandbox.removed"}
        assert verify(tmp_path / "run").code == 20

    def test_another_policy_names_the_way_to_adopt_it(self, whole, tmp_path):
        policy = tmp_path / "policy.yaml"
        policy.write_text(SHIPPED.read_text().replace("max_code_bytes: 400", "max_code_bytes: 300"))
        done = run("--run-dir", whole, "--cycles", "1", "--policy", policy)
        assert done.returncode == 3
        assert "--adopt-policy" in one_line(done.stderr)

    def test_an_edited_log_is_refused(self, whole, tmp_path):
        copy = tmp_path / "run"
        shutil.copytree(whole, copy)
        segment = next((copy / "audit" / "controller").glob("seg-*.jsonl"))
        segment.write_bytes(segment.read_bytes().replace(b'"result":"promoted"', b'"result":"rejected"', 1))
        done = run("--run-dir", copy, "--cycles", "2")
        assert done.returncode == 6
        assert "audit" in one_line(done.stderr)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
    def test_a_full_disk_stops_the_loop_frozen(self, tmp_path):
        """No record, no action: the last thing on the disk is a freeze."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk], check=False)
        if mounted.returncode:
            pytest.skip("cannot mount a tmpfs here")
        try:
            (disk / "ballast").write_bytes(b"x" * (2 << 20))
            done = run("--run-dir", disk / "run", "--cycles", "3")
            assert done.returncode == 6, done.stderr
            assert "Traceback" not in done.stderr
            assert "No space left on device" in done.stderr.strip().splitlines()[-1]
            assert verify(disk / "run").code in {10, 20}, "what was written before is whole"
            (disk / "ballast").unlink()
            stands = standing(disk / "run")
            assert stands.frozen == (disk / "run" / "latch").exists()
        finally:
            subprocess.run(["umount", disk], check=True)


def test_without_the_train_extra_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    import loopguard.cli.run

    monkeypatch.setattr(loopguard.cli.run, "find_spec", lambda name: None if name == "torch" else object())
    assert _main(["demo", "--runs", str(tmp_path)]) == 2
    assert "pip install 'loopguard[train]'" in capsys.readouterr().err
