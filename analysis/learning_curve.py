"""The learning curve: metrics by the number of training seeds, validation seeds included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from analysis.style import GRAY, LINES, WIDTH, styled, subplots


@styled
def learning_curve(summary: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Figure:
    """One panel per metric: mean with the spread over folds, and the ensemble of trainings.

    `summary`: rows with `train_seeds` and `metrics` {key: {`mean`, `folds`, `ensemble`}}; `titles` names
    the keys.
    """
    figure, axes = subplots(2 * WIDTH, 2.4, columns=len(titles), squeeze=False)
    seeds = [row["train_seeds"] for row in summary]
    for panel, (key, title) in zip(axes[0], titles.items(), strict=True):
        values = [row["metrics"][key] for row in summary]
        errors = [value["folds"] or 0.0 for value in values]
        means, ensembles = ([value[name] for value in values] for name in ("mean", "ensemble"))
        panel.errorbar(seeds, means, errors, **LINES[0], capsize=2, label="mean, spread over folds")
        panel.plot(seeds, ensembles, **LINES[1], label="ensemble of trainings")
        panel.axhline(0.5, ls=":", color=GRAY)
        panel.set(
            xlabel="training and validation seeds", ylabel=title, ylim=(0.45, 1.02) if "cube" in key else None
        )
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
