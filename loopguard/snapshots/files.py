"""How a file or a folder comes to be on disk: whole or not at all, and still there after a power cut.

Not here: what is in them. `state` writes the latch with these, so nothing of torch is needed.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loopguard.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PARTIAL = ".partial-"
"""How the name of a folder begins that has no name of its own yet."""


def replace_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all, on disk when this returns. Raises DiskError where it cannot."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        write_synced(partial, data)
        partial.replace(path)
        sync_directory(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the operating system says in here becomes a DiskError that names the file and the way out."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path} could not be written: {error.strerror}. Mend that and run the same command again; "
            f"it goes on from the last promotion that is on disk"
        ) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and make its content durable; its name is so only after `sync_directory`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, durable by name where they are new."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def partial_name() -> str:
    """A name for a folder that is being filled; nobody else has it."""
    return f"{PARTIAL}{uuid.uuid4().hex}"


@contextmanager
def partial_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder beside the finished ones, to fill and then to hand to `publish`. What is left of it at the end goes."""
    make_directory(parent)
    folder = parent / name
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(partial: Path, final: Path, *, intact: Callable[[], bool]) -> None:
    """Give a filled folder its name. One that has it already stays where it is `intact`, and goes where it is not."""
    sync_directory(partial)
    try:
        partial.rename(final)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
        if not intact():
            discard_folder(final)
            partial.rename(final)
    sync_directory(final.parent)


def discard_folder(folder: Path) -> None:
    """Remove a folder. Its name goes first, so that nobody finds half of it under that name."""
    aside = folder.with_name(partial_name())
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
