"""Starts trainer.py as often as it is asked to, and kills it: a process that has imported it all, and forks.

Reads one JSON object per line from standard input, answers each with one line. Importing torch takes seconds;
with a fork, a kill costs only what the run itself did. An object holds `arguments` of trainer.py, `out` (a
file for what it prints), and maybe

    processes   how many run it together (1)
    after       seconds until all of them get SIGKILL
    call        SIGKILL at this call, counted from 0, of one that syncs, renames, makes or deletes
    send        [signal, function, n]: this signal at the n-th call of, say, "trainer.train_step"
    rank        only this rank gets it (all of them)
    room        no file may become larger than so many bytes, as on a full disk

Once one process is dead, the others get a moment and then SIGKILL too, as a launcher would do it. The answer
holds the exit `codes` (negative: the signal) and the `seconds` it took.
"""

import itertools
import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch._dynamo
import torch.utils.tensorboard
from numba.core.registry import cpu_target

import trainer

# Loaded here once and not in each child: together a second.
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
assert torch._dynamo is not None
assert torch.utils.tensorboard is not None


def die_at_call(fatal: int) -> None:
    """SIGKILL at the given call of one that changes the disk."""
    passed = 0
    lock = threading.Lock()

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            nonlocal passed
            with lock:
                if passed == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1
            return function(*arguments, **keywords)

        return guarded

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, guard(getattr(os, name)))


def send_at_call(name: str, function: str, fatal: int) -> None:
    """The signal `name` to this process at the given call of a function, before it runs."""
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


def fork(order: dict[str, Any], rank: int, port: int) -> int:
    """One process of a run; returns its id."""
    child = os.fork()
    if child:
        return child
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    processes = order.get("processes", 1)
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(processes)}
    if "call" in order:
        die_at_call(order["call"])
    if "send" in order and order.get("rank", rank) == rank:
        send_at_call(*order["send"])
    if "room" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["room"], resource.RLIM_INFINITY))
    status = 1
    try:
        status = trainer.main(order["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    ranks = {fork(order, rank, port): rank for rank in range(order.get("processes", 1))}
    codes: dict[int, int] = {}
    deadline = began + order.get("after", math.inf)
    while len(codes) < len(ranks):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[ranks[child]] = os.waitstatus_to_exitcode(status)
            if status and "after" not in order:
                deadline = time.monotonic() + 1
        elif time.monotonic() >= deadline:
            for survivor in (child for child, rank in ranks.items() if rank not in codes):
                os.kill(survivor, signal.SIGKILL)
            deadline = math.inf
        else:
            time.sleep(0.001)
    return {"codes": [codes[rank] for rank in sorted(codes)], "seconds": time.monotonic() - began}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
