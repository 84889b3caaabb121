"""What a plan tells of a layer: how many directions it has, and when another one is faster."""

import json

import pytest
import torch
from torch import nn

from matrigami import LowRank
from matrigami.compress import Grid, plan
from matrigami.compress._worth import NEVER, SIZES, least, ranks


def test_directions_are_counted_where_the_inputs_are():
    """A weight of full rank on inputs of two directions, one of them a tenth as long."""
    W = torch.linalg.qr(torch.randn(6, 6))[0]
    x = torch.zeros(2, 6)
    x[0, 1], x[1, 4] = 5.0, 1.0
    A = (x.mT @ x).double()
    assert ranks(W, None) == (6, 6)
    assert ranks(W, A) == (1, 2)
    assert ranks(0 * W, A) == (1, 1)


@pytest.mark.parametrize(
    ("faster", "told"),
    [("0000", NEVER), ("0001", "4096"), ("1011", "256"), ("1111", "1"), ("1110", NEVER)],
)
def test_a_layer_is_worth_it_from_where_it_stays_faster(faster, told):
    assert least([one == "1" for one in faster]) == told


def test_structured_layers_of_a_plan_are_timed_if_that_is_asked_for():
    model, data = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), [torch.randn(20, 8)] * 4
    for timed in (False, True):
        found = plan(model, data, [LowRank(rank=1), Grid(4)], two_sided=False, timed=timed)
        structured, rounded = found.options["0"]
        assert rounded.faster_from == ""
        assert structured.faster_from in ([NEVER, *map(str, SIZES)] if timed else [""])
        assert ("faster from" in str(found)) == timed
        assert json.loads(found.to_json())["ranks"]["0"] == list(found.ranks["0"])
        assert "rank of 90 %" in str(found)
