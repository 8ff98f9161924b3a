"""Permutation tests by exchanging twins: does a network distinguish the gravities at all?

If logits do not depend on gravity, the labels of the two twins of a seed are exchangeable, whatever else the
twins share. A relabelling exchanges the labels within some of the seeds; the statistic is the slice AUC over
pairs of different seeds. The p-values are valid for any number of seeds and any distribution of logits, also
with randomly drawn relabellings, among which the identity is counted (Phipson & Smyth 2010, Stat. Appl.
Genet. Mol. Biol. 9, 39).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXACT_SEEDS = 12
DRAWS = 10_000


def relabellings(seeds: int) -> NDArray[np.bool_]:
    """Seeds whose twins are exchanged in each relabelling: (relabellings, seeds), the identity first.

    All 2^seeds up to EXACT_SEEDS seeds, otherwise the identity and DRAWS random ones, always the same.
    """
    if seeds <= EXACT_SEEDS:
        return (np.arange(2**seeds)[:, None] >> np.arange(seeds) & 1).astype(bool)
    drawn = np.random.default_rng(0).integers(0, 2, (DRAWS, seeds)).astype(bool)
    return np.concatenate([np.zeros((1, seeds), dtype=bool), drawn])


def relabelled_auc(wins: Floats, exchanged: NDArray[np.bool_]) -> Floats:
    """Slice AUC over pairs of different seeds under each relabelling: (relabellings,).

    `wins` (2 seeds, 2 seeds) comes from `analysis.statistics.mann_whitney`: under any relabelling, the AUC is
    a sum of its entries. `exchanged` is (relabellings, seeds).
    """
    seeds = len(wins) // 2
    if seeds > 1:
        wins = wins * np.tile(1 - np.eye(seeds), (2, 2))
    # Counts are multiples of 1/2, so that float64 sums are exact and equal areas compare equal.
    gr = np.concatenate([exchanged, ~exchanged], axis=1).astype(np.float64)
    newton = 1 - gr
    above, pairs = (np.einsum("rs,rs->r", gr @ counts, newton) for counts in (wins, wins + wins.T))
    return above / pairs


def max_p_values(trials: Sequence[Floats]) -> list[float]:
    """One-sided p-values of several trials on the same seeds, adjusted for the choice among them.

    Each trial is the result of `analysis.statistics.mann_whitney` for one network. Its p-value is the share
    of relabellings, the identity included, in which the largest statistic of all trials reaches its own
    (Westfall & Young 1993, Resampling-Based Multiple Testing). AUCs are standardised by their scatter over
    relabellings, so that all trials have the same weight. With one trial this is the ordinary p-value.
    """
    exchanged = relabellings(len(trials[0]) // 2)
    areas = np.stack([relabelled_auc(wins, exchanged) for wins in trials])
    excess, scatter = areas - 0.5, areas.std(axis=1, keepdims=True)
    standardised = np.divide(excess, scatter, out=np.zeros_like(excess), where=scatter > 0)
    largest = standardised.max(axis=0)
    return [float(np.mean(largest >= row[0])) for row in standardised]


def swap_p_value(wins: Floats) -> float:
    """One-sided p-value that slice AUC exceeds chance, by exchanging the labels of twins within seeds."""
    return max_p_values([wins])[0]
