"""What the log tells: cycles, freezes, and why."""

from __future__ import annotations

import io
import json
import os

import pytest
from audit_stories import HOSTILE, Loop, finished, frozen_twice, open_log
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loopguard.audit import query, read
from loopguard.audit.events import TYPES
from loopguard.audit.mirror import Mirror
from loopguard.audit.report import render
from loopguard.audit.verify import verify
from loopguard.cli.audit import app
from loopguard.errors import UsageError


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("query") / "runs" / "calc"
    frozen_twice(run_dir, updates=48, calls=12)
    return run_dir


class TestWhy:
    def test_explains_the_last_freeze_where_none_is_named(self, story):
        """Ten lines: what, value, range, what was undone, which actor stays, and the commands to go on."""
        lines = query.why(story).splitlines()
        assert lines[0] == "freeze f2, in cycle 6, at 2030-01-01 09:32:03 UTC"
        assert lines[1].startswith("tripped   promotion gate, rule panel.correct: correct rose by 0.4")
        assert lines[2].startswith("value     correct 0.93")
        assert lines[4].startswith("weights   updates 289-336 were undone, weights are back at snapshot ")
        assert lines[5].startswith("actor     that of cycle 5 stays (weights ")
        assert lines[-1] == f"go on     loopguard resume {story} --by NAME --reason TEXT"
        assert 8 <= len(lines) <= 12

    def test_says_since_when_and_what_was_withheld(self, story):
        text = query.why(story, "f1")
        assert "since     update 273 looks wrong first; update 278 tripped" in text
        assert "weights   update 278 was withheld, updates 241-277 were undone" in text
        assert "value     loss 0.0041, expected 1.2 to 2.03 (score 11.3)" in text

    def test_a_freeze_that_is_over_names_the_person_and_no_command(self, story):
        text = query.why(story, "f1")
        assert "resumed   by dana after 32 min: labels were shifted; fixed in 3f1c (rollback)" in text
        assert "loopguard resume" not in text

    def test_an_unknown_freeze_names_those_that_exist(self, story):
        with pytest.raises(UsageError, match=r"has no freeze 'f7'; it has f1, f2"):
            query.why(story, "f7")

    def test_a_run_that_never_froze_says_so(self, tmp_path):
        finished(tmp_path / "run", cycles=1)
        with pytest.raises(UsageError, match="has never frozen"):
            query.why(tmp_path / "run")

    def test_a_bare_freeze_is_explained_too(self, tmp_path):
        """What a freeze does not say is left out, not invented."""
        with open_log(tmp_path / "my run") as log:
            log.append(
                "freeze.entered", {"freeze": "f1", "gate": "operator", "rule": "request", "reason": "dana asked"}
            )
        lines = query.why(tmp_path / "my run").splitlines()
        assert lines[1] == "tripped   operator gate, rule request: dana asked"
        assert lines[2] == "weights   no update was stopped or undone: weights are as they were"
        assert lines[-1] == f"go on     loopguard resume '{tmp_path / 'my run'}' --by NAME --reason TEXT"

    @pytest.mark.parametrize(
        ("low", "high", "text"),
        [(1, 2.5, "1 to 2.5"), (0.0, None, "at least 0"), (None, 3.0, "at most 3"), (None, None, "a finite number")],
    )
    def test_open_ranges_read_well(self, low, high, text):
        assert query.expected({"low": low, "high": high}) == text

    def test_text_of_strangers_cannot_move_the_cursor(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("freeze.entered", {"freeze": "f1", "gate": "data", "rule": "x", "reason": HOSTILE})
        text = query.why(tmp_path / "run")
        assert "\\u001b[31m\\u202e\\u2066" in text
        assert text.replace("\n", "").isprintable()


class TestCycles:
    def test_counts_each_pass_by_itself(self, story):
        """A cycle that was frozen and started again has two rows."""
        told = query.cycles(story)
        assert [(cycle.number, cycle.attempt, cycle.result) for cycle in told] == [
            *((number, 1, "promoted") for number in range(5)),
            *((5, 1, "frozen"), (5, 2, "promoted"), (6, 1, "frozen")),
        ]
        assert [cycle.updates for cycle in told] == [48] * 5 + [37, 48, 48]
        assert {cycle.calls for cycle in told} == {12}
        assert told[0].quarantined == {"overlaps an evaluation text": 3}
        assert (told[5].withheld, told[5].first_update, told[5].last_update) == (1, 241, 277)
        assert told[0].refused + sum(told[0].outcomes.values()) == 12

    def test_facts_are_json_values(self, story):
        facts = query.cycles(story)[0].facts()
        assert facts["quarantined"] == {"overlaps an evaluation text": 3}
        assert facts["panel"]["refused"] == 0.03

    @pytest.mark.parametrize(
        ("last", "state"), [("run.finished", "finished"), ("run.interrupted", "interrupted"), ("note.added", "running")]
    )
    def test_the_state_is_what_the_end_says(self, tmp_path, last, state):
        with open_log(tmp_path / "run") as log:
            log.append("run.started", {})
            log.append(last, {})
        assert query.story(tmp_path / "run").state == state

    def test_a_frozen_run_is_frozen_whatever_came_after(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("freeze.entered", {"freeze": "f1"})
            log.append("run.interrupted", {})
        assert query.story(tmp_path / "run").state == "frozen"

    @pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (600, "10 min"), (10800, "3.0 h")])
    def test_durations_read_well(self, tmp_path, seconds, text):
        loop = Loop(tmp_path / "run")
        first = loop.log.append("note.added").ts
        loop.tick(seconds)
        assert query.duration(first, loop.log.append("note.added").ts) == text
        loop.log.close()


class TestMirror:
    def lines(self, run_dir):
        out = io.StringIO()
        mirror = Mirror(out)
        for entry in read.entries(run_dir):
            mirror(entry)
        return out.getvalue().splitlines()

    def test_shows_what_a_person_may_act_on_and_no_tool_calls(self, story):
        """Key=value lines for freezes, promotions, quarantines and resumes."""
        lines = self.lines(story)
        events = {word.removeprefix("event=") for line in lines for word in line.split() if word.startswith("event=")}
        assert {"freeze.entered", "resume.applied", "promotion.applied", "data.quarantined"} <= events
        assert not any(event.startswith(("tool.", "update.leased", "update.applied")) for event in events)
        freeze = next(line for line in lines if "event=freeze.entered" in line)
        assert freeze.startswith(
            "ts=2030-01-01T09:00:17Z level=error event=freeze.entered cycle=5 freeze=f1 gate=update"
        )
        assert 'expected="1.2 to 2.03"' in freeze

    def test_is_safe_for_a_terminal(self, tmp_path):
        """Hostile text stays on its line, in its reading direction, in its length."""
        with open_log(tmp_path / "run") as log:
            log.append("freeze.entered", {"freeze": "f1", "reason": f"{HOSTILE}\nlevel=info event=fine {'x' * 900}"})
            log.append("eval.finished", {"panel": {"a b=c\n": 1.0}})
            log.append("sandbox.removed", {"cell": "c1", "reason": "dirty"})
            log.append("sandbox.removed", {"cell": "c1", "reason": "recycled"})
        lines = self.lines(tmp_path / "run")
        assert len(lines) == 3
        assert all(line.isprintable() and len(line) < 400 for line in lines)
        assert "panel.a_b_c_=1" in lines[1]

    def test_a_stream_that_is_gone_does_not_stop_the_loop(self, tmp_path):
        """The view may be lost; the evidence is written all the same."""
        out = io.StringIO()
        with open_log(tmp_path / "run", mirror=Mirror(out)) as log:
            out.close()
            log.append("freeze.entered", {"freeze": "f1"})
            log.append("resume.applied", {"freeze": "f1", "by": "dana", "reason": "fine"})
        assert len(list(read.entries(tmp_path / "run"))) == 3

    def test_says_nothing_of_a_routine_promotion_decision(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("promotion.decided", {"result": "allow"})
            log.append("promotion.decided", {"result": "freeze", "rule": "panel", "reason": "too good"})
        assert len(self.lines(tmp_path / "run")) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        *("freeze", "signals", "metric", "value", "low", "high", "since", "update", "restored", "next", "by", "reason"),
        *(
            "from",
            "to",
            "readings",
            "loss",
            "panel",
            "call",
            "result",
            "status",
            "count",
            "admitted",
            "kept",
            "code_head",
        ),
        *("command", "name", "capsule", "snapshot", "gate", "rule", "torn_bytes", "file", "cell", "own_share"),
    ]
)
SIGNALS = st.lists(st.dictionaries(KEYS, VALUES, max_size=6) | VALUES, max_size=2)
BODIES = st.dictionaries(KEYS, VALUES | SIGNALS | st.dictionaries(KEYS, VALUES | st.lists(VALUES)), max_size=8)


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.generate],  # shrinking such large cases takes longer than reading the first one
)
@given(records=st.lists(st.tuples(st.sampled_from(sorted(TYPES)), BODIES, st.none() | st.integers(-3, 9)), max_size=12))
def test_no_body_however_odd_breaks_a_reader(records, tmp_path_factory):
    """A forged or future body is counted as nothing; it never stops an auditor with a traceback."""
    run_dir = tmp_path_factory.mktemp("odd") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda fd: None)  # these logs need not outlive the machine
        with open_log(run_dir, mirror=Mirror(io.StringIO()), reserve_mib=0) as log:
            log.append("freeze.entered", {})
            for kind, body, cycle in records:
                log.append(kind, body, cycle=cycle)
    assert query.why(run_dir)
    assert json.dumps([told.facts() for told in query.cycles(run_dir)])
    assert json.dumps([freeze.facts() for freeze in query.freezes(run_dir)])
    assert verify(run_dir).code in {20, 30, 40}
    assert render(run_dir)
    for command in ("show", "cycle", "freezes"):
        assert CliRunner().invoke(app, [command, str(run_dir)], catch_exceptions=False).exit_code == 0
