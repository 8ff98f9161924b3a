"""The model card of a trained network, in Hugging Face's format."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TITLES = {  # by key of the report
    "accuracy": "accuracy of slices",
    "auc": "area under the ROC curve, slices",
    "log_loss": "log loss of slices",
    "cube_accuracy": "accuracy of cubes, by their mean logit",
    "pair_accuracy": "twins ranked correctly, by their mean logit",
}

TEXT = """# {name}

A {architecture} of width {layer_param} that classifies 2D slices of a cosmological simulation by its gravity:
General Relativity (higher logits) or Newtonian gravity.

Input: slices (b, {channels}, {size}, {size}){fields} with the values of the data file that it was trained on.
The network standardizes{whitens} them. Output: one logit per slice. Its `probability` of General Relativity
is {calibrated}; a slice is classified as General Relativity where it exceeds 1/2.{cubes}

It needs a checkout of gravity-cnn and `pip install torch safetensors numpy psutil`, in any folder:

```python
import sys

sys.path.insert(0, "gravity-cnn")  # the checkout
import models
import torch

network = models.load("model")  # this folder, in eval mode
slices = torch.from_numpy(cube).movedim(axis, 0)[:, None]  # perpendicular to array axis 0, 1 or 2
logits = network(slices, axis)
probability = network.probability(slices, axis)
```

From the Hugging Face Hub: `models.TrainedNetwork.from_pretrained("user/{name}")`.

## Training

{training}

## Evaluation

{evaluation}

## Limits

The network is valid for simulations like those of its training: the same code, box, resolution, redshift and
standardization. {driver} It has never seen observations.
"""

CUBES = """

The probability of a whole cube comes from the mean logit of all its slices:
`network.calibration.cubes.probability(logits.mean())`, from validation cubes."""

NOT_KNOWN = "It may use artifacts of the simulation grid, which other simulations do not share: evaluate it."
PIPELINE_TEST = "**Newtonian slices were multiplied by {:g}: a test of the pipeline, not of gravity.**\n\n"


def model_card(config: dict[str, Any]) -> ModelCard:
    """The model card of a network, from the content of its config.json."""
    training, evaluation = config.get("training") or {}, config.get("evaluation") or {}
    calibration = config.get("calibration") or {}
    name = str(training.get("run", "gravity-cnn"))
    estimates, names = evaluation.get("estimates", {}), config.get("fields", [])
    estimates = {key: estimates[key] for key in TITLES if estimates.get(key, [None])[0] is not None}
    metadata = ModelCardData(
        license="mit",
        library_name="gravity-cnn",
        pipeline_tag="image-classification",
        tags=["cosmology", "general-relativity", "pytorch"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="cosmological-simulations",
                dataset_name=str(evaluation["data"]),
                metric_type=key,
                metric_name=TITLES[key],
                metric_value=round(value, 5),
            )
            for key, (value, *_) in estimates.items()
        ]
        or None,
    )
    text = TEXT.format(
        name=name,
        **{key: _text(config.get(key)) for key in ("architecture", "layer_param", "channels", "size")},
        fields=f" of {_text('; '.join(names))}" if names else "",
        whitens=" and whitens" if config.get("power") else "",
        calibrated="calibrated on validation seeds" if calibration else "not calibrated",
        cubes=CUBES if calibration.get("cubes") else "",
        training="\n".join(f"- {_text(key)}: {_text(value)}" for key, value in training.items()),
        evaluation=_results(evaluation, estimates),
        driver=_text(evaluation.get("finding") or NOT_KNOWN),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _results(evaluation: dict[str, Any], estimates: dict[str, list[float]]) -> str:
    if not estimates:
        return "Not evaluated yet: `accelerate launch evaluation.py RUN` adds the results."
    factor, (first, after) = evaluation.get("newton_augmentation", 1), evaluation["seeds"]
    rows = "\n".join(f"| {TITLES[key]} | {_interval(*values)} |" for key, values in estimates.items())
    return (
        f"{PIPELINE_TEST.format(factor) if factor != 1 else ''}Seeds {first} to {after - 1} of "
        f"{_text(evaluation['data'])}, {evaluation['slices']} slices; 95 % intervals over seeds.\n\n"
        f"| | value [95 % interval] |\n|---|---|\n{rows}"
    )


def _interval(value: float, low: float | None = None, high: float | None = None) -> str:
    return f"{value:.4f}" + ("" if low is None or high is None else f" [{low:.4f}, {high:.4f}]")


def _text(value: Any) -> str:
    """A value as text without Markdown or HTML."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(f"&#{ord(c)};" if c in "<>&|`*_[]\\\n\r" else c for c in text)
