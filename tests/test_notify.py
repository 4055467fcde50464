"""People are told of a freeze: once, signed, beside the run, and without a word that a model wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="attach needs torch")
pytest.importorskip("safetensors", reason="snapshots need safetensors")

from lab import POLICY, Lab

from loopguard import notify
from loopguard.audit import log as log_module
from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.audit.verify import verify
from loopguard.cli.app import _main
from loopguard.errors import LoopFrozen, UsageError
from loopguard.notify import Command, Notifier, NotToldError, Webhook, command, encoded, event, key_from, sign, untold
from loopguard.state import standing, submit

torch.set_num_threads(1)

KEY = bytes(range(32))
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
DOCS = Path(__file__).parents[1] / "docs" / "notify.md"
PATIENCE_S = 60


class Receiver:
    """A web server on a loopback address that keeps what is posted to it, and answers as it is told."""

    def __init__(self):
        self.got = []
        self.answers = []
        """Statuses to answer with, one after the other; then 204."""
        self.held = None
        """Where set, answers wait for it."""
        self._came = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                size = int(self.headers["Content-Length"])
                if len(body := self.rfile.read(size)) < size:
                    return  # whoever posted was killed in the middle of it
                with receiver._came:
                    receiver.got.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                    status = receiver.answers.pop(0) if receiver.answers else 204
                    receiver._came.notify_all()
                if receiver.held is not None:
                    receiver.held.wait(PATIENCE_S)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # whoever posted may have gone away
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/loopguard"

    def wait(self, count):
        with self._came:
            assert self._came.wait_for(lambda: len(self.got) >= count, timeout=PATIENCE_S), self.types

    @property
    def events(self):
        return [json.loads(body) for _, _, body in self.got]

    @property
    def types(self):
        return [one["type"].removeprefix("dev.loopguard.") for one in self.events]

    def close(self):
        if self.held is not None:
            self.held.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver():
    server = Receiver()
    yield server
    server.close()


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    return Lab(tmp_path)


def tell(lab, *places, **more):
    """Give the lab's policy a `notify` section with webhooks at these places."""
    section = {"webhooks": [{"url": place, "secret": "HOOK_SECRET"} for place in places]} | more
    lab.policy.write_text(f"{POLICY}notify: {json.dumps(section)}\n")


def frozen(lab, guard):
    """Train until the guard stops it."""
    with pytest.raises(LoopFrozen):
        for cycle in guard.cycles(1):
            lab.update(cycle, factor=float("nan"))


def script(tmp_path, name, text):
    """A program."""
    path = tmp_path / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def freeze(tmp_path):
    """A log with a freeze in it, and a way to put another body on it."""

    def made(**body):
        run_dir = tmp_path / f"run-{uuid.uuid4().hex[:6]}"
        whole = {"freeze": "f1", "gate": "update", "rule": "bounds:loss", "reason": "loss is nan", "update": 7} | body
        with AuditLog.open(run_dir, run_id="run-1", policy="", reserve_mib=1) as log:
            return log.append("freeze.entered", whole, cycle=3), run_dir

    return made


class TestWhatIsTold:
    def test_a_freeze_is_a_cloud_event(self, freeze):
        entry, run_dir = freeze()
        told = event(entry, run_dir=run_dir)
        name = run_dir.name
        assert told == {
            "specversion": "1.0",
            "id": entry.id,
            "source": "/loopguard/run-1",
            "type": "dev.loopguard.freeze.entered",
            "time": entry.ts,
            "datacontenttype": "application/json",
            "data": {
                "run_dir": name,
                "freeze": "f1",
                "gate": "update",
                "rule": "bounds:loss",
                "reason": "loss is nan",
                "cycle": 3,
                "update": 7,
                "head": f"{entry.seq}:{entry.hash}",
                "why": f"loopguard audit why {name}",
                "resume": f"loopguard resume {name} --by NAME --reason TEXT",
            },
        }
        datetime.fromisoformat(told["time"])

    @pytest.mark.parametrize(
        ("gate", "rule"),
        [
            ("data", "reward"),
            ("update", "apply"),
            ("update", "monitor_error"),
            ("update", "veto_not_honoured"),
            ("promotion", "apply"),
            ("promotion", "unknown"),
            ("promotion", "engine"),
            ("tool", "sandbox"),
            ("operator", "latch"),
            ("audit", "unwritable"),
            ("audit", "checkpoint"),
            ("a gate", "of a later version"),
        ],
    )
    def test_a_reason_that_may_quote_a_model_is_kept_back(self, freeze, gate, rule):
        """An exception, an answer of a reward, a path: the log has it, and whoever is told learns the rule."""
        entry, run_dir = freeze(gate=gate, rule=rule, reason="it gave 'SECRET WORDS' for row 0")
        body = encoded(event(entry, run_dir=run_dir))
        assert b"SECRET WORDS" not in body
        assert json.loads(body)["data"]["reason"].startswith("kept back")
        assert json.loads(body)["data"]["rule"] == rule

    def test_a_reward_that_answers_with_text_is_not_quoted(self, lab, receiver):
        """The real path: what a reward gave back stands in the log, and not in what goes out."""
        tell(lab, receiver.url)
        with lab.build(lab.open()) as guard:
            next(iter(guard.cycles(1)))
            guard.wrap_reward(lambda completions, **_: ["<a model wrote this>"])(completions=["x"], prompts=["y"])
            receiver.wait(1)
        (entry,) = lab.events("freeze.entered")
        assert "a model wrote this" in entry.body["reason"]
        assert b"a model wrote this" not in receiver.got[0][2]

    def test_what_is_shown_is_one_line_of_visible_characters(self, freeze):
        entry, run_dir = freeze(gate="operator", rule="request", reason="dana:\n\u202egnp.exe\x1b[2J" + "x" * 400)
        reason = event(entry, run_dir=run_dir)["data"]["reason"]
        assert reason.startswith("dana:\\n\\u202egnp.exe\\u001b[2J")
        assert reason.isprintable()
        assert len(reason) == 300
        assert reason.endswith("...")

    def test_no_path_of_the_host_goes_out(self, freeze):
        entry, run_dir = freeze(capsule="freezes/f1", capsule_trouble=f"{Path.home()} is full")
        body = encoded(event(entry, run_dir=run_dir)).decode()
        assert str(run_dir.parent) not in body
        assert str(Path.home()) not in body


class TestSignatures:
    def test_it_is_the_scheme_of_standard_webhooks(self, monkeypatch):
        """The example of that specification."""
        monkeypatch.setenv("S", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
        told = sign(key_from("S"), "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
        assert told == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

    def test_the_block_of_the_page_verifies_what_is_sent(self, receiver, monkeypatch):
        """And nothing else: not another body, not another time, not another key."""
        (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
        assert len(block.strip().splitlines()) <= 12
        names = {}
        exec(compile(block, "docs/notify.md", "exec"), names)
        Webhook(url=receiver.url, key=KEY).send("id-1", b'{"a":1}')
        _, headers, body = receiver.got[0]
        assert names["verified"](headers, body, SECRET)
        assert not names["verified"](headers, body + b" ", SECRET)
        assert not names["verified"](headers | {"webhook-id": "id-2"}, body, SECRET)
        assert not names["verified"](headers, body, f"whsec_{base64.b64encode(b'y' * 32).decode()}")
        stale = str(int(headers["webhook-timestamp"]) - 600)
        signed = {"webhook-timestamp": stale, "webhook-signature": sign(KEY, "id-1", stale, body)}
        assert not names["verified"](headers | signed, body, SECRET)

    @pytest.mark.parametrize("held", ["", "   ", "hunter2", "whsec_aGk=", f"whsec_{'A' * 200}", "whsec_!!!"])
    def test_a_secret_that_is_none_is_refused_and_not_repeated(self, monkeypatch, held):
        monkeypatch.setenv("S", held)
        with pytest.raises(UsageError, match="variable S") as told:
            key_from("S")
        assert not held.strip() or held not in str(told.value)

    def test_nor_is_one_shown(self):
        assert repr(KEY) not in repr(Webhook(url="https://a.example.org", key=KEY))


class TestAWebhook:
    def test_is_posted_to_as_a_structured_event(self, receiver):
        assert Webhook(url=receiver.url, key=KEY).send("id-1", b"{}") == {"status": 204}
        path, headers, body = receiver.got[0]
        assert (path, body) == ("/loopguard", b"{}")
        assert headers["content-type"] == "application/cloudevents+json"
        assert headers["webhook-id"] == "id-1"

    @pytest.mark.parametrize(
        ("status", "for_good"), [(302, True), (410, True), (400, False), (404, False), (429, False), (503, False)]
    )
    def test_says_no_for_now_or_for_good(self, receiver, status, for_good):
        receiver.answers = [status]
        with pytest.raises(NotToldError, match=f"it answered {status}") as told:
            Webhook(url=receiver.url, key=KEY).send("id-1", b"{}")
        assert told.value.for_good == for_good

    def test_leads_nowhere_else(self, receiver):
        """A redirect is not followed, wherever it leads."""
        receiver.answers = [302]
        with pytest.raises(NotToldError, match="redirects are not followed"):
            Webhook(url=receiver.url, key=KEY).send("id-1", b"{}")
        assert len(receiver.got) == 1

    def test_that_nobody_answers_at_is_a_reason(self, receiver):
        url = receiver.url
        receiver.close()
        with pytest.raises(NotToldError, match="Connection refused"):
            Webhook(url=url, key=KEY).send("id-1", b"{}")

    @pytest.mark.parametrize(
        ("says", "reason"),
        [(b"SSH-2.0-OpenSSH_9.2\r\n", "another language"), (b"", "hung up"), (b"HTTP/1.1 2", "hung up")],
    )
    def test_that_speaks_otherwise_is_a_reason(self, says, reason):
        answers = served(lambda peer: (heard(peer), peer.sendall(says)))
        with answers as port, pytest.raises(NotToldError, match=reason):
            Webhook(url=f"http://127.0.0.1:{port}", key=KEY).send("id-1", b"{}")

    def test_that_answers_in_drops_is_left_when_its_time_is_over(self, monkeypatch):
        """However often a byte comes: the time is for the whole answer."""
        monkeypatch.setattr(notify, "_ANSWER_S", 0.3)
        over = threading.Event()

        def drip(peer):
            heard(peer)
            while not over.wait(0.02):
                peer.sendall(b"H")

        with served(drip) as port:
            with pytest.raises(NotToldError, match="did not answer within|timed out"):
                Webhook(url=f"http://127.0.0.1:{port}", key=KEY).send("id-1", b"{}")
            over.set()

    def test_over_tls_is_who_it_says_or_is_told_nothing(self, receiver, tmp_path, monkeypatch):
        trustme = pytest.importorskip("trustme", reason="makes certificates")
        import ssl

        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
        place = Webhook(url=receiver.url.replace("http:", "https:"), key=KEY)
        with pytest.raises(NotToldError, match="(?i)certificate"):
            place.send("id-1", b"{}")
        assert receiver.got == []
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert place.send("id-1", b"{}") == {"status": 204}

    def test_goes_through_no_proxy_of_the_environment(self, receiver, monkeypatch):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        assert Webhook(url=receiver.url, key=KEY).send("id-1", b"{}") == {"status": 204}


def heard(peer):
    """All that is posted with the body `{}`; whoever hangs up before that resets the connection."""
    text = b""
    while not text.endswith(b"{}"):
        text += peer.recv(65536)


class served:  # noqa: N801 - read as a sentence: `with served(how) as port`
    """A socket that takes one connection and does as it is told with it."""

    def __init__(self, how):
        import socket

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.how = how

    def __enter__(self):
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        return self.socket.getsockname()[1]

    def _serve(self):
        peer, _ = self.socket.accept()
        with peer:
            try:
                self.how(peer)
            except OSError:
                return  # the other side has left, as it should

    def __exit__(self, *_):
        self.thread.join(PATIENCE_S)
        self.socket.close()


class TestACommand:
    def test_gets_the_event_and_no_shell_reads_its_arguments(self, tmp_path):
        program = script(
            tmp_path,
            "page",
            """
            import os, sys
            print(sys.argv[1:], os.getcwd(), sys.stdin.read(), end="")
            """,
        )
        told = command([program, "$(id)", "a b", "; rm -rf /"]).send("id-1", b'{"a":1}')
        expected = """['$(id)', 'a b', '; rm -rf /'] / {"a":1}\n"""
        assert told == {
            "exit_code": 0,
            "output_sha256": hashlib.sha256(expected.encode()).hexdigest(),
            "output_bytes": len(expected),
        }

    def test_that_fails_has_said_no(self, tmp_path):
        program = script(tmp_path, "page", "import sys; print('model text'); sys.exit(3)")
        with pytest.raises(NotToldError, match="it ended with 3; its output has SHA-256") as told:
            command([program]).send("id-1", b"{}")
        assert not told.value.for_good
        assert "model text" not in str(told.value)

    def test_need_not_read_what_it_is_given(self):
        assert command(["/bin/true"]).send("id-1", b"x" * 60_000)["exit_code"] == 0

    def test_that_does_not_end_is_killed_with_its_children(self, tmp_path, monkeypatch):
        monkeypatch.setattr(notify, "_PROGRAM_S", 3.0)
        program = tmp_path / "page"
        program.write_text(
            f"#!/bin/sh\ntrap '' TERM\nsleep 600 &\necho $! > {tmp_path}/new\nmv {tmp_path}/new {tmp_path}/pid\nwait\n"
        )
        program.chmod(0o755)
        with pytest.raises(NotToldError, match="was still running"):
            command([str(program)]).send("id-1", b"{}")
        child = int((tmp_path / "pid").read_text())
        until = time.monotonic() + PATIENCE_S
        while not gone(child) and time.monotonic() < until:
            time.sleep(0.01)  # the kernel takes a moment to end what was killed
        assert gone(child)

    def test_that_leaves_a_child_behind_is_through_all_the_same(self, tmp_path):
        """What it started may hold its output open for as long as it likes."""
        program = script(
            tmp_path,
            "page",
            f"""
            import subprocess
            child = subprocess.Popen(["sleep", "600"])
            open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
            """,
        )
        try:
            assert command([program]).send("id-1", b"{}")["exit_code"] == 0
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    def test_that_is_not_there_is_said_at_once(self, tmp_path):
        (tmp_path / "text").write_text("no program")
        for name in (str(tmp_path / "absent"), str(tmp_path / "text"), str(tmp_path)):
            with pytest.raises(UsageError, match="is no program that can be run here"):
                command([name])

    def test_that_went_away_meanwhile_is_a_reason(self, tmp_path):
        with pytest.raises(NotToldError, match="No such file"):
            Command(argv=(str(tmp_path / "absent"),)).send("id-1", b"{}")


def gone(pid):
    """Whether a process is dead; one that nobody has fetched yet is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Told:
    """An endpoint in memory: takes what it is told, unless it has a no left."""

    def __init__(self, *noes, name="a"):
        self.id = name
        self.noes = list(noes)
        self.got = []
        self.changed = threading.Condition()

    def facts(self):
        return {"endpoint": self.id, "kind": "webhook", "to": "memory"}

    def send(self, event_id, body):
        with self.changed:
            self.got.append(event_id)
            self.changed.notify_all()
        if self.noes:
            no = self.noes.pop(0)
            raise NotToldError("no", for_good=no == "for good")
        return {"status": 200}

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.got) >= count, timeout=PATIENCE_S)


@pytest.fixture
def start(tmp_path):
    """Open the log of a run with these endpoints, as a guard does; gives log and notifier."""
    opened = []

    def begin(*endpoints, within_s=PATIENCE_S, failed_too=False, events=notify.EVENTS):
        notifier = Notifier(endpoints, run_dir=tmp_path / "run", events=events, within_s=within_s, first_pause_s=0.001)
        log = AuditLog.open(tmp_path / "run", run_id="r", policy="", reserve_mib=1, mirror=notifier.heed)
        log.append("policy.loaded", {"name": "p", "notify": [one.facts() for one in endpoints]})
        notifier.begin(log, failed_too=failed_too)
        opened.append((log, notifier))
        return log, notifier

    yield begin
    for log, notifier in opened:
        notifier.close()
        log.close()


def records(tmp_path, *types):
    return [entry for entry in read.entries(tmp_path / "run") if entry.type in types]


class TestTelling:
    def test_a_no_is_asked_again_until_it_is_a_yes(self, start, tmp_path):
        place = Told("now", "now", "now")
        log, notifier = start(place)
        entry = log.append("freeze.entered", {"freeze": "f1"}, cycle=2)
        assert notifier.wait(PATIENCE_S)
        (sent,) = records(tmp_path, "notify.sent")
        assert sent.body == {
            "event": entry.id,
            "type": "freeze.entered",
            "endpoint": "a",
            "kind": "webhook",
            "to": "memory",
            "tries": 4,
            "status": 200,
        }
        assert (sent.cause, sent.cycle) == ((entry.id,), 2)
        assert place.got == [entry.id] * 4

    @pytest.mark.parametrize(("noes", "within_s"), [(["for good"], PATIENCE_S), (["now"] * 1000, 0)])
    def test_a_no_for_good_or_for_too_long_is_given_up_and_recorded(self, start, tmp_path, noes, within_s, caplog):
        place = Told(*noes)
        log, notifier = start(place, within_s=within_s)
        log.append("freeze.entered", {"freeze": "f1"})
        assert not notifier.wait(PATIENCE_S)
        (failed,) = records(tmp_path, "notify.failed")
        assert (failed.body["reason"], failed.body["again"], failed.body["tries"]) == ("no", False, 1)
        assert "memory was not told of freeze.entered: no" in caplog.text

    def test_what_was_given_up_is_not_told_by_the_next_start_but_on_request(self, start, tmp_path):
        log, notifier = start(Told("for good"))
        entry = log.append("freeze.entered", {"freeze": "f1"})
        notifier.wait(PATIENCE_S)
        notifier.close()
        log.close()
        later = Told()
        log, notifier = start(later)
        assert notifier.wait(PATIENCE_S)
        assert later.got == []
        notifier.close()
        log.close()
        _, notifier = start(later, failed_too=True)
        assert notifier.wait(PATIENCE_S)
        assert later.got == [entry.id]

    def test_each_endpoint_is_told_whatever_the_others_do(self, start, tmp_path):
        deaf, hears = Told(*["now"] * 100_000, name="deaf"), Told(name="hears")
        log, _ = start(deaf, hears)
        first = log.append("freeze.entered", {"freeze": "f1"})
        second = log.append("resume.applied", {"freeze": "f1"})
        hears.wait(2)
        assert hears.got == [first.id, second.id]

    def test_what_is_left_at_the_end_is_recorded_and_told_by_the_next_start(self, start, tmp_path):
        """In the order of the log, each once, under the id that it had."""
        deaf = Told(*["now"] * 100_000)
        log, notifier = start(deaf)
        ids = [log.append(kind, {"freeze": "f1"}).id for kind in ("freeze.entered", "resume.applied")]
        deaf.wait(1)
        notifier.close()
        log.close()
        failed = records(tmp_path, "notify.failed")
        assert [(one.body["event"], one.body["again"], one.body["reason"]) for one in failed] == [
            (ids[0], True, "no"),
            (ids[1], True, "no"),
        ]
        hears = Told()
        log, notifier = start(hears)
        ids.append(log.append("run.finished").id)
        assert notifier.wait(PATIENCE_S)
        assert hears.got == ids
        notifier.close()
        log.close()
        _, notifier = start(again := Told())
        assert notifier.wait(PATIENCE_S)
        assert again.got == []

    def test_an_answer_that_never_comes_keeps_the_end_for_a_few_seconds_only(self, start, tmp_path, monkeypatch):
        monkeypatch.setattr(notify, "_CLOSE_S", 0.1)
        held = threading.Event()

        class Silent(Told):
            def send(self, event_id, body):
                super().send(event_id, body)
                held.wait(PATIENCE_S)
                return {"status": 200}

        place = Silent()
        log, notifier = start(place)
        log.append("freeze.entered", {"freeze": "f1"})
        place.wait(1)
        notifier.close()
        log.close()
        (failed,) = records(tmp_path, "notify.failed")
        assert failed.body["reason"] == "the process ended before it answered"
        held.set()

    def test_an_endpoint_that_a_later_policy_names_hears_nothing_of_before(self, start):
        log, notifier = start(Told(name="old"))
        log.append("freeze.entered", {"freeze": "f1"})
        notifier.close()
        log.close()
        new = Told(name="new")
        log, notifier = start(new)
        entry = log.append("resume.applied", {"freeze": "f1"})
        assert notifier.wait(PATIENCE_S)
        assert new.got == [entry.id]

    def test_only_what_the_policy_names_is_told(self, start):
        place = Told()
        log, notifier = start(place, events=("freeze.entered",))
        log.append("resume.requested", {"by": "dana"})
        entry = log.append("freeze.entered", {"freeze": "f1"})
        log.append("run.finished")
        assert notifier.wait(PATIENCE_S)
        assert place.got == [entry.id]

    def test_what_a_command_line_recorded_beside_no_loop_is_told_by_the_next_start(self, start, tmp_path):
        """It writes no `policy.loaded`; the last one before it says who is told."""
        log, notifier = start(Told())
        notifier.close()
        log.close()
        with AuditLog.open(tmp_path / "run", run_id="r", policy="", reserve_mib=1) as other:
            entry = other.append("freeze.entered", {"freeze": "f1"})
        _, notifier = start(place := Told())
        assert notifier.wait(PATIENCE_S)
        assert place.got == [entry.id]

    def test_a_log_that_takes_no_records_does_not_keep_anybody_from_being_told(self, start, monkeypatch, caplog):
        """The freeze itself is in the reserve; the next start tells it again, under the same id."""
        place = Told()
        log, notifier = start(place)

        def failing(_):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(log_module, "_flush", failing)
            with pytest.raises(log_module.AuditWriteError):
                log.append("note.added", {})
        entry = log.append_last("freeze.entered", {"freeze": "f1"})
        assert notifier.wait(PATIENCE_S)
        assert place.got == [entry.id]
        assert "is not recorded" in caplog.text
        notifier.close()
        log.close()
        _, notifier = start(place)
        assert notifier.wait(PATIENCE_S)
        assert place.got == [entry.id] * 2

    def test_a_forked_child_tells_nothing(self, start):
        place = Told(*["now"] * 100_000)
        _, notifier = start(place)
        pid = notifier._pid
        notifier._pid = pid + 1  # as the child sees it
        notifier.close()
        assert not notifier._closed
        notifier._pid = pid

    def test_what_is_told_is_read_from_the_log_alone(self, start, tmp_path):
        log, notifier = start(Told(name="a"), Told("for good", name="b"))
        entry = log.append("freeze.entered", {"freeze": "f1"})
        notifier.wait(PATIENCE_S)
        found = list(read.entries(tmp_path / "run"))
        assert untold(found, events=notify.EVENTS) == []
        assert untold(found, events=notify.EVENTS, failed_too=True) == [(entry, "b")]
        before = [one for one in found if not one.type.startswith("notify.")]
        assert untold(before, events=notify.EVENTS) == [(entry, "a"), (entry, "b")]
        assert untold(before, events=("run.finished",)) == []


class TestAGuardedRun:
    def test_tells_of_a_freeze_a_resume_and_the_end_once_each(self, lab, receiver):
        tell(lab, receiver.url)
        guard = lab.build(lab.open())
        frozen(lab, guard)
        receiver.wait(1)
        submit(lab.run_dir, "resume", by="dana", reason="bad shard", freeze="f1")
        lab.run(guard, cycles=1)
        guard.close()
        assert receiver.types == ["freeze.entered", "resume.requested", "resume.applied", "run.finished"]
        entries = [lab.events(kind)[0] for kind in receiver.types]
        assert [one["id"] for one in receiver.events] == [entry.id for entry in entries]
        assert [one["source"] for one in receiver.events] == [f"/loopguard/{guard.run_id}"] * 4
        assert receiver.events[1]["data"]["by"] == receiver.events[2]["data"]["by"] == "dana"
        with lab.build(lab.open()) as again:
            lab.run(again, cycles=2)
        assert receiver.types[4:] == ["run.finished"]
        assert {one.body["event"] for one in lab.events("notify.sent")} == {one["id"] for one in receiver.events}
        assert verify(lab.run_dir).code == 20

    def test_says_in_its_log_who_is_told(self, lab, receiver, tmp_path):
        """With no secret, and no path that may be one."""
        tell(lab, f"{receiver.url}/T0PS3CRET", command=[script(tmp_path, "page", "")])
        lab.open().close()
        (loaded,) = lab.events("policy.loaded")
        assert [one["kind"] for one in loaded.body["notify"]] == ["webhook", "command"]
        assert loaded.body["notify"][0]["to"] == receiver.url.removesuffix("/loopguard")
        text = b"".join(path.read_bytes() for path in read.segments(lab.run_dir))
        assert b"T0PS3CRET" not in text
        assert SECRET.encode() not in text

    def test_never_waits_for_an_answer(self, lab, receiver, monkeypatch):
        """All of the run goes by while the first answer is still outstanding."""
        monkeypatch.setattr(notify, "_CLOSE_S", 0.1)
        receiver.held = threading.Event()
        tell(lab, receiver.url)
        guard = lab.build(lab.open())
        frozen(lab, guard)
        receiver.wait(1)
        guard._resume(by="dana", reason="go on")
        lab.run(guard, cycles=2)
        guard.close()
        assert lab.events("run.finished")
        assert not lab.events("notify.sent")
        assert len(receiver.got) == 1

    def test_comes_out_the_same_whether_or_not_it_is_heard(self, lab, receiver, tmp_path):
        digests = []
        for name, section in (("a", {}), ("b", {"command": ["/bin/false"], "within": "1s"})):
            (tmp_path / name).mkdir()
            one = Lab(tmp_path / name)
            if section:
                tell(one, "http://127.0.0.1:1/", **section)
            guard = one.build(one.open())
            frozen(one, guard)
            guard._resume(by="dana", reason="go on")
            one.run(guard, cycles=2)
            digests.append(guard.state_digest())
            guard.close()
        assert digests[0] == digests[1]
        assert {entry.body["kind"] for entry in one.events("notify.failed")} == {"webhook", "command"}

    def test_gives_a_command_the_event(self, lab, tmp_path):
        program = script(tmp_path, "page", f"import sys; open({str(tmp_path / 'told')!r}, 'a').write(sys.stdin.read())")
        tell(lab, command=[program], events=["freeze.entered"])
        guard = lab.build(lab.open())
        frozen(lab, guard)
        guard.close(finished=False)
        (line,) = (tmp_path / "told").read_text().splitlines()
        (entry,) = lab.events("freeze.entered")
        assert json.loads(line)["id"] == entry.id
        (sent,) = lab.events("notify.sent")
        assert (sent.body["to"], sent.body["exit_code"], sent.body["output_bytes"]) == (program, 0, 0)

    @pytest.mark.parametrize("held", [None, "hunter2"])
    def test_does_not_start_without_its_secret(self, lab, receiver, monkeypatch, held):
        """Whoever relies on being told learns of it now, and nothing was written."""
        monkeypatch.delenv("HOOK_SECRET")
        if held:
            monkeypatch.setenv("HOOK_SECRET", held)
        tell(lab, receiver.url)
        with pytest.raises(UsageError, match="environment variable HOOK_SECRET"):
            lab.open()
        assert not lab.run_dir.exists()

    def test_nor_without_its_program(self, lab, tmp_path):
        tell(lab, command=[str(tmp_path / "absent")])
        with pytest.raises(UsageError, match="is no program"):
            lab.open()
        assert not lab.run_dir.exists()

    def test_tells_that_its_log_cannot_be_written(self, lab, receiver, monkeypatch):
        tell(lab, receiver.url)
        guard = lab.build(lab.open())
        real, bad = log_module._flush, guard._log._segment.fd

        def failing(fd):
            if fd == bad:
                raise OSError(5, "Input/output error")
            real(fd)

        monkeypatch.setattr(log_module, "_flush", failing)
        with pytest.raises(log_module.AuditWriteError):
            lab.run(guard, cycles=1)
        guard.close(finished=False)
        assert receiver.types == ["freeze.entered"]
        assert receiver.events[0]["data"]["rule"] == "unwritable"
        assert standing(lab.run_dir).frozen


ENDS = """
import sys
sys.path.insert(0, {tests!r})
import os, signal
from pathlib import Path
from lab import Lab

class Kept(Lab):
    def __init__(self, folder):
        self.policy, self.run_dir, self.respond = folder / "policy.yaml", folder / "run", lambda call: "4"

lab = Kept(Path({folder!r}))
guard = lab.build(lab.open())
how = sys.argv[1]
if how == "killed":
    from loopguard.state import FreezeState
    real = FreezeState.freeze
    def freeze(*given, **named):
        real(*given, **named)
        os.kill(os.getpid(), signal.SIGKILL)
    FreezeState.freeze = freeze
for cycle in guard.cycles(1):
    lab.update(cycle, factor=float("nan"))
"""


def ended(lab, tmp_path, how):
    """A process of its own that freezes and is gone; gives what became of it."""
    code = ENDS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, "-c", code, how], env=env, capture_output=True, text=True, timeout=120, check=False
    )


class TestTheEndOfAProcess:
    def test_by_the_freeze_itself_still_tells_of_it(self, lab, receiver, tmp_path):
        """Nobody catches LoopFrozen, and nobody closes the guard."""
        tell(lab, receiver.url)
        done = ended(lab, tmp_path, "raised")
        assert "loopguard.errors.LoopFrozen" in done.stderr
        assert receiver.types == ["freeze.entered"]
        assert [entry.type for entry in lab.events("notify.sent", "notify.failed")] == ["notify.sent"]

    def test_before_the_endpoint_answers_leaves_it_to_the_next_start(self, lab, receiver, tmp_path):
        receiver.answers = [503] * 100
        tell(lab, receiver.url)
        done = ended(lab, tmp_path, "raised")
        assert "LoopFrozen" in done.stderr
        assert [entry.body["reason"] for entry in lab.events("notify.failed")] == ["it answered 503"]
        before = len(receiver.got)
        receiver.answers.clear()
        with lab.open():
            receiver.wait(before + 1)
        (entry,) = lab.events("freeze.entered")
        assert {one["id"] for one in receiver.events} == {entry.id}
        with lab.open():
            pass
        assert len(receiver.got) == before + 1

    def test_by_a_kill_leaves_it_to_the_next_start(self, lab, receiver, tmp_path):
        """Killed right behind the record of the freeze, with the answer held back."""
        receiver.held = threading.Event()
        tell(lab, receiver.url)
        done = ended(lab, tmp_path, "killed")
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not lab.events("notify.sent")
        receiver.held.set()
        before = len(receiver.got)
        with lab.open() as guard:
            assert guard.frozen
            receiver.wait(before + 1)
        (entry,) = lab.events("freeze.entered")
        assert {one["id"] for one in receiver.events} == {entry.id}
        assert len(lab.events("notify.sent")) == 1


class TestTheCommandLine:
    def test_tries_every_endpoint_of_a_policy(self, lab, receiver, capsys):
        receiver.answers = [204, 503]
        tell(lab, receiver.url, f"{receiver.url}/2")
        assert _main(["notify", "test", str(lab.policy)]) == 1
        out = capsys.readouterr().out.splitlines()
        host = receiver.url.removesuffix("/loopguard")
        assert out == [f"webhook  {host} took it", f"webhook  {host} did not: it answered 503"]
        assert receiver.types == ["notify.test", "notify.test"]
        assert receiver.events[0]["data"] == {"name": "policy.yaml", "reason": "a test: nothing has happened"}

    def test_or_of_a_run_and_records_nothing(self, lab, receiver, capsys):
        tell(lab, receiver.url)
        with lab.open():
            assert _main(["notify", "test", str(lab.run_dir)]) == 0
            assert receiver.types == ["notify.test"]
            assert not lab.events("notify.sent")

    def test_tells_nobody_where_nobody_is_named(self, lab, capsys):
        assert _main(["notify", "test", str(lab.policy)]) == 2
        assert "no notify section" in capsys.readouterr().err
        lab.open().close()
        assert _main(["notify", "flush", str(lab.run_dir)]) == 2

    def test_flush_catches_up_on_what_was_given_up(self, lab, receiver, capsys):
        receiver.answers = [410]
        tell(lab, receiver.url)
        guard = lab.build(lab.open())
        frozen(lab, guard)
        receiver.wait(1)
        guard.close(finished=False)
        assert [entry.body["again"] for entry in lab.events("notify.failed")] == [False]
        assert _main(["notify", "flush", str(lab.run_dir)]) == 0
        assert "everything is told" in capsys.readouterr().out
        assert len({one["id"] for one in receiver.events}) == 1
        assert len(receiver.got) == 2
        assert _main(["notify", "flush", str(lab.run_dir)]) == 0
        assert len(receiver.got) == 2

    def test_flush_says_what_is_still_untold(self, lab, receiver, capsys):
        receiver.answers = [410, 410]
        tell(lab, receiver.url)
        guard = lab.build(lab.open())
        frozen(lab, guard)
        receiver.wait(1)
        guard.close(finished=False)
        assert _main(["notify", "flush", str(lab.run_dir)]) == 1
        assert "not everything is told" in capsys.readouterr().out
        assert _main(["audit", "show", str(lab.run_dir), "--type", "notify"]) == 0
        assert "it answered 410" in capsys.readouterr().out

    def test_flush_leaves_a_living_run_alone(self, lab, receiver, capsys):
        tell(lab, receiver.url)
        with lab.open():
            assert _main(["notify", "flush", str(lab.run_dir)]) == 7

    @pytest.mark.parametrize("fate", ["edited", "writable"])
    def test_runs_nothing_that_somebody_else_could_have_written(self, lab, tmp_path, capsys, fate):
        """A guard policy names a program; in a directory that others write to, they would choose it."""
        ran = tmp_path / "ran"
        tell(lab, command=[script(tmp_path, "page", f"open({str(ran)!r}, 'w')")])
        lab.open().close()
        (policy,) = (lab.run_dir / "policy").iterdir()
        ran.unlink(missing_ok=True)  # the end of that run was told
        if fate == "edited":
            policy.write_text(policy.read_text().replace("name: test", "name: other"))
        else:
            policy.chmod(0o666)
        for word in ("test", "flush"):
            assert _main(["notify", word, str(lab.run_dir)]) == 2
            assert ("somebody edited" if fate == "edited" else "can be written by others") in capsys.readouterr().err
        assert not ran.exists()


def test_the_page_opens_with_what_a_demanding_user_expects():
    page = DOCS.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE)[0] == "What a demanding user expects"


def test_the_page_has_every_event_with_its_members(freeze):
    page = DOCS.read_text(encoding="utf-8")
    for kind in notify.EVENTS:
        assert f"| `dev.loopguard.{kind}` |" in page, kind
    entry, run_dir = freeze()
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    shown, made = json.loads(example), event(entry, run_dir=run_dir)
    assert list(shown) == list(made)
    assert shown["data"].keys() == made["data"].keys()


def test_the_hook_of_the_page_posts_what_a_chat_takes(receiver, tmp_path, monkeypatch, freeze):
    """Three lines of shell, with marks that a chat would take for its own made harmless."""
    if missing := [name for name in ("jq", "curl") if shutil.which(name) is None]:
        pytest.skip(f"the hook of the page needs {' and '.join(missing)}")
    first, second = re.findall(r"```sh\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(first.strip().splitlines()) == 3
    monkeypatch.setenv("SLACK_WEBHOOK", receiver.url)
    monkeypatch.setenv("PAGER_KEY", "k")
    entry, run_dir = freeze(gate="operator", rule="request", reason='dana: "look" <!channel> $(id)')
    for number, hook in enumerate((first, second.replace("https://events.pagerduty.com/v2/enqueue", receiver.url))):
        program = tmp_path / f"hook-{number}"
        program.write_text(hook)
        program.chmod(0o755)
        command([str(program)]).send(entry.id, encoded(event(entry, run_dir=run_dir)))
    chat, pager = receiver.events
    reason = 'dana: "look" &lt;!channel> $(id)'
    assert chat == {"text": f"dev.loopguard.freeze.entered: {run_dir.name} f1: {reason}"}
    assert (pager["routing_key"], pager["event_action"]) == ("k", "trigger")
    assert pager["dedup_key"] == "/loopguard/run-1 f1"
