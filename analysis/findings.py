"""What the results of an evaluation mean, in sentences.

Sentences rest on the AUC of slices and on the permutation test, not on accuracy at logit 0, which depends on
the threshold. The permutation test shows that logits depend on gravity, however little; the AUC with its
interval is the size of the effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.interventions import LARGE_SCALES
from analysis.statistics import Estimate
from datasets.preparation.cosmology import linear_theory_ratio

Results = Mapping[str, Any]

ALPHA = 0.05
# If ln P_GR/P_N of diagonals and axes differs by up to this share of its mean over directions, it is called
# isotropic.
ISOTROPIC = 0.2
SMALL_EXCESS = 0.5  # of P_GR/P_N in linear theory, in per cent
NEGLIGIBLE = 0.515  # a slice AUC below this is next to nothing
DRIVERS = {
    "mean": "the mean of the slices",
    "large_scales": "modes with n <= 4 (large scales)",
    "small_scales": "modes with n > 4",
}


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
        texts = [f"{100 * number:.1f} %" for number in numbers]
    elif largest >= 1e4 or 0 < largest < small:
        texts = [f"{number:.2e}" for number in numbers]
    else:
        decimals = 4 if abs(ends[0]) < 1.00005 else 3 - math.floor(math.log10(abs(ends[0])))
        texts = [
            f"{round(number, decimals) + 0.0:.{decimals}f}" for number in numbers
        ]  # + 0.0: no minus zero
    return texts[0] + (f" [{texts[1]}, {texts[2]}]" if len(texts) > 1 else "")


def warnings(results: Results) -> list[str]:
    """What limits every number of the report, for its first lines."""
    data, selection = results["data"], results["selection"]
    lines = []
    if data["seeds"][0] < data["train_seeds"]:
        lines.append(
            "The network was trained on some of these seeds. The results say nothing about new ones."
        )
    if selection["evaluated"]:
        (first, end), by_hand = selection["seeds"], selection["by_hand"]
        where = f"on seeds {_seeds(selection['seeds'])}"
        basis = f"with the results {where} known" if by_hand else where
        inside = first <= data["seeds"][0] and data["seeds"][1] <= end
        lines.append(
            f"{_join(selection['criteria'])} selected this network {basis}, "
            f"{'which' if inside else 'some of which'} are evaluated here: the results "
            f"{'may be' if by_hand else 'are'} biased upwards. Evaluate on other seeds (--seeds A:B)"
            + ("." if selection["validation_seeds"] else ", or train with data_params.validation_seeds.")
        )
    if data["newton_augmentation"] != 1:
        lines.append(
            f"Newtonian slices were multiplied by {data['newton_augmentation']:g}: this tests the pipeline, "
            "not gravity."
        )
    return [*lines, *results.get("grid", {}).get("warnings", [])]


def findings(results: Results) -> list[str]:
    """What the results show; the first sentence states what drives the classification."""
    lines = [_driver(results), _performance(results)]
    if "baselines" in results:
        lines.append(_beside_baselines(results))
    if "ceilings" in results:
        lines.append(_beside_ceilings(results))
    if "transfer" in results:
        lines.append(_transfer(results))
    if "degradation" in results:
        lines.append(_degraded(results))
    lines.append(_selection(results))
    return lines


def significant(results: Results) -> bool:
    """Whether the slice AUC exceeds chance by the permutation test."""
    return results["significance"]["p_value"] <= ALPHA


def _performance(results: Results) -> str:
    cubes, calibrated = results["cubes"], results.get("calibrated")
    p_value, seeds = results["significance"]["p_value"], results["data"]["seeds"]
    smallest = f", the smallest possible with {seeds[1] - seeds[0]} seeds"
    text = (
        f"Slices: AUC {format_estimate(results['slices']['auc'])}, within one axis "
        f"{format_estimate(results['within_axis'])}; one-sided p = {format_number(p_value)}"
        f"{smallest if p_value <= 1 / results['significance']['relabellings'] else ''}, by exchanging the "
        "labels "
        f"of twins. Cubes by mean logit: AUC {format_estimate(cubes['cube_auc'])}, accuracy at logit 0 "
        f"{format_estimate(cubes['cube_accuracy'], percent=True)}, "
        f"p = {format_number(results['significance']['mcnemar_p_value'])} (McNemar)."
    )
    if calibrated is None:
        return text
    return (
        f"{text} With the calibration of the validation seeds: accuracy of slices "
        f"{format_estimate(calibrated['accuracy'], percent=True)}, of cubes "
        f"{format_estimate(calibrated['cube_accuracy'], percent=True)}."
    )


def _driver(results: Results) -> str:
    """The first finding."""
    return f"{_filtered(results)}{_named_driver(results)}{_only_there(results)}"


def _filtered(results: Results) -> str:
    """That the cubes were filtered, and what the modes left in them hold."""
    largest = results["data"].get("max_wavenumber")
    if largest is None:
        return ""
    text = f"The cubes were filtered: they hold modes with n <= {largest:g} only"
    if "ceilings" not in results:
        return f"{text}. "
    attained = results["ceilings"]["directional"]["test"]["slices"]["within_axis"]
    held = f"the likelihood ratio of their spectra attains a slice AUC of {format_estimate(attained)}"
    if attained["value"] >= NEGLIGIBLE:
        return f"{text}, of which {held}. "
    return f"{text}, and slices hold next to no difference between the gravities: {held}. "


def _only_there(results: Results) -> str:
    """What the network would attain if the twins differed only on some scales."""
    if "hybrids" not in results or results["data"].get("max_wavenumber") is not None:
        return ""
    large, small = (format_estimate(results["hybrids"][key]) for key in ("large_scales", "small_scales"))
    return f" Its AUC would be {large} if the twins differed only at 0 < n <= 4, and {small} if only beyond."


def _named_driver(results: Results) -> str:
    data = results["data"]
    if not significant(results):
        seeds = data["seeds"][1] - data["seeds"][0]
        few = f" {seeds} seeds cannot reach p = {ALPHA}: evaluate more." if 2**-seeds > ALPHA else ""
        return (
            "The network is not shown to distinguish the gravities, so no driver is named: slice AUC "
            f"{format_estimate(results['slices']['auc'])}, p = "
            f"{format_number(results['significance']['p_value'])}.{few}"
        )
    if "attribution" not in results:
        return (
            "The logits depend on the gravity; what drives them is unknown without the full report "
            "(omit --quick)."
        )
    parts = results["attribution"]
    share = {name: part["value"] for name, part in parts["drivers"].items()}
    driver = max(share, key=lambda name: share[name])
    remainder = parts["remainder"]["value"]
    if not _excludes_zero(parts["lead"]) or parts["lead"]["value"] <= abs(remainder):
        listed = ", ".join(f"to {100 * value:.0f} % from {DRIVERS[name]}" for name, value in share.items())
        return (
            "No single part of the modes drives the classification: the mean difference between twins comes "
            f"{listed}; a remainder of {100 * remainder:.0f} % comes from interactions of several parts."
        )
    part = f"{100 * share[driver]:.0f} % of the mean difference between twins"
    if driver == "mean":
        return (
            f"The mean of the slices drives the classification: {part} comes from it. It holds the waves "
            "perpendicular to the slice and the mean of the cube, of which only the latter is an artifact: "
            "repeat with data packed with --remove-mean."
        )
    text = f"The classification is driven by {DRIVERS[driver]}"
    if driver == "small_scales":
        text += _strongest_band(results)
    text += f": {part} comes from them. "
    if data["newton_augmentation"] != 1:
        return text + "Newtonian slices were multiplied by a factor, which changes the power of all modes."
    if driver == "large_scales":
        return text + _linear_theory(data)
    return _small_scales(results, part, text)


def _linear_theory(data: Mapping[str, Any]) -> str:
    """What linear theory says about n <= 4 in a box of this length."""
    if data["reference"] == "unknown":
        return "Nothing is predicted for them: the settings of these simulations are unknown."
    if data["reference"] == "none":
        return (
            "With radiation treatment = CLASS, linear theory predicts no difference of 0.1 % or more at n >= "
            "3; "
            "a late difference at the horizon, n <= 2, is measured in such simulations, not predicted here."
        )
    if not data["box_size"]:
        return "Without the size of the box, linear theory predicts nothing for them."
    n = np.array([1, LARGE_SCALES])
    largest, smallest = 100 * (linear_theory_ratio(n * 2 * np.pi / data["box_size"]) - 1)
    if largest < SMALL_EXCESS:
        return f"Linear theory predicts less than {SMALL_EXCESS} % there in this box."
    return (
        f"For cubes linear theory predicts an excess of {largest:.1f} % at n = 1 and {smallest:.1f} % at n = "
        "4 "
        "in this box, for slices somewhat less, from radiation and gauge in the initial conditions, not from "
        "relativistic dynamics."
    )


def _small_scales(results: Results, part: str, text: str) -> str:
    """The driver if it is n > 4: `text`, and what directions, theory and a second resolution say about it."""
    by_direction = results["direction_dependence"]
    if not by_direction:
        return text + "Too few modes there to compare directions."
    axes, diagonals, contrast = (by_direction[key] for key in ("axes", "diagonals", "contrast"))
    ratio = (
        f"P_GR/P_N {axes['value']:.4f} along the grid axes, {diagonals['value']:.4f} along diagonals, as the "
        "network weighs scales"
    )
    isotropic = abs(contrast["value"]) <= ISOTROPIC * abs(by_direction["isotropic"]["value"])
    if not isotropic and _excludes_zero(contrast):
        if abs(contrast["value"]) <= 2 * by_direction["width_error"]:
            return f"{text}The twins' ratio changes too steeply there to compare directions ({ratio})."
        low, high = sorted((axes, diagonals), key=lambda estimate: estimate["value"])
        if low["high"] is None or low["high"] >= 1 or high["low"] <= 1:
            return (
                f"{text}The difference of the twins there depends in part on direction, an effect of the "
                f"lattice ({ratio})."
            )
        return (
            f"The lattice drives the classification: {part} comes from {DRIVERS['small_scales']}, where the "
            f"sign of the difference of the twins depends on the direction to the grid axes ({ratio}). "
            "Gravity is isotropic: this is an effect of the grid, not physics."
        )
    return (
        f"{text}The twins differ there by the same in all directions ({ratio}). {_isotropic_excess(results)}"
    )


def _isotropic_excess(results: Results) -> str:
    """Whether an isotropic difference at n > 4 is numerical: equal in all directions is not enough."""
    follows = results.get("convergence", {}).get("follows")
    if follows == "n":
        return "It is the same with cells of another size, so it is no matter of resolution."
    if follows == "cell":
        return (
            "With cells of another size it moves with the Nyquist wavenumber: it is numerical, not physics."
        )
    predicted = {
        "linear": "Linear theory predicts no difference beyond n = 4",
        "none": "Linear theory predicts no difference there",
    }
    text = predicted.get(results["data"]["reference"], "No theory is known for these simulations")
    rise = results.get("grid", {}).get("rise")
    if rise and _excludes_zero(rise) and rise["value"] > 0:
        text += ", and the difference rises towards the Nyquist wavenumber, as numerical errors do"
    compared = "follows neither n nor the cells of a second file" if follows else "has no second resolution"
    return (
        f"{text}. It {compared}: take it for numerical until it is shown to be the same with cells of "
        "another "
        "size (--converged-with FILE)."
    )


def _excludes_zero(estimate: Estimate) -> bool:
    low, high = estimate["low"], estimate["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _strongest_band(results: Results) -> str:
    """The band of wavenumbers with the largest share, as part of a sentence, if it lies at n > 4."""
    found = results["interventions"]
    edges = np.array(found["edges"])
    n = edges / (2 * edges[1])  # the first band, the mean, ends at n = 1/2
    shares = [share["value"] for share in found["shares"]]
    band = int(np.argmax(shares))
    if n[band] < LARGE_SCALES:
        return ""
    low, high = edges[band : band + 2]
    return f", most of all by k = {low:.3g} to {high:.3g} {found['unit']} ({100 * shares[band]:.0f} %)"


def _beside_baselines(results: Results) -> str:
    verdicts = []
    for name in ("isotropic", "directional"):
        baseline = results["baselines"][name]
        gain = baseline["gain"]["within_axis"]
        verdicts.append(
            f"{_compare(gain)} the {name} one (AUC {baseline['slices']['within_axis']['value']:.4f}, "
            f"difference {format_estimate(gain)})"
        )
    text = (
        "Of the baselines on the power spectrum of slices, by the AUC within one axis, the network is "
        f"{verdicts[0]} and {verdicts[1]}."
    )
    if results["model"]["architecture"] == "LYNX":
        return f"{text} LYNX sees the powers of filters alone, no more than two-point statistics."
    if beyond_two_point(results):
        return text + _beyond(results)
    return text + " Information beyond two-point statistics is not shown."


def _beyond(results: Results) -> str:
    text = " It exceeds every power-spectrum classifier tested here"
    if "degradation" not in results:
        return text + "; --degrade shows whether it depends on the phases of the modes."
    change = results["degradation"]["random_phases"]["change"]
    difference = f"(difference {format_estimate(change)})"
    caution = (
        "Random phases also remove what correlates modes of different k in a field that is not homogeneous, "
        "as where the axes of the cubes differ."
    )
    if change["high"] is not None and change["high"] < 0:
        return (
            f"{text}, and its AUC is lower on slices with the same power spectra and random phases "
            f"{difference}: information beyond two-point statistics is indicated. {caution} A network "
            "trained "
            "on slices with random phases would prove it."
        )
    return (
        f"{text}, but its AUC is not shown to be lower on slices with the same power spectra and random "
        f"phases {difference}: information beyond two-point statistics is not shown."
    )


def beyond_two_point(results: Results) -> bool:
    """Whether the network exceeds all that the direction-resolved power spectrum attains on the same slices.

    By the intervals of the paired difference in the AUC within one axis to the baselines and, as these may be
    fitted to too few seeds, to the Gaussian likelihood ratios.
    """
    gains = [baseline["gain"]["within_axis"] for baseline in results["baselines"].values()]
    gains += [limit["gain"]["within_axis"] for limit in results.get("ceilings", {}).values()]
    return significant(results) and all(gain["low"] is not None and gain["low"] > 0 for gain in gains)


def _compare(gain: Estimate) -> str:
    if gain["low"] is None or gain["high"] is None:
        return "of unknown rank beside"
    return "above" if gain["low"] > 0 else "below" if gain["high"] < 0 else "not distinguishable from"


def _beside_ceilings(results: Results) -> str:
    ceilings = results["ceilings"]
    parts = [
        f"{limit['slice_auc']['value']:.4f} {name} ({limit['test']['slices']['within_axis']['value']:.4f} on "
        "the "
        "test seeds)"
        for name, limit in ceilings.items()
    ]
    spectra = "With these spectra"
    if "transfer" in results:
        spectra = f"With the spectra at z = {results['transfer']['trained_redshift']:g}"
    text = (
        f"{spectra} the likelihood ratio of Gaussian fields is expected to reach a slice AUC of "
        f"{', '.join(parts)}."
    )
    attained = ceilings["directional"]["attained"]
    if "transfer" in results or attained is None or not np.isfinite(attained):
        return text
    return (
        f"{text} Within one axis the network attains {100 * attained:.0f} % of the detectability d' that the "
        "directional one is expected to have."
    )


def _transfer(results: Results) -> str:
    found = results["transfer"]
    auc = results["slices"]["auc"]
    above_chance = auc["low"] is not None and auc["low"] > 0.5
    verdict = (
        "still distinguishes" if above_chance and significant(results) else "is not shown to distinguish"
    )
    return (
        f"The network was trained at z = {found['trained_redshift']:g} and {verdict} the gravities at z = "
        f"{found['redshift']:g}: slice AUC {format_estimate(auc)} there."
    )


def _degraded(results: Results) -> str:
    found = results["degradation"]
    names = {
        "smoothed": "smoothing",
        "large_scales": "n <= N/4 only",
        "mean_removed": "no mean",
        "noisy": "white noise",
        "random_phases": "random phases",
    }
    parts = [f"{found[key]['auc']['value']:.4f} with {name}" for key, name in names.items() if key in found]
    return f"Degraded slices: AUC {', '.join(parts)}, against {found['none']['auc']['value']:.4f} unchanged."


def _selection(results: Results) -> str:
    selection = results["selection"]
    if selection["criteria"] is None:
        return "Selection: unknown. An earlier version trained this network, and its checkpoint is gone."
    if not selection["criteria"] and not selection["finished"]:
        return "Selection: none. This is the network of a training that has not reached its last epoch."
    if not selection["criteria"]:
        return "Selection: none. This is the network after the last epoch of a fixed number of epochs."
    where = f"{selection['set']} seeds {_seeds(selection['seeds'])}"
    if selection["by_hand"]:
        return f"Selection: {_join(selection['criteria'])}, with the results on {where} known."
    return f"Selection: {_join(selection['criteria'])}, on {where}."


def _seeds(ends: list[int]) -> str:
    return f"{ends[0]} to {ends[1] - 1}"


def _join(words: list[str]) -> str:
    text = " and ".join(words)
    return text[:1].upper() + text[1:]
