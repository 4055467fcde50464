"""One HTTP request on its way out of a cell, in the two forms that are taken, and the end of its body.

Parsed here rather than by an HTTP library, because the point is how little is understood. Libraries forgive: they join
folded lines, take bare line feeds, and let one of two lengths win. Whatever is not plainly one of two forms is refused,
and so there is no second reading of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

MAX_HEADERS = 100
_SHOWN = 200
_SIZE_LINE = 10

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])")
_HEADER = re.compile(rb"(" + TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_AUTHORITY = re.compile(r"([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,64}\])(?::([1-9][0-9]{0,4}))?")

OURS = frozenset(
    b"connection content-length host http2-settings keep-alive te trailer transfer-encoding upgrade".split()
)
"""Headers that are between a client and its proxy, or that the proxy writes anew."""


class MalformedError(Exception):
    """A request that is neither of the two forms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one connection asks for."""

    method: bytes
    host: str
    port: int
    path: bytes
    minor: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: Body
    length: bytes | None = None

    @property
    def tunnel(self) -> bool:
        """Whether it is a CONNECT."""
        return self.method == b"CONNECT"

    def head(self, host: str, secrets: Sequence[tuple[bytes, bytes]]) -> bytes:
        """The request head as the place gets it: under the name it goes by, with these headers in place of others."""
        named = {
            same(name)
            for header, value in self.headers
            if header.lower() == b"connection"
            for name in re.findall(TOKEN, value)
        }
        named |= OURS | {same(header) for header, _ in secrets}
        lines = [b"%s %s HTTP/1.%s" % (self.method, self.path, self.minor), b"Host: " + host.encode()]
        kept = [each for each in self.headers if same(each[0]) not in named and not same(each[0]).startswith(b"proxy-")]
        lines += [b"%s: %s" % each for each in (*kept, *secrets)]
        if self.length is not None:
            lines.append(b"Content-Length: " + self.length)
        elif isinstance(self.body, _Chunked):
            lines.append(b"Transfer-Encoding: chunked")
        return b"\r\n".join([*lines, b"Connection: close", b"", b""])


class Body(Protocol):
    """Which of the bytes behind a request head belong to it."""

    done: bool

    def take(self, inbox: bytearray, most: int) -> bytes:
        """Cut some of them off. Nothing means that more has to come, or that there is no room."""
        ...


class _Everything:
    """All of them: a tunnel."""

    done = False

    def take(self, inbox: bytearray, most: int) -> bytes:
        return _cut(inbox, most)


class _Counted:
    """As many as Content-Length says."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = not length

    def take(self, inbox: bytearray, most: int) -> bytes:
        piece = _cut(inbox, min(most, self._left))
        self._left -= len(piece)
        self.done = not self._left
        return piece


class _Chunked:
    """Chunks in their plainest form: a size, the data, an empty one at the end. No extensions, no trailers."""

    def __init__(self) -> None:
        self.done = False
        self._left = 0
        self._expected: Literal["size", "data", "end"] = "size"
        self._last = False

    def take(self, inbox: bytearray, most: int) -> bytes:
        if most < _SIZE_LINE:
            return b""
        if self._expected == "data":
            piece = _cut(inbox, min(most, self._left))
            self._left -= len(piece)
            if not self._left:
                self._expected = "end"
            return piece
        if self._expected == "end":
            if not b"\r\n".startswith(inbox[:2]):
                raise MalformedError("a chunk that does not end where it says, or a trailer")
            if len(inbox) < 2:
                return b""
            self._expected, self.done = "size", self._last
            return _cut(inbox, 2)
        end = inbox.find(b"\r\n", 0, _SIZE_LINE)
        if end < 0 and len(inbox) < _SIZE_LINE:
            return b""
        if end < 0 or not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", inbox[:end]):
            raise MalformedError("a chunk whose size is not a plain number")
        self._left = int(inbox[:end], 16)
        self._last = not self._left
        self._expected = "end" if self._last else "data"
        return _cut(inbox, end + 2)


def _cut(inbox: bytearray, most: int) -> bytes:
    piece = bytes(inbox[:most])
    del inbox[: len(piece)]
    return piece


def parse(head: bytes, event: dict[str, Any]) -> Request:
    """A request head without its empty line; notes in the event where it wants to go. Raises MalformedError."""
    first, *rest = head.split(b"\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise MalformedError("a request line in no form that is taken")
    method, target, minor = line.groups()
    if method == b"CONNECT":
        authority, path = target.decode("ascii"), b""
    elif target.startswith(b"http://") and b"#" not in target:
        name, slash, path = re.fullmatch(rb"([^/?]*)([/?]?)(.*)", target.removeprefix(b"http://")).groups()  # type: ignore[union-attr] # matches everything
        authority, path = name.decode("ascii"), (b"/" if slash == b"/" else b"/" + slash) + path
    else:
        raise MalformedError("a request line in no form that is taken")
    event["host"] = shown(authority.rpartition("@")[2])  # a login before it is refused, and in no record
    where = _AUTHORITY.fullmatch(authority)
    if where is None or (method == b"CONNECT" and where[2] is None) or int(where[2] or 80) > 65535:
        raise MalformedError("not a host and a port")
    host, port = where[1], int(where[2] or 80)
    event["host"], event["port"] = shown(host), port
    if method.upper() in {b"TRACE", b"TRACK"} or method.upper() == b"CONNECT" != method:
        # A TRACE would show the cell what is added to it here.
        raise MalformedError("a method that is not taken")
    headers = _headers(rest)
    length, body = _framing(headers, tunnel=method == b"CONNECT", minor=minor)
    return Request(
        method=method, host=host, port=port, path=path, minor=minor, headers=headers, body=body, length=length
    )


def _headers(lines: Sequence[bytes]) -> tuple[tuple[bytes, bytes], ...]:
    if len(lines) > MAX_HEADERS:
        raise MalformedError(f"more than {MAX_HEADERS} headers")
    headers = []
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise MalformedError("a header in no form that is taken")
        headers.append((found[1], found[2].strip(b" \t")))
    return tuple(headers)


def _framing(headers: Sequence[tuple[bytes, bytes]], *, tunnel: bool, minor: bytes) -> tuple[bytes | None, Body]:
    """Where the body of a request ends, which must be said once or not at all. Raises MalformedError."""
    said = {
        wanted: [value for name, value in headers if name.lower() == wanted]
        for wanted in (b"host", b"content-length", b"transfer-encoding")
    }
    lengths, codings = said[b"content-length"], said[b"transfer-encoding"]
    if len(lengths) + len(codings) > 1 or len(said[b"host"]) > 1:
        raise MalformedError("two lengths, or two hosts")
    if tunnel:
        if lengths or codings:
            raise MalformedError("a CONNECT with a body")
        return None, _Everything()
    if codings:
        if codings[0].lower() != b"chunked" or minor != b"1":
            raise MalformedError("a transfer coding other than chunked")
        return None, _Chunked()
    if not lengths:
        return None, _Counted(0)
    if not re.fullmatch(rb"[0-9]{1,15}", lengths[0]):
        raise MalformedError("a length that is no plain number")
    return lengths[0], _Counted(int(lengths[0]))


def same(header: bytes) -> bytes:
    """What servers take for the same header: many turn both `-` and `_` into `_`."""
    return header.lower().replace(b"_", b"-")


def shown(text: str) -> str:
    """Words of others in a record: printable ASCII, and not too many of them."""
    escaped = "".join(each if " " <= each <= "~" else ascii(each)[1:-1] for each in text[:_SHOWN])
    return escaped[:_SHOWN]
