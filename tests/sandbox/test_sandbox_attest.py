"""What the engine applied is compared with what was asked for."""

from __future__ import annotations

import pytest
from sandbox_kit import make_spec

from loopguard.sandbox import attest
from loopguard.sandbox.docker import host_config


@pytest.fixture
def asked():
    """The whole HostConfig of a cell."""
    return host_config(make_spec())


def test_the_same_is_the_same(asked):
    """An engine that gives back what it got passes, with nulls and empty lists where it has nothing."""
    applied = asked | {"Binds": None, "Devices": [], "Privileged": False, "PidMode": "", "MaskedPaths": ["/proc/kcore"]}
    assert attest.differences(asked, applied) == []


def test_spelling_of_newer_engines_is_understood(asked):
    """Capabilities with their prefix, lists in another order, a null configuration of the log driver."""
    applied = asked | {
        "CapAdd": ["CAP_SETUID", "CAP_SETGID"],
        "SecurityOpt": list(reversed(asked["SecurityOpt"])),
        "LogConfig": {"Type": "none", "Config": None},
        "Ulimits": list(reversed(asked["Ulimits"])),
    }
    assert attest.differences(asked, applied) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NetworkMode", "bridge"),
        ("CapAdd", ["SETUID", "SETGID", "SYS_ADMIN"]),
        ("CapDrop", None),
        ("SecurityOpt", ["no-new-privileges:true"]),
        ("ReadonlyRootfs", False),
        ("Memory", 0),
        ("MemorySwap", -1),
        ("PidsLimit", None),
        ("Runtime", "runsc"),
        ("Tmpfs", {"/job": "rw"}),
        ("IpcMode", "host"),
        ("CgroupnsMode", "host"),
        ("Privileged", True),
        ("PidMode", "host"),
        ("Binds", ["/:/host"]),
        ("Devices", [{"PathOnHost": "/dev/sda"}]),
        ("MaskedPaths", []),
        ("ReadonlyPaths", []),
    ],
)
def test_each_difference_is_named(asked, name, value):
    """One sentence, which begins with the name of the setting."""
    found = attest.differences(asked, asked | {name: value})
    assert [line.split()[0] for line in found] == [name]
    assert len(found[0]) < 600


@pytest.mark.parametrize("name", sorted(host_config(make_spec())))
def test_a_setting_that_is_missing_was_not_applied(asked, name):
    """Every single setting is looked at."""
    applied = {key: value for key, value in asked.items() if key != name}
    assert [line.split()[0] for line in attest.differences(asked, applied)] == [name]


def test_volumes_of_an_image_are_found():
    """An image that declares a volume brings writable disk of the host into the cell."""
    volume = {"Type": "volume", "Destination": "/data"}
    assert attest.mounts([volume, {"Type": "tmpfs", "Destination": "/job"}]) == [
        "/data is a volume of the host, a cell has none"
    ]
    assert attest.mounts(None) == []
