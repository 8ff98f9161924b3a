"""One to four ranks train the same network: same batches, learning rates, counts and weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from fork_server import ForkServer

WORLDS = (1, 2, 3, 4)
BATCH, EPOCHS = 60, 4
COUNTS = ("epoch", "step", "slices", "tp", "tn", "fp", "fn")


class Trained:
    """What a launch left behind."""

    def __init__(self, codes: list[int], record: Path, run: Path) -> None:
        self.codes = codes
        self.ranks = [json.loads(path.read_text()) for path in sorted(record.iterdir())]
        self.metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.weights = safetensors.numpy.load_file(run / "model" / "model.safetensors")

    def batches(self, key: str) -> list[list[Any]]:
        """`key` of all slices of each global batch, one step after another."""
        return [[value for part in parts for value in part[key]] for parts in zip(*self.ranks, strict=True)]


class Launches:
    """Launches of one experiment."""

    def __init__(self, server: ForkServer, folder: Path, universe: Path) -> None:
        self.server, self.folder = server, folder
        self.experiment = folder / "experiment.yaml"
        self.experiment.write_text(f"""
model_params: {{architecture: RACOON, layer_param: 2, dropout: 0.0, name: none, activation: gelu}}
data_params: {{datafile: {universe}, train_seeds: 3, test_seeds: 1, newton_augmentation: 0.5, axes: [0, 2]}}
train_params: {{epochs: {EPOCHS}, lr: 0.001, log_dir: {folder / "runs"}, batch_size: {BATCH}, test_every: 2,
               schedule: cosine, warmup_epochs: 1}}
""")

    def train(self, name: str, world: int, record: str, **request: Any) -> list[int]:
        """Train the run `name` on `world` ranks; returns their exit codes."""
        arguments = [str(self.experiment), f"model_params.name={name}"]
        out, folder = self.folder / f"{record}.out", self.folder / record
        return self.server.train(arguments, out, world_size=world, record=str(folder), **request)

    def trained(self, name: str, codes: list[int], record: str) -> Trained:
        return Trained(codes, self.folder / record, self.folder / "runs" / name)


@pytest.fixture(scope="module")
def launches(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory, universe: Path) -> Launches:
    return Launches(fork_server, tmp_path_factory.mktemp("processes"), universe)


@pytest.fixture(scope="module")
def trained(launches: Launches) -> dict[int, Trained]:
    names = {world: f"of{world}" for world in WORLDS}
    codes = {world: launches.train(name, world, name) for world, name in names.items()}
    return {world: launches.trained(name, codes[world], name) for world, name in names.items()}


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_ends_with_status_0(trained: dict[int, Trained], world: int) -> None:
    assert trained[world].codes == [0] * world


@pytest.mark.parametrize("world", WORLDS)
def test_each_slice_counts_once_per_epoch(trained: dict[int, Trained], world: int) -> None:
    ids, masks = trained[world].batches("ids"), trained[world].batches("mask")
    slices = 3 * 2 * 2 * 64
    steps = math.ceil(slices / BATCH)
    assert len(ids) == EPOCHS * steps
    for first in range(0, len(ids), steps):
        epoch = range(first, first + steps)
        counted = [i for n in epoch for i, mask in zip(ids[n], masks[n], strict=True) if mask]
        assert len(counted) == len(set(counted)) == slices


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("key", ["ids", "mask"])
def test_global_batches_are_equal(trained: dict[int, Trained], world: int, key: str) -> None:
    assert trained[world].batches(key) == trained[1].batches(key)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_learning_rates_are_equal(trained: dict[int, Trained], world: int) -> None:
    expected = [step["lr"] for step in trained[1].ranks[0]]
    assert len(set(expected)) > 50
    for rank in trained[world].ranks:
        assert [step["lr"] for step in rank] == expected


@pytest.mark.parametrize("world", WORLDS[1:])
def test_counts_are_equal(trained: dict[int, Trained], world: int) -> None:
    def counts(launch: Trained) -> list[dict[str, int]]:
        return [{key: line[key] for key in COUNTS} for line in launch.metrics]

    assert counts(trained[world]) == counts(trained[1])
    assert len(trained[1].metrics) == EPOCHS + EPOCHS // 2
    assert all(trained[1].metrics[-2][key] > 0 for key in ("tp", "tn", "fn"))


@pytest.mark.parametrize("world", WORLDS[1:])
def test_weights_agree_to_rounding(trained: dict[int, Trained], world: int) -> None:
    """After 52 steps at a moderate rate: training amplifies rounding errors."""
    expected, found = trained[1].weights, trained[world].weights
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name] == pytest.approx(tensor, rel=1e-5, abs=5e-6), name


def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_exactly(
    launches: Launches, trained: dict[int, Trained]
) -> None:
    signal = {"send": ["SIGUSR1", "trainer.train_step", 17], "rank": 1}
    codes = launches.train("stopped", 2, "stopped", **signal)
    resumed = launches.trained("stopped", launches.train("stopped", 2, "resumed"), "resumed")
    stopped = launches.trained("stopped", codes, "stopped")
    assert stopped.codes == resumed.codes == [0, 0]
    # The step with the signal, and the step in which all ranks learn of it.
    assert [len(rank) for rank in stopped.ranks] == [19, 19]
    assert stopped.batches("ids") + resumed.batches("ids") == trained[2].batches("ids")
    for name, tensor in trained[2].weights.items():
        assert (resumed.weights[name] == tensor).all(), name
