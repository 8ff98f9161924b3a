"""Relabellings against recomputing, p-values against their distribution without a signal."""

import numpy as np
import pytest

from analysis import significance
from analysis.statistics import leave_one_out_auc, mann_whitney


def draw(rng: np.random.Generator, seeds: int, gap: float = 0.0, slices: int = 6) -> tuple[np.ndarray, ...]:
    """Labels, logits and seed index; twins share most of the scatter between cubes and between slices."""
    shared = rng.normal(0, 2, (seeds, 1, 1)) + rng.normal(0, 1, (seeds, 1, slices))
    own = rng.normal(0, 0.5, (seeds, 2, 1)) + rng.normal(0, 1, (seeds, 2, slices))
    logits = shared + own + gap * np.array([-0.5, 0.5])[:, None]
    label = np.broadcast_to(np.array([0, 1])[:, None], logits.shape)
    return label.ravel(), logits.ravel(), np.repeat(np.arange(seeds), 2 * slices)


def test_relabellings_are_all_of_them_up_to_twelve_seeds() -> None:
    for seeds in (1, 3, 12):
        found = significance.relabellings(seeds)
        assert len(np.unique(found, axis=0)) == len(found) == 2**seeds
        assert not found[0].any()


def test_more_seeds_are_drawn_and_the_identity_counted() -> None:
    found = significance.relabellings(13)
    assert found.shape == (10_001, 13)
    assert not found[0].any()
    assert found[1:].mean() == pytest.approx(0.5, abs=0.01)
    assert np.array_equal(found, significance.relabellings(13))


def test_relabelling_counts_equals_relabelling_slices() -> None:
    label, logit, seed_index = draw(np.random.default_rng(1), 4)
    logit = np.round(logit)  # with ties
    exchanged = significance.relabellings(4)
    found = significance.relabelled_auc(mann_whitney(label, logit, seed_index), exchanged)
    for area, some in zip(found, exchanged, strict=True):
        relabelled = np.where(some[seed_index], 1 - label, label)
        assert area == leave_one_out_auc(mann_whitney(relabelled, logit, seed_index))[0]


@pytest.mark.parametrize(("seeds", "smallest"), [(1, 1 / 2), (8, 1 / 2**8), (20, 1 / 10_001)])
def test_a_clear_signal_has_the_smallest_p_value(seeds: int, smallest: float) -> None:
    label, _, seed_index = draw(np.random.default_rng(2), seeds)
    logit = label.astype(np.float64)
    assert significance.swap_p_value(mann_whitney(label, logit, seed_index)) == smallest
    assert significance.swap_p_value(mann_whitney(label, -logit, seed_index)) == 1  # one-sided
    assert significance.swap_p_value(mann_whitney(label, 0 * logit, seed_index)) == 1


def test_drawn_relabellings_approximate_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    wins = mann_whitney(*draw(np.random.default_rng(3), 12, gap=0.3))
    exact = significance.swap_p_value(wins)
    monkeypatch.setattr(significance, "EXACT_SEEDS", 0)
    assert 0.01 < exact < 0.5
    assert significance.swap_p_value(wins) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("seeds", [7, 14])
def test_p_values_are_uniform_without_a_signal(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "DRAWS", 500)
    rng = np.random.default_rng(4)
    found = np.array([significance.swap_p_value(mann_whitney(*draw(rng, seeds))) for _ in range(600)])
    for level in (0.05, 0.25, 0.5, 0.75):
        # Three standard errors of a share of 600, plus the steps of the p-value.
        assert np.mean(found <= level) == pytest.approx(
            level, abs=3 * np.sqrt(level * (1 - level) / 600) + 0.01
        )


def test_the_maximum_of_equal_trials_is_the_trial() -> None:
    wins = mann_whitney(*draw(np.random.default_rng(5), 9, gap=0.3))
    assert significance.max_p_values([wins, wins]) == [significance.swap_p_value(wins)] * 2


def test_the_best_of_many_trials_is_adjusted() -> None:
    """Six networks without a signal on the same seeds: the best is significant in 5 % of simulations."""
    rng = np.random.default_rng(6)
    alone, adjusted = [], []
    for _ in range(200):
        label, logit, seed_index = draw(rng, 7)
        trials = [mann_whitney(label, logit + rng.normal(0, 3, len(logit)), seed_index) for _ in range(6)]
        single = [significance.swap_p_value(wins) for wins in trials]
        together = significance.max_p_values(trials)
        assert all(several >= one for one, several in zip(single, together, strict=True))
        alone.append(min(single) <= 0.05)
        adjusted.append(min(together) <= 0.05)
    assert np.mean(alone) > 0.12
    assert np.mean(adjusted) == pytest.approx(0.05, abs=0.04)


def test_trials_of_different_scatter_have_the_same_weight() -> None:
    """A trial whose AUC is uncertain must not drown the faint signal of one whose AUC is precise."""
    rng = np.random.default_rng(7)
    label, logit, seed_index = draw(rng, 10, slices=100)
    precise = 0.3 * label + rng.normal(0, 1, len(label))  # no scatter between cubes
    cubes = rng.normal(0, 5, (2, 10))
    trials = [mann_whitney(label, some, seed_index) for some in (precise, logit + cubes[label, seed_index])]
    spread = [significance.relabelled_auc(wins, significance.relabellings(10)).std() for wins in trials]
    assert spread[1] > 3 * spread[0]
    assert significance.max_p_values(trials)[0] < 0.01
