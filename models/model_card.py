"""The model card of a trained network, in Hugging Face's form."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TITLES = {  # report key -> (Hugging Face's name of the metric, what the card calls it)
    "accuracy": ("accuracy", "accuracy of slices"),
    "auc": ("roc_auc", "area under the ROC curve, slices"),
    "log_loss": ("log_loss", "log loss of slices"),
    "cube_accuracy": ("accuracy", "accuracy of cubes, by their mean logit"),
    "pair_accuracy": ("accuracy", "twins ranked correctly, by their mean logit"),
}


def model_card(config: dict[str, Any]) -> ModelCard:
    """The model card of a network, all of it from its configuration."""
    name = str((config.get("training") or {}).get("run", "gravity-cnn"))
    evaluation, training = config.get("evaluation") or {}, config.get("training") or {}
    estimates = {
        key: evaluation["estimates"][key] for key in TITLES if key in evaluation.get("estimates", {})
    }
    data = str(evaluation.get("data", "simulations"))
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="cosmological-simulations",
            dataset_name=data,
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
    return ModelCard(
        f"---\n{metadata.to_yaml()}\n---\n\n{_card_text(name, config, training, evaluation, estimates)}"
    )


def _card_text(
    name: str,
    config: dict[str, Any],
    training: dict[str, Any],
    evaluation: dict[str, Any],
    estimates: dict[str, list[float]],
) -> str:
    size, channels = config.get("size", 256), config.get("channels", 1)
    facts = "\n".join(f"- {key}: {json.dumps(value)}" for key, value in training.items()) or "- not recorded"
    if estimates:
        rows = "\n".join(f"| {TITLES[key][1]} | {_interval(numbers)} |" for key, numbers in estimates.items())
        first, after = evaluation["seeds"]
        factor = evaluation.get("newton_augmentation", 1)
        artificial = (
            f"**Newtonian slices were multiplied by {factor:g}: a test of the pipeline, not of gravity.**\n\n"
        )
        measured = (artificial if factor != 1 else "") + (
            f"Seeds {first} to {after - 1} of `{evaluation['data']}`, {evaluation['slices']} slices; "
            "95 % intervals by bootstrap over seeds, of cubes and of twins exact binomial ones.\n\n"
            f"| | value [95 % interval] |\n|---|---|\n{rows}"
        )
    else:
        measured = "Not evaluated yet: `accelerate launch evaluation.py RUN` fills this in."
    return f"""# {name}

A {config["architecture"]} of width {config["layer_param"]} that tells from 2D slices of a cosmological
simulation whether it ran under General Relativity (positive logit) or Newtonian gravity (negative logit).

Input: slices ({channels}, {size}, {size}) with the values of the data file it was trained on; the network
subtracts {config["mean"]:.6g} and divides by {config["std"]:.6g} itself. Output: one logit per slice.

```python
import models  # from a checkout of gravity-cnn

network = models.load("model")  # this folder, in eval mode
logits = network(slices)
```

`models.TrainedNetwork.from_pretrained("user/{name}")` loads it from the Hugging Face Hub.

## Training

{facts}

## Evaluation

{measured}

## Limits

It knows simulations like those it was trained on: the same code, box, resolution, redshift and
standardisation. It has seen no observations.
"""


def _interval(numbers: list[Any]) -> str:
    value, *ends = numbers
    known = len(ends) == 2 and None not in ends
    return f"{value:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if known else "")
