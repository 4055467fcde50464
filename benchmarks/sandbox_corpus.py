"""What each kind of cell makes of each case of the corpus in `tests/sandbox/corpus.py`.

    python benchmarks/sandbox_corpus.py                       the table, in about two minutes
    python benchmarks/sandbox_corpus.py --kinds pooled,runsc  some kinds only

Prints the table of `docs/sandbox-corpus.md` as markdown. A kind whose runtime the engine does not have stays empty.
Exit code 1 where a claim did not hold that the corpus says holds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "sandbox")]

import corpus  # noqa: E402 - after its folder is known

from loopguard.errors import SandboxError  # noqa: E402


def play(kind: corpus.Kind) -> tuple[dict[str, str], list[str]]:
    """What every case came to in one kind of cell, and which did not hold although they should."""
    told: dict[str, str] = {}
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as folder, corpus.Stage(kind, Path(folder)) as stage:
        for case in corpus.played_in(kind):
            there = case.there(kind)
            try:
                told[case.name] = stage.play(case).split()[0]
                if there.why:
                    told[case.name] += " *"
            except AssertionError as error:
                told[case.name] = "**does not hold** *"
                if not there.broken:
                    broken.append(f"{kind.name} {case.name}: {str(error)[:300]}")
    for case in corpus.CASES:
        if case.there(kind).not_played:
            told[case.name] = "not played *"
    return told, broken


def engine() -> str:
    """What it ran on, in one line."""
    words = "Docker {{.ServerVersion}}, control groups {{.CgroupVersion}}, kernel {{.KernelVersion}}"
    return subprocess.run(
        ["docker", "info", "--format", words], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(kind.name for kind in corpus.KINDS))
    wanted = parser.parse_args().kinds.split(",")
    kinds = [kind for kind in corpus.KINDS if kind.name in wanted]
    columns: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for kind in kinds:
        print(f"{kind.name} ...", file=sys.stderr, flush=True)
        try:
            columns[kind.name], broken = play(kind)
        except SandboxError as error:
            print(f"{kind.name}: {error}", file=sys.stderr)
            columns[kind.name], broken = {}, []
        wrong += broken
    print(f"{engine()}\n")
    print(f"| row | case | claim | {' | '.join(columns)} |")
    print("|---" * (3 + len(columns)) + "|")
    for case in corpus.CASES:
        each = " | ".join(column.get(case.name, "") for column in columns.values())
        print(f"| {case.row} | `{case.name}` | {corpus.one_line(case.claim)} | {each} |")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
