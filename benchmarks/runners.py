"""One runner of the benchmarks, timed in its own process.

    python benchmarks/runners.py NAME SETTINGS.json RESULT.json

Allocator, threads and arithmetic are settings of a process. The peers run with the settings that a user gets;
of this project they import only the networks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from peers import BETAS, LR, ROOT, WEIGHT_DECAY, build_network, lightning, plain, transformers
from step_timer import AnonymousMemory, Settings, StepTimer, StopTiming


def project(settings: Settings, cache: str) -> dict[str, Any]:
    """The trainer from its first line; only the ends of steps and evaluations are hooked."""
    sys.path.insert(0, str(ROOT))
    import system  # noqa: F401  before torch

    import accelerate  # noqa: F401  the timer starts when these are imported
    import torch  # noqa: F401

    timer = StepTimer(settings, settings.epoch_steps, settings.epochs * settings.epoch_steps or None)
    memory = AnonymousMemory()
    memory.start()
    import trainer

    train_step, evaluate_phase = trainer.train_step, trainer.evaluate_phase
    steps: list[float] = []
    evaluations: list[float] = []

    def timed_step(*arguments: Any) -> Any:
        start = time.perf_counter()
        logits = train_step(*arguments)
        steps.append(time.perf_counter() - start)
        timer.step()
        return logits

    def timed_evaluation(*arguments: Any) -> float | None:
        start = time.perf_counter()
        loss = evaluate_phase(*arguments)
        evaluations.append(time.perf_counter() - start)
        return loss

    trainer.train_step, trainer.evaluate_phase = timed_step, timed_evaluation
    precision = {"fp32": "no", "bf16": "bf16"}[settings.precision]
    overrides = {
        "model_params.architecture": settings.architecture,
        "model_params.layer_param": settings.layer_param,
        "data_params.datafile": settings.datafile,
        "data_params.train_seeds": settings.seeds,
        "data_params.test_seeds": settings.test_seeds,
        "data_params.cache": cache,
        "data_params.synthetic": "null",
        "train_params.log_dir": settings.scratch,
        "train_params.batch_size": settings.batch,
        "train_params.lr": LR,
        "train_params.mixed_precision": json.dumps(precision),
        "train_params.epochs": settings.epochs or 1000,
        "train_params.test_every": 1 if settings.epochs else 1000,
        **settings.overrides,
    }
    with suppress(StopTiming):
        status = trainer.main(
            [str(ROOT / "experiments" / "temp.yaml"), *(f"{key}={value}" for key, value in overrides.items())]
        )
        assert status == 0, "the trainer printed its error"
    slices = settings.test_seeds * 6 * settings.size
    result = timer.result()
    return result | {
        "step_seconds": round(fmean(steps[-result["steps"] :]), 6),
        "anonymous_bytes": memory.peak,
        "test_slices_per_second": [round(slices / seconds, 2) for seconds in evaluations],
    }


def tuned_network(settings: Settings) -> tuple[Any, Any, Any, Any]:
    """Network and resident batch, set up as this project does it: (network, slices, labels, autocast)."""
    import torch

    sys.path.insert(0, str(ROOT))
    from training import distributed

    distributed.setup_process()
    network = build_network(settings).to(settings.device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, 1, settings.size, settings.size)
    slices = torch.randn(shape, generator=generator).to(settings.device, memory_format=torch.channels_last)
    labels = torch.randint(2, (settings.batch,), generator=generator).float().to(settings.device)

    def autocast() -> Any:
        # Weights that are cast once and kept cannot be part of a captured graph.
        return torch.autocast(
            settings.device,
            torch.bfloat16,
            enabled=settings.precision == "bf16",
            cache_enabled=settings.device != "cuda",
        )

    return network, slices, labels, autocast


def limit(settings: Settings) -> dict[str, Any]:
    """The training step alone on a resident batch; on a GPU captured as one graph."""
    import torch

    network, slices, labels, autocast = tuned_network(settings)
    captured = settings.device == "cuda"
    optimizer = torch.optim.Adam(
        network.parameters(), LR, BETAS, weight_decay=WEIGHT_DECAY, fused=True, capturable=captured
    )

    def step() -> None:
        with autocast():
            logits = network(slices)
        torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    if captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    return repeat(step, settings)


def forward(settings: Settings) -> dict[str, Any]:
    """The forward pass alone on a resident batch, as in an evaluation."""
    import torch

    network, slices, _, autocast = tuned_network(settings)
    network.eval()

    def step() -> None:
        with torch.inference_mode(), autocast():
            network(slices)

    return repeat(step, settings)


def repeat(step: Callable[[], None], settings: Settings) -> dict[str, Any]:
    """Step until the timer stops."""
    timer = StepTimer(settings)
    with suppress(StopTiming):
        while True:
            step()
            timer.step()
    return timer.result()


RUNNERS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "limit": limit,
    "forward": forward,
    "device": lambda settings: project(settings, "device"),
    "memory": lambda settings: project(settings, "memory"),
    "disk": lambda settings: project(settings, "disk"),
    "plain": lambda settings: plain(settings, True),
    "plain h5py": lambda settings: plain(settings, False),
    "lightning": lightning,
    "transformers": transformers,
}


def main() -> None:
    """Run the runner that the command line names."""
    name, settings, result = sys.argv[1:]
    numbers = RUNNERS[name](Settings(**json.loads(Path(settings).read_text())))
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
