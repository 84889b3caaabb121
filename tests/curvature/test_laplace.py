"""Laplace's approximation where it is exact, and against dense formulas where it is not."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.func import functional_call, jacrev
from torch.testing import assert_close

import matrigami as mg
from matrigami.curvature import ekfac, ggn, hessian, kfac, kfoc, laplace
from matrigami.operators import DenseMatrix

SIGMA, TAU = 0.3, 0.7


def line():
    """Bayesian linear regression at its best weights: data, model, exact precision."""
    x = torch.randn(40, 5)
    y = x @ torch.randn(5, 1) + SIGMA * torch.randn(40, 1)
    P = x.mT @ x / SIGMA**2 + TAU * torch.eye(5)
    model = nn.Linear(5, 1, bias=False)
    model.weight.data = torch.linalg.solve(P, x.mT @ y / SIGMA**2).mT
    return x, y, model, P


@pytest.mark.parametrize("method", [kfac, ekfac, kfoc, ggn])
def test_linear_regression_is_exact(method):
    x, y, model, P = line()
    found = laplace(method(model, nn.MSELoss(), (x, y)), model, 40 / (2 * SIGMA**2), prior=TAU)
    assert_close(found.precision.dense(), P, rtol=1e-10, atol=0)
    likely = torch.distributions.Normal(model(x), SIGMA).log_prob(y).sum()
    marginal = MultivariateNormal(torch.zeros(40), SIGMA**2 * torch.eye(40) + x @ x.mT / TAU)
    assert_close(found.evidence(likely), marginal.log_prob(y[:, 0]), rtol=1e-10, atol=0)
    new = torch.randn(6, 5)
    predicted = found.predict(new)
    assert_close(predicted.mean, model(new))
    wanted = (new @ torch.linalg.inv(P) * new).sum(-1)
    assert_close(predicted.covariance[:, 0, 0], wanted, rtol=1e-10, atol=0)


def test_the_prior_has_the_largest_evidence():
    x, y, model, _ = line()
    noise = torch.tensor(SIGMA, requires_grad=True)
    F = kfac(model, nn.MSELoss(), (x, y))
    start = laplace(F, model, 40 / (2 * SIGMA**2), prior=100.0)
    best = start.fitted()
    assert_close(best.effective, best.prior * best.mean.square().sum())
    for factor in (0.9, 1.1):
        near = laplace(F, model, 40 / (2 * SIGMA**2), prior=factor * best.prior)
        assert near.evidence(0.0) < best.evidence(0.0)
    tau = best.prior.clone().requires_grad_()
    likely = torch.distributions.Normal(model(x).detach(), noise).log_prob(y).sum()
    evidence = laplace(F, model, 40 / (2 * noise**2), prior=tau).evidence(likely)
    by_tau, by_noise = torch.autograd.grad(evidence, (tau, noise))
    assert abs(by_tau) < 1e-10
    h = 1e-5
    ends = [
        laplace(F, model, 40 / (2 * s**2), prior=best.prior).evidence(
            torch.distributions.Normal(model(x).detach(), s).log_prob(y).sum()
        )
        for s in (SIGMA - h, SIGMA + h)
    ]
    assert_close(by_noise, (ends[1] - ends[0]) / (2 * h), rtol=1e-6, atol=0)


def classifier():
    """A logistic regression with a bias, near its best weights; one logit."""
    x = torch.randn(60, 3)
    y = torch.bernoulli((2 * x[:, :1] - x[:, 1:2]).sigmoid())
    model, loss = nn.Linear(3, 1), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        size = sum(p.square().sum() for p in model.parameters())
        value = loss(model(x), y) + TAU * size / 120
        value.backward()
        return value

    optimizer.step(closure)
    return x, y, model, loss


def test_logistic_regression():
    x, y, model, loss = classifier()
    F = ggn(model, loss, (x, y))
    assert_close(F.dense(), hessian(model, loss, (x, y)).dense())  # linear in its parameters
    found = laplace(F, model, 60, prior=TAU)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    H = 60 * F.dense() + TAU * torch.eye(4)
    likely = -60 * loss(model(x), y).detach()
    prior = MultivariateNormal(torch.zeros(4), torch.eye(4) / TAU).log_prob(theta)
    wanted = likely + prior + 2 * math.log(2 * math.pi) - H.logdet() / 2
    assert_close(found.evidence(likely), wanted, rtol=1e-10, atol=0)
    rows = torch.cat([x, torch.ones(60, 1)], 1)
    variance = (rows @ torch.linalg.inv(H) * rows).sum(-1)
    predicted = found.predict(x)
    assert_close(predicted.covariance[:, 0, 0], variance)
    z = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    sampled = (model(x).detach() + variance[:, None].sqrt() * z).sigmoid().mean(1)
    assert (predicted.probabilities[:, 0] - sampled).abs().max() < 0.02


def network():
    model = nn.Sequential(
        nn.Embedding(6, 4),
        nn.Flatten(),
        mg.nn.StructuredLinear(8, 4, mg.Monarch(2)),
        nn.Linear(4, 3),
    )
    return model, (torch.randint(6, (10, 2)), torch.arange(10) % 3)


@pytest.mark.parametrize("method", [kfac, ekfac])
def test_networks_against_dense_formulas(method):
    model, batch = network()
    F = method(model, nn.CrossEntropyLoss(), batch)
    found = laplace(F, model, 10, prior=2.0)
    P = 10 * F.dense() + 2 * torch.eye(F.shape[0])
    at = {name: p.detach() for name, p in model.named_parameters()}
    J = jacrev(lambda w: functional_call(model, w, (batch[0],)))(at)
    J = torch.cat([t.flatten(2) for t in J.values()], 2)
    assert_close(found.predict(batch[0]).covariance, J @ torch.linalg.inv(P) @ J.mT)
    size = (found.prior * found.mean.square().sum() - len(P) * math.log(2) + P.logdet()) / 2
    assert_close(found.evidence(1.0), 1 - size)
    drawn = found.samples(3, torch.Generator().manual_seed(0))
    noise = torch.randn(len(P), 3, generator=torch.Generator().manual_seed(0))
    e, Q = torch.linalg.eigh(P)
    moved = torch.cat([t.flatten(1) for t in drawn.values()], 1) - found.mean
    assert_close(moved.mT, Q @ (e.rsqrt()[:, None] * (Q.mT @ noise)))
    assert functional_call(model, {n: t[0] for n, t in drawn.items()}, (batch[0],)).shape == (10, 3)


def test_a_posterior_of_some_parameters():
    model, batch = network()
    loss = nn.CrossEntropyLoss()
    found = laplace(ekfac(model, loss, batch), model, 10, only="3.*")
    assert list(found.sizes) == ["3.weight", "3.bias"]
    assert_close(found.mean[:12], model[3].weight.detach().flatten())
    for layer in model[:3]:
        layer.requires_grad_(False)
    again = laplace(ekfac(model, loss, batch), model, 10)
    assert_close(again.precision.dense(), found.precision.dense())
    assert_close(again.predict(batch[0]).covariance, found.predict(batch[0]).covariance)


def test_what_does_not_fit_is_refused():
    model, batch = network()
    F = kfac(model, nn.CrossEntropyLoss(), batch)
    with pytest.raises(ValueError, match=r"nearest names: 3\.weight"):
        laplace(F, model, 10, only="3.weigth*")
    with pytest.raises(ValueError, match="which has no blocks"):
        laplace(DenseMatrix(F.dense()), model, 10, only="3.*")
    with pytest.raises(ValueError, match="is above 0"):
        laplace(F, model, 10, prior=0.0)
    with pytest.raises(ValueError, match=r"trainable parameters"):
        laplace(F, model[3], 10)
    with pytest.raises(ValueError, match=r"has the eigenvalue -"):
        laplace(-1 * DenseMatrix(F.dense()), model, 10)
    for p in model.parameters():
        p.data.zero_()
    with pytest.raises(ValueError, match="all parameters are zero"):
        laplace(F, model, 10).fitted()
    images = nn.Conv1d(2, 2, 1)
    F = kfac(images, nn.CrossEntropyLoss(), (torch.randn(3, 2, 4), torch.zeros(3, 4).long()))
    with pytest.raises(ValueError, match="should be"):
        laplace(F, images, 12).predict(torch.randn(3, 2, 4))
