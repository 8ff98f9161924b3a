"""The networks: registry, construction, and loading of trained ones.

A new network is one file and one line in `REGISTRY`; its class takes `NetworkSettings`.
"""

from __future__ import annotations

from system import UserError

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from models.batch_norm import synchronize_batch_norm
from models.calibration import Calibration, fit_calibration
from models.layers import ACTIVATIONS, PADDINGS, NetworkSettings
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
    "Calibration",
    "NetworkSettings",
    "Whitening",
    "build",
    "build_model",
    "fit_calibration",
    "isotropic_power",
    "load",
    "synchronize_batch_norm",
]

REGISTRY: dict[str, type[nn.Module]] = {"RACOON": Racoon, "PENGUIN": Penguin, "LYNX": Lynx}
SPELLINGS = {"RACCOON": "RACOON"}


def build_model(**keywords: Any) -> nn.Module:
    """`build` by keywords: architecture, layer_param, dropout, activation, padding, channels, size."""
    return build(NetworkSettings(**keywords))


def build(settings: NetworkSettings) -> nn.Module:
    """A network for slices (b, C, N, N) that returns logits (b,); positive means General Relativity.

    The weights are drawn from torch's generator in its current state. Raises UserError.
    """
    name = settings.architecture.upper()
    name = SPELLINGS.get(name, name)
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, 1)
        raise UserError(
            f"model_params.architecture: found '{settings.architecture}', allowed: {', '.join(REGISTRY)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return REGISTRY[name](settings)


def load(folder: str | Path) -> TrainedNetwork:
    """The trained network in `folder`, in eval mode on the CPU. Raises UserError if missing or damaged."""
    from models import export  # imports huggingface_hub, which takes half a second

    return export.load(folder)
