"""The guard of one run: opens its directory, holds its model, freezes, rolls back, settles what was left open."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.controller import aftermath, signals
from loopguard.controller import directory as directories
from loopguard.controller.aftermath import Aftermath, suspect_state
from loopguard.controller.calls import Calls, EpisodeCalls, NoCell
from loopguard.controller.cells import Cells, docker
from loopguard.controller.cycle import Cycle
from loopguard.controller.lastgood import LastGood
from loopguard.controller.learner import Learner, LoopState, integration_for, trainer_integration_for
from loopguard.controller.ledger import Ledger
from loopguard.controller.ranks import QUIET, At, Consensus, Place, SharedStore, await_layout, compare, place
from loopguard.errors import AuditWriteError, DiskError, LoopFrozen, MonitorError, UsageError
from loopguard.gates.data import DataGate
from loopguard.gates.promotion import PromotionGate
from loopguard.gates.tools import ToolGate
from loopguard.gates.updates import UpdateGate
from loopguard.notify import mirrored
from loopguard.policy.load import LoadedPolicy, load
from loopguard.snapshots import Promoted, write_capsule
from loopguard.state import FreezeState, anchor_lost, entered, latch_reason, run_facts, signal_facts
from loopguard.types import ROLL_BACK, Decision, Expectation, ExpectedKind
from loopguard.ways import unacceptable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from loopguard.approvals import Consent
    from loopguard.audit.events import Entry
    from loopguard.controller.observe import Observer
    from loopguard.notify import Notifier
    from loopguard.sandbox.base import CellSpec, EventSink, Runtime
    from loopguard.types import WayOn

_POLL_S = 0.5
_EXPECTED = get_args(ExpectedKind)


class LoopGuard:
    """The guard of one run: its policy, its log, its sandboxes and its freeze.

    A guard lives from `from_file` to `close` and is the only writer of its run directory meanwhile. Use it as a context
    manager, so that an interrupted run leaves a finished record. With several ranks each has a guard of its own on the
    same directory, and they agree on every update and promotion; docs/ranks.md has the whole of it.

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
        cells: Cells,
        here: Place = Place(0, 1),  # noqa: B008 - frozen, and what it is nearly always
    ) -> None:
        self.policy = policy.policy
        self.policy_digest = policy.digest
        self.run_dir = run_dir
        self.run_id = run_id
        self.found: list[str] = []
        """What a start found of an earlier one and what it did about it; one sentence each."""
        self._log = log
        self._cells = cells
        self._consensus = Consensus(here, self.policy)
        self._pid = os.getpid()
        self._turn = threading.RLock()
        """Held while the run freezes, resumes or takes in a request: tool calls come from many threads."""
        self._calls = Calls(self)
        self._tools = ToolGate(self.policy)
        self._data = DataGate(self.policy.data)
        self._updates_gate = UpdateGate(self.policy.updates, self.policy.freeze)
        self._promotions = PromotionGate(self.policy.promotion)
        self._good = LastGood(
            run_dir,
            log,
            keep=self.policy.promotion.keep_snapshots,
            # The rest of a capsule is for two states.
            tape_bytes=(self.policy.freeze.capsule_mib << 20) // 4,
        )
        self._state = FreezeState(run_dir, log, follows=None if here.leads else here.stream)
        self._learner: Learner | None = None
        self._loop: LoopState | None = None
        self._config: dict[str, Any] = {}
        last = self._good.promoted.update if self._good.promoted else 0
        self._ledger = Ledger(log, lease=self.policy.updates.lease, last=last)
        self._awaited: dict[str, float] = {}
        """The readings of an update that the device has not told yet."""
        self._resumed: tuple[str, str, WayOn, Consent | None] | None = None
        """Who let the run go on, how, and who approved that, until the other ranks know."""
        self._after = Aftermath(self.policy.freeze)
        self._resumes = 0
        """How often the run was let go on; a cycle of before acts no more."""
        self._cycle: Cycle | None = None
        self._announced: list[Expectation] = []
        """Since the boundary: a rollback forgets them, and they are still to come."""
        self._driven = False
        """Whether a framework begins the cycles."""
        self._closed = False
        self._notifier: Notifier | None = None

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

        Raises PolicyError, PolicyMismatchError, UsageError (a directory with other things in it, nobody to notify),
        SandboxUnavailableError, RunBusyError, AuditTamperedError, AuditWriteError. None of them leaves a half-written
        run directory behind.
        """
        loaded = load(Path(policy))
        directory = Path(run_dir)
        here = place()
        adopted = None
        if here.leads:
            adopted = directories.check(directory, loaded, adopt_policy=adopt_policy, by=by, reason=reason)
        else:
            await_layout(directory)  # whether it is under the same policy is told to all ranks when they meet
        goes_on = (directory / "run.json").exists() and bool(read.segments(directory, here.stream))
        known = (directory / "run.json").exists()
        run_id = run_facts(directory)["id"] if known else f"run-{uuid.uuid4().hex[:12]}"
        notifier = directories.notifier(loaded.policy, directory) if here.leads else None
        cells = Cells(loaded.policy, run_id, runtimes or docker)
        if not read.latched(directory):
            cells.start()
        try:
            if here.leads:
                directories.lay_out(directory, loaded, run_id=run_id, seed=seed, command=command)
            log = AuditLog.open(
                directory,
                stream=here.stream,
                run_id=run_id,
                policy=loaded.digest,
                reserve_mib=loaded.policy.audit.reserve_mib,
                mirror=mirrored(notifier, mirror),
                segment_bytes=loaded.policy.audit.segment_mib * 1024 * 1024,
                compress=loaded.policy.audit.compress,
                checkpoint_every=loaded.policy.audit.checkpoint_every,
                anchors=directories.anchors(loaded.policy) if here.leads else (),
                on_lost_anchor=partial(anchor_lost, directory),
            )
        except BaseException:
            cells.close()
            raise
        try:
            cells.report_to(log)
            if adopted:
                # Once more, now that nobody else can write: a freeze may have come in between, or the time run out.
                adopted = directories.check(directory, loaded, adopt_policy=adopt_policy, by=by, reason=reason)
            if adopted:
                log.append("policy.adopted", adopted, actor={"kind": "person", "id": by or "unnamed"})
                directories.set_policy(directory, loaded)
            log.append("policy.loaded", directories.loaded_facts(loaded))
            log.append(
                "run.started",
                {"command": list(command), "seed": seed, "versions": directories.versions(), "goes_on": goes_on}
                | ({"rank": here.rank, "ranks": here.count} if here.count > 1 else {}),
            )
            guard = cls(loaded, directory, run_id=run_id, log=log, cells=cells, here=here)
            if here.leads:
                guard._settle()
                guard._refuse_overdue()
                guard._catch_up()
            if notifier is not None:
                notifier.begin(log)
                guard._notifier = notifier
            signals.freeze_on(loaded.policy.freeze.signal, guard, directory)
        except BaseException:
            cells.close()
            log.close()
            raise
        return guard

    @staticmethod
    def observe(
        run_dir: str | os.PathLike[str], *, seed: int = 0, command: Sequence[str] = (), **options: Any
    ) -> Observer:
        """Watch a run and withhold nothing: no guard policy, no Docker, no keys. See `Observer`."""
        from loopguard.controller.observe import Observer

        return Observer.open(run_dir, seed=seed, command=command, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and not self._closed:
            # The reason to be here is a person in a hurry; a log that fails now must not hide the interrupt.
            with suppress(AuditWriteError):
                self._ledger.flush()
                self._log.append("run.interrupted", {})
        self.close(finished=kind is None)

    def close(self, *, finished: bool = True) -> None:
        """Finish the record and take the sandboxes down. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._calls.refuse()
            self._cells.close()
            self._calls.close()
            self._judge_the_last()
            self._good.close()
            lost = self._good.lost()
            if not self._log.degraded:
                self._ledger.flush()
                if finished and not self._state.frozen and lost is None:
                    self._log.append("run.finished", {"cycles": self.promoted_cycle or 0})
                # A cache: an older one is still true of the record it names.
                with suppress(DiskError):
                    # What did not reach the disk is not promoted.
                    there = self._good.store.promoted() if lost is not None else None
                    self._state.remember(cycle=there.cycle if there else None, undone=lost is not None)
        finally:
            self._close_the_log()
        if finished and lost is not None:
            raise lost  # what was promoted last is not on disk, and nobody else would say so

    def _close_the_log(self) -> None:
        """Freeze where it could not be written; also where the first record that did not fit was one of the last."""
        try:
            if self._log.degraded:
                self._state.freeze_unwritable("the audit log could not be written")
        finally:
            try:
                if self._notifier is not None:
                    self._notifier.close()
            finally:
                self._log.close()
                signals.stop_listening(self)  # last: until here a signal freezes, and does not kill what is written

    def _judge_the_last(self) -> None:
        """Judge what nobody asks about any more: the update on the device, and whether the last was honoured."""
        learner = self._learner
        if learner is None or self._state.frozen or self._log.degraded:
            self._drain()
            return
        staged = learner.collect()
        if staged is not None:
            self._awaited.update(staged.values)
            try:
                decision = self._updates_gate.decide(staged.values, update=staged.update, armed=True)
            except MonitorError as error:
                decision = Decision(result="freeze", gate="update", rule="monitor_error", reason=str(error))
            if decision.result == "allow" and not staged.withheld:
                self._ledger.enter(staged.update, staged.values, decision.signals)
            else:
                self._ledger.last = staged.update - 1
                stop = replace(decision, result="freeze", reason=decision.reason)
                back = not staged.withheld
                self._freeze(
                    stop, cycle=None, update=staged.update, readings=staged.values, roll_back=back, agreed=True
                )
        if (trouble := learner.trouble()) and not self._state.frozen:
            stop = Decision(result="freeze", gate="update", rule="veto_not_honoured", reason=trouble)
            self._freeze(stop, cycle=None, roll_back=True, agreed=True)

    # What a loop calls

    def attach(
        self,
        trainer: Any = None,
        /,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        actor: Any = None,
        loop: LoopState | None = None,
        scaler: Any = None,
        averages: Any = None,
        late: bool | None = None,
        config: Mapping[str, Any] | None = None,
        cycle_updates: int = 1,
    ) -> None:
        """Put a model in training under this guard, or the trainer of a framework that runs the loop itself.

            guard.attach(trainer)
            trainer.train()

        A trainer of transformers or TRL is attached before `train()`, and everything else is taken from it; the pages
        of docs/ on them say what an update and a cycle are there. `cycle_updates` is for those that generate: so many
        updates, at least, before the weights are asked to be promoted. What follows is about loops of your own.

        `optimizer`, `scheduler` and `averages` may be one or a list. `actor` is the module that generates data; leave
        it out, or say "same", where that is the model itself. `loop` is the loop's own state, which travels with every
        snapshot. `scaler` is a `torch.amp.GradScaler`: its overflows are counted and never taken for a fault.
        `averages` are copies such as `AveragedModel`, which follow applied updates alone. With `late`, the device
        withholds impossible values by itself and the host reads one update later, so that it never waits; leave it out
        to have that on a GPU where every optimizer allows it. `config` is what the loop was set up with, as JSON
        values: its digest goes into the log and the whole of it into every capsule, for whoever has to rebuild the
        model.

        Where the run directory holds promoted weights, all of these are restored to them, RNG included; so call this
        after everything is built and seeded. With several ranks this is where they meet: each of them calls it, and
        where one is frozen all are. Raises UsageError for what cannot be guarded, SnapshotError where the promoted
        snapshot is missing or damaged.
        """
        if trainer is not None:
            taken = [model, optimizer, scheduler, actor, loop, scaler, averages, late]
            if any(one is not None for one in taken):
                raise UsageError("attach(trainer) takes model, optimizer and all else from the trainer: leave it out")
            self._check_attachable(loop=loop, config=config)
            if cycle_updates < 1:
                raise UsageError(f"attach(cycle_updates={cycle_updates!r}): a cycle has at least 1 update")
            trainer_integration_for(trainer).attach(self, trainer, config=config, cycle_updates=cycle_updates)
            self._driven = True
            return
        if model is None or optimizer is None:
            raise UsageError("attach needs a trainer, or model=... and optimizer=..., the one that moves its weights")
        self._check_attachable(loop=loop, config=config)
        held = integration_for(model).learner(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            actor=actor,
            scaler=scaler,
            averages=averages,
            late=late,
        )
        self._hold(held, loop=loop, config=config)
        self._log.append("model.attached", self._attached())
        promoted = self._good.promoted
        if promoted is None:
            self._good.begin(self._whole_state(), self._facts(cycle=None))
        else:
            try:
                self._put_back(self._good.go_on(), actor_too=True)
            except (RuntimeError, ValueError, KeyError) as error:
                what = "the model, its optimizers or schedulers are not those that this run was promoted with"
                raise UsageError(f"{self.run_dir}: {what}: {error}") from error
            self._good.adopt(self._whole_state(), self._facts(cycle=promoted.cycle))
            because = "the run goes on from the last promoted state"
            self._log.append("snapshot.restored", {"snapshot": promoted.snapshot, "because": because})
        self._pay_what_is_owed()

    def _check_attachable(self, *, loop: LoopState | None, config: Mapping[str, Any] | None) -> None:
        """Raise UsageError before anything is held."""
        self._check_owner()
        if self._learner is not None:
            raise UsageError("this guard already holds a model: make one guard for each run")
        if config is not None and not isinstance(config, Mapping):
            raise UsageError(f"attach(config=...) got a {type(config).__name__}; give a dict of JSON values")
        try:
            json.dumps(dict(config or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"attach(config=...) takes JSON values: {error}") from error
        if loop is not None and not (hasattr(loop, "state_dict") and hasattr(loop, "load_state_dict")):
            raise UsageError(f"attach(loop=...) got a {type(loop).__name__}; it needs state_dict and load_state_dict")

    def _hold(self, learner: Learner, *, loop: LoopState | None, config: Mapping[str, Any] | None) -> None:
        """Take a learner in, and meet the other ranks. Raises UsageError, holding nothing, where it cannot be kept."""
        if trouble := learner.unkeepable():
            learner.let_go()
            raise UsageError(f"attach: {trouble}")
        self._learner = learner
        self._loop = loop
        self._config = copy.deepcopy(dict(config or {}))
        self._meet()

    def expect(self, kind: ExpectedKind, *, at: int | None = None, span: int = 1) -> None:
        """Announce a change, so that it is not taken for a fault: an epoch boundary, a learning rate, a mix of data.

        It may show from update `at` on (the next one where left out), during `span` updates. What the announcement does
        not cover still trips: a loss that rises at an epoch boundary, a value that is not a number. Raises UsageError
        for a change in the past or of another kind.
        """
        for word, number in (("at", at), ("span", span)):
            if number is not None and not isinstance(number, int):
                raise UsageError(f"expect({kind!r}, {word}={number!r}): updates are counted in whole numbers")
        next_one = self._ledger.last + 1
        first = next_one if at is None else at
        if kind not in _EXPECTED:
            raise UsageError(f"expect({kind!r}): that is no kind of change; expected one of {', '.join(_EXPECTED)}")
        if first < next_one:
            raise UsageError(f"expect({kind!r}, at={first}): update {first} is over; the next one is {next_one}")
        if span < 1:
            raise UsageError(f"expect({kind!r}, span={span}): a change shows in at least 1 update")
        announced = Expectation(kind=kind, at=first, span=span)
        self._announced.append(announced)
        self._updates_gate.expect(announced)
        self._log.append("update.expected", {"kind": kind, "at": first, "span": span}, sync=False)

    def protect(self, texts: Iterable[str]) -> int:
        """Name evaluation texts that no training record may overlap with; gives how many are protected by now."""
        return self._data.protect(texts)

    def tool(self, what: Any) -> Any:
        """A tool for a framework that calls plain Python functions: it runs in a cell. See `functions.guarded`."""
        from loopguard.controller.functions import guarded

        return guarded(self, what)

    def wrap_environment(self, cls: Any) -> Any:
        """An environment class whose methods run in a cell of their own rollout. See `environments.guarded`."""
        from loopguard.controller.environments import guarded

        return guarded(self, cls)

    def wrap_reward(self, reward: Any) -> Any:
        """A reward function whose answers the guard reads before they count. See `rewards.guarded`."""
        from loopguard.controller.rewards import guarded

        return guarded(self, reward)

    def cycles(self, count: int, *, warmup: bool = False, ready: Callable[[], bool] | None = None) -> Iterator[Cycle]:
        """The cycles of this run, up to number `count`, after the last promoted one.

        With `warmup`, cycle 0 comes first where nothing has been promoted yet: in it, monitors that need history only
        learn. While `ready` says no, such as where a stream has no new data, no cycle begins: the run is on hold, which
        ends by itself, and for as long as `hold.at_most` of the guard policy allows. Raises LoopFrozen where the run is
        frozen (or waits, or exits, as the guard policy says).
        """
        if not isinstance(count, int):
            raise UsageError(f"guard.cycles({count!r}): cycles are counted in whole numbers")
        if ready is not None and not callable(ready):
            raise UsageError(f"guard.cycles(ready={ready!r}): give a function that says whether a cycle may begin")
        if self._driven:
            raise UsageError("this guard is attached to a trainer, which begins its cycles by itself: call train()")
        return self._turns(count, warmup=warmup, ready=ready)

    def _turns(self, count: int, *, warmup: bool = False, ready: Callable[[], bool] | None = None) -> Iterator[Cycle]:
        promoted = self._good.promoted
        number = promoted.cycle + 1 if promoted else (0 if warmup else 1)
        while (number := max(number, self._after.over + 1)) <= count:
            if self._halted(number):
                self._stop()
                continue
            if not self._unheld(ready):
                continue
            self._cells.start()
            self._begin(number)
            cycle = self._cycle = Cycle(self, number)
            self._good.tape.drop()  # batches that nothing came of
            with self._telling():
                self._log.append("cycle.started", {}, cycle=number)
            yield cycle
            if not cycle.outlived():
                self._end(cycle)
            if not cycle.discarded:
                number += 1

    @property
    def frozen(self) -> bool:
        """Whether weights may not change right now."""
        return self._state.frozen

    @property
    def promoted_cycle(self) -> int | None:
        """The last promoted cycle, or None."""
        return self._good.promoted.cycle if self._good.promoted else None

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
        if not self._state.stirred() or (self._consensus.said and not self._consensus.stopped):
            return
        with self._turn:
            if not self._consensus.place.leads:
                self._adopt_latch()
                return
            for request in self._state.requests():
                if request.kind == "resume" and self._state.lifts(request):
                    self._resume(by=request.by, reason=request.reason, way=request.way, consent=request.consent)
                elif request.kind == "freeze" and not self._state.freeze_id:
                    why = f"{request.by} asked for it: {request.reason}"
                    self._freeze(Decision(result="freeze", gate="operator", rule="request", reason=why), cycle=None)
            self._adopt_latch()

    def _adopt_latch(self) -> None:
        if self._state.frozen and not self._state.freeze_id:
            why = latch_reason(self.run_dir)
            self._freeze(Decision(result="freeze", gate="operator", rule="latch", reason=why), cycle=None)

    # What several ranks do together; with one, each of these comes down to what that one says

    def _meet(self) -> None:
        """Take the other ranks in, and come to stand where rank 0 stands."""
        here, consensus = self._consensus.place, self._consensus
        try:
            consensus.join(self._held().peers())
        except ConnectionError as error:
            raise UsageError(f"the ranks could not meet: {error}") from error
        if not consensus.several:
            return
        self._listen()
        self._resumed = None  # the others are about to be told where rank 0 stands
        store = SharedStore(self._good.store.root, consensus.peers, self._whole_state)
        standings = self._gather(
            {
                "run": self.run_id,
                "policy": self.policy_digest,
                "late": self._held().late,
                "frozen": self._state.frozen,
                "freeze": "" if consensus.said else self._state.freeze_id,
                "reason": self._state.reason,
                "count": self._state.count - (consensus.said is not None),
                "promoted": asdict(self._good.promoted) if self._good.promoted else None,
                "after": self._after.facts(),
            }
        )
        compare(standings)
        first = standings[0]
        self._good.share(store, Promoted(**first["promoted"]) if first["promoted"] else None)
        if not here.leads:
            self._ledger.last = self._good.promoted.update if self._good.promoted else 0
            self._state.follow(count=first["count"], freeze=first["freeze"], reason=first["reason"])
            self._settle()
            self._after.load(first["after"])
        consensus.stopped = bool(first["freeze"])
        if not consensus.stopped and any(one["frozen"] for one in standings):
            # Nothing has been applied, so nothing has to be agreed upon.
            why = "the latch was set before the ranks met"
            latch = Decision(result="freeze", gate="operator", rule="latch", reason=why)
            self._freeze(consensus.said or latch, cycle=None, agreed=True)

    def _gather(self, value: Any) -> list[Any]:
        try:
            return self._consensus.peers.gather(value)
        except ConnectionError as error:
            raise UsageError(f"the ranks could not meet: {error}") from error

    def _halted(self, cycle: int) -> bool:
        """Whether no cycle may begin. All ranks are told the same."""
        consensus = self._consensus
        if not consensus.several:
            self._listen()
            return self._state.frozen
        if not consensus.stopped:
            self._listen()  # else where they wait together: a resume has to reach all of them
            decision = consensus.answer(consensus.ask(QUIET, at="cycle", number=cycle))
            if not decision.allowed:
                self._freeze(decision, cycle=None, roll_back=not decision.facts.get("withheld_in_time"), agreed=True)
        return consensus.stopped

    def _agree(self, own: Decision, *, at: At) -> Decision:
        """What all ranks do about the update or the promotion at hand."""
        number = self._ledger.last + (at in ("update", "overflow"))
        return self._consensus.answer(self._consensus.ask(own, at=at, number=number))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What cannot be written in here stops one rank at once; of several, it stops all where they agree next."""
        try:
            yield
        except (AuditWriteError, DiskError) as error:
            if not self._consensus.several:
                raise
            self._freeze(Decision(result="freeze", gate="audit", rule="unwritable", reason=str(error)), cycle=None)

    def _wait_together(self) -> None:
        """Wait until rank 0 has taken a resume in, then resume as it did. Raises LoopFrozen where a rank goes away."""
        consensus = self._consensus
        while True:
            time.sleep(_POLL_S)
            if consensus.place.leads:
                self._listen()
            told = self._resumed if consensus.place.leads else None
            try:
                (goes_on,) = consensus.peers.finish(consensus.peers.start([int(told is not None)]))
                first = consensus.peers.gather(told)[0] if goes_on else None
            except ConnectionError as error:
                consensus.lost = str(error)
                raise LoopFrozen(self._state.freeze_id, f"{self._state.reason} (and {error})") from error
            if first is not None:
                by, reason, way, consent = first
                if not consensus.place.leads:
                    self._resume(by=by, reason=reason, way=way, consent=consent)
                self._resumed = None
                return

    def _episode(self, profile: str, *, cycle: int | None, closed: Callable[[], bool] = lambda: False) -> EpisodeCalls:
        """A cell of a sandbox profile until it is closed."""
        self._listen()
        if self._state.frozen:
            return EpisodeCalls(self._calls, profile, NoCell(), cycle=cycle, closed=closed)
        self._cells.start()
        return EpisodeCalls(self._calls, profile, self._cells.of(profile).episode(), cycle=cycle, closed=closed)

    def _freeze(
        self,
        decision: Decision,
        *,
        cycle: int | None,
        update: int | None = None,
        readings: Mapping[str, float] | None = None,
        roll_back: bool = False,
        agreed: bool = False,
    ) -> str:
        """Latch, keep the evidence, undo what was suspect, record. The latch comes first, whatever fails after it.

        Of several ranks, one only latches here; the rest follows when they have `agreed`, on all of them.
        """
        freeze = self._state.latch(decision.reason)
        if self._consensus.binds and not agreed:
            self._consensus.say(decision, roll_back=roll_back)
            return freeze
        self._consensus.stopped = True
        self._calls.end_running()
        self._drain()
        capsule = self._capsule(freeze, decision, cycle=cycle, update=update, readings=readings)
        back = roll_back and self._learner is not None and self._good.held
        if back:
            self._go_back(actor_too=False)  # before the log, which a full disk can stop
        self._ledger.flush()
        restored = self._record_going_back(because=f"freeze {freeze}") if back else None
        self._state.freeze(
            decision,
            cycle=cycle,
            facts={"update": update, "restored": restored, **capsule},
        )
        self._after.froze(freeze, gate=decision.gate, cycle=cycle)
        self._resumed = None  # it was about the freeze before
        if spent := self._after.spent:
            self._state.halt(by="loopguard", reason=spent, because="budget")
        return freeze

    def _stop(self) -> None:
        """What the guard policy says a frozen loop does. Returns only where it waited and somebody resumed."""
        if not self._consensus.several:
            with self._turn:
                self._adopt_latch()  # one that was set after the gate had listened: by a signal, in that very moment
        if self._state.halted:
            raise LoopFrozen(self._state.freeze_id, self._state.reason)
        match self.policy.freeze.when_frozen:
            case "exit":
                # Under torchrun a non-zero exit is a failure to be restarted, and a restart does not thaw anything.
                sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else LoopFrozen.exit_code)
            case "wait" if self._consensus.several and not self._consensus.lost:
                self._wait_together()
            case "wait" if not self._consensus.lost:
                while self._state.frozen:
                    time.sleep(_POLL_S)
                    self._listen()
                    if self._state.halted:
                        raise LoopFrozen(self._state.freeze_id, self._state.reason)
            case _:
                raise LoopFrozen(self._state.freeze_id, self._state.reason)

    def _resume(self, *, by: str, reason: str, way: WayOn = ROLL_BACK, consent: Consent | None = None) -> None:
        if way.disposition == "halt":
            self._state.halt(by=by, reason=reason, because="decision", consent=consent)
            self._resumed = by, reason, way, consent
            return
        if way.disposition == "accept" and (why := unacceptable(self.run_dir, self._state.freeze_id)):
            self._state.stay_frozen(why)
            return
        back = self._learner is not None and self._good.held
        if back and self._good.accepted and way.disposition != "accept":
            # Whoever rolls back, or signs that, means what was promoted, and not what was accepted since.
            self._put_back(self._good.beneath(), actor_too=True)
            self._good.adopt(self._whole_state(), self._facts(cycle=self.promoted_cycle))
        elif back:
            self._go_back(actor_too=True)  # first: a run that could not go back stays frozen
        self._state.resume(by=by, reason=reason, way=way, consent=consent)
        self._resumes += 1
        self._resumed = by, reason, way, consent
        self._consensus.resumed()
        self._tools.forget()
        self._after.resumed(way)
        if back:
            self._record_going_back(because="resumed: the frozen cycle is rolled back")
            self._pay_what_is_owed()
        self._tell_probation()

    def _pay_what_is_owed(self) -> None:
        """Do to the learner what people decided at the last resume; again at a start, until something is promoted."""
        if self._after.owed is None or self._state.frozen:
            return
        freeze, way = self._after.owed
        learner = self._held()
        if way.disposition == "discard":
            # With the generators of before, the batches of the discarded cycle would be drawn once more.
            learner.reseed(f"{self.run_id} {freeze}")
            self._good.adopt(self._whole_state(), self._facts(cycle=self.promoted_cycle))
            return
        try:
            name, state = suspect_state(self.run_dir, freeze)
        except UsageError as error:
            raise UsageError(
                f"{error}. It was accepted before it was damaged: freeze the run (`loopguard freeze`), and resume it "
                "in another way"
            ) from error
        self._put_back(state, actor_too=learner.same_actor)
        rule = str(entered(self.run_dir).body.get("rule"))
        self._updates_gate.relearn(rule)
        self._promotions.relearn(rule)
        self._good.adopt(self._whole_state(), self._facts(cycle=self.promoted_cycle), name=name)
        because = f"accepted: the run goes on from the state at {freeze}"
        self._log.append(
            "snapshot.restored", {"snapshot": name, "because": because, "weights": learner.weights_digest()}
        )

    def _tell_probation(self) -> None:
        rule = self.policy.freeze.probation
        if rule is not None and self._after.probation and not self._after.told:
            self._after.told = True
            self._log.append("probation.began", {"cycles": self._after.probation, "tighten": rule.tighten})
        self._state.tell(probation=self._after.probation)

    def _begin(self, cycle: int) -> None:
        """As strict as this cycle has to be: a probation tightens, a waiver lets one rule pass."""
        self._after.begin(cycle)
        self._tell_probation()
        share, waived = self._after.strictness
        self._updates_gate.adjust(share=share, waived=waived)
        self._promotions.adjust(share=share, waived=waived)
        self._data.adjust(share=share, waived=waived)
        self._tools.adjust(share=share)

    def _count_promoted(self) -> None:
        ended = self._after.promoted()
        self._state.probation = self._after.probation  # the promotion is told next
        if ended:
            self._log.append("probation.ended", {}, cycle=self._after.cycle)

    def _unheld(self, ready: Callable[[], bool] | None) -> bool:
        """Wait until a cycle may begin; False where the run froze meanwhile, or may have."""
        begun = time.monotonic()
        reason, stop, _ = self._why_hold(ready, since=begun)
        if not reason:
            return True
        self._log.append("hold.entered", {"reason": reason})
        self._state.tell(hold=reason)
        try:
            while reason and not stop:
                time.sleep(_POLL_S)
                self._listen()
                reason, stop, too_long = self._why_hold(ready, since=begun)
                if reason and too_long and not stop:
                    most = self.policy.hold.at_most_s
                    why = f"on hold for longer than the guard policy allows ({most:g} s): {reason}"
                    trip = Decision(result="freeze", gate="operator", rule="hold", reason=why)
                    self._freeze(trip, cycle=None, agreed=True)
                    stop = True
        finally:
            # Also where `ready` raises, or somebody is in a hurry.
            held_s = round(time.monotonic() - begun, 3)
            self._log.append("hold.ended", {"held_s": held_s, "frozen": self._state.frozen})
            self._state.tell(hold="")
        return False  # look again: of several ranks another one may have frozen

    def _hold_reason(self, ready: Callable[[], bool] | None) -> str:
        least = self.policy.hold.free_mib
        if least is not None and shutil.disk_usage(self.run_dir).free < least << 20:
            return f"less than {least} MiB are free where the run directory lies"
        return "" if ready is None or ready() else "the loop has nothing to work on yet"

    def _why_hold(self, ready: Callable[[], bool] | None, *, since: float) -> tuple[str, bool, bool]:
        """Why no cycle may begin, whether the run froze, and whether that lasts too long. All ranks are told the same.

        A collective where there are several and anything could hold them: they wait together, by the clock of rank 0.
        """
        own = (
            "" if self._state.frozen else self._hold_reason(ready),
            self._state.frozen,
            time.monotonic() - since > self.policy.hold.at_most_s,
        )
        if not self._consensus.several or (ready is None and self.policy.hold.free_mib is None):
            return own
        told = self._gather(own)
        return next((one[0] for one in told if one[0]), ""), any(one[1] for one in told), told[0][2]

    def _capsule(
        self,
        freeze: str,
        decision: Decision,
        *,
        cycle: int | None,
        update: int | None,
        readings: Mapping[str, float] | None,
    ) -> dict[str, Any]:
        """Keep what a replay needs, and the suspect state. A full disk costs the capsule, not the freeze."""
        here = self._consensus.place
        folder = self.run_dir / "freezes" / (freeze if here.leads else f"{freeze}.{here.stream}")
        told = {
            "freeze": freeze,
            "gate": decision.gate,
            "rule": decision.rule,
            "reason": decision.reason,
            "signals": [signal_facts(signal) for signal in decision.signals],
            "facts": decision.facts,
            "update": update,
            "readings": dict(readings or {}),
        }
        learner = self._learner
        facts = self._facts(cycle=cycle) | {"run": run_facts(self.run_dir), "config": self._config, "ranks": here.count}
        if learner is not None:
            facts |= {"settings": learner.settings(), "state_digest": learner.digest()}
        anchor, tape = self._good.replayable()
        facts["replays"] = "since the boundary" if tape is self._good.tape else "up to the boundary"
        try:
            capsule = write_capsule(
                folder,
                limit_bytes=self.policy.freeze.capsule_mib << 20,
                decision=told,
                anchor=anchor,
                tape=tape,
                suspect_state=self._whole_state() if learner is not None else None,
                facts=facts,
            )
        except Exception as error:  # noqa: BLE001 - a loop's own state_dict may raise anything; the freeze comes first
            return {"capsule": None, "capsule_trouble": f"the capsule could not be written: {error}"}
        return {
            "capsule": str(folder.relative_to(self.run_dir)),
            "capsule_digest": capsule.digest,
            "capsule_lacks": capsule.left_out,
        }

    def _release(self) -> None:
        """Let the learner go: its optimizers step again as they like, and another one may be attached."""
        if self._learner is not None:
            self._learner.let_go()
            self._learner = None

    def _attached(self) -> dict[str, Any]:
        learner = self._held()
        text = json.dumps(self._config, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"weights": learner.weights_digest(), "config": digest, "late": learner.late} | learner.settings()

    def _facts(self, *, cycle: int | None) -> dict[str, Any]:
        """What a snapshot says of where it comes from. Equal states of two runs have equal names by it."""
        return {
            "policy": self.policy_digest,
            "versions": directories.versions(),
            "cycle": cycle,
            "update": self._ledger.last,
        }

    def _whole_state(self) -> dict[str, Any]:
        return {
            "learner": self._held().state(),
            "updates": self._ledger.last,
            "update_gate": self._updates_gate.state_dict(),
            "data_gate": self._data.state_dict(),
            "promotion_gate": self._promotions.state_dict(),
            "loop": self._loop.state_dict() if self._loop is not None else None,
        }

    def _restore(self, *, actor_too: bool, because: str) -> str:
        """Go back to the boundary; gives the name of its snapshot."""
        self._go_back(actor_too=actor_too)
        return self._record_going_back(because=because)

    def _go_back(self, *, actor_too: bool) -> None:
        self._put_back(self._good.state(), actor_too=actor_too)
        self._good.rewind()
        for announced in self._announced:
            if announced.at + announced.span > self._ledger.last:
                self._updates_gate.expect(announced)

    def _record_going_back(self, *, because: str) -> str:
        snapshot = self._good.digest() or "kept in memory alone"
        self._log.append("snapshot.restored", {"snapshot": snapshot, "because": because})
        return snapshot

    def _put_back(self, state: dict[str, Any], *, actor_too: bool) -> None:
        learner = self._held()
        if self._loop is not None:
            # A copy: a loop may keep what it is given and write to it.
            self._loop.load_state_dict(copy.deepcopy(state["loop"]))
        self._ledger.go_to(state["updates"])
        self._updates_gate.load_state_dict(state["update_gate"])
        self._data.load_state_dict(state["data_gate"])
        self._promotions.load_state_dict(state["promotion_gate"])
        learner.restore(state["learner"], actor_too=actor_too)  # its last act is to put the generators back
        learner.release()

    def _drain(self) -> None:
        """Take in what the device has decided and nobody has read yet."""
        staged = self._learner.collect() if self._learner is not None else None
        if staged is None:
            return
        self._awaited.update(staged.values)
        if staged.withheld:
            self._good.tape.amend(decision="withheld")
            self._ledger.last = staged.update - 1
        else:
            self._ledger.enter(staged.update, staged.values)

    def _end(self, cycle: Cycle, *, keep: bool = False) -> None:
        """The loop's body is through. Weights that act must have been promoted, unless nothing acts any more."""
        if cycle.promoted:
            return
        if self._learner is not None and not (cycle._collect(self._learner) and cycle._honoured(self._learner)):
            return
        self._ledger.flush()
        if self._learner is not None and self._learner.same_actor and self._good.held and not keep:
            self._restore(actor_too=True, because="the cycle ended without a promotion and the model is its own actor")
        self._ledger.end_lease()
        # Weights that stay are known to the log, so that another training may begin with them.
        known = {"weights": self._learner.weights_digest()} if keep and self._learner is not None else {}
        self._log.append("cycle.finished", {"result": "not promoted", **known}, cycle=cycle.number)

    # What a start finds

    def _settle(self) -> None:
        """Bring an interrupted run to rest: finish what was decided, undo what nobody can vouch for."""
        leads = self._consensus.place.leads
        stream = self._consensus.place.stream
        trail = directories.Trail(read.entries(self.run_dir, stream))
        self._after = Aftermath.of(read.entries(self.run_dir, stream, types=aftermath.TYPES), self.policy.freeze)
        promoted = self._good.promoted
        pointer = promoted.snapshot if promoted else None
        if leads and pointer not in trail.credible:
            reason = (
                "snapshots/promoted.json is gone, and the log tells of promotions"
                if pointer is None
                else f"snapshots/promoted.json names {pointer[:12]}, which is not what the log promoted last"
            )
            self._come_up_frozen(Decision(result="freeze", gate="audit", rule="snapshot", reason=reason))
            self._settle_updates(trail, pointer)  # whoever resumes this may do so while this process lives
            return
        if leads and trail.rolled_back is not None and trail.rolled_back != pointer:
            # A person went back, and the process died before the pointer moved.
            self._good.roll_back(trail.rolled_back)
            pointer = trail.rolled_back
            self._ledger.last = self._good.promoted.update if self._good.promoted else 0
            self.found.append(f"the run goes back to {self._where()}, as somebody asked for")
        if trail.unsettled is not None and trail.unsettled != self.promoted_cycle:
            # Decided, perhaps applied, and not on disk: the pointer is what counts. Its updates are numbered again, and
            # once this is recorded no later start knows of that.
            self._log.epoch += 1
            self._log.append("promotion.settled", {"snapshot": pointer, "applied": False}, cycle=trail.unsettled)
            self._after.unpromoted(trail.unsettled)
            self.found.append(f"the promotion of cycle {trail.unsettled} was cut short and is undone")
        self._settle_updates(trail, pointer)
        if leads:
            # Whatever was killed before it could say so: `status` tells of the promotion that acts.
            self._state.remember(cycle=self.promoted_cycle, undone=True)

    def _settle_updates(self, trail: directories.Trail, pointer: str | None) -> None:
        """End the lease and the cycle that an earlier process left open."""
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
            done = self.promoted_cycle == trail.open_cycle
            self._log.append("cycle.finished", {"result": "promoted" if done else "abandoned"}, cycle=trail.open_cycle)
            if not done:
                self.found.append(f"cycle {trail.open_cycle} was not finished; it starts again from {self._where()}")

    def _refuse_overdue(self) -> None:
        """People approved that the run goes on now; what they knew may be long over."""
        if (late := self._state.overdue()) and not self._state.frozen:
            self._come_up_frozen(Decision(result="freeze", gate="operator", rule="overdue", reason=late))

    def _come_up_frozen(self, decision: Decision) -> None:
        """Nothing has been trained, so there is nothing to keep or to undo."""
        freeze = self._state.freeze(decision, cycle=None, facts={})
        self._after.froze(freeze, gate=decision.gate, cycle=None)

    def _catch_up(self) -> None:
        """Say what a process that died had come to and could not say any more."""
        if self._state.frozen and not self._state.halted and (spent := self._after.spent):
            self._state.halt(by="loopguard", reason=spent, because="budget")
        if self._after.ends():
            self._log.append("probation.ended", {}, cycle=self._after.cycle)
        self._state.tell(hold="", probation=self._after.probation)

    def _where(self) -> str:
        cycle = self.promoted_cycle
        return "its beginning" if cycle is None else f"the promoted state of cycle {cycle}"
