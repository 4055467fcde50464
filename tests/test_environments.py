"""An environment class as a framework finds it, whose instances live in a cell of their own rollout."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import subprocess
import threading

import pytest
from lab import POLICY, Lab

from loopguard.controller import LoopGuard
from loopguard.errors import LoopFrozen, SandboxUnavailableError, ToolRaisedError, UsageError
from loopguard.gates.tools import REFUSAL
from loopguard.testing import raised, returned
from loopguard.types import ToolCall

STEP = 3
MADE = []


class Board:
    """What several games have in common."""

    def __init__(self, size: int = 8):
        self.size = size
        self.at = 0

    def where(self) -> str:
        """Tell where the piece is."""
        return f"at {self.at} of {self.size}"


class Game(Board):
    """A game on a board."""

    def reset(self, start: int = 0, prompt: list | None = None, **row) -> str | None:
        self.at = start
        with open("note", "w") as file:  # noqa: PTH123 - a class of a user's
            file.write("begun")
        return self.where()

    def move(self, by: int) -> int:
        """Move the piece.

        Args:
            by: How far.

        Returns:
            Where it is then.
        """
        self.at += by * STEP
        return self.at

    async def look(self, name: str) -> str:
        """Read a file.

        Args:
            name: Its name.
        """
        with open(name) as file:  # noqa: PTH123 - a class of a user's
            return file.read()

    async def wait(self) -> str:
        """Wait for long."""
        import asyncio

        await asyncio.sleep(600)
        return "over"

    def fail(self) -> int:
        """Fail after moving."""
        self.at = 99
        raise KeyError("lost")

    def tamper(self) -> str:
        """Swap the state of the game from another process."""
        import subprocess
        import sys

        code = "import glob, os; [open(f, 'w').write('x') for f in glob.glob('.loopguard-state*')]"
        subprocess.run([sys.executable, "-c", code], check=True)
        return "done"

    def spin(self) -> str:
        """Never end."""
        while True:
            pass

    def hide(self, answer: str) -> str:
        """Remember something and look for it from another process.

        Args:
            answer: What nobody else should see.
        """
        self.answer = answer
        return self.ask(code="import glob; print([open(name, 'rb').read() for name in sorted(glob.glob('.loop*'))])")

    def ask(self, code: str) -> str:
        """Run code in a process of its own.

        Args:
            code: The code.
        """
        import subprocess
        import sys

        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    def paint(self) -> str:
        """Use a module of the standard library that nothing else has imported."""
        import colorsys

        return getattr(colorsys, "FAKE", "the image's own")

    def shout(self, size: int) -> str:
        """Say too much, after moving.

        Args:
            size: How much.
        """
        self.at = 77
        return "x" * size

    def get_reward(self) -> float:
        return self.at / 10


class Odd:
    """What a rollout can do wrong."""

    def reset(self, **row) -> None:
        self.reward = row.get("reward", 1.0)

    def hold(self) -> str:
        """Keep what cannot be kept."""
        self.lock = threading.Lock()
        return "held"

    def get_reward(self):
        return float(self.reward) if self.reward != "text" else "much"


class EnvironmentLab(Lab):
    """A lab whose policy knows the environments of this file."""

    def __init__(self, tmp_path, *, cells=4, mode="episode", extra="", rule=""):
        super().__init__(tmp_path)
        rules = f"\n    - {{id: game, tool: Game, then: run, sandbox: offline{rule}}}"
        rules += "\n    - {id: odd, tool: Odd, then: run, sandbox: offline}"
        text = re.sub(r"\n    - \{id: calculator.*", rules, POLICY)
        text = text.replace("refused_share: 0.1, contained_share: 0.1", "refused_share: 1, contained_share: 1")
        profile = f'python:1", mode: {mode}, cells: {cells}, limits: {{wall: 3s}}}}'
        self.policy.write_text(text.replace("\nsandbox:", f"{extra}\nsandbox:").replace('python:1"}', profile))
        self.calls = []
        self.respond = lambda call: returned(call, 1.0)

    def open(self, **options):
        respond = self.respond
        self.respond = lambda call: self.calls.append(call) or respond(call)
        return super().open(**options)

    def told(self):
        """The methods that were asked, with their arguments."""
        return [json.loads(call.code) for call in self.calls]


@pytest.fixture
def lab(tmp_path):
    return EnvironmentLab(tmp_path)


class TestItLooksAsItDid:
    def test_a_framework_finds_the_same_methods(self, lab):
        """On the class, as plain functions; inherited ones as well."""
        with lab.open() as guard:
            there = dict(inspect.getmembers(guard.wrap_environment(Game), inspect.isfunction))
        for name, method in inspect.getmembers(Game, inspect.isfunction):
            assert inspect.signature(there[name]) == inspect.signature(method), name
            assert inspect.iscoroutinefunction(there[name]) == inspect.iscoroutinefunction(method), name
            assert name == "__init__" or there[name].__doc__ == method.__doc__
        assert {name for name in there if not name.startswith("_")} == {name for name in dir(Game) if name[0] != "_"}

    def test_so_are_name_docstring_and_how_it_is_made(self, lab):
        with lab.open() as guard:
            there = guard.wrap_environment(Game)
        assert (there.__name__, there.__doc__, there.__module__) == ("Game", Game.__doc__, Game.__module__)
        assert inspect.signature(there) == inspect.signature(Game)

    @pytest.mark.train
    def test_a_framework_makes_the_same_schema_of_its_methods(self, lab):
        from transformers.utils import get_json_schema

        with lab.open() as guard:
            mine, theirs = guard.wrap_environment(Game)(), Game()
            for name in ("move", "look", "where"):
                assert get_json_schema(getattr(mine, name)) == get_json_schema(getattr(theirs, name))

    def test_nothing_of_the_class_is_on_the_host(self, lab):
        """Not even its attributes: who reads one is told where it is."""
        with lab.open() as guard:
            game = guard.wrap_environment(Game)(size=3)
            assert not isinstance(game, Game)
            with pytest.raises(AttributeError, match="Game.size is in the cell of its rollout"):
                _ = game.size
        assert lab.calls == []


class TestACall:
    def test_the_gate_sees_method_and_arguments(self, lab):
        """One rule, for the class, decides about all of its methods."""
        with lab.open() as guard:
            game = guard.wrap_environment(Game)(size=3)
            game.reset(start=2, prompt=[{"role": "user", "content": "x"}])
            game.move(4)
            game.get_reward()
        assert lab.told() == [
            {"__init__": {"size": 3}, "reset": {"start": 2, "prompt": [{"role": "user", "content": "x"}]}},
            {"move": {"by": 4}},
            {"get_reward": {}},
        ]
        assert {call.tool for call in lab.calls} == {"Game"}
        assert len({call.program for call in lab.calls}) == 1

    def test_refusals_are_text_for_tools_and_nothing_for_the_framework(self, tmp_path):
        """A rollout that was refused its beginning has no tools and no reward."""
        lab = EnvironmentLab(tmp_path, rule=", refuse_patterns: [forbidden]")
        with lab.open() as guard:
            game = guard.wrap_environment(Game)()
            assert game.reset(note="forbidden") is None
            assert game.move(by=1) == REFUSAL
            assert game.get_reward() is None
            assert lab.calls == []
            assert game.reset() == 1.0
            assert game.move(by=1) == 1.0

    def test_what_a_method_raises_is_raised_with_the_same_text(self, lab):
        lab.respond = lambda call: raised(call, ValueError("no such place"))
        with lab.open() as guard, pytest.raises(ToolRaisedError, match="^no such place$"):
            guard.wrap_environment(Game)().move(by=1)

    def test_a_column_that_cannot_be_sent_is_named(self, lab):
        with lab.open() as guard, pytest.raises(UsageError, match=r"Game.reset\(image=...\) holds a object"):
            guard.wrap_environment(Game)().reset(image=object())

    def test_one_rollout_too_many_is_told_so(self, tmp_path):
        """It would wait for a cell that its own batch holds, and for ever."""
        lab = EnvironmentLab(tmp_path, cells=2)
        with lab.open() as guard:
            kind = guard.wrap_environment(Game)
            games = [kind() for _ in range(3)]
            for game in games[:2] * 2:
                game.reset()
            said = "2 rollouts have a cell each, .* set sandbox.profiles.offline.cells to the number of rollouts"
            with pytest.raises(UsageError, match=said):
                games[2].reset()
            with pytest.raises(UsageError, match=said):
                guard.wrap_environment(Odd)().reset()

    @pytest.mark.parametrize("reward", [10**400, float("nan"), float("inf"), "much", [1.0]])
    def test_a_reward_is_a_finite_number(self, lab, reward):
        lab.respond = lambda call: returned(call, reward)
        with lab.open() as guard, pytest.raises(ToolRaisedError, match="a reward is a finite number"):
            guard.wrap_environment(Game)().get_reward()

    def test_an_awaited_method_takes_its_turn(self, lab):
        with lab.open() as guard:
            game = guard.wrap_environment(Game)()
            game.reset()

            async def both():
                return await asyncio.gather(*(game.look(name=str(n)) for n in range(5)))

            assert asyncio.run(both()) == [1.0] * 5
        assert len(lab.calls) == 6


class TestTheRunStops:
    def test_a_cell_that_dies_freezes_the_run(self, lab):
        lab.respond = lambda call: SandboxUnavailableError("the cell is gone")
        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            game = guard.wrap_environment(Game)()
            with pytest.raises(SandboxUnavailableError):
                game.reset()
            assert game.move(by=1) == REFUSAL
            with pytest.raises(LoopFrozen, match="under a call of Game"):
                lab.update(cycle)

    def test_an_awaited_one_as_well(self, lab):
        lab.respond = lambda call: SandboxUnavailableError("the cell is gone")
        with lab.build(lab.open()) as guard:
            cycle = next(guard.cycles(1))
            with pytest.raises(SandboxUnavailableError):
                asyncio.run(guard.wrap_environment(Game)().look(name="x"))
            with pytest.raises(LoopFrozen):
                lab.update(cycle)

    def test_a_rollout_from_before_a_freeze_is_none_after_it(self, lab):
        """Its cell may be gone, and its cycle starts again; the next reset begins another."""
        with lab.open() as guard:
            game = guard.wrap_environment(Game)()
            game.reset()
            guard._state.latch("a test")
            assert game.move(by=1) == REFUSAL
            assert game.get_reward() is None
            guard._resume(by="dana", reason="a test")
            assert game.move(by=1) == REFUSAL
            game.reset()
            assert game.move(by=1) == 1.0


class TestTheBudget:
    def test_it_counts_what_a_model_calls_in_one_rollout(self, tmp_path):
        """`reset` and `get_reward` are the framework's."""
        lab = EnvironmentLab(tmp_path, extra="\n  budget: {per_rollout: 2}")
        with lab.open() as guard:
            game = guard.wrap_environment(Game)()
            for _ in range(2):
                game.reset()
                assert [game.move(by=1) for _ in range(3)] == [1.0, 1.0, REFUSAL]
                assert game.get_reward() == 1.0
        assert [entry.body["rule"] for entry in lab.events("tool.decided")].count("budget") == 2


def makes_a_closure():
    secret = 1

    class Game:
        def reset(self):
            return str(secret)

    return Game


class WithStatic(Game):
    @staticmethod
    def helper() -> int:
        return 1


class NoReset:
    def move(self) -> int:
        return 1


class Listing(Game):
    def put(self, *these: int) -> int:
        return len(these)


class Global(Game):
    def note(self) -> int:
        MADE.append(LOCK)
        return 1


LOCK = threading.Lock()


class TestWhatCannotBeSent:
    @pytest.mark.parametrize(
        ("what", "said"),
        [
            (Game(), "give the class"),
            (lambda: Game(), "give the class"),
            (makes_a_closure(), "refers to secret"),
            (WithStatic, "helper is a staticmethod"),
            (NoReset, "has no method reset"),
            (Listing, r"Listing.put takes \*these"),
            (Global, "refers to LOCK, a lock of this process"),
            (Board, "has no method reset"),
        ],
    )
    def test_it_is_refused_with_the_way_out(self, tmp_path, what, said):
        lab = EnvironmentLab(tmp_path)
        lab.policy.write_text(lab.policy.read_text().replace("tool: Odd", "tool: Global"))
        with lab.open() as guard, pytest.raises(UsageError, match=said):
            guard.wrap_environment(what)

    def test_cells_that_keep_nothing_are_refused(self, tmp_path):
        lab = EnvironmentLab(tmp_path, mode="pooled")
        with lab.open() as guard, pytest.raises(UsageError, match="mode: episode"):
            guard.wrap_environment(Game)

    def test_a_class_that_no_rule_names_is_a_slip(self, lab):
        lab.policy.write_text(lab.policy.read_text().replace("tool: Game", "tool: Gane"))
        with lab.open() as guard, pytest.raises(UsageError, match="id: game, tool: Game, then: run"):
            guard.wrap_environment(Game)


@pytest.mark.docker
class TestInACell:
    def cells(self, guard):
        shown = subprocess.run(
            ["docker", "ps", "-aq", "--filter", f"label=loopguard.run={guard.run_id}"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return len(shown.stdout.split())

    def test_an_instance_lives_from_call_to_call_and_so_do_its_files(self, tmp_path):
        lab = EnvironmentLab(tmp_path)
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            kind = guard.wrap_environment(Game)
            one, two = kind(), kind(size=9)
            assert one.reset(start=2) == "at 2 of 8"
            assert two.reset() == "at 0 of 9"
            assert (one.move(by=1), one.move(1), two.move(1)) == (5, 8, 3)
            assert asyncio.run(one.look(name="note")) == "begun"
            with pytest.raises(ToolRaisedError, match="^'lost'$"):
                one.fail()
            assert one.where() == "at 99 of 8"
            assert one.get_reward() == 9.9
            with pytest.raises(ToolRaisedError, match="timed out after 3 s"):
                one.spin()
            assert one.where() == "at 99 of 8"
            assert one.reset() == "at 0 of 8"
            assert self.cells(guard) >= 2
        assert self.cells(guard) == 0
        with pytest.raises(SandboxUnavailableError, match="closed"):
            two.move(by=1)

    def test_what_a_method_leaves_cannot_swap_the_instance(self, tmp_path):
        """A process of another program can write the file; what it wrote is not taken for the state."""
        lab = EnvironmentLab(tmp_path)
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            game = guard.wrap_environment(Game)()
            game.reset(start=1)
            assert game.tamper() == "done"
            assert game.where() == "at 1 of 8"
            swap = ToolCall(
                id="swap",
                tool="python",
                code="import glob; [open(f, 'wb').write(b'x') for f in glob.glob('.loopguard-s*')]",
            )
            game._rollouts._episode.cell.run(swap)
            with pytest.raises(ToolRaisedError, match="the state of the environment was changed between two calls"):
                game.get_reward()

    def test_what_a_method_starts_cannot_read_the_instance(self, tmp_path):
        """It may know the solution. All that it can find is noise."""
        lab = EnvironmentLab(tmp_path)
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            game = guard.wrap_environment(Game)()
            game.reset()
            shown = [game.hide(answer="swordfish"), game.hide(answer="swordfish")]
            assert all(".loopguard" not in one and len(one) > 100 for one in shown)
            assert not any(word in one for one in shown for word in ("swordfish", "Game", "answer"))
            assert shown[0] != shown[1]

    def test_what_a_rollout_leaves_is_not_imported(self, tmp_path):
        """A file by the name of a module would else run in the process that gives the reward."""
        lab = EnvironmentLab(tmp_path)
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            game = guard.wrap_environment(Game)()
            game.reset()
            assert game.ask(code="open('colorsys.py', 'w').write('FAKE = 1'); import colorsys; print(colorsys.FAKE)")
            assert game.paint() == "the image's own"

    def test_a_call_whose_result_cannot_come_back_has_left_nothing(self, tmp_path):
        lab = EnvironmentLab(tmp_path)
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            game = guard.wrap_environment(Game)()
            game.reset(start=1)
            with pytest.raises(ToolRaisedError, match="^gave too large a result$"):
                game.shout(size=20 << 20)
            assert game.where() == "at 1 of 8"
            assert game.shout(size=1) == "x"
            assert game.where() == "at 77 of 8"

    def test_a_caller_who_goes_away_ends_the_rollout_and_not_the_run(self, tmp_path):
        lab = EnvironmentLab(tmp_path)
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            game = guard.wrap_environment(Game)()
            game.reset()

            async def impatient():
                waiting = asyncio.ensure_future(game.wait())
                while not lab.events("tool.decided")[1:]:
                    await asyncio.sleep(0.01)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting

            asyncio.run(impatient())
            assert not guard.frozen
            assert game.move(by=1) == REFUSAL
            assert game.reset() == "at 0 of 8"
            assert game.move(by=1) == 3

    def test_what_cannot_be_kept_is_said(self, tmp_path):
        lab = EnvironmentLab(tmp_path)
        with LoopGuard.from_file(lab.policy, run_dir=lab.run_dir) as guard:
            odd = guard.wrap_environment(Odd)()
            assert odd.reset() is None
            with pytest.raises(ToolRaisedError, match="Odd cannot be kept between two calls: cannot pickle"):
                odd.hold()
            assert odd.get_reward() == 1.0
            odd.reset(reward="text")
            with pytest.raises(ToolRaisedError, match="get_reward gave 'much'"):
                odd.get_reward()
