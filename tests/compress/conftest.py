"""A language model of transformers that is made in no time."""

import pytest
import torch


@pytest.fixture
def llama():
    """Makes one, in single precision; options change its configuration."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.set_default_dtype(torch.float32)

    def make(**changes):
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        options = {"num_hidden_layers": 2, "tie_word_embeddings": True}
        config = transformers.LlamaConfig(**sizes | heads | options | changes)
        return transformers.LlamaForCausalLM(config).eval()

    return make
