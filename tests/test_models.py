"""The networks: every shape as published, and what every registered network must do."""

import pytest
import torch
from torch import nn

import models
from models.batch_norm import ProcessSyncBatchNorm

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
        assert type(build(architecture.lower())) is models.REGISTRY[architecture]


def test_raccoon_is_racoon() -> None:
    assert type(build("Raccoon")) is models.REGISTRY["RACOON"]


def test_leaky_relu_has_slope_a_fifth() -> None:
    assert models.ACTIVATIONS["leaky_relu"]()(torch.tensor(-1.0)) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"architecture": "PENGIUN"}, "did you mean PENGUIN?"),
        ({"activation": "relu6"}, "model_params.activation: found 'relu6'"),
        ({"size": 100}, "a multiple of 64"),
    ],
)
def test_what_cannot_be_built_is_named(options: dict[str, object], text: str) -> None:
    with pytest.raises(models.ModelError) as error:
        build(**({"architecture": "RACOON"} | options))
    assert text in str(error.value)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dimensions", [2, 4])
def test_synchronised_normalisation_of_one_process_is_torchs(process_group: None, dimensions: int) -> None:
    plain = nn.BatchNorm2d(3) if dimensions == 4 else nn.BatchNorm1d(3)
    nn.init.uniform_(plain.weight)
    ours = ProcessSyncBatchNorm(3)
    ours.load_state_dict(plain.state_dict())
    batch = torch.randn(5, 3, *[4] * (dimensions - 2)) * 3 + 10
    inputs = [batch.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((plain, ours), inputs, strict=True)]
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for name, buffer in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer, rtol=1e-5, atol=1e-6)


def test_synchronised_normalisation_rounds_bfloat16_once(process_group: None) -> None:
    batch = (torch.randn(64, 3, 8, 8) + 20).bfloat16()
    exact = nn.BatchNorm2d(3).double()(batch.double())
    plain, ours = (
        (layer(batch) - exact).abs().max() for layer in (nn.BatchNorm2d(3), ProcessSyncBatchNorm(3))
    )
    assert ours <= 1.01 * plain


def test_synchronising_keeps_names_and_weights(process_group: None) -> None:
    network = build("PENGUIN")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    models.synchronize_batch_norm(network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in network.modules())
