"""Batch normalization synchronized over all ranks, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Normalise(torch.autograd.Function):
    """Batch normalisation by given statistics, those of the batches of all processes, and its gradient.

    The kernels are torch's own for known statistics. The statistics depend on the input too: what that adds
    to its gradient are the two sums of Ioffe & Szegedy (2015, arXiv:1502.03167), taken over all processes.
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
        by_input, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([by_weight, by_bias]).double()
        dist.all_reduce(sums)
        of_weight, of_bias = (sums / n).chunk(2)
        inverse = (variance.double() + ctx.eps).rsqrt()
        slope = weight * inverse * inverse * of_weight
        offset = weight * inverse * of_bias - slope * mean
        shape = [1, -1] + [1] * (input.dim() - 2)
        slope, offset = (part.to(by_input.dtype).view(shape) for part in (slope, offset))
        # In place: each pass over the images costs as much as the arithmetic of several.
        by_input.addcmul_(input.to(by_input.dtype), slope, value=-1).sub_(offset)
        return by_input, by_weight, by_bias, None, None, None, None


class ProcessSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the mean and variance of the batches of all processes.

    torch's own SyncBatchNorm runs on accelerators only; this one runs wherever the process group does.
    Sums over processes are taken in float64, so that it hardly matters how the batch is shared out.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, found {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """(b, channels, ...) -> the same shape, normalised per channel."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            mean, variance, n = self._statistics(input)
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore
            self.running_var.lerp_((variance * n / (n - 1)).to(variance.dtype), self.momentum)  # type: ignore
        weight = self.weight if self.affine else torch.ones_like(mean)
        bias = self.bias if self.affine else torch.zeros_like(mean)
        output: Tensor = _Normalise.apply(input, weight, bias, mean, variance, n, self.eps)
        return output

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance (channels,) over all processes, and the number of values they are of."""
        count = input.numel() // input.shape[1]
        values = input.to(self.running_mean.dtype)  # type: ignore[union-attr]
        mean, variance = (part.double() for part in torch.batch_norm_update_stats(values, None, None, 0.0))
        sums = torch.cat([mean * count, (variance + mean * mean) * count, mean.new_tensor([count])])
        dist.all_reduce(sums)
        total, square, n = sums.split([len(mean), len(mean), 1])
        mean = total / n
        return mean.to(values.dtype), (square / n - mean * mean).to(values.dtype), n


def synchronize_batch_norm(network: nn.Module) -> None:
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
            device = child.running_mean.device  # type: ignore[union-attr]
            kind = nn.SyncBatchNorm if device.type == "cuda" else ProcessSyncBatchNorm
            replacement = kind(child.num_features, child.eps, child.momentum, child.affine)
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement.to(device))
