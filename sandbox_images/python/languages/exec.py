"""A program of the image with its arguments: code is JSON, {"argv": [...], "env": {...}, "cwd": "..."}.

`env` is added to the variables of the cell, `cwd` is relative to the call's folder; both may be left out. Exit status
125: the folder cannot be entered. 126: not a program, or not permitted. 127: there is no such program.
"""

import json
import os
import signal
import sys


def run(code, folder):
    """Become the program; the exit status where that fails."""
    request = json.loads(code)
    argv = request["argv"]
    environment = {**os.environ, **request.get("env", {})}
    try:
        os.chdir(request.get("cwd") or ".")
    except OSError as error:
        return failed(125, request["cwd"], error)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(argv[0], argv, environment)
    except FileNotFoundError as error:
        return failed(127, argv[0], error)
    except OSError as error:
        return failed(126, argv[0], error)


def failed(status, name, error):
    print(f"{name}: {error.strerror}", file=sys.stderr, flush=True)
    return status
