"""One pass of the loop: generate, run tools, admit data, update, evaluate, promote."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopguard.controller.tools import Episode, Tool
from loopguard.errors import MonitorError, UsageError
from loopguard.snapshots import Promoted, writing
from loopguard.state import signal_facts
from loopguard.types import Decision, Outcome, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loopguard.controller.guard import LoopGuard
    from loopguard.controller.learner import Learner

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
