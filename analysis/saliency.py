"""Which pixels a logit depends on: gradients and integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from training.metrics import Predictions

Network = Callable[..., Tensor]
MAPS = ("image", "gradient", "integrated")


class Batch(Protocol):
    """Slices with their sample ids."""

    @property
    def ids(self) -> Tensor:
        """Sample ids (b,), on the host."""

    @property
    def axes(self) -> Tensor:
        """Axes perpendicular to the slices (b,), on the host."""

    @property
    def images(self) -> Tensor:
        """Slices (b, C, N, N), on the device."""


def gradient(network: Network, slices: Tensor) -> Tensor:
    """d logit / d pixel for slices (b, C, N, N) (Simonyan, Vedaldi & Zisserman 2014, arXiv:1312.6034)."""
    slices = slices.detach().clone().requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(network(slices).float().sum(), slices)
    return slopes


def integrated_gradients(network: Network, slices: Tensor, steps: int = 64) -> Tensor:
    """Each pixel's share in the logit of slices (b, C, N, N), relative to a field without structure.

    The gradient is averaged over the straight path from 0, the mean field, to the slice, by the midpoint
    rule, and multiplied by the slice. The shares add up to logit(slice) - logit(0) (Sundararajan, Taly & Yan
    2017, arXiv:1703.01365).
    """
    total = torch.zeros_like(slices)
    for step in range(steps):
        total += gradient(network, slices * ((step + 0.5) / steps))
    return slices * total / steps


def maps(network: Network, slices: Tensor) -> dict[str, Any]:
    """One slice (1, C, N, N) with its maps, each (N, N) for its first channel."""
    parts = slices, gradient(network, slices), integrated_gradients(network, slices)
    return dict(zip(MAPS, (part[0, 0].cpu().numpy() for part in parts), strict=True))


def saliency_of_extremes(
    network: Network, predictions: Predictions, slices_of: Callable[[int], Iterable[Batch]]
) -> list[dict[str, Any]]:
    """The slices with the highest, lowest and two smallest absolute logits, and their saliency maps.

    `slices_of` gives all slices of a seed.
    """
    by_magnitude = np.argsort(np.abs(predictions.logit), kind="stable")
    shown = {
        "most certain of GR": np.argmax(predictions.logit),
        "most certain of Newton": np.argmin(predictions.logit),
        "least certain": by_magnitude[0],
        "second least certain": by_magnitude[1],
    }
    rows = []
    for what, index in shown.items():
        about = {key: int(getattr(predictions, key)[index]) for key in ("id", "seed", "axis", "position")}
        image = next(
            batch.images[batch.ids == about["id"]]
            for batch in slices_of(about["seed"])
            if about["id"] in batch.ids
        )
        logit, gravity = float(predictions.logit[index]), "GR" if predictions.label[index] else "Newton"
        of_slice = maps(partial(network, axes=about["axis"]), image)
        rows.append({"what": what, "gravity": gravity, "logit": logit} | about | of_slice)
    return rows
