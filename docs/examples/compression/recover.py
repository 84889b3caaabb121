"""Half of the weights of a small Llama, then distillation from the model that it was.

    KL(p || q) = sum_c p_c log(p_c / q_c),    p of the dense model, q of the compressed one

    python recover.py FOLDER TEXT [STEPS]

FOLDER holds a model of transformers and its tokenizer, TEXT is a plain text; its last quarter is
held out.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

import matrigami as mg
from matrigami.compress import evaluate, structure_

LENGTH = 128
"""Tokens of a sequence."""


def sequences(folder: str, text: str) -> torch.Tensor:
    """The tokens of a text, cut into rows."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - an extra

    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def distilled(
    model: nn.Module, teacher: nn.Module, rows: torch.Tensor, steps: int, batch: int = 8
) -> None:
    """Train on the predictions of the teacher."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for step in range(steps):
        at = torch.arange(step * batch, (step + 1) * batch) % len(rows)
        with torch.no_grad():
            wanted = teacher(rows[at]).logits.log_softmax(-1)
        found = model(rows[at]).logits.log_softmax(-1)
        loss = nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / at.numel()
        optimizer.zero_grad()
        (loss / LENGTH).backward()
        optimizer.step()
        schedule.step()


def recovered(teacher: nn.Module, rows: torch.Tensor, steps: int) -> dict[str, float]:
    """Perplexity on held-out rows: dense, after compression, after distillation."""
    cut = 3 * len(rows) // 4
    train, held = rows[:cut], [{"input_ids": r} for r in rows[cut:].split(8)]
    model = copy.deepcopy(teacher)
    calibration = [{"input_ids": r} for r in train[:64].split(8)]
    structure_(model, calibration, mg.LowRank(rank=0.25), targets="*.mlp.*", two_sided=True)
    before = evaluate(model, teacher, held)
    distilled(model, teacher, train, steps)
    after = evaluate(model, teacher, held).perplexity
    found = {"dense": before.reference_perplexity, "compressed": before.perplexity}
    return found | {f"{steps} steps": after}


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 200
    text = Path(sys.argv[2]).read_text()
    for name, value in recovered(llama, sequences(sys.argv[1], text), steps).items():
        print(f"{name:<12} perplexity {value:.3f}")
