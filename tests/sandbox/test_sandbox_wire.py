"""Frames: what goes in comes out, and what is no frame is never taken for one."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopguard.errors import SandboxError
from loopguard.sandbox import wire

VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
HEADERS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)


class Wire:
    """A connection that gives out prepared bytes in pieces, then ends."""

    def __init__(self, data: bytes, *, piece: int = 1 << 20) -> None:
        self.data, self.piece = data, piece

    def settimeout(self, timeout: float | None) -> None:
        assert timeout is None or timeout > 0

    def recv(self, size: int) -> bytes:
        part, self.data = self.data[: min(size, self.piece)], self.data[min(size, self.piece) :]
        return part

    def sendall(self, data: bytes) -> None:
        raise BrokenPipeError("gone")

    def fileno(self) -> int:
        return 0


def packets(data: bytes, *, stream: int = 1, size: int = 1000) -> bytes:
    """Bytes as the engine wraps them."""
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(struct.pack(">BxxxI", stream, len(part)) + part for part in parts)


@given(header=HEADERS, payload=st.binary(max_size=3000), size=st.integers(1, 999), piece=st.integers(1, 999))
def test_a_frame_survives_any_cutting(header, payload, size, piece):
    """However the engine and the socket cut a frame, it comes out as it went in."""
    channel = wire.Channel(Wire(packets(wire.encode(wire.RESULT, header, payload), size=size), piece=piece))
    assert channel.receive(wire.RESULT, timeout_s=5) == wire.Frame(wire.RESULT, header, payload)


@given(cut=st.integers(0, 200))
def test_a_torn_frame_is_a_lost_cell(cut):
    """A stream that ends within a frame gives no frame."""
    whole = packets(wire.encode(wire.RESULT, {"id": "a"}, b"x" * 150))
    with pytest.raises(wire.LostError):
        wire.Channel(Wire(whole[: min(cut, len(whole) - 1)])).receive(wire.RESULT, timeout_s=5)


@given(garbage=st.binary(min_size=16, max_size=300))
def test_garbage_is_never_a_frame(garbage):
    """Bytes that no supervisor sends end in an error, whatever they are."""
    with pytest.raises(SandboxError):
        wire.Channel(Wire(packets(b"\0" + garbage))).receive(wire.RESULT, timeout_s=5)


@given(garbage=st.binary(max_size=300))
def test_packets_that_are_none_are_refused(garbage):
    """Neither does a stream that the engine did not wrap pass for one."""
    with pytest.raises(SandboxError):
        wire.Channel(Wire(b"\7" + garbage.ljust(7, b"\0"))).receive(wire.RESULT, timeout_s=5)


def test_two_frames_in_one_piece_are_two():
    """A second frame that came along with the first is kept for the next look."""
    both = wire.encode(wire.RESULT, {"n": 1}) + wire.encode(wire.CLEAN, {"n": 2})
    channel = wire.Channel(Wire(packets(both)))
    assert channel.receive(wire.RESULT, timeout_s=5).header == {"n": 1}
    assert channel.waiting()
    assert channel.receive(wire.CLEAN, timeout_s=5).header == {"n": 2}


def test_a_frame_of_another_kind_is_refused():
    """A CLEAN where a RESULT is due means that one of us has lost count."""
    with pytest.raises(wire.ProtocolError, match="expected a frame of type 3"):
        wire.Channel(Wire(packets(wire.encode(wire.CLEAN, {})))).receive(wire.RESULT, timeout_s=5)


@pytest.mark.parametrize("header", [b"[1]", b"{", b"\xff"])
def test_a_header_that_is_no_object_is_refused(header):
    """A header has to be a JSON object."""
    frame = struct.pack(">2sBxII", b"LG", wire.RESULT, len(header), 0) + header
    with pytest.raises(wire.ProtocolError):
        wire.Channel(Wire(packets(frame))).receive(wire.RESULT, timeout_s=5)


def test_a_frame_that_claims_too_much_is_refused_before_it_is_read():
    """A length beyond the limit is an error at once, not an allocation."""
    frame = struct.pack(">2sBxII", b"LG", wire.RESULT, 2, 1001)
    with pytest.raises(wire.ProtocolError):
        wire.Channel(Wire(packets(frame)), most=1000).receive(wire.RESULT, timeout_s=5)


def test_a_payload_that_fits_no_frame_is_not_sent():
    """A length that the frame has no room for is never cut."""
    with pytest.raises(wire.ProtocolError, match="no room for"):
        wire.head(wire.CALL, {}, wire.MAX_PAYLOAD)


def test_what_a_cell_said_last_is_told():
    """The last words of a supervisor are in the error."""
    channel = wire.Channel(Wire(packets(b"module foo cannot be preloaded", stream=2)))
    with pytest.raises(wire.LostError, match="module foo cannot be preloaded"):
        channel.receive(wire.HELLO, timeout_s=5)


def test_a_silent_cell_is_late():
    """Silence ends in TimeoutError, a closed connection in LostError; `waiting` looks without waiting."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = wire.Channel(ours)
        assert not channel.waiting()
        with pytest.raises(TimeoutError):
            channel.receive(wire.RESULT, timeout_s=0.01)
        theirs.close()
        assert channel.waiting()
        with pytest.raises(wire.LostError):
            channel.receive(wire.RESULT, timeout_s=5)
        ours.close()
        assert channel.waiting()


def test_sending_into_a_closed_stream_is_a_lost_cell():
    """A broken pipe is not a Python traceback."""
    with pytest.raises(wire.LostError, match="gone"):
        wire.Channel(Wire(b"")).send(wire.CALL, {}, timeout_s=1)
