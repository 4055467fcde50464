"""Exports: every record in every format, and none of them a weapon."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import sys

import pytest
from audit_stories import HOSTILE, frozen_twice, open_log, plain_log
from typer.testing import CliRunner

from loopguard.audit import read
from loopguard.audit.events import fields_of
from loopguard.audit.export import COLUMNS, FORMATS, cell, export
from loopguard.cli.audit import app
from loopguard.errors import AuditTamperedError, UsageError

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "\uff1d1", "'=1"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("export") / "calc"
    frozen_twice(run_dir, updates=16, calls=6)
    return run_dir


@pytest.fixture
def hostile(tmp_path):
    """A run in which every text is an attack on whoever opens an export of it."""
    with open_log(tmp_path / "run") as log:
        for text in [HOSTILE, *FORMULAS]:
            actor = {"kind": "person", "id": text}
            body = {"by": text, "reason": text, "freeze": text, "statement": {text: [text, {text: None}]}}
            log.append("resume.requested", body, actor=actor)
    return tmp_path / "run"


def exported(run_dir, to, tmp_path) -> bytes:
    out = tmp_path / f"out.{to}"
    assert export(run_dir, to=to, out=out) == read.last(run_dir).seq
    return out.read_bytes()


class TestEveryFormat:
    @pytest.mark.parametrize("to", ["jsonl", "csv", "cloudevents", "otlp"])
    def test_the_same_log_gives_the_same_bytes_in_a_file_and_on_standard_output(self, story, to, tmp_path):
        first = exported(story, to, tmp_path)
        assert exported(story, to, tmp_path) == first
        result = CliRunner().invoke(app, ["export", str(story), "--to", to], catch_exceptions=False)
        assert result.stdout_bytes == first

    @pytest.mark.parametrize("to", ["jsonl", "csv", "cloudevents", "otlp"])
    def test_no_text_of_strangers_can_move_a_cursor(self, hostile, to, tmp_path):
        """`cat` of an export is harmless: no control character but the ends of lines, no bidirectional one."""
        text = exported(hostile, to, tmp_path).decode()
        assert "u001b[31m" in text
        assert text.replace("\n", "").replace("\r", "").isprintable()

    @pytest.mark.parametrize("to", FORMATS)
    def test_an_altered_record_leaves_no_file(self, to, tmp_path):
        """Half an export that looks like a whole one would be believed."""
        if to == "parquet":
            pytest.importorskip("pyarrow")
        plain_log(tmp_path / "run", notes=30)
        path = read.segments(tmp_path / "run")[0]
        path.write_bytes(path.read_bytes().replace(b"note 20", b"note 21"))
        with pytest.raises(AuditTamperedError):
            export(tmp_path / "run", to=to, out=tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def test_an_unknown_format_names_those_that_there_are(self, story):
        with pytest.raises(UsageError, match="--to 'xml' is no format; expected one of jsonl, csv, cloudevents, otlp"):
            export(story, to="xml")

    def test_nothing_is_written_into_the_evidence(self, story):
        before = sorted(story.rglob("*"))
        segment = read.segments(story)[0]
        for out in (story / "records.csv", segment):
            with pytest.raises(UsageError, match="lies in the run directory .*, which is evidence"):
                export(story, to="csv", out=out)
        assert sorted(story.rglob("*")) == before

    def test_a_place_that_is_not_there_is_a_usage_error(self, story, tmp_path):
        with pytest.raises(UsageError, match="there is no folder"):
            export(story, to="csv", out=tmp_path / "none" / "records.csv")

    def test_a_folder_without_a_log_is_one_too(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match="holds no audit log"):
            export(tmp_path / "empty", to="jsonl", out=tmp_path / "out")


class TestJsonl:
    def test_is_the_log_byte_for_byte(self, story, tmp_path):
        whole = b"".join(path.read_bytes() for path in read.segments(story))
        assert exported(story, "jsonl", tmp_path) == whole


class TestCsv:
    def rows(self, run_dir, tmp_path):
        text = exported(run_dir, "csv", tmp_path).decode()
        return list(csv.DictReader(io.StringIO(text, newline="")))

    def test_has_a_row_for_each_record_with_its_body_and_its_hash(self, story, tmp_path):
        rows = self.rows(story, tmp_path)
        for row, entry in zip(rows, read.entries(story), strict=True):
            assert tuple(row) == COLUMNS
            assert (row["seq"], row["type"], row["hash"]) == (str(entry.seq), entry.type, entry.hash)
            assert json.loads(row["body"]) == entry.body
        freeze = next(row for row in rows if row["type"] == "freeze.entered")
        assert (freeze["freeze"], freeze["gate"], freeze["rule"]) == ("f1", "update", "jump(loss)")

    def test_no_cell_is_a_formula(self, hostile, tmp_path):
        """Also not behind blanks, and not with the wide signs that some spreadsheets read as the narrow ones."""
        cells = [text for row in self.rows(hostile, tmp_path) for text in row.values()]
        assert sum(text.startswith("'") for text in cells) >= 3 * len(FORMULAS)
        assert not [text for text in cells if re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", text)]

    @pytest.mark.parametrize("text", FORMULAS)
    def test_one_apostrophe_in_front_is_ours(self, text):
        """Taking it off gives the text again, with its control characters spelt out."""
        assert cell(text).startswith("'")
        assert cell(text)[1:] == text.replace("\t", "\\t").replace("\r", "\\r").replace("\n", "\\n")

    @pytest.mark.parametrize(("value", "text"), [(None, ""), (3, "3"), (-3, "'-3"), ("", ""), ("f1", "f1"), (" ", " ")])
    def test_other_values_stay_as_they_are(self, value, text):
        assert cell(value) == text


class TestCloudEvents:
    def test_is_a_batch_with_the_attributes_that_the_specification_asks_for(self, story, tmp_path):
        events = json.loads(exported(story, "cloudevents", tmp_path))
        for event, entry in zip(events, read.entries(story), strict=True):
            assert event["specversion"] == "1.0"
            assert event["source"] == "/loopguard/run-a/controller"
            assert event["type"] == f"loopguard.{entry.type}"
            assert event["data"] == json.loads(json.dumps(fields_of(entry)))
            assert all(re.fullmatch("[a-z0-9]{1,20}", name) for name in event)
        assert len({(event["source"], event["id"]) for event in events}) == len(events)
        assert [event["sequence"] for event in events] == sorted(event["sequence"] for event in events)

    def test_a_run_id_of_strangers_stays_a_uri(self, tmp_path):
        open_log(tmp_path / "run", run_id=f"a b/{HOSTILE}").close()
        (event,) = json.loads(exported(tmp_path / "run", "cloudevents", tmp_path))
        assert re.fullmatch(r"[A-Za-z0-9/%._~-]+", event["source"])


class TestOtlp:
    def records(self, run_dir, tmp_path):
        lines = exported(run_dir, "otlp", tmp_path).decode().splitlines()
        return [
            record
            for line in lines
            for resource in json.loads(line)["resourceLogs"]
            for scope in resource["scopeLogs"]
            for record in scope["logRecords"]
        ]

    def test_is_lines_of_logs_data_with_a_record_for_each_of_the_log(self, story, tmp_path):
        records = self.records(story, tmp_path)
        for record, entry in zip(records, read.entries(story), strict=True):
            assert record["eventName"] == f"loopguard.{entry.type}"
            assert re.fullmatch(r"\d{19}", record["timeUnixNano"])
            known = {item["key"]: item["value"] for item in record["attributes"]}
            assert known["loopguard.hash"] == {"stringValue": entry.hash}
            assert known["loopguard.seq"] == {"intValue": str(entry.seq)}
        assert records[0]["timeUnixNano"] == "1893488400000000000"  # 2030-01-01 09:00 UTC

    def test_a_freeze_is_an_error_and_a_refusal_a_warning(self, story, tmp_path):
        told = {(record["eventName"], record["severityText"]) for record in self.records(story, tmp_path)}
        assert {("loopguard.freeze.entered", "ERROR"), ("loopguard.update.withheld", "WARN")} <= told
        assert ("loopguard.update.applied", "INFO") in told

    def test_every_kind_of_value_keeps_its_kind(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            facts = {"a": None, "b": True, "c": 3, "d": 0.5, "e": "x", "f": [1, "y"], "g": {}}
            log.append("sandbox.created", {"counters": facts})
        (body,) = self.records(tmp_path / "run", tmp_path)[-1]["body"]["kvlistValue"]["values"]
        assert {item["key"]: item["value"] for item in body["value"]["kvlistValue"]["values"]} == {
            "a": {},
            "b": {"boolValue": True},
            "c": {"intValue": "3"},
            "d": {"doubleValue": 0.5},
            "e": {"stringValue": "x"},
            "f": {"arrayValue": {"values": [{"intValue": "1"}, {"stringValue": "y"}]}},
            "g": {"kvlistValue": {"values": []}},
        }

    def test_a_long_log_is_many_lines(self, tmp_path):
        plain_log(tmp_path / "run", notes=1200)
        assert len(exported(tmp_path / "run", "otlp", tmp_path).splitlines()) == 3


class TestParquet:
    def test_without_pyarrow_a_sentence_says_what_to_install(self, story, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UsageError, match=r"--to parquet needs pyarrow: pip install pyarrow; or choose csv"):
            export(story, to="parquet", out=tmp_path / "out.parquet")
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
    def test_has_the_columns_of_the_table_with_numbers_as_numbers(self, story, tmp_path):
        from pyarrow import parquet

        exported(story, "parquet", tmp_path)
        table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
        assert [row["hash"] for row in table] == [entry.hash for entry in read.entries(story)]
        assert [row["cycle"] for row in table] == [entry.cycle for entry in read.entries(story)]
        assert tuple(table[0]) == COLUMNS
