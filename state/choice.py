"""One checkpoint of a run, chosen by a person."""

from __future__ import annotations

from pathlib import Path

from .folder import Checkpoint, CheckpointError, existing


def named(folder: Path, name: str) -> Checkpoint:
    """The `best` (by test loss), the `last`, or the checkpoint of step `name` among the complete ones.

    CheckpointError, naming what is there, if there is none of that name, or if it may be a damaged one.
    """
    complete = {}
    for one in existing(folder):
        problem = one.problem()
        if problem is None:
            complete[str(one.step)] = one
        elif name in ("best", "last", str(one.step)):
            raise CheckpointError(f"{one.folder}: {problem}; allowed: the step of another one")
    losses = {step: one.state["test_loss"] for step, one in complete.items()}
    tested = {step: loss for step, loss in losses.items() if loss is not None}
    choices = dict(complete)
    if complete:
        choices["last"] = max(complete.values(), key=lambda one: one.step)
    if tested:
        choices["best"] = complete[min(tested, key=lambda step: (tested[step], int(step)))]
    if name not in choices:
        raise CheckpointError(
            f"{folder}: found no '{name}', allowed: {', '.join(choices) or 'none is there'}"
        )
    return choices[name]
