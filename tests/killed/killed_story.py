"""What happens to one run, in several processes one after the other, so that every kind of edge is met.

Two guard policies, the second with approvals. A loop trains five cycles under them, with faults that are planted and
with people who freeze, resume, approve and leave notes, beside it and while nobody is at work. Each part looks at the
log for what is still to be done, so that it can be begun again after it was killed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace

import torch
from people import DANA, ELI, FAY, STRANGER

from loopguard.approvals import ask, book
from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.cli.freeze import ingest
from loopguard.controller import LoopGuard
from loopguard.controller import guard as guards
from loopguard.controller.rollback import roll_back
from loopguard.policy.load import load
from loopguard.state import FreezeState, entered, set_latch, standing, submit, waiting
from loopguard.types import Provenance, Record
from loopguard.ways import way_on

FIRST = """
apiVersion: loopguard/v1
name: killed
data:
  sources: [human]
  forbidden_in_prompt: ["<<"]
updates:
  loss_kind: discrete
  lease: 4
  monitors:
    - {kind: bounds, metric: loss}
    - {kind: bounds, metric: grad_norm, min: 0}
    - {kind: jump, metric: loss, min_change: 0.25}
promotion:
  panel:
    - {metric: correct, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.2}
  keep_snapshots: 2
freeze: {when_frozen: wait, capsule: 16MiB}
audit: {reserve: 1MiB, checkpoint_every: 11, anchors: [{kind: file, path: ~/anchors.jsonl}]}
"""
PEOPLE = {person.name: person for person in (DANA, ELI, FAY)}
SECOND = FIRST.replace("max_gain: 0.2", "max_gain: 0.1") + (
    f"resume: {{approvals: 2, people: {json.dumps({name: [one.line] for name, one in PEOPLE.items()})}}}\n"
)
UPDATES = 7
"""Of each cycle."""
SEGMENT_BYTES = 24 * 1024
MOST_ACTS = 300
"""Of people in one life: with more of them it goes in circles."""


def parts():
    """The processes of the story, in order."""
    return (
        lambda life: life.train(FIRST, to=2),
        lambda life: life.outside("terminal-1"),
        lambda life: life.train(SECOND, to=4, adopt=True),
        lambda life: life.outside("terminal-2", rolls_back=True),
        lambda life: life.train(SECOND, to=5),
    )


def lay_out(root):
    """The folder of one run, with all that is there before it begins."""
    root.mkdir()
    (root / "first.yaml").write_text(FIRST)
    (root / "second.yaml").write_text(SECOND)


class Traced(torch.optim.SGD):
    """Tells before it moves a weight."""

    tell = None

    def step(self, closure=None):
        self.tell()
        return super().step(closure)


class Life:
    """One process of the story. `tell` writes a line where no kill of this process can take it back."""

    def __init__(self, root, tell):
        self.root, self.run_dir = root, root / "run"
        self._tell = tell
        self._acts = 0
        os.environ["HOME"] = str(root)  # of the anchor in the guard policies
        small = partial(AuditLog.open.__func__, AuditLog)
        AuditLog.open = lambda *given, **named: small(*given, **named | {"segment_bytes": SEGMENT_BYTES})
        self._tell_of_latches()
        # Who waits for people meets them.
        guards.time = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: self.person())

    def _tell_of_latches(self):
        """From the moment that a freeze has set its latch, whatever comes of its record."""
        latch = FreezeState.latch

        def told(state, reason):
            freeze = latch(state, reason)
            self.tell("latched")
            return freeze

        FreezeState.latch = told

    def tell(self, what, **facts):
        folder = read.stream_dir(self.run_dir)
        self._tell({"what": what, "latch": (self.run_dir / "latch").exists(), **facts}, folder)

    def told(self, *types):
        return list(read.entries(self.run_dir, types=types)) if read.segments(self.run_dir) else []

    # The loop

    def train(self, policy, *, to, adopt=False):
        path = self.root / ("first.yaml" if policy is FIRST else "second.yaml")
        with LoopGuard.from_file(
            path, run_dir=self.run_dir, adopt_policy=load(path).digest if adopt else None
        ) as guard:
            self._build(guard)
            self.tell(
                "open",
                frozen=guard.frozen,
                cycle=guard.promoted_cycle,
                actor=guard.actor_digest,
                status=standing(self.run_dir).cycle,
            )
            for cycle in guard.cycles(to):
                self._cycle(guard, cycle)
        self.tell("ended", cycle=guard.promoted_cycle)

    def _build(self, guard):
        torch.manual_seed(0)
        self.model, self.actor = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        self.actor.load_state_dict(self.model.state_dict())
        optimizer = Traced(self.model.parameters(), lr=0.05, momentum=0.9)
        optimizer.tell = lambda: self.tell("step", update=guard._ledger.last + 1)
        guard.attach(model=self.model, optimizer=optimizer, actor=self.actor)

    def _cycle(self, guard, cycle):
        prompts = (f"{cycle.number}-{n}: {'<<' if n == 3 else ''}" for n in range(4))
        origin = {"source": "human", "cycle": cycle.number}
        cycle.admit(
            [
                Record(id=prompt, prompt=prompt, completion="4", provenance=Provenance(origin=f"f:{prompt}", **origin))
                for prompt in prompts
            ]
        )
        for place in range(1, UPDATES + 1):
            if cycle.discarded:
                return
            self._beside(cycle.number, place)
            x = cycle.keep(torch.randn(8, 4))
            loss = self.model(x).square().mean() * 0.01 + self._factor(cycle.number, place)
            loss.backward()
            cycle.update(loss=loss, clip_norm=1.0)
        if not cycle.discarded:
            gain = cycle.number == 4 and not self._froze("promotion")
            self._plant("a gain" if gain else None)
            cycle.promote({"correct": 0.9 if gain else 0.5}, apply=self._install)

    def _install(self):
        self.tell("apply")
        self.actor.load_state_dict(self.model.state_dict())

    def _factor(self, cycle, place):
        """What the loss is about: 1, or what a planted fault makes of it."""
        if cycle == 2 and place == 3 and not self._froze("update", "bounds:loss"):
            self._plant("a loss that is no number")
            return math.nan
        if cycle == 5 and place >= 2 and not self._froze("update", "jump:loss"):
            self._plant("a loss that jumps")
            return 3.0
        return 1.0

    def _froze(self, gate, rule=""):
        frozen = (entry.body for entry in self.told("freeze.entered"))
        return any(body["gate"] == gate and body["rule"].startswith(rule) for body in frozen)

    def _plant(self, fault):
        if fault is not None:
            self.tell("cause", why=fault)

    # People

    def _beside(self, cycle, place):
        """What others do while the loop is at work, each once."""
        asked = {entry.body["by"] for entry in self.told("note.requested", "freeze.requested")}
        if (cycle, place) == (1, 2) and "noter" not in asked:
            self.submit("note", by="noter", reason="looks good")
        if (cycle, place) == (1, 4) and "stopper" not in asked:
            self.stop("stopper")
        if (cycle, place) == (3, 3) and "asker" not in asked:
            self.tell("cause", why="a request")
            self.submit("freeze", by="asker", reason="without the latch")

    def submit(self, kind, **facts):
        request = submit(self.run_dir, kind, **facts)
        self.tell("submitted", kind=kind, request=request.id)

    def stop(self, by):
        """As `loopguard freeze` does."""
        self.tell("cause", why=by)
        self.submit("freeze", by=by, reason="looks wrong")
        set_latch(self.run_dir, freeze="requested", reason=f"{by} asked for it: looks wrong")
        self.tell("latched")

    def person(self):
        """One step of somebody who wants a frozen run to go on."""
        self._acts += 1
        assert self._acts < MOST_ACTS, "people did all they can and the run does not go on"
        stands = standing(self.run_dir)
        if not (stands.frozen and stands.acknowledged):
            return
        self.tell("frozen", freeze=stands.freeze)
        if not stands.approvals_needed:
            if not any(request.freeze == stands.freeze for request in waiting(self.run_dir, "resume")):
                self.submit("resume", by="sam", reason="it is mended", freeze=stands.freeze)
        elif (pending := book(self.run_dir).pending) is not None and pending.fault is None:
            self._approve(pending)
        elif not waiting(self.run_dir, "resume"):
            asks = {"by": "sam", "reason": "it is mended"}
            statement = ask(self.run_dir, now=datetime.now(UTC), way=self._way(), **asks)
            self.submit("resume", freeze=stands.freeze, statement=statement, **asks)

    def _way(self):
        """The jump was no fault, as people find: they go on from there. All else is rolled back."""
        body = entered(self.run_dir).body
        return way_on(self.run_dir, body, disposition="accept" if body["rule"] == "jump:loss" else "rollback")

    def _approve(self, pending):
        if waiting(self.run_dir, "approval"):
            return
        missing = [one for name, one in PEOPLE.items() if name not in pending.people]
        refused = {entry.body["code"] for entry in self.told("approval.refused")}
        signs = STRANGER if "unknown_key" not in refused else missing[0]
        signature = signs.sign(pending.statement.signed_bytes())
        self.tell("signs", signature=signature)
        self.submit("approval", by="", reason="", signature=signature)

    def outside(self, by, *, rolls_back=False):
        """Somebody freezes the run while nobody is at work on it, and has it go on."""
        for _ in range(MOST_ACTS):
            mine = [entry.seq for entry in self.told("freeze.requested") if entry.body["by"] == by]
            if mine and any(entry.seq > mine[0] for entry in self.told("resume.applied")):
                break
            if not standing(self.run_dir).frozen:
                self.stop(by)
            ingest(self.run_dir)
            self.person()
        if rolls_back and not self.told("promotion.rolled_back"):
            roll_back(self.run_dir, to=None, by=by, reason="one further back")
        self.tell("ended")

    def look(self):
        """A command from a terminal, which takes in what lies there."""
        if (self.run_dir / "run.json").exists() and read.segments(self.run_dir):
            ingest(self.run_dir)
        self.tell("ended")


def swap(root):
    """After a power cut: what is on disk takes the place of what was in memory."""
    after = root.with_name(f"{root.name}.after")
    if after.exists():
        shutil.rmtree(root)
        after.rename(root)
