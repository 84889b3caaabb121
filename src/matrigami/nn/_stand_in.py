"""What stands in for a dense layer: the same place, sizes, bias, hooks and mode, another weight.

Shapes: N = examples, c = channels, S = positions, i = inputs of the matrix of taps.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from matrigami.nn._anatomy import parts
from matrigami.nn._choice import matrix_view
from matrigami.nn._linear import StructuredLinear
from matrigami.nn._taps import patches
from matrigami.nn._transformers import as_it_was
from matrigami.operators import LinearOperator, OpenFunction, Structure

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""Where a module keeps what is called with it; a handle removes from the same dictionary."""


class StructuredConv(nn.Module):
    """A convolution whose matrix of taps, `(out, in * kernel)`, is a member of a structure.

    Its one child `taps` is a `StructuredLinear` on patches.

    Args:
        conv: The convolution, of one group, whose sizes and padding it has.
        taps: From patches, channels first, to outputs.

    Examples:
        >>> from matrigami import LowRank
        >>> conv = nn.Conv2d(3, 8, 3, padding=1)
        >>> StructuredConv(conv, StructuredLinear(27, 8, LowRank(rank=2))).taps.structure
        LowRank(rank=2)
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, taps: StructuredLinear) -> None:
        super().__init__()
        self.taps = taps
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._sides = conv._reversed_padding_repeated_twice

    @property
    def weight(self) -> Tensor:
        """The kernels, made anew each time: for code that reads them as of a convolution."""
        return self.taps.weight.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:  # noqa: A002 - as torch
        """Multiply every patch, of `(N, c, *sizes)` or of one example."""
        axes = len(self.kernel_size)
        single = input.ndim == axes + 1
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = nn.functional.pad(input[None] if single else input, self._sides, mode=mode)
        sizes = zip(x.shape[2:], self.kernel_size, self.dilation, self.stride, strict=True)
        out = [(size - d * (kernel - 1) - 1) // s + 1 for size, kernel, d, s in sizes]
        y = self.taps(patches(x, self)).mT.unflatten(-1, out)
        return y[0] if single else y

    def extra_repr(self) -> str:
        """As a convolution tells it."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )

    def to_conv(self) -> nn.Module:
        """The dense convolution with the same output."""
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.kernel_size) - 1]
        weight: Tensor = self.taps.weight.detach()
        conv = kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # pyright: ignore[reportArgumentType]
            self.stride,  # pyright: ignore[reportArgumentType]
            self.padding,  # pyright: ignore[reportArgumentType]
            self.dilation,  # pyright: ignore[reportArgumentType]
            bias=self.taps.bias is not None,
            padding_mode=self.padding_mode,  # pyright: ignore[reportArgumentType]
            device=weight.device,
            dtype=weight.dtype,
        )
        conv.weight.data.copy_(weight.reshape(conv.weight.shape))
        if conv.bias is not None:
            conv.bias.data.copy_(self.taps.bias.detach())  # pyright: ignore[reportOptionalMemberAccess]
        return conv


@OpenFunction
def stand_in(layer: nn.Module, structure: Structure, A: LinearOperator | None = None) -> nn.Module:
    """A layer with the matrix `A` of a structure in place of a dense one; without `A` it is drawn.

    Device, type, bias, mode and `requires_grad` are those of the dense layer. Register one for a
    layer of your own.

    Args:
        layer: The dense layer.
        structure: The structure.
        A: The weight, a member of it, outputs by inputs.

    Raises:
        ValueError: If no layer is known that could stand in, or the structure does not fit.

    Examples:
        >>> from matrigami import LowRank
        >>> stand_in(nn.Linear(8, 6), LowRank(rank=2))
        StructuredLinear(8, 6, LowRank(rank=2), bias=True)
    """
    if matrix_view(layer) is not None and parts(layer)["weight"].role == "hidden matrix":
        return StructuredLinear.in_place_of(layer, structure, A)
    raise ValueError(
        f"stand_in({type(layer).__name__}, {structure}): no structured layer is known for it.\n"
        "Known are Linear, convolutions of one group, and Conv1D; leave others out by ignore=."
    )


@stand_in.register
def _(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, structure: Structure, A: Any = None
) -> StructuredConv:
    taps = StructuredLinear.in_place_of(layer, structure, A)
    return StructuredConv(layer, taps).train(layer.training)


def dense_of(layer: nn.Module) -> nn.Module:
    """The dense layer with the outputs of a structured one; any other layer itself."""
    if isinstance(layer, StructuredConv):
        return layer.to_conv()
    if isinstance(layer, StructuredLinear):
        return as_it_was(layer.to_linear(), layer.stands_for)
    return layer


def take_hooks(new: nn.Module, old: nn.Module) -> None:
    """What is called with a module is called with the one in its place; handles stay valid."""
    for name in HOOKS:
        vars(new)[name] = vars(old)[name]


def swap(model: nn.Module, exchanged: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever those are; hooks go over.

    Raises:
        ValueError: If one of them is the model itself.
    """
    if model in exchanged:
        raise ValueError(
            f"the {type(model).__name__} that was given would itself be another layer.\n"
            "Put it into a module: nn.Sequential(model)."
        )
    for old, new in exchanged.items():
        take_hooks(new, old)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child in exchanged:
                parent._modules[key] = exchanged[child]
