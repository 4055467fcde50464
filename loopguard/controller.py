"""The controller: one `LoopGuard` for a run, one `Cycle` for each pass of the loop.

It owns the order of things and nothing else. Every step is: listen for a freeze, let a gate decide, record, act. The
gates decide without acting; the learner (a file in `integrations/`) and the runtimes (in `sandbox/`) act without
deciding.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from loopguard import __version__
from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.errors import (
    AuditWriteError,
    LoopFrozen,
    MonitorError,
    PolicyMismatchError,
    SandboxUnavailableError,
    UsageError,
)
from loopguard.gates.data import DataGate
from loopguard.gates.promotion import PromotionGate
from loopguard.gates.tools import REFUSAL, ToolGate
from loopguard.gates.updates import UpdateGate
from loopguard.policy.diff import compare
from loopguard.policy.load import LoadedPolicy, load
from loopguard.sandbox.base import CellSpec
from loopguard.snapshots import Promoted, SnapshotStore, replace_durably
from loopguard.state import CONTROLLER, FreezeState, run_facts, signal_facts
from loopguard.types import Decision, Outcome, Record, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from loopguard.audit.events import Entry
    from loopguard.policy.schema import GuardPolicy, Profile
    from loopguard.sandbox.base import EventSink, Runtime

INTEGRATIONS = {"torch": "loopguard.integrations.torch"}
"""Which module holds the models of which framework, by the name of the package that their classes come from."""

_CHUNK = 64
"""Tool calls that are decided and made durable together. A freeze takes effect between two chunks."""
_POLL_S = 0.5


class Learner(Protocol):
    """What an integration gives the controller: a model in training that moves only when told to."""

    @property
    def same_actor(self) -> bool:
        """Whether the weights in training are the ones that generate."""
        ...

    def readings(self, loss: Any) -> dict[str, float]:
        """The metrics of the update at hand, at least `loss` and `grad_norm`."""
        ...

    def apply(self, *, clip_norm: float | None) -> None:
        """Take the step."""
        ...

    def discard(self) -> None:
        """Drop the gradients and move nothing."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs."""
        ...

    def restore(self, state: dict[str, Any], *, actor_too: bool) -> None:
        """Go back to such a state."""
        ...

    def digest(self) -> str:
        """SHA-256 over weights and optimizer state."""
        ...

    def weights_digest(self) -> str:
        """SHA-256 over the weights in training."""
        ...

    def actor_digest(self) -> str:
        """SHA-256 over the weights that generate."""
        ...


class LoopState(Protocol):
    """The loop's own state that must travel with a snapshot: JSON values, tensors, or both."""

    def state_dict(self) -> dict[str, Any]:
        """The state as it is now."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to such a state."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What became of the drafts of a cycle: what may be trained on, and what is held back for which reason."""

    records: tuple[Record, ...]
    quarantined: tuple[tuple[Record, str], ...]
    decision: Decision


class LoopGuard:
    """The guard of one run: its policy, its log, its sandboxes and its freeze.

    A guard lives from `from_file` to `close` and is the only writer of its run directory meanwhile. Use it as a context
    manager, so that an interrupted run leaves a finished record.

        with LoopGuard.from_file("policies/default.yaml", run_dir="runs/mine") as guard:
            guard.attach(model=model, optimizer=optimizer, actor=actor)
            for cycle in guard.cycles(20):
                ...
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        run_dir: Path,
        *,
        run_id: str,
        log: AuditLog,
        runtimes: _Runtimes,
    ) -> None:
        self.policy = policy.policy
        self.policy_digest = policy.digest
        self.run_dir = run_dir
        self.run_id = run_id
        self.found: list[str] = []
        """What a start found of an earlier one and what it did about it; one sentence each."""
        self._log = log
        self._runtimes = runtimes
        self._pid = os.getpid()
        self._tools = ToolGate(self.policy)
        self._data = DataGate(self.policy.data)
        self._updates_gate = UpdateGate(self.policy.updates, self.policy.freeze)
        self._promotions = PromotionGate(self.policy.promotion)
        self._snapshots = SnapshotStore(run_dir / "snapshots")
        self._state = FreezeState(run_dir, log)
        self._learner: Learner | None = None
        self._loop: LoopState | None = None
        self._promoted = self._snapshots.promoted()
        self._boundary: str | None = None
        self._updates = self._promoted.update if self._promoted else 0
        self._lease_to = 0
        self._pending: list[tuple[int, dict[str, float]]] = []
        self._closed = False

    @classmethod
    def from_file(
        cls,
        policy: str | os.PathLike[str],
        *,
        run_dir: str | os.PathLike[str],
        seed: int = 0,
        command: Sequence[str] = (),
        adopt_policy: str | None = None,
        by: str | None = None,
        reason: str | None = None,
        runtimes: Callable[[CellSpec, str, EventSink], Runtime] | None = None,
        mirror: Callable[[Entry], None] | None = None,
    ) -> Self:
        """Open a run directory under a guard policy, or go on with the one that is there.

        `adopt_policy` names the digest of another policy than the run was started with; a loosened one also needs `by`
        and `reason`. `runtimes` makes the sandboxes (Docker by default), `mirror` gets each audit record as it is
        written.

        Raises PolicyError, PolicyMismatchError, UsageError (a directory with other things in it),
        SandboxUnavailableError, RunBusyError, AuditTamperedError, AuditWriteError. None of them leaves a half-written
        run directory behind.
        """
        loaded = load(Path(policy))
        directory = Path(run_dir)
        adopted = _check_directory(directory, loaded, adopt_policy=adopt_policy, by=by, reason=reason)
        goes_on = (directory / "run.json").exists()
        run_id = run_facts(directory)["id"] if goes_on else f"run-{uuid.uuid4().hex[:12]}"
        cells = _Runtimes(loaded.policy, run_id, runtimes or _docker)
        if not (directory / "latch").exists():
            cells.start()
        try:
            _lay_out(directory, loaded, run_id=run_id, seed=seed, command=command)
            log = AuditLog.open(
                directory,
                stream=CONTROLLER,
                run_id=run_id,
                policy=loaded.digest,
                reserve_mib=loaded.policy.audit.reserve_mib,
                mirror=mirror,
            )
        except BaseException:
            cells.close()
            raise
        try:
            cells.report_to(log)
            if adopted:
                log.append("policy.adopted", adopted, actor={"kind": "person", "id": by or "unnamed"})
                _set_policy(directory, loaded.digest)
            log.append("policy.loaded", {"name": loaded.policy.name, "digest": loaded.digest})
            log.append(
                "run.started",
                {"command": list(command), "seed": seed, "versions": _versions(), "goes_on": goes_on},
            )
            guard = cls(loaded, directory, run_id=run_id, log=log, runtimes=cells)
            guard._settle()
        except BaseException:
            cells.close()
            log.close()
            raise
        return guard

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and not self._closed:
            # The reason to be here is a person in a hurry; a log that fails now must not hide the interrupt.
            with suppress(AuditWriteError):
                self._flush()
                self._log.append("run.interrupted", {})
        self.close(finished=kind is None)

    def close(self, *, finished: bool = True) -> None:
        """Finish the record and take the sandboxes down. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runtimes.close()
            if self._log.degraded:
                self._state.freeze_unwritable("the audit log could not be written")
            else:
                self._flush()
                if finished and not self._state.frozen:
                    self._log.append("run.finished", {"cycles": self._promoted.cycle if self._promoted else 0})
                self._state.remember(cycle=None)
        finally:
            self._log.close()

    # What a loop calls

    def attach(
        self,
        *,
        model: Any,
        optimizer: Any,
        scheduler: Any = None,
        actor: Any = None,
        loop: LoopState | None = None,
    ) -> None:
        """Put a model in training under this guard.

        `optimizer` and `scheduler` may be one or a list. `actor` is the module that generates data; leave it out, or
        say "same", where that is the model itself. `loop` is the loop's own state, which travels with every snapshot.

        Where the run directory holds promoted weights, all of these are restored to them, RNG included; so call this
        after everything is built and seeded. Raises UsageError for what cannot be guarded, SnapshotError where the
        promoted snapshot is missing or damaged.
        """
        self._check_owner()
        if self._learner is not None:
            raise UsageError("this guard already holds a model: make one guard for each run")
        self._learner = _integration(model).learner(model=model, optimizer=optimizer, scheduler=scheduler, actor=actor)
        self._loop = loop
        if self._promoted is None:
            self._boundary = self._snapshots.write(self._whole_state())
        else:
            self._boundary = self._promoted.snapshot
            self._restore(actor_too=True, because="the run goes on from the last promoted state")
        self._snapshots.prune(keep={self._boundary})

    def protect(self, texts: Iterable[str]) -> int:
        """Name evaluation texts that no training record may overlap with; gives how many are protected by now."""
        return self._data.protect(texts)

    def cycles(self, count: int, *, warmup: bool = False) -> Iterator[Cycle]:
        """The cycles of this run, up to number `count`, after the last promoted one.

        With `warmup`, cycle 0 comes first where nothing has been promoted yet: in it, monitors that need history only
        learn. Raises LoopFrozen where the run is frozen (or waits, or exits, as the guard policy says).
        """
        number = self._promoted.cycle + 1 if self._promoted else (0 if warmup else 1)
        while number <= count:
            self._listen()
            if self._state.frozen:
                self._stop()
                continue
            self._runtimes.start()
            cycle = Cycle(self, number)
            self._log.append("cycle.started", {}, cycle=number)
            yield cycle
            if not cycle.discarded:
                self._end(cycle)
                number += 1

    @property
    def frozen(self) -> bool:
        """Whether weights may not change right now."""
        return self._state.frozen

    @property
    def promoted_cycle(self) -> int | None:
        """The last promoted cycle, or None."""
        return self._promoted.cycle if self._promoted else None

    def state_digest(self) -> str:
        """SHA-256 over the weights in training and the whole optimizer state."""
        return self._held().digest()

    @property
    def actor_digest(self) -> str:
        """SHA-256 over the weights that generate now."""
        return self._held().actor_digest()

    # What the cycles use

    def _held(self) -> Learner:
        if self._learner is None:
            raise UsageError("no model is attached: call guard.attach(model=..., optimizer=...) first")
        return self._learner

    def _check_owner(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError("this process was forked from the one that owns the guard; call the guard from its owner")

    def _listen(self) -> None:
        """Take in a latch or a request from outside; every gate begins with this."""
        self._check_owner()
        for request in self._state.requests():
            if request.kind == "resume" and self._state.lifts(request):
                self._resume(by=request.by, reason=request.reason)
            elif request.kind == "freeze" and not self._state.freeze_id:
                why = f"{request.by} asked for it: {request.reason}"
                self._freeze(Decision(result="freeze", gate="operator", rule="request", reason=why), cycle=None)
        if self._state.frozen and not self._state.freeze_id:
            decision = Decision(result="freeze", gate="operator", rule="latch", reason="the latch was set from outside")
            self._freeze(decision, cycle=None)

    def _freeze(
        self,
        decision: Decision,
        *,
        cycle: int | None,
        update: int | None = None,
        readings: Mapping[str, float] | None = None,
        roll_back: bool = False,
    ) -> str:
        """Latch, keep the evidence, undo what was suspect, record. The latch comes first, whatever fails after it."""
        freeze = self._state.latch(decision.reason)
        if self.policy.freeze.running_calls == "kill":
            self._runtimes.kill_running()
        self._flush()
        capsule, trouble = self._capsule(freeze, decision, update=update, readings=readings)
        restored = None
        if roll_back and self._learner is not None and self._boundary is not None:
            restored = self._boundary
            self._restore(actor_too=False, because=f"freeze {freeze}")
        self._state.freeze(
            decision,
            cycle=cycle,
            facts={"update": update, "restored": restored, "capsule": capsule, "capsule_trouble": trouble},
        )
        return freeze

    def _stop(self) -> None:
        """What the guard policy says a frozen loop does. Returns only where it waited and somebody resumed."""
        match self.policy.freeze.when_frozen:
            case "exit":
                # Under torchrun a non-zero exit is a failure to be restarted, and a restart does not thaw anything.
                sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else LoopFrozen.exit_code)
            case "wait":
                while self._state.frozen:
                    time.sleep(_POLL_S)
                    self._listen()
            case _:
                raise LoopFrozen(self._state.freeze_id, self._state.reason)

    def _resume(self, *, by: str, reason: str) -> None:
        self._state.resume(by=by, reason=reason)
        if self._learner is not None and self._boundary is not None:
            self._restore(actor_too=True, because="resumed: the frozen cycle is rolled back")

    def _capsule(
        self,
        freeze: str,
        decision: Decision,
        *,
        update: int | None,
        readings: Mapping[str, float] | None,
    ) -> tuple[str | None, str | None]:
        """Keep the suspect state and what was decided. A full disk costs the capsule, not the freeze."""
        folder = self.run_dir / "freezes" / freeze
        try:
            state = self._snapshots.write(self._whole_state(), into=folder) if self._learner is not None else None
            body = {
                "freeze": freeze,
                "decision": {
                    "gate": decision.gate,
                    "rule": decision.rule,
                    "reason": decision.reason,
                    "signals": [signal_facts(signal) for signal in decision.signals],
                    "facts": decision.facts,
                },
                "update": update,
                "readings": dict(readings or {}),
                "state": state,
                "state_digest": self._learner.digest() if self._learner is not None else None,
                "boundary": self._boundary,
            }
            folder.mkdir(parents=True, exist_ok=True)
            replace_durably(folder / "freeze.json", json.dumps(body, indent=1, sort_keys=True, default=str).encode())
        except OSError as error:
            return None, f"the capsule could not be written: {error}"
        return str(folder.relative_to(self.run_dir)), None

    def _whole_state(self) -> dict[str, Any]:
        return {
            "learner": self._held().state(),
            "updates": self._updates,
            "update_gate": self._updates_gate.state_dict(),
            "data_gate": self._data.state_dict(),
            "loop": self._loop.state_dict() if self._loop is not None else None,
        }

    def _restore(self, *, actor_too: bool, because: str) -> None:
        assert self._boundary is not None
        state = self._snapshots.read(self._boundary)
        if self._loop is not None:
            self._loop.load_state_dict(state["loop"])
        self._updates = self._lease_to = state["updates"]
        self._updates_gate.load_state_dict(state["update_gate"])
        self._data.load_state_dict(state["data_gate"])
        self._held().restore(state["learner"], actor_too=actor_too)
        self._log.append("snapshot.restored", {"snapshot": self._boundary, "because": because})

    def _lease(self, update: int, *, cycle: int) -> None:
        """One durable record permits the next few updates, instead of one for each."""
        if update > self._lease_to:
            self._flush()
            self._lease_to = update + self.policy.updates.lease - 1
            self._log.append("update.leased", {"from": update, "to": self._lease_to}, cycle=cycle)

    def _flush(self) -> None:
        """Record the updates that were applied since the last time; they are durable with the next control record."""
        if not self._pending:
            return
        readings: dict[str, list[float]] = defaultdict(list)
        for _, values in self._pending:
            for metric, value in values.items():
                readings[metric].append(value)
        body = {"from": self._pending[0][0], "to": self._pending[-1][0], "readings": dict(readings)}
        self._pending.clear()
        self._log.append("update.applied", body, sync=False)

    def _end(self, cycle: Cycle) -> None:
        """The loop's body is through. Weights that act must have been promoted."""
        if cycle.promoted:
            return
        self._flush()
        if self._learner is not None and self._learner.same_actor and self._boundary is not None:
            self._restore(actor_too=True, because="the cycle ended without a promotion and the model is its own actor")
        self._lease_to = self._updates
        self._log.append("cycle.finished", {"result": "not promoted"}, cycle=cycle.number)

    # What a start finds

    def _settle(self) -> None:
        """Bring an interrupted run to rest: finish what was decided, undo what nobody can vouch for."""
        trail = _Trail(read.entries(self.run_dir, CONTROLLER))
        known = {None, *trail.snapshots}
        pointer = self._promoted.snapshot if self._promoted else None
        if pointer not in known:
            reason = f"snapshots/promoted.json names {pointer}, which no promotion in the log names"
            self._state.freeze(
                Decision(result="freeze", gate="audit", rule="snapshot", reason=reason), cycle=None, facts={}
            )
            return
        if trail.undecided is not None:
            applied = pointer == trail.undecided["snapshot"]
            self._log.append("promotion.settled", {"snapshot": trail.undecided["snapshot"], "applied": applied})
            self.found.append(
                f"the promotion of cycle {trail.open_cycle} was {'finished' if applied else 'cut short and is undone'}"
            )
        if trail.open_cycle is not None:
            # Update numbers start again from the boundary; the epoch tells the old ones from the new.
            self._log.epoch += 1
        if trail.lease is not None:
            first, last = trail.lease
            self._log.append("update.settled", {"from": first, "to": last, "restored": pointer})
            self.found.append(
                f"updates {first} to {last} were permitted and not recorded; "
                f"the run goes back to {self._where()} and runs them again"
            )
        if trail.open_cycle is not None:
            done = self._promoted is not None and self._promoted.cycle == trail.open_cycle
            self._log.append("cycle.finished", {"result": "promoted" if done else "abandoned"}, cycle=trail.open_cycle)
            if not done:
                self.found.append(f"cycle {trail.open_cycle} was not finished; it starts again from {self._where()}")

    def _where(self) -> str:
        return "its beginning" if self._promoted is None else f"the promoted state of cycle {self._promoted.cycle}"


class Cycle:
    """One pass of the loop: generate, run tools, admit data, update, evaluate, promote.

    A cycle lives from one turn of `guard.cycles()` to the next. It is `discarded` where the loop froze in it and was
    resumed: then nothing in it acts any more, and the same cycle starts again.
    """

    def __init__(self, guard: LoopGuard, number: int) -> None:
        self.number = number
        self.promoted = False
        self.discarded = False
        self._guard = guard
        self._update_count = 0

    @property
    def updates(self) -> int:
        """How many updates this cycle has applied."""
        return self._update_count

    def tool(self, name: str) -> Tool:
        """A tool of that name; whether a call of it runs is decided call by call."""
        return Tool(self._guard, self, name)

    def admit(self, records: Sequence[Record], *, proposed: int | None = None) -> Admitted:
        """Let the data gate decide which drafts may be trained on.

        `proposed` is how many drafts there were before the loop chose these; with it the gate can watch the share that
        is kept. A sample of the records' checks is run again in the sandbox. Raises LoopFrozen where the gate freezes;
        then none of the drafts is admitted.
        """
        guard = self._guard
        if not self._enter():
            return Admitted(records=(), quarantined=(), decision=_DISCARDED)
        sample = guard._data.sample(records, salt=f"{guard.run_id}/{self.number}")
        rechecked = self._recheck(sample)
        batch = guard._data.verdict(records, proposed=proposed, rechecked=rechecked)
        self._record_quarantine(batch.quarantined)
        facts = {**batch.decision.facts, "admitted": len(batch.admitted), "quarantined": len(batch.quarantined)}
        if not batch.decision.allowed:
            guard._log.append("data.refused", {**facts, "reason": batch.decision.reason}, cycle=self.number)
            self._freeze(batch.decision, roll_back=self._update_count > 0)
            return Admitted(records=(), quarantined=(), decision=batch.decision)
        guard._data.commit(batch)
        facts["digest"] = _digest_ids(batch.admitted)
        guard._log.append("data.admitted", facts, cycle=self.number)
        return Admitted(records=batch.admitted, quarantined=batch.quarantined, decision=batch.decision)

    def update(
        self,
        *,
        loss: Any,
        clip_norm: float | None = None,
        readings: Mapping[str, float] | None = None,
    ) -> Decision:
        """Decide about one update, after `loss.backward()`, and take it if it is allowed.

        On allow: clips the gradients to `clip_norm` where given, steps every attached optimizer, ticks the schedulers,
        zeroes the gradients. On a freeze: none of that happens, weights and optimizer state stay as they are to the bit
        (or go back to the last promoted state where suspect updates had been applied), and LoopFrozen is raised.

        With gradient accumulation call it once for each optimizer step and give the mean of the micro-batches' losses.
        Several optimizers are decided together and step together. `readings` adds metrics beside loss and grad_norm.
        """
        guard = self._guard
        if not self._enter():
            guard._held().discard()
            return _DISCARDED
        learner = guard._held()
        values = learner.readings(loss) | dict(readings or {})
        number = guard._updates + 1
        guard._lease(number, cycle=self.number)
        try:
            decision = guard._updates_gate.decide(values, update=number, armed=self.number > 0)
        except MonitorError as error:
            decision = Decision(result="freeze", gate="update", rule="monitor_error", reason=str(error))
        if decision.result == "allow":
            learner.apply(clip_norm=clip_norm)
            guard._updates = number
            guard._pending.append((number, values))
            self._update_count += 1
            return decision
        learner.discard()
        body = {"update": number, "readings": values, "signals": [signal_facts(s) for s in decision.signals]}
        if decision.result == "skip":
            guard._updates = number
            guard._flush()
            guard._log.append("update.skipped", {**body, "reason": decision.reason}, cycle=self.number)
            return decision
        guard._flush()
        guard._log.append("update.withheld", body, cycle=self.number)
        in_time = bool(decision.facts.get("withheld_in_time", False))
        self._freeze(decision, update=number, readings=values, roll_back=not in_time)
        return decision

    def decide_update(self, *, readings: Mapping[str, float]) -> Decision:
        """Only decide, for loops that step an optimizer which is not attached.

        Raises UsageError where a model is attached: then `update` is the only door. A freeze raises LoopFrozen.
        """
        guard = self._guard
        if guard._learner is not None:
            raise UsageError("a model is attached: call cycle.update(loss=loss), which decides and steps")
        if not self._enter():
            return _DISCARDED
        number = guard._updates + 1
        guard._lease(number, cycle=self.number)
        decision = guard._updates_gate.decide(readings, update=number, armed=self.number > 0)
        if decision.result == "freeze":
            self._freeze(decision, update=number, readings=readings)
            return decision
        guard._updates = number
        guard._pending.append((number, dict(readings)))
        return decision

    def promote(self, panel: Mapping[str, float], *, apply: Callable[[], object] | None = None) -> Decision:
        """Let the weights in training become the actor, if the panel of capability metrics allows it.

        `apply` installs them in the actor and is called on allow alone; leave it out where the model is its own actor.
        The candidate is durable before the decision is recorded, and the decision before `apply` runs. Raises
        LoopFrozen where the gate freezes: the actor stays as it is and the model goes back to the promoted state.
        """
        guard = self._guard
        if not self._enter():
            return _DISCARDED
        learner = guard._held()
        if apply is None and not learner.same_actor:
            raise UsageError("promote(panel, apply=...) needs apply: how the actor takes the weights over")
        guard._flush()
        values = {name: float(value) for name, value in panel.items()}
        guard._log.append("eval.finished", {"panel": values}, cycle=self.number)
        previous = guard._promoted.panel if guard._promoted else None
        decision = guard._promotions.decide(values, previous=previous)
        body: dict[str, Any] = {"result": decision.result, "rule": decision.rule, "reason": decision.reason}
        body |= {"panel": values, "previous": previous, "snapshot": None}
        if not decision.allowed:
            guard._log.append("promotion.decided", body, cycle=self.number)
            self._freeze(decision, roll_back=True)
            return decision
        guard._data.promoted()
        snapshot = guard._snapshots.write(guard._whole_state())
        guard._log.append("promotion.decided", {**body, "snapshot": snapshot}, cycle=self.number)
        if not self._install(apply, learner):
            return Decision(result="freeze", gate="promotion", rule="apply", reason=guard._state.reason)
        promoted = Promoted(snapshot=snapshot, cycle=self.number, update=guard._updates, panel=values)
        guard._snapshots.promote(promoted)
        guard._promoted, guard._boundary = promoted, snapshot
        guard._lease_to = guard._updates  # a lease ends with its cycle
        self.promoted = True
        guard._log.append(
            "promotion.applied", {"snapshot": snapshot, "actor": learner.actor_digest()}, cycle=self.number
        )
        guard._log.append("cycle.finished", {"result": "promoted"}, cycle=self.number)
        guard._state.remember(cycle=self.number)
        guard._snapshots.prune(keep={snapshot})
        return decision

    def _install(self, apply: Callable[[], object] | None, learner: Learner) -> bool:
        """Run `apply` and look whether the actor now has the promoted weights; a freeze where it has not."""
        if apply is None:
            return True
        try:
            apply()
            trouble = (
                "" if learner.actor_digest() == learner.weights_digest() else "the actor has other weights after it"
            )
        except Exception as error:  # noqa: BLE001 - whatever a loop's own apply raises, half-installed weights must not act
            trouble = repr(error)
        if not trouble:
            return True
        decision = Decision(result="freeze", gate="promotion", rule="apply", reason=f"apply failed: {trouble}")
        self._freeze(decision, roll_back=True, actor_too=True)
        return False

    def _enter(self) -> bool:
        """Listen; stop where the loop is frozen. False where this cycle no longer acts."""
        guard = self._guard
        guard._listen()
        if guard._state.frozen:
            self._abandon()
        return not self.discarded

    def _freeze(
        self,
        decision: Decision,
        *,
        update: int | None = None,
        readings: Mapping[str, float] | None = None,
        roll_back: bool = False,
        actor_too: bool = False,
    ) -> None:
        guard = self._guard
        guard._freeze(decision, cycle=self.number, update=update, readings=readings, roll_back=roll_back)
        if actor_too:
            guard._restore(actor_too=True, because="the actor may hold weights that were not promoted")
        self._abandon()

    def _abandon(self) -> None:
        guard = self._guard
        if not self.discarded:
            guard._log.append("cycle.finished", {"result": "frozen"}, cycle=self.number)
            self.discarded = True
        guard._stop()

    def _recheck(self, sample: Sequence[Record]) -> list[tuple[Record, Outcome]]:
        by_tool: dict[str, list[Record]] = defaultdict(list)
        for record in sample:
            assert record.check is not None
            by_tool[record.check.tool].append(record)
        rechecked: list[tuple[Record, Outcome]] = []
        for name, records in by_tool.items():
            outcomes = self.tool(name).map([record.check.code for record in records if record.check is not None])
            rechecked += zip(records, outcomes, strict=True)
        return rechecked

    def _record_quarantine(self, quarantined: Sequence[tuple[Record, str]]) -> None:
        if not quarantined:
            return
        guard = self._guard
        folder = guard.run_dir / "quarantine"
        folder.mkdir(exist_ok=True)
        by_reason: dict[str, list[str]] = defaultdict(list)
        with (folder / f"cycle-{self.number:04d}.jsonl").open("a", encoding="utf-8") as file:
            for record, reason in quarantined:
                by_reason[reason].append(record.id)
                file.write(json.dumps(_quarantine_row(record, reason), sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for reason, ids in by_reason.items():
            body = {"reason": reason, "count": len(ids), "records": ids[:100]}
            guard._log.append("data.quarantined", body, cycle=self.number, sync=False)


class Tool:
    """A tool as the loop sees it. Each call is decided, recorded, run in a cell, and recorded again.

    A refusal, a crash and a time-out are Outcomes. So is a freeze (status `denied`): frameworks swallow what a tool
    raises, and the loop learns of the freeze at its next update, admission or promotion. Only a sandbox that died
    raises (SandboxUnavailableError).
    """

    def __init__(self, guard: LoopGuard, cycle: Cycle, name: str) -> None:
        self.name = name
        self._guard = guard
        self._cycle = cycle

    def __call__(self, code: str, *, stdin: bytes = b"") -> Outcome:
        """Run one call."""
        return self._run_chunk([self._call(code, stdin)])[0]

    def map(self, codes: Iterable[str]) -> list[Outcome]:
        """Run many calls, on all cells at once; outcomes come in the order of the codes."""
        calls = [self._call(code, b"") for code in codes]
        outcomes: list[Outcome] = []
        for start in range(0, len(calls), _CHUNK):
            outcomes += self._run_chunk(calls[start : start + _CHUNK])
        return outcomes

    def _call(self, code: str, stdin: bytes) -> ToolCall:
        return ToolCall(id=uuid.uuid4().hex, tool=self.name, code=code, stdin=stdin)

    def _run_chunk(self, calls: Sequence[ToolCall]) -> list[Outcome]:
        guard = self._guard
        guard._listen()
        if guard._state.frozen or self._cycle.discarded:
            return [_refused(call) for call in calls]
        decisions = [guard._tools.decide(call) for call in calls]
        for call, decision in zip(calls, decisions, strict=True):
            self._record_decision(call, decision)
        # Record first: a call nobody recorded must not have happened.
        guard._log.sync()
        if (trip := guard._tools.trip()) is not None:
            guard._freeze(trip, cycle=self._cycle.number, roll_back=self._cycle.updates > 0)
            return [_refused(call) for call in calls]
        outcomes = self._run(calls, decisions)
        guard._log.sync()
        if (trip := guard._tools.trip()) is not None:
            guard._freeze(trip, cycle=self._cycle.number, roll_back=self._cycle.updates > 0)
        return outcomes

    def _run(self, calls: Sequence[ToolCall], decisions: Sequence[Decision]) -> list[Outcome]:
        runtimes = self._guard._runtimes
        if len(calls) == 1:
            return [self._run_one(calls[0], decisions[0])]
        with ThreadPoolExecutor(max_workers=runtimes.width) as pool:
            try:
                return list(pool.map(self._run_one, calls, decisions))
            except BaseException:
                # A dead sandbox or Ctrl-C: what still waits must not start.
                pool.shutdown(wait=False, cancel_futures=True)
                runtimes.kill_running()
                raise

    def _run_one(self, call: ToolCall, decision: Decision) -> Outcome:
        guard = self._guard
        if not decision.allowed:
            return _refused(call)
        try:
            outcome = guard._runtimes.of(decision.facts["sandbox"]).run(call)
        except SandboxUnavailableError as error:
            guard._log.append("tool.lost", {"call": call.id, "reason": str(error)}, cycle=self._cycle.number)
            raise
        guard._tools.finished(outcome)
        body = {
            "call": call.id,
            "status": outcome.status,
            "exit_code": outcome.exit_code,
            "stdout_sha256": hashlib.sha256(outcome.stdout).hexdigest(),
            "stdout_bytes": outcome.stdout_bytes,
            "stderr_bytes": outcome.stderr_bytes,
            "wall_ms": round(outcome.wall_ms, 2),
            "leftovers": outcome.leftovers,
        }
        guard._log.append("tool.finished", body, cycle=self._cycle.number, sync=False)
        return outcome

    def _record_decision(self, call: ToolCall, decision: Decision) -> None:
        code = call.code.encode("utf-8", errors="surrogatepass")
        body = {
            "call": call.id,
            "tool": call.tool,
            "code_sha256": hashlib.sha256(code).hexdigest(),
            "code_head": call.code[:200].encode("utf-8", errors="backslashreplace").decode(),
            "result": decision.result,
            "rule": decision.rule,
            "reason": decision.reason,
        }
        self._guard._log.append("tool.decided", body, cycle=self._cycle.number, sync=False)


class _Runtimes:
    """The sandboxes of a guard policy, one for each profile that a rule names, started when first needed."""

    def __init__(self, policy: GuardPolicy, run_id: str, make: Callable[[CellSpec, str, EventSink], Runtime]) -> None:
        names = {rule.sandbox for rule in policy.tools.rules if rule.then == "run" and rule.sandbox is not None}
        self._profiles = {name: policy.sandbox.profiles[name] for name in sorted(names)}
        self._run_id = run_id
        self._make = make
        self._running: dict[str, Runtime] = {}
        self._early: list[tuple[str, dict[str, Any]]] = []
        self._log: AuditLog | None = None

    @property
    def width(self) -> int:
        """How many calls can run at once."""
        return max((profile.cells for profile in self._profiles.values()), default=1)

    def start(self) -> None:
        """Start what is not running yet."""
        for name, profile in self._profiles.items():
            if name not in self._running:
                runtime = self._make(_cell_spec(profile), self._run_id, self._event)
                runtime.start()
                self._running[name] = runtime

    def of(self, profile: str) -> Runtime:
        return self._running[profile]

    def report_to(self, log: AuditLog) -> None:
        """From now on sandbox events go to this log; those that came before it was open go there first."""
        self._log = log
        for kind, body in self._early:
            log.append(kind, body)
        self._early.clear()

    def kill_running(self) -> None:
        for runtime in self._running.values():
            runtime.kill_running()

    def close(self) -> None:
        for runtime in self._running.values():
            runtime.close()
        self._running.clear()

    def _event(self, kind: str, body: dict[str, Any]) -> None:
        if self._log is None:
            self._early.append((kind, body))
        elif not self._log.degraded:
            self._log.append(kind, body, sync=False)


class _Trail:
    """What the log says was begun and not ended."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.snapshots: set[str] = set()
        self.undecided: dict[str, Any] | None = None
        self.lease: tuple[int, int] | None = None
        self.open_cycle: int | None = None
        for entry in entries:
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        body = entry.body
        match entry.type:
            case "cycle.started":
                self.open_cycle = entry.cycle
            case "cycle.finished":
                self.open_cycle = self.lease = None
            case "run.finished" | "run.interrupted":
                self.lease = None  # whatever was applied is recorded
            case "update.leased":
                self.lease = (body["from"], body["to"])
            case "update.applied" | "update.settled":
                last = body["to"]
                self.lease = (last + 1, self.lease[1]) if self.lease and last < self.lease[1] else None
            case "promotion.decided" if body["snapshot"]:
                self.snapshots.add(body["snapshot"])
                self.undecided = dict(body)
            case "promotion.applied" | "promotion.settled" | "freeze.entered":
                self.undecided = None
            case _:
                return


_DISCARDED = Decision(
    result="deny",
    gate="operator",
    rule="discarded",
    reason="this cycle was frozen and discarded; it starts again with the next turn of guard.cycles()",
)


def _refused(call: ToolCall) -> Outcome:
    return Outcome(call_id=call.id, status="denied", refusal=REFUSAL)


def _cell_spec(profile: Profile) -> CellSpec:
    return CellSpec(
        image=profile.image,
        mode=profile.mode,
        runtime=profile.runtime,
        cells=profile.cells,
        preload=tuple(profile.preload),
        limits=profile.limits.to_limits(),
        calls_per_cell=profile.calls_per_cell,
    )


def _docker(spec: CellSpec, run_id: str, on_event: EventSink) -> Runtime:
    from loopguard.sandbox.docker import DockerRuntime

    return DockerRuntime(spec, run_id=run_id, on_event=on_event)


def _integration(model: Any) -> Any:
    packages = [cls.__module__.partition(".")[0] for cls in type(model).__mro__]
    for package in packages:
        if package in INTEGRATIONS:
            return importlib.import_module(INTEGRATIONS[package])
    known = ", ".join(sorted(INTEGRATIONS))
    raise UsageError(
        f"attach(model=...) got a {type(model).__name__}; models of these packages can be guarded: {known}"
    )


def _check_directory(
    run_dir: Path, loaded: LoadedPolicy, *, adopt_policy: str | None, by: str | None, reason: str | None
) -> dict[str, Any] | None:
    """Whether this directory may be used under this policy; the body of `policy.adopted` where it changes hands."""
    if not (run_dir / "run.json").exists():
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise UsageError(f"{run_dir} holds something else than a run: name a new directory with --run-dir")
        return None
    old = str(run_facts(run_dir)["policy"])
    if old == loaded.digest:
        return None
    if adopt_policy is None or adopt_policy != loaded.digest:
        raise PolicyMismatchError(
            [
                (
                    f"{run_dir} belongs to guard policy {old[:12]}, and {loaded.path} is {loaded.digest[:12]}. "
                    f"To change the policy of this run, add --adopt-policy {loaded.digest}"
                )
            ]
        )
    change = compare(load(run_dir / "policy" / f"{old}.yaml").policy, loaded.policy)
    if change == "loosened" and not (by and reason):
        raise PolicyMismatchError(
            [f"{loaded.path} is not provably tighter than the policy of {run_dir}: say --by NAME --reason TEXT"]
        )
    return {"from": old, "to": loaded.digest, "change": change, "by": by, "reason": reason}


def _lay_out(run_dir: Path, loaded: LoadedPolicy, *, run_id: str, seed: int, command: Sequence[str]) -> None:
    (run_dir / "policy").mkdir(parents=True, exist_ok=True)
    kept = run_dir / "policy" / f"{loaded.digest}.yaml"
    if not kept.exists():
        replace_durably(kept, loaded.text.encode())
    if not (run_dir / "run.json").exists():
        body = {"id": run_id, "policy": loaded.digest, "seed": seed, "command": list(command), "versions": _versions()}
        replace_durably(run_dir / "run.json", json.dumps(body, indent=1, sort_keys=True).encode() + b"\n")


def _set_policy(run_dir: Path, digest: str) -> None:
    body = run_facts(run_dir) | {"policy": digest}
    replace_durably(run_dir / "run.json", json.dumps(body, indent=1, sort_keys=True).encode() + b"\n")


def _versions() -> dict[str, str]:
    versions = {"loopguard": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "numpy"):
        if (module := sys.modules.get(name)) is not None:
            versions[name] = str(module.__version__)
    return versions


def _digest_ids(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record.id}\x00{record.prompt}\x00{record.completion}\x01".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _quarantine_row(record: Record, reason: str) -> dict[str, Any]:
    origin = record.provenance.origin if record.provenance else None
    return {
        "id": record.id,
        "reason": reason,
        "origin": origin,
        "prompt": record.prompt,
        "completion": record.completion,
    }
