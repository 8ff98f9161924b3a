"""Training beside other programs on the same cores, for several limits of spinning at OpenMP barriers.

    python benchmarks/contention.py [--size 256] [--counts 300000 10000 3000 1000 0] [--scratch FOLDER]

Each round trains with every spin count (GOMP_SPINCOUNT; 300000 is the default of libgomp), idle and beside
one and two processes that compute without pause. The table shows medians over the rounds. Ratios compare runs
of the same round. Other load on the machine distorts them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rounds import machine, machine_line, run_benchmark, scratch_folder, synthetic_file
from step_timer import Settings

DEFAULT = 300_000  # of libgomp
BUSY = (0, 1, 2)
Rates = dict[int, dict[int, list[float]]]


def main() -> None:
    """Measure, print the table and, if requested, write a JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--counts", nargs="+", type=int, default=[DEFAULT, 10_000, 3_000, 1_000, 0], help="spin counts")
    add("--size", type=int, default=256, help="cells along a side of a cube")
    add("--batch", type=int, default=64)
    add("--seconds", type=float, default=6.0, help="minimum time of each measurement")
    add("--rounds", type=int, default=3)
    add("--scratch", type=Path, help="folder for data and runs; default: a temporary one")
    add("--output", type=Path, help="JSON file of all rates")
    options = parser.parse_args()
    with scratch_folder(options.scratch) as scratch:
        datafile = synthetic_file(scratch, 3, options.size)
        settings = Settings(
            datafile=str(datafile.absolute()),
            scratch=str(scratch.absolute()),
            size=options.size,
            batch=options.batch,
            seeds=2,
            seconds=options.seconds,
        )
        rates = measure(settings, options.counts, options.rounds)
    described = machine("cpu")
    if options.output:
        results = {"machine": described, "size": options.size, "batch": options.batch, "rates": rates}
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"RACOON 16, {options.size}^3, batch {options.batch}: {machine_line(described)}\n")
    print(table(rates))


def measure(settings: Settings, counts: Sequence[int], rounds: int) -> Rates:
    """Slices per second by spin count and number of busy processes, one value for each round."""
    rates: Rates = {count: {busy: [] for busy in BUSY} for count in counts}
    for _ in range(rounds):
        for busy in BUSY:
            for count in counts:
                with busy_processes(busy), spin_count(count):
                    numbers: dict[str, Any] = run_benchmark("memory", settings)
                rates[count][busy].append(numbers["slices_per_second"])
                speed = numbers["slices_per_second"]
                print(f"{count:>7} turns beside {busy}: {speed:.0f} slices/s", file=sys.stderr, flush=True)
    return rates


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run processes that compute without pause."""
    with ExitStack() as stack:
        for _ in range(number):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


@contextmanager
def spin_count(count: int) -> Iterator[None]:
    """Set the spin count of processes that are started inside."""
    before = dict(os.environ)
    os.environ["GOMP_SPINCOUNT"] = str(count)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def table(rates: Rates) -> str:
    """Medians in slices/s, and medians of ratios within a round."""
    lines = [
        "| spin count | idle, slices/s | of the default | beside 1, of idle | beside 2, of idle |",
        "|---|---|---|---|---|",
    ]
    for count, by_busy in rates.items():
        default = rates.get(DEFAULT, by_busy)
        columns = [
            f"{ratio(by_busy[0], default[0]):.2f}",
            *(f"{ratio(by_busy[busy], by_busy[0]):.2f}" for busy in BUSY[1:]),
        ]
        lines.append(f"| {count:,} | {median(by_busy[0]):,.0f} | {' | '.join(columns)} |")
    return "\n".join(lines)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios of each round."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


if __name__ == "__main__":
    main()
