"""The networks: every shape as published, and what every registered network must do."""

from system import UserError

import pytest
import torch
from torch import nn

import models

SHAPES = {  # factors on layer_param and sides of the image, as published for 256 x 256
    "RACOON": [(1, 64), (4, 16), (8, 4)],
    "PENGUIN": [(1, 128), (2, 64), (4, 32), (6, 16), (8, 8), (10, 4)],
}
CONNECTED = {"RACOON": [(128, 1), (1, None)], "PENGUIN": [(160, 10), (10, 1), (1, None)]}


def build(architecture: str, **options: object) -> nn.Module:
    settings = {"architecture": architecture, "layer_param": 4, "dropout": 0.5} | options
    return models.build_model(**settings)


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_are_the_published_ones(architecture: str, width: int, channels: int) -> None:
    network = build(architecture, layer_param=width, channels=channels)
    shapes = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None, "a normalisation follows"
            module.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape[1:])))
    assert network(torch.randn(2, channels, 256, 256)).shape == (2,)
    assert shapes == [(factor * width, side, side) for factor, side in SHAPES[architecture]]
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    expected = [(i * width, o * width if o else 1) for i, o in CONNECTED[architecture]]
    assert [(layer.in_features, layer.out_features) for layer in linear] == expected


@pytest.mark.parametrize("architecture", models.REGISTRY)
class TestEveryNetwork:
    @pytest.mark.parametrize("size", [64, 128])
    @pytest.mark.parametrize("activation", models.ACTIVATIONS)
    def test_it_learns_from_slices_of_any_size(self, architecture: str, size: int, activation: str) -> None:
        torch.manual_seed(0)
        network = build(architecture, size=size, activation=activation)
        logits = network(torch.randn(4, 1, size, size))
        logits.sum().backward()
        assert logits.shape == (4,)
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        assert [name for name, gradient in gradients.items() if gradient is None] == []

    def test_the_same_seed_gives_the_same_weights(self, architecture: str) -> None:
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            states.append(torch.cat([p.flatten() for p in build(architecture).parameters()]))
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[0], states[2])

    def test_dropout_acts_in_training_alone(self, architecture: str) -> None:
        network = build(architecture, dropout=1.0, layer_param=8)
        slices = torch.randn(4, 1, 256, 256)
        assert network(slices).unique().numel() == 1, "with everything dropped only the last bias is left"
        network.eval()
        assert torch.equal(network(slices), network(slices))
        assert network(slices).unique().numel() > 1

    def test_any_case_is_understood(self, architecture: str) -> None:
        spelling = architecture.lower().replace("racoon", "raccoon")
        assert type(build(spelling)) is models.REGISTRY[architecture]


def test_leaky_relu_has_slope_a_fifth() -> None:
    assert models.ACTIVATIONS["leaky_relu"]()(torch.tensor(-1.0)) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"architecture": "PENGIUN"}, "did you mean PENGUIN?"),
        ({"activation": "relu6"}, "model_params.activation: found 'relu6'"),
        ({"size": 100}, "a multiple of 64"),
        ({"padding": "reflect"}, "padding: found 'reflect', allowed: zeros, circular"),
    ],
)
def test_what_cannot_be_built_is_named(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError) as error:
        build(**({"architecture": "RACOON"} | options))
    assert text in str(error.value)
