"""What hostile or clumsy code tries in a cell, and what comes of it. Everything here runs in real containers."""

from __future__ import annotations

import socket

import pytest
from sandbox_kit import Bench, make_call

from loopguard.errors import CallError

pytestmark = pytest.mark.docker

TREES = {
    "deep": "for n in range(1500):\n    os.mkdir('d'); os.chdir('d')",
    "wide": "for n in range(1000):\n    os.mkdir(f'd{n}'); open(f'd{n}/f', 'w').close(); os.chmod(f'd{n}', 0)",
    "locked": "os.makedirs('a/b/c'); os.chmod('a/b', 0); os.chmod('a', 0)",
    "links": "os.mkdir('/job/x', 0); os.symlink('/etc', '/tmp/link'); os.mkfifo('/dev/shm/pipe')",
    "replaced": "os.chdir('/'); shutil.rmtree('/job/call'); os.symlink('/usr/bin', '/job/call')",
    "sockets": "for n in range(5): socket.socket(socket.AF_UNIX).bind(f'/tmp/s{n}')",
}


class TestLimits:
    @pytest.mark.parametrize(
        "code", ["while True: pass", "import time; time.sleep(60)", "import signal, os; os.kill(os.getpid(), 19)"]
    )
    def test_time(self, hasty, code):
        """A call that does not end is ended, whether it computes, sleeps or has stopped itself."""
        outcome = hasty.run(code)
        assert (outcome.status, outcome.exit_code, outcome.signal) == ("timeout", None, None)
        assert outcome.contained

    def test_ignored_signals_do_not_help(self, hasty):
        """SIGTERM and company are not what ends a call."""
        code = "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)"
        assert hasty.run(code).status == "timeout"

    def test_fork_bomb(self, hasty):
        """A fork bomb stays in its cell and is named; the next call finds nothing of it."""
        outcome = hasty.run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
        assert outcome.status == "pids_limit"
        assert hasty.text("print('fine')") == "fine"

    def test_thread_bomb(self, bench):
        """Threads count like processes."""
        code = (
            "import threading, time\n"
            "for _ in range(500): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
        )
        assert bench.run(code).status == "pids_limit"

    def test_memory_bomb(self, bench):
        """More memory than the limit is `oom`, and the cell is not used again."""
        before = len(bench.reasons())
        assert bench.run("x = bytearray(1 << 30)").status == "oom"
        assert bench.text("print('fine')") == "fine"
        assert bench.reasons()[before:] == ["dirty"]

    @pytest.mark.parametrize("place", [".", "/tmp", "/dev/shm"])
    def test_disk_fill(self, bench, place):
        """Each writable place has an end."""
        code = "with open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 20))"
        assert bench.run(f"import os\nos.chdir({place!r})\n{code}").status == "disk_limit"
        assert bench.json("import os; print(len(os.listdir('/tmp') + os.listdir('/dev/shm')))") == 0

    def test_inode_fill(self, bench):
        """So has the number of files."""
        outcome = bench.run("for n in range(100_000): open(str(n), 'w').close()")
        assert outcome.status == "disk_limit"

    def test_output_flood(self, bench):
        """A flood is ended; what is kept of it is bounded."""
        outcome = bench.run("while True: print('x' * 1000)")
        assert outcome.status == "output_limit"
        assert outcome.stdout_bytes > 4 << 20
        assert len(outcome.stdout) == 64 << 10

    def test_head_and_tail_are_kept_and_all_is_counted(self, bench):
        """Of much output the first and the last 32 KiB are kept, to the byte, on both streams; the count is exact."""
        outcome = bench.run(
            "import sys\nfor n in range(60_000): print(n)\nfor n in range(60_000, 130_000): print(n, file=sys.stderr)"
        )
        out = "".join(f"{n}\n" for n in range(60_000)).encode()
        err = "".join(f"{n}\n" for n in range(60_000, 130_000)).encode()
        assert outcome.ok
        assert (outcome.stdout_bytes, outcome.stderr_bytes) == (len(out), len(err))
        assert outcome.stdout == out[: 32 << 10] + out[-(32 << 10) :]
        assert outcome.stderr == err[: 32 << 10] + err[-(32 << 10) :]

    def test_much_output_at_the_end_is_no_timeout(self, bench):
        """600 kB written in one go, then the end: nothing waits for anything."""
        outcome = bench.run("import os, sys; sys.stdout.write('y' * 600_000); sys.stdout.flush(); os._exit(0)")
        assert outcome.ok
        assert outcome.stdout_bytes == 600_000

    def test_a_sparse_giant_is_refused(self, bench):
        """A file cannot be made to look larger than the disk."""
        assert "File too large" in bench.run("open('big', 'wb').truncate(1 << 40)").stderr.decode()


class TestNetwork:
    def test_a_socket_of_the_host_is_out_of_reach(self, bench):
        """Neither by any address of the host, nor by its gateway, nor the usual metadata address."""
        with socket.create_server(("0.0.0.0", 0)) as server:
            port = server.getsockname()[1]
            here = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
            places = ["127.0.0.1", "172.17.0.1", "169.254.169.254", *sorted(here)]
            refused = bench.json(
                "import json, socket\nrefused = []\n"
                f"for place in {places!r}:\n"
                "    try:\n"
                f"        socket.create_connection((place, {port}), timeout=3)\n"
                "    except OSError as error: refused.append(error.errno)\n"
                "print(json.dumps(refused))"
            )
            assert len(refused) == len(places)
            server.settimeout(0)
            with pytest.raises(BlockingIOError):
                server.accept()

    def test_there_is_no_interface_but_loopback(self, bench):
        """Nothing to send through, and no names to look up."""
        assert bench.json("import json, os; print(json.dumps(os.listdir('/sys/class/net')))") == ["lo"]
        assert bench.run("import socket; socket.getaddrinfo('example.org', 80)").status == "nonzero_exit"

    def test_loopback_works_within_a_call(self, bench):
        """Code that talks to itself is fine."""
        code = (
            "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
            "client = socket.create_connection(server.getsockname())\n"
            "client.send(b'hi')\nprint(server.accept()[0].recv(9))"
        )
        assert bench.text(code) == "b'hi'"


class TestIsolation:
    def test_the_environment_holds_nothing_of_the_host(self, bench, monkeypatch):
        """Seven variables, all of them ours."""
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
        assert bench.json("import json, os; print(json.dumps(dict(os.environ)))") == {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": "/job/call",
            "TMPDIR": "/job/call",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        }

    def test_descriptors_are_three(self, bench):
        """0, 1 and 2; the fourth that a listing shows is the listing's own."""
        code = (
            "import json, os\nopen_ = []\nfor n in range(1024):\n"
            "    try:\n        os.fstat(n)\n        open_.append(n)\n"
            "    except OSError: pass\nprint(json.dumps(open_))"
        )
        assert bench.json(code) == [0, 1, 2]
        assert bench.text("ls /proc/self/fd | wc -l", tool="sh") == "4"

    def test_nothing_is_writable_but_the_three_places(self, bench):
        """Every folder and file of the cell, looked at with the eyes of a call."""
        code = """
import json, os
found = set()
for top, folders, files in os.walk("/"):
    if top == "/":
        folders[:] = [name for name in folders if name not in ("proc",)]
    for name in [".", *files]:
        path = os.path.normpath(os.path.join(top, name))
        if not os.path.islink(path) and os.access(path, os.W_OK):
            found.add(path)
print(json.dumps(sorted(found)))
"""
        found = {path for path in bench.json(code) if not path.startswith("/job/call")}
        devices = {path for path in found if path.startswith("/dev/") and path != "/dev/shm"}
        assert found - devices == {"/job", "/tmp", "/dev/shm"}
        names = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts/ptmx")
        assert devices <= {f"/dev/{name}" for name in names}

    def test_settings_of_the_kernel_are_read_only(self, bench):
        """/proc/sys, /proc/sysrq-trigger and the control groups cannot be written."""
        for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/fs/cgroup/pids/pids.max"):
            assert bench.run(f"open({path!r}, 'w').write('1')").status == "nonzero_exit", path

    def test_files_of_the_host_are_not_there(self, bench, tmp_path):
        """Neither a file of ours nor the engine's socket."""
        secret = tmp_path / "secret"
        secret.write_text("planted")
        for path in (str(secret), "/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock"):
            assert "No such file" in bench.run(f"open({path!r})").stderr.decode(), path

    def test_what_a_call_did_is_gone_for_the_next(self, bench):
        """Files, environment, modules, working folder, signal handlers, limits: none of it is inherited."""
        bench.text("""
import builtins, json, math, os, resource, signal, sys
for place in (".", "/job", "/tmp", "/dev/shm"):
    open(place + "/left", "w").write("x")
os.environ["LEFT"] = "x"
math.pi = 3
builtins.print_ = print
json.dumps = None
sys.path.insert(0, "/tmp")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.umask(0)
resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))
""")
        assert bench.json("""
import builtins, json, math, os, resource, signal, sys
left = [place for place in (".", "/job", "/tmp", "/dev/shm") if os.path.exists(place + "/left")]
print(json.dumps([left, "LEFT" in os.environ, math.pi == 3, hasattr(builtins, "print_"), "/tmp" in sys.path,
    signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, os.umask(0o22) == 0,
    resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 10]))
""") == [[], *[False] * 7]

    def test_calls_have_different_users(self, bench):
        """A user id is never used twice in a cell."""
        assert len({bench.text("import os; print(os.getuid())") for _ in range(5)}) == 5

    def test_randomness_differs_between_calls(self, hasty):
        """Each call is seeded anew."""
        code = "import random, uuid; print(random.random(), uuid.uuid4())"
        assert len({hasty.text(code) for _ in range(5)}) == 5

    def test_tracebacks_do_not_tell_calls_apart(self, bench):
        """The same code fails with the same words, so that a model learns nothing of where it ran."""
        assert len({bench.run("1 / 0").stderr for _ in range(3)}) == 1


class TestLeftovers:
    def test_a_daemon_is_killed_and_counted(self, bench):
        """What moved to a session of its own ends with its call, without making the caller wait for it."""
        outcome = bench.run("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nprint('done')")
        assert outcome.ok
        assert outcome.text == "done\n"
        assert outcome.leftovers == 1
        assert bench.json("import os; print(len([p for p in os.listdir('/proc') if p.isdigit()]))") == 3

    def test_stopped_and_stubborn_children_are_killed_too(self, bench):
        """A stopped child and one that ignores every signal."""
        code = """
import os, signal, time
for stop in (True, False):
    if os.fork() == 0:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        if stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)
time.sleep(0.2)
"""
        assert bench.run(code).leftovers == 2
        assert bench.text("print('fine')") == "fine"

    def test_a_child_that_holds_the_output_does_not_hold_the_call(self, bench):
        """The call ends with its first process; what a child writes later is nobody's."""
        code = "import os\nprint('done', flush=True)\nif os.fork() == 0:\n    while True: os.write(1, b'late' * 1000)"
        outcome = bench.run(code)
        assert outcome.ok
        assert outcome.text.startswith("done\n")
        assert bench.text("print('fine')") == "fine"

    @pytest.mark.parametrize("shape", sorted(TREES))
    def test_every_shape_of_tree_is_cleaned(self, bench, shape):
        """Deep, unreadable, linked elsewhere: the next call finds empty places, and it is the same cell."""
        removed = len(bench.reasons())
        assert bench.run(f"import os, shutil, socket\n{TREES[shape]}").ok
        places = "import json, os; print(json.dumps([os.listdir(each) for each in ('/job', '/tmp', '/dev/shm')]))"
        assert bench.json(places) == [["call"], [], []]
        assert len(bench.reasons()) == removed


class TestEscalation:
    def test_frames_cannot_be_forged(self, bench):
        """Whatever a call writes is its output; its result comes from the kernel."""
        code = """
import os, struct
head = b'{"id": "x", "status": "ok", "exit_code": 0, "signal": null, "fork_error": 0}'
frame = struct.pack(">2sBxII", b"LG", 3, len(head), 0) + head + struct.pack(">2sBxII", b"LG", 4, 2, 0) + b"{}"
for descriptor in range(10):
    try: os.write(descriptor, frame)
    except OSError: pass
os._exit(7)
"""
        outcome = bench.run(code)
        assert (outcome.status, outcome.exit_code) == ("nonzero_exit", 7)
        assert outcome.stdout.startswith(b"LG\3")
        assert bench.text("print('fine')") == "fine"

    def test_the_supervisor_and_the_zygote_are_out_of_reach(self, bench):
        """No signal, no tracing, no limits, no priorities, no look into their memory, environment and descriptors."""
        code = """
import ctypes, errno, json, os, resource, signal
libc = ctypes.CDLL(None, use_errno=True)
def trace(pid):
    if libc.ptrace(16, pid, 0, 0) == -1: raise PermissionError
attempts = {
    "kill": lambda pid: os.kill(pid, signal.SIGKILL),
    "stop": lambda pid: os.kill(pid, signal.SIGSTOP),
    "term": lambda pid: os.kill(pid, signal.SIGTERM),
    "mem": lambda pid: open(f"/proc/{pid}/mem", "rb"),
    "environ": lambda pid: open(f"/proc/{pid}/environ", "rb").read(1),
    "maps": lambda pid: open(f"/proc/{pid}/maps", "rb").read(1),
    "auxv": lambda pid: open(f"/proc/{pid}/auxv", "rb").read(1),
    "fd": lambda pid: os.listdir(f"/proc/{pid}/fd"),
    "exe": lambda pid: os.readlink(f"/proc/{pid}/exe"),
    "cwd": lambda pid: os.listdir(f"/proc/{pid}/cwd"),
    "limit": lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, 1)),
    "affinity": lambda pid: os.sched_setaffinity(pid, {0}),
    "priority": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
    "idle": lambda pid: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
    "trace": trace,
    "oom": lambda pid: open(f"/proc/{pid}/oom_score_adj", "w").write("1000"),
}
others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
worked = []
for pid in others:
    for name, attempt in attempts.items():
        try: attempt(pid)
        except PermissionError: continue
        worked.append([name, pid])
print(json.dumps([len(others), worked]))
"""
        assert bench.json(code) == [2, []]
        assert bench.text("import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\nprint('alone')") == "alone"
        assert bench.text("print('fine')") == "fine"

    def test_nobody_becomes_root(self, bench):
        """No capability, no new privileges, no way to another user id."""
        code = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
refused = []
for call, *arguments in (
    (os.setuid, 0), (os.setresuid, 0, 0, 0), (os.setgid, 0), (os.setgroups, [0]), (os.chroot, "/tmp")
):
    try: call(*arguments)
    except PermissionError: refused.append(True)
caps = [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")]
print(json.dumps([len(refused), caps, status["NoNewPrivs"].strip(), status["Seccomp"].strip()]))
"""
        assert bench.json(code) == [5, [0, 0, 0, 0], "1", "2"]

    def test_the_kernel_is_asked_for_nothing_dangerous(self, bench):
        """mount, namespaces, io_uring, raw and netlink sockets, keyrings, bpf, perf, ptrace: EPERM or not there."""
        code = """
import ctypes, errno, json, platform, socket
libc = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"
def native(number, *arguments):
    ctypes.set_errno(0)
    done = libc.syscall(number, *[ctypes.c_ulong(each) for each in arguments])
    return "worked" if done >= 0 else errno.errorcode[ctypes.get_errno()]
found = {}
ctypes.set_errno(0)
found["mount"] = errno.errorcode[ctypes.get_errno()] if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) else "worked"
found["unshare"] = errno.errorcode[ctypes.get_errno()] if libc.unshare(0x10000000) else "worked"
found["clone"] = native(56 if x86 else 220, 0x10000000 | 17, 0, 0, 0, 0)
found["io_uring"] = native(425, 1, 0)
found["bpf"] = native(321 if x86 else 280, 0, 0, 0)
found["perf"] = native(298 if x86 else 241, 0, 0, 0, 0, 0)
found["add_key"] = native(248 if x86 else 217, 0, 0, 0, 0, 0)
found["userfaultfd"] = native(323 if x86 else 282, 0)
found["process_vm_readv"] = native(310 if x86 else 270, 1, 0, 0, 0, 0, 0)
for name, family in (("netlink", 16), ("packet", 17), ("alg", 38), ("vsock", 40)):
    try: socket.socket(family, socket.SOCK_RAW if family in (16, 17) else socket.SOCK_STREAM)
    except OSError as error: found[name] = errno.errorcode[error.errno]
    else: found[name] = "worked"
try: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
except OSError as error: found["raw"] = errno.errorcode[error.errno]
print(json.dumps(found))
"""
        assert bench.json(code) == {
            **dict.fromkeys(("mount", "unshare", "clone", "bpf", "perf", "add_key", "userfaultfd", "raw"), "EPERM"),
            "process_vm_readv": "EPERM",
            "io_uring": "ENOSYS",
            **dict.fromkeys(("netlink", "packet", "alg", "vsock"), "EAFNOSUPPORT"),
        }

    def test_no_program_runs_as_somebody_else(self, bench):
        """The image has no setuid or setgid file, and no compiler or package manager."""
        assert bench.text("find / -xdev -type f -perm /6000 2>/dev/null; true", tool="sh") == ""
        assert bench.text("for t in gcc cc ld apt-get pip; do command -v $t; done; true", tool="sh") == ""


class TestBehaviour:
    @pytest.mark.parametrize(
        ("code", "status", "exit_code", "signal"),
        [
            ("pass", "ok", 0, None),
            ("raise SystemExit", "ok", 0, None),
            ("import sys; sys.exit(3)", "nonzero_exit", 3, None),
            ("import sys; sys.exit('x')", "nonzero_exit", 1, None),
            ("import sys; sys.exit(-1)", "nonzero_exit", 255, None),
            ("import os; os._exit(255)", "nonzero_exit", 255, None),
            ("raise ValueError", "nonzero_exit", 1, None),
            ("def broken(", "nonzero_exit", 1, None),
            ("import os; os.abort()", "signal", None, 6),
            ("import os; os.kill(os.getpid(), 9)", "signal", None, 9),
            ("import ctypes; ctypes.string_at(0)", "signal", None, 11),
            ("def f(): f()\nf()", "nonzero_exit", 1, None),
        ],
    )
    def test_ends(self, bench, code, status, exit_code, signal):
        """How a call ended is told exactly."""
        outcome = bench.run(code)
        assert (outcome.status, outcome.exit_code, outcome.signal) == (status, exit_code, signal)

    def test_words_of_sys_exit_are_on_standard_error(self, bench):
        """As Python does it."""
        assert bench.run("import sys; sys.exit('x')").stderr == b"x\n"

    def test_atexit_and_threads_finish(self, bench):
        """The end of a script is an ordinary end."""
        code = (
            "import atexit, threading, time\natexit.register(print, 'at exit')\n"
            "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('main')"
        )
        assert bench.text(code).split("\n") == ["main", "thread", "at exit"]

    def test_shell(self, bench):
        """The tool `sh` runs a script, of any length, and tells its exit status and signal."""
        assert bench.text("echo $HOME; cat", tool="sh", stdin=b"in") == "/job/call\nin"
        assert bench.run("exit 4", tool="sh").exit_code == 4
        assert bench.run("kill -TERM $$", tool="sh").signal == 15
        assert bench.run("echo " + "x" * 300_000, tool="sh").stdout_bytes == 300_001

    def test_standard_input(self, bench):
        """Text, five megabytes, and input that nobody reads."""
        assert bench.text("print(input(), input())", stdin="ä\nb\n".encode()) == "ä b"
        assert bench.text("import sys; print(len(sys.stdin.buffer.read()))", stdin=bytes(5_000_000)) == "5000000"
        assert bench.text("print('ignored')", stdin=bytes(5_000_000)) == "ignored"
        assert "EOFError" in bench.run("input()").stderr.decode()

    def test_large_code(self, bench):
        """Code is not limited by any buffer on its way."""
        assert bench.text(f"x = '{'y' * 3_000_000}'\nprint(len(x))") == "3000000"

    def test_too_much_to_send_harms_no_cell(self, bench):
        """More than a cell takes is refused before a cell is touched."""
        removed = len(bench.reasons())
        with pytest.raises(CallError, match="16 MiB of code at most, not 17"):
            bench.run("#" * (17 << 20))
        with pytest.raises(CallError, match="256 MiB of standard input at most, not 257"):
            bench.run("pass", stdin=bytes(257 << 20))
        assert len(bench.reasons()) == removed

    def test_bytes_come_back_as_they_were_written(self, bench):
        """Invalid UTF-8, NUL, escape sequences."""
        raw = bytes(range(256))
        outcome = bench.run(f"import os; os.write(1, {raw!r})")
        assert outcome.stdout == raw
        assert "\ufffd" in outcome.text

    @pytest.mark.parametrize("code", ["x = '\ud800'", "x = 1\0", "\ufeffprint(1)\n\udfff"])
    def test_code_that_is_no_text_fails_like_code(self, bench, code):
        """Lone surrogates and NUL bytes in what a model wrote are a mistake of the code, not of the sandbox."""
        assert bench.run(code).status == "nonzero_exit"

    def test_surrogates_can_be_printed(self, bench):
        """What came in undecodable goes out as it was."""
        outcome = bench.run("import sys; print(sys.stdin.read())", stdin=b"\xff\xfe")
        assert outcome.stdout == b"\xff\xfe\n"

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_multiprocessing(self, bench, method):
        """Both ways to start workers."""
        code = (
            "import multiprocessing\ndef square(x): return x * x\n"
            f"if __name__ == '__main__':\n    with multiprocessing.get_context({method!r}).Pool(2) as pool:\n"
            "        print(sum(pool.map(square, range(10))))\n"
        )
        assert bench.text(code) == "285"

    def test_main_is_main(self, bench):
        """Scripts find themselves: name, file, module, source."""
        code = "import inspect, sys\ndef f(): pass\nprint(__name__, __file__, sys.argv, inspect.getsource(f).strip())"
        assert bench.text(code) == "__main__ /job/call/main.py ['main.py'] def f(): pass"


class TestShell:
    """A shell is started from Python at first, and stands by as a shell once the calls before it were shell too."""

    WHO = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp)' /proc/self/status"

    def test_it_has_no_privileges_however_it_was_started(self):
        """One user of its own in all four places, no groups, no capability to have or to get."""
        with Bench() as bench:
            seen = [bench.text(self.WHO, tool="sh") for _ in range(5)]
        for text in seen:
            facts = {name: words.split() for name, _, words in (line.partition(":") for line in text.splitlines())}
            assert len(set(facts["Uid"])) == len(set(facts["Gid"])) == 1
            assert int(facts["Uid"][0]) > 1000
            assert facts["Groups"] == []
            assert facts["CapEff"] == facts["CapPrm"] == facts["CapInh"] == facts["CapAmb"] == ["0" * 16]
            assert (facts["NoNewPrivs"], facts["Seccomp"]) == (["1"], ["2"])
        assert len(set(seen)) == 5

    @pytest.mark.parametrize(
        "script",
        [
            "echo out; echo err >&2; exit 3",
            "no-such-program",
            "if then",
            "echo $0 $# $go; ls -la | wc -l; umask; pwd; env | sort",
            "ulimit -a; cat /proc/self/oom_score_adj; ls /proc/self/fd; trap; kill -l PIPE; yes | head -c 3",
        ],
    )
    def test_it_behaves_alike_however_it_was_started(self, script):
        """The same words, limits, variables and descriptors in the first calls and in later ones."""
        with Bench() as bench:
            seen = [bench.run(script, tool="sh") for _ in range(5)]
        assert len({(each.status, each.exit_code, each.stdout, each.stderr) for each in seen}) == 1

    def test_another_language_after_shell_meets_nothing_of_it(self):
        """What stood by in vain is gone without a trace; files and limits of a call still work."""
        with Bench() as bench:
            for _ in range(3):
                assert bench.text("echo a", tool="sh") == "a"
            assert bench.json("import json, os; print(json.dumps(os.listdir('.')))") == ["main.py"]
            for _ in range(3):
                assert bench.text("echo a", tool="sh") == "a"
            outcome = bench.runtime.run(make_call("cat x", tool="sh", files={"x": b"with a file"}))
            assert outcome.text == "with a file"
            assert bench.reasons() == []
