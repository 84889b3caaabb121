"""Influence: by how much the loss of one example would rise if another had not been trained on.

For a loss that is a mean of `n` terms, at its minimum, leaving out an example of loss `l_t` moves
the parameters by `F^-1 grad l_t / n` to first order, and the loss of a query by

    score(q, t) = grad l_q.T (F + damping I)^-1 grad l_t / n

(Koh and Liang 2017, arXiv:1703.04730). Large models need a curvature that can be solved with:
blocks of Kronecker products are, in the eigenbases of their factors (Grosse et al. 2023,
arXiv:2308.03296). The queries are solved with, once; a training example then meets them layer by
layer as `sum_s g_s.T X_q a_s`, and its gradient is never formed.

Shapes: p = parameters in all, q = queries, n = training examples.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.curvature._each import Sizes, losses, paired, vectors
from matrigami.curvature._matrix import CurvatureMatrix, mapped
from matrigami.curvature._objective import Batch, Loss, objective, sums, trainable
from matrigami.curvature._tape import unwrapped
from matrigami.operators import LinearOperator, shift, solve, trace

ROOM = 2**24
"""Numbers that are held at once for some training examples and all queries."""


def influence(
    F: LinearOperator,
    model: nn.Module,
    loss: Loss,
    queries: Iterable[Batch] | Batch,
    train: Iterable[Batch] | Batch,
    *,
    damping: float = 0.1,
) -> Float[Tensor, "q n"]:
    """The rise of the loss of each query if a training example were left out, to first order.

    The loss of an example is the sum of its terms (of a sequence: its positions). Positive scores
    are of examples that help a query, negative ones of those that harm it.

    Args:
        F: The curvature at the trained parameters: of `kfac`, `ekfac`, `kfoc`, or any matrix over
            all trainable parameters that `mg.solve` takes.
        model: The trained model.
        loss: The loss that it was trained with.
        queries: One batch `(inputs, targets)` or an iterable of batches; their gradients are held.
        train: The training examples, read one batch at a time.
        damping: Times the mean eigenvalue of each block. Untuned, 0.1 is what the field uses; an
            approximation needs some, for its small eigenvalues are its worst.

    Raises:
        ValueError: If the curvature is of other parameters, the damping below zero, or the outputs
            of one example depend on others.

    Examples:
        >>> from matrigami.curvature import ekfac
        >>> _ = torch.manual_seed(0)
        >>> model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> train = (torch.randn(20, 4), torch.arange(20) % 3)
        >>> F = ekfac(model, loss, train)
        >>> scores = influence(F, model, loss, train, train)
        >>> scores.shape, bool((scores.diagonal() > 0).all())
        (torch.Size([20, 20]), True)
    """
    if not 0 <= damping < math.inf:
        raise ValueError(
            f"influence(damping={damping}): it is a share of the mean eigenvalue of each block.\n"
            "Give a number from 0, e.g. 0.1."
        )
    inner = unwrapped(model)
    wanted, seen = objective(inner, loss, queries), objective(inner, loss, train)
    sizes = {name: tuple(p.shape) for name, p in trainable(inner).items()}
    refuse_other_sizes("influence", F, sizes)
    with torch.no_grad():
        gradients = torch.cat([vectors(blocks, sizes) for blocks in losses(wanted, sizes)], 1)
        X = solve(_damped(F, damping), gradients)
        parts = X.split([math.prod(shape) for shape in sizes.values()])
        tensors = dict(zip(sizes, parts, strict=True))
        scores = torch.cat([paired(blocks, tensors, ROOM) for blocks in losses(seen, sizes)])
    return scores.mT / (1.0 if sums(wanted.loss) else seen.total)


def refuse_other_sizes(name: str, F: LinearOperator, sizes: Sizes) -> None:
    """A curvature must be of the parameters of the model."""
    own = F.sizes if isinstance(F, CurvatureMatrix) else sizes
    p = sum(math.prod(shape) for shape in sizes.values())
    if F.shape != (p, p) or own != dict(sizes):
        raise ValueError(
            f"{name}(F, model, ...): F is {F.shape[0]}x{F.shape[-1]}; the model has {p} "
            "trainable parameters.\nMake F of the same model, with the same parameters frozen."
        )


def _damped(F: LinearOperator, damping: float) -> LinearOperator:
    """Each block plus a multiple of its mean eigenvalue."""

    def plus(B: LinearOperator) -> LinearOperator:
        """One block."""
        return shift(B, damping * trace(B) / B.shape[-1])

    return mapped(F, plus) if isinstance(F, CurvatureMatrix) else plus(F)
