"""How far a compressed model is from the one that it was made of.

Shapes: N = tokens, C = classes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from matrigami.compress._running import at_rest, called, logits


@dataclass(frozen=True)
class Evaluation:
    """A model beside its reference, on the same data.

    Attributes:
        tokens: Positions that were compared.
        kl: Mean of `KL(reference || model)` of the predictions, in nats.
        agreement: Share of positions with the same most likely class.
        perplexity: Of the next token; NaN where the batches are not token sequences.
        reference_perplexity: The same of the reference.
        tokens_per_second: Measured, in evaluation mode on this machine.
        reference_tokens_per_second: The same of the reference.
    """

    tokens: int
    kl: float
    agreement: float
    perplexity: float
    reference_perplexity: float
    tokens_per_second: float
    reference_tokens_per_second: float


@torch.no_grad()
def evaluate(model: nn.Module, reference: nn.Module, data: Iterable[Any]) -> Evaluation:
    """Compare the predictions of two models.

    Args:
        model: The compressed model; its outputs are logits, or have them as `.logits`.
        reference: The model that it was made of.
        data: Batches: tensors, tuples of arguments, or mappings; of `input_ids` the next ones are
            predicted, for the perplexity.

    Raises:
        ValueError: If there are no batches, or the models do not predict the same classes.

    Examples:
        >>> model = nn.Linear(3, 4)
        >>> found = evaluate(model, model, [torch.ones(5, 3)])
        >>> found.tokens, found.kl, found.agreement
        (5, 0.0, 1.0)
    """
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = predicted = 0
    seconds = [0.0, 0.0]
    with at_rest(model), at_rest(reference):
        for batch in data:
            theirs, took = _predictions(reference, batch)
            seconds[1] += took
            ours, took = _predictions(model, batch)
            seconds[0] += took
            if ours.shape != theirs.shape:
                raise _of_other_sizes(ours, theirs)
            kept = _kept(batch, ours)
            p, q = theirs.flatten(0, -2)[kept], ours.flatten(0, -2)[kept]
            sums[0] += float((p.exp() * (p - q)).sum())
            sums[1] += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(p)
            if (targets := _targets(reference, batch, ours)) is not None:
                sums[2] += _nll(ours, targets)
                sums[3] += _nll(theirs, targets)
                predicted += int((targets >= 0).sum())
    if not tokens:
        raise ValueError("evaluate(model, reference, data): data has no batches.\nGive some.")
    words = (sums[2:] / predicted).exp().tolist() if predicted else [float("nan")] * 2
    rates = [tokens / max(s, 1e-9) for s in seconds]
    return Evaluation(tokens, float(sums[0]) / tokens, float(sums[1]) / tokens, *words, *rates)


def _of_other_sizes(ours: Tensor, theirs: Tensor) -> ValueError:
    """What to raise where predictions are no two of the same."""
    sizes = [" x ".join(map(str, t.shape)) for t in (ours, theirs)]
    return ValueError(
        f"evaluate(model, reference, data): the model predicts {sizes[0]}, the reference {sizes[1]}"
        ".\nGive the model that it was made of: of the same vocabulary or classes."
    )


def _predictions(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    """Logarithms of probabilities, and the seconds of the call."""
    start = perf_counter()
    found = logits(called(model, batch))
    if found.device.type == "cuda":
        torch.cuda.synchronize(found.device)
    return found.float().log_softmax(-1), perf_counter() - start


def _kept(batch: Any, found: Tensor) -> Tensor:
    """Which positions count: not those of padding."""
    mask = _of_answers(batch, "attention_mask", found)
    size = found.shape[:-1].numel()
    return (
        torch.ones(size, dtype=torch.bool, device=found.device)
        if mask is None
        else mask.flatten().bool()
    )


def _targets(model: nn.Module, batch: Any, found: Tensor) -> Tensor | None:
    """The next tokens, -100 at padding; None where the model does not predict them."""
    ids = _of_answers(batch, "input_ids", found)
    writes = getattr(model, "can_generate", None)  # of transformers; one that fills gaps does not
    if ids is None or ids.ndim != 2 or ids.shape[1] < 2 or (writes and not writes()):
        return None
    mask = _of_answers(batch, "attention_mask", found)
    return ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)


def _of_answers(batch: Any, name: str, found: Tensor) -> Tensor | None:
    """Numbers for each position of the outputs; of a decoder its own."""
    if not isinstance(batch, Mapping):
        return None
    own = f"decoder_{name}" if "decoder_input_ids" in batch else name
    numbers = batch.get(own)
    return numbers if numbers is not None and numbers.shape == found.shape[:-1] else None


def _nll(found: Tensor, targets: Tensor) -> float:
    """The sum of `-log p(next token)`."""
    flat = found[:, :-1].flatten(0, 1)
    loss = nn.functional.nll_loss(flat, targets.flatten(), reduction="sum", ignore_index=-100)
    return float(loss)
