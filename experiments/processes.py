"""How the programs that start many runs start and stop them.

Functions import what imports torch, for which --help need not wait.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with an experiment, its overrides, and the command that starts programs."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("experiment", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the file")
    parser.add_argument(
        "--launcher",
        type=shlex.split,
        default=[sys.executable],
        help="command that starts the programs, e.g. 'accelerate launch'",
    )
    return parser


def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a program of this project without its output.

    It stops when this process is killed (on Linux): two trainers must not share a run.
    """
    from training.distributed.process import end_with_launcher

    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        preexec_fn=end_with_launcher,
        env={**os.environ, **(environment or {})},
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Let a run save and stop; returns when it has ended."""
    process.terminate()
    process.wait()
