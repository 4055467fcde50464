"""The same claims for every runtime."""

from __future__ import annotations

import pytest
from conformance import CLAIMS
from sandbox_kit import Bench

from loopguard.testing import FakeRuntime


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_the_fake(claim):
    """The double that ships keeps the contract, so that a test with it means something."""
    claim(lambda: FakeRuntime(lambda call: call.code.removeprefix('print("').removesuffix('")')))


@pytest.mark.docker
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_docker(claim):
    """Cells in containers keep the contract."""
    claim(lambda: Bench(cells=2).runtime)
