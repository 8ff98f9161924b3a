"""What tests share: a tiny universe, experiments on it, and an accelerator of their own."""

import system  # noqa: F401  before torch

import multiprocessing.forkserver
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from fork_server import PROCESSES, ForkServer

import datasets
from training import distributed

DATA_KEYS = {"standardize", "cache", "channels", "symmetries", "synthetic", "local_copy"}
DATA_KEYS |= {"validation_seeds", "whiten", "pairs", "shifts"}


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in singletons: one test's would be the next one's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


HANDLERS = {number: signal.getsignal(number) for number in distributed.SIGNALS}


def restore_signal_handlers() -> None:
    """A program that a test or a fixture runs leaves signals ignored, and processes inherit that."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _own_signal_handlers() -> Iterator[None]:
    restore_signal_handlers()
    yield
    restore_signal_handlers()


@pytest.fixture(scope="session")
def universe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube file of four seeds of 64^3."""
    path = tmp_path_factory.mktemp("universe") / "universe.h5"
    datasets.write_synthetic(path, seeds=4, size=64, strength=100)
    return path


@pytest.fixture(scope="session")
def fork_server() -> ForkServer:
    """Starts trainings and launchers in milliseconds."""
    restore_signal_handlers()
    root = Path(__file__).parents[1]
    PROCESSES.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(f"{root}/{name}" for name in ("", "tests", "benchmarks")))
        patch.delenv("OMP_NUM_THREADS", raising=False)  # a training takes it as set by the user
        multiprocessing.forkserver.ensure_running()
    return ForkServer()


@pytest.fixture
def experiment(tmp_path: Path, universe: Path) -> Callable[..., Path]:
    """Writes an experiment: a small RACOON on three seeds, tested on one; any key may be changed."""

    def write(name: str = "experiment.yaml", **changes: Any) -> Path:
        sections: dict[str, dict[str, Any]] = {
            "model_params": {"architecture": "RACOON", "layer_param": 2, "dropout": 0.5, "name": "run"},
            "data_params": {
                "datafile": str(universe),
                "train_seeds": 3,
                "test_seeds": 1,
                "newton_augmentation": 1.0,
                "axes": [0, 2],
            },
            "train_params": {"epochs": 1, "lr": 0.001, "log_dir": str(tmp_path / "runs"), "batch_size": 96},
        }
        for key, value in changes.items():
            section = next((s for s, keys in sections.items() if key in keys), None) or (
                "data_params"
                if key in DATA_KEYS
                else "model_params"
                if key in ("activation", "padding")
                else "train_params"
            )
            sections[section][key] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(sections))
        return path

    return write
