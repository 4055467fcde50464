"""Names of files that travel between the controller and a cell, and the way onto a disk for those that come back.

A name is a relative path with `/` between its parts. It is checked where it enters, on the way in and on the way out:
code in a cell chooses what its files are called.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_PART_BYTES = 255
_NAME_BYTES = 1024


def trouble(name: str, *, depth: int) -> str:
    """Why a file may not have this name; empty where it may. `depth` counts folders."""
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "it is not UTF-8"
    parts = name.split("/")
    if not name or "\0" in name or size > _NAME_BYTES:
        return f"a name has 1 to {_NAME_BYTES} bytes and no NUL"
    if name.startswith("/"):
        return "it has to be relative"
    if any(part in ("", ".", "..") for part in parts):
        return "its parts may be neither empty nor '.' nor '..'"
    if any(len(part.encode("utf-8")) > _PART_BYTES for part in parts):
        return f"a part of it is longer than {_PART_BYTES} bytes"
    if len(parts) - 1 > depth:
        return f"it is more than {depth} folders deep"
    return ""


def conflict(names: Iterable[str]) -> str:
    """A name that others need as a folder; empty where there is none."""
    known = set(names)
    for name in sorted(known):
        parts = name.split("/")
        for end in range(1, len(parts)):
            if (folder := "/".join(parts[:end])) in known:
                return folder
    return ""


def save(files: Mapping[str, bytes], folder: Path, *, depth: int = 64) -> list[str]:
    """Write fetched files into a folder that nobody else writes to, and never over or through anything.

    Gives the names that were written. Raises FileExistsError where a file is there already, ValueError for a name that
    no file may have, OSError as the disk says it.
    """
    for name in files:
        if why := trouble(name, depth=depth):
            raise ValueError(f"{name!r} is no name for a file: {why}")
    folder.mkdir(parents=True, exist_ok=True)
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name, data in files.items():
            _save_one(top, name, data)
    finally:
        os.close(top)
    return list(files)


def _save_one(top: int, name: str, data: bytes) -> None:
    *folders, last = name.split("/")
    at = os.dup(top)
    try:
        for part in folders:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=at)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        file = os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=at)
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
    finally:
        os.close(at)
