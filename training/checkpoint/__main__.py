"""`python -m training.checkpoint verify RUN` lists the checkpoints of a run and their problems."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.checkpoint.schema import NewerFormatError
from training.checkpoint.storage import Checkpoint


def verify(run_dir: Path) -> bool:
    """Print every checkpoint of a run; returns whether one is complete and all of them can be used."""
    if not run_dir.is_dir():
        print(f"{run_dir}: no such folder, allowed: LOG_DIR/NAME of a run", file=sys.stderr)
        return False
    complete = damaged = newer = 0
    print(f"{'checkpoint':<24}{'epoch':>6}{'MiB':>8}{'loss':>11}  state")
    for path in sorted((run_dir / "checkpoints").glob("step_[0-9]*")):
        checkpoint, counts = Checkpoint(path), not path.suffix  # others are incomplete or quarantined
        epoch = size = loss = "-"
        try:
            problem = checkpoint.find_problem()
        except NewerFormatError as error:
            problem = str(error).removeprefix(f"{path}: ")
            newer += 1
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            damaged += counts
        else:
            if problem is None:
                epoch = str(checkpoint.train_state["epoch"])
                size = f"{sum(file['bytes'] for file in checkpoint.files.values()) / 2**20:.1f}"
                if checkpoint.state["test_loss"] is not None:
                    loss = f"{checkpoint.state['test_loss']:.6f}"
            elif not path.exists():
                continue  # a running training has just deleted it
            complete += problem is None and counts
            damaged += problem is not None and counts
        print(f"{path.name:<24}{epoch:>6}{size:>8}{loss:>11}  {problem or 'complete'}")
    summary = f"{complete} complete, {damaged} damaged" + (f", {newer} of a newer version" if newer else "")
    print(f"{summary} in {run_dir / 'checkpoints'}")
    return complete > 0 and not damaged and not newer


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0 if a checkpoint is complete and none is damaged, otherwise 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.checkpoint", description="List the checkpoints of a run and their problems."
    )
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("run", type=Path, help="LOG_DIR/NAME")
    return 0 if verify(parser.parse_args(arguments).run) else 2


if __name__ == "__main__":
    sys.exit(main())
