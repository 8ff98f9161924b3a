"""Cube files, the order of slices, and batches of slices on the device."""

from .cube_file import GRAVITIES, CubeFile
from .dataset import Batch, WholeCubeDataset
from .normalization import check_normalization, measure_normalization
from .preparation.synthetic import check_synthetic, write_synthetic
from .sampler import SliceIndex, decode
from .slicing import memory_format

__all__ = [
    "GRAVITIES",
    "Batch",
    "CubeFile",
    "SliceIndex",
    "WholeCubeDataset",
    "check_normalization",
    "check_synthetic",
    "decode",
    "measure_normalization",
    "memory_format",
    "write_synthetic",
]
