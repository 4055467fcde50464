"""The operator's view of the log: one line on standard error for each event that a person may want to act on.

It is a view and not the evidence: it may be filtered, lost or turned off without harm. Tool calls do not appear one by
one. Text that a model wrote cannot move the cursor or change the reading direction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from loopguard.audit.events import is_digest, printable
from loopguard.audit.query import amount, expected, panel_of, short, signals_of

if TYPE_CHECKING:
    from loopguard.audit.events import Entry

_Body = Mapping[str, Any]
_MOST_CHARS = 200
_QUIET = frozenset(
    (
        *("run.started", "run.finished", "policy.loaded", "eval.finished", "promotion.applied"),
        *("resume.applied", "approval.given", "note.added", "model.attached", "snapshot.written", "update.expected"),
    )
)


class Mirror:
    """Prints control events as `key=value` lines. Lives as long as the log it is given to.

    mirror = Mirror()  # standard error
    log = AuditLog.open(run_dir, run_id="calc", policy=digest, mirror=mirror)
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._gone = False
        # A logger of our own: the program around us keeps its structlog configuration.
        self._log: Any = structlog.wrap_logger(
            structlog.WriteLogger(stream or sys.stderr),
            processors=[
                _safe_to_show,
                structlog.processors.LogfmtRenderer(
                    key_order=["ts", "level", "event", "cycle"], drop_missing=True, bool_as_flag=False
                ),
            ],
            wrapper_class=structlog.BoundLogger,
        )

    def __call__(self, entry: Entry) -> None:
        """Print a line for this record if it is one for people. Never raises for a stream that is gone."""
        tell = _TELLERS.get(entry.type)
        told = tell(entry.body) if tell and not self._gone else None
        if told is None:
            return
        try:
            self._log.msg(entry.type, ts=f"{entry.ts[:19]}Z", level=_level(entry), cycle=entry.cycle, **told)
        except (OSError, ValueError):
            # Nobody reads any more: a closed pipe or file. The evidence does not depend on it.
            self._gone = True


def _level(entry: Entry) -> str:
    if entry.type == "freeze.entered":
        return "error"
    return "info" if entry.type in _QUIET else "warning"


def _safe_to_show(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    return {key: _short_text(value) for key, value in event.items() if value not in (None, "")}


def _short_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}..."


def _picked(*names: str) -> Callable[[_Body], dict[str, Any]]:
    return lambda body: {name: _flat(body.get(name)) for name in names}


def _flat(value: Any) -> Any:
    if isinstance(value, str) and is_digest(value):
        return short(value)
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


def _freeze(body: _Body) -> dict[str, Any]:
    told = _picked("freeze", "gate", "rule", "reason", "update")(body)
    if signals := signals_of(body):
        told |= {"metric": _flat(signals[0].get("metric")), "value": amount(signals[0].get("value"))}
        told["expected"] = expected(signals[0])
    return told | {"restored": short(body["restored"]) if body.get("restored") else None}


def _refused_promotion(body: _Body) -> dict[str, Any] | None:
    return None if body.get("result") == "allow" else _picked("result", "rule", "reason")(body)


def _evaluation(body: _Body) -> dict[str, Any]:
    return {f"panel.{_key(name)}": amount(value) for name, value in panel_of(body).items()}


def _key(name: str) -> str:
    """A metric's name without what would end a key."""
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in name)


def _withheld(body: _Body) -> dict[str, Any]:
    return _picked("update", "reason")(body)


def _removed(body: _Body) -> dict[str, Any] | None:
    """Recycling is routine; a lost or dirty cell is not."""
    return _picked("cell", "reason")(body) if body.get("reason") in ("dirty", "lost") else None


_TELLERS: dict[str, Callable[[_Body], dict[str, Any] | None]] = {
    "log.recovered": _picked("torn_bytes", "file"),
    "run.started": _picked("seed", "goes_on"),
    "run.finished": _picked("cycles"),
    "run.interrupted": _picked(),
    "run.halted": _picked("by", "reason", "because"),
    "probation.began": _picked("cycles", "tighten"),
    "probation.ended": _picked(),
    "hold.entered": _picked("reason"),
    "hold.ended": _picked("held_s", "frozen"),
    "policy.loaded": _picked("name", "digest"),
    "policy.adopted": _picked("from", "to", "change"),
    "model.attached": lambda body: {"weights": short(body.get("weights")), "late": body.get("late")},
    "tool.lost": _picked("call", "reason"),
    "data.quarantined": _picked("count", "reason"),
    "data.refused": _picked("reason"),
    "update.withheld": _withheld,
    "update.skipped": _withheld,
    "update.expected": _picked("kind", "at", "span"),
    "update.settled": _picked("from", "to", "restored"),
    "eval.finished": _evaluation,
    "promotion.decided": _refused_promotion,
    "promotion.applied": lambda body: {"actor": short(body.get("actor"))},
    "promotion.settled": _picked("snapshot", "applied"),
    "promotion.rolled_back": _picked("from", "to", "by", "reason"),
    "snapshot.written": lambda body: {"snapshot": short(body.get("snapshot")), "update": body.get("update")},
    "snapshot.restored": _picked("snapshot", "because"),
    "freeze.requested": _picked("by", "reason"),
    "freeze.entered": _freeze,
    "resume.requested": _picked("by", "reason"),
    "approval.given": _picked("person", "key", "of"),
    "approval.refused": _picked("code", "person", "reason"),
    "resume.applied": _picked("freeze", "by", "reason", "disposition"),
    "note.added": _picked("by", "text"),
    "sandbox.removed": _removed,
    "sandbox.reaped": lambda body: {name: _flat(value) for name, value in body.items() if name.isidentifier()},
}
