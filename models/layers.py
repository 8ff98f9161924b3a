"""The settings of a network, and the layers that networks share."""

from __future__ import annotations

from system import UserError

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2, inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
}
Padding = Literal["zeros", "circular"]
PADDINGS: tuple[str, ...] = get_args(Padding)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """What determines a network but for its weights. Raises UserError if a value is not allowed."""

    architecture: str
    """A key of `models.REGISTRY`, in any case."""
    layer_param: int
    """The width L."""
    dropout: float = 0.0
    """Probability, on the fully connected layers."""
    activation: str = "relu"
    padding: Padding = "zeros"
    """Of the convolutions; `circular` for a periodic box."""
    channels: int = 1
    size: int = 256
    """N, a multiple of 64, of slices (b, channels, N, N)."""
    octaves: int = 0
    """Scales at which LYNX filters a slice; 0: from N down to 64 cells per side. Earlier versions had 1."""

    def __post_init__(self) -> None:
        for key, allowed in (("activation", ACTIVATIONS), ("padding", PADDINGS)):
            if (value := getattr(self, key)) not in allowed:
                raise UserError(f"model_params.{key}: found {value!r}, allowed: {', '.join(allowed)}")
        if self.size < 64 or self.size % 64:
            raise UserError(f"side of a slice: found {self.size}, allowed: a multiple of 64")
        if self.octaves == 0:
            object.__setattr__(self, "octaves", (self.size // 64).bit_length())


class CircularConv2d(nn.Conv2d):
    """Convolution with periodic boundaries that keeps channels_last images channels_last.

    `nn.Conv2d(padding_mode="circular")` computes the same, but returns to the default layout.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(b, C, N, N) -> (b, outputs, N / stride, N / stride)."""
        for dimension in (2, 3):
            width, padding = input.shape[dimension], int(self.padding[dimension - 2])
            last = input.narrow(dimension, width - padding, padding)
            first = input.narrow(dimension, 0, padding)
            input = torch.cat([last, input, first], dimension)
        return nn.functional.conv2d(input, self.weight, self.bias, self.stride)


def convolution_block(
    settings: NetworkSettings, inputs: int, outputs: int, *, kernel: int, stride: int, padding: int = 0
) -> nn.Sequential:
    """Convolution, batch normalization, activation; the stride does the downsizing.

    The convolution has no bias: the normalization that follows would subtract it again.
    """
    convolution = CircularConv2d if settings.padding == "circular" and padding else nn.Conv2d
    return nn.Sequential(
        convolution(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        ACTIVATIONS[settings.activation](),
    )
