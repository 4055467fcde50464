"""Another policy for the same run: anything that is not provably tighter is loosened."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_kit import KEYS, RESUME, small
from test_policy_decide import CALLS, policy, rule_lists

from loopguard.policy.decide import decide
from loopguard.policy.diff import _NAMED, _ORDER, _effective, _leaves, _order, changes, compare
from loopguard.policy.load import _LATER

SANDBOX = ("sandbox", "profiles", "*")
RULE = "tools__rules__0__"
PRINTED = {"kind": "print"}
PLACE = {"kind": "file", "path": "/mnt/a"}
CELL = "sandbox__profiles__offline__"
LIMITS = f"{CELL}limits__"
FREEZE = "tools__freeze_above__"
BOUNDS = "updates__monitors__1__"
JUMP = "updates__monitors__2__"
PANEL = "promotion__panel__0__"
SHELL = {"id": "shell", "tool": "sh", "then": "run", "sandbox": "offline"}
KEPT = {"min": 0.1, "max": 0.9, "max_change": 0.5}
RECHECK = {"sample": 10, "max_wrong_share": 0.1}
A = {"host": "a.example.org", "port": 443}
B = {"host": "b.example.org", "port": 443}
SECRET = A | {"secret_headers": {"X": "K"}}
SKIP = {"on_trip": "skip", "skip_at_most": {"updates": 2, "per": 100}}
PAGE = {"command": ["/bin/page"]}
HOOK = {"url": "https://a.example.org", "secret": "S"}
ANOTHER_KEY = [f'valid-before="20400101Z" {KEYS[0]}']

# (changes of the old policy, changes of the new one, direction); the way back of a tightening is a loosening.
TABLE = [
    ({}, {}, "same"),
    ({}, {"name": "other", "description": "words"}, "same"),
    ({}, {RULE + "id": "renamed"}, "same"),
    ({}, {CELL + "mode": "pooled", CELL + "cells": 2}, "same"),
    ({}, {"sandbox__profiles__unused": {"image": "other:1"}}, "same"),
    ({}, {RULE + "max_code_bytes": 100}, "tightened"),
    ({}, {RULE + "refuse_patterns": ["import"]}, "tightened"),
    ({RULE + "refuse_patterns": ["a", "b"]}, {RULE + "refuse_patterns": ["b", "a"]}, "same"),
    ({RULE + "refuse_patterns": ["a", "b"]}, {RULE + "refuse_patterns": ["a", "c"]}, "loosened"),
    ({}, {CELL + "image": "loopguard/python:2"}, "loosened"),
    ({}, {CELL + "mode": "fresh"}, "tightened"),
    ({}, {CELL + "mode": "episode"}, "loosened"),
    ({CELL + "mode": "episode"}, {}, "loosened"),
    ({CELL + "mode": "episode"}, {CELL + "mode": "fresh"}, "tightened"),
    ({CELL + "calls_per_cell": 10}, {CELL + "mode": "fresh"}, "tightened"),
    ({}, {CELL + "runtime": "runsc"}, "tightened"),
    ({}, {CELL + "privileges": "strict"}, "loosened"),
    ({CELL + "privileges": "strict"}, {}, "loosened"),
    ({}, {CELL + "cells": 1}, "tightened"),
    ({}, {CELL + "queue": 1}, "same"),
    ({CELL + "mode": "episode"}, {CELL + "mode": "episode", CELL + "background": True}, "loosened"),
    ({CELL + "mode": "episode", CELL + "background": True}, {CELL + "mode": "episode"}, "tightened"),
    ({}, {CELL + "egress": {"allow": [A]}}, "loosened"),
    ({CELL + "egress": {"allow": [A, B]}}, {CELL + "egress": {"allow": [B]}}, "tightened"),
    ({CELL + "egress": {"allow": [A, B]}}, {CELL + "egress": {"allow": [B, A]}}, "same"),
    ({CELL + "egress": {"allow": [A]}}, {CELL + "egress": {"allow": [B]}}, "loosened"),
    ({CELL + "egress": {"allow": [A]}}, {CELL + "egress": {"allow": [A | {"port": 80}]}}, "loosened"),
    ({CELL + "egress": {"allow": [A]}}, {CELL + "egress": {"allow": [A | {"secret_headers": {"X": "K"}}]}}, "loosened"),
    ({CELL + "egress": {"allow": [SECRET]}}, {CELL + "egress": {"allow": [A]}}, "loosened"),
    ({CELL + "egress": {"allow": [SECRET]}}, {CELL + "egress": {"allow": [A | {"secret_headers": {"X": "OTHER"}}]}},
     "loosened"),
    ({CELL + "egress": {"allow": [SECRET]}}, {CELL + "egress": {"allow": [A | {"secret_headers": {"Y": "K"}}]}},
     "loosened"),
    ({CELL + "egress": {"allow": [SECRET, B]}}, {CELL + "egress": {"allow": [B]}}, "tightened"),
    ({}, {CELL + "calls_per_cell": 10}, "tightened"),
    ({CELL + "preload": ["numpy", "math"]}, {CELL + "preload": ["math"]}, "tightened"),
    ({CELL + "preload": ["numpy", "math"]}, {CELL + "preload": ["math", "numpy"]}, "same"),
    ({}, {LIMITS + "wall": "1s"}, "tightened"),
    ({}, {LIMITS + "wall": "2000ms"}, "same"),
    ({}, {LIMITS + "memory": "64MiB"}, "tightened"),
    ({}, {LIMITS + "pids": 16}, "tightened"),
    ({}, {LIMITS + "cpus": 0.5}, "tightened"),
    ({}, {LIMITS + "tmpfs": "8MiB"}, "tightened"),
    ({}, {LIMITS + "output": "8KiB"}, "tightened"),
    ({}, {LIMITS + "flood": "8MiB"}, "tightened"),
    ({}, {LIMITS + "files": 63}, "tightened"),
    ({}, {LIMITS + "files_size": "7MiB"}, "tightened"),
    ({}, {LIMITS + "files_depth": 7}, "tightened"),
    ({}, {LIMITS + "files": 64, LIMITS + "files_size": "8MiB", LIMITS + "files_depth": 8}, "same"),
    ({LIMITS + "tmpfs": "4MiB"}, {LIMITS + "tmpfs": "4MiB", LIMITS + "files_size": "4MiB"}, "same"),
    ({}, {LIMITS + "wall": "1s", LIMITS + "pids": 33}, "loosened"),
    ({}, {FREEZE + "refused_share": 0.05}, "tightened"),
    ({}, {FREEZE + "contained_share": 0.05}, "tightened"),
    ({}, {FREEZE + "of_last_calls": 10}, "loosened"),
    ({}, {FREEZE + "of_last_calls": 40}, "loosened"),
    ({"tools__freeze_above": None}, {}, "tightened"),
    ({}, {"tools__budget": {"per_cycle": 10}}, "tightened"),
    ({"tools__budget": {"per_cycle": 10}}, {"tools__budget": {"per_cycle": 9}}, "tightened"),
    ({CELL + "mode": "episode"}, {CELL + "mode": "episode", "tools__budget": {"per_rollout": 10}}, "tightened"),
    ({"tools__budget": {"per_cycle": 10}}, {"tools__budget": {"per_cycle": 10, "per_rollout": 5},
      CELL + "mode": "episode"}, "loosened"),
    ({}, {"data__sources": ["human"]}, "tightened"),
    ({}, {"data__sources": ["model", "human"]}, "same"),
    ({}, {"data__overlap_ngram": 8}, "tightened"),
    ({}, {"data__max_own_share": 0.4}, "tightened"),
    ({}, {"data__forbidden_in_prompt": ["<<"]}, "tightened"),
    ({}, {"data__kept_share": KEPT}, "tightened"),
    ({"data__kept_share": KEPT}, {"data__kept_share": KEPT | {"min": 0.2}}, "tightened"),
    ({"data__kept_share": KEPT}, {"data__kept_share": KEPT | {"max": 0.8}}, "tightened"),
    ({"data__kept_share": KEPT}, {"data__kept_share": KEPT | {"max_change": 0.4}}, "tightened"),
    ({}, {"data__min_mean_gain": 0.0}, "tightened"),
    ({"data__min_mean_gain": 0.0}, {"data__min_mean_gain": 0.1}, "tightened"),
    ({}, {"data__recheck": RECHECK}, "tightened"),
    ({"data__recheck": RECHECK}, {"data__recheck": RECHECK | {"sample": 99}},
     "loosened"),
    ({"data__recheck": RECHECK}, {"data__recheck": RECHECK | {"max_wrong_share": 0.0}},
     "tightened"),
    ({}, {"data__freeze_above": {"quarantined_share": 0.5, "of_at_least": 20}}, "tightened"),
    ({}, {"updates__loss_kind": "surrogate"}, "loosened"),
    ({"updates__loss_kind": "surrogate"}, {}, "loosened"),
    ({}, {"updates__lease": 8}, "tightened"),
    ({}, {BOUNDS + "max": 9.0}, "tightened"),
    ({}, {BOUNDS + "min": 0.5}, "tightened"),
    ({}, {"updates__monitors": [{"kind": "bounds", "metric": "loss"}]}, "loosened"),
    ({}, {"updates__false_alarm_every": 50_000}, "tightened"),
    ({}, {JUMP + "min_change": 0.1}, "loosened"),
    ({}, {JUMP + "good": "none"}, "loosened"),
    ({}, {JUMP + "good": "up"}, "loosened"),
    ({}, {JUMP + "good": "down"}, "same"),
    ({}, {PANEL + "problems": 400}, "tightened"),
    ({PANEL + "problems": 400}, {PANEL + "problems": 800}, "loosened"),
    ({}, {"promotion__false_alarm_every": 500}, "tightened"),
    ({}, {"promotion__keep_snapshots": 9}, "same"),
    ({}, {"freeze__capsule": "1MiB"}, "same"),
    ({}, {PANEL + "max_gain": 0.1}, "tightened"),
    ({}, {PANEL + "max_loss": 0.05}, "tightened"),
    ({}, {PANEL + "max": 0.9}, "tightened"),
    ({}, {PANEL + "good": "none"}, "loosened"),
    ({}, {PANEL + "metric": "renamed"}, "loosened"),
    ({}, {"freeze__when_frozen": "wait"}, "same"),
    ({}, {"freeze__signal": "HUP"}, "same"),
    ({}, {"freeze__signal": "none"}, "loosened"),
    ({}, {"freeze__waive_at_most": 4}, "tightened"),
    ({}, {"freeze__second_latch": "/mnt/a"}, "tightened"),
    ({"freeze__second_latch": "/mnt/a"}, {"freeze__second_latch": "/mnt/b"}, "loosened"),
    ({}, {"freeze__probation": {"cycles": 3, "tighten": 0.5}}, "tightened"),
    ({"freeze__probation": {"cycles": 3, "tighten": 0.5}}, {"freeze__probation": {"cycles": 4, "tighten": 0.5}},
     "tightened"),
    ({"freeze__probation": {"cycles": 3, "tighten": 0.5}}, {"freeze__probation": {"cycles": 3, "tighten": 0.9}},
     "loosened"),
    ({}, {"freeze__halt_above": {"freezes": 3, "cycles": 50}}, "tightened"),
    ({"freeze__halt_above": {"freezes": 3, "cycles": 50}}, {"freeze__halt_above": {"freezes": 3, "cycles": 40}},
     "loosened"),
    ({}, {"hold": {"at_most": "1h"}}, "tightened"),
    ({}, {"hold": {"free": "1GiB"}}, "tightened"),
    ({"hold": {"free": "1GiB"}}, {}, "loosened"),
    ({"freeze__running_calls": "drain"}, {"freeze__running_calls": "drain", "tools__rules__0__on_freeze": "kill"},
     "tightened"),
    ({}, {"tools__rules__0__on_freeze": "drain"}, "loosened"),
    ({}, {"tools__rules__0__on_freeze": "kill"}, "same"),
    ({"freeze__running_calls": "drain"}, {}, "tightened"),
    ({"freeze": SKIP}, {}, "tightened"),
    ({"freeze": SKIP}, {"freeze": SKIP | {"skip_at_most": {"updates": 1, "per": 100}}}, "tightened"),
    ({"freeze": SKIP}, {"freeze": SKIP | {"skip_at_most": {"updates": 2, "per": 200}}}, "tightened"),
    ({"freeze": SKIP}, {"freeze": SKIP | {"skip_at_most": {"updates": 1, "per": 50}}}, "loosened"),
    ({}, {"audit__reserve": "8MiB"}, "tightened"),
    ({}, {"audit__checkpoint_every": 500}, "tightened"),
    ({}, {"audit__segment": "1MiB"}, "same"),
    ({}, {"audit__compress": False}, "same"),
    ({}, {"audit__retain_days": 366}, "tightened"),
    ({}, {"audit__anchors": [PRINTED]}, "tightened"),
    ({"audit__anchors": [PRINTED]}, {"audit__anchors": [PRINTED | {"required": True}]}, "tightened"),
    ({"audit__anchors": [PRINTED]}, {"audit__anchors": [PRINTED, PLACE]}, "tightened"),
    ({"audit__anchors": [PRINTED, PLACE]}, {"audit__anchors": [PLACE, PRINTED]}, "same"),
    ({"audit__anchors": [PLACE]}, {"audit__anchors": [PLACE | {"path": "/mnt/b"}]}, "loosened"),
    ({}, {"audit__payloads": {"code": "keep"}}, "loosened"),
    ({"audit__payloads": {"code": "keep"}}, {}, "loosened"),
    ({}, {"audit__payloads": {"printed": "keep"}}, "loosened"),
    ({}, {"resume": RESUME}, "tightened"),
    ({"resume": RESUME}, {"resume": RESUME | {"approvals": 2}}, "tightened"),
    ({"resume": RESUME}, {"resume": RESUME | {"within": "1h"}}, "tightened"),
    ({"resume": RESUME}, {"resume": RESUME | {"execute_within": "30m"}}, "tightened"),
    ({"resume": RESUME | {"requester_may_approve": True}}, {"resume": RESUME}, "tightened"),
    ({"resume": RESUME}, {"resume": RESUME | {"people": {"eli": [KEYS[1]], "dana": [KEYS[0]]}}}, "tightened"),
    ({"resume": RESUME}, {"resume": RESUME | {"people": dict(reversed(RESUME["people"].items()))}}, "same"),
    ({"resume": RESUME}, {"resume": RESUME | {"people": RESUME["people"] | {"dana": ANOTHER_KEY}}}, "loosened"),
    ({"resume": RESUME}, {"resume": RESUME | {"approvals": 2, "within": "48h"}}, "loosened"),
    ({}, {"notify": PAGE}, "loosened"),
    ({"notify": PAGE}, {}, "loosened"),
    ({}, {"notify": {"webhooks": [HOOK]}}, "loosened"),
    ({"notify": {"webhooks": [HOOK]}}, {}, "loosened"),
    ({"notify": {"webhooks": [HOOK]}}, {"notify": {"webhooks": [HOOK | {"secret": "T"}]}}, "loosened"),
    ({"notify": PAGE}, {"notify": PAGE | {"command": ["/bin/page", "-v"]}}, "loosened"),
    ({"notify": PAGE | {"events": ["freeze.entered"]}}, {"notify": PAGE}, "tightened"),
    ({"notify": PAGE}, {"notify": PAGE | {"within": "1h"}}, "tightened"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "direction"), TABLE)
def test_table(old, new, direction):
    assert compare(small(**old), small(**new)) == direction
    back = compare(small(**new), small(**old))
    assert back == {"same": "same", "tightened": "loosened", "loosened": back}[direction]


def test_another_tool_loosens_and_a_denied_one_tightens():
    one, two = small(), small(tools__rules=[small().tools.rules[0].model_dump(exclude_unset=True), SHELL])
    assert [str(change) for change in changes(one, two)] == ["loosened: tools.run.sh from deny to run"]
    assert [str(change) for change in changes(two, one)] == ["tightened: tools.run.sh from run to deny"]


class TestWithoutTools:
    """A policy that lets no call run is as tight as one can be about calls."""

    NONE = small(tools=None, sandbox=None)

    @pytest.mark.parametrize(
        "some", [{}, {"tools__budget": {"per_cycle": 5}}, {"tools__freeze_above": None}, {CELL + "cells": 1}]
    )
    def test_to_take_the_tools_out_tightens_and_to_add_them_loosens(self, some):
        """Whatever bounds and watches the calls goes and comes with them."""
        some = small(**some)
        assert [str(change) for change in changes(some, self.NONE)] == ["tightened: tools.run.python from run to deny"]
        assert [str(change) for change in changes(self.NONE, some)] == ["loosened: tools.run.python from deny to run"]

    def test_left_out_or_empty_is_the_same(self):
        assert compare(self.NONE, small(tools={"rules": []}, sandbox={"profiles": {}})) == "same"
        assert compare(self.NONE, small(tools=None)) == "same"

    def test_to_watch_refused_calls_of_it_tightens(self):
        watched = small(tools={"rules": [], "freeze_above": {"refused_share": 0.1, "contained_share": 1.0}})
        assert (compare(self.NONE, watched), compare(watched, self.NONE)) == ("tightened", "loosened")


def test_a_deny_that_takes_effect_tightens_and_one_that_does_not_is_no_change():
    rules = [small().tools.rules[0].model_dump(exclude_unset=True), SHELL]
    deny_shell = {"id": "no-shell", "tool": "sh", "then": "deny"}
    deny_other = {"id": "no-sql", "tool": "sql", "then": "deny"}
    assert compare(small(tools__rules=rules), small(tools__rules=[*rules, deny_shell])) == "tightened"
    assert compare(small(tools__rules=rules), small(tools__rules=[*rules, deny_other])) == "same"


def test_a_profile_counts_by_what_it_is_and_not_by_its_name():
    there = small().model_dump(mode="json")["sandbox"]["profiles"]["offline"]
    assert there["image"] == "loopguard/python:1"
    renamed = small(
        tools__rules__0__sandbox="quiet",
        sandbox__profiles={
            "quiet": {
                "image": "loopguard/python:1",
                "limits": {"wall": "2s", "memory": "128MiB", "pids": 32, "cpus": 1.0, "tmpfs": "16MiB"},
            }
        },
    )
    assert compare(small(), renamed) == "same"


class TestToolsThatShareCells:
    """Two tools in one profile meet in its cells, and in an episode in its files."""

    def policy(self, *tools, apart=False):
        rules = [{"id": tool, "tool": tool, "then": "run", "sandbox": tool if apart else "both"} for tool in tools]
        profile = {"image": "i:1", "mode": "episode"}
        return small(tools__rules=rules, sandbox__profiles=dict.fromkeys([*tools] if apart else ["both"], profile))

    def test_to_bring_them_together_loosens_and_so_does_to_part_them(self):
        """Together they see each other's files; apart they have twice the cells."""
        together, apart = self.policy("python", "sh"), self.policy("python", "sh", apart=True)
        assert compare(apart, together) == compare(together, apart) == "loosened"
        (first, _) = changes(apart, together)
        assert str(first) == "loosened: tools.run.python.shares_cells_with from [] to ['sh']"

    def test_a_tool_that_goes_tightens_for_those_that_shared_cells_with_it(self):
        three, two = self.policy("exec", "python", "sh"), self.policy("exec", "python")
        assert [str(change) for change in changes(three, two)] == ["tightened: tools.run.sh from run to deny"]
        assert compare(two, three) == "loosened"


def test_a_place_outside_is_named_with_its_secrets():
    one, two = ({"sandbox__profiles__offline__egress": {"allow": [place]}} for place in (A, SECRET))
    (change,) = changes(small(**one), small(**two))
    assert str(change) == (
        "loosened: tools.run.python.cell.egress from ['a.example.org:443'] to ['a.example.org:443 X=$K']"
    )


def test_a_change_says_what_changed_and_how():
    (change,) = changes(small(), small(sandbox__profiles__offline__limits__wall="5s"))
    assert str(change) == "loosened: tools.run.python.cell.limits.wall_s from 2.0 to 5.0"
    (change,) = changes(small(), small(data__min_mean_gain=0.5))
    assert str(change) == "tightened: data.min_mean_gain from none to 0.5"


FULL = {
    "description": "all keys",
    CELL + "mode": "episode",
    "tools__budget": {"per_cycle": 100, "per_rollout": 10},
    RULE + "refuse_patterns": ["x"],
    "data__kept_share": KEPT,
    "data__min_mean_gain": 0.0,
    "data__recheck": RECHECK,
    "data__freeze_above": {"quarantined_share": 0.5, "of_at_least": 20},
    "freeze": SKIP,
    "resume": RESUME,
    "notify": PAGE,
}

# Keys where no value is tighter than another, each for a reason.
NOT_COMPARABLE = {
    "apiVersion",  # there is one
    "tools.default",  # there is one
    "tools.run.*.cell.image",  # another image may hold anything
    "tools.freeze_above.of_last_calls",  # a longer memory forgives bursts, a shorter one slow probing
    "data.recheck.sample",  # a small sample trips on one wrong record, a large one on a small share
    "updates.loss_kind",  # changes what a number means
    "updates.monitors.*.kind",
    "updates.monitors.*.metric",
    "updates.monitors.*.good",
    "promotion.panel.*.metric",
    "promotion.panel.*.good",
}


@pytest.mark.parametrize("key", [*_LATER[SANDBOX], *_LATER[*SANDBOX, "limits"]])
def test_no_later_key_can_change_unseen(key):
    """But for the queue, whatever differs in a new key is a change, in one direction or the other."""
    other = {
        "privileges": {CELL + "privileges": "strict"},
        "queue": {CELL + "queue": 1},
        "background": {CELL + "mode": "episode", CELL + "background": True},
        "egress": {CELL + "egress": {"allow": [A]}},
        "files": {LIMITS + "files": 65},
        "files_mib": {LIMITS + "files_size": "9MiB"},
        "files_depth": {LIMITS + "files_depth": 9},
    }[key]
    assert compare(small(), small(**other)) == ("same" if key == "queue" else "loosened")


def test_every_key_has_been_thought_about():
    """A key that is added to the schema appears here, so that somebody decides in which direction it is tighter."""
    leaves = {where for where, _ in _leaves(_effective(small(**FULL)))}
    general = {".".join((*where[:2], "*", *where[3:]) if where[:2] in _NAMED else where) for where in leaves}
    assert general == _ORDER.keys() | NOT_COMPARABLE
    assert not _ORDER.keys() & NOT_COMPARABLE


def test_a_key_nobody_thought_about_loosens():
    assert _order(("updates", "something_new")) == "any"
    assert _order(("promotion", "panel", "correct", "something_new")) == "any"


@given(old=rule_lists(), new=rule_lists(), calls=st.lists(CALLS, max_size=8))
def test_what_is_not_loosened_lets_nothing_run_that_did_not(old, new, calls):
    before, after = policy(*old), policy(*new)
    if compare(before, after) != "loosened":
        assert all(decide(before, call).allowed for call in calls if decide(after, call).allowed)


@given(old=rule_lists(), new=rule_lists())
def test_no_way_back_from_a_tightening_but_a_loosening(old, new):
    there, back = compare(policy(*old), policy(*new)), compare(policy(*new), policy(*old))
    assert (there == "same") == (back == "same")
    assert there == "loosened" or back == "loosened" or there == back == "same"
