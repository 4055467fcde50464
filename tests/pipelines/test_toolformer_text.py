"""Reading solutions: places, tidying, and every way in which a file can be bad."""

import json
import re

import pytest

from loopguard.errors import DataFileError
from loopguard.pipelines.toolformer.calls import agrees, code_of, printed
from loopguard.pipelines.toolformer.problems import generate
from loopguard.pipelines.toolformer.text import problem_of, read
from loopguard.types import ToolCall

QUESTION = "How many clips did Natalia sell?"


def places(*lines):
    return problem_of(QUESTION, "\n".join(lines), origin="f:1").places


def one(line):
    [place] = places(line)
    return place


class TestPlaces:
    def test_a_place_is_an_equals_sign_and_a_number(self):
        place = one("Natalia sold 48/2 = <<48/2=24>>24 clips in May.")
        assert (place.before, place.number, place.after) == ("Natalia sold 48/2=", "24", "24 clips in May.")

    def test_the_human_call_is_kept_beside_the_text_and_never_in_it(self):
        place = one("Natalia sold 48/2 = <<48/2=24>>24 clips in May.")
        assert place.call == "48/2"
        assert "<<" not in place.before + place.after

    def test_a_dollar_sign_belongs_to_the_text_before_the_number(self):
        assert one("Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.").before == "Weng earns 12/60=$"

    def test_each_of_several_calls_stands_at_its_own_place(self):
        line = "2 * 3 = <<2*3=6>>6 and without a call 1 + 1 = 2 and 4 - 1 = <<4-1=3>>3."
        assert [place.call for place in places(line)] == ["2*3", None, "4-1"]

    def test_a_number_that_goes_on_as_an_expression_is_no_result(self):
        assert one("x = 3 * 4 = <<3*4=12>>12").number == "12"

    def test_thousands_commas_go(self):
        place = one("He paid 1,000 + 2,500 = $<<1000+2500=3500>>3,500 in all.")
        assert (place.before, place.number) == ("He paid 1000+2500=$", "3500")

    def test_a_list_of_numbers_keeps_its_commas(self):
        assert one("1, 2, 3 sum up to 1+2+3=6").before == "1, 2, 3 sum up to 1+2+3="

    def test_a_sentence_ends_after_the_number(self):
        assert one("The sum is 2+2=4.").number == "4"

    def test_decimals_and_negative_numbers_are_whole_numbers_of_the_text(self):
        assert one("It is 2-5 = -3 degrees").number == "-3"
        assert one("That is 1/4 = .25 of it").number == ".25"

    @pytest.mark.parametrize("line", ["48/2 = 24", "$5 + $3 = $8", "0.2 x 50 = 10", "(3+4) * 2 = 14", "3 - 1 + 2 = 4"])
    def test_an_expression_before_the_equals_sign_is_spelled_out(self, line):
        assert one(f"It costs {line} in all").spelled_out

    @pytest.mark.parametrize("line", ["the total now = 14", "3 miles + 4 miles = 7", "x = 12", "12 = 12"])
    def test_words_between_the_numbers_are_not(self, line):
        assert not one(f"We know {line} so far").spelled_out

    def test_the_graders_line_is_left_out(self):
        problem = problem_of(QUESTION, "2+2=4 clips\n#### 4", origin="f:1")
        assert problem.lines == ("2+2=4 clips",)


class TestFiles:
    def write(self, tmp_path, *rows):
        path = tmp_path / "train.jsonl"
        path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
        return path

    def test_a_problem_remembers_its_line(self, tmp_path):
        good = {"question": QUESTION, "answer": "48/2 = <<48/2=24>>24\n#### 24"}
        problems = read(self.write(tmp_path, good, good))
        assert [problem.origin for problem in problems] == ["train.jsonl:1", "train.jsonl:2"]
        assert problems[1].places[0].origin == "train.jsonl:2"

    @pytest.mark.parametrize(
        ("row", "trouble"),
        [
            (b'{"question": "q"', "not JSON"),
            (b"\xff\xfe", "not JSON"),
            (b"[1]", "a JSON list"),
            ({"question": "q"}, "answer is missing"),
            ({"question": 3, "answer": "a"}, "question is a number"),
            ({"question": "q", "answer": None}, "answer is a null"),
            ({"question": "q", "answer": " "}, "answer is empty"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, row, trouble):
        path = self.write(tmp_path, {"question": "q", "answer": "1+1=2"}, row)
        with pytest.raises(DataFileError, match=rf"^{re.escape(str(path))}:2: .*{trouble}"):
            read(path)

    def test_an_empty_file_is_refused(self, tmp_path):
        with pytest.raises(DataFileError, match="empty"):
            read(self.write(tmp_path, b"", b"  "))

    def test_a_file_without_any_place_is_refused(self, tmp_path):
        with pytest.raises(DataFileError, match="no place for a call"):
            read(self.write(tmp_path, {"question": "q", "answer": "I do not know."}))

    def test_a_file_that_is_not_there_is_refused(self, tmp_path):
        with pytest.raises(DataFileError, match="No such file"):
            read(tmp_path / "absent.jsonl")


class TestGenerated:
    def test_a_seed_gives_the_same_problems_everywhere(self):
        assert generate(50, seed=3) == generate(50, seed=3)
        assert generate(50, seed=3) != generate(50, seed=4)

    def test_every_problem_has_a_place_whose_human_call_gives_its_number(self, calculator):
        for problem in generate(500, seed=0):
            [place] = problem.places
            call = ToolCall(id="c", tool="python", code=code_of(place.call))
            assert agrees(printed(calculator(call)), place.number)

    def test_a_seed_and_its_negative_are_different_seeds(self):
        assert generate(50, seed=1) != generate(50, seed=-1)

    def test_some_are_spelled_out_and_some_are_not(self):
        share = sum(problem.places[0].spelled_out for problem in generate(500, seed=0)) / 500
        assert 0.3 < share < 0.5

    def test_no_problem_comes_twice(self):
        problems = generate(2000, seed=1)
        assert len({problem.lines for problem in problems}) == 2000
