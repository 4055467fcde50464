"""The bytes of a record: made by hand for speed, and the same as the format document says."""

from __future__ import annotations

import enum
import hashlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopguard.audit.events import LOOP, BadLineError, canonical, decode, encode, plain, printable
from loopguard.errors import AuditError

TEXTS = st.text(st.characters()) | st.sampled_from(["\ud800", "a\udfff", "\x7f", '","hash":"', "\\ud800", "\U0001f600"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**53, -(2**53), 2**53 - 1, -0.0, 1e16, 1e-5, 5e-324])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
CALMLY = settings(deadline=None, derandomize=True)
BODIES = st.dictionaries(TEXTS, VALUES, max_size=5)


class Loud(str):
    """Text with an idea of its own of what it is."""

    def __str__(self) -> str:
        return self.upper()


class Colour(enum.IntEnum):
    RED = 3


def by_the_book(value: object) -> object:
    """What the format document makes of a value, without any code of ours."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**53:
        return str(value)
    if isinstance(value, list):
        return [by_the_book(item) for item in value]
    if isinstance(value, dict):
        return {by_the_book(key): by_the_book(item) for key, item in value.items()}
    return value


def line_by_the_book(fields: dict) -> bytes:
    def dumped(value: object) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    unhashed = dumped({name: value for name, value in fields.items() if name != "hash"})
    digest = hashlib.sha256(b"loopguard-record-v1\n" + unhashed.encode("ascii")).hexdigest()
    return dumped({**fields, "hash": digest}).encode("ascii") + b"\n"


def record(**changed: object) -> dict:
    return {
        "actor": {"kind": "person", "id": "dana"},
        "body": {},
        "boot": "b",
        "cause": [],
        "cycle": None,
        "epoch": 0,
        "id": "019438a0-0000-7000-8000-000000000000",
        "log": "run-a/controller",
        "mono_ns": 1500,
        "policy": "",
        "prev": "0" * 64,
        "redacted": [],
        "seq": 1,
        "ts": "2030-01-01T00:00:00.000000Z",
        "type": "note.added",
        "v": 1,
        **changed,
    }


class TestBytes:
    @CALMLY
    @given(BODIES)
    def test_a_body_is_what_the_format_makes_of_it(self, body):
        assert plain(body) == by_the_book(body)
        assert canonical(plain(body)) == json.dumps(by_the_book(body), sort_keys=True, separators=(",", ":"))

    @CALMLY
    @given(
        body=BODIES,
        log=TEXTS,
        who=TEXTS,
        boot=TEXTS,
        cause=st.lists(TEXTS, max_size=3),
        redacted=st.lists(TEXTS, max_size=3),
        cycle=st.none() | st.integers(0, 2**53),
    )
    def test_a_line_is_the_one_of_the_format_document(self, body, log, who, boot, cause, redacted, cycle):
        actor = LOOP if who == "" else plain({"kind": "person", "id": who})
        fields = record(body=plain(body), log=log, boot=boot, cause=cause, redacted=redacted, cycle=cycle, actor=actor)
        line, digest = encode(fields)
        assert line == line_by_the_book(fields)
        entry = decode(line[:-1])
        assert (entry.hash, entry.body, entry.cycle, entry.log) == (digest, fields["body"], cycle, log)
        assert (entry.actor, entry.cause, entry.redacted) == (fields["actor"], tuple(cause), tuple(redacted))

    def test_a_copy_is_nothing_that_the_caller_can_change(self):
        body = {"list": [1], "map": {"a": 1}}
        copy = plain(body)
        body["list"].append(2)
        body["map"]["b"] = 2
        assert copy == {"list": [1], "map": {"a": 1}}

    @pytest.mark.parametrize(("value", "text"), [(Loud("a"), '"A"'), (Colour.RED, "3"), (True, "true"), ((1,), "[1]")])
    def test_what_only_resembles_a_json_value_becomes_one(self, value, text):
        assert canonical(plain({"a": value})) == f'{{"a":{text}}}'
        assert canonical(plain({"a": [value]})) == f'{{"a":[{text}]}}'

    @pytest.mark.parametrize("body", [{1: "a"}, {"a": {None: 1}}, {"a": b"x"}, {"a": [{1}]}, {"a": object()}])
    def test_what_is_no_json_value_is_refused_with_its_place(self, body):
        with pytest.raises(AuditError, match="^body"):
            plain(body)


class TestForgedLines:
    """Each with a hash over it that is right."""

    @pytest.mark.parametrize("member", [b', "hash":"xyz"', b', "hash":"' + b"a" * 64 + b'"', b', "hash":7'])
    def test_a_second_hash_behind_the_own_one_is_no_record(self, member):
        """To a reader of JSON the last of two members counts, and that is not the hash of the line."""
        line = encode(record())[0][:-1]
        at = line.rfind(b',"hash":"')
        front, back = line[:at], line[at + 74 : -1] + member + b"}"
        digest = hashlib.sha256(b"loopguard-record-v1\n" + front + back).hexdigest().encode()
        with pytest.raises(BadLineError):
            decode(front + b',"hash":"' + digest + b'"' + back)

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"v": 2}, "is of format 2"),
            ({"v": True}, "wrong type"),
            ({"v": 1.0}, "wrong type"),
            ({"seq": True}, "wrong type"),
            ({"seq": 1.0}, "wrong type"),
            ({"epoch": None}, "wrong type"),
            ({"cycle": 1.5}, "wrong type"),
            ({"cycle": False}, "wrong type"),
            ({"body": []}, "wrong type"),
            ({"actor": "dana"}, "wrong type"),
            ({"cause": {}}, "wrong type"),
            ({"redacted": None}, "wrong type"),
            ({"ts": 5}, "wrong type"),
            ({"more": 1}, "unknown: more"),
        ],
    )
    def test_a_field_of_another_type_is_no_record(self, changed, why):
        with pytest.raises(BadLineError, match=why):
            decode(line_by_the_book(record(**changed))[:-1])

    @pytest.mark.parametrize("name", sorted(record()))
    def test_a_field_that_is_missing_is_no_record(self, name):
        fields = record()
        del fields[name]
        with pytest.raises(BadLineError, match="missing|no version|no hash"):
            decode(line_by_the_book(fields)[:-1])


class TestPrintable:
    @pytest.mark.parametrize(
        "code",
        [
            *(0x00, 0x1B, 0x7F, 0x9B, 0xAD, 0x34F, 0x115F, 0x1160, 0x17B4, 0x180B, 0x200B, 0x202E, 0x2066, 0x2800),
            *(0x3164, 0xFE00, 0xFE0F, 0xFEFF, 0xFFA0, 0xE0001, 0xE0020, 0xE0100, 0xE01EF),
        ],
    )
    def test_what_nobody_sees_or_what_moves_the_cursor_is_an_escape(self, code):
        """Else a text says more than is shown, and two names look the same."""
        escape = f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
        assert printable(f"da{chr(code)}na") == f"da{escape}na"

    def test_what_people_write_stays(self):
        text = "Zoë 李雷 मोहित \U0001f600 =<&>'"
        assert printable(text) == text
