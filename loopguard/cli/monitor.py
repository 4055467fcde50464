"""`loopguard monitor`: what the monitors would have said of a run that was logged elsewhere."""

from __future__ import annotations

import csv
import json
import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from loopguard.errors import DataFileError, UsageError
from loopguard.types import Expectation, ExpectedKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loopguard.monitors import Monitor
    from loopguard.types import Signal

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_STDIN = "standard input"


class Direction(StrEnum):
    """Which way is better. A class, since that is how typer takes a choice."""

    lower_is_better = "lower_is_better"
    higher_is_better = "higher_is_better"
    none = "none"


_GOOD: dict[str, Literal["down", "up", "none"]] = {"lower_is_better": "down", "higher_is_better": "up", "none": "none"}


@app.callback()
def monitor() -> None:
    """Try the monitors on logged metrics."""


@app.command()
def scan(
    metric: Annotated[str, typer.Option(metavar="NAME", help="The metric; of several columns, the one to read.")] = "",
    direction: Annotated[Direction, typer.Option(help="Which way is better.")] = Direction.none,
    low: Annotated[float | None, typer.Option("--min", help="The least value that is possible.")] = None,
    high: Annotated[float | None, typer.Option("--max", help="The largest value that is possible.")] = None,
    problems: Annotated[
        int | None, typer.Option(help="The value is a share of so many problems; needs --direction.")
    ] = None,
    expect: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of announced changes: kind,at,span.")
    ] = None,
    every: Annotated[float, typer.Option(help="Readings in which a healthy run may trip once.")] = 100_000,
) -> None:
    """Say where the default monitors would have frozen a run, from CSV on standard input.

    loopguard monitor scan --metric loss --direction lower_is_better --min 0 < loss.csv

    The CSV has a header row, `step` in its first column and the metric in the second, or in the one that --metric
    names; nan and inf are values. Each trip and each note is one JSON line, with the row counted from 0. After a trip
    the level is learned again. --expect takes CSV with the header kind,at,span or JSON lines with those keys: kind is
    epoch, lr or data, at is a step of the input, span says for how many steps the change may show.

    Exit codes: 0 nothing tripped, 1 something did, 2 usage or input that cannot be read.
    """
    if problems is not None and direction == "none":
        raise UsageError("--problems needs --direction: which way a share of problems is better")
    name, rows = _read(metric)
    watching = _monitors(name, _GOOD[direction], low, high, problems, every)
    for announced in _expectations(expect) if expect else ():
        for monitor in watching:
            monitor.expect(announced)
    tripped = False
    told: dict[str, int | None] = {}
    for index, (step, value) in enumerate(rows):
        for signal in _ask(watching, step, value):
            if signal.level == "trip":
                tripped = True
            elif told.get(signal.monitor) == signal.since and signal.holds:
                continue  # A suspicion is one note, however many readings it lasts.
            told[signal.monitor] = signal.since
            print(json.dumps(_line(signal, index)), flush=True)
    raise typer.Exit(1 if tripped else 0)


def _monitors(
    metric: str,
    good: Literal["down", "up", "none"],
    low: float | None,
    high: float | None,
    problems: int | None,
    every: float,
) -> list[Monitor]:
    from loopguard import monitors

    try:
        return monitors.defaults(metric, good=good, min=low, max=high, problems=problems, every=every)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _ask(watching: list[Monitor], step: int, value: float) -> Iterator[Signal]:
    """What the monitors say of one value. The rest does not see what one of them tripped on; all start over then."""
    for monitor in watching:
        if not (signal := monitor.read(value, at=step)):
            continue
        yield signal
        if signal.level == "trip":
            for each in watching:
                each.rebase()
            return


def _line(signal: Signal, index: int) -> dict[str, Any]:
    """One line of output. JSON has no word for what is not finite: null, and the reason says which."""
    names = ("monitor", "metric", "value", "low", "high", "score", "since", "direction", "once_in")
    facts = {name: getattr(signal, name) for name in names}
    return {
        "index": index,
        "step": signal.at,
        "kind": "freeze" if signal.level == "trip" else "note",
        "reason": signal.reason,
        **{name: None if isinstance(fact, float) and not math.isfinite(fact) else fact for name, fact in facts.items()},
    }


def _read(metric: str) -> tuple[str, Iterator[tuple[int, float]]]:
    """The name of the metric, and its steps and values one by one, so that a pipe can be followed."""
    lines = _lines(sys.stdin, _STDIN)
    header = [name.strip().lstrip("\ufeff") for name in next(lines, (0, []))[1]]
    if len(header) < 2 or header[0] != "step":
        raise DataFileError(f"{_STDIN}:1: expected a header row such as step,loss")
    if metric in header[1:]:
        column = header.index(metric)
    elif len(header) == 2:
        column = 1  # One metric there is no choice of; --metric may give it another name.
    else:
        raise DataFileError(f"{_STDIN}:1: name one of these with --metric: {', '.join(header[1:])}")
    return metric or header[column], (_row(number, row, column) for number, row in lines)


def _row(number: int, row: list[str], column: int) -> tuple[int, float]:
    if len(row) <= column:
        raise DataFileError(f"{_STDIN}:{number}: {len(row)} columns where the header has more")
    return _step(row[0], f"{_STDIN}:{number}: step"), _number(row[column], f"{_STDIN}:{number}: value")


def _step(text: str, what: str) -> int:
    number = _number(text, what)
    if not number.is_integer():
        raise DataFileError(f"{what} is {text!r}, not a whole number")
    return int(number)


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataFileError(f"{what} is {text!r}, not a number") from None


def _lines(file: Iterable[str], name: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields; empty lines are left out."""
    reader = csv.reader(file)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataFileError(f"{name}:{reader.line_num + 1}: not CSV: {error}") from None


def _expectations(path: Path) -> list[Expectation]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("{"):
        return [_from_json(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    rows = _lines(text.splitlines(), str(path))
    header = [name.strip() for name in next(rows, (0, []))[1]]
    if not {"kind", "at"} <= set(header):
        raise DataFileError(f"{path}:1: expected a header row kind,at,span, or JSON lines with those keys")
    return [_expectation(dict(zip(header, row, strict=False)), f"{path}:{number}") for number, row in rows]


def _from_json(line: str, where: str) -> Expectation:
    try:
        facts = json.loads(line)
    except ValueError as error:
        raise DataFileError(f"{where}: not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise DataFileError(f"{where}: not a JSON object")
    return _expectation({key: str(value) for key, value in facts.items()}, where)


def _expectation(facts: dict[str, str], where: str) -> Expectation:
    kind = facts.get("kind", "").strip()
    if kind not in get_args(ExpectedKind):
        raise DataFileError(f"{where}: kind is {kind!r}; expected one of {', '.join(get_args(ExpectedKind))}")
    at = _step(facts.get("at", ""), f"{where}: at")
    span = _step(facts.get("span") or "1", f"{where}: span")
    if span < 1:
        raise DataFileError(f"{where}: span is {span}; a change shows for at least 1 step")
    return Expectation(kind=cast(ExpectedKind, kind), at=at, span=span)
