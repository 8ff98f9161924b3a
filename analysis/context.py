"""A trained run with the data it is evaluated on, checked against each other before anything is computed."""

from __future__ import annotations

from system import UserError

import copy
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

import datasets
import models
from analysis.lattice import box_of
from analysis.power_spectrum import Box
from analysis.statistics import MIN_SEEDS
from datasets.preparation.checks import read_pair
from datasets.preparation.cosmology import linear_theory_reference
from models import export
from training import checkpoint, distributed, metrics
from training.config import Config, check_same_settings, load_config
from training.metrics import Floats, Integers
from training.run import TrainState, describe_selection

ROWS = 64  # slices per batch; divides the number of slices of every cube, so no batch mixes cubes


@dataclass(frozen=True)
class EvaluationContext:
    """A trained network, the data it is evaluated on, and the data it was trained on."""

    run: Path
    config: Config
    accelerator: Accelerator
    trained: export.TrainedNetwork
    network: torch.nn.Module
    """The network on its device, for slices that are standardized already, and their axes."""
    checkpoint: str
    """`final`, `best`, `last` or the step of a checkpoint."""
    cubes: datasets.CubeFile
    seeds: range
    training_file: datasets.CubeFile | None
    """The file of the training, if it still exists."""
    selection: dict[str, Any]
    """What selected the network (`describe_selection`)."""

    @property
    def train_seeds(self) -> range:
        """The seeds that trained the network."""
        return self.config.data_params.train_range

    @property
    def same_file(self) -> bool:
        """Whether the evaluated seeds are other seeds of the training's file."""
        same = self.training_file is not None and self.training_file.path == self.cubes.path
        return same and not set(self.seeds) & set(self.train_seeds)

    def slices_of_seed(self, seed: int) -> Iterator[datasets.Batch]:
        """All slices of one seed, on this rank."""
        return self._batches(range(seed, seed + 1), self.cubes)

    @property
    def box(self) -> Box:
        """The periodic box of the simulations."""
        return box_of(self.cubes)

    def slices(self, seeds: range, cubes: datasets.CubeFile | None = None) -> Iterator[datasets.Batch]:
        """This rank's share of the slices of `seeds`, as the network sees them, cube by cube.

        The batches are the same on any number of ranks.
        """
        return self._batches(self._share(seeds), cubes or self.cubes)

    def _batches(self, seeds: range, cubes: datasets.CubeFile) -> Iterator[datasets.Batch]:
        return datasets.WholeCubeDataset(
            cubes,
            seeds,
            self.config.data_params,
            batch_size=ROWS,
            cache="disk",
            device=self.accelerator.device,
            mean=self.trained.mean,
            std=self.trained.std,
        ).evaluation_batches()

    def whole_cubes(
        self, seeds: range, cubes: datasets.CubeFile | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """This rank's cubes of `seeds`, in the units of `slices`: 2 * seed + label and (C, N, N, N)."""
        file = cubes or self.cubes
        moments = (self.trained.mean, self.trained.std)
        mean, std = (np.reshape(np.float32(values), (-1, 1, 1, 1)) for values in moments)
        for seed in self._share(seeds):
            newton, gr = (torch.from_numpy((cube - mean) / std) for cube in read_pair(file, seed))
            yield 2 * seed, newton * self.config.data_params.newton_augmentation
            yield 2 * seed + 1, gr

    def _share(self, seeds: range) -> range:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return seeds[len(seeds) * rank // ranks : len(seeds) * (rank + 1) // ranks]

    def predictions(self, ids: Integers, logits: Floats) -> metrics.Predictions:
        """Logits (slices,) with the seed, label and place of each slice."""
        return metrics.Predictions.from_ids(ids, logits, self.cubes.size)

    def predict(self) -> metrics.Predictions:
        """Logits of all slices of `seeds`. Collective."""

        def forward() -> tuple[NDArray[Any], NDArray[Any]]:
            with torch.inference_mode():  # nothing waits for the device
                batches = self.slices(self.seeds)
                rows = [(batch.ids, self.network(batch.images, batch.axes).float()) for batch in batches]
            ids, logits = map(torch.cat, zip(*rows, strict=True))
            return ids.numpy(), logits.cpu().double().numpy()

        return self.predictions(*self.collect(forward))

    def collect(self, measure: Callable[[], Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
        """What `measure` returns on all ranks, sample ids and columns, ordered by id. Collective."""
        with distributed.raise_on_all_ranks():
            columns = measure()
        return self.gather(*columns)

    def gather(self, ids: Integers, *columns: NDArray[Any]) -> list[NDArray[Any]]:
        """Ids (n,), ascending, and columns (n, ...) of all ranks. Collective."""
        tensors = (torch.from_numpy(column) for column in (ids, *columns))
        return [column.numpy() for column in metrics.gather_by_id(self.accelerator, *tensors)]

    def describe(self) -> dict[str, Any]:
        """What is evaluated and how: the descriptive sections of report.json."""
        data, trained, accelerator = self.config.data_params, self.trained, self.accelerator
        redshifts = [file and file.attr_float("redshift") for file in (self.training_file, self.cubes)]
        transfer = {"trained_redshift": redshifts[0], "redshift": redshifts[1]}
        differ = None not in redshifts and redshifts[0] != redshifts[1]
        return {
            "run": self.config.model_params.name,
            "model": {
                **asdict(trained.settings),
                "weights": self.checkpoint,
                "parameters": sum(parameter.numel() for parameter in trained.parameters()),
                "mean": trained.mean,
                "std": trained.std,
                **trained.config["training"],
            },
            "data": {
                "file": str(self.cubes.path),
                "seeds": [self.seeds.start, self.seeds.stop],
                "train_seeds": self.train_seeds.stop,
                "size": self.cubes.size,
                **{key: self.cubes.attr_float(key) for key in ("box_size", "redshift", "mean", "std")},
                "fields": self.cubes.fields,
                **data.model_dump(include={"newton_augmentation", "axes"}),
                "max_wavenumber": self.cubes.attr_float("max_wavenumber"),
                "reference": linear_theory_reference(self.cubes.attributes),
                "physics": self.cubes.attributes.get("physics"),
                "other_file": self.cubes.path.name != Path(data.datafile).name,
            },
            "environment": {
                "processes": accelerator.num_processes,
                "device": str(accelerator.device),
                "mixed_precision": accelerator.mixed_precision,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "date": date.today().isoformat(),
                "commit": find_commit(),
            },
            "config": self.config.to_dict(),
            "selection": self.selection,
        } | ({"transfer": transfer} if differ else {})


def find_commit() -> str | None:
    """The commit of this checkout, with -dirty for changed files; None outside a git repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def find_sweep(run: Path) -> str | None:
    """The study of experiments/sweep.py of which the run is a trial: STUDY-000 beside STUDY-sweep.*."""
    folder = run.resolve()
    trial = re.fullmatch(r"(.+)-\d{3,}", folder.name)
    return trial[1] if trial and any(folder.parent.glob(f"{trial[1]}-sweep.*")) else None


def load_run(
    run: Path,
    *,
    datafile: str | None = None,
    seeds: str | None = None,
    checkpoint_name: str | None = None,
    allow_training_seeds: bool = False,
) -> EvaluationContext:
    """The run in folder `run`, to be evaluated on `datafile` and `seeds` (A:B), by default its test seeds.

    Raises UserError, or the errors of the modules, if run and data do not belong together.
    """
    config = load_run_config(run)
    selected = select_seeds(seeds, config, allow_training_seeds=allow_training_seeds)
    trained = load_network(run, config, checkpoint_name)
    last = newest_checkpoint(run)
    if last is not None:
        check_same_settings(run, last.state["config"], config.to_dict())
    given = datasets.CubeFile(datafile) if datafile else None
    training_file = find_training_file(run, config, last, given)
    cubes = given or training_file
    assert cubes is not None
    fields, size = trained.num_fields, trained.settings.size
    if (cubes.num_fields, cubes.size) != (fields, size):
        raise UserError(
            f"{cubes.path}: the cubes are {cubes.size}^3 with {cubes.num_fields} field(s), but the network "
            f"was trained on {size}^3 with {fields}. Evaluate on cubes of the same size and fields."
        )
    cubes.require(selected)
    if training_file is not None:
        datasets.check_normalization(training_file, cubes)
    accelerator = Accelerator(mixed_precision=config.train_params.mixed_precision)
    fewest = min(len(selected), config.data_params.train_seeds)
    if accelerator.num_processes > fewest:
        raise UserError(
            f"{accelerator.num_processes} processes are too many: start at most one per seed, {fewest}."
        )
    # Interventions act on standardized slices; the network whitens what they leave.
    network = copy.deepcopy(trained)
    network.mean, network.std = 0.0, 1.0
    memory_format = datasets.memory_format(accelerator.device)
    network = network.to(accelerator.device, memory_format=memory_format)  # type: ignore[call-overload]
    network = accelerator.prepare_model(network, evaluation_mode=True).eval()
    name = checkpoint_name or "final"
    selection = describe_choice(run, config, trained, name, checkpoint.list_checkpoints(run / "checkpoints"))
    # Unless the evaluated cubes are known to be others, they selected the network if their seeds did.
    same_data = training_file is None or training_file.path == cubes.path
    overlap = bool(set(range(*selection["seeds"])) & set(selected))
    selection["evaluated"] = bool(selection["criteria"]) and overlap and same_data
    return EvaluationContext(
        run, config, accelerator, trained, network, name, cubes, selected, training_file, selection
    )


def describe_choice(
    run: Path,
    config: Config,
    trained: export.TrainedNetwork,
    name: str,
    saved: Sequence[checkpoint.Checkpoint],
) -> dict[str, Any]:
    """What selected the network called `name` (`final`, `best`, `last` or a step) and on which seeds.

    `criteria` is None if that is unknown: a network of an earlier version, whose checkpoint is gone.
    `by_hand`: the part of `criteria` that a person chose by, who knew the results on `seeds`. `finished`: the
    network is that at the end of a training.
    """
    data, step = config.data_params, trained.config.get("training", {}).get("step", 0)
    record = trained.config.get("selection") or {}
    automatic, by_hand = [], []
    if patience := record.get("early_stopping"):
        automatic.append(f"early stopping after {patience} evaluations without improvement")
    if name == "best":
        automatic.append("the lowest loss of all checkpoints")
    if study := find_sweep(run):
        trials = len(list(run.parent.glob(f"{study}-[0-9][0-9][0-9]")))
        automatic.append(f"a sweep of {trials} trials ({study})")
    if name.isdigit() and any(item.step > step for item in saved):
        by_hand.append(f"a choice of the checkpoint of step {name} by hand")
    if extended := record.get("extended_at_epoch"):
        by_hand.append(f"an extension of the training after its end at epoch {extended}")
    sets = {"validation" if data.validation_range else "test": data.validation_range or data.test_range}
    if by_hand and (extended or (run / "model").is_dir()):
        sets["test"] = data.test_range  # evaluated where a training ends
    return {
        "criteria": automatic + by_hand if record or automatic else None,
        "by_hand": by_hand,
        "set": " and ".join(sets),
        "seeds": [next(iter(sets.values())).start, list(sets.values())[-1].stop],
        "validation_seeds": data.validation_seeds,
        "finished": name == "final" or record.get("finished", False),
    }


def load_run_config(run: Path) -> Config:
    """The configuration of the run in folder `run`. Raises UserError if it has none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: config.yaml is missing. Give the folder LOG_DIR/NAME that trainer.py wrote.")
    return load_config(run / "config.yaml")


def select_seeds(text: str | None, config: Config, *, allow_training_seeds: bool) -> range:
    """The seeds A to B-1 of `text` "A:B", or the run's test seeds.

    Raises UserError for training seeds, unless they are allowed, and for fewer than MIN_SEEDS.
    """
    data = config.data_params
    trained, seeds = data.train_range.stop, data.test_range
    if text is not None:
        ends = re.fullmatch(r"(\d+):(\d+)", text)
        seeds = range(int(ends[1]), int(ends[2])) if ends else range(0)
        if not seeds:
            raise UserError(f"--seeds: found '{text}', allowed: A:B with A < B, for seeds A to B-1")
    if seeds.start < trained and not allow_training_seeds:
        raise UserError(
            f"--seeds {seeds.start}:{seeds.stop}: the network was trained on seeds 0 to {trained - 1}. "
            f"Choose seeds from {trained} on, or add --allow-training-seeds."
        )
    if len(seeds) < MIN_SEEDS:
        raise UserError(
            f"seeds {seeds.start}:{seeds.stop}: {len(seeds)} are too few, because the intervals are a "
            f"jackknife over seeds. Choose at least {MIN_SEEDS} with --seeds A:B."
        )
    return seeds


def load_network(run: Path, config: Config, name: str | None) -> export.TrainedNetwork:
    """The final network of a run, or that of its `best` (by evaluation loss), `last` or given checkpoint."""
    if name is None:
        if not (run / "model").is_dir():
            raise UserError(f"{run}: the training is not finished. Finish it, or add --checkpoint last.")
        return models.load(run / "model")
    selected = checkpoint.select(run / "checkpoints", name)
    state = TrainState(**selected.train_state)
    shape = selected.state["data_identity"]["shape"]
    trained = export.TrainedNetwork(
        **asdict(config.network_settings(shape, state.octaves)),
        mean=state.mean,
        std=state.std,
        power=state.power,
        training={"run": run.name, "step": selected.step, "epoch": state.epoch},
        selection=describe_selection(config, state),
    )
    trained.network.load_state_dict(selected.parts["model"])
    return trained.eval()


def newest_checkpoint(run: Path) -> checkpoint.Checkpoint | None:
    """The newest checkpoint of a run that is complete; None without any."""
    saved = checkpoint.list_checkpoints(run / "checkpoints")
    return next((item for item in reversed(saved) if item.find_problem() is None), None)


def find_training_file(
    run: Path, config: Config, last: checkpoint.Checkpoint | None, given: datasets.CubeFile | None
) -> datasets.CubeFile | None:
    """The file that the run was trained on, at its old place; else `given`, if it holds the same cubes.

    None if neither is known to hold them. Raises UserError if other cubes are in the old place.
    """
    identity = last.state["data_identity"] if last else None
    path = Path(config.data_params.datafile)
    if identity is not None and not path.exists():
        path = Path(identity["path"])  # the working directory may be another one
    moved = given is not None and not path.exists()
    cubes = given if moved else datasets.CubeFile(path)
    assert cubes is not None
    if identity is None:  # only the path identifies the training data
        return None if moved else cubes
    seeds = range(*identity["seeds"])
    if (
        identity["shape"] == list(cubes.shape)
        and set(seeds) <= set(cubes.seeds)
        and cubes.identity(seeds)["fingerprint"] == identity["fingerprint"]
    ):
        return cubes
    if moved:
        return None
    raise UserError(
        f"{path}: these are not the cubes that {run} was trained on. Restore them, or move this file away "
        "and give another one with --datafile."
    )


def training_units(
    run: Path, config: Config, trained: export.TrainedNetwork
) -> tuple[dict[str, Any], list[float]]:
    """The training file's path, attributes of units and filter, and the standard deviations of its fields.

    Without that file: no attributes, and the standard deviation by which the network standardizes. Raises
    UserError if other cubes are in its place.
    """
    last = newest_checkpoint(run)
    recorded = last.state["data_identity"]["path"] if last else config.data_params.datafile
    if not (Path(config.data_params.datafile).exists() or Path(recorded).exists()):
        print(
            f"warning: {recorded}, the file of the training, is missing: units and filter are not compared",
            file=sys.stderr,
        )
        return {}, np.broadcast_to(trained.std, trained.num_fields).tolist()
    cubes = find_training_file(run, config, last, None)
    assert cubes is not None
    pair = read_pair(cubes, cubes.seeds[0])
    units = {key: cubes.attributes.get(key) for key in ("mean", "std", "max_wavenumber", "cells")}
    units["path"] = str(cubes.path)
    return units, pair[0].std(axis=(1, 2, 3), dtype=np.float64).tolist()
