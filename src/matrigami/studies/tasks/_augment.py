"""Random resized crops, flips and mixup, for a whole batch at once.

A crop that is resized by bilinear interpolation and perhaps mirrored is a linear map of the rows
and one of the columns: `Y = R X C.T`. Both matrices are looked up in a table of all crops, so that
a batch costs two batched products. The draws are those of He et al.'s usual recipe (area 8 % to 100
%, aspect 3/4 to 4/3), mixup is that of Zhang et al. (2018), arXiv:1710.09412, with one weight for
each batch.

Shapes: n = examples, b = examples in a batch, s = side in pixels, c = channels.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10


class Crops(NamedTuple):
    """For each example, which matrix of `crop_table` acts on its rows and which on its columns."""

    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]


def crop_table(side: int, device: torch.device | str | None = None) -> Float[Tensor, "k s s"]:
    """The matrices that resize `x[start : start + size]` to `side`, then the same mirrored.

    Entry `(size - 1) * side + start`, plus `side**2` for the mirrored one; pixels are areas, edges
    are clamped.

    Examples:
        >>> crop_table(2)[2]
        tensor([[1., 0.],
                [0., 1.]])
    """
    size = torch.arange(1, side + 1).repeat_interleave(side)[:, None]
    start = torch.arange(side).repeat(side)[:, None]
    centre = (torch.arange(side) + 0.5) * size / side - 0.5
    centre = start + centre.clamp_min(0).minimum(size - 1)  # k s
    weights = (1 - (centre[..., None] - torch.arange(side)).abs()).clamp_min(0)
    return torch.cat([weights, weights.flip(1)]).to(device=device, dtype=torch.float32)


def draw_crops(n: int, side: int, generator: torch.Generator) -> Crops:
    """Random crops and flips.

    A shape that does not fit is drawn again, up to ten times in all; then the whole is taken.
    """
    area = torch.empty(n, TRIES, dtype=torch.float32).uniform_(*AREA, generator=generator) * side**2
    ratio = (
        torch.empty(n, TRIES, dtype=torch.float32)
        .uniform_(math.log(ASPECT[0]), math.log(ASPECT[1]), generator=generator)
        .exp()
    )
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    first = fits.long().argmax(1, keepdim=True)
    whole = ~fits.any(1)
    height, width = (t.gather(1, first)[:, 0].masked_fill(whole, side) for t in (height, width))
    top, left = (_below(side - t + 1, generator) for t in (height, width))
    flip = torch.randint(0, 2, (n,), generator=generator)
    return Crops((height - 1) * side + top, (width - 1) * side + left + flip * side**2)


def resample(
    pixels: UInt8[Tensor, "b s c s"], crops: Crops, table: Float[Tensor, "k s s"]
) -> Float[Tensor, "b s c s"]:
    """Apply crops and flips."""
    b, s, c, _ = pixels.shape
    rows, columns = table.index_select(0, crops.rows), table.index_select(0, crops.columns)
    Y = torch.bmm(rows, pixels.to(table.dtype).reshape(b, s, c * s))
    return torch.bmm(Y.reshape(b, s * c, s), columns.mT).reshape(b, s, c, s)


def draw_mixing(n: int, alpha: float, generator: torch.Generator) -> list[float]:
    """Weights of the first partner of a mixture, `Beta(alpha, alpha)`; ones for `alpha = 0`."""
    if alpha == 0:
        return [1.0] * n
    seed = int(torch.randint(0, 2**62, (), generator=generator))
    return np.random.default_rng(seed).beta(alpha, alpha, n).tolist()


def _below(bounds: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, " n"]:
    """Uniform integers from 0 to below each bound."""
    return (torch.rand(bounds.shape, generator=generator, dtype=torch.float64) * bounds).long()
