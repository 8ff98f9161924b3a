"""One, two, three or four processes train the same network: same batches, learning rates, counts, weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

WORLDS = (1, 2, 3, 4)
BATCH, EPOCHS = 60, 4
COUNTS = ("epoch", "step", "slices", "tp", "tn", "fp", "fn")


class Trained:
    """What a launch left behind."""

    def __init__(self, out: Path, run: Path) -> None:
        self.processes = [json.loads(path.read_text()) for path in sorted(out.iterdir())]
        self.metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.weights = safetensors.numpy.load_file(run / "model" / "model.safetensors")

    def batches(self, what: str) -> list[list[Any]]:
        """`what` of all rows of each global batch, one step after another."""
        steps = zip(*(process["steps"] for process in self.processes), strict=True)
        return [[row for part in parts for row in part[what]] for parts in steps]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, universe: Path) -> Path:
    """Where all launches were made: runs of 1 to 4 processes, and one of two that was stopped and went on."""
    folder = tmp_path_factory.mktemp("processes")
    experiment = folder / "experiment.yaml"
    experiment.write_text(f"""
model_params: {{architecture: RACOON, layer_param: 2, dropout: 0.0, name: none, activation: gelu}}
data_params: {{datafile: {universe}, train_seeds: 3, test_seeds: 1, newton_augmentation: 0.5, axes: [0, 2]}}
train_params: {{epochs: {EPOCHS}, lr: 0.001, log_dir: {folder / "runs"}, batch_size: {BATCH}, test_every: 2,
               schedule: cosine, warmup_epochs: 1}}
""")

    def launch(name: str, world: int, out: str, **more: Any) -> dict[str, Any]:
        arguments = [[str(experiment), f"model_params.name={name}"]] * world
        return {"processes": world, "arguments": arguments, "out": str(folder / out), **more}

    launches = [launch(f"of{world}", world, f"of{world}") for world in WORLDS]
    launches += [launch("stopped", 2, "stopped", signal=[1, 18]), launch("stopped", 2, "continued")]
    (folder / "launches.json").write_text(json.dumps(launches))
    program = [sys.executable, str(Path(__file__).parent / "forked.py"), str(folder / "launches.json")]
    subprocess.run(program, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[int, Trained]:
    return {world: Trained(folder / f"of{world}", folder / "runs" / f"of{world}") for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
def test_every_process_ends_well(trained: dict[int, Trained], world: int) -> None:
    assert [process["status"] for process in trained[world].processes] == [0] * world


@pytest.mark.parametrize("world", WORLDS)
def test_each_slice_counts_once_per_epoch(trained: dict[int, Trained], world: int) -> None:
    ids, weights = trained[world].batches("ids"), trained[world].batches("weights")
    slices = 3 * 2 * 2 * 64
    steps = math.ceil(slices / BATCH)
    assert len(ids) == EPOCHS * steps
    for first in range(0, len(ids), steps):
        epoch = range(first, first + steps)
        counted = [i for n in epoch for i, weight in zip(ids[n], weights[n], strict=True) if weight]
        assert len(counted) == len(set(counted)) == slices


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("what", ["ids", "weights"])
def test_global_batches_are_equal(trained: dict[int, Trained], world: int, what: str) -> None:
    assert trained[world].batches(what) == trained[1].batches(what)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_learning_rates_are_equal(trained: dict[int, Trained], world: int) -> None:
    alone = [step["lr"] for step in trained[1].processes[0]["steps"]]
    assert len(set(alone)) > 50
    for process in trained[world].processes:
        assert [step["lr"] for step in process["steps"]] == alone


@pytest.mark.parametrize("world", WORLDS[1:])
def test_counts_are_equal(trained: dict[int, Trained], world: int) -> None:
    def counts(launch: Trained) -> list[dict[str, int]]:
        return [{key: line[key] for key in COUNTS} for line in launch.metrics]

    assert counts(trained[world]) == counts(trained[1])
    assert len(trained[1].metrics) == EPOCHS + EPOCHS // 2
    assert all(trained[1].metrics[-2][key] > 0 for key in ("tp", "tn", "fn"))


@pytest.mark.parametrize("world", WORLDS[1:])
def test_weights_agree_to_rounding(trained: dict[int, Trained], world: int) -> None:
    """After 52 steps at a moderate rate: training amplifies rounding, so it cannot hold for ever."""
    alone, together = trained[1].weights, trained[world].weights
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert together[name] == pytest.approx(tensor, rel=1e-5, abs=5e-6), name


def test_a_signal_to_one_process_stops_all_and_nothing_is_lost(
    folder: Path, trained: dict[int, Trained]
) -> None:
    stopped, continued = (
        Trained(folder / out, folder / "runs" / "stopped") for out in ("stopped", "continued")
    )
    assert [process["status"] for process in stopped.processes + continued.processes] == [0] * 4
    # The step with the signal, and the one in which all learn of it.
    assert [len(process["steps"]) for process in stopped.processes] == [19, 19]
    assert stopped.batches("ids") + continued.batches("ids") == trained[2].batches("ids")
    for name, tensor in trained[2].weights.items():
        assert (continued.weights[name] == tensor).all(), name
