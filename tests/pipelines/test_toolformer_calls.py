"""Calls as programs, and what came back; which fault is meant."""

import subprocess
import sys

import pytest

from loopguard.errors import UsageError
from loopguard.pipelines.toolformer.calls import agrees, code_of, holds_operator, number_in, printed
from loopguard.pipelines.toolformer.plant import FAULTS, Plant, parse_plant
from loopguard.types import Outcome


def outcome(text, status="ok"):
    return Outcome(call_id="c", status=status, exit_code=0, stdout=text.encode())


class TestCalls:
    def test_the_program_prints_the_expression_as_the_model_wrote_it(self):
        assert code_of("48/2") == "print(48/2)"

    @pytest.mark.parametrize(("text", "value"), [("24\n", 24), ("-0.5\n", -0.5), ("1e-05\n", 1e-5), (" 7 ", 7)])
    def test_a_printed_number_is_read(self, text, value):
        assert printed(outcome(text)) == value

    @pytest.mark.parametrize("text", ["", "24 clips", "(24,)", "nan", "inf", "True", "1 2", "٣"])
    def test_anything_else_is_no_number(self, text):
        assert printed(outcome(text)) is None

    @pytest.mark.parametrize("status", ["nonzero_exit", "timeout", "denied"])
    def test_a_call_that_did_not_end_well_printed_nothing(self, status):
        assert printed(outcome("24", status)) is None

    def test_rounding_of_floating_point_still_agrees(self):
        assert agrees(0.1 * 3, "0.3")
        assert agrees(24.0, "24")

    def test_another_number_does_not(self):
        assert not agrees(3.3333333, "3.33")
        assert not agrees(None, "3")

    @pytest.mark.parametrize("expression", ["48/2", "(3+4)*2", "12-5", "2 * 3"])
    def test_an_expression_with_an_operator_computes(self, expression):
        assert holds_operator(expression)

    @pytest.mark.parametrize("expression", ["24", "-24", "+3", "(24)"])
    def test_a_bare_number_does_not(self, expression):
        assert not holds_operator(expression)

    def test_a_long_number_is_a_number(self):
        assert number_in("1" * 400) == float("inf")
        assert not agrees(number_in("1" * 400), "1")


class TestPlant:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_every_fault_can_be_planted(self, fault):
        assert parse_plant(f"{fault}@2") == Plant(fault, 2)

    def test_a_misspelling_is_told_with_a_guess(self):
        with pytest.raises(UsageError, match=r"Did you mean 'label-leak@3'\?"):
            parse_plant("lable-leak@3")

    def test_an_unknown_word_is_told_what_there_is(self):
        with pytest.raises(UsageError, match=r"expected one of nan, .*tool-escape\.$"):
            parse_plant("meteor@3")

    @pytest.mark.parametrize("text", ["nan@", "nan@0", "nan@-1", "nan@x", "nan@1.5"])
    def test_a_cycle_is_a_whole_number_from_one_up(self, text):
        with pytest.raises(UsageError, match="expected a whole number from 1 up"):
            parse_plant(text)

    def test_the_cycle_must_be_said(self):
        with pytest.raises(UsageError, match="expected FAULT@CYCLE"):
            parse_plant("nan")

    def test_a_plant_reads_as_it_was_written(self):
        assert str(parse_plant("gain@4")) == "gain@4"

    def test_a_misspelling_is_told_without_loading_torch(self):
        code = "import sys; from loopguard.pipelines.toolformer import parse_plant; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"
