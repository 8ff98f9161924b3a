"""Whole evaluations, as a user starts them: results, files and bad input."""

from system import UserError

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from sklearn import metrics as sk

import datasets
import evaluation
import models
import trainer
from analysis import context as evaluation_context
from analysis import figures
from analysis.power_spectrum import wave_vectors, wavenumber
from analysis.report import FIGURES

ROOT = Path(__file__).parent.parent
SIZE, BOX = 64, 5120.0
BAND = (8.5, 13.5)  # waves per box in which the twins differ
TRAIN, TEST = 6, 5


def write_universe(path: Path, seeds: int, *, scale: float = 1.0, attributes: bool = True) -> None:
    """Cubes of independent slices of white noise; GR has four times the power in BAND, else the same."""
    waves = wavenumber(wave_vectors(SIZE, 2))
    excess = 1 + ((waves >= BAND[0]) & (waves < BAND[1]))
    with h5py.File(path, "w") as file:
        if attributes:
            file.attrs.update({"box_size": BOX, "redshift": 1.0, "mean": 0.0, "std": scale})
        for seed in range(seeds):
            field = torch.randn(SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
            other = torch.fft.irfft2(torch.fft.rfft2(field) * excess)
            file[f"newton_seed{seed:04d}"] = field.numpy() * scale
            file[f"gr_seed{seed:04d}"] = other.numpy() * scale


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a universe, a RACOON trained on it, and the evaluation of that."""
    folder = tmp_path_factory.mktemp("home")
    write_universe(folder / "universe.h5", TRAIN + TEST)
    sections = {
        "model_params": {"architecture": "RACOON", "layer_param": 8, "dropout": 0.1, "name": "run"},
        "data_params": {
            "datafile": str(folder / "universe.h5"),
            "train_seeds": TRAIN,
            "test_seeds": TEST,
            "newton_augmentation": 1.0,
            "axes": [0],
        },
        "train_params": {"epochs": 4, "lr": 0.01, "log_dir": str(folder / "runs"), "batch_size": 64},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(sections))
    assert trainer.main([str(folder / "experiment.yaml")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures.STYLE, "savefig.dpi", 60)  # faster
        assert evaluation.main([str(folder / "runs" / "run")]) == 0
    return folder


@pytest.fixture(autouse=True)
def _empty_figures(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn for `home` only: drawing takes most of the time."""
    monkeypatch.setattr(figures, "save", save_empty)


def save_empty(figure: Figure, path: Path) -> None:
    """Write files of a figure without drawing it."""
    for suffix in ("png", "pdf"):
        path.with_name(f"{path.name}.{suffix}").touch()


@pytest.fixture(scope="module")
def results(home: Path) -> dict[str, Any]:
    return json.loads((home / "runs" / "run" / "evaluation" / "report.json").read_text())


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(home / "runs" / "run", tmp_path / "run"))


def test_the_numbers_are_those_of_the_predictions(home: Path, results: dict[str, Any]) -> None:
    with h5py.File(home / "runs" / "run" / "evaluation" / "predictions.h5") as file:
        found = {name: file[name][:] for name in ("logit", "label", "seed", "axis", "position")}
        cubes = file["cubes/mean_logit"][:].reshape(-1, 2)
    assert len(found["logit"]) == TEST * 2 * SIZE
    assert set(found["seed"].tolist()) == set(range(TRAIN, TRAIN + TEST))
    assert set(found["axis"].tolist()) == {0}
    value = {key: estimate["value"] for key, estimate in results["slices"].items()}
    assert value["accuracy"] == sk.accuracy_score(found["label"], found["logit"] > 0)
    # over pairs of slices from different seeds
    index = {seed: found["seed"] == seed for seed in set(found["seed"].tolist())}
    gr = {seed: np.sort(found["logit"][index[seed] & (found["label"] == 1)]) for seed in index}
    newton = {seed: found["logit"][index[seed] & (found["label"] == 0)] for seed in index}
    above = [np.mean(gr[one][:, None] > newton[other]) for one in index for other in index if one != other]
    assert value["auc"] == pytest.approx(np.mean(above))
    assert results["pairs"]["pair_accuracy"]["value"] == np.mean(cubes[:, 1] > cubes[:, 0])
    assert results["data"]["seeds"] == [TRAIN, TRAIN + TEST]
    assert results["data"]["box_size"] == BOX


def test_the_predictions_are_those_of_the_network(home: Path) -> None:
    network = models.load(home / "runs" / "run" / "model")
    with h5py.File(home / "universe.h5") as file, torch.no_grad():
        expected = network(torch.from_numpy(file[f"gr_seed{TRAIN:04d}"][:])[:, None])
    with h5py.File(home / "runs" / "run" / "evaluation" / "predictions.h5") as file:
        here = (file["seed"][:] == TRAIN) & (file["label"][:] == 1)
        assert file["position"][here].tolist() == list(range(SIZE))
        np.testing.assert_allclose(file["logit"][here], expected, atol=1e-4)


def test_the_last_test_of_the_training_agrees(home: Path, results: dict[str, Any]) -> None:
    last = json.loads((home / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "test"
    for key in ("accuracy", "precision", "recall", "f1", "tpr", "fpr"):
        assert results["slices"][key]["value"] == pytest.approx(last[key], abs=1e-9), key
    assert results["slices"]["log_loss"]["value"] == pytest.approx(last["loss"], rel=1e-6)
    assert results["cubes"]["cube_accuracy"]["value"] == last["cube_accuracy"]
    assert results["pairs"]["pair_accuracy"]["value"] == last["pair_accuracy"]
    assert results["confusion"] == {key: last[key] for key in ("tp", "tn", "fp", "fn")}


def test_the_band_in_which_the_twins_differ_drives_the_classification(results: dict[str, Any]) -> None:
    scan = results["interventions"]
    whole = scan["none"]["auc"]["value"]
    assert whole > 0.9
    edges = np.array(scan["edges"]) * BOX / (2 * np.pi)
    areas = np.array([estimate["value"] for estimate in scan["exchange"]["auc"]])
    outside = (edges[1:] <= BAND[0]) | (edges[:-1] >= BAND[1])
    np.testing.assert_allclose(areas[outside], whole, atol=0.02)
    strongest = int(np.argmax([estimate["value"] for estimate in scan["shares"]]))
    assert BAND[0] <= edges[strongest] < BAND[1]
    assert areas[strongest] < 0.5
    small = [results["attribution"][key]["value"] for key in ("axes", "between", "diagonals")]
    assert sum(small) == pytest.approx(1, abs=0.1)
    k = np.array(results["power_spectra"]["k"]) * BOX / (2 * np.pi)
    inside = (k > BAND[0]) & (k < BAND[1])
    ratio = np.array([estimate["value"] for estimate in results["power_spectra"]["ratio"]])
    np.testing.assert_allclose(ratio[inside], 4, rtol=1e-3)
    assert "modes with n > 4" in results["findings"][0]
    assert results["significance"]["p_value"] == 1 / 2**TEST


def test_the_card_and_the_files_it_leaves(home: Path, results: dict[str, Any]) -> None:
    run = home / "runs" / "run"
    card = (run / "model" / "README.md").read_text()
    assert f"| accuracy of slices | {results['slices']['accuracy']['value']:.4f} [" in card
    names = {path.name for path in (run / "evaluation").iterdir()}
    assert names == {
        "report.html",
        "report.json",
        "predictions.h5",
        *(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "pdf")),
    }
    assert [line["what"] for line in results["saliency"]][:2] == [
        "most certain of GR",
        "most certain of Newton",
    ]


def test_two_processes_give_the_same_numbers(home: Path, results: dict[str, Any], tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    script = tmp_path / "evaluate.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.path.append({str(ROOT / 'tests')!r})\n"
        "import evaluation, test_evaluation; from analysis import figures\n"
        "figures.save = test_evaluation.save_empty; sys.exit(evaluation.main())\n"
    )
    command = [*launch, str(script), str(home / "runs" / "run"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found.pop("environment")["processes"] == 2
    assert found == {key: value for key, value in results.items() if key != "environment"}


def test_checkpoints_can_be_chosen(run: Path, results: dict[str, Any], tmp_path: Path) -> None:
    def accuracy(*options: str) -> float:
        assert evaluation.main([str(run), "--quick", "--output", str(tmp_path / "out"), *options]) == 0
        return json.loads((tmp_path / "out" / "report.json").read_text())["slices"]["log_loss"]["value"]

    tests = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in tests if line["phase"] == "test"}
    card = (run / "model" / "README.md").read_text()
    assert accuracy("--checkpoint", "last") == results["slices"]["log_loss"]["value"]
    assert accuracy("--checkpoint", "best") == pytest.approx(min(losses.values()), rel=1e-5)
    for step, loss in losses.items():
        assert accuracy("--checkpoint", str(step)) == pytest.approx(loss, rel=1e-5)
    assert (run / "model" / "README.md").read_text() == card


def test_training_seeds_need_permission_and_stay_out_of_the_card(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    card = (run / "model" / "README.md").read_text()
    options = ["--seeds", "0:3", "--quick", "--allow-training-seeds", "--output", str(tmp_path)]
    assert evaluation.main([str(run), *options]) == 0
    assert "trained on some of these seeds" in capsys.readouterr().out
    assert (run / "model" / "README.md").read_text() == card


def test_the_file_of_the_training_is_known_wherever_it_lies(home: Path, run: Path, tmp_path: Path) -> None:
    """As after a training from a copy on a node's own disk."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data_params"]["datafile"] = str(tmp_path / "gone.h5")
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    loaded = evaluation_context.load_config(run / "config.yaml")
    same = datasets.CubeFile(home / "universe.h5")
    last = evaluation_context.checkpoint.list_checkpoints(run / "checkpoints")[-1]
    assert evaluation_context.find_training_file(run, loaded, last, None).path == same.path  # where it was
    last.state["data_identity"]["path"] = str(tmp_path / "gone.h5")
    assert evaluation_context.find_training_file(run, loaded, last, same) is same
    write_universe(tmp_path / "fewer.h5", TRAIN)
    write_universe(tmp_path / "scaled.h5", TRAIN + TEST, scale=2)
    for name in ("fewer.h5", "scaled.h5"):
        assert (
            evaluation_context.find_training_file(run, loaded, last, datasets.CubeFile(tmp_path / name))
            is None
        )
    with pytest.raises(UserError, match=r"gone\.h5"):
        evaluation_context.find_training_file(run, loaded, last, None)
    assert evaluation_context.find_training_file(run, loaded, None, same) is None


def test_onnx_beside_the_weights(run: Path, capsys: Any) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    assert evaluation.main([str(run), "--quick", "--export", "onnx"]) == 0
    assert (run / "model" / "model.onnx").stat().st_size > 1000
    assert "of torch's" in capsys.readouterr().out


def other_values(run: Path, folder: Path) -> list[str]:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data_params"]["datafile"] = str(folder / "changed.h5")
    write_universe(folder / "changed.h5", TRAIN + TEST)
    with h5py.File(folder / "changed.h5", "a") as file:
        file["gr_seed0000"][...] = 1 + file["gr_seed0000"][...]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return []


def written(folder: Path, **options: Any) -> list[str]:
    write_universe(folder / "other.h5", TRAIN + TEST, **options)
    return ["--datafile", str(folder / "other.h5")]


def without_gr(folder: Path) -> list[str]:
    write_universe(folder / "alone.h5", TRAIN + TEST)
    with h5py.File(folder / "alone.h5", "a") as file:
        del file[f"gr_seed{TRAIN:04d}"]
    return ["--datafile", str(folder / "alone.h5")]


def large(folder: Path) -> list[str]:
    datasets.write_synthetic(folder / "large.h5", seeds=1, size=128, strength=1)
    return ["--datafile", str(folder / "large.h5"), "--seeds", f"{TRAIN}:{TRAIN + 3}"]


def cut(path: Path) -> list[str]:
    path.write_bytes(path.read_bytes()[:-100])
    return []


def changed(path: Path, old: str, new: str) -> list[str]:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return []


def gone(path: Path) -> list[str]:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return []


BAD: dict[str, tuple[Callable[[Path, Path], list[str]], list[str]]] = {
    "no run": (lambda run, folder: gone(run / "config.yaml"), ["config.yaml is missing", "LOG_DIR/NAME"]),
    "not trained": (lambda run, folder: gone(run / "model"), ["not finished", "--checkpoint last"]),
    "seeds that are not there": (lambda run, folder: ["--seeds", "8:20"], ["universe.h5", "11-19"]),
    "seeds trained on": (lambda run, folder: ["--seeds", "4:8"], ["trained on seeds 0 to 5", "--allow"]),
    "no seeds": (lambda run, folder: ["--seeds", "8:8"], ["'8:8'", "A:B"]),
    "too few seeds": (lambda run, folder: ["--seeds", "6:8"], ["2 are too few", "at least 3"]),
    "one gravity": (lambda run, folder: without_gr(folder), ["seeds 6 have only the newton cube"]),
    "another degradation": (lambda run, folder: ["--degrade", "blur=1"], ["'blur=1'", "smoothing=R"]),
    "seeds in words": (lambda run, folder: ["--seeds", "some"], ["'some'", "A:B"]),
    "another size": (lambda run, folder: large(folder), ["128^3", "64^3"]),
    "another mean or std": (lambda run, folder: written(folder, scale=1.01), ["other.h5", "std", "1.01"]),
    "raw values": (
        lambda run, folder: written(folder, scale=1e-5, attributes=False),
        ["other.h5", "standard deviation", "--like"],
    ),
    "other values": (other_values, ["changed.h5", "not the cubes", "--datafile"]),
    "no file": (lambda run, folder: ["--datafile", "nowhere.h5"], ["nowhere.h5"]),
    "a damaged model": (lambda run, folder: cut(run / "model" / "model.safetensors"), ["SHA-256"]),
    "no such step": (lambda run, folder: ["--checkpoint", "7"], ["'7'", "last", "best"]),
    "the last checkpoint damaged": (
        lambda run, folder: [*cut(max(run.glob("checkpoints/*/model.safetensors"))), "--checkpoint", "last"],
        ["model.safetensors has", "another checkpoint"],
    ),
    "another config.yaml": (
        lambda run, folder: changed(
            run / "config.yaml", "newton_augmentation: 1.0", "newton_augmentation: 0.9"
        ),
        ["newton_augmentation", "1.0", "0.9"],
    ),
    "all checkpoints gone": (
        lambda run, folder: [*gone(run / "checkpoints"), "--checkpoint", "best"],
        ["no checkpoint 'best'"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gets_status_2_and_nothing_is_written(
    kind: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    prepare, words = BAD[kind]
    (tmp_path / "files").mkdir()
    options = prepare(run, tmp_path / "files")
    capsys.readouterr()
    assert evaluation.main([str(run), "--quick", "--output", str(tmp_path / "out"), *options]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 6
    assert not (tmp_path / "out").exists()


def test_runs_are_compared(home: Path, run: Path, tmp_path: Path, capsys: Any) -> None:
    runs = [str(home / "runs" / "run"), str(run)]
    assert evaluation.main(["--compare", *runs, "--output", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "comparison.pdf").exists()
    assert capsys.readouterr().out.count("RACOON 8") == 2
    shutil.rmtree(run / "evaluation")
    assert evaluation.main(["--compare", *runs, "--output", str(tmp_path / "again")]) == 0
    assert f"without a report, left out: {run}" in capsys.readouterr().err
    assert evaluation.main(["--compare", str(run), "--output", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_a_run_or_a_comparison_is_needed() -> None:
    for arguments in ([], ["runs/a", "--compare", "runs/b"]):
        with pytest.raises(SystemExit) as end:
            evaluation.main(arguments)
        assert end.value.code == 2


def first_lines(run: Path, tmp_path: Path, capsys: Any, *options: str) -> str:
    capsys.readouterr()
    assert evaluation.main([str(run), "--quick", "--output", str(tmp_path / "out"), *options]) == 0
    return capsys.readouterr().out.split("figures", 1)[1].split("\n", 1)[1]


def test_selection_by_evaluated_test_seeds_is_the_first_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert "selected this network" not in first_lines(run, tmp_path, capsys)
    text = first_lines(run, tmp_path, capsys, "--checkpoint", "best")
    assert text.startswith("The lowest loss of all checkpoints selected this network on seeds 6 to 10")
    found = json.loads((tmp_path / "out" / "report.json").read_text())["selection"]
    assert (found["set"], found["seeds"], found["evaluated"]) == ("test", [TRAIN, TRAIN + TEST], True)
    exported = json.loads((run / "model" / "config.json").read_text())
    exported["selection"]["early_stopping"] = 3
    (run / "model" / "config.json").write_text(json.dumps(exported))
    trial = run.rename(run.parent / "study-007")
    (run.parent / "study-sweep.journal").write_text("")
    text = first_lines(trial, tmp_path, capsys)
    assert text.startswith("Early stopping after 3 evaluations without improvement and a sweep of 1 trials")


def test_networks_of_earlier_versions_do_not_record_their_selection(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    exported = json.loads((run / "model" / "config.json").read_text())
    del exported["selection"]
    (run / "model" / "config.json").write_text(json.dumps(exported))
    assert "Selection: unknown." in first_lines(run, tmp_path, capsys)


def test_a_checkpoint_chosen_by_hand_is_no_network_of_a_fixed_number_of_epochs(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    first, *_, newest = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    text = first_lines(run, tmp_path, capsys, "--checkpoint", str(int(first[5:])))
    assert text.startswith(
        f"A choice of the checkpoint of step {int(first[5:])} by hand selected this network"
    )
    assert "the results may be biased upwards" in text
    assert "with the results on test seeds 6 to 10 known." in text
    assert "fixed number of epochs" not in text
    for options in ([], ["--checkpoint", "last"], ["--checkpoint", str(int(newest[5:]))]):
        text = first_lines(run, tmp_path, capsys, *options)
        assert "after the last epoch of a fixed number of epochs" in text
        assert "selected this network" not in text
    for later in sorted((run / "checkpoints").glob("step_*"))[1:]:  # as of a training that was stopped
        gone(later)
    gone(run / "model")
    assert "has not reached its last epoch" in first_lines(run, tmp_path, capsys, "--checkpoint", "last")


@pytest.fixture
def validated(home: Path, tmp_path: Path) -> Path:
    """The experiment of a run with validation seeds, of one epoch."""
    experiment = yaml.safe_load((home / "experiment.yaml").read_text())
    experiment["train_params"] |= {"epochs": 1, "log_dir": str(tmp_path / "runs"), "keep_checkpoints": 1}
    experiment["data_params"] |= {"validation_seeds": 2}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return tmp_path / "experiment.yaml"


def train(experiment: Path) -> Path:
    """Train, or extend the training; returns the folder of the run."""
    assert trainer.main([str(experiment)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return experiment.parent / "runs" / "run"


def test_an_extension_after_the_test_is_a_selection_by_it(
    validated: Path, tmp_path: Path, capsys: Any
) -> None:
    for epoch in (1, 2):
        run = train(validated)
        text = first_lines(run, tmp_path, capsys)
        found = json.loads((tmp_path / "out" / "report.json").read_text())["selection"]
        assert found["evaluated"] == (epoch == 2)
        assert ("fixed number of epochs" in text) == (epoch == 1)
    expected = "An extension of the training after its end at epoch 1 selected this network with the results"
    assert text.startswith(f"{expected} on seeds 4 to 10 known, which are evaluated here")
    assert "validation_seeds" not in text
    assert found["set"] == "validation and test"
    shutil.rmtree(run / "checkpoints")  # the exported network records it
    assert first_lines(run, tmp_path, capsys).startswith(expected)


def test_probabilities_of_cubes_have_a_calibration_of_their_own(
    validated: Path, home: Path, tmp_path: Path, capsys: Any
) -> None:
    run = train(validated)
    config = run / "model" / "config.json"
    content = json.loads(config.read_text())
    first_lines(run, tmp_path, capsys)
    found = json.loads((tmp_path / "out" / "report.json").read_text())["calibrated"]
    threshold = content["calibration"]["axes"][0]["threshold"]
    with h5py.File(tmp_path / "out" / "predictions.h5") as file:
        right = (file["logit"][:] > threshold) == file["label"][:]
    assert threshold != 0
    assert found["accuracy"]["value"] == pytest.approx(right.mean())
    slices, cubes = content["calibration"], content["calibration"]["cubes"]
    state = json.loads(next(run.glob("checkpoints/*/state.json")).read_text())["train_state"]
    assert state["calibration"] == slices

    def predict() -> tuple[bool, np.ndarray, np.ndarray]:
        command = [str(run), "--predict", str(home / "universe.h5"), "--output", str(tmp_path / "out.h5")]
        assert evaluation.main(command) == 0
        with h5py.File(tmp_path / "out.h5") as file:
            return file.attrs["calibrated"], file["cubes/mean_logit"][:], file["cubes/probability"][:]

    calibrated, means, probability = predict()
    assert calibrated
    odds = (means - cubes["threshold"]) / cubes["temperature"]
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-odds)), rtol=1e-6)
    assert "not calibrated" not in capsys.readouterr().out
    del content["calibration"]["cubes"]  # as an earlier version wrote it
    config.write_text(json.dumps(content))
    calibrated, means, probability = predict()
    assert not calibrated
    odds = (means - slices["threshold"]) / slices["temperature"]
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-odds)), rtol=1e-6)
    assert "not calibrated" in capsys.readouterr().out


def test_degraded_slices_have_a_table(run: Path, tmp_path: Path) -> None:
    options = ["--quick", "--output", str(tmp_path / "out"), "--degrade", "noise=3"]
    assert evaluation.main([str(run), *options]) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["degradation"]
    assert found["none"]["auc"]["value"] > 0.9
    assert found["noisy"]["auc"]["value"] < found["none"]["auc"]["value"]
    assert found["mean_removed"]["change"]["value"] == pytest.approx(0, abs=0.02)
    html = (tmp_path / "out" / "report.html").read_text()
    assert "white noise, 3 standard deviations" in html


def test_another_redshift_may_have_another_standardization(run: Path, tmp_path: Path, capsys: Any) -> None:
    write_universe(tmp_path / "z10.h5", TRAIN + TEST, scale=1.1)
    with h5py.File(tmp_path / "z10.h5", "a") as file:
        file.attrs["redshift"] = 10.0
    text = first_lines(run, tmp_path, capsys, "--datafile", str(tmp_path / "z10.h5"))
    assert "trained at z = 1 and still distinguishes the gravities at z = 10" in text


def test_unlabelled_cubes_are_predicted(home: Path, tmp_path: Path, capsys: Any) -> None:
    run = home / "runs" / "run"
    options = ["--predict", str(home / "universe.h5"), "--output", str(tmp_path / "out.h5")]
    assert evaluation.main([str(run), *options]) == 0
    with h5py.File(tmp_path / "out.h5") as found, h5py.File(run / "evaluation" / "predictions.h5") as file:
        for label, gravity in enumerate(("newton", "gr")):
            chosen = (file["seed"][:] == TRAIN) & (file["label"][:] == label)
            logits = found[f"logits/{gravity}_seed{TRAIN:04d}"][0]
            np.testing.assert_allclose(logits, file["logit"][:][chosen], atol=1e-4)
    assert "written to" in capsys.readouterr().out
    datasets.write_synthetic(tmp_path / "large.h5", seeds=1, size=128, strength=1)
    options = ["--predict", str(tmp_path / "large.h5"), "--output", str(tmp_path / "none.h5")]
    assert evaluation.main([str(run), *options]) == 2
    assert "64^3" in capsys.readouterr().err
    assert not (tmp_path / "none.h5").exists()


def test_predictions_are_not_made_in_the_units_of_other_cubes(
    run: Path, home: Path, tmp_path: Path, capsys: Any
) -> None:
    other_values(run, tmp_path)
    options = ["--predict", str(home / "universe.h5"), "--output", str(tmp_path / "out.h5")]
    assert evaluation.main([str(run), *options]) == 2
    assert "changed.h5: these are not the cubes that" in capsys.readouterr().err
    assert not (tmp_path / "out.h5").exists()


def test_predictions_replace_only_predictions(run: Path, home: Path, tmp_path: Path, capsys: Any) -> None:
    cubes = tmp_path / "cubes.h5"
    shutil.copy(home / "universe.h5", cubes)
    (tmp_path / "link.h5").symlink_to(cubes)
    (tmp_path / "notes.h5").write_text("mine")
    evaluated = run / "evaluation" / "predictions.h5"
    before = {path: path.read_bytes() for path in (cubes, evaluated)}

    def predict(output: Path) -> tuple[int, str]:
        capsys.readouterr()
        status = evaluation.main([str(run), "--predict", str(cubes), "--output", str(output)])
        return status, capsys.readouterr().err

    for output in (cubes, tmp_path / "link.h5", tmp_path / "notes.h5", evaluated, tmp_path):
        status, message = predict(output)
        assert (status, "not written by --predict" in message) == (2, True), output
    status, message = predict(tmp_path / "notes.h5" / "deep" / "out.h5")
    assert (status, "notes.h5 is not a folder. Choose" in message, "--output" in message) == (2, True, True)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "link.h5").is_symlink()
    for _ in range(2):  # an earlier prediction is replaced
        assert predict(tmp_path / "new" / "folder" / "out.h5") == (0, "")


@pytest.mark.parametrize(
    ("arguments", "unread"),
    [
        (
            ["run", "--predict", "cubes.h5", "--output", "out.h5", "--seeds", "6:9"],
            "--predict does not use --seeds",
        ),
        (["--compare", "a", "b", "--quick"], "--compare does not use --quick"),
        (
            ["--ensemble", "a", "b", "--export", "onnx", "--quick"],
            "--ensemble does not use --quick, --export",
        ),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments: list[str], unread: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        evaluation.main(arguments)
    assert end.value.code == 2
    assert unread in capsys.readouterr().err


def test_an_ensemble_needs_different_training_seeds(
    home: Path, run: Path, tmp_path: Path, capsys: Any
) -> None:
    runs = [str(home / "runs" / "run"), str(run)]
    assert evaluation.main(["--ensemble", *runs, "--output", str(tmp_path / "out")]) == 2
    assert "equal train_params.seed" in capsys.readouterr().err
    path = run / "evaluation" / "report.json"
    content = json.loads(path.read_text())
    content["config"]["train_params"]["seed"] += 1
    path.write_text(json.dumps(content))
    assert evaluation.main(["--ensemble", *runs, "--output", str(tmp_path / "out")]) == 0
    assert "standard deviation over trainings" in capsys.readouterr().out
