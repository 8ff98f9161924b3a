"""The networks: registry, construction, and loading of trained ones.

A new network is one file and one line in `REGISTRY`; its class takes `NetworkSettings`.
"""

from __future__ import annotations

from system import UserError

import difflib
from typing import Any

from torch import nn

from models.batch_norm import synchronize_batch_norm
from models.calibration import Calibration, fit_calibration
from models.export import TrainedNetwork, load
from models.layers import ACTIVATIONS, PADDINGS, NetworkSettings
from models.lynx import Lynx
from models.penguin import Penguin
from models.racoon import Racoon
from models.whitening import Whitening, isotropic_power

__all__ = [
    "ACTIVATIONS",
    "PADDINGS",
    "REGISTRY",
    "Calibration",
    "NetworkSettings",
    "TrainedNetwork",
    "Whitening",
    "build",
    "build_model",
    "fit_calibration",
    "isotropic_power",
    "load",
    "synchronize_batch_norm",
]

REGISTRY: dict[str, type[nn.Module]] = {"RACOON": Racoon, "PENGUIN": Penguin, "LYNX": Lynx}


def build_model(**keywords: Any) -> nn.Module:
    """`build` by keywords: architecture, layer_param, dropout, activation, padding, channels, size."""
    return build(NetworkSettings(**keywords))


def build(settings: NetworkSettings) -> nn.Module:
    """A network for slices (b, C, N, N) that returns logits (b,); positive means General Relativity.

    The weights are drawn from torch's generator in its current state. Raises UserError.
    """
    name = settings.architecture.upper().replace("RACCOON", "RACOON")
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, 1)
        raise UserError(
            f"model_params.architecture: found '{settings.architecture}', allowed: {', '.join(REGISTRY)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return REGISTRY[name](settings)
