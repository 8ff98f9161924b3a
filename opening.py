"""Opening a run: all that the user gave is checked and every part is made before the run is changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

import checkpoint
import config as experiment
import datasets
import models
import runtime
from progress import Progress


@dataclass(frozen=True)
class Run:
    """The parts of a run."""

    config: experiment.Config
    accelerator: Accelerator
    stop: runtime.StopSignals
    late: runtime.Vote
    cubes: datasets.CubeFile
    train_set: datasets.WholeCubeDataset
    test_set: datasets.WholeCubeDataset
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    checkpoints: checkpoint.Checkpoints
    identity: dict[str, Any]


def check(config: experiment.Config) -> None:
    """Raise what is wrong with the network and the data file; nothing is made or changed."""
    data = config.data_params
    with runtime.together():
        require_network(config)
        if data.synthetic is None or Path(data.datafile).exists():
            cubes = datasets.CubeFile(data.datafile)
            cubes.require(range(data.train_seeds + data.test_seeds))
            config.network(cubes.size)


def require_network(config: experiment.Config) -> None:
    """Raise what is wrong with the network: that is better known before all else."""
    data = config.data_params
    smallest = -(-data.channels // 64) * 64  # side of cubes that have so many slices
    with torch.device("meta"):
        models.build_model(**config.network(data.synthetic.size if data.synthetic else smallest))


def open_run(
    config: experiment.Config,
    accelerator: Accelerator,
    stop: runtime.StopSignals,
    checkpoints: checkpoint.Checkpoints,
) -> tuple[Run, Progress, dict[str, Tensor]]:
    """The parts of the run, where it stands, and what the network said so far in the running epoch."""
    data, keys = config.data_params, config.train_params
    train_seeds = range(data.train_seeds)
    test_seeds = range(data.train_seeds, data.train_seeds + data.test_seeds)
    with runtime.together():
        require_network(config)
        if accelerator.is_main_process:
            checkpoints.claim()
    cubes = open_cubes(config, accelerator, range(test_seeds.stop))
    last = checkpoints.latest()
    with runtime.together():
        if last is not None:
            experiment.require_same(config.run, last.config, config.to_dict())
            progress = Progress(**last.progress)
        else:
            standardize = data.standardize == "train"
            progress = Progress(*(datasets.statistics(cubes, train_seeds) if standardize else (0.0, 1.0)))
        train_set, test_set = (
            datasets.WholeCubeDataset(
                cubes,
                seeds,
                batch_size=keys.batch_size,
                seed=keys.seed,
                device=accelerator.device,
                mean=progress.mean,
                std=progress.std,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
                **data.slicing,
            )
            for seeds in (train_seeds, test_seeds)
        )
        train_set.read_ahead(progress.epoch, progress.step_in_epoch)  # while the network is built
        network = build_network(config, accelerator, cubes)
        accelerator.print(
            f"{len(train_set)} slices train, {train_set.steps} steps an epoch; {len(test_set)} test"
        )
    optimizer = torch.optim.Adam(
        network.parameters(), lr=keys.lr, betas=keys.betas, weight_decay=keys.weight_decay, fused=True
    )
    network, optimizer = accelerator.prepare(network, optimizer)
    rows = keys.batch_size // (accelerator.num_processes * accelerator.gradient_accumulation_steps)
    images = torch.zeros(rows, *train_set.shape, device=accelerator.device)
    runtime.settle_gradients(network, images.to(memory_format=torch.channels_last))
    set_seed(keys.seed, device_specific=True)  # dropout differs between processes
    identity = cubes.identity(range(test_seeds.stop)) | {"path": str(Path(data.datafile).absolute())}
    runtime.compare({"data_params.datafile holds": identity["fingerprint"]})
    tensors: dict[str, Tensor] = {}
    if last is not None:
        tensors = checkpoints.restore(last, network, optimizer, identity=identity, seed=keys.seed)
        accelerator.print(f"goes on from {last.folder}: {progress.step} steps, {progress.epoch} epochs done")
    if progress.finished:
        progress.ask_for(keys.epochs)
    elif progress.target_epoch - progress.first_epoch != keys.epochs:
        accelerator.print(
            f"train_params.epochs {keys.epochs} counts once the {progress.target_epoch} epochs are done that "
            "were asked for before"
        )
    with runtime.together():
        if accelerator.is_main_process:
            config.save()
    parts = (cubes, train_set, test_set, network, optimizer, checkpoints, identity)
    return Run(config, accelerator, stop, runtime.Vote(), *parts), progress, tensors


def open_cubes(config: experiment.Config, accelerator: Accelerator, seeds: range) -> datasets.CubeFile:
    """The data file, with all `seeds` in it; a synthetic universe is written first where it is asked for."""
    data = config.data_params
    with runtime.together():
        if data.synthetic is not None and accelerator.is_main_process and not Path(data.datafile).exists():
            datasets.write_synthetic(data.datafile, seeds=len(seeds), **data.synthetic.model_dump())
    with runtime.together():
        copied = data.local_copy if data.local_copy and Path(data.local_copy).exists() else None
        cubes = datasets.CubeFile(copied or data.datafile)
        cubes.require(seeds)
        cubes.require_finite(seeds)
    if data.synthetic is not None:
        datasets.require_synthetic(cubes, **data.synthetic.model_dump())
    if (slow := cubes.slow_chunks()) is not None:
        accelerator.print(slow)
    return cubes


def build_network(
    config: experiment.Config, accelerator: Accelerator, cubes: datasets.CubeFile
) -> torch.nn.Module:
    """The network on its device, with the first weights that follow from the run's seed."""
    keys = config.train_params
    set_seed(keys.seed)
    if keys.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(keys.deterministic)  # takes a second, importing torch's compiler
    torch.backends.cudnn.benchmark = not keys.deterministic  # every batch has the same shape
    network = models.build_model(**config.network(cubes.size))
    network = network.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if keys.sync_batch_norm is True or (keys.sync_batch_norm == "auto" and accelerator.num_processes > 1):
        models.synchronise_batch_norm(network)
    # Synchronised batch normalisation breaks the graph at every layer: such a network is faster as it is.
    whole = not any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules())
    if keys.compile is True or (keys.compile == "auto" and accelerator.device.type == "cuda" and whole):
        compile_network(network, required=keys.compile is True)
    return network


def compile_network(network: torch.nn.Module, *, required: bool) -> None:
    """Speed the network up by torch.compile; if it cannot, the first batch raises only where `required`."""
    import torch._dynamo  # takes a second, which others need not wait for

    torch._dynamo.config.suppress_errors = not required  # it warns, and goes on without
    network.compile(dynamic=False)  # or the first batch seen would decide the kernels of all
