"""The report as a person sees it: in a real browser, without a network and without a complaint."""

from __future__ import annotations

import pytest
from chromium import look, shoot
from runs_for_browsers import frozen_thrice, hostile

from loopguard.audit.report import write_report

pytestmark = pytest.mark.browser


def test_a_report_with_three_freezes_opens_without_an_error_and_asks_for_nothing(tmp_path):
    """Nothing on the console, nothing from the network, and each freeze has its card."""
    page = write_report(frozen_thrice(tmp_path / "run"))
    seen = look(page, tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert seen.dom.count('<article class="card') == 3
    assert all(f"<h3>f{number} <" in seen.dom for number in (1, 2, 3))
    assert "<svg" in seen.dom


def test_text_of_strangers_stays_text(tmp_path):
    """Scripts, images and handlers out of a log run nothing and load nothing."""
    page = write_report(hostile(tmp_path / "run"))
    seen = look(page, tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert "<script" not in seen.dom
    assert "<img" not in seen.dom
    assert "&lt;img src=http://" in seen.dom


def test_a_page_that_complains_and_loads_is_seen_to_do_so(tmp_path):
    """The two tests above can fail."""
    page = tmp_path / "bad.html"
    page.write_text("<body><img src=http://127.0.0.1:9/x.png><script>console.error('seen')</script>")
    seen = look(page, tmp_path)
    assert [line for line in seen.console if "seen" in line]
    assert seen.requests == ["http://127.0.0.1:9/x.png"]


def test_there_is_something_to_see(tmp_path):
    """A page that its own policy left without style would be a small picture of black on white."""
    page = write_report(frozen_thrice(tmp_path / "run"))
    assert shoot(page, tmp_path).stat().st_size > 40_000
