"""Snapshots on disk, named by what is in them.

A snapshot is a folder with `state.safetensors` (every tensor) and `manifest.json` (everything else, the tensors' place
in it, and the hash of the first file). Its name is the SHA-256 of the manifest, so that a snapshot cannot change under
its name. Nothing is pickled.

    snapshots/
      <digest>/        state.safetensors, manifest.json
      promoted.json    the pointer: which snapshot acts now, and which did before; replacing it commits a promotion

Not here: the checkpoints of a framework, which stay where they are, and any decision about when to go back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loopguard.errors import SnapshotError
from loopguard.snapshots.files import (
    discard_folder,
    make_directory,
    partial_folder,
    partial_name,
    publish,
    replace_durably,
    sync_directory,
    write_synced,
    writing,
)
from loopguard.snapshots.ring import Slot
from loopguard.snapshots.tensors import read_tensors, verify_file, write_tensors
from loopguard.snapshots.tree import Encoded, decode, encode, legible

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FORMAT = 2
TENSORS = "state.safetensors"
MANIFEST = "manifest.json"
_POINTER = "promoted.json"
_HISTORY = 100
"""Earlier promotions that the pointer remembers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """The pointer: the snapshot that acts, the cycle and update that it stands at, and its panel."""

    snapshot: str
    cycle: int
    update: int
    panel: dict[str, float]


class SnapshotStore:
    """The snapshots of one run directory. One store has one writer, the process that owns the run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._filling: set[str] = set()

    def write(self, state: Any, facts: Mapping[str, Any] | None = None, *, into: Path | None = None) -> str:
        """Make a state, or that of a slot, durable and give its digest.

        `facts` go into the manifest: JSON values such as the update, the versions and the digest of the guard policy; a
        slot has its own. The folder appears under its name whole or not at all. Raises DiskError where the disk does
        not take it, TypeError for a state that a snapshot cannot hold, SnapshotError for a stale slot.
        """
        parent = into or self.root
        if facts is None:
            facts = state.facts if isinstance(state, Slot) else {}
        with _encoded(state) as encoded, writing(parent), self._partial(parent) as partial:
            body = {"tensors": write_tensors(partial / TENSORS, encoded.tensors), "tree": encoded.tree}
            return self.publish(partial, body, facts)

    def read(self, digest: str, *, of: Path | None = None) -> Any:
        """The state of that name. Raises SnapshotError where it is missing or is not what its name says."""
        folder = (of or self.root) / digest
        manifest = read_manifest(folder)
        if "ranks" in manifest:
            raise SnapshotError(
                f"{folder} was written by several ranks together; start the run with torchrun, on as many ranks"
            )
        return decode(manifest["tree"], read_tensors(folder / TENSORS, manifest["tensors"]))

    def facts(self, digest: str, *, of: Path | None = None) -> dict[str, Any]:
        """What its writer said of a snapshot. Raises SnapshotError as `read` does, for the manifest alone."""
        return cast(dict[str, Any], decode(read_manifest((of or self.root) / digest)["facts"], []))

    def verify(self, digest: str, *, of: Path | None = None) -> None:
        """Read a snapshot through and load nothing. Raises SnapshotError as `read` does."""
        folder = (of or self.root) / digest
        for name, sha256 in files_of(read_manifest(folder)).items():
            verify_file(folder / name, sha256)

    def link(self, digest: str, into: Path) -> None:
        """Let a snapshot stand in another folder too, without its bytes taking room twice where the disk can do that.

        Raises SnapshotError where it is missing, DiskError.
        """
        folder = self.root / digest
        names = [*files_of(read_manifest(folder)), MANIFEST]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise SnapshotError(f"{folder}: the snapshot lacks {missing[0]}")
        with writing(into), self._partial(into) as partial:
            for name in names:
                make_directory((partial / name).parent)
                _link(folder / name, partial / name)
            for inner in {(partial / name).parent for name in names} - {partial}:
                sync_directory(inner)
            publish(partial, into / digest, intact=lambda: self._intact(digest, of=into))

    def promote(self, promoted: Promoted) -> None:
        """Point at another snapshot. This is the commit point of a promotion. Raises DiskError, SnapshotError."""
        now, before = self._pointer()
        if now is not None and now != promoted:
            before = [now, *before]
        self._point(promoted, before)

    def roll_back(self, digest: str) -> Promoted:
        """Point at an earlier promotion again, and forget those after it.

        Raises SnapshotError where no earlier promotion has that snapshot, or it is missing or damaged; DiskError.
        """
        _, before = self._pointer()
        places = [place for place, earlier in enumerate(before) if earlier.snapshot == digest]
        if not places:
            raise SnapshotError(f"{self.root / _POINTER} names no earlier promotion with snapshot {digest}")
        self.verify(digest)
        self._point(before[places[0]], before[places[0] + 1 :])
        return before[places[0]]

    def promoted(self) -> Promoted | None:
        """The pointer, or None before the first promotion. Raises SnapshotError where it cannot be read."""
        return self._pointer()[0]

    def history(self) -> tuple[Promoted, ...]:
        """The promotions before that one, newest first; their snapshots may be gone. Raises SnapshotError."""
        return tuple(self._pointer()[1])

    def prune(self, *, keep: set[str]) -> None:
        """Remove every snapshot but those and the promoted one, and what a killed writer left.

        What this store is writing is left alone until it has its name; then it has to be in `keep`, so call this from
        the thread that writes. Raises SnapshotError where the pointer cannot be read; then nothing is removed. Raises
        DiskError.
        """
        promoted = self.promoted()
        kept = keep | {promoted.snapshot} if promoted else keep
        with writing(self.root):
            for folder in self.root.iterdir():
                if not folder.is_dir() or folder.name in kept or folder.name in self._filling:
                    continue
                if folder.name.startswith("."):
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    discard_folder(folder)

    def publish(self, partial: Path, body: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
        """Complete a folder of files with a manifest, give it its name, and give that. Raises OSError."""
        manifest = {"format": FORMAT, "facts": legible(facts), **body}
        data = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        digest = hashlib.sha256(data).hexdigest()
        write_synced(partial / MANIFEST, data)
        publish(partial, partial.with_name(digest), intact=lambda: self._intact(digest, of=partial.parent))
        return digest

    def _intact(self, digest: str, *, of: Path) -> bool:
        try:
            self.verify(digest, of=of)
        except SnapshotError:
            return False
        return True

    def _point(self, promoted: Promoted, before: list[Promoted]) -> None:
        body = {**asdict(promoted), "history": [asdict(earlier) for earlier in before[:_HISTORY]]}
        data = json.dumps(legible(body), sort_keys=True, allow_nan=False).encode() + b"\n"
        replace_durably(self.root / _POINTER, data)

    @contextmanager
    def _partial(self, parent: Path) -> Iterator[Path]:
        name = partial_name()
        self._filling.add(name)  # before the folder is there: a prune in another thread must not take it for a leftover
        try:
            with partial_folder(parent, name) as folder:
                yield folder
        finally:
            self._filling.discard(name)

    def _pointer(self) -> tuple[Promoted | None, list[Promoted]]:
        path = self.root / _POINTER
        try:
            body = json.loads(path.read_bytes())
            return _promoted(body), [_promoted(earlier) for earlier in body.get("history", [])]
        except FileNotFoundError:
            return None, []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"{path}: the pointer to the promoted snapshot cannot be read: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a snapshot. Raises SnapshotError where it is missing or is not what the folder's name says."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SnapshotError(f"{folder}: the snapshot cannot be read: {error.strerror}") from error
    if (found := hashlib.sha256(data).hexdigest()) != folder.name:
        if data.startswith(b'{"format":1,'):
            raise SnapshotError(
                f"{folder}: the snapshot has format 1, of an earlier version; this one reads format {FORMAT}. "
                f"Finish the run with the version that began it, or begin another"
            )
        raise SnapshotError(f"{folder}: the snapshot is not what its name says; its manifest has digest {found}")
    manifest: dict[str, Any] = json.loads(data)
    if (number := manifest["format"]) != FORMAT:
        raise SnapshotError(f"{folder}: the snapshot has format {number}; this version reads format {FORMAT}")
    return manifest


def files_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The files that belong to a snapshot beside its manifest, each with its SHA-256."""
    return dict(manifest["files"]) if "ranks" in manifest else {TENSORS: manifest["tensors"]}


def _encoded(state: Any) -> AbstractContextManager[Encoded]:
    if isinstance(state, Slot) and state.sharded:
        raise TypeError("this slot is one rank's part of a state; use save_sharded, on every rank")
    return state.held() if isinstance(state, Slot) else nullcontext(encode(state))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another disk, or one without hard links.
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new, 8 << 20)
        new.flush()
        os.fsync(new.fileno())


def _promoted(body: Mapping[str, Any]) -> Promoted:
    return Promoted(
        snapshot=body["snapshot"],
        cycle=body["cycle"],
        update=body["update"],
        panel=dict(decode(body["panel"], [])),
    )
