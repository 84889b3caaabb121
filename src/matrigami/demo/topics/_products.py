"""Products of matrices: Kronecker, Khatri–Rao, face-splitting, Hadamard, outer, sums."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(product: str = "kron") -> dict[str, Any]:
    """All products of two small matrices, and the identities that tie them together."""
    A, B, C, D = torch.randn(4, 6, 6)
    made = {
        "kron": mg.kron(A, B),
        "khatri_rao": mg.khatri_rao(A, B),  # column by column
        "face_split": mg.face_split(A, B),  # row by row
        "hadamard": mg.hadamard(A, B),
        "outer": mg.outer(A[:, 0], B[:, 0]),
        "direct_sum": mg.direct_sum(A, B),
        "kron_sum": mg.kron_sum(A, B),
    }[product]
    mixed = mg.kron(A, B) @ mg.kron(C, D) - mg.kron(A @ C, B @ D)
    rows = mg.face_split(A, B) @ mg.khatri_rao(C, D) - mg.hadamard(A @ C, B @ D)
    exponential = mg.exp(mg.kron_sum(A, B)) - mg.kron(torch.matrix_exp(A), torch.matrix_exp(B))
    worst = max(abs(M.dense()).max() for M in (mixed, rows, exponential))
    height, width, stored = *made.shape, mg.cost(made).params
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """Two matrices and their product."""
    del runs
    size = f"{found['height']} × {found['width']}"
    return [
        matrix(found["A"], "A", note="6 × 6"),
        matrix(found["B"], "B", note="6 × 6"),
        matrix(found["made"].dense(), found["product"], note=size),
    ]


TOPIC = Topic(
    formula="(A ⊗ B)(C ⊗ D) = A C ⊗ B D\n"
    "(A • B)(C ∗ D) = A C ∘ B D   (face-splitting, Khatri–Rao, Hadamard)\n"
    "exp(A ⊗ I + I ⊗ B) = exp A ⊗ exp B",
    example=example,
    numbers=(
        Number("worst", "largest entry by which the three identities miss", ".1e"),
        Number("height", "rows", "d"),
        Number("width", "columns", "d"),
        Number("stored", "numbers stored", ",d"),
    ),
    meaning="{product} of two 6 × 6 matrices is {height} × {width} and stores {stored} numbers. "
    "The three identities hold to {worst:.0e}: they are what makes solving, exponentials and "
    "determinants of such products cheap.",
    picture=picture,
    slider=Slider(
        "product",
        ("kron", "khatri_rao", "face_split", "hadamard", "outer", "direct_sum", "kron_sum"),
        "Product",
    ),
    exercise="Which of these products of two matrices of rank r can have a rank above r² ?",
    answer="None: A ⊗ B has rank exactly r², and Khatri–Rao, face-splitting and Hadamard products "
    "are made of columns or rows (or both) of it. Sums are different: a Kronecker sum is usually "
    "of full rank.",
    sources=(
        "Van Loan (2000), The ubiquitous Kronecker product.",
        "Slyusar (1999), A family of face products of matrices.",
    ),
)
