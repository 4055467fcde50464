"""Verify the audit log of a LoopGuard run without LoopGuard: one file, Python 3.11, the package `cryptography`.

    python standalone.py RUN_DIR [--expect-head SEQ:HASH] [--key VKEY]... [--anchors PLACE]... [--without-payloads]
                                 [--json]

It was written from docs/audit-format.md and docs/resume.md and shares no code with `loopguard audit verify`: where the
two give different codes for a folder, one of them is wrong. It reads each file once, holds one record at a time, writes
nothing. What is not as it has to be raises ValueError where it is looked at; `Stream.ask` makes a finding of that.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import io
import json
import math
import os
import re
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

Json = dict[str, Any]
Keys = dict[tuple[str, bytes], tuple[str, bytes]]  # of each trusted key its name and id, and its vkey and public half


class Code(IntEnum):
    """What a verification comes to, and its exit code. In the thirties the chain of records is broken."""

    OK, USAGE, WARN, UNANCHORED = 0, 2, 10, 20
    TAMPER, TRUNCATED, REPLACED, SPLICE, FORK = 30, 31, 32, 33, 34
    PROTOCOL, APPROVAL, MISSING, UNREADABLE = 40, 41, 42, 50


def need(holds: object, otherwise: str, code: Code | None = None) -> None:
    """Raise ValueError unless something holds; with a code where that is not the usual one of the question."""
    if not holds:
        raise ValueError(otherwise) if code is None else ValueError(otherwise, code)


# -- records: their shape, their bytes, their files
HEX64, TIME, COUNT = "[0-9a-f]{64}", "[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}[.][0-9]{6}Z", range(1, 2**53)
FIELDS: dict[str, type] = dict.fromkeys(("boot", "hash", "id", "log", "policy", "prev", "ts", "type"), str)
FIELDS |= dict.fromkeys(("epoch", "mono_ns", "seq", "v"), int) | {"cycle": int}
FIELDS |= {"actor": dict, "body": dict, "cause": list, "redacted": list}
KINDS = [*FIELDS.values()], [*(FIELDS | {"cycle": type(None)}).values()]
NUMBER, LINE_BYTES, SEGMENT_BYTES, BLOCK_BYTES, NOTE_BYTES = range(2**53), 2**19, 2**30, 2**16, 2**16


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value is an object or a list of shapes, of one of some, a text, a number in a range, of a type."""
    match shape:
        case dict():
            return isinstance(value, dict) and all(fits(value.get(name), one) for name, one in shape.items())
        case list():
            return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
        case tuple():
            return any(fits(value, one) for one in shape)
        case str():
            return isinstance(value, str) and re.fullmatch(shape, value) is not None
        case range():
            return type(value) is int and value in shape
        case _:
            return type(value) is shape


def sha256(data: bytes) -> str:
    """The SHA-256 of these bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def beginning(path: Path, most: int) -> bytes:
    """The bytes of a file, or one more than so many of a larger one. Raises OSError."""
    with path.open("rb") as file:
        return file.read(most + 1)


def refuse_pipes(run_dir: Path) -> None:
    """Raise OSError for what lies where files are opened and is none: a pipe would keep a reader waiting for ever."""
    for pattern in ("*.json", "policy/*", "audit/*/*", "audit/*/checkpoints/*"):
        for path in run_dir.glob(pattern):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise OSError(f"{path}: is neither a file nor a folder")


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seconds(one: str, other: str) -> float:
    """How many seconds lie between two times, below 0 where the second is earlier; NaN if one is none."""
    try:
        return (datetime.fromisoformat(other) - datetime.fromisoformat(one)).total_seconds()
    except ValueError:
        return math.nan


def object_in(source: bytes | Path) -> Json:
    """The JSON object in these bytes or in a file; empty where there is none."""
    try:
        value = json.loads((source if isinstance(source, bytes) else source.read_bytes()).decode())
    except (ValueError, RecursionError, FileNotFoundError):
        return {}
    return value if isinstance(value, dict) else {}


def record_in(line: bytes) -> Json:
    """The record in a line. Raises ValueError."""
    line = line.removesuffix(b"\n")
    at = line.rfind(b',"hash":"')
    stated, rest = line[at + 9 : at + 73], line[:at] + line[at + 74 :]
    need(at >= 0 and line[at + 73 : at + 75] == b'",', "no record")
    need(sha256(b"loopguard-record-v1\n" + rest).encode() == stated, "the record was altered: it has another hash")
    record = object_in(line)
    need(record.get("v", 1) == 1, "the record is of a later format", Code.UNREADABLE)
    sound = record.keys() == FIELDS.keys() and [*map(type, map(record.get, FIELDS))] in KINDS
    need(sound and re.fullmatch(TIME, record["ts"]), "the record does not have the fields of one")
    datetime.fromisoformat(record["ts"])
    return record


def record_or_none(line: bytes) -> Json | None:
    """The record in a line, if there is one."""
    try:
        return record_in(line)
    except ValueError:
        return None


# -- the front that is gone, and the files of what is left
SPAN, NONE = {"from": NUMBER, "to": NUMBER}, type(None)
PRUNED: Json = dict.fromkeys(("since", "until", "by", "reason"), str) | {"before": "(?s:.+)", "bytes": COUNT}
PRUNED |= dict.fromkeys(("from", "through"), COUNT) | {"epoch": NUMBER, "hash": HEX64, "digest": HEX64}
PRUNED |= {"edge": [HEX64], "segments": [str], "torn": [str]}
PRUNED["state"] = {"calls": [str], "orphans": [str], "lease": (SPAN, NONE), "promotion": (str, NONE)}
PRUNED["state"] |= {"policy": (dict, NONE), "key": str, "freezes": NUMBER}


def check_pruned(record: Json) -> None:
    """Raise ValueError unless a record says which records were pruned, and what was under way behind them."""
    need(record["type"] == "log.pruned" and fits(record["body"], PRUNED), "it does not say what was pruned")
    first, through, edge = (record["body"][name] for name in ("from", "through", "edge"))
    need(first <= through < record["seq"] and len(edge) == through.bit_count(), "what it says was pruned cannot be so")


def front_of(folder: Path) -> tuple[Json, str]:
    """The record in `pruned.json`, empty where there is none, and what is wrong with it. Raises OSError."""
    path = folder / "pruned.json"
    try:
        line = beginning(path, LINE_BYTES)
        need(line.endswith(b"\n") and len(line) <= LINE_BYTES, "it is not one line")
        check_pruned(record := record_in(line))
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except ValueError as error:
        return {}, f"{path}: {error.args[0]}"
    return record, ""


def segments(folder: Path) -> list[Path]:
    """The segments of a stream that were not pruned, in order; of one in both forms the raw one. Raises OSError."""
    front, _ = front_of(folder)
    found = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ()
    forms = {path.name[:22]: path for path in found if re.fullmatch(r"seg-[0-9]{12}\.jsonl(\.gz)?", path.name)}
    gone = front["body"]["through"] if front else 0
    return [path for _, path in sorted(forms.items()) if int(path.name[4:16]) > gone]


class Unpacked(io.RawIOBase):
    """What is in a compressed segment. Reading raises ValueError where that is not one whole gzip member."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.inflate, self.size = file, zlib.decompressobj(31), 0  # 31: in the format of gzip

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Unpack as much as there is room for; 0 at the end."""
        data = b""
        while not data and not self.inflate.eof:
            packed = self.inflate.unconsumed_tail or self.file.read(BLOCK_BYTES)
            need(packed, "the compressed segment ends in the middle")
            try:
                data = self.inflate.decompress(packed, len(buffer))
            except zlib.error as error:
                raise ValueError(f"the compressed segment is damaged: {error}") from error
        self.size += len(data)
        need(self.size <= SEGMENT_BYTES, "the compressed segment holds more than any segment")
        need(data or not (self.inflate.unused_data or self.file.read(1)), "something follows the compressed segment")
        buffer[: len(data)] = data
        return len(data)


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a segment, up to one that does not end. Raises OSError, and ValueError at a damage."""
    try:
        file = path.open("rb")
    except FileNotFoundError:  # it was compressed since it was listed
        path = path.with_name(f"{path.name}.gz")
        file = path.open("rb")
    with file:
        lines = io.BufferedReader(Unpacked(file), BLOCK_BYTES) if path.suffix == ".gz" else file
        line = b"\n"
        while line.endswith(b"\n") and (line := lines.readline(LINE_BYTES)):
            yield line


def is_cut(line: bytes) -> bool:
    """Whether these bytes are the beginning of a record, or one whole record, with nothing but zeros behind it."""
    kept, start = line.rstrip(b"\0"), b'{"actor":{'
    try:
        json.JSONDecoder().raw_decode(kept.decode("latin-1"))
    except (ValueError, RecursionError):
        return kept[: len(start)] == start[: len(kept)]
    return record_or_none(kept) is not None


# -- checkpoints, and what was kept elsewhere; base64 in the one proper spelling of its bytes
BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=|[A-Za-z0-9+/][AQgw]==)?"
SIGNED = rf"— [^ \n]+ (?=[^=\n]{{7}}){BASE64}\n"
NOTE = rf"(([^\n]+)\n(0|[1-9][0-9]{{0,15}})\n((?=.{{44}}\n){BASE64})\n)(?:\n((?:{SIGNED}){{1,64}}))?"


class Mark(NamedTuple):
    """What a log holds up to some record, and who says so."""

    origin: str
    at: int | str  # the number of that record, or its hash where nothing else is known
    stands_for: str | bytes  # its hash, or the root up to it
    proves: bool = True  # it was kept elsewhere, and a trusted key signed it, where there is one
    log: str = ""
    signers: Iterable[str] = ()  # the trusted keys that signed it
    otherwise: Code = Code.REPLACED


def key_in(given: str) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    """The key in a vkey, or in a file with one. Raises ValueError, OSError."""
    text = (given if given.count("+") >= 2 else Path(given).read_text()).strip()
    name, stated, encoded = text.split("+", 2)
    data = base64.b64decode(encoded, validate=True)
    identity = hashlib.sha256(f"{name}\n".encode() + data).digest()[:4]
    sound = len(data) == 33 and data[0] == 1 and identity.hex() == stated and re.fullmatch(r"\S+", name)
    need(sound and base64.b64encode(data).decode() == encoded, f"{given!r} is no vkey of an Ed25519 key")
    return (name, identity), (text, data[1:])


def note_in(data: bytes, origin: str, keys: Keys, *, elsewhere: bool) -> Mark:
    """The checkpoint in a note. Raises ValueError; InvalidSignature where a trusted key did not sign in its name."""
    match, signers = re.fullmatch(NOTE, data.decode()), []
    need(
        match and len(data) <= NOTE_BYTES and not re.search(rb"[\0-\x09\x0b-\x1f]", data), f"{origin} is no checkpoint"
    )
    text, log, size, root, lines = match.groups("") if match else ("",) * 5
    for _, name, encoded in (line.split(" ") for line in lines.split("\n")[:-1]):
        made = base64.b64decode(encoded)
        if found := keys.get((name, made[:4])):
            ed25519.Ed25519PublicKey.from_public_bytes(found[1]).verify(made[4:], text.encode())
            signers.append(found[0])
    proves = elsewhere and (not keys or bool(signers))
    return Mark(origin, int(size), base64.b64decode(root), proves, log, signers)


def kept_at(place: Path) -> Iterator[tuple[str, bytes]]:
    """The notes in a file, a folder or a repository, each with where it stands. Raises ValueError, OSError."""
    is_git = (place / ".git").exists() or (place / "HEAD").is_file()
    if place.is_dir() and not is_git:
        for path in sorted(path for path in place.rglob("*") if path.suffix in {".note", ".jsonl"} and path.is_file()):
            yield from kept_at(path)
    elif place.suffix == ".note" and not is_git:
        yield str(place), beginning(place, NOTE_BYTES)
    else:
        command = ["git", "-C", str(place), "log", "--format=%B", "refs/heads/loopguard-anchors"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        data = subprocess.check_output(command, env=clean) if is_git else place.read_bytes()
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            _, start, rest = line.partition('{"checkpoint":"')
            if "}" in rest:
                yield f"{place}:{number}", str(json.JSONDecoder().raw_decode(start + rest)[0]["checkpoint"]).encode()
            elif start:
                sys.stderr.write(f"{place}:{number}: a checkpoint is cut there, and was passed over\n")


# -- who signed: signatures of OpenSSH (SSHSIG), and the keys of people
ARMOR = r"\s*-----BEGIN SSH SIGNATURE-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END SSH SIGNATURE-----\s*"
OPTION = r'(?i:valid-after|valid-before|namespaces)="[^"]*"'
KEY_LINE = rf"\s*(?:({OPTION}(?:,{OPTION})*)\s+)?([a-z0-9@.-]+)\s+([A-Za-z0-9+/=]+)(?s:\s.*)?"
NAMESPACE, WHEN = "loopguard-approve@v1", {9: "%Y%m%dZ", 13: "%Y%m%d%H%MZ", 15: "%Y%m%d%H%M%SZ"}


def strings(data: bytes) -> list[bytes]:
    """All the strings that SSH packed one behind the other. Raises ValueError."""
    found = list[bytes]()
    while data:
        end = 4 + int.from_bytes(data[:4])
        need(end <= len(data), "a key or a signature is cut short")
        found, data = [*found, data[4:end]], data[end:]
    return found


def check_signature(blob: bytes, signature: bytes, data: bytes) -> None:
    """Raise ValueError or InvalidSignature unless the key in a blob made this signature over these bytes."""
    kind, *parts = strings(blob)
    if kind == b"sk-ssh-ed25519@openssh.com" and signature[-5:][0] & 1:  # somebody touched it
        data = hashlib.sha256(parts.pop()).digest() + signature[-5:] + hashlib.sha256(data).digest()
        kind, signature = b"touched", signature[:-5]
    match [kind, *strings(signature), *parts]:
        case [b"ssh-ed25519", b"ssh-ed25519", made, public] | [b"touched", b"sk-ssh-ed25519@openssh.com", made, public]:
            ed25519.Ed25519PublicKey.from_public_bytes(public).verify(made, data)
        case [b"ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp256", made, b"nistp256", point]:
            r, s = map(int.from_bytes, strings(made))
            curve = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
            curve.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
        case [b"ssh-rsa", b"rsa-sha2-256" | b"rsa-sha2-512" as how, made, exponent, modulus]:
            key = rsa.RSAPublicNumbers(int.from_bytes(exponent), int.from_bytes(modulus)).public_key()
            need(key.key_size >= 2048, "a key is too short")
            made = made.rjust((key.key_size + 7) // 8, b"\0")  # SSH leaves out zeros in front
            key.verify(made, data, padding.PKCS1v15(), hashes.SHA512() if how == b"rsa-sha2-512" else hashes.SHA256())
        case _:
            raise ValueError("a signature is of a kind that is not taken, or nobody touched the security key")


def is_of(line: str, blob: bytes, at: str | None) -> bool:
    """Whether a line of an `allowed_signers` file names this key. Raises ValueError where that does not count then."""
    match = re.fullmatch(KEY_LINE, line)
    if match is None or (match[2].encode(), match[3]) != (strings(blob)[0], base64.b64encode(blob).decode()):
        return False
    for name, value in re.findall(r'([\w-]+)="([^"]*)"', match[1] or ""):
        if name.lower() == "namespaces":
            need(NAMESPACE in value.split(","), "a key is for other purposes")
        else:
            time = datetime.strptime(value, WHEN.get(len(value), "")).isoformat()
            need(at is None or (time <= at) == (name.lower() == "valid-after"), "a key does not count at that time")
    return True


def signed_bytes(statement: Json) -> bytes:
    """What people sign, byte for byte."""
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def approval_in(told: Any, statement: Json, rule: Json, others: set[str], at: str | None) -> Json:
    """What a record has to tell of an approval that counts, beside those of others. Raises ValueError."""
    match = re.fullmatch(ARMOR, told["signature"]) if fits(told, {"signature": "(?s:.{0,8192})"}) else None
    wrapped = base64.b64decode("".join(match[1].split()), validate=True) if match else b""
    blob, namespace, reserved, how, signature = strings(wrapped.removeprefix(b"SSHSIG\0\0\0\1"))
    sound = namespace == NAMESPACE.encode() and not reserved and how in {b"sha256", b"sha512"}
    need(sound, "a signature is for another purpose, or of a kind that is not taken")
    person, *_ = [name for name, lines in rule["people"].items() for line in lines if is_of(line, blob, at)] or [""]
    parts = namespace, b"", how, hashlib.new(how.decode(), signed_bytes(statement)).digest()
    check_signature(blob, signature, b"SSHSIG" + b"".join(len(part).to_bytes(4, "big") + part for part in parts))
    may = person not in others and (person != statement["requester"] or rule["requester_may_approve"])
    need(person and may, f"{person or 'nobody'} approved, who may not, or not twice")
    fingerprint = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return {"person": person, "key": f"SHA256:{fingerprint}", "signature": told["signature"]}


# -- what was allowed, and who agreed
WAYS, SAID = "rollback|discard|accept|halt", ("freeze", "reason", "disposition", "waives", "waives_cycles")
STATEMENT: Json = dict.fromkeys(("run", "freeze", "reason", "requester"), "(?s:.{1,8192})") | {"v": range(1, 2)}
STATEMENT |= dict.fromkeys(("entered", "head_hash", "policy", "next_policy"), HEX64) | {"head_seq": COUNT}
STATEMENT |= {"not_before": TIME, "expires": TIME, "disposition": WAYS, "target": f"nothing|{HEX64}"}
STATEMENT |= {"waives": "(?s:.{1,8192})", "waives_cycles": NUMBER}
STATEMENT |= {"policy_change": "none|tightened|loosened", "nonce": "[0-9a-f]{32}"}
UPDATES: Json = {"from": int, "to": int}
RESUME: Json = {"approval": "signed", "judged": TIME, "approvals": list}
RULE: Json = {"approvals": range(1, 65), "people": dict, "requester_may_approve": bool}
RULE |= {"within_s": (int, float), "execute_within_s": (int, float)}
ABOUT_APPROVALS = {"policy.loaded", "policy.adopted", "run.started", "freeze.requested", "freeze.entered"}
NOBODY_ASKED = {"tool.decided", "tool.finished", "update.applied", "note.added", "sandbox.created", "sandbox.removed"}
ABOUT_APPROVALS |= {"resume.requested", "resume.applied", "run.halted", "approval.given", "approval.refused"}


def rule_in(value: Any) -> Json:
    """Who has to agree to a resume, by `policy.loaded`; where that cannot be read, a rule that nobody satisfies."""
    lists = [*value["people"].values()] if fits(value, RULE) else [None]
    sound = all(isinstance(lines, list) and all(isinstance(line, str) for line in lines) for lines in lists)
    sound = sound and all(0 < value[name] <= 1e8 for name in ("within_s", "execute_within_s"))
    nobody = {"approvals": 1, "people": {}, "requester_may_approve": False, "within_s": 0, "execute_within_s": 0}
    return {} if value is None else {name: (value if sound else nobody)[name] for name in RULE}


def statement_in(value: Any) -> Json:
    """What people sign; empty where this is none."""
    sound = fits(value, STATEMENT) and value.keys() == STATEMENT.keys()
    return value if sound and (value["waives"] == "nothing") == (not value["waives_cycles"]) else {}


def asks_less(rule: Json, before: Json) -> bool:
    """Whether somebody could resume under this rule who could not under the one before."""
    if not rule or rule["approvals"] < before["approvals"]:
        return True
    longer = any(rule[name] > before[name] for name in ("requester_may_approve", "within_s", "execute_within_s"))
    return longer or any(set(lines) - set(before["people"].get(name, ())) for name, lines in rule["people"].items())


class Permissions:
    """What the records of one stream allow so far, and what people agreed to."""

    def __init__(self, *, owner: bool) -> None:
        self.owner = owner  # resumes are asked for in this stream; the others hold them without what led there
        self.lease = range(0)  # updates that may be applied
        self.weights: str | None = None  # that may become the actor
        self.calls, self.nonces, self.people = set[str](), set[str](), set[str]()
        self.rule, self.waits, self.granted = Json(), Json(), Json()  # the statement that waits, and that was granted
        self.frozen: str | None = None
        self.tripped, self.halted = "", False  # the rule of the last freeze, and whether the run has ended for good
        self.hashes: dict[int, str] = {}  # of the last freeze, and of the records since
        self.policy = self.request = self.latest = ""
        self.start_before: str | None = None  # until when the run has to be started, or had to be
        self.adopted, self.agrees, self.runs = ("", ""), False, False

    def begin(self, state: Json) -> None:
        """Go on from what was under way behind records that are gone."""
        self.calls, self.weights, self.runs = {*state["calls"], *state["orphans"]}, state.get("promotion"), True
        if lease := state.get("lease"):
            self.lease = range(lease["from"], lease["to"] + 1)
        if policy := state.get("policy"):
            self._loaded(str(policy.get("digest")), rule_in(policy.get("resume")))

    def acted(self, kind: str, body: Json) -> None:
        """Whether the records before allow what this one tells. Raises ValueError."""
        lease, call, told = self.lease, str(body.get("call")), body if kind.startswith("update.") else {}
        span = range(told["from"], told["to"] + 1) if told and fits(told, UPDATES) else range(0)
        match kind:
            case "tool.decided" if body.get("result") == "allow":
                self.calls.add(call)
            case "tool.finished" | "tool.lost":
                need(call in self.calls, f"call {call} ended, and no decision allowed it")
                self.calls.remove(call)
            case "update.leased":
                touch = span and lease and lease.start <= span.start <= lease.stop
                self.lease = range(lease.start, max(span.stop, lease.stop)) if touch else span
            case "update.applied":
                need(span and span[0] in lease and span[-1] in lease, f"{span} was applied; the lease is {lease}")
            case "promotion.decided":
                self.weights = str(body.get("weights")) if body.get("result") == "allow" else None
            case "promotion.applied":
                allowed, self.weights = self.weights, None
                need(allowed == str(body.get("actor")), "weights were promoted that no decision allowed")
            case "log.opened" | "update.settled" | "freeze.entered":
                self.lease, self.weights = range(0), None if kind == "freeze.entered" else self.weights
            case "resume.applied" | "run.halted":
                named = body.get("by") and body.get("reason") and str(body.get("freeze")) == self.frozen
                need(named, f"{kind} of no freeze in force, or without a name or a reason")
                need(kind == "run.halted" or not self.halted, "a resume of a run that was halted")
        stopped = self.frozen is not None and kind in {"update.applied", "data.admitted", "promotion.applied"}
        need(not stopped, f"{kind} while frozen")

    def agreed(self, kind: str, body: Json, record: Json) -> None:
        """Whether people agreed to what takes that. Raises ValueError."""
        ts, before, rule = record["ts"], self.latest, self.rule
        statement = statement_in(body.get("statement")) if kind in ABOUT_APPROVALS else {}
        if self.frozen is not None:
            self.hashes[record["seq"]] = record["hash"]
        if kind in ABOUT_APPROVALS:
            back, self.latest = before != "" and seconds(ts, before) > 1, max(ts, before)
            self.waits = {} if back or kind in {"freeze.requested", "freeze.entered"} else self.waits
        match kind:
            case "log.opened":
                self.runs = False
            case "run.started":
                late = self.start_before is not None and self.latest > self.start_before
                self.runs, self.start_before = True, self.start_before if late else None
            case "cycle.started" | "update.leased" | "data.admitted" if self.start_before is not None:
                self.start_before = None
                raise ValueError("the run went on, and was not started by when people had agreed to")
            case "policy.loaded":
                self._loaded(str(body.get("digest")), rule_in(body.get("resume")))
            case "policy.adopted":
                self.adopted, granted = (str(body.get("from")), str(body.get("to"))), self.granted
                asked = [granted.get(name) for name in ("policy_change", "policy", "next_policy")]
                same = asked == ["loosened", *self.adopted]
                self.agrees = same and seconds(granted["ts"], self.latest) <= granted["within_s"]
                need(self.agrees or not rule or body.get("change") != "loosened", "nobody approved a looser policy")
            case "freeze.entered":
                self.frozen, self.hashes = str(body.get("freeze")), {record["seq"]: record["hash"]}
                self.granted, self.start_before, self.tripped = {}, None, str(body.get("rule"))
            case "resume.requested" if rule and statement:
                self.request, self.people = str(body.get("request")), set()
                self.waits = statement if not back and self._stands(statement, record) else {}
                self.nonces.add(statement["nonce"])
            case "approval.given" if rule and self.owner:
                others, self.people = self.people, {*self.people, str(body.get("person"))}
                need(self.waits and body.get("request") == self.request, "no request waited for an approval")
                given = approval_in(body, self.waits, rule, others, None)
                given["statement_sha256"] = sha256(signed_bytes(self.waits))
                need(body == body | given, "an approval says something else than is so")
            case "approval.refused" if body.get("approval") is None and body.get("request") == self.request:
                self.waits = {}
            case "run.halted":
                waits, self.waits, self.halted = self.waits, {}, True
                if rule and body.get("because") != "budget":
                    self._decided(body, ts, statement, waits, before)
                    need(statement["disposition"] == "halt", "the run was halted, and people agreed to go on")
            case "resume.applied":
                waits, self.waits, self.hashes = self.waits, {}, {}
                self.frozen = self.frozen if self.halted else None
                self.granted = statement | {"ts": ts, "within_s": rule.get("execute_within_s", 0)}
                until = body.get("execute_before")
                self.start_before = until if self.owner and isinstance(until, str) else None
                if rule:
                    self._decided(body, ts, statement, waits, before)
                    need(statement["disposition"] != "halt", "the run went on, and people agreed to halt it")
                    lasts_s = seconds(body["judged"], str(until)) if fits(until, TIME) else math.nan
                    in_time = 0 <= lasts_s <= rule["execute_within_s"] or (until is None and self.runs)
                    need(in_time or not self.owner, "a resume that does not say by when the run has to start")

    def _loaded(self, digest: str, rule: Json) -> None:
        same, before, adopted, agrees = digest == self.policy, self.rule, self.adopted, self.agrees
        change, self.adopted, self.agrees = (self.policy, digest), ("", ""), False
        self.policy, self.rule, self.granted = digest, rule, self.granted if same else {}
        if before and self.owner:
            need(not same or rule == before, "a policy has another rule about resumes than before")
            need(same or adopted == change, "the policy became another one, and nobody adopted it")
            less = not same and not agrees and asks_less(rule, before)
            need(not less, "the policy asks for less than the one before, and nobody approved that")

    def _stands(self, statement: Json, record: Json) -> bool:
        """Whether what a request asks people to sign is about this freeze, and lasts no longer than allowed."""
        body, nonce, last_s = record["body"], statement["nonce"], seconds(statement["not_before"], statement["expires"])
        about = {"run": record["log"].rpartition("/")[0], "freeze": self.frozen, "policy": self.policy}
        about |= {"entered": next(iter(self.hashes.values()), ""), "head_hash": self.hashes.get(statement["head_seq"])}
        about |= {"requester": body.get("by"), "reason": body.get("reason")}
        sound = statement == statement | about and body.get("freeze") == self.frozen and nonce not in self.nonces
        sound = sound and not self.halted and statement["waives"] in {"nothing", self.tripped}
        same = (statement["policy"] == statement["next_policy"]) == (statement["policy_change"] == "none")
        in_time = seconds(record["ts"], statement["not_before"]) <= 1 and record["ts"] < statement["expires"]
        return sound and same and in_time and 0 < last_s <= self.rule["within_s"]

    def _decided(self, body: Json, ts: str, statement: Json, waits: Json, before: str) -> None:
        sound, rule, given = fits(body, RESUME), self.rule, list[Json]()
        need(sound and statement, "a resume that nobody signed, or that does not say what, or when that was counted")
        for each in body["approvals"][:65]:
            given.append(approval_in(each, statement, rule, {one["person"] for one in given}, body["judged"]))
        need(rule["approvals"] <= len(given) <= 64, f"a resume by {len(given)} people; it takes {rule['approvals']}")
        told = {name: statement[name] for name in SAID} | {"approvals": given}
        told |= {"by": statement["requester"], "statement_sha256": sha256(signed_bytes(statement))}
        need(body == body | told, "a resume that is not what people signed")
        need(seconds(ts, body["judged"]) <= 1, "approvals were counted after the resume")
        if self.owner:
            need(waits == statement and waits["policy"] == self.policy, "a resume that no request waited for")
            need(before <= body["judged"] < waits["expires"], "approvals were counted too late, or before they came")


# -- a stream
APART = {"tool.decided": ("code", "stdin"), "tool.finished": ("stdout", "stderr"), "blob.erased": ()}
BLOB, SALT_BYTES, COMMITMENT = b"loopguard-blob-v1\n", 32, {"commitment": HEX64, "bytes": NUMBER}


class Stream:
    """The verification of one stream: what its records come to, and where they say that other streams stand."""

    def __init__(
        self, run_dir: Path, name: str, home: str, keys: Keys, marks: Iterable[Mark], *, without_payloads: bool
    ) -> None:
        self.run_dir, self.name, self.keys, self.folder = run_dir, name, keys, run_dir / "audit" / name
        self.log, self.place = f"{home}{name}" if home else "", str(self.folder)
        self.seq, self.hash, self.epoch, self.tail, self.proven, self.signed = 0, "0" * 64, 0, 0, 0, 0
        self.edge: list[tuple[int, bytes]] = []  # the full subtrees at the right edge of the tree: size and root
        self.key, self.before, self.policies, self.findings = "", dict[str, Any](), {""}, list[str]()
        self.codes, self.broken, self.over = {Code.OK}, Code.OK, False
        self.apart = COUNT.stop  # up to where a trusted key signed other records than are here
        self.without_payloads, self.missed = without_payloads, dict[str, str]()  # blobs that no record says were erased
        self.front, self.told = Json(), False  # what stands for records that are gone, and whether the log says so too
        self.paths: list[Path] = []
        self.others: dict[str, list[Mark]] = {}
        self.permissions = Permissions(owner=name == "controller")
        self.marks: dict[int | str, list[Mark | Path]] = {}  # a path is of a note beside the log
        for mark in marks:
            self.marks.setdefault(mark.at, []).append(mark)
        try:
            self._read()
        except OSError as error:
            self.ask(Code.UNREADABLE, need, False, str(error))

    def ask(self, usual: Code, question: Callable[..., Any], *about: Any) -> Any:
        """What a question comes to; where it raises ValueError, a finding: of this code, if it does not say which."""
        try:
            return question(*about)
        except (ValueError, InvalidSignature) as error:
            text, code = error.args if len(error.args) == 2 else (str(error) or "a signature is wrong", usual)
            self.codes.add(code)
            self.findings += [f"{self.place}: {text}"] if len(self.findings) < 50 else []
        if code // 10 == 3:  # the first break names the class, since what follows may follow from it
            self.broken = self.broken or code
            self.over = self.over or code != Code.REPLACED  # behind replaced records it may still show who signed both
        return None

    def _read(self) -> None:
        home = self.folder / "checkpoints"
        for path in home.iterdir() if home.is_dir() else ():
            if re.fullmatch(r"[1-9][0-9]{0,15}\.note", path.name):
                self.marks.setdefault(int(path.stem), []).append(path)
        self.front, trouble = front_of(self.folder)
        self.paths = segments(self.folder)
        if self.front:
            self._begin(self.front, self.front["body"])
        for path in self.paths:
            self.place = str(path)
            self.ask(Code.TAMPER, self._segment, path)
        self.place = str(self.folder)
        self.ask(Code.MISSING, need, self.seq or self.over, "there is no log, or no record in it")
        self.ask(Code.TAMPER, need, not trouble, trouble)
        if self.front:
            told = "records up to {through} were pruned by {by}: {reason}".format(**self.front["body"])
            self.ask(Code.TAMPER, need, self.told, f"{told}; but no record of the log says so")
            self.ask(Code.WARN, need, not self.told, told)
        for at, (mark, *_) in self.marks.items() if self.paths and not self.over else ():
            known, origin = isinstance(at, int) and at <= self.seq, mark.origin if isinstance(mark, Mark) else mark
            known = known or (isinstance(at, str) and bool(self.front))  # it may be of a record that is gone
            self.ask(Code.TRUNCATED, need, known, f"ends at record {self.seq}; {origin} knows of {at}")
        for of in self.missed.values():
            self.ask(Code.MISSING, need, False, f"{of} is gone, and no record behind it says that it was erased")
        if self.broken == Code.REPLACED and self.apart <= self.signed:
            self.broken = Code.FORK
            self.findings.insert(0, f"{self.place}: a trusted key signed two histories of it")

    def _begin(self, front: Json, body: Json) -> None:
        """Go on from the last record that is gone."""
        self.log = self.log or (front["log"] if front["log"].endswith(f"/{self.name}") else "")
        self.seq, self.hash, self.epoch, self.key = body["through"], body["hash"], body["epoch"], body["state"]["key"]
        sizes = [1 << bit for bit in reversed(range(self.seq.bit_length())) if self.seq >> bit & 1]
        self.edge = [*zip(sizes, map(bytes.fromhex, body["edge"]), strict=True)]
        self.permissions.begin(body["state"])
        for at in [at for at in self.marks if isinstance(at, int) and at < self.seq]:  # which cannot be compared
            for mark in self.marks.pop(at):
                back = isinstance(mark, Mark) and mark.otherwise == Code.FORK
                self.ask(Code.FORK, need, not back, f"the controller goes back behind record {at}")
        self._remember()

    def _segment(self, path: Path) -> None:
        """Ask everything of the records of a segment. Raises ValueError where it is damaged, or wrongly empty."""
        number, named, last = 0, int(path.name[4:16]), path == self.paths[-1]
        for number, line in enumerate(lines_of(path), 1):
            self.place = f"{path}:{number}"
            if last and path.suffix != ".gz" and not line.endswith(b"\n") and is_cut(line):
                self.ask(Code.WARN, need, False, "the last line is cut")
                break
            record = self.ask(Code.TAMPER, record_in, line)
            if record:
                is_named = record["seq"] if number > 1 else named
                if not self.over and self.ask(Code.TAMPER, self._follows, record, is_named, line):
                    self._look(record, record["type"], record["body"])
                if record["type"] in APART:
                    self._apart(record["type"], record["body"])
        need(number or last, "the segment is empty")

    def _follows(self, record: Json, named: int, line: bytes) -> bool:
        """Whether this is the record that belongs here. Raises ValueError where it is not."""
        seq = record["seq"]
        self.log = self.log or (record["log"] if record["log"].endswith(f"/{self.name}") else "")
        need(record["log"] == self.log, "the record is of another run or stream", Code.SPLICE)
        for other in (line for path in self.paths for line in lines_of(path)) if seq <= self.seq else ():
            twin = record_or_none(other) or record
            need(twin["seq"] != seq or twin["hash"] == record["hash"], f"two different records {seq}", Code.FORK)
        need(seq == self.seq + 1 and record["prev"] == self.hash, "the record does not follow the one before it")
        need(record["epoch"] >= self.epoch, "the record is of an earlier epoch: old state wrote on", Code.FORK)
        need(named == seq, "the record is not the one that its segment is named for")
        need(line.endswith(b"\n"), "the record does not end its line")
        self.seq, self.hash, self.epoch = seq, record["hash"], record["epoch"]
        size, node = 1, hashlib.sha256(b"\0" + bytes.fromhex(self.hash)).digest()
        while self.edge and self.edge[-1][0] == size:
            size, node = size * 2, hashlib.sha256(b"\1" + self.edge.pop()[1] + node).digest()
        self.edge.append((size, node))
        return True

    def _look(self, record: Json, kind: str, body: Json) -> None:
        """Ask what else has to be so of a record that belongs where it stands."""
        before, self.before, policy = self.before or record, record, record["policy"]
        self.tail = self.tail if kind in {"anchor.kept", "anchor.failed"} and not body.get("required") else self.seq
        self.key = str(body.get("key")) if kind == "log.opened" else self.key
        self._remember()
        if before["ts"] > record["ts"] or (before["boot"] == record["boot"] and before["mono_ns"] > record["mono_ns"]):
            self.ask(Code.WARN, need, False, "clock_back: a clock went back")
        if policy not in self.policies:
            self.policies.add(policy)
            there = re.fullmatch(HEX64, policy) and (self.run_dir / "policy" / f"{policy}.yaml").is_file()
            self.ask(Code.MISSING, need, there, f"the policy {policy} is not there")
        if kind == "log.recovered":
            self.ask(Code.WARN, need, False, "a cut last line was set aside")
            torn = self.folder / (str(body["file"]) if fits(body, {"file": r"torn-[0-9]{12}(-[0-9]+)?\.bin"}) else "")
            same = not torn.is_file() or digest_of(torn) == body.get("digest")
            self.ask(Code.TAMPER, need, same, f"{torn} is not what was set aside")
        if kind == "log.pruned":
            self.told = self.told or (self.seq, self.hash) == (self.front.get("seq"), self.front.get("hash"))
            self.ask(Code.PROTOCOL, check_pruned, record)
        if kind == "streams.committed" and self.name == "controller" and isinstance(body.get("streams"), dict):
            for name, stands in body["streams"].items():
                self.ask(Code.PROTOCOL, self._commits, name, stands, f"record {self.seq} of the controller")
        self.ask(Code.PROTOCOL, self.permissions.acted, kind, body)
        if kind not in NOBODY_ASKED or self.permissions.frozen is not None:  # of a log nearly all is about these
            self.ask(Code.APPROVAL, self.permissions.agreed, kind, body, record)

    def _remember(self) -> None:
        """Ask whether the records so far are those that others know of."""
        for mark in (*self.marks.pop(self.seq, ()), *self.marks.pop(self.hash, ())):
            self.ask(Code.TAMPER, self._compare, mark)

    def _compare(self, mark: Mark | Path) -> None:
        """Whether the records so far are those of a mark. Raises ValueError."""
        if isinstance(mark, Path):  # beside the log: without a signature it proves nothing, and must not contradict it
            mark = note_in(beginning(mark, NOTE_BYTES), str(mark), self.keys, elsewhere=False)
            need(mark.log == self.log, f"{mark.origin} is of {mark.log}", Code.SPLICE)
            need(mark.at == self.seq, f"{mark.origin} is of {mark.at} records")
        root = self.edge[-1][1]
        for _, left in reversed(self.edge[:-1]):
            root = hashlib.sha256(b"\1" + left + root).digest()
        same = mark.stands_for in {self.hash, root}
        self.apart = self.apart if same or not mark.signers else min(self.apart, self.seq)
        need(same, f"the records up to {self.seq} are not those of {mark.origin}", mark.otherwise)
        self.proven = self.seq if mark.proves else self.proven
        self.signed = self.seq if self.key in mark.signers else self.signed

    def _apart(self, kind: str, body: Json) -> None:
        """Ask about the payloads that a record names, or says were erased."""
        for member in APART[kind]:
            if body.get(member) is not None:
                self.ask(Code.PROTOCOL, self._payload, body[member], f"{self.place}: the {member}")
        if kind == "blob.erased":
            self.ask(Code.PROTOCOL, need, body.get("by") and body.get("reason"), "erased without a name or a reason")
            listed = body.get("commitments")
            for one in (one for one in listed if fits(one, HEX64)) if isinstance(listed, list) else ():
                self.missed.pop(one, None)
                path = self.folder / "blobs" / one[:2] / one
                self.ask(Code.WARN, need, not os.path.lexists(path), f"{path} is there, and was erased")

    def _payload(self, told: Any, of: str) -> None:
        """Whether a payload is what a record says of it. Raises ValueError."""
        need(fits(told, COMMITMENT) and len(told) == 2, f"what stands for {of} is no commitment")
        path = self.folder / "blobs" / told["commitment"][:2] / told["commitment"]
        if self.without_payloads:
            return
        if not os.path.lexists(path):
            self.missed[told["commitment"]] = of
            return
        need(stat.S_ISREG(path.lstat().st_mode), f"{path} is no file", Code.TAMPER)
        need(digest_of(path) == told["commitment"], f"{path} is not what was recorded", Code.TAMPER)
        size = path.stat().st_size - len(BLOB) - SALT_BYTES
        sound = beginning(path, len(BLOB) - 1) == BLOB and size == told["bytes"]
        need(sound, f"{path} is not a payload of {told['bytes']} bytes")

    def _commits(self, name: str, stands: Any, origin: str) -> None:
        """Take in where another stream stands. Raises ValueError where that is no head."""
        sound = (
            fits(stands, {"seq": COUNT, "hash": HEX64})
            and re.fullmatch(r"(?a:\w[\w.-]*)", name)
            and name != "controller"
        )
        need(sound, f"what it says of stream {name} is no head")
        known = name in self.others or segments(self.run_dir / "audit" / name)
        need(known, f"stream {name} is not there", Code.MISSING)
        marks, mark = self.others.setdefault(name, []), Mark(origin, stands["seq"], stands["hash"])
        goes_back = marks and int(marks[-1].at) > stands["seq"]
        marks += [Mark(f"{origin}, of before", marks[-1].at, "", otherwise=Code.FORK) if goes_back else mark]

    def facts(self) -> Json:
        """What there is to know of it: its last record, and up to where records are proven and signed."""
        return {"head": f"{self.seq}:{self.hash}", "proven": self.proven, "signed": self.signed}

    def code(self, *, leads: bool) -> Code:
        """The class of this stream alone. The one that leads has to be signed, where a key is trusted."""
        worst = max(self.codes)
        if self.broken or worst >= Code.PROTOCOL:
            return worst if worst == Code.UNREADABLE else self.broken or worst
        signed = self.signed >= self.tail or not self.keys or not leads
        return worst if self.proven >= self.tail and signed else Code.UNANCHORED


# -- the run
def log_in(folder: Path) -> str:
    """The `log` of the first segment that begins with a record; empty where none does. Raises OSError."""
    for path in segments(folder):
        try:
            return str(record_in(next(lines_of(path), b""))["log"])
        except ValueError:
            continue
    return ""


def verify(
    run_dir: Path,
    *,
    head: str | None = None,
    keys: Keys,
    kept: Iterable[tuple[Path, list[Mark]]] = (),
    without_payloads: bool = False,
) -> Json:
    """What was found of all streams of a run. Raises ValueError for what the reader named wrongly, OSError."""
    match = re.fullmatch(rf"(?:([0-9]{{1,15}}):)?({HEX64})", (head or "0" * 64).strip())
    seq, digest = match.groups("") if match else ("", "")
    need(match, f"expected head {head!r} is not SEQ:HASH or HASH")
    expected = [Mark("the expected head", int(seq) if seq else digest, digest)] if head else []
    for place, notes in kept:
        outside = notes and not place.resolve().is_relative_to(run_dir.resolve())
        need(outside, f"--anchors {place} holds no checkpoint, or lies beside the log, where it proves nothing")
    refuse_pipes(run_dir)
    audit, run, cache = run_dir / "audit", object_in(run_dir / "run.json").get("id"), object_in(run_dir / "state.json")
    homes = audit.iterdir() if audit.is_dir() else ()
    names = sorted(path.name for path in homes if path.is_dir() and segments(path))
    marks = {"controller": expected} | {name: list[Mark]() for name in names if name != "controller"}
    home = f"{run}/" if isinstance(run, str) else ""
    log = f"{home}controller" if home else log_in(audit / "controller")
    start = log.removesuffix("controller") if log.endswith("/controller") else "/"
    for place, notes in kept:
        ours = [note for note in notes if note.log.startswith(start) and note.log.removeprefix(start) in marks]
        need(ours, f"--anchors {place} holds nothing of {start}")
        for note in ours:
            marks[note.log.removeprefix(start)].append(note)
    if fits(cache, {"stream": "|".join(map(re.escape, marks)), "seq": COUNT, "hash": str}):
        marks[cache["stream"]].append(Mark("state.json", cache["seq"], cache["hash"], proves=False))
    stream = functools.partial(Stream, run_dir, home=home, keys=keys, without_payloads=without_payloads)
    lead = stream("controller", marks=marks["controller"])
    names = [name for name in {**marks, **lead.others} if name != "controller"]
    others = [stream(name, marks=marks.get(name, []) + lead.others.get(name, [])) for name in names]
    codes = [lead.code(leads=True), *(stream.code(leads=False) for stream in others)]
    code = next((code for code in codes if code // 10 == 3), max(codes))
    return {
        "code": Code.UNREADABLE if Code.UNREADABLE in codes else code,
        "findings": [text for stream in (lead, *others) for text in stream.findings],
        "keys": [vkey for vkey, _ in keys.values()],
        "streams": {stream.name: stream.facts() for stream in (lead, *others)},
    }


def main(arguments: list[str] | None = None) -> int:
    """Verify what the command line names, print what was found, give the exit code."""
    parser = argparse.ArgumentParser(description="Verify the audit log of a LoopGuard run without LoopGuard.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--expect-head", metavar="HEAD", help="a head noted earlier, SEQ:HASH or HASH")
    parser.add_argument("--key", action="append", default=[], metavar="VKEY", help="a trusted key, or a file with it")
    parser.add_argument("--anchors", action="append", default=[], type=Path, metavar="PLACE", help="what was kept")
    parser.add_argument("--without-payloads", action="store_true", help="payloads of tool calls did not come along")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    found: Json = {"code": Code.UNREADABLE, "keys": [], "streams": {}}
    try:
        keys = dict(map(key_in, given.key))
        kept = [
            (at, [note_in(data, place, keys, elsewhere=True) for place, data in kept_at(at)]) for at in given.anchors
        ]
        try:
            apart = given.without_payloads
            found = verify(given.run_dir, head=given.expect_head, keys=keys, kept=kept, without_payloads=apart)
        except OSError as error:
            found["findings"] = [str(error)]
    except (ValueError, OSError, RecursionError, InvalidSignature, subprocess.SubprocessError) as error:
        sys.stderr.write(f"{str(error) or 'a signature in an anchor is wrong'}\n")
        return Code.USAGE
    status = Code(found["code"]).name.lower()
    lines = [
        f"{status.upper()} ({found['code']})",
        *found["findings"],
        *(f"trusted key: {key}" for key in found["keys"]),
    ]
    lines += [f"stream {name}: {json.dumps(facts)}" for name, facts in found["streams"].items()]
    for line in [json.dumps(found | {"status": status}, sort_keys=True)] if given.json else lines:
        sys.stdout.write("".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in line) + "\n")
    return int(found["code"])


if __name__ == "__main__":
    sys.exit(main())
