"""Figures for a paper: readable in black and white, with units; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.spectra import Box
from analysis.style import GR, GREY, LINES, NEWTON, WIDTH, styled, subplots

if TYPE_CHECKING:  # scikit-learn is needed by the numbers, not by their figures
    from metrics import Predictions

Floats = NDArray[np.float64]
Estimate = Mapping[str, float | None]  # value, low, high: the value and the ends of its 95 % interval

Style = Mapping[str, Any]
Figures = dict[str, Figure]
History = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl

# axis that a slice is across -> what its columns and its rows count, as datasets.cutting cuts it
DIRECTIONS = (("z", "y"), ("z", "x"), ("y", "x"))
CONTEST = {  # what contestants are compared by: key -> (label, chance)
    "accuracy": ("accuracy of slices", 0.5),
    "auc": ("AUC of slices", 0.5),
    "cube_accuracy": ("accuracy of cubes", 0.5),
    "pair_accuracy": ("pairs ranked correctly", 0.5),
}


@styled
def roc_and_precision(curves: Mapping[str, Any]) -> Figure:
    """ROC and precision-recall curve of slices, with the 95 % band of the ROC curve from resampled seeds.

    `curves`: `fpr`, `tpr`, `auc`, `precision`, `recall`, `average_precision`, `grid`, `low`, `high`, `share`.
    """
    figure, (roc, pr) = subplots(2 * WIDTH, 2.9, columns=2)
    band = "95 % of resampled seeds"
    roc.fill_between(curves["grid"], curves["low"], curves["high"], color="0.85", lw=0, label=band)
    roc.plot(curves["fpr"], curves["tpr"], color=GR["color"], label=f"AUC = {curves['auc']:.3f}")
    roc.plot([0, 1], [0, 1], ":", color=GREY, label="chance")
    roc.set(
        xlabel="false positive rate", ylabel="true positive rate", title="ROC, GR positive", aspect="equal"
    )
    roc.legend(loc="lower right")
    area = f"average precision = {curves['average_precision']:.3f}"
    pr.step(curves["recall"], curves["precision"], where="post", color=GR["color"], label=area)
    pr.axhline(curves["share"], ls=":", color=GREY, label=f"chance = {curves['share']:.2f}")
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
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{int(table[row, column]):,}\n{100 * shares[row, column]:.1f} %"
            axes.text(column, row, text, ha="center", va="center", color=colour)
    axes.set(xticks=[0, 1], yticks=[0, 1], xlabel="the network says", ylabel="simulated with")
    axes.set_xticklabels(["Newton", "GR"])
    axes.set_yticklabels(["Newton", "GR"], rotation=90, va="center")
    axes.spines[:].set_visible(True)
    return figure


@styled
def twins_plot(seeds: Sequence[int] | NDArray[np.int64], newton: Floats, gr: Floats) -> Figure:
    """Mean logits of the cubes of each seed, twins joined by a line; ordered by the mean of both."""
    many = len(seeds) > 40
    figure, axes = subplots(WIDTH if len(seeds) <= 16 else 2 * WIDTH, 2.6)
    order = np.argsort((np.asarray(newton) + np.asarray(gr)) / 2)
    newton, gr, names = np.asarray(newton)[order], np.asarray(gr)[order], np.asarray(seeds)[order]
    place = np.arange(len(names))
    wrong = gr <= newton
    axes.vlines(place[~wrong], newton[~wrong], gr[~wrong], color=GREY, lw=0.8)
    if wrong.any():
        axes.vlines(place[wrong], newton[wrong], gr[wrong], color="black", lw=2, label="ranked wrongly")
    size = 2.5 if many else 4
    axes.plot(place, newton, "o", color=NEWTON["color"], mfc="white", ms=size, label="Newton")
    axes.plot(place, gr, "s", color=GR["color"], ms=size, label="GR")
    axes.axhline(0, ls=":", color=GREY)
    right = int(np.sum(~wrong))
    axes.set(
        xlabel="seed" if not many else "seeds, by the mean of both twins",
        ylabel="mean logit of the slices",
        title=f"GR above its Newtonian twin: {right} of {len(names)}",
    )
    axes.set_xticks([] if many else place, [] if many else [str(name) for name in names])
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def reliability_diagram(rows: Sequence[Mapping[str, float]], error: float) -> Figure:
    """Share of GR against stated probability, on the part of the square where the slices are."""
    figure, axes = subplots()
    stated = np.array([row["probability"] for row in rows])
    value, low, high = (np.array([row[key] for row in rows]) for key in ("value", "low", "high"))
    bars = np.nan_to_num(np.stack([value - low, high - value])).clip(min=0)
    axes.errorbar(
        stated, value, bars, color=GR["color"], marker="s", ms=3, capsize=2, label="network, 95 % over seeds"
    )
    ends = np.array([np.min([stated, value - bars[0]]), np.max([stated, value + bars[1]])]).clip(0, 1)
    ends += np.array([-0.05, 0.05]) * max(float(np.ptp(ends)), 0.02)
    axes.plot(ends, ends, ":", color=GREY, label="perfectly calibrated")
    axes.set(xlabel="stated probability of GR", ylabel="share of GR", xlim=ends, ylim=ends)
    axes.set_title(f"expected calibration error = {error:.3f}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def logit_histogram(newton: Floats, gr: Floats) -> Figure:
    """Distribution of the slices' logits for each gravity; the outermost bins hold what lies beyond."""
    figure, axes = subplots()
    low, high = np.quantile(np.concatenate([newton, gr]), [0.001, 0.999])
    bins = np.linspace(low, high, 61) if high > low else np.linspace(low - 1, low + 1, 61)
    for logits, name, style in ((newton, "Newton", NEWTON), (gr, "GR", GR)):
        options = {"histtype": "step", "color": style["color"], "ls": style["linestyle"], "lw": 1.4}
        axes.hist(np.clip(logits, low, high), bins, label=name, **options)
    axes.axvline(0, ls=":", color=GREY)
    axes.set(xlabel="logit (positive: GR)", ylabel="slices")
    axes.legend()
    return figure


@styled
def training_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """By epoch, from the lines of `metrics.jsonl`: loss, accuracy and AUC of slices; simulations."""
    figure, (loss, share, whole) = subplots(2 * WIDTH, 2.6, columns=3)
    phases = (("train", {**NEWTON, "marker": ""}), ("test", {**GR, "marker": "s"}))
    for phase, style in phases:
        chosen = [line for line in lines if line["phase"] == phase]
        epochs = [line["epoch"] for line in chosen]
        loss.plot(epochs, [line["loss"] for line in chosen], **style, label=phase)
        share.plot(epochs, [line["accuracy"] for line in chosen], **style, label=f"accuracy, {phase}")
    tests = [line for line in lines if line["phase"] == "test"]
    epochs = [line["epoch"] for line in tests]
    share.plot(epochs, [line["auc"] for line in tests], ":", marker="^", color=GREY, label="AUC, test")
    whole.plot(epochs, [line["cube_accuracy"] for line in tests], **GR, label="cubes on the right side")
    whole.plot(
        epochs, [line["pair_accuracy"] for line in tests], ":", marker="^", color=GREY, label="pairs ranked"
    )
    loss.axhline(np.log(2), ls=":", color=GREY, label="chance, ln 2")
    loss.set(xlabel="epoch", ylabel="binary cross-entropy per slice [nat]")
    share.set(xlabel="epoch", ylabel="of slices")
    whole.set(xlabel="epoch", ylabel="of test simulations", ylim=(-0.02, 1.02))
    for axes, place in ((loss, "best"), (share, "best"), (whole, "center right")):
        axes.legend(loc=place)
    return figure


@styled
def saliency_maps(rows: Sequence[Mapping[str, Any]], box: Box) -> Figure:
    """Predictions beside their saliency. Rows: those of `saliency.maps` with the slices' names."""
    figure, axes = subplots(
        2 * WIDTH, 1.75 * len(rows), columns=3, rows=len(rows), squeeze=False, sharex=True, sharey=True
    )
    figure.set_layout_engine("compressed")  # the one for images, which keep their shape
    side = box.length or box.size
    unit = "Mpc/h" if box.length else "cells"
    maps = {"image": "field [std. dev.]", "gradient": "d logit / d pixel", "integrated": "share in logit"}
    for line, row in zip(axes, rows, strict=True):
        for place, (key, label) in zip(line, maps.items(), strict=True):
            limit = 3.0 if key == "image" else float(np.quantile(np.abs(row[key]), 0.995)) or 1.0
            # grey throughout, so that the sign survives print: black is negative, white positive
            extent = (0, side, 0, side)
            picture = place.imshow(row[key], vmin=-limit, vmax=limit, extent=extent, origin="lower")
            figure.colorbar(picture, ax=place, label=label)
        where = f"{row['gravity']}, seed {row['seed']}, axis {row['axis']}, slice {row['position']}"
        line[0].set_title(f"{row['what']}\nlogit {row['logit']:.3g}, {where}", loc="left", fontsize=7)
        across, up = DIRECTIONS[row["axis"]]
        line[0].set_ylabel(f"{up} [{unit}]")
        for place in line:
            place.set_xlabel(f"{across} [{unit}]")
    axes[0, 1].set_title("gradient")
    axes[0, 2].set_title("integrated gradients")
    return figure


def _wavenumber_axis(axes: Axes, box: Box) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("k [h/Mpc]" if box.length else "k [waves per box]")
    axes.set_xlim(box.fundamental * 0.4, box.fundamental * box.size / 2 * 1.2)


def _scale_lines(axes: Axes, k: Floats, estimates: Sequence[Estimate], label: str, style: Style) -> None:
    """A number by wavenumber, with its 95 % interval as a shade."""
    value, low, high = (np.array([one[end] for one in estimates], float) for end in ("value", "low", "high"))
    axes.fill_between(k, low, high, color=style["color"], alpha=0.15, lw=0)
    axes.plot(k, value, **style, label=label)


@styled
def scales(measured: Mapping[str, Any], box: Box) -> Figure:
    """What filters and exchanged bands do to the network's verdicts, by wavenumber.

    `measured`: `cuts`, `centres`, and for each intervention and `none` the estimates `accuracy`, `auc`,
    `pair_accuracy`, as `scales.by_wavenumber` gives them.
    """
    figure, axes = subplots(2 * WIDTH, 4.2, rows=2, columns=3, sharey="row", sharex=True)
    titles = {
        "low_pass": "only k below",
        "high_pass": "only k above",
        "exchange": "band exchanged between twins",
    }
    lines = (("accuracy", "accuracy", 0), ("auc", "AUC", 0), ("pair_accuracy", "pairs ranked correctly", 1))
    for column, (kind, title) in zip(axes.T, titles.items(), strict=True):
        k = np.array(measured["centres"] if kind == "exchange" else measured["cuts"])
        for (key, label, row), style in zip(lines, LINES, strict=False):
            estimates = measured[kind][key]
            if kind == "exchange":  # the first band is the mean of the slice, which has no k
                column[row].plot(0.5 * box.fundamental, estimates[0]["value"], **style, mfc="white")
                estimates = estimates[1:]
            _scale_lines(column[row], k, estimates, label, style)
            whole = measured["none"][key]["value"]
            column[row].axhline(whole, color=style["color"], ls=(0, (1, 3)), lw=0.8)
        column[0].set_title(title)
        _wavenumber_axis(column[1], box)
    for place in axes[:, 2]:
        place.annotate(
            "mean",
            (0.5 * box.fundamental, 0.03),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="center",
        )
    axes[0, 0].set_ylabel("share, or area under the curve")
    axes[1, 0].set(ylabel="share of pairs", ylim=(-0.05, 1.05))
    handles = [line for place in axes[:, 0] for line in place.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@styled
def power_spectra(spectra: Mapping[str, Any], box: Box) -> Figure:
    """Power spectra of both gravities, their ratio over twins, and that of the saliency.

    `spectra`: `k`, `newton` and `gr` (shells), `ratio`, `ratio_low`, `ratio_high`, `saliency`, all of slices;
    `cube_ratio` of cubes.
    """
    figure, (power, ratio, saliency) = subplots(2 * WIDTH, 2.8, columns=3)
    k = np.array(spectra["k"])
    power.loglog(k, spectra["newton"], **{**NEWTON, "marker": ""}, label="Newton")
    power.loglog(k, spectra["gr"], **{**GR, "marker": ""}, label="GR")
    power.set_ylabel("P(k) of slices [(Mpc/h)$^2$]" if box.length else "P(k) of slices")
    power.legend()
    ratio.fill_between(
        k, spectra["ratio_low"], spectra["ratio_high"], color="0.85", lw=0, label="95 % of slices' mean"
    )
    ratio.plot(k, spectra["ratio"], color=GR["color"], label="slices")
    ratio.plot(k, spectra["cube_ratio"], "--", color=NEWTON["color"], label="cubes")
    ratio.axhline(1, ls=":", color=GREY)
    ratio.set_ylabel("P(k) of GR / P(k) of Newton")
    ratio.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    saliency.loglog(k, spectra["saliency"], color=GR["color"])
    saliency.set_ylabel("share of the gradient's power")
    for place in (power, ratio, saliency):
        _wavenumber_axis(place, box)
    return figure


@styled
def intervals(rows: Mapping[str, Mapping[str, Estimate]], keys: Mapping[str, tuple[str, float]]) -> Figure:
    """Estimates of several contestants with their intervals. `keys`: number -> (its title, chance level)."""
    figure, axes = subplots(2 * WIDTH, 0.9 + 0.28 * len(rows), columns=len(keys), sharey=True, squeeze=False)
    places = np.arange(len(rows))[::-1]
    for column, (key, (title, chance)) in zip(axes[0], keys.items(), strict=True):
        column.axvline(chance, ls=":", color=GREY)
        for place, estimates in zip(places, rows.values(), strict=True):
            if (estimate := estimates.get(key)) is None:
                continue
            value, low, high = (np.array([estimate[end]], float) for end in ("value", "low", "high"))
            known = np.isfinite(low) & np.isfinite(high)  # not with one seed
            error = np.stack([value - low, high - value]).clip(min=0) if known else None
            column.errorbar(value, place, xerr=error, color=GR["color"], marker="s", capsize=2)
        column.set(xlabel=title, ylim=(-0.6, len(rows) - 0.4))
        column.set_yticks(places, list(rows))
    return figure


def of_slices(
    slices: Predictions, curves: Mapping[str, Any], numbers: Mapping[str, Any], history: History
) -> Figures:
    """The figures of what the network said of slices, by name."""
    newton, gr = (slices.logit[slices.label == label] for label in (0, 1))
    error = numbers["slices"]["calibration_error"]["value"]
    drawn = {
        "twins": twins_plot(slices.seeds, *slices.cube_logits.T),
        "roc": roc_and_precision(curves),
        "confusion": confusion_matrix(numbers["confusion"]),
        "reliability": reliability_diagram(numbers["reliability"], error),
        "logits": logit_histogram(newton, gr),
    }
    return drawn | ({"training": training_curves(history)} if history else {})


def of_scales(numbers: Mapping[str, Any], box: Box) -> Figures:
    """The figures of scales, saliency and yardstick, by name."""
    drawn = {
        "scales": scales(numbers["scales"], box),
        "spectra": power_spectra(numbers["spectra"], box),
        "saliency": saliency_maps(numbers["extremes"], box),
    }
    if "yardstick" in numbers:
        found = numbers["yardstick"]
        rows = {
            "network": {**numbers["slices"], **numbers["cubes"]},
            "P(k) of slices": {**found["slices"], **found["slices_by_cube"]},
            "P(k) of cubes": found["cubes"],
        }
        drawn["yardstick"] = intervals(rows, CONTEST)
    return drawn
