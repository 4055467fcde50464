"""Shell code, run by the image's /bin/sh."""

import os
import signal
import socket

SHELL = "/bin/sh"
SCRIPT = "main.sh"
# Read like this in both cases, so that a script says the same words when it fails.
READ = f". ./{SCRIPT}"


def stand_by(go, cpu_s):
    """A shell that waits for a line on descriptor 3 before it reads its script; hands out the script to be written."""
    script = os.open(SCRIPT, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    socket.send_fds(go, [b"s"], [script])
    os.close(script)
    first = f"ulimit -t {cpu_s}; echo 1000 >/proc/self/oom_score_adj; read -r go <&3; exec 3<&-; unset go; "
    return [SHELL, "-c", first + READ, SCRIPT]


def run(code, place):
    """Become the shell. Returns only by an exception."""
    with open(SCRIPT, "wb") as file:
        file.write(code)
    # As a terminal has them; Python ignores both.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execv(SHELL, [SHELL, "-c", READ, SCRIPT])
