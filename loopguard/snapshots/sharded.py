"""Snapshots of a state whose tensors are spread over ranks (DTensor, as FSDP2 makes them).

The shards go through `torch.distributed.checkpoint`, which can load them on another number of ranks. Everything else,
such as generators and counters, is kept for each rank by itself. The folder has a name like any snapshot's, and gets it
from rank 0 once every rank is through.

    snapshots/<digest>/
      manifest.json       the hash of every other file; its own hash is the name
      shards/             what torch.distributed.checkpoint writes
      rank-0000.json, rank-0000.safetensors      what is not sharded, as in any snapshot; one pair for each rank

Both functions are collectives: all ranks of the group call them, and all get an error where one has one. The folder
must be on a disk that all of them see. `shards/.metadata` is a pickle, the one file of a snapshot that is: it is read
after its hash has been compared, so load a sharded snapshot by a digest that you trust.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loopguard.errors import DiskError, SnapshotError
from loopguard.snapshots.files import make_directory, partial_name, sync_directory, write_synced, writing
from loopguard.snapshots.ring import Slot
from loopguard.snapshots.store import SnapshotStore, files_of, read_manifest
from loopguard.snapshots.tensors import read_tensors, verify_file, write_tensors
from loopguard.snapshots.tree import Encoded, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SHARDS = "shards"
_TROUBLES = (DiskError, SnapshotError, TypeError)
"""What is raised as it is on every rank. All else is a RuntimeError there."""
T = TypeVar("T")


def save_sharded(root: Path, state: Any, facts: Mapping[str, Any], group: Any = None) -> str:
    """Make a state, or that of a slot, durable that the ranks hold together, and give its digest.

    Returns when it is on disk. Raises DiskError where the disk does not take it, TypeError for a state that a snapshot
    cannot hold, SnapshotError for a stale slot.
    """
    ranks = _Ranks(group)
    shards: dict[str, Any] = {}
    encoded: list[Encoded] = []
    with ExitStack() as stack:

        def take_apart() -> None:
            if isinstance(state, Slot):
                encoded.append(stack.enter_context(state.held()))
                shards.update(state.shards())
            else:
                encoded.append(encode(state, shards=shards))

        ranks.together(take_apart)
        return _save(ranks, root, encoded[0], shards, facts)


def _save(ranks: _Ranks, root: Path, encoded: Encoded, shards: dict[str, Any], facts: Mapping[str, Any]) -> str:
    folder = root / ranks.from_first(partial_name)
    try:
        ranks.from_first(lambda: _make(folder))
        if shards:
            ranks.together(lambda: _save_shards(folder / _SHARDS, shards, ranks.group))
        ranks.together(lambda: _write_rank(folder, ranks.own, encoded))
        hashes = ranks.together(lambda: _hash(folder, _listed(folder)[ranks.own :: ranks.count]))
        files = {name: sha256 for some in hashes for name, sha256 in some.items()}
        return ranks.from_first(lambda: _publish(root, folder, {"files": files, "ranks": ranks.count}, facts))
    finally:
        if not ranks.own:
            shutil.rmtree(folder, ignore_errors=True)


def load_sharded(root: Path, digest: str, into_state: Any, group: Any = None) -> Any:
    """Load a snapshot into the sharded tensors of `into_state`, in place, and give the whole state with them in it.

    The number of ranks may be another one than at saving. A rank that was not there then gets what is not sharded from
    rank 0, its generators included: seed those anew. Raises SnapshotError where the snapshot is missing or is not what
    its name says, or where `into_state` lacks a tensor that was sharded; an optimizer has its moments after its first
    step, or from `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`.
    """
    ranks = _Ranks(group)
    folder = root / digest
    shards: dict[str, Any] = {}

    def read_rank() -> Encoded:
        manifest = read_manifest(folder)
        if "ranks" not in manifest:
            raise SnapshotError(f"{folder} is not a sharded snapshot; SnapshotStore.read reads it")
        files = files_of(manifest)
        for name in sorted(files)[ranks.own :: ranks.count]:
            verify_file(folder / name, files[name])
        own = _read_rank(folder, ranks.own if ranks.own < manifest["ranks"] else 0, files)
        encode(into_state, shards=shards)
        if missing := sorted(_shards_in(own.tree) - shards.keys()):
            raise SnapshotError(f"{folder} holds {missing[0]}, which the state to load into lacks as a sharded tensor")
        return own

    own: list[Encoded] = []
    ranks.together(lambda: own.append(read_rank()))
    wanted = {name: shards[name] for name in _shards_in(own[0].tree)}
    if wanted:
        ranks.together(lambda: _load_shards(folder / _SHARDS, wanted, group))
    return decode(own[0].tree, own[0].tensors, shards=wanted)


class _Ranks:
    """The ranks of a group, and how they come to one mind."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self.group = group
        self.own = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    def together(self, act: Callable[[], T]) -> list[T]:
        """Let every rank act, and give what each came to. What one raises all raise, so that none waits for ever."""
        import torch.distributed as dist

        value, trouble, cause = None, None, None
        try:
            value = act()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
            cause = error
            trouble = (next((kind for kind in _TROUBLES if isinstance(error, kind)), RuntimeError), str(error))
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, (value, trouble), group=self.group)
        for rank, (_, told) in enumerate(gathered):
            if told is not None:
                kind, text = told
                raise kind(f"rank {rank}: {text}") from cause
        return [value for value, _ in gathered]

    def from_first(self, act: Callable[[], T]) -> T:
        """Let rank 0 act, and give what it came to."""
        return self.together(lambda: act() if not self.own else None)[0]  # type: ignore[return-value]


def _make(folder: Path) -> None:
    with writing(folder):
        make_directory(folder)


def _save_shards(folder: Path, shards: dict[str, Any], group: Any) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(shards, checkpoint_id=folder, process_group=group)
    except CheckpointException as error:
        raise DiskError(f"{folder} could not be written: {_causes(error)}") from error


def _load_shards(folder: Path, shards: dict[str, Any], group: Any) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        load(shards, checkpoint_id=folder, process_group=group)
    except CheckpointException as error:
        raise SnapshotError(f"{folder} could not be loaded: {_causes(error)}") from error


def _causes(error: Any) -> str:
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))


def _write_rank(folder: Path, rank: int, encoded: Encoded) -> None:
    name = _rank(rank)
    with writing(folder):
        sha256 = write_tensors(folder / f"{name}.safetensors", encoded.tensors)
        body = {"tree": encoded.tree, "tensors": sha256}
        data = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        write_synced(folder / f"{name}.json", data)


def _read_rank(folder: Path, rank: int, files: Mapping[str, str]) -> Encoded:
    name = _rank(rank)
    path = folder / f"{name}.json"
    verify_file(path, files[path.name])
    body = json.loads(path.read_bytes())
    return Encoded(body["tree"], read_tensors(folder / f"{name}.safetensors", body["tensors"]))


def _rank(rank: int) -> str:
    return f"rank-{rank:04d}"


def _listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _hash(folder: Path, names: list[str]) -> dict[str, str]:
    hashes = {}
    with writing(folder):
        for name in names:
            with (folder / name).open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _publish(root: Path, folder: Path, body: dict[str, Any], facts: Mapping[str, Any]) -> str:
    with writing(root):
        if (folder / _SHARDS).is_dir():
            sync_directory(folder / _SHARDS)
        return SnapshotStore(root).publish(folder, body, facts)


def _shards_in(tree: Any) -> set[str]:
    """The names of the sharded tensors in a tree."""
    if isinstance(tree, list):
        return {name for item in tree for name in _shards_in(item)}
    if not isinstance(tree, dict):
        return set()
    if tree.keys() == {"$shard"}:
        return {tree["$shard"]}
    return {name for item in tree.values() for name in _shards_in(item)}
