"""Rendezvous: every rank connects to all others within a time limit, or every rank raises a LaunchError."""

from __future__ import annotations

import system

import atexit
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

from training.distributed.collectives import RUN_SECONDS, format_ranks, raise_on_all_ranks
from training.distributed.devices import device_of_rank, require_own_devices
from training.distributed.errors import LaunchError, deadline, error_summary, ignore_launcher_sigterm
from training.distributed.launcher import check_launch_settings


def init_process_group() -> None:
    """Connect this rank to the others, if there are any, and check settings and devices of the launch.

    Call it before making the Accelerator.

    Raises:
        LaunchError: on every rank. After LAUNCH_SECONDS, if a rank is missing or cannot be reached; if a
            setting of the launcher is not supported; if ranks share a device.
    """
    if system.world_size() == 1:
        os.environ.pop("LOCAL_RANK", None)  # with it, Accelerate would make a process group without gloo
    else:
        connect()
    with raise_on_all_ranks():
        check_launch_settings()
    require_own_devices()


def connect() -> None:
    """Make a process group of all ranks."""
    processes = system.world_size()
    rank, seconds = system.rank(), system.launch_seconds()
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), system.read_int("MASTER_PORT", 29500)
    # torchrun and accelerate run the store themselves.
    serves_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def did_not_connect(reason: str) -> LaunchError:
        return LaunchError(
            f"rendezvous of {processes} ranks at {host}:{port} (MASTER_ADDR:MASTER_PORT): "
            f"rank {rank} on {socket.gethostname()} did not connect: {reason}\n"
            "Check the address, and that the hosts reach each other on all ports of the network that\n"
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name.",
            on_all_ranks=False,
        )

    with deadline(seconds + 10, did_not_connect("no answer")):
        try:
            choose_network(host, port)
            server = dist.TCPStore(
                host,
                port,
                processes,
                serves_store,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
            # After a failure torchrun restarts all ranks with the same store, which still holds the old keys.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
            missing = wait_for_ranks(store, rank, processes, seconds)
            if not missing:
                dist.init_process_group(
                    backends(),
                    store=store,
                    rank=rank,
                    world_size=processes,
                    timeout=timedelta(seconds=seconds),
                )
        except (RuntimeError, ValueError, OSError) as error:
            raise did_not_connect(error_summary(error)) from error
    if missing:
        ignore_launcher_sigterm()
        raise LaunchError(
            f"rendezvous of {processes} ranks at {host}:{port} (MASTER_ADDR:MASTER_PORT): {missing}"
        )
    # Otherwise Accelerate passes LOCAL_RANK to DistributedDataParallel as the device, which is wrong if each
    # rank sees its own device only (srun --gpus-per-task=1).
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    # From now on a rank may keep the others waiting for longer.
    set_timeout(timedelta(seconds=RUN_SECONDS))
    # Its threads must end before the interpreter does. Otherwise the process may abort at exit.
    atexit.register(dist.destroy_process_group)


def backends() -> str:
    """Backends of the process group: gloo for host memory, and NCCL or the device's own for device memory."""
    device = device_of_rank()
    if device.type == "cpu":
        return "cpu:gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


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


def wait_for_ranks(store: dist.Store, rank: int, processes: int, seconds: float) -> str:
    """Wait until all ranks are at the store. Returns, the same on all ranks, which did not connect, or ""."""
    store.set(f"host/{rank}", socket.gethostname())
    if rank == 0:
        end = time.monotonic() + seconds
        missing = list(range(processes))
        while missing := [other for other in missing if not store.check([f"host/{other}"])]:
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        connected = [other for other in range(processes) if other not in missing]
        hosts = sorted({store.get(f"host/{other}").decode() for other in connected})
        text = (
            f"{format_ranks(missing)} did not connect; {format_ranks(connected)} did, on {', '.join(hosts)}"
        )
        store.set("missing", text if missing else "")
    store.wait(["missing"], timedelta(seconds=seconds + 5))
    return store.get("missing").decode()
