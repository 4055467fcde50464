"""Solutions of word problems as text: plain lines, and the places in them where a calculator call may stand.

Read are files in the form of GSM8K: one JSON object on each line, with a `question` and an `answer`. In the answer
people wrote their calculator calls as `<<48/2=24>>`, right before the number that the call gives:

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.

A `Place` is a spot like the one before `24`: an equals sign, then a number that a person wrote. The human call is kept
beside the text and never inside it, so that a loop which reads places reads text without annotations.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopguard.errors import DataFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPEN, CLOSE = "<<", ">>"

_CALL = re.compile(r"<<([^<>]*)>>")
_MARK = "\x00"
"""Stands for a human call while a line is tidied, so that the call's place survives the tidying."""
_NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)"
# A number that an operator follows is the first operand of something longer and no result.
_PLACE = re.compile(rf"=\$?({_MARK}?)({_NUMBER})(?![\d.]*[-+*/=])")
_OPERAND = r"[$(]*\.?\d[\d.]*[%)]*"
_SPELLED_OUT = re.compile(rf"{_OPERAND}(?:\s*[-+*/x×÷–]\s*{_OPERAND})+\s*=\$?$")
_ANSWER = "####"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An equals sign in a line, and the number that a person wrote after it."""

    origin: str
    before: str
    """The line up to the number; ends in `=` or `=$`."""
    number: str
    after: str
    """The line from the number on."""
    call: str | None
    """The expression of the human call that stood here, if there was one."""

    @property
    def spelled_out(self) -> bool:
        """Whether the expression stands right before the equals sign, so that copying it is enough."""
        return _SPELLED_OUT.search(self.before) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One word problem with its solution."""

    origin: str
    """Where it can be found again, such as `train.jsonl:17`."""
    question: str
    lines: tuple[str, ...]
    """The solution without calls, tidied."""
    places: tuple[Place, ...]


def read(path: Path) -> list[Problem]:
    """The problems of a file.

    Raises DataFileError, which names the line, for anything that is not a problem with a solution, and for a file in
    which there is no place for a call.
    """
    try:
        rows = path.read_bytes().splitlines()
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror}") from error
    problems = [
        problem_of(*_fields(row, where=f"{path}:{at}"), origin=f"{path.name}:{at}")
        for at, row in enumerate(rows, start=1)
        if row.strip()
    ]
    if not problems:
        raise DataFileError(
            f"{path}:1: the file is empty; expected a JSON object with question and answer on each line"
        )
    if not any(problem.places for problem in problems):
        raise DataFileError(f"{path}:1: no line of any answer holds '=' and a number, so there is no place for a call")
    return problems


def _fields(row: bytes, *, where: str) -> tuple[str, str]:
    try:
        body: Any = json.loads(row)
    except ValueError as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        raise DataFileError(f"{where}: not JSON ({what}); expected an object with question and answer") from error
    if not isinstance(body, dict):
        raise DataFileError(f"{where}: a JSON {_kind(body)}; expected an object with question and answer")
    for key in ("question", "answer"):
        if not isinstance(body.get(key), str):
            found = f"{key} is a {_kind(body[key])}" if key in body else f"{key} is missing"
            raise DataFileError(f"{where}: {found}; expected text")
        if not body[key].strip():
            raise DataFileError(f"{where}: {key} is empty; expected text")
    return body["question"], body["answer"]


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def problem_of(question: str, answer: str, *, origin: str) -> Problem:
    """A problem from its texts; the last line of the answer (`#### 24`) is for graders and left out."""
    solution = [line for line in answer.split("\n") if line.strip() and not line.startswith(_ANSWER)]
    marked = [(_tidy(_CALL.sub(_MARK, line)), _CALL.findall(line)) for line in solution]
    return Problem(
        origin=origin,
        question=_tidy(question),
        lines=tuple(line.replace(_MARK, "") for line, _ in marked),
        places=tuple(place for line, calls in marked for place in _places(line, calls, origin)),
    )


def _places(marked: str, calls: list[str], origin: str) -> Iterator[Place]:
    for match in _PLACE.finditer(marked):
        mark, number = match.groups()
        call = calls[marked.count(_MARK, 0, match.start(1))] if mark else None
        yield Place(
            origin=origin,
            before=marked[: match.start(1)].replace(_MARK, ""),
            number=number,
            after=marked[match.start(2) :].replace(_MARK, ""),
            call=None if call is None else re.sub(r"\s", "", call.rpartition("=")[0]) or None,
        )


def _tidy(line: str) -> str:
    """One spelling for what people write in many ways: no thousands commas, no spaces around signs."""
    line = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line)
    line = re.sub(rf"[ \t]*([+*/=])[ \t]*({_MARK}?)[ \t]*", r"\1\2", line)
    line = re.sub(r"(?<=[\d)%])[ \t]*-[ \t]*(?=[\d($.])", "-", line)
    return re.sub(r"[ \t]+", " ", line).strip()
