"""Two processes with a share of the data each know what one process knows with all of them."""

import multiprocessing
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from matrigami.curvature import capture, ekfac, kfac, kfoc

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

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


def on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    try:
        model = DistributedDataParallel(network())
        found = by_methods(model, share(rank))
        found |= by_capture(model, share(rank), lambda moments: moments.all_reduce())
        torch.save(found, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=partial(on_rank, rank, tmp_path)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0] * RANKS
    model = network()
    expected = by_methods(model, [data()]) | by_capture(model, [data()])
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert_close(found[name], value, atol=1e-8, rtol=1e-7)
