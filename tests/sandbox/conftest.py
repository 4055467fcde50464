"""Runtimes that many sandbox tests share; each starts once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sandbox_kit import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """One pooled cell with time enough for a busy machine."""
    with Bench() as bench:
        yield bench


@pytest.fixture(scope="session")
def hasty() -> Iterator[Bench]:
    """One pooled cell whose calls end after a second."""
    with Bench(wall_s=1) as bench:
        yield bench
