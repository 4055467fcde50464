"""How a frozen run may go on: which dispositions its freeze allows, and which rule may be waived for a while.

What a request asks for is checked here before anything is recorded; `controller.aftermath` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loopguard.audit import read
from loopguard.audit.events import printable
from loopguard.errors import SnapshotError, UsageError
from loopguard.snapshots import read_capsule
from loopguard.types import NOTHING, ROLL_BACK, Disposition, WayOn

if TYPE_CHECKING:
    from pathlib import Path

    from loopguard.snapshots import Capsule

SAID: dict[Disposition, str] = {
    "rollback": "back to the last promoted state, and the cycle begins again",
    "discard": "back to the last promoted state, and the cycle is passed over",
    "accept": "on from the state at the freeze, and the cycle begins again",
    "halt": "it does not: the run ends for good",
}
"""Where the run goes, for whoever decides."""

_WAIVABLE = {
    "update": ("jump:", "drift:", "variance:"),
    "promotion": ("change:", "eprocess:"),
    "data": ("kept_share", "mean_gain"),
}
"""What compares with what was: people may know better. What is impossible, missing or broken stays so."""


def way_on(
    run_dir: Path, entered: Mapping[str, Any], *, disposition: Disposition, waive: int = 0, at_most: int = 0
) -> WayOn:
    """The way on from a freeze, given the body of its `freeze.entered`.

    With `waive` its rule trips nothing for so many cycles, of which the guard policy allows `at_most`. Raises
    UsageError where this freeze allows no such thing.
    """
    if disposition == "accept":
        accepted(run_dir, entered)
    if not waive:
        return ROLL_BACK if disposition == "rollback" else WayOn(disposition=disposition)
    gate, rule = str(entered.get("gate")), str(entered.get("rule"))
    if disposition == "halt":
        raise UsageError("--waive has no meaning for a run that is halted: leave it out")
    if not rule.startswith(_WAIVABLE.get(gate, ())):
        raise UsageError(
            printable(f"{rule} of the {gate} gate cannot be waived: what compares with earlier values can, such as a ")
            + "jump, a drift or a gain. Resume without --waive"
        )
    if any(isinstance(signal, Mapping) and signal.get("at_once") for signal in entered.get("signals") or ()):
        raise UsageError(
            printable(f"{rule} tripped over a single value that is far outside of what any may be, ")
            + "and such a value is never waived: resume without --waive; with `--disposition accept` its monitor "
            "learns the level anew"
        )
    if not 0 < waive <= at_most:
        raise UsageError(
            f"--waive {waive}: the guard policy allows 1 to {at_most} cycles (freeze.waive_at_most)"
            if at_most
            else "--waive: the guard policy allows no waivers (freeze.waive_at_most is 0)"
        )
    return WayOn(disposition=disposition, waives=rule, waives_cycles=waive)


def accepted(run_dir: Path, entered: Mapping[str, Any]) -> Capsule:
    """The capsule with the state at a freeze, given the body of its record. Raises UsageError where there is none."""
    freeze, folder = str(entered.get("freeze")), entered.get("capsule")
    started = list(read.entries(run_dir, types=("run.started",)))
    if started and started[-1].body.get("ranks", 1) != 1:
        raise UsageError("the state at a freeze of several ranks cannot be accepted: resume with rollback or discard")
    if not isinstance(folder, str):
        raise UsageError(f"{freeze} left no capsule, and so no state to accept: resume with rollback or discard")
    try:
        capsule = read_capsule(run_dir / folder, entered.get("capsule_digest"))
    except SnapshotError as error:
        raise UsageError(f"the state at {freeze} cannot be accepted: {error}") from error
    if capsule.suspect is None:
        why = capsule.left_out.get("suspect", "no reason was given")
        raise UsageError(f"the capsule of {freeze} lacks the state to accept: {why}")
    return capsule


def unacceptable(run_dir: Path, freeze: str) -> str:
    """Why the state at a freeze cannot be gone on with, in a sentence; the empty string where it can."""
    told = [one for one in read.entries(run_dir, types=("freeze.entered",)) if one.body.get("freeze") == freeze]
    try:
        accepted(run_dir, told[-1].body if told else {"freeze": freeze})
    except UsageError as error:
        return str(error)
    return ""


def told(way: WayOn) -> str:
    """A way on in words."""
    waives = "" if way.waives == NOTHING else f"; {way.waives} trips nothing for {way.waives_cycles} cycles"
    return f"{way.disposition}: {SAID[way.disposition]}{waives}"
