"""Training and evaluation on an emulated accelerator, compared with the CPU.

An emulation lasts until its process ends, so every test runs in a new process.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import gpu_check
import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
from emulated_accelerator import ACCELERATOR, install
from fork_server import PROCESSES, free_port, start
from test_evaluation import save_empty

import datasets
import evaluation
import trainer
import training.checkpoint.tensors
from analysis import figures
from training import metrics

TIME_LIMIT = 120.0  # seconds
TESTS = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("fork_server")


class Result(NamedTuple):
    """What a function in a process returned and printed, and what the emulation recorded."""

    status: int
    counts: Counter[str]
    memory_formats: set[tuple[str, str]]
    output: str = ""


def child(
    connection: Connection, kind: str, devices: int, environment: dict[str, str], function: str, args: Any
) -> None:
    """Run a function of this module on the emulation and send a Result."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    if kind != "cpu":
        install(kind, devices)
    run = getattr(sys.modules[__name__], function)
    status = getattr(run, "__wrapped__", run)(*args)
    connection.send(Result(status, ACCELERATOR.counts, ACCELERATOR.memory_formats))


def emulate(
    kind: str, function: Callable[..., Any], *args: Any, devices: int = 1, environments: Any = ({},)
) -> list[Result]:
    """Call `function` on an emulated device, in one process for each of `environments`."""
    with tempfile.TemporaryDirectory() as outputs:
        started = []
        for number, environment in enumerate(environments):
            ours, theirs = PROCESSES.Pipe()
            environment = {"OMP_NUM_THREADS": "1", **environment}
            options = (theirs, kind, devices, environment, function.__name__, args)
            process = start(child, *options, out=Path(outputs, str(number)))
            theirs.close()
            started.append((process, ours))
        results = []
        for number, (process, ours) in enumerate(started):
            process.join(TIME_LIMIT)
            process.kill()
            output = Path(outputs, str(number)).read_text()
            try:
                results.append(ours.recv()._replace(output=output))
            except EOFError:
                raise AssertionError(output) from None
    return results


def on(kind: str, devices: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on an emulated device."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run_in_child() -> None:
            emulate(kind, test, devices=devices)

        return run_in_child

    return decorate


def train(*arguments: str) -> int:
    """Run trainer.py; called in a child."""
    return trainer.main([*arguments])


def evaluate(*arguments: str) -> int:
    """Run evaluation.py on three seeds, as few as it takes, without drawing figures; called in a child."""
    figures.save = save_empty
    return evaluation.main([*arguments, "--seeds=1:4", "--allow-training-seeds"])


def train_until(step: int, *arguments: str) -> int:
    """Run trainer.py and request a stop in the given step; called in a child."""
    original, steps = trainer.train_step, iter(range(1, step + 1))

    def train_step(run: Any, batch: datasets.Batch, lr: float) -> torch.Tensor:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(run, batch, lr)

    trainer.train_step = train_step
    return train(*arguments)


def run_in_fork(*command: str) -> str:
    """Run a program in a fork of this process, so that it sees the emulated device; returns its output."""
    program, *arguments = command
    with tempfile.NamedTemporaryFile("r") as output:
        if (process := os.fork()) == 0:
            for descriptor in (1, 2):
                os.dup2(os.open(output.name, os.O_WRONLY | os.O_APPEND), descriptor)
            sys.argv = [program, *arguments]
            status = 1
            try:
                runpy.run_path(str(TESTS.parent / program), run_name="__main__")
            except SystemExit as exit:
                status = int(exit.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(process, 0)
        text = output.read()
    if status:
        raise gpu_check.ProgramError(f"{program}: exit status {os.waitstatus_to_exitcode(status)}\n{text}")
    return text


def check_gpu(*arguments: str) -> int:
    """Run gpu_check.py with the programs that it starts in forks; called in a child."""

    def run_program(program: str, *arguments: str) -> str:
        quick = ["--quick"] if program == "evaluation.py" else []
        return run_in_fork(program, *arguments, *quick)

    gpu_check.run_program = run_program
    return gpu_check.main([*arguments])


def weights(run: Path) -> dict[str, bytes]:
    tensors = safetensors.numpy.load_file(run / "model" / "model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def last_state(run: Path) -> dict[str, Any]:
    """The state.json of the newest checkpoint."""
    state: dict[str, Any] = json.loads((max((run / "checkpoints").glob("step_*")) / "state.json").read_text())
    return state


def last_checkpoint(run: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint."""
    return {
        f"{path.name} {name}": tensor.tobytes()
        for path in sorted(max((run / "checkpoints").glob("step_*")).glob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerator")


@pytest.fixture(scope="module")
def experiment(folder: Path, universe: Path) -> str:
    """A small RACOON on two seeds, tested on one: 4 steps per epoch."""
    path = folder / "experiment.yaml"
    path.write_text(f"""
model_params: {{architecture: RACOON, layer_param: 2, dropout: 0.0, name: cpu}}
data_params: {{datafile: {universe}, train_seeds: 2, test_seeds: 1, newton_augmentation: 1.0, axes: [0]}}
train_params: {{epochs: 2, lr: 0.001, log_dir: {folder}, batch_size: 64}}
""")
    return str(path)


@pytest.fixture(scope="module")
def on_cpu(experiment: str, folder: Path) -> Path:
    """The run on the CPU."""
    (result,) = emulate("cpu", train, experiment)
    assert result.status == 0, result.output
    return folder / "cpu"


# The emulation


@on("cuda", devices=2)
def test_operations_that_mix_devices_raise() -> None:
    ours, other, cpu = (torch.ones(3, device=device) for device in ("cuda:0", "cuda:1", "cpu"))
    assert [tensor.device for tensor in (ours, other)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(RuntimeError, match=r"same device.*cpu and cuda:0"):
        ours + cpu
    with pytest.raises(RuntimeError, match=r"same device.*cuda:0 and cuda:1"):
        ours + other
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([ours, cpu])
    with pytest.raises(RuntimeError, match="same device"):
        torch._foreach_add([ours], [torch.tensor(1.0)])
    assert (ours + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert ours[torch.tensor([0, 2])].device == ours.device
    with pytest.raises(TypeError, match="numpy"):
        ours.numpy()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        cpu.to("cuda:2")


@on("cuda")
def test_moving_returns_the_same_tensor_where_there_is_nothing_to_move() -> None:
    tensor = torch.ones(2, 3, 4, 4).to("cuda")
    assert tensor.to(torch.device("cuda")) is tensor
    assert tensor.to("cuda:0", torch.float32) is tensor
    moved = tensor.to(memory_format=torch.channels_last)
    assert moved.stride() == (48, 1, 12, 3)
    assert moved.device == tensor.device
    module = torch.nn.Linear(2, 1)
    parameter = module.weight
    module.to("cuda")
    assert module.weight is parameter
    assert parameter.device == tensor.device


@on("cuda")
def test_the_device_has_a_random_generator_of_its_own() -> None:
    torch.manual_seed(1)
    cpu_state, state = torch.get_rng_state(), torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    assert torch.equal(torch.get_rng_state(), cpu_state)
    assert first.tolist() != torch.rand(4).tolist()
    assert torch.rand(4, device="cuda").tolist() != first.tolist()
    torch.cuda.set_rng_state(state)
    assert torch.rand(4, device="cuda").tolist() == first.tolist()


@on("cuda")
def test_a_copy_arrives_when_somebody_waits() -> None:
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):
        tensor = torch.ones(3).to("cuda", non_blocking=True)
    with pytest.raises(RuntimeError, match="record_stream"):
        tensor.sum()
    tensor.record_stream(main)
    assert tensor.sum().isnan()
    main.wait_stream(side)
    assert tensor.sum().item() == 3
    on_host = tensor.to("cpu", non_blocking=True)
    assert on_host.isnan().all()
    tensor.zero_()
    torch.cuda.synchronize()
    assert on_host.tolist() == [1, 1, 1]


@on("cuda")
def test_running_metrics_wait_for_the_device_only_when_they_are_read() -> None:
    running, rows = metrics.RunningMetrics(accelerate.Accelerator()), torch.ones(2, device="cuda")
    before = ACCELERATOR.counts.copy()
    running.add(rows, rows, rows)
    assert ACCELERATOR.counts == before
    assert running.read()["accuracy"] == 1


@on("cuda")
def test_autocast_and_backward() -> None:
    images = torch.rand(2, 1, 4, 4, device="cuda")
    convolution = torch.nn.Conv2d(1, 2, 2).to("cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        output = convolution(images)
    assert output.dtype == torch.float16
    output.float().sum().backward()
    assert convolution.weight.grad is not None
    assert convolution.weight.grad.device == images.device
    assert convolution.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolution(images).dtype == torch.float32


@on("mps")
def test_mps_has_no_float64() -> None:
    for make in (
        lambda: torch.ones(2, dtype=torch.float64, device="mps"),
        lambda: torch.ones(2).double().to("mps"),
        lambda: torch.ones(2, device="mps").double(),
        lambda: torch.ones(2, device="mps").to(torch.float64),
    ):
        with pytest.raises(TypeError, match="float64"):
            make()
    assert torch.ones(2, device="mps").cpu().double().tolist() == [1, 1]


# Training


@pytest.mark.parametrize("cache", ["disk", "memory", "device"])
def test_training_gives_the_weights_of_the_cpu(
    experiment: str, folder: Path, on_cpu: Path, cache: str
) -> None:
    name, epochs = f"cuda-{cache}", 2
    (result,) = emulate("cuda", train, experiment, f"model_params.name={name}", f"data_params.cache={cache}")
    assert result.status == 0, result.output
    assert weights(folder / name) == weights(on_cpu)
    if cache != "device":
        batches = epochs * 4 + 2
        assert result.counts["streams"] == 1  # beside the default stream, however many epochs
        assert result.counts["to device, non_blocking"] == batches
        assert result.counts["pinned"] >= batches
        assert result.counts["record_stream"] == batches


EXACT = [
    "model_params.dropout=0.5",
    "train_params.mixed_precision=fp16",
    "train_params.gradient_accumulation_steps=2",
    "train_params.gradient_clipping=0.5",
    "data_params.cache=memory",
]


def resume_without_device_generator(*arguments: str) -> int:
    """Run trainer.py with the device's random generator not restored; called in a child."""
    original = training.checkpoint.tensors._set_generators

    def set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
        original(states, torch.device("cpu"))

    training.checkpoint.tensors._set_generators = set_generators
    return train(*arguments)


@pytest.fixture(scope="module")
def uninterrupted(experiment: str, folder: Path) -> Path:
    """A run with dropout, fp16, accumulation and clipping."""
    (result,) = emulate("cuda", train, experiment, "model_params.name=whole", *EXACT)
    assert result.status == 0, result.output
    return folder / "whole"


@pytest.mark.parametrize(("resume", "exact"), [(train, True), (resume_without_device_generator, False)])
def test_a_run_that_is_stopped_in_mid_epoch_resumes_exactly(
    experiment: str, folder: Path, uninterrupted: Path, resume: Callable[..., int], exact: bool
) -> None:
    overrides = [f"model_params.name=stopped-{exact}", *EXACT]
    (stopped,) = emulate("cuda", train_until, 6, experiment, *overrides)
    assert "stopped at step 6" in stopped.output
    (resumed,) = emulate("cuda", resume, experiment, *overrides)
    assert resumed.status == 0, resumed.output
    run = folder / f"stopped-{exact}"
    assert last_state(run)["scaler"] == last_state(uninterrupted)["scaler"]
    assert last_state(run)["scaler"]["_growth_tracker"] == 8
    assert (last_checkpoint(run) == last_checkpoint(uninterrupted)) == exact
    assert (weights(run) == weights(uninterrupted)) == exact


def train_with_labels_on_the_host(*arguments: str) -> int:
    """Run trainer.py with labels that are not moved to the device; called in a child."""
    original = trainer.train_step

    def train_step(run: Any, batch: datasets.Batch, lr: float) -> torch.Tensor:
        return original(run, replace(batch, labels=batch.labels.cpu()), lr)

    trainer.train_step = train_step
    return train(*arguments)


def test_labels_on_the_host_are_noticed(experiment: str) -> None:
    with pytest.raises(AssertionError, match=r"same device.*cpu and cuda:0"):
        emulate("cuda", train_with_labels_on_the_host, experiment, "model_params.name=labels")


def train_on_two_ranks(
    kind: str, experiment: str, name: str, devices: int = 1, *, sync_batch_norm: bool = False
) -> list[Result]:
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launch |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [launch | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    overrides = [f"model_params.name={name}", f"train_params.sync_batch_norm={sync_batch_norm}"]
    return emulate(kind, train, experiment, *overrides, devices=devices, environments=ranks)


@pytest.fixture(scope="module")
def two_ranks_on_cpu(experiment: str, folder: Path) -> Path:
    """A run of two ranks on the CPU."""
    results = train_on_two_ranks("cpu", experiment, "ranks-cpu")
    assert [result.status for result in results] == [0, 0], results
    return folder / "ranks-cpu"


@pytest.mark.parametrize("visible", [2, 1])
def test_two_ranks_that_see_all_devices_or_only_their_own(
    experiment: str, folder: Path, two_ranks_on_cpu: Path, visible: int
) -> None:
    results = train_on_two_ranks("cuda", experiment, f"ranks-{visible}", visible)
    assert [result.status for result in results] == [0, 0], results
    assert "2 processes" in results[0].output
    assert "training slices" not in results[1].output
    assert weights(folder / f"ranks-{visible}") == weights(two_ranks_on_cpu)


def test_synchronized_batch_norm_equals_one_process_and_does_not_wait_for_the_device(
    experiment: str, folder: Path, on_cpu: Path
) -> None:
    waits = {}
    for synchronized in (True, False):
        name = f"synchronized-{synchronized}"
        results = train_on_two_ranks("cuda", experiment, name, 2, sync_batch_norm=synchronized)
        assert [result.status for result in results] == [0, 0], results
        counts = results[1].counts
        waits[synchronized] = counts["synchronizing"] + counts["to device"] + counts["to host"]
    assert waits[True] == waits[False]
    found, expected = (
        safetensors.numpy.load_file(run / "model" / "model.safetensors")
        for run in (folder / "synchronized-True", on_cpu)
    )
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


def test_training_on_mps_is_contiguous(experiment: str, folder: Path, on_cpu: Path) -> None:
    (result,) = emulate("mps", train, experiment, "model_params.name=mps")
    assert result.status == 0, result.output
    assert {memory_format for _, memory_format in result.memory_formats} == {"contiguous"}
    ours, cpu = (
        safetensors.numpy.load_file(run / "model" / "model.safetensors") for run in (folder / "mps", on_cpu)
    )
    for name, tensor in cpu.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-3, atol=1e-5, err_msg=name)


# Evaluation


@pytest.fixture(scope="module")
def cpu_logits(folder: Path, on_cpu: Path) -> np.ndarray:
    """Predictions on the CPU."""
    output = folder / "evaluation-cpu"
    (result,) = emulate("cpu", evaluate, str(on_cpu), "--quick", f"--output={output}")
    assert result.status == 0, result.output
    return logits(output)


def logits(output: Path) -> np.ndarray:
    with h5py.File(output / "predictions.h5") as file:
        values: np.ndarray = file["logit"][()]
    return values


def test_evaluation_gives_the_predictions_of_the_cpu(
    folder: Path, on_cpu: Path, cpu_logits: np.ndarray
) -> None:
    output = folder / "evaluation-cuda"
    (result,) = emulate("cuda", evaluate, str(on_cpu), "--quick", f"--output={output}")
    assert result.status == 0, result.output
    np.testing.assert_array_equal(logits(output), cpu_logits)


def test_the_whole_evaluation_runs_without_float64(
    folder: Path, on_cpu: Path, cpu_logits: np.ndarray
) -> None:
    output = folder / "evaluation-mps"
    (result,) = emulate("mps", evaluate, str(on_cpu), f"--output={output}")
    assert result.status == 0, result.output
    np.testing.assert_allclose(logits(output), cpu_logits, rtol=0, atol=1e-5)
    assert {memory_format for _, memory_format in result.memory_formats} == {"contiguous"}
    report = json.loads((output / "report.json").read_text())
    assert report["environment"]["device"] == "mps"


# The check of a new device


@pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="a torch built for CUDA compiles for real devices only",
)
def test_gpu_check_runs_on_an_emulated_device(folder: Path) -> None:
    tiny = ["model_params.layer_param=2", "data_params.train_seeds=2", "data_params.test_seeds=3"]
    tiny += ["train_params.epochs=2", "data_params.axes=[0]"]
    (result,) = emulate("cuda", check_gpu, f"--folder={folder}", *tiny)
    assert result.status == 0, result.output
    rows = [line.strip("| ").split(" | ") for line in result.output.splitlines() if line.startswith("| ")]
    names = {row[0]: row[-1] for row in rows[1:]}
    assert [name for name, last in names.items() if last == "ok"] == [
        "weights with each cache",
        "loss of epoch 1, fp16",
        "loss of epoch 1, bf16",
        "evaluation.py",
    ]
    skipped = {name for name, last in names.items() if last == "skipped: needs CUDA or ROCm"}
    assert skipped == {"compiler", "resume", "memory", "throughput", "two_devices"}
