"""Every block of docs/tutorial.md and every cell of the notebook run, in order, on a small universe."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import h5py
import matplotlib as mpl
import pytest
from accelerate.state import AcceleratorState, GradientState
from test_pack import REDSHIFTS, snapshot_file, write_settings

import datasets
import evaluation
import trainer
from datasets import __main__ as datasets_command
from training.checkpoint import __main__ as checkpoint_command
from training.config import load_config

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S)
SEEDS = 9
SMALL = ["model_params.layer_param=4", "train_params.epochs=1"]
UNIT = 4e-5  # standard deviation of gevolution's potential


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiments and the raw output of nine seeds."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "experiments").mkdir()
    datasets.write_synthetic(folder / "cubes.h5", seeds=SEEDS, size=64, strength=100)
    with h5py.File(folder / "cubes.h5") as cubes:
        for name in cubes:
            gravity, seed = name.split("_seed")
            for snapshot in range(len(REDSHIFTS)):
                path = snapshot_file(folder / "raw", int(seed), gravity, snapshot)
                path.parent.mkdir(parents=True, exist_ok=True)
                with h5py.File(path, "w") as file:
                    file["data"] = cubes[name][:].astype("f8") * UNIT
            write_settings(folder / "raw", int(seed), gravity)
    return folder


PROGRAMS = {
    ("python", "-m", "datasets"): datasets_command.main,
    ("python", "-m", "training.checkpoint"): checkpoint_command.main,
    ("python", "trainer.py"): trainer.main,
    ("python", "evaluation.py"): evaluation.main,
}


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of the tutorial in this process, where torch is imported already."""
    words = shlex.split(line)
    command = next(command for command in PROGRAMS if tuple(words[: len(command)]) == command)
    program, arguments = PROGRAMS[command], words[len(command) :]
    if program is trainer.main:
        arguments += SMALL
    elif program is evaluation.main and "--predict" not in arguments:
        arguments += ["--quick"]  # test_evaluation.py runs the full report
    monkeypatch.setattr(sys, "argv", [command[-1], *arguments])
    assert program() == 0, line
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_every_block_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for language, block in BLOCKS:
        if language == "bash":
            for line in block.splitlines():
                run_command(line, monkeypatch)
        else:
            with mpl.rc_context({"backend": "agg"}):
                exec(compile(block, "docs/tutorial.md", "exec"), {})
    written = {path.name for path in folder.iterdir()}
    assert {"data_z1.h5", "slices.png", "runs", "logits.pdf", "predictions.h5"} <= written
    assert (folder / "runs" / "mine" / "evaluation" / "report.html").exists()
    data = load_config(folder / "experiments" / "mine.yaml").data_params
    assert (data.train_range, data.validation_range, data.test_range) == (range(4), range(4, 6), range(6, 9))
    assert data.standardize == "none"
    assert "AUC" in capsys.readouterr().out
    run_notebook(ROOT / "docs" / "explore_run.ipynb", folder / "runs" / "mine", monkeypatch)
    printed = capsys.readouterr().out
    for text in ("- Selection: ", "over 3 seeds", "axis 2: accuracy", "gr      P(GR) = ", "n <= 4     AUC"):
        assert text in printed


def test_an_experiment_needs_seeds_for_every_set(
    universe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    command = ["inspect", str(universe), "--write-experiment", str(out)]
    monkeypatch.setattr(sys, "argv", ["datasets", *command])
    assert datasets_command.main() == 2
    assert "found 4 pairs of twins, but an experiment takes 6 or more" in capsys.readouterr().err
    assert not out.exists()


def run_notebook(path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the cells of a notebook on another run, in one namespace, as its kernel does."""
    assert path.stat().st_size < 1e6
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:]), "the outputs are stored"
    monkeypatch.chdir(path.parent)  # where Jupyter starts its kernel
    with mpl.rc_context({"backend": "agg"}):
        namespace: dict[str, Any] = {}
        for cell in cells:
            source = "".join(cell["source"]).replace('Path("runs/linear_z1")', f"Path({str(run)!r})")
            exec(compile(source, path.name, "exec"), namespace)
            monkeypatch.chdir(run.parents[1])  # the data file of this run is here, not in the checkout
        namespace["plt"].close("all")
