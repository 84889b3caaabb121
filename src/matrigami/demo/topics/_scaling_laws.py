"""Scaling laws: error against multiply-adds, from the CIFAR-100 study and live on digits."""

import csv
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import nn

import matrigami as mg
from matrigami.demo._draw import Panel, bars, curves
from matrigami.demo._topic import Names, Number, Slider, Topic
from matrigami.studies import fit_power_law


def example(structure: str = "btt(rank=1)") -> dict[str, Any]:
    """The law of one structure in a study of 500 epochs, and two sizes of it trained here."""
    from sklearn.datasets import load_digits

    text = (resources.files("matrigami.demo") / "cifar100.csv").read_text()
    rows = [row for row in csv.DictReader(text.splitlines()) if row["structure"] == structure]
    macs, errors = [[float(r[key]) for r in rows] for key in ("macs", "train_error")]
    law = fit_power_law(macs, errors)
    exponent, at_budget = law.exponent, law(3.6e5)

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images) / 16, torch.tensor(labels)
    recipe = mg.parse(structure)
    live_macs, live_errors = [], []
    for width in (16, 64):
        hidden = mg.nn.StructuredLinear(width, width, recipe)
        net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), hidden, nn.ReLU(), nn.Linear(width, 10)
        )
        groups = mg.nn.param_groups(net, 1e-2, base_width=16, width=width)
        optimizer = torch.optim.Adam(groups, lr=1e-2)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[:1200]), y[:1200]).backward()
            optimizer.step()
        wrong = (net(x[1200:]).argmax(1) != y[1200:]).double().mean()
        live_errors.append(100 * wrong.item())
        live_macs.append(64 * width + hidden.cost().macs + 10 * width)
    small, large = live_errors
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """The laws of all structures, the ranking, and the digits."""
    lines = {r["structure"].split("(")[0]: (r["macs"], r["errors"]) for r in runs}
    ranking = {r["structure"].split("(")[0]: r["at_budget"] for r in runs}
    live = {r["structure"].split("(")[0]: (r["live_macs"], r["live_errors"]) for r in runs}
    point = (found["macs"][-1], found["errors"][-1])
    ordered = dict(sorted(ranking.items(), key=lambda item: item[1]))
    titles = "CIFAR-100, 500 epochs", "Train error at 3.6e5 MACs", "Digits, trained here"
    return [
        curves(lines, titles[0], x="multiply-adds", y="train error %", log="xy", mark=point),
        bars(ordered, titles[1], y="percent", spec=".1f"),
        curves(live, titles[2], x="multiply-adds", y="test error %", log="x"),
    ]


TOPIC = Topic(
    formula="error = c · MACs^{−a}   (or E + c · MACs^{−a}, where AICc asks for it)",
    example=example,
    numbers=(
        Number("exponent", "exponent a of the train error on CIFAR-100", ".3f"),
        Number("at_budget", "train error at 3.6e5 multiply-adds, percent", ".1f"),
        Number("small", "test error on digits at width 16, percent, one run", ".1f"),
        Number("large", "at width 64", ".1f"),
    ),
    meaning="On CIFAR-100 (31 runs of 500 epochs on one accelerator, MLP, augmented data) "
    "{structure} has a = {exponent:.3f} and {at_budget:.1f} % train error at equal compute; the "
    "order BTT, Monarch, dense, low rank, Kronecker, TT is the published one. The two networks "
    "trained on digits just now go from {small:.1f} to {large:.1f} %: one run each, so they show "
    "the direction, not a ranking.",
    picture=picture,
    slider=Slider(
        "structure",
        ("btt(rank=1)", "monarch(blocks=4)", "dense", "lowrank", "kronecker", "tt(rank=16)"),
        "Structure",
    ),
    exercise="With a = 0.142, how much more compute halves the error?",
    answer="2^(1/0.142) ≈ 130 times as much. Exponents are small: a better structure at the same "
    "compute is worth a lot of compute.",
    sources=(
        "Qiu et al. (2024), Compute better spent, arXiv:2406.06248.",
        "This project: docs/results/cifar100_published, copied by python -m benchmarks.gallery.",
    ),
)
