"""`loopguard serve` as a person meets it: wrong words, one line when it is ready, and how it ends."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the service needs uvicorn")

from loopguard.audit import read
from loopguard.cli.app import _main
from loopguard.state import standing

DEFAULT = Path(__file__).parent.parent.parent / "policies" / "default.yaml"
TOKEN = "a-token-of-some-length"

# The same command with cells that answer by themselves, so that it can be watched without an engine.
WITHOUT_CELLS = """
import functools, sys, time
from loopguard.cli.app import main
from loopguard.controller.station import ToolStation
from loopguard.testing import fake_runtimes

def respond(call):
    time.sleep(float(call.stdin or 0))
    return "done"

ToolStation.open = functools.partial(ToolStation.open, runtimes=fake_runtimes(respond))
main()
"""


def loopguard(*words):
    return _main(["serve", *map(str, words)])


def one_line(text):
    """What was said, where it was one line and no traceback."""
    (line,) = text.strip().splitlines()
    return line


class TestWrongWords:
    """One clear line, the exit code of the table, and nothing half-written."""

    @pytest.fixture
    def serve_here(self, tmp_path, capsys, monkeypatch):
        monkeypatch.delenv("LOOPGUARD_TOKEN", raising=False)

        def serve_here(*words, policy=DEFAULT):
            code = loopguard("--policy", policy, "--run-dir", tmp_path / "run", "--port", 0, *words)
            assert not (tmp_path / "run").exists()
            return code, one_line(capsys.readouterr().err)

        return serve_here

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
    def test_another_host_needs_a_token(self, serve_here, host):
        code, said = serve_here("--host", host)
        assert code == 2
        assert "needs a token" in said
        assert "LOOPGUARD_TOKEN" in said

    def test_two_tokens(self, serve_here, tmp_path):
        assert serve_here("--token", TOKEN, "--token-file", tmp_path / "t")[0] == 2

    @pytest.mark.parametrize("text", ["", "short", "with spaces in the midst", "żółw" * 8])
    def test_a_file_with_no_token_in_it_is_never_no_token(self, serve_here, tmp_path, text):
        (tmp_path / "token").write_text(text)
        code, said = serve_here("--token-file", tmp_path / "token")
        assert code == 2
        assert "token" in said

    def test_a_token_file_that_is_not_there(self, serve_here, tmp_path):
        code, said = serve_here("--token-file", tmp_path / "nowhere")
        assert code == 2
        assert "nowhere" in said

    def test_an_empty_variable(self, serve_here, monkeypatch):
        monkeypatch.setenv("LOOPGUARD_TOKEN", "")
        assert serve_here()[0] == 2

    def test_a_port_in_use(self, serve_here):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            code, said = serve_here("--port", port)
        assert code == 2
        assert f"port {port}: address already in use" in said

    def test_a_host_that_nobody_has(self, serve_here, tmp_path):
        (tmp_path / "token").write_text(TOKEN)
        code, said = serve_here("--host", "192.0.2.1", "--token-file", tmp_path / "token")
        assert code == 2
        assert "192.0.2.1" in said

    def test_a_policy_without_tools_would_serve_nothing(self, serve_here):
        code, said = serve_here(policy=DEFAULT.with_name("supervised.yaml"))
        assert code == 2
        assert "supervised.yaml lets no tool run, so every call would be refused: add tools and sandbox to it" in said

    def test_a_policy_with_a_mistake(self, serve_here, tmp_path):
        (tmp_path / "policy.yaml").write_text(DEFAULT.read_text().replace("default: deny", "default: dney"))
        code, said = serve_here(policy=tmp_path / "policy.yaml")
        assert code == 3
        assert said.startswith(f"{tmp_path}/policy.yaml:")

    def test_no_engine(self, serve_here, monkeypatch):
        monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
        code, said = serve_here()
        assert code == 5
        assert "unix:///nowhere/docker.sock" in said


class Served:
    """A running command."""

    def __init__(self, process, line):
        self.process = process
        self.line = line
        host, _, port = line.removeprefix("serving on http://").strip().rpartition(":")
        self.address = (host, int(port))

    def ask(self, method="GET", path="/v1/ping", body=None, token=None):
        connection = self.send(method, path, body, token)
        response = connection.getresponse()
        try:
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def send(self, method, path, body, token=None):
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection

    def run(self, code, language="python", **fields):
        status, body = self.ask("POST", "/run_code", {"code": code, "language": language, **fields})
        assert status == 200, body
        return body

    def end(self, *signals):
        """Exit code and what was said on either stream, after the address."""
        for number in signals:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@contextmanager
def serving(tmp_path, *words, program=("-c", WITHOUT_CELLS), env=None):
    process = subprocess.Popen(
        [sys.executable, *program, "serve", "--policy", DEFAULT, "--run-dir", tmp_path / "run", "--port", "0", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
        # Under a script that runs in the background an interrupt is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving on http://"), process.communicate(timeout=10)[1]
        yield Served(process, line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def wait_for_call(run_dir):
    deadline = time.monotonic() + 10
    while not any(read.entries(run_dir, types=["tool.decided"])):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestARunningService:
    def test_prints_its_address_and_ends_with_0_after_sigterm(self, tmp_path):
        with serving(tmp_path) as served:
            assert served.ask() == (200, "pong")
            assert served.end(signal.SIGTERM) == (0, "", "")
        assert not standing(tmp_path / "run").owner_pid

    def test_ctrl_c_is_130(self, tmp_path):
        with serving(tmp_path) as served:
            code, out, err = served.end(signal.SIGINT)
        assert (code, out) == (130, "")
        assert "interrupted" in one_line(err)
        assert any(read.entries(tmp_path / "run", types=["run.interrupted"]))

    def test_another_policy_on_the_same_directory_is_3(self, tmp_path, capsys):
        with serving(tmp_path) as served:
            served.end(signal.SIGTERM)
        other = tmp_path / "policy.yaml"
        other.write_text(DEFAULT.read_text().replace("max_code_bytes: 4096", "max_code_bytes: 2048"))
        assert loopguard("--policy", other, "--run-dir", tmp_path / "run", "--port", 0) == 3
        assert "take another --run-dir" in one_line(capsys.readouterr().err)

    def test_lets_a_call_end_that_runs_when_sigterm_comes(self, tmp_path):
        with serving(tmp_path) as served:
            asking = served.send("POST", "/run_code", {"code": "", "language": "python", "stdin": "0.7"})
            wait_for_call(tmp_path / "run")
            served.process.send_signal(signal.SIGTERM)
            assert json.loads(asking.getresponse().read())["run_result"]["stdout"] == "done"
            asking.close()
            assert served.end()[0] == 0

    def test_a_second_on_the_same_directory_is_busy(self, tmp_path):
        with serving(tmp_path) as served:
            done = subprocess.run(served.process.args, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == 7
            assert str(served.process.pid) in one_line(done.stderr)
            assert served.end(signal.SIGTERM)[0] == 0

    def test_takes_the_token_from_a_file_or_the_environment_and_never_shows_it(self, tmp_path):
        (tmp_path / "token").write_text(TOKEN + "\n")
        for words, env in (["--token-file", tmp_path / "token"], {}), ([], {"LOOPGUARD_TOKEN": TOKEN}):
            with serving(tmp_path, "--host", "0.0.0.0", *words, env=env) as served:
                assert served.line.startswith("serving on http://0.0.0.0:")
                assert served.ask()[0] == 401
                assert served.ask(token=TOKEN) == (200, "pong")
                code, out, err = served.end(signal.SIGTERM)
            assert (code, out, err) == (0, "", "")
            files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
            assert not any(TOKEN.encode() in path.read_bytes() for path in files)

    def test_says_that_a_token_on_the_command_line_is_seen(self, tmp_path):
        with serving(tmp_path, "--token", TOKEN) as served:
            code, _, err = served.end(signal.SIGTERM)
        assert code == 0
        assert "prefer LOOPGUARD_TOKEN" in one_line(err)

    def test_says_that_it_is_frozen(self, tmp_path):
        with serving(tmp_path) as served:
            served.end(signal.SIGTERM)
        assert _main(["freeze", str(tmp_path / "run"), "--by", "dana", "--reason", "looks wrong"]) == 0
        with serving(tmp_path) as served:
            assert served.ask(path="/healthz") == (503, {"status": "frozen"})
            assert served.run("print(1)")["run_result"]["return_code"] == 126
            code, _, err = served.end(signal.SIGTERM)
        assert code == 0
        assert "frozen" in one_line(err)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One service with real cells for all tests that need them."""
    with serving(tmp_path_factory.mktemp("served"), program=("-m", "loopguard.cli")) as served:
        yield served
        assert served.end(signal.SIGTERM)[0] == 0


@pytest.mark.docker
class TestWithCells:
    """The whole way, through containers."""

    def test_a_program_prints_and_reads_its_input(self, served):
        told = served.run("print(input()[::-1])", stdin="wolg")
        assert told["status"] == "Success"
        assert told["run_result"]["stdout"] == "glow\n"

    def test_bash_is_the_shell_of_the_cell(self, served):
        assert served.run("echo $((6 * 7)); exit 3", "bash")["run_result"]["return_code"] == 3

    def test_files_go_in_and_out(self, served):
        told = served.run(
            "open('out/copy.bin', 'wb').write(open('in/a.bin', 'rb').read()[::-1])",
            files={
                "in/a.bin": base64.b64encode(bytes(range(256))).decode(),
                "out/.keep": "",
            },
            fetch_files=["./out/copy.bin", "absent"],
        )
        assert told["status"] == "Success", told
        assert base64.b64decode(told["files"].pop("./out/copy.bin")) == bytes(reversed(range(256)))
        assert told["files"] == {}

    def test_a_name_that_leads_elsewhere_is_422(self, served):
        for files in ({"../x": ""}, {"/etc/x": ""}):
            body = {"code": "", "language": "python", "files": files}
            assert served.ask("POST", "/run_code", body)[0] == 422

    def test_partial_output_survives_a_time_out(self, served):
        told = served.run("print('so far', flush=True)\nwhile True: pass", run_timeout=1)
        assert told["status"] == "Failed"
        assert told["run_result"]["status"] == "TimeLimitExceeded"
        assert told["run_result"]["return_code"] is None
        assert told["run_result"]["stdout"] == "so far\n"

    def test_a_signal_is_told_as_python_tells_it(self, served):
        assert served.run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")["run_result"]["return_code"] == -11

    def test_a_memory_limit_of_the_call_holds(self, served):
        told = served.run("x = bytearray(200 << 20)", memory_limit_MB=64)
        assert told["status"] == "Failed"
        assert "MemoryError" in told["run_result"]["stderr"]

    def test_a_client_that_goes_away_frees_its_cell(self, served):
        """All cells are held by calls of clients that left, and the next call does not wait for their time limit."""
        code = {"code": "while True: pass", "language": "python", "run_timeout": 10}
        leaving = [served.send("POST", "/run_code", code) for _ in range(2)]
        time.sleep(0.5)
        for connection in leaving:
            connection.close()
        begin = time.monotonic()
        assert served.run("print(1)")["status"] == "Success"
        assert time.monotonic() - begin < 8
