"""Checkpoints of the whole training state.

`manager`: when, which and how many. `storage`: folders on disk. `schema`: the content of the JSON files.
`tensors`: live state as named tensors.
"""

from training.checkpoint.manager import CheckpointManager
from training.checkpoint.schema import NewerFormatError
from training.checkpoint.storage import Checkpoint, CheckpointError, list_checkpoints, select

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointManager",
    "NewerFormatError",
    "list_checkpoints",
    "select",
]
