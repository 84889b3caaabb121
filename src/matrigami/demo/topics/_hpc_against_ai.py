"""HPC against AI matrices: where blocks have low rank, and where they do not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import matrigami as mg
from matrigami.demo._draw import Panel, bars, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic


def example(tile: int = 16) -> dict[str, Any]:
    """The ranks of all tiles of a kernel matrix and of a trained weight."""
    from sklearn.datasets import load_digits

    t = torch.linspace(0, 1, 64)
    kernel = 1 / (0.01 + abs(t[:, None] - t))  # potentials of charges on a line
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images) / 16, torch.tensor(labels)
    first, hidden, last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
    net = nn.Sequential(first, nn.ReLU(), hidden, nn.ReLU(), last)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    weight = hidden.weight.detach()

    def ranks(W: torch.Tensor) -> torch.Tensor:
        tiles = W.reshape(64 // tile, tile, 64 // tile, tile).transpose(1, 2)
        values = torch.linalg.svdvals(tiles)  # of every tile
        return (values > 0.02 * values.max()).sum(-1).double()

    maps = {"kernel": ranks(kernel), "weight": ranks(weight)}
    kernel_rank, weight_rank = [float(m.mean()) / tile for m in maps.values()]
    hodlr = mg.HODLR(leaf=8, rank=2)
    kernel_error, weight_error = [
        float((W - mg.project(hodlr, W).dense()).norm() / W.norm()) for W in (kernel, weight)
    ]
    ratio = weight_error / kernel_error
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """Both matrices and their block-rank maps."""
    del runs
    tile, note = found["tile"], "rank of each tile"
    errors = {"kernel": found["kernel_error"], "weight": found["weight_error"]}
    k, w = found["maps"]["kernel"], found["maps"]["weight"]
    return [
        matrix(found["kernel"].log(), "Kernel (logarithm)", signed=False),
        matrix(k, f"Kernel, tiles of {tile}", signed=False, limit=tile, note=note),
        bars(errors, "Error of HODLR, rank 2", spec=".3f"),
        matrix(found["weight"], "Trained weight"),
        matrix(w, f"Weight, tiles of {tile}", signed=False, limit=tile, note=note),
    ]


TOPIC = Topic(
    formula="HPC:   ranks of blocks far from the diagonal stay small (smooth at a distance)\n"
    "AI:   all tiles alike; what structure there is follows the features, not the position",
    example=example,
    numbers=(
        Number("kernel_rank", "mean rank of the kernel's tiles, as a share of full", ".2f"),
        Number("weight_rank", "of the weight's tiles", ".2f"),
        Number("ratio", "times larger is the weight's error with HODLR of rank 2", ".0f"),
        Number("kernel_error", "error of the kernel with HODLR of rank 2", ".4f"),
        Number("weight_error", "error of the trained weight", ".4f"),
    ),
    meaning="Tiles of {tile} × {tile}: those of the kernel have {kernel_rank:.0%} of full rank on "
    "average, the far ones less; those of the trained weight {weight_rank:.0%}, near and far "
    "alike. A hierarchical matrix of rank 2 misses {kernel_error:.1%} of the kernel and "
    "{weight_error:.0%} of the weight. `matrigami analyze` does this for 15 structures, with null "
    "models.",
    picture=picture,
    slider=Slider("tile", (4, 8, 16, 32), "Tile"),
    exercise="The charges sit on a line in order. What happens to the map in a random order?",
    answer="Every tile then couples near and far charges and has full rank: the structure is in "
    "the order. For points there is a good order, by geometry; for neurons none is given, and "
    "`analyze` searches for one.",
    sources=(
        "Hackbusch (2015), Hierarchical matrices: algorithms and analysis.",
        "This project: docs/results/hpc_vs_ai.",
    ),
)
