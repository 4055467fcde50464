"""`loopguard policy check`: results on standard output, errors on standard error, three exit codes."""

import json

import pytest
from policy_kit import SMALL, edited
from typer.testing import CliRunner

from loopguard.cli.policy import app
from loopguard.policy.load import load


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(text, *options):
        (tmp_path / "p.yaml").write_text(text)
        return CliRunner().invoke(app, ["check", "p.yaml", *options])

    return run


LINT = edited(("max_own_share: 0.5", "max_own_share: 1"))
BROKEN = edited(("wall: 2s", "wall: 2"))


def test_a_sound_policy_exits_0_and_names_its_digest(check, tmp_path):
    result = check(SMALL)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"p.yaml: fine, digest {load(tmp_path / 'p.yaml').digest}\n"


def test_a_lint_exits_1_on_standard_output(check):
    result = check(LINT)
    assert (result.exit_code, result.stderr) == (1, "")
    assert (
        result.stdout
        == "p.yaml:23:18: lint: data.max_own_share is 1, so nothing caps what the model writes for itself\n"
    )


def test_a_policy_that_does_not_load_exits_3_on_standard_error(check):
    result = check(BROKEN)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == "p.yaml:16:15: sandbox.profiles.offline.limits.wall is 2; write a unit, such as 2s\n"


def test_a_missing_file_exits_3(tmp_path):
    result = CliRunner().invoke(app, ["check", str(tmp_path / "nope.yaml")])
    assert (result.exit_code, result.stdout) == (3, "")
    assert "no such file" in result.stderr


@pytest.mark.parametrize(("text", "code", "level"), [(SMALL, 0, None), (LINT, 1, "lint"), (BROKEN, 3, "error")])
def test_json_is_one_object_on_standard_output(check, text, code, level):
    result = check(text, "--json")
    assert (result.exit_code, result.stderr) == (code, "")
    said = json.loads(result.stdout)
    assert said.keys() == {"path", "digest", "findings"}
    assert (said["digest"] is None) == (code == 3)
    assert [finding["level"] for finding in said["findings"]] == ([level] if level else [])
    assert all(finding.keys() == {"path", "line", "column", "level", "message"} for finding in said["findings"])


@pytest.mark.parametrize("arguments", [["check"], ["check", "a", "b"], ["check", "a", "--jsn"], ["chek", "a"]])
def test_bad_usage_exits_2(arguments):
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_help_has_a_sentence_an_example_and_the_exit_codes():
    said = CliRunner().invoke(app, ["check", "--help"]).stdout
    assert "Say everything that is wrong with a guard policy" in said
    assert "loopguard policy check policies/default.yaml" in said
    assert "Exit codes: 0 fine, 1 it loads but" in said
