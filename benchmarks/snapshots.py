"""What a snapshot costs: in memory, off the training thread, on disk, beside copy.deepcopy and torch.save.

    python benchmarks/snapshots.py [--layers 8] [--device cpu] [--repeats 5] [--dir DIR]

Prints one JSON object; times are medians in milliseconds. Run it on the disk that holds your runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loopguard.integrations.torch.optimizers import put_back
from loopguard.snapshots import Ring, SnapshotStore, Tape, Writer

WIDTH = 512


class Training:
    def __init__(self, layers: int, device: str) -> None:
        torch.manual_seed(0)
        block = torch.nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, batch_first=True)
        self.model = torch.nn.TransformerEncoder(block, layers, enable_nested_tensor=False).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randn(4, 64, WIDTH, device=device)

    def update(self) -> None:
        loss = (self.model(self.batch) - self.batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"python": random.getstate(), "torch": torch.get_rng_state()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        put_back(self.optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"]["torch"])


def took_ms(act: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def median_ms(act: Callable[[], object], repeats: int, device: str) -> float:
    return round(statistics.median(took_ms(act, device) for _ in range(repeats)), 2)


def in_memory(training: Training, ring: Ring, repeats: int, device: str) -> dict[str, float]:
    def turn() -> None:
        ring.approve(ring.take(training.state(), {}))

    first = round(took_ms(turn, device), 2)
    turn()
    slot = ring.take(training.state(), {})

    def approve() -> None:
        for _ in range(1000):
            ring.approve(slot)

    results = {
        "take_first": first,
        "take": median_ms(lambda: ring.take(training.state(), {}), repeats, device),
        "deepcopy": median_ms(lambda: copy.deepcopy(training.state()), repeats, device),
    }
    ring.approve(slot := ring.take(training.state(), {}))
    results["approve"] = round(median_ms(approve, repeats, device) / 1000, 5)
    results["restore"] = median_ms(lambda: training.restore(slot.state()), repeats, device)
    if device == "cuda":
        # What the thread that trains waits for: the copies go on behind it.
        torch.cuda.synchronize()
        start = time.perf_counter()
        ring.take(training.state(), {})
        results["take_until_it_returns"] = round((time.perf_counter() - start) * 1000, 2)
    return results


def on_disk(training: Training, ring: Ring, folder: Path, repeats: int, device: str) -> dict[str, float]:
    store = SnapshotStore(folder / "snapshots")
    slot = ring.take(training.state(), {})
    digests: list[str] = []
    path = folder / "state.pt"

    def save() -> None:
        with path.open("wb") as file:
            torch.save(training.state(), file)
            file.flush()
            os.fsync(file.fileno())

    def write() -> None:
        digests.append(store.write(slot, {"turn": len(digests)}))
        store.prune(keep={digests[-1]})

    return {
        "write": median_ms(write, repeats, device),
        "torch_save_and_sync": median_ms(save, repeats, device),
        "read_and_verify": median_ms(lambda: store.read(digests[-1]), repeats, device),
        "torch_load": median_ms(lambda: torch.load(path, weights_only=False), repeats, device),
    }


def beside_training(training: Training, ring: Ring, folder: Path, repeats: int, device: str) -> dict[str, Any]:
    """Updates in turn with and without a writer that never rests: the worst that a snapshot can do to an update."""
    store = SnapshotStore(folder / "beside")
    ring.approve(slot := ring.take(training.state(), {}))
    alone: list[float] = []
    beside: list[float] = []
    waits: list[float] = []
    stop, writing, count = threading.Event(), threading.Event(), 0

    def write_on() -> None:
        nonlocal count
        while not stop.is_set():
            writing.wait()
            with Writer(store) as writer:
                store.prune(keep={writer.submit(slot, {"turn": count}).wait()})
            count += 1

    thread = threading.Thread(target=write_on)
    thread.start()
    for _ in range(2 * repeats):
        writing.clear()
        time.sleep(1)  # the write under way ends
        alone += [took_ms(training.update, device) for _ in range(2)]
        writing.set()
        beside += [took_ms(training.update, device) for _ in range(2)]
        with _Gaps() as watch:
            time.sleep(0.3)
        waits.append(watch.longest_ms)
    stop.set()
    thread.join()
    return {
        "update": round(statistics.median(alone), 1),
        "update_while_writing": round(statistics.median(beside), 1),
        "ratio": round(statistics.median(beside) / statistics.median(alone), 3),
        "snapshots_written": count,
        "longest_wait_for_the_interpreter": round(statistics.median(waits), 1),
    }


class _Gaps:
    """How long a thread that only wants the interpreter for a moment has to wait for it."""

    def __enter__(self) -> _Gaps:
        self.longest_ms = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(0.001):
            now = time.perf_counter()
            self.longest_ms = max(self.longest_ms, (now - last) * 1000)
            last = now


def of_the_tape(repeats: int, device: str) -> dict[str, float]:
    tape = Tape(limit_bytes=1 << 30)
    batch = {name: torch.zeros(4, 64, dtype=torch.long, device=device) for name in ("input_ids", "mask", "labels")}

    def a_thousand() -> None:
        for number in range(1000):
            tape.keep(batch, {"python": random.getstate(), "torch": torch.get_rng_state()})
            tape.settle(number, {"loss": 1.0, "grad_norm": 2.0}, clip_norm=1.0, decision="allow")
        tape.restart()

    def generators() -> None:
        for _ in range(1000):
            random.getstate(), torch.get_rng_state()

    return {
        "keep_and_settle_us": median_ms(a_thousand, repeats, device),
        "of_which_asking_the_generators_us": median_ms(generators, repeats, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="3.15 million parameters each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure; default: here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    training, ring = Training(options.layers, options.device), Ring()
    training.update()
    folder = Path(tempfile.mkdtemp(prefix="snapshots-", dir=options.dir or Path.cwd()))
    try:
        results = {
            "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
            "memory_ms": in_memory(training, ring, options.repeats, options.device),
            "state_mb": round(ring.take(training.state(), {}).bytes / 1e6, 1),
            "disk_ms": on_disk(training, ring, folder, options.repeats, options.device),
            "beside_training_ms": beside_training(training, ring, folder, options.repeats, options.device),
            "tape": of_the_tape(options.repeats, options.device),
            "machine": _machine(options.device),
        }
    finally:
        shutil.rmtree(folder)
    json.dump(results, sys.stdout, indent=2)
    print()


def _machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"cores": os.cpu_count(), "threads_of_torch": torch.get_num_threads()}
    facts |= {"system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    facts["load_average"] = round(os.getloadavg()[0], 1)
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


if __name__ == "__main__":
    main()
