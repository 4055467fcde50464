"""monitor scan: a logged run in, one JSON line for each trip and note out."""

from __future__ import annotations

import io
import json
import random

import pytest

from loopguard.cli.app import _main


@pytest.fixture
def scan(monkeypatch, capsys):
    """Runs `monitor scan` on a text; gives the exit code, the lines that came out, and what was said on stderr."""

    def run(text, *words):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = _main(["monitor", "scan", *map(str, words)])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def logged(values, *, name="loss", stride=1, first=0):
    return f"step,{name}\n" + "".join(f"{first + stride * i},{value!r}\n" for i, value in enumerate(values))


def noisy(level, n, *, seed=0):
    noise = random.Random(seed)
    return [level(at) + noise.gauss(0, 0.05) for at in range(n)]


def step(to, n=400):
    return noisy(lambda at: 2.0 if at < 300 else to, n)


def test_a_healthy_run_is_silent_and_0(scan):
    assert scan(logged(noisy(lambda _: 2.0, 400)), "--direction", "lower_is_better") == (0, [], "")


def test_a_trip_says_row_step_and_why_and_is_1(scan):
    code, lines, _ = scan(logged(step(3.0), stride=10, first=500), "--direction", "lower_is_better", "--min", 0)
    trip = next(line for line in lines if line["kind"] == "freeze")
    assert code == 1
    assert (trip["index"], trip["step"], trip["since"]) == (303, 3530, 3500)
    assert (trip["monitor"], trip["metric"], trip["direction"]) == ("jump", "loss", "up")
    assert trip["low"] < 2.0 < trip["high"] < trip["value"]
    assert trip["reason"].startswith("loss went up from 2")
    assert "since update 3500" in trip["reason"]


def test_after_a_trip_the_level_is_learned_again(scan):
    _, lines, _ = scan(logged(step(3.0, 700)), "--direction", "lower_is_better")
    assert [line["index"] for line in lines if line["kind"] == "freeze"] == [303]


def test_a_suspicion_is_one_note(scan):
    _, lines, _ = scan(logged(step(2.15)), "--direction", "lower_is_better")
    assert [line["kind"] for line in lines] == ["note", "freeze"]
    assert lines[0]["since"] == lines[1]["since"]


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "NaN", "Infinity"])
def test_what_is_not_finite_is_a_value(scan, word):
    """And the output stays JSON that any reader takes."""
    code, lines, _ = scan(f"step,loss\n1,2.0\n2,{word}\n3,2.0\n")
    assert code == 1
    assert [(line["index"], line["kind"], line["value"]) for line in lines] == [(1, "freeze", None)]
    assert "not a finite number" in lines[0]["reason"]


def test_direction_and_domain_are_taken(scan):
    assert scan(logged(step(3.0)), "--direction", "higher_is_better")[0] == 0
    assert scan("step,acc\n1,1.5\n", "--min", 0, "--max", 1)[1][0]["reason"].startswith("acc is 1.5, above")
    assert scan("step,loss\n1,-1.5\n", "--min", 0)[0] == 1


def test_a_share_of_problems_is_watched_by_the_eprocess(scan):
    coin = random.Random(0)
    rates = [sum(coin.random() < (0.64 if at < 50 else 0.3) for _ in range(100)) / 100 for at in range(80)]
    _, lines, _ = scan(logged(rates, name="pass_at_1"), "--direction", "higher_is_better", "--problems", 100)
    trip = next(line for line in lines if line["kind"] == "freeze")
    assert (trip["monitor"], trip["index"]) == ("eprocess", 52)


def test_one_of_several_columns_is_chosen_by_name(scan):
    text = "step,lr,loss\n" + "".join(f"{i},0.1,{value}\n" for i, value in enumerate(step(3.0)))
    assert scan(text, "--metric", "loss", "--direction", "lower_is_better")[0] == 1
    assert scan(text, "--metric", "lr")[0] == 0
    code, _, err = scan(text)
    assert (code, err) == (2, "loopguard: standard input:1: name one of these with --metric: lr, loss\n")


def test_one_metric_may_be_given_another_name(scan):
    _, lines, _ = scan(logged([2.0, float("nan")]), "--metric", "train/loss")
    assert lines[0]["metric"] == "train/loss"


@pytest.mark.parametrize(
    "announced",
    [
        "kind,at,span\nepoch,300,5\n",
        "kind,at\nlr,300\n",
        '{"kind": "data", "at": 300, "span": 2}\n',
        "at,kind\n300, epoch\n",
    ],
)
def test_an_announced_change_does_not_trip(scan, tmp_path, announced):
    """As CSV, with span or without, and as JSON lines."""
    file = tmp_path / "expect"
    file.write_text(announced)
    text = logged(step(1.4))
    assert scan(text, "--direction", "lower_is_better")[0] == 1
    assert scan(text, "--direction", "lower_is_better", "--expect", file)[0] == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "standard input:1: expected a header row such as step,loss"),
            ("1,2\n2,3\n", "standard input:1: expected a header row such as step,loss"),
            ("step,loss\n1,2.0\n2,soon\n", "standard input:3: value is 'soon', not a number"),
            ("step,loss\n1,2.0\n1.5,2\n", "standard input:3: step is '1.5', not a whole number"),
            ("step,loss\n1,2.0\n\n3\n", "standard input:4: 1 columns where the header has more"),
        ],
    )
    def test_a_bad_line_is_one_line_with_its_number_and_2(self, scan, text, said):
        code, lines, err = scan(text)
        assert (code, lines, err) == (2, [], f"loopguard: {said}\n")

    @pytest.mark.parametrize(
        ("announced", "said"),
        [
            ("", ":1: expected a header row kind,at,span, or JSON lines with those keys"),
            ("kind,at\nsoon,3\n", ":2: kind is 'soon'; expected one of epoch, lr, data"),
            ("kind,at\nepoch,x\n", ":2: at is 'x', not a number"),
            ("kind,at,span\nepoch,3,0\n", ":2: span is 0; a change shows for at least 1 step"),
            ('{"kind": "epoch", "at": 3}\n{"kind"\n', ":2: not JSON"),
            ('{"kind": "epoch"}\n', ":1: at is '', not a number"),
        ],
    )
    def test_so_is_one_in_the_announcements(self, scan, tmp_path, announced, said):
        file = tmp_path / "expect.csv"
        file.write_text(announced)
        code, lines, err = scan("step,loss\n1,2\n", "--expect", file)
        assert (code, lines) == (2, [])
        assert err.startswith(f"loopguard: {file}{said}")
        assert err.count("\n") == 1

    def test_so_are_settings_that_cannot_work(self, scan):
        assert scan("step,loss\n1,2\n", "--min", 2, "--max", 1)[::2] == (
            2,
            "loopguard: bounds of loss: min 2 is above max 1\n",
        )
        assert scan("step,loss\n1,2\n", "--problems", 0, "--direction", "higher_is_better")[0] == 2
        assert scan("step,loss\n1,2\n", "--direction", "sideways")[0] == 2
        assert scan("step,loss\n1,2\n", "--expect", "/nowhere/at/all")[0] == 2
