"""Trainings and launchers in forks of a server that has imported everything: a start costs milliseconds.

Importing torch takes seconds, and tests start hundreds of processes. The server is that of multiprocessing;
conftest.py starts it. Children are not forked from pytest itself, whose threads and state they would inherit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

PROCESSES = multiprocessing.get_context("forkserver")
TIMEOUT = 240.0
LAUNCHERS = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}


def start(function: Callable[..., int | None], *arguments: Any, out: Path) -> ForkServerProcess:
    """Call `function` in a child that appends its output to `out` and exits with the returned status."""
    process = PROCESSES.Process(target=_child, args=(function, arguments, out))
    process.start()
    return process


def _child(function: Callable[..., int | None], arguments: Any, out: Path) -> None:
    status: Any = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the server
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = function(*arguments)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def free_port() -> int:
    """A port that no program uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class ForkServer:
    """Starts trainings and launchers."""

    def train(
        self, arguments: list[Any], out: Path, *, world_size: int = 1, grace: float = 1, **request: Any
    ) -> list[int | None]:
        """Run `trainer.main(arguments)` on one or more ranks; returns their exit codes (negative: a signal).

        `arguments` is one list for all ranks, or a list for each. What they print is appended to `out`. When
        a rank has failed, the others get `grace` seconds to end before SIGKILL. `request`: see `train_rank`.
        """
        launch = {"world_size": world_size, "port": free_port(), **request}
        each = arguments if isinstance(arguments[0], list) else [arguments] * world_size
        ranks = [start(train_rank, each[rank], rank, launch, out=out) for rank in range(world_size)]
        end = time.monotonic() + TIMEOUT
        while running := [process for process in ranks if process.is_alive()]:
            wait([process.sentinel for process in running], timeout=max(0.0, end - time.monotonic()))
            if time.monotonic() >= end:
                for process in running:
                    process.kill()
            if any(process.exitcode for process in ranks):
                end = min(end, time.monotonic() + grace)
        return [process.exitcode for process in ranks]

    def launch(self, *command: str, out: Path, **environment: str) -> Launcher:
        """Start `accelerate` or `torchrun` with arguments, as from a shell in the checkout."""
        return Launcher(start(launch, command, environment, out=out), out)


class Launcher:
    """A launcher that a ForkServer started."""

    def __init__(self, child: ForkServerProcess, out: Path) -> None:
        self._child, self._out = child, out
        self.process = psutil.Process(child.pid)

    @property
    def output(self) -> str:
        """What the launcher and its workers have printed."""
        return self._out.read_text()

    def wait(self) -> int | None:
        """The exit code, when the launcher and all its workers have ended."""
        end = time.monotonic() + TIMEOUT
        workers: set[psutil.Process] = set()
        while self._child.is_alive():
            assert time.monotonic() < end, self.output
            with contextlib.suppress(psutil.NoSuchProcess):
                workers.update(self.process.children(recursive=True))
            self._child.join(0.05)
        _, alive = psutil.wait_procs(workers, timeout=TIMEOUT)
        assert not alive, self.output
        return self._child.exitcode

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds while the launcher runs."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert self._child.is_alive(), self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.02)

    def kill(self) -> None:
        """End the launcher and its workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                process.kill()


# In the children


def launch(command: tuple[str, ...], environment: dict[str, str]) -> int | None:
    """Run a launcher."""
    program, *arguments = command
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    status: int | None = importlib.import_module(LAUNCHERS[program]).main()
    return status


def train_rank(arguments: list[str], rank: int, request: dict[str, Any]) -> int:
    """`trainer.main` on one rank. Keys of `request`, optional but for the first two:

    - world_size, port: of the launch
    - hosts: network namespace and host name of each rank
    - environment: further environment variables
    - record: a folder to which each rank writes the ids, mask and learning rate of its steps, RANK.json
    - send: [signal, function, n, ...]: the signal at call n, from 0, of "trainer.train_step", say
    - rank: the only rank to which `send` applies (all)
    - closed_streams: without standard input, output and error
    - max_bytes: maximum size of a file in bytes, as on a full disk
    """
    import trainer

    if (world_size := request["world_size"]) > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
        os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if "hosts" in request:
        become_host(*request["hosts"][rank])
        os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.update(request.get("environment", {}))
    if "send" in request and request.get("rank", rank) == rank:
        for triple in zip(*[iter(request["send"])] * 3, strict=True):
            send_at_call(*triple)
    if request.get("closed_streams"):
        for descriptor in (0, 1, 2):
            os.close(descriptor)
    if "max_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_bytes"], resource.RLIM_INFINITY))
    steps: list[dict[str, Any]] = []
    step = trainer.train_step

    def recorded(run: Any, batch: Any, lr: float) -> Any:
        steps.append({"ids": batch.ids.tolist(), "mask": batch.mask.tolist(), "lr": lr})
        return step(run, batch, lr)

    if "record" in request:
        trainer.train_step = recorded
    status = trainer.main(arguments)
    if "record" in request:
        Path(request["record"]).mkdir(parents=True, exist_ok=True)
        Path(request["record"], f"{rank}.json").write_text(json.dumps(steps))
    return status


def become_host(namespace: str, name: str) -> None:
    """Enter a network namespace made by `ip netns add`, and take a host name."""
    clone_newnet, clone_newuts = 0x40000000, 0x04000000  # see <sched.h>
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), clone_newnet) or libc.unshare(clone_newuts):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname(name)


def send_at_call(name: str, function: str, fatal: int) -> None:
    """The signal `name` to this process at the given call, counted from 0, of a function, before it runs."""
    path, last = function.rsplit(".", 1)
    module, *attributes = path.split(".")
    owner: Any = importlib.import_module(module)
    for attribute in attributes:
        owner = getattr(owner, attribute)
    original, passed = getattr(owner, last), itertools.count()

    def guarded(*arguments: Any, **keywords: Any) -> Any:
        if next(passed) == fatal:
            os.kill(os.getpid(), signal.Signals[name])
        return original(*arguments, **keywords)

    setattr(owner, last, guarded)
