"""Tools for frameworks that call plain Python functions: the function stays as it looks, and its body runs in a cell.

A framework reads name, signature and docstring of a tool, and those stay. What it calls sends the function's source and
the arguments to a cell and brings the result back as JSON. The source is the loop's own and the same in every call; the
arguments are a model's, so they are what the gate judges and what the log tells.

What comes back is as trustworthy as what the function does with what a model wrote: text that it prints cannot pass for
its result, nor can what another process writes, since the answer is signed with a key of the call that only the process
of the function has. Code that the function executes in its own process can.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import inspect
import json
import math
import secrets
import types
import uuid
from typing import TYPE_CHECKING, Any

from loopguard.controller.source import portable
from loopguard.errors import SandboxBusyError, SandboxError, ToolRaisedError, UsageError
from loopguard.gates.tools import REFUSAL
from loopguard.types import Decision, Outcome, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loopguard.controller.guard import LoopGuard

RESULT = ".loopguard-result"
"""The file that an answer comes back in. What a function prints is another stream, and never taken for it."""

KEY_BYTES = 32
"""How much of standard input is the key that an answer is signed with; a new one for each call."""

FIRST = """import os, sys
sys.path[:] = [place for place in sys.path if os.path.isabs(place) and not os.access(place, os.W_OK)]
del os, sys
"""
"""What every program begins with: what a rollout left in its folder must not be imported in the place of a module."""

SERVE = f'''
def _loopguard_serve(answer):
    """Read one call, answer it, and leave the answer in a file."""
    import ctypes, hmac, json, os, sys, traceback

    # Nobody else of this user, such as a process that runs what a model wrote, may look into this one or change it.
    if ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) != 0:
        raise RuntimeError("the memory of this process cannot be closed to others")
    arguments = sys.stdin.buffer.readline()
    key, rest = sys.stdin.buffer.read({KEY_BYTES}), sys.stdin.buffer.read()
    place = os.path.abspath({RESULT!r})
    if os.path.lexists(place):
        os.unlink(place)
    told, status = {{}}, 0

    def check(value):
        kind = type(value)
        if kind is list:
            for each in value:
                check(each)
        elif kind is dict and all(type(key) is str for key in value):
            for each in value.values():
                check(each)
        elif not (value is None or kind in (bool, int, str) or isinstance(value, float)):
            raise TypeError(f"the result holds a {{kind.__name__}}: give back text, numbers, lists or dicts")

    try:
        told["result"] = answer(json.loads(arguments), rest, told)
        check(told["result"])
        text = json.dumps(told)
    except BaseException as error:
        traceback.print_exc()
        told.pop("result", None)
        told["error"], told["kind"], status = str(error), type(error).__name__, 1
        text = json.dumps(told)
    with open(place + ".new", "wb") as file:
        file.write(hmac.digest(key, text.encode(), "sha256").hex().encode() + text.encode())
    os.replace(place + ".new", place)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)  # threads and handlers of the function's must not keep the answer waiting
'''
"""What every program ends with. `answer(arguments, rest of standard input, what else to tell)` gives the result."""

_CALL = """
def _loopguard_answer(arguments, rest, told):
    import asyncio, inspect
    result = {name}(**arguments)
    return asyncio.run(result) if inspect.iscoroutine(result) else result

_loopguard_serve(_loopguard_answer)
"""

_ENDED = {
    "oom": "ran out of memory",
    "pids_limit": "started too many processes",
    "output_limit": "printed too much",
    "disk_limit": "wrote too much",
}
"""What is said of a call that ran into a wall. No limit but the time: others would be a hint at the fence."""

_BUILT_IN = {"python": "python", "shell": "sh"}
"""The tools that need no function, with the language of the cell that runs them."""


def guarded(guard: LoopGuard, what: Any) -> Any:
    """A tool that looks like `what`, a function, and runs in a cell; `"python"` and `"shell"` need no function.

    Name, signature, docstring and whether it is async stay, so that a framework makes the same schema of it. Whether a
    call runs is decided by the rules for its `__name__`. A refused call, and every call while the run is frozen, comes
    back as the text of a refusal. What the function raises comes back as ToolRaisedError with the same text, and so do
    its limits. A sandbox that dies raises SandboxUnavailableError and freezes the run, since frameworks swallow what a
    tool raises.

    Raises UsageError for what cannot be sent to a cell, and for a tool that no rule of the guard policy names.
    """
    if isinstance(what, str):
        return _built_in(guard, what)
    function = check_function(what)
    check_rule(guard, function.__name__)
    program = f"{portable(function, first=FIRST)}\n{SERVE}{_CALL.format(name=function.__name__)}"
    name = function.__name__

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ToolCall:
        arguments = named(function, args, kwargs)
        return new_call(name, json_of(arguments, tool=name), program=program)

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def in_a_cell_async(*args: Any, **kwargs: Any) -> Any:
            asked = call(args, kwargs)
            return result_of(guard, asked, await arun(guard, asked))

        return in_a_cell_async

    @functools.wraps(function)
    def in_a_cell(*args: Any, **kwargs: Any) -> Any:
        asked = call(args, kwargs)
        return result_of(guard, asked, run(guard, asked))

    return in_a_cell


def _built_in(guard: LoopGuard, name: str) -> Any:
    if name not in _BUILT_IN:
        raise UsageError(f"guard.tool({name!r}): the tools that need no function are python and shell; else give one")
    check_rule(guard, name)

    def ask(code: str) -> str:
        outcome = run(guard, new_call(name, code, language=_BUILT_IN[name]))
        return _read(guard, name, outcome)

    def python(code: str) -> str:
        """Run Python code in a sandbox and read what it prints.

        Args:
            code: A whole script. Print what you want to read. Nothing is kept between calls.

        Returns:
            What the code printed and, where it failed, the error.
        """
        return ask(code)

    def shell(command: str) -> str:
        """Run a shell command in a sandbox and read what it prints.

        Args:
            command: A script for sh. Nothing is kept between calls.

        Returns:
            What the command printed and, where it failed, the error and its exit code.
        """
        return ask(command)

    return {"python": python, "shell": shell}[name]


# What can be sent, and how


def check_function(what: Any) -> types.FunctionType:
    """The function that was handed in. Raises UsageError, with the way out, for what is not a plain function."""
    if isinstance(what, functools.partial):
        raise UsageError("guard.tool got a functools.partial, which has no name and no source: write a def around it")
    if isinstance(what, types.MethodType):
        raise UsageError(
            f"guard.tool got the bound method {what.__name__}, whose object lives in this process: "
            f"use guard.wrap_environment on its class"
        )
    if not isinstance(what, types.FunctionType):
        kind = type(what).__name__
        raise UsageError(
            f"guard.tool got a {kind}, which has no Python source to send to a cell: write a def around it"
        )
    if what.__name__ == "<lambda>":
        raise UsageError("guard.tool got a lambda, which has no name: write it as a def")
    check_signature(what)
    return what


def check_signature(function: types.FunctionType, *, what: str = "") -> None:
    """Raises UsageError for a function whose call cannot be told by names, or whose answer is not one value."""
    who = what or function.__name__
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UsageError(f"{who} is a generator, and a call has one result: give back a list")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise UsageError(
                f"{who} takes *{parameter.name}, and models name their arguments: list each, or take a list"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY and what == "":
            raise UsageError(
                f"{who} takes {parameter.name} by position only, and models name their arguments: drop the /"
            )


def check_rule(guard: LoopGuard, name: str) -> None:
    """Raises UsageError where no rule names a tool: a slip in a name would be a tool that is never allowed."""
    known = {rule.tool for rule in guard.policy.tools.rules}
    rule = f"    - {{id: {name.lower()}, tool: {name}, then: run, sandbox: "
    if not known:
        raise UsageError(
            f"the guard policy has no tools, so the tool {name!r} would be refused every time: add to it\n\n"
            f"tools:\n  rules:\n{rule}offline}}\n"
            f"sandbox:\n  profiles:\n    offline: {{image: 'loopguard/python:1'}}"
        )
    if name not in known:
        raise UsageError(
            f"no rule of the guard policy names the tool {name!r} (there are {', '.join(sorted(known))}): "
            f"rename the function, or add under tools.rules\n\n{rule}{next(iter(guard.policy.sandbox.profiles))}}}"
        )


def named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by their names. Too many, or one twice, is the TypeError that the function itself would raise."""
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
        inspect.signature(function).bind(*args, **kwargs)  # says what is wrong
    return {**dict(zip(names, args, strict=False)), **kwargs}


def json_of(arguments: Mapping[str, Any], *, tool: str) -> str:
    """The arguments as JSON on one line. Raises UsageError, naming the argument, for what JSON would not bring back."""
    for name, value in arguments.items():
        try:
            kind = _alien(value)
        except RecursionError:
            raise UsageError(f"{tool}({name}=...) is nested too deeply to be sent to a cell") from None
        if kind is not None:
            raise UsageError(
                f"{tool}({name}=...) holds a {kind.__name__}, which cannot be sent to a cell: "
                f"pass text, numbers, or lists and dicts of them"
            )
    try:
        # As it is written, so that patterns of a rule see what a model wrote.
        return json.dumps(arguments, ensure_ascii=False)
    except ValueError as error:  # a whole number of thousands of digits
        raise UsageError(f"the arguments of {tool} cannot be sent to a cell: {error}") from error


def _alien(value: Any) -> type | None:
    """The first type in a value that JSON would not bring back as it is."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return None
    if kind is list:
        return next((alien for each in value if (alien := _alien(each)) is not None), None)
    if kind is dict and all(type(key) is str for key in value):
        return next((alien for each in value.values() if (alien := _alien(each)) is not None), None)
    return kind


def new_call(tool: str, code: str, *, program: str = "", language: str = "python", rest: bytes = b"") -> ToolCall:
    """A call of the cell's language, made by a function. Where it has a program, `rest` goes in behind the key."""
    told: dict[str, Any] = {}
    if program:
        told = {"program": program, "stdin": secrets.token_bytes(KEY_BYTES) + rest, "fetch": (RESULT,)}
    return ToolCall(id=uuid.uuid4().hex, tool=tool, code=code, language=language, **told)


# Running


def run(guard: LoopGuard, call: ToolCall) -> Outcome:
    """Run one call in the cycle that is under way. A sandbox that dies freezes the run, and raises."""
    resumes = guard._resumes
    try:
        return _once(guard, call)
    except SandboxError as error:
        return lost(guard, call, error, resumes=resumes)


async def arun(guard: LoopGuard, call: ToolCall) -> Outcome:
    """The same, awaited; cancelling it ends the call in its cell."""
    resumes = guard._resumes
    try:
        return await guard._calls.arun(call, lambda call: _once(guard, call))
    except SandboxError as error:
        return await asyncio.to_thread(lost, guard, call, error, resumes=resumes)


def _once(guard: LoopGuard, call: ToolCall) -> Outcome:
    cycle = guard._cycle
    if not guard.frozen:
        # A run that was frozen when it was opened has no cells yet.
        guard._cells.start()
    return guard._calls.run(
        [call],
        cycle=cycle.number if cycle is not None else None,
        closed=lambda: cycle is not None and cycle.discarded,
        roll_back=cycle is not None and cycle.updates > 0,
    )[0]


def lost(guard: LoopGuard, call: ToolCall, error: SandboxError, *, resumes: int) -> Outcome:
    """What becomes of a call whose sandbox died: a refusal where a freeze took it down, else a freeze, and the error.

    Frameworks show a model what a tool raises and go on, and so the run would train on answers that no tool gave.
    """
    if guard._closed:
        raise error
    if guard.frozen or guard._resumes != resumes:
        return Outcome(call_id=call.id, status="denied", refusal=REFUSAL)
    reason = f"the sandbox failed under a call of {call.tool}: {error}"
    if isinstance(error, SandboxBusyError):
        where = f"sandbox.profiles.{guard._cells.profile_of(call.tool)}"
        reason = f"more calls of {call.tool} wait than {where}.queue lets wait for {where}.cells cells: raise either"
    freeze(guard, Decision(result="freeze", gate="tool", rule="sandbox", reason=reason))
    raise error


def freeze(guard: LoopGuard, decision: Decision) -> None:
    """Stop the run from wherever a framework is; the next update is withheld."""
    cycle = guard._cycle
    with guard._turn:
        if not guard._state.freeze_id:
            guard._freeze(decision, cycle=cycle.number if cycle is not None else None)


# What came back


def result_of(guard: LoopGuard, call: ToolCall, outcome: Outcome) -> Any:
    """What the function gave back, or the text of a refusal. Raises ToolRaisedError for what it raised instead."""
    if outcome.status == "denied":
        return outcome.refusal
    told = told_of(guard, call, outcome)
    if "error" in told:
        raise ToolRaisedError(str(told["error"]), kind=str(told.get("kind", "")))
    return told["result"]


def told_of(guard: LoopGuard, call: ToolCall, outcome: Outcome) -> dict[str, Any]:
    """What the program told of a call that ran. Raises ToolRaisedError where it ended before it could."""
    if outcome.contained:
        raise ToolRaisedError(_ending(guard, call.tool, outcome), kind=outcome.status)
    if "larger" in outcome.not_fetched.get(RESULT, ""):
        raise ToolRaisedError("gave too large a result", kind="no_result")
    try:
        told = unseal(call, outcome.files[RESULT])
    except (KeyError, ValueError, RecursionError) as error:
        raise ToolRaisedError("ended without a result", kind="no_result") from error
    if not isinstance(told, dict) or not told.keys() & {"result", "error"}:
        raise ToolRaisedError("ended without a result", kind="no_result")
    return told


def seal(call: ToolCall, told: Mapping[str, Any]) -> bytes:
    """An answer as the program of this call leaves it behind: signed with the key of the call."""
    text = json.dumps(told).encode()
    return hmac.digest(call.stdin[:KEY_BYTES], text, "sha256").hex().encode() + text


def unseal(call: ToolCall, sealed: bytes) -> Any:
    """What an answer tells. Raises ValueError where another than the program of this call wrote it."""
    signature, text = sealed[:64], sealed[64:]
    if not hmac.compare_digest(signature, hmac.digest(call.stdin[:KEY_BYTES], text, "sha256").hex().encode()):
        raise ValueError("it is not signed with the key of its call")
    return json.loads(text)


def _ending(guard: LoopGuard, name: str, outcome: Outcome) -> str:
    if outcome.status == "timeout":
        profile = guard.policy.sandbox.profiles[guard._cells.profile_of(name)]
        return f"timed out after {profile.limits.wall_s:g} s"
    return _ENDED.get(outcome.status, f"ended by signal {outcome.signal}")


def _read(guard: LoopGuard, name: str, outcome: Outcome) -> str:
    """What a model reads of code that ran: what it printed and, where it failed, what went wrong."""
    if outcome.status == "denied":
        return outcome.refusal
    printed = _kept(outcome.stdout, outcome.stdout_bytes)
    if not outcome.ok:
        why = _ending(guard, name, outcome) if outcome.contained else f"exit code {outcome.exit_code}"
        printed = "\n".join(
            part
            for part in (printed.rstrip("\n"), _kept(outcome.stderr, outcome.stderr_bytes).rstrip("\n"), why)
            if part
        )
    profile = guard.policy.sandbox.profiles[guard._cells.profile_of(name)]
    return _cut(printed, profile.limits.output_kib << 10)


def _kept(stream: bytes, whole: int) -> str:
    """A stream as text; of one that was cut, head and tail are what is there."""
    if whole <= len(stream):
        return stream.decode("utf-8", errors="replace")
    head, tail = stream[: len(stream) // 2], stream[len(stream) // 2 :]
    gap = f"\n[{whole - len(stream)} bytes left out]\n"
    return head.decode("utf-8", errors="replace") + gap + tail.decode("utf-8", errors="replace")


def _cut(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def finite(value: Any) -> bool:
    """Whether this is a number that can be reckoned with."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False  # a whole number that no float holds
