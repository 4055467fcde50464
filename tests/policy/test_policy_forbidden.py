"""What no cell ever has cannot be written in any spelling, and who tries is told what to do instead."""

import re
from pathlib import Path

import pytest
from policy_kit import SMALL

from loopguard.policy import explain
from loopguard.policy.forbidden import _WISHES, wish
from loopguard.policy.schema import GuardPolicy, Profile

LINES = re.sub(r"(?m)^#.*\n", "", (Path(__file__).parent / "forbidden.txt").read_text(encoding="utf-8")).strip("\n")
CASES = [tuple(block.split("\n    ")) for block in LINES.split("\n\n")]


@pytest.mark.parametrize(("line", "said"), CASES, ids=[line for line, _ in CASES])
def test_each_misconfiguration_is_refused_at_its_place_with_its_sentence(findings, line, said):
    """`forbidden.txt` lists them with their exact line, column and words."""
    assert findings(("      image:", f"      {line}\n      image:")) == [said]


def test_every_wish_is_in_the_list():
    tried = {wish(line.partition(":")[0]) for line, _ in CASES} - {None}
    assert tried == set(_WISHES)


def test_every_wish_has_a_sentence_of_its_own():
    assert len({each.never for each in _WISHES}) == len(_WISHES)
    assert len({each.sentence(True) for each in _WISHES}) == len(_WISHES)


def test_no_word_stands_for_two_wishes():
    assert all(wish(word) is each for each in _WISHES for word in each.words.split())


@pytest.mark.parametrize(
    "key",
    ["network_mode", "networkMode", "NetworkMode", "network-mode", "NETWORK_MODE", "networkmode", "--network-mode"],
)
def test_every_spelling_is_the_same_wish(findings, key):
    (said,) = findings(("      image:", f"      {key}: host\n      image:"))
    assert ": a cell is in no network (least of all in the host's); " in said


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (("name: small", "name: small\nnetwork: host"), "3:1: network: "),
        (("tools:\n", "tools:\n  network: host\n"), "4:3: tools.network: "),
        (("      tool: python", "      network: host\n      tool: python"), "6:7: tools.rules[0].network: "),
        (("  profiles:", "  network: host\n  profiles:"), "12:3: sandbox.network: "),
        (("        wall", "        network: host\n        wall"), "16:9: sandbox.profiles.offline.limits.network: "),
        (
            ("      limits:", "      egress: {network: host, allow: [{host: a.example.org, port: 1}]}\n      limits:"),
            "15:16: sandbox.profiles.offline.egress.network: ",
        ),
        (
            ("      limits:", "      egress: {allow: [{host: a.example.org, port: 1, network: host}]}\n      limits:"),
            "15:55: sandbox.profiles.offline.egress.allow[0].network: ",
        ),
    ],
)
def test_it_is_refused_wherever_cells_and_tools_are_described(findings, edit, place):
    (said,) = findings(edit)
    assert said.startswith(f"{place}a cell is in no network (least of all in the host's); ")


def test_elsewhere_such_a_word_is_only_unknown(findings):
    (said,) = findings(("data:\n", "data:\n  user: 1\n"))
    assert said.startswith("22:3: data: unknown key 'user'; expected one of ")


def test_a_slip_among_the_limits_is_still_pointed_out(findings):
    (said,) = findings(("pids: 32", "pid: 32"))
    assert said.endswith("; take it out. Did you mean 'pids'?")


def test_all_of_them_are_said_at_once(findings):
    said = findings(("      image:", "      privileged: true\n      pid: host\n      binds: ['/:/h']\n      image:"))
    assert [line.partition(":")[0] for line in said] == ["14", "15", "16"]


def test_what_a_container_gets_when_everything_is_asked_of_it(findings):
    """A whole run command of bad days, as a profile; none of it gets through."""
    keys = sorted(word for each in _WISHES for word in each.words.split())
    said = findings(("      image:", "".join(f"      {key}: [x]\n" for key in keys[:90]) + "      image:"))
    assert len(said) == 90
    assert not any("unknown key" in line for line in said)


def test_a_value_is_never_repeated(findings):
    """What stands under `environment` or `secrets` may be one."""
    for key in ("environment", "secrets", "env", "user", "command"):
        (said,) = findings(("      image:", f"      {key}: {{KEY: hunter2}}\n      image:"))
        assert "hunter2" not in said


def test_a_huge_value_costs_nothing(findings):
    (said,) = findings(("      image:", f"      binds: ['{'docker' * 100_000}']\n      image:"))
    assert said.endswith("a cell sees no file of the host; pass files with the call")


def test_no_section_has_such_a_key():
    """The words are refused because no section knows them; a section that learns one has to fail here."""
    # Those of `notify` speak of the host, for its owner: a program that is told of a freeze, a secret that signs.
    homes = [key for key in explain._homes(GuardPolicy) if not key.startswith("notify.")]
    keys = {key.rpartition(".")[2] for key in homes} | {*Profile.model_fields}
    assert not [key for key in keys if wish(key)]


def test_nothing_of_it_hides_in_a_sound_policy(findings):
    assert findings(text=SMALL) == []
