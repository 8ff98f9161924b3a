"""Reading by several streams: the number that is chosen, and the bytes that are read."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datasets.streams import MAX_STREAMS, MIN_PART_BYTES, StreamTuner, read_into


@pytest.mark.parametrize(
    ("speed", "chosen"),
    [
        (lambda streams: 160, 1),  # a local disk
        (lambda streams: 160 * min(streams, 4), 4),
        (lambda streams: 160 * streams, MAX_STREAMS),  # a parallel file system
        (lambda streams: 160 / streams, 1),
    ],
)
def test_streams_are_added_while_they_make_reads_faster(speed: Callable[[int], float], chosen: int) -> None:
    tuner = StreamTuner()
    tried = []
    for _ in range(40):
        tried.append(tuner.count)
        tuner.record(tuner.count, 1000, 1000 / speed(tuner.count))
    assert tuner.count == chosen
    assert max(tried) <= min(2 * chosen, MAX_STREAMS)


def test_one_slow_read_does_not_decide() -> None:
    tuner = StreamTuner()
    for k in range(40):
        slow = 100 if k % 3 == 0 else 1  # as when another program uses the disk
        tuner.record(tuner.count, 1000, slow * 1000 / tuner.count)
    assert tuner.count == MAX_STREAMS


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("missing", [0, 5, 3 << 20])
def test_parts_are_read_to_their_places(tmp_path: Path, count: int, missing: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, 4 * MIN_PART_BYTES + 77, dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(b"head" + values.tobytes())
    os.truncate(path, 4 + values.size - missing)
    tuner = StreamTuner()
    tuner.fix(count)
    target = np.zeros_like(values)
    assert read_into(path, 4, target.data, tuner) == values.size - missing
    available = values.size - missing
    np.testing.assert_array_equal(target[:available], values[:available])
