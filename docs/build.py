"""What the site computes as it is built: tables of structures and rules, formulas, root pages.

MkDocs calls the functions named `on_...`; nothing is fetched, then or when a page is read.
"""

import html
import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
SIZE = 1024
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
EXAMPLE = re.compile(r"^\[`(\w+\.py)`\]\(examples/\1\)$", re.MULTILINE)
QUESTIONS = (
    *("solve", "inverse", "pinv", "slogdet", "trace", "diagonal", "entries"),
    *("norm", "svd", "svdvals", "eigh", "cholesky", "power", "exp"),
)
ROOT_PAGES = {"architecture.md": "ARCHITECTURE.md", "contributing.md": "CONTRIBUTING.md"}


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Fill in the pages of the root, and the table of structures."""
    name = page.file.src_uri
    if name in ROOT_PAGES:
        text = (ROOT / ROOT_PAGES[name]).read_text(encoding="utf-8")
        return text.replace("ARCHITECTURE.md", "architecture.md").replace("](docs/", "](")
    if name == "structures.md":
        markdown = markdown.replace("<!-- table -->", _table())
        return markdown.replace("<!-- each -->", _sections())
    if name == "algebra.md":
        return EXAMPLE.sub(_example, markdown.replace("<!-- rules -->", _rules()))
    return markdown.replace("<!-- settings -->", _settings()) if name == "studies.md" else markdown


def on_page_content(content: str, *, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def mathml(match: re.Match[str]) -> str:
        """One formula."""
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return FORMULA.sub(mathml, content)


def _table() -> str:
    """Name, recipe and exact cost of each structure's example."""
    from matrigami import cost  # noqa: PLC0415 - pages without the table need no torch
    from matrigami.structures import EXAMPLES  # noqa: PLC0415

    rows = ["| structure | example | parameters | multiply–adds | of dense |"]
    rows.append("|---|---|--:|--:|--:|")
    for name, recipe in EXAMPLES.items():
        spent = cost(recipe.init(SIZE, SIZE))
        share = f"{100 * spent.macs / SIZE**2:.3g} %"
        link = f"[`{name}`](#{name})"
        cells = [link, f"`{_short(recipe)}`", f"{spent.params:,}", f"{spent.macs:,}", share]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _rules() -> str:
    """For which functions each structure has a rule of its own."""
    from matrigami import operators, structures  # noqa: PLC0415 - as above

    kinds = {name: type(recipe.init(8, 8)) for name, recipe in structures.EXAMPLES.items()}
    del kinds["dense"]  # LAPACK answers
    kinds = {f"[{name}](structures.md#{name})": kind for name, kind in kinds.items()}
    kinds["sparse"] = structures.SparseMatrix
    rows = ["| structure | always | under a condition |", "|---|---|---|"]
    for name, kind in kinds.items():
        rules = {q: getattr(operators, q).rules.get(kind, ()) for q in QUESTIONS}
        always = [q for q in QUESTIONS if any(rule.where is None for rule in rules[q])]
        sometimes = [q for q in QUESTIONS if rules[q] and q not in always]
        rows.append(f"| {name} | {_codes(always)} | {_codes(sometimes)} |")
    return "\n".join(rows)


def _codes(names: list[str]) -> str:
    """Names as code."""
    return " ".join(f"`{name}`" for name in names)


def _example(match: re.Match[str]) -> str:
    """The file of an example in place of the link to it."""
    text = (ROOT / "docs" / "examples" / match[1]).read_text(encoding="utf-8")
    return f'``` {{ .py title="{match[1]}" }}\n{text}```'


def _sections() -> str:
    """The docstring of each structure's file, below its name."""
    from matrigami.structures import EXAMPLES  # noqa: PLC0415

    parts = []
    for name, recipe in EXAMPLES.items():
        text = inspect.getdoc(inspect.getmodule(type(recipe))) or ""
        parts.append(f"### {type(recipe).__name__} {{ #{name} }}\n\n{text}\n")
    return "\n".join(parts)


def _settings() -> str:
    """Meaning and default of each setting of a run that has one."""
    from matrigami.studies import RunConfig  # noqa: PLC0415 - as above
    from matrigami.studies._config import NOTED  # noqa: PLC0415

    text = inspect.getdoc(RunConfig) or ""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for field in fields(RunConfig):
        if field.default is not MISSING and field.name not in NOTED:
            meaning = re.search(rf"^ +{field.name}: (.*(?:\n {{8}} .*)*)$", text, re.MULTILINE)
            default = "–" if field.default is None else f"`{json.dumps(field.default)}`"
            words = " ".join(meaning[1].split()) if meaning else ""
            rows.append(f"| `{field.name}` | {default} | {words} |")
    return "\n".join(rows)


def _short(recipe: Any) -> str:
    """The recipe without its defaults."""
    given = {
        name: getattr(recipe, name)
        for name, parameter in inspect.signature(type(recipe)).parameters.items()
        if getattr(recipe, name) != parameter.default
    }
    return f"{type(recipe).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
