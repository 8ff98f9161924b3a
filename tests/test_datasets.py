"""Batches: the right slices, bit for bit, from any cache, file and number of processes; reads and memory."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from datasets import (
    GRAVITIES,
    Batch,
    CubeFile,
    DataError,
    WholeCubeDataset,
    decode,
    fitting,
    order,
    statistics,
)
from datasets.cache import AHEAD, DeviceCache, HostCache

N = 64
SEEDS = range(1, 5)
CPU = torch.device("cpu")
CACHES = ("disk", "memory", "device")

Cubes = dict[tuple[int, str], NDArray[np.float32]]


@pytest.fixture(scope="module")
def cubes() -> Cubes:
    random = np.random.default_rng(7)
    return {
        (seed, gravity): random.normal(1, 2, (N, N, N)).astype(np.float32)
        for seed in range(6)
        for gravity in GRAVITIES
    }


@pytest.fixture(scope="module")
def path(cubes: Cubes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cubes") / "packed.h5"
    with h5py.File(path, "w") as file:
        for (seed, gravity), cube in cubes.items():
            file[f"{gravity}_seed{seed:04d}"] = cube
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 seeds of cubes that are all alike but for a number that tells them apart."""
    path = tmp_path_factory.mktemp("many") / "many.h5"
    with h5py.File(path, "w") as file:
        for seed in range(20):
            for label, gravity in enumerate(GRAVITIES):
                file[f"{seed}/{gravity}"] = np.full((N, N, N), 2 * seed + label, np.float32)
    return path


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """One open simulation in each stream, as with cubes of 256^3."""
    monkeypatch.setattr(order, "WINDOW_BYTES", 1)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def make(path: Path, seeds: range = SEEDS, **options: Any) -> WholeCubeDataset:
    defaults: dict[str, Any] = {"batch_size": 24, "seed": 3, "device": CPU, "cache": "memory"}
    return WholeCubeDataset(CubeFile(path), seeds, **(defaults | options))


def expected(
    cubes: Cubes,
    ids: torch.Tensor,
    turns: NDArray[np.int64],
    channels: int = 1,
    mean: float = 0.0,
    std: float = 1.0,
    newton_augmentation: float = 1.0,
) -> NDArray[np.float32]:
    """What a batch should hold, written slice by slice as one would describe it."""
    images = np.empty((len(ids), channels, N, N), np.float32)
    for k, (seed, label, axis, position) in enumerate(zip(*decode(ids.numpy(), N), strict=True)):
        cube = cubes[seed, GRAVITIES[label]]
        factor = newton_augmentation if GRAVITIES[label] == "newton" else 1.0
        for channel in range(channels):
            image = cube.take((position + channel) % N, axis=axis)
            image = ((image.astype(np.float64) - mean) * (factor / std)).astype(np.float32)
            image = image[::-1] if turns[k] & 1 else image
            image = image[:, ::-1] if turns[k] & 2 else image
            images[k, channel] = image.T if turns[k] & 4 else image
    return images


def same(one: Batch, other: Batch) -> bool:
    fields = ("ids", "images", "labels", "weights")
    return one.slices == other.slices and all(torch.equal(getattr(one, f), getattr(other, f)) for f in fields)


def all_same(ones: list[Batch], others: list[Batch]) -> bool:
    return len(ones) == len(others) and all(map(same, ones, others))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetries": False},
        {"axes": (0, 1), "batch_size": 7},
        {"axes": (2,), "channels": 3, "batch_size": 50},
        {"mean": 0.9, "std": 2.1, "newton_augmentation": 0.9, "axes": (0, 2), "batch_size": 128},
    ],
)
def test_batches_hold_the_slices_that_their_ids_name(
    cache: str, options: dict[str, Any], cubes: Cubes, path: Path
) -> None:
    data = make(path, cache=cache, **options)
    keys = ("channels", "mean", "std", "newton_augmentation")
    preparation = {key: options[key] for key in keys if key in options}
    batches = list(data.train_batches(epoch=2))
    assert len(batches) == data.steps
    assert data.shape == batches[0].images.shape[1:]
    for batch in batches:  # all are kept and compared at the end: none is overwritten by one that follows
        turns = order.random_symmetries(3, 2, batch.ids.numpy())
        turns = turns if options.get("symmetries", True) else np.zeros_like(turns)
        np.testing.assert_array_equal(batch.images, expected(cubes, batch.ids, turns, **preparation))
        np.testing.assert_array_equal(batch.labels, decode(batch.ids.numpy(), N).gravity)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.slices == batch.weights.sum()
    assert sum(batch.slices for batch in batches) == len(data)
    ids, weights = data.order(2)
    np.testing.assert_array_equal(torch.stack([batch.ids for batch in batches]), ids)
    np.testing.assert_array_equal(torch.stack([batch.weights for batch in batches]), weights)


@pytest.mark.parametrize("threads", [2, 5, 64])
def test_threads_share_the_cutting(threads: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = list(make(path, channels=2).train_batches(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert all_same(list(make(path, channels=2).train_batches(0)), alone)


def test_all_symmetries_of_all_axes_are_seen(path: Path) -> None:
    ids = torch.cat([batch.ids for batch in make(path).train_batches(0)]).numpy()
    seen = set(zip(decode(ids, N).axis.tolist(), order.random_symmetries(3, 0, ids).tolist(), strict=True))
    assert len(seen) == 24


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_processes_split_the_same_batches(cache: str, processes: int, path: Path, small_window: None) -> None:
    whole = list(make(path).train_batches(1))
    parts = [
        list(make(path, cache=cache, process_index=r, num_processes=processes).train_batches(1))
        for r in range(processes)
    ]
    for batch, *pieces in zip(whole, *parts, strict=True):
        joined = [torch.cat([getattr(p, f) for p in pieces]) for f in ("ids", "images", "labels", "weights")]
        assert same(batch, Batch(*joined, pieces[0].slices))
        assert {piece.slices for piece in pieces} == {batch.slices}


@pytest.mark.parametrize("cache", CACHES)
def test_resuming_gives_the_remaining_batches(cache: str, path: Path, small_window: None) -> None:
    whole = list(make(path, cache=cache).train_batches(1))
    for first in (1, 17, len(whole) - 1, len(whole)):
        assert all_same(list(make(path, cache=cache).train_batches(1, first)), whole[first:])


def test_the_file_s_layout_does_not_matter(cubes: Cubes, path: Path, tmp_path: Path) -> None:
    chunked = tmp_path / "chunked.h5"
    with h5py.File(chunked, "w") as file:
        for (seed, gravity), cube in cubes.items():
            values = cube.astype(">f8") if gravity == "gr" else cube
            file.create_dataset(f"{seed}/{gravity}", data=values, chunks=(16, 64, 8), compression="gzip")
    assert all_same(list(make(chunked, cache="disk").train_batches(0)), list(make(path).train_batches(0)))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("processes", [1, 3])
def test_a_test_sees_each_slice_as_it_lies_in_its_cube(
    cache: str, processes: int, cubes: Cubes, path: Path
) -> None:
    parts = [
        make(path, batch_size=48, cache=cache, process_index=r, num_processes=processes)
        for r in range(processes)
    ]
    with torch.inference_mode():
        batches = [list(part.evaluation_batches()) for part in parts]
    assert len({len(part) for part in batches}) == 1
    seen = torch.cat([batch.ids[batch.weights == 1] for part in batches for batch in part])
    np.testing.assert_array_equal(seen, order.sample_ids(SEEDS, (0, 1, 2), N).ravel())
    for batch in chain(*batches):
        assert len(batch.ids) == 48 // processes
        np.testing.assert_array_equal(batch.images, expected(cubes, batch.ids, np.zeros(len(batch.ids), int)))
    # What was made in inference mode, and for another share of the cubes, serves training too.
    for batch in parts[0].train_batches(0):
        turns = order.random_symmetries(3, 0, batch.ids.numpy())
        np.testing.assert_array_equal(batch.images, expected(cubes, batch.ids, turns))
        torch.ones_like(batch.images, requires_grad=True).mul(batch.images).sum().backward()


def test_cubes_are_read_once_per_epoch_and_memory_is_bounded(many: Path, small_window: None) -> None:
    data = make(many, range(20), cache="disk")
    whole = 20 * 2 * 4 * N**3
    for _ in data.train_batches(0):
        pass
    assert data.cubes.bytes_read == whole
    for _ in data.train_batches(1):
        pass
    assert whole < data.cubes.bytes_read <= 2 * whole  # what still lay in memory is not read again
    assert data._cache._memory.nbytes == (order.STREAMS + AHEAD) * 2 * 2 * 4 * N**3


def test_no_more_is_read_than_was_ahead(many: Path, small_window: None) -> None:
    data = make(many, range(20), cache="disk")
    batches = data.train_batches(0)
    next(batches)
    batches.close()
    assert data.cubes.bytes_read <= (order.STREAMS + AHEAD) * 2 * 4 * N**3


def test_reading_ahead_ends_with_the_iteration(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(many, range(20), cache="memory")
    read = data.cubes.read

    def slow_read(*arguments: Any) -> None:
        read(*arguments)
        time.sleep(0.02)

    monkeypatch.setattr(data.cubes, "read", slow_read)
    batches = data.train_batches(0)
    next(batches)
    batches.close()
    assert data.cubes.bytes_read < 20 * 2 * 4 * N**3


@pytest.mark.parametrize("cache", CACHES)
def test_the_first_cubes_can_be_read_before_they_are_asked_for(
    cache: str, many: Path, small_window: None, no_thread_stays: None
) -> None:
    ahead, plain = (make(many, range(20), axes=(0, 2), cache=cache) for _ in range(2))
    for epoch, first_step in ((0, 0), (1, 3)):
        ahead.prefetch(epoch + 5, first_step)  # what is then not asked for does no harm
        ahead.prefetch(epoch, first_step)
        for thread in threading.enumerate():
            if thread.name.startswith("read"):
                thread.join()
        read = ahead.cubes.bytes_read
        assert read
        batches = ahead.train_batches(epoch, first_step)
        one = next(batches)
        assert all_same([one, *batches], list(plain.train_batches(epoch, first_step)))
    assert ahead.cubes.bytes_read <= plain.cubes.bytes_read + 4 * order.STREAMS * 2 * 4 * N**3


def test_cubes_read_ahead_are_not_read_again(many: Path, small_window: None) -> None:
    data = make(many, range(20), cache="disk", axes=(0,))
    data.prefetch(0)
    for _ in data.train_batches(0):
        pass
    assert data.cubes.bytes_read == 20 * 2 * 4 * N**3


@pytest.mark.parametrize("cache", ["memory", "device"])
def test_what_is_kept_is_read_once_per_run(cache: str, many: Path, small_window: None) -> None:
    data = make(many, range(20), cache=cache, axes=(0,), batch_size=48)
    for _ in data.train_batches(0, data.steps // 2):  # resumed: this needs only some of the cubes
        pass
    for epoch in range(1, 3):
        for batch in data.train_batches(epoch):
            where = decode(batch.ids.numpy(), N)
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0], 2 * where.seed + where.gravity)
    assert data.cubes.bytes_read == 20 * 2 * 4 * N**3


@pytest.mark.parametrize(("processes", "shared"), [(2, 1), (4, 3), (8, 11)])
def test_processes_read_their_share(processes: int, shared: int, many: Path, small_window: None) -> None:
    pair = 2 * 4 * N**3
    read = 0
    for r in range(processes):
        share = {"process_index": r, "num_processes": processes}
        data = make(many, range(20), axes=(1,), batch_size=8, cache="disk", **share)
        for _ in data.train_batches(0):
            pass
        assert len(data._cache._memory) <= order.STREAMS // processes + AHEAD
        read += data.cubes.bytes_read
    assert 20 * pair <= read <= (20 + shared) * pair


@pytest.mark.parametrize("cache", CACHES)
def test_memory_is_taken_once(
    cache: str, many: Path, small_window: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def resize(self: HostCache, slots: int) -> None:
        taken.append(slots)
        plain(self, slots)

    plain = HostCache._resize
    monkeypatch.setattr(HostCache, "_resize", resize)
    data = make(many, range(20), cache=cache, axes=(0,), batch_size=240)
    for epoch in range(5):
        for _ in data.train_batches(epoch):
            pass
    assert taken[0] == 0
    assert len(taken) == 2


@pytest.mark.parametrize("cache", CACHES)
def test_threads_end_with_the_iteration(
    cache: str, many: Path, small_window: None, no_thread_stays: None
) -> None:
    data = make(many, range(20), cache=cache, axes=(0,), batch_size=48)
    for _ in data.train_batches(0):
        break
    assert len(list(data.train_batches(0))) == data.steps
    batches = data.train_batches(1)
    first = next(batches)
    with pytest.raises(RuntimeError, match="one loop at a time"):
        next(data.train_batches(1))
    batches.close()
    assert same(first, next(data.train_batches(1)))


@pytest.mark.parametrize("cache", CACHES)
def test_a_bad_cube_is_an_error_where_the_batches_are_read(
    cache: str, many: Path, tmp_path: Path, small_window: None, no_thread_stays: None
) -> None:
    bad = tmp_path / "bad.h5"
    bad.write_bytes(many.read_bytes())
    with h5py.File(bad, "r+") as file:
        file["13/gr"][1, 2, 3] = np.nan
    data = make(bad, range(20), cache=cache, axes=(0,))
    with pytest.raises(DataError, match="/13/gr"):
        for _ in data.train_batches(0):
            pass
    with h5py.File(bad, "r+") as file:
        file["13/gr"][1, 2, 3] = 27
    assert all_same(list(data.train_batches(0)), list(make(many, range(20), axes=(0,)).train_batches(0)))


def test_micro_batches_keep_the_slices_of_the_whole_batch(path: Path) -> None:
    batch = next(make(path).train_batches(0))
    pieces = batch.split(3)
    assert [len(piece.ids) for piece in pieces] == [8, 8, 8]
    assert {piece.slices for piece in pieces} == {24}
    assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)
    assert [len(piece.ids) for piece in batch.split(1)] == [24]


def test_statistics_are_those_of_all_values(cubes: Cubes, path: Path) -> None:
    values = np.stack([cubes[seed, gravity] for seed in SEEDS for gravity in GRAVITIES]).astype(np.float64)
    assert statistics(CubeFile(path), SEEDS) == pytest.approx((values.mean(), values.std()), rel=1e-12)


def test_cubes_without_a_field_cannot_standardise(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        for gravity in GRAVITIES:
            file[f"0/{gravity}"] = np.full((N, N, N), 3, np.float32)
    with pytest.raises(DataError, match=r"all values are 3\.0"):
        statistics(CubeFile(tmp_path / "flat.h5"), range(1))


def test_a_batch_larger_than_the_training_set_is_an_error(path: Path) -> None:
    assert make(path, batch_size=len(SEEDS) * 6 * N).steps == 1
    data = make(path, batch_size=len(SEEDS) * 6 * N + 1)
    assert len(list(data.evaluation_batches())) == 1  # only training needs full batches
    with pytest.raises(DataError, match=r"(?s)train_params.batch_size 1537 .*data_params.train_seeds 4"):
        _ = data.steps


def test_a_batch_is_shared_out_evenly_or_not_at_all(path: Path) -> None:
    with pytest.raises(DataError, match=r"train_params.batch_size 25 .* 2 processes"):
        make(path, batch_size=25, num_processes=2)


@pytest.mark.parametrize("cache", CACHES)
def test_too_little_memory_is_the_user_s_to_mend(
    cache: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(self: HostCache, slots: int) -> NDArray[np.float32]:
        if slots:
            raise MemoryError("no 40 GiB here")
        return np.empty(0, np.float32)

    monkeypatch.setattr(HostCache, "_allocate", allocate)
    monkeypatch.setattr(DeviceCache, "_allocate", allocate)
    with pytest.raises(DataError, match=rf"data_params.cache {cache} needs more .* 40 GiB"):
        next(make(path, cache=cache).train_batches(0))


def test_missing_seeds_are_an_error(path: Path) -> None:
    with pytest.raises(DataError, match="8"):
        make(path, range(3, 9))


Machine = Callable[[int, dict[str, str]], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine with this many bytes free, and control groups of either version with these limits."""

    def build(free: int, limits: dict[str, str]) -> None:
        class Memory:
            available = free

        monkeypatch.setattr(fitting.psutil, "virtual_memory", Memory)
        groups = tmp_path / "cgroup"
        (tmp_path / "self").mkdir()
        (tmp_path / "self/cgroup").write_text("5:memory:/slurm/job_7\n1:cpu,cpuacct:/\n0::/slurm/job_7\n")
        for name, limit in limits.items():
            (groups / name).parent.mkdir(parents=True, exist_ok=True)
            (groups / name).write_text(limit + "\n")
            (groups / name).with_name("memory.stat").write_text("anon 1000\ntotal_rss 2000\nfile 500000\n")
        monkeypatch.setattr(fitting, "PROCESSES", tmp_path)
        monkeypatch.setattr(fitting, "GROUPS", groups)

    return build


@pytest.mark.parametrize(
    ("free", "limits", "expected_free"),
    [
        (10**9, {}, 10**9),
        (10**9, {"slurm/job_7/memory.max": "max", "slurm/memory.max": "max"}, 10**9),
        (10**9, {"slurm/job_7/memory.max": "max", "slurm/memory.max": "500000"}, 499_000),
        (10**9, {"slurm/job_7/memory.max": "300000", "slurm/memory.max": "500000"}, 299_000),
        (10**9, {"memory/slurm/job_7/memory.limit_in_bytes": "300000"}, 298_000),
        (10**9, {"memory/slurm/job_7/memory.limit_in_bytes": str(2**63 - 4096)}, 10**9),
        (100, {"slurm/job_7/memory.max": "300000"}, 100),
    ],
)
def test_free_memory_heeds_control_groups(
    free: int, limits: dict[str, str], expected_free: int, machine: Machine
) -> None:
    machine(free, limits)
    assert fitting.available_memory() == expected_free


@pytest.mark.parametrize(("local_processes", "chosen"), [(1, "memory"), (2, "disk")])
def test_auto_takes_the_fastest_that_fits_and_says_so(
    local_processes: int,
    chosen: str,
    path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    share = 4 * 2 * 2 * 4 * N**3
    machine(int(1.5 * share / fitting.FREE_SHARE), {})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_processes))
    with caplog.at_level(logging.INFO):
        data = make(path, cache="auto")
    assert data.cache == chosen
    assert [f"cache: {chosen}" in record.message for record in caplog.records] == [True]
