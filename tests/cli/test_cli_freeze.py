"""status, freeze, resume: from another terminal, light and at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.cli.__main__ import main
from loopguard.cli.app import _main
from loopguard.state import FreezeState


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"id": "run-1", "policy": "0" * 64}))
    AuditLog.open(path, run_id="run-1", policy="0" * 64).close()
    return path


def loopguard(*words):
    return _main([str(word) for word in words])


def test_status_of_a_run_that_is_not_frozen_is_0(run_dir, capsys):
    assert loopguard("status", run_dir) == 0
    assert "state     stopped" in capsys.readouterr().out


def test_a_freeze_without_a_living_loop_is_recorded_at_once(run_dir, capsys):
    assert loopguard("freeze", run_dir, "--by", "dana", "--reason", "looks wrong") == 0
    assert loopguard("status", run_dir) == 4
    assert "dana asked for it: looks wrong" in capsys.readouterr().out
    assert [e.body["by"] for e in read.entries(run_dir, types=["freeze.requested"])] == ["dana"]


def test_resume_names_who_and_why_in_the_log_and_is_refused_where_nothing_is_frozen(run_dir, capsys):
    assert loopguard("resume", run_dir, "--by", "dana", "--reason", "x") == 1
    loopguard("freeze", run_dir, "--by", "dana", "--reason", "looks wrong")
    assert loopguard("resume", run_dir, "--by", "eli", "--reason", "false alarm") == 0
    assert loopguard("status", run_dir) == 0
    (entry,) = read.entries(run_dir, types=["resume.applied"])
    assert (entry.body["by"], entry.body["reason"], entry.actor["id"]) == ("eli", "false alarm", "eli")


def test_freezing_twice_says_that_it_is_frozen_already(run_dir, capsys):
    loopguard("freeze", run_dir, "--by", "dana", "--reason", "a")
    assert loopguard("freeze", run_dir, "--by", "eli", "--reason", "b") == 0
    assert "frozen already (f1)" in capsys.readouterr().out


def test_a_living_loop_that_comes_to_no_gate_leaves_it_latched_and_says_so(run_dir, capsys):
    log = AuditLog.open(run_dir, run_id="run-1", policy="0" * 64)
    try:
        assert loopguard("freeze", run_dir, "--by", "dana", "--reason", "a", "--wait", "0.2") == 1
        assert "latched, not yet acknowledged" in capsys.readouterr().err
        assert (run_dir / "latch").exists()
        FreezeState(run_dir, log)
        assert loopguard("status", run_dir, "--json") == 4
        assert json.loads(capsys.readouterr().out)["acknowledged"] is True
    finally:
        log.close()


@pytest.mark.parametrize("option", ["--by", "--reason"])
def test_a_resume_needs_words(run_dir, capsys, option):
    loopguard("freeze", run_dir, "--by", "dana", "--reason", "a")
    words = {"--by": "dana", "--reason": "why"} | {option: "  "}
    assert loopguard("resume", run_dir, *(part for pair in words.items() for part in pair)) == 2
    assert f"{option} is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["status", "DIR"], ["freeze", "DIR", "--by", "d", "--reason", "r"], ["audit", "why", "DIR"]]
)
def test_a_directory_that_is_no_run_is_one_line_and_2(tmp_path, capsys, words):
    assert loopguard(*(tmp_path if word == "DIR" else word for word in words)) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_log_that_was_edited_cannot_be_resumed(run_dir, capsys):
    loopguard("freeze", run_dir, "--by", "dana", "--reason", "looks wrong")
    (segment,) = (run_dir / "audit" / "controller").glob("seg-*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b"looks wrong", b"looks right"))
    assert loopguard("resume", run_dir, "--by", "eli", "--reason", "x") == 6
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [["status", "DIR"], ["status", "--json", "DIR"], ["status", "DIR", "--json"]])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_plain_status_is_what_the_whole_command_line_says(run_dir, capfd, monkeypatch, words, frozen):
    """`__main__` answers it without the command line, which takes longer to load than the answer."""
    if frozen:
        loopguard("freeze", run_dir, "--by", "dana", "--reason", "looks wrong")
        capfd.readouterr()
    words = [str(run_dir) if word == "DIR" else word for word in words]
    code, said = loopguard(*words), capfd.readouterr()
    monkeypatch.setattr("sys.argv", ["loopguard", *words])
    monkeypatch.setattr("loopguard.cli.app.main", lambda _: pytest.fail("the whole command line was asked"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capfd.readouterr()) == (code, said)
    assert code == (4 if frozen else 0)


def test_a_plain_status_of_no_run_is_one_line_and_2(tmp_path):
    done = subprocess.run([sys.executable, "-m", "loopguard.cli", "status", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "is not a run directory" in done.stderr


@pytest.mark.parametrize(
    "words", [["status"], ["status", "--help"], ["status", "a", "b"], ["status", "--jsno", "a"], ["statsu", "a"], []]
)
def test_every_other_word_takes_the_whole_command_line(monkeypatch, words):
    asked = []
    monkeypatch.setattr("sys.argv", ["loopguard", *words])
    monkeypatch.setattr("loopguard.cli.app.main", asked.append)
    main()
    assert asked == [words]


def test_a_plain_status_loads_no_pydantic(run_dir):
    code = (
        "import sys, contextlib\nfrom loopguard.cli.__main__ import main\n"
        f"sys.argv = ['loopguard', 'status', {str(run_dir)!r}]\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "print([m for m in ('pydantic', 'cryptography', 'rich', 'loopguard.cli.app') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_they_load_nothing_that_a_training_loop_needs(run_dir):
    code = (
        "import sys\nfrom loopguard.cli.app import _main\n"
        f"_main(['status', {str(run_dir)!r}])\n"
        "print([m for m in ('torch', 'transformers', 'docker', 'numpy', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [["statsu"], ["status"], ["resume", "x"], ["run", "toolformer", "--cycles", "many"]])
def test_wrong_words_are_2_and_no_traceback(capsys, words):
    assert loopguard(*words) == 2
    assert "Traceback" not in capsys.readouterr().err
