"""Updates that are decided on the device, and read by the host one update late.

The host queues work for an accelerator and runs ahead of it; reading a loss there makes it wait for everything queued.
So nothing is read: the values stay on the device and are held against limits that the host worked out before, the
fused kernels are told through their flag, and what happened is copied to pinned memory behind it all. By the time that
the next update is at hand the copy has long arrived.

The same code runs on a CPU, where nothing is late. It has been run there alone; on CUDA nobody has seen it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loopguard.controller.learner import Staged
from loopguard.errors import UsageError
from loopguard.integrations.torch.witness import Evidence, judge

if TYPE_CHECKING:
    from loopguard.integrations.torch.buffers import Buffers
    from loopguard.integrations.torch.steps import Steps

Limits = Mapping[str, tuple[float | None, float | None]]
"""For each metric the lowest and the highest value that its update may have; None where that side is open."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    update: int
    named: list[str]
    order: list[str]
    vector: torch.Tensor
    evidence: list[Evidence | None]
    undo_ticks: list[Callable[[], None]]


class LatePath:
    """Stages the updates of one learner, one at a time, and tells afterwards what became of each.

    Limits, latch and flags live in tensors that are made once and keep their addresses. Forward and backward may be
    captured in a CUDA graph where the optimizers are made with `capturable=True, fused=True`: then their gradients are
    zeroed in place and a restore fills their state in place, so that a graph goes on writing to what is read here.
    """

    def __init__(self, steps: Steps, schedulers: Sequence[Any], buffers: Buffers) -> None:
        self._steps = steps
        self._schedulers = tuple(schedulers)
        self._buffers = buffers
        self._device = steps.vetoes[0].device
        # The host's floats are compared as they are; only Apple's devices have no room for them.
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._latched = torch.zeros((), dtype=torch.bool, device=self._device)
        self._to_device = _Mailbox(self._device, self._dtype)
        self._to_host = _Mailbox(self._device, self._dtype)
        self._arrived = None if self._device.type == "cpu" else torch.get_device_module(self._device).Event()
        self._in_flight: _InFlight | None = None
        self.anywhere: Callable[[torch.Tensor], torch.Tensor] = lambda withheld: withheld
        """With several ranks, whether any of them withholds; on the device."""
        self.trouble = ""
        """What shows that a decision was not honoured, in a sentence; else empty."""

    @torch.no_grad()
    def stage(
        self,
        loss: Any,
        extra: Mapping[str, Any],
        *,
        limits: Limits,
        update: int,
        latch: bool,
        clip_norm: float | None,
    ) -> None:
        """Decide about one update on the device, and take it under that decision.

        It is withheld where a metric that has limits is not there, not finite or outside of them, and, once one of
        these was staged with `latch`, ever after. Withheld, it leaves weights, optimizer state and buffers as they are
        to the bit; `collect` puts the schedules back. Metrics without limits are reported and not judged.

        The device is not waited for, but at the first step of a parameter that has no optimizer state yet. Raises
        UsageError where the update before has not been collected, or where there is no gradient.
        """
        if self._in_flight is not None:
            raise UsageError(f"update {self._in_flight.update} is staged: collect() it before the next one")
        norm = self._steps.norm()
        values = {"loss": loss, "grad_norm": norm, **extra}
        named, numbers, bad = self._judge(values, limits)
        withheld = self.anywhere(bad | self._latched)
        if latch:
            self._latched.copy_(withheld)
        for veto in self._steps.vetoes:
            veto.withhold(withheld)
        if clip_norm is not None:
            self._steps.clip(norm, to=clip_norm)
        self._steps.take()
        undo_ticks = [_tick(scheduler) for scheduler in self._schedulers]
        self._buffers.put_back_where(withheld)
        self._steps.zero()
        evidence = [veto.evidence for veto in self._steps.vetoes]
        pack = [*numbers, withheld, *_on_device(evidence)]
        vector = self._to_host.fetch(torch.stack([number.to(self._dtype) for number in pack]))
        if self._arrived is not None:
            self._arrived.record()
        self._in_flight = _InFlight(update, named, list(values), vector, evidence, undo_ticks)

    def collect(self) -> Staged | None:
        """Wait until the update that was staged last has been decided, and tell; None where there is none.

        Call it when the next update is at hand, before it is staged: by then only its forward and backward are queued
        behind. Where the update was withheld, the schedules go back to before it.
        """
        staged, self._in_flight = self._in_flight, None
        if staged is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers = iter(staged.vector.tolist())
        values = {name: next(numbers) for name in staged.named}
        withheld = bool(next(numbers))
        if withheld:
            for undo in reversed(staged.undo_ticks):
                undo()
        found = [judge(_back_from_device(one, numbers, withheld=withheld)) for one in staged.evidence]
        self.trouble = self.trouble or next(filter(None, found), "")
        return Staged(update=staged.update, values={name: values[name] for name in staged.order}, withheld=withheld)

    def release(self) -> None:
        """Let updates through again after one of them latched."""
        self._latched.zero_()

    def forget(self) -> None:
        """Drop the update that is staged: what it did has been undone otherwise."""
        if self._in_flight is not None and self._arrived is not None:
            # Its copies still read from memory that the next update fills.
            self._arrived.synchronize()
        self._in_flight, self.trouble = None, ""

    def _judge(self, values: Mapping[str, Any], limits: Limits) -> tuple[list[str], list[torch.Tensor], torch.Tensor]:
        """The metrics in the order of their numbers, the numbers on the device, and whether one of them is bad."""
        there = {name: self._there(value) for name, value in values.items() if _is_far(value, self._device)}
        here = {name: float(value) for name, value in values.items() if name not in there}
        named = [*there, *here]
        ranges = [_range(limits.get(name), self._dtype) for name in named]
        missing = any(name not in values for name in limits)
        letter = [low for low, _ in ranges] + [high for _, high in ranges] + [*here.values(), float(missing)]
        low, high, rest = torch.split(self._to_device.send(letter), [len(named), len(named), len(here) + 1])
        numbers = torch.cat([torch.stack(list(there.values())), rest[:-1]]) if there else rest[:-1]
        # Written so that a NaN is out of range. An open metric has NaN for its range.
        bad = ~(low.isnan() | ((numbers >= low) & (numbers <= high)))
        return named, list(numbers.unbind()), bad.any() | (rest[-1] != 0)

    def _there(self, value: torch.Tensor) -> torch.Tensor:
        return value.detach().reshape(()).to(self._device, self._dtype, non_blocking=True)


class _Mailbox:
    """Carries numbers between host and device through pinned memory that is made once for each length."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def send(self, numbers: list[float]) -> torch.Tensor:
        """These numbers, on the device. What was sent before with the same length must have been used by now."""
        letter = torch.tensor(numbers, dtype=self._dtype)
        if self._device.type == "cpu":
            return letter
        pinned, there = self._pair(len(numbers))
        pinned.copy_(letter)
        return there.copy_(pinned, non_blocking=True)

    def fetch(self, numbers: torch.Tensor) -> torch.Tensor:
        """Memory of the host in which these numbers will be, once the device has come so far."""
        if self._device.type == "cpu":
            return numbers
        pinned, _ = self._pair(numbers.numel())
        return pinned.copy_(numbers, non_blocking=True)

    def _pair(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        if length not in self._pairs:
            pinned = torch.empty(length, dtype=self._dtype, pin_memory=True)
            self._pairs[length] = pinned, torch.empty(length, dtype=self._dtype, device=self._device)
        return self._pairs[length]


def _is_far(value: Any, device: torch.device) -> bool:
    """Whether a number is where reading it would wait; what is in the host's memory is read at once."""
    return isinstance(value, torch.Tensor) and (value.device.type != "cpu" or device.type == "cpu")


def _range(limits: tuple[float | None, float | None] | None, dtype: torch.dtype) -> tuple[float, float]:
    """An open side ends at the largest number there is, so that infinity is outside."""
    if limits is None:
        return math.nan, math.nan
    low, high = limits
    largest = torch.finfo(dtype).max
    return -largest if low is None else low, largest if high is None else high


def _tick(scheduler: Any) -> Callable[[], None]:
    """Tick a schedule; calling the result takes the tick back, from the optimizer's options too."""
    state = copy.deepcopy(scheduler.state_dict())
    groups = getattr(scheduler.optimizer, "param_groups", []) if hasattr(scheduler, "optimizer") else []
    options = [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in groups]
    scheduler.step()

    def undo() -> None:
        scheduler.load_state_dict(state)
        for group, before in zip(groups, options, strict=True):
            for key, value in before.items():
                if isinstance(value, torch.Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value

    return undo


def _on_device(evidence: Sequence[Evidence | None]) -> list[torch.Tensor]:
    return [number for one in evidence if one for number in one if isinstance(number, torch.Tensor)]


def _back_from_device(evidence: Evidence | None, numbers: Iterator[float], *, withheld: bool) -> Evidence | None:
    if evidence is None:
        return None
    here = Evidence(*(next(numbers) if isinstance(number, torch.Tensor) else number for number in evidence))
    # What was decided counts, and not what an optimizer was told: somebody may have told it something else.
    return here._replace(withheld=float(withheld))
