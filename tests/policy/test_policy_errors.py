"""Every problem of a policy is one line with its place, its value and the way out."""

import pytest
from policy_kit import SMALL, edited
from pydantic import BaseModel, ValidationError

from loopguard.errors import PolicyError
from loopguard.policy import explain, schema
from loopguard.policy.load import load
from loopguard.policy.schema import GuardPolicy

RULE = "tools.rules[0]"
LIMITS = "sandbox.profiles.offline.limits"
JUMP = "{kind: jump, metric: loss}"
PANEL = "{metric: correct, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.1}"
SECOND_RULE = "      max_code_bytes: 400\n    - "


def jump(settings):
    return (JUMP, f"{{kind: jump, metric: loss, {settings}}}")


# (edit, the only line said)
WRONG_VALUES = [
    (("then: run", "then: dney"), f"7:13: {RULE}.then is 'dney'; expected one of run, deny. Did you mean 'deny'?"),
    (("then: run", "then: true"), f"7:13: {RULE}.then is true; expected one of run, deny"),
    (("loopguard/v1", "loopguard/v2"), "1:13: apiVersion is 'loopguard/v2'; expected loopguard/v1"),
    (("name: small", "name: 12"), "2:7: name is 12; expected text. Put it in quotes"),
    (("name: small", "name: true"), "2:7: name is true; expected text. Put it in quotes"),
    (("name: small", "name: a b"), "2:7: name is 'a b'; expected small letters, digits, '.', '-' and '_', such as 'calc'"),
    (("name: small", "name: small\ndescription: ''"), "3:14: description is empty; give it a value or leave it out"),
    (("name: small", f"name: small\ndescription: {'x' * 501}"), "3:14: description has 501 characters; expected at most 500"),
    (("tools:\n", "tools:\n  default: run\n"), "4:12: tools.default is 'run'; expected deny"),
    (("id: calculator", "id: Calc 1"), f"5:11: {RULE}.id is 'Calc 1'; expected small letters, digits, '-' and '_', such as "
     "'offline'"),
    (("tool: python", "tool: '*'"), f"6:13: {RULE}.tool is '*'; expected the name of a tool, such as 'python'"),
    (("max_code_bytes: 400", "max_code_bytes: 0"), f"9:23: {RULE}.max_code_bytes is 0; expected at least 1"),
    (("max_code_bytes: 400", "max_code_bytes: 4e2"), f"9:23: {RULE}.max_code_bytes is 400.0; expected a whole number. Write "
     "400"),
    (("max_code_bytes: 400", "max_code_bytes: '400'"), f"9:23: {RULE}.max_code_bytes is '400'; expected a whole number. Take "
     "the quotes off"),
    (("max_code_bytes: 400", "max_code_bytes: 2000000"), f"9:23: {RULE}.max_code_bytes is 2000000; expected at most 1048576"),
    (("max_code_bytes: 400", "refuse_patterns: import"), f"9:24: {RULE}.refuse_patterns is 'import'; expected a list, such as "
     "[import]"),
    (("max_code_bytes: 400", "refuse_patterns: ['[']"), f"9:25: {RULE}.refuse_patterns[0] is '['; not a regular expression: "
     "unterminated character set at position 0"),
    (("max_code_bytes: 400", "refuse_patterns: [ok, 'x*']"), f"9:29: {RULE}.refuse_patterns[1] is 'x*'; it matches empty "
     "text, so that every call would be refused"),
    (("max_code_bytes: 400", "refuse_patterns: ['[[a]']"), f"9:25: {RULE}.refuse_patterns[0] is '[[a]'; not a regular "
     "expression with one meaning: Possible nested set at position 1"),
    (("max_code_bytes: 400", "refuse_patterns: [a, b, a]"), f"9:31: {RULE}.refuse_patterns[2] is 'a' for a second time; keep "
     "one, or give it another name"),
    (("refused_share: 0.1", "refused_share: 0"), "10:33: tools.freeze_above.refused_share is 0; expected more than 0"),
    (("refused_share: 0.1", "refused_share: 10%"), "10:33: tools.freeze_above.refused_share is '10%'; expected a number. Write "
     "0.1"),
    (("contained_share: 0.1", "contained_share: 1.5"), "10:55: tools.freeze_above.contained_share is 1.5; expected at most 1"),
    (("image: loopguard/python:1", "image: ''"), "14:14: sandbox.profiles.offline.image is ''; expected an image with its tag "
     "or digest, such as 'loopguard/python:1'"),
    (("image: loopguard/python:1", "image: loopguard/python"), "14:14: sandbox.profiles.offline.image is 'loopguard/python'; "
     "expected an image with its tag or digest, such as 'loopguard/python:1'"),
    (("image: loopguard/python:1", "image: --privileged:1"), "14:14: sandbox.profiles.offline.image is '--privileged:1'; "
     "expected an image with its tag or digest, such as 'loopguard/python:1'"),
    (("wall: 2s", "wall: 2"), f"16:15: {LIMITS}.wall is 2; write a unit, such as 2s"),
    (("wall: 2s", "wall: 0s"), f"16:15: {LIMITS}.wall is '0s'; expected 10ms to 24h"),
    (("wall: 2s", "wall: 1:30"), f"16:15: {LIMITS}.wall is '1:30'; expected a duration such as 5s"),
    (("wall: 2s", "wall: off"), f"16:15: {LIMITS}.wall is 'off'; expected a duration such as 5s"),
    (("memory: 128MiB", "memory: 256"), f"17:17: {LIMITS}.memory is 256; write a unit, such as 256MiB"),
    (("memory: 128MiB", "memory: 0MiB"), f"17:17: {LIMITS}.memory is '0MiB'; expected 16MiB to 1024GiB"),
    (("memory: 128MiB", "memory: 128MB"), f"17:17: {LIMITS}.memory is '128MB'; MB means 1000 to some and 1024 to others; write "
     "128MiB"),
    (("memory: 128MiB", "memory: 20000.5KiB"), f"17:17: {LIMITS}.memory is '20000.5KiB'; expected a whole number of MiB, such "
     "as 20MiB"),
    (("pids: 32", "pids: 010"), f"18:15: {LIMITS}.pids is '010'; expected a whole number. A leading zero means octal to some "
     "readers; write 10 or 8"),
    (("pids: 32", "pids: yes"), f"18:15: {LIMITS}.pids is 'yes'; expected a whole number"),
    (("pids: 32", "pids: true"), f"18:15: {LIMITS}.pids is true; expected a whole number"),
    (("pids: 32", "pids: 0x20"), f"18:15: {LIMITS}.pids is '0x20'; expected a whole number, written as in JSON: 8, 0.5 or "
     "1e-3"),
    (("pids: 32", "pids: 0"), f"18:15: {LIMITS}.pids is 0; expected at least 1"),
    (("cpus: 1.0", "cpus: .inf"), f"19:15: {LIMITS}.cpus is '.inf'; expected a number, written as in JSON: 8, 0.5 or 1e-3"),
    (("cpus: 1.0", "cpus: 0"), f"19:15: {LIMITS}.cpus is 0; expected at least 0.01"),
    (("cpus: 1.0", "cpus: [1]"), f"19:15: {LIMITS}.cpus is a list; expected a number"),
    (("tmpfs: 16MiB", "tmpfs: {size: 1}"), f"20:16: {LIMITS}.tmpfs is not a size; expected one such as 256MiB"),
    (("[human, model]", "[human, modle]"), "22:20: data.sources[1] is 'modle'; expected one of human, model. Did you mean "
     "'model'?"),
    (("[human, model]", "[human, human]"), "22:20: data.sources[1] is 'human' for a second time; keep one, or give it another "
     "name"),
    (("[human, model]", "[]"), "22:12: data.sources is empty, so that nothing could be trained on; expected human, model or "
     "both"),
    (("max_own_share: 0.5", "max_own_share: 0"), "23:18: data.max_own_share is 0, so that nothing of the model is admitted; "
     "take 'model' out of data.sources"),
    (("max_own_share: 0.5", "kept_share: {min: 0.9, max: 0.1, max_change: 1}"), "23:21: data.kept_share.min is 0.9, above max, "
     "which is 0.1; swap them"),
    (("max_own_share: 0.5", "recheck: yes"), "23:12: data.recheck is 'yes'; expected a mapping"),
    (("max_own_share: 0.5", "recheck: {sample: 0, max_wrong_share: 0}"), "23:21: data.recheck.sample is 0; expected at least 1"),
    (("max_own_share: 0.5", "recheck: {sample: 4, max_wrong_share: 1}"), "23:41: data.recheck.max_wrong_share is 1; expected "
     "less than 1"),
    (("max_own_share: 0.5", "forbidden_in_prompt: [5]"), "23:25: data.forbidden_in_prompt[0] is 5; expected text. Put it in "
     "quotes"),
    (("kind: jump", "kind: jmp"), "29:14: updates.monitors[2].kind is 'jmp'; expected one of bounds, jump. Did you mean 'jump'?"),
    (("kind: jump, ", ""), "29:7: updates.monitors[2].kind is missing: the monitor, bounds or jump"),
    ((JUMP, "jump"), "29:7: updates.monitors[2] is 'jump'; expected a mapping"),
    ((JUMP, "{kind: jump, metric: lss}"), "29:28: updates.monitors[2].metric is 'lss'; expected one of loss, grad_norm. Did you "
     "mean 'loss'?"),
    (jump("threshold: 0"), "29:45: updates.monitors[2].threshold is 0; expected more than 0"),
    (jump("threshold: '6'"), "29:45: updates.monitors[2].threshold is '6'; expected a number. Take the quotes off"),
    (jump("warmup: 0"), "29:42: updates.monitors[2].warmup is 0; expected at least 8"),
    (jump("window: 10, confirm: 11"), "29:55: updates.monitors[2].confirm is 11, more than the window of 10; 5 is usual"),
    (("good: up", "good: sideways"), "32:31: promotion.panel[0].good is 'sideways'; expected one of up, down, none"),
    (("min: 0, max: 1", "min: 2, max: 1"), "32:40: promotion.panel[0].min is 2, above max, which is 1; swap them"),
    (("max_gain: 0.2", "max_gain: -1"), "32:61: promotion.panel[0].max_gain is -1; expected at least 0"),
]  # fmt: skip

MISSING = [
    (("name: small\n", ""), "1:1: name is missing: what to call this policy in logs and reports"),
    (("      then: run\n", ""), f"5:7: {RULE}.then is missing: what becomes of a call: run or deny"),
    (("      sandbox: offline\n", ""), f"5:7: {RULE}.sandbox is missing: a rule with `then: run` names the profile that its "
     "calls run in"),
    (("      image: loopguard/python:1\n", ""), "14:7: sandbox.profiles.offline.image is missing: the image that cells start "
     "from, with its tag or digest"),
    (("  loss_kind: discrete\n", ""), "25:3: updates.loss_kind is missing: discrete (cross-entropy, never below zero), density, "
     "or surrogate (policy gradient)"),
    (("refused_share: 0.1, ", ""), "10:17: tools.freeze_above.refused_share is missing: share of calls refused by a rule, above "
     "which the loop freezes"),
    ((", metric: loss}", "}"), "27:7: updates.monitors[0].metric is missing: what it watches: loss or grad_norm"),
    ((", max_loss: 0.1", ""), "32:7: promotion.panel[0].max_loss is missing: the largest loss that one cycle may bring"),
]  # fmt: skip

UNKNOWN_KEYS = [
    (("tools:\n", "tols:\n"), "3:1: unknown key 'tols'. Did you mean 'tools'?"),
    (("tools:\n", "Tools:\n"), "3:1: unknown key 'Tools'. Did you mean 'tools'?"),
    (("then: run", "thn: run"), f"7:7: {RULE}: unknown key 'thn'. Did you mean 'then'?"),
    ((JUMP, "{kind: jump, metric: loss, confrm: 5}"), "29:34: updates.monitors[2]: unknown key 'confrm'. Did you mean "
     "'confirm'?"),
    ((JUMP, "{kind: jump, metric: loss, jump: 5}"), "29:34: updates.monitors[2]: unknown key 'jump'; expected one of kind, "
     "metric, threshold, min_change, window, confirm, warmup"),
    (("name: small", "name: small\nzzz: 1"), "3:1: unknown key 'zzz'; expected one of apiVersion, name, description, tools, "
     "sandbox, data, updates, promotion, freeze, audit"),
    (("data:\n", "data:\n  loss_kind: discrete\n"), "22:3: data: unknown key 'loss_kind' here; it belongs at "
     "updates.loss_kind, so check the indentation"),
    (("updates:\n", "freeze_above: {}\nupdates:\n"), "24:1: unknown key 'freeze_above' here; it belongs at data.freeze_above "
     "or tools.freeze_above, so check the indentation"),
    (("updates:\n", "wall: 5s\nupdates:\n"), "24:1: unknown key 'wall' here; it belongs at sandbox.profiles.NAME.limits.wall, "
     "so check the indentation"),
]  # fmt: skip

MEANING = [
    (("sandbox: offline", "sandbox: offlin"), f"8:16: {RULE}.sandbox is 'offlin'; sandbox.profiles has offline. Did you mean "
     "'offline'?"),
    (("      then: run\n      sandbox: offline\n      max_code_bytes: 400\n", "      then: deny\n"), "5:5: tools.rules let "
     "nothing run; add a rule with `then: run` and a `sandbox`"),
    (("      max_code_bytes: 400\n", SECOND_RULE + "{id: never, tool: python, then: deny}\n"), "5:5: tools.rules let nothing "
     "run, since a deny always wins; take out 'never'"),
    (("      max_code_bytes: 400\n", SECOND_RULE + "{id: calculator, tool: sh, then: run, sandbox: offline}\n"), "10:12: "
     "tools.rules[1].id is 'calculator' for a second time; keep one, or give it another name"),
    (("      max_code_bytes: 400\n", SECOND_RULE + "{id: other, tool: python, then: run, sandbox: offline}\n"), "10:25: "
     "tools.rules[1].tool is 'python', which rule 'calculator' already lets run; a tool has one sandbox, so keep one of the "
     "two"),
    (("      max_code_bytes: 400\n", SECOND_RULE + "{id: other, tool: sh, then: deny, max_code_bytes: 5}\n"), "10:57: "
     "tools.rules[1].max_code_bytes has no meaning with `then: deny`, which refuses every call of the tool; take it out"),
    (("      limits:", "      mode: fresh\n      calls_per_cell: 5\n      limits:"), "16:23: "
     "sandbox.profiles.offline.calls_per_cell has no meaning with `mode: fresh`, which takes a new cell for each call"),
    (("    - {kind: bounds, metric: loss}\n", ""), "27:5: updates.monitors let a loss that is not a number pass; add {kind: "
     "bounds, metric: loss}"),
    (("metric: grad_norm, min: 0", "metric: loss, max: 9"), "28:7: updates.monitors[1] watches loss with bounds a second time; "
     "keep one of the two"),
    (("{kind: bounds, metric: loss}", "{kind: bounds, metric: loss, min: -1}"), "27:41: updates.monitors[0].min is -1, but a "
     "discrete loss below zero is a bug; leave min out, or change loss_kind"),
    (("{kind: bounds, metric: loss}", "{kind: bounds, metric: loss, min: 2, max: 1}"), "27:41: updates.monitors[0].min is 2, "
     "above max, which is 1; swap them"),
    ((f"    - {PANEL}", f"    - {PANEL}\n    - {PANEL}"), "33:16: promotion.panel[1].metric is 'correct' for a second time; keep "
     "one, or give it another name"),
    ((f"  panel:\n    - {PANEL}", "  panel: []"), "31:10: promotion.panel is empty, so that any weights would be promoted; add "
     "at least one metric"),
    (("promotion:\n", "freeze: {on_trip: skip}\npromotion:\n"), "30:9: freeze.skip_at_most is missing: `on_trip: skip` needs a "
     "bound, such as {updates: 2, per: 100}"),
    (("promotion:\n", "freeze: {skip_at_most: {updates: 2, per: 9}}\npromotion:\n"), "30:24: freeze.skip_at_most has no meaning "
     "with `on_trip: freeze`; take it out, or write `on_trip: skip`"),
    (("promotion:\n", "freeze: {on_trip: skip, skip_at_most: {updates: 9, per: 9}}\npromotion:\n"), "30:49: "
     "freeze.skip_at_most.updates is 9 per 9, which is every update; expected fewer than `per`"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "said"), WRONG_VALUES + MISSING + UNKNOWN_KEYS)
def test_one_mistake_gives_one_line_at_its_place(findings, edit, said):
    assert findings(edit) == [said]


@pytest.mark.parametrize(("edit", "said"), MEANING)
def test_what_keys_ask_of_each_other_is_checked_at_load(findings, edit, said):
    assert findings(edit) == [said]


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


class TestWhatACellNeverHas:
    @pytest.mark.parametrize(
        ("line", "never"),
        [
            ("network: host", "a network"),
            ("privileged: true", "privileges"),
            ("binds: ['/:/host']", "files of the host"),
            ("volumes: []", "files of the host"),
            ("capabilities: [ALL]", "capabilities"),
            ("devices: [/dev/kvm]", "devices of the host"),
            ("user: root", "another user than the one LoopGuard picks for each call"),
            ("pid: host", "namespaces of the host"),
            ("seccomp: unconfined", "a security profile other than LoopGuard's"),
            ("env: {KEY: value}", "environment variables or secrets of the host"),
        ],
    )
    def test_cannot_be_written_in_a_profile(self, findings, line, never):
        key = line.split(":")[0]
        assert findings(("      image:", f"      {line}\n      image:")) == [
            f"14:7: sandbox.profiles.offline: {key!r} is refused: LoopGuard cells never have {never}; there is no switch for it"
        ]

    @pytest.mark.parametrize(
        ("edit", "place"),
        [
            (("name: small", "name: small\nnetwork: host"), "3:1: "),
            (("tools:\n", "tools:\n  network: host\n"), "4:3: tools: "),
            (("      tool: python", "      network: host\n      tool: python"), "6:7: tools.rules[0]: "),
            (("  profiles:", "  network: host\n  profiles:"), "12:3: sandbox: "),
            (("        wall", "        network: host\n        wall"), "16:9: sandbox.profiles.offline.limits: "),
        ],
    )
    def test_nor_anywhere_near(self, findings, edit, place):
        assert findings(edit) == [
            f"{place}'network' is refused: LoopGuard cells never have a network; there is no switch for it"
        ]

    def test_a_slip_among_the_limits_is_still_pointed_out(self, findings):
        (said,) = findings(("pids: 32", "pid: 32"))
        assert said.endswith("there is no switch for it. Did you mean 'pids'?")

    def test_no_model_has_such_a_key(self):
        """The words are refused because no section knows them; a section that learns one has to fail here."""
        keys = set(explain._homes(GuardPolicy))
        assert not {key.rpartition(".")[2] for key in keys} & explain.NEVER.keys()


class TestWhatNoCodeEnforcesYet:
    @pytest.mark.parametrize("section", ["capabilities", "resume", "people", "extends", "budgets", "probation"])
    def test_a_section_of_the_future_is_refused(self, findings, section):
        assert findings(("name: small", f"name: small\n{section}: {{}}")) == [
            f"3:1: no code enforces {section!r} yet; take it out"
        ]

    def test_so_is_a_key_of_the_future(self, findings):
        assert findings(("promotion:\n", "audit: {sinks: []}\npromotion:\n")) == [
            "30:9: audit: no code enforces 'audit.sinks' yet; take it out"
        ]

    def test_a_key_that_is_enforced_by_now_leaves_the_list(self):
        keys = {key.replace("[]", "") for key in explain._homes(GuardPolicy)}
        assert not {".".join((*where, key)) for where, names in explain.NOT_YET.items() for key in names} & keys


class TestModels:
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
        def sections(model: type[BaseModel]):
            return [each for each in vars(schema).values() if isinstance(each, type) and issubclass(each, model)]

        for section in sections(schema.Section):
            for key, field in section.model_fields.items():
                assert field.description or not field.is_required(), f"{section.__name__}.{key}"

    def test_a_model_made_by_hand_is_checked_as_a_whole(self):
        with pytest.raises(ValidationError, match="let nothing run"):
            schema.Tools(rules=())

    def test_limits_travel_as_they_are(self, tmp_path):
        path = tmp_path / "p.yaml"
        path.write_text(edited(("wall: 2s", "wall: 1500ms"), ("memory: 128MiB", "memory: 1.5GiB")))
        limits = load(path).policy.sandbox.profiles["offline"].limits.to_limits()
        assert (limits.wall_s, limits.memory_mib, limits.pids, limits.cpus) == (1.5, 1536, 32, 1.0)
        assert (limits.tmpfs_mib, limits.output_kib, limits.flood_mib) == (16, 64, 16)


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
