"""The code in docs/snapshots.md runs as it stands."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_example_of_using_the_parts_by_hand_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "snapshots.md").read_text(), flags=re.DOTALL)
    exec(compile(block, "docs/snapshots.md", "exec"), {"folder": tmp_path})
