"""Process set-up, rendezvous, preflight checks and collectives of a launch with one or more ranks."""

from distributed.collectives import raise_on_all_ranks, require_equal
from distributed.ddp import broadcast_buffers, warm_up_ddp
from distributed.errors import LaunchError, run_program
from distributed.preflight import preflight
from distributed.process import setup_process
from distributed.rendezvous import init_process_group
from distributed.signals import AnyRankFlags, StopSignals

__all__ = [
    "AnyRankFlags",
    "LaunchError",
    "StopSignals",
    "broadcast_buffers",
    "init_process_group",
    "preflight",
    "raise_on_all_ranks",
    "require_equal",
    "run_program",
    "setup_process",
    "warm_up_ddp",
]
