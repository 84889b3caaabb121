"""Pages in HTML that need no network, no server and no other file.

Templates are in the folder `templates`: `page.html` has head, style and script of all pages, and
`parts.html` tables and figures. What is put into them is escaped, unless a template says that it is
`safe`.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined


class Drawing(NamedTuple):
    """An image inside of a page.

    Attributes:
        name: Where links lead to.
        content: The file.
        kind: `png` or `svg+xml`.
        caption: What is to be seen.
    """

    name: str
    content: bytes
    kind: str
    caption: str

    @property
    def url(self) -> str:
        """The image itself, as an address."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.content).decode()}"


def page(template: str, **parts: Any) -> str:
    """A page.

    Args:
        template: Its file.
        parts: What the template has places for.
    """
    return _ENVIRONMENT.get_template(template).render(parts)


def is_numeric(cell: Any) -> bool:
    """Whether a cell stands to the right.

    Examples:
        >>> is_numeric("-0.5 %"), is_numeric("- 5"), is_numeric(3)
        (True, False, True)
    """
    text = str(cell)
    return text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())


def rows_of(values: Mapping[str, Any]) -> list[list[Any]]:
    """Names and values of JSON as rows of a table.

    Examples:
        >>> rows_of({"a": [1], "b": None})
        [['a', '[1]'], ['b', '']]
    """
    flat = {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in values.items()}
    return [[k, "" if v is None else v] for k, v in flat.items()]


_ENVIRONMENT = Environment(
    loader=PackageLoader("matrigami"),
    autoescape=True,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
)
_ENVIRONMENT.filters["rows"] = rows_of
_ENVIRONMENT.tests["numeric"] = is_numeric
