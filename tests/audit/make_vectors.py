"""Write the vectors: small logs, good and bad, each with the code that a verifier has to give and a sentence why.

    python tests/audit/make_vectors.py [FOLDER]

`vectors/index.json` lists them: `name` of the folder, `code`, `says`, and what the reader has: `head` (--expect-head),
`keys` (--key), `anchors` (--anchors, from the folder of the vector) and `without_payloads` (the flag of that name). The
run directory is NAME/run.

The clock and all keys are fixed, so that the same bytes come out each time. A vector is a function below: it gets a
folder, and gives what the reader has.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import struct
import sys
import textwrap
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from loopguard.audit.events import encode
from loopguard.audit.keys import SigningKey
from loopguard.audit.notes import Checkpoint
from loopguard.audit.tree import Tree

HOME = Path(__file__).parent / "vectors"
BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
KEY = SigningKey("gpu7", bytes(range(32)))
OTHER_KEY = SigningKey("gpu8", bytes(range(1, 33)))
VKEY = str(KEY.public)

VECTORS = {}


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


POLICY, LOOSER = digest("a guard policy"), digest("a looser one")


def vector(code, says):
    """Register a function as a vector under its name."""

    def register(make):
        VECTORS[make.__name__.replace("_", "-")] = (code, says, make)
        return make

    return register


def stamp(seconds):
    return (BEGIN + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Log:
    """A stream that is being made up. Nothing is written before `write`, so that lines can be tampered with."""

    def __init__(self, home, *, stream="controller", run="run-a", policy=POLICY, key=None):
        self.run_dir = home / "run"
        self.folder = self.run_dir / "audit" / stream
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "policy").mkdir(exist_ok=True)
        for name in (POLICY, LOOSER):
            (self.run_dir / "policy" / f"{name}.yaml").write_text("a stand-in\n")
        (self.run_dir / "run.json").write_text(json.dumps({"id": "run-a"}))
        self.log, self.policy, self.key = f"{run}/{stream}", policy, key
        self.lines, self.tree, self.seq, self.hash = [], Tree(), 0, "0" * 64
        self.epoch, self.now = 0, 0
        self.add("log.opened", {"pid": 1, "versions": {}} | ({"key": str(key.public)} if key else {}))

    @property
    def head(self):
        return f"{self.seq}:{self.hash}"

    def add(self, kind, body=None, **changes):
        """One more record; `changes` are to its other fields. Gives the fields."""
        self.now += 1
        self.seq += 1
        fields = {
            "actor": {"id": "loopguard", "kind": "loop"},
            "body": body or {},
            "boot": "b",
            "cause": [],
            "cycle": None,
            "epoch": self.epoch,
            "id": f"019438a0-0000-7000-8000-{self.seq:012x}",
            "log": self.log,
            "mono_ns": self.now * 1_000_000_000,
            "policy": self.policy,
            "prev": self.hash,
            "redacted": [],
            "seq": self.seq,
            "ts": stamp(self.now),
            "type": kind,
            "v": 1,
        } | changes
        line, self.hash = encode(fields)
        self.lines.append(line)
        self.tree = self.tree.grown(bytes.fromhex(self.hash))
        return fields | {"hash": self.hash}

    def notes(self, count, text="note"):
        for number in range(count):
            self.add("note.added", {"by": "dana", "text": f"{text} {number}"})

    def checkpoint(self, *, key=None):
        return Checkpoint(self.log, self.tree.size, self.tree.root()).note(key or self.key)

    def store(self, note=None, *, size=None):
        """Lay a checkpoint beside the log."""
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        (folder / f"{size or self.seq}.note").write_text(note or self.checkpoint())

    def keep(self, note=None):
        """Keep a checkpoint elsewhere."""
        line = json.dumps({"checkpoint": note or self.checkpoint()}, separators=(",", ":"))
        with (self.run_dir.parent / "anchors.jsonl").open("a") as file:
            file.write(f"{line}\n")

    def commit(self, *others):
        """Say where other streams stand."""
        heads = {other.folder.name: {"seq": other.seq, "hash": other.hash} for other in others}
        self.add("streams.committed", {"streams": heads})

    def write(self, lines=None, *, first=1):
        path = self.folder / f"seg-{first:012d}.jsonl"
        path.write_bytes(b"".join(self.lines if lines is None else lines))
        return path


def plain(home, *, notes=5, **options):
    log = Log(home, **options)
    log.notes(notes)
    return log


# -- 0 and 10 ----------------------------------------------------------------------------------------------------------


@vector(0, "its head is the one that was noted down")
def ok_with_its_head(home):
    log = plain(home)
    log.write()
    return {"head": log.head}


@vector(0, "a hash alone is enough of a head")
def ok_with_the_hash_of_its_head(home):
    log = plain(home)
    log.write()
    return {"head": log.hash}


@vector(0, "signed to the end by a trusted key, and kept elsewhere; what says where it was kept may follow")
def ok_signed_and_kept(home):
    log = plain(home, key=KEY)
    log.store()
    log.keep()
    log.add("anchor.kept", {"kind": "file", "place": "anchors.jsonl", "size": log.seq, "where": "anchors.jsonl"})
    log.write()
    return {"keys": [VKEY], "anchors": ["anchors.jsonl"]}


@vector(0, "two segments are one log")
def ok_in_two_segments(home):
    log = plain(home)
    log.write(log.lines[:3])
    log.write(log.lines[3:], first=4)
    return {"head": log.head}


@vector(0, "the controller says where the other stream stands, and it stands there")
def ok_with_another_stream(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    log.commit(rank)
    rank.write()
    log.write()
    return {"head": log.head}


@vector(0, "everything that needs permission has it")
def ok_with_all_that_a_loop_does(home):
    log = Log(home)
    loop(log)
    log.write()
    return {"head": log.head}


@vector(10, "a crash cut the last line; the head before it was noted down")
def warn_cut_line(home):
    log = plain(home)
    head, log.lines = log.head, [*log.lines]
    log.notes(1)
    log.write([*log.lines[:-1], log.lines[-1][:100]])
    return {"head": head}


@vector(10, "a whole last record that lacks its newline and has zeros behind it was cut by a crash as well")
def warn_cut_newline(home):
    log = plain(home)
    head = log.head
    log.notes(1)
    log.write([*log.lines[:-1], log.lines[-1][:-1] + b"\0" * 20])
    return {"head": head}


@vector(10, "a start set the bytes of a cut line aside, and they are the ones that it names")
def warn_recovered(home):
    log = recovered(home, b'{"actor":{"id":')
    return {"head": log.head}


@vector(10, "a clock went back")
def warn_clock(home):
    log = plain(home)
    log.add("note.added", {}, ts=stamp(0))
    log.write()
    return {"head": log.head}


def recovered(home, data):
    log = Log(home)
    name, torn = "torn-000000000002.bin", b'{"actor":{"id":'
    (log.folder / name).write_bytes(data)
    body = {"torn_bytes": len(torn), "digest": hashlib.sha256(torn).hexdigest(), "file": name}
    log.add("log.recovered", body)
    log.write()
    return log


def loop(log, freeze="f1"):
    """A cycle with a call, updates and a promotion; a freeze, a resume, and updates again."""
    log.add("tool.decided", {"call": "c1", "result": "allow"})
    log.add("tool.decided", {"call": "c2", "result": "deny"})
    log.add("tool.finished", {"call": "c1", "status": "ok"})
    log.add("data.admitted", {"admitted": 3})
    log.add("update.leased", {"from": 1, "to": 8})
    log.add("update.leased", {"from": 9, "to": 16})
    log.add("update.applied", {"from": 5, "to": 12, "readings": {}})
    log.add("promotion.decided", {"result": "allow", "weights": digest("w")})
    log.add("promotion.applied", {"actor": digest("w")})
    log.epoch += 1
    log.add("freeze.entered", {"freeze": freeze})
    log.add("resume.applied", {"freeze": freeze, "by": "dana", "reason": "fine", "approval": "none"})
    log.add("update.leased", {"from": 13, "to": 20})
    log.add("update.applied", {"from": 13, "to": 20, "readings": {}})


# -- 20 ----------------------------------------------------------------------------------------------------------------


@vector(20, "whole, and the reader has nothing that its tail could be held against")
def unanchored_nothing_to_hold_against_it(home):
    plain(home).write()
    return {}


@vector(20, "its tail was cut, which nobody can see who has nothing")
def unanchored_cut_tail(home):
    log = plain(home)
    log.write(log.lines[:-2])
    return {}


@vector(20, "the head that was noted down stands in the middle")
def unanchored_behind_a_head(home):
    log = plain(home)
    head = log.head
    log.notes(1)
    log.write()
    return {"head": head}


@vector(20, "that a required place failed stands behind what was kept, and could be cut off")
def unanchored_required_place_failed(home):
    log = plain(home)
    log.keep()
    log.add("anchor.failed", {"kind": "git", "place": "x", "size": log.seq, "reason": "full", "required": True})
    log.write()
    return {"anchors": ["anchors.jsonl"]}


@vector(20, "signed to its end, and a signature beside it does not keep a tail from being cut")
def unanchored_signed_only(home):
    log = plain(home, key=KEY)
    log.store()
    log.write()
    return {"keys": [VKEY]}


@vector(20, "the trusted key did not sign what was kept, so that it proves nothing")
def unanchored_kept_without_the_key(home):
    log = plain(home, key=OTHER_KEY)
    log.store()
    log.keep()
    log.write()
    return {"keys": [VKEY], "anchors": ["anchors.jsonl"]}


@vector(20, "the head is right, and the trusted key signed only the middle")
def unanchored_signed_to_the_middle(home):
    log = plain(home, key=KEY)
    log.store()
    log.notes(1)
    log.write()
    return {"keys": [VKEY], "head": log.head}


@vector(20, "the log named another key by then; one that was given up signs nothing that came later")
def unanchored_signed_by_a_key_given_up(home):
    log = plain(home, key=KEY)
    log.add("log.opened", {"key": str(OTHER_KEY.public)})
    log.store()
    log.write()
    return {"keys": [VKEY], "head": log.head}


@vector(20, "nothing commits to the other stream")
def unanchored_stream(home):
    plain(home, stream="rank-1").write()
    log = plain(home)
    log.write()
    return {"head": log.head}


# -- 30 ----------------------------------------------------------------------------------------------------------------


def tampered(home, change, **options):
    log = plain(home, **options)
    log.write(change(log.lines))
    return {"head": log.head}


@vector(30, "a byte was flipped")
def tamper_byte(home):
    return tampered(home, lambda lines: [*lines[:2], lines[2].replace(b"dana", b"dama"), *lines[3:]])


@vector(30, "two records were swapped")
def tamper_swapped(home):
    return tampered(home, lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]])


@vector(30, "a record was taken out")
def tamper_dropped(home):
    return tampered(home, lambda lines: lines[:2] + lines[3:])


@vector(30, "a record stands there twice")
def tamper_repeated(home):
    return tampered(home, lambda lines: [*lines[:3], lines[2], *lines[3:]])


@vector(30, "a line that is not the last of the log does not end")
def tamper_cut_inside(home):
    log = plain(home)
    log.write([*log.lines[:2], log.lines[2][:-1]])
    log.write(log.lines[3:], first=4)
    return {"head": log.head}


@vector(30, "a whole last record has something behind it that is neither a newline nor zeros")
def tamper_behind_the_last(home):
    return tampered(home, lambda lines: [*lines[:-1], lines[-1][:-1] + b" "])


@vector(30, "a segment has another name than its first record")
def tamper_segment_name(home):
    log = plain(home)
    log.write(first=7)
    return {"head": log.head}


@vector(30, "a segment that is not the last is empty")
def tamper_empty_segment(home):
    log = plain(home)
    log.write([])
    log.write(first=2)
    return {"head": log.head}


@vector(30, "a record has a field too many, and is hashed right")
def tamper_field(home):
    return tampered(home, lambda lines: [*lines[:2], hashed(lines[2], more=1), *lines[3:]])


@vector(30, "a number is a string, and the record is hashed right")
def tamper_type(home):
    return tampered(home, lambda lines: [*lines[:2], hashed(lines[2], epoch="0"), *lines[3:]])


@vector(30, "a record is nested deeper than JSON is read, and is hashed right")
def tamper_depth(home):
    deep = json.loads("[" * 900 + "]" * 900)
    return tampered(home, lambda lines: [*lines[:2], deeper(hashed(lines[2], cause=[deep])), *lines[3:]])


@vector(0, "objects and lists lie within one another as deeply as in no record of ours")
def ok_depth(home):
    log = plain(home)
    log.add("note.added", {"text": json.loads("[" * 62 + "]" * 62)})
    log.write()
    return {"head": log.head}


@vector(30, "a time is none")
def tamper_time(home):
    return tampered(home, lambda lines: [*lines[:2], hashed(lines[2], ts="2030-13-01T00:00:00.000000Z"), *lines[3:]])


@vector(30, "a note has 65 signatures")
def tamper_note_signatures(home):
    log = plain(home, key=KEY)
    note = log.checkpoint()
    log.store(note + note.splitlines(keepends=True)[-1] * 64)
    log.write()
    return {"head": log.head}


@vector(20, "a note has 64 signatures, and the last one is of the key that the log names")
def unanchored_note_of_many(home):
    log = plain(home, key=KEY)
    note, other = log.checkpoint(), log.checkpoint(key=OTHER_KEY).splitlines(keepends=True)[-1]
    text, own = note.rsplit("\n", 2)[0], note.splitlines(keepends=True)[-1]
    log.store(f"{text}\n{other * 63}{own}")
    log.write()
    return {"keys": [str(OTHER_KEY.public), VKEY]}


@vector(30, "a note names a trusted key, and the key did not sign it")
def tamper_signature(home):
    log = plain(home, key=KEY)
    text = log.checkpoint()
    log.store(text.replace(text[-10:-4], "AAAAAA"))
    log.write()
    return {"keys": [VKEY], "head": log.head}


@vector(30, "a note is named for another size than it says")
def tamper_note_size(home):
    log = plain(home)
    log.store(size=3)
    log.write()
    return {"head": log.head}


@vector(30, "a note is none")
def tamper_note(home):
    log = plain(home)
    log.store("run-a/controller\nsix\n\n")
    log.write()
    return {"head": log.head}


@vector(30, "what was set aside is not what the record names")
def tamper_set_aside(home):
    log = recovered(home, b"something else")
    return {"head": log.head}


def hashed(line, **changes):
    """A line with other fields, and the hash that belongs to it."""
    value = json.loads(line) | changes
    stated = value.pop("hash")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    stated = hashlib.sha256(b"loopguard-record-v1\n" + text.encode()).hexdigest()
    return json.dumps(value | {"hash": stated}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def deeper(line):
    """The same with a hundred times the depth, which json does not write."""
    before, after = line.index(b"[[["), line.index(b"]]]")
    at = line.rfind(b',"hash":"')
    text = line[:before] + b"[" * 60_000 + b"]" * 60_000 + line[after + 900 : at] + line[at + 74 : -1]
    front, back = text.rsplit(b',"id":', 1)
    stated = hashlib.sha256(b"loopguard-record-v1\n" + text).hexdigest().encode()
    return front + b',"hash":"' + stated + b'","id":' + back + b"\n"


# -- 31 to 34 ----------------------------------------------------------------------------------------------------------


@vector(31, "the head that was noted down is not there any more")
def truncated_head(home):
    log = plain(home)
    log.write(log.lines[:-1])
    return {"head": log.head}


@vector(31, "no record has the hash that was noted down")
def truncated_hash(home):
    log = plain(home)
    log.write(log.lines[:-1])
    return {"head": log.hash}


@vector(31, "a checkpoint that was kept stands for more records than there are")
def truncated_kept(home):
    log = plain(home)
    log.keep()
    log.write(log.lines[:-1])
    return {"anchors": ["anchors.jsonl"]}


@vector(31, "a note beside the log stands for more records than there are")
def truncated_note(home):
    log = plain(home)
    log.store()
    log.write(log.lines[:-1])
    return {}


@vector(31, "state.json names a later record")
def truncated_state(home):
    log = plain(home)
    (log.run_dir / "state.json").write_text(json.dumps({"stream": "controller", "seq": log.seq, "hash": log.hash}))
    log.write(log.lines[:-1])
    return {}


@vector(31, "the other stream had more records, by what the controller says")
def truncated_stream(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    log.commit(rank)
    rank.write(rank.lines[:-1])
    log.write()
    return {"head": log.head}


@vector(32, "the record of that number is not the one that was noted down")
def replaced_head(home):
    log = plain(home)
    other = Log(home)
    other.notes(5, "another history")
    other.write()
    return {"head": log.head}


@vector(32, "a checkpoint that was kept stands for other records")
def replaced_kept(home):
    plain(home).keep()
    other = Log(home)
    other.notes(7, "another history")
    other.write()
    return {"anchors": ["anchors.jsonl"]}


@vector(32, "a note that was left beside it stands for other records")
def replaced_note(home):
    plain(home).store()
    other = Log(home)
    other.notes(7, "another history")
    other.write()
    return {}


@vector(32, "state.json names another record of that number")
def replaced_state(home):
    log = plain(home)
    (log.run_dir / "state.json").write_text(json.dumps({"stream": "controller", "seq": 3, "hash": digest("x")}))
    log.write()
    return {"head": log.head}


@vector(32, "the other stream holds other records than the controller says")
def replaced_stream(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    log.commit(rank)
    other = Log(home, stream="rank-1")
    other.notes(8, "another history")
    other.write()
    log.write()
    return {"head": log.head}


@vector(33, "a record of another run stands among ours")
def splice_record(home):
    theirs = plain(home, run="run-b").lines
    return tampered(home, lambda lines: [*lines[:3], theirs[3], *lines[4:]])


@vector(33, "the whole log is of another run than run.json says")
def splice_run(home):
    log = plain(home, run="run-b")
    log.write()
    return {"head": log.head}


@vector(33, "a note is of another run")
def splice_note(home):
    log = plain(home)
    log.store(plain(home, run="run-b").checkpoint())
    log.write()
    return {"head": log.head}


@vector(33, "one stream was put in the place of another")
def splice_stream(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    log.commit(rank)
    (log.run_dir / "audit" / "rank-2").mkdir()
    rank.folder = log.run_dir / "audit" / "rank-1"
    other = plain(home, stream="rank-2")
    other.folder.rmdir()
    other.folder = rank.folder
    other.write()
    log.write()
    return {"head": log.head}


@vector(34, "there are two different records of one number")
def fork_two_writers(home):
    log, other = plain(home), plain(home)
    other.notes(1, "written in a copy")
    log.notes(1)
    log.write([*log.lines, other.lines[-1]])
    return {"head": log.head}


@vector(34, "the epoch goes back")
def fork_epoch(home):
    log = Log(home)
    log.epoch = 3
    log.notes(2)
    log.epoch = 1
    log.notes(1)
    log.write()
    return {"head": log.head}


@vector(34, "a trusted key signed two histories, one of which was kept elsewhere")
def fork_two_signed(home):
    plain(home, key=KEY).keep()
    other = Log(home, key=KEY)
    other.notes(7, "another history")
    other.store()
    other.write()
    return {"keys": [VKEY], "anchors": ["anchors.jsonl"]}


@vector(34, "the other stream goes back behind where the controller said that it stood")
def fork_stream(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    early = {"seq": 2, "hash": json.loads(rank.lines[1])["hash"]}
    log.commit(rank)
    log.add("streams.committed", {"streams": {"rank-1": early}})
    rank.write()
    log.write()
    return {"head": log.head}


# -- 40 ----------------------------------------------------------------------------------------------------------------


def told(home, *records, **options):
    log = Log(home, **options)
    for kind, body in records:
        log.add(kind, body)
    log.write()
    return {"head": log.head}


FREEZE = ("freeze.entered", {"freeze": "f1"})
LEASE = ("update.leased", {"from": 1, "to": 8})
APPLIED = ("update.applied", {"from": 1, "to": 8, "readings": {}})
ALLOWED = ("promotion.decided", {"result": "allow", "weights": digest("w")})


@vector(40, "a call that was denied came back")
def protocol_denied_call(home):
    return told(home, ("tool.decided", {"call": "c1", "result": "deny"}), ("tool.finished", {"call": "c1"}))


@vector(40, "a call came back twice")
def protocol_call_twice(home):
    decided, done = ("tool.decided", {"call": "c1", "result": "allow"}), ("tool.finished", {"call": "c1"})
    return told(home, decided, done, done)


@vector(20, "an allowed call that never ended, and one that was said to be lost two starts later, are no findings")
def unanchored_calls_that_died(home):
    decided = [("tool.decided", {"call": call, "result": "allow"}) for call in ("c1", "c2")]
    told(home, *decided, ("log.opened", {}), ("log.opened", {}), ("tool.lost", {"call": "c1"}))
    return {}


@vector(40, "updates were applied that no lease holds")
def protocol_no_lease(home):
    return told(home, LEASE, ("update.applied", {"from": 8, "to": 9, "readings": {}}))


@vector(40, "a lease ends with a start")
def protocol_lease_of_a_dead_process(home):
    return told(home, LEASE, ("log.opened", {}), APPLIED)


@vector(40, "a lease ends when it is settled")
def protocol_lease_settled(home):
    return told(home, LEASE, ("update.settled", {"from": 1, "to": 8}), APPLIED)


@vector(40, "updates were applied while frozen, under a lease of its own")
def protocol_updates_while_frozen(home):
    return told(home, FREEZE, LEASE, APPLIED)


@vector(40, "data were admitted while frozen")
def protocol_data_while_frozen(home):
    return told(home, FREEZE, ("data.admitted", {"admitted": 3}))


@vector(40, "data were admitted while frozen; that the freeze has no name changes nothing")
def protocol_data_while_frozen_without_a_name(home):
    return told(home, ("freeze.entered", {"freeze": ""}), ("data.admitted", {"admitted": 3}))


@vector(40, "a promotion was applied on a decision of before a freeze")
def protocol_promotion_over_a_freeze(home):
    resume = ("resume.applied", {"freeze": "f1", "by": "dana", "reason": "fine"})
    return told(home, ALLOWED, FREEZE, resume, ("promotion.applied", {"actor": digest("w")}))


@vector(40, "other weights were promoted than the decision allows")
def protocol_other_weights(home):
    return told(home, ALLOWED, ("promotion.applied", {"actor": digest("x")}))


@vector(40, "a resume of another freeze than the one in force")
def protocol_resume_of_another_freeze(home):
    return told(home, FREEZE, ("resume.applied", {"freeze": "f2", "by": "dana", "reason": "fine"}))


@vector(40, "a resume without a reason")
def protocol_resume_without_a_reason(home):
    return told(home, FREEZE, ("resume.applied", {"freeze": "f1", "by": "dana", "reason": ""}))


@vector(40, "what it says of another stream is no head, and leads to no file outside")
def protocol_commitment(home):
    return told(home, ("streams.committed", {"streams": {"../../etc": {"seq": 1, "hash": "0" * 64}}}))


# -- 41 ----------------------------------------------------------------------------------------------------------------


class Person:
    """Somebody with an Ed25519 key, on a security key where they `touch` it; `armor` is how long signatures are."""

    def __init__(self, name, number, *, touch=False, armor=0):
        self.name, self.touch, self.armor = name, touch, armor
        self.private = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
        self.kind = b"sk-ssh-ed25519@openssh.com" if touch else b"ssh-ed25519"
        application = (b"ssh:",) if touch else ()
        self.blob = packed(self.kind, self.private.public_key().public_bytes_raw(), *application)
        self.line = f"{self.kind.decode()} {base64.b64encode(self.blob).decode()} {name}@example"

    def approval(self, statement, *, namespace=b"loopguard-approve@v1", touched=1):
        signed = b"SSHSIG" + packed(namespace, b"", b"sha512", hashlib.sha512(signed_bytes(statement)).digest())
        behind = b""
        if self.touch:
            behind = bytes([touched, 0, 0, 0, 7])
            signed = hashlib.sha256(b"ssh:").digest() + behind + hashlib.sha256(signed).digest()
        proper = packed(self.kind, self.private.sign(signed)) + behind
        blob = b"SSHSIG\0\0\0\1" + packed(self.blob, namespace, b"", b"sha512", proper)
        lines = textwrap.wrap(base64.b64encode(blob).decode(), 70)
        armored = "\n".join(["-----BEGIN SSH SIGNATURE-----", *lines, "-----END SSH SIGNATURE-----", ""])
        armored = armored.ljust(self.armor, "\n")
        fingerprint = base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")
        return {"person": self.name, "key": f"SHA256:{fingerprint}", "signature": armored}


def signed_bytes(statement):
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def packed(*parts):
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


DANA, DANA_TOO, ELI, FAY = Person("dana", 1), Person("dana", 2), Person("eli", 3), Person("fay", 4, touch=True)
STRANGER = Person("mallory", 5)
OLD = Person("gus", 6)
CROWD = [Person(f"person-{number}", number) for number in range(100, 165)]
RULE = {
    "approvals": 2,
    "people": {
        "dana": [DANA.line, f'valid-after="20290101Z",namespaces="git,loopguard-approve@v1" {DANA_TOO.line}'],
        "eli": [ELI.line],
        "fay": [FAY.line],
        "gus": [f'valid-before="20291231235959Z" {OLD.line}'],
    },
    "requester_may_approve": False,
    "within_s": 600,
    "execute_within_s": 60,
}


class Frozen(Log):
    """A run whose guard policy asks two people, frozen; with a loop that waits, or with a command alone."""

    def __init__(self, home, *, loop=True, adopted=False, tripped=None, **rule):
        """Where it is `adopted`, the rule came while the run was frozen. `tripped` is the rule of the freeze."""
        super().__init__(home)
        self.rule = RULE | rule
        asks = {"name": "two", "digest": POLICY, "resume": self.rule}
        self.add("policy.loaded", {"name": "none", "digest": LOOSER} if adopted else asks)
        self.add("run.started" if loop else "note.added", {})
        self.entered = self.add("freeze.entered", {"freeze": "f1"} | ({"rule": tripped} if tripped else {}))
        if adopted:
            self.add(
                "policy.adopted", {"from": LOOSER, "to": POLICY, "change": "tightened", "by": "sam", "reason": "x"}
            )
            self.add("policy.loaded", asks)
        self.notes(1)

    def ask(self, *, by="sam", request="r1", **changes):
        """Somebody asks for a resume; gives what is to be signed."""
        statement = {
            "v": 1,
            "run": "run-a",
            "freeze": self.entered["body"]["freeze"],
            "entered": self.entered["hash"],
            "head_seq": self.seq,
            "head_hash": self.hash,
            "disposition": "rollback",
            "target": "nothing",
            "waives": "nothing",
            "waives_cycles": 0,
            "policy": POLICY,
            "next_policy": POLICY,
            "policy_change": "none",
            "requester": by,
            "reason": "bad shard 17 removed",
            "not_before": stamp(self.now),
            "expires": stamp(self.now + 600),
            "nonce": "0" * 32,
        } | changes
        body = {"request": request, "by": by, "reason": statement["reason"], "freeze": statement["freeze"]}
        self.add("resume.requested", body | {"statement": statement})
        return statement

    def resume(self, statement, approvals, *, kind="resume.applied", **changes):
        """Let it go on, or what else people agreed to, by these approvals."""
        signed = hashlib.sha256(signed_bytes(statement)).hexdigest()
        for number, approval in enumerate(approvals):
            body = {"request": "r1", "approval": f"a{number}", "of": 2, "statement_sha256": signed}
            self.add("approval.given", body | approval)
        body = {"freeze": statement["freeze"], "by": statement["requester"], "reason": statement["reason"]}
        body |= {name: statement.get(name) for name in ("disposition", "waives", "waives_cycles")}
        body |= {"approval": "signed", "statement": statement, "approvals": approvals}
        body |= {"statement_sha256": signed, "judged": stamp(self.now + 1), "execute_before": None}
        self.add(kind, body | changes)

    def end(self):
        self.write()
        return {"head": self.head}


def approved(home, *people, rule=None, statement=None, tripped=None, **changes):
    """A resume with the approvals of these people."""
    log = Frozen(home, tripped=tripped, **rule or {})
    signed = log.ask(**statement or {})
    log.resume(signed, [person.approval(signed) for person in people], **changes)
    return log.end()


@vector(0, "two people approved, one of them with a security key that was touched")
def ok_approved(home):
    return approved(home, DANA, FAY)


@vector(0, "a key with options counts in its time")
def ok_approved_with_options(home):
    return approved(home, DANA_TOO, ELI)


@vector(0, "the run froze under a policy that asks nobody, and people approved under one that was adopted then")
def ok_approved_under_a_rule_adopted_while_frozen(home):
    log = Frozen(home, adopted=True)
    statement = log.ask()
    log.resume(statement, [DANA.approval(statement), ELI.approval(statement)])
    return log.end()


@vector(0, "people agreed to a looser policy, which was then adopted")
def ok_loosened(home):
    log = Frozen(home)
    adopt(log, agreed=True)
    return log.end()


def adopt(log, *, agreed, after=0):
    looser = {"policy_change": "loosened", "next_policy": LOOSER} if agreed else {}
    statement = log.ask(**looser)
    log.resume(statement, [DANA.approval(statement), ELI.approval(statement)])
    log.now += after
    log.add("policy.adopted", {"from": POLICY, "to": LOOSER, "change": "loosened", "by": "sam", "reason": "x"})
    log.add("policy.loaded", {"name": "one", "digest": LOOSER, "resume": log.rule | {"approvals": 1}})


@vector(0, "a command let it go on, and a loop was started in time")
def ok_started_in_time(home):
    log = started(Frozen(home, loop=False), execute_s=60, after_s=59)
    return log.end()


def started(log, *, execute_s, after_s):
    """A resume of the command, and a loop that goes on after it."""
    statement = log.ask()
    approvals = [person.approval(statement) for person in (DANA, ELI)]
    log.resume(statement, approvals, execute_before=stamp(log.now + len(approvals) + 1 + execute_s))
    log.now += after_s - 1
    log.add("run.started", {"goes_on": True})
    log.add("cycle.started", {})
    return log


@vector(0, "a policy asks for approvals from a restart on that came after the freeze")
def ok_rule_after_the_freeze(home):
    log = Frozen(home)
    log.lines, log.tree, log.seq, log.hash = [], Tree(), 0, "0" * 64
    log.add("log.opened", {"pid": 1, "versions": {}})
    log.add("policy.loaded", {"name": "none", "digest": LOOSER})
    log.entered = log.add("freeze.entered", {"freeze": "f1"})
    log.add("log.opened", {"pid": 2, "versions": {}})
    log.add("policy.adopted", {"from": LOOSER, "to": POLICY, "change": "tightened"})
    log.add("policy.loaded", {"name": "two", "digest": POLICY, "resume": RULE})
    log.add("run.started", {"goes_on": True})
    statement = log.ask()
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(0, "another stream holds a resume that was for a start in time, and goes on when that time is long over")
def ok_other_stream_goes_on_later(home):
    log = Frozen(home, loop=False)
    rank = Log(home, stream="rank-1")
    rank.add("policy.loaded", {"name": "two", "digest": POLICY, "resume": RULE})
    rank.add("freeze.entered", {"freeze": "f1"})
    started(log, execute_s=60, after_s=59)
    (resume,) = (json.loads(line) for line in log.lines if b'"resume.applied"' in line)
    rank.now = log.now
    rank.add("run.started", {"goes_on": True})
    rank.add("resume.applied", resume["body"])
    rank.now += 1000
    rank.add("log.opened", {"pid": 2, "versions": {}})
    rank.add("run.started", {"goes_on": True})
    rank.add("cycle.started", {})
    log.commit(rank)
    rank.write()
    return log.end()


@vector(0, "a signature of 8192 characters is not too long")
def ok_long_signature(home):
    return approved(home, Person("dana", 1, armor=8192), ELI)


@vector(41, "a signature of 8193 characters is")
def approval_long_signature(home):
    return approved(home, Person("dana", 1, armor=8193), ELI)


@vector(0, "a resume by 64 people")
def ok_64_approvals(home):
    return approved(home, *CROWD[:64], rule=crowded())


@vector(41, "a resume by 65 people, which is more than one takes")
def approval_65_approvals(home):
    return approved(home, *CROWD, rule=crowded())


@vector(41, "a rule that asks for 65 approvals is one that nobody satisfies")
def approval_rule_of_65(home):
    return approved(home, *CROWD, rule=crowded(approvals=65))


def crowded(**changes):
    return {"people": {person.name: [person.line] for person in CROWD}} | changes


@vector(0, "a person without a key takes nothing away")
def ok_rule_without_a_key(home):
    return approved(home, DANA, ELI, rule={"people": RULE["people"] | {"ivy": []}})


@vector(41, "the keys of a person are no list, so that the rule is one that nobody satisfies")
def approval_rule_of_a_text(home):
    return approved(home, DANA, ELI, rule={"people": RULE["people"] | {"ivy": "ssh-ed25519 AAAA"}})


@vector(41, "a statement has a member more than it should")
def approval_statement_member(home):
    return approved(home, DANA, ELI, statement={"more": 1})


@vector(41, "a statement says that it is of version true")
def approval_statement_version(home):
    return approved(home, DANA, ELI, statement={"v": True})


@vector(0, "a statement with a reason of 8192 characters, as long as one may be")
def ok_statement_long_reason(home):
    return approved(home, DANA, ELI, statement={"reason": "x" * 8192})


@vector(41, "a statement with a reason of 8193 characters")
def approval_statement_long_reason(home):
    return approved(home, DANA, ELI, statement={"reason": "x" * 8193})


@vector(41, "a statement without a reason")
def approval_statement_without_a_reason(home):
    return approved(home, DANA, ELI, statement={"reason": ""})


@vector(41, "a time of a statement is none, though it is spelled as one")
def approval_statement_time(home):
    return approved(home, DANA, ELI, statement={"expires": "2030-02-30T00:00:00.000000Z"})


@vector(41, "a request that cannot be read takes nothing away from the one that waits, and lets nobody go on")
def approval_not_asked_for_in_full(home):
    log = Frozen(home)
    statement = log.ask(nonce="1" * 31)
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(0, "a request that cannot be read takes nothing away from the one that waits")
def ok_beside_a_request_that_cannot_be_read(home):
    log = Frozen(home)
    statement = log.ask()
    log.ask(request="r2", nonce="1" * 31)
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "the command let it go on as if a loop had been there to do so")
def approval_no_loop_was_there(home):
    log = Frozen(home, loop=False)
    statement = log.ask()
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "a loop was there, and the log was opened anew since")
def approval_no_loop_was_there_any_more(home):
    log = Frozen(home)
    log.add("log.opened", {"pid": 2, "versions": {}})
    statement = log.ask()
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "the resume gives itself more time for a start than the policy does")
def approval_start_too_late_allowed(home):
    return started(Frozen(home), execute_s=61, after_s=2).end()


@vector(41, "until when the run has to be started is no time")
def approval_start_before_nothing(home):
    return approved(home, DANA, ELI, execute_before="~")


@vector(41, "the run went on, and no loop was started since the resume")
def approval_went_on_without_a_start(home):
    log = Frozen(home, loop=False)
    statement = log.ask()
    approvals = [person.approval(statement) for person in (DANA, ELI)]
    log.resume(statement, approvals, execute_before=stamp(log.now + 60))
    log.add("cycle.started", {})
    return log.end()


@vector(41, "an approval was counted for a request that a freeze had ended")
def approval_given_after_a_new_trip(home):
    log = Frozen(home)
    statement = log.ask()
    log.add("freeze.requested", {"by": "eli", "reason": "no", "request": "r2", "freeze": None})
    body = {"request": "r1", "approval": "a1", "of": 2}
    body["statement_sha256"] = hashlib.sha256(signed_bytes(statement)).hexdigest()
    log.add("approval.given", body | DANA.approval(statement))
    return log.end()


@vector(41, "an approval was counted with a key that had run out, and its signature is over something else")
def approval_counted_with_other_bytes(home):
    log = Frozen(home)
    statement = log.ask()
    body = {"request": "r1", "approval": "a1", "of": 2}
    body["statement_sha256"] = hashlib.sha256(signed_bytes(statement)).hexdigest()
    log.add("approval.given", body | OLD.approval(statement | {"nonce": "1" * 32}))
    return log.end()


@vector(41, "nobody approved, where two people have to")
def approval_none(home):
    log = Frozen(home)
    log.add("resume.applied", {"freeze": "f1", "by": "dana", "reason": "trust me", "approval": "none"})
    return log.end()


@vector(41, "one person approved, where two have to")
def approval_too_few(home):
    return approved(home, DANA)


@vector(41, "one person approved with two keys")
def approval_same_person(home):
    return approved(home, DANA, DANA_TOO)


@vector(41, "whoever asks approved as well")
def approval_requester(home):
    return approved(home, DANA, ELI, statement={"by": "eli"})


@vector(0, "whoever asks may approve where the policy says so")
def ok_requester_may_approve(home):
    return approved(home, DANA, ELI, statement={"by": "eli"}, rule={"requester_may_approve": True})


@vector(41, "one key is nobody's")
def approval_stranger(home):
    return approved(home, DANA, STRANGER)


@vector(41, "one key did not count any more")
def approval_key_expired(home):
    return approved(home, DANA, OLD)


@vector(41, "one signature is for another purpose")
def approval_namespace(home):
    log = Frozen(home)
    statement = log.ask()
    log.resume(statement, [DANA.approval(statement), ELI.approval(statement, namespace=b"git")])
    return log.end()


@vector(41, "a security key was not touched")
def approval_untouched(home):
    log = Frozen(home)
    statement = log.ask()
    log.resume(statement, [DANA.approval(statement), FAY.approval(statement, touched=0)])
    return log.end()


@vector(41, "they signed for another snapshot than the statement names")
def approval_other_bytes(home):
    log = Frozen(home)
    statement = log.ask()
    given = [person.approval(statement) for person in (DANA, ELI)]
    log.resume(statement | {"target": digest("s")}, given)
    return log.end()


@vector(41, "the resume is in another name than its statement")
def approval_other_name(home):
    return approved(home, DANA, ELI, by="mallory")


@vector(41, "the record names another person than the one who signed")
def approval_other_person(home):
    log = Frozen(home)
    statement = log.ask()
    given = [person.approval(statement) for person in (DANA, ELI)]
    log.resume(statement, [given[0], given[1] | {"person": "fay"}])
    return log.end()


@vector(41, "an approval was counted that is of nobody, and two others let the run go on")
def approval_counted_of_a_stranger(home):
    log = Frozen(home)
    statement = log.ask()
    signed = hashlib.sha256(signed_bytes(statement)).hexdigest()
    body = {"request": "r1", "approval": "a9", "of": 2, "statement_sha256": signed}
    log.add("approval.given", body | STRANGER.approval(statement))
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "it was judged before the records that led to it")
def approval_judged_early(home):
    return approved(home, DANA, ELI, judged=stamp(1))


@vector(41, "its time was over")
def approval_expired(home):
    log = Frozen(home)
    statement = log.ask()
    log.now += 600
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "it gives itself more time than the policy does")
def approval_too_long(home):
    return approved(home, DANA, ELI, statement={"expires": stamp(10_000)})


@vector(41, "it was made from another log")
def approval_other_head(home):
    return approved(home, DANA, ELI, statement={"head_hash": digest("x")})


@vector(41, "it is about another policy than the one in force")
def approval_other_policy(home):
    return approved(home, DANA, ELI, statement={"policy": LOOSER, "next_policy": LOOSER})


@vector(41, "nobody asked for it in this log")
def approval_not_asked(home):
    log = Frozen(home)
    statement = log.ask()
    statement |= {"reason": "another reason"}
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "the request was refused before")
def approval_refused(home):
    log = Frozen(home)
    statement = log.ask()
    log.add("approval.refused", {"request": "r1", "approval": None, "code": "target"})
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "somebody asked for a freeze in between")
def approval_new_trip(home):
    log = Frozen(home)
    statement = log.ask()
    log.add("freeze.requested", {"by": "eli", "reason": "no", "request": "r2", "freeze": None})
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "the clock went back by more than a second while it waited")
def approval_clock(home):
    log = Frozen(home)
    statement = log.ask()
    log.now -= 5
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)], judged=stamp(log.now + 9))
    return log.end()


@vector(41, "the nonce was used for the freeze before")
def approval_replayed(home):
    log = Frozen(home)
    for freeze in ("f1", "f2"):
        statement = log.ask()
        log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
        if freeze == "f1":
            log.entered = log.add("freeze.entered", {"freeze": "f2"})
    return log.end()


@vector(41, "a policy has another rule about resumes than before under the same digest")
def approval_rule_changed(home):
    log = Frozen(home)
    log.add("policy.loaded", {"name": "two", "digest": POLICY, "resume": RULE | {"approvals": 1}})
    return log.end()


@vector(41, "a rule that cannot be read is one that nobody satisfies")
def approval_rule_unreadable(home):
    return approved(home, DANA, ELI, rule={"approvals": "two"})


@vector(41, "the policy became another one, and nobody adopted it")
def approval_not_adopted(home):
    log = Frozen(home)
    log.add("policy.loaded", {"name": "two", "digest": LOOSER, "resume": RULE})
    return log.end()


@vector(41, "a policy was adopted as a tightened one, and asks for less")
def approval_asks_less(home):
    log = Frozen(home)
    log.add("policy.adopted", {"from": POLICY, "to": LOOSER, "change": "tightened"})
    log.add("policy.loaded", {"name": "none", "digest": LOOSER})
    return log.end()


@vector(41, "a looser policy was adopted, and people agreed to a resume and not to that")
def approval_loosened(home):
    log = Frozen(home)
    adopt(log, agreed=False)
    return log.end()


@vector(41, "people agreed to a looser policy, and it was adopted too late")
def approval_loosened_late(home):
    log = Frozen(home)
    adopt(log, agreed=True, after=100)
    return log.end()


@vector(41, "the run was started later than people had agreed to, and went on")
def approval_started_late(home):
    return started(Frozen(home, loop=False), execute_s=60, after_s=61).end()


# -- what becomes of the frozen cycle ----------------------------------------------------------------------------------

HALT = {"freeze": "f1", "by": "dana", "reason": "not worth it", "because": "decision", "approval": "none"}
HALTED = ("run.halted", HALT | {"disposition": "halt", "waives": "nothing", "waives_cycles": 0})
RESUMED = ("resume.applied", {"freeze": "f1", "by": "dana", "reason": "fine", "approval": "none"})
BY_BUDGET = {"freeze": "f1", "by": "loopguard", "reason": "four freezes; the guard policy allows three"}


@vector(0, "a frozen run was halted by a person")
def ok_halted(home):
    return told(home, FREEZE, HALTED)


@vector(0, "a run that was halted froze once more, which lets nothing go on")
def ok_frozen_after_a_halt(home):
    return told(home, FREEZE, HALTED, ("freeze.entered", {"freeze": "f2"}))


@vector(40, "a halt where nothing was frozen")
def protocol_halt_of_no_freeze(home):
    return told(home, HALTED)


@vector(40, "a halt without a name")
def protocol_halt_without_a_name(home):
    return told(home, FREEZE, ("run.halted", HALT | {"by": ""}))


@vector(40, "a run went on that had been halted")
def protocol_resume_after_a_halt(home):
    return told(home, FREEZE, HALTED, RESUMED)


@vector(40, "a run that had been halted froze once more, and went on from there")
def protocol_resume_of_a_freeze_after_a_halt(home):
    later = ("resume.applied", RESUMED[1] | {"freeze": "f2"})
    return told(home, FREEZE, HALTED, ("freeze.entered", {"freeze": "f2"}), later)


@vector(40, "updates were applied after a halt")
def protocol_updates_after_a_halt(home):
    return told(home, FREEZE, HALTED, LEASE, APPLIED)


@vector(41, "a run was halted, and nobody approved, where two people have to")
def approval_halt_none(home):
    log = Frozen(home)
    log.add(*HALTED)
    return log.end()


@vector(0, "the guard policy halted the run, which takes nobody's approval")
def ok_halted_by_the_budget(home):
    log = Frozen(home)
    log.add("run.halted", BY_BUDGET | {"because": "budget"})
    return log.end()


def decided(home, disposition, *, kind="resume.applied", loop=True, **changes):
    """What two people agreed to, done by a record of some kind."""
    log = Frozen(home, loop=loop)
    statement = log.ask(disposition=disposition)
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)], kind=kind, **changes)
    return log


@vector(0, "two people agreed to a halt, and no loop was there, which it has no use for")
def ok_halted_by_people(home):
    return decided(home, "halt", kind="run.halted", loop=False, because="decision").end()


@vector(41, "two people agreed to a halt, and the run went on")
def approval_went_on_instead_of_a_halt(home):
    return decided(home, "halt").end()


@vector(41, "two people agreed that the run goes on, and it was halted")
def approval_halted_instead_of_a_resume(home):
    return decided(home, "rollback", kind="run.halted", because="decision").end()


@vector(41, "a resume was asked for, approved and applied after a halt")
def approval_resume_after_a_halt(home):
    log = decided(home, "halt", kind="run.halted", because="decision")
    statement = log.ask(request="r1", nonce="1" * 32)
    log.resume(statement, [person.approval(statement) for person in (DANA, ELI)])
    return log.end()


@vector(41, "the record says another disposition than people signed")
def approval_other_disposition(home):
    return approved(home, DANA, ELI, disposition="accept")


@vector(41, "there is no such disposition")
def approval_no_disposition(home):
    return approved(home, DANA, ELI, statement={"disposition": "retry"})


def waived(home, rule, cycles, disposition="discard", **changes):
    """A resume after a freeze by `jump`, with a waiver."""
    way = {"disposition": disposition, "waives": rule, "waives_cycles": cycles}
    return approved(home, DANA, ELI, tripped="jump", statement=way, **changes)


@vector(0, "the cycle is passed over, and the rule that tripped is waived")
def ok_discarded_with_a_waiver(home):
    return waived(home, "jump", 2)


@vector(0, "the state at the freeze is accepted, and the rule that tripped is waived")
def ok_accepted_with_a_waiver(home):
    return waived(home, "jump", 1, "accept")


@vector(41, "another rule than the one that tripped is waived")
def approval_waives_another_rule(home):
    return waived(home, "drift", 2)


@vector(41, "a rule is waived for no cycle")
def approval_waives_without_cycles(home):
    return waived(home, "jump", 0)


@vector(41, "nothing is waived, for three cycles")
def approval_waives_nothing_for_cycles(home):
    return waived(home, "nothing", 3)


@vector(41, "the record waives more cycles than people signed")
def approval_waives_more(home):
    return waived(home, "jump", 1, waives_cycles=9)


@vector(41, "it was judged at a time that is none, though it is spelled as one")
def approval_judged_at_no_time(home):
    return approved(home, DANA, ELI, judged="2030-02-30T00:00:00.000000Z")


@vector(41, "where nobody has to approve, a resume names a time for the start that is none, and the run just went on")
def approval_empty_execute_before(home):
    resumed = ("resume.applied", RESUMED[1] | {"execute_before": ""})
    return told(home, FREEZE, resumed, ("run.started", {}), ("cycle.started", {}))


# -- 42, 50 and 2 ------------------------------------------------------------------------------------------------------


@vector(42, "there is no log")
def missing_log(home):
    (home / "run").mkdir()
    (home / "run" / "run.json").write_text('{"id": "run-a"}')
    return {}


@vector(42, "there is a segment, and no record in it")
def missing_records(home):
    Log(home).write([])
    return {}


@vector(42, "the policy that the records were decided under is not there")
def missing_policy(home):
    log = plain(home)
    (log.run_dir / "policy" / f"{POLICY}.yaml").unlink()
    log.write()
    return {"head": log.head}


@vector(42, "a policy is not named by a digest, and leads to no file outside")
def missing_policy_digest(home):
    log = plain(home, policy="../../run")
    log.write()
    return {"head": log.head}


@vector(42, "a stream is gone that the controller committed to")
def missing_stream(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    rank.folder.rmdir()
    log.commit(rank)
    log.write()
    return {"head": log.head}


@vector(50, "a record is of a later format")
def unreadable_format(home):
    return tampered(home, lambda lines: [*lines[:2], hashed(lines[2], v=2), *lines[3:]])


@vector(50, "what should be a segment is a folder")
def unreadable_segment(home):
    folder = Log(home).folder / "seg-000000000001.jsonl"
    folder.mkdir()
    (folder / "empty").write_text("")
    return {}


@vector(50, "unreadable wins over a break")
def unreadable_behind_a_break(home):
    return tampered(home, lambda lines: [lines[0], *lines[2:4], hashed(lines[4], v=2)])


@vector(30, "of two streams with a break, the controller's names the class")
def tamper_in_both_streams(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    log.commit(rank)
    rank.write(rank.lines[:-1])
    log.write([*log.lines[:2], *log.lines[3:]])
    return {"head": log.head}


@vector(2, "the head is none")
def usage_head(home):
    plain(home).write()
    return {"head": "latest"}


@vector(2, "the key is none")
def usage_key(home):
    plain(home).write()
    return {"keys": [VKEY[:-3]]}


@vector(2, "what was kept is of another run")
def usage_anchor_of_another_run(home):
    plain(home, run="run-b").keep()
    plain(home).write()
    return {"anchors": ["anchors.jsonl"]}


@vector(0, "a crash cut a line of what was kept, and the next one stands behind it")
def ok_kept_beside_a_cut_line(home):
    log = plain(home)
    log.keep()
    whole = (home / "anchors.jsonl").read_text()
    (home / "anchors.jsonl").write_text(whole[:-20] + "\n" + whole + whole[:50])
    log.write()
    return {"anchors": ["anchors.jsonl"]}


@vector(2, "all that was kept was cut")
def usage_cut_line(home):
    log = plain(home)
    log.keep()
    whole = (home / "anchors.jsonl").read_text()
    (home / "anchors.jsonl").write_text(whole[:-3])
    log.write()
    return {"anchors": ["anchors.jsonl"]}


@vector(2, "a line of what was kept is damaged, which no crash does")
def usage_damaged_line(home):
    log = plain(home)
    log.keep()
    whole = (home / "anchors.jsonl").read_text()
    (home / "anchors.jsonl").write_text(whole.replace("\\n", "\\x", 1) + whole)
    log.write()
    return {"anchors": ["anchors.jsonl"]}


@vector(2, "a number of digits beyond all counting is no head")
def usage_head_of_many_digits(home):
    log = plain(home)
    log.write()
    return {"head": f"{'1' * 5000}:{log.hash}"}


@vector(2, "a kept checkpoint was cut")
def usage_cut_anchor(home):
    log = plain(home)
    log.keep(log.checkpoint()[:-3])
    log.write()
    return {"anchors": ["anchors.jsonl"]}


@vector(2, "what lies beside the log proves nothing about it")
def usage_anchor_beside_the_log(home):
    log = plain(home)
    log.store()
    log.write()
    return {"anchors": ["run/audit/controller/checkpoints"]}


# -- compressed segments, and a front that is gone ---------------------------------------------------------------------


def zipped(data):
    """One gzip member whose bytes no version of zlib decides about: nothing in it is compressed."""
    parts = [data[at : at + 60_000] for at in range(0, len(data), 60_000)] or [b""]
    blocks = b"".join(struct.pack("<BHH", part is parts[-1], len(part), len(part) ^ 0xFFFF) + part for part in parts)
    return b"\x1f\x8b\x08" + b"\0" * 6 + b"\x03" + blocks + struct.pack("<II", zlib.crc32(data), len(data))


def in_two_segments(home, change=lambda data: data, *, last=False):
    """Five records compressed, three raw; or with `last` all of them compressed."""
    log = plain(home, notes=7)
    path = log.write(log.lines[:5])
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(change(zipped(b"".join(log.lines[:5]))))
    path = log.write(log.lines[5:], first=6)
    if last:
        path.unlink()
        path.with_name(f"{path.name}.gz").write_bytes(zipped(b"".join(log.lines[5:])))
    return {"head": log.head}


@vector(0, "a closed segment is compressed")
def ok_compressed(home):
    return in_two_segments(home)


@vector(0, "all segments are compressed")
def ok_all_compressed(home):
    return in_two_segments(home, last=True)


@vector(0, "a segment is there in both forms: the raw one counts, whatever the other holds")
def ok_in_both_forms(home):
    log = plain(home)
    path = log.write()
    path.with_name(f"{path.name}.gz").write_bytes(b"half of one")
    return {"head": log.head}


@vector(30, "a compressed segment ends in the middle")
def tamper_gzip_cut(home):
    return in_two_segments(home, lambda data: data[: len(data) // 2])


@vector(30, "a compressed segment has another checksum than its bytes")
def tamper_gzip_sum(home):
    return in_two_segments(home, lambda data: data[:-8] + bytes(4) + data[-4:])


@vector(30, "something stands behind a compressed segment")
def tamper_gzip_behind(home):
    return in_two_segments(home, lambda data: data + b"\0")


@vector(30, "a compressed segment has a second, empty member")
def tamper_gzip_members(home):
    return in_two_segments(home, lambda data: data + zipped(b"x")[:10] + b"\x03\0" + bytes(8))


@vector(30, "what is called compressed is raw")
def tamper_gzip_raw(home):
    return in_two_segments(home, lambda data: b"{}\n")


@vector(30, "the last line of a compressed segment is cut: it was closed, so that no crash did that")
def tamper_gzip_cut_line(home):
    log = plain(home)
    path = log.write()
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(zipped(b"".join(log.lines)[:-40]))
    return {}


@vector(30, "a compressed segment has no byte in it")
def tamper_gzip_nothing(home):
    return in_two_segments(home, lambda data: b"")


@vector(30, "a compressed segment that is not the last has no record in it")
def tamper_gzip_empty(home):
    return in_two_segments(home, lambda data: zipped(b""))


@vector(42, "there is a compressed segment, and no record in it")
def missing_records_compressed(home):
    path = Log(home).write([])
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(zipped(b""))
    return {}


@vector(50, "a compressed segment is damaged, and a record behind it is of a later format")
def unreadable_behind_a_damaged_segment(home):
    given = in_two_segments(home, lambda data: data[:-4])
    path = home / "run/audit/controller/seg-000000000006.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], hashed(lines[-1], v=2)]))
    return given


def state(**changes):
    nothing = {"calls": [], "orphans": [], "lease": None, "promotion": None, "policy": None, "key": "", "freezes": 0}
    return nothing | changes


def pruning(log, through, **changes):
    """The body of a record that removes everything up to another one."""
    tree, gone = Tree(), log.lines[:through]
    for line in gone:
        tree = tree.grown(bytes.fromhex(json.loads(line)["hash"]))
    last, raw = json.loads(gone[-1]), b"".join(gone)
    body = {"from": 1, "through": through, "hash": last["hash"], "epoch": last["epoch"]}
    body |= {"edge": [node.hex() for node in tree.edge], "digest": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    body |= {"segments": ["seg-000000000001.jsonl"], "torn": [], "since": stamp(1), "until": last["ts"]}
    return body | {"before": stamp(99), "state": state(), "by": "dana", "reason": "retention"} | changes


def pruned(home, log, through, *, record=None, beside=None, **changes):
    """Remove a front, and say so: in the chain, and beside it unless `beside` says otherwise."""
    log.add("log.pruned", pruning(log, through, **changes) if record is None else record)
    (log.folder / "pruned.json").write_bytes(log.lines[-1] if beside is None else beside)
    log.notes(2, "later")
    log.write(log.lines[through:], first=through + 1)
    return {"head": log.head}


@vector(10, "the front was pruned: the record and its copy agree, and the head was noted down")
def warn_pruned(home):
    return pruned(home, plain(home, notes=9), 5)


@vector(20, "the front was pruned, and nothing proves the tail")
def unanchored_pruned(home):
    pruned(home, plain(home, notes=9), 5)
    return {}


@vector(20, "a head from below the cut cannot be compared")
def unanchored_pruned_below(home):
    log = plain(home, notes=3)
    head = log.head
    log.notes(6)
    pruned(home, log, 5)
    return {"head": head}


@vector(20, "a hash that no record has may have been that of one that was pruned")
def unanchored_pruned_hash(home):
    log = plain(home, notes=3)
    head = log.hash
    log.notes(6)
    pruned(home, log, 5)
    return {"head": head}


@vector(32, "at the cut another hash was noted down")
def replaced_at_the_cut(home):
    pruned(home, plain(home, notes=9), 5)
    return {"head": f"5:{digest('another')}"}


@vector(10, "signed to the end and kept, by the key that an opening named which was pruned; roots go on from the edge")
def warn_pruned_signed(home):
    log = plain(home, notes=9, key=KEY)
    log.store()
    log.add("log.pruned", pruning(log, 5, state=state(key=VKEY)))
    (log.folder / "pruned.json").write_bytes(log.lines[-1])
    log.store()
    log.keep()
    log.write(log.lines[5:], first=6)
    return {"keys": [VKEY], "anchors": ["anchors.jsonl"]}


@vector(10, "what was under way at the cut goes on: a call ends, a lease is used, a promotion is applied")
def warn_pruned_under_way(home):
    log = plain(home, notes=4)
    weights = digest("weights")
    under_way = state(calls=["c1"], lease={"from": 1, "to": 9}, promotion=weights, freezes=3)
    log.add("tool.finished", {"call": "c1", "status": "ok"})
    log.add("update.leased", {"from": 10, "to": 12})
    log.add("update.applied", {"from": 8, "to": 11, "readings": {}})
    log.add("promotion.applied", {"actor": weights})
    return pruned(home, log, 5, state=under_way)


@vector(40, "what was not under way at the cut is judged as ever")
def protocol_pruned(home):
    log = plain(home, notes=4)
    log.add("tool.finished", {"call": "c1", "status": "ok"})
    return pruned(home, log, 5, state=state(calls=["c2"]))


@vector(41, "the rule that was in force at the cut asks for approvals that a resume behind it lacks")
def approval_pruned(home):
    log = plain(home, notes=4)
    people = {"dana": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f dana"]}
    rule = {"approvals": 1, "people": people, "requester_may_approve": False, "within_s": 60, "execute_within_s": 60}
    log.add("freeze.entered", {"freeze": "f1", "reason": "r"})
    log.add("resume.applied", {"freeze": "f1", "by": "eve", "reason": "r", "approval": "none"})
    return pruned(home, log, 5, state=state(policy={"name": "a", "digest": POLICY, "resume": rule}))


@vector(10, "a front was pruned again: the last record stands for all that is gone")
def warn_pruned_twice(home):
    log = plain(home, notes=9)
    log.add("log.pruned", pruning(log, 3))
    log.notes(2)
    return pruned(home, log, 7, **{"from": 4})


@vector(0, "a pruning was recorded, and a crash came before it was carried out: all is still there")
def ok_pruning_not_carried_out(home):
    log = plain(home, notes=9)
    log.add("log.pruned", pruning(log, 5))
    log.write(log.lines[:5])
    log.write(log.lines[5:], first=6)
    return {"head": log.head}


@vector(10, "a crash left files of what was pruned: they are not looked at")
def warn_pruned_with_its_files(home):
    log = plain(home, notes=9)
    log.write([b"what is left of it\n"])
    return pruned(home, log, 5)


@vector(30, "the front is gone, and nothing says why")
def tamper_front_gone(home):
    log = plain(home, notes=9)
    log.write(log.lines[5:], first=6)
    return {"head": log.head}


@vector(30, "the front is gone; a record says why, and its copy is not there")
def tamper_pruned_without_its_copy(home):
    found = pruned(home, plain(home, notes=9), 5)
    (home / "run/audit/controller/pruned.json").unlink()
    return found


@vector(30, "somebody wrote pruned.json, and no record says so")
def tamper_pruned_without_its_record(home):
    log = plain(home, notes=9)
    forged = Log(home)
    forged.seq, forged.hash = log.seq, log.hash
    forged.add("log.pruned", pruning(log, 5))
    (log.folder / "pruned.json").write_bytes(forged.lines[-1])
    log.write(log.lines[5:], first=6)
    return {"head": log.head}


@vector(30, "pruned.json is another record than the one in the log")
def tamper_pruned_copy_differs(home):
    log = plain(home, notes=9)
    found = pruned(home, log, 5)
    fields = json.loads((log.folder / "pruned.json").read_bytes())
    del fields["hash"]
    fields["body"]["by"] = "eve"
    (log.folder / "pruned.json").write_bytes(encode(fields)[0])
    return found


@vector(30, "pruned.json is no record")
def tamper_pruned_copy_unreadable(home):
    return pruned(home, plain(home, notes=9), 5, beside=b"{}\n")


@vector(30, "pruned.json lacks its newline")
def tamper_pruned_copy_cut(home):
    log = plain(home, notes=9)
    found = pruned(home, log, 5)
    (log.folder / "pruned.json").write_bytes((log.folder / "pruned.json").read_bytes()[:-1])
    return found


@vector(30, "a record behind the cut is gone as well")
def tamper_pruned_and_more(home):
    log = plain(home, notes=9)
    pruned(home, log, 5)
    (log.folder / "seg-000000000006.jsonl").unlink()
    log.write(log.lines[6:], first=7)
    return {"head": log.head}


@vector(32, "the edge at the cut is not that of the log: the first checkpoint behind it has another root")
def replaced_edge(home):
    log = plain(home, notes=9)
    log.store()
    return pruned(home, log, 5, edge=[digest("a"), digest("b")])


@vector(31, "the tail of a pruned log was cut")
def truncated_pruned(home):
    log = plain(home, notes=9)
    found = pruned(home, log, 5)
    log.write(log.lines[5:-1], first=6)
    return found


@vector(20, "a thief pruned a log that was kept elsewhere: what he appended is not covered")
def unanchored_pruned_by_a_thief(home):
    log = plain(home, notes=9, key=KEY)
    log.store()
    log.keep()
    pruned(home, log, 5, state=state(key=VKEY), by="eve")
    return {"keys": [VKEY], "anchors": ["anchors.jsonl"]}


@vector(40, "a record about pruned records that does not say which")
def protocol_pruned_nothing(home):
    log = plain(home)
    log.add("log.pruned", {"by": "dana"})
    log.write()
    return {"head": log.head}


@vector(10, "another stream was pruned: what the controller says of its records below the cut is not compared")
def warn_another_stream_pruned(home):
    rank, log = plain(home, stream="rank-1", notes=9), plain(home)
    heads = {"rank-1": {"seq": 3, "hash": json.loads(rank.lines[2])["hash"]}}
    log.add("streams.committed", {"streams": heads})
    pruned(home, rank, 5)
    log.commit(rank)
    log.write()
    return {"head": log.head}


@vector(32, "another stream was pruned, and its last record that is gone is not the one that the controller names")
def replaced_at_the_cut_of_another_stream(home):
    rank, log = plain(home, stream="rank-1", notes=9), plain(home)
    log.add("streams.committed", {"streams": {"rank-1": {"seq": 5, "hash": digest("another")}}})
    pruned(home, rank, 5)
    log.write()
    return {"head": log.head}


@vector(34, "another stream was pruned, and the controller goes back to a record of it that is gone")
def fork_behind_the_cut_of_another_stream(home):
    return back_behind_a_cut(home, 8, 3)


@vector(34, "the controller goes back from one record to another that are both gone")
def fork_below_the_cut_of_another_stream(home):
    return back_behind_a_cut(home, 4, 3)


def back_behind_a_cut(home, *stands):
    rank, log = plain(home, stream="rank-1", notes=9), plain(home)
    for seq in stands:
        head = {"seq": seq, "hash": json.loads(rank.lines[seq - 1])["hash"]}
        log.add("streams.committed", {"streams": {"rank-1": head}})
    pruned(home, rank, 5)
    log.write()
    return {"head": log.head}


@vector(42, "by its pruned.json there is nothing left of another stream, which the controller committed to")
def missing_stream_pruned_to_its_end(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    log.commit(rank)
    rank.write()
    rank.add("log.pruned", pruning(rank, 6))
    (rank.folder / "pruned.json").write_bytes(rank.lines[-1])
    log.write()
    return {"head": log.head}


@vector(30, "pruned.json says that more is gone than there is")
def tamper_pruned_to_its_end(home):
    log = plain(home)
    log.write()
    log.add("log.pruned", pruning(log, 6))
    (log.folder / "pruned.json").write_bytes(log.lines[-1])
    return {}


@vector(10, "a note stands for the records that are gone, of a run without run.json: pruned.json says whose log it is")
def warn_pruned_with_a_note_at_the_cut(home):
    log = plain(home, notes=4)
    log.store()
    log.notes(5)
    (log.run_dir / "run.json").unlink()
    return pruned(home, log, 5)


@vector(32, "a note at the cut stands for other records than are gone")
def replaced_note_at_the_cut(home):
    other = Log(home)
    other.notes(4, "another history")
    other.store()
    return pruned(home, plain(home, notes=9), 5)


@vector(31, "a note behind the cut stands for more records than there are")
def truncated_note_pruned(home):
    log = plain(home, notes=9)
    found = pruned(home, log, 5)
    log.store()
    log.write(log.lines[5:-1], first=6)
    return {"head": found["head"]}


@vector(32, "the log is another one than a head says, and pruned.json is damaged, which is found at the end")
def replaced_and_pruned_copy_unreadable(home):
    log = plain(home)
    (log.folder / "pruned.json").write_bytes(b"{}\n")
    log.write()
    return {"head": f"3:{digest('another')}"}


@vector(30, "another stream lacks records that the controller names, and its pruned.json is damaged, which comes first")
def tamper_pruned_copy_of_a_cut_stream(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    log.commit(rank)
    rank.write(rank.lines[:-1])
    (rank.folder / "pruned.json").write_bytes(b"{}\n")
    log.write()
    return {"head": log.head}


@vector(30, "pruned.json is of a later format, which makes it no excuse")
def tamper_pruned_copy_of_a_later_format(home):
    log = plain(home, notes=9)
    found = pruned(home, log, 5)
    copy = log.folder / "pruned.json"
    copy.write_bytes(hashed(copy.read_bytes()[:-1], v=2))
    return found


@vector(40, "what was pruned has a number beyond all counting")
def protocol_pruned_number(home):
    log = plain(home, notes=9)
    log.add("log.pruned", pruning(log, 5, epoch=10**17))
    log.write()
    return {"head": log.head}


@vector(40, "what was pruned has one node too few at its edge")
def protocol_pruned_edge(home):
    log = plain(home, notes=9)
    log.add("log.pruned", pruning(log, 5, edge=[digest("a")]))
    log.write()
    return {"head": log.head}


@vector(34, "behind the cut the epoch is smaller than the largest one before it")
def fork_epoch_at_the_cut(home):
    return pruned(home, plain(home, notes=9), 5, epoch=3)


@vector(41, "a resume behind the cut needs no time to start by, since a loop may have been there; it lacks a person")
def approval_too_few_behind_a_cut(home):
    return frozen_behind_a_cut(home, DANA)


@vector(10, "a resume behind the cut needs no time to start by, since a loop may have been there before the cut")
def warn_approved_behind_a_cut(home):
    return frozen_behind_a_cut(home, DANA, ELI)


def frozen_behind_a_cut(home, *people):
    """The rule and the start are gone; the freeze and what people agreed to are left."""
    log = Frozen(home, loop=False)
    loaded = json.loads(log.lines[1])["body"]
    statement = log.ask()
    log.resume(statement, [person.approval(statement) for person in people])
    return pruned(home, log, 3, state=state(policy=loaded))


# -- payloads that lie apart -------------------------------------------------------------------------------------------


def apart(log, data, *, member="code", **changes):
    """A record with a payload that lies apart, and its blob; gives the path of that."""
    blob = b"loopguard-blob-v1\n" + hashlib.sha256(f"salt {log.seq} {member}".encode()).digest() + data
    commitment = hashlib.sha256(blob).hexdigest()
    path = log.folder / "blobs" / commitment[:2] / commitment
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blob)
    call = {"call": f"c{log.seq}", member: {"commitment": commitment, "bytes": len(data)} | changes}
    kind = "tool.decided" if member in {"code", "stdin"} else "tool.finished"
    log.add(kind, call | ({"result": "deny"} if kind == "tool.decided" else {"status": "ok"}))
    return path


def kept_apart(home, change, **changes):
    """A log with two payloads, to which something is done; those that it gives are said to be erased."""
    log = plain(home)
    first, second = apart(log, b"print('12 Elm Street')", **changes), apart(log, b"", member="stdin")
    for erased in change(log, first, second) or ():
        log.add("blob.erased", {"by": "dana", "reason": "an address", "commitments": [erased.name]})
    log.write()
    return {"head": log.head}


def erased(log, *paths):
    for path in paths:
        path.unlink()
    return paths


@vector(0, "payloads lie apart as they were recorded, one of them empty")
def ok_payloads(home):
    return kept_apart(home, lambda log, first, second: None)


@vector(0, "both streams of a call lie apart")
def ok_payloads_of_both_streams(home):
    log = plain(home)
    call = f"c{log.seq}"
    log.add("tool.decided", {"call": call, "result": "allow"})
    paths = [apart(Scratch(log), data, member=name) for name, data in (("stdout", b"4"), ("stderr", b"trouble"))]
    told = {
        name: {"commitment": path.name, "bytes": path.stat().st_size - 50}
        for name, path in zip(("stdout", "stderr"), paths, strict=True)
    }
    log.add("tool.finished", {"call": call, "status": "ok", **told})
    log.write()
    return {"head": log.head}


@vector(0, "a payload was erased, and a record says so")
def ok_payload_erased(home):
    return kept_apart(home, lambda log, first, second: erased(log, first))


@vector(0, "all payloads were left out, and the reader knows that")
def ok_payloads_left_out(home):
    given = kept_apart(home, lambda log, first, second: None)
    shutil.rmtree(home / "run" / "audit" / "controller" / "blobs")
    return given | {"without_payloads": True}


@vector(0, "a blob that no record names is nobody's: a call was about to be recorded")
def ok_payload_without_a_record(home):
    return kept_apart(home, lambda log, first, second: apart(Scratch(log), b"x") and None)


@vector(10, "a payload is there, and a record says that it was erased")
def warn_payload_erased_and_there(home):
    return kept_apart(home, lambda log, first, second: [first])


@vector(10, "a payload is there that was erased, which is seen also where the others were left out")
def warn_payload_erased_and_there_left_out(home):
    return kept_apart(home, lambda log, first, second: [first]) | {"without_payloads": True}


@vector(30, "a payload was changed")
def tamper_payload(home):
    return kept_apart(home, lambda log, first, second: first.write_bytes(first.read_bytes()[:-1] + b"!") and None)


@vector(30, "a payload was exchanged for another one of the same log")
def tamper_payload_exchanged(home):
    return kept_apart(home, lambda log, first, second: second.write_bytes(first.read_bytes()) and None)


@vector(30, "a folder stands in the place of a payload")
def tamper_payload_folder(home):
    def change(log, first, second):
        first.unlink()
        first.mkdir()
        (first / "empty").write_text("")

    return kept_apart(home, change)


@vector(40, "the size of a payload is another one than its record says")
def protocol_payload_size(home):
    return kept_apart(home, lambda log, first, second: None, bytes=3)


@vector(40, "what stands for a payload is no commitment, and leads to no file outside")
def protocol_payload_commitment(home):
    return kept_apart(home, lambda log, first, second: None, commitment="../../../run.json")


@vector(40, "what stands for a payload has a member too many")
def protocol_payload_members(home):
    return kept_apart(home, lambda log, first, second: None, text="print(1)")


@vector(40, "a blob has its commitment for its SHA-256, and does not begin as blobs do")
def protocol_payload_beginning(home):
    log = plain(home)
    blob = b"loopguard-blob-v2\n" + bytes(32) + b"print(1)"
    path = log.folder / "blobs" / hashlib.sha256(blob).hexdigest()[:2] / hashlib.sha256(blob).hexdigest()
    path.parent.mkdir(parents=True)
    path.write_bytes(blob)
    log.add("tool.decided", {"call": "c", "result": "deny", "code": {"commitment": path.name, "bytes": 8}})
    log.write()
    return {"head": log.head}


@vector(40, "payloads were erased without a reason")
def protocol_payload_erased_without_a_reason(home):
    log = plain(home)
    path = apart(log, b"x")
    path.unlink()
    log.add("blob.erased", {"by": "dana", "commitments": [path.name]})
    log.write()
    return {"head": log.head}


@vector(42, "a payload is gone, and no record says that it was erased")
def missing_payload(home):
    return kept_apart(home, lambda log, first, second: first.unlink())


@vector(42, "all payloads are gone")
def missing_payloads(home):
    given = kept_apart(home, lambda log, first, second: None)
    shutil.rmtree(home / "run" / "audit" / "controller" / "blobs")
    return given


@vector(42, "a payload is gone, and another one was erased")
def missing_payload_beside_an_erased_one(home):
    return kept_apart(home, lambda log, first, second: (first.unlink(), erased(log, second))[1])


@vector(42, "a payload is gone that only another stream says was erased")
def missing_payload_erased_in_another_stream(home):
    rank, log = plain(home, stream="rank-1"), plain(home)
    path = apart(rank, b"x")
    path.unlink()
    log.add("blob.erased", {"by": "dana", "reason": "r", "commitments": [path.name]})
    log.commit(rank)
    rank.write()
    log.write()
    return {"head": log.head}


@vector(42, "a payload is gone, and the record that it was erased stands before the one that names it")
def missing_payload_erased_too_early(home):
    log, scratch = plain(home), Scratch(plain(home))
    path = apart(scratch, b"x")
    log.add("blob.erased", {"by": "dana", "reason": "r", "commitments": [path.name]})
    log.add("tool.decided", {"call": "c1", "result": "deny", "code": {"commitment": path.name, "bytes": 1}})
    path.unlink()
    log.write()
    return {"head": log.head}


@vector(30, "a payload was changed, which is seen behind other breaks as well; the first one names the class")
def tamper_before_a_payload(home):
    log = plain(home)
    path = apart(log, b"x")
    path.write_bytes(b"y")
    log.write([*log.lines[:2], *log.lines[3:]])
    return {"head": log.head}


class Scratch:
    """A log of which only the folder and the number count: for a blob without its record."""

    def __init__(self, log):
        self.folder, self.seq = log.folder, log.seq

    def add(self, kind, body):
        self.seq += 1


def make(folder):
    """Write all vectors into a folder that is empty or holds earlier ones."""
    shutil.rmtree(folder, ignore_errors=True)
    index = []
    for name, (code, says, build) in VECTORS.items():
        (folder / name).mkdir(parents=True)
        index.append({"name": name, "code": code, "says": says, **build(folder / name)})
    # An empty folder is not in a repository, and nothing here may depend on one.
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HOME)
