"""PID 1 of a cell: runs one tool call after the other, each in a process of its own, and cleans up behind it.

Standard library only; it is baked into the image and never shares a process with user code. It holds no secret.

    PID 1 (this file, root with nothing but SETUID and SETGID)
      zygote (this file again, with --zygote: imports what the policy preloads, then only forks)
        one child per call, under a user id that was never used before in this cell
      janitor (a fork of PID 1 that becomes that user id and deletes what it wrote)

Frames on standard input and output: magic "LG", type, header length, payload length, JSON header, payload. The result
of a call is sent before the cell is cleaned, and a second frame says whether it came out clean. When standard input
ends, the controller is gone, and the cell ends with it.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import os
import resource
import select
import selectors
import signal
import socket
import struct
import sys
import time

HEAD = struct.Struct(">2sBxII")
MAGIC = b"LG"
HELLO, CALL, RESULT, CLEAN = 1, 2, 3, 4
MAX_HEADER, MAX_PAYLOAD = 1 << 16, 160 << 20  # both streams with the most that a policy lets be kept
WRITABLE = ("/job", "/tmp", "/dev/shm")
PLACE = "/job/call"  # the same for every call: a traceback must not tell calls apart
CODE = {"python": "main.py", "sh": "main.sh"}
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
# Imported before a call as well: what most snippets begin with, at the price of a few hundred kilobytes.
USUAL = ("collections", "datetime", "functools", "itertools", "json", "math", "random", "re", "string")
UID_SPAN = 60_000
CLEAN_S = 2.0
JANITOR_S = 5
UNCATCHABLE = {signal.SIGKILL, signal.SIGSTOP}
PR_SET_DUMPABLE = 4

libc = ctypes.CDLL(None, use_errno=True)


def set_dumpable(value):
    # Not dumpable: other users see neither memory, descriptors nor environment of this process under /proc.
    libc.prctl(PR_SET_DUMPABLE, value, 0, 0, 0)


def become(uid):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


# --- what the kernel counted ----------------------------------------------------------------------

COUNTERS = {  # name: places, version 2 of control groups first, then version 1, as (file, key)
    "oom": (("memory.events", "oom_kill"), ("memory/memory.oom_control", "oom_kill")),
    "pids": (("pids.events", "max"), ("pids/pids.events", "max")),
}


class Counter:
    """A counter of this cell's control group; it reads as None where there is none (gVisor)."""

    def __init__(self, places):
        self.file, self.key = None, b""
        for file, key in places:
            with contextlib.suppress(OSError):
                # Held open: opening it anew for each call costs more than reading it.
                self.file, self.key = os.open("/sys/fs/cgroup/" + file, os.O_RDONLY | os.O_CLOEXEC), key.encode()
                return

    def read(self):
        if self.file is None:
            return None
        for line in os.pread(self.file, 4096, 0).splitlines():
            name, _, value = line.partition(b" ")
            if name == self.key:
                return int(value)
        return None


def disk_is_full():
    for mount in WRITABLE:
        stat = os.statvfs(mount)
        # gVisor counts no files at all: none free of none is not full.
        if stat.f_bavail == 0 or (stat.f_files and stat.f_favail == 0):
            return True
    return False


# --- the zygote and the process of a call ---------------------------------------------------------


def zygote(channel, preload):
    for number in signal.valid_signals() - UNCATCHABLE:
        signal.signal(number, signal.SIG_DFL)
    # As Python itself has them; a call inherits them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    for module in (*USUAL, *preload):
        try:
            __import__(module)
        except BaseException as error:
            channel.send(f"module {module} cannot be preloaded: {error!r}"[:500].encode())
            os._exit(1)
    import atexit
    import gc
    import linecache
    import threading
    import traceback
    import types

    tools = (atexit, linecache, threading, traceback, types)
    rehearse()
    gc.collect()
    gc.freeze()
    channel.send(b"ready")
    while True:
        message, ancillary, _, _ = channel.recvmsg(4096, socket.CMSG_SPACE(16))
        if not message:
            os._exit(0)
        descriptors = array.array("i")
        descriptors.frombytes(ancillary[0][2][:16])
        try:
            pid = os.fork()
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            call(json.loads(message), descriptors, tools)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(struct.pack(">ii", *((0, -pid) if pid < 0 else (os.waitpid(pid, 0)[1], 0))))


def rehearse():
    """Do once what every call does: what the interpreter sets up at the first time need not be set up in each child."""
    code = b"import math\ndef f(x):\n    return [str(x), f'{math.sqrt(x)}']\nprint(f(4), len(f(2)))\n"
    for _ in range(3):
        standard_streams()  # they lead to /dev/null here
        exec(compile(code, "rehearsal", "exec", dont_inherit=True), {"__name__": "rehearsal"})


def call(request, descriptors, tools):
    try:
        prepare(request, descriptors)
        with open(3, "rb", closefd=True) as file:
            code = file.read()
        name = CODE[request["tool"]]
        with open(name, "wb") as file:
            file.write(code)
        if request["tool"] == "sh":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            os.execv("/bin/sh", ["sh", name])
        os._exit(run_python(code, tools) & 255)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"the call could not be started: {error!r}\n".encode())
        os._exit(126)


def prepare(request, descriptors):
    os.setsid()
    # Before the user changes: while not dumpable, the file belongs to root.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    # Out of the way first, so that none is overwritten before it has its place.
    for target, descriptor in enumerate([fcntl.fcntl(each, fcntl.F_DUPFD, 64) for each in descriptors]):
        os.dup2(descriptor, target, inheritable=target < 3)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    cpu_s = int(request["wall_s"] * request["cpus"]) + 2
    for name, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_FSIZE, request["tmpfs_mib"] << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))
    if request["nproc"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (request["nproc"], request["nproc"]))
    become(request["uid"])
    set_dumpable(1)
    os.umask(0o077)
    os.mkdir(PLACE, 0o700)
    os.chdir(PLACE)


def run_python(code, tools):
    """Run code as a script would run, and give its exit status."""
    atexit, linecache, threading, traceback, types = tools
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
    path = f"{PLACE}/main.py"
    main = types.ModuleType("__main__")
    main.__file__ = path
    main.__builtins__ = __builtins__
    sys.modules["__main__"] = main
    sys.argv[:] = ["main.py"]
    sys.path.insert(0, PLACE)
    standard_streams()
    status = 0
    try:
        exec(compile(code, path, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        if leave.code is not None and not isinstance(leave.code, int):
            print(leave.code, file=sys.stderr)
    except BaseException as error:
        linecache.checkcache(path)
        here = error.__traceback__
        traceback.print_exception(error.with_traceback(here.tb_next if here else None))
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    # Also the ones that the code has put others in the place of: what they hold was printed.
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    return status


def standard_streams():
    """New objects for standard input and output: the ones that are there were made for other descriptors."""
    stream = functools.partial(open, encoding="utf-8", closefd=False)
    sys.stdin = sys.__stdin__ = stream(0, errors="surrogateescape")
    sys.stdout = sys.__stdout__ = stream(1, "w", 1, errors="surrogateescape")
    sys.stderr = sys.__stderr__ = stream(2, "w", 1, errors="backslashreplace")


# --- the janitor ----------------------------------------------------------------------------------


def tidy(uid, name):
    """The usual case, without a fork: nothing there but the call's own folder with its code in it.

    With that user as the effective one nothing else can be reached, whatever the folder has been replaced with.
    """
    os.setresuid(0, uid, 0)
    try:
        os.unlink(f"{PLACE}/{name}")
        os.rmdir(PLACE)
    except OSError:
        return False
    finally:
        os.setresuid(0, 0, 0)
    return not any(os.listdir(mount) for mount in WRITABLE)


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
        if len(stack) < 100:
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


class Cell:
    def __init__(self, *, first_uid, nproc, idle_s, preload):
        self.first_uid, self.nproc, self.idle_s, self.preload = first_uid, nproc, idle_s, preload
        self.calls = 0
        self.inbox = bytearray()
        self.counters = {name: Counter(places) for name, places in COUNTERS.items()}
        self.start_zygote()

    def start_zygote(self):
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.zygote = os.fork()
        if self.zygote == 0:
            nothing = os.open("/dev/null", os.O_RDWR)
            os.dup2(nothing, 0)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            theirs.set_inheritable(True)
            # A fresh interpreter: it shares no memory with PID 1. Not -I, which would ignore the seed of hashes.
            arguments = [sys.executable, "-s", __file__, "--zygote", str(theirs.fileno()), *self.preload]
            os.execve(sys.executable, arguments, {**ENVIRONMENT, "HOME": "/"})
        theirs.close()
        if (said := self.channel.recv(1024)) != b"ready":
            sys.exit(said.decode(errors="replace") or "the zygote did not start")

    def count(self):
        return {name: counter.read() for name, counter in self.counters.items()}

    # frames

    def read_frame(self):
        self.need(HEAD.size)
        magic, kind, header_length, payload_length = HEAD.unpack_from(self.inbox)
        if magic != MAGIC or kind != CALL or header_length > MAX_HEADER or payload_length > MAX_PAYLOAD:
            os._exit(70)
        middle = HEAD.size + header_length
        self.need(middle + payload_length)
        header = json.loads(self.inbox[HEAD.size : middle])
        # One copy only: a call of the largest size must not cost PID 1 its life.
        with memoryview(self.inbox) as view:
            payload = bytes(view[middle : middle + payload_length])
        del self.inbox[: middle + payload_length]
        return header, payload

    def need(self, length):
        while len(self.inbox) < length:
            if not select.select([0], [], [], self.idle_s)[0]:
                os._exit(0)
            self.read_some()

    def read_some(self):
        data = os.read(0, 1 << 18)
        if not data:
            os._exit(0)
        self.inbox += data

    def send(self, kind, header, payload=b""):
        text = json.dumps(header).encode()
        frame = memoryview(HEAD.pack(MAGIC, kind, len(text), len(payload)) + text + payload)
        while frame:
            frame = frame[os.write(1, frame) :]

    # one call

    def serve(self, request, payload):
        uid = self.first_uid + self.calls
        self.calls += 1
        if self.calls > UID_SPAN:
            os._exit(71)
        before, started = self.count(), time.monotonic()
        view, middle = memoryview(payload), request["code_bytes"]
        streams, status, fork_error, why = self.run(uid, request, view[:middle], view[middle:], started)
        wall_ms = (time.monotonic() - started) * 1e3
        self.reap()
        # A call that was ended from here left nothing by itself.
        leftovers = 0 if why else len(self.strangers())
        self.kill(uid)
        after = self.count()
        rose = {name: (after[name] or 0) > (before[name] or 0) for name in before}
        code_status = os.waitstatus_to_exitcode(status)
        verdict = self.verdict(why, code_status, rose)
        out, err = streams
        kept = out.kept()
        self.send(
            RESULT,
            {
                "id": request["id"],
                "status": verdict,
                "exit_code": code_status if code_status >= 0 and not why else None,
                "signal": -code_status if code_status < 0 and not why else None,
                "fork_error": fork_error,
                "stdout_bytes": out.total,
                "stderr_bytes": err.total,
                "stdout_kept": len(kept),
                "wall_ms": round(wall_ms, 3),
                "leftovers": leftovers,
            },
            kept + err.kept(),
        )
        doubt = self.clean(uid, CODE[request["tool"]]) or ("memory limit reached" if rose["oom"] else "")
        self.send(CLEAN, {"id": request["id"], "doubt": doubt})

    def run(self, uid, request, code, stdin, started):
        pipes = [os.pipe() for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1], code_file(code)]
        to_stdin, from_out, from_err = pipes[0][1], pipes[1][0], pipes[2][0]
        message = {
            "uid": uid,
            "tool": request["tool"],
            "wall_s": request["wall_s"],
            "cpus": request["cpus"],
            "tmpfs_mib": request["tmpfs_mib"],
            "nproc": self.nproc,
        }
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", theirs))]
        self.channel.sendmsg([json.dumps(message).encode()], rights)
        for descriptor in theirs:
            os.close(descriptor)
        streams = {from_out: Stream(request["output_bytes"]), from_err: Stream(request["output_bytes"])}
        deadline = started + request["wall_s"]
        try:
            status, fork_error, why = self.watch(uid, to_stdin, stdin, streams, deadline, request["flood_bytes"])
            for descriptor, stream in streams.items():
                drain(descriptor, stream)
            if why is None and written(streams) > request["flood_bytes"]:
                why = "output_limit"
        finally:
            for descriptor in streams:
                os.close(descriptor)
        return list(streams.values()), status, fork_error, why

    def watch(self, uid, to_stdin, stdin, streams, deadline, flood_bytes):
        """Feed and drain the call until it is over; gives its status and, where we ended it, why."""
        why = None
        with selectors.DefaultSelector() as selector:
            for descriptor in streams:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            selector.register(self.channel, selectors.EVENT_READ)
            selector.register(0, selectors.EVENT_READ)
            os.set_blocking(to_stdin, False)
            if stdin:
                selector.register(to_stdin, selectors.EVENT_WRITE)
            else:
                os.close(to_stdin)
                to_stdin = -1
            while True:
                left = deadline - time.monotonic()
                if left <= 0 and why is None:
                    why = "timeout"
                if why is not None:
                    # Again and again: the child may not have changed its user yet.
                    self.kill(uid)
                    left = 0.02
                for key, _ in selector.select(max(left, 0)):
                    if key.fileobj is self.channel:
                        answer = self.channel.recv(64)
                        if not answer:
                            # Nobody can say how the call ended, so there must be no result.
                            sys.exit("the zygote died under a call")
                        status, fork_error = struct.unpack(">ii", answer)
                        if to_stdin >= 0:
                            os.close(to_stdin)
                        return status, fork_error, why
                    if key.fd == 0:
                        self.read_some()
                    elif key.fd == to_stdin:
                        stdin = feed(to_stdin, stdin)
                        if not stdin:
                            selector.unregister(to_stdin)
                            os.close(to_stdin)
                            to_stdin = -1
                    elif not pump(key.fd, streams[key.fd]):
                        selector.unregister(key.fd)
                if why is None and written(streams) > flood_bytes:
                    why = "output_limit"

    def verdict(self, why, code_status, rose):
        if why == "timeout" and rose["pids"]:
            return "pids_limit"  # a fork bomb does not end by itself
        if why is not None:
            return why
        if rose["oom"]:
            return "oom"
        if code_status == 0:
            return "ok"
        if rose["pids"]:
            return "pids_limit"
        if disk_is_full():
            return "disk_limit"
        return "signal" if code_status < 0 else "nonzero_exit"

    # afterwards

    def kill(self, uid):
        """Kill everything of a user, without a fork and without CAP_KILL.

        A process may signal where its real or effective user is the real or saved user of the target. With that user
        as the effective one, and nobody's as the real one, kill(-1) reaches the call and spares the zygote, and no one
        can signal back. The saved user 0 keeps the way home.
        """
        os.setresuid(self.first_uid - 1, uid, 0)
        try:
            os.kill(-1, signal.SIGKILL)
        except OSError:
            pass  # nobody was left
        finally:
            os.setresuid(0, 0, 0)

    def clean(self, uid, name):
        """Make the cell as it was; the reason for a doubt where that cannot be proven."""
        deadline = time.monotonic() + CLEAN_S
        self.reap()
        while self.strangers():
            if time.monotonic() > deadline:
                return "a process could not be killed"
            self.kill(uid)
            time.sleep(0.0005)
            self.reap()
        if not tidy(uid, name):
            if not janitor(uid):
                return "a file could not be deleted"
            self.reap()
            if any(os.listdir(mount) for mount in WRITABLE):
                return "a file was left"
        if self.zygote < 0:
            return "the zygote died"
        return ""

    def strangers(self):
        """Every process that is neither PID 1 nor the zygote."""
        return [name for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, self.zygote)]

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


def code_file(code):
    """The code as a descriptor, so that it passes no buffer of a fixed size on its way to the child."""
    descriptor = os.memfd_create("code")
    while code:
        code = code[os.write(descriptor, code) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


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
    try:
        return data[os.write(descriptor, data[: 1 << 16]) :]
    except BlockingIOError:
        return data
    except OSError:
        return data[:0]  # the call closed its standard input


def main():
    set_dumpable(0)
    if sys.argv[1] == "--zygote":
        sys.path.pop(0)  # the folder of this file
        zygote(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
    options = json.loads(sys.argv[1])
    for number in signal.valid_signals() - UNCATCHABLE - {signal.SIGCHLD}:
        signal.signal(number, signal.SIG_IGN)
    cell = Cell(**options)
    mounts = {mount: oct(os.stat(mount).st_mode) for mount in WRITABLE}
    cell.send(HELLO, {"counters": cell.count(), "mounts": mounts, "python": sys.version.split()[0]})
    while True:
        cell.serve(*cell.read_frame())


if __name__ == "__main__":
    main()
