"""What the update gate costs: a bare training step beside a guarded one, and the monitors alone.

    python benchmarks/gate_cost.py [--steps 140] [--tokens 256] [--threads N] [--cpu]

A transformer with ten million parameters takes each step twice, in turns: bare (backward, clip_grad_norm_, step,
schedule, zero_grad) and through `cycle.update`, with a real log, a lease every 64 updates, a batch kept for the
capsule, and eight metrics that each have a `bounds` and a `jump`. Prints one JSON object:

- `step_ms`: medians of the whole step, and their ratio. On a busy machine their noise is larger than what is measured.
- `in_guard`: the time between the loop's calls of the guard and their returns, less what torch took in between for work
  that a bare step has as well: its large functions are timed inside of the guard, and what a bare step spends around
  them is taken off. The mean counts syncs and snapshots, and whatever else the machine did meanwhile.
- `monitors_us`: one metric of one update, in the gate and in each kind of monitor.
- `see_ms`, with --observe: one update of a framework's trainer, by how many metrics it reports, log included.
- `same_bits`: whether both ended with the same weights and optimizer state.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopguard import monitors
from loopguard.controller import LoopGuard
from loopguard.gates.updates import UpdateGate
from loopguard.integrations.torch import steps as guarded_steps
from loopguard.integrations.torch.digest import sha256
from loopguard.policy.load import load
from loopguard.testing import fake_runtimes

EXTRA = ("accuracy", "entropy", "kl", "reward", "length", "ratio")
CPU_TIME = "--cpu" in sys.argv
VOCABULARY, WIDTH, LAYERS = 512, 320, 8
POLICY = """
apiVersion: loopguard/v1
name: gate-cost
tools:
  rules:
    - {id: calculator, tool: python, then: run, sandbox: offline}
sandbox:
  profiles:
    offline: {image: "loopguard/python:1"}
data:
  sources: [human, model]
updates:
  loss_kind: discrete
  monitors:
"""
PROMOTION = """
promotion:
  panel:
    - {metric: correct, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.2}
"""


def policy(folder: Path) -> Path:
    lines = []
    for metric in ("loss", "grad_norm", *EXTRA):
        good = "" if metric in {"loss", "grad_norm"} else ", good: none"
        lines += [f"    - {{kind: bounds, metric: {metric}}}", f"    - {{kind: jump, metric: {metric}{good}}}"]
    path = folder / "policy.yaml"
    path.write_text(POLICY + "\n".join(lines) + PROMOTION)
    return path


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:  # noqa: N803 - batch, time
        logits_BTV = self.head(self.body(self.embed(tokens_BT)))  # noqa: N806
        return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def clock() -> float:
    """Wall time; with `--cpu` the time that this thread computed, which a busy machine disturbs less."""
    return time.thread_time() if CPU_TIME else time.perf_counter()


class Training:
    """A model with its optimizer and schedule, made from one seed."""

    def __init__(self, kernel: dict[str, bool]) -> None:
        torch.manual_seed(0)
        self.model = Transformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.1, **kernel)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10_000)

    def backward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss = self.model(tokens)
        loss.backward()
        return loss

    def digest(self) -> str:
        return sha256([self.model.state_dict(), self.optimizer.state_dict()])


class Stopwatch:
    """Adds up the time that is spent in functions which a bare step calls as well."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            start, self._depth = clock(), self._depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.total_s += clock() - start

        return inner


@contextmanager
def watching(stopwatch: Stopwatch, training: Training) -> Iterator[None]:
    """Time the norm, the clipping, the optimizer's own work, the schedule and the zeroing, wherever they are called."""
    clip_grad = sys.modules["torch.nn.utils.clip_grad"]  # what clip_grad_norm_ is made of
    adam = sys.modules["torch.optim.adam"]
    places = [
        (guarded_steps, "get_total_norm"),
        (guarded_steps, "clip_grads_with_norm_"),
        (clip_grad, "_get_total_norm"),
        (clip_grad, "_clip_grads_with_norm_"),
        (adam, "adam"),
        (training.optimizer, "_init_group"),
        (training.optimizer, "zero_grad"),
        (training.schedule, "step"),
    ]
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, stopwatch.timed(function))
    try:
        yield
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def bare_step(training: Training, tokens: torch.Tensor, stopwatch: Stopwatch) -> tuple[float, float]:
    """Seconds of the whole step, and of what it does after backward besides torch's large functions."""
    start = clock()
    loss = training.backward(tokens)
    after, stopwatch.total_s = clock(), 0.0
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    training.schedule.step()
    training.optimizer.zero_grad()
    loss.item()  # every loop looks at its loss
    end = clock()
    return end - start, end - after - stopwatch.total_s


def guarded_step(training: Training, cycle: Any, tokens: torch.Tensor, stopwatch: Stopwatch) -> tuple[float, float]:
    """Seconds of the whole step, and of what the guard does in it besides torch's large functions."""
    start = clock()
    cycle.keep(tokens)
    kept = clock()
    loss = training.backward(tokens)
    after, stopwatch.total_s = clock(), 0.0
    cycle.update(loss=loss, clip_norm=1.0, readings=dict.fromkeys(EXTRA, 0.5 + random.random() / 100))
    end = clock()
    return end - start, (kept - start) + (end - after) - stopwatch.total_s


def opened(folder: Path, *, observe: bool) -> Any:
    if observe:
        return LoopGuard.observe(folder / "run", quiet=True)
    return LoopGuard.from_file(policy(folder), run_dir=folder / "run", runtimes=fake_runtimes(""))


def measure(kernel: dict[str, bool], *, steps: int, tokens: int, observe: bool) -> dict[str, Any]:
    bare, guarded, stopwatch = Training(kernel), Training(kernel), Stopwatch()
    batches = torch.Generator().manual_seed(1)
    bare_s: list[tuple[float, float]] = []
    guarded_s: list[tuple[float, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="gate-cost-", dir=Path.cwd()) as folder,
        opened(Path(folder), observe=observe) as guard,
    ):
        guard.attach(model=guarded.model, optimizer=guarded.optimizer, scheduler=guarded.schedule)
        cycle = next(iter(guard.cycles(1)))
        for index in range(steps):
            batch = torch.randint(VOCABULARY, (max(1, tokens // 64), 64), generator=batches)
            for turn in ("bare", "guarded") if index % 2 else ("guarded", "bare"):
                if turn == "bare":
                    with watching(stopwatch, bare):
                        bare_s.append(bare_step(bare, batch, stopwatch))
                else:
                    with watching(stopwatch, guarded):
                        guarded_s.append(guarded_step(guarded, cycle, batch, stopwatch))
        same = bare.digest() == guarded.digest()
    warm = max(3, steps // 10)  # first steps make the optimizer's state
    (bare_steps, around), (guarded_steps_s, with_guard) = (
        zip(*bare_s[warm:], strict=True),
        zip(*guarded_s[warm:], strict=True),
    )
    step, torchs_own = statistics.median(bare_steps), statistics.median(around)
    inside = [seconds - torchs_own for seconds in with_guard]
    return {
        "parameters": sum(p.numel() for p in bare.model.parameters()),
        "step_ms": {
            "bare": round(step * 1e3, 2),
            "guarded": round(statistics.median(guarded_steps_s) * 1e3, 2),
            "ratio": round(statistics.median(guarded_steps_s) / step, 4),
        },
        "in_guard": {
            "median_us": round(statistics.median(inside) * 1e6),
            "mean_us": round(statistics.fmean(inside) * 1e6),
            "largest_us": round(max(inside) * 1e6),
            "median_share_of_bare_step": round(statistics.median(inside) / step, 5),
            "mean_share_of_bare_step": round(statistics.fmean(inside) / step, 5),
        },
        "same_bits": same,
    }


def per_metric(reads: int = 20_000) -> dict[str, float]:
    """Microseconds for one metric of one update: in the gate, and in a monitor of each kind."""
    noise = random.Random(0)
    values = [1.0 + noise.gauss(0, 0.05) for _ in range(reads)]
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(policy(Path(folder))).policy
    gate = UpdateGate(loaded.updates, loaded.freeze)
    names = ("loss", "grad_norm", *EXTRA)
    start = clock()
    for at, value in enumerate(values, 1):
        gate.decide(dict.fromkeys(names, value), update=at, armed=True)
    found = {"gate_bounds_and_jump": (clock() - start) / reads / len(names) * 1e6}
    for kind, settings in KINDS.items():
        monitor = monitors.build(kind, metric="loss", **settings)
        start = clock()
        for at, value in enumerate(values, 1):
            monitor.read(value, at=at)
        found[kind] = (clock() - start) / reads * 1e6
    return {name: round(us, 2) for name, us in found.items()}


def per_update(names: Sequence[str], updates: int = 20_000) -> float:
    """Milliseconds for an update that an observer is told of."""
    noise = random.Random(0)
    told = [{name: 1.0 + noise.gauss(0, 0.05) for name in names} for _ in range(updates)]
    with (
        tempfile.TemporaryDirectory(prefix="gate-cost-", dir=Path.cwd()) as folder,
        opened(Path(folder), observe=True) as observer,
    ):
        start = clock()
        for readings in told:
            observer.see(readings)
        seconds = clock() - start
    return round(seconds / updates * 1e3, 3)


FEW = ("loss", "grad_norm")
GRPO = (
    *FEW,
    "clip_ratio/high_max",
    "clip_ratio/high_mean",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/region_mean",
    "completions/clipped_ratio",
    "completions/max_length",
    "completions/mean_length",
    "completions/min_length",
    "entropy",
    "frac_reward_zero_std",
    "kl",
    "num_tokens",
    "reward",
    "reward_std",
    "step_time",
    "tools/failure_frequency",
)
"""What GRPO reports with a reference model and a tool."""

KINDS: dict[str, dict[str, Any]] = {
    "bounds": {},
    "jump": {"good": "down", "every": 1e5},
    "drift": {"good": "down", "every": 1e5},
    "variance": {"every": 1e5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=140, help="the default spans two leases")
    parser.add_argument("--tokens", type=int, default=256, help="in one batch; fewer make the guard's share larger")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--observe", action="store_true", help="measure an observer in place of a guard")
    parser.add_argument("--cpu", action="store_true", help="count what the thread computes; with --threads 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = {"steps": options.steps, "tokens": options.tokens, "observe": options.observe}
    results = {
        "tokens": options.tokens,
        "clock": "cpu" if CPU_TIME else "wall",
        "fused": measure({"fused": True}, **shape),
        "foreach": measure({"foreach": True}, **shape),
        "monitors_us": per_metric(),
        **({"see_ms": {str(len(names)): per_update(names) for names in (FEW, GRPO)}} if options.observe else {}),
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
    }
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
