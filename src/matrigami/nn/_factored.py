"""What layers of structured matrices have in common: the tensors of a value as parameters.

Shapes: c = copies, the leading axes of a layer of several members.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from matrigami.operators import (
    Fan,
    LinearOperator,
    draw,
    fans,
    named_tensors,
    with_tensors,
)


class Factored(nn.Module):
    """A layer whose parameters are the tensors of a member of a structure, or of several.

    Attributes:
        factor_names: The tensors, by their names in the value.
        fans: Fan-in and fan-out of each.
        zero_init: Start with zero, by a zero in the factor applied last.
        rms_cap: Keep the root mean square of each factor of each member at or below its initial
            value, times a learnable gain.
    """

    factor_names: tuple[str, ...]
    fans: tuple[Fan, ...]
    zero_init: bool
    rms_cap: bool
    bias: Tensor | None

    def hold(self, value: LinearOperator, copies: tuple[int, ...] = ()) -> None:
        """Register the tensors of a value, so many times, and keep its layout."""
        tensors = named_tensors(value)
        self.factor_names, self.fans, self.copies = tuple(tensors), fans(value), copies
        self._template = with_tensors(value, iter([t.to("meta") for t in tensors.values()]))
        for name, t in tensors.items():
            empty = t.new_empty(*copies, *t.shape)
            self.register_parameter(name, nn.Parameter(empty))
            if self.rms_cap:
                self.register_parameter(f"gain_{name}", nn.Parameter(t.new_ones(copies)))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight again, as the constructor does; needed after `to_empty`."""
        with torch.no_grad():
            drawn = draw(with_tensors(self._template, self.stored()), generator)
            for (name, t), fan in zip(named_tensors(drawn).items(), self.fans, strict=True):
                p = self.get_parameter(name)
                p.copy_(torch.zeros_like(t) if self.zero_init and fan.last else t)
                if self.rms_cap:
                    self.get_parameter(f"gain_{name}").fill_(1.0)
            if self.bias is not None:
                self.bias.zero_()

    def matrix(self) -> LinearOperator:
        """The weight as a value, sharing storage (and gradients) with the parameters.

        Of a mixture: all experts as one stack, `(E, m, n)`.
        """
        return with_tensors(self._template, iter(self.tensors()))

    def stored(self) -> Iterator[Tensor]:
        """The parameters of the weight."""
        return iter([getattr(self, name) for name in self.factor_names])

    def tensors(self) -> list[Tensor]:
        """The tensors of the weight: the parameters, capped if asked."""
        if not self.rms_cap:
            return list(self.stored())
        return [
            t * self._over(t, getattr(self, f"gain_{name}")) / self._over(t, self.excess(t, fan))
            for name, t, fan in zip(self.factor_names, self.stored(), self.fans, strict=True)
        ]

    def excess(self, t: Tensor, fan: Fan) -> Tensor:
        """How far the root mean square of a factor is above its initial value, at least 1."""
        copies = t.shape[: len(self.copies)]
        mean = t.square().reshape(*copies, -1).mean(-1)
        return (torch.sqrt(mean + 1e-16) / fan.std).clamp_min(1.0)

    def _over(self, t: Tensor, each: Tensor) -> Tensor:
        """A number of each copy, over all its entries."""
        return each.reshape(*each.shape, *[1] * (t.ndim - each.ndim))

    def gains(self) -> list[str]:
        """Names of the learnable gains."""
        return [f"gain_{name}" for name in self.factor_names] if self.rms_cap else []
