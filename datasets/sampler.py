"""The order in which slices are seen, a function of seeds, size, axes, batch size, run's seed and epoch.

**Sample ids.** A slice is named by one integer, ((seed * 2 + gravity) * 3 + axis) * N + position, whatever
axes are cut, so an id means the same in all experiments on a file.

**Lanes.** Training reads whole cubes, and holds as few at a time as a good shuffle allows. The columns of a
batch belong to STREAMS streams (column j of B to stream j * STREAMS // B). Each stream walks through its own
simulations (here one is a seed with both its twins, which are always used together). Lanes are fixed for a
run, so a process that trains on a block of columns needs only the cubes of their streams, and the order is
the same on any number of processes.

**The walk of a stream.** With 16 seeds or more it begins with a part of a simulation shared with a neighbour
stream. The parts differ between streams, so that these open new simulations one after the other and files are
read at an even pace. Then come the stream's own simulations, in a new random order every epoch, and at the end
what is left over, again in parts of simulations shared with neighbours. All streams walk at the same time, so
the parts of one simulation are used at the same time, and it is read once.

**Reads.** On W processes, W dividing STREAMS, an epoch reads S + (simulations shared between processes) of S
simulations: at most W - 1 more than S for W <= 4 and 11 more for W = 8, less than 1.1 S from S = 110 on.
Where W does not divide STREAMS, streams are shared too, and read by each process that has a column of them: twice
in all for W = 16.

**Quality of the shuffle.** WINDOW_BYTES of cubes are open at a time: w = max(1, WINDOW_BYTES / (STREAMS * bytes
of a pair)) simulations in each stream. A stream takes the slices of an open simulation in random order, and at
random among those of its other open ones. At 256^3 w = 1: a batch mixes 8 simulations (16 cubes), and every
1/8 of a simulation's slices another one is replaced. At 128^3 w = 8: 64 simulations are open, and a batch of
64 mixes 54. Some 500 pairs of 64^3 are shuffled fully within each stream. Which simulations meet changes from
epoch to epoch; but those of one stream never meet at w = 1.

**Random numbers** come from a hash (splitmix64) of run's seed, epoch, purpose and id: the same on all
machines and for all versions of NumPy, and with no state to save.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STREAMS = 8
WINDOW_BYTES = 1 << 30

_LAYOUT, _WALK, _SHUFFLE, _JITTER, _SYMMETRY = range(5)

Ids = NDArray[np.int64]


def sample_ids(seeds: range, axes: tuple[int, ...], size: int) -> Ids:
    """The ids of all slices of `seeds`, ascending: (len(seeds), slices of a pair)."""
    ranges = (np.array(seeds), np.arange(2), np.array(axes), np.arange(size))
    seed, gravity, axis, position = np.meshgrid(*ranges, indexing="ij")
    return (((seed * 2 + gravity) * 3 + axis) * size + position).reshape(len(seeds), -1)


class SliceIndex(NamedTuple):
    """What sample ids stand for. `gravity` is the label too: 1 for General Relativity, 0 for Newton's."""

    seed: Ids
    gravity: Ids
    axis: Ids
    position: Ids


def decode(ids: Ids, size: int) -> SliceIndex:
    """The slices with these sample ids in cubes of `size`."""
    return SliceIndex(ids // (6 * size), ids // (3 * size) % 2, ids // size % 3, ids % size)


def random_symmetries(seed: int, epoch: int, ids: Ids) -> Ids:
    """For each id one of the 8 symmetries of the square: bit 0 flips rows, 1 columns, 2 then transposes."""
    return (_hash(seed, epoch, _SYMMETRY, ids) >> np.uint64(61)).astype(np.int64)


class EpochSampler:
    """Batches of sample ids for training, the same for any number of processes.

    `seeds` are the training seeds, `seed` is the run's. `batch_size` must not exceed `slices`.
    """

    def __init__(self, seeds: range, size: int, axes: tuple[int, ...], batch_size: int, seed: int) -> None:
        self.seeds, self.size, self.axes, self.batch_size, self.seed = seeds, size, axes, batch_size, seed
        self.per_pair = 2 * len(axes) * size
        self.slices = len(seeds) * self.per_pair
        self.steps = -(-self.slices // batch_size)
        self.streams = min(STREAMS, batch_size)
        self.stream_of_column = np.arange(batch_size) * self.streams // batch_size
        self.window = max(1, WINDOW_BYTES // (self.streams * 2 * size**3 * 4))
        # The slices of a short last batch are spread over its columns: every process has its part of them.
        left = self.slices - (self.steps - 1) * batch_size
        share = np.arange(batch_size + 1) * left // batch_size
        self._last_row = share[1:] > share[:-1]
        self._pieces = self._layout()

    def epoch(self, epoch: int) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids (steps, batch_size) and weights of the same shape.

        Each training slice has weight 1 once. The last batch, if short, is filled with the ids above it at
        weight 0: they keep its size and the statistics of batch normalisation, and count for nothing else.
        """
        ids = np.empty((self.steps, self.batch_size), np.int64)
        weights = np.ones((self.steps, self.batch_size), np.bool_)
        weights[-1] = self._last_row
        sequence = self._sequence(epoch)
        begin = 0
        for stream in range(self.streams):
            columns = np.flatnonzero(self.stream_of_column == stream)
            places = weights[:, columns]
            block = np.empty(places.shape, np.int64)
            count = int(places.sum())
            block[places] = sequence[begin : begin + count]
            ids[:, columns] = block
            begin += count
        if self.steps > 1:
            ids[-1] = np.where(weights[-1], ids[-1], ids[-2])
        return ids, weights

    def _layout(self) -> Ids:
        """Rows (stream, stage, pair, first, last): the pieces of simulations that each stream walks through.

        `stage` is 0 for the shared piece at the start, 1 for whole simulations, 2 for the shared pieces at
        the end; `first` and `last` bound the slices of the (shuffled) pair that belong to the piece.
        """
        lengths = np.bincount(self.stream_of_column) * (self.steps - 1)
        lengths += np.bincount(self.stream_of_column[self._last_row], minlength=self.streams)
        pairs = iter(np.argsort(_hash(self.seed, 0, _LAYOUT, np.array(self.seeds)), kind="stable").tolist())
        rows: list[tuple[int, int, int, int, int]] = []
        left = lengths.tolist()
        if len(self.seeds) >= 2 * self.streams:
            for stream in range(0, self.streams - 1, 2):
                # Lanes change simulation at 2 * streams evenly spread times, each at its own.
                pair, cut = next(pairs), self.per_pair * (stream + 1) // (2 * self.streams)
                rows += [(stream, 0, pair, 0, cut), (stream + 1, 0, pair, cut, self.per_pair)]
                left[stream] -= cut
                left[stream + 1] -= self.per_pair - cut
        for stream in range(self.streams):
            whole, left[stream] = divmod(left[stream], self.per_pair)
            rows += [(stream, 1, next(pairs), 0, self.per_pair) for _ in range(whole)]
        pair, first = -1, self.per_pair
        for stream in range(self.streams):
            while left[stream]:
                if first == self.per_pair:
                    pair, first = next(pairs), 0
                last = min(self.per_pair, first + left[stream])
                rows.append((stream, 2, pair, first, last))
                left[stream] -= last - first
                first = last
        return np.array(rows, np.int64)

    def _sequence(self, epoch: int) -> Ids:
        """All training ids, stream after stream, each stream in the order of its walk."""
        stream, stage, pair, first, last = self._pieces.T
        # Only whole simulations trade places: shared ones stay where their other streams meet them.
        luck = np.where(stage == 1, _uniform(self.seed, epoch, _WALK, pair), 0.0)
        walk = np.lexsort((luck, stage, stream))
        stream, pair, first, last = stream[walk], pair[walk], first[walk], last[walk]
        counts = last - first
        place = np.arange(len(stream)) - np.searchsorted(stream, stream)
        inside = np.arange(self.slices) - np.repeat(np.cumsum(counts) - counts, counts)
        shuffled = self._shuffled_pairs(epoch)
        ids = shuffled[np.repeat(pair, counts), np.repeat(first, counts) + inside]
        luck = _uniform(self.seed, epoch, _JITTER, ids)
        open_at_once = np.bincount(stream)[stream] <= self.window
        time = np.where(
            np.repeat(open_at_once, counts),
            luck,
            np.repeat(place, counts) + self.window * (inside + luck) / np.repeat(counts, counts),
        )
        return ids[np.lexsort((time, np.repeat(stream, counts)))]

    def _shuffled_pairs(self, epoch: int) -> Ids:
        """The ids of each pair (len(seeds), per_pair), shuffled within the pair."""
        ids = sample_ids(self.seeds, self.axes, self.size)
        return np.take_along_axis(
            ids, np.argsort(_hash(self.seed, epoch, _SHUFFLE, ids), axis=1, kind="stable"), 1
        )


def evaluation_order(
    seeds: range, size: int, axes: tuple[int, ...], batch_size: int, process: int, processes: int
) -> tuple[Ids, NDArray[np.bool_], Ids]:
    """This process's ids (steps, batch_size / processes), weights, and per step the slices of all processes.

    Seeds ascend and each process has one contiguous share, so each cube is read once (those at the borders of
    shares by both neighbours). All processes have equally many batches of one size; filling has weight 0.
    """
    ids = sample_ids(seeds, axes, size).ravel()
    rows = batch_size // processes
    bounds = np.arange(processes + 1) * len(ids) // processes
    steps = -(-int(np.diff(bounds).max()) // rows)
    places = bounds[:-1, None] + np.arange(steps * rows)
    real = places < bounds[1:, None]
    slices = real.reshape(processes, steps, rows).sum(axis=(0, 2))
    # Filling repeats the last slice of the share: its cube is open anyway.
    mine = np.minimum(places[process], max(int(bounds[process + 1]) - 1, 0))
    return ids[mine].reshape(steps, rows), real[process].reshape(steps, rows), slices


def _uniform(seed: int, epoch: int, purpose: int, ids: Ids) -> NDArray[np.float64]:
    """Uniform in [0, 1), a function of the arguments."""
    return (_hash(seed, epoch, purpose, ids) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hash(seed: int, epoch: int, purpose: int, ids: Ids) -> NDArray[np.uint64]:
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key + np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return _mix(key ^ _mix(ids.astype(np.uint64)))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One output of splitmix64 (Steele, Lea & Flood 2014) from the state `z`; wraps around silently."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
