"""The internals that the integrations rely on: each is there in what is installed, and one that is not is noticed.

A release that changed one of them fails here, and is named by `loopguard doctor`.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
transformers = pytest.importorskip("transformers", reason="these are the internals of transformers")
trl = pytest.importorskip("trl", reason="and those of TRL")

import accelerate
from accelerate.optimizer import AcceleratedOptimizer
from trainer_kit import WARNINGS, batches, make_grpo, make_sft, make_trainer
from trainer_lab import TrainerLab

from loopguard.errors import UsageError
from loopguard.integrations.transformers import contract as of_transformers
from loopguard.integrations.trl import contract as of_trl

pytestmark = [pytest.mark.train, *(pytest.mark.filterwarnings(one) for one in WARNINGS)]


@pytest.mark.parametrize("finding", of_transformers.probe() + of_trl.probe(), ids=lambda finding: finding.name)
def test_what_is_relied_on_is_there(finding):
    assert finding.ok, finding.why


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        *((transformers.Trainer, name, f"Trainer.{name}") for name in of_transformers.TRAINER_METHODS),
        *((transformers.TrainerCallback, name, f"TrainerCallback.{name}") for name in of_transformers.EVENTS),
        (accelerate.Accelerator, "clip_grad_norm_", "Accelerator.clip_grad_norm_"),
        (accelerate.Accelerator, "optimizer_step_was_skipped", "Accelerator.optimizer_step_was_skipped"),
        (trl.GRPOTrainer, of_trl.GENERATION, f"GRPOTrainer.{of_trl.GENERATION}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_gone_is_named(monkeypatch, owner, name, told):
    monkeypatch.delattr(owner, name)
    missing = [finding.name for finding in of_transformers.probe() + of_trl.probe() if not finding.ok]
    assert told in missing
    assert set(missing) <= {told, f"{told}(resume_from_checkpoint)"}


def test_a_flag_that_the_schedule_no_longer_looks_at_is_noticed(monkeypatch):
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda optimizer: False))
    missing = [finding.name for finding in of_transformers.probe() if not finding.ok]
    assert missing == ["AcceleratedOptimizer.step_was_skipped follows _is_overflow"]


def test_a_trainer_is_not_attached_to_where_something_is_missing(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, batches(1))
    monkeypatch.delattr(accelerate.Accelerator, "optimizer_step_was_skipped")
    with TrainerLab(tmp_path).open() as guard, pytest.raises(UsageError, match=r"optimizer_step_was_skipped.*doctor"):
        guard.attach(trainer)


def test_a_trainer_of_trl_that_reports_elsewhere_is_not_attached_to(tmp_path):
    trainer = make_grpo(tmp_path, 1)
    del trainer._metrics
    with TrainerLab(tmp_path).open() as guard, pytest.raises(UsageError, match="_metrics"):
        guard.attach(trainer)


@pytest.mark.filterwarnings("ignore:.*experimental:UserWarning")
@pytest.mark.parametrize("name", ["gkd.GKDTrainer", "async_grpo.AsyncGRPOTrainer", "sdft.SDFTTrainer"])
def test_a_trainer_that_generates_in_a_way_of_its_own_is_refused(tmp_path, name):
    """Its weights would act without anybody having been asked."""
    module, _, kind = name.partition(".")
    found = pytest.importorskip(f"trl.experimental.{module}", exc_type=ImportError)
    trainer = make_sft(tmp_path, 1)
    trainer.__class__ = getattr(found, kind)
    with TrainerLab(tmp_path).open() as guard, pytest.raises(UsageError, match=f"{kind} generates what it trains on"):
        guard.attach(trainer)


@pytest.mark.parametrize("kind", [trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer, trl.KTOTrainer])
def test_one_that_does_not_generate_is_not_taken_for_such_a_one(kind):
    of_trl.refuse_what_generates_otherwise(object.__new__(kind))


def test_an_optimizer_that_accelerate_did_not_prepare_is_refused_before_a_weight_moves(tmp_path):
    trainer = make_trainer(tmp_path, batches(2))

    class Bare(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.optimizer = trainer.optimizer.optimizer

    trainer.callback_handler.callbacks.insert(0, Bare())
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    with TrainerLab(tmp_path).open() as guard, pytest.raises(UsageError, match="prepared a AdamW"):
        guard.attach(trainer)
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
