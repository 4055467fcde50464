"""The corpus: what hostile or clumsy code tries, as data, and the way to play it through the gate, the log and a cell.

Rows are numbered 1 to 38. A row has cases, or tests elsewhere that prove it, or both. `docs/sandbox-corpus.md` is the
table for people, and `benchmarks/sandbox_corpus.py` prints what each kind of cell made of each case.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loopguard.controller.station import ToolStation
from loopguard.errors import CallError, SandboxError
from loopguard.types import Outcome, ToolCall

if TYPE_CHECKING:
    from loopguard.audit.events import Entry

    Run = Callable[[ToolCall], Outcome]

ROWS = {
    1: "calls that do not end",
    2: "bombs of processes and threads",
    3: "daemons",
    4: "stopped, suspended and unreaped processes",
    5: "waiting in the kernel",
    6: "signals at everybody",
    7: "limits and priorities of the supervisor",
    8: "looking into the supervisor",
    9: "bombs of memory",
    10: "filling the disk, and trees that are hard to delete",
    11: "writing to the image",
    12: "floods of output",
    13: "much output at the very end",
    14: "bytes that are no text",
    15: "forged results",
    16: "inherited descriptors",
    17: "secrets of the host",
    18: "traces of the call before",
    19: "networks",
    20: "sockets of the engine and of the host",
    21: "the kernel's own files",
    22: "mounts and namespaces",
    23: "becoming somebody else",
    24: "rare system calls",
    25: "known holes of container runtimes",
    26: "files that come back",
    27: "files that go in",
    28: "long arguments and standard input",
    29: "ways to end",
    30: "workers and threads that are meant well",
    31: "randomness",
    32: "poisoned modules and settings",
    33: "code that is not what a check saw",
    34: "faults of cell and stream",
    35: "dead and neighbouring controllers",
    36: "many callers",
    37: "time limits that are none",
    38: "dangerous guard policies",
}

_HERE = "tests/sandbox/test_sandbox"
ELSEWHERE: dict[int, tuple[str, ...]] = {
    1: (f"{_HERE}_attacks.py::TestLimits::test_time",),
    11: (f"{_HERE}_attacks.py::TestIsolation::test_nothing_is_writable_but_the_three_places",),
    12: (f"{_HERE}_attacks.py::TestLimits::test_head_and_tail_are_kept_and_all_is_counted",),
    14: ("tests/audit/test_audit_cli.py::TestShow::test_each_record_is_one_printable_line",),
    19: (f"{_HERE}_attacks.py::TestNetwork::test_a_socket_of_the_host_is_out_of_reach",),
    20: (f"{_HERE}_attacks.py::TestIsolation::test_files_of_the_host_are_not_there",),
    25: (f"{_HERE}_corpus.py::test_an_old_runc_is_refused",),
    27: (f"{_HERE}_episode.py::TestFiles::test_a_file_cannot_be_a_folder_too",),
    29: (f"{_HERE}_attacks.py::TestBehaviour::test_ends",),
    33: ("tests/policy/test_policy_shipped.py::TestToolformer::test_plain_escapes_are_refused",),
    34: (
        f"{_HERE}_corpus.py::TestFaults::test_who_dies_under_a_call_gives_no_result",
        f"{_HERE}_corpus.py::TestFaults::test_a_cell_that_stands_still_costs_its_deadline_and_no_more",
        f"{_HERE}_lifetime.py::TestPool::test_a_cell_that_dies_under_a_call_is_no_result",
        f"{_HERE}_lifetime.py::TestPool::test_a_cell_that_died_while_idle_costs_nobody_a_call",
        f"{_HERE}_lifetime.py::TestRefusals::test_an_engine_that_is_not_there",
        f"{_HERE}_lifetime.py::TestRefusals::test_what_the_engine_does_not_have",
        f"{_HERE}_wire.py::test_a_torn_frame_is_a_lost_cell",
        f"{_HERE}_wire.py::test_garbage_is_never_a_frame",
        f"{_HERE}_wire.py::test_a_frame_that_claims_too_much_is_refused_before_it_is_read",
        f"{_HERE}_wire.py::test_a_silent_cell_is_late",
    ),
    35: (
        f"{_HERE}_lifetime.py::TestDeadOwners::test_cells_of_a_killed_controller_go_by_themselves",
        f"{_HERE}_lifetime.py::TestDeadOwners::test_eight_calls_in_flight_at_the_time_of_a_kill",
        f"{_HERE}_lifetime.py::TestDeadOwners::test_cells_of_others_are_left_alone",
        f"{_HERE}_owner.py::test_a_recycled_pid_is_another_owner",
        f"{_HERE}_pool.py::test_an_interrupted_call_costs_its_cell",
    ),
    36: (
        f"{_HERE}_corpus.py::test_two_hundred_callers_are_served_or_told",
        f"{_HERE}_pool.py::test_a_storm_loses_no_cell",
        f"{_HERE}_pool.py::test_callers_are_served_in_their_order",
        f"{_HERE}_pool.py::test_a_full_queue_is_said_at_once",
    ),
    37: (
        f"{_HERE}_episode.py::TestSmallerLimits::test_limits_that_are_none_are_refused",
        "tests/policy/test_policy_units.py::test_what_is_no_duration_is_refused_with_the_fix",
    ),
    38: (
        "tests/policy/test_policy_forbidden.py::test_each_misconfiguration_is_refused_at_its_place_with_its_sentence",
        "tests/policy/test_policy_forbidden.py::test_no_section_has_such_a_key",
        f"{_HERE}_attest.py::test_each_difference_is_named",
    ),
}
"""Tests that prove a row, or more of it than the cases here do."""


# --- kinds of cells -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of cell that cases are played in."""

    name: str
    mode: str
    privileges: str = "multi"
    runtime: str = "runc"
    whole: bool = True
    """Whether every case is played in it, or only those that are marked."""


KINDS = (
    Kind(name="pooled", mode="pooled"),
    Kind(name="strict", mode="pooled", privileges="strict"),
    Kind(name="fresh", mode="fresh", whole=False),
    Kind(name="episode", mode="episode", whole=False),
    Kind(name="runsc", mode="pooled", runtime="runsc"),
)

POLICY = """\
apiVersion: loopguard/v1
name: corpus
tools:
  rules:
    - {{id: python, tool: python, then: run, sandbox: cell}}
    - {{id: shell, tool: sh, then: run, sandbox: cell}}
    - {{id: program, tool: exec, then: run, sandbox: cell}}
sandbox:
  profiles:
    cell:
      image: loopguard/python:1
      mode: {mode}
      privileges: {privileges}
      runtime: {runtime}
      cells: {cells}
      limits: {{wall: 30s, memory: 192MiB, pids: 48, cpus: 1.0, tmpfs: 16MiB, flood: 4MiB}}
data:
  sources: [human, model]
  max_own_share: 0.5
updates:
  loss_kind: discrete
  monitors:
    - {{kind: bounds, metric: loss}}
    - {{kind: bounds, metric: grad_norm, min: 0}}
    - {{kind: jump, metric: loss}}
promotion:
  panel:
    - {{metric: correct, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.1}}
"""

KEPT_BYTES = 64 << 10
FLOOD_BYTES = 4 << 20


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Differs:
    """What a case comes to in one kind of cell only, and why."""

    why: str
    status: str = ""
    worked: tuple[str, ...] = ()
    """Attempts that may work there, besides those that may everywhere."""
    not_played: bool = False
    leaves: tuple[str, ...] = ()
    """What the next call may find changed, by its name in the look around."""
    broken: bool = False
    """Whether the claim does not hold there, as far as we know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One claim, the code that tries to break it, and how to tell that it held."""

    row: int
    name: str
    claim: str
    code: str
    tool: str = "python"
    status: str = "ok"
    """How it may end: statuses with a blank between them. `lost`: the cell was lost under it and nobody got a result.
    `refused`: no cell takes it. `denied`: the gate lets it run nowhere."""
    prints: Any = None
    """The JSON that it prints, where that has to be one value."""
    worked: tuple[str, ...] | None = None
    """It prints {attempt: "worked" or the error}; these may work and no others."""
    check: Callable[..., None] | None = None
    """Looks at the outcome, and at that of `then`."""
    then: str = ""
    """Code of a second call."""
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    fetch: tuple[str, ...] = ()
    wall_s: float = 30
    everywhere: bool = False
    """Whether it stands for its row in the kinds of cells that are slow to make."""
    differs: Mapping[str, Differs] = field(default_factory=dict)

    def there(self, kind: Kind) -> Differs:
        """What is different in this kind of cell."""
        return self.differs.get(kind.name, Differs(why=""))


_TRY = """
import ctypes, errno, json, os, platform, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"
said = {}
def attempt(name, action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        said[name] = errno.errorcode.get(error.errno, str(error.errno))
    else:
        said[name] = "worked"
def native(numbers, *arguments):
    number = numbers if isinstance(numbers, int) else numbers[0 if x86 else 1]
    done = libc.syscall(ctypes.c_long(number), *[ctypes.c_ulong(each) if isinstance(each, int) else each
                                                 for each in arguments])
    if done == -1:
        raise OSError(ctypes.get_errno(), "")
    return done
def apart(action, *arguments):
    # In a process of its own, so that what works changes nothing for the next attempt.
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            action(*arguments)
        except OSError as error:
            code = error.errno & 255
        except BaseException:
            code = 255
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code if code > 0 else errno.EINTR, "")
"""


def tries(body: str) -> str:
    """Code that makes attempts and prints what came of them."""
    return f"{_TRY}{body}\nprint(json.dumps(said))"


def within(seconds: float) -> Callable[[Outcome], None]:
    """It ended not long after it had to; a machine that is busy has time enough."""

    def check(outcome: Outcome, *_: Outcome) -> None:
        assert outcome.wall_ms < (seconds + 10) * 1e3, outcome.wall_ms
        assert outcome.exit_code is None
        assert outcome.signal is None

    return check


def counted(out: int, err: int) -> Callable[[Outcome], None]:
    """Every byte was counted, and no more was kept than the guard policy lets be kept."""

    def check(outcome: Outcome) -> None:
        assert (outcome.stdout_bytes, outcome.stderr_bytes) == (out, err)
        assert (len(outcome.stdout), len(outcome.stderr)) == (min(out, KEPT_BYTES), min(err, KEPT_BYTES))

    return check


def flooded(outcome: Outcome) -> None:
    """It was cut off, and what was kept is bounded."""
    assert outcome.stdout_bytes + outcome.stderr_bytes > FLOOD_BYTES
    assert max(len(outcome.stdout), len(outcome.stderr)) <= KEPT_BYTES


def left(number: int) -> Callable[[Outcome], None]:
    """So many processes were left running."""

    def check(outcome: Outcome) -> None:
        assert outcome.leftovers == number, outcome.leftovers

    return check


def hung_up(outcome: Outcome) -> None:
    """At most five are counted: the kernel itself ends stopped processes whose parent has gone, sooner or later."""
    assert outcome.leftovers <= 5


def ended(exit_code: int | None, signal: int | None = None) -> Callable[[Outcome], None]:
    """With this exit status, or by this signal."""

    def check(outcome: Outcome, *_: Outcome) -> None:
        assert (outcome.exit_code, outcome.signal) == (exit_code, signal)

    return check


def fetched(*names: str, missed: Iterable[str] = ()) -> Callable[[Outcome], None]:
    """These files came back, and these did not."""

    def check(outcome: Outcome) -> None:
        assert set(outcome.files) == set(names), set(outcome.files)
        assert set(missed) <= set(outcome.not_fetched), outcome.not_fetched
        assert not any(b"root:" in data for data in outcome.files.values())

    return check


def says(text: bytes) -> Callable[[Outcome], None]:
    """These words are on one of its outputs."""

    def check(outcome: Outcome, *_: Outcome) -> None:
        assert text in outcome.stdout + outcome.stderr, (outcome.stdout, outcome.stderr)

    return check


def written(data: bytes) -> Callable[[Outcome], None]:
    """Standard output is this, to the byte."""

    def check(outcome: Outcome) -> None:
        assert outcome.stdout == data

    return check


def different(first: Outcome, second: Outcome) -> None:
    """Two calls drew different numbers, all of them."""
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert not [name for name in one if one[name] == two[name]], (one, two)


def alike(first: Outcome, second: Outcome) -> None:
    """Two calls printed the same."""
    assert first.stdout == second.stdout


# --- playing them ---------------------------------------------------------------------------------

LOOK = """
import builtins, json, os, resource, signal, sys, threading
me, others = os.getpid(), {int(name) for name in os.listdir("/proc") if name.isdigit()}
import atexit, math, random, re, string
def lines(path):
    try:
        rows = [line.split() for line in open(path).read().splitlines()]
        # Of local sockets those with a name. Without connections that are closed: a case of their own is about them.
        return len([row for row in rows if (len(row) > 7 if "unix" in path else row[3:4] != ["06"])])
    except OSError as error:
        return error.errno
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
found = {
    "places": {place: sorted(os.listdir(place)) for place in ("/job", "/job/call", "/tmp", "/dev/shm")},
    "processes": sorted(others - {1, os.getppid(), me}),
    "parent": os.getppid() != 1,
    "environment": dict(os.environ),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:3],
    "folder": os.getcwd(),
    "umask": os.umask(0o77),
    "signals": [[str(signal.getsignal(n)) for n in (2, 15, 17)],
                [status[name] for name in ("SigBlk", "SigIgn", "SigCgt") if name in status]],
    "limits": [resource.getrlimit(n) for n in range(9)],
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "score": open("/proc/self/oom_score_adj").read(),
    "processors": len(os.sched_getaffinity(0)),
    "threads": threading.active_count(),
    "builtins": len(dir(builtins)),
    "modules": sorted(sys.modules),
    "path": sys.path,
    "files": [module.__file__ for module in (json, os, random, re, string)],
    "pi": math.pi,
    "hooks": [sys.excepthook is sys.__excepthook__, sys.gettrace(), sys.getrecursionlimit(), atexit._ncallbacks()],
    "sockets": [lines("/proc/net/" + name) for name in ("tcp", "tcp6", "udp", "unix")],
    "memory": [lines("/proc/sysvipc/" + name) for name in ("shm", "sem", "msg")],
}
print(json.dumps(found))
"""
"""What a call finds: the same before and after every case, to the last module and socket."""


_TOO_MUCH = "x = bytearray(1 << 30)"


class Stage:
    """A station with one kind of cell, and what the log said of each call. Lives until `close`."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        self.entries: list[Entry] = []
        self.played: list[str] = []
        self._numbers = itertools.count()
        policy = folder / "policy.yaml"
        cells = 1 if kind.mode == "pooled" else 2
        policy.write_text(
            POLICY.format(mode=kind.mode, privileges=kind.privileges, runtime=kind.runtime, cells=cells),
            encoding="utf-8",
        )
        self.station = ToolStation.open(policy, run_dir=folder / "run", mirror=self.entries.append)
        try:
            self.usual = self._look(self.station.run)
        except BaseException:
            self.station.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.station.close()

    def play(self, case: Case) -> str:
        """Play a case, look at everything after it, and give what it came to.

        Raises AssertionError where a claim did not hold, for that case and for no later one.
        """
        there = case.there(self.kind)
        try:
            return self._play_and_look(case)
        except AssertionError:
            there = Differs(why="", broken=True)
            raise
        finally:
            if self.kind.mode == "pooled" and (there.broken or there.leaves):
                # What it left must not meet the next case: a cell that ran out of memory is replaced.
                self.station.run(ToolCall(id=f"renew-{next(self._numbers)}", tool="python", code=_TOO_MUCH))

    def _play_and_look(self, case: Case) -> str:
        if self.kind.mode != "episode":
            statuses = self._play(case, self.station.run)
        else:
            with self.station.episode("cell") as episode:
                statuses = self._play(case, episode.run)
                if "lost" not in statuses:
                    # An episode keeps its files and nothing else.
                    self._compare(self._look(episode.run), except_for={"places", *case.there(self.kind).leaves})
        if self.kind.mode == "pooled" or case.row == 18:
            self._compare(self._look(self.station.run), except_for=set(case.there(self.kind).leaves))
        self.played.append(case.name)
        return " ".join(statuses)

    def _play(self, case: Case, run: Run) -> list[str]:
        there = case.there(self.kind)
        expected = (there.status or case.status).split()
        before = peak_from_here()
        outcomes = [self._call(run, self._first(case))]
        if case.then:
            outcomes.append(self._call(run, self._a_call(case, case.then)))
        grown = before()
        assert grown < 50 << 20, f"the controller grew by {grown >> 20} MiB"
        statuses = [outcome if isinstance(outcome, str) else outcome.status for outcome in outcomes]
        assert statuses[0] in expected, (statuses, expected, _told(outcomes[0]))
        if any(isinstance(outcome, str) for outcome in outcomes):
            return statuses
        if case.prints is not None:
            assert json.loads(outcomes[0].stdout) == case.prints, outcomes[0].text
        if case.worked is not None:
            said = json.loads(outcomes[0].stdout)
            assert said
            worked = {name for name, what in said.items() if what == "worked"}
            assert worked <= {*case.worked, *there.worked}, said
        if case.check is not None:
            case.check(*outcomes)
        return statuses

    def _a_call(self, case: Case, code: str, **fields: Any) -> ToolCall:
        return ToolCall(id=f"{case.name}-{next(self._numbers)}", tool=case.tool, code=code, **fields)

    def _first(self, case: Case) -> ToolCall:
        return self._a_call(case, case.code, stdin=case.stdin, files=case.files, fetch=case.fetch, wall_s=case.wall_s)

    def _call(self, run: Run, call: ToolCall) -> Outcome | str:
        """What a call came to, after a look at its records: decided before, and told as it ended."""
        start = len(self.entries)
        result: Outcome | str
        try:
            result = run(call)
        except CallError:
            result = "refused"
        except SandboxError:
            result = "lost"
        records = [entry for entry in self.entries[start:] if entry.body.get("call") == call.id]
        told = [entry.type for entry in records]
        if isinstance(result, Outcome) and result.status == "denied":
            assert told == ["tool.decided"], told
            return result
        assert told == ["tool.decided", "tool.lost" if isinstance(result, str) else "tool.finished"], told
        code = call.code.encode("utf-8", errors="surrogatepass")
        assert records[0].body["code_sha256"] == hashlib.sha256(code).hexdigest()
        if isinstance(result, Outcome):
            assert records[1].body["status"] == result.status
            assert records[1].body["stdout_sha256"] == hashlib.sha256(result.stdout).hexdigest()
        return result

    def _look(self, run: Run) -> dict[str, Any]:
        outcome = run(ToolCall(id=f"look-{next(self._numbers)}", tool="python", code=LOOK))
        assert outcome.ok, (outcome.status, outcome.stderr)
        found: dict[str, Any] = json.loads(outcome.stdout)
        return found

    def _compare(self, found: dict[str, Any], *, except_for: set[str]) -> None:
        changed = {
            name: (value, self.usual[name])
            for name, value in found.items()
            if value != self.usual[name] and name not in except_for
        }
        assert not changed, f"the next call found (now, usually): {changed}"


def _told(outcome: Outcome | str) -> Any:
    return outcome if isinstance(outcome, str) else (outcome.stdout[-500:], outcome.stderr[-800:], outcome.wall_ms)


def peak_from_here() -> Callable[[], int]:
    """Watch this process's memory: what is given says how far its peak has gone beyond what it has now, in bytes."""

    def resident(name: str) -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[name].split()[0]) << 10

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
        before = resident("VmRSS")
    except OSError:
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    return lambda: resident("VmHWM") - before


# --- the cases ------------------------------------------------------------------------------------

_NO_FILTER = (
    "gVisor is a kernel of its own for each cell and applies no list of system calls; what works, works on that one"
)
_WHOLE_CELL = "gVisor's memory limit takes the whole cell with it"
_NO_SELF = "this gVisor shows a program that was started by a call nothing of itself under /proc"
_NO_COUNTERS = "gVisor tells no cell that it ran into the process limit"

_ENDLESS = (
    Case(
        row=1,
        name="endless-loop",
        claim="a loop without an end is ended at the time limit",
        code="while True: pass",
        status="timeout",
        wall_s=0.7,
        check=within(0.7),
        everywhere=True,
    ),
    Case(
        row=1,
        name="endless-sleep",
        claim="so is a sleep, of the shell as well",
        code="sleep 600",
        tool="sh",
        status="timeout",
        wall_s=0.7,
        check=within(0.7),
    ),
    Case(
        row=1,
        name="endless-deaf",
        claim="ignoring and blocking every signal does not help",
        code="import signal, time\n"
        "for n in signal.valid_signals() - {9, 19}: signal.signal(n, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: time.sleep(1)",
        status="timeout",
        wall_s=0.7,
        check=within(0.7),
    ),
    Case(
        row=1,
        name="endless-output-before",
        claim="what was printed before the limit is kept",
        code="import time\nprint('begun')\ntime.sleep(600)",
        status="timeout",
        wall_s=0.7,
        check=written(b"begun\n"),
    ),
    Case(
        row=2,
        name="fork-bomb",
        claim="a fork bomb stays in its cell and is named",
        code="import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        status="pids_limit",
        wall_s=1,
        check=within(1),
        everywhere=True,
        differs={"runsc": Differs(why=_NO_COUNTERS, status="timeout oom")},
    ),
    Case(
        row=2,
        name="fork-bomb-shell",
        claim="so does the classic one of the shell, which its first process does not wait for",
        code="b() { b | b & }\nb\nsleep 600",
        tool="sh",
        status="pids_limit",
        wall_s=1,
        differs={
            "runsc": Differs(
                why=f"{_NO_COUNTERS}; the shell gives up where it cannot fork", status="timeout nonzero_exit ok"
            )
        },
    ),
    Case(
        row=2,
        name="thread-bomb",
        claim="threads count like processes",
        code="import threading, time\n"
        "for _ in range(500): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        status="pids_limit",
        differs={"runsc": Differs(why=_NO_COUNTERS, status="nonzero_exit")},
    ),
    Case(
        row=2,
        name="fork-race",
        claim="processes that are replaced faster than anybody can list them do not outrun the end of their call",
        code="import os, time\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        while True:\n"
        "            try:\n"
        "                if os.fork(): os._exit(0)\n"
        "            except OSError: pass\n"
        "time.sleep(0.2)",
        status="ok pids_limit",
        everywhere=True,
    ),
    Case(
        row=2,
        name="fork-race-deaf",
        claim="nor do they where each of them moves to a session of its own and ignores every signal",
        code="import os, signal, time\n"
        "for n in signal.valid_signals() - {9, 19}: signal.signal(n, signal.SIG_IGN)\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        while True:\n"
        "            try:\n"
        "                if os.fork(): os._exit(0)\n"
        "                os.setsid()\n"
        "            except OSError: pass\n"
        "time.sleep(600)",
        status="timeout pids_limit",
        wall_s=0.7,
    ),
    Case(
        row=3,
        name="daemon",
        claim="a daemon (two forks, a session of its own) ends with its call, is counted, and nobody waits for it",
        code="import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)\n"
        "os.wait()\nprint('done')",
        check=left(1),
        everywhere=True,
    ),
    Case(
        row=3,
        name="daemon-nohup",
        claim="so do nohup and setsid of the shell",
        code="nohup sleep 600 >/dev/null 2>&1 &\nsetsid sleep 600 &\nsleep 0.2",
        tool="sh",
        check=left(2),
    ),
    Case(
        row=3,
        name="daemon-holds-output",
        claim="a child that keeps the output open, and writes to it, does not hold its call",
        code="import os\nprint('done', flush=True)\nif os.fork() == 0:\n    while True: os.write(1, b'late' * 1000)",
        # What was in the pipe when the call ended counts, and on a busy machine that can be a flood.
        status="ok output_limit",
        check=says(b"done\n"),
    ),
    Case(
        row=4,
        name="stopped",
        claim="a call that stopped itself is ended like any other",
        code="import os\nos.kill(os.getpid(), 19)",
        status="timeout",
        wall_s=0.7,
        check=within(0.7),
    ),
    Case(
        row=4,
        name="stopped-children",
        claim="stopped children are killed with their call",
        code="import os, time\n"
        "for _ in range(5):\n    if os.fork() == 0:\n        os.kill(os.getpid(), 19)\n        time.sleep(600)\n"
        "time.sleep(0.2)",
        check=lambda outcome: hung_up(outcome),
        everywhere=True,
    ),
    Case(
        row=4,
        name="suspended-parent",
        claim="a process that the kernel suspends until its child ends (vfork) is ended at the time limit",
        code=f"{_TRY}\nimport time\nif native((56, 220), 0x4000 | 0x100 | 17, 0, 0, 0, 0) == 0:\n    time.sleep(600)",
        status="timeout",
        wall_s=0.7,
        check=within(0.7),
    ),
    Case(
        row=4,
        name="traced-by-nobody",
        claim="asking one's parent to trace one confuses nobody about how the call ended",
        code=f"{_TRY}\nlibc.ptrace(0, 0, 0, 0)\nos.kill(os.getpid(), signal.SIGUSR1)\nos._exit(0)",
        status="signal",
        wall_s=2,
    ),
    Case(
        row=4,
        name="unreaped",
        claim="children that nobody waits for are gone before the next call",
        code="import os, signal\n"
        "for n in range(30):\n    if os.fork() == 0: os._exit(n)\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "for n in range(10):\n    if os.fork() == 0: os._exit(n)",
    ),
    Case(
        row=5,
        name="pipe-without-end",
        claim="waiting for the other end of a pipe that nobody opens ends at the time limit",
        code="mkfifo pipe; cat pipe",
        tool="sh",
        status="timeout",
        wall_s=0.7,
        check=within(0.7),
        everywhere=True,
    ),
    Case(
        row=5,
        name="lock-without-end",
        claim="so does waiting for a lock of one's own",
        code="import fcntl, os\n"
        "one, two = open('x', 'w'), open('x', 'w')\nfcntl.flock(one, fcntl.LOCK_EX)\nfcntl.flock(two, fcntl.LOCK_EX)",
        status="timeout",
        wall_s=0.7,
    ),
)

_SUPERVISOR = (
    Case(
        row=6,
        name="signals-at-first",
        claim="no signal ends, stops or disturbs the first process of a cell",
        code=tries("for n in sorted(signal.valid_signals()): attempt(f'{n}', os.kill, 1, n)"),
        worked=(),
        everywhere=True,
        differs={
            "strict": Differs(
                why="a call has the user of PID 1, which ignores what it may be sent",
                worked=tuple(str(n) for n in range(65)),
            )
        },
    ),
    Case(
        row=6,
        name="signals-at-zygote",
        claim="nor the process that calls are made from",
        code=tries("for n in (2, 3, 9, 11, 15, 19, 20): attempt(f'{n}', os.kill, os.getppid(), n)"),
        worked=(),
        differs={
            "strict": Differs(
                why="a call may kill or stop its zygote, which is made anew; a stopped one is found at the time limit",
                not_played=True,
            )
        },
    ),
    Case(
        row=6,
        name="zygote-killed",
        claim="a call that kills the process it was made from has its own status nevertheless",
        code="import os, sys\n"
        "try: os.kill(os.getppid(), 9)\nexcept PermissionError: pass\nprint('on', flush=True)\nsys.exit(5)",
        status="nonzero_exit",
        check=ended(5),
    ),
    Case(
        row=6,
        name="zygote-stopped",
        claim="a call that stops it comes to no result that is not true",
        code="import os, sys\ntry: os.kill(os.getppid(), 19)\nexcept PermissionError: pass\nsys.exit(5)",
        status="nonzero_exit",
        wall_s=1,
        differs={
            "strict": Differs(
                why="a zygote that is stopped before it could tell the end is found at the time limit",
                status="timeout nonzero_exit",
            )
        },
    ),
    Case(
        row=6,
        name="signals-at-all",
        claim="a signal to every process reaches the call's own alone",
        code="import os\n"
        "if os.fork() == 0:\n    import time\n    time.sleep(600)\n"
        "try: os.kill(-1, 9)\nexcept OSError: pass\nprint('alone')",
        check=written(b"alone\n"),
        everywhere=True,
    ),
    Case(
        row=7,
        name="limits-of-others",
        claim="limits, priorities, processors and scores of supervisor and zygote cannot be changed",
        code=tries(
            "import resource\n"
            "for who, pid in (('first', 1), ('zygote', os.getppid())):\n"
            "    attempt(f'{who} limit', resource.prlimit, pid, resource.RLIMIT_NOFILE, (1, 1))\n"
            "    attempt(f'{who} processor', os.sched_setaffinity, pid, {0})\n"
            "    attempt(f'{who} idle', os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0))\n"
            "    attempt(f'{who} nice', os.setpriority, os.PRIO_PROCESS, pid, 19)\n"
            "    attempt(f'{who} input', native, (251, 30), 1, pid, 3 << 13)\n"
            "    attempt(f'{who} score', lambda: open(f'/proc/{pid}/oom_score_adj', 'w').write('1000'))\n"
            "    attempt(f'{who} odd', native, (302, 261), pid | 1 << 32, 7, 0, 0)\n"
            "attempt('group', os.setpriority, os.PRIO_PGRP, os.getpgid(1), 19)\n"
            "attempt('user', os.setpriority, os.PRIO_USER, 0, 19)"
        ),
        worked=(),
        everywhere=True,
        differs={
            "runsc": Differs(
                why="gVisor does not ask who changes processor and priority of whom",
                worked=(
                    *(
                        f"{who} {what}"
                        for who in ("first", "zygote")
                        for what in ("processor", "nice", "idle", "input")
                    ),
                    "group",
                    "user",
                ),
                leaves=("nice", "processors"),
            )
        },
    ),
    Case(
        row=8,
        name="looking-in",
        claim="memory, descriptors, environment, folders and maps of supervisor and zygote cannot be read",
        code=tries(
            "for who, pid in (('first', 1), ('zygote', os.getppid())):\n"
            "    for name in ('mem', 'environ', 'maps', 'auxv', 'io', 'stack', 'syscall', 'personality'):\n"
            "        attempt(f'{who} {name}', lambda: open(f'/proc/{pid}/{name}', 'rb').read(1))\n"
            "    for name in ('fd', 'map_files', 'cwd', 'root', 'fdinfo'):\n"
            "        attempt(f'{who} {name}', os.listdir, f'/proc/{pid}/{name}')\n"
            "    attempt(f'{who} exe', os.readlink, f'/proc/{pid}/exe')\n"
            "    attempt(f'{who} ns', os.readlink, f'/proc/{pid}/ns/mnt')\n"
            "    attempt(f'{who} input', lambda: open(f'/proc/{pid}/fd/0', 'rb'))\n"
            "    attempt(f'{who} output', lambda: open(f'/proc/{pid}/fd/1', 'wb'))"
        ),
        worked=(),
        everywhere=True,
        differs={
            "runsc": Differs(
                why="gVisor shows more of other users' processes; there is nothing secret in them",
                worked=tuple(
                    f"{who} {what}"
                    for who in ("first", "zygote")
                    for what in (
                        "environ",
                        "maps",
                        "auxv",
                        "io",
                        "fd",
                        "fdinfo",
                        "exe",
                        "ns",
                        "cwd",
                        "root",
                        "input",
                        "output",
                    )
                ),
            )
        },
    ),
    Case(
        row=8,
        name="reaching-in",
        claim="supervisor and zygote cannot be traced, written into or robbed of a descriptor",
        code=tries(
            "hole = ctypes.create_string_buffer(64)\n"
            "for who, pid in (('first', 1), ('zygote', os.getppid())):\n"
            "    attempt(f'{who} attach', native, (101, 117), 16, pid, 0, 0)\n"
            "    attempt(f'{who} seize', native, (101, 117), 0x4206, pid, 0, 0)\n"
            "    attempt(f'{who} read', native, (310, 270), pid, hole, 1, hole, 1, 0)\n"
            "    attempt(f'{who} write', native, (311, 271), pid, hole, 1, hole, 1, 0)\n"
            "    attempt(f'{who} compare', native, (312, 272), pid, os.getpid(), 0, 0, 0)\n"
            "    attempt(f'{who} mem', lambda: open(f'/proc/{pid}/mem', 'r+b'))\n"
            "    attempt(f'{who} take', lambda: native(438, os.pidfd_open(pid), 0, 0))"
        ),
        worked=(),
    ),
)

_MEMORY = (
    Case(
        row=9,
        name="memory-heap",
        claim="more memory than the limit is `oom`",
        code="x = bytearray(1 << 30)",
        status="oom",
        everywhere=True,
    ),
    Case(
        row=9,
        name="memory-slow",
        claim="also where it grows in small steps",
        code="x = []\nwhile True: x.append(bytes(1 << 16))",
        status="oom",
    ),
    Case(
        row=9,
        name="memory-shared",
        claim="also where it is shared and belongs to no process",
        code="import mmap\nx = mmap.mmap(-1, 1 << 30)\nfor n in range(0, 1 << 30, 4096): x[n] = 1",
        status="oom",
    ),
    Case(
        row=9,
        name="memory-file",
        claim="also where it is a file without a name",
        code="import os\nx = os.memfd_create('x')\nwhile True: os.write(x, bytes(1 << 20))",
        status="oom nonzero_exit signal",
    ),
    Case(
        row=9,
        name="memory-many",
        claim="also where many processes share the work, and ask the kernel to be spared",
        code="import os, time\n"
        "open('/proc/self/oom_score_adj', 'w').write('500')\n"
        "for _ in range(20):\n    if os.fork() == 0:\n        x = bytearray(20 << 20)\n        time.sleep(600)\n"
        "time.sleep(3)",
        status="oom",
        differs={"runsc": Differs(why=_WHOLE_CELL, status="oom")},
    ),
    Case(
        row=9,
        name="memory-tables",
        claim="also where it is the kernel's own: page tables, pipes, sockets, or too little of it to matter",
        code="import fcntl, mmap, os, socket\n"
        "kept = []\n"
        "try:\n    while True:\n        kept.append(os.pipe())\n"
        "        try: fcntl.fcntl(kept[-1][1], 1031, 1 << 20)\n        except OSError: pass\n"
        "        os.set_blocking(kept[-1][1], False)\n"
        "        try:\n            while True: os.write(kept[-1][1], bytes(1 << 16))\n"
        "        except BlockingIOError: pass\n"
        "except OSError: pass\n"
        "for pair in kept: os.close(pair[0]), os.close(pair[1])\n"
        "try:\n    while True:\n        kept.append(socket.socketpair())\n        kept[-1][0].setblocking(False)\n"
        "        try:\n            while True: kept[-1][0].send(bytes(1 << 16))\n"
        "        except BlockingIOError: pass\n"
        "except OSError: pass\n"
        "wide = mmap.mmap(-1, 1 << 36, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)\n"
        "for n in range(0, 1 << 36, 1 << 21): wide[n]",
        status="ok oom nonzero_exit timeout",
        wall_s=5,
    ),
    Case(
        row=9,
        name="memory-places",
        claim="the writable places together are smaller than the memory",
        code="for place in /job/call /tmp /dev/shm; do head -c 99999999 /dev/zero >$place/big; done 2>/dev/null\nexit 3",
        tool="sh",
        status="disk_limit",
    ),
    Case(
        row=9,
        name="address-space",
        claim="a reservation of a terabyte harms nobody",
        code="import mmap\ntry:\n    mmap.mmap(-1, 1 << 40)\nexcept (OSError, MemoryError): pass\nprint('on')",
        status="ok",
        check=written(b"on\n"),
    ),
)

_FILL = "with open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 20))"
_DISK = (
    *(
        Case(
            row=10,
            name=f"disk-full-{name}",
            claim=f"{place} has an end".replace(". has", "the call's own folder has"),
            code=f"import os\nos.chdir({place!r})\n{_FILL}",
            status="disk_limit",
        )
        for name, place in (("job", "."), ("tmp", "/tmp"), ("shm", "/dev/shm"))
    ),
    Case(
        row=10,
        name="many-files",
        claim="so has the number of files",
        code="for n in range(20_000): open(str(n), 'w').close()",
        status="disk_limit",
        differs={
            "runsc": Differs(why="gVisor does not count files; they are memory, which has an end", status="ok oom")
        },
    ),
    Case(
        row=10,
        name="deep-tree",
        claim="a tree of 3,000 locked folders is deleted, and the cell used again",
        code="import os\nfor n in range(3000):\n    os.mkdir('d'); os.chdir('d')\n"
        "for n in range(200):\n    os.chmod('.', 0o300)\n    os.chdir('..')\nos.chmod('/job/call', 0)",
        status="ok",
    ),
    Case(
        row=10,
        name="locked-tree",
        claim="so is one that its own user may not enter",
        code="import os\nos.makedirs('a/b/c'); open('a/b/f', 'w').close(); os.chmod('a/b', 0); os.chmod('a', 0)\n"
        "os.mkdir('/tmp/x', 0); os.mkdir('/dev/shm/y', 0o111)",
        everywhere=True,
    ),
    Case(
        row=10,
        name="odd-names",
        claim="so are names that are no text, and files that are none",
        code="import os, socket\n"
        "for name in (b'\\xff', b'a\\nb', b'-rf', b'*', b'\\x1b[2J', b'.hidden', b'x' * 255): open(name, 'w').close()\n"
        "os.mkfifo('/tmp/pipe'); os.symlink('/etc', '/dev/shm/link'); os.symlink('loop', 'loop')\n"
        "socket.socket(socket.AF_UNIX).bind('/tmp/socket'); os.link('/tmp/socket', '/tmp/again')",
    ),
    Case(
        row=10,
        name="folder-replaced",
        claim="so is a link in the place of the call's own folder, and what it leads to stays",
        code="import os, shutil\nos.chdir('/')\nshutil.rmtree('/job/call')\nos.symlink('/usr/bin', '/job/call')",
    ),
    Case(
        row=10,
        name="sparse-giant",
        claim="a file cannot be made to look larger than the disk",
        code="open('big', 'wb').truncate(1 << 40)",
        status="nonzero_exit",
        check=says(b"File too large"),
    ),
    Case(
        row=11,
        name="image-written",
        claim="nothing of the image can be written: system, libraries, start-up files, accounts",
        code=tries(
            "import site, sysconfig\n"
            "places = ['/x', '/etc/passwd', '/etc/x', '/etc/ld.so.preload', '/usr/x', '/usr/bin/sh', '/bin/sh', '/var/x',\n"
            "  '/run/x', '/opt/loopguard/supervisor.py', '/opt/loopguard/languages/x.py', os.path.expanduser('~root/x'),\n"
            "  '/home/x', '/dev/x', '/mnt/x', '/srv/x', sys.executable, json.__file__]\n"
            "for folder in {*sys.path[1:], *site.getsitepackages(), sysconfig.get_path('purelib')}:\n"
            "    places += [f'{folder}/sitecustomize.py', f'{folder}/x.pth']\n"
            "for place in places: attempt(place, lambda: open(place, 'ab'))\n"
            "attempt('mode', os.chmod, '/etc/passwd', 0o777)\n"
            "attempt('rename', os.rename, '/etc/passwd', '/etc/y')\n"
            "attempt('link', os.link, '/etc/passwd', '/tmp/passwd')\n"
            "attempt('unlink', os.unlink, '/etc/passwd')"
        ),
        worked=(),
        everywhere=True,
    ),
    Case(
        row=11,
        name="start-up-files",
        claim="what is planted in one's own folders is gone with them",
        code="mkdir -p ~/.local/lib/python3.11/site-packages ~/bin\n"
        "for f in ~/.profile ~/.bashrc ~/.pythonrc ~/bin/ls ~/json.py /tmp/sitecustomize.py /dev/shm/random.py \\\n"
        "  ~/.local/lib/python3.11/site-packages/usercustomize.py; do echo 'print(\"planted\")' >$f; chmod 755 $f; done\n"
        "export PATH=~/bin:$PATH PYTHONPATH=/tmp",
        tool="sh",
    ),
)

_OUTPUT = (
    Case(
        row=12,
        name="flood",
        claim="ten gigabytes of output are cut off, and nobody keeps them",
        code="head -c 10000000000 /dev/zero",
        tool="sh",
        status="output_limit",
        check=flooded,
        everywhere=True,
    ),
    Case(
        row=12,
        name="flood-yes",
        claim="so is an endless one",
        code="exec yes",
        tool="sh",
        status="output_limit",
        check=flooded,
    ),
    Case(
        row=12,
        name="flood-errors",
        claim="also on standard error",
        code="import os\nwhile True: os.write(2, bytes(1 << 16))",
        status="output_limit",
        check=flooded,
    ),
    Case(
        row=12,
        name="flood-both",
        claim="both streams count together",
        code="import os\nwhile True: os.write(1, b'x' * 999), os.write(2, b'y' * 999)",
        status="output_limit",
        check=flooded,
    ),
    Case(
        row=12,
        name="flood-late",
        claim="what goes on writing after its call ended adds next to nothing",
        code="import os, time\nif os.fork() == 0:\n    while True: os.write(1, bytes(1 << 16))\nos.write(1, b'first')\nos._exit(0)",
        status="ok output_limit",
    ),
    Case(
        row=12,
        name="single-bytes",
        claim="50,000 writes of one byte are 50,000 bytes",
        code="import os\nfor _ in range(50_000): os.write(1, b'x')",
        check=counted(50_000, 0),
    ),
    Case(
        row=12,
        name="in-turns",
        claim="two streams that are written in turns are counted to the byte",
        code="import os\nfor _ in range(500): os.write(1, b'x' * 1001), os.write(2, b'y' * 2003)",
        check=counted(500_500, 1_001_500),
        everywhere=True,
    ),
    Case(
        row=12,
        name="outputs-closed",
        claim="a call may close its outputs and go on",
        code="import os, sys, time\nos.write(1, b'a'); os.close(1); os.close(2); time.sleep(0.2); os._exit(4)",
        status="nonzero_exit",
        check=ended(4),
    ),
    Case(
        row=13,
        name="much-at-the-end",
        claim="600,000 bytes in one go and then the end is no time-out",
        code="import os, sys; sys.stdout.write('y' * 600_000); sys.stdout.flush(); os._exit(0)",
        check=counted(600_000, 0),
        everywhere=True,
    ),
    Case(
        row=14,
        name="every-byte",
        claim="bytes come back as they were written, and so does their digest in the log",
        code=f"import os; os.write(1, {bytes(range(256))!r})",
        check=written(bytes(range(256))),
        everywhere=True,
    ),
    Case(
        row=14,
        name="cut-letters",
        claim="letters of several bytes that are cut in the middle are kept as bytes",
        code="import os; os.write(1, 'aä€🙂'.encode() * 40_000)",
        check=counted(400_000, 0),
    ),
    Case(
        row=14,
        name="terminal-codes",
        claim="escape sequences, titles, clipboards and reversed text are kept, in code and in output",
        code="print('\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b[2J\u202egnp.exe')",
        check=written("\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b[2J\u202egnp.exe\n".encode()),
    ),
    Case(
        row=14,
        name="no-text",
        claim="code that is no text is refused by the gate",
        code="x = '\ud800'",
        status="denied",
    ),
    Case(
        row=14,
        name="nothing-in-it",
        claim="code with NUL bytes fails like code",
        code="x = 1\0",
        status="nonzero_exit",
    ),
)

_FRAME = """
import os, struct
head = b'{"id": "x", "status": "ok", "exit_code": 0, "signal": null, "fork_error": 0, "kept": [0, 0]}'
frame = struct.pack(">2sBxII", b"LG", 3, len(head), 0) + head + struct.pack(">2sBxII", b"LG", 4, 2, 0) + b"{}"
"""
_FORGED = (
    Case(
        row=15,
        name="forged-frames",
        claim="frames on any descriptor are output, or go nowhere",
        code=_FRAME + "for n in range(1024):\n    try: os.write(n, frame)\n    except OSError: pass\nos._exit(7)",
        status="nonzero_exit",
        check=ended(7),
        everywhere=True,
    ),
    Case(
        row=15,
        name="forged-elsewhere",
        claim="nor can they be put into the streams of anybody else",
        code=_FRAME
        + "for pid in (1, os.getppid()):\n    for n in range(20):\n        for way in ('fd', 'task/%d/fd' % pid):\n"
        + "            try: open(f'/proc/{pid}/{way}/{n}', 'wb', 0).write(frame)\n            except OSError: pass\nos._exit(7)",
        status="nonzero_exit",
        check=ended(7),
    ),
    Case(
        row=15,
        name="forged-words",
        claim="what a call says about its own end counts for nothing",
        code='print(\'{"status": "ok", "exit_code": 0}\\nexit code: 0\\nPASSED\', flush=True)\nraise SystemExit(9)',
        status="nonzero_exit",
        check=ended(9),
    ),
    Case(
        row=15,
        name="early-end",
        claim="an end without an end of the interpreter is told as it was",
        code="import atexit, os\natexit.register(os._exit, 0)\nos._exit(11)",
        status="nonzero_exit",
        check=ended(11),
    ),
    Case(
        row=15,
        name="end-in-thread",
        claim="also from a thread",
        code="import os, threading, time\nthreading.Thread(target=os._exit, args=(12,)).start()\ntime.sleep(600)",
        status="nonzero_exit",
        check=ended(12),
    ),
    Case(
        row=15,
        name="masked-runner",
        claim="code that replaces what runs it changes its own end and nothing else",
        code="import sys, os\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.startswith('language'): module.run = module.explain = lambda *_: 0\n"
        "for frame in sys._current_frames().values():\n"
        "    while frame: frame.f_globals['os'] = None; frame = frame.f_back\n"
        "raise SystemExit(13)",
        status="nonzero_exit signal ok",
    ),
    Case(
        row=16,
        name="descriptors",
        claim="a call has three descriptors, and none of them is a way to the supervisor's",
        code="import json, os, stat\nfound = []\nfor n in range(1024):\n"
        "    try: found.append([n, stat.S_ISFIFO(os.fstat(n).st_mode)])\n    except OSError: pass\nprint(json.dumps(found))",
        prints=[[0, True], [1, True], [2, True]],
        everywhere=True,
    ),
    Case(
        row=16,
        name="descriptors-shell",
        claim="nor does the shell have more; the fourth is the listing's own",
        code="ls /proc/self/fd | wc -l",
        tool="sh",
        prints=4,
        differs={"runsc": Differs(why=_NO_SELF, not_played=True)},
    ),
    Case(
        row=16,
        name="descriptors-program",
        claim="nor does a program",
        code='{"argv": ["sh", "-c", "ls /proc/self/fd | wc -l"]}',
        tool="exec",
        prints=4,
        differs={"runsc": Differs(why=_NO_SELF, not_played=True)},
    ),
)

PLANTED = "planted-7f3a9c"
"""A word in this process's environment and folder; no cell may know it."""

_HALVES = f"{PLANTED[:6]!r} + {PLANTED[6:]!r}"
_SCAN = f"""
import json, re
word = ({_HALVES}).encode()
others = 0
with open("/proc/self/mem", "rb", 0) as memory:
    for line in open("/proc/self/maps"):
        first, last, mode = re.match(r"([0-9a-f]+)-([0-9a-f]+) (....)", line).groups()
        if "r" not in mode or "[v" in line:
            continue
        first, last = int(first, 16), int(last, 16)
        for at in range(first, last, 1 << 20):
            try:
                memory.seek(at)
                data = memory.read(min(1 << 20, last - at))
            except (OSError, ValueError, OverflowError):
                break
            place = data.find(word)
            while place >= 0:
                # Compared apart from each other, so that this call itself never has the whole in its memory.
                others += data[place + len(word) : place + len(word) + 7] == b"-secret"
                place = data.find(word, place + 1)
print(json.dumps(others))
"""
_SECRETS = (
    Case(
        row=17,
        name="environment",
        claim="seven variables, all of them ours",
        code="import json, os; print(json.dumps(dict(os.environ)))",
        prints={
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": "/job/call",
            "TMPDIR": "/job/call",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        },
        everywhere=True,
    ),
    Case(
        row=17,
        name="secrets",
        claim="no process, file or setting of a cell names the controller, its folders, its proxies or its secrets",
        code=f"""
import json, os
words = [({_HALVES}).encode(), b"proxy=", b"DOCKER_HOST", b"pytest"]
found = []
for pid in [name for name in os.listdir("/proc") if name.isdigit()] + ["self"]:
    for name in ("environ", "cmdline", "comm", "limits", "status"):
        try: data = open(f"/proc/{{pid}}/{{name}}", "rb").read()
        except OSError: continue
        found += [[pid, name] for word in words if word in data]
for path in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/environment", "/proc/version", "/proc/cmdline",
             "/proc/self/mountinfo", "/proc/self/cgroup"):
    try: data = open(path, "rb").read()
    except OSError: continue
    found += [path for word in words if word in data]
print(json.dumps(found))
""",
        prints=[],
    ),
    Case(
        row=18,
        name="memory-of-the-last",
        claim="code, input, files and variables of a call are nowhere in the memory of the next",
        code=f"import sys\nword = ({_HALVES} + '-secret') * 1000\nprint(sys.stdin.read() + word)\nopen('f', 'w').write(word)\n"
        f"# {PLANTED}-secret",
        stdin=f"{PLANTED}-secret".encode() * 100,
        files={"note": f"{PLANTED}-secret".encode() * 100},
        then=_SCAN,
        check=lambda _, second: written(b"0\n")(second),
        everywhere=True,
    ),
    Case(
        row=18,
        name="shared-memory",
        claim="System V memory, semaphores and messages, and POSIX queues, cannot outlive a call",
        code=f"{_TRY}\n"
        "for numbers, arguments in (((29, 194), (7, 4096, 0o1666)), ((64, 190), (7, 1, 0o1666)),\n"
        "                           ((68, 186), (7, 0o1666)), ((240, 180), (b'q', 0o102, 0o666, 0))):\n"
        "    try: native(numbers, *arguments)\n    except OSError: pass",
        then=tries(
            "for name, numbers, arguments in (('memory', (29, 194), (7, 4096, 0)), ('semaphores', (64, 190), (7, 1, 0)),\n"
            "       ('messages', (68, 186), (7, 0)), ('queue', (240, 180), (b'q', 2, 0o666, 0))):\n"
            "    attempt(name, native, numbers, *arguments)"
        ),
        check=lambda _, second: nothing_worked(second),
        everywhere=True,
        differs={
            "runsc": Differs(
                why="gVisor applies no list of system calls, and these live as long as the cell", broken=True
            )
        },
    ),
    Case(
        row=18,
        name="sockets-and-locks",
        claim="nor can servers, abstract sockets, locks and files",
        code="import fcntl, os, socket, time\n"
        "a = socket.socket(socket.AF_UNIX); a.bind('\\0left'); a.listen()\n"
        "b = socket.create_server(('127.0.0.1', 4711))\n"
        "for place in ('.', '/job', '/tmp', '/dev/shm'): open(place + '/left', 'w').write('x')\n"
        "fcntl.flock(open('/tmp/left'), fcntl.LOCK_EX)\nif os.fork() == 0: time.sleep(600)",
        then=tries(
            "import socket\n"
            "attempt('abstract', lambda: socket.socket(socket.AF_UNIX).connect('\\0left'))\n"
            "attempt('server', lambda: socket.create_connection(('127.0.0.1', 4711), 2))\n"
            "for place in ('.', '/job', '/tmp', '/dev/shm'): attempt(place, os.stat, place + '/left')\n"
            "attempt('key', native, (249, 218), b'user', b'left', 0, 0)"
        ),
        check=lambda _, second: nothing_worked(second),
    ),
    Case(
        row=18,
        name="closed-connections",
        claim="connections that a call closed cannot be seen by the next",
        code="import socket\n"
        "server = socket.create_server(('127.0.0.1', 4712))\n"
        "for _ in range(5):\n    one = socket.create_connection(('127.0.0.1', 4712)); two, _ = server.accept()\n"
        "    one.close(); two.close()",
        then="print(len(open('/proc/net/tcp').read().splitlines()) - 1)",
        check=lambda _, second: written(b"0\n")(second),
    ),
)


def nothing_worked(outcome: Outcome) -> None:
    """Of the attempts that were made, none."""
    said = json.loads(outcome.stdout)
    assert said
    assert "worked" not in said.values(), said


_OUTSIDE = (
    Case(
        row=19,
        name="connections",
        claim="nothing outside can be reached, over IPv4 and IPv6, TCP and UDP: public, private, gateway, metadata, names",
        code=tries(
            "import socket\n"
            "places = ['1.1.1.1', '10.0.0.1', '172.17.0.1', '192.168.0.1', '100.100.100.200', '169.254.169.254',\n"
            "  '168.63.129.16', '224.0.0.1', '255.255.255.255', '2606:4700:4700::1111', 'fd00:ec2::254', 'fe80::1',\n"
            "  'ff02::1', '::ffff:1.1.1.1', '64:ff9b::101:101']\n"
            "for place in places:\n"
            "    family = socket.AF_INET6 if ':' in place else socket.AF_INET\n"
            "    for kind, name in ((socket.SOCK_STREAM, 'tcp'), (socket.SOCK_DGRAM, 'udp')):\n"
            "        def reach():\n"
            "            with socket.socket(family, kind) as one:\n"
            "                one.settimeout(0.3)\n"
            "                one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)\n"
            "                one.connect((place, 53)); one.send(b'x' * 12)\n"
            "        attempt(f'{name} {place}', reach)\n"
            "for port in (22, 53, 80, 111, 443, 631, 2375, 2376, 5000, 8080, 10250):\n"
            "    attempt(f'here {port}', socket.create_connection, ('127.0.0.1', port), 1)\n"
            "for name in ('example.org', 'localhost.localdomain', 'host.docker.internal', 'metadata.google.internal'):\n"
            "    try: socket.getaddrinfo(name, 80)\n    except OSError: said[name] = 'unknown'\n"
            "    else: said[name] = 'worked'"
        ),
        worked=("localhost.localdomain",),
        everywhere=True,
    ),
    Case(
        row=19,
        name="odd-sockets",
        claim="nor by raw, packet, netlink, crypto, Bluetooth, CAN, XDP or machine sockets",
        code=tries(
            "import socket\n"
            "for name, family, kind, protocol in (\n"
            "    ('icmp', 2, 3, 1), ('icmp6', 10, 3, 58), ('raw', 2, 3, 255), ('ping', 2, 2, 1), ('sctp', 2, 1, 132),\n"
            "    ('packet', 17, 3, 768), ('packet-dgram', 17, 2, 768), ('netlink', 16, 3, 0), ('uevent', 16, 2, 15),\n"
            "    ('nfnetlink', 16, 3, 12), ('alg', 38, 5, 0), ('vsock', 40, 1, 0), ('xdp', 44, 3, 0), ('can', 29, 3, 1),\n"
            "    ('bluetooth', 31, 3, 1), ('key', 15, 3, 2), ('rds', 21, 5, 0), ('tipc', 30, 5, 0), ('smc', 43, 1, 0),\n"
            "    ('qipcrtr', 42, 2, 0), ('x25', 9, 5, 0), ('kcm', 41, 5, 0), ('mctp', 45, 2, 0), ('ax25', 3, 2, 0)):\n"
            "    attempt(name, lambda: socket.socket(family, kind, protocol).close())"
        ),
        worked=("ping",),  # to oneself
        differs={"runsc": Differs(why=f"{_NO_FILTER}, over a loopback of its own", worked=("netlink", "uevent"))},
    ),
    Case(
        row=19,
        name="interfaces",
        claim="there is no interface but loopback, and no route",
        code="import json, os\n"
        "routes = [line for line in open('/proc/net/route').read().splitlines()[1:] if line.strip()]\n"
        "print(json.dumps([sorted(line.split(':')[0].strip() for line in open('/proc/net/dev').read().splitlines()[2:]),\n"
        "    [line for line in routes if not line.startswith('lo')]]))",
        check=lambda outcome: loopback_alone(outcome),
    ),
    Case(
        row=20,
        name="engine-sockets",
        claim="no socket of an engine, and no other one, is anywhere in a cell",
        code="import json, os, stat\n"
        "found = [path for path in ('/var/run/docker.sock', '/run/docker.sock', '/run/containerd/containerd.sock',\n"
        "  '/run/podman/podman.sock', '/run/crio/crio.sock', '/run/dbus/system_bus_socket', '/run/systemd/private',\n"
        "  '/tmp/.X11-unix', '/run/host-services', '/var/run/secrets') if os.path.lexists(path)]\n"
        "for top, folders, files in os.walk('/'):\n"
        "    if top == '/': folders.remove('proc'), folders.remove('sys')\n"
        "    for name in files:\n"
        "        path = os.path.join(top, name)\n"
        "        if stat.S_ISSOCK(os.lstat(path).st_mode): found.append(path)\n"
        "found += [line for line in open('/proc/net/unix').read().splitlines()[1:] if '@' in line or '/' in line]\n"
        "print(json.dumps(found))",
        prints=[],
        everywhere=True,
    ),
    Case(
        row=21,
        name="kernel-files",
        claim="settings of the kernel, its devices and its ways to start programs cannot be written",
        code=tries(
            "for path in ('/proc/sys/kernel/core_pattern', '/proc/sys/kernel/modprobe', '/proc/sys/vm/overcommit_memory',\n"
            "  '/proc/sys/kernel/randomize_va_space', '/proc/sys/net/ipv4/ip_forward', '/proc/sys/fs/binfmt_misc/register',\n"
            "  '/proc/sysrq-trigger', '/proc/1/oom_score_adj', '/proc/irq/default_smp_affinity', '/proc/mtrr', '/proc/acpi/wakeup',\n"
            "  '/sys/kernel/uevent_helper', '/sys/fs/cgroup/release_agent', '/sys/fs/cgroup/cgroup.procs',\n"
            "  '/sys/fs/cgroup/memory/memory.limit_in_bytes', '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/pids/pids.max',\n"
            "  '/sys/fs/cgroup/pids.max', '/sys/power/state', '/sys/kernel/mm/transparent_hugepage/enabled', '/sys/class/net/lo/mtu',\n"
            "  '/sys/devices/system/cpu/cpu1/online', '/dev/mem', '/dev/kmsg', '/dev/port', '/dev/sda', '/dev/vda', '/dev/kvm',\n"
            "  '/dev/fuse', '/dev/net/tun', '/dev/loop0', '/dev/loop-control', '/dev/mapper/control', '/dev/console', '/dev/tty1',\n"
            "  '/dev/uinput', '/dev/snapshot', '/dev/cpu/0/msr'):\n"
            "    attempt(path, lambda: open(path, 'wb', 0).write(b'1'))\n"
            "for folder in ('/sys/fs/cgroup', '/sys/fs/cgroup/memory', '/sys/fs/cgroup/pids', '/dev', '/proc/self/attr'):\n"
            "    attempt(f'mkdir {folder}', os.mkdir, f'{folder}/x')"
        ),
        worked=(),
        everywhere=True,
    ),
    Case(
        row=21,
        name="kernel-memory",
        claim="nor can its memory, keys, timers, messages and firmware be read",
        code="import json\nfound = []\n"
        "for path in ('/proc/kcore', '/proc/keys', '/proc/timer_list', '/proc/sched_debug', '/proc/latency_stats', '/dev/mem',\n"
        "  '/dev/kmsg', '/proc/kmsg', '/proc/kpagemap', '/proc/kpageflags', '/proc/vmallocinfo', '/proc/slabinfo',\n"
        "  '/sys/kernel/debug/x', '/sys/kernel/security/lockdown', '/sys/firmware/dmi/tables/DMI', '/proc/scsi/scsi',\n"
        "  '/proc/acpi/wakeup', '/sys/firmware/efi/x', '/sys/kernel/notes', '/proc/1/pagemap', '/etc/shadow'):\n"
        "    try:\n        with open(path, 'rb') as file:\n            if file.read(64): found.append(path)\n"
        "    except OSError: pass\n"
        "for line in open('/proc/kallsyms') if __import__('os').path.exists('/proc/kallsyms') else ():\n"
        "    if line.split()[0].strip('0'): found.append('/proc/kallsyms'); break\n"
        "print(json.dumps([path for path in found if path != '/sys/kernel/notes']))",
        prints=[],
    ),
)

_KERNEL = (
    Case(
        row=22,
        name="mounts",
        claim="nothing can be mounted, unmounted or made a root",
        code=tries(
            "attempt('mount', native, (165, 40), b'none', b'/tmp', b'tmpfs', 0, 0)\n"
            "attempt('bind', native, (165, 40), b'/', b'/tmp', 0, 4096, 0)\n"
            "attempt('remount', native, (165, 40), b'none', b'/', 0, 32 | 4096, 0)\n"
            "attempt('proc', native, (165, 40), b'proc', b'/tmp', b'proc', 0, 0)\n"
            "attempt('umount', native, (166, 39), b'/proc/kcore', 2)\n"
            "attempt('pivot_root', native, (155, 41), b'/tmp', b'/tmp')\n"
            "attempt('chroot', native, (161, 51), b'/tmp')\n"
            "attempt('open_tree', native, 428, -100, b'/', 1)\n"
            "attempt('move_mount', native, 429, -100, b'/tmp', -100, b'/dev/shm', 0)\n"
            "attempt('fsopen', native, 430, b'tmpfs', 0)\n"
            "attempt('mount_setattr', native, 442, -100, b'/', 0, 0, 0)\n"
            "attempt('swapon', native, (167, 224), b'/tmp/x', 0)"
        ),
        worked=(),
        everywhere=True,
    ),
    Case(
        row=22,
        name="namespaces",
        claim="no namespace can be made or entered",
        code=tries(
            "for name, flag in (('user', 1 << 28), ('mount', 1 << 17), ('net', 1 << 30), ('pid', 1 << 29), ('ipc', 1 << 27),\n"
            "                   ('uts', 1 << 26), ('cgroup', 1 << 25), ('time', 1 << 7)):\n"
            "    attempt(f'unshare {name}', apart, native, (272, 97), flag)\n"
            "    def clone():\n"
            "        pid = native((56, 220), flag | 17, 0, 0, 0, 0)\n"
            "        if pid == 0: os._exit(0)\n"
            "        os.waitpid(pid, 0)\n"
            "    if name != 'time': attempt(f'clone {name}', apart, clone)\n"
            "attempt('clone3', native, 435, ctypes.create_string_buffer(88), 88)\n"
            "for name in ('mnt', 'net', 'pid', 'ipc', 'uts', 'cgroup', 'user'):\n"
            "    attempt(f'setns {name}', lambda: native((308, 268), os.open(f'/proc/self/ns/{name}', os.O_RDONLY), 0))\n"
            "def all_of_them():\n"
            "    native((272, 97), 1 << 28 | 1 << 17)\n"
            "    native((165, 40), b'none', b'/tmp', b'tmpfs', 0, 0)\n"
            "attempt('mount as another root', apart, all_of_them)"
        ),
        worked=(),
        differs={
            "runsc": Differs(
                why=_NO_FILTER,
                worked=(
                    *(
                        f"{how} {what}"
                        for how in ("unshare", "clone", "setns")
                        for what in ("user", "mount", "net", "pid", "ipc", "uts", "cgroup", "time")
                    ),
                    "mount as another root",
                    "clone3",
                ),
            )
        },
    ),
    Case(
        row=22,
        name="nodes",
        claim="no device can be made, and no file opened by its number",
        code=tries(
            "import stat\n"
            "for name, kind, device in (('null', stat.S_IFCHR, (1, 3)), ('mem', stat.S_IFCHR, (1, 1)), ('disk', stat.S_IFBLK, (8, 0)),\n"
            "                           ('whiteout', stat.S_IFCHR, (0, 0))):\n"
            "    attempt(name, os.mknod, f'/tmp/{name}', kind | 0o666, os.makedev(*device))\n"
            "handle = ctypes.create_string_buffer(b'\\x08\\0\\0\\0\\x01\\0\\0\\0' + bytes(120))\n"
            "attempt('open_by_handle_at', native, (304, 265), os.open('/', os.O_RDONLY), handle, 0)"
        ),
        worked=(),
        differs={
            "runsc": Differs(
                why="gVisor lets anybody make a node; behind it are its own null and zero, and nothing else",
                worked=("null", "mem", "disk", "whiteout"),
            )
        },
    ),
    Case(
        row=23,
        name="users",
        claim="nobody becomes root, or anybody else",
        code=tries(
            "for name, action, arguments in (('setuid', os.setuid, (0,)), ('setgid', os.setgid, (0,)),\n"
            "    ('setresuid', os.setresuid, (0, 0, 0)), ('setresgid', os.setresgid, (0, 0, 0)), ('setgroups', os.setgroups, ([0],)),\n"
            "    ('neighbour', os.setuid, (os.getuid() + 1,)), ('nobody', os.setreuid, (65534, 65534)),\n"
            "    ('chown', os.chown, ('main.py', 0, 0))):\n"
            "    attempt(name, apart, action, *arguments)\n"
            "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
            "for name in ('CapEff', 'CapPrm', 'CapInh', 'CapAmb'):\n"
            "    said[name] = 'worked' if int(status.get(name, '0'), 16) else 'none'\n"
            "attempt('capset', native, (126, 91), ctypes.c_char_p(b'\\x22\\x05\\x08\\x20\\0\\0\\0\\0'),\n"
            "        ctypes.c_char_p(b'\\xff' * 24))"
        ),
        worked=(),
        everywhere=True,
    ),
    Case(
        row=23,
        name="setuid-files",
        claim="no program runs as somebody else, not even one that a call makes",
        code="find / -xdev -type f -perm /6000 2>/dev/null\nfor t in su sudo newgrp pkexec mount chfn passwd ping; do\n"
        "  p=$(command -v $t) && $p -h >/dev/null 2>&1 && find $p -perm /6000\ndone\n"
        "cp $(command -v id) /tmp/id && chmod 6777 /tmp/id && [ $(/tmp/id -u) = $(id -u) ] && echo same",
        tool="sh",
        check=written(b"same\n"),
    ),
    Case(
        row=24,
        name="rare-calls",
        claim="what programs do not need is not there: tracing, io_uring, bpf, keys, modules, clocks, and so on",
        code=tries(
            "from ctypes import create_string_buffer as room\n"
            "for name, numbers, arguments in (\n"
            "  ('io_uring_setup', 425, (1, room(120))), ('bpf', (321, 280), (0, room(120), 120)),\n"
            "  ('perf_event_open', (298, 241), (room(120), 0, -1, -1, 0)), ('userfaultfd', (323, 282), (1,)),\n"
            "  ('add_key', (248, 217), (b'user', b'x', b'y', 1, -3)), ('keyctl', (250, 219), (0, -3, 0, 0, 0)),\n"
            "  ('request_key', (249, 218), (b'user', b'x', 0, 0)), ('kexec_load', (246, 104), (0, 0, 0, 0)),\n"
            "  ('init_module', (175, 105), (room(8), 8, b'')), ('finit_module', (313, 273), (0, b'', 0)),\n"
            "  ('delete_module', (176, 106), (b'x', 0)), ('personality', (135, 92), (0x40000,)),\n"
            "  ('clock_settime', (227, 112), (0, room(16))), ('settimeofday', (164, 170), (room(16), 0)),\n"
            "  ('sethostname', (170, 161), (b'x', 1)), ('setdomainname', (171, 162), (b'x', 1)), ('reboot', (169, 142), (0, 0, 0, 0)),\n"
            "  ('acct', (163, 89), (0,)), ('quotactl', (179, 60), (0, 0, 0, 0)), ('syslog', (103, 116), (3, room(9), 8)),\n"
            "  ('vhangup', (153, 58), ()), ('fanotify_init', (300, 262), (0, 0)), ('vmsplice', (278, 75), (1, room(16), 0, 0)),\n"
            "  ('process_madvise', 440, (0, 0, 0, 0, 0)), ('kcmp', (312, 272), (1, 1, 0, 0, 0)),\n"
            "  ('name_to_handle_at', (303, 264), (-100, b'/', room(136), room(4), 0)), ('memfd_secret', 447, (0,)),\n"
            "  ('move_pages', (279, 239), (1, 0, 0, 0, 0, 0)), ('migrate_pages', (256, 238), (1, 0, 0, 0)),\n"
            "  ('pidfd_getfd', 438, (0, 0, 0)), ('lookup_dcookie', (212, 18), (0, 0, 0, 0))):\n"
            "    attempt(name, native, numbers, *arguments)\n"
            "if x86:\n"
            "    attempt('iopl', native, 172, 3); attempt('ioperm', native, 173, 0, 1, 1); attempt('modify_ldt', native, 154, 1, room(16), 16)"
        ),
        worked=(),
        everywhere=True,
        differs={
            "runsc": Differs(
                why=_NO_FILTER,
                worked=("io_uring_setup", "personality", "userfaultfd", "keyctl", "add_key", "syslog", "vmsplice"),
            )
        },
    ),
    Case(
        row=24,
        name="other-tongues",
        claim="the kernel's 32-bit way in is closed, and so is x32",
        code=f"{_TRY}\nimport mmap\n"
        "if x86:\n"
        "    if libc.syscall(ctypes.c_long(0x40000000 + 39)) > 0: os._exit(1)\n"
        "    # mov eax, 20 (getpid); int 0x80; ret\n"
        "    code = mmap.mmap(-1, 4096, prot=7)\n    code.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"
        "    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))\n"
        "    if call() > 0: os._exit(1)\n"
        "os._exit(0)",
        status="ok signal",
    ),
    Case(
        row=25,
        name="folder-of-the-engine",
        claim="a program cannot start in a folder that the engine left open",
        code=tries(
            "for n in range(3, 30):\n"
            "    for path in (f'/proc/self/fd/{n}', f'/proc/self/fd/{n}/../../../../../../..', f'/proc/1/fd/{n}'):\n"
            "        attempt(path, os.chdir, path)\n"
            "attempt('above', lambda: None if os.stat('/..').st_ino != os.stat('/').st_ino else os.stat('/nowhere'))"
        ),
        worked=(),
        everywhere=True,
    ),
    Case(
        row=25,
        name="program-in-a-folder-of-the-engine",
        claim="not even where it asks for one",
        code='{"argv": ["ls"], "cwd": "/proc/self/fd/7/../../../.."}',
        tool="exec",
        status="nonzero_exit",
        check=ended(125),
    ),
    Case(
        row=25,
        name="runner-overwritten",
        claim="the program that runs a cell cannot be written to through /proc",
        code=tries(
            "for pid in ('self', 1, os.getppid()):\n"
            "    attempt(f'{pid} write', lambda: open(f'/proc/{pid}/exe', 'r+b'))\n"
            "    attempt(f'{pid} cut', os.truncate, f'/proc/{pid}/exe', 0)\n"
            "attempt('keep', lambda: os.open(f'/proc/self/fd/{os.open(\"/proc/self/exe\", os.O_PATH)}', os.O_WRONLY))"
        ),
        worked=(),
    ),
    Case(
        row=25,
        name="masks-moved",
        claim="what hides files of the kernel cannot be moved, replaced or looked behind",
        code=tries(
            "for path in ('/proc/kcore', '/proc/keys', '/proc/sys/kernel/core_pattern', '/dev/null', '/dev/console', '/dev/pts/ptmx'):\n"
            "    attempt(f'rename {path}', os.rename, path, '/tmp/x')\n"
            "    attempt(f'unlink {path}', os.unlink, path)\n"
            "    attempt(f'link {path}', os.symlink, '/proc/sysrq-trigger', path)\n"
            "    attempt(f'mode {path}', os.chmod, path, 0o777)"
        ),
        worked=(),
    ),
)

_FILES = (
    Case(
        row=26,
        name="links-out",
        claim="links, pipes, sockets and devices do not come back, and nothing is read through them",
        code="import os, socket\n"
        "for name, to in (('shadow', '/etc/shadow'), ('passwd', '/etc/passwd'), ('env', '/proc/1/environ'), ('up', '../..'),\n"
        "                 ('etc', '/etc'), ('loop', 'loop'), ('zero', '/dev/zero')): os.symlink(to, name)\n"
        "os.mkfifo('pipe'); socket.socket(socket.AF_UNIX).bind('socket')\n"
        "open('plain', 'w').write('plain'); os.link('plain', 'same')",
        fetch=(
            "shadow",
            "passwd",
            "env",
            "up",
            "etc",
            "loop",
            "zero",
            "pipe",
            "socket",
            "plain",
            "same",
            "etc/passwd",
            "up/etc/passwd",
        ),
        check=fetched(
            "plain",
            "same",
            missed=(
                "shadow",
                "passwd",
                "env",
                "up",
                "etc",
                "loop",
                "zero",
                "pipe",
                "socket",
                "etc/passwd",
                "up/etc/passwd",
            ),
        ),
        everywhere=True,
    ),
    Case(
        row=26,
        name="links-in-a-tree",
        claim="nor where a whole folder is asked for",
        code="import os\nos.mkdir('d'); os.symlink('/etc', 'd/etc'); os.symlink('/etc/passwd', 'd/passwd')\n"
        "open('d/plain', 'w').write('plain')",
        fetch=("d",),
        check=fetched("d/plain", missed=("d/etc", "d/passwd")),
    ),
    Case(
        row=26,
        name="folder-is-a-link",
        claim="nor where the call's own folder became a link",
        code="import os, shutil\nos.chdir('/')\nshutil.rmtree('/job/call')\nos.symlink('/etc', '/job/call')",
        fetch=("passwd", "."),
        check=fetched(missed=("passwd", ".")),
    ),
    Case(
        row=26,
        name="swapped-folders",
        claim="nor where a process goes on swapping a folder with a link",
        code="import os\nos.mkdir('d'); open('d/passwd', 'w').write('plain'); os.symlink('/etc', 'l')\n"
        "if os.fork() == 0:\n    while True:\n        os.rename('d', 't'); os.rename('l', 'd'); os.rename('t', 'l')\n"
        "        os.rename('d', 't'); os.rename('l', 'd'); os.rename('t', 'l')\n"
        "import time; time.sleep(0.2)",
        fetch=("d/passwd", "l/passwd", "t/passwd", "."),
        check=lambda outcome: nothing_of_the_image(outcome),
        differs={"runsc": Differs(why="what lies there when the call ends is chance", not_played=True)},
    ),
    Case(
        row=26,
        name="growing-file",
        claim="a file that grows without an end is cut off by the disk, and too large to come back",
        code="import os, time\nif os.fork() == 0:\n    with open('big', 'wb') as file:\n        while True: file.write(bytes(1 << 16))\n"
        "time.sleep(0.5)",
        fetch=("big",),
        status="ok",
        check=lambda outcome: bounded(outcome),
    ),
    Case(
        row=26,
        name="sparse-file",
        claim="a file counts by what is read of it, holes and all",
        code="open('sparse', 'wb').truncate(15 << 20)\nopen('small', 'w').write('x')",
        fetch=("sparse", "small"),
        check=fetched("small", missed=("sparse",)),
    ),
    Case(
        row=26,
        name="too-much",
        claim="all files together have a size that they may have",
        code="for n in range(4): open(f'f{n}', 'wb').write(bytes(3 << 20 if n else 1 << 20))",
        fetch=(".",),
        status="ok nonzero_exit disk_limit",
        check=lambda outcome: bounded(outcome),
    ),
    Case(
        row=26,
        name="too-many",
        claim="of many thousand files as many come back as may, and the rest is told",
        code="import os\nfor n in range(3000): open(f'f{n:05}', 'w').close()",
        fetch=(".",),
        check=lambda outcome: bounded(outcome, files=64),
    ),
    Case(
        row=26,
        name="odd-names-out",
        claim="names that no file should have on a disk come back as what was missed, or harmless",
        code="import os\nfor name in (b'\\xff\\xfe', b'a\\nb', b'\\x1b[2J', b'...', b' ', b'-rf', b'x' * 255, '\\u202e'.encode()):\n"
        "    open(name, 'wb').write(b'x')",
        fetch=(".",),
        check=lambda outcome: bounded(outcome),
    ),
    Case(
        row=26,
        name="deep-file",
        claim="so do files that are deeper than may be",
        code="import os\nos.makedirs('a/' * 30)\nopen('a/' * 30 + 'f', 'w').close()\nopen('top', 'w').close()",
        fetch=(".",),
        check=lambda outcome: bounded(outcome),
    ),
    *(
        Case(
            row=27,
            name=f"name-{number}",
            claim=f"a file may not be called {name!a}"
            if len(name) < 40
            else f"nor have a name of {len(name)} letters in {name.count('/') + 1} parts",
            code="pass",
            files={name: b"x"},
            status="refused",
        )
        for number, name in enumerate(
            ("/etc/x", "../x", "a/../../x", "a//b", "./a", "a/", "", "a\0b", ".", "a" * 256, "a/" * 600 + "b")
        )
    ),
    Case(
        row=27,
        name="name-no-text",
        claim="nor by a name that is no text",
        code="pass",
        files={"\ud800": b"x"},
        status="refused",
    ),
    Case(
        row=27,
        name="files-too-large",
        claim="files that are larger than the guard policy lets them be are refused before a cell is touched",
        code="pass",
        files={"big": bytes(9 << 20)},
        status="refused",
    ),
    Case(
        row=27,
        name="files-too-many",
        claim="so are too many of them, and a file that is a folder too",
        code="pass",
        files={f"f{number}": b"" for number in range(65)},
        status="refused",
    ),
    Case(
        row=27,
        name="fetch-elsewhere",
        claim="so is a wish for a file elsewhere",
        code="pass",
        fetch=("../../etc/passwd",),
        status="refused",
    ),
    Case(
        row=27,
        name="files-in",
        claim="files that may go in arrive as they are, with the rights of the call alone",
        code="import json, os, stat\nprint(json.dumps([open('a/b', 'rb').read().hex(), oct(os.stat('a').st_mode),\n"
        "    os.stat('a/b').st_uid == os.getuid(), os.path.getsize('empty')]))",
        files={"a/b": bytes(range(256)), "empty": b"", "a b\n": b"", "zip.zip": b"PK\3\4" + bytes(40)},
        prints=[bytes(range(256)).hex(), "0o40700", True, 0],
        everywhere=True,
    ),
)

_INPUT = (
    Case(
        row=28,
        name="input-read",
        claim="50 MiB of standard input arrive",
        code="wc -c",
        tool="sh",
        stdin=bytes(50 << 20),
        prints=50 << 20,
        everywhere=True,
    ),
    Case(
        row=28,
        name="input-ignored",
        claim="or are left alone",
        code="import time; time.sleep(0.3); print('on')",
        stdin=bytes(50 << 20),
        check=written(b"on\n"),
    ),
    Case(
        row=28,
        name="input-closed",
        claim="or are refused by closing it",
        code="import os, time; os.close(0); time.sleep(0.3); print('on')",
        stdin=bytes(50 << 20),
        check=written(b"on\n"),
    ),
    Case(
        row=28,
        name="input-slow",
        claim="and hold nobody up where a call reads a little and then sleeps",
        code="import os, time; os.read(0, 100); time.sleep(600)",
        stdin=bytes(50 << 20),
        status="timeout",
        wall_s=0.7,
        check=within(0.7),
    ),
    Case(
        row=28,
        name="input-echoed",
        claim="input that comes straight back as output does not lock the two against each other",
        code="exec cat",
        tool="sh",
        stdin=b"x" * (3 << 20),
        check=counted(3 << 20, 0),
    ),
    Case(
        row=28,
        name="long-arguments",
        claim="arguments that are too long for the kernel are an ordinary error",
        code="import os, subprocess\n"
        "try: subprocess.run(['true', 'x' * (3 << 20)])\nexcept OSError as error: print(error.errno)\n"
        "try: subprocess.run(['true'], env={str(n): 'y' * 100_000 for n in range(99)})\nexcept OSError as error: print(error.errno)",
        check=written(b"7\n7\n"),
        differs={"runsc": Differs(why="gVisor has another limit", not_played=True)},
    ),
    Case(
        row=28,
        name="long-program",
        claim="also of a program that is called directly",
        code=json.dumps({"argv": ["true", "x" * 500_000]}),
        tool="exec",
        status="nonzero_exit",
        check=ended(126),
        differs={"runsc": Differs(why="gVisor has another limit", not_played=True)},
    ),
)

_ENDS = (
    *(
        Case(
            row=29,
            name=f"exit-{code}",
            claim=f"exit status {code} is told as {code}",
            code=f"import os; os._exit({code})",
            status="nonzero_exit" if code else "ok",
            check=ended(code),
        )
        for code in (0, 1, 2, 70, 72, 126, 127, 128, 137, 143, 255)
    ),
    *(
        Case(
            row=29,
            name=f"signal-{number}",
            claim=f"an end by signal {number} is told as {number}",
            code=f"import os, signal\nsignal.signal({number}, signal.SIG_DFL) if {number} != 9 else 0\n"
            f"os.kill(os.getpid(), {number})\nimport time; time.sleep(5)",
            status="signal",
            check=ended(None, number),
        )
        for number in (1, 2, 6, 9, 11, 13, 14, 15, 31)
    ),
    Case(
        row=29,
        name="exit-words",
        claim="words on the way out are an exit status of 1, and on standard error",
        code="import sys; sys.exit('x')",
        status="nonzero_exit",
        check=says(b"x\n"),
    ),
    Case(
        row=29,
        name="crash",
        claim="a crash of the interpreter is a signal",
        code="import ctypes; ctypes.string_at(0)",
        status="signal",
        check=ended(None, 11),
        everywhere=True,
    ),
    Case(
        row=29,
        name="recursion",
        claim="recursion without an end is an error of the code, however deep it may go",
        code="import sys\nsys.setrecursionlimit(1 << 30)\nx = []\nfor _ in range(300_000): x = [x]\nrepr(x)",
        status="signal nonzero_exit oom",
    ),
    Case(
        row=29,
        name="end-hangs",
        claim="what is registered for the end counts towards the time limit",
        code="import atexit, time\natexit.register(time.sleep, 600)",
        status="timeout",
        wall_s=0.7,
    ),
    Case(
        row=29,
        name="thread-hangs",
        claim="so do threads that do not end",
        code="import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
        status="timeout",
        wall_s=0.7,
    ),
)

_USUAL = (
    *(
        Case(
            row=30,
            name=f"workers-{method}",
            claim=f"workers of multiprocessing work ({method})",
            code="import multiprocessing\ndef square(x): return x * x\nif __name__ == '__main__':\n"
            f"    with multiprocessing.get_context({method!r}).Pool(2) as pool:\n"
            "        print(sum(pool.map(square, range(10))))\n",
            prints=285,
        )
        for method in ("fork", "spawn")
    ),
    Case(
        row=30,
        name="programs",
        claim="threads, programs, pipes, asyncio and shared memory work",
        code="import asyncio, json, subprocess, threading\nfrom multiprocessing import shared_memory\n"
        "def ask(found): found.append(subprocess.run('echo 1 | cat', shell=True, capture_output=True, text=True).stdout)\n"
        "found = []\nthreads = [threading.Thread(target=ask, args=(found,)) for _ in range(4)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]\n"
        "async def go():\n    process = await asyncio.create_subprocess_exec('true')\n    return await process.wait()\n"
        "memory = shared_memory.SharedMemory(create=True, size=4096); memory.buf[0] = 7; seen = memory.buf[0]\n"
        "memory.close(); memory.unlink()\nprint(json.dumps([found, asyncio.run(go()), seen]))",
        prints=[["1\n"] * 4, 0, 7],
        everywhere=True,
    ),
    Case(
        row=30,
        name="numbers",
        claim="numpy computes, with as many threads as it may have",
        code="import numpy as np; x = np.ones((200, 200)); print(int((x @ x).sum()))",
        prints=8_000_000,
    ),
    Case(
        row=31,
        name="randomness",
        claim="two calls draw different numbers from every generator",
        code="import json, os, random, secrets, tempfile, time, uuid\nimport numpy\n"
        "print(json.dumps({'random': random.random(), 'numpy': numpy.random.rand(), 'rng': numpy.random.default_rng().random(),\n"
        "    'uuid': str(uuid.uuid4()), 'secrets': secrets.token_hex(), 'urandom': os.urandom(8).hex(), 'object': random.Random().random(),\n"
        "    'name': next(tempfile._get_candidate_names())}))",
        then="import json, os, random, secrets, tempfile, time, uuid\nimport numpy\n"
        "print(json.dumps({'random': random.random(), 'numpy': numpy.random.rand(), 'rng': numpy.random.default_rng().random(),\n"
        "    'uuid': str(uuid.uuid4()), 'secrets': secrets.token_hex(), 'urandom': os.urandom(8).hex(), 'object': random.Random().random(),\n"
        "    'name': next(tempfile._get_candidate_names())}))",
        check=different,
        everywhere=True,
    ),
    Case(
        row=31,
        name="hashes",
        claim="and have the same hashes, as documented",
        code="print(hash('loop'), list({'a', 'b', 'c', 'd'}))",
        then="print(hash('loop'), list({'a', 'b', 'c', 'd'}))",
        check=alike,
    ),
    Case(
        row=32,
        name="poison",
        claim="changes to modules, built-ins, environment, folder, signals, limits, mask and hooks end with their call",
        code="import atexit, builtins, gc, json, math, os, random, re, resource, signal, string, sys, threading\n"
        "os.environ['LEFT'] = os.environ['PATH'] = os.environ['LD_PRELOAD'] = os.environ['PYTHONSTARTUP'] = '/tmp/x'\n"
        "math.pi = 3; builtins.left = 1; json.dumps = json.loads = None; del re.match; sys.modules['random'] = None\n"
        "sys.path[:] = ['/tmp']; sys.meta_path.clear(); sys.path_hooks.clear(); sys.excepthook = print; sys.settrace(print)\n"
        "sys.setrecursionlimit(99); atexit.register(print); threading.excepthook = None; gc.disable()\n"
        "builtins.print = builtins.open = builtins.__import__ = None\n"
        "for n in (2, 10, 12, 15, 17): signal.signal(n, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {1, 2, 15}); signal.alarm(600)\n"
        "os.umask(0); os.chdir('/'); os.nice(5)\n"
        "for n in (0, 2, 3, 7): resource.setrlimit(n, (9, resource.getrlimit(n)[1]))\n"
        "os._exit(0)",
        everywhere=True,
    ),
    Case(
        row=32,
        name="poisoned-cache",
        claim="compiled files, caches and paths of a user cannot lead the next call's imports",
        code="for f in random json numpy re; do mkdir -p $f; echo 'raise SystemExit(99)' >$f.py; echo 'raise SystemExit(99)' >$f/__init__.py; done\n"
        "cp random.py json.py /tmp; cp random.py /dev/shm; cp random.py /job\nPYTHONPYCACHEPREFIX=/tmp python3 -c 'import csv' || true",
        tool="sh",
    ),
    Case(
        row=33,
        name="other-language",
        claim="python that the shell starts has no more than the shell",
        code='printf \'import os, json\\nworked = []\\nfor path in ("/etc/x", "/usr/x"):\\n'
        '    try: worked.append(open(path, "w"))\\n    except OSError: pass\\nprint(len(worked), os.getppid() > 1)\' >x.py; python3 x.py',
        tool="sh",
        check=written(b"0 True\n"),
        everywhere=True,
    ),
    Case(
        row=33,
        name="encoded",
        claim="code that no pattern recognises is contained by what contains all code",
        code="import base64, zlib\n"
        "exec(zlib.decompress(base64.b64decode(b'"
        + __import__("base64")
        .b64encode(
            __import__("zlib").compress(
                b"import os, socket\ntry: os.kill(1, 9)\nexcept OSError: pass\n"
                b"try: socket.create_connection(('169.254.169.254', 80), 2)\nexcept OSError: print('contained')"
            )
        )
        .decode()
        + "')))",
        check=written(b"contained\n"),
    ),
    Case(
        row=33,
        name="changed-on-the-way",
        claim="what is recorded is what was sent, whatever a call makes of its own file",
        code="import os, sys\n"
        "if os.environ.get('AGAIN'): print('again')\n"
        "else:\n    code = open('main.py').read()\n    open('main.py', 'w').write(code + '\\nos._exit(3)')\n"
        "    os.environ['AGAIN'] = '1'; os.execv(sys.executable, ['python3', 'main.py'])",
        status="nonzero_exit",
        check=ended(3),
    ),
)


def loopback_alone(outcome: Outcome) -> None:
    """No interface but `lo`, tunnels that lead nowhere aside, and no route over another."""
    interfaces, routes = json.loads(outcome.stdout)
    assert "lo" in interfaces
    assert not [name for name in interfaces if name.startswith(("eth", "en", "wl", "veth", "docker", "br"))], interfaces
    assert routes == []


def nothing_of_the_image(outcome: Outcome) -> None:
    """Whatever came back, it was written by the call."""
    assert all(data == b"plain" for name, data in outcome.files.items() if not name.startswith("main."))


def bounded(outcome: Outcome, *, files: int | None = None) -> None:
    """What came back has harmless names and is no more than may come back."""
    from loopguard.sandbox.files import trouble

    assert sum(map(len, outcome.files.values())) <= 8 << 20
    assert len(outcome.files) <= 64
    assert files is None or len(outcome.files) == files
    assert outcome.not_fetched or files is None
    assert not [name for name in outcome.files if trouble(name, depth=8)]
    assert all(name.isprintable() for name in outcome.not_fetched)


CASES = (
    *_ENDLESS,
    *_SUPERVISOR,
    *_MEMORY,
    *_DISK,
    *_OUTPUT,
    *_FORGED,
    *_SECRETS,
    *_OUTSIDE,
    *_KERNEL,
    *_FILES,
    *_INPUT,
    *_ENDS,
    *_USUAL,
)


def played_in(kind: Kind) -> list[Case]:
    """The cases of one kind of cell."""
    return [case for case in CASES if (kind.whole or case.everywhere) and not case.there(kind).not_played]


def one_line(text: str) -> str:
    """Text of a claim for a cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|")
