"""One way to train the same network, timed in a separate process.

    python benchmarks/runners.py NAME SETTINGS       the settings, and on the last line the result, as JSON

Allocator, threads and arithmetic are settings of a process. The peers run with the settings that a user gets;
of this project they import only the networks. Each imports what it needs: imports take seconds, and change
settings of the process too.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.5, 0.999), 1e-11  # the trainer's defaults
NEVER_ENDING = 1 << 40
MIN_STEPS = 5  # before the timer starts, and again before it stops


@dataclass(frozen=True)
class Settings:
    """Settings that all runners of a round share."""

    datafile: str
    scratch: str  # for runs and logs
    device: str = "cpu"  # or cuda
    architecture: str = "RACOON"
    layer_param: int = 16
    batch: int = 64
    precision: str = "fp32"  # or bf16
    size: int = 256
    seeds: int = 6  # seeds 0 to seeds - 1 train
    warmup: float = 2.0  # seconds before the timer starts
    seconds: float = 4.0  # minimum time that is measured


class StopTiming(Exception):
    """The measurement is complete."""


@dataclass
class StepTimer:
    """Times training steps, once some have warmed up the process."""

    settings: Settings
    every: int = 1
    """Stop after a multiple of this number of steps, unless that takes twice the time."""
    done: int = 0
    steps: int = 0
    first: float = 0.0
    started: float = 0.0
    seconds: float = field(init=False)

    def step(self) -> None:
        """Count one step. Raises StopTiming after the last one that is timed."""
        self.done += 1
        now = time.perf_counter()
        if self.done == 1:
            self.first = now
        elif not self.started:
            if self.done >= MIN_STEPS and now - self.first > self.settings.warmup:
                self.started = self._synchronized_time()
        else:
            self.steps += 1
            elapsed, enough = now - self.started, self.settings.seconds
            complete = self.steps % self.every == 0 or elapsed > 2 * enough
            if self.steps >= MIN_STEPS and elapsed >= enough and complete:
                self.seconds = self._synchronized_time() - self.started
                raise StopTiming

    def _synchronized_time(self) -> float:
        if self.settings.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def result(self) -> dict[str, float]:
        """Number of steps that were timed, and the speed."""
        rate = self.steps * self.settings.batch / self.seconds
        return {"steps": self.steps, "slices_per_second": round(rate, 2)}


def project(settings: Settings, cache: str) -> dict[str, float]:
    """The trainer from its first line; only the ends of steps are hooked."""
    sys.path.insert(0, str(ROOT))
    import trainer

    epoch_steps = math.ceil(settings.seeds * 6 * settings.size / settings.batch)
    timer, train_step = StepTimer(settings, epoch_steps), trainer.train_step
    inside: list[float] = []

    def timed_step(*arguments: Any) -> Any:
        start = time.perf_counter()
        logits = train_step(*arguments)
        inside.append(time.perf_counter() - start)
        timer.step()
        return logits

    trainer.train_step = timed_step
    overrides = {
        "model_params.architecture": settings.architecture,
        "model_params.layer_param": settings.layer_param,
        "data_params.datafile": settings.datafile,
        "data_params.train_seeds": settings.seeds,
        "data_params.test_seeds": 1,
        "data_params.cache": cache,
        "data_params.synthetic": "null",
        "train_params.log_dir": settings.scratch,
        "train_params.batch_size": settings.batch,
        "train_params.lr": LR,
        "train_params.mixed_precision": {"fp32": "'no'", "bf16": "bf16"}[settings.precision],
        "train_params.epochs": 1000,
        "train_params.test_every": 1000,
    }
    experiment = str(ROOT / "experiments" / "temp.yaml")
    with suppress(StopTiming):
        status = trainer.main([experiment, *(f"{key}={value}" for key, value in overrides.items())])
        raise RuntimeError(f"the trainer ended with status {status}")
    trainer.train_step = train_step
    # A GPU computes asynchronously: there the time inside a step means nothing.
    on_cpu = {"step_seconds": round(fmean(inside[-timer.steps :]), 6)} if settings.device == "cpu" else {}
    return timer.result() | on_cpu


def build_network(settings: Settings) -> Any:
    """The network that all runners train."""
    import torch

    sys.path.insert(0, str(ROOT))
    import models

    # A folder named `datasets` must not be mistaken for the library by transformers.
    sys.path.remove(str(ROOT))
    torch.manual_seed(0)
    return models.build_model(
        architecture=settings.architecture,
        layer_param=settings.layer_param,
        dropout=0.5,
        size=settings.size,
    )


def limit(settings: Settings) -> dict[str, float]:
    """The training step alone on a resident batch, set up as this project does; on a GPU one graph."""
    sys.path.insert(0, str(ROOT))
    import torch

    from training import distributed

    distributed.setup_process()
    captured, layout = settings.device == "cuda", torch.channels_last
    network = build_network(settings).to(settings.device, memory_format=layout)
    slices = torch.randn(settings.batch, 1, settings.size, settings.size)
    slices = slices.to(settings.device, memory_format=layout)
    labels = torch.randint(2, (settings.batch,)).float().to(settings.device)
    optimizer = torch.optim.Adam(
        network.parameters(), LR, BETAS, weight_decay=WEIGHT_DECAY, fused=True, capturable=captured
    )
    # Weights that are cast once and kept cannot be part of a captured graph.
    precision = {"enabled": settings.precision == "bf16", "cache_enabled": not captured}

    def step() -> None:
        with torch.autocast(settings.device, torch.bfloat16, **precision):
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
    timer = StepTimer(settings)
    with suppress(StopTiming):
        while True:
            step()
            timer.step()
    return timer.result()


def loader(settings: Settings, *, in_memory: bool = True) -> Any:
    """A DataLoader of random slices, with flips and turns, whose epoch never ends.

    The cubes are in memory, or read slice by slice from the file, by a worker on each core. With cubes in
    memory, a GPU has 8 workers and a CPU none, which would compete with the network for the cores.
    """
    import h5py
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset, RandomSampler

    names = [f"{gravity}_seed{seed:04d}" for seed in range(settings.seeds) for gravity in ("newton", "gr")]

    class Slices(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.cubes: Any = None
            if in_memory:
                with h5py.File(settings.datafile) as file:
                    self.cubes = {name: file[name][:] for name in names}

        def __len__(self) -> int:
            return len(names) * 3 * settings.size

        def __getitem__(self, index: int) -> dict[str, Any]:
            if self.cubes is None:  # a handle must be opened in the worker that uses it
                self.cubes = h5py.File(settings.datafile)
            cube, rest = divmod(index, 3 * settings.size)
            axis, position = divmod(rest, settings.size)
            image = self.cubes[names[cube]][(slice(None),) * axis + (position,)]
            image = np.rot90(image, int(torch.randint(4, ())))
            if torch.randint(2, ()):
                image = image[:, ::-1]
            image = torch.from_numpy(np.ascontiguousarray(image))[None]
            return {"slices": image, "labels": torch.tensor(float(cube % 2))}

    workers = (8 if settings.device == "cuda" else 0) if in_memory else os.cpu_count() or 1
    return DataLoader(
        slices := Slices(),
        settings.batch,
        sampler=RandomSampler(slices, replacement=True, num_samples=NEVER_ENDING),
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=settings.device == "cuda",
    )


def plain(settings: Settings, *, in_memory: bool) -> dict[str, float]:
    """A loop in plain PyTorch."""
    import torch

    network = build_network(settings).to(settings.device).train()
    optimizer = torch.optim.Adam(network.parameters(), LR, BETAS, weight_decay=WEIGHT_DECAY)
    criterion, timer = torch.nn.BCEWithLogitsLoss(), StepTimer(settings)
    total = 0.0
    with suppress(StopTiming):
        for batch in loader(settings, in_memory=in_memory):
            slices = batch["slices"].to(settings.device, non_blocking=True)
            labels = batch["labels"].to(settings.device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = criterion(network(slices), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()  # as everybody logs it
            timer.step()
    return timer.result()


def lightning(settings: Settings) -> dict[str, float]:
    """Lightning's Trainer."""
    import torch
    from lightning import Callback, LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = build_network(settings)
            self.criterion = torch.nn.BCEWithLogitsLoss()

        def training_step(self, batch: dict[str, Any], index: int) -> Any:
            loss = self.criterion(self.network(batch["slices"]), batch["labels"])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), LR, BETAS, weight_decay=WEIGHT_DECAY)

    timer = StepTimer(settings)

    class Listen(Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            timer.step()

    trainer = Trainer(
        accelerator="gpu" if settings.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
        max_epochs=1,
        callbacks=[Listen()],
        default_root_dir=settings.scratch,
    )
    with suppress(StopTiming):
        trainer.fit(Module(), loader(settings))
    return timer.result()


def transformers(settings: Settings) -> dict[str, float]:
    """The Trainer of transformers, with its own choice of Adam."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build_network(settings)
            self.criterion = torch.nn.BCEWithLogitsLoss()

        def forward(self, slices: Any, labels: Any) -> dict[str, Any]:
            logits = self.network(slices)
            return {"loss": self.criterion(logits, labels), "logits": logits}

    module = Module()
    from transformers import Trainer, TrainerCallback, TrainingArguments

    timer, batches = StepTimer(settings), loader(settings)

    class Listen(TrainerCallback):
        def on_step_end(self, *arguments: Any, **parts: Any) -> None:
            timer.step()

    class SameLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            return batches

    arguments = TrainingArguments(
        output_dir=settings.scratch,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant",
        bf16=settings.precision == "bf16",
        use_cpu=settings.device == "cpu",
    )
    trainer = SameLoader(module, arguments, train_dataset=batches.dataset, callbacks=[Listen()])
    with suppress(StopTiming):
        trainer.train()
    return timer.result()


RUNNERS: dict[str, Callable[[Settings], dict[str, float]]] = {
    "limit": limit,
    "device": lambda settings: project(settings, "device"),
    "memory": lambda settings: project(settings, "memory"),
    "disk": lambda settings: project(settings, "disk"),
    "plain": lambda settings: plain(settings, in_memory=True),
    "plain h5py": lambda settings: plain(settings, in_memory=False),
    "lightning": lightning,
    "transformers": transformers,
}


if __name__ == "__main__":
    print(json.dumps(RUNNERS[sys.argv[1]](Settings(**json.loads(sys.argv[2])))))
