"""What a run needs of the machine: one process set up well, and several that work as one or say why not."""

from runtime.exchange import settle_gradients, share_buffers
from runtime.launch import LaunchError, compare, connect, in_words, preflight, tell, together
from runtime.process import StopSignals, Vote, prepare_process

__all__ = [
    "LaunchError",
    "StopSignals",
    "Vote",
    "compare",
    "connect",
    "in_words",
    "preflight",
    "prepare_process",
    "settle_gradients",
    "share_buffers",
    "tell",
    "together",
]
