"""What the tests of the reference loops share: a calculator in place of the sandbox, a small task, a guard policy."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from dataclasses import replace

import pytest

from loopguard.testing import fake_runtimes, printed
from loopguard.types import Outcome

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

POLICY = """
apiVersion: loopguard/v1
name: loop-test
tools:
  rules:
    - {id: calculator, tool: python, then: run, sandbox: offline, refuse_patterns: ['\\bopen\\b', '__']}
  freeze_above: {refused_share: 0.05, contained_share: 0.05, of_last_calls: 60}
sandbox:
  profiles:
    offline: {image: "loopguard/python:1"}
data:
  sources: [human, model]
  forbidden_in_prompt: ["<<"]
  min_mean_gain: 0.0
  recheck: {sample: 40, max_wrong_share: 0.05}
  freeze_above: {quarantined_share: 0.5, of_at_least: 2}
updates:
  loss_kind: discrete
  lease: 16
  monitors:
    - {kind: bounds, metric: loss}
    - {kind: bounds, metric: grad_norm, min: 0}
    - {kind: jump, metric: loss, min_change: 0.25}
promotion:
  panel:
    - {metric: correct, good: up, min: 0, max: 1, max_gain: 1, max_loss: 1}
    - {metric: implicit, good: up, min: 0, max: 1, max_gain: 1, max_loss: 1}
    - {metric: malformed, good: down, min: 0, max: 1, max_gain: 1, max_loss: 1}
    - {metric: mental, good: up, min: 0, max: 1, max_gain: 1, max_loss: 1}
    - {metric: heldout_loss, good: down, min: 0, max_gain: 9, max_loss: 9}
    - {metric: refused, good: down, min: 0, max: 1, max_gain: 1, max_loss: 1}
"""


class Calculator:
    """Answers `print(EXPRESSION)` with arithmetic and with an error for everything else; counts the programs."""

    def __init__(self):
        self.programs = Counter()

    def __call__(self, call):
        self.programs[call.code] += 1
        try:
            value = _value(ast.parse(call.code.removeprefix("print(").removesuffix(")"), mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError):
            return Outcome(call_id=call.id, status="nonzero_exit", exit_code=1, stderr=b"error")
        return printed(call, f"{value}\n")


def _value(node):
    match node:
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.Constant(value=int() | float() as value):
            return value
        case _:
            raise ValueError(ast.dump(node))


@pytest.fixture
def calculator():
    return Calculator()


@pytest.fixture
def open_guard(tmp_path, calculator):
    """Opens the guard of `tmp_path/run` as often as asked; each opening is a process that starts again."""
    return lambda name="run": _open(tmp_path, name, calculator)


def _open(folder, name, calculator):
    from loopguard import LoopGuard

    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    return LoopGuard.from_file(policy, run_dir=folder / name, runtimes=fake_runtimes(calculator))


@pytest.fixture
def small():
    """Options and their task, cut down until a cycle takes a second. The model stays too dumb to keep many calls."""
    return lambda **given: _cut({"cycles": 2} | given, hidden=36, feedforward=64, warmup_updates=70, cycle_updates=50)


@pytest.fixture(scope="session")
def learnable():
    """Options and their task as in the demonstration, but for fewer places: the model learns to call."""
    return lambda **given: _cut({"cycles": 2} | given)


@pytest.fixture(scope="session")
def learned(tmp_path_factory, learnable):
    """A run of one honest cycle whose model calls well, to be copied and gone on with; and its programs."""
    from loopguard.pipelines.toolformer import run

    folder, calculator = tmp_path_factory.mktemp("learned"), Calculator()
    options, task = learnable(cycles=1)
    with _open(folder, "run", calculator) as guard:
        result = run(guard, options, task=task)
    return folder / "run", result, calculator.programs


def _cut(given, **sizes):
    from loopguard.pipelines.toolformer import ToolformerOptions, prepare

    options = ToolformerOptions(**given)
    task = prepare(options)
    settings = replace(task.settings, places=200, **sizes)
    held_out = replace(task.held_out, places=task.held_out.places[:40], lines=task.held_out.lines[:40])
    return options, replace(task, settings=settings, held_out=held_out, lines=task.lines[:1500])
