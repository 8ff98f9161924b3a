"""Train a network to tell General Relativity from Newtonian gravity.

    python trainer.py experiments/temp.yaml                          one process, on a CPU or one GPU
    python trainer.py experiments/temp.yaml train_params.lr=1e-4     with a key changed
    python trainer.py experiments/temp.yaml --preflight              check the set-up only
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml trainer.py experiments/temp.yaml

The program, top to bottom: read the experiment, set up the run (run.py), resume from its last checkpoint,
train and evaluate epoch by epoch, and export the trained network.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for PYTHONSAFEPATH

import system
from system import UserError

import argparse

# Before the imports below, which take seconds.
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("experiment", nargs="?", type=system.path_argument, help="YAML file of the experiment")
PARSER.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the file")
PARSER.add_argument("--preflight", action="store_true", help="check the set-up and exit")
PARSER.add_argument("--no-extend", action="store_true", help="train no further if the run is complete")
if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    PARSER.parse_args()

import errno
import time
from contextlib import closing
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import datasets
import models
from training import checkpoint, distributed, metrics
from training.config import Config, load_config
from training.logger import METRICS_FILE, RunLogger, require_trackers, setup_logging, wrap
from training.run import Run, TrainState, check_setup, describe_selection, setup_run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = PARSER.parse_intermixed_args(arguments)
    if options.experiment is None:
        PARSER.print_help(sys.stderr)
        return 2

    def program() -> None:
        distributed.setup_process()
        config = load_config(options.experiment, options.overrides)
        train(config, preflight_only=options.preflight, extend=not options.no_extend)

    return distributed.run_program(program, resumes=True)


def train(config: Config, *, preflight_only: bool, extend: bool) -> None:
    """Train one run, from its start or from its last checkpoint; a finished one only to `extend` it."""
    params = config.train_params
    require_trackers(params.trackers)
    distributed.init_process_group()
    accelerator = Accelerator(mixed_precision=params.mixed_precision, log_with=params.trackers or None)
    if params.gradient_accumulation_steps is not None:
        accelerator.gradient_accumulation_steps = params.gradient_accumulation_steps
    with distributed.raise_on_all_ranks():
        config = config.with_launch_settings(
            accelerator.num_processes,
            accelerator.mixed_precision,
            accelerator.gradient_accumulation_steps,
            accelerator.device.type,
        )
    setup_logging(main=accelerator.is_main_process)
    launch = wrap(distributed.preflight(accelerator, config.to_dict()))
    if preflight_only:
        accelerator.print(launch)
        check_setup(config, accelerator)
        accelerator.print("preflight: network, data file and launch are in order")
        return
    checkpoints = checkpoint.CheckpointManager(config, accelerator)
    stop = distributed.StopSignals(minutes=params.max_minutes)
    with closing(checkpoints):
        if (parts := setup_run(config, accelerator, stop, checkpoints, extend=extend)) is None:
            return
        run, state = parts
        if accelerator.num_processes > 1:
            accelerator.print(launch)
        try:
            with distributed.raise_on_all_ranks():
                logger = RunLogger(config, accelerator, state)
            with closing(logger), stop:
                if state.step == 0:
                    logger.log_hyperparameters(config.to_dict())
                    logger.log_twins(*run.example_twins())
                fit(run, state, logger)
        except OSError as error:
            checkpoints.require_run_dir()  # the cause, if the folder was renamed
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{error.filename or config.run_dir}: {error.strerror}. Free space, then run the same "
                "command again: it resumes from the last checkpoint."
            ) from error


def fit(run: Run, state: TrainState, logger: RunLogger) -> None:
    """Train and evaluate until the target epoch, or until a stop is requested."""
    completed = True
    while completed and not state.finished:
        # A resumed run may have trained its last epoch, but not evaluated it.
        completed = state.evaluation_pending or train_epoch(run, state, logger)
        if completed and state.evaluation_pending:
            if state.epoch < state.target_epoch:
                run.train_set.prefetch(state.epoch)  # meanwhile
            completed = evaluate(run, state, logger)
        # Saved last: a run killed before this is not finished, a run killed after it is.
        if completed:
            if state.finished:
                export(run, state)
            save(run, state)
    run.checkpoints.wait()  # it is on disk before anything says so
    # The next program may evaluate the last step. A tracker takes all values of a step at once.
    logger.send_to_trackers(run.checkpoints.saved_step - (not completed and state.step_in_epoch == 0))
    run_dir, reason = run.config.run_dir, run.stop.reason or "requested by another rank"
    if run.accelerator.is_main_process:
        draw_curves(run_dir)
    if completed:
        logger.print(f"network: {run_dir / 'model'}; next: python evaluation.py {run_dir}")
    else:
        logger.print(f"stopped at step {state.step} ({reason}); the same command resumes from there")


def train_epoch(run: Run, state: TrainState, logger: RunLogger) -> bool:
    """Train to the end of the running epoch; False if a stop was requested (the state is then saved)."""
    params, train_set = run.config.train_params, run.train_set
    started = time.perf_counter() - state.seconds
    running = metrics.RunningMetrics(run.accelerator, state.running_sums)
    run.network.train()
    logger.start_epoch(state, train_set.steps)
    for batch in state.measure_waiting(train_set.train_batches(state.epoch, state.step_in_epoch)):
        # One step. Its predictions stay on the device, so that the host does not wait for it.
        lr = state.learning_rate(params.lr, params.schedule, params.warmup_epochs, train_set.steps)
        logits = train_step(run, batch, lr)
        run.predictions.add(batch.ids, logits, batch.mask)
        running.add(logits, batch.labels, batch.mask)
        state.end_step()
        logger.send_to_trackers(run.checkpoints.saved_step)
        if state.step_in_epoch == train_set.steps:
            break
        # At log points alone the host waits for the device.
        log_point = logger.is_log_point(state.step_in_epoch)
        if log_point:
            run.predictions.require_finite(state.step)
        logger.log_step(state, running.read() | {"lr": lr} if log_point else {})
        # Save at regular times, and when any rank was asked to stop.
        stop, save_due = run.flags(run.stop.requested, run.save_due(state.step))
        if stop or save_due:
            state.seconds = time.perf_counter() - started
            run.predictions.require_finite(state.step)
            state.running_sums = running.sums()
            save(run, state)
        if stop:
            return False
    # The metrics of an epoch are those of the predictions that were made while it trained.
    run.predictions.require_finite(state.step)
    seconds, waiting = time.perf_counter() - started, state.waiting_seconds
    state.end_epoch(params.test_every)
    values = metrics.compute(run.gather(run.predictions), label_smoothing=params.label_smoothing)
    run.predictions.reset()
    logger.log_metrics("train", state, values, seconds=seconds, waiting=waiting)
    return True


def train_step(run: Run, batch: datasets.Batch, lr: float) -> Tensor:
    """One optimizer step on this rank's part of a batch; returns its logits (b,) on the device."""
    params, accelerator = run.config.train_params, run.accelerator
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    micro_batches = accelerator.gradient_accumulation_steps
    # DDP averages over ranks and Accelerate over micro-batches: undone, so that every slice weighs the same.
    scale = accelerator.num_processes * micro_batches / batch.num_valid
    logits = []
    for part in batch.split(micro_batches):
        with accelerator.accumulate(run.network):
            output = run.network(part.images).float()
            target = part.labels * (1 - params.label_smoothing) + params.label_smoothing / 2
            loss = binary_cross_entropy_with_logits(output, target, part.mask, reduction="sum")
            accelerator.backward(loss * scale)
            if accelerator.sync_gradients and params.gradient_clipping is not None:
                accelerator.clip_grad_norm_(run.network.parameters(), params.gradient_clipping)
            run.optimizer.step()
            run.optimizer.zero_grad()
            logits.append(output.detach().clone())  # a compiled network may overwrite its output
    return torch.cat(logits)


def evaluate(run: Run, state: TrainState, logger: RunLogger) -> bool:
    """Evaluate the network; False if a stop was requested (the state is then saved).

    With validation seeds they are evaluated, and the test seeds once, when the training is finished.
    """
    before = replace(state)
    phase, dataset = ("validation", run.validation_set) if run.validation_set else ("test", run.test_set)
    predictions = evaluate_phase(run, state, logger, phase, dataset)
    if predictions is not None:
        smoothing = run.config.train_params.label_smoothing
        loss = metrics.loss(predictions, smoothing)
        state.end_evaluation(loss, run.config.train_params.early_stopping)
        if state.finished and run.validation_set:
            calibration = models.fit_calibration(
                predictions.logit, predictions.label, predictions.cube_logits, predictions.axis
            )
            state.calibration = asdict(calibration) if calibration is not None else None
            predictions = evaluate_phase(run, state, logger, "test", run.test_set)
    if predictions is None:
        before.evaluation_stops += 1
        save(run, before)  # resumes with this evaluation
        with distributed.raise_on_all_ranks():
            before.require_progress()
    return predictions is not None


def evaluate_phase(
    run: Run, state: TrainState, logger: RunLogger, phase: str, dataset: datasets.WholeCubeDataset
) -> metrics.Predictions | None:
    """Evaluate the network on a dataset and log the metrics; None if a stop was requested."""
    started = time.perf_counter()
    network = run.accelerator.unwrap_model(run.network).eval()
    distributed.broadcast_buffers(network)
    buffer = metrics.PredictionBuffer(run.accelerator)
    with torch.inference_mode():
        for batch in dataset.evaluation_batches():
            buffer.add(batch.ids, network(batch.images), batch.mask)
            stop, _ = run.flags(run.stop.requested, False)
            if stop:
                return None
    buffer.require_finite(state.step, phase=phase)
    predictions = run.gather(buffer)
    smoothing = run.config.train_params.label_smoothing
    values = metrics.compute(predictions, simulations=True, label_smoothing=smoothing)
    if run.accelerator.is_main_process:
        # Imported here: matplotlib takes a second, for which the first step need not wait.
        from analysis import figures

        logger.log_figures(phase, predictions, figures.evaluation_figures(predictions), state.step)
    seconds = time.perf_counter() - started
    logger.log_metrics(phase, state, values, seconds=seconds)
    return predictions


def save(run: Run, state: TrainState) -> None:
    """Write a checkpoint; within an epoch it includes the predictions so far. Collective."""
    predictions = zip(("ids", "logits"), run.predictions.gather(), strict=True)
    run.checkpoints.save(
        run.network,
        run.optimizer,
        train_state=asdict(state),
        predictions=dict(predictions) if state.step_in_epoch else {},
        data_identity=run.data_identity,
    )


def export(run: Run, state: TrainState) -> None:
    """Write the trained network to RUN/model, for use anywhere. Collective."""
    weights = run.accelerator.get_state_dict(run.network)
    if run.accelerator.is_main_process:
        config = asdict(run.config.network_settings(run.cubes.shape, state.octaves)) | {
            "fields": run.cubes.fields,
            "mean": state.mean,
            "std": state.std,
            "power": state.power,
            "calibration": state.calibration,
            "training": {"run": run.config.model_params.name, "step": state.step, "epoch": state.epoch},
            "selection": describe_selection(run.config, state),
        }
        models.export.save(run.config.run_dir / "model", weights, config)


def draw_curves(run_dir: Path) -> None:
    """Draw what is logged so far: RUN/training.png and .pdf."""
    from analysis import figures  # imports matplotlib, for which the first step need not wait

    if records := system.read_json_lines(run_dir / METRICS_FILE):
        figures.save(figures.training_curves(records), run_dir / "training")


if __name__ == "__main__":
    sys.exit(main())
