"""The usual mixture of experts: each is the two layers of an MLP block, with one gate.

Its attention layers are not mixtures. Source: Fedus et al. (2022), arXiv:2101.03961; that of
`nn.StructuredMoE` has experts in every layer.

Shapes: b = examples, w = width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.nn import Mixture
from matrigami.nn._mixture import GATE_SCALE


class NetworkMixture(Mixture):
    """`sum_e weight_e(x) V_e gelu(U_e x)` over the active experts.

    Args:
        networks: The experts.
        active: How many act on each vector.
        width: Features of a vector.
        generator: Source of the initial gate.
    """

    def __init__(
        self,
        networks: list[nn.Module],
        active: int,
        width: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, len(networks), active)
        self.networks = nn.ModuleList(networks)
        self.gate = nn.Linear(width, self.experts, bias=False)
        with torch.no_grad():
            self.gate.weight.normal_(0.0, (GATE_SCALE / width) ** 0.5, generator=generator)

    @property
    def gate_weight(self) -> Float[Tensor, "E w"]:
        """What makes the logits of a vector."""
        return self.gate.weight

    def forward(self, x: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """Each vector by its experts."""
        X = x.reshape(-1, self.in_features)
        Y = torch.zeros_like(X)
        for network, (place, own, weight) in zip(self.networks, self.routed(X), strict=True):
            Y = Y.index_add(0, place, (network(own) * weight[:, None]).to(Y))
        return Y.reshape(x.shape)


class MixtureBlock(nn.Module):
    """`x + mixture(norm(x))`, in the place of a residual block."""

    def __init__(self, mixture: NetworkMixture) -> None:
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(mixture.in_features), mixture

    def forward(self, x: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """Add the block's branch."""
        return x + self.mixture(self.norm(x))
