"""How late a call is ended, what is left of it, and what a flood costs the controller.

    python benchmarks/sandbox_limits.py

Prints, for calls that do not end by themselves, how long after their time limit the answer came, and how many processes
the container had then; and for 10 GB of output how much the memory of this process grew. Ends with 1 where an answer
came more than 150 ms late, a process was left, or the flood cost more than 50 MB. Needs an engine and the image.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

from loopguard.controller.cells import cell_spec
from loopguard.policy.load import load
from loopguard.sandbox.docker import DockerRuntime
from loopguard.types import Outcome, ToolCall

LATE_MS, FLOOD_MB = 150, 50
WALL_S = 1.0
ENDLESS = {
    "computes": "while True: pass",
    "sleeps": "import time\nwhile True: time.sleep(9)",
    "ignores every signal": (
        "import signal, time\nfor n in signal.valid_signals() - {9, 19}: signal.signal(n, signal.SIG_IGN)\n"
        "while True: time.sleep(9)"
    ),
    "has stopped itself": "import os; os.kill(os.getpid(), 19)",
    "has forty daemons": (
        "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(99)\n"
        "time.sleep(99)"
    ),
    "writes without end": "import os\nwhile True: os.write(1, b'x')",
    "forks without end": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
}
PROCESSES = "import os; print(len([p for p in os.listdir('/proc') if p.isdigit()]) - 3)"
FLOOD = "import os\npart = b'x' * (1 << 16)\nwhile True: os.write(1, part)"


def runtime(**limits: object) -> DockerRuntime:
    """A sandbox of one cell with other limits than those of the policy."""
    profile = load(Path(__file__).with_name("sandbox_latency.yaml")).policy.sandbox.profiles["plain"]
    spec = cell_spec(profile)
    spec = replace(spec, cells=1, limits=replace(spec.limits, **limits))  # type: ignore[arg-type]
    started = DockerRuntime(spec, run_id="bench-limits", on_event=lambda *_: None)
    started.start()
    return started


def run(sandbox: DockerRuntime, code: str) -> Outcome:
    return sandbox.run(ToolCall(id=uuid.uuid4().hex, tool="python", code=code))


def overshoots() -> list[str]:
    """Prints one line for each kind of call; gives what should not have been."""
    wrong = []
    sandbox = runtime(wall_s=WALL_S, flood_mib=1024)
    print("| a call that | ended as | late by, worst of five (ms) | processes left |")
    print("|---|---|---|---|")
    try:
        for what, code in ENDLESS.items():
            late_ms, left, ended = 0.0, 0, ""
            for _ in range(5):
                run(sandbox, "pass")
                started = time.perf_counter()
                ended = run(sandbox, code).status
                late_ms = max(late_ms, (time.perf_counter() - started - WALL_S) * 1e3)
                left += int(run(sandbox, PROCESSES).text)
            print(f"| {what} | {ended} | {late_ms:.0f} | {left} |")
            if late_ms > LATE_MS or left:
                wrong.append(f"a call that {what}: {late_ms:.0f} ms late, {left} processes left")
    finally:
        sandbox.close()
    return wrong


def flood() -> list[str]:
    """10 GB of output, as ten calls that are ended at one."""
    sandbox = runtime(wall_s=60.0, flood_mib=1024)
    try:
        run(sandbox, "pass")
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        outcomes = [run(sandbox, FLOOD) for _ in range(10)]
        took_s = time.perf_counter() - started
    finally:
        sandbox.close()
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1000
    written_gb = sum(outcome.stdout_bytes for outcome in outcomes) / 1e9
    print(f"\n{written_gb:.1f} GB written in {took_s:.0f} s; this process grew by {grown_mb:.1f} MB")
    right = all(outcome.status == "output_limit" for outcome in outcomes) and grown_mb <= FLOOD_MB
    return [] if right else [f"the flood: {grown_mb:.1f} MB, {[outcome.status for outcome in outcomes]}"]


def main() -> None:
    print(f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()} {platform.release()}\n")
    wrong = overshoots() + flood()
    for each in wrong:
        print(each)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
