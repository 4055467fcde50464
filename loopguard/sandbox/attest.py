"""Did the engine really apply what was asked? A cell that differs in anything is refused."""

from __future__ import annotations

import json
import re
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

_CAPABILITIES = {"SETGID": 6, "SETUID": 7}
"""Bits of the capabilities that a cell may have, as /proc counts them."""

_SAFE_RUNC = (1, 1, 12)

MUST_BE = {"Privileged": False, "PidMode": "", "UTSMode": "", "UsernsMode": "", "PublishAllPorts": False}


def differences(asked: Mapping[str, Any], applied: Mapping[str, Any]) -> list[str]:
    """Where the engine's HostConfig is not what was asked for, one sentence each.

    `asked` is the HostConfig that was sent. Lists are compared without their order; a setting that the engine leaves
    out counts as not applied.
    """
    found = [
        f"{name} is {_short(applied.get(name))}, asked for {_short(value)}"
        for name, value in asked.items()
        # To ask for none of something and to have none are the same, in whichever way the engine says it.
        if _plain(applied.get(name)) != _plain(value) and (applied.get(name) or value)
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


def seen_inside(asked: Mapping[str, Any], seen: Mapping[str, Any]) -> list[str]:
    """Where the kernel, as PID 1 of the cell sees it, does not hold to the HostConfig; one sentence each.

    PID 1 is root where it has a capability to use, and nobody where it has none.

    gVisor shows neither control groups nor a seccomp list of ours, and counts no files; what it does show is compared.
    """
    gvisor = asked["Runtime"] == "runsc"
    capabilities = f"{sum(1 << _CAPABILITIES[name] for name in asked['CapAdd']):016x}"
    expected: dict[str, Any] = {"capabilities": capabilities, "effective": capabilities}
    if not gvisor:
        expected |= {"no_new_privs": "1", "seccomp": "2", "read_only": True, "interfaces": ["lo"]}
        expected |= {"memory": asked["Memory"], "pids": asked["PidsLimit"]}
    found = _unequal(expected, seen)
    if type(seen.get("user")) is not int or (seen["user"] == 0) != bool(asked["CapAdd"]):
        found.append(f"PID 1 is user {seen.get('user')}, expected {'root' if asked['CapAdd'] else 'anybody but root'}")
    if seen.get("interfaces") not in (None, ["lo"]):
        found.append(f"there are network interfaces {seen.get('interfaces')}, a cell has lo alone")
    for path, options in asked["Tmpfs"].items():
        if "mode=" in options:
            found += [f"{path}: {text}" for text in _mount(options, seen["mounts"].get(path), gvisor=gvisor)]
    return found


def _mount(options: str, seen: Mapping[str, Any] | None, *, gvisor: bool) -> list[str]:
    if seen is None:
        return ["is not there"]
    words = dict(word.partition("=")[::2] for word in options.split(","))
    # The folder is in the image too, and engines differ in whose mode wins.
    expected: dict[str, Any] = {"mode": f"0o{words['mode']}", "own": True}
    if not gvisor:
        expected |= {"bytes": int(words["size"].removesuffix("m")) << 20, "files": int(words["nr_inodes"])}
        expected |= {"nosuid": True, "nodev": True}
    return _unequal(expected, seen)


def _unequal(expected: Mapping[str, Any], seen: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {_short(seen.get(name))}, expected {_short(value)}"
        for name, value in expected.items()
        if seen.get(name) != value
    ]


def mounts(found: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Mounts of a container that are not in memory: an image may bring volumes that nobody asked for."""
    return [
        f"{mount.get('Destination')} is a {mount.get('Type')} of the host, a cell has none"
        for mount in found or ()
        if mount.get("Type") != "tmpfs"
    ]


def old_runc(version: str) -> str:
    """Why cells may not run on a runc of this version; empty where they may.

    Before 1.1.12 a container could be started in a folder of the host (CVE-2024-21626). Distributions mend that under
    an old number, which then has a suffix of theirs; such a version is taken at its word.
    """
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)(.*)", version)
    if found is None or re.search(r"(ds|dfsg|deb|ubuntu|\.el|\.fc)\d", found[4]):
        return ""
    if tuple(int(part) for part in found.groups()[:3]) < _SAFE_RUNC:
        return (
            f"the engine's runc is {version}, from which a container can reach the host (CVE-2024-21626): "
            f"update Docker, to runc {'.'.join(map(str, _SAFE_RUNC))} or later"
        )
    return ""


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
