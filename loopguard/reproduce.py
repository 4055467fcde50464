"""Replay what led to a freeze, in another process, and say whether it comes out the same to the bit.

A capsule holds the state before the first suspect update, every batch since, the state of the random generators at each
batch, and the readings that came of it. What it cannot hold is code: a module names how the model is built and how its
loss is computed.

    def build(config):                   # what attach(config=...) was given
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}     # as attach takes them

    def loss(model, batch, at):          # of one batch; `at` says which update of which cycle
        return model(**batch).loss

A module that accumulates gradients in a way of its own has `backward(model, batches, at)` instead of `loss`: it calls
backward itself and gives the loss that the loop reported.

Not here: any judgement. Whether a loss that comes out the same is a bug is for the reader, who can step into it.
"""

from __future__ import annotations

import importlib
import math
import struct
import sys
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loopguard.controller.learner import integration_for
from loopguard.errors import LoopGuardError, UsageError
from loopguard.snapshots import read_capsule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

    from loopguard.controller.learner import Learner
    from loopguard.snapshots import Capsule, TapedUpdate

    Forward = Callable[["At", Callable[[], Any]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """Where in the run a batch stood."""

    cycle: int
    update: int
    update_in_cycle: int
    """From 1."""
    batch: int
    """Which of the batches of this update, from 0."""
    batches: int
    config: Mapping[str, Any]
    """What `attach(config=...)` was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update, then and now."""

    update: int
    then: Mapping[str, float]
    now: Mapping[str, float]
    """The readings that the learner takes itself: `loss` and `grad_norm`."""

    @property
    def same(self) -> bool:
        """Whether every reading has the same bits."""
        return all(bits(self.then[name]) == bits(value) for name, value in self.now.items() if name in self.then)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What a replay came to."""

    freeze: str
    reason: str
    updates: tuple[Update, ...]
    state: Literal["same", "other", "unknown"]
    """Of the weights and the optimizer after the last update that was applied; unknown where the capsule lacks it."""
    notes: tuple[str, ...] = field(default=())
    """What could not be replayed, and why."""

    @property
    def first_other(self) -> Update | None:
        """The first update that came out otherwise."""
        return next((update for update in self.updates if not update.same), None)

    @property
    def same(self) -> bool:
        """Whether everything that was replayed came out the same to the bit, and something was."""
        return bool(self.updates) and self.first_other is None and self.state != "other"


def load_module(name: str) -> ModuleType:
    """The module of that name, or of that file. Raises UsageError where it is none that a replay can use."""
    folder = str(Path.cwd())
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"--module {name}: there is no such file")
        folder, name = str(path.parent.absolute()), path.stem
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"--module {name}: it cannot be imported: {_said(error)}") from error
    if not callable(getattr(module, "build", None)):
        raise UsageError(f"--module {name}: it has no build(config), which makes the model and its optimizer")
    if not callable(getattr(module, "loss", None)) and not callable(getattr(module, "backward", None)):
        raise UsageError(f"--module {name}: it has neither loss(model, batch, at) nor backward(model, batches, at)")
    return module


def reproduce(
    folder: Path,
    module: ModuleType,
    *,
    forward: Forward = lambda _, run: run(),
    advance: Callable[[int], None] = lambda _: None,
) -> Reproduction:
    """Replay the capsule in `folder` with the model and the loss of `module`.

    `forward(at, run)` is called for each forward pass and gives what `run()` gives: the place for a debugger. Raises
    SnapshotError for a capsule that is missing, damaged or without a state to start from, UsageError for a module that
    builds another model.
    """
    capsule = read_capsule(folder)
    notes = [f"the capsule lacks its {part}: {why}" for part, why in sorted(capsule.left_out.items())]
    learner = _built(module, capsule)
    try:
        learner.restore(capsule.start_state()["learner"], actor_too=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"{module.__name__}.build gave another model than the run had: {error}") from error
    updates = capsule.updates()
    done: list[Update] = []
    state: Literal["same", "other", "unknown"] = "unknown"
    for told in updates:
        if not told.batches:
            notes.append(
                f"update {told.update} has no batches: "
                "the loop hands them in with cycle.batches(...) or cycle.keep(...)"
            )
            break
        done.append(_replay(learner, module, told, capsule, forward))
        advance(len(done))
    else:
        digest = capsule.facts.get("state_digest")
        if digest is not None and updates:
            state = "same" if learner.digest() == digest else "other"
    if (ranks := capsule.facts.get("ranks", 1)) > 1:
        notes.append(
            f"the run had {ranks} ranks, and this is one process: without the gradients of the others "
            "the first loss alone can come out the same"
        )
    if capsule.facts.get("replays") == "up to the boundary" and updates:
        notes.append("no update was made since the state that this freeze goes back to: replayed is what led to it")
    if not updates:
        notes.append("no update was made since the state that this freeze goes back to: there is nothing to replay")
    return Reproduction(
        freeze=str(capsule.decision["freeze"]),
        reason=str(capsule.decision["reason"]),
        updates=tuple(done),
        state=state,
        notes=tuple(notes),
    )


def _called(module: ModuleType, name: str, call: Callable[[], Any]) -> Any:
    """What a function of the module gives; what it raises is told with its place, and is the caller's to mend."""
    try:
        return call()
    except LoopGuardError:
        raise
    except Exception as error:
        raise UsageError(f"{module.__name__}.{name} raised {_said(error)}") from error


def _said(error: Exception) -> str:
    """An exception in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def bits(value: float) -> bytes:
    """The bits of a double. Every NaN is the same one: what a NaN carries beside being one is not kept anywhere."""
    return struct.pack("<d", math.nan if math.isnan(value) else value)


def _built(module: ModuleType, capsule: Capsule) -> Learner:
    integration = None
    config = capsule.facts.get("config", {})
    parts = _called(module, "build", lambda: module.build(config))
    if not isinstance(parts, dict) or not {"model", "optimizer"} <= parts.keys():
        raise UsageError(
            f"{module.__name__}.build gave {type(parts).__name__}; expected a dict with model and optimizer"
        )
    integration = integration_for(parts["model"])
    # The settings come first: threads decide about the order of sums, and with it about bits.
    integration.apply_settings(capsule.facts.get("settings", {}))
    # A replay waits for its device: it is here to be looked at.
    taken = {name: parts.get(name) for name in ("model", "optimizer", "scheduler", "scaler", "averages")}
    built: Learner = integration.learner(**taken, actor=None, late=False)
    return built


def _replay(learner: Learner, module: ModuleType, told: TapedUpdate, capsule: Capsule, forward: Forward) -> Update:
    config = capsule.facts.get("config", {})

    def at(batch: int) -> At:
        return At(
            cycle=told.cycle,
            update=told.update,
            update_in_cycle=told.update_in_cycle,
            batch=batch,
            batches=len(told.batches),
            config=config,
        )

    loss = _backward(learner, module, told, at, forward)
    now = learner.readings(loss, {})
    if told.decision in ("allow", "overflow", "staged"):
        learner.apply(clip_norm=told.clip_norm)
    else:
        learner.discard()
    return Update(update=told.update, then=told.readings, now=now.values)


def _loss(module: ModuleType, model: Any, batch: Any, at: At) -> Any:
    loss = _called(module, "loss", lambda: module.loss(model, batch, at))
    if not hasattr(loss, "backward"):
        raise UsageError(f"{module.__name__}.loss gave {loss!r:.60}; expected the loss as a tensor that has a gradient")
    return loss


def _backward(
    learner: Learner, module: ModuleType, told: TapedUpdate, at: Callable[[int], At], forward: Forward
) -> Any:
    model = learner.model  # type: ignore[attr-defined]  # whatever the module built
    batches: Sequence[Any] = [kept.batch for kept in told.batches]
    if (own := getattr(module, "backward", None)) is not None:
        learner.set_rng(told.batches[0].rng)
        return forward(at(0), lambda: _called(module, "backward", lambda: own(model, batches, at(0))))
    losses = []
    for i, batch in enumerate(batches):
        learner.set_rng(told.batches[i].rng)
        loss = forward(at(i), partial(_loss, module, model, batch, at(i)))
        share = loss / len(batches) if len(batches) > 1 else loss
        scaler = learner.scaler  # type: ignore[attr-defined]
        (share if scaler is None else scaler.scale(share)).backward()
        losses.append(loss.detach())
    return losses[0] if len(losses) == 1 else sum(losses) / len(losses)
