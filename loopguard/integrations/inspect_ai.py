"""A sandbox of inspect_ai by the name `loopguard`: a cell for each sample, and each call decided and recorded.

    eval(task, sandbox="loopguard")                  # the guard policy `agent` that comes with LoopGuard
    eval(task, sandbox=("loopguard", "policy.yaml"))  # one of your own

A task opens a ToolStation, a sample an episode of it. Whatever inspect asks for, reading and writing of files as well,
is one or more calls of the tool `exec`. A file's name and content go into the cell as text and never meet the host's
files.

Not here: other users, a way in for people, several cells for a sample. docs/inspect_ai.md has the long list.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import sys
import uuid
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

import anyio
from anyio import to_thread
from inspect_ai import util as inspect
from inspect_ai.util import ExecResult, OutputLimitExceededError, SandboxEnvironment, SandboxEnvironmentLimits

from loopguard.controller.station import ToolStation
from loopguard.errors import LoopFrozen, PolicyError, SandboxUnavailableError, UsageError
from loopguard.policy.load import load, shipped
from loopguard.state import standing
from loopguard.types import Outcome, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from inspect_ai.util import SandboxConnection

    from loopguard.controller.calls import EpisodeCalls
    from loopguard.policy.schema import GuardPolicy
    from loopguard.sandbox.base import CellSpec, EventSink, Runtime
    from loopguard.types import Limits

T = TypeVar("T")

TOOL = "exec"
"""The tool that every call of inspect becomes."""

_PART = 8 << 20
"""Bytes of a file in one call: far from every limit of a cell, and few enough calls for the largest file."""
_TRIES = 3
"""How often a file is read from its start because it changed meanwhile."""
_KILLED = 128 + 9
_NOT_PERMITTED = ("Permission denied", "Operation not permitted")
_PLAINER = {"ENOTDIR": "ENOENT", "ENAMETOOLONG": "ENOENT", "EROFS": "EACCES"}
"""Inspect tells a model that there is no such file, or that it may not; of other errors the sample dies."""

# inspect changes the working directory while it starts a task; this module is loaded before.
_STARTED_IN = Path.cwd()

# Both run in the cell, by its interpreter without anything of the rollout's: no path, site or environment of its own.
# They are sent behind a first line with their arguments, so that the audit log shows whose file it was, and patterns of
# a rule can refuse it. The last line on standard error is the name of an errno, or what tells one version from another.
_READ = """
import errno, os, stat
try:
    file = os.open(FILE, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would hold us up
    facts = os.fstat(file)
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(facts.st_mode) else errno.EINVAL, "")
    while MOST and (part := os.pread(file, min(MOST, 1 << 20), AT)):
        AT, MOST = AT + len(part), MOST - len(part)
        while part:
            part = part[os.write(1, part):]
    os.write(2, b"%d %d %d" % (facts.st_size, facts.st_ino, facts.st_mtime_ns))
except OSError as error:
    os.write(2, errno.errorcode.get(error.errno, "EIO").encode())
    os._exit(1)
"""
_WRITE = """
import errno, os
try:
    if not AT:
        os.makedirs(os.path.dirname(FILE) or ".", exist_ok=True)
    new = 0 if AT else os.O_CREAT | os.O_TRUNC
    file = os.open(FILE, os.O_WRONLY | os.O_NONBLOCK | new, 0o666)
    if AT:
        os.lseek(file, AT, os.SEEK_SET)
    while part := os.read(0, 1 << 20):
        while part:
            part = part[os.write(file, part):]
except FileExistsError:
    os.write(2, b"ENOTDIR")
    os._exit(1)
except OSError as error:
    os.write(2, errno.errorcode.get(error.errno, "EIO").encode())
    os._exit(1)
"""


@dataclass(slots=True, kw_only=True)
class _Open:
    """A station, for as long as tasks use it."""

    policy: Path
    profile: str
    limits: Limits
    station: ToolStation
    free: anyio.Semaphore
    """Samples queue up here: a pool's own queue takes it for a standstill when no cell comes free for long."""
    tasks: int = 1


@inspect.sandboxenv(name="loopguard")
class LoopGuardSandboxEnvironment(SandboxEnvironment):  # type: ignore[misc]  # inspect_ai is not there for everybody
    """The cell of one sample. Made by `sample_init`, and gone with `sample_cleanup`.

    What a call writes is there for the next one. Calls run one after the other, also where a model makes several at
    once. None is ever run a second time: `timeout_retry` has no effect.
    """

    _runtimes: ClassVar[Callable[[CellSpec, str, EventSink], Runtime] | None] = None
    _open: ClassVar[dict[str | None, _Open]] = {}

    def __init__(self, episode: EpisodeCalls, used: _Open, *, sample: object) -> None:
        super().__init__()
        self._episode = episode
        # The audit log tells by it whose calls belong together, and inspect's log whose they are.
        self._name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', str(sample))[:40]}-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count(1)
        self._used = used
        self._turn = anyio.Lock()

    # What inspect asks of the class

    @classmethod
    async def task_init(cls, task_name: str, config: Any) -> None:
        """Open a station under the guard policy that `config` names.

        Raises PolicyError where the policy does not load or gives inspect no cell to keep, and whatever
        `ToolStation.open` raises.
        """
        policy = _policy_of(config)
        if (used := cls._open.get(config)) is not None:
            if used.policy != policy:
                raise UsageError(f"{config} is another file for another task: name the guard policy by its whole path")
            used.tasks += 1
            return
        loaded = load(policy)
        profile = _profile_of(loaded.policy, path=loaded.path)
        run_dir = _run_dir()
        kept = loaded.policy.sandbox.profiles[profile]
        station = await _in_thread(
            lambda: ToolStation.open(
                policy, run_dir=run_dir, command=("inspect_ai", str(policy)), runtimes=cls._runtimes
            )
        )
        cls._open[config] = _Open(
            policy=policy,
            profile=profile,
            limits=kept.limits.to_limits(),
            station=station,
            free=anyio.Semaphore(kept.cells),
        )
        # Standard output may be read by a machine.
        sys.stderr.write(f"loopguard: tool calls are recorded in {run_dir}\n")

    @classmethod
    async def task_cleanup(cls, task_name: str, config: Any, cleanup: bool) -> None:
        """Close the station after its last task. Also where `cleanup` is false: no cell outlives its controller."""
        used = cls._open.get(config)
        if used is None:
            return
        used.tasks -= 1
        if not used.tasks:
            del cls._open[config]
            with anyio.CancelScope(shield=True):
                await _in_thread(used.station.close)

    @classmethod
    async def sample_init(
        cls, task_name: str, config: Any, metadata: dict[str, Any]
    ) -> dict[str, LoopGuardSandboxEnvironment]:
        """Wait for a clean cell and keep it for this sample.

        Raises LoopFrozen where the run is frozen, and inspect's SandboxUnavailableError.
        """
        used = cls._open.get(config)
        if used is None:
            raise UsageError("sample_init before task_init: there is no station to take a cell from")
        await used.free.acquire()
        try:
            await _raise_if_frozen(used.station)
            with _as_inspect_says_it():
                episode = await _lend(used.station, used.profile)
        except BaseException:
            used.free.release()
            raise
        return {"default": cls(episode, used, sample=metadata.get("__sample_id__", "sample"))}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: Any,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        """Take the cell down, whatever happened to the sample."""
        with anyio.CancelScope(shield=True):
            for environment in environments.values():
                mine = environment.as_type(cls)
                try:
                    await _in_thread(mine._episode.close)
                finally:
                    mine._used.free.release()

    @classmethod
    async def cli_cleanup(cls, id: str | None) -> None:
        """Remove the cells that dead runs left behind; those of living ones stay."""
        from loopguard.sandbox.reaper import reap

        if id is not None:
            raise UsageError("a cell cannot be cleaned up by itself: run `inspect sandbox cleanup loopguard`")
        names = await _in_thread(reap)
        sys.stdout.write("".join(f"removed {name}\n" for name in names) or "nothing was left behind\n")

    @classmethod
    def default_concurrency(cls) -> int | None:
        """None: a sample waits in `sample_init` until one of the profile's cells is free."""
        return None

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> Any:
        """Raise UsageError: there is no configuration but the name of a file."""
        raise UsageError('the sandbox is configured by a guard policy: sandbox=("loopguard", "policy.yaml")')

    # What inspect asks of a sample's cell

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """Run a program of the cell.

        A program that fails is a result; so is one that is not there (127). One that a signal ended has 128 and the
        signal's number. `timeout` shortens the limit of the guard policy and does not lengthen it.

        Raises TimeoutError (what was printed is its `truncated_output`), PermissionError for what the cell may not
        execute and for what the guard policy refuses, OutputLimitExceededError where more was printed than is kept,
        inspect's SandboxUserUnsupportedError for any `user`, inspect's SandboxUnavailableError, LoopFrozen once the run
        is frozen.
        """
        if user is not None:
            raise inspect.SandboxUserUnsupportedError(
                f"a cell cannot run a call as {user!r}: it has one user without a name, and no way to become another"
            )
        _without_nul(*cmd, *(env or {}), *(env or {}).values(), cwd or "")
        request = {"argv": list(cmd), "env": env or {}} | ({"cwd": cwd} if cwd is not None else {})
        stdin = input.encode() if isinstance(input, str) else input or b""
        async with self._turn:
            outcome = await self._run(json.dumps(request), stdin=stdin, wall_s=timeout)
        return self._result(outcome, program=cmd[0])

    async def write_file(self, file: str, contents: str | bytes) -> None:
        """Write a file and the folders above it; what was there is replaced.

        Raises PermissionError, IsADirectoryError, TimeoutError or another OSError, and inspect's
        SandboxUnavailableError. A file that could not be written to its end may be there in part.
        """
        data = contents.encode() if isinstance(contents, str) else contents
        async with self._turn:
            for at in range(0, max(len(data), 1), _PART):
                await self._transfer(f"FILE, AT = {file!a}, {at}", _WRITE, file, stdin=data[at : at + _PART])

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """Read a whole file, line ends and all.

        Raises FileNotFoundError, PermissionError, IsADirectoryError, UnicodeDecodeError, TimeoutError or another
        OSError (also where the file changes all the time), OutputLimitExceededError above inspect's limit, and
        inspect's SandboxUnavailableError.
        """
        async with self._turn:
            for _ in range(_TRIES):
                data = await self._read(file)
                if data is not None:
                    return data.decode() if text else data
        raise OSError(errno.EAGAIN, "The file changed while it was read", file)

    async def connection(self, *, user: str | None = None) -> SandboxConnection:
        """Raise NotImplementedError: there is no way in."""
        raise NotImplementedError("there is no way into a cell, for people as for anybody: all that it did is recorded")

    # How

    async def _run(self, code: str, *, stdin: bytes, wall_s: float | None = None) -> Outcome:
        call = ToolCall(id=f"{self._name}-{next(self._numbers)}", tool=TOOL, code=code, stdin=stdin, wall_s=wall_s)
        with _as_inspect_says_it():
            outcome = await self._episode.arun(call)
        if outcome.status == "denied":
            # A run that stopped must not look like a call that may not be made.
            await _raise_if_frozen(self._used.station)
        return outcome

    def _result(self, outcome: Outcome, *, program: str) -> ExecResult[str]:
        """What inspect is told of a call, or the exception that says it."""
        stdout = _shown(outcome.stdout, outcome.stdout_bytes)
        stderr = _shown(outcome.stderr, outcome.stderr_bytes)
        ended_by_itself = outcome.exit_code is not None or outcome.signal is not None
        match outcome.status:
            case "denied":
                raise PermissionError(errno.EACCES, outcome.refusal)
            case "timeout":
                raise _timeout("the command was ended at its time limit", stdout + stderr)
            case "pids_limit" if not ended_by_itself:
                raise _timeout(
                    "the command was ended at its time limit, with no process left to start", stdout + stderr
                )
            case "output_limit":
                raise OutputLimitExceededError(f"{self._used.limits.flood_mib} MiB", stdout + stderr)
            case "oom" if outcome.exit_code is None:
                stderr += f"loopguard: ended at the memory limit of {self._used.limits.memory_mib} MiB\n"
            case _:
                pass
        if outcome.exit_code == 126 and stderr.removesuffix("\n") in {f"{program}: {why}" for why in _NOT_PERMITTED}:
            raise PermissionError(errno.EACCES, "The program may not be executed", program)
        self._refuse_cut(outcome, stdout + stderr)
        code = outcome.exit_code
        if code is None:
            code = _KILLED if outcome.signal is None else 128 + outcome.signal
        return ExecResult(success=code == 0, returncode=code, stdout=stdout, stderr=stderr)

    def _refuse_cut(self, outcome: Outcome, shown: str) -> None:
        """Head and tail with nothing between them must not pass for what a program wrote."""
        most = max(outcome.stdout_bytes, outcome.stderr_bytes)
        if most > SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, shown)
        if outcome.stdout_bytes > len(outcome.stdout) or outcome.stderr_bytes > len(outcome.stderr):
            raise OutputLimitExceededError(f"{self._used.limits.output_kib} KiB", shown)

    async def _read(self, file: str) -> bytes | None:
        """All of a file, or None where it changed between two of its parts."""
        most = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        part_bytes = min(_PART, self._used.limits.output_kib << 10, self._used.limits.flood_mib << 19)
        data = bytearray()
        first: bytes | None = None
        while True:
            # One byte more than is allowed tells that there is more.
            wanted = min(part_bytes, most + 1 - len(data))
            head = f"FILE, AT, MOST = {file!a}, {len(data)}, {wanted}"
            outcome = await self._transfer(head, _READ, file)
            data += outcome.stdout
            if len(data) > most or _size(outcome.stderr) > most:
                raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
            if first not in {None, outcome.stderr}:
                return None
            first = outcome.stderr
            if len(outcome.stdout) < wanted:
                return bytes(data)

    async def _transfer(self, head: str, program: str, file: str, *, stdin: bytes = b"") -> Outcome:
        """Run one of our programs on a file. Raises the OSError that it met there."""
        _without_nul(file)
        request = {"argv": ["python3", "-I", "-S", "-c", head + program]}
        outcome = await self._run(json.dumps(request), stdin=stdin)
        match outcome.status:
            case "ok" if len(outcome.stdout) == outcome.stdout_bytes:
                return outcome
            case "denied":
                raise PermissionError(errno.EACCES, outcome.refusal, file)
            case "timeout":
                raise _timeout(f"{file!r} was not transferred within the time limit", "")
            case "oom":
                raise OSError(errno.ENOMEM, "The cell ran out of memory", file)
            case _:
                raise _os_error(outcome.stderr, file)


def _policy_of(config: Any) -> Path:
    if config is None:
        return shipped("agent")
    if not isinstance(config, str):
        raise UsageError(
            f"a {type(config).__name__} is no configuration here: name a guard policy, such as policy.yaml"
        )
    return Path(config).resolve()


def _profile_of(policy: GuardPolicy, *, path: str) -> str:
    """The profile that calls of inspect run in. Raises PolicyError where there is none that a sample can keep."""
    rules = [rule for rule in policy.tools.rules if rule.tool == TOOL]
    running = next((rule for rule in rules if rule.then == "run" and rule.sandbox is not None), None)
    if running is None or running.sandbox is None or any(rule.then == "deny" for rule in rules):
        raise PolicyError([f"{path}: no rule lets the tool {TOOL} run, which is what inspect's calls become"])
    mode = policy.sandbox.profiles[running.sandbox].mode
    if mode != "episode":
        problem = (
            f"{path}: sandbox.profiles.{running.sandbox}.mode is {mode!r}; expected episode, since rule {running.id}"
        )
        raise PolicyError([f"{problem} runs the tool {TOOL} there, and a sample keeps its cell from call to call"])
    return running.sandbox


def _run_dir() -> Path:
    if named := os.environ.get("LOOPGUARD_RUN_DIR"):
        return _STARTED_IN / named
    name = f"inspect-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    return _STARTED_IN / "runs" / name


async def _in_thread(work: Callable[[], T]) -> T:
    """Wait for something slow beside the event loop; in a thread of its own, so that no other wait can hold it up."""
    done: T = await to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))
    return done


async def _lend(station: ToolStation, profile: str) -> EpisodeCalls:
    """An episode, as soon as there is a cell. A caller who is cancelled meanwhile leaves none behind."""
    lent: Future[EpisodeCalls] = Future()

    def wait() -> None:
        try:
            lent.set_result(station.episode(profile))
        except BaseException as error:  # noqa: BLE001 - it is raised again where somebody waits for it
            lent.set_exception(error)

    try:
        await to_thread.run_sync(wait, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
    except BaseException:
        lent.add_done_callback(_give_back)
        raise
    return lent.result()


def _give_back(lent: Future[EpisodeCalls]) -> None:
    if lent.exception() is None:
        lent.result().close()


async def _raise_if_frozen(station: ToolStation) -> None:
    if await _in_thread(lambda: station.frozen):
        stand = await _in_thread(lambda: standing(station.run_dir))
        raise LoopFrozen(stand.freeze or "unrecorded", stand.reason)


@contextmanager
def _as_inspect_says_it() -> Iterator[None]:
    """A sandbox that could not do its work is never shown as what a program printed."""
    try:
        yield
    except SandboxUnavailableError as error:
        raise inspect.SandboxUnavailableError(str(error)) from error


def _shown(kept: bytes, written: int) -> str:
    """Output as text; where it was cut, head and tail with the gap between them."""
    if written <= len(kept):
        return kept.decode("utf-8", errors="replace")
    half = len(kept) // 2
    head, tail = (part.decode("utf-8", errors="replace") for part in (kept[:half], kept[half:]))
    return f"{head}\n[{written - len(kept)} bytes left out]\n{tail}"


def _timeout(reason: str, shown: str) -> TimeoutError:
    error = TimeoutError(reason)
    if shown:
        error.truncated_output = shown  # type: ignore[attr-defined]  # where inspect looks for it
    return error


def _size(facts: bytes) -> int:
    first = facts.split(b" ")[0]
    return int(first) if first.isdigit() and len(first) < 20 else 0


def _os_error(said: bytes, file: str) -> OSError:
    """The exception for the errno that one of our programs named."""
    name = said.decode("ascii", errors="replace")
    number = {name: number for number, name in errno.errorcode.items()}.get(_PLAINER.get(name, name))
    if number is None:
        return OSError(errno.EIO, f"The cell could not do it: {name[-200:]!r}", file)
    return OSError(number, os.strerror(number), file)


def _without_nul(*texts: str) -> None:
    if any("\0" in text for text in texts):
        raise ValueError("embedded null byte")  # inspect knows these words and tells the model
