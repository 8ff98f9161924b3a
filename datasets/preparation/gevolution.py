"""Raw output of gevolution (Adamek et al. 2016, JCAP 07, 053): its folders, snapshots and settings.

RAW_DIR/seed0000/gr/gr_snap004_phi.h5           data set `data`, (N, N, N), the potential in units of c^2
RAW_DIR/seed0000/gr/gr_settings_used.ini        the settings of the run, lines `key = value`
RAW_DIR/seed0000/newton/...                     the twin: the same initial conditions, Newtonian
"""

import system
from system import UserError

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..cube_file import GRAVITIES
from .cosmology import Cosmology

THEORIES = {"newton": "Newton", "gr": "GR"}  # the names in the settings
# Settings that must be equal in all simulations of a file, where given.
COMMON = (
    "boxsize", "Ngrid", "initial redshift", "h", "omega_b", "Omega_b", "omega_cdm", "Omega_cdm", "A_s", "n_s",
    "k_pivot", "T_cmb", "N_ur", "m_ncdm",
)  # fmt: skip


@dataclass(frozen=True)
class Simulation:
    """One simulation: a seed under one gravity."""

    seed: int
    gravity: str
    folder: Path

    @property
    def settings_file(self) -> Path:
        """The settings, in the folder of the snapshots."""
        return self.folder / f"{self.gravity}_settings_used.ini"

    @cached_property
    def settings(self) -> dict[str, str]:
        """The settings as text. Raises UserError if the file is missing or has another gravity."""
        path = self.settings_file
        if not path.is_file():
            raise UserError(
                f"{path}: no such file. It contains redshifts and cosmology; copy it from the simulation."
            )
        settings = {}
        for line in path.read_text(errors="replace").splitlines():
            key, equals, value = line.partition("#")[0].partition("=")
            if equals:
                settings[key.strip()] = value.strip()
        theory = settings.get("gravity theory", THEORIES[self.gravity])
        if theory.lower() != THEORIES[self.gravity].lower():
            raise UserError(f"{path}: gravity theory = {theory}, but the folder is {self.gravity}. Move it.")
        return settings

    def snapshot(self, number: int) -> Path:
        """The file of the potential at one output time. Raises UserError if it does not exist."""
        path = self.folder / f"{self.gravity}_snap{number:03d}_phi.h5"
        if not path.is_file():
            found = sorted(other.name for other in self.folder.glob(f"{self.gravity}_snap*_phi.h5"))
            raise UserError(f"{path}: no such file. Snapshots in this folder: {', '.join(found) or 'none'}.")
        return path


def find_simulations(raw: Path) -> list[Simulation]:
    """All simulations in a folder, by seed, both twins of each. Raises UserError if one has no twin."""
    if not raw.is_dir():
        raise UserError(f"{raw}: not a folder. Give the folder that contains seed0000/gr/...")
    folders: dict[int, Path] = {}
    for folder in sorted(raw.iterdir()):
        if (match := re.fullmatch(r"seed(\d+)", folder.name)) and folder.is_dir():
            seed = int(match[1])
            if seed in folders:
                raise UserError(
                    f"{raw}: {folders[seed].name} and {folder.name} are the same seed. Rename one."
                )
            folders[seed] = folder
    if not folders:
        raise UserError(f"{raw}: no folders seed0000, seed0001, ... found. Give gevolution's output folder.")
    for gravity in GRAVITIES:
        missing = [seed for seed, folder in folders.items() if not (folder / gravity).is_dir()]
        if missing:
            raise UserError(
                f"{raw}: no folder {gravity} for seeds {system.format_ranges(missing)}. Add both twins."
            )
    return [Simulation(s, gravity, folders[s] / gravity) for s in sorted(folders) for gravity in GRAVITIES]


def common_settings(simulations: list[Simulation]) -> dict[str, str]:
    """The settings of the first simulation, if all agree in cosmology, and twins in the random seed.

    Raises UserError, which names the two files and the setting that differs.
    """
    first = simulations[0].settings
    seeds: dict[int, str | None] = {}
    for simulation in simulations:
        settings = simulation.settings
        for key in COMMON:
            if not _same(settings.get(key), first.get(key)):
                raise UserError(
                    f"{simulation.settings_file}: {key} = {settings.get(key)}, but {first.get(key)} in "
                    f"{simulations[0].settings_file}. Simulations packed together must agree."
                )
        if seeds.setdefault(simulation.seed, settings.get("seed")) != settings.get("seed"):
            raise UserError(
                f"{simulation.settings_file}: seed = {settings.get('seed')}, but its twin has "
                f"{seeds[simulation.seed]}. Twins start from the same initial conditions."
            )
    return first


def _same(a: str | None, b: str | None) -> bool:
    try:
        return a == b or (a is not None and b is not None and float(a) == float(b))
    except ValueError:
        return False


def snapshot_number(simulation: Simulation, redshift: float) -> int:
    """The number of the snapshot at a redshift. Raises UserError, which lists the redshifts in the file."""
    redshifts = snapshot_redshifts(simulation)
    for number, other in enumerate(redshifts):
        if math.isclose(other, redshift, rel_tol=1e-6, abs_tol=1e-6):
            return number
    listed = ", ".join(f"{z:g}" for z in redshifts)
    raise UserError(
        f"{simulation.settings_file}: no snapshot at redshift {redshift:g}; choose one of {listed}."
    )


def snapshot_redshifts(simulation: Simulation) -> list[float]:
    """Redshifts of snapshots 0, 1, ...: gevolution numbers them by time, not as the settings list them."""
    text = simulation.settings.get("snapshot redshifts", "")
    try:
        return sorted((float(part) for part in text.split(",")), reverse=True)
    except ValueError:
        raise UserError(
            f"{simulation.settings_file}: snapshot redshifts = {text or '(missing)'}; numbers are needed."
        ) from None


def numeric_setting(settings: dict[str, str], key: str) -> float:
    """A numeric setting. Raises UserError if it is missing or not a number."""
    text = settings.get(key, "(missing)")
    try:
        return float(text)
    except ValueError:
        raise UserError(f"gevolution's settings have {key} = {text}; a number is needed.") from None


def cosmology(settings: dict[str, str]) -> Cosmology:
    """The cosmology of a simulation. Densities may be given as omega = Omega h^2 or as Omega.

    Raises UserError for massive neutrinos, for which the growth of the potential depends on the scale.
    """
    if "m_ncdm" in settings:
        raise UserError(
            f"gevolution's settings have m_ncdm = {settings['m_ncdm']}: with massive neutrinos growth "
            "depends on scale. Use --redshift instead of --difference."
        )
    h = numeric_setting(settings, "h")
    omega = {
        kind: numeric_setting(settings, f"Omega_{kind}") * h**2
        if f"Omega_{kind}" in settings
        else numeric_setting(settings, f"omega_{kind}")
        for kind in ("b", "cdm")
    }
    optional = ("A_s", "n_s", "k_pivot", "T_cmb", "N_ur")
    given: dict[str, float] = {key: numeric_setting(settings, key) for key in optional if key in settings}
    return Cosmology(h=h, omega_b=omega["b"], omega_cdm=omega["cdm"], **given)
