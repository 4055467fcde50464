"""The layer table: imports go upwards only, and third-party packages stay at home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "loopguard"

ROWS = {
    "errors": 0,
    "types": 0,
    "monitors": 1,
    "consent": 1,
    "policy": 2,
    "audit": 2,
    "sandbox": 2,
    "gates": 3,
    "approvals": 3,
    "state": 3,
    "snapshots": 3,
    "notify": 3,
    "ways": 3,
    "controller": 4,
    "integrations": 5,
    "reproduce": 5,
    "pipelines": 5,
    "service": 5,
    "cli": 6,
    "testing": 6,
}

# Where each third-party package may be imported: a module or package, and whether only inside functions.
HOMES = {
    "docker": ["sandbox/engine.py"],
    "requests": ["sandbox/engine.py"],  # what the docker client speaks through, and raises
    "pydantic": ["policy/", "service.py"],
    "pydantic_core": ["policy/"],
    "ruamel": ["policy/"],
    "structlog": ["audit/mirror.py"],
    "jinja2": ["audit/report.py"],
    "pyarrow": ["audit/export.py"],
    "cryptography": ["consent/sshsig.py", "audit/"],
    "torch": ["snapshots/", "integrations/torch/", "integrations/transformers/", "pipelines/"],
    "safetensors": ["snapshots/"],
    "numpy": ["integrations/torch/", "pipelines/"],
    "transformers": ["integrations/transformers/", "pipelines/"],
    "accelerate": ["integrations/transformers/"],
    "trl": ["integrations/trl/"],
    "tokenizers": ["pipelines/"],
    "starlette": ["service.py"],
    "uvicorn": ["service.py"],
    "inspect_ai": ["integrations/inspect_ai.py"],
    "anyio": ["integrations/inspect_ai.py"],  # what inspect's event loop is spoken to through
    "typer": ["cli/"],
    "click": ["cli/"],
    "rich": ["cli/"],
}
ONLY_INSIDE_FUNCTIONS = {("snapshots/", "torch"), ("snapshots/", "safetensors"), ("audit/export.py", "pyarrow")}

# `state` writes the latch the way snapshots are written, and has approvals counted, which are about a snapshot.
# A way on from a freeze may be the state in its capsule.
SAME_ROW = {
    *{
        ("state", "snapshots"),
        ("state", "approvals"),
        ("approvals", "snapshots"),
        ("ways", "snapshots"),
        ("state", "ways"),
    },
}

MODULES = sorted(path for path in ROOT.rglob("*.py"))


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at run time at the top level) for each import that is not for type checkers alone."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, *, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, not inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, not inside))
                found.extend((f"{child.module}.{alias.name}", not inside) for alias in child.names)
            visit(child, inside=inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text(encoding="utf-8")), inside=False)
    return found


def _package(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_rows_above_it(path):
    """Packages in one row are blind to each other, and nothing reaches down."""
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module, _ in _imports(path):
        other = _package(module)
        if module.startswith("loopguard.") and other in ROWS and other != own:
            allowed = ROWS[other] < ROWS[own] or (own, other) in SAME_ROW or ROWS[own] == 6 == ROWS[other]
            assert allowed, f"{path.name} (row {ROWS[own]}) imports {module} (row {ROWS[other]})"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_third_party_package_is_imported_in_its_home_alone(path):
    """docker, pydantic, torch and the like can each be replaced in one sitting."""
    place = str(path.relative_to(ROOT))
    for module, top_level in _imports(path):
        package = module.partition(".")[0]
        if package in sys.stdlib_module_names or package in {"loopguard", "__future__"}:
            continue
        homes = HOMES.get(package)
        assert homes is not None, f"{place} imports {package}, which has no home in the layer table"
        assert any(place == home or (home.endswith("/") and place.startswith(home)) for home in homes), (
            f"{place} imports {package}; its home is {', '.join(homes)}"
        )
        inside = any(place.startswith(home) for home, name in ONLY_INSIDE_FUNCTIONS if name == package)
        assert not (top_level and inside), f"{place} imports {package} at the top"


def test_every_module_stands_in_the_layer_table():
    """A new package has to take a row before it can be imported."""
    names = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES} - {"__init__", "_shipped"}
    assert names <= ROWS.keys(), f"not in the layer table: {sorted(names - ROWS.keys())}"


HEAVY = ["torch", "transformers", "docker", "pydantic", "structlog", "jinja2", "typer", "rich", "numpy", "uvicorn"]


@pytest.mark.parametrize(
    "statement", ["import loopguard", "import loopguard.state, loopguard.audit.log, loopguard.audit.verify"]
)
def test_light_imports_load_nothing_heavy(statement):
    """`import loopguard`, and what status, freeze and resume need, load no third-party package."""
    code = f"{statement}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve():
    """Everything in `__all__` can be had, and nothing else pretends to be there."""
    import loopguard

    for name in loopguard.__all__:
        assert getattr(loopguard, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Loopguard'"):
        _ = loopguard.Loopguard
