"""Programs limit the spinning of OpenMP threads before they import torch."""

import system

import ast
import os
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def spin_count(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str | None:
    """GOMP_SPINCOUNT after the import, in this environment."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "system.py"))
    return os.environ.get("GOMP_SPINCOUNT")


def test_spinning_is_limited_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spin_count(monkeypatch) == str(system.SPIN_COUNT)
    assert spin_count(monkeypatch, GOMP_SPINCOUNT="7") == "7"
    assert spin_count(monkeypatch, OMP_WAIT_POLICY="active") is None


@pytest.mark.parametrize("program", ["trainer.py", "evaluation.py"])
def test_programs_import_it_first(program: str) -> None:
    tree = ast.parse((ROOT / program).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports[:2]] == [
        "from __future__ import annotations",
        "import system",
    ]
