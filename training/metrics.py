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

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CALIBRATION_BINS = 15


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


def average_precision(predictions: Predictions) -> float:
    """Mean precision over recall, without interpolation: sum of (R_i - R_(i-1)) P_i over thresholds."""
    thresholds, group = np.unique(predictions.logit, return_inverse=True)
    group = len(thresholds) - 1 - group  # descending
    true = np.bincount(group, predictions.label).cumsum()
    predicted = np.bincount(group).cumsum()
    return float(np.sum(np.diff(true, prepend=0) / max(1, true[-1]) * true / predicted))


def brier_score(predictions: Predictions) -> float:
    """Mean squared difference between probability and label."""
    return float(np.mean((predictions.probability - predictions.label) ** 2))


def calibration_error(predictions: Predictions) -> float:
    """Expected calibration error: mean |probability - share of GR| over bins of equal width.

    L1 over CALIBRATION_BINS bins (Guo et al. 2017, arXiv:1706.04599).
    """
    bins = np.minimum((predictions.probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    return float(
        np.abs(np.bincount(bins, predictions.probability - predictions.label)).sum() / len(predictions)
    )


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
        self._submitted = 0
        self._pending_check: HostCopy | None = None
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

    def check_finite_async(self, step: int) -> None:
        """Raise UserError if the previous call saw a logit that is not finite. Collective.

        Does not wait for the device: each call starts a copy to the host, and the next one reads it.
        """
        previous = self._pending_check
        recent = [logits for _, logits, _ in self._batches[self._submitted :]]
        self._submitted = len(self._batches)
        self._pending_check = HostCopy(
            self._accelerator.gather(torch.isfinite(torch.stack(recent)).all()[None])
        )
        if previous is not None and not previous.read().all():
            self.require_finite(step)

    def require_finite(self, step: int, *, phase: str = "train") -> None:
        """Raise UserError if a rank added a logit that is not finite since the last call.

        `step` is the number of optimizer steps taken; in training the last batch added is that step's.
        Collective.
        """
        recent = self._batches[self._checked :]
        self._checked = self._submitted = len(self._batches)
        self._pending_check = None
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
                "Earlier checkpoints are kept. Reduce train_params.lr, or set train_params.gradient_clipping."
            )


class HostCopy:
    """A copy of a tensor to the host that does not wait for the device until it is read."""

    def __init__(self, tensor: Tensor) -> None:
        asynchronous = tensor.device.type in ("cuda", "xpu")
        self._host = tensor.to("cpu", non_blocking=asynchronous)
        self._copied = None
        if asynchronous:
            backend = torch.get_device_module(tensor.device)
            # By default a host that waits for a CUDA event spins on a core.
            self._copied = backend.Event(blocking=True) if tensor.device.type == "cuda" else backend.Event()
            self._copied.record(backend.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


class RunningMetrics:
    """Loss and accuracy within an epoch, of this rank's slices since the previous reading.

    A reading does not wait for the device: `read` starts a copy to the host and returns the values of the
    reading before, whose copy has long arrived.
    """

    def __init__(self, sums: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """`sums`: loss, correct predictions and slices since the last reading of a saved run."""
        self._sums = list(sums)
        self._batches: list[Tensor] = []
        self._pending: tuple[int, HostCopy] | None = None

    def add(self, logits: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Add this rank's part (rows,) of a batch; rows with mask 0 do not count."""
        self._batches.append(torch.stack([logits, labels, mask]))

    def read(self, step: int) -> dict[str, float] | None:
        """Start the reading of `step`; returns the values of the previous one, if there is one."""
        previous = self.finish()
        self._pending = step, HostCopy(torch.stack(self._batches))
        self._batches = []
        return previous

    def finish(self) -> dict[str, float] | None:
        """The values of the last reading that was started: `step`, `loss`, `accuracy`; None without one."""
        if self._pending is None:
            return None
        (step, rows), self._pending = self._pending, None
        self._accumulate(rows.read())
        (loss, correct, count), self._sums = self._sums, [0.0, 0.0, 0.0]
        return {"step": step, "loss": loss / count, "accuracy": correct / count}

    def sums(self) -> list[float]:
        """What a checkpoint holds, after `finish`: the sums since the last reading."""
        if self._batches:
            self._accumulate(torch.stack(self._batches).cpu())
            self._batches = []
        return list(self._sums)

    def _accumulate(self, rows: Tensor) -> None:
        # Batch after batch, so that a resumed run rounds as an uninterrupted one does.
        for logits, labels, mask in rows.double().numpy():
            with np.errstate(invalid="ignore"):  # a network that diverged is reported by require_finite
                loss = np.logaddexp(0, logits) - labels * logits
            for index, values in enumerate((loss, (logits > 0) == (labels == 1), np.ones_like(loss))):
                self._sums[index] += float(np.sum(values[mask > 0]))
