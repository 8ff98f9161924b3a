"""Measure what a trained network learned, with honest errors, and write a report.

    accelerate launch evaluation.py runs/NAME [--seeds A:B] [--checkpoint best|last|STEP] [--export onnx]
    python evaluation.py --compare runs/A runs/B [--output FOLDER]

The story of an evaluation, top to bottom: open the run and its data, let the network judge slices it has
never seen, take scales away from them, hold the yardstick beside it, and write everything to
RUN/evaluation/.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

import checkpoint
import datasets
import distributed
import metrics
import models
from config import Config, ConfigError, DataParams, check_same_settings, load_config

try:
    from analysis import (
        comparison,
        figures,
        page,
        passes,
        report,
        saliency,
        scales,
        spectra,
        statistics,
        style,
        yardstick,
    )
except ModuleNotFoundError as missing:
    print(f"an evaluation needs {missing.name}: pip install -e '.[evaluation]'", file=sys.stderr)
    sys.exit(2)

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

ROWS = 64  # slices per batch; it divides every cube, so a batch never mixes cubes


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked."""


USER_ERRORS = (
    EvaluationError,
    comparison.ComparisonError,
    ConfigError,
    datasets.DataError,
    models.ModelError,
    checkpoint.CheckpointError,
    distributed.LaunchError,
    OSError,
)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on what."""

    run: Path
    config: Config
    accelerator: Accelerator
    trained: models.TrainedNetwork
    network: torch.nn.Module  # the bare network on its device, for slices that are standardised already
    cubes: datasets.CubeFile
    seeds: range
    home: datasets.CubeFile | None  # the file it was trained on, if that is still there

    @property
    def trained_on(self) -> range:
        """The seeds that the network was trained on."""
        return range(self.config.data_params.train_seeds)

    @property
    def box(self) -> spectra.Box:
        """The box of the simulations, as far as the data file tells."""
        return spectra.Box(self.cubes.size, self.cubes.attr_float("box_size"))

    def share(self, seeds: range) -> range:
        """The seeds of this process."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return seeds[len(seeds) * process // processes : len(seeds) * (process + 1) // processes]

    def slices_of(self, seeds: range, cubes: datasets.CubeFile | None = None) -> Iterator[datasets.Batch]:
        """All slices of `seeds` as the network sees them, simulation by simulation."""
        options = self.config.data_params.model_dump(include={"axes", "channels", "newton_augmentation"})
        options |= {"mean": self.trained.mean, "std": self.trained.std, "device": self.accelerator.device}
        return datasets.WholeCubeDataset(
            cubes or self.cubes, seeds, batch_size=ROWS, seed=0, cache="disk", **options
        ).evaluation_batches()

    def named(self, ids: Ids, logits: Floats) -> metrics.Predictions:
        """Slices with their logits and where they come from."""
        return metrics.Predictions(ids, *datasets.decode(ids, self.cubes.size), logits)

    def gathered(self, ids: Ids, values: Floats) -> tuple[Ids, Floats]:
        """Ids, ascending, and values of all ranks. Collective."""
        columns = metrics.gather_by_id(self.accelerator, torch.from_numpy(ids), torch.from_numpy(values))
        return columns[0].numpy(), columns[1].numpy()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run: LOG_DIR/NAME")
    parser.add_argument("--seeds", metavar="A:B", help="seeds A to B-1 instead of the run's test seeds")
    parser.add_argument("--datafile", help="another file of cubes than the run's")
    parser.add_argument("--checkpoint", metavar="best|last|STEP", help="instead of the run's final network")
    parser.add_argument("--output", type=Path, help="folder for it; default RUN/evaluation or ./comparison")
    parser.add_argument(
        "--allow-training-seeds", action="store_true", help="evaluate on what it was trained on"
    )
    parser.add_argument("--quick", action="store_true", help="numbers only: no scales, yardstick, saliency")
    parser.add_argument("--export", choices=["onnx"], help="also write model.onnx beside the weights")
    parser.add_argument(
        "--compare", nargs="+", type=Path, metavar="RUN", help="compare runs already evaluated"
    )
    options = parser.parse_args(arguments)
    if (options.run is None) == (options.compare is None):
        parser.error("either the folder of a run or --compare with several is needed")

    def work() -> None:
        if options.compare:
            compare(options.compare, options.output or Path("comparison"))
        else:
            distributed.setup_process()
            evaluate(options)

    return distributed.run_program(work, USER_ERRORS)


def evaluate(options: argparse.Namespace) -> None:
    """One run from its folder to its report."""
    distributed.init_process_group()
    with distributed.raise_on_all_ranks():
        subject = open_subject(options)
        output = options.output or subject.run / "evaluation"
        if output.is_file():
            raise EvaluationError(f"--output: found the file {output}, allowed: a folder")
        output.mkdir(parents=True, exist_ok=True)
    clock, box, mine = report.Clock(subject.accelerator.print), subject.box, subject.share(subject.seeds)
    with distributed.raise_on_all_ranks():
        judged = passes.logits(subject.network, subject.slices_of(mine))
    slices = subject.named(*subject.gathered(*judged))
    clock.lap("logits")
    if not options.quick:
        bands = spectra.Bands.logarithmic(box.size)
        with distributed.raise_on_all_ranks():
            scan = passes.scales(subject.network, subject.slices_of(mine), bands, box)
        filtered, table = subject.gathered(*scan)
        clock.lap("scales")
        unknown = power_spectra(subject, subject.seeds, subject.cubes)
        known = power_spectra(subject, subject.trained_on, subject.home) if subject.home else None
        if known is None:
            subject.accelerator.print("no yardstick: the data file of the training is not there any more")
        clock.lap("spectra")
    if not subject.accelerator.is_main_process:
        return
    bootstrap = statistics.SeedBootstrap(slices.seeds)
    numbers = description(subject, options) | statistics.summary(slices, bootstrap)
    report.write_predictions(output / "predictions.h5", slices)
    clock.lap("numbers")
    curves, history = statistics.curves(slices, bootstrap), report.history(subject.run / "metrics.jsonl")
    drawn = figures.of_slices(slices, curves, numbers, history)
    if not options.quick:
        some = subject.named(filtered, table[:, 0])
        numbers["scales"] = scales.by_wavenumber(some, table, bands, box, bootstrap)
        numbers["spectra"] = scales.power(some, table, unknown.cubes, bands, box, bootstrap)
        if known:
            numbers["yardstick"] = yardstick.compare(slices, known, unknown, bootstrap)
        numbers["extremes"] = look_closer(subject, slices)
        clock.lap("yardstick")
        drawn |= figures.of_scales(numbers, box)
    for name, figure in drawn.items():
        style.save(figure, output / name)
    clock.lap("figures")
    numbers["how"]["seconds"] = clock.seconds
    numbers = report.write(output, numbers, drawn)
    leave_with_network(subject, numbers, output, options)
    print(*page.findings(numbers), f"report: {output / 'report.html'}", sep="\n")


def open_subject(options: argparse.Namespace) -> Subject:
    """The run, its network and the data, checked against each other before anything is computed."""
    run: Path = options.run
    if not (run / "config.yaml").is_file():
        raise EvaluationError(
            f"{run}: found no config.yaml; allowed: a folder LOG_DIR/NAME that trainer.py wrote"
        )
    config = load_config(run / "config.yaml")
    if options.export == "onnx":
        models.export.require_onnx()
    seeds = seeds_asked(options, config.data_params)
    trained = open_network(run, options.checkpoint, config)
    given = datasets.CubeFile(options.datafile) if options.datafile else None
    complete = (
        one
        for one in reversed(checkpoint.list_checkpoints(run / "checkpoints"))
        if one.find_problem() is None
    )
    last = next(complete, None)
    if last is not None:
        check_same_settings(run, last.config, config.to_dict())
    home = home_of(run, config, last, given)
    cubes = given or home
    assert cubes is not None
    size = trained.settings["size"]
    if cubes.size != size:
        raise EvaluationError(
            f"{cubes.path}: found cubes of {cubes.size}^3, allowed: {size}^3, as in training"
        )
    cubes.require(seeds)
    if home is not None:
        datasets.check_normalization(home, cubes)
    accelerator = Accelerator(mixed_precision=config.train_params.mixed_precision)
    fewest = min(len(seeds), config.data_params.train_seeds)
    if accelerator.num_processes > fewest:
        raise EvaluationError(f"found {accelerator.num_processes} processes; allowed: one per seed, {fewest}")
    network: torch.nn.Module = copy.deepcopy(trained.network)
    memory_format = datasets.image_memory_format(accelerator.device)
    network = network.to(accelerator.device, memory_format=memory_format)  # type: ignore[call-overload]
    network = accelerator.prepare_model(network, evaluation_mode=True).eval()
    return Subject(run, config, accelerator, trained, network, cubes, seeds, home)


def home_of(
    run: Path, config: Config, last: checkpoint.Checkpoint | None, given: datasets.CubeFile | None
) -> datasets.CubeFile | None:
    """The file that the run was trained on where it was then; else `given`, if it holds the same cubes.

    EvaluationError if other cubes lie where the run's were.
    """
    identity = last.state["data_identity"] if last else None
    path = Path(config.data_params.datafile)
    if identity is not None and not path.exists():
        path = Path(identity["path"])  # as when this is another working directory
    moved = given is not None and not path.exists()
    cubes = given if moved else datasets.CubeFile(path)
    assert cubes is not None
    if identity is None:  # nothing tells what it was trained on but the path
        return None if moved else cubes
    seeds = range(*identity["seeds"])
    if (
        identity["shape"] == [cubes.size] * 3
        and set(seeds) <= set(cubes.seeds)
        and cubes.identity(seeds)["fingerprint"] == identity["fingerprint"]
    ):
        return cubes
    if moved:
        return None
    raise EvaluationError(
        f"{path}: found other cubes than those that {run} was trained on\nallowed: the same file, "
        "wherever it is, or another one by --datafile while this one is out of the way"
    )


def seeds_asked(options: argparse.Namespace, data: DataParams) -> range:
    """The seeds to evaluate; those that the network was trained on only where that is allowed expressly."""
    seeds = range(data.train_seeds, data.train_seeds + data.test_seeds)
    if options.seeds is not None:
        ends = re.fullmatch(r"(\d+):(\d+)", options.seeds)
        seeds = range(int(ends[1]), int(ends[2])) if ends else range(0)
        if not seeds:
            raise EvaluationError(f"--seeds: found '{options.seeds}', allowed: A:B with A < B, for A to B-1")
    if seeds.start < data.train_seeds and not options.allow_training_seeds:
        raise EvaluationError(
            f"--seeds: found {seeds.start}:{seeds.stop}, but the network was trained on seeds 0 to "
            f"{data.train_seeds - 1}\nallowed: seeds from {data.train_seeds} on, or --allow-training-seeds"
        )
    return seeds


def open_network(run: Path, choice: str | None, config: Config) -> models.TrainedNetwork:
    """The run's final network, or that of its best (by test loss), last or given checkpoint."""
    if choice is None:
        if not (run / "model").is_dir():
            raise EvaluationError(f"{run}: not trained to its end yet; allowed: --checkpoint last")
        return models.load(run / "model")
    chosen = checkpoint.select(run / "checkpoints", choice)
    trained = models.TrainedNetwork(
        **config.model_arguments(chosen.state["data_identity"]["shape"][0]),
        mean=chosen.train_state["mean"],
        std=chosen.train_state["std"],
        training={"run": run.name, "step": chosen.step, "epoch": chosen.train_state["epoch"]},
    )
    trained.network.load_state_dict(chosen.tensors("model"))
    return trained.eval()


def power_spectra(subject: Subject, seeds: range, cubes: datasets.CubeFile) -> yardstick.Spectra:
    """P(k) of all slices and cubes of `seeds`, as the network sees them. Collective."""
    with distributed.raise_on_all_ranks():
        found = passes.spectra(subject.box, subject.slices_of(subject.share(seeds), cubes))
    (ids, slices), (_, solids) = (subject.gathered(*part) for part in found)
    where = datasets.decode(ids, cubes.size)
    return yardstick.Spectra(where.seed, where.gravity, slices, solids.reshape(len(seeds), 2, -1))


def description(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """What was evaluated, on what, and how."""
    data, trained, accelerator = subject.config.data_params, subject.trained, subject.accelerator
    attributes = {key: subject.cubes.attr_float(key) for key in ("box_size", "redshift", "mean", "std")}
    settings = data.model_dump(include={"train_seeds", "newton_augmentation", "axes"})
    slices = {"seeds": [subject.seeds.start, subject.seeds.stop], "size": subject.cubes.size}
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    weights = {"weights": options.checkpoint or "final", "parameters": parameters}
    standardisation = {"subtracts": trained.mean, "divides by": trained.std}
    return {
        "run": subject.config.model_params.name,
        "model": trained.settings | weights | standardisation | trained.training_record,
        "data": {"file": str(subject.cubes.path)} | slices | attributes | settings,
        "how": {
            "processes": accelerator.num_processes,
            "device": str(accelerator.device),
            "mixed_precision": accelerator.mixed_precision,
            "torch": torch.__version__,
        },
    }


def look_closer(subject: Subject, slices: metrics.Predictions) -> list[dict[str, Any]]:
    """The slices of which the network is most and least certain: their names, and their saliency maps."""
    found = []
    for what, place in saliency.extremes(slices).items():
        name = saliency.describe_slice(slices, place)
        simulation = subject.slices_of(range(name["seed"], name["seed"] + 1))
        image = passes.find(simulation, int(slices.id[place]))
        found.append({"what": what} | name | saliency.maps(subject.network, image))
    return found


def leave_with_network(
    subject: Subject, numbers: dict[str, Any], output: Path, options: argparse.Namespace
) -> None:
    """The numbers in the network's model card, and the network as ONNX where that is asked for."""
    folder = output if options.checkpoint else subject.run / "model"
    # Without the file of the training nothing tells whether the values mean the same.
    if subject.home and not (options.checkpoint or options.allow_training_seeds or options.output):
        models.export.record_evaluation(folder, report.for_card(numbers))
    if options.export == "onnx":
        difference = models.export.export_onnx(subject.trained, folder / "model.onnx")
        print(f"{folder / 'model.onnx'}: logits within {difference:.0e} of torch's")


def compare(runs: Sequence[Path], output: Path) -> None:
    """One table and one figure of runs that are evaluated."""
    names = [run.name for run in runs]
    unique = len(set(names)) == len(names)
    reports = {run.name if unique else str(run): comparison.read(run) for run in runs}
    output.mkdir(parents=True, exist_ok=True)
    print(comparison.write(output, reports), f"written to {output}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
