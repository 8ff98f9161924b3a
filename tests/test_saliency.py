"""Gradients, integrated gradients, and the slices that are shown."""

import numpy as np
import pytest
import simulated_universe as universe
import torch

from analysis import saliency


class Quadratic(torch.nn.Module):
    """The weighted sum of squares of the pixels of the first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))

    def forward(self, slices: torch.Tensor, axes: object = None) -> torch.Tensor:
        """Slices (b, C, 8, 8) -> logits (b,)."""
        return (slices[:, 0].square() * self.weights).sum((1, 2)) + 1


def test_gradient_of_a_quadratic_network() -> None:
    network, slices = Quadratic(), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(saliency.gradient(network, slices)[:, 0], 2 * slices[:, 0] * network.weights)


def test_integrated_gradients_add_up() -> None:
    network, slices = Quadratic(), torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = saliency.maps(network, slices)
    expected = float((network(slices) - network(torch.zeros_like(slices))).sum())
    assert maps["integrated"].sum() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(maps["image"], slices[0, 0])


def test_the_slices_with_extreme_logits_are_shown() -> None:
    ids = np.arange(24) * universe.SIZE
    logits = np.linspace(-3, 3.1, 24)
    predictions = universe.label_predictions(ids, logits)

    def slices_of(seed: int) -> list[universe.Batch]:
        chosen = torch.from_numpy(ids[ids // (6 * universe.SIZE) == seed])
        return [universe.Batch(chosen, chosen.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).float())]

    rows = saliency.saliency_of_extremes(Quadratic(), predictions, slices_of)
    assert [row["what"] for row in rows] == [
        "most certain of GR",
        "most certain of Newton",
        "least certain",
        "second least certain",
    ]
    assert [row["logit"] for row in rows][:2] == [3.1, -3]
    for row in rows:
        index = int(np.flatnonzero(logits == row["logit"])[0])
        assert (row["image"] == ids[index]).all()
        assert row["seed"] == ids[index] // (6 * universe.SIZE)
