"""Egress from real cells: what is permitted works for an ordinary client, everything else goes nowhere."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from sandbox_kit import Bench, make_call

from loopguard.errors import SandboxUnavailableError
from loopguard.sandbox import egress
from loopguard.sandbox.base import EgressRule

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.docker

PUBLIC = "93.184.215.14"
BODY = bytes(range(256)) * 8192  # 2 MiB: more than any window


class Site(http.server.BaseHTTPRequestHandler):
    """Answers GET with 2 MiB and POST with how much came."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        text = str(len(self.rfile.read(size))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""


@pytest.fixture(scope="module")
def outside() -> Iterator[Bench]:
    """A cell that may reach site.example:80, which leads to a server of this test; and names that lead elsewhere."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    names = {"site.example": [PUBLIC], "inside.example": ["10.0.0.7"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(egress, "_resolve", lambda host, port: names[host])
        patch.setattr(egress, "_connect", lambda *_: socket.create_connection(server.server_address[:2]))
        rules = tuple(EgressRule(host=name, port=80) for name in names)
        with Bench(egress=rules, wall_s=30) as bench:
            yield bench
    server.shutdown()
    server.server_close()
    thread.join()


def told(bench: Bench) -> list[tuple[str, str]]:
    """Host and result of every connection so far."""
    return [(body["host"], body["result"]) for name, body in bench.events if name == "tool.egress"]


class TestEgress:
    def test_an_ordinary_client_gets_through(self, outside):
        """urllib, with no settings of its own: 2 MiB down, 2 MiB up, several at once; recorded before and after."""
        before = len(told(outside))
        code = f"""
import concurrent.futures, hashlib, urllib.request
def get(_): return len(urllib.request.urlopen("http://site.example/").read())
with concurrent.futures.ThreadPoolExecutor(4) as threads: print(set(threads.map(get, range(8))))
print(urllib.request.urlopen("http://site.example/", data=bytes({len(BODY)})).read().decode())
"""
        assert outside.text(code) == f"{{{len(BODY)}}}\n{len(BODY)}"
        assert told(outside)[before:].count(("site.example", "permitted")) == 9
        assert told(outside)[before:].count(("site.example", "allowed")) == 9

    @pytest.mark.parametrize(
        "url", ["http://other.example/", "http://site.example:81/", f"http://{PUBLIC}/", "http://inside.example/"]
    )
    def test_every_other_place_is_refused(self, outside, url):
        """Another host, another port, an address, a name that leads inside."""
        code = f"import urllib.request, urllib.error\ntry: urllib.request.urlopen({url!r})\n"
        assert outside.text(code + "except urllib.error.HTTPError as error: print(error.code)") == "403"

    def test_there_is_no_other_way_out(self, outside):
        """No interface, no name server, no gateway: the proxy is all there is, and the next call starts clean."""
        code = """
import json, os, socket
found = [os.listdir("/sys/class/net")]
for place in (("8.8.8.8", 53), ("172.17.0.1", 80), ("169.254.169.254", 80)):
    try: socket.create_connection(place, timeout=2); found.append(place)
    except OSError: pass
try: found.append(socket.getaddrinfo("site.example", 80))
except OSError: pass
print(json.dumps(found))
"""
        assert outside.json(code) == [["lo"]]

    def test_a_connection_ends_with_its_call(self, outside):
        """A call that leaves a connection open leaves nothing for the next one, which can connect again."""
        code = "import os, socket\ns = socket.create_connection(('127.0.0.1', 8118))\n"
        code += "s.sendall(b'GET http://site.example/ HTTP/1.1\\r\\nHost: site.example\\r\\n\\r\\n')\nos._exit(0)"
        for _ in range(3):
            assert outside.run(code).ok
        assert json.loads(outside.text("import json, os; print(json.dumps(os.listdir('.')))")) == ["main.py"]
        assert outside.reasons() == []

    def test_a_cell_without_egress_has_no_proxy(self, bench):
        """Neither the variable nor the port."""
        code = "import os, socket\nprint([name for name in os.environ if 'proxy' in name.lower()])\n"
        assert bench.text(code) == "[]"
        assert bench.run("import socket; socket.create_connection(('127.0.0.1', 8118))").status == "nonzero_exit"

    def test_much_input_and_a_connection_at_once(self, outside):
        """Standard input that is not read does not hold up what the call does meanwhile, and neither deadlocks."""
        code = "import sys, urllib.request\nsys.stdin.buffer.read()\n"
        code += "print(len(urllib.request.urlopen('http://site.example/').read()))"
        assert outside.runtime.run(make_call(code, stdin=bytes(8 << 20))).text == f"{len(BODY)}\n"

    def test_a_secret_that_is_not_there_stops_the_start(self):
        """With the name of the variable."""
        rule = EgressRule(host="api.example", port=443, secret_headers=(("Authorization", "NO_SUCH_VARIABLE"),))
        with pytest.raises(SandboxUnavailableError, match="NO_SUCH_VARIABLE"):
            Bench(egress=(rule,)).runtime.start()
