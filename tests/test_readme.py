"""Every Python block of the README and of the documentation runs, and prints what it says.

A block with `>>>` is a doctest. Any other block is a program; a `text` block right after it is its
output (`...` stands for anything). The blocks of one page share their names.
"""

import contextlib
import doctest
import io
import os
import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from matrigami.structures import EXAMPLES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
START = sorted((ROOT / "docs" / "start").glob("*.md"))  # followed by test_first_minutes
LINKING = sorted({*PAGES, *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"})
BLOCK = re.compile(
    r"^```python[^\n]*\n(?P<code>.*?)^```$(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """Line, code and expected output of each Python block."""
    text = page.read_text()
    return [
        (text.count("\n", 0, m.start()) + 2, m["code"], m["output"]) for m in BLOCK.finditer(text)
    ]


def linked(page: Path) -> list[Path]:
    """The files that a page links to."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [t for t in targets if not t.startswith(("http://", "https://", "mailto:"))]
    return [Path(os.path.normpath(page.parent / target)) for target in local]


def run_doctest(code: str, name: str, line: int, names: dict[str, Any]) -> None:
    """The examples of one block; they may change `names`."""
    test = doctest.DocTestParser().get_doctest(code, names, name, name, line)
    report = io.StringIO()
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.write, clear_globs=False)
    assert result.failed == 0, report.getvalue()


def run_program(code: str, output: str | None, name: str, line: int, names: dict[str, Any]) -> None:
    """One block; its output is compared if the page shows it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (line - 1) + code, name, "exec"), names)
    if output is not None:
        same = doctest.OutputChecker().check_output(output, printed.getvalue(), FLAGS)
        assert same, f"{name}:{line} printed:\n{printed.getvalue()}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as a reader has it
    module = ModuleType(f"page_{page.stem.lower()}")  # so that its classes pickle
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    with mock.patch.dict(EXAMPLES):  # a page may define structures
        for line, code, output in blocks(page):
            torch.manual_seed(0)
            if ">>>" in code:
                run_doctest(code, str(page), line, names)
            else:
                run_program(code, output, str(page), line, names)


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path):
    assert [path for path in linked(page) if not path.exists()] == []


def test_links_of_the_site_lead_to_what_it_has():
    pattern = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["exclude_docs"]
    docs = ROOT / "docs"
    left_out = {*docs.glob(pattern[1:] if pattern[0] == "/" else f"**/{pattern}")}
    pages = docs.rglob("*.md")
    assert docs / "tables.py" in left_out
    assert [path for page in pages for path in linked(page) if path in left_out] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_what_is_computed_is_up_to_date(page: Path):
    names = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    text = page.read_text(encoding="utf-8")
    assert names["filled"](text) == text, "python docs/tables.py brings it up to date"


def test_the_readme_has_a_program_with_its_output():
    shown = [output for _, _, output in blocks(ROOT / "README.md") if output]
    assert shown, "the first screen of README.md shows a snippet and what it prints"


def test_the_figure_of_the_first_screen_is_told_in_words():
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    from benchmarks.overview import alternative, matrices

    told = re.search(r"!\[(.*?)\]\(docs/overview.png\)", (ROOT / "README.md").read_text())[1]
    said, _, least = alternative(matrices()).partition("; ")
    assert told.startswith(said)
    assert float(re.search(r"most (\S+) of b", least)[1]) < 1e-11  # rounding differs by processor


def test_the_start_page_leads_to_every_page():
    docs = ROOT / "docs"
    leads = set(re.findall(r"\]\(([^)#]+)\)", (docs / "index.md").read_text()))
    pages = {str(page.relative_to(docs)) for page in (*docs.glob("*.md"), *START)}
    assert pages - leads == {"index.md"}
    assert pages - set(re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text())) == set()
