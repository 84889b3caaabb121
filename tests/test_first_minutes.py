"""The pages for newcomers, followed to the letter from an empty folder.

Blocks with a title are written as files, Python blocks run and share their names, shell lines run;
a `text` block is the output of the block before it: its words and whole numbers, and
others to a tenth, for rounding differs from processor to processor. `...` stands for anything.
"""

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from matrigami.cli._main import run

DOCS = Path(__file__).parent.parent / "docs"
START = sorted((DOCS / "start").glob("*.md"))
PAGES = [*START, DOCS / "own.md"]
BLOCK = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[\w.]+)")?\n(?P<code>.*?)^```$'
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"-?(?<![\w.])\d+(?:[.,]\d+)*(?:e[+-]\d+)?(?![\w.]*\w)")
LONG = re.compile(r"study run (?!.*--dry-run)|runs/mine/|torchrun|--all|allocate\(|--plan|testing")
"""What takes longer than a few seconds, or needs what does; followed in the slow test."""


def shell(line: str) -> None:
    """One line of a shell block, in this process where that is possible."""
    program, *words = shlex.split(line, comments=True)
    if program == "matrigami":
        assert run(words) == 0
    elif program == "python":
        with mock.patch.object(sys, "argv", words):
            runpy.run_path(words[0], run_name="__main__")
    else:
        module = {"torchrun": "torch.distributed.run"}[program]
        subprocess.run([sys.executable, "-m", module, *words], check=True)


def is_alike(expected: str, printed: str) -> bool:
    """Whether it is what the page shows."""
    parts = [re.escape(part) for part in NUMBER.sub("\0", expected).split()]
    pattern = r"\s+".join(parts).replace(r"\.\.\.\s+", r"(?:.*?\s+)??").replace(r"\.\.\.", ".*?")
    found = re.fullmatch(pattern.replace("\0", r"(-?\d[\d.,e+-]*)"), printed.strip(), re.DOTALL)
    shown = [number.replace(",", "") for number in NUMBER.findall(expected)]
    got = [float(number.replace(",", "")) for number in found.groups()] if found else []
    nearly = [pytest.approx(float(x), rel=0 if x.isdigit() else 0.1) for x in shown]
    return got == nearly


def done(block: re.Match, names: dict, *, whole: bool) -> str:
    """Do what one block says; what it printed."""
    language, title, code = block.group("language", "title", "code")
    printed = io.StringIO()
    torch.manual_seed(0)
    if title:
        Path(title).write_text(code)
        return ""
    with contextlib.redirect_stdout(printed):
        if language == "python" and (whole or not LONG.search(code)):
            exec(compile(code, "page", "exec"), names)
        for line in code.splitlines() if language == "sh" else ():
            if line and (whole or not LONG.search(line)):
                shell(line)
    return printed.getvalue()


def followed(page: Path, names: dict, *, whole: bool) -> int:
    """Do what the page says; how many of its outputs were compared."""
    compared = 0
    for block in BLOCK.finditer(page.read_text()):
        printed, output = done(block, names, whole=whole), block["output"]
        if output is not None and (whole or not LONG.search(block["code"])):
            assert is_alike(output, printed), f"{block['code']}printed:\n{printed}"
            compared += 1
    return compared


COMPARED = {"researcher": 1, "engineer": 3, "training": 3, "hpc": 5, "student": 6, "own": 2}


def test_there_is_a_page_for_each_of_five_people():
    assert {page.stem for page in PAGES} == set(COMPARED)
    assert max(len(page.read_text().splitlines()) for page in START) <= 150


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page, tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.set_default_dtype(torch.float32)  # as a reader has it
    module = ModuleType(f"start_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert followed(page, vars(module), whole=whole) >= COMPARED[page.stem]
