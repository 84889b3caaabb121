"""A small generative transformer of texts: causal attention and MLP blocks on token numbers.

The protocol is that of Potapczynski et al. (2024), arXiv:2410.02117: the structure replaces every
linear layer but the head, `q` and `k` are normalised, a small alphabet. A class of tokens is its
row of `embed`; the answer at each token is the distribution of the next.

Rotary positions: Su et al. (2021), arXiv:2104.09864.

Shapes: b = examples, t = tokens, h = heads, d = features of a head.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from matrigami.studies._config import RunConfig
from matrigami.studies.models._base import (
    Attention,
    Makers,
    Network,
    all_macs,
    table_of,
)
from matrigami.studies.models._scores import attention_options
from matrigami.studies.tasks import Shape

BASE = 10_000.0
"""Ratio of the longest to the shortest wave length of rotary positions, divided by 2 pi."""

Positions = Literal["rope", "learned"]


class Turn(nn.Module):
    """Rotary positions: turns pairs of features by angles that grow with the position.

    Args:
        tokens: Longest text.
        d: Features of a head, an even number.
    """

    cos: Float[Tensor, "t half"]
    sin: Float[Tensor, "t half"]

    def __init__(self, tokens: int, d: int) -> None:
        super().__init__()
        speeds = BASE ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
        angles = torch.arange(tokens, dtype=torch.float32)[:, None] * speeds
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """The same lengths, other angles: products depend on the difference of positions only."""
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        u, v = x.chunk(2, -1)
        return torch.cat([u * cos - v * sin, u * sin + v * cos], -1)


class GPT(Network):
    """Token table, attention and MLP blocks, norm, head on every token.

    Args:
        config: Width, `depth` pairs of blocks, heads.
        shape: Sizes of the task: a text.
        make: Makes its layers, and the random table.
        positions: Rotary, or a learned vector for each position.
        qk_norm: Normalise `q` and `k`.

    Raises:
        ValueError: If the task is no text, or the heads do not fit the width.
    """

    settings = ("heads",)
    reads = ()  # a table has no inputs that could grow

    def __init__(
        self,
        config: RunConfig,
        shape: Shape,
        make: Makers,
        *,
        positions: Positions = "rope",
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        _check(shape, width, heads, positions)
        self.width, self.tokens = width, shape.channels
        self.embed = table_of(shape.outputs, width, make.generator)
        rope = positions == "rope"
        self.positions = None if rope else table_of(self.tokens, width, make.generator)
        score, several = config.score, range(config.depth)
        options = [attention_options(score, width, heads, make.of) for _ in several]
        turn = Turn(self.tokens, options[0]["features"]) if rope else None
        pairs = [
            (
                Attention(width, heads, make.linear, normalised=qk_norm, turn=turn, **own),
                make.block(width),
            )
            for own in options
        ]
        self.blocks = nn.ModuleList([block for pair in pairs for block in pair])
        self.norm = nn.LayerNorm(width)
        self.head = make.head(width, shape.outputs, zero_init=True)

    def forward(self, x: Int64[Tensor, "b t"]) -> Float[Tensor, "b outputs t"]:
        """Logits of the token after each token, the axis of the classes as in torch's losses."""
        h = self.embed(x)
        if self.positions is not None:
            h = h + self.positions(torch.arange(x.shape[1], device=x.device).expand(len(x), -1))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)).mT

    def macs(self) -> int:
        """Multiply-adds of one forward pass of one text: linear layers and attention."""
        attention = [b.score_macs(self.tokens) for b in self.blocks if isinstance(b, Attention)]
        return self.tokens * all_macs(self) + sum(attention)


def _check(shape: Shape, width: int, heads: int, positions: str) -> None:
    """Refuse what does not fit."""
    if not shape.is_text:
        raise ValueError(
            "Model 'gpt' on a task that is no text: it reads token numbers.\n"
            'Use model "mlp" or "vit", or a text file as dataset.'
        )
    if width % heads or (positions == "rope" and width // heads % 2):
        raise ValueError(
            f"A GPT of width {width} with {heads} heads: "
            "the heads do not divide the width, or rotary positions find an odd number of "
            "features in a head.\nGive a width that is a multiple of twice the heads."
        )
