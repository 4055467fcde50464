"""doctor, sandbox and the help texts: what a newcomer meets first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer.main

from loopguard.cli import doctor
from loopguard.cli.app import _main, app
from loopguard.integrations.frameworks import Standing


def loopguard(*words):
    return _main([str(word) for word in words])


def test_doctor_without_an_engine_says_what_to_do_and_is_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    assert loopguard("doctor", "--run-dir", tmp_path, "--json") == 1
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["engine"]["state"] == "trouble"
    assert "loopguard sandbox build" in findings["engine"]["do"]
    assert "a guard policy without tools needs none" in findings["engine"]["do"]
    assert findings["python"]["state"] == findings["disk"]["state"] == findings["clock"]["state"] == "fine"


@pytest.mark.docker
def test_doctor_names_engine_cgroup_runtimes_and_image(capsys, tmp_path):
    assert loopguard("doctor", "--run-dir", tmp_path, "--json") == 0
    findings = {finding["what"]: finding["state"] for finding in json.loads(capsys.readouterr().out)}
    assert findings["engine"] == findings["cgroup"] == findings["image"] == "fine"
    assert "runtimes" in findings


BROKEN = Standing(name="trl", version="9.9", state="not guardable", says="_metrics is missing (readings)", do="another")
BARE = Standing(name="transformers", version="", state="not installed", says="not installed", do="pip install it")


def test_doctor_tells_of_frameworks_in_a_section_of_their_own(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    monkeypatch.setattr(doctor, "standings", lambda: [BROKEN, BARE])
    loopguard("doctor", "--run-dir", tmp_path)
    before, _, after = capsys.readouterr().out.partition("\nframeworks\n")
    assert "python" in before
    assert after.splitlines() == [
        "note     trl          9.9, not guardable: _metrics is missing (readings)",
        "                      -> another",
        "note     transformers not installed",
        "                      -> pip install it",
    ]


@pytest.mark.docker
def test_a_framework_that_cannot_be_guarded_is_a_note_and_doctor_is_0(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "standings", lambda: [BROKEN])
    assert loopguard("doctor", "--run-dir", tmp_path, "--json") == 0
    (told,) = [one for one in json.loads(capsys.readouterr().out) if one["section"] == "frameworks"]
    assert (told["state"], told["what"], told["do"]) == ("note", "trl", "another")


def test_doctor_prints_json_and_nothing_else_where_frameworks_are_loaded(tmp_path):
    command = [sys.executable, "-m", "loopguard.cli", "doctor", "--run-dir", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    named = [one["what"] for one in json.loads(done.stdout) if one["section"] == "frameworks"]
    assert named[:4] == ["torch", "transformers", "accelerate", "trl"]


@pytest.mark.docker
def test_reaping_where_nothing_is_to_do_is_0(capsys):
    assert loopguard("sandbox", "reap", "--json") == 0
    assert isinstance(json.loads(capsys.readouterr().out)["reaped"], list)


def test_reaping_without_an_engine_is_one_line_and_5(monkeypatch, capsys):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    assert loopguard("sandbox", "reap") == 5
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize(
    ("path", "command"),
    list(commands(typer.main.get_command(app))),
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_every_help_is_a_sentence_an_example_and_the_exit_codes(path, command):
    assert command.help.split("\n")[0].endswith(".")
    assert f"loopguard {' '.join(path)}" in command.help
    assert "Exit codes: 0" in command.help
