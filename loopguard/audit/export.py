"""The log in formats of other tools: the lines themselves, a table, CloudEvents, OpenTelemetry.

Every format holds every record, and with it its hash, so that whoever wants to know more finds it in the log. An export
is a copy for looking at: what can be verified is the run directory.

Text in a log was written by strangers. JSON formats are ASCII; a table is escaped so that it can neither move a cursor
nor, opened in a spreadsheet, be taken for a formula. Memory does not grow with the log.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar, get_args
from urllib.parse import quote

import loopguard
from loopguard.audit import read
from loopguard.audit.events import Entry, canonical, fields_of, printable
from loopguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

Format = Literal["jsonl", "csv", "cloudevents", "otlp", "parquet"]
FORMATS: tuple[str, ...] = get_args(Format)

COLUMNS = (
    *("seq", "ts", "type", "cycle", "epoch", "actor_kind", "actor_id"),
    *("call", "freeze", "gate", "rule", "result", "status", "reason", "by", "update"),
    *("body", "policy", "id", "prev", "hash", "log"),
)
"""Of a table. Those in the second row are members of the body, where it has them; `body` is all of it, as JSON."""

_FROM_BODY = COLUMNS[7:16]
_FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
"""What a spreadsheet takes for the beginning of a formula, the wide forms included."""
_AT_ONCE = 500
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SERIOUS = {"freeze.entered": (17, "ERROR"), "freeze.requested": (13, "WARN"), "freeze.foreseen": (13, "WARN")}
_WORTH_A_LOOK = (".refused", ".withheld", ".quarantined", ".lost", ".failed", ".rolled_back", ".settled", ".recovered")


def export(run_dir: Path, *, to: str, out: Path | None = None) -> int:
    """Write the controller's log in a format, to a file or to standard output; gives how many records.

    The file appears when it is whole and not before. Raises UsageError where there is no log, no such format, a place
    inside of the run directory, or a package that a format needs; AuditTamperedError at a record that was altered.
    """
    run_dir = Path(run_dir)
    write = _writer(to)
    entries = _Counted(read.entries(run_dir))
    if out is None:
        write(entries, sys.stdout.buffer)
        sys.stdout.flush()
        return entries.count
    outside(out, run_dir)
    with whole_file(out) as file:
        write(entries, file)
    return entries.count


def outside(out: Path, run_dir: Path) -> None:
    """Refuse to write into a run directory: what lies there is evidence. Raises UsageError."""
    if out.resolve().is_relative_to(run_dir.resolve()):
        raise UsageError(f"--out {out} lies in the run directory {run_dir}, which is evidence; name a place outside it")


@contextlib.contextmanager
def whole_file(out: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name once all of it was written. Raises UsageError where it has no folder."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        file = partial.open("wb")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"--out {out}: there is no folder {out.parent}") from None
    try:
        with file:
            yield file
        os.replace(partial, out)  # noqa: PTH105 - the one call whose name says that a reader never sees half of it
    finally:
        partial.unlink(missing_ok=True)


class _Counted:
    """Records on their way through, counted."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._entries = entries
        self.count = 0

    def __iter__(self) -> Iterator[Entry]:
        for entry in self._entries:
            self.count += 1
            yield entry


def _writer(to: str) -> Callable[[Iterable[Entry], IO[bytes]], None]:
    writers = {"jsonl": _jsonl, "csv": _csv, "cloudevents": _cloudevents, "otlp": _otlp, "parquet": _parquet}
    if (write := writers.get(to)) is not None:
        return write
    raise UsageError(f"--to {to!r} is no format; expected one of {', '.join(FORMATS)}")


def _batches(items: Iterable[T], most: int) -> Iterator[list[T]]:
    """So many at a time, the last time what is left."""
    rest = iter(items)
    while batch := list(islice(rest, most)):
        yield batch


def _jsonl(entries: Iterable[Entry], file: IO[bytes]) -> None:
    """The lines of the log, byte for byte."""
    for entry in entries:
        file.write(f"{canonical(fields_of(entry))}\n".encode("ascii"))


# -- a table -----------------------------------------------------------------------------------------------------------


def _csv(entries: Iterable[Entry], file: IO[bytes]) -> None:
    """A table with a header, RFC 4180. A cell that could be a formula has an apostrophe in front."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    table = csv.writer(text, lineterminator="\r\n")
    try:
        table.writerow(COLUMNS)
        for entry in entries:
            table.writerow(map(cell, row(entry)))
    finally:
        text.detach()  # the file is not ours to close


def row(entry: Entry) -> list[Any]:
    """The values of a record by COLUMNS; None where it has none."""
    picked = (entry.body.get(name) for name in _FROM_BODY)
    return [
        *(entry.seq, entry.ts, entry.type, entry.cycle, entry.epoch, entry.actor.get("kind"), entry.actor.get("id")),
        *(None if value is None else value if isinstance(value, str) else canonical(value) for value in picked),
        *(canonical(dict(entry.body)), entry.policy, entry.id, entry.prev, entry.hash, entry.log),
    ]


def cell(value: Any) -> str:
    """A value for a spreadsheet: visible characters alone, and no formula.

    One apostrophe in front is ours wherever there is one: a text that begins with its own gets another.
    """
    if value is None:
        return ""
    text = str(value)
    start = text.lstrip()[:1] or text[:1]
    return ("'" if start and (start in _FORMULA or text[0] in f"{_FORMULA}'") else "") + printable(text)


def _parquet(entries: Iterable[Entry], file: IO[bytes]) -> None:
    """The same table in columns, with nothing in front of anything: no spreadsheet reads it as text."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        instead = "or choose csv, which has the same columns"
        raise UsageError(f"--to parquet needs pyarrow: pip install pyarrow; {instead}") from error
    numbers = {"seq", "cycle", "epoch"}
    schema = pyarrow.schema([(name, pyarrow.int64() if name in numbers else pyarrow.string()) for name in COLUMNS])
    with parquet.ParquetWriter(file, schema) as table:
        for batch in _batches(map(row, entries), _AT_ONCE * 20):
            columns = dict(zip(COLUMNS, zip(*batch, strict=True), strict=True))
            table.write_table(pyarrow.table(columns, schema=schema))


# -- events ------------------------------------------------------------------------------------------------------------


def _cloudevents(entries: Iterable[Entry], file: IO[bytes]) -> None:
    """A CloudEvents 1.0 batch: one JSON array, `application/cloudevents-batch+json`."""
    between = b"[\n"
    for entry in entries:
        file.write(between + canonical(_cloudevent(entry)).encode("ascii"))
        between = b",\n"
    file.write(b"\n]\n" if between == b",\n" else b"[]\n")


def _cloudevent(entry: Entry) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": printable(entry.id),
        # A URI reference: the run and the stream as a path, whatever characters they have.
        "source": f"/loopguard/{quote(entry.log)}",
        "type": f"loopguard.{entry.type}",
        "time": entry.ts,
        "datacontenttype": "application/json",
        # An extension that the specification lists: the order of events of one source.
        "sequence": f"{entry.seq:020d}",
        "data": fields_of(entry),
    }


def _otlp(entries: Iterable[Entry], file: IO[bytes]) -> None:
    """Logs of OpenTelemetry, as its file exporter writes them: lines of OTLP/JSON, so many records in each."""
    for batch in _batches(entries, _AT_ONCE):
        resource = {"attributes": _attributes({"service.name": "loopguard", "loopguard.log": batch[0].log})}
        scope = {"name": "loopguard.audit", "version": loopguard.__version__}
        logs = {"scope": scope, "logRecords": [_log_record(entry) for entry in batch]}
        line = {"resourceLogs": [{"resource": resource, "scopeLogs": [logs]}]}
        file.write(f"{json.dumps(line, separators=(',', ':'), ensure_ascii=True)}\n".encode("ascii"))


def _log_record(entry: Entry) -> dict[str, Any]:
    number, text = _severity(entry)
    known = {"seq": entry.seq, "cycle": entry.cycle, "epoch": entry.epoch, "hash": entry.hash, "prev": entry.prev}
    known |= {"id": entry.id, "policy": entry.policy, "actor.kind": entry.actor.get("kind")}
    known |= {"actor.id": entry.actor.get("id")}
    at = str(_nanoseconds(entry.ts))
    return {
        "timeUnixNano": at,
        "observedTimeUnixNano": at,
        "severityNumber": number,
        "severityText": text,
        "eventName": f"loopguard.{entry.type}",
        "body": _any_value(dict(entry.body)),
        "attributes": _attributes({f"loopguard.{name}": value for name, value in known.items() if value is not None}),
    }


def _severity(entry: Entry) -> tuple[int, str]:
    if entry.type in _SERIOUS:
        return _SERIOUS[entry.type]
    refused = entry.type == "tool.decided" and entry.body.get("result") != "allow"
    return (13, "WARN") if refused or entry.type.endswith(_WORTH_A_LOOK) else (9, "INFO")


def _nanoseconds(ts: str) -> int:
    """Since 1970; 0, which OTLP reads as unknown, for a time that is none."""
    try:
        return max(0, (datetime.fromisoformat(ts) - _EPOCH) // timedelta(microseconds=1) * 1000)
    except (ValueError, TypeError):
        return 0


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _any_value(value)} for key, value in values.items()]


def _any_value(value: Any) -> dict[str, Any]:
    """A JSON value as OTLP's AnyValue. Integers are text there, and null is a value without a kind."""
    match value:
        case None:
            return {}
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case dict():
            return {"kvlistValue": {"values": _attributes(value)}}
        case list():
            return {"arrayValue": {"values": [_any_value(item) for item in value]}}
        case _:
            return {"stringValue": str(value)}
