"""Whether a step along all singular directions pays for a layer, from one batch.

For the same fall of the loss to first order, a step that is short in the spectral norm raises the
quadratic term less than one along the gradient where

    ||G||_*^2 / ||G||_F^2 > ||X||_F^2 / ||X||_2^2 = tr(A) / lambda_max(A),

with `X` the inputs of the layer and `A` their second moment: the nuclear rank of the gradient above
the stable rank of the inputs. Source: Davis and Drusvyatskiy (2025), arXiv:2512.04299.

Shapes: b = blocks, m = outputs, n = inputs of a block.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class SpectralCondition(NamedTuple):
    """Both sides of the condition, means over blocks, and the share of blocks where it holds."""

    gradient: float
    inputs: float
    share: float

    @property
    def pays(self) -> bool:
        """Whether it holds for most blocks."""
        return self.share > 0.5

    def __str__(self) -> str:
        """Such as `yes, 5.2 > 1.3`."""
        sign = ">" if self.gradient > self.inputs else "<"
        return f"{'yes' if self.pays else 'no'}, {self.gradient:.1f} {sign} {self.inputs:.1f}"


def spectral_condition(
    G: Float[Tensor, "b m n"], A: Float[Tensor, "b n n"]
) -> SpectralCondition | None:
    """The condition for the gradient and the inputs of a layer; None if one of them is zero.

    Examples:
        >>> str(spectral_condition(torch.eye(4)[None], torch.ones(1, 4, 4)))
        'yes, 4.0 > 1.0'
    """
    G, A = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (G, A))
    values, spectrum = torch.linalg.svdvals(G), torch.linalg.eigvalsh(A).clamp_min(0)
    used = (values.amax(-1) > 0) & (spectrum.amax(-1) > 0)
    if not bool(used.any()):
        return None
    values, spectrum = values[used], spectrum[used]
    nuclear = values.sum(-1).square() / values.square().sum(-1)
    stable = spectrum.sum(-1) / spectrum.amax(-1)
    share = (nuclear > stable).double().mean()
    return SpectralCondition(float(nuclear.mean()), float(stable.mean()), float(share))
