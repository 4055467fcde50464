"""What a record may hold in the clear, and what becomes of the rest."""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path

import pytest
from audit_stories import finished, open_log

from loopguard.audit import fields, read
from loopguard.audit.events import TYPES, canonical
from loopguard.audit.fields import BODIES, shown
from loopguard.audit.verify import verify

SECRET = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
DOCS = Path(__file__).parents[2] / "docs"
FORMAT = (DOCS / "audit-format.md").read_text(encoding="utf-8")
PAGE = (DOCS / "redaction.md").read_text(encoding="utf-8")

# What stands in the rows of the page between backticks and is no member: values, and members of members.
IN_ROWS = {
    "run.started": {"observe"},
    "policy.loaded": {"approvals", "people", "requester_may_approve", "within_s", "execute_within_s"}
    | {"endpoint", "kind", "to"},
    "tool.egress": {"permitted", "allowed", "refused", "failed"},
    "actor.synced": {"generation", "evaluation", "allow", "deny"},
    "run.halted": {"budget", "decision", "halt"},
    "resume.applied": {"none", "signed", "person", "key", "signature", "rollback", "discard", "accept", "nothing"},
    "notify.sent": {"webhook", "command"},
}


def rows(section):
    return re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE)


class TestThePage:
    def test_every_type_has_a_list_of_members(self):
        assert BODIES.keys() == TYPES.keys()

    def test_the_page_lists_the_members_that_a_record_may_have(self):
        section = FORMAT.partition("## Record types")[2].partition("\n## ")[0]
        told = {
            name: set(re.findall(r"`\[?([a-z][a-z0-9_]*)\]?`", body)) - IN_ROWS.get(name, set())
            for names, body in rows(section)
            for name in re.findall(r"`([\w.]+)`", names)
        }
        section = FORMAT.partition("## A pruned front")[2].partition("| member of `state`")[0]
        told["log.pruned"] = {name for names, _ in rows(section) for name in re.findall(r"`([a-z]+)`", names)}
        assert told == {name: set(members) for name, members in BODIES.items()}

    def test_the_page_says_what_is_searched_and_what_is_not(self):
        """Two tables: for each kind that strangers' words are in, the members of that kind."""
        section = PAGE.partition("## What is searched")[2].partition("\n## ")[0]
        kinds = "text|beginning of a payload|command line|key or signature|payload"
        listed = re.findall(rf"^\| ({kinds}) \| (.*?) \|", section, re.MULTILINE)
        told = {kind: set(re.findall(r"`([a-z_0-9]+)`", members)) for kind, members in listed}
        assert told == {
            "text": members_of(lambda kind: kind in TEXTS),
            "beginning of a payload": members_of(lambda kind: kind is fields.HEAD),
            "command line": members_of(lambda kind: isinstance(kind, fields.Words)),
            "key or signature": members_of(lambda kind: kind is fields.OPAQUE) | {"signature"},
            "payload": members_of(lambda kind: kind is fields.PAYLOAD),
        }


TEXTS = [fields.TEXT, fields.BODIES["freeze.entered"]["capsule_lacks"], fields.BODIES["freeze.entered"]["next"]]
TEXTS += [fields.BODIES["model.attached"][name] for name in ("parameters", "devices")]
TEXTS += [fields.BODIES["resume.applied"]["statement"], fields.BODIES["sandbox.created"]["counters"]]
TEXTS += [fields.BODIES["log.opened"]["versions"]]


def members_of(wanted):
    return {name for members in BODIES.values() for name, kind in members.items() if wanted(kind)}


class TestTheAllowList:
    def test_a_member_that_is_not_listed_is_never_written_as_it_is(self, tmp_path):
        surprise = {"prompt": ["my address is", 12, "Elm Street"]}
        with open_log(tmp_path / "run") as log:
            entry = log.append("note.added", {"by": "dana", "text": "x", "conversation": surprise})
        text = canonical(surprise)
        assert entry.body["conversation"] == {
            "bytes": len(text),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        assert entry.redacted == ("/body/conversation",)
        assert b"Elm" not in read.segments(tmp_path / "run")[0].read_bytes()
        assert verify(tmp_path / "run").code == 20

    @pytest.mark.parametrize(
        ("name", "body", "where"),
        [
            ("tool.finished", {"exit_code": {"a": "Elm Street"}}, "/body/exit_code"),
            ("tool.finished", {"call": ["Elm Street"]}, "/body/call"),
            ("tool.decided", {"code_head": {"a": "Elm Street"}}, "/body/code_head"),
            ("tool.decided", {"code": {"bytes": 3, "commitment": "0" * 64, "text": "Elm Street"}}, "/body/code"),
            ("tool.decided", {"files": [{"name": "x", "text": "Elm Street"}]}, "/body/files/0/text"),
            ("update.applied", {"readings": {"loss": [0.5, {"a": "Elm Street"}]}}, "/body/readings/loss/1"),
            ("freeze.entered", {"signals": [{"reason": ["Elm Street"]}]}, "/body/signals/0/reason"),
            ("approval.given", {"signature": {"a": "Elm Street"}}, "/body/signature"),
            ("run.started", {"command": ["a", {"b": "Elm Street"}]}, "/body/command/1"),
        ],
    )
    def test_neither_is_a_shape_that_does_not_belong_there(self, name, body, where):
        told, redacted = shown(name, body)
        assert "Elm Street" not in canonical(told)
        assert redacted == [where]

    def test_a_member_whose_name_is_a_secret_loses_its_name_too(self):
        told, redacted = shown("note.added", {"by": "dana", SECRET: 1, f"{SECRET}x": 2})
        assert SECRET not in canonical(told)
        assert list(told) == ["by", "withheld 1", "withheld 2"]
        assert redacted == ["/body/withheld 1", "/body/withheld 2"]

    def test_a_pointer_leads_to_its_place_whatever_the_names_are(self):
        _, redacted = shown("eval.finished", {"panel": {"a/b~c": [SECRET]}})
        assert redacted == ["/body/panel/a~1b~0c"]

    def test_what_the_caller_passed_in_never_changes(self, tmp_path):
        command = ["tool", "--password", "hunter2", SECRET]
        body = {"command": command, "versions": {"a": SECRET}, "secret stuff": {"deep": [SECRET]}}
        before = copy.deepcopy(body)
        with open_log(tmp_path / "run") as log:
            entry = log.append("run.started", body)
        assert body == before
        assert body["command"] is command
        assert SECRET not in canonical(dict(entry.body))

    def test_numbers_that_json_holds_as_text_are_numbers(self):
        body = {"readings": {"loss": ["NaN", "-Infinity", 0.5, None]}, "from": 1, "to": "9007199254740993"}
        assert shown("update.applied", body) == (body, [])

    def test_a_whole_run_is_recorded_without_anything_withheld(self, tmp_path):
        finished(tmp_path / "run", cycles=1, updates=16, calls=8)
        assert {entry.redacted for entry in read.entries(tmp_path / "run")} == {()}


class TestSecrets:
    @pytest.mark.parametrize(
        ("name", "body", "where"),
        [
            ("note.added", {"text": f"use {SECRET} for it"}, ["/body/text"]),
            ("tool.decided", {"code_head": f"k = '{SECRET}'"}, ["/body/code_head"]),
            ("tool.decided", {"call": SECRET}, ["/body/call"]),
            ("tool.decided", {"tool": SECRET, "rule": SECRET}, ["/body/tool", "/body/rule"]),
            ("tool.decided", {"files": [{"name": f"{SECRET}.txt", "bytes": 1}]}, ["/body/files/0/name"]),
            ("data.quarantined", {"records": ["r1", SECRET, "r2"]}, ["/body/records/1"]),
            ("promotion.applied", {"actor": SECRET}, ["/body/actor"]),
            ("freeze.entered", {"signals": [{"reason": SECRET}]}, ["/body/signals/0/reason"]),
            ("freeze.entered", {"capsule_lacks": {"tape": SECRET}}, ["/body/capsule_lacks/tape"]),
            ("sandbox.created", {"counters": {"a": [{"b": SECRET}]}}, ["/body/counters/a/0/b"]),
            ("sandbox.created", {"counters": {"password": "x1"}}, ["/body/counters/password"]),
            ("eval.finished", {"panel": {SECRET: 0.5}}, ["/body/panel"]),
            ("run.started", {"command": ["a", "--token", "b", SECRET]}, ["/body/command/2", "/body/command/3"]),
            ("anchor.kept", {"where": "https://bob:tiger@host/x"}, ["/body/where"]),
            ("update.applied", {"readings": {"loss": [SECRET]}}, ["/body/readings/loss/0"]),
        ],
    )
    def test_one_in_any_member_is_replaced_and_its_place_is_told(self, name, body, where):
        told, redacted = shown(name, body)
        assert SECRET not in canonical(told)
        assert redacted == where

    def test_one_in_the_name_of_a_person_is_replaced(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            entry = log.append("note.added", {"by": SECRET}, actor={"kind": "person", "id": SECRET})
        assert entry.redacted == ("/body/by", "/actor/id")
        assert SECRET.encode() not in read.segments(tmp_path / "run")[0].read_bytes()

    def test_the_mirror_and_the_last_record_of_a_full_disk_have_it_no_more(self, tmp_path):
        told = []
        with open_log(tmp_path / "run", mirror=told.append) as log:
            log.append("note.added", {"text": SECRET})
            log.append_last("freeze.entered", {"reason": SECRET})
        assert SECRET not in canonical([dict(entry.body) for entry in told])
        assert SECRET.encode() not in b"".join(path.read_bytes() for path in read.segments(tmp_path / "run"))

    @pytest.mark.parametrize("again", [1, 2])
    def test_a_short_text_is_found_each_time(self, again):
        """What is remembered as harmless is remembered by its text, not by its member."""
        for _ in range(again):
            assert shown("note.added", {"text": "password=hunter2"})[1] == ["/body/text"]
            assert shown("tool.lost", {"call": "password=hunter2"})[1] == ["/body/call"]

    def test_keys_and_signatures_are_never_touched(self):
        """A signature over something else than what stands there would count for nothing."""
        body = {"key": SECRET, "signature": SECRET}
        assert shown("approval.given", body) == (body, [])
