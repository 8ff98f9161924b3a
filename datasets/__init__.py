"""Cube files, the order of slices, and batches of slices on the device."""

from .cache import image_memory_format
from .cube_file import GRAVITIES, CubeFile, DataError
from .dataset import Batch, WholeCubeDataset, measure_normalization
from .normalization import check_normalization
from .preparation.synthetic import check_synthetic, write_synthetic
from .sampler import SliceIndex, decode

__all__ = [
    "GRAVITIES",
    "Batch",
    "CubeFile",
    "DataError",
    "SliceIndex",
    "WholeCubeDataset",
    "check_normalization",
    "check_synthetic",
    "decode",
    "image_memory_format",
    "measure_normalization",
    "write_synthetic",
]
