"""The controller end to end, with a real log, real weights and a fake sandbox."""

from __future__ import annotations

import json
import math

import pytest

from loopguard.audit.verify import verify
from loopguard.controller import LoopGuard
from loopguard.controller.station import ToolStation
from loopguard.errors import (
    LoopFrozen,
    PolicyMismatchError,
    RunBusyError,
    SandboxUnavailableError,
    SnapshotError,
    UsageError,
)
from loopguard.snapshots import read_capsule
from loopguard.state import standing, submit
from loopguard.testing import FakeRuntime
from loopguard.types import Check, Outcome, Provenance, Record

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from lab import POLICY, Lab, bits


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def record(n, *, expected="4", prompt=None):
    return Record(
        id=f"r{n}",
        prompt=prompt or f"place {n}: ",
        completion="2+2",
        provenance=Provenance(source="human", origin=f"f:{n}", cycle=1),
        check=Check(tool="python", code=f"print(2+2)  # {n}", expected=expected),
    )


class TestAQuietRun:
    def test_is_identical_to_the_bit_to_the_same_loop_without_a_guard(self, lab):
        """The guard costs nothing but time."""
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2)
            guarded = guard.state_digest()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        _actor = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for _ in range(12):
            loss = model(torch.randn(16, 4)).square().mean() * 0.01 + 1.0
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        from loopguard.integrations.torch import learner

        assert learner(model=model, optimizer=optimizer, scheduler=None, actor=None).digest() == guarded

    def test_leaves_a_log_that_verifies_up_to_its_missing_anchor(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2)
        assert verify(lab.run_dir).code == 20
        applied = lab.events("update.applied")
        assert sum(len(entry.body["readings"]["loss"]) for entry in applied) == 12

    def test_the_actor_has_the_promoted_weights_and_no_others(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            for cycle in guard.cycles(1):
                before = guard.actor_digest
                lab.update(cycle)
                assert guard.actor_digest == before
                lab.promote(cycle)
                assert guard.actor_digest != before
            assert torch.equal(lab.actor[0].weight, lab.model[0].weight)

    def test_a_lease_is_durable_before_its_first_update(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            for cycle in guard.cycles(1):
                lab.update(cycle)
                assert [(e.body["from"], e.body["to"]) for e in lab.events("update.leased")] == [(1, 8)]


class TestTheUpdateGate:
    def test_an_impossible_loss_freezes_before_the_optimizer_moves(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            for _ in range(5):
                lab.update(cycle)
            before, rate = bits(lab.model), lab.scheduler.get_last_lr()
            digest = guard.state_digest()
            with pytest.raises(LoopFrozen, match="loss is nan"):
                lab.update(cycle, factor=math.nan)
            assert guard.state_digest() == digest
            assert all(torch.equal(a, b) for a, b in zip(before, bits(lab.model), strict=True))
            assert lab.scheduler.get_last_lr() == rate

    def test_a_jump_rolls_back_to_before_the_first_suspect_update(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            promoted = None
            with pytest.raises(LoopFrozen, match="loss fell from 1 to 0.3"):
                for cycle in guard.cycles(4):
                    promoted = guard.state_digest()
                    for n in range(40):
                        lab.update(cycle, factor=1.0 if cycle.number < 3 or n < 20 else 0.3)
                    lab.promote(cycle)
            assert guard.state_digest() == promoted
        frozen = lab.events("freeze.entered")[0]
        assert frozen.body["signals"][0]["direction"] == "down"
        assert frozen.body["restored"] == lab.events("snapshot.written")[-1].body["snapshot"]

    def test_the_capsule_holds_the_suspect_state_and_what_was_decided(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            lab.update(cycle)
            with pytest.raises(LoopFrozen):
                lab.update(cycle, factor=math.inf)
            live = {name: tensor.clone() for name, tensor in lab.model.state_dict().items()}
        capsule = read_capsule(lab.run_dir / "freezes" / "f1", lab.events("freeze.entered")[0].body["capsule_digest"])
        assert capsule.decision["rule"] == "bounds:loss"
        suspect = capsule.suspect_state()["learner"]["model"]
        assert all(torch.equal(suspect[name], tensor) for name, tensor in live.items())

    def test_an_attached_optimizer_steps_through_the_guard_alone(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            before = bits(lab.model)
            lab.loss().backward()
            with pytest.raises(UsageError, match="call cycle.update"):
                lab.optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(before, bits(lab.model), strict=True))

    def test_an_update_without_gradients_is_a_usage_error(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            with pytest.raises(UsageError, match="call loss.backward"):
                next(iter(guard.cycles(1))).update(loss=lab.loss())

    def test_deciding_without_stepping_is_refused_for_an_attached_optimizer(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            with pytest.raises(UsageError, match="call cycle.update"):
                next(iter(guard.cycles(1))).decide_update(readings={"loss": 1.0, "grad_norm": 1.0})

    def test_people_who_step_themselves_get_the_decision(self, lab):
        with lab.open() as guard:
            cycle = next(iter(guard.cycles(1)))
            assert cycle.decide_update(readings={"loss": 1.0, "grad_norm": 1.0}).allowed
            with pytest.raises(LoopFrozen, match="not a finite number"):
                cycle.decide_update(readings={"loss": 1.0, "grad_norm": math.nan})


class TestThePromotionGate:
    @pytest.mark.parametrize("correct", [0.95, 0.05, math.nan])
    def test_a_panel_that_moved_too_much_leaves_the_actor_as_it_was(self, lab, correct):
        with lab.open() as guard:
            lab.build(guard)
            with pytest.raises(LoopFrozen):
                for cycle in guard.cycles(2):
                    actor = guard.actor_digest
                    lab.update(cycle)
                    lab.promote(cycle, correct=0.5 if cycle.number == 1 else correct)
            assert guard.actor_digest == actor
            assert torch.equal(lab.actor[0].weight, lab.model[0].weight), "the model went back to what is promoted"

    def test_apply_runs_on_allow_alone(self, lab):
        called = []
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            with pytest.raises(LoopFrozen):
                cycle.promote({"correct": 7.0}, apply=lambda: called.append(1))
        assert called == []

    def test_an_apply_that_installs_something_else_freezes(self, lab):
        """Half-installed weights must not act."""
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            lab.update(cycle)
            with pytest.raises(LoopFrozen, match="apply failed"):
                cycle.promote({"correct": 0.5}, apply=lambda: None)

    def test_a_model_that_is_its_own_actor_goes_back_before_it_generates(self, lab):
        with lab.open() as guard:
            lab.build(guard, actor=False)
            for cycle in guard.cycles(2):
                generates = guard.actor_digest
                lab.update(cycle)
                if cycle.number == 1:
                    cycle.promote({"correct": 0.5})
                    promoted = guard.actor_digest
            assert generates == promoted
            assert guard.actor_digest == promoted, "cycle 2 was not promoted, so its weights never act"


class TestTools:
    def test_a_refused_call_never_reaches_the_sandbox(self, lab):
        seen = []
        lab.respond = lambda call: seen.append(call.code) or "4"
        with lab.open() as guard:
            outcomes = next(iter(guard.cycles(1))).tool("python").map(["print(2+2)", "import os", "print(1)"])
        assert [o.status for o in outcomes] == ["ok", "denied", "ok"]
        assert sorted(seen) == ["print(1)", "print(2+2)"]
        assert "calculator" not in outcomes[1].text

    def test_a_call_is_decided_on_disk_before_it_runs(self, lab):
        on_disk = []
        lab.respond = lambda call: on_disk.append([e.body["call"] for e in lab.events("tool.decided")]) or "4"
        with lab.open() as guard:
            next(iter(guard.cycles(1))).tool("python")("print(1)")
        assert len(on_disk[0]) == 1

    def test_too_many_refusals_freeze_and_the_tool_says_denied_rather_than_raise(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            outcomes = cycle.tool("python").map(["import os"] * 10 + ["print(1)"] * 200)
            assert {o.status for o in outcomes} == {"denied"}
            with pytest.raises(LoopFrozen, match="refused"):
                lab.update(cycle)

    def test_a_dead_sandbox_is_an_error_and_is_recorded_as_lost(self, lab):
        lab.respond = lambda call: SandboxUnavailableError("the cell died")
        with lab.open() as guard:
            cycle = next(iter(guard.cycles(1)))
            with pytest.raises(SandboxUnavailableError, match="the cell died"):
                cycle.tool("python")("print(1)")
        assert len(lab.events("tool.lost")) == 1

    def test_contained_calls_above_the_rate_freeze(self, lab):
        lab.respond = lambda call: Outcome(call_id=call.id, status="oom")
        with lab.open() as guard:
            cycle = next(iter(guard.cycles(1)))
            cycle.tool("python").map(["print(1)"] * 3)
            with pytest.raises(LoopFrozen, match="contained"):
                cycle.admit([])


class TestAdmission:
    def test_what_is_quarantined_can_be_listed_with_its_reason(self, lab):
        with lab.open() as guard:
            admitted = next(iter(guard.cycles(1))).admit([record(1), record(2), record(3, prompt="<<"), record(4)])
        assert [r.id for r in admitted.records] == ["r1", "r2", "r4"]
        rows = (lab.run_dir / "quarantine" / "cycle-0001.jsonl").read_text().splitlines()
        assert [(json.loads(row)["id"], json.loads(row)["reason"]) for row in rows] == [("r3", "forbidden_in_prompt")]

    def test_checks_run_again_in_the_sandbox_and_freeze_when_they_do_not_hold(self, lab):
        with lab.open() as guard, pytest.raises(LoopFrozen, match="do not hold"):
            next(iter(guard.cycles(1))).admit([record(n, expected="5") for n in range(4)])
        assert not lab.events("data.admitted")

    def test_a_freeze_while_checks_run_again_is_one_freeze(self, lab):
        lab.respond = lambda call: Outcome(call_id=call.id, status="timeout")
        with lab.open() as guard, pytest.raises(LoopFrozen, match="contained"):
            next(iter(guard.cycles(1))).admit([record(n) for n in range(4)])
        assert len(lab.events("freeze.entered")) == 1
        assert not lab.events("data.admitted")

    def test_a_verifier_whose_sandbox_died_admits_nothing(self, lab):
        lab.respond = lambda call: SandboxUnavailableError("gone")
        with lab.open() as guard, pytest.raises(SandboxUnavailableError):
            next(iter(guard.cycles(1))).admit([record(1)])
        assert not lab.events("data.admitted")


class TestAcrossStarts:
    def test_a_second_start_goes_on_from_the_last_promoted_state(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 4)
            whole = guard.state_digest()
        lab.run_dir = lab.run_dir.with_name("other")
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 2)
        with lab.open() as guard:
            lab.build(guard)
            assert guard.promoted_cycle == 2
            lab.run(guard, 4)
            assert guard.state_digest() == whole

    def test_an_open_lease_is_settled_and_the_run_goes_on(self, lab):
        guard = lab.build(lab.open())
        for cycle in guard.cycles(2):
            for _ in range(6):
                lab.update(cycle)
            if cycle.number == 2:
                break
            lab.promote(cycle)
        epoch = guard._log.epoch
        guard._good.wait()
        guard._log.close()  # what a kill leaves: nothing was flushed
        with lab.open() as again:
            assert any("updates" in sentence for sentence in again.found)
            assert not again.frozen
            assert again._log.epoch > epoch
            lab.build(again)
            assert next(iter(again.cycles(2))).number == 2
        assert lab.events("update.settled")[0].body["restored"] == lab.events("snapshot.written")[0].body["snapshot"]
        assert verify(lab.run_dir).code == 20

    def test_a_frozen_run_is_still_frozen_after_a_restart(self, lab):
        with lab.open() as guard, pytest.raises(LoopFrozen):
            lab.build(guard)
            lab.update(next(iter(guard.cycles(1))), factor=math.nan)
        with lab.open() as again:
            lab.build(again)
            with pytest.raises(LoopFrozen, match="f1"):
                next(iter(again.cycles(1)))

    def test_removing_the_latch_does_not_thaw(self, lab):
        self.test_a_frozen_run_is_still_frozen_after_a_restart(lab)
        (lab.run_dir / "latch").unlink()
        with lab.open() as guard, pytest.raises(LoopFrozen):
            next(iter(guard.cycles(1)))

    def test_a_latch_from_outside_freezes_at_the_next_gate(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            lab.update(cycle)
            (lab.run_dir / "latch").write_text("{}")
            with pytest.raises(LoopFrozen):
                lab.update(cycle)
        assert standing(lab.run_dir).acknowledged

    def test_a_request_from_outside_freezes_and_names_who_asked(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            submit(lab.run_dir, "freeze", by="dana", reason="looks wrong")
            with pytest.raises(LoopFrozen, match="dana asked for it: looks wrong"):
                lab.update(cycle)

    def test_waiting_for_a_resume_discards_the_cycle_and_starts_it_again(self, lab, monkeypatch):
        lab.policy.write_text(POLICY.replace("when_frozen: raise", "when_frozen: wait"))
        import loopguard.controller.guard

        naps = []

        def nap(seconds):
            naps.append(seconds)
            if len(naps) == 3:
                submit(lab.run_dir, "resume", by="dana", reason="shard 17 removed", freeze="f1")

        monkeypatch.setattr(loopguard.controller.guard.time, "sleep", nap)
        with lab.open() as guard:
            lab.build(guard)
            numbers = []
            for cycle in guard.cycles(2):
                numbers.append(cycle.number)
                faulty = len(numbers) == 2
                results = [lab.update(cycle, factor=math.nan if faulty and n == 1 else 1.0).result for n in range(3)]
                assert results == (["allow", "freeze", "deny"] if faulty else ["allow"] * 3)
                lab.promote(cycle)
        assert numbers == [1, 2, 2]
        assert lab.events("resume.applied")[0].body["by"] == "dana"
        assert verify(lab.run_dir).code == 20

    def test_a_resume_meant_for_another_freeze_lifts_nothing(self, lab):
        self.test_a_frozen_run_is_still_frozen_after_a_restart(lab)
        submit(lab.run_dir, "resume", by="dana", reason="old news", freeze="f0")
        with lab.open() as guard, pytest.raises(LoopFrozen):
            next(iter(guard.cycles(1)))

    def test_exit_ends_with_4_and_under_torchrun_with_0(self, lab, monkeypatch):
        lab.policy.write_text(POLICY.replace("when_frozen: raise", "when_frozen: exit"))
        with lab.open() as guard, pytest.raises(SystemExit) as left:
            lab.build(guard)
            lab.update(next(iter(guard.cycles(1))), factor=math.nan)
        assert left.value.code == 4
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        with lab.open() as guard, pytest.raises(SystemExit) as left:
            next(iter(guard.cycles(1)))
        assert left.value.code == 0

    def test_a_pointer_that_no_promotion_names_comes_up_frozen(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1)
        pointer = lab.run_dir / "snapshots" / "promoted.json"
        body = json.loads(pointer.read_text())
        pointer.write_text(json.dumps(body | {"snapshot": "0" * 64}))
        with lab.open() as guard:
            assert guard.frozen

    def test_a_damaged_snapshot_is_refused_by_name(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1)
        blob = next((lab.run_dir / "snapshots").glob("*/state.safetensors"))
        blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
        with lab.open() as guard, pytest.raises(SnapshotError, match="not what the manifest says"):
            lab.build(guard)

    def test_ctrl_c_leaves_a_finished_record(self, lab):
        with pytest.raises(KeyboardInterrupt), lab.open() as guard:
            lab.build(guard)
            for cycle in guard.cycles(1):
                lab.update(cycle)
                raise KeyboardInterrupt
        assert [e.type for e in lab.events("run.interrupted", "run.finished")] == ["run.interrupted"]
        with lab.open() as guard:
            lab.build(guard)
            lab.run(guard, 1)
        assert verify(lab.run_dir).code == 20


class TestTheRunDirectory:
    def test_has_one_owner(self, lab):
        with lab.open(), pytest.raises(RunBusyError, match="in use by process"):
            lab.open()

    def test_belongs_to_one_policy(self, lab):
        lab.open().close()
        lab.policy.write_text(POLICY.replace("max_loss: 0.2", "max_loss: 0.1"))
        with pytest.raises(PolicyMismatchError, match="--adopt-policy ([0-9a-f]{64})") as refused:
            lab.open()
        digest = str(refused.value).split()[-1]
        lab.open(adopt_policy=digest).close()
        assert lab.events("policy.adopted")[0].body["change"] == "tightened"
        lab.open().close()

    def test_a_looser_policy_needs_a_name_and_a_reason(self, lab):
        lab.open().close()
        lab.policy.write_text(POLICY.replace("max_loss: 0.2", "max_loss: 0.3"))
        with pytest.raises(PolicyMismatchError) as refused:
            lab.open()
        digest = str(refused.value).split()[-1]
        with pytest.raises(PolicyMismatchError, match="--by NAME --reason TEXT"):
            lab.open(adopt_policy=digest)
        lab.open(adopt_policy=digest, by="dana", reason="noisier eval").close()

    def test_must_not_hold_something_else(self, lab):
        lab.run_dir.mkdir()
        (lab.run_dir / "thesis.tex").write_text("")
        with pytest.raises(UsageError, match="holds something else than a run"):
            lab.open()

    def test_is_not_begun_where_there_is_no_sandbox(self, lab):
        """Nothing is half-written."""

        class NoEngine(FakeRuntime):
            def start(self):
                raise SandboxUnavailableError("no Docker engine answers")

        with pytest.raises(SandboxUnavailableError):
            LoopGuard.from_file(lab.policy, run_dir=lab.run_dir, runtimes=lambda *_: NoEngine(lambda _: ""))
        assert not lab.run_dir.exists()


class TestAttach:
    @pytest.mark.parametrize(
        ("what", "match"),
        [
            ({"model": object()}, "models of these packages can be guarded: torch"),
            ({"optimizer": None}, "needs a trainer, or model=... and optimizer="),
            ({"optimizer": "adam"}, "got a str"),
            ({"actor": 3}, "got a int"),
        ],
    )
    def test_what_cannot_be_guarded_is_refused_in_a_sentence(self, lab, what, match):
        model = torch.nn.Linear(2, 1)
        with lab.open() as guard, pytest.raises(UsageError, match=match):
            guard.attach(**{"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **what})

    def test_an_actor_of_another_shape_is_refused(self, lab):
        model = torch.nn.Linear(2, 1)
        with lab.open() as guard, pytest.raises(UsageError, match="other parameters than the model"):
            actor = torch.nn.Sequential(model)
            guard.attach(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), actor=actor)

    def test_several_optimizers_are_decided_and_step_together(self, lab):
        with lab.open() as guard:
            first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
            model = torch.nn.Sequential(first, second)
            optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (first, second)]
            guard.attach(model=model, optimizer=optimizers)
            cycle = next(iter(guard.cycles(1)))
            before = [first.weight.clone(), second.weight.clone()]
            loss = model(torch.ones(1, 2)).square().mean() + 1
            loss.backward()
            cycle.update(loss=loss)
            assert not torch.equal(before[0], first.weight)
            assert not torch.equal(before[1], second.weight)


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no distributed package with gloo",
)
class TestShardsOnOneRank:
    """FSDP2 with nobody to share with: nothing of such a state could be kept."""

    @pytest.fixture
    def shards(self):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = fully_shard(torch.nn.Linear(2, 1), mesh=init_device_mesh("cpu", (1,)))
        yield {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}
        dist.destroy_process_group()

    def test_attach_says_what_to_do_and_holds_nothing(self, lab, shards):
        with lab.open() as guard:
            with pytest.raises(UsageError, match=r"weight is sharded .* with several, as `torchrun .* or do not shard"):
                guard.attach(**shards)
            before = shards["model"].weight.to_local().detach().clone()
            shards["model"](torch.ones(1, 2)).sum().backward()
            shards["optimizer"].step()  # nobody is asked about it
            assert not torch.equal(shards["model"].weight.to_local(), before)
            lab.build(guard)
        assert len(lab.events("model.attached")) == 1

    def test_an_observer_which_keeps_nothing_takes_it(self, tmp_path, shards):
        with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
            observer.attach(**shards)
            for cycle in observer.cycles(1):
                loss = shards["model"](torch.ones(1, 2)).square().sum()
                loss.backward()
                assert cycle.update(loss=loss).allowed


class TestWithoutTools:
    """Under a guard policy without `tools` and `sandbox` a loop is guarded as any other, and has no sandbox."""

    @pytest.fixture
    def lab(self, lab):
        """Real cells, if there were any: the engine is nowhere."""
        data = POLICY[POLICY.index("data:") :].replace("  recheck: {sample: 4, max_wrong_share: 0.25}\n", "")
        lab.policy.write_text(POLICY[: POLICY.index("tools:")] + data)
        return lab

    @pytest.fixture
    def guard(self, lab, monkeypatch):
        monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            yield lab.build(guard)

    def test_a_loop_trains_promotes_and_freezes_without_an_engine(self, lab, guard):
        lab.run(guard, 2)
        assert guard.promoted_cycle == 2
        with pytest.raises(LoopFrozen, match="not a finite number"):
            lab.update(next(guard.cycles(3)), math.nan)
        assert not lab.events("sandbox.created")

    def test_every_call_is_refused_and_recorded(self, lab, guard):
        tool = next(guard.cycles(1)).tool("python")
        outcomes = [tool("print(1)"), *tool.map(["1", "2"])]
        assert [outcome.status for outcome in outcomes] == ["denied"] * 3
        decided = lab.events("tool.decided")
        assert [(entry.body["result"], entry.body["rule"]) for entry in decided] == [("deny", "default")] * 3

    def test_an_episode_has_no_profile_to_be_in(self, guard):
        with pytest.raises(UsageError, match=r"lets a tool run in 'rollout'; it has no tools"):
            next(guard.cycles(1)).episode("rollout")

    def test_a_function_is_told_which_sections_to_add(self, guard, lab, tmp_path):
        """With these lines the policy loads, and the function has a rule."""

        def lookup(word: str) -> str:
            """What a word means."""
            return word

        with pytest.raises(UsageError, match="has no tools") as told:
            guard.tool(lookup)
        _, _, sections = str(told.value).partition("\n\n")
        (tmp_path / "more.yaml").write_text(f"{lab.policy.read_text()}{sections}\n")
        with LoopGuard.from_file(
            tmp_path / "more.yaml", run_dir=tmp_path / "more", runtimes=lambda *_: FakeRuntime("4")
        ) as more:
            assert more.tool(lookup).__name__ == "lookup"

    def test_a_station_is_refused_before_it_has_a_directory(self, lab):
        with pytest.raises(UsageError, match="lets no tool run"):
            ToolStation.open(lab.policy, run_dir=lab.run_dir)
        assert not lab.run_dir.exists()
