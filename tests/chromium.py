"""Open a page in a headless Chromium and say what it showed, what it complained about, and what it asked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 90
_LOCAL = ("file:", "data:", "about:")
_QUIET = (
    *("--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-sync", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps"),
    *("--disable-domain-reliability", "--disable-client-side-phishing-detection", "--metrics-recording-only"),
    "--disable-features=OptimizationHints,MediaRouter,Translate,InterestFeedContentSuggestions",
    # Whatever asks for something meets a closed port, and stands in the log of the network all the same.
    *("--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>"),
    # A container has no user namespaces for the browser's own sandbox; the page that it opens is ours.
    "--no-sandbox",
)


def command() -> str | None:
    """The browser, wherever a distribution puts it."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Seen:
    """What came of opening a page."""

    dom: str
    console: list[str]
    """What the page wrote to the console, errors and blocked loads included."""
    requests: list[str]
    """Addresses beyond the file itself that the page asked for."""


def look(page: Path, folder: Path) -> Seen:
    """Open a page with an empty profile that goes into a folder. Raises CalledProcessError where the browser fails."""
    log = folder / "net.json"
    done = _opened(page, folder, f"--log-net-log={log}", "--net-log-capture-mode=Everything", "--dump-dom")
    return Seen(done.stdout, re.findall(r":CONSOLE[^\]]*\] (.*)", done.stderr), _requests(log))


def shoot(page: Path, folder: Path, *, width: int = 1000, height: int = 1080) -> Path:
    """A picture of the top of a page."""
    shot = folder / "page.png"
    _opened(page, folder, f"--screenshot={shot}", "--hide-scrollbars", f"--window-size={width},{height}")
    return shot


def _opened(page: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    browser = command()
    assert browser is not None
    known = [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0"]
    return subprocess.run(
        [browser, *_QUIET, *known, *words, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )


def _requests(log: Path) -> list[str]:
    """What the page asked for. What the browser asks for on its own account has no origin, and says so."""
    events = json.loads(log.read_text(encoding="utf-8", errors="replace"))["events"]
    started = [event["params"] for event in events if "initiator" in event.get("params", {})]
    asked = {params["url"] for params in started if params["initiator"] != "not an origin"}
    return sorted(url for url in asked if not url.startswith(_LOCAL))
