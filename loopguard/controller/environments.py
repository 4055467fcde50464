"""Environments for frameworks that make an instance for each rollout: the class stays as it looks, the instance moves.

A framework finds the methods on the class, calls `reset` where a rollout begins, the other methods as tools, and
`get_reward` at the end. What we give it has the same methods and none of their bodies. Each rollout has a cell of its
own; the instance is made in there, and is pickled in there between calls.

The pickle stays in the cell and is opened in the cell alone. What a method starts (a shell, say) can neither read it
nor swap it for another: it is enciphered with a key of the rollout, and the controller remembers its digest. Code that
a method executes in its own process can still make of the instance, and of the reward, what it likes.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import secrets
import threading
import types
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from loopguard.controller.calls import GONE
from loopguard.controller.functions import (
    FIRST,
    KEY_BYTES,
    SERVE,
    check_rule,
    check_signature,
    finite,
    freeze,
    json_of,
    lost,
    named,
    new_call,
    told_of,
)
from loopguard.controller.source import portable
from loopguard.errors import SandboxError, ToolRaisedError, UsageError
from loopguard.gates.tools import REFUSAL
from loopguard.types import Decision, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loopguard.controller.calls import EpisodeCalls
    from loopguard.controller.guard import LoopGuard
    from loopguard.types import ToolCall

STATE = ".loopguard-state-"
"""What the files of a rollout that its instance lies in between two calls begin with; the digest follows.

Not one file that is written anew: a call that a limit ended may have left its own state there, and nobody was told.
"""

_OWN = ("reset", "get_reward")
"""Methods that a framework calls, and a model does not."""

_METHOD = f"""
def _loopguard_answer(call, rest, told):
    import asyncio, hashlib, inspect, os, pickle, traceback
    secret, expected = rest[:{KEY_BYTES}], rest[{KEY_BYTES}:].decode()
    folder = os.getcwd()

    def ciphered(data, nonce):
        # Each nonce once: what a model's code can read of it is noise.
        stream = hashlib.shake_256(secret + nonce).digest(len(data))
        return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")

    if expected:
        place = os.path.join(folder, {STATE!r} + expected)
        try:
            with open(place, "rb") as file:
                state = file.read()
        except OSError:
            state = b""
        if hashlib.sha256(state).hexdigest() != expected:
            raise RuntimeError("the state of the environment was changed between two calls")
        for name in os.listdir(folder):
            if name.startswith({STATE!r}) and name != {STATE!r} + expected:
                os.unlink(os.path.join(folder, name))
        it = pickle.loads(ciphered(state[16:], state[:16]))
    else:
        it = {{name}}(**call.pop("__init__"))

    def keep():
        try:
            state = pickle.dumps(it)
        except Exception as error:
            raise TypeError(f"{{name}} cannot be kept between two calls: {{{{error}}}}") from error
        nonce = os.urandom(16)
        state = nonce + ciphered(state, nonce)
        digest = hashlib.sha256(state).hexdigest()
        with open(os.path.join(folder, {STATE!r} + digest), "xb") as file:
            file.write(state)
        told["state"] = digest

    (method, arguments), = call.items()
    try:
        result = getattr(it, method)(**arguments)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    except Exception:
        keep()  # as it is after a method that raised
        raise
    keep()
    return result

_loopguard_serve(_loopguard_answer)
"""


def guarded(guard: LoopGuard, cls: Any) -> Any:
    """A class that looks like `cls` and whose instances live in cells, one for each rollout.

    Name, docstrings and signatures of the public methods stay, so that a framework finds the same tools. `reset` ends
    the rollout before and begins another; without it the first call does. One rule, for the name of the class, decides
    about all its methods, and it names a profile with `mode: episode`. Refusals and limits are as with `guard.tool`;
    while calls are refused, `reset` and `get_reward` give None, which says that there is nothing to see or to score.

    Raises UsageError for a class that cannot be sent to a cell, and for one that no rule of the guard policy names.
    """
    if not isinstance(cls, type):
        what = "an instance" if not callable(cls) else f"a {type(cls).__name__}"
        raise UsageError(f"guard.wrap_environment got {what}: give the class, which the framework makes instances of")
    made = inspect.getattr_static(cls, "__init__")
    if isinstance(made, types.FunctionType):
        check_signature(made, what=f"{cls.__name__}.__init__")
    methods = _methods(cls)
    if "reset" not in methods:
        raise UsageError(f"{cls.__name__} has no method reset, which is where a rollout begins: add one")
    profile = _profile(guard, cls.__name__)
    program = f"{portable(cls, first=FIRST)}\n{SERVE}{_METHOD.format(name=cls.__name__)}"
    crowd = _crowd(guard, profile)

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        start = named(cls, args, kwargs)
        json_of(start, tool=cls.__name__)
        self._rollouts = _Rollouts(guard, crowd, cls.__name__, program, start)

    def elsewhere(self: Any, name: str) -> Any:
        raise AttributeError(f"{cls.__name__}.{name} is in the cell of its rollout: have a method give it back")

    begin.__signature__ = inspect.signature(made)  # type: ignore[attr-defined]  # a slot of every function
    stubs = {name: _stub(name, method) for name, method in methods.items()}
    facts = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (), {**facts, "__init__": begin, "__getattr__": elsewhere, **stubs})


def _methods(cls: type) -> dict[str, types.FunctionType]:
    found = {}
    for name, method in inspect.getmembers(cls):
        if name.startswith("_") or not callable(method):
            continue
        there = inspect.getattr_static(cls, name)
        if isinstance(there, staticmethod):
            raise UsageError(
                f"{cls.__name__}.{name} is a staticmethod: write it as a method, or with a _ if it is no tool"
            )
        if not isinstance(there, types.FunctionType):
            continue  # frameworks take plain methods alone for tools
        check_signature(method, what=f"{cls.__name__}.{name}")
        found[name] = method
    return found


def _profile(guard: LoopGuard, name: str) -> str:
    """The profile that calls of this class run in. Raises UsageError where it is none with a cell for each rollout."""
    check_rule(guard, name)
    profile = guard._cells.profile_of(name)
    if not profile:
        raise UsageError(f"the guard policy denies the tool {name!r} and lets it run nowhere: leave the class out")
    if guard.policy.sandbox.profiles[profile].mode != "episode":
        raise UsageError(
            f"{name} keeps its state from call to call, and the rule for it names the profile {profile!r}, whose cells "
            f"keep nothing: name one with\n\n    mode: episode"
        )
    return profile


def _stub(name: str, method: types.FunctionType) -> Any:
    """A method that asks the rollout's cell."""
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def asked_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = _bound(method, self, args, kwargs)
            if name == "reset":
                await asyncio.to_thread(self._rollouts.begin)
            return await self._rollouts.aask(name, arguments)

        return asked_async

    @functools.wraps(method)
    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = _bound(method, self, args, kwargs)
        if name == "reset":
            self._rollouts.begin()
        return self._rollouts.ask(name, arguments)

    return asked


def _bound(method: types.FunctionType, it: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names, without the instance."""
    arguments = named(method, (it, *args), kwargs)
    del arguments[next(iter(inspect.signature(method).parameters))]
    json_of(arguments, tool=f"{method.__qualname__.rpartition('.')[0].rpartition('.')[2]}.{method.__name__}")
    return arguments


class _Crowd:
    """How many rollouts have a cell of one profile, so that one too many is told so instead of waiting for ever."""

    def __init__(self, profile: str, most: int) -> None:
        self.profile = profile
        self._most = most
        self._there = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Take a place. Raises UsageError where all are taken: who waited would wait for a rollout of its own batch."""
        with self._lock:
            if self._there >= self._most:
                raise UsageError(
                    f"{self._there} rollouts have a cell each, and the profile {self.profile!r} has no more: "
                    f"set sandbox.profiles.{self.profile}.cells to the number of rollouts in a batch"
                )
            self._there += 1

    def leave(self) -> None:
        """Give the place back."""
        with self._lock:
            self._there -= 1


_crowds: WeakKeyDictionary[LoopGuard, dict[str, _Crowd]] = WeakKeyDictionary()
"""Of each guard by profile: several classes may share one."""


def _crowd(guard: LoopGuard, profile: str) -> _Crowd:
    known = _crowds.setdefault(guard, {})
    return known.setdefault(profile, _Crowd(profile, guard.policy.sandbox.profiles[profile].cells))


class _Rollouts:
    """The rollouts of one instance that a framework holds, one after the other. Thread-safe; calls run in turn."""

    def __init__(self, guard: LoopGuard, crowd: _Crowd, name: str, program: str, start: Mapping[str, Any]) -> None:
        self._guard = guard
        self._crowd = crowd
        self._name = name
        self._program = program
        self._start = start
        self._turn = threading.RLock()
        self._episode: EpisodeCalls | None = None
        self._secret = b""
        """Key of the rollout, which its instance is enciphered with in the cell."""
        self._state = ""
        """Digest of what the instance was kept as; empty before there is one."""
        self._resumes = guard._resumes
        self._refused = False
        self._gone = False
        """Whether a caller who went away took the cell with it."""

    def begin(self) -> None:
        """End the rollout before, and take a clean cell for another."""
        with self._turn:
            self.end()
            self._refused = self._gone = False
            self._resumes = self._guard._resumes
            self._crowd.enter()
            cycle = self._guard._cycle
            number = cycle.number if cycle is not None else None

            def closed() -> bool:
                return self._outlived() or (cycle is not None and cycle.discarded)

            try:
                self._episode = self._guard._episode(self._crowd.profile, cycle=number, closed=closed)
            except BaseException as error:
                self._crowd.leave()
                if isinstance(error, SandboxError) and not self._guard._closed and not self._guard.frozen:
                    reason = f"no cell could be had for a rollout of {self._name}: {error}"
                    freeze(self._guard, Decision(result="freeze", gate="tool", rule="sandbox", reason=reason))
                raise

    def end(self) -> None:
        """Take the cell down; may be called twice."""
        with self._turn:
            if self._episode is not None:
                self._episode.close()
                self._episode = None
                self._crowd.leave()
            self._state = ""

    def ask(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Run a method in the cell; what it gives back, or the text of a refusal."""
        with self._turn:
            call = self._call(method, arguments)
            try:
                outcome = self._run(call, spends=method not in _OWN)
            except SandboxError as error:
                if self._gone:
                    raise
                outcome = lost(self._guard, call, error, resumes=self._resumes)
            return self._result(method, call, outcome)

    async def aask(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """The same, awaited; cancelling it ends the call, and the rollout with it."""
        asked: Future[Any] = Future()
        call = new_call(self._name, "")  # for its id and its profile; what runs is made when it is its turn

        def run(_: ToolCall) -> Outcome:
            try:
                asked.set_result(self.ask(method, arguments))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised below
                asked.set_exception(error)
            return Outcome(call_id=call.id, status="ok")

        try:
            await self._guard._calls.arun(call, run, kill=self._kill)
        except SandboxError as error:
            # Too many wait: nothing was asked.
            outcome = await asyncio.to_thread(lost, self._guard, call, error, resumes=self._resumes)
            return self._result(method, call, outcome)
        return asked.result()

    def _kill(self) -> None:
        self._refused = self._gone = True
        if (episode := self._episode) is not None:
            episode.cell.kill(GONE)

    def _outlived(self) -> bool:
        """Whether a freeze came over this rollout and was lifted again: nothing of it counts any more."""
        return self._resumes != self._guard._resumes

    def _call(self, method: str, arguments: Mapping[str, Any]) -> ToolCall:
        told: dict[str, Any] = {method: dict(arguments)}
        if not self._state:
            told = {"__init__": dict(self._start), **told}
            self._secret = secrets.token_bytes(KEY_BYTES)
        code = json.dumps(told, ensure_ascii=False)
        return new_call(self._name, code, program=self._program, rest=self._secret + self._state.encode())

    def _run(self, call: ToolCall, *, spends: bool) -> Outcome:
        if self._refused or self._outlived():
            return Outcome(call_id=call.id, status="denied", refusal=REFUSAL)
        if self._episode is None:
            self.begin()
        assert self._episode is not None
        cycle = self._guard._cycle
        return self._episode.run(call, spends=spends, roll_back=cycle is not None and cycle.updates > 0)

    def _result(self, method: str, call: ToolCall, outcome: Outcome) -> Any:
        if outcome.status == "denied":
            # A rollout that could not begin is none; its tools must not work on an instance that was never reset.
            self._refused = self._refused or method == "reset"
            return None if method in _OWN else outcome.refusal
        told = told_of(self._guard, call, outcome)
        self._state = str(told.get("state") or self._state)
        if "error" in told:
            raise ToolRaisedError(str(told["error"]), kind=str(told.get("kind", "")))
        if method == "get_reward" and told["result"] is not None and not finite(told["result"]):
            raise ToolRaisedError(
                f"{self._name}.get_reward gave {told['result']!r:.60}; a reward is a finite number", kind="reward"
            )
        return told["result"]
