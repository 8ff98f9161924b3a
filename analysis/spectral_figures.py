"""Figures of what the network uses and what the power spectra hold; see figures.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import COMPARED, GR, GRAY, LINES, NEWTON, WIDTH, Figures, intervals, styled, subplots
from analysis.power_spectrum import Box
from analysis.statistics import Estimate
from training.metrics import Floats

Style = Mapping[str, Any]

# axis perpendicular to a slice -> what its columns and its rows count
DIRECTIONS = (("z", "y"), ("z", "x"), ("y", "x"))
SHARES = {
    "mean": "mean",
    "large_scales": "0 < n <= 4",
    "axes": "n > 4, along axes",
    "between": "n > 4, between",
    "diagonals": "n > 4, along diagonals",
    "remainder": "remainder",
}


def _wavenumber_axis(axes: Axes, box: Box) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("k [h/Mpc]" if box.length else "k [fundamental modes]")
    axes.set_xlim(box.fundamental * 0.4, box.fundamental * box.size / 2 * 1.2)


def _line(axes: Axes, k: Floats, estimates: Sequence[Estimate], label: str, style: Style) -> None:
    """Estimates by wavenumber, with their 95 % intervals as a shade."""
    value, low, high = (
        np.array([estimate[end] for estimate in estimates], float) for end in ("value", "low", "high")
    )
    axes.fill_between(k, low, high, color=style["color"], alpha=0.15, lw=0)
    axes.plot(k, value, **style, label=label)


@styled
def interventions(measured: Mapping[str, Any], box: Box) -> Figure:
    """Metrics of slices after low pass, high pass and exchange of a band between twins, by wavenumber.

    `measured` is what `interventions.summarize` returns.
    """
    figure, axes = subplots(2 * WIDTH, 2.8, columns=3, sharey=True, sharex=True)
    titles = {
        "low_pass": "only k below",
        "high_pass": "only k above",
        "exchange": "band exchanged between twins",
    }
    for place, (kind, title) in zip(axes, titles.items(), strict=True):
        k = np.array(measured["centres"] if kind == "exchange" else measured["cuts"])
        for (key, label), style in zip((("auc", "AUC"), ("accuracy", "accuracy")), LINES, strict=False):
            estimates = measured[kind][key]
            if kind == "exchange":  # the first band is the mean of the slice, which has no k
                place.plot(0.5 * box.fundamental, estimates[0]["value"], **style, mfc="white")
                estimates = estimates[1:]
            _line(place, k, estimates, label, style)
            unchanged = measured["none"][key]["value"]
            place.axhline(unchanged, color=style["color"], ls=(0, (1, 3)), lw=0.8)
        place.set_title(title)
        _wavenumber_axis(place, box)
    axes[2].annotate(
        "mean", (0.5 * box.fundamental, 0.03), xycoords=("data", "axes fraction"), rotation=90, ha="center"
    )
    axes[0].set_ylabel("share of slices, or area")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def attribution(groups: Mapping[str, Estimate], measured: Mapping[str, Any], box: Box) -> Figure:
    """Shares of the mean twin difference: by group of modes, and by band of wavenumbers.

    `groups` is what `attribution.attribute` returns; `measured` that of `interventions.summarize`, with
    `shares`.
    """
    figure, (left, right) = subplots(2 * WIDTH, 2.6, columns=2)
    places = np.arange(len(SHARES))[::-1]
    for place, key in zip(places, SHARES, strict=True):
        value, low, high = (np.array([groups[key].get(end)], float) for end in ("value", "low", "high"))
        bounded = np.isfinite(low) & np.isfinite(high)
        error = np.stack([value - low, high - value]).clip(min=0) if bounded else None
        left.errorbar(value, place, xerr=error, color=GR["color"], marker="s", capsize=2)
    left.axvline(0, ls=":", color=GRAY)
    left.set_yticks(places, list(SHARES.values()))
    left.set(xlabel="share of the mean twin difference", ylim=(-0.6, len(SHARES) - 0.4))
    _line(right, np.array(measured["centres"]), measured["shares"][1:], "bands", GR)
    right.plot(0.5 * box.fundamental, measured["shares"][0]["value"], **{**GR, "linestyle": ""}, mfc="white")
    right.annotate(
        "mean",
        (0.5 * box.fundamental, 0.97),
        xycoords=("data", "axes fraction"),
        rotation=90,
        ha="center",
        va="top",
    )
    right.axhline(0, ls=":", color=GRAY)
    right.set(ylabel="share of the mean twin difference")
    _wavenumber_axis(right, box)
    return figure


@styled
def scales(results: Mapping[str, Any], box: Box) -> Figure:
    """AUC by what is kept: up to a wavenumber, and with twins that differ in one group of modes alone.

    Left: the network on slices without the modes beyond k, the likelihood ratio of the modes up to k, and
    what is expected of it; the band in which linear theory predicts a difference is shaded. Right: hybrids.
    """
    figure, (left, right) = subplots(2 * WIDTH, 2.9, columns=2)
    by_scale, scan = results.get("scales", {}), results["interventions"]
    cuts = np.array(scan["cuts"])
    above = cuts > box.fundamental
    kept = [row for row, inside in zip(scan["low_pass"]["auc"], above, strict=True) if inside]
    _line(left, cuts[above], kept, "network", GR)
    k = np.array([float(name[3:]) for name in by_scale if name.startswith("n <")]) * box.fundamental
    rows = [row for name, row in by_scale.items() if name.startswith("n <")]
    if rows:
        _line(left, k, [row["test"] for row in rows], "likelihood ratio", NEWTON)
        left.plot(k, [row["expected"] for row in rows], **LINES[2], label="expected")
    if box.linear_theory:
        left.axvspan(box.fundamental * 0.5, box.fundamental * 4.5, color="0.9", lw=0, label="linear theory")
    left.axhline(0.5, ls=":", color=GRAY)
    left.set_ylabel("AUC of slices")
    _wavenumber_axis(left, box)
    left.set_xlabel(f"largest {left.get_xlabel()}")
    left.legend()
    names = {key: name for key, name in SHARES.items() if key != "remainder"} | {"small_scales": "n > 4"}
    places = np.arange(len(names))[::-1]
    for offset, style, label in ((0.12, GR, "network"), (-0.12, NEWTON, "likelihood ratio")):
        table = results["hybrids"] if style is GR else {key: row["test"] for key, row in by_scale.items()}
        estimates = [table[key] for key in names if key in table]
        if not estimates:
            continue
        value, low, high = (
            np.array([row[end] for row in estimates], float) for end in ("value", "low", "high")
        )
        error = np.nan_to_num(np.stack([value - low, high - value])).clip(min=0)
        right.errorbar(
            value, places + offset, xerr=error, **{**style, "linestyle": ""}, capsize=2, label=label
        )
    right.axvline(0.5, ls=":", color=GRAY)
    right.set_yticks(places, list(names.values()))
    right.set(xlabel="AUC of slices if twins differed only there", ylim=(-0.6, len(names) - 0.4))
    return figure


@styled
def power_spectra(spectra: Mapping[str, Any], saliency: Sequence[float], box: Box) -> Figure:
    """Mean power spectra of both gravities, their ratio over twins, and the power of the gradient of the
    logit.

    `spectra`: `k`, `newton`, `gr` (shells) of slices; `ratio` and `cube_ratio`, estimates by shell.
    """
    figure, (power, ratio, slope) = subplots(2 * WIDTH, 2.8, columns=3)
    k = np.array(spectra["k"])
    # The spectra differ by less than a line: light dashes on a wide dark line show both.
    power.loglog(k, spectra["gr"], **{**GR, "marker": ""}, lw=2.4, label="GR")
    power.loglog(k, spectra["newton"], **{**NEWTON, "marker": ""}, label="Newton")
    power.set_ylabel("P(k) of slices [(Mpc/h)$^2$]" if box.length else "P(k) of slices")
    power.legend()
    _line(ratio, k, spectra["ratio"], "slices", {**GR, "marker": ""})
    _line(ratio, k, spectra["cube_ratio"], "cubes", {**NEWTON, "marker": ""})
    ratio.axhline(1, ls=":", color=GRAY)
    ratio.set_ylabel("P(k) of GR / P(k) of Newton")
    ratio.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    slope.loglog(k, saliency, color=GR["color"])
    shares = np.array(saliency)
    if (shares > 0).any():
        # A filter may remove a wavenumber up to the rounding of float32, about 1e-7 squared.
        slope.set_ylim(bottom=shares[shares > 1e-12 * shares.max()].min() / 2)
    slope.set_ylabel("share of the power of d logit / d pixel")
    for place in (power, ratio, slope):
        _wavenumber_axis(place, box)
    return figure


@styled
def ratio_by_direction(grid: Mapping[str, Any], box: Box) -> Figure:
    """P_GR/P_N of the cubes by wavenumber along grid axes, along diagonals and between, with 95 % intervals.

    `grid` is what `lattice.Lattice.report` returns; its last band holds the corners of Fourier space.
    """
    figure, axes = subplots(1.4 * WIDTH, 2.8)
    edges = np.array(grid["ratio"]["edges"])
    k = np.sqrt(edges[1:] * edges[:-1]) * box.fundamental
    rows = zip(grid["ratio"]["directions"], grid["ratio"]["value"], strict=True)
    for (name, value), low, high, style in zip(
        rows, grid["ratio"]["low"], grid["ratio"]["high"], LINES, strict=False
    ):
        value, low, high = (np.array(row, float) for row in (value, low, high))
        axes.errorbar(k, value, np.stack([value - low, high - value]), **style, capsize=2, label=name)
    axes.axhline(1, ls=":", color=GRAY)
    axes.axvline(edges[-2] * box.fundamental, ls=(0, (1, 3)), lw=0.8, color=GRAY)
    axes.set_xscale("log")
    axes.set_xlabel("k of cubes [h/Mpc]" if box.length else "k of cubes [fundamental modes]")
    axes.set_ylabel("P(k) of GR / P(k) of Newton")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def saliency_maps(rows: Sequence[Mapping[str, Any]], box: Box) -> Figure:
    """Slices beside their saliency. Rows: those of `saliency.maps` with what describes the slice."""
    figure, axes = subplots(
        2 * WIDTH, 1.75 * len(rows), columns=3, rows=len(rows), squeeze=False, sharex=True, sharey=True
    )
    figure.set_layout_engine("compressed")  # the one for images, which keep their aspect
    side = box.length or box.size
    unit = "Mpc/h" if box.length else "cells"
    maps = {"image": "field [std. dev.]", "gradient": "d logit / d pixel", "integrated": "share in logit"}
    for line, row in zip(axes, rows, strict=True):
        for place, (key, label) in zip(line, maps.items(), strict=True):
            limit = 3.0 if key == "image" else float(np.quantile(np.abs(row[key]), 0.995)) or 1.0
            # gray throughout, so that the sign survives print: black is negative, white positive
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


def information(results: Mapping[str, Any]) -> Figure:
    """The network, baselines and ceilings side by side; ceilings, which have no interval, as open symbols."""
    rows: dict[str, Mapping[str, Estimate]] = {"network": {**results["slices"], **results["cubes"]}}
    for name, found in results.get("baselines", {}).items():
        rows[f"{name} baseline, slices"] = {**found["slices"], **found["slices_by_cube"]}
        rows[f"{name} baseline, cubes"] = found["cubes"]
    for name, limit in results.get("ceilings", {}).items():
        tested = limit["test"]
        rows[f"{name} likelihood ratio, test"] = {**tested["slices"], **tested["cubes"]}
        expected = {key: limit[f"slice_{key}"] for key in ("accuracy", "auc")}
        rows[f"{name} ceiling"] = expected | {
            key: limit[key] for key in ("cube_accuracy", "cube_auc") if key in limit
        }
    return intervals(rows, COMPARED)


def of_spectra(results: Mapping[str, Any], box: Box) -> Figures:
    """The figures of the full report beside those of predictions, by name."""
    drawn = {
        "interventions": interventions(results["interventions"], box),
        "attribution": attribution(results["attribution"], results["interventions"], box),
        "power_spectra": power_spectra(results["power_spectra"], results["interventions"]["saliency"], box),
        "saliency": saliency_maps(results["saliency"], box),
    }
    if "hybrids" in results:
        drawn["scales"] = scales(results, box)
    if "grid" in results:
        drawn["directions"] = ratio_by_direction(results["grid"], box)
    if "baselines" in results:
        drawn["information"] = information(results)
    return drawn
