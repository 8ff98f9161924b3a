"""Checkpoints of the whole training state.

`manager`: when they are written, which one is resumed. `storage`: folders on disk. `tensors`: live state as
named tensors.
"""

from training.checkpoint.manager import CheckpointManager
from training.checkpoint.storage import Checkpoint, list_checkpoints, select

__all__ = ["Checkpoint", "CheckpointManager", "list_checkpoints", "select"]
