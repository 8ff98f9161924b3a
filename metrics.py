"""What is measured: logits and labels -> numbers that are the same on any number of processes.

Nothing is averaged over batches or processes. A phase keeps its logits on the device; at its end they are
gathered, put in the order of sample ids and measured once, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Diverged(ValueError):
    """A network whose output is not finite."""


class Predictions:
    """The logits of one phase by sample id, kept on the device until they are asked for."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._looked_at = 0
        self._earlier = (torch.empty(0, dtype=torch.int64), torch.empty(0))

    def add(self, ids: Tensor, logits: Tensor, weights: Tensor) -> None:
        """Keep the logits (rows,) of this process's part of a batch; those of weight 0 count for nothing.

        Does not wait for the device.
        """
        self._batches.append((ids, logits.detach().clone(), weights))

    def gather(self) -> tuple[Tensor, Tensor]:
        """Sample ids (ascending, each once) and logits of all processes so far, on the host. Collective."""
        ids, logits = self._earlier
        if self._batches:
            columns = [torch.cat(column) for column in zip(*self._batches, strict=True)]
            columns = [
                self._accelerator.gather(column.to(self._accelerator.device)).cpu() for column in columns
            ]
            real = columns[2] > 0
            ids, logits = torch.cat([ids, columns[0][real]]), torch.cat([logits, columns[1][real].float()])
        order = ids.argsort()
        return ids[order], logits[order]

    def restore(self, ids: Tensor, logits: Tensor) -> None:
        """Start from what `gather` returned earlier, on any number of processes."""
        self._earlier = (ids, logits)

    def require_finite(self, step: int, *, test: bool = False) -> None:
        """Raise Diverged if a logit added since the last look, by any process, is not finite. Collective.

        `step` is the number of optimizer steps taken; in training the last batch added is that step's.
        """
        recent = self._batches[self._looked_at :]
        self._looked_at = len(self._batches)
        if not recent:
            return
        finite = torch.isfinite(
            self._accelerator.gather(torch.stack([logits for _, logits, _ in recent])[None])
        )
        finite = finite.transpose(0, 1).flatten(1).cpu()  # (batches, rows of all processes)
        if not finite.all():
            first = int((~finite).any(1).nonzero()[0])
            ids = self._accelerator.gather(recent[first][0].to(self._accelerator.device)).cpu()
            where = f"test after step {step}" if test else f"step {step - len(recent) + 1 + first}"
            raise Diverged(
                f"{where}: the network's output is not finite for sample ids "
                f"{ids[~finite[first]].tolist()}\nwhat was saved before is kept; allowed: a smaller "
                "train_params.lr, or train_params.gradient_clipping"
            )


@dataclass(frozen=True)
class Outcome:
    """What a network said of slices: logits, labels (1 = GR) and seeds, each (slices,)."""

    logits: Floats
    labels: NDArray[np.int64]
    seeds: NDArray[np.int64]
    label_smoothing: float = field(default=0.0)

    @cached_property
    def confusion(self) -> dict[str, int]:
        """Integer counts at the threshold logit > 0; GR is the positive class."""
        said, true = self.logits > 0, self.labels == 1
        return {
            "tp": int(np.sum(said & true)),
            "tn": int(np.sum(~said & ~true)),
            "fp": int(np.sum(said & ~true)),
            "fn": int(np.sum(~said & true)),
        }

    @cached_property
    def cubes(self) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
        """Of each cube: its seed, the mean logit of its slices, its label; ordered by seed, then label."""
        names, inverse = np.unique(self.seeds * 2 + self.labels, return_inverse=True)
        means = np.bincount(inverse, self.logits) / np.bincount(inverse)
        return names // 2, means, names % 2

    def numbers(self, *, simulations: bool = False) -> dict[str, float | int]:
        """Every metric by name; those per simulation only where `simulations` are seen whole."""
        functions = SLICE_METRICS | (SIMULATION_METRICS if simulations else {})
        measured: dict[str, float | int] = {name: function(self) for name, function in functions.items()}
        return measured | self.confusion | {"slices": len(self.logits)}

    def share(self, count: str, *others: str) -> float:
        """`count` over `count` and the others together; 0 where there is nothing to share."""
        total = self.confusion[count] + sum(self.confusion[other] for other in others)
        return self.confusion[count] / total if total else 0.0


def loss(outcome: Outcome) -> float:
    """Mean binary cross-entropy, in nats per slice."""
    smooth = outcome.label_smoothing
    target = outcome.labels * (1 - smooth) + smooth / 2
    return float(np.mean(np.logaddexp(0, outcome.logits) - target * outcome.logits))


def auc(outcome: Outcome) -> float:
    """Area under the ROC curve: the chance that a GR slice has a higher logit than a Newtonian one.

    The Mann-Whitney statistic with mid-ranks for ties (Hanley & McNeil 1982, Radiology 143, 29).
    """
    positive = outcome.labels == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return 0.5
    _, value, ties = np.unique(outcome.logits, return_inverse=True, return_counts=True)
    ranks = (ties.cumsum() - (ties - 1) / 2)[value]
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def cube_accuracy(outcome: Outcome) -> float:
    """Share of cubes on the right side of zero by the mean logit of their slices."""
    _, means, labels = outcome.cubes
    return float(np.mean((means > 0) == (labels == 1)))


def pair_accuracy(outcome: Outcome) -> float:
    """Share of seeds whose GR cube has a higher mean logit than its Newtonian twin."""
    seeds, means, labels = outcome.cubes
    newton, gr = means[labels == 0], means[labels == 1]
    assert np.array_equal(seeds[labels == 0], seeds[labels == 1]), "twins stay on the same side of a split"
    return float(np.mean(gr > newton))


SLICE_METRICS: dict[str, Callable[[Outcome], float]] = {
    "loss": loss,
    "accuracy": lambda o: (o.confusion["tp"] + o.confusion["tn"]) / len(o.logits),
    "precision": lambda o: o.share("tp", "fp"),
    "recall": lambda o: o.share("tp", "fn"),
    "f1": lambda o: (
        2 * o.confusion["tp"] / max(1, 2 * o.confusion["tp"] + o.confusion["fp"] + o.confusion["fn"])
    ),
    "tpr": lambda o: o.share("tp", "fn"),
    "fpr": lambda o: o.share("fp", "tn"),
    "auc": auc,
}
SIMULATION_METRICS: dict[str, Callable[[Outcome], float]] = {
    "cube_accuracy": cube_accuracy,
    "pair_accuracy": pair_accuracy,
}
