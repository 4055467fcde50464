"""What one call could leave for the next to find, although nothing of it lives and no file is there."""

from __future__ import annotations

import platform

import pytest
from sandbox_kit import Bench, cells, make_call

from loopguard.errors import SandboxUnavailableError
from loopguard.sandbox.engine import Engine

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module", params=["multi", "strict"])
def either(request):
    """Both kinds of pooled cells."""
    with Bench(privileges=request.param) as bench:
        yield bench


X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls are called by their numbers on x86_64")


class TestTraces:
    @X86
    def test_flow_labels_cannot_be_made(self, either):
        """They belong to the network namespace and stay for a minute after their process."""
        code = """
import socket, struct
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
request = b'left for the nxt' + struct.pack('>I', 7) + struct.pack('=BBHHHI', 0, 255, 1, 0, 60, 0)
for level, option in ((41, 32), ((1 << 32) + 41, 32), (41, (1 << 32) + 32)):
    try: print(s.setsockopt(level & 0xffffffff, option & 0xffffffff, request))
    except OSError as error: print(error.errno)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
wide = ctypes.c_long((1 << 32) + 41), ctypes.c_long(32)
print(libc.syscall(54, s.fileno(), *wide, request, len(request)), ctypes.get_errno())
"""
        assert either.text(code).splitlines() == ["1", "1", "1", "-1 1"]
        assert either.text("cat /proc/net/ip6_flowlabel | wc -l", tool="sh") in {"0", "1"}

    def test_options_that_programs_need_can_be_set(self, either):
        """Of sockets, TCP, IPv4 and IPv6."""
        code = """
import socket as s
for family in (s.AF_INET, s.AF_INET6):
    with s.socket(family) as each:
        each.setsockopt(s.SOL_SOCKET, s.SO_REUSEADDR, 1)
        each.setsockopt(s.IPPROTO_TCP, s.TCP_NODELAY, 1)
with s.socket(s.AF_INET6) as each: each.setsockopt(s.IPPROTO_IPV6, s.IPV6_V6ONLY, 1)
with s.socket(s.AF_INET, s.SOCK_DGRAM) as each: each.setsockopt(s.IPPROTO_IP, s.IP_TTL, 3)
print('fine')
"""
        assert either.text(code) == "fine"

    def test_times_of_what_everybody_may_touch_are_set_back(self, bench):
        """A device's, and those of the places that calls write to."""
        look = "import os; print([os.stat(p).st_mtime_ns for p in ('/dev/null', '/dev/zero', '/tmp', '/dev/shm')])"
        before = bench.text(look)
        bench.text("import os\nfor p in ('/dev/null', '/dev/zero'): os.utime(p)\nopen('/tmp/x', 'w').close()")
        assert bench.text(look) == before

    def test_syncing_the_machine_is_told_as_done(self, either):
        """And is not: it would make the whole host write."""
        assert either.text("import os; os.sync(); print('fine')") == "fine"

    @X86
    def test_nobody_else_can_be_made_a_parent(self, either):
        """CLONE_PARENT would leave the zygote a child that it does not know."""
        code = "import ctypes, signal; libc = ctypes.CDLL(None, use_errno=True)\n"
        code += "print(libc.syscall(56, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0), ctypes.get_errno())"
        assert either.text(code) == "-1 1"


class TestFaultsThatCodeCouldCause:
    def test_names_that_are_long_in_a_frame_are_cut_off_before(self, bench):
        """A tree of long names is too many files, and not a broken sandbox."""
        code = """
import os
for _ in range(7):
    os.mkdir('\\U0001f600' * 60); os.chdir('\\U0001f600' * 60)
for n in range(1400): os.mkfifo(f'{n}' + '\\U0001f600' * 50)
"""
        outcome = bench.runtime.run(make_call(code, fetch=(".",)))
        assert outcome.ok
        assert outcome.not_fetched

    def test_a_long_script_meets_the_disk_and_not_the_supervisor(self, bench):
        """Also where a shell stands by."""
        for _ in range(3):
            assert bench.text("echo a", tool="sh") == "a"
        assert bench.run("#" * (9 << 20), tool="sh").status == "disk_limit"
        assert bench.text("print('fine')") == "fine"

    @pytest.mark.parametrize("tool", ["python", "sh"])
    def test_a_time_that_is_over_at_once(self, tool):
        """Nothing of such a call runs on, and the cell lasts."""
        with Bench(preload=("numpy",)) as bench:
            for _ in range(10):
                call = make_call(
                    "while true; do :; done" if tool == "sh" else "while True: pass", tool=tool, wall_s=1e-4
                )
                assert bench.runtime.run(call).status == "timeout"
            assert bench.text("print('fine')") == "fine"
            assert bench.reasons() == []

    def test_an_earlier_memory_bomb_does_not_explain_a_lost_cell(self):
        """What is told of a call is of that call."""
        with Bench(mode="episode") as bench, bench.runtime.episode() as episode:
            assert episode.run(make_call("x = bytearray(1 << 30)")).status == "oom"
            (cell,) = [each for each in cells(bench.run_id) if episode._cell.name in each["Names"][0]]
            with Engine() as engine:
                engine.remove(cell["Id"])
            with pytest.raises(SandboxUnavailableError):
                episode.run(make_call("print(1)"))
