"""What no cell ever has, in the words in which people ask for it, and what to do instead.

Every key here is unknown to every section and would be refused without this table, too. The table is for the person who
wrote it: one sentence for each wish, so that the way on is not to look for another spelling. Keys match in the spelling
of Docker's API, Compose, Kubernetes, command lines and Python alike: NetworkMode, networkMode, network-mode and
network_mode are one word. Values only make a sentence more pointed; no value makes a wish come true.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from loopguard.policy.findings import shown

_READ = 4000
"""Characters of a value that are looked at for its worst part; a hostile file could hold a million."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One thing that people ask of a container, and why a cell never has it."""

    words: str
    """The keys that ask for it."""
    never: str
    instead: str
    """What to do instead."""
    worst: tuple[tuple[str, str], ...] = ()
    """(pattern, what it means): of a value, as JSON. The first that is found is said."""

    def sentence(self, value: Any) -> str:
        """What is said to somebody who wrote this wish with this value."""
        text = json.dumps(value, ensure_ascii=False)[:_READ]
        found = next((meaning for pattern, meaning in self.worst if re.search(pattern, text, re.IGNORECASE)), "")
        return f"{self.never}{f' ({found})' if found else ''}; {self.instead}"


_NOT_ANOTHER_S = (r'"(container|service|ns):', "nor in another container's")
_NETWORK = (
    (r'"host"|^true$', "least of all in the host's"),
    _NOT_ANOTHER_S,
)
_PROCESSES = (
    (r'"host"|^true$', "least of all in the host's, where it could see and signal everything"),
    _NOT_ANOTHER_S,
)
_MEMORY = (
    (r'"host"|^true$', "least of all with the host"),
    _NOT_ANOTHER_S,
)
_FILES = (
    (
        r"(docker|containerd|podman|crio|dockerd|buildkitd)[\w.-]*\.sock|/run/(docker|containerd|podman)|docker_engine",
        "least of all the socket of an engine, which is root on the host",
    ),
    (r'"/[":]', "least of all the whole of them"),
    (r'"/proc\b', "least of all /proc, which writes to the host's kernel"),
    (r'"/(sys|dev)\b', "least of all /sys and /dev, which change the host's devices"),
    (r'"/(etc|boot|lib|lib64|usr|bin|sbin|run|var)\b', "least of all those that the host runs from"),
    (r'"(/home|/root|/Users|~|\$\{?HOME)', "least of all somebody's home, where keys lie"),
)
_DEVICES = (
    (r"/dev/(mem|kmem|port)\b", "least of all its memory"),
    (r"/dev/(sd|hd|vd|xvd|nvme|dm-|mapper|disk|loop)", "least of all its disks"),
    (r"/dev/(kvm|vhost)", "least of all a way to start machines"),
    (r"/dev/fuse", "least of all a way to mount"),
)
_CAPABILITIES = (
    (r'"(CAP_)?ALL"', "ALL of them is root on the host"),
    (r"SYS_ADMIN", "SYS_ADMIN is as good as root on the host"),
    (r"SYS_MODULE", "SYS_MODULE loads code into the host's kernel"),
    (r"SYS_RAWIO", "SYS_RAWIO reaches the host's memory"),
    (r"DAC_READ_SEARCH", "DAC_READ_SEARCH opens files outside of the cell"),
    (r"DAC_OVERRIDE", "DAC_OVERRIDE writes what belongs to others"),
    (r"SYS_PTRACE", "SYS_PTRACE looks into other processes and changes them"),
    (r"BPF|PERFMON", "BPF and PERFMON run code in the host's kernel and read its memory"),
    (r"SYS_BOOT|SYS_TIME", "SYS_BOOT and SYS_TIME act on the whole host"),
    (r"MKNOD", "MKNOD makes devices"),
    (r"NET_ADMIN|NET_RAW", "NET_ADMIN and NET_RAW forge packets"),
    (r"SETUID|SETGID|SETPCAP|SETFCAP", "with SETUID and its like a call becomes another user"),
)

_WISHES = (
    Wish(
        "privileged privileged_mode",
        "a cell is never privileged: that is root on the host",
        "take it out, no tool needs it",
    ),
    Wish(
        "no_new_privileges allow_privilege_escalation sudo suid setuid",
        "nothing in a cell can gain privileges, and no-new-privileges is always on",
        "take it out",
    ),
    Wish(
        "network network_mode networks net host_network networking networking_config internet",
        "a cell is in no network",
        "name each place that calls may reach: egress: {allow: [{host: api.example.org, port: 443}]}",
        _NETWORK,
    ),
    Wish(
        "dns dns_search dns_opt dns_options dns_config dns_policy nameservers resolv_conf",
        "nothing in a cell looks names up; the proxy does, for the places that calls may reach",
        "name those under egress.allow",
    ),
    Wish(
        "extra_hosts add_host host_aliases etc_hosts",
        "a policy cannot say where a name leads, or an allowed one could lead to the host",
        "name the true host under egress.allow",
    ),
    Wish(
        "proxy http_proxy https_proxy all_proxy no_proxy proxies",
        "calls reach out through LoopGuard's own proxy or not at all",
        "name the places under egress.allow",
    ),
    Wish(
        "ports publish publish_all publish_all_ports port_bindings expose exposed_ports",
        "nothing outside can connect to a cell",
        "let the call print what it found, or fetch its files",
    ),
    Wish(
        "links link external_links",
        "a cell has no neighbours",
        "let the calls of one rollout share a cell: mode: episode",
    ),
    Wish(
        "pid pid_mode host_pid share_process_namespace",
        "a cell is never in another process namespace than its own",
        "take it out",
        _PROCESSES,
    ),
    Wish(
        "ipc ipc_mode host_ipc",
        "a cell shares no memory with anything",
        "take it out",
        _MEMORY,
    ),
    Wish(
        "uts uts_mode hostname domainname",
        "a cell has a host name of its own, which tells nothing",
        "take it out",
    ),
    Wish(
        "userns userns_mode user_namespace host_users",
        "a policy cannot take a cell out of the user namespace that the engine puts it in",
        "set userns-remap in the engine, where user ids should be mapped",
    ),
    Wish(
        "cgroupns cgroupns_mode cgroup_ns cgroup cgroup_namespace",
        "a cell has a control group namespace of its own",
        "take it out",
    ),
    Wish(
        "cgroup_parent",
        "a cell stands where the engine puts it among the control groups, so that its limits hold",
        "write what a call may use under limits",
    ),
    Wish(
        "writable_cgroup writable_cgroups cgroup_writable cgroup_rw cgroups cgroup_mount",
        "a cell cannot write to control groups, which are what holds it",
        "write what a call may use under limits",
    ),
    Wish(
        "binds bind mounts mount volumes volume volume_mounts host_path host_paths",
        "a cell sees no file of the host",
        "pass files with the call",
        _FILES,
    ),
    Wish(
        "volumes_from",
        "a cell never has the volumes of another container",
        "pass files with the call",
    ),
    Wish(
        "docker_socket docker_sock docker_host socket engine_socket use_api_socket",
        "a cell never reaches an engine, whose socket is root on the host",
        "let the loop talk to the engine",
    ),
    Wish(
        "workdir working_dir cwd",
        "a call starts in a folder of its own",
        "pass files with the call; the exec tool takes a cwd in it",
    ),
    Wish(
        "devices device device_cgroup_rules device_read_bps blkio_config",
        "a cell has no device of the host",
        "take it out, and do outside what needs one",
        _DEVICES,
    ),
    Wish(
        "gpus gpu device_requests",
        "a cell has no GPU, whose driver is part of the host's kernel",
        "run models in the loop and plain code in cells",
    ),
    Wish(
        "capabilities cap_add caps caps_add add_capabilities ambient_caps",
        "no call ever holds a capability",
        "take it out, and do outside what needs one",
        _CAPABILITIES,
    ),
    Wish(
        "cap_drop caps_drop drop_capabilities",
        "a call has no capability that could be dropped",
        "take it out, or write privileges: strict, which leaves the supervisor none either",
    ),
    Wish(
        "security_opt security_opts security_options",
        "how a cell is confined is not a policy's to change",
        "take it out",
        ((r"unconfined|disable", "least of all to nothing"),),
    ),
    Wish(
        "seccomp seccomp_profile",
        "every cell runs under LoopGuard's own list of system calls",
        "take it out, or choose runtime: runsc where that list is not enough",
        ((r"unconfined", "without one a single bug of the kernel is the way out"),),
    ),
    Wish(
        "apparmor apparmor_profile app_armor",
        "a cell keeps the AppArmor profile that the engine has for it",
        "take it out",
    ),
    Wish(
        "selinux selinux_options se_linux_options security_label label_disable",
        "a cell keeps the SELinux label that the engine has for it",
        "take it out",
    ),
    Wish(
        "masked_paths mask unmask system_paths proc_mount",
        "what the engine hides of /proc and /sys stays hidden, since it leads to the host's kernel",
        "take it out",
    ),
    Wish(
        "readonly_paths",
        "what the engine holds read-only in /proc and /sys stays so",
        "take it out",
    ),
    Wish(
        "user username uid user_id run_as_user run_as_root run_as_non_root root",
        "LoopGuard picks the user of each call, and it is never root",
        "take it out",
    ),
    Wish(
        "group_add gid group groups run_as_group supplemental_groups fs_group",
        "a call is in no group but its own",
        "take it out",
    ),
    Wish(
        "sysctls sysctl",
        "a policy sets no parameter of a kernel",
        "take it out",
    ),
    Wish(
        "read_only rootfs read_only_rootfs readonly_root_filesystem writable writable_rootfs",
        "the root file system of a cell is always read-only",
        "let the call write to its own folder, /tmp and /dev/shm, and set limits.tmpfs",
    ),
    Wish(
        "swap memory_swap memswap memswap_limit mem_swappiness memory_swappiness",
        "a cell has no swap beside its memory",
        "set limits.memory",
    ),
    Wish(
        "oom_kill_disable oom_score_adj oom_kill",
        "a call that runs out of memory is always what the kernel ends first",
        "set limits.memory",
    ),
    Wish(
        "shm_size shm",
        "shared memory is part of what a call can write to",
        "set limits.tmpfs",
    ),
    Wish(
        "ulimits ulimit rlimits",
        "LoopGuard sets the ulimits of a cell by its limits",
        "set those",
    ),
    Wish(
        "env environment envs env_file env_from",
        "no environment variable of the host enters a cell",
        "pass values with the call; the exec tool takes an env",
    ),
    Wish(
        "secrets secret configs",
        "no secret enters a cell",
        "let the proxy add it outside of the cell: egress.allow[].secret_headers",
    ),
    Wish(
        "entrypoint command cmd init",
        "the first process of a cell is LoopGuard's supervisor",
        "take it out, since code comes with each call",
    ),
    Wish(
        "restart restart_policy",
        "a cell that ended never starts again; another takes its place",
        "take it out",
    ),
    Wish(
        "host_config container_config security_context docker_args docker_options "
        "docker_opts run_args extra_args engine_options create_kwargs container_kwargs",
        "nothing is handed on to the engine as it is written",
        "use the keys of a profile",
    ),
)


def _plain(key: str) -> str:
    """A key without what differs between spellings: case, dashes and underscores."""
    return re.sub(r"[-_]", "", key).lower()


FORBIDDEN: dict[str, Wish] = {_plain(key): wish for wish in _WISHES for key in wish.words.split()}
"""Every wish by each of its words, in the spelling that `wish` looks for."""


def wish(key: str) -> Wish | None:
    """What somebody wished for who wrote this key; None where the key is no such wish."""
    return FORBIDDEN.get(_plain(key))


def runtime_fault(written: str) -> str:
    """What is said of a runtime that is none of ours."""
    return (
        f"is {shown(written)}; a cell runs under runc or runsc, since of no other it is known what it holds; "
        "choose runsc for a second kernel between the code and the host"
    )
