"""Fused modules with a layer for each of their matrices, and back.

`nn.MultiheadAttention` multiplies by parts of one tensor and calls no layer; mixtures of experts of
`transformers` keep all experts in two tensors. Nothing that acts on layers (surgery, calibration,
curvature) sees into them. What stands in computes the same with `nn.Linear`s.

Shapes: N = examples, L = queries, S = keys, E = width, H = heads, T = tokens, k = experts of each.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matrigami.nn._choice import Patterns, matching
from matrigami.nn._stand_in import swap
from matrigami.nn._transformers import PACKAGE


class NoTensor:
    """In the place of a weight that is not there: what looks for a fast path does not take it."""

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        """No function of torch can be called with it."""
        raise TypeError(f"{function} was called with the fused weight of a SeparateAttention.")


class SeparateAttention(nn.Module):
    """An `nn.MultiheadAttention` whose projections are layers: `query`, `key`, `value`, `out_proj`.

    Args:
        fused: The attention; without added keys (`add_bias_kv`, `add_zero_attn`).

    Examples:
        >>> fused = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> torch.allclose(SeparateAttention(fused)(x, x, x)[0], fused(x, x, x)[0], atol=1e-6)
        True
    """

    in_proj_weight, in_proj_bias = NoTensor(), None
    """Read by `nn.TransformerEncoder` and its layers, which then call this module."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = fused.embed_dim, fused.num_heads
        self.dropout, self.batch_first = fused.dropout, fused.batch_first
        self.whole = fused._qkv_same_embed_dim
        sides = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        weights = fused.in_proj_weight.chunk(3) if self.whole else sides
        biases = (None,) * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        made = [_linear(W, b) for W, b in zip(weights, biases, strict=True)]  # pyright: ignore[reportArgumentType]
        self.query, self.key, self.value = made
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.train(fused.training)

    def forward(
        self,
        query: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002 - the mask says it
    ) -> tuple[Tensor, Tensor | None]:
        """As the fused one: the outputs, and the weights if they are asked for."""
        single, turned = query.ndim == 2, query.ndim == 3 and not self.batch_first
        if single:
            query, key, value = query[None], key[None], value[None]
        elif turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        mask, dropped = _merged(attn_mask, key_padding_mask, q), self.dropout * self.training
        if need_weights:
            scores = q @ k.mT * (self.embed_dim // self.num_heads) ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            heads = nn.functional.dropout(weights, dropped) @ v
            shown = weights.mean(1) if average_attn_weights else weights
            shown = shown[0] if single else shown
        else:  # as in torch: zero where a query may see no key, not NaN
            heads = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropped)
            shown = None
        y = self.out_proj(heads.transpose(1, 2).flatten(2))
        y = y[0] if single else y
        return y.transpose(0, 1) if turned else y, shown

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The attention of torch with the same outputs."""
        layers: Any = (self.query, self.key, self.value)
        W = self.query.weight
        new = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=self.query.bias is not None,
            kdim=None if self.whole else self.key.in_features,
            vdim=None if self.whole else self.value.in_features,
            batch_first=self.batch_first,
            device=W.device,
            dtype=W.dtype,
        )
        if self.whole:
            new.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        else:
            for name, layer in zip("qkv", layers, strict=True):
                new.get_parameter(f"{name}_proj_weight").copy_(layer.weight)
        if new.in_proj_bias is not None:
            new.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        new.out_proj.load_state_dict(self.out_proj.state_dict())
        frozen = not W.requires_grad
        return new.requires_grad_(not frozen).train(self.training)


class SeparateExperts(nn.ModuleList):
    """A mixture of experts of `transformers` whose experts are pairs of layers, `up` and `down`.

    Args:
        fused: The experts: `gate_up_proj` and `down_proj` with one axis more than a layer has.
    """

    def __init__(self, fused: Any) -> None:
        pairs = []
        for e in range(len(fused.gate_up_proj)):
            layers = {}
            for key, name in (("up", "gate_up_proj"), ("down", "down_proj")):
                W, bias = getattr(fused, name)[e], getattr(fused, f"{name}_bias", None)
                layers[key] = _linear(
                    W.mT if fused.is_transposed else W, None if bias is None else bias[e]
                )
            pairs.append(nn.ModuleDict(layers))
        super().__init__(pairs)
        shell = copy.copy(fused)
        shell._parameters = dict.fromkeys(fused._parameters)
        self.shell = (shell,)  # no child: the gate of the mixture, without its weights
        self.train(fused.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "T E"],
        top_k_index: Int[Tensor, "T k"],
        top_k_weights: Float[Tensor, "T k"],
    ) -> Float[Tensor, "T E"]:
        """The weighted sum of the experts of each token."""
        total, (shell,) = torch.zeros_like(hidden_states), self.shell
        for e, expert in enumerate(self):
            token, place = torch.where(top_k_index == e)
            if torch.compiler.is_exporting() or len(token):
                y = expert["down"](shell._apply_gate(expert["up"](hidden_states[token])))  # pyright: ignore[reportIndexIssue]
                total.index_add_(0, token, (y * top_k_weights[token, place, None]).to(total.dtype))
        return total

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """The experts of transformers with the same outputs."""
        (shell,) = self.shell
        new = copy.copy(shell)
        new._parameters = dict(shell._parameters)
        for key, name in (("up", "gate_up_proj"), ("down", "down_proj")):
            layers: Any = [expert[key] for expert in self]  # pyright: ignore[reportIndexIssue]
            W = torch.stack([layer.weight for layer in layers])
            W = W.mT.contiguous() if shell.is_transposed else W
            new._parameters[name] = nn.Parameter(W, layers[0].weight.requires_grad)
            if layers[0].bias is not None:
                bias = torch.stack([layer.bias for layer in layers])
                new._parameters[f"{name}_bias"] = nn.Parameter(bias, layers[0].bias.requires_grad)
        return new.train(self.training)


def separate_(model: nn.Module, targets: Patterns = "*") -> list[str]:
    """Give the fused modules of a model a layer for each of their matrices, in place.

    Known are `nn.MultiheadAttention` and the mixtures of experts of transformers. The outputs stay;
    torch's fast path for attention is not taken. `to_dense_` fuses them again.

    Args:
        model: The model.
        targets: Patterns of names of modules.

    Returns:
        The names of the modules.

    Raises:
        ValueError: If a pattern matches nothing, or `model` is itself such a module.

    Examples:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16)
        >>> separate_(model), model.self_attn.query
        (['self_attn'], Linear(in_features=8, out_features=8, bias=True))
    """
    named = dict(model.named_modules())
    found = {
        name: named[name]
        for name in matching(targets, named, model, "targets")
        if _kind(named[name]) is not None
    }
    swap(model, {old: _kind(old)(old) for old in found.values()})  # pyright: ignore[reportOptionalCall]
    return list(found)


def fuse_(model: nn.Module) -> list[str]:
    """Undo `separate_` where all matrices are dense."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SeparateAttention | SeparateExperts) and _is_dense(module)
    }
    swap(model, {module: module.fused() for module in found.values()})
    return list(found)


def separated(model: nn.Module) -> list[str]:
    """The names of the modules that `separate_` has made."""
    kinds = SeparateAttention | SeparateExperts
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _kind(module: Any) -> Any:
    """What stands in for a fused module; None if it is none, or more than is known."""
    if type(module) is nn.MultiheadAttention:
        return None if module.add_zero_attn or module.bias_k is not None else SeparateAttention
    known = type(module).__module__.startswith(PACKAGE) and hasattr(module, "_apply_gate")
    names = ("gate_up_proj", "down_proj", "is_transposed")
    if not known or not all(hasattr(module, name) for name in names):
        return None
    plain = getattr(module, "has_gate", True) and not getattr(module, "has_post_expert_norm", False)
    return SeparateExperts if plain and module.gate_up_proj.ndim == 3 else None


def _linear(W: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these numbers."""
    m, n = W.shape
    new = nn.Linear(n, m, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(W.detach().clone().contiguous(), W.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return new


def _is_dense(module: nn.Module) -> bool:
    """Whether all layers inside are as `separate_` has made them."""
    inner = [m for m in module.modules() if not list(m.children())]
    return all(type(m) is nn.Linear for m in inner)


def _merged(attn: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to scores `(N, H, L, S)`."""
    masks = []
    if attn is not None:
        added = attn.unflatten(0, (q.shape[0], -1)) if attn.ndim == 3 else attn
        masks.append(added)
    if padding is not None:
        masks.append((padding if padding.ndim == 2 else padding[None])[:, None, None])
    if not masks:
        return None
    none = q.new_zeros(())
    floats = [torch.where(m, -torch.inf, none) if m.dtype == torch.bool else m for m in masks]
    return sum(floats[1:], floats[0]).to(q.dtype)
