"""What the engine applied is compared with what was asked for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from sandbox_kit import Bench, make_spec

from loopguard.errors import SandboxUnavailableError
from loopguard.sandbox import attest
from loopguard.sandbox.docker import host_config
from loopguard.sandbox.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Mapping


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


def seen_in(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What PID 1 sees in a cell of which everything asked for was applied."""
    mount = {"mode": "0o1777", "files": 4096, "nosuid": True, "nodev": True, "own": True}
    capabilities = "00000000000000c0" if asked["CapAdd"] else "0000000000000000"
    return {
        "user": 0 if asked["CapAdd"] else 100_001,
        "no_new_privs": "1",
        "seccomp": "2",
        "capabilities": capabilities,
        "effective": capabilities,
        "read_only": True,
        "interfaces": ["lo"],
        "memory": 192 << 20,
        "pids": 50,
        "mounts": {
            "/job": {**mount, "bytes": 8 << 20, "files": 8192},
            "/tmp": {**mount, "bytes": 4 << 20},
            "/dev/shm": {**mount, "bytes": 4 << 20},
        },
    }


def changed(seen: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """The same with one value changed; None takes it out. Places within a mount have a space between."""
    seen = copy.deepcopy(seen)
    mount, _, name = place.rpartition(" ")
    within = seen["mounts"][mount] if mount else seen["mounts"] if name.startswith("/") else seen
    within.pop(name)
    if value is not None:
        within[name] = value
    return seen


class TestSeenInside:
    @pytest.mark.parametrize("privileges", ["multi", "strict"])
    def test_a_cell_as_asked_for_passes(self, privileges):
        """Both kinds of it, each with the capabilities that it may have."""
        asked = host_config(make_spec(privileges=privileges))
        assert attest.seen_inside(asked, seen_in(asked)) == []

    @pytest.mark.parametrize(
        ("place", "value", "said"),
        [
            ("capabilities", "00000000a80425fb", "capabilities is '00000000a80425fb', expected '00000000000000c0'"),
            ("capabilities", "0000000000000000", "capabilities is '0000000000000000'"),
            ("capabilities", None, "capabilities is None"),
            ("effective", "000001ffffffffff", "effective is '000001ffffffffff', expected '00000000000000c0'"),
            ("user", 1000, "PID 1 is user 1000, expected root"),
            ("user", None, "PID 1 is user None, expected root"),
            ("no_new_privs", "0", "no_new_privs is '0', expected '1'"),
            ("no_new_privs", None, "no_new_privs is None"),
            ("seccomp", "0", "seccomp is '0', expected '2'"),
            ("seccomp", "1", "seccomp is '1', expected '2'"),
            ("seccomp", None, "seccomp is None"),
            ("read_only", False, "read_only is False"),
            ("memory", 1 << 40, "memory is 1099511627776, expected 201326592"),
            ("memory", None, "memory is None"),
            ("pids", None, "pids is None, expected 50"),
            ("/job bytes", 1 << 30, "/job: bytes is 1073741824"),
            ("/job files", 1 << 20, "/job: files is 1048576, expected 8192"),
            ("/tmp mode", "0o755", "/tmp: mode is '0o755', expected '0o1777'"),
            ("/tmp nosuid", False, "/tmp: nosuid is False"),
            ("/dev/shm nodev", False, "/dev/shm: nodev is False"),
            ("/dev/shm own", False, "/dev/shm: own is False"),
            ("/job", None, "/job: is not there"),
        ],
    )
    def test_each_difference_is_named_with_both_values(self, asked, place, value, said):
        """One sentence, for a value that is other, lower, higher or missing."""
        (found,) = attest.seen_inside(asked, changed(seen_in(asked), place, value))
        assert said in found

    @pytest.mark.parametrize("interfaces", [["eth0", "lo"], [], ["eth0"]])
    def test_a_network_interface_too_many_is_named(self, asked, interfaces):
        """Only lo may be there."""
        found = attest.seen_inside(asked, changed(seen_in(asked), "interfaces", interfaces))
        assert f"there are network interfaces {interfaces}, a cell has lo alone" in found

    def test_interfaces_that_cannot_be_seen_are_a_difference(self, asked):
        """A cell of runc can always look."""
        (found,) = attest.seen_inside(asked, seen_in(asked) | {"interfaces": None})
        assert "interfaces is None" in found

    @pytest.mark.parametrize("name", ["capabilities", "effective"])
    def test_a_strict_cell_has_no_capability_at_all(self, name):
        """Not even those of the other kind of cell."""
        asked = host_config(make_spec(privileges="strict"))
        (found,) = attest.seen_inside(asked, seen_in(asked) | {name: "00000000000000c0"})
        assert found == f"{name} is '00000000000000c0', expected '0000000000000000'"

    def test_nobody_is_root_in_a_strict_cell(self):
        """Also a root without capabilities owns the files of the image."""
        asked = host_config(make_spec(privileges="strict"))
        (found,) = attest.seen_inside(asked, seen_in(asked) | {"user": 0})
        assert found == "PID 1 is user 0, expected anybody but root"

    def test_gvisor_is_compared_in_what_it_shows(self):
        """No control group, no seccomp list, no count of files; capabilities, interfaces and mounts all the same."""
        asked = host_config(make_spec(runtime="runsc"))
        seen = seen_in(asked) | {"seccomp": "0", "no_new_privs": None, "memory": None, "pids": None, "interfaces": None}
        for mount in seen["mounts"].values():
            mount |= {"files": 0, "nosuid": False, "nodev": False, "bytes": 1 << 30}
        assert attest.seen_inside(asked, seen) == []
        assert len(attest.seen_inside(asked, seen | {"interfaces": ["eth0", "lo"]})) == 1
        assert len(attest.seen_inside(asked, seen | {"capabilities": "000001ffffffffff"})) == 1
        assert len(attest.seen_inside(asked, changed(seen, "/tmp own", False))) == 1


class TestOldRunc:
    @pytest.mark.parametrize("version", ["1.1.11", "v1.0.3", "1.0.0-rc93", "1.0.0", "0.1.1", "1.1.0-rc.1", "1.1.11\n"])
    def test_upstream_before_the_mend_is_refused(self, version):
        """With the hole, the version that mends it, and what to do."""
        why = attest.old_runc(version)
        assert version in why
        for word in ("CVE-2024-21626", "update Docker", "1.1.12"):
            assert word in why

    @pytest.mark.parametrize("version", ["1.1.12", "v1.1.12", "1.1.15", "1.2.0-rc.1", "1.2.0", "2.0.0", "1.10.0"])
    def test_upstream_since_then_is_fine(self, version):
        """Numbers are compared as numbers."""
        assert attest.old_runc(version) == ""

    @pytest.mark.parametrize("version", ["1.1.5+ds1-1+deb12u1", "1.1.4-0ubuntu1~22.04.3"])
    def test_an_old_number_of_a_distribution_is_taken_at_its_word(self, version):
        """They mend holes without a new number."""
        assert attest.old_runc(version) == ""

    @pytest.mark.parametrize("version", ["", "unknown", "garbage 1.1.1", "1.1", "N/A", "-1.0.0"])
    def test_what_is_no_version_stops_nobody(self, version):
        """An engine that does not tell is not thereby an old one."""
        assert attest.old_runc(version) == ""


class TestAtTheStart:
    @pytest.fixture
    def told(self, monkeypatch):
        """An engine whose words are ours; it has nothing else to give."""
        info: dict[str, Any] = {"ServerVersion": "24", "Driver": "x", "Runtimes": {"runc": {}, "runsc": {}}}

        def image(self, name):
            raise SandboxUnavailableError("as far as the image")

        monkeypatch.setattr(Engine, "__init__", lambda self: None)
        monkeypatch.setattr(Engine, "close", lambda self: None)
        monkeypatch.setattr(Engine, "info", lambda self: dict(info))
        monkeypatch.setattr(Engine, "image", image)
        return info

    def test_an_old_runc_is_refused_before_anything_is_made(self, told):
        """Not even the image is looked at."""
        told["RuncVersion"] = "1.1.11"
        with pytest.raises(SandboxUnavailableError, match="CVE-2024-21626"):
            Bench().runtime.start()

    @pytest.mark.parametrize("version", ["1.1.12", "1.1.5+ds1-1+deb12u1", ""])
    def test_another_one_goes_on(self, told, version):
        told["RuncVersion"] = version
        with pytest.raises(SandboxUnavailableError, match="as far as the image"):
            Bench().runtime.start()

    def test_gvisor_does_not_depend_on_runc(self, told):
        """Its cells are not started by it."""
        told["RuncVersion"] = "1.1.11"
        with pytest.raises(SandboxUnavailableError, match="as far as the image"):
            Bench(runtime="runsc").runtime.start()
