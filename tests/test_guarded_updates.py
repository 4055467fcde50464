"""Updates under a whole guard: what is withheld, what is counted, and what is decided where."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from lab import Lab

from loopguard.audit.verify import verify
from loopguard.errors import LoopFrozen, UsageError
from loopguard.integrations.torch import learner


def network(seed=0, **layers):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), *layers.values(), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def digest(model, optimizer):
    return learner(model=model, optimizer=optimizer, scheduler=None, actor=None).digest()


def batches(count, seed=1):
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 4, generator=noise) for _ in range(count)]


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


class TestLate:
    """The path of a GPU, run on a CPU: the device decides, the host reads one update later."""

    def attach(self, guard):
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        guard.attach(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, late=True)

    def step(self, cycle, x, factor=1.0):
        loss = self.model(x).square().mean() * factor
        loss.backward()
        return cycle.update(loss=loss, clip_norm=1.0)

    def bare(self, xs):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for x in xs:
            model(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return digest(model, optimizer), scheduler.get_last_lr()

    def test_a_healthy_run_has_the_bits_of_one_without_a_guard(self, lab):
        xs = batches(8)
        with lab.open() as guard:
            self.attach(guard)
            cycle = next(iter(guard.cycles(1)))
            for x in xs:
                assert self.step(cycle, x).rule == "staged"
            cycle.promote({"correct": 0.5})
            assert (guard.state_digest(), self.scheduler.get_last_lr()) == self.bare(xs)
        applied = lab.events("update.applied")
        assert (applied[0].body["from"], applied[-1].body["to"]) == (1, 8)
        assert all(math.isfinite(loss) for entry in applied for loss in entry.body["readings"]["loss"])
        assert verify(lab.run_dir).code == 20

    @pytest.mark.parametrize("factor", [math.nan, math.inf, -1.0])
    def test_an_impossible_loss_never_reaches_the_weights_although_the_host_hears_of_it_later(self, lab, factor):
        xs = batches(6)
        with lab.open() as guard:
            self.attach(guard)
            cycle = next(iter(guard.cycles(1)))
            for x in xs[:4]:
                self.step(cycle, x)
            self.step(cycle, xs[4], factor)
            with pytest.raises(LoopFrozen, match="loss is"):
                self.step(cycle, xs[5])
            assert (guard.state_digest(), self.scheduler.get_last_lr()) == self.bare(xs[:4])
        [frozen] = lab.events("freeze.entered")
        assert (frozen.body["update"], frozen.body["restored"]) == (5, None)
        assert lab.events("update.applied")[-1].body["to"] == 4

    def test_a_trip_in_the_last_update_of_a_cycle_is_found_before_the_promotion(self, lab):
        xs = batches(4)
        with lab.open() as guard:
            self.attach(guard)
            cycle = next(iter(guard.cycles(1)))
            for x in xs[:3]:
                self.step(cycle, x)
            self.step(cycle, xs[3], math.nan)
            with pytest.raises(LoopFrozen):
                cycle.promote({"correct": 0.5})
            assert guard.state_digest() == self.bare(xs[:3])[0]
        assert not lab.events("promotion.decided")

    def test_after_a_resume_the_device_steps_again(self, lab):
        xs = batches(3)
        with lab.open() as guard:
            self.attach(guard)
            cycle = next(iter(guard.cycles(1)))
            self.step(cycle, xs[0], math.nan)
            with pytest.raises(LoopFrozen):
                self.step(cycle, xs[1])
            guard._resume(by="dana", reason="bad batch")
            cycle = next(iter(guard.cycles(1)))
            for x in xs:
                self.step(cycle, x)
            cycle.promote({"correct": 0.5})
            assert guard.state_digest() == self.bare(xs)[0]

    def test_a_skipped_batch_leaves_no_trace_and_the_run_goes_on(self, lab):
        lab.policy.write_text(
            lab.policy.read_text().replace(
                "{when_frozen: raise}", "{on_trip: skip, skip_at_most: {updates: 1, per: 100}}"
            )
        )
        xs = batches(4)
        with lab.open() as guard:
            self.attach(guard)
            cycle = next(iter(guard.cycles(1)))
            self.step(cycle, xs[0])
            self.step(cycle, xs[1], math.nan)
            self.step(cycle, xs[2])
            self.step(cycle, xs[3])
            cycle.promote({"correct": 0.5})
            assert guard.state_digest() == self.bare([xs[0], xs[2], xs[3]])[0]
        [skipped] = lab.events("update.skipped")
        assert skipped.body["update"] == 2

    def test_an_optimizer_that_has_no_flag_is_refused(self, lab):
        with lab.open() as guard:
            model = network()
            with pytest.raises(UsageError, match="cannot be decided on the device"):
                guard.attach(model=model, optimizer=torch.optim.RMSprop(model.parameters()), late=True)


class TestHalfPrecision:
    def test_overflows_of_a_scaler_at_the_start_are_counted_and_freeze_nothing(self, lab):
        """A scaler begins far too high on purpose, and comes down by overflowing."""
        with lab.open() as guard:
            model = network()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
            guard.attach(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
            cycle = next(iter(guard.cycles(1)))
            rules = []
            for x in batches(45):
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = model(x).float().square().mean()
                scaler.scale(loss).backward()
                rules.append(cycle.update(loss=loss, clip_norm=1.0).rule)
            assert not guard.frozen
            overflows = rules.count("overflow")
            assert 0 < overflows < 40
            assert rules[0] == "overflow"
            assert rules.count("default") == 45 - overflows
            assert scheduler.last_epoch == cycle.updates == 45 - overflows
            cycle.promote({"correct": 0.5})
        applied = lab.events("update.applied")
        assert sum(entry.body["overflows"] for entry in applied) == overflows
        assert applied[-1].body["to"] == 45 - overflows

    def test_a_loss_that_is_not_a_number_is_no_overflow(self, lab):
        with lab.open() as guard:
            model = network()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            guard.attach(model=model, optimizer=optimizer, scaler=scaler)
            cycle = next(iter(guard.cycles(1)))
            before = guard.state_digest()
            loss = model(batches(1)[0]).square().mean() * math.nan
            scaler.scale(loss).backward()
            with pytest.raises(LoopFrozen, match="loss is nan"):
                cycle.update(loss=loss)
            assert guard.state_digest() == before
            assert scaler.get_scale() == 8.0


class TestWhatElseMoves:
    def test_averages_follow_applied_updates_alone_and_go_back_with_the_rest(self, lab):
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        with lab.open() as guard:
            model = network()
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            guard.attach(model=model, optimizer=optimizer, averages=average)
            cycle = next(iter(guard.cycles(1)))
            for x in batches(3):
                loss = model(x).square().mean()
                loss.backward()
                cycle.update(loss=loss)
            moved = [tensor.clone() for tensor in average.state_dict().values()]
            loss = model(batches(1)[0]).square().mean() * math.nan
            loss.backward()
            with pytest.raises(LoopFrozen):
                cycle.update(loss=loss)
            assert all(map(torch.equal, moved, average.state_dict().values()))
            assert int(average.n_averaged) == 3

    def test_statistics_of_a_batch_norm_do_not_keep_what_a_stopped_batch_left(self, lab):
        with lab.open() as guard:
            model = network(norm=torch.nn.BatchNorm1d(8))
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            guard.attach(model=model, optimizer=optimizer)
            cycle = next(iter(guard.cycles(1)))
            for x in batches(3):
                loss = model(x).square().mean()
                loss.backward()
                cycle.update(loss=loss)
            before = [tensor.clone() for tensor in model.state_dict().values()]
            loss = model(batches(1)[0] * 1e30).square().mean() * math.inf
            loss.backward()
            with pytest.raises(LoopFrozen):
                cycle.update(loss=loss)
            assert all(map(torch.equal, before, model.state_dict().values()))

    def test_gradients_of_a_stopped_update_are_gone(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            with pytest.raises(LoopFrozen):
                lab.update(cycle, factor=math.nan)
            assert all(p.grad is None for p in lab.model.parameters())
            lab.loss().backward()
            with pytest.raises(LoopFrozen):
                cycle.update(loss=torch.ones(()))
            assert all(p.grad is None for p in lab.model.parameters())


class TestWatched:
    def policy(self, lab, rule):
        lab.policy.write_text(lab.policy.read_text().replace("    - {kind: bounds, metric: loss}\n", rule + "\n", 1))

    def test_a_reading_of_the_loop_is_watched_like_any_other(self, lab):
        self.policy(lab, "    - {kind: bounds, metric: loss}\n    - {kind: bounds, metric: entropy, min: 0.1}")
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            loss = lab.loss()
            loss.backward()
            cycle.update(loss=loss, readings={"entropy": torch.tensor(1.5)})
            loss = lab.loss()
            loss.backward()
            with pytest.raises(LoopFrozen, match="entropy is 0.01"):
                cycle.update(loss=loss, readings={"entropy": torch.tensor(0.01)})

    def test_one_that_is_not_handed_in_freezes(self, lab):
        self.policy(lab, "    - {kind: bounds, metric: loss}\n    - {kind: bounds, metric: entropy, min: 0.1}")
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            with pytest.raises(LoopFrozen, match="no reading of entropy at update 1"):
                lab.update(cycle)

    def test_a_decision_that_did_not_come_true_is_a_freeze(self, lab):
        """Somebody stepped around the guard, or the optimizer did not honour it: nobody can vouch for the weights."""
        with lab.open() as guard:
            lab.build(guard)
            cycles = guard.cycles(2)
            cycle = next(cycles)
            for _ in range(3):
                lab.update(cycle)
            lab.promote(cycle)
            promoted = guard.state_digest()
            cycle = next(cycles)
            lab.update(cycle)
            for state in lab.optimizer.state.values():
                state["step"] += 1
            lab.update(cycle)
            with pytest.raises(LoopFrozen, match="1 steps that nobody asked the gate about"):
                lab.update(cycle)
            assert guard.state_digest() == promoted
        assert lab.events("freeze.entered")[0].body["rule"] == "veto_not_honoured"


class TestExpect:
    def test_an_announcement_is_in_the_log_and_reaches_the_monitors(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            lab.update(cycle)
            guard.expect("epoch", at=40, span=5)
            lab.update(cycle)
        [told] = lab.events("update.expected")
        assert told.body == {"kind": "epoch", "at": 40, "span": 5}

    @pytest.mark.parametrize(
        ("words", "match"),
        [
            ({"kind": "easter"}, "expected one of epoch, lr, data"),
            ({"kind": "lr", "at": 1}, "update 1 is over; the next one is 2"),
            ({"kind": "lr", "span": 0}, "at least 1"),
        ],
    )
    def test_one_that_means_nothing_is_refused(self, lab, words, match):
        with lab.open() as guard:
            lab.build(guard)
            lab.update(next(iter(guard.cycles(1))))
            with pytest.raises(UsageError, match=match):
                guard.expect(words.pop("kind"), **words)


class TestMistakes:
    """Each is refused in a sentence before a weight moves, and the loop may go on."""

    @pytest.mark.parametrize("clip_norm", [0, -1.0, math.nan, math.inf])
    def test_a_norm_that_is_none(self, lab, clip_norm):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            before = guard.state_digest()
            loss = lab.loss()
            loss.backward()
            with pytest.raises(UsageError, match="the largest norm is a number above 0"):
                cycle.update(loss=loss, clip_norm=clip_norm)
            assert guard.state_digest() == before
            assert cycle.update(loss=loss).allowed

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            (torch.ones(3), r"entropy is a torch.float32 tensor of shape \(3,\)"),
            ("high", "entropy is 'high'"),
            (None, "entropy is None"),
        ],
    )
    def test_a_reading_that_is_no_number(self, lab, value, match):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            loss = lab.loss()
            loss.backward()
            with pytest.raises(UsageError, match=match):
                cycle.update(loss=loss, readings={"entropy": value})

    def test_a_panel_that_is_none(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            with pytest.raises(UsageError, match="correct is 'good'; give one number"):
                lab.promote(cycle, correct="good")

    def test_an_optimizer_of_another_model(self, lab):
        with lab.open() as guard:
            other = torch.optim.AdamW(network(1).parameters())
            with pytest.raises(UsageError, match="holds no parameter of the model"):
                guard.attach(model=network(), optimizer=other)

    @pytest.mark.parametrize(
        ("words", "match"),
        [
            ({"config": [1]}, "got a list; give a dict"),
            ({"scaler": 3}, "got a int; give a torch.amp.GradScaler"),
            ({"late": True}, r"this AdamW is not fused \(make it with fused=True\)"),
        ],
    )
    def test_what_attach_cannot_take(self, lab, words, match):
        with lab.open() as guard:
            model = network()
            with pytest.raises(UsageError, match=match):
                guard.attach(model=model, optimizer=torch.optim.AdamW(model.parameters()), **words)
