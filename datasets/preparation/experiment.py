"""An experiment that fits a cube file: its seeds split into sets, a network and keys that suit it."""

import system
from system import UserError

import json
import re
from pathlib import Path

import numpy as np

from ..cube_file import CubeFile
from .checks import USUAL_STD, read_pair
from .writer import require_new

TEST_SHARE, VALIDATION_SHARE = 1 / 4, 1 / 8  # of the seeds
MIN_TEST, MIN_VALIDATION = 3, 2  # an interval over seeds takes three
MIN_SEEDS = MIN_TEST + MIN_VALIDATION + 1

EXPERIMENT = """\
# LYNX on whitened slices of {file}: of {pairs} pairs {training} train, {validation} select, {test} test.
# Seeds are split, never slices: slices of one seed show the same structures.
model_params:
  architecture: "LYNX"         # RACOON, PENGUIN or LYNX; LYNX needs the fewest simulations
  layer_param: 24              # number of filters
  dropout: 0.0                 # on the log powers of the filters
  name: {name:<22} # name of the run; the same command resumes it
  padding: "circular"          # the box is periodic

data_params:
  datafile: {path}
  train_seeds: {train_seeds:<15} # seeds 0 to {last_train}, validation seeds included: {training} train ...
  validation_seeds: {validation:<10} # ... the last {validation} select and calibrate: test seeds stay unseen
  test_seeds: {test:<16} # seeds {train_seeds} to {last}, evaluated once, after training: {why_test}
  newton_augmentation: 1.0     # other than 1 only to test the pipeline
  standardize: {standardize:<15} # {why_standardize}
  whiten: "isotropic"          # all scales have the same variance
  pairs: true                  # both twins of a slice in the same batch
  shifts: true                 # random periodic shifts

train_params:
  epochs: 10                   # a finished run trains this many more
  lr: 0.02
  schedule: "cosine"
  betas: [0.9, 0.999]
  log_dir: "runs"              # tensorboard --logdir runs
"""


def write_experiment(path: Path, out: Path, *, overwrite: bool = False) -> None:
    """Write an experiment on the cubes of `path` to the YAML file `out`.

    Raises UserError if the file has a problem or too few seeds, or if `out` exists already.
    """
    require_new(out, overwrite=overwrite)
    cubes = CubeFile(path)
    pairs = len(cubes.seeds)
    if pairs < MIN_SEEDS:
        raise UserError(f"{path}: found {pairs} pairs of twins, but an experiment takes {MIN_SEEDS} or more.")
    cubes.require(range(pairs))
    test = max(MIN_TEST, round(TEST_SHARE * pairs))
    validation = max(MIN_VALIDATION, round(VALIDATION_SHARE * pairs))
    stds = [float(field.std(dtype=np.float64)) for field in read_pair(cubes, 0)[0]]
    standardized = all(USUAL_STD[0] < std < USUAL_STD[1] for std in stds)
    text = EXPERIMENT.format(
        pairs=pairs,
        file=path.name,
        path=json.dumps(str(path)),
        name=json.dumps(re.sub(r"[^A-Za-z0-9._-]+", "_", out.stem)),
        train_seeds=pairs - test,
        last_train=pairs - test - 1,
        training=pairs - test - validation,
        validation=validation,
        test=test,
        last=pairs - 1,
        why_test="a quarter" if test >= 5 else "p reaches 0.05 from 5 on",
        standardize=json.dumps("none" if standardized else "train"),
        why_standardize="the file is standardized"
        if standardized
        else f"the file is not standardized: its first cube has standard deviation {max(stds):.3g}",
    )
    system.write_atomically(out, text)
