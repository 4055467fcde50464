"""The service over real sockets: what clients of SandboxFusion get to see, and who gets in."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import logging
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the service needs uvicorn")
pytest.importorskip("starlette", reason="the service needs starlette")

from loopguard import service as services
from loopguard.audit import read
from loopguard.controller.station import ToolStation
from loopguard.errors import (
    AuditWriteError,
    CallError,
    SandboxBusyError,
    SandboxUnavailableError,
    UsageError,
)
from loopguard.service import Service, answer
from loopguard.state import set_latch
from loopguard.testing import FakeRuntime
from loopguard.types import Outcome

POLICY = """
apiVersion: loopguard/v1
name: test
tools:
  rules:
    - {id: python, tool: python, then: run, sandbox: offline, refuse_patterns: [forbidden]}
    - {id: shell, tool: sh, then: run, sandbox: offline}
sandbox:
  profiles:
    offline: {image: "loopguard/python:1"}
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
HELLO = {"code": "print('hello')", "language": "python"}
TOKEN = "a-token-of-some-length"
JSON = {"Content-Type": "application/json"}


class Answer:
    """Status, headers and parsed body."""

    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        body = response.read()
        self.json = json.loads(body) if body else None


class Lab:
    """A service on a loopback port in a thread, over a station whose cells answer what `respond` says."""

    def __init__(self, tmp_path):
        self.run_dir = tmp_path / "run"
        self.policy = tmp_path / "policy.yaml"
        self.policy.write_text(POLICY)
        self.calls = []
        self.killed = threading.Event()
        self.free = threading.Event()
        self.respond = lambda call: "hello\n"
        self.token = None
        self.grace_s = 3.0

    def hang(self, call):
        """An answer that comes when it is let free, or when it is killed."""
        while not self.free.wait(0.01):
            if self.killed.is_set():
                return SandboxUnavailableError("killed")
        return "done"

    def _runtime(self, *_):
        lab = self

        class Runtime(FakeRuntime):
            def kill(self, call_id, why):
                lab.killed.set()
                return True

        def respond(call):
            self.calls.append(call)
            return self.respond(call)

        return Runtime(respond)

    @contextmanager
    def serving(self):
        with (
            ToolStation.open(self.policy, run_dir=self.run_dir, runtimes=self._runtime) as self.station,
            socket.create_server(("127.0.0.1", 0)) as listener,
        ):
            self.port = listener.getsockname()[1]
            self.service = Service(self.station, token=self.token, grace_s=self.grace_s)
            ready = threading.Event()

            async def main():
                self.loop = asyncio.get_running_loop()
                await self.service.serve(listener, on_ready=ready.set)

            self.thread = threading.Thread(target=asyncio.run, args=(main(),))
            self.thread.start()
            try:
                assert ready.wait(10)
                yield self
            finally:
                self.stop(at_once=True)
                self.thread.join(20)
                assert not self.thread.is_alive()

    def stop(self, *, at_once=False):
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(lambda: self.service.stop(at_once=at_once))

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(self, method, path, body=None, headers=None):
        connection = self.connection()
        try:
            connection.request(method, path, body, headers or {})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def run(self, body=None, *, headers=JSON, **fields):
        body = HELLO | fields if body is None else body
        return self.ask("POST", "/run_code", json.dumps(body) if isinstance(body, dict) else body, headers)

    @contextmanager
    def asking(self, **fields):
        """A call that has reached its cell; at the end, its answer."""
        answers = []
        thread = threading.Thread(target=lambda: answers.append(self.run(**fields)))
        thread.start()
        try:
            until(lambda: self.calls)
            yield answers
        finally:
            thread.join(20)

    def entries(self, *types):
        return list(read.entries(self.run_dir, types=types))


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


@pytest.fixture
def served(lab):
    with lab.serving():
        yield lab


def outcome(call, status="ok", **fields):
    fields = {"exit_code": 0 if status == "ok" else None, "stdout": b"out\n", "wall_ms": 12.5} | fields
    fields = {"stdout_bytes": len(fields["stdout"]), "stderr_bytes": len(fields.get("stderr", b""))} | fields
    return Outcome(call_id=call.id, status=status, **fields)


def result(**fields):
    return {"status": "Finished", "execution_time": 0.0125, "return_code": 0, "stdout": "out\n", "stderr": ""} | fields


def whole(status, run_result, *, message="", files=None):
    return {
        "status": status,
        "message": message,
        "compile_result": None,
        "run_result": run_result,
        "executor_pod_name": None,
        "files": files or {},
    }


KILLED = -9
CUT = "sandbox: of 99 bytes of standard output, the first and the last are here, 4 in all\n"
ENDED = "sandbox: the call was ended: "


class TestTheAnswer:
    @pytest.mark.parametrize(
        ("fields", "status", "expected"),
        [
            ({"status": "ok"}, "Success", {}),
            ({"status": "nonzero_exit", "exit_code": 3, "stderr": b"no"}, "Failed", {"return_code": 3, "stderr": "no"}),
            ({"status": "signal", "signal": 11}, "Failed", {"return_code": -11}),
            ({"status": "timeout"}, "Failed", {"status": "TimeLimitExceeded", "return_code": None}),
            (
                {"status": "oom", "signal": 9, "stderr": b"so far"},
                "Failed",
                {"return_code": KILLED, "stderr": f"so far\n{ENDED}it ran out of memory\n"},
            ),
            (
                {"status": "oom", "exit_code": 0},
                "Failed",
                {"return_code": KILLED, "stderr": f"{ENDED}it ran out of memory\n"},
            ),
            (
                {"status": "pids_limit", "exit_code": 1},
                "Failed",
                {"return_code": 1, "stderr": f"{ENDED}it reached the limit of processes\n"},
            ),
            (
                {"status": "output_limit"},
                "Failed",
                {"return_code": KILLED, "stderr": f"{ENDED}it wrote more than it may\n"},
            ),
            (
                {"status": "disk_limit", "exit_code": 2},
                "Failed",
                {"return_code": 2, "stderr": f"{ENDED}it filled its disk\n"},
            ),
            (
                {"status": "ok", "stdout_bytes": 99, "stderr": b"\xff\n"},
                "Success",
                {"stderr": f"\ufffd\n{CUT}"},
            ),
        ],
        ids=lambda value: value["status"] if isinstance(value, dict) and "status" in value else "",
    )
    def test_of_each_outcome_is_the_protocols(self, served, fields, status, expected):
        """HTTP 200, text in both streams, and never a zero for what did not go well."""
        served.respond = lambda call: outcome(call, **fields)
        answered = served.run()
        assert answered.status == 200
        assert answered.json == whole(status, result(**expected))

    def test_of_a_refused_call_is_a_program_that_failed_and_names_no_rule(self, served):
        """Clients send a SandboxError again; a refusal they must not."""
        answered = served.run(code="forbidden")
        assert answered.json["run_result"].pop("execution_time") == 0
        refused = {"status": "Finished", "return_code": 126, "stdout": "", "stderr": "This call is not permitted.\n"}
        assert answered.json == whole("Failed", refused)
        assert served.calls == []

    def test_of_a_broken_sandbox_is_a_sandbox_error_with_the_reason(self, served):
        served.respond = lambda call: SandboxUnavailableError("the cell died")
        error = {
            "status": "Error",
            "execution_time": None,
            "return_code": None,
            "stdout": "",
            "stderr": "the cell died",
        }
        answered = served.run()
        assert answered.status == 200
        assert answered.json == whole("SandboxError", error, message="the cell died")

    def test_of_a_log_that_cannot_be_written_names_no_path(self, served):
        served.respond = lambda call: AuditWriteError("/secret/runs: disk full")
        answered = served.run()
        assert answered.json["status"] == "SandboxError"
        assert "/secret" not in json.dumps(answered.json)

    def test_names_the_call_of_the_audit_log(self, served):
        call_id = served.run().headers["X-LoopGuard-Call"]
        assert [entry.body["call"] for entry in served.entries("tool.decided", "tool.finished")] == [call_id, call_id]

    def test_every_status_that_an_outcome_can_have_is_mapped(self):
        """A status that is added later fails here, and until then is no success."""
        from typing import get_args

        from loopguard.types import OutcomeStatus

        for status in get_args(OutcomeStatus):
            told = answer(Outcome(call_id="c", status=status, exit_code=0, refusal="no"))
            assert (told["status"] == "Success") == (status == "ok")
            assert told["run_result"]["return_code"] != 0 or status == "ok"


class TestTheRequest:
    def test_reaches_the_cell_whole(self, served):
        served.run(
            run_timeout=2,
            compile_timeout=0,
            memory_limit_MB=128,
            stdin="żółw",
            files={"./in/a.bin": base64.b64encode(bytes(range(256))).decode(), "skipped": None},
            fetch_files=["out.txt", "./out.txt"],
            args=[],
            something_of_a_later_version=1,
        )
        (call,) = served.calls
        assert (call.tool, call.code, call.stdin) == ("python", HELLO["code"], "żółw".encode())
        assert (call.wall_s, call.memory_mib) == (2.0, 128)
        assert (call.files, call.fetch) == ({"in/a.bin": bytes(range(256))}, ("out.txt",))

    def test_has_the_protocols_defaults(self, served):
        served.run(language="bash")
        (call,) = served.calls
        assert call.tool == "sh"
        assert (call.stdin, call.wall_s, call.memory_mib, call.files, call.fetch) == (b"", 10.0, None, {}, ())

    def test_gets_its_files_back_under_the_names_that_it_wrote(self, served):
        files = {"out.txt": b"1", "plots/a.png": b"\xff", "b\udcff": b"2"}
        served.respond = lambda call: outcome(call, files=files, not_fetched={"big": "too large"})
        answered = served.run(fetch_files=["./out.txt", "plots", "big", "absent"]).json
        encoded = {"./out.txt": "MQ==", "plots/a.png": "/w==", "b?": "Mg=="}
        assert answered == whole("Success", result(), files=encoded) | {"not_fetched": {"big": "too large"}}

    @pytest.mark.parametrize(
        ("fields", "loc", "kind"),
        [
            ({"language": "cobol"}, ["body", "language"], "literal_error"),
            ({"language": "cpp"}, ["body", "language"], "literal_error"),
            ({"code": 1}, ["body", "code"], "string_type"),
            ({"run_timeout": 0}, ["body", "run_timeout"], "greater_than"),
            ({"run_timeout": -1}, ["body", "run_timeout"], "greater_than"),
            ({"run_timeout": 1e9}, ["body", "run_timeout"], "less_than_equal"),
            ({"run_timeout": float("nan")}, ["body", "run_timeout"], "finite_number"),
            ({"run_timeout": "10"}, ["body", "run_timeout"], "float_type"),
            ({"compile_timeout": -1}, ["body", "compile_timeout"], "greater_than_equal"),
            ({"memory_limit_MB": -2}, ["body", "memory_limit_MB"], "greater_than_equal"),
            ({"memory_limit_MB": 1 << 70}, ["body", "memory_limit_MB"], "less_than_equal"),
            ({"memory_limit_MB": True}, ["body", "memory_limit_MB"], "int_type"),
            ({"stdin": 1}, ["body", "stdin"], "string_type"),
            ({"files": {"a": "§"}}, ["body", "files", "a"], "value_error"),
            ({"files": {"a": "YQ"}}, ["body", "files", "a"], "value_error"),
            ({"files": {"a": "", "./a": ""}}, ["body"], "value_error"),
            ({"files": []}, ["body", "files"], "dict_type"),
            ({"fetch_files": "a"}, ["body", "fetch_files"], "list_type"),
            ({"args": ["-x"]}, ["body", "args"], "value_error"),
        ],
    )
    def test_that_cannot_be_is_422_in_the_shape_of_fastapi(self, served, fields, loc, kind):
        answered = served.run(**fields)
        assert answered.status == 422
        (problem,) = answered.json["detail"]
        assert problem.keys() == {"loc", "msg", "type"}
        assert (problem["loc"], problem["type"]) == (loc, kind)
        assert served.calls == []

    @pytest.mark.parametrize(
        "body", ["", "{", "[]", '"code"', "[" * 100_000, '{"code": "\\ud800", "language": "python"}']
    )
    def test_that_is_no_json_object_is_422(self, served, body):
        answered = served.run(body)
        assert answered.status == 422
        assert answered.json["detail"][0]["loc"][0] == "body"

    def test_without_the_required_fields_names_each(self, served):
        assert [problem["loc"] for problem in served.run({"stdin": "x"}).json["detail"]] == [
            ["body", "code"],
            ["body", "language"],
        ]

    def test_an_unknown_language_is_told_which_there_are(self, served):
        (problem,) = served.run(language="rust").json["detail"]
        assert problem["msg"] == "Input should be 'python' or 'bash'"

    def test_that_no_cell_takes_is_422_with_the_reason(self, served):
        served.respond = lambda call: CallError("files: '../x' leads elsewhere")
        answered = served.run(files={"../x": ""})
        assert answered.status == 422
        assert answered.json == {
            "detail": [{"loc": ["body"], "msg": "files: '../x' leads elsewhere", "type": "call_error"}]
        }

    def test_that_is_not_said_to_be_json_is_415(self, served):
        """A web page may send text without asking first, JSON it may not."""
        assert served.run(headers={"Content-Type": "text/plain"}).status == 415
        assert served.run(headers={}).status == 415
        assert served.run(headers={"Content-Type": "Application/JSON; charset=utf-8"}).status == 200

    @pytest.mark.parametrize("chunked", [False, True])
    def test_that_is_too_large_is_413(self, served, monkeypatch, chunked):
        monkeypatch.setattr(services, "_BODY_MIB", 1)
        body = json.dumps(HELLO | {"stdin": "x" * (9 << 20)}).encode()
        answered = served.run((body[at : at + 9999] for at in range(0, len(body), 9999)) if chunked else body)
        assert answered.status == 413
        assert served.calls == []
        assert served.service._held == 0

    def test_that_never_arrives_is_408_and_holds_nobody_up(self, served, monkeypatch):
        monkeypatch.setattr(services, "_UPLOAD_S", 0.3)
        slow = served.connection()
        slow.putrequest("POST", "/run_code")
        slow.putheader("Content-Type", "application/json")
        slow.putheader("Content-Length", "100")
        slow.endheaders(b"{")
        assert served.run().status == 200
        assert Answer(slow.getresponse()).status == 408
        slow.close()

    def test_many_use_one_connection(self, served):
        connection = served.connection()
        for _ in range(3):
            connection.request("POST", "/run_code", json.dumps(HELLO), JSON)
            assert Answer(connection.getresponse()).json["status"] == "Success"
        connection.close()


class TestTheDoor:
    def test_lets_nobody_in_without_the_token(self, lab):
        lab.token = TOKEN
        basic = base64.b64encode(f"any:{TOKEN}".encode()).decode()
        with lab.serving():
            for given in (None, "Bearer wrong", f"Bearer {TOKEN}x", TOKEN, "Basic ???", "Basic", f"Digest {TOKEN}"):
                headers = JSON | ({"Authorization": given} if given else {})
                for path in ("/run_code", "/v1/ping", "/nothing"):
                    answered = lab.ask("POST", path, json.dumps(HELLO), headers)
                    assert answered.status == 401
                    assert answered.headers["WWW-Authenticate"].startswith("Bearer")
            for given in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {basic}"):
                assert lab.run(headers=JSON | {"Authorization": given}).status == 200
            assert len(lab.calls) == 3
            assert lab.run(stdin="x" * (5 << 20)).status == 401
            assert lab.ask("GET", "/healthz").status == 200

    def test_is_shut_to_web_pages(self, served):
        """Loopback is no wall against a browser on the same machine."""
        assert served.run(headers=JSON | {"Origin": "http://127.0.0.1"}).status == 403
        assert served.ask("OPTIONS", "/run_code").status == 405
        assert served.calls == []

    def test_has_few_routes(self, served):
        assert served.ask("GET", "/v1/ping").json == "pong"
        assert served.ask("GET", "/healthz").json == {"status": "serving"}
        assert served.ask("GET", "/run_code").status == 405
        for path in ("/", "/docs", "/openapi.json", "/run_code/", "/metrics"):
            answered = served.ask("GET", path)
            assert (answered.status, answered.json) == (404, {"detail": "Not Found"})
        jupyter = served.ask("POST", "/run_jupyter", json.dumps({"cells": ["1"]}), JSON)
        assert jupyter.status == 404
        assert "/run_code" in jupyter.json["detail"]

    def test_does_not_say_what_is_behind_it(self, served):
        assert "Server" not in served.ask("GET", "/v1/ping").headers


class TestABusyService:
    def test_says_504_at_once_where_the_queue_is_full(self, served):
        """The one status after which veRL asks again."""
        served.respond = lambda call: SandboxBusyError("no cell")
        answered = served.run()
        assert (answered.status, answered.headers["Retry-After"]) == (504, "1")

    def test_says_504_before_the_client_stops_listening_and_ends_the_call(self, served, monkeypatch):
        monkeypatch.setattr(services, "_SLACK_S", 0.1)
        served.respond = served.hang
        assert served.run(run_timeout=0.1, compile_timeout=0).status == 504
        assert served.killed.is_set()
        assert [entry.body["reason"] for entry in served.entries("tool.lost")] == ["killed"]

    def test_says_504_where_large_requests_pile_up(self, served, monkeypatch):
        monkeypatch.setattr(services, "_HELD_MIB", 1)
        served.respond = served.hang
        large = {"stdin": "x" * 700_000}
        with served.asking(**large) as answers:
            assert served.run(**large).status == 504
            served.free.set()
        assert answers[0].status == 200
        assert served.service._held == 0


class TestTrouble:
    def test_inside_is_500_with_one_sentence_and_one_traceback_in_the_log(self, served, caplog):
        served.respond = lambda call: RuntimeError("secret detail")
        with caplog.at_level(logging.ERROR):
            answered = served.run()
            until(lambda: caplog.records)
        assert (answered.status, answered.json) == (500, {"detail": "internal error"})
        (record,) = caplog.records
        assert "secret detail" in str(record.exc_info[1])
        assert served.run().status == 500

    def test_a_client_that_goes_away_takes_its_call_with_it(self, served):
        served.respond = served.hang
        leaving = served.connection()
        leaving.request("POST", "/run_code", json.dumps(HELLO), JSON)
        until(lambda: served.calls)
        leaving.close()
        until(lambda: served.entries("tool.lost"))
        assert served.killed.is_set()

    def test_a_frozen_run_directory_refuses_every_call_and_says_so(self, lab):
        with lab.serving():
            assert lab.run().json["status"] == "Success"
            set_latch(lab.run_dir, freeze="requested", reason="dana asked for it")
            assert lab.run().json["run_result"]["return_code"] == 126
            health = lab.ask("GET", "/healthz")
            assert (health.status, health.json) == (503, {"status": "frozen"})
            assert lab.ask("GET", "/v1/ping").status == 200
        assert len(lab.calls) == 1

    def test_a_log_that_cannot_be_written_shows_in_its_health(self, served, monkeypatch):
        def frozen(_station):
            raise AuditWriteError("disk full")

        monkeypatch.setattr(ToolStation, "frozen", property(frozen))
        health = served.ask("GET", "/healthz")
        assert (health.status, health.json) == (503, {"status": "failing"})


class TestGoingDown:
    def test_waits_for_calls_that_end_within_the_grace(self, lab):
        lab.respond = lab.hang
        with lab.serving(), lab.asking() as answers:
            lab.stop()
            until(lambda: lab.service.closing)
            lab.free.set()
        assert answers[0].json["run_result"]["stdout"] == "done"
        assert not lab.killed.is_set()

    def test_ends_the_rest_with_an_answer(self, lab):
        lab.grace_s = 0.2
        lab.respond = lab.hang
        with lab.serving(), lab.asking() as answers:
            lab.stop()
        assert lab.killed.is_set()
        assert answers[0].json["status"] == "SandboxError"
        assert "going down" in answers[0].json["message"]

    def test_takes_no_new_calls(self, lab):
        with lab.serving():
            lab.service.closing = True
            assert lab.run().status == 503
            assert lab.ask("GET", "/healthz").json == {"status": "closing"}
        assert lab.calls == []


def test_the_page_about_it_names_every_field_and_status():
    """What a client can send or get is written down."""
    page = (Path(__file__).parent.parent / "docs" / "serve.md").read_text()
    fields = [field.alias or name for name, field in services.RunCode.model_fields.items()]
    answered = services.fault("")
    told = [*fields, *answered, *answered["run_result"], "not_fetched", "frozen", "failing", "closing"]
    assert [name for name in told if f"`{name}" not in page and f"`run_result.{name}" not in page] == []


def test_without_the_serve_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "loopguard.service")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UsageError, match=r"pip install 'loopguard\[serve\]'"):
        import loopguard.service  # noqa: F401


def until(holds, *, within_s=5.0):
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
