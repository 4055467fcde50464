"""Fixtures for the policy tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from policy_kit import SMALL, edited

from loopguard.policy.load import check

# A busy machine is no reason to fail.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def findings(tmp_path):
    """What is said about the small policy after some edits, without the name of the file."""

    def say(*edits: tuple[str, str], text: str | bytes | None = None) -> list[str]:
        path = tmp_path / "p.yaml"
        written = edited(*edits, text=SMALL) if text is None else text
        path.write_bytes(written if isinstance(written, bytes) else written.encode("utf-8"))
        return [str(finding).removeprefix(f"{path}:").strip() for finding in check(path)]

    return say
