"""The start of a launch: its ranks connect, and compare their set-up before the first step."""

from __future__ import annotations

import system
from system import UserError

import ast
import atexit
import hashlib
import json
import os
import platform
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import DynamoBackend, is_torch_xla_available

from training.distributed.collectives import all_gather_json, raise_on_all_ranks, require_equal
from training.distributed.devices import device_type
from training.distributed.process import deadline, error_summary, share_cores

RUN_SECONDS = 1800.0
"""Longest wait for another rank after the start: rank 0 may write or verify files meanwhile."""

ROOT = Path(__file__).parents[2]
NOT_COMPUTING = {"preparation", "checkpoint", "logger.py", "trackers.py", "model_card.py", "__main__.py"}
"""Files and folders that leave the result of a training alone."""

PRECISIONS = ("no", "fp16", "bf16")
DYNAMO_BACKENDS = tuple(backend.lower() for backend in DynamoBackend.list())
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def init_process_group() -> None:
    """Connect this rank to the others, if there are any, and check the settings of the launcher. Collective.

    Call it before making the Accelerator.

    Raises:
        UserError: after LAUNCH_SECONDS, if a rank is missing or cannot be reached; on every rank, if the
            types of devices differ or a setting of the launcher is not supported.
    """
    if system.world_size() == 1:
        os.environ.pop("LOCAL_RANK", None)  # with it, Accelerate would make a process group without gloo
    else:
        connect()
    with raise_on_all_ranks():
        check_launch_settings()
    hosts = require_equal({"device": device_type()})
    if len(hosts) > 1 and "LOCAL_WORLD_SIZE" not in os.environ:  # only launchers and MPI set it
        os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(socket.gethostname()))
        share_cores()


def connect() -> None:
    """Make a process group of all ranks."""
    rank, size, seconds = system.rank(), system.world_size(), launch_seconds()
    host = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.setdefault("MASTER_PORT", "29500"))

    def did_not_connect(reason: str) -> UserError:
        return UserError(
            f"rank {rank} on {socket.gethostname()} did not connect to all {size} ranks at {host}:{port} "
            f"(MASTER_ADDR:MASTER_PORT): {reason}\n"
            "See the errors of other ranks. Check the address, and that the hosts reach each other on all\n"
            "ports of the network that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name."
        )

    with deadline(seconds + 10, did_not_connect("no answer")):
        try:
            choose_network(host, port)
            store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
            # After a failure torchrun starts the ranks again with the same store, which has old addresses.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(
                backends(), store=store, rank=rank, world_size=size, timeout=timedelta(seconds=RUN_SECONDS)
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise did_not_connect(error_summary(error)) from error
    # Otherwise Accelerate passes LOCAL_RANK to DistributedDataParallel as the device, which is wrong if each
    # rank sees its own device only (srun --gpus-per-task=1).
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    # Its threads must end before the interpreter does. Otherwise the process may abort at exit.
    atexit.register(dist.destroy_process_group)


def launch_seconds() -> int:
    """How long ranks wait for one another at the start; to be raised where importing torch takes minutes."""
    return system.read_int("LAUNCH_SECONDS", 50, minimum=1)


def backends() -> str:
    """Backends of the process group: gloo for host memory, and NCCL or the device's own for device memory."""
    devices = dict.fromkeys(("cpu", device_type()))
    return ",".join(f"{device}:{dist.get_default_backend_for_device(device)}" for device in devices)


def choose_network(host: str, port: int) -> None:
    """Let gloo use the network interface that leads to the rendezvous, unless GLOO_SOCKET_IFNAME is set.

    By default gloo takes the interface of this host's own name, which may reach no other host.
    """
    own = address_towards(host, port)
    processes = os.environ["WORLD_SIZE"]
    if own.startswith("127.") and os.environ.get("LOCAL_WORLD_SIZE", processes) != processes:
        # On the first host its name often means 127.0.1.1, where other hosts cannot reach it.
        with suppress(OSError):
            own = address_towards("192.0.2.1", port)  # a reserved address (RFC 5737): gives the default route
    for name, addresses in psutil.net_if_addrs().items():
        if own in (address.address for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def address_towards(host: str, port: int) -> str:
    """This host's address on the network that leads to `host`. Sends nothing."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
    return own


def check_launch_settings() -> None:
    """Raise UserError if `accelerate launch` passes on a setting that is invalid or not supported.

    Accelerate would ignore some of these, and fail with a traceback on others.
    """
    for name, setting in UNSUPPORTED.items():
        if system.read_flag(name):
            source = name_setting(name.removeprefix("ACCELERATE_").lower())
            raise UserError(
                f"{setting} is not supported ({source}), because the networks fit into one device. "
                "Use a configuration in accelerate_configs/."
            )
    if is_torch_xla_available():
        raise UserError("TPUs are not supported. Uninstall torch_xla, or set USE_TORCH_XLA=false.")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    for setting, value, allowed in (
        ("mixed_precision", precision, PRECISIONS),
        ("dynamo_backend", compiler, DYNAMO_BACKENDS),
    ):
        if value not in allowed:
            raise UserError(
                f"{name_setting(setting)}: found {value[:40]!r}, allowed: {', '.join(allowed)}. Correct it."
            )
    system.read_int("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1, minimum=1)


def name_setting(setting: str) -> str:
    """A setting of the launch, such as mixed_precision, with where `accelerate launch` took it from."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        words = []
    if words and not any(Path(word).name in ("launch", "accelerate-launch") for word in words):
        return f"environment variable ACCELERATE_{setting.upper()}"
    if f"--{setting}" in words:
        return f"--{setting} of accelerate launch"
    file = words[words.index("--config_file") + 1] if "--config_file" in words else default_config_file
    return f"{setting} of {file if Path(file).is_file() else 'accelerate launch'}"


def preflight(accelerator: Accelerator, config: Mapping[str, Any]) -> str:
    """Compare all ranks. Returns one line with hosts, ranks, device, versions and hashes. Collective.

    `config` is the resolved configuration, {section: {key: value}}.

    Raises:
        UserError: on every rank, if the devices do not reach each other, the ranks differ, or the run folder
            is not shared.
    """
    assert accelerator.num_processes == system.world_size()
    sum_over_devices(accelerator)
    file, code = Path(config["data_params"]["datafile"]), code_hash()
    hosts = require_equal(
        {
            "mixed precision": accelerator.mixed_precision,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "code": code,
            "size of the data file": f"{file.stat().st_size} bytes" if file.exists() else "no such file",
        }
        | {f"{section}.{key}": repr(value) for section, keys in config.items() for key, value in keys.items()}
    )
    require_shared(system.existing_parent(Path(config["train_params"]["log_dir"])))
    ranks_of = {host: [rank for rank, name in enumerate(hosts) if name == host] for host in hosts}
    where = ", ".join(f"{host}: {system.format_ranges(ranks)}" for host, ranks in ranks_of.items())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return (
        f"{len(hosts)} process{'es' if len(hosts) > 1 else ''} ({where}), {accelerator.device.type}, "
        f"torch {torch.__version__}, accelerate {accelerate.__version__}, configuration {digest}, code {code}"
    )


def sum_over_devices(accelerator: Accelerator) -> None:
    """Sum one number over the devices of all ranks, within LAUNCH_SECONDS. Collective.

    The first collective on devices makes their communicators, which can wait for ever for a failed rank.

    Raises:
        UserError: if the devices do not reach each other, or ranks share a device.
    """
    if not dist.is_initialized():
        return
    rank, size = dist.get_rank(), dist.get_world_size()

    def not_reached(reason: str) -> UserError:
        return UserError(
            f"rank {rank} on {socket.gethostname()}: device {accelerator.device} does not reach the devices "
            f"of the other ranks: {reason}\n"
            "Start at most one rank per device. Set NCCL_DEBUG=INFO to see more, and NCCL_SOCKET_IFNAME to\n"
            "choose the network."
        )

    with deadline(launch_seconds(), not_reached("no answer")):
        try:
            ones = torch.ones(1, device=accelerator.device)
            dist.all_reduce(ones)
            total = int(ones.item())
        except RuntimeError as error:
            raise not_reached(error_summary(error)) from error
    if total != size:
        raise not_reached(f"as many ones as ranks ({size}) add to {total}")


def require_shared(folder: Path) -> None:
    """Raise UserError on all ranks if one cannot write to `folder` or has another one there. Collective."""
    with ExitStack() as marks:
        with raise_on_all_ranks():
            try:
                mark = marks.enter_context(tempfile.NamedTemporaryFile(prefix=".preflight-", dir=folder))
            except OSError as error:
                raise UserError(
                    f"cannot write to {folder}: {error.strerror}. Choose another train_params.log_dir."
                ) from None
        first = Path(all_gather_json(mark.name)[0])
        with raise_on_all_ranks():
            if not first.exists():
                raise UserError(
                    f"{folder} is not the folder that rank 0 has there. Choose a train_params.log_dir that "
                    "all hosts share."
                )


@cache
def code_hash(root: Path = ROOT) -> str:
    """Hash of the code that computes a training, when this is first called; comments do not count.

    It is that of trainer.py and of the Python files in training/, models/ and datasets/, but for
    NOT_COMPUTING, as they are parsed, without docstrings.
    """
    digest = hashlib.sha256()
    folders = (root / "training", root / "models", root / "datasets")
    for path in (root / "trainer.py", *(path for folder in folders for path in sorted(folder.rglob("*.py")))):
        if NOT_COMPUTING.isdisjoint(path.relative_to(root).parts):
            tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(body := getattr(node, "body", None), list):
                    body[:] = [line for line in body if not is_docstring(line)]
            digest.update(f"{path.relative_to(root)} {ast.dump(tree)}".encode())
    return digest.hexdigest()[:8]


def is_docstring(line: ast.AST) -> bool:
    """Whether a statement is a mere text, as docstrings are."""
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
