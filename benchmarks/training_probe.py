"""Train as trainer.py does, and record what only its process can measure.

    python benchmarks/training_probe.py RESULT.json EXPERIMENT [section.key=value ...]

RESULT.json gets the seconds from the start of the process to the end of the first step; for each epoch the
memory that the allocator of the device reserved and the number of operations that made the host wait for the
device; and the graphs and graph breaks of torch.compile.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import trainer

SYNCHRONIZATION = "called a synchronizing CUDA operation"


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status of the trainer."""
    result, *arguments = arguments
    record: dict[str, Any] = {"first_step_seconds": None, "reserved": [], "synchronizations": []}
    train_step, train_epoch = trainer.train_step, trainer.train_epoch

    def timed_step(run: Any, *others: Any) -> Any:
        logits = train_step(run, *others)
        if record["first_step_seconds"] is None:
            if run.accelerator.device.type != "cpu":
                torch.get_device_module(run.accelerator.device).synchronize()
            record["first_step_seconds"] = time.time() - psutil.Process().create_time()
        return logits

    def recorded_epoch(run: Any, *others: Any) -> bool:
        with count_synchronizations() as synchronizations:
            completed = train_epoch(run, *others)
        if torch.backends.cuda.is_built():
            record["synchronizations"].append(
                sum(SYNCHRONIZATION in str(warning.message) for warning in synchronizations)
            )
            record["reserved"].append(torch.cuda.memory_reserved())
        return completed

    trainer.train_step, trainer.train_epoch = timed_step, recorded_epoch
    status = trainer.main(arguments)
    if "torch._dynamo.utils" in sys.modules:
        counters = sys.modules["torch._dynamo.utils"].counters
        record["graphs"] = counters["stats"]["unique_graphs"]
        record["graph_breaks"] = sum(counters["graph_break"].values())
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(record))
    return status


@contextmanager
def count_synchronizations() -> Iterator[list[warnings.WarningMessage]]:
    """A list that gets all warnings, one for each operation that makes the host wait for a CUDA device."""
    if not torch.backends.cuda.is_built():
        yield []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=SYNCHRONIZATION)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
