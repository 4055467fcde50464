"""What happened since the anchor, so that it can be replayed: every batch, the generators before it, the readings.

The anchor is the state that the first update on the tape started from: a boundary, or a slot from the middle of a cycle
once the batches have grown past a bound. Who cuts the tape takes the slot.

    tape.json           the updates, and the hash of the other file
    tape.safetensors    their tensors

Not here: the anchor itself (`ring`), and running the replay.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard.errors import SnapshotError
from loopguard.snapshots.files import make_directory, sync_directory, write_synced, writing
from loopguard.snapshots.tensors import read_tensors, size_of, verify_file, write_tensors
from loopguard.snapshots.tree import Encoded, decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

FORMAT = 1
TENSORS = "tape.safetensors"
UPDATES = "tape.json"
_OVERHEAD = 700
"""Bytes of an update or a batch beside what is measured. Near enough for a bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One batch as the forward pass got it, and the state of the random generators right before."""

    batch: Any
    rng: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TapedUpdate:
    """One update on a tape, with everything that went into it."""

    update: int
    cycle: int
    update_in_cycle: int
    batches: tuple[Kept, ...]
    """Several where gradients were accumulated, none where the loop handed none in."""
    readings: dict[str, float]
    clip_norm: float | None
    decision: str


@dataclass(frozen=True, slots=True)
class _Batch:
    content: Encoded
    rng: Any
    bytes: int


@dataclass(frozen=True, slots=True)
class _Update:
    facts: dict[str, Any]
    readings: Mapping[str, float]
    batches: list[_Batch]


class Tape:
    """The updates since the anchor, with everything that went into them.

        tape.keep(batch, rng)                                   # right before each forward pass
        tape.settle(120, readings, clip_norm=1.0, decision="allow")   # once for each update

    It grows with the batches; past `limit_bytes` it is `full`, and whoever holds it takes a new anchor and restarts it.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        """About what it holds in memory, and would take on disk."""
        self._rng_bytes = 0
        self._open: list[_Batch] = []
        self._updates: list[_Update] = []

    def keep(self, batch: Any, rng: Any) -> None:
        """Copy one batch of the update to come.

        `rng` is kept as it is given, so give objects that nobody changes afterwards, such as the generators hand out.
        Raises TypeError, naming the place, where the batch holds something that cannot be written down.
        """
        tree, tensors = encode(batch, at="batch")
        if not self._rng_bytes:
            self._rng_bytes = _size(rng)  # the states of a generator have one size
        size = size_of(tensors) + _size(tree) + self._rng_bytes + _OVERHEAD
        self._open.append(_Batch(Encoded(tree, [_clone(tensor) for tensor in tensors]), rng, size))
        self.bytes += size

    def settle(
        self,
        update: int,
        readings: Mapping[str, float],
        *,
        clip_norm: float | None,
        decision: str,
        cycle: int = 0,
        update_in_cycle: int = 0,
    ) -> None:
        """Close an update: the batches kept since the last time were its own.

        `readings` is kept and not copied: where the device tells them late they are filled in late.
        """
        facts: dict[str, Any] = {"update": update, "cycle": cycle, "update_in_cycle": update_in_cycle}
        facts |= {"clip_norm": clip_norm, "decision": decision}
        self._updates.append(_Update(facts, readings, self._open))
        self._open = []
        self.bytes += _OVERHEAD

    def amend(self, *, decision: str) -> None:
        """Say what became of the last update, where that was not known when it was settled."""
        if self._updates:
            self._updates[-1].facts["decision"] = decision

    def drop(self) -> None:
        """Forget the batches that no update was made of."""
        self.bytes -= sum(batch.bytes for batch in self._open)
        self._open = []

    @property
    def empty(self) -> bool:
        """Whether no update is on it."""
        return not self._updates

    @property
    def full(self) -> bool:
        """Whether it has grown past its bound."""
        return self.bytes > self.limit_bytes

    def restart(self, *, carry: bool = False) -> None:
        """Forget every update: they lie before the new anchor, or did not happen.

        With `carry` the batches of the update that is not settled yet stay: they come after the anchor.
        """
        self._updates.clear()
        if not carry:
            self._open = []
        self.bytes = sum(batch.bytes for batch in self._open)

    def updates(self) -> list[TapedUpdate]:
        """What is on it. The tensors are the tape's own."""
        return [
            TapedUpdate(
                **update.facts,
                batches=tuple(Kept(batch=decode(*batch.content), rng=batch.rng) for batch in update.batches),
                readings={name: float(value) for name, value in update.readings.items()},
            )
            for update in self._updates
        ]

    def write(self, folder: Path) -> str:
        """Write it into a folder, durably, and give the SHA-256 of `tape.json`.

        Raises DiskError, and TypeError for generators whose state cannot be written down.
        """
        _arrive()
        tree, tensors = encode(self.updates(), at="tape")
        with writing(folder / UPDATES):
            make_directory(folder)
            for name in (TENSORS, UPDATES):
                (folder / name).unlink(missing_ok=True)
            body = {"format": FORMAT, "tensors": write_tensors(folder / TENSORS, tensors), "updates": tree}
            data = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
            write_synced(folder / UPDATES, data)
            sync_directory(folder)
        return hashlib.sha256(data).hexdigest()

    @staticmethod
    def read(folder: Path, sha256: str | None = None) -> list[TapedUpdate]:
        """The updates of a tape on disk. Raises SnapshotError where it is missing, damaged or has another hash."""
        body = _read(folder, sha256)
        updates = decode(body["updates"], read_tensors(folder / TENSORS, body["tensors"]))
        return [
            TapedUpdate(**{**update, "batches": tuple(Kept(**kept) for kept in update["batches"])})
            for update in updates
        ]

    @staticmethod
    def verify(folder: Path, sha256: str) -> None:
        """Read a tape on disk through and load nothing. Raises SnapshotError as `read` does."""
        verify_file(folder / TENSORS, _read(folder, sha256)["tensors"])


def _read(folder: Path, sha256: str | None) -> dict[str, Any]:
    path = folder / UPDATES
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise SnapshotError(f"{path} is not what the capsule says; its content was changed")
    try:
        body: dict[str, Any] = json.loads(data)
        known = body["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{path} is damaged: {error}") from error
    if not known:
        raise SnapshotError(f"{path} has format {body['format']}; this version reads format {FORMAT}")
    return body


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    import torch

    # To the host, without waiting for the device: what a capsule needs must not cost the run its GPU memory.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _arrive() -> None:
    """Wait for the copies that are on their way from a device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _size(value: Any) -> int:
    """About how many bytes a value takes. Long runs of numbers are not looked at one by one."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(_size(item) for item in value.values()) + 100 * len(value)
    if isinstance(value, list | tuple):
        return 40 * len(value) if len(value) > 16 and isinstance(value[0], int) else sum(map(_size, value)) + 60
    return len(value) + 50 if isinstance(value, str | bytes) else 30
