"""The networks: registry, construction, and loading of trained ones.

A new network is one file and one line in `REGISTRY`.
"""

from __future__ import annotations

from system import UserError

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from models.batch_norm import synchronize_batch_norm
from models.calibration import fit_calibration
from models.layers import ACTIVATIONS, PADDINGS
from models.lynx import Lynx
from models.penguin import Penguin
from models.racoon import Racoon
from models.whitening import Whitening, isotropic_power

if TYPE_CHECKING:
    from models.export import TrainedNetwork

__all__ = [
    "ACTIVATIONS",
    "PADDINGS",
    "REGISTRY",
    "Whitening",
    "build_model",
    "fit_calibration",
    "isotropic_power",
    "load",
    "synchronize_batch_norm",
]

REGISTRY: dict[str, type[nn.Module]] = {
    "RACOON": Racoon,
    "PENGUIN": Penguin,
    "LYNX": Lynx,
}
SPELLINGS = {"RACCOON": "RACOON"}


def architecture_name(architecture: str) -> str:
    """The registered name of `architecture`, in any case and any accepted spelling. Raises UserError."""
    name = SPELLINGS.get(architecture.upper(), architecture.upper())
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, 1)
        raise UserError(
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
    padding: str = "zeros",
) -> nn.Module:
    """A network for slices (b, `channels`, `size`, `size`) that returns logits (b,).

    `layer_param` is the width L of the network, `dropout` the probability on its fully connected layers,
    `size` any multiple of 64, `padding` that of the convolutions: `zeros`, or `circular` for a periodic box.
    The weights are drawn from torch's generator in its current state. Raises UserError.
    """
    name = architecture_name(architecture)
    if activation not in ACTIVATIONS:
        raise UserError(f"model_params.activation: found '{activation}', allowed: {', '.join(ACTIVATIONS)}")
    if padding not in PADDINGS:
        raise UserError(f"model_params.padding: found '{padding}', allowed: {', '.join(PADDINGS)}")
    if size < 64 or size % 64:
        raise UserError(f"side of a slice: found {size}, allowed: a multiple of 64")
    return REGISTRY[name](layer_param, dropout, activation, channels, size, padding)


def load(folder: str | Path) -> TrainedNetwork:
    """The trained network in `folder`, in eval mode on the CPU. Raises UserError if missing or damaged."""
    from models import export  # imports huggingface_hub, which takes half a second

    return export.load(folder)
