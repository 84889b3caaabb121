"""What the pages say of the code is so, where it can be counted."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from matrigami.nn import StructuredLinear
from matrigami.optim import OPTIMIZERS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "matrigami"


def page(name: str) -> str:
    return (ROOT / name).read_text()


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose head begins with a word, and what the head says of them."""
    table = text[text.index(f"| {first} |") :].split("\n\n", maxsplit=1)[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return lines[:1] + lines[2:]


def test_architecture_names_files_that_exist():
    table = page("ARCHITECTURE.md").split("## Where to put things")[1]
    named = re.findall(r"`([\w/]+\.(?:py|md))`", table)
    homes = [ROOT if name.startswith(("docs/", "tests/")) else PACKAGE for name in named]
    paths = [home / name for home, name in zip(homes, named, strict=True)]
    assert len(paths) > 10
    assert [
        str(path) for path in paths if path.stem not in {"_name", "name"} and not path.exists()
    ] == []


def test_architecture_names_tables_in_their_files():
    table = page("ARCHITECTURE.md").split("## Where to put things")[1]
    for name, words in re.findall(r"`([\w/]+\.py)` \(([^)]*)\)", table):
        for word in re.findall(r"`(\w+)`", words):
            assert re.search(rf"^{word}\b", (PACKAGE / name).read_text(), re.MULTILINE), (
                name,
                word,
            )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_keeps_as_much_as_its_table_says(name: str):
    head, *optimisers = rows(page("docs/optimizers.md"), "optimiser")
    column = head.index("state beside $G$")
    cls = OPTIMIZERS[name]
    (formula,) = (row[column] for row in optimisers if row[0] == f"`{cls.__name__}`")
    m, n = 10, 64
    said = re.sub(r"(\d)?([mn])([mn]|\^2)", counted, formula.strip("$"))
    layer = nn.Linear(n, m, bias=False)
    loss = nn.CrossEntropyLoss()
    optimizer = cls(layer, loss) if name == "kfac" else cls(layer.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss(layer(torch.randn(20, n)), torch.randint(0, m, (20,))).backward()
        optimizer.step()
    kept = [
        t.numel() for t in optimizer.state[layer.weight].values() if isinstance(t, torch.Tensor)
    ]
    assert sum(kept) == pytest.approx(eval(said, {"m": m, "n": n}), abs=2 * (m + n))


def counted(term: re.Match[str]) -> str:
    """`2mn` as `2*m*n`."""
    factor, first, second = term.groups()
    return f"{factor or 1}*{first}*{first if second == '^2' else second}"


@pytest.fixture
def hankel(monkeypatch) -> type:
    """The recipe that CONTRIBUTING prints."""
    code = re.search(r"```python\n(.*?)```", page("CONTRIBUTING.md"), re.DOTALL)[1]
    module = ModuleType("contributed")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, module.__name__, "exec"), vars(module))
    return module.Hankel


def test_the_printed_structure_works_in_half_precision(hankel):
    layer, x = StructuredLinear(12, 9, hankel()), torch.randn(5, 12)
    half = layer(x)
    got = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), half, rtol=0.05, atol=0.05)


@pytest.mark.compile
def test_the_printed_structure_exports_with_any_number_of_tokens(hankel):
    layer = StructuredLinear(12, 9, hankel())
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    program = torch.export.export(layer, (torch.randn(5, 12),), dynamic_shapes=({0: tokens},))
    x = torch.randn(7, 12)
    torch.testing.assert_close(program.module()(x), layer(x))
