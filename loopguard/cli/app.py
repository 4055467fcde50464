"""The command line: results on standard output, everything else on standard error, one table of exit codes.

    0 ok or allowed, 1 findings or refused, 2 usage, 3 policy, 4 frozen, 5 sandbox, 6 audit log,
    7 run directory busy, 130 interrupted

The library raises; `edge` is the one place that prints an error and chooses the code.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from loopguard.cli import (
    approve,
    audit,
    doctor,
    edge,
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
from loopguard.errors import InterruptedLoop

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
        return edge.code_of(lambda: app(args=list(arguments) if arguments is not None else None, standalone_mode=False))
    except _USAGE as error:
        error.show()
        return 2
    except typer.Abort:
        return edge.say(InterruptedLoop("interrupted"))
