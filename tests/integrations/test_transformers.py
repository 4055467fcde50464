"""transformers' Trainer under a guard: what is withheld never was, and a guard that is quiet changes no bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
transformers = pytest.importorskip("transformers", reason="these are trainers of transformers")
pytest.importorskip("accelerate", reason="a Trainer needs accelerate")

from trainer_kit import WARNINGS, Diary, batches, make_trainer, nan, same, state_of
from trainer_lab import BOUNDS, EVAL_LOSS, SKIP, TrainerLab

from loopguard.cli.app import _main
from loopguard.errors import LoopFrozen, UsageError
from loopguard.integrations.torch.digest import sha256
from loopguard.snapshots import read_capsule

pytestmark = [pytest.mark.train, *(pytest.mark.filterwarnings(one) for one in WARNINGS)]

FINITE = "{kind: bounds, metric: loss}, {kind: bounds, metric: grad_norm, min: 0}"
STRICT = "{metric: eval_loss, good: down, min: 0, max_gain: 50, max_loss: 0.001}"
OPTIMS = ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"]


@pytest.fixture
def lab(tmp_path):
    return TrainerLab(tmp_path)


class TestTheVeto:
    @pytest.mark.parametrize("optim", OPTIMS)
    @pytest.mark.parametrize("bad", [nan, 50.0])
    @pytest.mark.parametrize("at", [0, 3])
    def test_a_withheld_batch_never_was(self, lab, optim, bad, at):
        """Weights, optimizer state and schedule are to the bit those of a run that never had the batch."""
        lab.write(freeze=SKIP)
        spoiled = lab.train(make_trainer(lab.tmp_path, batches(6, {at: bad}), optim=optim))
        never = make_trainer(lab.tmp_path, batches(6, without={at}), optim=optim)
        never.train()
        assert same(state_of(spoiled), state_of(never))
        (skipped,) = lab.events("update.skipped")
        assert skipped.body["update"] == at + 1

    @pytest.mark.parametrize("bad", [nan, 50.0])
    def test_with_accumulation_the_whole_update_is_withheld(self, lab, bad):
        lab.write(freeze=SKIP)
        rows = batches(6, {2: bad})
        spoiled = lab.train(make_trainer(lab.tmp_path, rows, gradient_accumulation_steps=2))
        never = make_trainer(lab.tmp_path, batches(6, without={2, 3}), gradient_accumulation_steps=2)
        never.train()
        assert same(state_of(spoiled), state_of(never))

    def test_a_freeze_ends_train_before_the_weights_move(self, lab):
        trainer = make_trainer(lab.tmp_path, batches(6, {3: nan}))
        with pytest.raises(LoopFrozen, match="loss"):
            lab.train(trainer)
        before = make_trainer(lab.tmp_path, batches(3))
        before.train()
        assert same(state_of(trainer), state_of(before))
        assert lab.events("update.withheld")[0].body["readings"]["loss"] == "NaN"
        assert trainer.state.global_step == 3

    def test_the_loss_is_read_where_it_arises_and_not_where_it_is_logged(self, lab):
        """The trainer's own log shows a number for the update whose loss is not one."""
        lab.write(freeze=SKIP)
        trainer = lab.train(make_trainer(lab.tmp_path, batches(4, {2: nan}), logging_steps=1))
        shown = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert all(value == value for value in shown)
        assert lab.events("update.skipped")[0].body["readings"]["loss"] == "NaN"

    def test_readings_are_the_loss_of_the_update_and_the_norm_before_clipping(self, lab):
        norms = []

        class Reader(transformers.TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                norms.extend([logs["grad_norm"]] if "grad_norm" in logs else [])

        trainer = make_trainer(
            lab.tmp_path,
            batches(4),
            gradient_accumulation_steps=2,
            max_grad_norm=0.01,
            logging_steps=1,
            callbacks=[Reader()],
        )
        lab.train(trainer)
        (applied,) = lab.events("update.applied")
        shown = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert applied.body["readings"]["loss"] == pytest.approx(shown, abs=1e-4)
        assert applied.body["readings"]["grad_norm"] == pytest.approx(norms, rel=1e-5)
        assert min(norms) > 0.01

    def test_batches_that_are_no_dicts_are_kept_as_they_are(self, lab):
        trainer = make_trainer(lab.tmp_path, batches(4, {3: nan}))
        trainer.data_collator = lambda rows: [torch.stack([row["input_ids"] for row in rows]), rows[0]["w"]]
        trainer.floating_point_ops = lambda inputs: 0
        trainer.compute_loss = lambda model, inputs, **_: model(input_ids=inputs[0], labels=inputs[0]).loss * inputs[1]
        with pytest.raises(LoopFrozen, match="loss"):
            lab.train(trainer)
        capsule = read_capsule(lab.run_dir / "freezes" / "f1")
        assert [len(update.batches) for update in capsule.updates()] == [1, 1, 1, 1]

    def test_a_stray_step_around_the_gate_moves_nothing(self, lab):
        class Stray(transformers.TrainerCallback):
            def on_substep_end(self, args, state, control, optimizer=None, **kwargs):
                optimizer.optimizer.step()

        trainer = make_trainer(lab.tmp_path, batches(4), gradient_accumulation_steps=2, callbacks=[Stray()])
        with pytest.raises(UsageError, match="attached to a LoopGuard"):
            lab.train(trainer)


class TestAQuietGuard:
    @pytest.mark.parametrize("optim", OPTIMS)
    def test_leaves_the_run_as_it_is_to_the_bit(self, lab, optim):
        guarded = lab.train(make_trainer(lab.tmp_path, batches(6), optim=optim))
        bare = make_trainer(lab.tmp_path, batches(6), optim=optim)
        bare.train()
        assert same(state_of(guarded), state_of(bare))

    @pytest.mark.parametrize(
        "arguments",
        [
            {"gradient_accumulation_steps": 2},
            {"bf16": True},
            {"max_grad_norm": 0.0},
            {"max_grad_norm": float("inf")},
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "lr_scheduler_kwargs": None,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "metric_for_best_model": "loss",
            },
            {"num_train_epochs": 2, "eval_strategy": "epoch"},
        ],
        ids=lambda arguments: next(iter(arguments)),
    )
    def test_also_so(self, lab, arguments):
        lab.write(panel=EVAL_LOSS)
        rows = {"eval_rows": batches(1)} if "eval_strategy" in arguments else {}
        guarded = lab.train(make_trainer(lab.tmp_path, batches(6), **rows, **arguments))
        bare = make_trainer(lab.tmp_path, batches(6), **rows, **arguments)
        bare.train()
        assert same(state_of(guarded), state_of(bare))
        assert [{**row, "train_runtime": 0} for row in _told(guarded)] == [
            {**row, "train_runtime": 0} for row in _told(bare)
        ]

    @pytest.mark.parametrize("accumulated", [1, 2])
    def test_also_with_a_gradient_scaler_whose_first_scale_is_too_large(self, lab, monkeypatch, accumulated):
        """Its overflows are no updates, and tick no schedule."""

        def scaled(folder):
            trainer = make_trainer(folder, batches(12), optim="sgd", gradient_accumulation_steps=accumulated)
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
            trainer.accelerator.native_amp = True
            monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
            return trainer

        guarded = lab.train(scaled(lab.tmp_path))
        bare = scaled(lab.tmp_path)
        bare.train()
        assert same(state_of(guarded), state_of(bare))
        assert guarded.accelerator.scaler.state_dict() == bare.accelerator.scaler.state_dict()
        told = lab.events("update.applied", "update.overflowed")
        overflows = sum(entry.body.get("overflows", entry.body.get("count")) for entry in told)
        assert overflows == 12 // accumulated - guarded.lr_scheduler.state_dict()["last_epoch"] > 0

    def test_takes_the_guard_off_when_training_is_over(self, lab):
        """The optimizer steps as before, and a second `train()` is guarded again."""
        trainer = make_trainer(lab.tmp_path, batches(2))
        with lab.open() as guard:
            guard.attach(trainer)
            trainer.train()
            trainer.optimizer.optimizer.step()
            trainer.train_dataset = batches(2, {0: nan})
            with pytest.raises(LoopFrozen, match="loss is nan"):
                trainer.train()


def _told(trainer):
    speeds = ("runtime", "per_second")
    return [{k: v for k, v in row.items() if not k.endswith(speeds)} for row in trainer.state.log_history]


class TestPromotion:
    def test_each_evaluation_is_a_promotion(self, lab):
        lab.write(panel=EVAL_LOSS)
        trainer = make_trainer(lab.tmp_path, batches(6), eval_rows=batches(1), eval_strategy="steps", eval_steps=2)
        lab.train(trainer)
        decided = lab.events("promotion.decided")
        shown = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        assert [entry.body["result"] for entry in decided] == ["allow"] * 3
        assert [entry.body["panel"]["eval_loss"] for entry in decided] == shown
        assert set(decided[0].body["panel"]) == {"eval_loss"}
        assert [entry.body["update"] for entry in lab.events("snapshot.written")] == [2, 4, 6]

    def test_a_loss_of_capability_freezes_and_goes_back(self, lab):
        """The updates since the last promotion are undone; the weights are those that were promoted."""
        lab.write(monitors=FINITE, panel=STRICT)
        ruin = {4: -60.0}  # ascends
        diary = Diary()
        trainer = make_trainer(
            lab.tmp_path,
            batches(8, ruin),
            eval_rows=batches(1),
            eval_strategy="steps",
            eval_steps=3,
            learning_rate=3.0,
            optim="sgd",
            callbacks=[diary],
        )
        with pytest.raises(LoopFrozen, match="eval_loss"):
            lab.train(trainer)
        assert same(state_of(trainer), diary.after[2])

    def test_the_last_updates_are_measured_before_they_are_promoted(self, lab):
        """Five updates and an evaluation after every two: the fifth is evaluated at the end."""
        lab.write(panel=EVAL_LOSS)
        lab.train(make_trainer(lab.tmp_path, batches(5), eval_rows=batches(1), eval_strategy="steps", eval_steps=2))
        assert [entry.body["update"] for entry in lab.events("snapshot.written")] == [2, 4, 5]

    def test_without_an_evaluation_nothing_is_promoted_and_the_log_says_so(self, lab):
        lab.write(panel=EVAL_LOSS)
        trainer = lab.train(make_trainer(lab.tmp_path, batches(3)))
        bare = make_trainer(lab.tmp_path, batches(3))
        bare.train()
        assert same(state_of(trainer), state_of(bare))
        assert lab.events("cycle.finished")[-1].body["result"] == "not promoted"
        assert not lab.events("promotion.decided")

    def test_the_last_evaluation_is_of_the_last_weights_and_not_of_the_best_that_are_loaded_then(self, lab):
        lab.write(panel=EVAL_LOSS)
        digests = Digests()
        best = {"save_strategy": "best", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
        trainer = make_trainer(lab.tmp_path, batches(6), eval_rows=batches(1), callbacks=[digests], **best, **EVERY_TWO)
        lab.train(trainer)
        assert digest(trainer.model) == digests.after[1]  # the first evaluation was the best
        decided = [entry.body["weights"] for entry in lab.events("promotion.decided")]
        assert decided == digests.after[1::2]


SAVING = {"save_strategy": "steps", "save_steps": 2}
EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2}


class TestCheckpoints:
    def test_a_resume_while_frozen_comes_up_frozen(self, lab):
        """And no weight moves."""
        with pytest.raises(LoopFrozen):
            lab.train(make_trainer(lab.tmp_path, batches(6, {3: nan}), **SAVING))
        before = len(lab.events("update.applied", "update.leased"))
        again = make_trainer(lab.tmp_path, batches(6), **SAVING)
        with pytest.raises(LoopFrozen):
            lab.train(again, resume_from_checkpoint=True)
        reference = make_trainer(lab.tmp_path, batches(2), **SAVING)
        reference.train()
        assert same(state_of(again)[0], state_of(reference)[0])  # the trainer loads it before it asks anybody
        assert len(lab.events("update.applied", "update.leased")) == before

    def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(self, lab):
        whole = lab.train(make_trainer(lab.tmp_path, batches(8), **SAVING))
        shutil.rmtree(lab.run_dir)
        shutil.rmtree(lab.tmp_path / "trainer")

        class Killed(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 5:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lab.train(make_trainer(lab.tmp_path, batches(8), callbacks=[Killed()], **SAVING))
        again = lab.train(make_trainer(lab.tmp_path, batches(8), **SAVING), resume_from_checkpoint=True)
        assert same(state_of(again), state_of(whole))
        (loaded,) = lab.events("checkpoint.loaded")
        assert loaded.body["update"] == 4
        assert lab.events("update.applied")[-1].body["to"] == 8

    def test_the_monitors_go_on_where_the_checkpoint_left_them(self, lab):
        lab.write(monitors=BOUNDS % "1000" + ", {kind: jump, metric: loss}")
        lab.train(make_trainer(lab.tmp_path, batches(4), **SAVING))
        kept = json.loads((lab.tmp_path / "trainer" / "checkpoint-4" / "loopguard.json").read_text())
        again = make_trainer(lab.tmp_path, batches(6), **SAVING)
        with lab.open() as guard:
            guard.attach(again)

            class Look(transformers.TrainerCallback):
                def on_step_begin(self, args, state, control, **kwargs):
                    states.append(guard._updates_gate.state_dict())

            states = []
            again.add_callback(Look())
            again.train(resume_from_checkpoint=True)
        assert json.loads(json.dumps(states[0])) == kept["update_gate"]

    def test_weights_of_a_checkpoint_that_nobody_saved_freeze(self, lab):
        lab.train(make_trainer(lab.tmp_path, batches(4), **SAVING))
        other = make_trainer(lab.tmp_path, batches(4, {1: 2.0}), **SAVING)
        other.train()  # without a guard, over the same checkpoints
        again = make_trainer(lab.tmp_path, batches(6), **SAVING)
        with pytest.raises(LoopFrozen, match="never saved"):
            lab.train(again, resume_from_checkpoint=True)

    @pytest.mark.parametrize("undone", [4, 6])
    def test_a_checkpoint_that_a_freeze_undid_is_put_back_and_the_data_go_on(self, lab, undone):
        """The run froze at update 6 and went back to 3. The checkpoint of 6 was written right before the freeze."""
        lab.write(monitors=FINITE, panel=STRICT)
        arguments = {
            "eval_rows": batches(1),
            "eval_strategy": "steps",
            "eval_steps": 3,
            "learning_rate": 3.0,
            "optim": "sgd",
            **SAVING,
        }
        diary = Diary()
        with pytest.raises(LoopFrozen):
            lab.train(make_trainer(lab.tmp_path, batches(8, {4: -60.0}), callbacks=[diary], **arguments))
        assert _main(["resume", str(lab.run_dir), "--by", "dana", "--reason", "ruined batch removed"]) == 0
        second = Diary()
        again = make_trainer(lab.tmp_path, batches(8), callbacks=[second], **arguments)
        lab.train(again, resume_from_checkpoint=str(lab.tmp_path / "trainer" / f"checkpoint-{undone}"))
        assert same(second.before[0][0], diary.after[2][0])
        assert again.state.global_step == 8
        assert "undid" in lab.events("snapshot.restored")[-1].body["because"]

    def test_a_state_that_was_accepted_is_trained_on_from(self, lab):
        """Whatever checkpoint the trainer loads: people have decided, and the optimizer comes with the weights."""
        lab.write(monitors=FINITE, panel=STRICT)
        arguments = {
            "eval_rows": batches(1),
            "eval_strategy": "steps",
            "eval_steps": 3,
            "learning_rate": 3.0,
            "optim": "sgd",
            **SAVING,
        }
        with pytest.raises(LoopFrozen):
            lab.train(make_trainer(lab.tmp_path, batches(8, {4: -60.0}), **arguments))
        words = ["--by", "dana", "--reason", "a harder batch, as planned", "--disposition", "accept", "--waive", "5"]
        assert _main(["resume", str(lab.run_dir), *words]) == 0
        suspect = read_capsule(lab.run_dir / "freezes" / "f1").suspect_state()["learner"]["model"]
        second = Diary()
        again = make_trainer(lab.tmp_path, batches(8), callbacks=[second], **arguments)
        lab.train(again, resume_from_checkpoint=True)
        assert same(second.before[0][0], [suspect[name] for name in again.model.state_dict()])
        assert again.state.global_step == 8

    def test_the_checkpoint_that_a_freeze_went_back_to_is_as_good_as_before(self, lab):
        lab.write(monitors=FINITE, panel=STRICT)
        arguments = {"eval_rows": batches(1), "learning_rate": 3.0, "optim": "sgd", **EVERY_TWO, **SAVING}
        with pytest.raises(LoopFrozen):
            lab.train(make_trainer(lab.tmp_path, batches(4, {2: -60.0, 3: -60.0}), **arguments))
        assert _main(["resume", str(lab.run_dir), "--by", "dana", "--reason", "ruined batch removed"]) == 0
        again = make_trainer(lab.tmp_path, batches(4), **arguments)
        lab.train(again, resume_from_checkpoint=str(lab.tmp_path / "trainer" / "checkpoint-2"))
        assert lab.events("checkpoint.loaded")[-1].body["update"] == 2

    def test_a_checkpoint_is_recorded_where_anybody_finds_it(self, lab, monkeypatch):
        """Whoever prunes the log stands in another folder than the loop did, and keeps what is still there."""
        monkeypatch.chdir(lab.tmp_path)
        lab.train(make_trainer(lab.tmp_path, batches(4), output_dir="out", **SAVING))
        saved = lab.events("checkpoint.saved")
        assert saved
        assert {entry.body["checkpoint"].rpartition("/")[0] for entry in saved} == {str(lab.tmp_path / "out")}

    def test_a_checkpoint_of_after_the_promotion_that_a_person_went_back_to_is_put_back(self, lab):
        """Else `--rollback` and `resume_from_checkpoint=True` together would undo the rollback."""
        lab.write(panel=EVAL_LOSS)
        arguments = {"eval_rows": batches(1), **EVERY_TWO, **SAVING}
        diary, second = Diary(), Diary()
        lab.train(make_trainer(lab.tmp_path, batches(6), callbacks=[diary], **arguments))
        assert _main(["rollback", str(lab.run_dir), "--to", "1", "--by", "dana", "--reason", "it cheats"]) == 0
        again = make_trainer(lab.tmp_path, batches(8), callbacks=[second], **arguments)
        lab.train(again, resume_from_checkpoint=True)
        assert same(second.before[0], diary.after[1])
        assert again.state.global_step == 8

    def test_update_numbers_that_start_again_are_of_another_epoch(self, lab):
        """A finished run is taken up again at an earlier checkpoint."""
        lab.train(make_trainer(lab.tmp_path, batches(4), **SAVING))
        again = make_trainer(lab.tmp_path, batches(4), **SAVING)
        lab.train(again, resume_from_checkpoint=str(lab.tmp_path / "trainer" / "checkpoint-2"))
        applied = [(entry.epoch, entry.body["from"], entry.body["to"]) for entry in lab.events("update.applied")]
        assert applied == [(0, 1, 2), (0, 3, 4), (1, 3, 4)]

    def test_a_training_that_broke_off_goes_on_in_the_same_process(self, lab):
        """What it had applied is in the log before the checkpoint is."""

        class Once(transformers.TrainerCallback):
            broken = False

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 3 and not self.broken:
                    self.broken = True
                    raise RuntimeError("the metrics server is down")

        trainer = make_trainer(lab.tmp_path, batches(4), callbacks=[Once()], **SAVING)
        with lab.open() as guard:
            guard.attach(trainer)
            with pytest.raises(RuntimeError):
                trainer.train()
            trainer.train(resume_from_checkpoint=True)
        told = [entry.body["to"] for entry in lab.events("update.applied")]
        assert told == [2, 3, 4]
        third, loaded = lab.events("update.applied")[1], lab.events("checkpoint.loaded")[0]
        assert third.seq < loaded.seq

    def test_what_the_monitors_knew_belongs_to_the_weights_it_lies_beside(self, lab):
        lab.train(make_trainer(lab.tmp_path, batches(4), **SAVING))
        folder = lab.tmp_path / "trainer"
        shutil.copy(folder / "checkpoint-2" / "loopguard.json", folder / "checkpoint-4" / "loopguard.json")
        with pytest.raises(UsageError, match="not what this run wrote beside these weights"):
            lab.train(make_trainer(lab.tmp_path, batches(6), **SAVING), resume_from_checkpoint=True)

    def test_promoted_weights_without_their_checkpoint_still_have_what_the_monitors_knew(self, lab):
        """As where another process trains on the model that was saved last."""
        lab.write(monitors=BOUNDS % "1000" + ", {kind: jump, metric: loss}", panel=EVAL_LOSS)
        with lab.open() as guard:
            first = make_trainer(lab.tmp_path, batches(4), eval_rows=batches(1))
            guard.attach(first)
            first.train()
            knew = guard._updates_gate.state_dict()
        with lab.open() as guard:
            second = make_trainer(lab.tmp_path, batches(4), eval_rows=batches(1), model=first.model)
            guard.attach(second)

            class Look(transformers.TrainerCallback):
                def on_train_begin(self, args, state, control, **kwargs):
                    states.append(guard._updates_gate.state_dict())

            states = []
            second.add_callback(Look())
            second.train()
        assert states == [knew]

    def test_other_weights_in_the_same_run_directory_are_refused(self, lab):
        lab.train(make_trainer(lab.tmp_path, batches(4)))
        other = make_trainer(lab.tmp_path, batches(4))
        with torch.no_grad():
            next(other.model.parameters()).add_(1)
        with pytest.raises(UsageError, match="name a new run directory"):
            lab.train(other)


class TestGoingOn:
    def test_a_run_that_waits_goes_on_from_the_last_good_weights_when_somebody_resumes_it(self, lab):
        """In the same process: the batch that froze it is gone, and the rest of the data follow."""
        lab.write(freeze="when_frozen: wait")
        trainer = make_trainer(lab.tmp_path, batches(6, {3: nan}))
        diary = Diary()
        trainer.add_callback(diary)
        with somebody_resumes(lab):
            lab.train(trainer)
        assert trainer.state.global_step == 6
        assert same(diary.after[3][0], diary.before[0][0])  # nothing was promoted: back to the beginning
        assert [entry.body["by"] for entry in lab.events("resume.applied")] == ["dana"]
        assert lab.events("update.applied")[-1].body["to"] == 2

    def test_the_norm_of_an_update_that_was_dropped_unjudged_is_not_that_of_the_next(self, lab):
        lab.write(freeze="when_frozen: wait")
        norms = []

        class Freezing(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                norms.append(float(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()])))
                if state.global_step == 2:
                    (lab.run_dir / "latch").write_text("{}")

        trainer = make_trainer(lab.tmp_path, batches(5), callbacks=[Freezing()], max_grad_norm=1e9)
        with somebody_resumes(lab):
            lab.train(trainer)
        read = [norm for entry in lab.events("update.applied") for norm in entry.body["readings"]["grad_norm"]]
        assert read == pytest.approx([*norms[:2], *norms[3:]])

    def test_weights_that_nobody_saved_do_not_train_on_when_there_is_nothing_to_go_back_to(self, lab):
        lab.write(freeze="when_frozen: wait")
        lab.train(make_trainer(lab.tmp_path, batches(4), **SAVING))
        make_trainer(lab.tmp_path, batches(4, {1: 2.0}), **SAVING).train()  # over the same checkpoints
        again = make_trainer(lab.tmp_path, batches(6), **SAVING)
        with somebody_resumes(lab), pytest.raises(UsageError, match="nothing was promoted"):
            lab.train(again, resume_from_checkpoint=True)
        assert again.state.global_step == 4

    def test_a_resume_of_weights_that_nobody_saved_goes_on_from_the_promoted_ones(self, lab):
        lab.write(freeze="when_frozen: wait", panel=EVAL_LOSS)
        arguments = {"eval_rows": batches(1), **EVERY_TWO, **SAVING}
        digests = Digests()
        lab.train(make_trainer(lab.tmp_path, batches(4), **arguments))
        make_trainer(lab.tmp_path, batches(4, {1: 2.0}), **arguments).train()
        again = make_trainer(lab.tmp_path, batches(6), callbacks=[digests], **arguments)
        with somebody_resumes(lab):
            lab.train(again, resume_from_checkpoint=True)
        promoted = [entry.body["weights"] for entry in lab.events("promotion.decided")]
        assert digests.before[0] == promoted[1]
        assert lab.events("model.attached")[-1].body["weights"] == promoted[1]

    def test_a_trainer_can_train_again_where_it_left_off_without_a_promotion(self, lab):
        trainer = make_trainer(lab.tmp_path, batches(3))
        with lab.open() as guard:
            guard.attach(trainer)
            trainer.train()
            trainer.train()
        assert lab.events("update.applied")[-1].body["to"] == 6

    def test_two_trainers_can_follow_each_other_under_one_guard(self, lab):
        """As in expert iteration, where each iteration makes a trainer of its own."""
        with lab.open() as guard:
            first = make_trainer(lab.tmp_path, batches(3), eval_rows=batches(1))
            guard.attach(first)
            first.train()
            second = make_trainer(lab.tmp_path, batches(3), eval_rows=batches(1), model=first.model)
            guard.attach(second)
            second.train()
        assert [entry.body["update"] for entry in lab.events("snapshot.written") if entry.body["promoted"]] == [3, 6]


class Digests(transformers.TrainerCallback):
    """Of the weights before and after each update."""

    def __init__(self):
        self.before, self.after = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(digest(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(digest(model))


def digest(model):
    return sha256([model.state_dict()])


@contextmanager
def somebody_resumes(lab):
    """From another terminal, as soon as the run is frozen."""

    def resume():
        while not (lab.run_dir / "latch").exists() or not lab.events("freeze.entered"):
            time.sleep(0.05)
        command = ["resume", str(lab.run_dir), "--by", "dana", "--reason", "bad row"]
        main = "from loopguard.cli.app import main; main()"
        subprocess.run([sys.executable, "-c", main, *command], check=True, capture_output=True)

    person = threading.Thread(target=resume)
    person.start()
    yield
    person.join()


class TestWhatCannotBeGuarded:
    @pytest.mark.parametrize(
        ("arguments", "why"),
        [({"auto_find_batch_size": True}, "auto_find_batch_size"), ({"optim": "lomo"}, "backward")],
    )
    def test_is_refused_when_it_is_attached(self, lab, arguments, why):
        trainer = make_trainer(lab.tmp_path, batches(2), **arguments)
        with lab.open() as guard, pytest.raises(UsageError, match=why):
            guard.attach(trainer)

    def test_deepspeed_is_refused_and_told_what_can_be_done(self, lab, monkeypatch):
        from accelerate.utils import DistributedType

        trainer = make_trainer(lab.tmp_path, batches(2))
        monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.DEEPSPEED)
        with lab.open() as guard, pytest.raises(UsageError, match="DeepSpeed's engine steps by itself.*observe"):
            guard.attach(trainer)

    def test_a_trial_of_a_hyperparameter_search_is_refused(self, lab):
        trainer = make_trainer(lab.tmp_path, batches(2))
        with lab.open() as guard:
            guard.attach(trainer)
            with pytest.raises(UsageError, match="search without a guard"):
                trainer.train(trial=object())

    def test_updates_of_a_cycle_are_refused_where_evaluations_end_it(self, lab):
        trainer = make_trainer(lab.tmp_path, batches(2))
        with lab.open() as guard, pytest.raises(UsageError, match=r"cycle_updates=3\).*eval_steps"):
            guard.attach(trainer, cycle_updates=3)

    def test_a_closed_guard_trains_nothing(self, lab):
        trainer = make_trainer(lab.tmp_path, batches(2))
        before = state_of(trainer)[0]
        with lab.open() as guard:
            guard.attach(trainer)
        with pytest.raises(UsageError, match="guard is closed"):
            trainer.train()
        assert same(state_of(trainer)[0], before)

    def test_one_trainer_has_one_guard(self, lab):
        trainer = make_trainer(lab.tmp_path, batches(2))
        with lab.open() as guard:
            guard.attach(trainer)
            with pytest.raises(UsageError, match="attached to a guard already"):
                guard.attach(trainer)

    @pytest.mark.parametrize("beside", ["model", "scheduler", "scaler", "averages", "late"])
    def test_what_the_trainer_has_already_is_too_much(self, lab, beside):
        trainer = make_trainer(lab.tmp_path, batches(2))
        with lab.open() as guard, pytest.raises(UsageError, match="leave it out"):
            guard.attach(trainer, **{beside: trainer.model})

    def test_the_cycles_of_a_trainer_are_its_own(self, lab):
        trainer = make_trainer(lab.tmp_path, batches(2))
        with lab.open() as guard:
            guard.attach(trainer)
            with pytest.raises(UsageError, match="call train"):
                guard.cycles(3)

    def test_a_panel_with_a_slip_in_a_name_says_what_was_reported(self, lab):
        lab.write(panel=EVAL_LOSS.replace("eval_loss", "eval_los"))
        trainer = make_trainer(lab.tmp_path, batches(4), eval_rows=batches(1), eval_strategy="steps", eval_steps=2)
        with pytest.raises(LoopFrozen, match="the panel lacks eval_los; reported were eval_loss"):
            lab.train(trainer)

    def test_training_does_not_begin_again_where_another_process_got_further(self, lab):
        """Without a checkpoint, the weights are those of the beginning: the run directory is of one that is ahead."""
        rows = {"eval_rows": batches(1)}
        lab.train(make_trainer(lab.tmp_path, batches(3), **rows))
        with pytest.raises(UsageError, match="promoted weights of update 3"):
            lab.train(make_trainer(lab.tmp_path, batches(3), **rows))

    def test_a_thing_that_is_no_trainer_is_named(self, lab):
        with lab.open() as guard, pytest.raises(UsageError, match="got a dict; trainers of these packages"):
            guard.attach({})
