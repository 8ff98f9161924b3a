"""The benchmarks train: this project, the step alone and a plain loop."""

from pathlib import Path

import pytest
import runners

import datasets


@pytest.mark.parametrize("name", ["limit", "disk", "plain"])
def test_a_runner_trains(name: str, tmp_path: Path) -> None:
    datasets.write_synthetic(tmp_path / "tiny.h5", seeds=2, size=64)
    folders = {"datafile": str(tmp_path / "tiny.h5"), "scratch": str(tmp_path)}
    settings = runners.Settings(**folders, size=64, layer_param=2, seeds=1, warmup=0, seconds=0)
    result = runners.RUNNERS[name](settings)
    assert result["steps"] >= 5
    assert result["slices_per_second"] > 0
