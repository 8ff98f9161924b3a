"""Reading by several threads."""

import os
from pathlib import Path

import numpy as np
import pytest

from datasets import storage
from datasets.storage import MIN_PART_BYTES, read_into


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("missing", [0, 5, 3 << 20])
def test_parts_are_read_to_their_places(
    tmp_path: Path, count: int, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).integers(0, 256, 4 * MIN_PART_BYTES + 77, dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(b"head" + values.tobytes())
    os.truncate(path, 4 + values.size - missing)
    monkeypatch.setattr(storage, "STREAMS", count)
    target = np.zeros_like(values)
    available = values.size - missing
    assert read_into(path, 4, target.data) == available
    np.testing.assert_array_equal(target[:available], values[:available])
