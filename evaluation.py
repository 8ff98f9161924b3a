"""Evaluate a trained network: what it uses, how well it does, and what it could attain.

    accelerate launch evaluation.py runs/NAME [--seeds A:B] [--checkpoint best|last|STEP]
                                              [--degrade] [--quick]
    python evaluation.py --compare runs/A runs/B [--output FOLDER]
    python evaluation.py --ensemble runs/A runs/B [--output FOLDER]
    python evaluation.py runs/NAME --predict FILE --output OUT.h5

The program, top to bottom: load the run and its data (analysis/context.py), predict the slices of seeds
that the network was not trained on, remove and exchange wavenumbers, compare with baselines and ceilings of
the power spectrum, and write everything to RUN/evaluation/.
"""

from __future__ import annotations

import system
from system import UserError

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import datasets
import models
from analysis.context import EvaluationContext, load_network, load_run, load_run_config, training_units
from training import distributed, logger
from training.metrics import Predictions

try:
    from analysis import (
        comparison,
        ensemble,
        figures,
        full_report,
        information,
        interventions,
        report,
        robustness,
        saliency,
        simulation_spectra,
        spectral_figures,
        style,
        summary,
        unlabelled,
    )
    from analysis.ceilings import Ceiling
    from analysis.findings import findings, warnings
    from analysis.interventions import Bands
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
            part = comparison if options.compare else ensemble
            output = options.output or Path("comparison" if options.compare else "ensemble")
            require_writable(output)
            print(part.write(output, unique_names(runs)), f"written to {output}", sep="\n")
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
    """One run, from its folder to its report."""
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
        output = options.output or context.run / "evaluation"
        require_writable(output)
    clock = report.Stopwatch(context.accelerator.print)
    with distributed.raise_on_all_ranks():
        rows = forward_pass(context)
    predictions = context.predictions(*context.gather(*rows))
    clock.lap("forward pass")
    degraded = None
    if options.degrade is not None:
        kinds = robustness.degradations(context.box, *settings)
        with distributed.raise_on_all_ranks():
            rows = robustness.measure(context.network, context.slices(context.seeds), kinds)
        degraded = context.gather(*rows)[1]
        clock.lap("degradation")
    measured = None if options.quick else measure(context, clock)
    if not context.accelerator.is_main_process:
        return
    results: dict[str, Any] = context.describe() | summary.summarize(predictions)
    if context.trained.is_calibrated:
        threshold = context.trained.calibration.threshold
        results["calibrated"] = summary.at_threshold(predictions, threshold)
    clock.lap("metrics")
    if measured is not None:
        results |= full_report.analyse(predictions, measured)
        results["saliency"] = saliency.saliency_of_extremes(
            context.network, predictions, context.slices_of_seed
        )
        clock.lap("analysis")
    if degraded is not None:
        results["degradation"] = robustness.summarize(predictions, degraded, kinds, *settings)
    results |= {"warnings": warnings(results), "findings": findings(results)}
    write(context, options, output, predictions, results, clock)


def forward_pass(context: EvaluationContext) -> tuple[Any, Any]:
    """Sample ids and logits (slices,) of this rank's share of the evaluated slices."""
    ids, logits = [], []
    with torch.inference_mode():
        for batch in context.slices(context.seeds):
            ids.append(batch.ids)
            logits.append(
                context.network(batch.images, batch.axes).float()
            )  # remains on the device: nothing waits for it
    return torch.cat(ids).numpy(), torch.cat(logits).cpu().double().numpy()


def measure(context: EvaluationContext, clock: report.Stopwatch) -> full_report.Measurements:
    """What the full report is computed from. Collective."""
    box, partitions = context.box, Partitions(context.box)
    bands = Bands.logarithmic(box.size)
    with distributed.raise_on_all_ranks():
        rows = interventions.measure(context.network, context.slices(context.seeds), bands, box)
    ids, table = context.gather(*rows)
    clock.lap("interventions")

    def spectra(seeds: range, file: datasets.CubeFile, limits: dict[str, Ceiling]) -> SimulationSpectra:
        with distributed.raise_on_all_ranks():
            batches, fields = context.slices(seeds, file), context.fields(seeds, file)
            rows = simulation_spectra.measure(partitions, batches, fields, limits)
        slices = context.gather(rows.slice_ids, rows.slice_table)
        cubes = context.gather(rows.cube_numbers, rows.cube_table)
        gathered = simulation_spectra.Rows(*slices, *cubes)
        return SimulationSpectra.from_rows(partitions, gathered, list(limits))

    train, limits, file = None, {}, context.training_file
    if file is None:
        context.accelerator.print("no baselines and ceilings: the data file of the training is missing")
    else:
        train = spectra(context.train_seeds, file, {})
        limits = information.fit_ceilings(partitions, train)
    test = spectra(context.seeds, context.cubes, limits)
    clock.lap("spectra")
    return full_report.Measurements(
        bands=bands,
        changed=context.predictions(ids, table[:, 0]),
        table=table,
        partitions=partitions,
        test=test,
        train=train,
        limits=limits,
        same_file=context.same_file,
        newton_augmentation=context.config.data_params.newton_augmentation,
    )


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
    drawn = figures.of_predictions(predictions, summary.curves(predictions), results, history)
    if not options.quick:
        drawn |= spectral_figures.of_spectra(results, context.box)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        style.save(figure, output / name)
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
    found = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not found.is_dir() or not os.access(found, os.W_OK):
        problem = "is not writable" if found.is_dir() else "is not a folder"
        raise UserError(f"--output {output}: {found} {problem}. Choose another folder.")


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
    run: Path = options.run
    if system.world_size() > 1:
        raise UserError("--predict runs on one process. Start it with python evaluation.py.")
    distributed.init_process_group()
    config = load_run_config(run)
    cubes = (options.predict, config.data_params.datafile, config.data_params.local_copy)
    require_output_file(options.output, [Path(path) for path in cubes if path is not None])
    trained = load_network(run, config, options.checkpoint)
    accelerator = Accelerator(mixed_precision=config.train_params.mixed_precision)
    units, std = training_units(config, trained)
    # The calibration of slices is far too uncertain about a cube, but orders cubes and has their threshold.
    of_cubes = trained.calibration.cubes
    table = unlabelled.predict(
        trained.to(accelerator.device).eval(),
        options.predict,
        options.output,
        size=trained.settings.size,
        channels=trained.settings.channels,
        axes=config.data_params.axes,
        device=accelerator.device,
        std=std,
        units=units,
        calibration=of_cubes or trained.calibration,
        calibrated=of_cubes is not None,
    )
    if of_cubes is None:
        table += "\nP(GR) is not calibrated: this network has no calibration of cubes on validation seeds."
    print(table, f"written to {options.output}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
