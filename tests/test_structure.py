"""The structure of the project: imports run one way, and nothing is unpickled."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each package imports those on its left only: system <- models, datasets <- training <- analysis <- programs.
ALLOWED = {
    "system": set(),
    "models": {"system"},
    "datasets": {"system"},
    "training": {"system", "models", "datasets"},
    "analysis": {"system", "models", "datasets", "training"},
}
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


def test_imports_run_one_way() -> None:
    wrong = {
        str(path.relative_to(ROOT)): imported_modules(path) - allowed - {module_of(path)}
        for path in SOURCES
        if (allowed := ALLOWED.get(module_of(path))) is not None and path.name != "__main__.py"
    }
    assert not {path: modules for path, modules in wrong.items() if modules}


FORBIDDEN = {"pickle", "dill", "joblib", "cloudpickle"}
CALLS = {("torch", "save"), ("torch", "load"), ("accelerator", "save_state"), ("accelerator", "load_state")}


def test_nothing_is_pickled() -> None:
    for node in (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & FORBIDDEN
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in CALLS
