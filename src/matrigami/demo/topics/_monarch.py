"""Monarch: two block-diagonal factors and a shuffle, which hold the Fourier transform."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(blocks: int = 8) -> dict[str, Any]:
    """Project the Fourier matrix, and a random one, onto Monarch matrices."""
    n = 64
    F = torch.fft.fft(torch.eye(n)) / n**0.5
    order = torch.arange(n).reshape(-1, blocks).T.flatten()  # the shuffle of the fast transform
    A = mg.project(mg.Monarch(blocks=blocks), F[:, order])
    error = (F[:, order] - A.dense()).norm() / F.norm()
    W = torch.randn(n, n)
    random_error = (W - mg.project(mg.Monarch(blocks=blocks), W).dense()).norm() / W.norm()
    macs = mg.cost(A).macs
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The transform in its shuffled order, its Monarch matrix, and the cost."""
    blocks, macs = [r["blocks"] for r in runs], [r["macs"] for r in runs]
    point = (found["blocks"], found["macs"])
    near = f"Monarch, {found['blocks']} blocks"
    return [
        matrix(found["F"][:, found["order"]].real, "Fourier, shuffled", note="real part"),
        matrix(found["A"].dense().real, near, note=f"error {float(found['error']):.1e}"),
        curves({"": (blocks, macs)}, "Cost", x="blocks", y="multiply-adds", log="xy", mark=point),
    ]


TOPIC = Topic(
    formula="M = P L P^{⊤} R,   L and R block diagonal, P a perfect shuffle\n"
    "√n blocks of √n × √n:   2 n^{3/2} numbers and multiply-adds",
    example=example,
    numbers=(
        Number("error", "relative error for the Fourier matrix", ".1e"),
        Number("random_error", "relative error for a random matrix", ".3f"),
        Number("macs", "multiply-adds of a product (dense: 4096)", ",d"),
    ),
    meaning="With its inputs shuffled, the Fourier matrix is a Monarch matrix exactly, for every "
    "number of blocks: the error is {error:.0e}, rounding alone. That is one step of the fast "
    "Fourier transform. A random matrix is not: {random_error:.0%} of its norm is missed. "
    "{blocks} blocks cost {macs:,} multiply-adds in place of 4,096.",
    picture=picture,
    slider=Slider("blocks", (2, 4, 8, 16, 32), "Blocks"),
    exercise="Why is the cost least at 8 blocks for n = 64?",
    answer="With b blocks one factor has n · n/b numbers, the other n · b. Their sum n (n/b + b) "
    "is least where both are equal: b = √n = 8, with 2 n √n = 1024 multiply-adds.",
    sources=(
        "Dao et al. (2022), Monarch: expressive structured matrices, arXiv:2204.00595.",
        "Cooley and Tukey (1965), An algorithm for the machine calculation of Fourier series.",
    ),
)
