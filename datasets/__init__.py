"""Cube files, the order of slices, and batches of slices on the device."""

from .cubes import GRAVITIES, CubeFile, DataError
from .likeness import require_same_standardisation
from .order import Slices, decode
from .synthetic import require_synthetic, write_synthetic
from .whole_cube import Batch, WholeCubeDataset, statistics

__all__ = [
    "GRAVITIES",
    "Batch",
    "CubeFile",
    "DataError",
    "Slices",
    "WholeCubeDataset",
    "decode",
    "require_same_standardisation",
    "require_synthetic",
    "statistics",
    "write_synthetic",
]
