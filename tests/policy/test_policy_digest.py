"""One meaning, one digest; and the text as it was."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_kit import SMALL, edited, small

from loopguard.policy.load import digest, load
from loopguard.policy.schema import GuardPolicy
from loopguard.policy.source import parse


def loaded(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_bytes(text.encode())
    return load(path)


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n" + SMALL.replace("\n", "   # why not\n"),
        SMALL.replace("\n", "\r\n"),
        "\ufeff" + SMALL,
        json.dumps(parse(SMALL, "small").data),
        edited(("wall: 2s", "wall: 2000ms"), ("memory: 128MiB", "memory: 0.125GiB")),
        edited(("cpus: 1.0", "cpus: 1"), ("refused_share: 0.1", "refused_share: 1e-1")),
        edited(("min: 0, max: 1", "min: -0.0, max: 1.0")),
        edited(("tool: python", "tool: 'python'")),
        edited(("tools:\n", "tools:\n  default: deny\n"), ("promotion:", "freeze: {when_frozen: raise}\npromotion:")),
    ],
)
def test_writing_the_same_otherwise_keeps_the_digest(tmp_path, text):
    assert loaded(tmp_path, text).digest == digest(small())


@given(st.data())
def test_the_order_of_keys_keeps_the_digest(data):
    def shuffled(tree):
        if isinstance(tree, dict):
            return {key: shuffled(tree[key]) for key in data.draw(st.permutations(sorted(tree)))}
        return [shuffled(each) for each in tree] if isinstance(tree, list) else tree

    text = json.dumps(shuffled(parse(SMALL, "small").data))
    assert digest(GuardPolicy.model_validate_json(text)) == digest(small())


@pytest.mark.parametrize(
    "edit",
    [
        ("wall: 2s", "wall: 2001ms"),
        ("max_own_share: 0.5", "max_own_share: 0.50000001"),
        ("id: calculator", "id: calculators"),
        ("name: small", "name: smaller"),
        ("[human, model]", "[model, human]"),
    ],
)
def test_another_value_is_another_digest(tmp_path, edit):
    assert loaded(tmp_path, edited(edit)).digest != digest(small())


def test_the_digest_is_stable_between_versions():
    """A run directory belongs to a digest. Where this fails, every run directory has to be adopted again: say so in the
    changelog."""
    assert digest(small()) == "6faf166c08a518251c7bd1e9708ccc5c50dbb84e3def0f7c4d915374ffd5060d"


def test_the_text_and_the_path_are_kept_as_they_were(tmp_path):
    text = SMALL.replace("\n", "\r\n") + "# näher\r\n"
    read = loaded(tmp_path, text)
    assert read.text == text
    assert read.path == str(tmp_path / "p.yaml")
    assert re.fullmatch(r"[0-9a-f]{64}", read.digest)


def test_a_later_edit_of_the_file_changes_nothing(tmp_path):
    read = loaded(tmp_path, SMALL)
    before = read.policy
    (tmp_path / "p.yaml").write_text("name: other\n")
    assert read.policy is before
    assert read.policy.name == "small"
