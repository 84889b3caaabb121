"""One table: the same bytes spent on width, structure, optimiser, bits, or sparsity."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import matrigami as mg
from matrigami.compress import Grid, prune_, quantize_, unstructured
from matrigami.demo._draw import Panel, bars, curves
from matrigami.demo._topic import Names, Number, Slider, Topic
from matrigami.optim import SOAP


def example(share: int = 8) -> dict[str, Any]:
    """Two hidden layers of 256 x 256 numbers of 32 bits, made smaller by the same factor."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float() / 16, torch.tensor(labels)
    loss = nn.CrossEntropyLoss()

    btt = mg.BlockTensorTrain(1, cores=4) if share == 16 else mg.BlockTensorTrain(8 // share)

    def plain(width: int) -> nn.Module:
        return nn.Linear(width, width)

    def structured(width: int) -> nn.Module:
        return mg.nn.StructuredLinear(width, width, btt)

    def trained(width: int, recipe: Any, optimizer: Any = torch.optim.Adam) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(64, width), nn.ReLU()]
        for _ in range(2):
            layers += [recipe(width), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(width, 10)).float()
        groups = mg.nn.param_groups(net, 1e-2, base_width=64, width=width)
        steps = optimizer(groups, lr=1e-2)
        for _ in range(250):
            rows = torch.randint(1200, (256,))
            steps.zero_grad()
            loss(net(x[rows]), y[rows]).backward()
            steps.step()
        return net

    def error(net: nn.Module) -> float:
        return 100 * float((net(x[1200:]).argmax(1) != y[1200:]).double().mean())

    narrow, some, middle = round(256 / share**0.5), [x[:600], x[600:1200]], ["2", "4"]
    dense = trained(256, plain)
    errors = {"as it is": error(dense)}
    errors["narrower"] = error(trained(narrow, plain))
    errors["narrower, SOAP"] = error(trained(narrow, plain, SOAP))
    errors["block tensor train"] = error(trained(256, structured))
    quantize_(rounded := copy.deepcopy(dense), some, Grid(32 // share), targets=middle)
    errors[f"{32 // share} bits"] = error(rounded)
    sparsity = 1 - (1 / share - 1 / 32)  # a bit for each entry says where the others are
    prune_(sparse := copy.deepcopy(dense), some, unstructured(sparsity), targets=middle)
    errors[f"{sparsity:.0%} zeros"] = error(sparse)
    best = min(list(errors)[1:], key=errors.__getitem__)
    whole, least, train = errors["as it is"], errors[best], errors["block tensor train"]
    macs = dict.fromkeys(errors, 2 * 256**2)
    macs |= {"block tensor train": 2 * mg.cost(btt.init(256, 256)).macs}
    macs |= dict.fromkeys(["narrower", "narrower, SOAP"], 2 * narrow**2)
    return locals()


def picture(found: Names, runs: Sequence[Names]) -> list[Panel]:
    """Errors and multiply-adds at one budget, and errors at all of them."""
    shares = [r["share"] for r in runs]
    names = ["narrower", "narrower, SOAP", "block tensor train"]
    lines = {name: (shares, [r["errors"][name] for r in runs]) for name in names}
    lines["bits"] = (shares, [r["errors"][f"{32 // r['share']} bits"] for r in runs])
    lines["zeros"] = (shares, [list(r["errors"].values())[5] for r in runs])
    return [
        bars(found["errors"], f"Test error %, 1/{found['share']} of the bytes", spec=".1f"),
        bars(found["macs"], "Multiply-adds of the hidden layers", spec=",d"),
        curves(lines, "Test error %", x="times smaller", y="percent", log="x"),
    ]


TOPIC = Topic(
    formula="bytes = numbers · bits / 8:   fewer numbers (width, structure, zeros) or fewer bits;\n"
    "the optimiser spends none of them",
    example=example,
    numbers=(
        Number("least", "lowest test error at this budget, percent", ".1f"),
        Number("best", "what reaches it", "s"),
        Number("train", "test error of the block tensor train", ".1f"),
        Number("whole", "test error without a budget", ".1f"),
    ),
    meaning="At 1/{share} of the bytes of the hidden layers the lowest error is {least:.1f} % "
    "({best}); the whole network has {whole:.1f} %. One seed and 597 test digits: a difference "
    "below one percent is noise. Bits and zeros need the trained network first and save no "
    "multiply-adds in a plain product; width and structure save them in training, too, by changing "
    "one line.",
    picture=picture,
    slider=Slider("share", (4, 8, 16), "Times fewer bytes"),
    exercise="Bits and structure can be combined. What would a block tensor train of rank 1 with "
    "8 bits store of a 256 × 256 layer?",
    answer="An eighth of the numbers at a quarter of the bits: 1/32 of the bytes. "
    "`matrigami quantize` takes structured models, and `compress.allocate` chooses for each layer.",
    sources=(
        "This project: docs/compression.md, docs/results/cifar100_published.",
        "Frantar et al. (2022), GPTQ, arXiv:2210.17323.",
    ),
)
