"""The order of slices: each id once per epoch, equal for any number of ranks, few seeds in use at a time."""

import numpy as np
import pytest

from datasets import cache, decode, sampler
from datasets.sampler import EpochSampler


def seeds_of(ids: np.ndarray, size: int) -> np.ndarray:
    return ids // (6 * size)


def columns(ids: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    rows = ids.shape[1] // ranks
    return ids[:, rank * rows : (rank + 1) * rows]


def test_ids_encode_seed_gravity_axis_and_position() -> None:
    ids = sampler.sample_ids(range(3, 5), (0, 2), 64)
    assert ids.shape == (2, 2 * 2 * 64)
    assert ids[0, 0] == 3 * 6 * 64
    assert ids[1, -1] == 5 * 6 * 64 - 1
    index = decode(ids, 64)
    assert (index.seed == [[3], [4]]).all()
    assert set(np.unique(index.axis)) == {0, 2}
    assert (((index.seed * 2 + index.gravity) * 3 + index.axis) * 64 + index.position == ids).all()


@pytest.mark.parametrize(
    ("seeds", "size", "axes", "batch_size"),
    [
        (range(1), 64, (0, 1, 2), 384),  # one batch is the whole set
        (range(1), 64, (1,), 1),
        (range(2, 5), 64, (0, 2), 5),  # fewer columns than streams
        (range(7), 64, (0, 1, 2), 100),
        (range(16), 64, (0,), 12),  # columns do not divide into streams
        (range(17), 128, (0, 1, 2), 64),
        (range(23), 256, (0, 1, 2), 60),
        (range(9), 64, (0, 1, 2), 1000),  # a batch takes more than a seed
    ],
)
def test_each_slice_once_per_epoch(seeds: range, size: int, axes: tuple[int, ...], batch_size: int) -> None:
    epoch_sampler = EpochSampler(seeds, size, axes, batch_size, seed=42)
    everything = np.sort(sampler.sample_ids(seeds, axes, size).ravel())
    for epoch in (0, 1):
        ids, mask = epoch_sampler.epoch(epoch)
        assert ids.shape == mask.shape == (epoch_sampler.steps, batch_size)
        np.testing.assert_array_equal(np.sort(ids[mask]), everything)
        assert mask[:-1].all()
        np.testing.assert_array_equal(
            ids[-1][~mask[-1]], ids[-2][~mask[-1]] if epoch_sampler.steps > 1 else []
        )


def test_ranks_divide_a_short_last_batch() -> None:
    _, mask = EpochSampler(range(5), 64, (0, 1, 2), 96 * 8, seed=1).epoch(0)
    assert 0 < mask[-1].sum() < mask.shape[1]
    counts = mask[-1].reshape(8, -1).sum(axis=1)
    assert counts.max() - counts.min() <= 1


def test_order_depends_on_seed_and_epoch() -> None:
    def epoch(seed: int, epoch: int) -> np.ndarray:
        return EpochSampler(range(4), 64, (0, 1, 2), 64, seed).epoch(epoch)[0]

    np.testing.assert_array_equal(epoch(42, 3), epoch(42, 3))
    assert (epoch(42, 3) != epoch(42, 4)).mean() > 0.9
    assert (epoch(42, 3) != epoch(43, 3)).mean() > 0.9


def test_order_is_the_same_on_all_versions_and_machines() -> None:
    # Runs that are resumed after an update depend on these values.
    assert (
        sampler._mix(np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF
    )  # first output of the published splitmix64
    ids, _ = EpochSampler(range(4), 64, (0, 1, 2), 64, 42).epoch(0)
    assert ids[0, :4].tolist() == [201, 296, 379, 294]
    assert sampler.random_symmetries(42, 0, np.arange(8)).tolist() == [2, 0, 1, 7, 0, 4, 3, 0]


def test_symmetries_are_uniform_and_change_with_epoch_and_seed() -> None:
    ids = np.arange(80_000)
    symmetries = sampler.random_symmetries(42, 0, ids)
    counts = np.bincount(symmetries, minlength=8)
    assert len(counts) == 8
    assert abs(counts - 10_000).max() < 500
    np.testing.assert_array_equal(sampler.random_symmetries(42, 0, ids[::-1]), symmetries[::-1])
    for other in (sampler.random_symmetries(42, 1, ids), sampler.random_symmetries(43, 0, ids)):
        assert 0.8 < (other != symmetries).mean() < 0.95


def test_shifts_are_uniform_and_change_with_epoch_and_seed() -> None:
    ids = np.arange(96_000)
    shifts = sampler.random_shifts(42, 0, ids, 96)
    assert shifts.shape == (96_000, 2)
    for column in shifts.T:
        counts = np.bincount(column, minlength=96)
        assert len(counts) == 96
        assert abs(counts - 1000).max() < 160  # 5 standard deviations
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.02
    np.testing.assert_array_equal(sampler.random_shifts(42, 0, ids[::-1], 96), shifts[::-1])
    for other in (sampler.random_shifts(42, 1, ids, 96), sampler.random_shifts(43, 0, ids, 96)):
        assert (other != shifts).mean() > 0.98


def test_shifts_are_the_same_on_all_versions_and_machines() -> None:
    assert sampler.random_shifts(42, 0, np.arange(3), 64).tolist() == [[46, 5], [28, 7], [13, 52]]


@pytest.mark.parametrize(
    ("seeds", "size", "axes", "batch_size"),
    [(range(1), 64, (1,), 2), (range(2, 5), 64, (0, 2), 6), (range(23), 256, (0, 1, 2), 60)],
)
def test_pairs_occur_once_per_epoch(seeds: range, size: int, axes: tuple[int, ...], batch_size: int) -> None:
    epoch_sampler = EpochSampler(seeds, size, axes, batch_size, seed=42, pairs=True)
    ids, mask = epoch_sampler.epoch(1)
    assert ids.shape == mask.shape == (epoch_sampler.steps, batch_size)
    np.testing.assert_array_equal(np.sort(ids[mask]), sampler.sample_ids(seeds, axes, size).ravel())
    np.testing.assert_array_equal(ids[:, 1::2], ids[:, ::2] + 3 * size)
    np.testing.assert_array_equal(mask[:, 1::2], mask[:, ::2])
    if size == 256:  # as without pairs, one seed per stream
        assert cache.schedule(seeds_of(ids, size), 0)[1] == sampler.STREAMS


@pytest.mark.parametrize("seeds", [17, 48, 49, 150])
def test_number_of_open_seeds_does_not_grow(seeds: int) -> None:
    epoch_sampler = EpochSampler(range(seeds), 256, (0, 1, 2), 64, seed=42)
    for epoch in range(3):  # memory is allocated once for this number
        used = seeds_of(epoch_sampler.epoch(epoch)[0], 256)
        assert cache.schedule(used, 0)[1] == sampler.STREAMS
        assert np.mean([len(set(row)) for row in used.tolist()]) > sampler.STREAMS - 1.2


def test_seeds_are_opened_at_an_even_pace() -> None:
    epoch_sampler = EpochSampler(range(48), 256, (0, 1, 2), 64, seed=42)
    uses, _ = cache.schedule(seeds_of(epoch_sampler.epoch(0)[0], 256), 0)
    steps = [use.first for use in uses if use.first > 0]
    # Each of 8 streams opens a seed every 192 steps; the streams take turns.
    assert np.diff(steps).min() >= 1
    assert np.diff(steps).max() <= 60


def test_small_cubes_are_shuffled_completely() -> None:
    epoch_sampler = EpochSampler(range(40), 64, (0, 1, 2), 64, seed=42)
    used = seeds_of(epoch_sampler.epoch(0)[0], 64)
    assert np.mean([len(set(row)) for row in used.tolist()]) > 30
    thirds = [np.bincount(part.ravel(), minlength=40) for part in np.array_split(used[:-1], 3)]
    streams = [used[:, epoch_sampler.stream_of_column == stream] for stream in range(8)]
    inner = [p for p in range(40) if sum((stream == p).any() for stream in streams) == 1]
    # Each third of the epoch has 128 slices of each seed in expectation.
    assert np.min([third[inner] for third in thirds]) > 80


@pytest.mark.parametrize("seeds", [20, 48, 150])
@pytest.mark.parametrize(("ranks", "shared"), [(1, 0), (2, 1), (4, 3), (8, 11)])
def test_ranks_keep_their_seeds_and_share_few(seeds: int, ranks: int, shared: int) -> None:
    epoch_sampler = EpochSampler(range(seeds), 256, (0, 1, 2), 64, seed=42)
    epochs = [seeds_of(epoch_sampler.epoch(epoch)[0], 256) for epoch in range(2)]
    own = [[set(columns(used, r, ranks).ravel().tolist()) for r in range(ranks)] for used in epochs]
    assert own[0] == own[1]
    assert seeds <= sum(map(len, own[0])) <= seeds + shared
    if seeds >= 110:
        assert sum(map(len, own[0])) <= 1.1 * seeds


@pytest.mark.parametrize(("seeds", "batch_size", "ranks"), [(2, 64, 1), (3, 96, 4), (1, 384, 3), (1, 600, 2)])
def test_evaluation_has_each_slice_once_and_equal_steps_on_all_ranks(
    seeds: int, batch_size: int, ranks: int
) -> None:
    test_seeds = range(4, 4 + seeds)
    parts = [sampler.evaluation_order(test_seeds, 64, (0, 2), batch_size, r, ranks) for r in range(ranks)]
    assert {ids.shape for ids, _, _ in parts} == {(len(parts[0][0]), batch_size // ranks)}
    valid = np.concatenate([ids[mask] for ids, mask, _ in parts])
    np.testing.assert_array_equal(valid, sampler.sample_ids(test_seeds, (0, 2), 64).ravel())
    for ids, mask, num_valid in parts:
        assert set(ids.ravel().tolist()) <= set(valid.tolist())
        np.testing.assert_array_equal(num_valid, sum(m.sum(axis=1) for _, m, _ in parts))
        assert (np.diff(mask.ravel().astype(int)) <= 0).all()  # padding comes last
