"""The examples of transformers and TRL run to their end, and freeze where they say; the pages show their code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="these are examples of torch models")
pytest.importorskip("transformers", reason="these are examples of transformers and TRL")
pytest.importorskip("accelerate", reason="a Trainer needs accelerate")

from loopguard.audit import read
from loopguard.policy.load import load

pytestmark = [pytest.mark.train, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NOWHERE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the docstring of an example says comes of its planted fault, in updates as the guard numbers them."""

    updates: int
    promoted: list[int]
    withheld: int
    undone: int
    reason: str
    foreseen: int | None


TOLD = {
    "transformers_trainer": Told(
        updates=60, promoted=[20, 40, 60], withheld=31, undone=0, reason="loss is nan, not a finite number", foreseen=31
    ),
    "trl_sft": Told(
        updates=140,
        promoted=[20, 40, 60, 80, 100, 120, 140],
        withheld=105,
        undone=4,
        reason="loss fell from .* since update 101 .too good is a fault too",
        foreseen=105,
    ),
    "trl_dpo": Told(
        updates=80, promoted=[20, 40, 60, 80], withheld=64, undone=3, reason="since update 61", foreseen=65
    ),
    "trl_grpo_tool": Told(
        updates=10, promoted=[4, 8, 10], withheld=6, undone=0, reason="reward is .*, above its domain", foreseen=None
    ),
}
NEEDS_DOCKER = {"trl_grpo_tool"}


def needing(names):
    return [pytest.param(one, marks=pytest.mark.docker if one in NEEDS_DOCKER else ()) for one in names]


def run(example, run_dir, *words, docker=False):
    """A process of its own, as a reader would start it; without Docker where it needs none."""
    if example.startswith("trl"):
        pytest.importorskip("trl", reason="this example is of TRL")
    there = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if docker else NOWHERE)
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), str(run_dir), *words]
    return subprocess.run(command, capture_output=True, text=True, env=there, timeout=180, check=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run an example, each way once; the finished process, and its run directory, which is left as it is."""
    done = {}

    def once(example, *words):
        if (example, words) not in done:
            run_dir = tmp_path_factory.mktemp(example) / "run"
            docker = example in NEEDS_DOCKER and "--observe" not in words
            done[example, words] = run(example, run_dir, *words, docker=docker), run_dir
        return done[example, words]

    return once


def loopguard(*words):
    main = "from loopguard.cli.app import main; main()"
    command = [sys.executable, "-c", main, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def entries(run_dir, kind):
    return [entry.body for entry in read.entries(run_dir, types=[kind])]


def weights(run_dir, update=60):
    return (Path(f"{run_dir}-checkpoints") / f"checkpoint-{update}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("example", needing(TOLD))
class TestEach:
    def test_it_trains_to_its_end_and_each_evaluation_is_a_promotion(self, example, ran):
        done, run_dir = ran(example)
        assert done.returncode == 0, done.stderr
        assert f"trained {TOLD[example].updates} updates" in done.stdout
        assert [body["update"] for body in entries(run_dir, "snapshot.written")] == TOLD[example].promoted
        assert entries(run_dir, "freeze.entered") == []

    def test_its_planted_fault_freezes_it_where_it_says(self, example, ran):
        """What was applied before the guard was sure is undone, and nothing of it was ever promoted."""
        told = TOLD[example]
        done, run_dir = ran(example, "--plant-fault")
        assert done.returncode == 4, done.stderr
        assert re.search(rf"frozen \(f1\): .*{told.reason}", done.stdout)
        assert f"stands at {told.withheld - 1} updates" in done.stdout
        assert [body["update"] for body in entries(run_dir, "update.withheld")] == [told.withheld]
        promoted = [body["update"] for body in entries(run_dir, "snapshot.written")]
        assert promoted == [update for update in told.promoted if update < told.withheld - told.undone]
        (frozen,) = entries(run_dir, "freeze.entered")
        assert (frozen["restored"] is not None) == (told.undone > 0)


@pytest.mark.parametrize("example", TOLD)
@pytest.mark.parametrize("fault", [[], ["--plant-fault"]], ids=["sound", "planted"])
def test_observed_it_runs_to_its_end_without_docker(example, fault, ran):
    """Ten updates of GRPO are too few to know a level, and nobody told the observer where a reward ends."""
    done, run_dir = ran(example, "--observe", *fault)
    assert done.returncode == 0, done.stderr
    assert f"trained {TOLD[example].updates} updates" in done.stdout
    foreseen = [body["update"] for body in entries(run_dir, "freeze.foreseen")]
    assert foreseen[:1] == ([TOLD[example].foreseen] if fault and TOLD[example].foreseen else [])


@pytest.mark.docker
def test_the_tool_of_the_grpo_example_runs_in_containers_alone(ran):
    """Four rollouts of ten generations call it once each, and so do eight of three evaluations."""
    _, run_dir = ran("trl_grpo_tool")
    decided = entries(run_dir, "tool.decided")
    assert {(body["tool"], body["rule"]) for body in decided} == {("add", "add")}
    assert len(entries(run_dir, "tool.finished")) == len(decided) == 10 * 4 + 3 * 8


class TestAfterAFreeze:
    def test_it_replays_to_the_bit(self, ran):
        """With the module that the page shows, and with clipping, dropout and the trainer's schedule."""
        _, run_dir = ran("transformers_trainer", "--plant-fault")
        done = loopguard("reproduce", run_dir / "freezes" / "f1", "-m", EXAMPLES / "transformers_replay.py")
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"replayed +updates 21-31", done.stdout)
        assert re.search(r"readings +the same to the bit", done.stdout)
        assert re.search(r"weights +the same to the bit", done.stdout)

    def test_resumed_it_ends_as_if_the_fault_had_not_been(self, ran, tmp_path):
        """While frozen it comes up frozen. Then from the checkpoint of update 30, with the rows mended."""
        frozen = tmp_path / "run"
        for words in (["--plant-fault"], ["--resume"]):
            assert run("transformers_trainer", frozen, *words).returncode == 4
        assert loopguard("resume", frozen, "--by", "dana", "--reason", "the masked rows are gone").returncode == 0
        done = run("transformers_trainer", frozen, "--resume")
        assert done.returncode == 0, done.stderr
        _, sound = ran("transformers_trainer")
        assert weights(frozen) == weights(sound)


KILLED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
from transformers import TrainerCallback
from transformers_trainer import POLICY, make_trainer
from loopguard import LoopGuard

class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 35:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make_trainer({run_dir!r} + "-checkpoints")
trainer.add_callback(Killed())
guard = LoopGuard.from_file(POLICY, run_dir={run_dir!r})
guard.attach(trainer)
trainer.train()
"""


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(ran, tmp_path):
    """Killed at update 35, it goes on from the checkpoint of update 30 to the same weights."""
    code = KILLED.format(examples=str(EXAMPLES), run_dir=str(tmp_path / "run"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run("transformers_trainer", tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert [body["update"] for body in entries(tmp_path / "run", "checkpoint.loaded")] == [30]
    _, whole = ran("transformers_trainer")
    assert weights(tmp_path / "run") == weights(whole)


@pytest.mark.parametrize("name", ["trainers", "trl_dpo", "trl_grpo_tool"])
def test_the_policies_load(name):
    assert load(EXAMPLES / f"{name}.yaml").policy.promotion.panel


@pytest.mark.parametrize("page", ["transformers", "trl"])
def test_the_code_of_a_page_is_that_of_the_examples(page):
    """Each of its blocks stands in an example, line by line and with the same indentation."""
    sources = [path.read_text() for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml"))]
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    assert [block for block in blocks if not any(block in source for source in sources)] == []
