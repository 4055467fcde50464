"""How the ranks of a torch.distributed job talk about a decision, and keep a snapshot together.

Covered: DDP, where every rank has the whole state, and FSDP2 (`fully_shard`), where tensors are DTensors and a rank has
its shards of them.

The ranks talk over two gloo groups of our own, whatever the backend of the training is: so no accelerator is waited
for, and a snapshot that is being written never holds up a decision. They have the time-out of the default group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from loopguard.controller.ranks import Place
from loopguard.errors import UsageError
from loopguard.snapshots import Slot, SnapshotStore, load_sharded, save_sharded
from loopguard.snapshots.store import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from loopguard.integrations.torch.learner import TorchLearner

T = TypeVar("T")


class TorchPeers:
    """The ranks of the default process group. Lives from `attach` to the end of the process.

    Every method is a collective. What torch raises when a rank is gone or too late becomes a
    ConnectionError, and from then on every one of them raises it at once.
    """

    def __init__(self, learner: TorchLearner) -> None:
        self.place = Place(dist.get_rank(), dist.get_world_size())
        self._learner = learner
        _talking(_pass_over_names)
        self._decisions = _talking(lambda: dist.new_group(backend="gloo", timeout=_timeout()))
        self._snapshots = _talking(lambda: dist.new_group(backend="gloo", timeout=_timeout()))
        self._trouble = ""

    def start(self, numbers: list[int]) -> Any:
        """Begin to take the greatest of each."""
        vector = torch.tensor(numbers, dtype=torch.int64)
        work = self._talk(lambda: dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=self._decisions, async_op=True))
        return work, vector

    def finish(self, started: Any) -> list[int]:
        """The numbers, once every rank has given its own."""
        work, vector = started
        self._talk(work.wait)
        return list(map(int, vector.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, in their order."""
        gathered: list[Any] = [None] * self.place.count
        self._talk(lambda: dist.all_gather_object(gathered, value, group=self._decisions))
        return gathered

    def save(self, root: Path, slot: Slot, facts: Mapping[str, Any]) -> str:
        """Write one snapshot of all ranks."""
        return _talking(lambda: save_sharded(root, slot, facts, self._snapshots))

    def load(self, root: Path, digest: str, live: Callable[[], Any]) -> Any:
        """Read a snapshot of all ranks, or one that a run of a single rank left."""
        manifest = read_manifest(root / digest)
        if "ranks" not in manifest:
            return SnapshotStore(root).read(digest)
        if sharded(self._learner):
            self._learner.prime()
        into = live()
        state = _talking(lambda: load_sharded(root, digest, into, self._snapshots))
        if self.place.rank >= manifest["ranks"]:
            # There was no such rank then, and two ranks must not draw the same numbers.
            state["learner"]["rng"] = into["learner"]["rng"]
        return state

    def _talk(self, act: Callable[[], T]) -> T:
        if self._trouble:
            raise ConnectionError(self._trouble)
        try:
            return _talking(act)
        except ConnectionError as error:
            self._trouble = str(error)
            raise


def join(learner: TorchLearner) -> TorchPeers | None:
    """The ranks that train this model together; None where there is one. A collective of the default group.

    Raises UsageError where the actor is not spread over them as the model is.
    """
    if _alone():
        return None
    if not dist.is_gloo_available():
        raise UsageError("several ranks agree over gloo, and this torch was built without it")
    if learner.actor is not None:
        mine, theirs = learner.model.state_dict(), learner.actor.state_dict()
        odd = [name for name, tensor in mine.items() if _is_sharded(tensor) != _is_sharded(theirs[name])]
        if odd:
            raise UsageError(
                f"attach(actor=...): {odd[0]} is sharded in one of model and actor alone; shard the actor as well"
            )
    return TorchPeers(learner)


def sharded(learner: TorchLearner) -> bool:
    """Whether its parameters are spread over ranks."""
    return any(_is_sharded(parameter) for parameter in learner.model.parameters())


def sharded_alone(learner: TorchLearner) -> str:
    """What to do about a model that is sharded on one rank, or the empty string where it is not so.

    A snapshot of shards is written by all ranks of the default group together, and there it is one.
    """
    if not _alone() or not sharded(learner):
        return ""
    name = next(name for name, parameter in learner.model.named_parameters() if _is_sharded(parameter))
    return (
        f"{name} is sharded (a DTensor), and this run has one rank, which cannot keep a snapshot of shards: start it "
        f"with several, as `torchrun --nproc-per-node 2` does, or do not shard the model"
    )


def withheld_anywhere(withheld: torch.Tensor) -> torch.Tensor:
    """Whether any rank withholds, as all will know it: on the device, without the host waiting. A collective.

    It goes through the default group, since that is the one which reaches the device.
    """
    flag = withheld.to(torch.float32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag != 0


def _alone() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def _is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _talking(act: Callable[[], T]) -> T:
    try:
        return act()
    except RuntimeError as error:
        # What torch raises where a rank is gone or too late has no type of its own on gloo.
        raise ConnectionError(str(error).strip().partition("\n")[0]) from error


def _pass_over_names() -> None:
    """Let the groups of this start have names that no earlier start has used.

    torch numbers groups, and torchrun may keep one store for all starts: under an old name a rank finds the address of
    a dead one. A group of rank 0 alone connects to nobody.
    """
    for _ in range(2 * int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))):
        dist.new_group(ranks=[0], backend="gloo")


def _timeout() -> timedelta | None:
    """What `init_process_group` was given; None, which is torch's default, where its backend does not say."""
    for kind in ("cpu", "cuda"):
        try:
            options = dist.group.WORLD._get_backend(torch.device(kind)).options  # type: ignore[union-attr]
            timeout: timedelta = options._timeout
            return timeout
        except (RuntimeError, AttributeError):
            continue
    return None
