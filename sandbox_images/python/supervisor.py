"""PID 1 of a cell: runs one tool call after the other, each in a process of its own, and cleans up behind it.

Standard library only; it is baked into the image and never shares a process with user code. It holds no secret.

    PID 1 (this file; root with nothing but SETUID and SETGID, or in a strict cell nobody with nothing at all)
      zygote (this file again, with --zygote: imports what the policy preloads, then only forks)
        one process per call, under a user id that was never used before in this cell; it is forked and made ready
        before its call arrives, so that nobody waits for a fork
      janitor (a fork of PID 1 that becomes that user id and deletes what it wrote)

Frames on standard input and output: magic "LG", type, header length, payload length, JSON header, payload. The result
of a call is sent before the cell is cleaned, and a second frame says whether it came out clean. `docs/wire-protocol.md`
describes them all. When standard input ends, the controller is gone, and the cell ends with it; so it does when it
hears nothing for long, and when it is old.

Where PID 1 can no longer know what happened (its zygote died, a frame makes no sense) it ends. The controller then sees
the end of the stream, and never a result.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time

PROTOCOL = 2
HEAD = struct.Struct(">2sBxII")
MAGIC = b"LG"
HELLO, CALL, RESULT, CLEAN = 1, 2, 3, 4
TUNNEL = (5, 6, 7, 8)
MAX_HEADER = 4 << 20
PART = 1 << 18
PLAIN_BYTES = 1 << 16
STARTED, ENDED = 1, 2
NEWS = struct.Struct(">Bii")  # of the zygote: a call started (its pid), a call ended (its status, or why no fork)
HERE = os.path.dirname(os.path.abspath(__file__))
WRITABLE = ("/job", "/tmp", "/dev/shm")
PLACE = "/job/call"  # the same for every call: a traceback must not tell calls apart
EPISODE_SCRIPTS = "/job/code"
PROXY = "http://127.0.0.1:8118"
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": PLACE,
    "TMPDIR": PLACE,
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # A set of strings has the same order in every cell, so that a loop can be repeated.
    "PYTHONHASHSEED": "0",
}
OPEN_FILES = 256
CLEAN_S = 2.0
FETCH_S = 5.0
JANITOR_S = 5
DEPTH = 100
TABLE_BYTES = 1 << 20
UNCATCHABLE = {signal.SIGKILL, signal.SIGSTOP}
PR_SET_DUMPABLE = 4
BAD_FRAME, ZYGOTE_DIED = 70, 72

libc = ctypes.CDLL(None, use_errno=True)


def set_dumpable(value):
    # Not dumpable: other users see neither memory, descriptors nor environment of this process under /proc.
    libc.prctl(PR_SET_DUMPABLE, value, 0, 0, 0)


def become(uid):
    if os.getuid() != uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def module(name, file):
    """A module of the image, which is on no path that a call could put something on."""
    spec = importlib.util.spec_from_file_location(name, file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def languages():
    """What a call can be written in: one module for each file in the folder, by its name."""
    names = [os.path.splitext(file)[0] for file in sorted(os.listdir(f"{HERE}/languages")) if file.endswith(".py")]
    return {name: module(f"language_{name}", f"{HERE}/languages/{name}.py") for name in names}


# --- what the kernel says -------------------------------------------------------------------------

GROUP = "/sys/fs/cgroup/"
# Name: where it is in version 2 of control groups and then in version 1, and the key of its line where there are many.
FACTS = {
    "oom": (("memory.events", "oom_kill"), ("memory/memory.oom_control", "oom_kill")),
    "pids": (("pids.events", "max"), ("pids/pids.events", "max")),
    "tasks": (("pids.current", None), ("pids/pids.current", None)),
    "memory_limit": (("memory.max", None), ("memory/memory.limit_in_bytes", None)),
    "pids_limit": (("pids.max", None), ("pids/pids.max", None)),
}


class Gauge:
    """One number that the kernel keeps about this cell; None where it keeps none (gVisor)."""

    def __init__(self, name):
        self.descriptor = self.key = None
        for file, key in FACTS[name]:
            with contextlib.suppress(OSError):
                # Held open: opening it anew for each call costs more than reading it.
                self.descriptor, self.key = os.open(GROUP + file, os.O_RDONLY | os.O_CLOEXEC), key
                return

    def read(self):
        if self.descriptor is None:
            return None
        for line in os.pread(self.descriptor, 4096, 0).decode().splitlines():
            name, _, value = line.rpartition(" ")
            if self.key is None or name == self.key:
                return int(value) if value.isdigit() else None
        return None


def disk_is_full():
    for mount in WRITABLE:
        room = os.statvfs(mount)
        # gVisor counts no files at all: none free of none is not full.
        if room.f_bavail == 0 or (room.f_files and room.f_favail == 0):
            return True
    return False


def interfaces():
    try:
        return sorted(os.listdir("/sys/class/net"))
    except OSError:
        return None


def devices():
    """Nodes that everybody may write to, of which a call can set the times."""
    found = [f"/dev/{name}" for name in os.listdir("/dev")]
    return [path for path in found if stat.S_ISCHR(os.lstat(path).st_mode)]


def about_this_cell():
    """What the kernel really applied, for the controller to compare with what was asked of the engine."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
    mounts = {}
    for mount in WRITABLE:
        found, room = os.stat(mount), os.statvfs(mount)
        mounts[mount] = {
            "mode": oct(stat.S_IMODE(found.st_mode)),
            "bytes": room.f_blocks * room.f_frsize,
            "files": room.f_files,
            "nosuid": bool(room.f_flag & os.ST_NOSUID),
            "nodev": bool(room.f_flag & os.ST_NODEV),
            "own": found.st_dev != os.stat("/").st_dev,
        }
    return {
        "user": os.getuid(),
        "no_new_privs": status.get("NoNewPrivs"),
        "seccomp": status.get("Seccomp"),
        "capabilities": status.get("CapBnd"),
        "effective": status.get("CapEff"),
        "read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
        "interfaces": interfaces(),
        "memory": Gauge("memory_limit").read(),
        "pids": Gauge("pids_limit").read(),
        "mounts": mounts,
    }


# --- the zygote and the process of a call ---------------------------------------------------------


def zygote(channel, options):
    channel.set_inheritable(False)
    # PID 1 comes before its calls: a bomb must not keep it from ending the bomb.
    os.nice(10)
    if options["privileges"] != "strict":
        os.setgroups([])
    known = languages()
    for number in signal.valid_signals() - UNCATCHABLE:
        signal.signal(number, signal.SIG_DFL)
    # As Python itself has them; a call inherits them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    for name, value in (
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, options["limits"]["tmpfs_mib"] << 20),
        (resource.RLIMIT_CORE, 0),
        *([(resource.RLIMIT_NPROC, options["nproc"])] if options["nproc"] else []),
    ):
        # All calls have them from here; they mean nothing to a process that opens and writes no files of its own.
        resource.setrlimit(name, (value, value))
    if options["egress"]:
        os.environ.update(dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), PROXY))
    for module in options["preload"]:
        try:
            __import__(module)
        except BaseException as error:
            channel.send(f"module {module} cannot be preloaded: {error!r}"[:500].encode())
            os._exit(1)
    for language in known.values():
        getattr(language, "warm", lambda: None)()
    gc.collect()
    gc.freeze()
    channel.send(b"ready")
    while True:
        message, ancillary, _, _ = channel.recvmsg(64, socket.CMSG_SPACE(5 * 4), socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(0)
        descriptors = array.array("i")
        descriptors.frombytes(ancillary[0][2][: 5 * 4])
        uid, stands_by = message.decode().split()
        try:
            if stands_by != "python":
                pid = stand_by(known[stands_by], int(uid), descriptors, options)
            elif (pid := os.fork()) == 0:
                wait_and_run(int(uid), descriptors, options, known)
        except OSError as error:
            channel.send(NEWS.pack(ENDED, 0, error.errno or errno.EAGAIN))
            pid = -1
        for descriptor in descriptors:
            os.close(descriptor)
        if pid > 0:
            if options["privileges"] != "strict" and stands_by != "python":
                channel.send(NEWS.pack(STARTED, pid, 0))
            if options["privileges"] == "strict":
                # A call of the same user may kill this process; PID 1 then waits for the call itself. So that it
                # can, what is known is told before the call is reaped.
                channel.send(NEWS.pack(STARTED, pid, 0))
                channel.send(NEWS.pack(ENDED, wait_status(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)), 0))
                os.waitpid(pid, 0)
            else:
                # From the kernel, so that it is true whatever the call may write.
                channel.send(NEWS.pack(ENDED, os.waitpid(pid, 0)[1], 0))


def wait_status(ended):
    """What `waitpid` gives, from what `waitid` gives."""
    return ended.si_status << 8 if ended.si_code == os.CLD_EXITED else ended.si_status


def stand_by(language, uid, descriptors, options):
    """Start a program that waits for its call, without the fork of this large process; gives its pid.

    For this moment this is the user of the call, but for the saved user that leads back; the program is not, since an
    exec saves the effective one, and drops every capability. No process of any call is there meanwhile.
    """
    strict = options["privileges"] == "strict"
    umask = os.umask(0o077)
    try:
        if not strict:
            os.setresgid(uid, uid, 0)
            os.setresuid(uid, uid, 0)
        os.mkdir(PLACE, 0o700)
        os.chdir(PLACE)
        # Out of the way first, so that none is overwritten before it has its place.
        high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 64) for each in descriptors[:4]]
        actions = [(os.POSIX_SPAWN_DUP2, descriptor, target) for target, descriptor in enumerate(high)]
        with socket.socket(fileno=os.dup(descriptors[3])) as go:
            program = language.stand_by(go, cpu_seconds(options["limits"]), scripts(options))
        try:
            # As a terminal has them; Python ignores both.
            default = [signal.SIGPIPE, signal.SIGXFSZ]
            return os.posix_spawn(program[0], program, os.environ, file_actions=actions, setsid=True, setsigdef=default)
        finally:
            for descriptor in high:
                os.close(descriptor)
    finally:
        os.umask(umask)
        os.chdir("/")
        if not strict:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)
            set_dumpable(0)


def wait_and_run(uid, descriptors, options, known):
    """Be ready, wait for the call, run it. Never returns."""
    status = 126
    try:
        settle_in(descriptors, options)
        if options["mode"] != "episode":
            become_the_call(uid, options)
            # For every other language too: it takes the place of all this when it runs.
            known["python"].ready(PLACE)
            os.write(3, b"r")
        if not os.read(3, 1):
            os._exit(0)
        if options["mode"] == "episode":
            # Not earlier: what an episode left running has this user too, and must not meet a process of ours.
            become_the_call(uid, options)
            known["python"].ready(PLACE)
        os.close(3)
        with open(4, "rb") as file:
            request = json.loads(file.read(int.from_bytes(file.read(4), "big")))
            code = file.read(request["code_bytes"])
            for name, size in request["files"]:
                write_file(name, file.read(size))
        if request["memory_mib"]:
            resource.setrlimit(resource.RLIMIT_AS, (request["memory_mib"] << 20,) * 2)
        status = known[request["tool"]].run(code, scripts(options))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"the call could not be started: {error!r}\n".encode())
    finally:
        os._exit(status)


def settle_in(descriptors, options):
    """All that needs no user: session, descriptors, limits."""
    os.setsid()
    # Out of the way first, so that none is overwritten before it has its place.
    for target, descriptor in enumerate([fcntl.fcntl(each, fcntl.F_DUPFD, 64) for each in descriptors]):
        os.dup2(descriptor, target, inheritable=target < 3)
    os.closerange(len(descriptors), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    # While not dumpable, the file belongs to root: where that is not us, for this moment. Not before the zygote's
    # descriptors are closed: in a strict episode a process of the same user may be there, and look.
    set_dumpable(1 if options["privileges"] == "strict" else 0)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds(options["limits"]),) * 2)
    os.umask(0o077)


def cpu_seconds(limits):
    """A second line behind the clock of PID 1."""
    return int(limits["wall_s"] * max(limits["cpus"], 1)) + 2


def become_the_call(uid, options):
    become(uid)
    set_dumpable(1)
    try:
        os.mkdir(PLACE, 0o700)
    except FileExistsError:
        if options["mode"] != "episode":
            raise
    os.chdir(PLACE)


def scripts(options):
    """Where the code of a call is put. In an episode not among the files of the rollout, which may have its name."""
    if options["mode"] != "episode":
        return PLACE
    with contextlib.suppress(FileExistsError):
        os.mkdir(EPISODE_SCRIPTS, 0o700)
    return EPISODE_SCRIPTS


def write_file(name, data):
    """A file that came with the call. The controller has looked at the name."""
    *folders, last = name.split("/")
    folder = "."
    for part in folders:
        folder = f"{folder}/{part}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
    with open(f"{folder}/{last}", "wb") as file:
        file.write(data)


# --- files that come back -------------------------------------------------------------------------


def open_folder(name, within=None):
    """A folder and never a link to one. Not by O_DIRECTORY, with which gVisor follows links all the same."""
    found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=within)
    if stat.S_ISDIR(os.fstat(found).st_mode):
        return found
    os.close(found)
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


class Fetch:
    """Reads files of a call with the rights of its user: regular ones, following no link, up to a bound."""

    def __init__(self, limits):
        self.left, self.room = limits["files"], limits["files_bytes"]
        self.depth = limits["files_depth"]
        self.table = TABLE_BYTES
        self.deadline = time.monotonic() + FETCH_S
        self.files, self.missed = [], {}

    def all(self, names):
        try:
            top = open_folder(PLACE)
        except OSError:
            self.missed.update(dict.fromkeys(names, "the call's folder is gone"))
            return
        for name in names:
            self.one(os.dup(top), [part for part in name.split("/") if part not in ("", ".")], name)
        os.close(top)

    def one(self, folder, parts, name):
        """What lies at the end of a path, part by part; takes over the descriptor."""
        try:
            for part in parts[:-1]:
                below = open_folder(part, folder)
                os.close(folder)
                folder = below
            if parts:
                self.entry(folder, parts[-1], "/".join(parts), len(parts) - 1)
            else:
                self.tree(os.dup(folder), "", 0)
        except OSError as error:
            self.miss(name, error)
        finally:
            os.close(folder)

    def entry(self, folder, last, name, depth):
        try:
            # Without waiting: a pipe has no other end.
            found = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder)
        except OSError as error:
            self.miss(name, error)
            return
        kind = os.fstat(found).st_mode
        if stat.S_ISDIR(kind):
            self.tree(found, name, depth + 1)
            return
        try:
            if stat.S_ISREG(kind):
                self.regular(found, name)
            else:
                self.miss(name, "it is not a regular file")
        finally:
            os.close(found)

    def tree(self, folder, name, depth):
        """Everything below a folder; takes over the descriptor."""
        try:
            if depth > self.depth:
                self.miss(name, f"it is more than {self.depth} folders deep")
                return
            for last in sorted(os.listdir(folder)):
                if self.left <= 0 or self.table <= 0 or time.monotonic() > self.deadline:
                    self.miss(name or ".", "there are too many files")
                    return
                self.entry(folder, last, f"{name}/{last}" if name else last, depth)
        finally:
            os.close(folder)

    def regular(self, descriptor, name):
        try:
            name.encode()
        except UnicodeEncodeError:
            self.miss(name, "its name is not UTF-8")
            return
        data = bytearray()
        while len(data) <= self.room and (part := os.read(descriptor, PART)):
            data += part
        if len(data) > self.room or self.left <= 0:
            self.miss(name, "it is larger than what may come back" if self.left > 0 else "there are too many files")
            return
        self.left -= 1
        self.room -= len(data)
        self.table -= len(json.dumps(name)) + 20
        self.files.append((name, bytes(data)))

    def miss(self, name, why):
        name = name if name.isprintable() else ascii(name)
        self.table -= len(json.dumps(name)) + 80
        if self.table > 0:
            self.missed[name] = why if isinstance(why, str) else os.strerror(why.errno).lower()


# --- the janitor ----------------------------------------------------------------------------------


def sweep(mount):
    """Delete all that this user owns in a mount, however deep, without following a link and without recursion."""
    uid = os.getuid()
    top = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    mine = [name for name in os.listdir(top) if os.stat(name, dir_fd=top, follow_symlinks=False).st_uid == uid]
    stack = [(top, "", mine)]
    while stack:
        folder, name, found = stack[-1]
        if not found:
            stack.pop()
            os.close(folder)
            if stack:
                os.rmdir(name, dir_fd=stack[-1][0])
            continue
        entry = found.pop()
        try:
            os.unlink(entry, dir_fd=folder)
            continue
        except IsADirectoryError:
            os.chmod(entry, 0o700, dir_fd=folder)
        if len(stack) < DEPTH:
            below = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            stack.append((below, entry, os.listdir(below)))
        else:
            # Deeper than we hold descriptors for: hang the branch further up and come back to it.
            branch = f"deep-{time.monotonic_ns():x}"
            os.rename(entry, branch, src_dir_fd=folder, dst_dir_fd=stack[1][0])
            stack[1][2].append(branch)


def janitor(uid):
    """Whether everything that this user wrote is gone."""
    try:
        pid = os.fork()
    except OSError:
        return False
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(JANITOR_S)
            become(uid)
            for mount in WRITABLE:
                sweep(mount)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


# --- PID 1 ----------------------------------------------------------------------------------------


class Stream:
    """What a call wrote to one of its outputs: the head, the tail, and how much there was."""

    def __init__(self, keep):
        self.head, self.tail, self.total, self.half = bytearray(), bytearray(), 0, keep // 2

    def take(self, data):
        self.total += len(data)
        room = self.half - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        self.tail += data
        if len(self.tail) > 2 * self.half:
            del self.tail[: -self.half]

    def kept(self):
        return bytes(self.head + self.tail[-self.half :])


class Standby:
    """A process that is ready for a call, and our ends of its descriptors.

    What stands by is a Python that can become anything, or, where the last calls were shell, a shell.
    """

    def __init__(self, uid, stands_by, channel):
        self.uid, self.stands_by = uid, stands_by
        stdin, self.stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        go, self.go = socket.socketpair()
        # A file in memory: what is passed on goes through no buffer of a fixed size.
        self.request = os.memfd_create("request")
        theirs = [stdin, stdout, stderr, go.fileno(), self.request]
        for descriptor in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(descriptor, False)
        told = f"{uid} {stands_by}".encode()
        channel.sendmsg([told], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", theirs))])
        go.close()
        for descriptor in theirs[:3]:
            os.close(descriptor)

    def suits(self, request):
        special = self.stands_by != request["tool"] or not is_plain(request)
        return self.stands_by == "python" or not special

    def take_over(self, request, parts, *, ready):
        """Write what the call needs where its process finds it, as it comes in.

        With `ready` it says first that it has its user: from then on it can be ended, and its time can begin.
        """
        if self.stands_by == "python":
            if ready:
                self.go.recv(1)
            passed = {name: request[name] for name in ("tool", "code_bytes", "files", "memory_mib")}
            text = json.dumps(passed).encode()
            write_all(self.request, len(text).to_bytes(4, "big") + text)
        elif scripts := socket.recv_fds(self.go, 16, 1)[1]:
            os.close(self.request)
            self.request = scripts[0]
        for part in parts:
            write_all(self.request, part)

    def start(self):
        if self.stands_by == "python":
            # The other side shares the position in the file.
            os.lseek(self.request, 0, os.SEEK_SET)
        os.close(self.request)
        with contextlib.suppress(BrokenPipeError):  # there was no fork, and the zygote says why
            self.go.send(b"g\n")
        self.go.close()

    def dismiss(self):
        """It will not be needed, and ends by itself when it finds that nothing comes."""
        os.close(self.request)
        self.go.close()
        self.close()

    def close_stdin(self):
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def close(self):
        self.close_stdin()
        os.close(self.stdout)
        os.close(self.stderr)


def is_plain(request):
    """Whether a process needs no more than its code, and PID 1 can write that where it belongs without a thought."""
    return not request["files"] and not request["memory_mib"] and request["code_bytes"] <= PLAIN_BYTES


class Cell:
    def __init__(self, options):
        self.options, self.limits = options, options["limits"]
        self.strict, self.episode = options["privileges"] == "strict", options["mode"] == "episode"
        self.calls = 0
        self.inbox = bytearray()
        self.unheard = False  # the zygote has yet to say that the last call ended
        self.unread = 0  # of the payload of the frame that is being taken in
        self.oom, self.pids, self.tasks = Gauge("oom"), Gauge("pids"), Gauge("tasks")
        self.known = sorted(languages())
        self.egress = module("tunnels", f"{HERE}/tunnels.py") if options["egress"] else None
        # For as long as the cell lives: a call could take the port between two calls.
        self.listener = self.egress.listen() if self.egress else None
        # Whose times a call can set, or sets by working: they would tell the next one of it.
        self.touchable = [*WRITABLE, *devices()] if not self.strict else []
        self.set_times_back()
        self.standby = self.leader = None
        self.shell_calls = 0  # in a row
        self.start_zygote()
        self.before = self.counters()
        if not self.episode and (doubt := self.prepare()):
            sys.exit(doubt)

    def counters(self):
        return {"oom": self.oom.read(), "pids": self.pids.read()}

    def start_zygote(self):
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.zygote = os.fork()
        if self.zygote == 0:
            nothing = os.open("/dev/null", os.O_RDWR)
            for target in range(3):
                os.dup2(nothing, target)
            theirs.set_inheritable(True)
            # A fresh interpreter: it shares no memory with PID 1. Not -I, which would ignore the seed of hashes.
            arguments = [sys.executable, "-s", __file__, "--zygote", str(theirs.fileno()), json.dumps(self.options)]
            os.execve(sys.executable, arguments, {**ENVIRONMENT, "HOME": "/"})
        theirs.close()
        if (said := self.channel.recv(1024)) != b"ready":
            sys.exit(said.decode(errors="replace") or "the zygote did not start")
        # PID 1 and the zygote with whatever threads the preloaded modules have: more than that is somebody else.
        # In a strict episode somebody may be here already; then each time is a look at all of them.
        self.ours = None if self.strangers() else self.tasks.read()
        self.manners = self.zygote_manners()

    def zygote_manners(self):
        """What calls inherit from the zygote and cannot change, where the kernel keeps them from it."""
        return os.getpriority(os.PRIO_PROCESS, self.zygote), os.sched_getaffinity(self.zygote), os.getpriority(0, 0)

    def user(self, number):
        return os.getuid() if self.strict else self.options["first_uid"] + number

    def make_ready(self):
        """Have a process made for the next call, under a user that this cell never had."""
        stands_by = "sh" if self.shell_calls > 1 else "python"
        self.standby = Standby(self.user(0 if self.episode else self.calls), stands_by, self.channel)
        self.calls += 1

    def prepare(self):
        """Have the next call's process made. In a strict cell, make sure of it: a call may have stopped the zygote."""
        for _ in range(2):
            self.make_ready()
            if not self.strict:
                return ""
            if select.select([self.channel], [], [], CLEAN_S)[0] and len(news := self.channel.recv(64)) == NEWS.size:
                kind, self.leader, _ = NEWS.unpack(news)
                if kind == STARTED:
                    return ""
            self.standby.dismiss()
            self.kill_all()
            self.channel.close()
            self.start_zygote()
        return "no process can be made for a call"

    def suited(self, request):
        """The process that stands by, or another one where it is of the wrong kind."""
        plain = request["tool"] == "sh" and is_plain(request)
        self.shell_calls = self.shell_calls + 1 if plain and not self.episode else 0
        if self.episode:
            self.make_ready()
        elif not self.standby.suits(request):
            other = self.standby
            other.dismiss()
            while NEWS.unpack(self.channel.recv(64))[0] != ENDED:
                pass
            if doubt := self.clean(other.uid) or self.prepare():
                sys.exit(f"a process that stood by was not cleaned up: {doubt}")
        if self.standby.stands_by != "python" and not self.strict and not self.started():
            sys.exit("the zygote did not start what stands by")
        return self.standby

    def started(self):
        """Wait until the zygote is itself again after it started a shell; whether it did."""
        if not select.select([self.channel], [], [], CLEAN_S)[0]:
            return False
        news = self.channel.recv(64)
        return len(news) == NEWS.size and NEWS.unpack(news)[0] == STARTED

    # frames

    def read_frame(self):
        """The kind and header of the next frame; its payload is read by whoever needs it."""
        self.need(HEAD.size)
        magic, kind, header_length, payload_length = HEAD.unpack_from(self.inbox)
        if magic != MAGIC or header_length > MAX_HEADER:
            os._exit(BAD_FRAME)
        end = HEAD.size + header_length
        self.need(end)
        header = json.loads(self.inbox[HEAD.size : end])
        del self.inbox[:end]
        self.unread = payload_length
        return kind, header

    def need(self, length):
        while len(self.inbox) < length:
            if not select.select([0], [], [], self.options["idle_s"])[0]:
                os._exit(0)
            self.read_some()

    def read_some(self):
        data = os.read(0, PART)
        if not data:
            os._exit(0)
        self.inbox += data

    def payload(self, most):
        """At most so much of what is there of the payload; at least one byte unless all of it has been read."""
        if self.unread and not self.inbox:
            self.read_some()
        part = bytes(self.inbox[: min(most, self.unread)])
        del self.inbox[: len(part)]
        self.unread -= len(part)
        return part

    def send(self, kind, header, payload=b""):
        text = json.dumps(header).encode()
        head = HEAD.pack(MAGIC, kind, len(text), len(payload)) + text
        for part in (head + payload,) if len(payload) < PART else (head, payload):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(1, rest) :]

    def tunnels(self, poll):
        """Ways out for one call, where the policy has any."""
        if self.egress is None:
            return None
        return self.egress.Tunnels(poll, self.send, self.listener)

    def pass_on(self, tunnels):
        """Whole frames that came in during a call are for its tunnels."""
        while len(self.inbox) >= HEAD.size:
            magic, kind, header_length, payload_length = HEAD.unpack_from(self.inbox)
            if magic != MAGIC or kind not in TUNNEL or header_length > MAX_HEADER or payload_length > PART:
                os._exit(BAD_FRAME)
            end = HEAD.size + header_length + payload_length
            if len(self.inbox) < end:
                return
            header = json.loads(self.inbox[HEAD.size : HEAD.size + header_length])
            payload = bytes(self.inbox[HEAD.size + header_length : end])
            del self.inbox[:end]
            tunnels.take(kind, header, payload)

    # one call

    def serve(self):
        kind, request = self.read_frame()
        if kind != CALL:
            if kind not in TUNNEL:
                os._exit(BAD_FRAME)
            while self.unread:  # of a tunnel that ended with its call
                self.payload(PART)
            return
        call = self.suited(request)
        size = request["code_bytes"] + sum(size for _, size in request["files"])
        call.take_over(request, self.parts(size), ready=not self.episode)
        started = time.monotonic()
        call.start()
        streams = {call.stdout: Stream(self.limits["output_bytes"]), call.stderr: Stream(self.limits["output_bytes"])}
        status, fork_error, why = Watch(self, call, streams, started + request["wall_s"]).until_over()
        wall_ms = (time.monotonic() - started) * 1e3
        while self.unread:  # nobody read it; the next frame is behind it
            self.payload(PART)
        self.reap()
        # What we ended ourselves left nothing on purpose.
        leftovers = 0 if why or self.alone() else len(self.strangers())
        if why or not self.options["background"]:
            self.kill(call.uid)
        for descriptor, stream in streams.items():
            drain(descriptor, stream)
        call.close()
        # It may have gone over while the pipes were emptied.
        if why is None and written(streams) > self.limits["flood_bytes"]:
            why = "output_limit"
        fetch = self.fetch(request["fetch"], call.uid)
        after = self.counters()
        rose = {name: (after[name] or 0) > (self.before[name] or 0) for name in after}
        ended = os.waitstatus_to_exitcode(status)
        out, err = streams.values()
        kept = [out.kept(), err.kept()]
        doubt = "the memory limit was reached" if rose["oom"] and not self.episode else ""
        self.send(
            RESULT,
            {
                "id": request["id"],
                "status": verdict(why, ended, rose),
                "exit_code": ended if ended >= 0 and not why else None,
                "signal": -ended if ended < 0 and not why else None,
                "stdout_bytes": out.total,
                "stderr_bytes": err.total,
                "kept": [len(each) for each in kept],
                "wall_ms": round(wall_ms, 3),
                "leftovers": leftovers,
                "fork_error": fork_error,
                "files": [[name, len(data)] for name, data in fetch.files],
                "missed": fetch.missed,
                "doubt": doubt,
            },
            b"".join([*kept, *(data for _, data in fetch.files)]),
        )
        doubt = doubt or self.clean(call.uid, alone=bool(why) or not self.options["background"])
        if self.strict and not self.episode:
            doubt = doubt or self.prepare()
        # Counted anew: what was stopped by a limit while it was being killed belongs to this call.
        self.before = self.counters()
        self.send(CLEAN, {"id": request["id"], "doubt": doubt})
        if not doubt and not self.episode and not self.strict:
            self.prepare()

    def parts(self, size):
        """So much of the payload, as it comes in."""
        while size:
            part = self.payload(min(size, PART))
            size -= len(part)
            yield part

    def fetch(self, names, uid):
        found = Fetch(self.limits)
        if names:
            if not self.options["background"]:
                # Nobody is left who could move something underneath.
                self.empty(uid)
            with self.acting_as(uid):
                found.all(names)
        return found

    @contextlib.contextmanager
    def acting_as(self, uid):
        """With that user as the effective one: nothing else can be reached, whatever names have been replaced with."""
        if self.strict:
            yield
            return
        os.setresgid(0, uid, 0)
        os.setresuid(0, uid, 0)
        try:
            yield
        finally:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)
            set_dumpable(0)  # a change of user resets it to whatever the host prefers

    # afterwards

    def kill(self, uid, *, surely=False):
        """Kill everything of a user, without a fork and without CAP_KILL.

        A process may signal where its real or effective user is the real or saved user of the target. With that user
        as the effective one, and nobody's as the real one, kill(-1) reaches the call and spares the zygote, and no one
        can signal back. The saved user 0 keeps the way home. In a strict cell the zygote goes too, and is made anew;
        so where nobody else is left it is spared, unless it has to be `surely`.
        """
        if not self.strict:
            os.setresuid(self.options["first_uid"] - 1, uid, 0)
        elif not surely and self.alone():
            return
        self.kill_all()

    def kill_all(self):
        """Everybody whom PID 1 may signal right now."""
        try:
            os.kill(-1, signal.SIGKILL)
        except OSError:
            pass  # nobody was left
        finally:
            if not self.strict:
                os.setresuid(0, 0, 0)
                set_dumpable(0)
            elif self.zygote > 0:
                self.bury_zygote()

    def bury_zygote(self):
        """Wait until it is gone for good: from then on its child is ours, and it is counted no more."""
        os.waitpid(self.zygote, 0)
        self.zygote = -1

    def clean(self, uid, *, alone=True):
        """Make the cell as it was; the reason for a doubt where that cannot be proven."""
        if self.unheard and not self.hear(uid):
            return "the end of a call was not told"
        self.reap()
        if alone and not self.empty(uid):
            return "a process could not be killed"
        if self.zygote < 0:
            if not self.strict:
                return "the zygote died"
            self.channel.close()
            self.start_zygote()
        if self.zygote_manners() != self.manners:
            return "the priority or the processors of our own processes were changed"
        if self.egress is not None:
            self.refuse_waiting()
        if self.episode:
            return ""
        if not self.tidy(uid):
            if not janitor(uid):
                return "a file could not be deleted"
            self.reap()
            if any(os.listdir(mount) for mount in WRITABLE):
                return "a file was left"
        self.set_times_back()
        return ""

    def set_times_back(self):
        for place in self.touchable:
            os.utime(place, (0, 0))

    def refuse_waiting(self):
        """Connections that nobody took belong to what is gone: they must not be taken for the next call's."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.listener.accept()[0].close()

    def hear(self, uid):
        """Wait until the zygote has said that the last call ended; whether it did."""
        self.unheard = False
        deadline = time.monotonic() + CLEAN_S
        while time.monotonic() < deadline:
            if not select.select([self.channel], [], [], 0.005)[0]:
                self.kill(uid)
            elif len(news := self.channel.recv(64)) != NEWS.size:
                return False
            elif NEWS.unpack(news)[0] == ENDED:
                return True
        return False

    def empty(self, uid):
        """Wait until nobody is here but PID 1 and the zygote; whether that came true."""
        deadline = time.monotonic() + CLEAN_S
        while not self.alone() and self.strangers():
            if time.monotonic() > deadline:
                return False
            self.kill(uid)
            time.sleep(0.0005)
            self.reap()
        return True

    def tidy(self, uid):
        """The usual case, without a fork: nothing there but the call's own folder with its code in it."""
        with self.acting_as(uid):
            try:
                for name in os.listdir(PLACE):
                    os.unlink(f"{PLACE}/{name}")
                os.rmdir(PLACE)
            except OSError:
                return False
        return not any(os.listdir(mount) for mount in WRITABLE)

    def alone(self):
        """Whether nobody is here but PID 1 and the zygote, by the kernel's own count; False where it keeps none."""
        return self.ours is not None and self.zygote > 0 and self.tasks.read() == self.ours

    def strangers(self):
        """Every process that is neither PID 1 nor the zygote, nor the call itself that the zygote is about to reap."""
        ours = {1, self.zygote, self.leader if self.leader and is_zombie(self.leader) else 0}
        return [name for name in os.listdir("/proc") if name.isdigit() and int(name) not in ours]

    def reap(self):
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.zygote = -1
                return
            if pid == 0:
                return
            if pid == self.zygote:
                self.zygote = -1


class Watch:
    """One call while it runs: its input is fed, its outputs are drained, the clock is watched."""

    def __init__(self, cell, call, streams, deadline):
        self.cell, self.call, self.streams, self.deadline = cell, call, streams, deadline
        self.why = None  # we ended it
        self.waiting = b""  # standard input that the call has not taken
        self.orphan = None
        self.poll = select.poll()
        for descriptor in (cell.channel.fileno(), *streams):
            self.poll.register(descriptor, select.POLLIN)
        self.tunnels = cell.tunnels(self.poll)

    def until_over(self):
        """The status of the call as the kernel gave it, why there was no fork, and why we ended it."""
        try:
            while True:
                self.next_input()
                if (ended := self.next_events()) is not None:
                    return *ended, self.why
                if self.why is None and written(self.streams) > self.cell.limits["flood_bytes"]:
                    self.why = "output_limit"
        finally:
            if self.tunnels:
                self.tunnels.close()

    def next_input(self):
        """Take in standard input while the call has room for it, and nothing else; but notice when the stream ends."""
        cell, call = self.cell, self.call
        if call.stdin < 0 and cell.inbox:
            cell.payload(PART)  # nobody reads it any more
        if call.stdin >= 0:
            if not self.waiting and cell.unread and cell.inbox:
                self.waiting = cell.payload(PART)
            if self.waiting:
                self.poll.register(call.stdin, select.POLLOUT)
            elif not cell.unread:
                self.no_more_input()
        wanted = cell.unread and not self.waiting
        if self.tunnels and not cell.unread:
            # Not earlier: the controller hears nothing of them before it has sent all of the input.
            self.tunnels.begin()
            wanted = True
        self.poll.register(0, select.POLLIN if wanted else 0)

    def no_more_input(self):
        with contextlib.suppress(KeyError):
            self.poll.unregister(self.call.stdin)
        self.call.close_stdin()
        self.waiting = b""

    def next_events(self):
        """Wait for something and do it; (status, fork error) when the call is over."""
        left_s = self.deadline - time.monotonic()
        if left_s <= 0 and self.why is None:
            self.why = "timeout"
        if self.why is not None:
            # Again and again: a process may not have changed its user yet, or be born while the others die.
            self.cell.kill(self.call.uid, surely=True)
            if not self.cell.episode and not self.cell.strict:
                # It is dead, or will be before the cell is clean; how it died is no news, and the answer is due.
                self.cell.unheard = True
                return signal.SIGKILL, 0
            left_s = 0.02
        if self.orphan is not None:
            try:
                pid, status = os.waitpid(self.orphan, os.WNOHANG)
            except ChildProcessError:
                # The zygote knew how it ended, and took that along. Where we ended both, it is known.
                if self.why is None:
                    os._exit(ZYGOTE_DIED)
                return signal.SIGKILL, 0
            if pid:
                return status, 0
            left_s = 0.005
        for descriptor, events in self.poll.poll(max(left_s, 0) * 1000 + 1):
            if descriptor == self.cell.channel.fileno():
                if (ended := self.news()) is not None:
                    return ended
            elif descriptor == 0:
                self.cell.read_some()
                if self.tunnels and not self.cell.unread:
                    self.cell.pass_on(self.tunnels)
            elif descriptor == self.call.stdin:
                self.waiting = feed(descriptor, self.waiting)
                if self.waiting is None:
                    self.no_more_input()
                elif not self.waiting:
                    self.poll.unregister(descriptor)
            elif descriptor in self.streams:
                if not pump(descriptor, self.streams[descriptor]):
                    self.poll.unregister(descriptor)
            elif self.tunnels:
                self.tunnels.ready(descriptor, events)
        return None

    def news(self):
        message = self.cell.channel.recv(64)
        if len(message) == NEWS.size:
            kind, first, second = NEWS.unpack(message)
            if kind == ENDED:
                return first, second
            self.cell.leader = first
            return None
        if self.cell.leader is None and self.why is not None:
            return signal.SIGKILL, 0
        if self.cell.leader is None:
            # Nobody can say how the call ends, so there must be no result.
            os._exit(ZYGOTE_DIED)
        # In a strict cell the zygote goes with its call.
        if self.cell.zygote > 0:
            self.cell.bury_zygote()
        self.poll.unregister(self.cell.channel)
        self.orphan = self.cell.leader
        return None


def is_zombie(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] == b"Z"
    except OSError:
        return False


def verdict(why, ended, rose):
    """The status of a call, from what the kernel says. `why` is our own reason for ending it."""
    if why == "timeout" and rose["pids"]:
        return "pids_limit"  # a fork bomb does not end by itself
    if why is not None:
        return why
    if rose["oom"]:
        return "oom"
    if ended == 0:
        return "ok"
    if rose["pids"]:
        return "pids_limit"
    if disk_is_full():
        return "disk_limit"
    return "signal" if ended < 0 else "nonzero_exit"


def write_all(descriptor, data):
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def pump(descriptor, stream):
    """Take what is there; False at the end of the stream."""
    try:
        data = os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return True
    stream.take(data)
    return bool(data)


def drain(descriptor, stream):
    """Take what the call had written when it ended; whoever still holds the pipe adds nothing."""
    for _ in range(64):
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            return
        stream.take(data)


def written(streams):
    return sum(stream.total for stream in streams.values())


def feed(descriptor, data):
    """What is left of the data after writing some of it; None where nobody reads any more."""
    try:
        return data[os.write(descriptor, data) :]
    except BlockingIOError:
        return data
    except OSError:
        return None


def leave(*_):
    os._exit(0)


def main():
    set_dumpable(0)
    if sys.argv[1] == "--zygote":
        sys.path.pop(0)  # the folder of this file
        zygote(socket.socket(fileno=int(sys.argv[2])), json.loads(sys.argv[3]))
    options = json.loads(sys.argv[1])
    if options["protocol"] != PROTOCOL:
        sys.exit("the image was built for another version of LoopGuard: run `loopguard sandbox build`")
    for number in signal.valid_signals() - UNCATCHABLE - {signal.SIGCHLD}:
        signal.signal(number, signal.SIG_IGN)
    if options["privileges"] != "strict":
        # Old cells end by themselves, also while somebody keeps them from hearing or saying anything. Not where calls
        # have our own user: the kernel lets a call send the first process just those signals that it listens to.
        signal.signal(signal.SIGALRM, leave)
        signal.alarm(options["age_s"])
    about = about_this_cell()
    cell = Cell(options)
    version = sys.version.split()[0]
    cell.send(
        HELLO,
        {"protocol": PROTOCOL, "python": version, "languages": cell.known, "counters": cell.before, "cell": about},
    )
    while True:
        cell.serve()


if __name__ == "__main__":
    main()
