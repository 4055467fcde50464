"""Claims that hold for every monitor, applied by discovery: a new one is covered when it is registered."""

import doctest
import importlib
import json

import pytest

from loopguard import monitors
from loopguard.types import Reading


@pytest.mark.parametrize("kind", monitors.KINDS)
class TestEveryMonitor:
    def test_state_is_json_and_a_copy_judges_alike(self, kind):
        first, second = monitors.build(kind, metric="loss"), monitors.build(kind, metric="loss")
        for at in range(100):
            first.read(Reading(metric="loss", value=1.0 + at % 7 / 100, at=at), armed=True)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = [Reading(metric="loss", value=value, at=100 + i) for i, value in enumerate([1.0, 9.0, 9.0, 9.0, 9.0])]
        assert [first.read(r, armed=True) for r in after] == [second.read(r, armed=True) for r in after]

    def test_a_steady_stream_is_quiet(self, kind):
        monitor = monitors.build(kind, metric="loss")
        signals = [monitor.read(Reading(metric="loss", value=1.0, at=at), armed=True) for at in range(300)]
        assert {signal.level for signal in signals} == {"ok"}

    def test_the_example_in_its_docstring_runs(self, kind):
        failed, run = doctest.testmod(importlib.import_module(f"loopguard.monitors.{kind}"))
        assert run > 0
        assert failed == 0


def test_an_unknown_kind_is_a_key_error():
    with pytest.raises(KeyError):
        monitors.build("oracle", metric="loss")
