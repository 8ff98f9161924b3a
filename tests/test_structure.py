"""The structure of the project: programs import modules, modules import leaves, and nothing is unpickled."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {"evaluation_context", "trainer", "run", "evaluation"}
LEAVES = {"files", "system"}  # any module may import them
ALLOWED = {"checkpoint": {"distributed"}, "analysis": {"metrics", "datasets"}}
MODULES = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
SOURCES = sorted([*ROOT.glob("*.py"), *(p for name in MODULES for p in (ROOT / name).rglob("*.py"))])


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports when it runs; imports for type checking do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found & MODULES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_only_themselves_and_leaves(path: Path) -> None:
    module = module_of(path)
    if module in LEAVES:
        assert not imported_modules(path)
    elif module not in PROGRAMS and path.name != "__main__.py":  # a command line is a program
        assert imported_modules(path) <= {module} | LEAVES | ALLOWED.get(module, set())


def test_the_training_path_does_not_import_preparation() -> None:
    for path in (ROOT / "datasets").glob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert not re.search(r"(from|import) .*\bpreparation\b", path.read_text()), path


def test_the_trainer_imports_every_module_but_the_other_programs() -> None:
    found = imported_modules(ROOT / "trainer.py") | imported_modules(ROOT / "run.py")
    assert {"checkpoint", "config", "datasets", "distributed", "logger", "metrics", "models"} <= found


FORBIDDEN = {"pickle", "dill", "joblib", "cloudpickle"}
CALLS = {("torch", "save"), ("torch", "load"), ("accelerator", "save_state"), ("accelerator", "load_state")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & FORBIDDEN
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in CALLS
