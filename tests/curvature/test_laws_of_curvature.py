"""Every approximation obeys the laws, and a broken one is named."""

import pytest
import torch

from matrigami.curvature import APPROXIMATIONS, CurvatureMatrix, kfac
from matrigami.structures import KroneckerMatrix
from matrigami.testing import CURVATURE_LAWS, check_curvature


@pytest.mark.parametrize("law", CURVATURE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximation(name, law):
    check_curvature(APPROXIMATIONS[name], laws=[law])


def changed(make):
    """K-FAC whose blocks are something else."""

    def broken(*task, **options):
        F = kfac(*task, **options)
        return CurvatureMatrix(tuple(map(make, F.blocks)), F.names, F.shapes, F.order)

    return broken


def averaged(model, loss, data, **options):
    """It forgets whether the loss sums."""
    mean = type(loss)(ignore_index=-100) if hasattr(loss, "ignore_index") else type(loss)()
    return kfac(model, mean, data, **options)


def drawn(*task, seed=0, **options):
    """Its labels are new ones each time."""
    return kfac(*task, seed=seed + int(torch.randint(99, ())), **options)


def leaking(*task, **options):
    """It uses the random numbers of everybody."""
    torch.rand(1)
    return kfac(*task, **options)


def scaled(left):
    return changed(lambda K: KroneckerMatrix(left * K.factors[0].dense(), K.factors[1]))


BROKEN = {
    "is_positive_semidefinite": scaled(-1),
    "is_exact_for_one_example": scaled(2),
    "scales_with_the_loss": averaged,
    "draws_labels_by_its_seed": drawn,
    "covers_every_parameter": leaking,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_named(name):
    laws = [law for law in CURVATURE_LAWS if law.__name__ == name]
    with pytest.raises(AssertionError, match=f"breaks the law '{name}'"):
        check_curvature(BROKEN[name], laws=laws)
