"""What the questions answer in corner cases, and what they say when they cannot."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree

from matrigami import (
    DenseMatrix,
    DiagonalMatrix,
    KroneckerMatrix,
    LinearOperator,
    LowRankMatrix,
    cost,
    eigh,
    inverse,
    logdet,
    norm,
    power,
    slogdet,
    solve,
    sqrt,
    svdvals,
    to_scipy,
    trace,
)
from matrigami.operators import (
    CroppedMatrix,
    InverseMatrix,
    ProductMatrix,
    ScaledMatrix,
    SumMatrix,
    TransposedMatrix,
    named_tensors,
    with_tensors,
)


def few_lines(caught: pytest.ExceptionInfo) -> list[str]:
    lines = str(caught.value).splitlines()
    assert 2 <= len(lines) <= 3
    return lines


@pytest.mark.parametrize("shape", [(4,), (4, 2), (2, 4, 3), ()])
def test_product_with_the_wrong_axis(shape):
    A = LowRankMatrix(torch.ones(5, 1), torch.ones(3, 1))
    with pytest.raises(ValueError, match="5x3") as caught:
        _ = A @ torch.ones(shape)
    head, to_do = few_lines(caught)
    assert str(shape) in head
    assert "must be 3" in to_do
    assert "LowRankMatrix" in to_do


@pytest.mark.parametrize("shape", [(4,), (4, 2), (2, 4, 3), ()])
def test_solution_with_the_wrong_axis(shape):
    with pytest.raises(ValueError, match="3x3") as caught:
        solve(DenseMatrix(torch.eye(3)), torch.ones(shape))
    head, to_do = few_lines(caught)
    assert str(shape) in head
    assert "must be 3" in to_do


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(lambda A: solve(A, torch.ones(2)), id="solve"),
        inverse,
        slogdet,
        logdet,
        trace,
        eigh,
        sqrt,
        pytest.param(lambda A: power(A, 2), id="power"),
    ],
)
def test_questions_of_squares_refuse_rectangles(question):
    with pytest.raises(ValueError, match="2x3 DenseMatrix") as caught:
        question(DenseMatrix(torch.ones(2, 3)))
    few_lines(caught)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("question", [inverse, slogdet, trace, power])
def test_questions_of_a_tensor_say_how_to_wrap_it(question):
    with pytest.raises(TypeError, match=r"Wrap a matrix of numbers: DenseMatrix\(A\)"):
        question(torch.eye(2), *([2] if question is power else []))


def test_sums_of_different_sizes():
    with pytest.raises(ValueError, match="A is 2x2, but B is 3x3"):
        _ = DenseMatrix(torch.eye(2)) + DenseMatrix(torch.eye(3))


@pytest.mark.usefixtures("unchecked")
def test_sums_with_numbers():
    A = DenseMatrix(torch.eye(2))
    torch.testing.assert_close((A + torch.ones(2, 2)).dense(), torch.eye(2) + 1)
    for other in (3.0, torch.ones(2), "text"):
        with pytest.raises(TypeError) as caught:
            _ = A + other
        few_lines(caught)


def test_real_powers_need_a_positive_symmetric_matrix():
    with pytest.raises(ValueError, match="does not equal its adjoint"):
        power(DenseMatrix(torch.tensor([[1.0, 1.0], [0.0, 1.0]])), 0.5)
    with pytest.raises(ValueError, match="smallest eigenvalue of A is -1") as caught:
        power(DiagonalMatrix(torch.tensor([1.0, -1.0])), 0.5)
    few_lines(caught)
    with pytest.raises(ValueError, match="positive definite"):
        power(DenseMatrix(torch.diag(torch.tensor([1.0, 0.0]))), -0.5)
    half = power(DenseMatrix(torch.diag(torch.tensor([4.0, 0.0]))), 0.5)
    torch.testing.assert_close(half.dense(), torch.diag(torch.tensor([2.0, 0.0])))


def test_number_of_eigenvalues_out_of_range():
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k={k}"):
            eigh(DenseMatrix(torch.eye(2)), k)


def test_logdet_of_a_negative_determinant_is_nan():
    assert math.isnan(float(logdet(DiagonalMatrix(torch.tensor([1.0, -2.0])))))
    assert float(logdet(DiagonalMatrix(torch.tensor([-1.0, -2.0])))) == pytest.approx(math.log(2))


def test_scipy_refuses_a_stack():
    with pytest.raises(ValueError, match="stack"):
        to_scipy(DenseMatrix(torch.ones(2, 3, 3)))


def test_scipy_solves_with_it():
    from scipy.sparse.linalg import cg

    F = torch.randn(6, 6)
    A = DenseMatrix(F @ F.T + torch.eye(6))
    x, failed = cg(to_scipy(A), torch.ones(6).numpy(), rtol=1e-12)
    assert not failed
    torch.testing.assert_close(torch.as_tensor(x), solve(A, torch.ones(6)))


def test_inverse_of_an_inverse_is_the_operator():
    A = TransposedMatrix(DenseMatrix(torch.randn(3, 3)))
    inverted = inverse(A)
    assert isinstance(inverted, InverseMatrix)
    assert inverse(inverted) is A


def test_sums_and_products_stay_flat():
    A, B = DiagonalMatrix(torch.ones(3)), LowRankMatrix(torch.ones(3, 1), torch.ones(3, 1))
    K = KroneckerMatrix(torch.ones(3, 3), torch.ones(1, 1))
    total = A + B + K + A
    assert isinstance(total, SumMatrix)
    assert len(total.terms) == 3  # the two diagonals are one
    product = K @ A @ K
    assert isinstance(product, ProductMatrix)
    assert len(product.factors) == 3
    multiple = 2.0 * (3.0 * product)
    assert isinstance(multiple, ScaledMatrix)
    assert float(multiple.factor) == 6.0


def test_transposing_twice_is_free():
    A = TransposedMatrix(LowRankMatrix(torch.ones(3, 1), torch.ones(4, 1)))
    assert A.T is A.operator


def test_cost_of_a_composite_is_the_sum():
    A, B = DenseMatrix(torch.ones(3, 4)), LowRankMatrix(torch.ones(3, 1), torch.ones(4, 1))
    assert cost(A + B) == (12 + 7, 12 + 7, 8 * 19)
    assert cost(CroppedMatrix(A, 2, 2)) == cost(A)


def test_schatten_norms():
    A = DiagonalMatrix(torch.tensor([3.0, -4.0]))
    values = {None: 5.0, 1: 7.0, 2: 4.0, torch.inf: 4.0, 3: (27 + 64) ** (1 / 3)}
    for order, wanted in values.items():
        assert float(norm(A, order)) == pytest.approx(wanted)
    torch.testing.assert_close(svdvals(A), torch.tensor([4.0, 3.0]))


# ---------------------------------------------------------------- values as trees of tensors


def nested() -> LinearOperator:
    low = LowRankMatrix(torch.randn(4, 2), torch.randn(3, 2))
    return 2.0 * (KroneckerMatrix(low, torch.randn(2, 2)) @ DenseMatrix(torch.randn(6, 6)))


def test_names_of_nested_tensors():
    assert list(named_tensors(nested())) == [
        "operator_factors_0_left_U",
        "operator_factors_0_left_V",
        "operator_factors_0_right",
        "operator_factors_1_entries",
        "factor",
    ]


def test_with_tensors_takes_them_in_the_order_of_their_names():
    A = nested()
    doubled = with_tensors(A, iter([2 * t for t in named_tensors(A).values()]))
    wanted = 2.0**5 * A.dense()  # three tensors of the Kronecker product, the other, the factor
    torch.testing.assert_close(doubled.dense(), wanted)


def test_leaves_may_be_anything():
    """A tree of sizes, gradients or None has the same structure as the tree of tensors."""
    A = nested()
    sizes = pytree.tree_map(lambda t: t.numel(), A)
    assert type(sizes) is type(A)
    assert pytree.tree_leaves(sizes) == [8, 6, 4, 36, 1]
    leaves, spec = pytree.tree_flatten(A)
    assert pytree.tree_flatten(sizes)[1] == spec
    total = pytree.tree_map(lambda t, size: t.numel() - size, A, sizes)
    assert pytree.tree_leaves(total) == [0] * len(leaves)


def test_values_are_immutable():
    from dataclasses import FrozenInstanceError

    with pytest.raises(FrozenInstanceError):
        DenseMatrix(torch.eye(2)).entries = torch.eye(3)


def test_repr_counts_stacks():
    assert repr(DenseMatrix(torch.ones(2, 3, 4, 5))) == "DenseMatrix(2x3 of 4x5, 120 parameters)"
