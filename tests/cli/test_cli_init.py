"""`loopguard init`: a policy to start from, in a file that was not there or on standard output."""

from __future__ import annotations

import shutil

import pytest

from loopguard import LoopGuard
from loopguard.audit import read
from loopguard.cli.app import _main
from loopguard.policy.load import examine, shipped
from loopguard.testing import fake_runtimes


@pytest.fixture
def init(capsys):
    def run(*words):
        code = _main(["init", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def observed(tmp_path):
    """A run whose loss falls too far at update 100."""
    with LoopGuard.observe(tmp_path / "seen", quiet=True) as observer:
        for update in range(1, 151):
            level = 2.0 if update < 100 else 0.5
            observer.see({"loss": level + (update * 7919 % 13) / 100, "grad_norm": 1.0 + update % 3})
        observer.measured({"eval_loss": 2.0})
    return tmp_path / "seen"


def test_without_a_run_it_is_the_default(init, tmp_path):
    assert init() == (0, shipped("default").read_text(), "")
    code, out, err = init("--out", tmp_path / "policy.yaml")
    assert (code, out) == (0, "")
    assert "policy check" in err
    assert (tmp_path / "policy.yaml").read_text() == shipped("default").read_text()


def test_from_a_run_it_says_where_it_would_have_frozen_it(init, observed, tmp_path):
    code, out, err = init("--from-run", observed)
    assert (code, err) == (0, "")
    head = " ".join(out[: out.index("apiVersion")].replace("#", "").split())
    assert "drafted from 150 observed updates and 1 evaluations of run-" in head
    assert "This run it would have frozen at update 10" in head
    assert "(jump:loss)." in head
    assert init("--from-run", observed, "--out", tmp_path / "policy.yaml")[0] == 0
    assert (tmp_path / "policy.yaml").read_text() == out
    loaded, lints = examine(tmp_path / "policy.yaml")
    assert loaded is not None
    assert lints == []


def test_of_a_guarded_run_it_does_not_say_what_it_cannot_know(init, tmp_path):
    """An update that was withheld is not among those that were applied."""
    with LoopGuard.from_file(shipped("default"), run_dir=tmp_path / "run", runtimes=fake_runtimes("4")) as guard:
        cycle = next(guard.cycles(1))
        for update in range(30):
            cycle.decide_update(readings={"loss": 2.0 + update % 3, "grad_norm": 1.0})
    code, out, _ = init("--from-run", tmp_path / "run")
    assert code == 0
    assert "That run was guarded" in out
    assert "would not have frozen" not in out


def test_a_file_that_is_there_is_not_overwritten(init, observed, tmp_path):
    (tmp_path / "policy.yaml").write_text("mine")
    for words in (["--out", tmp_path / "policy.yaml"], ["--from-run", observed, "--out", tmp_path / "policy.yaml"]):
        code, _, err = init(*words)
        assert code == 2
        assert "is there already" in err
    assert (tmp_path / "policy.yaml").read_text() == "mine"


def test_what_is_no_run_is_a_mistake_of_usage(init, tmp_path):
    code, _, err = init("--from-run", tmp_path)
    assert code == 2
    assert "not a run directory" in err


def test_a_log_that_was_altered_is_no_ground_for_a_policy(init, observed, tmp_path):
    (segment,) = read.segments(observed)
    segment.write_bytes(segment.read_bytes().replace(b'"loss":[2.', b'"loss":[9.', 1))
    code, _, err = init("--from-run", observed, "--out", tmp_path / "policy.yaml")
    assert code == 6
    assert "does not verify" in err
    assert not (tmp_path / "policy.yaml").exists()


def test_a_log_that_breaks_off_is(init, observed):
    """A killed process leaves half a line; what stands before it is enough."""
    (segment,) = read.segments(observed)
    shutil.rmtree(segment.parent / "checkpoints")  # which the end of the process would have written
    segment.write_bytes(segment.read_bytes()[:-40])
    assert init("--from-run", observed)[0] == 0


def test_a_folder_that_is_not_there_is_said_in_a_line(init, tmp_path):
    code, _, err = init("--out", tmp_path / "no" / "policy.yaml")
    assert code == 2
    assert "No such file" in err
