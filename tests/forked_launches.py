"""Launches of trainer.py with several processes each, all forked from one that has imported it.

    python tests/forked.py LAUNCHES.json

Importing torch takes seconds, and a launch by accelerate or torchrun does it in every process. LAUNCHES.json
is a list of {"processes": n, "arguments": [[...] of each process], "out": folder, "signal": [rank, step]}.
Each process writes what it did to out/RANK.json. Processes meet as those of torchrun do, by the same
variables. With `signal` (optional) the process of that rank gets SIGUSR1 in that step.
"""

import ctypes
import importlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from signal import SIGKILL, SIGUSR1
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import trainer

# What every training imports sooner or later: the optimizer, the log, the figures of a test.
LATER = ("torch._dynamo", "torch.utils.tensorboard", "analysis.figures")


def launch(
    processes: int, arguments: list[list[str]], out: str, signal: tuple[int, int] | None = None
) -> None:
    """Run one launch to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(out).mkdir(parents=True)
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if sys.platform == "linux":  # this process dies with its parent, should the test run out of time
                ctypes.CDLL(None).prctl(1, SIGKILL)
            if processes > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
                os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(processes)}
            run(arguments[rank], Path(out, f"{rank}.json"), signal[1] if signal and signal[0] == rank else 0)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def run(arguments: list[str], out: Path, signal_at: int) -> None:
    """`trainer.main`, with the slices, weights and learning rate of each step written down."""
    steps: list[dict[str, Any]] = []
    step = trainer.train_step

    def recorded(run: trainer.Run, batch: datasets.Batch, lr: float) -> Any:
        steps.append({"ids": batch.ids.tolist(), "weights": batch.weights.tolist(), "lr": lr})
        if len(steps) == signal_at:
            os.kill(os.getpid(), SIGUSR1)
        return step(run, batch, lr)

    trainer.train_step = recorded
    try:
        status = trainer.main(arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    out.write_text(json.dumps({"status": status, "steps": steps}))


if __name__ == "__main__":
    for module in LATER:
        importlib.import_module(module)
    for one in json.loads(Path(sys.argv[1]).read_text()):
        launch(**one)
