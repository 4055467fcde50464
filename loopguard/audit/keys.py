"""The keys that sign checkpoints of an audit log: made, kept, found, and checked with.

Ed25519, in the text encodings of C2SP signed notes, so that other tools read keys and signatures of ours. A signing key
is one line in a file that nobody else may read, outside of every run directory; its public half is a *vkey*, which is
no secret, and which whoever verifies has to get from elsewhere than the run.

Not here: which checkpoints there are, and what a signature proves (`notes`, `verify`). `docs/audit-keys.md` says where
keys live and what their thief can do. The cryptography package is loaded when a key is used, and not before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loopguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

VARIABLE = "LOOPGUARD_LOG_KEY"
"""Environment variable with the path of the log key; set and empty, it says that there is none."""

KEY_FILE = "log.key"
VKEY_FILE = "log.vkey"

_ED25519 = b"\x01"
_SEED_BYTES = 32
_PRIVATE = "PRIVATE+KEY+"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """The public half of a key: who signs, and what checks that. Its text is `NAME+HASH+BASE64`."""

    name: str
    public: bytes

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """The key in its text. Raises UsageError where it is none."""
        name, stated, data = _parted(text.strip(), "is not a vkey (NAME+HASH+BASE64, as `loopguard audit keygen` says)")
        key = cls(name, data)
        if key.id.hex() != stated:
            raise UsageError(f"the vkey {text.strip()!r} contradicts itself: its hash is {key.id.hex()}; copy it anew")
        return key

    @property
    def id(self) -> bytes:
        """The four bytes by which a signature says whose it is."""
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{_base64(_ED25519 + self.public)}"

    def signed(self, text: str, signature: bytes) -> bool:
        """Whether this is the key's signature under a text."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text.encode())
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that signs. Its text, `PRIVATE+KEY+NAME+HASH+BASE64`, is the secret; what prints of it is not."""

    name: str
    seed: bytes

    @classmethod
    def made(cls, name: str) -> SigningKey:
        """A new key under a name. Raises UsageError for a name that is none."""
        if not _NAME.fullmatch(name):
            tail = "use up to 128 letters, digits, '.', '_', '-' and '/', such as gpu7 or example.org/training"
            raise UsageError(f"{name!r} is no name for a key: {tail}")
        return cls(name, os.urandom(_SEED_BYTES))

    @classmethod
    def parse(cls, text: str, *, place: str) -> SigningKey:
        """The key in its text; `place` is where it was found. Raises UsageError, which never repeats the text."""
        words = text.strip()
        if not words.startswith(_PRIVATE):
            raise UsageError(f"{place} holds no log key; make one with `loopguard audit keygen NAME`")
        name, stated, data = _parted(words.removeprefix(_PRIVATE), f"in {place} is damaged; make another", secret=True)
        key = cls(name, data)
        if key.public.id.hex() != stated:
            raise UsageError(f"the log key in {place} is damaged: its hash is not that of its key; make another")
        return key

    @property
    def public(self) -> VerifierKey:
        """The half that others check with."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        key = Ed25519PrivateKey.from_private_bytes(self.seed)
        return VerifierKey(self.name, key.public_key().public_bytes_raw())

    def text(self) -> str:
        """The secret, as a key file holds it."""
        return f"{_PRIVATE}{self.name}+{self.public.id.hex()}+{_base64(_ED25519 + self.seed)}"

    def sign(self, text: str) -> bytes:
        """The signature under a text, 64 bytes."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(text.encode())

    def __repr__(self) -> str:
        return f"SigningKey({self.name!r})"


def keygen(name: str, *, folder: Path | None = None) -> tuple[Path, VerifierKey]:
    """Make a log key and write it to `log.key` in a folder, for nobody else to read, with `log.vkey` beside it.

    Without a folder it is the one where a loop looks. Raises UsageError where there is a key already, and for a folder
    inside a run directory: whoever may write there could sign what they wrote.
    """
    key = SigningKey.made(name)
    try:
        home = folder if folder is not None else default_folder()
    except RuntimeError as error:  # a user without a home, as in some containers
        raise UsageError(f"there is no place for a key: {error}; name a folder with --out") from error
    _refuse_inside_a_run(home)
    path, public = home / KEY_FILE, home / VKEY_FILE
    if there := [file for file in (path, public) if file.exists()]:
        tail = "take both files of the old key away first, or name another folder with --out"
        raise UsageError(f"{there[0]} is there already, and a key is never written over: {tail}")
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_new(path, key.text(), 0o600)
        _write_new(public, str(key.public), 0o644)
    except OSError as error:
        raise UsageError(
            f"cannot write a key to {home}: {error.strerror or error}; name a folder with --out"
        ) from error
    return path, key.public


def log_key(run_dir: Path, *, environment: Mapping[str, str] = os.environ) -> SigningKey | None:
    """The key that signs the log of a run: the file that LOOPGUARD_LOG_KEY names, else `log.key` in the default folder.

    None where the variable is empty, or where it is not set and there is no such file. Raises UsageError for a file
    that was named and is not there (also by a link), that others may read, that lies in the run directory, or that
    holds no key.
    """
    named = environment.get(VARIABLE)
    if named == "":
        return None
    try:
        path = Path(named).expanduser() if named else default_folder(environment) / KEY_FILE
    except RuntimeError as error:  # a user without a home, as in some containers
        if named:
            raise UsageError(f"{VARIABLE} names {named}, which leads nowhere: {error}") from error
        return None
    try:
        with path.open(encoding="utf-8") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(4096)
    except (FileNotFoundError, NotADirectoryError):
        if named:
            raise UsageError(
                f"{VARIABLE} names {path}, which is not there; correct it, or empty it to sign nothing"
            ) from None
        if path.is_symlink():  # a volume with keys that is not mounted
            raise UsageError(
                f"the log key {path} is a link to {path.readlink()}, which is not there; bring it back, or take the "
                f"link away to sign nothing"
            ) from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the log key {path} cannot be read: {error}") from error
    if mode & 0o077:
        raise UsageError(f"the log key {path} can be read by others, who could sign with it: chmod 600 {path}")
    if _inside(path, run_dir):
        raise UsageError(f"the log key {path} lies in the run directory {run_dir}; keep it elsewhere")
    return SigningKey.parse(text, place=str(path))


def default_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the log key of this user is looked for."""
    home = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "loopguard"


def trusted(texts: Iterable[str]) -> list[VerifierKey]:
    """The vkeys that somebody trusts, each given as its text or as a file that holds it. Raises UsageError."""
    return [VerifierKey.parse(_vkey_text(text)) for text in texts]


def _vkey_text(given: str) -> str:
    if given.count("+") >= 2:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--key {given!r} is neither a vkey nor a file with one: {error}") from error


def _parted(text: str, trouble: str, *, secret: bool = False) -> tuple[str, str, bytes]:
    """Name, hash and the 32 bytes of a key."""
    subject = "the log key" if secret else repr(text)
    parts = text.split("+", 2)
    if len(parts) != 3:
        raise UsageError(f"{subject} {trouble}")
    name, stated, encoded = parts
    data = unbase64(encoded)
    if not name or any(char.isspace() for char in name) or data is None or len(data) != 1 + _SEED_BYTES:
        raise UsageError(f"{subject} {trouble}")
    if data[:1] != _ED25519:
        raise UsageError(f"{subject} {trouble}: it is not of the kind Ed25519")
    return name, stated, data[1:]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def unbase64(text: str) -> bytes | None:
    """The bytes of a standard base64 text; None where it is none, or is not the one spelling of those bytes."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if _base64(data) == text else None


def _write_new(path: Path, text: str, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(fd)


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(Path(folder).resolve())


def _refuse_inside_a_run(folder: Path) -> None:
    whole = folder.resolve()
    for parent in (whole, *whole.parents):
        if (parent / "run.json").exists():
            raise UsageError(f"{folder} lies in the run directory {parent}; keep keys where no run writes")
