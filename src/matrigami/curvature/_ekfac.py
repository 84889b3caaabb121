"""EKFAC: the eigenbasis of a Kronecker product, with the curvature itself along each vector.

In the basis `Q_B (x) Q_A` of the factors of K-FAC the diagonal of the true block is
`E[((Q_B.T g a.T Q_A)_ij)^2]`. With it instead of the products of eigenvalues the approximation is
the nearest one in this basis, and has the trace of the block (George et al. 2018,
arXiv:1806.03884). Any other basis may be given, that of KFOC for one.

Shapes: b = blocks, l = rows and r = columns of a parameter's matrix.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matrigami.curvature._blocks import Key
from matrigami.curvature._kfac import assembled, second_moments
from matrigami.curvature._matrix import CurvatureMatrix
from matrigami.curvature._moments import examples, squares, squares_together
from matrigami.curvature._objective import Batch, Loss, readable_again, trainable
from matrigami.curvature._passes import Labels, Repeated, Setting, passes
from matrigami.nn import Use
from matrigami.operators import LinearOperator, SpectralMatrix, eigh
from matrigami.structures import KroneckerMatrix


def ekfac(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Batch] | Batch,
    *,
    labels: Labels = "exact",
    basis: CurvatureMatrix | Callable[..., CurvatureMatrix] | None = None,
    reduce: bool = False,
    joint: bool = True,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> CurvatureMatrix:
    """The eigenvalue-corrected Kronecker-factored Fisher matrix.

    No farther from the block than K-FAC in the Frobenius norm, and of the same trace as the block.
    Its inverse with damping is exact: `solve(F, g, damping)`.

    Args:
        model: As for `kfac`.
        loss: As for `kfac`.
        data: As for `kfac`; passed over twice (once if it fits in memory).
        labels: As for `kfac`; the same labels are drawn in each pass.
        basis: A result of `kfac` or `kfoc` for this model, or one of these functions, which is
            called with the same arguments; by default that of `kfac`.
        reduce: As for `kfac`.
        joint: As for `kfac`; of a given basis, as there.
        dtype: As for `kfac`.
        seed: As for `kfac`.

    Returns:
        A block-diagonal value whose blocks are `SpectralMatrix` values, by parameter name.

    Raises:
        ValueError: As for `kfac`, or if the basis is of other blocks.
        TypeError: As for `kfac`.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.arange(8) % 3)
        >>> ekfac(model, nn.CrossEntropyLoss(), batch)["weight"]
        SpectralMatrix(1 of 15x15, 49 parameters)
    """
    data = readable_again(data)
    found = passes(model, loss, data, Setting(labels, joint, reduce, seed))
    every = Repeated(found)
    if callable(basis):
        basis = basis(model, loss, data, labels=labels, reduce=reduce, joint=joint, seed=seed)
    if basis is None:
        pairs = second_moments(every, found.distributed, dtype).products().items()
    else:
        _refuse_other_sizes(basis, found.objective.model)
        pairs = zip(basis.names, basis.blocks, strict=True)
    frames = {key: _frame(key, block) for key, block in pairs}
    values = _corrected(every, frames, dtype)
    if found.distributed:
        for t in values.values():
            dist.all_reduce(t)
    blocks = {key: SpectralMatrix(t.flatten(1), frames[key]) for key, t in values.items()}
    return assembled(found.objective.model, blocks)


def _corrected(
    every: Repeated, frames: dict[Key, KroneckerMatrix], dtype: torch.dtype | None
) -> dict[Key, Tensor]:
    """The curvature along each pair of eigenvectors, `(b, l, r)`, over one pass."""
    totals: dict[Key, Tensor] = {}
    for blocks in every:
        _refuse_other(blocks, frames)
        for key, parts in blocks.items():
            more = _squares(parts, frames[key]).to(dtype or frames[key].dtype)
            totals[key] = totals[key] + more if key in totals else more
    return totals


def _frame(key: Key, block: LinearOperator) -> KroneckerMatrix:
    """The eigenvectors of both factors."""
    if isinstance(block, SpectralMatrix) and isinstance(block.vectors, KroneckerMatrix):
        return block.vectors
    if not isinstance(block, KroneckerMatrix):
        raise ValueError(
            f"ekfac(basis=...): its block {'+'.join(key)} is a {type(block).__name__}.\n"
            "It takes blocks with Kronecker factors.\nUse the result of kfac or kfoc."
        )
    return KroneckerMatrix(*[eigh(F).vectors for F in block.factors])


def _squares(parts: list[Use], frame: KroneckerMatrix) -> Tensor:
    """The curvature along each pair of eigenvectors, as `(b, l, r)`."""
    left, right = frame.factors
    if len(parts) > 1 and len({examples(use) for use in parts}) == 1:
        return squares_together(parts, left, right)
    found = [
        squares(use, right, left).mT if use.transposed else squares(use, left, right)
        for use in parts
    ]
    return torch.stack(found).sum(0)


def _refuse_other_sizes(basis: CurvatureMatrix, model: nn.Module) -> None:
    """A basis must be of the parameters of the model."""
    sizes = {name: tuple(p.shape) for name, p in trainable(model).items()}
    if basis.sizes != sizes:
        raise ValueError(
            f"ekfac(basis=...): it is of the parameters {basis.sizes}.\n"
            f"The model has {sizes}.\nMake the basis of the same model."
        )


def _refuse_other(blocks: dict[Key, list[Use]], frames: dict[Key, KroneckerMatrix]) -> None:
    """A basis must have the blocks of the model."""
    if set(blocks) != set(frames):
        raise ValueError(
            f"ekfac(basis=...): its blocks are {', '.join('+'.join(k) for k in frames)}.\n"
            f"The model has {', '.join('+'.join(k) for k in blocks)}.\n"
            "Make the basis of the same model, with the same `joint`."
        )
