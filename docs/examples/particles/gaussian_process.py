"""Gaussian process regression on a line: hyper-parameters by the gradient of the exact likelihood.

    python docs/examples/particles/gaussian_process.py [points]

The covariance is HODLR with a diagonal, so that `solve` and `logdet` are direct: 100 000 points
take seconds for each step.
"""

import math
import sys

import torch

import matrigami as mg
from matrigami.geometry.particles import kernel_matrix


def fit(n: int, steps: int = 15) -> tuple[float, float, float]:
    """Fit scale, noise variance and the log likelihood per point of `n` noisy samples."""
    torch.manual_seed(0)
    x = torch.rand(n, dtype=torch.float64)
    y = torch.sin(12 * x) + 0.3 * torch.randn(n, dtype=torch.float64)
    parameters = torch.tensor([0.1, 1.0, 1.0], dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        """Minus the log marginal likelihood, for each point."""
        optimizer.zero_grad()
        scale, variance, noise = parameters.exp()
        K = variance * kernel_matrix(x, "matern32", scale=scale)
        A = K + mg.DiagonalMatrix(noise.expand(n))
        value = 0.5 * (y @ mg.solve(A, y) + mg.logdet(A) + n * math.log(2 * math.pi)) / n
        value.backward()
        return value.detach()

    optimizer.step(loss)
    scale, _, noise = parameters.detach().exp().tolist()
    return scale, noise, -float(loss())


if __name__ == "__main__":
    scale, noise, likelihood = fit(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
    print(f"scale {scale:.3f}, noise variance {noise:.4f} (0.0900 drawn), {likelihood:.4f} a point")
