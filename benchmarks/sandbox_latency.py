"""How long a tool call takes through the pool, and how that compares with one `docker exec` for each call.

    python benchmarks/sandbox_latency.py                 5,000 calls, about a minute on two idle cores
    python benchmarks/sandbox_latency.py --calls 500     a quick look

Prints a table and the machine. Needs a Docker engine and the sandbox image (`loopguard sandbox build`).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from loopguard.sandbox.base import CellSpec
from loopguard.sandbox.docker import DockerRuntime
from loopguard.types import Limits, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable

CODE = "print(6 * 7)"
IMAGE = "loopguard/python:1"
LIMITS = Limits(wall_s=30, memory_mib=256, pids=64, cpus=1.0, tmpfs_mib=64, output_kib=64, flood_mib=16)


def spec(*, cells: int, preload: tuple[str, ...]) -> CellSpec:
    return CellSpec(
        image=IMAGE, mode="pooled", runtime="runc", cells=cells, preload=preload, limits=LIMITS, calls_per_cell=500
    )


def times_ms(call: Callable[[], None], *, calls: int, threads: int) -> tuple[list[float], float]:
    """How long each call took, and all of them together in seconds."""

    def one(_: int) -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        each = list(pool.map(one, range(calls)))
    return each, time.perf_counter() - started


def row(name: str, each: list[float], whole_s: float) -> None:
    ordered = sorted(each)
    print(
        f"| {name} | {len(each)} | {statistics.median(ordered):.1f} | {ordered[int(len(ordered) * 0.95)]:.1f} "
        f"| {len(each) / whole_s:.0f} |",
        flush=True,
    )


def pooled(name: str, *, calls: int, threads: int, cells: int, preload: tuple[str, ...] = ()) -> float:
    """One row for the pool; gives calls per second."""
    runtime = DockerRuntime(spec(cells=cells, preload=preload), run_id=f"bench{os.getpid()}", on_event=lambda *_: None)
    runtime.start()

    def call() -> None:
        assert runtime.run(ToolCall(id="bench", tool="python", code=CODE)).text == "42\n"

    try:
        times_ms(call, calls=50, threads=threads)
        each, whole_s = times_ms(call, calls=calls, threads=threads)
    finally:
        runtime.close()
    row(name, each, whole_s)
    return calls / whole_s


def exec_each(name: str, *, calls: int, threads: int) -> float:
    """One row for `docker exec` in a container that waits; gives calls per second."""
    container = subprocess.run(
        ["docker", "run", "-d", "--rm", "--network", "none", "--read-only", IMAGE, "sleep", "600"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()

    def call() -> None:
        done = subprocess.run(
            ["docker", "exec", container, "python3", "-I", "-c", CODE], capture_output=True, text=True, check=True
        )
        assert done.stdout == "42\n"

    try:
        times_ms(call, calls=3, threads=threads)
        each, whole_s = times_ms(call, calls=calls, threads=threads)
    finally:
        subprocess.run(["docker", "kill", container], capture_output=True, check=False)
    row(name, each, whole_s)
    return calls / whole_s


def machine() -> str:
    """What it ran on, in one line."""
    engine = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()} {platform.release()}, Docker {engine}, "
        f"runc, load {os.getloadavg()[0]:.1f} at the start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=5000, help="calls through the pool in the longest row")
    calls = parser.parse_args().calls
    print(f"{machine()}\n")
    print("| | calls | p50 ms | p95 ms | calls per second |")
    print("|---|---|---|---|---|")
    pooled("pool, one caller, one cell", calls=calls // 5, threads=1, cells=1)
    pooled("pool, one caller, one cell, numpy preloaded", calls=calls // 5, threads=1, cells=1, preload=("numpy",))
    pool_rate = pooled("pool, two callers, two cells", calls=calls, threads=2, cells=2)
    exec_rate = exec_each("docker exec, two callers, one container", calls=max(calls // 100, 10), threads=2)
    print(f"\nThe pool makes {pool_rate / exec_rate:.0f} times as many calls per second as one `docker exec` for each.")


if __name__ == "__main__":
    main()
