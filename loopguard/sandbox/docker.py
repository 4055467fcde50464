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
import math
import os
import secrets
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from loopguard.errors import CallError, LoopGuardError, SandboxError, SandboxUnavailableError
from loopguard.sandbox import attest, files, owner, wire
from loopguard.sandbox.base import shipped
from loopguard.sandbox.engine import Engine, said
from loopguard.sandbox.pool import Pool
from loopguard.types import Outcome, ToolCall

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import TracebackType

    from loopguard.sandbox.base import CellSpec, EventSink
    from loopguard.sandbox.egress import Egress, Tunnels

OWNER, RUN, DEADLINE = "loopguard.owner", "loopguard.run", "loopguard.deadline"
"""Labels of every cell: whose it is, of which run, and when it may be swept away whoever owns it (seconds, UTC)."""

PROTOCOL = "loopguard.protocol"
"""Label of every image: which frames its supervisor speaks."""

_SUPERVISOR = "/opt/loopguard/supervisor.py"
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
_MOST_CODE_MIB = 16
_MOST_STDIN_MIB = 256
_MOST_NAMES_KIB = 1024
_OWN_FRAMES_MIB = 2
_CPU_TURN_US, _LEAST_QUOTA_US = 20_000, 1000

_users_lock = threading.Lock()
_users_taken: list[range] = []

_live: weakref.WeakSet[DockerCell] = weakref.WeakSet()
_runtimes: set[DockerRuntime] = set()
_no_fork = threading.Lock()
"""Held while a stream is attached: a fork in that moment would hand the stream to a child that does not know of it."""


class DockerCell:
    """One container with our supervisor as its PID 1, from `create` to `remove`.

    The container ends when this process does: its standard input is attached once, by us, and its PID 1 leaves at the
    end of it. The engine then takes the container away by itself.
    """

    def __init__(
        self,
        spec: CellSpec,
        *,
        run_id: str,
        on_event: EventSink,
        image: str = "",
        mapped: bool = True,
        egress: Egress | None = None,
    ) -> None:
        self.calls = 0
        self.name = f"lg-{run_id}-{secrets.token_hex(4)}"
        self.facts: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.languages: tuple[str, ...] = ()
        self._spec = spec
        self._image = image or spec.image
        self._mapped = mapped
        self._egress = egress
        self._users = range(0)
        self._on_event = on_event
        self._born = time.monotonic()
        self._end = threading.Lock()
        self._killed = self._current = ""
        self._killing = threading.Lock()
        self._owes = False
        self._doubt = ""
        self._announced = False
        self._gone = False
        self._raw: Any = None
        self._engine = Engine()
        try:
            self._id = self._create(run_id)
            self._attach()
            self._engine.start(self._id)
            self._greet()
            on_event("sandbox.created", {"cell": self.name, "image": spec.image, **self.facts})
            self._announced = True
        except (SandboxError, TimeoutError, OSError) as error:
            self.destroy("stillborn")
            if isinstance(error, SandboxUnavailableError):
                raise
            late = f"it did not answer within {_START_S} s"
            why = late if isinstance(error, TimeoutError) else said(error)
            raise SandboxUnavailableError(f"a cell could not be started: {why}") from error
        except BaseException:
            self.destroy("stillborn")
            raise

    def resting(self) -> bool:
        """Whether nothing is to be read: neither bytes that nobody asked for, nor the end of the stream."""
        return not self._channel.waiting()

    def settle(self) -> str:
        """Wait until it is clean; the reason where it cannot be used again, else the empty string."""
        try:
            if self._owes:
                doubt = self._channel.receive(wire.CLEAN, timeout_s=_SETTLE_S).header.get("doubt")
                if doubt != "":
                    return f"not clean: {doubt}"
                self._owes = False
        except TimeoutError:
            return f"not clean: no word within {_SETTLE_S} s"
        except wire.LostError:
            return "lost"
        except (SandboxError, OSError) as error:
            return f"not clean: {said(error)}"
        if not self.resting():
            return "lost"
        # Young enough to be nobody's orphan when the next call ends.
        return "recycled" if time.monotonic() - self._born > _USE_S else ""

    def spent(self) -> str:
        """Why it is not to be used again, as far as that is known before it has been cleaned; else empty."""
        if self._spec.mode == "fresh":
            return "used once"
        if self._spec.mode == "pooled" and self.calls >= self._spec.calls_per_cell:
            return "recycled"
        return f"not clean: {self._doubt}" if self._doubt else ""

    def call(self, call: ToolCall) -> Outcome:
        """Run a call. Raises SandboxUnavailableError where the cell was lost or killed under it."""
        limits = self._spec.limits
        wall_s = limits.wall_s if call.wall_s is None else min(call.wall_s, limits.wall_s)
        code, reads = _encoded(call.runs), call.reads
        less_memory = call.memory_mib is not None and call.memory_mib < limits.memory_mib
        header = {
            "id": call.id,
            "tool": call.language or call.tool,
            "code_bytes": len(code),
            "files": [[name, len(data)] for name, data in call.files.items()],
            "fetch": list(call.fetch),
            "wall_s": wall_s,
            "memory_mib": call.memory_mib if less_memory else 0,
        }
        self.calls += 1
        self._owes = True
        self._current = call.id
        started, started_at = time.monotonic(), time.time()
        tunnels = self._tunnels(call)
        try:
            # A call that does not read its input holds it up until it is over.
            self._channel.send(wire.CALL, header, code, *call.files.values(), reads, timeout_s=wall_s + _GRACE_S)
            frame = self._channel.receive(wire.RESULT, timeout_s=wall_s + _GRACE_S, meanwhile=tunnels)
            self._doubt = str(frame.header["doubt"])
            return _outcome(call, frame, self._spec)
        except wire.LostError as lost:
            if self._killed:
                raise SandboxUnavailableError(self._killed) from lost
            if self._out_of_memory(since=started_at):
                return Outcome(call_id=call.id, status="oom", wall_ms=(time.monotonic() - started) * 1e3)
            raise SandboxUnavailableError(f"cell {self.name} died under a call: {lost}") from lost
        except TimeoutError as late:
            raise SandboxUnavailableError(f"cell {self.name} did not answer within its deadline") from late
        except (wire.ProtocolError, KeyError, TypeError, ValueError) as error:
            raise SandboxUnavailableError(f"cell {self.name} said what no supervisor says: {error!r}") from error
        finally:
            with self._killing:
                self._current = ""
            if tunnels is not None:
                self._close(tunnels)

    def kill(self, why: str, call_id: str | None = None) -> bool:
        """End what runs in it, or this call alone, now; it raises SandboxUnavailableError(why). Whether there was one.

        Only the stream is cut, which needs no answer of the engine: PID 1 leaves at its end, and whoever waits for the
        call hears of it and has the container taken away.
        """
        with self._killing:
            if call_id is not None and call_id != self._current:
                return False
            self._killed = why
            wire.shut(self._socket)
            return True

    def destroy(self, reason: str) -> None:
        """Take the container down. Once; later calls do nothing."""
        with self._end:
            if self._gone:
                return
            self._gone = True
        # The stream first: an engine with an undrained stream hangs in kill and remove.
        if self._raw is not None:
            wire.shut(self._socket)
            self._raw.close()
            self._socket.close()
        # By its name where a creation was cut short: it may have come into being nevertheless. What is not removed here
        # ends by itself, and is swept up at the next start.
        self._engine.remove(getattr(self, "_id", self.name))
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
            self._socket: socket.socket
            self._socket, self._raw = self._engine.attach(self._id)
            self._channel = wire.Channel(self._socket, most=_most_payload(self._spec))
            _live.add(self)

    def _create(self, run_id: str) -> str:
        # One user is what PID 1 is while it kills, and one is made ready for a call that does not come.
        self._users = _take_users(self._spec.calls_per_cell + 3, _MAPPED_USERS if self._mapped else _USERS)
        labels = {OWNER: owner.me(), RUN: run_id, DEADLINE: str(int(time.time()) + _LIFETIME_S)}
        return self._engine.create(
            {**container_config(self._spec, self._users), "Image": self._image, "Labels": labels}, self.name
        )

    def _greet(self) -> None:
        hello = self._channel.receive(wire.HELLO, timeout_s=_START_S).header
        found = self._engine.inspect(self._id)
        asked = host_config(self._spec)
        differs = attest.differences(asked, found["HostConfig"]) + attest.mounts(found.get("Mounts"))
        if not found["Config"].get("StdinOnce"):
            differs.append("StdinOnce is off: the cell would outlive its owner")
        differs += [f"inside the cell {text}" for text in attest.seen_inside(asked, hello["cell"])]
        if differs:
            raise SandboxUnavailableError(
                f"the engine did not apply what the guard policy asks for: {'; '.join(differs)}"
            )
        self.languages = tuple(hello["languages"])
        self.facts = {
            "runtime": found["HostConfig"]["Runtime"],
            "image_id": found["Image"],
            "python": hello["python"],
            "languages": list(self.languages),
            "counters": hello["counters"],
            "attested": len(asked) + len(attest.MUST_BE) + len(attest.MUST_BE_EMPTY) + len(hello["cell"]),
        }
        # As the engine gives them back; of the security options one is the whole seccomp list.
        applied = {name: found["HostConfig"].get(name) for name in asked if name != "SecurityOpt"}
        self.settings = {"engine": applied, "inside": hello["cell"]}

    def _close(self, tunnels: Tunnels) -> None:
        tunnels.close()
        try:
            # Or the next frame would begin in the middle of this one.
            self._channel.finish_sending(timeout_s=_GRACE_S)
        except (SandboxError, TimeoutError) as error:
            self._doubt = self._doubt or f"a frame was not sent to its end: {said(error)}"

    def _tunnels(self, call: ToolCall) -> Tunnels | None:
        if self._egress is None:
            return None

        def on_event(body: dict[str, Any]) -> None:
            self._on_event("tool.egress", {"call": call.id, "cell": self.name, **body})

        return self._egress.tunnels(self._channel.send_later, on_event)

    def _out_of_memory(self, *, since: float) -> bool:
        with suppress(SandboxUnavailableError), Engine() as engine:
            return engine.ran_out_of_memory(self._id, since=since)
        return False


class DockerEpisode:
    """One cell for one rollout. Not for two threads at once; ended by `close`, a lost cell, or its runtime's end."""

    def __init__(self, runtime: DockerRuntime, pool: Pool, cell: DockerCell) -> None:
        self._runtime = runtime
        self._pool = pool
        self._cell = cell
        self._over = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, call: ToolCall) -> Outcome:
        """Run one call; what earlier calls wrote is there. Raises SandboxUnavailableError when the episode is over."""
        if self._over:
            raise SandboxUnavailableError(f"the episode is over: {self._over}")
        self._runtime.check(call)
        try:
            if doubt := self._cell.settle():
                raise SandboxUnavailableError(f"the cell of this episode cannot be used any more: {doubt}")
            return self._cell.call(call)
        except BaseException as error:
            self._end(f"{error}" or type(error).__name__, "lost" if isinstance(error, SandboxError) else "abandoned")
            raise

    def kill(self, why: str) -> None:
        """End the call that runs, and with it the episode; from any thread."""
        self._cell.kill(why)

    def close(self) -> None:
        """Take the cell down; may be called twice."""
        self._end("it was closed", "closed")

    def _end(self, why: str, reason: str) -> None:
        if not self._over:
            self._over = why
            self._pool.discard(self._cell, reason)


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
        self._languages: tuple[str, ...] = ()
        self._make_cell = make_cell or self._new_cell
        self._pool: Pool | None = None
        self._egress: Egress | None = None
        self._image = ""
        self._mapped = True
        self._pid = os.getpid()

    def start(self) -> None:
        """Check engine, image and runtime, sweep up what dead loops left, warm the cells."""
        from loopguard.sandbox.reaper import reap

        if self._pool is not None:
            return
        if self._spec.egress:
            from loopguard.sandbox.egress import Egress

            self._egress = Egress(self._spec.egress)
        with Engine() as engine:
            self._check_engine(engine)
        for name in reap():
            self._on_event("sandbox.reaped", {"cell": name})
        spec = self._spec
        self._pool = Pool(self._make_cell, size=spec.cells, queue=spec.queue, wait_s=_WAIT_S + spec.limits.wall_s)
        _runtimes.add(self)
        try:
            self._pool.start()
        except BaseException:
            self.close()
            raise

    def run(self, call: ToolCall) -> Outcome:
        """Run one call in a clean cell."""
        if self._spec.mode == "episode":
            with self._episode(call.id) as episode:
                return episode.run(call)
        pool = self._running_pool()
        self.check(call)
        return pool.run(call)

    def episode(self) -> DockerEpisode:
        """Lend a clean cell until it is closed."""
        return self._episode(f"episode-{secrets.token_hex(8)}")

    def kill(self, call_id: str, why: str) -> bool:
        """End one call, whether it runs or waits; whether there was one."""
        return self._pool.kill(call_id, why) if self._pool is not None and os.getpid() == self._pid else False

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

    def check(self, call: ToolCall) -> None:
        """Raises CallError for a call that no cell takes."""
        limits = self._spec.limits
        language = call.language or call.tool
        if language not in self._languages:
            raise CallError(f"no cell can run the tool {language!r}; there are {', '.join(self._languages)}")
        for what, size, most in (
            ("code", len(call.runs), _MOST_CODE_MIB),
            ("standard input", len(call.reads), _MOST_STDIN_MIB),
            ("files", sum(map(len, call.files.values())), limits.files_mib),
        ):
            if size > most << 20:
                raise CallError(f"a call takes {most} MiB of {what} at most, not {size / 2**20:.1f}")
        for what, names in (("files", call.files), ("fetch", call.fetch)):
            if len(names) > limits.files:
                raise CallError(f"a call takes {limits.files} names in {what} at most, not {len(names)}")
            for name in names:
                if (why := files.trouble(name, depth=limits.files_depth)) and (what, name) != ("fetch", "."):
                    raise CallError(f"{name!a} is no name for a file of a call: {why}")
        if len(json.dumps([*call.files, *call.fetch])) > _MOST_NAMES_KIB << 10:
            raise CallError(f"the names of a call's files take {_MOST_NAMES_KIB} KiB together at most")
        if clash := files.conflict(call.files):
            raise CallError(f"{clash!a} is the name of a file and of a folder of the same call")
        if call.wall_s is not None and not (math.isfinite(call.wall_s) and call.wall_s > 0):
            raise CallError(f"wall_s is {call.wall_s}; a time limit is a finite number of seconds above 0")
        if call.memory_mib is not None and call.memory_mib <= 0:
            raise CallError(f"memory_mib is {call.memory_mib}; a memory limit is above 0")

    def _running_pool(self) -> Pool:
        if os.getpid() != self._pid:
            raise SandboxUnavailableError("this is a forked process: a sandbox belongs to the process that started it")
        if self._pool is None:
            raise SandboxUnavailableError("the sandbox is not running")
        return self._pool

    def _episode(self, call_id: str) -> DockerEpisode:
        pool = self._running_pool()
        cell = pool.take(call_id)
        assert isinstance(cell, DockerCell)
        return DockerEpisode(self, pool, cell)

    def _new_cell(self) -> DockerCell:
        # The image that was looked at, not whatever its tag means by now.
        cell = DockerCell(
            self._spec,
            run_id=self._run_id,
            on_event=self._on_event,
            image=self._image,
            mapped=self._mapped,
            egress=self._egress,
        )
        self._languages = cell.languages
        self._facts |= {**cell.facts, "settings": cell.settings}
        return cell

    def _check_engine(self, engine: Engine) -> None:
        info = engine.info()
        runtimes = sorted(info.get("Runtimes", {}))
        if self._spec.runtime not in runtimes:
            raise SandboxUnavailableError(
                f"the guard policy asks for the runtime {self._spec.runtime}, this engine has {', '.join(runtimes)}: "
                f"register it with the engine, or choose another in sandbox.profiles"
            )
        runc = str(info["RuncVersion"])
        if self._spec.runtime == "runc" and (why := attest.old_runc(runc)):
            raise SandboxUnavailableError(why)
        image = engine.image(self._spec.image)
        if (image["Config"].get("Labels") or {}).get(PROTOCOL) != str(wire.PROTOCOL):
            raise SandboxUnavailableError(
                f"the image {self._spec.image} is not made for this version of LoopGuard: "
                f"run `loopguard sandbox build`, and build images of your own on its result"
            )
        self._image = str(image["Id"])
        self._mapped = any("userns" in each or "rootless" in each for each in info.get("SecurityOptions") or ())
        self._facts = {
            "engine": info["ServerVersion"],
            "runc": runc,
            "cgroup": info.get("CgroupVersion", "1"),
            "driver": info["Driver"],
        }


def container_config(spec: CellSpec, users: range) -> dict[str, Any]:
    """What the engine is asked for besides image and labels, in its own words (the body of the API's create)."""
    limits = spec.limits
    strict = spec.privileges == "strict"
    first_uid = users.start + 1
    options = {
        "protocol": wire.PROTOCOL,
        "mode": spec.mode,
        "privileges": spec.privileges,
        "background": spec.background,
        "egress": bool(spec.egress),
        # One below it is the user that PID 1 is while it kills.
        "first_uid": first_uid,
        "nproc": limits.pids if spec.runtime == "runsc" else 0,
        "idle_s": _IDLE_S,
        "age_s": _LIFETIME_S,
        "preload": list(spec.preload),
        "limits": {
            "wall_s": limits.wall_s,
            "cpus": limits.cpus,
            "tmpfs_mib": limits.tmpfs_mib,
            "output_bytes": limits.output_kib << 10,
            "flood_bytes": limits.flood_mib << 20,
            "files": limits.files,
            "files_bytes": limits.files_mib << 20,
            "files_depth": limits.files_depth,
        },
    }
    return {
        "Hostname": "cell",
        "Cmd": ["python3", "-I", _SUPERVISOR, json.dumps(options)],
        "Entrypoint": [],
        "User": f"{first_uid}:{first_uid}" if strict else "0:0",
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
        "HostConfig": host_config(spec),
    }


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
        "CapAdd": [] if spec.privileges == "strict" else ["SETGID", "SETUID"],
        "SecurityOpt": ["no-new-privileges:true", f"seccomp={_seccomp()}"],
        "ReadonlyRootfs": True,
        "Tmpfs": {
            "/job": writable.format(job, _INODES),
            "/tmp": writable.format(other, _INODES // 2),  # noqa: S108 - inside the cell
            "/dev/shm": writable.format(other, _INODES // 2),  # noqa: S108 - inside the cell
            "/dev/mqueue": "ro,size=4k",
        },
        # A connection that was closed is gone at once, instead of being seen for a minute by later calls.
        "Sysctls": {"net.ipv4.tcp_max_tw_buckets": "0"},
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "Memory": memory,
        "MemorySwap": memory,
        # A process of gVisor's own counts here too, and reaching this limit would crash it; RLIMIT_NPROC holds there.
        "PidsLimit": 4096 if spec.runtime == "runsc" else limits.pids + 2,
        # In short turns: who has used up one stands still for the rest of it, and PID 1 stands still with the call.
        "CpuPeriod": _CPU_TURN_US,
        "CpuQuota": max(int(limits.cpus * _CPU_TURN_US), _LEAST_QUOTA_US),
        "OomScoreAdj": 500,
        "Ulimits": [
            {"Name": "core", "Soft": 0, "Hard": 0},
            {"Name": "memlock", "Soft": 0, "Hard": 0},
            {"Name": "msgqueue", "Soft": 0, "Hard": 0},
            {"Name": "nofile", "Soft": 1024, "Hard": 1024},
        ],
        "LogConfig": {"Type": "none", "Config": {}},
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        # A cell that has ended is of no use to anybody, and its owner may not be there to take it away.
        "AutoRemove": True,
        "Runtime": spec.runtime,
    }


def containers() -> list[dict[str, Any]]:
    """Every cell of every owner on this engine: `Id`, `Names`, `Labels`. Raises SandboxUnavailableError."""
    with Engine() as engine:
        return engine.containers(OWNER)


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
    return {"reason": "recycled" if reason in {"used once", "idle"} else "lost", "detail": reason}


def _most_payload(spec: CellSpec) -> int:
    """The largest payload that a cell of this kind can have a reason to send: both streams and all files."""
    limits = spec.limits
    return (2 * limits.output_kib << 10) + (limits.files_mib << 20) + (_OWN_FRAMES_MIB << 20)


@functools.cache
def _seccomp() -> str:
    """The profile's contents on one line; the engine wants no path."""
    return json.dumps(json.loads(shipped("seccomp.json").read_text(encoding="utf-8")), separators=(",", ":"))


def _encoded(code: str) -> bytes:
    return code.encode("utf-8", errors="surrogatepass")


def _outcome(call: ToolCall, frame: wire.Frame, spec: CellSpec) -> Outcome:
    header = frame.header
    if header.get("id") != call.id:
        raise wire.ProtocolError(f"the result is for call {header.get('id')!r}, not for {call.id!r}")
    if header.get("fork_error"):
        raise SandboxUnavailableError(f"the cell could not start a process: {os.strerror(header['fork_error'])}")
    out, err = header["kept"]
    numbers = (out, err, header["stdout_bytes"], header["stderr_bytes"], header["leftovers"])
    if not all(type(each) is int and each >= 0 for each in numbers) or not math.isfinite(header["wall_ms"]):
        raise wire.ProtocolError(f"the result has numbers that are none: {numbers} and {header['wall_ms']!r}")
    fetched: dict[str, bytes] = {}
    missed = {str(name): str(why) for name, why in header["missed"].items()}
    at = out + err
    for name, size in header["files"]:
        if why := files.trouble(name, depth=spec.limits.files_depth):
            missed[ascii(name)] = why
        else:
            fetched[name] = frame.payload[at : at + size]
        at += size
    if at != len(frame.payload):
        raise wire.ProtocolError(f"the result has {len(frame.payload)} bytes and speaks of {at}")
    return Outcome(
        call_id=call.id,
        status=header["status"],
        exit_code=header["exit_code"],
        signal=header["signal"],
        stdout=frame.payload[:out],
        stderr=frame.payload[out : out + err],
        stdout_bytes=header["stdout_bytes"],
        stderr_bytes=header["stderr_bytes"],
        wall_ms=header["wall_ms"],
        leftovers=header["leftovers"],
        files=fetched,
        not_fetched=missed,
    )


def _in_child() -> None:
    _no_fork.release()
    for cell in list(_live):
        cell.drop()


def _at_exit() -> None:
    for runtime in list(_runtimes):
        runtime.close()


os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_in_child)
atexit.register(_at_exit)
