"""The order of training slices: a function of seeds, cube size, axes, batch size, random seed and epoch.

**Sample ids.** The integer ((seed * 2 + gravity) * 3 + axis) * N + position identifies a slice. It does not
depend on the axes in use, so an id means the same in all experiments on a file.

**Streams.** Training reads whole cubes and holds as few of them as a good shuffle allows. The columns of a
batch belong to STREAMS interleaved streams: column j of B to stream j * STREAMS // B. Each stream
has its seeds, always with both twins. The assignment is fixed for a run, so a rank that trains on a block of
columns needs only the cubes of their streams, and the order is the same for any number of ranks.

**Order of seeds in a stream.** With 16 seeds or more a stream begins with a part of a seed that it shares
with a neighboring stream. The parts differ in length, so streams start new seeds at different times and files
are read at an even pace. Then follow the stream's own seeds, in a new random order every epoch, and at the
end the remainder, in parts of seeds shared with neighbors. All streams advance together, so the parts of a
seed are used at the same time, and it is read once.

**Reads.** Of S seeds, an epoch on W ranks reads S + (seeds shared between ranks), if W divides STREAMS: at
most W - 1 more than S for W <= 4 and 11 more for W = 8, less than 1.1 S from S = 110 on. For other W ranks
share streams, and each rank with a column of a stream reads its seeds: twice in total for W = 16.

**Quality of the shuffle.** WINDOW_BYTES of cubes are open at a time: w = max(1, WINDOW_BYTES / (STREAMS *
bytes of a seed)) seeds per stream. A stream takes the slices of an open seed in random order, mixed at random
with those of its other open seeds. At 256^3 w = 1: a batch mixes 8 seeds (16 cubes), and one of them is
replaced every 1/8 of a seed's slices. At 128^3 w = 8: 64 seeds are open, and a batch of 64 mixes 54. Up to
some 500 seeds of 64^3 are shuffled completely within each stream. The order of
the seeds of a stream changes from epoch to epoch; at w = 1 a batch has one of them.

**Random numbers** come from a hash (splitmix64) of random seed, epoch, purpose and id. They are the same on
all machines and with all versions of NumPy, and have no state to save.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STREAMS = 8
WINDOW_BYTES = 1 << 30

_LAYOUT, _SEED_ORDER, _SHUFFLE, _JITTER, _SYMMETRY, _SHIFT = range(6)  # purposes of random numbers

Ids = NDArray[np.int64]


def sample_ids(seeds: range, axes: tuple[int, ...], size: int) -> Ids:
    """The ids of all slices of `seeds`, ascending: (len(seeds), slices per seed)."""
    ranges = (np.array(seeds), np.arange(2), np.array(axes), np.arange(size))
    seed, gravity, axis, position = np.meshgrid(*ranges, indexing="ij")
    return (((seed * 2 + gravity) * 3 + axis) * size + position).reshape(len(seeds), -1)


class SliceIndex(NamedTuple):
    """What sample ids encode. `gravity` is the label: 1 for General Relativity, 0 for Newtonian gravity."""

    seed: Ids
    gravity: Ids
    axis: Ids
    position: Ids


def decode(ids: Ids, size: int) -> SliceIndex:
    """Seed, gravity, axis and position of sample ids, for cubes of `size` cells per side."""
    return SliceIndex(ids // (6 * size), ids // (3 * size) % 2, ids // size % 3, ids % size)


def random_symmetries(seed: int, epoch: int, ids: Ids) -> Ids:
    """One of the 8 symmetries of the square per id: bit 0 flips rows, 1 columns, 2 then transposes."""
    return (_hash(seed, epoch, _SYMMETRY, ids) >> np.uint64(61)).astype(np.int64)


def random_shifts(seed: int, epoch: int, ids: Ids, size: int) -> Ids:
    """Periodic shifts (..., 2) of rows and columns for each id, uniform in [0, size)."""
    bits = _hash(seed, epoch, _SHIFT, ids)
    halves = np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], axis=-1)
    return (halves % np.uint64(size)).astype(np.int64)


def newtonian_twins(ids: Ids, size: int) -> Ids:
    """The id of the Newtonian slice of the same seed, axis and position: one id for both twins."""
    return ids - decode(ids, size).gravity * (3 * size)


class EpochSampler:
    """Batches of sample ids for training, the same for any number of ranks.

    `seeds` are the training seeds, `seed` is the random seed. `batch_size` must not exceed `slices`. With
    `pairs` both twins of a slice, the Newtonian one first, are in two adjacent places of a batch;
    `batch_size` must be even. `fields` is the number of fields of a cube.
    """

    def __init__(
        self,
        seeds: range,
        size: int,
        axes: tuple[int, ...],
        batch_size: int,
        seed: int,
        *,
        pairs: bool = False,
        fields: int = 1,
    ) -> None:
        self.seeds, self.size, self.axes, self.seed, self.pairs = seeds, size, axes, seed, pairs
        # With pairs a column of the order below is a slice and its twin, and takes two places of a batch.
        self.columns = batch_size // 2 if pairs else batch_size
        self.slices_per_seed = (1 if pairs else 2) * len(axes) * size
        self.slices = len(seeds) * self.slices_per_seed
        self.steps = -(-self.slices // self.columns)
        self.streams = min(STREAMS, self.columns)
        self.stream_of_column = np.arange(self.columns) * self.streams // self.columns
        self.window = max(1, WINDOW_BYTES // (self.streams * 2 * fields * size**3 * 4))
        # The slices of a short last batch are spread over its columns, so that every rank has its part of
        # them.
        remaining = self.slices - (self.steps - 1) * self.columns
        bounds = np.arange(self.columns + 1) * remaining // self.columns
        self._last_mask = bounds[1:] > bounds[:-1]
        self._segments = self._assign_segments()

    def epoch(self, epoch: int) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids (steps, batch_size) and a mask of the same shape, in which each training slice is True once.

        A short last batch is filled with the ids of the batch before, masked out: they keep its size and the
        statistics of batch normalization, and count for nothing else.
        """
        ids = np.empty((self.steps, self.columns), np.int64)
        mask = np.ones((self.steps, self.columns), np.bool_)
        mask[-1] = self._last_mask
        sequence = self._sequence(epoch)
        begin = 0
        for stream in range(self.streams):
            columns = np.flatnonzero(self.stream_of_column == stream)
            valid = mask[:, columns]
            block = np.empty(valid.shape, np.int64)
            count = int(valid.sum())
            block[valid] = sequence[begin : begin + count]
            ids[:, columns] = block
            begin += count
        if self.steps > 1:
            ids[-1] = np.where(mask[-1], ids[-1], ids[-2])
        if self.pairs:
            ids = np.stack([ids, ids + 3 * self.size], axis=-1).reshape(self.steps, -1)
            mask = mask.repeat(2, axis=1)
        return ids, mask

    def _assign_segments(self) -> Ids:
        """Rows (stream, stage, seed, first, last): the parts of seeds in each stream.

        `stage` is 0 for the shared part at the start, 1 for whole seeds, 2 for the shared parts at the end;
        `seed` is an index into `seeds`; `first` and `last` bound the slices of the shuffled seed.
        """
        lengths = np.bincount(self.stream_of_column) * (self.steps - 1)
        lengths += np.bincount(self.stream_of_column[self._last_mask], minlength=self.streams)
        shuffled = np.argsort(_hash(self.seed, 0, _LAYOUT, np.array(self.seeds)), kind="stable")
        seeds = iter(shuffled.tolist())
        rows: list[tuple[int, int, int, int, int]] = []
        remaining = lengths.tolist()
        if len(self.seeds) >= 2 * self.streams:
            for stream in range(0, self.streams - 1, 2):
                # Streams start a new seed at 2 * streams evenly spaced times, each at a different one.
                seed, middle = next(seeds), self.slices_per_seed * (stream + 1) // (2 * self.streams)
                rows += [(stream, 0, seed, 0, middle), (stream + 1, 0, seed, middle, self.slices_per_seed)]
                remaining[stream] -= middle
                remaining[stream + 1] -= self.slices_per_seed - middle
        for stream in range(self.streams):
            whole, remaining[stream] = divmod(remaining[stream], self.slices_per_seed)
            rows += [(stream, 1, next(seeds), 0, self.slices_per_seed) for _ in range(whole)]
        seed, first = -1, self.slices_per_seed
        for stream in range(self.streams):
            while remaining[stream]:
                if first == self.slices_per_seed:
                    seed, first = next(seeds), 0
                last = min(self.slices_per_seed, first + remaining[stream])
                rows.append((stream, 2, seed, first, last))
                remaining[stream] -= last - first
                first = last
        return np.array(rows, np.int64)

    def _sequence(self, epoch: int) -> Ids:
        """All training ids: stream after stream, each in its order."""
        stream, stage, seed, first, last = self._segments.T
        # Only whole seeds change their order: the other streams of a shared seed need it at the same time.
        sort_key = np.where(stage == 1, _uniform(self.seed, epoch, _SEED_ORDER, seed), 0.0)
        order = np.lexsort((sort_key, stage, stream))
        stream, seed, first, last = stream[order], seed[order], first[order], last[order]
        counts = last - first
        rank_in_stream = np.arange(len(stream)) - np.searchsorted(stream, stream)
        position = np.arange(self.slices) - np.repeat(np.cumsum(counts) - counts, counts)
        shuffled = self._shuffled_seeds(epoch)
        ids = shuffled[np.repeat(seed, counts), np.repeat(first, counts) + position]
        jitter = _uniform(self.seed, epoch, _JITTER, ids)
        all_open = np.bincount(stream)[stream] <= self.window
        sort_key = np.where(
            np.repeat(all_open, counts),
            jitter,
            np.repeat(rank_in_stream, counts) + self.window * (position + jitter) / np.repeat(counts, counts),
        )
        return ids[np.lexsort((sort_key, np.repeat(stream, counts)))]

    def _shuffled_seeds(self, epoch: int) -> Ids:
        """The ids of each seed (len(seeds), slices_per_seed), shuffled within the seed."""
        ids = sample_ids(self.seeds, self.axes, self.size)[
            :, : self.slices_per_seed
        ]  # Newtonian slices first
        return np.take_along_axis(
            ids, np.argsort(_hash(self.seed, epoch, _SHUFFLE, ids), axis=1, kind="stable"), 1
        )


def evaluation_order(
    seeds: range, size: int, axes: tuple[int, ...], batch_size: int, rank: int, ranks: int
) -> tuple[Ids, NDArray[np.bool_], Ids]:
    """This rank's ids (steps, batch_size / ranks), their mask, and the valid slices of all ranks per step.

    Seeds ascend and each rank has one contiguous share, so each cube is read once; two neighbors read those
    at the border of their shares. All ranks have the same number of batches of the same size; padding is
    masked out.
    """
    ids = sample_ids(seeds, axes, size).ravel()
    rows = batch_size // ranks
    bounds = np.arange(ranks + 1) * len(ids) // ranks
    steps = -(-int(np.diff(bounds).max()) // rows)
    places = bounds[:-1, None] + np.arange(steps * rows)
    valid = places < bounds[1:, None]
    num_valid = valid.reshape(ranks, steps, rows).sum(axis=(0, 2))
    # Padding repeats the last slice of the share, whose cube is in memory anyway.
    own = np.minimum(places[rank], max(int(bounds[rank + 1]) - 1, 0))
    return ids[own].reshape(steps, rows), valid[rank].reshape(steps, rows), num_valid


def _uniform(seed: int, epoch: int, purpose: int, ids: Ids) -> NDArray[np.float64]:
    """Uniform in [0, 1), a function of the arguments."""
    return (_hash(seed, epoch, purpose, ids) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hash(seed: int, epoch: int, purpose: int, ids: Ids) -> NDArray[np.uint64]:
    """64 random bits for each id, a function of the arguments."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key + np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return _mix(key ^ _mix(ids.astype(np.uint64)))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One output of splitmix64 (Steele, Lea & Flood 2014, OOPSLA) from the state `z`, modulo 2^64."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
