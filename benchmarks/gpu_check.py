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
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
EXACT = ("model_params.dropout=0.0", "train_params.deterministic=true", "train_params.compile=false")
CACHES = ("disk", "memory", "device")
COMPILER_WARNING = re.compile(r"WON'T CONVERT|torch\._(dynamo|inductor)\S*|BackendCompilerFailed")
PREFLIGHT_SECONDS = 20.0
LOSS_TOLERANCE = {"fp16": 0.02, "bf16": 0.02, "two devices": 1e-3}
MAX_SYNCHRONIZATIONS = 0.5  # per step; one that every step repeats gives at least 1
NOISE = 0.95  # of a slices/s ratio


class ProgramError(Exception):
    """A program ended with another exit status than 0."""


class Check(NamedTuple):
    """One row of the table; `passed` is None for what was skipped or has no expected value."""

    name: str
    expected: str
    measured: str
    passed: bool | None = None


@dataclass(frozen=True)
class Session:
    """The device and the folder in which everything runs."""

    device: torch.device
    folder: Path
    overrides: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether this is a real CUDA or ROCm device."""
        return self.device.type == "cuda" and torch.backends.cuda.is_built()

    def skip(self, name: str) -> Check:
        """A row for what only a real CUDA or ROCm device can do."""
        kind = "an emulated device" if self.device.type == "cuda" else self.device.type
        return Check(name, "", f"skipped: needs CUDA or ROCm, this is {kind}")

    def train(self, name: str, *overrides: str, launcher: tuple[str, ...] = ()) -> Training:
        """Train the demo as run `name`. Raises ProgramError."""
        result = self.folder / f"{name}.json"
        arguments = [
            str(ROOT / "experiments" / "temp.yaml"),
            f"model_params.name={name}",
            f"data_params.datafile={self.folder / 'synthetic.h5'}",
            f"train_params.log_dir={self.folder / 'runs'}",
            *self.overrides,
            *overrides,
        ]
        started = time.perf_counter()
        output = run_program(*launcher, "benchmarks/training_probe.py", str(result), *arguments)
        seconds = time.perf_counter() - started
        return Training(self.folder / "runs" / name, output, json.loads(result.read_text()), seconds)


@dataclass(frozen=True)
class Training:
    """What a training left."""

    run_dir: Path
    output: str
    probe: dict[str, Any]
    seconds: float

    @property
    def weights_hash(self) -> str:
        """Hash of the trained network."""
        return hashlib.sha256((self.run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()[:16]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The training's lines of metrics.jsonl."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["phase"] == "train"]


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


def check_caches(session: Session) -> Iterator[Check]:
    """The cache changes no bit of the weights."""
    hashes = [session.train(cache, *EXACT, f"data_params.cache={cache}").weights_hash for cache in CACHES]
    measured = ", ".join(f"{cache} {value}" for cache, value in zip(CACHES, hashes, strict=True))
    yield Check("weights with each cache", "one hash", measured, len(set(hashes)) == 1)


def check_demo(session: Session) -> Iterator[Check]:
    """The demo as it is, compiled, in each precision."""
    demo = session.train("demo")
    yield Check("start to the end of the first step", "", f"{demo.probe['first_step_seconds']:.1f} s")
    yield Check("training, epoch 2", "", f"{demo.epochs[1]['slices_per_second']:.0f} slices/s")
    if session.cuda:
        graphs, breaks = demo.probe.get("graphs", 0), demo.probe.get("graph_breaks", 0)
        warned = COMPILER_WARNING.search(demo.output)
        measured = f"{graphs} graphs, {breaks} breaks, {'a warning' if warned else 'no warning'}"
        passed = graphs > 0 and breaks == 0 and not warned
        yield Check("torch.compile", "graphs, 0 breaks, no warning", measured, passed)
    else:
        yield session.skip("torch.compile")
    for precision in ("fp16", "bf16"):
        training = session.train(precision, f"train_params.mixed_precision={precision}")
        yield compare_losses(precision, training, demo)


def compare_losses(name: str, training: Training, reference: Training) -> Check:
    """The mean loss of the first epoch; later ones amplify rounding."""
    loss, expected = (one.epochs[0]["loss"] for one in (training, reference))
    tolerance = LOSS_TOLERANCE[name]
    passed = abs(loss - expected) <= tolerance
    return Check(f"loss of epoch 1, {name}", f"{expected:.4f} ± {tolerance}", f"{loss:.4f}", passed)


def check_resume(session: Session) -> Iterator[Check]:
    """A training that is killed and resumed ends with the weights of an uninterrupted one."""
    name, config = "killed twice and resumed", "accelerate_configs/single_gpu.yaml"
    if not session.cuda:
        yield session.skip(name)
        return
    output = run_program(
        "tests/verify_resume.py", "--kills", "2", "--config_file", config, "--folder", str(session.folder)
    )
    yield Check(name, "equal weights", output.splitlines()[-3], True)


def check_evaluation(session: Session) -> Iterator[Check]:
    """The evaluation of the demo's run."""
    started = time.perf_counter()
    run_program("evaluation.py", str(session.folder / "runs" / "demo"))
    report = session.folder / "runs" / "demo" / "evaluation" / "report.json"
    measured = f"report.json in {time.perf_counter() - started:.0f} s" if report.exists() else "no report"
    yield Check("evaluation.py", "report.json", measured, report.exists())


def check_memory(session: Session) -> Iterator[Check]:
    """Memory does not grow from epoch to epoch, and steps do not wait for the device."""
    names = ("reserved memory, epochs 3 to 6", "synchronizations per step, epoch 6")
    if not session.cuda:
        yield from map(session.skip, names)
        return
    training = session.train("memory-epochs", "data_params.cache=memory", "train_params.epochs=6")
    # The first two epochs, with the first evaluation, see all shapes.
    reserved = [value / 2**20 for value in training.probe["reserved"][2:]]
    measured = ", ".join(f"{value:.0f}" for value in reserved) + " MiB"
    yield Check(names[0], "constant", measured, max(reserved) <= reserved[0])
    steps = training.epochs[0]["step"]
    ratio = training.probe["synchronizations"][-1] / steps
    yield Check(
        names[1],
        f"at most {MAX_SYNCHRONIZATIONS}",
        f"{ratio:.2f} ({steps} steps)",
        ratio <= MAX_SYNCHRONIZATIONS,
    )


def check_throughput(session: Session) -> Iterator[Check]:
    """Slices per second beside the step alone, for a small and a large batch."""
    if not session.cuda:
        yield session.skip("throughput")
        return
    output = session.folder / "throughput.json"
    options = "--device cuda --batches 64 1024 --architectures RACOON --precisions fp32 --rounds 1"
    runners = "--runners limit device memory"
    files = ("--scratch", str(session.folder), "--output", str(output))
    run_program("benchmarks/throughput.py", *options.split(), *runners.split(), *files)
    for work, rates in json.loads(output.read_text())["works"].items():
        limit, device, memory = (median(rates[name]) for name in ("limit", "device", "memory"))
        measured = f"{device:.0f} and {memory:.0f} slices/s"
        yield Check(
            f"{work}: cache device and memory", "device is faster", measured, device >= NOISE * memory
        )
        yield Check(f"{work}: share of the step alone", "", f"{device / limit:.2f} of {limit:.0f} slices/s")


def check_two_devices(session: Session) -> Iterator[Check]:
    """Two devices train what one does."""
    name = "two devices"
    if torch.accelerator.device_count() < 2:
        yield Check(name, "", "skipped: there is one device")
        return
    if not session.cuda:
        yield session.skip(name)
        return
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    experiment = str(ROOT / "experiments" / "temp.yaml")
    datafile = f"data_params.datafile={session.folder / 'synthetic.h5'}"
    started = time.perf_counter()
    run_program(*launcher, "trainer.py", experiment, "--preflight", datafile, *session.overrides)
    seconds = time.perf_counter() - started
    yield Check(
        "preflight of two devices",
        f"below {PREFLIGHT_SECONDS:.0f} s",
        f"{seconds:.1f} s",
        seconds < PREFLIGHT_SECONDS,
    )
    one = session.train("one", *EXACT)
    two = session.train("two", *EXACT, launcher=launcher)
    yield compare_losses(name, two, one)


CHECKS: list[Callable[[Session], Iterator[Check]]] = [
    check_caches,
    check_demo,
    check_resume,
    check_evaluation,
    check_memory,
    check_throughput,
    check_two_devices,
]


def check_all(session: Session) -> list[Check]:
    """All checks, also after one has failed; prints each row as it is measured."""
    rows = []
    print("| | expected | measured | |\n|---|---|---|---|", flush=True)
    for check in CHECKS:
        try:
            for row in check(session):
                rows.append(row)
                print_row(row)
        except ProgramError as error:
            rows.append(Check(check.__name__, "exit status 0", str(error).splitlines()[0], False))
            print_row(rows[-1])
            print(error, file=sys.stderr)
    return rows


def print_row(row: Check) -> None:
    """One line of the Markdown table."""
    verdict = {True: "ok", False: "**FAILED**", None: ""}[row.passed]
    print(f"| {row.name} | {row.expected} | {row.measured} | {verdict} |", flush=True)


def describe(device: torch.device) -> str:
    """Device and versions, in one line."""
    module = torch.get_device_module(device)
    name = module.get_device_name() if hasattr(module, "get_device_name") else device.type
    return f"{name}, {device.type}, torch {torch.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to put temporary files (1.5 GB)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the experiment")
    options = parser.parse_args(arguments)
    if not torch.accelerator.is_available():
        print(f"There is no accelerator that torch {torch.__version__} can use.", file=sys.stderr)
        return 2
    device = torch.accelerator.current_accelerator()
    print(f"{describe(device)}\n")
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.folder) as folder:
        rows = check_all(Session(device, Path(folder).absolute(), options.overrides))
    failed = sum(row.passed is False for row in rows)
    print(
        f"\n{failed} of {len(rows)} values are not as expected."
        if failed
        else "\nAll values are as expected."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
