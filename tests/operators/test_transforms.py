"""The line that docs/algebra.md draws: which functions of values compile to one graph, and vmap."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from matrigami import (
    LinearOperator,
    cholesky,
    diagonal,
    eigh,
    entries,
    exp,
    inverse,
    kron,
    logdet,
    lstsq,
    norm,
    pinv,
    power,
    shift,
    solve,
    sqrt,
    svd,
    svdvals,
    take_rows,
    trace,
)
from matrigami.operators import compose
from matrigami.structures import EXAMPLES

N = 12

QUESTIONS: dict[str, Callable[[LinearOperator, Tensor], Tensor]] = {
    "product": lambda A, b: A @ b,
    "adjoint": lambda A, b: A.H @ b,
    "arithmetic": lambda A, b: (2.0 * A + A.T - A / 3) @ b,
    "compose": lambda A, b: compose(A, A.H) @ b,
    "kron": lambda A, b: kron(A, A) @ b.repeat(N, 1),
    "solve": lambda A, b: solve(shift(A, 5.0), b),
    "inverse": lambda A, b: inverse(shift(A, 5.0)) @ b,
    "logdet": lambda A, b: logdet(shift(A, 5.0)),
    "trace": lambda A, b: trace(A),
    "diagonal": lambda A, b: diagonal(A),
    "entries": lambda A, b: entries(A, torch.tensor([0, 3]), torch.tensor([1, 3])),
    "take_rows": lambda A, b: take_rows(A, torch.tensor([0, 3])),
    "norm": lambda A, b: norm(A) + norm(A, 2),
    "svdvals": lambda A, b: svdvals(A),
    "svd": lambda A, b: svd(A).values.sum(),
    "eigh": lambda A, b: eigh(A + A.H).values.sum(),
    "cholesky": lambda A, b: cholesky(gram(A)) @ b,
    "sqrt": lambda A, b: sqrt(gram(A)) @ b,
    "power": lambda A, b: power(gram(A), -0.25) @ b,
    "exp": lambda A, b: exp(A) @ b,
    "pinv": lambda A, b: pinv(gram(A)) @ b,
    "lstsq": lambda A, b: lstsq(gram(A), b),
}

NOT_COMPILED = {
    "kronecker_sum": {"solve", "inverse"},
    "kronecker": {"solve"},
    "banded": {"solve", "inverse"},
    "hodlr": {"solve"},
}
"""Where the derivative is that of the equation, by a function that Dynamo cannot trace."""

QUICK = {"dense", "diagonal", "lowrank", "kronecker"}
"""The others take ten seconds each to trace."""


def gram(A: LinearOperator) -> LinearOperator:
    """Positive definite."""
    return shift(compose(A, A.H), 1.0)


def member(name: str, seed: int = 0) -> LinearOperator:
    return EXAMPLES[name].init(N, N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does, in torch 2.13
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EXAMPLES],
)
def test_functions_of_a_value_are_one_graph(name):
    torch._dynamo.reset()
    asked = [ask for key, ask in QUESTIONS.items() if key not in NOT_COMPILED.get(name, ())]

    def answers(A: LinearOperator, b: Tensor) -> list[Tensor]:
        return [ask(A, b) for ask in asked]

    A, b = member(name), torch.randn(N, 2)
    got = torch.compile(answers, fullgraph=True, backend="eager")(A, b)
    for a, wanted in zip(got, answers(A, b), strict=True):
        torch.testing.assert_close(a, wanted)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)
def test_vmap_over_a_stack_asks_each_member(name, ask):
    members, b = [member(name, seed) for seed in range(2)], torch.randn(N, 2)
    S = pytree.tree_map(lambda *ts: torch.stack(ts), *members)  # a stack of values is a value
    got = torch.vmap(ask, in_dims=(0, None))(S, b)
    torch.testing.assert_close(got, torch.stack([ask(A, b) for A in members]))
