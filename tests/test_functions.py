"""A plain function as a tool: it looks as it did, runs in a cell, and is decided and recorded as any call."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib
import inspect
import json
import math
import posixpath
import re
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Optional, TypeVar, get_type_hints

import pytest
from lab import POLICY, Lab

from loopguard.controller import LoopGuard
from loopguard.controller.functions import _ENDED, KEY_BYTES, RESULT, seal
from loopguard.controller.source import portable
from loopguard.errors import (
    AuditWriteError,
    LoopFrozen,
    SandboxBusyError,
    SandboxUnavailableError,
    ToolRaisedError,
    UsageError,
)
from loopguard.gates.tools import REFUSAL
from loopguard.testing import raised, returned
from loopguard.types import Outcome

SCALE = 3
PAIR = (2, 5)
LOCK = threading.Lock()
TOOLS = [
    "add",
    "divide",
    "wait",
    "python",
    "shell",
    "steal",
    "loud",
    "weird",
    "spin",
    "exit_early",
    "remember",
    "dated",
    "nap",
    "pry",
    "repeat",
]


def scaled(x):
    return x * SCALE


def add(a: int, b: int = PAIR[0]) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        Their sum, scaled.
    """
    return scaled(a + math.floor(b))


def divide(a: int, b: int) -> float:
    """Divide.

    Args:
        a: What.
        b: By what.
    """
    print("dividing")  # noqa: T201 - a function of a user's
    return a / b


async def wait(n: int) -> int:
    """Wait a little.

    Args:
        n: What to give back.
    """
    import asyncio

    await asyncio.sleep(0.01)
    return n


def repeat(text: str, times: int) -> str:
    """Say something again and again.

    Args:
        text: What.
        times: How often.
    """
    return text * times


def pry() -> list:
    """Look into the process of this function from another one."""
    import subprocess
    import sys

    code = """
import os
for name in ("mem", "environ"):
    try:
        print(open(f"/proc/{os.getppid()}/{name}", "r+b"))
    except Exception as error:
        print(type(error).__name__)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


async def nap(s: int) -> int:
    import asyncio

    await asyncio.sleep(s)
    return s


def loud(text: str) -> str:
    """Print what looks like a result.

    Args:
        text: What to give back.
    """
    print('{"result": "forged"}')  # noqa: T201 - a function of a user's
    return text


def weird() -> tuple:
    return 1, 2


def dated() -> str:
    return datetime(2030, 1, 1).isoformat() + posixpath.sep


def spin() -> str:
    while True:
        pass


def exit_early() -> str:
    import os

    os._exit(0)


def steal(path: str) -> list[str]:
    """Try to get out.

    Args:
        path: What to read.
    """
    import socket

    told = []
    for reach in (lambda: Path(path).read_text(), lambda: socket.create_connection(("192.0.2.1", 80), 1)):
        try:
            reach()
        except OSError as error:
            told.append(type(error).__name__)
        else:
            told.append("got through")
    return told


def copyright():  # noqa: A001 - that is the point
    return "ours"


def shadowing() -> str:
    return copyright()


def remember(n: int) -> int:
    return n


class FunctionLab(Lab):
    """A lab whose policy knows the tools of this file."""

    def __init__(self, tmp_path, *, tools=TOOLS, extra="", profile=""):
        super().__init__(tmp_path)
        rules = "".join(
            f"\n    - {{id: t-{name.lower()}, tool: {name}, then: run, sandbox: offline}}" for name in tools
        )
        rules = rules.replace("tool: divide,", "tool: divide, refuse_patterns: [forbidden],")
        text = re.sub(r"\n    - \{id: calculator.*", rules, POLICY)
        text = text.replace("refused_share: 0.1, contained_share: 0.1", "refused_share: 1, contained_share: 1")
        text = text.replace("\nsandbox:", f"{extra}\nsandbox:").replace('python:1"}', f'python:1"{profile}}}')
        self.policy.write_text(text)
        self.calls = []
        self.respond = lambda call: returned(call, 4)

    def open(self, **options):
        respond = self.respond
        self.respond = lambda call: self.calls.append(call) or respond(call)
        return super().open(**options)

    def decided(self):
        return [entry.body for entry in self.events("tool.decided")]


@pytest.fixture
def lab(tmp_path):
    return FunctionLab(tmp_path)


class TestItLooksAsItDid:
    def test_name_signature_and_docstring_stay(self, lab):
        with lab.open() as guard:
            tool = guard.tool(add)
            assert (tool.__name__, tool.__doc__, inspect.signature(tool)) == (
                "add",
                add.__doc__,
                inspect.signature(add),
            )
            assert inspect.isfunction(tool)
            assert not inspect.iscoroutinefunction(tool)
            assert inspect.iscoroutinefunction(guard.tool(wait))

    @pytest.mark.train
    @pytest.mark.parametrize("function", [add, divide, wait, loud, steal])
    def test_a_framework_makes_the_same_schema_of_it(self, lab, function):
        from transformers.utils import get_json_schema

        with lab.open() as guard:
            assert get_json_schema(guard.tool(function)) == get_json_schema(function)

    @pytest.mark.train
    def test_the_built_in_tools_have_a_schema_with_one_text(self, lab):
        from transformers.utils import get_json_schema

        with lab.open() as guard:
            for name, argument in (("python", "code"), ("shell", "command")):
                told = get_json_schema(guard.tool(name))["function"]
                assert told["name"] == name
                assert told["parameters"]["required"] == [argument]
                assert told["parameters"]["properties"][argument]["type"] == "string"


class TestACall:
    def test_the_gate_sees_what_the_model_chose_and_the_cell_gets_the_function(self, lab):
        """The log tells the arguments; the source is the same in every call and known by its digest."""
        with lab.open() as guard:
            tool = guard.tool(add)
            assert tool(1, b=5) == 4
            assert tool(a=7) == 4
        first, second = lab.calls
        assert (first.tool, first.language, json.loads(first.code)) == ("add", "python", {"a": 1, "b": 5})
        assert first.runs == second.runs == first.program
        assert first.reads == b'{"a": 1, "b": 5}\n' + first.stdin
        assert len(first.stdin) == len(second.stdin) == KEY_BYTES
        assert first.stdin != second.stdin
        bodies = lab.decided()
        assert [body["code_head"] for body in bodies] == ['{"a": 1, "b": 5}', '{"a": 7}']
        assert [body["language"] for body in bodies] == ["python", "python"]
        assert bodies[0]["program_sha256"] == bodies[1]["program_sha256"]

    def test_nothing_of_its_body_runs_on_the_host(self, lab, capsys):
        with lab.open() as guard:
            assert guard.tool(divide)(a=1, b=0) == 4
        assert capsys.readouterr().out == ""

    def test_what_it_raises_is_raised_with_the_same_text(self, lab):
        """A framework shows `str(error)` to the model, which so reads what it would read without a guard."""
        lab.respond = lambda call: raised(call, ZeroDivisionError("division by zero"))
        with lab.open() as guard, pytest.raises(ToolRaisedError, match=r"^division by zero$") as told:
            guard.tool(divide)(a=1, b=0)
        assert told.value.kind == "ZeroDivisionError"

    def test_a_refusal_is_text_and_teaches_nothing(self, lab):
        with lab.open() as guard:
            assert guard.tool(divide)(a="forbidden", b=1) == REFUSAL
        assert lab.calls == []
        assert [body["result"] for body in lab.decided()] == ["deny"]

    @pytest.mark.parametrize(
        ("status", "text"),
        [
            ("timeout", "timed out after 5 s"),
            ("oom", "ran out of memory"),
            ("pids_limit", "started too many processes"),
            ("output_limit", "printed too much"),
            ("disk_limit", "wrote too much"),
            ("signal", "ended by signal 11"),
        ],
    )
    def test_a_wall_is_raised_in_a_few_words(self, lab, status, text):
        """So that a framework counts it as a failure, and the model knows what to do otherwise."""
        lab.respond = lambda call: Outcome(call_id=call.id, status=status, signal=11)
        with lab.open() as guard, pytest.raises(ToolRaisedError, match=f"^{text}$"):
            guard.tool(add)(a=1)

    @pytest.mark.parametrize("left", [None, b"", b"{", b"[1]", b"{}", b"[" * 100_000])
    def test_a_call_that_leaves_no_result_has_none(self, lab, left):
        files = {} if left is None else {RESULT: left}
        lab.respond = lambda call: Outcome(call_id=call.id, status="ok", exit_code=0, files=files)
        with lab.open() as guard, pytest.raises(ToolRaisedError, match="^ended without a result$"):
            guard.tool(add)(a=1)

    @pytest.mark.parametrize("kept", [0, 1, 64])
    def test_an_answer_that_its_program_did_not_sign_is_none(self, lab, kept):
        """Whatever writes to the call's folder, such as a process that outlived the call before."""

        def forge(call):
            other = dataclasses.replace(call, stdin=bytes(KEY_BYTES))
            answer = seal(call, {"result": 1})[:kept] + seal(other, {"result": 777})[kept:]
            return Outcome(call_id=call.id, status="ok", exit_code=0, files={RESULT: answer})

        lab.respond = forge
        with lab.open() as guard, pytest.raises(ToolRaisedError, match="^ended without a result$"):
            guard.tool(add)(a=1)

    @pytest.mark.parametrize("told", [[1], {}, {"kind": "x"}, 7])
    def test_a_signed_answer_has_a_result_or_an_error(self, lab, told):
        lab.respond = lambda call: Outcome(call_id=call.id, status="ok", exit_code=0, files={RESULT: seal(call, told)})
        with lab.open() as guard, pytest.raises(ToolRaisedError, match="^ended without a result$"):
            guard.tool(add)(a=1)

    def test_arguments_that_json_cannot_hold_are_refused(self, lab):
        deep = []
        for _ in range(5000):
            deep = [deep]
        with lab.open() as guard:
            with pytest.raises(UsageError, match=r"add\(a=...\) is nested too deeply"):
                guard.tool(add)(a=deep)
            with pytest.raises(UsageError, match="arguments of add cannot be sent to a cell: Exceeds the limit"):
                guard.tool(add)(a=10**5000)
        assert lab.decided() == []

    @pytest.mark.parametrize("value", [object(), (1, 2), {1: 2}, [b"x"], {"deep": [{"er": {1}}]}])
    def test_arguments_that_json_would_change_are_refused_by_name(self, lab, value):
        with lab.open() as guard, pytest.raises(UsageError, match=r"add\(a=...\) holds a \w+, which cannot be sent"):
            guard.tool(add)(a=value)
        assert lab.decided() == []

    def test_too_many_arguments_are_the_type_error_of_any_function(self, lab):
        with lab.open() as guard, pytest.raises(TypeError, match="too many positional"):
            guard.tool(add)(1, 2, 3)

    def test_threads_and_event_loops_make_calls_at_once(self, lab):
        lab.respond = lambda call: returned(call, json.loads(call.code))
        with lab.open() as guard:
            tool, awaited = guard.tool(remember), guard.tool(wait)

            async def all_of_them():
                return await asyncio.gather(*(awaited(n=n) for n in range(20)))

            with ThreadPoolExecutor(8) as threads:
                loop = threads.submit(asyncio.run, all_of_them())
                assert list(threads.map(lambda n: tool(n=n)["n"], range(20))) == list(range(20))
                assert loop.result() == [{"n": n} for n in range(20)]
        assert len(lab.decided()) == 40

    def test_a_call_belongs_to_the_cycle_that_is_under_way(self, lab):
        with lab.build(lab.open()) as guard:
            tool = guard.tool(add)
            tool(a=1)
            for cycle in guard.cycles(2):
                tool(a=1)
                lab.promote(cycle)
        assert [entry.cycle for entry in lab.events("tool.decided")] == [None, 1, 2]


class TestBuiltIn:
    def test_a_failure_reads_like_one(self, lab):
        lab.respond = lambda call: Outcome(
            call_id=call.id, status="nonzero_exit", exit_code=3, stdout=b"so far\n", stderr=b"no\n"
        )
        with lab.open() as guard:
            assert guard.tool("shell")(command="x") == "so far\nno\nexit code 3"
        (call,) = lab.calls
        assert (call.tool, call.language, call.runs) == ("shell", "sh", "x")

    def test_success_is_what_was_printed(self, lab):
        lab.respond = lambda call: "4\n"
        with lab.open() as guard:
            assert guard.tool("python")(code="print(4)") == "4\n"

    def test_a_time_out_keeps_what_was_printed(self, lab):
        lab.respond = lambda call: Outcome(call_id=call.id, status="timeout", stdout=b"1\n")
        with lab.open() as guard:
            assert guard.tool("python")("x") == "1\ntimed out after 5 s"

    def test_what_was_cut_is_cut_in_the_middle_and_said(self, tmp_path):
        lab = FunctionLab(tmp_path, profile=", limits: {output: 1KiB}")
        lab.respond = lambda call: Outcome(
            call_id=call.id, status="ok", exit_code=0, stdout=b"a" * 400 + b"b" * 400, stdout_bytes=5000
        )
        with lab.open() as guard:
            assert guard.tool("python")("x") == "a" * 400 + "\n[4200 bytes left out]\n" + "b" * 400

    def test_other_names_are_refused(self, lab):
        with lab.open() as guard, pytest.raises(UsageError, match="python and shell"):
            guard.tool("bash")


def makes_a_closure():
    secret = 1

    def closure(a: int) -> int:
        return a + secret

    return closure


def locked() -> int:
    with LOCK:
        return 1


def counting() -> int:
    global SCALE
    SCALE += 1
    return SCALE


def early() -> int:
    return defined_nowhere  # noqa: F821 - that is the point


def yields():
    yield 1


def listed(*numbers: int) -> int:
    return sum(numbers)


def positional(a, /):
    return a


@functools.wraps(add)
def decorated(*, a):
    return add(a)


NAMELESS = lambda: 1  # noqa: E731 - that is the point


LONG = 10**5000
KIND = TypeVar("KIND")


@functools.cache
def cached(a):
    return a


def remembers(a):
    return cached(a)


def calls_a_lambda():
    return NAMELESS()


def says_much():
    return LONG


def generic(a):
    return [KIND, a]


def relative():
    from . import lab

    return lab


def around(SCALE):  # noqa: N803 - the name of a global, which is another
    class Inner:
        def reset(self):
            return [SCALE for _ in range(2)]

    class Property:
        @property
        def size(self):
            return SCALE

    class Body:
        size = SCALE

    def inner(a=SCALE):
        return a

    def plain(a):
        return str(a)

    return Inner, Property, Body, inner, plain


class Settings:
    """A class whose attributes are annotated, as those of pydantic are, which reads them."""

    first: Optional[Decimal] = None  # noqa: UP045 - as many write it
    second: NotThere = None  # noqa: F821 - that is the point
    third: LOCK = None


def reads_annotations():
    return [get_type_hints(Settings, {**globals(), "NotThere": int, "LOCK": int})["first"], Settings.second]


class TestWhatCannotBeSent:
    """Each is refused when it is wrapped, in a sentence with the way out."""

    @pytest.mark.parametrize(
        ("what", "said"),
        [
            (functools.partial(add, 1), "functools.partial, which has no name and no source: write a def"),
            (NAMELESS, "lambda, which has no name: write it as a def"),
            (len, "no Python source to send to a cell"),
            (functools.cache(remember), "no Python source to send to a cell"),
            (makes_a_closure(), "closure over secret, which no cell has: pass secret as arguments"),
            (locked, "refers to LOCK, a lock of this process"),
            (counting, "keeps SCALE in a global"),
            (early, "refers to defined_nowhere, which is not there"),
            (yields, "is a generator"),
            (listed, r"takes \*numbers"),
            (positional, "by position only"),
            (decorated, "is decorated"),
        ],
        ids=lambda each: getattr(each, "__name__", None),
    )
    def test_it_is_refused_with_the_way_out(self, tmp_path, what, said):
        lab = FunctionLab(tmp_path, tools=["closure", "locked", "counting", "early", "add", "python"])
        with lab.open() as guard, pytest.raises(UsageError, match=said):
            guard.tool(what)

    @pytest.mark.parametrize(
        ("what", "said"),
        [
            (remembers, "refers to cached, a _lru_cache_wrapper of this process"),
            (calls_a_lambda, "refers to NAMELESS, a lambda: write it as a def"),
            (says_much, "refers to LONG, a int of this process"),
            (generic, "refers to KIND, a TypeVar of this process"),
            (relative, "imports relative to its package"),
            *((what, f"{what.__name__} stands in a function and refers to SCALE") for what in around(9)[:4]),
        ],
        ids=lambda each: getattr(each, "__name__", None),
    )
    def test_what_would_be_something_else_in_a_cell_is_refused(self, what, said):
        """Or nothing at all: what stands in the same file cannot be imported there."""
        with pytest.raises(UsageError, match=said):
            portable(what)

    def test_a_bound_method_is_sent_to_environments(self, lab):
        with lab.open() as guard, pytest.raises(UsageError, match="use guard.wrap_environment on its class"):
            guard.tool(lab.build)

    def test_a_function_without_a_file_is_refused(self, lab):
        space = {}
        exec("def add(a: int) -> int:\n    return a", space)
        with lab.open() as guard, pytest.raises(UsageError, match="the source of add cannot be found"):
            guard.tool(space["add"])

    def test_a_tool_that_no_rule_names_is_a_slip(self, tmp_path):
        """With the lines that let it run; a rule that denies it is an answer, too."""
        lab = FunctionLab(tmp_path, tools=["ad"])
        with lab.open() as guard, pytest.raises(UsageError, match=r"id: add, tool: add, then: run, sandbox: offline"):
            guard.tool(add)


class TestTheText:
    def test_it_defines_the_function_in_an_empty_module(self):
        """Helpers, constants, modules and what stands in them come along; annotations are not evaluated."""
        space = {"__name__": "__main__"}
        exec(portable(add), space)
        assert space["add"](1) == 9
        exec(portable(dated), space)
        assert space["dated"]() == "2030-01-01T00:00:00/"

    def test_what_stands_in_a_function_and_needs_nothing_of_it_can_be_sent(self):
        space = {}
        exec(portable(around(9)[4]), space)
        assert space["plain"](1) == "1"

    def test_annotations_of_attributes_can_be_read_where_what_they_name_can_be_sent(self):
        space = {"__name__": "somewhere"}
        exec(portable(reads_annotations), space)
        assert space["reads_annotations"]() == [Optional[Decimal], None]  # noqa: UP045

    def test_a_name_of_the_file_goes_before_a_builtin(self):
        space = {}
        exec(portable(shadowing), space)
        assert space["shadowing"]() == shadowing() == "ours"

    def test_decorators_and_comments_stay_here(self):
        class Stand:
            tool = staticmethod(lambda function: function)

        guard = Stand()

        @guard.tool
        def marked(a: int) -> str:
            # a comment
            text = """
no indentation
"""
            return text * a

        space = {}
        exec(portable(marked), space)
        assert space["marked"](1) == "\nno indentation\n"
        assert "guard" not in portable(marked)


class TestTheRunStops:
    def test_a_sandbox_that_dies_freezes_the_run(self, lab):
        """Frameworks swallow what a tool raises, so the next update is where the run stops."""
        lab.respond = lambda call: SandboxUnavailableError("the engine is gone")
        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            lab.update(cycle)
            with pytest.raises(SandboxUnavailableError):
                guard.tool(add)(a=1)
            assert guard.frozen
            assert guard.tool(add)(a=1) == REFUSAL
            with pytest.raises(LoopFrozen, match="the sandbox failed under a call of add: the engine is gone"):
                lab.update(cycle)
        (freeze,) = lab.events("freeze.entered")
        assert (freeze.body["gate"], freeze.body["rule"]) == ("tool", "sandbox")

    def test_so_do_more_callers_than_may_wait_and_the_reason_says_what_to_raise(self, tmp_path):
        """What nobody ran has no answer, and an error in its place is one that the model did not earn."""
        lab = FunctionLab(tmp_path, profile=", cells: 1, queue: 1")
        ended = threading.Event()
        lab.respond = lambda call: returned(call, ended.wait(20))

        async def three(tool):
            calls = [asyncio.ensure_future(tool(n=n)) for n in range(3)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            ended.set()
            return await asyncio.gather(*calls, return_exceptions=True)

        with lab.open() as guard:
            *_, last = asyncio.run(three(guard.tool(wait)))
        assert isinstance(last, SandboxBusyError)
        (freeze,) = lab.events("freeze.entered")
        assert (
            "than sandbox.profiles.offline.queue lets wait for sandbox.profiles.offline.cells" in freeze.body["reason"]
        )

    def test_so_does_one_that_dies_under_an_awaited_call(self, lab):
        lab.respond = lambda call: SandboxUnavailableError("the engine is gone")
        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            with pytest.raises(SandboxUnavailableError):
                asyncio.run(guard.tool(wait)(n=1))
            with pytest.raises(LoopFrozen, match="under a call of wait"):
                lab.update(cycle)

    def test_calls_while_frozen_are_refused_and_not_raised(self, lab):
        with lab.open() as guard:
            guard._state.latch("a test")
            assert guard.tool(add)(a=1) == REFUSAL
            assert asyncio.run(guard.tool(wait)(n=1)) == REFUSAL
        assert lab.calls == []

    def test_a_call_that_a_freeze_took_down_is_refused(self, lab):
        """The freeze kills what runs; that is no fault of the sandbox, and no second freeze."""

        def respond(call):
            guard._state.latch("a test")
            return SandboxUnavailableError("killed")

        lab.respond = respond
        with lab.open() as guard:
            assert guard.tool(add)(a=1) == REFUSAL
        assert lab.events("freeze.entered") == []

    def test_a_log_that_cannot_be_written_stops_the_next_update(self, lab):
        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            tool = guard.tool(add)
            guard._log.require()

            def fails(*args, **kwargs):
                raise OSError(28, "No space left on device")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("loopguard.audit.log.os.write", fails)
                patch.setattr("loopguard.audit.log.os.fsync", fails)
                patch.setattr("loopguard.audit.log.os.fdatasync", fails, raising=False)
                with pytest.raises(AuditWriteError):
                    tool(a=1)
            with pytest.raises(AuditWriteError):
                lab.update(cycle)

    def test_a_closed_guard_runs_nothing(self, lab):
        with lab.open() as guard:
            tool = guard.tool(add)
        with pytest.raises(SandboxUnavailableError, match="closed"):
            tool(a=1)


class TestTheBudget:
    def test_calls_above_it_are_refused_in_their_cycle(self, tmp_path):
        """A refusal for want of budget is no probing, so nothing freezes for it."""
        lab = FunctionLab(tmp_path, extra="\n  budget: {per_cycle: 2}")
        lab.policy.write_text(lab.policy.read_text().replace("refused_share: 1", "refused_share: 0.01"))
        with lab.build(lab.open()) as guard:
            tool = guard.tool(add)
            for cycle in guard.cycles(2):
                assert [tool(a=1) for _ in range(4)] == [4, 4, REFUSAL, REFUSAL]
                lab.promote(cycle)
        refused = [body for body in lab.decided() if body["result"] == "deny"]
        assert [body["rule"] for body in refused] == ["budget"] * 4
        assert "2 calls of this cycle" in refused[0]["reason"]
        assert lab.events("freeze.entered") == []

    def test_many_threads_do_not_get_past_it(self, tmp_path):
        lab = FunctionLab(tmp_path, extra="\n  budget: {per_cycle: 10}")
        with lab.open() as guard, ThreadPoolExecutor(8) as threads:
            tool = guard.tool(add)
            results = list(threads.map(lambda n: tool(a=n), range(40)))
        assert results.count(4) == len(lab.calls) == 10

    def test_what_a_rule_refuses_takes_nothing_from_it(self, tmp_path):
        lab = FunctionLab(tmp_path, extra="\n  budget: {per_cycle: 1}")
        with lab.open() as guard:
            assert guard.tool(divide)(a="forbidden", b=1) == REFUSAL
            assert guard.tool(add)(a=1) == 4


class TestThePage:
    """What docs/tools-in-frameworks.md shows is true."""

    PAGE = (Path(__file__).parent.parent / "docs" / "tools-in-frameworks.md").read_text(encoding="utf-8")

    def test_its_code_runs_under_its_policy(self, tmp_path, monkeypatch):
        (code,) = re.findall(r"```python\n(.*?)```", self.PAGE, re.DOTALL)
        (tools,) = re.findall(r"```yaml\n(.*?)```", self.PAGE, re.DOTALL)
        (tmp_path / "train_of_the_page.py").write_text(code)
        (tmp_path / "grpo.yaml").write_text(re.sub(r"tools:.*?(?=data:)", tools, POLICY, flags=re.DOTALL))
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        module = importlib.import_module("train_of_the_page")
        lab, made = Lab(tmp_path), []
        lab.policy, lab.respond = tmp_path / "grpo.yaml", lambda call: returned(call, 1.0) if call.program else "4"
        monkeypatch.setattr(module, "LoopGuard", types.SimpleNamespace(from_file=lambda policy, run_dir: lab.open()))
        monkeypatch.setattr(LoopGuard, "attach", lambda guard, trainer: None)

        class Trainer:
            def __init__(self, *, tools, environment_factory, reward_funcs):
                made.extend([tools, environment_factory, reward_funcs])

            def train(self):
                (root, python, shell), drawer, (brevity,) = made
                assert (root(x=1.0), python(code="print(4)"), shell(command="echo 4")) == (1.0, "4", "4")
                assert drawer().write(text="42") == 1.0
                assert brevity(completions=["a"]) == [0.5]

        module.main(Trainer)
        assert len(lab.events("tool.decided")) == 4

    def test_it_opens_with_what_a_demanding_user_expects(self):
        assert re.findall(r"^## (.*)$", self.PAGE, re.MULTILINE)[0] == "What a demanding user expects"

    @pytest.mark.parametrize("text", [REFUSAL, *_ENDED.values()])
    def test_it_tells_what_a_model_reads(self, text):
        assert f"`{text}`" in self.PAGE


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    lab = FunctionLab(tmp_path_factory.mktemp("cells"), profile=", limits: {wall: 2s}")
    with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
        yield guard


@pytest.mark.docker
class TestInACell:
    def test_a_function_gives_its_result(self, cells):
        """With its helper, its constants and its default, which is a constant as well."""
        assert cells.tool(add)(a=1) == add(1) == 9
        assert cells.tool(add)(1, b=5) == 18
        assert cells.tool(dated)() == dated()

    def test_an_async_function_gives_its_result(self, cells):
        async def many():
            return await asyncio.gather(*(cells.tool(wait)(n=n) for n in range(6)))

        assert asyncio.run(many()) == [*range(6)]

    def test_a_caller_who_goes_away_ends_the_call_and_not_the_run(self, cells):
        async def impatient():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(cells.tool(nap)(s=60), timeout=0.3)
            return await cells.tool(nap)(s=0)

        assert asyncio.run(impatient()) == 0
        assert not cells.frozen

    def test_what_it_raises_comes_back(self, cells):
        with pytest.raises(ToolRaisedError, match=r"^division by zero$"):
            cells.tool(divide)(a=1, b=0)
        with pytest.raises(ToolRaisedError, match=r"divide\(\) got an unexpected keyword argument 'c'"):
            cells.tool(divide)(a=1, b=2, c=3)

    def test_what_it_prints_is_not_its_result(self, cells):
        assert cells.tool(loud)(text="ä\n\u2028'\"") == "ä\n\u2028'\""

    def test_a_process_of_another_program_cannot_look_into_it(self, cells):
        """Its memory holds the key that its answer is signed with."""
        assert cells.tool(pry)() == ["PermissionError", "PermissionError"]

    def test_a_result_that_is_too_large_is_told_so(self, cells):
        with pytest.raises(ToolRaisedError, match="^gave too large a result$"):
            cells.tool(repeat)(text="x", times=20 << 20)

    def test_any_text_comes_back_as_it_went_in(self, cells):
        text = "\x00 \x1b[31m {0.__class__} %s \u2028 .loopguard-result \U0001f600"
        assert cells.tool(repeat)(text=text, times=2) == text * 2
        assert cells.tool(repeat)(text="\ud800", times=2) == REFUSAL

    def test_a_result_that_json_would_change_is_refused(self, cells):
        with pytest.raises(ToolRaisedError, match="the result holds a tuple"):
            cells.tool(weird)()

    def test_it_gets_no_further_than_its_cell(self, cells):
        """Neither to a file that is not its own nor to a network."""
        assert cells.tool(steal)(path="/etc/shadow") == ["PermissionError", "OSError"]

    def test_a_function_that_does_not_end_is_ended(self, cells):
        with pytest.raises(ToolRaisedError, match="timed out after 2 s"):
            cells.tool(spin)()
        with pytest.raises(ToolRaisedError, match="ended without a result"):
            cells.tool(exit_early)()

    def test_the_built_in_tools_read_as_a_terminal_does(self, cells):
        assert cells.tool("python")(code="print(6 * 7)") == "42\n"
        assert cells.tool("python")(code="1 / 0").endswith("ZeroDivisionError: division by zero\nexit code 1")
        assert cells.tool("shell")(command="echo out; echo err >&2; exit 7") == "out\nerr\nexit code 7"
