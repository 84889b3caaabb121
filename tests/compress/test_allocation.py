"""Plans, the knapsack against all choices, and the guard against a mixed choice that is worse."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

from matrigami import LowRank
from matrigami.compress import (
    CompressionPlan,
    Grid,
    Option,
    _allocation as allocation,
    allocate,
    compress_,
    evaluate,
    n_of_m,
    plan,
    quantize_,
    unstructured,
)
from matrigami.compress._allocation import knapsack
from matrigami.compress._methods import described
from tests.compress.test_models import Chain

OVER = [Grid(2, None), Grid(3, None), Grid(4, None), Grid(8, None)]


def trained(width=16):
    """Classes that the layers need to different degrees; seconds."""
    torch.manual_seed(1)
    model = Chain(width=width, depth=1).float()
    x = torch.randn(1024, 7).float()
    labels = (x @ torch.randn(7, 5).float()).argmax(-1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval(), list(x.split(128))


@pytest.fixture(scope="module")
def problem():
    return trained()


def test_a_plan_predicts_the_divergence_of_fine_grids(problem):
    model, data = problem
    before = copy.deepcopy(model.state_dict())
    found = plan(model, data, [Grid(6, None), n_of_m(2, 5), LowRank(rank=2)])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    made = copy.deepcopy(model)
    quantize_(made, data, Grid(6, None), two_sided=True)
    measured = evaluate(made, model, data[3::4]).kl
    # the plan does not know that every layer makes up for those before it
    assert 0.3 * measured < found.total(0).predicted < 6 * measured
    assert found.total(1) is None
    assert any("stem: n_of_m(2, 5): the matrix has 7 columns" in line for line in found.misfits)
    assert found.total(2).macs < sum(macs for _, macs in found.dense.values())
    assert json.loads(found.to_json())["methods"][2] == "LowRank(rank=2)"
    assert found.methods[0] in str(found)
    (small,) = plan(model, data, ["0.9x macs"], targets="stem", two_sided=False).options["stem"]
    assert small.macs <= 0.9 * 7 * 16


def test_the_knapsack_is_that_of_all_choices():
    random = torch.Generator().manual_seed(0)
    options = {}
    for name in "abcd":
        sizes = torch.randint(1, 9, (3,), generator=random).tolist()
        losses = torch.rand(3, generator=random).tolist()
        pairs = zip(losses, sizes, strict=True)
        options[name] = [Option(name, "", p, 0.0, float(s), 0, i) for i, (p, s) in enumerate(pairs)]
    table = CompressionPlan(["0", "1", "2"], options)
    for limit in (13.0, 16.0, 30.0):
        best = min(
            sum(o.predicted for o in choice)
            for choice in itertools.product(*options.values())
            if sum(o.nbytes for o in choice) <= limit * (1 - 4 / 256)  # sizes are rounded up
        )
        found = knapsack(table, lambda o: o.nbytes, limit, "")
        assert [o.layer for o in found] == list("abcd")
        assert sum(o.nbytes for o in found) <= limit
        assert sum(o.predicted for o in found) <= best + 1e-12
    with pytest.raises(ValueError, match="smallest options"):
        knapsack(table, lambda o: o.nbytes, 1.0, "0.1x bytes")


def test_an_allocation_fits_and_is_never_worse_than_the_uniform_choice(problem):
    model, data = problem
    before = copy.deepcopy(model.state_dict())
    found = allocate(model, data, "0.16x bytes", OVER)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert found.size <= 0.16 * found.dense
    assert found.measured <= found.uniform_measured
    assert found.measured == pytest.approx(evaluate(found.model, model, data[3::4]).kl)
    assert found.uniform.startswith(("Grid(3", "Grid(4"))
    assert not found.fell_back
    assert len({str(m) for m in found.methods.values()}) > 1
    assert found.report.values.keys() == found.methods.keys()


def test_a_mixed_choice_that_is_worse_falls_back_and_says_so(problem, monkeypatch):
    model, data = problem

    def worst(table, *_):
        return [options[0] for options in table.options.values()]

    monkeypatch.setattr(allocation, "knapsack", worst)
    found = allocate(model, data, "0.16x bytes", OVER)
    assert found.fell_back
    assert found.measured == found.uniform_measured
    assert set(map(described, found.methods.values())) == {found.uniform}
    assert str(found).startswith("uniform")


def test_macs_are_allocated_over_structures_and_zeros(problem):
    model, data = problem
    over = [unstructured(0.3), unstructured(0.8), LowRank(rank=4)]
    found = allocate(model, data, "0.6x macs", over)
    assert found.size <= 0.6 * found.dense
    assert found.measured <= found.uniform_measured or math.isnan(found.uniform_measured)


def test_every_layer_has_its_own_method(problem):
    model, data = problem
    made = copy.deepcopy(model)
    report = compress_(made, data, {"stem": Grid(8, None), "*.up": LowRank(rank=4)})
    assert [r.method.split("(")[0] for r in report.layers] == ["Grid", "LowRank"]
    with pytest.raises(ValueError, match="head: n_of_m"):
        compress_(made, data, {"head": n_of_m(3, 5)})
    with pytest.raises(ValueError, match="patterns of the mapping are the targets"):
        compress_(made, data, {"stem": Grid(8, None)}, targets="*.up")


def test_an_evaluation_is_that_of_its_definitions():
    model, reference = nn.Embedding(6, 6), nn.Embedding(6, 6)
    ids = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    class Wrapped(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, input_ids, attention_mask):
            return self.table(input_ids)

    found = evaluate(
        Wrapped(model), Wrapped(reference), [{"input_ids": ids, "attention_mask": mask}]
    )
    q, p = (table.weight.detach()[ids[mask.bool()]].softmax(-1) for table in (model, reference))
    assert found.tokens == 6
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    steps = [(1, 2), (2, 3), (3, 4), (5, 0)]
    nll = [-float(model.weight.detach()[a].log_softmax(-1)[b]) for a, b in steps]
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / 4), rel=1e-5)
    with pytest.raises(ValueError, match="no batches"):
        evaluate(model, reference, [])
    with pytest.raises(ValueError, match=r"predicts 2 x 5, the reference 2 x 6(.|\n)*vocabulary"):
        evaluate(nn.Linear(3, 5), nn.Linear(3, 6), [torch.ones(2, 3)])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_bytes_are_those_of_the_type_of_the_weights(kind):
    """What is computed in single precision is stored as the model is."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(kind)
    found = plan(model, [torch.randn(64, 8).to(kind)], [unstructured(0.5), LowRank(rank=2)])
    (pruned, low), size = found.options["0"], kind.itemsize
    assert (pruned.nbytes, low.nbytes) == (size * 32 + 64 / 8, size * 32)
    assert found.dense["0"] == (size * 64, 64)
