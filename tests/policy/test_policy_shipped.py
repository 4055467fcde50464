"""The policies that come with LoopGuard are complete, sound and quiet."""

from pathlib import Path

import pytest

from loopguard.errors import PolicyError
from loopguard.policy.decide import decide
from loopguard.policy.load import check, load, shipped
from loopguard.types import ToolCall

POLICIES = Path(__file__).parents[2] / "policies"


@pytest.mark.parametrize("path", sorted(POLICIES.iterdir()), ids=lambda path: path.name)
def test_every_policy_loads_without_a_lint(path):
    assert path.suffix == ".yaml"
    assert check(path) == []
    assert load(path).policy.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["agent", "default", "supervised", "toolformer"])
def test_shipped_policies_are_found_by_name(name):
    assert shipped(name) == POLICIES / f"{name}.yaml"
    assert load(shipped(name)).policy.name == name


def test_an_installed_package_finds_them_inside_itself(tmp_path, monkeypatch):
    home = tmp_path / "site-packages" / "loopguard"
    (home / "_shipped" / "policies").mkdir(parents=True)
    (home / "policy").mkdir()
    there = home / "_shipped" / "policies" / "default.yaml"
    there.write_text((POLICIES / "default.yaml").read_text())
    monkeypatch.setattr("loopguard.policy.load.__file__", str(home / "policy" / "load.py"))
    assert shipped("default") == there


@pytest.mark.parametrize("name", ["tooformer", "../secrets", "", "/etc/passwd", "default.yaml"])
def test_another_name_is_refused_with_the_ones_there_are(name):
    with pytest.raises(PolicyError, match="there is agent, default, supervised, toolformer"):
        shipped(name)


def test_a_slip_in_the_name_is_pointed_out():
    with pytest.raises(PolicyError, match=r"Did you mean 'toolformer'\?"):
        shipped("tooformer")


class TestToolformer:
    @pytest.mark.parametrize(
        "code",
        [
            "import os",
            "print(open('/etc/passwd').read())",
            "open ('x')",
            "exec('1')",
            "eval('1')",
            "\uff45val('1')",
            "().__class__",
            "print(1)" * 60,
        ],
    )
    def test_plain_escapes_are_refused(self, code):
        policy = load(shipped("toolformer")).policy
        assert not decide(policy, ToolCall(id="c", tool="python", code=code)).allowed

    @pytest.mark.parametrize(
        "code", ["print(3*4)", "print((12.5 + 3) / 2)", "print(round(100*1.05**3, 2))", "important = 1"]
    )
    def test_arithmetic_runs(self, code):
        policy = load(shipped("toolformer")).policy
        assert decide(policy, ToolCall(id="c", tool="python", code=code)).allowed

    def test_no_other_tool_runs(self):
        policy = load(shipped("toolformer")).policy
        assert not decide(policy, ToolCall(id="c", tool="sh", code="ls")).allowed


def test_the_default_runs_python_and_shell_and_nothing_else():
    policy = load(shipped("default")).policy
    verdicts = {tool: decide(policy, ToolCall(id="c", tool=tool, code="1")).allowed for tool in ("python", "sh", "sql")}
    assert verdicts == {"python": True, "sh": True, "sql": False}


class TestSupervised:
    def test_no_call_runs_and_nothing_asks_for_an_engine(self):
        policy = load(shipped("supervised")).policy
        assert not decide(policy, ToolCall(id="c", tool="python", code="1")).allowed
        assert (policy.tools.rules, policy.sandbox.profiles) == ((), {})

    def test_it_watches_what_a_trainer_reports(self):
        policy = load(shipped("supervised")).policy
        assert {(rule.kind, rule.metric) for rule in policy.updates.monitors} == {
            *((kind, "loss") for kind in ("bounds", "jump", "drift", "variance")),
            ("bounds", "grad_norm"),
        }
        assert [metric.metric for metric in policy.promotion.panel] == ["eval_loss"]


class TestAgent:
    def test_it_runs_python_shell_and_programs_in_one_cell_for_each_rollout(self):
        policy = load(shipped("agent")).policy
        assert {rule.tool: (rule.then, rule.sandbox) for rule in policy.tools.rules} == dict.fromkeys(
            ("python", "sh", "exec"), ("run", "rollout")
        )
        profile = policy.sandbox.profiles["rollout"]
        assert (profile.mode, profile.background, profile.privileges, profile.egress) == (
            "episode",
            True,
            "multi",
            None,
        )

    def test_its_limits_are_generous(self):
        limits = load(shipped("agent")).policy.sandbox.profiles["rollout"].limits
        assert (limits.wall_s, limits.memory_mib, limits.tmpfs_mib) == (60.0, 1024, 480)
        assert (limits.output_kib, limits.flood_mib) == (10 * 1024, 256)
        assert (limits.files, limits.files_mib, limits.files_depth) == (1000, 32, 16)

    def test_every_key_of_a_profile_that_may_matter_is_written_down(self):
        """A reader sees what an agent may do without looking a default up, but for what it has none of."""
        profile = load(shipped("agent")).policy.sandbox.profiles["rollout"]
        assert {*type(profile).model_fields} - profile.model_fields_set == {"egress", "calls_per_cell"}
        assert profile.limits.model_fields_set == {*type(profile.limits).model_fields}
