"""Where the `loopguard` command begins, also as `python -m loopguard.cli`.

`status` is what scripts and people ask again and again. In its plain form it is answered here; all other commands, help
and wrong words take the command line in `app`, whose libraries alone take longer to load than the answer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    """Run the command that the words of the process name, and exit with its code."""
    words = sys.argv[1:]
    if _is_plain_status(words):
        sys.exit(_status(words))
    from loopguard.cli import app

    app.main(words)


def _is_plain_status(words: Sequence[str]) -> bool:
    """Whether it is `status RUN_DIR`, with `--json` or without."""
    rest = [word for word in words[1:] if word != "--json"]
    return words[:1] == ["status"] and len(rest) == 1 and not rest[0].startswith("-")


def _status(words: Sequence[str]) -> int:
    from loopguard.cli import edge, freeze

    (run_dir,) = (word for word in words[1:] if word != "--json")
    return edge.code_of(lambda: freeze.tell_status(Path(run_dir), as_json="--json" in words))


if __name__ == "__main__":
    main()
