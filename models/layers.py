"""What the networks share: the convolutional block and batch normalisation over all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2, inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
}


def convolution_block(
    inputs: int, outputs: int, *, kernel: int, stride: int, padding: int, activation: str
) -> nn.Sequential:
    """Convolution, batch normalisation, activation; the stride does the downsizing.

    The convolution has no bias: the normalisation that follows would subtract it again.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        ACTIVATIONS[activation](),
    )


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class ProcessSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the mean and variance of the batches of all processes.

    torch's own SyncBatchNorm runs on accelerators only; this one runs wherever the process group does.
    Sums are taken in float64, so that the statistics do not depend on how the batch is shared out.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, found {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """(b, channels, ...) -> the same shape, normalised per channel."""
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        wide = input.double()
        count = wide.new_tensor([input.numel() // input.shape[1]])
        sums = torch.cat([wide.sum(axes), (wide * wide).sum(axes), count])
        sums = _SumOverProcesses.apply(sums)
        total, square, (n,) = sums.split([input.shape[1], input.shape[1], 1])
        mean = total / n
        variance = square / n - mean * mean
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            unbiased = variance * (n / (n - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)  # type: ignore
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)  # type: ignore
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        precise = torch.promote_types(input.dtype, torch.float32)  # bfloat16 is rounded once, at the end
        scale, shift = (factor.to(precise).view(shape) for factor in (scale, shift))
        return (input.to(precise) * scale + shift).to(input.dtype)


def synchronise_batch_norm(network: nn.Module) -> None:
    """Replace every batch normalisation in `network` by one over all processes, keeping its parameters.

    Names of parameters and buffers stay the same, so checkpoints fit either way. Does nothing where there
    is no process group.
    """
    if not dist.is_initialized():
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                continue
            device = child.weight.device.type
            kind = nn.SyncBatchNorm if device == "cuda" else ProcessSyncBatchNorm
            replacement = kind(child.num_features, child.eps, child.momentum)
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement.to(child.weight.device))
