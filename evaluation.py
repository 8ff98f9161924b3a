"""Evaluate a trained network: what it uses, how well it does, and what it could attain.

    accelerate launch evaluation.py runs/NAME [--seeds A:B] [--checkpoint best|last|STEP]
                                              [--degrade] [--quick] [--converged-with FILE]
    python evaluation.py --compare runs/A runs/B [--output FOLDER]
    python evaluation.py --ensemble runs/A runs/B [--output FOLDER]
    python evaluation.py runs/NAME --predict FILE --output OUT.h5

The program, top to bottom: load the run and its data (analysis/context.py), predict the slices of seeds
that the network was not trained on, remove and exchange wavenumbers, compare with baselines and ceilings of
the power spectrum, and write everything to RUN/evaluation/.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for PYTHONSAFEPATH

import system
from system import UserError

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator

import datasets
import models
from analysis.context import EvaluationContext, load_network, load_run, load_run_config, training_units
from training import distributed, logger
from training.metrics import Predictions

try:
    from analysis import (
        classifiers,
        comparison,
        fields,
        figures,
        interventions,
        lattice,
        planning,
        report,
        robustness,
        saliency,
        simulation_spectra,
        spectral_figures,
        statistics,
        unlabelled,
    )
    from analysis.findings import findings, warnings
    from analysis.simulation_spectra import Partitions, SimulationSpectra
except ModuleNotFoundError as missing:
    print(f"Evaluation needs {missing.name}. Install it: pip install -e .", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run: LOG_DIR/NAME")
    parser.add_argument("--seeds", metavar="A:B", help="seeds A to B-1 instead of the run's test seeds")
    parser.add_argument("--datafile", help="another file of cubes than the run's, such as another redshift")
    parser.add_argument("--checkpoint", metavar="best|last|STEP", help="instead of the run's final network")
    parser.add_argument(
        "--output", type=Path, help="folder of the report (default RUN/evaluation), or OUT.h5"
    )
    parser.add_argument("--allow-training-seeds", action="store_true", help="evaluate on training seeds")
    parser.add_argument(
        "--quick", action="store_true", help="metrics only: no attribution, spectra, saliency"
    )
    parser.add_argument(
        "--degrade", nargs="*", metavar="KEY=VALUE", help="also on degraded slices: smoothing=R, noise=LEVEL"
    )
    parser.add_argument(
        "--converged-with", metavar="FILE", help="cubes of the same box with cells of another size"
    )
    parser.add_argument("--export", choices=["onnx"], help="also write model.onnx beside the weights")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="predict the cubes of an HDF5 file")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="RUN", help="compare evaluated runs")
    parser.add_argument(
        "--ensemble", nargs="+", type=Path, metavar="RUN", help="runs that differ in train_params.seed"
    )
    options = parser.parse_intermixed_args(arguments)
    if sum(bool(choice) for choice in (options.run, options.compare, options.ensemble)) != 1:
        parser.error("give the folder of one run, or --compare or --ensemble with several")
    if options.predict and not (options.run and options.output):
        parser.error("--predict FILE needs the folder of a run and --output OUT.h5")
    if unread := unread_options(options):
        parser.error(unread)

    def program() -> None:
        if runs := options.compare or options.ensemble:
            part = comparison.compare if options.compare else comparison.ensemble
            output = options.output or Path("comparison" if options.compare else "ensemble")
            require_writable(output)
            print(part(output, unique_names(runs)), f"written to {output}", sep="\n")
        else:
            distributed.setup_process()
            (predict if options.predict else evaluate)(options)

    return distributed.run_program(program)


def unread_options(options: argparse.Namespace) -> str | None:
    """Which of the options given --predict, --compare or --ensemble would ignore; None without any."""
    chosen = next((name for name in ("predict", "compare", "ensemble") if getattr(options, name)), None)
    read = {"run", "output", chosen} | ({"checkpoint"} if chosen == "predict" else set())
    given = [name for name, value in vars(options).items() if value not in (None, False)]
    unread = [f"--{name.replace('_', '-')}" for name in given if name not in read]
    return f"--{chosen} does not use {', '.join(unread)}. Omit them." if chosen and unread else None


def evaluate(options: argparse.Namespace) -> None:
    """One run, from its folder to its report. Collective."""
    # Load the run and its data.
    distributed.init_process_group()
    with distributed.raise_on_all_ranks():
        context = load_run(
            options.run,
            datafile=options.datafile,
            seeds=options.seeds,
            checkpoint_name=options.checkpoint,
            allow_training_seeds=options.allow_training_seeds,
        )
        if options.export == "onnx":
            models.export.require_onnx()
        settings = robustness.parse(options.degrade or (), context.box)
        degradations = robustness.degradations(context.box, *settings)
        output = options.output or context.run / "evaluation"
        require_writable(output)
        other = options.converged_with and open_other_resolution(options.converged_with, context.cubes)
    network, clock = context.network, report.Stopwatch(context.accelerator.print)

    # Predict and measure: each process takes its share of the seeds.
    predictions = context.predict()
    clock.lap("forward pass")
    degraded, changed, spectra, joint = None, None, None, None
    if options.degrade is not None:
        slices = context.slices(context.seeds)
        degraded = context.collect(lambda: robustness.measure(network, slices, degradations))
        clock.lap("degradation")
    bands = interventions.Bands.logarithmic(context.box.size)
    if not options.quick:
        every = context.slices(context.seeds)
        changed = context.collect(lambda: interventions.measure(network, every, bands, context.box))
        clock.lap("interventions")
        spectra = [measure_spectra(context, bands, field) for field in range(context.cubes.num_fields)]
        if len(spectra) > 1 and context.training_file is not None:
            joint = (
                fields.measure(context, context.train_seeds, context.training_file),
                fields.measure(context, context.seeds, context.cubes),
            )
        clock.lap("spectra")
    if not context.accelerator.is_main_process:
        return

    # Conclude and write: on the main process.
    results = context.describe() | statistics.summarize(predictions)
    if context.trained.is_calibrated:
        log_odds = context.trained.calibration.log_odds(predictions.logit, predictions.axis).numpy()
        calibrated = predictions.with_logits(log_odds)
        results["calibrated"] = statistics.headline(calibrated) | statistics.cube_metrics(
            calibrated.cube_logits
        )
    if degraded is not None:
        results["degradation"] = robustness.summarize(predictions, degraded[1], degradations, *settings)
    if changed is not None and spectra is not None:
        results |= interventions.summarize(context.predictions(*changed[:2]), changed[2:], bands, context.box)
        of_fields = [compare_spectra(predictions, part, results["interventions"], other) for part in spectra]
        results |= of_fields[0]
        if len(spectra) > 1:
            results["fields"] = dict(zip(context.cubes.fields, of_fields, strict=True))
        results["saliency"] = saliency.saliency_of_extremes(network, predictions, context.slices_of_seed)
    of_data = datasets.data_warnings(
        context.cubes,
        context.seeds,
        standardize=context.config.data_params.standardize,
        trained_on=context.training_file,
    )
    results |= {"warnings": [*of_data, *warnings(results)], "findings": findings(results)}
    if joint is not None:
        results["joint_ceilings"] = fields.compare(context.box, context.cubes.fields, *joint)
        results["findings"].insert(1, fields.describe(results["joint_ceilings"]))
    clock.lap("conclusions")
    write(context, options, output, predictions, results, clock)


@dataclass(frozen=True)
class Spectra:
    """Spectra of the test seeds and, where the training's file exists, of the training seeds."""

    partitions: Partitions
    ceilings: dict[str, classifiers.Ceiling]
    by_scale: dict[str, classifiers.SliceRatios]
    """The directional likelihood ratios of slices for some scales alone (`restrict_to_scales`)."""
    test: SimulationSpectra
    train: SimulationSpectra | None
    same_file: bool
    """Whether both are different seeds of one file."""
    newton_augmentation: float
    mean_matters: bool = True
    """Whether the network sees the mean of a cube."""


def measure_spectra(context: EvaluationContext, bands: interventions.Bands, field: int = 0) -> Spectra:
    """Spectra of a field of training and test seeds, with the likelihood ratios of test slices. Collective.

    Of several adjacent slices the first counts.
    """
    partitions, channel = Partitions(context.box), field * context.config.data_params.channels

    def measure(
        seeds: range, file: datasets.CubeFile, ratios: dict[str, classifiers.SliceRatios]
    ) -> SimulationSpectra:
        batches = (replace(batch, images=batch.images[:, channel:]) for batch in context.slices(seeds, file))
        solids = ((number, cube[field]) for number, cube in context.whole_cubes(seeds, file))
        with distributed.raise_on_all_ranks():
            slices, cubes = simulation_spectra.measure(partitions, batches, solids, ratios)
        rows = context.gather(*slices), context.gather(*cubes)
        return SimulationSpectra.from_rows(partitions, *rows, ratios)

    train, ceilings, by_scale = None, {}, {}
    if context.training_file is None:
        context.accelerator.print("no baselines and ceilings: the data file of the training is missing")
    else:
        train = measure(context.train_seeds, context.training_file, {})
        ceilings = classifiers.fit_ceilings(partitions, train)
        by_scale = classifiers.restrict_to_scales(ceilings["directional"], partitions, bands.edges)
    ratios = {name: ceiling.slices for name, ceiling in ceilings.items()} | by_scale
    test = measure(context.seeds, context.cubes, ratios)
    data = context.config.data_params
    return Spectra(
        partitions,
        ceilings,
        by_scale,
        test,
        train,
        context.same_file,
        data.newton_augmentation,
        mean_matters=data.whiten == "none",
    )


def open_other_resolution(path: str, cubes: datasets.CubeFile) -> datasets.CubeFile:
    """The cubes in `path`, if they have another number of cells in the same box. Raises UserError."""
    other = datasets.CubeFile(path)
    box, other_box = (file.attr_float("box_size") for file in (cubes, other))
    if other.size == cubes.size or box != other_box:
        raise UserError(
            f"--converged-with {path}: found {other.size}^3 cells and box_size {other_box}, beside "
            f"{cubes.size}^3 and {box} in {cubes.path}. Give simulations of the same box with other cells."
        )
    return other


def compare_spectra(
    predictions: Predictions,
    spectra: Spectra,
    scan: dict[str, Any],
    other: datasets.CubeFile | None = None,
) -> dict[str, Any]:
    """Lattice diagnostics of the cubes, and the network beside classifiers of spectra.

    `scan` are the `interventions`: directions are compared where the network uses them. `other` has cells of
    another size.
    """
    partitions, test, train = spectra.partitions, spectra.test, spectra.train
    grid = lattice.Lattice.from_spectra(
        partitions,
        [test, train] if spectra.same_file and train is not None else [test],
        spectra.newton_augmentation,
    )
    shares = np.array([share["value"] for share in scan["shares"]])
    results = {
        "power_spectra": simulation_spectra.summarize(partitions, test),
        "grid": grid.report(mean_matters=spectra.mean_matters),
        "direction_dependence": grid.direction_dependence(
            shares, np.array(scan["edges"]) / partitions.box.fundamental
        ),
    }
    if other is not None:
        results["convergence"] = planning.compare_resolutions(grid, lattice.measure_file(other))
    if train is not None:
        results["baselines"] = classifiers.compare_baselines(predictions, partitions, train, test)
        results["ceilings"] = classifiers.compare_ceilings(predictions, spectra.ceilings, test)
        results["scales"] = classifiers.compare_scales(predictions, spectra.by_scale, test)
    return results


def write(
    context: EvaluationContext,
    options: argparse.Namespace,
    output: Path,
    predictions: Predictions,
    results: dict[str, Any],
    clock: report.Stopwatch,
) -> None:
    """Write the report, its figures and predictions, and update the model card."""
    drawn = figures.of_predictions(
        predictions, results, system.read_json_lines(context.run / logger.METRICS_FILE)
    )
    if not options.quick:
        drawn |= spectral_figures.of_spectra(results, context.box)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figures.save(figure, output / name)
    clock.lap("figures")
    report.write_predictions(output / "predictions.h5", predictions)
    results["environment"]["seconds"] = clock.seconds
    results = report.write(output, results, drawn)
    update_model_card(context, options, output, results)
    print(*results["warnings"], *results["findings"], f"report: {output / 'report.html'}", sep="\n")


def update_model_card(
    context: EvaluationContext, options: argparse.Namespace, output: Path, results: dict[str, Any]
) -> None:
    """Record the results in the run's model card, and export the network as ONNX if requested."""
    folder = output if options.checkpoint else context.run / "model"
    # Without the training's file nothing shows that the values have the same units.
    same_units = context.training_file is not None and "transfer" not in results
    if same_units and not (options.checkpoint or options.allow_training_seeds or options.output):
        models.export.record_evaluation(folder, report.card_record(results))
    if options.export == "onnx":
        difference = models.export.export_onnx(context.trained, folder / "model.onnx")
        print(f"{folder / 'model.onnx'}: logits within {difference:.0e} of torch's")


def require_writable(output: Path, folder: Path | None = None) -> None:
    """Raise UserError unless `folder`, by default `output` itself, exists or can be made."""
    folder = (folder or output).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "is not writable" if existing.is_dir() else "is not a folder"
        raise UserError(f"--output {output}: {existing} {problem}. Choose another folder.")


def require_output_file(output: Path, inputs: Sequence[Path]) -> None:
    """Raise UserError unless predictions can be written to `output` and replace nothing else.

    `inputs` are files that must not be replaced, under any of their names.
    """
    for path in inputs:
        # write_hdf5 removes a file OUT.part that is there
        for name in (output, output.with_name(f"{output.name}.part")):
            if name.exists() and path.exists() and name.samefile(path):
                raise UserError(
                    f"--output {output}: this would replace the cubes in {path}. Choose another file."
                )
    if output.exists() and not unlabelled.is_prediction(output):
        raise UserError(
            f"--output {output}: this exists and was not written by --predict, so it is not replaced. Choose "
            "another file."
        )
    require_writable(output, output.parent)


def unique_names(runs: list[Path]) -> dict[str, Path]:
    """Runs by their names, or by their paths if names repeat."""
    names = [run.name for run in runs]
    return {run.name if len(set(names)) == len(names) else str(run): run for run in runs}


def predict(options: argparse.Namespace) -> None:
    """Write logits and probabilities of cubes without labels."""
    if system.world_size() > 1:
        raise UserError("--predict runs on one process. Start it with python evaluation.py.")
    distributed.init_process_group()
    config = load_run_config(options.run)
    cubes = (options.predict, config.data_params.datafile, config.data_params.local_copy)
    require_output_file(options.output, [Path(path) for path in cubes if path is not None])
    trained = load_network(options.run, config, options.checkpoint)
    accelerator = Accelerator(mixed_precision=config.train_params.mixed_precision)
    units, std = training_units(config, trained)
    table = unlabelled.predict(
        trained.to(accelerator.device),
        options.predict,
        options.output,
        axes=config.data_params.axes,
        device=accelerator.device,
        std=std,
        units=units,
    )
    print(table, f"written to {options.output}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
