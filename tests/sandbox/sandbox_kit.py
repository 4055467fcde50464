"""What the sandbox tests share: specs, calls, a runtime that notes its events."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.sandbox.base import CellSpec
from loopguard.types import Limits, Outcome, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.sandbox.docker import DockerRuntime

IMAGE = "loopguard/python:1"
ROOT = Path(__file__).parent.parent.parent
LIMITS = Limits(wall_s=20, memory_mib=192, pids=48, cpus=1.0, tmpfs_mib=16, output_kib=64, flood_mib=4)
_numbers = itertools.count()


def make_spec(**changes: Any) -> CellSpec:
    """One pooled cell with small limits; keywords change the spec or its limits."""
    limits = {name: changes.pop(name) for name in list(changes) if name in Limits.__dataclass_fields__}
    fields: dict[str, Any] = {
        "image": IMAGE,
        "mode": "pooled",
        "runtime": "runc",
        "cells": 1,
        "preload": (),
        "calls_per_cell": 500,
        "limits": Limits(**{**{name: getattr(LIMITS, name) for name in Limits.__dataclass_fields__}, **limits}),
    }
    return CellSpec(**{**fields, **changes})


def make_call(code: str, *, tool: str = "python", **fields: Any) -> ToolCall:
    """A call with an id of its own."""
    return ToolCall(id=f"call-{next(_numbers)}", tool=tool, code=code, **fields)


class Bench:
    """A Docker runtime of a test, and the events that it told of."""

    def __init__(self, **changes: Any) -> None:
        from loopguard.sandbox.docker import DockerRuntime

        self.events: list[tuple[str, dict[str, Any]]] = []
        self.run_id = f"test{os.getpid()}x{next(_numbers)}"
        self.runtime: DockerRuntime = DockerRuntime(
            make_spec(**changes), run_id=self.run_id, on_event=lambda name, body: self.events.append((name, body))
        )

    def __enter__(self) -> Bench:
        self.runtime.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.runtime.close()

    def run(self, code: str, *, tool: str = "python", stdin: bytes = b"") -> Outcome:
        """Run a call, whatever it comes to."""
        return self.runtime.run(make_call(code, tool=tool, stdin=stdin))

    def text(self, code: str, *, tool: str = "python", stdin: bytes = b"") -> str:
        """Run a call that has to go well; what it printed."""
        outcome = self.run(code, tool=tool, stdin=stdin)
        assert outcome.ok, (outcome.status, outcome.stderr.decode(errors="replace"))
        return outcome.text.strip()

    def json(self, code: str) -> Any:
        """Run a call that has to go well; what it printed as JSON."""
        return json.loads(self.text(code))

    def reasons(self) -> list[str]:
        """Why cells were removed so far."""
        return [body["reason"] for name, body in self.events if name == "sandbox.removed"]


def cells(run_id: str) -> list[dict[str, Any]]:
    """The containers of a run, as the engine lists them."""
    from loopguard.sandbox.docker import RUN, containers

    return [each for each in containers() if each["Labels"].get(RUN) == run_id]


def until(what: Callable[[], bool], *, within_s: float = 30) -> bool:
    """Wait for something to come true."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.05)
    return what()


def controller(body: str, *, options: str = "") -> subprocess.Popen[str]:
    """A process of its own with a started Bench called `bench`, doing `body`."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    code = f"import os, sys, time\nfrom sandbox_kit import *\nwith Bench({options}) as bench:\n{indented}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
    )
