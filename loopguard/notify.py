"""Tell people of a freeze: a signed webhook, or a program of the policy's owner, beside the run and never in its way.

Covered: every freeze, resume and end that the audit log holds, to each endpoint of the guard policy, tried again for a
bounded time, and told once also across restarts: what was told is in the log, and what is not there is told by the next
start. Nothing of a run waits for an answer, but the end of its process for a few seconds.

Not covered: a process that is killed and never started again, which tells nobody; and an answer whose record did not
reach the disk. That event is told again under the id that it had, by which a receiver knows it.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import hashlib
import hmac
import http.client
import json
import logging
import os
import re
import selectors
import shlex
import signal
import ssl
import subprocess
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

from loopguard.audit import read
from loopguard.audit.events import printable
from loopguard.errors import AuditError, UsageError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from loopguard.audit.events import Entry
    from loopguard.audit.log import AuditLog

_LOG = logging.getLogger("loopguard.notify")

EVENTS = ("freeze.entered", "resume.requested", "resume.applied", "run.halted", "run.finished", "run.interrupted")
"""The types of records that people can be told of."""
_RECORDS = (*EVENTS, "policy.loaded", "notify.sent", "notify.failed")

_ANSWER_S = 5.0
"""How long a webhook may take to be reached, and then to answer."""
_PROGRAM_S = 10.0
_CLOSE_S = 5.0
"""How long the end of a process waits for what is not told yet."""
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_MAX_TEXT = 300
_MAX_HEAD_BYTES = 4096
_KEY_BYTES = range(24, 65)

_OWN: dict[str, frozenset[str]] = {
    "update": frozenset({"bounds", "jump", "drift", "variance", "missing", "device"}),
    "data": frozenset({"kept_share", "mean_gain", "recheck", "quarantined_share"}),
    "promotion": frozenset({"missing", "domain", "change", "eprocess", "unjudged", "denied"}),
    "tool": frozenset({"rate"}),
    "operator": frozenset({"request", "overdue", "hold"}),
    "audit": frozenset({"snapshot", "cache"}),
}
"""Rules whose reasons are sentences of ours over numbers and words of the policy, or of the person who asked. Any other
may quote an exception or an answer, and with it what a model wrote."""
_KEPT_BACK = "kept back, since it may quote what a model wrote: it stands in the audit log"


class NotToldError(Exception):
    """An endpoint did not take an event. The message is the reason, without the endpoint."""

    def __init__(self, reason: str, *, for_good: bool = False) -> None:
        super().__init__(reason)
        self.for_good = for_good
        """Whether trying again is of no use."""


# -- what is told ------------------------------------------------------------------------------------------------------


def event(entry: Entry, *, run_dir: Path) -> dict[str, Any]:
    """A record of the log as a CloudEvent 1.0. No path, no code and no text of a model goes into it."""
    name = Path(run_dir).resolve().name
    match entry.type:
        case "freeze.entered":
            told = _frozen(entry.body, shlex.quote(name))
        case "resume.requested":
            told = _asked(entry.body, shlex.quote(name))
        case "resume.applied":
            told = {key: _cut(entry.body.get(key)) for key in ("freeze", "by", "reason", "disposition", "approval")}
        case "run.halted":
            told = {key: _cut(entry.body.get(key)) for key in ("freeze", "by", "reason", "because")}
        case _:
            told = {"cycles": entry.body.get("cycles")}
    # Whoever keeps what he was told has an anchor of the log in it.
    about = {"run_dir": _cut(name), "cycle": entry.cycle, "head": f"{entry.seq}:{entry.hash}"}
    return _envelope(entry.id, entry.type, run=entry.log.rpartition("/")[0], at=entry.ts, data=about | told)


def trial(name: str) -> dict[str, Any]:
    """An event that says that nothing has happened, to try endpoints with. `name` is what is being tried."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    data = {"reason": "a test: nothing has happened", "name": _cut(name)}
    return _envelope(str(uuid.uuid4()), "notify.test", run="test", at=now, data=data)


def encoded(told: Mapping[str, Any]) -> bytes:
    """The bytes of an event, which are what is signed."""
    return json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _envelope(event_id: str, kind: str, *, run: str, at: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": event_id,
        "source": f"/loopguard/{quote(run)}",
        "type": f"dev.loopguard.{kind}",
        "time": at,
        "datacontenttype": "application/json",
        "data": data,
    }


def _frozen(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    gate, rule = str(body.get("gate")), str(body.get("rule"))
    own = rule.partition(":")[0] in _OWN.get(gate, ())
    return {
        "freeze": _cut(body.get("freeze")),
        "gate": _cut(gate),
        "rule": _cut(rule),
        "reason": _cut(body.get("reason")) if own else _KEPT_BACK,
        "update": body.get("update"),
        "why": _cut(f"loopguard audit why {name}"),
        "resume": _cut(f"loopguard resume {name} --by NAME --reason TEXT"),
    }


def _asked(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    facts = {key: _cut(body.get(key)) for key in ("freeze", "by", "reason")}
    return facts | {"approve": _cut(f"loopguard approve {name}") if body.get("statement") else None}


def _cut(text: Any) -> str | None:
    """Text on one line, in characters that can be seen, no longer than a message can bear."""
    if text is None:
        return None
    shown = printable(str(text)[: _MAX_TEXT + 1])
    return shown if len(shown) <= _MAX_TEXT else f"{shown[: _MAX_TEXT - 3]}..."


# -- whom it is told ---------------------------------------------------------------------------------------------------


class Endpoint(Protocol):
    """Whom an event is told. Lives as long as the process; one thread at a time speaks to it."""

    @property
    def id(self) -> str:
        """What tells it from other endpoints, in this process and in the log."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the log says of it; no secret, and no path of an address, which may be one."""
        ...

    def send(self, event_id: str, body: bytes) -> dict[str, Any]:
        """Tell it once; gives what the log should hold of its answer. Raises NotToldError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """An address that events are posted to, signed as Standard Webhooks has it.

    Follows no redirect, and uses no proxy of the environment: what was signed for one place goes to no other.
    """

    url: str
    key: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """Out of the whole address; whose secret is changed, it stays the same endpoint."""
        return _digest("webhook", self.url)

    def facts(self) -> dict[str, Any]:
        """Scheme and host."""
        parts = urlsplit(self.url)
        return {"endpoint": self.id, "kind": "webhook", "to": f"{parts.scheme}://{parts.netloc}"}

    def send(self, event_id: str, body: bytes) -> dict[str, Any]:
        """Post it. Any 2xx is a yes. A redirect and 410 are a no for good; whatever else may be better next time."""
        try:
            status = self._post(body, {"Content-Type": "application/cloudevents+json"} | self._signed(event_id, body))
        except (OSError, http.client.HTTPException) as error:
            raise NotToldError(_cut(getattr(error, "strerror", None) or error or type(error).__name__) or "") from error
        if 300 <= status < 400:
            raise NotToldError(f"it answered {status}, and redirects are not followed: name that place", for_good=True)
        if not 200 <= status < 300:
            raise NotToldError(f"it answered {status}", for_good=status == 410)
        return {"status": status}

    def _signed(self, event_id: str, body: bytes) -> dict[str, str]:
        now = str(int(time.time()))
        signature = sign(self.key, event_id, now, body)
        return {"webhook-id": event_id, "webhook-timestamp": now, "webhook-signature": signature}

    def _post(self, body: bytes, headers: dict[str, str]) -> int:
        parts = urlsplit(self.url)
        host, secure = parts.hostname or "", parts.scheme == "https"
        # The port is always given: out of an address such as ::1 the library would read one.
        port = parts.port or (443 if secure else 80)
        connection: http.client.HTTPConnection
        if secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
        try:
            connection.connect()
            until = time.monotonic() + _ANSWER_S
            connection.request("POST", parts.path or "/", body=body, headers=headers | {"Connection": "close"})
            return _status(connection.sock, until)
        finally:
            connection.close()


def sign(key: bytes, event_id: str, timestamp: str, body: bytes) -> str:
    """The value of `webhook-signature`, by the scheme of Standard Webhooks with a symmetric key."""
    digest = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode('ascii')}"


def key_from(variable: str, *, environ: Mapping[str, str] = os.environ) -> bytes:
    """The signing key in an environment variable: base64 of 24 to 64 bytes, behind `whsec_` or bare.

    Raises UsageError, which does not repeat what is there.
    """
    text = environ.get(variable, "").strip()
    if not text:
        raise UsageError(f"notify.webhooks: the environment variable {variable}, which holds a secret, is not set")
    try:
        key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) not in _KEY_BYTES:
        raise UsageError(
            f"notify.webhooks: the environment variable {variable} holds no secret of Standard Webhooks; expected "
            f"whsec_ and the base64 of {_KEY_BYTES.start} to {_KEY_BYTES.stop - 1} bytes"
        )
    return key


def _status(sock: socket.socket, until: float) -> int:
    """The status of an answer. The rest is of no interest, and nobody may make us wait for it."""
    head = b""
    while b"\n" not in head and len(head) < _MAX_HEAD_BYTES:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"it did not answer within {_ANSWER_S:g} s")
        sock.settimeout(left)
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError("it hung up without an answer")
        head += piece
    found = re.match(rb"HTTP/1\.[01] ([1-5][0-9]{2})\b", head)
    if found is None:
        raise ConnectionError("it answered in another language than HTTP")
    return int(found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A program of the policy's owner that gets events on its standard input. Never a shell's line."""

    argv: tuple[str, ...]

    @property
    def id(self) -> str:
        """Out of the program and its arguments."""
        return _digest("command", *self.argv)

    def facts(self) -> dict[str, Any]:
        """The program; its arguments stand in the policy."""
        return {"endpoint": self.id, "kind": "command", "to": self.argv[0]}

    def send(self, event_id: str, body: bytes) -> dict[str, Any]:
        """Run it in a session of its own, in `/`, with the environment of the loop. Exit code 0 is a yes."""
        program = Path(self.argv[0]).expanduser()
        try:
            process = subprocess.Popen(
                [str(program), *self.argv[1:]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise NotToldError(f"{error.strerror or error}") from error
        with process:
            try:
                output = _spoken_to(process, body + b"\n")
            finally:
                _end(process)
        told = {"exit_code": process.returncode, **output.facts()}
        if process.returncode != 0 or output.late:
            how = f"was still running after {_PROGRAM_S:g} s" if output.late else f"ended with {process.returncode}"
            raise NotToldError(f"it {how}; its output has SHA-256 {told['output_sha256']}")
        return told


class _Output:
    """What a program wrote, by its digest: it may be anything, and as much as it likes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._count = 0
        self.late = False

    def take(self, data: bytes) -> None:
        self._digest.update(data)
        self._count += len(data)

    def facts(self) -> dict[str, Any]:
        return {"output_sha256": self._digest.hexdigest(), "output_bytes": self._count}


def _spoken_to(process: subprocess.Popen[bytes], given: bytes) -> _Output:
    """Hand a program its input and take its output in, until it ends or its time is over."""
    assert process.stdin is not None
    assert process.stdout is not None
    output, until = _Output(), time.monotonic() + _PROGRAM_S
    with suppress(BrokenPipeError), process.stdin as pipe:  # it need not read
        pipe.write(given)  # less than a pipe holds
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if ready.select(min(left, 0.1)):
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                output.take(data)
            elif process.poll() is not None:
                return output  # a child of it keeps the pipe open, which is its own affair
    try:
        process.wait(max(until - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        output.late = True
    return output


def _end(process: subprocess.Popen[bytes]) -> None:
    """What is still running is killed with all that it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def command(argv: Sequence[str]) -> Command:
    """A program to tell. Raises UsageError where there is no such program."""
    program = Path(argv[0]).expanduser()
    if not (program.is_file() and os.access(program, os.X_OK)):
        raise UsageError(f"notify.command: {argv[0]} is no program that can be run here")
    return Command(argv=tuple(argv))


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()[:16]


# -- telling it --------------------------------------------------------------------------------------------------------


class Notifier:
    """Tells the endpoints of one run what its log records. Lives from the start of the process that owns it to `close`.

    Hand it each record (`heed`, which never waits and never raises), and the open log once (`begin`); it also tells
    what earlier processes recorded and did not tell. Each endpoint has a thread of its own.
    """

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        *,
        run_dir: Path,
        events: Collection[str],
        within_s: float,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        """`within_s` is how long one event is tried to be told to one endpoint; pauses double, up to a minute."""
        self._events = frozenset(events)
        self._lines = [
            _Line(endpoint, run_dir=run_dir, within_s=within_s, first_pause_s=first_pause_s) for endpoint in endpoints
        ]
        self._pid = os.getpid()
        self._run_dir = run_dir
        self._closed = False

    def heed(self, entry: Entry) -> None:
        """Tell of this record, if it is one to tell of. Returns at once."""
        if entry.type in self._events and entry.log.endswith(f"/{read.CONTROLLER}"):
            for line in self._lines:
                line.put(entry)

    def begin(self, log: AuditLog, *, failed_too: bool = False) -> None:
        """Begin to tell, with what is in the log and was not told. Raises AuditTamperedError, AuditError.

        With `failed_too`, also what was given up.
        """
        entries = read.entries(self._run_dir, types=_RECORDS)
        left = untold(entries, events=self._events, failed_too=failed_too)
        for line in self._lines:
            line.begin(log, [entry for entry, endpoint in left if endpoint == line.endpoint.id])
        # A loop that is not closed ends here; what it froze on still has to get out.
        atexit.register(self.close)

    def wait(self, within_s: float) -> bool:
        """Wait until everything is told or given up; says whether everything was told. For those who have the time."""
        until = time.monotonic() + within_s
        told = [line.wait(until) for line in self._lines]
        return all(told)

    def close(self) -> None:
        """Try the rest once more, for a few seconds, and record what is left for the next start. May be called twice.

        Does nothing in a forked child, which has none of the threads.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        until = time.monotonic() + _CLOSE_S
        for line in self._lines:
            line.end()
        for line in self._lines:
            line.leave(until)


class _Line:
    """The way to one endpoint: one event after the other, each until it is told or given up."""

    def __init__(self, endpoint: Endpoint, *, run_dir: Path, within_s: float, first_pause_s: float) -> None:
        self.endpoint = endpoint
        self._run_dir = run_dir
        self._within_s = within_s
        self._first_pause_s = first_pause_s
        self._changed = threading.Condition()
        self._queue: deque[Entry] = deque()
        """The first one is under way; it stays until it is settled."""
        self._known: set[str] = set()
        self._ending = self._left = False
        self._failed = False
        self._trouble = ""
        """Why the first one in the queue is not told yet."""
        self._log: AuditLog | None = None
        self._thread: threading.Thread | None = None

    def put(self, entry: Entry) -> None:
        with self._changed:
            if entry.id not in self._known:
                self._known.add(entry.id)
                self._queue.append(entry)
                self._changed.notify_all()

    def begin(self, log: AuditLog, left: Sequence[Entry]) -> None:
        """Begin with what was left, in the order of the log; what was put until now is the end of it."""
        self._log = log
        with self._changed:
            older = [entry for entry in left if entry.id not in self._known]
            self._known.update(entry.id for entry in older)
            self._queue.extendleft(reversed(older))
        name = f"loopguard-notify-{self.endpoint.id[:6]}"
        # A daemon, so that nothing here can keep a process from ending.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def wait(self, until: float) -> bool:
        with self._changed:
            done = self._changed.wait_for(lambda: not self._queue, timeout=max(until - time.monotonic(), 0.0))
            return done and not self._failed

    def end(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def leave(self, until: float) -> None:
        """Wait for the thread as long as there is time, and record what it could not tell."""
        if self._thread is None:
            return  # `begin` was never reached: all of it is in the log, and the next start tells it
        self._thread.join(max(until - time.monotonic(), 0.0))
        with self._changed:
            self._left = True
            rest = list(self._queue)
        for entry in rest:
            reason = self._trouble or "the process ended before it answered"
            self._record("notify.failed", entry, {"reason": reason, "again": True})

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            if not self._deliver(entry):
                return  # the process ends, and the endpoint does not answer: the rest is for the next start
            with self._changed:
                if self._left:
                    return
                self._queue.popleft()
                self._trouble = ""
                self._changed.notify_all()

    def _next(self) -> Entry | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ending)
            return self._queue[0] if self._queue else None

    def _deliver(self, entry: Entry) -> bool:
        """Tell of one record, or give it up; both are recorded. False where that is left to the next start."""
        body = encoded(event(entry, run_dir=self._run_dir))
        tries, pause_s = 0, self._first_pause_s
        until = time.monotonic() + self._within_s
        while True:
            tries += 1
            try:
                answer = self.endpoint.send(entry.id, body)
            except NotToldError as error:
                self._trouble = str(error)
                if not error.for_good and self._ending:
                    return False
                if error.for_good or time.monotonic() + pause_s > until:
                    self._give_up(entry, tries, str(error))
                    return True
            else:
                self._record("notify.sent", entry, {"tries": tries, **answer})
                return True
            with self._changed:
                self._changed.wait_for(lambda: self._ending, timeout=pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _give_up(self, entry: Entry, tries: int, reason: str) -> None:
        self._failed = True
        _LOG.warning("%s was not told of %s: %s", self.endpoint.facts()["to"], entry.type, reason)
        self._record("notify.failed", entry, {"tries": tries, "reason": reason, "again": False})

    def _record(self, name: str, entry: Entry, body: dict[str, Any]) -> None:
        assert self._log is not None
        about = {"event": entry.id, "type": entry.type, **self.endpoint.facts()}
        try:
            self._log.append(name, about | body, cycle=entry.cycle, cause=[entry.id])
        except AuditError as error:
            # The loop meets the same disk at its next gate. Without this record the next start tells it again.
            _LOG.warning("what became of telling %s of %s is not recorded: %s", about["to"], entry.type, error)


def untold(entries: Iterable[Entry], *, events: Collection[str], failed_too: bool = False) -> list[tuple[Entry, str]]:
    """The records that an endpoint should have been told of and was not, oldest first, each with that endpoint's id.

    `policy.loaded` says who was to be told at the time: an endpoint that a later policy names hears nothing of before.
    """
    told_to: list[str] = []
    waiting: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        body = entry.body
        match entry.type:
            case "policy.loaded":
                told_to = [str(one["endpoint"]) for one in body.get("notify", ())]
            case "notify.sent":
                waiting.pop((body["event"], body["endpoint"]), None)
            case "notify.failed" if not body["again"] and not failed_too:
                waiting.pop((body["event"], body["endpoint"]), None)
            case kind if kind in events:
                waiting |= {(entry.id, endpoint): entry for endpoint in told_to}
            case _:
                continue
    return [(entry, endpoint) for (_, endpoint), entry in waiting.items()]


def mirrored(notifier: Notifier | None, mirror: Callable[[Entry], None] | None) -> Callable[[Entry], None] | None:
    """What a log hands its records to: the notifier, and whoever asked for them."""
    if notifier is None:
        return mirror
    if mirror is None:
        return notifier.heed
    heed, show = notifier.heed, mirror

    def both(entry: Entry) -> None:
        heed(entry)
        show(entry)

    return both
