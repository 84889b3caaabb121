"""Learning rates that transfer: the coordinate check of every optimiser, dense and with cores."""

from functools import partial

import pytest
import torch
from torch import nn

from matrigami.nn import coordinate_check, coordinate_slope, param_groups, spectral_rule
from matrigami.operators import Fan
from matrigami.optim import KFAC, OPTIMIZERS, SOAP, Muon, Shampoo, plan, spectral
from tests.nn.test_scaling import FAMILIES, Net

WIDTHS = (16, 64, 256)
OPTIONS = {"base_width": 16, "fixed_outputs": ["head"]}


def watching(groups) -> KFAC:
    """K-FAC of groups whose model is noted in the first."""
    optimizer = KFAC(groups, lr=1e-2)
    optimizer.attach(groups[0]["model"], nn.CrossEntropyLoss(), labels=4)
    return optimizer


VARIANTS = OPTIMIZERS | {
    "muon, spectral": partial(Muon, scale=spectral),
    "soap, one-sided": partial(SOAP, one_sided=True),
}


def slope(make, family: str, transferred: bool) -> float:
    """Of the change of hidden features; batches are larger than every width, as in practice."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator)
    y = torch.randint(0, 4, (512,), generator=generator)

    def groups(model: nn.Module):
        routes = plan(model, make)
        rules = routes.rules if transferred else {}
        found = routes.groups(param_groups(model, 1e-3, rules=rules, **OPTIONS))
        return [group | ({"model": model} if make is KFAC else {}) for group in found]

    def build(width: int) -> Net:
        return Net(width, FAMILIES[family](width), seed=0)

    optimizer = watching if make is KFAC else make
    changes = coordinate_check(
        build, WIDTHS, groups, x, y, features="hidden", steps=4, optimizer=optimizer
    )
    return coordinate_slope(changes)


@pytest.mark.parametrize("family", ["dense", "btt(rank=1)", "monarch"])
@pytest.mark.parametrize("name", VARIANTS)
def test_feature_updates_do_not_depend_on_the_width(name, family):
    assert abs(slope(VARIANTS[name], family, transferred=True)) < 0.1


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_they_vanish_with_the_rule_of_adam(name):
    """Updates that are spread over all directions have a smaller spectral norm than Adam's."""
    assert slope(VARIANTS[name], "dense", transferred=False) < -0.2


def test_the_rule_of_muon_with_the_spectral_scale_is_the_same_at_every_width():
    rules = plan(nn.Linear(64, 64), partial(Muon, scale=spectral)).rules
    rule = rules["weight"]
    assert rule(Fan(256, 256), 64, 64, 1) == 1.0
    assert rule(Fan(256, 1024), 64, 256, 2) == 0.5


def test_norms_of_shampoo():
    def norm(m, n, **options):
        return Shampoo.norm(m, n, Shampoo([nn.Parameter(torch.ones(2, 2))], **options).defaults)

    assert norm(16, 4) == 4.0
    assert norm(16, 4, graft=None) == 1.0  # an orthogonal factor
    assert norm(16, 4, graft=None, one_sided=True) == 1.0
    assert norm(16, 4, graft=None, exponent=-0.5) == 2.0  # the inverse of the gradient's size


def test_adam_is_the_rule_of_entries_of_one_size():
    adam = spectral_rule(lambda m, n: (m * n) ** 0.5)
    assert adam(Fan(8, 32), 64, 128, 2) == 4.0
