"""One linear layer for every structure."""

from functools import partial
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from matrigami.nn._anatomy import Part, Parts, Role, Tap, Use, Whole, parts
from matrigami.nn._choice import matrix_view
from matrigami.nn._factored import Factored
from matrigami.nn._taps import batched, constant_use, core_use
from matrigami.operators import (
    Contraction,
    Cost,
    LinearOperator,
    Structure,
    check_recipe,
    check_sizes,
    contractions,
    cost,
    named_tensors,
    project,
)

Versions = list[tuple[Tensor, int]]
"""Each tensor of a weight, and the number of writes to it."""


class StructuredLinear(Factored):
    """`y = A x + b` with `A` a member of a structure; its parameters are the tensors of the value.

    Args:
        in_features: Size `n` of the last axis of the input.
        out_features: Size `m` of the last axis of the output.
        structure: The recipe, e.g. `BlockTensorTrain(rank=2)`.
        bias: Add a learnable vector, zero at the start.
        zero_init: Start with `A = 0` by a zero in the factor applied last (second layer of a
            residual block, head).
        rms_cap: Keep the root mean square of each factor at or below its initial value, times a
            learnable gain (weight normalisation of Potapczynski et al. 2024, arXiv:2410.02117;
            they use it for language models).
        device: Where the parameters are.
        dtype: Their type.
        generator: Source of the random numbers.

    Raises:
        ValueError: If the size does not fit the structure.
        TypeError: If that is none.

    Examples:
        >>> from matrigami import Monarch
        >>> layer = StructuredLinear(16, 32, Monarch(blocks=4))
        >>> sorted(layer.state_dict()), layer(torch.ones(2, 5, 16)).shape
        (['bias', 'left', 'right'], torch.Size([2, 5, 32]))
    """

    bias: Tensor | None
    stands_for: type[nn.Module] = nn.Linear
    """The kind of the layer in whose place it is."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: Structure,
        *,
        bias: bool = True,
        zero_init: bool = False,
        rms_cap: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes("StructuredLinear", in_features=in_features, out_features=out_features)
        check_recipe(structure, "StructuredLinear: structure")
        self.in_features, self.out_features, self.structure = in_features, out_features, structure
        self.rms_cap, self.zero_init = rms_cap, zero_init
        empty = partial(torch.empty, dtype=dtype, device=device)
        self._materialized: tuple[int, Tensor, Versions] | None = None
        self.hold(structure.blank(out_features, in_features, empty))
        self.register_parameter("bias", nn.Parameter(empty(out_features)) if bias else None)
        self.reset_parameters(generator)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, structure: Structure, *, inputs: Any = None, outputs: Any = None
    ) -> "StructuredLinear":
        """The structured layer nearest to a dense one.

        In the Frobenius norm of its weight, or in the metric of second moments: with that of the
        inputs the outputs change least, with that of the output gradients, too, the loss.

        Args:
            linear: The dense layer.
            structure: The structure of the new weight.
            inputs: Second moment of the inputs, `n x n`.
            outputs: Second moment of the output gradients, `m x m`.

        Examples:
            >>> from matrigami import LowRank
            >>> dense = nn.Linear(8, 6)
            >>> layer = StructuredLinear.from_linear(dense, LowRank(rank=6))
            >>> torch.allclose(layer(torch.ones(8)), dense(torch.ones(8)), atol=1e-5)
            True
        """
        weight = linear.weight.detach()
        return cls.in_place_of(
            linear, structure, project(structure, weight, left=outputs, right=inputs)
        )

    @classmethod
    def in_place_of(
        cls, layer: nn.Module, structure: Structure, A: LinearOperator | None = None
    ) -> "StructuredLinear":
        """The layer with the matrix `A` of a structure, and all else as in a dense one.

        Args:
            layer: An `nn.Linear`, or another layer whose weight is one matrix.
            structure: The structure of `A`.
            A: The matrix; None draws one.
        """
        view, weight, bias = matrix_view(layer), layer.weight, layer.bias
        if view is None:
            raise ValueError(f"in_place_of({layer}): its weight is not one matrix.")
        kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        new = cls(view.columns, view.rows, structure, bias=bias is not None, **kind)
        if A is not None:
            new.load_matrix(A)
        new.requires_grad_(weight.requires_grad)  # pyright: ignore[reportArgumentType]
        if new.bias is not None:
            new.bias.data.copy_(bias.detach())  # pyright: ignore[reportCallIssue]
            new.bias.requires_grad_(bias.requires_grad)  # pyright: ignore[reportArgumentType]
        new.stands_for = type(layer)
        return new.train(layer.training)

    def load_matrix(self, A: LinearOperator) -> None:
        """Take over the tensors of a value of this layer's structure and size.

        Raises:
            ValueError: If the value has other tensors or other shapes.
        """
        ours = {name: tuple(getattr(self, name).shape) for name in self.factor_names}
        given = named_tensors(A)
        if {name: tuple(t.shape) for name, t in given.items()} != ours:
            raise ValueError(
                f"load_matrix(A): A, a {A!r}, has other tensors than this layer, which holds\n"
                f"{', '.join(f'{name} {shape}' for name, shape in ours.items())}.\n"
                "Project onto the layer's structure first."
            )
        for (name, t), fan in zip(given.items(), self.fans, strict=True):
            if is_parametrized(self, name):
                setattr(self, name, t.to(getattr(self, name)))  # by its right inverse
            else:
                self.get_parameter(name).data.copy_(t)
            if self.rms_cap:  # a gain that undoes the cap
                self.get_parameter(f"gain_{name}").data.copy_(self.excess(t, fan))
        self._materialized = None

    @property
    def weight(self) -> Tensor:
        """The dense `m x n` weight, differentiable: for code that reads it as of `nn.Linear`."""
        return self.matrix().dense()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight again, as the constructor does; needed after `to_empty`."""
        super().reset_parameters(generator)
        self._materialized = None

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same output."""
        weight = self.matrix().dense().detach()
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        linear.weight.data.copy_(weight)
        if self.bias is not None:
            linear.bias.data.copy_(self.bias.detach())
        return linear

    def cost(self) -> Cost:
        """Parameters, multiply-adds for one input vector, bytes; without the bias."""
        return cost(self.matrix())

    def materialize(self, tokens: int = 1, repeats: int = 5) -> bool:
        """Hold the dense weight for few input vectors, if that is measured to be faster.

        With few vectors a structured product is bound by the number of its calls, not by
        arithmetic. The dense weight is used only where no gradient is recorded, and only while the
        tensors are those it was made of, not written to since (a write through `.data` is not seen
        and needs `train()`); it is never in the state dict.

        Args:
            tokens: Number of vectors at which to measure, and up to which the dense weight is used.
            repeats: Timings of each product; the fastest counts.

        Returns:
            Whether the dense weight is held.

        Raises:
            ValueError: If the layer is in training mode.
        """
        if self.training:
            raise ValueError(
                "materialize(): the layer is in training mode, in which the parameters change.\n"
                "Call model.eval() first."
            )
        self._materialized = None
        with torch.no_grad():
            weight = self.matrix().dense()
            x = torch.ones(tokens, self.in_features, dtype=weight.dtype, device=weight.device)
            structured = fastest(lambda: self(x), repeats, x.device)
            dense = fastest(lambda: nn.functional.linear(x, weight, self.bias), repeats, x.device)
        if dense < structured:
            self._materialized = (tokens, weight, self._versions())
        return self._materialized is not None

    def train(self, mode: bool = True) -> "StructuredLinear":
        """Set the mode; training drops the materialised weight."""
        if mode:
            self._materialized = None
        return super().train(mode)

    def forward(
        self,
        input: Float[Tensor, "*batch n"],  # noqa: A002 - as torch calls it
    ) -> Float[Tensor, "*batch m"]:
        """Multiply the last axis."""
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"{self}: the input has shape {tuple(input.shape)}.\n"
                f"Its last axis must be {self.in_features}."
            )
        y = self._product(input.reshape(-1, self.in_features))
        kind = y.device.type
        if torch.is_autocast_enabled(kind) and y.dtype == torch.float32:  # no product was cast
            y = y.to(torch.get_autocast_dtype(kind))
        y = y if self.bias is None else y + self.bias.to(y.dtype)  # as autocast left it
        return y.reshape(*input.shape[:-1], self.out_features)

    def _product(self, x: Float[Tensor, "tokens n"]) -> Float[Tensor, "tokens m"]:
        """By the dense weight where it is held, still true and faster; else by the factors."""
        held = None if torch.is_grad_enabled() else self._materialized
        if held is not None and len(x) <= held[0] and _same(held[2], self._versions()):
            return x @ held[1].mT
        return self.matrix().matmat(x.mT).mT  # tokens stay the fastest axis: no copies inside

    def extra_repr(self) -> str:
        """Sizes and structure."""
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, {self.structure}, bias={self.bias is not None}"

    def _versions(self) -> Versions:
        """Which tensors the weight is made of now, and how often each was written to."""
        tensors = [getattr(self, name) for name in (*self.factor_names, *self.gains())]
        return [(t, -1 if t.is_inference() else t._version) for t in tensors]

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without the dense weight: its tensors count their versions anew."""
        return self.__dict__ | {"_materialized": None}

    def _apply(self, *args: Any, **options: Any) -> "StructuredLinear":
        """Another device or dtype invalidates the dense weight."""
        self._materialized = None
        return super()._apply(*args, **options)


@parts.register
def _(layer: StructuredLinear) -> Parts:
    """Each tensor by the part that it plays in the product; the bias on its own."""
    plain = not layer.rms_cap and not is_parametrized(layer)
    product = layer.matrix() if plain else None
    sizes = (layer.in_features, layer.out_features, len(layer.factor_names))
    whole, found = Whole(*sizes, product=product), Parts()
    for i, part in enumerate(contractions(layer._template)):
        view, why = part.matrix.view, why_unseen(layer, part)
        tap = None if why else _core_tap(layer, i)
        blocks = view if view.two_sided else None
        found[layer.factor_names[i]] = Part(
            Role.CORE, blocks, layer.fans[i], whole, tap, refused=why, features=1
        )
    found |= {name: Part(Role.GAIN) for name in layer.gains()}
    return found | {"bias": Part(Role.BIAS, tap=constant_use, features=1)}


def why_unseen(layer: Factored, part: Contraction) -> str:
    """Why the inputs and gradients of a core cannot be read."""
    if layer.rms_cap:
        return "with rms_cap"
    ordered = part.matrix.row_major or part.matrix.column_major
    return "" if ordered else "with a core whose axes are neither row- nor column-major"


def _core_tap(layer: StructuredLinear, i: int) -> Tap:
    """How the blocks of one tensor are read: from both sides through the rest of the product."""

    def tap(x: Tensor, g: Tensor | None) -> Use:
        """One use."""
        x, g = batched(x, g, 1)
        X = x.reshape(-1, layer.in_features).mT
        G = None if g is None else g.reshape(len(g), -1, layer.out_features).movedim(-1, 0)
        return core_use(contractions(layer.matrix())[i], X, G, len(x))

    return tap


def _same(old: Versions, new: Versions) -> bool:
    """Whether these are the same tensors, with nothing written to them in between."""
    pairs = zip(old, new, strict=True)
    return all(t is s and version == now for (t, version), (s, now) in pairs)


def fastest(product: Any, repeats: int, device: torch.device) -> float:
    """Least seconds of a call, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)
    return min(seconds[1:])
