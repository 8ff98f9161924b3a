"""The padding of the convolutions."""

import pytest
import torch
from torch import nn

import models
from models.layers import CircularConv2d


@pytest.mark.parametrize(("padding", "periodic"), [("circular", True), ("zeros", False)])
def test_penguin_with_circular_padding_sees_a_periodic_box(padding: str, periodic: bool) -> None:
    torch.manual_seed(0)
    network = models.build_model(architecture="PENGUIN", layer_param=2, size=128, padding=padding).eval()
    slices = torch.randn(2, 1, 128, 128)
    # Six strides of 2: a shift by 64 cells moves the last feature map by one.
    moved, features = network.features(slices.roll(64, 2)), network.features(slices)
    assert torch.allclose(moved, features.roll(1, 2), atol=1e-5) == periodic


@pytest.mark.parametrize("architecture", models.REGISTRY)
def test_padding_changes_no_weights(architecture: str) -> None:
    initial, logits = [], []
    for options in ({}, {"padding": "circular"}):
        torch.manual_seed(1)
        network = models.build_model(architecture=architecture, layer_param=4, size=64, **options)
        initial.append([tensor.clone() for tensor in network.state_dict().values()])
        logits.append(network(torch.randn(4, 1, 64, 64)))
    assert all(torch.equal(*weights) for weights in zip(*initial, strict=True))
    assert torch.equal(*logits) == (architecture == "RACOON"), "RACOON pads nothing"


def test_circular_convolution_is_torchs_and_keeps_the_memory_format() -> None:
    expected = nn.Conv2d(3, 5, 4, stride=2, padding=1, padding_mode="circular")
    convolution = CircularConv2d(3, 5, 4, stride=2, padding=1)
    convolution.load_state_dict(expected.state_dict())
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    output = convolution.to(memory_format=torch.channels_last)(images)
    torch.testing.assert_close(output, expected(images))
    assert output.is_contiguous(memory_format=torch.channels_last)
