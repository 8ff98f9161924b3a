"""The benchmarks run: runners train, each in its own process, and the tables are complete."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

import datasets

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from step_timer import Settings

    datasets.write_synthetic(tmp_path / "tiny.h5", seeds=2, size=64)
    return Settings(
        datafile=str(tmp_path / "tiny.h5"), scratch=str(tmp_path), size=64, seeds=1, warmup=0, seconds=0
    )


@pytest.mark.parametrize("name", ["limit", "disk", "plain"])
def test_a_runner_trains(name: str, settings) -> None:
    import rounds

    overrides = {"data_params.whiten": "isotropic"} if name == "disk" else {}
    numbers = rounds.run_benchmark(name, replace(settings, overrides=overrides))
    assert numbers["steps"] >= 5
    assert numbers["slices_per_second"] > 0


def test_a_runner_that_fails_reports_its_output(settings, tmp_path: Path) -> None:
    import rounds

    (tmp_path / "tiny.h5").unlink()
    with pytest.raises(RuntimeError, match=r"tiny\.h5"):
        rounds.run_benchmark("disk", settings)


def test_tables_hold_medians_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rounds
    import throughput

    rates = {"limit": [1000, 900, 1100], "disk": [950, 100, 960], "plain": [380, 500, 370]}
    work = "RACOON 16, batch 64, fp32"
    inside = {"disk": [0.065, 0.063, 0.06]}
    results = {"machine": rounds.machine("cpu"), "works": {work: rates}, "step_seconds": {work: inside}}
    assert "| gravity-cnn, cache disk | 950 | 67.4 | 63.0 | 0.95 | 2.50 |" in throughput.tables(results)


def test_costs_of_keys_are_ratios_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import data_keys

    halves = {keys: [500.0, 50.0, 400.0] for keys in data_keys.KEYS}
    table = data_keys.table({"LYNX": halves | {"defaults": [1000.0, 100.0, 1200.0]}})
    assert table.splitlines()[-1] == "| LYNX | 1,000 | 2.00 | 2.00 | 2.00 | 2.00 |"


MEASURED = [name for name in ("throughput", "scaling") if (BENCHMARKS / f"{name}.json").exists()]


@pytest.mark.parametrize("program", MEASURED)
def test_the_readme_shows_the_tables_of_the_files(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results = json.loads((BENCHMARKS / f"{program}.json").read_text())
    assert importlib.import_module(program).tables(results) in (BENCHMARKS / "README.md").read_text()
