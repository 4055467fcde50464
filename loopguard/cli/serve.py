"""`loopguard serve`: the tool gate and the sandbox over HTTP."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from types import FrameType

    from loopguard.service import Service

_TOKEN = "LOOPGUARD_TOKEN"  # noqa: S105 - the name of a variable
_SHORTEST = 16

_POLICY = "The guard policy that decides each call."
_RUN_DIR = "Where calls are recorded. Gone on with when it is there; one service at a time."
_HOST = "Address to listen on. Any but a loopback address needs a token."
_PORT = "Port to listen on; 0 takes a free one."
_ON_THE_LINE = f"What clients must show. Seen by everyone who may list processes: prefer --token-file, or {_TOKEN}."
_IN_A_FILE = "A file that holds the token."


def serve(
    policy: Annotated[Path, typer.Option("--policy", metavar="FILE", help=_POLICY)],
    run_dir: Annotated[Path, typer.Option("--run-dir", metavar="DIR", help=_RUN_DIR)],
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help=_HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help=_PORT)] = 8080,
    token: Annotated[str | None, typer.Option("--token", metavar="TOKEN", help=_ON_THE_LINE)] = None,
    token_file: Annotated[Path | None, typer.Option("--token-file", metavar="FILE", help=_IN_A_FILE)] = None,
) -> None:
    """Run tool calls for others, over HTTP with the protocol of SandboxFusion; each is decided and recorded.

    Prints its address when it takes calls. SIGTERM lets running calls end for a few seconds, then ends the rest.

    loopguard serve --policy policies/default.yaml --run-dir runs/serve

    Exit codes: 0 ended by SIGTERM, 2 usage, 3 policy, 5 sandbox, 6 audit log, 7 run directory busy, 130 interrupted.
    """
    import asyncio
    import logging

    from loopguard.controller.station import ToolStation
    from loopguard.errors import InterruptedLoop, PolicyMismatchError
    from loopguard.service import Service

    held = _token(token, token_file)
    if held is None and not _loopback(host):
        raise _usage(
            f"--host {host} lets others than this machine send code to run, so it needs a token: "
            f"set {_TOKEN}, or give --token-file"
        )
    # Until calls are taken, a SIGTERM unwinds what is half open.
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        # The token is not part of what is recorded of the command.
        command = ["serve", "--policy", str(policy), "--run-dir", str(run_dir), "--host", host, "--port", str(port)]
        with _listener(host, port) as listener, ToolStation.open(policy, run_dir=run_dir, command=command) as station:
            logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="loopguard: %(message)s")
            if station.frozen:
                print(f"loopguard: {run_dir} is frozen: every call is refused until it is resumed", file=sys.stderr)
            if asyncio.run(_until_stopped(Service(station, token=held), listener)):
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise InterruptedLoop("interrupted") from None
    except PolicyMismatchError as error:
        said = f"{run_dir} belongs to another guard policy, or to another version of this one; take another --run-dir"
        raise PolicyMismatchError([f"loopguard: {said}"]) from error
    finally:
        signal.signal(signal.SIGTERM, before)


async def _until_stopped(service: Service, listener: socket.socket) -> bool:
    """Serve until SIGTERM or Ctrl-C; gives whether it was the latter. A second signal ends running calls at once."""
    import asyncio

    loop = asyncio.get_running_loop()
    came: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        service.stop(at_once=bool(came))
        came.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await service.serve(listener, on_ready=lambda: print(f"serving on {_url(listener)}", flush=True))
    return came[:1] == [signal.SIGINT]


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _token(given: str | None, file: Path | None) -> str | None:
    """The token from where it was given. What is there and cannot be one is an error, never no token."""
    if given is not None and file is not None:
        raise _usage("--token and --token-file are both given; keep one")
    if given is not None:
        print(f"loopguard: --token is seen by everyone who may list processes; prefer {_TOKEN}", file=sys.stderr)
        return _sound(given, "--token")
    if file is not None:
        try:
            return _sound(file.read_text(encoding="utf-8").strip(), f"--token-file {file}")
        except UnicodeDecodeError:
            raise _usage(f"--token-file {file} is not text") from None
    if (held := os.environ.get(_TOKEN)) is not None:
        return _sound(held, _TOKEN)
    return None


def _sound(token: str, source: str) -> str:
    if len(token) < _SHORTEST:
        raise _usage(f"{source}: a token of {len(token)} characters can be guessed; take {_SHORTEST} or more")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise _usage(f"{source}: a token consists of letters, digits and signs of ASCII, without spaces")
    return token


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listener(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: nobody connects before calls can be taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise _usage(f"cannot listen on {host}, port {port}: {said}; choose another --host or --port") from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _usage(text: str) -> Exception:
    from loopguard.errors import UsageError

    return UsageError(text)
