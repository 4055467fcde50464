"""The README's code is the example's code, and the example runs."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_code_in_the_readme_is_the_code_of_the_example():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert textwrap.dedent(block).strip() in (ROOT / "examples" / "own_loop.py").read_text()
    assert len(block.strip().splitlines()) <= 15


@pytest.mark.docker
@pytest.mark.train
def test_the_example_runs_and_its_network_learns(tmp_path):
    """Four promoted cycles with real tool calls."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_loop.py", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "promoted 4 cycles" in done.stdout


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"`((?:docs|policies|examples)/[\w./-]+)`", (ROOT / "README.md").read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
