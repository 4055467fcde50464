"""Reading a policy file: plain YAML 1.2, and the line and column of everything else."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_kit import SMALL, edited

from loopguard.errors import PolicyError
from loopguard.policy.load import load
from loopguard.policy.source import MAX_BYTES, parse

START = "`policies/default.yaml` is a good one to start from"


def value(text):
    source = parse(f"key: {text}\n", "p.yaml")
    assert source.findings == []
    return source.data["key"]


class TestResolver:
    @pytest.mark.parametrize(
        "word",
        [
            "on",
            "off",
            "yes",
            "no",
            "On",
            "NO",
            "True",
            "FALSE",
            "y",
            "Null",
            "NULL",
            "~",
            "010",
            "0o10",
            "0x1F",
            "1_000",
            "+5",
            ".5",
            "5.",
            "1:30",
            "190:20:30",
            "2026-11-23",
            ".inf",
            ".nan",
        ],
    )
    def test_what_yaml_readers_disagree_about_is_text(self, word):
        assert value(word) == word

    @pytest.mark.parametrize(
        ("word", "number"),
        [("0", 0), ("-7", -7), ("12", 12), ("0.5", 0.5), ("1e6", 1e6), ("-1.5E-3", -0.0015), ("-0", 0), ("-0.0", 0.0)],
    )
    def test_json_numbers_are_numbers(self, word, number):
        read = value(word)
        assert read == number
        assert str(read) == str(number)

    def test_true_and_false_are_booleans(self):
        assert (value("true"), value("false")) == (True, False)

    @pytest.mark.parametrize("word", ["'5'", '"5"', "'true'", '"null"', "'on'", "|\n  5", ">-\n  true"])
    def test_quoted_values_are_text(self, word):
        assert isinstance(value(word), str)

    @given(
        st.recursive(
            st.booleans()
            | st.integers(-(10**18), 10**18)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(alphabet=st.characters(categories=("L", "N", "P", "S")), min_size=1),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.text("abcdefgh-_. :#", min_size=1, max_size=8), inner, max_size=4)
            ),
            max_leaves=12,
        )
    )
    def test_json_is_read_as_json(self, tree):
        """JSON is YAML 1.2; whatever JSON says without nulls, the reader says too."""
        text = json.dumps({"key": tree}, ensure_ascii=False)
        source = parse(text, "p.yaml")
        assert source.findings == []
        assert source.data == json.loads(text)


class TestRefused:
    @pytest.mark.parametrize(
        "edit", [("name: small", "%x: 1"), ("[human, model]", "[human, model"), ("name: small", "name: 'small")]
    )
    def test_what_is_not_yaml_says_so_with_its_place(self, findings, edit):
        (said,) = findings(edit)
        assert re.match(r"\d+:\d+: is not YAML: ", said)

    def test_anchors_and_aliases_are_refused_where_they_stand(self, findings):
        said = findings(("[human, model]", "&all [human, model]"), ("max_own_share: 0.5", "forbidden_in_prompt: *all"))
        assert said == [
            "22:12: &all is an anchor; take it out, and write the value again where it is meant",
            "23:24: *all is an alias; write the value out",
        ]

    def test_an_alias_bomb_costs_nothing(self, findings):
        """Aliases are never followed, so there is nothing to blow up."""
        lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
        lines += [
            f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ]
        said = findings(text="\n".join(lines))
        assert "1:4: &a is an anchor; take it out, and write the value again where it is meant" in said

    def test_a_second_document_is_refused(self, findings):
        assert findings(text=f"{SMALL}---\nname: other\n") == [
            f"{SMALL.count(chr(10)) + 1}:1: a second document begins here; a policy file holds one"
        ]

    @pytest.mark.parametrize("directive", ["%YAML 1.1", "%YAML 1.2", "%TAG ! tag:example.org:"])
    def test_directives_are_refused(self, findings, directive):
        """Under `%YAML 1.1` other readers would take `no` for a boolean."""
        assert findings(text=f"{directive}\n---\n{SMALL}") == ["1:1: a guard policy takes no % directive; take it out"]

    def test_one_document_marker_is_fine(self, findings):
        assert findings(text=f"---\n{SMALL}...\n") == []

    @pytest.mark.parametrize(
        ("text", "column"), [("[" * 50, 34), ("- " * 50, 67), ("? " + "[" * 50, 36), ("? - " * 50, None)]
    )
    def test_deep_nesting_is_refused(self, findings, text, column):
        (said,) = findings(text=text)
        assert "is nested more than 32 deep" in said or "is not YAML" in said
        if column:
            assert said == f"1:{column}: is nested more than 32 deep"

    @pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "--- # nothing\n...\n"])
    def test_an_empty_file_says_what_to_start_from(self, findings, text):
        (said,) = findings(text=text)
        assert said.endswith(f": is empty; {START}")

    @pytest.mark.parametrize(("text", "what"), [("[1, 2]", "a list"), ("just text", "'just text'"), ("5", "5")])
    def test_something_else_than_a_mapping_is_refused(self, findings, text, what):
        assert findings(text=text) == [f"1:1: the policy is {what}; expected a mapping"]


class TestFiles:
    def refusal(self, path):
        with pytest.raises(PolicyError) as refused:
            load(path)
        return str(refused.value).removeprefix(f"{path}: ")

    def test_missing(self, tmp_path):
        assert self.refusal(tmp_path / "nope.yaml") == f"no such file; {START}"

    def test_directory(self, tmp_path):
        assert self.refusal(tmp_path) == "is a directory; name a policy file inside it"

    def test_unreadable(self, tmp_path):
        """A link to itself is unreadable for root, too."""
        loop = tmp_path / "loop.yaml"
        loop.symlink_to(loop)
        assert self.refusal(loop) == "cannot be read: Too many levels of symbolic links"

    def test_a_name_that_no_file_can_have(self, tmp_path):
        assert self.refusal(tmp_path / "a\0b").endswith("cannot be read: embedded null byte")

    def test_too_large(self, tmp_path):
        path = tmp_path / "p.yaml"
        path.write_text(SMALL + "#" * (MAX_BYTES - len(SMALL)))
        assert load(path).policy.name == "small"
        path.write_text(SMALL + "#" * (MAX_BYTES - len(SMALL) + 1))
        assert self.refusal(path) == "is larger than 1 MiB; a guard policy is a few KiB"

    def test_not_utf8(self, findings):
        assert findings(text=SMALL.replace("small", "café").encode("latin-1")) == [
            "2:10: byte 0xe9 is not UTF-8; save the file as UTF-8"
        ]
        assert findings(text=SMALL.encode("utf-16")) == ["1:1: is UTF-16; save it as UTF-8"]

    def test_byte_order_mark_and_windows_line_ends_are_fine(self, findings):
        windows = SMALL.replace("\n", "\r\n").encode("utf-8-sig")
        assert findings(text=windows) == []
        assert findings(text=windows.replace(b"name: small", b"name: 5")) == [
            "2:7: name is 5; expected text. Put it in quotes"
        ]

    def test_columns_count_characters_not_bytes(self, findings):
        assert findings(("{kind: bounds, metric: loss}", "{metric: 'löß', kind: bnds}")) == [
            (
                "27:29: updates.monitors[0].kind is 'bnds'; expected one of bounds, jump, drift, variance. "
                "Did you mean 'bounds'?"
            )
        ]


@given(st.text(max_size=200))
def test_no_text_at_all_makes_the_reader_stumble(text):
    """Whatever the text, the reader returns findings or data and raises nothing."""
    source = parse(text, "p.yaml")
    assert source.findings or source.readable


@given(st.data())
def test_no_damage_to_a_policy_makes_the_reader_stumble(data):
    """A policy with a piece cut out or something hostile put in gives findings or data and raises nothing."""
    start = data.draw(st.integers(0, len(SMALL)))
    stop = data.draw(st.integers(start, min(len(SMALL), start + 40)))
    piece = data.draw(
        st.sampled_from(["", ":", "- ", "\n", "{", "]", "'", '"', "&a ", "*a", "!", "null", "\t", "? ", "|", "%"])
    )
    source = parse(SMALL[:start] + piece + SMALL[stop:], "p.yaml")
    assert source.findings or source.readable


def test_edit_helper_refuses_to_change_nothing():
    with pytest.raises(AssertionError):
        edited(("not there", "x"))
