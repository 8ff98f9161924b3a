"""Check on your machine that a training that is killed and resumed ends as an uninterrupted one.

    python tests/verify_resume.py [--config_file accelerate_configs/X.yaml] [--kills 5]

A short training on a small synthetic universe runs twice: once without interruption, and once killed with
SIGKILL at random moments and started again each time. Both must end with the same weights, the same optimizer
moments and the same lines in metrics.jsonl. Exit status 0: they do. 1: they do not. 2: a training failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from datasets import write_synthetic  # noqa: E402
from training.checkpoint import Checkpoint, list_checkpoints  # noqa: E402

EXPERIMENT: dict[str, dict[str, Any]] = {
    "model_params": {"architecture": "RACOON", "layer_param": 4, "dropout": 0.5, "name": "uninterrupted"},
    "data_params": {"train_seeds": 4, "test_seeds": 1, "newton_augmentation": 1.0, "symmetries": True},
    "train_params": {
        "epochs": 4,
        "lr": 0.001,
        "batch_size": 32,
        "schedule": "cosine",
        "save_every_steps": 5,
        "deterministic": True,  # otherwise a GPU does not even repeat itself
    },
}
TIMING = {"seconds", "slices_per_second"}


def main() -> int:
    """Run both trainings and compare them; returns the exit status."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=options.folder) as folder:
        experiment = write_experiment(Path(folder))
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(options.config_file)] if options.config_file else []
        command += [str(ROOT / "trainer.py"), str(experiment), *options.overrides]
        whole, killed = (Path(folder) / "runs" / name for name in ("uninterrupted", "killed"))
        print("uninterrupted training:", flush=True)
        started = time.monotonic()
        if start(command, whole) != 0:
            return 2
        seconds = time.monotonic() - started
        print(f"  {seconds:.1f} s to step {last_step(whole)}\nkilled and resumed training:", flush=True)
        setup_seconds = seconds - sum(record["seconds"] for record in records(whole))
        generator = random.Random(options.seed)
        longest = setup_seconds + 1.5 * (seconds - setup_seconds) / max(options.kills, 1)
        for _ in range(options.kills):
            moment = generator.uniform(setup_seconds / 2, longest)
            status = start(command, killed, moment)
            if status:
                return 2
            event = f"SIGKILL after {moment:.1f} s" if status is None else "ended before the next SIGKILL"
            print(f"  {event}: complete checkpoint of step {last_step(killed)}", flush=True)
            if status == 0:
                break
        else:
            if start(command, killed) != 0:
                return 2
        return 0 if compare(whole, killed) else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_file", type=Path, help="configuration of accelerate launch")
    parser.add_argument("--kills", type=int, default=5, help="number of SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, help="seed of the random moments")
    parser.add_argument("--folder", type=Path, help="working folder (for several hosts: on a shared disk)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the experiment")
    return parser.parse_args()


def write_experiment(folder: Path) -> Path:
    """Write a small universe and an experiment on it; returns the path of the experiment."""
    write_synthetic(folder / "universe.h5", seeds=5, size=64, strength=15)
    experiment = dict(EXPERIMENT)
    experiment["data_params"] = experiment["data_params"] | {"datafile": str(folder / "universe.h5")}
    experiment["train_params"] = experiment["train_params"] | {"log_dir": str(folder / "runs")}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return folder / "experiment.yaml"


def start(command: list[str], run_dir: Path, kill_after: float | None = None) -> int | None:
    """Start the run once; returns its exit status, None if it was killed after that many seconds."""
    log = run_dir.parent.with_name(f"{run_dir.name}.log")
    with log.open("a") as output:
        launcher = psutil.Popen([*command, f"model_params.name={run_dir.name}"], stdout=output, stderr=output)
        try:
            status = launcher.wait(kill_after)
        except psutil.TimeoutExpired:
            processes = [*launcher.children(recursive=True), launcher]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes)
            return None
    if status:
        print(f"exit status {status}:\n{log.read_text()[-3000:]}", file=sys.stderr)
    return status


def last_complete(run_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint."""
    newest_first = reversed(list_checkpoints(run_dir / "checkpoints"))
    return next((saved for saved in newest_first if saved.find_problem() is None), None)


def last_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    last = last_complete(run_dir)
    return last.step if last is not None else 0


def compare(whole: Path, killed: Path) -> bool:
    """Print hashes of what both runs ended with; returns whether they are equal."""
    all_equal = True
    for what, content in {"weights": weights, "moments": moments, "metrics": metrics}.items():
        hashes = [hashlib.sha256(content(run_dir)).hexdigest()[:16] for run_dir in (whole, killed)]
        equal = hashes[0] == hashes[1]
        all_equal &= equal
        print(f"{what}: uninterrupted {hashes[0]}, killed {hashes[1]}: {'equal' if equal else 'DIFFERENT'}")
    return all_equal


def weights(run_dir: Path) -> bytes:
    """The trained network."""
    return (run_dir / "model" / "model.safetensors").read_bytes()


def moments(run_dir: Path) -> bytes:
    """Adam's moments at the end."""
    last = last_complete(run_dir)
    return last.read("optimizer.safetensors") if last is not None else b""


def metrics(run_dir: Path) -> bytes:
    """The lines of metrics.jsonl without timings."""
    untimed = [{key: value for key, value in line.items() if key not in TIMING} for line in records(run_dir)]
    return json.dumps(untimed).encode()


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
