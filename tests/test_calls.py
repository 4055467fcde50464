"""The path of every tool call: decided, durable, run, recorded; awaited or in an episode. Without Docker."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loopguard.audit import log as logs
from loopguard.audit import read
from loopguard.audit.verify import verify
from loopguard.controller import LoopGuard
from loopguard.controller.calls import GONE
from loopguard.controller.station import ToolStation
from loopguard.errors import (
    AuditWriteError,
    CallError,
    LoopFrozen,
    LoopGuardError,
    SandboxBusyError,
    SandboxUnavailableError,
    UsageError,
)
from loopguard.state import standing, submit
from loopguard.testing import FakeRuntime, fake_runtimes
from loopguard.types import Decision, Outcome, ToolCall

POLICY = """
apiVersion: loopguard/v1
name: test
tools:
  rules:
    - {id: calculator, tool: python, then: run, sandbox: offline, refuse_patterns: [import]}
    - {id: shell, tool: sh, then: run, sandbox: rollout, refuse_patterns: [import]}
    - {id: program, tool: exec, then: run, sandbox: rollout}
  freeze_above: {refused_share: 0.1, contained_share: 0.1, of_last_calls: 20}
sandbox:
  profiles:
    offline: {image: "loopguard/python:1", cells: 2, queue: 3}
    rollout: {image: "loopguard/python:1", cells: 2, queue: 3, mode: episode}
data:
  sources: [human]
updates:
  loss_kind: discrete
  monitors:
    - {kind: bounds, metric: loss}
promotion:
  panel:
    - {metric: score, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.1}
freeze: {when_frozen: raise}
"""
ROOM = 5
"""Calls that may be under way at once: two cells, and three that wait."""


class Held(FakeRuntime):
    """A runtime whose calls block until they are killed or let go, whichever comes first.

    With `late_s`, a call is on its way to its cell for that long, where no kill finds it.
    """

    def __init__(self, late_s=0.0):
        super().__init__(lambda call: self._hold(call))
        self.late_s = late_s
        self.free = threading.Event()
        self.blocked = {}
        self.misses = 0

    def _hold(self, call):
        time.sleep(self.late_s)
        mine = self.blocked[call.id] = [threading.Event(), ""]
        while not self.free.is_set() and not mine[0].wait(0.005):
            pass
        del self.blocked[call.id]
        return SandboxUnavailableError(mine[1]) if mine[1] else call.code

    def kill(self, call_id, why):
        if (held := self.blocked.get(call_id)) is None:
            self.misses += 1
            return False
        held[1] = why
        held[0].set()
        return True

    def kill_running(self):
        super().kill_running()
        return sum(self.kill(each, "the call was killed by a freeze") for each in list(self.blocked))

    def episode(self):
        return HeldEpisode(self)

    def close(self):
        super().close()
        self.free.set()


class HeldEpisode:
    """An episode of a Held runtime: a kill ends whatever runs in it."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.over = ""

    def run(self, call):
        if self.over:
            raise SandboxUnavailableError(f"the episode is over: {self.over}")
        return self.runtime.run(call)

    def kill(self, why):
        self.over = why
        for each in list(self.runtime.blocked):
            self.runtime.kill(each, why)

    def close(self):
        self.over = self.over or "it was closed"


class Lab:
    """A run directory with a policy, and a way to open it; its runtimes by the mode of their cells."""

    def __init__(self, tmp_path):
        self.policy = tmp_path / "policy.yaml"
        self.policy.write_text(POLICY)
        self.run_dir = tmp_path / "run"
        self.respond = lambda call: "4"
        self.make = lambda: FakeRuntime(lambda call: self.respond(call))
        self.runtimes = {}

    def runtime(self, spec, _run_id, _on_event):
        self.runtimes[spec.mode] = self.make()
        return self.runtimes[spec.mode]

    def held(self, **options):
        self.make = lambda: Held(**options)
        return self

    def guard(self, **options):
        return LoopGuard.from_file(self.policy, run_dir=self.run_dir, runtimes=self.runtime, **options)

    def station(self, **options):
        return ToolStation.open(self.policy, run_dir=self.run_dir, runtimes=self.runtime, **options)

    @property
    def ran(self):
        """Ids of the calls that reached a runtime."""
        return [call.id for runtime in self.runtimes.values() for call in runtime.calls]

    def events(self, *types):
        return [entry for entry in read.entries(self.run_dir) if entry.type in types]

    def story(self, call):
        """What the log says of one call, in order."""
        return [entry.type for entry in read.entries(self.run_dir) if entry.body.get("call") == call.id]


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


_count = iter(range(1_000_000))


def a_call(code="print(2+2)", *, tool="python", **fields):
    return ToolCall(id=f"c{next(_count)}", tool=tool, code=code, **fields)


def together(count, action):
    """Do something in that many threads, all let go at the same moment."""
    gate = threading.Barrier(count)

    def one(number):
        gate.wait(timeout=30)
        return action(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


async def until(what, *, within_s=20):
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.005)


def bounded(coroutine, *, within_s=30):
    """Run it to its end, which has to come."""

    async def run():
        async with asyncio.timeout(within_s):
            return await coroutine

    return asyncio.run(run())


class TestOrder:
    def test_a_call_is_decided_and_durable_before_it_runs(self, lab):
        """While it runs, its decision is on disk; that it came back is recorded afterwards."""
        seen = []

        def respond(call):
            (decided,) = (entry for entry in lab.events("tool.decided") if entry.body["call"] == call.id)
            seen.append((decided.seq <= station._guard._log.durable_head.seq, lab.story(call)))
            return "4"

        lab.respond = respond
        with lab.station() as station:
            for call in (a_call(), a_call("ls", tool="sh")):
                assert station.run(call).text == "4"
                assert lab.story(call) == ["tool.decided", "tool.finished"]
        assert seen == [(True, ["tool.decided"])] * 2
        assert verify(lab.run_dir).code == 20

    def test_many_threads_share_one_sync(self, lab, monkeypatch):
        """Whoever syncs first does so for itself, the next one for all who wrote meanwhile."""
        count, flush, flushes = 12, logs._flush, []

        def slow(descriptor):
            flushes.append(descriptor)
            while station._guard._log.head.seq < before + count:
                time.sleep(0.001)
            flush(descriptor)

        with lab.station() as station:
            before = station._guard._log.head.seq
            lab.respond = lambda call: go_on.wait(timeout=30) and ""
            go_on = threading.Event()
            monkeypatch.setattr(logs, "_flush", slow)
            calls = [a_call() for _ in range(count)]

            def run(number):
                if number < count:
                    return station.run(calls[number])
                while len(lab.ran) < count:
                    time.sleep(0.001)
                syncs = len(flushes)
                go_on.set()
                return syncs

            *outcomes, syncs = together(count + 1, run)
            monkeypatch.undo()
        assert [outcome.call_id for outcome in outcomes] == [call.id for call in calls]
        assert syncs <= 2

    def test_what_cannot_be_made_durable_does_not_run(self, lab, monkeypatch):
        """Neither this call nor a later one; and the run is frozen when it is closed."""

        def full(descriptor):
            raise OSError(28, "No space left on device")

        station = lab.station()
        monkeypatch.setattr(logs, "_flush", full)
        for _ in range(2):
            with pytest.raises(AuditWriteError, match="No space left"):
                station.run(a_call())
        with pytest.raises(AuditWriteError, match="No space left"):
            bounded(station.arun(a_call()))
        monkeypatch.undo()
        assert lab.ran == []
        station.close()
        assert standing(lab.run_dir).frozen

    def test_a_lost_call_is_recorded_and_raised(self, lab):
        """Every error of the sandbox: of what became of the call the log says that nobody knows."""
        with lab.station() as station:
            for error in (SandboxUnavailableError("it died"), SandboxBusyError("full"), CallError("too large")):
                lab.respond = lambda call, error=error: error
                call = a_call()
                with pytest.raises(type(error), match=str(error)):
                    station.run(call)
                assert lab.story(call) == ["tool.decided", "tool.lost"]
        assert [entry.body["reason"] for entry in lab.events("tool.lost")] == ["it died", "full", "too large"]

    def test_one_refused_call_among_others_does_not_run(self, lab):
        """It costs the others nothing, and their outcomes keep their places."""
        with lab.guard() as guard:
            outcomes = next(guard.cycles(1)).tool("python").map(["1", "import os", "3"])
        assert [outcome.status for outcome in outcomes] == ["ok", "denied", "ok"]
        assert sorted(call.code for call in lab.runtimes["pooled"].calls) == ["1", "3"]


class TestRecords:
    def test_input_and_files_stand_in_the_record_by_their_digests(self, lab):
        """What went in with the decision, what came out with the outcome, and no byte of either."""
        secret, fetched = b"the secret input", b"the secret output"

        def respond(call):
            return Outcome(
                call_id=call.id,
                status="ok",
                exit_code=0,
                files={"out/b": fetched, "none": b""},
                not_fetched={"big": "it is too large"},
            )

        lab.respond = respond
        with lab.guard() as guard:
            tool = next(guard.cycles(1)).tool("python")
            assert tool("1", stdin=secret, files={"a": secret, "d/e": b""}, fetch=("out", "none", "big")).ok
        (decided,), (finished,) = lab.events("tool.decided"), lab.events("tool.finished")
        assert decided.body["stdin_sha256"] == hashlib.sha256(secret).hexdigest()
        assert decided.body["stdin_bytes"] == len(secret)
        assert decided.body["files"] == [
            {"name": "a", "sha256": hashlib.sha256(secret).hexdigest(), "bytes": len(secret)},
            {"name": "d/e", "sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0},
        ]
        assert [file["sha256"] for file in finished.body["files"]] == [
            hashlib.sha256(data).hexdigest() for data in (fetched, b"")
        ]
        assert [file["name"] for file in finished.body["files"]] == ["out/b", "none"]
        assert finished.body["not_fetched"] == 1
        assert decided.cycle == finished.cycle == 1
        written = b"".join(path.read_bytes() for path in read.segments(lab.run_dir, "controller"))
        assert b"the secret" not in written

    def test_a_call_without_them_has_nothing_to_say_of_them(self, lab):
        """The record stays as short as it was."""
        with lab.station() as station:
            station.run(a_call())
        for entry in lab.events("tool.decided", "tool.finished"):
            assert not entry.body.keys() & {"stdin_sha256", "stdin_bytes", "files", "not_fetched"}

    @pytest.mark.parametrize("code", ["", "x" * 5000, "print('żółw')", "\ud800 half", "\x1b[2J\0", "\U0001f422" * 300])
    def test_any_code_leaves_a_record_that_verifies(self, lab, code):
        """Its digest is of the whole code; of the code itself the record holds a beginning."""
        with lab.station() as station:
            station.run(a_call(code))
        (decided,) = lab.events("tool.decided")
        whole = code.encode("utf-8", errors="surrogatepass")
        assert decided.body["code_sha256"] == hashlib.sha256(whole).hexdigest()
        assert len(decided.body["code_head"]) <= 200 * len("\\ud800")
        assert verify(lab.run_dir).code == 20

    def test_what_a_call_asks_for_reaches_the_runtime(self, lab):
        """Input, files, what to fetch and a shorter time limit, called or awaited."""
        asked = {"stdin": b"in", "files": {"a": b"1"}, "fetch": ("b",), "wall_s": 0.5}
        with lab.guard() as guard:
            tool = next(guard.cycles(1)).tool("python")
            tool("1", **asked)
            bounded(tool.acall("1", **asked))
        first, second = lab.runtimes["pooled"].calls
        assert first.id != second.id
        for call in (first, second):
            assert {name: getattr(call, name) for name in asked} == asked


class TestFreeze:
    def test_a_trip_by_many_threads_is_one_freeze(self, lab):
        """Each of them sees that too much was refused; one of them freezes, and none raises."""
        with lab.station() as station:
            outcomes = together(24, lambda _: station.run(a_call("import os")))
            assert station.frozen
        assert {outcome.status for outcome in outcomes} == {"denied"}
        assert lab.ran == []
        assert len(lab.events("freeze.entered")) == 1
        assert verify(lab.run_dir).code == 20

    def test_a_trip_by_contained_calls_is_one_freeze(self, lab):
        """Also where they all come back at the same time, in a cycle as without one."""
        barrier = threading.Barrier(12)

        def respond(call):
            barrier.wait(timeout=30)
            return Outcome(call_id=call.id, status="timeout")

        lab.respond = respond
        with lab.guard() as guard:
            tool = next(guard.cycles(1)).tool("python")
            outcomes = together(12, lambda _: tool("1"))
            assert tool("2").status == "denied"
        assert [outcome.status for outcome in outcomes] == ["timeout"] * 12
        assert len(lab.ran) == 12
        (entered,) = lab.events("freeze.entered")
        assert entered.body["rule"] == "rate:contained"

    def test_a_request_that_many_threads_hear_is_one_freeze(self, lab):
        """It is taken in once, whoever hears it first."""
        with lab.station() as station:
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            outcomes = together(16, lambda _: station.run(a_call()))
        assert {outcome.status for outcome in outcomes} == {"denied"}
        assert len(lab.events("freeze.requested")) == len(lab.events("freeze.entered")) == 1
        assert lab.ran == []

    def test_a_freeze_kills_what_runs(self, lab):
        """The calls in flight raise and are recorded as lost; those that come later are refused."""
        with lab.held().station() as station, ThreadPoolExecutor(4) as threads:
            calls = [a_call(), a_call()]
            running = [threads.submit(station.run, call) for call in calls]
            while len(lab.runtimes["pooled"].blocked) < 2:
                time.sleep(0.005)
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            assert station.run(a_call()).status == "denied"
            for each in running:
                with pytest.raises(SandboxUnavailableError, match="killed by a freeze"):
                    each.result(timeout=20)
            assert [lab.story(call) for call in calls] == [["tool.decided", "tool.lost"]] * 2

    def test_a_frozen_run_refuses(self, lab):
        """Called, awaited or in an episode: nothing is decided, nothing runs, and the model is told no reason."""
        with lab.station() as station, station.episode("rollout") as episode:
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            outcomes = [station.run(a_call()), bounded(station.arun(a_call()))]
            outcomes += [episode.run(a_call("ls", tool="sh")), bounded(episode.arun(a_call("ls", tool="sh")))]
            assert {(outcome.status, outcome.text) for outcome in outcomes} == {
                ("denied", "This call is not permitted.")
            }
        assert lab.ran == []
        assert lab.events("tool.decided") == []

    def test_a_freeze_while_the_record_becomes_durable_stops_the_call(self, lab, monkeypatch):
        """It was decided before the freeze, and would have run after it: it does not, and the log says so."""
        with lab.station() as station:
            sync, call = station._guard._log.sync, a_call()

            def slow_disk():
                sync()
                if not station._guard.frozen:
                    submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
                    station._guard._listen()

            monkeypatch.setattr(station._guard._log, "sync", slow_disk)
            assert station.run(call).status == "denied"
            monkeypatch.undo()
        assert call.id not in lab.ran
        assert lab.story(call) == ["tool.decided", "tool.lost"]

    def test_calls_that_a_trip_kept_from_running_have_an_end_in_the_log(self, lab):
        """Of a batch whose refused calls freeze the loop, the allowed ones are told as not run."""
        with lab.guard() as guard:
            outcomes = next(guard.cycles(1)).tool("python").map(["1", *["import os"] * 5])
        assert {outcome.status for outcome in outcomes} == {"denied"}
        assert lab.ran == []
        (allowed,) = [entry for entry in lab.events("tool.decided") if entry.body["result"] == "allow"]
        (lost,) = lab.events("tool.lost")
        assert lost.body["call"] == allowed.body["call"]

    def test_after_a_resume_the_rates_begin_anew(self, lab):
        """A person has looked at what was counted; the next call is not frozen for it again."""
        with lab.station() as station:
            while not station.frozen:
                station.run(a_call(tool="rm"))
            submit(lab.run_dir, "resume", by="dana", reason="a broken prompt, mended")
            assert station.run(a_call()).ok
        assert len(lab.events("freeze.entered")) == 1


class TestStation:
    def test_a_log_that_cannot_be_written_is_told(self, lab, monkeypatch):
        """From the first record that the disk did not take, before anybody asks for another."""
        station = lab.station()
        assert not station.failing

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("loopguard.audit.log.os.fdatasync", full)
        with pytest.raises(AuditWriteError):
            station.run(a_call())
        monkeypatch.undo()
        assert station.failing
        assert lab.ran == []
        station.close()

    def test_a_directory_that_was_left_frozen_is_frozen(self, lab):
        """Opened again it refuses every call, and no cell is started for it."""
        with lab.station() as station:
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            assert station.frozen
        lab.runtimes.clear()
        with lab.station() as station:
            assert station.frozen
            assert station.run(a_call()).status == "denied"
            assert bounded(station.arun(a_call())).status == "denied"
            assert lab.runtimes == {}
        assert len(lab.events("freeze.entered")) == 1

    @pytest.mark.parametrize("looks", [True, False])
    def test_a_resume_lets_it_go_on(self, lab, looks):
        """The cells start then, also where the call itself is the first to hear of the resume."""
        with lab.station() as station:
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            assert station.frozen
        lab.runtimes.clear()
        with lab.station() as station:
            submit(lab.run_dir, "resume", by="dana", reason="it was nothing")
            if looks:
                assert not station.frozen
            assert station.run(a_call()).text == "4"
        assert standing(lab.run_dir).frozen is False

    def test_a_station_records_its_command_and_is_a_run(self, lab):
        """Its directory is that of any run, and it has one owner."""
        with lab.station(command=["loopguard", "serve"]) as station:
            assert standing(lab.run_dir).run == station.run_id
            assert station.policy.name == "test"
        (started,) = lab.events("run.started")
        assert started.body["command"] == ["loopguard", "serve"]
        assert [runtime.closed for runtime in lab.runtimes.values()] == [True, True]

    def test_a_closed_station_starts_no_cells(self, lab):
        """A call or an episode that comes too late raises, and nobody is left with cells that nobody closes."""
        station = lab.station()
        station.run(a_call())
        station.close()
        lab.runtimes.clear()
        for late in (lambda: station.run(a_call()), lambda: station.episode("rollout")):
            with pytest.raises(LoopGuardError):
                late()
        assert lab.runtimes == {}

    def test_awaiting_a_closed_station_raises_what_calling_it_does(self, lab):
        """Whether or not it was awaited before."""
        station = lab.station()
        bounded(station.arun(a_call()))
        station.close()
        with pytest.raises(LoopGuardError):
            bounded(station.arun(a_call()))

    def test_closing_ends_what_is_awaited(self, lab):
        """Nobody waits for ever for a station that was closed."""

        async def go():
            station = lab.held().station()
            tasks = [asyncio.create_task(station.arun(a_call())) for _ in range(2)]
            await until(lambda: len(lab.runtimes["pooled"].blocked) == 2)
            await asyncio.to_thread(station.close)
            return await asyncio.gather(*tasks, return_exceptions=True)

        assert len(bounded(go())) == 2


class TestAwaited:
    def test_the_outcome_is_that_of_the_call(self, lab):
        """Many at once: everybody gets the own answer, and each is decided before it runs."""
        lab.respond = lambda call: call.code

        async def go():
            calls = [a_call(str(number)) for number in range(ROOM)]
            outcomes = await asyncio.gather(*(station.arun(call) for call in calls))
            assert [(each.call_id, each.text) for each in outcomes] == [(call.id, call.code) for call in calls]
            return calls

        with lab.station() as station:
            for call in bounded(go()):
                assert lab.story(call) == ["tool.decided", "tool.finished"]

    def test_a_tool_of_a_cycle_can_be_awaited(self, lab):
        """A refusal is an Outcome there too, and the loop goes on while a call runs."""

        async def go(tool):
            outcome, refused = await asyncio.gather(tool.acall("1"), tool.acall("import os"))
            return outcome.text, refused.status

        with lab.guard() as guard:
            assert bounded(go(next(guard.cycles(1)).tool("python"))) == ("4", "denied")
        assert {entry.cycle for entry in lab.events("tool.decided")} == {1}

    def test_a_lost_call_raises(self, lab):
        lab.respond = lambda call: SandboxUnavailableError("the cell died")
        with lab.station() as station, pytest.raises(SandboxUnavailableError, match="the cell died"):
            bounded(station.arun(a_call()))

    def test_from_several_event_loops(self, lab):
        """One after the other and at the same time, each in a thread of its own."""
        lab.respond = lambda call: call.code

        async def go(number):
            return [(await station.arun(a_call(f"{number}.{each}"))).text for each in range(3)]

        with lab.station() as station:
            for number in range(3):
                assert bounded(go(number)) == [f"{number}.{each}" for each in range(3)]
            answers = together(ROOM, lambda number: bounded(go(number)))
        assert answers == [[f"{number}.{each}" for each in range(3)] for number in range(ROOM)]

    def test_cancelling_a_running_call_kills_it_and_leaves_a_record(self, lab):
        """When the caller goes on, the call has ended, and the log says that it is lost and why."""

        async def go():
            call = a_call()
            task = asyncio.create_task(station.arun(call))
            await until(lambda: call.id in lab.runtimes["pooled"].blocked)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert lab.runtimes["pooled"].blocked == {}
            assert lab.story(call) == ["tool.decided", "tool.lost"]

        with lab.held().station() as station:
            bounded(go())
        assert [entry.body["reason"] for entry in lab.events("tool.lost")] == [GONE]

    def test_cancelling_disturbs_no_other_call(self, lab):
        """Only the one that was cancelled ends."""

        async def go():
            calls = [a_call("first"), a_call("second")]
            tasks = [asyncio.create_task(station.arun(call)) for call in calls]
            await until(lambda: len(lab.runtimes["pooled"].blocked) == 2)
            tasks[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            assert list(lab.runtimes["pooled"].blocked) == [calls[1].id]
            lab.runtimes["pooled"].free.set()
            assert (await tasks[1]).text == "second"

        with lab.held().station() as station:
            bounded(go())

    def test_a_call_on_its_way_to_a_cell_is_ended_when_it_gets_there(self, lab):
        """One kill would have been too early; the caller waits until the call is over."""

        async def go():
            call = a_call()
            task = asyncio.create_task(station.arun(call))
            await until(lambda: call.id in lab.ran)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert lab.story(call) == ["tool.decided", "tool.lost"]

        with lab.held(late_s=0.2).station() as station:
            bounded(go())
            assert lab.runtimes["pooled"].misses > 0

    def test_a_time_limit_of_the_caller_is_a_cancellation(self, lab):
        """`asyncio.timeout` around a call ends the call."""

        async def go(tool):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await tool.acall("1")

        with lab.held().guard() as guard:
            bounded(go(next(guard.cycles(1)).tool("python")))
        assert len(lab.events("tool.lost")) == 1

    def test_a_second_cancellation_does_not_cut_the_first_one_short(self, lab):
        """Frameworks cancel again and again; the call is over when the caller goes on, all the same."""

        async def go():
            call = a_call()
            task = asyncio.create_task(station.arun(call))
            await until(lambda: call.id in lab.ran)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0.01)
            assert task.cancelled()
            assert lab.story(call) == ["tool.decided", "tool.lost"]

        with lab.held(late_s=0.2).station() as station:
            bounded(go())

    def test_a_call_that_is_over_at_that_moment_is_recorded_as_it_ended(self, lab):
        """A cancellation that comes too late changes nothing in the record."""
        lab.respond = lambda call: time.sleep(0.2) or "4"

        async def go():
            call = a_call()
            task = asyncio.create_task(station.arun(call))
            await until(lambda: call.id in lab.ran)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert lab.story(call) == ["tool.decided", "tool.finished"]

        with lab.station() as station:
            bounded(go())

    def test_a_call_that_waits_for_its_turn_is_cancelled_without_a_trace(self, lab):
        """Nothing was decided, nothing ran, and nothing of it comes later."""
        lab.policy.write_text(POLICY.replace("queue: 3", "queue: 30"))

        async def go():
            tasks = [asyncio.create_task(station.arun(a_call())) for _ in range(20)]
            held = lab.runtimes["pooled"].blocked
            await until(lambda: station._guard._calls._lines)
            (line,) = station._guard._calls._lines.values()
            await until(lambda: 0 < len(held) == len(lab.ran) == len(line.threads._threads) < 20)
            call = a_call()
            last = asyncio.create_task(station.arun(call))
            await asyncio.sleep(0.05)
            last.cancel()
            with pytest.raises(asyncio.CancelledError):
                await last
            lab.runtimes["pooled"].free.set()
            await asyncio.gather(*tasks)
            assert lab.story(call) == []
            assert call.id not in lab.ran
            assert len(lab.ran) == 20

        with lab.held().station() as station:
            bounded(go())

    def test_cancelling_all_of_them_ends_all_of_them(self, lab):
        """As a task group does when one of its tasks fails; afterwards there is room again."""

        async def go():
            for _ in range(3):
                tasks = [asyncio.create_task(station.arun(a_call())) for _ in range(ROOM)]
                await until(lambda: len(lab.runtimes["pooled"].blocked) == ROOM)
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(end) for end in ends} == {asyncio.CancelledError}

        with lab.held().station() as station:
            bounded(go())
        assert len(lab.events("tool.lost")) == 3 * ROOM

    def test_a_full_queue_turns_callers_away(self, lab):
        """Who comes when all cells and all places are taken is told so at once; nothing is decided, nothing runs."""

        async def go():
            tasks = [asyncio.create_task(station.arun(a_call())) for _ in range(ROOM)]
            await until(lambda: len(lab.ran) == ROOM)
            late = a_call()
            with pytest.raises(
                SandboxBusyError, match="all cells are taken and as many callers wait as may: try again later"
            ):
                await station.arun(late)
            assert lab.story(late) == []
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            tasks[0] = asyncio.create_task(station.arun(late))
            await until(lambda: late.id in lab.ran)
            lab.runtimes["pooled"].free.set()
            await asyncio.gather(*tasks)

        with lab.held().station() as station:
            bounded(go())

    def test_a_call_that_failed_leaves_its_place(self, lab):
        """However it ended."""
        answers = [SandboxUnavailableError("it died"), CallError("too large"), "4"]
        lab.respond = lambda call: answers[len(lab.ran) % 3]

        async def go():
            for _ in range(4 * ROOM):
                await asyncio.gather(station.arun(a_call()), return_exceptions=True)

        with lab.station() as station:
            bounded(go())
            assert len(lab.ran) == 4 * ROOM


class TestEpisodes:
    def test_each_call_is_decided_and_recorded_as_any(self, lab):
        """In the episode's cell, whichever of its tools it is."""
        with lab.station() as station, station.episode("rollout") as episode:
            calls = [a_call("ls", tool="sh"), a_call("{}", tool="exec")]
            assert [episode.run(call).text for call in calls] == ["4", "4"]
            refused = a_call("import x", tool="sh")
            assert episode.run(refused).status == "denied"
            assert [lab.story(call) for call in calls] == [["tool.decided", "tool.finished"]] * 2
            assert lab.ran == [call.id for call in calls]

    @pytest.mark.parametrize("awaited", [True, False])
    def test_a_tool_of_another_profile_is_a_mistake_and_does_not_run(self, lab, awaited):
        """With the rule, the profile that it names, and what to do; the episode goes on."""
        with lab.station() as station, station.episode("rollout") as episode:
            call = a_call()
            with pytest.raises(UsageError, match="rule calculator sends its tool to the sandbox profile 'offline'"):
                bounded(episode.arun(call)) if awaited else episode.run(call)
            assert lab.ran == []
            assert "tool.finished" not in lab.story(call)
            assert episode.run(a_call("ls", tool="sh")).ok

    def test_a_refused_call_of_another_profile_is_refused(self, lab):
        """A model that tries is no mistake of the program."""
        with lab.station() as station, station.episode("rollout") as episode:
            assert episode.run(a_call("import os")).status == "denied"
            assert episode.run(a_call("1", tool="unheard-of")).status == "denied"

    def test_a_closed_episode_runs_nothing(self, lab):
        """The call is recorded as lost; closing twice is fine."""
        with lab.station() as station:
            with station.episode("rollout") as episode:
                assert episode.run(a_call("ls", tool="sh")).ok
            episode.close()
            call = a_call("ls", tool="sh")
            with pytest.raises(SandboxUnavailableError, match="the episode is over"):
                episode.run(call)
            assert lab.story(call) == ["tool.decided", "tool.lost"]
            assert len(lab.ran) == 1

    def test_a_profile_that_no_rule_names(self, lab):
        """There are no cells of it."""
        with lab.station() as station, pytest.raises(UsageError, match="in 'elsewhere'; there are offline, rollout"):
            station.episode("elsewhere")

    def test_cancelling_a_call_ends_its_episode_and_no_other(self, lab):
        """Nobody knows what state a cell is in whose call was killed."""

        async def go():
            one, two = station.episode("rollout"), station.episode("rollout")
            call = a_call("ls", tool="sh")
            task = asyncio.create_task(one.arun(call))
            await until(lambda: lab.runtimes["episode"].blocked)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert lab.story(call) == ["tool.decided", "tool.lost"]
            lab.runtimes["episode"].free.set()
            with pytest.raises(SandboxUnavailableError, match=f"the episode is over: {GONE}"):
                await one.arun(a_call("ls", tool="sh"))
            assert (await two.arun(a_call("ls", tool="sh"))).ok

        with lab.held().station() as station:
            bounded(go())

    def test_a_cycle_lends_one_too(self, lab):
        """Its tools share a cell, their records carry the cycle, and `map` goes one after the other."""
        at_once, most = [], []

        def respond(call):
            at_once.append(call.id)
            most.append(len(at_once))
            time.sleep(0.005)
            at_once.remove(call.id)
            return call.code

        lab.respond = respond
        with lab.guard() as guard:
            cycle = next(guard.cycles(1))
            with cycle.episode("rollout") as episode:
                shell, program = episode.tool("sh"), episode.tool("exec")
                assert [outcome.text for outcome in shell.map("abcd")] == list("abcd")
                assert program("{}").ok
                assert bounded(shell.acall("e")).text == "e"
                with pytest.raises(UsageError, match="sandbox profile 'offline'"):
                    episode.tool("python")("1")
            with pytest.raises(SandboxUnavailableError, match="the episode is over"):
                shell("f")
        assert max(most) == 1
        assert {entry.cycle for entry in lab.events("tool.decided", "tool.finished", "tool.lost")} == {1}

    def test_a_frozen_loop_lends_none(self, lab):
        """The loop hears of the freeze, as at every gate."""
        with lab.guard() as guard:
            cycle = next(guard.cycles(1))
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            assert cycle.tool("python")("1").status == "denied"
            with pytest.raises(LoopFrozen, match="looks wrong"):
                cycle.episode("rollout")

    def test_a_discarded_cycle_refuses(self, lab):
        """After a freeze and a resume its tools and episodes are over, while those of the next one work."""
        with lab.guard() as guard:
            old = next(guard.cycles(1))
            tool, episode = old.tool("python"), old.episode("rollout")
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            with pytest.raises(LoopFrozen):
                old.admit([])
            submit(lab.run_dir, "resume", by="dana", reason="it was nothing")
            new = next(guard.cycles(1))
            refused = [tool("1"), bounded(tool.acall("1")), episode.tool("sh")("ls"), *tool.map(["1"] * 3)]
            assert {outcome.status for outcome in refused} == {"denied"}
            assert lab.ran == []
            assert new.tool("python")("1").ok
            with new.episode("rollout") as lent:
                assert lent.tool("sh")("ls").ok


def test_the_shipped_fakes_can_be_awaited_and_lend_episodes(lab):
    """A test of a loop needs nothing but `fake_runtimes`."""
    with ToolStation.open(lab.policy, run_dir=lab.run_dir, runtimes=fake_runtimes("42")) as station:
        assert bounded(station.arun(a_call())).text == "42"
        with station.episode("rollout") as episode:
            assert bounded(episode.arun(a_call("ls", tool="sh"))).text == "42"


class TestCallsThatAFreezeFinds:
    """Each tool says whether its calls are ended, or come to their own end."""

    def drained(self, lab, **freezes):
        lab.policy.write_text(
            POLICY.replace("tool: sh, then: run, sandbox: rollout", "tool: sh, then: run, sandbox: offline")
        )
        for tool, word in freezes.items():
            text = lab.policy.read_text()
            lab.policy.write_text(
                text.replace(f"tool: {tool}, then: run,", f"tool: {tool}, then: run, on_freeze: {word},")
            )
        lab.held()
        with lab.guard() as guard, ThreadPoolExecutor(2) as threads:
            runtime = lab.runtimes["pooled"]
            calls = [a_call(tool="python"), a_call(tool="sh")]
            jobs = [threads.submit(guard._calls.run, [call], cycle=1) for call in calls]
            while len(runtime.blocked) < 2:
                time.sleep(0.005)
            guard._freeze(Decision(result="freeze", gate="operator", rule="request", reason="stop"), cycle=1)
            runtime.free.set()
            ends = [job.exception(timeout=20) for job in jobs]
        return calls, ["killed" if end else "came back" for end in ends]

    def test_one_is_killed_and_the_other_comes_back(self, lab):
        calls, ends = self.drained(lab, sh="drain")
        assert ends == ["killed", "came back"]
        assert [lab.story(call)[-1] for call in calls] == ["tool.lost", "tool.finished"]

    def test_without_a_word_both_are_killed(self, lab):
        assert self.drained(lab)[1] == ["killed", "killed"]
