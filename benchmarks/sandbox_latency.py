"""How long a tool call takes in the sandbox and through `cycle.tool`, beside a bare fork and one `docker exec` each.

    python benchmarks/sandbox_latency.py                  five rounds, about two minutes on two idle cores
    python benchmarks/sandbox_latency.py --rounds 2       a quick look
    python benchmarks/sandbox_latency.py --json FILE      also write the figures to a file

All contestants take turns in each round, so that what the machine does meanwhile hits all of them; figures are medians
over the rounds, and what counts are the ratios. `cycle.tool` decides by the guard policy and writes its log to the
folder given with --run-dir (by default below the working folder: a memory disk would flatter it). Needs a Docker
engine and the sandbox image (`loopguard sandbox build`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from loopguard import LoopGuard
from loopguard.controller.cells import cell_spec
from loopguard.policy.load import load
from loopguard.sandbox.docker import DockerRuntime
from loopguard.types import ToolCall

POLICY = Path(__file__).with_name("sandbox_latency.yaml")
IMAGE = "loopguard/python:1"
PYTHON, SHELL = "print(1+1)", "echo 2"
NUMPY = "import numpy; print(int(numpy.ones(2).sum()))"

FORKS = """
import json, os, sys, time
times = []
for _ in range(int(sys.argv[1])):
    started = time.perf_counter()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(write, 1)
        exec(compile("print(1+1)", "main", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    while os.read(read, 4096): pass
    os.close(read)
    os.waitpid(pid, 0)
    times.append((time.perf_counter() - started) * 1e3)
print(json.dumps(times))
"""
"""A warm interpreter that forks for each call, reads what the child prints and waits for it: no isolation at all."""

Figures = dict[str, list[float]]


def in_turn(call: Callable[[], None], *, calls: int) -> list[float]:
    """How long each of these calls took, one after the other (ms)."""
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def at_once(call: Callable[[], None], *, calls: int, clients: int) -> tuple[float, list[float]]:
    """Calls per second of that many clients, each with one call at a time, and how long each call took (ms)."""
    times: list[float] = []

    def client(number: int) -> None:
        times.extend(in_turn(call, calls=calls // clients))

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return len(times) / (time.perf_counter() - started), sorted(times)


def bare_forks(calls: int) -> list[float]:
    out = subprocess.run([sys.executable, "-c", FORKS, str(calls)], capture_output=True, text=True, check=True).stdout
    return [float(each) for each in json.loads(out)]


@contextmanager
def exec_container() -> Iterator[Callable[[], None]]:
    """`docker exec` into one container, for each call."""
    options = ["--network", "none", "--memory", "256m", "--pids-limit", "64"]
    container = subprocess.run(
        ["docker", "run", "--rm", "-d", *options, IMAGE, "sleep", "3600"], capture_output=True, text=True, check=True
    ).stdout.strip()

    def call() -> None:
        done = subprocess.run(
            ["docker", "exec", container, "python3", "-I", "-c", PYTHON], capture_output=True, text=True, check=True
        )
        assert done.stdout == "2\n"

    try:
        yield call
    finally:
        subprocess.run(["docker", "kill", container], capture_output=True, check=False)


def through(runtime: DockerRuntime, code: str, *, tool: str) -> Callable[[], None]:
    """One call of the bare sandbox: no decision, no record."""

    def call() -> None:
        outcome = runtime.run(ToolCall(id=os.urandom(8).hex(), tool=tool, code=code))
        assert outcome.text == "2\n", outcome

    return call


def measure(rounds: int, calls: int, run_dir: Path) -> tuple[Figures, Figures]:
    """Medians of each round by contestant: latencies (ms), and throughput (calls per second)."""
    latency: Figures = defaultdict(list)
    rate: Figures = defaultdict(list)
    policy = load(POLICY).policy
    plain, with_numpy = (
        DockerRuntime(cell_spec(policy.sandbox.profiles[name]), run_id=f"bench-{name}", on_event=lambda *_: None)
        for name in ("plain", "numpy")
    )
    with exec_container() as docker_exec, LoopGuard.from_file(POLICY, run_dir=run_dir) as guard:
        plain.start()
        with_numpy.start()
        cycle = next(guard.cycles(1))
        tools = {name: cycle.tool(name) for name in ("python", "sh")}

        def guarded() -> None:
            assert tools["python"](PYTHON).text == "2\n"

        def guarded_shell() -> None:
            assert tools["sh"](SHELL).text == "2\n"

        sandbox = through(plain, PYTHON, tool="python")
        contestants = {
            "sandbox, Python": sandbox,
            "sandbox, shell": through(plain, SHELL, tool="sh"),
            "sandbox, numpy preloaded": through(with_numpy, NUMPY, tool="python"),
            "cycle.tool, Python": guarded,
            "cycle.tool, shell": guarded_shell,
        }
        for call in (*contestants.values(), docker_exec):
            in_turn(call, calls=20)
        for _ in range(rounds):
            for name, times in [
                ("bare fork", bare_forks(calls)),
                ("docker exec", in_turn(docker_exec, calls=max(calls // 20, 5))),
                *((name, in_turn(call, calls=calls)) for name, call in contestants.items()),
            ]:
                latency[name].append(statistics.median(times))
                latency[f"{name} p95"].append(sorted(times)[int(len(times) * 0.95)])
            for clients in (1, 8, 32):
                per_s, times = at_once(guarded, calls=calls * (2 if clients > 1 else 1), clients=clients)
                rate[f"cycle.tool, {clients} clients"].append(per_s)
                rate[f"cycle.tool, {clients} clients p99/p50"].append(
                    times[int(len(times) * 0.99)] / statistics.median(times)
                )
                per_s, _ = at_once(docker_exec, calls=max(calls // 20, clients), clients=clients)
                rate[f"docker exec, {clients} clients"].append(per_s)
        plain.close()
        with_numpy.close()
    return latency, rate


def machine() -> str:
    """What it ran on, in one line."""
    engine = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()} {platform.release()}, Docker {engine}, "
        f"runc, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start"
    )


def tables(latency: Figures, rate: Figures) -> str:
    """The figures as people read them, each beside what it is compared with."""
    middle = {name: statistics.median(values) for name, values in {**latency, **rate}.items()}
    bare = middle["bare fork"]
    lines = ["| one client | p50 ms | p95 ms | times a bare fork |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {middle[name]:.2f} | {middle[f'{name} p95']:.2f} | {middle[name] / bare:.1f} |"
        for name in latency
        if not name.endswith("p95")
    ]
    lines += [
        "",
        "| clients | cycle.tool, calls per second | docker exec | ratio | p99 / p50 of a call |",
        "|---|---|---|---|---|",
    ]
    for clients in (1, 8, 32):
        ours, theirs = middle[f"cycle.tool, {clients} clients"], middle[f"docker exec, {clients} clients"]
        spread = middle[f"cycle.tool, {clients} clients p99/p50"]
        lines.append(f"| {clients} | {ours:.0f} | {theirs:.1f} | {ours / theirs:.1f} | {spread:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=300, help="calls of one client in one round")
    parser.add_argument("--run-dir", type=Path, help="where cycle.tool keeps its log; a new folder by default")
    parser.add_argument("--json", type=Path, help="where to write all rounds")
    options = parser.parse_args()
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as folder:
        latency, rate = measure(options.rounds, options.calls, options.run_dir or Path(folder) / "run")
    print(tables(latency, rate))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "latency_ms": latency, "per_s": rate}, indent=1))


if __name__ == "__main__":
    main()
