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


def test_the_benchmark_compares_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import contention

    rates = {
        300_000: {0: [100.0, 200.0, 100.0], 1: [50.0, 60.0, 50.0], 2: [10.0, 20.0, 10.0]},
        1_000: {0: [90.0, 180.0, 110.0], 1: [63.0, 90.0, 77.0], 2: [45.0, 90.0, 33.0]},
    }
    assert contention.table(rates).splitlines()[2:] == [
        "| 300,000 | 100 | 1.00 | 0.50 | 0.10 |",
        "| 1,000 | 110 | 0.90 | 0.70 | 0.50 |",
    ]
