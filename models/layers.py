"""Layers that the networks share."""

from __future__ import annotations

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


class CircularConv2d(nn.Conv2d):
    """Convolution with periodic boundaries that keeps channels_last images channels_last.

    `nn.Conv2d(padding_mode="circular")` computes the same, but returns to the default layout.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(b, C, N, N) -> (b, outputs, N / stride, N / stride)."""
        for dimension in (2, 3):
            width, padding = input.shape[dimension], int(self.padding[dimension - 2])
            last, first = (
                input.narrow(dimension, width - padding, padding),
                input.narrow(dimension, 0, padding),
            )
            input = torch.cat([last, input, first], dimension)
        return nn.functional.conv2d(input, self.weight, self.bias, self.stride)


def convolution_block(
    inputs: int,
    outputs: int,
    *,
    kernel: int,
    stride: int,
    padding: int,
    activation: str,
    padding_mode: Padding = "zeros",
) -> nn.Sequential:
    """Convolution, batch normalisation, activation; the stride does the downsizing.

    The convolution has no bias: the normalisation that follows would subtract it again.
    """
    convolution = CircularConv2d if padding_mode == "circular" and padding else nn.Conv2d
    return nn.Sequential(
        convolution(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        ACTIVATIONS[activation](),
    )
