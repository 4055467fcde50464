"""What an update is besides its step: scaler, schedules, averages, buffers, gradients, and a state to go back to."""

import copy
import math

import pytest

torch = pytest.importorskip("torch", reason="this is about torch")

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from loopguard.errors import UsageError
from loopguard.integrations.torch import learner
from loopguard.integrations.torch.digest import sha256

torch.set_num_threads(1)
optim = torch.optim


def net(*, norm=False):
    torch.manual_seed(0)
    middle = [torch.nn.BatchNorm1d(8)] if norm else []
    return torch.nn.Sequential(torch.nn.Linear(4, 8), *middle, torch.nn.Tanh(), torch.nn.Linear(8, 1))


def hold(model, optimizer=None, **kw):
    optimizer = optimizer or optim.AdamW(model.parameters(), lr=0.01)
    return learner(model=model, optimizer=optimizer, scheduler=kw.pop("scheduler", None), actor=None, **kw)


def forward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(8, 4, generator=generator)).square().mean()


def update(held, seed, *, clip_norm=1.0):
    loss = forward(held.model, seed)
    loss.backward()
    taken = held.readings(loss)
    held.apply(clip_norm=clip_norm)
    return taken


def withhold(held, seed=99):
    loss = forward(held.model, seed) * float("nan")
    loss.backward()
    held.readings(loss)
    held.discard()


def equal(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


class TestAHealthyRun:
    @pytest.mark.parametrize(("fused", "late"), [(False, False), (True, False), (True, True)])
    def test_is_to_the_bit_what_it_is_without_a_guard(self, fused, late):
        """Also where groups list the parameters in another order than the model, which the norm must not follow."""
        bare, guarded = net(norm=True), net(norm=True)

        def tools(model):
            flat = [p for p in model.parameters() if p.ndim < 2]
            deep = [p for p in model.parameters() if p.ndim == 2]
            groups = [{"params": flat, "weight_decay": 0.0}, {"params": deep}]
            optimizer = optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=fused)
            return optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

        optimizer, scheduler = tools(bare)
        own, own_scheduler = tools(guarded)
        held = hold(guarded, own, scheduler=own_scheduler, late=late)
        for seed in range(12):
            forward(bare, seed).backward()
            torch.nn.utils.clip_grad_norm_(bare.parameters(), 0.05)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            loss = forward(guarded, seed)
            loss.backward()
            if late:
                held.collect()
                held.stage(loss, {}, limits={"loss": (None, 1e6)}, update=seed, latch=True, clip_norm=0.05)
            else:
                held.readings(loss)
                held.apply(clip_norm=0.05)
            assert held.trouble() == ""
        assert equal(bare, guarded)
        assert own.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        assert own_scheduler.state_dict() == scheduler.state_dict()

    def test_in_half_precision_with_overflows_at_the_start_is_the_same_too(self):
        """A scaler starts far too high on purpose. Its overflows are told, and have no norm that could trip."""

        def tools(model):
            return optim.AdamW(model.parameters(), lr=0.01, fused=True), torch.amp.GradScaler("cpu", init_scale=2.0**30)

        bare, guarded = net(), net()
        (optimizer, scaler), (own, own_scaler) = tools(bare), tools(guarded)
        held, overflows = hold(guarded, own, scaler=own_scaler), []
        for seed in range(24):
            for model in (bare, guarded):
                with torch.autocast("cpu", torch.float16):
                    loss = forward(model, seed)
                (scaler if model is bare else own_scaler).scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(bare.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            taken = held.readings(loss)
            assert taken.overflowed is ("grad_norm" not in taken.values)
            assert all(math.isfinite(value) for value in taken.values.values())
            held.apply(clip_norm=0.05)
            assert held.trouble() == ""
            overflows.append(taken.overflowed)
        assert overflows[0] is True
        assert overflows[-1] is False
        assert equal(bare, guarded)
        assert own_scaler.state_dict() == scaler.state_dict()


class TestReadings:
    def test_name_the_loss_the_norm_and_whatever_else_was_reported(self):
        held = hold(net())
        loss = forward(held.model, 0)
        loss.backward()
        taken = held.readings(loss, {"kl": torch.tensor(0.25), "reward": 3})
        assert list(taken.values) == ["loss", "grad_norm", "kl", "reward"]
        assert taken.values["kl"] == 0.25
        assert taken.values["reward"] == 3.0
        assert not taken.overflowed

    def test_without_a_gradient_are_an_error(self):
        with pytest.raises(UsageError, match=r"call loss.backward\(\)"):
            hold(net()).readings(torch.ones(()))

    def test_of_sparse_gradients_are_an_error_that_names_the_way_out(self):
        model = torch.nn.Embedding(10, 4, sparse=True)
        held = hold(model, optim.SGD(model.parameters(), lr=0.1))
        loss = model(torch.tensor([1, 2])).sum()
        loss.backward()
        with pytest.raises(UsageError, match="sparse=False"):
            held.readings(loss)

    def test_of_complex_gradients_have_a_real_norm(self):
        parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
        model = torch.nn.ParameterList([parameter])
        held = hold(model, optim.SGD([parameter], lr=0.1))
        loss = (parameter * (3 + 4j)).sum().abs()
        loss.backward()
        assert held.readings(loss).values["grad_norm"] == pytest.approx(3**0.5 * 5)


class TestADiscard:
    def test_puts_back_what_the_forward_pass_wrote_into_the_model(self):
        held, reference = hold(net(norm=True)), hold(net(norm=True))
        for seed in range(3):
            withhold(held)
            update(held, seed)
            update(reference, seed)
        assert held.digest() == reference.digest()
        withhold(held)
        assert held.digest() == reference.digest()

    def test_puts_back_buffers_of_every_kind(self):
        class Router(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(4))
                self.register_buffer("bias", torch.zeros(4))
                self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
                self.register_buffer("hidden", torch.zeros(2), persistent=False)
                self.register_buffer("large", torch.zeros(70_000))
                self.register_buffer("swapped", torch.zeros(3))
                self.register_buffer("nothing", None)

            def forward(self, x):
                self.bias.data.add_(0.1)  # a write that torch does not count
                self.seen += 1
                self.hidden.mul_(2).add_(1)
                self.large[7] += 1
                self.swapped = self.swapped + 1
                self.nothing = torch.ones(1)
                return x * self.weight

        model = Router()
        held = hold(model, optim.SGD(model.parameters(), lr=0.1))
        before = {name: value.clone() for name, value in model.named_buffers()}
        withhold(held)
        assert model.named_buffers().__next__()[0] == "bias"
        after = dict(model.named_buffers())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        update(held, 0)
        applied = {name: value.clone() for name, value in model.named_buffers()}
        assert int(applied["seen"]) == 1
        withhold(held)
        assert all(torch.equal(value, applied[name]) for name, value in model.named_buffers())

    def test_leaves_the_schedule_the_averages_and_the_scale_alone_and_no_gradients(self):
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        held = hold(model, optimizer, scheduler=scheduler, averages=average, scaler=scaler)

        def one(seed, *, apply):
            loss = forward(model, seed)
            scaler.scale(loss).backward()
            held.readings(loss)
            held.apply(clip_norm=1.0) if apply else held.discard()

        one(0, apply=True)
        before = (copy.deepcopy(scheduler.state_dict()), copy.deepcopy(average.state_dict()), scaler.state_dict())
        for seed in (1, 2, 3):
            one(seed, apply=False)
        assert scheduler.state_dict() == before[0]
        assert all(map(torch.equal, average.state_dict().values(), before[1].values()))
        assert scaler.state_dict() == before[2]
        assert all(parameter.grad is None for parameter in model.parameters())
        one(1, apply=True)
        assert scheduler.last_epoch == 2
        assert int(average.n_averaged) == 2
        assert scaler.state_dict()["_growth_tracker"] == 2

    def test_under_a_scaler_never_was(self):
        """The batch after it is unscaled again, and counted as if it were the first."""

        def run(*, withheld):
            model = net()
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
            held = hold(model, scaler=scaler)
            norms = []
            for seed in range(4):
                for apply in (False, True) if withheld else (True,):
                    loss = forward(model, seed if apply else 99)
                    scaler.scale(loss).backward()
                    taken = held.readings(loss)
                    if apply:
                        norms.append(taken.values["grad_norm"])
                        held.apply(clip_norm=0.05)
                    else:
                        held.discard()
            return held.digest(), norms, scaler.state_dict()

        assert run(withheld=True) == run(withheld=False)

    def test_of_gradients_that_nobody_read_needs_nothing_of_the_scaler(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        held = hold(net(), scaler=scaler)
        held.discard()
        assert scaler.get_scale() == 8.0


def test_on_an_overflow_neither_schedule_nor_average_ticks():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    average = AveragedModel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    held = hold(model, optimizer, scheduler=scheduler, averages=[average], scaler=scaler)
    loss = forward(model, 0)
    scaler.scale(loss * float("inf")).backward()
    before = held.digest()
    assert held.readings(loss).overflowed
    held.apply(clip_norm=1.0)
    assert held.digest() == before
    assert (scheduler.last_epoch, int(average.n_averaged), scaler.get_scale()) == (0, 0, 4.0)


def test_a_scaler_that_was_unscaled_by_the_loop_already_is_taken_as_it_is():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    held = hold(model, optimizer, scaler=scaler)
    loss = forward(model, 0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert held.readings(loss).values["grad_norm"] == norm
    held.apply(clip_norm=None)


def test_a_scaler_that_is_switched_off_changes_nothing():
    held, reference = hold(net(), scaler=torch.amp.GradScaler("cpu", enabled=False)), hold(net())
    for seed in range(3):
        update(held, seed)
        update(reference, seed)
    withhold(held)
    held.restore(copy.deepcopy(held.state()), actor_too=False)
    assert held.digest() == reference.digest()


def test_torch_still_tells_what_a_scaler_found():
    """It is private, and whether an overflow is one is decided by it: where torch changes it, this says so first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([parameter], lr=0.1)
    for factor, found in ((1.0, 0.0), (float("inf"), 1.0)):
        assert scaler._found_inf_per_device(optimizer) == {}
        scaler.scale((parameter * factor).sum()).backward()
        scaler.unscale_(optimizer)
        assert [float(one) for one in scaler._found_inf_per_device(optimizer).values()] == [found]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


class TestSeveralOptimizers:
    def test_step_together_and_not_at_all_together(self):
        model, reference = net(), net()

        def pair(of):
            return [optim.AdamW(of[0].parameters(), fused=True), optim.SGD(of[2].parameters(), lr=0.1, momentum=0.9)]

        held, other = hold(model, pair(model)), hold(reference, pair(reference))
        for seed in range(3):
            withhold(held)
            update(held, seed)
            update(other, seed)
        assert held.digest() == other.digest()
        assert held.trouble() == ""

    def test_are_clipped_by_one_norm(self):
        model = net()
        held = hold(model, [optim.SGD(model[0].parameters(), lr=1.0), optim.SGD(model[2].parameters(), lr=1.0)])
        loss = forward(model, 0)
        loss.backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        assert held.readings(loss).values["grad_norm"] == norm
        before = [p.detach().clone() for p in model.parameters()]
        held.apply(clip_norm=norm / 4)
        moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(norm / 4, rel=1e-4)


def everything(model, *, fused=True):
    optimizer = optim.AdamW(model.parameters(), lr=0.01, amsgrad=True, fused=fused)
    scheduler = optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        ],
        milestones=[2],
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return hold(model, optimizer, scheduler=scheduler, averages=average), average


class TestARestore:
    @pytest.mark.parametrize("at", [0, 1, 4])
    def test_brings_everything_back_to_the_bit_and_again(self, at):
        """Twice from one state, which must not have changed meanwhile; also where the optimizer had no state yet."""
        held, average = everything(net(norm=True))
        for seed in range(at):
            update(held, seed)
        saved, start = copy.deepcopy(held.state()), held.digest()

        def rest():
            for seed in range(at, at + 4):
                update(held, seed)
            return held.digest(), [value.clone() for value in average.state_dict().values()], torch.rand(1).item()

        first = rest()
        for _ in range(2):
            held.restore(saved, actor_too=False)
            assert held.digest() == start
            again = rest()
            assert again[0] == first[0]
            assert all(map(torch.equal, again[1], first[1]))
            assert again[2] == first[2]

    def test_to_before_the_first_step_leaves_the_optimizer_empty(self):
        held, _ = everything(net())
        saved = copy.deepcopy(held.state())
        update(held, 0)
        assert held.optimizers[0].state
        held.restore(saved, actor_too=False)
        assert not held.optimizers[0].state

    def test_fills_the_tensors_that_are_there(self):
        """A graph that was captured goes on to write to their addresses."""
        model = net()
        optimizer = optim.AdamW(model.parameters(), lr=torch.tensor(0.01), fused=True)
        held = hold(model, optimizer)
        update(held, 0)
        saved = copy.deepcopy(held.state())

        def addresses():
            state = [value.data_ptr() for entry in optimizer.state.values() for value in entry.values()]
            return [p.data_ptr() for p in model.parameters()], state, optimizer.param_groups[0]["lr"].data_ptr()

        before = addresses()
        update(held, 1)
        optimizer.param_groups[0]["lr"].fill_(7.0)
        held.restore(saved, actor_too=False)
        assert addresses() == before
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.01)

    def test_drops_gradients_and_makes_the_scaler_forget_them(self):
        model = net()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        held = hold(model, scaler=scaler)
        saved = copy.deepcopy(held.state())
        for _ in range(2):
            loss = forward(model, 0)
            scaler.scale(loss).backward()
            held.readings(loss)
            held.restore(saved, actor_too=False)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert scaler.get_scale() == 8.0

    def test_brings_back_buffers_that_a_state_dict_leaves_out(self):
        model = net()
        model.register_buffer("inner", torch.zeros(3), persistent=False)
        held = hold(model)
        model.inner.fill_(5)
        saved = copy.deepcopy(held.state())
        model.inner.fill_(6)
        held.restore(saved, actor_too=False)
        assert model.inner.tolist() == [5, 5, 5]

    def test_is_no_trouble_to_the_witness(self):
        """Neither back to fewer steps, nor forward again to the state that was suspect."""
        held, _ = everything(net())
        update(held, 0)
        early = copy.deepcopy(held.state())
        for seed in range(1, 4):
            update(held, seed)
        late = copy.deepcopy(held.state())
        for saved in (early, late):
            held.restore(saved, actor_too=False)
            update(held, 1)
            assert held.trouble() == ""

    def test_in_a_new_process_leaves_what_it_was_given_as_it_is(self):
        """There the optimizer has no state yet, and must not go on in the tensors of the snapshot."""
        old, _ = everything(net())
        for seed in range(3):
            update(old, seed)
        saved = copy.deepcopy(old.state())
        before = sha256([saved["optimizers"], saved["schedulers"]])
        new, _ = everything(net())
        for _ in range(2):
            new.restore(saved, actor_too=False)
            update(new, 3)
            assert sha256([saved["optimizers"], saved["schedulers"]]) == before
        update(old, 3)
        assert new.digest() == old.digest()


class TestTrouble:
    def test_is_told_one_update_late(self):
        model = net()
        optimizer = optim.AdamW(model.parameters(), fused=True)
        held = hold(model, optimizer)
        update(held, 0)
        assert held.trouble() == ""
        optimizer.found_inf = torch.ones(())  # somebody else's flag, with no scaler that could have put it there
        update(held, 1)
        assert held.trouble() == "a step was allowed and the optimizer did not take it"

    def test_stays_until_a_restore(self):
        model = net()
        optimizer = optim.AdamW(model.parameters(), fused=True)
        held = hold(model, optimizer)
        saved = copy.deepcopy(held.state())
        update(held, 0)
        type(optimizer).step.__wrapped__(optimizer)  # no gradients: it moves nothing, and counts nothing
        forward(model, 1).backward()
        type(optimizer).step.__wrapped__(optimizer)
        update(held, 1)
        for _ in range(2):
            assert "nobody asked the gate about" in held.trouble()
        held.restore(saved, actor_too=False)
        assert held.trouble() == ""


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "match"),
        [
            ({"optimizer": []}, "also needs optimizer"),
            ({"optimizer": 3}, "got a int; give a torch.optim.Optimizer"),
            ({"averages": [object()]}, "give an AveragedModel"),
            ({"late": True}, "AdamW is not fused"),
            ({"late": True, "scaler": torch.amp.GradScaler("cpu")}, "GradScaler"),
        ],
    )
    def test_name_what_cannot_be_guarded(self, words, match):
        model = net()
        given = {"optimizer": optim.AdamW(model.parameters()), "scheduler": None, "actor": None} | words
        with pytest.raises(UsageError, match=match):
            learner(model=model, **given)
        if isinstance(given["optimizer"], optim.Optimizer):
            learner(model=model, **{**given, "averages": (), "late": None})  # nothing was left on the optimizer

    def test_a_plateau_schedule_needs_a_metric_that_nobody_has_here(self):
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UsageError, match="ReduceLROnPlateau"):
            hold(model, optimizer, scheduler=optim.lr_scheduler.ReduceLROnPlateau(optimizer))
