"""How well the default monitors find what goes wrong in a run, and how often they cry wolf, beside the rules of others.

    python benchmarks/detection.py --data DIR [--cross-validate] [--svg FILE]

DIR holds labelled traces: manifest.json, traces/, and tools/score.py and tools/peers.py, which are imported from there.
Prints the tables of docs/monitors.md. Settings are the defaults, one for all traces.

`score.py --detector` takes `detection:make` from here, and its `--cmd` takes detection_scan.sh.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from loopguard import monitors
from loopguard.monitors import drift, jump, variance
from loopguard.types import Expectation

GOOD = {"lower_is_better": "down", "higher_is_better": "up"}
PEERS = ["llmfoundry", "lightning", "olmo_skip", "megatron", "watchdog", "ewma_ratio", "zclip", "medmad", "cusum"]
PEERS += ["adwin", "pagehinkley", "kswin"]
STAIRCASES = "finetune"
FOLDS = 8


class Ours:
    """The default monitors of one metric, as the scorer calls a detector."""

    def __init__(self, meta: dict[str, Any], steps: list[int] | None = None, announced: tuple[Expectation, ...] = ()):
        self._watching = monitors.defaults(
            meta["metric"],
            good=GOOD.get(meta["direction"], "none"),
            min=meta["min"],
            max=meta["max"],
            problems=meta.get("problems"),
        )
        for monitor, expected in itertools.product(self._watching, announced):
            monitor.expect(expected)
        self._steps = iter(steps) if steps else itertools.count()
        self.signals: list[Any] = []

    def update(self, value: float) -> str | None:
        at, said = next(self._steps), None
        for monitor in self._watching:
            if signal := monitor.read(value, at=at):
                self.signals.append(signal)
                if signal.level == "trip":
                    for each in self._watching:
                        each.rebase()
                    return "freeze"
                said = "note"
        return said


def make(meta: dict[str, Any]) -> Ours:
    return Ours(meta)


# --- what a loop would have announced --------------------------------------------------------------------------------


def announced(traces: list[Any]) -> dict[str, tuple[Expectation, ...]]:
    """By trace id: epoch boundaries of the fine-tuning runs, and one learning rate change that several runs share.

    Both are computed from the clean traces. An injected trace is a piece of a clean one and gets its part.
    """
    clean = {t["id"]: (t, steps, values) for t, steps, values in traces if t["kind"] == "clean"}
    found = {key: _epochs(*run) for key, run in clean.items() if run[0]["family"] == STAIRCASES}
    found |= _shared_steps([run for run in clean.values() if run[0]["family"] == "algoperf"])
    return {t["id"]: found.get(t.get("base", t["id"]), ()) for t, _, _ in traces}


def _epochs(t: dict[str, Any], steps: list[int], values: list[float]) -> tuple[Expectation, ...]:
    """The largest number of equal epochs at the end of each of which the curve falls, if there is one."""
    n = len(values)
    for epochs in range(10, 1, -1):
        edges = [round(n * k / epochs) for k in range(1, epochs)]
        if edges[0] >= 24 and all(_rise(values, edge) < -2.0 for edge in edges):
            return tuple(_around(steps, edge, kind="epoch") for edge in edges)
    return ()


def _around(steps: list[int], row: int, *, kind: Any) -> Expectation:
    first, last = steps[max(0, row - 5)], steps[min(len(steps) - 1, row + 5)]
    return Expectation(kind=kind, at=first, span=last - first)


def _rise(values: list[float], row: int) -> float:
    """How far the level rises at a row, in noise units."""
    before, after = values[row - 24 : row], values[row : row + 12]
    level = statistics.median(before)
    noise = 1.4826 * statistics.median(abs(value - level) for value in before)
    return (statistics.median(after) - level) / max(noise, 1e-3 * abs(level), 1e-9)


# The length of a full run, in updates, that each workload of AlgoPerf is planned for.
PLANNED = {"librispeech_deepspeech": 48_000, "librispeech_conformer": 80_000, "wmt": 133_333}


def _shared_steps(runs: list[Any]) -> dict[str, tuple[Expectation, ...]]:
    """Where at least three runs of one submission rise at the same share of their planned length, that was planned."""
    found: dict[str, tuple[Expectation, ...]] = {}
    by_submission: dict[str, list[Any]] = {}
    for run in runs:
        if run[0]["metric"] == "loss" and _planned(run[0]):
            by_submission.setdefault(run[0]["group"], []).append(run)
    for group in by_submission.values():
        shares = [(_highest_rise(steps, values), t, steps) for t, steps, values in group]
        rising = [(step / _planned(t), t) for (rise, step), t, _ in shares if rise > 2.5]
        for share, _ in rising:
            if len([other for other, _ in rising if abs(other - share) < 0.01]) >= 3:
                for _, t, steps in shares:
                    row = next((i for i, step in enumerate(steps) if step >= share * _planned(t)), None)
                    if row is not None:
                        found[t["id"]] = (_around(steps, row, kind="lr"),)
                break
    return found


def _planned(t: dict[str, Any]) -> int:
    return next((length for name, length in PLANNED.items() if f"/{name}" in t["source"]["path"]), 0)


def _highest_rise(steps: list[int], values: list[float]) -> tuple[float, int]:
    return max((_rise(values, row), steps[row]) for row in range(100, len(values) - 12))


# --- scoring ---------------------------------------------------------------------------------------------------------


def load(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / "tools" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder}/tools/{name}.py: not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_all(score: ModuleType, traces: list[Any], factory: Any) -> dict[str, Any]:
    """By trace id, what a detector said of it."""
    return {t["id"]: score.run_inproc(lambda _, t=t, s=s: factory(t, s), {}, t, v) for t, s, v in traces}


def judge(score: ModuleType, traces: list[Any], said: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = score.score(traces, lambda t, _s, _v: said[t["id"]])
    rest = [trace for trace in traces if trace[0]["family"] != STAIRCASES]
    result["false_alarms_elsewhere"] = score.score(rest, lambda t, _s, _v: said[t["id"]])["false_alarms"]
    return result


def summary(name: str, result: dict[str, Any]) -> str:
    recall = result["macro_recall_injected"]
    low = min((v for k, v in result["recall"].items() if not k.startswith("natural")), default=0)
    wrong = max([*result["freeze_on_note_events"].values(), *result["alarm_on_quiet_events"].values()], default=0)
    rates = [recall, low, result["recall_natural"], wrong]
    cells = [name, result["false_alarms"], result["false_alarms_elsewhere"], *(f"{rate:.2f}" for rate in rates)]
    return " | ".join(map(str, ["", *cells, f"{result['median_delay_all']:.0f}", ""])).strip()


HEAD = (
    "| rule | false alarms | without fine-tuning | mean recall | worst kind | natural | wrong | median delay |\n"
    "|---|---|---|---|---|---|---|---|"
)


def compare(score: ModuleType, traces: list[Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Ours, ours with changes announced, and the rules of others as they are and with a check of the domain."""
    expected = announced(traces)
    results = {
        "LoopGuard": judge(score, traces, run_all(score, traces, lambda t, s: Ours(score.meta_of(t), s))),
        "LoopGuard, changes announced": judge(
            score, traces, run_all(score, traces, lambda t, s: Ours(score.meta_of(t), s, expected[t["id"]]))
        ),
    }
    peers = load(folder, "peers")
    for name, guard in itertools.product(PEERS, (False, True)):
        label = f"{name}, with a domain check" if guard else name
        rule = getattr(peers, name)
        try:
            said = run_all(score, traces, lambda t, _s, rule=rule, guard=guard: rule(score.meta_of(t), guard=guard))
        except ImportError as error:
            print(f"{label}: left out, {error}", file=sys.stderr)
            continue
        results[label] = judge(score, traces, said)
    return results


def print_kinds(plain: dict[str, Any], told: dict[str, Any]) -> None:
    print("\n| kind | recall | delay | recall, announced |\n|---|---|---|---|")
    for kind, recall in plain["recall"].items():
        delay = plain["median_delay"].get(kind, "-")
        print(f"| {kind} | {recall:.2f} | {delay:g} | {told['recall'][kind]:.2f} |")
    for kind, rate in {**plain["freeze_on_note_events"], **plain["alarm_on_quiet_events"]}.items():
        print(f"| {kind} (no freeze wanted) | {rate:.2f} | - | |")


def print_false_alarms(score: ModuleType, traces: list[Any]) -> None:
    """Each of ours, with what the monitor said."""
    expected = announced(traces)
    for label, changes in (("as they are", {}), ("changes announced", expected)):
        print(f"\nFalse alarms, {label}:")
        for t, steps, values in traces:
            if t["kind"] != "clean":
                continue
            ours = Ours(score.meta_of(t), steps, changes.get(t["id"], ()))
            for value in values:
                ours.update(value)
            for signal in ours.signals:
                row = steps.index(signal.at)
                if signal.level == "trip" and not any(first <= row <= last for first, last in t.get("ignore", ())):
                    print(f"  {t['id']} {t['family']} {t['group']}: {signal.reason}")


# --- cross-validation ------------------------------------------------------------------------------------------------

# The constants that say how much is enough. They are private, since nobody else should have to turn them.
GRID = [
    {"small": small, "large": large, "variance": noise, "drift": moves}
    for small, large, noise in itertools.product((21.0, 27.0, 35.0), (9.0, 13.0, 17.0), (30.0, 45.0, 60.0))
    for moves in ((3.0, 5.0) if noise == 45.0 else (5.0,))
]


def turn(setting: dict[str, float]) -> None:
    jump._SMALL["first"] = setting["small"]
    jump._LARGE["first"] = jump._LARGE["least"] = setting["large"]
    variance._CHART["first"] = setting["variance"]
    drift._MOVES = setting["drift"]


def cross_validate(score: ModuleType, traces: list[Any]) -> None:
    """Choose on the sources of seven folds of eight, count on the eighth.

    A missed event and a false alarm outside of the staircases cost the same.
    """
    groups = sorted({_source(t) for t, _, _ in traces})
    random.Random(0).shuffle(groups)
    fold_of = {group: i % FOLDS for i, group in enumerate(groups)}
    outcomes = []
    for setting in GRID:
        turn(setting)
        said = run_all(score, traces, lambda t, s: Ours(score.meta_of(t), s))
        outcomes.append([_outcome(score, trace, said) for trace in traces])
    folds = [fold_of[_source(t)] for t, _, _ in traces]
    kinds: dict[str, list[bool]] = {}
    alarms = elsewhere = 0
    chosen = []
    for fold in range(FOLDS):
        cost = [sum(o["cost"] for o, f in zip(each, folds, strict=True) if f != fold) for each in outcomes]
        best = cost.index(min(cost))
        chosen.append(best)
        for (t, _, _), outcome, its in zip(traces, outcomes[best], folds, strict=True):
            if its == fold:
                alarms += outcome["alarms"]
                elsewhere += outcome["alarms"] if t["family"] != STAIRCASES else 0
                for kind, hit in outcome["events"]:
                    kinds.setdefault(kind, []).append(hit)
    print(f"\n{len(groups)} sources in {FOLDS} folds, {len(GRID)} settings. Chosen: ", end="")
    print("; ".join(f"{GRID[i]} x{chosen.count(i)}" for i in dict.fromkeys(chosen)))
    print(f"Held out: {alarms} false alarms, {elsewhere} without fine-tuning.")
    print("| kind | events | held-out recall |\n|---|---|---|")
    for kind, hits in sorted(kinds.items()):
        print(f"| {kind} | {len(hits)} | {statistics.mean(hits):.2f} |")


def _source(t: dict[str, Any]) -> str:
    return str(t["group"])


def _outcome(score: ModuleType, trace: Any, said: dict[str, Any]) -> dict[str, Any]:
    t = trace[0]
    frozen = said[t["id"]][0]
    alarms = 0
    if t["kind"] == "clean":
        ignored = t.get("ignore", ())
        alarms = score.merged([i for i in frozen if not any(a <= i <= b for a, b in ignored)])
    events = [(e["type"], any(e["start"] <= i <= e["end"] for i in frozen), e["must"]) for e in t["events"]]
    wrong = sum(hit != (must == "freeze") for _, hit, must in events)
    counted = alarms if t["family"] != STAIRCASES else 0
    return {"alarms": alarms, "events": [(kind, hit) for kind, hit, _ in events], "cost": wrong + counted}


# --- what the calibration assumes ------------------------------------------------------------------------------------


def print_assumptions(score: ModuleType, traces: list[Any]) -> None:
    """False alarms where readings depend on each other: in noise that remembers, and in traces that were smoothed."""
    print("\n| noise | trips of a loss's monitors in 200,000 readings |\n|---|---|")
    for memory in (0.0, 0.3, 0.5, 0.7, 0.9):
        print(f"| each reading keeps {memory:.1f} of the last | {_trips_in_noise(memory)} |")
    print("\n| healthy traces | false alarms without fine-tuning |\n|---|---|")
    for width in (1, 2, 4, 10):
        print(f"| mean over the last {width} | {_alarms(score, traces, lambda v, w=width: _running_mean(v, w))} |")
    for width in (2, 4):
        print(f"| means of {width} | {_alarms(score, traces, lambda v, w=width: _running_mean(v, w)[w - 1 :: w])} |")


def _trips_in_noise(memory: float) -> int:
    noise, value, trips = random.Random(0), 0.0, 0
    watching = monitors.defaults("loss", good="down")
    for at in range(200_000):
        value = memory * value + noise.gauss(0, 0.1)
        for monitor in watching:
            if (signal := monitor.read(2.0 + value, at=at)) and signal.level == "trip":
                trips += 1
                for each in watching:
                    each.rebase()
                break
    return trips


def _running_mean(values: list[float], width: int) -> list[float]:
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _alarms(score: ModuleType, traces: list[Any], change: Any) -> int:
    chosen = [
        (t, v) for t, _, v in traces if t["kind"] == "clean" and t["family"] != STAIRCASES and not t.get("ignore")
    ]
    return sum(score.merged(score.run_inproc(make, {}, t, change(values))[0]) for t, values in chosen)


# --- cost, plot ------------------------------------------------------------------------------------------------------


def print_cost() -> None:
    """CPU time per value, in normal noise, of each monitor and of all that watch a loss. The best of five rounds."""
    noise = random.Random(0)
    values = [2.0 + noise.gauss(0, 0.05) for _ in range(20_000)]
    sets = {kind: [monitors.build(kind, metric="loss")] for kind in ("bounds", "jump", "variance", "drift")}
    sets["eprocess"] = [monitors.build("eprocess", metric="pass_at_1", problems=100)]
    sets["all of a loss"] = monitors.defaults("loss", good="down", min=0.0)
    print("\n| monitor | us per value |\n|---|---|")
    for name, watching in sets.items():
        shown = [round(abs(noise.gauss(0.6, 0.05)), 2) for _ in values] if name == "eprocess" else values
        print(f"| {name} | {min(_round(watching, shown) for _ in range(5)):.2f} |")


def _round(watching: list[Any], values: list[float]) -> float:
    start = time.process_time()
    for at, value in enumerate(values):
        for monitor in watching:
            monitor.read(value, at=at)
    return (time.process_time() - start) / len(values) * 1e6


def plot(results: dict[str, dict[str, Any]], file: Path) -> None:
    """False alarms per 10,000 updates across, mean recall up: the upper left corner is where one wants to be."""
    ticks = [0.1, 1, 10, 100, 1000]
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="12">',
        '<rect width="640" height="400" fill="white"/>',
        '<path d="M60 20V350H620" fill="none" stroke="#444"/>',
        '<text x="340" y="390" text-anchor="middle">false alarms per 10,000 healthy updates</text>',
        '<text transform="translate(16 185) rotate(-90)" text-anchor="middle">mean recall of injected faults</text>',
    ]
    lines += [f'<text x="{_x(v):.0f}" y="366" text-anchor="middle">{v:g}</text>' for v in ticks]
    lines += ['<text x="60" y="380" text-anchor="middle">or less</text>']
    lines += [f'<text x="52" y="{_y(v) + 4:.0f}" text-anchor="end">{v:g}</text>' for v in (0, 0.25, 0.5, 0.75, 1)]
    labels: list[tuple[float, float]] = []
    for name, result in results.items():
        x, y = _x(result["false_alarms_per_10k"]), _y(result["macro_recall_injected"])
        ours = name.startswith("LoopGuard")
        fill = "#c0392b" if ours else "#7f8c8d" if "check" in name else "#2c3e50"
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}"><title>{name}</title></circle>')
        if name == "LoopGuard" or not (ours or "check" in name):
            below = y + 4
            while any(abs(x - other) < 70 and abs(below - line) < 12 for other, line in labels):
                below -= 12
            labels.append((x, below))
            lines.append(f'<text x="{x + 8:.1f}" y="{below:.1f}" fill="{fill}">{name}</text>')
    file.write_text("\n".join([*lines, "</svg>"]) + "\n", encoding="utf-8")


def _x(rate: float) -> float:
    return 60 + 135 * (math.log10(max(rate, 0.1)) + 1)


def _y(recall: float) -> float:
    return 350 - 330 * recall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cross-validate", action="store_true")
    parser.add_argument("--svg", type=Path, help="write the plot there")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, ", end="")
    print(f"Python {platform.python_version()}")
    score = load(options.data, "score")
    traces = score.load(str(options.data))
    if options.cross_validate:
        cross_validate(score, traces)
        return
    results = compare(score, traces, options.data)
    print(HEAD)
    for name, result in results.items():
        print(summary(name, result))
    print_kinds(results["LoopGuard"], results["LoopGuard, changes announced"])
    print_false_alarms(score, traces)
    print_assumptions(score, traces)
    print_cost()
    if options.svg:
        plot(results, options.svg)


if __name__ == "__main__":
    main()
