"""Say what is wrong with a policy in sentences: from pydantic's errors to findings with a place and a way out.

Also what is said of keys that people look for and that are not there: of those that no cell ever has (`forbidden`), and
of those that no code enforces yet.
"""

from __future__ import annotations

import re
import types
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from loopguard.policy.findings import Finding, PlacedProblemsError, Where, did_you_mean, dotted, nearest, shown
from loopguard.policy.forbidden import wish
from loopguard.policy.schema import (
    MONITOR_KINDS,
    CallBudget,
    CellLimits,
    Egress,
    EgressPlace,
    GuardPolicy,
    Profile,
    Sandbox,
    ToolRule,
    Tools,
    missing_profiles,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from loopguard.policy.source import Source, Spot

MOST = 100
"""Problems that are explained. Nobody reads on, and a hostile file could hold a hundred thousand."""

Section = type[BaseModel]
Placed = tuple["Spot", str]

_ABOUT_CELLS: tuple[Section, ...] = (
    *(GuardPolicy, Tools, ToolRule, CallBudget),
    *(Sandbox, Profile, CellLimits, Egress, EgressPlace),
)
"""Sections where a key that no cell ever has is such a wish, rather than an unknown word."""

NOT_YET: dict[Where, frozenset[str]] = {
    (): frozenset({"anchors", "approvals", "backtest", "budgets", "capabilities", "defaults", "extends", "override"})
    | frozenset({"people", "policy", "service", "triage", "waivers"}),
    ("tools", "rules"): frozenset({"approval", "args", "calls_per_cycle", "match", "mode", "until"}),
    ("sandbox",): frozenset({"floor"}),
    ("data",): frozenset({"max_self_generated", "near_duplicates", "quarantine", "release", "require"}),
    ("updates",): frozenset({"budgets", "expect"}),
    ("promotion",): frozenset({"approvals", "artifact", "budgets", "gates"}),
    ("freeze",): frozenset({"budgets", "scope", "triage"}),
    ("audit",): frozenset({"checkpoint", "dir", "disk", "redact", "retain", "rotate", "sign", "sinks"}),
}
"""Keys that a later LoopGuard may read, by section. Accepting them now would promise what nothing keeps."""

GONE: dict[Where, frozenset[str]] = {
    ("updates", "monitors"): frozenset({"threshold", "window", "confirm", "warmup"}),
}
"""Keys that LoopGuard once read. What a jump is follows from the run's own noise and from `false_alarm_every`."""

_TYPES = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}

_LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "string_too_long": ("at most", "max_length"),
}


def findings(error: ValidationError, source: Source) -> list[Finding]:
    """What is wrong with the meaning of a policy, each with its place in the file."""
    placed = [each for detail in error.errors()[:MOST] for each in _sentences(detail, source)]
    # pydantic looks at the whole only once every part is sound; a misspelt profile should not wait for that.
    placed += _misspelt_profiles(source)
    return [
        Finding(path=source.path, message=sentence, line=spot.line, column=spot.column)
        for spot, sentence in dict.fromkeys(placed)
    ]


def spot_of(where: Where, source: Source) -> Spot:
    """Where a place stands; of one that is not written, the nearest section around it."""
    while where and where not in source.spots:
        where = where[:-1]
    return source.spots[where]


def _sentences(detail: ErrorDetails, source: Source) -> Iterator[Placed]:
    where, _ = _resolve(detail["loc"])
    cause = detail.get("ctx", {}).get("error")
    if detail["type"] == "extra_forbidden":
        yield _unknown_key(where, source)
    elif isinstance(cause, PlacedProblemsError):
        for inner, tail in cause.problems:
            yield from _said((*where, *inner), tail, source)
    elif detail["type"] == "union_tag_not_found":
        yield from _said((*where, "kind"), f"is missing: {MONITOR_KINDS}", source)
    elif detail["type"] == "missing":
        if not _misspelt(where, source):
            yield from _said(where, f"is missing: {_meaning(where)}", source)
    elif detail["type"] == "union_tag_invalid":
        where = (*where, "kind")
        yield from _said(where, _tail(detail, _value(where, source), quoted=source.spots[where].quoted), source)
    else:
        spot = source.spots.get(where)
        yield from _said(where, _tail(detail, _value(where, source), quoted=spot is not None and spot.quoted), source)


def _said(where: Where, tail: str, source: Source) -> Iterator[Placed]:
    """The sentence, unless the reader has already complained about this place."""
    if not any(where[: len(broken)] == broken for broken in source.broken):
        yield spot_of(where, source), f"{dotted(where) or 'the policy'} {tail}"


def _tail(detail: ErrorDetails, value: Any, *, quoted: bool) -> str:
    """What comes after the place: what it is, what was expected, and the nearest right answer."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in ("literal_error", "union_tag_invalid"):
        options = re.findall(r"'([^']+)'", str(context.get("expected", context.get("expected_tags", ""))))
        if len(options) == 1:
            return f"is {shown(value)}; expected {options[0]}"
        return f"is {shown(value)}; expected one of {', '.join(options)}{did_you_mean(str(value), options)}"
    if kind == "string_too_short":
        return "is empty; give it a value or leave it out"
    if kind in ("string_too_long", "too_long"):
        unit = "characters" if isinstance(value, str) else "entries"
        return f"has {len(value)} {unit}; expected at most {context['max_length']}"
    if kind in _LIMITS:
        word, key = _LIMITS[kind]
        return f"is {shown(value)}; expected {word} {context[key]:.12g}"
    expected = _TYPES.get(kind.split("_")[0], "")
    if not expected:
        return f"is {shown(value)}; {detail['msg']}"
    return f"is {shown(value)}; expected {expected}{_hint(value, expected, quoted=quoted)}"


def _hint(value: Any, expected: str, *, quoted: bool) -> str:
    """The fix for a value of the wrong type, where one is likely."""
    if expected == "text" and isinstance(value, (bool, int, float)):
        return ". Put it in quotes"
    if expected == "a list" and isinstance(value, str):
        return f", such as [{value}]" if re.fullmatch(r"[\w.-]+", value) else ""
    if expected == "a whole number" and isinstance(value, float) and value.is_integer():
        return f". Write {int(value)}"
    if "number" not in expected or not isinstance(value, str):
        return ""
    if quoted and re.fullmatch(r"-?[0-9.]+", value):
        return ". Take the quotes off"
    if re.fullmatch(r"0[0-7]+", value):
        return f". A leading zero means octal to some readers; write {value.lstrip('0') or '0'} or {int(value, 8)}"
    if percent := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?%", value):
        return f". Write {float(percent[1]) / 100:.12g}"
    if re.match(r"[-+.]?[0-9.]|[-+]?\.?(inf|nan)", value, re.IGNORECASE):
        return ", written as in JSON: 8, 0.5 or 1e-3"
    return ""


def _unknown_key(where: Where, source: Source) -> Placed:
    spot, parent, key = source.spots[where], where[:-1], str(where[-1])
    key_spot = type(spot)(spot.key_line, spot.key_column, spot.key_line, spot.key_column)
    section = _section(parent, source)
    if section in _ABOUT_CELLS and not _is_not_yet(key, parent) and (wished := wish(key)):
        # Only among the limits is such a key more likely a slip (pid for pids) than a wish.
        slip = did_you_mean(key, _keys(section)) if section is CellLimits else ""
        return key_spot, f"{dotted(where)}: {wished.sentence(_value(where, source))}{slip}"
    prefix = f"{dotted(parent)}: " if parent else ""
    return key_spot, f"{prefix}{_about_key(key, parent, section)}"


def _misspelt(where: Where, source: Source) -> bool:
    """Whether a missing key is there under a name that is nearly its own; that is said of the other name."""
    known = _keys(_section(where[:-1], source))
    written = _value(where[:-1], source)
    return any(key not in known and nearest(key, known) == where[-1] for key in list(written)[:MOST])


def _about_key(key: str, parent: Where, section: Section | None) -> str:
    if _is_not_yet(key, parent):
        return f"no code enforces {'.'.join((*_names(parent), key))!r} yet; take it out"
    if key in GONE.get(_names(parent), ()):
        return (
            f"{key!r} is gone: limits follow from the run's own noise and from updates.false_alarm_every; take it out"
        )
    known = _keys(section)
    near = did_you_mean(key, known)
    if homes := sorted({home for home in _homes(GuardPolicy) if home.rpartition(".")[2] == key}):
        return f"unknown key {key!r} here; it belongs at {' or '.join(homes)}, so check the indentation"
    if near:
        return f"unknown key {key!r}{near}"
    return f"unknown key {key!r}; expected one of {', '.join(known)}"


def _is_not_yet(key: str, parent: Where) -> bool:
    return key in NOT_YET.get(_names(parent), ())


def _names(where: Where) -> tuple[str, ...]:
    return tuple(step for step in where if isinstance(step, str))


def _misspelt_profiles(source: Source) -> Iterator[Placed]:
    """Rules that name a profile which is not there, also where other parts of the policy are not sound."""
    rules, profiles = _value(("tools", "rules"), source), _value(("sandbox", "profiles"), source)
    written = _value(("sandbox",), source) is not None
    if not isinstance(rules, list) or (not isinstance(profiles, dict) if written else _misspelt(("sandbox",), source)):
        return
    named = [
        (("tools", "rules", i, "sandbox"), rule.get("sandbox"))
        for i, rule in enumerate(rules)
        if isinstance(rule, dict)
    ]
    for where, tail in missing_profiles(named, list(profiles) if written else None):
        yield from _said(where, tail, source)


def _value(where: Where, source: Source) -> Any:
    value = source.data
    for step in where:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


# Finding the section that a place of pydantic's leads to, from the annotations of the models.


def _resolve(loc: tuple[str | int, ...]) -> tuple[Where, Any]:
    """The place without the tags that pydantic adds for unions, and what is annotated there."""
    where: list[str | int] = []
    here: Any = GuardPolicy
    for step in loc:
        if step == "[key]":
            continue  # what pydantic appends where a name is wrong, rather than what stands under it
        if tagged := _tagged(here):
            here = tagged.get(str(step))
        else:
            here = _inside(here, step)
            where.append(step)
    return tuple(where), here


def _section(where: Where, source: Source) -> Section | None:
    """The model of the section at a place."""
    here: Any = GuardPolicy
    for i, step in enumerate(where):
        here = _inside(here, step)
        if tagged := _tagged(here):
            here = tagged.get(str(_value((*where[: i + 1], "kind"), source)))
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def _inside(annotation: Any, step: str | int) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = {field.alias or key: field for key, field in annotation.model_fields.items()}
        return _plain(fields[str(step)].annotation) if step in fields else None
    arguments = get_args(annotation)
    return _plain(arguments[0 if get_origin(annotation) is tuple else 1]) if len(arguments) > 1 else None


def _plain(annotation: Any) -> Any:
    """An annotation without its metadata and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [each for each in get_args(annotation) if each is not type(None)]
        return _plain(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _tagged(annotation: Any) -> dict[str, Section]:
    """The sections of a union by the `kind` that each of them has; empty for anything else."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return {}
    return {get_args(each.model_fields["kind"].annotation)[0]: each for each in get_args(annotation)}


def _keys(section: Section | None) -> list[str]:
    return [field.alias or key for key, field in section.model_fields.items()] if section else []


def _meaning(where: Where) -> str:
    """What the required key at a place says, from the description of its field."""
    _, section = _resolve(where[:-1])
    for each in [section, *_tagged(section).values()]:
        field = getattr(each, "model_fields", {}).get(where[-1])
        if field is not None and field.description:
            return str(field.description)
    return "it has no default"


def _homes(section: Section, prefix: str = "") -> Iterator[str]:
    """Every key of a policy, with the section it stands in."""
    for key, field in section.model_fields.items():
        name = f"{prefix}{field.alias or key}"
        yield name
        yield from _homes_inside(_plain(field.annotation), name)


def _homes_inside(annotation: Any, name: str) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _homes(annotation, f"{name}.")
    elif get_origin(annotation) is tuple:
        yield from _homes_inside(_plain(get_args(annotation)[0]), f"{name}[]")
    elif get_origin(annotation) is dict:
        yield from _homes_inside(_plain(get_args(annotation)[1]), f"{name}.NAME")
    for each in _tagged(annotation).values():
        yield from _homes(each, f"{name}.")
