"""What the benchmarks of the reference loop share: runs that are started, gone on with, and read."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.audit import query
from loopguard.audit.verify import verify
from loopguard.errors import LoopGuardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of `loopguard run toolformer`."""

    run_dir: Path
    options: tuple[str, ...]
    ends_with: frozenset[int]
    """Exit codes after which the run is over and need not be started again."""
    copy_of: Path | None = None
    """A finished run that this one goes on from."""

    @property
    def note(self) -> Path:
        """Where exit code and seconds are kept once the run is over."""
        return self.run_dir.with_suffix(".json")

    def do(self) -> dict[str, Any]:
        """Run it, unless it has been run to its end before."""
        if self.note.exists():
            return json.loads(self.note.read_text())
        if self.copy_of is not None:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            shutil.copytree(self.copy_of, self.run_dir)
        command = [sys.executable, "-m", "loopguard.cli", "run", "toolformer", "--run-dir", str(self.run_dir)]
        started = time.monotonic()
        with self.run_dir.with_suffix(".log").open("w") as log:
            done = subprocess.run([*command, *self.options], stdout=log, stderr=log, check=False)
        result = {"code": done.returncode, "seconds": round(time.monotonic() - started, 1)}
        if done.returncode not in self.ends_with:
            raise SystemExit(f"{' '.join([*command, *self.options])} ended with {done.returncode}; see {log.name}")
        self.note.write_text(json.dumps(result))
        return result


def do_all(runs: Iterable[Run], *, jobs: int) -> list[dict[str, Any]]:
    """Run all of them, so many at a time, in order."""

    def one(run: Run) -> dict[str, Any]:
        result = run.do()
        print(f"{run.run_dir.name}: exit {result['code']} after {result['seconds']:.0f} s", file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, runs))


def held_out(run_dir: Path, cycle: int) -> dict[str, Any]:
    """The evaluation of a cycle: `panel`, and `items` place by place."""
    return json.loads((run_dir / "eval" / f"cycle-{cycle}.json").read_text())


def mcnemar(before: list[bool], after: list[bool]) -> float:
    """Exact two-sided p-value of McNemar's test for paired outcomes (binomial over the pairs that differ)."""
    better = sum(b and not a for a, b in zip(before, after, strict=True))
    worse = sum(a and not b for a, b in zip(before, after, strict=True))
    differ = better + worse
    tail = sum(math.comb(differ, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**differ)


def calls(run_dir: Path) -> int:
    """Tool calls that ran in containers."""
    return sum(sum(cycle.outcomes.values()) for cycle in query.cycles(run_dir))


def log_is_whole(run_dir: Path) -> bool:
    """Whether `audit verify` has nothing to complain about but a missing anchor."""
    try:
        return verify(run_dir).code == 20
    except LoopGuardError:
        return False


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """What the numbers were seen on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    engine = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}, Docker {engine.stdout.strip()}"


def write(path: Path, text: str, also: Callable[[str], None] = print) -> None:
    """Keep a result and show it."""
    path.write_text(text + "\n")
    also(text)
