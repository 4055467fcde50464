"""Ways in which a freeze could be lost, a bad update could act, or a state could come back as another."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from lab import Lab

from loopguard.audit.log import AuditLog
from loopguard.errors import AuditWriteError, DiskError, LoopFrozen, UsageError
from loopguard.policy.load import load
from loopguard.reproduce import load_module, reproduce
from loopguard.snapshots.store import SnapshotStore
from loopguard.state import standing, submit


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def edit(lab, old, new):
    text = lab.policy.read_text()
    assert old in text
    lab.policy.write_text(text.replace(old, new, 1))


class TestTheLatchComesFirst:
    @pytest.mark.parametrize("record", ["update.withheld", "promotion.decided", "data.refused"])
    def test_whatever_happens_to_the_record_before_the_freeze(self, lab, monkeypatch, record):
        """A disk that fails right there, or a process that dies right there, leaves a frozen run."""
        append = AuditLog.append

        def failing(log, kind, *given, **named):
            if kind == record:
                raise AuditWriteError("cannot write: No space left on device")
            return append(log, kind, *given, **named)

        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1, updates=2)
            cycle = next(iter(guard.cycles(2)))
            monkeypatch.setattr(AuditLog, "append", failing)
            with pytest.raises((AuditWriteError, LoopFrozen)):
                if record == "update.withheld":
                    lab.update(cycle, factor=math.nan)
                elif record == "promotion.decided":
                    lab.promote(cycle, correct=0.99)
                else:
                    from test_controller import record as draft

                    cycle.admit([draft(n, prompt="<<") for n in range(4)])
            assert (lab.run_dir / "latch").exists()
            monkeypatch.setattr(AuditLog, "append", append)
        assert standing(lab.run_dir).frozen

    def test_a_log_that_is_dead_lets_no_update_through_under_the_lease(self, lab, monkeypatch):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            lab.update(cycle)
            before = guard.state_digest()
            monkeypatch.setattr(guard._log, "_trouble", "cannot write: No space left on device")
            with pytest.raises(AuditWriteError):
                lab.update(cycle)
            assert guard.state_digest() == before
            monkeypatch.setattr(guard._log, "_trouble", None)

    def test_nor_does_a_guard_that_is_closed(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            lab.update(cycle)
        with pytest.raises(UsageError, match="closed"):
            lab.update(cycle)

    def test_a_loop_whose_own_state_cannot_be_kept_is_rolled_back_and_recorded_all_the_same(self, lab):
        class Loop:
            broken = False

            def state_dict(self):
                if self.broken:
                    raise RuntimeError("a set changed size")
                return {}

            def load_state_dict(self, state):
                pass

        loop = Loop()
        with lab.open() as guard:
            torch.manual_seed(0)
            lab.model = torch.nn.Linear(4, 1)
            guard.attach(model=lab.model, optimizer=torch.optim.SGD(lab.model.parameters(), lr=0.1), loop=loop)
            cycle = next(iter(guard.cycles(1)))
            loop.broken = True
            with pytest.raises(LoopFrozen):
                lab.update(cycle, factor=math.nan)
        [frozen] = lab.events("freeze.entered")
        assert "a set changed size" in frozen.body["capsule_trouble"]


class TestStartsThatDied:
    def test_one_that_was_killed_before_run_json_is_begun_again(self, lab, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr("loopguard.controller.directory.replace_durably", _killed)
            with pytest.raises(ZeroDivisionError):
                lab.open()
        assert [path.name for path in lab.run_dir.iterdir()] == ["policy"]
        (lab.run_dir / "policy" / f".{'0' * 64}.yaml.partial").write_text("half")
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1, updates=1)

    @pytest.mark.parametrize("name", ["policy/mine.yaml", "policy.txt", "latch", "policy"])
    def test_but_a_directory_with_other_things_in_it_stays_refused(self, lab, name):
        path = lab.run_dir / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(UsageError, match="holds something else"):
            lab.open()
        assert path.read_text() == "mine"

    def test_a_run_that_is_resumed_after_it_lost_its_pointer_has_settled_its_lease(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2)
        guard = lab.build(lab.open())
        lab.update(next(iter(guard.cycles(3))))
        guard._log.close()  # a kill under a lease
        (lab.run_dir / "snapshots" / "promoted.json").unlink()
        with lab.open() as again:
            lab.build(again)
            assert again.frozen
            again._resume(by="dana", reason="it may begin anew")
            lab.update(next(iter(again.cycles(1))))
        kinds = [entry.type for entry in lab.events("update.leased", "update.settled")]
        assert kinds == [*["update.leased"] * 3, "update.settled", "update.leased"]


def _killed(*_):
    raise ZeroDivisionError


class TestCyclesThatAreOver:
    def test_a_freeze_that_was_lifted_between_two_tool_calls_still_ends_its_cycle(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1)
            cycle = next(iter(guard.cycles(2)))
            lab.update(cycle)
            tool = cycle.tool("python")
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            assert tool("print(4)").status == "denied"
            submit(lab.run_dir, "resume", by="dana", reason="it was not")
            tool("print(4)")
            assert not lab.update(cycle).allowed
            assert not lab.promote(cycle).allowed
            assert cycle.discarded

    def test_nothing_is_updated_or_promoted_after_the_promotion(self, lab):
        """Else the next cycle would generate with weights that nobody promoted."""
        with lab.open() as guard:
            lab.build(guard)
            first = next(iter(guard.cycles(2)))
            lab.update(first)
            lab.promote(first)
            with pytest.raises(UsageError, match="cycle 1 is over"):
                lab.update(first)
            with pytest.raises(UsageError, match="cycle 1 is over"):
                lab.promote(first)

    def test_nor_through_the_cycle_before(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycles = guard.cycles(3)
            first = next(cycles)
            lab.update(first)
            second = next(cycles)
            with pytest.raises(UsageError, match="cycle 1 is over"):
                lab.update(first)
            assert lab.update(second).allowed

    def test_a_latch_between_forward_and_update_stops_the_update(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            before = guard.state_digest()
            loss = lab.loss()
            cycle.forward(loss=loss)
            loss.backward()
            (lab.run_dir / "latch").write_text("{}")
            with pytest.raises(LoopFrozen):
                cycle.update(loss=loss)
            assert guard.state_digest() == before

    def test_an_update_has_the_loss_that_was_judged(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            loss = lab.loss()
            cycle.forward(loss=loss)
            loss.backward()
            with pytest.raises(UsageError, match="another loss than cycle.forward"):
                cycle.update(loss=loss * math.nan)


class TestHalfAnUpdate:
    def test_a_step_that_breaks_freezes_and_is_undone(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1, updates=2)
            promoted = guard.state_digest()
            cycle = next(iter(guard.cycles(2)))
            lab.update(cycle)
            lab.scheduler.lr_lambdas[0] = lambda step: 1 / 0
            with pytest.raises(LoopFrozen, match="broke while it was applied"):
                lab.update(cycle)
            assert guard.state_digest() == promoted

    def test_of_two_optimizers_none_steps_where_the_gradients_of_one_overflow(self, lab):
        with lab.open() as guard:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
            optimizers = [torch.optim.AdamW(part.parameters(), lr=0.01) for part in model]
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            guard.attach(model=model, optimizer=optimizers, scaler=scaler)
            cycle = next(iter(guard.cycles(1)))
            loss = model(torch.randn(16, 4)).square().mean()
            scaler.scale(loss).backward()
            model[0].weight.grad[0, 0] = math.inf
            before = guard.state_digest()
            assert cycle.update(loss=loss, clip_norm=1.0).rule == "overflow"
            assert guard.state_digest() == before
            assert scaler.get_scale() == 4.0
        assert lab.events("update.overflowed")[0].body == {"count": 1}

    def test_after_a_mistake_the_next_gradients_are_unscaled_again(self, lab):
        with lab.open() as guard:
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 1)
            scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
            guard.attach(model=model, optimizer=torch.optim.AdamW(model.parameters()), scaler=scaler)
            cycle = next(iter(guard.cycles(1)))
            with pytest.raises(UsageError, match=r"call scaler.scale\(loss\).backward\(\)"):
                cycle.update(loss=torch.ones(()))
            scaler.scale(torch.ones(()))
            with pytest.raises(UsageError, match="no parameter has a gradient"):
                cycle.update(loss=torch.ones(()))
            x = torch.randn(16, 4)
            loss = model(x).square().mean()
            bare = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
            scaler.scale(loss).backward()
            cycle.update(loss=loss)
            guard._ledger.flush()
        norm = lab.events("update.applied")[0].body["readings"]["grad_norm"][0]
        assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(bare)), rel=1e-4)


class TestStates:
    def test_what_a_loop_does_with_its_state_does_not_reach_the_last_good_one(self, lab):
        class Loop:
            def __init__(self):
                self.counts = torch.zeros(3)

            def state_dict(self):
                return {"counts": self.counts}

            def load_state_dict(self, state):
                self.counts = state["counts"]

        loop = Loop()
        with lab.open() as guard:
            model = torch.nn.Linear(4, 1)
            lab.model = model
            guard.attach(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loop=loop)
            for _ in range(2):
                cycle = next(iter(guard.cycles(1)))
                loop.counts += 1
                with pytest.raises(LoopFrozen):
                    lab.update(cycle, factor=math.nan)
                guard._resume(by="dana", reason="again")
                assert loop.counts.tolist() == [0, 0, 0]

    def test_state_of_an_optimizer_keeps_its_own_type_across_a_restart(self, lab):
        class Master(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        state = self.state[p]
                        state.setdefault("master", p.detach().float().clone())
                        state["master"] -= 0.0137 * p.grad.float()
                        with torch.no_grad():
                            p.copy_(state["master"])

        def build(guard):
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 1).to(torch.bfloat16)
            guard.attach(model=model, optimizer=Master(model.parameters(), lr=0.1))
            return model

        with lab.open() as guard:
            model = build(guard)
            cycle = next(iter(guard.cycles(1)))
            for _ in range(3):
                loss = model(torch.randn(8, 4, dtype=torch.bfloat16)).float().square().mean()
                loss.backward()
                cycle.update(loss=loss)
            cycle.promote({"correct": 0.5})
            digest = guard.state_digest()
        with lab.open() as guard:
            build(guard)
            assert guard.state_digest() == digest

    def test_an_announcement_outlives_a_rollback(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            guard.expect("data", at=50, span=3)
            cycle = next(iter(guard.cycles(1)))
            with pytest.raises(LoopFrozen):
                lab.update(cycle, factor=math.nan)
            guard._resume(by="dana", reason="again")
            assert "50" in str(guard._updates_gate.state_dict()["monitors"]["jump loss"])

    def test_a_policy_with_other_monitors_can_be_adopted_after_a_promotion(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1)
        edit(
            lab,
            "    - {kind: bounds, metric: loss}\n",
            "    - {kind: drift, metric: loss}\n    - {kind: bounds, metric: loss}\n",
        )
        with lab.open(adopt_policy=load(lab.policy).digest) as guard:
            lab.build(guard)
            assert guard.promoted_cycle == 1

    def test_a_model_of_another_shape_is_refused_in_a_sentence(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1, updates=1)
        with lab.open() as guard:
            model = torch.nn.Linear(3, 1)
            with pytest.raises(UsageError, match="not those that this run was promoted with"):
                guard.attach(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))

    @pytest.mark.parametrize("fate", ["gone", "two back"])
    def test_a_pointer_that_was_lost_or_put_back_comes_up_frozen(self, lab, fate):
        with lab.open() as guard:
            lab.build(guard)
            pointer, kept = lab.run_dir / "snapshots" / "promoted.json", []
            for cycle in guard.cycles(3):
                lab.update(cycle)
                lab.promote(cycle)
                guard._good.wait()
                kept.append(pointer.read_bytes())
        pointer.unlink() if fate == "gone" else pointer.write_bytes(kept[0])
        with lab.open() as guard:
            assert guard.frozen

    def test_a_last_promotion_that_does_not_reach_the_disk_is_an_error_of_the_run(self, lab, monkeypatch):
        def full(*_, **__):
            raise DiskError("snapshots could not be written: No space left on device")

        with pytest.raises(DiskError, match="No space left"), lab.open() as guard:
            lab.build(guard)
            guard._good.wait()
            cycle = next(iter(guard.cycles(1)))
            lab.update(cycle)
            monkeypatch.setattr(SnapshotStore, "write", full)
            lab.promote(cycle)
        assert not lab.events("run.finished")
        assert standing(lab.run_dir).cycle is None


class TestLate:
    """Decided on the device, read one update later."""

    def attach(self, guard):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        guard.attach(
            model=self.model, optimizer=torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True), late=True
        )

    def step(self, cycle, factor=1.0):
        x = cycle.keep(torch.randn(16, 4))
        loss = self.model(x).square().mean() * factor
        loss.backward()
        cycle.update(loss=loss)

    def test_an_update_that_nobody_asks_about_any_more_is_judged_when_the_guard_closes(self, lab):
        with lab.open() as guard:
            self.attach(guard)
            cycle = next(iter(guard.cycles(1)))
            self.step(cycle)
            self.step(cycle, math.nan)
        assert standing(lab.run_dir).frozen
        assert not lab.events("run.finished")

    def test_a_freeze_comes_out_the_same_in_a_replay(self, lab):
        module = lab.policy.with_name("late_replay.py")
        module.write_text(
            "import math\nimport torch\n\n\ndef build(config):\n"
            "    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))\n"
            '    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)}\n\n\n'
            "def loss(model, batch, at):\n"
            "    return model(batch).square().mean() * (math.nan if at.update_in_cycle == 4 else 1.0)\n"
        )
        with lab.open() as guard:
            self.attach(guard)
            cycle = next(iter(guard.cycles(1)))
            for _ in range(3):
                self.step(cycle)
            self.step(cycle, math.nan)
            with pytest.raises(LoopFrozen):
                self.step(cycle)
        again = reproduce(lab.run_dir / "freezes" / "f1", load_module(str(module)))
        assert again.same
        assert again.state == "same"


def test_a_scaled_run_can_be_replayed(lab):
    module = lab.policy.with_name("scaled_replay.py")
    module.write_text(
        "import math\nimport torch\n\n\ndef build(config):\n    model = torch.nn.Linear(4, 1)\n"
        '    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()),\n'
        '            "scaler": torch.amp.GradScaler("cpu", init_scale=8.0)}\n\n\n'
        "def loss(model, batch, at):\n"
        "    return model(batch).square().mean() * (math.nan if at.update_in_cycle == 4 else 1.0)\n"
    )
    with lab.open() as guard:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        guard.attach(model=model, optimizer=torch.optim.AdamW(model.parameters()), scaler=scaler)
        cycle = next(iter(guard.cycles(1)))
        for factor in (1.0, 1.0, 1.0, math.nan):
            loss = model(cycle.keep(torch.randn(16, 4))).square().mean() * factor
            scaler.scale(loss).backward()
            if math.isnan(factor):
                with pytest.raises(LoopFrozen):
                    cycle.update(loss=loss)
            else:
                cycle.update(loss=loss)
    again = reproduce(lab.run_dir / "freezes" / "f1", load_module(str(module)))
    assert again.same
    assert again.state == "same"


def test_batches_that_no_update_was_made_of_are_not_on_the_tape_of_the_next_cycle(lab):
    with lab.open() as guard:
        lab.build(guard)
        cycles = guard.cycles(2)
        cycle = next(cycles)
        lab.update(cycle)
        cycle.keep(torch.randn(2))
        cycle = next(cycles)
        cycle.keep(torch.randn(2))
        lab.update(cycle)
        assert [len(update.batches) for update in guard._good.tape.updates()] == [0, 1]


def test_people_who_step_themselves_may_skip_and_a_broken_monitor_freezes(lab, monkeypatch):
    edit(lab, "{when_frozen: raise}", "{on_trip: skip, skip_at_most: {updates: 1, per: 100}}")
    with lab.open() as guard:
        cycle = next(iter(guard.cycles(1)))
        assert cycle.decide_update(readings={"loss": 1.0, "grad_norm": 1.0}).allowed
        assert cycle.decide_update(readings={"loss": math.nan, "grad_norm": 1.0}).result == "skip"

        def broken(value, *, at, armed):
            raise ZeroDivisionError

        monkeypatch.setattr(guard._updates_gate._monitors[0], "read", broken)
        with pytest.raises(LoopFrozen, match="monitor of loss failed"):
            cycle.decide_update(readings={"loss": 1.0, "grad_norm": 1.0})
    assert [entry.body["update"] for entry in lab.events("update.skipped")] == [2]
