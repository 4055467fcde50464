"""Episodes, files in and out, strict cells, programs with arguments. In real containers."""

from __future__ import annotations

import json
import threading

import pytest
from sandbox_kit import Bench, make_call, until

from loopguard.errors import CallError, SandboxUnavailableError

pytestmark = pytest.mark.docker

PROCESSES = "import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit())[2:] == [os.getpid()])"


@pytest.fixture(scope="module")
def strict():
    with Bench(privileges="strict", wall_s=3) as bench:
        yield bench


class TestEpisodes:
    def test_files_stay_and_processes_do_not(self):
        """What a call writes is there for the next; what it left running is not."""
        with Bench(mode="episode") as bench, bench.runtime.episode() as episode:
            code = "import os, time\nopen('note', 'w').write('x')\nif os.fork() == 0:\n    time.sleep(600)"
            assert episode.run(make_call(code)).leftovers == 1
            assert episode.run(make_call("cat note", tool="sh")).text == "x"
            assert episode.run(make_call(PROCESSES)).text == "True\n"

    def test_the_code_of_a_call_is_not_among_the_files_of_the_rollout(self):
        """A rollout that writes a main.py keeps it, and can import it."""
        with Bench(mode="episode") as bench, bench.runtime.episode() as episode:
            assert episode.run(make_call("open('main.py', 'w').write('x = 7')")).ok
            assert episode.run(make_call("import main; print(main.x)")).text == "7\n"
            assert episode.run(make_call("cat main.py", tool="sh")).text == "x = 7"

    def test_background_processes_live_on_when_asked_for(self):
        """With `background` a server started by one call answers the next one, and ends with the episode."""
        with Bench(mode="episode", background=True) as bench:
            with bench.runtime.episode() as episode:
                server = "import os, socket\ns = socket.create_server(('127.0.0.1', 9000))\nif os.fork() == 0:\n"
                server += "    c, _ = s.accept(); c.send(b'here'); os._exit(0)"
                assert episode.run(make_call(server)).ok
                ask = "import socket; print(socket.create_connection(('127.0.0.1', 9000)).recv(9))"
                assert episode.run(make_call(ask)).text == "b'here'\n"
            assert until(lambda: bench.reasons() == ["closed"])

    def test_a_time_limit_ends_background_processes_too(self):
        """A call that was ended leaves nothing that could go on in its name."""
        with Bench(mode="episode", background=True, wall_s=1) as bench, bench.runtime.episode() as episode:
            code = "import os, time\nif os.fork() == 0:\n    time.sleep(600)\ntime.sleep(600)"
            assert episode.run(make_call(code)).status == "timeout"
            assert episode.run(make_call(PROCESSES)).text == "True\n"

    def test_episodes_do_not_meet(self):
        """Each has a container of its own, and none is used again."""
        with Bench(mode="episode", cells=2) as bench:
            with bench.runtime.episode() as one, bench.runtime.episode() as two:
                assert one.run(make_call("open('note', 'w').close()")).ok
                assert two.run(make_call("import os; print(os.listdir('.'))")).text == "[]\n"
            assert until(lambda: bench.reasons() == ["closed", "closed"])
            with bench.runtime.episode() as three:
                assert three.run(make_call("import os; print(os.listdir('.'))")).text == "[]\n"

    def test_a_call_without_an_episode_is_one_of_its_own(self):
        """`run` on episode cells: a new container for each call."""
        with Bench(mode="episode", cells=1) as bench:
            assert bench.text("open('note', 'w').close()") == ""
            assert bench.text("import os; print(os.listdir('.'))") == "[]"

    def test_an_episode_survives_a_memory_bomb_and_ends_with_its_cell(self):
        """The bomb costs its own process; a lost cell ends the episode, and later calls are told so."""
        with Bench(mode="episode") as bench:
            episode = bench.runtime.episode()
            assert episode.run(make_call("open('note', 'w').close(); x = bytearray(1 << 30)")).status == "oom"
            assert episode.run(make_call("ls", tool="sh")).text.split() == ["note"]
            waiting = threading.Timer(0.5, lambda: episode.kill("the caller went away"))
            waiting.start()
            with pytest.raises(SandboxUnavailableError, match="the caller went away"):
                episode.run(make_call("import time; time.sleep(60)"))
            with pytest.raises(SandboxUnavailableError, match="the episode is over"):
                episode.run(make_call("print(1)"))
            episode.close()


class TestFiles:
    def test_files_go_in_and_come_back(self, bench):
        """With folders, empty files, bytes of every kind; folders come back whole."""
        files = {"a.bin": bytes(range(256)), "deep/er/b.txt": b"hello", "empty": b""}
        code = "import os, shutil\nshutil.copytree('deep', 'out')\nos.mkdir('none')"
        call = make_call(code, files=files, fetch=("a.bin", "out", "empty", "none", "absent"))
        outcome = bench.runtime.run(call)
        assert outcome.files == {"a.bin": bytes(range(256)), "out/er/b.txt": b"hello", "empty": b""}
        assert outcome.not_fetched == {"absent": "no such file or directory"}
        assert bench.json("import json, os; print(json.dumps(os.listdir('.')))") == ["main.py"]

    def test_everything_can_be_asked_for(self, bench):
        """`.` is the whole folder of the call."""
        outcome = bench.runtime.run(make_call("open('x', 'w').write('1')", fetch=(".",)))
        assert outcome.files == {"main.py": b"open('x', 'w').write('1')", "x": b"1"}

    def test_files_of_a_call_that_failed_come_back_too(self, hasty):
        """Also of one that was ended by its time limit."""
        outcome = hasty.runtime.run(make_call("open('x', 'w').write('1')\nwhile True: pass", fetch=("x",)))
        assert (outcome.status, outcome.files) == ("timeout", {"x": b"1"})

    @pytest.mark.parametrize(
        "names", [("/etc/passwd",), ("../x",), ("a/../../x",), ("",), ("a//b",), ("x" * 300,), ("a\0b",), ("\ud800",)]
    )
    def test_names_that_lead_elsewhere_are_refused(self, bench, names):
        """Before a cell is touched, in both directions, with the name."""
        with pytest.raises(CallError, match="is no name for a file"):
            bench.runtime.run(make_call("pass", fetch=names))
        with pytest.raises(CallError, match="is no name for a file"):
            bench.runtime.run(make_call("pass", files=dict.fromkeys(names, b"")))

    def test_a_file_cannot_be_a_folder_too(self, bench):
        """Two names that need each other to be something else."""
        with pytest.raises(CallError, match="'a' is the name of a file and of a folder"):
            bench.runtime.run(make_call("pass", files={"a": b"", "a/b": b""}))

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("os.symlink('/etc/passwd', 'x')", "too many levels of symbolic links"),
            ("os.mkfifo('x')", "it is not a regular file"),
            ("socket.socket(socket.AF_UNIX).bind('x')", "no such device or address"),
            ("open('x', 'w').truncate(12 << 20)", "it is larger than what may come back"),
            ("open('x', 'w').close(); os.chmod('x', 0)", "permission denied"),
            ("os.makedirs('x/' + '/'.join('abcdefghij'))", "it is more than 8 folders deep"),
            ("os.mkdir('x'); [open(f'x/{n}', 'w').close() for n in range(70)]", "there are too many files"),
            ("os.mkdir('x'); open(b'x/\\xff', 'w').close()", "its name is not UTF-8"),
        ],
    )
    def test_what_is_no_plain_file_does_not_come_back(self, bench, code, reason):
        """Links, pipes, sockets, giants, deep and wide trees: named with the reason, and nothing hangs."""
        outcome = bench.runtime.run(make_call(f"import os, socket\n{code}", fetch=("x",)))
        assert outcome.ok, outcome.stderr
        assert reason in outcome.not_fetched.values()

    def test_a_folder_that_became_a_link_is_not_followed(self, bench):
        """Nor is the call's own folder."""
        code = "import os\nos.symlink('/etc', 'y')"
        assert bench.runtime.run(make_call(code, fetch=("y/passwd",))).files == {}
        code = "import os, shutil\nos.chdir('/')\nshutil.rmtree('/job/call')\nos.symlink('/etc', '/job/call')"
        outcome = bench.runtime.run(make_call(code, fetch=("passwd",)))
        assert (outcome.files, outcome.not_fetched) == ({}, {"passwd": "the call's folder is gone"})

    def test_much_input_streams_through(self, bench):
        """50 MiB of standard input through a cell with less than that to spare, read or not."""
        data = bytes(50 << 20)
        assert bench.text("wc -c", tool="sh", stdin=data) == str(50 << 20)
        assert bench.text("print('never read')", stdin=data) == "never read"
        assert bench.text("exec <&-; sleep 0.1; echo closed", tool="sh", stdin=data) == "closed"
        assert bench.text("print('fine')") == "fine"


class TestPrograms:
    def test_a_program_with_its_arguments(self, bench):
        """No shell in between; variables and folder of the caller's choice."""
        request = {
            "argv": ["sh", "-c", 'echo "$1 $WHO"; pwd', "sh", "two  blanks; $(id)"],
            "env": {"WHO": "me"},
            "cwd": "/tmp",
        }
        assert bench.text(json.dumps(request), tool="exec") == "two  blanks; $(id) me\n/tmp"

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            ({"argv": ["no-such-program"]}, 127),
            ({"argv": ["/etc/passwd"]}, 126),
            ({"argv": ["true"], "cwd": "/nowhere"}, 125),
        ],
    )
    def test_what_cannot_be_run_says_so(self, bench, request_, status):
        """With the status that shells give."""
        outcome = bench.run(json.dumps(request_), tool="exec")
        assert (outcome.status, outcome.exit_code) == ("nonzero_exit", status)
        assert outcome.stderr


class TestSmallerLimits:
    def test_a_call_may_ask_for_less_time(self, bench):
        """Its own limit, where that is shorter; a longer one changes nothing."""
        assert bench.runtime.run(make_call("import time; time.sleep(30)", wall_s=0.3)).status == "timeout"

    def test_a_call_may_ask_for_less_memory(self, bench):
        """Python says so itself."""
        outcome = bench.runtime.run(make_call("x = bytearray(100 << 20)", memory_mib=64))
        assert b"MemoryError" in outcome.stderr

    @pytest.mark.parametrize("wall_s", [0, -1, float("nan"), float("inf")])
    def test_limits_that_are_none_are_refused(self, bench, wall_s):
        """Zero, negative, not a number, endless."""
        with pytest.raises(CallError, match="a time limit is a finite number of seconds above 0"):
            bench.runtime.run(make_call("pass", wall_s=wall_s))


class TestStrict:
    def test_nobody_in_the_cell_has_any_privilege(self, strict):
        """Neither PID 1 nor the call: not root, no capability to be had."""
        code = "print(*[open(f'/proc/{p}/status').read().split('CapBnd:\\t')[1][:16] for p in (1, 'self')])"
        assert strict.text(code) == "0" * 16 + " " + "0" * 16
        assert strict.text("import os; print(os.getuid() == os.stat('/proc/self').st_uid != 0)") == "True"

    def test_a_call_that_kills_everything_it_can_reach_has_its_status(self, strict):
        """The zygote goes with it, the supervisor does not, and the next call is clean."""
        outcome = strict.run("import os\nos.kill(-1, 9)")
        assert outcome.status in {"ok", "signal"}
        outcome = strict.run(
            "import os, signal\nfor n in range(1, 32):\n    try: os.kill(1, n)\n    except OSError: pass\nos._exit(7)"
        )
        assert outcome.exit_code == 7
        assert strict.text(PROCESSES) == "True"

    def test_limits_hold(self, strict):
        """Time, processes, memory, leftovers."""
        assert strict.run("while True: pass").status == "timeout"
        assert strict.run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass").status == "pids_limit"
        assert strict.run("x = bytearray(1 << 30)").status == "oom"
        code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nopen('/tmp/x', 'w').close()"
        assert strict.run(code).leftovers == 1
        assert strict.text(PROCESSES) == "True"
        assert strict.text("ls /tmp /dev/shm", tool="sh") == "/dev/shm:\n\n/tmp:"
