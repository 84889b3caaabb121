"""Energies of particles that interact in pairs, and the forces between them.

Shapes: n = particles, d = dimension.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.geometry.particles._kernels import Kernel
from matrigami.geometry.particles._matrix import kernel_matrix
from matrigami.geometry.particles._points import checked_points


def potential_energy(
    points: Float[Tensor, "..."],
    charges: Float[Tensor, "..."],
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
    if charges.shape != points.shape[:1]:
        raise ValueError(
            f"potential_energy: {points.shape[0]} points have charges of shape "
            f"{tuple(charges.shape)}.\nGive one number for each point."
        )
    A = kernel_matrix(points, kernel, scale=scale, tol=tol)
    return 0.5 * (charges * (A @ charges)).sum()


def forces(
    points: Float[Tensor, "..."],
    charges: Float[Tensor, "..."],
    kernel: str | Kernel,
    *,
    scale: Tensor | float = 1.0,
    tol: float | None = None,
) -> Float[Tensor, "..."]:
    """Minus the gradient of the potential energy: the force on each particle.

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
        energy = potential_energy(X, charges.detach(), kernel, scale=scale, tol=tol)
        return -torch.autograd.grad(energy, X)[0]
