"""Launches as users start them: every accelerate configuration, torchrun, and set-ups with an error."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer, Launcher

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "accelerate_configs"

Experiment = Callable[..., Path]
Launch = Callable[..., Launcher]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def launch(fork_server: ForkServer, tmp_path: Path) -> Iterator[Launch]:
    """Starts `accelerate` or `torchrun`, and leaves nothing of them running."""
    started: list[Launcher] = []

    def start(*command: str) -> Launcher:
        out = tmp_path / f"out{len(started)}"
        started.append(fork_server.launch(*command, out=out, PYTHONPATH=str(ROOT)))
        return started[-1]

    yield start
    for launcher in started:
        launcher.kill()


# The start of trainer.py, which then writes what it finds itself to be.
PROGRAM = """
import json, os, sys, torch
from accelerate import Accelerator
from training import distributed
distributed.setup_process()
distributed.init_process_group()
accelerator = Accelerator()
distributed.preflight(accelerator, json.loads(sys.argv[2]))
found = {"processes": accelerator.num_processes, "threads": torch.get_num_threads()}
open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w").write(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("multi_gpu", [[]]),
        ("multi_node", [["--machine_rank", str(rank), "--rdzv_conf", "timeout=50"] for rank in (0, 1)]),
    ],
)
def test_a_configuration_starts_ranks_on_each_host(
    tmp_path: Path, launch: Launch, universe: Path, config: str, options: list[list[str]]
) -> None:
    """cpu_multi.yaml and single_gpu.yaml train below, cpu.yaml in test_slurm.py."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "found").mkdir()
    settings = {"data_params": {"datafile": str(universe)}, "train_params": {"log_dir": str(tmp_path)}}
    command = ["accelerate", "launch", "--config_file", f"{CONFIGS}/{config}.yaml", "--num_processes", "2"]
    command += ["--main_process_port", free_port()]
    program = [str(tmp_path / "program.py"), str(tmp_path / "found"), json.dumps(settings)]
    hosts = [launch(*command, *more, *program) for more in options]
    for host in hosts:
        assert host.wait() == 0, host.output
    found = [json.loads(path.read_text()) for path in (tmp_path / "found").iterdir()]
    assert [rank["processes"] for rank in found] == [2, 2]
    assert found[0]["threads"] <= len(os.sched_getaffinity(0))


def test_a_multi_cpu_launch_of_one_process_warns(
    tmp_path: Path, launch: Launch, experiment: Experiment
) -> None:
    """Accelerate starts one process without a message, and turns the trainer's status 2 into 1."""
    config = tmp_path / "mpi.yaml"
    config.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\n")
    launcher = launch(
        *("accelerate", "launch", "--config_file", str(config)), "trainer.py", str(experiment(lr=-1.0))
    )
    assert launcher.wait() == 1, launcher.output
    assert "was to start several processes but started one" in launcher.output
    assert "error: " in launcher.output
    assert "returned non-zero exit status 2" in launcher.output


def test_a_run_is_saved_when_its_launcher_is_terminated(
    tmp_path: Path, launch: Launch, experiment: Experiment
) -> None:
    launcher = launch(
        *("accelerate", "launch", "--config_file", f"{CONFIGS}/single_gpu.yaml"),
        *("trainer.py", str(experiment(epochs=100_000))),
    )
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    launcher.wait_for(metrics.exists)
    launcher.process.terminate()
    assert launcher.wait() == -signal.SIGTERM
    step = int(re.findall(r"stopped at step (\d+) \(SIGTERM\)", launcher.output)[0])
    assert (metrics.parent / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()


def test_torchrun_reports_the_status_of_each_rank(launch: Launch, experiment: Experiment) -> None:
    """Its own status is 1 all the same."""
    invalid = str(experiment(batch_size=63))
    launcher = launch("torchrun", "--standalone", "--nproc-per-node", "2", "trainer.py", invalid)
    assert launcher.wait() == 1, launcher.output
    assert re.findall(r"exitcode\s+: (-?\d+)", launcher.output) == ["2", "2"]
    assert launcher.output.count("error: train_params.batch_size: found 63") == 1


# trainer.py, in which rank 1 is killed at its 12th step unless the launcher has restarted it.
KILLED = """
import os, signal, sys, trainer
train_step, steps = trainer.train_step, []
def step(run, batch, lr):
    steps.append(batch)
    if len(steps) == 12 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(run, batch, lr)
trainer.train_step = step
sys.exit(trainer.main())
"""


def test_the_launcher_restarts_a_run_after_a_rank_is_killed(
    launch: Launch, experiment: Experiment, tmp_path: Path
) -> None:
    """Where Hugging Face's datasets is installed, Accelerate imports names from `datasets` and finds ours."""
    epochs, batch = 3, 48
    path = experiment(axes=[0], epochs=epochs, save_every_steps=2, batch_size=batch)
    (tmp_path / "killed.py").write_text(KILLED)
    launcher = launch(
        *("accelerate", "launch", "--config_file", f"{CONFIGS}/cpu_multi.yaml", "--max_restarts", "1"),
        *(str(tmp_path / "killed.py"), str(path)),
    )
    assert launcher.wait() == 0, launcher.output
    run = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = 3 * 2 * 64 // batch
    expected = [(epoch, epoch * steps) for epoch in range(1, epochs + 1)]
    assert [(line["epoch"], line["step"]) for line in lines if line["phase"] == "train"] == expected
    started = f"2 processes ({socket.gethostname()}: 0-1), cpu, torch"
    assert launcher.output.count(started) == 2, launcher.output
    assert launcher.output.count("resumed from") == 1
    assert (run / "model" / "model.safetensors").exists()


def test_a_run_that_lost_its_terminal_is_saved(
    fork_server: ForkServer, experiment: Experiment, tmp_path: Path
) -> None:
    """As when an ssh connection breaks; a second signal while the run is saved changes nothing."""
    signals = ["SIGHUP", "trainer.train_step", 2, "SIGTERM", "trainer.save", 0]
    out = tmp_path / "out"
    assert fork_server.train([str(experiment())], out, closed_streams=True, send=signals) == [0]
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step_00000003" / "manifest.json").exists()
    assert out.read_text() == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ACCELERATE_MIXED_PRECISION", "fp8"), ("ACCELERATE_USE_FSDP", "true")),
        *(("WORLD_SIZE", "two"), ("RANK", "1"), ("SLURM_CPUS_PER_TASK", "4,4")),
    ],
)
def test_an_invalid_environment_ends_with_status_2_and_leaves_nothing(
    fork_server: ForkServer, experiment: Experiment, tmp_path: Path, name: str, value: str
) -> None:
    out = tmp_path / "out"
    assert fork_server.train([str(experiment())], out, environment={name: value}) == [2]
    lines = [line for line in out.read_text().splitlines() if "this run uses the CPU" not in line]
    assert [line.split()[0] for line in lines] == ["error:"]
    assert not (tmp_path / "runs").exists()


# Set-ups with an error on one rank

Failures = dict[str, tuple[list[int], str]]


@pytest.fixture(scope="module")
def failures(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory, universe: Path) -> Failures:
    """Exit codes and output of launches of two ranks, of which the second has other arguments."""
    folder = tmp_path_factory.mktemp("failures")
    experiment = folder / "experiment.yaml"
    experiment.write_text(f"""
model_params: {{architecture: RACOON, layer_param: 2, dropout: 0.0, name: run}}
data_params: {{datafile: {universe}, train_seeds: 3, test_seeds: 1, newton_augmentation: 1.0}}
train_params: {{epochs: 1, lr: 0.001, log_dir: {folder / "runs"}, batch_size: 64}}
""")
    others = {
        "different": ["train_params.lr=0.002", "train_params.batch_size=32"],
        "no_data": ["data_params.datafile=/nowhere/z1.h5"],
        "no_folder": ["train_params.log_dir=/proc/runs"],
        "invalid": ["train_params.lr=fast"],
    }
    found = {}
    for name, overrides in others.items():
        out, arguments = folder / name, [[str(experiment)], [str(experiment), *overrides]]
        environment = {"LAUNCH_SECONDS": "3" if name == "invalid" else "50"}
        codes = fork_server.train(arguments, out, world_size=2, grace=60, environment=environment)
        found[name] = codes, out.read_text()
    codes = fork_server.train([str(experiment), "--preflight"], folder / "preflight", world_size=2)
    found["preflight"] = codes, (folder / "preflight").read_text()
    assert not (folder / "runs").exists()
    return found


@pytest.mark.parametrize("failure", ["different", "no_data", "no_folder", "invalid"])
def test_an_error_of_one_rank_ends_all_with_status_2(failures: Failures, failure: str) -> None:
    assert failures[failure][0] == [2, 2], failures[failure][1]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("different", r"train_params\.lr: 0\.001 on \S+ \(rank 0\); 0\.002 on \S+ \(rank 1\)"),
        ("different", r"train_params\.batch_size: 64 on \S+ \(rank 0\); 32 on \S+ \(rank 1\)"),
        ("no_data", r"size of the data file: \d+ bytes on \S+ \(rank 0\); no such file on \S+ \(rank 1\)"),
        ("no_folder", r"train_params\.log_dir: \S+ on \S+ \(rank 0\); '/proc/runs' on \S+ \(rank 1\)"),
        ("invalid", r"error: .*\n.*train_params\.lr"),
        ("invalid", r"rank 0 on \S+ did not connect to all 2 ranks at 127\.0\.0\.1:\d+ .*1/2 clients joined"),
    ],
)
def test_an_error_is_printed_once(failures: Failures, failure: str, message: str) -> None:
    assert len(re.findall(message, failures[failure][1])) == 1, failures[failure][1]


def test_preflight_alone(failures: Failures) -> None:
    codes, output = failures["preflight"]
    assert codes == [0, 0], output
    assert len(re.findall(rf"2 processes \({socket.gethostname()}: 0-1\), cpu, torch", output)) == 1
