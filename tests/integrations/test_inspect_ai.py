"""The inspect_ai provider: what each of inspect's questions becomes, and what inspect is told of the answer."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import tomllib
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="this is about inspect_ai: pip install 'loopguard[inspect]'")

from inspect_ai.util import OutputLimitExceededError, SandboxUnavailableError, SandboxUserUnsupportedError
from inspect_ai.util._sandbox import self_check
from inspect_ai.util._sandbox.limits import override_max_exec_output_size, override_max_read_file_size
from inspect_ai.util._sandbox.registry import registry_find_sandboxenv

from loopguard import errors
from loopguard.audit import read
from loopguard.audit.verify import verify
from loopguard.integrations import inspect_ai as provider
from loopguard.integrations.inspect_ai import LoopGuardSandboxEnvironment
from loopguard.policy.load import shipped
from loopguard.state import run_facts, submit
from loopguard.testing import FakeRuntime, printed
from loopguard.types import Outcome

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "inspect_ai.md"
POLICY = """
apiVersion: loopguard/v1
name: agent
tools:
  rules:
    - {id: program, tool: exec, then: run, sandbox: rollout, refuse_patterns: [forbidden]}
sandbox:
  profiles:
    rollout:
      image: "loopguard/python:1"
      mode: episode
      cells: 1
      limits: {wall: 60s, memory: 256MiB, output: 64KiB, flood: 4MiB}
    offline: {image: "loopguard/python:1"}
data: {sources: [human, model]}
updates:
  loss_kind: discrete
  monitors:
    - {kind: bounds, metric: loss}
promotion:
  panel:
    - {metric: score, good: up, max_gain: 1, max_loss: 1}
"""


class Cells(FakeRuntime):
    """A fake runtime that notes how many calls it has at once, and lends a cell when `gate` is open."""

    def __init__(self, respond):
        super().__init__(respond)
        self.asked, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.episodes = []
        self.at_once = self.most_at_once = 0

    def episode(self):
        self.asked.set()
        assert self.gate.wait(20)
        self.episodes.append(super().episode())
        return self.episodes[-1]

    def run(self, call):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return super().run(call)
        finally:
            self.at_once -= 1


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return str(path)


@pytest.fixture
def cells(monkeypatch, tmp_path):
    """Fake cells under the provider, and a run directory that the test knows."""
    cells = Cells(lambda call: cells.answer(call))
    cells.answer = lambda call: printed(call, "42\n")
    monkeypatch.setattr(LoopGuardSandboxEnvironment, "_runtimes", lambda _spec, _run_id, _on_event: cells)
    monkeypatch.setenv("LOOPGUARD_RUN_DIR", str(tmp_path / "run"))
    yield cells
    assert LoopGuardSandboxEnvironment._open == {}, "a station was left open"


@asynccontextmanager
async def one_sample(config):
    """The environment of a sample, from the start of its task to the end."""
    kind = LoopGuardSandboxEnvironment
    await kind.task_init("startup", config)
    try:
        environments = await kind.sample_init("task", config, {})
        try:
            yield environments["default"]
        finally:
            await kind.sample_cleanup("task", config, environments, interrupted=False)
    finally:
        await kind.task_cleanup("shutdown", config, cleanup=True)


def in_sample(config, work):
    async def run():
        async with one_sample(config) as environment:
            return await work(environment)

    return asyncio.run(run())


def outcome(call, status, **more):
    for stream in ("stdout", "stderr"):
        more.setdefault(f"{stream}_bytes", len(more.get(stream, b"")))
    return Outcome(call_id=call.id, status=status, **more)


class TestExec:
    """Programs."""

    def test_becomes_a_recorded_call_of_the_tool_exec(self, policy, cells, tmp_path):
        """Program, environment, folder, input and time limit reach the cell as they are; the audit log has the call."""

        async def work(environment):
            return await environment.exec(
                ["printf", "%s", "é"], input="in\n", cwd="sub", env={"A": "1"}, timeout=7, timeout_retry=False
            )

        result = in_sample(policy, work)
        assert (result.success, result.returncode, result.stdout, result.stderr) == (True, 0, "42\n", "")
        (call,) = cells.calls
        assert call.tool == "exec"
        assert json.loads(call.code) == {"argv": ["printf", "%s", "é"], "env": {"A": "1"}, "cwd": "sub"}
        assert (call.stdin, call.wall_s) == (b"in\n", 7)
        types = [entry.type for entry in read.entries(tmp_path / "run")]
        assert types.count("tool.decided") == types.count("tool.finished") == 1

    @pytest.mark.parametrize(
        ("ended", "code", "stderr"),
        [
            ({"status": "nonzero_exit", "exit_code": 70}, 70, ""),
            ({"status": "nonzero_exit", "exit_code": 127, "stderr": b"x: No such file or directory\n"}, 127, None),
            ({"status": "nonzero_exit", "exit_code": 126, "stderr": b"sh: 1: x: Permission denied\n"}, 126, None),
            ({"status": "signal", "signal": 15}, 143, ""),
            ({"status": "oom", "signal": 9}, 137, "loopguard: ended at the memory limit of 256 MiB\n"),
            ({"status": "oom", "exit_code": 1, "stderr": b"MemoryError\n"}, 1, None),
            ({"status": "disk_limit", "exit_code": 1, "stderr": b"No space\xff\n"}, 1, "No space\ufffd\n"),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    def test_a_program_that_fails_is_a_result(self, policy, cells, ended, code, stderr):
        """Exit statuses are kept, signals are 128 and their number, and undecodable output is replaced."""
        cells.answer = lambda call: outcome(call, **ended)
        result = in_sample(policy, lambda environment: environment.exec(["x"]))
        assert (result.success, result.returncode) == (False, code)
        assert result.stderr == (ended["stderr"].decode() if stderr is None else stderr)

    def test_a_time_limit_is_a_timeout_error_with_what_was_printed(self, policy, cells):
        """Also where nobody asked for a time limit, since the policy has one; and the call is not made again."""
        cells.answer = lambda call: outcome(call, "timeout", stdout=b"so far\n")
        with pytest.raises(TimeoutError) as caught:
            in_sample(policy, lambda environment: environment.exec(["sleep", "99"]))
        assert caught.value.truncated_output == "so far\n"
        assert len(cells.calls) == 1

    def test_a_program_that_may_not_be_executed_is_a_permission_error(self, policy, cells):
        """Said by the cell itself; a program that exits with 126 and says something else is a result."""
        cells.answer = lambda call: outcome(
            call, "nonzero_exit", exit_code=126, stderr=b"/etc/passwd: Permission denied\n"
        )
        with pytest.raises(PermissionError, match="/etc/passwd"):
            in_sample(policy, lambda environment: environment.exec(["/etc/passwd"]))

    def test_a_refused_call_is_a_permission_error_and_reaches_no_cell(self, policy, cells):
        """No score is ever given to a refusal that looks like a program's output, and it names no rule."""
        with pytest.raises(PermissionError, match="not permitted") as caught:
            in_sample(policy, lambda environment: environment.exec(["echo", "forbidden"]))
        assert cells.calls == []
        assert "program" not in str(caught.value)

    def test_a_frozen_run_ends_the_sample(self, policy, cells, tmp_path):
        """A freeze is no tool error that a model may go on from."""

        async def work(environment):
            submit(tmp_path / "run", "freeze", by="dana", reason="the output looks odd")
            await environment.exec(["true"])

        with pytest.raises(errors.LoopFrozen, match="dana asked for it: the output looks odd"):
            in_sample(policy, work)
        assert cells.calls == []

    def test_a_dead_sandbox_is_no_output(self, policy, cells):
        """A cell that died under a call is inspect's SandboxUnavailableError."""
        cells.answer = lambda _: errors.SandboxUnavailableError("the cell died")
        with pytest.raises(SandboxUnavailableError, match="the cell died"):
            in_sample(policy, lambda environment: environment.exec(["true"]))

    @pytest.mark.parametrize("user", ["root", "0", "nobody"])
    def test_another_user_is_refused_without_a_call(self, policy, cells, user):
        with pytest.raises(SandboxUserUnsupportedError, match=user):
            in_sample(policy, lambda environment: environment.exec(["whoami"], user=user))
        assert cells.calls == []

    def test_output_that_was_cut_is_never_a_result(self, policy, cells):
        """What was kept is shown with its gap, and the limit that was reached is named."""
        cells.answer = lambda call: outcome(call, "ok", exit_code=0, stdout=b"headtail", stdout_bytes=1008)
        with pytest.raises(OutputLimitExceededError, match="limit of 64 KiB was exceeded") as caught:
            in_sample(policy, lambda environment: environment.exec(["yes"]))
        assert caught.value.truncated_output == "head\n[1000 bytes left out]\ntail"

    def test_a_flood_names_its_limit(self, policy, cells):
        cells.answer = lambda call: outcome(call, "output_limit", stdout=b"yy", stdout_bytes=1 << 22)
        with pytest.raises(OutputLimitExceededError, match="limit of 4 MiB was exceeded"):
            in_sample(policy, lambda environment: environment.exec(["yes"]))

    def test_inspects_own_output_limit_holds(self, policy, cells):
        """Where inspect allows less than the policy keeps, inspect's limit is the one that counts."""

        async def work(environment):
            with override_max_exec_output_size(2):
                await environment.exec(["echo", "42"])

        with pytest.raises(OutputLimitExceededError, match="limit of 2 bytes was exceeded"):
            in_sample(policy, work)

    def test_a_null_byte_is_said_in_the_words_that_inspect_knows(self, policy, cells):
        with pytest.raises(ValueError, match="embedded null byte"):
            in_sample(policy, lambda environment: environment.exec(["echo", "a\0b"]))
        assert cells.calls == []

    def test_calls_that_are_made_at_once_run_one_after_the_other(self, policy, cells):
        """A cell is not for two calls at the same time, and models make several."""

        async def work(environment):
            await asyncio.gather(*(environment.exec(["true"]) for _ in range(8)))

        in_sample(policy, work)
        assert (len(cells.calls), cells.most_at_once) == (8, 1)


def on_this_machine(place):
    """Answers calls as a cell would, for our own two file programs and nothing else."""

    def answer(call):
        argv = json.loads(call.code)["argv"]
        assert argv[:4] == ["python3", "-I", "-S", "-c"]
        assert argv[4].endswith((provider._READ, provider._WRITE))
        done = subprocess.run([sys.executable, *argv[1:]], input=call.stdin, cwd=place, capture_output=True, timeout=20)
        status = "nonzero_exit" if done.returncode else "ok"
        return outcome(call, status, exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr)

    return answer


class TestFiles:
    """Reading and writing, with the programs that do it in a cell."""

    @pytest.fixture
    def place(self, cells, tmp_path):
        place = tmp_path / "place"
        place.mkdir()
        cells.answer = on_this_machine(place)
        return place

    @pytest.mark.parametrize("contents", ["", "line\r\nline\n", b"\xc3\x28\0", b"x" * 200_001], ids=len)
    @pytest.mark.parametrize("name", ["plain", "a b/c'd\"/é \udce9", "-x", "new\nline"], ids=ascii)
    def test_what_is_written_is_read(self, policy, cells, place, contents, name):
        """Text and bytes, in as many parts as the policy's output limit makes it, under names of all kinds."""

        async def work(environment):
            await environment.write_file(name, "something longer that was there before" * 10_000)
            await environment.write_file(name, contents)
            return await environment.read_file(name, text=isinstance(contents, str))

        assert in_sample(policy, work) == contents
        assert (place / name).exists()

    def test_a_file_is_written_in_parts(self, policy, cells, place, monkeypatch):
        monkeypatch.setattr(provider, "_PART", 10)
        in_sample(policy, lambda environment: environment.write_file("f", "0123456789" * 3 + "end"))
        assert (place / "f").read_text() == "0123456789" * 3 + "end"
        assert [len(call.stdin) for call in cells.calls] == [10, 10, 10, 3]

    @pytest.mark.parametrize(
        ("name", "error", "words"),
        [
            ("absent", FileNotFoundError, "absent"),
            ("file/below", FileNotFoundError, "below"),
            ("x" * 5000, FileNotFoundError, "xxx"),
            ("folder", IsADirectoryError, "directory"),
            ("pipe", OSError, "pipe"),
            ("/dev/zero", OSError, "/dev/zero"),
            ("binary", UnicodeDecodeError, "utf-8"),
            ("a\0b", ValueError, "embedded null byte"),
        ],
        ids=lambda value: value[:20] if isinstance(value, str) else None,
    )
    def test_what_cannot_be_read_says_why(self, policy, cells, place, name, error, words):
        """Each in the exception that inspect documents, and none of them waits for a writer that never comes."""
        (place / "folder").mkdir()
        (place / "file").touch()
        (place / "binary").write_bytes(b"\xff")
        os.mkfifo(place / "pipe")
        with pytest.raises(error, match=words) as caught:
            in_sample(policy, lambda environment: environment.read_file(name))
        assert isinstance(caught.value, error)

    @pytest.mark.parametrize(
        ("said", "error"),
        [(b"EACCES", PermissionError), (b"EROFS", PermissionError), (b"EPERM", PermissionError), (b"ENOSPC", OSError)],
    )
    def test_what_cannot_be_written_says_why(self, policy, cells, said, error):
        cells.answer = lambda call: outcome(call, "nonzero_exit", exit_code=1, stderr=said)
        with pytest.raises(error, match="/somewhere"):
            in_sample(policy, lambda environment: environment.write_file("/somewhere", "x"))

    def test_a_folder_cannot_be_overwritten(self, policy, cells, place):
        (place / "folder").mkdir()
        with pytest.raises(IsADirectoryError, match="directory"):
            in_sample(policy, lambda environment: environment.write_file("folder", "x"))

    def test_inspects_limit_holds_and_is_noticed_early(self, policy, cells, place):
        """A file that is too large is told as such by its first part."""
        (place / "large").write_bytes(b"x" * 1_000_000)

        async def work(environment):
            with override_max_read_file_size(200_000):
                await environment.read_file("large")

        with pytest.raises(OutputLimitExceededError, match="limit of 200000 bytes was exceeded"):
            in_sample(policy, work)
        assert len(cells.calls) == 1

    def test_a_file_of_exactly_the_limit_is_read(self, policy, cells, place):
        (place / "f").write_bytes(b"x" * 1000)

        async def work(environment):
            with override_max_read_file_size(1000):
                return await environment.read_file("f")

        assert in_sample(policy, work) == "x" * 1000

    def test_a_file_that_changes_all_the_time_is_an_error_and_never_a_mixture(self, policy, cells, place):
        answer = on_this_machine(place)

        def changing(call):
            (place / "log").write_text(str(len(cells.calls)) * 100_000)
            return answer(call)

        cells.answer = changing
        with pytest.raises(OSError, match="changed while it was read"):
            in_sample(policy, lambda environment: environment.read_file("log"))

    def test_a_module_beside_the_files_is_not_imported(self, policy, cells, place):
        """A rollout that leaves an `os.py` and an `errno.py` does not answer for the file programs."""
        for name in ("os.py", "errno.py", "stat.py"):
            (place / name).write_text("raise SystemExit(3)")
        (place / "f").write_text("true")
        assert in_sample(policy, lambda environment: environment.read_file("f")) == "true"

    def test_the_log_and_the_rules_see_whose_file_it_is(self, policy, cells, place, tmp_path):
        """The name stands in the first characters of what is recorded, and a pattern of a rule can refuse it."""

        async def work(environment):
            await environment.write_file("notes.txt", "x")
            await environment.read_file("forbidden.txt")

        with pytest.raises(PermissionError):
            in_sample(policy, work)
        heads = [entry.body["code_head"] for entry in read.entries(tmp_path / "run", types=("tool.decided",))]
        assert ["notes.txt" in heads[0], "forbidden.txt" in heads[1]] == [True, True]
        assert len(cells.calls) == 1

    @pytest.mark.parametrize("said", [b"", b"\xff\n", b"99 zz", b"9" * 5000, b"ok"])
    def test_whatever_a_cell_says_is_one_error(self, policy, cells, said):
        cells.answer = lambda call: outcome(call, "signal", signal=9, stderr=said)
        with pytest.raises(OSError, match="could not do it"):
            in_sample(policy, lambda environment: environment.read_file("f"))


class TestLifetimes:
    """Stations, episodes and run directories."""

    def test_tasks_with_one_policy_share_a_station_until_the_last_ends(self, policy, cells):
        async def run():
            kind = LoopGuardSandboxEnvironment
            await kind.task_init("startup", policy)
            await kind.task_init("startup", policy)
            await kind.task_cleanup("shutdown", policy, cleanup=True)
            running = not cells.closed
            await kind.task_cleanup("shutdown", policy, cleanup=False)
            return running, cells.closed

        assert asyncio.run(run()) == (True, True)

    def test_a_sample_waits_for_a_cell_until_one_is_free(self, policy, cells):
        """There are as many episodes as the profile has cells, and one that is cancelled while it waits takes none."""

        async def run():
            kind = LoopGuardSandboxEnvironment
            await kind.task_init("startup", policy)
            first = await kind.sample_init("task", policy, {})
            cancelled, waiting = (asyncio.create_task(kind.sample_init("task", policy, {})) for _ in range(2))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            seen = len(cells.episodes)
            await kind.sample_cleanup("task", policy, first, interrupted=True)
            second = await asyncio.wait_for(waiting, 10)
            await kind.sample_cleanup("task", policy, second, interrupted=False)
            await kind.task_cleanup("shutdown", policy, cleanup=True)
            return seen, len(cells.episodes)

        assert asyncio.run(run()) == (1, 2)
        assert [episode.closed for episode in cells.episodes] == [True, True]

    def test_a_sample_that_is_cancelled_while_its_cell_is_made_keeps_none(self, policy, cells):
        async def run():
            kind = LoopGuardSandboxEnvironment
            await kind.task_init("startup", policy)
            cells.gate.clear()
            starting = asyncio.create_task(kind.sample_init("task", policy, {}))
            await asyncio.to_thread(cells.asked.wait, 10)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            cells.gate.set()
            second = await asyncio.wait_for(kind.sample_init("task", policy, {}), 10)
            await kind.sample_cleanup("task", policy, second, interrupted=False)
            await kind.task_cleanup("shutdown", policy, cleanup=True)

        asyncio.run(run())
        assert [episode.closed for episode in cells.episodes] == [True, True]

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("mode: episode", "mode: pooled", "rollout.mode is 'pooled'; expected episode, since rule program"),
            ("tool: exec", "tool: python", "no rule lets the tool exec run"),
        ],
    )
    def test_a_policy_without_a_cell_to_keep_is_refused_before_anything_is_made(
        self, policy, cells, tmp_path, old, new, words
    ):
        Path(policy).write_text(POLICY.replace(old, new))
        with pytest.raises(errors.PolicyError, match=words):
            asyncio.run(LoopGuardSandboxEnvironment.task_init("startup", policy))
        assert not (tmp_path / "run").exists()

    def test_without_a_name_the_run_directory_is_new_and_where_inspect_was_started(self, monkeypatch, tmp_path):
        """Not where inspect happens to stand while it starts a task."""
        monkeypatch.delenv("LOOPGUARD_RUN_DIR", raising=False)
        started_in = Path.cwd()
        monkeypatch.chdir(tmp_path)
        first, second = provider._run_dir(), provider._run_dir()
        assert first.parent == started_in / "runs"
        assert first.name.startswith("inspect-")
        assert first != second

    def test_calls_are_named_after_their_sample(self, policy, cells):
        """Two runs of one sample can be told apart, and a strange name is made a plain one."""

        async def run():
            kind = LoopGuardSandboxEnvironment
            await kind.task_init("startup", policy)
            for sample in (17, 17, "../é x"):
                environments = await kind.sample_init("task", policy, {"__sample_id__": sample})
                await environments["default"].exec(["true"])
                await environments["default"].exec(["true"])
                await kind.sample_cleanup("task", policy, environments, interrupted=False)
            await kind.task_cleanup("shutdown", policy, cleanup=True)

        asyncio.run(run())
        names = [call.id.rsplit("-", 2) for call in cells.calls]
        assert [(sample, number) for sample, _, number in names] == [
            *[("17", "1"), ("17", "2")] * 2,
            *[("..___x", "1"), ("..___x", "2")],
        ]
        assert len({run for _, run, _ in names}) == 3

    def test_there_is_no_way_in(self, policy, cells):
        with pytest.raises(NotImplementedError, match="no way into a cell"):
            in_sample(policy, lambda environment: environment.connection())

    def test_a_configuration_that_is_no_file_is_refused(self):
        with pytest.raises(errors.UsageError, match="guard policy"):
            LoopGuardSandboxEnvironment.config_deserialize({"image": "x"})

    def test_inspect_finds_it_by_its_name(self):
        """The entry point names a module that registers the provider when it is loaded."""
        entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
        importlib.import_module(entry["loopguard"])
        assert registry_find_sandboxenv("loopguard") is LoopGuardSandboxEnvironment

    def test_the_policy_that_ships_is_one_it_takes(self):
        loaded = provider.load(shipped("agent"))
        assert provider._profile_of(loaded.policy, path=loaded.path) in loaded.policy.sandbox.profiles


MODEL_WITH_TOOLS = """
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash, python

shell = "cat given.txt set-up > note; id -u; ls given.txt; wc -l < /proc/net/dev"
outputs = [
    ModelOutput.for_tool_call("mockllm/model", "bash", {"command": shell}),
    ModelOutput.for_tool_call("mockllm/model", "python", {"code": "print(open('note').read().upper())"}),
    ModelOutput.from_content("mockllm/model", "done"),
]
for output in outputs:
    output.usage = ModelUsage()  # counted by inspect otherwise, with a table that it fetches from the network
task = Task(
    dataset=[Sample(input="go", files={"given.txt": "from the sample "}, setup="echo set-up > set-up")],
    solver=[use_tools(bash(timeout=30), python(timeout=30)), generate()],
    sandbox="loopguard",
)
[log] = eval(task, model=get_model("mockllm/model", custom_outputs=outputs), display="none")
"""
MODEL_WITH_A_SESSION = """
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash_session, text_editor

calls = [
    ("bash_session", {"action": "type_submit", "input": "cd /tmp; number=41"}),
    ("bash_session", {"action": "type_submit", "input": "echo it is $((number + 1)) in $PWD"}),
    ("text_editor", {"command": "create", "path": "/tmp/note", "file_text": "in a host\\n"}),
    ("text_editor", {"command": "str_replace", "path": "/tmp/note", "old_str": "host", "new_str": "cell"}),
    ("text_editor", {"command": "view", "path": "/tmp/note"}),
]
outputs = [ModelOutput.for_tool_call("mockllm/model", *call) for call in calls]
outputs.append(ModelOutput.from_content("mockllm/model", "done"))
for output in outputs:
    output.usage = ModelUsage()
task = Task(
    dataset=[Sample(input="go")],
    solver=[use_tools(bash_session(), text_editor()), generate()],
    sandbox=("loopguard", "policy.yaml"),
)
[log] = eval(task, model=get_model("mockllm/model", custom_outputs=outputs), display="none")
"""
AROUND = """
import json
import loopguard.integrations.inspect_ai
{}
tools = [message for sample in log.samples or [] for message in sample.messages if message.role == "tool"]
told = [message.error.message if message.error else message.text for message in tools]
scores = log.results.scores if log.results else []
accuracy = scores[0].metrics["accuracy"].value if scores else None
print(json.dumps({{"status": log.status, "error": str(log.error), "told": told, "accuracy": accuracy}}))
"""


def evaluate(script, place):
    """What an evaluation came to, in a process of its own: inspect leaves streams behind that it never closes."""
    environment = os.environ | {"LOOPGUARD_RUN_DIR": str(place / "run"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AROUND.format(script)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def documented(start):
    """An indented block of the documentation, by how it starts."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n{start}")
    return textwrap.dedent(f"{start}{rest}".split("\n\n", 1)[0]) + "\n"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """One environment for all of the suite, as inspect's own runner has it."""
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        folder = tmp_path_factory.mktemp("inspect")
        patch.setenv("LOOPGUARD_RUN_DIR", str(folder / "run"))
        policy = folder / "policy.yaml"
        # The suite passes a megabyte of arguments, of which the policy that ships takes a quarter.
        policy.write_text(shipped("agent").read_text(encoding="utf-8").replace("      max_code_bytes: 262144\n", ""))
        opened = one_sample(str(policy))
        environment = runner.run(opened.__aenter__())
        yield lambda check: runner.run(check(environment))
        runner.run(opened.__aexit__(None, None, None))


@pytest.mark.docker
class TestInCells:
    """The real thing."""

    @pytest.mark.parametrize("name", sorted(self_check.__all__))
    def test_inspects_conformance_suite(self, sample, name, request):
        """All of it but what takes a second user."""
        if name == "test_exec_as_user":
            request.applymarker(pytest.mark.xfail(raises=SandboxUserUnsupportedError, strict=True))
        sample(getattr(self_check, name))

    def test_a_model_uses_inspects_tools_in_its_cell(self, tmp_path):
        """What `bash` wrote `python` reads, the sample's file is there, and the audit log has it all and verifies."""
        said = evaluate(MODEL_WITH_TOOLS, tmp_path)
        assert said["status"] == "success", said
        first, second = said["told"]
        user, note, interfaces = first.split()
        assert user != "0"
        assert (note, interfaces) == ("given.txt", "3")  # two lines of header, and the loopback
        assert second.split() == ["FROM", "THE", "SAMPLE", "SET-UP"]
        decided = list(read.entries(tmp_path / "run", types=("tool.decided",)))
        assert sum("cat given.txt" in entry.body["code_head"] for entry in decided) == 1
        assert verify(tmp_path / "run").status in {"ok", "unanchored"}
        mine = f"label=loopguard.run={run_facts(tmp_path / 'run')['id']}"
        left = subprocess.run(["docker", "ps", "-aq", "--filter", mine], capture_output=True, timeout=20, check=True)
        assert left.stdout == b""

    def test_a_model_keeps_a_session_in_an_image_that_is_made_for_it(self, tmp_path):
        """The image and the profile of the documentation are all that inspect's own server in the cell needs."""
        image = f"loopguard/test-session:{os.getpid()}"
        (tmp_path / "Dockerfile").write_text(documented("    FROM "))
        build = ["docker", "build", "--network", "none", "-q", "-t", image, "."]
        subprocess.run(build, cwd=tmp_path, capture_output=True, timeout=100, check=True)
        try:
            profile = f"    rollout:\n      image: {image}\n" + textwrap.indent(documented("    mode: "), " " * 6)
            (tmp_path / "policy.yaml").write_text(re.sub(r"    rollout:\n( {6}.*\n)*", profile, POLICY))
            said = evaluate(MODEL_WITH_A_SESSION, tmp_path)
        finally:
            subprocess.run(["docker", "rmi", "-f", image], capture_output=True, timeout=60, check=False)
        assert said["status"] == "success", said
        assert "it is 42 in /tmp" in said["told"][1]
        assert "in a cell" in said["told"][4]

    def test_the_example_of_the_documentation_runs(self, tmp_path):
        """As it stands there, without a key and without a network."""
        example = PAGE.read_text(encoding="utf-8").split("```python\n", 1)[1].split("```", 1)[0]
        (tmp_path / "primes.py").write_text(example)
        script = 'from inspect_ai import eval\n[log] = eval("primes.py", model="mockllm/model", display="none")'
        said = evaluate(script, tmp_path)
        assert (said["status"], said["accuracy"]) == ("success", 1.0), said

    def test_what_runs_in_the_background_lives_on(self, sample):
        """A server that one call starts answers the next one."""

        async def work(environment):
            server = "import socket; s = socket.create_server(('127.0.0.1', 8000)); s.accept()[0].sendall(b'hello')"
            await environment.write_file("server.py", server)
            await environment.exec(["sh", "-c", "nohup python3 server.py >/dev/null 2>&1 &"])
            client = "import socket, time; time.sleep(1); print(socket.create_connection(('127.0.0.1', 8000)).recv(9))"
            return await environment.exec(["python3", "-c", client])

        assert sample(work).stdout == "b'hello'\n"

    def test_a_cancelled_call_ends_and_takes_its_cell_with_it(self, tmp_path, monkeypatch):
        """Whoever goes on in that sample is told at once that there is no cell."""
        monkeypatch.setenv("LOOPGUARD_RUN_DIR", str(tmp_path / "run"))

        async def work(environment):
            running = asyncio.create_task(environment.exec(["sleep", "50"]))
            await asyncio.sleep(1)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            with pytest.raises(SandboxUnavailableError):
                await asyncio.wait_for(environment.exec(["true"]), 5)

        in_sample(None, work)
