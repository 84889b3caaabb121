"""The example of distillation, on a model that the test makes."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "docs" / "examples" / "compression" / "recover.py"


def test_distillation_recovers_what_compression_took():
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    spec = spec_from_file_location("recover", PATH)
    recover = module_from_spec(spec)
    spec.loader.exec_module(recover)
    torch.set_default_dtype(torch.float32)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    starts = torch.randint(0, 32, (48, 1))
    rows = (starts + 5 * torch.arange(24)) % 32  # a language of one rule
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    found = recover.recovered(model.eval(), rows, steps=20)
    assert found["dense"] < 1.5 < 32
    assert found["dense"] < found["20 steps"] < found["compressed"]
