"""Settings of `accelerate launch` that this trainer does not support."""

from __future__ import annotations

import system

import os
from collections.abc import Sequence

from accelerate.utils import DynamoBackend, is_torch_xla_available, str_to_bool

from training.distributed.errors import LaunchError

PRECISIONS = ("no", "fp16", "bf16")
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def check_launch_settings() -> None:
    """Check the environment variables in which `accelerate launch` passes its settings on.

    Call this before making the Accelerator, which ignores some invalid settings and fails with a traceback
    on others.

    Raises:
        LaunchError: if a setting is invalid or not supported.
    """
    for name, setting in UNSUPPORTED.items():
        if read_flag(name):
            raise LaunchError(
                f"{setting} is not supported, because the networks fit into one device. "
                "Use a configuration in accelerate_configs/."
            )
    if is_torch_xla_available():
        raise LaunchError("TPUs are not supported. Uninstall torch_xla, or set USE_TORCH_XLA=false.")
    read_flag("ACCELERATE_USE_CPU")
    require_choice("ACCELERATE_MIXED_PRECISION", PRECISIONS)
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").upper() not in DynamoBackend.list():
        require_choice("ACCELERATE_DYNAMO_BACKEND", [name.lower() for name in DynamoBackend.list()])
    try:
        system.read_int("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1, minimum=1)
    except ValueError as error:
        raise LaunchError(str(error)) from None


def read_flag(name: str) -> bool:
    """The boolean in an environment variable, as Accelerate reads it. Raises LaunchError that names it."""
    found = os.environ.get(name, "false")
    try:
        return bool(str_to_bool(found))
    except ValueError:
        raise LaunchError(
            f"environment variable {name}: found {found[:40]!r}, allowed: true or false. "
            "Correct it or unset it."
        ) from None


def require_choice(name: str, choices: Sequence[str]) -> None:
    """Raise a LaunchError if an environment variable holds none of `choices`."""
    found = os.environ.get(name, "no")
    if found not in choices:
        raise LaunchError(
            f"environment variable {name}: found {found[:40]!r}, allowed: {', '.join(choices)}. "
            "Correct it or the accelerate configuration."
        )
