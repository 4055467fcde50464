"""The veto: a withheld step is a step that never was, whichever optimizer, kernel, scaler or compiler is around it."""

import warnings

import pytest

torch = pytest.importorskip("torch", reason="this is about torch")

from loopguard.errors import UsageError
from loopguard.integrations.torch.digest import sha256
from loopguard.integrations.torch.veto import Veto

torch.set_num_threads(1)
optim = torch.optim


class Counting(optim.SGD):
    """An optimizer that keeps count in its options, as some do for a schedule of their own."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = 0.1 / group["k"] ** 0.5
        return super().step(closure)


KERNELS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
WITH_A_FUSED_KERNEL = {
    "Adam": lambda p, **kw: optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True, **kw),
    "AdamW": lambda p, **kw: optim.AdamW(p, lr=0.01, weight_decay=0.1, **kw),
    "SGD": lambda p, **kw: optim.SGD(p, lr=0.1, weight_decay=0.1, **kw),
    "SGD-momentum": lambda p, **kw: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, **kw),
    "Adagrad": lambda p, **kw: optim.Adagrad(p, lr=0.1, weight_decay=0.1, **kw),
}
WITHOUT = {
    name: lambda p, name=name, **kw: getattr(optim, name)(p, **kw)
    for name in ("Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD")
}
ALONE = {
    "Adafactor": lambda p, **_: optim.Adafactor(p, weight_decay=0.1),
    "Muon": lambda p, **_: optim.Muon([one for one in p if one.ndim == 2]),
    "Counting": lambda p, **kw: Counting(p, lr=0.1, momentum=0.9, **kw),
    "Counting-fused": lambda p, **_: Counting(p, lr=0.1, momentum=0.9, fused=True),
}
MAKE = WITH_A_FUSED_KERNEL | WITHOUT | ALONE
TABLE = [
    *((name, kernel) for name in WITH_A_FUSED_KERNEL for kernel in KERNELS),
    *((name, kernel) for name in WITHOUT for kernel in ("default", "foreach")),
    *((name, "default") for name in ALONE),
]
if not hasattr(optim, "Muon"):
    TABLE.remove(("Muon", "default"))


class Run:
    """A small model under one optimizer, stepped with gradients that are the same in every run."""

    def __init__(self, name, kernel, *, veto=True, scaler=False, compiled=None):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(17, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
        self.optimizer = MAKE[name](self.model.parameters(), **KERNELS[kernel])
        self.veto = Veto(self.optimizer) if veto else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if scaler else None
        self.step = torch.compile(lambda: self.optimizer.step(), backend=compiled) if compiled else self._step
        self.batches = 0

    def _step(self):
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def good(self):
        self._gradients(self.batches)
        self.batches += 1
        self.step()
        self.optimizer.zero_grad()

    def withheld(self, decision=True, *, say="withhold"):
        self._gradients(999)
        if self.scaler is None:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        if say == "withhold":
            self.veto.withhold(decision)
        else:
            self.veto.flag.fill_(decision)
        scale = self.scaler.get_scale() if self.scaler else None
        if self.scaler:
            # The scaler counts steps that it was asked for; one that never was is not among them.
            self.scaler.step(self.optimizer)
            self.scaler.update(new_scale=scale)
        else:
            self.step()
        if say == "flag":
            self.veto.flag.zero_()
        self.optimizer.zero_grad()

    def overflowing(self):
        self._gradients(500)
        next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        self.step()
        self.optimizer.zero_grad()

    def _gradients(self, seed):
        generator = torch.Generator().manual_seed(seed)
        scale = float(self.scaler.scale(torch.ones(()))) if self.scaler else 1.0
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale

    def digest(self):
        return sha256([list(self.model.parameters()), self.optimizer.state_dict()])


@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize(("name", "kernel"), TABLE)
def test_a_withheld_step_never_was(name, kernel, scaler, first):
    """Right after it, and three steps later, parameters and optimizer state are those of a run without it."""
    run, reference = Run(name, kernel, scaler=scaler), Run(name, kernel, scaler=scaler, veto=False)
    for _ in range(0 if first else 3):
        run.good()
        reference.good()
    run.withheld()
    assert run.digest() == reference.digest()
    assert run.veto.trouble() == ""
    for _ in range(3):
        run.good()
        reference.good()
        assert run.veto.trouble() == ""
    assert run.digest() == reference.digest()


FIRST = [("AdamW", "fused"), ("SGD-momentum", "fused"), ("RMSprop", "default"), ("Counting", "default")]
COMPILED = [
    *((name, kernel, "eager", False) for name, kernel in TABLE),
    *((name, kernel, "eager", True) for name, kernel in FIRST),
    *(("AdamW", "fused", "inductor", first) for first in (False, True)),
]


@pytest.mark.parametrize(("name", "kernel", "backend", "first"), COMPILED)
def test_a_withheld_step_never_was_when_it_is_compiled(name, kernel, backend, first):
    """Traced into a compiled step a hook does nothing, without a word; ours is kept out of it."""
    torch._dynamo.reset()
    run, reference = (Run(name, kernel, compiled=backend, veto=veto) for veto in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of which there are many
        for _ in range(0 if first else 2):
            run.good()
            reference.good()
        run.withheld()
        assert run.digest() == reference.digest()
        run.good()
        reference.good()
        run.withheld(float("nan"), say="flag")
    assert run.digest() == reference.digest()
    assert run.veto.trouble() == ""
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "SGD-momentum"])
@pytest.mark.parametrize("kernel", ["default", "fused"])
@pytest.mark.parametrize(
    ("value", "steps"), [(0.0, True), (-0.0, True), (1.0, False), (2.0, False), (0.5, False), (float("nan"), False)]
)
@pytest.mark.parametrize("say", ["withhold", "flag", "tensor"])
def test_everything_but_zero_withholds(name, kernel, value, steps, say):
    """Kernels compare with 1 exactly: a 2 or a NaN that reached them would let the step pass."""
    run = Run(name, kernel)
    run.good()
    before = run.digest()
    run._gradients(7)
    if say == "flag":
        run.veto.flag.fill_(value)
    else:
        run.veto.withhold(torch.tensor(value) if say == "tensor" else bool(value))
    run.optimizer.step()
    assert (run.digest() != before) is steps
    assert run.veto.trouble() == ""


def test_withhold_speaks_of_one_step_and_the_flag_of_all_until_it_is_cleared():
    for kernel in ("default", "fused"):
        run, reference = Run("AdamW", kernel), Run("AdamW", kernel, veto=False)
        run.withheld()
        run.good()
        run.veto.flag.fill_(1)
        for seed in (5, 6):
            run._gradients(seed)
            run.optimizer.step()
        run.veto.flag.zero_()
        run.good()
        reference.good()
        reference.good()
        assert run.digest() == reference.digest()


def test_nothing_is_told_to_a_kernel_as_long_as_nothing_was_withheld():
    """So a healthy run takes the very kernels that it would take without a veto."""
    run = Run("AdamW", "fused")
    seen = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(hasattr(optimizer, "found_inf")))
    run.good()
    run.withheld()
    run.good()
    assert seen == [False, True, False]


class TestPaths:
    @pytest.mark.parametrize("name", WITH_A_FUSED_KERNEL)
    def test_fused_kernels_that_read_the_flag_are_told(self, name):
        assert Run(name, "fused").veto.path == "flag"
        assert Run(name, "foreach").veto.path == Run(name, "default").veto.path == "wrap"

    def test_a_subclass_is_wrapped_as_its_step_may_do_more(self):
        assert Run("Counting-fused", "default").veto.path == "wrap"

    def test_one_group_without_a_fused_kernel_means_wrapping(self):
        a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        optimizer = optim.AdamW([{"params": [a]}, {"params": [b], "fused": False}], fused=True)
        assert Veto(optimizer).path == "wrap"

    @pytest.mark.parametrize("name", [*WITHOUT, *(["Muon"] if hasattr(optim, "Muon") else [])])
    def test_set_on_any_other_the_flag_is_ignored_without_a_word(self, name):
        """Why there is an allow-list, and why it is of exact types."""
        run = Run(name, "default", veto=False)
        run._gradients(0)
        run.optimizer.found_inf = torch.ones(())
        before = run.digest()
        run.optimizer.step()
        assert run.digest() != before


class TestWithAGradScaler:
    @pytest.mark.parametrize("kernel", ["fused", "foreach"])
    def test_an_overflow_is_what_it_is_without_a_veto(self, kernel):
        run, reference = (Run("AdamW", kernel, scaler=True, veto=veto) for veto in (True, False))
        for one in (run, reference):
            for _ in range(2):
                one.good()
            one.overflowing()
            assert one.veto is None or one.veto.trouble() == ""
            for _ in range(2):
                one.good()
        assert run.digest() == reference.digest()
        assert run.scaler.state_dict() == reference.scaler.state_dict()

    def test_a_veto_does_not_touch_the_scale(self):
        run = Run("AdamW", "fused", scaler=True)
        run.good()
        before = run.scaler.get_scale()
        run.withheld()
        assert run.scaler.get_scale() == before

    @pytest.mark.parametrize("found", [1.0, 2.0, float("nan")])
    @pytest.mark.parametrize("name", ["AdamW", "Counting-fused"])
    def test_flags_that_a_scaler_summed_over_devices_count_as_one(self, found, name):
        """It may hand over a 2, which a kernel takes for leave to step."""
        run = Run(name, "fused" if name == "AdamW" else "default")
        run._gradients(0)
        before = [p.detach().clone() for p in run.model.parameters()]
        theirs = run.optimizer.found_inf = torch.tensor(found)
        run.optimizer.step()
        assert all(map(torch.equal, before, run.model.parameters()))
        assert run.optimizer.found_inf is theirs
        assert run.veto.trouble() == ""

    def test_a_step_that_raised_leaves_no_flag_for_the_next(self):
        run, reference = Run("AdamW", "fused"), Run("AdamW", "fused", veto=False)

        def fail(*_):
            raise RuntimeError("a hook of somebody else")

        handle = run.optimizer.register_step_pre_hook(fail)
        run.veto.withhold(True)
        run._gradients(1)
        with pytest.raises(RuntimeError, match="somebody else"):
            run.optimizer.step()
        handle.remove()
        run.veto.withhold(False)
        run.good()
        reference.good()
        assert run.digest() == reference.digest()


class TestSchedulesThatPatchStep:
    @pytest.mark.parametrize("kernel", ["default", "fused"])
    @pytest.mark.parametrize("attached", ["before", "between", "after"])
    def test_a_veto_holds_whenever_it_was_put_on(self, kernel, attached):
        """A schedule takes the bound `step` apart and puts its own on the instance; two of them do so twice."""
        run, reference = Run("AdamW", kernel, veto=False), Run("AdamW", kernel, veto=False)
        optim.lr_scheduler.StepLR(reference.optimizer, 1, gamma=0.5)
        if attached == "before":
            run.veto = Veto(run.optimizer)
        first = optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5)
        if attached == "between":
            run.veto = Veto(run.optimizer)
        optim.lr_scheduler.ConstantLR(run.optimizer, factor=1.0)
        if attached == "after":
            run.veto = Veto(run.optimizer)
        run.good()
        first.step()  # warns, and so fails, where it takes the patched step for a foreign one
        run.withheld()
        run.good()
        reference.good()
        for group in reference.optimizer.param_groups:
            group["lr"] *= 0.5
        reference.good()
        assert all(map(torch.equal, run.model.parameters(), reference.model.parameters()))


class TestClosures:
    @pytest.mark.parametrize("name", ["AdamW", "SGD-momentum"])
    @pytest.mark.parametrize("kernel", ["default", "fused"])
    @pytest.mark.parametrize("keyword", [True, False])
    def test_a_closure_may_withhold_the_step_that_called_it(self, name, kernel, keyword):
        run = Run(name, kernel)
        calls = []

        def closure():
            run.optimizer.zero_grad()
            loss = run.model(torch.ones(2, 17)).square().mean()
            loss.backward()
            calls.append(float(loss.detach()))
            run.veto.withhold(len(calls) == 1)
            return loss

        before = run.digest()
        loss = run.optimizer.step(closure=closure) if keyword else run.optimizer.step(closure)
        assert run.digest() == before
        assert float(loss.detach()) == calls[0]
        run.optimizer.step(closure)
        assert run.digest() != before
        assert len(calls) == 2


class TestRefusals:
    def test_a_hook_that_runs_inside_backward_is_refused(self):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = optim.SGD([parameter], lr=0.1)

        def update_and_forget(p):
            optimizer.step()

        parameter.register_post_accumulate_grad_hook(update_and_forget)
        with pytest.raises(UsageError, match=r"update_and_forget runs inside backward\(\).*shape \(3,\)"):
            Veto(optimizer)

    def test_torchs_own_way_of_it_is_refused(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it still compiles with TorchScript
            from torch.distributed.optim import _apply_optimizer_in_backward

        model = torch.nn.Linear(2, 2)
        _apply_optimizer_in_backward(optim.SGD, model.parameters(), {"lr": 0.1})
        with pytest.raises(UsageError, match=r"updated inside backward\(\)"):
            Veto(optim.SGD(model.parameters(), lr=0.1))

    def test_hooks_that_only_reduce_gradients_are_let_be(self):
        """DDP and FSDP put some on every parameter."""
        parameter = torch.nn.Parameter(torch.ones(3))

        def reduce(p):
            return None

        reduce.__module__ = "torch.distributed.fsdp._runtime_utils"
        parameter.register_post_accumulate_grad_hook(reduce)
        assert Veto(optim.SGD([parameter], lr=0.1)).path == "wrap"

    @pytest.mark.parametrize("name", ["Lomo", "AdaLomo", "LayerWiseDummyOptimizer", "DeepSpeedOptimizerWrapper"])
    def test_optimizers_that_are_known_to_step_elsewhere_are_refused(self, name):
        cls = type(name, (optim.SGD,), {})
        with pytest.raises(UsageError, match=f"{name} cannot be guarded"):
            Veto(cls([torch.nn.Parameter(torch.ones(2))], lr=0.1))

    def test_lbfgs_is_refused(self):
        with pytest.raises(UsageError, match="LBFGS cannot be guarded: it steps many times"):
            Veto(optim.LBFGS([torch.nn.Parameter(torch.ones(2))]))

    def test_an_optimizer_has_one_veto(self):
        run = Run("AdamW", "default")
        with pytest.raises(UsageError, match="has a veto already"):
            Veto(run.optimizer)
        run.veto.remove()
        Veto(run.optimizer)


class TestClosed:
    @pytest.mark.parametrize("name", ["AdamW", "Counting"])
    @pytest.mark.parametrize("kernel", ["default", "fused"])
    def test_a_step_that_was_not_permitted_raises_and_moves_nothing(self, name, kernel):
        model = torch.nn.Linear(3, 3)
        optimizer = MAKE[name](model.parameters(), **KERNELS[kernel])
        veto = Veto(optimizer, closed=True)
        model(torch.ones(3)).sum().backward()
        before = sha256([list(model.parameters()), optimizer.state_dict()])
        for step in (optimizer.step, lambda: type(optimizer).step(optimizer)):
            with pytest.raises(UsageError, match="call cycle.update"):
                step()
        assert sha256([list(model.parameters()), optimizer.state_dict()]) == before
        with veto.opened():
            optimizer.step()
        assert sha256([list(model.parameters()), optimizer.state_dict()]) != before

    @pytest.mark.parametrize("kernel", ["foreach", "fused"])
    def test_nor_does_it_when_it_is_compiled(self, kernel):
        torch._dynamo.reset()
        run = Run("AdamW", kernel, veto=False, compiled="eager")
        veto = Veto(run.optimizer, closed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with veto.opened():
                run.good()
            before = run.digest()
            run._gradients(3)
            with pytest.raises(UsageError, match="call cycle.update"):
                run.step()
        assert run.digest() == before


class TestAroundTheVeto:
    def test_a_step_that_was_kept_from_before_raises_where_it_is_withheld(self):
        """accelerate does so with a GradScaler; the wrapper cannot be there, and the hook inside still is."""
        run = Run("RMSprop", "default", veto=False)
        kept = run.optimizer.step
        run.veto = Veto(run.optimizer)
        run.good()
        before = run.digest()
        run._gradients(3)
        run.veto.withhold(True)
        with pytest.raises(UsageError, match="taken around its veto"):
            kept()
        assert run.digest() == before
        run.veto.withhold(False)
        kept()
        assert run.digest() != before
        run.good()
        assert run.veto.trouble() == ""

    def test_removed_it_is_as_if_it_had_not_been_there(self):
        for kernel in ("default", "fused"):
            run, reference = Run("AdamW", kernel), Run("AdamW", kernel, veto=False)
            run.veto.withhold(True)
            run.veto.remove()
            run.good()
            reference.good()
            assert run.digest() == reference.digest()
            assert "step" not in vars(run.optimizer)

    def test_removed_below_another_wrapper_it_lets_everything_through(self):
        run, reference = Run("RMSprop", "default"), Run("RMSprop", "default", veto=False)
        inner = run.optimizer.step
        run.optimizer.step = lambda: inner()
        run.veto.withhold(True)
        run.veto.remove()
        run.good()
        reference.good()
        assert run.digest() == reference.digest()

    def test_it_goes_on_the_innermost_of_wrapped_optimizers(self):
        """Frameworks put a class of their own around an optimizer, and step what is inside."""

        class Wrapped(optim.Optimizer):
            def __init__(self, optimizer):
                self.optimizer = optimizer

        run = Run("RMSprop", "default", veto=False)
        veto = Veto(Wrapped(Wrapped(run.optimizer)))
        assert veto.optimizer is run.optimizer
        before = run.digest()
        run._gradients(0)
        veto.withhold(True)
        run.optimizer.step()
        assert run.digest() == before


class Standing(optim.SGD):
    """Keeps its count in its options, and a `step` in its state that never moves, as some of other packages do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("step", 0)


class Striding(Standing):
    """Counts as all do."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["step"] += 1


class TestTheWitness:
    def test_a_counter_of_another_package_is_believed_once_it_has_counted(self):
        for cls, found in ((Standing, ""), (Striding, "a step was allowed and the optimizer did not take it")):
            run = Run("AdamW", "default", veto=False)
            run.optimizer = cls(run.model.parameters(), lr=0.1)
            takes = [True]
            inner = run.optimizer.step
            run.optimizer.step = lambda inner=inner, takes=takes: inner() if takes[0] else None
            run.veto = Veto(run.optimizer)
            for _ in range(4):
                run.good()
                assert run.veto.trouble() == ""
            takes[0] = False
            run.good()
            assert run.veto.trouble() == found

    @pytest.mark.parametrize("name", ["AdamW", "Adagrad", "SGD", "SGD-momentum"])
    def test_a_kernel_that_steps_in_spite_of_the_flag_is_found_out(self, name):
        run = Run(name, "fused")
        run.good()
        # A hook of somebody else, after ours, takes the flag away.
        run.optimizer.register_step_pre_hook(lambda optimizer, *_: setattr(optimizer, "found_inf", None))
        run._gradients(3)
        run.veto.withhold(True)
        run.optimizer.step()
        assert run.veto.trouble() == "a step was withheld and the optimizer took it all the same"

    @pytest.mark.parametrize("name", ["AdamW", "Adagrad", "SGD", "SGD-momentum", "RMSprop"])
    def test_a_step_that_somebody_swallowed_is_found_out(self, name):
        run = Run(name, "default", veto=False)
        run.optimizer.step = lambda: None
        run.veto = Veto(run.optimizer)
        run._gradients(0)
        run.optimizer.step()
        assert run.veto.trouble() == "a step was allowed and the optimizer did not take it"

    @pytest.mark.parametrize(("name", "kernel"), [("AdamW", "fused"), ("AdamW", "default"), ("RMSprop", "default")])
    def test_a_step_that_went_around_every_hook_is_found_out_at_the_next(self, name, kernel):
        run = Run(name, kernel)
        run.good()
        run._gradients(3)
        type(run.optimizer).step.__wrapped__(run.optimizer)  # torch puts the hooks around the class's own step
        run.good()
        assert run.veto.trouble() == ("between two updates the optimizer took 1 steps that nobody asked the gate about")

    def test_state_that_was_loaded_or_reset_is_no_trouble(self):
        run = Run("AdamW", "fused")
        for _ in range(3):
            run.good()
        saved = run.optimizer.state_dict()
        run.optimizer.load_state_dict({**saved, "state": {}})
        run.good()
        assert run.veto.trouble() == ""
        run.optimizer.load_state_dict(saved)
        run.good()
        assert run.veto.trouble() == ""
        run.optimizer.state.clear()
        run.good()
        assert run.veto.trouble() == ""

    def test_the_weights_may_be_changed_by_hand_between_two_steps(self):
        for name, kernel in (("SGD", "fused"), ("SGD", "default"), ("AdamW", "fused")):
            run = Run(name, kernel)
            run.good()
            run.withheld()
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.clamp_(-0.1, 0.1)
            assert run.veto.trouble() == ""
            run.good()
            assert run.veto.trouble() == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device: a captured step was not run")
def test_a_step_captured_in_a_cuda_graph_is_withheld_by_filling_the_flag():
    """The flag keeps its address, so a replay reads what was written to it before."""
    model = torch.nn.Linear(64, 64, device="cuda")
    optimizer = optim.AdamW(model.parameters(), capturable=True, fused=True)
    veto = Veto(optimizer)
    flag = veto.flag
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value, moves in ((0.0, True), (1.0, False), (2.0, False), (float("nan"), False), (0.0, True)):
        before = sha256([list(model.parameters()), optimizer.state_dict()])
        flag.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert (sha256([list(model.parameters()), optimizer.state_dict()]) != before) is moves
