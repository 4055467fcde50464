"""The set-up script: quiet where nothing is to do, clear where nothing can be done."""

from __future__ import annotations

import subprocess

import pytest

from loopguard.sandbox.base import setup_script


def run_setup(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script, on request with another PATH."""
    env = {"PATH": path, "HOME": "/nonexistent"} if path else None
    return subprocess.run(
        ["/bin/bash", str(setup_script()), *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
    )


def test_an_unknown_option_is_a_usage_error():
    """Exit code 2, and one line that names it."""
    done = run_setup("--frobnicate")
    assert done.returncode == 2
    assert "unknown option --frobnicate" in done.stderr


def test_it_is_good_bash():
    """The script parses."""
    assert subprocess.run(["bash", "-n", str(setup_script())], check=False).returncode == 0


@pytest.mark.docker
def test_nothing_to_do_is_silent():
    """With engine and image there, neither `--check` nor a whole run says a word."""
    for arguments in ([], ["--check"], ["--engine-only"]):
        done = run_setup(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.docker
def test_two_at_once_do_not_meet():
    """Two set-ups at the same time both end well."""
    both = [subprocess.Popen(["bash", str(setup_script())]) for _ in range(2)]
    assert [each.wait(300) for each in both] == [0, 0]


@pytest.mark.docker
def test_no_engine_is_seen_as_such(monkeypatch):
    """`--check` with an engine that does not answer is 5."""
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    assert run_setup("--check").returncode == 5
