"""Running Kronecker factors of the curvature, and their eigenpairs or damped inverses.

Shapes: b = blocks, k = some of them, m = size of a factor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.optim._bases import eigenpairs, items, orthogonal, with_items
from matrigami.optim._method import Options, State
from matrigami.optim._schedule import due

FACTORS = (("B", "P", "beta"), ("A", "Q", "alpha"))
"""Left and right: the factor, its eigenvectors or damped inverse, its eigenvalues."""


def averaged(state: State, decay: float, sides: str = "AB") -> State:
    """`A <- b A + (1 - b) A_now` with `b = min(1 - 1/k, decay)` for the k-th time, and so `B`."""
    if "seen" not in state:
        return {}
    seen = state["seen"].to(state["watched"].device)
    watched = state["watched"] + seen
    weight = (1 / watched).clamp_min(1 - decay)[:, None, None]
    found = {name: state[name].lerp(state[f"{name}_now"], weight) for name in sides}
    if not bool(state["seen"].all()):
        found = {k: torch.where(seen[:, None, None], S, state[k]) for k, S in found.items()}
    return found | {"watched": watched}


def to_refresh(state: State, side: int, options: Options) -> list[int]:
    """The items whose turn it is, and those that are seen for the first time."""
    turn = due(state["offset"][:, side], options["clock"], options["frequency"])
    if not turn and "seen" not in state:
        return []
    before = (state["watched"] > 0).tolist()
    seen = state["seen"].tolist() if "seen" in state else [False] * len(before)
    known = [i for i in turn if before[i]]
    return sorted(known + [i for i, now in enumerate(seen) if now and not before[i]])


def refreshed_factor(
    state: State, names: tuple[str, str, str], where: list[int], options: Options
) -> State:
    """New eigenpairs, or the damped inverse, of some items; what is not sound is not taken."""
    factor, basis, spectrum = names
    values, vectors = eigenpairs(items(state[factor], where))
    values = values.clamp_min(0)
    if options["inverse"]:
        share = options["damping"] ** 0.5 * items(_balance(state, factor), where)[:, None]
        vectors = (vectors / (values + share)[:, None]) @ vectors.mT
    sound = vectors.isfinite().all((-2, -1)) & values.isfinite().all(-1)
    if not options["inverse"]:
        sound &= orthogonal(vectors)
    new = {
        basis: torch.where(sound[:, None, None], vectors, items(state[basis], where)),
        spectrum: torch.where(sound[:, None], values, items(state[spectrum], where)),
        "failures": items(state["failures"], where) + ~sound,
    }
    return {name: with_items(state[name], where, S) for name, S in new.items()}


def _balance(state: State, factor: str) -> Float[Tensor, " b"]:
    """`pi` for `A`, `1 / pi` for `B`: the ratio of the mean eigenvalues, square root."""
    a, b = (state[name].diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30) for name in "AB")
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
