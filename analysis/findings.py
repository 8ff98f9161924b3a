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
    return lines


def findings(results: Results) -> list[str]:
    """What the results show; the first sentence states what drives the classification."""
    lines = [_driver(results), _performance(results)]
    if "grid" in results:
        lines += _lattice(results)
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
    at_threshold = (
        ""
        if calibrated is None
        else f" At the threshold of the validation seeds (logit {calibrated['threshold']:.3g}): accuracy "
        f"of slices {format_estimate(calibrated['accuracy'], percent=True)}, of cubes "
        f"{format_estimate(calibrated['cube_accuracy'], percent=True)}."
    )
    return (
        f"Slices: AUC {format_estimate(results['slices']['auc'])}, one-sided p = "
        f"{format_number(results['significance']['p_value'])} by exchanging the labels of twins. Cubes by "
        f"mean logit: AUC {format_estimate(cubes['cube_auc'])}, accuracy at logit 0 "
        f"{format_estimate(cubes['cube_accuracy'], percent=True)}, "
        f"p = {format_number(results['significance']['mcnemar_p_value'])} (McNemar).{at_threshold}"
    )


def _driver(results: Results) -> str:
    """The first finding."""
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
    share = {name: found["value"] for name, found in parts["drivers"].items()}
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
            "perpendicular to the slice and the mean of the cube, of which only the latter is an artefact: "
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
    return _by_direction(results["direction_dependence"], part, text)


def _linear_theory(data: Mapping[str, Any]) -> str:
    """What linear theory says about n <= 4 in a box of this length."""
    if not data["box_size"]:
        return "Without the size of the box, linear theory predicts nothing for them."
    n = np.array([1, LARGE_SCALES])
    largest, smallest = 100 * (linear_theory_ratio(n * 2 * np.pi / data["box_size"]) - 1)
    if largest < SMALL_EXCESS:
        return f"Linear theory predicts less than {SMALL_EXCESS} % there in this box."
    return (
        f"Linear theory predicts an excess of {largest:.1f} % at n = 1 and {smallest:.1f} % at n = 4 in "
        "this box, from radiation and gauge in the initial conditions, not from relativistic dynamics."
    )


def _by_direction(found: Mapping[str, Any], part: str, text: str) -> str:
    """The first finding if modes with n > 4 drive the classification: `text` and what the lattice does."""
    if not found:
        return text.strip()
    axes, diagonals, contrast = found["axes"], found["diagonals"], found["contrast"]
    ratio = (
        f"P_GR/P_N {axes['value']:.4f} along the grid axes, {diagonals['value']:.4f} along diagonals, as the "
        "network weighs scales"
    )
    if not _excludes_zero(contrast) or abs(contrast["value"]) <= ISOTROPIC * abs(found["isotropic"]["value"]):
        return text + f"The twins differ there equally in all directions, unlike a lattice effect ({ratio})."
    if abs(contrast["value"]) <= 2 * found["width_error"]:
        return text + f"The twins' ratio changes too steeply there to compare directions ({ratio})."
    low, high = sorted((axes, diagonals), key=lambda estimate: estimate["value"])
    if low["high"] is None or low["high"] >= 1 or high["low"] <= 1:
        return (
            text
            + "The difference of the twins there depends in part on direction, an effect of the lattice "
            + f"({ratio})."
        )
    return (
        f"The lattice drives the classification: {part} comes from {DRIVERS['small_scales']}, where the sign "
        f"of the difference of the twins depends on the direction to the grid axes ({ratio}). Gravity is "
        "isotropic: this is an effect of the grid, not physics."
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


def _lattice(results: Results) -> list[str]:
    """Warnings of the data themselves: direction or mean separates the labels."""
    return [str(line) for line in results["grid"]["warnings"]]


def _beside_baselines(results: Results) -> str:
    found = results["baselines"]
    verdicts = []
    for name in ("isotropic", "directional"):
        gain = found[name]["gain"]["auc"]
        verdicts.append(
            f"{_compare(gain)} the {name} one (AUC {found[name]['slices']['auc']['value']:.4f}, difference "
            f"{format_estimate(gain)})"
        )
    text = (
        f"Of the baselines on the power spectrum of slices, the network is {verdicts[0]} and {verdicts[1]}."
    )
    if beyond_two_point(results):
        return text + _beyond(results)
    return text + " Information beyond two-point statistics is not shown."


def _beyond(results: Results) -> str:
    text = " It exceeds every power-spectrum classifier tested here"
    if "degradation" not in results:
        return text + "; --degrade shows whether it depends on the phases of the modes."
    change = results["degradation"]["random_phases"]["change"]
    found = f"(difference {format_estimate(change)})"
    if change["high"] is not None and change["high"] < 0:
        return (
            f"{text}, and its AUC is lower on slices with the same power spectra and random phases {found}: "
            "information beyond two-point statistics is indicated. A network trained on slices with random "
            "phases would prove it."
        )
    return (
        f"{text}, but its AUC is not shown to be lower on slices with the same power spectra and random "
        f"phases {found}: information beyond two-point statistics is not shown."
    )


def beyond_two_point(results: Results) -> bool:
    """Whether the network exceeds all that the direction-resolved power spectrum attains on the same slices.

    By the intervals of the paired difference in AUC to the baselines and, as these may be fitted to too few
    seeds, to the Gaussian likelihood ratios.
    """
    gains = [baseline["gain"]["auc"] for baseline in results["baselines"].values()]
    gains += [limit["gain"]["auc"] for limit in results.get("ceilings", {}).values()]
    return significant(results) and all(gain["low"] is not None and gain["low"] > 0 for gain in gains)


def _compare(gain: Estimate) -> str:
    if gain["low"] is None or gain["high"] is None:
        return "of unknown rank beside"
    return "above" if gain["low"] > 0 else "below" if gain["high"] < 0 else "not distinguishable from"


def _beside_ceilings(results: Results) -> str:
    found = results["ceilings"]
    parts = [f"{limit['slice_auc']['value']:.4f} {name}" for name, limit in found.items()]
    spectra = "With these spectra"
    if "transfer" in results:
        spectra = f"With the spectra at z = {results['transfer']['trained_redshift']:g}"
    text = f"{spectra} the likelihood ratio of Gaussian fields reaches a slice AUC of {', '.join(parts)}."
    attained = found["directional"]["attained"]
    if "transfer" in results or attained is None or not np.isfinite(attained):
        return text
    return (
        f"{text} The network attains {100 * attained:.0f} % of the detectability d' of the directional one."
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
