"""Second moments of inputs and gradients, and the quadratic forms that re-weight them.

All are functions of one `Use`, for inputs that are vectors and for inputs that are unit vectors.

Shapes: b = blocks, N = examples, K = columns, S = shared positions, i = inputs, o = outputs,
d = features, T = rows.
"""

from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.nn import OneHot, Use
from matrigami.operators import DenseMatrix, LinearOperator, diagonal, gram
from matrigami.structures import DiagonalMatrix

ENTRIES = 2**24
"""Entries of the gradients of single examples that are held at once."""


def symmetric(M: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d d"]:
    """Without the rounding that tells a matrix from its transpose, as damping asks of factors."""
    return (M + M.mT) / 2


@singledispatch
def input_moment(inputs: Tensor, weights: Tensor | None = None) -> LinearOperator:
    """`sum_ns a_ns a_ns.T`; with weights, `sum_nst w_nst a_ns a_nt.T`.

    Args:
        inputs: The inputs of a use.
        weights: `(b, N, S, S)`, positive semi-definite; if S is 1, numbers.
    """
    if weights is None:
        return DenseMatrix(gram(inputs.flatten(1, 2)))
    if inputs.shape[2] == 1:
        return DenseMatrix(gram((inputs * weights.clamp_min(0).sqrt()).flatten(1, 2)))
    return DenseMatrix(symmetric(inputs.flatten(1, 2).mT @ (weights @ inputs).flatten(1, 2)))


@input_moment.register
def _(inputs: OneHot, weights: Tensor | None = None) -> LinearOperator:
    size = inputs.size
    if weights is None:
        return DiagonalMatrix(
            torch.bincount(inputs.indices, minlength=size).to(torch.float64)[None]
        )
    counts = weights.new_zeros(size).index_add_(0, inputs.indices, weights.flatten())
    return DiagonalMatrix(counts[None])


@singledispatch
def input_forms(inputs: Tensor, A: LinearOperator) -> Float[Tensor, "b N S S"]:
    """`a_ns.T A a_nt` of the positions of each example."""
    image = input_image(inputs, A)
    if inputs.shape[2] == 1:
        return (image * inputs).sum(-1, keepdim=True)
    return image @ inputs.mT


@input_forms.register
def _(inputs: OneHot, A: LinearOperator) -> Float[Tensor, "b N S S"]:
    return diagonal(A)[:, inputs.indices, None, None]


def input_image(inputs: Tensor | OneHot, A: LinearOperator) -> Float[Tensor, "b N S i"]:
    """`a_ns.T A`, for every position."""
    if isinstance(inputs, OneHot):
        return A.dense()[:, inputs.indices, None]
    return _rows_times(inputs, A)


def _rows_times(X: Float[Tensor, "b *rows d"], M: LinearOperator) -> Float[Tensor, "b *rows d"]:
    """`x.T M` for every row of a block, as one product: torch would take one for each example."""
    return (X.flatten(1, -2) @ M.dense().to(X)).view(X.shape)


@singledispatch
def input_rows(inputs: Tensor) -> int:
    """The number of inputs over which `A` is a mean, of one block."""
    return inputs.shape[1] * inputs.shape[2]


@input_rows.register
def _(inputs: OneHot) -> int:
    return len(inputs.indices)


def gradient_moment(
    gradients: Float[Tensor, "b N K S o"], weights: Float[Tensor, "b N S S"] | None = None
) -> DenseMatrix:
    """`sum_nks g_nks g_nks.T`; with weights, `sum_nkst w_nst g_nks g_nkt.T`."""
    if weights is None:
        return DenseMatrix(gram(gradients.flatten(1, 3)))
    W = weights[:, :, None]
    if gradients.shape[3] == 1:
        return DenseMatrix(gram((gradients * W.clamp_min(0).sqrt()).flatten(1, 3)))
    return DenseMatrix(symmetric(gradients.flatten(1, 3).mT @ (W @ gradients).flatten(1, 3)))


def gradient_forms(
    gradients: Float[Tensor, "b N K S o"], B: LinearOperator
) -> Float[Tensor, "b N S S"]:
    """`sum_k g_nks.T B g_nkt` of the positions of each example."""
    image = _rows_times(gradients, B)
    if gradients.shape[3] == 1:
        return (image * gradients).sum((2, 4))[..., None]
    return (image @ gradients.mT).sum(2)


def side_moment(use: Use, *, left: bool, weights: Tensor | None = None) -> LinearOperator:
    """The second moment on the left or right side of a parameter's matrix."""
    if left == use.transposed:
        return input_moment(use.inputs, weights)
    return gradient_moment(known_gradients(use), weights)


def side_forms(use: Use, M: LinearOperator, *, left: bool) -> Float[Tensor, "b N S S"]:
    """The quadratic forms of `M` on the left or right side of a parameter's matrix."""
    if left == use.transposed:
        return input_forms(use.inputs, M)
    return gradient_forms(known_gradients(use), M)


def known_gradients(use: Use) -> Tensor:
    """The gradients of a use.

    Raises:
        ValueError: If there was no backward pass.
    """
    if use.gradients is None:
        raise ValueError(
            "the gradients of a layer: there was no backward pass.\n"
            "Call backward() while the capture is open."
        )
    return use.gradients


def squares(use: Use, QB: LinearOperator, QA: LinearOperator) -> Float[Tensor, "b o i"]:
    """`sum_nk (QB.T dW_nk QA)^2`, entry by entry: the curvature along each pair of eigenvectors."""
    G = _rows_times(known_gradients(use), QB)
    if isinstance(use.inputs, OneHot) and isinstance(QA, DiagonalMatrix):
        found = G.new_zeros(use.inputs.size, G.shape[-1])
        return found.index_add_(0, use.inputs.indices, G.square().sum((0, 2, 3))).mT[None]
    A = input_image(use.inputs, QA).to(G)
    if A.shape[2] == 1:
        return G.square().sum(2)[:, :, 0].mT @ A[:, :, 0].square()
    found = G.new_zeros(len(G), G.shape[-1], A.shape[-1])
    size = max(1, ENTRIES // (len(G) * G.shape[2] * G.shape[-1] * A.shape[-1]))
    for g, a in zip(G.split(size, 1), A.split(size, 1), strict=True):
        found += (g.mT @ a[:, :, None]).square().sum((1, 2))
    return found


def squares_together(
    parts: list[Use], QL: LinearOperator, QR: LinearOperator
) -> Float[Tensor, "b l r"]:
    """As `squares`, of a tensor that several layers use: their gradients on an example add up."""
    N, K = examples(parts[0]), known_gradients(parts[0]).shape[2]
    l, r = QL.shape[-1], QR.shape[-1]
    widest = max(known_gradients(use).shape[1] / N for use in parts)
    size = max(1, int(ENTRIES / (K * l * r * widest)))
    found = known_gradients(parts[0]).new_zeros(*QL.shape[:-2], l, r)
    for first in range(0, N, size):
        some = [_turned(use, first, min(first + size, N), QL, QR) for use in parts]
        found = found + torch.stack(some).sum(0).square().sum((1, 2))
    return found


def examples(use: Use) -> int:
    """How many examples a use is of."""
    return use.inputs.number if isinstance(use.inputs, OneHot) else use.inputs.shape[1]


def _turned(
    use: Use, first: int, last: int, QL: LinearOperator, QR: LinearOperator
) -> Float[Tensor, "b n K l r"]:
    """`QL.T dW_nk QR` of the examples `first` to `last`."""
    QB, QA = (QR, QL) if use.transposed else (QL, QR)
    inputs, g = use.inputs, known_gradients(use)
    if isinstance(inputs, OneHot):
        mine = ((inputs.examples >= first) & (inputs.examples < last)).nonzero().flatten()
        A, G = QA.dense()[:, inputs.indices[mine], None], _rows_times(g[:, mine], QB)
        each = G.mT @ A[:, :, None].to(G)
        shape = (len(each), last - first, *each.shape[2:])
        dW = each.new_zeros(shape).index_add_(1, inputs.examples[mine] - first, each)
    else:
        A, G = input_image(inputs[:, first:last], QA), _rows_times(g[:, first:last], QB)
        dW = G.mT @ A[:, :, None].to(G)
    return dW.mT if use.transposed else dW
