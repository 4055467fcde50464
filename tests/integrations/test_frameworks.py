"""What is said of training frameworks: installed or not, guardable or not, and why."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from loopguard.integrations.frameworks import KNOWN, Framework, standing, standings

CONTRACT = """
from dataclasses import dataclass

@dataclass
class Finding:
    name: str
    ok: bool
    why: str

def probe():
"""


@pytest.fixture
def contract(tmp_path, monkeypatch):
    """A framework that is installed (pytest is), with a contract whose `probe` does this."""

    def make(name, body, **more):
        (tmp_path / f"{name}.py").write_text(CONTRACT + f"    {body}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return Framework(name="pytest", guards="its updates", extra="trl", contract=name, **more)

    return make


def test_a_framework_that_is_not_installed_says_what_to_install():
    found = standing(Framework(name="no-such-framework", guards="everything", extra="trl", contract="nowhere"))
    assert (found.state, found.version) == ("not installed", "")
    assert found.do == "pip install 'loopguard[trl]'"


def test_a_framework_without_an_integration_says_why():
    found = standing(Framework(name="pytest", instead="it trains nothing"))
    assert (found.state, found.says) == ("no integration", "it trains nothing")
    assert found.version == pytest.__version__


def test_a_framework_without_an_integration_is_told_of_only_where_it_is_installed():
    there, gone = Framework(name="pytest", instead="why"), Framework(name="no-such-framework", instead="why")
    wanted = Framework(name="no-such-framework", guards="everything", extra="trl")
    assert [one.state for one in standings([there, gone, wanted])] == ["no integration", "not installed"]


def test_a_package_that_the_integration_needs_is_named():
    found = standing(Framework(name="pytest", guards="its updates", extra="trl", needs=("pytest", "no_such_package")))
    assert (found.state, found.says) == ("not guardable", "no_such_package not installed")


def test_a_probe_that_finds_everything_makes_it_guardable(contract):
    found = standing(contract("whole", "return [Finding('a', True, 'b')]"))
    assert (found.state, found.says, found.do) == ("guardable", "its updates", "")


def test_a_failed_probe_names_what_is_missing_and_what_for(contract):
    body = "return [Finding('Trainer.step', False, 'it is wrapped'), Finding('x', True, ''), Finding('y', False, 'z')]"
    found = standing(contract("failing", body))
    assert found.state == "not guardable"
    assert found.says == "Trainer.step is missing (it is wrapped); y is missing (z)"
    assert "release" in found.do


def test_a_probe_that_raises_is_no_crash_and_no_consent(contract):
    found = standing(contract("raising", "raise AttributeError('no such trainer')"))
    assert (found.state, found.says) == ("not guardable", "it cannot be looked at: AttributeError: no such trainer")


def test_a_probe_that_looks_at_nothing_is_no_consent(contract):
    assert standing(contract("idle", "return []")).state == "not guardable"


def test_a_contract_that_is_not_there_is_no_consent():
    found = standing(Framework(name="pytest", guards="all", extra="trl", contract="loopguard.integrations.nowhere"))
    assert found.state == "not guardable"
    assert "ModuleNotFoundError" in found.says


def test_what_a_framework_prints_as_it_is_loaded_does_not_get_into_results(contract, capsys):
    body = "print('hello'); import warnings; warnings.warn('old'); return [Finding('a', True, 'b')]"
    assert standing(contract("chatty", body)).state == "guardable"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "hello" in printed.err


@pytest.mark.parametrize("framework", [one for one in KNOWN if one.guards], ids=lambda one: one.name)
def test_what_is_known_can_be_guarded_in_the_installed_release(framework):
    if importlib.util.find_spec(framework.name) is None:
        pytest.skip(f"{framework.name} is not installed")
    found = standing(framework)
    assert (found.state, found.says) == ("guardable", framework.guards)


def test_nothing_is_loaded_of_what_is_not_installed():
    """Looking where nothing is installed is quick, and asks for no torch."""
    code = (
        "import sys\n"
        "from importlib import metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        "from loopguard.integrations.frameworks import standings\n"
        "assert {one.state for one in standings()} == {'not installed'}\n"
        "print(sorted({'torch', 'transformers', 'trl', 'accelerate'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
