"""Running Kronecker factors of the curvature, and their eigenpairs or damped inverses.

Shapes: b = blocks, k = some of them, m = size of a factor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.curvature import FactorPair
from matrigami.optim._basis import eigenpairs, orthogonal
from matrigami.optim._method import Options, State


def average(entry: State, pair: FactorPair, decay: float) -> None:
    """`A <- b A + (1 - b) A_now` with `b = min(1 - 1/k, decay)` for the k-th time."""
    entry["watched"] += 1
    k = entry["watched"]
    weight = (1 / k).clamp_min(1 - decay)[:, None, None]
    for name, S in (("A", pair.A), ("B", pair.B)):
        entry[name].copy_(entry[name].lerp(S.to(entry[name].dtype), weight))


def refresh(entry: State, names: tuple[str, str, str], where: list[int], group: Options) -> None:
    """New eigenpairs, or the damped inverse, of some items; what is not sound is not taken."""
    factor, basis, spectrum = names
    S = entry[factor][where]
    values, vectors = eigenpairs(S)
    values = values.clamp_min(0)
    if group["inverse"]:
        share = group["damping"] ** 0.5 * _balance(entry, factor)[where, None]
        vectors = (vectors / (values + share)[:, None]) @ vectors.mT
    sound = vectors.isfinite().all((-2, -1)) & values.isfinite().all(-1)
    if not group["inverse"]:
        sound &= orthogonal(vectors)
    entry["failures"][where] += (~sound).to(entry["failures"].dtype)
    kept = torch.where(sound[:, None, None], vectors, entry[basis][where])
    entry[basis][where] = kept
    entry[spectrum][where] = torch.where(sound[:, None], values, entry[spectrum][where])


def _balance(entry: State, factor: str) -> Float[Tensor, " b"]:
    """`pi` for `A`, `1 / pi` for `B`: the ratio of the mean eigenvalues, square root."""
    a, b = (entry[name].diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30) for name in "AB")
    return (a / b).sqrt() if factor == "A" else (b / a).sqrt()


def natural(groups: list[dict[str, Any]], state: Mapping[Tensor, State]) -> tuple[float, float]:
    """`lr <U, G>` and `lr^2 U' (F + damping) U` of the last step, over all matrices."""
    gain = size = 0.0
    for group in groups:
        lr = float(group["lr"])
        for p in group["params"]:
            entry = state.get(p, {})
            if "norm" in entry:
                gain += lr * float(entry["gain"].sum())
                size += lr * lr * float(entry["norm"].sum())
    return gain, size


def shortened(size: float, groups: list[dict[str, Any]]) -> float:
    """The factor that brings a step to its largest length."""
    clip = groups[0]["kl_clip"]
    return min(1.0, (clip / size) ** 0.5) if size > 0 else 1.0
