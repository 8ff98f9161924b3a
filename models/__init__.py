"""The networks. A new one is a file beside this and a line in `REGISTRY`."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from torch import nn

from models.batch_norm import synchronize_batch_norm
from models.layers import ACTIVATIONS
from models.penguin import Penguin
from models.racoon import Racoon

if TYPE_CHECKING:
    from models.export import TrainedNetwork, load, save

__all__ = [
    "ACTIVATIONS",
    "REGISTRY",
    "ModelError",
    "TrainedNetwork",
    "build_model",
    "load",
    "save",
    "synchronize_batch_norm",
]

REGISTRY: dict[str, type[nn.Module]] = {
    "RACOON": Racoon,
    "PENGUIN": Penguin,
}
SPELLINGS = {"RACCOON": "RACOON"}


def __getattr__(name: str) -> Any:
    """What stands for trained networks, imported at its first use: the hub's library takes a while."""
    if name not in ("TrainedNetwork", "export", "load", "save"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    export = importlib.import_module("models.export")  # `from models import export` would ask here again
    return export if name == "export" else getattr(export, name)


class ModelError(ValueError):
    """A network that cannot be built or loaded as asked."""


def architecture_name(architecture: str) -> str:
    """The registered name of `architecture`, in any case and any known spelling."""
    name = SPELLINGS.get(architecture.upper(), architecture.upper())
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, 1)
        raise ModelError(
            f"model_params.architecture: found '{architecture}', allowed: {', '.join(REGISTRY)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return name


def build_model(
    *,
    architecture: str,
    layer_param: int,
    dropout: float,
    activation: str = "relu",
    channels: int = 1,
    size: int = 256,
) -> nn.Module:
    """A network for slices (b, `channels`, `size`, `size`) that returns logits (b,).

    `layer_param` is the width L of the network, `dropout` the probability on its fully connected layers,
    `size` any multiple of 64. The weights are drawn from torch's generator in its current state.
    """
    name = architecture_name(architecture)
    if activation not in ACTIVATIONS:
        raise ModelError(f"model_params.activation: found '{activation}', allowed: {', '.join(ACTIVATIONS)}")
    if size < 64 or size % 64:
        raise ModelError(f"the side of a slice: found {size}, allowed: a multiple of 64")
    return REGISTRY[name](layer_param, dropout, activation, channels, size)
