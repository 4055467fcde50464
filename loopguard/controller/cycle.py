"""One pass of the loop: generate, run tools, admit data, update, evaluate, promote."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from loopguard.controller.quarantine import hold_back
from loopguard.controller.ranks import QUIET
from loopguard.controller.tools import Episode, Tool
from loopguard.errors import MonitorError, UsageError
from loopguard.gates.promotion import held
from loopguard.gates.updates import OVERFLOW
from loopguard.state import signal_facts
from loopguard.types import Decision, Outcome, Record, Signal

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from loopguard.controller.guard import LoopGuard
    from loopguard.controller.learner import Learner
    from loopguard.controller.ranks import Asked

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


@dataclass(frozen=True, slots=True)
class _Early:
    """What was judged between forward and backward."""

    values: dict[str, Any]
    asked: Asked | None = None


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
        self._resumes = guard._resumes
        self._update_count = 0
        self._asked = 0
        """How many updates this cycle has asked for, whatever became of them."""
        self._early: _Early | None = None
        self._early_holding: tuple[Signal, ...] = ()

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
        self._guard._listen()  # a latch that nobody has taken up yet has no number and no reason
        self._guard._state.raise_if_frozen()
        calls = self._guard._episode(profile, cycle=self.number, closed=lambda: self.discarded)
        return Episode(self._guard, self, calls)

    def admit(self, records: Sequence[Record], *, proposed: int | None = None) -> Admitted:
        """Let the data gate decide which drafts may be trained on.

        `proposed` is how many drafts there were before the loop chose these; with it the gate can watch the share that
        is kept. A sample of the records' checks is run again in the sandbox. Raises LoopFrozen where the gate freezes;
        then none of the drafts is admitted.

        With several ranks a freeze is not raised here, since the others could not know of it before their gradients
        meet: `decision` says freeze, the records that were not quarantined are handed out all the same, and the next
        update freezes every rank before they have moved a weight. Keep none of them for later in that case.
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
        hold_back(guard, batch.quarantined, cycle=self.number)
        facts = {**batch.decision.facts, "admitted": len(batch.admitted), "quarantined": len(batch.quarantined)}
        if not batch.decision.allowed:
            guard._state.latch(batch.decision.reason)  # before anything that can fail
            guard._log.append("data.refused", {**facts, "reason": batch.decision.reason}, cycle=self.number)
            self._freeze(batch.decision, roll_back=self._update_count > 0)
            return self._refused(records, batch.quarantined, batch.decision)
        if guard._consensus.said is not None:
            return self._refused(records, batch.quarantined, guard._consensus.said)
        guard._data.commit(batch)
        facts["digest"] = _digest_ids(batch.admitted)
        guard._log.append("data.admitted", facts, cycle=self.number)
        return Admitted(records=batch.admitted, quarantined=batch.quarantined, decision=batch.decision)

    def _refused(
        self, records: Sequence[Record], quarantined: Sequence[tuple[Record, str]], decision: Decision
    ) -> Admitted:
        if not self._guard._consensus.several:
            return Admitted(records=(), quarantined=(), decision=decision)
        held_back = {record.id for record, _ in quarantined}
        rest = tuple(record for record in records if record.id not in held_back)
        return Admitted(records=rest, quarantined=tuple(quarantined), decision=decision)

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
        if self.discarded:
            return batch  # nothing comes of it
        try:
            guard._good.tape.keep(batch, guard._held().rng())
        except (TypeError, RecursionError) as error:
            raise UsageError(f"cycle.keep: {error}") from error
        return batch

    def forward(self, *, loss: Any, readings: Mapping[str, Any] | None = None, absent: Collection[str] = ()) -> None:
        """Judge this update between forward and backward, all of it but the gradient norm.

        Optional: it lets the ranks of a run come to their verdict while the gradients are on their way. `update` then
        waits for that verdict and judges the gradient norm, which has to be the same on all ranks, as it is under DDP
        and FSDP; so every other reading is given here. With gradient accumulation call it once, before the last
        backward, with the mean of the losses. Nothing is frozen before `update`.

            loss = model(**batch).loss
            cycle.forward(loss=loss)
            loss.backward()
            cycle.update(loss=loss)

        Raises UsageError where the update before has not followed.
        """
        guard = self._guard
        learner = guard._held()
        if self._early is not None:
            raise UsageError("cycle.forward was called twice: call cycle.update(loss=loss) after backward")
        if learner.late:
            self._early = _Early(dict(readings or {}))
            return
        if not self._begin(learner):
            return
        values = learner.measure({"loss": loss, **(readings or {})})
        own = self._own(values, absent=(*absent, "grad_norm"))
        self._early_holding = guard._updates_gate.holding
        self._early = _Early(values, guard._consensus.ask(own, at="update", number=guard._ledger.last + 1))

    def update(
        self,
        *,
        loss: Any,
        clip_norm: float | None = None,
        readings: Mapping[str, Any] | None = None,
        absent: Collection[str] = (),
    ) -> Decision:
        """Decide about one update, after `loss.backward()`, and take it if it is allowed.

        On allow: clips the gradients to `clip_norm` where given, steps every attached optimizer, ticks the schedulers
        and the averages, zeroes the gradients. On a freeze: none of that happens, weights and optimizer state stay as
        they are to the bit (or go back to the last boundary where suspect updates had been applied), and LoopFrozen is
        raised. On a skip (`freeze.on_trip: skip`) the batch is dropped and the loop goes on. With several ranks all of
        them do the same: what one of them trips on stops this very update on every rank.

        With gradient accumulation call it once for each optimizer step and give the mean of the micro-batches' losses.
        Several optimizers are decided together and step together. `readings` adds metrics beside `loss` and
        `grad_norm`, as numbers or as tensors of one element; a metric that the guard policy watches must be there every
        time, or be named in `absent` where this update has none, such as a reward between two generations. After
        `forward` they have been given there.

        Where the guard is `late` (attached on a GPU), impossible values are withheld by the device at once, and all
        else that is said here of a freeze is true of the update before this one.
        """
        guard = self._guard
        learner = guard._held()
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise UsageError(
                f"cycle.update(clip_norm={clip_norm!r}): the largest norm is a number above 0, or left out"
            )
        early, self._early = self._early, None
        if early is not None and (readings or absent):
            raise UsageError(
                "cycle.update(readings=..., absent=...) after cycle.forward: give them to forward, which judges them"
            )
        # Of several ranks each has begun in `forward`, and no other collective may come in between.
        begun = early is not None and not learner.late and guard._consensus.several
        if not begun and not self._begin(learner):
            learner.discard()
            return _DISCARDED
        if learner.late:
            extra = early.values if early is not None else readings or {}
            if absent:
                raise UsageError("cycle.update(absent=...) where updates are decided on the device: attach(late=False)")
            return self._stage(learner, loss, clip_norm=clip_norm, readings=extra)
        taken = learner.readings(loss, readings or {})
        if early is not None and not guard._consensus.several and not _same(early.values["loss"], taken.values["loss"]):
            learner.discard()
            raise UsageError("cycle.update got another loss than cycle.forward: give both the loss of this update")
        values = {**early.values, **taken.values, "loss": early.values["loss"]} if early is not None else taken.values
        absent = (*absent, "grad_norm") if taken.overflowed else absent
        # A tool call on another thread may freeze the run: then before this update or after it, and not within.
        with guard._turn:
            if guard._state.frozen and not guard._consensus.several:
                decision = _DISCARDED
            else:
                number = guard._ledger.last + 1
                decision = self._decide(early, values, number, absent=absent, overflowed=taken.overflowed)
                if decision.result == "allow":
                    return self._take(number, values, decision, clip_norm=clip_norm, overflowed=taken.overflowed)
        if decision is _DISCARDED:
            self._abandon()
            return _DISCARDED
        learner.discard()
        self._tape(number, values, clip_norm=clip_norm, decision=decision.result)
        return self._stopped(decision, number, values, in_time=bool(decision.facts.get("withheld_in_time")))

    def _decide(
        self,
        early: _Early | None,
        values: Mapping[str, float],
        number: int,
        *,
        absent: Collection[str],
        overflowed: bool,
    ) -> Decision:
        guard = self._guard
        if early is not None:
            return self._with_norm(early, values, number, absent=absent)
        self._early_holding = ()
        own = self._own(values, absent=absent)
        return guard._agree(own, at="overflow" if overflowed else "update")

    def _take(
        self, number: int, values: dict[str, float], decision: Decision, *, clip_norm: float | None, overflowed: bool
    ) -> Decision:
        """Apply an update that was allowed. What breaks in the middle of that leaves weights nobody can vouch for."""
        guard = self._guard
        try:
            guard._held().apply(clip_norm=clip_norm)
        except Exception as error:  # noqa: BLE001 - an optimizer, a schedule or an average of the user's
            reason = f"update {number} broke while it was applied: {error!r}"
            broken = Decision(result="freeze", gate="update", rule="apply", reason=reason)
            self._freeze(broken, update=number, readings=values, roll_back=True)
            return broken
        if overflowed:
            guard._ledger.enter_overflow()
            self._tape(number, values, clip_norm=clip_norm, decision="overflow")
            self._shorten()
            return OVERFLOW
        self._tape(number, values, clip_norm=clip_norm, decision="allow")
        self._applied(number, values, decision)
        return decision

    def _tape(self, number: int, values: Mapping[str, float], *, clip_norm: float | None, decision: str) -> None:
        """Close an update on the tape that a capsule is made of."""
        self._asked += 1
        place = {"cycle": self.number, "update_in_cycle": self._asked}
        self._guard._good.tape.settle(number, values, clip_norm=clip_norm, decision=decision, **place)

    def _begin(self, learner: Learner) -> bool:
        """Listen, and look after the disk and the veto. False where this cycle no longer acts."""
        ready = True
        with self._guard._telling():
            ready = self._enter()
        return ready and self._honoured(learner)

    def _own(self, values: Mapping[str, float], *, absent: Collection[str] = ()) -> Decision:
        """Judge the update at hand by what this rank sees, under a lease."""
        number = self._guard._ledger.last + 1
        with self._guard._telling():
            self._guard._ledger.permit(number, cycle=self.number)
        return self._judge(values, number, absent=absent)

    def _with_norm(
        self, early: _Early, values: Mapping[str, float], number: int, *, absent: Collection[str]
    ) -> Decision:
        """What the ranks said after forward, and where they allow the update, what the gradient norm says."""
        guard = self._guard
        assert early.asked is not None
        decision = guard._consensus.answer(early.asked)
        if decision.result != "allow":
            return decision
        norm = values.get("grad_norm", 0.0)
        guard._consensus.same_norm(norm)
        judged = {name for name in guard._updates_gate.limits(armed=True) if name != "grad_norm"}
        second = self._judge({} if "grad_norm" in absent else {"grad_norm": norm}, number, absent={*judged, *absent})
        return replace(second, signals=(*decision.signals, *second.signals))

    def _stage(self, learner: Learner, loss: Any, *, clip_norm: float | None, readings: Mapping[str, Any]) -> Decision:
        """Let the device decide about this update, and take in what became of the one before."""
        guard = self._guard
        if guard._consensus.several:
            with guard._telling():
                guard._ledger.permit(guard._ledger.last + 1, cycle=self.number)  # while they can still agree not to
        if not self._collect(learner):
            learner.discard()
            return _DISCARDED
        number = guard._ledger.last + 1
        guard._ledger.permit(number, cycle=self.number)
        self._early_holding = ()
        # As in `update`: a freeze on another thread comes before this update or after it.
        with guard._turn:
            if not (guard._state.frozen and not guard._consensus.several):
                return self._put_on_device(learner, number, loss, clip_norm=clip_norm, readings=readings)
        self._abandon()
        return _DISCARDED

    def _put_on_device(
        self, learner: Learner, number: int, loss: Any, *, clip_norm: float | None, readings: Mapping[str, Any]
    ) -> Decision:
        guard, gate = self._guard, self._guard._updates_gate
        limits = gate.limits(armed=self.number > 0)
        try:
            learner.stage(loss, readings, limits=limits, update=number, latch=not gate.skips, clip_norm=clip_norm)
        except UsageError:
            raise  # before anything moved
        except Exception as error:  # noqa: BLE001 - an optimizer or a schedule of the user's
            reason = f"update {number} broke while it was applied: {error!r}"
            broken = Decision(result="freeze", gate="update", rule="apply", reason=reason)
            self._freeze(broken, update=number, roll_back=True)
            return broken
        guard._ledger.last = number
        # Filled in when the device has told them.
        guard._awaited = {}
        self._tape(number, guard._awaited, clip_norm=clip_norm, decision="staged")
        return _STAGED

    def _collect(self, learner: Learner) -> bool:
        """Judge the update that the device has decided about. False where this cycle no longer acts."""
        guard = self._guard
        if not learner.late:
            return True
        staged = learner.collect()
        if staged is None:
            return self._nothing_staged()
        guard._awaited.update(staged.values)
        if staged.withheld:
            guard._good.tape.amend(decision="withheld")
        decision = self._judge(staged.values, staged.update)
        if staged.withheld and decision.result == "allow":
            # The device compares in its own precision; what it would not let pass, nobody lets pass.
            reason = f"the device withheld update {staged.update}, at the very edge of a limit"
            decision = replace(decision, result="freeze", rule="device", reason=reason)
        own, decision = decision, guard._agree(decision, at="update")
        if own.result == "allow" and decision.gate not in ("update", "promotion"):
            # The update was sound. What stops the run came from elsewhere.
            self._applied(staged.update, staged.values, own)
            self._freeze(decision, roll_back=not decision.facts.get("withheld_in_time"), agreed=True)
            return False
        if decision.result == "allow":
            self._applied(staged.update, staged.values, decision)
            return True
        if decision.result == "skip" and staged.withheld:
            self._stopped(decision, staged.update, staged.values, in_time=True)
            return True
        if decision.result == "skip":
            decision = replace(decision, result="freeze")
        learner.discard()
        guard._ledger.last = staged.update - 1
        self._stopped(decision, staged.update, staged.values, in_time=staged.withheld)
        return False

    def _nothing_staged(self) -> bool:
        """The ranks agree all the same: what one of them knows, all have to hear."""
        decision = self._guard._agree(QUIET, at="update")
        if decision.allowed:
            return True
        self._guard._held().discard()
        self._freeze(decision, roll_back=not decision.facts.get("withheld_in_time"), agreed=True)
        return False

    def _judge(self, values: Mapping[str, float], number: int, *, absent: Collection[str] = ()) -> Decision:
        try:
            return self._guard._updates_gate.decide(values, update=number, armed=self.number > 0, absent=absent)
        except MonitorError as error:
            # What was applied before is as sound as it was; it is this update that nobody can vouch for.
            learner = self._guard._learner
            facts = {"withheld_in_time": learner is None or not learner.late}
            return Decision(result="freeze", gate="update", rule="monitor_error", reason=str(error), facts=facts)

    def _honoured(self, learner: Learner) -> bool:
        """Whether the last decision came true in the optimizer. False where this cycle no longer acts."""
        if not (trouble := learner.trouble()):
            return True
        self._freeze(Decision(result="freeze", gate="update", rule="veto_not_honoured", reason=trouble), roll_back=True)
        return self._guard._consensus.several

    def _applied(self, number: int, values: dict[str, float], decision: Decision) -> None:
        guard = self._guard
        guard._ledger.enter(number, values, decision.signals)
        self._update_count += 1
        self._shorten()

    def _shorten(self) -> None:
        guard = self._guard
        if guard._good.tape.full and guard._held().ticks:
            guard._good.shorten(guard._whole_state(), guard._facts(cycle=self.number))

    def ticked(self) -> None:
        """The schedules of the last update have ticked: for a framework that ticks them by itself, after `update`."""
        guard = self._guard
        if guard._good.tape.full:
            guard._good.shorten(guard._whole_state(), guard._facts(cycle=self.number))

    def _stopped(self, decision: Decision, number: int, values: dict[str, float], *, in_time: bool) -> Decision:
        """Record an update that did not happen, and freeze unless its batch may just be dropped."""
        guard = self._guard
        body = {"update": number, "readings": values, "signals": [signal_facts(s) for s in decision.signals]}
        if decision.result == "skip":
            guard._ledger.flush()
            guard._ledger.last = number
            guard._updates_gate.skipped(number)
            guard._log.append("update.skipped", {**body, "reason": decision.reason}, cycle=self.number)
            return decision
        guard._state.latch(decision.reason)  # before anything that can fail
        try:
            guard._ledger.flush()
            guard._log.append("update.withheld", body, cycle=self.number)
        finally:
            self._freeze(decision, update=number, readings=values, roll_back=not in_time, agreed=True)
        return decision

    def decide_update(self, *, readings: Mapping[str, float]) -> Decision:
        """Only decide, for loops that step an optimizer which is not attached.

        Raises UsageError where a model is attached, and `update` is the only door, and where there are several ranks,
        which meet in `attach`. A freeze raises LoopFrozen.
        """
        guard = self._guard
        if guard._consensus.several:
            raise UsageError("several ranks meet in guard.attach(...): attach the model, and call cycle.update")
        if guard._learner is not None:
            raise UsageError("a model is attached: call cycle.update(loss=loss), which decides and steps")
        if not self._enter():
            return _DISCARDED
        number = guard._ledger.last + 1
        guard._ledger.permit(number, cycle=self.number)
        decision = self._judge(readings, number)
        if decision.result != "allow":
            return self._stopped(decision, number, dict(readings), in_time=True)
        guard._ledger.enter(number, dict(readings), decision.signals)
        return decision

    def promote(
        self,
        panel: Mapping[str, float],
        *,
        apply: Callable[[], object] | None = None,
        unjudged: Mapping[str, float] | None = None,
    ) -> Decision:
        """Let the weights in training become the actor, if the panel of capability metrics allows it.

        `apply` installs them in the actor and is called on allow alone; leave it out where the model is its own actor.
        The decision is durable before `apply` runs; the candidate is kept in memory by then and goes to disk beside the
        next cycle. A deny means that something in the last updates is not settled: the last promoted actor stays, and
        the loop may go on. A metric that the guard policy does not know freezes as well; what is for the record alone
        is given as `unjudged`. Raises LoopFrozen where the gate freezes: the actor stays as it is and the model goes
        back to the promoted state. Raises DiskError where the promotion before could not be brought to disk.
        """
        guard = self._guard
        learner = guard._held()
        with guard._telling():
            self._enter()
        if self.discarded or not self._collect(learner) or not self._honoured(learner):
            return _DISCARDED
        if apply is None and not learner.same_actor:
            raise UsageError("promote(panel, apply=...) needs apply: how the actor takes the weights over")
        values = _numbers(panel)
        previous = guard._good.promoted.panel if guard._good.promoted else None
        own = QUIET
        with guard._telling():
            guard._ledger.flush()
            measured = {"panel": values} | ({"unjudged": _numbers(unjudged)} if unjudged else {})
            guard._log.append("eval.finished", measured, cycle=self.number)
            own = self._judge_panel(values, previous)
            if own.rule == "missing":
                there = ", ".join(sorted({*values, *(unjudged or {})})) or "nothing"
                own = replace(own, reason=f"{own.reason}; reported were {there}")
        decision = guard._agree(own, at="promote")
        body: dict[str, Any] = {"result": decision.result, "rule": decision.rule, "reason": decision.reason}
        body |= {"panel": values, "previous": previous, "weights": learner.weights_digest()}
        if decision.result == "deny":
            guard._log.append("promotion.decided", body, cycle=self.number)
            return decision
        if not decision.allowed:
            guard._state.latch(decision.reason)  # before anything that can fail
            guard._log.append("promotion.decided", body, cycle=self.number)
            self._freeze(decision, roll_back=True, agreed=True)
            return decision
        guard._data.promoted()
        slot, trouble = None, ""
        with guard._telling():
            slot = guard._good.take(guard._whole_state(), guard._facts(cycle=self.number))
            guard._log.append("promotion.decided", body, cycle=self.number)
            trouble = self._install(apply, learner, weights=body["weights"])
        decision = guard._agree(_not_installed(trouble) if trouble else own, at="apply")
        if not decision.allowed or slot is None:
            self._freeze(decision, roll_back=True, actor_too=True, agreed=True)
            return decision
        guard._log.append("promotion.applied", {"actor": body["weights"]}, cycle=self.number)
        # From here on it is what a freeze goes back to. It goes to disk beside the next cycle.
        guard._good.promote(slot, cycle=self.number, update=guard._ledger.last, panel=values)
        guard._announced.clear()  # they are a part of that state
        guard._ledger.end_lease()
        self.promoted = True
        guard._log.append("cycle.finished", {"result": "promoted"}, cycle=self.number)
        guard._count_promoted()
        guard._state.remember(cycle=self.number)
        return decision

    def _judge_panel(self, values: Mapping[str, float], previous: Mapping[str, float] | None) -> Decision:
        guard = self._guard
        try:
            decision = guard._promotions.decide(values, previous=previous, cycle=self.number)
        except MonitorError as error:
            return Decision(result="freeze", gate="promotion", rule="monitor_error", reason=str(error))
        holding = (*self._early_holding, *guard._updates_gate.holding)
        return held(holding) if decision.allowed and holding else decision

    def _install(self, apply: Callable[[], object] | None, learner: Learner, *, weights: str) -> str:
        """Run `apply` and look whether the actor now has the weights decided about; a sentence where it has not."""
        if apply is None:
            return ""
        try:
            apply()
        except Exception as error:  # noqa: BLE001 - whatever a loop's own apply raises, half-installed weights must not act
            return repr(error)
        return "" if learner.actor_digest() == weights else "the actor has other weights after it"

    def _enter(self) -> bool:
        """Listen; stop where the loop is frozen. False where this cycle no longer acts.

        Raises UsageError for a cycle that is over, AuditWriteError where the log can no longer be written.
        """
        guard = self._guard
        if guard._closed:
            raise UsageError("this guard is closed: open the run directory again to go on")
        guard._listen()
        if guard._state.frozen and not guard._consensus.several:
            self._abandon()
        if self.outlived():
            return False
        if self.promoted or guard._cycle is not self:
            raise UsageError(f"cycle {self.number} is over: take the next one from guard.cycles(...)")
        guard._log.require()
        guard._good.check()
        return True

    def outlived(self) -> bool:
        """Whether a freeze came over this cycle; also one that was lifted again before the cycle heard of it."""
        guard = self._guard
        if not self.discarded and self._resumes != guard._resumes:
            if guard._learner is not None:
                guard._learner.discard()
            guard._log.append("cycle.finished", {"result": "frozen"}, cycle=self.number)
            self.discarded = True
        return self.discarded

    def _freeze(
        self,
        decision: Decision,
        *,
        update: int | None = None,
        readings: Mapping[str, float] | None = None,
        roll_back: bool = False,
        actor_too: bool = False,
        agreed: bool = False,
    ) -> None:
        guard = self._guard
        guard._freeze(decision, cycle=self.number, update=update, readings=readings, roll_back=roll_back, agreed=agreed)
        if guard._consensus.several and not agreed:
            return  # every rank stops where they agree next
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
            # What the gate asks for takes nothing from the budget of the loop.
            outcomes = Tool(self._guard, self, name, spends=False).map(
                [record.check.code for record in records if record.check is not None]
            )
            rechecked += zip(records, outcomes, strict=True)
        return rechecked


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _not_installed(trouble: str) -> Decision:
    return Decision(result="freeze", gate="promotion", rule="apply", reason=f"apply failed: {trouble}")


def _numbers(panel: Mapping[str, Any]) -> dict[str, float]:
    """The panel as floats. Raises UsageError, naming the metric, where one is no number."""
    values = {}
    for name, value in panel.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"cycle.promote: {name} is {value!r:.60}; give one number for each metric") from error
    return values


def _digest_ids(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record.id}\x00{record.prompt}\x00{record.completion}\x01".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
