"""Every question about a matrix in half precision is answered in it, as in single precision."""

import pytest
import torch

from matrigami import (
    LinearOperator,
    cholesky,
    eigh,
    exp,
    inverse,
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
)
from matrigami.operators import EXAMPLES

ANSWERS = {
    "norm": norm,
    "nuclear norm": lambda A: norm(A, 1),
    "svdvals": svdvals,
    "svd": lambda A: (svd(A).U @ torch.diag(svd(A).values)) @ svd(A).V.H.dense(),
    "pinv": lambda A: pinv(A) @ torch.eye(4, dtype=A.dtype),
    "exp": lambda A: exp(A / 4) @ torch.eye(4, dtype=A.dtype),
    "solve": lambda A: solve(shift(A, 9.0), torch.ones(4, dtype=A.dtype)),
    "lstsq": lambda A: lstsq(shift(A, 9.0), torch.ones(4, dtype=A.dtype)),
    "inverse": lambda A: inverse(shift(A, 9.0)) @ torch.ones(4, dtype=A.dtype),
    "logdet": lambda A: logdet(shift(A, 9.0)),
    "power": lambda A: power(shift(A, 9.0), -2) @ torch.ones(4, dtype=A.dtype),
    "sqrt": lambda A: sqrt(shift(A @ A.T, 1.0)) @ torch.ones(4, dtype=A.dtype),
    "cholesky": lambda A: cholesky(shift(A @ A.T, 1.0)) @ torch.ones(4, dtype=A.dtype),
    "eigh": lambda A: eigh(shift(A @ A.T, 1.0)).values.sort().values,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EXAMPLES)
def test_half_precision_answers_as_single(name, dtype):
    A = EXAMPLES[name].init(4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for what, question in ANSWERS.items():
        found, wanted = question(A), question(A.to(torch.float32))
        assert isinstance(found, torch.Tensor | LinearOperator)
        assert found.dtype == dtype, what
        tolerance = 8 * torch.finfo(dtype).eps * (1 + float(wanted.abs().max()))
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=tolerance, msg=what)
