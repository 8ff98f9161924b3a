"""A process that has imported the trainer and both launchers, and forks them: a start costs milliseconds.

Importing torch takes seconds, and tests start hundreds of processes. `ForkServer` starts the server as
`python tests/fork_server.py` and sends it requests, one JSON object per line; each gets one line as a reply.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
TIMEOUT = 240.0


class ForkServer:
    """The client: starts trainings and launchers in forks of the server."""

    def __init__(self) -> None:
        # Without OMP_NUM_THREADS, which a training takes as set by the user.
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fork_server.py")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the server and every process that it started."""
        with self._server:
            self._server.kill()

    def train(self, arguments: list[Any], out: Path, **request: Any) -> list[int]:
        """Run `trainer.main(arguments)` on one or more ranks; returns their exit codes (negative: a signal).

        `arguments` is one list for all ranks, or a list for each. What they print is appended to `out`.
        Further keys of `request`, all optional:

        - world_size: number of ranks (1)
        - hosts: network namespace and host name of each rank
        - environment: further environment variables
        - record: a folder to which each rank writes the ids, mask and learning rate of its steps, RANK.json
        - send: [signal, function, n, ...]: the signal at call n, from 0, of "trainer.train_step", say
        - rank: the only rank to which `send` applies (all)
        - closed_streams: without standard input, output and error
        - max_bytes: maximum size of a file in bytes, as on a full disk
        - grace: seconds that the other ranks get to end when one has failed, before SIGKILL (1)
        """
        codes: list[int] = self._request(train=arguments, out=str(out), **request)["codes"]
        return codes

    def launch(self, *command: str, out: Path, **environment: str) -> Launcher:
        """Start `accelerate` or `torchrun` with arguments, as from a shell in the checkout."""
        pid = self._request(launch=command, out=str(out), environment=environment)["pid"]
        return Launcher(self, pid, out)

    def poll(self, pid: int) -> int | None:
        """The exit code of a launcher; None while it runs."""
        code: int | None = self._request(poll=pid)["code"]
        return code

    def _request(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        reply: dict[str, Any] = json.loads(self._server.stdout.readline())
        return reply


class Launcher:
    """A launcher that a ForkServer started."""

    def __init__(self, server: ForkServer, pid: int, out: Path) -> None:
        self.process, self._server, self._out = psutil.Process(pid), server, out

    @property
    def output(self) -> str:
        """What the launcher and its workers have printed."""
        return self._out.read_text()

    def wait(self) -> int:
        """The exit code, when the launcher and all its workers have ended."""
        end = time.monotonic() + TIMEOUT
        workers: set[psutil.Process] = set()
        while (code := self._server.poll(self.process.pid)) is None:
            assert time.monotonic() < end, self.output
            with contextlib.suppress(psutil.NoSuchProcess):
                workers.update(self.process.children(recursive=True))
            time.sleep(0.05)
        _, alive = psutil.wait_procs(workers, timeout=TIMEOUT)
        assert not alive, self.output
        return code

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds while the launcher runs."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert self._server.poll(self.process.pid) is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.02)

    def kill(self) -> None:
        """End the launcher and its workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                process.kill()


# The server


def fork(work: Callable[[], int | None], out: str) -> int:
    """Call `work` in a child that prints to `out` and exits with the status it returns; returns its id."""
    child = os.fork()
    if child:
        return child
    status: int | None = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the server
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = work()
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def serve_launch(request: dict[str, Any]) -> dict[str, Any]:
    """Start a launcher."""
    program, *arguments = request["launch"]
    modules = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}

    def work() -> int | None:
        os.environ.update(request["environment"])
        sys.argv = [program, *arguments]
        status: int | None = importlib.import_module(modules[program]).main()
        return status

    return {"pid": fork(work, request["out"])}


def serve_poll(request: dict[str, Any]) -> dict[str, Any]:
    """The exit code of a launcher, if it has ended."""
    child, status = os.waitpid(request["poll"], os.WNOHANG)
    return {"code": os.waitstatus_to_exitcode(status) if child else None}


def serve_train(request: dict[str, Any]) -> dict[str, Any]:
    """Run a training to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world_size = request.get("world_size", 1)
    ranks = {
        fork(lambda rank=rank: train(request, rank, world_size, port), request["out"]): rank  # type: ignore[misc]
        for rank in range(world_size)
    }
    codes: dict[int, int] = {}
    end = time.monotonic() + TIMEOUT
    while running := [child for child, rank in ranks.items() if rank not in codes]:
        for child in running:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[ranks[child]] = os.waitstatus_to_exitcode(status)
                if status:
                    end = time.monotonic() + request.get("grace", 1)
        if time.monotonic() >= end:
            for child in (child for child, rank in ranks.items() if rank not in codes):
                os.kill(child, signal.SIGKILL)
            end = math.inf
        time.sleep(0.001)
    return {"codes": [codes[rank] for rank in sorted(codes)]}


def train(request: dict[str, Any], rank: int, world_size: int, port: int) -> int:
    """`trainer.main` on one rank."""
    import trainer

    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
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
    arguments = request["train"]
    arguments = arguments[rank] if isinstance(arguments[0], list) else arguments
    if "record" not in request:
        return trainer.main(arguments)
    steps: list[dict[str, Any]] = []
    step = trainer.train_step

    def recorded(run: Any, batch: Any, lr: float) -> Any:
        steps.append({"ids": batch.ids.tolist(), "mask": batch.mask.tolist(), "lr": lr})
        return step(run, batch, lr)

    trainer.train_step = recorded
    status = trainer.main(arguments)
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


def serve() -> None:
    """Import what every start imports sooner or later, then serve requests until standard input ends."""
    sys.path.insert(0, str(ROOT))
    for module in (
        "trainer",
        "analysis.figures",
        "accelerate.commands.accelerate_cli",
        "torch._dynamo",
        "torch.distributed.run",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(module)
    from numba.core.registry import cpu_target

    cpu_target.typing_context.refresh()  # takes a second, otherwise in every child
    cpu_target.target_context.refresh()
    kinds = {"train": serve_train, "launch": serve_launch, "poll": serve_poll}
    for line in sys.stdin:
        request = json.loads(line)
        reply = next(serve(request) for kind, serve in kinds.items() if kind in request)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()
