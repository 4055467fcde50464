"""Load, check and find guard policies.

`load` gives a policy or raises PolicyError with every problem in it; `check` gives problems or lints as a list.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from loopguard.errors import PolicyError
from loopguard.policy import explain, source
from loopguard.policy.findings import Finding, did_you_mean
from loopguard.policy.lint import lints
from loopguard.policy.schema import GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPolicy:
    """A policy as it was read from a file, once. Later edits of the file have no effect on it."""

    policy: GuardPolicy
    digest: str
    """SHA-256 of what the policy means: equal for files that differ in comments, key order or formatting only."""
    text: str
    """What the file said."""
    path: str


def load(path: Path) -> LoadedPolicy:
    """Load a guard policy. Raises PolicyError, which names every problem with its line and column."""
    loaded, findings = examine(path)
    if loaded is None:
        raise PolicyError([str(finding) for finding in findings])
    return loaded


def check(path: Path) -> list[Finding]:
    """Everything that can be said about a policy file: errors where it does not load, else lints. Raises nothing."""
    return examine(path)[1]


def examine(path: Path) -> tuple[LoadedPolicy | None, list[Finding]]:
    """Read a policy file once: the policy with its lints, or None with its errors."""
    read = source.read(path)
    policy, problems = _judge(read)
    if policy is None:
        return None, problems
    found = [
        Finding(path=read.path, message=message, line=spot.line, column=spot.column, level="lint")
        for where, message in lints(policy)
        for spot in [explain.spot_of(where, read)]
    ]
    return LoadedPolicy(policy=policy, digest=digest(policy), text=read.text, path=read.path), _sorted(found)


def _judge(read: source.Source) -> tuple[GuardPolicy | None, list[Finding]]:
    """The policy, or None with everything that is wrong with it."""
    problems = list(read.findings)
    policy, unsaid = None, 0
    if read.readable:
        try:
            # As JSON, since strict models take lists for tuples there and nowhere else.
            policy = GuardPolicy.model_validate_json(json.dumps(read.data))
        except ValidationError as error:
            problems += explain.findings(error, read)
            unsaid = max(error.error_count() - explain.MOST, 0)
    return (None, _most(_sorted(problems), unsaid)) if problems else (policy, [])


def _most(problems: list[Finding], unsaid: int) -> list[Finding]:
    """As many problems as somebody may read, and how many there are besides."""
    kept = problems[: explain.MOST]
    if more := len(problems) - len(kept) + unsaid:
        kept.append(Finding(path=problems[0].path, message=f"and at least {more} more problems"))
    return kept


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: (finding.line or 0, finding.column or 0))


# Keys that this format learned later, with what LoopGuard did before it knew them; or, where no decision of the loop
# rests on a key, with what it does for files that do not say. `canonical` leaves a key out where it says just that, so
# that a file without new keys keeps the digest it had, and with it its run directory. No two policies that differ come
# out the same: a key is left out for one value alone. That value is written here rather than looked up as the default,
# so that a default which changes one day does change the digest. Hence no line here is ever changed or taken away, and
# each new key gets one.
_LATER: dict[tuple[str, ...], dict[str, Any]] = {
    ("sandbox", "profiles", "*"): {"privileges": "multi", "queue": 1000, "background": False, "egress": None},
    ("sandbox", "profiles", "*", "limits"): {"files": 64, "files_mib": 8, "files_depth": 8},
    ("tools",): {"budget": None},
    ("tools", "rules", "*"): {"on_freeze": None},
    ("freeze",): {"signal": "USR2", "waive_at_most": 5, "probation": None, "halt_above": None, "second_latch": None},
    (): {"resume": None, "notify": None, "hold": {"at_most_s": 86400.0, "free_mib": None}},
    ("audit",): {"checkpoint_every": 1000, "anchors": [], "segment_mib": 64, "compress": True, "retain_days": 365}
    | {"payloads": {"code": "head", "printed": "digest"}},
}


def digest(policy: GuardPolicy) -> str:
    """SHA-256 of the policy as canonical JSON: keys sorted, defaults filled in, units resolved. See `_LATER`."""
    return hashlib.sha256(canonical(policy).encode("utf-8")).hexdigest()


def canonical(policy: GuardPolicy) -> str:
    """The effective policy as JSON text with one spelling."""
    said = policy.model_dump(mode="json")
    for way, before in _LATER.items():
        for section in _sections(said, way):
            for key, value in before.items():
                if section[key] == value:
                    del section[key]
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _sections(section: Any, way: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The sections at the end of a way, where `*` stands for every name, or every place in a list."""
    if not way:
        yield section
    elif way[0] != "*":
        yield from _sections(section[way[0]], way[1:])
    else:
        for one in section if isinstance(section, list) else section.values():
            yield from _sections(one, way[1:])


def shipped(name: str) -> Path:
    """The policy of that name among those that come with LoopGuard, such as `default` or `toolformer`."""
    known = {path.stem: path for home in _homes() for path in sorted(home.glob("*.yaml"))}
    if name not in known:
        names = ", ".join(sorted(known)) or "none"
        raise PolicyError(
            [f"no policy named {name!r} comes with LoopGuard; there is {names}{did_you_mean(name, known)}"]
        )
    return known[name]


def _homes() -> list[Path]:
    """Where shipped policies are: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_shipped" / "policies"
    return [installed] if installed.is_dir() else [package.parent / "policies"]
