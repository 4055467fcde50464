"""Frames between the controller and a cell, over the attached standard input and output of its PID 1.

A frame is: magic "LG", type, header length, payload length, a JSON header, the payload. The engine wraps what comes out
of the container once more, in packets that say which stream they are of. Any unexpected byte is an error, and the cell
is destroyed: a stream that cannot be understood cannot be trusted again. `docs/wire-protocol.md` lists the frames.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import struct
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from loopguard.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Mapping

PROTOCOL = 2
"""Which frames both sides speak; the supervisor of an image says which ones it does."""

HELLO, CALL, RESULT, CLEAN = 1, 2, 3, 4
OPEN, DATA, SHUT, ACK = 5, 6, 7, 8
TUNNEL = frozenset({OPEN, DATA, SHUT, ACK})
"""Frames of connections that lead out of a cell, where the guard policy has any."""

MAX_HEADER = 4 << 20
MAX_PAYLOAD = 1 << 32
"""What the length in a frame can say. A channel takes far less: see `Channel`."""

_FRAME = struct.Struct(">2sBxII")
_PACKET = struct.Struct(">BxxxI")
_MAGIC = b"LG"
_STDOUT, _STDERR = 1, 2
_KEPT_STDERR = 2000
_PART = 1 << 18


class ProtocolError(SandboxError):
    """The other side said something that no supervisor says."""


class LostError(SandboxError):
    """The other side is gone; `said` is what it left on its standard error."""

    def __init__(self, said: str = "") -> None:
        self.said = said
        super().__init__(said or "the stream ended")


class Connection(Protocol):
    """The few things that a channel asks of a socket."""

    def settimeout(self, timeout: float | None, /) -> None: ...  # noqa: D102 - as in `socket`
    def recv(self, size: int, /) -> bytes: ...  # noqa: D102
    def send(self, data: bytes | bytearray | memoryview, /) -> int: ...  # noqa: D102
    def sendall(self, data: bytes | bytearray, /) -> None: ...  # noqa: D102
    def fileno(self) -> int: ...  # noqa: D102


class Meanwhile(Protocol):
    """What else happens while a result is waited for: connections that lead out of the cell."""

    def take(self, kind: int, header: Mapping[str, Any], payload: bytes) -> None:
        """A frame of a tunnel."""
        ...

    def descriptors(self) -> tuple[list[int], list[int]]:
        """What to wait for: to be readable, to be writable."""
        ...

    def ready(self, readable: Collection[int], writable: Collection[int]) -> None:
        """Do what can be done without waiting."""
        ...

    def next_deadline(self) -> float | None:
        """When to be asked again at the latest, on the monotonic clock."""
        ...


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    kind: int
    header: dict[str, Any]
    payload: bytes


def encode(kind: int, header: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """The bytes of a frame."""
    return head(kind, header, len(payload)) + payload


def head(kind: int, header: Mapping[str, Any], payload_bytes: int) -> bytes:
    """A frame up to its payload. Raises ProtocolError where header or payload are too long for one."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER or payload_bytes >= MAX_PAYLOAD:
        raise ProtocolError(f"a frame has no room for {len(text)} and {payload_bytes} bytes")
    return _FRAME.pack(_MAGIC, kind, len(text), payload_bytes) + text


class Channel:
    """One cell's stream, seen from the controller. Used by one thread at a time.

    `most` is the largest payload that a cell of this kind can have a reason to send; a longer one is a broken cell.
    """

    def __init__(self, connection: Connection, *, most: int = 160 << 20) -> None:
        self._connection = connection
        self._most = most
        self._in = bytearray()
        self._out = bytearray()
        self._err = bytearray()
        self._deadline = 0.0
        self._meanwhile: Meanwhile | None = None
        self._later = bytearray()

    def send(self, kind: int, header: Mapping[str, Any], *payload: bytes, timeout_s: float) -> None:
        """Send a frame. Raises LostError where the stream is gone; success does not mean that anybody lives."""
        start = head(kind, header, sum(map(len, payload)))
        self._connection.settimeout(timeout_s)
        try:
            if sum(map(len, payload)) < _PART:
                self._connection.sendall(b"".join((start, *payload)))
                return
            # Part by part: together they would stand in memory once more.
            deadline = time.monotonic() + timeout_s
            if self._send_much(start, deadline=deadline):
                all(self._send_much(part, deadline=deadline) for part in payload)
        except TimeoutError:
            raise
        except OSError as error:
            raise LostError(str(error)) from error

    def _send_much(self, data: bytes, *, deadline: float) -> bool:
        """Send more than the stream takes at once; False where the cell spoke, which it would do only at its end."""
        rest = memoryview(data)
        look = select.poll()
        look.register(self._connection.fileno(), select.POLLIN | select.POLLOUT)
        while rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if any(events & ~select.POLLOUT for _, events in look.poll(left * 1000)) or self._undecoded():
                return False  # what it said, or that it is gone, is heard next
            self._connection.settimeout(0)
            with suppress(BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                rest = rest[self._connection.send(rest[:_PART]) :]
        return True

    def send_later(self, kind: int, header: Mapping[str, Any], payload: bytes = b"") -> None:
        """Send a frame while the next one is waited for, as the cell takes it.

        For tunnels: the cell may be sending to us at the same time, and two that only write wait for each other.
        """
        self._later += encode(kind, header, payload)

    def receive(self, kind: int, *, timeout_s: float, meanwhile: Meanwhile | None = None) -> Frame:
        """The next frame, which must be of this kind. Raises TimeoutError, LostError, ProtocolError.

        With `meanwhile`, frames of tunnels may come before it, and the tunnels are served while it is waited for.
        """
        self._deadline = time.monotonic() + timeout_s
        self._meanwhile = meanwhile
        try:
            while True:
                frame = self._next({kind} if meanwhile is None else {kind, *TUNNEL})
                if frame.kind == kind or meanwhile is None:
                    return frame
                meanwhile.take(frame.kind, frame.header, frame.payload)
        finally:
            self._meanwhile = None

    def finish_sending(self, *, timeout_s: float) -> None:
        """Send what is left over, so that the next frame does not begin in the middle of another."""
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(self._later)
        except TimeoutError:
            raise
        except OSError as error:
            raise LostError(str(error)) from error
        self._later.clear()

    def waiting(self) -> bool:
        """Whether there is something to read, or the end of the stream."""
        descriptor = self._connection.fileno()
        if self._in or self._out or descriptor < 0 or self._undecoded():
            return True
        look = select.poll()
        look.register(descriptor, select.POLLIN)
        return bool(look.poll(0))

    def _next(self, kinds: Collection[int]) -> Frame:
        self._fill(_FRAME.size)
        magic, found, header_length, payload_length = _FRAME.unpack_from(self._out)
        if magic != _MAGIC or found not in kinds or header_length > MAX_HEADER or payload_length > self._most:
            expected = "/".join(map(str, sorted(kinds)))
            raise ProtocolError(f"expected a frame of type {expected}, got {bytes(self._out[: _FRAME.size])!r}")
        end = _FRAME.size + header_length + payload_length
        self._fill(end)
        try:
            header = json.loads(self._out[_FRAME.size : _FRAME.size + header_length])
        except ValueError as error:
            raise ProtocolError(f"the header of a frame is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise ProtocolError(f"the header of a frame is a {type(header).__name__}")
        payload = bytes(self._out[_FRAME.size + header_length : end])
        del self._out[:end]
        return Frame(found, header, payload)

    def _fill(self, length: int) -> None:
        while len(self._out) < length:
            self._need(_PACKET.size)
            stream, size = _PACKET.unpack_from(self._in)
            if stream not in {_STDOUT, _STDERR} or size > self._most + MAX_HEADER:
                raise ProtocolError(f"the engine sent a packet of stream {stream} and {size} bytes")
            self._need(_PACKET.size + size)
            data = self._in[_PACKET.size : _PACKET.size + size]
            del self._in[: _PACKET.size + size]
            if stream == _STDOUT:
                self._out += data
            else:
                self._err = (self._err + data)[-_KEPT_STDERR:]

    def _need(self, size: int) -> None:
        while len(self._in) < size:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if self._meanwhile is not None and not self._serve(self._meanwhile, left):
                continue
            self._connection.settimeout(left)
            try:
                part = self._connection.recv(_PART)
            except TimeoutError:
                raise
            except OSError as error:
                raise LostError(str(error)) from error
            if not part:
                raise LostError(self._err.decode("utf-8", errors="replace").strip())
            self._in += part

    def _serve(self, meanwhile: Meanwhile, left_s: float) -> bool:
        """Wait for the cell and for its tunnels, and serve those; whether the cell has said something."""
        if (deadline := meanwhile.next_deadline()) is not None:
            left_s = min(left_s, max(deadline - time.monotonic(), 0))
        reading, writing = meanwhile.descriptors()
        own = self._connection.fileno()
        if own < 0:
            raise LostError
        if self._undecoded():
            left_s = 0
        wanted = dict.fromkeys((own, *reading), select.POLLIN)
        if self._later:
            wanted[own] |= select.POLLOUT
        for descriptor in writing:
            wanted[descriptor] = wanted.get(descriptor, 0) | select.POLLOUT
        look = select.poll()
        for descriptor, events in wanted.items():
            look.register(descriptor, events)
        found = dict(look.poll(left_s * 1000 + 1))
        # An error or a hang-up is told to whoever asked for anything.
        ended = select.POLLERR | select.POLLHUP | select.POLLNVAL
        readable = [each for each in reading if found.get(each, 0) & (select.POLLIN | ended)]
        meanwhile.ready(readable, [each for each in writing if found.get(each, 0) & (select.POLLOUT | ended)])
        if found.get(own, 0) & select.POLLOUT:
            self._send_some()
        return bool(found.get(own, 0) & (select.POLLIN | ended)) or self._undecoded()

    def _send_some(self) -> None:
        self._connection.settimeout(0)
        try:
            del self._later[: self._connection.send(self._later[:_PART])]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except OSError as error:
            raise LostError(str(error)) from error

    def _undecoded(self) -> bool:
        """Whether bytes wait in a TLS connection, where `poll` does not see them."""
        return isinstance(self._connection, ssl.SSLSocket) and self._connection.pending() > 0


def shut(connection: socket.socket) -> None:
    """End a connection for whoever reads from it, also in another thread."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was gone already
