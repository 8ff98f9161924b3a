"""The files of an evaluation: `report.json`, `report.html` and `predictions.h5`, written and read.

The HTML page contains findings, tables and figures, and needs no other file.
"""

from __future__ import annotations

import system
from system import UserError

import base64
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from analysis.figures import WIDTH
from analysis.findings import format_estimate, format_number
from training.metrics import Predictions

MAPS = ("image", "gradient", "integrated")  # drawn as figures, too large to list
REPORT, PREDICTIONS = "report.json", "predictions.h5"
COLUMNS = ("id", "seed", "label", "axis", "position", "logit")
Results = Mapping[str, Any]
Cell = str | Mapping[str, Any] | None
"""A text or an estimate."""

NAMES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "tpr": "true positive rate",
    "fpr": "false positive rate",
    "auc": "area under the ROC curve (AUC)",
    "average_precision": "average precision",
    "log_loss": "log loss [nat]",
    "brier_score": "Brier score",
    "calibration_error": "expected calibration error",
    "cube_accuracy": "accuracy of cubes",
    "cube_auc": "AUC of cubes",
    "pair_accuracy": "pair accuracy",
    "mean_difference": "mean difference of twins [logit]",
    "separation": "mean difference / its standard deviation",
    "contrast": "mean difference / standard deviation between cubes",
}
# figures of the report: title, caption
FIGURES = {
    "twins": (
        "Twins",
        "Mean logit of the slices of each cube. Twins share their initial conditions and are joined by a "
        "line.",
    ),
    "roc": (
        "ROC and precision-recall",
        "Curves of single slices. The shade is the pointwise 95 % interval over seeds.",
    ),
    "confusion": ("Confusion matrix", "Predictions at the threshold logit > 0."),
    "reliability": (
        "Calibration",
        "Share of GR against predicted probability, in bins of equally many slices. A calibrated network is "
        "on the dotted line.",
    ),
    "logits": ("Logits", "Distribution of the logits of slices; the outermost bins include what is beyond."),
    "training": (
        "Training",
        "From metrics.jsonl, over all starts of the run.",
    ),
    "attribution": (
        "Attribution",
        "Share of the mean twin difference that changes sign when twins exchange a group of modes (left) or "
        "a band of wavenumbers (right; open symbol: the mean of the slice).",
    ),
    "interventions": (
        "Interventions",
        "Slices of which only wavenumbers below or above k remain, and twins that exchanged one band. "
        "Exchanging a band that the network uses lowers the AUC, below 0.5 if no other band holds the same "
        "information. An accuracy of 0.5 with a higher AUC means that a filter shifted all logits. Dotted: "
        "unchanged slices. Shades: 95 % over seeds.",
    ),
    "power_spectra": (
        "Power spectra",
        "Left: mean spectra of slices as the network sees them. Middle: ratio of twins. Right: power of the "
        "gradient of the logit; regular peaks come from the stride of the first convolution. The last k is "
        "the Nyquist frequency.",
    ),
    "directions": (
        "Ratio by direction",
        "P_GR/P_N of the cubes along the grid axes, along diagonals and between. An isotropic theory has one "
        "curve. Right of the dotted line: the corners of Fourier space, beyond the Nyquist sphere.",
    ),
    "information": (
        "Network, baselines and ceilings",
        "Baselines: logistic regressions on log P(k), isotropic and by direction. Likelihood ratios: the "
        "optimal test for Gaussian fields with the spectra of the training twins, on the test seeds; open "
        "symbols: its expectation, the ceiling. Dotted: chance.",
    ),
    "saliency": (
        "Saliency",
        "The slices with extreme logits, the gradient of the logit by pixel, and integrated gradients, which "
        "add up to the logit minus that of an empty slice.",
    ),
}
STYLE = Path(__file__).with_name("report.css")


class Stopwatch:
    """Seconds that each part of an evaluation took, printed when it ends."""

    def __init__(self, print_line: Callable[[str], Any]) -> None:
        self.seconds: dict[str, float] = {}
        self._print, self._last = print_line, time.perf_counter()

    def lap(self, name: str) -> None:
        """End the part `name`."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        self._print(f"{name}: {self.seconds[name]:.1f} s")


def write(folder: Path, results: Mapping[str, Any], figures: Iterable[str]) -> dict[str, Any]:
    """Write `report.json` and `report.html`; returns the results as JSON holds them.

    `figures` are names of PNG files in `folder` to show. Other figures of an earlier report are removed.
    """
    figures = list(figures)
    clean: dict[str, Any] = to_json(results)
    system.write_atomically(folder / REPORT, json.dumps(clean, indent=1, allow_nan=False) + "\n")
    images = {name: (folder / f"{name}.png").read_bytes() for name in figures}
    system.write_atomically(folder / "report.html", page(clean, images))
    for name in set(FIGURES).difference(figures):
        for suffix in ("png", "pdf"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    return clean


def read(run: Path) -> dict[str, Any]:
    """The report of an evaluated run. Raises UserError if it is missing or damaged."""
    path = run / "evaluation" / REPORT
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Evaluate the run first: evaluation.py {run}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}). Evaluate the run again: evaluation.py {run}") from None


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write logit, label and place of each slice, and under `cubes` the mean logit of each cube, as HDF5."""
    gravities = np.array(["newton", "gr"], dtype="S6")
    columns = {name: getattr(predictions, name) for name in COLUMNS} | {
        "gravity": gravities[predictions.label],
        "cubes/seed": np.repeat(predictions.seeds, 2),
        "cubes/gravity": np.tile(gravities, len(predictions.seeds)),
        "cubes/mean_logit": predictions.cube_logits.ravel(),
    }
    write_hdf5(path, columns, {"about": "positive logits and label 1: General Relativity"})


def write_hdf5(path: Path, columns: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Replace `path` by an HDF5 file of data sets by name, with attributes of the file."""
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.attrs.update(attributes)
        for name, column in columns.items():
            file.create_dataset(name, data=column, track_times=False)
    system.write_atomically(path, memory.getvalue())


def read_predictions(run: Path) -> Predictions:
    """The predictions of an evaluated run. Raises UserError if they are missing or damaged."""
    path = run / "evaluation" / PREDICTIONS
    try:
        with h5py.File(path, "r", locking=False) as file:
            return Predictions(**{name: file[name][:] for name in COLUMNS})
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path}: the predictions cannot be read ({error}). Evaluate the run again: evaluation.py {run}"
        ) from None


def card_record(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card shows of an evaluation."""
    data = results["data"]
    estimates = {**results["slices"], **results["cubes"], **results["pairs"]}
    return {
        "data": Path(data["file"]).name,
        "seeds": data["seeds"],
        "slices": sum(results["confusion"].values()),
        "newton_augmentation": data["newton_augmentation"],
        "estimates": {
            key: to_json([estimate["value"], estimate.get("low"), estimate.get("high")])
            for key, estimate in estimates.items()
        },
    }


def to_json(value: Any) -> Any:
    """The same values as JSON holds them: lists for arrays, null for NaN and infinity; without MAPS."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items() if key not in MAPS}
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# The page


def page(results: Results, images: Mapping[str, bytes]) -> str:
    """The report as one page without external files; `images` are PNG files by name."""
    dropout = " The training loss includes dropout." if results["model"].get("dropout") else ""
    sections = [
        ("Findings", _warnings(results["warnings"]) + _list(results["findings"])),
        (
            "Attribution",
            _attribution(results) + _figures(images, "attribution", "interventions", "directions"),
        ),
        ("Baselines and ceilings", _information(results) + _figures(images, "power_spectra", "information")),
        (
            "Predictions",
            _predictions(results) + _figures(images, "roc", "twins", "confusion", "reliability", "logits"),
        ),
        ("Robustness", _degradation(results)),
        ("Saliency", _figures(images, "saliency")),
        ("Training", _figures(images, "training", note=dropout)),
        ("Provenance", _provenance(results)),
    ]
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections if content)
    title = escape(f"{results['run']}: evaluation")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE.read_text()}</style></head>\n'
        f"<body><h1>{title}</h1>\n{body}</body></html>\n"
    )


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _warnings(lines: Iterable[str]) -> str:
    return "".join(f'<p class="warning">{escape(line)}</p>' for line in lines)


def _cell(cell: Cell, small: float) -> str:
    """A text, or an estimate with its interval on a line below."""
    if cell is None or isinstance(cell, str):
        return escape(cell or "")
    value, _, interval = format_estimate(cell, small=small).partition(" ")
    return value + (f' <span class="interval">{interval}</span>' if interval else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]], small: float = 1e-3) -> str:
    """A table whose head print repeats on each page. Estimates below `small` are in powers of ten."""

    def line(tag: str, cells: Sequence[Cell]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_cell(cell, small)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line('th', head)}</thead>" if any(head) else ""
    return f"<table>{top}<tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"


def _inches(png: bytes) -> float:
    """Width of a PNG file, from its header and its chunk pHYs; that of a column if it has no resolution."""
    resolution = png.partition(b"pHYs")[2]
    per_meter = int.from_bytes(resolution[:4], "big")
    return int.from_bytes(png[16:20], "big") / per_meter / 0.0254 if per_meter else WIDTH


def _figures(images: Mapping[str, bytes], *names: str, note: str = "") -> str:
    """Figures with their captions, each followed by `note`. Two of one column stand side by side."""
    parts = []
    for name in names:
        if name in images:
            title, caption = FIGURES[name]
            data = base64.b64encode(images[name]).decode()
            picture = f'<img src="data:image/png;base64,{data}" alt="{escape(title)}">'
            words = f"<b>{escape(title)}.</b> {escape(caption + note)} ({name}.png, {name}.pdf)"
            parts.append(
                f'<figure style="--inches: {_inches(images[name]):.2f}"><div class="scroll">{picture}</div>'
                f"<figcaption>{words}</figcaption></figure>"
            )
    return '<div class="figures">' + "\n".join(parts) + "</div>" if parts else ""


def _predictions(results: Results) -> str:
    columns = {
        "all axes": results["slices"],
        **{f"axis {axis}": row for axis, row in results["axes"].items()},
    }
    chance = {key: format_number(value) for key, value in results["chance"].items()}
    rows: list[list[Cell]] = [
        [NAMES[key], chance.get(key), *(part[key] for part in columns.values())] for key in results["slices"]
    ]
    simulations = {**results["cubes"], **results["pairs"]}
    cubes: list[list[Cell]] = [
        [NAMES[key], chance.get(key), estimate] for key, estimate in simulations.items()
    ]
    tests: list[list[Cell]] = [
        [
            "slice AUC above chance, labels of twins exchanged",
            format_number(results["significance"]["p_value"]),
        ],
        ["cubes better than chance, McNemar", format_number(results["significance"]["mcnemar_p_value"])],
    ]
    data = results["data"]
    intro = (
        f"{sum(results['confusion'].values()):,} slices of {data['seeds'][1] - data['seeds'][0]} seeds, "
        f"{100 * results['chance']['balance']:.1f} % of them GR, the positive class. Brackets are 95 % "
        "intervals over seeds: the delete-one-seed jackknife with a t quantile, score intervals for rates. "
        "AUC and its interval count pairs of slices from different seeds. Trainings differ too: see "
        "--ensemble. Metrics by metrics.py and analysis/statistics.py; logistic regression by scikit-learn."
    )
    return (
        f"<p>{escape(intro)}</p><h3>Slices</h3>{_table(['', 'chance', *columns], rows)}"
        f"<h3>Cubes and pairs of twins, by mean logit</h3>{_table(['', 'chance', 'value'], cubes)}"
        f"<h3>One-sided p-values</h3>{_table(['', 'p'], tests)}"
        "<p>Pair accuracy is no evidence: a few modes at the largest scales rank all twins correctly.</p>"
    )


def _attribution(results: Results) -> str:
    if "attribution" not in results:
        return ""
    names = {
        "mean": "mean of the slice",
        "large_scales": "large scales, 0 < n <= 4",
        "axes": "n > 4, along grid axes",
        "between": "n > 4, between",
        "diagonals": "n > 4, along diagonals",
        "remainder": "remainder: interactions of several groups",
    }
    rows: list[list[Cell]] = [[name, results["attribution"][key]] for key, name in names.items()]
    text = (
        "Share of the mean difference of twins, logit of GR minus logit of Newton, by exchanging each group "
        "of modes between twins. n is the wavenumber in units of the fundamental mode."
    )
    return f"<p>{text}</p>{_table(['', 'share'], rows, small=0)}"


def _information(results: Results) -> str:
    if "baselines" not in results:
        return ""
    keys = ("accuracy", "auc", "cube_accuracy", "cube_auc")
    rows: list[list[Cell]] = []

    def add(name: str, estimates: Mapping[str, Any]) -> None:
        rows.append([name, *(estimates.get(key) for key in keys)])

    add("network", {**results["slices"], **results["cubes"]})
    for name, found in results["baselines"].items():
        add(f"{name} baseline, slices", {**found["slices"], **found["slices_by_cube"]})
        add(f"{name} baseline, cubes", found["cubes"])
        add(f"network minus {name} baseline", found["gain"])
    for name, limit in results.get("ceilings", {}).items():
        expected = {"accuracy": limit["slice_accuracy"], "auc": limit["slice_auc"]}
        add(
            f"{name} ceiling",
            expected | {key: limit[key] for key in ("cube_accuracy", "cube_auc") if key in limit},
        )
        add(
            f"{name} likelihood ratio on the test seeds",
            {**limit["test"]["slices"], **limit["test"]["cubes"]},
        )
        add(f"network minus {name} likelihood ratio", limit["gain"])
    text = (
        "Baselines are logistic regressions on log P(k) of slices or cubes, fitted to the training seeds. "
        "Ceilings are the expected performance of the likelihood ratio of Gaussian fields with the spectra "
        "of the training twins. Of several channels the first counts."
    )
    return f"<p>{text}</p>{_table(['', *(NAMES[key] for key in keys)], rows)}"


def _degradation(results: Results) -> str:
    if "degradation" not in results:
        return ""
    found = results["degradation"]
    unit = "Mpc/h" if results["data"]["box_size"] else "cells"
    names = {
        "none": "unchanged",
        "smoothed": f"Gaussian smoothing, R = {found['smoothing']:g} {unit}",
        "large_scales": "only n <= N/4",
        "mean_removed": "mean removed",
        "noisy": f"white noise, {found['noise']:g} standard deviations",
        "random_phases": "random phases, the same power spectra",
    }
    keys = ("auc", "accuracy", "cube_auc", "change")
    head = ["", NAMES["auc"], NAMES["accuracy"], NAMES["cube_auc"], "change of AUC"]
    rows: list[list[Cell]] = [[name, *(found[kind].get(key) for key in keys)] for kind, name in names.items()]
    return _table(head, rows)


def _setting(key: str, value: Any) -> str:
    """What a setting is: seeds as a range with its last one, numbers with the digits that matter."""
    if key == "seeds" and value:
        return f"{value[0]} to {value[1] - 1}"
    if key == "seconds":
        return ", ".join(f"{part} {seconds:.1f}" for part, seconds in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _provenance(results: Results) -> str:
    rows: list[list[Cell]] = [
        [f"{part}: {key}", _setting(key, value)]
        for part in ("model", "data", "selection", "environment")
        for key, value in results[part].items()
    ]
    return f'<div class="small">{_table(["", ""], rows)}</div>'
