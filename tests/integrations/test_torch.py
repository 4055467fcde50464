"""The torch integration: a step happens through the guard, or not at all, for every stock optimizer."""

import pytest

torch = pytest.importorskip("torch", reason="this is about torch")

from loopguard.errors import UsageError
from loopguard.integrations.torch import learner

OPTIMIZERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def make(build):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return learner(model=model, optimizer=build(model.parameters()), scheduler=None, actor=None)


def step(held, seed, *, applied=True):
    torch.manual_seed(seed)
    loss = held.model(torch.randn(8, 4)).square().mean()
    (loss if applied else loss * float("inf")).backward()
    held.readings(loss)
    if applied:
        held.apply(clip_norm=1.0)
    else:
        held.discard()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad_at", [0, 3])
def test_a_withheld_step_leaves_no_trace_in_weights_or_optimizer_state(name, bad_at):
    """Three good steps, a withheld one and three more are to the bit what six good steps are."""
    with_bad, without = make(OPTIMIZERS[name]), make(OPTIMIZERS[name])
    for seed in range(6):
        if seed == bad_at:
            step(with_bad, 99, applied=False)
        step(with_bad, seed)
        step(without, seed)
    assert with_bad.digest() == without.digest()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_learner_goes_on_to_the_bit(name):
    first = make(OPTIMIZERS[name])
    for seed in range(3):
        step(first, seed)
    saved = first.state()
    saved = {**saved, "model": {key: value.clone() for key, value in saved["model"].items()}}
    import copy

    saved["optimizers"] = copy.deepcopy(saved["optimizers"])
    for seed in range(3, 6):
        step(first, seed)
    whole = first.digest()
    first.restore(saved, actor_too=False)
    assert first.digest() != whole
    for seed in range(3, 6):
        step(first, seed)
    assert first.digest() == whole


def test_restoring_brings_every_generator_back():
    import random

    import numpy as np

    held = make(OPTIMIZERS["adamw"])
    saved = held.state()
    before = (random.random(), np.random.rand(), torch.rand(1).item())
    held.restore(saved, actor_too=False)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == before


def test_the_gradient_norm_is_the_one_before_clipping():
    held = make(OPTIMIZERS["adamw"])
    loss = (held.model(torch.ones(8, 4)) * 100).square().mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in held.model.parameters()])
    assert held.readings(loss).values["grad_norm"] == float(norm)


def test_an_optimizer_that_somebody_else_steps_raises_and_moves_nothing():
    held = make(OPTIMIZERS["sgd-momentum"])
    before = held.digest()
    held.model(torch.ones(8, 4)).mean().backward()
    with pytest.raises(UsageError, match="call cycle.update"):
        held.optimizers[0].step()
    assert held.digest() == before
