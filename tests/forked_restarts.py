"""A server that starts trainer.py as often as requested, and kills it.

It has imported everything and forks, because importing torch takes seconds. It reads one JSON object per line
from standard input and answers each with one line. Keys of a request:

    arguments    of trainer.py
    out          file for standard output and standard error
    world_size   number of ranks (1)
    send         [signal, function, n]: send this signal at call n of, say, "trainer.train_step", from 0
    rank         send it to this rank only (all ranks)
    max_bytes    size limit of every file, as on a full disk

After one rank ends with an error, the others get a second and then SIGKILL, as a launcher would do it. The
answer holds the exit `codes` (negative: the signal) and the `seconds` of the run.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch._dynamo
import torch.utils.tensorboard
from numba.core.registry import cpu_target

import trainer
from analysis import figures

# Loaded here once instead of in every child.
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
assert all(module is not None for module in (torch._dynamo, torch.utils.tensorboard, figures))


def send_at_call(name: str, function: str, fatal: int) -> None:
    """Send the signal `name` to this process at call `fatal` of a function, before it runs."""
    *path, last = function.split(".")
    owner: Any = sys.modules[path[0]]
    for part in path[1:]:
        owner = getattr(owner, part)
    original, passed = getattr(owner, last), itertools.count()

    def guarded(*arguments: Any, **keywords: Any) -> Any:
        if next(passed) == fatal:
            os.kill(os.getpid(), signal.Signals[name])
        return original(*arguments, **keywords)

    setattr(owner, last, guarded)


def fork(request: dict[str, Any], rank: int, world_size: int, port: int) -> int:
    """Start one rank; returns its process id."""
    child = os.fork()
    if child:
        return child
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size)}
    if "send" in request and request.get("rank", rank) == rank:
        send_at_call(*request["send"])
    if "max_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_bytes"], resource.RLIM_INFINITY))
    status = 1
    try:
        status = trainer.main(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Start one run and wait for its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, world_size = time.monotonic(), request.get("world_size", 1)
    ranks = {fork(request, rank, world_size, port): rank for rank in range(world_size)}
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < len(ranks):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[ranks[child]] = os.waitstatus_to_exitcode(status)
            if status:
                deadline = time.monotonic() + 1
        elif time.monotonic() >= deadline:
            for survivor in (child for child, rank in ranks.items() if rank not in codes):
                os.kill(survivor, signal.SIGKILL)
            deadline = math.inf
        else:
            time.sleep(0.001)
    return {"codes": [codes[rank] for rank in sorted(codes)], "seconds": time.monotonic() - started}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
