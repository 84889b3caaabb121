"""Basic linear algebra: the same questions to matrices of every structure."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, bars, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(recipe: str = "monarch(blocks=8)") -> dict[str, Any]:
    """Ask a structured matrix, and the dense one, and compare the answers."""
    A = mg.shift(mg.parse(recipe).init(64, 64), 3.0)  # a random member, plus 3 I
    D, b = A.dense(), torch.randn(64)
    differences = {
        "A @ b": (A @ b - D @ b).abs().max(),
        "solve(A, b)": (mg.solve(A, b) - torch.linalg.solve(D, b)).abs().max(),
        "logdet(A)": (mg.logdet(A) - torch.logdet(D)).abs(),
        "trace(A)": (mg.trace(A) - torch.trace(D)).abs(),
        "diagonal(A)": (mg.diagonal(A) - torch.diagonal(D)).abs().max(),
        "norm(A)": (mg.norm(A) - torch.linalg.norm(D)).abs(),
        "A.T @ A": ((A.T @ A).dense() - D.T @ D).abs().max(),
    }
    worst, macs, kind = max(differences.values()), mg.cost(A).macs, type(A).__name__
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The matrix, what each costs, and the differences."""
    costs = {r["recipe"].split("(")[0]: r["macs"] for r in runs} | {"dense": 64 * 64}
    units = {name: float(d) / 2.0**-52 for name, d in found["differences"].items()}
    return [
        matrix(found["D"], found["recipe"], note=found["kind"]),
        bars(units, "Difference from dense, in units of 2.2e-16", spec=".0f"),
        bars(costs, "Multiply-adds of A @ b", spec=",d"),
    ]


TOPIC = Topic(
    formula="A x,   A^{−1} b,   log det A,   tr A,   diag A,   ‖A‖,   A^{⊤} A,   A^{p}",
    example=example,
    numbers=(
        Number("worst", "largest difference from the dense answer", ".1e"),
        Number("macs", "multiply-adds of A @ b (dense: 4096)", ",d"),
    ),
    meaning="{recipe}: seven questions, and no answer is further than {worst:.0e} from the dense "
    "one. A product takes {macs:,} multiply-adds in place of 4,096. Each structure answers by its "
    "own rule where it has one; none is estimated unasked.",
    picture=picture,
    slider=Slider(
        "recipe",
        (
            "diagonal",
            "block_diagonal(blocks=8)",
            "lowrank(rank=4)",
            "kronecker",
            "monarch(blocks=8)",
            "tt(rank=2)",
            "btt(rank=2)",
            "hodlr(leaf=8, rank=2)",
        ),
        "Structure",
    ),
    exercise="`mg.logdet` of a low-rank matrix plus 3 I: how can it cost no more than a 4 × 4 "
    "determinant?",
    answer="By the determinant lemma: det(c I + U Vᵀ) = cⁿ det(I + Vᵀ U / c), and Vᵀ U is 4 × 4.",
    sources=("Golub and Van Loan (2013), Matrix computations, 4th edition.",),
)
