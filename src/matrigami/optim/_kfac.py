"""K-FAC: the natural gradient, with the Fisher matrix of each layer as a Kronecker product.

The curvature of a weight is `B (x) A`, with `A` the second moment of the layer's inputs and `B`
that of its output gradients at labels drawn from the model. The update solves with it for the mean
gradient `M`: `U = (B + r / pi I)^-1 M (A + r pi I)^-1` with `r^2 = damping`, or by eigenpairs
exactly. State: `A, B`, their inverses or eigenpairs, and `M`. A structured layer has such factors
for each block of each of its tensors. Source: Martens and Grosse (2015), arXiv:1503.05671.

Shapes: b = blocks, m = rows (outputs), n = columns (inputs).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.curvature import FactorPair, FisherEstimator
from matrigami.nn import Part, Role
from matrigami.operators import BlockView
from matrigami.optim._adam import over
from matrigami.optim._bases import two_sided
from matrigami.optim._kronecker_factors import (
    FACTORS,
    averaged,
    natural,
    refreshed_factor,
    shortened,
    to_refresh,
)
from matrigami.optim._method import Options, State
from matrigami.optim._optimizer import Source
from matrigami.optim._options import check_options
from matrigami.optim._plan import Plan, planned
from matrigami.optim._watching import WatchingOptimizer
from matrigami.optim.distributed import Update

MATRICES = frozenset({Role.MATRIX, Role.CORE, Role.CONVOLUTION, Role.HEAD})
"""What has inputs and outputs of its own."""

STEP = 0.95**5
"""Factor of one change of the damping."""


class KFAC(WatchingOptimizer):
    """Natural gradient descent with Kronecker factors that a watch on the model keeps current.

    Weights of linear layers, convolutions and structured layers take it; all other parameters
    (biases, norms, embeddings, fused attention) take Adam with a rate of their own. Until a weight
    has been watched its curvature counts as the identity.

    Args:
        source: The model, or a plan of it. Bare parameters are never watched: `attach` a model, or
            tell their curvature with `observe`.
        loss: The loss of the training loop: `nn.CrossEntropyLoss`, `nn.NLLLoss`, `nn.MSELoss` or
            `nn.BCEWithLogitsLoss`. Needed with a model. Where its own call is a part of the loop,
            positions that it ignores do not count, classes and positive labels have its weights,
            and the model may return its outputs in any form. Where another loss is called, all
            outputs count, with classes on axis 1.
        lr: Learning rate of the natural gradient. Start at 0.3, and try a third and three times it.
        adam_lr: Learning rate of all other parameters, where a model or plan tells them apart.
        damping: Added to the eigenvalues of the curvature; see `adapt_damping`.
        momentum: Decay of the mean gradient.
        decay: Decay of the running factors; in the first steps the mean of all is taken.
        kl_clip: Largest `lr^2 U' (F + damping) U` of a step over all weights: about twice the
            change of the model's predictions, in nats. A longer step is shortened to it.
        weight_decay: Decoupled: `p <- p (1 - lr weight_decay)`.
        maximize: Go up instead of down.
        frequency: Steps between two eigendecompositions of a factor.
        statistics_every: Steps between two batches that are watched.
        labels: Labels drawn for each example that is watched.
        optimal: Keep the nearest Kronecker product of each batch (KFOC) instead.
        inverse: Keep the inverses of the factors, each with its share of the damping (the rule
            `pi` of `curvature.damped`). Otherwise their eigenpairs, for the exact damped inverse at
            twice the work of a step.
        stagger: Give each factor its own turn within the cycle.
        max_dim: A matrix with a side larger than this takes Adam, such as a head of many classes.
        adam_betas: Decay of the moments of parameters that take Adam.
        adam_eps: Added to the square root of their second moment.

    Raises:
        ValueError: If an option is out of range, the loss is missing or no known likelihood.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> x, W = torch.randn(64, 3), torch.ones(2, 3)
        >>> model, loss = nn.Linear(3, 2, bias=False), nn.MSELoss()
        >>> options = {"damping": 1e-6, "kl_clip": 1e9, "momentum": 0.0, "labels": 99}
        >>> optimizer = KFAC(model, loss, lr=1.0, **options)
        >>> loss(model(x), x @ W.T).backward()
        >>> optimizer.step()  # of a linear model: nearly to the least squares solution
        >>> bool((model.weight - W).abs().max() < 0.2)
        True
    """

    _pairs: Mapping[Tensor, FactorPair] = {}

    def __init__(
        self,
        source: Source,
        loss: nn.Module | None = None,
        lr: float | Tensor = 0.3,
        *,
        adam_lr: float | Tensor = 3e-3,
        damping: float = 1e-2,
        momentum: float = 0.9,
        decay: float = 0.95,
        kl_clip: float = 1e-2,
        weight_decay: float = 0.0,
        maximize: bool = False,
        frequency: int = 10,
        statistics_every: int = 1,
        labels: int = 1,
        optimal: bool = False,
        inverse: bool = True,
        stagger: bool = True,
        max_dim: int = 10_000,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "damping": damping, "momentum": momentum}
        options |= {"decay": decay, "kl_clip": kl_clip, "weight_decay": weight_decay}
        options |= {"frequency": frequency, "statistics_every": statistics_every}
        options |= {"stagger": stagger, "inverse": inverse, "max_dim": max_dim}
        options |= {"adam_betas": adam_betas, "adam_eps": adam_eps, "maximize": maximize}
        check_options("KFAC", options | {"labels": labels})
        if isinstance(source, nn.Module):
            source = planned(source, KFAC, options)
        super().__init__(source, options)
        model = source.model if isinstance(source, Plan) else None
        if model is not None:
            for group in self.param_groups:
                if not any(group["views"]):
                    group["lr"] = adam_lr
        if model is not None or loss is not None:
            self.attach(model, loss, labels=labels, optimal=optimal)

    def attach(
        self,
        model: nn.Module | None,
        loss: nn.Module | None,
        *,
        labels: int = 1,
        optimal: bool = False,
    ) -> None:
        """Watch a model, when the optimiser was made of groups.

        Args:
            model: The model whose weights these are, wrapped or not.
            loss: Its loss.
            labels: As for the optimiser.
            optimal: As for the optimiser.

        Raises:
            ValueError: If the loss is missing or no known likelihood, or the optimiser is watching.
        """
        if model is None or loss is None or self.estimator is not None:
            fault = "a loss is needed" if self.estimator is None else "it watches a model already"
            raise ValueError(
                f"KFAC.attach({type(model).__name__}, {loss}): {fault}.\n"
                "Labels are drawn from what the loss says of the outputs of one model.\n"
                "Give KFAC(model, loss), or KFAC(groups) and then attach(model, loss)."
            )
        self.watch(FisherEstimator(model, loss, (), labels=labels, optimal=optimal))

    def observe(self, p: Tensor, A: Float[Tensor, "b n n"], B: Float[Tensor, "b m m"]) -> None:
        """Tell the curvature `B (x) A` of a weight for the next step: of a layer of your own, say.

        Args:
            p: A weight of this optimiser.
            A: Mean of the outer products of the inputs, for each block.
            B: Sum of the outer products of the gradients of the mean loss, times the examples.

        Raises:
            ValueError: If it is no matrix of this optimiser, or the shapes or entries are wrong.
        """
        view = dict(self.matrices()).get(p)
        shapes = None if view is None else [(view.stack[0], k, k) for k in view.stack[:0:-1]]
        finite = bool(A.isfinite().all()) and bool(B.isfinite().all())
        if shapes != [tuple(A.shape), tuple(B.shape)] or not finite:
            raise ValueError(
                f"KFAC.observe was told factors of shapes {tuple(A.shape)} and {tuple(B.shape)}.\n"
                f"This parameter needs {shapes or 'none: it takes Adam'}, with finite entries.\n"
                "Give one factor of inputs and one of outputs for each block."
            )
        self._pairs = {**self._pairs, p: FactorPair(A, B)}

    def adapt_damping(self, before: float | Tensor, after: float | Tensor) -> float:
        """Compare the fall of the loss with the one that the quadratic model predicts.

        The ratio `(before - after) / (lr <U, G> - lr^2/2 U' (F + damping) U)` below 1/4 raises the
        damping, above 3/4 lowers it, by `0.95^5` (Levenberg and Marquardt; Martens and Grosse 2015,
        section 6.5). Call it after every fifth step or so, with momentum 0 or little.

        Args:
            before: Loss of the batch of the last step, before it.
            after: Loss of the same batch after it.

        Returns:
            The damping from now on.
        """
        gain, size = map(self.exchange.summed, natural(self.param_groups, self.state))
        share = shortened(size, self.param_groups)
        predicted = share * gain - share * share / 2 * size
        ratio = (float(before) - float(after)) / max(predicted, 1e-30)
        factor = STEP if ratio > 0.75 else 1 / STEP if ratio < 0.25 else 1.0
        for group in self.param_groups:
            group["damping"] = max(group["damping"] * factor, 1e-8)
        return self.param_groups[0]["damping"]

    @staticmethod
    def starting_rate() -> float:
        """As measured in `docs/results/optimizers`."""
        return 0.3

    @staticmethod
    def init(G: Float[Tensor, "b m n"], options: Options) -> State:  # noqa: ARG004
        """The identity as curvature, and no momentum."""
        b, m, n = G.shape
        eye = {k: torch.eye(k, dtype=G.dtype, device=G.device).expand(b, -1, -1) for k in (m, n)}
        state = {"M": torch.zeros_like(G), "A": eye[n].clone(), "B": eye[m].clone()}
        state |= {"P": eye[m].clone(), "Q": eye[n].clone()}
        state |= {"beta": G.new_ones(b, m), "alpha": G.new_ones(b, n)}
        state |= {name: G.new_zeros(b) for name in ("watched", "norm", "gain", "failures")}
        return state

    @staticmethod
    def direction(
        G: Float[Tensor, "b m n"], state: State, options: Options
    ) -> tuple[Float[Tensor, "b m n"], State]:
        """Average what was observed, refresh what is due, solve for the mean gradient."""
        known = averaged(state, options["decay"])
        for side, names in enumerate(FACTORS):
            if where := to_refresh(state, side, options):
                known |= refreshed_factor(state | known, names, where, options)
        now, mu = state | known, options["momentum"]
        P, Q = now["P"], now["Q"]
        M = state["M"].lerp(G, 1 - mu)
        N = M / (1 - mu ** (over(state["step"], M) + 1))
        if options["inverse"]:
            U = two_sided(P, N, Q)
        else:
            H = two_sided(P.mT, N, Q)
            H = H / (now["beta"][:, :, None] * now["alpha"][:, None] + options["damping"])
            U = two_sided(P, H, Q.mT)
        norm = (U * N).sum((-2, -1))  # U' (F + damping) U
        return U, known | {"M": M, "norm": norm, "gain": (U * G).sum((-2, -1))}

    @staticmethod
    def norm(m: float, n: float, options: Options) -> float:  # noqa: ARG004
        """A natural step moves the outputs by an amount that no size enters."""
        return (m / n) ** 0.5

    @staticmethod
    def flops(m: int, n: int, options: Options) -> float:
        """Two two-sided products, or one with inverses, and the eigendecompositions."""
        work = (2.0 if options["inverse"] else 4.0) * m * n * (m + n)
        return work + sum(KFAC.refresh_costs(m, n, options)) / options["frequency"]

    @staticmethod
    def refresh_costs(m: int, n: int, options: Options) -> tuple[float, ...]:  # noqa: ARG004
        """An eigendecomposition of each factor."""
        return 13.0 * m**3, 13.0 * n**3

    @staticmethod
    def viewed(view: BlockView, options: Options) -> BlockView | None:
        """None for matrices that are too large."""
        return view if max(view.stack[1:]) <= options["max_dim"] else None

    @staticmethod
    def takes(part: Part) -> bool:
        """Whatever has inputs and outputs of its own, if they can be seen."""
        return part.role in MATRICES and part.tap is not None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch does; what was seen of the gradients that are dropped does not count."""
        super().zero_grad(set_to_none)
        if self.estimator is not None:
            self.estimator.forget()

    def _updates(
        self, gradients: dict[Tensor, Tensor], observed: Mapping[Tensor, State] | None = None
    ) -> list[Update]:
        """Those of what was observed since the last step, shortened if together they go too far."""
        told = {p: {"A_now": pair.A, "B_now": pair.B} for p, pair in self._pairs.items()}
        self._pairs = {}
        updates = super()._updates(gradients, told | dict(observed or {}))
        moved = {u.parameter: self.state[u.parameter] for u in updates if bool(u.applied)}
        size = self.exchange.summed(natural(self.param_groups, moved)[1])
        share = shortened(size, self.param_groups)
        return [
            u._replace(direction=u.direction * share) if "norm" in self.state[u.parameter] else u
            for u in updates
        ]
