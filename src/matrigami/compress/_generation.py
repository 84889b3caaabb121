"""Calibration on what a language model writes itself, where nobody has texts that fit.

What a model finds probable is near to what it was trained on: calibrated on it, a rounded model is
nearly as good as on held-out data, and better than on random tokens (Williams et al. 2024,
arXiv 2410.17170).

Shapes: B = sequences of a batch, L = tokens of a sequence, V = tokens that there are.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from matrigami.compress._running import at_rest, batches_of, called, logits

SELF = "self"
"""What is given in the place of batches."""


@torch.no_grad()
def self_calibration(
    model: nn.Module, sequences: int = 64, length: int = 256, batch: int = 8, *, seed: int = 0
) -> list[Any]:
    """Sequences that a language model draws token by token, as batches to calibrate on.

    The first token is the one that begins a text, where the configuration of the model names it,
    and else any, all alike; every other one is drawn from what the model says.

    Args:
        model: Takes token numbers `(B, L)`, as `input_ids=` if it is one of transformers, and
            answers with logits `(B, L, V)`.
        sequences: How many.
        length: Tokens of each, at most; of transformers no more than the model has positions.
        batch: Sequences at once.
        seed: Of the draws; those of others go on as if there were none.

    Raises:
        ValueError: If the answers are no logits of tokens.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> [tuple(ids.shape) for ids in self_calibration(model, sequences=3, length=6, batch=2)]
        [(2, 6), (1, 6)]
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cards = [device] if device.type == "cuda" else []
    with at_rest(model), torch.random.fork_rng(cards):
        torch.manual_seed(seed)
        parts = torch.zeros(sequences, 1, dtype=torch.long, device=device).split(batch)
        return [_batch(model, _written(model, _begun(model, part), length)) for part in parts]


def examples(model: nn.Module, calibration: Iterable[Any]) -> list[Any]:
    """The batches that were given, or those that the model writes."""
    wanted = isinstance(calibration, str) and calibration == SELF
    return self_calibration(model) if wanted else batches_of(calibration)


def _batch(model: nn.Module, ids: Int[Tensor, "B L"]) -> Any:
    """As the model takes it."""
    return {"input_ids": ids} if hasattr(model, "config") else ids


def _begun(model: nn.Module, ids: Int[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
    """The first tokens."""
    begin = getattr(getattr(model, "config", None), "bos_token_id", None)
    if isinstance(begin, int):
        return ids + begin
    return torch.randint(_next(model, ids).shape[-1], ids.shape, device=ids.device)


def _written(model: Any, ids: Int[Tensor, "B 1"], length: int) -> Int[Tensor, "B L"]:
    """The whole sequences; models of transformers keep what they have computed."""
    if hasattr(model, "config") and callable(getattr(model, "generate", None)):
        most = getattr(model.config, "max_position_embeddings", None) or length
        more = min(length, most) - ids.shape[1]
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        sizes = {"min_new_tokens": more, "max_new_tokens": more, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        return model.generate(input_ids=ids, attention_mask=mask, **options, **sizes)
    while ids.shape[1] < length:
        p = _next(model, ids).float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return ids


def _next(model: nn.Module, ids: Int[Tensor, "B L"]) -> Tensor:
    """The logits of the token that comes next."""
    found = logits(called(model, _batch(model, ids)))
    if found.ndim != 3 or found.shape[:2] != ids.shape:
        raise ValueError(
            f'calibration="self": the {type(model).__name__} answers {tuple(ids.shape)} tokens by '
            f"{tuple(found.shape)}, no logits for each.\n"
            "Only language models write their own texts; give batches of examples."
        )
    return found[:, -1]
