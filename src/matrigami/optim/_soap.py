"""SOAP: Adam in the eigenbasis of Shampoo's second moments.

With `L <- b L + (1 - b) G G'`, `R <- b R + (1 - b) G' G`, their eigenvectors `P`, `Q` and the
gradient in that basis, `H = P' G Q`: `M <- b1 M + (1 - b1) H`, `V <- b2 V + (1 - b2) H^2`, and the
update is `P (M / (sqrt(V) + eps)) Q'`. State: `L, R, P, Q, M, V`.

`M` stays in the basis and is rotated only when that changes, so a step is three two-sided products;
the reference rotates it back and forth every time and needs five. A refresh is one step of
orthogonal iteration, for each side at its own turn of the cycle, so that no step is much slower
than another. Source: Vyas et al. (2024), arXiv:2409.11321.

Shapes: b = blocks, m = rows, n = columns.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import averaged_gram, mirrored
from matrigami.optim._adam import over
from matrigami.optim._bases import (
    eigenbasis,
    items,
    refreshed,
    row_major,
    sorted_rows,
    two_sided,
    with_items,
)
from matrigami.optim._method import Options, State
from matrigami.optim._optimizer import MatrixOptimizer, Source
from matrigami.optim._schedule import due


class SOAP(MatrixOptimizer):
    """Adam in a slowly turning basis in which the gradient's entries are nearly uncorrelated.

    Args:
        source: A model, a `Plan`, parameters, named parameters or groups.
        lr: Learning rate; a number or a tensor. Start at 1e-2, and try a third and three times it.
        betas: Decay of the momentum and of the second moments; that of `L` and `R` is the second.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled: `p <- p (1 - lr weight_decay)`.
        maximize: Go up instead of down.
        frequency: Steps between two refreshes of a basis.
        statistics_every: Steps between two updates of `L` and `R`, which are a third of the work.
        max_dim: A side larger than this keeps its coordinates.
        one_sided: Turn the smaller side of each matrix only: half of the work.
        stagger: Give each basis its own turn within the cycle; else all are refreshed at once.
        rotate_second_moment: At a refresh turn `V` by the squares of the rotation, too. By default
            it is only sorted, as in the reference.
        adam_betas: Decay of the moments of parameters that are not matrices.
        adam_eps: Added to the square root of their second moment.

    Defaults are those of the authors' code.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = SOAP(model, lr=0.1, weight_decay=0.0)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> before = model.weight.detach().clone()
        >>> optimizer.step()  # one gradient, of rank one: a step along its singular vectors
        >>> torch.linalg.matrix_norm(before - model.weight.detach(), 2)
        tensor(0.1000)
    """

    def __init__(
        self,
        source: Source,
        lr: float | Tensor = 1e-2,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        maximize: bool = False,
        frequency: int = 10,
        statistics_every: int = 1,
        max_dim: int = 10_000,
        one_sided: bool = False,
        stagger: bool = True,
        rotate_second_moment: bool = False,
        adam_betas: tuple[float, float] = (0.95, 0.95),
        adam_eps: float = 1e-8,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        options |= {"weight_decay": weight_decay, "frequency": frequency, "stagger": stagger}
        options |= {"statistics_every": statistics_every, "max_dim": max_dim}
        options |= {"one_sided": one_sided, "rotate_second_moment": rotate_second_moment}
        options |= {"adam_betas": adam_betas, "adam_eps": adam_eps, "maximize": maximize}
        super().__init__(source, options)

    @staticmethod
    def starting_rate() -> float:
        """As measured in `docs/results/optimizers`."""
        return 0.01

    @staticmethod
    def init(G: Float[Tensor, "b m n"], options: Options) -> State:
        """The basis of the first gradient; no moments yet."""
        left, right = sides(G.shape[-2], G.shape[-1], options)
        state = {"M": torch.zeros_like(G), "V": torch.zeros_like(G)}
        state["failures"] = torch.zeros(len(G), dtype=torch.int64, device=G.device)
        if left:
            S = G @ G.mT
            state |= {"L": torch.zeros_like(S), "P": eigenbasis(S)}
        if right:
            S = G.mT @ G
            state |= {"R": torch.zeros_like(S), "Q": eigenbasis(S)}
        return state

    @staticmethod
    def direction(
        G: Float[Tensor, "b m n"], state: State, options: Options
    ) -> tuple[Float[Tensor, "b m n"], State]:
        """Adam in the basis, then the statistics, then the bases whose turn it is."""
        P, Q = state.get("P"), state.get("Q")
        H = two_sided(None if P is None else P.mT, G, Q)
        H = _without_noise(H, state["step"])
        N, moments = _adam(H, state, options)
        U = two_sided(P, N, None if Q is None else Q.mT)
        after = state | moments | _statistics(G, state, options)
        for side, names in ((0, ("L", "P")), (-1, ("R", "Q"))):
            if names[0] in state:
                where = due(state["offset"][:, side], options["clock"], options["frequency"])
                turned = _turned if side == 0 else _turned_columns
                after |= turned(after, names, where, options) if where else {}
        return U, {k: S for k, S in after.items() if S is not state[k]}

    @staticmethod
    def is_equivariant(options: Options) -> bool:
        """Unless one side keeps its coordinates."""
        return not options["one_sided"]

    @staticmethod
    def norm(m: float, n: float, options: Options) -> float:  # noqa: ARG004
        """In their basis the entries of an update are of one size and nearly uncorrelated."""
        return max(m, n) ** 0.5

    @staticmethod
    def flops(m: int, n: int, options: Options) -> float:
        """Projection, its reverse and half of the statistics, and the refreshes."""
        left, right = sides(m, n, options)
        work = 2.0 * m * n * (left * m + right * n) * (2 + 0.5 / options["statistics_every"])
        return work + sum(SOAP.refresh_costs(m, n, options)) / options["frequency"]

    @staticmethod
    def refresh_costs(m: int, n: int, options: Options) -> tuple[float, ...]:
        """`L P`, its QR, and the turn of `M`, for each side."""
        sizes = [(m, n)] * sides(m, n, options)[0] + [(n, m)] * sides(m, n, options)[1]
        return tuple(2.0 * k**3 + 8 / 3 * k**3 + 4.0 * k * k * min(l, k) for k, l in sizes)


def sides(m: int, n: int, options: Options) -> tuple[bool, bool]:
    """Whether the rows and the columns are given a basis."""
    left, right = m <= options["max_dim"], n <= options["max_dim"]
    if options["one_sided"]:
        return left and (m <= n or not right), right and (n < m or not left)
    return left, right


def _without_noise(H: Float[Tensor, "b m n"], step: Float[Tensor, " b"]) -> Float[Tensor, "b m n"]:
    """In the first step `H` is diagonal: drop what rounding adds, which Adam would blow up to 1."""
    if H.device.type == "cpu" and bool((step > 0).all()):  # elsewhere asking would wait for it
        return H
    floor = torch.finfo(H.dtype).eps ** 0.5 * H.abs().amax((-2, -1), keepdim=True)
    return H.where(H.abs() > floor * (over(step, H) == 0), 0.0)


def _adam(
    H: Float[Tensor, "b m n"], state: State, options: Options
) -> tuple[Float[Tensor, "b m n"], State]:
    """The ratio of the moments in the basis, with the reference's place for `eps`."""
    (b1, b2), t = options["betas"], over(state["step"] + 1, H)
    M = state["M"].lerp(H, 1 - b1)
    V = (state["V"] * b2).addcmul_(H, H, value=1 - b2)
    epsilon = max(options["eps"], torch.finfo(V.dtype).tiny ** 0.5)  # where squares underflow
    N = torch.div(M, V.sqrt().add_(epsilon))
    return N.mul_((1 - b2**t).sqrt() / (1 - b1**t)), {"M": M, "V": V}


def _statistics(G: Float[Tensor, "b m n"], state: State, options: Options) -> State:
    """`L` and `R`, if it is their turn; what was left out decays all the same."""
    every = options["statistics_every"]
    if (options["clock"] - 1) % every:
        return {}
    kept = options["betas"][1] ** every
    moments: State = {}
    if "L" in state:
        moments["L"] = averaged_gram(state["L"], G, kept, 1 - kept)
    if "R" in state:
        moments["R"] = averaged_gram(state["R"], G.mT, kept, 1 - kept)
    return moments


def _turned(state: State, names: tuple[str, str], where: list[int], options: Options) -> State:
    """Refresh the bases of the rows of some items, and turn the moments with them."""
    moment, basis = names
    old, M, V = (items(state[name], where) for name in (basis, "M", "V"))
    new, order, sound = refreshed(mirrored(items(state[moment], where)), old)
    turned = {basis: new, "M": _rotated(M, old, new)}
    if options["rotate_second_moment"]:
        turned["V"] = (old.mT @ new).square().mT @ V
    else:
        turned["V"] = sorted_rows(V, order)
    kept = {basis: old, "M": M, "V": V}
    ok = sound[:, None, None]
    changed = {k: with_items(state[k], where, S.where(ok, kept[k])) for k, S in turned.items()}
    failures = items(state["failures"], where) + ~sound
    return changed | {"failures": with_items(state["failures"], where, failures)}


def _rotated(
    M: Float[Tensor, "k m n"], old: Float[Tensor, "k m m"], new: Float[Tensor, "k m m"]
) -> Float[Tensor, "k m n"]:
    """`new' old M`, in the cheaper order."""
    return new.mT @ (old @ M) if M.shape[-1] < M.shape[-2] else (new.mT @ old) @ M


def _turned_columns(
    state: State, names: tuple[str, str], where: list[int], options: Options
) -> State:
    """The same for columns: the rows of the transposed moments."""
    moments = {name: state[name].mT for name in ("M", "V")}
    turned = _turned(state | moments, names, where, options)
    return turned | {name: row_major(turned[name].mT) for name in ("M", "V")}
