"""The way out of a cell: a strict HTTP proxy in the controller, for the few places that a guard policy names.

A cell has no network. Its PID 1 takes connections on the loopback of the cell and hands their bytes through frames to
us; here they are understood, judged by the policy's list, and only then does the controller itself connect.

Covered: other hosts, ports and spellings; names that lead to private addresses; requests that two parsers could read
differently; a second request behind the first; secrets, which are added here and never reach the cell by a header.

Not covered: what calls tell a place that they may reach, what travels inside a CONNECT tunnel, and secrets that a host
repeats in a body. `docs/egress.md` has the long list.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote_to_bytes

from loopguard.errors import SandboxUnavailableError
from loopguard.sandbox.http_request import OURS, TOKEN, MalformedError, Request, parse, same, shown
from loopguard.sandbox.wire import ACK, DATA, OPEN, SHUT, TUNNEL, ProtocolError

if TYPE_CHECKING:
    from loopguard.sandbox.base import EgressRule

MAX_CONNECTIONS = 16
"""At once, of one call."""
MAX_EVER = 1000
"""Of one call, one after the other: each is a record in the audit log."""
WINDOW = 256 << 10
"""Bytes that one side may send before the other has said that it handed them on."""
PIECE = 64 << 10
MAX_HEAD = 16 << 10
MAX_REPLY_HEAD = 64 << 10

HEAD_S = 10.0
RESOLVE_S = 5.0
CONNECT_S = 10.0
HANDSHAKE_S = 10.0
IDLE_S = 300.0
HALF_S = 30.0
"""How long a tunnel may be idle whose far end sends no more."""
LINGER_S = 5.0
"""How long the cell has to hang up after the last byte of an answer."""

_WORKERS = 32
_ADDRESSES = 4
_LONG_WORD = 8

_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?=[^\n])")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5])[0-9]{2}(?: [\t\x20-\x7e\x80-\xff]*)?\r\n")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"(?:0[xX][0-9A-Fa-f]*|[0-9]+)")

_ANSWERS = {
    400: (b"Bad Request", b"This request is not understood.\n"),
    403: (b"Forbidden", b"This address is not permitted.\n"),
    502: (b"Bad Gateway", b"This address cannot be reached.\n"),
}
"""No more than a model has to know: no rule, no resolved address, no error of ours."""

_SPECIAL = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
    192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24
    203.0.113.0/24 224.0.0.0/3 168.63.129.16/32 2001::/23 2001:db8::/32 2002::/16 3fff::/20
"""
_NEVER = tuple(ipaddress.ip_network(each) for each in _SPECIAL.split())
"""Special ranges of IANA's two registries, all of multicast and above, 6to4, Teredo, and a cloud's metadata service
that has an address which looks public. Written down, since what Python calls global changes with its version."""

_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Resolve = Callable[[str, int], Sequence[str]]
"""Addresses of a name. May wait, and may raise whatever it likes."""
Connect = Callable[[str, int, float], socket.socket]
"""A connection to an address and port within some seconds. May wait, and raises OSError."""
Send = Callable[[int, dict[str, Any], bytes], None]
OnEvent = Callable[[dict[str, Any]], None]


class _RefusedError(Exception):
    """A request to somewhere it may not go."""


class _FailedError(Exception):
    """A connection that came to nothing."""


def public(address: str) -> bool:
    """Whether this is the address of one machine on the public internet, as far as its number can tell.

    >>> public("93.184.215.14"), public("169.254.169.254"), public("::ffff:93.184.215.14")
    (True, False, False)
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            # How a network without IPv4 reaches all of it; what counts is the address inside.
            return public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.scope_id is not None or found not in _UNICAST:
            return False
    return not any(found in network for network in _NEVER)


class Egress:
    """The places that a runtime's calls may reach. Made once, never changed, shared by all of its cells.

    >>> Egress([]).tunnels(send=print, on_event=print).descriptors()[1]
    []
    """

    def __init__(
        self,
        rules: Sequence[EgressRule],
        *,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
        environ: Mapping[str, str] = os.environ,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Read the secrets, now and never again.

        `tls` replaces the system's list of certificate authorities. Raises SandboxUnavailableError for a secret whose
        environment variable is not set or cannot be sent, and for a rule that could not mean one place.
        """
        self._places: dict[tuple[str, int], _Place] = {}
        for rule in rules:
            place = _place(rule, environ)
            if self._places.setdefault((rule.host, rule.port), place) is not place:
                raise SandboxUnavailableError(
                    f"egress to {shown(place.name)} is permitted twice; keep one of the rules"
                )
        self.resolve = resolve or _resolve
        self.connect = connect or _connect
        self.tls = tls or _tls()
        self.workers = _Workers(_WORKERS)

    def tunnels(self, send: Send, on_event: OnEvent) -> Tunnels:
        """The connections of one call; close them with it. Both functions are called in the thread that uses them."""
        return Tunnels(self, send, on_event)

    def place(self, host: str, port: int) -> _Place:
        """The permitted place that a request names. Raises _RefusedError for every other."""
        name = host.lower().removesuffix(".")
        if _is_address(name):
            raise _RefusedError("an address, not a name")
        found = self._places.get((name, port))
        if found is None:
            raise _RefusedError("not in the guard policy")
        return found


class Tunnels:
    """The connections that one call makes. Used by one thread, which never waits in here.

    The thread waits for `descriptors` until `next_deadline`, calls `ready` after each wait, and `take` for each frame
    of the cell. Whatever goes wrong with a connection ends that one alone; what `send` and `on_event` raise comes
    through.
    """

    def __init__(self, egress: Egress, send: Send, on_event: OnEvent) -> None:
        self.egress = egress
        self.mailbox = _Mailbox()
        self._send = send
        self._on_event = on_event
        self._live: dict[int, _Connection] = {}
        self._highest = -1
        self._opened = 0
        self._closed = False
        self._outside: BaseException | None = None

    def take(self, kind: int, header: Mapping[str, Any], payload: bytes) -> None:
        """A frame from the cell. Raises ProtocolError for one that no PID 1 of ours sends."""
        number = _checked(kind, header, payload)
        if self._closed:
            return
        if kind == OPEN:
            self._open(number)
            return
        if number > self._highest:
            raise ProtocolError(f"a frame for connection {number}, which was never opened")
        connection = self._live.get(number)
        if connection is None:
            return  # it crossed the end of its connection on the way
        if kind == ACK:
            if header["bytes"] > connection.unacknowledged:
                raise ProtocolError(f"connection {number}: more was acknowledged than sent")
            connection.unacknowledged -= header["bytes"]
            self._guard(connection, connection.pump)
            return
        if header.get("reset"):
            connection.hang_up("the cell hung up")
            return
        if connection.cell_shut:
            raise ProtocolError(f"connection {number}: a frame behind its end")
        if len(connection.inbox) + len(payload) > WINDOW:
            raise ProtocolError(f"connection {number}: more than {WINDOW >> 10} KiB ahead of what was acknowledged")
        connection.inbox += payload
        connection.cell_shut = kind == SHUT
        self._guard(connection, connection.pump)

    def descriptors(self) -> tuple[list[int], list[int]]:
        """What to wait for: to become readable, to become writable."""
        if self._closed:
            return [], []
        reading, writing = [self.mailbox.fileno()], []
        for connection in self._live.values():
            if connection.wants_to_read:
                reading.append(connection.fileno())
            if connection.wants_to_write:
                writing.append(connection.fileno())
        return reading, writing

    def ready(self, readable: Collection[int], writable: Collection[int]) -> None:
        """Go on with what can go on, and end what is late. Never waits."""
        if self._closed:
            return
        if self.mailbox.fileno() in readable:
            for errand in self.mailbox.empty():
                if errand.given_up:
                    errand.discard()
                else:
                    self._guard(errand.connection, errand.deliver)
        for connection in list(self._live.values()):
            if connection.fileno() in readable or connection.fileno() in writable:
                self._guard(connection, connection.pump)
        now = time.monotonic()
        for connection in list(self._live.values()):
            if connection.deadline <= now:
                self._guard(connection, connection.expire)

    def next_deadline(self) -> float | None:
        """When `ready` is due at the latest, on the monotonic clock; None while nothing can be late."""
        return min((connection.deadline for connection in self._live.values()), default=None)

    def close(self) -> None:
        """End every connection at once, also what the kernel has not sent yet; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self.mailbox.close()
        # All of them first: a record that cannot be written must not leave one open.
        for connection in self._live.values():
            connection.abort()
        for connection in list(self._live.values()):
            connection.hang_up("the call ended")

    def tell(self, kind: int, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send the cell a frame."""
        self._call_out(self._send, kind, header, payload)

    def announce(self, event: dict[str, Any]) -> None:
        """Tell that a connection is about to be made."""
        self._call_out(self._on_event, event)

    def end(self, connection: _Connection, event: dict[str, Any]) -> None:
        """Forget a connection and tell what became of it."""
        if self._live.pop(connection.number, None) is not None:
            self._call_out(self._on_event, event)

    def _open(self, number: int) -> None:
        if number <= self._highest:
            raise ProtocolError(f"connection {number} was opened before")
        self._highest = number
        self._opened += 1
        if self._opened > MAX_EVER or len(self._live) >= MAX_CONNECTIONS:
            self.tell(SHUT, {"conn": number, "reset": True})
            if self._opened <= MAX_EVER + 1:
                ever = self._opened > MAX_EVER
                limit = f"{MAX_EVER} connections of one call" if ever else f"{MAX_CONNECTIONS} connections at once"
                also = "; those after it are refused unrecorded" if ever else ""
                self._call_out(self._on_event, _event("refused", f"more than {limit}{also}"))
            return
        self._live[number] = _Connection(number, self)

    def _guard(self, connection: _Connection, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            if error is self._outside:
                raise
            connection.fail(error)

    def _call_out(self, function: Callable[..., None], *args: object) -> None:
        try:
            function(*args)
        except BaseException as error:
            self._outside = error
            raise


class _Connection:
    """One connection of a cell, from its OPEN until both sides have shut it.

    It waits for a request head, then for a worker that looks the name up, then for one that connects; then it is open
    and bytes go both ways; at last it is answered, and what the cell still sends is dropped.
    """

    def __init__(self, number: int, tunnels: Tunnels) -> None:
        self.number = number
        self.deadline = time.monotonic() + HEAD_S
        self.inbox = bytearray()
        """Sent by the cell and not acknowledged."""
        self.cell_shut = False
        self.unacknowledged = 0
        self._tunnels = tunnels
        self._stage: Literal["head", "resolve", "connect", "open", "answered", "over"] = "head"
        self._event = _event("failed", "")
        self._request: Request | None = None
        self._place: _Place | None = None
        self._errand: _Errand | None = None
        self._upstream: socket.socket | None = None
        self._outbox = bytearray()
        self._reply = bytearray()
        self._reply_head_due = False
        self._given = False
        self._place_done = False
        """The place sends no more."""
        self._told_place = False
        """The place knows that the cell sends no more."""
        self._told_cell = False
        """The cell knows that no more comes."""
        self._read_needs_write = self._write_needs_read = False

    def fileno(self) -> int:
        """The connection to the place itself, or -1."""
        return -1 if self._upstream is None else self._upstream.fileno()

    @property
    def wants_to_read(self) -> bool:
        """Whether more from the place could be passed on."""
        return self._upstream is not None and ((not self._place_done and self._room() > 0) or self._write_needs_read)

    @property
    def wants_to_write(self) -> bool:
        """Whether there is more for the place."""
        return self._upstream is not None and (bool(self._outbox) or self._read_needs_write)

    def pump(self) -> None:
        """Go on as far as possible without waiting."""
        if self._stage == "head":
            self._take_head()
        if self._stage == "open":
            self._pass_up()
        if self._stage == "open":
            self._pass_down()
        if self._stage == "answered":
            self._drop()

    def expire(self) -> None:
        """What the deadline of this stage means."""
        match self._stage:
            case "head":
                if self.inbox:
                    raise MalformedError("no whole request head in time")
                self._event["reason"] = "no request"
                self._finish(reset=True)
            case "resolve":
                raise _FailedError("the name was not resolved in time")
            case "connect":
                raise _FailedError("not connected in time")
            case "open" if not self._place_done:
                raise _FailedError("idle for too long")
            case _:
                self._finish(reset=True)

    def fail(self, error: Exception) -> None:
        """End this connection for a reason, with an answer where nothing was sent yet."""
        if self._stage == "answered" or (self._place_done and isinstance(error, OSError)):
            # The place had said all it had to say; that it no longer listens is how most connections end.
            self._finish(reset=True)
            return
        code = {MalformedError: 400, _RefusedError: 403}.get(type(error), 502)
        plain = isinstance(error, (MalformedError, _RefusedError, _FailedError))
        self._event["result"] = "failed" if code == 502 else "refused"
        self._event["reason"] = shown(str(error) if plain else f"{type(error).__name__}: {error}")
        self.abort()
        if self._given:
            self._finish(reset=True)
            return
        name, body = _ANSWERS[code]
        head = b"HTTP/1.1 %d %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        self._give(head % (code, name, len(body)) + body)
        self._answered()
        self._drop()

    def hang_up(self, reason: str) -> None:
        """End it at once and without a word to the cell."""
        if self._stage != "answered":
            self._event["reason"] = reason
        self.abort()
        self._end()

    def abort(self) -> None:
        """End the connection to the place at once; what the kernel has not sent yet is not sent."""
        if self._errand is not None:
            self._errand.give_up()
        if self._upstream is not None:
            with suppress(OSError):
                self._upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close_upstream()

    def _take_head(self) -> None:
        end = self.inbox.find(b"\r\n\r\n", 0, MAX_HEAD)
        if end < 0:
            if len(self.inbox) >= MAX_HEAD:
                raise MalformedError(f"a request head of more than {MAX_HEAD >> 10} KiB")
            if _BARE_LINE_END.search(self.inbox):
                raise MalformedError("a line of the request head ends in no CR LF")
            if self.cell_shut:
                if not self.inbox:
                    self._event["reason"] = "no request"
                    self._finish()
                    return
                raise MalformedError("it ended within the request head")
            return
        head = bytes(self.inbox[:end])
        del self.inbox[: end + 4]
        self._acknowledge(end + 4)
        self._request = parse(head, self._event)
        self._place = self._tunnels.egress.place(self._request.host, self._request.port)
        place, resolve = self._place, self._tunnels.egress.resolve
        self._go("resolve", RESOLVE_S, lambda _: tuple(resolve(place.host, place.port)), self._resolved)

    def _resolved(self, found: Any) -> None:
        assert self._place is not None
        addresses = list(dict.fromkeys(map(str, found)))
        if not addresses:
            raise _FailedError("the name has no address")
        # One is enough: a name with a public and a private address is how a browser is led into a local network.
        for address in addresses:
            if not public(address):
                self._event["address"] = shown(address)
                raise _RefusedError("the name leads to an address that is not public")
        place, egress = self._place, self._tunnels.egress
        assert self._request is not None
        tls = egress.tls if place.tls and not self._request.tunnel else None
        time_s = CONNECT_S + (HANDSHAKE_S if tls else 0)
        # Told before it happens: what nobody recorded must not have left the cell.
        self._tunnels.announce({**self._event, "result": "permitted", "address": ", ".join(map(shown, addresses))})
        self._go("connect", time_s, lambda errand: _dial(errand, egress, place, addresses, tls), self._connected)

    def _connected(self, found: Any) -> None:
        assert self._request is not None
        assert self._place is not None
        self._errand = None
        self._upstream, self._event["address"] = found
        self._event["result"], self._event["reason"] = "allowed", ""
        self._stage = "open"
        self._moved()
        if self._request.tunnel:
            self._give(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            self._outbox += self._request.head(self._place.host_header, self._place.secrets)
            self._reply_head_due = bool(self._place.secrets)
        self.pump()

    def _pass_up(self) -> None:
        """From the cell to the place."""
        assert self._request is not None
        body = self._request.body
        taken = 0
        try:
            while True:
                while not body.done and (piece := body.take(self.inbox, PIECE - len(self._outbox))):
                    self._outbox += piece
                    taken += len(piece)
                if body.done:
                    # A second request would have been judged by the first one's address.
                    taken += len(self.inbox)
                    self.inbox.clear()
                if not self._outbox or not self._write():
                    break
        finally:
            if taken:
                self._acknowledge(taken)
        if not self.cell_shut or self._outbox or self._told_place:
            return
        if not self._request.tunnel:
            # How it ends is said by its framing, and many servers take half a close for a whole one.
            if not body.done:
                raise _FailedError("the request ended before its body did")
            return
        if self._place_done:
            self._finish()
            return
        assert self._upstream is not None
        self._told_place = True
        self._upstream.shutdown(socket.SHUT_WR)

    def _write(self) -> bool:
        """Send the place what it takes. Gives whether all of it was taken."""
        assert self._upstream is not None
        self._write_needs_read = False
        try:
            sent = self._upstream.send(self._outbox)
        except ssl.SSLWantReadError:
            self._write_needs_read = True
            return False
        except (BlockingIOError, ssl.SSLWantWriteError):
            return False
        del self._outbox[:sent]
        self._event["sent_bytes"] += sent
        self._moved()
        return not self._outbox

    def _pass_down(self) -> None:
        """From the place to the cell."""
        # To the last byte of the window: what TLS has decrypted already would wake nobody up.
        while not self._place_done and (room := self._room()) > 0:
            assert self._upstream is not None
            self._read_needs_write = False
            try:
                data = self._upstream.recv(min(PIECE, room))
            except ssl.SSLWantWriteError:
                self._read_needs_write = True
                return
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            if not data:
                self._place_shut()
                return
            self._event["received_bytes"] += len(data)
            self._moved()
            self._give(self._looked_at(data))

    def _looked_at(self, data: bytes) -> bytes:
        """What may go on of a response: its head as a whole and once no secret was found in it, then everything."""
        if not self._reply_head_due:
            return data
        assert self._place is not None
        self._reply += data
        good = b""
        while self._reply_head_due:
            end = self._reply.find(b"\r\n\r\n")
            if end < 0:
                if len(self._reply) >= MAX_REPLY_HEAD:
                    raise _FailedError(f"a response head of more than {MAX_REPLY_HEAD >> 10} KiB")
                return good
            head = bytes(self._reply[: end + 4])
            del self._reply[: end + 4]
            status = _STATUS_LINE.match(head)
            if status is None:
                raise _FailedError("the response begins with no status line")
            if self._place.told_in(head):
                raise _FailedError("the response head holds a secret")
            good += head
            self._reply_head_due = status[1] == b"1"  # an interim response; another head follows
        good += self._reply
        self._reply.clear()
        return good

    def _place_shut(self) -> None:
        assert self._request is not None
        if self._reply_head_due:
            raise _FailedError("the response ended before its head did")
        self._place_done = True
        if not self._request.tunnel:
            self._close_upstream()
            self._answered()
        elif self._told_place:
            self._finish()
        else:
            self._shut()
            self.deadline = time.monotonic() + HALF_S

    def _answered(self) -> None:
        """All is said. A client that is hung up on at once could lose the answer, so it gets a moment to do it."""
        self._shut()
        self._stage = "answered"
        self.deadline = time.monotonic() + LINGER_S

    def _drop(self) -> None:
        if self.inbox:
            self._acknowledge(len(self.inbox))
            self.inbox.clear()
        if self.cell_shut:
            self._end()

    def _finish(self, *, reset: bool = False) -> None:
        self._close_upstream()
        self._shut(reset=reset)
        self._end()

    def _end(self) -> None:
        self._stage = "over"
        self._tunnels.end(self, self._event)

    def _close_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None
        self._outbox.clear()
        self._reply.clear()

    def _room(self) -> int:
        return WINDOW - self.unacknowledged - len(self._reply)

    def _moved(self) -> None:
        self.deadline = time.monotonic() + (HALF_S if self._place_done else IDLE_S)

    def _give(self, data: bytes) -> None:
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            self._given = True
            self.unacknowledged += len(piece)
            self._tunnels.tell(DATA, {"conn": self.number}, piece)

    def _acknowledge(self, size: int) -> None:
        self._tunnels.tell(ACK, {"conn": self.number, "bytes": size})

    def _shut(self, *, reset: bool = False) -> None:
        if self._told_cell and not reset:
            return
        self._told_cell = True
        self._tunnels.tell(SHUT, {"conn": self.number, "reset": True} if reset else {"conn": self.number})

    def _go(
        self,
        stage: Literal["resolve", "connect"],
        time_s: float,
        work: Callable[[_Errand], object],
        then: Callable[[Any], None],
    ) -> None:
        self._stage = stage
        self.deadline = time.monotonic() + time_s
        self._errand = _Errand(self, self._tunnels.mailbox, work, then)
        self._tunnels.egress.workers.do(self._errand.run)


class _Errand:
    """Something that a worker does for a connection, and what came of it."""

    def __init__(
        self,
        connection: _Connection,
        mailbox: _Mailbox,
        work: Callable[[_Errand], object],
        then: Callable[[Any], None],
    ) -> None:
        self.connection = connection
        self._mailbox = mailbox
        self.given_up = False
        self.socket: socket.socket | None = None
        """What is being connected; the worker says so, so that giving up can wake it."""
        self._work = work
        self._then = then
        self._found: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        """In a worker's thread."""
        if self.given_up:
            return
        try:
            self._found = self._work(self)
        except Exception as error:  # noqa: BLE001 - raised again where the connection is
            self._error = error
        if not self._mailbox.put(self):
            self.discard()

    def deliver(self) -> None:
        """In the thread of the connection: go on with what was found."""
        if self._error is not None:
            raise self._error
        self._then(self._found)

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        self.given_up = True
        # Not the method of a TLS socket, which would forget its state under the worker's handshake.
        if self.socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def discard(self) -> None:
        """Close what came too late."""
        if self.socket is not None:
            self.socket.close()


class _Mailbox:
    """Where workers leave their errands; a byte on a socket pair wakes the one who waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: list[_Errand] = []
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        return self._ours.fileno()

    def put(self, errand: _Errand) -> bool:
        """Leave an errand. False where nobody will come for it."""
        with self._lock:
            if self._ours.fileno() < 0:
                return False
            self._done.append(errand)
            with suppress(BlockingIOError):
                self._theirs.send(b"\0")
            return True

    def empty(self) -> list[_Errand]:
        """What was left since."""
        with self._lock:
            with suppress(BlockingIOError):
                self._ours.recv(1 << 12)
            done, self._done = self._done, []
            return done

    def close(self) -> None:
        with self._lock:
            self._ours.close()
            self._theirs.close()
            done, self._done = self._done, []
        for errand in done:
            errand.discard()


class _Workers:
    """A few threads for what cannot be done without waiting.

    Daemons that leave when there is nothing to do: a name server that hangs keeps no program from ending.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._running = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def do(self, job: Callable[[], None]) -> None:
        """Have a job done, which must not raise."""
        with self._lock:
            if self._running >= self._most:
                self._waiting.append(job)
                return
            threading.Thread(target=self._work, args=(job,), name="loopguard-egress", daemon=True).start()
            self._running += 1

    def _work(self, job: Callable[[], None]) -> None:
        while True:
            job()
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                job = self._waiting.popleft()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A host and port that requests may go to, and what is added to them."""

    host: str
    port: int
    secrets: tuple[tuple[bytes, bytes], ...] = field(repr=False)

    @property
    def tls(self) -> bool:
        """Whether plain requests go there encrypted. A secret never travels in the clear."""
        return self.port == 443 or bool(self.secrets)

    @property
    def name(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def host_header(self) -> str:
        """As a client writes it: the usual port is left out."""
        return self.host if self.port == (443 if self.tls else 80) else self.name

    def told_in(self, head: bytes) -> bool:
        """Whether a response head holds a secret: whole, one of its long words, or either in percent signs."""
        plain = unquote_to_bytes(head)
        for _, value in self.secrets:
            for part in (value, *(word for word in value.split() if len(word) >= _LONG_WORD)):
                if part in head or part in plain:
                    return True
        return False


def _checked(kind: int, header: Mapping[str, Any], payload: bytes) -> int:
    """The number of the connection that a frame is about. Raises ProtocolError."""
    keys = {"conn"} | {SHUT: {"reset"}, ACK: {"bytes"}}.get(kind, set())
    number, size, reset = header.get("conn"), header.get("bytes", 1), header.get("reset", False)
    if (
        kind not in TUNNEL
        or not header.keys() <= keys
        or (kind == ACK and "bytes" not in header)
        # A bool is an int to Python, and `true` is no number to us.
        or type(number) is not int
        or type(size) is not int
        or type(reset) is not bool
        or not 0 <= number < 1 << 53
        or size < 1
        or len(payload) > PIECE
        or bool(payload) != (kind == DATA)
    ):
        raise ProtocolError(f"a frame of type {kind} with {shown(repr(dict(header)))} and {len(payload)} bytes")
    return number


def _place(rule: EgressRule, environ: Mapping[str, str]) -> _Place:
    if not _NAME.fullmatch(rule.host) or _is_address(rule.host) or not 1 <= rule.port <= 65535:
        raise SandboxUnavailableError(
            f"egress to {shown(rule.host)}:{rule.port}: expected a host name in small letters and a port"
        )
    secrets: list[tuple[bytes, bytes]] = []
    for header, variable in rule.secret_headers:
        name = header.encode("ascii", errors="replace")
        taken = [same(each) for each, _ in secrets]
        if not re.fullmatch(TOKEN, name) or same(name) in {*OURS, *taken} or same(name).startswith(b"proxy-"):
            raise SandboxUnavailableError(f"egress to {rule.host}: {shown(header)} cannot be a secret header")
        secrets.append((name, _secret(variable, environ, f"egress to {rule.host}: {header}")))
    return _Place(host=rule.host, port=rule.port, secrets=tuple(secrets))


def _secret(variable: str, environ: Mapping[str, str], where: str) -> bytes:
    text = environ.get(variable, "")
    if not text.strip():
        raise SandboxUnavailableError(f"{where} needs the environment variable {variable}, which is not set")
    # Without the value, in the message as in its cause.
    if not re.fullmatch(r"[\x20-\x7e\xa0-\xff]+", text) or text != text.strip(" "):
        raise SandboxUnavailableError(
            f"{where}: the environment variable {variable} holds what no header can: a line end, another control "
            f"character, a space at its beginning or end, or a character outside Latin-1"
        )
    return text.encode("latin-1")


def _dial(
    errand: _Errand, egress: Egress, place: _Place, addresses: Sequence[str], tls: ssl.SSLContext | None
) -> tuple[socket.socket, str]:
    """A connection to the first of these addresses that answers: by its number, so that no name is asked twice."""
    addresses = addresses[:_ADDRESSES]
    end = time.monotonic() + CONNECT_S
    for place_in_line, address in enumerate(addresses):
        try:
            time_s = max((end - time.monotonic()) / (len(addresses) - place_in_line), 0.001)
            errand.socket = egress.connect(address, place.port, time_s)
            break
        except OSError:
            if errand.given_up or place_in_line == len(addresses) - 1:
                raise
    try:
        if errand.given_up:
            raise _FailedError("given up")
        assert errand.socket is not None
        if tls is not None:
            errand.socket.settimeout(HANDSHAKE_S)
            secure = tls.wrap_socket(errand.socket, server_hostname=place.host, do_handshake_on_connect=False)
            errand.socket = secure
            if errand.given_up:
                raise _FailedError("given up")
            secure.do_handshake()
        errand.socket.setblocking(False)
    except BaseException:
        errand.discard()
        raise
    return errand.socket, address


def _resolve(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _connect(address: str, port: int, time_s: float) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=time_s)
    # The public address of this very machine is as local as 127.0.0.1.
    if connection.getsockname()[0] == connection.getpeername()[0]:
        connection.close()
        raise _RefusedError("the name leads to this machine")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _is_address(name: str) -> bool:
    """Whether a host is an address in any spelling: in brackets, or with a number as its last part."""
    return name.startswith("[") or bool(_NUMBER.fullmatch(name.removesuffix(".").rpartition(".")[2]))


def _event(result: Literal["allowed", "refused", "failed"], reason: str) -> dict[str, Any]:
    return {
        "host": "",
        "port": None,
        "result": result,
        "reason": reason,
        "address": "",
        "sent_bytes": 0,
        "received_bytes": 0,
    }
