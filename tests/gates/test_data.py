"""The data gate: record by record, then the batch as a whole."""

from typing import ClassVar

import pytest

from loopguard.gates.data import DataGate, holds
from loopguard.policy.schema import Data
from loopguard.types import Check, Outcome, Provenance, Record

BASE = {"sources": ("human", "model"), "max_own_share": 0.5}


def gate(**settings):
    return DataGate(Data.model_validate(BASE | settings))


def record(n, *, source="human", prompt=None, completion="a b c", gain=None, check=None, provenance=True):
    origin = Provenance(source=source, origin=f"file:{n}", cycle=1) if provenance else None
    return Record(
        id=f"r{n}",
        prompt=f"question {n} " if prompt is None else prompt,
        completion=completion,
        provenance=origin,
        gain=gain,
        check=check,
    )


def reasons(batch):
    return {r.id: reason for r, reason in batch.quarantined}


class TestRecordByRecord:
    def test_a_record_without_provenance_is_quarantined(self):
        assert reasons(gate().verdict([record(1, provenance=False)], proposed=None)) == {"r1": "no_provenance"}

    def test_a_source_that_the_policy_does_not_name_is_quarantined(self):
        batch = gate(sources=("human",)).verdict([record(1, source="model")], proposed=None)
        assert reasons(batch) == {"r1": "source"}

    def test_forbidden_text_in_the_prompt_is_quarantined(self):
        batch = gate(forbidden_in_prompt=("<<",)).verdict([record(1, prompt="48/2=<<48/2=24>>")], proposed=None)
        assert reasons(batch) == {"r1": "forbidden_in_prompt"}

    def test_the_same_record_is_admitted_once_in_a_run(self):
        watch = gate()
        watch.commit(first := watch.verdict([record(1), record(1)], proposed=None))
        assert (len(first.admitted), reasons(first)) == (1, {"r1": "duplicate"})
        assert reasons(watch.verdict([record(1)], proposed=None)) == {"r1": "duplicate"}

    def test_thirteen_words_of_an_evaluation_text_are_an_overlap_and_twelve_are_not(self):
        watch = gate(overlap_ngram=13)
        words = [f"w{i}" for i in range(30)]
        watch.protect([" ".join(words)])
        inside = record(1, prompt="x ", completion=" ".join(words[5:18]))
        outside = record(2, prompt="x ", completion=" ".join(words[5:17]))
        assert reasons(watch.verdict([inside, outside], proposed=None)) == {"r1": "overlap"}

    def test_so_are_thirteen_where_a_prompt_ends_and_a_completion_begins(self):
        """Whether or not there is a space between the two."""
        words = [f"word{i}" for i in range(13)]
        watch = gate(overlap_ngram=13)
        watch.protect([" ".join(words)])
        whole = record(1, prompt="q", completion=" ".join(words))
        parted = record(2, prompt=" ".join(words[:6]), completion=" ".join(words[6:]))
        cut = record(3, prompt=" ".join(words[:6]) + " wor", completion=" ".join(words[6:])[3:])
        assert reasons(watch.verdict([whole, parted, cut], proposed=None)) == dict.fromkeys(
            ["r1", "r2", "r3"], "overlap"
        )

    def test_a_short_evaluation_text_has_to_match_whole(self):
        watch = gate()
        watch.protect(["2 + 2 = 4"])
        same, longer = record(1, prompt="2+2", completion="=4"), record(2, prompt="2+2", completion="=4 apples")
        assert reasons(watch.verdict([same, longer], proposed=None)) == {"r1": "overlap"}

    def test_the_models_own_share_is_capped_and_people_come_first(self):
        own = [record(n, source="model", prompt="", completion=f"{n}" * 10) for n in range(10)]
        human = record(99, prompt="", completion="y" * 40)
        batch = gate(max_own_share=0.5).verdict([*own, human], proposed=None)
        assert len(batch.admitted) == 5
        assert batch.own_share == 0.5
        assert set(reasons(batch).values()) == {"own_share"}


class TestTheBatch:
    def test_a_kept_share_outside_the_policy_freezes_and_admits_nothing(self):
        watch = gate(kept_share={"min": 0.1, "max": 0.5, "max_change": 10.0})
        assert watch.verdict([record(1)], proposed=4).decision.result == "allow"
        for kept in (record(1),), (record(1), record(2), record(3)):
            batch = watch.verdict(kept, proposed=len(kept) * 20 if len(kept) == 1 else 4)
            assert (batch.decision.result, batch.decision.rule, batch.admitted) == ("freeze", "kept_share", ())

    @pytest.mark.parametrize(("kept", "result"), [(3, "freeze"), (4, "allow"), (12, "allow"), (13, "freeze")])
    def test_the_kept_share_is_compared_with_the_last_promoted_cycle_in_both_directions(self, kept, result):
        watch = gate(kept_share={"min": 0.0, "max": 1.0, "max_change": 0.5})
        watch.commit(watch.verdict([record(n) for n in range(8)], proposed=100))
        watch.promoted()
        batch = watch.verdict([record(100 + n) for n in range(kept)], proposed=100)
        assert batch.decision.result == result

    def test_a_mean_gain_below_the_policy_freezes(self):
        watch = gate(min_mean_gain=0.0)
        assert watch.verdict([record(1, gain=0.3), record(2, gain=-0.1)], proposed=None).decision.allowed
        assert watch.verdict([record(1, gain=0.3), record(2, gain=-0.5)], proposed=None).decision.rule == "mean_gain"

    def test_checks_that_do_not_hold_freeze(self):
        watch = gate(recheck={"sample": 4, "max_wrong_share": 0.25})
        drafts = [record(n, check=Check(tool="python", code="print(1)", expected="1")) for n in range(8)]
        sample = watch.sample(drafts, salt="s")
        assert len(sample) == 4
        right = [(r, Outcome(call_id="c", status="ok", stdout=b"1\n")) for r in sample]
        wrong = [(r, Outcome(call_id="c", status="ok", stdout=b"2\n")) for r in sample[:2]] + right[2:]
        assert watch.verdict(drafts, proposed=None, rechecked=right).decision.allowed
        assert watch.verdict(drafts, proposed=None, rechecked=wrong).decision.rule == "recheck"

    def test_a_sample_that_was_not_run_again_freezes(self):
        """No evidence is not good evidence."""
        watch = gate(recheck={"sample": 4, "max_wrong_share": 0.25})
        drafts = [record(n, check=Check(tool="python", code="print(1)", expected="1")) for n in range(8)]
        assert watch.verdict(drafts, proposed=None).decision.rule == "recheck"

    def test_many_faulty_records_freeze_and_many_duplicates_do_not(self):
        watch = gate(forbidden_in_prompt=("<<",), freeze_above={"quarantined_share": 0.5, "of_at_least": 4})
        leaky = [record(n, prompt=f"<<{n}") for n in range(4)]
        assert watch.verdict(leaky, proposed=None).decision.rule == "quarantined_share"
        assert watch.verdict([record(1)] * 8, proposed=None).decision.allowed

    def test_a_frozen_batch_cannot_be_committed(self):
        watch = gate(min_mean_gain=0.0)
        with pytest.raises(ValueError, match="mean_gain"):
            watch.commit(watch.verdict([record(1, gain=-1.0)], proposed=None))

    def test_a_restored_gate_remembers_what_it_admitted(self):
        first, second = gate(), gate()
        first.commit(first.verdict([record(1), record(2, source="model")], proposed=10))
        first.promoted()
        second.load_state_dict(first.state_dict())
        drafts = [record(1), record(3)]
        assert second.verdict(drafts, proposed=10) == first.verdict(drafts, proposed=10)


@pytest.mark.parametrize(
    ("printed", "expected", "result"),
    [
        (b"24\n", "24", True),
        (b"24.0\n", "24", True),
        (b"0.30000000000000004", "0.3", True),
        (b"25", "24", False),
        (b"", "24", False),
        (b"nan", "nan", True),
        (b"inf", "24", False),
    ],
)
def test_a_check_holds_for_the_same_text_or_the_same_number(printed, expected, result):
    claim = record(1, check=Check(tool="python", code="", expected=expected))
    assert holds(claim, Outcome(call_id="c", status="ok", stdout=printed)) is result


def test_a_check_whose_call_failed_does_not_hold():
    claim = record(1, check=Check(tool="python", code="", expected="24"))
    assert not holds(claim, Outcome(call_id="c", status="timeout", stdout=b"24"))
    assert not holds(claim, Outcome(call_id="c", status="denied"))


class TestStrictness:
    KEPT: ClassVar = {"kept_share": {"min": 0.0, "max": 1.0, "max_change": 0.5}}

    def kept(self, gate, share):
        return gate.verdict([record(n) for n in range(round(share * 100))], proposed=100)

    def judging(self, **strict):
        watch = gate(**self.KEPT)
        watch.commit(self.kept(watch, 0.4))
        watch.promoted()
        watch.adjust(**{"share": 1.0, "waived": "", **strict})
        return watch

    def test_a_share_lets_less_change(self):
        assert self.kept(self.judging(), 0.55).decision.result == "allow"
        assert self.kept(self.judging(share=0.5), 0.55).decision.rule == "kept_share"

    def test_a_waived_change_is_told_and_passes(self):
        batch = self.kept(self.judging(waived="kept_share"), 0.9)
        assert batch.decision.allowed
        assert "the loop kept 90.0%" in batch.decision.facts["waived"][0]

    def test_checks_that_do_not_hold_are_not_waived(self):
        watch = gate(recheck={"sample": 4, "max_wrong_share": 0.25})
        watch.adjust(share=1.0, waived="recheck")
        checked = record(1, check=Check(tool="python", code="1", expected="2"))
        wrong = Outcome(call_id="c", status="ok", stdout=b"3", exit_code=0)
        assert watch.verdict([checked], proposed=None, rechecked=[(checked, wrong)]).decision.rule == "recheck"
