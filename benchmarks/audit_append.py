"""How fast records become durable: one writer with a sync for each, and eight threads that share their syncs.

    python benchmarks/audit_append.py [--seconds 5] [--dir DIR]

Prints one JSON object. Run it on the disk that holds your runs: the numbers are those of its sync.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.audit.verify import verify

BODY = {
    "call": "0" * 32,
    "tool": "python",
    "code_sha256": "0" * 64,
    "code_head": "print(48 / 2)",
    "result": "allow",
    "rule": "calculator",
    "reason": "rule calculator allows it",
}
THREADS = 8


def writer(log: AuditLog, until: float, waits_ms: list[float]) -> None:
    while time.perf_counter() < until:
        start = time.perf_counter()
        log.append("tool.decided", BODY, cycle=1)
        waits_ms.append((time.perf_counter() - start) * 1000)


def measure(folder: Path, threads: int, seconds: float) -> dict[str, float]:
    waits_ms: list[float] = []
    with AuditLog.open(folder, run_id="bench", policy="", reserve_mib=1) as log:
        start = time.perf_counter()
        workers = [threading.Thread(target=writer, args=(log, start + seconds, waits_ms)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took_s = time.perf_counter() - start
    waits_ms.sort()
    return {
        "records_per_s": round(len(waits_ms) / took_s),
        "wait_ms_median": round(statistics.median(waits_ms), 3),
        "wait_ms_p99": round(waits_ms[int(len(waits_ms) * 0.99)], 3),
    }


def reading(folder: Path, records: int = 30_000) -> dict[str, float]:
    with AuditLog.open(folder, run_id="bench", policy="", reserve_mib=1) as log:
        for _ in range(records):
            log.append("tool.decided", BODY, cycle=1, sync=False)
    times = {}
    for name, act in (
        ("reopen_s", lambda: AuditLog.open(folder, run_id="bench", policy="", reserve_mib=1).close()),
        ("verify_s", lambda: verify(folder)),
        ("last_s", lambda: read.last(folder)),
    ):
        start = time.perf_counter()
        act()
        times[name] = round(time.perf_counter() - start, 4)
    return {"records": records, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure; default: here")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="audit-append-", dir=options.dir or Path.cwd()))
    try:
        alone = measure(folder / "alone", 1, options.seconds)
        together = measure(folder / "together", THREADS, options.seconds)
        results = {
            "one_writer": alone,
            f"{THREADS}_threads": together,
            "ratio": round(together["records_per_s"] / alone["records_per_s"], 2),
            "reading": reading(folder / "reading"),
            "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        }
    finally:
        shutil.rmtree(folder)
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
