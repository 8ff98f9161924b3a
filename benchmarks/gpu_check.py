"""Check this project on an accelerator: the first thing to do on a new kind of device. Takes ten minutes.

    python benchmarks/gpu_check.py [--folder FOLDER] [section.key=value ...]

Runs the programs of this project on the universe of the demo and prints a Markdown table of expected and
measured values. Overrides change the experiment of every training. Exit status 0: all values are as expected.
1: some are not. 2: there is no accelerator.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
EXPERIMENT = str(ROOT / "experiments" / "temp.yaml")
EXACT = ("model_params.dropout=0.0", "train_params.deterministic=true", "train_params.compile=false")
CACHES = ("disk", "memory", "device")
COMPILER_WARNING = re.compile(r"WON'T CONVERT|torch\._(dynamo|inductor)\S*|BackendCompilerFailed")
SYNCHRONIZATION = "called a synchronizing CUDA operation"
PREFLIGHT_SECONDS = 20.0
LOSS_TOLERANCE = {"fp16": 0.02, "bf16": 0.02, "two devices": 1e-3}
MAX_SYNCHRONIZATIONS = 0.5  # per step; one that every step repeats gives at least 1
NOISE = 0.95  # of a slices/s ratio
Row = tuple[str, str, str, bool | None]  # name, expected, measured, passed (None: nothing was expected)


class ProgramError(Exception):
    """A program ended with another exit status than 0."""


def run_program(*command: str) -> str:
    """Run a Python program of this project; returns its output. Raises ProgramError with the end of it."""
    process = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode:
        raise ProgramError(f"{' '.join(command)}: exit status {process.returncode}\n{process.stdout[-3000:]}")
    return process.stdout


@dataclass(frozen=True)
class Training:
    """A finished training: what it printed and what `probe` recorded in it."""

    run_dir: Path
    output: str
    record: dict[str, Any]

    @property
    def weights_hash(self) -> str:
        """Hash of the trained network."""
        return hashlib.sha256((self.run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()[:16]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The training's lines of metrics.jsonl."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["phase"] == "train"]


@dataclass(frozen=True)
class Checks:
    """The checks, in order: each method yields rows of the table."""

    device: torch.device
    folder: Path
    overrides: list[str]

    def train(self, name: str, *overrides: str, launcher: tuple[str, ...] = ()) -> Training:
        """Train the demo as run `name`. Raises ProgramError."""
        record = self.folder / f"{name}.json"
        program = (*launcher, "benchmarks/gpu_check.py", "--probe", str(record), EXPERIMENT)
        output = run_program(*program, f"model_params.name={name}", *self.overrides, *overrides)
        return Training(self.folder / "runs" / name, output, json.loads(record.read_text()))

    def caches(self) -> Iterator[Row]:
        """The cache changes no bit of the weights."""
        hashes = [self.train(cache, *EXACT, f"data_params.cache={cache}").weights_hash for cache in CACHES]
        measured = ", ".join(f"{cache} {value}" for cache, value in zip(CACHES, hashes, strict=True))
        yield "weights with each cache", "one hash", measured, len(set(hashes)) == 1

    def demo(self) -> Iterator[Row]:
        """The demo as it is, and in each precision."""
        demo = self.train("demo")
        yield "start to the end of the first step", "", f"{demo.record['first_step_seconds']:.1f} s", None
        yield "training, epoch 2", "", f"{demo.epochs[1]['slices_per_second']:.0f} slices/s", None
        for precision in ("fp16", "bf16"):
            training = self.train(precision, f"train_params.mixed_precision={precision}")
            yield compare_losses(precision, training, demo)

    def evaluation(self) -> Iterator[Row]:
        """The evaluation of the demo's run."""
        started = time.perf_counter()
        run_program("evaluation.py", f"{self.folder}/runs/demo")
        passed = (self.folder / "runs/demo/evaluation/report.json").exists()
        yield "evaluation.py", "report.json", f"{time.perf_counter() - started:.0f} s", passed

    def compiler(self) -> Iterator[Row]:
        """The network is compiled as one graph."""
        training = self.train("compiled", "train_params.epochs=1")
        graphs, breaks = training.record["graphs"], training.record["graph_breaks"]
        warned = COMPILER_WARNING.search(training.output)
        measured = f"{graphs} graphs, {breaks} breaks, {'a warning' if warned else 'no warning'}"
        passed = graphs > 0 and breaks == 0 and not warned
        yield "torch.compile", "graphs, 0 breaks, no warning", measured, passed

    def resume(self) -> Iterator[Row]:
        """A training that is killed and resumed ends with the weights of an uninterrupted one."""
        config = ("--config_file", "accelerate_configs/single_gpu.yaml")
        output = run_program("tests/verify_resume.py", "--kills", "2", *config, "--folder", str(self.folder))
        yield "killed twice and resumed", "equal weights", output.splitlines()[-3], True

    def memory(self) -> Iterator[Row]:
        """Memory does not grow from epoch to epoch, and steps do not wait for the device."""
        training = self.train("memory-epochs", "data_params.cache=memory", "train_params.epochs=6")
        # The first two epochs, with the first evaluation, see all shapes.
        reserved = [value / 2**20 for value in training.record["reserved"][2:]]
        measured = ", ".join(f"{value:.0f}" for value in reserved) + " MiB"
        yield "reserved memory, epochs 3 to 6", "constant", measured, max(reserved) <= reserved[0]
        steps = training.epochs[0]["step"]
        ratio = training.record["synchronizations"][-1] / steps
        expected, passed = f"at most {MAX_SYNCHRONIZATIONS}", ratio <= MAX_SYNCHRONIZATIONS
        yield "synchronizations per step, epoch 6", expected, f"{ratio:.2f} ({steps} steps)", passed

    def throughput(self) -> Iterator[Row]:
        """Slices per second beside the step alone, for a small and a large batch."""
        output = self.folder / "throughput.json"
        options = "--device cuda --batches 64 1024 --architectures RACOON --precisions fp32 --rounds 1"
        options += f" --runners limit device memory --scratch {self.folder} --output {output}"
        run_program("benchmarks/throughput.py", *options.split())
        for work, results in json.loads(output.read_text())["works"].items():
            limit, device, memory = (
                median(result["slices_per_second"] for result in results[name])
                for name in ("limit", "device", "memory")
            )
            name, measured = f"{work}: cache device and memory", f"{device:.0f} and {memory:.0f} slices/s"
            yield name, "device is faster", measured, device >= NOISE * memory
            share = f"{device / limit:.2f} of {limit:.0f} slices/s"
            yield f"{work}: share of the step alone", "", share, None

    def two_devices(self) -> Iterator[Row]:
        """Two devices train what one does."""
        if torch.accelerator.device_count() < 2:
            yield "two devices", "", "skipped: there is one device", None
            return
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        started = time.perf_counter()
        run_program(*launcher, "trainer.py", EXPERIMENT, "--preflight", *self.overrides)
        seconds, expected = time.perf_counter() - started, f"below {PREFLIGHT_SECONDS:.0f} s"
        yield "preflight of two devices", expected, f"{seconds:.1f} s", seconds < PREFLIGHT_SECONDS
        reference = self.train("one", *EXACT)
        yield compare_losses("two devices", self.train("two", *EXACT, launcher=launcher), reference)

    def run(self) -> int:
        """All checks, also after one has failed; prints rows as they are measured, returns failures."""
        failed = 0
        checks = [self.caches, self.demo, self.evaluation]
        needing_cuda = [self.compiler, self.resume, self.memory, self.throughput, self.two_devices]
        real = self.device.type == "cuda" and torch.backends.cuda.is_built()
        print("| | expected | measured | |\n|---|---|---|---|", flush=True)
        for check in [*checks, *(needing_cuda if real else [])]:
            try:
                for row in check():
                    failed += print_row(row)
            except ProgramError as error:
                failed += print_row((check.__name__, "exit status 0", str(error).splitlines()[0], False))
                print(error, file=sys.stderr)
        for check in [] if real else needing_cuda:
            print_row((check.__name__, "", "skipped: needs CUDA or ROCm", None))
        return failed


def compare_losses(name: str, training: Training, reference: Training) -> Row:
    """The mean loss of the first epoch; later ones amplify rounding."""
    loss, expected = (run.epochs[0]["loss"] for run in (training, reference))
    tolerance = LOSS_TOLERANCE[name]
    passed = abs(loss - expected) <= tolerance
    return f"loss of epoch 1, {name}", f"{expected:.4f} ± {tolerance}", f"{loss:.4f}", passed


def print_row(row: Row) -> bool:
    """Print a line of the table; returns whether it failed."""
    *texts, passed = row
    verdict = {True: "ok", False: "**FAILED**", None: ""}[passed]
    print(f"| {' | '.join(texts)} | {verdict} |", flush=True)
    return passed is False


def probe(path: Path, arguments: list[str]) -> int:
    """Train as trainer.py does, and record what only its process can measure; returns its exit status.

    The record: the seconds from the start of the process to the end of the first step; for each epoch the
    memory that the allocator of the device reserved and the number of operations that made the host wait for
    the device; and the graphs and graph breaks of torch.compile.
    """
    sys.path.insert(0, str(ROOT))
    import trainer

    record: dict[str, Any] = {"first_step_seconds": None, "reserved": [], "synchronizations": []}
    train_step, train_epoch = trainer.train_step, trainer.train_epoch
    cuda = torch.backends.cuda.is_built()

    def timed_step(run: Any, *others: Any) -> Any:
        logits = train_step(run, *others)
        if record["first_step_seconds"] is None:
            if run.accelerator.device.type != "cpu":
                torch.get_device_module(run.accelerator.device).synchronize()
            record["first_step_seconds"] = time.time() - psutil.Process().create_time()
        return logits

    def recorded_epoch(*parts: Any) -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=SYNCHRONIZATION)
            if cuda:
                torch.cuda.set_sync_debug_mode("warn")
            completed = train_epoch(*parts)
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
            record["synchronizations"].append(sum(SYNCHRONIZATION in str(item.message) for item in caught))
            record["reserved"].append(torch.cuda.memory_reserved())
        return completed

    trainer.train_step, trainer.train_epoch = timed_step, recorded_epoch
    status = trainer.main(arguments)
    if "torch._dynamo.utils" in sys.modules:
        counters = sys.modules["torch._dynamo.utils"].counters
        record["graphs"] = counters["stats"]["unique_graphs"]
        record["graph_breaks"] = sum(counters["graph_break"].values())
    if os.environ.get("RANK", "0") == "0":
        path.write_text(json.dumps(record))
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to put temporary files (1.5 GB)")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)  # for the trainings of this program
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the experiment")
    options = parser.parse_args(arguments)
    if options.probe:
        return probe(options.probe, options.overrides)
    if not torch.accelerator.is_available():
        print(f"There is no accelerator that torch {torch.__version__} can use.", file=sys.stderr)
        return 2
    device = torch.accelerator.current_accelerator()
    name = getattr(torch.get_device_module(device), "get_device_name", lambda: "")()
    print(f"{name}, {device.type}, torch {torch.__version__}\n")
    parent = options.folder and options.folder.absolute()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=parent) as folder:
        files = f"data_params.datafile={folder}/synthetic.h5", f"train_params.log_dir={folder}/runs"
        failed = Checks(device, Path(folder), [*files, *options.overrides]).run()
    print(f"\n{failed} values are not as expected." if failed else "\nAll values are as expected.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
