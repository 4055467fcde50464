"""Is one guard policy tighter than another? Anything that is not provably tighter counts as loosened.

A run directory belongs to one policy. When it is given another, tightening is recorded and goes on; loosening needs a
person. So the doubtful case must come out as loosened, and a key that `_ORDER` does not list is a doubtful case: one
that somebody adds later is safe until its direction has been thought about.

Compared is what a policy lets happen: tools with the cell they run in, rather than rules and profiles by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loopguard.policy.schema import GuardPolicy

Direction = Literal["same", "tightened", "loosened"]

Order = Literal[
    "smaller",  # a smaller number is tighter, and none at all is loosest
    "larger",  # a larger number is tighter, and none at all is loosest
    "fewer",  # a subset is tighter
    "more",  # a superset is tighter
    "any",  # to have a value is tighter than to have none; two values cannot be compared
    "neutral",  # says nothing about what may happen
]

Steps = tuple[tuple[object, ...], ...]
"""Values from the tightest to the loosest; those in one step cannot be compared with each other."""

# `*` stands for the name of a tool, monitor or metric.
_ORDER: dict[str, Order | Steps] = {
    "name": "neutral",
    "description": "neutral",
    "tools.run.*.max_code_bytes": "smaller",
    "tools.run.*.refuse_patterns": "more",
    "tools.run.*.on_freeze": (("kill",), ("drain",)),
    # Tools in one profile meet in its cells, and in an episode in its files; in two, they have twice the cells.
    "tools.run.*.shares_cells_with": "any",
    # A fresh cell keeps nothing for anybody. A pooled one serves strangers in turn; an episode keeps files and, where
    # it may, processes from call to call. Each lets something happen that the other does not.
    "tools.run.*.cell.mode": (("fresh",), ("pooled", "episode")),
    "tools.run.*.cell.runtime": (("runsc",), ("runc",)),
    # Neither is tighter. `strict` takes root and every capability out of the cell, and with them the users that keep
    # calls apart: a call can then signal PID 1 and whatever ran before it. A person has to weigh that, so either way
    # counts as loosened.
    "tools.run.*.cell.privileges": "any",
    "tools.run.*.cell.cells": "smaller",
    # How many wait changes when a call runs and never what it may do.
    "tools.run.*.cell.queue": "neutral",
    "tools.run.*.cell.background": ((False,), (True,)),
    # Places with their secret headers, each as one word: fewer places are tighter, and a place whose headers changed is
    # another place.
    "tools.run.*.cell.egress": "fewer",
    "tools.run.*.cell.preload": "fewer",
    "tools.run.*.cell.calls_per_cell": "smaller",
    "tools.run.*.cell.limits.wall_s": "smaller",
    "tools.run.*.cell.limits.memory_mib": "smaller",
    "tools.run.*.cell.limits.pids": "smaller",
    "tools.run.*.cell.limits.cpus": "smaller",
    "tools.run.*.cell.limits.tmpfs_mib": "smaller",
    "tools.run.*.cell.limits.output_kib": "smaller",
    "tools.run.*.cell.limits.flood_mib": "smaller",
    "tools.run.*.cell.limits.files": "smaller",
    "tools.run.*.cell.limits.files_mib": "smaller",
    "tools.run.*.cell.limits.files_depth": "smaller",
    "tools.freeze_above.refused_share": "smaller",
    "tools.freeze_above.contained_share": "smaller",
    "tools.budget.per_cycle": "smaller",
    "tools.budget.per_rollout": "smaller",
    "data.sources": "fewer",
    # Whatever shares 13 words with an evaluation text shares 8 of them too.
    "data.overlap_ngram": "smaller",
    "data.max_own_share": "smaller",
    "data.forbidden_in_prompt": "more",
    "data.kept_share.min": "larger",
    "data.kept_share.max": "smaller",
    "data.kept_share.max_change": "smaller",
    "data.min_mean_gain": "larger",
    "data.recheck.max_wrong_share": "smaller",
    "data.freeze_above.quarantined_share": "smaller",
    "data.freeze_above.of_at_least": "smaller",
    "updates.lease": "smaller",
    "updates.monitors.*.min": "larger",
    "updates.monitors.*.max": "smaller",
    # A run that may cry wolf more often has narrower limits.
    "updates.false_alarm_every": "smaller",
    "updates.monitors.*.min_change": "smaller",
    "promotion.panel.*.min": "larger",
    "promotion.panel.*.max": "smaller",
    "promotion.panel.*.max_gain": "smaller",
    "promotion.panel.*.max_loss": "smaller",
    # Watched over cycles is tighter than not; of two numbers of problems the true one is right, and only people know
    # it.
    "promotion.panel.*.problem_count": "any",
    "promotion.false_alarm_every": "smaller",
    # How far back a person may go says nothing of what the loop may do.
    "promotion.keep_snapshots": "neutral",
    "freeze.on_trip": (("freeze",), ("skip",)),
    "freeze.skip_at_most.updates": "smaller",
    "freeze.skip_at_most.per": "larger",
    # However a frozen loop ends, nothing goes on before a named person lets it.
    "freeze.when_frozen": "neutral",
    "freeze.running_calls": (("kill",), ("drain",)),
    "freeze.capsule_mib": "neutral",
    # Which signal stops a run is a matter of taste; that one does is not.
    "freeze.signal": ((True,), (False,)),
    # Another place may be one that takes nothing.
    "freeze.second_latch": "any",
    "freeze.waive_at_most": "smaller",
    "freeze.probation.cycles": "larger",
    "freeze.probation.tighten": "smaller",
    "freeze.halt_above.freezes": "smaller",
    "freeze.halt_above.cycles": "larger",
    "hold.at_most_s": "smaller",
    "hold.free_mib": "larger",
    "resume.approvals": "larger",
    # Each person with a key, as one word: whoever is left out can agree to nothing.
    "resume.people": "fewer",
    "resume.requester_may_approve": ((False,), (True,)),
    "resume.within_s": "smaller",
    "resume.execute_within_s": "smaller",
    "audit.reserve_mib": "larger",
    "audit.checkpoint_every": "smaller",
    # Places as words, and one more word for each that has to work: more places that are out of reach are tighter.
    "audit.anchors": "more",
    # In which files the records lie, and in which form, changes nothing about what they say.
    "audit.segment_mib": "neutral",
    "audit.compress": "neutral",
    # Evidence that stays longer is tighter.
    "audit.retain_days": "larger",
    # More that is kept is more evidence, and more that can leak: a person has to weigh it.
    "audit.payloads.code": "any",
    "audit.payloads.printed": "any",
    # Fewer places are fewer people who hear of a freeze, more are more places that something is sent to, and a program
    # runs on the host: a person has to weigh each of these, so any change counts as loosened.
    "notify.webhooks": "any",
    "notify.command": "any",
    "notify.events": "more",
    "notify.within_s": "larger",
}

_NAMED = (("tools", "run"), ("updates", "monitors"), ("promotion", "panel"))
"""Sections whose entries have names of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference in what two policies let happen."""

    where: str
    old: Any
    new: Any
    direction: Direction

    def __str__(self) -> str:
        return f"{self.direction}: {self.where} from {_shown(self.old)} to {_shown(self.new)}"


def compare(old: GuardPolicy, new: GuardPolicy) -> Direction:
    """Whether `new` lets at most happen what `old` does (`tightened`), just that (`same`), or perhaps more."""
    directions = {change.direction for change in changes(old, new)}
    if "loosened" in directions:
        return "loosened"
    return "tightened" if "tightened" in directions else "same"


def changes(old: GuardPolicy, new: GuardPolicy) -> list[Change]:
    """Every difference between two policies in what they let happen."""
    before, after = _effective(old), _effective(new)
    found = [*_tools(before["tools"]["run"], after["tools"]["run"])]
    if bool(before["tools"]["run"]) != bool(after["tools"]["run"]):
        # Where no call runs, what bounds and watches calls has nothing to hold; the tools themselves have been said.
        for said in (before, after):
            said["tools"] |= {"freeze_above": None, "budget": None}
    # A tool that only one of them lets run has been said; only of tools in both can the conditions be compared.
    for tool in before["tools"]["run"].keys() ^ after["tools"]["run"].keys():
        before["tools"]["run"].pop(tool, None)
        after["tools"]["run"].pop(tool, None)
    for run in (before["tools"]["run"], after["tools"]["run"]):
        for judged in run.values():
            judged["shares_cells_with"] = [other for other in judged["shares_cells_with"] if other in run]
    was, now = dict(_leaves(before)), dict(_leaves(after))
    for where in sorted(was.keys() | now.keys()):
        a, b = was.get(where), now.get(where)
        if a != b:
            found.append(Change(where=".".join(where), old=a, new=b, direction=_direction(_order(where), a, b)))
    return found


def _tools(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    for tool in sorted(before.keys() - after.keys()):
        yield Change(where=f"tools.run.{tool}", old="run", new="deny", direction="tightened")
    for tool in sorted(after.keys() - before.keys()):
        yield Change(where=f"tools.run.{tool}", old="deny", new="run", direction="loosened")


def _effective(policy: GuardPolicy) -> dict[str, Any]:
    """The policy by what it lets happen; entries of lists under their names."""
    said = policy.model_dump(mode="json")
    for profile in said["sandbox"]["profiles"].values():
        profile["egress"] = [_place(place) for place in (profile["egress"] or {"allow": ()})["allow"]]
        # What the mode says already: one call, or as many as an episode has.
        profile["calls_per_cell"] = {"fresh": 1, "episode": None}.get(profile["mode"], profile["calls_per_cell"])
        limits = profile["limits"]
        limits["files_mib"] = min(limits["files_mib"], limits["tmpfs_mib"])
    rules = said["tools"].pop("rules")
    denied = {rule["tool"] for rule in rules if rule["then"] == "deny"}
    running = [rule for rule in rules if rule["then"] == "run" and rule["tool"] not in denied]
    said["tools"]["run"] = {
        rule["tool"]: {
            "max_code_bytes": rule["max_code_bytes"],
            "refuse_patterns": rule["refuse_patterns"],
            "on_freeze": rule["on_freeze"] or said["freeze"]["running_calls"],
            "shares_cells_with": sorted(
                other["tool"] for other in running if other["sandbox"] == rule["sandbox"] and other is not rule
            ),
            "cell": said["sandbox"]["profiles"][rule["sandbox"]],
        }
        for rule in running
    }
    del said["sandbox"]
    monitors = said["updates"]["monitors"]
    for monitor, rule in zip(monitors, policy.updates.monitors, strict=True):
        if "good" in monitor:
            monitor["good"] = getattr(rule, "better", None)  # the direction that is meant where none was written
    said["updates"]["monitors"] = {f"{monitor['kind']} {monitor['metric']}": monitor for monitor in monitors}
    said["promotion"]["panel"] = {metric["metric"]: metric for metric in said["promotion"]["panel"]}
    said["resume"] = _resume(said["resume"])
    said["audit"]["anchors"] = [word for place in said["audit"]["anchors"] for word in _anchor(place)]
    said["notify"] = _notify(said["notify"])
    # Not to skip at all is the tightest way of skipping.
    said["freeze"]["skip_at_most"] = said["freeze"]["skip_at_most"] or {"updates": 0, "per": math.inf}
    said["freeze"]["signal"] = said["freeze"]["signal"] != "none"
    # No probation is one of no cycles, and no budget one that is never used up.
    said["freeze"]["probation"] = said["freeze"]["probation"] or {"cycles": 0, "tighten": 1.0}
    said["freeze"]["halt_above"] = said["freeze"]["halt_above"] or {"freezes": math.inf, "cycles": 0}
    return said


def _resume(resume: dict[str, Any] | None) -> dict[str, Any]:
    """Who has to agree; without the section nobody has to, and anyone may let the run go on."""
    if resume is None:
        free: dict[str, Any] = {"approvals": 0, "people": None, "requester_may_approve": True}
        return free | {"within_s": None, "execute_within_s": None}
    people = [f"{person} {line}" for person, lines in resume["people"].items() for line in lines]
    return resume | {"people": people}


def _anchor(place: dict[str, Any]) -> list[str]:
    """A place that checkpoints are kept in, as words: the place, and that it is required."""
    word = f"{place['kind']} {place.get('path') or place.get('repository') or ''}".rstrip()
    return [word, f"{word} required"] if place["required"] else [word]


def _notify(notify: dict[str, Any] | None) -> dict[str, Any]:
    """Who is told, as words; never None, so that a first endpoint is no tightening either."""
    if notify is None:
        return {"webhooks": [], "command": [], "events": [], "within_s": 0.0}
    words = [f"{place['url']} ${place['secret']}{' insecure' * place['insecure']}" for place in notify["webhooks"]]
    return notify | {"webhooks": sorted(words), "command": notify["command"] or []}


def _place(place: dict[str, Any]) -> str:
    """A place outside as one word, equal only where the same secrets go there."""
    headers = [f"{header}=${variable}" for header, variable in sorted(place["secret_headers"].items())]
    return " ".join([f"{place['host']}:{place['port']}", *headers])


def _leaves(section: dict[str, Any], inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*inside, key))
        else:
            yield (*inside, key), value


def _order(where: tuple[str, ...]) -> Order | Steps:
    steps = (*where[:2], "*", *where[3:]) if where[:2] in _NAMED else where
    return _ORDER.get(".".join(steps), "any")


def _direction(order: Order | Steps, old: Any, new: Any) -> Direction:
    """Which way a value went; whatever is not clearly tighter is looser."""
    if order == "neutral" or (order in ("fewer", "more") and None not in (old, new) and set(old) == set(new)):
        return "same"
    return "tightened" if _tighter(order, old, new) else "loosened"


def _tighter(order: Order | Steps, old: Any, new: Any) -> bool:
    if isinstance(order, tuple):
        return _step(order, new) < _step(order, old)
    if old is None or new is None:
        return old is None
    match order:
        case "smaller":
            return bool(new < old)
        case "larger":
            return bool(new > old)
        case "fewer":
            return set(new) < set(old)
        case "more":
            return set(new) > set(old)
        case _:
            return False


def _step(order: Steps, value: Any) -> int:
    return next(i for i, step in enumerate(order) if value in step)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
