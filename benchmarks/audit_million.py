"""What a million records cost: to write, to verify, and to ask `loopguard status` about.

    python benchmarks/audit_million.py [--records 1000000] [--group 100] [--dir DIR]

Written in groups that share one sync, against SQLite (WAL, synchronous=FULL, a transaction for each group) and against
structlog, which writes JSON lines to a file and syncs nothing. Verified against reading the same lines with json and
hashing them with SHA-256. All on one disk, one after the other; prints one JSON object. Takes a few minutes and 2 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import structlog

from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.state import FreezeState

POLICY = hashlib.sha256(b"a guard policy").hexdigest()
TARGETS = {"append_to_sqlite": 1.0, "append_to_structlog": 3.0, "verify_to_json_and_sha256": 3.0, "status_s": 0.3}
"""At most; the growth of memory from a tenth of the records to all of them, in percent, stands below."""
MEMORY_GROWTH_PERCENT = 10
TRIES = 5
ROUNDS = 20
GROUPS = (1, 8, 64, 512)
SYNCS = 400

# The most memory that a process used; `ru_maxrss` would count what its parent had when it was started, too.
_PEAK = """
def peak_mib():
    try:
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
"""


def records(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a loop with a tool records: calls, each with its decision and its end, and batches of updates."""
    for number in range(0, count, 16):
        for call in range(number, min(number + 14, count), 2):
            name = f"{call:032x}"
            body = {"call": name, "tool": "python", "code_sha256": "0" * 64, "code_head": "print(48 / 2)"}
            yield "tool.decided", {**body, "result": "allow", "rule": "calculator", "reason": "rule calculator"}
            body = {"call": name, "status": "ok", "exit_code": 0, "stdout_sha256": "0" * 64, "stdout_bytes": 5}
            yield "tool.finished", {**body, "stderr_bytes": 0, "wall_ms": 2.5, "leftovers": 0}
        yield "update.leased", {"from": number + 1, "to": number + 16}
        losses = [0.5 + step / 1024 for step in range(16)]
        yield "update.applied", {"from": number + 1, "to": number + 16, "readings": {"loss": losses}}


class Log:
    """An audit log in a run directory as a controller leaves it."""

    def __init__(self, run_dir: Path) -> None:
        (run_dir / "policy").mkdir(parents=True)
        (run_dir / "policy" / f"{POLICY}.yaml").write_text("a stand-in\n")
        (run_dir / "run.json").write_text(json.dumps({"id": "bench", "policy": POLICY}))
        self.run_dir = run_dir
        self.log = AuditLog.open(run_dir, run_id="bench", policy=POLICY, reserve_mib=1)
        self.log.append("policy.loaded", {"name": "bench", "digest": POLICY})

    def write(self, part: Iterable[tuple[str, dict[str, Any]]], group: int) -> None:
        for number, (kind, body) in enumerate(part, 1):
            self.log.append(kind, body, cycle=1, sync=number % group == 0)
        self.log.sync()

    def close(self) -> None:
        # As a promotion does, after which `status` has something to answer from.
        FreezeState(self.run_dir, self.log).remember(cycle=1)
        self.log.close()


class Sqlite:
    """A table with the same records, in a transaction for each group."""

    def __init__(self, path: Path) -> None:
        self.base = sqlite3.connect(path, isolation_level=None)
        self.base.execute("PRAGMA journal_mode=WAL")
        self.base.execute("PRAGMA synchronous=FULL")
        self.base.execute("CREATE TABLE log (seq INTEGER PRIMARY KEY, ts REAL, cycle INTEGER, type TEXT, body TEXT)")

    def write(self, part: Iterable[tuple[str, dict[str, Any]]], group: int) -> None:
        self.base.execute("BEGIN")
        for number, (kind, body) in enumerate(part, 1):
            row = (time.time(), 1, kind, json.dumps(body, sort_keys=True))
            self.base.execute("INSERT INTO log (ts, cycle, type, body) VALUES (?, ?, ?, ?)", row)
            if number % group == 0:
                self.base.execute("COMMIT")
                self.base.execute("BEGIN")
        self.base.execute("COMMIT")

    def close(self) -> None:
        self.base.close()


class Structlog:
    """A plain file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        processors = [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(sort_keys=True),
        ]
        self.log = structlog.wrap_logger(structlog.WriteLogger(self.file), processors=processors).bind(run="bench")

    def write(self, part: Iterable[tuple[str, dict[str, Any]]], _: int) -> None:
        for kind, body in part:
            self.log.info(kind, cycle=1, **body)

    def close(self) -> None:
        self.file.close()


def written(writers: dict[str, Log | Sqlite | Structlog], count: int, group: int) -> dict[str, float]:
    """Seconds that each writer takes, by turns, so that what else the machine does meanwhile is shared out."""
    took_s = dict.fromkeys(writers, 0.0)
    streams = {name: records(count) for name in writers}
    for _ in range(0, count, -(-count // ROUNDS)):
        for name, writer in writers.items():
            part = list(itertools.islice(streams[name], -(-count // ROUNDS)))
            start = time.perf_counter()
            writer.write(part, group)
            took_s[name] += time.perf_counter() - start
    for writer in writers.values():
        writer.close()
    return took_s


def by_group(folder: Path, count: int) -> dict[str, float]:
    """How many times as long as SQLite it takes, by records that share a sync; of some syncs each."""
    found = {}
    for group in GROUPS:
        home = folder / f"group-{group}"
        home.mkdir()
        took_s = written(
            {"log": Log(home / "run"), "sqlite": Sqlite(home / "log.db")}, min(count, SYNCS * group), group
        )
        found[str(group)] = round(took_s["log"] / took_s["sqlite"], 2)
    return found


def parse_and_hash(run_dir: Path) -> float:
    start = time.perf_counter()
    for path in read.segments(run_dir):
        with path.open("rb") as file:
            for line in file:
                json.loads(line)
                hashlib.sha256(line).digest()
    return time.perf_counter() - start


_VERIFY = f"""
import json, resource, sys, time
{_PEAK}
from pathlib import Path
from loopguard.audit.verify import verify
start = time.perf_counter()
code = verify(Path(sys.argv[1])).code
print(json.dumps([code, time.perf_counter() - start, peak_mib()]))
"""
_ALONE = f"""
import json, resource, sys, time
{_PEAK}
from pathlib import Path
from loopguard.audit import standalone
start = time.perf_counter()
code = standalone.verify(Path(sys.argv[1]), keys={{}})["code"]
print(json.dumps([code, time.perf_counter() - start, peak_mib()]))
"""


def verified(script: str, run_dir: Path) -> tuple[float, float]:
    """Seconds, and the most memory in MiB, of a process that verifies and does nothing else."""
    done = subprocess.run([sys.executable, "-c", script, run_dir], capture_output=True, text=True, check=True)
    code, took_s, peak = json.loads(done.stdout)
    assert code == 20, f"a log of the benchmark verifies as {code}"
    return took_s, peak


def status(run_dir: Path) -> list[float]:
    """Seconds that `loopguard status` takes in a process of its own, imports included; the fastest first."""
    # With bytecode, as whatever is installed has it; a first call writes what is missing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "loopguard.cli", "status", run_dir]
    took_s = []
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        subprocess.run(command, env=environment, capture_output=True, check=True)
        took_s.append(time.perf_counter() - start)
    return sorted(took_s[1:])


def measure(folder: Path, count: int, group: int) -> dict[str, Any]:
    writers: dict[str, Log | Sqlite | Structlog] = {
        "log": Log(folder / "run"),
        "sqlite": Sqlite(folder / "log.db"),
        "structlog": Structlog(folder / "log.jsonl"),
    }
    took = written(writers, count, group)
    small_dir = folder / "small"
    written({"small": Log(small_dir)}, count // 10, group)
    parsed_s = parse_and_hash(folder / "run")
    verified_s, peak_mib = verified(_VERIFY, folder / "run")
    alone_s, alone_mib = verified(_ALONE, folder / "run")
    _, small_mib = verified(_VERIFY, small_dir)
    _, small_alone_mib = verified(_ALONE, small_dir)
    took_s = status(folder / "run")
    ratios = {
        "append_to_sqlite": took["log"] / took["sqlite"],
        "append_to_structlog": took["log"] / took["structlog"],
        "verify_to_json_and_sha256": verified_s / parsed_s,
        "status_s": took_s[len(took_s) // 2],
    }
    growth = 100 * (peak_mib / small_mib - 1)
    return {
        "records": count,
        "records_per_sync": group,
        "seconds": {
            "append": round(took["log"], 2),
            "sqlite": round(took["sqlite"], 2),
            "structlog": round(took["structlog"], 2),
            "verify": round(verified_s, 2),
            "verify_standalone": round(alone_s, 2),
            "json_and_sha256": round(parsed_s, 2),
            "status": [round(s, 3) for s in took_s],
        },
        "bytes": {
            "log": sum(path.stat().st_size for path in read.segments(folder / "run")),
            "sqlite": sum(path.stat().st_size for path in folder.glob("log.db*")),
            "structlog": (folder / "log.jsonl").stat().st_size,
        },
        "verify_peak_mib": {
            "a_tenth": round(small_mib, 1),
            "all": round(peak_mib, 1),
            "standalone_a_tenth": round(small_alone_mib, 1),
            "standalone_all": round(alone_mib, 1),
        },
        "append_to_sqlite_by_records_per_sync": by_group(folder, count),
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "targets": TARGETS | {"memory_growth_percent": MEMORY_GROWTH_PERCENT},
        "missed": [name for name, value in ratios.items() if value > TARGETS[name]]
        + (["memory_growth_percent"] if growth > MEMORY_GROWTH_PERCENT else []),
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--group", type=int, default=100, help="records that share one sync")
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure; default: here")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="audit-million-", dir=options.dir or Path.cwd()))
    try:
        results = measure(folder, options.records, options.group)
    finally:
        shutil.rmtree(folder)
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
