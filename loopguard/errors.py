"""Every exception that LoopGuard raises on purpose.

    LoopGuardError                      exit code
      UsageError                            2   an argument, option or data file that cannot be used
        DataFileError                       2   a data file with a bad line; names the line
      PolicyError                           3   a guard policy that cannot be loaded; carries every finding
        PolicyMismatchError                 3   a run directory that belongs to another policy
      LoopFrozen                            4   weights may not change until a named person resumes the loop
      SandboxError                          5   a sandbox could not do its work
        SandboxUnavailableError             5   no engine, no image, or a cell that died; never a result of the call
          SandboxBusyError                  5   every cell is taken and the queue is full; nothing ran
        CallError                           5   a call that no cell takes: too large, or with impossible names
      AuditError                            6   the audit log cannot be trusted or written
        AuditWriteError                     6   a record could not be made durable (disk full, I/O error)
        AuditTamperedError                  6   the log does not verify
      ToolRaisedError                       1   what a guarded function raised in its cell, or why it was ended there
      RunBusyError                          7   another process owns the run directory
      MonitorError                          4   a monitor raised; the controller freezes and keeps the cause
      SnapshotError                         6   a snapshot is missing or is not what the log says it is
      DiskError                             6   a file of the run directory could not be written
      InterruptedLoop                     130   Ctrl-C; the record is finished and the run can go on

A tool call that fails is an Outcome and never an exception, but where a framework calls the tool as a function and
counts what it raises. `LoopFrozen` is a state rather than a mistake, which is why its name does not end in Error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class LoopGuardError(Exception):
    """Base of everything below. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(LoopGuardError):
    """An argument, an option or a file that cannot be used; the message names it and the way out."""

    exit_code = 2


class DataFileError(UsageError):
    """A data file with a line that cannot be read. The message starts with `path:line:`."""


class PolicyError(LoopGuardError):
    """A guard policy that cannot be loaded.

    `findings` holds one line for each problem, `file:line:column: path is VALUE; expected ... Did you mean ...?`.
    """

    exit_code = 3

    def __init__(self, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(self.findings))


class PolicyMismatchError(PolicyError):
    """A run directory that was started under another policy digest."""


class LoopFrozen(LoopGuardError):  # noqa: N818 - a state of the loop, not a mistake
    """Updates, admission and promotion are stopped until somebody resumes the loop.

    `freeze_id` names the freeze in the audit log; `reason` is one sentence.
    """

    exit_code = 4

    def __init__(self, freeze_id: str, reason: str) -> None:
        self.freeze_id = freeze_id
        self.reason = reason
        super().__init__(f"frozen ({freeze_id}): {reason}")


class SandboxError(LoopGuardError):
    """A sandbox could not do its work. It is never the fault of the code that was to run in it."""

    exit_code = 5


class SandboxUnavailableError(SandboxError):
    """No engine, no image, a cell that could not be created as asked, or a cell that died under a call."""


class SandboxBusyError(SandboxUnavailableError):
    """Every cell is taken and as many callers wait as may. Nothing ran; the caller may come back later."""


class CallError(SandboxError):
    """A call that cannot be made: more than a cell takes, or with a file name that leads elsewhere. Nothing ran."""


class ToolRaisedError(LoopGuardError):
    """A guarded function raised in its cell, or was ended there. The text is what it would be without a guard.

    `kind` is the name of what was raised, such as `ZeroDivisionError`, or the status of the call where it was ended.
    """

    def __init__(self, text: str, *, kind: str) -> None:
        self.kind = kind
        super().__init__(text)


class AuditError(LoopGuardError):
    """The audit log cannot be read, trusted or written."""

    exit_code = 6


class AuditWriteError(AuditError):
    """A record could not be made durable. Nothing that the record would have allowed may happen."""


class AuditTamperedError(AuditError):
    """The log does not verify. The message names the first record that is wrong."""


class RunBusyError(LoopGuardError):
    """Another living process owns the run directory."""

    exit_code = 7


class MonitorError(LoopGuardError):
    """A monitor raised; the original exception is the cause. The controller freezes."""

    exit_code = 4


class SnapshotError(LoopGuardError):
    """A snapshot is missing, damaged, or not the one that the log names."""

    exit_code = 6


class DiskError(LoopGuardError):
    """A file of the run directory could not be written. What it stood for has not happened."""

    exit_code = 6


class InterruptedLoop(LoopGuardError):  # noqa: N818 - a person's wish, not a mistake
    """Ctrl-C: what was begun is recorded, and the same command goes on from the last promoted state."""

    exit_code = 130
