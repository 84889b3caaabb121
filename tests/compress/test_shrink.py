"""Units that go physically: what belongs together, what is left, and what it computes."""

import copy
import itertools

import pytest
import torch
from torch import nn

import matrigami as mg
from matrigami.compress import Shrunk, gradient_moments, shrink_
from matrigami.compress._moments import damped
from matrigami.compress._shrink import _order
from tests.compress.moments import layer


class Gated(nn.Module):
    """A gated MLP, as language models have it."""

    def __init__(self, width=8, hidden=20):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(self.gate(x).sigmoid() * self.up(x))


class Attention(nn.Module):
    """Four heads that share two of keys and values; their number follows from the sizes."""

    def __init__(self, width=8, size=3):
        super().__init__()
        self.size = size
        self.q, self.o = nn.Linear(width, 4 * size), nn.Linear(4 * size, width)
        self.k, self.v = nn.Linear(width, 2 * size), nn.Linear(width, 2 * size)

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).flatten(2))


def net():
    return nn.Sequential(nn.Linear(6, 8), Gated(), Attention(), Gated(), nn.Linear(8, 5)).eval()


def batches(count=4):
    return list(torch.randn(count, 6, 7, 3) @ torch.randn(3, 6) + 0.1 * torch.randn(count, 6, 7, 6))


def test_neurons_of_gated_blocks_go_with_both_of_their_producers():
    model, data = net(), batches()
    whole, before = copy.deepcopy(model), model(data[0]).detach()
    report = shrink_(model, data, 0.5)
    assert [r.name for r in report.layers] == ["1.down", "3.down"]
    assert report.values["1.gate"] == report.values["1.up"] == Shrunk(10, 8)
    assert model[1].down.weight.shape == (8, 10)
    assert all(r.loss <= r.simple for r in report.layers)
    assert (model(data[0]) - before).norm() < 0.2 * before.norm()
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())


def test_the_smaller_model_is_the_zeroed_one():
    model, data = net(), batches()
    zeroed = copy.deepcopy(model)
    shrink_(model, data, 0.5, targets="1.down")
    rows = [(zeroed[1].up.weight == w).all(-1).nonzero()[0, 0] for w in model[1].up.weight]
    zeroed[1].down.weight.data.zero_()
    zeroed[1].down.weight.data[:, rows] = model[1].down.weight.data
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(model(x), zeroed(x), rtol=1e-6, atol=1e-9)


def test_heads_go_with_their_queries_keys_and_values():
    model, data = net(), batches()
    report = shrink_(model, data, 0.5, targets="2.o", heads=2, two_sided=True)
    assert report.values == {
        "2.o": Shrunk(8, 6),
        "2.q": Shrunk(6, 8),
        "2.k": Shrunk(3, 8),
        "2.v": Shrunk(3, 8),
    }
    assert model(data[0]).shape == (6, 7, 5)


def test_progress_is_told_when_a_group_is_smaller():
    model, told = net(), []
    names = {"1.down": lambda: model[1].down, "3.down": lambda: model[3].down}
    shrink_(
        model,
        batches(),
        0.5,
        progress=lambda *now: told.append((*now, names[now[2]]().in_features)),
    )
    assert told == [(1, 2, "1.down", 10), (2, 2, "3.down", 10)]


def test_moments_of_gradients_that_are_given_count():
    asked, data = net(), batches()
    told, given = copy.deepcopy(asked), copy.deepcopy(asked)
    other = {"1.down": torch.eye(8).double() * torch.arange(8) ** 4}  # the last output matters most
    shrink_(asked, data, 0.5, targets="1.down", two_sided=True)
    moments = gradient_moments(told, data)
    shrink_(told, data, 0.5, targets="1.down", two_sided=moments)
    shrink_(given, data, 0.5, targets="1.down", two_sided=other)
    assert torch.equal(told[1].up.weight, asked[1].up.weight)
    assert not torch.equal(given[1].up.weight, asked[1].up.weight)
    with pytest.raises(ValueError, match="of none that is compressed"):
        shrink_(net(), data, 0.5, targets="1.down", two_sided={"2.o": other["1.down"]})


class Fused(nn.Module):
    """Four heads of one layer: queries, keys and values one below the other, or head by head."""

    def __init__(self, stacked, width=8, size=3):
        super().__init__()
        self.stacked, self.size, self.split_size = stacked, size, 4 * size
        self.qkv, self.o = nn.Linear(width, 12 * size), nn.Linear(4 * size, width)

    def forward(self, x):
        if self.stacked:
            q, k, v = (
                t.unflatten(-1, (-1, self.size)) for t in self.qkv(x).split(self.split_size, -1)
            )
        else:
            q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.size)).unbind(-2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("stacked", [True, False])
def test_heads_go_from_a_fused_layer(stacked, tmp_path):
    model, data = nn.Sequential(nn.Linear(6, 8), Fused(stacked), nn.Linear(8, 5)).eval(), batches()
    whole = copy.deepcopy(model)
    report = shrink_(model, data, 0.5, targets="1.o", heads=4)
    assert report.values == {"1.o": Shrunk(8, 6), "1.qkv": Shrunk(18, 8)}
    again = mg.load(mg.save(model, tmp_path / "small", report.values), into=whole)
    assert torch.equal(again(data[0]), model(data[0]))


def test_who_splits_is_as_before_when_heads_are_refused():
    class Fixed(Fused):
        def forward(self, x):
            return super().forward(x) * (1 + self.qkv.out_features // 36)

    model, data = nn.Sequential(nn.Linear(6, 8), Fixed(True), nn.Linear(8, 5)).eval(), batches()
    before = model(data[0])
    with pytest.raises(ValueError, match="reads sizes from elsewhere"):
        shrink_(model, data, 0.5, targets="1.o", heads=4)
    assert torch.equal(model(data[0]), before)
    assert model[1].split_size == 12


def test_a_chain_of_square_layers_is_read_in_its_order():
    model = nn.Sequential(
        nn.Linear(6, 9),
        nn.ReLU(),
        nn.Linear(9, 9),
        nn.ReLU(),
        nn.Linear(9, 9),
        nn.Tanh(),
        nn.Linear(9, 4),
    )
    report = shrink_(model, batches(), 1 / 3)
    assert [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)] == [
        (6, 6),
        (6, 6),
        (6, 6),
        (4, 6),
    ]
    assert [r.name for r in report.layers] == ["2", "4", "6"]


def test_shrunken_models_are_saved_and_loaded(tmp_path):
    model, data = net(), batches()
    report = shrink_(model, data, 0.25)
    folder = mg.save(model, tmp_path / "out", report.values)
    again = mg.load(folder, into=net())
    assert torch.equal(again(data[0]), model(data[0]))
    with pytest.raises(ValueError, match="not the one that was saved"):
        mg.load(mg.save(model, tmp_path / "unsaid"), into=net())


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_first_unit_to_go_is_the_cheapest_of_all(two_sided):
    W, A, B = (t.double() for t in layer(5, 6))
    B = B if two_sided else torch.eye(5).double()
    A = damped(A, 0.01)

    def cost(gone):
        kept = [i for i in range(6) if i not in gone]
        E = W.clone()
        E[:, kept] -= torch.linalg.solve(A[kept][:, kept], A[kept] @ W.mT).mT
        return float(torch.trace(B @ E @ A @ E.mT))

    assert _order(W, A, B, 6)[0] == min(range(6), key=lambda i: cost([i]))
    pairs = [(2 * i, 2 * i + 1) for i in range(3)]
    first = _order(W, A, B, 3)[0]
    assert pairs[first] == min(pairs, key=cost)
    greedy = sorted(_order(W, A, B, 6)[:2])
    costs = sorted(cost(pair) for pair in itertools.combinations(range(6), 2))
    assert cost(greedy) <= costs[2]


class Fixed(Gated):
    """A model that knows its number of units."""

    def forward(self, x):
        h = self.gate(x).sigmoid() * self.up(x)
        return x + self.down(h.reshape(*x.shape[:-1], 20))


class Mixed(Gated):
    """A norm between producer and consumer, whose weights belong to the units."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(20)

    def forward(self, x):
        return x + self.down(self.norm(self.gate(x).sigmoid() * self.up(x)))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Fixed(), {}, "does not compute"),
        (Mixed(), {}, "does not compute"),
        (Gated(), {"targets": "up"}, "no hidden units"),
        (Gated(), {"targets": "dwn"}, "Nearest: down"),
        (Gated(), {"targets": "down", "heads": 3}, "no hidden units"),
        (Gated(), {"share": 1.0}, "below 1"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(model, options, message):
    model = model.double()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=message):
        shrink_(model, [torch.randn(40, 8)], **{"share": 0.5, **options})
    assert list(model.modules()) == modules
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_the_llama_of_transformers_loses_neurons_and_heads(llama, tmp_path):
    model = llama(intermediate_size=48)
    data = [{"input_ids": torch.randint(0, 64, (4, 20))}]
    values = shrink_(model, data, 0.25, targets="*.down_proj").values
    values |= shrink_(model, data, 0.5, targets="*.o_proj", heads=2).values
    assert values["model.layers.1.mlp.up_proj"] == Shrunk(36, 32)
    assert values["model.layers.1.self_attn.k_proj"] == Shrunk(8, 32)
    again = mg.load(mg.save(model, tmp_path / "out", values))
    with torch.no_grad():
        assert torch.equal(again(**data[0]).logits, model(**data[0]).logits)
