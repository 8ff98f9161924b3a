"""Launches as users give them: every accelerate configuration, torchrun, and set-ups that cannot work."""

import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "accelerate_configs"
PROGRAMS = Path(sys.executable).parent

# The start of trainer.py, which then writes what it finds itself to be.
PROGRAM = """
import json, os, sys, torch
from accelerate import Accelerator
import distributed
distributed.setup_process()
distributed.init_process_group()
accelerator = Accelerator()
line = distributed.preflight(accelerator, json.loads(sys.argv[2]))
found = {"processes": accelerator.num_processes, "device": accelerator.device.type, "line": line}
found |= {"sees_gpus": torch.cuda.is_available(), "threads": torch.get_num_threads()}
open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w").write(json.dumps(found))
"""

Experiment = Callable[..., Path]
Launcher = Callable[..., "subprocess.Popen[str]"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    """Starts `accelerate` or `torchrun` as from a user's shell, and leaves nothing of them running."""
    started = []

    def start(*command: str) -> "subprocess.Popen[str]":
        clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(
            [str(PROGRAMS / command[0]), *command[1:]],
            cwd=ROOT,
            env=clean | {"PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            if process.poll() is None:
                workers = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for worker in workers:
                    worker.kill()


def output_of(process: "subprocess.Popen[str]", status: int) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


@pytest.fixture
def arguments(tmp_path: Path, universe: Path) -> list[str]:
    """Program and arguments for a launcher; each process leaves a file in `found`."""
    (tmp_path / "found").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    settings = {"data_params": {"datafile": str(universe)}, "train_params": {"log_dir": str(tmp_path)}}
    return [str(tmp_path / "program.py"), str(tmp_path / "found"), json.dumps(settings)]


def found(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "found").iterdir())]


@pytest.mark.parametrize(("config", "processes"), [("single_gpu", 1), ("cpu_multi", 2)])
def test_configurations_start_what_they_promise(
    tmp_path: Path, launcher: Launcher, arguments: list[str], config: str, processes: int
) -> None:
    """cpu.yaml trains in test_slurm.py, multi_gpu.yaml below."""
    output_of(launcher("accelerate", "launch", "--config_file", f"{CONFIGS}/{config}.yaml", *arguments), 0)
    reports = found(tmp_path)
    assert [report["processes"] for report in reports] == [processes] * processes
    if config == "cpu_multi":
        assert not any(report["sees_gpus"] for report in reports)
    assert reports[0]["threads"] <= max(1, len(os.sched_getaffinity(0)) // processes)


def test_multi_node(tmp_path: Path, launcher: Launcher, arguments: list[str]) -> None:
    config = ["--config_file", f"{CONFIGS}/multi_node.yaml", "--main_process_port", free_port()]
    flags = ["--num_processes", "2", "--rdzv_conf", "timeout=50"]
    hosts = [
        launcher("accelerate", "launch", *config, *flags, "--machine_rank", str(rank), *arguments)
        for rank in (0, 1)
    ]
    for host in hosts:
        output_of(host, 0)
    assert [report["processes"] for report in found(tmp_path)] == [2, 2]


def test_a_multi_cpu_launch_and_its_status(
    tmp_path: Path, launcher: Launcher, experiment: Experiment
) -> None:
    """Accelerate starts one process without a word, and makes 1 of the trainer's 2."""
    config = tmp_path / "mpi.yaml"
    config.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\n")
    mistaken = str(experiment(lr=-1.0))
    output = output_of(
        launcher("accelerate", "launch", "--config_file", str(config), "trainer.py", mistaken), 1
    )
    assert "was asked for several processes and started one" in output
    assert "ConfigError" in output
    assert "returned non-zero exit status 2" in output


def test_a_training_whose_launcher_is_told_to_end_saves_and_ends(
    tmp_path: Path, launcher: Launcher, experiment: Experiment
) -> None:
    process = launcher(
        *("accelerate", "launch", "--config_file", f"{CONFIGS}/cpu.yaml", "trainer.py"),
        str(experiment(epochs=100_000)),
    )
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    output = output_of(process, -signal.SIGTERM)  # ends when the trainer, too, has closed it
    step = int(re.findall(r"stopped at step (\d+) \(SIGTERM\)", output)[0])
    assert (metrics.parent / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()


def test_statuses_under_torchrun(launcher: Launcher, experiment: Experiment) -> None:
    """It makes 1 of the trainer's 2 as well, and shows the 2 of every process."""
    mistaken = str(experiment(batch_size=63))
    output = output_of(
        launcher("torchrun", "--standalone", "--nproc-per-node", "2", "trainer.py", mistaken), 1
    )
    assert re.findall(r"exitcode\s+: (-?\d+)", output) == ["2", "2"]
    assert output.count("ConfigError: train_params.batch_size: found 63") == 1


# Set-ups that cannot work


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory, universe: Path) -> tuple[Path, str]:
    """Launches of two processes in which one or both are wrong: their folder, and all that was printed."""
    folder = tmp_path_factory.mktemp("mistakes")
    experiment = folder / "experiment.yaml"
    experiment.write_text(f"""
model_params: {{architecture: RACOON, layer_param: 2, dropout: 0.0, name: run}}
data_params: {{datafile: {universe}, train_seeds: 3, test_seeds: 1, newton_augmentation: 1.0}}
train_params: {{epochs: 1, lr: 0.001, log_dir: {folder / "runs"}, batch_size: 64}}
""")
    others = {
        "preflight": ["--preflight"],
        "another_experiment": ["train_params.lr=0.002", "train_params.batch_size=32"],
        "no_data": ["data_params.datafile=/nowhere/z1.h5"],
        "no_folder": ["train_params.log_dir=/proc/runs"],
        "mistyped": ["train_params.lr=fast"],
    }
    launches = [
        {
            "processes": 2,
            "arguments": [
                [str(experiment), *(more if name == "preflight" else [])],
                [str(experiment), *more],
            ],
            "out": str(folder / name),
        }
        for name, more in others.items()
    ]
    (folder / "launches.json").write_text(json.dumps(launches))
    program = [sys.executable, str(ROOT / "tests" / "forked.py"), str(folder / "launches.json")]
    environment = os.environ | {"LAUNCH_SECONDS": "4", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return folder, done.stdout + done.stderr


def statuses(folder: Path) -> list[int]:
    return [json.loads(path.read_text())["status"] for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("mistake", ["another_experiment", "no_data", "no_folder", "mistyped"])
def test_a_wrong_set_up_ends_with_status_2_everywhere(mistakes: tuple[Path, str], mistake: str) -> None:
    assert statuses(mistakes[0] / mistake) == [2, 2]


@pytest.mark.parametrize(
    "message",
    [
        r"train_params\.lr: 0\.001 on \S+ \(process 0\); 0\.002 on \S+ \(process 1\)",
        r"train_params\.batch_size: 64 on \S+ \(process 0\); 32 on \S+ \(process 1\)",
        r"process 1 on \S+ has no data file /nowhere/z1\.h5",
        r"process 1 on \S+ cannot write /proc",
        r"ConfigError.*\n.*train_params\.lr",
        r"of 2 processes 1 did not come; the others are on \S+\n  meeting point: 127\.0\.0\.1:\d+",
    ],
)
def test_a_wrong_set_up_is_told_once(mistakes: tuple[Path, str], message: str) -> None:
    assert len(re.findall(message, mistakes[1])) == 1, mistakes[1]


def test_preflight_alone(mistakes: tuple[Path, str]) -> None:
    folder, output = mistakes
    assert statuses(folder / "preflight") == [0, 0]
    assert len(re.findall(rf"2 processes \({socket.gethostname()}: 0-1\), cpu, torch", output)) == 1
    assert not (folder / "runs").exists()


# Training


@pytest.fixture(scope="module")
def beside_the_other_datasets() -> None:
    try:
        importlib.metadata.version("datasets")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's datasets is not installed")


@pytest.mark.usefixtures("beside_the_other_datasets")
def test_training_beside_the_other_datasets_library(
    launcher: Launcher, experiment: Experiment, tmp_path: Path
) -> None:
    """Accelerate imports names from a module called `datasets` when that library is there, and finds ours."""
    config = ["--config_file", f"{CONFIGS}/multi_gpu.yaml", "--num_processes", "2"]
    output_of(launcher("accelerate", "launch", *config, "trainer.py", str(experiment(axes=[0]))), 0)
    assert (tmp_path / "runs" / "run" / "model" / "model.safetensors").exists()


def test_a_worker_that_dies(launcher: Launcher, experiment: Experiment, tmp_path: Path) -> None:
    """torchrun starts all anew, and they go on from the last state."""
    path = experiment(axes=[0], epochs=8, save_every_steps=2, batch_size=48)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    torchrun = launcher(
        "torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "trainer.py", str(path)
    )
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert torchrun.poll() is None, torchrun.communicate()[0]
        time.sleep(0.02)
    psutil.Process(torchrun.pid).children()[-1].send_signal(signal.SIGKILL)
    output = output_of(torchrun, 0)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = 3 * 2 * 64 // 48
    expected = [("train", epoch, epoch * steps) for epoch in range(1, 9)]
    assert [(m["phase"], m["epoch"], m["step"]) for m in lines if m["phase"] == "train"] == expected
    assert len(re.findall(r"2 processes \(", output)) == 2  # started twice,
    assert len(re.findall(r"epoch +1/8 +train", output)) == 1  # but not from the beginning
