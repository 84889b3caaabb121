"""What K-FAC's watch sees of a training loop, and what it leaves alone."""

import copy
import gc
import threading
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from matrigami.curvature import capture, ggn, hessian, kfac
from matrigami.optim import KFAC, Muon, plan

LOSS = nn.CrossEntropyLoss()
FUNCTION = nn.functional.cross_entropy


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 4), torch.randint(3, (n,))


def factor(optimizer: KFAC, p: torch.Tensor, name: str = "A") -> torch.Tensor:
    return optimizer.state[p][name][0]


@pytest.mark.parametrize("loss", [LOSS, FUNCTION], ids=["module", "function"])
def test_micro_batches_count_by_their_examples(loss):
    x, y = data()
    found = []
    for sizes in ([12], [10, 2], [3, 4, 5]):
        model = network()
        model[0].weight.data.zero_()
        optimizer = KFAC(model, LOSS)
        for inputs, targets in zip(x.split(sizes), y.split(sizes), strict=True):
            (loss(model(inputs), targets) * len(inputs) / 12).backward()
        optimizer.step()
        found.append(factor(optimizer, model[0].weight))
    for A in found:
        assert_close(A, x.mT @ x / 12)


def test_a_batch_in_which_nothing_counts_is_left_out():
    x, y = data()
    model = network()
    optimizer = KFAC(model, LOSS)
    LOSS(model(x), torch.full_like(y, -100))
    LOSS(model(x), y).backward()
    optimizer.step()
    assert_close(factor(optimizer, model[0].weight), x.mT @ x / 12)


def test_a_loss_that_sums_adds_its_batches():
    x, y = data()
    loss = nn.CrossEntropyLoss(reduction="sum")
    model = network()
    exact = kfac(model, loss, (x, y), joint=False)["2.weight"].factors[0].dense()[0]
    optimizer = KFAC(model, loss, labels=1000)
    for inputs, targets in zip(x.split([10, 2]), y.split([10, 2]), strict=True):
        loss(model(inputs), targets).backward()
    optimizer.step()
    assert float((factor(optimizer, model[2].weight, "B") - exact).norm() / exact.norm()) < 0.1


class Words(nn.Module):
    """Scores with classes last; padding is token 0."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.o = nn.Embedding(6, 4), nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, x):
        return self.o(torch.tanh(self.a(self.e(x))))


def test_padding_does_not_count():
    model, loss = Words(), nn.CrossEntropyLoss(ignore_index=0)
    x = torch.randint(1, 6, (8, 8))
    x[:, 2:] = 0
    h = model.e(x)[x != 0].detach()
    short = copy.deepcopy(model)
    optimizer, other = KFAC(model, loss, labels=1000), KFAC(short, loss, labels=1000)
    loss(model(x).flatten(0, 1), x.flatten()).backward()
    optimizer.step()
    assert_close(factor(optimizer, model.a.weight), h.mT @ h / len(h))
    loss(short(x[:, :2]).transpose(1, 2), x[:, :2]).backward()
    other.step()
    B, known = (factor(o, m.a.weight, "B") for o, m in ((optimizer, model), (other, short)))
    assert float((B - known).norm() / known.norm()) < 0.1


@pytest.mark.parametrize("name", ["label_smoothing", "weight"])
def test_the_curvature_is_that_of_the_loss(name):
    """At the targets where the loss is called, at drawn labels where it is not."""
    options = {name: torch.tensor([1.0, 2.0, 4.0]) if name == "weight" else 0.1}
    (x, y), loss = data(), nn.CrossEntropyLoss(**options)
    model = network()
    exact = kfac(model, loss, (x, y), joint=False)["2.weight"].factors[0].dense()[0]
    for called, close in ((loss, 0.1), (partial(FUNCTION, **options), 0.5)):
        copied = copy.deepcopy(model)
        optimizer = KFAC(copied, loss, labels=1000)
        called(copied(x), y).backward()
        optimizer.step()
        B = factor(optimizer, copied[2].weight, "B")
        assert float((B - exact).norm() / exact.norm()) < close


def test_only_what_is_differentiated_counts():
    """A forward pass without a backward pass, queries of curvature, gradients that are dropped."""
    (x, y), (u, v) = data(), data()
    model, loss = network(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    optimizer, other = KFAC(model, loss), KFAC(twin, loss)
    for step in range(3):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        loss(twin(u), v).backward()  # another player's step
        other.zero_grad()
        loss(twin(u), v)
        twin(3 * u)
        kfac(twin, loss, (u, v))
        ggn(twin, loss, (u, v)).dense()
        hessian(twin, loss, (u, v)).dense()
        thread = threading.Thread(target=twin, args=(u + step,))
        thread.start()
        thread.join()
        loss(twin(x), y).backward()
        optimizer.step()
        other.step()
    assert_close(factor(other, twin[0].weight), factor(optimizer, model[0].weight))
    assert other.estimator is not None
    assert other.estimator.passes == 0  # since the last step


def test_a_capture_does_not_see_queries():
    model, (x, y) = network(), data()
    with capture(model) as moments:
        LOSS(model(x), y).backward()
        kfac(model, LOSS, (x, y))
        ggn(model, LOSS, (x, y)).dense()
    assert moments["0.weight"].examples == 12


def test_a_layer_that_is_added_later_is_watched():
    model, (x, y) = network(), data()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, LOSS)
    LOSS(model(x), y).backward()
    optimizer.step()
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    LOSS(model(x), y).backward()
    optimizer.step()
    assert_close(factor(optimizer, model[0].weight), x.mT @ x / 12)


@pytest.mark.parametrize(
    "make", [partial(KFAC, loss=LOSS), partial(Muon, inputs=True)], ids=["kfac", "muon"]
)
@pytest.mark.parametrize("views", [{}, {"views": [None]}], ids=["matrix", "adam"])
def test_weights_outside_of_the_model_are_named_once(make, views):
    model, outer, (x, y) = network(), nn.Linear(3, 3, bias=False), data()
    optimizer = make(model)
    optimizer.add_param_group({"params": [outer.weight]} | views)
    said = []
    for _ in range(2):
        LOSS(outer(model(x)), y).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said.append([str(w.message) for w in caught])
    assert [len(each) for each in said] == ([0, 0] if views else [1, 0])
    assert views or "watches a Sequential; weights of shapes (3, 3) are not of it" in said[0][0]


def test_weights_outside_of_the_model_may_be_told_of():
    model, outer, (x, y) = network(), nn.Linear(3, 3, bias=False), data()
    optimizer = KFAC(model, LOSS)
    optimizer.add_param_group({"params": [outer.weight]})
    LOSS(outer(model(x)), y).backward()
    eye = torch.eye(3)[None]
    optimizer.observe(outer.weight, eye, eye)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_weights_that_are_never_seen_are_named():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(torch.tanh(nn.functional.linear(x, self.a.weight, self.a.bias)))

    model, (x, y) = Functional(), data()
    optimizer = KFAC(model, LOSS)
    LOSS(model(x), y).backward()
    with pytest.warns(RuntimeWarning, match=r"saw no call of the layers of a\.weight in training"):
        optimizer.step()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.a(x)
        if self.reentrant is None:
            return self.c(torch.tanh(self.b(h)))
        inner = checkpoint(lambda h: torch.tanh(self.b(h)), h, use_reentrant=self.reentrant)
        return self.c(inner)


def test_checkpointing_is_seen_once_or_refused():
    x, y = data()
    models = {kind: Checkpointed(kind) for kind in (None, False, True)}
    for model in models.values():
        model.load_state_dict(models[None].state_dict())
    found = {}
    for kind, model in models.items():
        with capture(model) as moments:
            LOSS(model(x), y).backward()
            LOSS(model(x), y).backward()
        every = [moments[name] for name in moments]
        found[kind] = [(m.rows, m.examples, m.inputs, m.gradients) for m in every]
    for kind in (False, True):
        for one, other in zip(found[kind], found[None], strict=True):
            assert one[:2] == other[:2]
            for A, B in zip(one[2:], other[2:], strict=True):
                assert_close(A.dense(), B.dense())
    assert_close(
        kfac(models[False], LOSS, (x, y)).dense(), kfac(models[None], LOSS, (x, y)).dense()
    )
    with pytest.raises(ValueError, match="use_reentrant=False"):
        kfac(models[True], LOSS, (x, y))
    for kind in (None, False):
        optimizer = KFAC(models[kind], LOSS)
        LOSS(models[kind](x), y).backward()
        optimizer.step()
    assert_close(models[None].b.weight, models[False].b.weight)
    optimizer = KFAC(models[True], LOSS)
    assert optimizer.estimator is not None
    with pytest.raises(ValueError, match="use_reentrant=False"):
        LOSS(models[True](x), y).backward()


def test_layers_that_a_reentrant_checkpoint_hides_are_named():
    """The labels drawn at the outputs reach none of them, and no gradient passes through."""

    class Deep(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.reentrant = reentrant

        def forward(self, x):
            hidden = lambda h: torch.tanh(self.b(torch.tanh(self.a(h))))  # noqa: E731
            return self.c(checkpoint(hidden, x.requires_grad_(), use_reentrant=self.reentrant))

    x, y = data()
    model = Deep(True)
    optimizer = KFAC(model, LOSS)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"a is inside of a reentrant(.|\n)*use_reentrant=False"):
        LOSS(model(x), y).backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    model.reentrant = False
    LOSS(model(x), y).backward()
    assert optimizer.estimator is not None
    optimizer.step()
    assert optimizer.estimator.names == {"a.weight", "b.weight", "c.weight"}


def test_a_layer_without_gradients_is_no_checkpoint():
    """A frozen part under no_grad is called once, and refused by nobody."""

    class Prefix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.a(x)
            return self.b(x)

    model, (x, y) = Prefix(), data()
    optimizer = KFAC(model, LOSS)
    LOSS(model(x), y).backward()
    optimizer.step()
    assert optimizer.estimator is not None
    assert optimizer.estimator.names == {"b.weight"}


def test_hooks_leave_with_the_optimizer():
    model, loss = network(), nn.CrossEntropyLoss()
    for _ in range(3):
        KFAC(model, loss)
    gc.collect()
    assert not model._forward_hooks
    assert not model[0]._forward_hooks
    assert not loss._forward_pre_hooks


def test_heads_that_are_too_large_take_adam():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12))
    optimizer = KFAC(model, LOSS, max_dim=10)
    assert optimizer.estimator is not None
    assert list(optimizer.estimator._layers) == ["0.weight"]
    head = nn.Linear(768, 50257, bias=False, device="meta")
    assert plan(nn.Sequential(head), KFAC).bytes == 2 * 8 * head.weight.numel()  # Adam's
