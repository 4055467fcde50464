"""The torch examples run to their end, and freeze where they say on a planted fault; docs/torch.md shows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="these are examples of torch loops")

from loopguard.audit import read
from loopguard.policy.load import load

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--monitor-interval=0.1"]
TORCHRUN += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
ONE_PROCESS = ["torch_accumulation", "torch_two_optimizers"]
SPREADS = ["ddp", "fsdp2"]

on_ranks = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no distributed package with gloo",
)


def run(command, *words):
    """A process of its own, as a reader would start it."""
    there = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    there["DOCKER_HOST"] = "unix:///nowhere/docker.sock"  # they call no tools, so they need no engine
    words = [str(word) for word in words]
    return subprocess.run([*command, *words], capture_output=True, text=True, env=there, timeout=180, check=False)


def test_the_policy_of_the_torch_examples_loads():
    assert load(EXAMPLES / "torch.yaml").policy.name == "torch-examples"


def entries(run_dir, kind, stream="controller"):
    return [entry.body for entry in read.entries(run_dir, stream, types=[kind])]


@pytest.mark.slow
@pytest.mark.parametrize("example", ONE_PROCESS)
class TestInOneProcess:
    def test_it_promotes_every_cycle(self, example, tmp_path):
        """The warm-up and three more."""
        done = run([sys.executable, EXAMPLES / f"{example}.py"], tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert "went through 3 cycles" in done.stdout
        assert len(entries(tmp_path / "run", "promotion.applied")) == 4
        assert entries(tmp_path / "run", "freeze.entered") == []

    def test_its_planted_fault_is_withheld_in_the_update_that_it_says(self, example, tmp_path):
        """Update 30 of the example is the 31st that the guard numbers. What was to be as before is said and is so."""
        done = run([sys.executable, EXAMPLES / f"{example}.py"], tmp_path / "run", "--plant-fault")
        assert done.returncode == 4, done.stderr
        metric, kept = {
            "torch_accumulation": ("loss", "the schedule stands at 30 updates"),
            "torch_two_optimizers": ("grad_norm", "weights as before the update: 4 of 4 tensors"),
        }[example]
        assert f"frozen (f1): {metric} is nan" in done.stdout
        assert kept in done.stdout
        assert [body["update"] for body in entries(tmp_path / "run", "update.withheld")] == [31]

    @pytest.mark.parametrize("fault", [[], ["--plant-fault"]], ids=["sound", "planted"])
    def test_observed_it_runs_to_its_end(self, example, fault, tmp_path):
        done = run([sys.executable, EXAMPLES / f"{example}.py"], tmp_path / "run", "--observe", *fault)
        assert done.returncode == 0, done.stderr
        foreseen = [body["update"] for body in entries(tmp_path / "run", "freeze.foreseen")]
        assert foreseen[:1] == ([31] if fault else [])
        assert ("Would have frozen at update 31" in done.stderr) == bool(fault)


@pytest.mark.slow
@on_ranks
@pytest.mark.parametrize("spread", SPREADS)
class TestOnTwoRanks:
    def test_both_go_through_every_cycle_with_the_weights_of_an_unguarded_run(self, spread, tmp_path):
        ends = {}
        for mode in ([], ["--observe"]):
            words = [EXAMPLES / "torchrun_ranks.py", tmp_path / f"run{len(mode)}", "--spread", spread, *mode]
            done = run(TORCHRUN, *words)
            assert done.returncode == 0, done.stderr
            told = re.findall(r"rank (\d): went through 3 cycles after the warm-up, weights (\w+)", done.stdout)
            ends[len(mode)] = dict(told)
        guarded, observed = ends.values()
        assert sorted(guarded) == ["0", "1"]
        assert guarded == observed
        assert (guarded["0"] == guarded["1"]) == (spread == "ddp"), "the same weights, or shards of them"
        assert len(entries(tmp_path / "run0", "promotion.applied")) == 4

    def test_a_fault_on_one_rank_freezes_both_in_that_update(self, spread, tmp_path):
        done = run(TORCHRUN, EXAMPLES / "torchrun_ranks.py", tmp_path / "run", "--spread", spread, "--plant-fault")
        assert done.returncode == 0, done.stderr
        told = dict(re.findall(r"rank (\d): frozen \(f1\): (.*)", done.stdout))
        assert told["0"] == "rank 1 tripped bounds:loss: loss is nan, not a finite number; weights as before"
        assert told["1"] == "loss is nan, not a finite number; weights as before"
        for stream in ("controller", "rank-1"):
            assert [body["update"] for body in entries(tmp_path / "run", "update.withheld", stream)] == [31]


def test_the_code_of_the_torch_page_is_that_of_the_examples():
    """Each of its blocks stands in an example, line by line and with the same indentation."""
    sources = [path.read_text() for path in EXAMPLES.glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torch.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    assert [block for block in blocks if not any(block in source for source in sources)] == []


class TestTakingTurns:
    """What the torch page says of optimizers that step in different updates."""

    POLICY = (EXAMPLES / "torch.yaml").read_text()

    @pytest.fixture
    def turns(self, tmp_path):
        """A guard on two layers with an optimizer each."""
        from loopguard import LoopGuard

        policy = tmp_path / "policy.yaml"
        watched = "    - {kind: jump, metric: loss_critic, good: down}\npromotion:"
        policy.write_text(self.POLICY.replace("promotion:", watched, 1))
        torch.set_num_threads(1)
        torch.manual_seed(0)
        layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
        optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1) for layer in layers]
        with LoopGuard.from_file(policy, run_dir=tmp_path / "run") as guard:
            guard.attach(model=layers, optimizer=optimizers)
            yield next(guard.cycles(1)), layers

    def test_an_optimizer_without_gradients_moves_nothing(self, turns):
        cycle, layers = turns
        moved = []
        for update in range(6):
            before = [layer.weight.detach().clone() for layer in layers]
            loss = layers[update % 2](torch.randn(4, 3)).square().mean()
            loss.backward()
            name = ("loss_actor", "loss_critic")[update % 2]
            absent = [] if name == "loss_critic" else ["loss_critic"]
            assert cycle.update(loss=loss, readings={name: loss}, absent=absent).allowed
            moved.append([not torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True)])
        assert moved == [[True, False], [False, True]] * 3
