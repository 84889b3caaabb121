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
from matrigami.studies.models._mixture import MixtureBlock, NetworkMixture
from matrigami.studies.models._scores import Levels, Products, pairs
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
        settings: Fields of a run that it reads, of those that some models read only.
        recordable: A step of it may be recorded once and replayed on a card.
    """

    width: int | None
    reads: tuple[str, ...] = ("embed",)
    answers: tuple[str, ...] = ("head",)
    settings: tuple[str, ...] = ()
    recordable: bool = True

    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds of one forward pass of one example."""


class Makers(NamedTuple):
    """What a model is built with: makers of its layers, and the source of other initial numbers.

    Attributes:
        linear: Makes the layers of the blocks.
        block: Makes the MLP blocks of a width.
        outer: Makes the layer that reads the data.
        head: Makes the last layer.
        generator: Source of tables and tokens.
        of: Makes the layers of another structure, given as text.
    """

    linear: Linear
    block: Callable[[int], nn.Module]
    outer: Linear
    head: Linear
    generator: torch.Generator | None
    of: Callable[[str], Linear]


def makers(
    config: RunConfig, generator: torch.Generator | None, device: torch.device | str
) -> Makers:
    """The layers of a run: structured ones, and dense ones at the ends that stay dense."""

    def of(structure: str) -> Linear:
        """Layers of one structure."""
        return partial(_linear, structure, generator, device)

    linear, block = of(config.structure), None
    if config.experts > 1 and config.mixture == "network":
        block = partial(_mixed_block, config, linear, generator)
    elif config.experts > 1:
        linear = partial(
            StructuredMoE,
            structure=parse(config.structure),
            experts=config.experts,
            active=config.active,
            dtype=DTYPE,
            device=device,
            generator=generator,
        )
    outer = linear if config.structured_layers == "all" else of("dense")
    block = block or partial(ResidualBlock, linear=linear)
    return Makers(linear, block, outer, of("dense"), generator, of)


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
    """`x + out(softmax(q k' 8 / d) v)` over `d` features a head, or another score.

    Args:
        width: Features of a token.
        heads: Attention heads.
        linear: Makes the layers.
        mix: Of `q`, `k` and `v` of all heads, the weighted sums; by default with `softmax(q k')`.
        normalised: Layer norm of `q` and `k` of each head.
        turn: What is done to `q` and `k` with the position of their token.
        pair: What makes `q` and `k` of all heads of a token; by default a layer each.
        features: Of `q` and `k` of a head, `d`; by default the width over the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        linear: Linear,
        *,
        mix: Products | Levels | None = None,
        normalised: bool = True,
        turn: nn.Module | None = None,
        pair: tuple[nn.Module, nn.Module] | None = None,
        features: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.mix = heads, mix or Products()
        self.features = features or width // heads
        self.norm = nn.LayerNorm(width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(self.features) if normalised else nn.Identity() for _ in range(2)
        )
        self.turn = turn or nn.Identity()
        self.q, self.k = pair or (
            linear(width, width, bias=False, zero_init=True),
            linear(width, width, bias=False),
        )
        self.v = linear(width, width, bias=False)
        self.out = linear(width, width, zero_init=True)

    def forward(self, x: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
        """Add the block's branch."""
        h = self.norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = self.mix(self.turn(self.q_norm(q)), self.turn(self.k_norm(k)), v)
        return x + self.out(y.transpose(1, 2).flatten(2))

    def score_macs(self, tokens: int) -> int:
        """Multiply-adds of scores and weighted sums."""
        weighted = pairs(tokens, causal=self.mix.causal) * self.out.out_features
        return self.heads * self.mix.macs(tokens, self.features) + weighted


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


def _mixed_block(
    config: RunConfig, linear: Linear, generator: torch.Generator | None, width: int
) -> MixtureBlock:
    """A block whose experts are whole networks."""
    networks: list[nn.Module] = [
        nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width, zero_init=True))
        for _ in range(config.experts)
    ]
    return MixtureBlock(NetworkMixture(networks, config.active, width, generator))


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
    """Multiply-adds of all linear layers, each for one vector, without experts that rest."""
    idle = sum(
        (mixture.experts - mixture.active) * all_macs(mixture.networks[0])
        for mixture in model.modules()
        if isinstance(mixture, NetworkMixture)
    )
    return sum(map(layer_macs, model.modules())) - idle


def refuse_text(model: str, shape: Shape) -> None:
    """Refuse token numbers, which are no features.

    Raises:
        ValueError: If the task is a text.
    """
    if shape.is_text:
        raise ValueError(
            f"Model {model!r} on a text: it reads features, not token numbers.\n"
            'Use model "gpt", or a function of your own; save a table of numbers as .npz.'
        )
