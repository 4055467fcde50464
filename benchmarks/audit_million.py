"""What a million records cost: to write, to verify, and to ask `loopguard status` about.

    python benchmarks/audit_million.py [--records 1000000] [--group 100] [--dir DIR]

Written in groups that share one sync, against SQLite (WAL, synchronous=FULL, a transaction for each group) and against
structlog, which writes JSON lines to a file and syncs nothing. All get the same dictionaries and make JSON of them.

    log                the audit log: every record in the file when `append` returns, in a chain, with checkpoints
    sqlite             what a record says, in columns; what never changes stands in another table once; no chain
    sqlite_chained     the same, with the SHA-256 of each row and of the row before
    sqlite_each        as `sqlite`, but a transaction for each record, so that none waits in the process; the sync for
                       each group, as the log does it
    sqlite_body_alone  time, cycle, type and body: the table that somebody would write who has no audit in mind
    structlog          a line with time, level and run; no chain, and gone after a power cut

A transaction of SQLite that is not committed is lost with its process; a record of the log that waits for its sync is
not. Verified against reading the same lines with json and hashing them with SHA-256. All on one disk, by turns; prints
one JSON object, with the seconds on the clock and those of the processor. Takes a few minutes and 3 GB.
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
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
    """What fits a question about calls into a table: time, cycle, type, body. A transaction for each group."""

    columns: tuple[str, ...] = ("ts", "cycle", "type", "body")
    encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode

    def __init__(self, path: Path) -> None:
        self.base = sqlite3.connect(path, isolation_level=None)
        self.base.execute("PRAGMA journal_mode=WAL")
        self.base.execute("PRAGMA synchronous=FULL")
        self.base.execute(f"CREATE TABLE log (seq INTEGER PRIMARY KEY, {', '.join(self.columns)})")
        self.insert = f"INSERT INTO log ({', '.join(self.columns)}) VALUES ({', '.join('?' * len(self.columns))})"

    def row(self, kind: str, body: dict[str, Any]) -> tuple[Any, ...]:
        return time.time_ns(), 1, kind, self.encode(body)

    def write(self, part: Iterable[tuple[str, dict[str, Any]]], group: int) -> None:
        self.base.execute("BEGIN")
        for number, (kind, body) in enumerate(part, 1):
            self.base.execute(self.insert, self.row(kind, body))
            if number % group == 0:
                self.base.execute("COMMIT")
                self.base.execute("BEGIN")
        self.base.execute("COMMIT")

    def close(self) -> None:
        self.base.close()


class SqliteSame(Sqlite):
    """What a record of the log says, in columns, and what is the same in all of them once, in another table."""

    columns = (*Sqlite.columns, "id", "mono_ns", "epoch", "cause", "redacted", "run")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.base.execute("CREATE TABLE run (run INTEGER PRIMARY KEY, log, policy, boot, actor)")
        same = ("bench/controller", POLICY, str(uuid.uuid4()), self.encode({"kind": "loop", "id": "loopguard/0.1.0"}))
        self.base.execute("INSERT INTO run (log, policy, boot, actor) VALUES (?, ?, ?, ?)", same)

    def row(self, kind: str, body: dict[str, Any]) -> tuple[Any, ...]:
        return *super().row(kind, body), os.urandom(16), time.monotonic_ns(), 0, "[]", "[]", 1


class SqliteEach(SqliteSame):
    """The same with the promise of the log: a record outlives its process at once, and a power cut from its sync on."""

    def write(self, part: Iterable[tuple[str, dict[str, Any]]], group: int) -> None:
        self.base.execute("PRAGMA synchronous=NORMAL")
        for number, (kind, body) in enumerate(part, 1):
            if number % group == 0:
                # In WAL mode a commit syncs the whole of the log with FULL, and nothing with NORMAL.
                self.base.execute("PRAGMA synchronous=FULL")
                self.base.execute(self.insert, self.row(kind, body))
                self.base.execute("PRAGMA synchronous=NORMAL")
            else:
                self.base.execute(self.insert, self.row(kind, body))


class SqliteChained(SqliteSame):
    """The same, and a hash over each row and the hash before it."""

    columns = (*SqliteSame.columns, "prev", "hash")
    prev = "0" * 64

    def row(self, kind: str, body: dict[str, Any]) -> tuple[Any, ...]:
        row = (*super().row(kind, body), self.prev)
        self.prev = hashlib.sha256(repr(row).encode()).hexdigest()
        return *row, self.prev


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


class Took(NamedTuple):
    """Seconds on the clock, and of the processor: what else the machine does meanwhile is in the first alone."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: Took) -> Took:  # type: ignore[override]
        return Took(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def to(self, other: Took) -> dict[str, float]:
        return {"clock": round(self.wall_s / other.wall_s, 2), "processor": round(self.cpu_s / other.cpu_s, 2)}


def timed(act: Callable[[], object]) -> Took:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    act()
    return Took(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def written(writers: dict[str, Log | Sqlite | Structlog], count: int, group: int) -> dict[str, Took]:
    """What each writer takes, by turns, so that what else the machine does meanwhile is shared out."""
    took = dict.fromkeys(writers, Took())
    streams = {name: records(count) for name in writers}
    for _ in range(0, count, -(-count // ROUNDS)):
        for name, writer in writers.items():
            part = list(itertools.islice(streams[name], -(-count // ROUNDS)))
            took[name] += timed(lambda writer=writer, part=part: writer.write(part, group))
    for writer in writers.values():
        writer.close()
    return took


def by_group(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """How many times as long as SQLite it takes, by records that share a sync; of some syncs each."""
    found = {}
    for group in GROUPS:
        home = folder / f"group-{group}"
        home.mkdir()
        writers = {"log": Log(home / "run"), "sqlite": SqliteSame(home / "log.db")}
        took = written(writers, min(count, SYNCS * group), group)
        found[str(group)] = took["log"].to(took["sqlite"])
    return found


def parse_and_hash(run_dir: Path) -> None:
    for path in read.segments(run_dir):
        with path.open("rb") as file:
            for line in file:
                json.loads(line)
                hashlib.sha256(line).digest()


_VERIFY = f"""
import json, resource, sys, time
{_PEAK}
from pathlib import Path
from loopguard.audit.verify import verify
start, cpu = time.perf_counter(), time.process_time()
code = verify(Path(sys.argv[1])).code
print(json.dumps([code, time.perf_counter() - start, time.process_time() - cpu, peak_mib()]))
"""
_ALONE = f"""
import json, resource, sys, time
{_PEAK}
from pathlib import Path
from loopguard.audit import standalone
start, cpu = time.perf_counter(), time.process_time()
code = standalone.verify(Path(sys.argv[1]), keys={{}})["code"]
print(json.dumps([code, time.perf_counter() - start, time.process_time() - cpu, peak_mib()]))
"""


def verified(script: str, run_dir: Path) -> tuple[Took, float]:
    """What a process takes that verifies and does nothing else, and its most memory in MiB."""
    done = subprocess.run([sys.executable, "-c", script, run_dir], capture_output=True, text=True, check=True)
    code, wall_s, cpu_s, peak = json.loads(done.stdout)
    assert code == 20, f"a log of the benchmark verifies as {code}"
    return Took(wall_s, cpu_s), peak


def status(run_dir: Path) -> list[Took]:
    """What `loopguard status` takes in a process of its own, imports included; the fastest first."""
    # With bytecode, as whatever is installed has it; a first call writes what is missing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "loopguard.cli", "status", run_dir]
    took = []
    for _ in range(TRIES + 1):
        before = os.times()
        wall_s = timed(lambda: subprocess.run(command, env=environment, capture_output=True, check=True)).wall_s
        after = os.times()
        cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        took.append(Took(wall_s, cpu_s))
    return sorted(took[1:])


def measure(folder: Path, count: int, group: int) -> dict[str, Any]:
    writers: dict[str, Log | Sqlite | Structlog] = {
        "log": Log(folder / "run"),
        "sqlite": SqliteSame(folder / "log.db"),
        "sqlite_each": SqliteEach(folder / "each.db"),
        "sqlite_chained": SqliteChained(folder / "chained.db"),
        "sqlite_body_alone": Sqlite(folder / "body.db"),
        "structlog": Structlog(folder / "log.jsonl"),
    }
    load = [round(os.getloadavg()[0], 1)]
    took = written(writers, count, group)
    load.append(round(os.getloadavg()[0], 1))
    small_dir = folder / "small"
    written({"small": Log(small_dir)}, count // 10, group)
    parsed = timed(lambda: parse_and_hash(folder / "run"))
    verifies, peak_mib = verified(_VERIFY, folder / "run")
    alone, alone_mib = verified(_ALONE, folder / "run")
    # Before and after, as the machine may have more to do at one time than at another.
    parsed += timed(lambda: parse_and_hash(folder / "run"))
    parsed = Took(parsed.wall_s / 2, parsed.cpu_s / 2)
    _, small_mib = verified(_VERIFY, small_dir)
    _, small_alone_mib = verified(_ALONE, small_dir)
    answers = status(folder / "run")
    answer = answers[len(answers) // 2]
    ratios = {name: took["log"].to(took[name]) for name in writers if name != "log"}
    reached = {
        "append_to_sqlite": ratios["sqlite"]["clock"],
        "append_to_structlog": ratios["structlog"]["clock"],
        # Both only compute: the processor's time says what the clock would say if nothing else ran.
        "verify_to_json_and_sha256": verifies.to(parsed)["processor"],
        "status_s": round(answer.wall_s, 3),
    }
    growth = 100 * (peak_mib / small_mib - 1)
    seconds = took | {"verify": verifies, "verify_standalone": alone, "json_and_sha256": parsed, "status": answer}
    return {
        "records": count,
        "records_per_sync": group,
        "seconds": {
            name: {"clock": round(of.wall_s, 2), "processor": round(of.cpu_s, 2)} for name, of in seconds.items()
        },
        "status_s": [round(one.wall_s, 3) for one in answers],
        "bytes": {
            "log": sum(path.stat().st_size for path in read.segments(folder / "run")),
            "sqlite": (folder / "log.db").stat().st_size,
            "sqlite_each": (folder / "each.db").stat().st_size,
            "sqlite_chained": (folder / "chained.db").stat().st_size,
            "sqlite_body_alone": (folder / "body.db").stat().st_size,
            "structlog": (folder / "log.jsonl").stat().st_size,
        },
        "verify_peak_mib": {
            "a_tenth": round(small_mib, 1),
            "all": round(peak_mib, 1),
            "standalone_a_tenth": round(small_alone_mib, 1),
            "standalone_all": round(alone_mib, 1),
        },
        "append_to_sqlite_by_records_per_sync": by_group(folder, count),
        "append_to": ratios,
        "verify_to_json_and_sha256": verifies.to(parsed),
        "verify_standalone_to_json_and_sha256": alone.to(parsed),
        "reached": reached,
        "targets": TARGETS | {"memory_growth_percent": MEMORY_GROWTH_PERCENT},
        "missed": [name for name, value in reached.items() if value > TARGETS[name]]
        + (["memory_growth_percent"] if growth > MEMORY_GROWTH_PERCENT else []),
        "machine": {
            "cores": os.cpu_count(),
            "load": load,
            "system": platform.platform(),
            "python": platform.python_version(),
        },
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
