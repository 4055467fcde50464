"""The freeze state: stopping is cheap, going on is dear, and nothing in between is lost."""

import json
import os
from dataclasses import replace

import pytest

from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.errors import AuditWriteError, LoopFrozen, UsageError
from loopguard.state import FreezeState, set_latch, standing, submit
from loopguard.types import Decision, Signal

DECISION = Decision(
    result="freeze",
    gate="update",
    rule="bounds:loss",
    reason="loss is nan",
    signals=(Signal(level="trip", monitor="bounds", metric="loss", value=float("nan"), at=7),),
)


def put(path, kind):
    """Something that is no file, of which reading would never end, or which is elsewhere."""
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "link":
            path.symlink_to(path.parent / "elsewhere")


class Run:
    """A run directory with a log; `open` is a start of its owner, `crash` an end without a goodbye."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        (path / "run.json").write_text(json.dumps({"id": "run-1", "policy": "0" * 64}))

    def open(self):
        self.log = AuditLog.open(self.path, run_id="run-1", policy="0" * 64)
        return FreezeState(self.path, self.log)

    def crash(self):
        self.log.close()

    def types(self):
        return [e.type for e in read.entries(self.path) if e.type in {"freeze.entered", "resume.applied"}]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    yield run
    run.crash()


def test_a_new_run_is_not_frozen(run):
    state = run.open()
    assert not state.frozen
    state.raise_if_frozen()
    assert not standing(run.path).frozen


def test_a_freeze_is_latched_before_it_is_logged(run, monkeypatch):
    state = run.open()
    seen = []
    append = run.log.append
    monkeypatch.setattr(
        run.log, "append", lambda *a, **k: seen.append((run.path / "latch").exists()) or append(*a, **k)
    )
    state.freeze(DECISION, cycle=2, facts={})
    assert seen == [True]


def test_a_freeze_survives_a_restart_by_the_latch_or_by_the_log_alone(run):
    run.open().freeze(DECISION, cycle=2, facts={})
    run.crash()
    (run.path / "latch").unlink()
    state = run.open()
    assert (state.frozen, state.freeze_id, state.reason) == (True, "f1", "loss is nan")
    with pytest.raises(LoopFrozen, match="f1"):
        state.raise_if_frozen()


def test_a_latch_whose_record_was_never_written_becomes_a_freeze_at_the_next_start(run):
    run.open()
    run.crash()
    set_latch(run.path, freeze="f1", reason="killed in between")
    assert not standing(run.path).acknowledged
    assert run.open().reason == "killed in between"
    assert run.types() == ["freeze.entered"]
    assert standing(run.path).acknowledged


def test_a_latch_says_no_more_than_a_record_holds(run):
    """Somebody may have written it by hand, and of a password that is taken out more is left than it was."""
    run.open()
    run.crash()
    (run.path / "latch").write_text(json.dumps({"freeze": "x", "reason": "://a:bb@" * 8000, "ts": ""}))
    assert run.open().frozen
    assert run.types() == ["freeze.entered"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_latch_that_is_no_file_freezes_all_the_same(run, kind):
    run.open()
    run.crash()
    put(run.path / "latch", kind)
    assert standing(run.path).reason == "the latch is set"
    assert run.open().frozen


def test_a_freeze_is_recorded_whatever_the_monitor_that_failed_had_to_say(run):
    state = run.open()
    token = "ghp_" + "a1B2c3D4e5F6g7H8i9J0"
    reason = f"{'x ' * 993}{token}{'x' * 300_000}"
    state.freeze(Decision(result="freeze", gate="update", rule="r", reason=reason), cycle=1, facts={})
    (entry,) = read.entries(run.path, types=("freeze.entered",))
    assert len(entry.body["reason"]) < 2100
    assert "ghp" not in entry.body["reason"]


def test_a_freeze_is_recorded_although_thousands_of_metrics_tripped(run):
    state = run.open()
    tripped = Signal(level="trip", monitor="jump", metric="m", value=0.5, at=7)
    signals = (*(replace(tripped, metric=f"m{n}") for n in range(3000)), replace(tripped, metric="odd", at_once=True))
    decision = Decision(result="freeze", gate="promotion", rule="panel", reason="3000 fell", signals=signals)
    state.freeze(decision, cycle=1, facts={"update": 7, "capsule": "freezes/f1", "capsule_trouble": "x" * 300_000})
    (entry,) = read.entries(run.path, types=("freeze.entered",))
    told = {name: entry.body[name] for name in ("reason", "update", "capsule")}
    assert told == {"reason": "3000 fell", "update": 7, "capsule": "freezes/f1"}
    assert "capsule_trouble" not in entry.body
    # What forbids a waiver is told first.
    assert [signal["metric"] for signal in entry.body["signals"][:3]] == ["odd", "m0", "m1"]
    assert state.frozen


def test_resume_is_logged_with_its_name_and_then_the_latch_goes(run):
    state = run.open()
    state.freeze(DECISION, cycle=2, facts={})
    assert state.resume(by="dana", reason="bad shard 17 removed") == "f1"
    assert not state.frozen
    assert not (run.path / "latch").exists()
    run.crash()
    assert not run.open().frozen


def test_a_resume_that_died_before_it_took_the_latch_away_is_finished(run):
    state = run.open()
    state.freeze(DECISION, cycle=2, facts={})
    latch = (run.path / "latch").read_bytes()
    state.resume(by="dana", reason="fixed")
    run.crash()
    (run.path / "latch").write_bytes(latch)
    assert not run.open().frozen
    assert not (run.path / "latch").exists()


def test_also_where_the_latch_was_set_from_outside(run):
    """It names the freeze that took it up; else this start would take it for another one, and lose the resume."""
    set_latch(run.path, freeze="requested", reason="dana asked for it")
    state = run.open()
    latch = (run.path / "latch").read_bytes()
    state.resume(by="dana", reason="fixed")
    run.crash()
    (run.path / "latch").write_bytes(latch)
    assert not run.open().frozen
    assert run.types() == ["freeze.entered", "resume.applied"]


def test_a_freeze_request_is_recorded_once_and_freezes_although_its_first_reader_died(run):
    submit(run.path, "freeze", by="dana", reason="looks wrong")
    next(run.open().requests())  # recorded, and then the process dies
    run.crash()
    state = run.open()
    state.take_requests()
    assert state.frozen
    assert [entry.type for entry in read.entries(run.path)].count("freeze.requested") == 1


def test_so_is_a_note(run):
    submit(run.path, "note", by="dana", reason="shard 17 was replaced")
    next(run.open().requests())
    run.crash()
    run.open().take_requests()
    assert [entry.type for entry in read.entries(run.path)].count("note.requested") == 1
    assert not list((run.path / "requests").glob("*.json"))


def test_each_freeze_has_a_number_of_its_own_and_a_higher_epoch(run):
    state = run.open()
    first = run.log.epoch
    state.freeze(DECISION, cycle=1, facts={})
    state.resume(by="dana", reason="x")
    run.crash()
    state = run.open()
    assert state.freeze(DECISION, cycle=2, facts={}) == "f2"
    assert run.log.epoch > first + 1


def test_a_second_trip_while_frozen_keeps_the_first_reason(run):
    state = run.open()
    state.freeze(DECISION, cycle=1, facts={})
    state.latch("something else")
    assert (state.freeze_id, state.reason) == ("f1", "loss is nan")


@pytest.mark.parametrize(
    "lie",
    [
        {"seq": 1, "hash": "0" * 64},
        {"seq": 10**6, "hash": "0" * 64},
        {"seq": None},
        {"seq": "last"},
        {"seq": float("inf")},
        {"seq": [1]},
    ],
)
def test_a_cache_that_contradicts_the_log_means_frozen(run, lie):
    run.open().remember(cycle=1)
    run.crash()
    cache = json.loads((run.path / "state.json").read_text())
    (run.path / "state.json").write_text(json.dumps(cache | lie))
    assert standing(run.path).frozen
    assert run.open().frozen


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_cache_that_cannot_be_read_means_frozen(run, content):
    run.open().remember(cycle=1)
    run.crash()
    (run.path / "state.json").write_text(content)
    assert standing(run.path).frozen


def test_a_log_that_takes_no_records_freezes_all_the_same(run, monkeypatch):
    state = run.open()

    def full(*_args, **_options):
        raise AuditWriteError("disk full")

    monkeypatch.setattr(run.log, "append", full)
    with pytest.raises(AuditWriteError):
        state.freeze(DECISION, cycle=1, facts={})
    assert state.frozen
    assert (run.path / "latch").exists()


class TestRequests:
    def test_are_recorded_handed_out_once_and_set_aside(self, run):
        submit(run.path, "note", by="dana", reason="looked at it")
        state = run.open()
        assert [(r.kind, r.by) for r in state.requests()] == [("note", "dana")]
        assert list(state.requests()) == []
        assert [e.body["reason"] for e in read.entries(run.path) if e.type == "note.requested"] == ["looked at it"]

    def test_come_in_the_order_they_were_made(self, run):
        for n in range(5):
            submit(run.path, "note", by="dana", reason=str(n))
        assert [r.reason for r in run.open().requests()] == ["0", "1", "2", "3", "4"]

    def test_garbage_is_set_aside_and_said(self, run):
        state = run.open()
        (run.path / "requests").mkdir()
        (run.path / "requests" / "x.json").write_text('{"kind": "launch"}')
        assert list(state.requests()) == []
        assert (run.path / "requests" / "done" / "x.json").exists()

    @pytest.mark.parametrize(
        "content",
        [
            "[" * 50_000,
            *('{"kind": "note", "by": "x", "reason": "' + text + '"}' for text in ("ä" * 40_000, "://:b@" * 10_900)),
        ],
        ids=["nested", "long", "secrets"],
    )
    def test_what_nobody_could_record_is_set_aside_and_said(self, run, content):
        """A hostile file must not keep a loop from its gates."""
        state = run.open()
        (run.path / "requests").mkdir()
        (run.path / "requests" / "x.json").write_text(content)
        assert list(state.requests()) == []
        assert not state.stirred()

    @pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link"])
    def test_what_is_no_file_is_set_aside_and_not_waited_for(self, run, kind):
        state = run.open()
        (run.path / "requests").mkdir()
        put(run.path / "requests" / "x.json", kind)
        assert list(state.requests()) == []
        assert not state.stirred()

    def test_the_largest_request_fits_into_a_record(self, run):
        state = run.open()
        submit(run.path, "note", by="dana", reason="ä" * 10_000)
        assert [r.reason for r in state.requests()] == ["ä" * 10_000]

    @pytest.mark.parametrize("kind", ["resume", "erase", "note"])
    def test_one_that_nobody_would_read_is_refused_to_whoever_makes_it(self, run, kind):
        run.open()
        with pytest.raises(UsageError, match=f"request to {kind} has .* bytes, and 65,536 are read"):
            submit(run.path, kind, by="dana", reason="x" * 70_000, commitments=["0" * 64])
        assert list((run.path / "requests").iterdir()) == []

    def test_a_freeze_is_never_refused_for_what_there_is_to_say(self, run):
        """No record holds so many characters beyond the basic plane, and a freeze without one would never end."""
        reason = "\U0001f600" * 40_000
        submit(run.path, "freeze", by="dana", reason=reason)
        set_latch(run.path, freeze="requested", reason=reason)
        state = run.open()
        state.take_requests()
        assert state.frozen
        submit(run.path, "resume", by="dana", reason="false alarm", freeze="f1")
        state.take_requests()
        assert not state.frozen

    def test_without_a_living_loop_they_are_settled_by_whoever_takes_the_lock(self, run):
        submit(run.path, "freeze", by="dana", reason="looks wrong")
        state = run.open()
        state.take_requests()
        assert state.reason == "dana asked for it: looks wrong"
        submit(run.path, "resume", by="dana", reason="false alarm", freeze="f9")
        state.take_requests()
        assert state.frozen, "that resume was meant for another freeze"
        submit(run.path, "resume", by="dana", reason="false alarm", freeze="f1")
        state.take_requests()
        assert not state.frozen


def test_standing_names_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="is not a run directory"):
        standing(tmp_path)


class TestGlance:
    """`status` answers from the cache and what was recorded since, and says what the whole log says."""

    @pytest.fixture
    def going(self, run):
        """A run that goes on, with a cache and records behind it, across segments."""
        (run.path / "audit").mkdir()
        run.log = AuditLog.open(run.path, run_id="run-1", policy="0" * 64, segment_bytes=3000)
        state = FreezeState(run.path, run.log)
        state.remember(cycle=4)
        for _ in range(20):
            run.log.append("note.added")
        return run, state

    def test_it_says_what_the_whole_log_says(self, going, monkeypatch):
        """Without reading it: no record before the cached one is looked at."""
        run, _ = going
        whole = standing(run.path)
        assert (whole.frozen, whole.cycle) == (False, 4)
        monkeypatch.setattr(read, "entries", None)
        assert standing(run.path, glance=True) == whole

    def test_a_freeze_that_the_cache_does_not_know_is_seen(self, going):
        run, _ = going
        run.log.append("freeze.entered", {"freeze": "f1", "reason": "loss is nan"})
        assert standing(run.path, glance=True) == standing(run.path)
        assert standing(run.path, glance=True).freeze == "f1"

    def test_a_latch_is_seen(self, going):
        run, _ = going
        set_latch(run.path, freeze="f1", reason="stop")
        assert standing(run.path, glance=True) == standing(run.path)

    def test_after_a_freeze_and_a_resume(self, going):
        run, state = going
        state.freeze(DECISION, cycle=1, facts={})
        assert standing(run.path, glance=True) == standing(run.path)
        state.resume(by="dana", reason="fine")
        assert standing(run.path, glance=True) == standing(run.path)
        assert not standing(run.path).frozen

    @pytest.mark.parametrize("lie", [{"seq": 1}, {"seq": 10**6}, {"hash": "0" * 64}, {"seq": "2"}, {"frozen": "no"}])
    def test_a_cache_that_lies_is_not_believed(self, going, lie):
        run, _ = going
        cache = json.loads((run.path / "state.json").read_text())
        (run.path / "state.json").write_text(json.dumps(cache | lie))
        assert standing(run.path, glance=True) == standing(run.path)

    def test_a_policy_that_was_loaded_since_says_how_many_approve(self, going):
        run, _ = going
        rule = {"approvals": 3, "people": {}, "requester_may_approve": False, "within_s": 60, "execute_within_s": 60}
        run.log.append("policy.loaded", {"name": "x", "digest": "0" * 64, "resume": rule})
        assert standing(run.path, glance=True).approvals_needed == standing(run.path).approvals_needed == 3

    def test_a_number_in_a_body_is_no_record(self, going):
        """The cached record is found by its own number, not by one that somebody wrote down."""
        run, _ = going
        cached = json.loads((run.path / "state.json").read_text())["seq"]
        run.log.append("note.added", {"a": 1, "seq": cached, "ts": ""})
        assert standing(run.path, glance=True) == standing(run.path)
