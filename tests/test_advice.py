"""Every piece of advice that a message prints works when it is followed.

A row of SITUATIONS is a folder in a state that makes a command fail, and for each piece of advice in its
message what a user then does. Commands run in that folder. A new message with advice is a new row.
"""

from __future__ import annotations

import system

import fcntl
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from test_pack import write_raw

import datasets.__main__
import trainer
from training.checkpoint import list_checkpoints, storage

PROGRAMS: dict[str, Callable[[], int]] = {"trainer.py": trainer.main, "datasets": datasets.__main__.main}
TRAIN = "trainer.py experiment.yaml"
# A start trains one step and stops.
EXPERIMENT: dict[str, dict[str, Any]] = {
    "model_params": {"architecture": "RACOON", "layer_param": 1, "dropout": 0.5, "name": "run"},
    "data_params": {
        "datafile": "universe.h5",
        "train_seeds": 1,
        "test_seeds": 1,
        "newton_augmentation": 1.0,
        "axes": [0],
    },
    "train_params": {"epochs": 1, "lr": 0.001, "log_dir": "runs", "batch_size": 32, "max_minutes": 1e-6},
}


def run(command: str) -> int:
    """Run `python [-m] PROGRAM ARGUMENTS` in this process; returns its exit status."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    program, *arguments = shlex.split(command.removeprefix("python -m "))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *arguments])
            return PROGRAMS[program]()
    except SystemExit as exit:
        return int(exit.code or 0)


class Printed(str):
    """A regular expression that finds a command in the message."""


@dataclass(frozen=True)
class Situation:
    """A state of the folder in which a command fails, its message, and the advice in it."""

    name: str
    prepare: Callable[[], object]
    command: str
    message: str
    """Regular expression of what the command prints."""
    advice: dict[str, list[Any]]
    """What a user does, by the words of the message: functions and commands, also commands it prints."""
    status: int = 2
    during: Callable[[], Any] = field(default=nullcontext)
    """The command runs in this context."""


def start() -> None:
    assert run(TRAIN) == 0


def other_universe() -> None:
    start()
    assert run("datasets synthesize universe.h5 --seeds 2 --seed 7 --force") == 0


def damage() -> None:
    start()
    shutil.copytree("runs/run/checkpoints", "backup")
    for checkpoint in list_checkpoints(Path("runs/run/checkpoints")):
        (checkpoint.folder / "model.safetensors").write_bytes(b"")


def copy_backup() -> None:
    shutil.rmtree("runs/run/checkpoints")
    shutil.copytree("backup", "runs/run/checkpoints")


@contextmanager
def locked() -> Iterator[None]:
    Path("runs/run").mkdir(parents=True, exist_ok=True)
    with Path("runs/run/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def renaming() -> Iterator[None]:
    """The folder of the run is renamed while it trains."""
    original = storage.write_checkpoint

    def write(*arguments: Any) -> None:
        Path("runs/run").rename("runs/other")
        original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_checkpoint", write)
        yield


@contextmanager
def full_disk() -> Iterator[None]:
    def write(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "write_new", write)
        patch.setattr(system, "write_atomically", lambda *arguments: None)
        yield


def environment(**variables: str) -> Callable[[], Any]:
    @contextmanager
    def context() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            yield

    return context


def chunk() -> None:
    with h5py.File("universe.h5", "r+") as file:
        cube = file["gr_seed0000"][:]
        del file["gr_seed0000"]
        file.create_dataset("gr_seed0000", data=cube, chunks=(8, 8, 8))


def spoil() -> None:
    with h5py.File("universe.h5", "r+") as file:
        file["gr_seed0000"][1, 2, 3] = float("nan")


def constant() -> None:
    with h5py.File("universe.h5", "r+") as file:
        for name in ("gr_seed0000", "newton_seed0000"):
            file[name][:] = 2.5


LONG = "train_params.epochs=9 train_params.max_minutes=5"
SYNTHETIC = "data_params.synthetic={size: 64, strength: 100, seed: 3}"
IN_EVALUATION = "train_params.batch_size=128"
SAME = "the same command"
SITUATIONS = [
    Situation(
        "a run is stopped",
        start,
        TRAIN,
        "stopped at step 2 .*the same command resumes",
        {SAME: [f"{TRAIN} train_params.max_minutes=null"]},
        status=0,
    ),
    Situation(
        "other settings",
        start,
        f"{TRAIN} train_params.lr=0.5",
        "train_params.lr: .*\nUse the same settings, or another model_params.name",
        {
            "the same settings": [TRAIN],
            "another name": [f"{TRAIN} train_params.lr=0.5 model_params.name=new"],
        },
    ),
    Situation(
        "other data",
        other_universe,
        TRAIN,
        "saved from other data:(.|\n)*Use the data of the run, or choose another model_params.name",
        {
            "the data of the run": [
                "datasets synthesize universe.h5 --seeds 4 --strength 100 --force",
                TRAIN,
            ],
            "another name": [f"{TRAIN} model_params.name=new"],
        },
    ),
    Situation(
        "another program trains the run",
        start,
        TRAIN,
        r"Wait until it ends, or choose another model_params.name(.|\n)* remove runs/run/\.lock",
        {
            "wait": [TRAIN],
            "another name": [f"{TRAIN} model_params.name=new"],
            "remove the lock": [lambda: Path("runs/run/.lock").unlink(), TRAIN],
        },
        during=locked,
    ),
    Situation(
        "a folder renamed during its training",
        start,
        TRAIN,
        "Give it its name again, or set model_params.name to the new one. Then run the same command",
        {
            "its name again": [lambda: Path("runs/other").rename("runs/run"), TRAIN],
            "the new name": [f"{TRAIN} model_params.name=other"],
        },
        during=renaming,
    ),
    Situation(
        "a full disk",
        start,
        TRAIN,
        "No space left on device.*is unchanged. Free space or correct the permissions, then run the same",
        {"free space": [TRAIN]},
        during=full_disk,
    ),
    Situation(
        "damaged checkpoints only",
        damage,
        TRAIN,
        "To resume, copy a complete checkpoint there. To start again, remove that folder or choose another",
        {
            "copy a complete one": [copy_backup, TRAIN],
            "remove that folder": [lambda: shutil.rmtree("runs/run/checkpoints"), TRAIN],
            "another name": [f"{TRAIN} model_params.name=new"],
        },
    ),
    Situation(
        "a training that diverges",
        start,
        f"{TRAIN} model_params.name=fast train_params.lr=1e38 {LONG}",
        "Train again with a lower train_params.lr, under another model_params.name",
        {"a lower lr, another name": [f"{TRAIN} model_params.name=new train_params.lr=0.0005"]},
    ),
    Situation(
        "starts shorter than an evaluation",
        lambda: [run(f"{TRAIN} {IN_EVALUATION}") for _ in range(2)],
        f"{TRAIN} {IN_EVALUATION}",
        "Raise train_params.max_minutes or the time limit of the job, then run the command again",
        {"raise max_minutes": [f"{TRAIN} {IN_EVALUATION} train_params.max_minutes=9"]},
    ),
    Situation(
        "fp16 on a CPU",
        lambda: None,
        f"{TRAIN} train_params.mixed_precision=fp16",
        "allowed on a CPU: no, bf16",
        {value: [f"{TRAIN} train_params.mixed_precision={value}"] for value in ("no", "bf16")},
    ),
    Situation(
        "a batch larger than the training set",
        lambda: None,
        f"{TRAIN} train_params.batch_size=200",
        "Reduce batch_size to 128 or less, or add seeds",
        {
            "reduce": [f"{TRAIN} train_params.batch_size=128"],
            "add seeds": [
                "datasets synthesize more.h5 --seeds 3",
                f"{TRAIN} train_params.batch_size=200 data_params.datafile=more.h5 data_params.train_seeds=2",
            ],
        },
    ),
    Situation(
        "an unknown tracker",
        lambda: None,
        f"{TRAIN} train_params.trackers=[nonsense]",
        "train_params.trackers: found 'nonsense', allowed",
        {"remove it from the list": [TRAIN]},
    ),
    Situation(
        "a misspelled network",
        lambda: None,
        f"{TRAIN} model_params.architecture=RACON",
        "did you mean RACOON",
        {"RACOON": [f"{TRAIN} model_params.architecture=RACOON"]},
    ),
    Situation(
        "an odd variable of the launcher",
        lambda: None,
        TRAIN,
        "environment variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS: found 'two'.*Correct it or unset it",
        {"unset it": [TRAIN]},
        during=environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="two"),
    ),
    Situation(
        "no data file",
        lambda: Path("universe.h5").unlink(),
        TRAIN,
        "Set data_params.datafile .* to an HDF5 file of cubes, or create one",
        {
            "synthesize": [Printed(r"python -m datasets synthesize \S+ --seeds \d+"), TRAIN],
            "another datafile": [
                "datasets synthesize other.h5 --seeds 2",
                f"{TRAIN} data_params.datafile=other.h5",
            ],
        },
    ),
    Situation(
        "another synthetic universe than in the file",
        lambda: None,
        f"{TRAIN} '{SYNTHETIC}'",
        "Remove the file, choose another data_params.datafile, or remove data_params.synthetic",
        {
            "remove the file": [lambda: Path("universe.h5").unlink(), f"{TRAIN} '{SYNTHETIC}'"],
            "another datafile": [f"{TRAIN} '{SYNTHETIC}' data_params.datafile=other.h5"],
            "remove synthetic": [TRAIN],
        },
    ),
    Situation(
        "constant cubes",
        constant,
        f"{TRAIN} data_params.standardize=train",
        r"did not finish writing; rerun it\.\n *python -m datasets inspect universe.h5 lists",
        {
            "rerun": [
                "datasets synthesize universe.h5 --seeds 2 --force",
                f"{TRAIN} data_params.standardize=train",
            ],
        },
    ),
    Situation(
        "small chunks",
        chunk,
        TRAIN,
        "whole cubes are slow to read(.|\n)*Repack the file once",
        {
            "repack": [
                Printed(r"python -m datasets repack \S+ \S+"),
                f"{TRAIN} data_params.datafile=universe_contiguous.h5",
            ]
        },
        status=0,
    ),
    Situation(
        "an output file that exists",
        lambda: None,
        "datasets synthesize universe.h5 --seeds 2",
        "exists already. Choose another name, or overwrite it with --force",
        {
            "another name": ["datasets synthesize other.h5 --seeds 2"],
            "--force": ["datasets synthesize universe.h5 --seeds 2 --force"],
        },
    ),
    Situation(
        "a plot into a folder that does not exist",
        lambda: None,
        "datasets inspect universe.h5 --plot plots/out.png",
        "no folder .*plots. Create it, or choose another",
        {
            "create it": [lambda: Path("plots").mkdir(), "datasets inspect universe.h5 --plot plots/out.png"],
            "choose another": ["datasets inspect universe.h5 --plot out.png"],
        },
    ),
    Situation(
        "a folder as data file",
        lambda: write_raw(Path("raw")),
        f"{TRAIN} data_params.datafile=raw",
        "is a folder, not an HDF5 file(.|\n)*To pack raw gevolution output",
        {
            "pack": [
                Printed(r"python -m datasets pack \S+ \S+ --redshift \S+"),
                f"{TRAIN} data_params.datafile=OUT.h5",
            ]
        },
    ),
    Situation(
        "a redshift without snapshot",
        lambda: write_raw(Path("raw")),
        "datasets pack raw out.h5 --redshift 7",
        "no snapshot at redshift 7; choose one of .*1",
        {"one of them": ["datasets pack raw out.h5 --redshift 1"]},
    ),
    Situation(
        "a cube with NaN",
        spoil,
        TRAIN,
        "values that are NaN, infinite or too large for float32.*Copy the file again, or rerun",
        {"copy it again": ["datasets synthesize universe.h5 --seeds 4 --strength 100 --force", TRAIN]},
    ),
    Situation(
        "a batch that does not divide",
        lambda: None,
        f"{TRAIN} train_params.batch_size=33 train_params.gradient_accumulation_steps=2",
        "batch_size: found 33, allowed: a multiple of 2, at least 4",
        {"a multiple": [f"{TRAIN} train_params.batch_size=34 train_params.gradient_accumulation_steps=2"]},
    ),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_advice_works_when_it_is_followed(
    situation: Situation,
    universe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "before"
    folder.mkdir()
    shutil.copy(universe, folder / "universe.h5")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    monkeypatch.chdir(folder)
    situation.prepare()
    capfd.readouterr()
    with situation.during():
        status = run(situation.command)
    message = "".join(capfd.readouterr())
    assert status == situation.status, message
    assert re.search(situation.message, message), message
    for words, steps in situation.advice.items():
        copied = tmp_path / re.sub(r"\W", "-", words)
        shutil.copytree(folder, copied)
        monkeypatch.chdir(copied)
        for step in steps:
            if callable(step):
                step()
                continue
            found = re.search(step, message) if isinstance(step, Printed) else None
            status = run(found[0] if found else step)
            assert status == 0, f"{words}: {step}: {''.join(capfd.readouterr())}"
