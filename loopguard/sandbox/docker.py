"""Run tool calls inside locked-down Docker containers.

Covered: the network, the host's files and processes, memory, process count, CPU, disk, output size, wall-clock time;
whatever a call leaves behind dies with it, and the next call starts from a proven clean cell.

Not covered: bugs in the kernel (choose `runtime: runsc` when that matters), timing side channels between cells on one
machine, and what a result talks its reader into. `docs/threat-model.md` has the long list.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import secrets
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import docker.errors
import requests

from loopguard.errors import LoopGuardError, SandboxError, SandboxUnavailableError
from loopguard.sandbox import attest, owner, wire
from loopguard.sandbox.base import shipped
from loopguard.sandbox.pool import Pool
from loopguard.types import Outcome, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.sandbox.base import CellSpec, EventSink

OWNER, RUN, DEADLINE = "loopguard.owner", "loopguard.run", "loopguard.deadline"
"""Labels of every cell: whose it is, of which run, and when it may be swept away whoever owns it (seconds, UTC)."""

_SUPERVISOR = "/opt/loopguard/supervisor.py"
_ENGINE_S = 20
_START_S = 30
_GRACE_S = 10
_SETTLE_S = 15
_WAIT_S = 60
_IDLE_S = 3600
_USE_S = 12 * 3600
_LIFETIME_S = 24 * 3600
_USERS, _MAPPED_USERS = (100_000, 2_000_000_000), (10_000, 65_000)
"""User ids that calls get; an engine that maps user ids (rootless, userns-remap) has 65,536 of them."""

_INODES = 8192
_MOST_INPUT_MIB = 16
_TOOLS = ("python", "sh")

_users_lock = threading.Lock()
_users_taken: list[range] = []

_live: weakref.WeakSet[DockerCell] = weakref.WeakSet()
_runtimes: set[DockerRuntime] = set()
_no_fork = threading.Lock()
"""Held while a stream is attached: a fork in that moment would hand the stream to a child that does not know of it."""


class DockerCell:
    """One container with our supervisor as its PID 1, from `create` to `remove`.

    The container ends when this process does: its standard input is attached once, by us, and its PID 1 leaves at the
    end of it.
    """

    def __init__(
        self, spec: CellSpec, *, run_id: str, on_event: EventSink, image: str = "", mapped: bool = True
    ) -> None:
        self.calls = 0
        self.name = f"lg-{run_id}-{secrets.token_hex(4)}"
        self.facts: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self._spec = spec
        self._image = image or spec.image
        self._mapped = mapped
        self._users = range(0)
        self._on_event = on_event
        self._born = time.monotonic()
        self._end = threading.Lock()
        self._killed = ""
        self._announced = False
        self._gone = False
        self._engine = _connect()
        try:
            self._id: str = self._create(run_id)
            self._attach()
            self._engine.start(self._id)
            self._greet()
            on_event("sandbox.created", {"cell": self.name, "image": spec.image, **self.facts})
            self._announced = True
        except (docker.errors.DockerException, requests.RequestException, SandboxError, TimeoutError) as error:
            self.destroy("stillborn")
            if isinstance(error, SandboxUnavailableError):
                raise
            late = f"it did not answer within {_START_S} s"
            said = late if isinstance(error, TimeoutError) else _said(error)
            raise SandboxUnavailableError(f"a cell could not be started: {said}") from error
        except BaseException:
            self.destroy("stillborn")
            raise

    def alive(self) -> bool:
        """Whether it still waits for a call, and is young enough to be nobody's orphan when that call ends."""
        return self._channel.quiet() and time.monotonic() - self._born < _USE_S

    def call(self, call: ToolCall) -> Outcome:
        """Run a call. Raises SandboxUnavailableError where the cell was lost or killed under it."""
        limits = self._spec.limits
        code = call.code.encode("utf-8", errors="surrogatepass")
        header = {
            "id": call.id,
            "tool": call.tool,
            "code_bytes": len(code),
            "wall_s": limits.wall_s,
            "cpus": limits.cpus,
            "tmpfs_mib": limits.tmpfs_mib,
            "output_bytes": limits.output_kib << 10,
            "flood_bytes": limits.flood_mib << 20,
        }
        self.calls += 1
        started = time.monotonic()
        try:
            self._channel.send(wire.CALL, header, code + call.stdin, timeout_s=_GRACE_S)
            frame = self._channel.receive(wire.RESULT, timeout_s=limits.wall_s + _GRACE_S)
            return _outcome(call, frame)
        except wire.LostError as lost:
            if self._killed:
                raise SandboxUnavailableError(self._killed) from lost
            if self._out_of_memory():
                return Outcome(call_id=call.id, status="oom", wall_ms=(time.monotonic() - started) * 1e3)
            raise SandboxUnavailableError(f"cell {self.name} died under a call: {lost}") from lost
        except TimeoutError as late:
            raise SandboxUnavailableError(f"cell {self.name} did not answer within its deadline") from late
        except (wire.ProtocolError, KeyError, TypeError) as error:
            raise SandboxUnavailableError(f"cell {self.name} said what no supervisor says: {error!r}") from error

    def settle(self) -> str:
        """Wait for the second frame of a call, which says whether the cell is clean."""
        if self._spec.mode == "fresh":
            return "used once"
        try:
            frame = self._channel.receive(wire.CLEAN, timeout_s=_SETTLE_S)
        except TimeoutError:
            return f"not clean: no word within {_SETTLE_S} s"
        except SandboxError as error:
            return f"not clean: {_said(error)}"
        doubt = frame.header.get("doubt")
        return "" if doubt == "" else f"not clean: {doubt}"

    def kill(self, why: str) -> None:
        """End the call that runs in it, now; the call raises SandboxUnavailableError(why)."""
        self._killed = why
        # The stream first: without it PID 1 leaves by itself, also where the engine does not answer.
        wire.shut(self._socket)
        with suppress(docker.errors.DockerException, requests.RequestException, SandboxUnavailableError):
            # A client of its own: the other thread may be in the middle of a request.
            _connect().kill(self._id)

    def destroy(self, reason: str) -> None:
        """Take the container down. Once; later calls do nothing."""
        with self._end:
            if self._gone:
                return
            self._gone = True
        # The stream first: an engine with an undrained stream hangs in kill and remove.
        if hasattr(self, "_socket"):
            wire.shut(self._socket)
            self._raw.close()
            self._socket.close()
        with suppress(docker.errors.DockerException, requests.RequestException):
            # By its name where a creation was cut short: it may have come into being nevertheless. What is not removed
            # here ends by itself and is swept up at the next start.
            self._engine.remove_container(getattr(self, "_id", self.name), force=True, v=True)
        self._engine.close()
        _give_users_back(self._users)
        if self._announced:
            # A log that cannot be written freezes the loop by itself; the container has to go in any case.
            with suppress(LoopGuardError):
                self._on_event("sandbox.removed", {"cell": self.name, **_told(reason), "calls": self.calls})

    def drop(self) -> None:
        """In a forked child: let go of the stream without a word, so that the parent's end is the only one."""
        with suppress(OSError, AttributeError):
            os.close(self._socket.detach())

    def _attach(self) -> None:
        # Before start, and exactly once: the engine closes the cell's standard input with this connection.
        with _no_fork:
            self._raw = self._engine.attach_socket(self._id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            # Over TLS and SSH the client hands out the connection itself, else a file around it.
            self._socket = getattr(self._raw, "_sock", self._raw)
            self._channel = wire.Channel(self._socket)
            _live.add(self)

    def _create(self, run_id: str) -> str:
        spec = self._spec
        self._users = _take_users(spec.calls_per_cell + 2, _MAPPED_USERS if self._mapped else _USERS)
        options = {
            # One below it is the user that PID 1 is while it kills.
            "first_uid": self._users.start + 1,
            "nproc": spec.limits.pids if spec.runtime == "runsc" else 0,
            "idle_s": _IDLE_S,
            "preload": list(spec.preload),
        }
        created = self._engine.create_container_from_config(
            {
                "Image": self._image,
                "Hostname": "cell",
                "Cmd": ["python3", "-I", _SUPERVISOR, json.dumps(options)],
                "Entrypoint": [],
                "User": "0:0",
                "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", "OMP_NUM_THREADS=1"],
                "WorkingDir": "/",
                "OpenStdin": True,
                "StdinOnce": True,
                "AttachStdin": True,
                "AttachStdout": True,
                "AttachStderr": True,
                "Tty": False,
                "NetworkDisabled": True,
                "StopSignal": "SIGKILL",
                "Healthcheck": {"Test": ["NONE"]},
                "Labels": {OWNER: owner.me(), RUN: run_id, DEADLINE: str(int(time.time()) + _LIFETIME_S)},
                "HostConfig": host_config(spec),
            },
            self.name,
        )
        return str(created["Id"])

    def _greet(self) -> None:
        hello = self._channel.receive(wire.HELLO, timeout_s=_START_S)
        found = self._engine.inspect_container(self._id)
        asked = host_config(self._spec)
        differs = attest.differences(asked, found["HostConfig"]) + attest.mounts(found.get("Mounts"))
        if not found["Config"].get("StdinOnce"):
            differs.append("StdinOnce is off: the cell would outlive its owner")
        differs += [f"{mount} has mode {mode}" for mount, mode in hello.header["mounts"].items() if mode != "0o41777"]
        if differs:
            raise SandboxUnavailableError(
                f"the engine did not apply what the guard policy asks for: {'; '.join(differs)}"
            )
        self.facts = {
            "runtime": found["HostConfig"]["Runtime"],
            "image_id": found["Image"],
            "python": hello.header["python"],
            "counters": hello.header["counters"],
            "attested": len(asked) + len(attest.MUST_BE) + len(attest.MUST_BE_EMPTY),
        }
        # As the engine gives them back; of the security options one is the whole seccomp list.
        self.settings = {name: found["HostConfig"].get(name) for name in asked if name != "SecurityOpt"}

    def _out_of_memory(self) -> bool:
        """Whether the kernel killed it for its memory. The engine learns of that a moment after the stream ended."""
        with suppress(docker.errors.DockerException, requests.RequestException, SandboxUnavailableError):
            engine = _connect()
            for _ in range(40):
                state = engine.inspect_container(self._id)["State"]
                if state.get("OOMKilled") or not state.get("Running"):
                    return bool(state.get("OOMKilled"))
                time.sleep(0.05)
        return False


class DockerRuntime:
    """A pool of cells on one Docker engine. Lives from `start` to `close`, at the latest to the end of the process."""

    def __init__(
        self,
        spec: CellSpec,
        *,
        run_id: str,
        on_event: EventSink,
        make_cell: Callable[[], DockerCell] | None = None,
    ) -> None:
        self._spec = spec
        self._run_id = run_id
        self._on_event = on_event
        self._facts: dict[str, Any] = {}
        self._make_cell = make_cell or self._new_cell
        self._pool: Pool | None = None
        self._image = ""
        self._mapped = True
        self._pid = os.getpid()

    def start(self) -> None:
        """Check engine, image and runtime, sweep up what dead loops left, warm the cells."""
        from loopguard.sandbox.reaper import reap

        if self._pool is not None:
            return
        engine = _connect()
        try:
            self._check(engine, engine.info())
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise SandboxUnavailableError(f"the Docker engine does not answer as it should: {_said(error)}") from error
        finally:
            engine.close()
        for name in reap():
            self._on_event("sandbox.reaped", {"cell": name})
        spec = self._spec
        wait_s = _WAIT_S + spec.limits.wall_s
        self._pool = Pool(self._make_cell, size=spec.cells, calls_per_cell=spec.calls_per_cell, wait_s=wait_s)
        _runtimes.add(self)
        try:
            self._pool.start()
        except BaseException:
            self.close()
            raise

    def run(self, call: ToolCall) -> Outcome:
        """Run one call in a clean cell."""
        if os.getpid() != self._pid:
            raise SandboxUnavailableError("this is a forked process: a sandbox belongs to the process that started it")
        if self._pool is None:
            raise SandboxUnavailableError("the sandbox is not running")
        if call.tool not in _TOOLS:
            raise SandboxUnavailableError(f"no cell can run the tool {call.tool!r}; there are {', '.join(_TOOLS)}")
        if (size := len(call.code) + len(call.stdin)) > _MOST_INPUT_MIB << 20:
            # PID 1 holds it for a moment, within the memory of the cell.
            raise SandboxUnavailableError(
                f"a call takes {_MOST_INPUT_MIB} MiB of code and input at most, not {size / 2**20:.1f}"
            )
        return self._pool.run(call)

    def kill_running(self) -> int:
        """End every call that runs now."""
        return self._pool.kill_running() if self._pool is not None and os.getpid() == self._pid else 0

    def close(self) -> None:
        """Remove every container of this runtime."""
        if self._pool is not None and os.getpid() == self._pid:
            self._pool.close()
            self._pool = None
        _runtimes.discard(self)

    def facts(self) -> dict[str, Any]:
        """The engine and what it applied to the cell that was made last."""
        return dict(self._facts)

    def _new_cell(self) -> DockerCell:
        # The image that was looked at, not whatever its tag means by now.
        cell = DockerCell(
            self._spec, run_id=self._run_id, on_event=self._on_event, image=self._image, mapped=self._mapped
        )
        self._facts |= {**cell.facts, "settings": cell.settings}
        return cell

    def _check(self, engine: Any, info: dict[str, Any]) -> None:
        runtimes = sorted(info.get("Runtimes", {}))
        if self._spec.runtime not in runtimes:
            raise SandboxUnavailableError(
                f"the guard policy asks for the runtime {self._spec.runtime}, this engine has {', '.join(runtimes)}: "
                f"register it with the engine, or choose another in sandbox.profiles"
            )
        try:
            self._image = engine.inspect_image(self._spec.image)["Id"]
            self._mapped = any("userns" in each or "rootless" in each for each in info.get("SecurityOptions") or ())
        except docker.errors.ImageNotFound:
            raise SandboxUnavailableError(
                f"the image {self._spec.image} is not here: run `loopguard sandbox build`"
            ) from None
        self._facts = {
            "engine": info["ServerVersion"],
            "cgroup": info.get("CgroupVersion", "1"),
            "driver": info["Driver"],
        }


def _take_users(count: int, among: tuple[int, int]) -> range:
    """User ids for one cell, apart from those of every other cell of this process that is still there.

    The kernel counts some things per user id and machine, whatever container it is in. By chance they are also apart
    from those of other processes: there is room for millions of cells, except where the engine maps user ids.
    """
    with _users_lock:
        for _ in range(1000):
            first = among[0] + secrets.randbelow(among[1] - among[0] - count)
            users = range(first, first + count)
            if not any(users.start < other.stop and other.start < users.stop for other in _users_taken):
                _users_taken.append(users)
                return users
    raise SandboxUnavailableError(
        f"no {count} user ids in a row are free: lower calls_per_cell or cells in the profile"
    )


def _give_users_back(users: range) -> None:
    with _users_lock, suppress(ValueError):
        _users_taken.remove(users)


def _told(reason: str) -> dict[str, str]:
    """The reason of a removal in one of the four words that the audit log knows, and what else there is to say."""
    if reason in {"recycled", "lost", "closed"}:
        return {"reason": reason}
    if reason.startswith("not clean"):
        return {"reason": "dirty", "detail": reason.removeprefix("not clean: ")}
    return {"reason": "recycled" if reason == "used once" else "lost", "detail": reason}


def host_config(spec: CellSpec) -> dict[str, Any]:
    """What the engine is asked to apply to a cell, in its own words (HostConfig of the Docker API)."""
    limits = spec.limits
    memory = limits.memory_mib << 20
    # Together they are what the policy lets a call write.
    job = max(1, limits.tmpfs_mib // 2)
    other = max(1, limits.tmpfs_mib // 4)
    writable = "rw,nosuid,nodev,exec,mode=1777,size={}m,nr_inodes={}"
    return {
        "NetworkMode": "none",
        "CapDrop": ["ALL"],
        "CapAdd": ["SETGID", "SETUID"],
        "SecurityOpt": ["no-new-privileges:true", f"seccomp={_seccomp()}"],
        "ReadonlyRootfs": True,
        "Tmpfs": {
            "/job": writable.format(job, _INODES),
            "/tmp": writable.format(other, _INODES // 2),  # noqa: S108 - inside the cell
            "/dev/shm": writable.format(other, _INODES // 2),  # noqa: S108 - inside the cell
            "/dev/mqueue": "ro,size=4k",
        },
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "Memory": memory,
        "MemorySwap": memory,
        # A process of gVisor's own counts here too, and reaching this limit would crash it; RLIMIT_NPROC holds there.
        "PidsLimit": 4096 if spec.runtime == "runsc" else limits.pids + 2,
        "NanoCpus": int(limits.cpus * 1e9),
        "OomScoreAdj": 500,
        "Ulimits": [
            {"Name": "core", "Soft": 0, "Hard": 0},
            {"Name": "memlock", "Soft": 0, "Hard": 0},
            {"Name": "msgqueue", "Soft": 0, "Hard": 0},
            {"Name": "nofile", "Soft": 1024, "Hard": 1024},
        ],
        "LogConfig": {"Type": "none", "Config": {}},
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "AutoRemove": False,
        "Runtime": spec.runtime,
    }


def containers() -> list[dict[str, Any]]:
    """Every cell of every owner on this engine: `Id`, `Names`, `Labels`. Raises SandboxUnavailableError."""
    engine = _connect()
    try:
        # The plain list: asking for each container in turn would hang on one that is being torn down.
        return list(engine.containers(all=True, filters={"label": [OWNER]}))
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise SandboxUnavailableError(f"the Docker engine does not list its containers: {_said(error)}") from error
    finally:
        engine.close()


def remove(container_id: str) -> bool:
    """Remove a container by force; whether that worked."""
    with suppress(docker.errors.DockerException, requests.RequestException):
        engine = _connect()
        try:
            engine.remove_container(container_id, force=True, v=True)
            return True
        finally:
            engine.close()
    return False


def _connect() -> Any:
    """A client of its own for each use: the client's connections are not made to be shared between threads."""
    where = "unix:///var/run/docker.sock"
    try:
        options = _engine_address()
        where = options.get("base_url", where)
        if where.startswith("unix:///"):
            # The client would leave a socket open behind it where there is nothing to connect to.
            Path(where.removeprefix("unix://")).stat()
        return docker.APIClient(**options, version="auto", timeout=_ENGINE_S)
    except (docker.errors.DockerException, requests.RequestException, OSError, ValueError) as error:
        raise SandboxUnavailableError(
            f"no Docker engine answers at {where} ({_said(error)}): start Docker, or run `loopguard sandbox build`"
        ) from error


def _engine_address() -> dict[str, Any]:
    """Where the docker command would look: DOCKER_HOST, else the context that is in use."""
    options: dict[str, Any] = docker.utils.kwargs_from_env()
    if "base_url" in options:
        return options
    context = docker.context.ContextAPI.get_context(os.environ.get("DOCKER_CONTEXT"))
    if context is None:
        raise docker.errors.DockerException("the context in use does not exist; see `docker context ls`")
    if context.name == "default":
        return options
    return {"base_url": context.Host, "tls": context.TLSConfig or False}


@functools.cache
def _seccomp() -> str:
    """The profile's contents on one line; the engine wants no path."""
    return json.dumps(json.loads(shipped("seccomp.json").read_text(encoding="utf-8")), separators=(",", ":"))


def _outcome(call: ToolCall, frame: wire.Frame) -> Outcome:
    header = frame.header
    if header.get("id") != call.id:
        raise wire.ProtocolError(f"the result is for call {header.get('id')!r}, not for {call.id!r}")
    if header.get("fork_error"):
        raise SandboxUnavailableError(f"the cell could not start a process: {os.strerror(header['fork_error'])}")
    kept = header["stdout_kept"]
    return Outcome(
        call_id=call.id,
        status=header["status"],
        exit_code=header["exit_code"],
        signal=header["signal"],
        stdout=frame.payload[:kept],
        stderr=frame.payload[kept:],
        stdout_bytes=header["stdout_bytes"],
        stderr_bytes=header["stderr_bytes"],
        wall_ms=header["wall_ms"],
        leftovers=header["leftovers"],
    )


def _said(error: BaseException) -> str:
    """The useful part of what an engine or a cell said, on one line."""
    told = getattr(error, "explanation", None)
    if not told and isinstance(error, (requests.RequestException, docker.errors.DockerException, OSError)):
        told = _root(error)
    text = " ".join(str(told or error or type(error).__name__).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _root(error: BaseException) -> str:
    """What the operating system said, out of the nest of exceptions that the HTTP client wraps around it."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            return below.strerror
        below = below.__cause__ or below.__context__
    return ""


def _in_child() -> None:
    _no_fork.release()
    for cell in list(_live):
        cell.drop()


def _at_exit() -> None:
    for runtime in list(_runtimes):
        runtime.close()


os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_in_child)
atexit.register(_at_exit)
