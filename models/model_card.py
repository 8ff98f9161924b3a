"""The model card of a trained network, in Hugging Face's format."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TITLES = {  # key of the report -> (Hugging Face's name of the metric, its name on the card)
    "accuracy": ("accuracy", "accuracy of slices"),
    "auc": ("roc_auc", "area under the ROC curve, slices"),
    "log_loss": ("log_loss", "log loss of slices"),
    "cube_accuracy": ("accuracy", "accuracy of cubes, by their mean logit"),
    "pair_accuracy": ("accuracy", "twins ranked correctly, by their mean logit"),
}


def model_card(config: dict[str, Any]) -> ModelCard:
    """The model card of a network, from the content of its config.json."""
    training, evaluation = config.get("training") or {}, config.get("evaluation") or {}
    name = str(training.get("run", "gravity-cnn"))
    estimates = {
        key: evaluation["estimates"][key]
        for key in TITLES
        if evaluation.get("estimates", {}).get(key, [None])[0] is not None
    }
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="cosmological-simulations",
            dataset_name=str(evaluation.get("data", "simulations")),
            metric_type=TITLES[key][0],
            metric_name=TITLES[key][1],
            metric_value=round(value, 5),
        )
        for key, (value, *_) in estimates.items()
    ]
    metadata = ModelCardData(
        license="mit",
        library_name="gravity-cnn",
        pipeline_tag="image-classification",
        tags=["cosmology", "general-relativity", "pytorch_model_hub_mixin", "model_hub_mixin"],
        model_name=name,
        eval_results=results or None,
    )
    text = _card_text(name, config, training, evaluation, estimates)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _card_text(
    name: str,
    config: dict[str, Any],
    training: dict[str, Any],
    evaluation: dict[str, Any],
    estimates: dict[str, list[float]],
) -> str:
    size, channels = config.get("size", 256), config.get("channels", 1)
    facts = (
        "\n".join(f"- {_text(key)}: {_text(value)}" for key, value in training.items()) or "- not recorded"
    )
    steps = [f"subtracts {config['mean']:.6g} and divides by {config['std']:.6g}"]
    if config.get("power"):
        steps.append("whitens the slices by the isotropic power spectrum of its training slices")
    calibration = config.get("calibration") or {}
    calibrated = "calibrated on validation seeds." if calibration else "not calibrated."
    if calibration.get("cubes"):
        calibrated += (
            "\n\nThe probability of a whole cube comes from the mean logit of all its slices:\n"
            "`network.calibration.cubes.probability(logits.mean())`, from validation cubes."
        )
    return f"""# {name}

A {_text(config["architecture"])} of width {_text(config["layer_param"])} that classifies 2D slices of a
cosmological simulation by its gravity: General Relativity (positive logit) or Newtonian gravity (negative
logit).

Input: slices (b, {channels}, {size}, {size}) with the values of the data file that it was trained on. The
network {" and ".join(steps)} itself. Output: one logit per slice; its `probability` is {calibrated}

It needs a checkout of gravity-cnn, torch, safetensors and huggingface_hub, in any folder:

```python
import sys

sys.path.insert(0, "gravity-cnn")  # the checkout
import models

network = models.load("model")  # this folder, in eval mode
logits = network(slices)
probability = network.probability(slices)
```

From the Hugging Face Hub: `import models.export`, then
`models.export.TrainedNetwork.from_pretrained("user/{name}")`.

## Training

{facts}

## Evaluation

{_measured(evaluation, estimates)}

## Limits

The network is valid for simulations like those of its training: the same code, box, resolution, redshift and
standardization. It may use artefacts of the simulation grid, which other simulations do not share; see the
evaluation report. It has never seen observations.
"""


def _measured(evaluation: dict[str, Any], estimates: dict[str, list[float]]) -> str:
    if not estimates:
        return "Not evaluated yet: `accelerate launch evaluation.py RUN` adds the results."
    rows = "\n".join(f"| {TITLES[key][1]} | {_interval(values)} |" for key, values in estimates.items())
    first, after = evaluation["seeds"]
    factor = evaluation.get("newton_augmentation", 1)
    warning = (
        f"**Newtonian slices were multiplied by {factor:g}: a test of the pipeline, not of gravity.**\n\n"
        if factor != 1
        else ""
    )
    return (
        f"{warning}Seeds {first} to {after - 1} of {_text(evaluation['data'])}, "
        f"{evaluation['slices']} slices; "
        f"95 % intervals over seeds.\n\n| | value [95 % interval] |\n|---|---|\n{rows}"
    )


def _text(value: Any) -> str:
    """A value as text without Markdown or HTML of its own."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(f"&#{ord(c)};" if c in "<>&|`*_[]\\\n\r" else c for c in text)


def _interval(values: list[Any]) -> str:
    value, *ends = values
    known = len(ends) == 2 and None not in ends
    return f"{value:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if known else "")
