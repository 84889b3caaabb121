"""Scaling laws against closed forms and against scipy."""

import json

import numpy as np
import pytest
from scipy.stats import linregress

from matrigami.studies import fit_power_law, fit_results, fit_tables, frontier, write_fit
from matrigami.studies._fit import _curve, _log_errors


def record(structure, macs, error, *, seed=0, width=None, status="done", dataset="d"):
    """A run with equal train and twice the test error."""
    return {
        "dataset": dataset,
        "structure": structure,
        "width": width or int(macs),
        "macs": macs,
        "seed": seed,
        "train_error": error,
        "test_error": None if error is None else 2 * error,
        "status": status,
    }


def law(structure, prefactor, exponent, *, sizes=(1e4, 1e5, 1e6), noise=0.0, seeds=(0,), rng=0):
    """Runs on `prefactor * MACs^-exponent`, with noise of the logarithm."""
    generator = np.random.default_rng(rng)
    return [
        record(structure, m, prefactor * m**-exponent * np.exp(noise * generator.normal()), seed=s)
        for m in sizes
        for s in seeds
    ]


def test_a_power_law_is_recovered():
    runs = law("dense", 300.0, 0.2)
    fitted = fit_power_law([r["macs"] for r in runs], [r["train_error"] for r in runs])
    assert fitted.exponent == pytest.approx(0.2, abs=1e-12)
    assert fitted.prefactor == pytest.approx(300.0)
    assert fitted.r_squared == pytest.approx(1.0)
    assert fitted(1e5) == pytest.approx(300.0 * 1e5**-0.2)


def test_standard_error_is_that_of_linear_regression():
    x, y = [1e4, 3e4, 1e5, 1e6, 2e6], [60.0, 50.0, 47.0, 31.0, 30.0]
    fitted, reference = fit_power_law(x, y), linregress(np.log(x), np.log(y))
    assert fitted.exponent == pytest.approx(-reference.slope)
    assert fitted.standard_error == pytest.approx(reference.stderr)
    assert fitted.r_squared == pytest.approx(reference.rvalue**2)
    assert fitted.prefactor == pytest.approx(np.exp(reference.intercept))


def test_what_points_do_not_determine_is_none():
    assert fit_power_law([1e4, 1e5], [2.0, 1.0]).standard_error is None
    single = fit_power_law([1e4, 1e4], [2.0, 1.0])
    assert (single.exponent, single.prefactor, single.r_squared) == (None, None, None)
    assert single(1e5) is None


def test_frontier_is_the_lower_hull():
    runs = [
        record("a", 10, 8.0),
        record("a", 100, 4.0),
        record("a", 1000, 2.0),
        record("b", 100, 5.0),
        record("b", 300, 3.9),
        record("b", 10000, 2.5),
    ]
    groups = {name: [r for r in runs if r["structure"] == name] for name in "ab"}
    logs = _log_errors(groups, "train_error")
    points = frontier({name: _curve(groups[name], logs[name]) for name in groups})
    ends = [points[0], points[-1]]
    assert [(p["structure"], p["macs"], round(p["error"], 6)) for p in ends] == [
        ("a", 10, 8.0),
        ("a", 1000, 2.0),
    ]
    assert all(p["structure"] == "a" for p in points)


def test_errors_at_the_common_compute_are_interpolated():
    runs = law("good", 100.0, 0.2) + law("bad", 150.0, 0.2, sizes=(3e4, 1e5, 3e6))
    fit = fit_results(runs, resamples=50)["datasets"]["d"]
    assert fit["range"] == [3e4, 1e6]
    assert fit["common_macs"] == pytest.approx((3e4 * 1e6) ** 0.5)
    assert fit["extrapolated"] == []
    found = {e["structure"]: e["error"] for e in fit["ranking"]["train_error"]}
    assert found["good"] == pytest.approx(100 * fit["common_macs"] ** -0.2)
    assert found["bad"] == pytest.approx(150 * fit["common_macs"] ** -0.2)
    assert [e["structure"] for e in fit["ranking"]["test_error"]] == ["good", "bad"]


def test_a_structure_outside_the_common_range_is_extrapolated_by_its_law_and_named():
    runs = law("small", 100.0, 0.2, sizes=(1e2, 1e3)) + law("large", 90.0, 0.2, sizes=(1e5, 1e6))
    fit = fit_results(runs, resamples=50)["datasets"]["d"]
    assert not fit["overlap"]
    assert set(fit["extrapolated"]) == {"small", "large"}
    errors = {e["structure"]: e["error"] for e in fit["ranking"]["train_error"]}
    assert errors["small"] == pytest.approx(100 * fit["common_macs"] ** -0.2)


def test_equal_structures_are_a_tie_and_unequal_ones_are_not():
    near = law("a", 100.0, 0.2, noise=0.05, seeds=(0, 1), rng=1)
    same = law("b", 100.0, 0.2, noise=0.05, seeds=(0, 1), rng=2)
    far = law("c", 200.0, 0.2, noise=0.05, seeds=(0, 1), rng=3)
    ranking = fit_results(near + same + far)["datasets"]["d"]["ranking"]["train_error"]
    assert [e["rank"] for e in ranking] == [1, 1, 3]
    assert [e["tie_with_next"] for e in ranking] == [True, False, None]
    assert ranking[2]["structure"] == "c"
    for entry in ranking:
        low, high = entry["interval"]
        assert low < entry["error"] < high


def test_intervals_cover_the_truth_at_about_their_rate():
    covered = 0
    for trial in range(60):
        runs = law("a", 100.0, 0.2, noise=0.04, seeds=(0, 1, 2), rng=trial)
        runs += law("b", 120.0, 0.2, noise=0.04, seeds=(0, 1, 2), rng=1000 + trial)
        fit = fit_results(runs, resamples=300)["datasets"]["d"]
        low, high = next(
            e["interval"] for e in fit["ranking"]["train_error"] if e["structure"] == "a"
        )
        covered += low <= 100 * fit["common_macs"] ** -0.2 <= high
    assert 50 <= covered <= 60


def test_without_repeats_the_distance_from_the_laws_is_the_noise():
    sizes = (1e4, 3e4, 1e5, 3e5)
    runs = law("a", 100.0, 0.2, noise=0.05, sizes=sizes, rng=1)
    exact = fit_results(law("a", 100.0, 0.2, sizes=sizes[:2]))
    fit = fit_results(runs)
    ranking = fit["datasets"]["d"]["ranking"]["train_error"]
    assert ranking[0]["interval"][0] < ranking[0]["interval"][1]
    assert exact["datasets"]["d"]["ranking"]["train_error"][0]["interval"] is None


def test_the_bootstrap_repeats_itself():
    runs = law("a", 100.0, 0.2, noise=0.05, seeds=(0, 1)) + law("b", 90.0, 0.1, seeds=(0, 1))
    assert fit_results(runs) == fit_results(runs)
    assert fit_results(runs) != fit_results(runs, seed=1)


def test_failed_runs_are_left_out_and_an_error_of_zero_is_kept():
    runs = [*law("a", 100.0, 0.2), record("a", 1e7, None, status="failed")]
    runs += [record("a", 1e8, 0.0)]
    fitted = fit_results(runs, resamples=20)["datasets"]["d"]["structures"]["a"]["train_error"]
    assert fitted["points"] == 4
    assert np.isfinite(fitted["exponent"])


def test_an_empty_study_has_an_empty_fit(tmp_path):
    result = fit_results([record("a", 1e4, None, status="crashed")])
    assert result["datasets"] == {}
    assert fit_tables(result) == []
    write_fit(tmp_path / "fit.json", result)
    assert json.loads((tmp_path / "fit.json").read_text())["resamples"] == 2000


def test_tables_call_a_tie_a_tie():
    runs = law("a", 100.0, 0.2, noise=0.05, seeds=(0, 1), rng=1)
    runs += law("b", 100.0, 0.2, noise=0.05, seeds=(0, 1), rng=2)
    title, header, rows = fit_tables(fit_results(runs))[0]
    assert title == "d: train error at 1.00e+05 MACs"
    assert header[:3] == ["rank", "structure", "error %"]
    assert [row[0] for row in rows] == ["1 tie", "1 tie"]
    assert all("±" in row[4] for row in rows)
