"""The files that the records of a stream stand in: raw while they are written, compressed once they are closed.

A compressed segment is one gzip member (RFC 1952) with the bytes of the raw one in it, so that anybody can read it.
Where both are there, a crash came between them: the raw one counts.

Reading unpacks as it goes. Memory is bounded whatever a file holds, and so is what comes out of it; anything but one
whole member is damage, and never a shorter log.
"""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from typing import IO, TYPE_CHECKING

from loopguard.errors import AuditTamperedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typing_extensions import Buffer

PACKED = ".gz"
MAX_PACKED_CONTENT_BYTES = 1024**3
"""No segment that was compressed holds more; what unpacks to more was made to fill a disk or to waste an afternoon."""

GZIP_WBITS = 31
"""What zlib calls the gzip format."""

_NAME = re.compile(r"seg-(\d{12})\.jsonl(\.gz)?", re.ASCII)
_BLOCK_BYTES = 64 * 1024


class DamagedSegmentError(AuditTamperedError):
    """A compressed segment that is not one whole gzip member. The records before the damage can be read."""

    def __init__(self, path: Path, why: str) -> None:
        self.text = f"{path}: the compressed segment {why}"
        super().__init__(f"{self.text}. `loopguard audit verify` says more")


def name(first_seq: int) -> str:
    """The file name of a raw segment, from the number of its first record."""
    return f"seg-{first_seq:012d}.jsonl"


def first_seq(path: Path) -> int:
    """The number that a segment's name promises for its first record."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def is_packed(path: Path) -> bool:
    """Whether this is the compressed form."""
    return path.suffix == PACKED


def packed(path: Path) -> Path:
    """Where the compressed form of a raw segment is."""
    return path.with_name(path.name + PACKED)


def every(folder: Path) -> list[Path]:
    """All segment files, oldest first; of a segment in two forms, both, the raw one first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: path.name)


def found(folder: Path, *, behind: int = 0) -> list[Path]:
    """The segment files whose first record comes behind a number, oldest first, each in the form that counts."""
    forms: dict[int, Path] = {}
    for path in every(folder):
        forms.setdefault(first_seq(path), path)
    return [path for first, path in forms.items() if first > behind]


@contextlib.contextmanager
def opened(path: Path, *, offset: int = 0) -> Iterator[IO[bytes]]:
    """The bytes of a segment, from one of them on, in whichever form it has by now.

    Raises OSError; reading raises DamagedSegmentError too.
    """
    with _file(path) as (file, form):
        if not is_packed(form):
            file.seek(offset)
            yield file
            return
        with io.BufferedReader(_Unpacked(file, form), _BLOCK_BYTES) as unpacked:
            while offset > 0 and (skipped := len(unpacked.read(min(offset, _BLOCK_BYTES)))):
                offset -= skipped
            yield unpacked


@contextlib.contextmanager
def _file(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    form = path
    try:
        file = path.open("rb")
    except FileNotFoundError:
        if is_packed(path):
            raise
        form = packed(path)  # it was compressed after somebody listed it
        file = form.open("rb")
    with file:
        yield file, form


class _Unpacked(io.RawIOBase):
    """What a compressed segment holds. Lives as long as somebody reads it; does not close the file."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path
        self._inflate = zlib.decompressobj(GZIP_WBITS)
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        while not self._inflate.eof:
            data = self._more(len(view))
            if data:
                view[: len(data)] = data
                return len(data)
        if self._inflate.unused_data or self._file.read(1):
            raise DamagedSegmentError(self._path, "goes on behind its end")
        return 0

    def _more(self, most: int) -> bytes:
        given = self._inflate.unconsumed_tail or self._file.read(_BLOCK_BYTES)
        if not given:
            raise DamagedSegmentError(self._path, "ends in the middle")
        try:
            data = self._inflate.decompress(given, most)
        except zlib.error as error:
            raise DamagedSegmentError(self._path, f"is not what was written ({error})") from error
        self._size += len(data)
        if self._size > MAX_PACKED_CONTENT_BYTES:
            raise DamagedSegmentError(self._path, f"holds more than any segment ({MAX_PACKED_CONTENT_BYTES:,} bytes)")
        return data
