"""Tensors in a safetensors file, hashed in the same pass that writes or reads them.

The files are plain safetensors and any reader of that format takes them. They are written and read here for three
reasons: the bytes that were verified are the very ones that are used, no second copy of a large state is made, and a
full disk is an OSError like any other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.errors import SnapshotError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import FileIO

    import torch

_PIECE = 8 << 20
"""Bytes at a time. Hashing and writing of a piece leave the interpreter to the thread that trains."""
_MAX_HEADER = 100_000_000


def write_tensors(path: Path, tensors: Sequence[torch.Tensor]) -> str:
    """Write tensors to a new file, durably but for its name, and give its SHA-256. Raises OSError."""
    header, order = _layout(tensors)
    with path.open("xb", buffering=0) as raw:
        file = _Hashing(raw)
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for index in order:
            file.write(_bytes_of(tensors[index]))
        os.fsync(raw.fileno())
    return file.digest


def read_tensors(path: Path, sha256: str) -> list[torch.Tensor]:
    """The tensors of a file, in memory of their own. Raises SnapshotError where it is missing or has other content."""
    import torch

    try:
        with path.open("rb", buffering=0) as raw:
            file = _Hashing(raw)
            placed = _read_header(file, size=os.fstat(raw.fileno()).st_size)
            found: dict[int, torch.Tensor] = {}
            for index, dtype, shape, length in placed:
                data = torch.empty(length, dtype=torch.uint8)
                file.read_into(memoryview(data.numpy().data))
                found[index] = data.view(dtype).reshape(shape)
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        # A changed byte in the header leads anywhere; what it leads to is not what the name says either.
        raise _other_content(path) from error
    if file.digest != sha256:
        raise _other_content(path)
    return [found[index] for index in range(len(found))]


def verify_file(path: Path, sha256: str) -> None:
    """Read a file through. Raises SnapshotError where it is missing or has other content."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}") from error
    if found != sha256:
        raise _other_content(path)


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    """How many bytes they take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@functools.cache
def names_of_dtypes() -> dict[torch.dtype, str]:
    """What the format calls the element types it knows."""
    import torch

    return {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.complex64: "C64",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint64: "U64",
        torch.uint32: "U32",
        torch.uint16: "U16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }


class _Hashing:
    """A file whose bytes are hashed as they pass."""

    def __init__(self, raw: FileIO) -> None:
        self._raw = raw
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = self._raw.write(view[:_PIECE])
            self._hash.update(view[:written])
            view = view[written:]

    def read_into(self, view: memoryview) -> None:
        while view:
            count = self._raw.readinto(view[:_PIECE])
            if not count:
                raise ValueError("the file ends early")
            self._hash.update(view[:count])
            view = view[count:]

    def read(self, count: int) -> bytes:
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)


def _layout(tensors: Sequence[torch.Tensor]) -> tuple[bytes, list[int]]:
    """The header, and the order of the tensors behind it: wide elements first, so that each starts where it may."""
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index].element_size())
    names = names_of_dtypes()
    entries: dict[str, Any] = {}
    end = 0
    for index in order:
        tensor = tensors[index]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[_name(index)] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8), order


def _read_header(file: _Hashing, *, size: int) -> list[tuple[int, torch.dtype, list[int], int]]:
    """(place, element type, shape, bytes) of each tensor, in the order of the file. Raises ValueError and its like."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, _MAX_HEADER):
        raise ValueError("the header is longer than the file")
    dtypes = {name: dtype for dtype, name in names_of_dtypes().items()}
    entries = json.loads(file.read(length))
    placed, end = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end or stop < start:
            raise ValueError("the tensors do not lie end to end")
        placed.append((int(name.removeprefix("t")), dtypes[entry["dtype"]], entry["shape"], stop - start))
        end = stop
    if 8 + length + end != size:
        raise ValueError("the file is not as long as its header says")
    return placed


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _name(index: int) -> str:
    return f"t{index:06d}"


def _other_content(path: Path) -> SnapshotError:
    return SnapshotError(f"{path} is not what the manifest says; its content was changed or cut short")
