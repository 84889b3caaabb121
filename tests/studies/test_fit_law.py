"""The law with an offset against closed forms, scipy and its own error bars."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from matrigami.studies import fit_power_law

X = np.logspace(5, 8, 7)


@pytest.mark.parametrize(
    ("offset", "prefactor", "exponent"),
    [(20.0, 2000.0, 0.3), (0.5, 30.0, 0.1), (5.0, 1e6, 1.2), (60.0, 3e4, 0.5)],
)
def test_a_law_with_an_offset_is_recovered(offset, prefactor, exponent):
    law = fit_power_law(X, offset + prefactor * X**-exponent, resamples=5)
    assert law.exponent == pytest.approx(exponent, rel=1e-6)
    assert law.offset == pytest.approx(offset, rel=1e-6)
    assert law.prefactor == pytest.approx(prefactor, rel=1e-5)
    assert law(3e6) == pytest.approx(offset + prefactor * 3e6**-exponent)
    assert law.parameters == 4
    assert law.gain == pytest.approx(law.other.aicc - law.aicc)
    assert law.gain > 100
    assert law.other.offset == 0
    assert "with an offset (4): the offset by" in law.note
    # the closed form of the local exponent, a (1 - E / error), falls from end to end
    assert law.ends[0] > law.other.exponent > law.ends[1]


def test_a_plain_law_stays_plain():
    law = fit_power_law(X, 300 * X**-0.2, resamples=5)
    assert (law.offset, law.parameters) == (0.0, 3)
    assert law.exponent == pytest.approx(0.2, abs=1e-12)
    # equal residuals leave the penalties: 2 k + 2 k (k + 1) / (n - k - 1) is 28 for 4 and 14 for 3
    assert law.gain == pytest.approx(14 - 28)
    assert law.ends == pytest.approx((0.2, 0.2))


def test_with_noise_the_law_with_an_offset_is_that_of_scipy():
    rng = np.random.default_rng(3)
    y = (20 + 2000 * X**-0.3) * np.exp(0.01 * rng.normal(size=7))
    law = fit_power_law(X, y)
    best, cov = curve_fit(
        lambda x, e, c, a: np.log(e + c * (x / X[3]) ** -a),
        X,
        np.log(y),
        (15.0, 20.0, 0.5),
        bounds=(0, (float(y.min()), 1e3, 5.0)),
        xtol=1e-12,
        ftol=1e-12,
    )
    assert law.offset == pytest.approx(best[0], rel=1e-4)
    assert law.exponent == pytest.approx(best[2], rel=1e-4)
    assert law.standard_error == pytest.approx(cov[2, 2] ** 0.5, rel=1e-3)
    low, high = law.interval
    assert low < law.exponent < high


def test_units_of_errors_and_of_compute_do_not_matter():
    rng = np.random.default_rng(4)
    y = (20 + 2000 * X**-0.3) * np.exp(0.01 * rng.normal(size=7))
    law, loss = fit_power_law(X, y, resamples=5), fit_power_law(1e6 * X, y / 100, resamples=5)
    assert loss.exponent == pytest.approx(law.exponent, rel=1e-6)
    assert loss.offset == pytest.approx(law.offset / 100, rel=1e-5)
    assert loss(1e12) == pytest.approx(law(1e6) / 100)


def test_the_interval_of_an_exponent_covers_at_about_its_rate():
    """A third of the width, as from the normal quantile at 1 degree of freedom, covers 70 %."""
    covered = {"three": 0, "offset": 0}
    for trial in range(60):
        rng = np.random.default_rng(trial)
        x = np.array([1e4, 1e5, 1e6])
        law = fit_power_law(x, 100 * x**-0.2 * np.exp(0.02 * rng.normal(size=3)), resamples=400)
        covered["three"] += law.interval[0] <= 0.2 <= law.interval[1]
    for trial in range(25):
        rng = np.random.default_rng(trial)
        y = (20 + 2000 * X**-0.3) * np.exp(0.003 * rng.normal(size=7))
        law = fit_power_law(X, y, resamples=60)
        covered["offset"] += law.interval[0] <= 0.3 <= law.interval[1]
    assert 50 <= covered["three"] <= 60
    assert 21 <= covered["offset"] <= 25


def test_too_few_runs_for_the_criterion_keep_the_plain_law_and_say_so():
    y = 20 + 2000 * X[:5] ** -0.3
    law = fit_power_law(X[:5], y, resamples=5)
    assert (law.offset, law.gain) == (0.0, None)
    assert law.note.startswith("5 runs at 5 MACs are too few to judge an offset")
    assert law.ends[0] > law.ends[1]
    assert f"{law.ends[0]:.3f} in the lower half" in law.note
    assert law.other.offset == pytest.approx(20, rel=1e-5)
    seeds = fit_power_law(np.repeat(X[:3], 4), np.repeat(y[:3], 4), resamples=5)
    assert (seeds.points, seeds.sizes, seeds.gain, seeds.other) == (12, 3, None, None)


def test_halves_of_three_sizes_are_its_two_slopes():
    law = fit_power_law([1e4, 1e5, 1e6], [40.0, 20.0, 16.0])
    assert law.ends == pytest.approx((np.log10(2), np.log10(1.25)))


def test_zeros_are_left_out_and_counted():
    y = 300 * X**-0.2
    y[[2, 6]] = 0
    law = fit_power_law(X, y, resamples=5)
    assert law.exponent == pytest.approx(0.2, abs=1e-12)
    assert (law.points, law.sizes, law.zeros) == (5, 5, 2)


def test_two_sizes_have_a_slope_and_no_interval():
    law = fit_power_law([1e4, 1e5, 1e6], [40.0, 0.0, 10.0])
    assert law.exponent == pytest.approx(np.log(4) / np.log(100))
    assert (law.standard_error, law.interval, law.zeros, law.sizes) == (None, None, 1, 2)
    assert law.note.startswith("not enough sizes, 2 different MACs")
    seeds = fit_power_law([1e4, 1e4, 1e6, 1e6], [40.0, 41.0, 10.0, 11.0])
    assert (seeds.standard_error, seeds.interval) == (None, None)


@pytest.mark.parametrize(
    ("macs", "errors", "fault"),
    [
        ([], [], "cannot fit 0 errors: not enough sizes, 0 runs"),
        ([1e4], [2.0], "cannot fit 1 error: not enough sizes, 1 run, all of 10000 MACs"),
        ([1e4, 1e4], [2.0, 1.0], "not enough sizes, 2 runs, all of 10000 MACs"),
        ([1e4, 1e5], [2.0, 0.0], "all of 10000 MACs once 1 of 0 is left out"),
        ([1e4, 1e5, 1e6], [0.0, 0.0, 0.0], "0 runs once 3 of 0 are left out"),
        ([1e4, 1e5, 1e6], [5.0, 5.0, 5.0], "all are 5"),
        ([1e4, 1e5, 1e6], [5.0, 4.0], r"their shape is \(2,\), that of the MACs \(3,\)"),
        ([[1e4, 1e5]], [[5.0, 4.0]], r"their shape is \(1, 2\)"),
        ([1e4, 1e5, 1e6], [5.0, np.nan, 3.0], "an error at index 1 is nan"),
        ([1e4, 1e5, np.inf], [5.0, 4.0, 3.0], "MACs at index 2 is inf"),
        ([0.0, 1e5, 1e6], [5.0, 4.0, 3.0], "MACs at index 0 is 0"),
        ([1e4, -1e5, 1e6], [5.0, 4.0, 3.0], "MACs at index 1 is -100000"),
        ([1e4, 1e5, 1e6], [5.0, 4.0, -3.0], "an error at index 2 is -3"),
    ],
)
def test_what_has_no_law_is_refused_in_three_lines(macs, errors, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        fit_power_law(np.array(macs), np.array(errors))
    lines = str(caught.value).splitlines()
    assert len(lines) in (2, 3)
    assert lines[0].startswith("fit_power_law(macs, errors)")
