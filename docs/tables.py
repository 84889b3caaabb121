"""Writes into the pages what is computed: tables of structures, rules and settings; examples.

`python docs/tables.py` fills in what is between `<!-- computed: NAME -->` and `<!-- end -->`, so
that pages read the same on a forge and on the site. A test asks whether they are up to date.
"""

import inspect
import json
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from matrigami import cost, operators, structures
from matrigami.structures import EXAMPLES
from matrigami.studies import RunConfig
from matrigami.studies._config import NOTED

HERE = Path(__file__).parent
SIZE = 1024
SLOT = re.compile(r"(<!-- computed: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
QUESTIONS = (
    *("solve", "inverse", "pinv", "slogdet", "trace", "diagonal", "entries"),
    *("norm", "svd", "svdvals", "eigh", "cholesky", "power", "exp"),
)


def filled(text: str) -> str:
    """A page with every slot computed anew."""

    def slot(match: re.Match[str]) -> str:
        name = match[2]
        content = _example(name) if name.endswith(".py") else PARTS[name]()
        return f"{match[1]}\n{content}\n\n{match[3]}"

    return SLOT.sub(slot, text)


def main() -> None:
    """Rewrite the pages that are out of date, and name them."""
    for page in sorted(HERE.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            page.write_text(new, encoding="utf-8")
            sys.stdout.write(f"{page.name}\n")


def _table() -> str:
    """Name, recipe and exact cost of each structure's example."""
    rows = ["| structure | example | parameters | multiply–adds | of dense |"]
    rows.append("|---|---|--:|--:|--:|")
    for name, recipe in EXAMPLES.items():
        spent = cost(recipe.init(SIZE, SIZE))
        share = f"{100 * spent.macs / SIZE**2:.3g} %"
        link = f"[`{name}`](#{_slug(recipe)})"
        cells = [link, f"`{_short(recipe)}`", f"{spent.params:,}", f"{spent.macs:,}", share]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _rules() -> str:
    """For which functions each structure has a rule of its own."""
    kinds = {name: type(recipe.init(8, 8)) for name, recipe in structures.EXAMPLES.items()}
    del kinds["dense"]  # LAPACK answers
    kinds = {f"[{n}](structures.md#{_slug(EXAMPLES[n])})": kind for n, kind in kinds.items()}
    kinds["sparse"] = structures.SparseMatrix
    rows = ["| structure | always | under a condition |", "|---|---|---|"]
    for name, kind in kinds.items():
        rows.append(f"| {name} | {' | '.join(map(_codes, _ruled(kind)))} |")
    return "\n".join(rows)


def _ruled(kind: type) -> tuple[list[str], list[str]]:
    """The functions for which a structure has a rule, always and under a condition."""
    rules = {q: getattr(operators, q).rules.get(kind, ()) for q in QUESTIONS}
    always = [q for q in QUESTIONS if any(rule.where is None for rule in rules[q])]
    return always, [q for q in QUESTIONS if rules[q] and q not in always]


def _codes(names: list[str]) -> str:
    """Names as code."""
    return " ".join(f"`{name}`" for name in names)


def _example(name: str) -> str:
    """The file of an example."""
    text = (HERE / "examples" / name).read_text(encoding="utf-8")
    return f'```py title="{name}"\n{text}```'


def _sections() -> str:
    """The docstring of each structure's file, below its name."""
    parts = []
    for recipe in EXAMPLES.values():
        text = inspect.getdoc(inspect.getmodule(type(recipe))) or ""
        parts.append(f"### {type(recipe).__name__}\n\n{text}\n")
    return "\n".join(parts).rstrip()


def _settings() -> str:
    """Meaning and default of each setting of a run that has one."""
    text = inspect.getdoc(RunConfig) or ""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for field in fields(RunConfig):
        if field.default is not MISSING and field.name not in NOTED:
            meaning = re.search(rf"^ +{field.name}: (.*(?:\n {{8,}}.*)*)$", text, re.MULTILINE)
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


def _slug(recipe: Any) -> str:
    """The anchor of its section."""
    return type(recipe).__name__.lower()


PARTS = {"structures": _table, "each": _sections, "rules": _rules, "settings": _settings}
"""What can be computed, beside the files of the examples."""

if __name__ == "__main__":
    main()
