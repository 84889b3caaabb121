"""Two processes with a share of the data each know what one process knows with all of them."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from matrigami.curvature import FisherEstimator, capture, ekfac, kfac, kfoc
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without distributed"
)

RANKS = 2


class Heads(nn.Module):
    """Two layers that read one tensor, and a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.out((self.a(x) * self.b(x)).tanh())


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(9, 4, generator=g), torch.randint(3, (9,), generator=g)


def share(rank):
    """Uneven: five examples in two batches, and four in two."""
    x, y = data()
    sizes = ([3, 2], [1, 3])[rank]
    start = 5 * rank
    parts = (t[start : start + sum(sizes)].split(sizes) for t in (x, y))
    return list(zip(*parts, strict=True))


def network():
    torch.manual_seed(2)
    return Heads()


def by_methods(model, batches):
    found = {}
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        for method in (kfac, ekfac, partial(kfoc, iterations=30)):
            found[len(found)] = method(model, loss, batches).dense()
    return found


def by_capture(model, batches, finish=lambda moments: None):
    """In the wrapper gradients are averaged after the hooks have seen those of this process."""
    loss = nn.CrossEntropyLoss()
    with capture(model) as moments:
        for x, y in batches:
            loss(model(x), y).backward()
    finish(moments)
    return {
        "capture": moments.curvature().dense(),
        "inputs": moments["a.weight"].inputs.dense(),
        "counts": torch.tensor([moments["a.weight"].rows, moments["a.weight"].examples]),
    }


def by_estimator(model, rank):
    """The factors of three passes: one rank sees NaN in the first, both in the second."""
    loss, weights = nn.MSELoss(), [model.module.a.weight, model.module.out.weight]
    estimator = FisherEstimator(model, loss, weights)
    found = []
    for bad in ({1}, {0, 1}, set()):
        estimator.start(1)
        x = share(rank)[0][0] * (torch.nan if rank in bad else 1.0)
        loss(model(x), torch.zeros(len(x), 3)).backward()
        found.append({name: pair.A for name, pair in estimator.take().items()})
    return found


def on_rank(folder):
    rank = dist.get_rank()
    model = DistributedDataParallel(network())
    found = by_methods(model, share(rank))
    found |= by_capture(model, share(rank), lambda moments: moments.all_reduce())
    torch.save((found, by_estimator(model, rank)), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("found")
    on_ranks(RANKS, tmp_path_factory.mktemp("ranks"), on_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_two_processes_agree_with_one(ranks):
    model = network()
    expected = by_methods(model, [data()]) | by_capture(model, [data()])
    for found, _ in ranks:
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert_close(found[name], value, atol=1e-8, rtol=1e-7)


def test_a_process_whose_batch_holds_nan_does_not_count(ranks):
    """Nor does it keep the others waiting for its factors."""
    moments = [x.mT @ x / len(x) for x in (share(rank)[0][0] for rank in range(RANKS))]
    for _, (first, second, third) in ranks:
        assert set(first) == set(third) == {"a.weight", "out.weight"}
        assert_close(first["a.weight"][0], moments[0])
        assert second == {}
        assert_close(third["a.weight"][0], (moments[0] + moments[1]) / 2)
    for name in ("a.weight", "out.weight"):
        assert_close(ranks[0][1][0][name], ranks[1][1][0][name])
