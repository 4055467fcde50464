"""Verify the audit log of a LoopGuard run without LoopGuard.

    python standalone.py RUN_DIR [--expect-head SEQ:HASH] [--key VKEY]... [--anchors PLACE]... [--json]

One file, for whoever has a run directory and nothing else of ours. It needs Python 3.11, the package `cryptography`,
and `git` where anchors are in a repository. It was written from docs/audit-format.md and docs/resume.md and shares no
code with `loopguard audit verify`: where the two give different codes for a folder, one of them is wrong.

It reads each file once, holds one record at a time, writes nothing. Behind the first break of a stream it only looks
whether the rest can be read.

Exit codes: 0 ok, 2 bad usage, 10 warning, 20 whole but unanchored, 30 tampered, 31 truncated, 32 replaced, 33 spliced,
34 forked, 40 something happened that was not allowed, 41 an approval does not hold, 42 missing, 50 unreadable.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

Json = dict[str, Any]

USAGE, WARN, UNANCHORED, TAMPER, TRUNCATED, REPLACED, SPLICE, FORK = 2, 10, 20, 30, 31, 32, 33, 34
PROTOCOL, APPROVAL, MISSING, UNREADABLE = 40, 41, 42, 50
BREAKS = range(TAMPER, FORK + 1)
STATUS = {0: "ok", WARN: "warn", UNANCHORED: "unanchored", TAMPER: "tamper", TRUNCATED: "truncated"}
STATUS |= {REPLACED: "replaced", SPLICE: "splice", FORK: "fork", PROTOCOL: "protocol", APPROVAL: "approval"}
STATUS |= {MISSING: "missing", UNREADABLE: "unreadable"}
MAX_LINE_BYTES, MAX_NOTE_BYTES = 512 * 1024, 64 * 1024
GENESIS = "0" * 64
HEX64, TIME = "[0-9a-f]{64}", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
FIELDS: dict[str, tuple[type, ...]] = dict.fromkeys(
    ("boot", "hash", "id", "log", "policy", "prev", "ts", "type"), (str,)
)
FIELDS |= dict.fromkeys(("epoch", "mono_ns", "seq", "v"), (int,)) | {"cycle": (int, type(None))}
FIELDS |= {"actor": (dict,), "body": (dict,), "cause": (list,), "redacted": (list,)}


class Fault(Exception):  # noqa: N818 - mostly a finding, and no error of this program
    """Something is wrong, with the code that this alone gives."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


# -- records -----------------------------------------------------------------------------------------------------------


def record_in(line: bytes) -> Json:
    """The record in a line without its newline. Raises Fault."""
    at = line.rfind(b',"hash":"')
    rest, stated = line[:at] + line[at + 74 :], line[at + 9 : at + 73]
    if at < 0 or line[at + 73 : at + 75] != b'",':
        raise Fault(TAMPER, "is none")
    if hashlib.sha256(b"loopguard-record-v1\n" + rest).hexdigest().encode() != stated:
        raise Fault(TAMPER, "was altered: its hash is not that of its bytes")
    record = json_in(line)
    if record.get("v", 1) != 1:
        raise Fault(UNREADABLE, "is of a later format")
    if record.keys() != FIELDS.keys() or any(type(record[name]) not in kinds for name, kinds in FIELDS.items()):
        raise Fault(TAMPER, "does not have the fields of a record")
    return record


def json_in(data: bytes) -> Json:
    """The JSON object in these bytes; empty where there is none."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line of a segment with its place; only the last can lack its newline, and is read up to the longest."""
    with path.open("rb") as file:
        number, line = 0, b"\n"
        while line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
            yield f"{path}:{(number := number + 1)}", line


def is_cut(line: bytes) -> bool:
    """Whether these bytes are the beginning of a record, or one whole record, with nothing but zeros behind it."""
    kept, start = line.rstrip(b"\0"), b'{"actor":{'
    try:
        json.JSONDecoder().raw_decode(kept.decode("latin-1"))
        record_in(kept)
    except (ValueError, RecursionError):
        return kept[: len(start)] == start[: len(kept)]
    except Fault:
        return False
    return True


def segments(folder: Path) -> list[Path]:
    """The segments of a stream, in order."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"seg-\d{12}\.jsonl", path.name))


# -- keys, checkpoints, and what was kept elsewhere --------------------------------------------------------------------


class Key(NamedTuple):
    """A vkey that is trusted."""

    text: str
    name: str
    id: bytes
    public: bytes


class Mark(NamedTuple):
    """What a log must hold up to some record, and who says so: somebody elsewhere (`proves`), a trusted `signer`."""

    origin: str
    seq: int | None
    hash: str = ""
    root: bytes = b""
    proves: bool = False
    signer: str = ""


def key_in(given: str) -> Key:
    """The key in a vkey, or in a file with one. Raises Fault."""
    try:
        text = (given if given.count("+") >= 2 else Path(given).read_text()).strip()
        name, stated, encoded = text.split("+", 2)
    except (OSError, ValueError) as error:
        raise Fault(USAGE, f"--key {given}: neither a vkey nor a file with one: {error}") from error
    data = unbase64(encoded)
    identity = hashlib.sha256(f"{name}\n".encode() + data).digest()[:4]
    if len(data) != 33 or data[0] != 1 or identity.hex() != stated or not re.fullmatch(r"\S+", name):
        raise Fault(USAGE, f"--key {given}: no Ed25519 vkey, or one that contradicts itself")
    return Key(text, name, identity, data[1:])


def unbase64(text: str) -> bytes:
    """The bytes of a base64 text in its one proper spelling; empty where it is none."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return b""
    return data if base64.b64encode(data).decode() == text else b""


def note_in(data: bytes, keys: list[Key]) -> tuple[str, int, bytes, str]:
    """Origin, size, root and trusted signer of a note. Raises Fault where it is none, or a trusted key did not sign."""
    body, blank, below = data.decode(errors="replace").rpartition("\n\n")
    body, below = (f"{body}\n", below) if blank else (below, "\n")
    match = re.fullmatch(r"([^\n]+)\n(0|[1-9]\d{0,15})\n([^\n]+)\n", body)
    root = unbase64(match[3]) if match else b""
    odd = len(data) > MAX_NOTE_BYTES or re.search(rb"[\0-\x09\x0b-\x1f]", data) or not below.endswith("\n")
    if match is None or len(root) != 32 or odd:
        raise Fault(TAMPER, "is no checkpoint")
    signers = set()
    for line in below.split("\n")[:-1][:64] if blank else ():
        dash, name, encoded = (line.split(" ") * 3)[:3]
        signature = unbase64(encoded)
        if line.count(" ") != 2 or dash != "—" or not name or len(signature) < 5:
            raise Fault(TAMPER, "has a line where a signature belongs")
        for key in keys:
            if (key.name, key.id) == (name, signature[:4]):
                try:
                    ed25519.Ed25519PublicKey.from_public_bytes(key.public).verify(signature[4:], body.encode())
                except InvalidSignature:
                    raise Fault(TAMPER, f"has a signature of {name} that the key did not make") from None
                signers.add(key)
    return match[1], int(match[2]), root, next((key.text for key in keys if key in signers), "")


def kept_at(place: Path) -> Iterator[tuple[str, bytes]]:
    """The notes in a file, a folder or a repository, each with where it stands. Raises Fault."""
    if place.is_dir() and ((place / ".git").exists() or (place / "HEAD").is_file()):
        command = ["git", "-C", str(place), "log", "--format=%B", "refs/heads/loopguard-anchors"]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise Fault(USAGE, f"--anchors {place}: {done.stderr.decode(errors='replace')}")
        yield from notes_in(done.stdout.decode(errors="replace").splitlines(), place)
    elif place.is_dir():
        for path in sorted(one for one in place.rglob("*") if one.suffix in {".note", ".jsonl"} and one.is_file()):
            yield from kept_at(path)
    elif place.suffix == ".note":
        yield str(place), place.read_bytes()
    else:
        with place.open(errors="replace") as file:
            yield from notes_in(file, place)


def notes_in(lines: Iterable[str], place: Path) -> Iterator[tuple[str, bytes]]:
    """The notes in lines of ours, among others. Raises Fault."""
    for number, line in enumerate(lines, 1):
        if (at := line.find('{"checkpoint":"')) >= 0:
            try:
                yield f"{place}:{number}", json.JSONDecoder().raw_decode(line[at:])[0]["checkpoint"].encode()
            except ValueError as error:
                raise Fault(USAGE, f"{place}:{number}: a checkpoint is cut or damaged: {error}") from error


# -- approvals ---------------------------------------------------------------------------------------------------------

ARMOR = r"\s*-----BEGIN SSH SIGNATURE-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END SSH SIGNATURE-----\s*"
KEY_LINE = r'(?:((?:[^\s"]|"[^"]*")+)\s+)?((?:sk-)?ssh-[\w@.-]+|ecdsa-[\w-]+)\s+(\S+)(?:\s.*)?'
OPTION = r'([A-Za-z-]+)="([^"]*)"'
SHAPES = dict.fromkeys(("run", "freeze", "reason", "requester"), "(?s:.{1,8192})")
SHAPES |= dict.fromkeys(("entered", "head_hash", "policy", "next_policy"), HEX64)
SHAPES |= {"not_before": TIME, "expires": TIME, "disposition": "rollback", "target": f"nothing|{HEX64}"}
SHAPES |= {"policy_change": "none|tightened|loosened", "nonce": "[0-9a-f]{32}"}


def strings(data: bytes, behind: int = 0) -> list[bytes]:
    """All the strings that SSH packed, up to so many bytes from the end. Raises ValueError."""
    found = []
    while len(data) > behind:
        end = 4 + int.from_bytes(data[:4])
        if end > len(data) - behind:
            raise ValueError("it is cut short")
        found.append(data[4:end])
        data = data[end:]
    return found


class ExpiredError(ValueError):
    """A key is one that may approve, and not at this time."""


def approval_in(told: Any, people: dict[str, list[str]], message: bytes, at: str) -> Json:
    """What a record has to say of this approval: who made its signature over a message, with a key that counts then.

    Raises ValueError, InvalidSignature, or another error where a member is not there.
    """
    armored = told["signature"]
    match = re.fullmatch(ARMOR, armored) if len(armored) <= 8192 else None
    blob = base64.b64decode("".join(match[1].split()), validate=True) if match else b""
    blob, namespace, reserved, algorithm, signature = strings(blob.removeprefix(b"SSHSIG\0\0\0\1"))
    if reserved or namespace != b"loopguard-approve@v1" or algorithm not in {b"sha256", b"sha512"}:
        raise ValueError("a signature is for another purpose, or of a kind that is not taken")
    named = [(person, when) for person, lines in people.items() for line in lines for when in times_of(line, blob)]
    if not named:
        raise ValueError("a key is nobody's")
    person, (after, before) = named[0]
    if not after <= at < before:
        raise ExpiredError(f"a key of {person} does not count at that time")
    parts = namespace, b"", algorithm, hashlib.new(algorithm.decode(), message).digest()
    check(blob, signature, b"SSHSIG" + b"".join(len(part).to_bytes(4, "big") + part for part in parts))
    fingerprint = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return {"person": person, "key": f"SHA256:{fingerprint}", "signature": armored}


def times_of(line: str, blob: bytes) -> list[tuple[str, str]]:
    """From and until when a line of an `allowed_signers` file (without principals) names this key; empty if never."""
    match = re.fullmatch(KEY_LINE, line.strip())
    if match is None or match[3] != base64.b64encode(blob).decode() or match[2].encode() != strings(blob)[0]:
        return []
    if match[1] and not re.fullmatch(f"{OPTION}(,{OPTION})*", match[1]):
        return []
    found = {"valid-after": "", "valid-before": "~"}
    for name, value in re.findall(OPTION, match[1] or ""):
        if name.lower() in found and re.fullmatch(r"\d{8}(\d{4}(\d\d)?)?Z", value):
            moment = datetime.strptime(f"{value[:-1]:0<14}", "%Y%m%d%H%M%S")
            found[name.lower()] = f"{moment.isoformat()}.000000Z"
        elif name.lower() != "namespaces" or "loopguard-approve@v1" not in value.split(","):
            return []
    return [(found["valid-after"], found["valid-before"])]


def check(blob: bytes, signature: bytes, signed: bytes) -> None:
    """Raise ValueError or InvalidSignature unless the key in a blob made this signature over these bytes."""
    kind, *parts = strings(blob)
    behind = 5 if kind == b"sk-ssh-ed25519@openssh.com" else 0
    algorithm, raw = strings(signature, behind)
    match kind, algorithm, parts:
        case b"ssh-ed25519", b"ssh-ed25519", [public]:
            ed25519.Ed25519PublicKey.from_public_bytes(public).verify(raw, signed)
        case b"sk-ssh-ed25519@openssh.com", b"sk-ssh-ed25519@openssh.com", [public, application]:
            if not signature[-5] & 1:
                raise ValueError("a security key was not touched")
            whole = hashlib.sha256(application).digest() + signature[-5:] + hashlib.sha256(signed).digest()
            ed25519.Ed25519PublicKey.from_public_bytes(public).verify(raw, whole)
        case b"ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp256", [b"nistp256", point]:
            r, s = (int.from_bytes(part) for part in strings(raw))
            curve = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
            curve.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
        case b"ssh-rsa", b"rsa-sha2-256" | b"rsa-sha2-512", [exponent, modulus] if int.from_bytes(modulus) >> 2047:
            numbers = rsa.RSAPublicNumbers(int.from_bytes(exponent), int.from_bytes(modulus))
            digest = hashes.SHA256() if algorithm == b"rsa-sha2-256" else hashes.SHA512()
            raw = raw.rjust((numbers.n.bit_length() + 7) // 8, b"\0")
            numbers.public_key().verify(raw, signed, padding.PKCS1v15(), digest)
        case _:
            raise ValueError("a signature is of a kind that is not taken")


def moment_of(text: str) -> datetime:
    """The time in a record; before all others where there is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = datetime.min
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def seconds(one: str, other: str) -> float:
    """How many seconds lie between two times; below 0 where the second one is the earlier one."""
    return (moment_of(other) - moment_of(one)).total_seconds()


def rule_in(value: Any) -> Json | None:
    """Who has to agree to a resume, by `policy.loaded`; where that cannot be read, a rule that nobody satisfies."""
    if value is None:
        return None
    try:
        rule = {name: value[name] for name in ("approvals", "requester_may_approve", "within_s", "execute_within_s")}
        rule["people"] = {name: [str(line) for line in lines] for name, lines in value["people"].items()}
        sound = [type(s) in (int, float) and 0 < s <= 1e8 for s in (rule["within_s"], rule["execute_within_s"])]
        sound += [type(rule["approvals"]) is int and rule["approvals"] > 0, type(rule["requester_may_approve"]) is bool]
        if all(sound):
            return rule
    except (TypeError, KeyError, AttributeError):
        pass  # the same as one that is not sound
    return {"approvals": 1, "people": {}, "requester_may_approve": False, "within_s": 0, "execute_within_s": 0}


def asks_less(rule: Json | None, before: Json) -> bool:
    """Whether somebody could resume under this rule who could not under the one before."""
    if rule is None or rule["approvals"] < before["approvals"]:
        return True
    longer = any(rule[name] > before[name] for name in ("requester_may_approve", "within_s", "execute_within_s"))
    return longer or any(set(lines) - set(before["people"].get(name, ())) for name, lines in rule["people"].items())


def statement_in(value: Any) -> Json | None:
    """What people signed; None where this is nothing that they could sign."""
    if not isinstance(value, dict) or value.get("v") != 1 or value.keys() != {*SHAPES, "v", "head_seq"}:
        return None
    if any(type(value[name]) is not str or not re.fullmatch(shape, value[name]) for name, shape in SHAPES.items()):
        return None
    return value | {"v": 1} if type(value["head_seq"]) is int and 0 < value["head_seq"] < 2**53 else None


def signed_bytes(statement: Json) -> bytes:
    """What people sign, byte for byte."""
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def said_of(statement: Json) -> Json:
    """What the records about a statement have to say as well."""
    return {"by": statement["requester"], "reason": statement["reason"], "freeze": statement["freeze"]}


class Permissions:
    """Whether what a stream tells was allowed, and each resume and loosened policy approved, by the records before."""

    def __init__(self, *, owner: bool) -> None:
        self.owner = owner  # resumes are asked for in this stream; the others hold them without what led there
        self.frozen: str | None = None
        self.calls: set[str] = set()
        self.lease: tuple[int, int] | None = None
        self.weights: str | None = None  # that may become the actor
        self.rule: Json | None = None
        self.policy, self.adopted = "", ("", "", False)
        self.latest = ""  # time of a record about approvals
        self.hashes: dict[int, str] = {}  # of the records since the last freeze; the first one is that freeze
        self.request, self.void = "", False
        self.statement: Json | None = None  # what waits for approvals; void where it can be granted no more
        self.people: set[str] = set()  # who approved that so far
        self.nonces: set[str] = set()
        self.change = ("", "", "")  # a loosened policy that was approved: from, to, and until when
        self.start_before: str | None = None
        self.overdue = False

    def troubles(self, record: Json) -> Iterator[tuple[int, str]]:
        """What this record tells that nothing before it allowed, each with its code."""
        kind, body, ts = record["type"], record["body"], record["ts"]
        if self.frozen is not None and kind in {"update.applied", "data.admitted", "promotion.applied"}:
            yield PROTOCOL, f"{kind} while frozen ({self.frozen})"
        if self.overdue and kind in {"cycle.started", "update.leased", "data.admitted"}:
            yield APPROVAL, "the run went on, though it was started later than people had agreed to"
            self.overdue = False
        if kind in {"update.settled", "freeze.entered", "log.opened"}:
            self.lease = None
        match kind:
            case "tool.decided" if body.get("result") == "allow":
                self.calls.add(str(body.get("call")))
            case "tool.finished" | "tool.lost":
                if (call := str(body.get("call"))) not in self.calls:
                    yield PROTOCOL, f"call {call} ended, and no decision allowed it"
                self.calls.discard(call)
            case "update.leased" | "update.applied":
                yield from self._updated(kind, body.get("from"), body.get("to"))
            case "promotion.decided":
                self.weights = str(body.get("weights")) if body.get("result") == "allow" else None
            case "promotion.applied":
                if self.weights is None or self.weights != str(body.get("actor")):
                    yield PROTOCOL, "weights were promoted that no decision allowed"
                self.weights = None
            case "policy.loaded":
                yield from self._loaded(str(body.get("digest")), rule_in(body.get("resume")))
            case "policy.adopted":
                change = str(body.get("from")), str(body.get("to"))
                self.adopted = *change, change == self.change[:2] and ts <= self.change[2]
                if self.rule and body.get("change") == "loosened" and not self.adopted[2]:
                    yield APPROVAL, "a loosened policy was adopted, and nobody approved that"
            case "run.started" if self.start_before is not None:
                self.overdue, self.start_before = self.overdue or max(ts, self.latest) > self.start_before, None
            case "freeze.requested":
                self.void = True
            case "freeze.entered":
                self.frozen, self.weights, self.void, self.hashes = str(body.get("freeze")), None, True, {}
                self.change, self.start_before, self.overdue = ("", "", ""), None, False
            case "resume.requested" if self.rule and (statement := statement_in(body.get("statement"))):
                self.request, self.statement = str(body.get("request")), statement
                self.void = not self._stands(statement, record, self.rule)
                self.nonces.add(statement["nonce"])
                self.people = set()
            case "approval.given":
                yield from self._given(body, ts)
            case "approval.refused" if body.get("approval") is None and body.get("request") == self.request:
                self.statement = None
            case "resume.applied":
                yield from self._resumed(record)
        if kind in ABOUT_APPROVALS:
            self.void = self.void or (self.latest != "" and seconds(ts, self.latest) > 1)
            self.latest = max(self.latest, ts)
        if self.frozen is not None:  # also under no rule: the one that people sign by may be adopted while frozen
            self.hashes[record["seq"]] = record["hash"]

    def _updated(self, kind: str, first: Any, last: Any) -> Iterator[tuple[int, str]]:
        span = (first, last) if type(first) is int and type(last) is int and first <= last else None
        if kind == "update.leased":
            if span and self.lease and self.lease[0] <= first <= self.lease[1] + 1:
                span = self.lease[0], max(last, self.lease[1])
            self.lease = span
        elif not span or not self.lease or first < self.lease[0] or last > self.lease[1]:
            yield PROTOCOL, f"updates {first}-{last} were applied; the lease is {self.lease}"

    def _loaded(self, digest: str, rule: Json | None) -> Iterator[tuple[int, str]]:
        if self.rule and self.owner and digest == self.policy and rule != self.rule:
            yield APPROVAL, "a policy has another rule about resumes than before"
        if self.rule and self.owner and digest != self.policy:
            if self.adopted[:2] != (self.policy, digest):
                yield APPROVAL, "the policy became another one, and nobody adopted it"
            if not self.adopted[2] and asks_less(rule, self.rule):
                yield APPROVAL, "the policy asks for less than the one before, and nobody approved that"
        self.change = ("", "", "") if self.change[1] == digest else self.change
        self.policy, self.rule, self.adopted = digest, rule, ("", "", False)

    def _stands(self, statement: Json, record: Json, rule: Json) -> bool:
        """Whether what a request asks people to sign is about this freeze, and lasts no longer than allowed."""
        about = tuple(statement[name] for name in ("freeze", "run", "policy"))
        return (
            statement["nonce"] not in self.nonces
            and about == (self.frozen, record["log"].rpartition("/")[0], self.policy)
            and all(record["body"].get(name) == value for name, value in said_of(statement).items())
            and statement["entered"] == next(iter(self.hashes.values()), "")
            and statement["head_hash"] == self.hashes.get(statement["head_seq"])
            and (statement["policy"] == statement["next_policy"]) == (statement["policy_change"] == "none")
            and 0 < seconds(statement["not_before"], statement["expires"]) <= rule["within_s"]
            and seconds(record["ts"], statement["not_before"]) <= 1
            and record["ts"] < statement["expires"]
        )

    def _given(self, body: Json, ts: str) -> Iterator[tuple[int, str]]:
        waits = self.statement is not None and body.get("request") == self.request
        try:
            if self.rule and self.owner and not waits:
                raise ValueError("no request waited for it")
            if self.rule and self.owner and self.statement:
                told = approval_in(body, self.rule["people"], signed_bytes(self.statement), ts)
                told["statement_sha256"] = hashlib.sha256(signed_bytes(self.statement)).hexdigest()
                if any(body.get(name) != value for name, value in told.items()):
                    raise ValueError("it says something else of itself")
                self._may_approve(told["person"], self.people, self.statement, self.rule)
        except ExpiredError:
            pass  # it may have run out before the record was written; the resume by it is judged again
        except (ValueError, TypeError, KeyError, AttributeError, InvalidSignature) as error:
            yield APPROVAL, f"an approval was counted that does not count: {error or 'a signature is wrong'}"
        self.people |= {str(body.get("person"))} if waits else set()

    @staticmethod
    def _may_approve(person: str, others: Iterable[str], statement: Json, rule: Json) -> None:
        if person in others or (person == statement["requester"] and not rule["requester_may_approve"]):
            raise ValueError(f"{person} approved twice, or asked for it")

    def _resumed(self, record: Json) -> Iterator[tuple[int, str]]:
        body, statement = record["body"], statement_in(record["body"].get("statement"))
        if (
            self.frozen is None
            or self.frozen != str(body.get("freeze"))
            or not body.get("by")
            or not body.get("reason")
        ):
            yield PROTOCOL, "a resume of no freeze in force, or without a name or a reason"
        try:
            if self.rule:
                self._approved(statement or {}, record, self.rule)
        except (ValueError, TypeError, KeyError, AttributeError, InvalidSignature) as error:
            yield APPROVAL, f"the resume of {body.get('freeze')} lacks approvals: {error or 'a signature is wrong'}"
        before = body.get("execute_before")
        self.start_before = before if isinstance(before, str) else None
        if statement and self.rule and statement["policy_change"] == "loosened":
            try:
                end = moment_of(record["ts"]) + timedelta(seconds=self.rule["execute_within_s"])
                before = end.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            except OverflowError:
                before = "9999"  # behind every time
            self.change = statement["policy"], statement["next_policy"], before
        self.frozen, self.statement, self.hashes = None, None, {}

    def _approved(self, statement: Json, record: Json, rule: Json) -> None:
        """Raise ValueError, or another error where a member is not there, unless enough people signed, and in time."""
        body, judged = record["body"], record["body"]["judged"]
        if body["approval"] != "signed" or not re.fullmatch(TIME, judged):
            raise ValueError("nobody signed it, or it does not say when that was counted")
        message = signed_bytes(statement)
        given = [approval_in(told, rule["people"], message, judged) for told in body["approvals"]]
        people = [approval["person"] for approval in given]
        for number, person in enumerate(people):
            self._may_approve(person, people[:number], statement, rule)
        if len(people) < rule["approvals"]:
            raise ValueError(f"{len(people)} of {rule['approvals']} people approved")
        told = said_of(statement) | {"disposition": statement["disposition"], "approvals": given}
        told["statement_sha256"] = hashlib.sha256(message).hexdigest()
        if any(body.get(name) != value for name, value in told.items()):
            raise ValueError("it is not what they signed")
        if seconds(record["ts"], judged) > 1 or (self.owner and not self.latest <= judged < statement["expires"]):
            raise ValueError("they were counted at another time than the log tells, or too late")
        if self.owner and (self.void or statement != self.statement or statement["policy"] != self.policy):
            raise ValueError("what they signed was not asked for in this log, or was void by then")


ABOUT_APPROVALS = {"policy.loaded", "policy.adopted", "run.started", "freeze.requested", "freeze.entered"}
ABOUT_APPROVALS |= {"resume.requested", "resume.applied", "approval.given", "approval.refused"}


# -- streams -----------------------------------------------------------------------------------------------------------


class Stream:
    """The verification of one stream, under way. `steps` gives every record up to the first break, judged."""

    def __init__(self, run_dir: Path, name: str, keys: list[Key], marks: Iterable[Mark] = ()) -> None:
        self.run_dir, self.name, self.folder, self.keys = run_dir, name, run_dir / "audit" / name, keys
        self.log, cache = log_of(run_dir, name), json_in(read(run_dir / "state.json"))
        self.seq, self.hash, self.epoch, self.edge = 0, GENESIS, 0, list[tuple[int, bytes]]()
        self.marks = [*marks]
        if cache.get("stream") == name and type(cache.get("seq")) is int and isinstance(cache.get("hash"), str):
            self.marks.append(Mark("state.json", cache["seq"], cache["hash"]))
        self.unmet = {mark.hash for mark in self.marks if mark.seq is None}
        self.tail = self.proven = self.signed = 0
        self.key, self.before, self.policies = "", dict[str, Any](), set[str]()
        self.worst = self.broken = 0
        self.over = False
        self.apart: list[int] = []  # up to where a trusted key signed other records than are here
        self.findings: list[str] = []
        self.notes: dict[int, Path] = {}
        self.permissions = Permissions(owner=name == "controller")
        self.steps = self._read()

    def find(self, code: int, text: str) -> None:
        """Keep a finding. The first break of a stream names its class, since what follows may follow from it."""
        if code in BREAKS:
            self.broken = self.broken or code
            self.over = self.over or code != REPLACED  # behind replaced records it may still show who signed both
        self.worst = max(self.worst, code)
        self.findings += [text] if len(self.findings) < 50 else []

    def _read(self) -> Iterator[Json]:
        try:
            home, read_on = self.folder / "checkpoints", 0
            for path in home.iterdir() if home.is_dir() else ():
                if re.fullmatch(r"(0|[1-9]\d*)\.note", path.name):
                    self.notes[int(path.stem)] = path
            while paths := segments(self.folder)[read_on:]:  # a living writer may have begun another one meanwhile
                for path in paths:
                    yield from self._segment(path, last=path == paths[-1])
                read_on += len(paths)
            if not read_on or not (self.seq or self.over):
                self.find(MISSING, f"{self.folder}: there is no log, or no record in it")
            self._end(any_segment=read_on > 0)
        except OSError as error:
            self.find(UNREADABLE, str(error))

    def _segment(self, path: Path, *, last: bool) -> Iterator[Json]:
        place, named = "", int(path.stem.removeprefix("seg-"))
        for place, line in lines_of(path):
            if last and not line.endswith(b"\n") and is_cut(line):
                self.find(WARN, f"{place}: the last line is cut")
                return
            try:
                record = record_in(line.removesuffix(b"\n"))
                if not self.over:
                    self._follows(record, named)
                    if not line.endswith(b"\n"):
                        raise Fault(TAMPER, "does not end its line")
                    self._judge(record, place)
                    yield record
                named = 0
            except Fault as fault:
                self.find(fault.code, f"{place}: the record {fault}")
        if not place and not last:
            self.find(TAMPER, f"{path}: is empty")

    def _follows(self, record: Json, named: int) -> None:
        """Raise Fault unless this is the record that belongs here; `named` for its segment, where it is not 0."""
        seq = record["seq"]
        self.log = self.log or (record["log"] if record["log"].endswith(f"/{self.name}") else "")
        if record["log"] != self.log:
            raise Fault(SPLICE, f"{seq} belongs to {record['log']}, not to {self.log}")
        if seq <= self.seq and self._twin(record):
            raise Fault(FORK, f"{seq} is there twice, and differs")
        if (seq, record["prev"]) != (self.seq + 1, self.hash):
            raise Fault(TAMPER, f"{seq} does not follow record {self.seq}")
        if record["epoch"] < self.epoch:
            raise Fault(FORK, f"{seq} goes back to an earlier epoch: old state wrote on")
        if named not in {0, seq}:
            raise Fault(TAMPER, f"{seq} is not the one that its segment is named for")
        self.seq, self.hash, self.epoch = seq, record["hash"], record["epoch"]
        size, node = 1, hashlib.sha256(b"\0" + bytes.fromhex(self.hash)).digest()
        while self.edge and self.edge[-1][0] == size:
            size, node = size * 2, hashlib.sha256(b"\1" + self.edge.pop()[1] + node).digest()
        self.edge.append((size, node))

    def _root(self) -> bytes:
        node = self.edge[-1][1]
        for _, left in reversed(self.edge[:-1]):
            node = hashlib.sha256(b"\1" + left + node).digest()
        return node

    def _twin(self, record: Json) -> bool:
        """Whether the log holds another record of this number: the one case in which it is read again."""
        for line in (line for path in segments(self.folder) for _, line in lines_of(path)):
            try:
                other = record_in(line.removesuffix(b"\n"))
            except Fault:
                continue
            if other["seq"] == record["seq"] and other["hash"] != record["hash"]:
                return True
        return False

    def _judge(self, record: Json, place: str) -> None:
        kind, body, digest, before = record["type"], record["body"], record["policy"], self.before
        about_anchors = kind in {"anchor.kept", "anchor.failed"} and not body.get("required")
        self.tail = self.tail if about_anchors else self.seq
        self.key = str(body.get("key")) if kind == "log.opened" else self.key
        self.unmet.discard(self.hash)
        for mark in self.marks:
            if mark.seq == self.seq or (mark.seq is None and mark.hash == self.hash):
                self._compare(mark)
        if self.seq in self.notes:
            self._beside(self.notes[self.seq])
        back = before and (before["ts"] > record["ts"])
        if back or (before and before["boot"] == record["boot"] and before["mono_ns"] > record["mono_ns"]):
            self.find(WARN, f"{place}: clock_back: a clock of record {self.seq} went back")
        self.before = record
        if digest and digest not in self.policies:
            self.policies.add(digest)
            if not re.fullmatch(HEX64, digest) or not (self.run_dir / "policy" / f"{digest}.yaml").is_file():
                self.find(MISSING, f"{place}: the policy {digest} is not there")
        if kind == "log.recovered":
            self.find(WARN, f"{place}: a cut last line was set aside")
            path = self.folder / str(body.get("file"))
            if re.fullmatch(r"torn-\d{12}(-\d+)?\.bin", str(body.get("file"))) and path.is_file():
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != body.get("digest"):
                        raise Fault(TAMPER, f"does not name what was set aside in {path}")
        for code, text in self.permissions.troubles(record):
            self.find(code, f"{place}: record {self.seq}: {text}")

    def _compare(self, mark: Mark) -> None:
        if mark.hash != self.hash and (not mark.root or mark.root != self._root()):
            self.find(REPLACED, f"{self.folder}: the records up to {self.seq} are not those of {mark.origin}")
            self.apart += [self.seq] if mark.signer else []
            return
        self.proven = self.seq if mark.proves else self.proven
        self.signed = self.seq if mark.signer and mark.signer == self.key else self.signed

    def _beside(self, path: Path) -> None:
        """What lies beside the log proves nothing without a signature, and must not contradict it."""
        try:
            with path.open("rb") as file:
                origin, size, root, signer = note_in(file.read(MAX_NOTE_BYTES + 1), self.keys)
        except Fault as fault:
            self.find(fault.code, f"{path} {fault}")
            return
        if origin != self.log or size != self.seq:
            self.find(SPLICE if origin != self.log else TAMPER, f"{path}: is of {size} records of {origin}")
        else:
            self._compare(Mark(str(path), size, root=root, signer=signer))

    def _end(self, *, any_segment: bool) -> None:
        known = [(mark.origin, mark.seq) for mark in self.marks] + [
            (str(path), size) for size, path in self.notes.items()
        ]
        for origin, size in known if any_segment else ():
            if size is not None and size > self.seq:
                self.find(TRUNCATED, f"{self.folder}: ends at record {self.seq}; {origin} knows of {size}")
        if any_segment and self.unmet:
            self.find(TRUNCATED, f"{self.folder}: no record has the hash of the expected head")
        if self.broken == REPLACED and any(seq <= self.signed for seq in self.apart):
            self.broken = FORK
            self.findings.insert(0, f"{self.folder}: a trusted key signed two histories of it")

    def committed(self, seq: int, digest: str, origin: str) -> None:
        """Read on up to where the controller says that this stream stood, and compare."""
        while self.seq < seq and next(self.steps, None):
            pass
        if self.broken or self.worst == UNREADABLE:
            return
        if self.seq < seq:
            self.find(TRUNCATED, f"{self.folder}: ends at record {self.seq}; {origin} knows of {seq}")
        elif self.seq > seq:
            self.find(FORK, f"{self.folder}: {origin} goes back to record {seq}, behind {self.seq}")
        elif self.hash != digest:
            self.find(REPLACED, f"{self.folder}: record {seq} is not the one that {origin} names")
        self.proven = max(self.proven, seq)

    def code(self, *, leads: bool) -> int:
        """The class of this stream alone. The one that leads has to be signed, where a key is trusted."""
        if self.worst == UNREADABLE or self.broken or self.worst >= PROTOCOL:
            return UNREADABLE if self.worst == UNREADABLE else self.broken or self.worst
        signed = self.signed >= self.tail or not self.keys or not leads
        return self.worst if self.proven >= self.tail and signed else UNANCHORED


def read(path: Path) -> bytes:
    """What a file holds; nothing where it is not there."""
    return path.read_bytes() if path.exists() else b""


def log_of(run_dir: Path, stream: str) -> str:
    """The `log` field that records of a stream have by `run.json`; empty where that does not say it."""
    run = json_in(read(run_dir / "run.json")).get("id")
    return f"{run}/{stream}" if isinstance(run, str) else ""


# -- the run -----------------------------------------------------------------------------------------------------------


def verify(run_dir: Path, *, head: str | None = None, keys: list[Key], places: Iterable[Path] = ()) -> Json:
    """What was found of all streams of a run. Raises Fault for what the reader named wrongly, OSError."""
    audit = run_dir / "audit"
    names = sorted(path.name for path in audit.iterdir() if segments(path)) if audit.is_dir() else []
    names = ["controller", *(name for name in names if name != "controller")]
    marks = kept_of(run_dir, names, keys, places)
    if head is not None:
        match = re.fullmatch(rf"\s*(?:(\d+):)?({HEX64})\s*", head)
        if match is None:
            raise Fault(USAGE, f"expected head {head!r} is not SEQ:HASH or HASH")
        marks["controller"].append(
            Mark("the expected head", int(match[1]) if match[1] else None, match[2], proves=True)
        )
    streams = {name: Stream(run_dir, name, keys, marks[name]) for name in names}
    lead = streams["controller"]
    for record in lead.steps:
        said = record["body"].get("streams") if record["type"] == "streams.committed" and not lead.broken else None
        for name, told in said.items() if isinstance(said, dict) else ():
            commit(streams, name, told, f"record {record['seq']} of the controller")
    for stream in streams.values():
        list(stream.steps)
    codes = [stream.code(leads=stream is lead) for stream in streams.values()]
    code = next((code for code in codes if code in BREAKS), max(codes))
    return {
        "code": UNREADABLE if UNREADABLE in codes else code,
        "findings": [text for stream in streams.values() for text in stream.findings],
        "keys": [key.text for key in keys],
        "streams": {
            stream.name: {"head": f"{stream.seq}:{stream.hash}", "proven": stream.proven, "signed": stream.signed}
            for stream in streams.values()
        },
    }


def commit(streams: dict[str, Stream], name: str, told: Any, origin: str) -> None:
    """Hold a stream against what the controller says of it."""
    lead = streams["controller"]
    seq, digest = (told.get("seq"), str(told.get("hash"))) if isinstance(told, dict) else (0, "")
    if (
        type(seq) is not int
        or seq < 1
        or not re.fullmatch(HEX64, digest)
        or not re.fullmatch(r"(?a:\w[\w.-]*)", name)
        or name == "controller"
    ):
        lead.find(PROTOCOL, f"{origin}: what it says of stream {name} is no head")
    elif name in streams or segments(lead.run_dir / "audit" / name):
        streams.setdefault(name, Stream(lead.run_dir, name, lead.keys)).committed(seq, digest, origin)
    else:
        lead.find(MISSING, f"{origin}: stream {name} had {seq} records, and is not there")


def kept_of(run_dir: Path, names: list[str], keys: list[Key], places: Iterable[Path]) -> dict[str, list[Mark]]:
    """What was kept elsewhere of each stream. Raises Fault for a place that holds nothing of this run."""
    marks: dict[str, list[Mark]] = {name: [] for name in names}
    logs = {log_of(run_dir, name): name for name in names}
    for place in places:
        notes = [(origin, *note_in(data, keys)) for origin, data in kept_at(place)]
        ours = [note for note in notes if note[1] in logs]
        if not ours or place.resolve().is_relative_to(run_dir.resolve()):
            raise Fault(USAGE, f"--anchors {place} holds nothing of {', '.join(logs)}, or lies beside it")
        for origin, log, size, root, signer in ours:
            proves = bool(signer) or not keys
            marks[logs[log]].append(Mark(origin, size, root=root, proves=proves, signer=signer))
    return marks


def main(arguments: list[str] | None = None) -> int:
    """Verify what the command line names, print what was found, give the exit code."""
    parser = argparse.ArgumentParser(description="Verify the audit log of a LoopGuard run without LoopGuard.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--expect-head", metavar="HEAD", help="a head noted earlier, SEQ:HASH or HASH")
    parser.add_argument("--key", action="append", default=[], metavar="VKEY", help="a trusted key, or a file with it")
    parser.add_argument("--anchors", action="append", default=[], type=Path, metavar="PLACE", help="what was kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    found: Json = {"keys": [], "streams": {}}
    try:
        found = verify(given.run_dir, head=given.expect_head, keys=[*map(key_in, given.key)], places=given.anchors)
    except Fault as fault:
        sys.stderr.write(f"{fault}\n")
        return USAGE
    except OSError as error:
        found |= {"code": UNREADABLE, "findings": [str(error)]}
    lines = [f"{STATUS[found['code']].upper()} ({found['code']})", *found["findings"]]
    lines += [f"trusted key: {key}" for key in found["keys"]]
    lines += [
        f"stream {name}: {', '.join(f'{k} {v}' for k, v in told.items())}" for name, told in found["streams"].items()
    ]
    lines = [json.dumps(found | {"status": STATUS[found["code"]]}, sort_keys=True)] if given.json else lines
    for line in lines:
        sys.stdout.write("".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in line) + "\n")
    return int(found["code"])


if __name__ == "__main__":
    sys.exit(main())
