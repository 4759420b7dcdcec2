"""Who may import whom (DESIGN section 3), and that the core starts fast, without torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH_FREE = [
    "fledge",
    "fledge.config",
    "fledge.errors",
    "fledge.files",
    "fledge.plan",
    "fledge.plan.planner",
    "fledge.run",
    "fledge.report",
    "fledge.stats",
    "fledge.tokenizer",
    "fledge.tokenizer.chat",
    "fledge.tokenizer.reply",
    "fledge.data.worlds",
    "fledge.cli",
]
HEAVY = {"torch", "transformers", "pyarrow", "matplotlib", "huggingface_hub"}


def modules_after(statement: str) -> set[str]:
    """The top-level modules in sys.modules of a fresh Python after `statement`."""
    code = (
        f"import sys, json\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_only_the_hub_opens_addresses():
    """What import-linter cannot say of a part of the standard library (DESIGN section 3)."""
    package = ROOT / "python" / "fledge"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if imports_of(path) & {"urllib.request", "http.client", "ftplib"}
    }
    assert found <= {"data/hub.py", "export/hub.py"}, found


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch_in(module):
    assert "torch" not in modules_after(f"import {module}")


def test_import_fledge_loads_nothing_heavy():
    assert not modules_after("import fledge") & (HEAVY | {"numpy", "tyro", "jinja2", "rich"})


def test_help_loads_nothing_heavy():
    loaded = modules_after("import sys; sys.argv = ['fledge', '--help']; import fledge.cli; "
                           "fledge.cli.main()")  # fmt: skip
    assert not loaded & HEAVY


def test_layer_contracts():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as m; m()",
         "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
