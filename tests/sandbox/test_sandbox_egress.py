"""The way out of a cell: what is not plainly permitted does not get out, and secrets do not get in.

Servers on the loopback stand in for the internet. Names lead to addresses that look public, and connecting to one of
those leads to a server; whether an address is public is judged for real.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import select
import socket
import ssl
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import requests
import trustme
from hypothesis import given
from hypothesis import strategies as st

from loopguard.errors import AuditWriteError, SandboxUnavailableError
from loopguard.sandbox import egress, wire
from loopguard.sandbox.base import EgressRule, shipped
from loopguard.sandbox.egress import ACK, DATA, OPEN, SHUT, WINDOW, Egress, public

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

GOOD, SAFE, OTHER = "93.184.215.14", "93.184.215.15", "8.8.8.8"
RULES = (
    EgressRule(host="good.example", port=80),
    EgressRule(host="good.example", port=8443),
    EgressRule(host="safe.example", port=443),
    EgressRule(host="api.example", port=443, secret_headers=(("Authorization", "API_KEY"), ("X-Team", "TEAM"))),
)
SECRET = "Bearer s3cr3t/k+y-0123456789"
ENVIRON = {"API_KEY": SECRET, "TEAM": "blue-team"}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
GET = b"GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"
CONNECT = b"CONNECT good.example:8443 HTTP/1.1\r\nHost: good.example:8443\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"

NOT_PUBLIC = """
    0.0.0.0 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254 172.16.0.1
    172.31.255.255 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1
    239.255.255.255 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254 64:ff9b:1::8.8.8.8
    100::1 2001::1 2001:db8::1 2002:7f00:1:: 2002:808:808:: 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1
    fe80::1%eth0 fec0::1 ff02::1 2606:4700::1111%eth0
"""

Handler = "Callable[[socket.socket], None]"


def read_head(connection: socket.socket) -> bytes:
    """A request or response head and whatever came with it."""
    data = b""
    while b"\r\n\r\n" not in data and (part := connection.recv(1 << 16)):
        data += part
    return data


def read_all(connection: socket.socket) -> bytes:
    """Everything to the end."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def ends_only(
    events: list[dict[str, Any]], announced: list[dict[str, Any]] | None = None
) -> Callable[[dict[str, Any]], None]:
    """Keeps the events of ended connections, and those of connections that are about to be made apart."""

    def keep(event: dict[str, Any]) -> None:
        if event["result"] != "permitted":
            events.append(event)
        elif announced is not None:
            announced.append(event)

    return keep


class World:
    """A few servers, the names that lead to them, and what was asked of both."""

    def __init__(self) -> None:
        self.names = {"good.example": [GOOD], "safe.example": [SAFE], "api.example": [SAFE], "other.example": [OTHER]}
        self.asked: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self.heads: list[bytes] = []
        self.doors: dict[tuple[str, int], tuple[str, int]] = {}
        self.authority = trustme.CA()
        self.tls = ssl.create_default_context()
        self.authority.configure_trust(self.tls)
        self._open: list[socket.socket] = []
        self._cells: list[Cell] = []

    def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.names[host]

    def connect(self, address: str, port: int, time_s: float) -> socket.socket:
        self.dialled.append((address, port))
        door = self.doors.get((address, port))
        if door is None:
            raise ConnectionRefusedError("nobody listens there")
        return socket.create_connection(door, timeout=time_s)

    def egress(self, rules: Sequence[EgressRule] = RULES, **changes: Any) -> Egress:
        settings = {"resolve": self.resolve, "connect": self.connect, "environ": ENVIRON, "tls": self.tls, **changes}
        return Egress(rules, **settings)

    def cell(self, rules: Sequence[EgressRule] = RULES, **changes: Any) -> Cell:
        """A cell whose calls may reach these places."""
        self._cells.append(Cell(self.egress(rules, **changes)))
        return self._cells[-1]

    def serve(self, address: str, port: int, handler: Handler, *, certificate: str = "", buffer: int = 0) -> None:
        """Have every connection to this address and port handled in a thread of its own."""
        listener = socket.create_server(("127.0.0.1", 0))
        if buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if certificate:
            self.authority.issue_cert(certificate).configure_cert(context)
        self.doors[address, port] = listener.getsockname()
        self._open.append(listener)

        def work(connection: socket.socket) -> None:
            with contextlib.suppress(OSError):
                if certificate:
                    connection = context.wrap_socket(connection, server_side=True)
                with connection:
                    handler(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    self._open.append(connection)
                    threading.Thread(target=work, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def answering(self, answer: bytes = OK) -> Handler:
        """A server that notes the head it gets and says this."""

        def handler(connection: socket.socket) -> None:
            self.heads.append(read_head(connection))
            connection.sendall(answer)

        return handler

    def close(self) -> None:
        for cell in self._cells:
            cell.tunnels.close()
        for each in self._open:
            wire.shut(each)
            each.close()


class Cell:
    """The cell's side: what PID 1 would send and keep. It watches that the controller keeps to the protocol."""

    def __init__(self, out: Egress) -> None:
        self.events: list[dict[str, Any]] = []
        self.data: dict[int, bytearray] = {}
        self.ends: dict[int, str] = {}
        self.unacknowledged: dict[int, int] = {}
        self.frames: list[bytes] = []
        self.acknowledges = True
        self._due: dict[int, int] = {}
        self.announced: list[dict[str, Any]] = []
        self.tunnels = out.tunnels(self._get, ends_only(self.events, self.announced))

    def open(self, data: bytes = b"") -> int:
        """A new connection, and what its client says first."""
        number = len(self.data)
        self.data[number], self.unacknowledged[number] = bytearray(), 0
        self.tunnels.take(OPEN, {"conn": number}, b"")
        self.send(number, data)
        return number

    def send(self, number: int, data: bytes) -> None:
        """Bytes of the client; within the window."""
        for at in range(0, len(data), egress.PIECE):
            piece = data[at : at + egress.PIECE]
            self.unacknowledged[number] += len(piece)
            self.tunnels.take(DATA, {"conn": number}, piece)

    def shut(self, number: int, **more: Any) -> None:
        """The client sends no more."""
        self.tunnels.take(SHUT, {"conn": number, **more}, b"")

    def step(self, wait_s: float = 0.05) -> None:
        """One round of the thread that owns the tunnels."""
        reading, writing = self.tunnels.descriptors()
        deadline = self.tunnels.next_deadline()
        if deadline is not None:
            wait_s = max(0.0, min(wait_s, deadline - time.monotonic()))
        reading, writing, _ = select.select(reading, writing, [], wait_s)
        self.tunnels.ready(reading, writing)
        if self.acknowledges:
            self.acknowledge()

    def acknowledge(self) -> None:
        """Say that everything was handed on."""
        due, self._due = self._due, {}
        for number, size in due.items():
            self.tunnels.take(ACK, {"conn": number, "bytes": size}, b"")

    def until(self, what: Callable[[], object], *, within_s: float = 10) -> None:
        """Go on until something is so."""
        end = time.monotonic() + within_s
        while not what():
            assert time.monotonic() < end, (self.data, self.ends, self.events)
            self.step()

    def rest(self, rounds: int = 5) -> None:
        """Go on for a moment."""
        for _ in range(rounds):
            self.step(0.02)

    def ask(self, data: bytes) -> bytes:
        """A connection that sends this, gets its answer, and hangs up."""
        number = self.open(data)
        self.until(lambda: number in self.ends)
        if self.ends[number] == "shut" and number in self.tunnels._live:
            self.shut(number)
        return bytes(self.data[number])

    @property
    def event(self) -> dict[str, Any]:
        """What was told of the connection that ended last."""
        return self.events[-1]

    def seen(self) -> bytes:
        """Everything that ever came into the cell."""
        return b"".join(self.frames)

    def _get(self, kind: int, header: dict[str, Any], payload: bytes) -> None:
        self.frames.append(wire.encode(kind, header, payload))
        number = header["conn"]
        assert self.ends.get(number) != "reset", "a frame behind a reset"
        if kind == DATA:
            assert number not in self.ends
            assert 0 < len(payload) <= egress.PIECE
            self.data[number] += payload
            self._due[number] = self._due.get(number, 0) + len(payload)
            assert self._due[number] <= WINDOW
        elif kind == ACK:
            self.unacknowledged[number] -= header["bytes"]
            assert self.unacknowledged[number] >= 0
        else:
            assert kind == SHUT
            assert header.get("reset") or number not in self.ends
            self.ends[number] = "reset" if header.get("reset") else "shut"


@pytest.fixture
def world() -> Iterator[World]:
    """Nobody listens yet."""
    world = World()
    yield world
    world.close()


@pytest.fixture
def cell(world: World) -> Cell:
    """A cell whose calls may reach RULES, with a server at each of them."""
    world.serve(GOOD, 80, world.answering())
    world.serve(SAFE, 443, world.answering(), certificate="safe.example")
    return world.cell()


def get(url: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    """A request as a client sends it to its proxy."""
    return "\r\n".join([f"{method} {url} HTTP/1.1", "Host: whatever", *headers, "", ""]).encode("latin-1") + body


class TestPlaces:
    """Which places can be reached."""

    def test_a_connection_is_told_before_it_is_made(self, world):
        """What cannot be recorded does not leave the cell: nothing was dialled when the record failed."""
        world.serve(GOOD, 80, world.answering())

        def full(event: dict[str, Any]) -> None:
            raise AuditWriteError("disk full")

        tunnels = world.egress().tunnels(lambda *_: None, full)
        tunnels.take(OPEN, {"conn": 1}, b"")
        tunnels.take(DATA, {"conn": 1}, GET)
        with pytest.raises(AuditWriteError):
            for _ in range(500):
                readable, writable = tunnels.descriptors()
                found = select.select(readable, writable, [], 0.01)
                tunnels.ready(found[0], found[1])
        assert world.dialled == []
        with contextlib.suppress(AuditWriteError):
            tunnels.close()

    def test_a_permitted_place_is_reached(self, world, cell):
        """The request goes to the address that the name had, the answer comes back, and the record says so."""
        assert cell.ask(GET) == OK
        assert world.dialled == [(GOOD, 80)]
        assert cell.event == {
            "host": "good.example",
            "port": 80,
            "result": "allowed",
            "reason": "",
            "address": GOOD,
            "sent_bytes": len(world.heads[0]),
            "received_bytes": len(OK),
        }

    @pytest.mark.parametrize(
        "url",
        [
            "http://other.example/",
            "http://good.example:81/",
            "http://good.example:443/",
            "http://www.good.example/",
            "http://good.example.evil.example/",
            "http://xgood.example/",
            "http://good.example../",
            "http://safe.example/",
            "http://localhost/",
        ],
    )
    def test_every_other_place_is_refused(self, world, cell, url):
        """Another host, another port, a part of a name: 403, without so much as a look at its address."""
        answer = cell.ask(get(url))
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert answer.endswith(b"\r\n\r\nThis address is not permitted.\n")
        assert (cell.event["result"], cell.event["reason"]) == ("refused", "not in the guard policy")
        assert world.asked == world.dialled == []

    @pytest.mark.parametrize("host", ["GOOD.example", "good.example.", "Good.Example."])
    def test_spellings_of_the_same_name_are_the_same_place(self, world, cell, host):
        """Large letters and the dot of the root change nothing; the host gets the policy's spelling."""
        assert cell.ask(get(f"http://{host}/")) == OK
        assert world.asked == ["good.example"]
        assert b"\r\nHost: good.example\r\n" in world.heads[0]

    @pytest.mark.parametrize(
        "host",
        [
            GOOD,
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0177.0.0.1",
            "0x7f000001",
            "0x7f.0.0.1",
            "0X7F.1",
            "169.254.169.254",
            "169.254.169.254.",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[fd00:ec2::254]",
            "[2606:2800:21f::1]",
        ],
    )
    @pytest.mark.parametrize("form", ["GET http://{}/ HTTP/1.1", "CONNECT {}:80 HTTP/1.1"])
    def test_addresses_are_no_names(self, world, cell, host, form):
        """An address is refused in every spelling that some library would understand."""
        assert b" 403 " in cell.ask(form.format(host).encode() + b"\r\n\r\n")
        assert cell.event["reason"] == "an address, not a name"
        assert world.asked == world.dialled == []

    def test_a_rule_for_an_address_is_refused(self, world):
        """A policy that lists an address, or a name that is none, does not start."""
        for host in ("10.0.0.1", "0x7f.1", "[::1]", "Good.example", "good.example.", "a b", "", "-a.example", "*.a"):
            with pytest.raises(SandboxUnavailableError, match="expected a host name in small letters"):
                world.egress([EgressRule(host=host, port=80)])
        with pytest.raises(SandboxUnavailableError, match="permitted twice"):
            world.egress([RULES[0], RULES[0]])

    def test_without_rules_nothing_is_permitted(self, world):
        """An empty list permits nothing."""
        assert b" 403 " in world.cell([]).ask(GET)

    def test_a_connect_is_judged_alike(self, world, cell):
        """CONNECT opens the ports of the list, and no others."""
        for where in ("good.example:443", "other.example:80", "safe.example:80"):
            assert b" 403 " in cell.ask(f"CONNECT {where} HTTP/1.1\r\n\r\n".encode())
        assert world.dialled == []

    def test_a_redirect_is_only_a_response(self, world, cell):
        """It comes back as it is; where it leads is decided when the client goes there, and the answer is no."""
        world.serve(GOOD, 8443, world.answering(b"HTTP/1.1 302 Found\r\nLocation: http://other.example/\r\n\r\n"))
        assert b"Location: http://other.example/" in cell.ask(get("http://good.example:8443/"))
        assert cell.event["result"] == "allowed"
        assert b" 403 " in cell.ask(get("http://other.example/"))
        assert world.asked == ["good.example"]

    @pytest.mark.parametrize(
        "line", ["GET http://bob:tiger@example.org/ HTTP/1.1", "CONNECT bob:tiger@example.org:443 HTTP/1.1"]
    )
    def test_a_login_in_an_address_is_not_in_the_record(self, cell, line):
        """Without the scheme before it nobody knows any more that it is one."""
        cell.ask(f"{line}\r\nHost: example.org\r\n\r\n".encode())
        assert (cell.event["result"], cell.event["reason"]) == ("refused", "not a host and a port")
        assert cell.event["host"].startswith("example.org")

    def test_names_of_models_are_bounded_in_the_record(self, cell):
        """A name in a record is printable ASCII of a bounded length, whatever was sent."""
        cell.ask(get("http://" + "a" * 3000 + "/"))
        assert cell.event["host"] == "a" * 200
        cell.ask(get('http://x"\\<script>/'))
        assert cell.event["host"].isascii()
        assert cell.event["host"].isprintable()
        assert all(len(json.dumps(event)) < 1000 for event in cell.events)


class TestAddresses:
    """Where names may lead."""

    @pytest.mark.parametrize(
        "address",
        NOT_PUBLIC.split(),
    )
    def test_an_address_that_is_not_public_is_known_as_such(self, address):
        """Private, local, shared, documentation, multicast, metadata, and those wrapped in another form."""
        assert not public(address)

    @pytest.mark.parametrize("address", ["8.8.8.8", GOOD, "172.32.0.1", "2606:4700::1111", "64:ff9b::8.8.8.8"])
    def test_a_public_address_is_known_as_such(self, address):
        """Both families, and IPv4 as seen from a network without it."""
        assert public(address)

    @pytest.mark.parametrize("text", ["", "localhost", "127.1", "0x7f000001", "010.0.0.1", "8.8.8.8:80", "2130706433"])
    def test_what_is_no_address_is_not_public(self, text):
        """A resolver that gives anything else is not believed."""
        assert not public(text)

    @given(st.ip_addresses(v=4))
    def test_an_address_is_the_same_in_an_ipv6_coat(self, address):
        """What is not public does not become so by translation, and a mapped address is never taken."""
        assert public(f"64:ff9b::{address}") == public(str(address))
        assert not public(f"::ffff:{address}")

    @pytest.mark.parametrize("answer", [["10.0.0.7"], [GOOD, "10.0.0.7"], ["::1", GOOD], [GOOD, "fe80::1%eth0"]])
    def test_one_address_that_is_not_public_spoils_the_name(self, world, cell, answer):
        """A name that leads inside, even among others, is refused as a whole, and the record says where it led."""
        world.names["good.example"] = answer
        assert b" 403 " in cell.ask(GET)
        assert cell.event["result"] == "refused"
        assert cell.event["reason"] == "the name leads to an address that is not public"
        assert cell.event["address"] in answer
        assert not public(cell.event["address"])
        assert world.dialled == []

    def test_a_name_is_asked_once(self, world):
        """A second look would lead inside; there is none, and the connection is made by the address."""
        answers = iter([[GOOD], ["127.0.0.1"]])
        world.serve(GOOD, 80, world.answering())
        cell = world.cell(resolve=lambda host, port: next(answers))
        assert cell.ask(GET) == OK
        assert world.dialled == [(GOOD, 80)]
        assert next(answers) == ["127.0.0.1"]

    def test_the_next_address_is_tried(self, world, cell):
        """Where one address does not answer, the next may."""
        world.names["good.example"] = ["2606:4700::1111", GOOD]
        assert cell.ask(GET) == OK
        assert world.dialled == [("2606:4700::1111", 80), (GOOD, 80)]
        assert cell.event["address"] == GOOD

    def test_this_machine_is_not_reached_by_its_own_address(self):
        """A public address of the controller's own machine is as local as 127.0.0.1."""
        with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(Exception, match="this machine"):
            egress._connect("127.0.0.1", listener.getsockname()[1], 5)

    def test_a_name_without_an_address_fails(self, world, cell):
        """No answer, an error of the resolver and a dead host are failures, and the cell gets a 502."""
        world.names["good.example"] = []
        assert b" 502 " in cell.ask(GET)
        del world.names["good.example"]
        assert b" 502 " in cell.ask(GET)
        world.names["good.example"] = [OTHER]
        assert b" 502 " in cell.ask(GET)
        assert [event["result"] for event in cell.events] == ["failed"] * 3
        assert cell.events[0]["reason"] == "the name has no address"
        assert cell.events[1]["reason"] == "KeyError: 'good.example'"
        assert cell.events[2]["reason"] == "ConnectionRefusedError: nobody listens there"
        assert b"KeyError" not in cell.seen()

    @pytest.mark.parametrize("slow", ["resolve", "connect"])
    def test_a_hanging_resolver_or_host_is_given_up(self, world, cell, monkeypatch, slow):
        """Past its deadline the connection fails; what the worker finds later is closed."""
        monkeypatch.setattr(egress, "RESOLVE_S", 0.05)
        monkeypatch.setattr(egress, "CONNECT_S", 0.05)
        late, found = threading.Event(), []

        def hang(*args: Any) -> Any:
            late.wait(10)
            found.append(getattr(world, slow)(*args))
            return found[0]

        cell = world.cell(**{slow: hang})
        assert b" 502 " in cell.ask(GET)
        assert "in time" in cell.event["reason"]
        late.set()
        cell.until(lambda: found)
        if slow == "connect":
            cell.until(lambda: found[0].fileno() < 0)
        assert not any(world.heads)


class TestRequests:
    """What is understood, and that everything else is not."""

    @pytest.mark.parametrize(
        "request_head",
        [
            b"GET / HTTP/1.1\r\nHost: good.example\r\n\r\n",
            b"GET https://good.example/ HTTP/1.1\r\n\r\n",
            b"GET HTTP://good.example/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example/ HTTP/2.0\r\n\r\n",
            b"GET http://good.example/\r\n\r\n",
            b"GET  http://good.example/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1 \r\n\r\n",
            b"GET http://good.example/#x HTTP/1.1\r\n\r\n",
            b"GET http://good.example/\x00 HTTP/1.1\r\n\r\n",
            b"GET http://good.example/\xff HTTP/1.1\r\n\r\n",
            b"GET http://me@good.example/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example@other.example/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example\\@other.example/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example:/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example:+80/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example:080/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example:65616/ HTTP/1.1\r\n\r\n",
            b"GET http://good.example:8 0/ HTTP/1.1\r\n\r\n",
            b"GET http://good%2eexample/ HTTP/1.1\r\n\r\n",
            b"GET http:///x HTTP/1.1\r\n\r\n",
            b"\r\n" + GET,
            b"TRACE http://good.example/ HTTP/1.1\r\n\r\n",
            b"trace http://good.example/ HTTP/1.1\r\n\r\n",
            b"connect http://good.example/ HTTP/1.1\r\n\r\n",
            b"CONNECT http://good.example/ HTTP/1.1\r\n\r\n",
            b"CONNECT good.example HTTP/1.1\r\n\r\n",
            b"CONNECT good.example:8443 HTTP/1.1\r\nContent-Length: 4\r\n\r\n",
            b"CONNECT a@good.example:8443 HTTP/1.1\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\nHost: good.example\n\n",
            b"GET http://good.example/ HTTP/1.1\r\nA: b\nHost: good.example\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\nA: b\rc\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\n A: b\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\nA : b\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\nA\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\n: b\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\nA: b\x00\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"POST http://good.example/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
            b"POST http://good.example/ HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\nx",
            b"POST http://good.example/ HTTP/1.1\r\nContent-Length: +1\r\n\r\nx",
            b"POST http://good.example/ HTTP/1.1\r\nContent-Length: 0x1\r\n\r\nx",
            b"POST http://good.example/ HTTP/1.1\r\nContent-Length: -1\r\n\r\nx",
            b"POST http://good.example/ HTTP/1.1\r\nContent-Length:\r\n\r\nx",
            b"POST http://good.example/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST http://good.example/ HTTP/1.1\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
            b"POST http://good.example/ HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"POST http://good.example/ HTTP/1.1\r\nTransfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST http://good.example/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET http://good.example/ HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\n",
        ],
    )
    def test_what_is_in_neither_form_is_refused(self, world, cell, request_head):
        """400, a record, and nobody was asked for anything: two parsers never get to disagree."""
        assert cell.ask(request_head).startswith(b"HTTP/1.1 400 ")
        assert cell.event["result"] == "refused"
        assert cell.event["reason"]
        assert world.asked == world.dialled == []

    @given(data=st.binary(max_size=200))
    def test_garbage_opens_nothing(self, data):
        """Whatever bytes a client sends, without a permitted place nothing is looked up."""
        world = World()
        cell = world.cell()
        number = cell.open(data)
        cell.shut(number)
        assert cell.ends[number] == "shut"
        assert len(cell.events) == 1
        assert world.asked == []
        world.close()

    def test_only_the_decided_host_is_named(self, world, cell):
        """The Host header of the client is replaced, and nothing between client and proxy goes on."""
        cell.ask(
            get(
                "http://good.example/a?b=c",
                "Proxy-Authorization: Basic x",
                "Proxy-Connection: keep-alive",
                "Connection: keep-alive, X-Hop",
                "X-Hop: 1",
                "Keep-Alive: 5",
                "TE: trailers",
                "Trailer: X",
                "Upgrade: websocket",
                "HTTP2-Settings: x",
                "Transfer_Encoding: chunked",
                "X-Own:  kept as it is ",
            )
        )
        assert world.heads == [
            b"GET /a?b=c HTTP/1.1\r\nHost: good.example\r\nX-Own: kept as it is\r\nConnection: close\r\n\r\n"
        ]

    @pytest.mark.parametrize(
        ("url", "path"),
        [("http://good.example", b"/"), ("http://good.example?x=/", b"/?x=/"), ("http://good.example/?", b"/?")],
    )
    def test_a_path_begins_with_a_slash(self, world, cell, url, path):
        """What a client leaves out between host and query is put back."""
        cell.ask(get(url))
        assert world.heads[0].startswith(b"GET " + path + b" HTTP/1.1\r\n")

    def test_an_unusual_port_is_named_to_the_host(self, world, cell):
        """Host headers carry a port where it is not the usual one."""
        world.serve(GOOD, 8443, world.answering())
        cell.ask(get("http://good.example:8443/"))
        assert b"\r\nHost: good.example:8443\r\n" in world.heads[0]

    @pytest.mark.parametrize(
        ("headers", "body"),
        [
            ([], b""),
            (["Content-Length: 0"], b""),
            (["Content-Length: 5"], b"hello"),
            (["Transfer-Encoding: Chunked"], b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n"),
        ],
    )
    @pytest.mark.parametrize("cut", [1, 7, 1 << 16])
    def test_a_second_request_does_not_ride_along(self, world, cell, headers, body, cut):
        """The body goes on to its last byte, and what follows it is dropped, wherever the stream is cut."""
        got = []

        def handler(connection: socket.socket) -> None:
            data = read_head(connection)
            while not data.endswith(b"\r\n\r\n" + body):
                data += connection.recv(1 << 16)
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                data += connection.recv(1 << 16)
            got.append(data)
            connection.sendall(OK)

        world.serve(GOOD, 8443, handler)
        data = get("http://good.example:8443/", *headers, method="POST", body=body) + get("http://other.example/")
        number = cell.open()
        for at in range(0, len(data), cut):
            cell.send(number, data[at : at + cut])
        cell.until(lambda: number in cell.ends)
        assert bytes(cell.data[number]) == OK
        assert got[0].partition(b"\r\n\r\n")[2] == body
        assert b"other.example" not in got[0]
        assert cell.unacknowledged[number] == 0

    @pytest.mark.parametrize(
        "body",
        [
            b"3;ext=1\r\nabc\r\n",
            b"3 \r\nabc\r\n",
            b"0x3\r\nabc\r\n",
            b"-3\r\nabc\r\n",
            b"+3\r\nabc\r\n",
            b"3\nabc\r\n",
            b"\r\n",
            b"3\r\nabcd\r\n",
            b"3\r\nabc\n0\r\n\r\n",
            b"FFFFFFFFFF\r\n",
            b"0\r\nTrailer: x\r\n\r\n",
        ],
    )
    def test_chunks_in_any_but_the_plainest_form_end_the_connection(self, world, cell, body):
        """Sizes, ends and trailers that parsers read differently are read by nobody."""
        done = []
        world.serve(GOOD, 8443, lambda connection: done.append(read_all(connection)))
        answer = cell.ask(
            get("http://good.example:8443/", "Transfer-Encoding: chunked", method="POST", body=body + b"x" * 10)
        )
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert cell.event["result"] == "refused"
        assert "chunk" in cell.event["reason"]

    def test_a_body_that_ends_too_early_is_not_completed(self, world, cell):
        """A client that stops in the middle of its body gets no answer, and the host no whole request."""
        world.serve(GOOD, 8443, lambda connection: read_all(connection) and connection.sendall(OK))
        number = cell.open(get("http://good.example:8443/", "Content-Length: 10", method="POST", body=b"12345"))
        cell.shut(number)
        cell.until(lambda: cell.events)
        assert b" 502 " in cell.data[number]
        assert cell.event["reason"] == "the request ended before its body did"

    def test_a_slow_head_is_not_waited_for(self, cell, monkeypatch):
        """A head that is not whole in time is refused, also where a byte comes now and then."""
        monkeypatch.setattr(egress, "HEAD_S", 0.2)
        number = cell.open()
        for byte in GET[:20]:
            cell.send(number, bytes([byte]))
            cell.step(0.02)
            if number in cell.ends:
                break
        cell.until(lambda: number in cell.ends)
        assert b" 400 " in cell.data[number]
        silent = cell.open()
        cell.until(lambda: silent in cell.ends)
        assert cell.ends[silent] == "reset"
        assert cell.event["reason"] == "no request"

    def test_a_huge_head_is_not_kept(self, cell):
        """More than 16 KiB of head are refused at once; just below they are fine."""
        padding = egress.MAX_HEAD - len(GET) - len("A: \r\n")
        assert cell.ask(get("http://good.example/", "A: " + "x" * (padding - 10))) == OK
        assert b" 400 " in cell.ask(b"GET http://good.example/" + b"x" * (1 << 17))
        assert cell.event["reason"] == "a request head of more than 16 KiB"

    def test_an_answer_is_not_waited_upon_for_ever(self, cell, monkeypatch):
        """A client that does not hang up after its answer is hung up on."""
        monkeypatch.setattr(egress, "LINGER_S", 0.05)
        number = cell.open(get("http://other.example/"))
        assert cell.ends[number] == "shut"
        assert cell.events == []
        cell.until(lambda: cell.events)
        assert cell.ends[number] == "reset"
        assert cell.event["result"] == "refused"


class TestSecrets:
    """Secrets are added outside, sent to their host alone, and seen by nobody else."""

    def api(self, world: World, answer: bytes = OK) -> Cell:
        """A cell that may use an API, and the API."""
        world.names["api.example"] = [OTHER]
        world.serve(OTHER, 443, world.answering(answer), certificate="api.example")
        return world.cell()

    def test_a_secret_is_added_for_its_place(self, world):
        """A plain request becomes one over TLS with the secret headers; the cell sees none of it."""
        cell = self.api(world)
        assert cell.ask(get("http://api.example:443/v1?x=y", "Accept: */*")) == OK
        assert world.heads == [
            b"GET /v1?x=y HTTP/1.1\r\nHost: api.example\r\nAccept: */*\r\nAuthorization: "
            + SECRET.encode()
            + b"\r\nX-Team: blue-team\r\nConnection: close\r\n\r\n"
        ]
        assert SECRET.encode() not in cell.seen()
        assert SECRET not in json.dumps(cell.events)
        assert cell.event["sent_bytes"] == len(world.heads[0])

    def test_the_cells_own_header_of_that_name_is_replaced(self, world):
        """In every spelling that a server could take for the same header."""
        cell = self.api(world)
        cell.ask(get("http://api.example:443/", "AUTHORIZATION: mine", "x_team: red", "Connection: Authorization"))
        assert world.heads[0].count(b"\r\nAuthorization: ") == 1
        assert b"mine" not in world.heads[0]
        assert b"red" not in world.heads[0]

    def test_a_secret_goes_nowhere_else(self, world, cell):
        """Another place gets nothing, not even one with TLS, one with the same address, or one redirected to."""
        assert cell.ask(get("http://safe.example:443/")) == OK
        assert cell.ask(GET) == OK
        assert len(world.heads) == 2
        assert not any(b"Authorization" in head or b"s3cr3t" in head for head in world.heads)

    def test_a_certificate_of_another_name_gets_no_secret(self, world, cell):
        """The host has to prove its name before anything is sent to it."""
        assert b" 502 " in cell.ask(get("http://api.example:443/"))
        assert "CERTIFICATE_VERIFY_FAILED" in cell.event["reason"]
        assert world.dialled == [(SAFE, 443)]
        assert world.heads == []

    def test_an_unknown_authority_gets_no_secret(self, world):
        """A certificate that the system does not trust is as good as none."""
        self.api(world)
        cell = world.cell(tls=None)
        assert b" 502 " in cell.ask(get("http://api.example:443/"))
        assert world.heads == []

    def test_a_connect_gets_no_secret(self, world):
        """A tunnel to the place is permitted; nothing is added, and what goes through it is the client's own."""
        world.names["api.example"] = [OTHER]
        world.serve(OTHER, 443, world.answering())
        cell = world.cell()
        number = cell.open(b"CONNECT api.example:443 HTTP/1.1\r\n\r\n")
        cell.until(lambda: cell.data[number])
        cell.send(number, b"GET / HTTP/1.1\r\n\r\n")
        cell.until(lambda: number in cell.ends)
        assert world.heads == [b"GET / HTTP/1.1\r\n\r\n"]
        assert bytes(cell.data[number]) == ESTABLISHED + OK

    @pytest.mark.parametrize(
        "header",
        [
            f"X-You-Sent: {SECRET}",
            f"Location: http://other.example/?k={SECRET.split()[1]}",
            "Location: http://other.example/?k=Bearer%20s3cr3t%2Fk%2By-0123456789",
            "X-Team-Was: blue-team",
        ],
    )
    @pytest.mark.parametrize("interim", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"])
    def test_a_response_head_that_repeats_a_secret_is_kept_back(self, world, header, interim):
        """Whole, by its long word, or in percent signs: the cell gets a 502 and the record says why."""
        cell = self.api(world, interim + b"HTTP/1.1 302 Found\r\n" + header.encode() + b"\r\n\r\n")
        assert b" 502 " in cell.ask(get("http://api.example:443/"))
        assert (cell.event["result"], cell.event["reason"]) == ("failed", "the response head holds a secret")
        assert cell.event["received_bytes"] > 0
        assert b"s3cr3t" not in cell.seen()
        assert b"blue-team" not in cell.seen()

    def test_a_secret_that_comes_in_pieces_is_kept_back(self, world):
        """A head is looked at as a whole, however it was cut on its way."""

        def handler(connection: socket.socket) -> None:
            read_head(connection)
            for byte in b"HTTP/1.1 200 OK\r\nX: " + SECRET.encode() + b"\r\n\r\n":
                connection.sendall(bytes([byte]))

        cell = self.api(world)
        world.serve(OTHER, 443, handler, certificate="api.example")
        assert b" 502 " in cell.ask(get("http://api.example:443/"))
        assert cell.event["reason"] == "the response head holds a secret"

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (b"hello\r\n\r\n", "the response begins with no status line"),
            (b"HTTP/1.1  100\r\n\r\n", "the response begins with no status line"),
            (b"HTTP/1.1 200 OK\nX: " + SECRET.encode() + b"\n\nbody", "the response ended before its head did"),
            (b"HTTP/1.1 200 OK\r\nA: " + b"x" * (65 << 10), "a response head of more than 64 KiB"),
            (b"", "the response ended before its head did"),
        ],
    )
    def test_a_response_head_that_cannot_be_read_is_kept_back(self, world, answer, reason):
        """Where secrets are sent, a head is passed on when it was understood, or not at all."""
        cell = self.api(world, answer)
        assert b" 502 " in cell.ask(get("http://api.example:443/"))
        assert cell.event["reason"] == reason

    def test_an_interim_response_passes(self, world):
        """100 Continue and the like go through as they are."""
        answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK
        assert self.api(world, answer).ask(get("http://api.example:443/")) == answer

    def test_secrets_stay_out_of_tracebacks(self, world):
        """What could end up in a log or a traceback shows no secret."""
        place = world.egress().place("api.example", 443)
        assert "s3cr3t" not in repr(place)

    @pytest.mark.parametrize("value", [None, "", " "])
    def test_a_missing_secret_stops_the_start(self, world, value):
        """The error names the variable."""
        environ = {"TEAM": "x"} | ({} if value is None else {"API_KEY": value})
        with pytest.raises(SandboxUnavailableError, match="environment variable API_KEY, which is not set"):
            world.egress(environ=environ)

    @pytest.mark.parametrize(
        "value", ["s3cr3t\r\nX: y", "s3cr3t\n", "s3cr3t\x00", "s3cr3t€", " s3cr3t", "s3cr3t\udcff"]
    )
    def test_a_secret_that_is_no_header_stops_the_start(self, world, value):
        """The error names the variable and not what it holds."""
        with pytest.raises(SandboxUnavailableError, match="API_KEY holds what no header can") as caught:
            world.egress(environ={**ENVIRON, "API_KEY": value})
        assert "s3cr3t" not in str(caught.value)

    @pytest.mark.parametrize(
        "header", ["Host", "content_length", "Connection", "Proxy-Authorization", "a b", "X\r\nY", ""]
    )
    def test_a_header_of_the_proxy_itself_is_no_secret(self, world, header):
        """Secrets cannot change where a request goes or where it ends."""
        with pytest.raises(SandboxUnavailableError, match="cannot be a secret header"):
            world.egress([EgressRule(host="a.example", port=443, secret_headers=((header, "TEAM"),))])

    def test_plain_requests_to_443_are_encrypted(self, world, cell):
        """Also without a secret; the response comes back as it is."""
        assert cell.ask(get("http://safe.example:443/")) == OK
        assert b"\r\nHost: safe.example\r\n" in world.heads[0]


class TestStreams:
    """Bytes both ways: all of them, in order, and never too many at once."""

    def test_half_a_close_goes_both_ways(self, world, cell):
        """A client that sends no more still gets its answer; the host sees the end of what it sent."""

        def handler(connection: socket.socket) -> None:
            data = read_all(connection)
            connection.sendall(b"got " + data)

        world.serve(GOOD, 8443, handler)
        number = cell.open(CONNECT + b"early ")
        cell.until(lambda: cell.data[number])
        cell.send(number, b"and late")
        cell.shut(number)
        cell.until(lambda: cell.events)
        assert bytes(cell.data[number]) == ESTABLISHED + b"got early and late"
        assert cell.ends[number] == "shut"
        assert (cell.event["result"], cell.event["sent_bytes"], cell.event["received_bytes"]) == ("allowed", 14, 18)

    def test_a_host_that_says_no_more_still_listens(self, world, cell):
        """The other half of a close: what the client sends afterwards arrives."""
        heard = []

        def handler(connection: socket.socket) -> None:
            connection.sendall(b"over to you")
            connection.shutdown(socket.SHUT_WR)
            heard.append(read_all(connection))

        world.serve(GOOD, 8443, handler)
        number = cell.open(CONNECT)
        cell.until(lambda: number in cell.ends)
        assert cell.ends[number] == "shut"
        assert cell.events == []
        cell.send(number, b"thank you")
        cell.shut(number)
        cell.until(lambda: heard)
        assert heard == [b"thank you"]
        assert cell.event["result"] == "allowed"
        assert cell.ends[number] == "shut"

    def test_a_client_that_shuts_after_its_request_gets_the_answer(self, world, cell):
        """Half a close behind a whole request is not passed on: many servers take it for a whole one."""
        ended = []

        def handler(connection: socket.socket) -> None:
            read_head(connection)
            connection.settimeout(0.1)
            try:
                ended.append(connection.recv(1))
            except TimeoutError:
                connection.sendall(OK)

        world.serve(GOOD, 8443, handler)
        number = cell.open(get("http://good.example:8443/"))
        cell.shut(number)
        cell.until(lambda: cell.events)
        assert bytes(cell.data[number]) == OK
        assert ended == []

    @pytest.mark.parametrize("certificate", ["", "safe.example"])
    def test_a_slow_reader_in_the_cell_stops_the_host(self, world, certificate):
        """Without acknowledgement the cell gets a window and no more; each acknowledgement brings as much again."""
        big = bytes(range(256)) * 8000
        head = b"HTTP/1.1 200 OK\r\n\r\n"

        def handler(connection: socket.socket) -> None:
            read_head(connection)
            connection.sendall(head + big)

        world.serve(SAFE if certificate else GOOD, 443 if certificate else 80, handler, certificate=certificate)
        cell = world.cell()
        cell.acknowledges = False
        number = cell.open(get("http://safe.example:443/") if certificate else GET)
        cell.until(lambda: len(cell.data[number]) == WINDOW)
        tracemalloc.start()
        cell.rest()
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(cell.data[number]) == WINDOW
        assert held < WINDOW
        cell._due[number] -= 1000
        cell.tunnels.take(ACK, {"conn": number, "bytes": 1000}, b"")
        cell.until(lambda: len(cell.data[number]) == WINDOW + 1000)
        cell.rest()
        assert len(cell.data[number]) == WINDOW + 1000
        cell.acknowledge()
        cell.acknowledges = True
        cell.until(lambda: number in cell.ends)
        assert bytes(cell.data[number]) == head + big

    @pytest.mark.parametrize("certificate", ["", "safe.example"])
    def test_a_slow_reader_outside_stops_the_cell(self, world, certificate):
        """Unread bytes are not acknowledged, and a cell that sends on all the same is no cell of ours."""
        go, digests = threading.Event(), []
        size = 6 << 20
        body = bytes(range(256)) * (size // 256)

        def handler(connection: socket.socket) -> None:
            data = read_head(connection).partition(b"\r\n\r\n")[2]
            go.wait(10)
            while len(data) < size:
                data += connection.recv(1 << 20)
            digests.append(hashlib.sha256(data).digest())
            connection.sendall(OK)

        where = (SAFE, 443) if certificate else (GOOD, 80)
        world.serve(*where, handler, certificate=certificate, buffer=1 << 14)
        cell = world.cell()
        url = "http://safe.example:443/" if certificate else "http://good.example/"
        number = cell.open(get(url, f"Content-Length: {size}", method="POST"))
        cell.until(lambda: world.dialled)
        tracemalloc.start()
        at = stalled = 0
        while stalled < 5:
            room = min(WINDOW - cell.unacknowledged[number], size - at)
            stalled = 0 if room else stalled + 1
            cell.send(number, body[at : at + room])
            at += room
            cell.step(0.02)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert at < size
        assert cell.unacknowledged[number] == WINDOW
        assert held < 512 << 10
        go.set()
        while at < size:
            room = min(WINDOW - cell.unacknowledged[number], size - at)
            cell.send(number, body[at : at + room])
            at += room
            cell.step(0.02)
        cell.until(lambda: number in cell.ends)
        assert digests == [hashlib.sha256(body).digest()]
        assert bytes(cell.data[number]) == OK

    def test_the_window_is_a_wall(self, world):
        """One byte more than the window ends the cell."""
        wait = threading.Event()
        cell = world.cell(resolve=lambda *_: wait.wait(10) and [GOOD])
        number = cell.open(get("http://good.example/", f"Content-Length: {WINDOW}", method="POST"))
        cell.send(number, bytes(WINDOW))
        with pytest.raises(wire.ProtocolError, match="256 KiB ahead"):
            cell.send(number, b"x")
        wait.set()

    def test_a_host_that_falls_silent_is_left(self, world, cell, monkeypatch):
        """An idle connection does not stay for ever."""
        monkeypatch.setattr(egress, "IDLE_S", 0.1)
        go = threading.Event()
        world.serve(GOOD, 8443, lambda connection: go.wait(10))
        number = cell.open(CONNECT)
        cell.until(lambda: cell.events)
        assert cell.ends[number] == "reset"
        assert (cell.event["result"], cell.event["reason"]) == ("failed", "idle for too long")
        go.set()

    def test_a_host_that_breaks_off_is_a_reset(self, world, cell):
        """A connection that breaks in the middle does not look like one that ended."""

        def handler(connection: socket.socket) -> None:
            read_head(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            go.wait(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        go = threading.Event()
        world.serve(GOOD, 8443, handler)
        number = cell.open(get("http://good.example:8443/"))
        cell.until(lambda: cell.data[number])
        go.set()
        cell.until(lambda: cell.events)
        assert cell.ends[number] == "reset"
        assert cell.event["result"] == "failed"
        assert "ConnectionResetError" in cell.event["reason"]

    @pytest.mark.parametrize("behind", [False, True])
    def test_a_cell_that_resets_ends_the_connection(self, world, cell, behind):
        """SHUT with a reset ends the connection outside as well, also behind a SHUT without one."""
        ended = threading.Event()

        def handler(connection: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection.sendall(b"tick")
                    time.sleep(0.01)
            ended.set()

        world.serve(GOOD, 8443, handler)
        number = cell.open(CONNECT)
        cell.until(lambda: cell.data[number])
        if behind:
            cell.shut(number)
        cell.shut(number, reset=True)
        assert ended.wait(5)
        assert (cell.event["result"], cell.event["reason"]) == ("allowed", "the cell hung up")
        assert number not in cell.ends


class TestTunnels:
    """Many connections, and the end of them."""

    def test_the_seventeenth_connection_is_reset(self, world, cell):
        """Sixteen at once; where one ends, another may begin."""
        numbers = [cell.open() for _ in range(17)]
        assert cell.ends == {numbers[16]: "reset"}
        assert cell.event["result"] == "refused"
        assert cell.event["reason"] == "more than 16 connections at once"
        cell.shut(numbers[0])
        assert cell.ask(GET) == OK

    def test_a_call_makes_so_many_connections_and_no_more(self, cell, monkeypatch):
        """A flood of connections is not a flood of records."""
        monkeypatch.setattr(egress, "MAX_EVER", 3)
        for _ in range(10):
            number = cell.open()
            if number not in cell.ends:
                cell.shut(number)
        assert [event["reason"] for event in cell.events] == [
            *["no request"] * 3,
            "more than 3 connections of one call; those after it are refused unrecorded",
        ]
        assert list(cell.ends.values()) == ["shut"] * 3 + ["reset"] * 7

    def test_connections_do_not_get_into_each_others_way(self, world, cell):
        """While one hangs and one fails, the others are answered."""
        go = threading.Event()
        world.serve(GOOD, 8443, lambda connection: go.wait(10))
        hanging = cell.open(CONNECT)
        numbers = [cell.open(GET) for _ in range(10)]
        bad = cell.open(b"nonsense\n")
        cell.until(lambda: all(number in cell.ends for number in [*numbers, bad]))
        assert all(bytes(cell.data[number]) == OK for number in numbers)
        assert hanging not in cell.ends
        go.set()

    def test_close_ends_everything_at_once(self, world):
        """Open connections break off, those to be made are not, each has its record; the cell hears nothing more."""
        broken, hang = threading.Event(), threading.Event()

        def handler(connection: socket.socket) -> None:
            connection.sendall(b"hello")
            try:
                read_all(connection)
            except ConnectionResetError:
                broken.set()

        world.serve(GOOD, 8443, handler)
        world.serve(GOOD, 80, world.answering())
        cell = world.cell(resolve=lambda host, port: hang.wait(10) and [GOOD] if port == 80 else [GOOD])
        tunnel = cell.open(CONNECT)
        cell.until(lambda: cell.data[tunnel].endswith(b"hello"))
        cell.open(GET)
        cell.open()
        cell.rest(2)
        frames = len(cell.frames)
        cell.tunnels.close()
        cell.tunnels.close()
        assert broken.wait(5)
        hang.set()
        time.sleep(0.1)
        assert world.dialled == [(GOOD, 8443)]
        assert len(cell.frames) == frames
        assert [(event["result"], event["reason"]) for event in cell.events] == [
            ("allowed", "the call ended"),
            ("failed", "the call ended"),
            ("failed", "the call ended"),
        ]
        assert cell.tunnels.descriptors() == ([], [])
        assert cell.tunnels.next_deadline() is None
        cell.tunnels.ready([], [])
        cell.tunnels.take(DATA, {"conn": tunnel}, b"late")

    def test_close_in_the_middle_of_a_handshake(self, world):
        """A host that never answers a handshake keeps no connection and no thread."""
        ended = threading.Event()

        def handler(connection: socket.socket) -> None:
            read_all(connection)
            ended.set()

        world.serve(SAFE, 443, handler)
        cell = world.cell()
        cell.open(get("http://safe.example:443/"))
        cell.until(lambda: world.dialled)
        time.sleep(0.05)
        cell.tunnels.close()
        assert ended.wait(5)

    def test_a_record_that_cannot_be_written_is_raised(self, world, cell):
        """What the log or the stream to the cell raises is not taken for a failure of the connection."""
        broken = world.egress()

        def full(*_: object) -> None:
            raise AuditWriteError("disk full")

        tunnels = broken.tunnels(lambda *_: None, full)
        tunnels.take(OPEN, {"conn": 0}, b"")
        with pytest.raises(AuditWriteError):
            tunnels.take(SHUT, {"conn": 0}, b"")
        tunnels.close()
        lost = broken.tunnels(full, lambda _: None)
        lost.take(OPEN, {"conn": 0}, b"")
        with pytest.raises(AuditWriteError):
            lost.take(DATA, {"conn": 0}, b"GET\n")
        lost.close()

    def test_nothing_waits(self, world, cell):
        """With a resolver that hangs, taking a frame and going on return at once."""
        go = threading.Event()
        cell = world.cell(resolve=lambda *_: go.wait(10) and [GOOD])
        started = time.monotonic()
        for _ in range(16):
            cell.open(GET)
            cell.tunnels.ready([], [])
        assert time.monotonic() - started < 5
        go.set()

    def test_more_jobs_than_workers_are_all_done(self):
        """Jobs beyond the number of threads wait their turn, and the threads leave afterwards."""
        workers, done, go = egress._Workers(2), [], threading.Event()
        for number in range(20):
            workers.do(lambda number=number: (go.wait(10), done.append(number)))
        assert workers._running == 2
        go.set()
        end = time.monotonic() + 5
        while workers._running and time.monotonic() < end:
            time.sleep(0.01)
        assert sorted(done) == list(range(20))
        assert workers._running == 0

    @pytest.mark.parametrize(
        ("kind", "header", "payload"),
        [
            (1, {"conn": 1}, b""),
            (9, {"conn": 1}, b""),
            (OPEN, {}, b""),
            (OPEN, {"conn": "1"}, b""),
            (OPEN, {"conn": True}, b""),
            (OPEN, {"conn": 1.0}, b""),
            (OPEN, {"conn": -1}, b""),
            (OPEN, {"conn": 1 << 60}, b""),
            (OPEN, {"conn": None}, b""),
            (OPEN, {"conn": 0}, b""),
            (OPEN, {"conn": 1, "host": "x"}, b""),
            (OPEN, {"conn": 1}, b"x"),
            (DATA, {"conn": 0}, b""),
            (DATA, {"conn": 0}, bytes((64 << 10) + 1)),
            (DATA, {"conn": 7}, b"x"),
            (DATA, {"conn": 0, "reset": True}, b"x"),
            (SHUT, {"conn": 0}, b"x"),
            (SHUT, {"conn": 0, "reset": 1}, b""),
            (SHUT, {"conn": 7}, b""),
            (ACK, {"conn": 0}, b""),
            (ACK, {"conn": 0, "bytes": 0}, b""),
            (ACK, {"conn": 0, "bytes": -1}, b""),
            (ACK, {"conn": 0, "bytes": True}, b""),
            (ACK, {"conn": 0, "bytes": 1}, b""),
            (ACK, {"conn": 0, "bytes": 1}, b"x"),
        ],
    )
    def test_a_malformed_frame_is_an_error(self, world, kind, header, payload):
        """No PID 1 of ours sends it, so whoever did cannot be trusted again."""
        cell = world.cell()
        cell.open()
        with pytest.raises(wire.ProtocolError):
            cell.tunnels.take(kind, header, payload)

    def test_bytes_behind_the_end_are_an_error(self, world):
        """A side that has shut says nothing more."""
        cell = world.cell()
        number = cell.open(b"CONNECT good.example:80 HTTP/1.1\r\n\r\n")
        cell.shut(number)
        for kind, payload in ((DATA, b"x"), (SHUT, b"")):
            with pytest.raises(wire.ProtocolError, match="behind its end"):
                cell.tunnels.take(kind, {"conn": number}, payload)

    def test_frames_that_cross_an_end_are_forgiven(self, cell):
        """What the cell sent before it knew of the end is dropped without a word."""
        number = cell.open(get("http://other.example/"))
        cell.shut(number)
        assert len(cell.events) == 1
        frames = len(cell.frames)
        cell.tunnels.take(DATA, {"conn": number}, b"late")
        cell.tunnels.take(ACK, {"conn": number, "bytes": 5}, b"")
        cell.tunnels.take(SHUT, {"conn": number}, b"")
        assert len(cell.frames) == frames
        assert len(cell.events) == 1


class Bridge:
    """The cell's own end of the tunnels, as PID 1 runs it, on a port of this machine; a thread serves both ends."""

    def __init__(self, out: Egress) -> None:
        spec = importlib.util.spec_from_file_location("cell_tunnels", shipped("python/tunnels.py"))
        assert spec is not None
        assert spec.loader is not None
        inside = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(inside)
        with socket.create_server(("127.0.0.1", 0)) as free:
            inside.PORT = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{inside.PORT}"
        self.events: list[dict[str, Any]] = []
        self._out: deque[tuple[int, dict[str, Any], bytes]] = deque()
        self._in: deque[tuple[int, dict[str, Any], bytes]] = deque()
        self._poll = select.poll()
        self._listener = inside.listen()
        self._inside = inside.Tunnels(
            self._poll, lambda kind, header, data=b"": self._out.append((kind, header, data)), self._listener
        )
        self._inside.begin()
        self._outside = out.tunnels(lambda *frame: self._in.append(frame), ends_only(self.events))
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join(10)
        self._outside.close()
        self._inside.close()
        self._listener.close()

    def _run(self) -> None:
        while not self._stop:
            for descriptor, events in self._poll.poll(2):
                assert self._inside.ready(descriptor, events)
            while self._out:
                self._outside.take(*self._out.popleft())
            reading, writing = self._outside.descriptors()
            self._outside.ready(*select.select(reading, writing, [], 0.002)[:2])
            while self._in:
                self._inside.take(*self._in.popleft())


class TestClients:
    """Clients as they come, which find the proxy by environment variables or an option."""

    @pytest.fixture
    def bridge(self, world: World) -> Iterator[Bridge]:
        """A proxy that leads to a site with and one without TLS, and an API with a secret."""
        page = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\npage.\n"
        world.names["api.example"] = [OTHER]
        world.serve(GOOD, 80, world.answering(page))
        world.serve(SAFE, 443, world.answering(page), certificate="safe.example")
        world.serve(OTHER, 443, world.answering(page), certificate="api.example")
        with Bridge(world.egress()) as bridge:
            yield bridge

    def test_urllib(self, world, bridge):
        """Plain and encrypted, and a refusal is an HTTP error."""
        proxies = urllib.request.ProxyHandler({"http": bridge.url, "https": bridge.url})
        opener = urllib.request.build_opener(proxies, urllib.request.HTTPSHandler(context=world.tls))
        for url in ("http://good.example/x", "https://safe.example/", "http://api.example:443/"):
            with opener.open(url, timeout=10) as response:
                assert response.read() == b"page.\n"
        assert b"s3cr3t" in world.heads[2]
        with pytest.raises(urllib.error.HTTPError, match="403") as caught:
            opener.open("http://other.example/", timeout=10)
        caught.value.close()
        with pytest.raises(OSError, match="403"):
            opener.open("https://other.example/", timeout=10)

    def test_requests(self, world, bridge, tmp_path):
        """With a session that keeps connections, and a body that is sent in chunks."""
        bundle = tmp_path / "ca.pem"
        world.authority.cert_pem.write_to_path(bundle)
        with requests.Session() as session:
            session.trust_env = False
            session.proxies = {"http": bridge.url, "https": bridge.url}
            session.verify = str(bundle)
            assert session.get("http://good.example/x", timeout=10).text == "page.\n"
            assert session.get("https://safe.example/", timeout=10).text == "page.\n"
            assert session.post("http://good.example/", data=iter([b"a", b"b" * 5000]), timeout=10).status_code == 200
            assert session.get("http://other.example/", timeout=10).status_code == 403
            with pytest.raises(requests.exceptions.ProxyError):
                session.get("https://other.example/", timeout=10)

    def test_much_goes_through_both_ends(self, world, bridge):
        """More than the windows hold, both ways at once, on several connections."""
        size = 3 << 20

        def echo(connection: socket.socket) -> None:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

        world.serve(GOOD, 8443, echo)
        want = hashlib.sha256(bytes(range(256)) * (size // 256)).digest()

        def client(got: list[bytes]) -> None:
            with socket.create_connection(("127.0.0.1", int(bridge.url.rpartition(":")[2])), timeout=20) as connection:
                connection.sendall(CONNECT)
                assert connection.recv(len(ESTABLISHED), socket.MSG_WAITALL) == ESTABLISHED

                def talk() -> None:
                    connection.sendall(bytes(range(256)) * (size // 256))
                    connection.shutdown(socket.SHUT_WR)

                talker = threading.Thread(target=talk)
                talker.start()
                got.append(hashlib.sha256(read_all(connection)).digest())
                talker.join()

        got: list[bytes] = []
        clients = [threading.Thread(target=client, args=(got,)) for _ in range(3)]
        for each in clients:
            each.start()
        for each in clients:
            each.join(30)
        assert got == [want] * 3
        end = time.monotonic() + 5
        while len(bridge.events) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert [(event["result"], event["sent_bytes"], event["received_bytes"]) for event in bridge.events] == [
            ("allowed", size, size)
        ] * 3
