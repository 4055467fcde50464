"""Kill a guarded run at seeded edges, start it again, and judge what is left. One line of JSON for each case.

    python tests/killed/killed_lives.py FOLDER --cases 0 200       all of them
    python tests/killed/killed_lives.py FOLDER --cases 17 18 --keep     one, and its run directory stays

torch and the guard are loaded once; each life is a fork. What the lives tell goes to a file outside of what they are
killed over.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ["LOOPGUARD_LOG_KEY"] = ""  # the log key of whoever runs this signs none of these logs

import torch
from killed_edges import KILLS, Edges, Fate
from killed_oracle import Log, judge
from killed_story import Life, lay_out, parts, swap

from loopguard.audit import read, standalone
from loopguard.audit.verify import verify

SEED = "killed anywhere"
PROVEN = {0, 10, 20}
MOST_DEATHS = 8
"""Of one run."""


class Case:
    """One run, from its beginning or from a part of the story on, and everything that was told of it."""

    def __init__(self, home, told=()):
        self.home, self.root = home, home / "root"
        self.told = list(told)
        self.deaths = []
        self.wrong = []

    @property
    def log(self):
        return Log(read.stream_dir(self.root / "run"))

    def live(self, act, fate=None):
        """One life. Gives the edges that it met where it ended by itself, and None where it was killed."""
        out, ended, met = (self.home / name for name in ("told", "died", "met"))
        for path in (out, ended, met):
            path.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _live(self, act, fate, out=out, ended=ended, met=met)
        _, status = os.waitpid(child, 0)
        swap(self.root)
        self._take_in(out)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and ended.exists():
            self.deaths.append({"at": ended.read_text(), "how": fate.how})
            self._verify()
            return None
        if status != 0:
            self.wrong.append(("ended", met.read_text() if met.exists() else f"status {status}"))
            raise _OverError(self.wrong[-1])
        for name in set(json.loads(met.read_text())["modules"]) - set(sys.modules):
            with suppress(ImportError):  # loaded here once, and not in each life
                importlib.import_module(name)
        return json.loads(met.read_text())["edges"]

    def _take_in(self, out):
        log = self.log
        for line in out.read_text().splitlines() if out.exists() else ():
            facts = json.loads(line)
            self.told.append(facts | {"durable": log.durable(facts["sizes"])})

    def _verify(self):
        run = self.root / "run"
        if not self.log.records:
            return
        places = self._anchors()
        ours = verify(run, anchors=places)
        with redirect_stdout(io.StringIO()):
            theirs = standalone.main([str(run), *(word for place in places for word in ("--anchors", str(place)))])
        if ours.code not in PROVEN or theirs != ours.code:
            after = self.deaths[-1] if self.deaths else "the end"
            self.wrong.append(("verified", f"{ours.code} and {theirs} after {after}: {ours.findings}"))

    def _anchors(self):
        """What was kept, less the lines that a power cut left half of: a reader has to take those out."""
        path, kept = self.root / "anchors.jsonl", self.home / "anchors.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith('"}\n')]
        kept.write_text("".join(whole))
        return [kept] if whole else []

    def judge(self, base):
        """What is wrong with a run that came to its end."""
        self._verify()
        log = self.log
        self.wrong += judge(log, self.told)
        kept = "".join(path.read_text() for path in self._anchors())
        for record in log.of("anchor.kept"):
            if f"\\n{record['body']['size']}\\n" not in kept:
                self.wrong.append(("anchored", f"the checkpoint of {record['body']['size']} records"))
        applied = log.of("promotion.applied")
        for record in applied:
            if record["body"]["actor"] != base[record["cycle"]]:
                self.wrong.append(("same", f"cycle {record['cycle']}, record {record['seq']}"))
        for line in self.told:
            if line["what"] == "open":
                known = {
                    r["body"]["actor"]
                    for r in applied
                    if (r["cycle"], True) == (line["cycle"], r["seq"] <= line["durable"])
                }
                if line["actor"] not in (known if line["cycle"] else {base[None]}):
                    self.wrong.append(("promoted", f"process {line['pid']}, cycle {line['cycle']}"))
                if (line["status"] or 0) > (line["cycle"] or 0):
                    self.wrong.append(("ended", f"status tells of cycle {line['status']}, promoted is {line['cycle']}"))
        if (last := self.told[-1]["what"]) != "ended":
            self.wrong.append(("ended", f"the last that was told is {last}"))


class _OverError(Exception):
    """Nothing can be said of this case any more."""


def _live(case, act, fate, *, out, ended, met):
    """In the child: live, and never come back."""
    code = 1
    try:
        told = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        write = os.write  # not one that is killed
        edges = Edges(case.root, fate=fate, ended=lambda name: ended.write_text(name), keep=case.home / "keep")

        def tell(facts, folder):
            line = facts | {"pid": os.getpid(), "sizes": edges.disk.there(folder)}
            write(told, json.dumps(line).encode() + b"\n")

        life = Life(case.root, tell)
        edges.watch()
        act(life)
        met.write_text(json.dumps({"edges": edges.met, "modules": sorted(sys.modules)}))
        code = 0
    except BaseException:  # noqa: BLE001 - the parent tells it
        met.write_text(traceback.format_exc())
    finally:
        os._exit(code)


class Bases:
    """The story as it goes where nobody kills: the run before each part, what was told, and the edges in it."""

    def __init__(self, home):
        self.home = home
        self.edges = []
        self.told = []
        case = Case(home / "base")
        case.home.mkdir(parents=True)
        lay_out(case.root)
        for number, part in enumerate(parts()):
            shutil.copytree(case.root, home / f"before-{number}")
            self.told.append(list(case.told))
            self.edges.append(case.live(part))
        self.actors = {record["cycle"]: record["body"]["actor"] for record in case.log.of("promotion.applied")}
        self.actors[None] = case.told[0]["actor"]
        case.judge(self.actors)
        self.wrong = case.wrong
        (home / "told.json").write_text(json.dumps(case.told))
        self.types = Counter(record["type"] for record in case.log.records)

    def kinds(self):
        """Every kind of edge, with the parts that meet it and how often."""
        found = {}
        for part, edges in enumerate(self.edges):
            for kind, times in Counter(edges).items():
                found.setdefault(kind, []).append((part, times))
        return dict(sorted(found.items()))

    def fate(self, number):
        """In which part a case is killed first, and where: once at every kind of edge, then there or anywhere."""
        chance = Random(f"{SEED} {number}")
        kinds = self.kinds()
        how = chance.choice(KILLS)
        if number < len(kinds) or chance.random() < 0.5:  # else most would end in a record of the log
            kind = list(kinds)[number % len(kinds)]
            part, times = chance.choice(kinds[kind])
            return part, Fate(kind, chance.randint(1, times), how, number)
        part = chance.choices(range(len(self.edges)), [len(edges) for edges in self.edges])[0]
        return part, Fate(None, chance.randint(1, len(self.edges[part])), how, number)

    def case(self, number):
        """Kill, start again, perhaps kill that too, and go on: through the next part, or to the end of the story."""
        home = self.home / f"case-{number}"
        part, fate = self.fate(number)
        first = asdict(fate)
        case = Case(home, self.told[part])
        home.mkdir()
        shutil.copytree(self.home / f"before-{part}", case.root)
        chance = Random(f"{SEED} {number} again")
        try:
            for act in parts()[part : part + 2 if number % 5 else None]:
                while case.live(act, fate) is None:
                    fate = self._next(chance, case.deaths)
                    if chance.random() < 0.25 and case.live(Life.look, fate) is None:
                        fate = self._next(chance, case.deaths)
                fate = None
            case.judge(self.actors)
        except _OverError:
            pass  # `wrong` says why
        except Exception:  # noqa: BLE001 - a run that cannot even be judged is the worst of all
            case.wrong.append(("ended", traceback.format_exc()))
        return {"case": number, "part": part, "first": first, "deaths": case.deaths, "wrong": case.wrong}

    def _next(self, chance, deaths):
        """A life after a kill is killed too, half of the time: where the last one was, or while it mends that."""
        again = chance.choice(["no", "no", "there", "soon"])
        if len(deaths) >= MOST_DEATHS or again == "no":
            return None
        kind = deaths[-1]["at"] if again == "there" else None
        nth = 1 if kind else chance.choice([chance.randint(1, 40), chance.randint(1, 120)])
        return Fate(kind, nth, chance.choice(KILLS), chance.getrandbits(32))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs=2, type=int, default=(0, 200))
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warm()
    bases = Bases(given.folder)
    say(
        {
            "kinds": bases.kinds(),
            "edges": [len(edges) for edges in bases.edges],
            "wrong": bases.wrong,
            "types": bases.types,
        }
    )
    for number in range(*given.cases):
        say(bases.case(number))
        if not given.keep:
            shutil.rmtree(bases.home / f"case-{number}")


def warm():
    """Load what else is loaded on the way, once: the first optimizer costs two seconds."""
    torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    gc.freeze()  # else each life copies what it only looks through


def say(facts):
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()  # before the next fork, which would print it again


if __name__ == "__main__":
    main()
