"""The policy that is drafted from a run: it loads, and says where its numbers come from."""

from __future__ import annotations

import math
import random
import re

import pytest

from loopguard.gates.promotion import PromotionGate
from loopguard.policy.draft import LEAST_ROOM, ROOM, draft
from loopguard.policy.load import examine, shipped
from loopguard.policy.schema import GuardPolicy, MetricName
from loopguard.policy.suggest import _NAME, YOUNG, Suggestion, direction, domain, idle


def noise(update, salt=0):
    return random.Random(1000 * salt + update).gauss(0, 1)


def seen(readings, *, updates=60, panels=(), by_reward=False):
    suggestion = Suggestion()
    suggestion.by_reward = by_reward
    for update in range(1, updates + 1):
        suggestion.take(readings(update), update=update, armed=True)
    for panel in panels:
        suggestion.measured(panel)
    return suggestion


@pytest.fixture
def loaded(tmp_path):
    """Drafts a policy, and loads it; gives the policy, what there is to lint, and the text."""

    def load(suggestion, **options) -> tuple[GuardPolicy, list[str], str]:
        text = draft(suggestion, **options)
        path = tmp_path / "policy.yaml"
        path.write_text(text)
        found, findings = examine(path)
        assert found is not None, "\n".join(map(str, findings))
        return found.policy, [finding.message for finding in findings], text

    return load


def rules(policy):
    return {(rule.kind, rule.metric) for rule in policy.updates.monitors}


HEALTHY = {
    "a bare loop": (lambda u: {"loss": 2 + 0.1 * noise(u), "grad_norm": 1.0 + u % 3}, False),
    "fine-tuning": (
        lambda u: {
            "loss": 2 - u / 100 + 0.1 * noise(u),
            "grad_norm": 1.0 + u % 3,
            "entropy": 1.5 + 0.1 * noise(u, 1),
            "mean_token_accuracy": 0.5 + 0.01 * noise(u, 2),
            "num_tokens": 512.0 * u,
            "learning_rate": 1e-4,
        },
        False,
    ),
    "reinforcement": (
        lambda u: {
            "loss": 0.01 * noise(u),
            "grad_norm": 1.0,
            "reward": 0.4 + 0.1 * noise(u, 1),
            "reward_std": 0.1,
            "kl": 0.001 * abs(noise(u, 2)),
            "completions/mean_length": 100 + noise(u, 3),
            "completions/min_length": 3.0,
            "tools/failure_frequency": 0.0,
            "step_time": 1.0 + noise(u, 4),
        },
        True,
    ),
    "nothing": (lambda u: {}, False),
    "a reward and no loss": (lambda u: {"reward": noise(u)}, False),
    "no numbers": (lambda u: {"loss": math.nan, "grad_norm": math.inf, "score": math.nan}, False),
    "hostile names": (
        lambda u: (
            {"loss": 1 + noise(u), "a b": 1 + noise(u), "x\n- {kind: bounds, metric: y}": noise(u), "": noise(u)}
            | {
                name: noise(u)
                for name in ("1e5", "true", "null", "0", "no", "\u202eevil", "a" * 64, "a" * 65, "#", "{}", "é")
            }
        ),
        False,
    ),
    "a thousand metrics": (lambda u: {"loss": 1 + noise(u)} | {f"m{i}": noise(u, i) for i in range(200)}, False),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_whatever_was_seen_the_draft_loads(loaded, name):
    """And says what the rules of the suggestion say, in their order."""
    readings, by_reward = HEALTHY[name]
    suggestion = seen(readings, by_reward=by_reward)
    policy, _, text = loaded(suggestion, run="run-1", notes=["A note with \u202e in it."])
    assert policy.updates == suggestion.section(suggestion.rules()).model_copy(
        update={"loss_kind": suggestion.loss_kind, "lease": 64}
    )
    assert max(map(len, text.splitlines())) <= 180


@pytest.mark.parametrize("name", ["a bare loop", "fine-tuning"])
def test_there_is_nothing_to_lint(loaded, name):
    readings, by_reward = HEALTHY[name]
    panels = [{"eval_loss": 2.0, "eval_accuracy": 0.4}, {"eval_loss": 1.9, "eval_accuracy": 0.5}]
    _, lints, _ = loaded(seen(readings, by_reward=by_reward, panels=panels))
    assert lints == []


@pytest.fixture
def with_tools():
    suggestion = Suggestion()
    suggestion.tools["lookup"] = None
    return suggestion


def default():
    found, _ = examine(shipped("default"))
    assert found is not None
    return found.policy


def test_all_but_two_sections_are_those_of_the_default(loaded, with_tools):
    policy, _, text = loaded(with_tools)
    for section in ("tools", "sandbox", "data", "freeze", "audit"):
        assert getattr(policy, section) == getattr(default(), section)
    assert "A call that no rule lets run is refused, and a deny always wins" in text
    assert "The tools of that run: lookup. Each needs a rule" in text


def test_a_run_without_tools_gets_none(loaded):
    """And nothing that needs them; a comment says how to add them."""
    policy, _, text = loaded(Suggestion())
    assert (policy.tools.rules, policy.sandbox.profiles, policy.data.recheck) == ((), {}, None)
    assert policy.data == default().data.model_copy(update={"recheck": None})
    assert "run again by the guard" not in text
    assert "A loop that calls tools needs both sections; copy them from the default policy" in text


def test_a_trainer_that_reports_on_tools_has_some(loaded):
    """Also where nobody handed them to the observer."""
    assert "tools/failure_frequency" in HEALTHY["reinforcement"][0](1)
    policy, _, _ = loaded(seen(HEALTHY["reinforcement"][0], by_reward=True))
    assert policy.tools == default().tools


def test_a_hostile_name_of_a_tool_stays_in_its_comment(loaded, with_tools):
    with_tools.tools["x\nfreeze: {on_trip: skip}\n"] = None
    policy, _, _ = loaded(with_tools)
    assert policy.freeze == default().freeze


def test_every_section_has_a_comment(loaded, with_tools):
    _, _, text = loaded(with_tools)
    for key in ("tools", "sandbox", "data", "updates", "promotion"):
        assert re.search(
            rf"^# The [^\n]*\n(#[^\n]*\n)*{key}:|^# Where [^\n]*\n(#[^\n]*\n)*{key}:", text, re.MULTILINE
        ), key


class TestMonitors:
    def test_of_a_fine_tuning_run(self, loaded):
        policy, _, text = loaded(seen(HEALTHY["fine-tuning"][0]))
        assert policy.updates.loss_kind == "discrete"
        assert rules(policy) == {
            *((kind, "loss") for kind in ("bounds", "jump", "drift", "variance")),
            ("bounds", "grad_norm"),
            *((kind, "entropy") for kind in ("bounds", "jump", "variance")),
            *((kind, "mean_token_accuracy") for kind in ("bounds", "jump", "drift", "variance")),
        }
        assert "# num_tokens: 512 to 3.072e+04. Left out: it counts.\n    # - {kind: jump, metric: num_tokens" in text
        assert "learning_rate" in text

    def test_of_a_reinforcement_run(self, loaded):
        policy, _, text = loaded(seen(HEALTHY["reinforcement"][0], by_reward=True))
        assert policy.updates.loss_kind == "surrogate"
        assert ("jump", "loss") not in rules(policy)
        assert {
            ("jump", "reward"),
            ("drift", "reward"),
            ("jump", "kl"),
            ("bounds", "completions/mean_length"),
        } <= rules(policy)
        assert "tools/failure_frequency: 0 to 0. Left out: it never moved" in text
        assert not {"reward_std", "step_time", "completions/min_length"} & {metric for _, metric in rules(policy)}

    def test_taking_the_mark_away_watches_a_metric_that_was_left_out(self, loaded, tmp_path):
        _, _, text = loaded(seen(HEALTHY["fine-tuning"][0]))
        path = tmp_path / "edited.yaml"
        path.write_text(
            text.replace("    # - {kind: jump, metric: num_tokens", "    - {kind: jump, metric: num_tokens")
        )
        found, _ = examine(path)
        assert found is not None
        assert ("jump", "num_tokens") in rules(found.policy)

    def test_a_share_has_its_domain_where_the_values_agree(self):
        assert domain("eval_accuracy", low=0.2, high=1.0) == {"min": 0, "max": 1}
        assert domain("eval_accuracy", low=20, high=87) == {}
        assert domain("completions/mean_length", low=0, high=9) == {"min": 0}
        assert domain("reward", low=0, high=1) == {}

    def test_how_a_metric_is_watched_is_decided_at_its_24th_reading_and_stays(self):
        suggestion = seen(
            lambda u: {"loss": 2 + 0.1 * noise(u), "idle": 1.0 if u < 40 else noise(u)}, updates=YOUNG - 1
        )
        assert suggestion.metrics["idle"].rules is None
        suggestion.take({"loss": 2.0, "idle": 1.0}, update=YOUNG, armed=True)
        decided = suggestion.metrics["idle"].rules
        assert [rule["kind"] for rule in decided] == ["bounds"]
        for update in range(YOUNG + 1, 200):
            suggestion.take({"loss": 2.0, "idle": noise(update)}, update=update, armed=True)
        assert suggestion.metrics["idle"].rules == decided

    def test_one_that_is_the_same_as_another_is_left_out(self):
        """A single reward function gives two names to one number."""
        suggestion = seen(lambda u: {"loss": noise(u) ** 2, "rewards/f/mean": noise(u, 1), "reward": noise(u, 1)})
        assert {rule["metric"] for rule in suggestion.rules()} == {"loss", "reward"}
        assert "it is the same as reward" in draft(suggestion)

    def test_the_order_in_which_metrics_are_handed_in_does_not_matter(self):
        """A log holds them by name; so does what is judged from it."""
        names = ["loss", "zeta", "alpha", "grad_norm"]
        one = seen(lambda u: {name: noise(u, len(name)) ** 2 for name in names})
        other = seen(lambda u: {name: noise(u, len(name)) ** 2 for name in reversed(names)})
        assert one.rules() == other.rules()

    def test_one_that_comes_and_goes_is_left_out_unless_that_was_said(self):
        gone = seen(lambda u: {"loss": noise(u) ** 2} | ({"score": noise(u)} if u % 2 else {}))
        assert "score" not in {rule["metric"] for rule in gone.rules()}
        assert "not every update had it" in draft(gone)


@pytest.mark.parametrize(
    ("metric", "good"),
    [
        ("loss", "down"), ("eval_loss", "down"), ("aux_loss", "down"), ("perplexity", "down"), ("eval/ppl", "down"),
        ("reward", "up"), ("rewards/accuracy_reward/mean", "up"), ("rewards/margins", "up"), ("eval_accuracy", "up"),
        ("mean_token_accuracy", "up"), ("pass_rate", "up"), ("score", "up"), ("correct", "up"),
        ("reward_std", "none"), ("rewards/f/std", "none"), ("frac_reward_zero_std", "none"), ("rewards/chosen", "none"),
        ("kl", "none"), ("entropy", "none"), ("grad_norm", "none"), ("eval_runtime", "none"), ("underscored", "none"),
    ],
)  # fmt: skip
def test_which_way_is_better_by_name(metric, good):
    assert direction(metric) == good


@pytest.mark.parametrize(
    ("metric", "useless"),
    [
        ("num_tokens", True), ("step_time", True), ("learning_rate", True), ("lr", True), ("epoch", True),
        ("eval_samples_per_second", True), ("eval_runtime", True), ("gpu/memory", True), ("lr/group0", True),
        ("loss", False), ("timeliness", False), ("reward", False), ("color", False), ("completions/mean_length", False),
    ],
)  # fmt: skip
def test_what_says_nothing_about_a_run(metric, useless):
    assert bool(idle(metric)) is useless


def test_names_are_those_that_a_policy_takes():
    """The pattern here is the schema's."""
    (validator,) = MetricName.__metadata__
    for name in ("loss", "a/b.c-d", "1e5", "a" * 64, "a" * 65, "", "é", "a b", "-a", "a\n"):
        try:
            validator.func(name)
        except ValueError:
            assert not _NAME.fullmatch(name), name
        else:
            assert _NAME.fullmatch(name), name


class TestPanel:
    PANELS = (
        {"eval_loss": 2.0, "eval_accuracy": 0.50, "eval_runtime": 3.0, "eval_entropy": 1.0},
        {"eval_loss": 1.7, "eval_accuracy": 0.53, "eval_runtime": 3.1, "eval_entropy": 1.1},
        {"eval_loss": 1.8, "eval_accuracy": 0.52, "eval_runtime": 3.0, "eval_entropy": 1.2},
    )

    def test_room_is_made_from_the_changes_seen(self, loaded):
        policy, _, text = loaded(seen(HEALTHY["a bare loop"][0], panels=self.PANELS))
        loss, accuracy, entropy = policy.promotion.panel
        assert (loss.metric, loss.good, loss.min, loss.max) == ("eval_loss", "down", 0, None)
        assert (loss.max_gain, loss.max_loss) == (pytest.approx(ROOM * 0.3), pytest.approx(ROOM * 0.1))
        assert (accuracy.good, accuracy.min, accuracy.max) == ("up", 0, 1)
        assert (accuracy.max_gain, accuracy.max_loss) == (LEAST_ROOM, LEAST_ROOM)  # of its width
        assert (entropy.good, entropy.max_gain, entropy.max_loss) == ("none", pytest.approx(0.3), pytest.approx(0.3))
        assert "# - {metric: eval_runtime" in text

    def test_of_a_trainer_it_holds_what_has_a_direction(self, loaded):
        """The evaluation of a framework reports more than anybody wants to be judged by."""
        suggestion = seen(HEALTHY["a bare loop"][0], panels=self.PANELS)
        suggestion.tolerant = True
        policy, _, text = loaded(suggestion)
        assert [metric.metric for metric in policy.promotion.panel] == ["eval_loss", "eval_accuracy"]
        assert "# - {metric: eval_entropy" in text

    def test_the_run_itself_would_have_been_promoted(self, loaded):
        panels = [{name: value for name, value in panel.items() if name != "eval_runtime"} for panel in self.PANELS]
        policy, _, _ = loaded(seen(HEALTHY["a bare loop"][0], panels=panels))
        gate, previous = PromotionGate(policy.promotion), None
        for cycle, panel in enumerate(panels, 1):
            assert gate.decide(panel, previous=previous, cycle=cycle).allowed
            previous = panel

    def test_no_share_has_room_for_everything(self, loaded):
        panels = [{"eval_accuracy": 0.0}, {"eval_accuracy": 1.0}]
        policy, lints, _ = loaded(seen(HEALTHY["a bare loop"][0], panels=panels))
        assert policy.promotion.panel[0].max_gain == 0.5
        assert lints == []

    def test_without_an_evaluation_it_says_so(self, loaded):
        _, _, text = loaded(seen(HEALTHY["a bare loop"][0]))
        assert "No evaluation was seen." in text

    def test_a_run_that_trains_by_reward_has_its_reward(self, loaded):
        policy, _, _ = loaded(seen(HEALTHY["reinforcement"][0], by_reward=True))
        assert [metric.metric for metric in policy.promotion.panel] == ["reward"]

    @pytest.mark.parametrize(
        "values",
        [
            (0.0, 0.0),
            (5e-324, 1e-323),
            (1e-300, 2e-300),
            (1e300, -1e300),
            (1e308, -1e308),
            (math.nan, 1.0),
            (math.inf, math.nan),
        ],
    )
    def test_strange_values_still_load(self, loaded, values):
        loaded(seen(HEALTHY["a bare loop"][0], panels=[{"eval_loss": value} for value in values]))
