"""The state of a training as named tensors, exact to the bit: weights, moments and random generators."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

Parts = dict[str, dict[str, Tensor]]

MOMENTS = {"exp_avg", "exp_avg_sq", "step"}
AMSGRAD_MOMENTS = MOMENTS | {"max_exp_avg_sq"}
MT19937_WORDS = 624  # of the Mersenne twister of numpy and Python, besides their other fields


def capture(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> Parts:
    """The live tensors of the state, not copied. Collective.

    `model`: weights and buffers by name. `optimizer`: Adam's state of each parameter as PARAMETER/exp_avg,
    PARAMETER/exp_avg_sq and PARAMETER/step. `random`: the state of each generator, (ranks, bytes) uint8.
    """
    device = accelerator.device
    rows = {name: state[None].to(device) for name, state in _generators(device).items()}
    return {
        "model": {_plain(name): tensor for name, tensor in accelerator.get_state_dict(model).items()},
        "optimizer": {
            f"{name}/{key}": value
            for name, parameter in _parameters(accelerator, model).items()
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


def find_problem(parts: Parts, state: dict[str, Any]) -> str | None:
    """The first tensor that cannot belong to a training in `state`, with the reason; None if all can."""
    counters = state["train_state"]
    try:
        _check_moments(parts["model"], parts["optimizer"], step=counters["step"])
        for part in ("model", "optimizer"):
            if names := not_finite(parts[part]):
                raise ValueError(f"{part}.safetensors: {names[0]} is not finite")
        _check_generators(parts["random"], state["environment"]["num_processes"])
        _check_predictions(parts["extra"], counters["step_in_epoch"])
    except (ValueError, RuntimeError) as error:  # torch has no such operation on some types
        return str(error)
    return None


def _check_moments(weights: dict[str, Tensor], moments: dict[str, Tensor], *, step: int) -> None:
    keys: dict[str, set[str]] = {}
    for full_name, value in moments.items():
        name, _, key = full_name.rpartition("/")
        if name not in weights:
            raise ValueError(f"optimizer.safetensors has {full_name}, model.safetensors has no {name!r}")
        expected = _describe(weights[name] if key != "step" else torch.tensor(0.0))
        if _describe(value) != expected:
            raise ValueError(f"optimizer.safetensors: {full_name} is {_describe(value)}, not {expected}")
        keys.setdefault(name, set()).add(key)
    for name, found in keys.items():
        if found not in (MOMENTS, AMSGRAD_MOMENTS):
            raise ValueError(f"optimizer.safetensors: found {', '.join(sorted(found))} of {name}")
    if bool(keys) != (step > 0):
        raise ValueError(f"optimizer.safetensors has {len(keys)} parameters at step {step}")


def _check_generators(rows: dict[str, Tensor], num_processes: int) -> None:
    """Raise ValueError unless the states of every rank can be set. They are set on new generators."""
    attempts: dict[str, Callable[[Tensor], Any]] = {
        "torch": lambda state: torch.Generator().set_state(state),
        "numpy": _numpy_state,
        "python": lambda state: random.Random().setstate(_python_state(state)),
    }
    for name, states in rows.items():
        if states.dtype != torch.uint8 or states.dim() != 2 or len(states) != num_processes:
            found = f"{_describe(states)} for {num_processes} ranks"
            raise ValueError(f"random.safetensors: {name} is {found}, not one row of bytes each")
    if missing := attempts.keys() - rows.keys():
        raise ValueError(f"random.safetensors has no {', '.join(sorted(missing))}")
    for rank in range(num_processes):
        for name, attempt in attempts.items():
            try:
                attempt(rows[name][rank].clone())
            except (ValueError, OverflowError, RuntimeError) as error:
                raise ValueError(f"random.safetensors: {name} is not a generator's state: {error}") from None


def _check_predictions(tensors: dict[str, Tensor], step_in_epoch: int) -> None:
    if not step_in_epoch and not tensors:
        return
    if tensors.keys() != {"ids", "logits"} or not step_in_epoch:
        raise ValueError(
            f"extra.safetensors: found tensors {sorted(tensors)} at step {step_in_epoch} of an epoch"
        )
    ids, logits = tensors["ids"], tensors["logits"]
    types = (ids.dtype, logits.dtype)
    if ids.dim() != 1 or ids.shape != logits.shape or types != (torch.int64, torch.float32):
        raise ValueError(f"extra.safetensors: ids {_describe(ids)} do not match logits {_describe(logits)}")
    if (ids < 0).any() or len(ids.unique()) != len(ids) or not torch.isfinite(logits).all():
        raise ValueError("extra.safetensors: ids are not unique sample ids, or logits are not finite")
    if len(ids) == 0 or len(ids) % step_in_epoch:  # only the last batch of an epoch may be smaller
        raise ValueError(f"extra.safetensors: {len(ids)} predictions are not those of {step_in_epoch} steps")


def differences(parts: Parts, accelerator: Accelerator, model: nn.Module) -> list[str]:
    """One line per tensor that the live training has with another name, shape or type than `parts`."""
    network = accelerator.unwrap_model(model)
    saved, live = _shapes(parts["model"]), _shapes(network.state_dict())
    lines = [
        f"{name}: saved as {saved.get(name)}, now {live.get(name)}"
        for name in {**saved, **live}
        if saved.get(name) != live.get(name)
    ]
    parameters = {name for name, one in _parameters(accelerator, model).items() if one.requires_grad}
    with_moments = {name.rpartition("/")[0] for name in parts["optimizer"]}
    if with_moments and (others := sorted(parameters ^ with_moments)):
        lines.append(f"moments of {', '.join(others[:4])}: saved for other parameters than are trained now")
    for name, state in _generators(accelerator.device).items():
        if name in parts["random"] and parts["random"][name].shape[1:] != state.shape:
            lines.append(
                f"generator {name}: saved as {parts['random'][name].shape[1]} bytes, now {len(state)}"
            )
    return lines


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
    for name, tensor in accelerator.unwrap_model(model).state_dict().items():
        tensor.copy_(parts["model"][_plain(name)])
    _restore_moments(parts["optimizer"], _parameters(accelerator, model), optimizer)
    rank = accelerator.process_index
    derived = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    torch_seed, numpy_seed, python_seed = derived.tolist()
    torch.manual_seed(torch_seed)  # the generators of all devices
    np.random.seed(numpy_seed)
    random.seed(python_seed)
    # Cloned: torch reads a generator's state as aligned words, and rows of a file need not be aligned.
    states = {name: rows[rank].clone() for name, rows in parts["random"].items() if rank < len(rows)}
    _set_generators(states, accelerator.device)


def _plain(name: str) -> str:
    """A parameter's name without the prefix of torch.compile."""
    return name.replace("_orig_mod.", "")


def _parameters(accelerator: Accelerator, model: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain(name): parameter for name, parameter in accelerator.unwrap_model(model).named_parameters()}


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _shapes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {_plain(name): _describe(tensor) for name, tensor in tensors.items()}


def _restore_moments(
    saved: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    by_parameter: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        # In the memory format of their parameter (channels_last), as Adam itself creates them.
        moment = value if key == "step" else torch.empty_like(parameter).copy_(value)
        by_parameter.setdefault(parameter, {})[key] = moment
    # Through load_state_dict, which knows where each kind of Adam keeps its step counts.
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {i: by_parameter[one] for i, one in enumerate(order) if one in by_parameter}
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
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        np.random.set_state(_numpy_state(states["numpy"]))
    if "python" in states:
        random.setstate(_python_state(states["python"]))
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def _numpy_state(state: Tensor) -> tuple[str, np.ndarray, int, int, float]:
    """The arguments of np.random.set_state, which checks neither the position nor the words."""
    *words, position, has_gauss, cached = _from_bytes(state, MT19937_WORDS + 3)
    position, has_gauss = _integers([position, has_gauss], below=MT19937_WORDS + 1)
    return "MT19937", np.array(_integers(words, below=2**32), np.uint32), position, has_gauss, cached


def _python_state(state: Tensor) -> tuple[int, tuple[int, ...], float | None]:
    """The argument of random.setstate."""
    *words, gauss = _from_bytes(state, MT19937_WORDS + 2)
    return 3, tuple(_integers(words, below=2**32)), None if math.isnan(gauss) else gauss


def _to_bytes(numbers: list[Any]) -> Tensor:
    """Numbers as the bytes of float64, which holds 32-bit words and floats exactly."""
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64).view(torch.uint8)


def _from_bytes(state: Tensor, length: int) -> list[float]:
    if len(state) != 8 * length:
        raise ValueError(f"found {len(state)} bytes, allowed: {8 * length}")
    return state.view(torch.float64).tolist()


def _integers(numbers: list[float], *, below: int) -> list[int]:
    for number in numbers:
        if not (0 <= number < below and number.is_integer()):
            raise ValueError(f"found {number}, allowed: an integer below {below}")
    return [int(number) for number in numbers]
