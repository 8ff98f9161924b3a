"""Layers that the networks share."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2, inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
}
Padding = Literal["zeros", "circular"]
PADDINGS: tuple[str, ...] = get_args(Padding)


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
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False, padding_mode=padding_mode),
        nn.BatchNorm2d(outputs),
        ACTIVATIONS[activation](),
    )
