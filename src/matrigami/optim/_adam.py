"""Adam, for the parameters that are not matrices: biases, gains, norms, embeddings.

`M <- b1 M + (1 - b1) G`, `V <- b2 V + (1 - b2) G^2`, `U = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t))
+ eps)`; the state is `M` and `V`. Sources: Kingma and Ba (2015), arXiv:1412.6980; with decoupled
weight decay, Loshchilov and Hutter (2019), arXiv:1711.05101.

Shapes: b = parameters of equal size, n = their entries.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from matrigami.optim._method import Options, State


class Adam:
    """The method of every parameter without a view, inside every optimiser of this package."""

    @staticmethod
    def init(G: Float[Tensor, "b *n"], options: Options) -> State:  # noqa: ARG004 - one signature
        """Nothing is known yet."""
        return {"M": torch.zeros_like(G), "V": torch.zeros_like(G)}

    @staticmethod
    def direction(
        G: Float[Tensor, "b *n"], state: State, options: Options
    ) -> tuple[Float[Tensor, "b *n"], State]:
        """The bias-corrected ratio of the moments."""
        (b1, b2), epsilon = options["adam_betas"], options["adam_eps"]
        epsilon = max(epsilon, torch.finfo(G.dtype).tiny ** 0.5)  # where squares underflow
        t = over(state["step"] + 1, G)
        M = state["M"].lerp(G, 1 - b1)
        V = (state["V"] * b2).addcmul_(G, G, value=1 - b2)
        D = (V / (1 - b2**t)).sqrt_().add_(epsilon)
        return torch.div(M, D.mul_(1 - b1**t)), {"M": M, "V": V}


def over(values: Float[Tensor, " b"], G: Float[Tensor, "b *n"]) -> Float[Tensor, "b *ones"]:
    """One number for each item of a stack, with axes to broadcast over it."""
    return values.to(G.dtype).reshape(-1, *[1] * (G.ndim - 1))
