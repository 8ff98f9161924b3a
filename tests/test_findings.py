"""Findings: three universes whose twins differ in known ways, and the sentences for every case."""

from typing import Any

import numpy as np
import pytest
import simulated_universe as universe

from analysis import findings
from analysis.findings import format_estimate, format_number
from analysis.power_spectrum import Box


def sentences(results: dict[str, Any]) -> list[str]:
    return findings.describe(results)[1]


def leading(results: dict[str, Any]) -> str:
    """The verdict and why."""
    return " ".join(sentences(results)[:2])


def text_of(results: dict[str, Any]) -> str:
    return " ".join(sentences(results))


def warnings_of(results: dict[str, Any]) -> list[str]:
    return findings.describe(results)[0]


@pytest.fixture(scope="module", params=["linear", "lattice", "band", "resolution", "everything", "equal"])
def evaluated(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A universe by name and the results of its evaluation."""
    return request.param, universe.evaluate(getattr(universe, request.param)).results


def test_the_first_finding_names_the_driver_of_each_universe(evaluated: tuple[str, dict[str, Any]]) -> None:
    name, results = evaluated
    first = leading(results)
    if name == "linear":
        assert "driven by modes with n <= 4 (large scales)" in first
        assert "radiation and gauge in the initial conditions" in first
    elif name in ("lattice", "everything"):
        assert first.startswith("The lattice, not gravity, drives the classification: the AUC")
        assert "this is an effect of the grid, not physics" in first
    elif name in ("band", "resolution"):
        assert "driven by modes with n > 4" in first
        assert "by the same in all directions" in first
        assert "take it for numerical until it is shown to be the same" in first
        assert ("rises towards the Nyquist wavenumber" in first) == (name == "resolution")
    else:
        assert first.startswith("The network is not shown to distinguish the gravities")


def test_hybrid_twins_tell_where_the_information_lies(evaluated: tuple[str, dict[str, Any]]) -> None:
    name, results = evaluated
    large, small = (results["hybrids"][key]["value"] for key in ("large_scales", "small_scales"))
    ratio = {key: row["test"]["value"] for key, row in results["scales"].items()}
    if name == "linear":
        assert large > small == pytest.approx(0.5, abs=0.01)
        for part in ("", "cube_"):  # this universe has the fourth power of the ratio of linear theory
            spectra = results["power_spectra"]
            measured = [row["value"] for row in spectra[f"{part}ratio"]]
            np.testing.assert_allclose(spectra[f"{part}theory"] ** 4, measured, rtol=0.02)
        assert ratio["large_scales"] == pytest.approx(large, abs=0.05)
    elif name != "equal":
        assert small > large
        assert ratio["small_scales"] == pytest.approx(small, abs=0.05)
        assert f"would be {large:.4f} [" in leading(results)


def test_a_lattice_is_never_reported_as_physics(evaluated: tuple[str, dict[str, Any]]) -> None:
    name, results = evaluated
    text = text_of(results)
    assert "exceeds every power-spectrum classifier" not in text
    assert not findings.beyond_two_point(results)
    warnings = warnings_of(results)
    if name in ("lattice", "everything"):
        assert "by the same in all directions" not in text
        assert any("depends on direction" in line for line in warnings)
    else:
        assert "The lattice, not" not in text
        assert warnings == []


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


DEPENDENCE = {
    "isotropic": estimate(0.006, 0.005, 0.007),
    "contrast": estimate(0.03, 0.029, 0.031),
    "axes": estimate(0.99, 0.989, 0.991),
    "diagonals": estimate(1.02, 1.019, 1.021),
    "width_error": 0.001,
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
        "within_axis": estimate(0.61, 0.56, 0.66),
        "cubes": {"cube_auc": estimate(0.9, 0.8, 0.95), "cube_accuracy": estimate(0.8, 0.7, 0.9)},
        "significance": {"p_value": 0.004, "mcnemar_p_value": 0.01, "relabellings": 64},
        "attribution": attribution_of(mean=0.0, large_scales=0.2, small_scales=0.8),
        "direction_dependence": DEPENDENCE,
        "interventions": {
            "large_scales": 4,
            "edges": [0, 0.5, 5.5, 40],
            "unit": "h/Mpc",
            "shares": [estimate(0.0), estimate(0.1), estimate(0.9)],
        },
    }
    return base | changes


ABOVE = estimate(1.003, 1.002, 1.004)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "The lattice, not gravity, drives the classification. 80 %"),
        ({"axes": ABOVE}, "depends in part on direction, an effect of the lattice"),
        ({"axes": estimate(0.999, 0.997, 1.001)}, "depends in part on direction, an effect of the lattice"),
        ({"isotropic": estimate(0.2)}, "by the same in all directions"),
        ({"contrast": estimate(0.03, -0.02, 0.08)}, "by the same in all directions"),
        ({"width_error": 0.016}, "changes too steeply there to compare directions"),
    ],
)
def test_directions_decide_between_lattice_and_gravity(changes: dict[str, Any], expected: str) -> None:
    results = results_with(direction_dependence=DEPENDENCE | changes)
    assert expected in leading(results)


@pytest.mark.parametrize(
    ("length", "large_scales", "expected"),
    [
        (
            5120.0,
            4,
            "an excess of 7.2 % at n = 1 and 0.6 % at n = 4 in cubes. What is predicted comes from radiation",
        ),
        (20480.0, 16, "modes with n <= 16 (large scales)"),
        (20480.0, 16, "and 0.6 % at n = 16 in cubes"),
        (320.0, 4, "less than 0.5 % there in this box"),
        (None, 4, "Without the size of the box"),
    ],
)
def test_linear_theory_depends_on_the_box(length: float | None, large_scales: int, expected: str) -> None:
    assert Box(64, length, linear_theory=True).large_scales == large_scales
    data = universe.DESCRIPTION["data"] | {"box_size": length}
    parts = attribution_of(mean=0.0, large_scales=0.9, small_scales=0.1)
    results = results_with(attribution=parts, data=data)
    results["interventions"] |= {"large_scales": large_scales}
    assert expected in leading(results)


def test_theory_stands_beside_the_measured_ratio_of_slices() -> None:
    spectra = {"theory": [1.061, 1.03, 1.02, 1.01], "ratio": [estimate(1.059)] * 3 + [estimate(1.012)]}
    parts = attribution_of(mean=0.0, large_scales=0.9, small_scales=0.1)
    first = leading(results_with(attribution=parts, power_spectra=spectra))
    assert (
        "in slices it predicts 6.1 % and 1.0 % in the shells around them, and 5.9 % and 1.2 % are measured."
        in first
    )


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("none", "no difference of 0.1 % or more at n >= 3"), ("unknown", "Nothing is predicted for them")],
)
def test_no_sentence_uses_a_reference_that_does_not_apply(reference: str, expected: str) -> None:
    data = universe.DESCRIPTION["data"] | {"reference": reference}
    for large in (0.9, 0.1):
        parts = attribution_of(mean=0.0, large_scales=large, small_scales=1 - large)
        even = DEPENDENCE | {"contrast": estimate(0.0, -0.001, 0.001)}
        first = leading(results_with(attribution=parts, data=data, direction_dependence=even))
        assert "7.2 %" not in first
        assert (expected in first) == (large == 0.9)
        assert ("take it for numerical" in first) == (large == 0.1)


@pytest.mark.parametrize(
    ("follows", "expected"),
    [
        ("n", "so it is no matter of resolution"),
        ("cell", "moves with the Nyquist wavenumber: it is numerical"),
        ("neither", "It follows neither n nor the cells of a second file: take it for numerical"),
    ],
)
def test_a_second_resolution_decides_about_an_isotropic_excess(follows: str, expected: str) -> None:
    even = DEPENDENCE | {"contrast": estimate(0.0, -0.001, 0.001)}
    results = results_with(direction_dependence=even, convergence={"follows": follows})
    first = leading(results)
    assert expected in first


@pytest.mark.parametrize("attained", [0.543, 0.51])
def test_filtered_cubes_are_stated_first(attained: float) -> None:
    data = universe.DESCRIPTION["data"] | {"max_wavenumber": 4.0}
    limit = {"slice_auc": estimate(0.54), "attained": 0.9, "gain": {"within_axis": GAINS["level"]}}
    limit["test"] = {"slices": {"within_axis": estimate(attained)}}
    first = leading(results_with(data=data, ceilings={"directional": limit}))
    assert first.startswith("The cubes were filtered: they hold modes with n <= 4 only")
    assert f"an AUC within one axis of {attained:.4f}" in first
    assert ("next to no difference" in first) == (attained == 0.51)


def test_the_strongest_band_is_named_if_it_lies_beyond_n_of_4() -> None:
    bands: dict[str, Any] = {"large_scales": 4, "edges": [0, 0.5, 3.5, 5.5, 9.5, 40], "unit": "waves per box"}
    for shares, expected in (
        (
            (0.0, 0.1, 0.3, 0.5, 0.1),
            "comes from modes with n > 4, most of all by k = 5.5 to 9.5 waves per box (50 %).",
        ),
        (
            (0.0, 0.1, 0.5, 0.3, 0.1),
            "80 % of the mean difference between twins comes from modes with n > 4. ",
        ),
    ):
        bands["shares"] = [estimate(share) for share in shares]
        first = leading(results_with(interventions=bands, direction_dependence={}))
        assert expected in first


def test_accuracies_with_the_calibration_are_stated() -> None:
    assert "calibration" not in text_of(results_with())
    calibrated = {"accuracy": estimate(0.58), "cube_accuracy": estimate(0.9)}
    second = text_of(results_with(calibrated=calibrated))
    assert (
        "With the calibration of the validation seeds: accuracy of slices 58.0 %, of cubes 90.0 %." in second
    )


@pytest.mark.parametrize("p_value", [1 / 64, 0.02])
def test_the_smallest_possible_p_value_is_called_that(p_value: float) -> None:
    significance = {"p_value": p_value, "mcnemar_p_value": 0.01, "relabellings": 64}
    second = text_of(results_with(significance=significance))
    assert ("the smallest possible with 6 seeds" in second) == (p_value == 1 / 64)


def test_a_factor_on_newtonian_slices_is_not_called_physics_or_lattice() -> None:
    data = universe.DESCRIPTION["data"] | {"newton_augmentation": 0.9}
    first = leading(results_with(data=data))
    assert first.endswith("multiplied by a factor, which changes the power of all modes.")


def test_the_mean_as_driver() -> None:
    results = results_with(attribution=attribution_of(mean=0.6, large_scales=0.1, small_scales=0.3))
    assert leading(results).startswith("The classification is driven by the mean of the slices. 60 %")


@pytest.mark.parametrize(
    "parts",
    [
        attribution_of(mean=0.0, large_scales=0.45, small_scales=0.55, lead=-0.1),
        attribution_of(mean=0.0, large_scales=0.3, small_scales=0.5, lead=0.1, remainder=0.2),
        attribution_of(mean=0.0, large_scales=0.5, small_scales=0.7, lead=0.1, remainder=-0.2),
    ],
)
def test_no_driver_is_named_unless_its_lead_is_certain(parts: dict[str, Any]) -> None:
    first = leading(results_with(attribution=parts))
    assert first.startswith("No single part of the modes drives the classification")
    assert f"{100 * parts['drivers']['small_scales']['value']:.0f} % from modes with n > 4" in first


def test_without_significance_nothing_is_attributed() -> None:
    results = results_with(significance={"p_value": 0.2, "mcnemar_p_value": 0.5, "relabellings": 64})
    assert "cannot reach" not in leading(results)
    few = results | {"data": results["data"] | {"seeds": [4, 8]}}
    assert leading(few).endswith("p = 0.2000. 4 seeds cannot reach p = 0.05: evaluate more.")
    assert leading(results).startswith("The network is not shown to distinguish the gravities")


def test_quick_reports_say_that_the_driver_is_unknown() -> None:
    results = results_with()
    del results["attribution"]
    assert "unknown without the full report" in leading(results)


GAINS = {
    "above": estimate(0.02, 0.01, 0.04),
    "below": estimate(-0.02, -0.04, -0.01),
    "level": estimate(0, -1, 1),
}


@pytest.mark.parametrize(
    ("isotropic", "directional", "ratio", "beyond"),
    [
        ("above", "above", "above", True),
        ("level", "above", "above", False),
        ("above", "above", "level", False),
        ("above", "level", "above", False),
        ("below", "below", "below", False),
    ],
)
def test_beyond_two_point_statistics_needs_baseline_and_likelihood_ratio(
    isotropic: str, directional: str, ratio: str, beyond: bool
) -> None:
    def baseline(gain: str) -> dict[str, Any]:
        return {"slices": {"within_axis": estimate(0.6)}, "gain": {"within_axis": GAINS[gain]}}

    limit = {"slice_auc": estimate(0.65), "gain": {"within_axis": GAINS[ratio]}, "attained": 0.5}
    limit["test"] = {"slices": {"within_axis": estimate(0.64)}}
    results = results_with(
        baselines={"isotropic": baseline(isotropic), "directional": baseline(directional)},
        ceilings={"directional": limit},
    )
    text = text_of(results)
    assert ("exceeds every power-spectrum classifier" in text) == beyond
    assert ("two-point statistics is not shown" in text) != beyond
    assert "attains 50 %" in text
    lynx = results | {"model": {"architecture": "LYNX", "layer_param": 2}}
    assert "no more than two-point statistics" in text_of(lynx)
    assert "exceeds every" not in text_of(lynx)
    moved = results | {"transfer": {"trained_redshift": 1.0, "redshift": 10.0}}
    text = text_of(moved)
    assert "With the spectra at z = 1 the likelihood ratio" in text
    assert "attains" not in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (estimate(-0.1, -0.15, -0.05), "information beyond two-point statistics is indicated"),
        (estimate(-0.1, -0.25, 0.05), "not shown to be lower on slices with the same power spectra"),
    ],
)
def test_only_random_phases_show_information_beyond_two_point_statistics(
    change: dict[str, Any], expected: str
) -> None:
    baseline = {"slices": {"within_axis": estimate(0.6)}, "gain": {"within_axis": GAINS["above"]}}
    results = results_with(baselines={"isotropic": baseline, "directional": baseline})
    assert "--degrade shows whether" in text_of(results)
    rows = {"none": {"auc": estimate(0.6)}, "random_phases": {"auc": estimate(0.5), "change": change}}
    assert expected in " ".join(sentences(results | {"degradation": rows}))


def test_warnings_name_training_seeds_selection_and_the_factor() -> None:
    assert warnings_of(results_with()) == []
    selection = universe.DESCRIPTION["selection"] | {
        "criteria": ["early stopping", "a sweep"],
        "evaluated": True,
    }
    data = universe.DESCRIPTION["data"] | {"seeds": [0, 10], "newton_augmentation": 0.9}
    training, selected, factor = warnings_of(results_with(data=data, selection=selection))
    assert "trained on some of these seeds" in training
    assert selected == (
        "Early stopping and a sweep selected this network on seeds 4 to 9, some of which are evaluated here: "
        "the results are biased upwards. Evaluate on other seeds (--seeds A:B), or train with "
        "data_params.validation_seeds."
    )
    assert "multiplied by 0.9" in factor
    selection |= {"by_hand": ["a sweep"], "validation_seeds": 2}
    (selected,) = warnings_of(results_with(selection=selection))
    assert "with the results on seeds 4 to 9 known, which are evaluated here: the results may be" in selected
    assert selected.endswith("Evaluate on other seeds (--seeds A:B).")


def test_selection_is_stated_in_every_report() -> None:
    assert sentences(results_with())[-1].startswith("Selection: none")
    selection = universe.DESCRIPTION["selection"] | {"set": "validation", "seeds": [2, 4]}

    def last(**changes: Any) -> str:
        return sentences(results_with(selection=selection | changes))[-1]

    assert last(criteria=["early stopping"]) == "Selection: Early stopping, on validation seeds 2 to 3."
    assert "has not reached its last epoch" in last(finished=False)
    hand = ["a choice by hand"]
    assert last(criteria=hand, by_hand=hand, finished=False) == (
        "Selection: A choice by hand, with the results on validation seeds 2 to 3 known."
    )


def test_transfer_and_degradation_have_a_sentence() -> None:
    rows = {key: {"auc": estimate(0.55)} for key in ("none", "smoothed", "noisy")}
    results = results_with(transfer={"trained_redshift": 1.0, "redshift": 10.0}, degradation=rows)
    text = text_of(results)
    assert "trained at z = 1 and still distinguishes the gravities at z = 10: slice AUC 0.6000 [0.55" in text
    for doubtful in (
        {"slices": {"auc": estimate(0.52, 0.49, 0.55)}},
        {"significance": {"p_value": 0.2, "mcnemar_p_value": 0.5, "relabellings": 64}},
    ):
        assert "is not shown to distinguish the gravities at z = 10" in " ".join(
            sentences(results | doubtful)
        )
    assert "AUC 0.5500 with smoothing, 0.5500 with white noise, against 0.5500 unchanged" in text


def test_numbers_and_estimates() -> None:
    assert [format_number(value) for value in (0, 0.5, 1e-5)] == ["0.0000", "0.5000", "1.00e-05"]
    assert format_estimate(estimate(0.5, 0.4, 0.6)) == "0.5000 [0.4000, 0.6000]"
    assert format_estimate(estimate(0.5), percent=True) == "50.0 %"
    assert format_estimate(estimate(0.591, 0.575, 0.607), percent=True) == "59.1 % [57.5, 60.7]"
    assert format_estimate(estimate(None)) == "undefined"  # type: ignore[arg-type]


def test_several_fields_are_named() -> None:
    data = universe.DESCRIPTION["data"] | {"fields": ["phi, z = 10", "phi, z = 1"]}
    parts = {name: {"grid": {"warnings": ["a warning"]}} for name in data["fields"]}
    results = results_with(data=data, fields=parts, grid={"warnings": ["a warning"]})
    assert warnings_of(results) == ["phi, z = 10: a warning", "phi, z = 1: a warning"]
    assert "(P_GR/P_N of phi, z = 10 0.9900 along the grid axes" in text_of(results)
