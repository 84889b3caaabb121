"""Calibration on what a language model writes itself."""

import pytest
import torch
from torch import nn

from matrigami.compress import Grid, evaluate, quantize_, self_calibration


class Grammar(nn.Module):
    """A model of tokens of which each is followed by one of two, three times more by the first."""

    def __init__(self, tokens=16):
        super().__init__()
        first = torch.arange(tokens).mul(5).add(3) % tokens
        table = torch.full((tokens, tokens), -30.0)
        table[torch.arange(tokens), first] = 0.0
        table[torch.arange(tokens), (first + 1) % tokens] = -1.0986
        self.first = first
        self.embedding = nn.Embedding.from_pretrained(torch.eye(tokens))
        self.mix = nn.Linear(tokens, tokens, bias=False)
        self.head = nn.Linear(tokens, tokens, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(tokens) + 0.01 * torch.randn(tokens, tokens))
            self.head.weight.copy_(table.mT)

    def forward(self, ids):
        return self.head(self.mix(self.embedding(ids)))


def test_tokens_are_drawn_from_what_the_model_says():
    """Every pair is one of the two, in their shares; the same seed draws the same."""
    model = Grammar()
    before = torch.get_rng_state()
    data = self_calibration(model, sequences=24, length=60, batch=10)
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(ids.shape) for ids in data] == [(10, 60), (10, 60), (4, 60)]
    ids = torch.cat(data)
    wanted, found = model.first[ids[:, :-1]], ids[:, 1:]
    assert bool(((found == wanted) | (found == (wanted + 1) % 16)).all())
    assert float((found == wanted).double().mean()) == pytest.approx(0.75, abs=0.05)
    again, other = (torch.cat(self_calibration(model, 24, 60, seed=s)) for s in (0, 1))
    assert again.shape == other.shape
    assert not torch.equal(again, other)


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_model_calibrates_itself(two_sided):
    """As well as on sequences that it is given, to a tenth."""
    told = {}
    held = self_calibration(Grammar(), seed=7)
    for name in ("self", "given"):
        torch.manual_seed(0)
        model, dense = Grammar(), Grammar()
        dense.load_state_dict(model.state_dict())
        data = "self" if name == "self" else self_calibration(model, seed=3)
        quantize_(model, data, Grid(3, group=None), targets=["mix", "head"], two_sided=two_sided)
        told[name] = evaluate(model, dense, held).kl
    assert told["self"] == pytest.approx(told["given"], rel=0.1)


def test_what_writes_no_tokens_is_told():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="check its types"):
        quantize_(model, "self", Grid(4))
    pooled = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="no logits for each"):
        self_calibration(pooled)


def test_a_model_of_transformers_writes_after_its_first_token(llama):
    model = llama(bos_token_id=3)
    data = self_calibration(model, sequences=5, length=12, batch=2)
    assert [tuple(batch["input_ids"].shape) for batch in data] == [(2, 12), (2, 12), (1, 12)]
    assert all(bool((batch["input_ids"][:, 0] == 3).all()) for batch in data)
    short = self_calibration(llama(max_position_embeddings=9), sequences=1, length=12)
    assert tuple(short[0]["input_ids"].shape) == (1, 9)
    quantize_(model, "self", Grid(4, group=None))
