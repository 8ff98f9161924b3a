"""What a run needs of the machine: one process set up well, and several that work as one or say why not."""

from runtime.exchange import settle_gradients, share_buffers
from runtime.launch import LaunchError, compare, connect, exit_status, preflight, together
from runtime.process import StopSignals, Vote, prepare_process

__all__ = [
    "LaunchError",
    "StopSignals",
    "Vote",
    "compare",
    "connect",
    "exit_status",
    "preflight",
    "prepare_process",
    "settle_gradients",
    "share_buffers",
    "together",
]
