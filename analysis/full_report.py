"""The sections of the full report: attribution, spectra, lattice diagnostics, baselines and ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import attribution, information, interventions, statistics
from analysis.ceilings import Ceiling
from analysis.interventions import Bands
from analysis.lattice import Lattice
from analysis.simulation_spectra import Partitions, SimulationSpectra
from training.metrics import Predictions

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measurements:
    """What the full report is computed from."""

    bands: Bands
    changed: Predictions
    """The slices that interventions changed, with their logits unchanged."""
    table: Floats
    """(slices, columns) of `interventions.measure`."""
    partitions: Partitions
    test: SimulationSpectra
    train: SimulationSpectra | None
    """None if the training's file is missing."""
    limits: Mapping[str, Ceiling]
    same_file: bool
    """Whether training and evaluation use different seeds of one file."""
    newton_augmentation: float


def analyse(predictions: Predictions, measured: Measurements) -> dict[str, Any]:
    """The sections of the full report by their keys in report.json."""
    bands, box, changed = measured.bands, measured.partitions.box, measured.changed
    places = interventions.columns(bands)
    unchanged = measured.table[:, places["none"]][:, 0]
    grid = lattice_of(measured)
    scan = interventions.summarize(changed, measured.table, bands, box)
    scan["shares"] = attribution.shares(changed, unchanged, measured.table[:, places["exchange"]])[:-1]
    results = {
        "interventions": scan,
        "attribution": attribution.attribute(changed, unchanged, measured.table[:, places["groups"]]),
        "power_spectra": power_spectra(measured.partitions, measured.test),
        "grid": grid.report(),
        "direction_dependence": grid.direction_dependence(
            np.array([share["value"] for share in scan["shares"]]), np.array(bands.edges)
        ),
    }
    if measured.train is not None:
        results["baselines"] = information.compare_baselines(
            predictions, measured.partitions, measured.train, measured.test
        )
        results["ceilings"] = information.compare_ceilings(predictions, measured.limits, measured.test)
    return results


def lattice_of(measured: Measurements) -> Lattice:
    """Lattice diagnostics of the cubes, without `newton_augmentation`.

    They include the seeds of the training if these come from the same file.
    """
    factor = np.array([measured.newton_augmentation, 1.0])
    parts = [measured.test]
    if measured.same_file and measured.train is not None:
        parts.append(measured.train)
    power, plane_power = (
        np.concatenate([part.cubes[name] for part in parts]) for name in ("directional", "planes")
    )
    return Lattice(
        measured.partitions.cubes["directional"],
        power / factor[:, None] ** 2,
        measured.partitions.cubes["planes"],
        plane_power,
        np.concatenate([part.cube_means for part in parts]) / factor,
    )


def power_spectra(partitions: Partitions, spectra: SimulationSpectra) -> dict[str, Any]:
    """Mean P(k) of slices by gravity and shell, and the ratio of GR to Newton of slices and of cubes."""

    def ratio(power: Floats) -> list[statistics.Estimate]:
        return [
            statistics.ratio_estimate(shell[:, 1], shell[:, 0], "positive")
            for shell in power.T.swapaxes(1, 2)
        ]

    slices = spectra.slice_means["isotropic"]
    newton, gr = slices.mean(0)
    return {
        "k": partitions.slices["isotropic"].n * partitions.box.fundamental,
        "newton": newton,
        "gr": gr,
        "ratio": ratio(slices),
        "cube_ratio": ratio(spectra.cubes["isotropic"]),
    }
