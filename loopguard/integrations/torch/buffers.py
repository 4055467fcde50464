"""What a forward pass writes into a model besides its outputs: statistics of BatchNorm, biases of a router."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loopguard.errors import UsageError

_SMALL = 65536
"""Buffers up to so many elements are copied after every update. A larger one only where torch counted a write to it."""


@dataclass(slots=True)
class _Kept:
    live: torch.Tensor
    version: int
    copy: torch.Tensor


class Buffers:
    """The buffers of one model as they were after the last applied update, so that a withheld one can put them back.

    Not seen: a write to a large buffer through `.data`, which torch does not count, and buffers that are registered
    later.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._places = [(module, name) for module in model.modules() for name in module._buffers]
        self._kept: dict[int, _Kept] = {}
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """What they are now is what a withheld update goes back to."""
        copies, lives = [], []
        for index, (module, name) in enumerate(self._places):
            live, kept = module._buffers.get(name), self._kept.get(index)
            if live is None:
                self._kept.pop(index, None)
            elif kept is None or kept.live is not live or kept.copy.shape != live.shape:
                self._kept[index] = _Kept(live, _version(live), live.detach().clone())
            elif live.numel() <= _SMALL or kept.version != _version(live):
                kept.version = _version(live)
                copies.append(kept.copy)
                lives.append(live.detach())
        if copies:
            torch._foreach_copy_(copies, lives)

    @torch.no_grad()
    def put_back(self) -> None:
        """Go back to what was kept, also where a forward pass put another tensor in place of a buffer."""
        for index, (module, name) in enumerate(self._places):
            kept = self._kept.get(index)
            if kept is None:
                module._buffers[name] = None
                continue
            if kept.version != _version(kept.live) or kept.live.numel() <= _SMALL:
                kept.live.copy_(kept.copy)
                kept.version = _version(kept.live)
            if module._buffers.get(name) is not kept.live:
                module._buffers[name] = kept.live

    @torch.no_grad()
    def put_back_where(self, withheld: torch.Tensor) -> None:
        """Go back where `withheld` is true, and keep what is there where it is not, without reading it.

        Raises UsageError where a forward pass put a tensor of another shape in place of a buffer.
        """
        for index, (module, name) in enumerate(self._places):
            live, kept = module._buffers.get(name), self._kept.get(index)
            if live is None and kept is None:
                continue
            if live is None or kept is None or live.shape != kept.copy.shape:
                raise UsageError(
                    f"the buffer {name} of a {type(module).__name__} changes its shape: attach with late=False, as it "
                    "cannot be put back on the device"
                )
            if kept.live is live and live.numel() > _SMALL and kept.version == _version(live):
                continue
            torch.where(withheld, kept.copy, live.detach(), out=kept.copy)
            kept.live.copy_(kept.copy)
            kept.version = _version(kept.live)
            if module._buffers.get(name) is not kept.live:
                module._buffers[name] = kept.live

    def unsaved(self) -> dict[str, torch.Tensor]:
        """Those that the model's `state_dict` leaves out, by name."""
        return {
            f"{index}.{name}": live
            for index, (module, name) in enumerate(self._places)
            if name in module._non_persistent_buffers_set and (live := module._buffers.get(name)) is not None
        }

    @torch.no_grad()
    def load_unsaved(self, saved: dict[str, torch.Tensor]) -> None:
        """Give them back what they held."""
        for index, (module, name) in enumerate(self._places):
            value, live = saved.get(f"{index}.{name}"), module._buffers.get(name)
            if value is None:
                continue
            if live is not None and live.shape == value.shape:
                live.copy_(value)
            else:
                module._buffers[name] = value.detach().clone()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
