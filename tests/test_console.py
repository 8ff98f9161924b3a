"""Every line is in the output when the next step begins, whatever the output is."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from fork_server import PROCESSES, TIMEOUT, ForkServer, free_port, start, train_rank

STEPS = 8


def train_step_by_step(
    arguments: list[str], rank: int, launch: dict[str, Any], unbuffered: bool, steps: Connection | None
) -> int:
    """Train with the streams that Python has at its start; rank 0 waits before each step. In a child."""
    import trainer

    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        raw = io.FileIO(descriptor, "w", closefd=False)
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[type-var]
            line_buffering=not unbuffered and (name == "stderr" or raw.isatty()),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    train_step = trainer.train_step

    def wait_and_train(*values: Any) -> Any:
        if steps is not None:
            steps.send(None)
            steps.recv()
        return train_step(*values)

    trainer.train_step = wait_and_train
    return train_rank(arguments, rank, launch)


def open_output(kind: str, folder: Path) -> tuple[Path, int]:
    """The path that a process writes to, and a descriptor from which its output is read."""
    if kind == "terminal":
        reader, written = pty.openpty()
        os.set_blocking(reader, False)
        return Path(os.ttyname(written)), reader
    path = folder / "out"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
    return path, os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def read(descriptor: int) -> str:
    """What has arrived since the last call."""
    parts = []
    try:
        while part := os.read(descriptor, 2**16):
            parts.append(part)
    except OSError:  # nothing more, or the terminal was closed
        pass
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("kind", "unbuffered", "ranks"),
    [
        ("terminal", False, 1),
        ("terminal", True, 1),
        ("pipe", False, 1),
        ("pipe", True, 1),
        ("file", False, 1),
        ("file", True, 1),
        ("pipe", False, 2),
    ],
)
def test_lines_arrive_before_the_next_step(
    fork_server: ForkServer,
    experiment: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    unbuffered: bool,
    ranks: int,
) -> None:
    """`unbuffered`: with python -u or PYTHONUNBUFFERED."""
    arguments = [str(experiment(epochs=2, test_every=1))]
    out, descriptor = open_output(kind, tmp_path)
    ours, theirs = PROCESSES.Pipe()
    launch = {"world_size": ranks, "port": free_port()}
    processes = [
        start(train_step_by_step, arguments, rank, launch, unbuffered, None if rank else theirs, out=out)
        for rank in range(ranks)
    ]
    theirs.close()
    arrived = []
    for _ in range(2 * STEPS):
        assert ours.poll(TIMEOUT), read(descriptor)
        ours.recv()
        arrived.append(read(descriptor))
        ours.send(None)
    for process in processes:
        process.join(TIMEOUT)
    rest = read(descriptor)
    assert [process.exitcode for process in processes] == [0] * ranks, rest

    expected = {0: ["run", "network", "data", "slices", "device", "steps"], STEPS: ["epoch"] * 2}
    for step, names in expected.items():
        assert re.findall(rf"^(?:.*\r)?({'|'.join(set(names))})\b.*\n", arrived[step], re.M) == names
