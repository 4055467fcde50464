"""Log checkpoints: one short text that stands for a whole log up to some record, signed where there is a key.

The text is a C2SP tlog-checkpoint without extension lines (origin, size, root of the tree), the signature that of a
C2SP signed note. A *log checkpoint* has nothing to do with those that a training framework writes.

Here is how a checkpoint is written, read, signed and stored. When there is one is for `log` to say, what it proves for
`verify`. A note without a signature proves something only where it was kept elsewhere than beside the log.
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loopguard.audit.keys import unbase64
from loopguard.audit.tree import HASH_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from loopguard.audit.keys import SigningKey, VerifierKey

FOLDER = "checkpoints"
MAX_NOTE_BYTES = 64 * 1024

_DASH = "\N{EM DASH}"
_FILE = re.compile(r"(0|[1-9]\d*)\.note")
_SIZE = re.compile(r"0|[1-9]\d{0,15}", re.ASCII)
_MOST_SIGNATURES = 64


class BadNoteError(ValueError):
    """A text that is no checkpoint, or has a signature that a known key did not make. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log held: so many records, with this root over them."""

    origin: str
    """The `log` field of every record: run and stream."""
    size: int
    root: bytes

    def text(self) -> str:
        """The lines that are signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode('ascii')}\n"

    def note(self, key: SigningKey | None) -> str:
        """The checkpoint as it is stored: signed, or its three lines alone where there is no key."""
        text = self.text()
        if key is None:
            return text
        signature = base64.b64encode(key.public.id + key.sign(text)).decode("ascii")
        return f"{text}\n{_DASH} {key.name} {signature}\n"


@dataclass(frozen=True, slots=True)
class Note:
    """A checkpoint with the signatures under it, none of them checked yet."""

    checkpoint: Checkpoint
    signatures: tuple[tuple[str, bytes, bytes], ...]
    """Of each: name of the key, its id, and what is to be checked."""

    @classmethod
    def parse(cls, note: str) -> Note:
        """The checkpoint in a note. Raises BadNoteError."""
        if any(char < " " and char != "\n" for char in note):
            raise BadNoteError("holds control characters")
        try:
            size = len(note.encode())
        except UnicodeEncodeError as error:  # out of JSON, which can spell half a character
            raise BadNoteError("is no text") from error
        if size > MAX_NOTE_BYTES or note.count("\n") > _MOST_SIGNATURES + 4:
            raise BadNoteError("is longer than any checkpoint")
        text, blank, rest = note.rpartition("\n\n")
        text, rest = (f"{text}\n", rest) if blank else (note, "")
        if blank and not rest:
            raise BadNoteError("has an empty line and no signature behind it")
        return cls(_checkpoint(text), tuple(_signature(line) for line in _lines(rest)))

    def text(self) -> str:
        """The whole note, with its signatures, as it was parsed."""
        lines = (
            f"{_DASH} {name} {base64.b64encode(key + made).decode('ascii')}\n" for name, key, made in self.signatures
        )
        return self.checkpoint.text() + (f"\n{''.join(lines)}" if self.signatures else "")

    def signer(self, keys: Iterable[VerifierKey]) -> VerifierKey | None:
        """The first of these keys that signed it; None where none did. Raises BadNoteError as `signers` does."""
        return next(iter(self.signers(keys)), None)

    def signers(self, keys: Iterable[VerifierKey]) -> list[VerifierKey]:
        """Those of these keys that signed it.

        Raises BadNoteError where a signature says that it is of one of these keys and is not: such a note is rejected,
        whatever else stands under it.
        """
        found = []
        for key in keys:
            for name, identity, signature in self.signatures:
                if (name, identity) != (key.name, key.id):
                    continue
                if not key.signed(self.checkpoint.text(), signature):
                    raise BadNoteError(f"has a signature of {key.name} that the key did not make")
                found += [key] if key not in found else []
        return found


def _checkpoint(text: str) -> Checkpoint:
    lines = _lines(text)
    if len(lines) != 3:
        raise BadNoteError("is not a checkpoint of three lines (origin, size, root)")
    origin, size, encoded = lines
    root = unbase64(encoded)
    if not origin or not _SIZE.fullmatch(size) or root is None or len(root) != HASH_BYTES:
        raise BadNoteError("is not a checkpoint (origin, size, root in base64)")
    return Checkpoint(origin, int(size), root)


def _signature(line: str) -> tuple[str, bytes, bytes]:
    words = line.split(" ")
    data = unbase64(words[2]) if len(words) == 3 and words[0] == _DASH and words[1] else None
    if data is None or len(data) < 5:
        raise BadNoteError("has a line where a signature belongs")
    return words[1], data[:4], data[4:]


def _lines(text: str) -> list[str]:
    if text and not text.endswith("\n"):
        raise BadNoteError("does not end its last line")
    return text.split("\n")[:-1]


# -- files beside a log ------------------------------------------------------------------------------------------------


def store(folder: Path, note: str, *, size: int) -> Path:
    """Write a checkpoint into the folder of a stream; it is whole and on disk after this. Raises OSError."""
    home = folder / FOLDER
    if not home.is_dir():
        home.mkdir(exist_ok=True)
        _sync_folder(folder)
    path, partial = home / f"{size}.note", home / f".{size}.note"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(note.encode())
        file.flush()
        os.fsync(fd)
    partial.replace(path)
    _sync_folder(home)
    return path


def stored(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints beside a log, by the size that their names say, smallest first. Raises OSError."""
    home = folder / FOLDER
    if not home.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in home.iterdir() if (match := _FILE.fullmatch(path.name))]
    return sorted(found)


def read(path: Path) -> str:
    """The text of a note. Raises BadNoteError where it is too long or no text, OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_NOTE_BYTES + 1)
    if len(data) > MAX_NOTE_BYTES:
        raise BadNoteError("is longer than any checkpoint")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadNoteError("is not UTF-8") from error


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
