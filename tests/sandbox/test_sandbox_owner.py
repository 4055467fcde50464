"""Whose a cell is, and who may sweep it away."""

from __future__ import annotations

import os
import subprocess

import pytest

from loopguard.sandbox import owner
from loopguard.sandbox.reaper import is_orphan


def someone_else(pid: int, started: str) -> str:
    """The mark of another process of this machine."""
    return f"{owner.me().split(':')[0]}:{pid}:{started}"


def test_we_live():
    """Our own cells are nobody's to sweep."""
    assert not owner.is_dead(owner.me())


def test_a_process_that_ended_is_dead():
    """A pid that is gone is a dead owner."""
    done = subprocess.Popen(["true"])
    done.wait()
    assert owner.is_dead(someone_else(done.pid, "123"))


def test_a_recycled_pid_is_another_owner():
    """The start time tells two processes with the same pid apart."""
    assert owner.is_dead(someone_else(os.getpid(), "1"))


@pytest.mark.parametrize("mark", ["", "x", "elsewhere:1:1", "a:b:c", "::", "0123456789abcdef:99999999:5"])
def test_marks_of_others_are_left_alone(mark):
    """Of another machine, another pid namespace, or a mark that cannot be read, nothing is known."""
    assert not owner.is_dead(mark)


def test_a_mark_without_a_start_time_is_left_alone():
    """Half a mark says nothing."""
    assert not owner.is_dead(someone_else(os.getpid(), "").rstrip(":"))


def test_hidden_processes_count_as_alive(monkeypatch):
    """Where /proc hides the processes of others, a process that cannot be signalled is there."""
    mark = someone_else(1, "77")

    def hidden(path, *_, **__):
        raise PermissionError(path)

    def refused(pid, number):
        raise PermissionError(pid)

    assert owner.is_dead(mark)
    # Only what asks about the process is hidden: the mark of the place was made before.
    place = owner._place()
    monkeypatch.setattr(owner, "_place", lambda: place)
    monkeypatch.setattr(owner.Path, "read_text", hidden)
    monkeypatch.setattr(owner.os, "kill", refused)
    assert not owner.is_dead(mark)


@pytest.mark.parametrize(
    ("deadline", "orphan"), [("99", True), ("101", False), ("", False), ("soon", False), ("-5", False), ("1e1", False)]
)
def test_a_deadline_that_has_passed_makes_an_orphan(deadline, orphan):
    """A deadline that cannot be read has not passed."""
    assert is_orphan("elsewhere:1:1", deadline, now_s=100) is orphan
