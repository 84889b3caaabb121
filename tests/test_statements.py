"""What the pages say of the code is so, where it can be counted."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import nn

from matrigami.nn import StructuredLinear
from matrigami.optim import OPTIMIZERS
from matrigami.structures import EXAMPLES

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
        str(path)
        for path in paths
        if path.stem not in {"_name", "name", "_launch_name"} and not path.exists()
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


def printed_structure() -> str:
    """The file that CONTRIBUTING prints."""
    return re.search(r"```python\n(.*?)```", page("CONTRIBUTING.md"), re.DOTALL)[1]


@pytest.fixture
def hankel(monkeypatch) -> Iterator[type]:
    """The recipe that CONTRIBUTING prints."""
    module = ModuleType("contributed")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with mock.patch.dict(EXAMPLES):
        exec(compile(printed_structure(), module.__name__, "exec"), vars(module))
        yield module.Hankel


FOLLOWED = """
from jaxtyping import install_import_hook

install_import_hook("matrigami.structures._hankel", "beartype.beartype")
import torch

import matrigami as mg
from matrigami.cli import main
from matrigami.structures import EXAMPLES

assert list(EXAMPLES)[3:6] == ["circulant", "hankel", "toeplitz"]
assert mg.parse("hankel") == mg.Hankel() == EXAMPLES["hankel"]
assert {"Hankel", "HankelMatrix"} <= {*mg.__all__} & {*mg.structures.__all__}
main(["list", "structures"])
A = mg.operators.mapped(mg.Hankel().init(5, 4), lambda t: t.to(torch.complex128) * (1 + 2j))
mg.testing.check_operator(A)
"""


def test_a_structure_is_one_file_and_one_line(tmp_path: Path):
    """CONTRIBUTING to the letter, in a copy: what is printed is a file of the house."""
    copy = shutil.copytree(ROOT / "src", tmp_path / "src") / "matrigami" / "structures"
    (copy / "_hankel.py").write_text(printed_structure())
    text = (copy / "__init__.py").read_text()
    line = "from matrigami.structures._toeplitz import *\n"
    (copy / "__init__.py").write_text(text.replace(line, line.replace("toeplitz", "hankel") + line))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-c", FOLLOWED]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (listed,) = [line for line in ran.stdout.splitlines() if line.startswith("hankel")]
    assert "antidiagonal" in listed
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    style = [sys.executable, "-m", "ruff", "check", "--no-cache", str(copy)]
    checked = subprocess.run(style, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


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
