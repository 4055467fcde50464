"""Anchors: places elsewhere that a log checkpoint is kept in, so that the log cannot be cut or rewritten unseen.

One function for each kind of place; another kind is a function and a line in `_KEEPERS`. All of them keep the same line
of JSON, so that whatever was kept can be read back by `read`, also out of the output of a CI job.

An anchor is worth as much as the place is out of reach: of a file on the same disk, whoever rewrites the log rewrites
it as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loopguard.audit import notes
from loopguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Kind = Literal["file", "git", "print"]

BRANCH = "loopguard-anchors"
"""The branch of another repository that checkpoints are committed to."""

_START = '{"checkpoint":"'
_REF = f"refs/heads/{BRANCH}"
_GIT_TIMEOUT_S = 30.0
_MOST_TRIES = 5
"""How often a commit is made anew because another run committed in between."""


class NotKeptError(Exception):
    """A checkpoint could not be kept in a place. The message is the reason, without the place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """One place, as the guard policy names it."""

    kind: Kind
    place: str = ""
    """The file or the repository; empty for `print`."""
    required: bool = False
    """Whether the run freezes where a checkpoint could not be kept here."""

    def __str__(self) -> str:
        return f"{self.kind} {self.place}".rstrip()


def keep(anchor: Anchor, note: str) -> str:
    """Keep a note in a place, durably where the place can; gives what finds it there again. Raises NotKeptError."""
    line = json.dumps({"checkpoint": note}, separators=(",", ":"))
    try:
        return _KEEPERS[anchor.kind](anchor.place, line)
    except OSError as error:
        raise NotKeptError(f"{error.strerror or error}") from error
    except ValueError as error:  # standard error was closed
        raise NotKeptError(str(error)) from error


def _to_file(place: str, line: str) -> str:
    """Append a line to a file, best on another volume or machine."""
    path = Path(place).expanduser()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        # A crash may have cut the line before; it must not swallow this one.
        mended = "\n" if size and os.pread(fd, 1, size - 1) != b"\n" else ""
        data = memoryview(f"{mended}{line}\n".encode("ascii"))
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    with contextlib.suppress(PermissionError):  # a folder that we may only write to is a good place for an anchor
        _sync_folder(path.parent)
    return str(path)


def _sync_folder(folder: Path) -> None:
    """Have the name of a new file on disk as well: what `anchor.kept` says has to be true after a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _to_git(place: str, line: str) -> str:
    """Commit to a branch of another repository, past its work tree and index. Pushing it is up to whoever owns it."""
    repository = Path(place).expanduser()
    tree = _git(repository, "mktree")
    for _ in range(_MOST_TRIES):
        parent = _asked(repository, "rev-parse", "--verify", "--quiet", _REF)
        parents = ["-p", parent] if parent else []
        commit = _git(repository, "commit-tree", tree, *parents, given=f"A log checkpoint of a run\n\n{line}\n")
        # The old value makes this fail where another run was faster.
        if _asked(repository, "update-ref", _REF, commit, parent or "0" * len(commit)) is not None:
            return f"{repository} {commit}"
    raise NotKeptError(f"the branch {BRANCH} kept changing, or cannot be written")


def _to_output(_: str, line: str) -> str:
    """Print a line on standard error, for a CI job to keep."""
    print(f"loopguard anchor {line}", file=sys.stderr, flush=True)  # noqa: T201 - printing is what this kind does
    return "standard error"


_KEEPERS: dict[Kind, Callable[[str, str], str]] = {"file": _to_file, "git": _to_git, "print": _to_output}


def _git(repository: Path, *words: str, given: str = "") -> str:
    """What a git command prints. Raises NotKeptError where it fails."""
    done = _done(repository, *words, given=given)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NotKeptError(f"git {words[0]} failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout.decode("utf-8", "replace").strip()


def _asked(repository: Path, *words: str) -> str | None:
    """What a git command prints; None where it fails."""
    done = _done(repository, *words)
    return None if done.returncode else done.stdout.decode("utf-8", "replace").strip()


def _done(repository: Path, *words: str, given: str = "") -> subprocess.CompletedProcess[bytes]:
    # A hook or a parent git may have set these, which would lead to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "loopguard", f"GIT_{role}_EMAIL": "loopguard@localhost"}
    command = ["git", "-C", str(repository), *words]
    try:
        return subprocess.run(
            command, input=given.encode(), capture_output=True, env=environment, timeout=_GIT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotKeptError(f"git {words[0]} took longer than {_GIT_TIMEOUT_S:g} s") from None
    except FileNotFoundError:
        raise NotKeptError("git is not installed, or not on PATH") from None


def refuse_inside(run_dir: Path, anchors: Iterable[Anchor]) -> None:
    """Raise UsageError for an anchor in the run directory, where it would be changed along with the log."""
    for anchor in anchors:
        if anchor.place and _lies_in(Path(anchor.place).expanduser(), run_dir):
            raise UsageError(f"the anchor {anchor} lies in the run directory {run_dir}, where it proves nothing")


# -- reading back ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that was kept elsewhere, and where it was found."""

    note: notes.Note
    place: str


def read(place: Path, *, run_dir: Path, told: list[str] | None = None) -> list[Kept]:
    """The checkpoints in a file, a folder of files, or a repository that checkpoints were committed to.

    A file is a note, or holds lines of ours among others. A line that a crash cut is passed over, and `told` gets where
    that was. Raises UsageError where nothing is found, since nothing would then be proven in silence, for a damaged
    checkpoint, and for a place inside the run directory.
    """
    if _lies_in(place, run_dir):
        raise UsageError(f"--anchors {place} lies in {run_dir}: what lies beside the log proves nothing about it")
    cut: list[str] = []
    try:
        kept = [Kept(_parsed(text, where), where) for text, where in _texts(place, cut)]
    except OSError as error:
        raise UsageError(f"--anchors {place} cannot be read: {error.strerror or error}") from error
    except notes.BadNoteError as error:
        raise UsageError(f"--anchors {place}: a note in it {error}; take it out, or find it whole") from error
    if not kept:
        why = f" ({cut[-1]})" if cut else ""
        ask = "name what an anchor of the guard policy wrote"
        raise UsageError(f"--anchors {place} holds no log checkpoint{why}; {ask}")
    if told is not None:
        told += cut
    return kept


def _texts(place: Path, told: list[str]) -> Iterator[tuple[str, str]]:
    if not place.is_dir():
        yield from _in_file(place, told)
    elif (place / ".git").exists() or (place / "HEAD").is_file():
        for line in _history(place).splitlines():
            yield from _in_line(line, f"{place} {BRANCH}", told)
    else:
        for path in sorted(path for path in place.rglob("*") if path.suffix in {".note", ".jsonl"} and path.is_file()):
            yield from _in_file(path, told)


def _history(repository: Path) -> str:
    try:
        return _git(repository, "log", "--format=%B", _REF)
    except NotKeptError as error:
        raise UsageError(f"--anchors {repository} has no branch {BRANCH} that can be read: {error}") from error


def _in_file(path: Path, told: list[str]) -> Iterator[tuple[str, str]]:
    if path.suffix == ".note":
        yield notes.read(path), str(path)
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            yield from _in_line(line, f"{path}:{number}", told)


def _in_line(line: str, where: str, told: list[str]) -> Iterator[tuple[str, str]]:
    at = line.find(_START)
    if at < 0:
        return
    if "}" not in line[at:]:
        # What a crash leaves of a line; the next one stands behind it, also in the middle of a file.
        told.append(f"{where}: a log checkpoint is cut there, and was passed over")
        return
    try:
        found, _ = json.JSONDecoder().raw_decode(line[at:])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: a line with a log checkpoint is damaged; take it out, or find it whole") from error
    if isinstance(found, dict) and isinstance(found.get("checkpoint"), str):
        yield found["checkpoint"], where


def _parsed(text: str, where: str) -> notes.Note:
    try:
        return notes.Note.parse(text)
    except notes.BadNoteError as error:
        raise UsageError(f"{where}: {error}; take it out, or find it whole") from error


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(Path(folder).resolve())
