"""The Docker engine, as far as cells need it: the one file that speaks to the docker client.

Every request has a deadline, and whatever goes wrong is a SandboxUnavailableError of one line. An `Engine` belongs to
one thread: the client's connections are not made to be shared.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import docker
import docker.errors
import requests

from loopguard.errors import SandboxUnavailableError

if TYPE_CHECKING:
    from types import TracebackType

_REQUEST_S = 20
_GONE_S = 10
_UNREACHABLE = (docker.errors.DockerException, requests.RequestException)


class Engine:
    """A client of the engine that the docker command would use. Lives for a few requests, or as long as a cell."""

    def __init__(self) -> None:
        where = "unix:///var/run/docker.sock"
        try:
            options = _address()
            where = options.get("base_url", where)
            if where.startswith("unix:///"):
                # The client would leave a socket open behind it where nobody listens.
                with socket.socket(socket.AF_UNIX) as knock:
                    knock.settimeout(_REQUEST_S)
                    knock.connect(where.removeprefix("unix://"))
            self._client = docker.APIClient(**options, version="auto", timeout=_REQUEST_S)
        except (*_UNREACHABLE, OSError, ValueError) as error:
            raise SandboxUnavailableError(
                f"no Docker engine answers at {where} ({said(error)}): start Docker, or run `loopguard sandbox build`"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def info(self) -> dict[str, Any]:
        """What the engine says of itself; `RuncVersion` is added to it."""
        with _told("the Docker engine does not answer as it should"):
            found = dict(self._client.info())
            parts = self._client.version().get("Components") or []
            found["RuncVersion"] = next((str(part["Version"]) for part in parts if part["Name"] == "runc"), "")
            return found

    def image(self, name: str) -> dict[str, Any]:
        """An image that is here."""
        try:
            with _told("the Docker engine does not answer as it should"):
                return dict(self._client.inspect_image(name))
        except SandboxUnavailableError as error:
            if isinstance(error.__cause__, docker.errors.ImageNotFound):
                raise SandboxUnavailableError(f"the image {name} is not here: run `loopguard sandbox build`") from None
            raise

    def create(self, config: dict[str, Any], name: str) -> str:
        """A container, not started; its id."""
        with _told("a cell could not be started"):
            return str(self._client.create_container_from_config(config, name)["Id"])

    def attach(self, container: str) -> tuple[socket.socket, Any]:
        """The stream of a container, and the object that has to be kept and closed with it."""
        with _told("a cell could not be started"):
            raw = self._client.attach_socket(container, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        # Over TLS and SSH the client hands out the connection itself, else a file around it.
        return getattr(raw, "_sock", raw), raw

    def start(self, container: str) -> None:
        """Start it."""
        with _told("a cell could not be started"):
            self._client.start(container)

    def inspect(self, container: str) -> dict[str, Any]:
        """All that the engine knows of it."""
        with _told("the Docker engine does not describe a cell"):
            return dict(self._client.inspect_container(container))

    def remove(self, container: str) -> bool:
        """End it and take it away, by id or name; whether it is gone. The engine may be doing so by itself already."""
        with suppress(*_UNREACHABLE):
            try:
                self._client.remove_container(container, force=True, v=True)
            except docker.errors.NotFound:
                return True
            except docker.errors.APIError as error:
                if error.status_code != requests.codes.conflict:
                    return False
            return self._gone(container)
        return False

    def containers(self, label: str) -> list[dict[str, Any]]:
        """Every container with this label, whoever made it: `Id`, `Names`, `Labels`."""
        # The plain list: asking for each container in turn would hang on one that is being torn down.
        with _told("the Docker engine does not list its containers"):
            return list(self._client.containers(all=True, filters={"label": [label]}))

    def ran_out_of_memory(self, container: str, *, since: float) -> bool:
        """Whether the kernel ended it for its memory. `since` is a time of day (s) before it was started.

        Asks for what the engine told of it: the container itself may be gone by now.
        """
        until = time.monotonic() + 3.0
        with suppress(*_UNREACHABLE):
            while time.monotonic() < until:
                told = self._client.events(
                    since=f"{since:.9f}", until=f"{time.time():.9f}", filters={"container": [container]}, decode=True
                )
                actions = {event.get("Action") for event in told}
                if "die" in actions:
                    return "oom" in actions
                time.sleep(0.05)
        return False

    def _gone(self, container: str) -> bool:
        until = time.monotonic() + _GONE_S
        while time.monotonic() < until:
            try:
                self._client.inspect_container(container)
            except docker.errors.NotFound:
                return True
            time.sleep(0.02)
        return False


class _told:  # noqa: N801 - used as a word: `with _told("...")`
    """Turns what the client raises into one line that begins with what could not be done."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, _UNREACHABLE):
            raise SandboxUnavailableError(f"{self._what}: {said(error)}") from error


def _address() -> dict[str, Any]:
    """Where the docker command would look: DOCKER_HOST, else the context that is in use."""
    options: dict[str, Any] = docker.utils.kwargs_from_env()
    if "base_url" in options:
        return options
    context = docker.context.ContextAPI.get_context(os.environ.get("DOCKER_CONTEXT"))
    if context is None:
        raise docker.errors.DockerException("the context in use does not exist; see `docker context ls`")
    if context.name == "default":
        return options
    return {"base_url": context.Host, "tls": context.TLSConfig or False}


def said(error: BaseException) -> str:
    """The useful part of what an engine or a cell said, on one line."""
    told = getattr(error, "explanation", None)
    if not told and isinstance(error, (*_UNREACHABLE, OSError)):
        told = _root(error)
    text = " ".join(str(told or error or type(error).__name__).split())
    # What went wrong stands at the end, what was being done at the beginning.
    return text if len(text) <= 400 else f"{text[:100]} ... {text[-290:]}"


def _root(error: BaseException) -> str:
    """What the operating system said, out of the nest of exceptions that the HTTP client wraps around it."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            return below.strerror
        below = below.__cause__ or below.__context__
    return ""
