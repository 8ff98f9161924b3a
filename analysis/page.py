"""The report as a page: what the numbers say in sentences, in tables and beside the figures."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

Estimate = Mapping[str, float | None]

NAMES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "tpr": "true positive rate",
    "fpr": "false positive rate",
    "auc": "area under the ROC curve",
    "average_precision": "average precision",
    "log_loss": "log loss [nat]",
    "brier_score": "Brier score",
    "calibration_error": "expected calibration error",
    "cube_accuracy": "accuracy of cubes",
    "cube_auc": "AUC of cubes",
    "pair_accuracy": "pairs of twins ranked correctly",
    "pair_p_value": "chance of as many pairs by guessing",
    "mean_difference": "mean difference of twins [logit]",
    "separation": "mean difference / scatter of the differences",
    "contrast": "mean difference / scatter between simulations",
}
# pictures of the report: title, caption
PICTURES = {
    "twins": (
        "Twins",
        "Mean logit of the slices of each cube. Twins share their initial conditions and are joined by a "
        "line.",
    ),
    "roc": (
        "ROC and precision-recall",
        "Curves of single slices. The shade holds 95 % of the ROC curves of resampled seeds.",
    ),
    "confusion": ("Confusion matrix", "Predictions at the threshold logit > 0."),
    "reliability": (
        "Calibration",
        "Share of GR among slices to which the network gives about the same probability, in bins of equally "
        "many slices. On the dotted line it can be taken at its word.",
    ),
    "logits": ("Logits", "Distribution of the logits of slices; the outermost bins hold what lies beyond."),
    "training": (
        "Training",
        "From metrics.jsonl, over all starts of the run. The loss of the training is that with dropout.",
    ),
    "scales": (
        "Scales",
        "Verdicts on slices of which only wavenumbers below or above k are left, and on twins that "
        "exchanged one band of k. Exchanging a band on which the verdict depends lowers the AUC, below 0.5 "
        "if no other band tells the same. An accuracy of exactly 0.5 beside a higher AUC says that the "
        "filter moved all logits to one side, not that nothing is left. The first low pass keeps only the "
        "mean. Dotted: the slices as they are. Shades: 95 % over seeds.",
    ),
    "spectra": (
        "Power spectra",
        "Left: mean power spectra of slices of the standardised field. Middle: their ratio. Right: where "
        "the gradient of the logit has its power: peaks at regular distances come from the stride of the "
        "first convolution. The last wavenumber is the Nyquist frequency of the grid, where a simulation "
        "holds little of the field.",
    ),
    "saliency": (
        "What it looks at",
        "The slices of which the network is most and least certain, the gradient of the logit by pixel, "
        "and integrated gradients, which add up to the logit less that of an empty slice.",
    ),
    "yardstick": (
        "Network and yardstick",
        "The network beside logistic regressions on log P(k), trained and tested on the same seeds. "
        "Dotted: chance.",
    ),
}
PIXELS_PER_DOT = 2  # figures have the resolution of print, twice what a screen needs
STYLE = """
body { font: 16px/1.5 Georgia, serif; color: #111; background: #fff; max-width: 62rem; margin: 2rem auto;
padding: 0 1rem } h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #999 } table
{ border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: right;
white-space: nowrap } th {
border-bottom: 1px solid #111 } td:first-child, th:first-child { text-align: left } tr:nth-child(even) td {
background: #f3f3f3 } figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption, .small {
font-size: .9rem; color: #444 } .small td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
"""


def in_words(estimate: Estimate, percent: bool = False) -> str:
    """A value with its 95 % interval."""
    ends = [estimate["value"], estimate.get("low"), estimate.get("high")]
    value, *interval = (
        None if end is None else f"{100 * end:.1f} %" if percent else _number(end) for end in ends
    )
    return f"{value}" + (f" [{interval[0]}, {interval[1]}]" if None not in interval else "")


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def findings(numbers: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    slices, cubes, data = numbers["slices"], numbers["cubes"], numbers["data"]
    accuracy, share = slices["accuracy"], numbers["chance"]["accuracy"]
    low = accuracy["low"]
    verdict = (
        "the spread over seeds is unknown"
        if low is None
        else ("above chance" if low > share else "not distinguishable from chance")
    )
    lines = []
    if data["seeds"][0] < data["train_seeds"]:
        lines.append(
            "The network was trained on some of these seeds: the numbers say nothing about unseen ones."
        )
    if data["newton_augmentation"] != 1:
        lines.append(
            f"Newtonian slices were multiplied by {data['newton_augmentation']:g}: this is a test of the "
            "pipeline, not of gravity."
        )
    seeds = data["seeds"][1] - data["seeds"][0]
    pairs = "the one pair" if seeds == 1 else f"the {seeds} pairs"
    lines += [
        f"The network gets {in_words(accuracy, True)} of the slices right; always saying the more frequent "
        f"gravity gets {100 * share:.1f} %: {verdict}.",
        f"By the mean logit of its slices it puts {in_words(cubes['cube_accuracy'], True)} of the cubes on "
        f"the right side and ranks {in_words(cubes['pair_accuracy'], True)} of {pairs} of twins correctly; "
        f"guessing does as well with a chance of {_number(cubes['pair_p_value']['value'])}.",
    ]
    contrast = cubes.get("contrast", {}).get("value")
    if contrast is not None and 0 < contrast < 1:
        lines.append(
            f"Simulations of one gravity differ from each other {1 / contrast:.1f} times as much as twins "
            "do: twins are told apart by comparing them, single slices hardly."
        )
    if "yardstick" in numbers:
        lines.append(_beside_the_yardstick(numbers["yardstick"]))
    if "scales" in numbers:
        lines.append(_most_telling_band(numbers))
    return lines


def _beside_the_yardstick(found: Mapping[str, Any]) -> str:
    gain = found["gain"]["auc"]  # it decides: unlike the accuracy it needs no threshold
    if gain["low"] is None:
        verdict = "The spread over seeds is unknown"
    else:
        place = "is above" if gain["low"] > 0 else "is below" if gain["high"] < 0 else "cannot be told from"
        verdict = f"By AUC the network {place} it"
    return (
        "A logistic regression on the power spectrum of slices, the yardstick, gets "
        f"{in_words(found['slices']['accuracy'], True)} of them right. {verdict}: the difference is "
        f"{in_words(gain)} in AUC and {in_words(found['gain']['accuracy'], True)} in accuracy."
    )


def _most_telling_band(numbers: Mapping[str, Any]) -> str:
    slices, chance, scales = numbers["slices"], numbers["chance"], numbers["scales"]
    lows = {key: slices[key]["low"] for key in ("accuracy", "auc")}
    if None in lows.values():
        return "The spread over seeds is unknown, so no scale is named."
    if any(low <= chance[key] for key, low in lows.items()):
        return "The network is not above chance, so no scale is named."
    areas = [estimate["value"] for estimate in scales["exchange"]["auc"]]
    whole = scales["none"]["auc"]["value"]
    band = int(np.argmax(np.abs(np.array(areas) - whole)))
    edges, unit = scales["edges"], scales["unit"]
    name = (
        "the mean of the slice" if band == 0 else f"k from {edges[band]:.4g} to {edges[band + 1]:.4g} {unit}"
    )
    return (
        f"The verdict on slices depends most on {name}: exchanged between twins, it takes the AUC from "
        f"{whole:.3f} to {areas[band]:.3f}."
    )


def html(numbers: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The report as one page that needs nothing else."""
    sections = [
        ("Findings", _list(findings(numbers))),
        (
            "Numbers",
            _numbers(numbers) + _figures(images, "twins", "roc", "confusion", "reliability", "logits"),
        ),
        ("Scales", _figures(images, "scales", "spectra")),
        ("Yardstick", _yardstick(numbers) + _figures(images, "yardstick")),
        ("Saliency", _figures(images, "saliency")),
        ("Training", _figures(images, "training")),
        ("Provenance", _provenance(numbers)),
    ]
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections if content)
    title = escape(f"{numbers['run']}: evaluation")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{body}</body></html>\n"
    )


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = (line("th", head) if any(head) else "") + "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>{lines}</table></div>'


def _figures(images: Mapping[str, bytes], *names: str) -> str:
    parts = []
    for name in names:
        if name in images:
            title, caption = PICTURES[name]
            data = base64.b64encode(images[name]).decode()
            width = int.from_bytes(images[name][16:20], "big") // PIXELS_PER_DOT  # from the head of the PNG
            picture = f'<img src="data:image/png;base64,{data}" width="{width}" alt="{escape(title)}">'
            words = f"<b>{escape(title)}.</b> {escape(caption)} ({name}.png, {name}.pdf)"
            parts.append(f"<figure>{picture}<figcaption>{words}</figcaption></figure>")
    return "\n".join(parts)


def _numbers(numbers: Mapping[str, Any]) -> str:
    columns = {
        "all axes": numbers["slices"],
        **{f"axis {axis}": row for axis, row in numbers["axes"].items()},
    }
    chance = numbers["chance"]
    rows = [
        [
            NAMES[key],
            _number(chance[key]) if key in chance else "",
            *(in_words(part[key]) for part in columns.values()),
        ]
        for key in numbers["slices"]
    ]
    cubes = [
        [NAMES[key], _number(chance[key]) if key in chance else "", in_words(estimate)]
        for key, estimate in numbers["cubes"].items()
    ]
    data = numbers["data"]
    intro = (
        f"{sum(numbers['confusion'].values()):,} slices of {data['seeds'][1] - data['seeds'][0]} seeds, "
        f"{100 * numbers['chance']['balance']:.1f} % of them GR. GR is the positive class. Brackets hold "
        "95 % intervals from a bootstrap over seeds (shares of cubes and pairs: exact binomial, one trial "
        "per seed). Values by scikit-learn, calibration error by torchmetrics, log loss by torch."
    )
    few = data["seeds"][1] - data["seeds"][0] < 20
    warning = (
        "<p><b>Fewer than 20 seeds: the intervals are rough and rather too narrow.</b></p>" if few else ""
    )
    return (
        f"<p>{escape(intro)}</p>{warning}<h3>Predictions</h3>{_table(['', 'chance', *columns], rows)}"
        f"<h3>Cubes and twins, by mean logit</h3>{_table(['', 'chance', ''], cubes)}"
    )


def _yardstick(numbers: Mapping[str, Any]) -> str:
    if "yardstick" not in numbers:
        return ""
    found = numbers["yardstick"]
    rows = {
        "network": {**numbers["slices"], **numbers["cubes"]},
        "P(k) of slices": {**found["slices"], **found["slices_by_cube"]},
        "P(k) of cubes": found["cubes"],
        "network less P(k) of slices": found["gain"],
    }
    keys = ("accuracy", "auc", "cube_accuracy", "cube_auc", "pair_accuracy")
    table = [
        [name, *(in_words(row[key]) if key in row else "" for key in keys)] for name, row in rows.items()
    ]
    text = (
        "Logistic regression on log P(k), trained on the training seeds, its regularisation chosen by "
        "cross-validation over seeds: what the power spectrum up to the Nyquist frequency can tell, without "
        "the mean of a slice. Of several channels it sees the first."
    )
    return f"<p>{text}</p>{_table(['', *(NAMES[key] for key in keys)], table)}"


def _provenance(numbers: Mapping[str, Any]) -> str:
    rows = [
        [f"{part}: {key}", value if isinstance(value, str) else json.dumps(value)]
        for part in ("model", "data", "how")
        for key, value in numbers[part].items()
        if (part, key) != ("data", "seeds")
    ]
    first, end = numbers["data"]["seeds"]
    rows.append(["data: seeds", f"{first} to {end - 1}"])
    return f'<div class="small">{_table(["", ""], rows)}</div>'
