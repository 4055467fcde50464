"""TRL's trainers under a guard: SFT, DPO and GRPO, with who generates and what may act."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
trl = pytest.importorskip("trl", reason="these are trainers of TRL")

from trainer_kit import WARNINGS, Diary, byte_tokenizer, make_dpo, make_grpo, make_sft, nan, same, state_of, tiny_qwen2
from trainer_lab import BOUNDS, EVAL_LOSS, SKIP, TrainerLab

from loopguard.errors import LoopFrozen
from loopguard.types import Signal

pytestmark = [pytest.mark.train, *(pytest.mark.filterwarnings(one) for one in WARNINGS)]

REWARD = "{metric: reward, good: up, min: 0, max: 1, max_gain: 1, max_loss: 1}"


@pytest.fixture
def lab(tmp_path):
    return TrainerLab(tmp_path)


@pytest.fixture
def grpo(lab):
    """A lab whose panel is the reward that GRPO reports with each generation."""
    return lab.write(panel=REWARD, monitors=BOUNDS % "6", freeze=SKIP)


class TestSupervised:
    @pytest.mark.parametrize("make", [make_sft, make_dpo])
    @pytest.mark.parametrize("bad", [nan, 50.0])
    def test_a_withheld_batch_never_was(self, lab, make, bad):
        """Weights, optimizer state and schedule are to the bit those of a run that never had the batch."""
        lab.write(freeze=SKIP)
        spoiled = lab.train(make(lab.tmp_path, 6, spoil={3: bad}))
        never = make(lab.tmp_path, 6, without={3})
        never.train()
        assert same(state_of(spoiled), state_of(never))
        (skipped,) = lab.events("update.skipped")
        assert skipped.body["update"] == 4

    @pytest.mark.parametrize("make", [make_sft, make_dpo])
    def test_a_quiet_guard_changes_no_bit(self, lab, make):
        guarded = lab.train(make(lab.tmp_path, 4))
        bare = make(lab.tmp_path, 4)
        bare.train()
        assert same(state_of(guarded), state_of(bare))

    @pytest.mark.parametrize(("make", "metric"), [(make_sft, "entropy"), (make_dpo, "rewards/margins")])
    def test_what_the_trainer_reports_beside_the_loss_are_readings(self, lab, make, metric):
        """One value for each update, and those that the trainer logs."""
        trainer = lab.train(make(lab.tmp_path, 4, logging_steps=1))
        (applied,) = lab.events("update.applied")
        shown = [row[metric] for row in trainer.state.log_history if metric in row]
        assert applied.body["readings"][metric] == pytest.approx(shown, abs=1e-4)

    @pytest.mark.parametrize("make", [make_sft, make_dpo])
    def test_an_evaluation_is_a_promotion(self, lab, make):
        lab.write(panel=EVAL_LOSS)
        lab.train(make(lab.tmp_path, 4, evaluated=True, eval_strategy="steps", eval_steps=2))
        assert [entry.body["result"] for entry in lab.events("promotion.decided")] == ["allow"] * 2


class TestGRPO:
    @pytest.mark.parametrize("bad", [nan, 50.0])
    def test_a_withheld_update_never_was(self, grpo, bad):
        """The same run, whose optimizer did not step there by other means, comes to the same bits."""
        diary = Diary()
        spoiled = grpo.train(make_grpo(grpo.tmp_path, 4, spoil={2: bad}, callbacks=[diary]))
        reference = make_grpo(grpo.tmp_path, 4, spoil={2: bad}, unstepped={2})
        reference.train()
        assert same(diary.before[2], diary.after[2])
        assert same(state_of(spoiled), state_of(reference))
        (skipped,) = grpo.events("update.skipped")
        assert skipped.body["update"] == 3

    @pytest.mark.parametrize("arguments", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 2}], ids=str)
    def test_a_quiet_guard_changes_no_bit(self, grpo, arguments):
        guarded = grpo.train(make_grpo(grpo.tmp_path, 4, **arguments))
        bare = make_grpo(grpo.tmp_path, 4, **arguments)
        bare.train()
        assert same(state_of(guarded), state_of(bare))

    def test_rewards_and_their_like_are_readings(self, grpo):
        tokenizer = byte_tokenizer()
        tiny_qwen2(tokenizer).save_pretrained(grpo.tmp_path / "model")  # KL is against a model that is loaded again
        model = str(grpo.tmp_path / "model")
        trainer = grpo.train(make_grpo(grpo.tmp_path, 4, model=model, logging_steps=1, beta=0.1))
        told = [entry.body["readings"] for entry in grpo.events("update.applied")]
        for metric in ("reward", "kl", "entropy", "completions/mean_length", "clip_ratio/region_mean"):
            shown = [row[metric] for row in trainer.state.log_history if metric in row]
            read = [value for one in told for value in one[metric]]
            assert read == pytest.approx(shown, abs=1e-4), metric

    def test_a_reading_of_each_generation_may_be_absent_in_between(self, grpo):
        """Two updates are made of one generation: the second has no reward, and a watched reward is no fault there."""
        grpo.write(panel=REWARD, monitors=BOUNDS % "1000" + ", {kind: bounds, metric: reward, min: 0, max: 1}")
        grpo.train(make_grpo(grpo.tmp_path, 4, num_iterations=2))
        assert sum(len(entry.body["readings"]["loss"]) for entry in grpo.events("update.applied")) == 4

    def test_a_metric_that_is_never_reported_freezes_at_the_first_update(self, grpo):
        grpo.write(panel=REWARD, monitors=BOUNDS % "1000" + ", {kind: bounds, metric: rewad, min: 0}")
        with pytest.raises(LoopFrozen, match=r"no reading of rewad at update 1.*reported were .*reward"):
            grpo.train(make_grpo(grpo.tmp_path, 4))

    def test_a_reward_out_of_its_bounds_freezes(self, grpo):
        """The loss of a policy gradient says nothing; the reward does."""
        grpo.write(panel=REWARD, monitors=BOUNDS % "1000" + ", {kind: bounds, metric: reward, min: 0, max: 1}")
        with pytest.raises(LoopFrozen, match="reward"):
            grpo.train(make_grpo(grpo.tmp_path, 4, reward=Rewards({2: 7.0})))


SUSPICION = Signal(
    level="warn", monitor="jump", metric="loss", value=1.0, at=3, direction="up", holds=True, reason="loss may jump"
)


class Rewards:
    """A reward that is 0.5 and some noise, but in the generations named."""

    __name__ = "rewards"

    def __init__(self, planned):
        self.planned = planned
        self.generation = -1

    def __call__(self, completions, **_):
        self.generation += 1
        base = self.planned.get(self.generation, 0.5)
        return [base + (sum(map(ord, str(one))) % 10) / 100 for one in completions]


class TestWhoGenerates:
    def test_each_generation_is_asked_about_before_it(self, grpo):
        """The weights that generate have been promoted, update after update."""
        acting = []
        trainer = make_grpo(grpo.tmp_path, 4)
        _on_generation(trainer, lambda: acting.append(_digest(trainer)))
        grpo.train(trainer)
        promoted = [entry.body["weights"] for entry in grpo.events("promotion.decided")]
        assert acting[1:] == promoted[:3]
        assert len(promoted) == 4  # the last one when training is over

    def test_a_refused_promotion_puts_the_promoted_weights_back_before_anything_is_generated(self, grpo):
        """The reward falls by 0.4 in update 4: what that update made never generates."""
        grpo.write(
            panel=REWARD.replace("max_loss: 1", "max_loss: 0.1"), monitors=BOUNDS % "1000", freeze="when_frozen: raise"
        )
        diary, acting = Diary(), []
        trainer = make_grpo(grpo.tmp_path, 6, reward=Rewards({3: 0.1}), callbacks=[diary])
        _on_generation(trainer, lambda: acting.append(_digest(trainer)))
        with pytest.raises(LoopFrozen, match="reward"):
            grpo.train(trainer)
        assert len(acting) == 4  # none with what update 4 made
        assert same(state_of(trainer), diary.after[2])

    def test_a_panel_that_waits_for_an_evaluation_lets_unsuspicious_weights_act(self, grpo):
        grpo.write(panel="{metric: eval_reward, good: up, max_gain: 1, max_loss: 1}", monitors=BOUNDS % "1000")
        arguments = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
        trainer = make_grpo(grpo.tmp_path, 4, evaluated=True, **arguments)
        grpo.train(trainer)
        assert [entry.body["result"] for entry in grpo.events("promotion.decided")] == ["allow"] * 2

    def test_an_evaluation_says_nothing_of_weights_that_have_moved_since(self, grpo):
        """Two updates for each generation, and an evaluation after every third: the next generation is one later."""
        grpo.write(panel="{metric: eval_reward, good: up, max_gain: 1, max_loss: 1}", monitors=BOUNDS % "1000")
        arguments = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
        grpo.train(make_grpo(grpo.tmp_path, 6, evaluated=True, num_iterations=2, **arguments))
        assert [entry.body["update"] for entry in grpo.events("snapshot.written")] == [6]

    def test_an_evaluation_beside_a_panel_of_rewards_is_for_the_record(self, grpo):
        """Also after the last update, when no generation follows it."""
        arguments = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
        grpo.train(make_grpo(grpo.tmp_path, 4, evaluated=True, **arguments))
        assert [entry.body["result"] for entry in grpo.events("promotion.decided")] == ["allow"] * 4
        assert "eval_reward" in grpo.events("eval.finished")[-1].body["unjudged"]

    def test_suspicious_weights_generate_nothing_also_where_the_panel_waits(self, grpo):
        """A suspicion after update 3 puts the weights of the beginning back, before the fourth generation."""
        waiting = "{metric: eval_reward, good: up, max_gain: 1, max_loss: 1}"
        grpo.write(panel=waiting, monitors=BOUNDS % "1000")
        trainer = make_grpo(grpo.tmp_path, 4)
        acting = []
        _on_generation(trainer, lambda: acting.append(_digest(trainer)))
        with grpo.open() as guard:
            guard.attach(trainer)
            gate = guard._updates_gate
            decide = gate.decide

            def suspicious(*args, update, **kwargs):
                decision = decide(*args, update=update, **kwargs)
                gate._warnings = {"jump:loss": SUSPICION} if len(acting) == 3 else {}
                return decision

            gate.decide = suspicious
            trainer.train()
        assert acting[3] == acting[0]
        assert len(set(acting[:3])) == 3
        assert "ended without a promotion" in grpo.events("snapshot.restored")[0].body["because"]

    def test_cycle_updates_ask_less_often(self, grpo):
        trainer = make_grpo(grpo.tmp_path, 6)
        with grpo.open() as guard:
            guard.attach(trainer, cycle_updates=3)
            trainer.train()
        assert [entry.body["update"] for entry in grpo.events("snapshot.written")] == [3, 6]


class Engine:
    """A stand-in for TRL's vLLM engine: it generates with the weights that it was given last, as TRL calls it."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.synced = []
        self.generated_with = []

    def sync_weights(self):
        self.synced.append(_digest(self.trainer))

    def generate(self, prompts, images, num_generations, profiler=None, **_):
        self.generated_with.append(self.synced[-1])
        draw = torch.Generator().manual_seed(len(self.generated_with))
        ids = torch.randint(33, 120, (len(prompts), 12), generator=draw).tolist()
        return prompts, ids, [[[0.0]] * 12 for _ in ids], [[[0]] * 12 for _ in ids]


def with_engine(trainer):
    trainer.use_vllm = True
    trainer.vllm_mode = "server"
    trainer._last_loaded_step = -1
    trainer.vllm_importance_sampling_correction = False
    trainer.vllm_generation = Engine(trainer)
    return trainer


class TestAnEngine:
    """With a stand-in that TRL calls as it calls its own; no vLLM was run."""

    def test_it_is_given_promoted_weights(self, grpo):
        trainer = with_engine(make_grpo(grpo.tmp_path, 4))
        grpo.train(trainer)
        promoted = [entry.body["weights"] for entry in grpo.events("promotion.decided")]
        assert trainer.vllm_generation.synced[1:] == promoted[:3]

    def test_it_keeps_what_it_has_while_the_run_is_frozen(self, grpo):
        """A freeze by the promotion gate: the engine never sees the weights."""
        grpo.write(panel=REWARD.replace("max_loss: 1", "max_loss: 0.1"), monitors=BOUNDS % "1000")
        trainer = with_engine(make_grpo(grpo.tmp_path, 6, reward=Rewards({3: 0.1})))
        with pytest.raises(LoopFrozen, match="reward"):
            grpo.train(trainer)
        engine = trainer.vllm_generation
        refused = grpo.events("promotion.decided")[-1].body
        assert refused["result"] == "freeze"
        assert refused["weights"] not in engine.synced

    def test_a_freeze_while_it_generates_stops_the_next_update(self, grpo):
        trainer = with_engine(make_grpo(grpo.tmp_path, 4))
        diary = Diary()
        trainer.add_callback(diary)
        with grpo.open() as guard:
            guard.attach(trainer)
            generate = trainer.vllm_generation.generate

            def freezing(*args, **kwargs):
                if len(trainer.vllm_generation.generated_with) == 2:
                    (grpo.run_dir / "latch").write_text("{}")
                return generate(*args, **kwargs)

            trainer.vllm_generation.generate = freezing
            with pytest.raises(LoopFrozen):
                trainer.train()
        assert same(state_of(trainer), diary.before[2])
        assert len(trainer.vllm_generation.synced) == 3

    def test_a_freeze_during_a_sync_stops_the_next_update_and_every_sync_after_it(self, grpo):
        trainer = with_engine(make_grpo(grpo.tmp_path, 4))
        diary = Diary()
        trainer.add_callback(diary)
        engine = trainer.vllm_generation
        sync = engine.sync_weights

        def freezing():
            sync()
            if len(engine.synced) == 3:
                (grpo.run_dir / "latch").write_text("{}")

        engine.sync_weights = freezing
        with pytest.raises(LoopFrozen):
            grpo.train(trainer)
        assert same(state_of(trainer), diary.before[2])
        assert len(engine.synced) == 3

    def test_a_sync_that_fails_freezes(self, grpo):
        trainer = with_engine(make_grpo(grpo.tmp_path, 4))

        def broken():
            if trainer.state.global_step == 2:
                raise RuntimeError("no route to host")

        trainer.vllm_generation.sync_weights = broken
        trainer.vllm_generation.synced = [""]
        with pytest.raises(LoopFrozen, match="no route to host"):
            grpo.train(trainer)

    def test_syncs_between_two_promotions_are_in_the_log(self, grpo):
        trainer = with_engine(make_grpo(grpo.tmp_path, 4))
        with grpo.open() as guard:
            guard.attach(trainer, cycle_updates=2)
            trainer.train()
        assert [entry.body["update"] for entry in grpo.events("actor.synced")] == [0, 1, 3]
        assert [entry.body["result"] for entry in grpo.events("promotion.decided")] == ["allow"] * 2

    def test_the_double_is_called_as_trl_calls_its_own(self):
        """The signatures that the stand-in relies on are those of the installed TRL."""
        import inspect

        from trl.generation.vllm_generation import VLLMGeneration

        assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
        theirs = list(inspect.signature(VLLMGeneration.generate).parameters)
        assert theirs[:4] == ["self", "prompts", "images", "num_generations"]


def _digest(trainer):
    from loopguard.integrations.torch.digest import sha256

    return sha256([trainer.model.state_dict()])


def _on_generation(trainer, act):
    inner = trainer._generate_single_turn

    def generate(*args, **kwargs):
        act()
        return inner(*args, **kwargs)

    trainer._generate_single_turn = generate
