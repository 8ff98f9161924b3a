"""Set-up and end of a process, and what the ranks of a launch do together."""

from training.distributed.collectives import (
    AnyRankFlags,
    broadcast_buffers,
    raise_on_all_ranks,
    require_equal,
    warm_up_ddp,
)
from training.distributed.devices import cpu_name, describe_hardware
from training.distributed.launch import code_hash, init_process_group, preflight
from training.distributed.process import run_program, setup_process
from training.distributed.signals import SIGNALS, StopSignals

__all__ = [
    "SIGNALS",
    "AnyRankFlags",
    "StopSignals",
    "broadcast_buffers",
    "code_hash",
    "cpu_name",
    "describe_hardware",
    "init_process_group",
    "preflight",
    "raise_on_all_ranks",
    "require_equal",
    "run_program",
    "setup_process",
    "warm_up_ddp",
]
