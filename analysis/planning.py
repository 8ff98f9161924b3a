"""What a set of simulations allows: the expected AUC, the test pairs that find it, and convergence.

A finding of the evaluation rests on two tests. Slices: exchanging the labels of twins, whose smallest p-value
with S seeds is 2^-S. The error of the slice AUC is some 0.006 / sqrt(S) (measured in gevolution slices near
the ceiling of linear theory), far less than most effects, so that 5 pairs, the fewest that reach p <= 0.05,
mostly suffice. Cubes: McNemar's test (1947, Psychometrika 12, 153) compares seeds with both twins right
and both wrong. Twins share their phases, hence nearly all scatter of the likelihood ratio: both are right if
the scatter is smaller than half their difference, with the probability 2 Phi(d'/2) - 1, and hardly ever both
wrong. Five such seeds reach p = 2^-5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binom, norm

from analysis.classifiers import LikelihoodRatio
from analysis.interventions import LARGE_SCALES
from analysis.lattice import DIRECTIONS, SMALL_SCALES, Lattice
from analysis.power_spectrum import symmetry_classes
from datasets.preparation.cosmology import linear_theory_ratio

FEWEST = 5  # seeds that reach p <= 0.05 by exchanging twins, 2^-5
SLICE_ERROR = 0.0062  # of the AUC of slices, times the root of the number of pairs
POWER = 0.8
QUANTILES = float(norm.ppf(0.95) + norm.ppf(POWER))


def pairs_for_slices(auc: float) -> float:
    """Test pairs with which an AUC of slices is found at p <= 0.05 with a probability of 80 %."""
    return float(max(FEWEST, np.ceil((QUANTILES * SLICE_ERROR / (auc - 0.5)) ** 2))) if auc > 0.5 else np.inf


def pairs_for_cubes(d_prime: float) -> float:
    """Test pairs with which McNemar's test finds d' of cubes at p <= 0.05 with a probability of 80 %."""
    right = 2 * norm.cdf(d_prime / 2) - 1
    if right < 1e-4:
        return np.inf
    pairs = np.arange(FEWEST, int(20 / right) + FEWEST)
    return float(pairs[binom.sf(FEWEST - 1, pairs, right) >= POWER][0])


def plan(lattice: Lattice) -> dict[str, dict[str, float]]:
    """Expected AUC of slices and cubes and the test pairs for them, by what is used.

    `all modes` up to n = N/2 by direction; `n <= 4`; and `linear theory`, where it applies.
    """
    bins, box = lattice.bins, lattice.bins.box
    newton, gr = lattice.power.mean(0)
    flat = symmetry_classes(box)
    spectra = {"all modes": gr, f"n <= {LARGE_SCALES}": gr}
    if box.linear_theory:
        spectra["linear theory"] = newton * linear_theory_ratio(bins.n * box.fundamental)
    rows: dict[str, dict[str, float]] = {}
    for name, power in spectra.items():
        slices = LikelihoodRatio.of("", flat, *bins.project(np.stack([newton, power]), flat))
        cubes = LikelihoodRatio.of("", bins, newton, power)
        if name.startswith("n <="):
            slices = slices.restrict(flat.n <= LARGE_SCALES)
            cubes = cubes.restrict(bins.n <= LARGE_SCALES + 0.5)
        expected, expected_cubes = slices.expected(), cubes.expected()
        rows[name] = {
            "slice_auc": expected["auc"],
            "slice_pairs": pairs_for_slices(expected["auc"]),
            "cube_auc": expected_cubes["auc"],
            "cube_pairs": pairs_for_cubes(expected_cubes["d_prime"]),
        }
    return rows


def compare_resolutions(one: Lattice, other: Lattice) -> dict[str, Any]:
    """Does P_GR/P_N beyond n = 4.5 follow n or n over the Nyquist wavenumber, in two cell sizes of one box?

    What gravity does is the same at the same n; what depends on the cell is numerical, isotropic or not.
    Returns `n` and `ratio` of `one` (shells,), that of `other` at the same n (`same_n`) and at the same
    n / (N/2) (`same_fraction`), NaN where it has no modes, and what the ratio `follows`: `n`, `cell`,
    `neither` or, where both differ from 1 by less than 0.05 %, `nothing`.
    """
    (n, ratio), (other_n, other_ratio) = ((la.isotropic[0], la.isotropic[1].mean(0)) for la in (one, other))
    scale = other.bins.box.size / one.bins.box.size
    same_n, same_fraction = (
        np.interp(at, other_n, other_ratio, left=np.nan, right=np.nan) for at in (n, n * scale)
    )
    used = (n > SMALL_SCALES) & np.isfinite(same_n) & np.isfinite(same_fraction)
    by_n, by_cell, size = (
        np.sqrt(np.mean(values[used] ** 2)) if used.any() else np.nan
        for values in (ratio - same_n, ratio - same_fraction, np.maximum(np.abs(ratio), np.abs(same_n)))
    )
    follows = "n" if by_n < by_cell / 2 else "cell" if by_cell < by_n / 2 else "neither"
    return {
        "n": n,
        "ratio": np.exp(ratio),
        "same_n": np.exp(same_n),
        "same_fraction": np.exp(same_fraction),
        "cells": [one.bins.box.size, other.bins.box.size],
        "follows": "nothing" if size < 5e-4 else follows,
    }


def describe(lattice: Lattice) -> str:
    """A table of P_GR/P_N by band of n and direction, the means of cubes, warnings, and the plan."""
    report, box = lattice.report(), lattice.bins.box
    edges, rows = report["ratio"]["edges"], zip(*report["ratio"]["value"], strict=True)
    head = (*DIRECTIONS, *(["  in linear theory"] if box.linear_theory else []))
    lines = ["P_GR/P_N by n     " + "".join(f"{name:>10}" for name in head)]
    for low, high, ratios in zip(edges, edges[1:], rows, strict=False):
        values = list(ratios)
        if box.linear_theory:
            inside = (lattice.bins.n > low) & (lattice.bins.n <= high)
            theory = linear_theory_ratio(lattice.bins.n[inside] * box.fundamental)
            values.append(np.average(theory, weights=lattice.bins.modes[inside]))
        row_text = "".join(" " * 10 if np.isnan(value) else f"{value:10.4f}" for value in values)
        lines.append(f"  {low:5.1f} to {high:5.1f}  {row_text}")
    corners, means = report["corners"], report["cube_mean"]
    lines += [
        f"power beyond the Nyquist sphere  {corners['newton']:.3g} of newton, {corners['gr']:.3g} of gr",
        f"mean of a cube / std  {means['newton']:.3g} of newton, {means['gr']:.3g} of gr",
    ]
    lines += [f"warning: {line}" for line in report["warnings"]]
    lines.append("expected of the likelihood ratio on test seeds, and pairs that find it (p <= 0.05, 80 %):")
    for name, row in plan(lattice).items():
        cells = [
            f"{part}s AUC {row[f'{part}_auc']:.3f}, {row[f'{part}_pairs']:.0f} pairs"
            for part in ("slice", "cube")
        ]
        lines.append(f"  {name:14}  {'; '.join(cells)}")
    return "\n".join(lines)
