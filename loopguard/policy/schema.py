"""What a guard policy may say: one model for each section, strict, frozen and without a key that does nothing.

A model that exists is valid in itself and as a whole, however it was made: whatever one key asks of another is checked
by `problems` of the section that holds both. Field descriptions are what a person reads when a required key is missing.

There is no key for a network, host files, devices, capabilities or another user, and none may be added: a cell never
has them. `forbidden.py` says so to those who write one. What `egress` names is reached through a proxy, not a network.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from loopguard.consent.sshsig import read_key
from loopguard.consent.statement import Rule
from loopguard.policy import units
from loopguard.policy.findings import PlacedProblemsError, Where, did_you_mean, shown
from loopguard.policy.forbidden import runtime_fault
from loopguard.policy.hosts import host_fault
from loopguard.types import Limits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Self

Problem = tuple[Where, str]
"""A place relative to the section, and what comes after it in the sentence: `(("id",), "is 'a b'; expected ...")`."""


def duration(at_least: str, at_most: str) -> BeforeValidator:
    """Seconds, as a float, from a duration with its unit."""
    low, high = units.duration_s(at_least), units.duration_s(at_most)

    def read(written: object) -> float:
        amount = units.duration_s(written)
        if not low <= amount <= high:
            raise ValueError(f"is {written!r}; expected {at_least} to {at_most}")
        return float(amount)

    return BeforeValidator(read)


def size(unit: str, at_least: str, at_most: str) -> BeforeValidator:
    """A whole number of `unit` from a size with its unit."""
    low, high = units.size_kib(at_least), units.size_kib(at_most)

    def read(written: object) -> int:
        amount = units.size_kib(written)
        if not low <= amount <= high:
            raise ValueError(f"is {written!r}; expected {at_least} to {at_most}")
        whole = amount / units.SIZES[unit]
        if whole.denominator != 1:
            above = units.write(Fraction(-(-whole // 1)) * units.SIZES[unit], units.SIZES)
            raise ValueError(f"is {written!r}; expected a whole number of {unit}, such as {above}")
        return int(whole)

    return BeforeValidator(read)


def name(pattern: str, kind: str, example: str) -> BeforeValidator:
    """Text that people and files can carry: a word of a kind, named by an example."""

    def read(written: object) -> object:
        if isinstance(written, str) and not re.fullmatch(pattern, written, re.ASCII):
            raise ValueError(f"is {shown(written)}; expected {kind}, such as {example}")
        return written

    return BeforeValidator(read)


def outside() -> BeforeValidator:
    """The exact name of a host that calls may reach."""

    def read(written: object) -> object:
        if fault := host_fault(written):
            raise ValueError(fault)
        return written

    return BeforeValidator(read)


def secret_name() -> BeforeValidator:
    """The name of an environment variable. What was written instead may be the secret, so no message repeats it."""

    def read(written: object) -> object:
        if not isinstance(written, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,127}", written, re.ASCII):
            tail = "such as API_KEY; the secret itself never stands in a policy"
            raise ValueError(f"is not the name of an environment variable, {tail}")
        if re.fullmatch(r"(AKIA|ASIA)[A-Z0-9]{16}", written):
            raise ValueError("looks like a key; write the name of the environment variable that holds it")
        return written

    return BeforeValidator(read)


def secret_names() -> BeforeValidator:
    """Headers with the names of environment variables; a text in their place may be the secret, too."""

    def read(written: object) -> object:
        if not isinstance(written, dict):
            raise ValueError("is not a mapping; expected one such as {Authorization: API_KEY}")
        return written

    return BeforeValidator(read)


def signer_key() -> BeforeValidator:
    """A public SSH key that may approve, in the words of an `allowed_signers` file."""

    def read(written: object) -> object:
        if isinstance(written, str):
            read_key(written)
        return written

    return BeforeValidator(read)


def web_address() -> BeforeValidator:
    """The address of a webhook. No message repeats it, since its path may be a secret of its own."""

    def read(written: object) -> object:
        if isinstance(written, str) and (fault := _address_fault(written)):
            raise ValueError(fault)
        return written

    return BeforeValidator(read)


def _address_fault(written: str) -> str:
    """What is wrong with an address, as the rest of a sentence; empty where nothing is."""
    expected = "expected an address such as https://hooks.example.org/loopguard"
    try:
        parts = urlsplit(written)
        port = parts.port
    except ValueError:
        return f"is no address; {expected}"
    if not re.fullmatch(r"[!-~]+", written) or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return f"is no address; {expected}"
    if "@" in parts.netloc:
        return "names a user; take that out, events are signed with the secret"
    if "?" in written or "#" in written:
        return "has a '?' or '#'; a key in an address would stand in the policy: have a command send it"
    return ""


def known_runtime() -> BeforeValidator:
    """One of the runtimes of which it is known what they hold."""

    def read(written: object) -> object:
        if isinstance(written, str) and written not in ("runc", "runsc"):
            raise ValueError(runtime_fault(written))
        return written

    return BeforeValidator(read)


_CARRIES = re.compile(
    r"host|content-length|transfer-encoding|connection|proxy-.*|keep-alive|te|trailer|upgrade|http2-settings"
)
"""Headers, in small letters and with dashes, that decide where a message goes and where it ends."""
_IDENTIFIER = r"[a-z0-9][a-z0-9_-]{0,63}"
Identifier = Annotated[str, name(_IDENTIFIER, "up to 64 small letters, digits, '-' and '_'", "'offline'")]
PolicyName = Annotated[
    str, name(r"[a-z0-9][a-z0-9._-]{0,63}", "up to 64 small letters, digits, '.', '-' and '_'", "'calc'")
]
ToolName = Annotated[str, name(r"[A-Za-z0-9][\w.:-]{0,63}", "the name of a tool", "'python'")]
MetricName = Annotated[str, name(r"[A-Za-z0-9][\w./-]{0,63}", "the name of a metric", "'correct'")]
PersonName = Annotated[
    str, name(r"[A-Za-z0-9][\w.@+-]{0,63}", "the name of a person, as in --by", "'dana'"), Field(max_length=64)
]
SignerKey = Annotated[str, Field(max_length=4096), signer_key()]
Module = Annotated[str, name(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", "the name of a Python module", "'numpy'")]
Image = Annotated[
    str,
    name(
        r"[a-z0-9][a-z0-9._/:-]{0,180}(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})",
        "an image with its tag or digest",
        "'loopguard/python:1'",
    ),
]
Text = Annotated[str, Field(min_length=1, max_length=500)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Section(BaseModel):
    """Base of everything below: unknown keys, other types and numbers that are not finite are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if problems := list(self.problems()):
            raise PlacedProblemsError(problems)
        return self

    def problems(self) -> Iterable[Problem]:
        """What is wrong between the keys of this section."""
        return ()


class ToolRule(Section):
    """What becomes of the calls of one tool."""

    id: Identifier = Field(description="the name under which the audit log records what this rule decided")
    tool: ToolName = Field(description="the tool it is about, by its exact name")
    then: Literal["run", "deny"] = Field(description="what becomes of a call: run or deny")
    sandbox: Identifier | None = None
    max_code_bytes: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    refuse_patterns: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    on_freeze: Literal["kill", "drain"] | None = None

    def problems(self) -> Iterator[Problem]:
        """`run` needs a sandbox, `deny` takes no conditions, patterns are regular expressions that can be wrong."""
        if self.then == "run" and self.sandbox is None:
            yield ("sandbox",), "is missing: a rule with `then: run` names the profile that its calls run in"
        if self.then == "deny":
            for key in sorted(self.model_fields_set & {"sandbox", "max_code_bytes", "refuse_patterns", "on_freeze"}):
                yield (key,), "has no meaning with `then: deny`, which refuses every call of the tool; take it out"
        yield from _twice(self.refuse_patterns, ("refuse_patterns",))
        for i, pattern in enumerate(self.refuse_patterns):
            if fault := _pattern_fault(pattern):
                yield ("refuse_patterns", i), f"is {shown(pattern)}; {fault}"


class ToolFreeze(Section):
    """When the tool gate freezes the loop. A share counts against `of_last_calls` also while fewer calls were made."""

    refused_share: PositiveShare = Field(description="share of calls refused by a rule, above which the loop freezes")
    contained_share: PositiveShare = Field(description="share of calls that ran into a wall of the sandbox; 1 is never")
    of_last_calls: Count = 200


class CallBudget(Section):
    """How many calls may run. Those above are refused, and count neither as refused nor as contained ones."""

    per_cycle: Count | None = None
    per_rollout: Count | None = None

    def problems(self) -> Iterator[Problem]:
        """Something is bounded."""
        if self.per_cycle is None and self.per_rollout is None:
            yield ("per_cycle",), "is missing: a budget bounds the calls per_cycle, per_rollout or both"


class Tools(Section):
    """The tool gate: which calls run, and where."""

    default: Literal["deny"] = "deny"
    rules: tuple[ToolRule, ...] = Field(
        max_length=1000, description="which tools may run; what no rule lets run is refused"
    )
    freeze_above: ToolFreeze | None = None
    budget: CallBudget | None = None

    def problems(self) -> Iterator[Problem]:
        """Ids are unique, a tool runs in one sandbox, and where there are rules, something may run at all."""
        yield from _twice([rule.id for rule in self.rules], ("rules",), "id")
        running: dict[str, str] = {}
        for i, rule in enumerate(self.rules):
            if rule.then == "run" and rule.tool in running:
                tail = f"is {rule.tool!r}, which rule {running[rule.tool]!r} already lets run; a tool has one sandbox"
                yield ("rules", i, "tool"), f"{tail}, so keep one of the two"
            elif rule.then == "run":
                running[rule.tool] = rule.id
        denied = {rule.tool: rule.id for rule in self.rules if rule.then == "deny"}
        if not running and self.rules:
            tail = "add a rule with `then: run` and a `sandbox`, or take the rules out: what none lets run is refused"
            yield ("rules",), f"let nothing run; {tail}"
        elif running and not running.keys() - denied.keys():
            takers = ", ".join(sorted(repr(denied[tool]) for tool in running))
            yield ("rules",), f"let nothing run, since a deny always wins; take out {takers}"
        if not self.rules and self.budget is not None:
            yield ("budget",), "has no meaning without a rule that lets calls run; take it out"


class CellLimits(Section):
    """What one call may use. A call that reaches a limit ends there, with an outcome that says which."""

    wall_s: Annotated[float, duration("10ms", "24h")] = Field(default=5.0, alias="wall")
    memory_mib: Annotated[int, size("MiB", "16MiB", "1024GiB")] = Field(default=256, alias="memory")
    pids: Annotated[int, Field(ge=1, le=32768)] = 64
    cpus: Annotated[float, Field(ge=0.01, le=1024)] = 1.0
    tmpfs_mib: Annotated[int, size("MiB", "1MiB", "1024GiB")] = Field(default=64, alias="tmpfs")
    output_kib: Annotated[int, size("KiB", "1KiB", "64MiB")] = Field(default=64, alias="output")
    flood_mib: Annotated[int, size("MiB", "1MiB", "1GiB")] = Field(default=16, alias="flood")
    files: Annotated[int, Field(ge=1, le=10_000)] = 64
    files_mib: Annotated[int, size("MiB", "1MiB", "1GiB")] = Field(default=8, alias="files_size")
    files_depth: Annotated[int, Field(ge=1, le=64)] = 8

    def problems(self) -> Iterator[Problem]:
        """Files lie in the tmpfs. A default that does not fit is cut by `to_limits`; what was written is a mistake."""
        if "files_mib" in self.model_fields_set and self.files_mib > self.tmpfs_mib:
            tail = f"more than the {self.tmpfs_mib} MiB of tmpfs that files lie in; make tmpfs larger, or this smaller"
            yield ("files_size",), f"is {self.files_mib} MiB, {tail}"

    def to_limits(self) -> Limits:
        """The same limits as the sandbox takes them."""
        return Limits(
            wall_s=self.wall_s,
            memory_mib=self.memory_mib,
            pids=self.pids,
            cpus=self.cpus,
            tmpfs_mib=self.tmpfs_mib,
            output_kib=self.output_kib,
            flood_mib=self.flood_mib,
            files=self.files,
            files_mib=min(self.files_mib, self.tmpfs_mib),
            files_depth=self.files_depth,
        )


class EgressPlace(Section):
    """One place outside that calls may reach through the proxy."""

    host: Annotated[str, outside()] = Field(description="the exact name of the host")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(description="the port, such as 443")
    secret_headers: Annotated[dict[str, Annotated[str, secret_name()]], Field(max_length=16), secret_names()] = Field(
        default_factory=dict
    )

    def problems(self) -> Iterator[Problem]:
        """A header is one by its name, is there once, and says nothing about how a message is carried."""
        seen: dict[str, str] = {}
        for header in self.secret_headers:
            where: Where = ("secret_headers", header)
            # Many servers take X_Key for X-Key, so we do as well.
            same = header.lower().replace("_", "-")
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", header, re.ASCII):
                # Not repeated: who writes a header where its name belongs has written the secret, too.
                yield ("secret_headers",), "has a key that is no name of a header; expected one such as Authorization"
            elif _CARRIES.fullmatch(same):
                yield where, "says how a message is carried, which is the proxy's alone to say; take it out"
            elif same in seen:
                yield where, f"is there as {seen[same]!r}, too, which servers take for the same header; keep one"
            seen.setdefault(same, header)


class Egress(Section):
    """What calls may reach outside. They have no network: what is not listed here cannot even be asked for."""

    allow: tuple[EgressPlace, ...] = Field(max_length=100, description="the places that calls may reach")

    def problems(self) -> Iterator[Problem]:
        """Something is listed, and each place once."""
        if not self.allow:
            yield ("allow",), "is empty, which is what no egress at all means; take egress out"
        for i in _repeats([(place.host, place.port) for place in self.allow]):
            place = self.allow[i]
            yield ("allow", i), f"is {place.host}:{place.port} for a second time; keep one of the two"


class Profile(Section):
    """A kind of cell that rules can send calls to."""

    image: Image = Field(description="the image that cells start from, with its tag or digest")
    mode: Literal["fresh", "pooled", "episode"] = "pooled"
    runtime: Annotated[Literal["runc", "runsc"], known_runtime()] = "runc"
    privileges: Literal["multi", "strict"] = "multi"
    cells: Annotated[int, Field(ge=1, le=1024)] = 2
    queue: Annotated[int, Field(ge=0, le=100_000)] = 1000
    background: bool = False
    egress: Egress | None = None
    preload: Annotated[tuple[Module, ...], Field(max_length=100)] = ()
    calls_per_cell: Annotated[int, Field(ge=1, le=50_000)] = 500
    limits: CellLimits = CellLimits()

    def problems(self) -> Iterator[Problem]:
        """Modules are named once, and no key asks for what the mode or the runtime of the cell does not have."""
        yield from _twice(self.preload, ("preload",))
        if self.mode != "pooled" and "calls_per_cell" in self.model_fields_set:
            why = {"fresh": "a new cell for each call", "episode": "one cell for each episode, however many its calls"}
            yield ("calls_per_cell",), f"has no meaning with `mode: {self.mode}`, which takes {why[self.mode]}"
        if self.background and self.mode != "episode":
            tail = "which ends whatever a call left running; take it out, or write `mode: episode`"
            yield ("background",), f"is true, but has no meaning with `mode: {self.mode}`, {tail}"
        if self.privileges == "strict" and self.runtime == "runsc":
            tail = "under runsc a call of the same user can end PID 1, the supervisor; use runc, or privileges: multi"
            yield ("privileges",), f"is 'strict', which does not hold with `runtime: runsc`: {tail}"


class Sandbox(Section):
    """Where tool calls run."""

    profiles: dict[str, Profile] = Field(max_length=100, description="the kinds of cells, by name")

    def problems(self) -> Iterator[Problem]:
        """Profiles have names that rules can write."""
        for profile in self.profiles:
            if not re.fullmatch(_IDENTIFIER, profile):
                yield ("profiles", profile), "is no name for a profile; use small letters, digits, '-' and '_'"


class KeptShare(Section):
    """Which share of its own proposals the loop may keep as training data."""

    min: Share = Field(description="the smallest share that is still believable")
    max: Share = Field(description="the largest share that is still believable")
    max_change: Annotated[float, Field(gt=0, le=1000)] = Field(
        description="the largest change against the last promoted cycle, relative and in both directions"
    )

    def problems(self) -> Iterator[Problem]:
        """The range is one."""
        yield from _range(self.min, self.max)


class Recheck(Section):
    """A sample of the kept records whose claims are run again, independently of the loop."""

    sample: Count = Field(description="how many records are checked in each cycle")
    max_wrong_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="share of the sample that may turn out wrong before the loop freezes"
    )


class DataFreeze(Section):
    """When the data gate freezes the loop."""

    quarantined_share: PositiveShare = Field(description="share of records at fault, above which the loop freezes")
    of_at_least: Count = Field(description="how many records a cycle must have for the share to count")


class Data(Section):
    """The data gate: what may become training data."""

    sources: tuple[Literal["human", "model"], ...] = Field(description="whose records may be trained on: human, model")
    overlap_ngram: Annotated[int, Field(ge=2, le=1000)] = 13
    max_own_share: Share = 0.5
    forbidden_in_prompt: Annotated[tuple[Text, ...], Field(max_length=1000)] = ()
    kept_share: KeptShare | None = None
    min_mean_gain: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    recheck: Recheck | None = None
    freeze_above: DataFreeze | None = None

    def problems(self) -> Iterator[Problem]:
        """Somebody's records are let in, and a cap does not contradict that."""
        if not self.sources:
            yield ("sources",), "is empty, so that nothing could be trained on; expected human, model or both"
        yield from _twice(self.sources, ("sources",))
        yield from _twice(self.forbidden_in_prompt, ("forbidden_in_prompt",))
        if "model" in self.sources and self.max_own_share == 0:
            yield ("max_own_share",), "is 0, so that nothing of the model is admitted; take 'model' out of data.sources"


MONITOR_KINDS = "the monitor: bounds, jump, drift or variance"
_WATCHED = "what it watches: loss, grad_norm, or a reading that the loop hands in"
Good = Literal["up", "down", "none"]


class BoundsRule(Section):
    """A metric that must be a finite number inside its domain. Trips at once, so the update is withheld in time."""

    kind: Literal["bounds"] = Field(description=MONITOR_KINDS)
    metric: MetricName = Field(description=_WATCHED)
    min: float | None = None
    max: float | None = None

    def problems(self) -> Iterator[Problem]:
        """The domain is one."""
        yield from _range(self.min, self.max)


class _DirectedRule(Section):
    """A monitor that has to know which way its metric is better."""

    metric: MetricName = Field(description=_WATCHED)
    good: Good | None = None

    @property
    def better(self) -> Good:
        """Which way is better; of the loss and of the gradient norm it is known."""
        return self.good or _KNOWN_GOOD[self.metric]

    def problems(self) -> Iterator[Problem]:
        """Of a metric that we do not know, the direction is said."""
        if self.good is None and self.metric not in _KNOWN_GOOD:
            yield ("good",), f"is missing: say which way {self.metric} is better: up, down or none"


class JumpRule(_DirectedRule):
    """A metric that must not leave its recent level suddenly."""

    kind: Literal["jump"] = Field(description=MONITOR_KINDS)
    min_change: Annotated[float, Field(ge=0, le=1000)] = 0.0


class DriftRule(_DirectedRule):
    """A metric that must not get slowly worse."""

    kind: Literal["drift"] = Field(description=MONITOR_KINDS)
    min_change: Annotated[float, Field(ge=0, le=1000)] = 0.03

    def problems(self) -> Iterator[Problem]:
        """Slowly worse has to be something."""
        yield from super().problems()
        if (self.good or _KNOWN_GOOD.get(self.metric)) == "none":
            tail = "drift finds what gets slowly worse, and has to know which way that is: write up or down"
            yield ("good",), f"is none for {self.metric}; {tail}"


class VarianceRule(Section):
    """A metric whose noise must not blow up."""

    kind: Literal["variance"] = Field(description=MONITOR_KINDS)
    metric: MetricName = Field(description=_WATCHED)


MonitorRule = Annotated[BoundsRule | JumpRule | DriftRule | VarianceRule, Field(discriminator="kind")]

_KNOWN_GOOD: dict[str, Good] = {"loss": "down", "grad_norm": "none"}


class Updates(Section):
    """The update gate: which optimizer steps may move the weights."""

    loss_kind: Literal["discrete", "density", "surrogate"] = Field(
        description="discrete (cross-entropy, never below zero), density, or surrogate (policy gradient)"
    )
    lease: Annotated[int, Field(ge=1, le=65536)] = 64
    false_alarm_every: Annotated[int, Field(ge=100, le=1_000_000_000)] = 100_000
    monitors: tuple[MonitorRule, ...] = Field(max_length=100, description="what watches the loss and the gradient")

    def problems(self) -> Iterator[Problem]:
        """No monitor twice, and the loss is never unwatched."""
        for i in _repeats([(rule.kind, rule.metric) for rule in self.monitors]):
            rule = self.monitors[i]
            yield ("monitors", i), f"watches {rule.metric} with {rule.kind} a second time; keep one of the two"
        bounds = [(i, rule) for i, rule in enumerate(self.monitors) if isinstance(rule, BoundsRule)]
        loss = [(i, rule) for i, rule in bounds if rule.metric == "loss"]
        if not loss:
            yield ("monitors",), "let a loss that is not a number pass; add {kind: bounds, metric: loss}"
        for i, rule in loss:
            if self.loss_kind == "discrete" and rule.min is not None and rule.min < 0:
                tail = f"is {rule.min:g}, but a discrete loss below zero is a bug; leave min out, or change loss_kind"
                yield ("monitors", i, "min"), tail


class PanelMetric(Section):
    """One capability, compared with its value at the last promotion. Changes are absolute, in the metric's own unit."""

    metric: MetricName = Field(description="its name, as the loop reports it")
    good: Good = Field(description="which direction is a gain: up, down or none")
    min: float | None = None
    max: float | None = None
    max_gain: Annotated[float, Field(ge=0)] = Field(description="the largest gain that one cycle may bring")
    max_loss: Annotated[float, Field(ge=0)] = Field(description="the largest loss that one cycle may bring")
    problem_count: Annotated[int, Field(ge=2, le=1_000_000_000)] | None = Field(default=None, alias="problems")

    def problems(self) -> Iterator[Problem]:
        """The domain is one, and a share of problems is a share."""
        yield from _range(self.min, self.max)
        if self.problem_count is not None and (self.min, self.max) != (0, 1):
            yield ("problems",), f"makes {self.metric} a share of problems solved; write min: 0 and max: 1 with it"
        if self.problem_count is not None and self.good == "none":
            yield ("problems",), "needs a direction that is better; write good: up or good: down"


class Promotion(Section):
    """The promotion gate: which weights may become the actor."""

    panel: tuple[PanelMetric, ...] = Field(
        max_length=1000, description="the capabilities that a candidate is judged by"
    )
    false_alarm_every: Annotated[int, Field(ge=10, le=1_000_000_000)] = 1000
    keep_snapshots: Annotated[int, Field(ge=1, le=1000)] = 2

    def problems(self) -> Iterator[Problem]:
        """Something is measured, and each metric has one rule."""
        if not self.panel:
            yield ("panel",), "is empty, so that any weights would be promoted; add at least one metric"
        yield from _twice([metric.metric for metric in self.panel], ("panel",), "metric")


class SkipBudget(Section):
    """How many batches may be dropped before a trip freezes after all."""

    updates: Count = Field(description="how many updates may be skipped")
    per: Count = Field(description="among how many updates in a row")

    def problems(self) -> Iterator[Problem]:
        """Skipping stays the exception."""
        if self.updates >= self.per:
            yield ("updates",), f"is {self.updates} per {self.per}, which is every update; expected fewer than `per`"


class Probation(Section):
    """The cycles after a resume, in which it takes less to freeze again."""

    cycles: Annotated[int, Field(ge=1, le=1000)] = Field(description="how many cycles have to be promoted")
    tighten: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="what the reach of every monitor and limit is multiplied with; 0.5 halves it"
    )


class FreezeBudget(Section):
    """How often a run may freeze by itself before people should stop lifting it."""

    freezes: Annotated[int, Field(ge=1, le=1000)] = Field(description="how many freezes a run may have")
    cycles: Count = Field(description="within how many cycles")


_PLACE_PATH = re.compile(r"(/|~/).*")
_OTHER_PLACE = "an absolute path, or one from ~/, so that it is the same place wherever the loop is started"


class Freeze(Section):
    """What a trip of the update gate does, and what a freeze does to a running loop."""

    on_trip: Literal["freeze", "skip"] = "freeze"
    skip_at_most: SkipBudget | None = None
    when_frozen: Literal["raise", "wait", "exit"] = "raise"
    running_calls: Literal["kill", "drain"] = "kill"
    signal: Literal["USR2", "USR1", "HUP", "none"] = "USR2"
    second_latch: Text | None = None
    waive_at_most: Annotated[int, Field(ge=0, le=1000)] = 5
    probation: Probation | None = None
    halt_above: FreezeBudget | None = None
    capsule_mib: Annotated[int, size("MiB", "1MiB", "1024GiB")] = Field(default=1024, alias="capsule")

    def problems(self) -> Iterator[Problem]:
        """`skip` has a budget, and only `skip` has one."""
        if self.on_trip == "skip" and self.skip_at_most is None:
            yield ("skip_at_most",), "is missing: `on_trip: skip` needs a bound, such as {updates: 2, per: 100}"
        if self.on_trip == "freeze" and self.skip_at_most is not None:
            yield ("skip_at_most",), "has no meaning with `on_trip: freeze`; take it out, or write `on_trip: skip`"
        if self.second_latch is not None and not _PLACE_PATH.fullmatch(self.second_latch):
            yield ("second_latch",), f"is {shown(self.second_latch)}; expected {_OTHER_PLACE}"


class Hold(Section):
    """When no new cycle begins, and how long that may last."""

    at_most_s: Annotated[float, duration("1s", "720h")] = Field(default=86400.0, alias="at_most")
    free_mib: Annotated[int, size("MiB", "1MiB", "1024GiB")] | None = Field(default=None, alias="free")


class Resume(Section):
    """Who has to agree before a frozen run goes on."""

    approvals: Annotated[int, Field(ge=1, le=10)] = Field(description="how many people have to agree")
    people: dict[PersonName, Annotated[tuple[SignerKey, ...], Field(max_length=20)]] = Field(
        max_length=100, description="who may approve: a name, and that person's public SSH keys"
    )
    requester_may_approve: bool = False
    within_s: Annotated[float, duration("1m", "720h")] = Field(default=86400.0, alias="within")
    execute_within_s: Annotated[float, duration("1m", "720h")] = Field(default=3600.0, alias="execute_within")

    def problems(self) -> Iterator[Problem]:
        """Enough people are left whoever asks, each with a key, and no key speaks for two of them."""
        left = len(self.people) - (not self.requester_may_approve)
        if left < self.approvals:
            asks = "" if self.requester_may_approve else ", of whom whoever asks may not approve"
            need = self.approvals + (not self.requester_may_approve)
            tail = f"names {len(self.people)}{asks}, and {self.approvals} have to agree; name at least {need}"
            yield ("people",), tail
        owners: dict[str, str] = {}
        for person, lines in self.people.items():
            if not lines:
                yield ("people", person), "has no key; add the line of a .pub file, or take the name out"
            for i, line in enumerate(lines):
                key = read_key(line).fingerprint
                if key in owners:
                    yield ("people", person, i), f"is a key of {owners[key]} already; a key speaks for one person, once"
                owners.setdefault(key, person)

    def to_rule(self) -> Rule:
        """The same as those who count approvals take it."""
        return Rule(
            approvals=self.approvals,
            people=self.people,
            requester_may_approve=self.requester_may_approve,
            within_s=self.within_s,
            execute_within_s=self.execute_within_s,
        )


class FileAnchor(Section):
    """A file, best on another volume or machine, that a line is appended to."""

    kind: Literal["file"] = Field(description="where a checkpoint is kept: file, git or print")
    path: Text = Field(description="the file")
    required: bool = False

    def problems(self) -> Iterator[Problem]:
        """It is one place."""
        if not _PLACE_PATH.fullmatch(self.path):
            yield ("path",), f"is {shown(self.path)}; expected {_OTHER_PLACE}"


class GitAnchor(Section):
    """Another repository, where a commit is made on a branch of its own."""

    kind: Literal["git"] = Field(description="where a checkpoint is kept: file, git or print")
    repository: Text = Field(description="the repository")
    required: bool = False

    def problems(self) -> Iterator[Problem]:
        """It is one place."""
        if not _PLACE_PATH.fullmatch(self.repository):
            yield ("repository",), f"is {shown(self.repository)}; expected {_OTHER_PLACE}"


class PrintAnchor(Section):
    """A line on standard error, for a CI job to keep."""

    kind: Literal["print"] = Field(description="where a checkpoint is kept: file, git or print")
    required: bool = False


AnchorPlace = Annotated[FileAnchor | GitAnchor | PrintAnchor, Field(discriminator="kind")]


class Payloads(Section):
    """What the log keeps of what a tool call is given, and of what it gives back."""

    code: Literal["head", "digest", "keep"] = "head"
    printed: Literal["digest", "keep"] = "digest"


class Audit(Section):
    """The audit log."""

    reserve_mib: Annotated[int, size("MiB", "1MiB", "1GiB")] = Field(default=4, alias="reserve")
    checkpoint_every: Count = 1000
    anchors: Annotated[tuple[AnchorPlace, ...], Field(max_length=16)] = ()
    segment_mib: Annotated[int, size("MiB", "1MiB", "256MiB")] = Field(default=64, alias="segment")
    compress: bool = True
    retain_days: Annotated[int, Field(ge=1, le=36_500)] = 365
    payloads: Payloads = Payloads()

    def problems(self) -> Iterator[Problem]:
        """A place is named once."""
        places = [place.model_copy(update={"required": False}) for place in self.anchors]
        for i in _repeats(places) if places else ():
            yield ("anchors", i), "is there a second time; keep one of the two"


_LOCAL = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|::1")


class WebhookPlace(Section):
    """One address that is told of a freeze."""

    url: Annotated[Text, web_address()] = Field(description="the address that events are posted to")
    secret: Annotated[str, secret_name()] = Field(
        description="the environment variable with the secret that events are signed with"
    )
    insecure: bool = False

    def problems(self) -> Iterator[Problem]:
        """What is sent unencrypted stays on the machine, unless that is asked for."""
        parts = urlsplit(self.url)
        local = _LOCAL.fullmatch(parts.hostname or "") is not None
        if parts.scheme == "http" and not local and not self.insecure:
            yield ("url",), "is not encrypted, and leads off this machine: write https, or insecure: true"
        if self.insecure and (parts.scheme == "https" or local):
            tail = "is encrypted" if parts.scheme == "https" else "stays on this machine"
            yield ("insecure",), f"has no meaning for an address that {tail}; take it out"


Told = Literal["freeze.entered", "resume.requested", "resume.applied", "run.halted", "run.finished", "run.interrupted"]
_EVERY: tuple[Told, ...] = get_args(Told)


class Notify(Section):
    """Who is told when the run freezes, is to go on, goes on, or ends."""

    webhooks: Annotated[tuple[WebhookPlace, ...], Field(max_length=16)] = ()
    command: Annotated[tuple[Text, ...], Field(max_length=100)] | None = None
    events: tuple[Told, ...] = _EVERY
    within_s: Annotated[float, duration("1s", "24h")] = Field(default=900.0, alias="within")

    def problems(self) -> Iterator[Problem]:
        """Somebody is told, of each thing once, and the program is one and the same wherever the loop is started."""
        if not self.webhooks and self.command is None:
            yield ("webhooks",), "is missing, and so is command: nobody would be told; name one, or take notify out"
        for i in _repeats([place.url for place in self.webhooks]):
            yield ("webhooks", i, "url"), "is there a second time; keep one of the two"
        yield from _twice(self.events, ("events",))
        if not self.events:
            yield ("events",), "is empty, so that nobody would be told of anything; take it out for all of them"
        if self.command is not None and not self.command:
            yield ("command",), "is empty; expected a program with its arguments, such as [/usr/local/bin/page, night]"
        elif self.command is not None and not _PLACE_PATH.fullmatch(self.command[0]):
            yield ("command", 0), f"is {shown(self.command[0])}; expected {_OTHER_PLACE}"


class GuardPolicy(Section):
    """Everything that a guard policy file says, with the defaults filled in.

    One without `tools` lets no call run, and so needs no `sandbox`: nothing of it asks for Docker.
    """

    apiVersion: Literal["loopguard/v1"] = Field(  # noqa: N815 - as it is written in the file
        description="the version of this format: loopguard/v1"
    )
    name: PolicyName = Field(description="what to call this policy in logs and reports")
    description: Text | None = None
    tools: Tools = Field(default_factory=lambda: Tools(rules=()))
    sandbox: Sandbox = Field(default_factory=lambda: Sandbox(profiles={}))
    data: Data = Field(description="the data gate: what may become training data")
    updates: Updates = Field(description="the update gate: which optimizer steps may move the weights")
    promotion: Promotion = Field(description="the promotion gate: which weights may become the actor")
    freeze: Freeze = Freeze()
    hold: Hold = Hold()
    resume: Resume | None = None
    audit: Audit = Audit()
    notify: Notify | None = None

    def problems(self) -> Iterator[Problem]:
        """Every rule runs its calls in a profile that exists, and what needs calls or rollouts has them."""
        wanted = [(("tools", "rules", i, "sandbox"), rule.sandbox) for i, rule in enumerate(self.tools.rules)]
        written = "sandbox" in self.model_fields_set
        yield from missing_profiles(wanted, list(self.sandbox.profiles) if written else None)
        if self.data.recheck is not None and not self.tools.rules:
            tail = "runs the checks of records as tool calls, and no rule lets one run; add tools, or take it out"
            yield ("data", "recheck"), tail
        used = [self.sandbox.profiles.get(rule.sandbox or "") for rule in self.tools.rules]
        rollouts = any(profile is not None and profile.mode == "episode" for profile in used)
        if self.tools.budget is not None and self.tools.budget.per_rollout is not None and not rollouts:
            tail = "has no meaning, since no rule names a profile with `mode: episode`; take it out"
            yield ("tools", "budget", "per_rollout"), tail


def missing_profiles(wanted: Iterable[tuple[Where, Any]], profiles: Sequence[str] | None) -> Iterator[Problem]:
    """The rules that name a profile which is not there; one sentence where there is no section `sandbox` (None)."""
    if not profiles:
        if any(isinstance(profile, str) for _, profile in wanted):
            empty = (("sandbox", "profiles"), "is empty; describe at least one kind of cell")
            yield (("sandbox",), "is missing: the cells that tool calls run in") if profiles is None else empty
        return
    known = ", ".join(sorted(profiles))
    for where, profile in wanted:
        if isinstance(profile, str) and profile not in profiles:
            yield where, f"is {shown(profile)}; sandbox.profiles has {known}{did_you_mean(profile, profiles)}"


def _range(low: float | None, high: float | None) -> Iterator[Problem]:
    if low is not None and high is not None and low > high:
        yield ("min",), f"is {low:g}, above max, which is {high:g}; swap them"


def _twice(values: Sequence[str], where: Where, key: str | None = None) -> Iterator[Problem]:
    for i in _repeats(values):
        place: Where = (*where, i) if key is None else (*where, i, key)
        yield place, f"is {shown(values[i])} for a second time; keep one, or give it another name"


def _repeats(values: Sequence[object]) -> list[int]:
    """Positions of values that stood there before."""
    seen: Counter[object] = Counter()
    repeats = []
    for i, value in enumerate(values):
        if seen[value]:
            repeats.append(i)
        seen[value] += 1
    return repeats


def _pattern_fault(pattern: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled = re.compile(pattern)
    except re.error as error:
        return f"not a regular expression: {error}"
    except (Warning, OverflowError, RecursionError) as error:
        return f"not a regular expression with one meaning: {error or type(error).__name__}"
    return "it matches empty text, so that every call would be refused" if compiled.search("") else ""
