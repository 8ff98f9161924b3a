"""The structure of the project: imports form a star, and nothing is ever unpickled."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {"trainer", "opening", "evaluation"}
OWN = {"checkpoint": {"state"}}  # the command line of a room
ROOMS = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
SOURCES = sorted([*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).glob("*.py"))])


def room_of(path: Path) -> str:
    return path.parent.name if path.parent != ROOT else path.stem


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found & ROOMS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_form_a_star(path: Path) -> None:
    if room_of(path) not in PROGRAMS:
        assert imported_rooms(path) <= {room_of(path)} | OWN.get(room_of(path), set())


def test_the_trainer_uses_every_room_but_the_other_programs() -> None:
    assert {"config", "datasets", "models", "metrics", "checkpoint"} <= imported_rooms(ROOT / "trainer.py")


FORBIDDEN = {"pickle", "dill", "joblib", "cloudpickle"}
CALLS = {("torch", "save"), ("torch", "load"), ("accelerator", "save_state"), ("accelerator", "load_state")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_pickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & FORBIDDEN
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in CALLS
