"""The SLURM scripts, with srun and scontrol that only pretend to be SLURM's."""

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

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "accelerate_configs"
BOTH = pytest.mark.parametrize("script", ["slurm_single.sbatch", "slurm_multi_node.sbatch"])
JOB = 123456

# Starts a program once per host, passes USR1 on as $STUB_SIGNALS says, and ends as badly as the worst.
SRUN = """#!/bin/bash
hosts=1
while [[ $1 == --* ]]; do
    if [[ $1 == --ntasks=* ]]; then hosts=${1#*=}; fi
    shift
done
for ((host = 0; host < hosts; host++)); do
    SLURM_NODEID=$host setsid "$@" &
    tasks+=($!)
done
# SLURM signals the process that it started, or where proctrack is set up otherwise, all below it.
if [[ $STUB_SIGNALS == all ]]; then all=-; fi
trap 'for task in "${tasks[@]}"; do kill -USR1 -- "${all:-}$task"; done' USR1
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task" || status=$?
done
exit $status
"""

SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf '%s\\n' node7 node8; else echo "$*" >>"$STUB_LOG/scontrol"; fi
"""

# Tells what file system lies under a folder.
STAT = """#!/bin/bash
if [[ $1 == -f ]]; then echo "${STUB_KIND:-xfs}"; else exec /usr/bin/stat "$@"; fi
"""

# A launcher, and instead of a training what writes its arguments and then does what $STUB_TRAINING says.
ACCELERATE = """#!{python}
import json, os, pathlib, signal, subprocess, sys, time
if "STUB_LAUNCHED" not in os.environ:
    sys.exit(subprocess.run([*sys.orig_argv], env=os.environ | {{"STUB_LAUNCHED": "yes"}}).returncode)
log = pathlib.Path(os.environ["STUB_LOG"])
stopped = []
signal.signal(signal.SIGUSR1, lambda number, frame: stopped.append(number))
data = next((a.split("=")[1] for a in sys.argv if a.startswith("data_params.local_copy=")), "")
found = {{"arguments": sys.argv[1:], "data": bool(data) and os.path.exists(data)}}
(log / f"training{{os.environ['SLURM_NODEID']}}").write_text(json.dumps(found))
what = os.environ["STUB_TRAINING"]
while what.startswith("until signal") and not stopped:
    time.sleep(0.01)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as it was before
if what == "until signal, then finished":
    model = pathlib.Path(os.environ["STUB_RUN"], "model", "model.safetensors")
    model.parent.mkdir(parents=True, exist_ok=True)
    time.sleep(0.05)
    model.write_text("")
sys.exit(1 if what == "fails" else 0)
"""


class Cluster:
    """A checkout without a virtual environment, a job's environment, and stubs before all other programs."""

    def __init__(self, folder: Path, experiment: Path) -> None:
        self.folder, self.experiment = folder, experiment
        self.checkout, self.log, programs = folder / "checkout", folder / "log", folder / "programs"
        self.programs = programs
        for path in (self.checkout, self.log, programs):
            path.mkdir()
        for path in ROOT.iterdir():
            if not path.name.startswith("."):
                (self.checkout / path.name).symlink_to(path)
        stubs = {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE.format(python=sys.executable)}
        for name, text in stubs.items():
            self.program(name, text)
        unset = ("TMPDIR", "SLURM_TMPDIR", "OMP_NUM_THREADS")
        clean = {name: value for name, value in os.environ.items() if name not in unset}
        self.environment = clean | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(self.checkout),
            "SLURM_JOB_ID": str(JOB),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "1",
            "STUB_LOG": str(self.log),
            "STUB_RUN": str(folder / "runs" / "run"),
            "STUB_TRAINING": "ends",
            "STUB_SIGNALS": "task",
        }

    def program(self, name: str, text: str) -> None:
        """Put a program before all others of its name."""
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def start(self, script: str, *overrides: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(SCRIPTS / script), str(self.experiment), *overrides],
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, script: str, *overrides: str, **environment: str) -> tuple[int, str]:
        job = self.start(script, *overrides, **environment)
        output, _ = job.communicate(timeout=120)
        return job.returncode, output

    def signalled(self, script: str, **environment: str) -> int:
        """Run until the training is under way, send what SLURM sends, return the status."""
        job = self.start(script, **environment)
        hosts = 2 if "multi" in script else 1
        while len(list(self.log.glob("training*"))) < hosts:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=120)
        return job.returncode

    def arguments(self, host: int = 0) -> list[str]:
        return json.loads((self.log / f"training{host}").read_text())["arguments"]

    def requeued(self) -> list[str]:
        log = self.log / "scontrol"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def cluster(tmp_path: Path, experiment: Callable[..., Path]) -> Cluster:
    return Cluster(tmp_path, experiment())


@BOTH
def test_the_scripts_are_clean(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        assert (
            subprocess.run(["shellcheck", "-s", "bash", str(SCRIPTS / script)], check=False).returncode == 0
        )


@BOTH
def test_a_job_asks_for_its_signal(script: str) -> None:
    options = re.findall(r"^#SBATCH (\S+)", (SCRIPTS / script).read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)


@BOTH
def test_a_job_ends_as_its_training(cluster: Cluster, script: str) -> None:
    assert cluster.run(script, "train_params.lr=0.01")[0] == 0
    start = cluster.arguments().index("trainer.py")
    assert cluster.arguments()[start:] == ["trainer.py", str(cluster.experiment), "train_params.lr=0.01"]
    assert cluster.run(script, STUB_TRAINING="fails")[0] == 1
    assert cluster.requeued() == []
    assert list((cluster.folder / "runs").iterdir()) == []


@BOTH
def test_a_mistake_ends_the_job_before_it_starts_anything(cluster: Cluster, script: str) -> None:
    status, output = cluster.run(script, "train_params.lr=fast")
    assert status != 0
    assert "train_params.lr: found 'fast'" in output
    assert not (cluster.log / "training0").exists()


@BOTH
def test_tasks_of_an_array_have_their_own_names(cluster: Cluster, script: str) -> None:
    assert cluster.run(script, "train_params.seed=%a", SLURM_ARRAY_TASK_ID="3")[0] == 0
    assert cluster.arguments()[-2:] == ["train_params.seed=3", "model_params.name=run-3"]


@BOTH
@pytest.mark.parametrize("signals", ["task", "all"])
def test_a_stopped_run_is_queued_again(cluster: Cluster, script: str, signals: str) -> None:
    assert cluster.signalled(script, STUB_TRAINING="until signal", STUB_SIGNALS=signals) == 0
    assert cluster.requeued() == [f"requeue {JOB}"]


@BOTH
def test_of_an_array_only_the_stopped_task_is_queued_again(cluster: Cluster, script: str) -> None:
    task = {"SLURM_ARRAY_JOB_ID": str(JOB), "SLURM_ARRAY_TASK_ID": "4"}
    assert cluster.signalled(script, STUB_TRAINING="until signal", **task) == 0
    assert cluster.requeued() == [f"requeue {JOB}_4"]


@BOTH
def test_a_run_that_finished_is_not_queued_again(cluster: Cluster, script: str) -> None:
    assert cluster.signalled(script, STUB_TRAINING="until signal, then finished") == 0
    assert cluster.requeued() == []


@pytest.mark.parametrize(
    ("gpus", "configuration"),
    [
        ("0", ["accelerate_configs/cpu.yaml"]),
        ("1", ["accelerate_configs/single_gpu.yaml"]),
        ("4", ["accelerate_configs/multi_gpu.yaml", "--num_processes", "4"]),
    ],
)
def test_one_host_uses_all_its_gpus(cluster: Cluster, gpus: str, configuration: list[str]) -> None:
    cluster.run("slurm_single.sbatch", SLURM_GPUS_ON_NODE=gpus)
    assert cluster.arguments()[:-2] == ["launch", "--config_file", *configuration]


def test_several_hosts_meet_at_the_first(cluster: Cluster) -> None:
    cluster.run("slurm_multi_node.sbatch", SLURM_GPUS_ON_NODE="4")
    for host in (0, 1):
        told = " ".join(cluster.arguments(host))
        assert "--config_file accelerate_configs/multi_node.yaml --rdzv_conf timeout=50" in told
        assert f"--num_machines 2 --num_processes 8 --machine_rank {host}" in told
        assert f"--main_process_ip node7 --main_process_port {10000 + JOB % 20000} trainer.py" in told


@pytest.fixture
def other_disk(cluster: Cluster, tmp_path: Path) -> Path:
    """A second file system, which `stat` calls a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system that can be written")
    cluster.program("stat", STAT)
    return memory


@BOTH
def test_data_is_not_copied_to_memory(cluster: Cluster, script: str, other_disk: Path) -> None:
    assert cluster.run(script, TMPDIR=str(other_disk), STUB_KIND="tmpfs")[0] == 0
    assert cluster.arguments()[-1] == str(cluster.experiment)


@BOTH
@pytest.mark.parametrize("name", ["TMPDIR", "SLURM_TMPDIR"])
def test_data_is_copied_to_the_hosts_disk(cluster: Cluster, script: str, name: str, other_disk: Path) -> None:
    assert cluster.run(script, **{name: str(other_disk)})[0] == 0
    copies = other_disk / f"gravity-cnn-{JOB}"
    assert cluster.arguments()[-1] == f"data_params.local_copy={copies}/universe.h5"
    assert json.loads((cluster.log / "training0").read_text())["data"]
    assert not copies.exists()


@BOTH
def test_data_that_a_disk_does_not_take_stays(cluster: Cluster, script: str, other_disk: Path) -> None:
    cluster.program("cp", "#!/bin/bash\nexit 1\n")
    status, output = cluster.run(script, TMPDIR=str(other_disk))
    assert status == 0
    assert f"{other_disk} does not take the data" in output
    assert cluster.arguments()[-1] == str(cluster.experiment)
    assert not (other_disk / f"gravity-cnn-{JOB}").exists()


def test_a_training_is_saved_queued_again_and_finished(
    tmp_path: Path, experiment: Callable[..., Path]
) -> None:
    """With the real launcher and trainer: what two jobs with one signal leave is one run."""
    cluster = Cluster(tmp_path, experiment(epochs=10, axes=[0], batch_size=48))
    (tmp_path / "programs" / "accelerate").unlink()
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    first = cluster.start("slurm_single.sbatch")
    while not metrics.exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR1)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    assert "stopped at step" in output
    assert cluster.requeued() == [f"requeue {JOB}"]
    second = cluster.start("slurm_single.sbatch")
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert cluster.requeued() == [f"requeue {JOB}"]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["phase"] == "train"] == list(range(1, 11))
