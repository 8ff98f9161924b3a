"""`python -m training.checkpoint verify RUN` lists the checkpoints of a run and their problems."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for python CHECKOUT/training/checkpoint

from system import UserError

import argparse

from training.checkpoint.storage import Checkpoint


def verify(run_dir: Path) -> bool:
    """Print every checkpoint of a run; returns whether one is complete and all of them can be used."""
    if not run_dir.is_dir():
        print(f"{run_dir}: no such folder, allowed: LOG_DIR/NAME of a run", file=sys.stderr)
        return False
    complete = unusable = 0
    print(f"{'checkpoint':<24}{'epoch':>6}{'MiB':>8}{'loss':>11}  state")
    for path in sorted((run_dir / "checkpoints").glob("step_[0-9]*")):
        checkpoint, columns = Checkpoint(path), f"{'-':>6}{'-':>8}{'-':>11}"
        try:
            problem = checkpoint.find_problem()
        except (UserError, OSError) as error:
            problem = str(error)
        if problem is None:
            size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
            loss = "-" if checkpoint.test_loss is None else f"{checkpoint.test_loss:.6f}"
            columns = f"{checkpoint.train_state['epoch']:>6}{size:>8.1f}{loss:>11}"
        elif not path.exists():
            continue  # a running training has just deleted it
        if not path.suffix:  # others are being written or deleted, or are quarantined
            complete += problem is None
            unusable += problem is not None
        print(f"{path.name:<24}{columns}  {problem or 'complete'}")
    print(f"{complete} complete, {unusable} unusable in {run_dir / 'checkpoints'}")
    return complete > 0 and not unusable


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0 if a checkpoint is complete and all can be used, otherwise 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.checkpoint", description="List the checkpoints of a run and their problems."
    )
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("run", type=Path, help="LOG_DIR/NAME")
    return 0 if verify(parser.parse_args(arguments).run) else 2


if __name__ == "__main__":
    sys.exit(main())
