"""PENGUIN: six convolutions that each divide the side of the image by two."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from models.layers import ACTIVATIONS, NetworkSettings, convolution_block


class Penguin(nn.Module):
    """For N = 256, width L: (C, 256, 256) -> (L, 128, 128) -> (2L, 64, 64) -> (4L, 32, 32) -> (6L, 16, 16)
    -> (8L, 8, 8) -> (10L, 4, 4) -> 10L -> L -> 1 logit. The fully connected layers are normalized too.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        width = settings.layer_param
        widths = [settings.channels, *(factor * width for factor in (1, 2, 4, 6, 8, 10))]
        self.features = nn.Sequential(
            *(convolution_block(settings, i, o, kernel=4, stride=2, padding=1) for i, o in pairwise(widths))
        )
        side = settings.size // 2**6
        layers: list[nn.Module] = [nn.Flatten()]
        for i, o in pairwise([10 * width * side * side, 10 * width, width]):
            layers += [nn.Linear(i, o, bias=False), nn.BatchNorm1d(o)]
            layers += [ACTIVATIONS[settings.activation](), nn.Dropout(settings.dropout)]
        self.classifier = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, slices: Tensor) -> Tensor:
        """Slices (b, C, N, N) -> logits (b,); positive means General Relativity."""
        return self.classifier(self.features(slices)).squeeze(1)
