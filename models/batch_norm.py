"""Batch normalization synchronized over all ranks, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Normalize(torch.autograd.Function):
    """Batch normalization by the statistics of all ranks, and its gradient.

    The kernels are those of torch for given statistics. As the statistics depend on the input, its gradient
    has two more terms, sums over the batch (Ioffe & Szegedy 2015, arXiv:1502.03167), here over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        n: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, variance, n)
        ctx.eps = eps
        return nn.functional.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, variance, n = ctx.saved_tensors
        input_gradient, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([weight_gradient, bias_gradient])
        dist.all_reduce(sums)
        mean_weight_gradient, mean_bias_gradient = (sums / n).chunk(2)
        inverse_std = (variance + ctx.eps).rsqrt()
        slope = weight * inverse_std.square() * mean_weight_gradient
        offset = weight * inverse_std * mean_bias_gradient - slope * mean
        shape = [1, -1] + [1] * (input.dim() - 2)
        slope, offset = (part.to(input_gradient.dtype).view(shape) for part in (slope, offset))
        # In place: each pass over the images costs as much as the arithmetic of several.
        input_gradient.addcmul_(input.to(input_gradient.dtype), slope, value=-1).sub_(offset)
        return input_gradient, weight_gradient, bias_gradient, None, None, None, None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization by the mean and variance over the batches of all ranks.

    torch's class of this name needs an accelerator, makes the host wait for it in every call, and breaks
    compiled graphs. This one runs on every device and compiles into one graph. It needs no float64, which
    some devices lack.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, channels, ...) -> the same shape, normalized per channel. Collective in training."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            mean, variance, n = _statistics(input.to(self.running_mean.dtype))  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore
            self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)  # type: ignore
        weight = self.weight if self.affine else torch.ones_like(mean)
        bias = self.bias if self.affine else torch.zeros_like(mean)
        output: Tensor = _Normalize.apply(input, weight, bias, mean, variance, n, self.eps)
        return output


def _statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (channels,) of `values` (b, channels, ...) of all ranks, and their number (1,).

    The statistics of ranks are combined without subtracting large numbers, so float32 is enough (Chan, Golub
    & LeVeque 1983, The American Statistician 37, 242).
    """
    channels = values.shape[1]
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)  # var_mean is 10 times slower
    else:
        dimensions = [0, *range(2, values.dim())]
        variance, mean = torch.var_mean(values, dimensions, correction=0)
    # Filled on the device: copying a number from the host would make the host wait.
    count = torch.full((1,), values.numel() // channels, dtype=mean.dtype, device=mean.device)
    own = torch.cat([mean, variance, count])
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    means, variances, counts = torch.stack(ranks).split([channels, channels, 1], dim=1)
    n = counts.sum(0)
    mean = (means * counts).sum(0) / n
    variance = ((variances + (means - mean).square()) * counts).sum(0) / n
    return mean, variance, n


def synchronize_batch_norm(network: nn.Module) -> None:
    """Let every batch normalization in `network` use the batches of all ranks.

    Parameters and buffers stay the same, so checkpoints fit either way. Does nothing where there is no
    process group.
    """
    for module in network.modules() if dist.is_initialized() else ():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm  # type: ignore[assignment]  # same parameters and buffers
