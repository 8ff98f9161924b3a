"""Hyperparameter sweeps: trials are ordinary runs, bad ones are pruned, a killed sweep resumes."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

optuna = pytest.importorskip("optuna", reason="the extra sweep is not installed")

sweep = pytest.importorskip("sweep")

SWEEP = Path(__file__).parent.parent / "experiments" / "sweep.py"
Experiment = Callable[..., Path]

# A trainer whose loss depends on the learning rate alone, with the files and signals that a sweep relies on.
TRAINER = """
import json, pathlib, signal, sys, time
assert sys.argv.pop() == "--no-extend"
keys = dict(override.split("=") for override in sys.argv[3:])
run = pathlib.Path("RUNS") / keys["model_params.name"]
if (run / "model" / "config.json").exists():
    sys.exit()
(run / "model").mkdir(parents=True, exist_ok=True)
with (run / "started").open("a") as file:
    file.write("x")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
lines = run / "metrics.jsonl"
before = len(lines.read_text().splitlines()) if lines.exists() else 0
if float(keys["train_params.lr"]) > FAIL:
    sys.exit(1)
for epoch in range(before + 1, 5):
    with lines.open("a") as file:
        loss = abs(float(keys["train_params.lr"]) - 2e-3) + 1 / epoch
        file.write(json.dumps({"phase": "test", "epoch": epoch, "loss": loss}) + "\\n")
    time.sleep(PAUSE)
(run / "model" / "config.json").write_text("{}")
"""


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)


@pytest.fixture
def search(experiment: Experiment, tmp_path: Path) -> Callable[..., int]:
    """Runs a sweep with the trainer above."""

    def run(*options: str, pause: float = 0.01, fail: float = 1) -> int:
        program = TRAINER.replace("RUNS", str(tmp_path / "runs"))
        (tmp_path / "fake.py").write_text(program.replace("PAUSE", str(pause)).replace("FAIL", str(fail)))
        launcher = f"{sys.executable} {tmp_path / 'fake.py'}"
        return sweep.main([str(experiment()), "--launcher", launcher, *options])

    return run


@pytest.fixture
def start(search: Callable[..., int], experiment: Experiment, tmp_path: Path) -> Callable[..., Any]:
    """Starts a sweep in its own process, after one complete trial."""
    assert search("--trials", "1", pause=0) == 0

    def start(*options: str, pause: float) -> "subprocess.Popen[bytes]":
        program = (tmp_path / "fake.py").read_text()
        (tmp_path / "fake.py").write_text(program.replace("sleep(0)", f"sleep({pause})"))
        launcher = f"{sys.executable} {tmp_path / 'fake.py'}"
        command = [sys.executable, str(SWEEP), str(experiment()), "--launcher", launcher, *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    return start


def trials(tmp_path: Path) -> list[Any]:
    return list(load_study(tmp_path).get_trials())


def load_study(tmp_path: Path) -> Any:
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "runs" / "run-sweep.journal"))
    return optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(backend))


def test_trials_are_runs_and_the_lowest_loss_wins(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--search", "model_params.layer_param=4:8", "--search", "train_params.lr=1e-4:1e-2:log"]
    keys += ["--search", "data_params.axes=[0],[0, 2]"]
    assert search("--trials", "5", *keys) == 0
    found = trials(tmp_path)
    assert [trial.user_attrs["run"] for trial in found] == [f"run-{number:03}" for number in range(5)]
    for trial in found:
        assert 4 <= trial.params["model_params.layer_param"] <= 8
        assert isinstance(trial.params["model_params.layer_param"], int)
        assert 1e-4 <= trial.params["train_params.lr"] <= 1e-2
        assert trial.params["data_params.axes"] in ("[0]", "[0, 2]")
        lines = (tmp_path / "runs" / trial.user_attrs["run"] / "metrics.jsonl").read_text().splitlines()
        assert trial.intermediate_values == {
            line["epoch"]: line["loss"] for line in map(json.loads, lines[: len(trial.intermediate_values)])
        }
    best = min((trial for trial in found if trial.state.name == "COMPLETE"), key=lambda trial: trial.value)
    *_, last = capsys.readouterr().out.splitlines()
    run = tmp_path / "runs" / best.user_attrs["run"]
    assert last == f"best: {run}; next: python evaluation.py {run} --checkpoint best"
    settings = {tuple(sorted(trial.params.items())) for trial in found}
    assert len(settings) == 5

    assert search("--trials", "6", *keys) == 0  # one more, a new one
    assert len(trials(tmp_path)) == 6
    assert tuple(sorted(trials(tmp_path)[-1].params.items())) not in settings


def test_a_sweep_is_not_resumed_with_another_experiment_or_search(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--trials", "1") == 0
    for change in ("train_params.epochs=9", "--search=train_params.lr=1e-3:1e-2"):
        assert search("--trials", "2", change) == 2
        assert change.split("=")[0] in capsys.readouterr().err
    assert len(trials(tmp_path)) == 1
    assert search("--trials", "2", "train_params.lr=0.5", "model_params.layer_param=9") == 0, "are searched"


def test_a_trial_worse_than_the_median_is_stopped(search: Callable[..., int], tmp_path: Path) -> None:
    assert search("--trials", "8", pause=0.15) == 0
    pruned = [trial for trial in trials(tmp_path) if trial.state.name == "PRUNED"]
    assert pruned
    for trial in pruned:
        assert not (tmp_path / "runs" / trial.user_attrs["run"] / "model" / "config.json").exists()


def test_a_trial_that_fails_does_not_stop_the_others(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--trials", "2", fail=0) == 2
    assert "no trial of run completed" in capsys.readouterr().err
    assert search("--trials", "5", fail=1e-3, pause=0) == 0
    assert {trial.state.name for trial in trials(tmp_path)} == {"FAIL", "COMPLETE"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_sweep_that_is_killed_or_interrupted_resumes_its_trial(
    search: Callable[..., int], start: Callable[..., Any], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    lines = tmp_path / "runs" / "run-001" / "metrics.jsonl"
    with start("--trials", "2", pause=60) as process:
        while not lines.exists() or not lines.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert b"Traceback" not in error
    before = trials(tmp_path)[1].params
    assert search("--trials", "2", pause=0) == 0
    found = trials(tmp_path)
    assert [(trial.user_attrs["run"], trial.state.name) for trial in found] == [
        ("run-000", "COMPLETE"),
        ("run-001", "FAIL"),
        ("run-001", "COMPLETE"),
    ]
    assert found[2].params == before
    assert (tmp_path / "runs" / "run-001" / "started").read_text() == "xx"
    assert [json.loads(line)["epoch"] for line in lines.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_run_that_finished_without_its_sweep_is_not_trained_again(
    search: Callable[..., int], tmp_path: Path
) -> None:
    keys = ["--search", "train_params.lr=1e-4:1e-2"]
    assert search("--trials", "1", *keys, pause=0) == 0
    orphan = load_study(tmp_path).ask()
    orphan.suggest_float("train_params.lr", 1e-4, 1e-2)
    orphan.set_user_attr("run", "run-000")  # its folder is complete, and no worker locks it
    assert search("--trials", "1", *keys, pause=0) == 0
    assert (tmp_path / "runs" / "run-000" / "started").read_text() == "x"
    assert trials(tmp_path)[-1].value == trials(tmp_path)[0].value


def test_a_trial_of_the_real_trainer_is_selected_by_validation_seeds(
    experiment: Experiment, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = experiment(epochs=2, axes=[0])
    options = ["--trials", "1", "--search", "model_params.layer_param=2:4"]
    options += ["--search", "data_params.shifts=true,false", "train_params.test_every=1"]
    assert sweep.main([str(path), *options, "data_params.validation_seeds=1"]) == 0
    (trial,) = trials(tmp_path)
    run = tmp_path / "runs" / "run-000"
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model_params"]["layer_param"] == trial.params["model_params.layer_param"]
    assert resolved["data_params"]["shifts"] is (trial.params["data_params.shifts"] == "true")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [line["loss"] for line in lines if line["phase"] == "validation"]
    assert len(validation) == 2
    assert trial.value == min(validation)
    assert [line["epoch"] for line in lines if line["phase"] == "test"] == [2]
    for path in (tmp_path / "runs").glob("*-sweep.journal*"):
        path.unlink()
    other = ["--trials", "1", "--search", "model_params.dropout=0.6:0.7", "train_params.test_every=1"]
    assert sweep.main([str(experiment(epochs=2, axes=[0])), *other]) == 2
    assert "run-000: this run was started with other settings" in capfd.readouterr().err


def test_workers_share_a_study(start: Callable[..., Any], tmp_path: Path) -> None:
    workers = [start("--trials", "7", pause=0.05) for _ in range(2)]
    for worker in workers:
        _, error = worker.communicate(timeout=120)
        assert worker.returncode == 0, error
    found = trials(tmp_path)
    runs = [trial.user_attrs["run"] for trial in found]
    assert len(set(runs)) == len(found) >= 7
    assert all(trial.state.is_finished() for trial in found)
    assert len({tuple(sorted(trial.params.items())) for trial in found}) == len(found)
    assert {(tmp_path / "runs" / run / "started").read_text() for run in runs} == {"x"}


def test_a_damaged_journal_is_named(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--trials", "1", pause=0) == 0
    journal = tmp_path / "runs" / "run-sweep.journal"
    content = journal.read_bytes()
    journal.write_bytes(content + b"{\n" + content)
    assert search("--trials", "3", pause=0) == 2
    assert f"{journal}: damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--search", "train_params.lr=1"], "--search: found 'train_params.lr=1'"),
        (["--search", "train_params.lr=1e-2:1e-3"], "LOW:HIGH"),
        (["--search", "model_params.dropout=0:1:log"], "with log LOW > 0"),
        (["--search", "model_params.dropout=0:2"], "model_params.dropout: found 2"),
        (["--search", "data_params.whiten=none,all"], "data_params.whiten: found 'all'"),
        (["--search", "data_params.whiten=none:isotropic"], "--search: found"),
        (["--search", "train_params.lrr=1:2"], "did you mean lr"),
        (["--search", "lr"], "section.key=value"),
        (["--launcher", "no-such-program"], "no-such-program"),
        (["data_params.test_seeds=40"], "universe.h5"),
        (["data_params.datafile=nowhere.h5"], "nowhere.h5"),
    ],
)
def test_bad_input_gets_status_2(
    options: list[str], words: str, experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(experiment()), "--trials", "1", *options]) == 2
    assert words in capsys.readouterr().err
