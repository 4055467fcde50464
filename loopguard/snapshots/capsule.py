"""What a freeze leaves for reproduction, in a folder that needs nothing else.

    freezes/<id>/
      capsule.json        the decision, the facts of the run, what was left out and why; written last
      start/<digest>/     the snapshot to replay from
      tape.json           every update since, with its batches, generators and readings
      tape.safetensors
      suspect/<digest>/   the state at the freeze

Within the size bound the suspect state is what is left out: it can be replayed from the rest. The start and the tape go
in whatever they weigh; the tape has a bound of its own.

Not here: running the replay, and any decision about the freeze.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.errors import DiskError, SnapshotError
from loopguard.snapshots import tape as taping
from loopguard.snapshots.files import make_directory, replace_durably, writing
from loopguard.snapshots.ring import Slot
from loopguard.snapshots.store import SnapshotStore
from loopguard.snapshots.tape import Tape, TapedUpdate
from loopguard.snapshots.tensors import size_of
from loopguard.snapshots.tree import decode, encode, legible

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
CAPSULE = "capsule.json"


class Capsule:
    """A capsule on disk. A state of it is in memory once it was asked for."""

    def __init__(self, folder: Path, data: bytes) -> None:
        body = _parsed(folder, data)
        self.folder = folder
        self.digest = hashlib.sha256(data).hexdigest()
        """SHA-256 of `capsule.json`, which holds the hashes of all else."""
        self.decision: dict[str, Any] = decode(body["decision"], [])
        self.facts: dict[str, Any] = decode(body["facts"], [])
        self.left_out: dict[str, str] = dict(body["left_out"])
        """What is not in it (`start`, `tape`, `suspect`), each with the reason."""
        self.start: str | None = body["start"]
        self.suspect: str | None = body["suspect"]
        """The digests of both snapshots."""
        self._tape: str | None = body["tape"]

    def start_state(self) -> Any:
        """The state to replay from. Raises SnapshotError where it was left out or is damaged."""
        return self._state("start", self.start)

    def suspect_state(self) -> Any:
        """The state at the freeze. Raises SnapshotError where it was left out or is damaged."""
        return self._state("suspect", self.suspect)

    def updates(self) -> list[TapedUpdate]:
        """What happened since the start. Raises SnapshotError where it was left out or is damaged."""
        return Tape.read(self.folder, self._held("tape", self._tape))

    def verify(self) -> None:
        """Read every file through. Raises SnapshotError, naming the one that is missing or has other content."""
        if self.start is not None:
            SnapshotStore(self.folder / "start").verify(self.start)
        if self.suspect is not None:
            SnapshotStore(self.folder / "suspect").verify(self.suspect)
        if self._tape is not None:
            Tape.verify(self.folder, self._tape)

    def _state(self, part: str, digest: str | None) -> Any:
        return SnapshotStore(self.folder / part).read(self._held(part, digest))

    def _held(self, part: str, name: str | None) -> str:
        if name is None:
            raise SnapshotError(f"{self.folder} lacks its {part}: {self.left_out.get(part, 'no reason was given')}")
        return name


def write_capsule(
    folder: Path,
    *,
    limit_bytes: int,
    decision: Mapping[str, Any],
    anchor: Slot | str | None,
    tape: Tape,
    suspect_state: Any,
    facts: Mapping[str, Any],
    store: SnapshotStore | None = None,
) -> Capsule:
    """Write a capsule and give it.

    `anchor` is the slot that the tape starts from, or the digest of its snapshot in `store`; None where no model is
    attached. What cannot be written down is left out with the reason. Raises DiskError where the disk does not take
    the start, the tape or `capsule.json`; then the room that the capsule took is given back.
    """
    left_out: dict[str, str] = {}
    try:
        with writing(folder):
            make_directory(folder)
        body = {
            "format": FORMAT,
            "decision": legible(decision),
            "facts": legible(facts),
            "start": _write_start(folder, anchor, store, left_out),
            "tape": _write_tape(folder, tape, left_out),
            "suspect": _write_suspect(folder, suspect_state, limit_bytes, left_out),
            "left_out": left_out,
        }
        data = json.dumps(body, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
        replace_durably(folder / CAPSULE, data)
    except DiskError:
        _give_back(folder)
        raise
    return Capsule(folder, data)


def read_capsule(folder: Path, digest: str | None = None) -> Capsule:
    """The capsule of a folder, every file of it read through and compared with its hash.

    `digest` is what the log says of it. Raises SnapshotError, naming the file that is missing or has other content.
    """
    path = folder / CAPSULE
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise SnapshotError(
            f"{folder} holds no capsule: name the folder of a freeze, such as runs/mine/freezes/f1. "
            "A freeze that came while nobody was at work on the run leaves none"
        ) from error
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}") from error
    capsule = Capsule(folder, data)
    if digest is not None and capsule.digest != digest:
        raise SnapshotError(f"{path} is not the capsule that the log names; its content was changed")
    capsule.verify()
    return capsule


def capsule_digest(folder: Path) -> str | None:
    """What the capsule of a folder is called now, without reading more of it; None where there is none."""
    try:
        return hashlib.sha256((folder / CAPSULE).read_bytes()).hexdigest()
    except OSError:
        return None


def _write_start(
    folder: Path, anchor: Slot | str | None, store: SnapshotStore | None, left_out: dict[str, str]
) -> str | None:
    if anchor is None:
        left_out["start"] = "no model was attached"
        return None
    if isinstance(anchor, str) and store is None:
        raise ValueError("an anchor that is a digest needs the store that it is in")
    try:
        if isinstance(anchor, Slot):
            return SnapshotStore(folder / "start").write(anchor)
        assert store is not None
        store.link(anchor, folder / "start")
    except (SnapshotError, TypeError) as error:
        left_out["start"] = str(error)
        return None
    return anchor


def _write_tape(folder: Path, tape: Tape, left_out: dict[str, str]) -> str | None:
    try:
        return tape.write(folder)
    except TypeError as error:
        left_out["tape"] = str(error)
        return None


def _write_suspect(folder: Path, state: Any, limit_bytes: int, left_out: dict[str, str]) -> str | None:
    if state is None:
        left_out["suspect"] = "no model was attached"
        return None
    try:
        size = size_of(encode(state).tensors)
        taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if taken + size > limit_bytes:
            left_out["suspect"] = (
                f"it has {_mib(size)}, the rest of the capsule {_mib(taken)}, and the bound is {_mib(limit_bytes)}; "
                f"a replay gives it again"
            )
            return None
        return SnapshotStore(folder / "suspect").write(state)
    except (DiskError, TypeError) as error:
        # What a replay needs is there.
        left_out["suspect"] = str(error)
        return None


def _give_back(folder: Path) -> None:
    """Make room: the log has to record the freeze on the same disk."""
    for part in ("start", "suspect"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for name in (taping.TENSORS, taping.UPDATES):
        with suppress(OSError):  # there may be no folder at all
            (folder / name).unlink(missing_ok=True)


def _parsed(folder: Path, data: bytes) -> dict[str, Any]:
    path = folder / CAPSULE
    try:
        body: dict[str, Any] = json.loads(data)
        found = body["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{path} is damaged: {error}") from error
    if found != FORMAT:
        raise SnapshotError(f"{path} has format {found}; this version reads format {FORMAT}")
    return body


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
