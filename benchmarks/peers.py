"""The peers: how else one would train the same network, with what each does by default.

Each is imported where it is needed: they take seconds to import and change settings of the process.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from step_timer import Settings, StepTimer, StopTiming

ROOT = Path(__file__).resolve().parent.parent
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.5, 0.999), 1e-11  # the trainer's defaults
NEVER_ENDING = 1 << 40


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


def loader(settings: Settings, *, held: bool) -> Any:
    """A DataLoader of random slices, with flips and turns, whose epoch never ends.

    The cubes are `held` in memory, or read slice by slice from the file, by a worker on each core at least.
    """
    import h5py
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset, RandomSampler

    names = [f"{gravity}_seed{seed:04d}" for seed in range(settings.seeds) for gravity in ("newton", "gr")]

    class Slices(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.file: h5py.File | None = None
            self.cubes: list[Any] = []
            if held:
                with h5py.File(settings.datafile) as file:
                    self.cubes = [file[name][:] for name in names]

        def __len__(self) -> int:
            return len(names) * 3 * settings.size

        def __getitem__(self, index: int) -> dict[str, Any]:
            if not held and self.file is None:  # a handle must be opened in the worker that uses it
                self.file = h5py.File(settings.datafile)
            cube, rest = divmod(index, 3 * settings.size)
            axis, position = divmod(rest, settings.size)
            source = self.cubes[cube] if held else self.file[names[cube]]  # type: ignore[index]
            image = source[(slice(None),) * axis + (position,)]
            image = np.rot90(image, int(torch.randint(4, ())))
            if torch.randint(2, ()):
                image = image[:, ::-1]
            image = torch.from_numpy(np.ascontiguousarray(image))[None]
            return {"slices": image, "labels": torch.tensor(float(cube % 2))}

    slices = Slices()
    workers = settings.workers if held else max(settings.workers, os.cpu_count() or 1)
    return DataLoader(
        slices,
        settings.batch,
        sampler=RandomSampler(slices, replacement=True, num_samples=NEVER_ENDING),
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=settings.device == "cuda",
    )


def plain(settings: Settings, held: bool) -> dict[str, Any]:
    """A loop in plain PyTorch."""
    import torch

    network = build_network(settings).to(settings.device)
    batches = loader(settings, held=held)
    optimizer = torch.optim.Adam(network.parameters(), LR, BETAS, weight_decay=WEIGHT_DECAY)
    criterion = torch.nn.BCEWithLogitsLoss()
    timer = StepTimer(settings)
    total, correct = 0.0, 0
    network.train()
    with suppress(StopTiming):
        for batch in batches:
            slices = batch["slices"].to(settings.device, non_blocking=True)
            labels = batch["labels"].to(settings.device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = network(slices)
                loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
            correct += int(((logits > 0) == (labels > 0)).sum())
            timer.step()
    return timer.result()


def lightning(settings: Settings) -> dict[str, Any]:
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
        trainer.fit(Module(), loader(settings, held=True))
    return timer.result()


def transformers(settings: Settings) -> dict[str, Any]:
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

    timer = StepTimer(settings)
    batches = loader(settings, held=True)

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
