"""Weights and attention of a small Llama, from a folder with `model.safetensors` and `config.json`.

The model writes its own text, so that no other data are needed; the attention of that text is that
of one head, before and after the softmax. The initial model is drawn as such models are: normal
weights of deviation 0.02.

Shapes: t = positions, h = heads, d = features of a head, w = width.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from matrigami.studies.analysis._sources import Loaded, Source

LENGTHS = (64, 128, 256)
"""Positions of the text."""

LAYER, HEAD = 2, 0
"""Whose attention is shown."""

SPREAD = 0.02
"""Deviation of initial weights."""

WEIGHTS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
"""Of this layer, besides the embedding."""

Tensors = dict[str, Tensor]


def language_model_sources(folder: Path) -> list[Source]:
    """Weights and attention, initial and trained.

    Raises:
        ValueError: If there is no such model.
    """
    model = _model(folder)
    names = ["model.embed_tokens", *[f"model.layers.{LAYER}.{name}" for name in WEIGHTS]]
    found = []
    for stage in ("initial", "trained"):
        for name in names:
            m, n = model[stage][f"{name}.weight"].shape
            label = name.rsplit(".", 1)[-1]

            def load(stage: str = stage, name: str = name) -> Tensor:
                return _model(folder)[stage][f"{name}.weight"]

            found.append(_source(f"Llama {label}, {stage}", m, n, load))
    for stage in ("initial", "trained"):
        for part in ("logits", "softmax"):
            found += [_attention(folder, stage, part, length) for length in LENGTHS]
    return found


def _source(name: str, m: int, n: int, load: Callable[[], Tensor]) -> Source:
    """A matrix without points."""

    def loaded() -> Loaded:
        return load().double(), None

    return Source(f"{name} · {m}x{n}", (m, n), loaded, name)


def _attention(folder: Path, stage: str, part: str, length: int) -> Source:
    """The attention of one head to the first positions of a text."""

    def load() -> Tensor:
        config, model = _config(folder), _model(folder)
        text = _text(folder, max(LENGTHS))[:length]
        return getattr(_run(config, model[stage], text).attention[LAYER], part)[HEAD]

    return _source(f"attention {part}, {stage}", length, length, load)


@functools.cache
def _config(folder: Path) -> dict[str, Any]:
    """The hyper-parameters."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"language model {folder}: "
            f"its config.json cannot be read: {error}.\n"
            "Give a folder of LlamaForCausalLM: config.json and model.safetensors."
        ) from error


@functools.cache
def _model(folder: Path) -> dict[str, Tensors]:
    """The weights by stage."""
    config, path = _config(folder), folder / "model.safetensors"
    if config.get("model_type") != "llama" or not path.exists():
        raise ValueError(
            f"language model {folder}: "
            f"it is of type {config.get('model_type')!r}, with{'' if path.exists() else 'out'} "
            "model.safetensors.\n"
            "Give a folder of LlamaForCausalLM: config.json and model.safetensors."
        )
    trained = {name: t.double() for name, t in load_file(path).items()}
    generator = torch.Generator().manual_seed(0)
    initial = {
        name: torch.randn(t.shape, generator=generator, dtype=t.dtype) * SPREAD
        if t.ndim == 2
        else torch.ones_like(t)
        for name, t in trained.items()
    }
    return {"initial": initial, "trained": trained}


@functools.cache
def _text(folder: Path, length: int) -> Int[Tensor, " t"]:
    """Tokens that the trained model draws after that of the beginning."""
    config, weights = _config(folder), _model(folder)["trained"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([config.get("bos_token_id", 1)])
    while len(tokens) < length:
        odds = _run(config, weights, tokens).logits[-1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=generator)])
    return tokens


class Attention(NamedTuple):
    """Of the heads of a layer: scaled products of all positions, weights of earlier ones."""

    logits: Float[Tensor, "h t t"]
    softmax: Float[Tensor, "h t t"]


class Run(NamedTuple):
    """What the model says of the next tokens, and the attention of each layer."""

    logits: Float[Tensor, "t v"]
    attention: list[Attention]


def _run(config: dict[str, Any], weights: Tensors, tokens: Int[Tensor, " t"]) -> Run:
    """One forward pass (Touvron et al. 2023, arXiv:2302.13971)."""
    embedding = weights["model.embed_tokens.weight"]
    x, attention = embedding[tokens], []
    eps = config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): t
            for name, t in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        mixed, seen = _attend(config, own, _normed(x, own["input_layernorm.weight"], eps))
        x = x + mixed
        attention.append(seen)
        h = _normed(x, own["post_attention_layernorm.weight"], eps)
        gate = nn.functional.silu(h @ own["mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", embedding)
    return Run(_normed(x, weights["model.norm.weight"], eps) @ head.T, attention)


def _attend(config: dict[str, Any], own: Tensors, h: Tensor) -> tuple[Tensor, Attention]:
    """Causal attention with rotary positions; keys and values serve several heads."""
    heads = config["num_attention_heads"]
    groups = heads // config.get("num_key_value_heads", heads)
    q, k, v = (
        (h @ own[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, h.shape[-1] // heads))
        for name in ("q", "k", "v")
    )
    q, k = (_rotated(t, config.get("rope_theta", 10000.0)) for t in (q, k))
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    logits = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    later = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
    softmax = logits.masked_fill(later, -torch.inf).softmax(-1)
    mixed = torch.einsum("hts,shd->thd", softmax, v).flatten(1)
    return mixed @ own["self_attn.o_proj.weight"].T, Attention(logits, softmax)


def _rotated(x: Float[Tensor, "t h d"], theta: float) -> Float[Tensor, "t h d"]:
    """Pairs of features, half the head apart, turned by the position."""
    t, _, d = x.shape
    rates = theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    angle = torch.arange(t, dtype=x.dtype)[:, None, None] * rates
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divided by its root mean square."""
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
