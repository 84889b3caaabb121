"""What a model of a study is, and the blocks that the models share.

All follow the published protocol: pre-norm residual blocks that start as the identity (the last
linear layer of each block is zero), a head that starts at zero and is always dense. Sources: Qiu et
al. (2024), arXiv:2406.06248, and Potapczynski et al. (2024), arXiv:2410.02117.

Shapes: b = examples, w = width, t = tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.nn import StructuredLinear, StructuredMoE
from matrigami.structures import Dense, parse
from matrigami.studies._config import RunConfig
from matrigami.studies.tasks import DTYPE, Shape

Layer = StructuredLinear | StructuredMoE | nn.Linear

Linear = Callable[..., Layer]
"""Makes a layer from its numbers of inputs and outputs, and `zero_init`, `bias`."""


class Network(nn.Module, ABC):
    """A model of a study: any module that says what it costs and which layers are its ends.

    Attributes:
        width: What learning rates scale with; None if they do not.
        reads: Names of the layers whose inputs do not grow with the width: they read the data.
        answers: Names of the layers whose outputs do not: the head.
        recordable: A step of it may be recorded once and replayed on a card.
    """

    width: int | None
    reads: tuple[str, ...] = ("embed",)
    answers: tuple[str, ...] = ("head",)
    recordable: bool = True

    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds of one forward pass of one example."""


class Makers(NamedTuple):
    """What a model is built with: makers of its layers, and the source of other initial numbers.

    Attributes:
        linear: Makes the layers of the blocks.
        outer: Makes the layer that reads the data.
        head: Makes the last layer.
        generator: Source of tables and tokens.
    """

    linear: Linear
    outer: Linear
    head: Linear
    generator: torch.Generator | None = None


def makers(
    config: RunConfig, generator: torch.Generator | None, device: torch.device | str
) -> Makers:
    """The layers of a run: structured ones, and dense ones at the ends that stay dense."""
    linear = partial(_linear, config.structure, generator, device)
    if config.experts > 1:
        linear = partial(
            StructuredMoE,
            structure=parse(config.structure),
            experts=config.experts,
            active=config.active,
            dtype=DTYPE,
            device=device,
            generator=generator,
        )
    dense = partial(_linear, "dense", generator, device)
    outer = linear if config.structured_layers == "all" else dense
    return Makers(linear, outer, dense, generator)


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


class Attention(nn.Module):
    """`x + out(softmax(q k' 8 / d) v)` over `d` features a head.

    Args:
        width: Features of a token.
        heads: Attention heads.
        linear: Makes the layers.
        causal: A token sees itself and those before it.
        normalised: Layer norm of `q` and `k` of each head.
        turn: What is done to `q` and `k` with the position of their token.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        linear: Linear,
        *,
        causal: bool = False,
        normalised: bool = True,
        turn: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.causal, d = heads, causal, width // heads
        self.norm = nn.LayerNorm(width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(d) if normalised else nn.Identity() for _ in range(2)
        )
        self.turn = turn or nn.Identity()
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
        q, k = self.turn(self.q_norm(q)), self.turn(self.k_norm(k))
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=8 / q.shape[-1]
        )
        return x + self.out(y.transpose(1, 2).flatten(2))

    def score_macs(self, tokens: int) -> int:
        """Multiply-adds of scores and weighted sums; a causal score counts its own half only."""
        pairs = tokens * (tokens + 1) // 2 if self.causal else tokens**2
        return 2 * pairs * self.out.out_features


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


def table_of(rows: int, width: int, generator: torch.Generator | None) -> nn.Embedding:
    """Learnable vectors, one for each position: a module, so that its curvature is known."""
    entries = torch.randn(rows, width, generator=generator, dtype=DTYPE)
    return nn.Embedding.from_pretrained(entries, freeze=False)


def layer_macs(layer: nn.Module) -> int:
    """Multiply-adds of one layer for one vector."""
    if isinstance(layer, StructuredLinear | StructuredMoE):
        return layer.cost().macs
    return layer.weight.numel() if isinstance(layer, nn.Linear) else 0


def all_macs(model: nn.Module) -> int:
    """Multiply-adds of all linear layers, each for one vector."""
    return sum(map(layer_macs, model.modules()))


def refuse_text(model: str, shape: Shape) -> None:
    """Refuse token numbers, which are no features.

    Raises:
        ValueError: If the task is a text.
    """
    if shape.is_text:
        raise ValueError(
            f"Model {model!r} was asked for on a text.\nIt reads features, not token numbers.\n"
            'Use model "gpt", or a function of your own.'
        )
