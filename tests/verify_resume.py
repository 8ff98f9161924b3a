"""Does a training that is killed end as one that is left alone? Try it on your own machine.

    python benchmarks/verify_resume.py [--config_file accelerate_configs/X.yaml] [--kills 5]

A short training runs twice on a small synthetic universe: once undisturbed, once killed with SIGKILL at
random moments and started again each time. Both must end with the same weights, the same optimizer moments
and the same lines in metrics.jsonl. Exit status 0 if they do, 1 if not, 2 if a training cannot run at all.
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

from checkpoint import Checkpoint  # noqa: E402
from datasets import write_synthetic  # noqa: E402

EXPERIMENT: dict[str, dict[str, Any]] = {
    "model_params": {"architecture": "RACOON", "layer_param": 4, "dropout": 0.5, "name": "undisturbed"},
    "data_params": {"train_seeds": 4, "test_seeds": 1, "newton_augmentation": 1.0, "symmetries": True},
    "train_params": {
        "epochs": 4,
        "lr": 0.001,
        "batch_size": 32,
        "schedule": "cosine",
        "save_every_steps": 5,
        "deterministic": True,  # without it a GPU does not even repeat itself
    },
}


def main() -> int:
    """Run both trainings and compare them; returns the exit status."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=options.folder) as folder:
        experiment = write_experiment(Path(folder))
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(options.config_file)] if options.config_file else []
        command += [str(ROOT / "trainer.py"), str(experiment), *options.overrides]
        runs = Path(folder) / "runs"
        whole, killed = runs / "undisturbed", runs / "killed"
        print("an undisturbed training:", flush=True)
        began = time.time()
        if start(command, whole) != 0:
            return 2
        seconds = time.time() - began
        print(f"  {seconds:.1f} s to step {last(whole)}\nthe same, killed and started again:", flush=True)
        opened = (whole / "config.yaml").stat().st_mtime - began
        chance = random.Random(options.seed)
        for _ in range(options.kills):
            moment = chance.uniform(opened / 2, opened + 1.5 * (seconds - opened) / options.kills)
            status = start(command, killed, moment)
            if status is not None and status != 0:
                return 2
            how = f"SIGKILL after {moment:.1f} s" if status is None else "ended before the next SIGKILL"
            print(f"  {how}: complete to step {last(killed)}", flush=True)
            if last(killed) == last(whole):
                break
        else:
            if start(command, killed) != 0:
                return 2
        return 0 if compare(whole, killed) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_file", type=Path, help="configuration of accelerate launch")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, help="of the random moments")
    parser.add_argument("--folder", type=Path, help="where to work (for several hosts: on a shared disk)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the experiment")
    return parser.parse_args()


def write_experiment(folder: Path) -> Path:
    """A small universe and the experiment on it."""
    write_synthetic(folder / "universe.h5", seeds=5, size=64, strength=15)
    experiment = dict(EXPERIMENT)
    experiment["data_params"] = experiment["data_params"] | {"datafile": str(folder / "universe.h5")}
    experiment["train_params"] = experiment["train_params"] | {"log_dir": str(folder / "runs")}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return folder / "experiment.yaml"


def start(command: list[str], run: Path, kill_after: float | None = None) -> int | None:
    """Start the run once; returns its exit status, None if it was killed after so many seconds."""
    log = run.parent.with_name(f"{run.name}.log")
    with log.open("a") as output:
        launcher = psutil.Popen([*command, f"model_params.name={run.name}"], stdout=output, stderr=output)
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
        print(f"it ended with status {status}:\n{log.read_text()[-3000:]}", file=sys.stderr)
    return status


def last(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    found = [Checkpoint(path) for path in run.glob("checkpoints/step_????????")]
    return max((checkpoint.step for checkpoint in found if checkpoint.find_problem() is None), default=0)


def compare(whole: Path, killed: Path) -> bool:
    """Print what both runs ended with; True if it is equal."""
    all_equal = True
    for what, content in {"weights": weights, "moments": moments, "metrics": metrics}.items():
        hashes = [hashlib.sha256(content(run)).hexdigest()[:16] for run in (whole, killed)]
        equal = hashes[0] == hashes[1]
        all_equal &= equal
        print(f"{what}: undisturbed {hashes[0]}, killed {hashes[1]}: {'equal' if equal else 'DIFFERENT'}")
    return all_equal


def weights(run: Path) -> bytes:
    """The trained network."""
    return (run / "model" / "model.safetensors").read_bytes()


def moments(run: Path) -> bytes:
    """What Adam knows at the end."""
    return Checkpoint(run / "checkpoints" / f"step_{last(run):08d}").read("optimizer.safetensors")


def metrics(run: Path) -> bytes:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing = {"seconds", "slices_per_second"}
    return json.dumps([{k: v for k, v in line.items() if k not in timing} for line in lines]).encode()


if __name__ == "__main__":
    sys.exit(main())
