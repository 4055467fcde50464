"""SSH keys as people have them, and the signatures that `ssh-keygen -Y sign` makes with them.

Keys: ed25519, ECDSA on P-256, RSA of at least 2048 bits, and ed25519 on a security key, which has to be touched.
Signatures: OpenSSH's SSHSIG, version 1, over SHA-256 or SHA-512. A signature says which key made it and for which
purpose (its *namespace*), and not when.

Not here: certificates, SHA-1, and any other way to wrap a signature.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

NAMESPACE = "loopguard-approve@v1"
"""What an approval is signed for. A signature over a commit or a file of the same bytes is no approval."""

MAX_SIGNATURE_BYTES = 8 * 1024
"""Of an armored signature. One by a 16384-bit RSA key has two thirds of this, and ten of them fit into a record."""

_MAGIC = b"SSHSIG"
_ARMOR = re.compile(r"\s*-----BEGIN SSH SIGNATURE-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END SSH SIGNATURE-----\s*")
_HASHES = {b"sha256": hashlib.sha256, b"sha512": hashlib.sha512}
_ALGORITHMS = {
    "ssh-ed25519": (b"ssh-ed25519",),
    "sk-ssh-ed25519@openssh.com": (b"sk-ssh-ed25519@openssh.com",),
    "ecdsa-sha2-nistp256": (b"ecdsa-sha2-nistp256",),
    "ssh-rsa": (b"rsa-sha2-256", b"rsa-sha2-512"),
}
_MIN_RSA_BITS = 2048
_FIRST_WORD = re.compile(r'(?:[^\s"]|"[^"]*")+')
_OPTION = re.compile(r'([A-Za-z-]+)(?:="([^"]*)")?(?:,(?=.)|$)')
_WHEN = re.compile(r"(\d{8})(\d{4}(?:\d{2})?)?Z")
_TOUCHED = 1
"""The flag by which a security key says that somebody was there."""


class KeyLineError(ValueError):
    """A line that names no key which may approve. The message is what comes after the place."""


class SignatureError(ValueError):
    """Text that is no SSH signature, or one of a kind that is not taken."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, and the time in which it counts."""

    type: str
    blob: bytes
    valid_after: str | None = None
    """RFC 3339; before this the key approves nothing."""
    valid_before: str | None = None
    """RFC 3339; from this on the key approves nothing."""

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it."""
        return fingerprint(self.blob)

    def counts_at(self, now: str) -> bool:
        """Whether the key counts at a time, RFC 3339 with six decimals."""
        return (self.valid_after is None or self.valid_after <= now) and (
            self.valid_before is None or now < self.valid_before
        )


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature as its text says; nothing is checked before `verifies`."""

    key: bytes
    namespace: str
    hash: bytes
    algorithm: bytes
    raw: bytes
    """The signature proper; of a security key with what that key adds."""

    @property
    def fingerprint(self) -> str:
        """Of the key that says it signed."""
        return fingerprint(self.key)


def fingerprint(blob: bytes) -> str:
    """How people tell keys apart: SHA256:... in base64."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode("ascii").rstrip("=")


def read_key(line: str) -> Key:
    """The key in a line of an `allowed_signers` file without its principals: `[options] type base64 [comment]`.

    Of the options, `valid-after`, `valid-before` (in UTC, with a Z) and `namespaces` are understood. Raises
    KeyLineError for any other, for keys that are too weak, and for private keys.
    """
    if "PRIVATE KEY" in line:
        raise KeyLineError("is a private key; write the line of the .pub file beside it")
    options, words = _split_options(line)
    if len(words) < 2:
        raise KeyLineError("is no public key; expected a line such as 'ssh-ed25519 AAAA...'")
    kind, text = words[0], words[1]
    if kind not in _ALGORITHMS:
        raise KeyLineError(f"is a key of type {kind[:60]!r}; expected one of {', '.join(_ALGORITHMS)}")
    try:
        blob = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise KeyLineError("holds a key that is not base64; copy the whole line of the .pub file") from None
    _public(kind, blob)
    return Key(kind, blob, **_window(options))


def _split_options(line: str) -> tuple[str, list[str]]:
    """The options, and the words behind them."""
    head = _FIRST_WORD.match(line.strip())
    if head is None or head[0] in _ALGORITHMS:
        return "", line.split()
    rest = line.strip()[head.end() :].split()
    # Options are what stands before a type; a word before anything else is a type that nobody knows.
    return (head[0], rest) if rest and rest[0] in _ALGORITHMS else ("", line.split())


def _window(options: str) -> dict[str, str]:
    """The time in which a key counts, from its options."""
    found: dict[str, str] = {}
    at = 0
    while at < len(options):
        match = _OPTION.match(options, at)
        if match is None:
            raise KeyLineError(f"has options that cannot be read: {options[at:][:60]!r}")
        name, value, at = match[1].lower(), match[2], match.end()
        if name in ("valid-after", "valid-before"):
            found[name.replace("-", "_")] = _when(name, value)
        elif name != "namespaces":
            raise KeyLineError(f"has the option {name!r}; expected valid-after, valid-before or namespaces")
        elif NAMESPACE not in (value or "").split(","):
            raise KeyLineError(f"may not sign {NAMESPACE}; add that to its namespaces, or leave them out")
    return found


def _when(name: str, value: str | None) -> str:
    match = _WHEN.fullmatch(value or "")
    try:
        if match is None:
            raise ValueError
        moment = datetime.strptime(match[1] + (match[2] or "").ljust(6, "0"), "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        raise KeyLineError(
            f"has {name}={value!r}; expected a time in UTC, such as 20300131Z or 20300131120000Z"
        ) from None
    return stamp(moment)


def stamp(moment: datetime) -> str:
    """A time as records have it: RFC 3339 in UTC with six decimals, so that text sorts as time does."""
    # Not strftime: it writes the year 26 as it is, and text that begins with "26-" sorts behind this century.
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def read_signature(armored: str) -> Signature:
    """The signature in an armored text. Raises SignatureError."""
    match = _ARMOR.fullmatch(armored) if len(armored) <= MAX_SIGNATURE_BYTES else None
    if match is None:
        raise SignatureError("it does not begin and end as an SSH signature does")
    try:
        wire = _Wire(base64.b64decode("".join(match[1].split()), validate=True))
    except binascii.Error:
        raise SignatureError("it is not base64") from None
    if wire.take(len(_MAGIC)) != _MAGIC or wire.number() != 1:
        raise SignatureError("it is not of version 1")
    key, namespace, reserved, digest, signature = (wire.string() for _ in range(5))
    wire.end()
    if reserved:
        raise SignatureError("it holds something where nothing belongs")
    proper = _Wire(signature)
    algorithm = proper.string()
    return Signature(key, namespace.decode("utf-8", "replace"), digest, algorithm, proper.rest())


def verifies(signature: Signature, key: Key, message: bytes) -> bool:
    """Whether this key made this signature over this message, for the namespace that it names.

    Raises SignatureError where the signature is of a kind that is not taken from such a key.
    """
    if signature.key != key.blob:
        return False
    if signature.hash not in _HASHES:
        raise SignatureError(f"it is over the hash {signature.hash[:40]!r}; expected sha256 or sha512")
    if signature.algorithm not in _ALGORITHMS[key.type]:
        raise SignatureError(f"it is of the kind {signature.algorithm[:40]!r}, which is not taken from {key.type}")
    digest = _HASHES[signature.hash](message).digest()
    signed = _MAGIC + b"".join(_string(part) for part in (signature.namespace.encode(), b"", signature.hash, digest))
    return _CHECKS[key.type](signature, key, signed)


class _Wire:
    """Bytes as SSH packs them, read from their front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise SignatureError("it is cut short")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def string(self) -> bytes:
        return self.take(self.number())

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        if self._at != len(self._data):
            raise SignatureError("it goes on behind its end")


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _one_string(data: bytes) -> bytes:
    wire = _Wire(data)
    text = wire.string()
    wire.end()
    return text


def _public(kind: str, blob: bytes) -> list[bytes]:
    """What a key blob holds behind its type. Raises KeyLineError where that is no key, or a weak one."""
    wire = _Wire(blob)
    try:
        named = wire.string().decode("ascii", "replace")
        parts = [wire.string() for _ in range(1 if kind == "ssh-ed25519" else 2)]
        wire.end()
        if named != kind:
            raise KeyLineError(f"says {kind} and holds a key of type {named[:60]!r}")
        _LOADERS[kind](parts)
    except KeyLineError:
        raise
    except ValueError as error:
        raise KeyLineError("holds no whole key; copy the whole line of the .pub file") from error
    return parts


def _ed25519(parts: list[bytes]) -> ed25519.Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(parts[0])


def _p256(parts: list[bytes]) -> ec.EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    if parts[0] != b"nistp256":
        raise ValueError
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), parts[1])


def _rsa(parts: list[bytes]) -> rsa.RSAPublicKey:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

    exponent, modulus = (int.from_bytes(part, "big") for part in parts)
    if modulus.bit_length() < _MIN_RSA_BITS:
        raise KeyLineError(f"is an RSA key of {modulus.bit_length()} bits; expected at least {_MIN_RSA_BITS}")
    return RSAPublicNumbers(exponent, modulus).public_key()


def _check_ed25519(signature: Signature, key: Key, signed: bytes) -> bool:
    return _good(lambda: _ed25519(_public(key.type, key.blob)).verify(_one_string(signature.raw), signed))


def _check_security_key(signature: Signature, key: Key, signed: bytes) -> bool:
    """Such a key signs what it is given together with what it knows: for whom, whether touched, how often so far."""
    parts, wire = _public(key.type, key.blob), _Wire(signature.raw)
    proper, told = wire.string(), wire.take(5)
    wire.end()
    if not told[0] & _TOUCHED:
        raise SignatureError("the security key was not touched; make it without no-touch-required")
    whole = hashlib.sha256(parts[1]).digest() + told + hashlib.sha256(signed).digest()
    return _good(lambda: _ed25519(parts).verify(proper, whole))


def _check_p256(signature: Signature, key: Key, signed: bytes) -> bool:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    wire = _Wire(_one_string(signature.raw))
    r, s = (int.from_bytes(wire.string(), "big") for _ in range(2))
    wire.end()
    encoded = utils.encode_dss_signature(r, s)
    return _good(lambda: _p256(_public(key.type, key.blob)).verify(encoded, signed, ec.ECDSA(hashes.SHA256())))


def _check_rsa(signature: Signature, key: Key, signed: bytes) -> bool:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    public = _rsa(_public(key.type, key.blob))
    # SSH leaves out zeros in front, which the arithmetic needs.
    raw = _one_string(signature.raw).rjust((public.key_size + 7) // 8, b"\0")
    digest = hashes.SHA256() if signature.algorithm == b"rsa-sha2-256" else hashes.SHA512()
    return _good(lambda: public.verify(raw, signed, padding.PKCS1v15(), digest))


def _good(check: Callable[[], None]) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        check()
    except InvalidSignature:
        return False
    return True


_LOADERS: dict[str, Callable[[list[bytes]], object]] = {
    "ssh-ed25519": _ed25519,
    "sk-ssh-ed25519@openssh.com": _ed25519,
    "ecdsa-sha2-nistp256": _p256,
    "ssh-rsa": _rsa,
}
_CHECKS: dict[str, Callable[[Signature, Key, bytes], bool]] = {
    "ssh-ed25519": _check_ed25519,
    "sk-ssh-ed25519@openssh.com": _check_security_key,
    "ecdsa-sha2-nistp256": _check_p256,
    "ssh-rsa": _check_rsa,
}
