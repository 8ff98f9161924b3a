"""RACOON: three convolutions that each divide the side of the image by four."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from models.layers import ACTIVATIONS, NetworkSettings, convolution_block


class Racoon(nn.Module):
    """For N = 256, width L: (C, 256, 256) -> (L, 64, 64) -> (4L, 16, 16) -> (8L, 4, 4) -> L -> 1 logit.

    The convolutions have no padding: every `padding` gives the same network.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        width = settings.layer_param
        self.features = nn.Sequential(
            *(
                convolution_block(settings, i, o, kernel=4, stride=4)
                for i, o in pairwise([settings.channels, width, 4 * width, 8 * width])
            )
        )
        side = settings.size // 4**3
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(8 * width * side * side, width),
            ACTIVATIONS[settings.activation](),
            nn.Dropout(settings.dropout),
            nn.Linear(width, 1),
        )

    def forward(self, slices: Tensor) -> Tensor:
        """Slices (b, C, N, N) -> logits (b,); positive means General Relativity."""
        return self.classifier(self.features(slices)).squeeze(1)
