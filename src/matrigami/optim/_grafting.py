"""The size of an update from one method, its direction from another.

A graft is a value: what state it needs and how long its own step would be.

Shapes: b = blocks, m = rows, n = columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.optim._adam import over
from matrigami.optim._method import Options, State

Size = tuple[Float[Tensor, "b 1 1"], State]
"""The Frobenius norm of each step, and the next state."""


class Graft(NamedTuple):
    """A method of which only the size of the step is used.

    Args:
        init: The state, from a gradient.
        size: Norms and next state, from the gradient, the momentum, the state and the options.
    """

    init: Callable[[Tensor], State]
    size: Callable[[Tensor, Tensor, State, Options], Size]


def _no_state(G: Float[Tensor, "b m n"]) -> State:  # noqa: ARG001 - one signature for all grafts
    """Nothing to remember."""
    return {}


def _gradient_size(
    G: Float[Tensor, "b m n"],  # noqa: ARG001
    M: Float[Tensor, "b m n"],
    state: State,  # noqa: ARG001
    options: Options,  # noqa: ARG001
) -> Size:
    """The norm of the momentum."""
    return torch.linalg.vector_norm(M, dim=(-2, -1), keepdim=True), {}


def _second_moment(G: Float[Tensor, "b m n"]) -> State:
    """Adam's."""
    return {"V": torch.zeros_like(G)}


def _adam_size(
    G: Float[Tensor, "b m n"], M: Float[Tensor, "b m n"], state: State, options: Options
) -> Size:
    """The norm of the momentum over the root of the second moment."""
    b2, least = options["adam_betas"][1], torch.finfo(G.dtype).tiny ** 0.5
    epsilon = max(options["adam_eps"], least)  # where squares underflow
    V = (state["V"] * b2).addcmul_(G, G, value=1 - b2)
    D = (V / (1 - b2 ** over(state["step"] + 1, G))).sqrt_().add_(epsilon)
    return torch.linalg.vector_norm(M / D, dim=(-2, -1), keepdim=True), {"V": V}


SGD_SIZE = Graft(_no_state, _gradient_size)
"""Steps as long as those of gradient descent with momentum."""

ADAM_SIZE = Graft(_second_moment, _adam_size)
"""Steps as long as Adam's, so that Adam's learning rates suit."""
