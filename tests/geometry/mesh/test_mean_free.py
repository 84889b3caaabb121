"""Grids without a Dirichlet boundary: `solve` says that they are singular, `lstsq` is mean-free."""

import pytest
import torch

from matrigami import lstsq, solve
from matrigami.geometry.mesh import DiffusionMatrix, Grid

GRIDS = {
    "cells": Grid((8, 8), boundary="neumann"),
    "torus": Grid((8, 6), boundary="periodic"),
    "line": Grid((9,), boundary="neumann"),
    "long line": Grid((5000,), boundary="neumann"),
    "large": Grid((80, 80), boundary=("neumann", "periodic")),
}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("name", GRIDS)
def test_solutions_are_refused_or_of_mean_zero(name, constant):
    G = GRIDS[name]
    A = G.stiffness() if constant else G.stiffness(lambda *x: 1 + x[0] ** 2)
    u = torch.randn(A.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u - u.mean()
    with pytest.raises(torch.linalg.LinAlgError, match="lstsq"):
        solve(A, A @ u)
    for b in (A @ u, A @ u + 1):
        torch.testing.assert_close(lstsq(A, b), u, rtol=1e-6, atol=1e-6)


def test_mean_free_solutions_have_derivatives():
    c = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    b = torch.linspace(-1, 1, 16).double()

    def energy(c):
        return lstsq(DiffusionMatrix.of(c, (1.0, 1.0), ("neumann", "neumann")), b) @ b

    assert torch.autograd.gradcheck(energy, c.requires_grad_())
