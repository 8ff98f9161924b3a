"""Odd settings, environments and damaged files: an error with a message, or a result; never anything else.

`make fuzz` tries FUZZ_INPUTS per category and prints how many were handled.
"""

from __future__ import annotations

import system
from system import UserError

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from accelerate.state import AcceleratorState, GradientState

import trainer
from training import config, run
from training.checkpoint import __main__ as checkpoint_command

INPUTS = int(os.environ.get("FUZZ_INPUTS", "100"))
MAX_LINES, MAX_CHARACTERS = 25, 4000  # of an error message

DEEP = "[" * 5000
NUMBERS = ["0", "-1", "1", "2", "1.5", "1e-3", "1e308", "1e400", ".inf", "-.inf", ".nan", "0x10", "1:30"]
NUMBERS += ["010", "1_000", "٣", "+", "1e", str(2**31), str(2**64), "9" * 400, "9" * 5000]
WORDS = ["", "~", "true", "no", "auto", "none", "RACOON", "..", "/", "a/b", "é", "=", "<<", "*a", "&a"]
WORDS += ["%", "@", "`", "x" * 5000, "\t", "'", '"', "2024-01-01", "2024-99-99", "2024-01-01 25:61:61"]
NESTED = ["[]", "[1, 2]", "[[1]]", "{}", "{a: 1}", "{[1]: 2}", "[0.5, 0.9]", "[wandb, 1]", "[~]"]
NESTED += ["{a: 1, a: 1}", "{size: 64}", "{size: " + "9" * 400 + "}", "[" * 300, "{a: " * 300]
TAGS = ["!!bool maybe", "!!timestamp x", "!!int x", "!!binary x", "!!python/object:os.system x", "!!set {a}"]
TEXTS = [*NUMBERS, *WORDS, *TAGS, *NESTED, '"\\0"', '"\\ud800"', "\x7f", "a\nb"]
VALUES: list[Any] = [None, True, 0, -1, 2**64, 10**400, 0.5, float("nan"), "", "x" * 5000, "\0", "\ud800"]
VALUES += ["<b>", [], [[]], [1], [None], {}, {"": None}, [[[[[[[[1]]]]]]]]]
VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "LAUNCH_SECONDS"]
VARIABLES += ["SLURM_CPUS_PER_TASK", "SLURM_LOCALID", "OMPI_COMM_WORLD_SIZE", "PMI_RANK"]


def keys() -> list[str]:
    """Every key of an experiment."""
    sections = ("model_params", "data_params", "train_params")
    return [f"{name}.{key}" for name in sections for key in config.SECTIONS[name].model_fields]


def change_document(document: Any, generator: random.Random) -> Any:
    """A copy of a JSON document in which one value at any depth is replaced, removed or added."""
    changed = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            visit(value)

    visit(changed)
    node, key = generator.choice(places)
    action = generator.randrange(8)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[generator.choice(["", "unknown", "x" * 300])] = generator.choice(VALUES)
    else:
        node[key] = generator.choice(VALUES)
    return changed


def change_bytes(content: bytes, generator: random.Random) -> bytes:
    """A file that is truncated, overwritten in places, or something else altogether."""
    place = generator.randrange(len(content))
    noise = generator.randbytes(generator.randrange(1, 9))
    others = [
        b"",
        b"\0" * 100,
        DEEP.encode(),
        b"null",
        b"[]",
        b"{}",
        b'"x"',
        b"1" * 5000,
        b"\xff\xfe",
        b"{{{",
    ]
    return generator.choice(
        [content[:place], content[:place] + noise + content[place + len(noise) :], generator.choice(others)]
    )


def damaged(path: Path, generator: random.Random) -> Iterator[bytes]:
    """Damaged versions of a JSON file."""
    content = path.read_bytes()
    document = json.loads(content)
    while True:
        yield json.dumps(change_document(document, generator)).encode()
        yield json.dumps(change_document(change_document(document, generator), generator)).encode()
        yield change_bytes(content, generator)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained run, with its experiment beside it."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "experiment.yaml"
    path.write_text(f"""
model_params: {{architecture: RACOON, layer_param: 1, dropout: 0.5, name: run}}
data_params: {{datafile: {folder / "universe.h5"}, train_seeds: 2, test_seeds: 3, newton_augmentation: 1.0,
              axes: [0], synthetic: {{size: 64, strength: 100.0}}}}
train_params: {{epochs: 1, lr: 0.001, log_dir: {folder}, batch_size: 64}}
""")
    assert trainer.main([str(path)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield folder
    shutil.rmtree(folder)


Attempts = Iterator[tuple[Callable[..., object], tuple[Any, ...]]]
Category = Callable[[Path, Path, random.Random], Attempts]
"""Functions with arguments; the last argument describes the attempt."""
USER_ERRORS = (UserError, OSError)


def settings(finished: Path, tmp_path: Path, generator: random.Random) -> Attempts:
    """Every key with every odd text."""
    path = finished / "experiment.yaml"

    def attempt(override: str) -> None:
        loaded = config.load_config(path, [override])
        loaded.to_dict()
        loaded.with_launch_settings(2, "no", 1)
        run.check_network(loaded)

    combinations = [f"{key}={text}" for key in keys() for text in TEXTS]
    generator.shuffle(combinations)
    for override in combinations:
        yield attempt, (override,)


def experiment_files(finished: Path, tmp_path: Path, generator: random.Random) -> Attempts:
    """Damaged experiment files."""
    content = (finished / "experiment.yaml").read_bytes()
    path = tmp_path / "experiment.yaml"

    def attempt(changed: bytes) -> None:
        path.write_bytes(changed)
        config.load_config(path)

    many = b"".join(b"unknown%d: 1\n" % number for number in range(2000))
    yield attempt, (many,)
    while True:
        yield attempt, (change_bytes(content, generator),)


def environments(finished: Path, tmp_path: Path, generator: random.Random) -> Attempts:
    """One to three variables of a launch with odd texts."""

    def attempt(variables: dict[str, str]) -> None:
        with patch.dict(os.environ):  # restored as a whole: setup_ranks adds variables
            for name in (*VARIABLES, *system.RANK_VARIABLES, *system.LOCAL_RANK_VARIABLES):
                os.environ.pop(name, None)
            os.environ.update(variables)
            system.setup_ranks()
            system.available_cores()
            system.local_world_size()

    texts = [text for text in [*NUMBERS, *WORDS] if "\0" not in text]
    while True:
        names = generator.sample(VARIABLES, generator.randrange(1, 4))
        variables = {name: generator.choice(texts) for name in names}
        yield attempt, (variables,)


def accelerate_environments(finished: Path, tmp_path: Path, generator: random.Random) -> Attempts:
    """Variables of accelerate launch, through the whole start of a program."""

    def attempt(name: str, text: str) -> None:
        with patch.dict(os.environ, {name: text}):
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            assert trainer.main([str(finished / "experiment.yaml"), "--preflight"]) in (0, 2)

    names = ["ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "LAUNCH_SECONDS", "RANK"]
    combinations = [
        (name, text) for name in names for text in ["foo", "", "-1", "1.5", "9" * 400, "yes", "é"]
    ]
    generator.shuffle(combinations)
    for name, text in combinations[: max(8, INPUTS // 20)]:
        yield attempt, (name, text)


def manifests(finished: Path, tmp_path: Path, generator: random.Random) -> Attempts:
    """Damaged files of a checkpoint."""
    (source,) = (finished / "run" / "checkpoints").glob("step_*")
    folder = tmp_path / "run" / "checkpoints" / source.name

    def attempt(name: str, content: bytes) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(source, folder)
        (folder / name).write_bytes(content)
        assert checkpoint_command.main(["verify", str(tmp_path / "run")]) in (0, 2)

    versions = {name: damaged(source / name, generator) for name in ("manifest.json", "state.json")}
    while True:
        name = generator.choice(sorted(path.name for path in source.iterdir()))
        old = (source / name).read_bytes()
        content = next(versions[name]) if name in versions else change_bytes(old or b"\0", generator)
        yield attempt, (name, content)


CATEGORIES: list[Category] = [settings, experiment_files, environments, manifests]
CATEGORIES += [accelerate_environments]


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.__name__)
def test_odd_inputs(
    category: Category, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried, unhandled = 0, []
    for attempt, arguments in category(finished, tmp_path, random.Random(1)):
        if tried == INPUTS:
            break
        tried += 1
        description = f"{arguments!r:.200}"
        try:
            attempt(*arguments)
        except USER_ERRORS as error:
            text = str(error)
            if not text or len(text) > MAX_CHARACTERS or len(text.splitlines()) > MAX_LINES:
                unhandled.append(f"{description}: a message of {len(text)} characters")
        except Exception as error:
            unhandled.append(f"{description}: {type(error).__name__}: {str(error)[:200]}")
        output = capsys.readouterr()
        if "Traceback" in output.err:
            unhandled.append(f"{description}: {output.err[-200:]}")
    with capsys.disabled():
        if "FUZZ_INPUTS" in os.environ:
            print(f"{category.__name__}: {tried} inputs, {tried - len(unhandled)} handled")
    assert not unhandled, "\n".join([f"{len(unhandled)} of {tried} unhandled", *unhandled[:20]])
