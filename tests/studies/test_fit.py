"""Scaling laws against closed forms and against scipy."""

import json

import numpy as np
import pytest
from scipy.stats import linregress

from matrigami.studies import fit_power_law, fit_results, fit_tables, frontier, write_fit
from matrigami.studies._fit_rank import curve


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


def test_frontier_is_the_lower_hull():
    runs = [
        record("a", 10, 8.0),
        record("a", 100, 4.0),
        record("a", 1000, 2.0),
        record("b", 100, 5.0),
        record("b", 300, 3.9),
        record("b", 10000, 2.5),
    ]
    points = frontier(
        {n: curve([r for r in runs if r["structure"] == n], "train_error") for n in "ab"}
    )
    ends = [points[0], points[-1]]
    assert [(p["structure"], p["macs"], round(p["error"], 6)) for p in ends] == [
        ("a", 10, 8.0),
        ("a", 1000, 2.0),
    ]
    assert all(p["structure"] == "a" for p in points)


def test_errors_at_the_common_compute_are_interpolated():
    runs = law("good", 100.0, 0.2) + law("bad", 150.0, 0.2, sizes=(3e4, 1e5, 3e6))
    fit = fit_results(runs, resamples=50)["datasets"]["d"]
    compute = fit["compute"]["train_error"]
    assert compute["range"] == pytest.approx([3e4, 1e6])
    assert compute["macs"] == pytest.approx((3e4 * 1e6) ** 0.5)
    assert fit["unranked"]["train_error"] == {}
    found = {e["structure"]: e["error"] for e in fit["ranking"]["train_error"]}
    assert found["good"] == pytest.approx(100 * compute["macs"] ** -0.2)
    assert found["bad"] == pytest.approx(150 * compute["macs"] ** -0.2)
    assert [e["structure"] for e in fit["ranking"]["test_error"]] == ["good", "bad"]


def test_without_a_common_range_nothing_is_ranked_and_the_reason_is_said():
    runs = law("small", 100.0, 0.2, sizes=(1e2, 3e2, 1e3))
    runs += law("large", 90.0, 0.2, sizes=(1e5, 3e5, 1e6))
    result = fit_results(runs, resamples=50)
    fit = result["datasets"]["d"]
    assert fit["compute"]["train_error"] == {
        "macs": None,
        "range": pytest.approx([1e5, 1e3]),
        "overlap": False,
    }
    assert fit["ranking"]["train_error"] == fit["comparisons"]["train_error"] == []
    reason = "no common range of MACs: large begins at 1e+05, small ends at 1e+03"
    assert fit["unranked"]["train_error"] == {"large": reason, "small": reason}
    title, _, rows, notes = fit_tables(result)[0]
    assert title == "d: train error (not ranked)"
    assert [row[0] for row in rows] == ["–", "–"]
    assert f"small is not ranked: {reason}." in notes


def test_intervals_cover_the_truth_at_about_their_rate():
    covered = 0
    for trial in range(60):
        runs = law("a", 100.0, 0.2, noise=0.04, seeds=(0, 1, 2), rng=trial)
        runs += law("b", 120.0, 0.2, noise=0.04, seeds=(0, 1, 2), rng=1000 + trial)
        fit = fit_results(runs, resamples=300)["datasets"]["d"]
        low, high = next(
            e["interval"] for e in fit["ranking"]["train_error"] if e["structure"] == "a"
        )
        covered += low <= 100 * fit["compute"]["train_error"]["macs"] ** -0.2 <= high
    assert 50 <= covered <= 60


def test_without_repeats_the_distance_from_the_laws_is_the_noise():
    sizes = (1e4, 3e4, 1e5, 3e5)
    runs = law("a", 100.0, 0.2, noise=0.05, sizes=sizes, rng=1)
    fit = fit_results(runs)["datasets"]["d"]
    low, high = fit["ranking"]["train_error"][0]["interval"]
    assert low < high
    noise = fit["noise"]["train_error"]
    assert (noise["source"], noise["degrees"], noise["between_seeds"]) == ("laws", 2, None)


def test_the_bootstrap_repeats_itself():
    runs = law("a", 100.0, 0.2, noise=0.05, seeds=(0, 1)) + law("b", 90.0, 0.1, seeds=(0, 1))
    assert fit_results(runs) == fit_results(runs)
    assert fit_results(runs) != fit_results(runs, seed=1)


def test_failed_runs_are_left_out():
    runs = [*law("a", 100.0, 0.2), record("a", 1e7, None, status="failed")]
    fitted = fit_results(runs, resamples=20)["datasets"]["d"]["structures"]["a"]["train_error"]
    assert fitted["points"] == 3


def test_an_empty_study_has_an_empty_fit(tmp_path):
    result = fit_results([record("a", 1e4, None, status="crashed")])
    assert result["datasets"] == {}
    assert fit_tables(result) == []
    write_fit(tmp_path / "fit.json", result)
    assert json.loads((tmp_path / "fit.json").read_text())["resamples"] == 2000
