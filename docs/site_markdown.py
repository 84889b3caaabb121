"""What the site adds to Markdown: formulas as MathML, and the pages in the root of the project."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor
from markdown.preprocessors import Preprocessor

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROOT_PAGE = re.compile(r"^This page is `(\w+\.md)` in the root of the project\.$")


class Formulas(Postprocessor):
    """LaTeX as MathML, which browsers draw without a script."""

    def run(self, text: str) -> str:
        """All formulas of a page."""

        def mathml(match: re.Match[str]) -> str:
            display = "block" if match[1] == "div" else "inline"
            return convert(html.unescape(match[2]), display=display)

        return FORMULA.sub(mathml, text)


class RootPages(Preprocessor):
    """The text of a page that is in the root, where forges look for it."""

    def run(self, lines: list[str]) -> list[str]:
        """The page itself in place of the line that names it."""
        found = [ROOT_PAGE.match(line) for line in lines]
        if not any(found):
            return lines
        name = next(match[1] for match in found if match)
        text = (ROOT / name).read_text(encoding="utf-8")
        text = text.replace("ARCHITECTURE.md", "architecture.md").replace("](docs/", "](")
        return text.split("\n")


class SiteExtension(Extension):
    """Both."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Markdown's name
        """Formulas last, root pages first."""
        md.postprocessors.register(Formulas(md), "formulas", -100)
        md.preprocessors.register(RootPages(md), "root_pages", 100)


def makeExtension(**settings: object) -> SiteExtension:  # noqa: N802 - Markdown's name
    """Called by Markdown."""
    return SiteExtension(**settings)
