"""Kronecker: the nearest product of two small matrices, and questions answered by the factors."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, bars, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(m: int = 8) -> dict[str, Any]:
    """A covariance of an 8 x 8 grid, and the nearest Kronecker product of two sizes."""
    x, y = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    x, y = x.flatten(), y.flatten()
    W = torch.exp(-0.5 * abs(x[:, None] - x) - 0.2 * abs(y[:, None] - y))  # separable
    k = 64 // m
    A = mg.project(mg.Kronecker(factors=((m, m), (k, k))), W)
    error = (W - A.dense()).norm() / W.norm()
    params = mg.cost(A).params
    logdet, dense_logdet = mg.logdet(A), torch.logdet(A.dense())  # from the factors, and by LU
    difference = abs(logdet - dense_logdet)
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The covariance, the product, and the errors of all splits."""
    errors = {f"{r['m']} × {64 // r['m']}": float(r["error"]) for r in runs}
    m, k = found["m"], found["k"]
    return [
        matrix(found["W"], "Covariance of a grid", note="64 × 64", signed=False),
        matrix(found["A"].dense(), f"{m} × {m}  ⊗  {k} × {k}", signed=False, limit=1.0),
        bars(errors, "Relative error of each split", spec=".2g"),
    ]


TOPIC = Topic(
    formula="A ⊗ B = [a_{ij} B],   (A ⊗ B) vec X = vec(A X B^{⊤})\n"
    "(A ⊗ B)^{−1} = A^{−1} ⊗ B^{−1},   log det(A ⊗ B) = n log det A + m log det B",
    example=example,
    numbers=(
        Number("error", "relative error of the nearest Kronecker product", ".1e"),
        Number("params", "numbers stored (dense: 4096)", ",d"),
        Number("difference", "difference of the log-determinant from that of the dense one", ".1e"),
    ),
    meaning="Factors of {m} × {m} and {k} × {k} store {params} numbers and miss {error:.0e} of the "
    "norm. At 8 × 8 the covariance is a product exactly, since distances along the two axes "
    "multiply; the other splits cut a row of the grid and miss. The determinant comes from the "
    "factors alone.",
    picture=picture,
    slider=Slider("m", (2, 4, 8, 16, 32), "Size of the first factor"),
    exercise="Would exp(−√(dx² + dy²)), the covariance of the plain distance, be a Kronecker "
    "product?",
    answer="No: it does not factor into a function of dx times one of dy. Its rearrangement has "
    "full rank, and a sum of several products is needed. exp(−dx² − dy²) is one again.",
    sources=("Van Loan and Pitsianis (1993), Approximation with Kronecker products.",),
)
