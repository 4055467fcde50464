"""docs/policy.md is complete, and its examples load."""

import json
import re
from pathlib import Path

import pytest
from policy_kit import SMALL

from loopguard.policy import explain, schema
from loopguard.policy.load import _LATER
from loopguard.policy.schema import GuardPolicy
from loopguard.policy.source import parse

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split(":")[0])
def test_every_example_loads(example):
    read = parse(example, "docs")
    assert read.findings == []
    whole = parse(SMALL, "small").data | read.data
    GuardPolicy.model_validate_json(json.dumps(whole))


def test_every_section_has_an_example():
    shown = {key for example in EXAMPLES for key in parse(example, "docs").data}
    assert shown == {field.alias or key for key, field in GuardPolicy.model_fields.items()}


@pytest.mark.parametrize("place", sorted(set(explain._homes(GuardPolicy))))
def test_every_key_is_explained(place):
    """Each key stands in a table, alone or behind the name of its section."""
    key = place.rpartition(".")[2]
    assert re.search(rf"^(\| .*)?`([\w.]+\.)?{key}`", PAGE, re.MULTILINE), place


def test_it_opens_with_what_a_demanding_user_expects():
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE)[0] == "What a demanding user expects"


DEFAULTS = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| `([^`]*)` \|", PAGE, re.MULTILINE))


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        (schema.Profile, "mode runtime privileges cells queue background calls_per_cell"),
        (schema.Data, "overlap_ngram max_own_share"),
        (schema.Updates, "lease"),
        (schema.JumpRule, "min_change"),
        (schema.Promotion, "false_alarm_every keep_snapshots"),
        (schema.Freeze, "on_trip when_frozen running_calls"),
    ],
)
def test_the_tables_give_the_defaults_of_the_code(section, keys):
    for key in keys.split():
        default = section.model_fields[key].default
        assert DEFAULTS[key] == (str(default).lower() if isinstance(default, bool) else str(default)), key


@pytest.mark.parametrize("section", [schema.CellLimits, schema.Audit])
def test_and_so_they_do_where_units_are_written(section):
    keys = [field.alias or key for key, field in section.model_fields.items()]
    written = parse("".join(f"{key}: {DEFAULTS[key]}\n" for key in keys), "docs").data
    assert section.model_validate_json(json.dumps(written)) == section()


def test_the_keys_that_the_digest_leaves_out_are_named():
    (said,) = re.findall(r"so a file\nwithout them keeps its digest: (.*?)\n\n", PAGE, re.DOTALL)
    profile, limits, tools = _LATER.values()
    assert set(re.findall(r"`(?:\w+: )?(\w+)", said)) >= {
        "multi",
        "1000",
        "false",
        "egress",
        "64",
        "8MiB",
        "8",
        "budget",
    }
    assert len(re.findall(r"`", said)) == 2 * (len(profile) + len(limits) + len(tools))
