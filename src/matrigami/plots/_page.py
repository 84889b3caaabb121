"""Parts of HTML files that need no network, no server and no other file."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any


def filled(name: str, **parts: str) -> str:
    """A template of this package with its parts, the style and the script of all pages.

    Args:
        name: File of the template.
        parts: HTML of each place.
    """
    folder = resources.files("matrigami.plots")
    texts = {n: (folder / n).read_text("utf-8") for n in (name, "page.css", "page.js")}
    return Template(texts[name]).substitute(parts, style=texts["page.css"], script=texts["page.js"])


def figure(name: str, content: bytes, kind: str, caption: str) -> str:
    """An image inside the page, `png` or `svg+xml`."""
    data, text = base64.b64encode(content).decode(), html.escape(caption)
    return (
        f'<figure id="{html.escape(name)}"><button class="zoom" aria-pressed="false" '
        f'title="Enlarge"><img alt="{text}" src="data:image/{kind};base64,{data}"></button>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """An HTML table; cells that are numbers stand to the right."""
    cells = [html.escape(cell) for cell in header]
    sorts = [f"<button>{cell}</button>" if "sortable" in kind else cell for cell in cells]
    head = "".join(f'<th scope="col">{cell}</th>' for cell in sorts)
    body = "\n".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    table = f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>"
    return f'<div class="wide" tabindex="0"><table class="{kind}">{table}</table></div>'


def _cell(value: Any) -> str:
    """One cell."""
    text = str(value)
    numeric = text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())
    return f"<td{' class=number' if numeric else ''}>{html.escape(text)}</td>"


def mapping(values: Mapping[str, Any]) -> str:
    """Names and values."""
    flat = {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in values.items()}
    return table(["what", "value"], [[k, "" if v is None else v] for k, v in flat.items()])
