"""A freeze can be replayed in another process, and comes out the same to the bit."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from lab import Lab

from loopguard.errors import LoopFrozen, SnapshotError, UsageError
from loopguard.reproduce import load_module, reproduce
from loopguard.snapshots import read_capsule

MODULE = """
import torch


def build(config):
    model = torch.nn.Sequential(
        torch.nn.Linear(4, config["width"]), torch.nn.Dropout(0.5), torch.nn.Linear(config["width"], 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    return {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)}


def loss(model, batch, at):
    assert 0 <= at.batch < at.batches
    return model(batch["x"]).square().mean() * batch["factor"] + 1.0
"""
CONFIG = {"width": 16, "lr": 0.01}


class Recorded(Lab):
    """A lab whose model has dropout and whose batches go through the guard."""

    def build(self, guard):
        torch.manual_seed(0)
        self.module = self.policy.with_name("my_replay.py")
        self.module.write_text(MODULE)
        made = {}
        exec(MODULE, made)
        self.rebuilt = made
        parts = made["build"](CONFIG)
        self.model, self.optimizer = parts["model"], parts["optimizer"]
        self.actor = made["build"](CONFIG)["model"]
        guard.attach(**parts, actor=self.actor, config=CONFIG)
        return guard

    def batch(self, factor=0.01):
        torch.rand(3)  # what a loop draws between two updates: a sampler, a generation
        return {"x": torch.randn(16, 4), "factor": factor}

    def update(self, cycle, factor=0.01, micro=1):
        losses = []
        for batch in cycle.batches(self.batch(factor) for _ in range(micro)):
            torch.rand(2) if not losses else None
            loss = self.model(batch["x"]).square().mean() * batch["factor"] + 1.0
            (loss / micro if micro > 1 else loss).backward()
            losses.append(loss.detach())
        cycle.update(loss=losses[0] if micro == 1 else sum(losses) / micro, clip_norm=0.5)


@pytest.fixture
def lab(tmp_path):
    return Recorded(tmp_path)


def freeze(lab, *, sound=5, micro=1, bad=math.inf):
    with lab.open() as guard:
        lab.build(guard)
        for cycle in guard.cycles(2):
            for _ in range(sound):
                # Drawn between batch and forward, this would be lost; drawn before the batch, it is not.
                lab.update(cycle, micro=micro)
            if cycle.number == 1:
                lab.promote(cycle)
            else:
                with pytest.raises(LoopFrozen):
                    lab.update(cycle, factor=bad, micro=micro)
                break
    return lab.run_dir / "freezes" / "f1"


def told(lab, folder, *options):
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "loopguard.cli", "reproduce", str(folder), "-m", str(lab.module), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class TestTheSameBits:
    def test_in_a_new_process_every_loss_and_the_weights_come_out_the_same(self, lab, monkeypatch):
        monkeypatch.setattr(Recorded, "update", _update_without_draws)
        folder = freeze(lab)
        done = told(lab, folder, "--json")
        assert done.returncode == 0, done.stderr + done.stdout
        facts = json.loads(done.stdout)
        assert facts["same"]
        assert facts["state"] == "same"
        assert [one["update"] for one in facts["updates"]] == [6, 7, 8, 9, 10, 11]
        assert facts["updates"][-1]["now"]["loss"] == "inf"

    def test_with_gradient_accumulation(self, lab, monkeypatch):
        monkeypatch.setattr(Recorded, "update", _update_without_draws)
        again = reproduce(freeze(lab, micro=3), load_module(str(lab.module)))
        assert again.same
        assert again.state == "same"

    def test_what_the_loop_draws_after_the_batch_was_handed_out_makes_other_losses_and_is_told(self, lab):
        """The first difference is named, so that nobody looks for it in the model."""
        again = reproduce(freeze(lab), load_module(str(lab.module)))
        assert not again.same
        assert again.first_other.update == 6

    def test_another_loss_is_not_the_same(self, lab, monkeypatch):
        monkeypatch.setattr(Recorded, "update", _update_without_draws)
        folder = freeze(lab)
        lab.module.write_text(MODULE.replace("+ 1.0", "+ 1.0000001"))
        done = told(lab, folder)
        assert done.returncode == 1
        assert "OTHER from update 6 on" in done.stdout

    def test_a_tape_that_grew_too_long_starts_in_the_middle_of_the_cycle(self, lab, monkeypatch):
        monkeypatch.setattr(Recorded, "update", _update_without_draws)
        lab.policy.write_text(lab.policy.read_text().replace("{when_frozen: raise}", "{capsule: 1MiB}"))
        folder = freeze(lab, sound=60)
        again = reproduce(folder, load_module(str(lab.module)))
        assert again.same
        assert again.updates[0].update > 61
        assert again.updates[-1].update == 121
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert size < 2 << 20


def _update_without_draws(lab, cycle, factor=0.01, micro=1):
    losses = []
    for batch in cycle.batches(lab.batch(factor) for _ in range(micro)):
        loss = lab.model(batch["x"]).square().mean() * batch["factor"] + 1.0
        (loss / micro if micro > 1 else loss).backward()
        losses.append(loss.detach())
    cycle.update(loss=losses[0] if micro == 1 else sum(losses) / micro, clip_norm=0.5)


class TestWhatCannotBeReplayed:
    def test_a_loop_that_hands_in_no_batches_is_told_how(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            loss = lab.model(torch.randn(16, 4)).mean() * math.nan
            loss.backward()
            with pytest.raises(LoopFrozen):
                cycle.update(loss=loss)
        again = reproduce(lab.run_dir / "freezes" / "f1", load_module(str(lab.module)))
        assert not again.same
        assert "cycle.batches" in again.notes[0]

    def test_a_freeze_before_any_update_has_nothing_to_replay(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            (lab.run_dir / "latch").write_text("{}")
            with pytest.raises(LoopFrozen):
                lab.update(cycle)
        again = reproduce(lab.run_dir / "freezes" / "f1", load_module(str(lab.module)))
        assert not again.same
        assert "nothing to replay" in again.notes[-1]

    def test_a_batch_that_cannot_be_kept_is_refused_with_its_place(self, lab):
        with lab.open() as guard:
            lab.build(guard)
            cycle = next(iter(guard.cycles(1)))
            with pytest.raises(UsageError, match=r"batch\.file is a "):
                cycle.keep({"file": lab.policy})

    def test_a_damaged_capsule_is_refused(self, lab, monkeypatch):
        monkeypatch.setattr(Recorded, "update", _update_without_draws)
        folder = freeze(lab)
        tensors = folder / "tape.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
        done = told(lab, folder)
        assert done.returncode == 6
        assert "tape" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("def loss(model, batch, at): ...", r"no build\(config\)"),
            ("def build(config): ...", "neither loss"),
            ("import nowhere_to_be_found", "cannot be imported"),
            ("def build(config:", "cannot be imported: SyntaxError"),
        ],
    )
    def test_a_module_that_is_none_is_refused(self, tmp_path, text, match):
        path = tmp_path / f"module_{abs(hash(text))}.py"
        path.write_text(text)
        with pytest.raises(UsageError, match=match):
            load_module(str(path))

    @pytest.mark.parametrize(
        ("old", "new", "match"),
        [
            ('config["width"]), torch', 'config["widht"]), torch', r"build raised KeyError: 'widht' \(broken_replay"),
            ("return model(", "return 1.0 or model(", "loss gave 1.0; expected the loss as a tensor"),
            ('batch["x"]', 'batch["y"]', r"loss raised KeyError: 'y'"),
        ],
    )
    def test_a_module_that_fails_says_where(self, lab, monkeypatch, old, new, match):
        monkeypatch.setattr(Recorded, "update", _update_without_draws)
        folder = freeze(lab)
        assert old in MODULE
        broken = lab.module.with_name(f"broken_replay_{len(new)}{len(match)}.py")
        broken.write_text(MODULE.replace(old, new))
        with pytest.raises(UsageError, match=match):
            reproduce(folder, load_module(str(broken)))

    def test_leaving_the_debugger_leaves_the_replay(self, lab, monkeypatch):
        monkeypatch.setattr(Recorded, "update", _update_without_draws)
        folder = freeze(lab)
        command = [sys.executable, "-m", "loopguard.cli", "reproduce", str(folder), "-m", str(lab.module), "--pdb"]
        done = subprocess.run(command, input="s\nq\n", capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 130
        assert "Traceback" not in done.stderr

    def test_a_module_with_another_model_is_refused(self, lab, monkeypatch):
        monkeypatch.setattr(Recorded, "update", _update_without_draws)
        folder = freeze(lab)
        other = lab.module.with_name("other_replay.py")
        other.write_text(MODULE.replace('config["width"]', "7"))
        with pytest.raises(UsageError, match="another model than the run had"):
            reproduce(folder, load_module(str(other)))

    def test_a_folder_that_is_no_capsule_is_refused(self, tmp_path, lab):
        with pytest.raises(SnapshotError, match="holds no capsule: name the folder of a freeze"):
            read_capsule(tmp_path)
