"""Which training frameworks are installed, what can be guarded in each, and whether what that relies on is there.

Loads a framework only where it is installed, to look at it, and only those that have an integration. Versions are told
and never compared: an integration brings a `contract` with a `probe()`, which looks for what the integration touches.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loopguard.integrations.transformers.contract import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """A framework that people train with."""

    name: str
    """Of its package and of what is installed."""

    guards: str = ""
    """What can be guarded in it; empty where nothing can."""

    instead: str = ""
    """Where nothing can: why, or what can be done."""

    extra: str = ""
    """The extra of LoopGuard that brings what is needed."""

    needs: tuple[str, ...] = ()
    """Packages that the integration needs beside it."""

    contract: str = ""
    """The module whose `probe()` looks for what the integration relies on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a framework is good for on this machine."""

    name: str
    version: str
    """Empty where it is not installed."""

    state: Literal["guardable", "not guardable", "no integration", "not installed"]
    says: str
    """What can be guarded, or why nothing can."""

    do: str = ""


KNOWN = (
    Framework(
        name="torch",
        guards="loops of your own: updates, promotion, snapshots, several ranks",
        extra="train",
        needs=("safetensors",),
    ),
    Framework(
        name="transformers",
        guards="Trainer: updates, evaluation, checkpoints",
        extra="transformers",
        needs=("torch", "safetensors", "accelerate"),
        contract="loopguard.integrations.transformers.contract",
    ),
    Framework(
        name="accelerate",
        guards="what Trainer and the trainers of TRL run on",
        extra="transformers",
        needs=("torch", "safetensors", "transformers"),
        contract="loopguard.integrations.transformers.contract",
    ),
    Framework(
        name="trl",
        guards="SFTTrainer, DPOTrainer: updates, evaluation, checkpoints; "
        "GRPOTrainer: updates, tools, environments, rewards, sync_weights",
        extra="trl",
        needs=("torch", "safetensors", "accelerate", "transformers", "datasets"),
        contract="loopguard.integrations.trl.contract",
    ),
    Framework(name="lightning", instead="its Trainer makes the gradients inside of optimizer.step(closure)"),
    Framework(name="deepspeed", instead="its engine steps by itself"),
    Framework(name="verl", instead="its tools can run in cells through `loopguard serve`; its updates are not watched"),
)


def standings(frameworks: Iterable[Framework] = KNOWN) -> list[Standing]:
    """How each framework stands. Those without an integration are told of only where they are installed."""
    found = [(one, standing(one)) for one in frameworks]
    return [stands for one, stands in found if stands.version or one.guards]


def standing(framework: Framework) -> Standing:
    """What this framework is good for here. Raises nothing: what goes wrong in looking is what is told."""
    version = _version(framework.name)
    name, install = framework.name, f"pip install 'loopguard[{framework.extra}]'"
    if not version:
        return Standing(name=name, version="", state="not installed", says="not installed", do=install)
    if not framework.guards:
        return Standing(name=name, version=version, state="no integration", says=framework.instead)
    if absent := [need for need in framework.needs if importlib.util.find_spec(need) is None]:
        says = f"{', '.join(absent)} not installed"
        return Standing(name=name, version=version, state="not guardable", says=says, do=install)
    if missing := _missing(framework.contract) if framework.contract else "":
        do = f"take a release of {name} that LoopGuard was tested with; LoopGuard.observe may still watch it"
        return Standing(name=name, version=version, state="not guardable", says=missing, do=do)
    return Standing(name=name, version=version, state="guardable", says=framework.guards)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _missing(contract: str) -> str:
    """What the integration relies on and is not there, with what it is for; empty where all of it is."""
    try:
        # What a framework prints and warns of as it is loaded is not about what was asked.
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            findings: list[Finding] = importlib.import_module(contract).probe()
    except Exception as error:  # noqa: BLE001 - a release may raise anything as it is loaded, and then it is no good
        return f"it cannot be looked at: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if not findings:
        return "nobody looked at anything"  # and what nobody has looked at is not vouched for
    return "; ".join(f"{finding.name} is missing ({finding.why})" for finding in findings if not finding.ok)
