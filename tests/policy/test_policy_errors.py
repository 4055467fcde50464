"""Every problem of a policy is one line with its place, its value and the way out."""

import pytest
from policy_kit import SMALL, cases, edited
from pydantic import ValidationError

from loopguard.errors import PolicyError
from loopguard.policy import explain, schema
from loopguard.policy.load import load
from loopguard.policy.schema import GuardPolicy

LIMITS = "sandbox.profiles.offline.limits"


@pytest.mark.parametrize(("edits", "said"), cases("mistakes.txt"))
def test_one_mistake_gives_one_line_at_its_place(findings, edits, said):
    """`mistakes.txt` lists every form of error with its exact line, column and words."""
    assert findings(*edits) == said


def test_long_text_is_refused(findings):
    assert findings(("name: small", f"name: small\ndescription: {'x' * 501}")) == [
        "3:14: description has 501 characters; expected at most 500"
    ]


def test_a_profile_needs_a_name_that_a_rule_can_write(findings):
    assert findings(("    offline:\n", "    Off Line:\n")) == [
        "8:16: tools.rules[0].sandbox is 'offline'; sandbox.profiles has Off Line. Did you mean 'Off Line'?",
        "14:7: sandbox.profiles['Off Line'] is no name for a profile; use small letters, digits, '-' and '_'",
    ]


def test_every_problem_is_reported_at_once_in_the_order_of_the_file(findings):
    said = findings(
        ("name: small", "name: 1"),
        ("then: run", "then: dney"),
        ("sandbox: offline", "sandbox: offlin"),
        ("wall: 2s", "wall: 2"),
        ("sources", "sourcs"),
        ("kind: jump", "kind: jmp"),
    )
    assert [line.split(":")[0] for line in said] == ["2", "7", "8", "16", "22", "29"]


def test_a_hundred_problems_are_enough(findings):
    said = findings(text=SMALL + "".join(f"k{i}: 1\n" for i in range(500)))
    assert len(said) == 101
    assert said[-1] == "and at least 400 more problems"


def test_a_file_of_mistakes_is_refused_without_a_long_search(findings):
    """Lists have a bound, so that a hostile file cannot make its refusal expensive."""
    rules = "    - {id: a, tool: python, then: run, sandbox: x}\n" * 1001
    said = findings(("  rules:\n", f"  rules:\n{rules}"))
    assert "5:5: tools.rules has 1002 entries; expected at most 1000" in said


class TestWhatNoCodeEnforcesYet:
    @pytest.mark.parametrize("section", ["capabilities", "approvals", "people", "extends", "budgets", "waivers"])
    def test_a_section_of_the_future_is_refused(self, findings, section):
        assert findings(("name: small", f"name: small\n{section}: {{}}")) == [
            f"3:1: no code enforces {section!r} yet; take it out"
        ]

    def test_so_is_a_key_of_the_future(self, findings):
        assert findings(("promotion:\n", "audit: {sinks: []}\npromotion:\n")) == [
            "31:9: audit: no code enforces 'audit.sinks' yet; take it out"
        ]

    def test_a_key_that_is_enforced_by_now_leaves_the_list(self):
        keys = {key.replace("[]", "") for key in explain._homes(GuardPolicy)}
        assert not {".".join((*where, key)) for where, names in explain.NOT_YET.items() for key in names} & keys


class TestModels:
    def sections(self):
        return [each for each in vars(schema).values() if isinstance(each, type) and issubclass(each, schema.Section)]

    def test_unknown_keys_other_types_and_changes_are_refused_everywhere(self):
        sections = [
            each for each in vars(schema).values() if isinstance(each, type) and issubclass(each, schema.Section)
        ]
        assert len(sections) > 15
        for section in sections:
            config = section.model_config
            assert config["strict"], section
            assert config["frozen"], section
            assert config["extra"] == "forbid", section
            assert config["allow_inf_nan"] is False, section

    def test_every_required_key_says_what_it_means(self):
        for section in self.sections():
            for key, field in section.model_fields.items():
                assert field.description or not field.is_required(), f"{section.__name__}.{key}"

    def test_a_model_made_by_hand_is_checked_as_a_whole(self):
        with pytest.raises(ValidationError, match="let nothing run"):
            schema.Tools(rules=(schema.ToolRule(id="never", tool="sh", then="deny"),))

    def test_limits_travel_as_they_are(self, tmp_path):
        path = tmp_path / "p.yaml"
        path.write_text(edited(("wall: 2s", "wall: 1500ms"), ("memory: 128MiB", "memory: 1.5GiB")))
        limits = load(path).policy.sandbox.profiles["offline"].limits.to_limits()
        assert (limits.wall_s, limits.memory_mib, limits.pids, limits.cpus) == (1.5, 1536, 32, 1.0)
        assert (limits.tmpfs_mib, limits.output_kib, limits.flood_mib) == (16, 64, 16)
        assert (limits.files, limits.files_mib, limits.files_depth) == (64, 8, 8)

    def test_files_are_never_promised_more_room_than_the_tmpfs_has(self):
        assert schema.CellLimits(tmpfs="4MiB").to_limits().files_mib == 4


def test_load_raises_every_finding(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(edited(("name: small", "name: 1"), ("wall: 2s", "wall: 2")))
    with pytest.raises(PolicyError) as refused:
        load(path)
    assert refused.value.exit_code == 3
    assert refused.value.findings == (
        f"{path}:2:7: name is 1; expected text. Put it in quotes",
        f"{path}:16:15: {LIMITS}.wall is 2; write a unit, such as 2s",
    )
