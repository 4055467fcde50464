"""`loopguard sandbox` as a person meets it: try a cell, look at one, measure it, sweep up."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from loopguard.cli.app import _main
from loopguard.sandbox.base import shipped

DEFAULT = shipped("setup.sh").parent.parent / "policies" / "default.yaml"
PROFILE = "    offline:\n      image: loopguard/python:1\n"
SECOND = "    other:\n      image: loopguard/python:1\n      mode: fresh\n      limits: {wall: 1s}\n"


def loopguard(*words):
    return _main(["sandbox", *map(str, words)])


def process(*words, **options):
    """The same command as a process of its own."""
    command = [sys.executable, "-m", "loopguard.cli", "sandbox", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def left_behind(pid):
    """Cells of a command that has ended."""
    from loopguard.sandbox.docker import RUN, containers

    return [each["Names"] for each in containers() if each["Labels"].get(RUN) == f"cli-{pid}"]


@pytest.fixture
def policy(tmp_path):
    """A policy with two sandbox profiles; the second one ends calls after a second."""
    text = DEFAULT.read_text()
    assert PROFILE in text
    path = tmp_path / "policy.yaml"
    path.write_text(
        text.replace(PROFILE, SECOND + PROFILE).replace(
            "sandbox: offline\n      max_code_bytes: 4096", "sandbox: other"
        )
    )
    return path


@pytest.fixture
def said(capsys):
    """What was said on standard error, where it was one line and nothing was printed."""

    def said():
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.strip().splitlines()
        return line

    return said


class TestWrongWords:
    """One clear line and the exit code of the table. No engine is asked for anything."""

    @pytest.fixture(autouse=True)
    def nowhere(self, monkeypatch):
        monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")

    @pytest.mark.parametrize("words", [["exec", "1"], ["inspect"], ["bench"], ["reap"]])
    def test_no_engine(self, said, words):
        """What is missing, where it was looked for, and what to do."""
        assert loopguard(*words) == 5
        assert "no Docker engine answers at unix:///nowhere" in (line := said())
        assert "loopguard sandbox build" in line

    def test_out_without_fetch_and_the_other_way_round(self, said, tmp_path):
        for words in (["--fetch", "a"], ["--out", tmp_path / "out"]):
            assert loopguard("exec", "1", *words) == 2
            assert "--fetch and --out belong together" in said()
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("kind", ["folder with a file", "file", "link to a folder with a file"])
    def test_an_out_that_is_no_empty_folder(self, said, tmp_path, kind):
        """It is refused before anything runs, and stays as it was."""
        full, out = tmp_path / "full", tmp_path / "out"
        full.mkdir()
        (full / "thesis.tex").write_text("mine")
        match kind:
            case "file":
                out.write_text("mine")
            case "link to a folder with a file":
                out.symlink_to(full)
            case _:
                out = full
        assert loopguard("exec", "1", "--fetch", "a", "--out", out) == 2
        assert said() == f"loopguard: {out} is not an empty folder: name a new one with --out"
        assert [path.name for path in full.iterdir()] == ["thesis.tex"]

    def test_a_file_that_cannot_be_read(self, said, tmp_path):
        for told, why in (("a", "is not NAME=PATH"), (f"a={tmp_path}/none", "No such file"), (f"a={tmp_path}", "Is a")):
            assert loopguard("exec", "1", "--file", told) == 2
            assert why in (line := said())
            assert f"--file {told}" in line

    @pytest.mark.parametrize("command", [["exec", "1"], ["inspect"], ["bench"]])
    def test_profiles(self, said, policy, command):
        """Of several one has to be named, and it has to be there; the message lists them."""
        assert loopguard(*command, "--policy", policy) == 2
        assert said().endswith("name one with --profile: other, offline")
        assert loopguard(*command, "--policy", policy, "--profile", "elsewhere") == 2
        assert said().endswith("no sandbox profile 'elsewhere'; there are other, offline")

    @pytest.mark.parametrize("command", [["exec", "1"], ["inspect"], ["bench"]])
    def test_a_policy_without_tools(self, said, command):
        """There is no cell to try, and none of another policy is tried in its place."""
        assert loopguard(*command, "--policy", DEFAULT.with_name("supervised.yaml")) == 2
        assert "lets no tool run and describes no cell" in said()

    @pytest.mark.parametrize("command", [["exec", "1"], ["inspect"], ["bench"]])
    def test_a_policy_with_a_mistake(self, said, policy, command):
        policy.write_text(policy.read_text().replace("default: deny", "default: dney"))
        assert loopguard(*command, "--policy", policy) == 3
        assert said().startswith(f"{policy}:")

    def test_a_policy_that_is_not_there(self, said, tmp_path):
        assert loopguard("exec", "1", "--policy", tmp_path / "none.yaml") in {2, 3}
        assert "none.yaml" in said()

    @pytest.mark.parametrize("words", [["exec"], ["bench", "--calls", "0"], ["inspect", "--nonsense"], ["reap", "x"]])
    def test_words_that_nobody_knows(self, capsys, words):
        assert loopguard(*words) == 2
        assert capsys.readouterr().out == ""


@pytest.mark.docker
class TestExec:
    def test_what_the_code_prints_is_what_is_printed(self, capsys):
        """Output to output, errors to errors, nothing added; and no cell is left."""
        assert loopguard("exec", "import sys; print(6 * 7); print('oh', file=sys.stderr)") == 0
        assert capsys.readouterr() == ("42\n", "oh\n")
        assert left_behind(os.getpid()) == []

    @pytest.mark.parametrize(
        ("code", "how"),
        [("raise SystemExit(3)", "exit status 3"), ("import os; os.kill(os.getpid(), 11)", "signal 11")],
    )
    def test_code_that_fails_is_1_and_says_how(self, capsys, code, how):
        assert loopguard("exec", code) == 1
        assert capsys.readouterr() == ("", f"loopguard: the call ended with {how}\n")

    def test_the_profile_that_was_named_is_the_one(self, capsys, policy):
        """Its limits hold; what was printed before the end is shown."""
        code = "print('so far', flush=True)\nwhile True: pass"
        assert loopguard("exec", code, "--policy", policy, "--profile", "other") == 1
        assert capsys.readouterr() == ("so far\n", "loopguard: the call ended with timeout\n")

    def test_code_from_standard_input(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("print('żółw')\n"))
        assert loopguard("exec", "-") == 0
        assert capsys.readouterr().out == "żółw\n"

    def test_other_tools(self, capsys):
        """A shell, and a program with its arguments."""
        assert loopguard("exec", "--tool", "sh", "echo $((6 * 7))") == 0
        assert loopguard("exec", "--tool", "exec", '{"argv": ["printf", "%s,", "a b", "c"]}') == 0
        assert capsys.readouterr().out == "42\na b,c,"

    def test_a_tool_that_no_cell_has_is_5(self, said):
        """The message lists those that there are."""
        assert loopguard("exec", "--tool", "perl", "print 1") == 5
        assert said() == "loopguard: no cell can run the tool 'perl'; there are exec, python, sh"

    def test_an_image_that_is_not_there_is_5(self, said, policy):
        policy.write_text(policy.read_text().replace("loopguard/python:1", "loopguard/missing:7"))
        assert loopguard("exec", "1", "--policy", policy, "--profile", "offline") == 5
        assert "loopguard/missing:7" in said()

    def test_files_go_in_and_come_back(self, capsys, tmp_path):
        """Under the names that they were given, into a folder that is made for them; also when the code failed."""
        (tmp_path / "mine.bin").write_bytes(bytes(range(256)))
        code = "import os\nos.mkdir('new')\nopen('new/copy', 'wb').write(open('d/in', 'rb').read()[::-1])\nexit(3)"
        words = ["--file", f"d/in={tmp_path / 'mine.bin'}", "--fetch", "new", "--fetch", "d/in"]
        assert loopguard("exec", code, *words, "--out", tmp_path / "a" / "out") == 1
        out = tmp_path / "a" / "out"
        assert (out / "new" / "copy").read_bytes() == bytes(reversed(range(256)))
        assert (out / "d" / "in").read_bytes() == bytes(range(256))
        assert capsys.readouterr().err == "loopguard: the call ended with exit status 3\n"

    def test_an_empty_folder_is_taken(self, capsys, tmp_path):
        assert loopguard("exec", "open('a', 'w').write('x')", "--fetch", "a", "--out", tmp_path) == 0
        assert (tmp_path / "a").read_text() == "x"

    def test_what_does_not_come_back_is_named(self, capsys, tmp_path):
        """With the reason; links are not followed, and the code has not failed for that."""
        code = "import os\nos.symlink('/etc/passwd', 'link')"
        words = ["--fetch", "absent", "--fetch", "link", "--out", tmp_path / "out"]
        assert loopguard("exec", code, *words) == 0
        captured = capsys.readouterr()
        assert [line.split(":")[1].split()[0] for line in captured.err.splitlines()] == ["absent", "link"]
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize("words", [["--file", "../x=/etc/hostname"], ["--fetch", "/etc/passwd", "--out", "{out}"]])
    def test_a_name_that_leads_elsewhere_is_5(self, said, tmp_path, words):
        """Nothing runs, and no folder is made."""
        words = [word.format(out=tmp_path / "out") for word in words]
        assert loopguard("exec", "print(1)", *words) == 5
        assert "is no name for a file of a call" in said()
        assert not (tmp_path / "out").exists()

    def test_json_is_the_whole_outcome(self, capsys, tmp_path):
        """One object on one line, on standard output alone, whatever the call came to."""
        code = "import sys\nopen('a', 'w').write('x')\nprint('\\x1b[2J\\udcff')\nsys.stderr.write('oh')\nexit(3)"
        assert loopguard("exec", code, "--fetch", "a", "--fetch", "b", "--out", tmp_path / "out", "--json") == 1
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.isascii()
        assert captured.out.count("\n") == 1
        told = json.loads(captured.out)
        assert told["status"] == "nonzero_exit"
        assert told["files"] == ["a"]
        assert list(told["not_fetched"]) == ["b"]
        assert told.keys() >= {"exit_code", "signal", "stdout", "stderr", "stdout_bytes", "wall_ms", "leftovers"}

    def test_output_is_made_harmless_for_a_terminal(self):
        """Escape sequences, and characters that turn the direction of writing, are shown and not obeyed."""
        screen, terminal = pty.openpty()
        evil = "\x1b[2J\x1b]0;title\x07\x9b31m\u202etxt.exe\x08\r\x7f"
        try:
            command = process("exec", f"print({evil!a}, 'żółw')", stdout=terminal)
            assert command.wait(timeout=60) == 0
            shown = os.read(screen, 65536).decode()
            assert command.stderr.read() == ""
            command.stderr.close()
        finally:
            os.close(screen)
            os.close(terminal)
        assert shown.removesuffix("\r\n").isprintable()
        assert "\\x1b[2J" in shown
        assert "\\u202etxt.exe" in shown
        assert "żółw" in shown

    def test_names_that_the_code_chose_are_harmless_too(self, capsys, tmp_path):
        """Wherever standard error goes."""
        code = "import os\nos.symlink('/', 'l\\x1b[2J\\nloopguard: all is fine')"
        assert loopguard("exec", code, "--fetch", ".", "--out", tmp_path / "out") == 0
        err = capsys.readouterr().err
        assert "\x1b" not in err
        assert "did not come back" in err
        assert len(err.splitlines()) == 1

    def test_a_pipe_gets_what_the_code_wrote(self, capsys):
        """Another program may want it as it is."""
        assert loopguard("exec", "print('\\x1b[1mbold')") == 0
        assert capsys.readouterr().out == "\x1b[1mbold\n"

    def test_an_interrupt_is_130_and_leaves_nothing(self):
        """Ctrl-C while a call runs: no traceback, and the cell is gone."""
        command = process(
            "exec",
            "import time; time.sleep(60)",
            stdout=subprocess.DEVNULL,
            # Under a script that runs in the background an interrupt is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 30
            while not left_behind(command.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1)
            command.send_signal(signal.SIGINT)
            _, err = command.communicate(timeout=30)
        finally:
            command.kill()
        assert command.returncode == 130
        assert len(err.splitlines()) <= 1
        assert left_behind(command.pid) == []


@pytest.mark.docker
class TestInspect:
    def test_what_was_applied_is_one_json_object(self, capsys, policy):
        """Of engine and kernel, as the profile asks for it."""
        assert loopguard("inspect", "--policy", policy, "--profile", "offline") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["runtime"] == "runc"
        assert told["image_id"].startswith("sha256:")
        assert told["languages"] == ["exec", "python", "sh"]
        engine, inside = told["settings"]["engine"], told["settings"]["inside"]
        assert engine["NetworkMode"] == "none"
        assert engine["Memory"] == inside["memory"] == 256 << 20
        assert inside["interfaces"] == ["lo"]
        assert left_behind(os.getpid()) == []

    def test_a_cell_that_cannot_be_had_is_5(self, said, policy):
        policy.write_text(policy.read_text().replace("loopguard/python:1", "loopguard/missing:7"))
        assert loopguard("inspect", "--policy", policy, "--profile", "other") == 5
        assert "loopguard/missing:7 is not here" in said()


@pytest.mark.docker
class TestBench:
    def test_json_is_a_row_for_each_measurement(self, capsys):
        assert loopguard("bench", "--calls", "8", "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["tool"], row["clients"]) for row in rows] == [("python", 1), ("sh", 1), ("python", 8)]
        for row in rows:
            assert 0 < row["p50_ms"] <= row["p95_ms"]
            assert row["calls_per_s"] > 0
        assert left_behind(os.getpid()) == []

    def test_a_person_gets_a_table(self, capsys):
        """A heading and the same three rows, in columns."""
        assert loopguard("bench", "--calls", "1") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["tool", "python", "sh", "python"]
        assert len({len(line) for line in lines}) == 1


@pytest.mark.docker
class TestReap:
    @pytest.mark.parametrize("as_json", [True, False])
    def test_a_cell_of_a_dead_loop_is_removed_and_named(self, capsys, as_json):
        """Its owner has ended; a cell of an owner that lives stays."""
        from loopguard.sandbox import owner
        from loopguard.sandbox.docker import DEADLINE, OWNER

        asked = "from loopguard.sandbox import owner; print(owner.me())"
        dead = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
        names = {}
        try:
            for what, whose in (("dead", dead), ("alive", owner.me())):
                names[what] = f"lg-cli-reap-{os.getpid()}-{what}"
                labels = ["--label", f"{OWNER}={whose}", "--label", f"{DEADLINE}=99999999999"]
                create = ["docker", "create", "--network", "none", "--name", names[what], *labels]
                subprocess.run([*create, "loopguard/python:1", "true"], capture_output=True, check=True, timeout=60)
            assert loopguard("reap", *(["--json"] if as_json else [])) == 0
            captured = capsys.readouterr()
            reaped = json.loads(captured.out)["reaped"] if as_json else captured.out.splitlines()
            # Another test may sweep at the same moment.
            assert names["alive"] not in reaped
            assert as_json or captured.err == f"{len(reaped)} cells of dead loops removed\n"
            there = subprocess.run(["docker", "ps", "-a", "--format", "{{.Names}}"], capture_output=True, text=True)
            assert names["alive"] in there.stdout.split()
            assert names["dead"] not in there.stdout.split()
        finally:
            subprocess.run(["docker", "rm", "-f", *names.values()], capture_output=True, check=False, timeout=60)
