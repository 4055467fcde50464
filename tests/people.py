"""People with SSH keys, and a run whose resumes they approve. They sign without ssh-keygen and without our code."""

from __future__ import annotations

import base64
import hashlib
import json
import textwrap

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

from loopguard.approvals import ask, book
from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.consent.statement import Rule
from loopguard.state import FreezeState, submit
from loopguard.testing import FrozenClock
from loopguard.types import Decision

NAMESPACE = "loopguard-approve@v1"
POLICY = "a" * 64
TRIP = Decision(result="freeze", gate="update", rule="bounds:loss", reason="loss is nan")


def packed(*parts):
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def mpint(number):
    return number.to_bytes(number.bit_length() // 8 + 1, "big")


def armored(blob):
    text = base64.b64encode(blob).decode()
    return "\n".join(["-----BEGIN SSH SIGNATURE-----", *textwrap.wrap(text, 70), "-----END SSH SIGNATURE-----", ""])


class Person:
    """Somebody with a key of one kind: `ed25519`, `p256`, `rsa` or `sk`."""

    def __init__(self, name, kind="ed25519", *, bits=2048):
        self.name = name
        self.kind = kind
        make = {
            "ed25519": ed25519.Ed25519PrivateKey.generate,
            "sk": ed25519.Ed25519PrivateKey.generate,
            "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "rsa": lambda: rsa.generate_private_key(65537, bits),
        }[kind]
        self.private = make()
        self.blob = self._blob()
        name = base64.b64encode(self.blob).decode()
        self.line = f"{self.blob[4 : 4 + self.blob[3]].decode()} {name} {self.name}@example"
        self.fingerprint = "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    def _blob(self):
        public = self.private.public_key()
        if self.kind == "sk":
            raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
            return packed(b"sk-ssh-ed25519@openssh.com", raw, b"ssh:")
        line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        return base64.b64decode(line.split()[1])

    def sign(self, message, *, namespace=NAMESPACE, digest="sha512", algorithm=None, touched=1, version=1):
        """As `ssh-keygen -Y sign` would."""
        hashed = hashlib.new(digest, message).digest()
        signed = b"SSHSIG" + packed(namespace.encode(), b"", digest.encode(), hashed)
        proper = self._proper(signed, algorithm, touched)
        parts = packed(self.blob, namespace.encode(), b"", digest.encode(), proper)
        return armored(b"SSHSIG" + version.to_bytes(4, "big") + parts)

    def _proper(self, signed, algorithm, touched):
        if self.kind == "ed25519":
            return packed((algorithm or "ssh-ed25519").encode(), self.private.sign(signed))
        if self.kind == "p256":
            r, s = utils.decode_dss_signature(self.private.sign(signed, ec.ECDSA(hashes.SHA256())))
            return packed(b"ecdsa-sha2-nistp256", packed(mpint(r), mpint(s)))
        if self.kind == "rsa":
            name = algorithm or "rsa-sha2-512"
            chosen = {"rsa-sha2-256": hashes.SHA256(), "ssh-rsa": hashes.SHA1()}.get(name, hashes.SHA512())
            return packed(name.encode(), self.private.sign(signed, padding.PKCS1v15(), chosen))
        told = bytes([touched]) + (7).to_bytes(4, "big")
        whole = hashlib.sha256(b"ssh:").digest() + told + hashlib.sha256(signed).digest()
        return packed(b"sk-ssh-ed25519@openssh.com", self.private.sign(whole)) + told


DANA, ELI, FAY = (Person(name) for name in ("dana", "eli", "fay"))
DANA_AT_HOME = Person("dana", "p256")
STRANGER = Person("mallory")


def rule(**changes):
    """Two of dana, eli and fay, and never the one who asks."""
    people = {"dana": (DANA.line, DANA_AT_HOME.line), "eli": (ELI.line,), "fay": (FAY.line,)}
    facts = {"approvals": 2, "people": people, "requester_may_approve": False}
    return Rule(**{**facts, "within_s": 86400.0, "execute_within_s": 3600.0, **changes})


class Room:
    """A run that resumes by approvals, with a clock of its own and nobody at work on it."""

    def __init__(self, path, **changes):
        self.path = path
        self.clock = FrozenClock()
        self.rule = rule(**changes)
        path.mkdir()
        (path / "policy").mkdir()
        (path / "policy" / f"{POLICY}.yaml").write_text("a stand-in\n")
        (path / "run.json").write_text(json.dumps({"id": "run-1", "policy": POLICY}))
        self.open()
        self.log.append("policy.loaded", {"name": "two", "digest": POLICY, "resume": self.rule.facts()})

    def open(self, **options):
        self.log = AuditLog.open(self.path, run_id="run-1", policy=POLICY, clock=self.clock)
        self.state = FreezeState(self.path, self.log, **options)
        return self.state

    def close(self):
        self.log.close()

    def freeze(self):
        return self.state.freeze(TRIP, cycle=1, facts={})

    def ask(self, by="sam", reason="bad shard 17 removed", **options):
        """Somebody asks for a resume, and the owner of the run takes that in; gives the statement."""
        statement = ask(self.path, by=by, reason=reason, now=self.clock.now(), **options)
        self.hand_in(statement, by=by)
        return statement

    def hand_in(self, statement, *, by="sam"):
        submit(self.path, "resume", by=by, reason=statement.reason, freeze=statement.freeze, statement=statement)
        self.state.take_requests()

    def approve(self, signature):
        """A signature is handed in, and the owner of the run counts it."""
        submit(self.path, "approval", by="", reason="", signature=signature)
        self.state.take_requests()

    def sign(self, person, statement, **options):
        self.approve(person.sign(statement.signed_bytes(), **options))

    def told(self, *types):
        return list(read.entries(self.path, types=types))

    def codes(self):
        """Of every refusal so far."""
        return [entry.body["code"] for entry in self.told("approval.refused")]

    @property
    def pending(self):
        return book(self.path).pending
