"""`python -m checkpoint verify RUN` lists the checkpoints of a run and what is wrong with them; never writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkpoint.storage import Checkpoint


def verify(run: Path) -> bool:
    """Print every checkpoint of `run`; True if there is a complete one and no damaged one."""
    if not run.is_dir():
        print(f"{run}: there is no such folder; allowed: LOG_DIR/NAME of a run", file=sys.stderr)
        return False
    complete = damaged = 0
    print(f"{'checkpoint':<24}{'epoch':>6}{'MiB':>8}{'test loss':>11}  state")
    for path in sorted((run / "checkpoints").glob("step_[0-9]*")):
        checkpoint, kind = Checkpoint(path), path.suffix
        problem = checkpoint.find_problem()
        epoch, size, loss = "-", "-", None
        if problem is None:
            epoch, loss = checkpoint.train_state["epoch"], checkpoint.state["test_loss"]
            size = f"{sum(file['bytes'] for file in checkpoint.files.values()) / 2**20:.1f}"
        elif not path.exists():
            continue  # the run goes on, and has just deleted it
        complete += problem is None and not kind
        damaged += problem is not None and not kind
        tested = "-" if loss is None else f"{loss:.6f}"
        print(f"{path.name:<24}{epoch:>6}{size:>8}{tested:>11}  {problem or 'complete'}")
    print(f"{complete} complete, {damaged} damaged in {run / 'checkpoints'}")
    return complete > 0 and not damaged


def main() -> int:
    """`python -m checkpoint verify RUN`: exit status 0 if one checkpoint is complete and none damaged."""
    parser = argparse.ArgumentParser(description="The checkpoints of a run, and what is wrong with them.")
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("run", type=Path, help="LOG_DIR/NAME")
    return 0 if verify(parser.parse_args().run) else 2


if __name__ == "__main__":
    sys.exit(main())
