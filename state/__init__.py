"""The whole state of a training: as named tensors (`tensors`) and as folders on disk (`folder`)."""

from .choice import named
from .folder import Checkpoint, CheckpointError, choose, existing, place, rotate, write
from .tensors import Parts, capture, copy, differences, not_finite, restore

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Parts",
    "capture",
    "choose",
    "copy",
    "differences",
    "existing",
    "named",
    "not_finite",
    "place",
    "restore",
    "rotate",
    "write",
]
