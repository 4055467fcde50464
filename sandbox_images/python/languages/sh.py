"""Shell code, run by the image's /bin/sh."""

import os
import signal
import socket

SHELL = "/bin/sh"
SCRIPT = "main.sh"


def stand_by(go, cpu_s, folder):
    """A shell that waits for a line on descriptor 3 before it reads its script; hands out the script to be written."""
    script = os.open(SCRIPT, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    socket.send_fds(go, [b"s"], [script])
    os.close(script)
    first = f"ulimit -t {cpu_s}; echo 1000 >/proc/self/oom_score_adj; read -r go <&3; exec 3<&-; unset go; "
    return [SHELL, "-c", first + read(folder), SCRIPT]


def read(folder):
    # In this way however it was started, so that a script says the same words when it fails.
    return f". {folder}/{SCRIPT}"


def run(code, folder):
    """Become the shell. Returns only by an exception."""
    with open(f"{folder}/{SCRIPT}", "wb") as file:
        file.write(code)
    # As a terminal has them; Python ignores both.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execv(SHELL, [SHELL, "-c", read(folder), SCRIPT])
