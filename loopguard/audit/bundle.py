"""One file for an auditor who has nothing of ours: the log, the guard policies, keys, anchors, a report, a verifier.

The same run gives the same bytes: names in order, one date for all, no owner, and nothing of the machine. What is
packed is the evidence as it lies there, also where it was altered; the verification beside it says so. Never packed are
quarantined records, snapshots and capsules, which hold data and weights.

Of a living run the bundle holds a beginning: caches and checkpoints are read before the log that they speak of.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from loopguard.audit import anchors as places
from loopguard.audit import blobs, notes, pruned, read
from loopguard.audit import keys as keyring
from loopguard.audit import segments as files
from loopguard.audit.events import MAX_LINE_BYTES, printable
from loopguard.audit.export import outside, whole_file
from loopguard.audit.report import render, without
from loopguard.audit.verify import Verification, verify
from loopguard.errors import AuditError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

STANDALONE = Path(__file__).with_name("standalone.py")
"""The verifier that needs nothing of ours."""

_README = """\
What this is
============

The audit log of one run of a self-training loop that LoopGuard guarded, and what it takes to check it. The run is
{run}. Nothing has to be installed but Python 3.11 and its package cryptography.

    run/               the evidence: the log under run/audit, the guard policies under run/policy{payloads}
    keys/              public keys that whoever packed this trusted: {keys}
    anchors/           checkpoints of the log that were kept elsewhere: {anchors}
    report.html        what happened, for people; made from the log, and no evidence by itself
    verification.json  what LoopGuard found when this was packed; no evidence either
    standalone.py      a verifier that shares no code with LoopGuard{standalone}

How to check it
===============

    {command}

0 means whole, and proven to its end by what was kept elsewhere. 20 means whole, and nothing proves that its end was not
cut off, or that it was not written anew. 10 is a warning; everything from 30 on is a finding. When this was packed,
LoopGuard found {status} ({code}): {summary}.

Keys and anchors in here came on the same way as the log: whoever could change the one could change the others. They
prove something where you can compare them with those that you have from elsewhere.

How to read it
==============

Open report.html: it needs no network and runs no script. Each line of run/audit/*/seg-*.jsonl is a record, in JSON,
with the hash of the one before it; files that end in .gz are the same, compressed with gzip. Text in records was
written by strangers, perhaps by the model that was trained.
"""


@dataclass(frozen=True, slots=True)
class Packed:
    """What was put together."""

    names: list[str]
    verification: Verification
    living: bool
    """Whether a process was still writing the log."""
    payloads: int
    """How many payloads of tool calls are in it."""


def bundle(
    run_dir: Path,
    *,
    out: Path,
    keys: Sequence[str] = (),
    anchors: Sequence[Path] = (),
    expect_head: str | None = None,
    without_payloads: bool = False,
) -> Packed:
    """Pack a run into a .tar.gz outside of it. The file appears when it is whole.

    `keys`, `anchors` and `expect_head` are what `verify` trusts; keys and anchors are packed as well. Payloads that lie
    apart from the log are packed as they are, unless it is to be `without_payloads`. Raises UsageError
    where there is no log, where `out` lies in the run directory, or where a part of the evidence is a link.
    """
    run_dir, out = Path(run_dir), Path(out)
    outside(out, run_dir)
    if not read.segments(run_dir):
        raise UsageError(f"{run_dir} holds no audit log ({read.stream_dir(run_dir)} has no seg-*.jsonl)")
    living = read.owner(run_dir) is not None
    trusts: dict[str, Any] = {"keys": keys, "anchors": anchors, "expect_head": expect_head}
    trusts["without_payloads"] = without_payloads
    found = verify(run_dir, **trusts)
    texts = _packed_with_it(run_dir, keys, anchors)
    texts["verification.json"] = json.dumps(_facts(run_dir, found), sort_keys=True, indent=1) + "\n"
    texts["report.html"] = render(run_dir, **trusts)
    texts["README.txt"] = _readme(
        found, sorted(texts), run=_run_of(run_dir), expect_head=expect_head, without_payloads=without_payloads
    )
    evidence = [(f"run/{path.relative_to(run_dir)}", path) for path in _evidence(run_dir)]
    with whole_file(out) as file, _archive(file) as tar:
        for name, text in sorted(texts.items()):
            data = text.encode()
            tar.addfile(_info(name, len(data)), io.BytesIO(data))
        for name, path in evidence:
            _add(tar, name, path, living=living)
        # Behind the records that name them, since a payload is there before its record.
        apart = [] if without_payloads else [(f"run/{path.relative_to(run_dir)}", path) for path in _apart(run_dir)]
        for name, path in apart:
            with contextlib.suppress(FileNotFoundError):  # erased just now
                _add(tar, name, path, living=living)
    names = [*sorted(texts), *(name for name, _ in (*evidence, *apart))]
    return Packed(names, found, living, payloads=len(apart))


@contextlib.contextmanager
def _archive(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    """A compressed archive that does not say when it was made."""
    with (
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        yield tar


def _packed_with_it(run_dir: Path, keys: Sequence[str], anchors: Sequence[Path]) -> dict[str, str]:
    """Keys, anchors and the verifier, by name. Of a place that holds checkpoints of other runs, those of this one."""
    texts = {f"keys/{number}.vkey": f"{key}\n" for number, key in enumerate(keyring.trusted(keys), 1)}
    for number, place in enumerate(anchors, 1):
        kept = (one.note for one in places.read(Path(place), run_dir=run_dir))
        ours = [note.text() for note in kept if note.checkpoint.origin.rpartition("/")[0] == _run_of(run_dir)]
        lines = (json.dumps({"checkpoint": text}, separators=(",", ":")) for text in ours)
        texts[f"anchors/{number}.jsonl"] = "".join(f"{line}\n" for line in lines)
    if STANDALONE.exists():
        texts["standalone.py"] = STANDALONE.read_text(encoding="utf-8")
    return texts


def _run_of(run_dir: Path) -> str:
    """The id of the run, as `run.json` says it, or its log where there is none; empty where neither can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return str(json.loads((run_dir / "run.json").read_bytes())["id"])
    with contextlib.suppress(AuditError):
        return next((entry.log.rpartition("/")[0] for entry in read.entries(run_dir)), "")
    return ""


def _facts(run_dir: Path, found: Verification) -> dict[str, Any]:
    """The verification without the place of the folder, so that a copy gives the same bundle."""
    texts = {name: [without(run_dir, text) for text in getattr(found, name)] for name in ("findings", "notes")}
    streams = {one.name: {"head": str(one.head), "proven": one.proven, "signed": one.signed} for one in found.streams}
    facts = {"code": found.code, "status": found.status, "authorship": found.authorship, "keys": found.keys}
    return {**facts, **texts, "streams": streams}


def _readme(found: Verification, names: list[str], *, run: str, expect_head: str | None, without_payloads: bool) -> str:
    keys = [name for name in names if name.startswith("keys/")]
    has_anchors = any(name.startswith("anchors/") for name in names)
    alone = "standalone.py" in names
    words = ["python3 standalone.py run" if alone else "loopguard audit verify run", *(f"--key {key}" for key in keys)]
    words += ["--anchors anchors"] if has_anchors else []
    words += [f"--expect-head {expect_head}"] if expect_head is not None else []
    words += ["--without-payloads"] if without_payloads else []
    return _README.format(
        run=printable(run),
        keys=f"{len(keys)}" if keys else "none was given",
        anchors="see there" if has_anchors else "none were given",
        standalone="" if alone else ": not in this bundle",
        payloads="; without the payloads of tool calls" if without_payloads else "",
        command=" ".join(words),
        status=found.status,
        code=found.code,
        summary=found.summary,
    )


def _evidence(run_dir: Path) -> Iterator[Path]:
    """What there is to pack of a run. What speaks of records comes before them: they may still be written.

    Raises UsageError at a link, which could bring in anything.
    """
    names = [read.CONTROLLER, *(name for name in read.streams(run_dir) if name != read.CONTROLLER)]
    _refuse_links([run_dir / "audit", run_dir / "policy", *(read.stream_dir(run_dir, name) for name in names)])
    yield from _files(run_dir, ("run.json", "state.json"))
    yield from _files(run_dir / "policy", ("*.yaml",))
    for name in names:
        folder = read.stream_dir(run_dir, name)
        _refuse_links([folder / notes.FOLDER])
        yield from _files(folder / notes.FOLDER, ("*.note",))
        yield from _files(folder, (pruned.FILE,))
        segments = read.segments(run_dir, name)
        _refuse_links(segments)
        yield from segments
        yield from _files(folder, ("torn-*.bin",))


def _apart(run_dir: Path) -> Iterator[Path]:
    """The payloads that lie apart from the log, without erased ones that a crash left. Raises UsageError at a link."""
    for name in read.streams(run_dir):
        home = read.stream_dir(run_dir, name) / blobs.FOLDER
        found = blobs.paths(home.parent)
        _refuse_links([home, *sorted({path.parent for path in found}), *found])
        erased = blobs.erasures(run_dir, name)
        yield from (path for path in found if path.is_file() and path.name not in erased)


def _files(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    _refuse_links(found)
    yield from (path for path in found if path.is_file())


def _refuse_links(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_symlink():
            raise UsageError(f"{path} is a link: evidence lies in the run directory itself; put what it names there")


def _add(tar: tarfile.TarFile, name: str, path: Path, *, living: bool) -> None:
    """One file as long as it is now; of a log that is being written, up to its last whole line."""
    if living and path.suffix == ".jsonl" and not path.exists():
        name, path = name + files.PACKED, files.packed(path)  # it was compressed after it was listed
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if living and path.suffix == ".jsonl":
            size = _whole_lines(file, size)
        tar.addfile(_info(name, size), file)


def _whole_lines(file: IO[bytes], size: int) -> int:
    """How many bytes of a file are whole lines; it is left at its beginning."""
    start = file.seek(max(0, size - MAX_LINE_BYTES))
    end = start + file.read(size - start).rfind(b"\n") + 1
    file.seek(0)
    return end


def _info(name: str, size: int) -> tarfile.TarInfo:
    """A member that says nothing of when, where and by whom it was packed."""
    info = tarfile.TarInfo(f"loopguard-bundle/{name}")
    info.size, info.mode = size, 0o644
    return info
