"""How far a matrix moves when its tensors do: a bound on its spectral norm by theirs.

A structured matrix is linear in each of its tensors, a sum of products of factors. A factor is a
tensor `C` as it enters (`ContractionMatrix`): the same blocks side by side, so its norm is that of
the largest block, `|C| = max_b ||C_b||_2`. Hence with `p(s) = sum_t c_t prod_{i in t} s_i`

    ||W(C)||_2 <= p(|C|)    and    ||W(C + D) - W(C)||_2 <= p(|C| + |D|) - p(|C|)

with all orders: expand each product; every term has the same constant, and those without a `D`
cancel. For `W = U V.T` the right side is `|dU| |V| + |U| |dV| + |dU| |dV|`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from matrigami.operators._algebra import (
    CroppedMatrix,
    ProductMatrix,
    SumMatrix,
    TransposedMatrix,
)
from matrigami.operators._base import LinearOperator, question
from matrigami.operators._contraction import ContractionMatrix, contractions
from matrigami.operators._tree import mapped, named_tensors


class NormTerm(NamedTuple):
    """`constant * prod |C_i|` over the tensors `factors`, by their places in `named_tensors`."""

    constant: float
    factors: tuple[int, ...]


@question
def norm_terms(A: LinearOperator) -> tuple[NormTerm, ...]:
    """The terms of `p`; they depend on the structure and its sizes, not on the entries.

    Raises:
        TypeError: If the structure is not read from its `contractions`, and has no rule.

    Examples:
        >>> from matrigami import KroneckerSum, LowRank
        >>> norm_terms(LowRank(rank=2).init(4, 3))
        (NormTerm(constant=1.0, factors=(0, 1)),)
        >>> [term.factors for term in norm_terms(KroneckerSum().init(4, 4))]
        [(0,), (1,)]
    """
    marked = mapped(A, lambda t: torch.ones(t.shape, requires_grad=True))
    tensors = named_tensors(marked).values()
    owners = {t.untyped_storage().data_ptr(): i for i, t in enumerate(tensors)}
    found: dict[tuple[int, ...], float] = {}
    for part in contractions(marked):
        chain = [F for F in (part.after, part.matrix, part.before) if F is not None]
        for term in _product([_terms(F, owners) for F in chain]):
            found[term.factors] = max(term.constant, found.get(term.factors, 0.0))
    return tuple(NormTerm(constant, factors) for factors, constant in found.items())


def _terms(A: LinearOperator, owners: Mapping[int, int]) -> list[NormTerm]:
    """The terms of one operator of a product, some tensors of which are those of a value."""
    if isinstance(A, ProductMatrix):
        return _product([_terms(F, owners) for F in A.factors])
    if isinstance(A, SumMatrix):
        return [term for F in A.terms for term in _terms(F, owners)]
    if isinstance(A, CroppedMatrix | TransposedMatrix):
        return _terms(A.padded if isinstance(A, CroppedMatrix) else A.operator, owners)
    if isinstance(A, ContractionMatrix) and A.core.requires_grad:
        return [NormTerm(1.0, (owners[A.core.untyped_storage().data_ptr()],))]
    _refuse_unknown(A)
    return [NormTerm(_fixed(A), ())]


def _refuse_unknown(A: LinearOperator) -> None:
    """Raise if an operator that has no terms is made of tensors of the value."""
    if any(t.requires_grad for t in named_tensors(A).values()):
        raise TypeError(
            f"norm_terms(A): how a {type(A).__name__} bounds the matrix that it is a part of is "
            "not known.\nIt is made of tensors of the matrix.\n"
            "Register a rule with @norm_terms.register in the file of the structure."
        )


def _product(chain: list[list[NormTerm]]) -> list[NormTerm]:
    """Every term times every term."""
    made = [NormTerm(1.0, ())]
    for terms in chain:
        made = [
            NormTerm(a.constant * b.constant, tuple(sorted({*a.factors, *b.factors})))
            for a in made
            for b in terms
        ]
    return made


def _fixed(A: LinearOperator) -> float:
    """`sqrt(||A||_1 ||A||_inf)`, at least the spectral norm; selections and sums have just it."""
    size = mapped(A, Tensor.abs)
    rows, columns = (
        float((M @ torch.ones(M.shape[-1], dtype=M.dtype)).amax()) for M in (size, size.T)
    )
    return (rows * columns) ** 0.5
