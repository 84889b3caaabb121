"""A vision transformer: patches of an image, a class token, learned positions.

Shapes: b = examples, f = features of an example.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.studies._config import RunConfig
from matrigami.studies.models._base import (
    Attention,
    Makers,
    Network,
    all_macs,
    layer_macs,
    refuse_text,
    table_of,
)
from matrigami.studies.tasks import Shape


class ViT(Network):
    """Patches, a class token, attention and MLP blocks, head on the class token.

    Args:
        config: Width, `depth` pairs of blocks, side of a patch in pixels, heads.
        shape: Sizes of the task.
        make: Makes its layers, and the random class token and positions.

    Raises:
        ValueError: If the patches do not tile the image, or the heads do not divide the width.
    """

    settings = ("heads", "patch")

    def __init__(self, config: RunConfig, shape: Shape, make: Makers) -> None:
        super().__init__()
        refuse_text("vit", shape)
        width, patch, heads = config.width, config.patch, config.heads
        if shape.side % patch or width % heads:
            raise ValueError(
                f"A ViT of width {width}, {heads} heads, patches of {patch} pixels: "
                f"they do not tile {shape.side} pixels, or the heads do not divide the width.\n"
                "Give a patch that divides the side, and a width that is a multiple of the heads."
            )
        self.width, self.patch, self.shape = width, patch, shape
        self.tokens = (shape.side // patch) ** 2 + 1
        inputs = shape.channels * patch**2
        self.patch_norm, self.embed, self.embed_norm = (
            nn.LayerNorm(inputs),
            make.outer(inputs, width),
            nn.LayerNorm(width),
        )
        self.class_token = table_of(1, width, make.generator)
        self.positions = table_of(self.tokens, width, make.generator)
        pairs = [
            (Attention(width, heads, make.linear), make.block(width)) for _ in range(config.depth)
        ]
        self.blocks = nn.ModuleList([block for pair in pairs for block in pair])
        self.norm = nn.LayerNorm(width)
        self.head = make.head(width, shape.outputs, zero_init=True)

    def forward(self, x: Float[Tensor, "b f"]) -> Float[Tensor, "b outputs"]:
        """Outputs of a batch of flattened images (channels, rows, columns)."""
        n, p = self.shape.side // self.patch, self.patch
        x = (
            x.reshape(-1, self.shape.channels, n, p, n, p)
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(len(x), n * n, -1)
        )
        x = self.embed_norm(self.embed(self.patch_norm(x)))
        index = torch.arange(self.tokens, device=x.device).expand(len(x), -1)
        x = torch.cat([self.class_token(index[:, :1]), x], 1) + self.positions(index)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def macs(self) -> int:
        """Multiply-adds of one forward pass of one example: linear layers and attention."""
        attention = [b.score_macs(self.tokens) for b in self.blocks if isinstance(b, Attention)]
        once, patches = layer_macs(self.head), layer_macs(self.embed)
        return (
            self.tokens * (all_macs(self) - once - patches)
            + (self.tokens - 1) * patches
            + once
            + sum(attention)
        )
