"""Where a command ends: what the library raised becomes a line on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

from loopguard.audit.events import printable
from loopguard.errors import InterruptedLoop, LoopGuardError, PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable


def code_of(command: Callable[[], object]) -> int:
    """Run a command; gives its exit code, which is 0 where it returns something else than a number."""
    try:
        code = command()
    except KeyboardInterrupt:
        return say(InterruptedLoop("interrupted"))
    except LoopGuardError as error:
        return say(error)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            return _say_system(error)
        # Somebody piped into `head`. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def say(error: LoopGuardError) -> int:
    """Print an error; gives its exit code."""
    # A policy's findings stand each on a line of its own, with the place in front, where editors look for it.
    text = str(error) if isinstance(error, PolicyError) else f"loopguard: {error}"
    # A reason may quote what a model wrote; line ends alone are let through.
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)
    return error.exit_code


def _say_system(error: OSError) -> int:
    """What the operating system refused, in a line: a full or broken disk is 6, a file that may not be used is 2."""
    print(f"loopguard: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
    return 6 if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS} else 2
