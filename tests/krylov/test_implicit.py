"""Derivatives of a solution: every mode, every nesting, real and complex, mapped."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import matrigami as mg
from matrigami.krylov import cg, implicit_solve, solve_iteratively

N = 4


def by_lu(A: mg.LinearOperator, B: Tensor) -> Tensor:
    """A solver for values only; torch's own rule for its second derivative would be wrong."""
    return torch.linalg.solve(A.dense().to(B.dtype), B)


def exact(M: Tensor, B: Tensor) -> Tensor:
    """Right in every order, unlike `torch.linalg.solve`."""
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(M), B)


def regular(dtype: torch.dtype = torch.float64, *batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    M = torch.randn(*batch, N, N, generator=generator, dtype=dtype)
    return M + 3 * torch.eye(N, dtype=dtype)


def right(dtype: torch.dtype = torch.float64, *batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*batch, N, 2, generator=generator, dtype=dtype)


def implicit(M: Tensor, B: Tensor) -> Tensor:
    return implicit_solve(mg.DenseMatrix(M), B, by_lu)


def iterated(M: Tensor, B: Tensor) -> Tensor:
    return solve_iteratively(mg.DenseMatrix(M), B)


WEIGHTS = right()


def loss(solve, M: Tensor) -> Tensor:
    """A function of the matrix in which both sides depend on it."""
    return (solve(M, WEIGHTS * M[:, :1].sin()).pow(3) * WEIGHTS).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_first_and_second_derivatives_by_differences(dtype):
    inputs = regular(dtype).requires_grad_(), right(dtype).requires_grad_()
    assert torch.autograd.gradcheck(implicit, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(implicit, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(
    ("of", "on"), [(torch.float64, torch.complex128), (torch.complex128, torch.float64)]
)
def test_mixed_types(of, on):
    inputs = regular(of).requires_grad_(), right(on).requires_grad_()
    assert torch.autograd.gradcheck(implicit, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(implicit, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("modes", list(itertools.product([jacrev, jacfwd], repeat=2)))
@pytest.mark.parametrize("solve", [implicit, iterated])
def test_second_derivatives_in_every_nesting(modes, solve):
    outer, inner = modes
    found = outer(inner(lambda M: loss(solve, M)))(regular())
    true = jacrev(jacrev(lambda M: loss(exact, M)))(regular())
    assert_close(found, true, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("modes", list(itertools.product([jacrev, jacfwd], repeat=3)))
def test_third_derivatives_in_every_nesting(modes):
    start, direction = regular(), WEIGHTS @ WEIGHTS.mT

    def along(solve):
        return lambda t: loss(solve, start + t * direction)

    point, found, true = torch.tensor(0.1), along(implicit), along(exact)
    for mode in modes:
        found, true = mode(found), jacrev(true)
    assert_close(found(point), true(point))


def test_second_derivative_of_the_inverse_of_a_number():
    x = lambda a: implicit(a * torch.eye(N), torch.ones(N, 1))[0, 0]  # noqa: E731
    for f in (grad(grad(x)), hessian(x), jacfwd(jacfwd(x))):
        assert_close(f(torch.tensor(2.0)), torch.tensor(2 / 8.0))


def test_transforms_of_torch_func():
    M, B, V = regular(), right(), right().flip(0)
    X, dX = jvp(lambda B: iterated(M, B), (B,), (V,))
    assert_close(X, exact(M, B))
    assert_close(dX, exact(M, V))
    _, pull = vjp(lambda B: iterated(M, B), B)
    assert_close(pull(V)[0], exact(M.mT, V))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mapped_right_hand_sides(axis):
    M, B = regular(), right(torch.float64, 3)
    found = vmap(lambda B: iterated(M, B), in_dims=axis)(B.movedim(0, axis))
    assert_close(found, exact(M.expand(3, N, N), B))


def test_mapped_matrices_and_nested_maps():
    M, B = regular(torch.float64, 3), right(torch.float64, 2)
    both = vmap(vmap(iterated, (None, 0)), (0, None))(M, B)
    assert_close(both, exact(M[:, None], B[None].expand(3, 2, N, 2)))
    gradients = vmap(grad(lambda M: loss(implicit, M)))(M)
    assert_close(gradients, torch.stack([grad(lambda M: loss(exact, M))(m) for m in M]))


def test_mapped_stacks_are_solved_one_by_one():
    M, B = regular(torch.float64, 3, 2), right()
    assert_close(vmap(implicit, (0, None))(M, B), exact(M, B.expand(3, 2, N, 2)))
    assert_close(vmap(implicit, (1, None))(M, B), exact(M, B.expand(3, 2, N, 2)).movedim(1, 0))


def test_mapped_tensors_of_a_composed_value():
    U, d, B = torch.randn(3, N, 1), torch.rand(N) + 1, right()

    def solve(U):
        return implicit_solve(mg.LowRankMatrix(U, U) + mg.DiagonalMatrix(d), B, by_lu)

    D = U @ U.mT + torch.diag(d)
    assert_close(vmap(solve)(U), exact(D, B.expand(3, N, 2)))


def test_a_stack_of_matrices_broadcasts_and_sums_its_gradient():
    M, B = regular(torch.float64, 3).requires_grad_(), right().requires_grad_()
    assert torch.autograd.gradcheck(implicit, (M, B), check_forward_ad=True)


def test_any_solver_gets_a_gradient():
    M = (regular() @ regular().mT).requires_grad_()
    solver = lambda A, B: cg(A, B, tol=1e-13).X  # noqa: E731
    function = lambda M: implicit_solve(mg.DenseMatrix((M + M.mT) / 2), right(), solver)  # noqa: E731
    assert torch.autograd.gradcheck(function, (M,), check_forward_ad=True)
