"""The command line: results on standard output, everything else on standard error, one table of exit codes.

    0 ok or allowed, 1 findings or refused, 2 usage, 3 policy, 4 frozen, 5 sandbox, 6 audit log,
    7 run directory busy, 130 interrupted

The library raises; `main` is the one place that prints an error and chooses the code.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any

import typer

from loopguard.audit.events import printable
from loopguard.cli import (
    approve,
    audit,
    doctor,
    freeze,
    init,
    monitor,
    notify,
    policy,
    prune,
    replay,
    run,
    sandbox,
    serve,
)
from loopguard.errors import InterruptedLoop, LoopGuardError, PolicyError

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="loopguard",
    help="Guard a self-training loop: quarantined tool calls, gated updates, and an audit log of every freeze.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(run.demo)
app.add_typer(run.app, name="run")
app.command("init")(init.init)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("status")(freeze.status)
app.command("freeze")(freeze.freeze)
app.command("resume")(freeze.resume)
app.command("approve")(approve.approve)
app.command("rollback")(replay.rollback)
app.command("reproduce")(replay.reproduce)
app.add_typer(policy.app, name="policy")
audit.app.command("prune")(prune.prune)
app.add_typer(audit.app, name="audit")
app.add_typer(monitor.app, name="monitor")
app.add_typer(notify.app, name="notify")
app.add_typer(sandbox.app, name="sandbox")


# typer carries its own copy of click in some versions; this is the root of what either says of wrong words.
_USAGE: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(_main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except _USAGE as error:
        error.show()
        return 2
    except (typer.Abort, KeyboardInterrupt):
        return _say(InterruptedLoop("interrupted"))
    except LoopGuardError as error:
        return _say(error)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            return _say_system(error)
        # Somebody piped into `head`. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def _say_system(error: OSError) -> int:
    """What the operating system refused, in a line: a full or broken disk is 6, a file that may not be used is 2."""
    print(f"loopguard: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
    return 6 if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS} else 2


def _say(error: LoopGuardError) -> int:
    # A policy's findings stand each on a line of its own, with the place in front, where editors look for it.
    text = str(error) if isinstance(error, PolicyError) else f"loopguard: {error}"
    # A reason may quote what a model wrote; line ends alone are let through.
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)
    return error.exit_code
