"""The law of one structure: plain or with an offset, whichever its points support.

`error = c * MACs^-a` as in Qiu et al. (2024), arXiv:2406.06248; `error = E + c * MACs^-a` as in
Hoffmann et al. (2022), arXiv:2203.15556, section 3.3, where `E` is what no compute removes. Both
by least squares of the log error. Choice by the corrected criterion of Akaike: Hurvich and Tsai
(1989), Biometrika 76(2). Intervals by resampling residuals: Efron and Tibshirani (1993), chapter 9.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

SIZES = 3
"""Fewer different MACs give a slope at most: neither an interval nor a rank."""

STEEPEST = 20.0
"""Bound of the exponent beside an offset: a step, for every practical purpose."""


@dataclass(frozen=True)
class PowerLaw:
    """`error = offset + prefactor * MACs ** -exponent`, and how well the points know it.

    Attributes:
        exponent: How fast the error falls.
        standard_error: Of the exponent; None with 2 sizes, which any two numbers go through.
        interval: 95 % interval of the exponent, by bootstrap; None with 2 sizes and in `other`.
        prefactor: In units of the error.
        offset: What no compute removes, in units of the error; 0 in the plain law.
        r_squared: Of the log error.
        points: Runs that the law goes through.
        sizes: Different MACs among them.
        zeros: Runs left out because their error is 0.
        parameters: Numbers estimated: prefactor, exponent, noise, and the offset if there is one.
        aicc: Corrected Akaike criterion, lower is better; None where the runs are too few for it.
        gain: AICc of the plain law less that of the law with an offset; None if not comparable.
        ends: Slopes in log-log coordinates, as exponents, of the lower and the upper half of the
            sizes: they differ if the points bend.
        note: How the law was chosen, in a sentence.
        other: The law that was not chosen; None if the sizes are too few for an offset.
    """

    exponent: float
    standard_error: float | None
    interval: tuple[float, float] | None
    prefactor: float
    offset: float
    r_squared: float
    points: int
    sizes: int
    zeros: int
    parameters: int
    aicc: float | None
    gain: float | None
    ends: tuple[float, float]
    note: str
    other: "PowerLaw | None" = None

    def __call__(self, macs: float) -> float:
        """The error at a cost."""
        return self.offset + self.prefactor * macs**-self.exponent


class Line(NamedTuple):
    """A fit in centred logarithms: `log(offset + exp(level - exponent * u))`."""

    level: float
    exponent: float
    offset: float
    residuals: np.ndarray
    error: float | None
    parameters: int


def fit_power_law(
    macs: Sequence[float] | np.ndarray,
    errors: Sequence[float] | np.ndarray,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> PowerLaw:
    """The better of `c * MACs^-a` and `E + c * MACs^-a`, with `a, c > 0` and `0 <= E < min(error)`.

    Least squares of the log error, so that a percent more counts alike at every size; the offset is
    taken if the corrected Akaike criterion (Hurvich and Tsai, 1989) with `k` estimated numbers is
    lower: `AICc = n log(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1)`. With `n <= k + 1` runs or
    fewer than 4 different MACs it cannot be judged, and the plain law stays.

    Args:
        macs: Multiply-adds of each run, positive; equal ones are seeds of one size.
        errors: Error of each run in percent, or a loss: any unit that starts at 0. Errors of 0 have
            no logarithm; they are left out and counted.
        resamples: Bootstrap samples for the interval; 200 fix its ends to a tenth of its length.
        seed: Seed of the bootstrap.

    Returns:
        The law chosen, and the other one in `other`. From 2 different MACs it is a slope without an
        interval, and its note says so.

    Raises:
        ValueError: If lengths differ; if a number is not finite, MACs are not positive or an error
            is negative; if fewer than 2 different MACs have a positive error; if all errors are
            equal.

    Examples:
        >>> law = fit_power_law([1e4, 1e5, 1e6], [40.0, 20.0, 10.0])
        >>> round(law.exponent, 4), round(law(1e5), 4), law.offset
        (0.301, 20.0, 0.0)
        >>> x = [10.0**k for k in range(3, 10)]
        >>> law = fit_power_law(x, [20 + 2000 * m**-0.5 for m in x])
        >>> round(law.exponent, 3), round(law.offset, 2), round(law.other.exponent, 2)
        (0.5, 20.0, 0.09)
    """
    x, y = np.asarray(macs, float), np.asarray(errors, float)
    fault = _malformed(x, y) or law_fault(x, y)
    if fault:
        raise ValueError(
            f"fit_power_law(macs, errors) cannot fit {_count(np.size(y), 'error')}: {fault[0]}.\n"
            f"{fault[1]}.\n{fault[2]}."
        )
    used = y > 0
    return _chosen(x[used], y[used], int((~used).sum()), resamples, seed)


def law_fault(x: np.ndarray, y: np.ndarray) -> tuple[str, str, str] | None:
    """Why no law goes through these points: the fault, what is needed, what to do."""
    used = y > 0
    zeros = int((~used).sum())
    without = f" once {zeros} of 0 {'is' if zeros == 1 else 'are'} left out" if zeros else ""
    sizes = len(np.unique(x[used]))
    if sizes < 2:
        alike = f", all of {x[used][0]:g} MACs" if sizes else ""
        return (
            f"not enough sizes, {_count(int(used.sum()), 'run')}{alike}{without}",
            f"A slope needs 2 different MACs with a positive error, an interval {SIZES}",
            "Train more widths",
        )
    if np.ptp(y[used]) == 0:
        return (
            f"all are {y[used][0]:g}{without}",
            "Errors that do not depend on MACs have no exponent",
            "See whether training has begun to learn, or has nothing left to learn",
        )
    return None


def _malformed(x: np.ndarray, y: np.ndarray) -> tuple[str, str, str] | None:
    """What is no list of runs: the fault, what is needed, what to do."""
    if x.ndim != 1 or x.shape != y.shape:
        return (
            f"their shape is {y.shape}, that of the MACs {x.shape}",
            "Each run has one number of MACs and one error",
            "Give two sequences of equal length",
        )
    checks = (
        (~np.isfinite(x), "MACs", x, "Each must be a finite number"),
        (~np.isfinite(y), "an error", y, "Each must be a finite number"),
        (x <= 0, "MACs", x, "They must be positive"),
        (y < 0, "an error", y, "It must not be negative"),
    )
    for bad, what, values, rule in checks:
        if bad.any():
            i = int(bad.argmax())
            return f"{what} at index {i} is {values[i]:g}", rule, "Leave this run out, or mend it"
    return None


def _chosen(x: np.ndarray, y: np.ndarray, zeros: int, resamples: int, seed: int) -> PowerLaw:
    """Fit both, take the better, and give it its interval."""
    u, v = np.log(x) - np.log(x).mean(), np.log(y)
    sizes = np.unique(u)
    plain = _plain(u, v)
    bent = _with_offset(u, v) if len(sizes) > SIZES else None
    first = _aicc(plain)
    second = _aicc(bent) if bent else None
    gain = None if first is None or second is None else first - second
    best, rest = (bent, plain) if bent and gain is not None and gain > 0 else (plain, bent)
    ends = (
        _slope(u, v, u <= sizes[len(sizes) // 2]),
        _slope(u, v, u >= sizes[(len(sizes) - 1) // 2]),
    )
    shift = float(np.log(x).mean())

    def law(line: Line) -> PowerLaw:
        total = float(np.sum((v - v.mean()) ** 2))
        return PowerLaw(
            exponent=line.exponent,
            standard_error=line.error,
            interval=None,
            prefactor=float(np.exp(line.level + line.exponent * shift)),
            offset=line.offset,
            r_squared=1 - float(line.residuals @ line.residuals) / total,
            points=len(x),
            sizes=len(sizes),
            zeros=zeros,
            parameters=line.parameters,
            aicc=_aicc(line),
            gain=gain,
            ends=ends,
            note=_note(first, second, len(x), len(sizes), ends),
        )

    interval = _interval(best, u, resamples, seed) if len(sizes) >= SIZES else None
    return replace(law(best), interval=interval, other=law(rest) if rest else None)


def _plain(u: np.ndarray, v: np.ndarray) -> Line:
    """Linear regression of the log errors `v` on the centred log MACs `u`."""
    slope = float(u @ v / (u @ u))
    residuals = v - v.mean() - slope * u
    known = len(np.unique(u)) >= SIZES
    error = float(np.sqrt(residuals @ residuals / (len(u) - 2) / (u @ u))) if known else None
    return Line(float(v.mean()), -slope, 0.0, residuals, error, 3)


def _with_offset(u: np.ndarray, v: np.ndarray, start: Line | None = None) -> Line:
    """Least squares from the best of a grid of offsets; for a given offset the rest is linear."""
    low = float(v.min())
    w = v - low  # in units of the smallest error: the offset is a share of it
    if start:
        starts = [(start.level - low, np.log(start.exponent), start.offset / np.exp(low))]
    else:
        starts = [_start(u, w, share) for share in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97)]
        starts = sorted(starts, key=lambda p: float(np.sum(_residual(np.array(p), u, w) ** 2)))[:3]
    # an end of an interval needs fewer digits than a law
    fits = [_descend(u, w, np.array(p), 1e-6 if start else 1e-12) for p in starts]
    level, rate, share = min(fits, key=lambda p: float(np.sum(_residual(p, u, w) ** 2)))
    p = np.array([level, rate, share])
    residuals = -_residual(p, u, w)
    J, exponent = _jacobian(p, u, w), float(np.exp(rate))
    spread = residuals @ residuals / max(len(u) - 3, 1)
    error = exponent * float(np.sqrt(spread * np.linalg.pinv(J.T @ J)[1, 1]))
    return Line(float(level + low), exponent, float(share * np.exp(low)), residuals, error, 4)


def _start(u: np.ndarray, w: np.ndarray, share: float) -> tuple[float, float, float]:
    """The plain law of what is above an offset."""
    above = np.log(np.exp(w) - share)
    slope = float(u @ above / (u @ u))
    return float(above.mean()), float(np.log(np.clip(-slope, 0.02, STEEPEST / 2))), share


def _descend(
    u: np.ndarray, w: np.ndarray, start: np.ndarray, tolerance: float = 1e-12
) -> np.ndarray:
    """Level, log exponent and share of the offset with the least squares near a start."""
    from scipy.optimize import least_squares  # noqa: PLC0415 - heavy, and the command line is not

    low = np.array([-np.inf, np.log(1e-3), 0.0])
    high = np.array([np.inf, np.log(STEEPEST), 1 - 1e-6])
    inside = np.clip(start, low + 1e-9, high - 1e-9)
    found = least_squares(
        _residual,
        inside,
        _jacobian,  # pyright: ignore[reportArgumentType] - scipy takes functions, its stubs do not
        (low, high),
        args=(u, w),
        ftol=tolerance,
        xtol=tolerance,
        gtol=tolerance,
        max_nfev=200,
    )
    return found.x


def _residual(p: np.ndarray, u: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Log of the law less log error; `logaddexp` holds at exponents where `exp` overflows."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log(p[2]), p[0] - np.exp(p[1]) * u) - w


def _jacobian(p: np.ndarray, u: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Derivatives of `_residual` by level, log exponent and share."""
    value = _residual(p, u, w) + w
    part = np.exp(p[0] - np.exp(p[1]) * u - value)
    return np.stack([part, -np.exp(p[1]) * u * part, np.exp(-value)], 1)


def _aicc(line: Line) -> float | None:
    """Corrected Akaike criterion; residuals below 1e-10 are rounding, and as good as any."""
    n, k = len(line.residuals), line.parameters
    if n <= k + 1:
        return None
    mean_square = max(float(line.residuals @ line.residuals) / n, 1e-20)
    return float(n * np.log(mean_square) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def widening(degrees: int) -> float:
    """Student's 97.5 % quantile over the normal one: what few residuals hide of their spread."""
    from scipy.special import ndtri, stdtrit  # noqa: PLC0415 - heavy, and the command line is not

    return float(stdtrit(degrees, 0.975) / ndtri(0.975))


def _interval(line: Line, u: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentiles of the exponent over resampled residuals, inflated for what was fitted."""
    n, fitted = len(u), line.parameters - 1
    pool = (line.residuals - line.residuals.mean()) * np.sqrt(n / (n - fitted))
    pool = pool * widening(n - fitted)
    noise = np.random.default_rng(seed).choice(pool, (resamples, n))
    if fitted == 2:
        draws = line.exponent - noise @ u / (u @ u)
    else:
        curve = np.logaddexp(np.log(line.offset), line.level - line.exponent * u)
        draws = np.array([_with_offset(u, curve + e, line).exponent for e in noise])
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _slope(u: np.ndarray, v: np.ndarray, part: np.ndarray) -> float:
    """The exponent of some of the points."""
    a, b = u[part] - u[part].mean(), v[part]
    return -float(a @ b / (a @ a))


def _note(
    plain: float | None, bent: float | None, runs: int, sizes: int, ends: tuple[float, float]
) -> str:
    """How the law was chosen."""
    if sizes < SIZES:
        return f"not enough sizes, {sizes} different MACs: a slope without an interval, and no rank"
    if plain is None or bent is None:
        return (
            f"{runs} runs at {sizes} MACs are too few to judge an offset (6 runs at 4 are the "
            f"least), so the plain law; exponent {ends[0]:.3f} in the lower half of the sizes, "
            f"{ends[1]:.3f} in the upper"
        )
    better = "the offset" if plain > bent else "the plain law"
    return (
        f"AICc {plain:.1f} plain (3 parameters), {bent:.1f} with an offset (4): {better} by "
        f"{abs(plain - bent):.1f}; exponent {ends[0]:.3f} in the lower half of the sizes, "
        f"{ends[1]:.3f} in the upper"
    )


def _count(number: int, what: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {what}{'' if number == 1 else 's'}"
