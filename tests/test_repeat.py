"""Repetitions over trainings, folds and training seeds: resumed, spread over tasks, summarized."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

import datasets
from training import config

REPEAT = Path(__file__).parent.parent / "experiments" / "repeat.py"
Experiment = Callable[..., Path]

# Stands for trainer.py and evaluation.py: the logits depend on the seeds of the data file and the training.
PROGRAM = """
import json, pathlib, sys
import h5py, numpy as np
program, first, *overrides = sys.argv[1:]
with open("COUNT", "a") as file:
    file.write("x")
if program.endswith("trainer.py"):
    keys = dict(override.split("=", 1) for override in overrides)
    if keys["train_params.seed"] == FAIL:
        sys.exit(1)
    model = pathlib.Path(keys["train_params.log_dir"]) / keys["model_params.name"] / "model"
    model.mkdir(parents=True)
    record = {"calibration": {"threshold": 1.0, "temperature": 1.0}, "keys": keys}
    (model / "config.json").write_text(json.dumps(record))
else:
    run = pathlib.Path(first)
    keys = json.loads((run / "model" / "config.json").read_text())["keys"]
    (run / "evaluation").mkdir()
    with h5py.File(keys["data_params.datafile"]) as data:
        seeds = data.attrs["original_seeds"][int(keys["data_params.train_seeds"]):]
    label = np.tile([0, 0, 1, 1], len(seeds))
    with h5py.File(run / "evaluation" / "predictions.h5", "w") as file:
        file["seed"] = np.repeat(seeds, 4)
        file["label"] = label
        file["axis"] = file["position"] = np.zeros_like(label)
        # every slice is right at threshold 1; the sign tells half of them
        file["logit"] = 1.0 + (label - 0.5) * (1 + int(keys["train_params.seed"]))
"""


@pytest.fixture(scope="module")
def repeat() -> ModuleType:
    """experiments/repeat.py, which is a program and not a module."""
    sys.path.insert(0, str(REPEAT.parent))
    spec = importlib.util.spec_from_file_location("repeat", REPEAT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["repeat"] = module
    spec.loader.exec_module(module)
    module.POLL_SECONDS = 0.02  # type: ignore[attr-defined]
    return module


@pytest.fixture
def start(repeat: ModuleType, experiment: Experiment, tmp_path: Path) -> Callable[..., int]:
    def run(*options: str, fail: str = "None") -> int:
        program = PROGRAM.replace("COUNT", str(tmp_path / "count")).replace("FAIL", repr(fail))
        (tmp_path / "fake.py").write_text(program)
        path = experiment(train_seeds=2, validation_seeds=1)
        return int(
            repeat.main([str(path), "--launcher", f"{sys.executable} {tmp_path / 'fake.py'}", *options])
        )

    return run


def runs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "runs" / "run-repeat").iterdir() if path.is_dir())


def test_the_summary_holds_every_metric(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--trainings", "2", "--folds", "2", "--seeds", "2", "3", "--jobs", "2") == 0
    folder = tmp_path / "runs" / "run-repeat"
    names = [f"run-fold{f}-seeds{s}-training{t}" for f in (0, 1) for s in (2, 3) for t in (0, 1)]
    assert runs(tmp_path) == names
    summary = json.loads((folder / "summary.json").read_text())
    assert [(row["train_seeds"], row["folds"], row["trainings"]) for row in summary] == [(2, 2, 2), (3, 2, 2)]
    for row in summary:
        assert row["metrics"]["auc"] == {"mean": 1.0, "trainings": 0.0, "folds": 0.0, "ensemble": 1.0}
        assert row["metrics"]["accuracy"]["mean"] == 1.0, "at the calibrated threshold"
    assert (folder / "learning_curve.png").stat().st_size > 1000
    assert "| 3 | AUC of cubes | 1.0000 |" in (folder / "summary.md").read_text()
    assert "| 3 | AUC of cubes | 1.0000 |" in capsys.readouterr().out

    count = (tmp_path / "count").read_text()
    assert len(count) == 16, "each run is trained and evaluated once"
    assert start("--trainings", "2", "--folds", "2", "--seeds", "2", "3") == 0
    assert (tmp_path / "count").read_text() == count


def test_the_folds_have_disjoint_test_seeds_and_the_cubes_of_the_file(
    start: Callable[..., int], universe: Path, tmp_path: Path
) -> None:
    assert start("--trainings", "1", "--folds", "4") == 0
    tested = []
    for fold in range(4):
        path = tmp_path / "runs" / "run-repeat" / f"fold{fold}-seeds2.h5"
        cubes = datasets.CubeFile(path)
        assert path.stat().st_size < 100_000
        originals = cubes.attributes["original_seeds"]
        tested.append(originals[2])
        with h5py.File(universe, locking=False) as file:
            for seed, original in enumerate(originals):
                cube = np.empty((64, 64, 64), np.float32)
                cubes.read(seed, "gr", cube)
                assert np.array_equal(cube, file[f"gr_seed{original:04d}"][()])
    assert tested == [0, 1, 2, 3]


def test_the_tasks_of_an_array_share_the_runs(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for task in ("1", "2"):
        assert not (tmp_path / "runs" / "run-repeat" / "summary.json").exists()
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert start("--trainings", "3") == 0
        assert len(runs(tmp_path)) == (2 if task == "1" else 3)
    assert (tmp_path / "runs" / "run-repeat" / "summary.json").exists()


def test_other_settings_or_data_than_those_of_the_runs_are_refused(
    repeat: ModuleType,
    start: Callable[..., int],
    experiment: Experiment,
    universe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert start("--trainings", "1") == 0
    (one,) = runs(tmp_path)
    folder = tmp_path / "runs" / "run-repeat"
    repetition = repeat.Repetition(folder / one, folder / "fold0-seeds2.h5", 2, 0, 0)
    path = experiment(train_seeds=2, validation_seeds=1)
    config.load_config(path, repeat.changes(repetition)).save()
    summary = (folder / "summary.json").read_bytes()
    assert start("--trainings", "1") == 0
    other = tmp_path / "other.h5"
    shutil.copy(universe, other)
    for change, message in (
        ("train_params.lr=0.5", "train_params.lr: the run has"),
        ("train_params.epochs=9", "train_params.epochs: the run has"),
        (f"data_params.datafile={other}", "made from another data file or other seeds"),
    ):
        assert start("--trainings", "1", change) == 2
        assert message in capsys.readouterr().err
    assert (folder / "summary.json").read_bytes() == summary


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "model" / "config.json").write_text("{"), "config.json: damaged"),
        (lambda run: (run / "evaluation" / "predictions.h5").write_bytes(b"x"), "predictions.h5: "),
    ],
)
def test_a_damaged_run_is_named(
    start: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    assert start("--trainings", "1") == 0
    damage(tmp_path / "runs" / "run-repeat" / runs(tmp_path)[0])
    assert start("--trainings", "1") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ID", "COUNT", "MIN"])
def test_numbers_of_an_array_that_are_none(
    start: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", "x")
    assert start("--trainings", "1") == 2
    assert f"SLURM_ARRAY_TASK_{name}" in capsys.readouterr().err


def test_a_run_that_fails_is_named_after_the_others(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--trainings", "3", fail="1") == 2
    assert "1 runs failed: run-fold0-seeds2-training1" in capsys.readouterr().err
    assert len(runs(tmp_path)) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--folds", "5"], "--folds: found 5, allowed: at most 4 blocks of 1 test seeds"),
        (["--seeds", "1"], "allowed: more than validation_seeds 1"),
        (["--seeds", "4"], "at most 3"),
        (["--trainings", "0"], "allowed: 1 and more"),
        (["data_params.datafile=absent.h5"], "absent.h5"),
    ],
)
def test_bad_input_gets_status_2(
    options: list[str],
    text: str,
    start: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert start(*options) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
