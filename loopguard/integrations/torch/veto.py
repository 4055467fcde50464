"""The veto: an optimizer's step is withheld before it is applied, and leaves no trace.

Covered: every `torch.optim.Optimizer` whose `step` moves the weights, eager or compiled, with or without a GradScaler,
whoever calls `step`.

Not covered: optimizers that update inside `backward` (they are refused), and what moves beside the weights in a
training loop: schedules, averages, buffers, gradients. `learner` looks after those.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch

from loopguard.errors import UsageError
from loopguard.integrations.torch.witness import Evidence, Number, Witness, judge

FUSED_KERNELS_WITH_A_FLAG = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
"""Their fused kernels return at once where `found_inf` is 1. Others ignore it and step: so by exact type only."""

STEPS_ELSEWHERE = {
    "Lomo": "it updates inside backward()",
    "AdaLomo": "it updates inside backward()",
    "LayerWiseDummyOptimizer": "layer-wise GaLore updates inside backward()",
    "DeepSpeedOptimizerWrapper": "DeepSpeed's engine steps by itself",
    "DeepSpeedZeroOptimizer": "DeepSpeed's engine steps by itself",
    "DeepSpeedZeroOptimizer_Stage3": "DeepSpeed's engine steps by itself",
    "LBFGS": "it steps many times in one call, through a closure",
}

_GUARDED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

_ONLY_GRADIENTS = ("torch.distributed.", "torch.nn.parallel.")
"""Modules whose hooks on parameters reduce gradients and move no weights."""


class Veto:
    """Stands between one optimizer and its weights, from its making until `remove`.

    A step is withheld where `withhold` said so for the next one, or as long as `flag` is not zero. A withheld step
    leaves parameters and optimizer state as they are, to the bit; a NaN where a yes or no is expected withholds.

    A closure that `step` is given is called first, so that it may still withhold; then the decision counts.

    On the path `flag` the fused kernel is told on the device, so that nobody has to wait for the decision. The tensors
    that tell it keep their addresses: take `flag` before a step is captured in a CUDA graph, and fill it before a
    replay. On the path `wrap` the body of `step` is not called, and a decision that is still on a device is waited for.

    >>> parameter = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.RMSprop([parameter])
    >>> veto = Veto(optimizer)
    >>> veto.path
    'wrap'
    >>> parameter.grad = torch.ones(2)
    >>> veto.withhold(True)
    >>> optimizer.step()
    >>> parameter.tolist()
    [1.0, 1.0]

    A `closed` veto refuses every step outside of `with veto.opened():`, with a UsageError before a weight moves. Raises
    UsageError for an optimizer whose steps cannot be withheld.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, closed: bool = False) -> None:
        self.optimizer = innermost(optimizer)
        refuse_steps_elsewhere(self.optimizer)
        if self.optimizer in _GUARDED:
            raise UsageError(f"this {type(optimizer).__name__} has a veto already; an optimizer has one at a time")
        _GUARDED.add(self.optimizer)
        self.path: Literal["flag", "wrap"] = "flag" if _has_flag(self.optimizer) else "wrap"
        self.evidence: Evidence | None = None
        """What the last step left behind, for `judge`."""
        self._closed = closed
        self._open = False
        self._flag: torch.Tensor | None = None
        self._once: torch.Tensor | None = None
        self._exact = torch.zeros((), dtype=torch.float32, device=self.device)
        self._scalers: torch.Tensor | None = None
        self._told = False
        self._fresh: list[tuple[torch.Tensor, dict[str, Any] | None]] = []
        self._inside = False
        self._removed = False
        self._witness = Witness(self.optimizer)
        self._handles = [self.optimizer.register_load_state_dict_post_hook(self._forget)]
        self._install()

    @property
    def device(self) -> torch.device:
        """Where the decision is needed: the device of the first parameter."""
        return self.optimizer.param_groups[0]["params"][0].device  # type: ignore[no-any-return]

    @property
    def flag(self) -> torch.Tensor:
        """One number on the device. As long as it is not zero, every step is withheld."""
        if self._flag is None:
            self._flag = torch.zeros((), dtype=torch.float32, device=self.device)
        return self._flag

    def withhold(self, decision: bool | torch.Tensor) -> None:  # noqa: FBT001 - the one thing that is said
        """Whether the next step, and that one alone, is withheld. A tensor is not read here."""
        if isinstance(decision, torch.Tensor):
            self._once = decision.detach()
        else:
            self._once = torch.ones((), dtype=torch.float32, device=self.device) if decision else None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within it, steps of a closed veto are permitted."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def trouble(self) -> str:
        """Whether the last step was not what was decided, in a sentence; else the empty string.

        It reads the device: ask one update late, when that costs nothing.
        """
        return judge(self.evidence)

    def forget(self) -> None:
        """The optimizer's state was replaced from outside: the next step starts its evidence anew."""
        self._witness.forget()
        self.evidence = None

    def remove(self) -> None:
        """Take the hooks away. Where somebody wrapped `step` after us, ours stays inside and lets all through."""
        for handle in self._handles:
            handle.remove()
        self._removed = True
        _GUARDED.discard(self.optimizer)
        if self.path == "wrap" and getattr(self.optimizer.step, "__func__", None) is self._wrapper:
            if self._had_own_step:
                self.optimizer.step = self._inner  # type: ignore[method-assign]
            else:
                del self.optimizer.step

    def _install(self) -> None:
        before = _untraced(self._before_flagged if self.path == "flag" else self._before_wrapped)
        self._handles.append(self.optimizer.register_step_pre_hook(before))
        if self.path == "flag":
            after = _untraced(self._after_flagged)
            self._handles.append(self.optimizer.register_step_post_hook(after))
        else:
            self._wrap()

    # Path `flag`: the kernel is told

    def _before_flagged(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._refuse_unless_permitted()
        args, kwargs = _closure_first(args, kwargs, at=1)
        self._witness.before()
        self._told = self._tell([self._flag, self._once])
        self._fresh = _without_state(optimizer) if self._told else []
        return args, kwargs

    def _after_flagged(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # Read on the first step alone: the Python side has made buffers that the kernel did not fill.
        if self._fresh and bool(self._exact):
            for parameter, state in self._fresh:
                _put_state_back(optimizer, parameter, state)
        self._end(ran=True)

    # Path `wrap`: the body is not called

    def _wrap(self) -> None:
        inner = self.optimizer.step
        self._inner, self._had_own_step = inner, "step" in vars(self.optimizer)
        enter, leave = _untraced(self._enter), _untraced(self._leave)

        @functools.wraps(inner)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            proceed, args, kwargs = enter(args, kwargs)
            if not proceed:
                return _loss(args, kwargs)
            try:
                return inner(*args, **kwargs)
            finally:
                leave()

        self._wrapper: Callable[..., Any] = _untraced(step, also_below=False)
        # A method, as a schedule that patches `step` later takes it apart and binds it again.
        self.optimizer.step = MethodType(self._wrapper, self.optimizer)  # type: ignore[method-assign]

    def _enter(self, args: Any, kwargs: Any) -> tuple[bool, Any, Any]:
        if self._removed:
            return True, args, kwargs
        self._refuse_unless_permitted()
        args, kwargs = _closure_first(args, kwargs, at=0)
        self._witness.before()
        if self._decided():
            self._end(ran=False)
            return False, args, kwargs
        self._told = self._tell([])
        self._inside = True
        return True, args, kwargs

    def _leave(self) -> None:
        if self._inside:
            self._inside = False
            self._end(ran=True)

    def _before_wrapped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._inside:
            return
        # Somebody kept the `step` from before it was wrapped, or calls it on the class.
        self._refuse_unless_permitted()
        if self._decided():
            raise UsageError(
                f"a withheld step of {type(optimizer).__name__} was taken around its veto: call optimizer.step() "
                "itself, and attach before anything keeps a reference to it"
            )
        # Nobody tells when such a step is over, so it leaves no evidence.
        self._once = None
        self.forget()

    def _decided(self) -> bool:
        voices = [voice for voice in (self._flag, self._once) if voice is not None]
        return bool(voices) and bool(_any_of(voices, device=self._exact.device))

    # Both paths

    def _tell(self, voices: list[torch.Tensor | None]) -> bool:
        """Put what is asked for, and what a GradScaler found, where fused kernels look; whether there was anything."""
        there = vars(self.optimizer).get("found_inf")
        # Ours is still there where a step raised halfway.
        self._scalers = there if there is not self._exact else None
        said = [voice for voice in (*voices, self._scalers) if voice is not None]
        if said:
            self._exact.copy_(_any_of(said, device=self._exact.device))
            self.optimizer.found_inf = self._exact  # type: ignore[attr-defined]
        elif there is not None:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        return bool(said)

    def _end(self, *, ran: bool) -> None:
        withheld: Number = 0.0 if ran else 1.0
        if ran and self._told:
            withheld = self._exact.item() if self._exact.device.type == "cpu" else self._exact.clone()
            if self._scalers is None:
                del self.optimizer.found_inf  # type: ignore[attr-defined]
            else:
                self.optimizer.found_inf = self._scalers  # type: ignore[attr-defined]
        self._once = None
        self.evidence = self._witness.after(withheld=withheld)

    def _refuse_unless_permitted(self) -> None:
        if self._closed and not self._open:
            raise UsageError(
                "this optimizer is attached to a LoopGuard: call cycle.update(loss=loss) instead of optimizer.step()"
            )

    def _forget(self, *_: Any) -> None:
        self.forget()


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that moves the weights, inside of the wrappers that frameworks put around it."""
    seen = {id(optimizer)}
    while isinstance(inner := vars(optimizer).get("optimizer"), torch.optim.Optimizer) and id(inner) not in seen:
        optimizer = inner
        seen.add(id(optimizer))
    return optimizer


def refuse_steps_elsewhere(optimizer: torch.optim.Optimizer) -> None:
    """Raise UsageError where weights move outside of `step`, so that withholding it would withhold nothing."""
    for cls in type(optimizer).__mro__:
        if why := STEPS_ELSEWHERE.get(cls.__name__):
            raise UsageError(
                f"{type(optimizer).__name__} cannot be guarded: {why}. Use one that moves the weights in step(), once"
            )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, "_in_backward_optimizers", None):
                raise UsageError(
                    f"{type(optimizer).__name__} cannot be guarded: a parameter of shape {tuple(parameter.shape)} is "
                    "updated inside backward(), by torch.distributed.optim. Step an optimizer after backward() instead"
                )
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                _refuse_hook(hook, optimizer, parameter)


def _refuse_hook(hook: Any, optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    while isinstance(hook, functools.partial):
        hook = hook.func
    module, name = getattr(hook, "__module__", None) or "", getattr(hook, "__qualname__", repr(hook))
    if not module.startswith(_ONLY_GRADIENTS):
        raise UsageError(
            f"{type(optimizer).__name__} cannot be guarded: {module}.{name} runs inside backward() once the gradient "
            f"of a parameter of shape {tuple(parameter.shape)} is there, and may move it. Do that work after backward()"
        )


def _has_flag(optimizer: torch.optim.Optimizer) -> bool:
    fused = [getattr(optimizer, "_step_supports_amp_scaling", False), *(g.get("fused") for g in optimizer.param_groups)]
    return type(optimizer) in FUSED_KERNELS_WITH_A_FLAG and all(fused)


def _untraced(function: Callable[..., Any], *, also_below: bool = True) -> Callable[..., Any]:
    """Keep a function out of a compiled step: traced into it, what a hook does would be lost without a word."""
    return torch.compiler.disable(function, recursive=also_below)  # type: ignore[no-untyped-call,no-any-return]


def _any_of(voices: list[torch.Tensor], *, device: torch.device) -> torch.Tensor:
    """Whether any of them is not zero, as exactly 0.0 or 1.0: a kernel takes a 2 or a NaN for leave to step."""
    said = [(voice != 0).any().to(device, non_blocking=True) for voice in voices]
    return functools.reduce(torch.logical_or, said).to(torch.float32)


def _closure_first(args: Any, kwargs: Any, *, at: int) -> tuple[Any, Any]:
    """Call a step's closure before the step, once, and leave its loss in its place.

    It makes the very gradients that are decided about, so what it says about withholding must be heard.
    """
    positional = len(args) > at
    closure = args[at] if positional else kwargs.get("closure")
    if not callable(closure) or isinstance(closure, _Loss):
        return args, kwargs
    with torch.enable_grad():
        loss = _Loss(closure())
    return ((*args[:at], loss, *args[at + 1 :]), kwargs) if positional else (args, {**kwargs, "closure": loss})


class _Loss:
    """A closure that was called already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def _loss(args: Any, kwargs: Any) -> Any:
    closure = args[0] if args else kwargs.get("closure")
    return closure.value if isinstance(closure, _Loss) else None


def _without_state(optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, dict[str, Any] | None]]:
    """The parameters that this step would make state for, with what there is of it."""
    momentum_only = isinstance(optimizer, torch.optim.SGD)
    fresh: list[tuple[torch.Tensor, dict[str, Any] | None]] = []
    for group in optimizer.param_groups:
        if momentum_only and not group["momentum"]:
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            made = state.get("momentum_buffer") is not None if momentum_only and state else bool(state)
            if not made and parameter.grad is not None:
                fresh.append((parameter, None if state is None else dict(state)))
    return fresh


def _put_state_back(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: dict[str, Any] | None) -> None:
    optimizer.state.pop(parameter, None)
    if state is not None:
        optimizer.state[parameter] = state
