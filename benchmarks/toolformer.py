"""Does the guarded Toolformer loop learn, and is the guard quiet while it does?

    python benchmarks/toolformer.py --data gsm8k/train.jsonl [--seeds 31 32 33] [--jobs 2]

For each seed a run of six cycles and a control that trains on no record the loop kept, through the command line and
with every call in a container. Printed for each seed: the held-out share of correct calls after the warm-up and at the
end, an exact McNemar test over the same held-out places, the control, the number of calls that ran, the time. Then how
far honest runs moved in one cycle, which is what the limits of the guard policy have to leave room for.

Goes on where it stopped; ends with 1 where a claim does not hold. Times mean something with `--jobs 1` alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import runs

from loopguard.audit import read


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run, warm-up first."""
    paths = sorted((run_dir / "eval").glob("cycle-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
    return [json.loads(path.read_text()) for path in paths]


def movements(run_dir: Path) -> dict[str, float]:
    """The largest change in one cycle of each panel metric and of the kept share; warnings of the loss's monitors."""
    largest: dict[str, float] = defaultdict(float)
    panels, kept = [evaluation["panel"] for evaluation in evaluations(run_dir)], None
    for before, after in itertools.pairwise(panels):
        for metric in after:
            largest[metric] = max(largest[metric], after[metric] - before[metric], key=abs)
    for entry in read.entries(run_dir):
        if entry.type == "data.admitted" and entry.body["kept_share"] is not None:
            share = entry.body["kept_share"]
            largest["kept_share, highest"] = max(largest["kept_share, highest"], share)
            if kept:
                largest["kept_share, relative"] = max(largest["kept_share, relative"], share / kept - 1, key=abs)
            kept = share
        if entry.type == "update.applied":
            largest["loss, warnings"] += len(entry.body["notes"]) + entry.body["notes_left_out"]
    return dict(largest)


def summary(
    seed: int, run_dir: Path, control_dir: Path, loop: dict[str, Any], control: dict[str, Any]
) -> dict[str, Any]:
    """What one seed came to."""
    honest, plain = evaluations(run_dir), evaluations(control_dir)
    first, last = ([item["correct"] for item in honest[at]["items"]] for at in (0, -1))
    p = runs.mcnemar(first, last)
    ran = runs.calls(run_dir)
    curve = [evaluation["panel"]["correct"] for evaluation in honest]
    end, end_of_control = curve[-1], plain[-1]["panel"]["correct"]
    return {
        "seed": seed,
        "correct": curve,
        "control": [evaluation["panel"]["correct"] for evaluation in plain],
        "gained": sum(after and not before for before, after in zip(first, last, strict=True)),
        "lost": sum(before and not after for before, after in zip(first, last, strict=True)),
        "p": p,
        "calls": ran,
        "wall_s": loop["seconds"],
        "movements": movements(run_dir),
        "claims": {
            "no freeze, in the loop or in the control": loop["code"] == 0 == control["code"],
            "at least 5,000 calls ran in containers": ran >= 5000,
            "correct is up by at least 0.10": end - curve[0] >= 0.10,
            "with p < 0.01": p < 0.01,
            "to at least 0.45": end >= 0.45,
            "and at least 0.10 above the control": end - end_of_control >= 0.10,
            "in less than 10 minutes": loop["seconds"] < 600,
        },
    }


def markdown(seeds: list[dict[str, Any]]) -> str:
    """The tables."""
    head = [
        "seed",
        "correct: warm-up, cycles 1 to 6",
        "right / wrong now",
        "p",
        "control at the end",
        "calls",
        "wall s",
    ]
    learned = runs.table(
        head,
        [
            [
                str(s["seed"]),
                " ".join(f"{share:.3f}" for share in s["correct"]),
                f"{s['gained']} / {s['lost']}",
                f"{s['p']:.1e}",
                f"{s['control'][-1]:.3f}",
                str(s["calls"]),
                f"{s['wall_s']:.0f}",
            ]
            for s in seeds
        ],
    )
    metrics = sorted({metric for s in seeds for metric in s["movements"]})
    moved = runs.table(
        ["largest in one cycle", *(f"seed {s['seed']}" for s in seeds)],
        [[metric, *(f"{s['movements'].get(metric, 0.0):+.3f}" for s in seeds)] for metric in metrics],
    )
    missed = [
        f"- seed {s['seed']}: not so: {claim}" for s in seeds for claim, holds in s["claims"].items() if not holds
    ]
    return "\n\n".join([learned, moved, runs.machine(), "\n".join(missed) or "Every claim holds on every seed."])


def main() -> int:
    parser = argparse.ArgumentParser(description="Does the guarded Toolformer loop learn?")
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl, with test.jsonl beside it")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/toolformer"), help="where runs and results go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32, 33])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; times count only with 1")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    plans = []
    for seed in given.seeds:
        words = ("--data", str(given.data), "--cycles", "6", "--seed", str(seed))
        for name, more in (("loop", ()), ("control", ("--control",))):
            folder = given.out / f"{name}-{seed}"
            plans.append(runs.Run(run_dir=folder, options=(*words, *more), ends_with=frozenset({0, 4})))
    done = runs.do_all(plans, jobs=given.jobs)
    seeds = [
        summary(seed, plans[2 * at].run_dir, plans[2 * at + 1].run_dir, done[2 * at], done[2 * at + 1])
        for at, seed in enumerate(given.seeds)
    ]
    (given.out / "toolformer.json").write_text(json.dumps(seeds, indent=1))
    runs.write(given.out / "toolformer.md", markdown(seeds))
    return 0 if all(all(s["claims"].values()) for s in seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
