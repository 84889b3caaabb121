"""Every optimiser, and every variant of it, obeys the laws."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from matrigami.optim import (
    CANS,
    KFAC,
    OPTIMIZERS,
    POLAR_EXPRESS,
    SGD_SIZE,
    SOAP,
    Muon,
    Shampoo,
    cans_root,
    spectral,
)
from matrigami.testing import OPTIMIZER_LAWS, check_optimizer
from matrigami.testing._optimizer_laws import (
    bad_gradients_are_skipped,
    converges,
    equals_its_reference,
    turns_with_its_coordinates,
)
from matrigami.testing._optimizer_targets import feed, gradients, parameters

VARIANTS = {
    "soap_at_once": partial(SOAP, stagger=False),
    "soap_one_sided": partial(SOAP, one_sided=True),
    "soap_sampled": partial(SOAP, statistics_every=3, frequency=4),
    "soap_rotated": partial(SOAP, rotate_second_moment=True, frequency=3),
    "soap_one_basis": partial(SOAP, max_dim=4),
    "shampoo_own_size": partial(Shampoo, graft=None, frequency=2),
    "shampoo_sgd": partial(Shampoo, graft=SGD_SIZE, one_sided=True, frequency=1),
    "shampoo_tiles": partial(Shampoo, block_size=2),
    "shampoo_kl": partial(Shampoo, kl=True, frequency=1),
    "shampoo_products": partial(Shampoo, root=cans_root),
    "muon_cans": partial(Muon, polynomials=CANS, nesterov=False),
    "muon_polar": partial(Muon, polynomials=POLAR_EXPRESS, scale=spectral),
    "muon_bound": partial(Muon, bound=True),
    "muon_inputs": partial(Muon, inputs=True, statistics_every=3),
}


def watching(source, **options) -> KFAC:
    """K-FAC with the loss of the targets; its trust region couples parameters, by intent."""
    loss = nn.CrossEntropyLoss() if isinstance(source, nn.Module) else None
    return KFAC(source, loss, kl_clip=1e9, **options)


FACTORIES = OPTIMIZERS | {"kfac": watching}

WITHOUT_CURVATURE = {"converges", "ignores_the_scale_of_the_loss", "poor_gradients_are_harmless"}
"""Laws of which K-FAC needs curvature: bare parameters are not watched."""


@pytest.mark.parametrize("law", OPTIMIZER_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name: str, law):
    if name == "kfac" and law.__name__ in WITHOUT_CURVATURE:
        pytest.skip("bare parameters have no curvature; see test_kfac.py")
    check_optimizer(FACTORIES[name], laws=[law])


def without(name: str, *laws: str) -> list:
    """The laws of a variant, without some."""
    skipped = {"converges", *laws}
    skipped |= {"equals_its_reference"} if name == "shampoo_tiles" else set()  # it has four blocks
    if name in {"shampoo_kl", "shampoo_sgd"}:  # their steps have the size of the gradient's
        skipped |= {"ignores_the_scale_of_the_loss", "poor_gradients_are_harmless"}
    return [law for law in OPTIMIZER_LAWS if law.__name__ not in skipped]


DAILY = ("shampoo_kl", "muon_cans")
"""Variants that are asked each day."""


@pytest.mark.parametrize("name", DAILY)
def test_variant(name: str):
    check_optimizer(VARIANTS[name], without(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in DAILY])
def test_other_variant(name: str):
    check_optimizer(VARIANTS[name], without(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in {"shampoo_kl", "shampoo_sgd"}])
def test_variant_converges(name: str):
    check_optimizer(VARIANTS[name], [converges])


@given(
    name=st.sampled_from([name for name in OPTIMIZERS if name != "kfac"]),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
)
@settings(max_examples=10)
def test_any_shapes_are_trained_together_as_alone(name: str, sizes: list[tuple[int, int]]):
    ps = parameters(*sizes)
    stream = gradients(ps, 3)
    make = partial(OPTIMIZERS[name], lr=0.1, **({} if name == "muon" else {"stagger": False}))
    feed(make(ps), ps, stream)
    for i, (p, q) in enumerate(zip(ps, parameters(*sizes), strict=True)):
        feed(make([q]), [q], [[Gs[i]] for Gs in stream])
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


def test_a_broken_optimizer_is_named():
    class Drifting(SOAP):
        """Its step does not depend on the state alone."""

        @staticmethod
        def direction(G, state, options):
            return torch.full_like(G, float("nan")), {}

    with pytest.raises(AssertionError, match="breaks the law 'bad_gradients_are_skipped'"):
        check_optimizer(Drifting, laws=[bad_gradients_are_skipped])


def test_adam_is_not_equivariant():
    wrong = partial(SOAP, max_dim=1)
    with pytest.raises(AssertionError, match="the turned trajectory is off"):
        check_optimizer(wrong, laws=[equals_its_reference, turns_with_its_coordinates])
