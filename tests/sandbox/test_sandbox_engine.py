"""An engine that is stopped and started under load: calls fail in time, nothing hangs, and later calls work again.

It is an engine of the test's own, beside the one that is used otherwise, with its own folders and its own socket.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sandbox_kit import IMAGE, Bench, cells, until

from loopguard.errors import SandboxUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.docker, pytest.mark.slow]

LONG = "import time; time.sleep(30)"
CALLERS = 4


class OwnEngine:
    """A second dockerd with a containerd of its own, in a folder of its own. Lives until `remove`."""

    def __init__(self) -> None:
        # Not below the folder of the test: the name of a socket has room for about a hundred characters.
        self.folder = Path(tempfile.mkdtemp(prefix="lg", dir="/tmp"))
        self.host = f"unix://{self.folder}/s"
        # Not the folder's own name, in which "_" may come last or twice: containerd refuses that.
        self._namespace = f"lg{secrets.token_hex(4)}"
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        (self.folder / "none.json").write_text("{}")
        # Of one that was killed: it is taken for alive while the machine's first process has not waited for it.
        (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)
        words = ["--config-file", self.folder / "none.json", "--data-root", self.folder / "root"]
        words += ["--exec-root", self.folder / "exec", "--pidfile", self.folder / "pid", "-H", self.host]
        words += ["--containerd-namespace", self._namespace, "--containerd-plugins-namespace", f"{self._namespace}p"]
        words += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--storage-driver=overlay2"]
        with (self.folder / "log").open("ab") as log:
            self._daemon = subprocess.Popen(
                ["dockerd", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "DOCKER_HOST": ""},
            )
        if not until(self._answers, within_s=30):
            raise OSError((self.folder / "log").read_text()[-500:])

    def load(self, image: str) -> None:
        """Copy an image of the engine in use into this one."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            self.docker("load", stdin=saved.stdout)

    def docker(self, *words: str, **options: Any) -> str:
        """What the docker command says of this engine."""
        command = ["docker", "-H", self.host, *words]
        return subprocess.run(command, check=True, timeout=60, stdout=subprocess.PIPE, text=True, **options).stdout

    def stop(self, how: signal.Signals) -> None:
        """End it: in its own good time, or at once and its containerd with it."""
        assert self._daemon is not None
        with_it = [pid for pid in self._processes("containerd") if pid != self._daemon.pid]
        self._daemon.send_signal(how)
        if how == signal.SIGKILL:
            for pid in with_it:
                os.kill(pid, how)
        self._daemon.wait(timeout=30)
        assert until(lambda: not self._processes("containerd"), within_s=10)

    def remove(self) -> None:
        """End all that is left of it, and take its folder away."""
        if self._daemon is not None and self._daemon.poll() is None:
            self._daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._daemon.wait(timeout=20)
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._daemon is not None:
            self._daemon.wait(timeout=10)
        until(self._gone, within_s=10)

    def _gone(self) -> bool:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if (place := line.split()[4]).startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", place], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        return not self.folder.exists()

    def _answers(self) -> bool:
        assert self._daemon is not None
        if self._daemon.poll() is not None:
            raise OSError((self.folder / "log").read_text()[-500:])
        command = ["docker", "-H", self.host, "version"]
        return subprocess.run(command, check=False, capture_output=True, timeout=20).returncode == 0

    def _processes(self, program: str = "") -> list[int]:
        """Those that were started for this engine: its folder stands in their command line."""
        found = []
        for each in Path("/proc").iterdir():
            with suppress(OSError):
                words = (each / "cmdline").read_bytes().split(b"\0") if each.name.isdigit() else []
                its = any(f"{self.folder}/".encode() in word for word in words)
                if its and (not program or Path(os.fsdecode(words[0])).name == program):
                    found.append(int(each.name))
        return found


@pytest.fixture(scope="module")
def engine() -> Iterator[OwnEngine]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("an engine of its own needs root and dockerd")
    engine = OwnEngine()
    try:
        try:
            engine.start()
        except OSError as error:
            pytest.skip(f"no second engine can be started here: {error}")
        engine.load(IMAGE)
        yield engine
    finally:
        engine.remove()


class Callers:
    """Threads that call all the time, and what came of each call: what was run, when it began and ended, the result."""

    def __init__(self, bench: Bench) -> None:
        self.code = "print(7)"
        self.calls: list[tuple[str, float, float, str | type[Exception]]] = []
        self.under_way: dict[int, str] = {}
        self._bench = bench
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,), daemon=True) for number in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _call(self, number: int) -> None:
        while not self._over.wait(0.02):
            code, began = self.code, time.monotonic()
            self.under_way[number] = code
            try:
                result: str | type[Exception] = self._bench.run(code).text
            except Exception as error:  # noqa: BLE001 - the test looks at what it is
                result = type(error)
            del self.under_way[number]
            self.calls.append((code, began, time.monotonic(), result))

    def of(self, code: str) -> list[tuple[float, str | type[Exception]]]:
        """When each call of this code ended, and its result."""
        return [(ended, result) for its, _, ended, result in list(self.calls) if its == code]

    def begun_after(self, moment: float) -> list[tuple[float, str | type[Exception]]]:
        """How long each later call took, and its result."""
        return [(ended - began, result) for _, began, ended, result in list(self.calls) if began > moment]

    def end(self) -> None:
        """No further call; all threads come home."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in self._threads), "a caller hangs"


# The docker client leaves the socket of a connection that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_an_engine_that_stops_and_starts_under_load(engine, monkeypatch, how):
    """Calls in flight are lost and say so, calls meanwhile fail and run nowhere else, later ones work again."""
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    with Bench(cells=2, wall_s=40) as bench:
        callers = Callers(bench)
        try:
            assert until(lambda: [result for *_, result in callers.calls].count("7\n") >= 40)
            callers.code = LONG
            assert until(lambda: list(callers.under_way.values()) == [LONG] * CALLERS)
            assert until(lambda: len(bench.runtime._pool._taken) == 2)

            callers.code = "print(8)"
            stopped = time.monotonic()
            engine.stop(how)
            down = time.monotonic()
            assert until(lambda: len(callers.of(LONG)) == CALLERS, within_s=20)
            assert {result for _, result in callers.of(LONG)} == {SandboxUnavailableError}
            assert max(ended for ended, _ in callers.of(LONG)) - stopped < 20

            assert until(lambda: len(callers.begun_after(down)) >= 8, within_s=20)
            meanwhile = callers.begun_after(down)
            assert {result for _, result in meanwhile} == {SandboxUnavailableError}
            assert max(took for took, _ in meanwhile) < 10

            engine.start()
            up = time.monotonic()
            assert until(lambda: [result for _, result in callers.begun_after(up)].count("8\n") >= 20)
        finally:
            callers.end()
        assert bench.text("print('fine')") == "fine"
        closing = time.monotonic()
    assert time.monotonic() - closing < 20
    assert until(lambda: not cells(bench.run_id), within_s=10)
    assert engine.docker("ps", "-aq") == ""
    gc.collect()
