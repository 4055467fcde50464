"""What every runtime promises, as claims that can be put to any of them.

Each claim takes a way to make a runtime that is not started; the runtime has to know how to run `print("...")`.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from sandbox_kit import make_call

from loopguard.errors import SandboxUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopguard.sandbox.base import Runtime

    Make = Callable[[], Runtime]


def an_outcome_belongs_to_its_call(make: Make) -> None:
    """An Outcome carries the id of its call, what was printed, and how much that was."""
    runtime = make()
    runtime.start()
    try:
        call = make_call('print("hello")')
        outcome = runtime.run(call)
    finally:
        runtime.close()
    assert outcome.call_id == call.id
    assert outcome.ok
    assert outcome.exit_code == 0
    assert outcome.text.strip() == "hello"
    assert outcome.stdout_bytes == len(outcome.stdout)


def nothing_runs_before_the_start(make: Make) -> None:
    """A call before `start` is refused."""
    with pytest.raises(SandboxUnavailableError):
        make().run(make_call('print("early")'))


def nothing_runs_after_the_end(make: Make) -> None:
    """A call after `close` is refused, and closing twice is fine."""
    runtime = make()
    runtime.start()
    runtime.close()
    runtime.close()
    with pytest.raises(SandboxUnavailableError):
        runtime.run(make_call('print("late")'))


def a_runtime_that_never_started_can_be_closed(make: Make) -> None:
    """`close` and `kill_running` need no `start`."""
    runtime = make()
    assert runtime.kill_running() == 0
    runtime.close()


def many_threads_get_their_own_answers(make: Make) -> None:
    """Calls from eight threads at once do not mix."""
    runtime = make()
    runtime.start()
    gate = threading.Barrier(8)

    def ask(number: int) -> str:
        gate.wait()
        return runtime.run(make_call(f'print("{number}")')).text.strip()

    try:
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, range(8))) == [str(number) for number in range(8)]
    finally:
        runtime.close()


def killing_when_nothing_runs_kills_nothing(make: Make) -> None:
    """`kill_running` on an idle runtime gives 0 and leaves it usable."""
    runtime = make()
    runtime.start()
    try:
        assert runtime.kill_running() == 0
        assert runtime.run(make_call('print("still")')).ok
    finally:
        runtime.close()


def facts_fit_into_the_log(make: Make) -> None:
    """`facts` are JSON values and name the runtime."""
    runtime = make()
    runtime.start()
    try:
        assert json.loads(json.dumps(runtime.facts()))["runtime"]
    finally:
        runtime.close()


CLAIMS = (
    an_outcome_belongs_to_its_call,
    nothing_runs_before_the_start,
    nothing_runs_after_the_end,
    a_runtime_that_never_started_can_be_closed,
    many_threads_get_their_own_answers,
    killing_when_nothing_runs_kills_nothing,
    facts_fit_into_the_log,
)
