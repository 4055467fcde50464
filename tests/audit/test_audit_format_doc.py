"""The format document is a test: its example, its verifier, its tables."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from audit_stories import finished, open_log, plain_log

from loopguard.audit import prune, read
from loopguard.audit.compress import compress
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


def test_the_printed_verifier_reads_compressed_segments(stranger, story, tmp_path):
    shutil.copytree(story, tmp_path / "run")
    compress(read.segments(tmp_path / "run")[0])
    assert stranger(read.stream_dir(tmp_path / "run")) == f"whole up to {verify(story).head}"


def test_the_printed_verifier_takes_a_pruned_front_where_a_record_says_so(stranger, tmp_path):
    run_dir = tmp_path / "run"
    plain_log(run_dir, notes=60, segment_bytes=4000)
    plan = prune.plan(run_dir, "controller", before="2040", stays=lambda _: "")
    with open_log(run_dir) as log:
        entry = prune.record(log, plan, by="dana", reason="old")
    prune.carry_out(read.stream_dir(run_dir), entry)
    assert read.first_seq(read.segments(run_dir)[0]) > 1
    assert stranger(read.stream_dir(run_dir)) == f"whole up to {verify(run_dir).head}"
    (last,) = [path for path in read.segments(run_dir) if b"log.pruned" in path.read_bytes()]
    last.unlink()
    assert stranger(read.stream_dir(run_dir)) == "pruned.json: no record says so"


def test_every_member_of_a_pruning_is_described(tmp_path):
    plain_log(tmp_path / "run", notes=60, segment_bytes=4000)
    body = prune.plan(tmp_path / "run", "controller", before="2040", stays=lambda _: "").body
    assert {name for name in (*body, *body["state"], "by", "reason") if f"`{name}`" not in DOCUMENT} == set()


def test_every_record_type_is_described():
    assert {name for name in TYPES if f"`{name}`" not in DOCUMENT} == set()


def test_every_status_is_described():
    for code, status in STATUS.items():
        assert f"| {code} | {status} |" in DOCUMENT
