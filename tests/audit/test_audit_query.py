"""What the log tells: cycles, freezes, and why."""

from __future__ import annotations

import io
import json
import os
import shlex
import textwrap

import pytest
from audit_stories import HOSTILE, Loop, finished, frozen_twice, open_log, plain_log
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loopguard.audit import query, read
from loopguard.audit.events import TYPES
from loopguard.audit.mirror import Mirror
from loopguard.audit.report import render
from loopguard.audit.stats import stats
from loopguard.audit.tail import Tail
from loopguard.audit.verify import verify
from loopguard.cli.audit import app
from loopguard.errors import AuditTamperedError, UsageError


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("query") / "runs" / "calc"
    frozen_twice(run_dir, updates=48, calls=12)
    return run_dir


class TestWhy:
    def test_explains_the_last_freeze_where_none_is_named(self, story):
        """A dozen lines: what, value, range, what was undone, which actor stays, and the commands to go on."""
        lines = query.why(story).splitlines()
        assert lines[0] == "freeze f2, in cycle 6, at 2030-01-01 09:32:03 UTC"
        assert lines[1].startswith("tripped   promotion gate, rule panel.correct: correct rose by 0.4")
        assert lines[2].startswith("value     correct 0.93")
        assert lines[4].startswith("weights   updates 289-336 were undone, weights are back at snapshot ")
        assert lines[5].startswith("actor     that of cycle 5 stays (weights ")
        assert lines[-1] == f"go on     loopguard resume {story} --by NAME --reason TEXT"
        assert 8 <= len(lines) <= 12

    @pytest.mark.parametrize("freeze", ["f1", "f2"])
    def test_fits_on_a_screen(self, story, freeze):
        """80 columns and 24 rows, the wrapped ones counted."""
        rows = [textwrap.wrap(line, 80) for line in query.why(story, freeze).splitlines()]
        assert sum(map(len, rows)) <= 22

    def test_a_reason_of_many_pages_is_cut_and_says_so(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("freeze.entered", {"freeze": "f1", "gate": "data", "rule": "x", "reason": "y" * 100_000})
        lines = query.why(tmp_path / "run").splitlines()
        assert max(map(len, lines)) < 400
        assert lines[1].endswith("y... (cut; the log has all of it)")

    def test_says_what_it_goes_back_to_and_who_may_resume(self, story):
        text = query.why(story)
        assert "goes back a resume goes on from what was promoted in cycle 5; cycle 6 begins again" in text
        assert "who       anybody with a name and a reason; nothing resumes by itself" in text
        assert "value     correct 0.9352, expected 0.1 to 0.7352, 0.2 too high" in text

    def test_names_the_people_who_have_to_sign(self, tmp_path):
        """Where a guard policy asks for approvals, one name and a reason are not enough, and `why` says so."""
        rule = {"approvals": 2, "people": {name: [] for name in ("eli", "dana", "fay")}, "within_s": 60.0}
        rule |= {"requester_may_approve": False, "execute_within_s": 60.0}
        with open_log(tmp_path / "run") as log:
            log.append("policy.loaded", {"name": "two", "digest": log.policy, "resume": rule})
            log.append("freeze.entered", {"freeze": "f1", "gate": "data", "rule": "x", "reason": "y"})
        text = query.why(tmp_path / "run")
        assert "who       2 of dana, eli, fay have to sign; whoever asks does not count" in text
        assert text.endswith(f"--reason TEXT, then loopguard approve {tmp_path}/run --key FILE")
        assert query.why_facts(tmp_path / "run")["resume"] == {
            "approvals": 2,
            "people": ["dana", "eli", "fay"],
            "pending": None,
        }

    def test_a_capsule_of_a_forged_log_is_one_word_of_a_command(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("freeze.entered", {"freeze": "f1", "capsule": "f1; rm -rf ~"})
        (line,) = [line for line in query.why(tmp_path / "run").splitlines() if line.startswith("replay")]
        assert shlex.split(line)[3] == f"{tmp_path}/run/f1; rm -rf ~"

    def test_a_latch_that_nobody_recorded_is_pointed_at(self, tmp_path):
        finished(tmp_path / "run", cycles=1)
        (tmp_path / "run" / "latch").write_text("{}")
        with pytest.raises(UsageError, match="is latched, and no process has recorded the freeze yet"):
            query.why(tmp_path / "run")

    @pytest.mark.parametrize(
        ("signal", "text"),
        [
            ({"value": 3.0, "low": 0.0, "high": 2.5}, "0.5 too high"),
            ({"value": -1.0, "low": 0.0, "high": None}, "1 too low"),
            ({"value": 1.0, "low": 0.0, "high": 2.5}, ""),
            ({"value": "NaN", "low": 0.0, "high": 2.5}, ""),
            ({"value": "Infinity", "low": None, "high": 2.5}, ""),
        ],
    )
    def test_a_margin_is_told_where_it_is_a_number(self, signal, text):
        assert query.margin_told(signal) == text

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


class TestStats:
    def test_counts_calls_data_updates_promotions_and_freezes(self, story):
        """The same numbers as the cycles, over the whole run."""
        facts, told = stats(story).facts(), query.cycles(story)
        assert facts["calls"]["decided"] == sum(cycle.calls for cycle in told) == 96
        assert facts["calls"]["refused"] == sum(cycle.refused for cycle in told)
        assert facts["calls"]["contained"] == sum(cycle.contained for cycle in told)
        assert facts["data"] == {"admitted": 38 * 8, "quarantined": {"overlaps an evaluation text": 24}}
        assert facts["updates"]["applied"] == sum(cycle.updates for cycle in told)
        assert facts["promotions"] == {"asked": 7, "applied": 6, "rolled_back": 0}
        assert facts["records"] == sum(kind["count"] for kind in facts["types"].values()) == read.last(story).seq

    def test_time_frozen_is_from_a_freeze_to_its_resume_or_the_last_record(self, tmp_path):
        loop = Loop(tmp_path / "run")
        for _ in range(2):
            loop.log.append("freeze.entered", {"freeze": "f1"})
            loop.tick(600)
            loop.log.append("resume.applied", {"freeze": "f1", "by": "dana", "reason": "fine"})
            loop.tick(300)
        loop.log.append("freeze.entered", {"freeze": "f3"})
        loop.tick(40)
        loop.log.append("note.added", {"by": "dana", "text": "still looking"})
        loop.log.close()
        told = stats(tmp_path / "run")
        assert (told.freezes, told.resumes, told.stood_still_s) == (3, 2, 1240.0)
        assert told.frozen_since is not None
        assert told.per_hour(3) == pytest.approx(3 * 3600 / told.span_s)

    def test_a_run_of_one_record_has_no_rate(self, tmp_path):
        open_log(tmp_path / "run").close()
        told = stats(tmp_path / "run")
        assert told.per_hour(1) is None
        assert told.facts()["types"]["log.opened"] == {"count": 1, "per_hour": None}


class TestTail:
    def test_gives_the_newest_records_across_segments(self, tmp_path):
        plain_log(tmp_path / "run", notes=60, segment_bytes=8_000)
        assert len(read.segments(tmp_path / "run")) > 3
        everything = [entry.seq for entry in read.entries(tmp_path / "run")]
        for count in (0, 1, 7, 40, 1000):
            assert [entry.seq for entry in Tail(tmp_path / "run").newest(count)] == (
                everything[-count:] if count else []
            )

    def test_reads_no_more_segments_than_it_takes(self, tmp_path):
        """Of a log of a month, the newest lines come at once: an old segment is not even opened."""
        plain_log(tmp_path / "run", notes=60, segment_bytes=8_000)
        read.segments(tmp_path / "run")[0].write_bytes(b"not a record\n")
        assert len(Tail(tmp_path / "run").newest(5)) == 5

    def test_follows_a_living_writer_into_its_next_segment_and_repeats_nothing(self, tmp_path):
        with open_log(tmp_path / "run", segment_bytes=3_000) as log:
            tail = Tail(tmp_path / "run")
            seen = [entry.seq for entry in tail.newest(10)]
            rounds = iter(range(6))

            def write(_seconds):
                """What the other process does while this one sleeps."""
                if next(rounds, None) is None:
                    raise KeyboardInterrupt
                for _ in range(3):
                    log.append("note.added", {"by": "dana", "text": "x" * 200})

            with pytest.raises(KeyboardInterrupt):
                for entry in tail.follow(sleep=write):
                    seen.append(entry.seq)
            assert len(read.segments(tmp_path / "run")) > 2
            assert seen == list(range(1, log.head.seq + 1))

    def test_a_line_that_is_being_written_waits_for_the_next_look(self, tmp_path):
        plain_log(tmp_path / "run", notes=2)
        path = read.segments(tmp_path / "run")[0]
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        tail = Tail(tmp_path / "run")
        assert [entry.seq for entry in tail.newest(9)] == [1, 2]

        follow = tail.follow(sleep=lambda _: path.write_bytes(whole) and None)
        assert next(follow).seq == 3

    def test_an_altered_record_ends_it(self, tmp_path):
        plain_log(tmp_path / "run", notes=3)
        path = read.segments(tmp_path / "run")[0]
        path.write_bytes(path.read_bytes().replace(b"note 1", b"note 7"))
        with pytest.raises(AuditTamperedError, match=r"seg-000000000001.jsonl at byte \d+: the record was altered"):
            Tail(tmp_path / "run").newest(9)


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
    assert json.dumps(query.why_facts(run_dir))
    assert json.dumps(stats(run_dir).facts())
    assert verify(run_dir).code in {20, 30, 40, 41}
    assert render(run_dir)
    for command in ("show", "cycle", "freezes", "tail", "stats"):
        assert CliRunner().invoke(app, [command, str(run_dir)], catch_exceptions=False).exit_code == 0
