"""The cost of the keys that change what a network sees: pairs, shifts, whitening.

    python benchmarks/data_keys.py [--architectures RACOON PENGUIN LYNX] [--keys whiten] [--size 256]

Each round trains with the defaults and with every key of the table, one after the other. The table shows the
median over the rounds of the time of a step, relative to the step with the defaults in the same round. LYNX
has circular padding throughout, as in its experiment.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from rounds import machine, machine_line, run_benchmark, scratch_folder, synthetic_file
from step_timer import Settings

KEYS: dict[str, dict[str, str]] = {
    "defaults": {},
    "pairs": {"data_params.pairs": "true"},
    "shifts": {"data_params.shifts": "true"},
    "whiten": {"data_params.whiten": "isotropic"},
    "pairs, shifts, whiten": {
        "data_params.pairs": "true",
        "data_params.shifts": "true",
        "data_params.whiten": "isotropic",
    },
}
BASE = {"LYNX": {"model_params.padding": "circular"}}
Rates = dict[str, dict[str, list[float]]]


def main() -> None:
    """Measure, print the table and, if requested, write a JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--architectures", nargs="+", default=["RACOON", "PENGUIN", "LYNX"])
    add("--keys", nargs="+", choices=[keys for keys in KEYS if keys != "defaults"], help="default: all")
    add("--size", type=int, default=256, help="cells along a side of a cube")
    add("--batch", type=int, default=64)
    add("--cache", choices=["disk", "memory", "device"], default="disk")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--seconds", type=float, default=4.0, help="minimum time of each measurement")
    add("--rounds", type=int, default=3)
    add("--scratch", type=Path, help="folder for data and runs; default: a temporary one")
    add("--output", type=Path, help="JSON file of all rates")
    options = parser.parse_args()
    chosen = ["defaults", *(options.keys or [keys for keys in KEYS if keys != "defaults"])]
    rates: Rates = {name: {keys: [] for keys in chosen} for name in options.architectures}
    with scratch_folder(options.scratch) as scratch:
        datafile = synthetic_file(scratch, 3, options.size)
        for _ in range(options.rounds):
            for architecture, by_keys in rates.items():
                for keys, found in by_keys.items():
                    settings = Settings(
                        datafile=str(datafile.absolute()),
                        scratch=str(scratch.absolute()),
                        device=options.device,
                        architecture=architecture,
                        layer_param=24 if architecture == "LYNX" else 16,
                        size=options.size,
                        batch=options.batch,
                        seeds=2,
                        seconds=options.seconds,
                        overrides=BASE.get(architecture, {}) | KEYS[keys],
                    )
                    found.append(run_benchmark(options.cache, settings)["slices_per_second"])
                    print(f"{architecture}, {keys}: {found[-1]:.0f} slices/s", file=sys.stderr, flush=True)
    described = machine(options.device)
    if options.output:
        results = {"machine": described, "size": options.size, "batch": options.batch, "rates": rates}
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{options.size}^3, batch {options.batch}, cache {options.cache}: {machine_line(described)}\n")
    print(table(rates))


def table(rates: Rates) -> str:
    """Slices/s with the defaults, and the median relative time of a step with each key."""
    others = [keys for keys in next(iter(rates.values())) if keys != "defaults"]
    lines = [f"| | defaults, slices/s | {' | '.join(others)} |", "|---|--:|" + "--:|" * len(others)]
    for architecture, by_keys in rates.items():
        plain = by_keys["defaults"]
        costs = [median(p / r for p, r in zip(plain, by_keys[keys], strict=True)) for keys in others]
        lines.append(
            f"| {architecture} | {median(plain):,.0f} | {' | '.join(f'{cost:.2f}' for cost in costs)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
