"""The sandboxes of a run: one runtime for each profile that the guard policy names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopguard.sandbox.base import CellSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.audit.log import AuditLog
    from loopguard.policy.schema import GuardPolicy, Profile
    from loopguard.sandbox.base import EventSink, Runtime


class Cells:
    """One runtime for each profile that a rule names, started when first needed. Lives as long as its guard."""

    def __init__(self, policy: GuardPolicy, run_id: str, make: Callable[[CellSpec, str, EventSink], Runtime]) -> None:
        names = {rule.sandbox for rule in policy.tools.rules if rule.then == "run" and rule.sandbox is not None}
        self._profiles = {name: policy.sandbox.profiles[name] for name in sorted(names)}
        self._run_id = run_id
        self._make = make
        self._runtimes: dict[str, Runtime] = {}
        self._early: list[tuple[str, dict[str, Any]]] = []
        self._log: AuditLog | None = None

    @property
    def width(self) -> int:
        """How many calls can run at once."""
        return max((profile.cells for profile in self._profiles.values()), default=1)

    def start(self) -> None:
        """Start what is not running yet."""
        for name, profile in self._profiles.items():
            if name not in self._runtimes:
                runtime = self._make(cell_spec(profile), self._run_id, self._event)
                runtime.start()
                self._runtimes[name] = runtime

    def of(self, profile: str) -> Runtime:
        """The runtime of a profile."""
        return self._runtimes[profile]

    def report_to(self, log: AuditLog) -> None:
        """From now on sandbox events go to this log; those that came before it was open go there first."""
        self._log = log
        for kind, body in self._early:
            log.append(kind, body)
        self._early.clear()

    def kill_running(self) -> None:
        """End every call that runs now, in all of them."""
        for runtime in self._runtimes.values():
            runtime.kill_running()

    def close(self) -> None:
        """Take all of them down; may be called twice."""
        for runtime in self._runtimes.values():
            runtime.close()
        self._runtimes.clear()

    def _event(self, kind: str, body: dict[str, Any]) -> None:
        if self._log is None:
            self._early.append((kind, body))
        elif not self._log.degraded:
            self._log.append(kind, body, sync=False)


def cell_spec(profile: Profile) -> CellSpec:
    """What the sandbox is told of a profile."""
    return CellSpec(
        image=profile.image,
        mode=profile.mode,
        runtime=profile.runtime,
        cells=profile.cells,
        preload=tuple(profile.preload),
        limits=profile.limits.to_limits(),
        calls_per_cell=profile.calls_per_cell,
    )


def docker(spec: CellSpec, run_id: str, on_event: EventSink) -> Runtime:
    """The runtime that is used unless another one is given."""
    from loopguard.sandbox.docker import DockerRuntime

    return DockerRuntime(spec, run_id=run_id, on_event=on_event)
