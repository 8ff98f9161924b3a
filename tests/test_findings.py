"""Findings: three universes whose twins differ in known ways, and the sentences for every case."""

from typing import Any

import pytest
import simulated_universe as universe

from analysis import findings
from analysis.findings import format_estimate, format_number


@pytest.fixture(scope="module", params=["linear", "lattice", "band", "equal"])
def evaluated(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A universe by name and the results of its evaluation."""
    return request.param, universe.evaluate(getattr(universe, request.param)).results


def test_the_first_finding_names_the_driver_of_each_universe(evaluated: tuple[str, dict[str, Any]]) -> None:
    name, results = evaluated
    first = findings.findings(results)[0]
    if name == "linear":
        assert "driven by modes with n <= 4 (large scales)" in first
        assert "radiation and gauge in the initial conditions" in first
    elif name == "lattice":
        assert first.startswith("The lattice drives the classification")
        assert "not physics" in first
    elif name == "band":
        assert "driven by modes with n > 4" in first
        assert "equally in all directions" in first
    else:
        assert first.startswith("The network is not shown to distinguish the gravities")


def test_a_lattice_is_never_reported_as_physics(evaluated: tuple[str, dict[str, Any]]) -> None:
    name, results = evaluated
    text = " ".join(findings.findings(results))
    assert "exceeds every power-spectrum classifier" not in text
    assert not findings.beyond_two_point(results)
    if name == "lattice":
        assert "unlike a lattice effect" not in text
        assert any("depends on direction" in line for line in results["grid"]["warnings"])
    else:
        assert "The lattice drives" not in text
        assert results["grid"]["warnings"] == []


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


DEPENDENCE = {
    "isotropic": estimate(0.006, 0.005, 0.007),
    "contrast": estimate(0.03, 0.029, 0.031),
    "axes": estimate(0.99),
    "diagonals": estimate(1.02),
}


def attribution_of(remainder: float = 0.0, lead: float = 0.5, **drivers: float) -> dict[str, Any]:
    """Shares of the drivers, and an interval of the lead that begins at `lead`."""
    second, first = sorted(drivers.values())[-2:]
    return {
        "drivers": {name: estimate(value) for name, value in drivers.items()},
        "lead": estimate(first - second, lead, 1),
        "remainder": estimate(remainder),
    }


def results_with(**changes: Any) -> dict[str, Any]:
    """Results of a significant network, with some sections replaced."""
    base = universe.DESCRIPTION | {
        "slices": {"auc": estimate(0.6, 0.55, 0.65)},
        "cubes": {"cube_auc": estimate(0.9, 0.8, 0.95), "cube_accuracy": estimate(0.8, 0.7, 0.9)},
        "significance": {"p_value": 0.004, "mcnemar_p_value": 0.01},
        "attribution": attribution_of(mean=0.0, large_scales=0.2, small_scales=0.8),
        "direction_dependence": DEPENDENCE,
        "interventions": {
            "edges": [0, 1, 2],
            "unit": "h/Mpc",
            "shares": [estimate(0.1), estimate(0.9)],
        },
    }
    return base | changes


@pytest.mark.parametrize(
    ("isotropic", "contrast", "expected"),
    [
        (0.006, estimate(0.03, 0.029, 0.031), "The lattice drives the classification: 80 %"),
        (0.06, estimate(0.03, 0.029, 0.031), "depends in part on direction, an effect of the lattice"),
        (0.2, estimate(0.03, 0.029, 0.031), "equally in all directions, unlike a lattice effect"),
        (0.006, estimate(0.03, -0.02, 0.08), "equally in all directions, unlike a lattice effect"),
    ],
)
def test_the_contrast_of_directions_decides_between_lattice_and_gravity(
    isotropic: float, contrast: dict[str, Any], expected: str
) -> None:
    part = DEPENDENCE | {"isotropic": estimate(isotropic), "contrast": contrast}
    results = results_with(direction_dependence=part)
    assert expected in findings.findings(results)[0]


def test_a_factor_on_newtonian_slices_is_not_called_physics_or_lattice() -> None:
    data = universe.DESCRIPTION["data"] | {"newton_augmentation": 0.9}
    first = findings.findings(results_with(data=data))[0]
    assert first.endswith("multiplied by a factor, which changes the power of all modes.")


def test_the_mean_as_driver() -> None:
    results = results_with(attribution=attribution_of(mean=0.6, large_scales=0.1, small_scales=0.3))
    assert findings.findings(results)[0].startswith("The mean of the slices drives the classification: 60 %")


@pytest.mark.parametrize(
    "parts",
    [
        attribution_of(mean=0.0, large_scales=0.45, small_scales=0.55, lead=-0.1),
        attribution_of(mean=0.0, large_scales=0.3, small_scales=0.5, lead=0.1, remainder=0.2),
        attribution_of(mean=0.0, large_scales=0.5, small_scales=0.7, lead=0.1, remainder=-0.2),
    ],
)
def test_no_driver_is_named_unless_its_lead_is_certain(parts: dict[str, Any]) -> None:
    first = findings.findings(results_with(attribution=parts))[0]
    assert first.startswith("No single part of the modes drives the classification")
    assert f"{100 * parts['drivers']['small_scales']['value']:.0f} % from modes with n > 4" in first


def test_without_significance_nothing_is_attributed() -> None:
    results = results_with(significance={"p_value": 0.2, "mcnemar_p_value": 0.5})
    assert "cannot reach" not in findings.findings(results)[0]
    few = results | {"data": results["data"] | {"seeds": [4, 8]}}
    assert findings.findings(few)[0].endswith("4 seeds cannot reach p = 0.05: evaluate more.")
    assert findings.findings(results)[0].startswith("The network is not shown to distinguish the gravities")


def test_quick_reports_say_that_the_driver_is_unknown() -> None:
    results = results_with()
    del results["attribution"]
    assert "unknown without the full report" in findings.findings(results)[0]


GAINS = {
    "above": estimate(0.02, 0.01, 0.04),
    "below": estimate(-0.02, -0.04, -0.01),
    "level": estimate(0, -1, 1),
}


@pytest.mark.parametrize(
    ("isotropic", "directional", "ratio", "beyond"),
    [
        ("above", "above", "above", True),
        ("above", "above", "level", False),
        ("above", "level", "above", False),
        ("below", "below", "below", False),
    ],
)
def test_beyond_two_point_statistics_needs_baseline_and_likelihood_ratio(
    isotropic: str, directional: str, ratio: str, beyond: bool
) -> None:
    def baseline(gain: str) -> dict[str, Any]:
        return {"slices": {"auc": estimate(0.6)}, "gain": {"auc": GAINS[gain]}}

    limit = {"slice_auc": estimate(0.65), "gain": {"auc": GAINS[ratio]}, "attained": 0.5}
    results = results_with(
        baselines={"isotropic": baseline(isotropic), "directional": baseline(directional)},
        ceilings={"directional": limit},
    )
    text = " ".join(findings.findings(results))
    assert ("exceeds every power-spectrum classifier" in text) == beyond
    if isotropic == "above" and not beyond:
        assert "What it has over the isotropic one is direction" in text
    assert "attains 50 %" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (estimate(-0.1, -0.15, -0.05), "it uses information beyond two-point statistics"),
        (estimate(-0.1, -0.25, 0.05), "not shown to be lower on slices with the same power spectra"),
    ],
)
def test_only_random_phases_show_information_beyond_two_point_statistics(
    change: dict[str, Any], expected: str
) -> None:
    baseline = {"slices": {"auc": estimate(0.6)}, "gain": {"auc": GAINS["above"]}}
    results = results_with(baselines={"isotropic": baseline, "directional": baseline})
    assert "--degrade shows whether" in " ".join(findings.findings(results))
    rows = {"none": {"auc": estimate(0.6)}, "random_phases": {"auc": estimate(0.5), "change": change}}
    assert expected in " ".join(findings.findings(results | {"degradation": rows}))


def test_warnings_name_training_seeds_selection_and_the_factor() -> None:
    assert findings.warnings(universe.DESCRIPTION) == []
    selection = {
        "criteria": ["early stopping", "a sweep"],
        "set": "test",
        "seeds": [4, 10],
        "evaluated": True,
    }
    data = universe.DESCRIPTION["data"] | {"seeds": [0, 10], "newton_augmentation": 0.9}
    training, selected, factor = findings.warnings({"data": data, "selection": selection})
    assert "trained on some of these seeds" in training
    assert selected.startswith("Early stopping and a sweep selected this network on seeds 4 to 9")
    assert "multiplied by 0.9" in factor


def test_selection_is_stated_in_every_report() -> None:
    assert findings.findings(results_with())[-1].startswith("Selection: none")
    selection = {"criteria": ["early stopping"], "set": "validation", "seeds": [2, 4], "evaluated": False}
    last = findings.findings(results_with(selection=selection))[-1]
    assert last == "Selection: Early stopping, on validation seeds 2 to 3."


def test_transfer_and_degradation_have_a_sentence() -> None:
    rows = {key: {"auc": estimate(0.55)} for key in ("none", "smoothed", "noisy")}
    results = results_with(transfer={"trained_redshift": 1.0, "redshift": 10.0}, degradation=rows)
    text = " ".join(findings.findings(results))
    assert "trained at z = 1 and transfers to z = 10: slice AUC 0.6000 [0.5500, 0.6500] there" in text
    for doubtful in (
        {"slices": {"auc": estimate(0.52, 0.49, 0.55)}},
        {"significance": {"p_value": 0.2, "mcnemar_p_value": 0.5}},
    ):
        assert "is not shown to transfer to z = 10" in " ".join(findings.findings(results | doubtful))
    assert "AUC 0.5500 with smoothing, 0.5500 with shot noise, against 0.5500 unchanged" in text


def test_numbers_and_estimates() -> None:
    assert [format_number(value) for value in (0, 0.5, 1e-5)] == ["0.0000", "0.5000", "1.00e-05"]
    assert format_estimate(estimate(0.5, 0.4, 0.6)) == "0.5000 [0.4000, 0.6000]"
    assert format_estimate(estimate(0.5), percent=True) == "50.0 %"
    assert format_estimate(estimate(None)) == "undefined"  # type: ignore[arg-type]
