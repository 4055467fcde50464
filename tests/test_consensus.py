"""The verdict of several ranks: claims about `Consensus`, with threads for ranks."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
from lab import POLICY

from loopguard.audit.log import AuditLog
from loopguard.controller.ranks import Consensus, Place, await_layout, compare, place
from loopguard.errors import UsageError
from loopguard.policy.load import load
from loopguard.types import Decision

RANKS = 3


class Table:
    """Where threads meet instead of ranks."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=10)
        self.laid: dict[int, object] = {}

    def exchange(self, rank, value):
        self.laid[rank] = value
        self.barrier.wait()
        everything = [self.laid[one] for one in range(RANKS)]
        self.barrier.wait()
        return everything


class ThreadPeers:
    """Peers that talk over a table. From `dead_after` exchanges on nobody answers."""

    def __init__(self, table, rank, *, dead_after=math.inf):
        self.place = Place(rank, RANKS)
        self._table, self._left = table, dead_after

    def start(self, numbers):
        return numbers

    def finish(self, started):
        return [max(column) for column in zip(*self.gather(started), strict=True)]

    def gather(self, value):
        self._left -= 1
        if self._left < 0:
            raise ConnectionError("Connection closed by peer")
        return self._table.exchange(self.place.rank, value)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(POLICY)
    return load(path).policy


@pytest.fixture
def ranks(policy):
    return make(policy)


def make(policy, **options):
    table, made = Table(), []
    for rank in range(RANKS):
        consensus = Consensus(Place(rank, RANKS), policy)
        consensus.join(ThreadPeers(table, rank, **options))
        made.append(consensus)
    return made


def agree(ranks, own, *, at="update", numbers=(7, 7, 7)):
    """What each rank comes to, when each has its own decision."""
    answers = [None] * RANKS

    def act(rank):
        answers[rank] = ranks[rank].answer(ranks[rank].ask(own[rank], at=at, number=numbers[rank]))

    threads = [threading.Thread(target=act, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def decision(result="allow", rule="default", *, in_time=True, gate="update"):
    facts = {"withheld_in_time": in_time}
    return Decision(result=result, gate=gate, rule=rule, reason=f"because of {rule}", facts=facts)


QUIET = decision()
TRIP = decision("freeze", "bounds:loss")
LATE_TRIP = decision("freeze", "jump:loss", in_time=False)


def test_where_all_are_quiet_each_keeps_its_own_decision(ranks):
    own = [decision(), decision(), decision()]
    assert all(answer is mine for answer, mine in zip(agree(ranks, own), own, strict=True))


def test_one_trip_freezes_all_and_says_whose_it_is(ranks):
    first, second, third = agree(ranks, [QUIET, TRIP, QUIET])
    assert second is TRIP
    assert first.result == third.result == "freeze"
    assert first.rule == "bounds:loss"
    assert first.reason == third.reason == "rank 1 tripped bounds:loss: because of bounds:loss"


@pytest.mark.parametrize(
    ("own", "wins"),
    [
        ([decision("skip", "bounds:loss"), QUIET, TRIP], 2),
        ([TRIP, LATE_TRIP, QUIET], 1),
        ([decision("deny", "held"), decision("skip", "bounds:loss"), QUIET], 1),
        ([QUIET, TRIP, TRIP], 1),
        ([decision("freeze", "latch", gate="operator"), QUIET, TRIP], 2),
    ],
    ids=[
        "a freeze over a skip",
        "undoing over withholding",
        "a skip over a deny",
        "the lower rank",
        "a rule over a latch",
    ],
)
def test_the_gravest_verdict_is_that_of_all(ranks, own, wins):
    answers = agree(ranks, own)
    assert answers[wins] is own[wins]
    for rank, answer in enumerate(answers):
        assert answer.result == own[wins].result
        assert answer.facts["withheld_in_time"] == own[wins].facts["withheld_in_time"]
        assert answer.reason.endswith(own[wins].reason), rank


def test_a_result_that_no_rank_should_have_freezes_all(ranks):
    odd = decision("run", "unheard of")
    answers = agree(ranks, [QUIET, odd, QUIET])
    assert all(answer is odd or answer.rule == "unheard of" for answer in answers)
    assert not any(answer.allowed for answer in answers)


@pytest.mark.parametrize(
    ("at", "numbers", "says"),
    [("update", (7, 7, 8), "one is at update 7, another at update 8"), ("promote", (7, 9, 8), "promote 9")],
)
def test_ranks_that_stand_elsewhere_freeze_all(ranks, at, numbers, says):
    for answer in agree(ranks, [QUIET] * 3, at=at, numbers=numbers):
        assert (answer.result, answer.rule) == ("freeze", "mismatch")
        assert says in answer.reason


def test_what_was_said_in_between_is_told_at_the_next_place(ranks):
    """The first thing said gives the reason, and one of them that has to be undone is enough to undo."""
    ranks[2].say(TRIP, roll_back=False)
    ranks[2].say(decision("freeze", "latch"), roll_back=True)
    for answer in agree(ranks, [QUIET] * 3):
        assert answer.rule == "bounds:loss"
        assert answer.facts["withheld_in_time"] is False


def test_what_is_said_after_the_question_waits_for_the_next(ranks):
    asked = []
    threads = [
        threading.Thread(target=lambda c=consensus: asked.append((c, c.ask(QUIET, at="update", number=1))))
        for consensus in ranks
    ]
    for thread in threads:
        thread.start()
        thread.join()
    ranks[0].say(TRIP, roll_back=False)
    answers = []
    threads = [threading.Thread(target=lambda c=c, a=a: answers.append(c.answer(a))) for c, a in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.result for answer in answers] == ["allow"] * 3
    assert all(answer.rule == "bounds:loss" for answer in agree(ranks, [QUIET] * 3, numbers=(2, 2, 2)))


def test_a_norm_that_differs_is_found_at_the_next_place_and_undone(ranks):
    for consensus, norm in zip(ranks, (0.5, 0.5, math.nextafter(0.5, 1)), strict=True):
        consensus.same_norm(norm)
    for answer in agree(ranks, [QUIET] * 3):
        assert answer.rule == "mismatch"
        assert answer.facts["withheld_in_time"] is False
    assert all(answer.allowed for answer in agree(ranks, [QUIET] * 3))


@pytest.mark.parametrize("norm", [0.0, math.nan, -math.nan, math.inf, 1e300])
def test_a_norm_that_is_the_same_is_no_trouble_whatever_it_is(ranks, norm):
    for consensus in ranks:
        consensus.same_norm(norm)
    assert all(answer.allowed for answer in agree(ranks, [QUIET] * 3))


def test_ranks_that_cannot_agree_freeze_and_know_why(policy):
    ranks = make(policy, dead_after=0)
    answers = agree(ranks, [QUIET, TRIP, QUIET])
    assert [answer.rule for answer in answers] == ["consensus", "bounds:loss", "consensus"]
    assert "could not agree at update 7: Connection closed by peer" in answers[0].reason
    assert all(consensus.lost for consensus in ranks)


def test_a_rank_that_goes_away_after_the_verdict_is_still_named(policy):
    answers = agree(make(policy, dead_after=1), [QUIET, LATE_TRIP, QUIET])
    for answer in answers:
        assert answer.rule == "jump:loss"
        assert answer.facts["withheld_in_time"] is False
    others = {answers[0].reason, answers[2].reason}
    assert others == {"rank 1 tripped jump:loss: it went away before it could say more"}


def test_one_rank_has_nobody_to_ask(policy):
    alone = Consensus(Place(0, 1), policy)
    assert not alone.several
    assert alone.answer(alone.ask(TRIP, at="update", number=1)) is TRIP


def test_ranks_that_have_not_met_cannot_agree(policy):
    consensus = Consensus(Place(1, 2), policy)
    with pytest.raises(UsageError, match="call guard.attach"):
        consensus.ask(QUIET, at="cycle", number=1)


@pytest.mark.parametrize(
    ("opened", "met", "says"),
    [(Place(1, 2), None, "no process group"), (Place(0, 1), Place(0, 2), "start the ranks with torchrun")],
)
def test_a_guard_meets_those_that_it_was_opened_with(policy, opened, met, says):
    peers = None
    if met is not None:
        peers = ThreadPeers(Table(), met.rank)
        peers.place = met
    with pytest.raises(UsageError, match=says):
        Consensus(opened, policy).join(peers)


def test_ranks_with_other_run_directories_are_told_apart():
    same = {"run": "a", "policy": "p", "late": False}
    compare([same, same])
    with pytest.raises(UsageError, match="rank 1 has a run directory with id b and rank 0 has a"):
        compare([same, {**same, "run": "b"}])


def test_a_rank_does_not_wait_for_ever_for_a_run_directory(monkeypatch, tmp_path):
    monkeypatch.setattr("loopguard.controller.ranks._LAYOUT_S", 0.0)
    with pytest.raises(UsageError, match="has no run.json"):
        await_layout(Path(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="has no audit log"):
        await_layout(tmp_path)
    with AuditLog.open(tmp_path, run_id="a", policy="", reserve_mib=1):
        await_layout(tmp_path)


class TestWhichRank:
    def test_one_process_is_the_only_rank(self, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert place() == Place(0, 1)
        assert place().leads
        assert place().stream == "controller"

    def test_a_rank_of_nobody_knows_how_many_says_nothing(self, monkeypatch):
        monkeypatch.setenv("RANK", "3")
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert place() == Place(0, 1)

    def test_torchrun_says_which_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert place() == Place(2, 4)
        assert place().stream == "rank-2"

    @pytest.mark.parametrize(("rank", "count"), [("4", "4"), ("-1", "2"), ("one", "2"), ("0", "0")])
    def test_an_impossible_environment_is_refused(self, monkeypatch, rank, count):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(UsageError, match=f"RANK={rank} and WORLD_SIZE={count}"):
            place()
