"""The network compared with power spectra: baselines that learn from them, ceilings of Gaussian fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import ceilings, statistics, summary
from analysis.baselines import Baseline
from analysis.simulation_spectra import PER_SLICE, Partitions, SimulationSpectra
from training.metrics import Predictions

Floats = NDArray[np.float64]


def fit_ceilings(partitions: Partitions, train: SimulationSpectra) -> dict[str, ceilings.Ceiling]:
    """The Gaussian likelihood ratios with the spectra of the training twins."""
    return ceilings.fit(partitions.slices, partitions.cubes, train.slice_means, train.cubes)


def compare_baselines(
    network: Predictions, partitions: Partitions, train: SimulationSpectra, test: SimulationSpectra
) -> dict[str, Any]:
    """Logistic regressions on the spectra of slices and of cubes, `isotropic` and `directional`.

    They are fitted to `train` and applied to `test`, which holds the slices of `network` in the same order.
    Each has the metrics of `slices`, of cubes by the mean logit of their slices (`slices_by_cube`) and of
    `cubes` by their own spectra, and `gain`, what the network has over the baseline of slices.
    """
    size = partitions.box.size
    seeds, labels = train.id // (6 * size), train.id // (3 * size) % 2
    results = {}
    for name in PER_SLICE:
        of_slices = Baseline.fit(train.slices[name], partitions.slices[name].modes, labels, seeds)
        predictions = network.with_logits(of_slices.logits(test.slices[name]))
        cubes = train.cubes[name]
        of_cubes = Baseline.fit(
            cubes.reshape(-1, cubes.shape[2]),
            partitions.cubes[name].modes,
            np.tile([0, 1], len(cubes)),
            np.repeat(np.arange(len(cubes)), 2),
        )
        cube_logits = of_cubes.logits(test.cubes[name].reshape(-1, cubes.shape[2])).reshape(-1, 2)
        results[name] = {
            "strength": of_slices.strength,
            "cube_strength": of_cubes.strength,
            "slices": summary.slice_metrics(predictions),
            "slices_by_cube": summary.cube_metrics(predictions),
            "cubes": statistics.cube_estimates(cube_logits),
            "gain": summary.difference(network, predictions),
        }
    return results


def compare_ceilings(
    network: Predictions, limits: Mapping[str, ceilings.Ceiling], test: SimulationSpectra
) -> dict[str, Any]:
    """The expected performance of each Gaussian likelihood ratio, and its `test` on the slices and cubes of
    `test`.

    `gain` is what the network has over the likelihood ratio on the same slices. `attained`, only of the
    `directional` ceiling, is the network's share of the attainable d' of slices.
    """
    auc = statistics.auc_estimate(statistics.mann_whitney(*summary.arrays(network)))["value"]
    results: dict[str, dict[str, Any]] = {}
    for name, limit in limits.items():
        predictions = network.with_logits(test.likelihood_ratios[name])
        cubes = test.cubes[limit.cubes.partition]
        cube_logits = limit.cubes(cubes.reshape(-1, cubes.shape[2])).reshape(-1, 2)
        expected = limit.expected()
        results[name] = {
            **{key: {"value": value, "low": None, "high": None} for key, value in expected.items()},
            "test": {
                "slices": summary.headline(predictions),
                "cubes": statistics.cube_estimates(cube_logits),
            },
            "gain": summary.difference(network, predictions),
        }
    directional = results["directional"]
    directional["attained"] = ceilings.attained_share(auc, directional["slice_auc"]["value"])
    return results
