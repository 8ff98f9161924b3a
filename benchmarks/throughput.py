"""Slices per second of this project beside its limit and its peers.

    python benchmarks/throughput.py [--architectures RACOON] [--batches 64] [--precisions fp32] [--rounds 3]

All train the same network on the same slices with the same batch on the same cores, one after the other, each
in a separate process (runners.py), round after round; a number is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import distributions
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for PYTHONSAFEPATH

from runners import ROOT, Settings

LIMIT = "limit"
OURS = {
    "device": "gravity-cnn, cache device",
    "memory": "gravity-cnn, cache memory",
    "disk": "gravity-cnn, cache disk",
}
PEERS = {
    "plain": "plain PyTorch, cubes in memory",
    "plain h5py": "plain PyTorch, slices by h5py",
    "lightning": "Lightning, cubes in memory",
    "transformers": "transformers, cubes in memory",
}
TITLES = {LIMIT: "the step alone (limit)", **OURS, **PEERS}
PACKAGES = ("torch", "accelerate", "lightning", "transformers", "numpy", "numba")


def main() -> None:
    """Measure, print the tables and, if requested, write a JSON file."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="gravity-cnn-bench-", dir=options.scratch) as scratch:
        works = measure(options, Path(scratch).absolute())
    if options.output:
        options.output.write_text(json.dumps({"works": works}, indent=1) + "\n")
    print(f"\n{machine(options.device)}\n\n{tables(works)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--architectures", nargs="+", default=["RACOON", "PENGUIN"])
    add("--layer-param", type=int, default=16, help="width of the networks")
    add("--batches", nargs="+", type=int, default=[64])
    add("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    add("--runners", nargs="+", choices=TITLES, help="default: all that the device has")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=4.0, help="that each is timed for in a round, at least")
    add("--warmup", type=float, default=2.0, help="seconds of training before that")
    add("--seeds", type=int, default=6, help="simulations to train on")
    add("--size", type=int, default=256, help="cells along a side of a cube")
    add("--scratch", type=Path, help="folder for temporary files")
    add("--output", type=Path, help="JSON file of all rates")
    options = parser.parse_args()
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.runners is None:
        options.runners = [name for name in TITLES if name != "device" or options.device == "cuda"]
    return options


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    """The results of every round, by work and runner."""
    sys.path.insert(0, str(ROOT))
    import datasets

    # At physical strength no network fits a batch within a round. Gradients would become denormal numbers,
    # which slow down the peers alone, since this project flushes them to zero.
    datafile = scratch / "synthetic.h5"
    datasets.write_synthetic(datafile, seeds=options.seeds + 1, size=options.size)
    shared = ("device", "layer_param", "size", "seeds", "warmup", "seconds")
    values = {key: getattr(options, key) for key in shared}
    settings = Settings(datafile=str(datafile), scratch=str(scratch), **values)
    works = {}
    for architecture, batch, precision in product(options.architectures, options.batches, options.precisions):
        chosen = replace(settings, architecture=architecture, batch=batch, precision=precision)
        work = f"{architecture} {options.layer_param}, batch {batch}, {precision}"
        works[work] = results = {name: [] for name in options.runners}
        for turn, name in product(range(options.rounds), options.runners):
            results[name].append(run(name, chosen))
            rate = results[name][-1]["slices_per_second"]
            print(f"{work}, round {turn + 1}: {name} {rate:.0f} slices/s", flush=True)
    return works


def run(name: str, settings: Settings) -> dict[str, float]:
    """The result of a runner in its own process. Raises RuntimeError with the end of its output."""
    environment = dict(os.environ) | ({"ACCELERATE_USE_CPU": "true"} if settings.device == "cpu" else {})
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        given = json.dumps(asdict(replace(settings, scratch=folder)))
        process = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "runners.py"), name, given],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if process.returncode:
        raise RuntimeError(f"{name} failed with {settings}:\n{(process.stdout + process.stderr)[-3000:]}")
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return result


def machine(device: str) -> str:
    """The hardware and the versions that numbers were measured with, in one line."""
    parts = [f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        parts.append(facts.get("model name", "unknown processor"))
        parts += [name for name in wanted if name in facts.get("flags", "").split()]
    if device == "cuda":
        import torch

        parts.append(torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}")
    installed = {package.name: package.version for package in distributions()}
    parts += [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    return ", ".join(parts)


def tables(works: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """The measurement in Markdown."""
    lines = []
    for work, results in works.items():
        rates = {name: [result["slices_per_second"] for result in rounds] for name, rounds in results.items()}
        middle = {name: median(rates[name]) for name in TITLES if name in rates}
        batch = int(work.split("batch ")[1].split(",")[0])
        best_peer = max((middle[name] for name in PEERS if name in middle), default=None)
        lines += [
            f"**{work}**",
            "",
            "| | slices/s | ms a step | of them computing | of the limit | of the best peer | rounds |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        for name, rate in middle.items():
            inside = [result["step_seconds"] for result in results[name] if "step_seconds" in result]
            cells = [
                TITLES[name],
                f"{rate:.0f}",
                f"{1000 * batch / rate:.1f}",
                f"{1000 * median(inside):.1f}" if inside else "",
                f"{rate / middle[LIMIT]:.2f}" if LIMIT in middle else "",
                f"{rate / best_peer:.2f}" if best_peer else "",
                ", ".join(f"{value:.0f}" for value in rates[name]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
