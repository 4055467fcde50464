"""What shows, one update later, whether an optimizer did what was decided.

A veto rests on code that is not ours: on a fused kernel that returns early, on a wrapper that nobody takes away. So
each step leaves evidence. Collecting it costs no synchronisation; it is read when the device is waited for anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import torch

Number: TypeAlias = float | torch.Tensor
"""A number that is here, or one that is still on its device."""

_SAMPLE = 8
"""So many weights of one parameter are compared where there is no counter."""


class Evidence(NamedTuple):
    """What one step left behind. NaN stands for 'cannot tell'."""

    withheld: Number
    """Not 0: the step was to be withheld."""
    between: Number
    """By how much the step counter moved since the step before this one."""
    counted: Number
    """By how much the step counter moved in this step."""
    moved: Number
    """Not 0: weights changed. Looked at where there is no counter."""
    ran: Number
    """0: nothing wrote to the weights. Looked at where there is no counter."""


class Witness:
    """Watches one parameter of one optimizer, from one of its steps to the next.

    The counter in the optimizer's state is the better witness: it moves by one for each step that is applied. Where
    there is none, a sample of the weights must be the same after a veto, and something must have written to them in a
    step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        torchs = f"{type(optimizer).__module__}.".startswith("torch.optim.")
        # Fused kernels, and those of other packages, write without torch counting it.
        self._writes_are_counted = torchs and not getattr(optimizer, "_step_supports_amp_scaling", False)
        # Some of other packages have a `step` that stands still: theirs is believed once it has moved by one.
        self._counts = torchs
        self._parameter: torch.Tensor | None = None
        self._count: Number = math.nan
        self._between: Number = math.nan
        self._sample: torch.Tensor | None = None
        self._version = 0

    def before(self) -> None:
        """A step begins, or would begin."""
        parameter = self._choose()
        known = parameter is not None and parameter is self._parameter
        self._parameter, last = parameter, self._count
        if parameter is None:
            return
        count = self._counter(parameter)
        self._between = _minus(count, last) if known and count is not None else math.nan
        self._sample = None
        if count is None:
            self._sample, self._version, count = _sample(parameter), parameter._version, 0.0
        self._count = count

    def after(self, *, withheld: Number) -> Evidence | None:
        """The step is over. None where no parameter had a gradient, so that there was nothing to see."""
        parameter = self._parameter
        if parameter is None:
            return None
        count = self._counter(parameter)
        if count is not None:
            counted = _minus(count, self._count)
            believed = self._counts
            self._counts = believed or (isinstance(counted, float) and counted == 1)
            evidence = Evidence(withheld, self._between, counted, math.nan, math.nan) if believed else None
        elif self._sample is not None:
            moved = (_sample(parameter) != self._sample) & ~self._sample.isnan()
            ran = float(parameter._version != self._version) if self._writes_are_counted else math.nan
            evidence = Evidence(withheld, self._between, math.nan, moved.any(), ran)
        else:
            evidence = None
        self._count = math.nan if count is None else count
        return evidence

    def forget(self) -> None:
        """The optimizer's state was replaced: what its counter stood at says nothing any more."""
        self._parameter = None

    def _choose(self) -> torch.Tensor | None:
        if self._parameter is not None and self._parameter.grad is not None:
            return self._parameter
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    return parameter  # type: ignore[no-any-return]
        return None

    def _counter(self, parameter: torch.Tensor) -> Number | None:
        state = self._optimizer.state.get(parameter)
        value = state.get("step") if isinstance(state, dict) else None
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            # A tensor in host memory is read for nothing; one on a device is copied there, and waits for its reading.
            return value.item() if value.device.type == "cpu" else value.detach().clone()
        return float(value) if isinstance(value, int | float) else None


def judge(evidence: Evidence | None) -> str:
    """What is wrong with it, in a sentence; the empty string where nothing is. Reads what is still on the device."""
    if evidence is None:
        return ""
    withheld, between, counted, moved, ran = read(evidence)
    if between > 0:
        return f"between two updates the optimizer took {between:g} steps that nobody asked the gate about"
    if withheld:
        applied = counted > 0 or moved > 0
        return "a step was withheld and the optimizer took it all the same" if applied else ""
    if counted == 0 or (ran == 0 and not moved):
        return "a step was allowed and the optimizer did not take it"
    return f"one step was allowed and the optimizer counted {counted:g}" if counted > 1 else ""


def read(numbers: Iterable[Number]) -> list[float]:
    """These as floats. Those that are on a device are fetched together, so that it is waited for once."""
    everything = list(numbers)
    far = [n.detach().reshape(()) for n in everything if isinstance(n, torch.Tensor) and n.device.type != "cpu"]
    fetched = iter(torch.stack([n.to(far[0].device, _wide(far[0])) for n in far]).tolist() if far else ())
    return [_here(number, fetched) for number in everything]


def _here(number: Number, fetched: Iterator[float]) -> float:
    if not isinstance(number, torch.Tensor):
        return float(number)
    return float(number.item()) if number.device.type == "cpu" else next(fetched)


def _wide(number: torch.Tensor) -> torch.dtype:
    """Wide enough for every float; Apple's devices have nothing wider than single precision."""
    return torch.float32 if number.device.type == "mps" else torch.float64


def _minus(later: Number, earlier: Number) -> Number:
    return later - earlier


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    local = getattr(parameter, "_local_tensor", parameter).detach()
    return local.reshape(-1)[:_SAMPLE].clone()
