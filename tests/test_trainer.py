"""Whole runs of the trainer, as a user starts them, in this process."""

import copy
import errno
import fcntl
import itertools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from test_resume import tensorboard_points
from torch.nn.functional import binary_cross_entropy_with_logits

import datasets
import models
import trainer
from training import checkpoint, config, distributed, logger, run

Experiment = Callable[..., Path]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run_dir / "model" / "model.safetensors")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


SLICES = 3 * 2 * 2 * 64  # seeds, gravities, axes, positions


def test_a_run_writes_its_files(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(epochs=3, test_every=2, batch_size=100)
    assert trainer.main([str(path)]) == 0
    run_dir = tmp_path / "runs" / "run"
    found = lines(run_dir)
    steps = math.ceil(SLICES / 100)
    assert [(line["phase"], line["epoch"], line["step"]) for line in found] == [
        ("train", 1, steps),
        ("train", 2, 2 * steps),
        ("test", 2, 2 * steps),
        ("train", 3, 3 * steps),
        ("test", 3, 3 * steps),
    ]
    common = {"phase", "epoch", "step", "loss", "accuracy", "precision", "recall", "f1", "tpr", "fpr", "auc"}
    common |= {"tp", "tn", "fp", "fn", "slices", "seconds", "slices_per_second"}
    for line in found:
        test = line["phase"] == "test"
        assert set(line) == common | ({"cube_accuracy", "pair_accuracy"} if test else set())
        assert line["slices"] == (SLICES // 3 if test else SLICES)
        assert line["tp"] + line["fn"] == line["tn"] + line["fp"] == line["slices"] // 2
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train_params"]["batch_size"] == 100
    assert [p.name for p in (run_dir / "checkpoints").iterdir()]
    network = models.load(run_dir / "model")
    with h5py.File(config.load_config(path).data_params.datafile) as file:
        slices = torch.from_numpy(file["gr_seed0003"][:4])[:, None]
    assert network(slices).shape == (4,)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in shown if line.startswith("epoch")] == [
        line["phase"] for line in found
    ]


def test_the_same_experiment_gives_the_same_numbers(experiment: Experiment, tmp_path: Path) -> None:
    for name, cache in [("first", "memory"), ("second", "disk")]:
        assert (
            trainer.main([str(experiment(name=f"{name}.yaml", cache=cache)), f"model_params.name={name}"])
            == 0
        )
    first, second = (tmp_path / "runs" / name for name in ("first", "second"))
    pairs = zip(weights(first).values(), weights(second).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k} for line in lines(run_dir)]
        for run_dir in (first, second)
    ]
    assert timeless[0] == timeless[1]


def test_a_finished_run_trains_as_many_epochs_again(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(epochs=2, keep_checkpoints=1)
    assert trainer.main([str(path)]) == 0
    capsys.readouterr()
    before = tree(tmp_path)
    assert trainer.main([str(path), "--no-extend"]) == 0
    assert tree(tmp_path) == before
    name = tmp_path / "runs" / "run"
    assert capsys.readouterr().out == f"{name} is complete at epoch 2; not extended (--no-extend)\n"
    assert trainer.main([str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{name} is complete at epoch 2; training 2 more"
    assert sum("2 of 4 epochs remain" in line for line in shown) == 1
    earlier = [path.name for path in (name / "checkpoints").iterdir()]
    assert f"step_{2 * SLICES // 96:08}" in earlier, "the network of the earlier end"
    assert trainer.main([str(path), "model_params.name=whole", "train_params.epochs=4"]) == 0
    run_dir, whole = (tmp_path / "runs" / name for name in ("run", "whole"))
    assert [line["epoch"] for line in lines(run_dir) if line["phase"] == "train"] == [1, 2, 3, 4]
    pairs = zip(weights(run_dir).values(), weights(whole).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_settings_that_change_the_result_are_refused_on_resume(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment()
    assert trainer.main([str(path)]) == 0
    before = tree(tmp_path)
    capsys.readouterr()
    assert trainer.main([str(path), "train_params.lr=0.5", "model_params.dropout=0.1"]) == 2
    error = capsys.readouterr().err
    assert "train_params.lr: the run has 0.001, this experiment 0.5" in error
    assert "model_params.dropout: the run has 0.5, this experiment 0.1" in error
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "PENGUIN", "layer_param": 1},
        {"channels": 3},
        {"standardize": "train"},
        {"gradient_accumulation_steps": 4},
        {"mixed_precision": "bf16"},
        {"schedule": "cosine", "warmup_epochs": 0.5, "gradient_clipping": 0.1, "label_smoothing": 0.1},
        {"deterministic": True, "symmetries": False, "activation": "leaky_relu"},
        {"early_stopping": 1, "test_every": 1, "lr": 1e-12, "epochs": 9},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_train(experiment: Experiment, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert trainer.main([str(experiment(**changes))]) == 0
    found = lines(tmp_path / "runs" / "run")
    assert all(math.isfinite(line["loss"]) for line in found)
    if "early_stopping" in changes:
        assert found[-1]["epoch"] < 9


def test_steps_are_those_of_plain_torch(experiment: Experiment) -> None:
    options = {"label_smoothing": 0.2, "gradient_clipping": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1}
    parts, _ = setup_run(experiment(dropout=0.0, **options))
    plain = copy.deepcopy(parts.network)
    optimizer = torch.optim.Adam(plain.parameters(), betas=(0.8, 0.95), weight_decay=0.1)
    for batch, lr in zip(parts.train_set.train_batches(0), (0.01, 0.02, 0.005), strict=False):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        logits = plain(batch.images)
        binary_cross_entropy_with_logits(logits, 0.8 * batch.labels + 0.1).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        optimizer.step()
        torch.testing.assert_close(trainer.train_step(parts, batch, lr), logits.detach())
    for found, expected in zip(parts.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_network_that_cannot_be_built_costs_no_universe(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic = {"size": 64, "strength": 1.0, "seed": 0}
    path = experiment(datafile=str(tmp_path / "new.h5"), synthetic=synthetic, architecture="RACON")
    check_refused(path, tmp_path, capsys, ["'RACON'", "RACOON"])


def test_accumulation_gives_the_gradient_of_the_whole_batch(experiment: Experiment, tmp_path: Path) -> None:
    """Without batch statistics and dropout the parts of a batch add up to the batch."""
    gradients = []
    for micro_batches in (1, 4):
        path = experiment(dropout=0.0, gradient_accumulation_steps=micro_batches)
        parts, _ = setup_run(path)
        for module in parts.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        parts.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
        trainer.train_step(parts, next(parts.train_set.train_batches(0)), 0.0)
        gradients.append(torch.cat([p.grad.flatten() for p in parts.network.parameters()]))
        (tmp_path / "runs").rename(tmp_path / f"runs{micro_batches}")
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def setup_run(path: Path) -> tuple[run.Run, run.TrainState]:
    loaded = config.load_config(path)
    accelerator = Accelerator()
    micro_batches = loaded.train_params.gradient_accumulation_steps or 1
    accelerator.gradient_accumulation_steps = micro_batches
    loaded = loaded.with_launch_settings(1, "no", micro_batches)
    checkpoints = checkpoint.CheckpointManager(loaded, accelerator)
    with closing(checkpoints):
        parts = run.setup_run(loaded, accelerator, distributed.StopSignals(), checkpoints, extend=True)
        assert parts is not None
        return parts


def test_a_training_that_diverges_stops_and_names_the_step(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(lr=1e38, epochs=9, architecture="PENGUIN", layer_param=1)
    assert trainer.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert "not finite" in error
    assert "step " in error
    assert "Traceback" not in error


def damage_with(value: float) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        file["gr_seed0001"][3, 4, 5] = value

    return damage


def replace(name: str, values: np.ndarray) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return damage


def remove(name: str) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        del file[name]

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_with(np.nan), ["gr_seed0001"]),
        (damage_with(np.inf), ["gr_seed0001"]),
        (remove("newton_seed0002"), ["seeds 2 have only the gr cube"]),
        (replace("gr_seed0000", np.zeros((64, 64, 32), "f4")), ["gr_seed0000", "(64, 64, 32)"]),
        (replace("gr_seed0000", np.zeros((128,) * 3, "f4")), ["128", "64"]),
        (replace("gr_seed0000", np.full((64,) * 3, b"x")), ["gr_seed0000"]),
    ],
    ids=["nan", "infinity", "twin", "not cubic", "sizes", "not numeric"],
)
def test_bad_data_is_named_and_nothing_is_created(
    experiment: Experiment,
    universe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[h5py.File], None],
    expected: list[str],
) -> None:
    bad = tmp_path / "bad.h5"
    bad.write_bytes(universe.read_bytes())
    with h5py.File(bad, "r+") as file:
        damage(file)
    path = experiment(datafile=str(bad))
    check_refused(path, tmp_path, capsys, [str(bad), *expected])


def check_refused(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: list[str], *overrides: str
) -> None:
    before = tree(tmp_path)
    assert trainer.main([str(path), *overrides]) == 2
    error = capsys.readouterr().err
    assert [text for text in expected if text not in error] == [], error
    assert "Traceback" not in error
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"datafile": "absent.h5"}, ["absent.h5"]),
        ({"train_seeds": 9}, ["universe.h5", "4 seeds have both twins: 0-3"]),
        ({"batch_size": 4000}, ["train_params.batch_size", "4000"]),
        ({"architecture": "PENGIUN"}, ["model_params.architecture", "PENGUIN"]),
        ({"activation": "tanhh"}, ["model_params.activation", "tanhh", "relu"]),
        ({"gradient_accumulation_steps": 7}, ["train_params.batch_size", "7"]),
        ({"dropout": 1.5}, ["model_params.dropout", "1.5"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named_and_nothing_is_created(
    experiment: Experiment,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    expected: list[str],
) -> None:
    check_refused(experiment(**changes), tmp_path, capsys, expected)


@pytest.mark.parametrize("content", [b"", b"no HDF5", None], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_cube_file(
    experiment: Experiment,
    universe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
) -> None:
    bad = tmp_path / "bad.h5"
    bad.write_bytes(universe.read_bytes()[:-1000] if content is None else content)
    check_refused(experiment(datafile=str(bad)), tmp_path, capsys, [str(bad)])


def test_a_run_folder_that_cannot_be_written(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    check_refused(experiment(), tmp_path, capsys, ["runs"])


def test_a_synthetic_universe_is_written_once(experiment: Experiment, tmp_path: Path) -> None:
    data = tmp_path / "made.h5"
    path = experiment(datafile=str(data), synthetic={"size": 64, "strength": 100.0})
    assert trainer.main([str(path)]) == 0
    made = data.stat().st_mtime_ns
    assert trainer.main([str(path)]) == 0
    assert data.stat().st_mtime_ns == made


def test_preflight_says_what_a_start_says_and_creates_nothing(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines_of(*options: str) -> list[str]:
        assert trainer.main([str(experiment(validation_seeds=1)), *options]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert max(map(len, shown)) <= 100
        return [line for line in shown if re.match(r"(network|data|slices|steps) {2,}", line)]

    preflight = lines_of("--preflight")
    assert not (tmp_path / "runs").exists()
    assert preflight == lines_of()
    assert [line.split()[0] for line in preflight] == ["network", "data", "slices", "steps"]
    assert preflight[1].endswith("universe.h5, 64^3 cells, phi, z = 1")
    assert preflight[2] == "slices   512 training (seeds 0-1), 256 validation (seeds 2), 256 test (seeds 3)"
    assert preflight[3] == "steps    6 per epoch, each of 96 slices"


def test_a_new_run_estimates_its_time_once(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(experiment(epochs=2, batch_size=24, save_every_steps=1, max_minutes=1e-6))
    assert trainer.main([path]) == 0
    assert "estimated time" not in capsys.readouterr().out
    assert trainer.main([path, "train_params.max_minutes=null", "model_params.name=other"]) == 0
    assert capsys.readouterr().out.count("estimated time: ") == 1


@pytest.mark.parametrize("columns", [40, 100])
def test_a_line_fits_the_terminal_or_100_columns(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: columns != 100)
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "epoch   1/10  test        loss 0.6931  accuracy 0.5000  auc 0.5000  cubes 0.5000  pairs 0.5000"
    wrapped = logger.wrap(text)
    assert max(map(len, wrapped.splitlines())) <= columns
    assert wrapped.split() == text.split()


def test_without_arguments_a_usage_with_examples_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main([]) == 2
    assert "python trainer.py experiments/temp.yaml" in capsys.readouterr().err


def test_a_local_copy_is_read_and_the_original_recorded(
    experiment: Experiment, universe: Path, tmp_path: Path
) -> None:
    original, copied = tmp_path / "original.h5", tmp_path / "copied.h5"
    shutil.copy(universe, copied)
    path = str(experiment(datafile=str(original), local_copy=str(copied)))
    assert trainer.main([path]) == 0
    run_dir = tmp_path / "runs" / "run"
    saved = json.loads(max((run_dir / "checkpoints").iterdir()).joinpath("state.json").read_text())
    assert saved["data_identity"]["path"] == str(original)
    copied.rename(original)
    assert trainer.main([path]) == 0  # the same run resumes without the copy
    assert [line["epoch"] for line in lines(run_dir) if line["phase"] == "train"] == [1, 2]


def test_a_checkpoint_is_complete_when_the_stop_is_reported(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, log_line, complete = checkpoint.storage.write_checkpoint, logger.RunLogger.print, []

    def slow_write(*arguments: Any) -> None:
        time.sleep(0.5)
        write(*arguments)

    def print_and_list(log: logger.RunLogger, text: str) -> None:
        log_line(log, text)
        if text.startswith("stopped"):
            complete.extend((tmp_path / "runs" / "run" / "checkpoints").glob("step_*/manifest.json"))

    monkeypatch.setattr(checkpoint.storage, "write_checkpoint", slow_write)
    monkeypatch.setattr(logger.RunLogger, "print", print_and_list)
    assert trainer.main([str(experiment(max_minutes=1e-4))]) == 0
    assert len(complete) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data_params.train_seeds=9", "seeds 4-9 have no cubes"),
        ("model_params.architecture=RACON", "did you mean RACOON?"),
        ("data_params.channels=65", "allowed: at most 64, the cube's side"),
    ],
)
def test_preflight_finds_what_would_stop_the_run(
    override: str, message: str, experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main([str(experiment()), override, "--preflight"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_tensorboard_shows_each_step_once(experiment: Experiment, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = experiment(epochs=2, test_every=1)
    assert [trainer.main([str(path)]) for _ in range(2)] == [0, 0]
    run_dir = tmp_path / "runs" / "run"
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    for phase in ("train", "test"):
        steps = [line["step"] for line in lines(run_dir) if line["phase"] == phase]
        shown = events.Scalars(f"loss/{phase}")
        assert [event.step for event in shown] == steps
        losses = [line["loss"] for line in lines(run_dir) if line["phase"] == phase]
        assert [event.value for event in shown] == pytest.approx(losses)
    tags = set(events.Tags()["images"]) | set(events.Tags()["tensors"])
    assert {"confusion/test", "twins/test", "precision_recall/test"} <= tags
    assert {"slices/gr", "slices/newton", "slices/difference"} <= tags
    assert "custom_scalars__config__" in events.summary_metadata
    assert all((run_dir / f"training.{kind}").stat().st_size > 1000 for kind in ("png", "pdf"))
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_clock_that_is_behind_changes_no_order(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run_dir = str(experiment(log_every_steps=1)), tmp_path / "runs" / "run"
    for behind in (0, 1000, 1000, 0):
        with monkeypatch.context() as patch:
            now = time.time
            patch.setattr(time, "time", lambda now=now, behind=behind: now() - behind)
            assert trainer.main([path]) == 0
    points = tensorboard_points(run_dir)["loss/train"]
    assert [step for step, _ in points] == [8, 16, 24, 32]


def test_event_files_keep_their_order_when_they_are_renamed(tmp_path: Path) -> None:
    last = int(time.time())
    for number, second in enumerate([last - 2, last - 1, last, last + 50]):
        (tmp_path / f"events.out.tfevents.{second}.host.1.0").write_text(str(number))
    logger.order_event_files(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.read_text() for file in files] == ["0", "1", "2", "3"]
    assert int(files[-1].name.split(".")[3]) < time.time()


def test_a_full_disk_that_tensorboard_meets_is_named(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = str(experiment())
    at_step(1, lambda: monkeypatch.setattr(RecordWriter, "write", full), monkeypatch)
    assert trainer.main([path]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'runs' / 'run'}: No space left on device. Free space" in error
    assert "Traceback" not in error
    monkeypatch.undo()
    assert trainer.main([path]) == 0


def test_one_program_at_a_time_trains_a_run(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment()
    assert trainer.main([str(path)]) == 0
    with (tmp_path / "runs" / "run" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_refused(path, tmp_path, capsys, ["another program is training this run"])
    assert trainer.main([str(path)]) == 0


def test_other_settings_are_refused_before_a_damaged_checkpoint_is_renamed(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(save_every_steps=1)
    assert trainer.main([str(path)]) == 0
    newest = max((tmp_path / "runs" / "run" / "checkpoints").glob("step_*"))
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    check_refused(path, tmp_path, capsys, ["train_params.lr: the run has"], "train_params.lr=0.5")
    (newest / "state.json").write_bytes(b"{")
    check_refused(path, tmp_path, capsys, ["train_params.lr: the run has"], "train_params.lr=0.5")


def test_damaged_lines_of_the_log_are_dropped_alone(experiment: Experiment, tmp_path: Path) -> None:
    path = experiment(epochs=2, test_every=1)
    assert trainer.main([str(path)]) == 0
    log = tmp_path / "runs" / "run" / "metrics.jsonl"
    good = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(good[0] + b'{"phase": "tr\n17\n\xff\n' + b"".join(good[1:]) + b'{"phase": "test", "st')
    assert trainer.main([str(path)]) == 0
    assert log.read_bytes().splitlines(keepends=True)[: len(good)] == good
    assert [line["epoch"] for line in lines(log.parent)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_divergence_that_only_the_evaluation_shows(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(lr=1e38, batch_size=SLICES, dropout=0.0)
    assert trainer.main([str(path)]) == 2
    assert "test after step 1: the network's output is not finite" in capsys.readouterr().err


def test_a_synthetic_universe_of_other_settings_is_refused(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experiment(synthetic={"size": 64, "strength": 7.0})
    check_refused(path, tmp_path, capsys, ["data_params.synthetic is", "'strength': 100"])


def at_step(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once, after a step of the training."""
    original, steps = trainer.train_step, itertools.count(1)

    def train_step(*arguments: Any) -> torch.Tensor:
        logits = original(*arguments)
        if next(steps) == step:
            action()
        return logits

    monkeypatch.setattr(trainer, "train_step", train_step)


@pytest.mark.parametrize("save_every_steps", [None, 1])
def test_a_run_whose_folder_is_renamed_stops_and_resumes_under_its_name(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    save_every_steps: int | None,
) -> None:
    path = experiment(epochs=2, save_every_steps=save_every_steps)
    assert trainer.main([str(path), "model_params.name=whole"]) == 0
    run_dir, moved = tmp_path / "runs" / "run", tmp_path / "runs" / "moved"
    at_step(SLICES // 96 + 2, lambda: run_dir.rename(moved), monkeypatch)
    assert trainer.main([str(path)]) == 2
    assert f"{run_dir}: this folder, or its .lock, was renamed or removed" in capsys.readouterr().err
    assert not run_dir.exists()
    moved.rename(run_dir)
    assert trainer.main([str(path), "train_params.epochs=2"]) == 0
    whole = weights(tmp_path / "runs" / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(run_dir).items())


def test_a_run_never_trains_on_data_that_changed_meanwhile(
    experiment: Experiment,
    universe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, original = tmp_path / "data.h5", tmp_path / "original.h5"
    shutil.copy2(universe, data)
    path = experiment(datafile=str(data), cache="disk", save_every_steps=1)
    assert trainer.main([str(path), "model_params.name=whole"]) == 0

    def replace() -> None:
        data.rename(original)
        shutil.copy(original, data)
        with h5py.File(data, "a") as file:
            file["gr_seed0003"][...] = 0

    at_step(3, replace, monkeypatch)
    assert trainer.main([str(path)]) == 2
    assert f"{data}: the file was changed or replaced while in use" in capsys.readouterr().err
    original.replace(data)
    assert trainer.main([str(path)]) == 0
    whole = weights(tmp_path / "runs" / "whole")
    assert all(
        torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "runs" / "run").items()
    )


def test_constant_data_cannot_be_standardized(
    experiment: Experiment, universe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "flat.h5"
    bad.write_bytes(universe.read_bytes())
    with h5py.File(bad, "r+") as file:
        for cube in file.values():
            cube[...] = 2.0
    check_refused(
        experiment(datafile=str(bad), standardize="train"), tmp_path, capsys, [str(bad), "all values are 2"]
    )


def test_a_repacked_file_is_the_same_data(experiment: Experiment, universe: Path, tmp_path: Path) -> None:
    chunked = tmp_path / "chunked.h5"
    with h5py.File(universe) as source, h5py.File(chunked, "w") as target:
        for name, cube in source.items():
            target.create_dataset(name, data=cube[...], chunks=(64, 64, 1), compression="gzip")
    assert trainer.main([str(experiment(datafile=str(chunked)))]) == 0
    assert trainer.main([str(experiment(datafile=str(universe)))]) == 0


def test_a_compiled_network_trains_to_the_same_numbers(experiment: Experiment, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    runs = {False: tmp_path / "runs" / "plain", True: tmp_path / "runs" / "compiled"}
    for compiled, folder in runs.items():
        counters.clear()
        path = experiment(architecture="LYNX", compile=compiled, dropout=0.0)  # it compiles fastest
        assert trainer.main([str(path), f"model_params.name={folder.name}"]) == 0
        assert bool(counters["stats"]["unique_graphs"]) is compiled
    for line, same in zip(*(lines(run_dir) for run_dir in runs.values()), strict=True):
        assert same["loss"] == pytest.approx(line["loss"], rel=1e-3)
    assert weights(runs[True]).keys() == weights(runs[False]).keys()


@pytest.fixture
def no_compiler() -> Iterator[None]:
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()
    missing = {"cpp.cxx": (None, "/nonexistent/c++"), "force_disable_caches": True}
    with torch._inductor.config.patch(missing), torch._dynamo.config.patch(suppress_errors=False):
        yield
    torch._dynamo.reset()


def test_a_required_compilation_that_fails_is_an_error(
    experiment: Experiment, no_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main([str(experiment(compile=True))]) == 2
    error = capsys.readouterr().err
    assert "cannot be compiled" in error
    assert "/nonexistent/c++" in error
    assert "Set train_params.compile to auto or false" in error


def test_an_optional_compilation_that_fails_is_skipped(no_compiler: None) -> None:
    network = models.build_model(architecture="RACOON", layer_param=2, dropout=0.0, size=64)
    slices = torch.randn(3, 1, 64, 64)
    before = network.train()(slices)
    plugin = SimpleNamespace(backend=DynamoBackend.NO)
    on_gpu = SimpleNamespace(state=SimpleNamespace(dynamo_plugin=plugin), device=torch.device("cuda"))
    run.compile_network(network, cast(Accelerator, on_gpu), "auto")
    assert network._compiled_call_impl is not None
    assert torch.equal(network(slices), before)


def test_validation_seeds_select_and_test_seeds_are_evaluated_once(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: set[int] = set()
    step = trainer.train_step

    def record(parts: run.Run, batch: datasets.Batch, lr: float) -> torch.Tensor:
        trained.update(datasets.decode(batch.ids.numpy(), 64).seed.tolist())
        return step(parts, batch, lr)

    monkeypatch.setattr(trainer, "train_step", record)
    assert trainer.main([str(experiment(epochs=3, validation_seeds=1, test_every=1))]) == 0
    run_dir = tmp_path / "runs" / "run"
    found = [(line["phase"], line["epoch"], line["slices"]) for line in lines(run_dir)]
    assert trained == {0, 1}
    assert found == [
        *(("train", 1, SLICES * 2 // 3), ("validation", 1, SLICES // 3)),
        *(("train", 2, SLICES * 2 // 3), ("validation", 2, SLICES // 3)),
        *(("train", 3, SLICES * 2 // 3), ("validation", 3, SLICES // 3)),
        ("test", 3, SLICES // 3),
    ]
    newest = checkpoint.list_checkpoints(run_dir / "checkpoints")[-1]
    assert newest.test_loss == lines(run_dir)[-2]["loss"], "the best checkpoint is that of the validation"
    calibration = json.loads((run_dir / "model" / "config.json").read_text()).get("calibration")
    assert calibration == newest.train_state["calibration"]


def test_the_network_records_what_selected_it(experiment: Experiment, tmp_path: Path) -> None:
    def selection(*overrides: str) -> dict[str, Any]:
        assert trainer.main([str(experiment()), *overrides]) == 0
        return json.loads((tmp_path / "runs/run/model/config.json").read_text())["selection"]

    first = {"set": "test", "seeds": [3, 4], "early_stopping": None, "extended_at_epoch": None}
    assert selection() == first | {"finished": True}
    assert selection("train_params.early_stopping=5")["early_stopping"] == 5
    assert selection()["extended_at_epoch"] == 2
    assert models.load(tmp_path / "runs/run/model").config["selection"]["extended_at_epoch"] == 2
    newest = max((tmp_path / "runs/run/checkpoints").iterdir())
    counters = json.loads((newest / "state.json").read_text())["train_state"]
    loaded = config.load_config(experiment(validation_seeds=1))
    state = run.TrainState(**counters | {"step_in_epoch": 1})
    assert run.describe_selection(loaded, state) == {
        "set": "validation",
        "seeds": [2, 3],
        "early_stopping": None,
        "extended_at_epoch": 2,
        "finished": False,
    }


def test_a_stop_during_the_final_test_repeats_the_evaluation(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiment(epochs=1, validation_seeds=1, early_stopping=1)
    assert trainer.main([str(path), "model_params.name=whole"]) == 0
    phase = trainer.evaluate_phase

    def stopped(*arguments: Any) -> Any:
        return None if arguments[3] == "test" else phase(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_phase", stopped)
        assert trainer.main([str(path)]) == 0
    run_dir, whole = (tmp_path / "runs" / name for name in ("run", "whole"))
    assert not (run_dir / "model").exists()
    assert trainer.main([str(path)]) == 0
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k} for line in lines(folder)]
        for folder in (run_dir, whole)
    ]
    assert timeless[0] == timeless[1]
    pairs = zip(weights(run_dir).values(), weights(whole).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_exported_network_whitens_its_input(
    experiment: Experiment, universe: Path, tmp_path: Path
) -> None:
    path = experiment(whiten="isotropic", shifts=True, pairs=True, standardize="train", architecture="LYNX")
    for cache in ("memory", "disk"):
        overrides = [f"data_params.cache={cache}", f"model_params.name={cache}"]
        assert trainer.main([str(path), *overrides, "model_params.padding=circular"]) == 0
    memory, disk = (tmp_path / "runs" / cache for cache in ("memory", "disk"))
    pairs = zip(weights(memory).values(), weights(disk).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    saved = json.loads((max((memory / "checkpoints").iterdir()) / "state.json").read_text())
    network = models.load(memory / "model")
    assert network.config["power"] == saved["train_state"]["power"]
    assert [spectrum and len(spectrum) for spectrum in network.config["power"]] == [32, None, 32]
    with h5py.File(universe) as file:
        cubes = [torch.from_numpy(file[f"{gravity}_seed0003"][()]) for gravity in ("newton", "gr")]
    with torch.inference_mode():
        logits = torch.cat(
            [network(cube.movedim(axis, 0)[:, None], axis) for cube in cubes for axis in (0, 2)]
        )
    labels = torch.tensor([0.0, 1.0]).repeat_interleave(128)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert float(loss) == pytest.approx(lines(memory)[-1]["loss"], rel=1e-4)


def test_running_metrics_are_logged_within_an_epoch(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = experiment(epochs=2, batch_size=48, log_every_steps=3)
    assert trainer.main([str(path)]) == 0
    events = EventAccumulator(str(tmp_path / "runs" / "run"), size_guidance={"scalars": 0}).Reload()
    steps = SLICES // 48
    expected = [epoch * steps + step for epoch in range(2) for step in range(3, steps, 3)]
    for tag in ("loss/step", "accuracy/step", "lr/step"):
        assert [event.step for event in events.Scalars(tag)] == expected
    shown = [line for line in capsys.readouterr().out.splitlines() if f"step 9/{steps}" in line]
    assert len(shown) == 2
    assert all("slices/s" in line and "left)" in line for line in shown)
