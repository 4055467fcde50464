"""Watch a run and withhold nothing: no guard policy, no Docker, no keys.

Covered: the readings of every update in a real audit log, what the gate of the suggested policy would have said of each
of them, and a summary at the end. The observed run is to the bit the one without an observer.

Not covered: tools, which need a policy that says where they run; snapshots and capsules, since nothing is ever undone;
ranks other than the first, whose readings are not looked at.
"""

from __future__ import annotations

import atexit
import math
import os
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, get_args

from loopguard.audit import query, read
from loopguard.audit.events import printable
from loopguard.audit.log import AuditLog
from loopguard.controller import directory as directories
from loopguard.controller.cycle import Admitted
from loopguard.controller.diary import Diary
from loopguard.controller.learner import Learner, integration_for, trainer_integration_for
from loopguard.controller.ranks import await_layout, place
from loopguard.controller.watch import TYPES, Watch
from loopguard.errors import UsageError
from loopguard.policy.draft import draft
from loopguard.policy.load import LoadedPolicy, load
from loopguard.policy.suggest import FALSE_ALARM_EVERY, YOUNG, Suggestion, trains_by_reward
from loopguard.state import run_facts, signal_facts
from loopguard.types import Decision, Expectation, ExpectedKind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from types import TracebackType

    from loopguard.audit.events import Entry
    from loopguard.controller.watch import Finding
    from loopguard.types import Record

B = TypeVar("B")
T = TypeVar("T")

_EXPECTED = get_args(ExpectedKind)
_POLL_S = 0.5
_NAMED = 5
"""Later findings that the summary names."""
_ALLOWED = Decision(result="allow", gate="update", rule="observed", reason="this run is observed: nothing is withheld")
_ADMITTED = Decision(result="allow", gate="data", rule="observed", reason=_ALLOWED.reason)
_PROMOTED = Decision(result="allow", gate="promotion", rule="observed", reason=_ALLOWED.reason)


class Observer:
    """Watches one run, withholds nothing, and says at the end where a guard would have frozen it.

    An observer lives from `open` to `close`, or to the end of the process, and is the only writer of its run directory
    meanwhile. It offers what a loop calls of a `LoopGuard`, so that the two can be swapped in one line:

        LoopGuard.observe("runs/look").attach(trainer)

        with LoopGuard.observe("runs/look") as guard:
            guard.attach(model=model, optimizer=optimizer)
            for cycle in guard.cycles(20):
                ...

    A log that cannot be written never stops the training: that is said once, and again in the summary.
    """

    def __init__(self, run_dir: Path, *, diary: Diary | None, watch: Watch, quiet: bool) -> None:
        self.run_dir = run_dir
        self.found: list[str] = []
        """As a guard has it; an observer finds nothing that it would have to settle."""
        self._diary = diary
        """None on every rank but the first."""
        self._watch = watch
        self._quiet = quiet
        self._pid = os.getpid()
        self._learner: Learner | None = None
        self._trainer: dict[str, Any] = {}
        self._attached = False
        self._open_cycle: int | None = None
        self._finished: int | None = None
        """The cycle that was finished last by this process."""
        self._unreadable: set[str] = set()
        self._stumbled = ""
        """What went wrong in the observer itself; nothing is watched after it."""
        self._closed = False
        atexit.register(self._at_exit)

    @classmethod
    def open(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        seed: int = 0,
        command: Sequence[str] = (),
        mirror: Callable[[Entry], None] | None = None,
        quiet: bool = False,
    ) -> Self:
        """Open a run directory to watch a run in it, or go on in the one that is there.

        `mirror` gets each audit record as it is written. `quiet` prints nothing; `summary()` has the text. Raises
        UsageError where the directory holds a guarded run or other things, RunBusyError, AuditTamperedError,
        AuditWriteError.
        """
        folder, here = Path(run_dir), place()
        if not here.leads:
            await_layout(folder)
            return cls(folder, diary=None, watch=Watch(), quiet=True)
        known = _known(folder)
        run_id = known["id"] if known else f"run-{uuid.uuid4().hex[:12]}"
        if not known:
            policy = _observing()
            directories.lay_out(folder, policy, run_id=run_id, seed=seed, command=command, mode="observe")
        digest = run_facts(folder)["policy"]
        earlier = Watch.of(read.entries(folder, types=TYPES)) if read.segments(folder) else Watch()
        log = AuditLog.open(folder, run_id=run_id, policy=digest, mirror=mirror, compress=True)
        diary = Diary(log, quiet=quiet)
        diary.write("policy.loaded", {"name": "suggested", "digest": digest})
        body = {"command": list(command), "seed": seed, "versions": directories.versions(), "mode": "observe"}
        diary.write("run.started", body | {"goes_on": bool(known)}, sync=True)
        earlier.begin()
        return cls(folder, diary=diary, watch=earlier, quiet=quiet)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(broke=error)

    def close(self, *, finished: bool = True, broke: BaseException | None = None) -> None:
        """Finish the record and print the summary. May be called twice.

        Not `finished` is a run that ended early. `broke` is what ended it; left out, it is the exception that is under
        way, such as in a `finally`.
        """
        if self._closed or os.getpid() != self._pid:
            return
        broke = broke or sys.exc_info()[1]
        finished, interrupted = finished and broke is None, isinstance(broke, KeyboardInterrupt)
        # A device that broke with the run cannot tell of its last update, and must not hide why.
        with nullcontext() if finished else suppress(RuntimeError):
            self._collect()
        self._closed = True
        atexit.unregister(self._at_exit)
        if self._diary is None:
            return
        if finished:
            self._end_cycle()
        end = "run.finished" if finished else "run.interrupted" if interrupted else None
        self._diary.close(end, {"cycles": self._finished or 0})
        if not self._quiet:
            sys.stderr.write(self.summary() + "\n")

    def _at_exit(self) -> None:
        # What nothing caught is known here: the interpreter has printed it.
        self.close(broke=getattr(sys, "last_value", None))

    # What a loop calls

    def attach(
        self,
        trainer: Any = None,
        /,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        averages: Any = None,
        actor: Any = None,
        loop: Any = None,
        config: Mapping[str, Any] | None = None,
        late: bool | None = None,
        cycle_updates: int = 1,
    ) -> None:
        """Watch the trainer of a framework, or a model in training of a loop of your own.

        The arguments are those of `LoopGuard.attach`. Nothing is restored, copied or kept: `loop`, `config` and
        `cycle_updates` are taken so that the call need not change. Raises UsageError for what cannot be watched.
        """
        if self._attached:
            raise UsageError("this observer already watches a run: make one observer for each run")
        if trainer is not None:
            if model is not None or optimizer is not None:
                raise UsageError("attach(trainer) takes the model and its optimizer from the trainer: leave them out")
            integration = trainer_integration_for(trainer)
            self._trainer = {"trainer": type(trainer).__name__, "by_reward": trains_by_reward(type(trainer))}
            self._watch.attached(self._trainer)
            integration.observe(self, trainer)
        elif model is None or optimizer is None:
            raise UsageError("attach needs a trainer, or model=... and optimizer=...")
        else:
            self._learner = integration_for(model).learner(
                model=model,
                optimizer=optimizer,
                scheduler=scheduler,
                actor=actor,
                scaler=scaler,
                averages=averages,
                late=late,
            )
            self.note_model({"late": self._learner.late} | self._learner.settings())
        self._attached = True

    def expect(self, kind: ExpectedKind, *, at: int | None = None, span: int = 1) -> None:
        """Announce a change, so that it is not taken for a fault. See `LoopGuard.expect`."""
        for word, amount in (("at", at), ("span", span)):
            if amount is not None and not isinstance(amount, int):
                raise UsageError(f"expect({kind!r}, {word}={amount!r}): updates are counted in whole numbers")
        if kind not in _EXPECTED:
            raise UsageError(f"expect({kind!r}): that is no kind of change; expected one of {', '.join(_EXPECTED)}")
        self._collect()
        next_one = self._watch.last + 1
        first = next_one if at is None else at
        if first < next_one or span < 1:
            raise UsageError(f"expect({kind!r}, at={first}, span={span}): the next update is {next_one}, and span 1 up")
        if self._diary is not None:
            self._watch.expect(Expectation(kind=kind, at=first, span=span))
            self._diary.write("update.expected", {"kind": kind, "at": first, "span": span})

    def protect(self, texts: Iterable[str]) -> int:
        """Count the texts; nothing is held against them, since an observer admits everything."""
        return sum(1 for _ in texts)

    def tool(self, what: T) -> T:
        """Give back what it gets: observing changes nothing, so a tool of yours runs where it always ran.

        That there is one is recorded, so that the policy which is suggested has a tool gate.
        """
        self._has_tool(what if isinstance(what, str) else getattr(what, "__name__", type(what).__name__))
        return what

    def wrap_environment(self, cls: T) -> T:
        """Give back what it gets, and record that it is there."""
        self._has_tool(getattr(cls, "__name__", type(cls).__name__))
        return cls

    def wrap_reward(self, reward: T) -> T:
        """Give back what it gets."""
        return reward

    def cycles(
        self, count: int, *, warmup: bool = False, ready: Callable[[], bool] | None = None
    ) -> Iterator[ObservedCycle]:
        """The cycles from 1 to `count`; with `warmup` cycle 0 comes first, in which monitors only learn.

        All of them, also where the directory holds earlier ones: nothing is restored, so nothing can be left out. While
        `ready` says no, no cycle begins, for however long: an observer has no limit to hold a run to.
        """
        if not isinstance(count, int):
            raise UsageError(f"guard.cycles({count!r}): cycles are counted in whole numbers")
        if ready is not None and not callable(ready):
            raise UsageError(f"guard.cycles(ready={ready!r}): give a function that says whether a cycle may begin")
        for number in range(0 if warmup else 1, count + 1):
            while ready is not None and not ready():
                time.sleep(_POLL_S)
            self._begin_cycle(number)
            cycle = ObservedCycle(self, number)
            yield cycle
            self._collect()
            self._end_cycle()

    @property
    def frozen(self) -> bool:
        """Never."""
        return False

    @property
    def promoted_cycle(self) -> int | None:
        """The last cycle that was finished, or None."""
        return self._finished

    def state_digest(self) -> str:
        """SHA-256 over the weights in training and the whole optimizer state."""
        return self._held().digest()

    @property
    def actor_digest(self) -> str:
        """SHA-256 over the weights that generate now."""
        return self._held().actor_digest()

    # What an integration calls

    def see(self, readings: Mapping[str, float], *, absent: Collection[str] = ()) -> None:
        """Take in one applied update; they are numbered from 1. `absent` names metrics that it has none of.

        Raises nothing: a reading that is no number is left out and named in the summary.
        """
        if self._diary is None or self._closed or self._stumbled or os.getpid() != self._pid:
            return
        with self._on_its_own():
            values = self._numbers(readings)
            if self._open_cycle is None:
                self._begin_cycle(self._watch.cycle + 1)
            update = self._watch.last + 1
            armed = self._open_cycle is None or self._open_cycle > 0
            decision, finding = self._watch.take(values, update=update, armed=armed, absent=absent)
            self._diary.enter(update, values, absent=absent, signals=decision.signals)
            if finding is not None:
                self._foresee(finding, values)

    def measured(self, panel: Mapping[str, float]) -> None:
        """Take in an evaluation; the cycle ends with it, as it does where a guard would be asked to promote."""
        self._evaluated(panel)
        self._end_cycle()

    def note_model(self, facts: Mapping[str, Any]) -> None:
        """Record what model is watched, as JSON values."""
        if self._diary is not None:
            self._diary.write("model.attached", {**facts, **self._trainer})

    # What there is to know

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The updates that would have frozen the run, oldest first. What follows the first is hypothetical."""
        return tuple(self._watch.findings)

    def summary(self) -> str:
        """What was watched, where it would have frozen, and how to go on; a few lines."""
        lines = [*told(self._watch), *self._troubles()]
        where = shlex.quote(str(self.run_dir))
        lines.append(f"a policy for runs like this: loopguard init --from-run {where}")
        lines.append(f"its curves and its log:      loopguard audit report {where}")
        return "\n".join([f"LoopGuard observed {self.run_dir}", *(f"  {line}" for line in lines)])

    def _troubles(self) -> Iterator[str]:
        if self._stumbled:
            yield f"It was watched no further, by a mistake of the observer's own: {self._stumbled}."
        if self._unreadable:
            named = sorted(self._unreadable)[:_NAMED]
            more = len(self._unreadable) - len(named)
            left_out = ", ".join(named) + (f" and {more:,} more" if more else "")
            yield f"Left out, since they were no numbers with a name: {left_out}."
        if self._diary is not None and self._diary.trouble:
            yield f"The audit log is incomplete: {self._diary.trouble}."

    # What the cycles use

    def _held(self) -> Learner:
        if self._learner is None:
            raise UsageError("no model is attached: call guard.attach(model=..., optimizer=...) first")
        return self._learner

    def _has_tool(self, name: str) -> None:
        if self._diary is None or self._closed or os.getpid() != self._pid:
            return
        if name not in self._watch.seen.tools:
            self._watch.seen.tools[name] = None
            self._diary.write("tool.observed", {"tool": name})

    def _collect(self) -> None:
        """Take in the update that the device has told of meanwhile."""
        staged = self._learner.collect() if self._learner is not None else None
        if staged is not None:
            self.see(staged.values)

    def _overflowed(self) -> None:
        if self._diary is not None:
            self._diary.overflowed()

    def _begin_cycle(self, number: int) -> None:
        self._open_cycle = self._watch.cycle = number
        if self._diary is not None:
            self._diary.write("cycle.started", {}, cycle=number)

    def _end_cycle(self) -> None:
        number, self._open_cycle = self._open_cycle, None
        if number is not None and self._diary is not None:
            self._finished = number
            self._diary.write("cycle.finished", {"result": "observed"}, cycle=number, sync=True)

    def _evaluated(self, panel: Mapping[str, float], *, unjudged: Mapping[str, float] | None = None) -> None:
        if self._diary is None or self._closed or self._stumbled:
            return
        with self._on_its_own():
            values = self._numbers(panel)
            if self._open_cycle is None:
                self._begin_cycle(self._watch.cycle + 1)
            self._watch.measured(values)
            body = {"panel": values} | ({"unjudged": self._numbers(unjudged)} if unjudged else {})
            self._diary.write("eval.finished", body, cycle=self._open_cycle)

    def _foresee(self, finding: Finding, readings: Mapping[str, float]) -> None:
        assert self._diary is not None
        body = asdict(finding) | {"signals": [signal_facts(one) for one in finding.signals], "readings": dict(readings)}
        self._diary.write("freeze.foreseen", body, cycle=self._open_cycle, sync=True)

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, float]:
        numbers = {}
        for name, value in values.items():
            try:
                if not isinstance(name, str):
                    raise TypeError
                numbers[name] = float(value)
            except Exception:  # noqa: BLE001 - what a value raises that is asked for its number is up to its class
                self._unreadable.add(printable(str(name)))
        return numbers

    @contextmanager
    def _on_its_own(self) -> Iterator[None]:
        """Whatever goes wrong in here ends the watching, and not the training."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - that is the point; it is told, and what was seen until then stays
            self._stumbled = printable(f"{type(error).__name__}: {error}")
            if not self._quiet:
                sys.stderr.write(f"loopguard: watching ended, and the run goes on: {self._stumbled}\n")


class ObservedCycle:
    """One pass of a loop that is observed: what a loop calls of a `Cycle`, without anything being decided."""

    def __init__(self, observer: Observer, number: int) -> None:
        self.number = number
        self.promoted = False
        self.discarded = False
        self._observer = observer
        self._early: dict[str, Any] | None = None
        self._absent: tuple[str, ...] = ()
        self._first = observer._watch.last

    @property
    def updates(self) -> int:
        """How many updates this cycle has applied and told of."""
        return self._observer._watch.last - self._first

    def tool(self, name: str) -> _NoTool:
        """A tool that raises UsageError when it is called: there is no sandbox without a guard policy."""
        self._observer._has_tool(name)
        return _NoTool(name)

    def episode(self, profile: str) -> NoReturn:
        """Raise UsageError: there is no sandbox without a guard policy."""
        raise UsageError(f"cycle.episode({profile!r}): {_NO_SANDBOX}")

    def admit(self, records: Sequence[Record], *, proposed: int | None = None) -> Admitted:
        """Admit everything, and record how much that was."""
        if self._observer._diary is not None:
            body = {"kept": len(records), "proposed": proposed, "admitted": len(records), "quarantined": 0}
            self._observer._diary.write("data.admitted", body, cycle=self.number)
        return Admitted(records=tuple(records), quarantined=(), decision=_ADMITTED)

    def batches(self, batches: Iterable[B]) -> Iterator[B]:
        """Hand the batches through; no copies are kept, since nothing is ever frozen."""
        yield from batches

    def keep(self, batch: B) -> B:
        """Give the batch back."""
        return batch

    def forward(self, *, loss: Any, readings: Mapping[str, Any] | None = None, absent: Collection[str] = ()) -> None:
        """Take in what `update` would else be given. Raises UsageError where the update before has not followed."""
        self._observer._held()
        if self._early is not None:
            raise UsageError("cycle.forward was called twice: call cycle.update(loss=loss) after backward")
        self._early, self._absent = dict(readings or {}), tuple(absent)

    def update(
        self,
        *,
        loss: Any,
        clip_norm: float | None = None,
        readings: Mapping[str, Any] | None = None,
        absent: Collection[str] = (),
    ) -> Decision:
        """Take one update, just as a guard that allows it does. See `Cycle.update`.

        Raises UsageError for what a guard cannot take either, and whatever the optimizer raises.
        """
        observer, learner = self._observer, self._observer._held()
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise UsageError(
                f"cycle.update(clip_norm={clip_norm!r}): the largest norm is a number above 0, or left out"
            )
        if self._early is not None and (readings or absent):
            raise UsageError("cycle.update(readings=..., absent=...) after cycle.forward: give them to forward")
        extra = {**(self._early or {}), **(readings or {})}
        absent = absent or self._absent
        self._early, self._absent = None, ()
        if learner.late:
            observer._collect()
            number = observer._watch.last + 1
            learner.stage(loss, extra, limits={}, update=number, latch=False, clip_norm=clip_norm)
            return _ALLOWED
        taken = learner.readings(loss, extra)
        learner.apply(clip_norm=clip_norm)
        if taken.overflowed:
            observer._overflowed()
        else:
            observer.see(taken.values, absent=absent)
        return _ALLOWED

    def decide_update(self, *, readings: Mapping[str, float]) -> Decision:
        """Take in the readings of an update that the loop takes by itself. UsageError where a model is attached."""
        if self._observer._learner is not None:
            raise UsageError("a model is attached: call cycle.update(loss=loss), which decides and steps")
        self._observer.see(readings)
        return _ALLOWED

    def promote(
        self,
        panel: Mapping[str, float],
        *,
        apply: Callable[[], object] | None = None,
        unjudged: Mapping[str, float] | None = None,
    ) -> Decision:
        """Run `apply`, and record the panel, and beside it what is `unjudged`. What `apply` raises is raised."""
        observer = self._observer
        observer._collect()
        if apply is None and observer._learner is not None and not observer._learner.same_actor:
            raise UsageError("promote(panel, apply=...) needs apply: how the actor takes the weights over")
        observer._evaluated(panel, unjudged=unjudged)
        if apply is not None:
            apply()
        self.promoted = True
        return _PROMOTED


_NO_SANDBOX = (
    "this run is observed, and without a guard policy there is no sandbox to run code in. Write one with "
    "`loopguard init`, and open the run with LoopGuard.from_file(policy, run_dir=...)"
)


class _NoTool:
    """A tool that is not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"cycle.tool({self.name!r}): {_NO_SANDBOX}")

    async def acall(self, *_: Any, **__: Any) -> NoReturn:
        """Raise UsageError."""
        self()

    def map(self, *_: Any, **__: Any) -> NoReturn:
        """Raise UsageError."""
        self()


def told(watch: Watch) -> Iterator[str]:
    """What there is to say of a run that was watched, a sentence or two each."""
    seen = watch.seen
    if not seen.updates:
        yield "No update was seen: nothing can be said of this run."
        return
    watched, rest = _watched(watch)
    panel = f", {seen.evaluations:,} evaluations" if seen.evaluations else ""
    yield f"{seen.updates:,} updates{panel}; watched: {', '.join(watched)}{f'; and {rest} not' if rest else ''}"
    if seen.updates <= YOUNG:
        yield f"So few updates show only what is impossible: a level is known after {YOUNG} of them."
    if watch.findings:
        yield from _findings(watch)
    else:
        yield "Nothing in it would have frozen it."
    chance = watch.expected_by_chance
    by_chance = f"{chance:.2g}" if chance >= 0.01 else "less than 0.01"
    yield f"By chance, a healthy run of this length freezes {by_chance} times (once in {FALSE_ALARM_EVERY:,} updates)."


def _findings(watch: Watch) -> Iterator[str]:
    first, *later = watch.findings
    yield f"Would have frozen at update {first.update:,}: {first.reason} ({first.rule})"
    signal = next(iter(first.signals), None)
    if signal is not None:
        facts = signal_facts(signal)
        since = f"; looks wrong since update {signal.since:,}" if signal.since not in (None, first.update) else ""
        yield f"  {signal.metric} was {query.amount(signal.value)}, expected {query.expected(facts)}{since}"
    if later:
        named = ", ".join(f"{one.update:,} ({one.rule})" for one in later[:_NAMED])
        more = len(later) + watch.left_out - min(len(later), _NAMED)
        yield f"Further ones, had it gone on: at updates {named}{f' and {more:,} more' if more else ''}"
        yield "  These are hypothetical: frozen, the run would have gone back or ended there."


def _watched(watch: Watch) -> tuple[list[str], int]:
    """The metrics that have a monitor, and how many have none."""
    there = [(metric.name, bool(rules)) for metric, rules, _ in watch.seen.plan() if metric.count]
    return [name for name, rules in there if rules], sum(not rules for _, rules in there)


def _known(run_dir: Path) -> dict[str, Any] | None:
    """What `run.json` says of an observed run; None where the directory is new. UsageError for any other."""
    if not (run_dir / "run.json").exists():
        if directories.holds_else(run_dir):
            raise UsageError(f"{run_dir} holds something else than a run: name a new directory")
        return None
    facts = run_facts(run_dir)
    if facts.get("mode") != "observe":
        raise UsageError(
            f"{run_dir} is the directory of a guarded run, and a run is not watched in between: name a new directory "
            f"for LoopGuard.observe(...), or go on under its policy with LoopGuard.from_file(...)"
        )
    return facts


def _observing() -> LoadedPolicy:
    """The policy that an observed run stands under in its log: what is suggested while nothing has been seen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "observe.yaml"
        path.write_text(draft(Suggestion()), encoding="utf-8")
        return load(path)
