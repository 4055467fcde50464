"""One meaning, one digest; and the text as it was."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_kit import RESUME, SMALL, WITHOUT_TOOLS, edited, small

from loopguard.policy.load import _LATER, canonical, digest, load, shipped
from loopguard.policy.schema import GuardPolicy
from loopguard.policy.source import parse

CELL = "sandbox__profiles__offline__"
LIMITS = f"{CELL}limits__"
SANDBOX = ("sandbox", "profiles", "*")


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
    assert digest(small()) == "c01f58fdb0bded064a5e48c56364c5147e9f22809d1828c26e96df34d0c520c0"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("toolformer", "a9c36a2afc9cc561d48e84cc14d652d7906d5dcdf111c550a130b94db0132f50"),
        ("default", "ce1048c388275bd5261878639b41a6b9ed2fe47d6c980205b8a1577931de24c9"),
    ],
)
def test_an_upgrade_orphans_no_run(name, known):
    """These policies had these digests before the format knew any of the later keys."""
    assert load(shipped(name)).digest == known


WRITTEN = {
    CELL + "privileges": "multi",
    CELL + "queue": 1000,
    CELL + "background": False,
    LIMITS + "files": 64,
    LIMITS + "files_size": "8MiB",
    LIMITS + "files_depth": 8,
    "audit__checkpoint_every": 1000,
    "audit__anchors": [],
    "audit__segment": "64MiB",
    "audit__compress": True,
    "audit__retain_days": 365,
    "audit__payloads": {"code": "head", "printed": "digest"},
}
OTHER = [
    {CELL + "privileges": "strict"},
    {CELL + "queue": 999},
    {CELL + "queue": 0},
    {CELL + "mode": "episode"},
    {CELL + "mode": "episode", CELL + "background": True},
    {CELL + "egress": {"allow": [{"host": "a.example.org", "port": 443}]}},
    {CELL + "egress": {"allow": [{"host": "a.example.org", "port": 443, "secret_headers": {"X": "K"}}]}},
    {LIMITS + "files": 1},
    {LIMITS + "files_size": "1MiB"},
    {LIMITS + "files_depth": 1},
    {LIMITS + "files": 8, LIMITS + "files_depth": 64},
    {"tools__budget": {"per_cycle": 10}},
    {"tools__budget": {"per_cycle": 11}},
    {CELL + "mode": "episode", "tools__budget": {"per_rollout": 10}},
    {"audit__checkpoint_every": 999},
    {"audit__anchors": [{"kind": "print"}]},
    {"audit__anchors": [{"kind": "print", "required": True}]},
    {"audit__anchors": [{"kind": "file", "path": "/a"}]},
    {"audit__anchors": [{"kind": "git", "repository": "/a"}]},
    {"audit__segment": "1MiB"},
    {"audit__compress": False},
    {"audit__retain_days": 30},
    {"audit__payloads": {"code": "keep"}},
    {"audit__payloads": {"code": "digest"}},
    {"audit__payloads": {"printed": "keep"}},
    {"resume": RESUME},
    {"resume": RESUME | {"approvals": 2}},
    {"resume": RESUME | {"within": "12h"}},
    {"notify": {"command": ["/bin/page"]}},
    {"notify": {"command": ["/bin/page"], "within": "1m"}},
    {"notify": {"command": ["/bin/page"], "events": ["freeze.entered"]}},
    {"notify": {"webhooks": [{"url": "https://a.example.org", "secret": "S"}]}},
    {"notify": {"webhooks": [{"url": "https://a.example.org", "secret": "T"}]}},
]


class TestLaterKeys:
    """Keys that the format learned later are left out where they say what was done before, and only there."""

    def test_written_out_they_mean_the_same(self):
        assert digest(small(**WRITTEN)) == digest(small())

    def test_any_other_value_is_another_digest(self):
        digests = [digest(small(**each)) for each in [{}, *OTHER]]
        assert len(set(digests)) == len(digests)

    @pytest.mark.parametrize("changes", [{}, WRITTEN, *OTHER])
    def test_the_whole_policy_can_be_read_back(self, changes):
        """What is left out can be filled in again, so no two policies share a digest."""
        policy = small(**changes)
        said = json.loads(canonical(policy))
        for profile in said["sandbox"]["profiles"].values():
            places = (
                *((profile, SANDBOX), (profile["limits"], (*SANDBOX, "limits"))),
                *((rule, ("tools", "rules", "*")) for rule in said["tools"]["rules"]),
                *((said[name], (name,)) for name in ("tools", "freeze", "audit")),
                (said, ()),
            )
            for section, way in places:
                assert not [key for key, value in _LATER[way].items() if key in section and section[key] == value]
                section |= {key: value for key, value in _LATER[way].items() if key not in section}
        assert said == policy.model_dump(mode="json")

    def test_a_profile_may_have_the_name_of_a_key(self):
        profile = {"image": "i:1", "limits": {"files": 65}}
        named = small(sandbox__profiles={"limits": profile, "files": profile}, tools__rules__0__sandbox="limits")
        assert {*json.loads(canonical(named))["sandbox"]["profiles"]} == {"limits", "files"}

    @pytest.mark.parametrize(("way", "before"), _LATER.items())
    def test_a_policy_without_them_does_today_what_it_did(self, way, before):
        """Where this fails, a default has changed. Leave the table alone: then the digest changes with the meaning."""
        said = small().model_dump(mode="json")
        profile = said["sandbox"]["profiles"]["offline"]
        sections = {"limits": profile["limits"], **{name: said[name] for name in ("tools", "freeze", "audit")}}
        sections["*"] = said["tools"]["rules"][0] if "rules" in way else profile
        section = sections[way[-1]] if way else said
        assert {key: section[key] for key in before} == before


class TestWithoutTools:
    """`tools` and `sandbox` may be left out together."""

    def test_left_out_or_empty_it_is_one_digest(self, tmp_path):
        texts = ["", "tools: {rules: []}\n", "sandbox: {profiles: {}}\ntools: {rules: [], default: deny}\n"]
        assert len({loaded(tmp_path, WITHOUT_TOOLS + text).digest for text in texts}) == 1

    def test_and_another_one_than_with_tools(self, tmp_path):
        assert loaded(tmp_path, WITHOUT_TOOLS).digest not in {digest(small()), digest(small(tools=None))}

    def test_it_is_read_back_as_the_same(self, tmp_path):
        policy = loaded(tmp_path, WITHOUT_TOOLS).policy
        said = json.loads(canonical(policy))
        assert (said["tools"], said["sandbox"]) == (
            {"default": "deny", "rules": [], "freeze_above": None},
            {"profiles": {}},
        )


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
