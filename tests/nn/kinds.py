"""A layer of each kind, and what it is called with."""

import torch
from torch import nn
from torch.nn.utils import parametrizations

from matrigami import Monarch
from matrigami.nn import (
    Parts,
    Role,
    StructuredLinear,
    StructuredMoE,
    Use,
    linear_use,
    parts,
    weight_part,
)
from matrigami.operators import stacked_view
from matrigami.structures import EXAMPLES


class Conv1D(nn.Module):
    """GPT-2's linear layer, as `transformers` has it."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class LlamaRMSNorm(nn.Module):
    """As `transformers` has it."""

    __module__ = "transformers.models.llama.modeling_llama"

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(d)), 1e-2

    def forward(self, x):
        square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(square + self.variance_epsilon))


class GemmaRMSNorm(nn.Module):
    """As `transformers` has it: the weight is the distance from one."""

    __module__ = "transformers.models.gemma.modeling_gemma"

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(d)), 1e-2

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Gated(nn.Module):
    """`(W x) * sigmoid(V x)`: two bare matrices."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.W, self.V = nn.Parameter(torch.randn(m, n)), nn.Parameter(torch.randn(m, n))

    def forward(self, x):
        return nn.functional.linear(x, self.W) * nn.functional.linear(x, self.V).sigmoid()


class Registered(Gated):
    """The same, with a rule of its own."""


@parts.register
def _(layer: Registered) -> Parts:
    def value(x: torch.Tensor, g: torch.Tensor | None) -> Use:
        gate = nn.functional.linear(x, layer.V).sigmoid()
        return linear_use(x, None if g is None else g * gate)

    def gate(x: torch.Tensor, g: torch.Tensor | None) -> Use:
        y = nn.functional.linear(x, layer.V).sigmoid()
        slope = nn.functional.linear(x, layer.W) * y * (1 - y)
        return linear_use(x, None if g is None else g * slope)

    view = stacked_view(tuple(layer.W.shape))
    return {
        "W": weight_part(Role.MATRIX, view, value),
        "V": weight_part(Role.MATRIX, view, gate),
    }


def images(*sizes: int) -> torch.Tensor:
    return torch.randn(3, 4, *sizes)


def tokens() -> torch.Tensor:
    return torch.randint(0, 7, (3, 5))


def attention(**options) -> nn.Module:
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


KINDS = (
    {
        "linear": lambda: (nn.Linear(4, 3), images()),
        "linear on words": lambda: (nn.Linear(5, 3, bias=False), images(5)),
        "linear to one": lambda: (nn.Linear(4, 1), images()),
        "conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), images(7)),
        "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), padding="same"), images(6, 5)),
        "conv2d depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4), images(5, 4)),
        "conv3d": lambda: (
            nn.Conv3d(4, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1)),
            images(3, 4, 3),
        ),
        "conv3d circular": lambda: (
            nn.Conv3d(4, 2, 2, padding=1, padding_mode="circular", groups=2),
            images(3, 2, 2),
        ),
        "conv transpose 1d": lambda: (
            nn.ConvTranspose1d(4, 6, 3, stride=2, padding=2, output_padding=1, groups=2),
            images(5),
        ),
        "conv transpose 2d": lambda: (
            nn.ConvTranspose2d(4, 3, (2, 3), stride=(2, 1), dilation=(3, 1), output_padding=(2, 0)),
            images(3, 4),
        ),
        "conv transpose 3d": lambda: (nn.ConvTranspose3d(4, 2, 2, bias=False), images(2, 3, 2)),
        "bilinear": lambda: (nn.Bilinear(4, 4, 3), images(), images()),
        "embedding": lambda: (nn.Embedding(7, 4, padding_idx=1), tokens()),
        "embedding bag": lambda: (nn.EmbeddingBag(7, 4, mode="mean", padding_idx=1), tokens()),
        "sum of a bag": lambda: (nn.EmbeddingBag(7, 4, mode="sum"), tokens()),
        "most of a bag": lambda: (nn.EmbeddingBag(7, 4, mode="max"), tokens()),
        "attention": lambda: (attention(), *[torch.randn(3, 5, 4)] * 3),
        "attention of other widths": lambda: (
            attention(kdim=3, vdim=5, add_bias_kv=True),
            torch.randn(3, 5, 4),
            torch.randn(3, 6, 3),
            torch.randn(3, 6, 5),
        ),
        "lstm": lambda: (nn.LSTM(4, 6, 2, proj_size=3, batch_first=True), torch.randn(3, 5, 4)),
        "gru": lambda: (nn.GRU(4, 3, bidirectional=True, batch_first=True), torch.randn(3, 5, 4)),
        "lstm cell": lambda: (nn.LSTMCell(4, 3), images()),
        "rnn": lambda: (nn.RNN(4, 3, batch_first=True), torch.randn(3, 5, 4)),
        "layer norm": lambda: (nn.LayerNorm([4, 5]), images(5)),
        "layer norm without bias": lambda: (nn.LayerNorm(5, bias=False), images(5)),
        "rms norm": lambda: (nn.RMSNorm(5), images(5)),
        "group norm": lambda: (nn.GroupNorm(2, 4), images(5, 3)),
        "group norm of vectors": lambda: (nn.GroupNorm(2, 4), images()),
        "batch norm 1d": lambda: (nn.BatchNorm1d(4), images()),
        "batch norm 2d": lambda: (nn.BatchNorm2d(4), images(3, 2)),
        "batch norm 3d": lambda: (nn.BatchNorm3d(4).eval(), images(2, 3, 2)),
        "batch norm of all processes": lambda: (nn.SyncBatchNorm(4).eval(), images(3)),
        "instance norm 1d": lambda: (nn.InstanceNorm1d(4, affine=True), images(5)),
        "instance norm 2d": lambda: (nn.InstanceNorm2d(4, affine=True), images(3, 2)),
        "instance norm 3d": lambda: (
            nn.InstanceNorm3d(4, affine=True, track_running_stats=True).eval(),
            images(2, 3, 2),
        ),
        "prelu": lambda: (nn.PReLU(), images(5)),
        "prelu of channels": lambda: (nn.PReLU(4), images(5)),
        "weight norm": lambda: (parametrizations.weight_norm(nn.Linear(4, 3)), images()),
        "spectral norm": lambda: (parametrizations.spectral_norm(nn.Conv2d(4, 3, 2)), images(3, 3)),
        "orthogonal": lambda: (parametrizations.orthogonal(nn.Linear(4, 3)), images()),
        "transformers' linear": lambda: (Conv1D(3, 5), images(5)),
        "transformers' norm": lambda: (LlamaRMSNorm(5), images(5)),
        "transformers' other norm": lambda: (GemmaRMSNorm(5), images(5)),
        "registered": lambda: (Registered(5, 3), images(5)),
        "capped": lambda: (StructuredLinear(5, 6, Monarch(blocks=1), rms_cap=True), images(5)),
    }
    | {
        f"structured: {name}": lambda recipe=recipe: (StructuredLinear(6, 6, recipe), images(6))
        for name, recipe in EXAMPLES.items()
    }
    | {
        f"structured experts: {name}": lambda recipe=recipe: (
            StructuredMoE(6, 6, recipe, experts=3, active=2),
            images(6),
        )
        for name, recipe in EXAMPLES.items()
    }
)
"""A layer of each kind, and what it is called with."""

SEEN = {name for name in KINDS if "structured" in name} | {
    *("linear", "conv1d", "conv2d", "conv3d", "conv transpose 1d", "conv transpose 2d"),
    *("conv transpose 3d", "embedding", "embedding bag", "layer norm", "rms norm", "group norm"),
    *("batch norm 1d", "batch norm 2d", "batch norm 3d", "instance norm 1d", "instance norm 2d"),
    *("instance norm 3d", "prelu", "transformers' linear", "transformers' norm", "registered"),
}
"""Some of the kinds whose curvature must be known."""
