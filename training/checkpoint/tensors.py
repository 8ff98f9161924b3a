"""The state of a training as named tensors, exact to the bit: weights, moments and random generators."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

Parts = dict[str, dict[str, Tensor]]


def capture(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> Parts:
    """The live tensors of the state, not copied. Collective.

    `model`: weights and buffers by name. `optimizer`: Adam's state of each parameter as PARAMETER/exp_avg,
    PARAMETER/exp_avg_sq and PARAMETER/step. `random`: the state of each generator, (ranks, bytes) uint8.
    """
    device, network = accelerator.device, accelerator.unwrap_model(model)
    rows = {name: state[None].to(device) for name, state in _generators(device).items()}
    return {
        "model": accelerator.get_state_dict(model),
        "optimizer": {
            f"{name}/{key}": value
            for name, parameter in network.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        },
        # Gathered as bytes: gather_object would pickle them.
        "random": accelerator.gather(rows),
    }


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold an infinity or a NaN."""
    return [name for name, value in tensors.items() if not torch.isfinite(value).all()]


def copy(parts: Parts) -> Parts:
    """An independent copy in host memory, each tensor contiguous."""
    return {
        part: {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        for part, tensors in parts.items()
    }


def restore(
    parts: Parts,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
    step: int,
) -> None:
    """Set the state that `capture` returned; the optimizer keeps its own learning rate and other settings.

    Generators without a saved state (of a new rank or device) are seeded from (seed, step, rank).
    """
    network = accelerator.unwrap_model(model)
    network.load_state_dict(parts["model"])
    _restore_moments(parts["optimizer"], dict(network.named_parameters()), optimizer)
    rank = accelerator.process_index
    seeds = np.random.SeedSequence([seed, step, rank]).generate_state(3).tolist()
    torch.manual_seed(seeds[0])  # the generators of all devices
    np.random.seed(seeds[1])
    random.seed(seeds[2])
    if rank < len(parts["random"]["torch"]):
        # Cloned: torch reads a generator's state as aligned words, and rows of a file need not be aligned.
        states = {name: rows[rank].clone() for name, rows in parts["random"].items()}
        _set_generators(states, accelerator.device)


def _restore_moments(
    saved: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    moments: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        # In the memory format of their parameter (channels_last), as Adam itself creates them.
        moment = value if key == "step" else torch.empty_like(parameter).copy_(value)
        moments.setdefault(parameter, {})[key] = moment
    # Through load_state_dict, which knows where each kind of Adam keeps its step counts.
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {i: moments[parameter] for i, parameter in enumerate(order) if parameter in moments}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The state of every random generator in use, each as one uint8 vector of constant length."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": _to_bytes([*keys, position, has_gauss, cached]),
        "python": _to_bytes([*words, math.nan if gauss is None else gauss]),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss, cached = _from_bytes(states["numpy"])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), int(position), int(has_gauss), cached))
    *words, gauss = _from_bytes(states["python"])
    random.setstate((3, tuple(int(word) for word in words), None if math.isnan(gauss) else gauss))
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def _to_bytes(numbers: list[Any]) -> Tensor:
    """Numbers as the bytes of float64, which holds 32-bit words and floats exactly."""
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64).view(torch.uint8)


def _from_bytes(state: Tensor) -> list[float]:
    return state.view(torch.float64).tolist()
