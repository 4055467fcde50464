"""HumanEval through `loopguard serve`: every reference solution passes, twice alike, and nothing is left over.

    python benchmarks/humaneval.py --data HumanEval.jsonl.gz

Starts a service of its own under policies/default.yaml, sends all problems with 16 clients at once, twice, then once
with each body replaced by `pass`. Ends with 1 where a solution fails, where two rounds differ, where an empty body
passes, or where a process, a container or a descriptor is left. The data set is not part of LoopGuard.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loopguard.policy.load import shipped

CLIENTS = 16


class Client:
    """One connection to the service, kept alive, for each thread."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._threads = threading.local()

    def run(self, code: str) -> dict[str, Any]:
        """Send code and wait. A full queue is waited out, as any client does."""
        body = json.dumps({"code": code, "language": "python", "run_timeout": 10})
        while True:
            if not hasattr(self._threads, "connection"):
                self._threads.connection = http.client.HTTPConnection(*self._address, timeout=60)
            connection = self._threads.connection
            connection.request("POST", "/run_code", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status == 200:
                return json.loads(text)
            assert answer.status == 504, (answer.status, text)
            time.sleep(0.2)


def program(problem: dict[str, str], *, solution: str) -> str:
    return f"{problem['prompt']}{solution}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def statuses(client: Client, programs: list[str]) -> list[str]:
    """What became of each program, with 16 clients at once."""
    with ThreadPoolExecutor(CLIENTS) as threads:
        answers = list(threads.map(client.run, programs))
    return [f"{answer['status']} {answer['run_result']['return_code']}" for answer in answers]


def left_over(pid: int) -> tuple[int, int]:
    """Open descriptors and child processes of the service."""
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return descriptors, len(children)


def cells() -> list[str]:
    out = subprocess.run(
        ["docker", "ps", "-aq", "--filter", "label=loopguard.owner"], capture_output=True, text=True, check=True
    ).stdout
    return out.split()


def measure(problems: list[dict[str, str]], run_dir: str) -> list[str]:
    """Prints what was seen; gives what should not have been, one sentence each."""
    wrong: list[str] = []
    before = set(cells())
    command = [sys.executable, "-m", "loopguard.cli", "serve", "--policy", str(shipped("default"))]
    with subprocess.Popen(
        [*command, "--run-dir", run_dir, "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as service:
        try:
            assert service.stdout is not None
            host, _, port = service.stdout.readline().strip().rpartition("//")[2].partition(":")
            client = Client(host, int(port))
            solved = [program(problem, solution=problem["canonical_solution"]) for problem in problems]
            client.run("print(1)")
            started = left_over(service.pid)
            rounds = []
            for number in (1, 2):
                begun = time.perf_counter()
                rounds.append(statuses(client, solved))
                took_s = time.perf_counter() - begun
                passed = rounds[-1].count("Success 0")
                print(
                    f"round {number}: {passed} of {len(problems)} pass, {len(problems) / took_s:.0f} calls per second"
                )
                wrong += [
                    f"{each['task_id']}: {found}"
                    for each, found in zip(problems, rounds[-1], strict=True)
                    if found != "Success 0"
                ]
            if rounds[0] != rounds[1]:
                wrong.append("the two rounds differ")
            empty = statuses(client, [program(problem, solution="    pass\n") for problem in problems])
            print(f"empty bodies: {empty.count('Success 0')} of {len(problems)} pass")
            wrong += [
                f"{each['task_id']} passes with an empty body"
                for each, found in zip(problems, empty, strict=True)
                if found == "Success 0"
            ]
            # Idle connections of the clients are descriptors of the service, too; theirs go when the clients do.
            del client
            time.sleep(2)
            ended = left_over(service.pid)
            print(
                f"the service: {started[0]} descriptors at the start, {ended[0]} at the end; {ended[1]} child processes"
            )
            if ended[0] > started[0] + CLIENTS or ended[1]:
                wrong.append(f"left over: {ended[0] - started[0]} descriptors, {ended[1]} processes")
        finally:
            service.terminate()
    print(f"the service ended with {service.returncode}")
    if service.returncode:
        wrong.append(f"the service ended with {service.returncode}")
    if left := set(cells()) - before:
        wrong.append(f"left over: containers {', '.join(left)}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="HumanEval.jsonl.gz")
    options = parser.parse_args()
    with gzip.open(options.data, "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {CLIENTS} clients\n")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as folder:
        wrong = measure(problems, str(Path(folder) / "run"))
    for each in wrong:
        print(each)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
