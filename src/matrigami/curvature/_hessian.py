"""The Hessian of a training loss, by products: `H v = d/dt grad(w + t v)`.

Forward-over-reverse differentiation costs about two gradients for each product (Pearlmutter 1994).
Nothing is stored.

Shapes: p = parameters in all, k = columns.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from matrigami.curvature._objective import Batch, Loss, Objective, join, objective, split, trainable
from matrigami.operators import LinearOperator

COLUMNS = 16
"""Columns differentiated together; bounds the memory of a product with a wide block."""


@dataclass(frozen=True, eq=False, repr=False)
class HessianMatrix(LinearOperator):
    """The Hessian of an objective at the given parameters, row-major in each of them."""

    parameters: tuple[Float[Tensor, "..."], ...]
    names: tuple[str, ...]
    objective: Objective

    @property
    def shape(self) -> tuple[int, int]:
        """Parameters in all, twice."""
        p = sum(t.numel() for t in self.parameters)
        return p, p

    def matmat(self, X: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
        """Differentiate the gradient along each column."""
        at = dict(zip(self.names, self.parameters, strict=True))
        total = torch.zeros_like(X)
        for inputs, targets, weight in self.objective:

            def loss(w: dict[str, Tensor], x: Any = inputs, y: Tensor = targets) -> Tensor:
                """The loss of one batch."""
                return self.objective.loss(self.objective.outputs(w, x), y)

            def product(v: Tensor, loss: Any = loss) -> Tensor:
                """One column: the gradient of the gradient along it."""
                _, pull = vjp(grad(loss), at)  # pyright: ignore[reportAssignmentType]
                return join(pull(split(v, at))[0])

            total = total + weight * columnwise(product, X)
        return total

    @property
    def T(self) -> "HessianMatrix":
        """Itself."""
        return self

    def dense(self) -> Float[Tensor, "p p"]:
        """The matrix itself, column by column."""
        return self.matmat(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))


def columnwise(product: object, X: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """Apply a product to each column, a few at a time."""
    if X.shape[-1] == 0:
        return X.clone()
    return vmap(product, in_dims=1, out_dims=1, chunk_size=COLUMNS, randomness="error")(X)  # pyright: ignore[reportArgumentType]


def hessian(model: nn.Module, loss: Loss, data: Iterable[Batch] | Batch) -> HessianMatrix:
    """The Hessian of the loss over the data with respect to the trainable parameters.

    Args:
        model: A model without random layers (call `eval()` to silence dropout).
        loss: Of outputs and targets; summed over batches if its `reduction` is `"sum"`, else
            averaged over examples.
        data: One batch `(inputs, targets)` or an iterable of batches.

    Returns:
        A symmetric operator of size `p x p`; `dense()` for small models, `matrigami.krylov` for its
        spectrum.

    Raises:
        ValueError: If nothing is trainable, or the data are empty or hold NaN.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> hessian(model, nn.MSELoss(), (x, torch.ones(1, 1))).dense()
        tensor([[2., 4.],
                [4., 8.]])
    """
    at = trainable(model)
    return HessianMatrix(tuple(at.values()), tuple(at), objective(model, loss, data))
