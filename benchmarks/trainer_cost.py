"""What a guard costs inside of a transformers Trainer: a bare one, a guarded one and an observed one, step by step.

    python benchmarks/trainer_cost.py [--steps 80] [--tokens 256] [--threads N]

Three Trainers of one GPT-2 with ten million parameters run in three threads that take turns after every step, so that
whatever the machine does besides disturbs all of them alike. With a real log, a lease every 64 updates, batches kept
for the capsule, and five monitors. Prints one JSON object:

- `step_ms`: medians of the whole step of each, and their ratio to the bare one. On a busy machine their noise is larger
  than what is measured.
- `in_guard`: the time spent in what the guard put on its Trainer, less what runs in there in a bare step as well: the
  wrapped methods themselves and the optimizer's kernel. Zeroing the gradients is counted, although it spares the
  Trainer's own. The mean counts syncs and snapshots.
- `same_bits`: whether all three ended with the same weights and optimizer state.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loopguard.controller import LoopGuard
from loopguard.integrations.torch.digest import sha256
from loopguard.integrations.transformers.attached import Guarded, Observed
from loopguard.testing import fake_runtimes

warnings.filterwarnings("ignore", message=".*pin_memory.*")
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY, WIDTH, LAYERS, LENGTH = 512, 320, 8, 64
POLICY = """
apiVersion: loopguard/v1
name: trainer-cost
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
    - {kind: bounds, metric: loss}
    - {kind: bounds, metric: grad_norm, min: 0}
    - {kind: jump, metric: loss}
    - {kind: drift, metric: loss}
    - {kind: variance, metric: loss}
promotion:
  panel:
    - {metric: eval_loss, good: down, min: 0, max_gain: 1, max_loss: 1}
"""
NAMES = ("bare", "guarded", "observed")
EVENTS = ("on_step_begin", "on_optimizer_step", "on_step_end")
AROUND = ("_around_training_step", "_around_compute_loss", "_around_clip")


class Stopwatch:
    """Time spent in the guard: it runs inside of an entry, and stands still in what is not the guard's."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._since: float | None = None

    def entry(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._switched(function, on=True)

    def foreign(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._switched(function, on=False)

    def _switched(self, function: Callable[..., Any], *, on: bool) -> Callable[..., Any]:
        def switched(*args: Any, **kwargs: Any) -> Any:
            was = self._switch(on=on)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(on=was)

        return switched

    def _switch(self, *, on: bool) -> bool:
        now, was = time.perf_counter(), self._since is not None
        if self._since is not None:
            self.total_s += now - self._since
        self._since = now if on else None
        return was


class Timed:
    """Beside `Guarded` or `Observed`: whatever it puts on the Trainer is timed."""

    def watch(self) -> Stopwatch:
        stopwatch = Stopwatch()
        for name in AROUND:
            setattr(self, name, self._timed_around(stopwatch, getattr(self, name)))
        if hasattr(self, "_around_step"):
            self._around_step = stopwatch.entry(self._around_step)
        for name in EVENTS:
            setattr(self, name, stopwatch.entry(getattr(self, name)))
        return stopwatch

    @staticmethod
    def _timed_around(stopwatch: Stopwatch, around: Callable[..., Any]) -> Callable[..., Any]:
        def timed(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return stopwatch.entry(around)(stopwatch.foreign(inner), *args, **kwargs)

        return timed


class TimedGuarded(Timed, Guarded):
    """A guard on a Trainer, timed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopwatch = self.watch()
        super().__init__(*args, **kwargs)


class TimedObserved(Timed, Observed):
    """An observer on a Trainer, timed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopwatch = self.watch()
        super().__init__(*args, **kwargs)


class Turns(TrainerCallback):
    """Lets one Trainer take a step while the others wait, and times the step."""

    def __init__(self, own: int, batons: list[threading.Semaphore]) -> None:
        self.own, self.batons = own, batons
        self.step_s: list[float] = []
        self.in_guard_s: list[float] = []
        self.stopwatch: Stopwatch | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.batons[self.own].acquire()
        if self.stopwatch is not None:
            self.stopwatch.total_s = 0.0
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_s.append(time.perf_counter() - self.start)
        if self.stopwatch is not None:
            self.in_guard_s.append(self.stopwatch.total_s)
        self.pass_on()

    def pass_on(self) -> None:
        self.batons[(self.own + 1) % len(self.batons)].release()


def trainer(folder: Path, *, steps: int, tokens: int, fused: bool) -> Trainer:
    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=LAYERS, n_head=8, n_embd=WIDTH, n_positions=LENGTH, vocab_size=VOCABULARY, **still)
    )
    draw, size = torch.Generator().manual_seed(1), max(1, tokens // LENGTH)
    rows = torch.randint(VOCABULARY, (steps * size, LENGTH), generator=draw)
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim="adamw_torch_fused" if fused else "adamw_torch",
        per_device_train_batch_size=size,
        max_steps=steps,
        learning_rate=3e-4,
        weight_decay=0.1,
        logging_steps=10_000,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    made = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    made.remove_callback(PrinterCallback)
    return made


def measure(*, steps: int, tokens: int, fused: bool) -> dict[str, Any]:
    batons = [threading.Semaphore(1), threading.Semaphore(0), threading.Semaphore(0)]
    turns = [Turns(own, batons) for own in range(3)]
    with tempfile.TemporaryDirectory(prefix="trainer-cost-") as name:
        folder = Path(name)
        (folder / "policy.yaml").write_text(POLICY)
        trainers = [trainer(folder / one, steps=steps, tokens=tokens, fused=fused) for one in NAMES]
        guard = LoopGuard.from_file(folder / "policy.yaml", run_dir=folder / "run", runtimes=fake_runtimes(""))
        observer = LoopGuard.observe(folder / "look", quiet=True)
        with guard, observer:
            attached = [None, TimedGuarded(guard, trainers[1], config=None), TimedObserved(observer, trainers[2])]
            adam = sys.modules["torch.optim.adam"]
            kernel = adam.adam
            for one, turn, put in zip(trainers, turns, attached, strict=True):
                # Its clock starts after, and stops before, what the guard does at the same event: so it goes around.
                one.callback_handler.callbacks.insert(0, _Begin(turn))
                one.add_callback(_End(turn))
                turn.stopwatch = put.stopwatch if put is not None else None
            try:
                adam.adam = _foreign_of_the_one_running(kernel, turns)
                run_in_turns(trainers, turns)
            finally:
                adam.adam = kernel
            digests = {sha256([one.model.state_dict(), one.optimizer.state_dict()]) for one in trainers}
    warm = max(3, steps // 10)  # first steps make the optimizer's state
    bare = statistics.median(turns[0].step_s[warm:])
    return {
        "parameters": sum(p.numel() for p in trainers[0].model.parameters()),
        "step_ms": {
            name: {"median": round(median * 1e3, 2), "to_bare": round(median / bare, 4)}
            for name, median in ((n, statistics.median(t.step_s[warm:])) for n, t in zip(NAMES, turns, strict=True))
        },
        "in_guard": {
            name: {
                "median_us": round(statistics.median(turn.in_guard_s[warm:]) * 1e6),
                "mean_us": round(statistics.fmean(turn.in_guard_s[warm:]) * 1e6),
                "median_share_of_bare_step": round(statistics.median(turn.in_guard_s[warm:]) / bare, 5),
                "mean_share_of_bare_step": round(statistics.fmean(turn.in_guard_s[warm:]) / bare, 5),
            }
            for name, turn in zip(NAMES[1:], turns[1:], strict=True)
        },
        "same_bits": len(digests) == 1,
    }


class _Begin(TrainerCallback):
    def __init__(self, turn: Turns) -> None:
        self.on_step_begin = turn.on_step_begin


class _End(TrainerCallback):
    def __init__(self, turn: Turns) -> None:
        self.on_step_end = turn.on_step_end


def _foreign_of_the_one_running(kernel: Callable[..., Any], turns: list[Turns]) -> Callable[..., Any]:
    """The optimizer's kernel, during which the stopwatch of whoever calls it stands still."""

    def called(*args: Any, **kwargs: Any) -> Any:
        running = next((turn.stopwatch for turn in turns if turn.stopwatch and turn.stopwatch._since is not None), None)
        return running.foreign(kernel)(*args, **kwargs) if running else kernel(*args, **kwargs)

    return called


def run_in_turns(trainers: list[Trainer], turns: list[Turns]) -> None:
    troubles: list[BaseException] = []

    def train(one: Trainer, turn: Turns) -> None:
        try:
            one.train()
        except BaseException as error:  # noqa: BLE001 - raised again below
            troubles.append(error)
        finally:
            for _ in range(len(one.train_dataset)):
                turn.pass_on()  # whoever still waits for this one need not

    threads = [threading.Thread(target=train, args=both, daemon=True) for both in zip(trainers, turns, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if troubles:
        raise troubles[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="the default spans two leases")
    parser.add_argument("--tokens", type=int, default=256, help="in one batch; fewer make the guard's share larger")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = {"steps": options.steps, "tokens": options.tokens}
    results = {
        "tokens": options.tokens,
        "fused": measure(fused=True, **shape),
        "foreach": measure(fused=False, **shape),
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
