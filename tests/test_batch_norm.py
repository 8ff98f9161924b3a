"""Synchronized batch normalization in one process; test_processes.py trains with it on several ranks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import models
from models.batch_norm import SyncBatchNorm, _statistics


def build(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build_model(architecture=architecture, layer_param=2, dropout=0.0, size=64)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "fixed"])
@pytest.mark.parametrize("dimensions", [2, 4])
def test_with_one_rank_it_equals_that_of_torch(process_group: None, dimensions: int, affine: bool) -> None:
    plain = nn.BatchNorm2d(3, affine=affine) if dimensions == 4 else nn.BatchNorm1d(3, affine=affine)
    if affine:
        nn.init.uniform_(plain.weight)
    synchronized = SyncBatchNorm(3, affine=affine)
    synchronized.load_state_dict(plain.state_dict())
    batch = torch.randn(5, 3, *[4] * (dimensions - 2)) * 3 + 10
    inputs = [batch.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((plain, synchronized), inputs, strict=True)]
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for name, buffer in plain.state_dict().items():
        torch.testing.assert_close(synchronized.state_dict()[name], buffer, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(synchronized.eval()(batch), plain.eval()(batch))


def test_bfloat16_is_rounded_once(process_group: None) -> None:
    batch = (torch.randn(64, 3, 8, 8) + 20).bfloat16()
    exact = nn.BatchNorm2d(3).double()(batch.double())
    plain, synchronized = (
        (layer(batch) - exact).abs().max() for layer in (nn.BatchNorm2d(3), SyncBatchNorm(3))
    )
    assert synchronized <= 1.01 * plain


def test_names_and_weights_are_kept(process_group: None) -> None:
    network = build("PENGUIN")
    before = network.state_dict()
    models.synchronize_batch_norm(network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in network.modules())


def test_float32_is_enough_for_values_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mean of 1000 standard deviations, E[x^2] - E[x]^2 has an error of 20 % in float32."""
    ranks = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0)) + 1000
    gathered = []
    for values in ranks:
        variance, mean = torch.var_mean(values, 0, correction=0)
        gathered.append(torch.cat([mean, variance, torch.tensor([1000.0])]))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        torch.distributed, "all_gather", lambda outputs, _: torch._foreach_copy_(outputs, gathered)
    )
    mean, variance, n = _statistics(ranks[0])
    values = ranks.flatten(0, 1).double()
    assert mean.dtype == variance.dtype == torch.float32
    assert n.item() == 2000
    torch.testing.assert_close(mean.double(), values.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), values.var(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("parallel", [False, True], ids=["alone", "DDP"])
def test_a_network_compiles_into_one_graph(process_group: None, parallel: bool) -> None:
    torch._dynamo.reset()
    counters.clear()
    images, states = torch.randn(4, 1, 64, 64), []
    for compiled in (False, True):
        network = build("RACOON")
        models.synchronize_batch_norm(network)
        if compiled:
            network.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        model = DistributedDataParallel(network) if parallel else network
        with torch._dynamo.config.patch(optimize_ddp=False):  # as compile_network sets it
            model(images).square().sum().backward()
        states.append([*network.buffers(), *(parameter.grad for parameter in network.parameters())])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for eager, compiled_value in zip(*states, strict=True):
        torch.testing.assert_close(compiled_value, eager, rtol=1e-4, atol=1e-5)
