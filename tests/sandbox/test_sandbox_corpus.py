"""The corpus in real containers: every row in the usual kind of cell and in a strict one, a part of it in all others.

After each case the next call finds everything as it always is, the controller has kept little, and the log says what
was decided and what became of it. `corpus.py` has the cases.
"""

from __future__ import annotations

import ast
import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import corpus
import pytest
from sandbox_kit import ROOT, Bench, cells, make_call, until
from test_sandbox_lifetime import docker

from loopguard.audit import read
from loopguard.audit.verify import verify
from loopguard.controller.station import ToolStation
from loopguard.errors import SandboxBusyError, SandboxUnavailableError
from loopguard.sandbox import attest
from loopguard.sandbox import docker as docker_cells

PAGE = ROOT / "docs" / "sandbox-corpus.md"


def _pairs():
    for kind in corpus.KINDS:
        for case in corpus.played_in(kind):
            marks = [getattr(pytest.mark, "runsc" if kind.runtime == "runsc" else "docker")]
            if (there := case.there(kind)).broken:
                marks.append(pytest.mark.xfail(raises=AssertionError, reason=there.why))
            yield pytest.param(kind, case, id=f"{kind.name}-{case.name}", marks=marks)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """One station for each kind of cell, opened when first needed, with something to find in its surroundings."""
    open_: dict[str, corpus.Stage] = {}

    def of(kind: corpus.Kind) -> corpus.Stage:
        if kind.name not in open_:
            open_[kind.name] = corpus.Stage(kind, tmp_path_factory.mktemp(corpus.PLANTED))
        return open_[kind.name]

    of.open = open_
    with pytest.MonkeyPatch.context() as planted:
        for name in ("AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "LD_PRELOAD_PATH", "OPENAI_API_KEY"):
            planted.setenv(name, f"http://{corpus.PLANTED}.example.org")
        yield of
    for each in open_.values():
        each.station.close()


@pytest.mark.parametrize(("kind", "case"), list(_pairs()))
def test_it_holds(stage, kind, case):
    """The claim of the case, and what must be true after every case."""
    stage(kind).play(case)


@pytest.mark.docker
def test_the_record_of_all_of_it_is_whole(stage):
    """Each log verifies, holds an end for every call that was let run, and no station was frozen by its calls."""
    if not stage.open:
        stage(corpus.KINDS[0])
    for each in stage.open.values():
        assert not each.station.frozen
        each.station.close()
        assert verify(each.station.run_dir).findings == []
        told: dict[str, list[str]] = {}
        for entry in read.entries(each.station.run_dir, types={"tool.decided", "tool.finished", "tool.lost"}):
            if entry.body.get("result") != "deny":
                told.setdefault(entry.body["call"], []).append(entry.type)
        assert told
        assert all(len(types) == 2 and types[0] == "tool.decided" for types in told.values()), told


def test_every_row_is_proven():
    """By cases here, by tests elsewhere, or by both; and no row is proven that nobody named."""
    assert sorted(corpus.ROWS) == list(range(1, 39))
    assert {case.row for case in corpus.CASES} | set(corpus.ELSEWHERE) == set(corpus.ROWS)


def test_every_case_has_a_name_and_a_claim_of_its_own():
    """So that a line of the table means one case."""
    for values in ([case.name for case in corpus.CASES], [case.claim for case in corpus.CASES]):
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("named", sorted({name for names in corpus.ELSEWHERE.values() for name in names}))
def test_every_test_that_is_named_is_there(named):
    """With its class, under the name that the corpus gives it."""
    path, *names = named.split("::")
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        assert found, f"{path} has no {name}"
        body = found[0].body


def test_the_page_is_about_these_cases():
    """Every case, its claim, what differs and why, every test elsewhere; and nothing that is gone."""
    text = PAGE.read_text(encoding="utf-8")
    for case in corpus.CASES:
        assert f"| {case.row} | `{case.name}` | {corpus.one_line(case.claim)} |" in text
        for there in case.differs.values():
            assert there.why in text
    listed = re.findall(r"^\| \d+ \| `([\w-]+)` \|", text, flags=re.MULTILINE)
    assert listed == [case.name for case in corpus.CASES]
    for name in {name for names in corpus.ELSEWHERE.values() for name in names}:
        assert name.rpartition("::")[2] in text


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("1.1.11", True),
        ("v1.1.7", True),
        ("1.0.0-rc93", True),
        ("1.1.12", False),
        ("v1.3.3", False),
        ("1.1.5+ds1-1+deb12u1", False),
    ],
)
def test_an_old_runc_is_refused(version, old):
    """One from which a container can reach the host, unless a distribution has mended it under an old number."""
    assert bool(attest.old_runc(version)) == old


@pytest.mark.docker
class TestFaults:
    def test_who_dies_under_a_call_gives_no_result(self):
        """Where the process that calls are made from is killed from outside, nobody gets a result; the cell goes."""
        with Bench() as bench, ThreadPoolExecutor(1) as threads:
            zygote = bench.text("import os; print(os.getppid())")
            call = threads.submit(bench.run, "import time; time.sleep(60)")
            assert until(lambda: len(bench.runtime._pool._taken) == 1)
            docker("exec", cells(bench.run_id)[0]["Id"], "sh", "-c", f"kill -9 {zygote}")
            with pytest.raises(SandboxUnavailableError, match="died under a call"):
                call.result(timeout=60)
            assert bench.text("print('fine')") == "fine"
            assert until(lambda: bench.reasons() == ["lost"])

    def test_a_cell_that_stands_still_costs_its_deadline_and_no_more(self, monkeypatch):
        """A container that somebody paused is given up, taken away and replaced; the call is not tried again."""
        monkeypatch.setattr(docker_cells, "_GRACE_S", 1)
        with Bench(wall_s=1) as bench, ThreadPoolExecutor(1) as threads:
            call = threads.submit(bench.run, "import time; time.sleep(0.7)")
            assert until(lambda: len(bench.runtime._pool._taken) == 1)
            paused = cells(bench.run_id)[0]["Id"]
            docker("pause", paused)
            with pytest.raises(SandboxUnavailableError, match="did not answer within its deadline"):
                call.result(timeout=60)
            assert bench.text("print('fine')") == "fine"
            assert until(lambda: paused not in [each["Id"] for each in cells(bench.run_id)])


def descriptors() -> int:
    """How many this process holds, where the kernel says."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.mark.docker
def test_two_hundred_callers_are_served_or_told(tmp_path):
    """Of 200 at once those who fit into the queue are served and the others told so; who leaves takes no cell along.

    Nothing is left of them: no thread beyond those that wait for more, and no descriptor.
    """
    text = corpus.POLICY.format(mode="pooled", privileges="multi", runtime="runc", cells=2)
    policy = tmp_path / "policy.yaml"
    policy.write_text(text.replace("cells: 2\n", "cells: 2\n      queue: 100\n"), encoding="utf-8")

    async def crowd(station: ToolStation) -> list[object]:
        answers = await asyncio.gather(
            *(station.arun(make_call(f"print({n} ** 2)")) for n in range(200)), return_exceptions=True
        )
        leaving = [asyncio.ensure_future(station.arun(make_call("import time; time.sleep(20)"))) for _ in range(20)]
        await asyncio.sleep(0.5)
        for each in leaving:
            each.cancel()
        gone = await asyncio.gather(*leaving, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in gone)
        return answers

    with ToolStation.open(policy, run_dir=tmp_path / "run") as station:
        assert station.run(make_call("print(1)")).ok
        before = descriptors()
        answers = asyncio.run(crowd(station))
        served = [(n, each) for n, each in enumerate(answers) if not isinstance(each, BaseException)]
        assert len(served) >= 100
        assert all(each.text == f"{n**2}\n" for n, each in served)
        assert all(isinstance(each, SandboxBusyError) for each in answers if isinstance(each, BaseException))
        assert until(lambda: station.run(make_call("print(1)")).ok)
        assert threading.active_count() < 40
        # Cells that were made anew have streams too.
        assert until(lambda: descriptors() <= before + 8)
