"""Train a network to tell General Relativity from Newtonian gravity.

    accelerate launch trainer.py experiments/temp.yaml [section.key=value ...]

The story of a run, top to bottom: read the experiment, open the run (opening.py), go on from its last
checkpoint, train and test epoch by epoch, and leave the trained network in the run's folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import checkpoint
import config as experiment
import datasets
import logs
import metrics
import models
import runtime
from opening import Run, check, open_run
from progress import Progress

FINITE_EVERY = 20  # steps between looks at whether the logits are finite; each look waits for the device

USER_ERRORS = (
    experiment.ConfigError,
    datasets.DataError,
    models.ModelError,
    checkpoint.CheckpointError,
    runtime.LaunchError,
    metrics.Diverged,
    OSError,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the file")
    parser.add_argument("--preflight", action="store_true", help="check the set-up and exit")
    options = parser.parse_args(arguments)

    def work() -> None:
        runtime.prepare_process()
        train(experiment.load(options.experiment, options.overrides), preflight_only=options.preflight)

    return runtime.exit_status(work, USER_ERRORS)


def train(config: experiment.Config, *, preflight_only: bool) -> None:
    """One run from its start, or from where it was left, to its end."""
    keys = config.train_params
    runtime.connect()
    accelerator = Accelerator(mixed_precision=keys.mixed_precision)
    if keys.gradient_accumulation_steps is not None:
        accelerator.gradient_accumulation_steps = keys.gradient_accumulation_steps
    with runtime.together():
        config = config.on_hardware(
            accelerator.num_processes,
            accelerator.mixed_precision,
            accelerator.gradient_accumulation_steps,
            accelerator.device.type,
        )
    logs.listen(main=accelerator.is_main_process)
    if preflight_only or accelerator.num_processes > 1:
        accelerator.print(runtime.preflight(accelerator, config.to_dict()))
    if preflight_only:
        check(config)
        return
    checkpoints = checkpoint.Checkpoints(config.run, accelerator, keep=keys.keep_checkpoints)
    with runtime.StopSignals(minutes=keys.max_minutes) as stop, closing(checkpoints):
        run, progress, tensors = open_run(config, accelerator, stop, checkpoints)
        with runtime.together():
            log = logs.RunLog(config.run, main=accelerator.is_main_process, step=progress.step)
        with closing(log):
            if progress.step == 0:
                log.hyperparameters(config.to_dict())
            go_on(run, progress, tensors, log)


def go_on(run: Run, progress: Progress, tensors: dict[str, Tensor], log: logs.RunLog) -> None:
    """Train and test until all that was asked for is done, or until a stop comes."""
    while not progress.finished:
        complete = progress.awaiting_test or train_epoch(run, progress, tensors, log)
        tensors = {}
        if complete and progress.awaiting_test:
            if progress.epoch < progress.target_epoch:
                run.train_set.read_ahead(progress.epoch)
            complete = test(run, progress, log)
        if not complete:
            run.checkpoints.close()  # which waits until all is written
            log.say(f"stopped at step {progress.step} ({run.stop.name}); the same command goes on there")
            break
        if progress.finished:
            export(run, progress)
        # Last of all: a run that is killed before is not finished, one that is killed after is.
        save(run, progress)


def train_epoch(run: Run, progress: Progress, tensors: dict[str, Tensor], log: logs.RunLog) -> bool:
    """Train to the end of the epoch that is running; False if a stop came first (the state is then saved)."""
    keys, train_set = run.config.train_params, run.train_set
    said = metrics.Predictions(run.accelerator)
    if tensors:
        said.restore(**tensors)
    started = time.perf_counter() - progress.seconds
    run.network.train()
    log.begin_epoch(progress.epoch + 1, train_set.steps, progress.step_in_epoch)
    for batch in train_set.train_batches(progress.epoch, progress.step_in_epoch):
        if progress.step == 0:
            log.slices(batch.images[:4, 0], batch.labels[:4])
        lr = progress.learning_rate(keys.lr, keys.schedule, keys.warmup_epochs, train_set.steps)
        said.add(batch.ids, train_step(run, batch, lr), batch.weights)
        progress.end_step()
        log.advance()
        run.checkpoints.check()
        if progress.step_in_epoch == train_set.steps:
            break
        if progress.step % FINITE_EVERY == 0:
            said.require_finite(progress.step)
        due = keys.save_every_steps is not None and progress.step % keys.save_every_steps == 0
        late = run.late(run.checkpoints.minutes >= keys.save_every_minutes)
        stop = run.stop.agreed()
        if stop or due or late:
            progress.seconds = time.perf_counter() - started
            said.require_finite(progress.step)
            save(run, progress, said)
        if stop:
            return False
    said.require_finite(progress.step)
    progress.end_epoch(keys.test_every)
    numbers = progress.where | outcome_of(run, said).numbers()
    log.scalar("lr", lr, progress.step)
    log.phase("train", numbers, seconds=time.perf_counter() - started, target_epoch=progress.target_epoch)
    return True


def train_step(run: Run, batch: datasets.Batch, lr: float) -> Tensor:
    """One optimizer step on this process's part of a batch; returns its logits on the device."""
    keys, accelerator = run.config.train_params, run.accelerator
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    parts = accelerator.gradient_accumulation_steps
    # DDP averages over processes and Accelerate over parts: undone, so that every slice weighs the same.
    scale = accelerator.num_processes * parts / batch.slices
    logits = []
    for part in batch.split(parts):
        with accelerator.accumulate(run.network):
            output = run.network(part.images).float()
            target = part.labels * (1 - keys.label_smoothing) + keys.label_smoothing / 2
            loss = binary_cross_entropy_with_logits(output, target, part.weights, reduction="sum")
            accelerator.backward(loss * scale)
            if accelerator.sync_gradients and keys.gradient_clipping is not None:
                accelerator.clip_grad_norm_(run.network.parameters(), keys.gradient_clipping)
            run.optimizer.step()
            run.optimizer.zero_grad()
            logits.append(output.detach().clone())  # a compiled network may write into its output again
    return torch.cat(logits)


def test(run: Run, progress: Progress, log: logs.RunLog) -> bool:
    """Test the network on the seeds it has not seen; False if a stop came first (the state is then saved)."""
    started = time.perf_counter()
    network = run.accelerator.unwrap_model(run.network).eval()
    runtime.share_buffers(network)
    said = metrics.Predictions(run.accelerator)
    with torch.inference_mode():
        for batch in run.test_set.test_batches():
            said.add(batch.ids, network(batch.images), batch.weights)
            if run.stop.agreed():
                save(run, progress)
                return False
    said.require_finite(progress.step, test=True)
    outcome = outcome_of(run, said)
    numbers = progress.where | outcome.numbers(simulations=True)
    log.test_curves(outcome.labels, outcome.logits, figures_of(outcome, run.accelerator), progress.step)
    log.phase("test", numbers, seconds=time.perf_counter() - started, target_epoch=progress.target_epoch)
    progress.end_test(metrics.loss(outcome), run.config.train_params.early_stopping)
    return True


def figures_of(outcome: metrics.Outcome, accelerator: Accelerator) -> dict[str, Any]:
    """The confusion matrix and the mean logits of the twins, for the main process to show."""
    if not accelerator.is_main_process:
        return {}
    from analysis import figures  # takes a second, which the first step need not wait for

    seeds, means, labels = outcome.cubes
    twins = figures.twins_plot(seeds[labels == 0], means[labels == 0], means[labels == 1])
    return {"confusion": figures.confusion_matrix(outcome.confusion), "twins": twins}


def outcome_of(run: Run, said: metrics.Predictions) -> metrics.Outcome:
    """What the network said in a phase, with what is true."""
    ids, logits = said.gather()
    where = datasets.decode(ids.numpy(), run.cubes.size)
    smoothing = run.config.train_params.label_smoothing
    return metrics.Outcome(logits.double().numpy(), where.gravity, where.seed, smoothing)


def save(run: Run, progress: Progress, said: metrics.Predictions | None = None) -> None:
    """A checkpoint of where the run stands, with what was said so far in an epoch that is running."""
    tensors = dict(zip(("ids", "logits"), said.gather(), strict=True)) if said else {}
    run.checkpoints.save(
        run.network,
        run.optimizer,
        progress=asdict(progress),
        tensors=tensors,
        config=run.config.to_dict(),
        identity=run.identity,
        test_loss=progress.test_loss if progress.step_in_epoch == 0 else None,
    )


def export(run: Run, progress: Progress) -> None:
    """The trained network on its own, for use anywhere."""
    weights = run.accelerator.get_state_dict(run.network)
    if run.accelerator.is_main_process:
        models.save(
            run.config.run / "model",
            weights,
            settings=run.config.network(run.cubes.size),
            mean=progress.mean,
            std=progress.std,
            extra={"run": run.config.model_params.name, "step": progress.step, "epoch": progress.epoch},
        )


if __name__ == "__main__":
    sys.exit(main())
