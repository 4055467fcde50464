"""A proof that one record is in a log, for somebody who is not given the log.

It holds the record, a checkpoint that stands for it, and the few hashes that lead from one to the other. What it says
is as good as the checkpoint: signed by a key that the reader trusts, or kept elsewhere by the reader.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from loopguard.audit import notes, read, tree
from loopguard.audit.events import BadLineError, Entry, canonical, decode, fields_of
from loopguard.audit.keys import unbase64
from loopguard.errors import AuditTamperedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from loopguard.audit.keys import VerifierKey

FORMAT = "loopguard-proof-v1"
_FIELDS = {"format", "record", "proof", "checkpoint"}


class BrokenProofError(ValueError):
    """A proof that does not hold. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Proven:
    """What a proof that holds says."""

    entry: Entry
    checkpoint: notes.Checkpoint
    signer: VerifierKey | None
    """The trusted key that signed the checkpoint; without one, whoever made the proof could have made it all up."""


def prove(run_dir: Path, seq: int, *, stream: str = read.CONTROLLER) -> dict[str, Any]:
    """The proof that a record is in a log, as JSON values, against the last checkpoint beside the log.

    Reads the log once. Raises UsageError where there is no log, no such record, one that was pruned, or no checkpoint
    for it yet, and AuditTamperedError where records were altered or are not those that the checkpoint stands for.
    """
    gone = read.pruned_front(run_dir, stream)
    if gone is not None and seq <= gone.last.seq:
        raise UsageError(f"{run_dir}: record {seq} is not there any more: {gone.told()}")
    front = gone.tree if gone is not None else tree.EMPTY
    size, path = _last_checkpoint(run_dir, seq, stream)
    try:
        text = notes.read(path)
        checkpoint = notes.Note.parse(text).checkpoint
    except notes.BadNoteError as error:
        raise AuditTamperedError(f"{path} {error}. `loopguard audit verify` says more") from error
    found: list[Entry] = []
    leaves = (_leaf(entry, seq, found) for entry in islice(read.entries(run_dir, stream), size - front.size))
    try:
        root, *proof = tree.roots(leaves, [(0, size), *tree.inclusion(seq - 1, size=size)], front=front)
    except ValueError as error:
        raise AuditTamperedError(f"{path} stands for {size} records: {error}") from error
    if checkpoint.size != size or checkpoint.root != root or not found:
        raise AuditTamperedError(
            f"{path} does not stand for the records of the log. `loopguard audit verify` says more"
        )
    return {
        "format": FORMAT,
        "record": canonical(fields_of(found[0])),
        "proof": [base64.b64encode(node).decode("ascii") for node in proof],
        "checkpoint": text,
    }


def check(proof: Mapping[str, Any], *, trusted: Sequence[VerifierKey] = ()) -> Proven:
    """What a proof says, where it holds.

    Raises BrokenProofError where record, hashes and checkpoint do not belong together, or a signature is forged, and
    UsageError for what is no proof.
    """
    record, nodes, text = _parts(proof)
    try:
        entry = decode(record.encode("utf-8"))
    except BadLineError as error:
        raise BrokenProofError(f"the record {error}") from error
    try:
        note = notes.Note.parse(text)
        signer = note.signer(trusted)
    except notes.BadNoteError as error:
        raise BrokenProofError(f"the checkpoint {error}") from error
    checkpoint = note.checkpoint
    try:
        root = tree.root_of(bytes.fromhex(entry.hash), nodes, index=entry.seq - 1, size=checkpoint.size)
    except ValueError as error:
        raise BrokenProofError(str(error)) from error
    if root != checkpoint.root:
        raise BrokenProofError(f"record {entry.seq} is not among the {checkpoint.size} that the checkpoint stands for")
    if entry.log != checkpoint.origin:
        raise BrokenProofError(f"the record is of {entry.log}, the checkpoint of {checkpoint.origin}")
    return Proven(entry, checkpoint, signer)


def _last_checkpoint(run_dir: Path, seq: int, stream: str) -> tuple[int, Path]:
    last = read.last(run_dir, stream)
    if last is None:
        raise UsageError(f"{run_dir} holds no audit log ({read.stream_dir(run_dir, stream)} has no record)")
    if not 1 <= seq <= last.seq:
        raise UsageError(f"{run_dir} has no record {seq} in stream {stream}; it has 1 to {last.seq}")
    stored = [one for one in notes.stored(read.stream_dir(run_dir, stream)) if seq <= one[0] <= last.seq]
    if not stored:
        raise UsageError(
            f"no checkpoint stands for record {seq} yet; there is one at the latest when the log is closed"
        )
    return stored[-1]


def _leaf(entry: Entry, seq: int, found: list[Entry]) -> bytes:
    if entry.seq == seq:
        found.append(entry)
    return bytes.fromhex(entry.hash)


def _parts(proof: Mapping[str, Any]) -> tuple[str, list[bytes], str]:
    if not isinstance(proof, dict) or proof.get("format") != FORMAT or proof.keys() != _FIELDS:
        raise UsageError(f"this is no proof of format {FORMAT}; make one with `loopguard audit prove RUN SEQ`")
    record, texts, text = proof["record"], proof["proof"], proof["checkpoint"]
    nodes = list(_nodes(texts)) if isinstance(texts, list) else [None]
    if not isinstance(record, str) or not isinstance(text, str) or None in nodes:
        raise UsageError("this proof has a field of the wrong type; make it anew")
    return record, [node for node in nodes if node is not None], text


def _nodes(texts: list[Any]) -> Iterator[bytes | None]:
    for text in texts:
        node = unbase64(text) if isinstance(text, str) else None
        yield node if node is not None and len(node) == tree.HASH_BYTES else None
