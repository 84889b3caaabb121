"""The layer: the same product as its matrix, states, conversions, transforms."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from matrigami import LinearOperator, Structure, cost, norm, project
from matrigami.nn import StructuredLinear
from matrigami.structures import EXAMPLES, BlockTensorTrain, Dense, LowRank, Monarch

each_structure = pytest.mark.parametrize("name", EXAMPLES)


def layer_of(name: str, **options) -> StructuredLinear:
    torch.manual_seed(0)
    try:
        return StructuredLinear(12, 8, EXAMPLES[name], **options)
    except ValueError:  # a square structure
        return StructuredLinear(12, 12, EXAMPLES[name], **options)


@each_structure
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_dense_layer(name, bias):
    layer = layer_of(name, bias=bias)
    if bias:
        nn.init.normal_(layer.bias)
    weight = layer.matrix().dense()
    for shape in ((), (3,), (2, 5), (0,), (2, 0)):
        x = torch.randn(*shape, layer.in_features)
        wanted = nn.functional.linear(x, weight, layer.bias)
        torch.testing.assert_close(layer(x), wanted)


@each_structure
def test_gradients_are_those_of_the_dense_layer(name):
    layer = layer_of(name)
    x = torch.randn(4, layer.in_features, requires_grad=True)
    parameters = [x, *layer.parameters()]
    got = torch.autograd.grad(layer(x).square().sum(), parameters)
    y = nn.functional.linear(x, layer.matrix().dense(), layer.bias)
    wanted = torch.autograd.grad(y.square().sum(), parameters)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@each_structure
def test_initial_spectral_norm_is_of_order_one(name):
    """What keeps features of order 1 as the width grows, whatever the structure."""
    torch.manual_seed(1)
    layer = StructuredLinear(256, 256, EXAMPLES[name])
    assert 0.3 < float(norm(layer.matrix(), 2).detach()) < 6.0


def test_names_in_the_state_dict_are_readable():
    assert list(layer_of("monarch").state_dict()) == ["left", "right", "bias"]
    assert list(layer_of("lowrank").state_dict()) == ["U", "V", "bias"]
    assert list(layer_of("btt").state_dict()) == ["cores_0", "cores_1", "bias"]
    padded = StructuredLinear(13, 7, BlockTensorTrain())
    assert list(padded.state_dict()) == ["padded_cores_0", "padded_cores_1", "bias"]


@each_structure
def test_state_dict_round_trip(name):
    layer = layer_of(name)
    other = StructuredLinear(layer.in_features, layer.out_features, EXAMPLES[name])
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_features)
    assert torch.equal(other(x), layer(x))


def test_state_of_another_shape_or_structure_is_refused():
    layer = StructuredLinear(16, 16, LowRank(rank=2))
    with pytest.raises(RuntimeError, match="size mismatch for U"):
        layer.load_state_dict(StructuredLinear(16, 16, LowRank(rank=3)).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*U"):
        layer.load_state_dict(StructuredLinear(16, 16, Dense()).state_dict())


@each_structure
def test_from_and_to_linear(name):
    if name == "hadamard":  # its projection is quasi-best: round trip of the layer only
        layer = layer_of(name)
    else:
        dense = layer_of(name).to_linear()
        layer = StructuredLinear.from_linear(dense, EXAMPLES[name])
        torch.testing.assert_close(layer.matrix().dense(), dense.weight, atol=1e-6, rtol=1e-6)
        assert torch.equal(layer.bias, dense.bias)
    again = layer.to_linear()
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(again(x), layer(x))


def test_from_linear_keeps_dtype_and_the_absence_of_a_bias():
    layer = StructuredLinear.from_linear(nn.Linear(8, 6, bias=False).float(), LowRank(rank=2))
    assert layer.bias is None
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer.to_linear().bias is None


def test_a_matrix_of_another_shape_is_refused():
    layer = StructuredLinear(8, 6, LowRank(rank=2))
    with pytest.raises(ValueError, match="U") as caught:
        layer.load_matrix(LowRank(rank=3).init(6, 8))
    assert "Project onto" in str(caught.value)


@each_structure
def test_zero_init_starts_at_the_bias(name):
    layer = layer_of(name, zero_init=True)
    assert not layer(torch.randn(3, layer.in_features)).any()
    loss = layer(torch.randn(3, layer.in_features)).sum()
    loss.backward()
    moving = [p for key, p in layer.named_parameters() if key != "bias" and p.grad.any()]
    assert moving, "some factor has to learn"


def test_rms_cap_is_a_cap_times_a_gain():
    layer = StructuredLinear(64, 64, Monarch(blocks=8), rms_cap=True)
    names = {key for key, _ in layer.named_parameters()}
    assert names == {"left", "right", "gain_left", "gain_right", "bias"}
    std = layer.fans[0].std
    with torch.no_grad():
        layer.left.copy_(10 * std * torch.randn_like(layer.left))
        layer.right.mul_(0.5)
        assert rms(layer.matrix().left) == pytest.approx(std)
        torch.testing.assert_close(layer.matrix().right, layer.right)
        layer.gain_left.fill_(3.0)
        assert rms(layer.matrix().left) == pytest.approx(3 * std)


def rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt())


def test_loading_a_matrix_undoes_the_cap():
    layer = StructuredLinear(16, 16, Monarch(blocks=4), rms_cap=True)
    A = 7.0 * Monarch(blocks=4).init(16, 16)
    layer.load_matrix(A)
    torch.testing.assert_close(layer.matrix().dense(), A.dense())


@each_structure
def test_cost_is_that_of_the_matrix(name):
    layer = layer_of(name)
    assert layer.cost() == cost(layer.matrix())
    numbers = sum(p.numel() for key, p in layer.named_parameters() if key != "bias")
    assert layer.cost().params == numbers


@each_structure
def test_copies_and_pickles(name):
    layer = layer_of(name)
    x = torch.randn(3, layer.in_features)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
        assert not torch.equal(twin(x), layer(x))


@each_structure
def test_per_sample_gradients(name):
    layer = layer_of(name)
    parameters = dict(layer.named_parameters())
    X = torch.randn(5, layer.in_features)

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, p, (x,)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    whole = torch.autograd.grad(layer(X).square().sum(), list(parameters.values()))
    for key, wanted in zip(parameters, whole, strict=True):
        torch.testing.assert_close(each[key].sum(0), wanted)


@each_structure
def test_directional_derivative_and_hessian_vector_product(name):
    layer = layer_of(name)
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    tangents = {key: torch.randn_like(p) for key, p in parameters.items()}
    x = torch.randn(3, layer.in_features)

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(layer, p, (x,)).square().sum()

    def at(t: float) -> dict[str, torch.Tensor]:
        return {key: p + t * tangents[key] for key, p in parameters.items()}

    h = 1e-5
    _, slope = jvp(loss, (parameters,), (tangents,))
    torch.testing.assert_close(slope, (loss(at(h)) - loss(at(-h))) / (2 * h), rtol=1e-6, atol=1e-6)
    _, hvp = jvp(grad(loss), (parameters,), (tangents,))
    up, down = grad(loss)(at(h)), grad(loss)(at(-h))
    for key in parameters:
        wanted = (up[key] - down[key]) / (2 * h)
        torch.testing.assert_close(hvp[key], wanted, rtol=1e-5, atol=1e-5)


@each_structure
def test_autocast(name):
    layer = layer_of(name).float()
    x = torch.randn(16, layer.in_features, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.1)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_autocast_gives_the_type_of_a_dense_layer():
    layer = StructuredLinear(16, 16, Monarch(blocks=4)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 16, dtype=torch.float32)).dtype == torch.bfloat16


@each_structure
def test_bfloat16(name):
    layer = layer_of(name)
    x = torch.randn(4, layer.in_features)
    wanted = layer(x)
    got = layer.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, atol=0.15, rtol=0.1)


def test_sizes_and_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="StructuredLinear: in_features cannot be 0"):
        StructuredLinear(0, 4, Dense())
    with pytest.raises(ValueError, match="blocks do not divide"):
        StructuredLinear(10, 4, Monarch(blocks=4))
    with pytest.raises(ValueError, match="last axis must be 12"):
        layer_of("dense")(torch.ones(3, 8))


def test_repr_tells_sizes_and_structure():
    assert "12, 8, LowRank(rank=2), bias=True" in repr(layer_of("lowrank"))


# ---------------------------------------------------------------- the materialised weight


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> StructuredLinear:
    """A layer in eval mode that found the dense weight faster for up to 4 vectors."""
    layer = StructuredLinear(16, 16, Monarch(blocks=4)).eval()
    timings = iter([2.0, 1.0])
    monkeypatch.setattr(_linear(), "fastest", lambda *_: next(timings))
    assert layer.materialize(tokens=4)
    return layer


def _linear():
    import importlib

    return importlib.import_module("matrigami.nn._linear")


def uses_dense_weight(layer: StructuredLinear, tokens: int = 2) -> bool:
    """Whether the output ignores a change of a factor."""
    x = torch.ones(tokens, 16)
    with torch.no_grad():
        before = layer(x)
        layer.left.data.mul_(2.0)
        after = layer(x)
        layer.left.data.mul_(0.5)
    return torch.equal(before, after)


def test_weight_is_held_for_few_vectors_only(held):
    assert uses_dense_weight(held, tokens=4)
    assert not uses_dense_weight(held, tokens=5)
    with torch.no_grad():
        wanted = nn.functional.linear(torch.ones(2, 16), held.matrix().dense(), held.bias)
        torch.testing.assert_close(held(torch.ones(2, 16)), wanted)


def test_weight_is_held_only_where_it_is_faster(monkeypatch):
    layer = StructuredLinear(16, 16, Monarch(blocks=4)).eval()
    timings = iter([1.0, 2.0])
    monkeypatch.setattr(_linear(), "fastest", lambda *_: next(timings))
    assert not layer.materialize()
    assert not uses_dense_weight(layer, tokens=1)


def test_measurement_is_real():
    layer = StructuredLinear(32, 32, Monarch(blocks=4)).eval()
    assert layer.materialize(tokens=1, repeats=2) in {True, False}


def test_train_drops_the_weight(held):
    held.train()
    held.eval()
    assert not uses_dense_weight(held)


def test_eval_keeps_the_weight(held):
    held.eval()
    assert uses_dense_weight(held)


def test_loading_drops_the_weight(held):
    nn.Sequential(held).load_state_dict(nn.Sequential(copy.deepcopy(held)).state_dict())
    assert not uses_dense_weight(held)


def test_loading_a_copy_keeps_the_original(held):
    twin = copy.deepcopy(held)
    twin.load_state_dict(held.state_dict())
    assert not uses_dense_weight(twin)
    assert uses_dense_weight(held)


def test_a_copy_that_is_written_to_is_not_stale(held):
    """Versions of copied tensors start anew: one write may give the number that was noted."""
    twin = copy.deepcopy(held)
    for _ in range(4):
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(2)
            expected = nn.functional.linear(torch.ones(16), twin.weight, twin.bias)
            torch.testing.assert_close(twin(torch.ones(16)), expected)


def test_loading_a_matrix_drops_the_weight(held):
    held.load_matrix(Monarch(blocks=4).init(16, 16))
    assert not uses_dense_weight(held)


def test_another_dtype_drops_the_weight(held):
    held.float()
    with torch.no_grad():
        assert held(torch.ones(2, 16, dtype=torch.float32)).dtype == torch.float32


def test_weight_is_never_in_the_state(held):
    assert set(held.state_dict()) == {"left", "right", "bias"}


def test_gradients_flow_to_the_factors_all_the_same(held):
    held(torch.ones(2, 16)).sum().backward()
    assert held.left.grad is not None
    assert held.left.grad.any()


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode") as caught:
        StructuredLinear(8, 8, Dense()).materialize()
    assert "model.eval()" in str(caught.value)


def test_third_party_structure_needs_no_more_than_a_recipe():
    class Scaled(Structure):
        """Any structure but with members twice as large."""

        def blank(self, m, n, empty) -> LinearOperator:
            return LowRank(rank=1).blank(m, n, empty)

    @project.register
    def _(recipe: Scaled, W: torch.Tensor) -> LinearOperator:
        return project(LowRank(rank=1), W)

    layer = StructuredLinear.from_linear(nn.Linear(6, 4), Scaled())
    assert layer(torch.ones(6)).shape == (4,)
