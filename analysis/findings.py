"""What the results of an evaluation mean, in sentences: those of `findings.txt.j2`, chosen by facts.

Facts rest on the AUC of slices and on the permutation test, not on accuracy at logit 0, which depends on
the threshold. The permutation test shows that logits depend on gravity, however little; the AUC with its
interval is the size of the effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from analysis.statistics import Estimate
from datasets.preparation.cosmology import linear_theory_ratio

Results = Mapping[str, Any]

ALPHA = 0.05
# If ln P_GR/P_N of diagonals and axes differs by up to this share of its mean over directions, it is called
# isotropic.
ISOTROPIC = 0.2
SMALL_EXCESS = 0.5  # of P_GR/P_N in linear theory, in per cent
NEGLIGIBLE = 0.515  # a slice AUC below this is next to nothing


def describe(results: Results) -> tuple[list[str], list[str]]:
    """Warnings, what limits every number, and findings; the first finding says what drives the network."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "estimate": format_estimate,
        "percent": lambda estimate: format_estimate(estimate, percent=True),
        "number": format_number,
        "share": lambda value: f"{100 * value:.0f} %",
        "seeds": lambda ends: f"{ends[0]} to {ends[1] - 1}",
        "rank": _rank,
        "below_zero": lambda estimate: _sign(estimate) < 0,
        "upfirst": lambda text: text[:1].upper() + text[1:],
    }
    text = environment.get_template("findings.txt.j2").render(results, **facts(results))
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    warnings = [line.removeprefix("Warning: ") for line in paragraphs if line.startswith("Warning: ")]
    of_grid = results.get("grid", {}).get("warnings", [])
    if "fields" in results:
        of_grid = [
            f"{name}: {line}" for name, part in results["fields"].items() for line in part["grid"]["warnings"]
        ]
    return [*warnings, *of_grid], [line for line in paragraphs if line and not line.startswith("Warning: ")]


def facts(results: Results) -> dict[str, Any]:
    """What the sentences depend on, beside the results themselves."""
    data, selection, auc = results["data"], results["selection"], results["slices"]["auc"]
    p_value, test_seeds = results["significance"]["p_value"], data["seeds"][1] - data["seeds"][0]
    significant = p_value <= ALPHA
    large_scales = results.get("interventions", {}).get("large_scales", 4)
    driver, share = _driver(results)
    ceilings = results.get("ceilings", {})
    attained = ceilings.get("directional", {}).get("attained")
    fields = data.get("fields", [])
    known = len(fields) < 2 and "transfer" not in results and attained is not None and np.isfinite(attained)
    rise = results.get("grid", {}).get("rise")
    return {
        "alpha": ALPHA,
        "negligible": NEGLIGIBLE,
        "significant": significant,
        "test_seeds": test_seeds,
        "too_few_seeds": 2**-test_seeds > ALPHA,
        "smallest_p": p_value <= 1 / results["significance"]["relabellings"],
        "exact_p": results["significance"]["relabellings"] == 2**test_seeds,
        "all_selected": selection["seeds"][0] <= data["seeds"][0]
        and data["seeds"][1] <= selection["seeds"][1],
        "filtered": data.get("max_wavenumber") is not None,
        "attained": ceilings["directional"]["test"]["slices"]["within_axis"] if ceilings else None,
        "large_scales": large_scales,
        "driver": driver,
        "driver_share": share,
        "strongest": _strongest_band(results) if driver == "small_scales" else None,
        "theory": _theory(results),
        "measured_excess": _measured_excess(results),
        "last_shell": _last_shell(results),
        "by_direction": results.get("direction_dependence"),
        "direction": _direction(results) if driver == "small_scales" else None,
        "follows": results.get("convergence", {}).get("follows"),
        "rises": rise is not None and _sign(rise) > 0,
        "beyond_two_point": beyond_two_point(results),
        "share_of_d_prime": attained if known else None,
        "of_field": f" of {fields[0]}" if len(fields) > 1 else "",
        "transferred": significant and auc["low"] is not None and auc["low"] > 0.5,
    }


def _driver(results: Results) -> tuple[str | None, float]:
    """The part of the modes with the largest share, if its lead is certain and above the remainder."""
    parts = results.get("attribution")
    if not parts:
        return None, 0.0
    share = {name: part["value"] for name, part in parts["drivers"].items()}
    driver = max(share, key=lambda name: share[name])
    certain = _sign(parts["lead"]) != 0 and parts["lead"]["value"] > abs(parts["remainder"]["value"])
    return (driver if certain else None), share[driver]


def _direction(results: Results) -> str | None:
    """How the difference of the twins at n > 4 depends on direction; None if all directions have the same.

    `lattice`: axes and diagonals lie on different sides of 1. `partial`: they differ. `steep`: by no more
    than the width of the shells explains.
    """
    by_direction = results["direction_dependence"]
    if not by_direction or results["data"]["newton_augmentation"] != 1:
        return None
    axes, diagonals, contrast = (by_direction[key] for key in ("axes", "diagonals", "contrast"))
    isotropic = abs(contrast["value"]) <= ISOTROPIC * abs(by_direction["isotropic"]["value"])
    if isotropic or not _sign(contrast):
        return None
    if abs(contrast["value"]) <= 2 * by_direction["width_error"]:
        return "steep"
    low, high = sorted((axes, diagonals), key=lambda estimate: estimate["value"])
    return "partial" if low["high"] is None or low["high"] >= 1 or high["low"] <= 1 else "lattice"


def _theory(results: Results) -> dict[str, Any] | None:
    """The excess of linear theory at n = 1 and at the end of the large scales, in per cent.

    In `cubes` and, beside what is `measured`, in `slices`; whether it `agrees` at n = 1, and the `rest` of
    what is measured at the end. None where it is not known or below SMALL_EXCESS.
    """
    data = results["data"]
    if data["reference"] != "linear" or not data["box_size"] or "interventions" not in results:
        return None
    n = np.array([1, _last_shell(results)])
    cubes = 100 * (linear_theory_ratio(n * 2 * np.pi / data["box_size"]) - 1)
    if cubes[0] < SMALL_EXCESS:
        return None
    theory: dict[str, Any] = {"cubes": cubes.tolist()}
    spectra = results.get("power_spectra", {})
    if spectra.get("theory") is not None:
        theory["slices"] = [100 * (spectra["theory"][shell - 1] - 1) for shell in n]
        theory["measured"] = [100 * (spectra["ratio"][shell - 1]["value"] - 1) for shell in n]
        first, last = np.subtract(theory["measured"], theory["slices"])
        theory |= {"agrees": abs(first) < theory["slices"][0] / 4, "rest": last}
    return theory


def _measured_excess(results: Results) -> float | None:
    """P_GR/P_N - 1 of slices at the end of the large scales, in per cent; None where it is not measured."""
    ratio = results.get("power_spectra", {}).get("ratio")
    return None if ratio is None else 100 * (ratio[_last_shell(results) - 1]["value"] - 1)


def _last_shell(results: Results) -> int:
    """The end of the large scales, or of the modes that a filter left."""
    large_scales = results.get("interventions", {}).get("large_scales", 4)
    return min(large_scales, len(results.get("power_spectra", {}).get("ratio", ())) or large_scales)


def _strongest_band(results: Results) -> dict[str, Any] | None:
    """The band of wavenumbers with the largest share, if it lies beyond the large scales."""
    scan = results["interventions"]
    edges, shares = np.array(scan["edges"]), [share["value"] for share in scan["shares"]]
    n = edges / (2 * edges[1])  # the first band, the mean, ends at n = 1/2
    band = int(np.argmax(shares))
    if n[band] < scan["large_scales"]:
        return None
    return {"low": edges[band], "high": edges[band + 1], "unit": scan["unit"], "share": shares[band]}


def beyond_two_point(results: Results) -> bool:
    """Whether the network exceeds all that the direction-resolved power spectrum attains on the same slices.

    By the intervals of the paired difference in the AUC within one axis to the baselines and, as these may be
    fitted to too few seeds, to the Gaussian likelihood ratios.
    """
    classifiers = [*results.get("baselines", {}).values(), *results.get("ceilings", {}).values()]
    exceeds = all(_sign(classifier["gain"]["within_axis"]) > 0 for classifier in classifiers)
    return results["significance"]["p_value"] <= ALPHA and exceeds


def _sign(estimate: Estimate) -> int:
    """1 if the interval lies above zero, -1 below, 0 if it contains zero or is unknown."""
    low, high = estimate["low"], estimate["high"]
    return 0 if low is None or high is None else int(low > 0) - int(high < 0)


def _rank(gain: Estimate) -> str:
    if gain["low"] is None:
        return "not compared with"
    return {1: "above", -1: "below", 0: "not distinguishable from"}[_sign(gain)]


# Numbers


def format_number(value: float) -> str:
    """A number with four significant places."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def format_estimate(estimate: Mapping[str, Any], *, percent: bool = False, small: float = 1e-3) -> str:
    """A value with its 95 % interval, where it has one, all with the same decimals.

    Four decimals, or those of four digits of the value if it is above 1; powers of ten if all numbers are
    below `small`, or one is 10 000 or more.
    """
    ends = [estimate["value"], estimate.get("low"), estimate.get("high")]
    if ends[0] is None:
        return "undefined"
    numbers = ends[:1] if None in ends else ends
    largest = max(map(abs, numbers))
    if percent:
        texts = [f"{100 * number:.1f}" for number in numbers]
    elif largest >= 1e4 or 0 < largest < small:
        texts = [f"{number:.2e}" for number in numbers]
    else:
        decimals = 4 if abs(ends[0]) < 1.00005 else 3 - math.floor(math.log10(abs(ends[0])))
        # + 0.0: no minus zero
        texts = [f"{round(number, decimals) + 0.0:.{decimals}f}" for number in numbers]
    text = texts[0] + (" %" if percent else "")
    return f"{text} [{texts[1]}, {texts[2]}]" if len(texts) > 1 else text
