"""Frames between the controller and a cell, over the attached standard input and output of its PID 1.

A frame is: magic "LG", type, header length, payload length, a JSON header, the payload. The engine wraps what comes out
of the container once more, in packets that say which stream they are of. Any unexpected byte is an error, and the cell
is destroyed: a stream that cannot be understood cannot be trusted again.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from loopguard.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Mapping

HELLO, CALL, RESULT, CLEAN = 1, 2, 3, 4
MAX_HEADER = 1 << 16
MAX_PAYLOAD = 160 << 20
"""Both streams of a call, with the most that a guard policy lets be kept of each (64 MiB)."""

_FRAME = struct.Struct(">2sBxII")
_PACKET = struct.Struct(">BxxxI")
_MAGIC = b"LG"
_STDOUT, _STDERR = 1, 2
_KEPT_STDERR = 2000


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
    def sendall(self, data: bytes, /) -> None: ...  # noqa: D102
    def fileno(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    kind: int
    header: dict[str, Any]
    payload: bytes


def encode(kind: int, header: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """The bytes of a frame. Raises ProtocolError where header or payload are too long for one."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        raise ProtocolError(f"a frame holds {MAX_PAYLOAD >> 20} MiB at most, not {len(payload) / 2**20:.1f}")
    return _FRAME.pack(_MAGIC, kind, len(text), len(payload)) + text + payload


class Channel:
    """One cell's stream, seen from the controller. Used by one thread at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._in = bytearray()
        self._out = bytearray()
        self._err = bytearray()
        self._deadline = 0.0

    def send(self, kind: int, header: Mapping[str, Any], payload: bytes = b"", *, timeout_s: float) -> None:
        """Send a frame. Raises LostError where the stream is gone; success does not mean that anybody lives."""
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(encode(kind, header, payload))
        except OSError as error:
            raise LostError(str(error)) from error

    def receive(self, kind: int, *, timeout_s: float) -> Frame:
        """The next frame, which must be of this kind. Raises TimeoutError, LostError, ProtocolError."""
        self._deadline = time.monotonic() + timeout_s
        self._fill(_FRAME.size)
        magic, found, header_length, payload_length = _FRAME.unpack_from(self._out)
        if magic != _MAGIC or found != kind or header_length > MAX_HEADER or payload_length > MAX_PAYLOAD:
            raise ProtocolError(f"expected a frame of type {kind}, got {bytes(self._out[: _FRAME.size])!r}")
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

    def quiet(self) -> bool:
        """Whether nothing is to be read: neither bytes that nobody asked for, nor the end of the stream."""
        descriptor = self._connection.fileno()
        if self._in or self._out or descriptor < 0:
            return False
        look = select.poll()
        look.register(descriptor, select.POLLIN)
        return not look.poll(0)

    def _fill(self, length: int) -> None:
        while len(self._out) < length:
            self._need(_PACKET.size)
            stream, size = _PACKET.unpack_from(self._in)
            if stream not in {_STDOUT, _STDERR} or size > MAX_PAYLOAD:
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
            self._connection.settimeout(left)
            try:
                part = self._connection.recv(1 << 18)
            except TimeoutError:
                raise
            except OSError as error:
                raise LostError(str(error)) from error
            if not part:
                raise LostError(self._err.decode("utf-8", errors="replace").strip())
            self._in += part


def shut(connection: socket.socket) -> None:
    """End a connection for whoever reads from it, also in another thread."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was gone already
