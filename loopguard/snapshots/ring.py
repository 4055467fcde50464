"""The last states of a run in memory, each copied in place over an older one.

A state is constant between two updates, so copying it there costs one pass over memory and no allocation; going back to
it costs the same. Two slots take turns: one is *approved*, what a rollback goes back to, and is never written over; the
other takes the next candidate. Approving is flipping a pointer. A third slot holds a state between two boundaries.

Where a state is sharded over ranks each has a ring of its own, with its own part in it; going back needs no other rank.

Not here: the disk (`store`, `writer`), and any decision about when to copy.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from loopguard.errors import SnapshotError
from loopguard.snapshots.tensors import size_of
from loopguard.snapshots.tree import Encoded, decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch


class Shard(NamedTuple):
    """One rank's part of a sharded tensor, and how the parts lie."""

    local: torch.Tensor
    mesh: Any
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]

    def whole(self) -> Any:
        """The sharded tensor again, over the same ranks."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            self.local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


class Slot:
    """The state of one moment, until its memory is needed for a later one.

    While somebody holds a slot its memory is not taken. A slot whose memory was taken is stale for good, and says so
    instead of giving the later state.
    """

    def __init__(
        self,
        encoded: Encoded,
        facts: Mapping[str, Any],
        *,
        shards: Mapping[str, Shard] | None = None,
        copies: Sequence[Any] = (),
    ) -> None:
        self.facts = dict(facts)
        """What the taker said of this state, such as its update and cycle."""
        self._encoded = encoded
        self._shards = dict(shards or {})
        self._copies = copies
        self._stale = False
        self._holders = 0
        self._changed = threading.Condition()

    def state(self) -> Any:
        """The state. Its tensors are those of the slot: copy them on loading.

        `Module.load_state_dict` copies; `Optimizer.load_state_dict` keeps what it is given, and the next update would
        change the slot. Raises SnapshotError where the slot is stale.
        """
        encoded = self.encoded()
        return decode(encoded.tree, encoded.tensors, shards=self.shards())

    def shards(self) -> dict[str, Any]:
        """Its sharded tensors (DTensor) by their place. Raises SnapshotError where the slot is stale."""
        self.encoded()
        return {name: shard.whole() for name, shard in self._shards.items()}

    @property
    def sharded(self) -> bool:
        """Whether this is one rank's part of a state: `save_sharded` writes it, on every rank."""
        return bool(self._shards)

    def encoded(self) -> Encoded:
        """The same in two parts, less what is sharded, once the copies have arrived. Raises SnapshotError if stale."""
        if self._stale:
            raise SnapshotError(f"the slot of {self.facts} was filled again with a later state")
        _wait_for(self._copies)
        return self._encoded

    @property
    def stale(self) -> bool:
        """Whether its memory holds a later state by now."""
        return self._stale

    @property
    def bytes(self) -> int:
        """The size of its tensors; of a sharded one, of this rank's part."""
        return size_of([*self._encoded.tensors, *(shard.local for shard in self._shards.values())])

    def hold(self) -> None:
        """Keep its memory from being taken until `release`. Raises SnapshotError where the slot is stale."""
        with self._changed:
            if self._stale:
                raise SnapshotError(f"the slot of {self.facts} was filled again with a later state")
            self._holders += 1

    def release(self) -> None:
        """Undo one `hold`."""
        with self._changed:
            self._holders -= 1
            self._changed.notify_all()

    @contextmanager
    def held(self) -> Iterator[Encoded]:
        """Hold it in here. Raises SnapshotError where it is stale."""
        self.hold()
        try:
            yield self.encoded()
        finally:
            self.release()

    def retire(self) -> None:
        """Wait until nobody holds it, and make it stale."""
        with self._changed:
            self._changed.wait_for(lambda: not self._holders)
            self._stale = True
        _wait_for(self._copies)  # one that is on its way from another stream must not come after the next


class Ring:
    """The approved state, the candidate, and one between two boundaries. Lives as long as its run is in memory.

    Memory for a slot is allocated when it is first filled and kept: where shapes stay the same, the addresses do too.
    States that lie on a GPU are copied to pinned host memory without waiting for it.
    """

    def __init__(self) -> None:
        self._pair = (_Memory(), _Memory())
        self._midway = _Memory()
        self._approved: Slot | None = None

    @property
    def approved(self) -> Slot | None:
        """The state that a rollback goes back to, or None before the first."""
        return self._approved

    def take(self, state: Any, facts: Mapping[str, Any]) -> Slot:
        """Copy a state as the candidate, over the slot that is not approved.

        Waits while that one is being written to disk. Raises TypeError for a state that a snapshot cannot hold; then
        nothing has changed.
        """
        first, second = self._pair
        return (second if first.slot is not None and first.slot is self._approved else first).fill(state, facts)

    def take_midway(self, state: Any, facts: Mapping[str, Any]) -> Slot:
        """Copy a state between two boundaries, for a replay to start from; it is never approved. Raises TypeError."""
        return self._midway.fill(state, facts)

    def approve(self, slot: Slot) -> None:
        """From now on a rollback goes back to this one. Raises SnapshotError where it is stale or from elsewhere."""
        if slot not in [memory.slot for memory in self._pair]:
            raise SnapshotError(f"the slot of {slot.facts} is {'stale' if slot.stale else 'not one of this ring'}")
        self._approved = slot


class _Memory:
    """The tensors of one slot, filled again and again."""

    def __init__(self) -> None:
        self.slot: Slot | None = None
        self._tensors: list[torch.Tensor] = []

    def fill(self, state: Any, facts: Mapping[str, Any]) -> Slot:
        sharded: dict[str, Any] = {}
        live = encode(state, shards=sharded)
        sources = [*live.tensors, *(tensor.to_local().detach() for tensor in sharded.values())]
        if self.slot is not None:
            self.slot.retire()
        self._tensors = self._fitting(sources)
        copies = _copy(self._tensors, sources)
        count = len(live.tensors)
        shards = {
            name: Shard(local, tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())
            for (name, tensor), local in zip(sharded.items(), self._tensors[count:], strict=True)
        }
        self.slot = Slot(Encoded(live.tree, self._tensors[:count]), facts, shards=shards, copies=copies)
        return self.slot

    def _fitting(self, live: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Memory for these tensors: what is there where it fits, in the same order, so that addresses stay."""
        free: dict[Any, list[torch.Tensor]] = defaultdict(list)
        for tensor in reversed(self._tensors):
            free[tensor.shape, tensor.dtype, tensor.is_pinned()].append(tensor)
        return [
            spare.pop() if (spare := free[tensor.shape, tensor.dtype, tensor.is_cuda]) else _empty(tensor)
            for tensor in live
        ]


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _wait_for(copies: Sequence[Any]) -> None:
    for copy in copies:
        if not copy.query():
            copy.synchronize()


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[Any]:
    """Copy in place, and give an event for each GPU that says when its copies have arrived."""
    if not targets:
        return []
    import torch

    groups: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        into, of = groups[source.device, source.dtype]
        into.append(target)
        of.append(source)
    with torch.no_grad():
        for (device, _), (into, of) in groups.items():
            torch._foreach_copy_(into, of, non_blocking=device.type == "cuda")
    # The next update is queued behind the copies, so that it cannot overtake them.
    devices = {device for device, _ in groups if device.type == "cuda"}
    return [torch.cuda.current_stream(device).record_event() for device in devices]
