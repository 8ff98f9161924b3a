"""The experiment file: accepted values, errors, and their messages."""

from system import UserError

import ast
import inspect
import json
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import config

TEMPLATE = """\
model_params:
  architecture: "RACCOON"
  layer_param: 16
  dropout: 0.5
  name: "Somename"
data_params:
  datafile: "data_z1.h5"
  train_seeds: 150
  test_seeds: 100
  newton_augmentation: 1.0
train_params:
  epochs: 10
  lr: 0.001
  log_dir: "testruns"
"""


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(TEMPLATE)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        config.load_config(path, list(overrides))
    return str(error.value)


def test_the_template_loads_with_the_defaults(template: Path) -> None:
    loaded = config.load_config(template)
    assert loaded.model_params.model_dump() == {
        "architecture": "RACCOON",
        "layer_param": 16,
        "dropout": 0.5,
        "name": "Somename",
        "activation": "relu",
        "padding": "zeros",
    }
    assert loaded.data_params.model_dump() == {
        "datafile": "data_z1.h5",
        "local_copy": None,
        "train_seeds": 150,
        "test_seeds": 100,
        "validation_seeds": 0,
        "newton_augmentation": 1.0,
        "standardize": "none",
        "whiten": "none",
        "cache": "auto",
        "channels": 1,
        "axes": [0, 1, 2],
        "symmetries": True,
        "shifts": False,
        "pairs": False,
        "synthetic": None,
    }
    train = loaded.train_params
    assert (train.batch_size, train.betas, train.weight_decay) == (64, [0.5, 0.999], 1e-11)
    assert (train.test_every, train.seed, train.keep_checkpoints, train.save_every_minutes) == (2, 42, 3, 10)
    assert loaded.run_dir == Path("testruns/Somename")


@pytest.mark.parametrize("path", sorted(Path("experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_every_experiment_of_the_project_loads(path: Path) -> None:
    assert config.load_config(path).run_dir.name == yaml.safe_load(path.read_text())["model_params"]["name"]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("2E-4", 0.0002), ("1.5e-2", 0.015), ("5e+0", 5.0), ("1", 1.0)]
)
def test_scientific_notation_is_a_number(template: Path, text: str, value: float) -> None:
    assert config.load_config(template, [f"train_params.lr={text}"]).train_params.lr == value


def test_whole_numbers_are_decimal(template: Path) -> None:
    assert config.load_config(template, ["model_params.layer_param=010"]).model_params.layer_param == 10


def test_a_merge_key_merges(template: Path) -> None:
    text = TEMPLATE.replace("train_params:", "train_params:\n  <<: {batch_size: 32}")
    template.write_text(text)
    assert config.load_config(template).train_params.batch_size == 32


def test_overrides_change_the_file_and_reach_nested_sections(template: Path) -> None:
    overrides = [
        "data_params.synthetic.size=128",
        "data_params.axes=[2, 0]",
        "train_params.mixed_precision=no",
        "train_params.betas=[0.9, 0.99]",
        "train_params.compile=false",
    ]
    loaded = config.load_config(template, overrides)
    assert loaded.data_params.synthetic is not None
    assert loaded.data_params.synthetic.size == 128
    assert loaded.data_params.axes == [0, 2]
    assert loaded.train_params.mixed_precision == "no"
    assert loaded.train_params.betas == [0.9, 0.99]
    assert loaded.train_params.compile is False


@pytest.mark.parametrize(
    ("override", "key", "rest"),
    [
        ("train_params.lrr=1", "train_params.lrr", "did you mean lr?"),
        ("train_parms.lr=1", "train_parms", "did you mean train_params?"),
        ("data_params.synthetic.sized=64", "data_params.synthetic.sized", "did you mean size?"),
        ("train_params.learning=1", "train_params.learning", "unknown key"),
        ("model_params.dropout=1.5", "model_params.dropout", "found 1.5"),
        ("model_params.dropout=-0.1", "model_params.dropout", "greater than or equal to 0"),
        ("model_params.layer_param=0", "model_params.layer_param", "greater than or equal to 1"),
        ("model_params.layer_param=1.5", "model_params.layer_param", "integer"),
        ("model_params.layer_param=true", "model_params.layer_param", "found True"),
        ("train_params.lr=0", "train_params.lr", "greater than 0"),
        ("train_params.lr=.nan", "train_params.lr", "a finite number"),
        ("train_params.lr=.inf", "train_params.lr", "a finite number"),
        ("train_params.lr=fast", "train_params.lr", "found 'fast' (str)"),
        ("train_params.lr=", "train_params.lr", "an empty value"),
        ("train_params.epochs=-1", "train_params.epochs", "found -1"),
        ("train_params.batch_size=1", "train_params.batch_size", "greater than or equal to 2"),
        ("train_params.schedule=linear", "train_params.schedule", "'none' or 'cosine'"),
        ("train_params.mixed_precision=fp8", "train_params.mixed_precision", "'no', 'fp16' or 'bf16'"),
        ("train_params.betas=[0.5]", "train_params.betas", "List should have at"),
        ("train_params.betas=[0.5, 0.6, 0.7]", "train_params.betas", "List should have at"),
        ("train_params.seed=4294967296", "train_params.seed", "less than"),
        ("train_params.max_minutes=1e300", "train_params.max_minutes", "less than"),
        ("model_params.layer_param=1000000000000", "model_params.layer_param", "less than"),
        ("data_params.train_seeds=100000000", "data_params.train_seeds", "less than"),
        ("data_params.newton_augmentation=0", "data_params.newton_augmentation", "greater than 0"),
        ("train_params.log_dir=''", "train_params.log_dir", "at least 1 character"),
        ("train_params.compile=maybe", "train_params.compile", "'auto', True or False"),
        ("train_params.warmup_epochs=11", "train_params", "warmup_epochs 11.0 is longer than epochs 10"),
        ("model_params.name=a/b", "model_params.name", "found 'a/b'"),
        ("model_params.name=..", "model_params.name", "found '..'"),
        ("model_params.name=''", "model_params.name", "letters, digits"),
        ("model_params.name=no", "model_params.name", "quotes"),
        ("data_params.axes=[0, 0]", "data_params.axes", "each axis at most once"),
        ("data_params.axes=[]", "data_params.axes", "at least 1"),
        ("data_params.axes=[3]", "data_params.axes", "less than or equal to 2"),
        ("data_params.cache=ram", "data_params.cache", "'auto', 'disk', 'memory' or 'device'"),
        ("data_params.synthetic.size=100", "data_params.synthetic.size", "multiple of 64"),
    ],
)
def test_invalid_values_are_named(template: Path, override: str, key: str, rest: str) -> None:
    text = message(template, override)
    assert text.startswith(f"{template}:\n  {key}: ")
    assert rest in text
    assert len(text.splitlines()) == 2, "one line for one error"


def test_all_errors_are_reported_at_once(template: Path) -> None:
    text = message(template, "model_params.dropout=2", "train_params.epochs=0", "data_params.datfile=x")
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "model_params.dropout",
        "data_params.datfile",
        "train_params.epochs",
    ]


@pytest.mark.parametrize("key", ["model_params.name", "data_params.datafile", "train_params.lr"])
def test_a_missing_key_is_named(template: Path, key: str) -> None:
    section, name = key.split(".")
    raw = yaml.safe_load(TEMPLATE)
    del raw[section][name]
    template.write_text(yaml.safe_dump(raw))
    assert f"{key}: missing" in message(template)


@pytest.mark.parametrize("override", ["lr=1", "train_params.lr", ".lr=1", "train_params.=1"])
def test_malformed_overrides(template: Path, override: str) -> None:
    assert "allowed: section.key=value" in message(template, override)


@pytest.mark.parametrize(
    ("content", "rest"),
    [
        ("", "found nothing"),
        ("- 1\n- 2\n", "found list"),
        ("just words", "found str"),
        ("model_params: [1, 2]\n", "model_params"),
        ("a: b: c\n", "not valid YAML"),
        ("train_params:\n  lr: 1\n  lr: 2\n", "duplicate key 'lr'"),
        ("\x00", "not valid YAML"),
        ("? [a, b]\n: c\n", "not valid YAML"),
        ("name: 2023-02-30\n", "not valid YAML"),
        ("epochs: 0x_\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_files_that_are_not_experiments(tmp_path: Path, content: str, rest: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(content)
    text = message(path)
    assert text.startswith(str(path))
    assert rest in text


@pytest.mark.parametrize(
    ("old", "new", "rest"),
    [
        (
            "  dropout: 0.5",
            "\tdropout: 0.5",
            "line 4, column 1: found character '\\t'",
        ),
        ("train_params:", "---\ntrain_params:", "line 11, column 1: but found another document"),
        ('name: "Somename"', 'name: "Somename', "not closed"),
        (
            'name: "Somename"',
            "name: 2025-01-30",
            "line 5, column 9: name: found 2025-01-30, which",
        ),
        ('name: "Somename"', "name: 1:30", "line 5, column 9: name: found 1:30"),
        ('name: "Somename"', "name: 0xFF", "line 5, column 9: name: found 0xFF"),
    ],
)
def test_yaml_errors_name_line_and_column(template: Path, old: str, new: str, rest: str) -> None:
    template.write_text(TEMPLATE.replace(old, new))
    assert rest in message(template)
    if "name: " in new and '"' not in new:
        value = new.removeprefix("name: ")
        assert "put it in quotes" in message(template)
        template.write_text(TEMPLATE)
        assert "put it in quotes" in message(template, f"model_params.{new.replace(': ', '=')}")
        template.write_text(TEMPLATE.replace(old, f"name: '{value.replace(':', '-')}'"))
        assert config.load_config(template).model_params.name == value.replace(":", "-")


def test_paths_expand_variables(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    overrides = ["data_params.datafile=$SCRATCH/a.h5", "train_params.log_dir=${SCRATCH}/runs"]
    loaded = config.load_config(template, [*overrides, "data_params.local_copy=~/b.h5"])
    assert loaded.data_params.datafile == "/scratch/me/a.h5"
    assert loaded.train_params.log_dir == "/scratch/me/runs"
    assert loaded.data_params.local_copy == str(Path.home() / "b.h5")
    monkeypatch.delenv("SCRATCH")
    text = message(template, *overrides)
    assert "data_params.datafile: found '$SCRATCH/a.h5'" in text
    assert "allowed: a path without $SCRATCH, which is not set" in text


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in message(tmp_path / "absent.yaml")
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "cannot be read" in message(tmp_path / "latin.yaml")


def test_the_saved_configuration_loads_to_the_same(template: Path, tmp_path: Path) -> None:
    loaded = config.load_config(template, [f"train_params.log_dir={tmp_path}", "train_params.lr=1e-3"])
    loaded.save()
    assert config.load_config(loaded.run_dir / "config.yaml") == loaded


def test_settings_that_differ_from_the_saved_run_are_listed(template: Path, tmp_path: Path) -> None:
    old = config.load_config(template).to_dict()
    may_change = ["train_params.epochs=99", "train_params.test_every=1", "data_params.cache=disk"]
    config.check_same_settings(tmp_path, old, config.load_config(template, may_change).to_dict())
    other = config.load_config(
        template, ["train_params.lr=0.5", "model_params.dropout=0", *may_change]
    ).to_dict()
    with pytest.raises(UserError) as error:
        config.check_same_settings(tmp_path, old, other)
    assert str(error.value).splitlines()[1:3] == [
        "  model_params.dropout: the run has 0.5, this experiment 0.0",
        "  train_params.lr: the run has 0.001, this experiment 0.5",
    ]


def test_launch_settings_become_part_of_the_experiment(template: Path) -> None:
    found = config.load_config(template).with_launch_settings(4, "bf16", 2).train_params
    assert (found.mixed_precision, found.gradient_accumulation_steps) == ("bf16", 2)


def test_a_cpu_has_no_fp16(template: Path) -> None:
    with pytest.raises(UserError, match="allowed on a CPU: no, bf16"):
        config.load_config(template).with_launch_settings(1, "fp16", 1, "cpu")


def test_there_are_no_more_channels_than_slices(template: Path) -> None:
    loaded = config.load_config(template, ["data_params.channels=65"])
    assert loaded.network_settings((2, 128, 128, 128)).channels == 130
    with pytest.raises(UserError, match=r"data_params\.channels: found 65, allowed: at most 64"):
        loaded.network_settings((64, 64, 64))


@pytest.mark.parametrize(("batch", "processes", "accumulation"), [(64, 3, 1), (64, 1, 3), (4, 4, 1)])
def test_a_batch_must_split_into_equal_parts(
    template: Path, batch: int, processes: int, accumulation: int
) -> None:
    loaded = config.load_config(template, [f"train_params.batch_size={batch}"])
    with pytest.raises(UserError, match=rf"train_params\.batch_size: found {batch}"):
        loaded.with_launch_settings(processes, "no", accumulation)


def test_keys_that_did_not_exist_when_a_run_was_saved_had_their_default(
    template: Path, tmp_path: Path
) -> None:
    current = config.load_config(template).to_dict()
    saved = {section: dict(keys) for section, keys in current.items()}
    del saved["data_params"]["validation_seeds"], saved["train_params"]["trackers"]
    config.check_same_settings(tmp_path, saved, current)
    current["data_params"]["validation_seeds"] = 4
    with pytest.raises(UserError, match="validation_seeds: the run has 0, this experiment 4"):
        config.check_same_settings(tmp_path, saved, current)


def test_validation_seeds_are_the_last_training_seeds(template: Path) -> None:
    data = config.load_config(template, ["data_params.validation_seeds=30"]).data_params
    assert (data.train_range, data.validation_range) == (range(120), range(120, 150))
    assert data.test_range == range(150, 250)
    assert "leaves none" in message(template, "data_params.validation_seeds=150")


def test_pairs_need_an_even_batch_on_every_process(template: Path) -> None:
    loaded = config.load_config(template, ["data_params.pairs=true", "train_params.batch_size=66"])
    loaded.with_launch_settings(1, "no", 1)
    with pytest.raises(UserError, match="a multiple of 4"):
        loaded.with_launch_settings(2, "no", 1)


NUMBERS = ["model_params.layer_param", "data_params.channels", "data_params.synthetic.size"]
NUMBERS += [f"train_params.{key}" for key in ("epochs", "batch_size", "seed", "save_every_steps", "lr")]


@pytest.mark.parametrize("key", [*NUMBERS, "data_params.validation_seeds", "data_params.synthetic.seed"])
def test_integers_of_any_size_are_reported_in_short(template: Path, key: str) -> None:
    text = message(template, f"{key}=1{'0' * 5000}")
    assert key in text
    assert len(text) < 400


@pytest.mark.parametrize(
    "value", ["!!bool maybe", "!!timestamp x", "!!python/name:os.system", "!!int x", "*a"]
)
def test_yaml_tags_that_do_not_fit_are_errors(template: Path, value: str) -> None:
    assert "not valid YAML" in message(template, f"train_params.epochs={value}")
    template.write_text(TEMPLATE.replace("epochs: 10", f"epochs: {value}"))
    assert "not valid YAML" in message(template)


def test_long_values_and_many_errors_are_shortened(template: Path) -> None:
    assert len(message(template, f"model_params.name={'x' * 10_000}")) < 400
    template.write_text(TEMPLATE + "".join(f"  key_{n}: 1\n" for n in range(3000)))
    lines = message(template).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "  ... and 2981 more errors"


def test_the_readme_lists_every_key_with_its_docstring_and_default() -> None:
    """The table of docs/keys.md is generated from config.py: `python tests/test_config.py` prints it."""
    assert key_table() in Path("docs/keys.md").read_text(encoding="utf-8")


def key_table() -> str:
    rows = ["| key | meaning | default |", "|---|---|---|"]
    for section, model in config.SECTIONS.items():
        if section == "synthetic":
            continue
        for key, field in model.model_fields.items():
            meaning = " ".join(docstrings(model)[key].split())
            default = "required" if field.is_required() else f"`{yaml_value(field.get_default())}`"
            rows.append(f"| `{section}.{key}` | {meaning} | {default} |")
    return "\n".join(rows) + "\n"


def docstrings(model: type) -> dict[str, str]:
    """The string under each field of a section."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: after.value.value
        for node, after in pairwise(body.body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def yaml_value(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value).strip('"')


if __name__ == "__main__":
    print(key_table())
