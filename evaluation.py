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

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for PYTHONSAFEPATH

import system
from system import UserError

import argparse
import os
import shutil
import tempfile
from typing import Any


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line; exits with status 2 if they contradict each other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=system.path_argument, help="folder of a run: LOG_DIR/NAME")
    parser.add_argument("--seeds", metavar="A:B", help="seeds A to B-1 instead of the run's test seeds")
    parser.add_argument(
        "--datafile",
        type=system.path_argument,
        help="another file of cubes than the run's, such as another redshift",
    )
    parser.add_argument("--checkpoint", metavar="best|last|STEP", help="instead of the run's final network")
    parser.add_argument(
        "--output", type=system.path_argument, help="folder of the report (default RUN/evaluation), or OUT.h5"
    )
    parser.add_argument("--allow-training-seeds", action="store_true", help="evaluate on training seeds")
    parser.add_argument(
        "--quick", action="store_true", help="metrics only: no attribution, spectra, saliency"
    )
    parser.add_argument(
        "--degrade", nargs="*", metavar="KEY=VALUE", help="also on degraded slices: smoothing=R, noise=LEVEL"
    )
    parser.add_argument(
        "--converged-with",
        type=system.path_argument,
        metavar="FILE",
        help="cubes of the same box with cells of another size",
    )
    parser.add_argument("--export", choices=["onnx"], help="also write model.onnx beside the weights")
    parser.add_argument(
        "--predict", type=system.path_argument, metavar="FILE", help="predict the cubes of an HDF5 file"
    )
    parser.add_argument(
        "--compare", nargs="+", type=system.path_argument, metavar="RUN", help="compare evaluated runs"
    )
    parser.add_argument(
        "--ensemble",
        nargs="+",
        type=system.path_argument,
        metavar="RUN",
        help="runs that differ in train_params.seed",
    )
    options = parser.parse_intermixed_args(arguments)
    if not (options.run or options.compare or options.ensemble):
        parser.print_help(sys.stderr)
        sys.exit(2)
    if sum(bool(choice) for choice in (options.run, options.compare, options.ensemble)) != 1:
        parser.error("give the folder of one run, or --compare or --ensemble with several")
    if options.predict and not (options.run and options.output):
        parser.error("--predict FILE needs the folder of a run and --output OUT.h5")
    if unread := unread_options(options):
        parser.error(unread)
    return options


def unread_options(options: argparse.Namespace) -> str | None:
    """Which of the options given --predict, --compare or --ensemble would ignore; None without any."""
    chosen = next((name for name in ("predict", "compare", "ensemble") if getattr(options, name)), None)
    read = {"run", "output", chosen} | ({"checkpoint"} if chosen == "predict" else set())
    given = [name for name, value in vars(options).items() if value not in (None, False)]
    unread = [f"--{name.replace('_', '-')}" for name in given if name not in read]
    return f"--{chosen} does not use {', '.join(unread)}. Omit them." if chosen and unread else None


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes, before seconds of imports

from accelerate import Accelerator

import datasets
import models
from analysis import (
    comparison,
    fields,
    figures,
    findings,
    interventions,
    planning,
    report,
    saliency,
    statistics,
    unlabelled,
)
from analysis.context import EvaluationContext, load_network, load_run, load_run_config, training_units
from training import distributed, logger
from training.metrics import Predictions


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse_arguments(arguments)

    def program() -> None:
        if runs := options.compare or options.ensemble:
            part = comparison.compare if options.compare else comparison.ensemble
            output = options.output or Path("comparison" if options.compare else "ensemble")
            require_writable(output, output)
            print(part(output, unique_names(runs)), f"written to {output}", sep="\n")
        else:
            distributed.setup_process()
            (predict if options.predict else evaluate)(options)

    return distributed.run_program(program)


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
        degradation = interventions.Degradations.parse(options.degrade or (), context.box)
        output = options.output or context.run / "evaluation"
        require_writable(output, output)
        other = options.converged_with and datasets.CubeFile(options.converged_with)
        convergence = planning.compare(context.cubes, other) if other else None
    network, box, clock = context.network, context.box, report.Stopwatch(context.accelerator.print)

    # Predict and measure: each process takes its share of the seeds.
    predictions = context.predict()
    clock.lap("forward pass")
    degraded, changed, spectra, joint = None, None, [], None
    if options.degrade is not None:
        slices = context.slices(context.seeds)
        degraded = context.collect(lambda: degradation.measure(network, slices))
        clock.lap("degradation")
    bands = interventions.Bands.logarithmic(box.size, max_wavenumber=box.max_wavenumber)
    if not options.quick:
        every = context.slices(context.seeds)
        changed = context.collect(lambda: interventions.measure(network, every, bands, box))
        clock.lap("interventions")
        spectra = [fields.measure(context, bands.edges, field) for field in range(context.cubes.num_fields)]
        if len(spectra) > 1 and context.training_file is not None:
            sets = (context.train_seeds, context.training_file), (context.seeds, context.cubes)
            joint = [fields.measure_cross_spectra(context, *some) for some in sets]
        clock.lap("spectra")
    if not context.accelerator.is_main_process:
        return

    # Conclude: on the main process.
    data = context.config.data_params
    results = context.describe() | statistics.summarize(predictions)
    if context.trained.is_calibrated:
        log_odds = context.trained.calibration.log_odds(predictions.logit, predictions.axis).numpy()
        calibrated = predictions.with_logits(log_odds)
        of_cubes = statistics.cube_metrics(calibrated.cube_logits)
        results["calibrated"] = statistics.headline(calibrated) | of_cubes
    if degraded is not None:
        results["degradation"] = degradation.summarize(predictions, degraded[1])
    if changed is not None:
        results |= interventions.summarize(context.predictions(*changed[:2]), changed[2:], bands, box)
        sees_mean = data.whiten == "none"
        by_field = [
            fields.summarize(predictions, some, results["interventions"], mean_matters=sees_mean)
            for some in spectra
        ]
        results |= by_field[0]
        if len(by_field) > 1:
            results["fields"] = dict(zip(context.cubes.fields, by_field, strict=True))
        if joint is not None:
            results["joint_ceilings"] = fields.joint_ceilings(box, context.cubes.fields, *joint)
        if convergence is not None:
            results["convergence"] = {"n": convergence.converged, "follows": convergence.follows}
        results["saliency"] = saliency.saliency_of_extremes(network, predictions, context.slices_of_seed)
    about_data = datasets.data_warnings(
        context.cubes, context.seeds, standardize=data.standardize, trained_on=context.training_file
    )
    warnings, sentences = findings.describe(results)
    results |= {"warnings": [*about_data, *warnings], "findings": sentences}
    clock.lap("conclusions")
    write(context, options, output, predictions, results, clock)


def write(
    context: EvaluationContext,
    options: argparse.Namespace,
    output: Path,
    predictions: Predictions,
    results: dict[str, Any],
    clock: report.Stopwatch,
) -> None:
    """Write the report, its figures and predictions, and update the model card."""
    history = system.read_json_lines(context.run / logger.METRICS_FILE)
    # Figures take seconds: a stop meanwhile must not leave some of them beside an earlier report.
    with tempfile.TemporaryDirectory() as temporary:
        drawn = figures.of_evaluation(predictions, results, history, context.box)
        for name, figure in drawn.items():
            figures.save(figure, Path(temporary, name))
        clock.lap("figures")
        output.mkdir(parents=True, exist_ok=True)
        for path in Path(temporary).iterdir():
            shutil.move(path, output / path.name)
    report.write_predictions(output / "predictions.h5", predictions)
    results["environment"]["seconds"] = clock.seconds
    results = report.write(output, results, drawn)
    folder = output if options.checkpoint else context.run / "model"
    # Without the training's file nothing shows that the values have the same units.
    same_units = context.training_file is not None and "transfer" not in results
    other = options.checkpoint or options.allow_training_seeds or options.output or options.datafile
    if same_units and not other:
        models.export.record_evaluation(folder, report.card_record(results))
    if options.export == "onnx":
        difference = models.export.export_onnx(context.trained, folder / "model.onnx")
        print(f"{folder / 'model.onnx'}: logits within {difference:.0e} of torch's")
    print(*results["warnings"], *results["findings"], f"report: {output / 'report.html'}", sep="\n")


def require_writable(output: Path, folder: Path) -> None:
    """Raise UserError unless `folder`, where --output goes, exists or can be made."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "is not writable" if existing.is_dir() else "is not a folder"
        raise UserError(f"--output {output}: {existing} {problem}. Choose another folder.")


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
    if options.output.exists() and not unlabelled.is_prediction(options.output):
        raise UserError(
            f"--output {options.output}: this exists and was not written by --predict, so it is not "
            "replaced. Choose another file."
        )
    require_writable(options.output, options.output.parent)
    trained = load_network(options.run, config, options.checkpoint)
    accelerator = Accelerator(mixed_precision=config.train_params.mixed_precision)
    units, std = training_units(options.run, config, trained)
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
