"""A loop that a framework runs: it has callbacks where a loop of your own has a `for`.

The framework calls `begin`, `update`, `evaluated`, `saved` and `end` where these things happen; cycles begin and end
in here. Nothing in this file knows a framework.

A framework also keeps checkpoints of its own, and starts from one of them. So the log remembers the weights of each,
and `begin` asks it: weights that nobody vouches for do not train on, and those of a checkpoint that a freeze or a
rollback undid are put back to what it went back to.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from loopguard.audit import read
from loopguard.errors import SnapshotError, UsageError
from loopguard.snapshots import replace_durably
from loopguard.types import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from loopguard.audit.events import Entry
    from loopguard.controller.cycle import Cycle
    from loopguard.controller.guard import LoopGuard
    from loopguard.controller.learner import Learner

What = Literal["applied", "skipped", "overflowed"]

_DENIED_IN_A_ROW = 8
"""So many refusals of the actor's next weights stop the run: it makes no headway, and a person should know."""


@dataclass
class _Boundary:
    """What a freeze or a person may go back to: the beginning, or a promotion."""

    weights: str = ""
    snapshot: str = ""
    """Empty until it is on disk; that of the beginning never has a name here."""
    saved: set[str] = field(default_factory=set)
    """The weights of the checkpoints since."""


@dataclass
class Standing:
    """Which weights the log vouches for, by their SHA-256."""

    known: set[str] = field(default_factory=set)
    undone: set[str] = field(default_factory=set)
    """Saved by a framework or promoted, and then a freeze or a person went back to before."""
    restored: str | None = None
    """The snapshot that the last restore went back to."""
    updates: bool = False
    """Whether anything was ever trained here."""
    _chain: list[_Boundary] = field(default_factory=lambda: [_Boundary()])

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Standing:
        """Read the log of a run."""
        standing = cls()
        for entry in entries:
            body = entry.body
            match entry.type:
                case "model.attached":
                    standing.known.add(body["weights"])
                case "update.leased":
                    standing.updates = True
                case "promotion.applied":
                    standing.known.add(body["actor"])
                    standing._chain.append(_Boundary(body["actor"]))
                case "snapshot.written" if body["promoted"]:
                    standing._last.snapshot = body["snapshot"]
                case "promotion.settled" if not body["applied"]:
                    standing._unpromote()
                case "promotion.rolled_back":
                    standing._back_to(body["to"])
                case "checkpoint.saved":
                    standing._save(body["weights"])
                case "cycle.finished" if "weights" in body:
                    standing._save(body["weights"])
                case "snapshot.restored":
                    standing._undo(standing._last.saved)
                    if "weights" not in body:  # a state that people accepted lies in its capsule
                        standing.restored = body["snapshot"]
                case _:
                    continue
        return standing

    @property
    def promoted(self) -> str:
        """The weights that were promoted last; the empty string where none were."""
        return self._last.weights

    @property
    def _last(self) -> _Boundary:
        return self._chain[-1]

    def _save(self, weights: str) -> None:
        self.known.add(weights)
        self.undone.discard(weights)
        if weights != self._last.weights:
            self._last.saved.add(weights)

    def _undo(self, weights: set[str]) -> None:
        self.undone |= weights
        self.known -= weights
        self._last.saved = set()

    def _unpromote(self) -> None:
        """The last promotion never came to disk: what it promoted is no more than saved."""
        if len(self._chain) > 1 and not self._last.snapshot:
            lost = self._chain.pop()
            self._last.saved |= lost.saved | {lost.weights}

    def _back_to(self, snapshot: str) -> None:
        later: set[str] = set()
        while len(self._chain) > 1 and self._last.snapshot != snapshot:
            lost = self._chain.pop()
            later |= lost.saved | {lost.weights}
        self._undo((later | self._last.saved) - {self._last.weights})


class Driver:
    """Drives a guard from the callbacks of a framework. Lives as long as the framework trains."""

    def __init__(self, guard: LoopGuard) -> None:
        self._guard = guard
        self._cycles = guard._turns(sys.maxsize)
        self._cycle: Cycle | None = None
        self._panel: dict[str, float] = {}
        """Of the evaluations since the promotion gate was asked last."""
        self._measured: object = None
        """Where the run stood at them: a panel says nothing of weights that have moved since."""
        self._sums: dict[str, tuple[float, int]] = {}
        self._denied = 0

    @property
    def cycle(self) -> Cycle:
        """The cycle at hand; one that a freeze discarded, or that was promoted, has been followed by another.

        Raises LoopFrozen where the run is frozen (or waits, or exits, as the guard policy says).
        """
        if self._cycle is None or self._cycle.promoted or self._cycle.outlived():
            self._cycle = next(self._cycles)
            self._sums.clear()
        return self._cycle

    # Beginning

    def begin(self, learner: Learner, *, config: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Take in a learner that the framework is about to train, from a checkpoint of its own or from the beginning.

        Raises UsageError for weights that have nothing to do with this run, LoopFrozen where the run is frozen.
        """
        guard = self._guard
        if guard._closed:
            raise UsageError("this guard is closed: open the run directory again, and attach a new trainer")
        guard._listen()
        guard._ledger.flush()  # of a training that broke off in this process
        if guard.frozen and not guard._consensus.several:
            guard._stop()
        standing = Standing.of(read.entries(guard.run_dir, guard._consensus.place.stream))
        guard._hold(learner, loop=None, config=config)
        weights = learner.weights_digest()
        first = not standing.updates and guard._good.promoted is None
        if checkpoint is None and weights in standing.known and self._starts_over(weights, standing):
            self.release()
            raise UsageError(
                f"{guard.run_dir} has promoted weights of update {guard._ledger.last}, and these are others that it "
                "knows, such as those that it began with: go on from a checkpoint "
                "(trainer.train(resume_from_checkpoint=True)), or name a new run directory"
            )
        if first or weights in standing.known:
            self._go_on(weights, checkpoint=None if first else checkpoint)
        elif weights in standing.undone:
            self._put_back(standing, checkpoint)
        elif checkpoint is None:
            self.release()
            raise UsageError(
                f"{guard.run_dir} is at update {guard._ledger.last}, and these are weights that it does not know: "
                "go on from a checkpoint (trainer.train(resume_from_checkpoint=True)), or name a new run directory"
            )
        else:
            self._stop_at_unknown(weights, checkpoint)
        guard._pay_what_is_owed()
        self._cycle = next(self._cycles)

    def _starts_over(self, weights: str, standing: Standing) -> bool:
        """Whether another process has got further. One that trains several times may begin where it wants."""
        good = self._guard._good
        return good.promoted is not None and not good.held and weights != standing.promoted

    def _go_on(self, weights: str, *, checkpoint: Path | None) -> None:
        guard = self._guard
        kept = self._kept(checkpoint, weights) if checkpoint is not None else None
        if kept is None and guard._good.promoted is not None and not guard._good.held:
            # Another process promoted, and what its monitors saw is in its snapshot.
            self._load_gates(guard._good.go_on())
        guard._log.append("model.attached", guard._attached())
        if kept is not None:
            guard._ledger.go_to(kept["updates"])
            guard._log.epoch += 1  # update numbers start again from there; the epoch tells the old ones from the new
            self._load_gates(kept)
            facts = {"checkpoint": str(checkpoint), "update": kept["updates"], "weights": weights}
            guard._log.append("checkpoint.loaded", facts)
        self._set_boundary(resumed=checkpoint is not None)

    def _load_gates(self, state: Mapping[str, Any]) -> None:
        self._guard._updates_gate.load_state_dict(state["update_gate"])
        self._guard._promotions.load_state_dict(state["promotion_gate"])

    def _set_boundary(self, *, resumed: bool) -> None:
        """What a freeze goes back to.

        Where training goes on from a checkpoint that is the promoted state, from disk. Where it begins, with an
        optimizer of its own, it is the beginning.
        """
        guard = self._guard
        promoted = guard._good.promoted
        if promoted is None or not resumed:
            guard._good.begin(guard._whole_state(), guard._facts(cycle=None))
            return
        guard._good.adopt(guard._good.go_on(), guard._facts(cycle=promoted.cycle))
        # A replay cannot start there, since what came after it was in another process.
        guard._good.shorten(guard._whole_state(), guard._facts(cycle=promoted.cycle))

    def _put_back(self, standing: Standing, checkpoint: Path | None) -> None:
        """A freeze or a person undid these weights: train on from where that went back to."""
        guard = self._guard
        whose = f"the weights of {checkpoint}" if checkpoint else "these weights"
        promoted = guard._good.promoted
        name = promoted.snapshot if promoted else standing.restored
        try:
            state = guard._good.store.read(name or "")
        except SnapshotError as error:
            self.release()
            raise UsageError(
                f"a freeze or a rollback undid {whose}, and what it went back to cannot be read: {error}. "
                "Start again without resume_from_checkpoint, in a new run directory"
            ) from error
        guard._put_back(state, actor_too=True)
        because = f"a freeze or a rollback undid {whose}; training goes on from where it went back to"
        guard._log.append("snapshot.restored", {"snapshot": name, "because": because})
        guard.found.append(because)
        guard._log.append("model.attached", guard._attached())
        self._set_boundary(resumed=True)

    def _stop_at_unknown(self, weights: str, checkpoint: Path) -> None:
        guard = self._guard
        reason = (
            f"{checkpoint} holds weights that this run never saved (SHA-256 {weights[:12]}): name another checkpoint"
        )
        if guard._good.promoted is not None:
            guard._good.adopt(guard._good.go_on(), guard._facts(cycle=guard._good.promoted.cycle))
        if not guard.frozen:
            stop = Decision(result="freeze", gate="audit", rule="checkpoint", reason=reason)
            guard._freeze(stop, cycle=None, agreed=True)
        guard._stop()
        # It waited, and the resume went back to the promoted state.
        if guard._good.promoted is None:
            self.release()
            raise UsageError(f"{reason}; nothing was promoted that training could go on from")
        guard._log.append("model.attached", guard._attached())
        self._set_boundary(resumed=True)

    # While training

    def update(
        self,
        *,
        loss: Any,
        readings: Mapping[str, Any] | None = None,
        absent: Collection[str] = (),
        clip_norm: float | None = None,
    ) -> What:
        """Decide about the update at hand, and take it where it is allowed; what became of it.

        `clip_norm` is what the framework has clipped the gradients to, for the capsule. Raises LoopFrozen as
        `Cycle.update` does.
        """
        decision = self.cycle.update(loss=loss, readings=readings, absent=absent, clip_norm=clip_norm)
        if decision.result != "allow":
            return "skipped"
        if decision.rule == "overflow":
            return "overflowed"
        for name, value in (readings or {}).items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + float(value), count + 1
        return "applied"

    def evaluated(self, panel: Mapping[str, float]) -> None:
        """The framework has measured the weights. The promotion gate is asked at `settle`, when all of it is there."""
        if self._measured != self._here:
            self._panel = {}
        self._measured = self._here
        self._panel.update(panel)

    def settle(self, apply: Callable[[], object] | None = None) -> Decision | None:
        """Ask the promotion gate where there was an evaluation; None where there was none.

        Raises LoopFrozen as `Cycle.promote` does.
        """
        panel, self._panel = self._fresh, {}
        return self.promote(panel, apply) if panel else None

    def promote(self, panel: Mapping[str, float], apply: Callable[[], object] | None = None) -> Decision:
        """Ask whether the weights may be what a freeze goes back to, and what generates."""
        cycle = self.cycle
        judged = {one.metric for one in self._guard.policy.promotion.panel}
        decision = cycle.promote(
            {name: value for name, value in panel.items() if name in judged},
            apply=apply,
            unjudged={name: value for name, value in panel.items() if name not in judged},
        )
        if decision.allowed:
            self._denied = 0
        elif not cycle.outlived():
            self._count_denied(decision)
            self.turn_back()
        return decision

    def turn_back(self) -> None:
        """End the cycle without a promotion: where the model is its own actor, the promoted weights are put back."""
        self._cycle = next(self._cycles)
        self._sums.clear()

    def may_act(self) -> Decision | None:
        """Why weights that were not promoted may not generate right now; None where they may.

        Raises LoopFrozen where the run is frozen.
        """
        from loopguard.gates.promotion import held

        if not self.cycle._enter():
            return None
        holding = self._guard._updates_gate.holding
        if not holding:
            self._denied = 0
            return None
        denied = held(holding)
        self._count_denied(denied)
        return denied

    def synced(self, denied: Decision | None, *, purpose: str) -> None:
        """Weights between two promotions go to the engine next, or are kept from it. Durable when it returns."""
        body = {"update": self._guard._ledger.last, "purpose": purpose, "result": "deny" if denied else "allow"}
        self._guard._log.append(
            "actor.synced", body | {"reason": denied.reason if denied else ""}, cycle=self.cycle.number
        )

    def stop(self, reason: str) -> None:
        """Freeze, and go back to the promoted state. Raises LoopFrozen, or as the guard policy says."""
        stop = Decision(result="freeze", gate="promotion", rule="engine", reason=reason)
        self.cycle._freeze(stop, roll_back=True)

    def lacking(self, panel: Mapping[str, float]) -> list[str]:
        """The metrics that the guard policy's panel names and that are not there."""
        return [one.metric for one in self._guard.policy.promotion.panel if one.metric not in panel]

    def means(self) -> dict[str, float]:
        """The readings of this cycle's updates, each as its mean, and what was evaluated since the last promotion."""
        return {name: total / count for name, (total, count) in self._sums.items()} | self._fresh

    def take_panel(self) -> dict[str, float]:
        """The same, and the evaluations count as asked about."""
        panel, self._panel = self.means(), {}
        return panel

    @property
    def _here(self) -> tuple[int, int]:
        return self._guard._resumes, self._guard._ledger.last

    @property
    def _fresh(self) -> dict[str, float]:
        return self._panel if self._measured == self._here else {}

    @property
    def updates(self) -> int:
        """How many updates of this cycle were applied."""
        return self._cycle.updates if self._cycle is not None and not self._cycle.promoted else 0

    def _count_denied(self, decision: Decision) -> None:
        self._denied += 1
        if self._denied < _DENIED_IN_A_ROW:
            return
        self._denied = 0
        reason = f"the actor was refused its next weights {_DENIED_IN_A_ROW} times in a row: {decision.reason}"
        stop = Decision(result="freeze", gate="promotion", rule="denied", reason=reason, signals=decision.signals)
        self.cycle._freeze(stop, roll_back=True)

    def ticked(self) -> None:
        """The framework has ticked the schedules of the last update."""
        if self._cycle is not None and not self._cycle.discarded:
            self._cycle.ticked()

    # The framework's checkpoints

    def saved(self, checkpoint: Path) -> None:
        """The framework has written a checkpoint: put the monitors' state beside it and remember its weights.

        Raises DiskError, AuditWriteError.
        """
        guard = self._guard
        guard._ledger.flush()
        state = {
            "run": guard.run_id,
            "updates": guard._ledger.last,
            "update_gate": guard._updates_gate.state_dict(),
            "promotion_gate": guard._promotions.state_dict(),
        }
        data = json.dumps(state, sort_keys=True).encode()
        replace_durably(checkpoint / self._file_name, data)
        # Whoever prunes the log, from whatever folder, has to find it.
        body = {"checkpoint": str(checkpoint.absolute()), "update": guard._ledger.last}
        body |= {"weights": guard._held().weights_digest(), "state": hashlib.sha256(data).hexdigest()}
        guard._log.append("checkpoint.saved", body, cycle=self._cycle.number if self._cycle else None)

    @property
    def _file_name(self) -> str:
        place = self._guard._consensus.place
        return "loopguard.json" if place.leads else f"loopguard.{place.stream}.json"

    def _kept(self, checkpoint: Path, weights: str) -> dict[str, Any] | None:
        """What `saved` put there, if the log vouches for it; None where there is nothing of ours."""
        path = checkpoint / self._file_name
        guard = self._guard
        if not path.exists():
            return None
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        entries = read.entries(guard.run_dir, guard._consensus.place.stream)
        written = {"state": digest, "weights": weights}
        if not any(entry.type == "checkpoint.saved" and written.items() <= entry.body.items() for entry in entries):
            raise UsageError(
                f"{path} is not what this run wrote beside these weights: take the checkpoint before, or remove "
                "this file"
            )
        return dict(json.loads(data))

    # Ending

    def end(self) -> None:
        """The framework is through. What was not promoted stays as it is, and the log says so."""
        guard = self._guard
        cycle = self._cycle
        if cycle is not None and not cycle.promoted and not cycle.outlived() and not guard.frozen:
            guard._end(cycle, keep=True)

    def release(self) -> None:
        """Let go of the learner: the guard may take another one."""
        self._guard._release()
