"""RACOON: three convolutions that each divide the side of the image by four."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from models.layers import ACTIVATIONS, Padding, convolution_block


class Racoon(nn.Module):
    """For N = 256, width L: (C, 256, 256) -> (L, 64, 64) -> (4L, 16, 16) -> (8L, 4, 4) -> L -> 1 logit.

    The convolutions have no padding: every `padding` gives the same network.
    """

    def __init__(
        self,
        layer_param: int,
        dropout: float,
        activation: str,
        channels: int,
        size: int,
        padding: Padding,
    ) -> None:
        super().__init__()
        widths = [channels, layer_param, 4 * layer_param, 8 * layer_param]
        self.features = nn.Sequential(
            *(
                convolution_block(i, o, kernel=4, stride=4, padding=0, activation=activation)
                for i, o in pairwise(widths)
            )
        )
        side = size // 4**3
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(8 * layer_param * side * side, layer_param),
            ACTIVATIONS[activation](),
            nn.Dropout(dropout),
            nn.Linear(layer_param, 1),
        )

    def forward(self, slices: Tensor) -> Tensor:
        """Slices (b, C, N, N) -> logits (b,); positive means General Relativity."""
        return self.classifier(self.features(slices)).squeeze(1)
