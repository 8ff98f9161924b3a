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
    """One slice (1, C, N, N) with its maps, each (N, N) for its first channel.

    `residual` is the sum of the integrated gradients minus logit(slice) + logit(0), the error of the
    integration.
    """
    shares = integrated_gradients(network, slices)
    with torch.no_grad():
        whole = network(slices).float() - network(torch.zeros_like(slices)).float()
    return {
        "image": slices[0, 0].cpu().numpy(),
        "gradient": gradient(network, slices)[0, 0].cpu().numpy(),
        "integrated": shares[0, 0].cpu().numpy(),
        "residual": float(shares.sum() - whole),
    }


def extremes(predictions: Predictions) -> dict[str, int]:
    """Index of the slices with the highest, the lowest and the two smallest absolute logits."""
    by_magnitude = np.argsort(np.abs(predictions.logit), kind="stable")
    return {
        "most certain of GR": int(np.argmax(predictions.logit)),
        "most certain of Newton": int(np.argmin(predictions.logit)),
        "least certain": int(by_magnitude[0]),
        "second least certain": int(by_magnitude[1]),
    }


def describe_slice(predictions: Predictions, index: int) -> dict[str, Any]:
    """Seed, gravity, axis, position and logit of one slice."""
    return {
        "seed": int(predictions.seed[index]),
        "gravity": "GR" if predictions.label[index] else "Newton",
        "axis": int(predictions.axis[index]),
        "position": int(predictions.position[index]),
        "logit": float(predictions.logit[index]),
    }


def find_slice(batches: Iterable[Batch], sample_id: int) -> Tensor:
    """The slice (1, C, N, N) with this sample id."""
    return next(batch.images[batch.ids == sample_id] for batch in batches if sample_id in batch.ids)


def saliency_of_extremes(
    network: Network, predictions: Predictions, slices_of: Callable[[int], Iterable[Batch]]
) -> list[dict[str, Any]]:
    """The slices with extreme logits and their saliency maps; `slices_of` gives all slices of a seed."""
    rows = []
    for what, index in extremes(predictions).items():
        about = describe_slice(predictions, index)
        image = find_slice(slices_of(about["seed"]), int(predictions.id[index]))
        rows.append({"what": what} | about | maps(partial(network, axes=about["axis"]), image))
    return rows
