"""What it costs that two ranks agree on every update.

A DDP step without a guard, with the bare reduction, with a guard, and with one that is asked between forward and
backward.

    python benchmarks/reduction.py [--steps 200] [--width 512] [--layers 8]

Starts two ranks over gloo on this machine and prints one JSON object. The four loops take turns step by step, so that
whatever else the machine does falls on all of them; `more_ms` is the median of the differences within a turn. All of it
is of rank 0. With fewer free cores than ranks it says more about the machine than about the guard.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from loopguard import LoopGuard
from loopguard.testing import fake_runtimes

POLICY = """
apiVersion: loopguard/v1
name: reduction
tools:
  rules:
    - {id: calculator, tool: python, then: run, sandbox: offline}
  freeze_above: {refused_share: 0.5, contained_share: 0.5, of_last_calls: 20}
sandbox:
  profiles:
    offline: {image: "loopguard/python:1"}
data:
  sources: [human, model]
  recheck: {sample: 1, max_wrong_share: 0.5}
  freeze_above: {quarantined_share: 0.5, of_at_least: 2}
updates:
  loss_kind: discrete
  monitors:
    - {kind: bounds, metric: loss}
    - {kind: bounds, metric: grad_norm, min: 0}
promotion:
  panel:
    - {metric: correct, good: up, min: 0, max: 1, max_gain: 1, max_loss: 1}
"""


class Loop:
    """One model under DDP, stepped with or without a guard."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(options.width, options.width) for _ in range(options.layers)]
        self.bare = torch.nn.Sequential(*layers)
        self.model = DistributedDataParallel(self.bare)
        self.optimizer = torch.optim.AdamW(self.bare.parameters(), fused=True)
        self.batch = torch.randn(32, options.width)

    def loss(self) -> torch.Tensor:
        return self.model(self.batch).square().mean()

    def step(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.bare.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Reduced(Loop):
    """Without a guard, and with the bare reduction where a guard has it."""

    def __init__(self, options: argparse.Namespace, peers: Any) -> None:
        super().__init__(options)
        self.peers = peers

    def step(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.bare.parameters(), 1.0)
        self.peers.finish(self.peers.start([0, 8, -8, 0, 0]))
        self.optimizer.step()
        self.optimizer.zero_grad()


class Guarded(Loop):
    """The same under a guard."""

    def __init__(self, options: argparse.Namespace, folder: Path, *, early: bool) -> None:
        super().__init__(options)
        self.early = early
        policy = folder / f"policy-{early}-{dist.get_rank()}.yaml"
        policy.write_text(POLICY)
        self.guard = LoopGuard.from_file(policy, run_dir=folder / f"run-{early}", runtimes=fake_runtimes("4"))
        self.guard.attach(model=self.bare, optimizer=self.optimizer)
        self.cycle = next(self.guard.cycles(1))

    def step(self) -> None:
        loss = self.loss()
        if self.early:
            self.cycle.forward(loss=loss)
        loss.backward()
        self.cycle.update(loss=loss, clip_norm=1.0)


def medians_ms(loops: dict[str, Loop], steps: int) -> dict[str, dict[str, float]]:
    """Of each loop, and what it takes more than the first. Their order changes from turn to turn."""
    took: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for turn in range(steps + 10):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            start = time.perf_counter()
            loops[name].step()
            if turn >= 10:
                took[name].append((time.perf_counter() - start) * 1000)
    bare = took[names[0]]
    more = {name: statistics.median(a - b for a, b in zip(took[name], bare, strict=True)) for name in names[1:]}
    return {
        "step_ms": {name: round(statistics.median(times), 3) for name, times in took.items()},
        "more_ms": {name: round(difference, 3) for name, difference in more.items()},
    }


def median_us(act: Callable[[], Any], count: int = 500) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        act()
        times.append((time.perf_counter() - start) * 1e6)
    return round(statistics.median(times), 1)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    after, early = Guarded(options, folder, early=False), Guarded(options, folder, early=True)
    peers = after.guard._consensus.peers
    reduction_us = median_us(lambda: peers.finish(peers.start([0, 8, -8, 0, 0])))
    loops = {"no_guard": Loop(options), "reduction_alone": Reduced(options, peers)}
    loops |= {"agreed_in_update": after, "asked_in_forward": early}
    steps = medians_ms(loops, options.steps)
    for loop in (after, early):
        loop.guard.close()
    parameters = sum(parameter.numel() for parameter in early.bare.parameters())
    dist.destroy_process_group()
    return {"reduction_us": reduction_us, **steps, "parameters": parameters}


def machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def start_ranks(arguments: list[str]) -> int:
    """Two of this script, under torchrun."""
    with tempfile.TemporaryDirectory(prefix="reduction-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "REDUCTION_FOLDER": folder}
        return subprocess.run([*command, *arguments], env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs that two ranks agree on every update.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(start_ranks(sys.argv[1:]))
    result = measure(options, Path(os.environ["REDUCTION_FOLDER"]))
    if os.environ["RANK"] == "0":
        print(json.dumps({"ranks": 2, **result, "machine": machine()}, indent=1))


if __name__ == "__main__":
    main()
