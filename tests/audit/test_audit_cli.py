"""The `audit` commands: results on standard output, exit codes from the table."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from audit_stories import HOSTILE, frozen_twice, open_log
from typer.testing import CliRunner

from loopguard.audit import read
from loopguard.cli.app import app as whole_app
from loopguard.cli.app import main
from loopguard.cli.audit import app
from loopguard.errors import LoopFrozen, PolicyError, UsageError

COMMANDS = [
    "show",
    "tail",
    "freezes",
    "cycle",
    "why",
    "stats",
    "erase",
    "verify",
    "prove",
    "report",
    "keygen",
    "export",
    "bundle",
]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("cli") / "calc"
    frozen_twice(run_dir, updates=16, calls=6)
    return run_dir


def run(command: str, run_dir) -> str:
    """Standard output of a command that must end with 0."""
    name, *rest = shlex.split(command)
    result = CliRunner().invoke(app, [name, str(run_dir), *rest], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_sentence_an_example_and_the_exit_codes(command):
    text = CliRunner().invoke(app, [command, "--help"]).output
    assert f"loopguard audit {command} {'gpu7' if command == 'keygen' else 'runs/'}" in text
    assert "Exit codes: 0 " in text


@pytest.mark.parametrize("command", ["show", "tail", "freezes", "cycle", "why", "stats", "report"])
def test_a_folder_without_a_log_is_a_usage_error(command, tmp_path):
    with pytest.raises(UsageError, match="holds no audit log"):
        CliRunner().invoke(app, [command, str(tmp_path)], catch_exceptions=False)


def test_every_command_that_the_page_names_is_one():
    """And the page names every command that reads."""
    page = (Path(__file__).parents[2] / "docs" / "audit-reading.md").read_text(encoding="utf-8")
    named = set(re.findall(r"loopguard audit (\w+)", page))
    assert named <= set(COMMANDS) | {"approvals"}
    assert {*COMMANDS, "approvals"} - named == {"keygen", "prove"}


class TestShow:
    def test_json_is_exactly_what_the_log_holds(self, story):
        """Byte for byte, so that another tool can verify what was piped into it."""
        whole = b"".join(path.read_bytes() for path in read.segments(story))
        assert run("show --json", story).encode() == whole

    def test_picks_by_type_group_and_cycle(self, story):
        assert len(run("show --type freeze", story).splitlines()) == 2
        assert len(run("show --type promotion.applied", story).splitlines()) == 6
        assert "cycle 3" in run("show --type promotion.applied --cycle 3", story)
        assert len(run("show --type promotion.applied --cycle 3", story).splitlines()) == 1

    def test_an_unknown_type_is_refused(self, story):
        with pytest.raises(UsageError, match="--type 'frozen' is no record type; expected a group"):
            CliRunner().invoke(app, ["show", str(story), "--type", "frozen"], catch_exceptions=False)

    def test_each_record_is_one_printable_line(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("note.added", {"by": "dana", "text": HOSTILE, "list": [HOSTILE, "\n"], "long": ["x" * 999]})
        lines = run("show", tmp_path / "run").splitlines()
        assert len(lines) == 2
        assert all(line.isprintable() for line in lines)


@pytest.fixture
def hostile(tmp_path):
    """A run in which all that strangers can say is meant for the terminal of whoever reads it."""
    with open_log(tmp_path / "run") as log:
        log.append("cycle.started", {}, cycle=1)
        body = {"call": HOSTILE, "rule": HOSTILE, "reason": HOSTILE, "code_head": HOSTILE, "result": "deny"}
        log.append("tool.decided", body, cycle=1)
        log.append("tool.finished", {"call": HOSTILE, "status": HOSTILE}, cycle=1)
        log.append("data.quarantined", {"reason": HOSTILE, "count": 2}, cycle=1)
        log.append("eval.finished", {"panel": {HOSTILE: 1.0}}, cycle=1)
        signal = {"metric": HOSTILE, "value": HOSTILE, "low": HOSTILE, "high": None}
        body = {"freeze": HOSTILE, "gate": HOSTILE, "rule": HOSTILE, "reason": HOSTILE, "capsule": HOSTILE}
        log.append("freeze.entered", {**body, "signals": [signal], "restored": HOSTILE}, cycle=1)
        log.append("resume.applied", {"freeze": HOSTILE, "by": HOSTILE, "reason": HOSTILE, "disposition": HOSTILE})
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["show", "tail", "freezes", "cycle", "cycle 1", "why", "stats", "approvals"])
def test_hostile_text_reaches_no_terminal(hostile, command):
    """No escape sequence, no bidirectional character, no line of its own."""
    text = run(command, hostile)
    assert "\\u001b[31m\\u202e\\u2066" in text
    assert text.replace("\n", "").isprintable()
    assert not [line for line in text.splitlines() if line.startswith("# evil")]


@pytest.mark.parametrize("command", ["show", "tail", "freezes", "cycle", "cycle 1", "why", "stats", "approvals"])
def test_hostile_text_reaches_no_terminal_as_json_either(hostile, command):
    """JSON is ASCII, so that a careless `cat` is harmless as well."""
    text = run(f"{command} --json", hostile)
    assert text.isascii()
    assert text.replace("\n", "").isprintable()


def test_hostile_text_of_a_latch_reaches_no_terminal(tmp_path, capsys):
    """`status`, and the line that an error is told in, show what a log or a latch says like every viewer."""
    with open_log(tmp_path / "run") as log:
        log.append("freeze.entered", {"freeze": f"f1; {HOSTILE}", "gate": "data", "reason": HOSTILE})
    shown = CliRunner().invoke(whole_app, ["status", str(tmp_path / "run")], catch_exceptions=False)
    assert shown.exit_code == 4
    with pytest.raises(SystemExit):
        main(["audit", "why", str(tmp_path / "run"), HOSTILE])
    for text in (shown.stdout, capsys.readouterr().err):
        assert "\\u001b[31m\\u202e" in text
        assert text.replace("\n", "").isprintable()
    (command,) = [line for line in shown.stdout.splitlines() if line.startswith("why ")]
    assert len(shlex.split(command)) == 6


@pytest.mark.parametrize("kind", [LoopFrozen, PolicyError])
def test_an_error_that_quotes_a_model_is_told_safely(kind, monkeypatch, capsys):
    def fail(**_words):
        raise kind("f1", HOSTILE) if kind is LoopFrozen else kind([HOSTILE])

    monkeypatch.setattr("loopguard.cli.app.app", fail)
    with pytest.raises(SystemExit):
        main(["status", "x"])
    text = capsys.readouterr().err
    assert "\\u001b[31m\\u202e" in text
    assert text.replace("\n", "").isprintable()


class TestTail:
    def test_prints_so_many_of_the_newest(self, story):
        assert run("tail -n 3", story) == "".join(run("show", story).splitlines(keepends=True)[-3:])
        assert run("tail -n 2 --json", story) == "".join(run("show --json", story).splitlines(keepends=True)[-2:])
        assert len(run("tail", story).splitlines()) == 10

    def test_follows_until_it_is_interrupted(self, tmp_path):
        """From another process: what is written meanwhile is printed at once, and an interrupt ends it with 130."""
        with open_log(tmp_path / "run") as log:
            words = [sys.executable, "-m", "loopguard.cli", "audit", "tail", str(tmp_path / "run"), "--follow"]
            with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
                try:
                    assert "log.opened" in reader.stdout.readline()
                    log.append("note.added", {"by": "dana", "text": "written meanwhile"})
                    assert "written meanwhile" in reader.stdout.readline()
                    reader.send_signal(signal.SIGINT)
                    assert reader.wait(timeout=60) == 130
                finally:
                    reader.kill()


class TestOthers:
    def test_freezes_lists_who_ended_them(self, story):
        _, first, second = run("freezes", story).splitlines()
        assert first.split()[:1] == ["f1"]
        assert " dana " in first
        assert " FROZEN " in second

    def test_freezes_as_json_hold_the_records(self, story):
        first, second = json.loads(run("freezes --json", story))
        assert (first["id"], first["resumed"]["by"], second["resumed"]) == ("f1", "dana", None)
        assert first["signals"][0]["metric"] == "loss"

    def test_cycles_as_a_table_one_cycle_and_json(self, story):
        assert len(run("cycle", story).splitlines()) == 9
        assert "cycle 5, attempt 2: promoted" in run("cycle 5", story)
        assert [told["attempt"] for told in json.loads(run("cycle 5 --json", story))] == [1, 2]

    def test_an_unknown_cycle_names_those_that_exist(self, story):
        with pytest.raises(UsageError, match=r"has no cycle 9; it has 0, 1, 2, 3, 4, 5, 6"):
            CliRunner().invoke(app, ["cycle", str(story), "9"], catch_exceptions=False)

    def test_why_explains_the_last_or_the_named_one(self, story):
        assert run("why", story).startswith("freeze f2, ")
        assert run("why f1", story).startswith("freeze f1, ")

    def test_why_as_json_holds_the_records_and_who_may_resume(self, story):
        facts = json.loads(run("why --json", story))
        assert (facts["id"], facts["run"], facts["undone"], facts["resumed"]) == ("f2", "run-a", [97, 112], None)
        assert facts["actor"]["cycle"] == 5
        assert facts["resume"] == {"approvals": 0, "people": [], "pending": None}
        assert json.loads(run("why f1 --json", story))["resume"] is None

    def test_stats_say_how_much_and_how_often(self, story):
        text = run("stats", story)
        assert "frozen    32 min; freezes: 2, resumed: 1, frozen now" in text
        assert "promoted  6 of 7 that were asked for, 0 rolled back" in text
        assert [line.split() for line in text.splitlines() if line.startswith("freeze.entered")] == [
            ["freeze.entered", "2", "3.8"]
        ]
        assert json.loads(run("stats --json", story))["updates"]["withheld"] == 1

    def test_an_observed_run_that_would_have_frozen_says_where_to_look(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("freeze.foreseen", {"update": 3, "rule": "jump:loss", "reason": "fell", "signals": []})
        result = CliRunner().invoke(app, ["freezes", str(tmp_path / "run")])
        assert result.stdout == ""
        assert "has never frozen; it was observed and would have, 1 times: loopguard audit show" in result.stderr

    def test_report_prints_its_path(self, story):
        assert run("report", story) == f"{story}/report.html\n"


class TestVerify:
    def verify(self, run_dir, *options):
        return CliRunner().invoke(app, ["verify", str(run_dir), *options], catch_exceptions=False)

    def test_ends_with_the_head_to_note_down(self, story):
        """The last line is what `--expect-head` takes."""
        result = self.verify(story)
        assert result.exit_code == 20
        assert result.stdout.startswith("UNANCHORED (20): the chain is whole; its tail is not proven")
        head = result.stdout.splitlines()[-1].removeprefix("head ")
        assert self.verify(story, "--expect-head", head).exit_code == 0

    def test_json_has_code_head_and_findings(self, story):
        facts = json.loads(self.verify(story, "--json").stdout)
        assert (facts["code"], facts["status"], facts["findings"]) == (20, "unanchored", [])
        assert facts["head"]["seq"] == facts["records"]

    def test_findings_are_printed_and_give_the_code(self, story, tmp_path):
        open_log(tmp_path / "run").close()
        path = read.segments(tmp_path / "run")[0]
        path.write_bytes(path.read_bytes().replace(b"log.opened", b"log.opendd"))
        result = self.verify(tmp_path / "run")
        assert result.exit_code == 30
        assert "finding: " in result.stdout
        assert self.verify(tmp_path / "nothing").exit_code == 42
