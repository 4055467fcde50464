"""A run that is killed anywhere, or whose machine loses power there, is what its log says once it is started again.

`killed_lives.py` forks a life for each part of a story, and ends 200 runs by SIGKILL: at every kind of call that
changes the run directory, and anywhere; before it, after it, in the middle; with all that was not synced lost, or some
of it. What mends the run is killed too. What each life did to weights, and was told, is written outside of the run, and
`killed_oracle.py` compares. A case alone: what a failure prints.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from killed_edges import KILLS
from killed_oracle import CLAIMS, Log, judge

LIVES = Path(__file__).with_name("killed_lives.py")
CASES = 200
PROCESSES = 2
TIMEOUT_S = 1200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the file of a descriptor in /proc"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """In memory where that can be: a kill loses nothing that a disk would keep."""
    folder = tmp_path_factory.mktemp("killed")
    if not os.access("/dev/shm", os.W_OK):
        yield folder
        return
    memory = Path("/dev/shm") / f"loopguard-killed-{os.getpid()}"
    memory.mkdir()
    yield memory
    shutil.rmtree(memory)


@pytest.fixture(scope="module")
def ran(home):
    """What the story is where nobody kills, and what became of each case."""
    share = CASES // PROCESSES
    running = [_start(home, first, share) for first in range(0, CASES, share)]
    for process in running:
        assert process.wait(TIMEOUT_S) == 0, "it said above why"
    found = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(home.glob("*.jsonl"))]
    return found[0][0], [case for _, *cases in found for case in cases]


def _start(home, first, count):
    command = [sys.executable, LIVES, home / str(first), "--cases", str(first), str(first + count)]
    with (home / f"{first}.jsonl").open("wb") as told:
        return subprocess.Popen(command, stdout=told)


@pytest.fixture(scope="module")
def base(ran, home):
    """The log of the story and what was told of it, to change."""
    log = Log(home / "0" / "base" / "root" / "run" / "audit" / "controller")
    return log, json.loads((home / "0" / "told.json").read_text())


@pytest.mark.parametrize("claim", CLAIMS)
def test_never(ran, claim):
    story, cases = ran
    broken = [(case, said) for case in (story, *cases) for kind, said in case["wrong"] if kind == claim]
    told = "".join(f"\n{said}\n    after {case.get('deaths')}\n    {_again(case)}" for case, said in broken[:5])
    assert not broken, f"{CLAIMS[claim]}, {len(broken)} times:{told}"


def _again(case):
    """How to have one case again, with what is left of it."""
    number = case.get("case", -1)
    return f"python {LIVES} FOLDER --keep --cases {max(number, 0)} {number + 1}"


def test_each_kind_of_edge_was_met_and_each_way_to_end_there(ran):
    story, cases = ran
    deaths = [death for case in cases for death in case["deaths"]]
    assert len(cases) == CASES
    assert sum(not case["deaths"] for case in cases) < 4  # threads share a sync or do not: an edge more or less
    assert {death["at"] for death in deaths} >= set(story["kinds"])
    assert min(Counter(death["how"] for death in deaths)[how] for how in KILLS) > 20
    assert sum(len(case["deaths"]) > 1 for case in cases) > 50


def test_the_story_has_what_a_run_can_go_through(ran):
    story, _ = ran
    assert set(story["types"]) >= {
        *("update.leased", "update.applied", "update.withheld", "promotion.applied", "snapshot.written"),
        *("freeze.requested", "freeze.entered", "resume.requested", "resume.applied", "note.requested"),
        *("approval.given", "approval.refused", "policy.adopted", "promotion.rolled_back", "anchor.kept"),
        *("data.quarantined", "snapshot.restored", "run.finished"),
    }
    for edge in ("latch", "promoted.json", "seg-#.jsonl", "capsule.json", "requests/#.json", "anchors.jsonl", "#.note"):
        assert any(kind.endswith(edge) for kind in story["kinds"])
    assert not story["wrong"]


class TestWhoeverJudges:
    """A run that was never killed is judged to be sound, and one with a record more or less is not."""

    def without(self, log, *types, of=slice(None)):
        gone = [record["seq"] for record in log.of(*types)][of]
        changed = Log.__new__(Log)
        changed.records = [record for record in log.records if record["seq"] not in gone]
        return changed

    def claims(self, log, told):
        return {claim for claim, _ in judge(log, told)}

    def test_finds_nothing_where_nothing_was_killed(self, base):
        assert self.claims(*base) == set()

    @pytest.mark.parametrize(
        ("types", "of", "claim"),
        [
            (("update.leased",), slice(0, 1), "lease"),
            (("update.applied",), slice(-1, None), "recorded"),
            (("resume.applied",), slice(0, 1), "frozen"),
            (("freeze.requested",), slice(0, 1), "request"),
            (("approval.given",), slice(0, 1), "request"),
        ],
    )
    def test_misses_a_record(self, base, types, of, claim):
        log, told = base
        changed = self.without(log, *types, of=of)
        # Numbers of records are places in the log: what was on disk at a time is counted anew.
        moved = [line | {"durable": sum(r["seq"] <= line["durable"] for r in changed.records)} for line in told]
        assert claim in self.claims(changed, moved)

    def test_sees_an_update_before_its_lease_was_on_disk(self, base):
        log, told = base
        first = next(line for line in told if line["what"] == "step")
        lease = log.of("update.leased")[0]["seq"]
        early = [line | {"durable": lease - 1} if line is first else line for line in told]
        assert self.claims(log, early) == {"lease"}

    def test_sees_a_freeze_that_nobody_caused(self, base):
        log, told = base
        assert "uncalled" in self.claims(log, [line for line in told if line.get("why") != "a gain"])

    def test_sees_a_start_that_has_forgotten_a_freeze(self, base):
        log, told = base
        stop = next(place for place, line in enumerate(told) if line["what"] == "frozen")
        start = next(line for line in told if line["what"] == "open")
        forgotten = start | {"durable": told[stop]["durable"], "frozen": False}
        assert "forgotten" in self.claims(log, [*told[: stop + 1], forgotten, *told[stop + 1 :]])

    def test_sees_approvals_that_nobody_gave(self, base):
        log, told = base
        assert "consent" in self.claims(log, [line for line in told if line["what"] != "signs"])

    def test_sees_a_number_that_was_used_twice(self, base):
        log, told = base
        step = next(line for line in told if line["what"] == "step")
        place = told.index(step)
        assert self.claims(log, [*told[:place], step, *told[place:]]) == {"numbered"}

    def test_sees_a_lease_that_nobody_settled(self, base):
        log, told = base
        changed = self.without(log, "update.applied", "cycle.finished", "run.finished")
        assert "settled" in self.claims(changed, told)
