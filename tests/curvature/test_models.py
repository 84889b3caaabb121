"""Models as people write them: tied weights, repeated calls, in-place functions, frozen layers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, kfac, kfoc
from matrigami.nn import Part, Role, Use, affine, linear_use, parts, weight_part
from matrigami.operators import stacked_view
from tests.curvature import reference

METHODS = {"kfac": kfac, "ekfac": ekfac, "kfoc": kfoc}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


class Twice(nn.Module):
    """One layer, called two times in a row."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Tied(nn.Module):
    """The same by two layers with one weight."""

    def __init__(self, twin):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.load_state_dict(twin.layer.state_dict())
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = twin.head

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


class Language(nn.Module):
    """An embedding whose weight is that of the head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.middle = nn.Linear(4, 4)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.middle(self.embedding(x)).tanh()).mT


def vectors(*sizes):
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_a_layer_called_twice_sums_its_gradients(joint):
    model, batches, loss = Twice(), vectors(4, 3), nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    sums = reference.pair_sums(model, loss, batches, joint=joint)
    for names, found in sums.items():
        assert_close(found, reference.block(full, model, names), atol=1e-12, rtol=1e-9)
    assert_close(mg.trace(ekfac(model, loss, batches, joint=joint)), full.trace())


def test_two_layers_with_one_weight_are_one_layer_called_twice():
    twice = Twice()
    tied, batches, loss = Tied(twice), vectors(4, 3), nn.CrossEntropyLoss()
    assert_close(tied(batches[0][0]), twice(batches[0][0]))
    for method in METHODS.values():
        one = method(twice, loss, batches, joint=False)
        two = method(tied, loss, batches)
        assert_close(two["first.weight"].dense(), one["layer.weight"].dense())
        assert_close(two["first.bias"].dense(), one["layer.bias"].dense())
        assert set(two.order) == {"first.weight", "first.bias", "head.weight", "head.bias"}


@methods
def test_a_weight_with_two_roles(method):
    """Rows of tokens on one side, columns of a matrix on the other: the sum of two products."""
    model, loss = Language(), nn.CrossEntropyLoss()
    batches = [(torch.randint(6, (n, 5)), torch.randint(6, (n, 5))) for n in (3, 2)]
    full = reference.gauss_newton(model, loss, batches)
    F = method(model, loss, batches)
    assert F.order == ("embedding.weight", "middle.weight", "middle.bias")
    exact = reference.block(full, model, ("embedding.weight",))[0]
    found = F["embedding.weight"].dense()[0]
    assert_close(found, found.mT)
    assert torch.linalg.eigvalsh(found).min() > -1e-12
    assert reference.distance(found, exact) < 0.9


def test_two_roles_are_merged_into_the_nearest_product():
    model, loss = Language(), nn.CrossEntropyLoss()
    x, y = torch.randint(6, (4, 5)), torch.randint(6, (4, 5))
    merged = kfac(model, loss, (x, y))["embedding.weight"].dense()[0]
    apart = Language()
    apart.load_state_dict(model.state_dict())
    apart.head.weight = nn.Parameter(model.head.weight.detach().clone())
    F = kfac(apart, loss, (x, y))
    total = F["embedding.weight"].dense()[0] + F["head.weight"].dense()[0]
    best = reference.nearest_product(total, 6, 4)
    assert_close(merged, best, atol=1e-10, rtol=1e-8)


@methods
def test_functions_in_place_do_not_matter(method):
    layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)]
    plain, batches, loss = nn.Sequential(*layers), vectors(4, 3), nn.CrossEntropyLoss()
    inplace = nn.Sequential(
        layers[0], nn.ReLU(inplace=True), layers[2], nn.ReLU(inplace=True), layers[4]
    )
    found, expected = (method(model, loss, batches) for model in (inplace, plain))
    assert_close(found.dense(), expected.dense())


class Residual(nn.Module):
    """Inputs of a layer that a later line overwrites."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x)
        h += x
        return self.head(h)


def test_sums_in_place_do_not_matter():
    model, batches, loss = Residual(), vectors(4, 3), nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    for names, found in reference.pair_sums(model, loss, batches).items():
        assert_close(found, reference.block(full, model, names), atol=1e-12, rtol=1e-9)


@methods
def test_frozen_layers_are_left_out(method):
    model, batches, loss = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)),
        vectors(4, 3),
        nn.CrossEntropyLoss(),
    )
    whole = method(model, loss, batches)
    model[2].requires_grad_(False)
    model[0].requires_grad_(False)
    F = method(model, loss, batches)
    assert F.order == ("4.weight", "4.bias")
    assert_close(F["4.weight"].dense(), whole["4.weight"].dense())
    model.requires_grad_(False)
    model[0].requires_grad_()
    F = method(model, loss, batches)
    assert_close(F["0.weight"].dense(), whole["0.weight"].dense())


def test_a_frozen_bias_leaves_a_block_of_the_weight():
    model, batches, loss = nn.Sequential(nn.Linear(4, 3)), vectors(5), nn.CrossEntropyLoss()
    separate = kfac(model, loss, batches, joint=False)
    model[0].bias.requires_grad_(False)
    F = kfac(model, loss, batches)
    assert F.order == ("0.weight",)
    assert_close(F.dense(), separate["0.weight"].dense()[0])


@pytest.mark.usefixtures("unchecked")
def test_a_frozen_part_of_a_norm_is_refused():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    with pytest.raises(TypeError, match="of 0 only weight is trainable"):
        kfac(model, nn.CrossEntropyLoss(), vectors(5))


class Branches(nn.Module):
    """Two layers that read one tensor, and one that reads a copy."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 3) for _ in range(3))

    def forward(self, x):
        return self.a(x) + self.b(x).tanh() + self.c(x.clone())


def test_layers_that_read_one_tensor_do_not_disturb_each_other():
    model, batches, loss = Branches(), vectors(4, 3), nn.CrossEntropyLoss()
    full = reference.gauss_newton(model, loss, batches)
    for names, found in reference.pair_sums(model, loss, batches).items():
        assert_close(found, reference.block(full, model, names), atol=1e-12, rtol=1e-9)
    X = torch.cat([x for x, _ in batches])
    X = torch.cat([X, torch.ones(7, 1)], 1)
    F = kfac(model, loss, batches)
    for name in "abc":
        assert_close(F[f"{name}.weight"].factors[1].dense()[0], X.mT @ X / 7)


class Halved(nn.Linear):
    """A subclass that reads something else than its parent does."""

    def forward(self, x):
        return super().forward(x / 2)


@parts.register
def _(layer: Halved):
    view = stacked_view(tuple(layer.weight.shape))
    return affine(weight_part(Role.MATRIX, view, lambda x, g: linear_use(x / 2, g)))


def test_subclasses_that_read_one_tensor_do_not_share_inputs():
    model, batches, loss = Branches(), vectors(4, 3), nn.CrossEntropyLoss()
    model.b = Halved(4, 3)
    full = reference.gauss_newton(model, loss, batches)
    for names, found in reference.pair_sums(model, loss, batches).items():
        assert_close(found, reference.block(full, model, names), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_summed_in_single(dtype):
    model, batches, loss = nn.Linear(4, 3), vectors(64), nn.CrossEntropyLoss()
    exact = kfac(model, loss, batches)
    low = model.to(dtype)
    F = kfac(low, loss, [(x.to(dtype), y) for x, y in batches])
    assert all(factor.dtype == torch.float32 for factor in F["weight"].factors)
    assert reference.distance(F.dense().double(), exact.dense()) < 0.02


@methods
def test_autocast_is_summed_in_single(method):
    model, loss = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).float(),
        nn.CrossEntropyLoss(),
    )
    batches = [(x.float(), y) for x, y in vectors(32, 16)]
    exact = method(model, loss, batches)
    with torch.autocast("cpu", torch.bfloat16):
        F = method(model, loss, batches)
    assert F.dtype == torch.float32
    assert reference.distance(F.dense(), exact.dense()) < 0.03


@methods
def test_the_type_of_the_sums_may_be_given(method):
    model, loss = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).float(),
        nn.CrossEntropyLoss(),
    )
    batches = [(x.float(), y) for x, y in vectors(2, 1)]
    F = method(model, loss, batches, dtype=torch.float64)
    assert F.dtype == torch.float64
    assert reference.distance(F.dense(), method(model, loss, batches).dense().double()) < 1e-5


def test_the_model_is_left_alone():
    model, batches = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(), vectors(5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kfoc(model, nn.CrossEntropyLoss(), batches)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        assert kfac(model, nn.CrossEntropyLoss(), batches).dense().abs().sum() > 0


class Scale(nn.Module):
    """A layer of one's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, -1.0]))

    def forward(self, x):
        return self.weight * x


@parts.register
def _(layer: Scale):
    def tap(x: torch.Tensor, g: torch.Tensor | None) -> Use:
        ones = x.new_ones(4, len(x), 1, 1)
        return Use(ones, None if g is None else (g * x).permute(2, 1, 0)[..., None, None])

    return {"weight": Part(Role.GAIN, tap=tap)}


def test_a_rule_for_a_layer_of_ones_own():
    model, batches, loss = (
        nn.Sequential(Scale(), nn.Tanh(), nn.Linear(4, 3)),
        vectors(4, 3),
        nn.CrossEntropyLoss(),
    )
    full = reference.gauss_newton(model, loss, batches)
    F = kfac(model, loss, batches)
    exact = reference.block(full, model, ("0.weight",), 4)
    assert_close(F["0.weight"].dense(), exact)
