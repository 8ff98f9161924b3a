"""Commands for data files: `python -m datasets synthesize|pack|repack|inspect`.

From another folder, or where PYTHONSAFEPATH is set: `python CHECKOUT/datasets synthesize|...`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import system
from system import UserError

import argparse

from datasets.cube_file import CubeFile
from datasets.preparation.checks import read_pair
from datasets.preparation.fields import pack_redshifts, stack
from datasets.preparation.filter import Filter
from datasets.preparation.pack import Options, pack, repack
from datasets.preparation.synthetic import PHYSICS, write_synthetic
from training.distributed import run_program


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m datasets", description="Create and examine cube files.")
    commands = parser.add_subparsers(dest="command", required=True)

    synthesize = commands.add_parser("synthesize", help="write a synthetic universe")
    synthesize.add_argument("out", type=_path, metavar="OUT.h5")
    synthesize.add_argument("--seeds", type=int, required=True, help="number of seeds, each with two cubes")
    synthesize.add_argument(
        "--size", type=int, default=64, help="cells per side, a multiple of 64 (default: 64)"
    )
    synthesize.add_argument(
        "--physics",
        choices=PHYSICS,
        default="toy",
        help="how the twins differ. linear: as linear theory predicts for simulations without radiation "
        "treatment; late: as measured in simulations with it; toy: a larger difference with the opposite "
        "sign (default: toy)",
    )
    synthesize.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="factor on this difference; 1 is physical for linear and late (default: 1)",
    )
    synthesize.add_argument(
        "--grid",
        type=float,
        default=0.0,
        help="lattice effect in units of that of gevolution twins with 64^3 cells (default: 0)",
    )
    synthesize.add_argument(
        "--resolution",
        type=float,
        default=0.0,
        help="isotropic excess of GR near the Nyquist wavenumber, in units of that of gevolution twins, "
        "0.7 %% (default: 0)",
    )
    synthesize.add_argument("--seed", type=int, default=0, help="random seed of the universe (default: 0)")

    packing = commands.add_parser("pack", help="pack raw gevolution output into one standardized file")
    packing.add_argument(
        "raw", type=_path, metavar="RAW_DIR", help="folder with seed0000/gr/gr_snap000_phi.h5, ..."
    )
    packing.add_argument("out", type=_path, metavar="OUT.h5")
    which = packing.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--redshift",
        type=float,
        nargs="+",
        metavar="Z",
        help="pack the potential at this redshift; several become fields of one file",
    )
    which.add_argument("--snapshot", type=int, help="pack the potential of this snapshot number")
    which.add_argument(
        "--difference",
        type=float,
        nargs=2,
        metavar=("Z1", "Z2"),
        help="pack the potential at Z1 minus that at Z2, each divided by its linear growth",
    )

    repacking = commands.add_parser(
        "repack", help="convert a chunked or compressed file to one that is fast to read, or stack several"
    )
    repacking.add_argument(
        "files",
        type=_path,
        nargs="+",
        metavar="IN.h5",
        help="a file, or several of the same simulations, whose fields become those of one file",
    )
    repacking.add_argument("out", type=_path, metavar="OUT.h5")
    for command in (packing, repacking):
        command.add_argument(
            "--max-wavenumber",
            type=float,
            metavar="N",
            help="remove the modes of the cubes beyond N, in units of the fundamental mode",
        )
        command.add_argument(
            "--cells", type=int, metavar="M", help="reduce the cubes to M^3 cells, exact for modes below M/2"
        )
        command.add_argument(
            "--remove-mean",
            action="store_true",
            help="subtract from each cube its own mean, which would identify its gravity",
        )
        command.add_argument(
            "--like",
            type=_path,
            metavar="FILE",
            help="standardize by the mean and standard deviation of FILE, on which a network was trained",
        )
        command.add_argument(
            "--renumber",
            action="store_true",
            help="number the seeds that have both twins 0, 1, 2, ...; `original_seeds` keeps their numbers",
        )

    inspection = commands.add_parser("inspect", help="list the contents of a file and its problems")
    inspection.add_argument("file", type=_path, metavar="FILE")
    inspection.add_argument(
        "other",
        type=_path,
        metavar="OTHER",
        nargs="?",
        help="file of the same box with another number of cells",
    )
    inspection.add_argument(
        "--plot", type=_path, metavar="OUT.png", help="plot GR, Newton and their difference"
    )
    inspection.add_argument(
        "--write-experiment", type=_path, metavar="MINE.yaml", help="write an experiment that fits the file"
    )

    for command in (synthesize, packing, repacking, inspection):
        command.add_argument("--force", action="store_true", help="overwrite the output file")
    return parser


def _path(text: str) -> Path:
    try:
        return Path(system.expand_path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _inspect(options: argparse.Namespace) -> None:
    from datasets.preparation.inspect import (  # imports matplotlib, which takes a second
        check_plot,
        plot,
        report,
    )

    if options.plot:
        check_plot(options.plot, options.force)
    text, sound = report(options.file)
    print(text)
    if sound:
        _print_ratios(CubeFile(options.file), options.other)
    if options.plot:
        plot(options.file, options.plot)
        print(f"plot written to {options.plot}")
    if options.write_experiment:
        from datasets.preparation.experiment import write_experiment

        write_experiment(options.file, options.write_experiment, overwrite=options.force)
        out = options.write_experiment
        print(f"experiment written to {out}; next: python trainer.py {out}")


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
        keys = ["seeds", "size", "physics", "strength", "grid", "resolution", "seed"]
        settings = {key: getattr(options, key) for key in keys}
        write_synthetic(options.out, **settings, overwrite=options.force)
    else:
        how = Options(
            remove_mean=options.remove_mean,
            like=options.like,
            renumber=options.renumber,
            filter=Filter(options.max_wavenumber, options.cells),
            overwrite=options.force,
        )
        if options.command == "pack":
            _pack(options, how)
        elif len(options.files) == 1:
            repack(options.files[0], options.out, options=how)
        elif how != Options(overwrite=options.force):
            raise UserError("repack several files without other options, then OUT.h5 with them.")
        else:
            stack(options.files, options.out, overwrite=options.force)
    written = CubeFile(options.out)
    fields = "; ".join(written.fields) if written.num_fields > 1 else ""
    print(f"{written.path}: {len(written.seeds)} pairs of twins, {written.size}^3 cells each", fields)


def _pack(options: argparse.Namespace, how: Options) -> None:
    if options.redshift is not None:
        pack_redshifts(options.raw, options.out, options.redshift, options=how)
    else:
        pack(
            options.raw,
            options.out,
            snapshot=options.snapshot,
            difference=options.difference,
            options=how,
        )


def main() -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args()
    return run_program(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
