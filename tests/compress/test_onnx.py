"""ONNX files against the reference evaluator of ONNX."""

import numpy as np
import pytest
import torch
from torch import nn

import matrigami as mg
from matrigami.compress import Grid, quantize_, save_onnx
from matrigami.nn import replace_

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")


def answers(folder, *given):
    """What the file computes."""
    session = onnx.reference.ReferenceEvaluator(str(folder / "model.onnx"))
    names = [entry.name for entry in onnx.load(str(folder / "model.onnx")).graph.input]
    return session.run(None, dict(zip(names, map(np.asarray, given), strict=True)))[0]


@pytest.mark.filterwarnings("ignore")
def test_structured_and_quantised_layers(tmp_path):
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(
        nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )
    replace_(model, {"0": mg.LowRank(rank=3), "2": mg.Monarch(4)})
    quantize_(model, [torch.randn(32, 16)], Grid(4, 8), targets="4")
    folder = save_onnx(model, torch.randn(1, 16), tmp_path / "out")
    x = torch.randn(5, 16)  # any number of examples
    np.testing.assert_allclose(answers(folder, x), model(x).detach(), rtol=1e-4, atol=1e-5)
    stored = sum(
        np.prod(t.dims) for t in onnx.load(str(folder / "model.onnx")).graph.initializer if t.dims
    )
    assert stored < 0.8 * (16 * 24 + 24 * 24 + 24 * 4)  # the factors, not their product
    with pytest.raises(ValueError, match="exists"):
        save_onnx(model, x, folder)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_not_followed_is_refused(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="does not follow the Branches"):
        save_onnx(Branches(), torch.ones(2, 3), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_a_language_model(llama, tmp_path):
    model = llama(num_hidden_layers=1, tie_word_embeddings=False)
    replace_(model, mg.LowRank(rank=4), targets="*.mlp.*")
    example = {"input_ids": torch.arange(12).view(2, 6)}
    folder = save_onnx(model, example, tmp_path / "out")
    ids = torch.arange(27).view(3, 9)
    with torch.no_grad():
        wanted = model(ids).logits
    np.testing.assert_allclose(answers(folder, ids), wanted, rtol=1e-3, atol=1e-4)
