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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import statistics
from analysis.interventions import DIRECTED
from analysis.power_spectrum import Box
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
    "pdf.fonttype": 42,  # text remains text in the PDF
    "svg.fonttype": "none",
}
Style = dict[str, Any]
# One color per meaning, distinct to the color-blind; lines and markers tell them apart in gray.
NEWTON: Style = {"color": "#d08a26", "linestyle": "--", "marker": "o"}
GR: Style = {"color": "#16365c", "linestyle": "-", "marker": "s"}
PHASES: dict[str, Style] = {
    "train": {"color": "0.55", "linestyle": "--", "marker": ""},
    "validation": {"color": "#2a9d8f", "linestyle": "-.", "marker": "D"},
    "test": {"color": "#b5446e", "linestyle": "-", "marker": "s"},
}
LINES: tuple[Style, ...] = (
    {"color": "black", "linestyle": "-", "marker": "s"},
    {"color": "#7c3a6b", "linestyle": "--", "marker": "o"},
    {"color": "0.45", "linestyle": "-.", "marker": "^"},
)
NETWORK, RATIO, EXPECTED = LINES
GRAY, ENDS = "0.55", ("value", "low", "high")
# Without dates, equal results give equal files.
NO_DATE: dict[str, dict[str, Any]] = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
# axis perpendicular to a slice -> what its columns and its rows count
DIRECTIONS = (("z", "y"), ("z", "x"), ("y", "x"))

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


def _bars(estimates: Sequence[Mapping[str, Any]]) -> tuple[Floats, Floats]:
    """Values (n,) and error bars (2, n), NaN without an interval."""
    value, low, high = (np.array([row.get(end) for row in estimates], float) for end in ENDS)
    return value, np.stack([value - low, high - value]).clip(min=0)


def _line(axes: Axes, k: Floats, estimates: Sequence[Estimate], label: str, style: Style) -> None:
    """Estimates by wavenumber, with their 95 % intervals as a shade."""
    value, (below, above) = _bars(estimates)
    axes.fill_between(k, value - below, value + above, color=style["color"], alpha=0.15, lw=0)
    axes.plot(k, value, **style, label=label)


def _wavenumber_axis(axes: Axes, box: Box) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("k [h/Mpc]" if box.length else "k [fundamental modes]")
    axes.set_xlim(box.fundamental * 0.4, box.fundamental * box.size / 2 * 1.2)


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
    roc.plot(fpr, tpr, color="black", label=f"AUC = {estimates['auc']['value']:.3f}")
    roc.plot([0, 1], [0, 1], ":", color=GRAY, label="chance")
    roc.set(
        xlabel="false positive rate", ylabel="true positive rate", title="ROC, GR positive", aspect="equal"
    )
    roc.legend(loc="lower right")
    area = f"average precision = {estimates['average_precision']['value']:.3f}"
    pr.step(curves["recall"], curves["precision"], where="post", color="black", label=area)
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
    for (row, column), share in np.ndenumerate(shares):
        color = "white" if share > 0.62 else "black"  # whichever has more contrast
        text = f"{int(table[row, column]):,}\n{100 * share:.1f} %"
        axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set(xticks=[0, 1], yticks=[0, 1], xlabel="predicted", ylabel="simulated with")
    axes.set_xticklabels(["Newton", "GR"])
    axes.set_yticklabels(["Newton", "GR"], rotation=90, va="center")
    axes.spines[:].set_visible(True)
    return figure


@styled
def twins_plot(seeds: Sequence[int] | Integers, newton: Floats, gr: Floats) -> Figure:
    """Mean logits of the cubes of each seed, twins joined by a line, ordered by the mean of both."""
    figure, axes = subplots(WIDTH if len(seeds) <= 16 else 2 * WIDTH, 2.6)
    order = np.argsort(np.asarray(newton) + np.asarray(gr))
    newton, gr, names = np.asarray(newton)[order], np.asarray(gr)[order], np.asarray(seeds)[order]
    place, wrong, many = np.arange(len(names)), gr <= newton, len(seeds) > 40
    axes.vlines(place[~wrong], newton[~wrong], gr[~wrong], color=GRAY, lw=0.8)
    if wrong.any():
        axes.vlines(place[wrong], newton[wrong], gr[wrong], color="black", lw=2, label="GR below Newton")
    size = 2.5 if many else 4
    axes.plot(place, newton, "o", color=NEWTON["color"], mfc="white", ms=size, label="Newton")
    axes.plot(place, gr, "s", color=GR["color"], ms=size, label="GR")
    axes.axhline(0, ls=":", color=GRAY)
    axes.set(xlabel="seeds, by the mean of both twins" if many else "seed", ylabel="mean logit of the slices")
    axes.set_title(f"GR above its Newtonian twin: {int(np.sum(~wrong))} of {len(names)}")
    axes.set_xticks([] if many else place, [] if many else [str(name) for name in names])
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def reliability_diagram(rows: Sequence[Mapping[str, float | None]], error: float) -> Figure:
    """Share of GR against predicted probability, in the range of the slices."""
    figure, axes = subplots()
    predicted = np.array([row["probability"] for row in rows], float)
    value, bars = _bars(rows)
    bars = np.nan_to_num(bars)
    axes.errorbar(predicted, value, bars, **NETWORK, capsize=2, label="network, 95 % over seeds")
    ends = np.array([np.min([predicted, value - bars[0]]), np.max([predicted, value + bars[1]])]).clip(0, 1)
    ends += np.array([-0.05, 0.05]) * max(float(np.ptp(ends)), 0.02)
    axes.plot(ends, ends, ":", color=GRAY, label="perfectly calibrated")
    axes.set(xlabel="predicted probability of GR", ylabel="share of GR", xlim=ends, ylim=ends)
    axes.set_title(f"expected calibration error = {error:.3f}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def training_curves(lines: History) -> Figure:
    """Loss and accuracy of slices, and metrics of simulations by epoch, from `metrics.jsonl`."""
    figure, (loss, share, whole) = subplots(2 * WIDTH, 3.0, columns=3)
    for phase, style in PHASES.items():
        chosen = [line for line in lines if line["phase"] == phase]
        panels = [(loss, "loss", ""), (share, "accuracy", "accuracy, ")]
        if phase != "train":
            panels += [(share, "auc", "AUC, "), (whole, "cube_accuracy", "cubes, ")]
            panels += [(whole, "pair_accuracy", "pairs, ")]
        for axes, key, name in panels if chosen else []:
            other = {"linestyle": ":", "marker": "^"} if key in ("auc", "pair_accuracy") else {}
            values = [line[key] for line in chosen]
            axes.plot([line["epoch"] for line in chosen], values, **style | other, label=f"{name}{phase}")
    loss.axhline(np.log(2), ls=":", color=GRAY, label="chance, ln 2")
    loss.set(xlabel="epoch", ylabel="binary cross-entropy per slice [nat]")
    share.set(xlabel="epoch", ylabel="AUC, accuracy")
    whole.set(xlabel="epoch", ylabel="share of simulations", ylim=(-0.02, 1.02))
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
            if key in estimates:
                value, reach = _bars([estimates[key]])
                bounded = bool(np.isfinite(reach).all())
                open_symbol = {} if bounded else {"mfc": "white"}
                column.errorbar(
                    value, [place], xerr=reach if bounded else None, **NETWORK, **open_symbol, capsize=2
                )
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


# What the network uses, and what the power spectra hold


@styled
def interventions(measured: Mapping[str, Any], box: Box) -> Figure:
    """AUC of slices after low pass, high pass and exchange of a band between twins, by wavenumber.

    `measured` is what `interventions.summarize` returns.
    """
    figure, axes = subplots(2 * WIDTH, 2.6, columns=3, sharey=True, sharex=True)
    titles = ("only k below", "only k above", "band exchanged between twins")
    for place, kind, title in zip(axes, ("low_pass", "high_pass", "exchange"), titles, strict=True):
        k, estimates = np.array(measured["cuts"]), measured[kind]["auc"]
        if kind == "exchange":  # the first band is the mean of the slice, which has no k
            k, (mean, *estimates) = np.array(measured["centres"]), estimates
            place.plot(0.5 * box.fundamental, mean["value"], **NETWORK, mfc="white")
        _line(place, k, estimates, "", NETWORK)
        place.axhline(measured["none"]["auc"]["value"], color="black", ls=(0, (1, 3)), lw=0.8)
        place.set_title(title)
        _wavenumber_axis(place, box)
    where = (0.5 * box.fundamental, 0.03)
    axes[2].annotate("mean", where, xycoords=("data", "axes fraction"), rotation=90, ha="center")
    axes[0].set_ylabel("AUC")
    return figure


@styled
def scales(results: Mapping[str, Any], box: Box) -> Figure:
    """AUC by what is kept: up to a wavenumber, and with twins that differ in one group of modes alone.

    Left: the network on slices without the modes beyond k, the likelihood ratio of the modes up to k, and
    what is expected of it; the band in which linear theory predicts a difference is shaded. Right: hybrids.
    All within one axis.
    """
    figure, (left, right) = subplots(2 * WIDTH, 2.9, columns=2)
    by_scale, scan = results.get("scales", {}), results["interventions"]
    cuts = np.array(scan["cuts"])[1:]  # the first leaves the mean alone
    _line(left, cuts, scan["low_pass"]["within_axis"][1:], "network", NETWORK)
    k = np.array([float(name[3:]) for name in by_scale if name.startswith("n <")]) * box.fundamental
    rows = [row for name, row in by_scale.items() if name.startswith("n <")]
    if rows:
        _line(left, k, [row["test"] for row in rows], "likelihood ratio", RATIO)
        left.plot(k, [row["expected"] for row in rows], **EXPECTED, label="expected")
    if box.linear_theory:
        ends = box.fundamental * np.array([0.5, box.large_scales + 0.5])
        left.axvspan(*ends, color="0.93", lw=0, zorder=0, label="linear theory")
    left.axhline(0.5, ls=":", color=GRAY)
    left.set_ylabel("AUC of slices")
    _wavenumber_axis(left, box)
    left.set_xlabel(f"largest {left.get_xlabel()}")
    left.legend()
    beyond = f"n > {box.large_scales}"
    names = {"mean": "mean", "large_scales": f"0 < n \u2264 {box.large_scales}", "small_scales": beyond}
    directions = ("along axes", "between", "along diagonals")
    names |= {key: f"{beyond}, {name}" for key, name in zip(DIRECTED, directions, strict=True)}
    places = np.arange(len(names))[::-1]
    ratios = {key: row["test"] for key, row in by_scale.items()}
    for offset, style, label, table in (
        (0.12, NETWORK, "network", results["hybrids"]),
        (-0.12, RATIO, "likelihood ratio", ratios),
    ):
        if table:
            value, reach = _bars([table[key] for key in names])
            style = style | {"linestyle": ""}
            right.errorbar(value, places + offset, xerr=np.nan_to_num(reach), **style, capsize=2, label=label)
    right.axvline(0.5, ls=":", color=GRAY)
    right.set_yticks(places, list(names.values()))
    right.set(xlabel="AUC of slices if twins differed only there", ylim=(-0.6, len(names) - 0.4))
    return figure


@styled
def power_spectra(spectra: Mapping[str, Any], grid: Mapping[str, Any], box: Box) -> Figure:
    """Mean power spectra of both gravities, the ratio of twins beside linear theory, and by direction.

    `spectra` is what `simulation_spectra.summarize` returns, `grid` what `lattice.Lattice.report` does; its
    last band holds the corners of Fourier space.
    """
    figure, (power, ratio, directions) = subplots(2 * WIDTH, 2.8, columns=3)
    k = np.array(spectra["k"])
    # The spectra differ by less than a line: light dashes on a wide dark line show both.
    power.loglog(k, spectra["gr"], **{**GR, "marker": ""}, lw=2.4, label="GR")
    power.loglog(k, spectra["newton"], **{**NEWTON, "marker": ""}, label="Newton")
    for name, style, key in (("slices", NETWORK, ""), ("cubes", RATIO, "cube_")):
        _line(ratio, k, spectra[f"{key}ratio"], name, style | {"marker": ""})
        if spectra[f"{key}theory"] is not None:
            ratio.plot(k, spectra[f"{key}theory"], ":", color=style["color"], label=f"theory, {name}")
    by_direction, edges = grid["ratio"], np.array(grid["ratio"]["edges"]) * box.fundamental
    for index, (name, style) in enumerate(zip(by_direction["directions"], LINES, strict=True)):
        value, low, high = (np.array(by_direction[end][index], float) for end in ENDS)
        reach = np.stack([value - low, high - value])
        directions.errorbar(np.sqrt(edges[1:] * edges[:-1]), value, reach, **style, capsize=2, label=name)
    directions.axvline(edges[-2], ls=(0, (1, 3)), lw=0.8, color=GRAY)
    power.set_ylabel("P(k) of slices [(Mpc/h)$^2$]" if box.length else "P(k) of slices")
    for axes in (power, ratio, directions):
        _wavenumber_axis(axes, box)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1))  # above, where there are no curves
    for axes in (ratio, directions):
        axes.axhline(1, ls=":", color=GRAY)
        axes.set_ylabel("P(k) of GR / P(k) of Newton")
    directions.set_xlim(right=edges[-1])
    return figure


@styled
def saliency_maps(rows: Sequence[Mapping[str, Any]], box: Box) -> Figure:
    """Slices beside their saliency, in diverging maps. Rows: those of `saliency.saliency_of_extremes`."""
    figure, axes = subplots(
        2 * WIDTH, 1.75 * len(rows), columns=3, rows=len(rows), squeeze=False, sharex=True, sharey=True
    )
    figure.set_layout_engine("compressed")  # the one for images, which keep their aspect
    side, unit = (box.length, "Mpc/h") if box.length else (box.size, "cells")
    maps = {"image": "field [std. dev.]", "gradient": "d logit / d pixel", "integrated": "share in logit"}
    for line, row in zip(axes, rows, strict=True):
        across, up = DIRECTIONS[row["axis"]]
        for place, (key, label) in zip(line, maps.items(), strict=True):
            limit = 3.0 if key == "image" else float(np.quantile(np.abs(row[key]), 0.995)) or 1.0
            options = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r" if key == "image" else "PuOr_r"}
            picture = place.imshow(row[key], extent=(0, side, 0, side), origin="lower", **options)
            figure.colorbar(picture, ax=place, label=label)
            place.set_xlabel(f"{across} [{unit}]")
        where = f"{row['gravity']}, seed {row['seed']}, axis {row['axis']}, slice {row['position']}"
        line[0].set_title(f"{row['what']}\nlogit {row['logit']:.3g}, {where}", loc="left", fontsize=7)
        line[0].set_ylabel(f"{up} [{unit}]")
    axes[0, 1].set_title("gradient")
    axes[0, 2].set_title("integrated gradients")
    return figure


def information(results: Mapping[str, Any]) -> Figure:
    """The network, baselines and ceilings side by side; ceilings, which have no interval, as open symbols."""
    rows: dict[str, Mapping[str, Estimate]] = {"network": {**results["slices"], **results["cubes"]}}
    for name, row in results.get("baselines", {}).items():
        rows[f"{name} baseline, slices"] = {**row["slices"], **row["slices_by_cube"]}
        rows[f"{name} baseline, cubes"] = row["cubes"]
    for name, limit in results.get("ceilings", {}).items():
        tested = limit["test"]
        rows[f"{name} likelihood ratio, test"] = {**tested["slices"], **tested["cubes"]}
        expected = {key: limit[f"slice_{key}"] for key in ("accuracy", "auc")}
        rows[f"{name} ceiling"] = {**expected, **limit}
    return intervals(rows, COMPARED)


def of_evaluation(
    predictions: Predictions, results: Mapping[str, Any], history: History, box: Box
) -> Figures:
    """The figures of a report, by name."""
    error = results["slices"]["calibration_error"]["value"]
    drawn = evaluation_figures(predictions) | {
        "roc": roc_and_precision(predictions, results["slices"]),
        "reliability": reliability_diagram(results["reliability"], error),
    }
    if history:
        drawn["training"] = training_curves(history)
    if "interventions" in results:
        drawn |= {
            "scales": scales(results, box),
            "interventions": interventions(results["interventions"], box),
            "power_spectra": power_spectra(results["power_spectra"], results["grid"], box),
            "saliency": saliency_maps(results["saliency"], box),
        }
    if "baselines" in results:
        drawn["information"] = information(results)
    return drawn
