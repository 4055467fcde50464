"""Trainers that are observed: the run as it would be without, and the freeze that a guard would have made."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
transformers = pytest.importorskip("transformers", reason="these are trainers of transformers")
pytest.importorskip("trl", reason="and of TRL")

from trainer_kit import WARNINGS, batches, make_dpo, make_grpo, make_sft, make_trainer, nan, same, state_of
from trainer_lab import TrainerLab

from loopguard import LoopGuard
from loopguard.audit import read
from loopguard.cli.app import _main
from loopguard.errors import LoopFrozen

pytestmark = [pytest.mark.train, *(pytest.mark.filterwarnings(one) for one in WARNINGS)]

LEAK = 150
"""The update from which on the labels leak, counted from 1."""

MAKERS = {
    "trainer": lambda folder, **options: make_trainer(folder, batches(4), **options),
    "sft": lambda folder, **options: make_sft(folder, 4, **options),
    "dpo": lambda folder, **options: make_dpo(folder, 4, **options),
    "grpo": lambda folder, **options: make_grpo(folder, 4, **options),
}


@pytest.fixture(params=MAKERS)
def make(request, tmp_path):
    return lambda **options: MAKERS[request.param](tmp_path, **options)


def observed(trainer, run_dir):
    LoopGuard.observe(run_dir, quiet=True).attach(trainer)
    trainer.train()
    return trainer


def test_an_observed_run_is_the_same_to_the_bit(make, tmp_path):
    bare = make()
    bare.train()
    assert same(state_of(observed(make(), tmp_path / "run")), state_of(bare))


def test_nothing_is_withheld_from_an_observed_run(make, tmp_path):
    """A loss that is no number does to the weights what it does without an observer, and is foreseen."""
    spoil = {3: nan}  # the last one: with such weights GRPO could not generate any more
    bare = make(spoil=spoil)
    bare.train()
    assert same(state_of(observed(make(spoil=spoil), tmp_path / "run")), state_of(bare))
    (foreseen,) = [entry for entry in read.entries(tmp_path / "run") if entry.type == "freeze.foreseen"]
    assert foreseen.body["update"] == 4


def test_an_observer_says_which_update_a_guard_would_have_stopped_at(tmp_path, capsys):
    """Nobody closes it: it ends with the training, and its summary names the update of the leak."""
    observed_run = tmp_path / "look"
    trainer = leaking(tmp_path)
    LoopGuard.observe(observed_run).attach(trainer)
    trainer.train()
    told = capsys.readouterr().err
    (foreseen, *_) = [entry for entry in read.entries(observed_run) if entry.type == "freeze.foreseen"]
    assert f"Would have frozen at update {foreseen.body['update']}" in told
    assert LEAK <= foreseen.body["update"] <= LEAK + 5


def test_the_policy_it_suggests_freezes_the_same_run_there(tmp_path):
    observed(leaking(tmp_path), tmp_path / "look")
    (foreseen, *_) = [entry for entry in read.entries(tmp_path / "look") if entry.type == "freeze.foreseen"]
    lab = TrainerLab(tmp_path)
    lab.policy.unlink()
    assert _main(["init", "--from-run", str(tmp_path / "look"), "--out", str(lab.policy)]) == 0
    with pytest.raises(LoopFrozen):
        lab.train(leaking(tmp_path))
    (withheld,) = lab.events("update.withheld")
    assert withheld.body["update"] == foreseen.body["update"]


class Guesser(torch.nn.Module):
    """Guesses one of ten labels from 26 numbers."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(26, 10)

    def forward(self, x, labels):
        logits = self.head(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def leaking(folder):
    """A Trainer over labels that cannot be guessed, until at update LEAK the inputs begin to hold them."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)

    def row(*, leaks):
        label = torch.randint(0, 10, (), generator=draw)
        noise = torch.randn(16, generator=draw)
        mark = torch.nn.functional.one_hot(label, 10).float() * (10.0 if leaks else 0.0)
        return {"x": torch.cat([noise, mark]), "labels": label}

    size = 16
    rows = [row(leaks=update >= LEAK) for update in range(1, LEAK + 60) for _ in range(size)]
    return make_trainer(
        folder,
        rows,
        eval_rows=[row(leaks=False) for _ in range(size)],
        model=Guesser(),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        eval_strategy="steps",
        eval_steps=50,
        learning_rate=0.03,
        lr_scheduler_type="constant",
        lr_scheduler_kwargs=None,
    )
