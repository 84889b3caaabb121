"""Shampoo: the gradient between inverse roots of its second moments.

`L <- b L + (1 - b) G G'`, `R <- b R + (1 - b) G' G` (sums for b = 1), the update is `L^e M R^e`
with `M` the mean of the gradients and `e = -1/4`. State: `L, R`, their powers `P, Q`, `M`, and that
of the graft. Sources: Gupta, Koren and Singer (2018), arXiv:1802.09568; Anil et al. (2020),
arXiv:2002.09018; with `kl`, the two-sided fixed point of Lin et al. (2025), arXiv:2509.03378.

Shapes: b = blocks, m = rows, n = columns.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.operators import BlockView, averaged_gram, mirrored
from matrigami.optim._adam import over
from matrigami.optim._bases import items, two_sided, with_items
from matrigami.optim._grafting import ADAM_SIZE, SGD_SIZE, Graft
from matrigami.optim._method import Options, State
from matrigami.optim._optimizer import MatrixOptimizer, Source
from matrigami.optim._roots import Root, eigh_root, measured_root
from matrigami.optim._schedule import due


class Shampoo(MatrixOptimizer):
    """Kronecker-factored full-matrix Adagrad.

    Args:
        source: A model, a `Plan`, parameters, named parameters or groups.
        lr: Learning rate; a number or a tensor. Start at 1e-2, and try a third and three times it.
        betas: Decay of the mean of the gradients and of `L` and `R`; 1 for sums.
        epsilon: Smallest eigenvalue of `L` and `R` relative to the mean one; 0 takes the
            pseudo-inverse. None: 1e-6, and 1e-2 with `kl`, where each factor divides by the other
            and directions that the first gradients lack would grow without bound.
        weight_decay: Decoupled: `p <- p (1 - lr weight_decay)`.
        maximize: Go up instead of down.
        frequency: Steps between two computations of a power.
        exponent: Of each side. None: -1/4, which is -1/(2 order) for a matrix; with `one_sided` or
            `kl` -1/2, so that one side alone turns a single gradient into the same step.
        one_sided: Only the smaller side of each matrix: half of the work.
        graft: Where the size of the update comes from: `ADAM_SIZE`, `SGD_SIZE` or None, its own.
        block_size: Larger sides are cut evenly into tiles of at most this size.
        kl: Each second moment is weighted by the inverse of the other,
            `L <- b L + (1 - b) G R^-1 G' / n`.
        stagger: Give each power its own turn within the cycle; else all are computed at once.
        root: How powers are computed: `eigh_root`, `newton_root`, `cans_root`; None measures which
            is fastest for the device and the size.
        adam_betas: Decay of the moments of parameters that are not matrices, and of the graft.
        adam_eps: Added to the square root of their second moment.

    Grafting is on by default, because it lets Adam's learning rates serve.

    Raises:
        ValueError: If `kl` is asked for with another exponent than -1/2.

    Examples:
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Shampoo([W], lr=0.1, graft=None, epsilon=0.0)
        >>> W.grad = torch.diag(torch.tensor([3.0, 0.5]))
        >>> optimizer.step()
        >>> W.data
        tensor([[-0.1000,  0.0000],
                [ 0.0000, -0.1000]])
    """

    def __init__(
        self,
        source: Source,
        lr: float | Tensor = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        frequency: int = 10,
        exponent: float | None = None,
        one_sided: bool = False,
        graft: Graft | None = ADAM_SIZE,
        block_size: int = 1024,
        kl: bool = False,
        stagger: bool = True,
        root: Root | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
    ) -> None:
        if kl and exponent not in {None, -0.5}:
            raise ValueError(
                f"Shampoo(kl=True, exponent={exponent}): the two exclude each other.\n"
                "The weights of the other side are its power -1/2, twice.\n"
                "Leave the exponent out."
            )
        power = (-0.5 if one_sided or kl else -0.25) if exponent is None else exponent
        least = (1e-2 if kl else 1e-6) if epsilon is None else epsilon
        options: dict[str, Any] = {"lr": lr, "betas": betas, "epsilon": least, "root": root}
        options |= {"weight_decay": weight_decay, "frequency": frequency, "stagger": stagger}
        options |= {"exponent": power, "one_sided": one_sided, "graft": graft, "kl": kl}
        options |= {"block_size": block_size, "adam_betas": adam_betas, "adam_eps": adam_eps}
        options |= {"maximize": maximize}
        super().__init__(source, options)

    @staticmethod
    def starting_rate() -> float:
        """As measured in `docs/results/optimizers`."""
        return 0.01

    @staticmethod
    def init(G: Float[Tensor, "b m n"], options: Options) -> State:
        """The powers of the first gradient's second moments; no moments yet."""
        left, right = sides(G.shape[-2], G.shape[-1], options)
        state = {"M": torch.zeros_like(G)}
        state["failures"] = torch.zeros(len(G), dtype=torch.int64, device=G.device)
        if options["graft"] is not None:
            state |= options["graft"].init(G)
        first = eigh_root if G.device.type == "meta" else None
        for name, power, S in (("L", "P", G @ G.mT), ("R", "Q", G.mT @ G)):
            if left if name == "L" else right:
                root = powered(_scaled(S, name, options), options, first)
                eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
                finite = torch.linalg.vector_norm(root, dim=(-2, -1), keepdim=True).isfinite()
                state |= {name: torch.zeros_like(S), power: root.where(finite, eye)}
        return state

    @staticmethod
    def direction(
        G: Float[Tensor, "b m n"], state: State, options: Options
    ) -> tuple[Float[Tensor, "b m n"], State]:
        """Statistics, the powers whose turn it is, the product, and its size."""
        b1 = options["betas"][0]
        t = over(state["step"] + 1, G)
        after = dict(state) | _statistics(G, state, options)
        for side, names in ((0, ("L", "P")), (-1, ("R", "Q"))):
            if names[0] in state:
                where = due(state["offset"][:, side], options["clock"], options["frequency"])
                after |= _refreshed(after, names, where, options) if where else {}
        after["M"] = state["M"].lerp(G, 1 - b1)
        M = after["M"] / (1 - b1**t)
        U = two_sided(after.get("P"), M, after.get("Q"))
        if options["graft"] is not None:
            size, grafted = options["graft"].size(G, M, state, options)
            after |= grafted
            U = U * (size / (torch.linalg.vector_norm(U, dim=(-2, -1), keepdim=True) + 1e-16))
        return U, {k: S for k, S in after.items() if S is not state[k]}

    @staticmethod
    def norm(m: float, n: float, options: Options) -> float:
        """The size of the graft on all `min(m, n)` directions; else that of `L^e G R^e`."""
        if options["kl"] or options["graft"] is ADAM_SIZE:
            return max(m, n) ** 0.5  # entries of one size
        gradient = (n / m) ** 0.5  # where learning rates transfer
        if options["graft"] is not None:
            return gradient / min(m, n) ** 0.5
        sides = 1 if options["one_sided"] else 2
        return gradient ** (1 + 2 * sides * options["exponent"])

    @staticmethod
    def flops(m: int, n: int, options: Options) -> float:
        """The two-sided product and half of the statistics, and the powers."""
        left, right = sides(m, n, options)
        work = 2.0 * m * n * (left * m + right * n) * 1.5
        return work + sum(Shampoo.refresh_costs(m, n, options)) / options["frequency"]

    @staticmethod
    def refresh_costs(m: int, n: int, options: Options) -> tuple[float, ...]:
        """An eigendecomposition and two products for each side."""
        left, right = sides(m, n, options)
        return tuple(12.0 * k**3 for k in [m] * left + [n] * right)

    @staticmethod
    def is_equivariant(options: Options) -> bool:
        """Unless the size comes from Adam, which depends on the coordinates."""
        return options["graft"] is not ADAM_SIZE

    @staticmethod
    def is_scale_invariant(options: Options) -> bool:
        """Unless the size comes from the gradient."""
        return options["graft"] is not SGD_SIZE

    @staticmethod
    def viewed(view: BlockView, options: Options) -> BlockView:
        """Tiles of at most `block_size`."""
        return view.tiled(options["block_size"])


def sides(m: int, n: int, options: Options) -> tuple[bool, bool]:
    """Whether there is a factor for the rows and for the columns."""
    return (m <= n, n < m) if options["one_sided"] else (True, True)


def powered(
    L: Float[Tensor, "b m m"], options: Options, root: Root | None = None
) -> Float[Tensor, "b m m"]:
    """`L^exponent`, damped relative to the mean eigenvalue."""
    m, exponent = L.shape[-1], options["exponent"]
    chosen: Root = root or options["root"] or measured_root(L.device, m, exponent)
    mean = L.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    return chosen(L, exponent, options["epsilon"] * mean)


def _scaled(S: Float[Tensor, "b m m"], name: str, options: Options) -> Float[Tensor, "b m m"]:
    """The first moment of a side; the fixed point of `kl` leaves open which side has the scale."""
    if not options["kl"]:
        return S
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return S if name == "L" else S / mean.clamp_min(torch.finfo(S.dtype).tiny)


def _statistics(G: Float[Tensor, "b m n"], state: State, options: Options) -> State:
    """`L` and `R`."""
    kept = options["betas"][1]
    added = 1 - kept if kept < 1 else 1.0
    (m, n), P, Q = G.shape[-2:], state.get("P"), state.get("Q")
    moments: State = {}
    if "L" in state:
        H, weight = (G @ Q, added / n) if options["kl"] and Q is not None else (G, added)
        moments["L"] = averaged_gram(state["L"], H, kept, weight)
    if "R" in state:
        K, weight = (P.mT @ G, added / m) if options["kl"] and P is not None else (G, added)
        moments["R"] = averaged_gram(state["R"], K.mT, kept, weight)
    return moments


def _refreshed(state: State, names: tuple[str, str], where: list[int], options: Options) -> State:
    """New powers of some items, where they are finite and shrink no direction below zero."""
    moment, power = names
    b2, old = options["betas"][1], items(state[power], where)
    L = mirrored(items(state[moment], where))
    if b2 < 1:
        L = L / (1 - b2 ** (over(items(state["step"], where), L) + 1))
    new = powered(L, options)
    sound = torch.linalg.vector_norm(new, dim=(-2, -1)).isfinite()
    new = new.where(sound[:, None, None], old)
    failures = items(state["failures"], where) + ~sound
    return {
        power: with_items(state[power], where, new),
        "failures": with_items(state["failures"], where, failures),
    }
