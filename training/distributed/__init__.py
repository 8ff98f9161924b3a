"""Process set-up, rendezvous, preflight checks and collectives of a launch with one or more ranks."""

from training.distributed.collectives import raise_on_all_ranks, require_equal
from training.distributed.ddp import broadcast_buffers, warm_up_ddp
from training.distributed.devices import describe_hardware, sum_over_devices
from training.distributed.errors import LaunchError, run_program
from training.distributed.preflight import preflight
from training.distributed.process import setup_process
from training.distributed.rendezvous import init_process_group
from training.distributed.signals import AnyRankFlags, StopSignals, ignore_stop_signals

__all__ = [
    "AnyRankFlags",
    "LaunchError",
    "StopSignals",
    "broadcast_buffers",
    "describe_hardware",
    "ignore_stop_signals",
    "init_process_group",
    "preflight",
    "raise_on_all_ranks",
    "require_equal",
    "run_program",
    "setup_process",
    "sum_over_devices",
    "warm_up_ddp",
]
