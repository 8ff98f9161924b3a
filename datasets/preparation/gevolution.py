"""Raw output of gevolution (Adamek et al. 2016, JCAP 07, 053): its folders, snapshots and settings.

RAW_DIR/seed0000/gr/gr_settings_used.ini        the settings of the run, lines `key = value`
RAW_DIR/seed0000/gr/gr_snap004_phi.h5           data set `data`, (N, N, N), the potential in units of c^2
RAW_DIR/seed0000/newton/...                     the twin: the same initial conditions, Newtonian

The settings name the files: `generic file base` is gr here, `snapshot file base` gr_snap. Values are read as
gevolution 1.2 reads them (its parser.hpp): of a key given twice the first counts, a number may be followed by
text, a choice is known by its first letter, and a missing key has a default. A run that was resumed has other
keys: Omega instead of omega, T_cmb and N_ur, and none for the initial conditions.
"""

import system
from system import UserError

import glob
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..cube_file import GRAVITIES
from .cosmology import Cosmology

Settings = Mapping[str, str]
Value = str | tuple[float, ...] | None

# Names, outputs, and what a resumed run starts from do not change a simulation. Gravity, random seed and
# redshifts are compared on their own.
IRRELEVANT = re.compile(
    "gravity theory|seed|.* file base|output path|output|root|tracer factor|snapshot .*|Pk .*|lightcone .*"
    "|hibernation .*|.*_verbose|gevolution version|restart redshift|cycle|tau|dtau|particle file|metric file"
)
# A resumed run reads its particles instead.
INITIAL_CONDITIONS = frozenset({
    "IC generator", "template file", "tiling factor", "Tk file", "mPk file", "correct displacement",
    "baryon treatment", "relaxation redshift",
})  # fmt: skip
CHOICES = {
    "IC generator": "basic", "baryon treatment": "blend", "correct displacement": "no", "k-domain": "cube",
    "fluid treatment": "background", "radiation treatment": "background", "vector method": "parabolic",
}  # fmt: skip
DEFAULTS = CHOICES | {
    "h": "0.67556", "A_s": "2.215e-9", "n_s": "0.9619", "k_pivot": "0.05", "tiling factor": "1",
    "N_ncdm": "0", "downgrade factor": "1", "Courant factor": "1", "time step limit": "1",
    "switch delta_rad": "0", "w0_fld": "-1", "wa_fld": "0", "cs2_fld": "1",
}  # fmt: skip
LINEAR_CHI = "switch linear chi"  # its default depends on the gravity, so twins may differ in it
DENSITIES = {"T_cmb", "N_ur", "N_eff"}
DENSITIES |= {f"{letter}mega_{kind}" for letter in "oO" for kind in ("b", "cdm", "g", "ur", "fld")}
ATTRIBUTES = DENSITIES | {"Ngrid", "initial redshift", "h", "A_s", "n_s", "k_pivot", "w0_fld", "wa_fld"}
PLANCK_LAW = 4.48147e-7  # omega_g / T_cmb^4, in K^-4
NEUTRINO = 7 / 8 * (4 / 11) ** (4 / 3)  # energy of a massless neutrino over that of the photons
STALE_SECONDS = 60  # copies of one simulation are written within such a time, in any order


@dataclass(frozen=True)
class Simulation:
    """One simulation: a seed under one gravity."""

    seed: int
    gravity: str
    folder: Path

    @cached_property
    def settings_file(self) -> Path:
        """The settings, in the folder of the snapshots. Raises UserError if there are none, or several."""
        files = sorted(self.folder.glob("*_settings_used.ini"))
        if len(files) == 1:
            return files[0]
        raise UserError(
            f"{self.folder}: {len(files)} files *_settings_used.ini, which gevolution writes beside its "
            "snapshots; one is needed, for redshifts and cosmology. Copy or remove files. The folder "
            f"contains {_list_names(self.folder)}."
        )

    @cached_property
    def settings(self) -> dict[str, str]:
        """The settings as text. Raises UserError for those of the other gravity."""
        settings: dict[str, str] = {}
        for line in self.settings_file.read_text(errors="replace").splitlines():
            key, equals, value = line.partition("#")[0].partition("=")
            if equals and value.strip():
                settings.setdefault(key.strip(), value.strip())
        theory = settings.get("gravity theory", "none")
        newton = theory[0] in "Nn" and "gravity theory" in settings
        if newton != (self.gravity == "newton") or "gravity theory" not in settings:
            runs = "Newtonian gravity" if newton else "General Relativity"
            raise UserError(
                f"{self.settings_file}: gravity theory = {theory}, with which gevolution runs {runs}, in the "
                f"folder {self.gravity}. Correct the line if it was lost or changed after the run; otherwise "
                "move the files or rerun the simulation."
            )
        return settings

    @cached_property
    def redshifts(self) -> list[float]:
        """Redshifts of snapshots 0, 1, ...: gevolution numbers them by time."""
        text = self.settings.get("snapshot redshifts", "(missing)")
        numbers = _numbers(text)
        if numbers is None:
            raise UserError(f"{self.settings_file}: snapshot redshifts = {text}; numbers are needed.")
        return sorted(numbers, reverse=True)

    def snapshots(self, field: str) -> dict[int, Path]:
        """The files of a field by number. Raises UserError if some are of another run."""
        # Without this key gevolution writes snapshot000_phi.h5; its example has lcdm_snap.
        given = self.settings.get("snapshot file base")
        bases = [Path(given).name] if given else ["snapshot", "lcdm_snap", f"{self.gravity}_snap"]
        files: dict[int, Path] = {}
        for path in sorted(self.folder.glob(f"*_{glob.escape(field)}.h5")):
            if (match := re.fullmatch(r"(.*?)(\d{3,})_.*", path.name)) and match[1] in bases:
                files[int(match[2])] = path
        if not files:
            raise UserError(
                f"{self.folder}: no file {' or '.join(f'{base}NNN_{field}.h5' for base in bases)}, as "
                f"`snapshot file base` in {self.settings_file.name} names them. Rename files, or correct the "
                f"settings. The folder contains {_list_names(self.folder)}."
            )
        if max(files) >= len(self.redshifts):
            raise UserError(
                f"{files[max(files)]}: {self.settings_file.name} lists {len(self.redshifts)} redshifts, for "
                f"snapshots 0 to {len(self.redshifts) - 1}: this file is of another run, and others may be. "
                "Remove what is not of this run."
            )
        # gevolution writes its settings when it starts. If all files are older, the settings were edited.
        start = self.settings_file.stat().st_mtime - STALE_SECONDS
        old = [path.name for path in files.values() if path.stat().st_mtime < start]
        if 0 < len(old) < len(files) and "cycle" not in self.settings:
            raise UserError(
                f"{self.folder}: {', '.join(old)}: older than the settings, other snapshots are newer: left "
                "over from an earlier run. Remove them, or rerun the simulation."
            )
        return files

    def snapshot(self, redshift: float, field: str) -> Path:
        """The file of a field at a redshift. Raises UserError, which lists what there is."""
        for number, other in enumerate(self.redshifts):
            if not math.isclose(other, redshift, rel_tol=1e-6, abs_tol=1e-6):
                continue
            files = self.snapshots(field)
            if number not in files:
                names = ", ".join(path.name for path in files.values())
                raise UserError(
                    f"{self.folder}: no snapshot {number} of {field} (z = {other:g}). There are {names}."
                )
            return files[number]
        listed = ", ".join(f"{z:g}" for z in self.redshifts)
        raise UserError(
            f"{self.settings_file}: no snapshot at redshift {redshift:g}; choose one of {listed}."
        )

    @cached_property
    def values(self) -> dict[str, Value]:
        """What gevolution reads from the settings that changes a simulation, with its defaults."""
        texts = DEFAULTS | {LINEAR_CHI: "0.011" if self.gravity == "newton" else "0"} | self.settings
        values: dict[str, Value] = {key: (value,) for key, value in densities(self.settings).items()}
        for key in texts.keys() - DENSITIES:
            if key in CHOICES:
                values[key] = "b" if texts[key] == "ignore" else texts[key][0].lower()
            elif not IRRELEVANT.fullmatch(key):
                values[key] = _numbers(texts[key]) or re.sub(r"[^,]*/", "", texts[key])  # a file's name
        return values

    def show(self, key: str) -> str:
        """A setting as text."""
        value = self.values.get(key, "(missing)")
        return (DEFAULTS | self.settings).get(key) or (
            f"{value[0]:g}" if isinstance(value, tuple) else str(value)
        )


def _list_names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"


def _numbers(text: str) -> tuple[float, ...] | None:
    """The numbers at the start of the parts of a list, as C's sscanf reads them; None if one has none."""
    matches = [re.match(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", part) for part in text.split(",")]
    return None if None in matches else tuple(float(match[0]) for match in matches if match)


def number(settings: Settings, key: str) -> float | None:
    """A number in the settings, or its default; None if there is none."""
    numbers = _numbers(settings.get(key, DEFAULTS.get(key, "")))
    return numbers[0] if numbers else None


def densities(settings: Settings) -> dict[str, float]:
    """Densities today over the critical one: baryons, cold dark matter, photons, neutrinos and fluid."""
    h = number(settings, "h") or Cosmology.h

    def density(kind: str, default: float) -> float:
        physical, share = number(settings, f"omega_{kind}"), number(settings, f"Omega_{kind}")
        return physical / h**2 if physical is not None else default if share is None else share

    temperature = number(settings, "T_cmb")
    photons = density("g", 0.0) if temperature is None else PLANCK_LAW * temperature**4 / h**2
    species = [n for key in ("N_ur", "N_eff") if (n := number(settings, key)) is not None]
    neutrinos = (species or [Cosmology.N_ur])[0] * NEUTRINO * photons
    return {
        "Omega_b": density("b", 0.0),
        "Omega_cdm": density("cdm", 1.0),
        "Omega_g": photons,
        "Omega_ur": neutrinos if species else density("ur", neutrinos),
        "Omega_fld": density("fld", 0.0) if number(settings, "w0_fld") != -1 else 0.0,
    }


def find_simulations(raw: Path, *, leave_out: bool) -> list[Simulation]:
    """All simulations in a folder, by seed, both twins of each.

    Seeds without both twins are left out with a warning. Unless `leave_out` they raise UserError.
    """
    if not raw.is_dir():
        raise UserError(f"{raw}: not a folder. Give the folder that contains seed0000/gr/...")
    folders: dict[int, Path] = {}
    for folder in sorted(raw.iterdir()):
        if (match := re.fullmatch(r"seed(\d+)", folder.name)) and folder.is_dir():
            other = folders.setdefault(int(match[1]), folder)
            if other != folder:
                raise UserError(f"{raw}: {other.name} and {folder.name} are the same seed. Rename one.")
    if not folders:
        raise UserError(f"{raw}: no folders seed0000, seed0001, ... It contains {_list_names(raw)}.")
    for gravity in GRAVITIES:
        missing = [seed for seed, folder in folders.items() if not (folder / gravity).is_dir()]
        problem = f"{raw}: no folder {gravity} for seeds {system.format_ranges(missing)}"
        if missing and (not leave_out or len(missing) == len(folders)):
            raise UserError(f"{problem}. Add both twins, or leave such seeds out with --renumber.")
        if missing:
            print(f"warning: {problem}, which are left out", file=sys.stderr)
        folders = {seed: folder for seed, folder in folders.items() if seed not in missing}
    return [Simulation(s, gravity, folders[s] / gravity) for s in sorted(folders) for gravity in GRAVITIES]


def check_settings(simulations: list[Simulation]) -> None:
    """Raise UserError unless twins differ by gravity alone, and seeds by their initial conditions alone.

    `simulations` are pairs of twins.
    """
    first = {simulation.gravity: simulation for simulation in simulations[:2]}
    _check_equal(simulations[0], simulations[1], ignored=frozenset({LINEAR_CHI}))
    for simulation in simulations[2:]:
        _check_equal(first[simulation.gravity], simulation)
    folders: dict[int, Path] = {}
    for newton, gr in zip(simulations[::2], simulations[1::2], strict=True):
        seed, other = (int(number(twin.settings, "seed") or 0) for twin in (newton, gr))
        if seed != other:
            raise UserError(
                f"{gr.settings_file}: seed = {other}, but its twin has {seed}. Twins start from the same "
                "initial conditions."
            )
        from_file = newton.values["IC generator"] == "r" and "cycle" not in newton.settings
        if seed in folders and not from_file:
            raise UserError(
                f"{newton.folder.parent}: its random seed is {seed}, as in {folders[seed]}: they are one "
                "realization, not two. Rerun one with another `seed`."
            )
        folders[seed] = newton.folder.parent


def _check_equal(a: Simulation, b: Simulation, ignored: frozenset[str] = frozenset()) -> None:
    if "cycle" in a.settings or "cycle" in b.settings:
        ignored = ignored | INITIAL_CONDITIONS
    keys = sorted((a.values.keys() | b.values.keys()) - ignored)
    different = [
        f"{key} = {b.show(key)}, not {a.show(key)}"
        for key in keys
        if not _same(key, a.values.get(key), b.values.get(key))
    ]
    if different:
        raise UserError(
            f"{b.settings_file}: {'; '.join(different)} as in {a.settings_file}. Twins must "
            "differ by gravity alone, seeds by their random seed alone: rerun one of them."
        )


def _same(key: str, a: Value, b: Value) -> bool:
    if not (isinstance(a, tuple) and isinstance(b, tuple)):
        return a == b
    precision = 1e-4 if key.startswith("Omega") else 1e-5  # resumed runs write six digits
    close = [math.isclose(x, y, rel_tol=precision) for x, y in zip(a, b, strict=False)]
    return len(a) == len(b) and all(close)


def file_attributes(simulation: Simulation) -> dict[str, Any]:
    """Attributes of a packed file: box, cosmology and how gevolution treats radiation. Raises UserError."""
    settings = simulation.settings
    if (box := number(settings, "boxsize")) is None:
        raise UserError(f"{simulation.settings_file}: boxsize is missing or no number. Correct it.")
    perturbed = settings.get("radiation treatment", "")[:1].lower() == "c"
    return {
        **{key: number(settings, key) for key in sorted(ATTRIBUTES & settings.keys())},
        **{key: settings[key] for key in ("m_ncdm", "gauge") if key in settings},
        "radiation treatment": "CLASS" if perturbed else "background",
        "box_size": box,
        "box_size_unit": "Mpc/h",
    }


def cosmology(settings: Settings) -> Cosmology:
    """The cosmology of a simulation.

    Raises UserError for settings with which the growth of the potential is not a function of redshift alone.
    """
    omega, h = densities(settings), number(settings, "h") or Cosmology.h
    unknown_growth = {
        "m_ncdm": "m_ncdm" in settings and _numbers(settings.get("N_ncdm", "1")) != (0,),
        "fluid treatment": settings.get("fluid treatment", "b")[0] in "cC" and omega["Omega_fld"] > 0,
        "Omega_ur": omega["Omega_ur"] > 0 and omega["Omega_g"] == 0,
    }
    for key, present in unknown_growth.items():
        if present:
            raise UserError(
                f"gevolution's settings have {key} = {settings.get(key)}, with which the growth of the "
                "potential depends on scale or is unknown. Use --redshift instead of --difference."
            )
    numbers = {key: number(settings, key) for key in ("A_s", "n_s", "k_pivot", "w0_fld", "wa_fld")}
    return Cosmology(
        h=h,
        omega_b=omega["Omega_b"] * h**2,
        omega_cdm=omega["Omega_cdm"] * h**2,
        T_cmb=(omega["Omega_g"] * h**2 / PLANCK_LAW) ** 0.25,
        N_ur=omega["Omega_ur"] / (NEUTRINO * omega["Omega_g"]) if omega["Omega_g"] else 0.0,
        Omega_fld=omega["Omega_fld"],
        **{key: value for key, value in numbers.items() if value is not None},
    )
