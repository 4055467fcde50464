"""`approve`: agree, with an SSH key, to what a resume would do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from loopguard.cli.freeze import RunDir, refusal, settle

if TYPE_CHECKING:
    from loopguard.consent.book import Book
    from loopguard.consent.statement import Statement

_KEY = "The private key to sign with, or a .pub file whose key an agent holds."
_SIGNATURE = "A signature made elsewhere, by `ssh-keygen -Y sign -n loopguard-approve@v1` over what --print prints."
_PRINT = "Print exactly what is signed, and approve nothing."
_MAX_KEY_WAIT_S = 600
"""How long a passphrase or the touch of a security key may take."""


def approve(
    run_dir: RunDir,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help=_KEY)] = None,
    signature: Annotated[Path | None, typer.Option("--signature", metavar="FILE", help=_SIGNATURE)] = None,
    print_: Annotated[bool, typer.Option("--print", help=_PRINT)] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking once more.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="How long to wait for the loop.")] = 10.0,
) -> None:
    """Agree to a resume that somebody asked for: shows what it is about, and signs it with your SSH key.

    The run goes on once as many people agreed as its guard policy asks for. Whoever is not convinced does nothing, or
    ends the request with `loopguard freeze`.

    loopguard approve runs/toolformer --key ~/.ssh/id_ed25519

    Exit codes: 0 the run may go on (or --print), 1 not counted, or not yet, 2 bad usage, 4 counted, and more people
    have to agree, 6 audit log.
    """
    from loopguard.errors import UsageError
    from loopguard.state import submit

    statement = _waiting(run_dir)
    if statement is None:
        print(f"{run_dir}: no request waits for an approval; `loopguard resume` makes one", file=sys.stderr)
        raise typer.Exit(1)
    if print_:
        print(statement.signed_bytes().decode("ascii"), end="")
        return
    if (key is None) == (signature is None):
        raise UsageError("say with what you sign: --key FILE, or --signature FILE for a signature made elsewhere")
    for line in _facts(run_dir, statement):
        print(line, file=sys.stderr)
    armored = _read(signature) if signature is not None else _sign(statement, _agreed(key, yes=yes))
    request = submit(run_dir, "approval", by="", reason="", signature=armored)
    _tell(run_dir, request.id, statement, wait_s=wait_s)


def _waiting(run_dir: Path) -> Statement | None:
    """What waits for approvals: recorded, or still lying in `requests/`."""
    from loopguard.approvals import book
    from loopguard.consent.statement import Statement
    from loopguard.state import run_facts, waiting

    run_facts(run_dir)
    for request in reversed(waiting(run_dir, "resume")):
        try:
            return Statement.read(request.statement)
        except ValueError:
            continue  # a request without one: whoever takes it in says so
    pending = book(run_dir).pending
    return pending.statement if pending is not None and pending.fault is None else None


def _facts(run_dir: Path, statement: Statement) -> list[str]:
    """What a person has to know before signing."""
    from loopguard.audit import query
    from loopguard.audit.events import printable
    from loopguard.ways import told as told_way

    told = next((freeze for freeze in query.freezes(run_dir) if freeze.id == statement.freeze), None)
    rows = [("freeze", f"{statement.freeze} of {statement.run}")]
    if told is not None:
        body = told.body
        rows += [
            ("tripped", f"{body.get('gate')} gate, rule {body.get('rule')}: {body.get('reason')}"),
            ("value", query.value_told(told)),
            ("since", f"{query.when(told.entered.ts)}. {query.since_told(told)}".strip()),
            ("weights", query.weights_told(told)),
        ]
    changes = statement.policy_change != "none"
    rows += [
        ("goes on", told_way(statement.way)),
        (
            "from",
            f"{'the capsule' if statement.disposition == 'accept' else 'snapshot'} {query.short(statement.target)}",
        ),
        (
            "policy",
            f"{statement.policy_change}: becomes {query.short(statement.next_policy)}" if changes else "unchanged",
        ),
        ("asked by", f"{statement.requester}: {statement.reason}"),
        ("until", query.when(statement.expires)),
        ("why", f"loopguard audit why {run_dir} {statement.freeze}"),
    ]
    return [printable(f"{label:<9} {text}") for label, text in rows if text]


def _agreed(key: Path | None, *, yes: bool) -> Path:
    """The key to sign with, once its owner has said so. Raises UsageError, or typer.Exit with 1."""
    from loopguard.errors import UsageError

    assert key is not None
    if not key.is_file():
        raise UsageError(f"--key {key}: there is no such file; ssh-keygen -t ed25519 makes one")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to be asked: read the facts above, and say --yes")
        if not typer.confirm("Sign this?", err=True):
            print("nothing was signed", file=sys.stderr)
            raise typer.Exit(1)
    return key


def _sign(statement: Statement, key: Path) -> str:
    """The signature that ssh-keygen makes, which may ask for a passphrase or a touch. Raises UsageError."""
    from loopguard.consent.sshsig import NAMESPACE
    from loopguard.errors import UsageError

    with TemporaryDirectory() as folder:
        message = Path(folder) / "statement.json"
        message.write_bytes(statement.signed_bytes())
        command = ["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", str(key), str(message)]
        try:
            # What it asks for, such as the touch of a key, it says on standard error: a person has to see that.
            done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=_MAX_KEY_WAIT_S, check=False)
        except FileNotFoundError:
            raise UsageError(
                "ssh-keygen is not installed (package openssh-client): sign what --print prints elsewhere, and hand it "
                "in with --signature FILE"
            ) from None
        except subprocess.TimeoutExpired:
            raise UsageError(f"ssh-keygen did not sign within {_MAX_KEY_WAIT_S} s") from None
        if done.returncode != 0:
            raise UsageError(f"ssh-keygen signed nothing with {key} (it ended with {done.returncode})")
        return message.with_suffix(".json.sig").read_text(encoding="ascii")


def _read(path: Path) -> str:
    """A signature made elsewhere. Raises UsageError where the file cannot be one."""
    from loopguard.consent.sshsig import MAX_SIGNATURE_BYTES
    from loopguard.errors import UsageError

    try:
        if path.stat().st_size > MAX_SIGNATURE_BYTES:
            raise UsageError(f"--signature {path} is larger than any signature ({MAX_SIGNATURE_BYTES} bytes)")
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise UsageError(f"--signature {path}: there is no such file") from None
    except UnicodeDecodeError:
        raise UsageError(f"--signature {path} is not text; expected -----BEGIN SSH SIGNATURE-----") from None


def _tell(run_dir: Path, approval: str, statement: Statement, *, wait_s: float) -> None:
    """Say what became of an approval, and exit accordingly."""
    from loopguard.audit.events import printable

    if not settle(run_dir, approval, wait_s=wait_s):
        print(f"{run_dir}: the approval is there, and the loop has not counted it yet", file=sys.stderr)
        raise typer.Exit(1)
    if (why := refusal(run_dir, approval)) is not None:
        print(printable(f"not counted: {why}"), file=sys.stderr)
        raise typer.Exit(1)
    told = _acted(run_dir, wait_s=wait_s)
    if told.halted:
        print(printable(f"{run_dir} is halted, as {_names(run_dir, approval)} agreed: it goes on no more"))
        return
    if told.freeze != statement.freeze:
        print(printable(f"{run_dir} may go on: {statement.freeze} ended, as {_names(run_dir, approval)} agreed"))
        return
    print(printable(f"counted as {_names(run_dir, approval)}: {_how_many(told)}"))
    if told.pending is None:
        print(printable(f"{run_dir} stays frozen: {_last_refusal(run_dir)}"), file=sys.stderr)
        raise typer.Exit(1)
    raise typer.Exit(4)


def _acted(run_dir: Path, *, wait_s: float) -> Book:
    """What the log says once a loop that has counted enough approvals has acted on them, or was given the time to."""
    from loopguard.approvals import book

    deadline = time.monotonic() + wait_s
    while True:
        told = book(run_dir)
        enough = (
            told.pending is not None and told.rule is not None and len(told.pending.approvals) >= told.rule.approvals
        )
        if not enough or time.monotonic() >= deadline:
            return told
        time.sleep(0.1)


def _last_refusal(run_dir: Path) -> str:
    from loopguard.audit import read

    *_, last = read.entries(run_dir, types=("approval.refused",))
    return str(last.body.get("reason"))


def _names(run_dir: Path, approval: str) -> str:
    """Who is behind an approval, by its key."""
    from loopguard.audit import read

    given = read.entries(run_dir, types=("approval.given",))
    body = next(entry.body for entry in given if entry.body.get("approval") == approval)
    return f"{body['person']} ({body['key']})"


def _how_many(told: Book) -> str:
    given = len(told.pending.approvals) if told.pending is not None else 0
    return f"{given} of {told.rule.approvals if told.rule else 0} approvals"
