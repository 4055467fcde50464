"""The pool, with cells that are a few lines of Python: order, replacement, an engine that goes away, closing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sandbox_kit import make_call, until

from loopguard.errors import SandboxBusyError, SandboxError, SandboxUnavailableError
from loopguard.sandbox import pool as pool_module
from loopguard.sandbox.pool import Pool
from loopguard.types import Outcome


class FakeCell:
    """A cell that answers at once; `code` says what goes wrong."""

    def __init__(self, shop: Shop) -> None:
        self.calls = 0
        self.ended = ""
        self.dead = False
        self.shop = shop
        self.killed = threading.Event()
        self.doubt = ""
        self.strange = False

    def resting(self) -> bool:
        return not (self.dead or self.doubt)

    def call(self, call):
        self.calls += 1
        self.shop.ran.append((call.code, self))
        assert not self.ended, "a destroyed cell was used again"
        if call.code == "lost":
            raise SandboxUnavailableError("it died")
        if call.code == "interrupt":
            raise KeyboardInterrupt
        if call.code == "wait":
            self.shop.inside.release()
            assert self.shop.go.wait(30)
        if call.code == "hang":
            self.shop.inside.release()
            assert self.killed.wait(30)
            raise SandboxUnavailableError(self.why)
        self.doubt = "not clean: a file was left" if call.code == "dirty" else ""
        self.strange = call.code == "strange"
        return Outcome(call_id=call.id, status="ok", exit_code=0)

    def spent(self) -> str:
        return "recycled" if self.calls >= self.shop.calls_per_cell else ""

    def settle(self) -> str:
        if self.strange:
            raise KeyboardInterrupt
        return "lost" if self.dead else self.doubt

    def kill(self, why: str, call_id: str | None = None) -> bool:
        self.why = why
        self.killed.set()
        return True

    def destroy(self, reason: str) -> None:
        self.ended = self.ended or reason


class Shop:
    """Makes cells, as long as the engine is there."""

    def __init__(self) -> None:
        self.made: list[FakeCell] = []
        self.ran: list[tuple[str, FakeCell]] = []
        self.away = ""
        self.strange = False
        self.calls_per_cell = 100
        self.inside = threading.Semaphore(0)
        self.go = threading.Event()

    def make(self) -> FakeCell:
        if self.strange:
            raise OSError("no space left")
        if self.away:
            raise SandboxUnavailableError(self.away)
        self.made.append(FakeCell(self))
        return self.made[-1]

    def living(self) -> list[FakeCell]:
        return [cell for cell in self.made if not cell.ended]


@pytest.fixture
def shop():
    return Shop()


@pytest.fixture
def build(shop):
    """Makes started pools and closes them."""
    pools = []

    def make_pool(*, size=1, queue=1000, wait_s=20.0):
        pools.append(Pool(shop.make, size=size, queue=queue, wait_s=wait_s))
        pools[-1].start()
        return pools[-1]

    yield make_pool
    shop.go.set()
    for each in pools:
        each.close()
    assert not shop.living()


def test_a_clean_cell_is_used_again(build, shop):
    """Many calls, one cell."""
    pool = build()
    assert all(pool.run(make_call("ok")).ok for _ in range(50))
    assert len(shop.made) == 1


@pytest.mark.parametrize(("code", "reason"), [("dirty", "not clean: a file was left"), ("lost", "lost")])
def test_a_doubtful_cell_is_never_used_again(build, shop, code, reason):
    """A cell that came out dirty, or died, is destroyed with its reason, and a new one takes its place."""
    pool = build()
    if code == "lost":
        with pytest.raises(SandboxUnavailableError):
            pool.run(make_call(code))
    else:
        pool.run(make_call(code))
    pool.run(make_call("ok"))
    assert until(lambda: shop.made[0].ended == reason)
    assert [cell for _, cell in shop.ran] == shop.made[:2]


def test_an_interrupted_call_costs_its_cell(build, shop):
    """After Ctrl-C nobody knows what a cell is doing."""
    pool = build()
    with pytest.raises(KeyboardInterrupt):
        pool.run(make_call("interrupt"))
    assert pool.run(make_call("ok")).ok
    assert until(lambda: shop.made[0].ended == "abandoned")


def test_an_interrupt_while_a_cell_is_cleaned_costs_that_cell(build, shop):
    """Ctrl-C in a caller that waits for the cell to be clean leaves no hole either."""
    pool = build()
    assert pool.run(make_call("strange")).ok
    with pytest.raises(KeyboardInterrupt):
        pool.run(make_call("ok"))
    assert until(lambda: shop.made[0].ended == "abandoned")
    assert pool.run(make_call("ok")).ok


def test_a_cell_is_recycled_after_its_calls(build, shop):
    """The number of calls in one cell is bounded."""
    shop.calls_per_cell = 3
    pool = build()
    for _ in range(7):
        pool.run(make_call("ok"))
    assert until(lambda: [cell.ended for cell in shop.made] == ["recycled", "recycled", ""])
    assert [cell.calls for cell in shop.made] == [3, 3, 1]


def test_callers_are_served_in_their_order(build, shop):
    """First come, first served."""
    pool = build()
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(pool.run, make_call("wait"))
        shop.inside.acquire()
        for number in range(8):
            threads.submit(pool.run, make_call(f"{number}"))
            assert until(lambda number=number: len(pool._waiting) == number + 1)
        shop.go.set()
        first.result()
    assert [code for code, _ in shop.ran] == ["wait", *"01234567"]


def test_a_cell_that_ended_while_idle_is_replaced_unseen(build, shop):
    """A container may leave between two calls (idle for long, engine restarted): the next caller gets another one."""
    pool = build(size=2)
    for cell in shop.made:
        cell.dead = True
    assert pool.run(make_call("ok")).ok
    assert until(lambda: [cell.ended for cell in shop.made[:2]] == ["lost", "lost"])
    assert until(lambda: len(shop.living()) == 2)


def test_nobody_has_to_call_for_idle_cells_to_be_looked_after(build, shop, monkeypatch):
    """A cell that ended, or came out dirty, is replaced while nobody calls."""
    monkeypatch.setattr(pool_module, "_LOOK_S", 0.01)
    pool = build(size=2)
    shop.made[0].dead = True
    assert until(lambda: shop.made[0].ended == "lost" and len(shop.living()) == 2)
    pool.run(make_call("dirty"))
    assert until(lambda: sum(cell.ended == "not clean: a file was left" for cell in shop.made) == 1)
    assert until(lambda: len(shop.living()) == 2)


def test_it_grows_while_callers_wait_and_shrinks_when_they_are_gone(build, shop, monkeypatch):
    """Two cells at first, as many as the limit under load, two again after a while."""
    monkeypatch.setattr(pool_module, "_LOOK_S", 0.01)
    monkeypatch.setattr(pool_module, "_KEEP_S", 0.05)
    pool = build(size=5)
    assert len(shop.living()) == 2
    with ThreadPoolExecutor(9) as threads:
        calls = [threads.submit(pool.run, make_call("wait")) for _ in range(9)]
        for _ in range(5):
            shop.inside.acquire()
        assert len(shop.living()) == 5
        shop.go.set()
        assert all(call.result().ok for call in calls)
    assert until(lambda: len(shop.living()) == 2)
    assert [cell.ended for cell in shop.made if cell.ended] == ["idle"] * 3


def test_a_full_queue_is_said_at_once(build, shop):
    """Who comes when as many wait as may is told so instead of waiting; nothing ran for them."""
    pool = build(queue=2)
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(pool.run, make_call("wait"))]
        shop.inside.acquire()
        calls += [threads.submit(pool.run, make_call("ok")) for _ in range(2)]
        assert until(lambda: len(pool._waiting) == 2)
        with pytest.raises(SandboxBusyError, match="2 callers wait: try again later"):
            pool.run(make_call("too late"))
        shop.go.set()
        assert all(call.result().ok for call in calls)
    assert "too late" not in [code for code, _ in shop.ran]


def test_one_call_can_be_ended_alone(build, shop):
    """By its id, whether it runs or waits; the others go on."""
    pool = build()
    running, waiting, third = make_call("hang"), make_call("ok"), make_call("ok")
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(pool.run, running)
        shop.inside.acquire()
        others = []
        for number, call in enumerate((waiting, third), 1):
            others.append(threads.submit(pool.run, call))
            assert until(lambda number=number: len(pool._waiting) == number)
        assert pool.kill(waiting.id, "the caller went away")
        with pytest.raises(SandboxUnavailableError, match="the caller went away"):
            others[0].result()
        assert pool.kill(running.id, "the caller went away")
        with pytest.raises(SandboxUnavailableError, match="the caller went away"):
            first.result()
        assert others[1].result().ok
        assert not pool.kill("nobody", "why")


def test_an_engine_that_went_away_is_reported_and_comes_back(build, shop):
    """While nothing can be made every caller hears why; once it can, the next call goes well."""
    pool = build(size=2)
    shop.away = "no Docker engine answers"
    for _ in range(2):
        with pytest.raises(SandboxUnavailableError, match="it died"):
            pool.run(make_call("lost"))
    assert until(lambda: not shop.living())
    for _ in range(3):
        with pytest.raises(SandboxUnavailableError, match="no Docker engine answers"):
            pool.run(make_call("ok"))
    shop.away = ""
    assert pool.run(make_call("ok")).ok
    assert until(lambda: len(shop.living()) >= 1)


def test_a_pool_that_shrank_grows_again(build, shop, monkeypatch):
    """A cell that could not be replaced at the time is made up for later, also where nobody has to wait."""
    monkeypatch.setattr(pool_module, "_RETRY_S", 0.0)
    pool = build(size=2)
    shop.away = "gone for a moment"
    with pytest.raises(SandboxUnavailableError):
        pool.run(make_call("lost"))
    assert until(lambda: len(shop.living()) == 1 and pool._coming == 0)
    shop.away = ""
    assert pool.run(make_call("ok")).ok
    assert until(lambda: len(shop.living()) == 2)


def test_a_strange_error_of_the_maker_leaves_nobody_waiting(build, shop):
    """Whatever a maker raises, callers get SandboxUnavailableError instead of waiting."""
    pool = build()
    shop.strange = True
    with pytest.raises(SandboxUnavailableError, match="it died"):
        pool.run(make_call("lost"))
    with pytest.raises(SandboxUnavailableError, match="no space left"):
        pool.run(make_call("ok"))
    shop.strange = False
    assert pool.run(make_call("ok")).ok


def test_a_start_that_fails_says_why(shop):
    """`start` raises what the maker raised."""
    shop.away = "the image is not here"
    pool = Pool(shop.make, size=3, queue=9, wait_s=1)
    with pytest.raises(SandboxUnavailableError, match="the image is not here"):
        pool.start()
    pool.close()


def test_waiting_is_bounded_where_nothing_moves(build, shop):
    """A caller gives up once no cell became free for the whole time, and its place in the queue is gone."""
    pool = build(wait_s=0.05)
    with ThreadPoolExecutor(1) as threads:
        busy = threads.submit(pool.run, make_call("wait"))
        shop.inside.acquire()
        with pytest.raises(SandboxUnavailableError, match="no cell became free"):
            pool.run(make_call("ok"))
        assert not pool._waiting
        shop.go.set()
        assert busy.result().ok
    assert pool.run(make_call("ok")).ok


def test_killing_ends_what_runs_and_what_waits(build, shop):
    """A freeze ends the calls in cells and those in the queue, each with the reason; the pool goes on afterwards."""
    pool = build()
    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(pool.run, make_call("hang"))
        shop.inside.acquire()
        waits = threads.submit(pool.run, make_call("ok"))
        assert until(lambda: len(pool._waiting) == 1)
        assert pool.kill_running() == 2
        for each in (runs, waits):
            with pytest.raises(SandboxUnavailableError, match="killed by a freeze"):
                each.result()
    assert [code for code, _ in shop.ran] == ["hang"]
    assert pool.run(make_call("ok")).ok


def test_closing_ends_everybody(build, shop):
    """`close` while one runs and others wait: all come back with an error, no cell survives."""
    pool = build()
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(pool.run, make_call("hang"))]
        shop.inside.acquire()
        calls += [threads.submit(pool.run, make_call("ok")) for _ in range(2)]
        assert until(lambda: len(pool._waiting) == 2)
        pool.close()
        for each in calls:
            with pytest.raises(SandboxUnavailableError, match="the sandbox was closed"):
                each.result()
    assert not shop.living()
    with pytest.raises(SandboxUnavailableError, match="closed"):
        pool.run(make_call("ok"))


def test_an_interrupted_waiter_leaves_no_hole(build, shop, monkeypatch):
    """Ctrl-C in a caller that waits must not take a cell along."""
    pool = build()

    def interrupted(waiter):
        assert waiter.ready.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run(make_call("ok"))
    monkeypatch.undo()
    assert pool.run(make_call("ok")).ok
    assert len(shop.made) == 1


def test_a_storm_loses_no_cell(build, shop):
    """Sixteen threads, cells that die and come out dirty all the time: the accounts are right in the end."""
    shop.calls_per_cell = 7
    pool = build(size=3)

    def go(number):
        code = "lost" if number % 11 == 0 else "dirty" if number % 7 == 0 else "ok"
        try:
            return pool.run(make_call(code)).ok
        except SandboxError:
            return code == "lost"

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(go, range(600)))
    assert until(lambda: (pool._coming, pool._taken, pool._swept) == (0, {}, set()))
    assert len(pool._idle) == len(shop.living())
    assert 2 <= len(shop.living()) <= 3
    assert all(cell.calls <= 7 for cell in shop.made)
