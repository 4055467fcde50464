"""Read a policy file into JSON values, and remember where each of them stands.

YAML 1.2 in its plainest form. A word without quotes is `true`, `false`, `null` or a JSON number; everything else, such
as `on`, `no`, `010`, `1:30` or `2026-11-23`, is text and fails where text is not expected. What YAML allows and a file
that decides about safety should not need is refused at its line and column: duplicate keys, anchors, aliases, merge
keys, tags, directives, a second document, tabs as indentation, characters that do not show, empty values.

Nothing here knows what a policy means; `schema.py` does.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamStartEvent,
)

from loopguard.policy.findings import Finding, Where, dotted, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_START = "`policies/default.yaml` is a good one to start from"
_MAX_NUMBER = 40  # characters; longer ones are mistakes, and Python refuses to convert very long ones at all

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False}

# C0 and C1 controls but tab and line ends, Unicode line ends (an editor counts lines differently there), marks that
# reorder or hide text, surrogates and the byte order mark.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)
_TAB_INDENT = re.compile(r"^ *\t[ \t]*(?=[^ \t\r\n])", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a value stands and, of an entry of a mapping, where its key stands. Lines and columns count from 1."""

    line: int
    column: int
    key_line: int
    key_column: int
    quoted: bool = False


@dataclass(slots=True)
class Source:
    """What a file says, where it says it, and what is wrong with how it says it."""

    path: str
    text: str
    data: Any = None
    spots: dict[Where, Spot] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    readable: bool = False
    """Whether all of it could be read, so that `data` is worth judging."""
    broken: set[Where] = field(default_factory=set)
    """Places whose value could not be read; that has been said, so nothing more needs saying about them."""


class _StopError(Exception):
    """Nothing can be said beyond this finding."""

    def __init__(self, message: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


def read(path: Path) -> Source:
    """Read and parse a policy file. Whatever is wrong with it becomes a finding."""
    name = str(path)
    try:
        text = _decode(_bytes(path))
    except _StopError as stop:
        return _stopped(Source(path=name, text=""), stop)
    return parse(text, name)


def parse(text: str, name: str) -> Source:
    """Parse the text of a policy; `name` is what messages call the file."""
    source = Source(path=name, text=text)
    try:
        _visible(text)
        _Reader(source).document()
    except _StopError as stop:
        return _stopped(source, stop)
    except YAMLError as error:
        return _stopped(source, _not_yaml(error))
    source.readable = True
    return source


def _stopped(source: Source, stop: _StopError) -> Source:
    source.findings.append(Finding(path=source.path, message=stop.message, line=stop.line, column=stop.column))
    return source


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _StopError(f"no such file; {_START}") from None
    except IsADirectoryError:
        raise _StopError("is a directory; name a policy file inside it") from None
    except (OSError, ValueError) as error:
        raise _StopError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise _StopError("is larger than 1 MiB; a guard policy is a few KiB")
    return raw


def _decode(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _StopError("is UTF-16; save it as UTF-8", 1, 1)
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise _StopError(message, *_place(before, len(before))) from None


def _visible(text: str) -> None:
    if hidden := _INVISIBLE.search(text):
        raise _StopError(f"holds the {_named(hidden)}; take it out", *_place(text, hidden.start()))
    if tab := _TAB_INDENT.search(text):
        at = text.index("\t", tab.start())
        raise _StopError("a tab indents this line; YAML indents with spaces only", *_place(text, at))


def _named(hidden: re.Match[str]) -> str:
    return f"invisible character U+{ord(hidden.group()):04X}"


def _place(text: str, index: int) -> tuple[int, int]:
    """Line and column of a character, both from 1, with line ends as YAML counts them."""
    before = text[:index].replace("\r\n", "\n").replace("\r", "\n")
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _not_yaml(error: YAMLError) -> _StopError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if problem == "mapping values are not allowed here":
        problem = "a second ': ' on one line, or indentation that does not fit; put text that holds ': ' in quotes"
    place = (None, None) if mark is None else (mark.line + 1, mark.column + 1)
    return _StopError(f"is not YAML: {problem}", *place)


class _Reader:
    """Turns ruamel's events into JSON values. Lives for one file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._events: Iterator[Event] = iter(YAML(typ="safe", pure=True).parse(source.text))

    def document(self) -> None:
        """Fill the source."""
        start = next((event for event in self._events if not isinstance(event, StreamStartEvent)), None)
        if not isinstance(start, DocumentStartEvent):
            raise _StopError(f"is empty; {_START}", 1, 1)
        if start.version is not None or start.tags is not None:
            self._say(start, "a guard policy takes no % directive; take it out", (), line=1, column=1)
        self._source.data = self._value(next(self._events), ())
        next(self._events)  # the end of this document
        if isinstance(more := next(self._events), DocumentStartEvent):
            self._say(more, "a second document begins here; a policy file holds one", ())

    def _value(self, event: Event, where: Where, key: Event | None = None) -> Any:
        spot = _spot(event, key or event)
        self._source.spots[where] = spot
        if len(where) > MAX_DEPTH:
            raise _StopError(f"is nested more than {MAX_DEPTH} deep", spot.line, spot.column)
        if isinstance(event, AliasEvent):
            self._say(event, f"*{event.anchor} is an alias; write the value out", where, broken=True)
            return None
        assert isinstance(event, (ScalarEvent, MappingStartEvent, SequenceStartEvent))
        if event.anchor is not None:
            self._say(
                event, f"&{event.anchor} is an anchor; take it out, and write the value again where it is meant", where
            )
        if event.tag is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            self._say(event, f"{tag} is a tag; take it out", where, broken=isinstance(event, ScalarEvent))
        if isinstance(event, MappingStartEvent):
            return self._mapping(where)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(where)
        return self._scalar(event, where)

    def _sequence(self, where: Where) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            items.append(self._value(event, (*where, len(items))))
        return items

    def _mapping(self, where: Where) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not isinstance(key := next(self._events), MappingEndEvent):
            name = self._key(key, where)
            if name is None:
                self._skip()
            elif name in entries:
                first = self._source.spots[*where, name].key_line
                self._say(key, f"{_subject(where, name)} is there twice, first in line {first}; keep one", where)
                self._skip()
            else:
                entries[name] = self._value(next(self._events), (*where, name), key)
        return entries

    def _key(self, key: Event, where: Where) -> str | None:
        """The name of a key, or None (said) where it cannot be one."""
        if isinstance(key, ScalarEvent) and key.tag is None and key.anchor is None:
            if key.value == "<<" and key.implicit[0]:
                self._say(key, "<< is a merge key; write the keys out", where)
                return None
            if hidden := _INVISIBLE.search(key.value):
                self._say(key, f"the key {shown(key.value)} holds the {_named(hidden)}", where)
                return None
            return str(key.value)
        if isinstance(key, (MappingStartEvent, SequenceStartEvent)):
            self._skip_rest()
        self._say(key, "a key must be a plain word", where)
        return None

    def _skip(self) -> None:
        """Read past one value."""
        if isinstance(next(self._events), (MappingStartEvent, SequenceStartEvent)):
            self._skip_rest()

    def _skip_rest(self) -> None:
        """Read past the rest of a collection that has begun."""
        depth = 1
        while depth:
            event = next(self._events)
            if depth > MAX_DEPTH:
                spot = _spot(event, event)
                raise _StopError(f"is nested more than {MAX_DEPTH} deep", spot.line, spot.column)
            depth += isinstance(event, (MappingStartEvent, SequenceStartEvent))
            depth -= isinstance(event, (MappingEndEvent, SequenceEndEvent))

    def _scalar(self, event: ScalarEvent, where: Where) -> Any:
        text = str(event.value)
        if hidden := _INVISIBLE.search(text):
            self._say(event, f"{dotted(where)} holds the {_named(hidden)}", where, broken=True)
            return None
        if not event.implicit[0]:
            return text
        if text in ("", "null"):
            self._empty(where)
            return None
        if text in _WORDS:
            return _WORDS[text]
        return self._number(event, text, where) if _NUMBER.fullmatch(text) else text

    def _empty(self, where: Where) -> None:
        # An empty value never means "the default": a check that somebody forgot to fill in must not vanish in silence.
        spot = self._source.spots[where]
        message = f"{dotted(where)} is empty; give it a value or leave the key out" if where else f"is empty; {_START}"
        finding = Finding(path=self._source.path, message=message, line=spot.key_line, column=spot.key_column)
        self._source.findings.append(finding)
        self._source.broken.add(where)

    def _number(self, event: ScalarEvent, text: str, where: Where) -> int | float | None:
        if len(text) <= _MAX_NUMBER and math.isfinite(number := json.loads(text)):
            # Negative zero is zero, so that both have one digest.
            return int(number) if isinstance(number, int) else float(number) + 0.0
        self._say(
            event,
            f"{dotted(where)} is {shown(text)}, larger or longer than any number that could be meant",
            where,
            broken=True,
        )
        return None

    def _say(
        self, event: Event, message: str, where: Where, *, broken: bool = False, line: int = 0, column: int = 0
    ) -> None:
        place = _spot(event, event)
        finding = Finding(
            path=self._source.path, message=message, line=line or place.line, column=column or place.column
        )
        self._source.findings.append(finding)
        if broken:
            self._source.broken.add(where)


def _subject(where: Where, name: str) -> str:
    return dotted((*where, name))


def _spot(event: Event, key: Event) -> Spot:
    at, key_at = event.start_mark, key.start_mark
    quoted = isinstance(event, ScalarEvent) and not event.implicit[0]
    return Spot(at.line + 1, at.column + 1, key_at.line + 1, key_at.column + 1, quoted)
