"""Energies of particles that interact in pairs, and the forces between them.

Shapes: n = particles, d = dimension.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.geometry.particles._kernels import Kernel
from matrigami.geometry.particles._matrix import kernel_matrix
from matrigami.geometry.particles._points import Numbers, as_numbers, checked_points
from matrigami.operators import as_array


def potential_energy(
    points: Numbers,
    charges: Numbers,
    kernel: str | Kernel,
    *,
    scale: Tensor | float = 1.0,
    tol: float | None = None,
) -> Float[Tensor, ""]:
    """`1/2 sum_ij q_i q_j K(|x_i - x_j|)`, every pair once; differentiable.

    Args:
        points: Places of the particles.
        charges: Their charges, or masses; like ones repel.
        kernel: The potential of a unit charge (see `kernel_matrix`).
        scale: What distances are divided by.
        tol: Relative error of the potentials.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> potential_energy(x, torch.tensor([3.0, 1.0]), "laplace")
        tensor(1.5000)
    """
    X = checked_points("points", points)
    q = as_numbers("charges", charges).to(X)
    if q.shape != X.shape[:1] or not bool(q.detach().isfinite().all()):
        raise ValueError(
            f"potential_energy: {len(X)} points have charges of shape {tuple(q.shape)}, "
            f"{int((~q.detach().isfinite()).sum())} of them NaN or infinite.\n"
            "Give one number for each point."
        )
    A = kernel_matrix(X, kernel, scale=scale, tol=tol)
    return 0.5 * (q * (A @ q)).sum()


def forces(
    points: Numbers,
    charges: Numbers,
    kernel: str | Kernel,
    *,
    scale: Tensor | float = 1.0,
    tol: float | None = None,
) -> Any:
    """Minus the gradient of the potential energy: the force on each particle; arrays for arrays.

    The derivative of an interpolated potential has about one digit less than the potential.

    Args:
        points: As for `potential_energy`, and so `charges`, `kernel`, `scale`, `tol`.
        charges: Their charges.
        kernel: The potential.
        scale: What distances are divided by.
        tol: Relative error of the potentials.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> forces(x, torch.ones(2), "laplace")[:, 0]
        tensor([-0.2500,  0.2500])
    """
    with torch.enable_grad():
        X = checked_points("points", points).detach().requires_grad_()
        q = as_numbers("charges", charges).detach()
        energy = potential_energy(X, q, kernel, scale=scale, tol=tol)
        (gradient,) = torch.autograd.grad(energy, X)
    found = -gradient.reshape(np.shape(points))
    return as_array(found) if isinstance(points, np.ndarray) else found
