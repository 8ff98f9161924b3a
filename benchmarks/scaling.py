"""Time and memory by number of simulations and processes, from launch to first step, and of an evaluation.

    python benchmarks/scaling.py [--parts seeds processes launch evaluation] [--scratch FOLDER]
    python benchmarks/scaling.py --table benchmarks/scaling.json

The part `seeds` needs 128 MiB of disk for each seed of 256^3, 6.7 GB in all, and reads it from the page cache
where the memory is large enough.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from peers import ROOT
from rounds import machine, machine_line, run_benchmark, scratch_folder, synthetic_file
from step_timer import Settings

TEST_SEEDS = 2
LAUNCHER = ("-m", "accelerate.commands.launch", "--config_file")
Measured = list[dict[str, Any]]


def main() -> None:
    """Measure, write the JSON file, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--seeds", type=int, default=6, help="simulations at first; they double three times")
    add("--size", type=int, default=256, help="cells along a side of a cube")
    add("--rounds", type=int, default=3)
    add("--datafile", type=Path, help="a packed file; default: a synthetic one is made")
    add("--scratch", type=Path, help="folder for it and for runs; default: a temporary one")
    add("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="its other parts are kept")
    add("--table", type=Path, metavar="JSON", help="print the tables of an earlier measurement and exit")
    options = parser.parse_args()
    if options.table:
        print(tables(json.loads(options.table.read_text())))
        return
    described = machine(options.device)
    results: dict[str, Any] = {"machine": described}
    if options.output.exists() and (old := json.loads(options.output.read_text()))["machine"] == described:
        results = old
    with scratch_folder(options.scratch) as scratch:
        datafile = options.datafile or synthetic_file(scratch, 8 * options.seeds + TEST_SEEDS, options.size)
        settings = Settings(
            datafile=str(datafile.absolute()),
            scratch=str(scratch.absolute()),
            device=options.device,
            size=options.size,
            seeds=options.seeds,
            test_seeds=TEST_SEEDS,
        )
        for part in options.parts:
            results[part] = PARTS[part](settings, options.rounds)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


def seeds(settings: Settings, rounds: int) -> Measured:
    """Whole runs of one epoch and an evaluation, cache disk, with 1, 2, 4 and 8 times the seeds."""
    found = [{"seeds": factor * settings.seeds, "rates": [], "anonymous": []} for factor in (1, 2, 4, 8)]
    for _ in range(rounds):
        for line in found:
            numbers = show(run_benchmark("disk", replace(settings, seeds=line["seeds"], epochs=1)), **line)
            line["rates"].append(numbers["slices_per_second"])
            line["anonymous"].append(numbers["anonymous_bytes"])
    for line in found:
        line["cube_bytes"] = line["seeds"] * 2 * settings.size**3 * 4
    return found


def processes(settings: Settings, rounds: int) -> Measured:
    """The same run of one epoch on 1 and 2 processes, one core each."""
    found = [{"processes": count, "rates": [], "anonymous": []} for count in (1, 2)]
    on_cpu = settings.device == "cpu"
    configuration = str(ROOT / "accelerate_configs" / ("cpu_multi.yaml" if on_cpu else "multi_gpu.yaml"))
    for _ in range(rounds):
        for line in found:
            launcher = (*LAUNCHER, configuration, "--num_processes", str(line["processes"]))
            numbers = run_benchmark(
                "disk", replace(settings, epochs=1), launcher, threads=1 if on_cpu else None
            )
            show(numbers, **line)
            line["rates"].append(numbers["slices_per_second"])
            line["anonymous"].append(numbers["anonymous_bytes"])
    return found


def launch(settings: Settings, rounds: int) -> Measured:
    """From importing torch and accelerate to the end of the first step, with the most seeds."""
    found = [{"cache": cache, "first_step": []} for cache in ("disk",)]
    for _ in range(rounds):
        for line in found:
            numbers = run_benchmark(
                line["cache"], replace(settings, seeds=8 * settings.seeds, warmup=0.0, seconds=0.0)
            )
            line["first_step"].append(show(numbers, **line)["first_step"])
    return found


def evaluation(settings: Settings, rounds: int) -> Measured:
    """Two evaluations of several seeds, the first of which reads the cubes, and the forward pass alone."""
    found: Measured = [{"runner": name, "rates": [], "again": []} for name in ("forward", "memory", "disk")]
    for _ in range(rounds):
        for line in found:
            epochs = 0 if line["runner"] == "forward" else 2
            chosen = replace(settings, seeds=1, test_seeds=settings.seeds, epochs=epochs)
            numbers = show(run_benchmark(line["runner"], replace(chosen, warmup=0.5)), **line)
            first, again = numbers.get("test_slices_per_second", [numbers["slices_per_second"]] * 2)
            line["rates"].append(first)
            line["again"].append(again)
    return found


PARTS: dict[str, Callable[[Settings, int], Measured]] = {
    "seeds": seeds,
    "processes": processes,
    "launch": launch,
    "evaluation": evaluation,
}


def show(numbers: dict[str, Any], **line: Any) -> dict[str, Any]:
    """Print a measurement and return it."""
    print({key: value for key, value in line.items() if not isinstance(value, list)}, numbers, flush=True)
    return numbers


def tables(results: dict[str, Any]) -> str:
    """The measurements as Markdown tables."""
    blocks = [machine_line(results["machine"])]
    if "seeds" in results:
        base = median(results["seeds"][0]["rates"])
        rows = [
            [
                line["seeds"],
                f"{line['cube_bytes'] / 1e9:.1f}",
                f"{1000 / median(line['rates']):.3f}",
                f"{base / median(line['rates']):.2f}",
                f"{max(line['anonymous']) / 1e9:.2f}",
            ]
            for line in results["seeds"]
        ]
        head = ["seeds", "cubes, GB", "ms a slice", "to the first", "peak anonymous memory, GB"]
        blocks.append(table(head, rows))
    if "processes" in results:
        rows = [
            [
                line["processes"],
                f"{1000 / median(line['rates']):.3f}",
                f"{max(line['anonymous']) / 1e9:.2f}",
                listed(line["rates"], 0),
            ]
            for line in results["processes"]
        ]
        head = [
            "processes",
            "ms a slice",
            "peak anonymous memory of one, GB",
            "slices/s, rounds",
        ]
        blocks.append(table(head, rows))
    if "launch" in results:
        rows = [
            [line["cache"], f"{median(line['first_step']):.2f}", listed(line["first_step"], 2)]
            for line in results["launch"]
        ]
        blocks.append(table(["cache", "seconds to the end of the first step", "rounds"], rows))
    if "evaluation" in results:
        rows = [
            [
                "the forward pass alone" if line["runner"] == "forward" else f"evaluation, {line['runner']}",
                f"{1000 / median(line['rates']):.3f}",
                f"{1000 / median(line['again']):.3f}",
                listed(line["again"], 0),
            ]
            for line in results["evaluation"]
        ]
        head = [
            "",
            "ms a slice, first evaluation",
            "ms a slice, second evaluation",
            "slices/s, rounds of the second",
        ]
        blocks.append(table(head, rows))
    return "\n\n".join(blocks)


def listed(values: list[float], digits: int) -> str:
    """Values, separated by commas."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["--:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
