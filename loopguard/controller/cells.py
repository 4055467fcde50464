"""The sandboxes of a run: one runtime for each profile that the guard policy names."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from loopguard.errors import SandboxUnavailableError, UsageError
from loopguard.sandbox.base import CellSpec, EgressRule

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.audit.log import AuditLog
    from loopguard.policy.schema import GuardPolicy, Profile
    from loopguard.sandbox.base import EventSink, Runtime


_REFUSALS = 1000
"""How many calls of tools that no rule lets run may be refused at once."""


class Cells:
    """One runtime for each profile that a rule names, started when first needed. Lives as long as its guard.

    Under a guard policy without tools there is none, and nothing is asked of any engine.
    """

    def __init__(self, policy: GuardPolicy, run_id: str, make: Callable[[CellSpec, str, EventSink], Runtime]) -> None:
        names = {rule.sandbox for rule in policy.tools.rules if rule.then == "run" and rule.sandbox is not None}
        self._profiles = {name: policy.sandbox.profiles[name] for name in sorted(names)}
        self._tools = {rule.tool: rule.sandbox for rule in policy.tools.rules if rule.then == "run" and rule.sandbox}
        self._run_id = run_id
        self._make = make
        self._runtimes: dict[str, Runtime] = {}
        self._starting = threading.Lock()
        self._closed = False
        self._early: list[tuple[str, dict[str, Any]]] = []
        self._log: AuditLog | None = None

    @property
    def width(self) -> int:
        """How many calls can run at once."""
        return max((profile.cells for profile in self._profiles.values()), default=1)

    def profile_of(self, tool: str) -> str:
        """The profile that calls of a tool run in; empty where none may run."""
        return self._tools.get(tool, "")

    def room(self, profile: str) -> tuple[int, int]:
        """How many cells there are of a profile at most, and how many calls may wait for one."""
        found = self._profiles.get(profile)
        return (found.cells, found.queue) if found is not None else (1, _REFUSALS)

    def start(self) -> None:
        """Start what is not running yet. Raises SandboxUnavailableError, also for good after `close`."""
        if len(self._runtimes) == len(self._profiles):
            return
        with self._starting:
            if self._closed:
                raise SandboxUnavailableError("the sandbox is closed")
            for name, profile in self._profiles.items():
                if name not in self._runtimes:
                    runtime = self._make(cell_spec(profile), self._run_id, self._event)
                    runtime.start()
                    self._runtimes[name] = runtime

    def of(self, profile: str) -> Runtime:
        """The runtime of a profile. Raises UsageError where no rule names it."""
        if profile not in self._profiles:
            there = f"there are {', '.join(self._profiles)}" if self._profiles else "it has no tools"
            raise UsageError(f"no rule of the guard policy lets a tool run in {profile!r}; {there}")
        if profile not in self._runtimes:
            raise SandboxUnavailableError(f"the sandbox {profile!r} is not running")
        return self._runtimes[profile]

    def kill(self, call_id: str, why: str) -> None:
        """End one call, whether it runs or waits."""
        for runtime in list(self._runtimes.values()):
            runtime.kill(call_id, why)

    def report_to(self, log: AuditLog) -> None:
        """From now on sandbox events go to this log; those that came before it was open go there first."""
        self._log = log
        for kind, body in self._early:
            log.append(kind, body)
        self._early.clear()

    def kill_running(self) -> None:
        """End every call that runs now, in all of them."""
        for runtime in list(self._runtimes.values()):
            runtime.kill_running()

    def close(self) -> None:
        """Take all of them down, for good; may be called twice."""
        with self._starting:
            self._closed = True
            for runtime in self._runtimes.values():
                runtime.close()
            self._runtimes.clear()

    def _event(self, kind: str, body: dict[str, Any]) -> None:
        if self._log is None:
            self._early.append((kind, body))
        elif not self._log.degraded:
            # A connection to the outside is on disk before it is made, as a call is before it runs.
            self._log.append(kind, body, sync=kind == "tool.egress")


def cell_spec(profile: Profile) -> CellSpec:
    """What the sandbox is told of a profile."""
    places = profile.egress.allow if profile.egress is not None else ()
    return CellSpec(
        image=profile.image,
        mode=profile.mode,
        runtime=profile.runtime,
        privileges=profile.privileges,
        cells=profile.cells,
        queue=profile.queue,
        background=profile.background,
        egress=tuple(
            EgressRule(host=place.host, port=place.port, secret_headers=tuple(sorted(place.secret_headers.items())))
            for place in places
        ),
        preload=tuple(profile.preload),
        limits=profile.limits.to_limits(),
        calls_per_cell=profile.calls_per_cell,
    )


def docker(spec: CellSpec, run_id: str, on_event: EventSink) -> Runtime:
    """The runtime that is used unless another one is given."""
    from loopguard.sandbox.docker import DockerRuntime

    return DockerRuntime(spec, run_id=run_id, on_event=on_event)
