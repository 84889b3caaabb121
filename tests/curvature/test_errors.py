"""Bad input is refused with what was asked, what was got, and what to do."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import matrigami as mg
from matrigami.curvature import _moments, capture, damped, ekfac, ggn, hessian, kfac, kfoc
from matrigami.nn import OneHot, Use, uses

METHODS = {"kfac": kfac, "ekfac": ekfac, "kfoc": kfoc}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
LOSS = nn.CrossEntropyLoss()


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(n=6):
    return torch.randn(n, 4), torch.randint(3, (n,))


@methods
def test_models_and_data(method):
    x, y = batch()
    with pytest.raises(ValueError, match="the Sequential has no trainable parameters"):
        method(network().requires_grad_(False), LOSS, (x, y))
    for nothing in ([], [(x[:0], y[:0])], (x[:0], y[:0])):
        with pytest.raises(ValueError, match="no data"):
            method(network(), LOSS, nothing)
    with pytest.raises(ValueError, match="batch 1 holds NaN"):
        method(network(), LOSS, [(x, y), (x / 0, y)])


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        p = super().forward(outputs, targets)
        return (1 - (-p).exp()) * p


@pytest.mark.usefixtures("unchecked")
@methods
def test_losses_and_labels(method):
    for loss in (
        nn.L1Loss(),
        nn.MSELoss(reduction="none"),
        nn.functional.l1_loss,
        Focal(),
    ):
        with pytest.raises(ValueError, match=r"likelihood is not known.\n.*or ggn"):
            method(network(), loss, batch())
    for labels in (0, -1):
        with pytest.raises(ValueError, match=f"labels={labels}: there are no such labels"):
            method(network(), LOSS, batch(), labels=labels)
    for labels in ("type-2", 1.5):
        with pytest.raises((ValueError, TypeError)):
            method(network(), LOSS, batch(), labels=labels)


class Overflow(nn.Module):
    def forward(self, x):
        return x.exp().exp().exp()


@methods
def test_activations_that_are_not_finite_are_named(method):
    model = nn.Sequential(nn.Linear(4, 4), Overflow(), nn.Linear(4, 3))
    x, y = batch()
    with pytest.raises(ValueError, match=r"batch 1 has .* at the layer 2 that are NaN"):
        method(model, LOSS, [(0.1 * x, y), (50 * x.abs(), y)])


@pytest.mark.usefixtures("unchecked")
@methods
def test_layers(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 3))
    with pytest.raises(
        TypeError, match=r"1, a Bilinear with two inputs: weight, bias.\n.*\n.*requires_grad_"
    ):
        method(model, LOSS, batch())
    unused = network()
    unused.extra = nn.Linear(4, 4)
    unused.forward = lambda x: unused[2](unused[1](unused[0](x)))
    with pytest.raises(ValueError, match="curvature: extra has no part"):
        method(unused, LOSS, batch())
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        words = nn.Sequential(nn.Embedding(5, 4, **options), nn.Flatten(), nn.Linear(12, 3))
        words[0].weight.data.mul_(0.1)
        with pytest.raises(TypeError, match="an Embedding with max_norm or scale_grad_by_freq"):
            method(words, LOSS, (torch.randint(5, (6, 3)), torch.randint(3, (6,))))


@pytest.mark.usefixtures("unchecked")
def test_the_parameter_of_the_model_itself_is_named():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x[:, :3] * self.w

    with pytest.raises(TypeError, match="the model itself, a Bare: w"):
        kfac(Bare(), LOSS, batch())
    with pytest.raises(TypeError, match="the model itself, a Bare: w"):
        uses(Bare(), torch.ones(1, 3), None, False)


def test_no_iterations():
    with pytest.raises(ValueError, match=r"iterations=0.*\n.*kfac"):
        kfoc(network(), LOSS, batch(), iterations=0)


def test_bases_of_other_models():
    basis = kfac(network(), LOSS, batch(), joint=False)
    with pytest.raises(ValueError, match="its blocks are"):
        ekfac(network(), LOSS, batch(), basis=basis)
    inverse = mg.power(damped(basis, 0.1), -1)
    again = ekfac(network(), LOSS, batch(), basis=inverse, joint=False)  # it has a basis
    assert again.shape == basis.shape
    diagonal = mg.curvature.CurvatureMatrix(
        tuple(mg.DiagonalMatrix(torch.ones(*block.shape[:-1])) for block in basis.blocks),
        basis.names,
        basis.shapes,
        basis.order,
    )
    with pytest.raises(
        ValueError, match=r"block 0.weight is a DiagonalMatrix.\n.*\n.*kfac or kfoc"
    ):
        ekfac(network(), LOSS, batch(), basis=diagonal, joint=False)
    with pytest.raises(ValueError, match=r"rule='pi'\): a block is a DiagonalMatrix"):
        damped(diagonal, 0.1, "pi")


def test_a_basis_of_other_sizes():
    basis = kfac(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), LOSS, batch())
    with pytest.raises(ValueError, match="basis"):
        ekfac(network(), LOSS, batch(), basis=basis)


@pytest.mark.usefixtures("unchecked")
def test_damping():
    F = kfac(network(), LOSS, batch())
    with pytest.raises(ValueError, match=r"damping=-1.0, rule='tikhonov'"):
        damped(F, -1.0)
    with pytest.raises((ValueError, TypeError)):
        damped(F, 1.0, "plain")


def test_names_and_vectors():
    model = network()
    F = kfac(model, LOSS, batch())
    missing = r"'3.weight'\]: no block has this parameter.\n.*0.weight\+0.bias"
    with pytest.raises(ValueError, match=missing):
        F["3.weight"]
    good = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"match at 2.bias.\n2.bias has shape none"):
        F.vector({name: t for name, t in good.items() if name != "2.bias"})
    with pytest.raises(ValueError, match=r"more has shape \(2,\), the parameter none"):
        F.vector(good | {"more": torch.ones(2)})
    with pytest.raises(ValueError, match=r"0.bias has shape \(6,\), the parameter \(5,\)"):
        F.vector(good | {"0.bias": torch.ones(6)})
    with pytest.raises(ValueError, match=r"k=99"):
        mg.eigh(F, k=99)


def test_the_order_of_the_names_does_not_matter():
    model = network()
    F = kfac(model, LOSS, batch())
    good = {name: p.detach() for name, p in model.named_parameters()}
    swapped = dict(reversed(good.items()))
    assert torch.equal(F.vector(swapped), F.vector(good))


def test_moments_without_backward():
    model = network()
    with capture(model) as moments, torch.no_grad():
        model(batch()[0])
    with pytest.raises(ValueError, match="Only inputs were seen"):
        moments.curvature()
    with pytest.raises(ValueError, match="there was no backward pass"):
        _moments.known_gradients(
            Use(
                OneHot(torch.zeros(1, dtype=torch.long), 2, torch.zeros(1, dtype=torch.long), 1),
                None,
            )
        )


@pytest.mark.usefixtures("unchecked")
def test_axes_that_are_no_stack_of_matrices():
    """A core that mixes the axes of its rows and columns."""
    from matrigami.operators import Contraction, LinearOperator, contraction, contractions

    class Mixed(mg.DenseMatrix):
        pass

    @contractions.register
    def _(A: Mixed) -> tuple[Contraction, ...]:
        return (
            Contraction(
                contraction(A.entries.view(2, 2, 2), "a i b", "i", "a b", a=2, b=2, i=2),
            ),
        )

    class Recipe(mg.Structure):
        def blank(self, m, n, empty) -> LinearOperator:
            return Mixed(empty(4, 2))

    @mg.operators.fans.register
    def _(A: Mixed) -> tuple[mg.operators.Fan, ...]:
        return (mg.operators.Fan(2, 4, last=True),)

    layer = mg.nn.StructuredLinear(2, 4, Recipe())
    with pytest.raises(TypeError, match="neither row- nor column-major"):
        kfac(layer, LOSS, (torch.randn(3, 2), torch.randint(4, (3,))))


@pytest.mark.usefixtures("unchecked")
def test_training_mode_and_unfit_shapes_are_refused():
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    loss = nn.CrossEntropyLoss()
    for noisy in (nn.BatchNorm1d(4), nn.Dropout(0.5)):
        model = nn.Sequential(noisy, nn.Linear(4, 3))
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            kfac(model, loss, (x, y))
        kfac(model.eval(), loss, (x, y))
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="nothing in the targets counts"):
        kfac(model, loss, (x, torch.full_like(y, -100)))
    with pytest.raises(ValueError, match=r"the outputs are \(6, 3\), the targets \(3,\)"):
        kfac(model, nn.MSELoss(), (x, torch.randn(3)))
    with pytest.raises(ValueError, match=r"the targets of batch 0 have the shape \(\)"):
        kfac(model, loss, (x[0], y[0]))
    with pytest.raises(TypeError):
        kfac(model, loss, [x])
    with pytest.raises(ValueError, match="no log-probabilities"):
        kfac(model, nn.NLLLoss(), (x, y))
    with pytest.raises((ValueError, RuntimeError)):
        kfac(model, loss, (x, y[:4]))


@pytest.mark.usefixtures("unchecked")
def test_a_model_returns_one_tensor():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x), x

    with pytest.raises(TypeError, match="returns a tuple"):
        kfac(Pair(), nn.CrossEntropyLoss(), (torch.randn(6, 4), torch.arange(6) % 3))


@pytest.mark.usefixtures("unchecked")
def test_further_tensors_of_a_call_are_refused():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(5, 4, mode="sum"), nn.Linear(4, 3)

        def forward(self, x):
            shares = torch.ones(x.shape) / 2
            return self.out(self.bag(input=x, per_sample_weights=shares))

    batch = torch.randint(5, (6, 2)), torch.arange(6) % 3
    with pytest.raises(TypeError, match="EmbeddingBag, was called with 2 tensors"):
        kfac(Weighted(), LOSS, batch)


class Dropped(nn.Module):
    """Two branches, one of them cut off."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) + self.b(x).detach()


class Headed(nn.Module):
    """A table whose weight is the head, too, by a function."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(torch.tanh(self.mix(self.table(x))), self.table.weight)


class Twice(nn.Module):
    """A weight that acts in its layer, and once more beside it; another call leads nowhere."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        self.a(x)
        return {"logits": self.o(nn.functional.linear(torch.tanh(self.a(x)), self.a.weight))}


class Inside(nn.Module):
    """A layer that is called in what one of torch's ways to differentiate does."""

    def __init__(self, way):
        super().__init__()
        self.a, self.o, self.way = nn.Linear(4, 4, bias=False), nn.Linear(4, 3), way

    def forward(self, x):
        if self.way == "vmap":
            return self.o(torch.vmap(self.a)(x))
        if self.way == "checkpoint":
            return self.o(checkpoint(self.a, x, use_reentrant=False))
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(self.a(z)).sum(), z, create_graph=True)
        return self.o(slope)


@methods
def test_layers_within_other_derivatives_are_refused(method):
    with pytest.raises(ValueError, match="a is called inside of vmap"):
        method(Inside("vmap"), LOSS, batch())
    with pytest.raises(ValueError, match=r"a\.weight is used outside of its layer"):
        method(Inside("derivative"), LOSS, batch())


def test_what_torch_func_does_not_know_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"has checkpoints.*\n.*torch.func.*\nTurn them off"):
        ggn(Inside("checkpoint"), LOSS, batch()).dense()
    with pytest.raises(ValueError, match=r"calls requires_grad_\(\)"):
        hessian(Inside("derivative"), LOSS, batch()).dense()


@pytest.mark.parametrize("lower", [False, True])
def test_who_watches_training_refuses_a_use_beside_the_layer(lower):
    x, y = batch()
    models = [Twice().float() for _ in range(3)]
    watching = [
        mg.optim.KFAC(models[0], loss := nn.CrossEntropyLoss()),
        mg.optim.Muon(models[1], inputs=True),
        capture(models[2]).__enter__(),
    ]
    for model, _ in zip(models, watching, strict=True):
        with (
            pytest.raises(ValueError, match=r"curvature: a\.weight is used outside of its layer"),
            torch.autocast("cpu", enabled=lower),
        ):
            loss(model(x.float())["logits"], y)


def test_a_table_that_takes_adam_may_be_a_head_by_a_function():
    tokens = torch.randint(5, (6,))
    model, loss = Headed(), nn.CrossEntropyLoss()
    optimizer = mg.optim.KFAC(model, loss)
    loss(model(tokens), tokens).backward()
    assert set(optimizer.estimator.take()) == {"mix.weight"}


@methods
def test_what_is_not_seen_is_refused(method):
    x, y = batch()
    with pytest.raises(ValueError, match="b has no part in the outputs"):
        method(Dropped(), LOSS, (x, y))
    tokens = torch.randint(5, (6,))
    with pytest.raises(ValueError, match=r"table\.weight is used outside of its layer"):
        method(Headed(), LOSS, (tokens, tokens))


@methods
def test_complex_parameters_and_targets_without_classes_are_refused(method):
    x, y = batch()
    model = nn.Linear(4, 3, dtype=torch.complex128)
    with pytest.raises(ValueError, match="weight is complex"):
        method(model, nn.MSELoss(), (x.to(torch.complex128), torch.ones(6, 3) * 1j))
    with pytest.raises(ValueError, match=r"targets \(6,\) are torch.float64"):
        method(network(), LOSS, (x, y.double()))
