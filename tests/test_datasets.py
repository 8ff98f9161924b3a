"""Batches: bit-identical slices from every cache, file layout and number of ranks; reads and memory."""

import system
from system import UserError

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
    WholeCubeDataset,
    decode,
    measure_normalization,
    memory_format,
    sampler,
)
from datasets.cache import FREE_SHARE, SEEDS_AHEAD
from datasets.slicing import BufferPool

N = 64
SEEDS = range(1, 5)
CPU = torch.device("cpu")
CACHES = ("disk", "memory", "device")

Cubes = dict[tuple[int, str], NDArray[np.float32]]


@pytest.fixture(scope="module")
def cubes() -> Cubes:
    """Twins that differ by little noise."""
    random = np.random.default_rng(7)
    fields = random.normal(1, 2, (6, 1, N, N, N)) + random.normal(0, 0.1, (6, 2, N, N, N))
    return {
        (seed, gravity): fields[seed, label].astype(np.float32)
        for seed in range(6)
        for label, gravity in enumerate(GRAVITIES)
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
    """20 seeds whose cubes are a pattern plus a constant, 2 * seed + label."""
    path = tmp_path_factory.mktemp("many") / "many.h5"
    pattern = np.random.default_rng(0).normal(size=(N, N, N)).astype(np.float32)
    pattern[:, :: N - 1, :: N - 1] = 0  # in the corners of a slice
    with h5py.File(path, "w") as file:
        for seed in range(20):
            for label, gravity in enumerate(GRAVITIES):
                file[f"{seed}/{gravity}"] = pattern + np.float32(2 * seed + label)
    return path


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """One open seed per stream, as with cubes of 256^3."""
    monkeypatch.setattr(sampler, "WINDOW_BYTES", 1)


@pytest.fixture
def no_thread_remains() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@dataclass
class Settings:
    """The data section of an experiment."""

    axes: tuple[int, ...] = (0, 1, 2)
    channels: int = 1
    newton_augmentation: float = 1.0
    symmetries: bool = True
    shifts: bool = False
    pairs: bool = False
    cache: str = "memory"


def make(path: Path, seeds: range = SEEDS, **options: Any) -> WholeCubeDataset:
    settings = {key: options.pop(key) for key in vars(Settings()) if key in options}
    defaults: dict[str, Any] = {"batch_size": 24, "seed": 3, "device": CPU}
    return WholeCubeDataset(CubeFile(path), seeds, Settings(**settings), **(defaults | options))


def expected(
    cubes: Cubes,
    ids: torch.Tensor,
    symmetries: NDArray[np.int64],
    shifts: NDArray[np.int64] | None = None,
    channels: int = 1,
    mean: float = 0.0,
    std: float = 1.0,
    newton_augmentation: float = 1.0,
) -> NDArray[np.float32]:
    """The images of a batch, computed slice by slice with NumPy."""
    images = np.empty((len(ids), channels, N, N), np.float32)
    for k, (seed, label, axis, position) in enumerate(zip(*decode(ids.numpy(), N), strict=True)):
        cube = cubes[seed, GRAVITIES[label]]
        factor = newton_augmentation if GRAVITIES[label] == "newton" else 1.0
        for channel in range(channels):
            image = cube.take((position + channel) % N, axis=axis)
            image = ((image.astype(np.float64) - mean) * (factor / std)).astype(np.float32)
            image = image if shifts is None else np.roll(image, tuple(shifts[k]), axis=(0, 1))
            image = image[::-1] if symmetries[k] & 1 else image
            image = image[:, ::-1] if symmetries[k] & 2 else image
            images[k, channel] = image.T if symmetries[k] & 4 else image
    return images


def same(one: Batch, other: Batch) -> bool:
    fields = ("ids", "images", "labels", "mask")
    return one.num_valid == other.num_valid and all(
        torch.equal(getattr(one, f), getattr(other, f)) for f in fields
    )


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
def test_batches_contain_the_slices_of_their_ids(
    cache: str, options: dict[str, Any], cubes: Cubes, path: Path
) -> None:
    data = make(path, cache=cache, **options)
    keys = ("channels", "mean", "std", "newton_augmentation")
    normalization = {key: options[key] for key in keys if key in options}
    batches = list(data.train_batches(epoch=2))
    assert len(batches) == data.steps
    assert data.shape == batches[0].images.shape[1:]
    for batch in batches:  # compared at the end: no batch is overwritten by a later one
        symmetries = sampler.random_symmetries(3, 2, batch.ids.numpy())
        symmetries = symmetries if options.get("symmetries", True) else np.zeros_like(symmetries)
        np.testing.assert_array_equal(batch.images, expected(cubes, batch.ids, symmetries, **normalization))
        np.testing.assert_array_equal(batch.labels, decode(batch.ids.numpy(), N).gravity)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.num_valid == batch.mask.sum()
    assert sum(batch.num_valid for batch in batches) == len(data)
    ids, mask = data.order(2)
    np.testing.assert_array_equal(torch.stack([batch.ids for batch in batches]), ids)
    np.testing.assert_array_equal(torch.stack([batch.mask for batch in batches]), mask)


def twin_keys(ids: torch.Tensor) -> NDArray[np.int64]:
    """The id of the Newtonian slice of each pair."""
    index = decode(ids.numpy(), N)
    return (index.seed * 6 + index.axis) * N + index.position


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 24},
        {"pairs": True, "axes": (0, 2), "channels": 2, "batch_size": 50},
        {"pairs": True, "symmetries": False, "axes": (1,), "batch_size": 128},
    ],
)
def test_a_shift_rolls_the_slice(cache: str, options: dict[str, Any], cubes: Cubes, path: Path) -> None:
    for batch in make(path, cache=cache, shifts=True, **options).train_batches(epoch=1):
        keys = twin_keys(batch.ids) if options.get("pairs") else batch.ids.numpy()
        symmetries = sampler.random_symmetries(3, 1, keys) * options.get("symmetries", True)
        shifts = sampler.random_shifts(3, 1, keys, N)
        images = expected(cubes, batch.ids, symmetries, shifts, channels=options.get("channels", 1))
        np.testing.assert_array_equal(batch.images, images)


def test_a_shift_rolls_the_cube(
    cubes: Cubes, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same_shift(seed: int, epoch: int, ids: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        return np.broadcast_to([5, 60], (*ids.shape, 2))

    with h5py.File(tmp_path / "rolled.h5", "w") as file:
        for (seed, gravity), cube in cubes.items():
            file[f"{gravity}_seed{seed:04d}"] = np.roll(cube, (5, 60), axis=(1, 2))
    monkeypatch.setattr("datasets.dataset.random_shifts", same_shift)
    rolled = make(tmp_path / "rolled.h5", axes=(0,)).train_batches(0)
    assert all_same(list(make(path, axes=(0,), shifts=True).train_batches(0)), list(rolled))


@pytest.mark.parametrize("batch_size", [24, 4 * 6 * N - 2])
def test_pairs_are_adjacent_and_transformed_alike(tmp_path: Path, batch_size: int) -> None:
    values = np.random.default_rng(0).integers(0, 1000, (N, N, N)).astype(np.float32)
    with h5py.File(tmp_path / "twins.h5", "w") as file:
        for seed in range(5):
            file[f"{seed}/newton"], file[f"{seed}/gr"] = values, values + 1
    data = make(tmp_path / "twins.h5", pairs=True, shifts=True, batch_size=batch_size)
    ids, mask = data.order(0)
    np.testing.assert_array_equal(np.sort(ids[mask]), sampler.sample_ids(SEEDS, (0, 1, 2), N).ravel())
    np.testing.assert_array_equal(ids[:, 1::2], ids[:, ::2] + 3 * N)
    np.testing.assert_array_equal(mask[:, 1::2], mask[:, ::2])
    assert not decode(ids[:, ::2], N).gravity.any()
    for batch in data.train_batches(0):
        assert torch.equal(batch.images[::2] + 1, batch.images[1::2])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pairs_and_shifts_on_ranks_and_resumed(
    cache: str, ranks: int, path: Path, small_window: None
) -> None:
    options = {"pairs": True, "shifts": True, "batch_size": 36}
    whole = list(make(path, **options).train_batches(1))
    first = 7 if ranks == 2 else len(whole) - 2
    for start in (0, first):
        parts = [
            list(
                make(path, cache=cache, process_index=r, num_processes=ranks, **options).train_batches(
                    1, start
                )
            )
            for r in range(ranks)
        ]
        for batch, *pieces in zip(whole[start:], *parts, strict=True):
            joined = [torch.cat([getattr(p, f) for p in pieces]) for f in ("ids", "images", "labels", "mask")]
            assert same(batch, Batch(*joined, pieces[0].num_valid))
            for piece in pieces:
                assert torch.equal(piece.ids[1::2], piece.ids[::2] + 3 * N)


@pytest.mark.parametrize("threads", [2, 5, 64])
def test_number_of_slicing_threads_does_not_matter(
    threads: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = list(make(path, channels=2).train_batches(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert all_same(list(make(path, channels=2).train_batches(0)), alone)


def test_all_symmetries_of_all_axes_occur(path: Path) -> None:
    ids = torch.cat([batch.ids for batch in make(path).train_batches(0)]).numpy()
    seen = set(zip(decode(ids, N).axis.tolist(), sampler.random_symmetries(3, 0, ids).tolist(), strict=True))
    assert len(seen) == 24


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_divide_the_same_batches(cache: str, ranks: int, path: Path, small_window: None) -> None:
    whole = list(make(path).train_batches(1))
    parts = [
        list(make(path, cache=cache, process_index=r, num_processes=ranks).train_batches(1))
        for r in range(ranks)
    ]
    for batch, *pieces in zip(whole, *parts, strict=True):
        joined = [torch.cat([getattr(p, f) for p in pieces]) for f in ("ids", "images", "labels", "mask")]
        assert same(batch, Batch(*joined, pieces[0].num_valid))
        assert {piece.num_valid for piece in pieces} == {batch.num_valid}


@pytest.mark.parametrize("cache", CACHES)
def test_resuming_gives_the_remaining_batches(cache: str, path: Path, small_window: None) -> None:
    whole = list(make(path, cache=cache).train_batches(1))
    for first in (1, 17, len(whole) - 1, len(whole)):
        assert all_same(list(make(path, cache=cache).train_batches(1, first)), whole[first:])


def test_file_layout_does_not_matter(cubes: Cubes, path: Path, tmp_path: Path) -> None:
    chunked = tmp_path / "chunked.h5"
    with h5py.File(chunked, "w") as file:
        for (seed, gravity), cube in cubes.items():
            values = cube.astype(">f8") if gravity == "gr" else cube
            file.create_dataset(f"{seed}/{gravity}", data=values, chunks=(16, 64, 8), compression="gzip")
    assert all_same(list(make(chunked, cache="disk").train_batches(0)), list(make(path).train_batches(0)))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_batches_contain_each_slice_once(cache: str, ranks: int, cubes: Cubes, path: Path) -> None:
    parts = [
        make(path, batch_size=48, cache=cache, process_index=r, num_processes=ranks) for r in range(ranks)
    ]
    with torch.inference_mode():
        batches = [list(part.evaluation_batches()) for part in parts]
    assert len({len(part) for part in batches}) == 1
    seen = torch.cat([batch.ids[batch.mask == 1] for part in batches for batch in part])
    np.testing.assert_array_equal(seen, sampler.sample_ids(SEEDS, (0, 1, 2), N).ravel())
    for batch in chain(*batches):
        assert len(batch.ids) == 48 // ranks
        np.testing.assert_array_equal(batch.images, expected(cubes, batch.ids, np.zeros(len(batch.ids), int)))
    # Memory allocated in inference mode, and for another share of the cubes, can be used for training.
    for batch in parts[0].train_batches(0):
        symmetries = sampler.random_symmetries(3, 0, batch.ids.numpy())
        np.testing.assert_array_equal(batch.images, expected(cubes, batch.ids, symmetries))
        torch.ones_like(batch.images, requires_grad=True).mul(batch.images).sum().backward()


def test_cubes_are_read_once_per_epoch_and_memory_is_bounded(many: Path, small_window: None) -> None:
    data = make(many, range(20), cache="disk")
    whole = 20 * 2 * 4 * N**3
    for _ in data.train_batches(0):
        pass
    assert data.cubes.bytes_read == whole
    for _ in data.train_batches(1):
        pass
    assert whole < data.cubes.bytes_read <= 2 * whole  # what is still in memory is not read again
    assert data._cache._pool.memory.nbytes == (sampler.STREAMS + SEEDS_AHEAD) * 2 * 2 * 4 * N**3


def test_reads_ahead_are_bounded(many: Path, small_window: None) -> None:
    data = make(many, range(20), cache="disk")
    batches = data.train_batches(0)
    next(batches)
    batches.close()
    assert data.cubes.bytes_read <= (sampler.STREAMS + SEEDS_AHEAD) * 2 * 4 * N**3


def test_reads_end_with_the_iteration(
    many: Path, small_window: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(many, range(20), cache="memory")
    next(make(many, range(20), cache="memory").train_batches(0))  # compiles the kernels
    read = data.cubes.read_unchecked

    def slow_read(*arguments: Any) -> None:
        read(*arguments)
        time.sleep(0.1)

    monkeypatch.setattr(data.cubes, "read_unchecked", slow_read)
    batches = data.train_batches(0)
    next(batches)
    batches.close()
    assert data.cubes.bytes_read < 20 * 2 * 4 * N**3


@pytest.mark.parametrize("cache", CACHES)
def test_prefetch_reads_the_first_cubes(
    cache: str, many: Path, small_window: None, no_thread_remains: None
) -> None:
    prefetched, plain = (make(many, range(20), axes=(0, 2), cache=cache) for _ in range(2))
    for epoch, first_step in ((0, 0), (1, 3)):
        prefetched.prefetch(epoch + 5, first_step)  # not used
        prefetched.prefetch(epoch, first_step)
        for thread in threading.enumerate():
            if thread.name.startswith("read"):
                thread.join()
        assert prefetched.cubes.bytes_read
        batches = prefetched.train_batches(epoch, first_step)
        one = next(batches)
        assert all_same([one, *batches], list(plain.train_batches(epoch, first_step)))
    assert prefetched.cubes.bytes_read <= plain.cubes.bytes_read + 4 * sampler.STREAMS * 2 * 4 * N**3


def test_prefetched_cubes_are_not_read_again(many: Path, small_window: None) -> None:
    data = make(many, range(20), cache="disk", axes=(0,))
    data.prefetch(0)
    for _ in data.train_batches(0):
        pass
    assert data.cubes.bytes_read == 20 * 2 * 4 * N**3


@pytest.mark.parametrize("cache", ["memory", "device"])
def test_memory_and_device_read_each_cube_once_per_run(cache: str, many: Path, small_window: None) -> None:
    data = make(many, range(20), cache=cache, axes=(0,), batch_size=48)
    for _ in data.train_batches(0, data.steps // 2):  # resumed: needs some of the cubes only
        pass
    for epoch in range(1, 3):
        for batch in data.train_batches(epoch):
            index = decode(batch.ids.numpy(), N)
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0], 2 * index.seed + index.gravity)
    assert data.cubes.bytes_read == 20 * 2 * 4 * N**3


@pytest.mark.parametrize(("ranks", "shared"), [(2, 1), (4, 3), (8, 11)])
def test_ranks_read_their_share(ranks: int, shared: int, many: Path, small_window: None) -> None:
    seed_bytes = 2 * 4 * N**3
    read = 0
    for r in range(ranks):
        share = {"process_index": r, "num_processes": ranks}
        data = make(many, range(20), axes=(1,), batch_size=8, cache="disk", **share)
        for _ in data.train_batches(0):
            pass
        assert len(data._cache._pool) <= sampler.STREAMS // ranks + SEEDS_AHEAD
        read += data.cubes.bytes_read
    assert 20 * seed_bytes <= read <= (20 + shared) * seed_bytes


@pytest.mark.parametrize("cache", CACHES)
def test_memory_is_allocated_once(
    cache: str, many: Path, small_window: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = []

    def resize(self: BufferPool, count: int) -> None:
        allocated.append(count)
        original(self, count)

    original = BufferPool.resize
    monkeypatch.setattr(BufferPool, "resize", resize)
    data = make(many, range(20), cache=cache, axes=(0,), batch_size=240)
    for epoch in range(5):
        for _ in data.train_batches(epoch):
            pass
    assert allocated[0] == 0
    assert len(allocated) == 2


@pytest.mark.parametrize("cache", CACHES)
def test_threads_end_with_the_iteration(
    cache: str, many: Path, small_window: None, no_thread_remains: None
) -> None:
    data = make(many, range(20), cache=cache, axes=(0,), batch_size=48)
    for _ in data.train_batches(0):
        break
    assert len(list(data.train_batches(0))) == data.steps
    batches = data.train_batches(1)
    first = next(batches)
    with pytest.raises(RuntimeError, match="only one loop at a time"):
        next(data.train_batches(1))
    batches.close()
    assert same(first, next(data.train_batches(1)))


@pytest.mark.parametrize("cache", CACHES)
def test_a_bad_cube_raises_in_the_loop(
    cache: str, many: Path, tmp_path: Path, small_window: None, no_thread_remains: None
) -> None:
    bad = tmp_path / "bad.h5"
    bad.write_bytes(many.read_bytes())
    with h5py.File(bad, "r+") as file:
        value = file["13/gr"][1, 2, 3]
        file["13/gr"][1, 2, 3] = np.nan
    status = bad.stat()
    data = make(bad, range(20), cache=cache, axes=(0,))
    with pytest.raises(UserError, match="/13/gr"):
        for _ in data.train_batches(0):
            pass
    with h5py.File(bad, "r+") as file:
        file["13/gr"][1, 2, 3] = value
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))  # a changed file would be refused
    assert all_same(list(data.train_batches(0)), list(make(many, range(20), axes=(0,)).train_batches(0)))


def test_images_are_channels_last_except_on_mps() -> None:
    # Batch normalization of channels-last tensors is wrong on MPS (pytorch/pytorch#175189).
    formats = {device: memory_format(torch.device(device)) for device in ("cpu", "cuda", "xpu", "mps")}
    assert formats.pop("mps") == torch.contiguous_format
    assert set(formats.values()) == {torch.channels_last}


def test_micro_batches_keep_num_valid_of_the_whole_batch(path: Path) -> None:
    batch = next(make(path).train_batches(0))
    pieces = batch.split(3)
    assert [len(piece.ids) for piece in pieces] == [8, 8, 8]
    assert {piece.num_valid for piece in pieces} == {24}
    assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)
    assert [len(piece.ids) for piece in batch.split(1)] == [24]


def test_normalization_is_measured_over_all_values(cubes: Cubes, path: Path) -> None:
    values = np.stack([cubes[seed, gravity] for seed in SEEDS for gravity in GRAVITIES]).astype(np.float64)
    assert measure_normalization(CubeFile(path), SEEDS) == pytest.approx(
        (values.mean(), values.std()), rel=1e-12
    )


def test_a_batch_larger_than_the_training_set_is_an_error(path: Path) -> None:
    assert make(path, batch_size=len(SEEDS) * 6 * N).steps == 1
    data = make(path, batch_size=len(SEEDS) * 6 * N + 1)
    assert len(list(data.evaluation_batches())) == 1  # only training needs a full batch
    with pytest.raises(UserError, match=r"(?s)train_params.batch_size 1537 .*data_params.train_seeds 4"):
        _ = data.steps


@pytest.mark.parametrize("cache", CACHES)
def test_insufficient_memory_is_a_user_error(cache: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(self: BufferPool, count: int) -> NDArray[np.float32]:
        if count:
            raise MemoryError("no 40 GiB here")
        return np.empty(0, np.float32)

    monkeypatch.setattr(BufferPool, "_allocate", allocate)
    with pytest.raises(UserError, match=rf"data_params.cache {cache} needs more .* 40 GiB"):
        next(make(path, cache=cache).train_batches(0))


@pytest.mark.parametrize(("local_ranks", "chosen"), [(1, "memory"), (2, "disk")])
def test_auto_chooses_the_fastest_cache_that_fits(
    local_ranks: int,
    chosen: str,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    share = 4 * 2 * 2 * 4 * N**3
    monkeypatch.setattr(system, "available_memory", lambda: int(1.5 * share / FREE_SHARE))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    with caplog.at_level(logging.INFO):
        data = make(path, cache="auto")
    assert data.cache == chosen
    assert [f"cache: {chosen}" in record.message for record in caplog.records] == [True]
