"""The order of slices: each id once per epoch, the same on_all_ranks, from few open simulations, read once."""

import numpy as np
import pytest

from datasets import cache, decode, order
from datasets.sampler import EpochSampler


def pairs_of(ids: np.ndarray, size: int) -> np.ndarray:
    return ids // (6 * size)


def columns(ids: np.ndarray, process: int, processes: int) -> np.ndarray:
    rows = ids.shape[1] // processes
    return ids[:, process * rows : (process + 1) * rows]


def test_an_id_names_seed_gravity_axis_and_position_whatever_axes_are_cut() -> None:
    ids = order.sample_ids(range(3, 5), (0, 2), 64)
    assert ids.shape == (2, 2 * 2 * 64)
    assert ids[0, 0] == 3 * 6 * 64
    assert ids[1, -1] == 5 * 6 * 64 - 1
    where = decode(ids, 64)
    assert (where.seed == [[3], [4]]).all()
    assert set(np.unique(where.axis)) == {0, 2}
    assert (((where.seed * 2 + where.gravity) * 3 + where.axis) * 64 + where.position == ids).all()


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
        (range(9), 64, (0, 1, 2), 1000),  # a batch takes more than a pair
    ],
)
def test_each_slice_once_per_epoch(seeds: range, size: int, axes: tuple[int, ...], batch_size: int) -> None:
    deal = EpochSampler(seeds, size, axes, batch_size, seed=42)
    everything = np.sort(order.sample_ids(seeds, axes, size).ravel())
    for epoch in (0, 1):
        ids, weights = deal.epoch(epoch)
        assert ids.shape == weights.shape == (deal.steps, batch_size)
        np.testing.assert_array_equal(np.sort(ids[weights]), everything)
        assert weights[:-1].all()
        np.testing.assert_array_equal(ids[-1][~weights[-1]], ids[-2][~weights[-1]] if deal.steps > 1 else [])


def test_every_process_has_its_part_of_a_short_last_batch() -> None:
    _, weights = EpochSampler(range(5), 64, (0, 1, 2), 96 * 8, seed=1).epoch(0)
    assert 0 < weights[-1].sum() < weights.shape[1]
    counts = weights[-1].reshape(8, -1).sum(axis=1)
    assert counts.max() - counts.min() <= 1


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def epoch(seed: int, epoch: int) -> np.ndarray:
        return EpochSampler(range(4), 64, (0, 1, 2), 64, seed).epoch(epoch)[0]

    np.testing.assert_array_equal(epoch(42, 3), epoch(42, 3))
    assert (epoch(42, 3) != epoch(42, 4)).mean() > 0.9
    assert (epoch(42, 3) != epoch(43, 3)).mean() > 0.9


def test_the_order_is_the_same_for_all_versions_and_machines() -> None:
    # A run that goes on after an update depends on these numbers.
    assert order._mix(np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF  # splitmix64's published first output
    ids, _ = EpochSampler(range(4), 64, (0, 1, 2), 64, 42).epoch(0)
    assert ids[0, :4].tolist() == [201, 296, 379, 294]
    assert order.random_symmetries(42, 0, np.arange(8)).tolist() == [2, 0, 1, 7, 0, 4, 3, 0]


def test_symmetries_are_even_and_change_with_epoch_and_seed() -> None:
    ids = np.arange(80_000)
    turns = order.random_symmetries(42, 0, ids)
    counts = np.bincount(turns, minlength=8)
    assert len(counts) == 8
    assert abs(counts - 10_000).max() < 500
    np.testing.assert_array_equal(order.random_symmetries(42, 0, ids[::-1]), turns[::-1])
    for other in (order.random_symmetries(42, 1, ids), order.random_symmetries(43, 0, ids)):
        assert 0.8 < (other != turns).mean() < 0.95


@pytest.mark.parametrize("seeds", [17, 48, 49, 150])
def test_few_simulations_are_open_at_a_time_however_many_there_are(seeds: int) -> None:
    deal = EpochSampler(range(seeds), 256, (0, 1, 2), 64, seed=42)
    for epoch in range(3):  # always as many: the memory for them is taken once
        pairs = pairs_of(deal.epoch(epoch)[0], 256)
        assert cache.plan(pairs, 0).most_open == order.STREAMS
        assert np.mean([len(set(row)) for row in pairs.tolist()]) > order.STREAMS - 1.2


def test_simulations_are_opened_at_an_even_pace() -> None:
    deal = EpochSampler(range(48), 256, (0, 1, 2), 64, seed=42)
    uses = cache.plan(pairs_of(deal.epoch(0)[0], 256), 0).uses
    steps = [first for _, first, _ in uses if first > 0]
    # 8 streams open one simulation each every 192 steps; never two of the 44 at once, nor long nothing.
    assert np.diff(steps).min() >= 1
    assert np.diff(steps).max() <= 60


def test_small_cubes_are_shuffled_fully() -> None:
    deal = EpochSampler(range(40), 64, (0, 1, 2), 64, seed=42)
    pairs = pairs_of(deal.epoch(0)[0], 64)
    assert np.mean([len(set(row)) for row in pairs.tolist()]) > 30
    thirds = [np.bincount(part.ravel(), minlength=40) for part in np.array_split(pairs[:-1], 3)]
    streams = [pairs[:, deal.stream_of_column == stream] for stream in range(8)]
    inner = [p for p in range(40) if sum((stream == p).any() for stream in streams) == 1]
    # From the first batch to the last: 128 slices of each simulation are expected in each third.
    assert np.min([third[inner] for third in thirds]) > 80


@pytest.mark.parametrize("seeds", [20, 48, 150])
@pytest.mark.parametrize(("processes", "shared"), [(1, 0), (2, 1), (4, 3), (8, 11)])
def test_processes_share_few_simulations_and_keep_their_own(seeds: int, processes: int, shared: int) -> None:
    deal = EpochSampler(range(seeds), 256, (0, 1, 2), 64, seed=42)
    epochs = [pairs_of(deal.epoch(epoch)[0], 256) for epoch in range(2)]
    mine = [
        [set(columns(pairs, r, processes).ravel().tolist()) for r in range(processes)] for pairs in epochs
    ]
    assert mine[0] == mine[1]
    assert seeds <= sum(map(len, mine[0])) <= seeds + shared
    if seeds >= 110:
        assert sum(map(len, mine[0])) <= 1.1 * seeds


@pytest.mark.parametrize(
    ("seeds", "batch_size", "processes"), [(2, 64, 1), (3, 96, 4), (1, 384, 3), (1, 600, 2)]
)
def test_a_test_sees_each_slice_once_in_equally_many_batches(
    seeds: int, batch_size: int, processes: int
) -> None:
    of = range(4, 4 + seeds)
    parts = [order.evaluation_order(of, 64, (0, 2), batch_size, r, processes) for r in range(processes)]
    assert {ids.shape for ids, _, _ in parts} == {(len(parts[0][0]), batch_size // processes)}
    together = np.concatenate([ids[weights] for ids, weights, _ in parts])
    np.testing.assert_array_equal(together, order.sample_ids(of, (0, 2), 64).ravel())
    for ids, weights, slices in parts:
        assert set(ids.ravel().tolist()) <= set(together.tolist())
        np.testing.assert_array_equal(slices, sum(w.sum(axis=1) for _, w, _ in parts))
        assert (np.diff(weights.ravel().astype(int)) <= 0).all()  # filling comes last


def test_a_process_without_slices_tests_on_filling() -> None:
    # More processes than slices cannot happen in earnest (a seed has 128 slices at least), but must not
    # break.
    ids, weights, slices = order.evaluation_order(range(1), 64, (0,), 256, 255, 256)
    assert ids.shape == (1, 1)
    assert slices.tolist() == [128]
    assert weights.sum() in (0, 1)
