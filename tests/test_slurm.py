"""The SLURM scripts, with stubs for the programs of SLURM."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "accelerate_configs"
GENERAL, LUMI = "slurm.sbatch", "slurm_lumi.sbatch"
JOB = 123456

# Starts each task, passes USR1 on as $STUB_SIGNALS says, and ends with the status of a task that failed.
SRUN = """#!/bin/bash
echo "$*" >>"$STUB_LOG/srun"
while [[ $1 == --* ]]; do
    if [[ $1 == --ntasks=* ]]; then SLURM_NTASKS=${1#*=}; fi
    shift
done
export SLURM_NTASKS
for ((task = 0; task < SLURM_NTASKS; task++)); do
    per_host=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    SLURM_PROCID=$task SLURM_LOCALID=$((task % per_host)) SLURM_NODEID=$((task / per_host)) setsid "$@" &
    tasks+=($!)
done
# SLURM signals the first process of a task or, depending on proctrack, all of its processes.
if [[ $STUB_SIGNALS == all ]]; then all=-; fi
trap 'for task in "${tasks[@]}"; do kill -USR1 -- "${all:-}$task"; done' USR1
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task" || wait "$task" || status=$?
done
exit $status
"""

SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf '%s\\n' node7 node8; else echo "$*" >>"$STUB_LOG/scontrol"; fi
"""

# Reports $STUB_KIND as the file system of a folder.
STAT = """#!/bin/bash
if [[ $1 == -f ]]; then echo "${STUB_KIND:-xfs}"; else exec /usr/bin/stat "$@"; fi
"""

ACCELERATE = """#!/bin/bash
python "$@"  # a child, as of the real launcher
"""

# Replaces every program but `-c`.
PYTHON = """#!/bin/bash
if [[ $1 == -c ]]; then exec {python} "$@"; fi
exec {python} "$STUB_LOG/../training.py" "$@"
"""

# Writes down its arguments and environment, then does what $STUB_TRAINING says.
TRAINING = """
import json, os, pathlib, signal, sys, time
stopped = []
signal.signal(signal.SIGUSR1, lambda number, frame: stopped.append(number))
data = next((a.split("=")[1] for a in sys.argv if a.startswith("data_params.local_copy=")), "")
found = {"arguments": sys.argv[1:], "environment": dict(os.environ), "data": os.path.exists(data)}
log = pathlib.Path(os.environ["STUB_LOG"], f"training{os.environ['SLURM_PROCID']}")
log.with_suffix(".part").write_text(json.dumps(found))
log.with_suffix(".part").rename(log)
what = os.environ["STUB_TRAINING"]
while what.startswith("until signal") and not stopped:
    time.sleep(0.01)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as before
if what == "until signal, then finished":
    model = pathlib.Path(os.environ["STUB_RUN"], "model", "model.safetensors")
    model.parent.mkdir(parents=True, exist_ok=True)
    time.sleep(0.05)
    model.write_text("")
sys.exit(1 if what == "fails" else 0)
"""


class Cluster:
    """A checkout without a virtual environment, the environment of a job, and stubs first in PATH."""

    def __init__(self, folder: Path, experiment: Path, script: str = GENERAL, hosts: int = 1) -> None:
        self.folder, self.experiment, self.script = folder, experiment, script
        self.tasks = 8 * hosts if script == LUMI else hosts
        self.checkout, self.log, self.programs = folder / "checkout", folder / "log", folder / "programs"
        for path in (self.checkout, self.log, self.programs):
            path.mkdir()
        for path in ROOT.iterdir():
            if not path.name.startswith("."):
                (self.checkout / path.name).symlink_to(path)
        (folder / "training.py").write_text(TRAINING)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}.items():
            self.program(name, text)
        self.program("python", PYTHON.format(python=sys.executable))
        unset = ("TMPDIR", "SLURM_TMPDIR", "OMP_NUM_THREADS")
        clean = {name: value for name, value in os.environ.items() if name not in unset}
        self.environment = clean | {
            "PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "USER": "newton",
            "SLURM_SUBMIT_DIR": str(self.checkout),
            "SLURM_JOB_ID": str(JOB),
            "SLURM_JOB_NUM_NODES": str(hosts),
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NTASKS": str(self.tasks),
            "SLURM_CPUS_PER_TASK": "1",
            "STUB_LOG": str(self.log),
            "STUB_RUN": str(folder / "runs" / "run"),
            "STUB_TRAINING": "ends",
            "STUB_SIGNALS": "task",
        }

    def program(self, name: str, text: str) -> None:
        """Put a program first in PATH."""
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def start(self, *overrides: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(SCRIPTS / self.script), str(self.experiment), *overrides],
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *overrides: str, **environment: str) -> tuple[int, str]:
        job = self.start(*overrides, **environment)
        output, _ = job.communicate(timeout=120)
        return job.returncode, output

    def run_until_signal(self, **environment: str) -> int:
        """Send the signal of SLURM when all tasks are running; returns the status of the job."""
        job = self.start(**environment)
        while len(list(self.log.glob("training?"))) < self.tasks:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=120)
        return job.returncode

    def found(self, task: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.log / f"training{task}").read_text())
        return found

    def arguments(self, task: int = 0) -> list[str]:
        """Arguments of the training."""
        arguments: list[str] = self.found(task)["arguments"]
        return arguments[arguments.index("trainer.py") + 1 :]

    def requeued(self) -> list[str]:
        log = self.log / "scontrol"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture(params=[(GENERAL, 1), (GENERAL, 2), (LUMI, 1)], ids=lambda param: f"{param[0]}-{param[1]}")
def cluster(tmp_path: Path, experiment: Callable[..., Path], request: pytest.FixtureRequest) -> Cluster:
    """Every script, on one host and on two."""
    return Cluster(tmp_path, experiment(), *request.param)


@pytest.fixture
def make_cluster(tmp_path: Path, experiment: Callable[..., Path]) -> Callable[..., Cluster]:
    return lambda script=GENERAL, hosts=1: Cluster(tmp_path, experiment(), script, hosts)


@pytest.mark.parametrize("script", [GENERAL, LUMI])
def test_the_syntax_is_valid(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(SCRIPTS / script)], check=False).returncode == 0


@pytest.mark.parametrize("script", [GENERAL, LUMI])
def test_a_job_asks_for_its_signal(script: str) -> None:
    options = re.findall(r"^#SBATCH (\S+)", (SCRIPTS / script).read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)


def test_a_job_has_the_status_of_its_training(cluster: Cluster) -> None:
    assert cluster.run("train_params.lr=0.01")[0] == 0
    assert cluster.arguments() == [str(cluster.experiment), "train_params.lr=0.01"]
    assert cluster.run(STUB_TRAINING="fails")[0] == 1
    assert cluster.requeued() == []
    assert list((cluster.folder / "runs").iterdir()) == []


def test_an_invalid_experiment_ends_the_job_before_training(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    status, output = cluster.run("train_params.lr=fast")
    assert status != 0
    assert "train_params.lr: found 'fast'" in output
    assert not (cluster.log / "srun").exists()


def test_tasks_of_an_array_have_their_own_runs(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    assert cluster.run("train_params.seed=%a", SLURM_ARRAY_TASK_ID="3")[0] == 0
    assert cluster.arguments()[-2:] == ["train_params.seed=3", "model_params.name=run-3"]


@pytest.mark.parametrize("signals", ["task", "all"])
def test_a_stopped_run_is_requeued(cluster: Cluster, signals: str) -> None:
    assert cluster.run_until_signal(STUB_TRAINING="until signal", STUB_SIGNALS=signals) == 0
    assert cluster.requeued() == [f"requeue {JOB}"]


def test_only_the_stopped_task_of_an_array_is_requeued(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    task = {"SLURM_ARRAY_JOB_ID": str(JOB), "SLURM_ARRAY_TASK_ID": "4"}
    assert cluster.run_until_signal(STUB_TRAINING="until signal", **task) == 0
    assert cluster.requeued() == [f"requeue {JOB}_4"]


def test_a_finished_run_is_not_requeued(cluster: Cluster) -> None:
    assert cluster.run_until_signal(STUB_TRAINING="until signal, then finished") == 0
    assert cluster.requeued() == []


@pytest.mark.parametrize(
    ("gpus", "options"),
    [
        ("0", ["accelerate_configs/cpu.yaml"]),
        ("1", ["accelerate_configs/single_gpu.yaml"]),
        ("4", ["accelerate_configs/multi_gpu.yaml", "--num_processes", "4"]),
    ],
)
def test_one_host_uses_all_its_gpus(
    make_cluster: Callable[..., Cluster], gpus: str, options: list[str]
) -> None:
    cluster = make_cluster()
    cluster.run(SLURM_GPUS_ON_NODE=gpus)
    found = cluster.found()
    expected = ["launch", "--machine_rank", "0", "--config_file", *options]
    assert found["arguments"][:-2] == expected
    assert "MASTER_ADDR" not in found["environment"]  # from which the trainer would expect several ranks


def test_the_rendezvous_of_several_hosts_is_on_the_first(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(hosts=2)
    cluster.run(SLURM_GPUS_ON_NODE="4")
    for host in (0, 1):
        command = " ".join(cluster.found(host)["arguments"])
        assert f"launch --machine_rank {host} --config_file accelerate_configs/multi_node.yaml" in command
        assert "--num_machines 2 --num_processes 8" in command
        assert f"--main_process_ip node7 --main_process_port {10000 + JOB % 20000}" in command
        assert "--rdzv_conf timeout=50 trainer.py" in command


def test_lumi_starts_a_rank_with_its_own_device_and_cores_per_gcd(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(LUMI, hosts=1)
    assert cluster.run(CONTAINER="env IN_CONTAINER=yes")[0] == 0
    for rank in range(8):
        environment = cluster.found(rank)["environment"]
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "8",
            "LOCAL_WORLD_SIZE": "8",
            "MASTER_ADDR": "node7",
            "MASTER_PORT": str(10000 + JOB % 20000),
            "ROCR_VISIBLE_DEVICES": str(rank),
            "NCCL_SOCKET_IFNAME": "hsn",
            "MIOPEN_USER_DB_PATH": f"/tmp/newton-miopen-{JOB}-{rank}",
            "IN_CONTAINER": "yes",
        }
        assert {name: environment.get(name) for name in expected} == expected
        assert Path(environment["MIOPEN_USER_DB_PATH"]).is_dir()
        shutil.rmtree(environment["MIOPEN_USER_DB_PATH"])
    masks = re.findall(r"--cpu-bind=mask_cpu:(\S+) bash", (cluster.log / "srun").read_text())[0].split(",")
    cores = [{core for core in range(64) if int(mask, 16) >> core & 1} for mask in masks]
    assert sorted(map(min, cores)) == [1, 9, 17, 25, 33, 41, 49, 57]
    assert [len(task) for task in cores] == [7] * 8
    assert min(cores[0]) == 49  # GCD 0
    assert min(cores[4]) == 1  # GCD 4


def test_lumi_on_two_hosts_numbers_ranks_over_both(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(LUMI, hosts=2)
    assert cluster.run(USER=f"newton-{os.getpid()}")[0] == 0
    environment = cluster.found(9)["environment"]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    assert [environment[name] for name in names] == ["9", "1", "16", "8"]
    for folder in Path("/tmp").glob(f"newton-{os.getpid()}-miopen-*"):
        folder.rmdir()


@pytest.fixture
def other_disk(tmp_path: Path) -> Path:
    """A second file system."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system that can be written")
    return memory


def test_data_is_not_copied_to_memory(make_cluster: Callable[..., Cluster], other_disk: Path) -> None:
    cluster = make_cluster()
    cluster.program("stat", STAT)
    assert cluster.run(TMPDIR=str(other_disk), STUB_KIND="tmpfs")[0] == 0
    assert cluster.arguments() == [str(cluster.experiment)]


@pytest.mark.parametrize(
    ("name", "kind"), [("TMPDIR", "ext2/ext3"), ("SLURM_TMPDIR", "xfs"), ("LOCAL_COPY_DIR", "tmpfs")]
)
def test_data_is_copied_to_the_local_disk_and_removed(
    cluster: Cluster, name: str, kind: str, other_disk: Path
) -> None:
    cluster.program("stat", STAT)
    assert cluster.run(**{name: str(other_disk)}, STUB_KIND=kind)[0] == 0
    folder = other_disk / f"gravity-cnn-{JOB}"
    assert cluster.arguments()[-1] == f"data_params.local_copy={folder}/universe.h5"
    assert cluster.found()["data"]
    assert not folder.exists()


def test_data_that_does_not_fit_is_read_from_its_place(
    make_cluster: Callable[..., Cluster], other_disk: Path
) -> None:
    cluster = make_cluster(hosts=2)
    cluster.program("stat", STAT)
    cluster.program("cp", "#!/bin/bash\nexit 1\n")
    status, output = cluster.run(TMPDIR=str(other_disk))
    assert status == 0
    assert f"cannot copy the data to {other_disk}" in output
    assert cluster.arguments() == [str(cluster.experiment)]
    assert not (other_disk / f"gravity-cnn-{JOB}").exists()


def test_a_real_run_is_saved_and_requeued(tmp_path: Path, experiment: Callable[..., Path]) -> None:
    """With the real launcher and trainer."""
    cluster = Cluster(tmp_path, experiment(epochs=100_000))
    for stub in ("accelerate", "python"):
        (tmp_path / "programs" / stub).unlink()
    run = tmp_path / "runs" / "run"
    job = cluster.start()
    while not (run / "metrics.jsonl").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    step = int(re.findall(r"stopped at step (\d+) \(SIGUSR1\)", output)[0])
    assert (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()
    assert cluster.requeued() == [f"requeue {JOB}"]
