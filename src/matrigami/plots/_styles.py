"""How structures look in every figure of a study.

Colours are those of Okabe and Ito (2008), which people with colour-blindness tell apart; each
structure also has its own marker.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

COLORS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#8C6D31",
    "#F0E442",
)
MARKERS = "osD^vP*Xph"


class Style(NamedTuple):
    """How a structure is drawn everywhere."""

    color: str
    marker: str
    hollow: bool = False

    def look(self, size: float) -> dict[str, Any]:
        """What a plot of markers takes."""
        inside = {"mfc": "none", "mew": 1.2} if self.hollow else {"mec": "white", "mew": 0.5}
        return {"color": self.color, "ms": size, **inside}


def styles(records: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """Colour and marker of each structure: dense is black, then in the order of their names.

    A structure of a second study is hollow.
    """
    kinds = {str(r["structure"]): str(r.get("kind", r["structure"])) for r in records}
    studies = {str(r["structure"]): r.get("study") for r in records}
    order = sorted({*kinds.values()}, key=lambda kind: (kind != "dense", kind))
    first = next(iter(studies.values()), None)
    return {
        name: Style(
            COLORS[order.index(kind) % len(COLORS)],
            MARKERS[order.index(kind) % len(MARKERS)],
            studies[name] != first,
        )
        for name, kind in kinds.items()
    }
