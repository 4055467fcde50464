"""The `audit` commands: results on standard output, exit codes from the table."""

from __future__ import annotations

import json
import shlex

import pytest
from audit_stories import HOSTILE, frozen_twice, open_log
from typer.testing import CliRunner

from loopguard.audit import read
from loopguard.cli.audit import app
from loopguard.errors import UsageError

COMMANDS = ["show", "freezes", "cycle", "why", "verify", "prove", "report", "keygen"]


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


@pytest.mark.parametrize("command", ["show", "freezes", "cycle", "why", "report"])
def test_a_folder_without_a_log_is_a_usage_error(command, tmp_path):
    with pytest.raises(UsageError, match="holds no audit log"):
        CliRunner().invoke(app, [command, str(tmp_path)], catch_exceptions=False)


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
