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
    """The live tensors of the state, not copied; called by all processes together.

    "model": weights and buffers by name. "optimizer": what Adam keeps of each parameter as PARAMETER/exp_avg,
    PARAMETER/exp_avg_sq and PARAMETER/step. "random": the state of each generator, (processes, bytes) uint8.
    """
    device = accelerator.device
    rows = {name: generator[None].to(device) for name, generator in _generators(device).items()}
    return {
        "model": {_plain(name): tensor for name, tensor in accelerator.get_state_dict(model).items()},
        "optimizer": {
            f"{name}/{key}": value
            for name, parameter in _parameters(accelerator, model).items()
            for key, value in optimizer.state.get(parameter, {}).items()
        },
        # As bytes through a gather: gather_object would pickle them.
        "random": accelerator.gather(rows),
    }


def not_finite(parts: Parts) -> list[str]:
    """Names of the weights and moments that hold an infinity or no number."""
    values = {**parts["model"], **parts["optimizer"]}
    return [name for name, value in values.items() if not torch.isfinite(value).all()]


def copy(parts: Parts) -> Parts:
    """An independent copy in host memory, each tensor contiguous."""
    return {
        part: {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        for part, tensors in parts.items()
    }


def differences(parts: Parts, accelerator: Accelerator, model: nn.Module) -> list[str]:
    """One line per weight or buffer in which `parts` and the model differ in name, shape or type."""
    saved, own = _shapes(parts["model"]), _shapes(accelerator.unwrap_model(model).state_dict())
    return [
        f"{name}: saved as {saved.get(name)}, now {own.get(name)}"
        for name in {**saved, **own}
        if saved.get(name) != own.get(name)
    ]


def restore(
    parts: Parts,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
    step: int,
) -> None:
    """Set the state that `capture` saw; the optimizer keeps its own learning rate and other settings.

    Generators of which nothing was saved (a process or a device is new) follow from (seed, step, process).
    """
    for name, tensor in accelerator.unwrap_model(model).state_dict().items():
        tensor.copy_(parts["model"][_plain(name)])
    _restore_moments(parts["optimizer"], _parameters(accelerator, model), optimizer)
    process = accelerator.process_index
    derived = np.random.SeedSequence([seed, step, process]).generate_state(3)
    torch_seed, numpy_seed, python_seed = derived.tolist()
    torch.manual_seed(torch_seed)  # every device's generator too
    np.random.seed(numpy_seed)
    random.seed(python_seed)
    # Cloned, because torch reads a generator's state as aligned words and crashes in the middle of a file.
    rows = {name: rows[process].clone() for name, rows in parts["random"].items() if process < len(rows)}
    _set_generators(rows, accelerator.device)


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


def _parameters(accelerator: Accelerator, model: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain(name): parameter for name, parameter in accelerator.unwrap_model(model).named_parameters()}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {_plain(name): f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def _restore_moments(
    saved: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    of_parameter: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        # Moments lie in memory as their parameter does (channels_last), as if they had grown with it.
        moment = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        of_parameter.setdefault(parameter, {})[key] = moment
    # Through load_state_dict, which knows where the step counts of each kind of Adam have to be.
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {i: of_parameter[one] for i, one in enumerate(in_order) if one in of_parameter}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The state of every random generator in use, each as one uint8 vector of constant length."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": _as_bytes([*keys, position, has_gauss, cached]),
        "python": _as_bytes([*words, math.nan if gauss is None else gauss]),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        *keys, position, has_gauss, cached = _from_bytes(states["numpy"])
        np.random.set_state(("MT19937", np.array(keys, np.uint32), int(position), int(has_gauss), cached))
    if "python" in states:
        *words, gauss = _from_bytes(states["python"])
        random.setstate((3, tuple(int(word) for word in words), None if math.isnan(gauss) else gauss))
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def _as_bytes(numbers: list[Any]) -> Tensor:
    """Numbers as the bytes of float64, which holds 32-bit words and floats exactly."""
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64).view(torch.uint8)


def _from_bytes(state: Tensor) -> list[float]:
    return state.view(torch.float64).tolist()
