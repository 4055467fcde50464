"""Python code, run as a script would run, in a process that has imported what the policy preloads."""

import atexit
import functools
import linecache
import os
import sys
import threading
import traceback
import types

SCRIPT = "main.py"
# Imported before a call as well: what most snippets begin with, at the price of a few hundred kilobytes.
USUAL = ("collections", "datetime", "functools", "itertools", "json", "math", "random", "re", "string")


def warm():
    """In the zygote: do once what every call does, so that no call has to set it up again."""
    for module in USUAL:
        __import__(module)
    seed_numpy()  # newer ones load this part of theirs at the first use
    code = b"import math\ndef f(x):\n    return [str(x), f'{math.sqrt(x)}']\nprint(f(4), len(f(2)))\n"
    for _ in range(3):
        standard_streams()  # they lead to /dev/null here
        exec(compile(code, "rehearsal", "exec", dont_inherit=True), {"__name__": "rehearsal"})


def ready(place):
    """In the process of a call, before the call arrives."""
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    sys.modules["__main__"] = main
    sys.argv[:] = [SCRIPT]
    sys.path.insert(0, place)
    standard_streams()
    seed_numpy()


def seed_numpy():
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))  # Python's own generator does so at every fork


def run(code, folder):
    """Run code as a script would run that is in this folder, and give its exit status."""
    path = f"{folder}/{SCRIPT}"
    with open(path, "wb") as file:
        file.write(code)
    main = sys.modules["__main__"]
    main.__file__ = path
    status = 0
    try:
        exec(compile(code, path, "exec", dont_inherit=True), main.__dict__)
    except BaseException as error:
        linecache.checkcache()
        status = explain(error)
    # What an interpreter does at its end: wait for threads, run what was registered, flush.
    for finish in (threading._shutdown, atexit._run_exitfuncs):
        try:
            finish()
        except BaseException as error:
            status = status or explain(error)
    # Also the ones that the code has put others in the place of: what they hold was printed.
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
    return status & 255


def explain(error):
    """The exit status that an exception stands for, after saying what an interpreter would say."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    # Without the frame of this file.
    here = error.__traceback__
    traceback.print_exception(error.with_traceback(here.tb_next if here else None))
    return 1


def standard_streams():
    """New objects for standard input and output: the ones that are there were made for other descriptors."""
    # By lines: what was printed before a limit ended the call is kept.
    stream = functools.partial(open, encoding="utf-8", closefd=False)
    sys.stdin = sys.__stdin__ = stream(0, errors="surrogateescape")
    sys.stdout = sys.__stdout__ = stream(1, "w", 1, errors="surrogateescape")
    sys.stderr = sys.__stderr__ = stream(2, "w", 1, errors="backslashreplace")
