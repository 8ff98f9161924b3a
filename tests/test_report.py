"""The files of an evaluation: report, predictions, figures, comparisons and ensembles."""

from system import UserError

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import h5py
import matplotlib as mpl
import numpy as np
import pytest
import simulated_universe as universe
from PIL import Image

from analysis import comparison, figures, findings, report, saliency, statistics
from analysis.interventions import DEGRADATIONS
from analysis.power_spectrum import Box
from analysis.report import FIGURES
from training.metrics import Predictions

HISTORY = [
    {"loss": 0.7, "accuracy": 0.5, "auc": 0.5, "cube_accuracy": 0.5, "pair_accuracy": 1.0}
    | {"phase": phase, "epoch": epoch}
    for epoch in (1, 2)
    for phase in ("train", "validation", "test")
]


def predictions_of(seeds: int = 6, positions: int = 8, signal: float = 1.0, draw: int = 0) -> Predictions:
    """Random logits of slices of three axes that differ by `signal` between gravities."""
    rng = np.random.default_rng(draw)
    parts = np.meshgrid(range(4, 4 + seeds), range(2), range(3), range(positions), indexing="ij")
    seed, label, axis, position = (part.ravel() for part in parts)
    ids = ((seed * 2 + label) * 3 + axis) * universe.SIZE + position
    logits = rng.normal(size=len(ids)) + signal * (label - 0.5) + rng.normal(size=100)[seed]
    return Predictions(ids, seed, label, axis, position, logits)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run folder with the evaluation of a lattice universe, and the results in it."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "evaluation"
    folder.mkdir()
    evaluated = universe.evaluate(universe.lattice)
    maps = {key: np.eye(8) for key in saliency.MAPS}
    about = {"what": "some", "gravity": "GR", "seed": 1, "position": 0, "axis": 0, "logit": 1.0}
    results = evaluated.results | {"saliency": [maps | about] * 4}
    none = statistics.headline(evaluated.predictions) | {"change": {"value": 0.0, "low": None, "high": None}}
    results["degradation"] = {"smoothing": 160.0, "noise": 0.1} | dict.fromkeys(("none", *DEGRADATIONS), none)
    results |= {"warnings": ["a warning"], "findings": findings.describe(results)[1]}
    drawn = figures.of_evaluation(evaluated.predictions, results, HISTORY, universe.BOX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures.STYLE, "savefig.dpi", 60)  # faster
        for name, figure in drawn.items():
            figures.save(figure, folder / name)
    report.write_predictions(folder / "predictions.h5", evaluated.predictions)
    report.write(folder, results, drawn)
    return run, results


def test_figures_of_an_earlier_report_are_removed(
    written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, results = written
    folder = Path(shutil.copytree(run / "evaluation", tmp_path / "evaluation"))
    (folder / "mine.png").touch()
    report.write(folder, results, ["roc", "twins"])
    names = {path.name for path in folder.iterdir() if path.suffix in (".png", ".pdf")}
    assert names == {"roc.png", "roc.pdf", "twins.png", "twins.pdf", "mine.png"}


def test_every_figure_is_written_as_png_and_pdf(written: tuple[Path, dict[str, Any]]) -> None:
    folder = written[0] / "evaluation"
    for name in FIGURES:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 150
            gray = np.asarray(image.convert("L"))
        assert gray.min() < 110
        assert gray.max() == 255
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_figures_leave_matplotlib_unchanged_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures.STYLE, "savefig.dpi", 60)
        for name in ("first", "second"):
            drawn = figures.twins_plot([3, 4, 5], np.array([0.0, 1, 2]), np.array([1.0, 0, 3]))
            figures.save(drawn, tmp_path / name)
    assert dict(mpl.rcParams) == before
    for suffix in (".png", ".pdf"):
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()


def test_an_estimate_without_an_interval_has_no_error_bar_and_an_open_symbol() -> None:
    bounded = {"value": 0.7, "low": 0.6, "high": 0.75}
    unbounded = {"value": 0.8, "low": None, "high": None}
    figure = figures.intervals({"a": {"auc": bounded}, "b": {"auc": unbounded}}, {"auc": ("AUC", 0.5)})
    figure.draw_without_rendering()
    bars: Any = figure.axes[0].containers
    assert [bar.has_xerr for bar in bars] == [True, False]
    np.testing.assert_allclose(bars[0].lines[2][0].get_segments(), [[[0.6, 1], [0.75, 1]]])
    assert [bar.lines[0].get_markerfacecolor() for bar in bars] == ["black", "white"]


def test_spectra_of_twins_are_both_visible_and_theory_beside_their_ratio() -> None:
    flat = [{"value": 1.0, "low": 0.9, "high": 1.1}] * 4
    spectra = {"k": [1, 2, 3, 4], "newton": np.ones(4), "gr": np.ones(4), "ratio": flat, "cube_ratio": flat}
    spectra |= {"theory": np.ones(4), "cube_theory": None}
    grid = {
        "ratio": dict.fromkeys(figures.ENDS, np.ones((3, 2))) | {"edges": [0.5, 4, 7], "directions": "abc"}
    }
    power, ratio, _ = figures.power_spectra(spectra, grid, Box(8, None)).axes
    below, above = power.lines
    assert below.get_linewidth() > 1.5 * above.get_linewidth()
    assert above.get_linestyle() == "--"
    assert [line.get_label() for line in ratio.lines][:3] == ["slices", "theory, slices", "cubes"]


def test_saliency_maps_name_the_directions_of_each_slice() -> None:
    maps = {key: np.eye(4) for key in saliency.MAPS}
    about = {"what": "some", "gravity": "GR", "seed": 1, "position": 0, "logit": 1.0}
    rows = [maps | about | {"axis": axis} for axis in (2, 0, 1)]
    axes = figures.saliency_maps(rows, Box(4, 100.0)).axes[:9]
    # the rows of an image count the first direction that is left of its cube, the columns the second
    assert [place.get_ylabel() for place in axes[::3]] == ["x [Mpc/h]", "y [Mpc/h]", "x [Mpc/h]"]
    assert [place.get_xlabel() for place in axes] == ["y [Mpc/h]"] * 3 + ["z [Mpc/h]"] * 6


@pytest.mark.parametrize("logits", [np.zeros(12), np.full(12, 40.0)])
def test_a_constant_network_can_be_summarized_and_drawn(logits: np.ndarray) -> None:
    predictions = predictions_of(seeds=2, positions=1).with_logits(logits)
    results = statistics.summarize(predictions)
    assert results["slices"]["auc"]["value"] == 0.5
    assert results["significance"]["p_value"] == 1
    for figure in figures.of_evaluation(predictions, results, [], Box(8, None)).values():
        figure.draw_without_rendering()


def test_the_report_has_every_number_and_no_external_files(written: tuple[Path, dict[str, Any]]) -> None:
    folder, results = written[0] / "evaluation", written[1]
    text = (folder / "report.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    assert found["slices"]["auc"]["value"] == results["slices"]["auc"]["value"]
    assert "image" not in found["saliency"][0]
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(FIGURES)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\(|@import|<script|https?://""", html)
    assert "a &lt;run&gt;" in html
    assert html.index("The lattice, not gravity, drives the classification") < html.index(
        "a warning"
    )  # the verdict first
    for name in ("F1", "Brier score", "area under the ROC curve (AUC)", "expected calibration error"):
        assert f"<td>{name}</td>" in html


def test_tables_have_heads_and_numbers_of_few_digits(written: tuple[Path, dict[str, Any]]) -> None:
    results = json.loads((written[0] / "evaluation" / "report.json").read_text())
    results["attribution"]["mean"] = {"value": 2.3e-8, "low": -1.2e-7, "high": 1.7e-7}
    results["pairs"]["mean_difference"] = {"value": 3.11194, "low": -0.00001, "high": 4.3175}
    results["slices"]["log_loss"] = {"value": 1.234e-7, "low": None, "high": None}
    results["environment"] = {
        "seconds": {"forward pass": 2.8387169819998235, "metrics": 0.014886595999996644}
    }
    results["selection"]["seeds"], results["data"]["seeds"] = [20, 24], [24, 32]
    images = {"training": (written[0] / "evaluation" / "training.png").read_bytes()}
    html = report.page(results, {})
    assert html.count("<thead><tr><th>") == html.count("<table>") - 1  # that of provenance has no head
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"</?sup>", "", html)))
    for row in (
        "mean of the slice 0.0000 [0.0000, 0.0000]",
        "mean difference of twins [logit] 3.112 [0.000, 4.317]",
        "log loss [nat] 0.6931 1.23 × 10−7",
        "environment: seconds forward pass 2.8, metrics 0.0",
        "data: seeds 24 to 31",
        "selection: seeds 20 to 23",
    ):
        assert row in words
    assert "includes dropout" not in report.page(results | {"model": {"dropout": 0.0}}, images)
    assert "includes dropout" in report.page(results | {"model": {"dropout": 0.2}}, images)


def test_the_keys_of_the_contract(written: tuple[Path, dict[str, Any]]) -> None:
    found = json.loads((written[0] / "evaluation" / "report.json").read_text())
    for section in ("slices", "cubes", "pairs"):
        for estimate in found[section].values():
            assert {"value", "low", "high"} <= set(estimate)
    for name in ("isotropic", "directional"):
        assert {"slices", "cubes"} <= set(found["baselines"][name])
    for name in ("linear", "isotropic", "directional"):
        keys = ("slice_accuracy", "slice_auc", "cube_accuracy", "cube_auc")
        values = [found["ceilings"][name][key]["value"] for key in keys]
        assert all(0.5 <= value <= 1 for value in values)
    assert {"auc", "within_axis"} <= set(found["ceilings"]["directional"]["test"]["slices"])
    assert {"value", "low", "high"} <= set(found["within_axis"])
    for part in ("mean", "large_scales", "small_scales", "axes", "between", "diagonals"):
        assert found["hybrids"][part]["low"] <= found["hybrids"][part]["value"]
    assert {"ratio", "cube_mean_auc"} <= set(found["grid"])
    parts = ("mean", "large_scales", "axes", "between", "diagonals", "remainder")
    assert sum(found["attribution"][part]["value"] for part in parts) == pytest.approx(1)
    assert 0 <= found["significance"]["p_value"] <= 1
    assert all(isinstance(line, str) for line in found["findings"])


def test_predictions_are_written_and_read(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    predictions = predictions_of(seeds=2)
    report.write_predictions(tmp_path / "evaluation" / "predictions.h5", predictions)
    found = report.read_predictions(tmp_path)
    for name in report.COLUMNS:
        np.testing.assert_array_equal(getattr(found, name), getattr(predictions, name))
    with h5py.File(tmp_path / "evaluation" / "predictions.h5") as file:
        assert ((file["gravity"][:] == b"gr") == (file["label"][:] == 1)).all()
        np.testing.assert_array_equal(file["cubes/mean_logit"][:], predictions.cube_logits.ravel())
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["predictions.h5"]


def test_missing_and_damaged_files_are_named(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No such file.*Evaluate the run"):
        report.read(tmp_path)
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    for name, read in (("report.json", report.read), ("predictions.h5", report.read_predictions)):
        path = tmp_path / "evaluation" / name
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(UserError, match="Evaluate the run"):
            read(tmp_path)


@pytest.fixture
def runs(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> dict[str, Path]:
    """Three evaluated trainings of one experiment on the same slices."""
    found = {}
    for number, name in enumerate("abc"):
        shutil.copytree(written[0], tmp_path / name)
        folder = tmp_path / name / "evaluation"
        content = json.loads((folder / "report.json").read_text())
        content["config"] = {"train_params": {"seed": number, "lr": 0.1}, "model_params": {"name": name}}
        (folder / "report.json").write_text(json.dumps(content))
        report.write_predictions(folder / "predictions.h5", predictions_of(seeds=8, draw=number))
        found[name] = tmp_path / name
    return found


def test_runs_are_compared_in_one_table(runs: dict[str, Path], tmp_path: Path) -> None:
    table = comparison.compare(tmp_path / "out", runs)
    assert len(table.splitlines()) == 5
    assert "| train_params.seed=1 | z1.h5, 4 to 9, 1" in table
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"comparison.{suffix}" for suffix in ("md", "json", "csv", "tex", "png", "pdf")
    }
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["a"]["difference"]["value"] == 0
    first, second = (statistics.headline(report.read_predictions(runs[name])) for name in "ab")
    difference = second["auc"]["value"] - first["auc"]["value"]
    assert found["b"]["difference"]["value"] == pytest.approx(difference)
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [(row["run"], row["train_params.seed"]) for row in rows] == [("a", "0"), ("b", "1"), ("c", "2")]
    assert [float(row["auc_low"]) for row in rows] == [found[name]["auc"]["low"] for name in "abc"]
    tex = (tmp_path / "out" / "comparison.tex").read_text().splitlines()
    assert tex[:2] == [r"\begin{tabular}{lllll}", r"\toprule"]
    assert [line.count("&") for line in tex if line.endswith(r"\\")] == [4] * 4
    assert r"train\_params.seed=2" in tex[-3]
    # looking at three runs makes each less significant than by itself
    alone = statistics.summarize(report.read_predictions(runs["b"]))["significance"]["p_value"]
    assert found["b"]["p_value"] >= alone


def test_a_comparison_explains_its_p_values_and_blanks(runs: dict[str, Path], tmp_path: Path) -> None:
    head, _, *rows = comparison.compare(tmp_path / "out", runs).splitlines()
    assert head.endswith("| AUC - first | p against chance, adjusted for the number of runs |")
    assert [row.split("|")[-3].strip() == "" for row in rows] == [True, False, False]
    report.write_predictions(runs["c"] / "evaluation" / "predictions.h5", predictions_of(seeds=5))
    _, _, *rows, empty, note = comparison.compare(tmp_path / "out", runs).splitlines()
    assert [row.split("|")[-3].strip() == "" for row in rows] == [True, False, True]
    assert all(row.split("|")[-2].strip() == "" for row in rows)
    assert empty == ""
    assert "c and a were evaluated on other seeds or axes" in note


def test_an_ensemble_has_the_mean_the_spreads_and_the_mean_logits(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    table = comparison.ensemble(tmp_path / "out", runs)
    members = [report.read_predictions(run) for run in runs.values()]
    found = json.loads((tmp_path / "out" / "ensemble.json").read_text())
    areas = [statistics.headline(member)["auc"]["value"] for member in members]
    assert found["mean"]["auc"]["value"] == pytest.approx(np.mean(areas))
    assert found["mean"]["auc"]["spread_trainings"] == pytest.approx(np.std(areas, ddof=1))
    assert found["mean"]["auc"]["spread_seeds"] > 0
    mean = members[0].with_logits(np.mean([member.logit for member in members], axis=0))
    assert found["ensemble"]["slices"]["auc"]["value"] == statistics.headline(mean)["auc"]["value"]
    assert found["ensemble"]["slices"]["auc"]["value"] > max(areas)  # independent noise averages out
    assert len(table.splitlines()) == 2 + 3 + 4


def change_config(run: Path, section: str, key: str, value: Any) -> None:
    path = run / "evaluation" / "report.json"
    content = json.loads(path.read_text())
    content["config"][section][key] = value
    path.write_text(json.dumps(content))


def test_runs_that_are_no_ensemble_are_rejected(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one run is no ensemble"):
        comparison.ensemble(tmp_path / "out", {"a": runs["a"]})
    change_config(runs["b"], "train_params", "seed", 0)
    with pytest.raises(UserError, match=r"'a': 0, 'b': 0, .* equal train_params\.seed"):
        comparison.ensemble(tmp_path / "out", runs)
    change_config(runs["b"], "train_params", "seed", 1)
    change_config(runs["b"], "train_params", "lr", 0.2)
    with pytest.raises(UserError, match=r"'a': 0\.1, 'b': 0\.2, .* different train_params\.lr"):
        comparison.ensemble(tmp_path / "out", runs)
    report.write_predictions(runs["c"] / "evaluation" / "predictions.h5", predictions_of(seeds=3))
    with pytest.raises(UserError, match="a and c were evaluated on different slices"):
        comparison.ensemble(tmp_path / "out", {name: runs[name] for name in "ac"})
    assert not (tmp_path / "out").exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Images may be wider than a narrow window: they scroll inside their figure, not the page.
PROBE = """<script>addEventListener("load", () => {
  const all = what => [...document.querySelectorAll(what)];
  const shown = [...document.images].filter(p => p.complete && p.naturalWidth > 0);
  const requests = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  const wide = all("figure, .scroll, p, li, dl, nav").filter(
    item => !item.parentElement.closest(".scroll")
      && item.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const broken = all(".interval").filter(
    item => item.offsetHeight > 2 * parseFloat(getComputedStyle(item).fontSize));
  document.title = JSON.stringify({
    shown: shown.length, requests: requests.length, wide: wide.length, broken: broken.length,
    scrolls: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    scale: shown.map(p => p.offsetWidth / parseFloat(p.closest("figure").style.getPropertyValue("--inches")))
  });
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [400, 820, 1000, 1400])
def test_a_browser_shows_the_whole_report(
    width: int, written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The window of a browser is at least 500 pixels wide, so the page is shown in a frame."""
    html = (written[0] / "evaluation" / "report.html").read_text()
    (tmp_path / "page.html").write_text(html.replace("</body>", PROBE + "</body>"))
    frame = f"""<iframe id="f" src="page.html" style="border:0;width:{width}px;height:900px"></iframe><script>
    const f = document.getElementById("f");
    setInterval(() => {{ document.title = f.contentDocument.title }}, 50)</script>"""
    (tmp_path / "frame.html").write_text(f"<title></title>{frame}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += ["--window-size=1600,1000", "--virtual-time-budget=10000"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [str(CHROMIUM), *options, *offline, "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None
    found = json.loads(title[1])
    scale = found.pop("scale")  # pixels per inch of the figures: that of their lettering of 8 points
    assert min(scale) > 0.98 * max(scale)
    assert min(scale) * 8 / 72 > 10
    broken = found.pop("broken")
    assert broken == 0 or width < 800
    assert found == {"shown": len(FIGURES), "requests": 0, "wide": 0, "scrolls": False}
