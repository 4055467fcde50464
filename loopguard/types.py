"""The values that travel between layers: frozen, with no behaviour beyond small derived facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

OutcomeStatus = Literal[
    "ok",  # exit status 0
    "nonzero_exit",  # the code ended by itself with another status
    "signal",  # the code was ended by a signal that was not ours
    "timeout",  # wall-clock limit
    "oom",  # memory limit
    "pids_limit",  # process limit
    "output_limit",  # output flood
    "disk_limit",  # writable space or inodes used up
    "denied",  # the tool gate refused; nothing ran
]

CONTAINED: frozenset[str] = frozenset({"signal", "timeout", "oom", "pids_limit", "output_limit", "disk_limit"})
"""Outcomes of calls that ran into a wall of the sandbox."""

Result = Literal["allow", "deny", "quarantine", "skip", "freeze"]
"""What a gate may decide. `skip` drops one batch (bounds only, where the policy says so)."""

Source = Literal["human", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one tool call may use. A call that reaches a limit has an Outcome with that limit's status."""

    wall_s: float
    memory_mib: int
    pids: int
    cpus: float
    tmpfs_mib: int
    output_kib: int
    """Kept of each stream: half of it from the head, half from the tail. Counts are exact beyond it."""
    flood_mib: int
    """Both streams together; more than this ends the call with `output_limit`."""
    files: int = 64
    """How many files may go in, and how many may come out."""
    files_mib: int = 8
    """All files that go in together, and all that come out."""
    files_depth: int = 8
    """Folders below the one that the call starts in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that a model (or the loop on its behalf) wants to make."""

    id: str
    tool: str
    code: str
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Written into the call's folder before it starts. Names are relative, with `/` between folders."""
    fetch: tuple[str, ...] = ()
    """Files and folders to bring back afterwards."""
    wall_s: float | None = None
    """A shorter time limit than the guard policy's; a longer one has no effect."""
    memory_mib: int | None = None
    """A smaller address space than the policy's memory limit, for this call's processes each."""
    language: str = ""
    """Which language of the cell runs it; empty where that is the tool's own name."""
    program: str = ""
    """What runs in the place of `code`, where a tool is a loop's own function: it reads `code`, a newline and `stdin`
    from its standard input. The gate judges `code`, which is what a model chose."""

    @property
    def runs(self) -> str:
        """The text that the language gets."""
        return self.program or self.code

    @property
    def reads(self) -> bytes:
        """What is on standard input."""
        if not self.program:
            return self.stdin
        return self.code.encode("utf-8", errors="surrogatepass") + b"\n" + self.stdin


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a tool call came back with. A dead sandbox is an exception and never an Outcome."""

    call_id: str
    status: OutcomeStatus
    exit_code: int | None = None
    """0-255, or None where the code did not exit by itself."""
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_bytes: int = 0
    """How much was written, also where less was kept."""
    stderr_bytes: int = 0
    wall_ms: float = 0.0
    leftovers: int = 0
    """Processes that the call left running; they were killed."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What was fetched, by name. The names were chosen by the code: check them again before they reach a disk."""
    not_fetched: Mapping[str, str] = field(default_factory=dict)
    """What was asked for or found and did not come back, with the reason."""
    refusal: str = ""
    """For `denied`: the terse text that a model may see. It names no rule and no path."""

    @property
    def ok(self) -> bool:
        """Whether the code ran and exited with status 0."""
        return self.status == "ok"

    @property
    def contained(self) -> bool:
        """Whether the call ran into a wall of the sandbox."""
        return self.status in CONTAINED

    @property
    def text(self) -> str:
        """Standard output as text; undecodable bytes are replaced. Of a denied call, the refusal."""
        return self.refusal if self.status == "denied" else self.stdout.decode("utf-8", errors="replace")


Disposition = Literal["rollback", "discard", "accept", "halt"]
"""What becomes of the frozen cycle: begun again, passed over, gone on with as it was, or the end of the run."""

NOTHING = "nothing"
"""What most resumes waive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayOn:
    """How a frozen run goes on, as people decided it."""

    disposition: Disposition = "rollback"
    waives: str = NOTHING
    """The rule that may trip nothing for a while: that of the freeze."""
    waives_cycles: int = 0
    """For how many cycles, the next one included; 0 where nothing is waived."""

    @classmethod
    def read(cls, value: Any) -> Self:
        """The way on in a request or a record; the usual one where it says nothing. Raises ValueError for another."""
        told = {name: value[name] for name in cls.__slots__ if name in value}
        way = cls(**told)
        if way.disposition not in get_args(Disposition) or type(way.waives) is not str:
            raise ValueError(f"{told!r} is no way on"[:120])
        if (
            type(way.waives_cycles) is not int
            or way.waives_cycles < 0
            or (way.waives == NOTHING) != (not way.waives_cycles)
        ):
            raise ValueError(f"{told!r} waives nothing that could be waived"[:120])
        return way

    def facts(self) -> dict[str, Any]:
        """What requests and records hold of it."""
        return {name: getattr(self, name) for name in self.__slots__}


ROLL_BACK = WayOn()
"""How a run goes on where nobody says otherwise."""

ExpectedKind = Literal[
    "epoch",  # the same data again: a loss may fall in a step, and never rises for it
    "lr",  # another learning rate: a loss may go either way, and so may its noise
    "data",  # another mix of data: the level itself is another one
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """A change that the loop announces before it comes, so that it is not taken for a fault."""

    kind: ExpectedKind
    at: int
    """The first update, or cycle, that it may show in."""
    span: int = 1
    """In how many from there on it may show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What a monitor says of a reading that is out of the ordinary."""

    level: Literal["ok", "warn", "trip"]
    monitor: str
    metric: str
    value: float
    at: int
    low: float | None = None
    """The expected range; None where that side is open."""
    high: float | None = None
    score: float | None = None
    """How far outside, in the monitor's own unit (noise units for `jump`)."""
    since: int | None = None
    """The first reading that looks wrong."""
    direction: Literal["up", "down"] | None = None
    once_in: float | None = None
    """How sure: a healthy run shows this once in so many readings, by the monitor's own calibration. None: never."""
    at_once: bool = False
    """Of a trip: this value alone is enough, so that its update is withheld in time and nothing has to be undone."""
    holds: bool = False
    """Of a warning: nothing should be promoted until it has passed or become a trip."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a gate decided, by which rule, and why. The controller acts on it."""

    result: Result
    gate: Literal["tool", "data", "update", "promotion", "operator", "audit"]
    rule: str
    reason: str
    signals: tuple[Signal, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON values that belong into the audit record."""

    @property
    def allowed(self) -> bool:
        """True for `allow` alone."""
        return self.result == "allow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a record comes from. A record without one is quarantined."""

    source: Source
    origin: str
    """A place a person can find again, such as `train.jsonl:17`."""
    cycle: int
    actor: str | None = None
    """Digest of the promoted weights that wrote it; None for people."""
    calls: tuple[str, ...] = ()
    """Ids of the tool calls whose results it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A claim of a record that the data gate can verify by itself: this code prints this number."""

    tool: str
    code: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One piece of training data on its way to the weights."""

    id: str
    prompt: str
    completion: str
    provenance: Provenance | None
    gain: float | None = None
    """How much better the model does with it than without, in nats per token; None where a loop has no such number."""
    check: Check | None = None
    payload: Any = None
    """The loop's own object; neither hashed nor logged."""
