"""Slices per second of this project beside its limit and its peers.

    python benchmarks/throughput.py [--architectures RACOON] [--batches 64] [--precisions fp32] [--rounds 3]
    python benchmarks/throughput.py --table benchmarks/throughput.json

All train the same network on the same slices with the same batch on the same cores, one after the other, each
in a process of its own, round after round; a number is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from rounds import machine, machine_line, run_benchmark, scratch_folder, synthetic_file
from step_timer import Settings

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


def main() -> None:
    """Measure, write the JSON file and the chart, print the tables."""
    options = parse()
    if options.table:
        print(tables(json.loads(options.table.read_text())))
        return
    results = measure(options)
    print(tables(results))
    chart(results, options.output.with_suffix(".png"))


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
    add(
        "--workers",
        type=int,
        help="of the peers' DataLoader; default: 0 on a CPU, where more are slower, else 8",
    )
    add("--datafile", type=Path, help="a packed file; default: a synthetic one is made")
    add("--scratch", type=Path, help="folder for it and for runs; default: a temporary one")
    add("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="its other works are kept")
    add("--table", type=Path, metavar="JSON", help="print the tables of an earlier measurement and exit")
    options = parser.parse_args()
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.workers is None:
        options.workers = 0 if options.device == "cpu" else 8
    if options.runners is None:
        options.runners = [name for name in TITLES if name != "device" or options.device == "cuda"]
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all works; what is measured is written after each round."""
    described = machine(options.device)
    results: dict[str, Any] = {"machine": described, "works": {}}
    if options.output.exists() and (old := json.loads(options.output.read_text()))["machine"] == described:
        results = old
    with scratch_folder(options.scratch) as scratch:
        datafile = options.datafile or synthetic_file(scratch, options.seeds + 1, options.size)
        for architecture, batch, precision in product(
            options.architectures, options.batches, options.precisions
        ):
            settings = Settings(
                datafile=str(datafile.absolute()),
                scratch=str(scratch.absolute()),
                architecture=architecture,
                batch=batch,
                precision=precision,
                **{
                    key: getattr(options, key)
                    for key in ("device", "layer_param", "size", "seeds", "warmup", "seconds", "workers")
                },
            )
            work = f"{architecture} {options.layer_param}, batch {batch}, {precision}"
            rates: dict[str, list[float]] = {name: [] for name in options.runners}
            # A GPU computes asynchronously: there the time inside a step means nothing.
            timed = [name for name in options.runners if name in OURS and options.device == "cpu"]
            inside: dict[str, list[float]] = {name: [] for name in timed}
            results["works"][work] = rates
            results.setdefault("step_seconds", {})[work] = inside
            for turn in range(options.rounds):
                for name in options.runners:
                    numbers = run_benchmark(name, settings)
                    rates[name].append(numbers["slices_per_second"])
                    if name in inside:
                        inside[name].append(numbers["step_seconds"])
                    print(f"{work}, round {turn + 1}: {name} {rates[name][-1]:.0f} slices/s", flush=True)
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def tables(results: dict[str, Any]) -> str:
    """The measurement in Markdown."""
    lines = [machine_line(results["machine"]), ""]
    for work, rates in results["works"].items():
        middle = {name: median(rates[name]) for name in TITLES if name in rates}
        batch = int(work.split("batch ")[1].split(",")[0])
        best_peer = max((middle[name] for name in PEERS if name in middle), default=None)
        lines += [
            f"**{work}**",
            "",
            "| | slices/s | ms a step | of them computing | of the limit | of the best peer | rounds |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        inside = results["step_seconds"][work]
        for name, rate in middle.items():
            cells = [
                TITLES[name],
                f"{rate:.0f}",
                f"{1000 * batch / rate:.1f}",
                f"{1000 * median(inside[name]):.1f}" if name in inside else "",
                f"{rate / middle[LIMIT]:.2f}" if LIMIT in middle else "",
                f"{rate / best_peer:.2f}" if best_peer else "",
                ", ".join(f"{value:.0f}" for value in rates[name]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def chart(results: dict[str, Any], path: Path) -> None:
    """Bars of slices per second, a panel for each work; the line is the limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works = results["works"]
    figure, panels = plt.subplots(
        1, len(works), figsize=(1 + 2.6 * len(works), 4), squeeze=False, constrained_layout=True
    )
    for panel, (work, rates) in zip(panels[0], works.items(), strict=True):
        names = [name for name in TITLES if name in rates and name != LIMIT]
        colours = ["tab:blue" if name in OURS else "tab:grey" for name in names]
        panel.bar(names, [median(rates[name]) for name in names], color=colours)
        panel.plot(
            [index for index, name in enumerate(names) for _ in rates[name]],
            [rate for name in names for rate in rates[name]],
            "k.",
            markersize=3,
        )
        if LIMIT in rates:
            panel.axhline(median(rates[LIMIT]), color="tab:red", linewidth=1)
        panel.set_title(work.replace(", ", "\n"), fontsize=9)
        panel.tick_params(axis="x", rotation=90)
    panels[0][0].set_ylabel("slices per second (line: the step alone)")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
