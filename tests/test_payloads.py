"""What calls are given and give back: kept apart by the guard policy, shown, erased beside a loop at work, packed."""

from __future__ import annotations

import json
import shutil
import tarfile
import threading
import uuid

import pytest
from typer.testing import CliRunner

from loopguard.audit import blobs, read
from loopguard.audit.bundle import bundle
from loopguard.audit.report import render
from loopguard.audit.verify import verify
from loopguard.cli.audit import app
from loopguard.controller.station import ToolStation
from loopguard.errors import AuditWriteError, RunBusyError, UsageError
from loopguard.state import submit
from loopguard.testing import fake_runtimes
from loopguard.types import Outcome, ToolCall

SECRET = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
HOSTILE = "\x1b[31m\u202e</script>=1+1"
POLICY = """
apiVersion: loopguard/v1
name: test
tools:
  rules:
    - {id: calculator, tool: python, then: run, sandbox: offline, refuse_patterns: [import]}
  freeze_above: {refused_share: 1.0, contained_share: 1.0, of_last_calls: 20}
sandbox:
  profiles:
    offline: {image: "loopguard/python:1", cells: 2, queue: 3}
data:
  sources: [human]
updates:
  loss_kind: discrete
  monitors:
    - {kind: bounds, metric: loss}
promotion:
  panel:
    - {metric: score, good: up, min: 0, max: 1, max_gain: 0.2, max_loss: 0.1}
freeze: {when_frozen: raise}
"""


class Lab:
    def __init__(self, tmp_path):
        self.home = tmp_path
        self.run_dir = tmp_path / "run"

    def station(self, payloads="{code: keep, printed: keep}", **options):
        policy = self.home / "policy.yaml"
        policy.write_text(f"{POLICY}audit: {{payloads: {payloads}}}\n")
        return ToolStation.open(policy, run_dir=self.run_dir, runtimes=fake_runtimes(answer), **options)

    def body(self, kind):
        return [dict(entry.body) for entry in read.entries(self.run_dir, types=(kind,))]

    def log(self):
        return b"".join(path.read_bytes() for path in read.segments(self.run_dir))

    def text(self, commitment):
        return blobs.Reader(self.run_dir).text(commitment, most=1000)


def answer(call):
    out, err = f"out of {call.code}".encode(), b"some trouble" if "err" in call.code else b""
    return Outcome(
        call_id=call.id, status="ok", exit_code=0, stdout=out, stdout_bytes=len(out), stderr=err, stderr_bytes=len(err)
    )


def a_call(code="print(1)", **options):
    return ToolCall(id=uuid.uuid4().hex, tool="python", code=code, **options)


def command(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


class TestPolicy:
    def test_by_default_a_head_and_digests_stand_in_the_log_and_nothing_beside_it(self, lab):
        with lab.station("{}") as station:
            station.run(a_call(stdin=b"given"))
        (decided,), (finished,) = lab.body("tool.decided"), lab.body("tool.finished")
        assert decided["code_head"] == "print(1)"
        assert decided.keys() >= {"code_sha256", "stdin_sha256"}
        assert "stdout_sha256" in finished
        assert not (read.stream_dir(lab.run_dir) / "blobs").exists()

    def test_digest_leaves_the_head_out(self, lab):
        with lab.station("{code: digest}") as station:
            station.run(a_call())
        (decided,) = lab.body("tool.decided")
        assert "code_sha256" in decided
        assert not decided.keys() & {"code_head", "code"}

    def test_keep_puts_all_of_it_apart_and_no_digest_in_the_log(self, lab):
        """Neither the text nor anything that it could be guessed by."""
        with lab.station() as station:
            station.run(a_call("print('err')" * 100, stdin=b"given"))
        (decided,), (finished,) = lab.body("tool.decided"), lab.body("tool.finished")
        assert lab.text(decided["code"]["commitment"]) == ("print('err')" * 100)[:1000] + "..."
        assert lab.text(decided["stdin"]["commitment"]) == "given"
        assert lab.text(finished["stdout"]["commitment"]).startswith("out of print")
        assert lab.text(finished["stderr"]["commitment"]) == "some trouble"
        assert not [name for name in (*decided, *finished) if name.endswith(("_sha256", "_head"))]
        assert b"trouble" not in lab.log()
        assert verify(lab.run_dir).code == 20

    @pytest.mark.parametrize("code", ["", "\ud800 half", "\x1b[2J\0", "ż" * 5000, "import os"])
    def test_any_code_is_kept_also_of_a_call_that_is_refused(self, lab, code):
        with lab.station() as station:
            station.run(a_call(code))
        (decided,) = lab.body("tool.decided")
        path = blobs.path_of(read.stream_dir(lab.run_dir), decided["code"]["commitment"])
        assert path.read_bytes()[50:] == code.encode("utf-8", errors="surrogatepass")
        assert decided["code"]["bytes"] == len(code.encode("utf-8", errors="surrogatepass"))

    def test_empty_streams_are_not_kept(self, lab):
        with lab.station() as station:
            station.run(a_call())
        (finished,) = lab.body("tool.finished")
        assert "stderr" not in finished
        assert finished["stdout"]["bytes"] > 0

    def test_a_payload_that_cannot_be_kept_stops_the_call(self, lab, monkeypatch):
        ran = []

        def full(*_):
            raise OSError(28, "No space left on device")

        with lab.station() as station, monkeypatch.context() as patch:
            patch.setattr(blobs, "_write", full)
            patch.setattr(station._guard._tools, "finished", ran.append)
            with pytest.raises(AuditWriteError, match="cannot keep a payload"):
                station.run(a_call())
        assert ran == []
        assert lab.body("tool.decided") == []
        assert lab.body("freeze.entered")[0]["gate"] == "audit"

    def test_calls_at_once_each_keep_their_own(self, lab):
        with lab.station() as station:
            threads = [threading.Thread(target=station.run, args=(a_call(f"print({n})"),)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(lab.text(body["code"]["commitment"]) for body in lab.body("tool.decided")) == sorted(
            f"print({n})" for n in range(8)
        )


class TestSecrets:
    def test_one_across_the_cut_of_the_head_is_not_in_the_log(self, lab):
        with lab.station("{}") as station:
            station.run(a_call("#" * 190 + f"'{SECRET}'"))
        assert SECRET[:6].encode() not in lab.log()
        (decided,) = read.entries(lab.run_dir, types=("tool.decided",))
        assert decided.redacted == ("/body/code_head",)

    def test_a_command_line_with_one_is_nowhere_in_the_run_directory(self, lab):
        with lab.station("{}", command=["serve", "--api-key", "tigertiger", SECRET]):
            pass
        (started,) = lab.body("run.started")
        kept = ["serve", "--api-key", "[secret: password or key]", "[secret: github token]"]
        assert started["command"] == kept
        assert json.loads((lab.run_dir / "run.json").read_text())["command"] == kept
        assert not holding(lab.run_dir, b"tigertiger", SECRET.encode())

    @pytest.mark.parametrize("kind", ["freeze", "note", "resume"])
    def test_a_reason_with_one_is_nowhere_either(self, lab, kind):
        with lab.station("{}") as station:
            submit(lab.run_dir, kind, by="dana", reason=f"leaked {SECRET}, stop")
            station.run(a_call())
        assert not holding(lab.run_dir, SECRET.encode())
        assert lab.body(f"{kind}.requested")[0]["reason"] == "leaked [secret: github token], stop"


def holding(run_dir, *needles):
    """The files of a run directory in which one of these stands."""
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    return [path for path in files if any(needle in path.read_bytes() for needle in needles)]


class TestErase:
    def kept(self, lab, *codes):
        with lab.station() as station:
            for code in codes:
                station.run(a_call(code))
        return [body["code"]["commitment"] for body in lab.body("tool.decided")]

    def test_with_nobody_at_work_the_command_does_it(self, lab):
        first, second = self.kept(lab, "print('12 Elm Street')", "print(2)")
        command("erase", lab.run_dir, first, "--by", "dana", "--reason", "an address")
        assert lab.text(first) == "(erased)"
        assert lab.text(second) == "print(2)"
        assert verify(lab.run_dir).code == 20
        assert lab.body("blob.erased") == [{"by": "dana", "reason": "an address", "commitments": [first]}]

    def test_beside_a_loop_it_is_a_request_that_the_next_gate_takes_up(self, lab):
        """The command appends nothing: the log has one writer."""
        with lab.station() as station:
            station.run(a_call("print('12 Elm Street')"))
            (commitment,) = [body["code"]["commitment"] for body in lab.body("tool.decided")]
            words = ("erase", lab.run_dir, commitment, "--by", "dana", "--reason", "r")
            said = command(*words, "--wait", "0", code=1)
            assert "has not taken it up yet" in said
            assert lab.text(commitment).startswith("print")
            station.run(a_call())
            assert lab.text(commitment) == "(erased)"
            assert not station._guard._state.frozen
        assert "0 payloads erased, 1 were erased before" in command(*words)
        assert len(lab.body("blob.erased")) == 1

    def test_a_request_that_a_crash_left_is_not_recorded_twice(self, lab):
        (commitment,) = self.kept(lab, "print(1)")
        for _ in range(2):
            submit(lab.run_dir, "erase", by="dana", reason="r", commitments=[commitment])
        with lab.station() as station:
            station.run(a_call())
        assert len(lab.body("blob.erased")) == 1

    @pytest.mark.parametrize(
        "change", [{"by": " "}, {"reason": ""}, {"commitments": []}, {"commitments": 3}, {"commitments": ["../../x"]}]
    )
    def test_a_request_that_is_none_erases_nothing(self, lab, change):
        (commitment,) = self.kept(lab, "print(1)")
        (lab.run_dir / "requests").mkdir(exist_ok=True)
        body = {"kind": "erase", "by": "dana", "reason": "r", "freeze": None, "commitments": [commitment]} | change
        (lab.run_dir / "requests" / "1.json").write_text(json.dumps(body))
        with lab.station() as station:
            station.run(a_call())
        assert lab.text(commitment) == "print(1)"
        assert lab.body("blob.erased") == []

    def test_by_call_both_ways_go(self, lab):
        self.kept(lab, "print('err')", "print(2)")
        call = lab.body("tool.decided")[0]["call"]
        assert "3 payloads erased" in command("erase", lab.run_dir, "--call", call, "--by", "d", "--reason", "r")
        assert sum("(erased)" in line for line in command("show", lab.run_dir, "--type", "tool").splitlines()) == 2

    def test_more_than_a_request_can_hold_are_several(self, lab, monkeypatch):
        from loopguard.cli import erase

        monkeypatch.setattr(erase, "_IN_A_REQUEST", 2)
        commitments = self.kept(lab, *(f"print({n})" for n in range(5)))
        command("erase", lab.run_dir, *commitments, "--by", "dana", "--reason", "r")
        assert [len(body["commitments"]) for body in lab.body("blob.erased")] == [2, 2, 1]

    def test_of_another_rank_it_waits_for_the_end_of_that(self, lab):
        from loopguard.audit.log import AuditLog

        self.kept(lab, "print(1)")
        facts = json.loads((lab.run_dir / "run.json").read_text())
        with AuditLog.open(lab.run_dir, stream="rank-1", run_id=facts["id"], policy=facts["policy"]) as log:
            (kept,) = log.keep([b"of rank 1"])
            log.append("tool.decided", {"call": "r1", "result": "deny", "code": kept})
            with pytest.raises(RunBusyError):
                command("erase", lab.run_dir, kept["commitment"], "--by", "dana", "--reason", "r")
        command("erase", lab.run_dir, kept["commitment"], "--by", "dana", "--reason", "r")
        assert blobs.Reader(lab.run_dir, "rank-1").text(kept["commitment"], most=9) == "(erased)"

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([], "say what to erase: COMMITMENT..., --call ID or --all-of-cycle N"),
            (["0" * 64], "no record names the payload 0000"),
            (["--call", "nobody"], "no payload of a call nobody"),
            (["--all-of-cycle", "9"], "no payload of cycle 9"),
        ],
    )
    def test_what_is_not_there_is_a_usage_error(self, lab, words, said):
        self.kept(lab, "print(1)")
        with pytest.raises(UsageError, match=said):
            command("erase", lab.run_dir, *words, "--by", "dana", "--reason", "r")
        with pytest.raises(UsageError, match="--reason is empty"):
            command("erase", lab.run_dir, *words, "--by", "dana", "--reason", " ")

    def test_a_report_that_may_quote_it_is_named(self, lab):
        (commitment,) = self.kept(lab, "import secret_of_dana")
        command("report", lab.run_dir)
        assert "secret_of_dana" in (lab.run_dir / "report.html").read_text()
        said = command("erase", lab.run_dir, commitment, "--by", "dana", "--reason", "r")
        assert "report.html may still quote them: write it anew" in said
        command("report", lab.run_dir)
        page = (lab.run_dir / "report.html").read_text()
        assert "secret_of_dana" not in page
        assert "(erased)" in page


class TestShown:
    def test_no_payload_moves_a_cursor_or_is_a_formula(self, lab):
        with lab.station() as station:
            station.run(a_call(f"import {HOSTILE}"))
        text = command("show", lab.run_dir)
        assert "\\u001b[31m\\u202e" in text
        assert text.replace("\n", "").isprintable()
        page = render(lab.run_dir)
        assert "import" in page
        assert "</script>=" not in page

    def test_show_as_json_is_still_the_log_byte_for_byte(self, lab):
        with lab.station() as station:
            station.run(a_call())
        assert command("show", lab.run_dir, "--json").encode() == lab.log()

    def test_a_report_quotes_no_secret_that_lies_apart(self, lab):
        with lab.station() as station:
            station.run(a_call(f"import x; k = '{SECRET}'"))
        assert SECRET not in render(lab.run_dir)
        assert "[secret: github token]" in render(lab.run_dir)


class TestBundle:
    def packed(self, lab, **options):
        with lab.station() as station:
            station.run(a_call("import secret_of_dana"))
            station.run(a_call())
        out = lab.home / "out.tar.gz"
        made = bundle(lab.run_dir, out=out, **options)
        with tarfile.open(out) as tar:
            tar.extractall(lab.home / "unpacked", filter="data")
        return made, lab.home / "unpacked" / "loopguard-bundle"

    def test_has_the_payloads_and_verifies(self, lab):
        made, home = self.packed(lab)
        assert made.payloads == 3
        assert verify(home / "run").code == 20
        assert blobs.Reader(home / "run").text(lab.body("tool.decided")[0]["code"]["commitment"], most=30) == (
            "import secret_of_dana"
        )

    def test_has_none_that_is_erased_and_that_a_crash_left(self, lab, monkeypatch):
        """Nor does its report quote one: whoever unpacks it is not the next start."""
        with lab.station() as station:
            station.run(a_call("import secret_of_dana"))
            station.run(a_call())
        with monkeypatch.context() as patch:
            patch.setattr(blobs, "delete", lambda *_: None)
            commitment = lab.body("tool.decided")[0]["code"]["commitment"]
            command("erase", lab.run_dir, commitment, "--by", "dana", "--reason", "r", code=1)
        out = lab.home / "out.tar.gz"
        made = bundle(lab.run_dir, out=out)
        assert made.payloads == 2
        with tarfile.open(out) as tar:
            tar.extractall(lab.home / "unpacked", filter="data")
        assert holding(lab.run_dir, b"secret_of_dana")
        assert not holding(lab.home / "unpacked", b"secret_of_dana")
        assert verify(lab.home / "unpacked" / "loopguard-bundle" / "run").code == 20

    def test_without_them_quotes_none_and_says_how_to_check_it(self, lab):
        made, home = self.packed(lab, without_payloads=True)
        assert made.payloads == 0
        assert not holding(home, b"secret_of_dana")
        (line,) = [line for line in (home / "README.txt").read_text().splitlines() if line.startswith("    python3 ")]
        assert line.endswith(" --without-payloads")
        assert verify(home / "run").code == 42
        assert verify(home / "run", without_payloads=True).code == made.verification.code == 20

    def test_a_link_among_them_is_refused(self, lab):
        self.packed(lab)
        path = blobs.paths(read.stream_dir(lab.run_dir))[0]
        shutil.move(path, lab.home / "elsewhere")
        path.symlink_to(lab.home / "elsewhere")
        with pytest.raises(UsageError, match="is a link: evidence lies in the run directory itself"):
            bundle(lab.run_dir, out=lab.home / "again.tar.gz")
