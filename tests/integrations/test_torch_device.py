"""Updates that are decided on the device: the same verdicts and the same bits, and nobody waits for a reading."""

import copy
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="this is about torch")

from torch.utils._python_dispatch import TorchDispatchMode

from loopguard.errors import UsageError
from loopguard.integrations.torch import device, learner
from loopguard.integrations.torch.digest import sha256

torch.set_num_threads(1)
optim = torch.optim

OPTIMIZERS = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adam-amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "SGD": lambda p: optim.SGD(p, lr=0.1, fused=True),
    "SGD-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1, fused=True),
}
WIDE = {"loss": (0.0, 1e6), "grad_norm": (None, None), "kl": (None, 5.0)}
"""What a healthy update stays inside of."""


def make(build=OPTIMIZERS["AdamW"], *, late=True, device="cpu", schedule=True):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ).to(device)
    optimizer = build(model.parameters())
    schedules = []
    if schedule:
        warm = optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        schedules = [optim.lr_scheduler.SequentialLR(optimizer, [warm, optim.lr_scheduler.StepLR(optimizer, 2)], [3])]
    return learner(model=model, optimizer=optimizer, scheduler=schedules, actor=None, late=late)


def backward(held, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    place = next(held.model.parameters()).device
    loss = held.model(torch.randn(8, 4, generator=generator).to(place)).square().mean() * factor
    loss.backward()
    return loss


def stage(held, seed, *, factor=1.0, limits=WIDE, latch=True, extra=None):
    loss = backward(held, seed, factor)
    extra = {"kl": loss.detach() * 0, "reward": 1.5} if extra is None else extra
    held.stage(loss, extra, limits=limits, update=seed, latch=latch, clip_norm=0.5)


def now(held, seed):
    loss = backward(held, seed)
    taken = held.readings(loss, {"kl": loss.detach() * 0, "reward": 1.5})
    held.apply(clip_norm=0.5)
    return taken


def whole(held):
    """Digest of everything that a veto must leave alone, schedules included."""
    return held.digest(), sha256([one.state_dict() for one in held.schedulers])


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestTheLatePath:
    def test_gives_the_bits_and_the_values_of_the_other(self, name):
        late, reference = make(OPTIMIZERS[name]), make(OPTIMIZERS[name], late=False)
        assert late.late
        assert not reference.late
        for seed in range(6):
            stage(late, seed)
            taken = now(reference, seed)
            staged = late.collect()
            assert (staged.update, staged.withheld) == (seed, False)
            assert staged.values == taken.values
            assert list(staged.values) == list(taken.values)
            assert late.trouble() == ""
        assert whole(late) == whole(reference)

    @pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 1e9])
    def test_withholds_the_very_update_that_is_out_of_its_limits(self, name, bad, first):
        """And leaves weights, optimizer state, statistics and, once collected, the schedule as they were."""
        held, reference = make(OPTIMIZERS[name]), make(OPTIMIZERS[name])
        for seed in range(0 if first else 3):
            for one in (held, reference):
                stage(one, seed)
                one.collect()
        stage(held, 50, factor=bad)
        staged = held.collect()
        assert staged.withheld
        assert whole(held) == whole(reference)
        assert all(parameter.grad is None for parameter in held.model.parameters())
        assert held.trouble() == ""

    def test_withholds_what_comes_after_until_it_is_released(self, name):
        held, reference = make(OPTIMIZERS[name]), make(OPTIMIZERS[name])
        stage(held, 50, factor=float("nan"))
        for seed in (0, 1):
            assert held.collect().withheld
            stage(held, seed)
        assert held.collect().withheld
        held.release()
        for seed in (0, 1):
            for one in (held, reference):
                stage(one, seed)
                assert not one.collect().withheld
        assert whole(held) == whole(reference)

    def test_drops_one_batch_alone_without_a_latch(self, name):
        held, reference = make(OPTIMIZERS[name]), make(OPTIMIZERS[name])
        for seed in range(4):
            stage(held, 50, factor=float("nan"), latch=False)
            assert held.collect().withheld
            for one in (held, reference):
                stage(one, seed, latch=False)
                assert not one.collect().withheld
        assert whole(held) == whole(reference)


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "extra", "withheld"),
        [
            ({}, {}, False),
            ({"kl": (None, None)}, {"kl": 3.0}, False),
            ({"kl": (None, None)}, {"kl": float("nan")}, True),
            ({"kl": (None, None)}, {"kl": float("inf")}, True),
            ({"kl": (None, None)}, {"kl": torch.tensor(float("-inf"))}, True),
            ({"kl": (3.0, None)}, {"kl": 3.0}, False),
            ({"kl": (3.0, None)}, {"kl": torch.tensor(2.9)}, True),
            ({"kl": (None, 3.0)}, {"kl": torch.tensor([3.0])}, False),
            ({"kl": (None, 3.0)}, {"kl": 3.0000001}, True),
            ({}, {"kl": float("nan")}, False),
            ({"kl": (None, 3.0)}, {}, True),
            ({"kl": (None, 3.0)}, {"kl": 2}, False),
        ],
    )
    def test_are_kept_on_the_device_as_a_monitor_would_keep_them(self, limits, extra, withheld):
        """A metric without limits is nobody's; one with limits that is missing is everybody's."""
        held = make()
        stage(held, 0, limits=limits, extra=extra)
        staged = held.collect()
        assert staged.withheld is withheld
        assert staged.values.keys() == {"loss", "grad_norm", *extra}

    def test_may_change_with_every_update_and_so_may_the_metrics(self):
        held = make()
        for seed, (limits, extra, withheld) in enumerate(
            [
                ({"a": (0, 1)}, {"a": 0.5}, False),
                ({"a": (0, 1), "b": (0, 1)}, {"b": torch.tensor(0.5), "a": 0.5}, False),
                ({"a": (0, 0.1)}, {"a": 0.5}, True),
                ({"loss": (None, 1e6)}, {}, False),
            ]
        ):
            stage(held, seed, limits=limits, extra=extra, latch=False)
            assert held.collect().withheld is withheld


class TestCollecting:
    def test_tells_each_update_once(self):
        held = make()
        assert held.collect() is None
        stage(held, 0)
        assert held.collect().update == 0
        assert held.collect() is None

    def test_comes_before_the_next_is_staged(self):
        held = make()
        stage(held, 0)
        with pytest.raises(UsageError, match=r"update 0 is staged: collect\(\) it"):
            stage(held, 1)

    def test_is_nothing_where_nothing_is_late(self):
        held = make(late=False)
        assert held.collect() is None
        held.release()
        with pytest.raises(UsageError, match="decides at once"):
            stage(held, 0)

    def test_takes_back_a_tick_of_every_option_that_a_schedule_sets(self):
        """A one-cycle schedule moves the momentum, too."""
        model = torch.nn.Linear(4, 1)
        optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9, fused=True)
        schedule = optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9)
        held = learner(model=model, optimizer=optimizer, scheduler=schedule, actor=None, late=True)
        before = copy.deepcopy((schedule.state_dict(), optimizer.param_groups[0]["momentum"]))
        address = optimizer.param_groups[0]["lr"].data_ptr()
        lr = optimizer.param_groups[0]["lr"].item()
        stage(held, 0, factor=float("nan"), extra={}, limits={"loss": (None, None)})
        held.collect()
        assert (schedule.state_dict(), optimizer.param_groups[0]["momentum"]) == before
        assert optimizer.param_groups[0]["lr"].item() == lr
        assert optimizer.param_groups[0]["lr"].data_ptr() == address

    def test_finds_out_a_kernel_that_did_not_listen(self):
        held = make()
        stage(held, 0)
        held.collect()
        held.optimizers[0].register_step_pre_hook(lambda one, *_: setattr(one, "found_inf", None))
        stage(held, 1, factor=float("nan"))
        held.collect()
        assert held.trouble() == "a step was withheld and the optimizer took it all the same"

    def test_finds_out_a_flag_that_somebody_else_left(self):
        held = make()
        stage(held, 0)
        held.collect()
        held.optimizers[0].found_inf = torch.ones(())
        stage(held, 1)
        assert not held.collect().withheld
        assert held.trouble() == "a step was allowed and the optimizer did not take it"

    def test_finds_out_a_step_that_was_swallowed(self):
        held = make()
        held.optimizers[0].register_step_pre_hook(lambda one, *_: setattr(one, "found_inf", torch.ones(())))
        stage(held, 1)
        held.collect()
        assert held.trouble() == "a step was allowed and the optimizer did not take it"


def test_a_restore_forgets_what_is_staged_and_keeps_the_latch_until_it_is_released():
    held = make()
    stage(held, 0)
    held.collect()
    saved, digest = copy.deepcopy(held.state()), whole(held)
    stage(held, 1, factor=float("nan"))
    held.restore(saved, actor_too=False)
    assert held.collect() is None
    assert whole(held) == digest
    stage(held, 1)
    assert held.collect().withheld
    held.release()
    stage(held, 1)
    assert not held.collect().withheld


def test_a_buffer_that_changes_its_shape_cannot_be_put_back_unseen():
    class Growing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen = torch.cat([self.seen, self.seen])
            return x * self.weight

    model = Growing()
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
    held = learner(model=model, optimizer=optimizer, scheduler=None, actor=None, late=True)
    with pytest.raises(UsageError, match="late=False"):
        stage(held, 0)


class Elsewhere(TorchDispatchMode):
    """Meta tensors in the place of a device's: reading one on the host raises. Fused kernels do nothing there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return None if "_fused_" in str(func) else func(*args, **(kwargs or {}))


class Silent:
    """In the place of an event of a device."""

    def record(self): ...

    def synchronize(self): ...


@pytest.fixture
def elsewhere(monkeypatch):
    """Everything but the pinned memory, which only a device has."""
    mailbox = device._Mailbox
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(Event=Silent))
    monkeypatch.setattr(
        mailbox, "send", lambda self, numbers: torch.empty(len(numbers), dtype=self._dtype, device=self._device)
    )
    monkeypatch.setattr(mailbox, "fetch", lambda self, numbers: numbers)
    for module in ("adam", "sgd", "adagrad"):
        monkeypatch.setattr(
            sys.modules[f"torch.optim.{module}"], "_device_dtype_check_for_fused", lambda *_, **__: None
        )
    with Elsewhere():
        yield torch.device("meta")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_staging_reads_nothing_from_a_device(name, elsewhere):
    """No `.item()`, `bool()` or `.tolist()` after the first step, where fresh state may have to be taken back."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8)).to(elsewhere)
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = optim.lr_scheduler.StepLR(optimizer, 1)
    held = learner(model=model, optimizer=optimizer, scheduler=schedule, actor=None)
    assert held.late
    loss = torch.empty((), device=elsewhere)

    def stage_one(update):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        extra = {"kl": loss, "reward": 1.5, "far": torch.ones(())}
        held.stage(loss, extra, limits=WIDE, update=update, latch=True, clip_norm=0.5)
        held._late_path.forget()

    if name in {"AdamW", "Adam-amsgrad", "SGD-momentum"}:
        with pytest.raises(RuntimeError, match="meta"):
            stage_one(0)
        held._late_path.forget()
    for update in range(1, 4):
        stage_one(update)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with pytest.raises(RuntimeError, match="meta"):
        held.readings(loss)


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device: staged updates were run on the CPU alone"
)


@needs_cuda
def test_staging_synchronises_nothing_on_a_gpu():
    """After the first step torch itself would raise at any call that waits for the device."""
    held, reference = make(device="cuda"), make(device="cuda", late=False)
    assert make(device="cuda", late=None).late
    for seed in range(6):
        loss = backward(held, seed)
        extra = {"kl": loss.detach() * 0, "reward": 1.5}
        if seed > 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            held.stage(loss, extra, limits=WIDE, update=seed, latch=True, clip_norm=0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        taken = now(reference, seed)
        assert held.collect().values == taken.values
        assert held.trouble() == ""
    assert whole(held) == whole(reference)
    stage(held, 50, factor=float("nan"))
    assert held.collect().withheld
    assert whole(held) == whole(reference)


@needs_cuda
def test_a_captured_forward_and_backward_goes_on_after_a_veto_and_a_restore():
    def build(parameters):
        return optim.AdamW(parameters, lr=0.01, capturable=True, fused=True)

    held, reference = make(build, device="cuda", schedule=False), make(build, device="cuda", schedule=False)
    saved = copy.deepcopy(held.state())
    x = torch.zeros(8, 4, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            held.model(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    held.optimizers[0].zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = held.model(x).square().mean()
        loss.backward()
    held.restore(saved, actor_too=False)
    for seed in (0, 1, 50, 2):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        x.copy_(batch * (float("nan") if seed == 50 else 1.0))
        graph.replay()
        held.stage(loss, {}, limits={"loss": (None, None)}, update=seed, latch=False, clip_norm=0.5)
        assert held.collect().withheld is (seed == 50)
        if seed != 50:
            other = reference.model(batch.cuda()).square().mean()
            other.backward()
            reference.stage(other, {}, limits={}, update=seed, latch=False, clip_norm=0.5)
            reference.collect()
    assert held.digest() == reference.digest()
