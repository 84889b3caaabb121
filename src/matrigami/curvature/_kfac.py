"""K-FAC: the curvature of a layer as the Kronecker product of two second moments.

For `s = W a` with output gradient `g` the block of `vec(W)`, row-major, is
`E[(g g.T) (x) (a a.T)]`. K-FAC takes the expectations apart: `B (x) A` with `B = E[g g.T]` and
`A = E[a a.T]` (Martens and Grosse 2015, arXiv:1503.05671). It is exact for deep linear networks
with a squared error, and for one example. Shared weights (positions of a sequence, patches of an
image): *expand* counts every position as an example, *reduce* averages inputs and sums gradients
first (Eschenhagen et al. 2023, arXiv:2311.00636). Structured layers have one small product for each
block of each tensor.

Shapes: b = blocks, i = inputs, o = outputs of a block.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from matrigami.curvature._blocks import Blocks, Key
from matrigami.curvature._factors import SecondMoments
from matrigami.curvature._matrix import CurvatureMatrix
from matrigami.curvature._objective import Batch, Loss, trainable
from matrigami.curvature._passes import Labels, Setting, passes
from matrigami.operators import LinearOperator


def kfac(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Batch] | Batch,
    *,
    labels: Labels = "exact",
    reduce: bool = False,
    joint: bool = True,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> CurvatureMatrix:
    """The Kronecker-factored Fisher matrix of a model, `B (x) A` for each layer.

    `solve(F, g, damping)`, `power(F, -1/2)`, `logdet`, `trace`, `dense` and all other functions of
    the algebra apply.

    Args:
        model: Its trainable parameters count; a data-parallel wrapper adds up all processes.
        loss: `nn.CrossEntropyLoss`, `nn.NLLLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss`, or the
            function of torch; with its weights, smoothed labels and ignored positions. The result
            is scaled like it.
        data: One batch `(inputs, targets)` or an iterable of batches. Where a model keeps examples
            apart is found out on the first batch of each shape: one that mixes them depending on
            what is in a batch must do so there.
        labels: `"exact"`: one backward pass for each class, all at once. A number: as many labels
            drawn from the model (1 is the usual choice while training). `"empirical"`: the labels
            of the data, with the gradient of each term of the loss (a position of a sequence), or
            `"examples"`, of all terms of an example together; K-FAC itself reads both alike.
        reduce: Average inputs and sum gradients over shared positions, instead of counting every
            position. Cheaper, and exact where the loss is of the average.
        joint: Treat a bias as one more column of its weight. Otherwise it is a block of its own.
        dtype: Type of the sums; by default that of the gradients, at least float32.
        seed: Of the drawn labels.

    Returns:
        A block-diagonal value whose blocks are `KroneckerMatrix` values, by parameter name.

    Raises:
        ValueError: If nothing is trainable, the data are empty, a batch or an activation holds NaN,
            the loss has no known likelihood, or a layer is not called.
        TypeError: If a trainable parameter belongs to a module without a rule; it is named.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))
        >>> F = kfac(model, nn.MSELoss(), (torch.randn(8, 4), torch.randn(8, 2)))
        >>> F, F["2.weight"]
        (CurvatureMatrix(21x21, 47 parameters), KroneckerMatrix(1 of 6x6, 13 parameters))
    """
    found = passes(model, loss, data, Setting(labels, joint, reduce, seed, apart=False))
    products = second_moments(found, found.distributed, dtype).products()
    return assembled(found.objective.model, products)


def second_moments(
    found: Iterable[Blocks], distributed: bool, dtype: torch.dtype | None = None
) -> SecondMoments:
    """The second moments of every block, over one pass of all processes."""
    moments = SecondMoments(dtype)
    for blocks in found:
        moments.add(blocks)
    if distributed:
        moments.all_reduce()
    return moments


def assembled(model: nn.Module, blocks: Mapping[Key, LinearOperator]) -> CurvatureMatrix:
    """The block-diagonal value, with the layout and the order of the model's parameters."""
    sizes = {name: tuple(p.shape) for name, p in trainable(model).items()}
    names = sorted(blocks, key=lambda key: list(sizes).index(key[0]))
    return CurvatureMatrix(
        tuple(blocks[key] for key in names),
        tuple(names),
        tuple(tuple(sizes[name] for name in key) for key in names),
        tuple(sizes),
    )
