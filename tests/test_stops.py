"""Signals while there is nothing to save: a program ends at once, with a word, and leaves nothing behind."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_server import TIMEOUT, ForkServer, send_at_call, start
from test_pack import write_raw

Experiment = Callable[..., Path]


def stopped(program: str, arguments: list[str], signal: str, function: str, call: int) -> int:
    """Run a program that gets the signal at this call of a function; called in a child."""
    send_at_call(signal, function, call)
    sys.argv = [program, *arguments]
    status: int = importlib.import_module(program).main()
    return status


def files(folder: Path) -> dict[Path, bytes]:
    """Everything below a folder, with the contents of the files."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def evaluated(fork_server: ForkServer, experiment: Experiment, tmp_path: Path) -> Path:
    """A run with an earlier report."""
    path = experiment(train_seeds=1, test_seeds=3, axes=[0])
    assert fork_server.train([str(path)], tmp_path / "out") == [0]
    (tmp_path / "runs" / "run" / "evaluation").mkdir()
    for name in ("report.json", "roc.png", "training.png"):
        (tmp_path / "runs" / "run" / "evaluation" / name).write_text("earlier")
    return tmp_path / "runs" / "run"


def end_of_stop(program: str, signal: str, function: str, call: int, *arguments: Any) -> tuple[Any, str]:
    """The exit status and the last line of a program that gets a signal; it must leave nothing behind."""
    folder = Path(arguments[-1]).parent
    before, out = files(folder), folder.with_name(f"{folder.name}.out")
    process = start(stopped, program, [*map(str, arguments)], signal, function, call, out=out)
    process.join(TIMEOUT)
    assert files(folder) == before
    assert "Traceback" not in out.read_text()
    return process.exitcode, out.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "function", "call"),
    [
        ({"synthetic": {"size": 64}}, "datasets.preparation.synthetic.new_cube", 3),
        ({"standardize": "train"}, "datasets.cube_file.CubeFile.read", 2),
        ({"whiten": "isotropic"}, "models.isotropic_power", 1),
        ({}, "training.run.prepare", 0),
    ],
)
def test_a_stop_during_the_set_up(
    fork_server: ForkServer,
    experiment: Experiment,
    tmp_path: Path,
    settings: dict[str, Any],
    function: str,
    call: int,
) -> None:
    if "synthetic" in settings:
        settings = {"datafile": str(tmp_path / "universe.h5"), **settings}
    end = end_of_stop("trainer", "SIGTERM", function, call, experiment(**settings))
    assert end == (0, "stopped during set-up (SIGTERM)")


@pytest.mark.parametrize(
    ("command", "function", "call"),
    [
        (["pack", "--snapshot", "1", "raw"], "datasets.preparation.pack._read", 3),
        (["repack", "universe.h5"], "datasets.preparation.repack.new_cube", 2),
        (["synthesize", "--seeds", "2"], "datasets.preparation.synthetic.new_cube", 1),
    ],
)
def test_a_stop_while_a_data_file_is_written(
    fork_server: ForkServer, universe: Path, tmp_path: Path, command: list[str], function: str, call: int
) -> None:
    write_raw(tmp_path / "raw", seeds=1)
    names = {"raw": tmp_path / "raw", "universe.h5": universe}
    arguments = [names.get(word, word) for word in command]
    end = end_of_stop("datasets.__main__", "SIGTERM", function, call, *arguments, tmp_path / "out.h5")
    assert end == (143, "stopped (SIGTERM)")


@pytest.mark.parametrize(
    ("function", "call"), [("analysis.interventions.measure", 0), ("analysis.figures.save", 1)]
)
def test_a_stop_of_the_evaluation(evaluated: Path, function: str, call: int) -> None:
    assert end_of_stop("evaluation", "SIGINT", function, call, evaluated) == (130, "stopped (SIGINT)")
