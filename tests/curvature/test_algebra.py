"""The functions of the algebra on curvature, against the dense matrix."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import CurvatureMatrix, damped, ekfac, kfac, kfoc
from matrigami.operators import SpectralMatrix, cost
from matrigami.structures import KroneckerMatrix
from tests.curvature import reference

METHODS = {"kfac": kfac, "ekfac": ekfac, "kfoc": kfoc}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
joints = pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])


def network():
    """One of each: a convolution with groups, a norm, a structured and a dense layer."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 2, groups=2),
        nn.Flatten(),
        nn.LayerNorm(8),
        mg.nn.StructuredLinear(8, 4, mg.Monarch(2)),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def made(method=kfac, joint=True):
    model = network()
    batch = (torch.randn(12, 2, 3), torch.randint(3, (12,)))
    return model, method(model, nn.CrossEntropyLoss(), batch, joint=joint)


@methods
@joints
def test_products_and_questions(method, joint):
    _, F = made(method, joint)
    D, X = F.dense(), torch.randn(F.shape[0], 3)
    assert_close(D, D.mT)
    assert_close(F @ X, D @ X)
    assert_close(F.T @ X, D @ X)
    assert_close(F @ X[:, 0], D @ X[:, 0])
    assert_close(mg.trace(F), D.trace())
    assert_close(mg.diagonal(F), D.diagonal())
    assert_close(mg.norm(F), torch.linalg.matrix_norm(D))
    assert_close(mg.norm(F, 2), torch.linalg.matrix_norm(D, 2))
    assert_close(mg.norm(F, 1), torch.linalg.matrix_norm(D, "nuc"))
    assert_close((2 * F).dense(), 2 * D)
    assert_close((F + F).dense(), 2 * D)
    assert cost(F).params < D.numel()


@methods
@joints
def test_exact_damping_is_the_dense_answer(method, joint):
    _, F = made(method, joint)
    D, X = F.dense() + 0.1 * torch.eye(F.shape[0]), torch.randn(F.shape[0], 3)
    shifted = damped(F, 0.1)
    assert_close(shifted.dense(), D, atol=1e-9, rtol=1e-9)
    assert_close(mg.solve(shifted, X), torch.linalg.solve(D, X), atol=1e-9, rtol=1e-9)
    assert_close(mg.inverse(shifted).dense(), torch.linalg.inv(D), atol=1e-9, rtol=1e-9)
    assert_close(mg.logdet(shifted), torch.logdet(D), atol=1e-9, rtol=1e-9)
    assert all(isinstance(block, SpectralMatrix) for block in shifted.blocks)


@methods
def test_damping_in_solve_is_the_same(method):
    _, F = made(method)
    X = torch.randn(F.shape[0], 2)
    assert_close(mg.solve(F, X, 0.1), mg.solve(damped(F, 0.1), X))


@methods
def test_powers(method):
    _, F = made(method)
    shifted = damped(F, 0.1)
    root = mg.power(shifted, -0.5)
    assert_close((root @ root).dense(), mg.inverse(shifted).dense(), atol=1e-9, rtol=1e-9)
    assert_close(mg.power(F, 2).dense(), F.dense() @ F.dense(), atol=1e-10, rtol=1e-9)


@methods
def test_eigenpairs(method):
    _, F = made(method)
    D = F.dense()
    values, vectors = mg.eigh(F)
    Q = vectors.dense()
    assert_close(Q.mT @ Q, torch.eye(len(Q)))
    assert_close(Q @ values.diag() @ Q.mT, D)
    assert_close(values.sort().values, torch.linalg.eigvalsh(D), atol=1e-12, rtol=1e-9)
    top, Q = mg.eigh(F, k=3)
    assert_close(top, torch.linalg.eigvalsh(D).flip(0)[:3])
    assert_close(D @ Q.dense(), Q.dense() * top)


def test_damping_by_the_eigenvalues_of_the_factors():
    """The formula that needs no dense matrix: `l_B l_A + damping` in the basis of both."""
    _, F = made()
    block = F["5.weight"]
    (b, P), (a, Q) = (torch.linalg.eigh(factor.dense()[0]) for factor in block.factors)
    V = torch.randn(3, 5)
    inner = (P.mT @ V @ Q) / (b[:, None] * a + 0.1)
    expected = P @ inner @ Q.mT
    found = mg.solve(damped(F, 0.1)["5.weight"], V.reshape(1, -1, 1)).view(3, 5)
    assert_close(found, expected, atol=1e-10, rtol=1e-10)
    logs = (b[:, None] * a + 0.1).log().sum()
    assert_close(mg.logdet(damped(F, 0.1)["5.weight"])[0], logs)


@joints
def test_factored_damping_is_two_inverses(joint):
    _, F = made(kfac, joint)
    split = damped(F, 0.1, "pi")
    B, A = (factor.dense()[0] for factor in F["5.weight"].factors)
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
    left, right = B + 0.1**0.5 / pi * torch.eye(3), A + 0.1**0.5 * pi * torch.eye(len(A))
    block = split["5.weight"]
    assert isinstance(block, KroneckerMatrix)
    assert_close(block.dense()[0], torch.kron(left, right))
    expected = torch.kron(torch.linalg.inv(left), torch.linalg.inv(right))
    assert_close(mg.inverse(block).dense()[0], expected, atol=1e-9, rtol=1e-9)
    assert_close(mg.logdet(block)[0], torch.logdet(torch.kron(left, right)))
    assert_close(mg.logdet(split), torch.logdet(split.dense()))


def test_factored_damping_of_a_zero_factor_is_finite():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].bias.data.fill_(-100.0)
    F = kfac(model, nn.CrossEntropyLoss(), (torch.randn(6, 4), torch.randint(3, (6,))))
    v = torch.ones(F.shape[0])
    assert mg.solve(damped(F, 0.1, "pi"), v).isfinite().all()
    assert_close(mg.solve(damped(F, 0.1), v)[:25], torch.full((25,), 10.0))


def test_undamped_and_undersampled_is_inverted_with_damping_only():
    """Fewer examples than features: singular, and exactly so after damping."""
    model = nn.Linear(30, 3)
    F = kfac(model, nn.CrossEntropyLoss(), (torch.randn(5, 30), torch.randint(3, (5,))))
    D = F.dense() + 1e-3 * torch.eye(F.shape[0])
    v = torch.randn(F.shape[0])
    assert_close(mg.solve(F, v, 1e-3), torch.linalg.solve(D, v), atol=1e-8, rtol=1e-8)


@joints
def test_named_tensors_make_a_vector_and_back(joint):
    model, F = made(kfac, joint)
    tensors = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    v = F.vector(tensors)
    assert_close(v, torch.cat([t.reshape(-1) for t in tensors.values()]))
    back = F.tensors(v)
    assert list(back) == list(tensors)
    for name, t in tensors.items():
        assert_close(back[name], t)
    X = torch.randn(F.shape[0], 2)
    assert_close(F.join(F.split(X)), X)


@joints
def test_blocks_by_name_are_those_of_the_whole(joint):
    model, F = made(kfac, joint)
    assert isinstance(F, CurvatureMatrix)
    D = F.dense()
    for names, block in zip(F.names, F.blocks, strict=True):
        assert all(F[name] is block for name in names)
        assert_close(reference.block(D, model, names, block.shape[0]), block.dense())


def test_an_einsum_of_named_gradients_is_the_product_of_the_matrices():
    """`(B (x) A) vec(V) = vec(B V A)`, row-major, for a weight without bias."""
    model = nn.Linear(4, 3, bias=False)
    F = kfac(model, nn.CrossEntropyLoss(), (torch.randn(6, 4), torch.randint(3, (6,))))
    B, A = (factor.dense()[0] for factor in F["weight"].factors)
    V = torch.randn(3, 4)
    assert_close(F.tensors(F @ F.vector({"weight": V}))["weight"], B @ V @ A)


def test_a_curvature_is_a_tree_of_tensors():
    _, F = made()
    leaves, layout = torch.utils._pytree.tree_flatten(F)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert_close(torch.utils._pytree.tree_unflatten(leaves, layout).dense(), F.dense())
