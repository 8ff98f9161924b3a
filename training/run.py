"""The parts of a run, its training state, and its set-up."""

from __future__ import annotations

import system
from system import UserError

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, set_seed

import datasets
import models
from datasets import PerField
from training import checkpoint, distributed, metrics
from training.config import Config
from training.logger import wrap

MAX_EVALUATION_STOPS = 3


@dataclass(frozen=True)
class Run:
    """The parts of a run."""

    # The experiment, the ranks that compute it, and who may stop it.
    config: Config
    accelerator: Accelerator
    stop: distributed.StopSignals
    flags: distributed.AnyRankFlags
    # The data: cubes, what identifies them, and their slices in batches.
    cubes: datasets.CubeFile
    data_identity: dict[str, Any]
    train_set: datasets.WholeCubeDataset
    validation_set: datasets.WholeCubeDataset | None
    test_set: datasets.WholeCubeDataset
    # What a checkpoint saves beside the TrainState: the network, Adam, the predictions of the running epoch.
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    predictions: metrics.PredictionBuffer
    checkpoints: checkpoint.CheckpointManager

    def save_due(self, step: int) -> bool:
        """Whether this rank's clock or the step count asks for a checkpoint after `step`."""
        params = self.config.train_params
        every_steps = params.save_every_steps is not None and step % params.save_every_steps == 0
        return every_steps or self.checkpoints.minutes_since_save >= params.save_every_minutes

    def example_twins(self) -> tuple[metrics.Floats, metrics.Floats]:
        """The middle slice (N, N) of the first training seed under GR and Newton, as the file holds it."""
        cube, slices = np.empty(self.cubes.shape, np.float32), []
        for gravity in ("gr", "newton"):
            self.cubes.read(self.train_set.seeds[0], gravity, cube)
            slices.append(cube.reshape(-1, *cube.shape[-2:])[cube.shape[-1] // 2].astype(np.float64))
        return slices[0], slices[1]

    def gather(self, buffer: metrics.PredictionBuffer) -> metrics.Predictions:
        """The logits of all ranks with the seed, label and place of each slice. Collective."""
        ids, logits = buffer.gather()
        return metrics.Predictions.from_ids(ids.numpy(), logits.double().numpy(), self.cubes.size)


@dataclass
class TrainState:
    """Progress of a run, as JSON-able values. Checkpoints hold its fields; a new one needs a default."""

    mean: PerField
    std: PerField
    """The cubes are standardized by these."""
    power: list[Any] | None = None
    """Isotropic power spectra that whiten the slices, or None: [axis][n], P(n) at n = 0, ..., N/2 - 1 of the
    training slices perpendicular to array axes 0, 1 and 2, None for an axis that is not sliced; with several
    fields [axis][field][n]. Runs of earlier versions have one spectrum [n] for all axes."""
    calibration: dict[str, Any] | None = None
    """A `models.Calibration` fitted on the validation seeds at the end of the training: `temperature` and
    `threshold`, under `axes` the same for slices of each axis, under `cubes` for mean logits of cubes."""
    octaves: int = 1
    """`NetworkSettings.octaves`; runs of earlier versions have one."""
    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Optimizer steps taken."""
    step_in_epoch: int = 0
    seconds: float = 0.0
    """Time spent on the running epoch."""
    waiting_seconds: float = 0.0
    """Part of it spent on waiting for data."""
    running_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Sums of the running metrics since the last log point within the epoch."""
    evaluation_pending: bool = False
    """The last epoch is complete, its evaluation is not."""
    evaluation_stops: int = 0
    """Programs that were stopped within the pending evaluation."""
    first_epoch: int = 0
    target_epoch: int = 0
    """The schedule of the learning rate runs from first_epoch to target_epoch."""
    test_loss: float | None = None
    """Loss of the last evaluation (on validation seeds, if there are any); None if the epoch had none."""
    best_loss: float | None = None
    evaluations_without_improvement: int = 0
    stopped_early: bool = False
    tracker_runs: dict[str, str] = field(default_factory=dict)
    """The run's id in each tracker."""

    @property
    def finished(self) -> bool:
        """Whether the target epoch is trained and evaluated, or training stopped early."""
        between_epochs = not (self.step_in_epoch or self.evaluation_pending)
        return between_epochs and (self.epoch >= self.target_epoch or self.stopped_early)

    def extend(self, epochs: int) -> None:
        """Train `epochs` more."""
        self.first_epoch, self.target_epoch = self.epoch, self.epoch + epochs
        self.evaluations_without_improvement, self.stopped_early = 0, False

    def learning_rate(self, lr: float, schedule: str, warmup_epochs: float, steps: int) -> float:
        """The learning rate of the next step, with `steps` steps per epoch.

        A linear warm-up from zero, then constant or half a cosine down to zero (Loshchilov & Hutter 2017,
        arXiv:1608.03983). It depends on steps alone, so it is the same on any number of ranks.
        """
        epochs = self.epoch - self.first_epoch + self.step_in_epoch / steps
        if epochs < warmup_epochs:
            return lr * min(1.0, (epochs + 1 / steps) / warmup_epochs)
        if schedule == "none":
            return lr
        annealing_epochs = self.target_epoch - self.first_epoch - warmup_epochs
        return lr * 0.5 * (1 + math.cos(math.pi * (epochs - warmup_epochs) / annealing_epochs))

    def measure_waiting(self, batches: Iterator[datasets.Batch]) -> Iterator[datasets.Batch]:
        """The same batches; the time that each one takes to arrive is added to `waiting_seconds`."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waiting_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def end_step(self) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.step_in_epoch += 1

    def end_epoch(self, test_every: int) -> None:
        """Count one epoch; the last one and every `test_every`-th must be evaluated."""
        self.epoch += 1
        self.step_in_epoch, self.seconds, self.waiting_seconds = 0, 0.0, 0.0
        self.running_sums = [0.0, 0.0, 0.0]
        self.evaluation_pending = self.epoch == self.target_epoch or self.epoch % test_every == 0
        self.test_loss = None

    def require_progress(self) -> None:
        """Raise UserError if several starts in a row were stopped within the pending evaluation.

        A job that is queued again after each stop would go on for ever.
        """
        if self.evaluation_stops >= MAX_EVALUATION_STOPS:
            raise UserError(
                f"stopped at step {self.step}, within the same evaluation as the {self.evaluation_stops - 1} "
                "starts before: a start is shorter than an evaluation.\n"
                "Raise train_params.max_minutes or the time limit of the job, then run the command again."
            )

    def end_evaluation(self, loss: float, patience: int | None) -> None:
        """Record the evaluation's loss; training stops after `patience` evaluations without improvement."""
        self.evaluation_pending, self.evaluation_stops = False, 0
        self.test_loss = loss
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.evaluations_without_improvement = loss, 0
        else:
            self.evaluations_without_improvement += 1
        self.stopped_early = patience is not None and self.evaluations_without_improvement >= patience


def describe_selection(config: Config, state: TrainState) -> dict[str, Any]:
    """What selected the network of a training state.

    `set` and `seeds` [first, last + 1]: those whose loss decides. `early_stopping`: evaluations without
    improvement after which training stops, if set. `extended_at_epoch`: where the training had ended before a
    person, who could know its results, extended it. `finished`: whether a training ends with this network.
    """
    data, seeds = config.data_params, config.data_params.validation_range or config.data_params.test_range
    return {
        "set": "validation" if data.validation_range else "test",
        "seeds": [seeds.start, seeds.stop],
        "early_stopping": config.train_params.early_stopping,
        "extended_at_epoch": state.first_epoch or None,
        "finished": state.finished,
    }


def check_setup(config: Config, accelerator: Accelerator) -> None:
    """Raise if the network or the data file cannot be used as configured; changes nothing. Collective."""
    data, cubes = config.data_params, None
    with distributed.raise_on_all_ranks():
        check_network(config)
        if data.synthetic is None or Path(data.datafile).exists():
            cubes = check_cubes(config)
            cubes.identity(range(data.test_range.stop))
        accelerator.print(describe_setup(config, accelerator, cubes))


def describe_setup(
    config: Config, accelerator: Accelerator, cubes: datasets.CubeFile | None, octaves: int = 0
) -> str:
    """What is trained, on which slices and on which device, in aligned lines; `cubes` may not exist yet."""
    data, model, batch_size = config.data_params, config.model_params, config.train_params.batch_size
    shape = cubes.shape if cubes else (data.synthetic.size if data.synthetic else 0,) * 3
    with torch.device("meta"):
        network = models.build(config.network_settings(shape, octaves))
    content = "; ".join(cubes.fields) if cubes else "to be written"
    sets = {"training": data.train_range, "validation": data.validation_range, "test": data.test_range}
    slices = {name: len(seeds) * 2 * len(data.axes) * shape[-1] for name, seeds in sets.items() if seeds}
    rows = {
        "network": f"{model.architecture}, layer_param {model.layer_param}, "
        f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters",
        "data": f"{cubes.path if cubes else data.datafile}, {shape[-1]}^3 cells, {content}",
        "slices": ", ".join(
            f"{count:,} {name} (seeds {system.format_ranges(sets[name])})" for name, count in slices.items()
        ),
        "device": distributed.describe_hardware(accelerator),
        "steps": f"{-(-slices['training'] // batch_size):,} per epoch, each of {batch_size} slices",
    }
    return "\n".join(wrap(f"{name:<9}{text}", indent=9) for name, text in rows.items())


def check_network(config: Config) -> None:
    """Raise UserError if the network cannot be built, before anything expensive starts."""
    data = config.data_params
    smallest = -(-data.channels // 64) * 64  # smallest cubes with so many slices
    with torch.device("meta"):
        models.build(config.network_settings((data.synthetic.size if data.synthetic else smallest,) * 3))


def setup_run(
    config: Config,
    accelerator: Accelerator,
    stop: distributed.StopSignals,
    checkpoints: checkpoint.CheckpointManager,
    *,
    extend: bool,
) -> tuple[Run, TrainState] | None:
    """Build the parts of a run and restore its last checkpoint; None for a finished run unless `extend`.

    Everything the user gave is checked before anything of the run is changed. Collective.
    """
    # The run: is it new, interrupted or finished?
    with distributed.raise_on_all_ranks():
        check_network(config)
        if accelerator.is_main_process:
            checkpoints.acquire_lock()
    last = checkpoints.latest_complete()
    state = saved_state(last) if last is not None else None
    if state is not None and state.finished:
        more = f"training {config.train_params.epochs} more" if extend else "not extended (--no-extend)"
        accelerator.print(f"{config.run_dir} is complete at epoch {state.epoch}; {more}")
        if not extend:
            return None
    else:
        accelerator.print(wrap(f"run      {config.run_dir}, {'new' if last is None else 'interrupted'}"))
    # The data, with what the state of a new run takes from it.
    data = config.data_params
    seeds = range(data.test_range.stop)
    cubes = open_cubes(config, accelerator, seeds)
    with distributed.raise_on_all_ranks():
        accelerator.print(describe_setup(config, accelerator, cubes, state.octaves if state else 0))
        state = state or initial_state(config, cubes)
        train_set, validation_set, test_set = build_datasets(config, accelerator, cubes, state)
        train_set.prefetch(state.epoch, state.step_in_epoch)  # while the network is built
        settings = config.network_settings(cubes.shape, state.octaves)
        network = build_network(config, accelerator, settings)
    # The network with its optimizer, as they were saved.
    network, optimizer = prepare(config, accelerator, network, train_set.shape)
    predictions = metrics.PredictionBuffer(accelerator)
    identity = cubes.identity(seeds) | {"path": str(Path(data.datafile).absolute())}
    distributed.require_equal({"fingerprint of data_params.datafile": identity["fingerprint"]})
    if last is not None:
        saved = checkpoints.restore(last, network, optimizer, data_identity=identity)
        with last.explain():
            if saved:
                predictions.restore(**saved)
    extend_training(config, accelerator, state)
    if last is not None:
        accelerator.print(wrap(f"resumed from {last.folder}: {describe_progress(state, train_set.steps)}"))
    # Nothing failed: the experiment is recorded.
    with distributed.raise_on_all_ranks():
        if accelerator.is_main_process:
            config.save()
    run = Run(
        config=config,
        accelerator=accelerator,
        stop=stop,
        flags=distributed.AnyRankFlags(),
        cubes=cubes,
        data_identity=identity,
        train_set=train_set,
        validation_set=validation_set,
        test_set=test_set,
        network=network,
        optimizer=optimizer,
        predictions=predictions,
        checkpoints=checkpoints,
    )
    return run, state


def open_cubes(config: Config, accelerator: Accelerator, seeds: range) -> datasets.CubeFile:
    """The data file, checked to hold `seeds`; writes a synthetic universe first if configured. Collective."""
    data = config.data_params
    with distributed.raise_on_all_ranks():
        if data.synthetic is not None and accelerator.is_main_process and not Path(data.datafile).exists():
            datasets.write_synthetic(data.datafile, seeds=len(seeds), **data.synthetic.model_dump())
    with distributed.raise_on_all_ranks():
        cubes = check_cubes(config)
        if accelerator.is_main_process:
            for text in datasets.data_warnings(cubes, seeds, standardize=data.standardize):
                accelerator.print(f"warning: {cubes.path}: {text}")
    if data.synthetic is not None:
        datasets.check_synthetic(cubes, **data.synthetic.model_dump())
    if (warning := cubes.slow_chunks()) is not None:
        accelerator.print(warning)
    return cubes


def check_cubes(config: Config) -> datasets.CubeFile:
    """The data file, or its copy on this host, checked to have twins of all seeds. Raises UserError."""
    data = config.data_params
    copied = data.local_copy is not None and Path(data.local_copy).exists()
    cubes = datasets.CubeFile(data.local_copy if copied and data.local_copy else data.datafile)
    seeds = range(data.test_range.stop)
    cubes.require(seeds)
    if copied and Path(data.datafile).exists():
        datasets.check_copy(datasets.CubeFile(data.datafile), cubes, seeds)
    datasets.check_seeds(cubes, data.train_range, data.validation_range, data.test_range)
    return cubes


def saved_state(last: checkpoint.Checkpoint) -> TrainState:
    """The state of a checkpoint. Raises UserError if it is not one of this program."""
    with last.explain():
        state = TrainState(**last.train_state)
        saved, run_dir = last.state["config"], last.folder.parents[1]
        original = Path(saved["train_params"]["log_dir"], saved["model_params"]["name"])
        if original.exists() and not original.samefile(run_dir):
            state.tracker_runs = {}  # this run is a copy: the original goes on in its trackers
        return state


def initial_state(config: Config, cubes: datasets.CubeFile) -> TrainState:
    """The state of a new run."""
    data = config.data_params
    mean: PerField = 0.0
    std: PerField = 1.0
    power = None
    if data.standardize == "train":
        mean, std = datasets.measure_normalization(cubes, data.train_range)
    if data.whiten == "isotropic":
        power = datasets.measure_power(cubes, data.train_range, data, mean, std, models.isotropic_power)
    octaves = config.network_settings(cubes.shape).octaves
    return TrainState(mean, std, power, octaves=octaves)


def describe_progress(state: TrainState, steps: int) -> str:
    """What remains of a resumed training with `steps` steps per epoch."""
    remaining = f"{state.target_epoch - state.epoch} of {state.target_epoch} epochs remain"
    if state.evaluation_pending:
        return f"the evaluation of epoch {state.epoch} and {remaining}"
    return remaining + (f", step {state.step_in_epoch} of {steps} is done" if state.step_in_epoch else "")


def build_datasets(
    config: Config, accelerator: Accelerator, cubes: datasets.CubeFile, state: TrainState
) -> tuple[datasets.WholeCubeDataset, datasets.WholeCubeDataset | None, datasets.WholeCubeDataset]:
    """The training, validation (None without validation seeds) and test set."""
    data, params = config.data_params, config.train_params
    whitening = models.Whitening(state.power).to(accelerator.device) if state.power else None

    def dataset(seeds: range) -> datasets.WholeCubeDataset:
        return datasets.WholeCubeDataset(
            cubes,
            seeds,
            data,
            batch_size=params.batch_size,
            seed=params.seed,
            device=accelerator.device,
            mean=state.mean,
            std=state.std,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            transform=whitening,
        )

    validation_set = dataset(data.validation_range) if data.validation_range else None
    return dataset(data.train_range), validation_set, dataset(data.test_range)


def build_network(
    config: Config, accelerator: Accelerator, settings: models.NetworkSettings
) -> torch.nn.Module:
    """The network on its device; its initial weights depend on train_params.seed alone."""
    params = config.train_params
    set_seed(params.seed)
    if params.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(params.deterministic)  # imports torch's compiler, which takes 1 s
    # Otherwise deterministic algorithms fill all new tensors first, and every batch is written twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Every batch has the same shape. On ROCm the search takes seconds per shape and rank (ROCm/MIOpen#1878).
    torch.backends.cudnn.benchmark = not params.deterministic and torch.version.hip is None
    network = models.build(settings)
    network = network.to(accelerator.device)
    network = network.to(memory_format=datasets.memory_format(accelerator.device))  # type: ignore[call-overload]
    if params.sync_batch_norm is True or (params.sync_batch_norm == "auto" and accelerator.num_processes > 1):
        models.synchronize_batch_norm(network)
    compile_network(network, accelerator, params.compile)
    return network


def prepare(
    config: Config, accelerator: Accelerator, network: torch.nn.Module, shape: tuple[int, int, int]
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The network and its optimizer, wrapped by Accelerate and ready for the first step. Collective."""
    params = config.train_params
    beta1, beta2 = params.betas
    optimizer = torch.optim.Adam(
        network.parameters(),
        lr=params.lr,
        betas=(beta1, beta2),
        weight_decay=params.weight_decay,
        fused=True,
    )
    network, optimizer = accelerator.prepare(network, optimizer)
    if isinstance(network, torch.nn.parallel.DistributedDataParallel):
        # No step needs the buffers of rank 0; distributed.broadcast_buffers copies them for an evaluation.
        network.broadcast_buffers = False
    rows = params.batch_size // (accelerator.num_processes * accelerator.gradient_accumulation_steps)
    images = torch.zeros(rows, *shape, device=accelerator.device)
    distributed.warm_up_ddp(network, images.to(memory_format=datasets.memory_format(accelerator.device)))
    set_seed(params.seed, device_specific=True)  # dropout differs between ranks
    return network, optimizer


def compile_network(network: torch.nn.Module, accelerator: Accelerator, compile: str | bool) -> None:
    """Compile the network if `compile` (train_params.compile) or Accelerate's dynamo_config asks for it.

    It is compiled in place, which changes neither its names nor its class. If that fails, the first batch
    raises, or runs eagerly where `compile` is "auto" and dynamo_config is not set.
    """
    plugin = accelerator.state.dynamo_plugin
    # Without `dynamic` the shape of the first batch would decide for all.
    options = {"dynamic": False}
    required = compile is True or plugin.backend != DynamoBackend.NO
    if plugin.backend != DynamoBackend.NO:
        options |= plugin.to_kwargs()
        # Accelerate would compile DistributedDataParallel with the network, and rename all parameters.
        plugin.backend = DynamoBackend.NO
    if compile is False or not (required or accelerator.device.type == "cuda"):
        return
    import torch._dynamo  # takes a second

    torch._dynamo.config.suppress_errors = not required  # warns and runs eagerly
    # One graph per network: the optimizer for DDP would split it at every bucket of gradients.
    torch._dynamo.config.optimize_ddp = False
    network.compile(**options)


def extend_training(config: Config, accelerator: Accelerator, state: TrainState) -> None:
    """Set the target epoch of a new or finished run; an interrupted run keeps its target."""
    epochs = config.train_params.epochs
    if state.finished:
        state.extend(epochs)
    elif state.target_epoch - state.first_epoch != epochs:
        accelerator.print(
            f"train_params.epochs {epochs} applies after epoch {state.target_epoch} of the interrupted run"
        )
