"""One pass of the loop: generate, run tools, admit data, update, evaluate, promote."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from loopguard.controller.tools import Episode, Tool
from loopguard.errors import MonitorError, UsageError
from loopguard.gates.promotion import held
from loopguard.gates.updates import OVERFLOW
from loopguard.snapshots import writing
from loopguard.state import signal_facts
from loopguard.types import Decision, Outcome, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from loopguard.controller.guard import LoopGuard
    from loopguard.controller.learner import Learner

B = TypeVar("B")

_STAGED = Decision(
    result="allow",
    gate="update",
    rule="staged",
    reason="the device takes the step unless a value is outside of its limits; the next update says what became of it",
)
_DISCARDED = Decision(
    result="deny",
    gate="operator",
    rule="discarded",
    reason="this cycle was frozen and discarded; it starts again with the next turn of guard.cycles()",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What became of the drafts of a cycle: what may be trained on, and what is held back for which reason."""

    records: tuple[Record, ...]
    quarantined: tuple[tuple[Record, str], ...]
    decision: Decision


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

    def episode(self, profile: str) -> Episode:
        """A cell of this sandbox profile for one rollout: what a call writes is there for the next.

        Close it, or use it as a context manager. Raises UsageError where no rule names that profile, LoopFrozen where
        the loop is frozen, SandboxUnavailableError.
        """
        self._guard._state.raise_if_frozen()
        calls = self._guard._episode(profile, cycle=self.number, closed=lambda: self.discarded)
        return Episode(self._guard, self, calls)

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
        if sample and not self._enter():
            # The loop froze while the checks ran; what they came back with says nothing about the records.
            return Admitted(records=(), quarantined=(), decision=_DISCARDED)
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

    def batches(self, batches: Iterable[B]) -> Iterator[B]:
        """Hand out training batches, and keep a copy of each for the capsule of a freeze.

            for batch in cycle.batches(loader):
                loss = model(**batch).loss

        With the copies, and with the state of the random generators at each, `loopguard reproduce` can replay what led
        to a freeze. A batch may nest dicts, lists, tuples, dataclasses, tensors, strings and numbers; UsageError names
        what else it holds.
        """
        for batch in batches:
            yield self.keep(batch)

    def keep(self, batch: B) -> B:
        """Keep a copy of one batch for the capsule, right before the forward pass; gives the batch back.

        With gradient accumulation call it once for each micro-batch.
        """
        guard = self._guard
        try:
            guard._good.tape.keep(batch, guard._held().rng())
        except TypeError as error:
            raise UsageError(f"cycle.keep: {error}") from error
        return batch

    def update(
        self,
        *,
        loss: Any,
        clip_norm: float | None = None,
        readings: Mapping[str, Any] | None = None,
    ) -> Decision:
        """Decide about one update, after `loss.backward()`, and take it if it is allowed.

        On allow: clips the gradients to `clip_norm` where given, steps every attached optimizer, ticks the schedulers
        and the averages, zeroes the gradients. On a freeze: none of that happens, weights and optimizer state stay as
        they are to the bit (or go back to the last boundary where suspect updates had been applied), and LoopFrozen is
        raised. On a skip (`freeze.on_trip: skip`) the batch is dropped and the loop goes on.

        With gradient accumulation call it once for each optimizer step and give the mean of the micro-batches' losses.
        Several optimizers are decided together and step together. `readings` adds metrics beside `loss` and
        `grad_norm`, as numbers or as tensors of one element; a metric that the guard policy watches must be there every
        time.

        Where the guard is `late` (attached on a GPU), impossible values are withheld by the device at once, and all
        else that is said here of a freeze is true of the update before this one.
        """
        guard = self._guard
        learner = guard._held()
        if not self._enter() or not self._honoured(learner):
            learner.discard()
            return _DISCARDED
        if learner.late:
            return self._stage(learner, loss, clip_norm=clip_norm, readings=readings or {})
        taken = learner.readings(loss, readings or {})
        number = guard._updates + 1
        guard._lease(number, cycle=self.number)
        decision = self._judge(taken.values, number, absent=("grad_norm",) if taken.overflowed else ())
        if decision.result == "allow":
            learner.apply(clip_norm=clip_norm)
            if taken.overflowed:
                guard._overflows += 1
                guard._good.tape.settle(number, taken.values, clip_norm=clip_norm, decision="overflow")
                return OVERFLOW
            guard._good.tape.settle(number, taken.values, clip_norm=clip_norm, decision="allow")
            self._applied(number, taken.values, decision)
            return decision
        learner.discard()
        guard._good.tape.settle(number, taken.values, clip_norm=clip_norm, decision=decision.result)
        return self._stopped(decision, number, taken.values, in_time=bool(decision.facts.get("withheld_in_time")))

    def _stage(self, learner: Learner, loss: Any, *, clip_norm: float | None, readings: Mapping[str, Any]) -> Decision:
        """Let the device decide about this update, and take in what became of the one before."""
        guard = self._guard
        if not self._collect(learner):
            learner.discard()
            return _DISCARDED
        number = guard._updates + 1
        guard._lease(number, cycle=self.number)
        gate = guard._updates_gate
        learner.stage(loss, readings, limits=gate.limits(), update=number, latch=not gate.skips, clip_norm=clip_norm)
        guard._updates = number
        # Filled in when the device has told them.
        guard._awaited = {}
        guard._good.tape.settle(number, guard._awaited, clip_norm=clip_norm, decision="staged")
        return _STAGED

    def _collect(self, learner: Learner) -> bool:
        """Judge the update that the device has decided about. False where this cycle no longer acts."""
        guard = self._guard
        staged = learner.collect()
        if staged is None:
            return True
        guard._awaited.update(staged.values)
        decision = self._judge(staged.values, staged.update)
        if staged.withheld and decision.result == "allow":
            # The device compares in its own precision; what it would not let pass, nobody lets pass.
            reason = f"the device withheld update {staged.update}, at the very edge of a limit"
            decision = replace(decision, result="freeze", rule="device", reason=reason)
        if decision.result == "allow":
            self._applied(staged.update, staged.values, decision)
            return True
        if decision.result == "skip" and staged.withheld:
            self._stopped(decision, staged.update, staged.values, in_time=True)
            return True
        if decision.result == "skip":
            decision = replace(decision, result="freeze")
        learner.discard()
        guard._updates = staged.update - 1
        self._stopped(decision, staged.update, staged.values, in_time=staged.withheld)
        return False

    def _judge(self, values: Mapping[str, float], number: int, *, absent: Collection[str] = ()) -> Decision:
        try:
            return self._guard._updates_gate.decide(values, update=number, armed=self.number > 0, absent=absent)
        except MonitorError as error:
            # What was applied before is as sound as it was; it is this update that nobody can vouch for.
            facts = {"withheld_in_time": not self._guard._held().late}
            return Decision(result="freeze", gate="update", rule="monitor_error", reason=str(error), facts=facts)

    def _honoured(self, learner: Learner) -> bool:
        """Whether the last decision came true in the optimizer. False where this cycle no longer acts."""
        if not (trouble := learner.trouble()):
            return True
        self._freeze(Decision(result="freeze", gate="update", rule="veto_not_honoured", reason=trouble), roll_back=True)
        return False

    def _applied(self, number: int, values: dict[str, float], decision: Decision) -> None:
        guard = self._guard
        guard._updates = number
        guard._pending.append((number, values))
        if decision.signals:
            guard._notes.extend(signal_facts(signal) for signal in decision.signals)
        self._update_count += 1
        if guard._good.tape.full:
            guard._good.shorten(guard._whole_state(), guard._facts(cycle=self.number))

    def _stopped(self, decision: Decision, number: int, values: dict[str, float], *, in_time: bool) -> Decision:
        """Record an update that did not happen, and freeze unless its batch may just be dropped."""
        guard = self._guard
        guard._flush()
        body = {"update": number, "readings": values, "signals": [signal_facts(s) for s in decision.signals]}
        if decision.result == "skip":
            guard._updates = number
            guard._log.append("update.skipped", {**body, "reason": decision.reason}, cycle=self.number)
            return decision
        guard._log.append("update.withheld", body, cycle=self.number)
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
        The decision is durable before `apply` runs; the candidate is kept in memory by then and goes to disk beside the
        next cycle. A deny means that something in the last updates is not settled: the last promoted actor stays, and
        the loop may go on. Raises LoopFrozen where the gate freezes: the actor stays as it is and the model goes back
        to the promoted state. Raises DiskError where the promotion before could not be brought to disk.
        """
        guard = self._guard
        learner = guard._held()
        if not self._enter() or not self._collect(learner) or not self._honoured(learner):
            return _DISCARDED
        if apply is None and not learner.same_actor:
            raise UsageError("promote(panel, apply=...) needs apply: how the actor takes the weights over")
        guard._flush()
        values = {name: float(value) for name, value in panel.items()}
        guard._log.append("eval.finished", {"panel": values}, cycle=self.number)
        previous = guard._good.promoted.panel if guard._good.promoted else None
        try:
            decision = guard._promotions.decide(values, previous=previous, cycle=self.number)
        except MonitorError as error:
            decision = Decision(result="freeze", gate="promotion", rule="monitor_error", reason=str(error))
        if decision.allowed and (holding := guard._updates_gate.holding):
            decision = held(holding)
        body: dict[str, Any] = {"result": decision.result, "rule": decision.rule, "reason": decision.reason}
        body |= {"panel": values, "previous": previous, "weights": learner.weights_digest()}
        if decision.result == "deny":
            guard._log.append("promotion.decided", body, cycle=self.number)
            return decision
        if not decision.allowed:
            guard._log.append("promotion.decided", body, cycle=self.number)
            self._freeze(decision, roll_back=True)
            return decision
        guard._data.promoted()
        slot = guard._good.take(guard._whole_state(), guard._facts(cycle=self.number))
        guard._log.append("promotion.decided", body, cycle=self.number)
        if not self._install(apply, learner):
            return Decision(result="freeze", gate="promotion", rule="apply", reason=guard._state.reason)
        guard._log.append("promotion.applied", {"actor": learner.actor_digest()}, cycle=self.number)
        # From here on it is what a freeze goes back to. It goes to disk beside the next cycle.
        guard._good.promote(slot, cycle=self.number, update=guard._updates, panel=values)
        guard._lease_to = guard._updates  # a lease ends with its cycle
        self.promoted = True
        guard._log.append("cycle.finished", {"result": "promoted"}, cycle=self.number)
        guard._state.remember(cycle=self.number)
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
        guard._good.check()
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
        if guard._learner is not None:
            guard._learner.discard()  # gradients of a stopped update must not leak into the next one
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
        by_reason: dict[str, list[str]] = defaultdict(list)
        path = folder / f"cycle-{self.number:04d}.jsonl"
        with writing(path):
            folder.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                for record, reason in quarantined:
                    by_reason[reason].append(record.id)
                    file.write(json.dumps(_quarantine_row(record, reason), sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
        for reason, ids in by_reason.items():
            body = {"reason": reason, "count": len(ids), "records": ids[:100]}
            guard._log.append("data.quarantined", body, cycle=self.number, sync=False)


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
