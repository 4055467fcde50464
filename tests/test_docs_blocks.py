"""The Python in docs/ is Python, and what stands on its own there runs.

Not here: docs/snapshots.md, whose block runs in tests/snapshots/test_snapshot_docs.py, docs/audit-format.md, whose
verifier runs in tests/audit/test_audit_format_doc.py, and the README, whose code is that of an example. Blocks that
need a process group, a service or a model of the reader's are compiled alone.
"""

from __future__ import annotations

import ast
import math
import re
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
FENCE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    return [textwrap.dedent(code) for _, code in FENCE.findall(page.read_text(encoding="utf-8"))]


ALL = [(page.name, number, code) for page in sorted(DOCS.glob("*.md")) for number, code in enumerate(blocks(page), 1)]


def block(page, holding):
    """The one block of a page that holds this text."""
    (code,) = [code for name, _, code in ALL if name == page and holding in code]
    return compile(code, f"docs/{page}", "exec")


@pytest.mark.parametrize(("page", "number", "code"), ALL, ids=[f"{page}-{number}" for page, number, _ in ALL])
def test_every_block_compiles(page, number, code):
    assert code.strip()
    # As a notebook would take it: pages show `await` without the function around it.
    compile(code, f"docs/{page}, block {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_fence_is_looked_at():
    """A block whose end this file cannot find would be left out without a word."""
    fences = sum(page.read_text(encoding="utf-8").count("```python") for page in DOCS.glob("*.md"))
    assert fences == len(ALL) > 0


class TestTheVeto:
    @pytest.mark.parametrize("fused", [True, False])
    def test_its_block_withholds_what_it_says(self, fused, capsys):
        """The step after a loss that is not a number moves no weight; after `remove` steps move them again."""
        torch = pytest.importorskip("torch", reason="the veto is for torch")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        loss = model(torch.ones(1, 2)).square().mean()
        loss.backward()
        before = model.weight.detach().clone()
        exec(block("update-gate.md", "veto.withhold"), {"optimizer": optimizer, "loss": loss * math.nan})
        assert torch.equal(model.weight, before)
        optimizer.step()
        assert not torch.equal(model.weight, before)


def test_the_module_of_the_reproduce_page_replays_a_freeze_to_the_bit(tmp_path, monkeypatch):
    """The loop hands its batches in as the page says, and its module gives the same losses and weights again."""
    torch = pytest.importorskip("torch", reason="attach needs torch")
    pytest.importorskip("safetensors", reason="snapshots need safetensors")
    from lab import Lab

    from loopguard.errors import LoopFrozen
    from loopguard.reproduce import load_module, reproduce

    torch.set_num_threads(1)
    code = next(code for name, _, code in ALL if name == "reproduce.md" and "def build(config)" in code)
    (tmp_path / "replay_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = load_module("replay_of_the_page")
    config = {"width": 4, "lr": 0.01}
    torch.manual_seed(0)
    with Lab(tmp_path).open() as guard:
        parts = module.build(config)
        guard.attach(**parts, config=config)
        cycle = next(guard.cycles(1))
        loader = [{"x": torch.randn(8, 4)} for _ in range(3)] + [{"x": torch.full((8, 4), math.inf)}]
        with pytest.raises(LoopFrozen):
            for batch in cycle.batches(loader):
                loss = module.loss(parts["model"], batch, None)
                loss.backward()
                cycle.update(loss=loss)
    again = reproduce(tmp_path / "run" / "freezes" / "f1", module)
    assert again.same
    assert again.state == "same"
    assert [update.update for update in again.updates] == [1, 2, 3, 4]
