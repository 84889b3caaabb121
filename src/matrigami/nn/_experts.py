"""A mixture of structured experts: the rank index of a factorised layer is the index of an expert.

`y = sum_e w_e(x) A_e x + b` over the `active` experts with the largest logits `G x`; `w` is the
softmax of those. With block tensor trains of rank 1 the experts are the terms of one train of rank
`experts`, each switched on where it is needed (Potapczynski et al. 2024, arXiv:2410.02117). Vectors
are sorted by their expert and each expert multiplies its own: nothing is computed to be thrown
away, nothing is dropped, and the order of all sums is fixed.

Storage: `experts` members and the gate, `experts n`; cost per vector: `active` products and the
gate.

Shapes: N = examples, S = positions, c = vectors (all positions of all examples), E = experts, a =
active ones, n = inputs, m = outputs, K = columns of gradients.
"""

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.nn._anatomy import Part, Parts, Role, Use, Whole, parts
from matrigami.nn._expert_products import expert_products
from matrigami.nn._factored import Factored
from matrigami.nn._layers import weight_part
from matrigami.nn._linear import why_unseen
from matrigami.nn._mixture import GATE_SCALE, Mixture
from matrigami.nn._taps import batched, constant_use, core_use, linear_use
from matrigami.operators import (
    Cost,
    LinearOperator,
    Structure,
    as_two_factors,
    check_recipe,
    check_sizes,
    contractions,
    cost,
    is_written_in_place,
    named_tensors,
    stacked_view,
    with_tensors,
)


class StructuredMoE(Mixture, Factored):
    """`y = sum_e w_e(x) A_e x + b`: a few of many members of a structure for each input vector.

    It takes the place of a linear layer. Its parameters are the tensors of the structure with the
    experts first, the gate and the bias. Logits are computed in single precision at least. The
    split into experts waits for their counts: `torch.compile` breaks its graph there, and `vmap`
    over inputs is refused by torch.

    Args:
        in_features: Size `n` of the last axis of the input.
        out_features: Size `m` of the last axis of the output.
        structure: The recipe of one expert, e.g. `BlockTensorTrain(rank=1)`.
        experts: How many there are, `E`.
        active: How many multiply each vector.
        bias: Add a learnable vector, zero at the start.
        zero_init: Start with `A = 0`, as in `StructuredLinear`.
        rms_cap: As in `StructuredLinear`, for each expert on its own.
        device: Where the parameters are.
        dtype: Their type.
        generator: Source of the random numbers.

    Raises:
        ValueError: If the numbers of experts or the sizes do not fit.
        TypeError: If the structure is none.

    Examples:
        >>> from matrigami import BlockTensorTrain
        >>> moe = StructuredMoE(16, 64, BlockTensorTrain(rank=1), experts=8, active=2)
        >>> moe(torch.ones(2, 5, 16)).shape, moe.matrix().shape
        (torch.Size([2, 5, 64]), (8, 64, 16))
        >>> moe.cost().params, moe.cost().macs
        (3200, 896)
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: Structure,
        experts: int,
        active: int,
        *,
        bias: bool = True,
        zero_init: bool = False,
        rms_cap: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, experts, active)
        check_sizes("StructuredMoE", out_features=out_features)
        check_recipe(structure, "StructuredMoE: structure")
        self.out_features, self.structure = out_features, structure
        self.zero_init, self.rms_cap = zero_init, rms_cap
        empty = partial(torch.empty, dtype=dtype, device=device)
        self.hold(structure.blank(out_features, in_features, empty), (experts,))
        self.gate = nn.Parameter(empty(experts, in_features))
        self.register_parameter("bias", nn.Parameter(empty(out_features)) if bias else None)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the experts and the gate again; needed after `to_empty`."""
        super().reset_parameters(generator)
        with torch.no_grad():
            scale = (GATE_SCALE / self.in_features) ** 0.5
            self.gate.normal_(0.0, scale, generator=generator)

    @property
    def gate_weight(self) -> Float[Tensor, "E n"]:
        """What makes the logits of a vector."""
        return self.gate

    def cost(self) -> Cost:
        """All parameters and bytes, and the multiply-adds of the active experts and the gate."""
        all_of_them = cost(self.matrix())
        macs = all_of_them.macs // self.experts * self.active + self.gate.numel()
        return Cost(
            all_of_them.params + self.gate.numel(), macs, all_of_them.bytes + self.gate.nbytes
        )

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Multiply the last axis, each vector by its experts."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self}: the input has shape {tuple(x.shape)}.\n"
                f"Its last axis must be {self.in_features}."
            )
        X = x.reshape(-1, self.in_features)
        y = self._mixed(X)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _mixed(self, X: Float[Tensor, "c n"]) -> Float[Tensor, "c m"]:
        """The weighted sum of the products of all experts, each with its own vectors."""
        factors = as_two_factors(self.matrix())
        if factors is not None and X.is_cpu and is_written_in_place(X, *factors[:2]):
            self._routing = logits, experts, _ = self.route(X)
            logs = logits.mT.gather(0, experts.mT).log_softmax(0).mT
            return expert_products(X, logs.to(X.dtype), experts, factors)
        kind = _kind(X)
        Y = X.new_zeros(self.out_features, len(X), dtype=kind)
        for A, (place, own, weight) in zip(self._members(), self.routed(X), strict=True):
            Y = Y.index_add_(1, place, A.matmat(own.mT).to(kind) * weight.to(kind))
        return Y.mT  # an expert has a vector once: no sum races

    def _members(self) -> Iterator[LinearOperator]:
        """Each expert."""
        for tensors in zip(*[t.unbind(0) for t in self.tensors()], strict=True):
            yield with_tensors(self._template, iter(tensors))

    def extra_repr(self) -> str:
        """Sizes, structure and experts."""
        sizes = f"{self.in_features}, {self.out_features}, {self.structure}"
        return f"{sizes}, {self.experts}, {self.active}, bias={self.bias is not None}"


def _kind(X: Tensor) -> torch.dtype:
    """The type of the output: that of autocast, where it is on and the input is in single."""
    kind = X.device.type
    cast = torch.is_autocast_enabled(kind) and X.dtype == torch.float32
    return torch.get_autocast_dtype(kind) if cast else X.dtype


@parts.register
def _(layer: StructuredMoE) -> Parts:
    """Each tensor is a stack of its blocks over all experts; the gate is a matrix of its own."""
    sizes, factors = (layer.in_features, layer.out_features), len(layer.factor_names)
    stack = contractions(_stack(layer))
    found: Parts = {}
    for i, (name, part) in enumerate(zip(layer.factor_names, stack, strict=True)):
        view, why = part.matrix.view, why_unseen(layer, part)
        found[name] = Part(
            Role.CORE,
            view if view.two_sided else None,
            layer.fans[i],
            Whole(*sizes, factors),
            None if why else partial(_core_tap, layer, i),
            refused=why,
            features=1,
        )
    gate = weight_part(
        Role.MATRIX,
        stacked_view(tuple(layer.gate.shape)),
        partial(_gate_tap, layer),
        whole=Whole(layer.in_features, layer.experts, growth=(1, 0)),
        features=1,
    )
    found |= {name: Part(Role.GAIN) for name in layer.gains()}
    return found | {"gate": gate, "bias": Part(Role.BIAS, tap=constant_use, features=1)}


def _stack(layer: StructuredMoE) -> LinearOperator:
    """The experts without numbers, for their layout."""
    blank = [t.detach().to("meta") for t in named_tensors(layer.matrix()).values()]
    return with_tensors(layer._template, iter(blank))


def _core_tap(layer: StructuredMoE, i: int, x: Tensor, g: Tensor | None) -> Use:
    """Of a tensor of all experts: each sees every input, and the gradients of its own vectors."""
    x, g = batched(x, g, 1)
    X = x.reshape(-1, layer.in_features).mT.expand(layer.experts, -1, -1)  # E n c
    part = contractions(layer.matrix())[i]
    if g is None:
        return core_use(part, X, None, len(x))
    logits, experts, weights = layer.route(x)
    W = torch.zeros_like(logits).scatter(1, experts, weights).to(g)  # c E
    G = g.reshape(len(g), -1, layer.out_features).movedim(-1, 0)  # m K c
    return core_use(part, X, W.mT[:, None, None] * G, len(x))


def _gate_tap(layer: StructuredMoE, x: Tensor, g: Tensor | None) -> Use:
    """Of the logits, through the softmax of the active ones."""
    x, g = batched(x, g, 1)
    if g is None:
        return linear_use(x, None)
    _, experts, weights = layer.route(x)
    outputs = layer.matrix().matmat(x.reshape(-1, layer.in_features).mT)  # E m c
    G = g.reshape(len(g), -1, layer.out_features)  # K c m
    score = torch.einsum("emc,kcm->kce", outputs, G)
    own = score.gather(-1, experts.expand(len(g), -1, -1))  # K c a
    change = weights.to(own) * (own - (weights.to(own) * own).sum(-1, keepdim=True))
    logits = torch.zeros_like(score).scatter(-1, experts.expand(len(g), -1, -1), change)
    return linear_use(x, logits.reshape(*g.shape[:-1], layer.experts))
