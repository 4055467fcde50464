"""Did the engine really apply what was asked? A cell that differs in anything is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MUST_BE_EMPTY = (
    "Binds",
    "Devices",
    "DeviceRequests",
    "ExtraHosts",
    "GroupAdd",
    "Links",
    "Mounts",
    "PortBindings",
    "VolumesFrom",
)
"""Settings of the engine that a cell never has."""

MUST_BE = {"Privileged": False, "PidMode": "", "UTSMode": "", "UsernsMode": "", "PublishAllPorts": False}


def differences(asked: Mapping[str, Any], applied: Mapping[str, Any]) -> list[str]:
    """Where the engine's HostConfig is not what was asked for, one sentence each.

    `asked` is the HostConfig that was sent. Lists are compared without their order; a setting that the engine leaves
    out counts as not applied.
    """
    found = [
        f"{name} is {_short(applied.get(name))}, asked for {_short(value)}"
        for name, value in asked.items()
        if _plain(applied.get(name)) != _plain(value)
    ]
    found += [f"{name} is {_short(applied[name])}, a cell has none" for name in MUST_BE_EMPTY if applied.get(name)]
    found += [
        f"{name} is {applied[name]!r}, asked for {value!r}"
        for name, value in MUST_BE.items()
        if name in applied and applied[name] != value
    ]
    # An empty list here means that nothing of /proc is masked; absent and null mean the engine's own list.
    found += [f"{name} is empty" for name in ("MaskedPaths", "ReadonlyPaths") if applied.get(name) == []]
    return found


def mounts(found: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Mounts of a container that are not in memory: an image may bring volumes that nobody asked for."""
    return [
        f"{mount.get('Destination')} is a {mount.get('Type')} of the host, a cell has none"
        for mount in found or ()
        if mount.get("Type") != "tmpfs"
    ]


def _short(value: Any) -> str:
    """A value on its way into a message; the seccomp profile is five kilobytes long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(json.dumps(_plain(item), sort_keys=True) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item not in (None, "", {}, [])}
    # Newer engines give capabilities back under their full names.
    return value.removeprefix("CAP_") if isinstance(value, str) else value
