"""Muon: the momentum with all its singular values set to 1.

`M <- mu M + (1 - mu) G`, `N = mu M + (1 - mu) G` (Nesterov) or `M`, and the update is `scale(m, n)
U V'` with `N = U S V'`; `U V'` comes from a few odd polynomials. State: `M`. Sources: Jordan et al.
(2024), "Muon: an optimizer for hidden layers in neural networks"; scale for the learning rate of
AdamW, Liu et al. (2025), arXiv:2502.16982.

With `inputs`, `G` is replaced by `G (A / a + g I)^-1` with `A` the second moment of the layer's
inputs and `a` its mean diagonal entry: the steepest step where inputs, not weights, are of one size
in all directions. State: `A` and that inverse, `Q`. Source: Newton-Muon, arXiv:2604.01472, which
has no `a` (a scale, which Muon drops), and starts from `A = 0.001 I` instead of the first moment.

Shapes: b = blocks, m = rows, n = columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.curvature import InputEstimator
from matrigami.nn import Part, Role, anatomy, unread
from matrigami.optim._kronecker_factors import averaged
from matrigami.optim._method import Options, State
from matrigami.optim._optimizer import Source
from matrigami.optim._options import check_options
from matrigami.optim._plan import Plan, planned
from matrigami.optim._polynomials import QUINTIC, Polynomial, fastest_dtype, orthogonalised
from matrigami.optim._product_bound import ProductBounds
from matrigami.optim._watching import WatchingOptimizer
from matrigami.optim.distributed import Update


def rms_match(m: float, n: float) -> float:
    """`0.2 sqrt(max(m, n))`: entries of the size that AdamW's updates have."""
    return 0.2 * max(m, n) ** 0.5


def spectral(m: float, n: float) -> float:
    """`sqrt(max(1, m / n))`: the spectral norm that keeps features of one size at any width."""
    return max(1.0, m / n) ** 0.5


class Muon(WatchingOptimizer):
    """Steepest descent in the spectral norm, with momentum; Adam for the output layer.

    Args:
        source: A model, a `Plan`, parameters, named parameters or groups.
        lr: Learning rate; a number or a tensor. Start at 1e-2, and try a third and three times it;
            with `rms_match` that of AdamW suits.
        momentum: Decay of the mean of the gradients.
        nesterov: Look one step ahead.
        weight_decay: Decoupled: `p <- p (1 - lr weight_decay)`.
        maximize: Go up instead of down.
        polynomials: `QUINTIC`, `POLAR_EXPRESS`, `CANS`, or steps of your own.
        scale: Size of the update by rows and columns, such as `rms_match` or `spectral`.
        bound: Move a structured layer, as a matrix, by at most what a dense one of its size moves
            by: `lr scale(m, n)` in the spectral norm; see `_product_bound.py`. Needs the model, or
            its plan. Layers with `rms_cap` and mixtures of experts are left alone.
        inputs: Precondition by the inputs that layers see (Newton-Muon). They are watched in the
            forward passes of the model, if that, or a plan of it, is the source, or `attach` is
            called. Weights whose inputs cannot be read (LSTMs, fused attention) stay as they are.
        statistics_every: Steps between two batches that are watched, after which `Q` is renewed.
        decay: Of `A`, from one such batch to the next; in the first the mean of all is taken.
        gamma: Added to the inputs' moment, times its mean diagonal entry.
        dtype: Precision of the products; None measures once whether bfloat16 is the faster. Double
            parameters stay double.
        adam_betas: Decay of the moments of parameters that are not matrices.
        adam_eps: Added to the square root of their second moment.

    Defaults are those of torch and of the source; `scale` lets one learning rate serve all groups.

    Examples:
        >>> W = torch.nn.Parameter(torch.zeros(4, 4))
        >>> optimizer = Muon([W], lr=0.1, weight_decay=0.0)
        >>> W.grad = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> optimizer.step()
        >>> bool((W.diagonal() / -0.04 - 1).abs().max() < 0.35)  # all near 0.1 * 0.2 * sqrt(4)
        True
    """

    def __init__(
        self,
        source: Source,
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        maximize: bool = False,
        polynomials: tuple[Polynomial, ...] = QUINTIC,
        scale: Callable[[float, float], float] = rms_match,
        bound: bool = False,
        inputs: bool = False,
        statistics_every: int = 32,
        decay: float = 0.95,
        gamma: float = 0.2,
        dtype: torch.dtype | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
    ) -> None:
        options: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "scale": scale,
            "bound": bound,
        }
        options |= {"weight_decay": weight_decay, "polynomials": polynomials, "dtype": dtype}
        options |= {"adam_betas": adam_betas, "adam_eps": adam_eps, "maximize": maximize}
        options |= {"inputs": inputs, "statistics_every": statistics_every}
        options |= {"decay": decay, "gamma": gamma}
        check_options("Muon", options)
        self._bounds = ProductBounds()
        if isinstance(source, nn.Module):
            source = planned(source, Muon, options)
        super().__init__(source, options)
        if inputs and isinstance(source, Plan) and source.model is not None:
            self.attach(source.model)

    def attach(self, model: nn.Module) -> None:
        """Watch the inputs of a model, when the optimiser was made of groups, with `inputs=True`.

        Args:
            model: The model whose weights these are, wrapped or not.

        Raises:
            ValueError: If the optimiser is watching, or is not to use inputs.
        """
        if self.estimator is not None or not self.defaults["inputs"]:
            watches = self.estimator is not None
            fault = "it watches a model already" if watches else "inputs=True is needed"
            raise ValueError(
                f"Muon.attach({type(model).__name__}): {fault}.\n"
                "It watches one model, once, and only where inputs are used.\n"
                "Give Muon(model, inputs=True); or Muon(groups, inputs=True), and attach(model)."
            )
        self.watch(InputEstimator(model, ()))

    @staticmethod
    def starting_rate() -> float:
        """As measured in `docs/results/optimizers`."""
        return 0.01

    @staticmethod
    def init(G: Float[Tensor, "b m n"], options: Options) -> State:
        """No momentum yet, and inputs of one size in all directions."""
        state = {"M": torch.zeros_like(G)}
        if options["inputs"]:
            (b, _, n), kind = G.shape, {"dtype": G.dtype, "device": G.device}
            A, Q = torch.zeros(b, n, n, **kind), torch.eye(n, **kind).repeat(b, 1, 1)
            state |= {"A": A, "Q": Q, "watched": G.new_zeros(b)}
        return state

    @staticmethod
    def direction(
        G: Float[Tensor, "b m n"], state: State, options: Options
    ) -> tuple[Float[Tensor, "b m n"], State]:
        """The orthogonal factor of the momentum."""
        known = averaged(state, options["decay"], "A") if options["inputs"] else {}
        if known:
            known["Q"] = inverse_of_inputs(known["A"], state["Q"], options["gamma"])
        if options["inputs"]:
            G = G @ known.get("Q", state["Q"])
        M = state["M"].lerp(G, 1 - options["momentum"])
        N = G.lerp(M, options["momentum"]) if options["nesterov"] else M
        dtype = options["dtype"]
        if G.dtype == torch.float64:
            dtype = torch.float64
        elif dtype is None:
            dtype = fastest_dtype(G.device)
        U = orthogonalised(N, options["polynomials"], dtype)
        return U * options["scale"](G.shape[-2], G.shape[-1]), known | {"M": M}

    @staticmethod
    def flops(m: int, n: int, options: Options) -> float:
        """Two or three products for each polynomial, and those with the inverse."""
        k, l = min(m, n), max(m, n)
        work = sum(4.0 * k * k * l + 2.0 * k**3 * bool(p.c) for p in options["polynomials"])
        more = 2.0 * m * n * n + 2.0 * n**3 / options["statistics_every"]
        return work + more * options["inputs"]

    @staticmethod
    def norm(m: float, n: float, options: Options) -> float:
        """All singular values are the scale."""
        return options["scale"](m, n)

    def _apply(self, updates: list[Update]) -> None:
        """With the steps of products bounded, if asked."""
        if any(group["bound"] for group in self.param_groups):
            updates = self._bounds.shortened(updates, self.param_groups, self.exchange)
        super()._apply(updates)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has products of its own."""
        super().__setstate__(state)
        self._bounds = ProductBounds()

    @property
    def reads_gradients_only(self) -> bool:
        """Unless a model is watched, or products are bounded, which depends on their size."""
        return super().reads_gradients_only and not self.defaults["bound"]

    def visible(self, chosen: list[Tensor]) -> list[Tensor]:
        """Weights with a tap."""
        model = self.estimator and self.estimator.model
        if model is None:
            return []
        entries = anatomy(model, "Muon", elementwise=unread(model))
        seen = {id(e.parameter) for e in entries if e.part.tap is not None}
        return [p for p in chosen if id(p) in seen]

    @staticmethod
    def takes(part: Part) -> bool:
        """Hidden matrices: the rows of an output layer are classes, not directions."""
        return part.role is not Role.HEAD


def inverse_of_inputs(
    A: Float[Tensor, "b n n"], old: Float[Tensor, "b n n"], gamma: float
) -> Float[Tensor, "b n n"]:
    """`(A / a + gamma I)^-1` with `a` the mean of the diagonal; the old one where it fails."""
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)[:, None, None].clamp_min(torch.finfo(A.dtype).tiny)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    factor, failed = torch.linalg.cholesky_ex(A / mean + gamma * eye)
    Q = torch.cholesky_inverse(factor)
    sound = (failed == 0) & (diagonal > 0).any(-1) & Q.isfinite().all((-2, -1))
    return Q.where(sound[:, None, None], old)
