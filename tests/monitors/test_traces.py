"""What is claimed of the default monitors on labelled traces of real runs, where the traces are at hand."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from loopguard import monitors

ROOT = Path(__file__).parents[2]
TRACES = Path(os.environ.get("LOOPGUARD_TRACES", ROOT.parent / "shared" / "detection-traces"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # the scorer leaves a file open
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.skipif(
        not (TRACES / "manifest.json").exists(),
        reason=f"no labelled traces at {TRACES}; LOOPGUARD_TRACES says where they are",
    ),
]


def detector(meta):
    """The default monitors, as the scorer calls a detector; they start over after a trip."""
    good = {"lower_is_better": "down", "higher_is_better": "up"}[meta["direction"]]
    known = {key: meta.get(key) for key in ("min", "max", "problems")}
    watching = monitors.defaults(meta["metric"], good=good, **known)
    rows = iter(range(10**9))

    class Detector:
        @staticmethod
        def update(value):
            at, said = next(rows), None
            for monitor in watching:
                signal = monitor.read(value, at=at)
                if signal and signal.level == "trip":
                    for each in watching:
                        each.rebase()
                    return "freeze"
                said = "note" if signal else said
            return said

    return Detector


@pytest.fixture(scope="module")
def scorer():
    spec = importlib.util.spec_from_file_location("score", TRACES / "tools" / "score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(scorer):
    traces = scorer.load(str(TRACES))
    return scorer.score(traces, lambda t, _, values: scorer.run_inproc(detector, {}, t, values))


@pytest.mark.parametrize("kind", ["nan", "inf", "negative_loss"])
def test_what_is_impossible_is_found_at_once(result, kind):
    assert result["recall"][kind] == 1.0
    assert result["median_delay"][kind] == 0


@pytest.mark.parametrize(
    "kind",
    [
        "shift_bad_8s",
        "shift_bad_16s",
        "shift_good_8s",
        "shift_good_16s",
        "leak_30",
        "leak_60",
        "collapse",
        "spike_burst",
        "pass1_drop",
    ],
)
def test_what_is_large_is_found(result, kind):
    assert result["recall"][kind] >= 0.95


@pytest.mark.parametrize("kind", ["shift_bad_4s", "slow_drift", "variance_blowup"])
def test_what_is_small_or_slow_is_mostly_found(result, kind):
    assert result["recall"][kind] >= 0.90


def test_shifts_are_found_within_five_updates(result):
    assert all(result["median_delay"][kind] <= 5 for kind in ("shift_bad_8s", "shift_bad_16s", "shift_good_8s"))


def test_outliers_and_knees_freeze_nothing(result):
    assert set(result["freeze_on_note_events"].values()) | set(result["alarm_on_quiet_events"].values()) == {0}


def test_false_alarms_are_as_few_as_the_docs_say(result):
    """Seven and two at the ends of epochs: docs/monitors.md says what they are."""
    assert result["false_alarms"] <= 9
