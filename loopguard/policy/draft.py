"""Write the guard policy that suits a run: the shipped default with the update and promotion gates made from the run.

What it writes loads, and says of each number where it comes from. Every section but these two is the default's, word
for word, so that the two cannot come to differ. A run without tools gets a policy without them, which needs no Docker.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from loopguard.policy.load import shipped
from loopguard.policy.suggest import FALSE_ALARM_EVERY, direction, domain, idle

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loopguard.policy.suggest import Metric, Suggestion

ROOM = 3.0
"""How many times the largest change between two evaluations one promotion may bring."""
LEAST_ROOM = 0.1
"""The least that it may bring, as a share of the largest value, or of the width of a share."""

_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
_WIDE = 118

_UPDATES = """
# The update gate. `bounds` withholds the very update; the others need a few agreeing values, and what was applied
# meanwhile is rolled back. Their thresholds are in units of the run's own noise (docs/monitors.md), so that none of
# them is a number from this run; which metrics they watch is. Lines that begin with `# -` are metrics left out, each
# with the reason: take the `#` away to watch one.
""".strip()

_PROMOTION = f"""
# The promotion gate. Changes are absolute and against the last promoted weights. Room is made from what was seen:
# {ROOM:g} times the largest gain (max_gain) and loss (max_loss) between two evaluations in a row, at least
# {LEAST_ROOM:.0%} of the largest value, rounded up. A run that went wrong was seen, too: look at the numbers.
""".strip()


_NO_TOOLS = """
# The tool gate. No tool was seen, so there is no section `tools` and no `sandbox`: no call runs, each is refused and
# recorded, and nothing asks for Docker. A loop that calls tools needs both sections; copy them from the default policy,
# which `loopguard init` writes.
""".strip()


def draft(seen: Suggestion, *, run: str = "", notes: Sequence[str] = ()) -> str:
    """The text of a guard policy for a run like the one that was `seen`.

    `run` names it; `notes` are sentences for the head of the file, such as where this policy would have frozen it.
    """
    said = shipped("default").read_text(encoding="utf-8").split("\n\n")
    blocks = [_head(seen, run, notes), _names(seen)]
    for block in said[2:]:
        key = next((line.partition(":")[0] for line in block.splitlines() if re.match(r"[a-z]\w*:", line)), "")
        blocks.append(_OURS[key](seen) if key in _OURS else block.strip("\n"))
        if not seen.calls_tools:
            blocks[-1] = _without_tools(key, blocks[-1])
    return "\n\n".join(filter(None, blocks)) + "\n"


def _without_tools(key: str, block: str) -> str:
    """What stands in place of a section where there are no tools."""
    if key == "data":
        # The records' checks are run again as tool calls.
        return re.sub(r"( *#[^\n]*\n)* *recheck:[^\n]*\n", "", block)
    return {"tools": _NO_TOOLS, "sandbox": ""}.get(key, block)


def _head(seen: Suggestion, run: str, notes: Sequence[str]) -> str:
    of = f" of {run}" if run else ""
    lines = [
        f"A guard policy drafted from {seen.updates:,} observed updates and {seen.evaluations:,} evaluations{of}.",
        "Read it, change what you know better, and check it with `loopguard policy check FILE`.",
        *notes,
    ]
    if seen.tools:
        named = ", ".join(map(_word, seen.tools))
        lines.append(f"The tools of that run: {named}. Each needs a rule under `tools.rules`, by its exact name.")
    rest = "Every key is explained in docs/policy.md. Keys that are left out have the defaults named there."
    return "\n".join([*(part for line in lines for part in _comment(line, "")), "#", f"# {rest}"])


def _names(seen: Suggestion) -> str:
    tools = "Tools run without a network." if seen.calls_tools else "No tools."
    text = f"Drafted from {seen.updates:,} observed updates. {tools}"
    return f"apiVersion: loopguard/v1\nname: suggested\ndescription: {text}"


def _updates(seen: Suggestion) -> str:
    kind = f"  loss_kind: {seen.loss_kind}".ljust(31) + f" # {_why_kind(seen)}"
    every = f"  false_alarm_every: {FALSE_ALARM_EVERY}".ljust(31) + " # updates in which a healthy run is frozen once"
    lines = [_UPDATES, "updates:", kind, "  lease: 64", every, "  monitors:"]
    for metric, rules, why in seen.plan():
        lines += _comment(_shown(metric, seen.updates, rules, why), "    ")
        lines += [f"    - {_flow(rule)}" for rule in rules] or [f"    # - {_flow(_left_out(metric))}"]
    return "\n".join(lines)


def _why_kind(seen: Suggestion) -> str:
    if seen.by_reward:
        return "the trainer trains by reward"
    if seen.negative_at is not None:
        return f"the loss was below zero at update {seen.negative_at:,}; if it is cross-entropy, that is a bug"
    return "cross-entropy: a value below zero is a bug. A loss that may be negative: density"


def _shown(metric: Metric, updates: int, rules: Sequence[dict[str, Any]], why: str) -> str:
    if not metric.count:
        return f"{_word(metric.name)}: not seen"
    spread = f"{metric.low:.4g} to {metric.high:.4g}" if metric.low <= metric.high else "never a finite number"
    some = "" if metric.count == updates else f", in {metric.count:,} of {updates:,} updates"
    only = ("No more than this: " if rules else "Left out: ") if why else ""
    return f"{_word(metric.name)}: {spread}{some}." + (f" {only}{why}." if why else "")


def _left_out(metric: Metric) -> dict[str, Any]:
    return {"kind": "jump", "metric": metric.name, "good": direction(metric.name)}


def _promotion(seen: Suggestion) -> str:
    lines = [_PROMOTION, "promotion:", "  panel:"]
    measured = list(seen.panel.values()) or _rewards(seen)
    live = [metric for metric in measured if not _unjudged(metric, seen)]
    if not live:
        # A panel has a metric at least, and nobody can be asked for one that nobody has seen.
        lines += _comment("No evaluation was seen. Put the metrics here that yours reports.", "    ")
        lines.append("    - {metric: eval_loss, good: down, max_gain: 1, max_loss: 1}")
    for metric in measured:
        rule = _flow(_panel_rule(metric, seen)) if metric.low <= metric.high else _word(metric.name)
        lines += _comment(_moves(metric, _unjudged(metric, seen)), "    ")
        lines.append(f"    {'' if metric in live else '# '}- {rule}")
    return "\n".join(
        [*lines, "  keep_snapshots: 2             # promoted states to go back to, beside the one that acts"]
    )


def _rewards(seen: Suggestion) -> list[Metric]:
    """What stands in for a panel where a run is never evaluated and trains by reward."""
    return [metric for name, metric in seen.metrics.items() if seen.by_reward and name == "reward"]


def _unjudged(metric: Metric, seen: Suggestion) -> str:
    """Why a metric stands outside of the panel, or the empty string.

    A loop of one's own hands in the whole panel each time, and the gate stops at a metric that it does not know. So
    there everything is in it that can be; a framework's evaluation reports more than anybody wants to be judged.
    """
    if why := idle(metric.name):
        return f"{why}: keep it out of what is handed to cycle.promote"
    if not metric.low <= metric.high or metric.strange is not None:
        return "it was not always a finite number"
    if not seen.tolerant:
        return "" if metric.count >= seen.evaluations else "not every evaluation had it"
    return "its name does not say which way is better" if direction(metric.name) == "none" else ""


def _moves(metric: Metric, why_not: str) -> str:
    if not metric.low <= metric.high:
        return f"{_word(metric.name)}: never a finite number."
    text = f"{_word(metric.name)}: {metric.low:.4g} to {metric.high:.4g} in {metric.count:,} measurements"
    text += f"; from one to the next it rose by {metric.rise:.3g} and fell by {metric.fall:.3g} at most."
    return f"{text} Left out: {why_not}." if why_not else text


def _panel_rule(metric: Metric, seen: Suggestion) -> dict[str, Any]:
    better = direction(metric.name)
    limits: dict[str, Any] = domain(metric.name, low=metric.low, high=metric.high)
    if seen.loss_kind == "discrete" and re.search(r"(^|[/_])loss$", metric.name) and metric.low >= 0:
        limits = {"min": 0}
    width = limits["max"] - limits["min"] if len(limits) == 2 else None
    gain, loss = (metric.fall, metric.rise) if better == "down" else (metric.rise, metric.fall)
    if better == "none":
        gain = loss = max(gain, loss)
    rooms = {"max_gain": _room(gain, metric, width), "max_loss": _room(loss, metric, width)}
    return {"metric": metric.name, "good": better, **limits, **rooms}


def _room(change: float, metric: Metric, width: float | None) -> float:
    biggest = max(abs(metric.low), abs(metric.high))
    # Within what has two digits as a float.
    room = min(max(ROOM * change, LEAST_ROOM * (width or biggest or 1.0), 1e-300), 1e300)
    # More than half of all there is would be no limit.
    return _up(min(room, width / 2) if width else room)


_OURS = {"updates": _updates, "promotion": _promotion}


def _up(value: float) -> float:
    """The next number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def _flow(rule: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_value(value)}" for key, value in rule.items()) + "}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else _word(str(value))


def _word(text: str) -> str:
    """Text as YAML reads it back; what does not show becomes an escape."""
    if re.fullmatch(r"[A-Za-z][\w./-]*", text, re.ASCII) and text.lower() not in _WORDS:
        return text
    return '"' + _visible(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _visible(text: str) -> str:
    """Text in which what does not show is an escape, as YAML writes it."""
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)


def _comment(text: str, indent: str) -> Iterator[str]:
    """A sentence as comment lines of the usual width, with nothing in them that does not show."""
    line = f"{indent}#"
    for word in map(_visible, text.split()):
        if len(line) + 1 + len(word) > _WIDE and not line.endswith("#"):
            yield line
            line = f"{indent}#"
        line = f"{line} {word}"
    yield line
