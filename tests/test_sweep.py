"""Hyperparameter sweeps: trials are ordinary runs, bad ones are pruned, a killed sweep resumes."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

optuna = pytest.importorskip("optuna", reason="the extra sweep is not installed")

SWEEP = Path(__file__).parent.parent / "experiments" / "sweep.py"
Experiment = Callable[..., Path]

# A trainer whose loss depends on the learning rate alone, with the files and signals that a sweep relies on.
TRAINER = """
import json, pathlib, signal, sys, time
keys = dict(override.split("=") for override in sys.argv[3:])
run = pathlib.Path("RUNS") / keys["model_params.name"]
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


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    """experiments/sweep.py, which is a program and not a module."""
    sys.path.insert(0, str(SWEEP.parent))
    spec = importlib.util.spec_from_file_location("sweep", SWEEP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.POLL_SECONDS = 0.02  # type: ignore[attr-defined]
    return module


@pytest.fixture
def search(sweep: ModuleType, experiment: Experiment, tmp_path: Path) -> Callable[..., int]:
    """Runs a sweep with the trainer above."""

    def run(*options: str, pause: float = 0.05, fail: float = 1) -> int:
        program = TRAINER.replace("RUNS", str(tmp_path / "runs"))
        (tmp_path / "fake.py").write_text(program.replace("PAUSE", str(pause)).replace("FAIL", str(fail)))
        launcher = f"{sys.executable} {tmp_path / 'fake.py'}"
        return int(sweep.main([str(experiment()), "--launcher", launcher, *options]))

    return run


def trials(tmp_path: Path) -> list[Any]:
    return list(load_study(tmp_path).get_trials())


def load_study(tmp_path: Path) -> Any:
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "runs" / "run-sweep.journal"))
    return optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(backend))


def test_trials_are_runs_and_the_lowest_loss_wins(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--trials", "5", "--layer-param", "4:8", "--dropout", "0:0.3") == 0
    found = trials(tmp_path)
    assert [trial.user_attrs["run"] for trial in found] == [f"run-{number:03}" for number in range(5)]
    for trial in found:
        assert set(trial.params) == {"layer_param", "dropout", "lr"}
        assert 4 <= trial.params["layer_param"] <= 8
        assert trial.params["dropout"] <= 0.3
        lines = (tmp_path / "runs" / trial.user_attrs["run"] / "metrics.jsonl").read_text().splitlines()
        assert trial.intermediate_values == {
            line["epoch"]: line["loss"] for line in map(json.loads, lines[: len(trial.intermediate_values)])
        }
    complete = [trial for trial in found if trial.state.name == "COMPLETE"]
    best = min(complete, key=lambda trial: trial.value)
    assert f"best: {tmp_path / 'runs' / best.user_attrs['run']} " in capsys.readouterr().out
    settings = {tuple(sorted(trial.params.items())) for trial in found}
    assert len(settings) == 5

    assert search("--trials", "6", "--layer-param", "4:8", "--dropout", "0:0.3") == 0  # one more, a new one
    assert len(trials(tmp_path)) == 6
    assert tuple(sorted(trials(tmp_path)[-1].params.items())) not in settings


def test_a_sweep_is_not_resumed_with_another_experiment(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--trials", "1") == 0
    for change in ("train_params.epochs=9", "train_params.batch_size=32"):
        assert search("--trials", "2", change) == 2
        assert change.split("=")[0] in capsys.readouterr().err
    assert len(trials(tmp_path)) == 1
    assert search("--trials", "2", "train_params.lr=0.5", "model_params.layer_param=9") == 0, "are searched"


@pytest.mark.parametrize("launcher", ["'", "no-such-program", ""])
def test_a_launcher_that_cannot_start(
    sweep: ModuleType, experiment: Experiment, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    assert sweep.main([str(experiment()), "--launcher", launcher]) == 2
    assert "--launcher" in capsys.readouterr().err


def test_a_trial_worse_than_the_median_is_stopped(search: Callable[..., int], tmp_path: Path) -> None:
    assert search("--trials", "12", pause=0.15) == 0
    pruned = [trial for trial in trials(tmp_path) if trial.state.name == "PRUNED"]
    assert pruned
    for trial in pruned:
        assert not (tmp_path / "runs" / trial.user_attrs["run"] / "model" / "config.json").exists()


def test_a_trial_that_fails_does_not_stop_the_others(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--trials", "6", fail=1e-3) == 0
    states = [trial.state.name for trial in trials(tmp_path)]
    assert "FAIL" in states
    assert "COMPLETE" in states


def test_a_sweep_without_a_complete_trial_is_an_error(
    search: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--trials", "2", fail=0) == 2
    assert "no trial of run completed" in capsys.readouterr().err


def test_a_killed_sweep_resumes_its_trial(
    search: Callable[..., int], experiment: Experiment, tmp_path: Path
) -> None:
    assert search("--trials", "1", pause=0) == 0
    (tmp_path / "fake.py").write_text((tmp_path / "fake.py").read_text().replace("sleep(0)", "sleep(60)"))
    launcher = f"{sys.executable} {tmp_path / 'fake.py'}"
    command = [sys.executable, str(SWEEP), str(experiment()), "--launcher", launcher, "--trials", "3"]
    lines = tmp_path / "runs" / "run-001" / "metrics.jsonl"
    with subprocess.Popen(command) as process:
        while not lines.exists() or not lines.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    before = trials(tmp_path)[1].params
    assert search("--trials", "3", pause=0) == 0
    found = trials(tmp_path)
    assert [(trial.user_attrs["run"], trial.state.name) for trial in found[:3]] == [
        ("run-000", "COMPLETE"),
        ("run-001", "FAIL"),
        ("run-001", "COMPLETE"),
    ]
    assert found[2].params == before
    assert (tmp_path / "runs" / "run-001" / "started").read_text() == "xx"
    assert [json.loads(line)["epoch"] for line in lines.read_text().splitlines()][:4] == [1, 2, 3, 4]
    assert len({trial.user_attrs["run"] for trial in found}) == 3


def test_a_run_that_finished_without_its_sweep_is_not_trained_again(
    search: Callable[..., int], tmp_path: Path
) -> None:
    assert search("--trials", "1", pause=0) == 0
    study = load_study(tmp_path)
    orphan = study.ask()
    for name, (low, high) in {"layer_param": (4, 64), "dropout": (0.0, 0.7), "lr": (1e-4, 1e-2)}.items():
        suggest = orphan.suggest_int if name == "layer_param" else orphan.suggest_float
        suggest(name, low, high, log=name != "dropout")
    orphan.set_user_attr("run", "run-000")  # its folder is complete
    orphan.set_user_attr("worker", "gone")
    assert search("--trials", "1", pause=0) == 0
    assert (tmp_path / "runs" / "run-000" / "started").read_text() == "x"
    assert trials(tmp_path)[-1].value == trials(tmp_path)[0].value


def test_a_trial_of_the_real_trainer_is_selected_by_validation_seeds(
    sweep: ModuleType, experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(epochs=2, axes=[0])
    options = ["--trials", "1", "--layer-param", "2:4", "--shifts", "true", "--architecture", "RACOON"]
    options += ["train_params.test_every=1", "data_params.validation_seeds=1"]
    assert sweep.main([str(path), *options]) == 0
    (trial,) = trials(tmp_path)
    run = tmp_path / "runs" / "run-000"
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model_params"]["layer_param"] == trial.params["layer_param"]
    assert resolved["model_params"]["dropout"] == trial.params["dropout"]
    assert resolved["train_params"]["lr"] == trial.params["lr"]
    assert resolved["data_params"]["shifts"] is True
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [line["loss"] for line in lines if line["phase"] == "validation"]
    assert len(validation) == 2
    assert trial.value == min(validation)
    assert [line["epoch"] for line in lines if line["phase"] == "test"] == [2]


def test_workers_share_a_study(search: Callable[..., int], experiment: Experiment, tmp_path: Path) -> None:
    assert search("--trials", "1", pause=0.05) == 0
    launcher = f"{sys.executable} {tmp_path / 'fake.py'}"
    command = [sys.executable, str(SWEEP), str(experiment()), "--launcher", launcher, "--trials", "7"]
    workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    found = trials(tmp_path)
    assert len({trial.user_attrs["run"] for trial in found}) == len(found) >= 7
    assert all(trial.state.is_finished() for trial in found)
    assert len({tuple(sorted(trial.params.items())) for trial in found}) == len(found)
    assert len({trial.user_attrs["worker"] for trial in found[1:]}) == 2
    assert all(
        (tmp_path / "runs" / trial.user_attrs["run"] / "started").read_text() == "x" for trial in found
    )


def test_a_journal_that_ends_in_the_middle_of_a_record_is_resumed(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("--trials", "1", pause=0) == 0
    journal = tmp_path / "runs" / "run-sweep.journal"
    content = journal.read_bytes()
    journal.write_bytes(content + b'{"op_code": 4, "wor')
    assert search("--trials", "2", pause=0) == 0
    assert len(trials(tmp_path)) == 2
    assert journal.read_bytes().startswith(content)
    journal.write_bytes(content + b"{\n" + content)
    assert search("--trials", "3", pause=0) == 2
    assert f"{journal}: damaged" in capsys.readouterr().err


def test_a_trial_that_another_worker_has_just_asked_for_is_left_to_it(
    sweep: ModuleType, search: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert search("--trials", "1", pause=0) == 0
    study = load_study(tmp_path)
    trial = study.ask()
    with sweep.Worker(tmp_path / "runs" / "workers") as worker:
        worker.requeue_orphans(study)
        assert trials(tmp_path)[trial.number].state.name == "RUNNING"
        monkeypatch.setattr(sweep, "NAMING_SECONDS", 0)
        worker.requeue_orphans(study)
    assert trials(tmp_path)[trial.number].state.name == "FAIL"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "1"], "--lr: found '1'"),
        (["--lr", "1e-2:1e-3"], "LOW:HIGH"),
        (["--dropout", "0:2"], "--dropout"),
        (["--layer-param", "0:8"], "--layer-param"),
        (["--whiten", "all"], "--whiten: found 'all', allowed: some of none,isotropic"),
        (["data_params.test_seeds=40"], "universe.h5"),
        (["train_params.lrr=1"], "did you mean lr"),
        (["data_params.datafile=nowhere.h5"], "nowhere.h5"),
    ],
)
def test_bad_input_gets_status_2(
    options: list[str], words: str, search: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    assert search("--trials", "1", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_sigint_stops_the_trial_and_the_sweep_resumes(
    search: Callable[..., int], experiment: Experiment, tmp_path: Path
) -> None:
    assert search("--trials", "1", pause=0) == 0
    (tmp_path / "fake.py").write_text((tmp_path / "fake.py").read_text().replace("sleep(0)", "sleep(60)"))
    launcher = f"{sys.executable} {tmp_path / 'fake.py'}"
    command = [sys.executable, str(SWEEP), str(experiment()), "--launcher", launcher, "--trials", "2"]
    lines = tmp_path / "runs" / "run-001" / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not lines.exists() or not lines.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    assert search("--trials", "2", pause=0) == 0
    assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE", "FAIL", "COMPLETE"]
