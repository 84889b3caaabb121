"""The networks of the study: a residual MLP and a vision transformer of structured layers.

Both follow the published protocol: pre-norm residual blocks that start as the identity (the last
linear layer of each block is zero), a head that starts at zero and is always dense. Sources: Qiu et
al. (2024), arXiv:2406.06248; for the MLP, Bachmann et al. (2023), arXiv:2306.13575.

Shapes: b = examples, f = features of an example, w = width, t = tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.nn import StructuredLinear
from matrigami.structures import Dense, parse
from matrigami.studies._config import RunConfig

INPUT_LAYER = "embed"
"""Name of the layer that reads the data, in every model."""

HEAD_LAYER = "head"
"""Name of the last layer, in every model."""

DTYPE = torch.float32
"""Type of all parameters, whatever the default of the session is."""

Layer = StructuredLinear | nn.Linear

Linear = Callable[..., Layer]
"""Makes a layer from its numbers of inputs and outputs, and `zero_init`, `bias`."""


class Shape(NamedTuple):
    """Channels and side of an image (a vector has side 1), and the outputs asked for."""

    channels: int
    side: int
    outputs: int

    @property
    def features(self) -> int:
        """Numbers in one example."""
        return self.channels * self.side**2


class ResidualBlock(nn.Module):
    """`x + V gelu(U norm(x))`, hidden layer four times as wide."""

    def __init__(self, width: int, linear: Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = linear(width, 4 * width)
        self.reduce = linear(4 * width, width, zero_init=True)

    def forward(self, x: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """Add the block's branch."""
        return x + self.reduce(nn.functional.gelu(self.expand(self.norm(x))))


class MLP(nn.Module):
    """Input layer, GELU, residual blocks, head.

    Args:
        shape: Sizes of the task.
        width: Features of the residual stream.
        depth: Residual blocks.
        linear: Makes the layers of the blocks.
        outer: Makes the input layer.
        head: Makes the last layer.
    """

    def __init__(
        self, shape: Shape, width: int, depth: int, linear: Linear, outer: Linear, head: Linear
    ) -> None:
        super().__init__()
        self.width = width
        self.embed = outer(shape.features, width)
        self.blocks = nn.ModuleList([ResidualBlock(width, linear) for _ in range(depth)])
        self.head = head(width, shape.outputs, zero_init=True)

    def forward(self, x: Float[Tensor, "b f"]) -> Float[Tensor, "b outputs"]:
        """Outputs of a batch."""
        x = nn.functional.gelu(self.embed(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def macs(self) -> int:
        """Multiply-adds of one forward pass of one example, in linear layers."""
        return _all_macs(self)


class Attention(nn.Module):
    """`x + out(softmax(q k' 8 / d) v)` over `d` features a head, with `q`, `k` normalised."""

    def __init__(self, width: int, heads: int, linear: Linear) -> None:
        super().__init__()
        self.heads, d = heads, width // heads
        self.norm, self.q_norm, self.k_norm = nn.LayerNorm(width), nn.LayerNorm(d), nn.LayerNorm(d)
        self.q = linear(width, width, bias=False, zero_init=True)
        self.k = linear(width, width, bias=False)
        self.v = linear(width, width, bias=False)
        self.out = linear(width, width, zero_init=True)

    def forward(self, x: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
        """Add the block's branch."""
        h = self.norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, scale=8 / q.shape[-1]
        )
        return x + self.out(y.transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Patches, a class token, attention and MLP blocks, head on the class token.

    Args:
        shape: Sizes of the task.
        width: Features of a token.
        depth: Pairs of an attention and an MLP block.
        patch: Side of a patch in pixels.
        heads: Attention heads.
        linear: Makes the layers of the blocks.
        outer: Makes the patch embedding.
        head: Makes the last layer.
        generator: Source of the random class token and positions.

    Raises:
        ValueError: If the patches do not tile the image, or the heads do not divide the width.
    """

    def __init__(
        self,
        shape: Shape,
        width: int,
        depth: int,
        patch: int,
        heads: int,
        linear: Linear,
        outer: Linear,
        head: Linear,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if shape.side % patch or width % heads:
            raise ValueError(
                f"A ViT of width {width}, {heads} heads, patches of {patch} pixels was asked for.\n"
                f"They do not tile {shape.side} pixels, or the heads do not divide the width.\n"
                "Give a patch that divides the side, and a width that is a multiple of the heads."
            )
        self.width, self.patch, self.shape = width, patch, shape
        self.tokens = (shape.side // patch) ** 2 + 1
        inputs = shape.channels * patch**2
        self.patch_norm, self.embed, self.embed_norm = (
            nn.LayerNorm(inputs),
            outer(inputs, width),
            nn.LayerNorm(width),
        )
        self.class_token = _table(1, width, generator)
        self.positions = _table(self.tokens, width, generator)
        pairs = [
            (Attention(width, heads, linear), ResidualBlock(width, linear)) for _ in range(depth)
        ]
        self.blocks = nn.ModuleList([block for pair in pairs for block in pair])
        self.norm = nn.LayerNorm(width)
        self.head = head(width, shape.outputs, zero_init=True)

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
        attention = sum(
            2 * self.tokens**2 * self.width for block in self.blocks if isinstance(block, Attention)
        )
        once, patches = _macs(self.head), _macs(self.embed)
        return (
            self.tokens * (_all_macs(self) - once - patches)
            + (self.tokens - 1) * patches
            + once
            + attention
        )


Model = MLP | ViT


def build_model(
    config: RunConfig,
    shape: Shape,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """The network of a run.

    Args:
        config: The run.
        shape: Sizes of the task.
        generator: Source of the initial weights.
        device: `cpu`, or `meta` for the sizes without the numbers.

    Raises:
        ValueError: If the model is unknown, or the structure does not fit its sizes.

    Examples:
        >>> config = RunConfig(
        ...     "cifar100", "mlp", "btt(rank=1)", 512, seed=0, lr=3e-3, epochs=1, batch_size=1024
        ... )
        >>> build_model(config, Shape(channels=3, side=32, outputs=100)).macs()
        591872
    """
    linear = partial(_linear, config.structure, generator, device)
    dense = partial(_linear, "dense", generator, device)
    outer = linear if config.structured_layers == "all" else dense
    if config.model == "mlp":
        with torch.device(device):
            return MLP(shape, config.width, config.depth, linear, outer, dense).to(DTYPE)
    if config.model == "vit":
        sizes = (config.width, config.depth, config.patch, config.heads)
        with torch.device(device):
            return ViT(shape, *sizes, linear, outer, dense, generator).to(DTYPE)
    raise ValueError(
        f"Model {config.model!r} was asked for.\nThere are two: mlp, vit.\n"
        "Change `name` of [model]."
    )


def _linear(
    structure: str,
    generator: torch.Generator | None,
    device: torch.device | str,
    inputs: int,
    outputs: int,
    *,
    bias: bool = True,
    zero_init: bool = False,
) -> Layer:
    """One layer; a dense one is torch's own, so that measured times are those of the usual code."""
    recipe = parse(structure)
    if not isinstance(recipe, Dense):
        return StructuredLinear(
            inputs,
            outputs,
            recipe,
            bias=bias,
            zero_init=zero_init,
            dtype=DTYPE,
            device=device,
            generator=generator,
        )
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta")
    if torch.device(device).type == "meta":
        return layer
    weight = recipe.init(outputs, inputs, generator=generator, dtype=DTYPE).dense()
    layer.weight = nn.Parameter(torch.zeros_like(weight) if zero_init else weight)
    if bias:
        layer.bias = nn.Parameter(weight.new_zeros(outputs))
    return layer


def _table(rows: int, width: int, generator: torch.Generator | None) -> nn.Embedding:
    """Learnable vectors, one for each position: a module, so that its curvature is known."""
    entries = torch.randn(rows, width, generator=generator, dtype=DTYPE)
    return nn.Embedding.from_pretrained(entries, freeze=False)


def _macs(layer: nn.Module) -> int:
    """Multiply-adds of one layer for one vector."""
    if isinstance(layer, StructuredLinear):
        return layer.cost().macs
    return layer.weight.numel() if isinstance(layer, nn.Linear) else 0


def _all_macs(model: nn.Module) -> int:
    """Multiply-adds of all linear layers, each for one vector."""
    return sum(map(_macs, model.modules()))
