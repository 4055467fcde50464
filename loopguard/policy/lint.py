"""What loads and is most likely not what its writer meant.

Only what can cost somebody something gets a lint: a door left open, a rule that never applies, a limit that another
limit hides. Taste gets none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loopguard.policy.hosts import near

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loopguard.policy.findings import Where
    from loopguard.policy.schema import BoundsRule, Egress, GuardPolicy, Notify, PanelMetric, Profile, Tools, Updates

Lint = tuple["Where", str]

# A repeated group with a repeat in it, such as (a+)+ : matching may take time that doubles with each character.
_NESTED_REPEAT = re.compile(r"(?<!\\)\((?:[^()\\]|\\.)*(?:[*+]|\{\d*,\d*\})(?:[^()\\]|\\.)*\)(?:[*+]|\{\d*,\d*\})")


def lints(policy: GuardPolicy) -> Iterator[Lint]:
    """A place and a full sentence for each."""
    yield from _tools(policy.tools)
    used = {rule.sandbox for rule in policy.tools.rules}
    for name, profile in policy.sandbox.profiles.items():
        where: Where = ("sandbox", "profiles", name)
        if name not in used:
            it = "it" if len(policy.sandbox.profiles) > 1 else "the section sandbox"
            yield where, f"no rule uses the sandbox profile {name!r}; take {it} out, or name it in a rule"
        yield from _profile(profile, where)
        if profile.egress is not None:
            watched = not policy.tools.rules or policy.tools.freeze_above is not None
            yield from _egress(profile.egress, (*where, "egress"), watched=watched)
    if "model" in policy.data.sources and policy.data.max_own_share == 1:
        yield ("data", "max_own_share"), "data.max_own_share is 1, so nothing caps what the model writes for itself"
    yield from _updates(policy.updates)
    if policy.resume is not None and policy.resume.approvals == 1 and policy.resume.requester_may_approve:
        message = "one person may ask for a resume and approve it, so nobody else has to look; ask for 2 approvals"
        yield ("resume", "requester_may_approve"), message
    if policy.notify is not None:
        yield from _notify(policy.notify)
    for i, metric in enumerate(policy.promotion.panel):
        yield from _metric(metric, ("promotion", "panel", i))


def _tools(tools: Tools) -> Iterator[Lint]:
    denied = {rule.tool: rule.id for rule in tools.rules if rule.then == "deny"}
    for i, rule in enumerate(tools.rules):
        where: Where = ("tools", "rules", i)
        if rule.then == "run" and rule.tool in denied:
            yield where, f"rule {rule.id!r} never lets anything run, since {denied[rule.tool]!r} denies {rule.tool!r}"
        if rule.refuse_patterns and rule.max_code_bytes is None:
            message = f"rule {rule.id!r} searches code of any length; add max_code_bytes, such as 4096"
            yield (*where, "refuse_patterns"), message
        for k, pattern in enumerate(rule.refuse_patterns):
            if _NESTED_REPEAT.search(pattern):
                message = f"{pattern!r} repeats a repeat; a hostile text can make it search for hours, so write it flat"
                yield (*where, "refuse_patterns", k), message
    if tools.rules and tools.freeze_above is None:
        message = "tools has no freeze_above, so a model that keeps probing the fence never freezes the loop"
        yield ("tools",), message


def _profile(profile: Profile, where: Where) -> Iterator[Lint]:
    limits = profile.limits
    held_mib = limits.tmpfs_mib + 2 * limits.output_kib / 1024
    if held_mib > limits.memory_mib / 2:
        message = (
            f"tmpfs and kept output take {held_mib:g} of {limits.memory_mib} MiB of memory, as both count towards it; "
            "leave at least half to the code"
        )
        yield (*where, "limits", "tmpfs"), message
    if limits.flood_mib * 1024 < limits.output_kib:
        message = f"a flood ends the call at {limits.flood_mib} MiB, before output ({limits.output_kib} KiB) is reached"
        yield (*where, "limits", "flood"), message
    if "files_mib" in limits.model_fields_set and 2 * limits.files_mib > limits.tmpfs_mib:
        half_mib = limits.tmpfs_mib // 2
        message = f"{limits.files_mib} MiB of files do not fit into the folder of a call: half of tmpfs, {half_mib} MiB"
        yield (*where, "limits", "files_size"), message


def _egress(egress: Egress, where: Where, *, watched: bool) -> Iterator[Lint]:
    if not watched:
        message = "calls reach places outside, and tools has no freeze_above that stops a model which tries for more"
        yield where, message
    for i, place in enumerate(egress.allow):
        here: Where = (*where, "allow", i)
        if near(place.host):
            message = (
                f"{place.host} leads into a network of your own, if anywhere, and the proxy only to public addresses"
            )
            yield (*here, "host"), message


def _updates(updates: Updates) -> Iterator[Lint]:
    watched = {(rule.kind, rule.metric) for rule in updates.monitors}
    where: Where = ("updates", "monitors")
    if not any(kind == "jump" for kind, _ in watched):
        yield where, "no jump monitor: a loss that leaps or plunges but stays possible goes unseen"
    if updates.loss_kind != "surrogate" and not any(kind == "drift" for kind, _ in watched):
        yield where, "no drift monitor: a loss that gets worse by a little in each update goes unseen"
    if ("bounds", "grad_norm") not in watched:
        yield where, "no bounds monitor watches grad_norm: it is stopped where it is no number, and missed by nobody"
    for i, rule in enumerate(updates.monitors):
        if rule.kind == "bounds" and updates.loss_kind == "discrete" and _exactly_zero(rule):
            message = "a discrete loss may come out at -1e-12 by rounding; leave min out, loss_kind already implies it"
            yield (*where, i, "min"), message


def _exactly_zero(rule: BoundsRule) -> bool:
    return rule.metric == "loss" and rule.min == 0


def _notify(notify: Notify) -> Iterator[Lint]:
    if "freeze.entered" not in notify.events:
        yield ("notify", "events"), "notify.events lacks freeze.entered, so nobody is told when the run freezes"
    for i, place in enumerate(notify.webhooks):
        if place.insecure:
            message = "whoever is on the way reads what is sent here, and can keep it from arriving; write https"
            yield ("notify", "webhooks", i, "insecure"), message


def _metric(metric: PanelMetric, where: Where) -> Iterator[Lint]:
    if metric.good == "up" and (metric.min is None or metric.max is None):
        message = f"{metric.metric} may rise without a declared min and max: a value that cannot be looks like a gain"
        yield where, message
    if metric.min is None or metric.max is None:
        return
    width = metric.max - metric.min
    for key, limit in (("max_gain", metric.max_gain), ("max_loss", metric.max_loss)):
        if limit >= width:
            message = f"{key} never trips: {metric.metric} cannot change by more than {width:g}"
            yield (*where, key), message
