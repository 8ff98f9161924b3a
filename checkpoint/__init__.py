"""Checkpoints of the whole training state: when, which and how many (`manager`), folders on disk (`storage`),
live state as named tensors (`tensors`).
"""

from checkpoint.manager import CheckpointManager
from checkpoint.storage import Checkpoint, CheckpointError, list_checkpoints, select

__all__ = ["Checkpoint", "CheckpointError", "CheckpointManager", "list_checkpoints", "select"]
