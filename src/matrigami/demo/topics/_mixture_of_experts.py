"""BTT mixture of experts: the rank index of a train is the index of an expert."""

from collections.abc import Sequence
from typing import Any

import torch

import matrigami as mg
from matrigami.demo._draw import Panel, bars, curves, matrix
from matrigami.demo._topic import Names, Number, Slider, Topic
from matrigami.nn import StructuredMoE


def example(experts: int = 8) -> dict[str, Any]:
    """Learn a map that is one of eight matrices, depending on where the vector is."""
    n, train, steps = 16, mg.BlockTensorTrain(rank=1), 300
    teacher = StructuredMoE(n, n, train, experts=8, active=1)
    x = torch.randn(2048, n)
    y = teacher(x).detach()
    place = (x @ teacher.gate.T).argmax(1)

    moe = StructuredMoE(n, n, train, experts=experts, active=2)
    optimizer, losses = torch.optim.Adam(moe.parameters(), lr=0.03), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        rows = torch.randint(2048, (256,))
        loss = (moe(x[rows]) - y[rows]).square().mean() / y.square().mean()
        optimizer.zero_grad()
        (loss + 0.01 * moe.losses().balance).backward()
        optimizer.step()
        losses.append(loss.item())
    error, macs, params = sum(losses[-20:]) / 20, moe.cost().macs, moe.cost().params
    pairs = (place, (x @ moe.gate.T).argmax(1))
    table = torch.zeros(8, experts).index_put_(pairs, torch.ones(2048), accumulate=True)
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """Loss, who gets what, and the price."""
    lines = {str(r["experts"]): (range(r["steps"]), r["losses"]) for r in runs}
    errors = {f"{r['experts']} ({r['macs']} MACs)": r["error"] for r in runs}
    return [
        curves(lines, "Loss, by experts", x="steps", y="relative", log="y"),
        matrix(
            found["table"],
            "Who goes where",
            signed=False,
            note="rows: the eight matrices",
        ),
        bars(errors, "Error at the end", spec=".3f"),
    ]


TOPIC = Topic(
    formula="BTT of rank E:   W = Σ_{e} W_{e},   each of rank 1\n"
    "mixture:   y = Σ_{e ∈ top(x)} softmax(G x)_{e} W_{e} x   (only the active ones are computed)",
    example=example,
    numbers=(
        Number("error", "mean square error at the end, relative", ".3f"),
        Number("macs", "multiply-adds for each vector", ",d"),
        Number("params", "numbers stored", ",d"),
    ),
    meaning="{experts} experts, two active: {macs} multiply-adds a vector, {params:,} numbers, "
    "relative error {error:.3f}. More experts store more and learn more; the work of a vector "
    "grows by their gate alone, {experts} rows of 16.",
    picture=picture,
    slider=Slider("experts", (2, 4, 8, 16), "Experts"),
    exercise="Why is the balance loss added?",
    answer="An expert that is chosen learns, and one that learns is chosen: without it a few "
    "experts get everything. The balance loss is 1 if all get alike.",
    sources=(
        "Potapczynski et al. (2024), Efficient linear layers, arXiv:2410.02117.",
        "Fedus, Zoph and Shazeer (2022), Switch transformers, arXiv:2101.03961.",
    ),
)
