"""The format document is a test: its example, its verifier, its tables."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from audit_stories import finished

from loopguard.audit import read
from loopguard.audit.events import TYPES, decode, encode, fields_of
from loopguard.audit.verify import STATUS, verify

DOCUMENT = (Path(__file__).parents[2] / "docs" / "audit-format.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)[-1]


@pytest.fixture(scope="module")
def stranger():
    """The verifier that the document prints; it knows nothing of our code."""
    names: dict[str, object] = {"__name__": "stranger"}
    exec(block("python"), names)
    return names["verify"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("doc") / "run"
    finished(run_dir, cycles=1, updates=16, calls=4)
    return run_dir


def test_it_opens_with_what_a_demanding_user_expects():
    assert DOCUMENT.split("\n## ")[1].startswith("What a demanding user expects")


def test_the_example_is_a_record():
    line = block("json").strip().encode()
    entry = decode(line)
    assert encode(fields_of(entry)) == (line + b"\n", entry.hash)


def test_the_printed_verifier_agrees_on_an_untouched_log(stranger, story):
    assert stranger(read.stream_dir(story)) == f"whole up to {verify(story).head}"


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[:5] + lines[6:],
        lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]],
        lambda lines: [*lines[:5], lines[5], *lines[5:]],
        lambda lines: [line.replace(b"python", b"Python") for line in lines],
        lambda lines: [*lines[:-1], lines[-1][:-20]],
    ],
    ids=["dropped", "swapped", "repeated", "edited", "cut"],
)
def test_the_printed_verifier_finds_what_ours_finds(stranger, story, tmp_path, edit):
    shutil.copytree(story, tmp_path / "run")
    path = read.segments(tmp_path / "run")[0]
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    assert not stranger(read.stream_dir(tmp_path / "run")).startswith("whole")
    assert verify(tmp_path / "run").findings


def test_every_record_type_is_described():
    assert {name for name in TYPES if f"`{name}`" not in DOCUMENT} == set()


def test_every_status_is_described():
    for code, status in STATUS.items():
        assert f"| {code} | {status} |" in DOCUMENT
