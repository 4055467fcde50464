"""One rank of small guarded loops: python rank_loop.py FOLDER PLANS, under torchrun or with RANK and the like set.

PLANS is a JSON list, run one after the other; `DEFAULTS` says what may be in a plan. Each has a folder of its name with
its run directory, and what the rank came to is written there to `<rank>-<start>.json`, where `start` counts restarts.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loopguard import LoopGuard
from loopguard.errors import LoopFrozen, LoopGuardError
from loopguard.state import set_latch
from loopguard.testing import fake_runtimes
from loopguard.types import Provenance, Record

DEFAULTS = {
    "name": "run",
    "goes_on": None,  # the name of the plan whose run directory this one goes on with
    "spread": "ddp",  # or fsdp
    "optimizer": "adamw",  # or fused, sgd
    "guard": True,
    "late": False,
    "forward": False,
    "freeze": "when_frozen: raise",
    "max_norm": 1000,
    "cycles": 2,
    "updates": 4,
    "micro": 1,
    "clip": None,
    "policy_tail": {},  # by rank: what stands at the end of its policy
    "factor": {},  # by "rank/update": what the loss is multiplied with
    "panel": {},  # by "rank/cycle": what `correct` comes to
    "say": {},  # by "rank/update": something else to do right before the update
    "say_late": {},  # the same, between backward and the update
    "first_start_only": True,  # whether the four above are for the start before any restart alone
}

POLICY = """
apiVersion: loopguard/v1
name: ranks
tools:
  rules:
    - {{id: calculator, tool: python, then: run, sandbox: offline}}
  freeze_above: {{refused_share: 0.5, contained_share: 0.5, of_last_calls: 20}}
sandbox:
  profiles:
    offline: {{image: "loopguard/python:1"}}
data:
  sources: [human, model]
  forbidden_in_prompt: ["<<"]
  recheck: {{sample: 1, max_wrong_share: 0.5}}
  freeze_above: {{quarantined_share: 0.5, of_at_least: 2}}
updates:
  loss_kind: discrete
  lease: 3
  monitors:
    - {{kind: bounds, metric: loss, max: 50}}
    - {{kind: bounds, metric: grad_norm, min: 0, max: {max_norm}}}
promotion:
  panel:
    - {{metric: correct, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.2}}
freeze: {{{freeze}}}
"""


class Run:
    def __init__(self, folder: Path, plan: dict) -> None:
        self.plan = DEFAULTS | plan
        self.folder = folder / self.plan["name"]
        self.folder.mkdir(exist_ok=True)
        self.run_dir = folder / (self.plan["goes_on"] or self.plan["name"]) / "run"
        policy = POLICY.format(freeze=self.plan["freeze"], max_norm=self.plan["max_norm"])
        self.policy = self.folder / f"policy-{dist.get_rank()}.yaml"
        self.policy.write_text(policy + self.plan["policy_tail"].get(str(dist.get_rank()), ""))
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.told = {"start": self.start, "applied": 0, "digests": [], "losses": [], "results": [], "error": ""}
        self.build()

    def build(self) -> None:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        if self.plan["spread"] == "ddp":
            self.bare, self.model = net, DistributedDataParallel(net)
        else:
            fully_shard(net, mesh=init_device_mesh("cpu", (self.ranks,)))
            self.bare = self.model = net
        parameters = self.bare.parameters()
        match self.plan["optimizer"]:
            case "sgd":
                self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
            case "plain":
                self.optimizer = torch.optim.SGD(parameters, lr=0.05)
            case kind:
                self.optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=kind == "fused")
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        torch.manual_seed(100 + self.rank)  # every rank has its own data and its own dropout

    def planned(self, what: str, number: int) -> object:
        if self.start and self.plan["first_start_only"]:
            return None
        return self.plan[what].pop(f"{self.rank}/{number}", None)  # once: what is run again after a resume is sound

    def loss(self, number: int) -> torch.Tensor:
        factor = self.planned("factor", number)
        loss = self.model(torch.randn(4, 6)).square().mean()
        return loss if factor is None else loss * float(factor)

    def digest(self) -> str:
        """Of everything that this rank holds of weights and optimizer state."""
        digest = hashlib.sha256()
        for name, tensor in self.bare.state_dict().items():
            digest.update(name.encode() + local(tensor))
        for entry in self.optimizer.state_dict()["state"].values():
            for name in sorted(entry):
                digest.update(name.encode() + local(torch.as_tensor(entry[name])))
        return digest.hexdigest()

    def finite(self) -> bool:
        return all(torch.isfinite(bare(p)).all() for p in self.bare.parameters())

    def alone(self) -> None:
        """The same loop without a guard."""
        for number in range(1, self.plan["cycles"] * self.plan["updates"] + 1):
            losses = []
            for _ in range(self.plan["micro"]):
                loss = self.loss(number) / self.plan["micro"]
                loss.backward()
                losses.append(loss.detach())
            if self.plan["clip"]:
                torch.nn.utils.clip_grad_norm_(self.bare.parameters(), self.plan["clip"])
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.note(sum(losses))

    def note(self, loss: torch.Tensor) -> None:
        self.told["applied"] += 1
        self.told["losses"].append(float(loss).hex())
        self.told["digests"].append(self.digest())

    def guarded(self) -> None:
        with LoopGuard.from_file(self.policy, run_dir=self.run_dir, runtimes=fake_runtimes("4")) as guard:
            late = True if self.plan["late"] else None
            guard.attach(model=self.bare, optimizer=self.optimizer, scheduler=self.scheduler, late=late)
            self.told["restored"] = self.digest()
            self.told["came_up_frozen"] = guard.frozen
            self.told["cycle"] = guard.promoted_cycle
            number = (guard.promoted_cycle or 0) * self.plan["updates"]
            try:
                for cycle in guard.cycles(self.plan["cycles"]):
                    number = self.cycle(guard, cycle, number)
            finally:
                self.told["frozen"] = guard.frozen
                self.told["finite"] = self.finite()
                self.told["at_the_end"] = self.digest()

    def cycle(self, guard: LoopGuard, cycle, number: int) -> int:
        before = number
        for _ in range(self.plan["updates"]):
            number += 1
            self.update(cycle, number)
            if cycle.discarded:
                return before
        correct = self.planned("panel", cycle.number)
        decision = cycle.promote({"correct": 0.5 if correct is None else float(correct)})
        self.told["results"].append(f"promote {decision.result}")
        return number

    def update(self, cycle, number: int) -> None:
        self.say(cycle, self.planned("say", number))
        losses = []
        for micro in range(self.plan["micro"]):
            loss = self.loss(number) / self.plan["micro"]
            losses.append(loss.detach())
            if self.plan["forward"] and micro == self.plan["micro"] - 1:
                cycle.forward(loss=sum(losses))
            loss.backward()
        self.say(cycle, self.planned("say_late", number))
        decision = cycle.update(loss=sum(losses), clip_norm=self.plan["clip"])
        self.told["results"].append(decision.result)
        if decision.result == "allow":
            self.note(sum(losses))

    def say(self, cycle, what: object) -> None:
        match what:
            case "latch":
                set_latch(self.folder / "run", freeze="by hand", reason="somebody set it")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "latch and die":
                set_latch(self.folder / "run", freeze="f1", reason="this rank tripped and died")
                os.kill(os.getpid(), signal.SIGKILL)
            case "admit rubbish":
                self.told["admitted"] = len(cycle.admit([rubbish(n) for n in range(4)]).records)
            case "forget an update":
                cycle._guard._ledger.last += 1
            case "full disk":
                cycle._guard._log._trouble = "cannot write: the disk is full"
            case None:
                pass
            case _:
                raise AssertionError(what)

    def write(self) -> None:
        (self.folder / f"{self.rank}-{self.start}.json").write_text(json.dumps(self.told))


def rubbish(number: int) -> Record:
    origin = Provenance(source="model", origin=f"draft {number}", cycle=1)
    prompt = "<<not allowed>>" if number else "fine"
    return Record(id=f"r{number}", prompt=prompt, completion="x", provenance=origin)


def bare(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def local(tensor: torch.Tensor) -> bytes:
    return bare(tensor).detach().contiguous().numpy().tobytes()


def main() -> None:
    folder, plans = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    for plan in plans:
        carry_out(Run(folder, plan))
    dist.destroy_process_group()
    # gloo's thread may still hold the last tensors; letting go of them while Python goes, it aborts the process.
    os._exit(0)


def carry_out(run: Run) -> None:
    try:
        run.guarded() if run.plan["guard"] else run.alone()
    except LoopFrozen as frozen:
        run.told["error"] = str(frozen)
    except LoopGuardError as error:
        run.told["error"] = f"{type(error).__name__}: {error}"
    finally:
        run.write()


if __name__ == "__main__":
    main()
