"""Repetitions over trainings, folds and training seeds: resumed, spread over tasks, summarized."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import repeat

import datasets

Experiment = Callable[..., Path]

# Stands for trainer.py and evaluation.py: the logits depend on the seeds of the data file and the training.
PROGRAM = """
import json, pathlib, sys
import h5py, numpy as np
program, first, *overrides = sys.argv[1:]
with open("COUNT", "a") as file:
    file.write("x")
if program.endswith("trainer.py"):
    assert overrides.pop() == "--no-extend"
    keys = dict(override.split("=", 1) for override in overrides)
    if keys["train_params.seed"] == FAIL:
        sys.exit(1)
    model = pathlib.Path(keys["train_params.log_dir"]) / keys["model_params.name"] / "model"
    model.mkdir(parents=True)
    threshold = {"temperature": 1.0, "threshold": 1.0}  # by axis, as the trainer calibrates
    calibration = {"temperature": 1.0, "threshold": 9.0, "axes": [threshold, None, None]}
    (model / "config.json").write_text(json.dumps(keys | {"calibration": calibration}))
else:
    run = pathlib.Path(first)
    keys = json.loads((run / "model" / "config.json").read_text())
    (run / "evaluation").mkdir()
    (run / "evaluation" / "report.json").write_text(json.dumps(REPORT))
    with h5py.File(keys["data_params.datafile"]) as data:
        seeds = data.attrs["original_seeds"][int(keys["data_params.train_seeds"]):]
    label = np.tile([0, 0, 1, 1], len(seeds))
    with h5py.File(run / "evaluation" / "predictions.h5", "w") as file:
        file["id"] = np.arange(4 * len(seeds))
        file["seed"] = np.repeat(seeds, 4)
        file["label"] = label
        file["axis"] = file["position"] = np.zeros_like(label)
        # every slice is right at threshold 1; the sign tells half of them
        file["logit"] = 1.0 + (label - 0.5) * (1 + int(keys["train_params.seed"]))
"""


ESTIMATE = {"value": 1.0}
REPORT = {
    "run": "run",
    "config": {},
    "model": {"architecture": "RACOON", "layer_param": 2},
    "data": {"file": "x.h5", "seeds": [0, 1], "newton_augmentation": 1.0},
    "slices": dict.fromkeys(("accuracy", "auc", "log_loss", "calibration_error"), ESTIMATE),
    "cubes": dict.fromkeys(("cube_accuracy", "cube_auc"), ESTIMATE),
    "pairs": {},
    "significance": {},
}


@pytest.fixture
def start(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs repeat.py with the programs above."""
    monkeypatch.setattr(repeat, "POLL_SECONDS", 0.02)

    def run(*options: str, fail: str = "None") -> int:
        texts = {"COUNT": str(tmp_path / "count"), "FAIL": repr(fail), "REPORT": repr(REPORT)}
        program = PROGRAM
        for name, text in texts.items():
            program = program.replace(name, text)
        (tmp_path / "fake.py").write_text(program)
        path = experiment(train_seeds=2, validation_seeds=1)
        return repeat.main([str(path), "--launcher", f"{sys.executable} {tmp_path / 'fake.py'}", *options])

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


def test_the_real_programs(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.write_synthetic(tmp_path / "universe.h5", seeds=6, size=64, strength=100)
    path = experiment(datafile=str(tmp_path / "universe.h5"), train_seeds=3, validation_seeds=1, test_seeds=3)
    assert repeat.main([str(path), "--trainings", "1"]) == 0
    run = tmp_path / "runs" / "run-repeat" / "run-fold0-seeds3-training0" / "evaluation"
    calibrated = json.loads((run / "report.json").read_text())["calibrated"]["accuracy"]["value"]
    assert f"accuracy of slices | {calibrated:.4f} |" in capsys.readouterr().out


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
    start: Callable[..., int], universe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--trainings", "1") == 0
    summary = (tmp_path / "runs" / "run-repeat" / "summary.json").read_bytes()
    assert start("--trainings", "1") == 0
    other = tmp_path / "other.h5"
    shutil.copy(universe, other)
    for change in ("train_params.lr=0.5", "train_params.epochs=9", f"data_params.datafile={other}"):
        assert start("--trainings", "1", change) == 2
        assert f"{change.split('=')[0]}: the run has" in capsys.readouterr().err
    assert (tmp_path / "runs" / "run-repeat" / "summary.json").read_bytes() == summary


def test_a_run_that_fails_is_named_after_the_others(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--trainings", "3", fail="1") == 2
    assert "1 runs failed: run-fold0-seeds2-training1" in capsys.readouterr().err
    assert len(runs(tmp_path)) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--folds", "5"], "at most 4 folds"),
        (["--seeds", "1"], "train_seeds 1 to 1"),
        (["--seeds", "2", "4"], "train_seeds, validation seeds included, from 2 to 3"),
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
