"""What all tests share, and how a missing resource is made visible.

A test that needs a resource which is not here is skipped, and the last lines of the run say so loudly. Resources named
in LOOPGUARD_REQUIRE (comma-separated) turn that skip into a failure.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess

import pytest

_IMAGE = "loopguard/python:1"

# The log key of whoever runs the tests signs none of their logs.
os.environ["LOOPGUARD_LOG_KEY"] = ""


@functools.cache
def missing_docker() -> str:
    """Why tests that need Docker cannot run, or the empty string."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    for command, trouble in (
        (["docker", "version", "--format", "{{.Server.Version}}"], "no Docker engine answers"),
        (["docker", "image", "inspect", "--format", "{{.Id}}", _IMAGE], f"the image {_IMAGE} is not built"),
    ):
        try:
            done = subprocess.run(command, capture_output=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            return trouble
        if done.returncode:
            return trouble
    return ""


@functools.cache
def missing_runsc() -> str:
    """Why tests that need gVisor cannot run, or the empty string."""
    if why := missing_docker():
        return why
    done = subprocess.run(
        ["docker", "info", "--format", "{{json .Runtimes}}"], capture_output=True, timeout=20, check=False
    )
    return "" if b'"runsc"' in done.stdout else "this Docker engine has no runtime runsc (gVisor)"


@functools.cache
def missing_train() -> str:
    """Why tests that train cannot run, or the empty string."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install 'loopguard[train]'" if absent else ""


@functools.cache
def missing_browser() -> str:
    """Why tests that open pages cannot run, or the empty string."""
    from chromium import command

    return "" if command() else "there is no Chromium: make test-browser installs it on Debian and Ubuntu, as root"


_CHECKS = {"docker": missing_docker, "runsc": missing_runsc, "train": missing_train, "browser": missing_browser}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose resource is missing; fail it where the resource is required."""
    for name, missing in _CHECKS.items():
        if item.get_closest_marker(name) and (why := missing()):
            if name in os.environ.get("LOOPGUARD_REQUIRE", "").split(","):
                pytest.fail(f"LOOPGUARD_REQUIRE asks for {name}, but {why}", pytrace=False)
            pytest.skip(f"needs {name}: {why}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the very end what was not run."""
    # From what the workers report: this may be a process that ran no test itself.
    skipped = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    for name, missing in _CHECKS.items():
        if any(f"needs {name}: " in why for why in skipped):
            text = f"NOT RUN: every test that needs {name}, because {missing()}"
            terminalreporter.write_line(text, red=True, bold=True)
