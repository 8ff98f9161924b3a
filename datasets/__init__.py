"""Cube files, the order of slices, and batches of slices on the device."""

from .cube_file import GRAVITIES, CubeFile, PerField
from .dataset import Batch, DataSettings, WholeCubeDataset
from .normalization import check_normalization, measure_normalization, measure_power
from .preparation.checks import check_copy, check_seeds, data_warnings
from .preparation.synthetic import check_synthetic, write_synthetic
from .sampler import SliceIndex, decode
from .slicing import memory_format

__all__ = [
    "GRAVITIES",
    "Batch",
    "CubeFile",
    "DataSettings",
    "PerField",
    "SliceIndex",
    "WholeCubeDataset",
    "check_copy",
    "check_normalization",
    "check_seeds",
    "check_synthetic",
    "data_warnings",
    "decode",
    "measure_normalization",
    "measure_power",
    "memory_format",
    "write_synthetic",
]
