"""The tool gate and the sandbox over HTTP, in the words of SandboxFusion, so that its clients need another URL only.

Here: what a request may say, what an Outcome becomes in the answer, who may ask, when an answer is due, and how the
service goes down. Each call is decided, recorded and run by a ToolStation, as in a loop; this module decides nothing.

Not here: TLS, which belongs to a proxy in front, and `/run_jupyter`. Its cells share one process, so that guard policy
and audit log would judge a program of ours instead of the cells, and times, outputs and errors of single cells would be
what that process says of itself. docs/serve.md describes the protocol and every difference.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import signal
import uuid
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from loopguard.errors import AuditError, CallError, SandboxBusyError, SandboxError, SandboxUnavailableError, UsageError
from loopguard.types import Outcome, OutcomeStatus, ToolCall

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ModuleNotFoundError as error:
    raise UsageError(f"the HTTP service needs {error.name}: pip install 'loopguard[serve]'") from error

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping
    from typing import Self

    from starlette.types import ASGIApp, Receive, Scope, Send

    from loopguard.controller.station import ToolStation

_LOG = logging.getLogger("loopguard.service")

TOOLS: dict[str, str] = {"python": "python", "bash": "sh"}
"""What the protocol calls a language, and the tool of the guard policy that it is."""

DENIED = 126
"""The return code of a call that the tool gate refused; what a shell says of a command that may not be run."""

_BODY_MIB = 64
_HELD_MIB = 512
"""Of all requests together that are not answered yet: the queue counts calls, and a call may be small or large."""
_UPLOAD_S = 60.0
_SLACK_S = 8.0
"""Clients give up this long, and two seconds more, after the time that they allow for compiling and running."""
_GRACE_S = 3.0
_KEEP_ALIVE_S = 75
"""Longer than clients keep a connection that they do not use, so that none is closed under a request."""

_WALLS: dict[OutcomeStatus, str] = {
    "oom": "it ran out of memory",
    "pids_limit": "it reached the limit of processes",
    "output_limit": "it wrote more than it may",
    "disk_limit": "it filled its disk",
}


def _decoded(written: object) -> object:
    if not isinstance(written, str):
        return written
    try:
        # Many encoders break their lines, and nothing but white space may stand between the letters.
        return binascii.a2b_base64("".join(written.split()), strict_mode=True)
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from error


def _no_arguments(written: object) -> object:
    if written:
        raise ValueError("no language here takes arguments")
    return written


Base64 = Annotated[bytes, BeforeValidator(_decoded)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
PositiveSeconds = Annotated[float, Field(gt=0, le=86_400)]


class RunCode(BaseModel):
    """What `POST /run_code` may say. Fields that are not here are ignored, as SandboxFusion does."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    code: str
    language: Literal["python", "bash"]
    compile_timeout: Seconds = 10.0
    run_timeout: PositiveSeconds = 10.0
    memory_mib: Annotated[int, Field(alias="memory_limit_MB", ge=-1, le=1 << 20)] = -1
    """MiB, whatever the protocol calls them; -1 and 0 are no limit of its own."""
    stdin: str | None = None
    files: dict[str, Base64 | None] = {}
    fetch_files: list[str] = []
    args: Annotated[list[str], BeforeValidator(_no_arguments)] = []

    @model_validator(mode="after")
    def _each_file_once(self) -> Self:
        named = [_plain(name) for name in self.files]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(f"files: {twice[0]!r} is named twice")
        return self

    @property
    def patience_s(self) -> float:
        """When to answer at the latest: a little before the client stops listening."""
        return self.compile_timeout + self.run_timeout + _SLACK_S

    def call(self) -> ToolCall:
        """The same as the tool gate takes it."""
        return ToolCall(
            id=uuid.uuid4().hex,
            tool=TOOLS[self.language],
            code=self.code,
            stdin=(self.stdin or "").encode(),
            files={_plain(name): content for name, content in self.files.items() if content is not None},
            fetch=tuple(dict.fromkeys(_plain(name) for name in self.fetch_files)),
            wall_s=self.run_timeout,
            memory_mib=self.memory_mib if self.memory_mib > 0 else None,
        )


def answer(outcome: Outcome, *, asked: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """What a client is told of an outcome. `asked` are the names of files as the client wrote them.

    `SandboxError` is never among it: clients take that for a fault of ours and send the same call again.
    """
    timed_out = outcome.status == "timeout"
    body = _body(
        "Success" if outcome.ok else "Failed",
        result={
            "status": "TimeLimitExceeded" if timed_out else "Finished",
            "execution_time": outcome.wall_ms / 1000,
            "return_code": None if timed_out else _return_code(outcome),
            "stdout": outcome.stdout.decode(errors="replace"),
            "stderr": _stderr(outcome),
        },
    )
    written_as = {_plain(name): name for name in asked}
    for name, content in outcome.files.items():
        body["files"][_printable(written_as.get(name, name))] = base64.b64encode(content).decode()
    if outcome.not_fetched:
        body["not_fetched"] = {
            _printable(written_as.get(name, name)): reason for name, reason in outcome.not_fetched.items()
        }
    return body


def fault(reason: str) -> dict[str, Any]:
    """What a client is told where the sandbox could not do its work."""
    result = {"status": "Error", "execution_time": None, "return_code": None, "stdout": "", "stderr": reason}
    return _body("SandboxError", message=reason, result=result)


def _body(status: str, *, result: Mapping[str, Any], message: str = "") -> dict[str, Any]:
    return {
        "status": status,
        "message": message,
        "compile_result": None,
        "run_result": result,
        "executor_pod_name": None,
        "files": {},
    }


def _return_code(outcome: Outcome) -> int:
    """The exit status, or minus a signal as Python says it. What did not go well is never 0."""
    if outcome.ok:
        return 0
    if outcome.status == "denied":
        return DENIED
    # A call whose child ran out of memory may itself have exited with 0.
    return outcome.exit_code or -(outcome.signal or signal.SIGKILL)


def _stderr(outcome: Outcome) -> str:
    if outcome.status == "denied":
        return f"{outcome.refusal}\n"
    told = outcome.stderr.decode(errors="replace")
    remarks = [f"the call was ended: {_WALLS[outcome.status]}"] if outcome.status in _WALLS else []
    for stream, kept, written in (
        ("standard output", len(outcome.stdout), outcome.stdout_bytes),
        ("standard error", len(outcome.stderr), outcome.stderr_bytes),
    ):
        if written > kept:
            remarks.append(f"of {written} bytes of {stream}, the first and the last are here, {kept} in all")
    if remarks and told and not told.endswith("\n"):
        told += "\n"
    return told + "".join(f"sandbox: {remark}\n" for remark in remarks)


def _plain(name: str) -> str:
    """Without the parts of a name that lead nowhere, such as `./`. What leads elsewhere is the sandbox's to refuse."""
    return str(PurePosixPath(name))


def _printable(name: str) -> str:
    # Code may name its files in bytes that are no text.
    return name.encode(errors="replace").decode()


class Service:
    """A station behind a socket, from `serve` until `stop`. Lives in one event loop and does not own the station.

    With a `token`, everything but `/healthz` asks for it, as `Authorization: Bearer TOKEN` or as the password of
    `Basic`, which is what HTTP clients make of `http://any:TOKEN@host/`.
    """

    def __init__(self, station: ToolStation, *, token: str | None = None, grace_s: float = _GRACE_S) -> None:
        self.closing = False
        self.app = Starlette(
            routes=[
                Route("/run_code", self._run_code, methods=["POST"]),
                Route("/run_jupyter", _run_jupyter, methods=["POST"]),
                Route("/v1/ping", _ping),
                Route("/healthz", self._health),
            ],
            middleware=[Middleware(_Door, service=self, token=token)],
            exception_handlers={HTTPException: _refused, Exception: _internal_error},
        )
        # A redirect would name whatever host the request claims.
        self.app.router.redirect_slashes = False
        self._station = station
        self._grace_s = grace_s
        self._over = asyncio.Event()
        self._held = 0
        self._server: _Server | None = None

    async def serve(self, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
        """Take calls on a bound socket until `stop`, and until the calls that then run have been answered."""
        config = uvicorn.Config(
            self.app,
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(self._grace_s) + 10,  # against a call that cannot even be killed
        )
        self._server = _Server(config, on_ready)
        self._server.should_exit = self.closing
        await self._server.serve(sockets=[listener])

    def stop(self, *, at_once: bool = False) -> None:
        """Take no more calls; end those that run when the grace is over. From within the event loop."""
        self.closing = True
        if self._server is not None:
            self._server.should_exit = True
        asyncio.get_running_loop().call_later(0 if at_once else self._grace_s, self._over.set)

    async def _run_code(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the content type is not application/json")
        try:
            asked, size = await self._read(request)
        except ClientDisconnect:
            return Response(status_code=400)  # into the void
        try:
            return await self._answer(request, asked)
        finally:
            self._held -= size

    async def _answer(self, request: Request, asked: RunCode) -> Response:
        call = asked.call()
        try:
            body = answer(await self._outcome(request, call, asked.patience_s), asked=asked.fetch_files)
        except ClientDisconnect:
            return Response(status_code=400)
        except SandboxBusyError as error:
            raise _later("every cell is taken and the queue is full; come back later") from error
        except CallError as error:
            raise _unprocessable([_problem((), str(error), "call_error")]) from error
        except SandboxError as error:
            _LOG.warning("call %s: %s", call.id, error)
            body = fault(str(error))
        except AuditError as error:
            _LOG.error("call %s: %s", call.id, error)
            body = fault("the call could not be recorded in the audit log")
        return JSONResponse(body, headers={"X-LoopGuard-Call": call.id})

    async def _outcome(self, request: Request, call: ToolCall, patience_s: float) -> Outcome:
        """Run a call for as long as somebody waits for it. A call that is given up is killed before this returns."""
        running = asyncio.ensure_future(self._station.arun(call))
        gone = asyncio.ensure_future(_hung_up(request))
        over = asyncio.ensure_future(self._over.wait())
        try:
            done, _ = await asyncio.wait({running, gone, over}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if running in done:
                return running.result()
            if gone in done:
                raise ClientDisconnect
            if over in done:
                raise SandboxUnavailableError("the service is going down, and the call was ended")
            raise _later("no cell was free for long enough; come back later")
        finally:
            for task in (running, gone, over):
                task.cancel()
            await asyncio.gather(running, gone, over, return_exceptions=True)

    async def _read(self, request: Request) -> tuple[RunCode, int]:
        """A request and how many bytes it holds, for which the caller answers from then on."""
        if _declared(request.headers) > _BODY_MIB << 20:
            raise _too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(_UPLOAD_S):
                async for chunk in request.stream():
                    body += chunk
                    self._held += len(chunk)
                    if len(body) > _BODY_MIB << 20:
                        raise _too_large()
                    if self._held > _HELD_MIB << 20:
                        raise _later("too many large requests wait for an answer; come back later")
            return RunCode.model_validate_json(bytes(body)), len(body)
        except BaseException as error:
            self._held -= len(body)
            if isinstance(error, ValidationError):
                raise _unprocessable([_problem(e["loc"], e["msg"], e["type"]) for e in error.errors()]) from error
            if isinstance(error, TimeoutError):
                said = f"the request was not sent within {_UPLOAD_S:.0f} s"
                raise HTTPException(408, said, headers={"Connection": "close"}) from error
            raise

    async def _health(self, _request: Request) -> Response:
        state = "closing" if self.closing else await asyncio.to_thread(self._standing)
        return JSONResponse({"status": state}, 200 if state == "serving" else 503)

    def _standing(self) -> str:
        # Looking takes in requests from outside and may record a freeze, so it is no work for the event loop.
        try:
            if self._station.failing:
                return "failing"
            return "frozen" if self._station.frozen else "serving"
        except AuditError as error:
            _LOG.error("%s", error)
            return "failing"


class _Server(uvicorn.Server):
    """Says when it listens, and leaves signals to the program around it."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The inherited one raises what it caught once more, before the station is closed.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()


class _Door:
    """Who may ask: nobody's web page, the holder of the token, and nobody while the service goes down."""

    def __init__(self, app: ASGIApp, *, service: Service, token: str | None) -> None:
        self._app = app
        self._service = service
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/healthz" and (turned_away := self._turned_away(Headers(scope=scope))):
            await turned_away(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _turned_away(self, headers: Headers) -> Response | None:
        if "origin" in headers:
            # A browser says so of every page that posts, also to a loopback address under a borrowed name.
            return _said(403, "no web page may use this service")
        if self._token is not None and not _holds(headers.get("authorization", ""), self._token):
            return _said(401, "a bearer token is needed", {"WWW-Authenticate": 'Bearer realm="loopguard"'})
        if self._service.closing:
            return _said(503, "the service is going down")
        return None


def _holds(authorization: str, token: str) -> bool:
    scheme, _, given = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            held = given.strip().encode()
        case "basic":
            try:
                held = base64.b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                return False
        case _:
            return False
    return hmac.compare_digest(held, token.encode())


def _said(status: int, detail: Any, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status, headers=headers)


async def _refused(_request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, HTTPException)
    return JSONResponse({"detail": refusal.detail}, refusal.status_code, headers=refusal.headers)


async def _internal_error(_request: Request, _error: Exception) -> Response:
    # Starlette raises it again for the server, which writes the traceback to its own log.
    return _said(500, "internal error")


async def _run_jupyter(_request: Request) -> Response:
    return _said(404, "/run_jupyter is not offered: send each program whole, to /run_code")


async def _ping(_request: Request) -> Response:
    return JSONResponse("pong")


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _declared(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else 0


def _later(detail: str) -> HTTPException:
    """504 is the one status after which clients try again."""
    return HTTPException(504, detail, headers={"Retry-After": "1"})


def _too_large() -> HTTPException:
    # The connection stays open: the rest is read and thrown away, or else the client would see a reset and no answer.
    return HTTPException(413, f"the request has more than {_BODY_MIB} MiB")


def _problem(place: tuple[int | str, ...], message: str, kind: str) -> dict[str, Any]:
    return {"loc": ["body", *place], "msg": message, "type": kind}


def _unprocessable(problems: list[dict[str, Any]]) -> HTTPException:
    # The annotation of HTTPException says text; its own handler is not the one that renders this.
    return HTTPException(422, problems)  # type: ignore[arg-type]
