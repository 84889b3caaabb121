"""Layers and recipes of sizes that nothing can have, and of what is no recipe."""

import numpy as np
import pytest
import torch

from matrigami import BlockTensorTrain, Dense, LowRank, Monarch, eigh, project
from matrigami.nn import StructuredLinear, StructuredMoE
from matrigami.operators import DenseMatrix

pytestmark = pytest.mark.usefixtures("unchecked")

NO_SIZES = (0, -4, 4.0, "4", True, None, torch.tensor(2.5))


@pytest.mark.parametrize("size", NO_SIZES, ids=repr)
def test_sizes_are_counts(size):
    recipe = BlockTensorTrain(rank=1)
    for call in (
        lambda: StructuredLinear(size, 4, recipe),
        lambda: StructuredLinear(4, size, recipe),
        lambda: StructuredMoE(size, 4, recipe, experts=4, active=2),
        lambda: StructuredMoE(4, size, recipe, experts=4, active=2),
        lambda: StructuredMoE(4, 4, recipe, experts=size, active=2),
        lambda: StructuredMoE(4, 4, recipe, experts=4, active=size),
        lambda: Monarch(blocks=1).init(size, 4),
        lambda: Dense().init(4, size),
    ):
        with pytest.raises(ValueError, match="cannot be"):
            call()


@pytest.mark.parametrize("recipe", ["btt", LowRank, None, 2], ids=repr)
def test_a_structure_is_a_recipe(recipe):
    for call in (
        lambda: StructuredLinear(4, 4, recipe),
        lambda: StructuredMoE(4, 4, recipe, experts=4, active=2),
        lambda: project(recipe, torch.eye(4)),
    ):
        with pytest.raises(TypeError, match="is no structure"):
            call()


def test_counts_of_other_libraries_count():
    layer = StructuredLinear(np.int64(4), torch.tensor(6), LowRank(rank=2))
    assert layer(torch.ones(3, 4)).shape == (3, 6)
    A = DenseMatrix(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    assert eigh(A, k=np.int64(2)).values.tolist() == [3.0, 2.0]
