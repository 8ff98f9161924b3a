"""Predictions and metrics, identical on any number of ranks.

Nothing is averaged over batches or ranks. A phase keeps its logits on the device; at its end they are
gathered, ordered by sample id, and every metric is computed once, in float64.
"""

from __future__ import annotations

from system import UserError

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import datasets

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """Logits of slices and where each slice comes from; arrays (slices,), ordered by sample id."""

    id: Integers
    seed: Integers
    label: Integers
    """1 for General Relativity, 0 for Newtonian gravity."""
    axis: Integers
    position: Integers
    logit: Floats

    def __len__(self) -> int:
        return len(self.logit)

    @classmethod
    def from_ids(cls, ids: Integers, logits: Floats, size: int) -> Predictions:
        """The logits of sample ids, both (slices,), of cubes with `size` cells a side."""
        return cls(ids, *datasets.decode(ids, size), logits)

    def where(self, mask: NDArray[np.bool_]) -> Predictions:
        """The slices that `mask` (slices,) selects."""
        return Predictions(*(getattr(self, column.name)[mask] for column in fields(self)))

    def with_logits(self, logit: Floats) -> Predictions:
        """The same slices with other logits (slices,)."""
        return replace(self, logit=logit)

    @cached_property
    def probability(self) -> Floats:
        """Probability of General Relativity: the sigmoid of the logit."""
        return np.exp(-np.logaddexp(0, -self.logit))

    @cached_property
    def seeds(self) -> Integers:
        """The seeds, ascending, each once."""
        return np.unique(self.seed)

    @cached_property
    def seed_index(self) -> Integers:
        """Index of each slice's seed in `seeds`: (slices,)."""
        return np.searchsorted(self.seeds, self.seed)

    @cached_property
    def cube_logits(self) -> Floats:
        """Mean logit of the slices of each cube: (seeds, 2), Newtonian gravity first."""
        cube, cubes = 2 * self.seed_index + self.label, 2 * len(self.seeds)
        return (np.bincount(cube, self.logit, cubes) / np.bincount(cube, minlength=cubes)).reshape(-1, 2)

    @cached_property
    def wins(self) -> Floats:
        """Mann-Whitney counts between the slices of all cubes: (2 seeds, 2 seeds), Newtonian cubes first.

        Entry (a, b) counts the pairs of a slice of cube a and a slice of cube b in which the first has the
        higher logit; ties count one half.
        """
        cubes = 2 * len(self.seeds)
        order = np.argsort(self.logit, kind="stable")
        cube, logit = (self.label * len(self.seeds) + self.seed_index)[order], self.logit[order]
        first = np.flatnonzero(np.diff(logit, prepend=np.nan) != 0)  # of each run of equal logits
        length = np.diff(first, append=len(logit))
        wins = np.empty((cubes, cubes))
        for other in range(cubes):
            # Slices of `other` below each run, and half of those in it.
            up_to = np.append(0, np.cumsum(cube == other))
            below = (up_to[first] + up_to[first + length]) / 2
            wins[:, other] = np.bincount(cube, np.repeat(below, length), cubes)
        return wins

    @cached_property
    def confusion(self) -> dict[str, int]:
        """Counts at the threshold logit > 0; General Relativity is the positive class."""
        predicted, true = self.logit > 0, self.label == 1
        return {
            "tp": int(np.sum(predicted & true)),
            "tn": int(np.sum(~predicted & ~true)),
            "fp": int(np.sum(predicted & ~true)),
            "fn": int(np.sum(~predicted & true)),
        }


def compute(
    predictions: Predictions, *, simulations: bool = False, label_smoothing: float = 0.0
) -> dict[str, float | int]:
    """Every metric of a phase by name; with `simulations` also those of whole cubes."""
    functions = SLICE_METRICS | (SIMULATION_METRICS if simulations else {})
    values: dict[str, float | int] = {"loss": loss(predictions, label_smoothing)}
    values |= {name: function(predictions) for name, function in functions.items()}
    return values | predictions.confusion | {"slices": len(predictions)}


def loss(predictions: Predictions, label_smoothing: float = 0.0) -> float:
    """Mean binary cross-entropy, in nats per slice."""
    target = predictions.label * (1 - label_smoothing) + label_smoothing / 2
    return float(np.mean(np.logaddexp(0, predictions.logit) - target * predictions.logit))


def accuracy(predictions: Predictions) -> float:
    """Share of slices on the right side of logit 0."""
    counts = predictions.confusion
    return (counts["tp"] + counts["tn"]) / len(predictions)


def f1(predictions: Predictions) -> float:
    """Harmonic mean of precision and recall."""
    counts = predictions.confusion
    return 2 * counts["tp"] / max(1, 2 * counts["tp"] + counts["fp"] + counts["fn"])


def auc(predictions: Predictions) -> float:
    """Area under the ROC curve; 0.5 if only one gravity is present.

    The Mann-Whitney statistic with mid-ranks for ties (Hanley & McNeil 1982, Radiology 143, 29).
    """
    positive = predictions.label == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return 0.5
    _, value, ties = np.unique(predictions.logit, return_inverse=True, return_counts=True)
    ranks = (ties.cumsum() - (ties - 1) / 2)[value]
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def cube_accuracy(predictions: Predictions) -> float:
    """Share of cubes whose mean logit is on the right side of 0."""
    return float(np.mean((predictions.cube_logits > 0) == [False, True]))


def pair_accuracy(predictions: Predictions) -> float:
    """Share of seeds whose GR cube has a higher mean logit than its Newtonian twin."""
    newton, gr = predictions.cube_logits.T
    return float(np.mean(gr > newton))


def _share(count: str, other: str) -> Callable[[Predictions], float]:
    """`count` over `count` + `other` of the confusion matrix; 0 where both are 0."""

    def share(predictions: Predictions) -> float:
        total = predictions.confusion[count] + predictions.confusion[other]
        return predictions.confusion[count] / total if total else 0.0

    return share


# What metrics.jsonl holds of each phase, beside the loss. A new metric is a function and an entry.
SLICE_METRICS: dict[str, Callable[[Predictions], float]] = {
    "accuracy": accuracy,
    "precision": _share("tp", "fp"),
    "recall": _share("tp", "fn"),
    "f1": f1,
    "tpr": _share("tp", "fn"),
    "fpr": _share("fp", "tn"),
    "auc": auc,
}
SIMULATION_METRICS: dict[str, Callable[[Predictions], float]] = {
    "cube_accuracy": cube_accuracy,
    "pair_accuracy": pair_accuracy,
}


def gather_by_id(accelerator: Accelerator, ids: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Ids (n,), ascending, and the rows of `columns` (n, ...) from all ranks, on the host. Collective.

    Ranks may hold different numbers of rows. Rows with a negative id are dropped.
    """
    gathered = (ids, *columns)
    if accelerator.num_processes > 1:
        rows = [column.to(accelerator.device) for column in gathered]
        rows = [accelerator.pad_across_processes(column, pad_index=-1) for column in rows]
        gathered = tuple(accelerator.gather(column) for column in rows)
    gathered = tuple(column.cpu() for column in gathered)
    order = gathered[0].argsort()
    order = order[gathered[0][order] >= 0]
    return tuple(column[order] for column in gathered)


class PredictionBuffer:
    """Sample ids and logits of one phase, kept on the device until they are gathered."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Drop everything."""
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._checked = 0
        self._restored = (torch.empty(0, dtype=torch.int64), torch.empty(0))

    def add(self, ids: Tensor, logits: Tensor, mask: Tensor) -> None:
        """Keep the ids and logits (rows,) of this rank's part of a batch; rows with mask 0 do not count.

        Does not synchronize with the device.
        """
        self._batches.append((ids, logits.detach().clone(), mask))

    def gather(self) -> tuple[Tensor, Tensor]:
        """Sample ids, ascending, each once, and float32 logits of all ranks, on the host. Collective."""
        ids, logits = self._restored
        if self._batches:
            new_ids, new_logits, mask = (torch.cat(column) for column in zip(*self._batches, strict=True))
            new_ids = torch.where(mask > 0, new_ids.to(mask.device), -1)
            new_ids, new_logits = gather_by_id(self._accelerator, new_ids, new_logits)
            ids, logits = torch.cat([ids, new_ids]), torch.cat([logits, new_logits.float()])
        order = ids.argsort()
        return ids[order], logits[order]

    def restore(self, ids: Tensor, logits: Tensor) -> None:
        """Start from what `gather` returned earlier, on any number of ranks."""
        self.reset()
        self._restored = (ids, logits)

    def require_finite(self, step: int, *, phase: str = "train") -> None:
        """Raise UserError if a rank added a logit that is not finite since the last call.

        `step` is the number of optimizer steps taken; in training the last batch added is that step's.
        Collective.
        """
        recent = self._batches[self._checked :]
        self._checked = len(self._batches)
        if not recent:
            return
        finite = torch.isfinite(
            self._accelerator.gather(torch.stack([logits for _, logits, _ in recent])[None])
        )
        finite = finite.transpose(0, 1).flatten(1).cpu()  # (batches, rows of all ranks)
        if not finite.all():
            first = int((~finite).any(1).nonzero()[0])
            ids = self._accelerator.gather(recent[first][0].to(self._accelerator.device)).cpu()
            where = (
                f"{phase} after step {step}" if phase != "train" else f"step {step - len(recent) + 1 + first}"
            )
            raise UserError(
                f"{where}: the network's output is not finite for sample ids "
                f"{ids[~finite[first]].tolist()}.\n"
                "Earlier checkpoints are kept. Train again with a lower train_params.lr, under another "
                "model_params.name."
            )


class RunningMetrics:
    """Loss and accuracy within an epoch, over the slices of all ranks since the last reading.

    Their sums are kept on the device, so that only a reading waits for it.
    """

    def __init__(self, accelerator: Accelerator, sums: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """`sums`: the loss, correct predictions and slices since the last reading of a saved run."""
        self._accelerator = accelerator
        self._start_from(torch.tensor(sums, dtype=torch.float32, device=accelerator.device))

    def add(self, logits: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Add this rank's part (rows,) of a batch; rows with mask 0 do not count."""
        loss = binary_cross_entropy_with_logits(logits, labels, reduction="none")
        rows = torch.stack([loss, ((logits > 0) == (labels > 0)).float(), torch.ones_like(logits)])
        self._sums += torch.where(mask > 0, rows, 0).sum(1)

    def read(self) -> dict[str, float]:
        """The mean `loss` and `accuracy`; the next reading starts from here. Collective."""
        loss, correct, slices = self.sums()
        self._sums.zero_()
        return {"loss": loss / slices, "accuracy": correct / slices}

    def sums(self) -> list[float]:
        """The sums of all ranks, for a checkpoint. Collective."""
        # A resumed run starts from their sum, so this run must as well, to round in the same way.
        total = self._accelerator.reduce(self._sums)
        self._start_from(total)
        return total.tolist()

    def _start_from(self, total: Tensor) -> None:
        self._sums = total if self._accelerator.is_main_process else torch.zeros_like(total)
