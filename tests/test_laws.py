"""Every structure obeys the law suite: its example, its variants, and values made from it."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from matrigami import (
    BlockTensorTrain,
    Einsum,
    Hadamard,
    Kronecker,
    KroneckerSum,
    LinearOperator,
    LowRank,
    LowRankMatrix,
    Monarch,
    Structure,
    TensorTrain,
    direct_sum,
    face_split,
    inverse,
    khatri_rao,
    kron,
)
from matrigami.operators import (
    CroppedMatrix,
    DenseMatrix,
    ProductMatrix,
    ScaledMatrix,
    SumMatrix,
    TransposedMatrix,
    contraction,
)
from matrigami.structures import EXAMPLES
from matrigami.testing import LAWS, SIZES, Size, check_operator, check_structure

VARIANTS: dict[str, tuple[Structure, tuple[Size, ...]]] = {
    "kronecker_of_rectangles": (Kronecker(factors=((2, 3), (3, 2))), ((6, 6),)),
    "kronecker_of_three": (Kronecker(factors=3), ((8, 8), (8, 12), (12, 8))),
    "kronecker_of_uneven": (Kronecker(factors=((1, 4), (6, 1))), ((6, 4),)),
    "kronecker_sum_of_sizes": (KroneckerSum(factors=(2, 4)), ((8, 8),)),
    "low_rank_by_fraction": (LowRank(rank=0.5), ((5, 7), (8, 8))),
    "low_rank_full": (LowRank(rank=1.0), ((4, 6), (5, 5))),
    "monarch_square_blocks": (Monarch(blocks=3), ((9, 9), (12, 12))),
    "monarch_blocked": (Monarch(blocks=2, interleaved=False), ((4, 6), (8, 8))),
    "monarch_of_rank": (Monarch(blocks=2, rank=2), ((8, 6), (8, 8))),
    "monarch_one_block": (Monarch(blocks=1), ((3, 5), (4, 4))),
    "tt_of_three": (TensorTrain(rank=2, cores=3), ((8, 8), (8, 12))),
    "tt_full": (TensorTrain(rank=1.0), ((4, 6), (4, 4))),
    "btt_interleaved": (BlockTensorTrain(rank=2, interleaved=True), ((6, 8), (16, 16))),
    "btt_of_three": (BlockTensorTrain(rank=2, cores=3), ((8, 8), (12, 8))),
    "btt_of_three_interleaved": (BlockTensorTrain(rank=1, cores=3, interleaved=True), ((8, 12),)),
    "btt_full": (BlockTensorTrain(rank=1.0), ((4, 6), (9, 9))),
    "einsum_dense": (Einsum(theta=(0, 0, 1, 0, 0, 1, 0)), ((3, 5), (4, 4))),
    "einsum_low_rank": (Einsum(theta=(1, 0, 0, 0, 1, 0, 0.5)), ((4, 9), (5, 5))),
    "einsum_kronecker": (Einsum(theta=(0.5, 0.5, 0, 0.5, 0.5, 0, 0)), ((4, 6), (9, 9))),
    "einsum_b_first": (Einsum(dims=(2, 3, 1, 3, 2, 1, 2)), ((6, 6),)),
    "einsum_all_seven": (Einsum(dims=(2, 2, 2, 2, 3, 2, 2)), ((12, 8),)),
    "einsum_interleaved": (Einsum(dims=(2, 2, 2, 2, 2, 3, 2), interleaved=True), ((12, 8),)),
}
"""Recipes that take other paths through the same file, at the sizes that they are for."""

FEW = SIZES[::2]
"""Of each kind one: what is asked each day."""

LONG = {"monarch_one_block", "einsum_dense", "tt_full", "kron_of_three", "square_direct_sum"}
"""Ten seconds each, and like others."""


def by_day(names):
    """All of them, the long ones marked."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in names]


each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)


@each_law
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_obey(name: str, law):
    check_structure(EXAMPLES[name], FEW, [law])


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_obey_at_every_size(name: str):
    check_structure(EXAMPLES[name])


@pytest.mark.parametrize("name", by_day(VARIANTS))
def test_variants_obey(name: str):
    recipe, sizes = VARIANTS[name]
    check_structure(recipe, sizes)


def values() -> dict[str, LinearOperator]:
    """One of each value that no recipe makes, of rectangles and of squares."""
    tall, wide, square = (
        torch.randn(*size, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, size in enumerate(((4, 2), (2, 5), (3, 3)))
    )
    low, dense = LowRankMatrix(tall, wide.mT.contiguous()), DenseMatrix(square)
    train = BlockTensorTrain().init(9, 9, generator=torch.Generator().manual_seed(3))
    factor = torch.tensor(-1.5, dtype=torch.float64)
    return {
        "sum": SumMatrix((low, DenseMatrix(tall @ wide))),
        "square_sum": SumMatrix((dense, dense.T)),
        "product": ProductMatrix((low, low.T, low)),
        "square_product": ProductMatrix((dense, dense.T)),
        "multiple": ScaledMatrix(low, factor),
        "square_multiple": ScaledMatrix(train, factor),
        "pulled_back": TransposedMatrix(low),
        "square_pulled_back": TransposedMatrix(train),
        "corner": CroppedMatrix(low, 3, 4),
        "square_corner": CroppedMatrix(train, 7, 7),
        "inverse": inverse(ProductMatrix((dense, dense))),
        "direct_sum": direct_sum(tall, low, square),
        "square_direct_sum": direct_sum(square, train, kron(square, square)),
        "square_direct_sum_of_rectangles": direct_sum(tall, tall.mT),
        "khatri_rao": khatri_rao(tall, wide[:, :2]),
        "square_khatri_rao": khatri_rao(wide[:, :4], tall.mT[:, :]),
        "face_split": face_split(tall, tall),
        "kron_of_values": kron(low, train),
        "contraction": contraction(wide.flatten(), "(a b)", "b s", "s a", a=2, b=5, s=2),
        "square_contraction": contraction(square, "b a", "b a s", "b a s", a=3, b=3, s=2),
        "kron_of_three": kron(square, dense, train),
    }


@pytest.mark.parametrize("name", by_day(values()))
def test_values_without_a_recipe_obey(name: str):
    check_operator(values()[name])


@given(
    name=st.sampled_from(list(EXAMPLES)),
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    square=st.booleans(),
)
@settings(max_examples=40)
def test_examples_obey_at_any_size(name: str, m: int, n: int, square: bool):
    quick = [
        law
        for law in LAWS
        if law.__name__ in {"products", "traces", "batches", "costs", "members_are_found_again"}
    ]
    check_structure(EXAMPLES[name], [(2, 2), (m, m if square else n)], quick)


class Wrong(DenseMatrix):
    """A dense matrix whose transpose forgets to transpose."""

    @property
    def T(self) -> "Wrong":
        return self


def test_a_broken_law_is_named():
    with pytest.raises(AssertionError, match=r"Wrong\(2x2, 4 parameters\) breaks .*'transpose'"):
        check_operator(Wrong(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))


def test_a_recipe_must_accept_some_size():
    with pytest.raises(AssertionError, match="refuses all of the sizes"):
        check_structure(EXAMPLES["diagonal"], [(2, 3)])


def test_a_law_that_raises_is_reported_with_recipe_and_size():
    def law(recipe: Structure, m: int, n: int) -> None:
        raise ZeroDivisionError("no")

    with pytest.raises(AssertionError, match=r"LowRank.* at 3x4 breaks the law 'law': raised Zero"):
        check_structure(LowRank(rank=1), [(3, 4)], [law])


def test_hadamard_is_checked_with_other_ranks():
    check_structure(Hadamard(rank=1), [(4, 3)])
