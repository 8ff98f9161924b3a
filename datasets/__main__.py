"""Commands for data files: `python -m datasets synthesize|pack|repack|inspect`.

From another folder, or where PYTHONSAFEPATH is set: `python CHECKOUT/datasets synthesize|...`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import UserError, path_argument

import argparse
import dataclasses

from datasets.cube_file import CubeFile
from datasets.preparation.checks import read_pair
from datasets.preparation.filter import Filter
from datasets.preparation.pack import Options, pack
from datasets.preparation.repack import repack
from datasets.preparation.synthetic import PHYSICS, Settings, write_synthetic
from training.distributed import run_program

SYNTHETIC = {
    "size": "cells per side, a multiple of 64",
    "physics": "how the twins differ. linear: as linear theory predicts for simulations without radiation "
    "treatment; late: as measured in simulations with it; toy: a larger difference with the opposite sign",
    "strength": "factor on this difference; 1 is physical for linear and late",
    "grid": "lattice effect in units of that of gevolution twins with 64^3 cells",
    "resolution": "isotropic excess of GR near the Nyquist wavenumber, in units of that of gevolution twins, "
    "0.7 %%",
    "seed": "random seed of the universe",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m datasets", description="Create and examine cube files.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.add_argument("--force", action="store_true", help="overwrite the output file")
        return added

    synthesize = command("synthesize", "write a synthetic universe")
    synthesize.add_argument("out", type=path_argument, metavar="OUT.h5")
    synthesize.add_argument("--seeds", type=int, required=True, help="number of seeds, each with two cubes")
    for field in dataclasses.fields(Settings):
        synthesize.add_argument(
            f"--{field.name}",
            type=type(field.default),
            choices=PHYSICS if field.name == "physics" else None,
            default=field.default,
            help=f"{SYNTHETIC[field.name]} (default: {field.default})",
        )

    packing = command("pack", "pack raw gevolution output into one standardized file")
    packing.add_argument(
        "raw", type=path_argument, metavar="RAW_DIR", help="folder with seed0000/gr/gr_snap000_phi.h5, ..."
    )
    packing.add_argument("out", type=path_argument, metavar="OUT.h5")
    which = packing.add_mutually_exclusive_group(required=True)
    text = "pack this redshift; several become fields of one file"
    which.add_argument("--redshift", type=float, nargs="+", metavar="Z", help=text)
    which.add_argument("--snapshot", type=int, help="pack this snapshot number")
    text = "pack the potential at Z1 minus that at Z2, each divided by its linear growth"
    which.add_argument("--difference", type=float, nargs=2, metavar=("Z1", "Z2"), help=text)
    text = "pack NNN_FIELD.h5 of each snapshot; several become fields of one file (default: phi)"
    packing.add_argument("--field", nargs="+", default=["phi"], metavar="FIELD", help=text)

    text = "convert a chunked or compressed file to one that is fast to read, or stack several"
    repacking = command("repack", text)
    text = "a file, or several of the same simulations, whose fields become those of one file"
    repacking.add_argument("files", type=path_argument, nargs="+", metavar="IN.h5", help=text)
    repacking.add_argument("out", type=path_argument, metavar="OUT.h5")
    for written in (packing, repacking):
        _add_options(written)

    inspection = command("inspect", "list the contents of a file and its problems; status 2 if it has any")
    inspection.add_argument("file", type=path_argument, metavar="FILE")
    text = "file of the same box with another number of cells"
    inspection.add_argument("other", type=path_argument, metavar="OTHER", nargs="?", help=text)
    text = "plot GR, Newton and their difference"
    inspection.add_argument("--plot", type=path_argument, metavar="OUT.png", help=text)
    text = "write an experiment that fits the file"
    inspection.add_argument("--write-experiment", type=path_argument, metavar="MINE.yaml", help=text)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    text = "remove the modes of the cubes beyond N, in units of the fundamental mode"
    parser.add_argument("--max-wavenumber", type=float, metavar="N", help=text)
    text = "reduce the cubes to M^3 cells, exact for modes below M/2"
    parser.add_argument("--cells", type=int, metavar="M", help=text)
    text = "subtract from each cube its own mean, which would identify its gravity"
    parser.add_argument("--remove-mean", action="store_true", help=text)
    text = "standardize by the mean and standard deviation of FILE, on which a network was trained"
    parser.add_argument("--like", type=path_argument, metavar="FILE", help=text)
    text = "number the seeds that have both twins 0, 1, 2, ...; `original_seeds` keeps their numbers"
    parser.add_argument("--renumber", action="store_true", help=text)


def _inspect(options: argparse.Namespace) -> None:
    """Print everything about a file. Raises UserError, at the end, if it has problems."""
    from datasets.preparation.inspect import (  # imports matplotlib, which takes a second
        check_plot,
        plot,
        report,
    )

    if options.plot:
        check_plot(options.plot, options.force)
    text, problems, sound = report(options.file)
    print(text)
    if sound and (cubes := CubeFile(options.file)).seeds:
        _print_ratios(cubes, options.other)
    if options.plot:
        plot(options.file, options.plot)
        print(f"plot written to {options.plot}")
    if options.write_experiment:
        from datasets.preparation.experiment import write_experiment

        write_experiment(options.file, options.write_experiment, overwrite=options.force)
        out = options.write_experiment
        print(f"experiment written to {out}; next: python trainer.py {out}")
    if problems:
        raise UserError(f"{options.file}: found problems ({problems}), listed above. Correct them first.")


def _print_ratios(cubes: CubeFile, other: Path | None) -> None:
    """Print P_GR/P_N of each field by direction and wavenumber, growth, and a file with other cells."""
    from analysis import fields, lattice, planning  # import torch and scipy

    for field, name in enumerate(cubes.fields):
        if cubes.num_fields > 1:
            print(f"{name}:")
        twins = (read_pair(cubes, seed)[:, field] for seed in cubes.seeds)
        print(planning.describe_lattice(lattice.measure(twins, lattice.box_of(cubes))))
        print(planning.describe_ratio(planning.measure_ratio(cubes, field), cubes))
    if growth := fields.growth_table(cubes):
        print(growth)
    if other:
        print(planning.compare(cubes, CubeFile(other)).describe())


def _run(options: argparse.Namespace) -> None:
    if options.command == "inspect":
        return _inspect(options)
    if options.command == "synthesize":
        settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
        write_synthetic(options.out, seeds=options.seeds, overwrite=options.force, **settings)
    else:
        how = Options(
            remove_mean=options.remove_mean,
            like=options.like,
            renumber=options.renumber,
            filter=Filter(options.max_wavenumber, options.cells),
            overwrite=options.force,
        )
        if options.command == "repack":
            repack(options.files, options.out, options=how)
        else:
            pack(
                options.raw,
                options.out,
                redshifts=options.redshift or (),
                snapshot=options.snapshot,
                difference=options.difference,
                fields=options.field,
                options=how,
            )
    written = CubeFile(options.out)
    names = "; ".join(written.fields) if written.num_fields > 1 else ""
    print(f"{written.path}: {len(written.seeds)} pairs of twins, {written.size}^3 cells each", names)


def main() -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args()
    return run_program(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
