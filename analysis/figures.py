"""Figures of predictions and trainings, legible in black and white at the width of a journal's column."""

from __future__ import annotations

import system

import io
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import statistics
from analysis.statistics import Estimate
from training.metrics import Floats, Integers, Predictions

WIDTH = 3.4  # inches: one column of a journal
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.handlelength": 3.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.w_pad": 0.08,  # inches, so that labels of one panel do not touch the next
    "figure.dpi": 110,
    "savefig.dpi": 300,
    "image.cmap": "gray",
    "pdf.fonttype": 42,  # text remains text in the PDF
    "svg.fonttype": "none",
}
# distinct in print: dark and light, with different lines and markers
NEWTON: dict[str, Any] = {"color": "#d08a26", "linestyle": "--", "marker": "o"}
GR: dict[str, Any] = {"color": "#16365c", "linestyle": "-", "marker": "s"}
GRAY = "0.55"
# Without dates, equal results give equal files.
NO_DATE: dict[str, dict[str, Any]] = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#16365c", "linestyle": "-", "marker": "s"},
    {"color": "#d08a26", "linestyle": "--", "marker": "o"},
    {"color": "0.45", "linestyle": "-.", "marker": "^"},
    {"color": "#7c3a6b", "linestyle": ":", "marker": "D"},
)

Figures = dict[str, Figure]
History = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl

COMPARED = {  # metrics by which networks are compared: key -> (label, chance level)
    "accuracy": ("accuracy of slices", 0.5),
    "auc": ("AUC of slices", 0.5),
    "cube_accuracy": ("accuracy of cubes", 0.5),
    "cube_auc": ("AUC of cubes", 0.5),
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with STYLE, without changing matplotlib's settings."""

    @wraps(draw)
    def inside(*arguments: Any, **options: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*arguments, **options)

    return inside


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG and PDF beside each other; `path` has no suffix."""
    with mpl.rc_context(STYLE):
        for kind, metadata in NO_DATE.items():
            memory = io.BytesIO()
            figure.savefig(memory, format=kind, metadata=metadata)
            system.write_atomically(path.with_name(f"{path.name}.{kind}"), memory.getvalue())
            figure.set_layout_engine("none")  # the layout of the first file serves the second


def subplots(
    width: float = WIDTH, height: float = 2.6, columns: int = 1, rows: int = 1, **options: Any
) -> Any:
    """A figure of `width` by `height` inches with its axes, laid out so that labels fit."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


@styled
def roc_and_precision(predictions: Predictions, estimates: Mapping[str, Estimate]) -> Figure:
    """ROC curve with its 95 % band over seeds, and precision-recall curve, of slices.

    `estimates`: `auc` and `average_precision`.
    """
    figure, (roc, pr) = subplots(2 * WIDTH, 2.9, columns=2)
    curves = statistics.curves(predictions, np.linspace(0, 1, 201))
    balance = float(predictions.label.mean())
    fpr, tpr = curves["fpr"], curves["tpr"]
    # At the ends the rate is 0 or 1 by definition, which a score interval takes for a count.
    inside = (tpr > 0) & (tpr < 1)
    roc.fill_between(
        fpr, curves["low"], curves["high"], where=inside, color="0.85", lw=0, label="95 % over seeds"
    )
    roc.plot(fpr, tpr, color=GR["color"], label=f"AUC = {estimates['auc']['value']:.3f}")
    roc.plot([0, 1], [0, 1], ":", color=GRAY, label="chance")
    roc.set(
        xlabel="false positive rate", ylabel="true positive rate", title="ROC, GR positive", aspect="equal"
    )
    roc.legend(loc="lower right")
    area = f"average precision = {estimates['average_precision']['value']:.3f}"
    pr.step(curves["recall"], curves["precision"], where="post", color=GR["color"], label=area)
    pr.axhline(balance, ls=":", color=GRAY, label=f"chance = {balance:.2f}")
    pr.set(xlabel="recall", ylabel="precision", title="Precision and recall", ylim=(0, 1.02), aspect="equal")
    pr.legend(loc="lower left")
    return figure


@styled
def confusion_matrix(counts: Mapping[str, int]) -> Figure:
    """Counts `tp`, `tn`, `fp`, `fn` as a two by two table, shaded by the share of the true gravity."""
    figure, axes = subplots(0.85 * WIDTH, 2.4)
    table = np.array([[counts["tn"], counts["fp"]], [counts["fn"], counts["tp"]]], dtype=float)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    for row in range(2):
        for column in range(2):
            color = "white" if shares[row, column] > 0.62 else "black"  # whichever has more contrast
            text = f"{int(table[row, column]):,}\n{100 * shares[row, column]:.1f} %"
            axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set(xticks=[0, 1], yticks=[0, 1], xlabel="predicted", ylabel="simulated with")
    axes.set_xticklabels(["Newton", "GR"])
    axes.set_yticklabels(["Newton", "GR"], rotation=90, va="center")
    axes.spines[:].set_visible(True)
    return figure


@styled
def twins_plot(seeds: Sequence[int] | Integers, newton: Floats, gr: Floats) -> Figure:
    """Mean logits of the cubes of each seed, twins joined by a line, ordered by the mean of both."""
    many = len(seeds) > 40
    figure, axes = subplots(WIDTH if len(seeds) <= 16 else 2 * WIDTH, 2.6)
    order = np.argsort((np.asarray(newton) + np.asarray(gr)) / 2)
    newton, gr, names = np.asarray(newton)[order], np.asarray(gr)[order], np.asarray(seeds)[order]
    place = np.arange(len(names))
    wrong = gr <= newton
    axes.vlines(place[~wrong], newton[~wrong], gr[~wrong], color=GRAY, lw=0.8)
    if wrong.any():
        axes.vlines(place[wrong], newton[wrong], gr[wrong], color="black", lw=2, label="GR below Newton")
    size = 2.5 if many else 4
    axes.plot(place, newton, "o", color=NEWTON["color"], mfc="white", ms=size, label="Newton")
    axes.plot(place, gr, "s", color=GR["color"], ms=size, label="GR")
    axes.axhline(0, ls=":", color=GRAY)
    axes.set(
        xlabel="seed" if not many else "seeds, by the mean of both twins",
        ylabel="mean logit of the slices",
        title=f"GR above its Newtonian twin: {int(np.sum(~wrong))} of {len(names)}",
    )
    axes.set_xticks([] if many else place, [] if many else [str(name) for name in names])
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def reliability_diagram(rows: Sequence[Mapping[str, float | None]], error: float) -> Figure:
    """Share of GR against predicted probability, in the range of the slices."""
    figure, axes = subplots()
    predicted = np.array([row["probability"] for row in rows], float)
    value, low, high = (np.array([row[key] for row in rows], float) for key in ("value", "low", "high"))
    bars = np.nan_to_num(np.stack([value - low, high - value])).clip(min=0)
    axes.errorbar(
        predicted,
        value,
        bars,
        color=GR["color"],
        marker="s",
        ms=3,
        capsize=2,
        label="network, 95 % over seeds",
    )
    ends = np.array([np.min([predicted, value - bars[0]]), np.max([predicted, value + bars[1]])]).clip(0, 1)
    ends += np.array([-0.05, 0.05]) * max(float(np.ptp(ends)), 0.02)
    axes.plot(ends, ends, ":", color=GRAY, label="perfectly calibrated")
    axes.set(xlabel="predicted probability of GR", ylabel="share of GR", xlim=ends, ylim=ends)
    axes.set_title(f"expected calibration error = {error:.3f}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def logit_histogram(newton: Floats, gr: Floats) -> Figure:
    """Distribution of the slices' logits for each gravity; the outermost bins hold what is beyond."""
    figure, axes = subplots()
    low, high = np.quantile(np.concatenate([newton, gr]), [0.001, 0.999])
    bins = np.linspace(low, high, 61) if high > low else np.linspace(low - 1, low + 1, 61)
    for logits, name, style in ((newton, "Newton", NEWTON), (gr, "GR", GR)):
        options = {"histtype": "step", "color": style["color"], "ls": style["linestyle"], "lw": 1.4}
        axes.hist(np.clip(logits, low, high), bins, label=name, **options)
    axes.axvline(0, ls=":", color=GRAY)
    axes.set(xlabel="logit (positive: GR)", ylabel="slices")
    axes.legend()
    return figure


@styled
def training_curves(lines: History) -> Figure:
    """Loss, accuracy and AUC of slices and metrics of simulations by epoch, from `metrics.jsonl`."""
    figure, (loss, share, whole) = subplots(2 * WIDTH, 3.0, columns=3)
    phases = {
        "train": {**NEWTON, "marker": ""},
        "validation": {"color": GRAY, "linestyle": "-.", "marker": "D"},
        "test": GR,
    }
    for phase, style in phases.items():
        chosen = [line for line in lines if line["phase"] == phase]
        if not chosen:
            continue
        epochs = [line["epoch"] for line in chosen]
        loss.plot(epochs, [line["loss"] for line in chosen], **style, label=phase)
        share.plot(epochs, [line["accuracy"] for line in chosen], **style, label=f"accuracy, {phase}")
    evaluated = [line for line in lines if line["phase"] in ("validation", "test")]
    phase = "validation" if any(line["phase"] == "validation" for line in evaluated) else "test"
    evaluated = [line for line in evaluated if line["phase"] == phase]
    epochs = [line["epoch"] for line in evaluated]
    dotted: dict[str, Any] = {"linestyle": ":", "marker": "^", "color": GRAY}
    share.plot(epochs, [line["auc"] for line in evaluated], **dotted, label=f"AUC, {phase}")
    whole.plot(epochs, [line["cube_accuracy"] for line in evaluated], **GR, label="cube accuracy")
    whole.plot(epochs, [line["pair_accuracy"] for line in evaluated], **dotted, label="pair accuracy")
    loss.axhline(np.log(2), ls=":", color=GRAY, label="chance, ln 2")
    loss.set(xlabel="epoch", ylabel="binary cross-entropy per slice [nat]")
    share.set(xlabel="epoch", ylabel="share of slices, or area")
    whole.set(xlabel="epoch", ylabel=f"share of {phase} simulations", ylim=(-0.02, 1.02))
    for axes in (loss, share, whole):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1))  # above, where there are no curves
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure


@styled
def intervals(rows: Mapping[str, Mapping[str, Estimate]], keys: Mapping[str, tuple[str, float]]) -> Figure:
    """Estimates with their intervals, one row each. `keys`: metric -> (its title, chance level).

    An estimate without interval is drawn as an open symbol.
    """
    figure, axes = subplots(2 * WIDTH, 0.9 + 0.28 * len(rows), columns=len(keys), sharey=True, squeeze=False)
    places = np.arange(len(rows))[::-1]
    for column, (key, (title, chance)) in zip(axes[0], keys.items(), strict=True):
        column.axvline(chance, ls=":", color=GRAY)
        for place, estimates in zip(places, rows.values(), strict=True):
            if (estimate := estimates.get(key)) is None:
                continue
            value, low, high = (np.array([estimate.get(end)], float) for end in ("value", "low", "high"))
            bounded = np.isfinite(low) & np.isfinite(high)
            error = np.stack([value - low, high - value]).clip(min=0) if bounded else None
            face = GR["color"] if bounded else "white"
            column.errorbar(value, place, xerr=error, color=GR["color"], mfc=face, marker="s", capsize=2)
        column.set(xlabel=title, ylim=(-0.6, len(rows) - 0.4))
        column.set_yticks(places, list(rows))
    return figure


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
        panel.set(ylabel=title, ylim=(0.45, 1.02) if "cube" in key else None)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("train_seeds, validation seeds included", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def evaluation_figures(predictions: Predictions) -> Figures:
    """The figures that a training logs after every evaluation."""
    return {
        "confusion": confusion_matrix(predictions.confusion),
        "twins": twins_plot(predictions.seeds, *predictions.cube_logits.T),
    }


def of_predictions(predictions: Predictions, results: Mapping[str, Any], history: History) -> Figures:
    """The figures of predictions, by name."""
    newton, gr = (predictions.logit[predictions.label == label] for label in (0, 1))
    error = results["slices"]["calibration_error"]["value"]
    drawn = {
        "twins": twins_plot(predictions.seeds, *predictions.cube_logits.T),
        "roc": roc_and_precision(predictions, results["slices"]),
        "confusion": confusion_matrix(results["confusion"]),
        "reliability": reliability_diagram(results["reliability"], error),
        "logits": logit_histogram(newton, gr),
    }
    return drawn | ({"training": training_curves(history)} if history else {})
