"""Sizes, ranks and blocks that recipes are made of."""

import math

import pytest
from hypothesis import given, strategies as st

import matrigami as mg
from matrigami.operators import factorize, resolve_blocks, resolve_rank
from matrigami.operators._recipe import BALANCE


@given(n=st.integers(1, 4000), parts=st.integers(2, 4))
def test_factors_are_balanced_and_cover_the_size(n, parts):
    factors = factorize(n, parts)
    assert list(factors) == sorted(factors)
    assert factors[-1] <= BALANCE * factors[0]
    assert n <= math.prod(factors) <= 2 * n + 2**parts


@pytest.mark.parametrize("rank", [0, 9, -1, 0.0, 1.5, -0.5])
def test_a_rank_out_of_range_says_what_is_possible(rank):
    with pytest.raises(
        ValueError, match=r"(?s)rank .* is out of range; the full rank of this shape is 8.*1 to 8"
    ):
        resolve_rank(rank, 8, "it")


def test_a_fraction_of_full_rank_is_rounded_up():
    assert [resolve_rank(f, 10, "it") for f in (0.01, 0.25, 1.0)] == [1, 3, 10]


@given(f=st.floats(0.01, 1.0), m=st.integers(1, 60), n=st.integers(1, 60))
def test_a_fraction_of_blocks_always_divides(f, m, n):
    b = resolve_blocks(f, m, n, "it")
    assert m % b == n % b == 0
    assert b <= max(f * min(m, n), 1)


@pytest.mark.parametrize("blocks", [0, -2, 0.0, 1.5])
def test_a_number_of_blocks_out_of_range_is_refused(blocks):
    with pytest.raises(ValueError, match="no number of blocks"):
        resolve_blocks(blocks, 8, 8, "it")


def test_recipes_take_fractions():
    assert mg.Monarch(blocks=0.25).init(16, 32).left.shape[0] == 4
    assert mg.BlockDiagonal(blocks=0.5).init(8, 12).blocks.shape == (4, 2, 3)
    assert mg.BlockTensorTrain(rank=0.5).init(16, 16).cores[0].shape[-4] == 2
    assert mg.LowRank(rank=0.25).init(16, 32).U.shape[-1] == 4
