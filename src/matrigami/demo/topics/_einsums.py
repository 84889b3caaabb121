"""The space of all products of two factors, with three coordinates: omega, psi, nu."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(t: float = 0.5) -> dict[str, Any]:
    """Members on a line from dense to two thin factors, all of full rank without sharing."""
    n = 256
    theta = (t, 0, 1 - t, 0, t, 1 - t, 2 * t - 1 if t > 0.5 else 0)  # alpha ... phi, rho
    recipe = mg.Einsum(theta=theta)
    A = recipe.init(n, n)
    omega, psi, nu = recipe.omega, recipe.psi, recipe.nu
    macs, predicted = mg.cost(A).macs, 2 * n ** (1 + nu)  # two factors of n^(1 + nu), or one
    rank = int(torch.linalg.matrix_rank(A.dense()))
    kronecker = mg.Einsum(theta=(0.5, 0.5, 0, 0.5, 0.5, 0, 0))  # every number is used n^omega times
    shared = mg.cost(kronecker.init(n, n))
    sharing = shared.macs / shared.params
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The member, and cost and rank along the line."""
    at, n = [r["t"] for r in runs], found["n"]
    nus = {"nu": (at, [r["nu"] for r in runs]), "psi": (at, [r["psi"] for r in runs])}
    macs = {"": ([r["nu"] for r in runs], [r["macs"] for r in runs])}
    point = (found["nu"], found["macs"])
    return [
        matrix(found["A"].dense(), f"t = {found['t']}", note=f"rank {found['rank']} of {n}"),
        curves(nus, "Coordinates", x="t", y="exponent", mark=(found["t"], found["nu"])),
        curves(macs, "Multiply-adds", x="nu", y="of a product", log="y", mark=point),
    ]


TOPIC = Topic(
    formula="W[(φ ε δ), (γ β α)] = Σ_{ρ} A[γ ρ φ δ α] B[φ ε γ β ρ],   sizes d^{θ}\n"
    "ω: multiply-adds = d^{ω} · numbers,   ψ: rank = d^{ψ},   ν: multiply-adds = d^{1 + ν}\n"
    "Monarch: θ = (½, 0, ½, 0, ½, ½, 0)",
    example=example,
    numbers=(
        Number("macs", "multiply-adds of a product (dense: 65,536)", ",d"),
        Number("nu", "nu, from the exponents", ".2f"),
        Number("psi", "psi", ".2f"),
        Number("omega", "omega", ".2f"),
        Number("rank", "rank, computed", "d"),
        Number("sharing", "uses of each number in a Kronecker product (16 = 256^½)", ".0f"),
    ),
    meaning="At t = {t} the member has nu = {nu:.2f} and psi = {psi:.2f}: {macs:,} multiply-adds "
    "and rank {rank} of 256. omega = {omega:.0f}: every number is used once, which is what the "
    "best structures of the studies have in common. A Kronecker product uses each {sharing:.0f} "
    "times (omega = ½).",
    picture=picture,
    slider=Slider("t", (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875), "Exponent t"),
    exercise="Where on this line is the cost least, and which named structure is it?",
    answer="nu = 1 + rho − min(alpha, eps) = 1 − t up to t = ½, and t beyond: the least is nu = ½ "
    "at t = ½, Monarch, with 2 · 256^1.5 = 8192 multiply-adds.",
    sources=(
        "Potapczynski et al. (2024), Searching for efficient linear layers, arXiv:2410.02117.",
    ),
)
