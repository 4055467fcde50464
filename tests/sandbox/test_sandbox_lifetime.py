"""How long cells live: recycling, freezes, dead controllers, forks, sweeping. In real containers."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_kit import IMAGE, Bench, cells, controller, until

from loopguard.errors import CallError, SandboxUnavailableError
from loopguard.sandbox import owner
from loopguard.sandbox.docker import DEADLINE, OWNER
from loopguard.sandbox.reaper import reap

pytestmark = pytest.mark.docker


def docker(*words: str) -> str:
    """What the docker command printed."""
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def running(run_id: str) -> list[str]:
    """The names of a run's containers that still run."""
    return [each["Names"][0] for each in cells(run_id) if each["State"] == "running"]


def open_descriptors(run_id: str) -> int:
    """How many descriptors PID 1 of a run's only cell holds, seen from the host."""
    pid = docker("inspect", "--format", "{{.State.Pid}}", cells(run_id)[0]["Id"])
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class TestPool:
    def test_three_hundred_calls_leave_no_trace(self):
        """One cell, all calls fine, no descriptor more in PID 1 afterwards, no cell removed before the end."""
        with Bench() as bench:
            bench.text("print(1)")
            local = os.geteuid() == 0 and Path("/var/run/docker.sock").exists()
            before = open_descriptors(bench.run_id) if local else 0
            for number in range(300):
                assert bench.text(f"print({number})") == str(number)
            assert (open_descriptors(bench.run_id) if local else 0) == before
            assert bench.reasons() == []
        assert cells(bench.run_id) == []
        assert bench.reasons() == ["closed"]

    def test_eight_threads_share_two_cells(self):
        """More callers than cells: everybody gets the own answer, and both cells last."""
        with Bench(cells=2) as bench:
            with ThreadPoolExecutor(8) as threads:
                answers = list(threads.map(lambda n: bench.text(f"print({n} ** 2)"), range(120)))
            assert answers == [str(n**2) for n in range(120)]
            assert bench.reasons() == []
            assert len(cells(bench.run_id)) == 2

    def test_a_fresh_cell_for_each_call(self):
        """Mode `fresh`: no cell sees two calls."""
        with Bench(mode="fresh", cells=2) as bench:
            for _ in range(4):
                assert bench.text("import os; print(os.getuid())")
            assert until(lambda: len(bench.reasons()) == 4)
        assert all(body["calls"] <= 1 for name, body in bench.events if name == "sandbox.removed")

    def test_a_cell_is_recycled_after_its_calls(self):
        """The policy's `calls_per_cell` holds."""
        with Bench(calls_per_cell=3) as bench:
            for _ in range(7):
                bench.text("print(1)")
            assert until(lambda: bench.reasons() == ["recycled", "recycled"])

    def test_preloaded_modules_are_there_and_seeded(self):
        """numpy, where the policy preloads it, draws other numbers in each call."""
        with Bench(preload=("numpy",)) as bench:
            assert bench.text("import sys; print('numpy' in sys.modules)") == "True"
            assert len({bench.text("import numpy; print(numpy.random.rand())") for _ in range(3)}) == 3
            code = "import numpy as np; print(int((np.ones((300, 300)) @ np.ones((300, 300)))[0, 0]))"
            assert bench.text(code) == "300"

    def test_a_module_that_is_not_in_the_image_is_named(self):
        """A wrong `preload` fails at the start, with the name."""
        bench = Bench(preload=("no_such_module",))
        with pytest.raises(SandboxUnavailableError, match="module no_such_module cannot be preloaded"):
            bench.runtime.start()
        assert until(lambda: not cells(bench.run_id))

    def test_a_cell_that_died_while_idle_costs_nobody_a_call(self):
        """An idle container that somebody removed is replaced before a call could meet it."""
        with Bench() as bench:
            bench.text("print(1)")
            docker("kill", cells(bench.run_id)[0]["Id"])
            assert bench.text("print('fine')") == "fine"
            assert until(lambda: bench.reasons() == ["lost"])

    def test_a_cell_that_dies_under_a_call_is_no_result(self):
        """The call raises; it is not tried again, and the next one goes to a new cell."""
        with Bench() as bench, ThreadPoolExecutor(1) as threads:
            call = threads.submit(bench.run, "import time; time.sleep(60)")
            assert until(lambda: len(bench.runtime._pool._taken) == 1)
            docker("kill", cells(bench.run_id)[0]["Id"])
            with pytest.raises(SandboxUnavailableError, match="died under a call"):
                call.result(timeout=60)
            assert bench.text("print('fine')") == "fine"

    def test_what_was_applied_is_told(self):
        """Facts and the event name engine, image and runtime."""
        with Bench() as bench:
            facts = bench.runtime.facts()
            assert facts["runtime"] == "runc"
            assert facts["image_id"].startswith("sha256:")
            (name, body), *_ = bench.events
            assert name == "sandbox.created"
            assert body["image"] == IMAGE
            assert body["counters"] == {"oom": 0, "pids": 0}


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"runtime": "runsc"}, "asks for the runtime runsc, this engine has"),
            ({"image": "loopguard/nothing:9"}, "loopguard/nothing:9 is not here: run `loopguard sandbox build`"),
        ],
    )
    def test_what_the_engine_does_not_have(self, changes, message):
        """A start without the runtime or the image says what to do."""
        with pytest.raises(SandboxUnavailableError, match=message):
            Bench(**changes).runtime.start()

    @pytest.mark.parametrize("where", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:1"])
    def test_an_engine_that_is_not_there(self, monkeypatch, where):
        """One line with the address, the reason and the way out."""
        monkeypatch.setenv("DOCKER_HOST", where)
        with pytest.raises(SandboxUnavailableError, match="no Docker engine answers at .*: start Docker") as raised:
            Bench().runtime.start()
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 200

    def test_the_context_in_use_is_followed(self, monkeypatch, tmp_path):
        """Without DOCKER_HOST the engine is looked for where the docker command would look."""
        name = "elsewhere"
        folder = tmp_path / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest()
        folder.mkdir(parents=True)
        endpoints = {"docker": {"Host": "unix:///nowhere/context.sock", "SkipTLSVerify": False}}
        (folder / "meta.json").write_text(json.dumps({"Name": name, "Metadata": {}, "Endpoints": endpoints}))
        (tmp_path / "config.json").write_text("{}")
        monkeypatch.delenv("DOCKER_HOST", raising=False)
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        monkeypatch.setenv("DOCKER_CONTEXT", name)
        with pytest.raises(SandboxUnavailableError, match="no Docker engine answers at unix:///nowhere/context.sock"):
            Bench().runtime.start()
        monkeypatch.setenv("DOCKER_CONTEXT", "no-such-context")
        with pytest.raises(SandboxUnavailableError, match="context in use does not exist"):
            Bench().runtime.start()

    def test_an_unknown_tool(self, bench):
        """A tool that no cell can run is refused before a cell is touched."""
        with pytest.raises(CallError, match="no cell can run the tool 'perl'; there are exec, python, sh"):
            bench.run("print 1", tool="perl")

    def test_a_log_that_cannot_be_written_leaves_no_container(self):
        """Where nobody can record that a cell came to be, it is taken down again."""
        bench = Bench()

        def broken(name, body):
            raise OSError("disk full")

        bench.runtime._on_event = broken
        with pytest.raises(SandboxUnavailableError, match="disk full"):
            bench.runtime.start()
        assert until(lambda: not cells(bench.run_id))


class TestFreeze:
    def test_running_calls_are_killed(self):
        """`kill_running` ends what runs and what waits; the runtime goes on afterwards."""
        with Bench() as bench:
            errors = []

            def go() -> None:
                try:
                    bench.run("import time; time.sleep(60)")
                except SandboxUnavailableError as error:
                    errors.append(str(error))

            threads = [threading.Thread(target=go) for _ in range(3)]
            for thread in threads:
                thread.start()
            pool = bench.runtime._pool
            assert until(lambda: len(pool._taken) == 1 and len(pool._waiting) == 2)
            assert bench.runtime.kill_running() == 3
            for thread in threads:
                thread.join()
            assert errors == ["the call was killed by a freeze"] * 3
            assert bench.text("print('fine')") == "fine"


class TestDeadOwners:
    def test_cells_of_a_killed_controller_go_by_themselves(self):
        """After SIGKILL with calls in flight nothing of it is left: no reaper, also where a forked child lives on."""
        process = controller(
            "child = os.fork()\nif child == 0:\n    time.sleep(60)\n    os._exit(0)\n"
            "print(bench.run_id, child, bench.text('print(7)'), flush=True)\ntime.sleep(60)"
        )
        run_id, child, seven = process.stdout.readline().split()
        ours = cells(run_id)
        try:
            assert (len(ours), seven) == (1, "7")
            process.kill()
            process.wait()
            assert until(lambda: not cells(run_id), within_s=10)
        finally:
            os.kill(int(child), signal.SIGKILL)
            process.stdout.close()

    def test_eight_calls_in_flight_at_the_time_of_a_kill(self):
        """kill -9 among eight running calls: ten seconds later no container of the eight is there."""
        process = controller(
            "import threading\n"
            "for _ in range(8):\n"
            "    threading.Thread(target=bench.run, args=('import time; time.sleep(60)',), daemon=True).start()\n"
            "assert until(lambda: len(bench.runtime._pool._taken) == 8, within_s=120)\n"
            "print(bench.run_id, flush=True)\ntime.sleep(60)",
            options="cells=8, wall_s=60",
        )
        try:
            run_id = process.stdout.readline().strip()
            assert len(cells(run_id)) == 8
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        assert until(lambda: not cells(run_id), within_s=10)

    def test_a_forked_child_disturbs_nobody(self):
        """A child that ends in the ordinary way takes no cell of its parent with it, and cannot use one."""
        process = controller(
            "child = os.fork()\nif child == 0:\n    try:\n        bench.run('print(1)')\n"
            "    except Exception as error:\n        print(error, bench.runtime.kill_running(), flush=True)\n"
            "    bench.runtime.close()\n    sys.exit(0)\n"
            "os.waitpid(child, 0)\nprint(bench.text('print(7)'), bench.reasons(), flush=True)"
        )
        out, _ = process.communicate(timeout=60)
        assert out.splitlines() == [
            "this is a forked process: a sandbox belongs to the process that started it 0",
            "7 []",
        ]
        assert process.returncode == 0

    def test_an_ordinary_end_without_close_leaves_nothing(self):
        """A program that forgets to close its runtime leaves no container behind."""
        process = controller("bench.__class__.__exit__ = lambda *_: None\nprint(bench.run_id, flush=True)")
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert cells(out.strip()) == []

    def test_cells_of_others_are_left_alone(self):
        """Those of living owners, of other machines, and containers without our labels; a passed deadline is not enough
        of an excuse to spare one."""
        made = {}
        for name, labels in {
            "alive": {OWNER: owner.me(), DEADLINE: "99999999999"},
            "elsewhere": {OWNER: "elsewhere:1:1", DEADLINE: "99999999999"},
            "unlabelled": {"unrelated": "yes"},
            "overdue": {OWNER: "elsewhere:1:1", DEADLINE: "5"},
        }.items():
            words = [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
            made[name] = docker("create", "--network", "none", *words, IMAGE, "true")
        try:
            reap()
            listed = docker("ps", "-aq", "--no-trunc")
            assert {name for name, each in made.items() if each in listed} == {"alive", "elsewhere", "unlabelled"}
        finally:
            del made["overdue"]
            docker("rm", "-f", *made.values())
