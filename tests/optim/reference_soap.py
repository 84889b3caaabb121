"""The published SOAP algorithm, for one matrix and as plainly as possible, to compare with."""

import torch
from torch import Tensor


class ReferenceSOAP:
    """Vyas et al. (2024), arXiv:2409.11321: the momentum is rotated back and forth in every step.

    The first gradient only makes the basis; from the second on each one is a step.
    """

    def __init__(self, W: Tensor, G: Tensor, lr: float, betas: tuple[float, float], frequency: int):
        self.W, self.lr, self.betas, self.frequency = W.clone(), lr, betas, frequency
        self.L, self.R = (1 - betas[1]) * G @ G.T, (1 - betas[1]) * G.T @ G
        self.P, self.Q = (torch.linalg.eigh(S).eigenvectors.flip(-1) for S in (self.L, self.R))
        self.M, self.V, self.t = torch.zeros_like(G), torch.zeros_like(G), 0

    def step(self, G: Tensor, weight_decay: float, eps: float = 1e-8) -> None:
        """Project, average, precondition, turn back; then the statistics and the refresh."""
        (b1, b2), P, Q = self.betas, self.P, self.Q
        self.t += 1
        H = P.T @ G @ Q
        M = b1 * (P.T @ self.M @ Q) + (1 - b1) * H
        self.V = b2 * self.V + (1 - b2) * H**2
        scale = (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
        U = P @ (scale * M / (self.V.sqrt() + eps)) @ Q.T
        self.W = self.W * (1 - self.lr * weight_decay) - self.lr * U
        self.M = P @ M @ Q.T
        self.L, self.R = b2 * self.L + (1 - b2) * G @ G.T, b2 * self.R + (1 - b2) * G.T @ G
        if self.t % self.frequency == 0:
            self.P, left = self._refresh(self.L, P)
            self.Q, right = self._refresh(self.R, Q)
            self.V = self.V[left][:, right]

    @staticmethod
    def _refresh(S: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        """Sort by Rayleigh quotients, one power step, QR."""
        order = (Q.T @ S @ Q).diagonal().argsort(descending=True)
        return torch.linalg.qr(S @ Q[:, order]).Q, order
