"""Rendezvous: every rank connects to all others within a time limit, or all fail with a LaunchError."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

import system
from distributed.collectives import LAUNCH_SECONDS, RUN_SECONDS
from distributed.errors import LaunchError, ignore_launcher_sigterm, print_error


def init_process_group() -> None:
    """Meet the other processes, if there are any; to be called before the Accelerator is made.

    Raises:
        LaunchError: on every process, after LAUNCH_SECONDS, if one is missing or cannot be reached.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        os.environ.pop("LOCAL_RANK", None)  # or Accelerate joins the process to itself, by its device alone
        return
    rank, limit = int(os.environ["RANK"]), timedelta(seconds=LAUNCH_SECONDS)
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    # torchrun and accelerate keep the store themselves.
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def alone(found: str) -> LaunchError:
        return LaunchError(
            f"process {rank} of {processes} on {socket.gethostname()} could not meet the others\n"
            f"  meeting point: {host}:{port} (MASTER_ADDR:MASTER_PORT)\n  found: {found}\n"
            "  needed: hosts that reach each other at that address and, from any port to any other, on the\n"
            "  networks that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name",
            on_all_ranks=False,
        )

    with deadline(LAUNCH_SECONDS + 10, alone("no answer")):
        try:
            choose_network(host, port)
            server = dist.TCPStore(host, port, processes, keeps, timeout=limit, wait_for_workers=False)
            # After a worker died torchrun starts all anew, with the same store and what was said in it.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
            missing = wait_for_ranks(store, rank, processes)
            if not missing:
                dist.init_process_group(
                    backends(), store=store, rank=rank, world_size=processes, timeout=limit
                )
        except (RuntimeError, ValueError, OSError) as error:
            raise alone(str(error).splitlines()[0]) from error
    if missing:
        ignore_launcher_sigterm()
        raise LaunchError(f"{missing}\n  meeting point: {host}:{port} (MASTER_ADDR:MASTER_PORT)")
    # Accelerate passes LOCAL_RANK to DistributedDataParallel as the device, which is wrong where each rank sees
    # its own devices only (srun --gpus-per-task=1). Without it the network's own device counts.
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    # From now on one process may keep the others waiting for longer.
    set_timeout(timedelta(seconds=RUN_SECONDS))
    # Its threads must end before the interpreter does, or the process may abort at exit.
    atexit.register(dist.destroy_process_group)


def backends() -> str:
    """What joins the processes: gloo the hosts' memories, and NCCL (or what the device has) the devices."""
    device = torch.accelerator.current_accelerator()
    if device is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return "cpu:gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


@contextmanager
def deadline(seconds: float, error: LaunchError) -> Iterator[None]:
    """End the process with `error` and status 2 if what is inside takes longer, wherever it hangs.

    Gloo waits without limit for a process that fails to connect to it.
    """

    def end() -> None:
        print_error(error)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def choose_network(host: str, port: int) -> None:
    """Let gloo use the network that leads to the meeting point.

    By itself it takes the one that the host's own name stands for, which may reach no other host.
    """
    own = address_towards(host, port)
    processes = os.environ["WORLD_SIZE"]
    if own.startswith("127.") and os.environ.get("LOCAL_WORLD_SIZE", processes) != processes:
        # The name of the first host often means 127.0.1.1 there, where the other hosts cannot reach it.
        with suppress(OSError):
            own = address_towards("192.0.2.1", port)  # an address of nobody: by the default route
    for name, addresses in psutil.net_if_addrs().items():
        if own in (one.address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def address_towards(host: str, port: int) -> str:
    """The address of this host on the network that leads to another. Sends nothing."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
    return own


def wait_for_ranks(store: dist.Store, rank: int, processes: int) -> str:
    """Wait until all processes are there. Returns what to tell, the same on all, if some never came."""
    store.set(f"here/{rank}", socket.gethostname())
    if rank == 0:
        end = time.monotonic() + LAUNCH_SECONDS
        missing = list(range(processes))
        while missing := [other for other in missing if not store.check([f"here/{other}"])]:
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        hosts = sorted({store.get(f"here/{n}").decode() for n in range(processes) if n not in missing})
        found = f"of {processes} processes {system.format_ranges(missing)} did not come; the others are on "
        store.set("missing", found + ", ".join(hosts) if missing else "")
    store.wait(["missing"], timedelta(seconds=LAUNCH_SECONDS + 5))
    return store.get("missing").decode()
